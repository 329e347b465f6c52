"""Golden scenarios: text files of commands and what they print, which a person can read.

A file is a sequence of steps. A step is a comment (lines that begin with ``#``), one command with its arguments,
further lines of input if any, ``----``, and the expected output up to the next blank line::

    # The first on the preference list does not wait for a time-out.
    start n1 n2 n3
    ----
    n1: follower, term 0

    campaign n1
    ----
    n1: candidate, term 1
    n1 -> n2: vote? term 1

A word of the form ``name=value`` is an option; every other word is an argument. Output that contains blank lines is
indented by the handler. ``pytest tests/scenarios --rewrite`` writes what was printed into the files: look at the diff
before you believe it. (The form follows etcd's raft/testdata and CockroachDB's datadriven.)
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@dataclass(slots=True)
class Step:
    """One command of a scenario. ``text``: how it stands in the file, without its output."""

    text: list[str]
    name: str = ""
    args: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    input: list[str] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    line: int = 0


def parse(text: str, where: str) -> list[Step]:
    """The steps of a file. Raises ``ValueError`` that names file and line for what is no step."""
    steps: list[Step] = []
    step, in_output = Step([]), False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if in_output:
            if line:
                step.output.append(line)
            else:
                steps.append(step)
                step, in_output = Step([]), False
        elif line == "----":
            if not step.name:
                raise ValueError(f"{where}, line {number}: ---- without a command before it")
            in_output = True
        elif not step.name and (not line or line.startswith("#")):
            step.text.append(line)
        elif not line:
            raise ValueError(f"{where}, line {number}: {step.name!r} has no ---- below it")
        elif not step.name:
            step.name, *words = line.split()
            step.line = number
            step.text.append(line)
            for word in words:
                name, equals, value = word.partition("=")
                if equals:
                    step.options[name] = value
                else:
                    step.args.append(word)
        else:
            step.input.append(line)
            step.text.append(line)
    if any(step.text):
        raise ValueError(f"{where}, line {number}: the file ends with a comment; it belongs to the command below it")
    return steps


def render(steps: list[Step]) -> str:
    return "\n".join("\n".join([*step.text, "----", *step.output, ""]) for step in steps)


def scenarios(kind: str) -> list[Path]:
    """The files of a folder of scenarios; it must not be empty."""
    found = sorted((HERE / kind).glob("*.txt"))
    assert found, f"there are no scenarios in {HERE / kind}"
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``scenario`` runs once for each file in the folder named like its module: test_raft, raft/."""
    if "scenario" in metafunc.fixturenames:
        files = scenarios(metafunc.module.__name__.rpartition("test_")[2])
        metafunc.parametrize("scenario", files, ids=[file.stem for file in files])


@pytest.fixture
def form() -> ModuleType:
    """This module, for the tests of the form itself."""
    return sys.modules[__name__]


Handler = Callable[[Step], str]


@pytest.fixture
def transcript(request: pytest.FixtureRequest) -> Callable[[Path, Handler], None]:
    """Runs a file through a handler, which gets each step and returns what it prints, and compares."""

    def run(file: Path, handler: Handler) -> None:
        before = file.read_text()
        steps = parse(before, file.name)
        for step in steps:
            try:
                step.output = [line.rstrip() for line in handler(step).splitlines()]
            except AssertionError:
                raise
            except Exception as error:
                raise RuntimeError(f"{file.name}, line {step.line}: {step.name}: {error!r}") from error
            assert "" not in step.output, f"{file.name}, line {step.line}: the output holds a blank line"
        after = render(steps)
        if request.config.getoption("--rewrite"):
            file.write_text(after)
            return
        if before != after:
            difference = difflib.unified_diff(
                before.splitlines(), after.splitlines(), "expected", "printed", lineterm=""
            )
            # Not by `assert`: pytest would show the difference once more.
            raise AssertionError(f"{file.name} differs; --rewrite if that is right\n" + "\n".join(difference))

    return run
