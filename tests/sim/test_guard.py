"""Inside a world: virtual time, and no threads, sockets or entropy. Outside, and in other threads: as always."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
import subprocess
import threading
import time
import uuid

import pytest

from gostore.sim import guard
from gostore.sim.errors import DeterminismError
from gostore.sim.scheduler import EPOCH_S
from gostore.sim.world import World, run

# Each through its module, at the time of the call, as code does it.
FORBIDDEN = {
    "thread": lambda: threading.Thread(target=print).start(),
    "sleep": lambda: time.sleep(0),
    "urandom": lambda: os.urandom(4),
    "uuid4": uuid.uuid4,
    "uuid1": lambda: uuid.uuid1(1),
    "secrets": lambda: secrets.token_hex(8),
    "SystemRandom": lambda: random.SystemRandom().random(),
    "global random": lambda: random.randint(1, 6),
    "global shuffle": lambda: random.shuffle([1, 2]),
    "global seed": lambda: random.seed(3),
    "unseeded Random": random.Random,
    "fork": lambda: os.fork(),  # noqa: PLW0108
    "subprocess": lambda: subprocess.Popen(["true"]),
    "socket.connect": lambda: socket.socket().connect(("127.0.0.1", 1)),
    "create_connection": lambda: socket.create_connection(("127.0.0.1", 1)),
    "socketpair": lambda: socket.socketpair(socket.AF_UNIX),
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "executor": lambda: asyncio.get_running_loop().run_in_executor(None, print),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden_calls_raise_with_the_stack(what):
    async def culprit(world):
        FORBIDDEN[what]()

    with pytest.raises(DeterminismError, match="culprit") as caught:
        run(culprit, seed=5)
    assert "seed 5" in str(caught.value)
    assert "node client" in str(caught.value)
    assert "test_guard.py" in str(caught.value)


def test_a_swallowed_error_still_ends_the_run():
    async def main(world):
        try:
            os.urandom(4)
        except Exception:
            pass
        await asyncio.sleep(1)

    with pytest.raises(DeterminismError, match="entropy"):
        run(main)


def test_to_thread_raises():
    async def main(world):
        await asyncio.to_thread(print)

    with pytest.raises(DeterminismError, match="run_in_executor"):
        run(main)


def test_time_is_the_nodes_own_virtual_time():
    async def read(node):
        await asyncio.sleep(10)
        return {
            "time": time.time(),
            "time_ns": time.time_ns(),
            "monotonic": time.monotonic(),
            "perf_counter_ns": time.perf_counter_ns(),
            "gmtime": time.strftime("%Y-%m-%d", time.gmtime()),
            "strftime": time.strftime("%Y"),
            "ctime": time.ctime()[-4:],
            "asctime": time.asctime()[-4:],
            "epoch": time.gmtime(0).tm_year,
        }

    with World(1) as world:
        right, wrong = world.add_node("right", read), world.add_node("wrong", read)
        wrong.clock.jump(366 * 86_400)
        world.run_for(11)
        a, b = right.task.result(), wrong.task.result()
    assert a["time"] == pytest.approx(EPOCH_S + 10, abs=0.01)
    assert b["time"] == pytest.approx(EPOCH_S + 10 + 366 * 86_400, abs=0.01)
    assert a["time_ns"] == pytest.approx(a["time"] * 1e9, rel=1e-9)
    assert a["monotonic"] == pytest.approx(10, abs=0.01) == b["monotonic"]
    assert a["perf_counter_ns"] == pytest.approx(10e9, rel=0.01)
    assert (a["gmtime"], a["strftime"], a["ctime"], a["asctime"]) == ("2026-01-01", "2026", "2026", "2026")
    assert (b["gmtime"], b["strftime"], b["ctime"], b["asctime"]) == ("2027-01-02", "2027", "2027", "2027")
    assert a["epoch"] == 1970


def test_logging_reads_the_virtual_clock(caplog):
    async def main(world):
        await asyncio.sleep(5)
        logging.getLogger("test").warning("hello")

    run(main)
    assert caplog.records[0].created == pytest.approx(EPOCH_S + 5, abs=0.01)


def test_everything_is_restored_afterwards_also_after_an_error():
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in guard._PATCHES]
    for main in (_fails, _passes, _forbidden):
        try:
            run(main)
        except (ZeroDivisionError, DeterminismError):
            pass
        assert [(owner, name, getattr(owner, name)) for owner, name, _ in guard._PATCHES] == before
    assert "__new__" not in socket.socket.__dict__
    with socket.socket() as real:
        assert isinstance(real, socket.socket)
    assert time.time() > 1.7e9
    assert not guard.inside()


async def _fails(world):
    return 1 / 0


async def _passes(world):
    return time.time()


async def _forbidden(world):
    return os.urandom(1)


def test_other_threads_are_left_alone():
    """As ipykernel's threads, which read time and use sockets while a cell runs a world."""
    stop = threading.Event()
    go = threading.Event()
    seen: list[object] = []
    errors: list[BaseException] = []

    def other():
        try:
            go.wait(30)
            while not stop.is_set():
                now = time.time()
                assert now > EPOCH_S + 1000 or now < EPOCH_S - 1000, "virtual time in a real thread"
                time.sleep(0)
                os.urandom(4)
                random.random()
                uuid.uuid4()
                one, two = socket.socketpair()
                one.send(b"x")
                assert two.recv(1) == b"x"
                one.close()
                two.close()
                with socket.socket() as sock:
                    assert isinstance(sock, socket.socket)
                    sock.bind(("127.0.0.1", 0))
                child = threading.Thread(target=seen.append, args=(guard.inside(),))
                child.start()
                child.join()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()

    async def main(world):
        go.set()
        while len(seen) < 20 and not errors:  # noqa: ASYNC110 (the world must step while the other thread works)
            await asyncio.sleep(0)
        return True

    try:
        assert run(main)
    finally:
        stop.set()
        go.set()
        thread.join()
    assert errors == []
    assert seen[:20] == [False] * 20


def test_worlds_in_two_threads_do_not_disturb_each_other():
    results: dict[int, str] = {}

    async def main(world):
        for _ in range(3000):
            await asyncio.sleep(world.rng("x").random())
            assert time.monotonic() == world.now
        return world.trace.sha256

    def work(key):
        results[key] = run(main, seed=3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == run(main, seed=3)
    assert time.time is not guard._PATCHES[0][2]


def test_suspended_gives_a_harness_the_real_world():
    async def main(world):
        with guard.suspended():
            real = time.time()
            os.urandom(1)
        return real, time.time()

    real, virtual = run(main)
    assert abs(real - virtual) > 1000


def test_another_thread_cannot_call_in():
    async def main(world):
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(lambda: None)
        outcome: list[BaseException] = []

        def call():
            try:
                loop.call_soon_threadsafe(print)
            except RuntimeError as error:
                outcome.append(error)

        with guard.suspended():
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        return str(outcome[0])

    assert "another thread" in run(main)
