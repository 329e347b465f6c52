"""The public checks of lab 01. Each is given your class and a seeded source of randomness."""

from collections import Counter

from gostore.lab import check


def names(count):
    return {f"n{i}": 1.0 for i in range(1, count + 1)}


def keys(rng, count):
    return [f"/home/{rng.getrandbits(64):x}".encode() for _ in range(count)]


@check(points=1, hint="owners() returns a tuple of names: as many as there are replicas, or nodes if those are fewer.")
def owners_are_distinct_known_and_enough(ring, rng):
    for count in (1, 2, 3, 5, 9):
        placement = ring(names(count), 3, 32)
        for key in keys(rng, 50):
            owners = placement.owners(key)
            assert len(set(owners)) == len(owners), f"owners({key!r}) = {owners}: a node twice"
            assert set(owners) <= set(names(count)), f"owners({key!r}) = {owners}: a node that is not there"
            assert len(owners) == min(3, count), f"owners({key!r}) = {owners} of {count} nodes, not {min(3, count)}"


@check(points=1, hint="Sort what you build from: dictionaries differ in order, and hash() differs between processes.")
def every_node_computes_the_same(ring, rng):
    nodes = names(7)
    shuffled = list(nodes)
    rng.shuffle(shuffled)
    one, other = ring(nodes, 3, 32), ring({name: 1.0 for name in shuffled}, 3, 32)
    for key in keys(rng, 300):
        assert one.owners(key) == other.owners(key), f"two nodes disagree on {key!r}"


@check(points=2, hint="Only the ranges that the new node takes may change hands: place nodes by hashing their names.")
def a_join_moves_one_part_in_n(ring, rng):
    before, after = ring(names(9), 1, 64), ring(names(10), 1, 64)
    sample = keys(rng, 4000)
    moved = [key for key in sample if before.owners(key) != after.owners(key)]
    strays = [key for key in moved if after.owners(key) != ("n10",)]
    assert not strays, f"{len(strays)} of 4000 keys moved between old nodes when n10 joined"
    assert 0.04 < len(moved) / len(sample) < 0.20, f"{len(moved)} of 4000 keys moved; about 400 should"


@check(points=2, hint="One token per node gives very uneven shares; take tokens_per_node of them.")
def virtual_nodes_even_the_load(ring, rng):
    placement = ring(names(8), 1, 128)
    load = Counter(placement.owners(key)[0] for key in keys(rng, 8000))
    assert len(load) == 8, f"only {len(load)} of 8 nodes own anything"
    assert max(load.values()) < 2 * 1000, f"the fullest node owns {max(load.values())} of 8000 keys; even is 1000"


@check(points=2, hint="When the first owner is gone, the second must already hold the key: walk on around the ring.")
def the_next_owner_takes_over(ring, rng):
    nodes = names(6)
    placement = ring(nodes, 3, 64)
    for key in keys(rng, 200):
        first, second, *_ = placement.owners(key)
        without = ring({name: 1.0 for name in nodes if name != first}, 3, 64)
        assert without.owners(key)[0] == second, f"{key!r}: after {first} is gone, {second} should be first"


@check(points=2, hint="Run gs.launch(4, placement=MyRing) in the notebook and read the error it shows.")
def a_real_cluster_runs_on_it(ring, rng):
    import gostore as gs

    with gs.launch(4, placement=ring) as cluster:
        files = {f"/lab/{i}": rng.randbytes(rng.randrange(0, 20_000)) for i in range(20)}
        for path, data in files.items():
            cluster.fs.write_sync(path, data)
        cluster.nodes["n4"].kill_sync()
        cluster.wait_settled_sync(timeout_s=30)
        for path, data in files.items():
            assert cluster.fs.read_sync(path) == data, f"{path} was damaged when n4 was killed"
