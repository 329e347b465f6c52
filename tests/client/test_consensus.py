"""One picture of a consensus group, of what several nodes say at different moments, or do not say."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gostore.client.consensus import merged_groups, with_leader

NODES = ["n1", "n2", "n3"]


def one(role: str = "follower", *, term: int = 4, leader: str | None = "n1", **changes: Any) -> dict[str, Any]:
    """What a node says of a group of three."""
    return {
        "name": "shard 3", "kind": "raft", "role": role, "term": term, "leader": leader, "quiet": False, "last": 100,
        "committed": 100, "applied": 100, "snapshot": 0, "installed": 0, "size_bytes": 1_000_000, "voters": NODES,
        "learners": [], "outgoing": [], "followers": {}, **changes,
    }  # fmt: skip


def merged(told: dict[str, dict[str, Any]], *, silent: str = "", dead: str = "") -> dict[str, Any]:
    """The one group; ``silent`` nodes live and do not answer, ``dead`` ones have answered before."""
    alive = [name for name in NODES if name not in dead.split()]
    fresh = [name for name in told if name in alive and name not in silent.split()]
    (group,) = merged_groups(
        {name: {"replication": "raft", "groups": [group]} for name, group in told.items()}, fresh=fresh, alive=alive
    )
    return group


def test_the_leader_says_where_its_followers_are() -> None:
    followers = {
        "n2": {"state": "replicate", "match": 97, "next": 101},
        "n3": {"state": "probe", "match": 0, "next": 1},
    }
    group = merged({"n1": one("leader", followers=followers), "n2": one(last=120), "n3": one(last=80)})
    assert (group["state"], group["leader"], group["term"], group["committed"]) == ("led", "n1", 4, 100)
    # n2 was asked a moment later, when it had more: one row is of one moment.
    assert group["replicas"]["n2"]["last"] == 97
    # Where n3 is the leader does not know yet; n3 does.
    assert (group["replicas"]["n3"]["last"], group["replicas"]["n3"]["state"]) == (80, "probe")


def test_a_snapshot_on_its_way_has_its_size() -> None:
    followers = {"n2": {"state": "snapshot", "match": 0, "next": 1, "chunk": 3, "sent_bytes": 786_432}}
    replicas = merged({"n1": one("leader", followers=followers), "n2": one(last=12)})["replicas"]
    assert (replicas["n2"]["sent_bytes"], replicas["n2"]["size_bytes"], replicas["n2"]["last"]) == (
        786_432,
        1_000_000,
        12,
    )
    assert "sent_bytes" not in replicas["n1"]


def test_a_dead_leader_is_none_although_all_still_follow_it() -> None:
    told = {"n1": one("leader"), "n2": one(), "n3": one()}
    group = merged(told, dead="n1")
    assert (group["state"], group["leader"]) == ("leaderless", None)
    assert (group["replicas"]["n1"]["down"], group["replicas"]["n2"]["down"]) == (True, False)
    told["n3"] = one("pre-candidate", leader=None)
    assert merged(told, dead="n1")["state"] == "election"
    told["n3"] = one("leader", term=5, leader="n3")
    assert [merged(told, dead="n1")[key] for key in ("state", "leader", "term")] == ["led", "n3", 5]


def test_a_leader_that_is_only_slow_to_answer_leads() -> None:
    group = merged({"n1": one("leader"), "n2": one(), "n3": one()}, silent="n1")
    assert (group["state"], group["leader"], group["replicas"]["n1"]["stale"]) == ("led", "n1", True)


def test_of_two_leaders_the_one_of_the_later_term_counts() -> None:
    cut_off = {"n1": one("leader"), "n2": one("leader", term=5, leader="n2"), "n3": one(term=5, leader="n2")}
    group = merged(cut_off)
    assert (group["leader"], group["term"], group["replicas"]["n1"]["role"]) == ("n2", 5, "leader")


def test_without_a_majority_there_is_no_quorum() -> None:
    told = {"n1": one("leader"), "n2": one(), "n3": one("candidate", term=9, leader=None)}
    assert merged(told, dead="n1 n2")["state"] == "no quorum"
    assert merged(told, dead="n1 n2 n3")["state"] == "unknown"


def test_who_was_removed_is_shown_while_it_holds_a_copy() -> None:
    told = {"n1": one("leader", voters=["n1", "n2"]), "n2": one(voters=["n1", "n2"]), "n3": one()}
    assert merged(told)["replicas"]["n3"]["member"] is False
    assert "n3" not in merged(told, dead="n3")["replicas"]


def test_who_answers_and_does_not_speak_of_the_group_has_nothing_of_it() -> None:
    told = {"n1": {"replication": "raft", "groups": [one("leader", learners=["n4"])]}}
    told["n4"] = {"replication": "raft", "groups": []}
    (group,) = merged_groups(told, fresh=["n1", "n4"], alive=[*NODES, "n4"])
    assert (group["replicas"]["n4"]["last"], group["replicas"]["n4"]["stale"]) == (0, False)
    assert (group["replicas"]["n2"]["last"], group["replicas"]["n2"]["stale"]) == (None, True)


def test_masters_come_first_and_shards_by_number() -> None:
    names = ["shard 10", "shard 9", "masters"]
    told = {"n1": {"replication": "raft", "groups": [{**one("leader"), "name": name} for name in names]}}
    assert [group["name"] for group in merged_groups(told, fresh=["n1"], alive=["n1"])] == names[::-1]


def test_the_news_of_an_election_is_taken_once() -> None:
    group = merged({"n1": one("leader"), "n2": one(), "n3": one()}, dead="n1")
    news = with_leader(group, "n2", 5)
    assert (news["leader"], news["term"], news["state"]) == ("n2", 5, "led")
    assert [replica["role"] for replica in news["replicas"].values()] == ["follower", "leader", "follower"]
    assert with_leader(news, "n2", 5) is news
    assert with_leader(news, "n1", 4) is news, "old news"
    assert group["leader"] is None, "the snapshot that it was is left alone"


ROLES = st.sampled_from(["leader", "follower", "pre-candidate", "candidate"])
SAID = st.builds(
    one, ROLES, term=st.integers(0, 3), leader=st.sampled_from([None, *NODES]), last=st.integers(0, 9),
    committed=st.integers(0, 9),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(NODES), SAID, min_size=1), st.sets(st.sampled_from(NODES)), st.data())
def test_whatever_they_say_there_is_one_leader_at_most_and_it_lives(
    told: dict[str, Any], dead: set[str], data: st.DataObject
) -> None:
    silent = data.draw(st.sets(st.sampled_from(NODES)))
    group = merged(told, silent=" ".join(sorted(silent)), dead=" ".join(sorted(dead)))
    assert (group["leader"] is not None) == (group["state"] == "led")
    assert group["leader"] not in dead
    assert list(group["replicas"])[:3] == NODES
    heard = {name: said for name, said in told.items() if name not in silent | dead}
    for said in heard.values():
        if said["role"] == "leader":
            assert group["leader"] is not None
            assert group["term"] >= said["term"]
