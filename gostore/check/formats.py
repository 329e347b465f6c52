"""Files of histories: our own, Jepsen's register logs, and key-value logs of EDN maps.

A reader is given lines, never a path: opening files is the caller's. Which format it is, the first line says.

* ``gostore``: :mod:`gostore.check.history`.
* ``jepsen``: lines ``INFO jepsen.util - PROCESS :TYPE :F VALUE`` about one register that begins as nil. TYPE is invoke,
  ok, fail or info; F is read, write or cas; VALUE an integer, nil, ``[EXPECTED NEW]`` or ``:timed-out``. A ``:fail
  :cas [1 2]`` is an answer (the register held another value), a ``:fail :read :timed-out`` tells nothing, an ``:info``
  may or may not have happened. Lines of the nemesis are passed over.
* ``key-value``: lines ``{:process 0, :type :invoke, :f :append, :key "k", :value "v"}``; F is get, put or append, a
  get's value is nil in its invocation; keys begin as the empty string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Final, NamedTuple

from gostore.check.history import History, Operation, broken
from gostore.check.models import MODELS
from gostore.check.transactions import MODEL as TRANSACTIONS
from gostore.check.transactions import transaction_of
from gostore.core.errors import BadRequest

LINE_CHARACTERS_MAX: Final = 1 << 20


class Moment(NamedTuple):
    """What a line of a foreign log says."""

    process: int
    type: str
    kind: str
    key: str | None
    value: Any


JEPSEN_LINE: Final = "INFO jepsen.util - PROCESS :invoke|:ok|:fail|:info :read|:write|:cas VALUE"
_JEPSEN: Final = re.compile(r"INFO\s+jepsen\.util\s+-\s+(\d+|:nemesis)\s+:(invoke|ok|fail|info)\s+:(\S+)\s*(.*?)\s*")
_CAS: Final = re.compile(r"\[(-?\d+|nil)\s+(-?\d+|nil)\]")
_INTEGER: Final = re.compile(r"-?\d+")

KEY_VALUE_LINE: Final = '{:process N, :type :invoke|:ok|:fail|:info, :f :get|:put|:append, :key "K", :value "V"}'
_STRING: Final = r'"(?:[^"\\]|\\.)*"'
_KEY_VALUE: Final = re.compile(
    r"\{:process\s+(\d+),?\s+:type\s+:(invoke|ok|fail|info),?\s+:f\s+:(get|put|append),?"
    rf"\s+:key\s+({_STRING}),?\s+:value\s+({_STRING}|nil|:timed-out)\s*\}}"
)
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


def _jepsen(line: str) -> Moment | None:
    """None: nothing that concerns the register. Raises ``ValueError`` for a line that is none of Jepsen's."""
    found = _JEPSEN.fullmatch(line)
    if found is None:
        raise ValueError
    process, type_, kind, text = found.groups()
    if process == ":nemesis":
        return None
    if kind not in ("read", "write", "cas"):
        raise ValueError
    value: Any
    if type_ in ("fail", "info") and text.startswith(":"):
        value = None
    elif kind == "cas":
        pair = _CAS.fullmatch(text)
        if pair is None:
            raise ValueError
        value = [_integer(pair[1]), _integer(pair[2])]
    else:
        value = _integer(text)
    return Moment(int(process), type_, kind, None, value)


def _integer(text: str) -> int | None:
    if text == "nil":
        return None
    if not _INTEGER.fullmatch(text):
        raise ValueError
    return int(text)


def _key_value(line: str) -> Moment | None:
    found = _KEY_VALUE.fullmatch(line)
    if found is None:
        raise ValueError
    process, type_, kind, key, value = found.groups()
    return Moment(int(process), type_, kind, _string(key), _string(value) if value.startswith('"') else None)


def _string(quoted: str) -> str:
    def plain(escape: re.Match[str]) -> str:
        if escape[1] not in _ESCAPES:
            raise ValueError
        return _ESCAPES[escape[1]]

    return re.sub(r"\\(.)", plain, quoted[1:-1])


def _foreign(
    model: str, expected: str, parse: Callable[[str], Moment | None], lines: Iterable[str], name: str
) -> History:
    history = History(model)
    running: dict[int, Operation] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            moment = parse(line.strip())
        except ValueError:
            raise broken(name, number, expected, line) from None
        if moment is not None and (problem := _take(history, running, moment)):
            raise broken(name, number, problem, line)
    return history


def _take(history: History, running: dict[int, Operation], moment: Moment) -> str:
    """Record a moment; returns what was expected instead, if anything."""
    process, type_, kind, key, value = moment
    reads = kind in ("read", "get")
    operation = running.get(process)
    if type_ == "invoke":
        if operation is not None:
            return f"the return of process {process}'s {operation.kind} before it invokes anything else"
        if value is None and kind in ("cas", "put", "append"):
            return f"a value for the {kind}"
        running[process] = history.invoke(process, kind, key, None if reads else value)
        return ""
    if operation is None or (operation.kind, operation.key) != (kind, key):
        return f"the return of what process {process} invoked ({operation.kind if operation else 'nothing'})"
    if not reads and value is not None and value != operation.argument:
        return f"the value of the invocation, {operation.argument!r}"
    del running[process]
    if type_ == "ok":
        history.ok(operation, value if reads else True if kind == "cas" else None)
    elif type_ == "fail" and kind == "cas" and value is not None:
        history.ok(operation, False)
    elif type_ == "fail":
        history.fail(operation)
    else:
        history.info(operation)
    return ""


def read_jepsen(lines: Iterable[str], name: str = "history") -> History:
    """A register log of Jepsen. Raises :class:`BadRequest` with name, line and what was expected (so do the others)."""
    return _foreign("register", JEPSEN_LINE, _jepsen, lines, name)


def read_key_value(lines: Iterable[str], name: str = "history") -> History:
    """A key-value log of EDN maps."""
    return _foreign("key_value", KEY_VALUE_LINE, _key_value, lines, name)


def read_gostore(lines: Iterable[str], name: str = "history") -> History:
    """A history of our own, whose operations are those of its model."""
    history = History.load(lines, name)
    if history.model != TRANSACTIONS and history.model not in MODELS:
        known = ", ".join([*MODELS, TRANSACTIONS])
        raise BadRequest(
            f"{name}:1: expected one of the models {known}; found {history.model!r:.60}", file=name, line=1
        )
    translate = transaction_of if history.model == TRANSACTIONS else MODELS[history.model].call
    for operation in history:
        try:
            translate(operation)
        except BadRequest as error:
            # The file has a line for the header and one for each position.
            line = 2 + (operation.invoked if operation.returned is None else operation.returned)
            raise BadRequest(f"{name}:{line}: {error.message}", file=name, line=line) from None
    return history


FORMATS: Final[dict[str, Callable[[Iterable[str], str], History]]] = {
    "gostore": read_gostore,
    "jepsen": read_jepsen,
    "key-value": read_key_value,
}


def read_history(lines: Iterable[str | bytes], name: str = "history", format: str = "auto") -> History:
    """A history in one of :data:`FORMATS`; ``auto``: the first line says which.

    Raises :class:`BadRequest`: for a line that cannot be read with ``name``, number and what was expected.
    """
    if format != "auto" and format not in FORMATS:
        raise BadRequest(f"there is no format {format!r}; there are auto, {', '.join(FORMATS)}")
    texts = _texts(lines, name)
    head: list[str] = []
    for line in texts:
        head.append(line)
        if line.strip():
            break
    if not head or not head[-1].strip():
        raise BadRequest(f"{name}: expected a history; found nothing in it")
    if format == "auto":
        format = _format_of(head[-1], name, len(head))
    return FORMATS[format](chain(head, texts), name)


def _texts(lines: Iterable[str | bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if len(line) > LINE_CHARACTERS_MAX:
            raise BadRequest(f"{name}:{number}: expected at most {LINE_CHARACTERS_MAX:,} characters in a line")
        try:
            yield line.decode() if isinstance(line, bytes) else line
        except UnicodeDecodeError:
            raise broken(name, number, "text in UTF-8", repr(line[:60])) from None


def _format_of(first: str, name: str, number: int) -> str:
    text = first.strip()
    if text.startswith("{:"):
        return "key-value"
    if text.startswith("{"):
        return "gostore"
    if text.startswith("INFO"):
        return "jepsen"
    expected = f'the first line of a history: {{"gostore_history": 1, ...}}, {JEPSEN_LINE}, or {KEY_VALUE_LINE}'
    raise broken(name, number, expected, first)
