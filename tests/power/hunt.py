"""Hunt planted bugs with seeded simulated runs, and publish what it took.

    .venv/bin/python tests/power/hunt.py [BUG ...] [--seeds 500] [--again] [--budget-s 600]
    .venv/bin/python tests/power/hunt.py [BUG ...] --refresh
    .venv/bin/python tests/power/hunt.py [BUG ...] --shrink
    .venv/bin/python tests/power/hunt.py BUG --replay

For each bug: seeds from 0 on until one fails with the bug and is clean without it; then its schedule of faults and its
duration are made smaller while it still fails, and it is run again, which must give the same trace. What is found goes
into ``found.json`` after each bug, so that a hunt can be interrupted and goes on where it was; ``--again`` begins anew,
and ``--refresh`` runs what was found again after the product has changed. ``--tries 0`` makes nothing smaller, which
``--shrink`` can do later. ``docs/test-power.md`` is written from that file at the end. ``--replay`` runs a found one
again and prints what breaks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

from bugs import BUGS, Bug, more_faults

from gostore.experiments import simulation
from gostore.experiments.simulation import Run, minimise, run_seed
from gostore.faults import Step

FOUND = Path(__file__).with_name("found.json")
TABLE = Path(__file__).parents[2] / "docs" / "test-power.md"

SEEDS_MAX = 500
SHRINK_RUNS_MAX = 12
KINDS_MAX = 3
VIOLATION_MAX = 400
SHORTER = (0.5, 0.75)
"""Parts of the duration that are tried when the schedule is as small as it gets."""


@dataclass
class Found:
    """``seeds``: how many were needed. ``check``: what saw it first. ``events``: callbacks of the smallest run."""

    bug: str
    seed: int
    seeds: int
    seconds: float
    check: str
    violation: str
    faults_before: int
    events_before: int
    events: int
    trace_sha256: str
    schedule: list[dict[str, Any]] = field(default_factory=list)


def steps_of(found: Found) -> list[Step]:
    return [Step(**step) for step in found.schedule]


@contextmanager
def planted(bug: Bug, *, present: bool = True) -> Iterator[None]:
    """The world of a hunt, with the bug or without it."""
    with more_faults(), bug.tune(), bug.patch() if present else contextlib.nullcontext():
        yield


def run_with(bug: Bug, seed: int, seconds: float, schedule: Sequence[Step], *, present: bool = True) -> Run:
    with planted(bug, present=present):
        return run_seed(seed, seconds=seconds, profile="none", schedule=schedule, **bug.settings)


def schedule_of(bug: Bug, seed: int) -> list[Step]:
    return bug.schedule(random.Random(f"hunt {bug.name} {seed}"), bug.seconds)


def hunt(bug: Bug, first: int, seeds: int, until_s: float, tries: int) -> tuple[Found | None, int]:
    """The first seed that finds it, and how many were tried."""
    for seed in range(first, seeds):
        if time.monotonic() > until_s:
            return None, seed
        schedule = schedule_of(bug, seed)
        run = run_with(bug, seed, bug.seconds, schedule)
        if not run.violations:
            continue
        if not run_with(bug, seed, bug.seconds, schedule, present=False).fine:
            continue  # the product itself fails here: that proves nothing
        return shrink(bug, run, tries), seed + 1
    return None, seeds


def shrink(bug: Bug, run: Run, tries: int) -> Found:
    """Fewer faults, then less time; what it ends with still fails with the bug and is clean without it."""
    seconds, before = run.seconds, run

    with planted(bug), patch.object(simulation, "run_seed", partial(run_seed, **bug.settings)):
        schedule = minimise(run, tries_max=tries)
    if len(schedule) < len(run.schedule) and not run_with(bug, run.seed, seconds, schedule, present=False).fine:
        schedule = list(run.schedule)
    for part in SHORTER if tries else ():
        shorter = round(max(part * seconds, 2.0, *(step.until_s for step in schedule)), 3)
        if (
            shorter < seconds
            and run_with(bug, run.seed, shorter, schedule).violations
            and run_with(bug, run.seed, shorter, schedule, present=False).fine
        ):
            seconds = shorter
            break
    first = Found(bug.name, run.seed, 0, seconds, "", "", len(before.schedule), before.events, 0, "", [])
    first.schedule = [asdict(step) for step in schedule]
    whole = seconds == run.seconds and len(schedule) == len(run.schedule)
    return replayed(bug, first, run if whole else None)


def shrunk(bug: Bug, found: Found, tries: int) -> Found:
    """Smaller than it was, if possible; its figures of before stay."""
    smaller = shrink(bug, run_with(bug, found.seed, found.seconds, steps_of(found)), tries)
    return replace(smaller, seeds=found.seeds, faults_before=found.faults_before, events_before=found.events_before)


def replayed(bug: Bug, found: Found, once: Run | None = None) -> Found:
    """Run it twice: the same trace, and the same is broken. Its figures are those of these runs."""
    once = once or run_with(bug, found.seed, found.seconds, steps_of(found))
    twice = run_with(bug, found.seed, found.seconds, steps_of(found))
    assert once.trace_sha256 == twice.trace_sha256, f"{bug.name}: two runs of seed {found.seed} differ"
    assert once.violations == twice.violations
    return replace(
        found,
        check=kinds_of(once),
        violation="\n".join(once.violations)[:VIOLATION_MAX],
        events=once.events,
        trace_sha256=once.trace_sha256,
    )


def refresh(found: dict[str, Found], names: Sequence[str]) -> None:
    """The figures of the product as it is now; what it does not find any more is to be hunted again."""
    for name in [name for name in names if name in found]:
        one = replayed(BUGS[name], found[name])
        if one.check and run_with(BUGS[name], one.seed, one.seconds, steps_of(one), present=False).fine:
            found[name] = one
        else:
            del found[name]
            print(f"{name}: not found on seed {one.seed} any more", flush=True)


KINDS = {
    "registers": "linearizability of registers",
    "files": "linearizability of files",
    "cells": "serializability",
    "counters": "sum of a counter",
    "at most once": "calls run at most once",
    "locks": "locks after quiet",
    "two-phase commit": "two-phase commit after quiet",
    "replicas are equal": "replicas equal after quiet",
    "membership": "membership after quiet",
    "chunks": "chunks after quiet",
    "files after quiet": "files and chunks after quiet",
    "liveness": "liveness",
    "only the dead are declared offline": "only the dead are declared offline",
}


def kinds_of(run: Run) -> str:
    """All checks that saw something, the most telling ones."""
    return ", ".join(list(dict.fromkeys(map(kind_of, run.violations)))[:KINDS_MAX])


def kind_of(violation: str) -> str:
    """What saw it, in short."""
    head = violation.partition(":")[0]
    if head == "files" and "after quiet" in violation:
        return KINDS["files after quiet"]
    if head in KINDS:
        return KINDS[head]
    if "saw the balances" in violation:
        return "sum of the accounts"
    if "cannot be applied" in violation or " ended with status " in violation:
        return "no node ends by itself"
    if "does not come back" in violation or "did not start" in violation:
        return "every node comes back"
    if " failed" in head or "task " in violation:
        return "no task fails"
    return head if len(head) < 40 else "no error but those of ours"


# the file of what was found, and the table


def load() -> tuple[dict[str, Found], dict[str, int]]:
    """What was found, and of the others how many seeds were tried."""
    if not FOUND.exists():
        return {}, {}
    data = json.loads(FOUND.read_text())
    return {name: Found(**one) for name, one in data["found"].items()}, data["tried"]


def save(found: dict[str, Found], tried: dict[str, int]) -> None:
    data = {
        "found": {name: asdict(found[name]) for name in BUGS if name in found},
        "tried": {name: tried[name] for name in BUGS if name in tried and name not in found},
    }
    FOUND.write_text(json.dumps(data, indent=1) + "\n")


def table(found: dict[str, Found], tried: dict[str, int]) -> str:
    """The page of ``docs/test-power.md``."""
    lines = [
        "# Test power",
        "",
        "How good are the simulated runs at finding bugs? Classical mistakes are planted into the product, one at a",
        "time, by patches in the tests (`tests/power/bugs.py`; the product has no flag for them), and hunted with",
        "seeds from 0 on. A seed counts when its run breaks a promise with the bug and is clean without it, with the",
        "same faults. Then its faults and its duration are made smaller while it still fails, and it is replayed: the",
        "same trace, twice.",
        "",
        "`make slow` runs every one of them again on its seed, `make test` some. This page is written by",
        "",
        "    .venv/bin/python tests/power/hunt.py",
        "",
        "which goes on where it was. With `--refresh` it first runs again what was found, as it must be done after the",
        "product has changed; with `--again` it begins anew; `--seeds 500` is the limit for each bug.",
        "",
        f"**Found: {len(found)} of {len(BUGS)}, in at most {SEEDS_MAX} seeds each.**",
        "",
        "| bug | where | what is wrong | found by | seeds | faults | events | replay |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, bug in BUGS.items():
        one = found.get(name)
        if one is None:
            lines.append(f"| `{name}` | {bug.where} | {bug.what} | not found | {tried.get(name, 0)} | | | |")
            continue
        faults = f"{one.faults_before} → {len(one.schedule)}"
        events = f"{one.events_before:,} → {one.events:,}"
        lines.append(
            f"| `{name}` | {bug.where} | {bug.what} | {one.check} | {one.seeds} | {faults} | {events} "
            f"| `hunt.py {name} --replay` |"
        )
    lines += [
        "",
        "*seeds*: needed until the first that found it. *faults*: in the schedule of that seed, and after shrinking.",
        "*events*: callbacks of the simulated world in that run, and in the smallest one, start and end of the cluster",
        "included. *replay*: `.venv/bin/python tests/power/hunt.py BUG --replay` prints what breaks.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="hunt planted bugs")
    parser.add_argument("bugs", nargs="*", metavar="BUG", help=f"default: all of {', '.join(BUGS)}")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX)
    parser.add_argument("--again", action="store_true", help="hunt also what was found")
    parser.add_argument("--refresh", action="store_true", help="first run what was found again, for its figures")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="end after so many seconds")
    parser.add_argument("--tries", type=int, default=SHRINK_RUNS_MAX, help="runs to make one smaller that was found")
    parser.add_argument("--shrink", action="store_true", help="make what was found smaller")
    parser.add_argument("--replay", action="store_true", help="run what was found again and print what breaks")
    options = parser.parse_args()
    if unknown := [name for name in options.bugs if name not in BUGS]:
        parser.error(f"there is no bug {', '.join(unknown)}; there are {', '.join(BUGS)}")
    chosen = options.bugs or list(BUGS)
    found, tried = load()
    if options.replay:
        return replay([found[name] for name in chosen if name in found])
    until_s = time.monotonic() + options.budget_s
    if options.again:
        for name in chosen:
            found.pop(name, None)
            tried.pop(name, None)
    if options.refresh:
        refresh(found, chosen)
        save(found, tried)
    for name in chosen:
        if name in found:
            if options.shrink and time.monotonic() < until_s:
                found[name] = shrunk(BUGS[name], found[name], options.tries)
                save(found, tried)
            continue
        one, seeds = hunt(BUGS[name], tried.get(name, 0), options.seeds, until_s, options.tries)
        tried[name] = seeds
        if one is not None:
            one.seeds = seeds
            found[name] = one
        save(found, tried)
        print(f"{name}: {f'{one.check} ({seeds} seeds)' if one else f'not found in {seeds} seeds'}", flush=True)
    TABLE.write_text(table(found, tried))
    missing = [name for name in BUGS if name not in found]
    print(f"found {len(found)} of {len(BUGS)}" + (f"; not: {', '.join(missing)}" if missing else ""))
    return 1 if missing else 0


def replay(some: Sequence[Found]) -> int:
    for one in some:
        run = run_with(BUGS[one.bug], one.seed, one.seconds, steps_of(one))
        print(f"{one.bug}: seed {one.seed}, {one.seconds:g} s, {run.events:,} events, trace {run.trace_sha256[:16]}")
        for step in steps_of(one):
            print(f"  {step}")
        for violation in run.violations:
            print(f"  breaks: {violation}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
