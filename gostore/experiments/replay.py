"""A run that failed, again: its token, and a world that can be stopped at any event.

A token holds all that a run is a function of: seed, number of nodes, virtual seconds, fault schedule, settings, and the
versions of what computed it. ``gostore sim`` prints one for every run that breaks a promise; whoever has it sees the
same run::

    import gostore as gs

    world = gs.replay("gs1.eJx...")
    world.run.violations            # the same as before; the trace has the same hash
    moment = world.at(31_415)       # the world just before its event 31,415: every node's state
    moment.nodes["n3"]["status"]["epoch"]
    world.diagram()                 # what led to the violation, as a space-time diagram

An *event* of a run is a callback of a node; ``Run.events`` counts them. :meth:`Replay.at` also takes an event of the
journal, and stops right after what published it.
"""

from __future__ import annotations

import base64
import binascii
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Self

import msgpack

import gostore
from gostore.core.errors import BadRequest
from gostore.core.events import CATEGORIES, Event
from gostore.experiments.simulation import Run, Session
from gostore.faults import Step
from gostore.sim.errors import Stopped
from gostore.sim.world import CLIENT
from gostore.trace import Journal
from gostore.viz.spacetime import SpaceTime, space_time

PREFIX: Final = "gs1."
TOKEN_SIZE_BYTES_MAX: Final = 64 * 1024

LIBRARIES: Final = ("aiohttp", "msgpack", "sortedcontainers", "xxhash")
"""What a node computes with, beside Python itself."""

LAST_S: Final = 2.0
STATES: Final = tuple(category for category in CATEGORIES if category != "message")

TAIL: Final = 12
"""Events of the journal that a moment shows."""


def _git(*arguments: str) -> str:
    """Raises ``OSError`` and ``SubprocessError`` where there is no git, or no checkout."""
    here = str(Path(gostore.__file__).parent)
    return subprocess.run(
        ["git", "-C", here, *arguments],  # noqa: S607
        capture_output=True, text=True, check=True, timeout=10,
    ).stdout.strip()  # fmt: skip


@cache
def commit() -> str:
    """The commit that this code is of, with ``+`` behind it when files differ from it; else the package's version."""
    try:
        changed = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "."))
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return f"version {gostore.__version__}"


@cache
def code() -> str:
    """The name of what is in the package, the same for all commits that do not touch it."""
    try:
        return _git("rev-parse", "--short=12", "HEAD:./")
    except (OSError, subprocess.SubprocessError):
        return f"version {gostore.__version__}"


def _versions() -> dict[str, str]:
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "commit": commit()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "none"
    return found


@dataclass(frozen=True, slots=True)
class Token:
    """What a run is a function of. ``schedule``: None for the one that the seed draws. ``trace_sha256``: its hash.

    ``settings`` of the cluster, where they are not those that every run has: plain values.
    """

    seed: int
    nodes: int
    seconds: float
    profile: str
    schedule: tuple[Step, ...] | None = None
    trace_sha256: str = ""
    versions: dict[str, str] = field(default_factory=_versions)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, *, drawn: bool) -> Self:
        """``drawn``: the schedule is the one that the seed draws, and need not be written down."""
        schedule = None if drawn else tuple(run.schedule)
        token = cls(run.seed, run.nodes, run.seconds, run.profile, schedule, run.trace_sha256)
        return replace(token, settings=run.settings)

    def __str__(self) -> str:
        steps = None if self.schedule is None else [list(asdict(step).values()) for step in self.schedule]
        wire = [
            self.seed, self.nodes, self.seconds, self.profile, steps, bytes.fromhex(self.trace_sha256), self.versions,
        ]  # fmt: skip
        if self.settings:
            wire.append(self.settings)
        packed = zlib.compress(msgpack.packb(wire), 9)
        return PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises :class:`BadRequest` for what is no token."""
        text = text.strip()
        if not text.startswith(PREFIX) or len(text) > TOKEN_SIZE_BYTES_MAX:
            raise BadRequest(
                f"{text[:40]!r} is no replay token: one begins with {PREFIX!r}, as `gostore sim` prints it"
            )
        body = text[len(PREFIX) :]
        try:
            unpacker = zlib.decompressobj()
            packed = unpacker.decompress(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), TOKEN_SIZE_BYTES_MAX)
            if not unpacker.eof:
                raise ValueError("it ends too early, or is too large")
            match msgpack.unpackb(packed):
                case [
                    int(seed), int(nodes), float(seconds), str(profile), steps, bytes(sha256), dict(versions), *more
                ]:  # fmt: skip
                    schedule = None if steps is None else tuple(Step(*step) for step in steps)
                    settings = dict(*more)
                    return cls(seed, nodes, seconds, profile, schedule, sha256.hex(), versions, settings)
            raise ValueError("it holds something else")
        except (ValueError, TypeError, binascii.Error, zlib.error, msgpack.UnpackException) as error:
            raise BadRequest(
                f"the replay token {text[:24]}... is damaged ({error}): copy it once more, whole"
            ) from None

    def differences(self) -> list[str]:
        """Where this interpreter and code are not those of the token, as sentences; the trace may then be another."""
        here = _versions()
        return [
            f"{what} was {self.versions.get(what, 'unknown')}, here it is {have}"
            for what, have in here.items()
            if self.versions.get(what) != have
        ]


@dataclass(frozen=True, slots=True, repr=False)
class Moment:
    """A world that stands still just before event ``index``.

    ``nodes``: name -> its state (:meth:`gostore.sim.SimCluster.states`); ``events``: the journal so far. ``cluster`` is
    the stopped cluster itself, for whoever wants to look at more (``cluster.sim.nodes``); it must not be run on.
    """

    index: int
    time_s: float
    nodes: dict[str, dict[str, Any]]
    events: tuple[Event, ...]
    cluster: Any = field(compare=False)

    def rows(self) -> list[dict[str, Any]]:
        """One flat record for each node, as the table shows it."""
        rows = []
        for name, state in self.nodes.items():
            status = state["status"] or {}
            rows.append(
                {
                    "node": name,
                    "life": state["life"],
                    "state": status.get("state", ""),
                    "epoch": status.get("epoch", ""),
                    "master": status.get("master") or "",
                    "suspects": " ".join(status.get("suspect", ())),
                    "leads": len(status.get("shards", ())),
                    "holds": len(status.get("shards_held", ())),
                    "chunks": status.get("chunks", ""),
                    "unsynced B": sum(state["unsynced"].values()),
                    "clock s": f"{state['clock_offset_s']:+.3f}",
                    "tasks": state["tasks"],
                }
            )
        return rows

    def text(self) -> str:
        rows = self.rows()
        head = list(rows[0]) if rows else []
        table = [head, *([str(row[column]) for column in head] for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        title = f"event {self.index:,}, {self.time_s:.6f} virtual s"
        return "\n".join([title, *map(str.rstrip, lines), "", *map(_line, self.events[-TAIL:])])

    __repr__ = __str__ = text

    def _repr_html_(self) -> str:
        import html

        rows = self.rows()
        head = "".join(f"<th>{html.escape(column)}</th>" for column in (rows[0] if rows else ()))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
        )
        tail = "\n".join(map(_line, self.events[-TAIL:]))
        return (
            f"<b>event {self.index:,}</b>, {self.time_s:.6f} virtual s"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><pre>{html.escape(tail)}</pre>"
        )


def _line(event: Event) -> str:
    data = " ".join(f"{name}={value}" for name, value in event.data.items())
    return f"{event.time_s:12.6f} s  {event.node:<8} {event.kind} {data}"[:150]


class Replay:
    """See :func:`replay`. ``differences`` say why the trace may not be the same; :attr:`same` tells whether it is."""

    def __init__(self, token: Token) -> None:
        self.token = token
        self.differences = token.differences()
        self._run: Run | None = None
        self._journal: Journal
        self._indices: Sequence[int] = ()
        self._stopped: Session | None = None

    def __repr__(self) -> str:
        token = self.token
        return f"<Replay of seed {token.seed}: {token.nodes} nodes, {token.seconds:g} s, faults {token.profile}>"

    def _session(self) -> Session:
        token = self.token
        return Session(
            token.seed, nodes=token.nodes, seconds=token.seconds, profile=token.profile, schedule=token.schedule,
            messages=True, **token.settings,
        )  # fmt: skip

    @property
    def run(self) -> Run:
        """The whole run, judged again; performed when it is first asked for."""
        if self._run is None:
            with self._session() as session:
                self._run = session.perform()
                self._journal, self._indices = session.cluster.events, session.indices
        return self._run

    @property
    def same(self) -> bool:
        """Whether the trace is the one that the token names, byte for byte."""
        return self.run.trace_sha256 == self.token.trace_sha256

    @property
    def journal(self) -> Journal:
        """Of the whole run, with every message of every node and of the client."""
        _ = self.run
        return self._journal

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(self.journal)

    def index_of(self, event: Event) -> int:
        """The index in the run of what published a journal's event. Raises :class:`BadRequest` for another's event."""
        for position, known in enumerate(self.events, self.journal.forgotten):
            if known == event:
                return self._indices[position]
        raise BadRequest(f"event {event.seq} of {event.node} is not of this run; take one of replay.events")

    def at(self, moment: int | Event) -> Moment:
        """The world just before its event of this index, or just after a journal's event; it is run anew up to there.

        Raises :class:`BadRequest` for an index that the run does not have. An earlier moment's cluster is closed.
        """
        index = self.index_of(moment) if isinstance(moment, Event) else moment
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= self.run.events:
            raise BadRequest(f"at({index!r}): this run has the events 0 to {self.run.events:,}")
        self.close()
        session = self._stopped = self._session()
        cluster = session.cluster
        cluster.sim.scheduler.break_at = index
        try:
            session.perform()
        except Stopped:
            pass
        return Moment(index, cluster.sim.now, cluster.states(), tuple(cluster.events), cluster)

    def diagram(self, **options: Any) -> SpaceTime:
        """What led to the violation, as a space-time diagram (``options`` as for :func:`gostore.viz.space_time`).

        The causal past of the event that broke a promise, or of the answer that a client should not have got; of a run
        in which neither is known (it is fine, or does not come to rest) its last seconds.
        """
        journal, event = self.journal, self.focus
        if event is not None:
            return space_time(journal, event, **options)
        return space_time(journal, **{"since_s": self.run.virtual_s - LAST_S, "categories": STATES, **options})

    @property
    def focus(self) -> Event | None:
        """The event that :meth:`diagram` explains."""
        focus = self.run.focus
        if focus is None or isinstance(focus, Event):
            return focus
        told = [e for e in self.events if e.node == CLIENT and e.kind == "recv" and e.time_s <= focus]
        return told[-1] if told else None

    def close(self) -> None:
        """Let the world of the latest moment go."""
        if self._stopped is not None:
            self._stopped.close()
            self._stopped = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def replay(token: str | Token, *, anyway: bool = False) -> Replay:
    """The run that a token names, again.

    Raises :class:`BadRequest` for what is no token, and for one of another Python (traces differ between minor
    versions) unless ``anyway``. Another commit or library only shows up in ``differences``.
    """
    found = token if isinstance(token, Token) else Token.parse(token)
    here = _versions()["python"]
    if found.versions.get("python") != here and not anyway:
        raise BadRequest(
            f"the token was made with Python {found.versions.get('python')}, and this is {here}, in which a seed gives "
            "another run: use that Python, or say anyway=True to see what happens here"
        )
    return Replay(found)
