"""Grades a submission: each check in a process of its own, with a time limit.

A student's class may loop for ever, exit, or break whatever it touches; so a check never shares a process with the
grader or with another check. A failing check names its seed, with which it fails again.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gostore.core.errors import BadRequest, NotFound
from gostore.lab.checks import Check, checks_of

CHECK_TIMEOUT_S = 60.0
"""A check that has not ended by then has failed. The slowest of ours, which starts a cluster, takes two seconds."""


@dataclass(frozen=True, slots=True)
class Lab:
    """One lab folder, read and validated."""

    folder: Path
    title: str
    slot: str
    class_name: str
    checks: tuple[Check, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def points_max(self) -> int:
        return sum(check.points for check in self.checks)

    @property
    def reference(self) -> Path:
        return self.folder / "reference.py"


@dataclass(frozen=True, slots=True)
class CheckResult:
    name: str
    points: int
    points_max: int
    seed: int
    hint: str
    message: str
    """Why it failed; empty when it passed."""


@dataclass(frozen=True, slots=True)
class Grade:
    lab: str
    checks: tuple[CheckResult, ...]

    @property
    def points(self) -> int:
        return sum(result.points for result in self.checks)

    @property
    def points_max(self) -> int:
        return sum(result.points_max for result in self.checks)


def labs_folder(given: str | Path | None = None) -> Path:
    """Where the labs are: as given, in the current directory, or beside the package's sources.

    Raises ``NotFound`` that says where it looked.
    """
    places = [Path(given)] if given else [Path.cwd() / "labs", Path(__file__).parents[2] / "labs"]
    for place in places:
        if place.is_dir():
            return place
    raise NotFound(f"no labs in {' or '.join(map(str, places))}; name their folder with --labs")


def find_labs(folder: Path) -> list[Lab]:
    """All labs in a folder, by name."""
    return [load_lab(folder, entry.parent.name) for entry in sorted(folder.glob("*/lab.toml"))]


def load_lab(folder: Path, name: str) -> Lab:
    """Read one lab; ``name`` may be its number (``01``). Raises ``NotFound`` that names those that exist."""
    names = sorted(entry.parent.name for entry in folder.glob("*/lab.toml"))
    found = [entry for entry in names if name in (entry, entry.split("_")[0])]
    if len(found) != 1:
        raise NotFound(f"there is no lab {name!r} in {folder}; the labs are {', '.join(names) or 'none'}")
    lab = folder / found[0]
    about = tomllib.loads((lab / "lab.toml").read_text(encoding="utf-8"))
    checks = tuple(checks_of(_load_checks(lab)))
    return Lab(lab, about["title"], about["slot"], about["class_name"], checks)


def _load_checks(lab: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gostore_lab_{lab.name}_checks", lab / "checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_submission(path: Path) -> str:
    """The definitions in a ``.py`` file or a notebook: imports, classes, functions and constants.

    Everything else (a cell that starts a cluster, magics) is left out, so grading runs nothing but the definitions.
    Raises ``NotFound`` and ``BadRequest``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFound(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix != ".ipynb":
        return text
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError):
        raise BadRequest(f"{path}: not a notebook (nbformat 4)") from None
    return "\n\n".join(filter(None, map(_definitions, sources)))


def _definitions(source: str) -> str:
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:
        # The student should see the error, with its line: leave the cell to the compiler.
        return source
    kept = [node for node in tree.body if _is_definition(node)]
    return "\n".join("\n".join(lines[_first_line(node) - 1 : node.end_lineno]) for node in kept)


def _is_definition(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        try:
            ast.literal_eval(node.value)  # type: ignore[arg-type]
        except ValueError:
            return False
        return True
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def grade(lab: Lab, source: str, *, seed: int = 1) -> Grade:
    """Run every check of a lab on a submission."""
    return Grade(lab.name, tuple(_run(lab, check, source, seed) for check in lab.checks))


def _run(lab: Lab, check: Check, source: str, seed: int) -> CheckResult:
    task = {"folder": str(lab.folder), "check": check.name, "seed": seed, "source": source}
    try:
        process = subprocess.run(
            [sys.executable, "-m", "gostore.lab.worker"],
            input=json.dumps(task), capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False,
        )  # fmt: skip
        message = _message(process)
    except subprocess.TimeoutExpired:
        message = f"did not end within {CHECK_TIMEOUT_S:.0f} s"
    return CheckResult(
        check.name, 0 if message else check.points, check.points, seed, check.hint if message else "", message
    )


def _message(process: subprocess.CompletedProcess[str]) -> str:
    last = process.stdout.rstrip().rpartition("\n")[2]
    try:
        answer: Any = json.loads(last)
        return str(answer["message"])
    except (ValueError, KeyError, TypeError):
        # The submission ended the process (sys.exit, a signal) before the check could answer.
        return f"the process ended with status {process.returncode}: {process.stderr.strip()[-300:]}"
