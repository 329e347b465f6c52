from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.consensus.configuration import MEMBERS_MAX, NOBODY, Configuration

NAMES = ("a", "b", "c", "d", "e", "f")
groups = st.lists(st.sampled_from(NAMES), unique=True, min_size=1, max_size=5).map(tuple)


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    voters = draw(groups)
    learners = tuple(name for name in draw(groups) if name not in voters)
    return Configuration(voters, learners, draw(st.just(()) | groups))


def quorums(configuration: Configuration) -> list[frozenset[str]]:
    """All sets of names that decide."""
    subsets = itertools.chain.from_iterable(itertools.combinations(NAMES, n) for n in range(len(NAMES) + 1))
    return [frozenset(subset) for subset in subsets if configuration.won(dict.fromkeys(subset, True))]


def has_majority(voters: tuple[str, ...], names: frozenset[str]) -> bool:
    return 2 * len(names.intersection(voters)) > len(voters)


@given(configurations())
def test_a_quorum_is_a_majority_of_the_new_and_of_the_old_voters(configuration: Configuration) -> None:
    found = quorums(configuration)
    assert found
    for quorum in found:
        assert has_majority(configuration.voters, quorum)
        assert not configuration.joint or has_majority(configuration.outgoing, quorum)
    smallest = min(map(len, found))
    assert smallest >= len(configuration.voters) // 2 + 1


@given(configurations(), groups)
def test_each_step_of_a_change_shares_a_voter_with_the_one_before(
    before: Configuration, voters: tuple[str, ...]
) -> None:
    before = before.end()
    joint = before.begin(voters, ())
    for one, other in ((before, joint), (joint, joint.end())):
        for first, second in itertools.product(quorums(one), quorums(other)):
            assert first & second


@given(configurations(), st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5)))
def test_reached_is_the_largest_number_of_a_quorum(configuration: Configuration, numbers: dict[str, int]) -> None:
    def holds(number: int) -> bool:
        return configuration.won({name: numbers.get(name, 0) >= number for name in NAMES})

    reached = configuration.reached(numbers)
    assert reached == 0 or holds(reached)
    assert not holds(reached + 1)


@given(configurations(), st.dictionaries(st.sampled_from(NAMES), st.booleans()))
def test_lost_is_when_even_all_others_would_not_do(configuration: Configuration, votes: dict[str, bool]) -> None:
    hopeful = {name: votes.get(name, True) for name in NAMES}
    assert configuration.lost(votes) == (not configuration.won(hopeful))
    assert not (configuration.won(votes) and configuration.lost(votes))


@given(configurations())
def test_the_wire_gives_back_what_was_sent(configuration: Configuration) -> None:
    assert Configuration.from_wire(configuration.to_wire()) == configuration
    assert Configuration.unpack(configuration.pack()) == configuration


def test_a_change_of_learners_or_of_the_order_is_one_entry() -> None:
    before = Configuration(("a", "b", "c"), ("d",))
    assert before.begin(("a", "b", "c"), ()) == Configuration(("a", "b", "c"))
    assert before.begin(("c", "a", "b"), ("d",)) == Configuration(("c", "a", "b"), ("d",))
    joint = before.begin(("d", "b", "c"), ("a",))
    assert joint == Configuration(("d", "b", "c"), ("a",), ("a", "b", "c"))
    assert joint.members == ("d", "b", "c", "a")
    assert str(joint) == "voters d,b,c outgoing a,b,c learners a"


def test_who_knows_of_no_group_decides_nothing() -> None:
    assert not NOBODY.won({"a": True})
    assert NOBODY.lost({})
    assert not NOBODY.is_voter("a")
    assert str(NOBODY) == "nobody"


@pytest.mark.parametrize(
    ("voters", "learners", "outgoing"),
    [
        (("a", "a"), (), ()),
        (("a",), ("a",), ()),
        (("a",), ("b", "b"), ()),
        (("a",), (), ("b", "b")),
        ((), ("a",), ()),
        ((), (), ("a",)),
        (tuple(f"n{i}" for i in range(MEMBERS_MAX + 1)), (), ()),
    ],
)
def test_what_is_no_configuration_is_refused(
    voters: tuple[str, ...], learners: tuple[str, ...], outgoing: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError):
        Configuration(voters, learners, outgoing)


@pytest.mark.parametrize("wire", [None, [], [["a"], []], [["a"], [], [1]], [["a"], [], [""]], ["a", [], []]])
def test_a_malformed_configuration_is_refused(wire: object) -> None:
    with pytest.raises(ValueError, match="not a configuration"):
        Configuration.from_wire(wire)
    with pytest.raises(ValueError, match="not a configuration"):
        Configuration.unpack(b"\xc1")
