"""What a failing run gets: a smaller schedule, a token, and the space-time diagram of what led to the violation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gostore.experiments.replay import Replay, Token
from gostore.experiments.simulation import minimise, run_seed
from gostore.faults import Step
from gostore.trace import Journal, export_perfetto, export_shiviz
from gostore.viz.spacetime import SpaceTime

GLANCE_EVENTS: Final = 30


@dataclass(frozen=True, slots=True)
class Explanation:
    """``steps`` are enough for the failure; ``before``: how many the seed drew. ``event``: index of the violation.

    ``glance`` is the end of ``diagram``, for a terminal.
    """

    token: Token
    before: int
    steps: tuple[Step, ...]
    violations: tuple[str, ...]
    event: int | None
    diagram: SpaceTime
    glance: SpaceTime
    journal: Journal

    def text(self) -> str:
        lines = [f"{len(self.steps)} of {self.before} faults are enough:", *(f"    {step}" for step in self.steps)]
        if self.event is not None:
            lines.append(f"the promise breaks at event {self.event:,}: look there with --at {self.event}")
        return "\n".join([*lines, "", self.glance.text(), ""])

    def to_dict(self) -> dict[str, Any]:
        return {
            "token": str(self.token),
            "command": f"gostore sim --replay {self.token}",
            "cell": f'import gostore as gs; world = gs.replay("{self.token}")',
            "faults": [str(step) for step in self.steps],
            "faults_before": self.before,
            "violations": list(self.violations),
            "event": self.event,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write the token, the diagram and the journal in each of its forms; the files."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "token.txt": f"{self.token}\n",
            "spacetime.svg": self.diagram.svg(),
            "violations.txt": "\n".join([*self.violations, "", self.text()]),
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        self.journal.save(folder / "journal.jsonl")
        export_shiviz(self.journal, folder / "shiviz.log")
        export_perfetto(self.journal, folder / "perfetto.json")
        return [folder / name for name in (*files, "journal.jsonl", "shiviz.log", "perfetto.json")]


def explain(token: Token, *, tries_max: int = 64, progress: Callable[[str], None] = lambda text: None) -> Explanation:
    """Make the schedule of a token's run smaller, for at most ``tries_max`` runs, and explain what is left."""
    again = Replay(token)
    run = again.run
    before = len(run.schedule)
    if run.violations and tries_max:
        steps = minimise(run, tries_max=tries_max, progress=progress)
        if len(steps) < before:
            smaller = replace(token, schedule=tuple(steps))
            again = Replay(replace(smaller, trace_sha256=_trace(smaller)))
            run = again.run
    event = None if again.focus is None else again.index_of(again.focus)
    return Explanation(
        again.token,
        before,
        tuple(run.schedule),
        tuple(run.violations),
        event,
        again.diagram(),
        again.diagram(events_max=GLANCE_EVENTS),
        again.journal,
    )


def _trace(token: Token) -> str:
    run = run_seed(
        token.seed, nodes=token.nodes, seconds=token.seconds, profile=token.profile, schedule=token.schedule,
        **token.settings,
    )  # fmt: skip
    return run.trace_sha256
