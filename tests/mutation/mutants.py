"""The mutants of a module: every mutation that Cosmic Ray's operators know, at every place where it applies.

The operators are those of the library (those that need arguments are left out: they insert and rename variables that
one names by hand). Two kinds of mutants are left out, and counted: those in type annotations, which are never evaluated
here (``from __future__ import annotations``), so that no test can tell them from the original; and those that are no
Python, as the library takes the ``*`` of a signature for a product, or that it fails to make.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from parso.tree import NodeOrLeaf


@dataclass(frozen=True)
class Mutant:
    """``occurrence``: the how many-th place of the operator in the module; ``line`` counts from 1."""

    operator: str
    occurrence: int
    line: int
    annotation: bool

    @property
    def name(self) -> str:
        return f"{self.operator}:{self.occurrence}"

    @property
    def family(self) -> str:
        """``ReplaceBinaryOperator`` of ``ReplaceBinaryOperator_Add_Sub``."""
        return self.operator.partition("_")[0]

    def apply(self, source: str) -> str:
        """The mutated source, which may be no Python. Raises ``AttributeError`` where the library's operator fails."""
        mutated: str | None = mutate_code(source, get_operator(f"core/{self.operator}")(), self.occurrence)
        assert mutated is not None, f"{self} applies to another source"
        return mutated


def mutants_of(source: str) -> list[Mutant]:
    """In the order of their lines, those in annotations included."""
    nodes = list(ast_nodes(get_ast(source)))
    found: list[Mutant] = []
    for name in operator_names():
        operator_class = get_operator(name)
        if operator_class.arguments():
            continue
        operator = operator_class()
        places = [(node, start) for node in nodes for start, _ in operator.mutation_positions(node)]
        found += [
            Mutant(name.removeprefix("core/"), number, start[0], _in_annotation(node))
            for number, (node, start) in enumerate(places)
        ]
    return sorted(found, key=lambda mutant: (mutant.line, mutant.operator, mutant.occurrence))


def _in_annotation(node: NodeOrLeaf) -> bool:
    return any(_is_annotation(child, parent) for child, parent in _ancestry(node))


def _ancestry(node: NodeOrLeaf) -> Iterator[tuple[NodeOrLeaf, NodeOrLeaf]]:
    while node.parent is not None:
        yield node, node.parent
        node = node.parent


def _is_annotation(child: NodeOrLeaf, parent: NodeOrLeaf) -> bool:
    if parent.type == "funcdef":
        return child is parent.annotation
    if parent.type in ("annassign", "tfpdef"):  # ``: type = value`` of a variable, ``name: type`` of a parameter
        return child is parent.children[2 if parent.type == "tfpdef" else 1]
    return False
