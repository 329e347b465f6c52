"""The event loop: asyncio's own machinery on virtual time; pause, crash, the processor."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

import pytest

from gostore.sim.errors import LimitError, SimulationError
from gostore.sim.loop import Processor
from gostore.sim.world import World, run


def test_sleep_takes_virtual_time_only():
    async def main(world):
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await asyncio.sleep(86_400)
        return loop.time() - begin

    with World(1) as world:
        assert world.run(main(world), timeout_s=100_000) == pytest.approx(86_400)


def test_timers_fire_in_order_of_time_then_of_creation():
    async def main(world):
        loop = asyncio.get_running_loop()
        order = []
        loop.call_later(2, order.append, "late")
        loop.call_later(1, order.append, "first")
        loop.call_later(1, order.append, "second")
        loop.call_at(loop.time() - 5, order.append, "past")
        cancelled = loop.call_later(1.5, order.append, "never")
        assert cancelled.when() == pytest.approx(loop.time() + 1.5)
        cancelled.cancel()
        assert cancelled.cancelled()
        loop.call_soon(order.append, "soon")
        await asyncio.sleep(3)
        return order

    assert run(main) == ["soon", "past", "first", "second", "late"]


def test_timeouts_wait_for_task_groups_events_and_queues():
    async def main(world):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await asyncio.sleep(5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 1)
        queue: asyncio.Queue[int] = asyncio.Queue()
        asyncio.get_running_loop().call_later(1, queue.put_nowait, 7)
        assert await queue.get() == 7
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(10))
                group.create_task(_fails(1))
        assert [str(e) for e in caught.value.exceptions] == ["after 1"]
        assert await asyncio.gather(_value(2), _value(1)) == [2, 1]
        return asyncio.get_running_loop().time()

    assert run(main) == pytest.approx(5.5)


async def _fails(seconds):
    await asyncio.sleep(seconds)
    raise ValueError(f"after {seconds}")


async def _value(number):
    await asyncio.sleep(number)
    return number


def test_sets_of_tasks_and_futures_iterate_in_order_of_creation():
    async def main(world):
        tasks = {asyncio.create_task(_value(1), name=str(i)) for i in range(200)}
        done, _ = await asyncio.wait(tasks)
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in range(200)]
        for future in futures:
            hash(future)
        return [t.get_name() for t in done], [futures.index(f) for f in set(futures)]

    names, numbers = run(main)
    # Hashes are small consecutive integers: a set that is large enough keeps them in order.
    assert names == [str(i) for i in range(200)]
    assert numbers == list(range(200))


def test_default_task_names_are_numbered_per_world():
    async def main(world):
        task = asyncio.create_task(asyncio.sleep(0))
        await task
        return task.get_name()

    assert run(main) == run(main)


def test_context_variables_are_respected_and_do_not_leak_in():
    variable: ContextVar[str] = ContextVar("variable", default="default")
    variable.set("outside")

    async def main(world):
        seen = [variable.get()]
        variable.set("inside")
        asyncio.get_running_loop().call_soon(lambda: seen.append(variable.get()))
        await asyncio.sleep(0)
        return seen

    assert run(main) == ["default", "inside"]
    assert variable.get() == "outside"


def test_the_running_loop_is_the_nodes_own():
    async def main(node):
        assert asyncio.get_running_loop() is node.loop
        assert asyncio.current_task() is node.task
        await asyncio.sleep(1)
        assert asyncio.get_running_loop() is node.loop

    with World(1) as world:
        nodes = [world.add_node(f"n{i}", main) for i in range(3)]
        world.run_for(2)
        for node in nodes:
            assert node.task.result() is None
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


def test_inside_a_running_loop_as_in_a_notebook_cell():
    async def inner(world):
        await asyncio.sleep(100)
        return asyncio.current_task().get_name()

    async def cell():
        outer_loop, outer_task = asyncio.get_running_loop(), asyncio.current_task()
        assert run(inner) == "client/run"
        assert asyncio.get_running_loop() is outer_loop
        assert asyncio.current_task() is outer_task
        await asyncio.sleep(0)  # the outer loop still works
        with pytest.raises(ZeroDivisionError):
            run(_divides)
        assert asyncio.current_task() is outer_task
        async with asyncio.timeout(5):
            await asyncio.to_thread(time.monotonic)
        return True

    assert asyncio.run(cell())


async def _divides(world):
    return 1 / 0


def test_a_world_cannot_be_stepped_from_inside():
    async def main(world):
        coroutine = asyncio.sleep(1)
        with pytest.raises(SimulationError, match="stepping already"):
            world.run(coroutine)
        with pytest.raises(RuntimeError, match="driven by its world"):
            asyncio.get_running_loop().run_until_complete(asyncio.sleep(1))
        with pytest.raises(SimulationError, match="stepping already"):
            world.close()

    run(main)


def test_what_a_simulated_loop_does_not_have_raises():
    async def main(world):
        loop = asyncio.get_running_loop()
        with pytest.raises(NotImplementedError):
            loop.add_signal_handler(2, print)
        with pytest.raises(NotImplementedError):
            loop.add_reader(0, print)
        assert loop.get_debug() is False

    run(main)


def test_an_exception_in_a_callback_is_reported_and_the_loop_goes_on():
    async def main(world):
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)
        assert "ZeroDivisionError" in loop.errors[0]
        assert "ZeroDivisionError: division by zero" in world.node("client").log_lines
        contexts = []
        loop.set_exception_handler(lambda loop, context: contexts.append(context["message"]))
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)
        return contexts

    assert "lambda" in run(main)[0]


# -- the processor


def test_callbacks_wait_until_the_processor_is_free():
    async def main(node):
        loop = asyncio.get_running_loop()
        times: list[float] = []
        for _ in range(5):
            loop.call_soon(lambda: times.append(loop.time()))
        await asyncio.sleep(1)
        return times

    with World(1) as world:
        node = world.add_node("n1", main, processor=Processor(callback_s=0.01, byte_s=0))
        world.run_for(2)
        times = node.task.result()
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx([0.01] * 4)


def test_a_busy_node_falls_behind_and_others_do_not():
    async def ticks(node):
        count = 0
        while True:
            await asyncio.sleep(0.001)
            count += 1
            node.ticks = count

    with World(1) as world:
        slow = world.add_node("slow", ticks, processor=Processor(callback_s=0.01, byte_s=0))
        fast = world.add_node("fast", ticks)
        world.run_for(1)
        assert slow.ticks < 60
        assert fast.ticks > 900


def test_bytes_cost_time():
    async def main(node):
        loop = asyncio.get_running_loop()
        begin = loop.time()
        loop.charge(1_000_000)
        await asyncio.sleep(0)
        return loop.time() - begin

    with World(1) as world:
        node = world.add_node("n1", main, processor=Processor(callback_s=0, byte_s=1e-6))
        world.run_for(2)
        assert node.task.result() == pytest.approx(1.0)


# -- pause


def test_a_paused_node_runs_nothing_and_then_all_that_came_due():
    async def main(node):
        node.seen = []
        for i in range(10):
            asyncio.get_running_loop().call_later(i, lambda i=i: node.seen.append((i, node.loop.time())))
        await asyncio.Event().wait()

    with World(1) as world:
        node = world.add_node("n1", main)
        world.run_for(2.5)
        world.pause("n1")
        world.run_for(4)
        assert [i for i, _ in node.seen] == [0, 1, 2]
        assert node.state == "paused"
        world.resume("n1")
        world.run_for(0.1)
        assert [i for i, _ in node.seen] == [0, 1, 2, 3, 4, 5, 6]
        assert all(6.5 <= at < 6.6 for _, at in node.seen[3:])
        world.run_for(10)
        assert [i for i, _ in node.seen] == list(range(10))


def test_pause_in_the_middle_of_a_burst_and_from_another_nodes_callback():
    async def main(node):
        node.seen = []
        for i in range(100):
            node.loop.call_soon(node.seen.append, i)

    async def client(world, node):
        await asyncio.sleep(50 * node.processor.callback_s)
        world.pause("n1")
        count = len(node.seen)
        assert 0 < count < 100
        await asyncio.sleep(1)
        assert len(node.seen) == count
        world.resume("n1")
        world.resume("n1")
        await asyncio.sleep(1)
        return node.seen

    with World(1) as world:
        node = world.add_node("n1", main)
        assert world.run(client(world, node)) == list(range(100))


# -- crash


def test_a_crash_runs_nobodys_finally_not_even_by_garbage_collection():
    ran: list[str] = []

    @contextmanager
    def context():
        try:
            yield
        finally:
            ran.append("contextmanager")

    @asynccontextmanager
    async def acontext():
        try:
            yield
        finally:
            ran.append("asynccontextmanager")

    def generator():
        try:
            yield 1
            yield 2
        finally:
            ran.append("generator")

    async def agenerator():
        try:
            yield 1
            yield 2
        finally:
            ran.append("async generator")

    class Context:
        async def __aenter__(self):
            return self

        async def __aexit__(self, *exception):
            ran.append("aexit")

    class Holder:
        def __init__(self):
            self.iterator = generator()
            next(self.iterator)

    async def deep(depth, lone):
        holder = Holder()
        try:
            async with Context(), acontext():
                with context():
                    if depth:
                        return await deep(depth - 1, lone)
                    async for _ in agenerator():
                        iterator = generator()
                        next(iterator)
                        await (asyncio.get_running_loop().create_future() if lone else asyncio.sleep(1000))
        except BaseException as error:
            ran.append(f"except {type(error).__name__}")
            raise
        finally:
            ran.append(f"finally {holder is None}")

    async def main(node):
        asyncio.get_running_loop().create_task(deep(3, lone=True))  # referred to by nobody
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().create_task, deep(0, lone=False))
        async with asyncio.TaskGroup() as group:
            group.create_task(deep(2, lone=False))
            group.create_task(deep(1, lone=True))

    with World(1) as world:
        world.add_node("n1", main)
        world.add_node("n2", main)
        world.add_node("n3", main)
        world.step(1)  # n3 has not even begun
        world.crash("n3")
        world.run_for(1)
        world.crash("n1")
        gc.collect()
        world.run_for(10)
        gc.collect()
        assert ran == []
    gc.collect()
    assert ran == []
    assert gc.garbage == []


def test_a_crash_keeps_what_was_about_to_run():
    ran = []

    def generator():
        try:
            yield
        finally:
            ran.append("finally")

    async def main(node):
        made = generator()
        next(made)
        node.loop.call_soon(list, made)
        node.loop.call_later(1, list, made)
        del made
        world.crash("n1")

    with World(1) as world:
        world.add_node("n1", main)
        world.run_for(5)
        gc.collect()
        assert ran == []
    gc.collect()
    assert ran == []


def test_a_suspended_task_that_nobody_refers_to_is_not_collected():
    ran = []

    async def forgotten():
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ran.append("finally")

    async def main(world):
        asyncio.get_running_loop().create_task(forgotten())
        await asyncio.sleep(1)
        gc.collect()
        await asyncio.sleep(1)

    run(main)
    gc.collect()
    assert ran == []


def test_an_abandoned_generator_of_a_living_node_is_closed_by_its_loop():
    ran = []

    async def numbers():
        try:
            yield 1
        finally:
            await asyncio.sleep(1)
            ran.append(asyncio.get_running_loop())

    async def main(world):
        async for _ in numbers():
            break
        await asyncio.sleep(2)
        return asyncio.get_running_loop()

    assert [run(main)] == ran


def test_a_crashed_node_accepts_nothing_and_restarts_with_a_new_loop():
    async def main(node):
        node.runs = getattr(node, "runs", 0) + 1
        await asyncio.Event().wait()

    with World(1) as world:
        node = world.add_node("n1", main)
        world.run_for(1)
        first = node.loop
        world.crash("n1")
        world.crash("n1")
        assert node.state == "down"
        assert first.call_soon(print, "dead").cancelled()
        assert first.call_later(1, print, "dead").cancelled()
        world.run_for(1)
        assert node.runs == 1
        world.restart("n1")
        world.run_for(1)
        assert node.runs == 2
        assert node.loop is not first
        assert node.incarnation == 2


def test_a_node_that_dies_in_its_own_callback():
    async def main(node):
        node.env.tasks.start(asyncio.sleep(100), name="background")
        await asyncio.sleep(1)
        node.env.fatal("the disk is broken")
        try:
            await asyncio.sleep(1)
        finally:
            node.after = True

    with World(1) as world:
        node = world.add_node("n1", main)
        world.run_for(5)
        assert node.state == "down"
        assert not hasattr(node, "after")


def test_cancelled_timers_do_not_pile_up():
    async def main(world):
        loop = asyncio.get_running_loop()
        keep = [loop.call_later(50 + i, int) for i in range(10)]
        for _ in range(20_000):
            loop.call_later(100, int).cancel()
        assert len(keep) == 10
        return len(world.scheduler._heap)

    assert run(main) < 3_000


def test_finished_tasks_are_not_kept():
    async def main(world):
        for _ in range(5_000):
            await asyncio.create_task(asyncio.sleep(0))
        return len(asyncio.get_running_loop()._tasks)

    assert run(main) < 1_000


def test_limits_name_seed_and_virtual_time():
    async def busy(world):
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def stuck(world):
        await asyncio.Event().wait()

    async def slow(world):
        while True:  # noqa: ASYNC110
            await asyncio.sleep(1)

    with pytest.raises(LimitError, match=r"10,000 callbacks were not enough.*seed 'x'"), World("x") as world:
        world.run(busy(world), callbacks_max=10_000)
    with pytest.raises(LimitError, match="nothing is left to do"), World(1) as world:
        world.run(stuck(world))
    with pytest.raises(LimitError, match=r"3 s of .* time.*seed 1, virtual time 3\.0") as caught, World(1) as world:
        world.run(slow(world), timeout_s=3)
    assert (caught.value.seed, caught.value.time_s) == (1, 3.0)
