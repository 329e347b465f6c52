"""What failures leave behind goes without anybody asking: chunks, intents, and copies that lack."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from gostore.core.errors import Conflict, GoStoreError, Timeout, Unavailable
from gostore.core.keyvalue import Write
from gostore.services.fs.collector import ABANDONED_S, COLLECT_SHARE
from gostore.services.fs.directory import REMOVE_PAGE
from gostore.services.fs.peers import owners_of
from gostore.services.fs.transactions import COMMIT_REPEATS_MAX, Transactions
from gostore.sim import simulate


def blob(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


async def assert_clean(cluster: Any, *, chunks: int = 0) -> None:
    check = await cluster.ask("n1", "check")
    assert check["chunks"] == chunks
    assert {check[what] for what in ("orphans", "intents", "lost", "under_replicated")} == {0}


class Lost:
    """The network between fs and db, for one commit: its request or its answer is lost, and all that repeat it."""

    def __init__(self, kv: Any, operation: str, container: str, *, happens: bool) -> None:
        self._operation = (operation, container)
        self._happens = happens
        self._left = COMMIT_REPEATS_MAX + 1
        kv.before, kv.after = self.before, self.after

    def _meant(self, writes: Any) -> bool:
        return self._left > 0 and any((write.operation, write.container) == self._operation for write in writes)

    def before(self, what: str, writes: Any) -> None:
        if what == "commit" and self._meant(writes) and (not self._happens or self._left <= COMMIT_REPEATS_MAX):
            self._left -= 1
            raise Timeout("the request was lost")

    def after(self, writes: Any) -> None:
        if self._meant(writes):
            self._left -= 1
            raise Timeout("the answer was lost")


@pytest.mark.parametrize("happens", [True, False])
def test_a_commit_in_doubt_is_settled_for_ever(kit: SimpleNamespace, happens: bool) -> None:
    """Whatever comes to the log later under its request id: it happened before, or it never will."""

    async def main() -> None:
        kv, env, sealed = kit.FakeKeyValue(), kit.make_env("n1"), asyncio.Event()
        await kv.create_container("c")
        transactions = Transactions(env, kv, "me")
        transactions.on_sealed = sealed.set
        write = Write("set", "c", "k", 1)
        Lost(kv, "set", "c", happens=happens)
        with pytest.raises(Timeout):
            await transactions.commit([], [write])
        await sealed.wait()
        assert transactions.sealing == 0
        assert kv.values("c") == ({"k": 1} if happens else {})
        (request_id,) = kv.outcomes
        if happens:
            await kv.commit([], [write], request_id=request_id)
        else:
            with pytest.raises(Conflict):  # the attempt that was on its way all the time
                await kv.commit([], [write], request_id=request_id)
            assert kv.values("c") == {}

    kit.run(main)


def test_a_commit_whose_caller_went_away_is_settled_too(kit: SimpleNamespace) -> None:
    async def main() -> None:
        kv, env, sealed = kit.FakeKeyValue(), kit.make_env("n1"), asyncio.Event()
        await kv.create_container("c")
        transactions = Transactions(env, kv, "me")
        transactions.on_sealed = sealed.set
        asked = asyncio.Event()

        def before(what: str, writes: Any) -> Any:
            if what == "commit" and writes:
                asked.set()
                return asyncio.Event().wait()
            return None

        kv.before = before
        commit = asyncio.ensure_future(transactions.commit([], [Write("set", "c", "k", 1)]))
        await asked.wait()
        commit.cancel()
        await sealed.wait()
        assert len(kv.outcomes) == 1

    kit.run(main)


def test_sealing_goes_on_until_db_answers_but_not_for_too_many(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        kv, env = kit.FakeKeyValue(), kit.make_env("n1")
        await kv.create_container("c")
        transactions = Transactions(env, kv, "me")
        answers, tried = asyncio.Event(), asyncio.Event()
        seals = []

        def before(what: str, writes: Any) -> None:
            if what == "commit" and not answers.is_set():
                seals.extend([0] * (not writes))
                if len(seals) > 100:
                    tried.set()
                raise Timeout("nobody answers")

        kv.before = before
        for number in range(5):
            with pytest.raises(Timeout):
                await transactions.commit([], [Write("set", "c", f"k{number}", 1)])
        assert transactions.sealing == 3
        await tried.wait()
        done = asyncio.Event()
        transactions.on_sealed = lambda: done.set() if transactions.sealing == 0 else None
        answers.set()
        await done.wait()
        assert len(kv.outcomes) == 3

    monkeypatch.setattr("gostore.services.fs.transactions.SEALS_MAX", 3)
    kit.run(main)


@pytest.mark.parametrize("happens", [True, False])
@pytest.mark.parametrize("what", ["delete", "inline overwrite", "overwrite", "intent"])
def test_an_operation_whose_outcome_is_unknown_leaves_nothing(kit: SimpleNamespace, what: str, happens: bool) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            if what != "intent":
                await cluster.ask("n2", "write", "/f", data=blob(10_000))
            else:
                await cluster.ask("n2", "mkdir", "/d")
            await cluster.settle()
            operation = "delete" if what == "delete" else "set"
            Lost(cluster.kv, operation, "fs.intents" if what == "intent" else "fs", happens=happens)
            data = {"inline overwrite": b"small", "overwrite": blob(9000, 2), "intent": blob(9000, 2)}.get(what, b"")
            function = "delete" if what == "delete" else "write"
            with pytest.raises(Timeout):
                await cluster.ask("n2", function, "/d/g" if what == "intent" else "/f", data=data)
            await cluster.settle()
            # An overwrite in doubt gives its intent up; its header can no longer be committed unless it was already.
            kept = 3 if what != "intent" and (not happens or what == "overwrite") else 0
            await assert_clean(cluster, chunks=kept)

    kit.run(main)


def test_a_recursive_removal_that_fails_on_the_way_frees_what_it_removed(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            for number in range(REMOVE_PAGE + 10):
                await cluster.ask("n2", "write", f"/d/{number:04}", data=blob(100, number))
            await cluster.settle()
            deletions = 0

            def before(operation: str, writes: Any) -> None:
                nonlocal deletions
                if operation == "commit" and any((w.operation, w.container) == ("delete", "fs") for w in writes):
                    deletions += 1
                    if deletions > 1:
                        raise Unavailable("no quorum")

            cluster.kv.before = before
            with pytest.raises(Unavailable):
                await cluster.ask("n2", "delete", "/d", True)
            cluster.kv.before = lambda *_: None
            await cluster.settle()
            left = len((await cluster.ask("n1", "list", "/d"))["children"])
            assert 0 < left < REMOVE_PAGE + 10
            await assert_clean(cluster, chunks=left)

    kit.run(main)


async def stall(cluster: Any, data: bytes) -> tuple[str, Any]:
    """A file of one chunk, deleted by now, whose put at one of its owners still waits for the disk; (that owner, what
    lets it go on). The writer's patience did not end it."""
    key = hashlib.sha256(data).hexdigest()
    slow = next(name for name in owners_of(cluster.view, key) if name != "n1")
    holder, disk, goes_on = cluster.nodes[slow].fs.holder, cluster.disks[slow], asyncio.Event()
    put, puts = disk.put, []

    async def put_slowly(*args: Any) -> Any:
        await goes_on.wait()
        return await put(*args)

    def call(_from: str, to: str, _service: str, function: str, _args: Any) -> Any:
        if function != "put" or to != slow:
            return None
        puts.append(asyncio.create_task(holder.put(key, data)))
        return asyncio.Event().wait()

    async def go_on() -> None:
        assert puts
        goes_on.set()
        await asyncio.gather(*puts)

    disk.put, cluster.before_call = put_slowly, call
    await cluster.ask("n1", "write", "/f", data=data)
    await cluster.ask("n1", "delete", "/f")
    return slow, go_on


def test_a_chunk_whose_disk_stalls_while_its_file_is_deleted_is_kept_in_mind(kit: SimpleNamespace) -> None:
    """Its writer went on with a majority (swarm faults, seed 237)."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            for node in cluster.nodes.values():
                node.fs.collector.want = lambda: None
            _, go_on = await stall(cluster, blob(4096))
            done = await cluster.ask("n1", "collect")
            assert (done["chunks"], done["kept"]) == (2, 1), "the collector comes again"
            await go_on()
            assert (await cluster.ask("n1", "check"))["orphans"] == 1
            done = await cluster.ask("n1", "collect")
            assert (done["chunks"], done["kept"]) == (1, 0)
            assert (await cluster.ask("n1", "check"))["orphans"] == 0

    kit.run(main)


def test_a_chunk_that_arrives_when_all_collections_gave_up_is_collected_after_all(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(4096)
            slow, go_on = await stall(cluster, data)
            await cluster.settle()
            key = hashlib.sha256(data).hexdigest()
            assert not cluster.copies(key)
            await go_on()
            assert cluster.copies(key) == [slow]
            await cluster.settle()
            await assert_clean(cluster)

    kit.run(main)


def test_a_wish_ends_the_pause_between_attempts(kit: SimpleNamespace) -> None:
    """One node cannot be reached; what is deleted meanwhile, and what then can be, does not wait for eight attempts."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            await cluster.ask("n2", "write", "/f", data=blob(10_000))
            await cluster.settle()
            collector, paused = cluster.nodes["n2"].fs.collector, asyncio.Event()
            collect, attempts = collector.collect, []

            async def failing(*args: Any) -> Any:
                attempts.append(asyncio.get_running_loop().time())
                if len(attempts) == 6:
                    asyncio.get_running_loop().call_soon(paused.set)
                if len(attempts) <= 6:
                    raise Unavailable("no quorum")
                return await collect(*args)

            collector.collect = failing
            collector.want()
            await paused.wait()
            await cluster.ask("n2", "delete", "/f")
            await cluster.settle()
            await assert_clean(cluster)
            pauses = [after - before for before, after in itertools.pairwise(attempts)]
            assert pauses[5] < pauses[4], "in virtual time"

    kit.run(main)


def test_a_writer_that_died_and_is_back_before_a_view_shows_it_is_cleaned_up_after(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = next(
                data
                for data in (blob(4096, seed) for seed in range(100))
                if "n2" not in owners_of(cluster.view, hashlib.sha256(data).hexdigest())
            )
            stored = asyncio.Event()

            def before(operation: str, writes: Any) -> Any:
                if operation == "commit" and any(
                    write.container == "fs" and write.key.endswith("f") for write in writes
                ):
                    stored.set()
                    return asyncio.Event().wait()
                return None

            cluster.kv.before = before
            write = asyncio.ensure_future(cluster.ask("n2", "write", "/f", data=data))
            await stored.wait()
            await cluster.kill("n2")
            write.cancel()
            await asyncio.gather(write, return_exceptions=True)
            cluster.kv.before = lambda *_: None
            await cluster.start("n2")
            cluster.online(*cluster.names)
            await cluster.settle()
            await assert_clean(cluster)

    kit.run(main)


def test_a_chunk_that_is_stored_while_an_owner_comes_online_gets_its_copy_there(kit: SimpleNamespace) -> None:
    """Two nodes were online when it was sent, three when it was on their disks; repair had looked at all in between."""

    async def main() -> None:
        async with kit.Cluster(nodes=3) as cluster:
            cluster.online("n1", "n2")
            await cluster.settle()
            goes_on, begun = asyncio.Event(), asyncio.Barrier(3)
            for name in ("n1", "n2"):
                disk = cluster.disks[name]

                async def put_slowly(*args: Any, put: Any = disk.put) -> Any:
                    await begun.wait()
                    await goes_on.wait()
                    return await put(*args)

                disk.put = put_slowly
            write = asyncio.ensure_future(cluster.ask("n1", "write", "/f", data=blob(4096)))
            await begun.wait()
            cluster.online("n1", "n2", "n3")
            await cluster.settle()
            goes_on.set()
            await write
            await cluster.settle()
            await assert_clean(cluster, chunks=1)

    kit.run(main)


@pytest.mark.parametrize("comes_back", ["never", "later", "in one step"])
def test_what_was_collected_while_a_node_was_away_does_not_come_back_with_it(
    kit: SimpleNamespace, comes_back: str
) -> None:
    """It was not told that it is away; when it learns so, it hands its copies over, and may hold nothing by the time it
    is online again (swarm faults, seed 3040). Or it never learns that it was away, and just repairs."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            # The first node of a view that has not gone cleans up after others: not the one that is away.
            data = next(
                data
                for data in (blob(4096, seed) for seed in range(100))
                if "n3" in owners_of(cluster.view, hashlib.sha256(data).hexdigest())
            )
            key = hashlib.sha256(data).hexdigest()
            await cluster.ask("n1", "write", "/f", data=data)
            await cluster.settle()
            others = [name for name in cluster.names if name != "n3"]
            cluster.partition(["n3"])
            cluster.online(*others, told=others)
            await cluster.ask("n1", "delete", "/f")
            await cluster.until(lambda: cluster.copies(key) == ["n3"])
            cluster.partition([])
            await cluster.until(lambda: all(node.fs.collector.idle for node in cluster.nodes.values()))
            if comes_back != "in one step":
                cluster.nodes["n3"].move_to(cluster.view)
                # Soon enough to come back before anybody collects what it brought.
                await cluster.until(lambda: "n3" not in cluster.copies(key), 0.001)
            if comes_back != "never":
                cluster.lives["n3"] += 1  # it refuted that it is dead
                cluster.online(*cluster.names)
            await cluster.settle()
            assert not cluster.copies(key)
            await assert_clean(cluster)

    kit.run(main)


def test_a_copy_that_moves_between_two_lists_of_a_collection_is_collected_by_the_next(kit: SimpleNamespace) -> None:
    """Its new holder was listed before it came, and the old one when it was gone."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            for node in cluster.nodes.values():
                node.fs.collector.want = lambda: None
            data = blob(4096)
            key = hashlib.sha256(data).hexdigest()
            source = next(name for name in cluster.names if name not in owners_of(cluster.view, key))
            holder = cluster.nodes[source].fs.holder
            listed, all_listed = [], asyncio.Event()
            for name in cluster.names:
                if name != source:

                    def keys(
                        *, arriving: bool = False, name: str = name, keys: Any = cluster.nodes[name].fs.holder.keys
                    ) -> Any:
                        listed.append(name)
                        if len(listed) == len(cluster.names) - 1:
                            all_listed.set()
                        return keys(arriving=arriving)

                    cluster.nodes[name].fs.holder.keys = keys

            async def move() -> None:
                await all_listed.wait()
                await holder.put(key, data)
                await cluster.until(lambda: source not in cluster.copies(key))

            def call(_from: str, to: str, _service: str, function: str, _args: Any) -> Any:
                return move() if (to, function) == (source, "names") else None

            await cluster.settle()
            listed.clear()
            all_listed.clear()
            cluster.before_call = call
            done = await cluster.ask(source, "collect")
            cluster.before_call = lambda *_: None
            assert cluster.copies(key)
            assert done["kept"], "it comes again"
            done = await cluster.ask(source, "collect")
            assert (done["chunks"], done["kept"]) == (3, 0)
            await assert_clean(cluster)

    kit.run(main)


def test_a_view_that_changes_in_the_midst_of_a_batch_leaves_no_chunk_of_it_behind(kit: SimpleNamespace) -> None:
    """The owners were chosen before; some of the puts were sent, and some not, when there was one more."""

    async def main() -> None:
        async with kit.Cluster(nodes=3) as cluster:
            cluster.online("n1", "n2")
            await cluster.ask("n1", "mkdir", "/d")
            await cluster.settle()
            for name in ("n1", "n2"):
                disk = cluster.disks[name]

                async def put_slowly(*args: Any, put: Any = disk.put) -> Any:
                    await asyncio.sleep(0.05)  # virtual time
                    if "n3" not in cluster.view.online:
                        cluster.online("n1", "n2", "n3")
                    return await put(*args)

                disk.put = put_slowly
            await cluster.ask("n1", "write", "/d/f", data=blob(6 * 4096))
            await cluster.settle()
            await assert_clean(cluster, chunks=6)

    kit.run(main)


def test_a_collection_that_fails_gives_no_more_work_than_one_that_does_not(kit: SimpleNamespace) -> None:
    """However many wishes there are, at most a fifth of the (virtual) time goes into it."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            await cluster.ask("n1", "write", "/f", data=blob(3000))
            await cluster.settle()
            loop, collector = asyncio.get_running_loop(), cluster.nodes["n1"].fs.collector
            scans: list[float] = []

            def before(operation: str, details: Any) -> Any:
                if operation == "scan" and details == ("fs", ""):
                    scans.append(loop.time())
                    return asyncio.sleep(0.5)
                return None

            cluster.kv.before = before
            cluster.kv.objects["fs"]["root/zzz"] = (b"\xa3abc", 1)  # a header that cannot be read
            while len(scans) < 8:
                collector.want()
                await asyncio.sleep(0.1)
            assert scans[-1] - scans[0] >= (len(scans) - 1) * 0.5 * (1 + COLLECT_SHARE)
            del cluster.kv.objects["fs"]["root/zzz"]
            await cluster.settle()

    kit.run(main)


def test_every_page_of_a_collection_counts_as_work(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to read all of them: what is bounded is how much one of them counts."""
    page_s = 0.25

    async def main() -> None:
        async with kit.Cluster() as cluster:
            for number in range(20):
                await cluster.ask("n1", "write", f"/f{number:02}", data=blob(100, number))
            await cluster.settle()
            loop, names, begun, ended = asyncio.get_running_loop(), [0], [0.0], [0.0]

            def before(operation: str, details: Any) -> Any:
                if operation != "scan" or details != ("fs", ""):
                    return None
                ended[-1] = loop.time() + page_s
                return asyncio.sleep(page_s)

            def call(source: str, to: str, _service: str, function: str, args: Any) -> Any:
                if (source, to, function) == ("n1", "n1", "names") and not args[0]:
                    for times in (names, begun, ended):
                        times.append(0)
                    begun[-1] = loop.time()
                if (source, to, function) == ("n1", "n2", "names"):
                    names[-1] += 1
                return asyncio.sleep(page_s) if function == "names" else None

            cluster.kv.before, cluster.before_call = before, call
            while len(begun) < 4:
                cluster.nodes["n1"].fs.collector.want()
                await asyncio.sleep(0.1)
            assert names[1] > 1, "pages of one node"
            for number in (1, 2):
                took_s = ended[number] - begun[number]
                assert took_s >= (names[number] + 20 // 4) * page_s
                assert COLLECT_SHARE <= (begun[number + 1] - ended[number]) / took_s < 1.5 * COLLECT_SHARE

    monkeypatch.setattr("gostore.services.fs.collector.SCAN_PAGE", 4)
    monkeypatch.setattr("gostore.services.fs.collector.KEYS_MAX", 4)
    kit.run(main)


@pytest.mark.parametrize("waited_for", ["mark", "names", "sweep", "db"])
def test_an_outage_during_a_collection_does_not_put_the_next_one_off(kit: SimpleNamespace, waited_for: str) -> None:
    """To wait for a node that is paused, or a shard without a leader, is no work to be made up for by a pause (swarm
    faults, seed 399)."""
    outage_s = 9.0

    async def main() -> None:
        async with kit.Cluster() as cluster:
            for path in ("/f", "/g"):
                await cluster.ask("n1", "write", path, data=blob(10_000, ord(path[1])))
            await cluster.settle()
            waited = asyncio.Event()

            async def outage() -> None:
                await asyncio.sleep(outage_s)  # virtual time
                waited.set()

            async def no_leader() -> None:
                await outage()
                raise Unavailable("no leader")

            def before(operation: str, details: Any) -> Any:
                hit = waited_for == "db" and operation == "scan" and details == ("fs", "") and not waited.is_set()
                return no_leader() if hit else None

            def call(source: str, to: str, _service: str, function: str, _args: Any) -> Any:
                hit = (source, to, function) == ("n1", "n3", waited_for) and not waited.is_set()
                return outage() if hit else None

            cluster.kv.before, cluster.before_call = before, call
            await cluster.ask("n1", "delete", "/f")
            await waited.wait()
            over_s = asyncio.get_running_loop().time()
            await cluster.ask("n1", "delete", "/g")
            await cluster.settle()
            assert asyncio.get_running_loop().time() - over_s < outage_s
            await assert_clean(cluster)

    kit.run(main)


def test_whoever_stopped_waiting_for_a_put_collects_again_when_no_older_request_is_waited_for(
    kit: SimpleNamespace,
) -> None:
    """While one is, its node cannot be told that nobody waits for the put."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(4096)
            slow = next(name for name in owners_of(cluster.view, hashlib.sha256(data).hexdigest()) if name != "n1")
            loop, marks, enough = asyncio.get_running_loop(), [], asyncio.Event()

            def call(source: str, to: str, _service: str, function: str, args: Any) -> Any:
                if function == "put" and to == slow:
                    return asyncio.Event().wait()
                if function == "names" and not args[0] and (source, to) == ("n1", slow):
                    marks.append(loop.time())
                    if len(marks) == 2:
                        enough.set()
                return None

            cluster.before_call = call
            await cluster.ask("n1", "write", "/f", data=data)
            abandoned_s = loop.time()
            await enough.wait()
            assert marks[0] < abandoned_s + ABANDONED_S <= marks[-1]

    kit.run(main)


@pytest.mark.parametrize("cut_s", [0.0025, 0.0035])
def test_what_was_deleted_before_a_long_outage_is_collected_after_it(cut_s: float) -> None:
    """Nobody is expelled, and nobody comes back: no change of the view asks for a collection."""

    async def main(cluster: Any) -> None:
        for number in range(12):
            await cluster.fs.write(f"/d{number}/f", blob(5000, number), via=f"n{number % 3 + 1}")
        await cluster.wait_settled()

        async def delete(number: int) -> None:
            with contextlib.suppress(GoStoreError):
                await cluster.fs.delete(f"/d{number}/f", via=f"n{number % 3 + 1}")

        deletions = [asyncio.ensure_future(delete(number)) for number in range(12)]
        await asyncio.sleep(cut_s)  # virtual time: some are committed by then, some are not
        cluster.sim.net.partition(["n1"], ["n2"], ["n3"])
        await asyncio.gather(*deletions)
        await asyncio.sleep(240)  # virtual time: longer than eight attempts take
        cluster.sim.net.heal()
        await cluster.wait_ready()
        await asyncio.sleep(120)  # virtual time: the attempts are rare by now
        await cluster.wait_settled()
        check = await cluster.fs.check()
        assert (check["orphans"], check["intents"]) == (0, 0)
        assert check["files"] == check["chunks"] < 12

    with simulate(3, seed=11, fs={"inline_size_bytes_max": 256, "chunk_size_bytes": 8192}) as cluster:
        cluster.run(main(cluster))


def test_a_put_that_comes_out_of_a_cut_connection_after_its_file_is_deleted_is_not_stored() -> None:
    """Its writer had stopped waiting; it lay in a buffer of TCP all the time."""

    async def main(cluster: Any) -> None:
        await cluster.wait_settled()

        async def find(number: int, *also: str) -> tuple[int, list[str]]:
            """Content of one chunk, of which n4 holds no copy, but those also."""
            for seed in range(number, number + 1000):
                await cluster.fs.write("/f", blob(20_000, seed), via="n4")
                (chunk,) = (await cluster.fs.stat("/f"))["place"]["chunks"]
                await cluster.fs.delete("/f")
                if "n4" not in chunk["owners"] and set(also) <= set(chunk["owners"]):
                    return seed, chunk["owners"]
            raise AssertionError("no such content")

        seed, owners = await find(0)
        last = owners[2]
        await find(1000, last)  # the connection to it is open now
        other = next(name for name in cluster.nodes if name not in (last, "n4"))
        await cluster.wait_settled()
        fault = await cluster.faults.isolate(last)

        async def heal() -> None:
            await asyncio.sleep(1.5)  # virtual time: after the writer's patience, before the node is expelled
            await cluster.faults.heal(fault)

        healed = asyncio.ensure_future(heal())
        await cluster.fs.write("/f", blob(20_000, seed), via="n4")
        await cluster.fs.delete("/f", via=other)
        await healed
        await cluster.wait_settled()
        await asyncio.sleep(60)  # virtual time: whatever is on its way arrives
        check = await cluster.fs.check()
        assert (check["files"], check["orphans"], check["intents"]) == (0, 0, 0)

    with simulate(5, seed=1) as cluster:
        cluster.run(main(cluster))
