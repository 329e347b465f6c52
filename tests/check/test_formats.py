"""Reading histories of three formats, the recorded ones with known verdicts, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gostore.check import History, Verdict, check_linearizable, read_history
from gostore.check.formats import LINE_CHARACTERS_MAX
from gostore.cli import main
from gostore.core.errors import BadRequest

SHARED = Path(__file__).parents[3] / "shared" / "histories"

JEPSEN = """\
INFO  jepsen.util - 0\t:invoke\t:read\tnil
INFO  jepsen.util - 0\t:ok\t:read\tnil
INFO  jepsen.util - 1\t:invoke\t:write\t3
INFO  jepsen.util - :nemesis\t:info\t:start\t"Cut off [:n1]"
INFO  jepsen.util - 2\t:invoke\t:cas\t[3 -4]
INFO  jepsen.util - 3\t:invoke\t:cas\t[7 8]
INFO  jepsen.util - 1\t:ok\t:write\t3
INFO  jepsen.util - 3\t:fail\t:cas\t[7 8]
INFO  jepsen.util - 2\t:info\t:cas\t:timed-out

INFO  jepsen.util - 4\t:invoke\t:read\tnil
INFO  jepsen.util - 4\t:fail\t:read\t:timed-out
INFO  jepsen.util - 5   :invoke   :read   nil
INFO  jepsen.util - 5   :ok   :read   -4
"""

KEY_VALUE = """\
{:process 0, :type :invoke, :f :append, :key "k 1", :value "a\\"b\\\\"}
{:process 1, :type :invoke, :f :get, :key "k 1", :value nil}
{:process 0, :type :ok, :f :append, :key "k 1", :value "a\\"b\\\\"}
{:process 1, :type :ok, :f :get, :key "k 1", :value "a\\"b\\\\"}
{:process 2, :type :invoke, :f :put, :key "2", :value ""}
{:process 2, :type :info, :f :put, :key "2", :value :timed-out}
{:process 3, :type :invoke, :f :put, :key "2", :value "x"}
"""


def lines(text: str) -> list[bytes]:
    return text.encode().splitlines(keepends=True)


def test_jepsen() -> None:
    history = read_history(lines(JEPSEN))
    assert history.model == "register"
    assert [(o.process, o.kind, o.argument, o.outcome.value, o.result) for o in history] == [
        (0, "read", None, "ok", None),
        (1, "write", 3, "ok", None),
        (2, "cas", [3, -4], "info", None),
        (3, "cas", [7, 8], "ok", False),
        (4, "read", None, "fail", None),
        (5, "read", None, "ok", -4),
    ]
    assert check_linearizable(history).verdict is Verdict.LINEARIZABLE
    stale = JEPSEN + "INFO  jepsen.util - 5\t:invoke\t:read\tnil\nINFO  jepsen.util - 5\t:ok\t:read\t3\n"
    assert check_linearizable(read_history(lines(stale))).verdict is Verdict.NOT


def test_a_refused_compare_and_set_says_what_the_register_was_not() -> None:
    refused = "INFO jepsen.util - 1 :invoke :write 3\nINFO jepsen.util - 1 :ok :write 3\n"
    refused += "INFO jepsen.util - 1 :invoke :cas [3 4]\nINFO jepsen.util - 1 :fail :cas [3 4]\n"
    assert check_linearizable(read_history(lines(refused))).verdict is Verdict.NOT


def test_key_value() -> None:
    history = read_history(lines(KEY_VALUE))
    assert history.model == "key_value"
    assert [(o.process, o.kind, o.key, o.argument, o.outcome.value, o.result) for o in history] == [
        (0, "append", "k 1", 'a"b\\', "ok", None),
        (1, "get", "k 1", None, "ok", 'a"b\\'),
        (2, "put", "2", "", "info", None),
        (3, "put", "2", "x", "info", None),
    ]
    assert check_linearizable(history).verdict is Verdict.LINEARIZABLE
    lost = KEY_VALUE.replace(':ok, :f :get, :key "k 1", :value "a\\"b\\\\"', ':ok, :f :get, :key "k 1", :value "z"')
    assert check_linearizable(read_history(lines(lost))).verdict is Verdict.NOT


def test_our_own() -> None:
    history = History("key_value")
    history.ok(history.invoke("é", "append", "x", "ü"))
    again = read_history([line.encode() for line in history.dump()])
    assert again.operations == history.operations


OWN = '{"gostore_history": 1, "model": "register"}\n'
READ = "INFO jepsen.util - 0 :invoke :read nil\n"
GET = '{:process 0, :type :invoke, :f :get, :key "1", :value nil}\n'


@pytest.mark.parametrize(
    ("text", "number", "expected"),
    [
        ("hello\n", 1, "first line of a history"),
        ("\n\nhello\n", 3, "first line of a history"),
        (READ + "INFO jepsen.util - zero :ok :read 3\n", 2, "PROCESS :invoke"),
        (READ + "INFO jepsen.util - 0 :ok :read three\n", 2, "VALUE"),
        (READ + "INFO jepsen.util - 0 :ok :delete 3\n", 2, ":read|:write|:cas"),
        (READ + "WARN disk is full\n", 2, "INFO jepsen.util"),
        (READ + "INFO jepsen.util - 0 :invoke :write 3\n", 2, "the return of process 0's read"),
        (READ + "INFO jepsen.util - 0 :ok :write 3\n", 2, "process 0 invoked (read)"),
        (READ + "\nINFO jepsen.util - 7 :ok :read 3\n", 3, "process 7 invoked (nothing)"),
        ("INFO jepsen.util - 0 :invoke :cas nil\n", 1, "VALUE"),
        ("INFO jepsen.util - 0 :invoke :write 3\nINFO jepsen.util - 0 :ok :write 4\n", 2, "invocation, 3"),
        (GET + "{:process 0, :type :ok, :f :get, :key 1, :value nil}\n", 2, ':key "K"'),
        (GET + '{:process 0, :type :ok, :f :get, :key "1", :value "\\q"}\n', 2, ':value "V"'),
        (GET + '{:process 0, :type :ok, :f :get, :key "2", :value ""}\n', 2, "process 0 invoked (get)"),
        ('{:process 0, :type :invoke, :f :put, :key "2", :value nil}\n', 1, "a value for the put"),
        (OWN + "{}\n", 2, '"type"'),
        (OWN.replace("register", "queue"), 1, "one of the models"),
        (OWN + '{"type":"invoke","id":0,"process":1,"kind":"pop"}\n', 2, "read, write VALUE, or cas"),
        (
            OWN.replace("register", "transactions")
            + '{"type":"invoke","id":0,"process":1,"kind":"t"}\n{"type":"ok","id":0,"result":{"reads":[["x"]]}}\n',
            3,
            "pairs [KEY, VERSION]",
        ),
        (READ + "x" * (LINE_CHARACTERS_MAX + 1), 2, "characters in a line"),
    ],
)
def test_a_broken_line_is_named(text: str, number: int, expected: str) -> None:
    with pytest.raises(BadRequest) as error:
        read_history(lines(text), "log.txt")
    assert error.value.message.startswith(f"log.txt:{number}: ")
    assert expected in error.value.message


def test_what_is_no_history_at_all() -> None:
    for empty in ([], [b"\n", b"  \n"]):
        with pytest.raises(BadRequest, match="log.txt: expected a history; found nothing"):
            read_history(empty, "log.txt")
    with pytest.raises(BadRequest, match="log.txt:1: expected text in UTF-8"):
        read_history([b"\xff\xfe\n"], "log.txt")
    with pytest.raises(BadRequest, match="no format 'edn'; there are auto, gostore"):
        read_history([], "log.txt", "edn")
    with pytest.raises(BadRequest, match="log.txt:1: expected INFO jepsen.util"):
        read_history(lines(GET), "log.txt", "jepsen")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded histories are not beside the project")
def test_recorded_histories_get_their_known_verdicts() -> None:
    verdicts = json.loads((SHARED / "verdicts.json").read_text())
    assert len(verdicts) == 56
    wrong = {}
    for name, linearizable in verdicts.items():
        with (SHARED / name).open("rb") as file:
            result = check_linearizable(read_history(file, name))
        if result.verdict is not (Verdict.LINEARIZABLE if linearizable else Verdict.NOT):
            wrong[name] = result.text()
    assert wrong == {}


# the command


def check(tmp_path: Path, text: str, *options: str) -> tuple[Result, dict[str, Any]]:
    path = tmp_path / "history.txt"
    path.write_text(text)
    result = CliRunner().invoke(main, ["check", str(path), "--json", *options])
    shown = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return result, json.loads(shown[-1])


def test_command(tmp_path: Path) -> None:
    result, figures = check(tmp_path, JEPSEN)
    assert result.exit_code == 0
    assert (figures["verdict"], figures["ops"], figures["model"]) == ("linearizable", 6, "register")
    assert figures["wall_s"] > 0
    result, figures = check(tmp_path, KEY_VALUE.replace(":value nil}", ":value nil}", 1), "--format", "key-value")
    assert figures["verdict"] == "linearizable"
    result, figures = check(
        tmp_path, JEPSEN.replace(":read\tnil\nINFO  jepsen.util - 1", ":read\t9\nINFO  jepsen.util - 1")
    )
    assert result.exit_code == 1
    assert figures["verdict"] == "not"
    assert "no order of this operation explains" in result.stdout
    result, figures = check(tmp_path, KEY_VALUE, "--steps", "1")
    assert (result.exit_code, figures["verdict"]) == (1, "unknown")


def test_command_judges_transactions(tmp_path: Path) -> None:
    history = History("transactions")
    first, second = history.invoke("a", "transaction"), history.invoke("b", "transaction")
    history.ok(first, {"reads": [["x", 0], ["y", 0]], "writes": [["x", 1]]})
    history.ok(second, {"reads": [["x", 0], ["y", 0]], "writes": [["y", 1]]})
    result, figures = check(tmp_path, "".join(history.dump()))
    assert (result.exit_code, figures["verdict"], figures["anomalies"]) == (1, "not", ["G2"])


def test_command_names_the_broken_line(tmp_path: Path) -> None:
    result, figures = check(tmp_path, JEPSEN + "oops\n")
    assert result.exit_code == 1
    assert figures["error"] == "bad_request"
    assert "history.txt:15: expected INFO jepsen.util" in result.stderr
