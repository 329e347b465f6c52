"""Scenarios of placement: which nodes hold a key, and what moves when the members change.

Commands:

``ring n1 n2 n3=2.0``     a ring of these nodes, some with a weight; ``replicas=R``, ``tokens=T`` for a node of weight 1
``tokens``                the circle: all tokens in order, in percent of the way round, with their nodes
``owners key...``         the token of each key and its preference list
``shares``                how much of the circle is each node's own, as the first of the list
``join n4=1.0``           the ring with one node more (``leave n4``: less), and what moved since the ring before
``arcs``                  which parts of the circle got other first owners by the last change
"""

from __future__ import annotations

from gostore.cluster.ring import TOKENS, HashRing, diff, token_of


def percent(token: int) -> str:
    return f"{100 * token / TOKENS:5.1f} %"


class Lesson:
    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self.replicas, self.tokens = 3, 8
        self.before = self.ring = HashRing({}, 1, 1)

    def build(self) -> None:
        self.before, self.ring = self.ring, HashRing(self.weights, self.replicas, self.tokens)

    def shares(self) -> dict[str, float]:
        shares = dict.fromkeys(self.ring.nodes, 0.0)
        for arc in self.ring.arcs():
            shares[arc.owners[0]] += arc.share
        return shares

    def moved(self) -> list[str]:
        """Of whom the first owner changed: from whom, to whom, and how much."""
        flows: dict[tuple[str, str], float] = {}
        for move in diff(self.before, self.ring):
            if move.old_owners[0] != move.new_owners[0]:
                flow = (move.old_owners[0], move.new_owners[0])
                flows[flow] = flows.get(flow, 0.0) + move.share
        lines = [f"{source} -> {to}: {share:.1%}" for (source, to), share in sorted(flows.items())]
        return [*lines, f"together {sum(flows.values()):.1%} of all keys have another first owner"]


def test_ring(scenario, transcript):
    lesson = Lesson()

    def handle(step):
        match step.name, step.args:
            case "ring", names:
                lesson.replicas = int(step.options.pop("replicas", 3))
                lesson.tokens = int(step.options.pop("tokens", 8))
                lesson.weights = dict.fromkeys(names, 1.0)
                lesson.weights |= {name: float(weight) for name, weight in step.options.items()}
                lesson.build()
                return f"{len(lesson.ring.tokens)} tokens, {lesson.replicas} copies"
            case "tokens", []:
                return "\n".join(f"{percent(token)}  {name}" for token, name in lesson.ring.tokens)
            case "owners", keys:
                width = max(map(len, keys))
                return "\n".join(
                    f"{key:<{width}}  {percent(token_of(key.encode()))}  {' '.join(lesson.ring.owners(key.encode()))}"
                    for key in keys
                )
            case "shares", []:
                return "\n".join(f"{name}: {share:.1%}" for name, share in lesson.shares().items())
            case "join", names:
                lesson.weights |= dict.fromkeys(names, 1.0)
                lesson.weights |= {name: float(weight) for name, weight in step.options.items()}
                lesson.build()
                return "\n".join(lesson.moved())
            case "leave", [name]:
                del lesson.weights[name]
                lesson.build()
                return "\n".join(lesson.moved())
            case "arcs", []:
                return "\n".join(
                    f"{percent(move.start)} to {percent(move.end)}: "
                    f"{' '.join(move.old_owners)} -> {' '.join(move.new_owners)}"
                    for move in diff(lesson.before, lesson.ring)
                )
        raise ValueError(f"no such command: {step.name} {step.args}")

    transcript(scenario, handle)
