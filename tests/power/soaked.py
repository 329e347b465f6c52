"""Writes ``docs/soak.md``: what the tally of ``make soak`` says of the code that is checked out.

``python tests/power/soaked.py [TALLY]``. Nothing is run; a seed counts only if it was run with this content of
``gostore/``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gostore.consensus.tunables import PROFILES
from gostore.experiments.replay import code
from gostore.experiments.soak import read_tally

ROOT = Path(__file__).resolve().parent.parent.parent
TALLY = ROOT / ".soak" / "tally.jsonl"
DOCUMENT = ROOT / "docs" / "soak.md"
WANTED = {
    "raft_leader": "leader changes",
    "raft_snapshot": "snapshots installed",
    "raft_configuration": "membership changes of groups",
    "transaction_recovered": "transactions recovered from a dead coordinator",
    "torn_tails": "torn tails cut from a log",
}
"""Marks of the journal, of each of which 1,000 runs must show a hundred, and what they mean."""


def page(rows: Sequence[dict[str, Any]], seeds: str) -> str:
    """The document. ``rows``: the lines of one code and plan, one for each seed."""
    first = rows[0]
    violated = sorted(row["seed"] for row in rows if row["violations"])
    unknown = sorted(row["seed"] for row in rows if row["unknown"] and not row["violations"])
    progress_s = sorted(row["progress_s"] for row in rows)
    timeout_s = PROFILES["fast"].election_timeout_s
    virtual_s = sum(row["virtual_s"] for row in rows)
    callbacks = sum(row["events"] for row in rows)
    lines = [
        "# The soak",
        "",
        "Made by `make soak` (`python tests/power/soaked.py`) of its tally; do not edit.",
        "",
        f"- Code: `{first['code']}` (the content of `gostore/`), last commit `{rows[-1]['commit']}`.",
        f"- Runs: {len(rows):,} ({seeds}), {first['nodes']} nodes x {first['seconds']:g} virtual seconds, faults "
        f"`{first['faults']}`.",
        f"- With heal and quiet {virtual_s:,.0f} virtual seconds, {callbacks:,} callbacks.",
        f"- **Violated: {len(violated)}**{_list(violated)}. Undecided by a checker: {len(unknown)}{_list(unknown)}.",
        f"- Progress after the heal: median {median(progress_s):.3f} s (wanted: at most {2 * timeout_s:g}, two",
        "  election time-outs),",
        f"  99 % {_percentile(progress_s, 99):.3f} s, worst {progress_s[-1]:.3f} s (at most {10 * timeout_s:g}, ten).",
        "",
        "What happened in these runs, so that nobody takes silence for proof:",
        "",
        "| | together | for 1,000 runs | wanted |",
        "|---|--:|--:|--:|",
    ]
    for mark, what in WANTED.items():
        count = sum(row["coverage"].get(mark, 0) for row in rows)
        lines.append(f"| {what} | {count:,} | {1000 * count / len(rows):,.0f} | 100 |")
    faults: dict[str, int] = {}
    for row in rows:
        for mark, count in row["coverage"].items():
            if mark.startswith("fault_"):
                faults[mark] = faults.get(mark, 0) + count
    for mark, count in sorted(faults.items()):
        lines.append(f"| {mark.replace('_', ' ').replace('fault ', 'fault: ')} | {count:,} | | |")
    return "\n".join([*lines, ""])


def _list(seeds: Sequence[int]) -> str:
    return f" ({', '.join(map(str, seeds[:20]))})" if seeds else ""


def _percentile(ordered: Sequence[float], percent: float) -> float:
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def ranges(seeds: Sequence[int]) -> str:
    """As ``seeds 1 to 5,000``."""
    low, high = min(seeds), max(seeds)
    whole = high - low + 1 == len(set(seeds))
    return f"seeds {low:,} to {high:,}" + ("" if whole else ", not all of them yet")


def main(arguments: Sequence[str]) -> int:
    tally = Path(arguments[0]) if arguments else TALLY
    plan = (code(), 5, 30.0, "swarm")
    found = {
        row["seed"]: row
        for row in read_tally(tally)
        if (row["code"], row["nodes"], row["seconds"], row["faults"]) == plan
    }
    if not found:
        # After a soak with other settings that is how it should be.
        print(f"{tally} has no run of this code ({plan[0]}) as `make soak` does it: the page stays as it is")
        return 0
    DOCUMENT.write_text(page([found[seed] for seed in sorted(found)], ranges(list(found))))
    print(f"{DOCUMENT.relative_to(ROOT)}: {len(found):,} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
