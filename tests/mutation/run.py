"""Mutation testing of the pure cores: ``python tests/mutation/run.py [TARGET ...]``.

Every mutant of every module in ``targets.toml`` is run; a run that was interrupted goes on where it stopped, and a
module whose source and tests did not change is not run again. The whole run writes ``docs/mutation.md``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mutants import Mutant, mutants_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STATE = ROOT / ".mutation"
DOCUMENT = ROOT / "docs" / "mutation.md"
PERCENT_MIN = 80.0
KILLED = ("killed", "timeout")


@dataclass
class Module:
    """One module, the tests that judge it, and what is known about its mutants."""

    target: str
    name: str
    tests: list[str]
    mutants: list[Mutant] = field(default_factory=list)
    results: dict[str, tuple[str, str]] = field(default_factory=dict)
    carried: bool = False
    invalid: int = 0

    def __post_init__(self) -> None:
        self.path = Path(*self.name.split(".")).with_suffix(".py")
        self.source = (ROOT / self.path).read_text()
        found = mutants_of(self.source)
        self.mutants = [mutant for mutant in found if not mutant.annotation]
        self.annotations = len(found) - len(self.mutants)

    @property
    def state(self) -> Path:
        return STATE / f"{self.name}.json"

    def key(self) -> str:
        """Changes whenever the module, a test that judges it or this runner does."""
        files = {ROOT / self.path, HERE / "worker.py", HERE / "mutants.py"}
        for test in self.tests:
            place = ROOT / test
            files |= set(place.rglob("*.py")) if place.is_dir() else {place, *_shared(place.parent)}
        digest = hashlib.sha256(version("cosmic-ray").encode())
        for file in sorted(file for file in files if file.exists()):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()

    def count(self, *outcomes: str) -> int:
        return sum(self.results.get(mutant.name, ("", ""))[0] in outcomes for mutant in self.mutants)

    def run(self, *, survivors_only: bool) -> None:
        """Run what is not known yet; ``survivors_only`` believes earlier kills although tests changed since."""
        key = self.key()
        STATE.mkdir(exist_ok=True)
        (STATE / ".gitignore").write_text("*\n")
        saved = json.loads(self.state.read_text()) if self.state.exists() else {}
        source = hashlib.sha256(self.source.encode()).hexdigest()
        before = saved.get("results", {}) if saved.get("source") == source else {}
        pending = self.state.with_suffix(".jsonl")
        marker = self.state.with_suffix(".key")
        if not marker.exists() or marker.read_text() != key:
            pending.unlink(missing_ok=True)
            marker.write_text(key)
        if saved.get("key") == key and not saved["carried"]:
            known = before
        elif survivors_only:
            known = {name: outcome for name, outcome in before.items() if outcome[0] in KILLED}
            self.carried = True
            pending.unlink(missing_ok=True)
        else:
            known = {}
        pending.touch()
        known |= {name: outcome for name, *outcome in map(json.loads, pending.read_text().splitlines())}
        missing = [mutant.name for mutant in self.mutants if mutant.name not in known]
        if missing:
            self._work(missing, {name: outcome[1] for name, outcome in before.items()}, pending)
            known |= {name: outcome for name, *outcome in map(json.loads, pending.read_text().splitlines())}
        self.results = {name: (outcome, by) for name, (outcome, by) in known.items()}
        self.invalid = self.count("invalid")
        self.mutants = [mutant for mutant in self.mutants if self.results[mutant.name][0] != "invalid"]
        told = {"key": key, "source": source, "carried": self.carried, "results": self.results}
        self.state.write_text(json.dumps(told, indent=0))

    def _work(self, names: list[str], killers: dict[str, str], results: Path) -> None:
        job = self.state.with_suffix(".job")
        told: dict[str, Any] = {
            "root": str(ROOT),
            "module": self.name,
            "path": str(self.path),
            "tests": self.tests,
            "results": str(results),
            "profile": str(self.state.with_suffix(".profile")),
            "names": names,
            "killers": killers,
        }
        job.write_text(json.dumps(told))
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, str(HERE / "worker.py"), str(job)], check=True, env=environment)


def _shared(directory: Path) -> set[Path]:
    """What the tests in a directory have in common."""
    return {file for file in directory.glob("*.py") if not file.name.startswith("test_")}


def targets(wanted: list[str]) -> list[Module]:
    tables = tomllib.loads((HERE / "targets.toml").read_text())["target"]
    unknown = sorted(set(wanted) - {table["name"] for table in tables})
    if unknown:
        raise SystemExit(f"no target {', '.join(unknown)}; there are {', '.join(table['name'] for table in tables)}")
    return [
        Module(table["name"], module, table["tests"])
        for table in tables
        if not wanted or table["name"] in wanted
        for module in table["modules"]
    ]


# --------------------------------------------------------------------------------------------------------------- report


def row(modules: list[Module]) -> dict[str, Any]:
    """The figures of one module or of several together."""
    mutants = sum(len(module.mutants) for module in modules)
    figures = {
        "mutants": mutants,
        "killed": sum(module.count("killed") for module in modules),
        "timeout": sum(module.count("timeout") for module in modules),
        "survived": sum(module.count("survived") for module in modules),
        "unreached": sum(module.count("unreached") for module in modules),
    }
    figures["percent"] = round(100 * (figures["killed"] + figures["timeout"]) / mutants, 1) if mutants else 0.0
    return figures


def by_target(modules: list[Module]) -> dict[str, list[Module]]:
    grouped: dict[str, list[Module]] = {}
    for module in modules:
        grouped.setdefault(module.target, []).append(module)
    return grouped


def by_family(modules: list[Module]) -> dict[str, tuple[int, int]]:
    """Mutants and dead ones of each family of operators."""
    found: dict[str, tuple[int, int]] = {}
    for module in modules:
        for mutant in module.mutants:
            mutants, dead = found.get(mutant.family, (0, 0))
            found[mutant.family] = (mutants + 1, dead + (module.results[mutant.name][0] in KILLED))
    return dict(sorted(found.items(), key=lambda entry: -entry[1][0]))


INTRODUCTION = """\
# Mutation testing

Made by `make mutation` (`python tests/mutation/run.py`); do not edit.

A mutant is one of our modules with one small change: another operator, another number, a condition negated, a loop
that never runs, a decorator gone. A test that fails with it kills it. What survives shows what no test pins down.

- The changes are those of [Cosmic Ray](https://cosmic-ray.readthedocs.io) {version}, all of its operators that need no
  arguments, at every place where they apply: no sample. They change no strings, hence no texts of errors.
- Left out are {annotations} mutants inside type annotations, which are never evaluated, and {invalid} that are no
  Python (the library takes the `*` of a signature for a product) or that the library fails to make.
- Mutants that no test could tell from the original (`==` for `is`, `slots=True`, a limit that is only a limit) count as
  survivors. "Not reached" are mutants in lines that no test executes; they count as survivors too.
- A module is judged by the tests named in `tests/mutation/targets.toml`, not by what simulated clusters would notice.
  Properties draw the same {examples} examples at each run (more where a test asks for more). A mutant has
  {factor:.0f} times the processor time that its tests take without it, and {extra} s; then it is dead by time-out.

| part | module | mutants | killed | time-out | survived | not reached | dead |
|---|---|--:|--:|--:|--:|--:|--:|
"""


def line(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def cells(figures: dict[str, Any]) -> list[Any]:
    counts = [figures[name] for name in ("mutants", "killed", "timeout", "survived", "unreached")]
    return [*counts, f"{figures['percent']:.1f} %"]


def document(modules: list[Module]) -> str:
    counts = {name: sum(getattr(module, name) for module in modules) for name in ("annotations", "invalid")}
    text = INTRODUCTION.format(version=version("cosmic-ray"), **counts, **limits())
    for target, some in by_target(modules).items():
        for module in some:
            text += line([target, f"`{module.path}`", *cells(row([module]))])
        if len(some) > 1:
            text += line([f"**{target}**", "together", *cells(row(some))])
    text += line(["**all**", "", *cells(row(modules))])
    text += "\nBy kind of change:\n\n| operator of Cosmic Ray | mutants | dead |\n|---|--:|--:|\n"
    for family, (mutants, dead) in by_family(modules).items():
        text += line([family, mutants, f"{100 * dead / mutants:.1f} %"])
    return text + "\n`python tests/mutation/run.py --survivors` shows what survived, as differences.\n"


def limits() -> dict[str, Any]:
    """The constants of the worker, read rather than imported: it loads what the tests load."""
    names = {"EXAMPLES": "examples", "CPU_FACTOR": "factor", "CPU_EXTRA_S": "extra"}
    found = {}
    for node in ast.parse((HERE / "worker.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            found[names[node.targets[0].id]] = ast.literal_eval(node.value)
    return found


def show_survivors(modules: list[Module]) -> None:
    for module in modules:
        source = module.source.splitlines()
        for mutant in module.mutants:
            outcome = module.results.get(mutant.name, ("unknown", ""))[0]
            if outcome not in KILLED:
                print(f"{module.path}:{mutant.line} {mutant.name} {outcome}")
                mutated = mutant.apply(module.source).splitlines()
                print(f"  - {source[mutant.line - 1].strip()}")
                print(f"  + {mutated[mutant.line - 1].strip() if mutant.line <= len(mutated) else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "targets", nargs="*", help="parts named in targets.toml; none: all, and docs/mutation.md is written"
    )
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--survivors", action="store_true", help="show what survived, as differences")
    parser.add_argument("--again", action="store_true", help="run earlier survivors only; writes no document")
    options = parser.parse_args()
    modules = targets(options.targets)
    began = time.monotonic()
    for module in modules:
        module.run(survivors_only=options.again)
        print(f"{module.name:40} {json.dumps(row([module]))}", flush=True)
    if options.survivors:
        show_survivors(modules)
    grouped = {target: row(some) for target, some in by_target(modules).items()}
    for target, figures in grouped.items():
        print(f"{target:40} {json.dumps(figures)}")
    if not options.targets and not options.again and not any(module.carried for module in modules):
        DOCUMENT.write_text(document(modules))
    if options.json:
        told = [{"target": module.target, "module": module.name, **row([module])} for module in modules]
        wall_s = round(time.monotonic() - began, 1)
        print(json.dumps({"modules": told, "targets": grouped, "all": row(modules), "wall_s": wall_s}))
    weak = [target for target, figures in grouped.items() if figures["percent"] < PERCENT_MIN]
    if weak:
        raise SystemExit(f"fewer than {PERCENT_MIN:.0f} % of the mutants die in: {', '.join(weak)}")


if __name__ == "__main__":
    main()
