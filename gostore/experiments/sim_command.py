"""What ``gostore sim`` does: seeds in a row, the explanation of the first that fails, and replays of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from gostore.experiments.explain import Explanation, explain
from gostore.experiments.replay import Token, replay
from gostore.experiments.soak import Plan, soak, tallies

VIOLATIONS_SHOWN_MAX: Final = 10

Say = Callable[[str], None]


def run_seeds(
    seeds: Sequence[int], plan: Plan, jobs: int, tally: Path | None, tries: int, save: Path | None, say: Say
) -> dict[str, Any]:
    """Run seeds, say what came out, and explain the first that fails; the figures of the command."""
    rows = soak(seeds, plan, jobs=jobs, file=tally, progress=lambda row: _tell(row, say))
    failed = next((row for row in rows if row["violations"]), None)
    explanation = None
    if failed is not None and tries:
        say(f"seed {failed['seed']}: looking for a smaller schedule")
        explanation = explain(Token.parse(failed["token"]), tries_max=tries, progress=say)
        _show(explanation, save, say)
    elif failed is not None:
        say(_how_to_replay(failed["token"]))
    if tally is not None:
        for found in tallies(rows):
            say(found.text())
    figures: dict[str, Any] = {
        "seeds": len(rows), "virtual_s": round(sum(r["virtual_s"] for r in rows), 3),
        "wall_s": round(sum(r["wall_s"] for r in rows), 3), "events": sum(r["events"] for r in rows),
        "trace_sha256": combined_sha256([r["trace_sha256"] for r in rows]),
        "violations": sum(bool(r["violations"]) for r in rows), "unknown": sum(bool(r["unknown"]) for r in rows),
        "coverage": _total(rows), "runs": rows if len(rows) == 1 else [r for r in rows if r["violations"]],
    }  # fmt: skip
    if explanation is not None:
        figures["replay"] = explanation.to_dict()
    return figures


def replay_run(token: str, moment: int | None, save: Path | None, say: Say) -> dict[str, Any]:
    """The run of a token again: as a whole, explained, or stopped at an event."""
    again = replay(token)
    for difference in again.differences:
        say(f"not the same: {difference}; the trace may be another")
    if moment is not None:
        with again:
            say(again.at(moment).text())
    else:
        _show(explain(again.token, tries_max=0, progress=say), save, say)
    run = again.run
    same = "the same trace" if again.same else "ANOTHER TRACE than when the token was made"
    say(f"seed {run.seed}: {same}, {run.virtual_s:.1f} virtual s, {run.events:,} events")
    return {
        "seeds": 1, "virtual_s": round(run.virtual_s, 3), "wall_s": round(run.wall_s, 3), "events": run.events,
        "trace_sha256": run.trace_sha256, "same": again.same, "violations": int(bool(run.violations)),
        "unknown": int(bool(run.unknown)), "runs": [run.to_dict()],
    }  # fmt: skip


def _tell(row: dict[str, Any], say: Say) -> None:
    verdict = "VIOLATED" if row["violations"] else "unknown" if row["unknown"] else "fine"
    say(f"seed {row['seed']}: {verdict}, {row['virtual_s']:.1f} virtual s, {row['events']:,} events, {row['wall_s']} s")
    for text in [*row["violations"], *row["unknown"]][:VIOLATIONS_SHOWN_MAX]:
        say(f"    {text}")


def _show(explanation: Explanation, save: Path | None, say: Say) -> None:
    say(explanation.text())
    say(_how_to_replay(str(explanation.token)))
    if save is not None:
        for file in explanation.save(save):
            say(f"written: {file}")


def _how_to_replay(token: str) -> str:
    return (
        f"replay:           gostore sim --replay {token}\n"
        f'in a notebook:    import gostore as gs; world = gs.replay("{token}"); world.diagram()'
    )


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for row in rows:
        for mark, count in row["coverage"].items():
            total[mark] = total.get(mark, 0) + count
    return total


def combined_sha256(digests: Sequence[str]) -> str:
    """Of one run its own; of several the digest of theirs."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
