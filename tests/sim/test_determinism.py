"""The same seed gives the same trace, byte for byte, in any process, with any hash seed."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gostore.sim.world import World, run

MODEL = Path(__file__).with_name("model.py")
_spec = importlib.util.spec_from_file_location("sim_model", MODEL)
model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(model)


def in_process(what, seed, *, hash_seed, thresholds="700,10,10"):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, str(MODEL), what, str(seed), thresholds]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    digest, entries = done.stdout.split()
    return digest, int(entries)


def test_in_other_processes_with_other_hash_seeds_and_thresholds():
    here = model.scenario(7)
    assert here[1] > 3000
    assert in_process("world", 7, hash_seed="0") == here
    assert in_process("world", 7, hash_seed="4711", thresholds="50,2,2") == here
    assert in_process("world", 7, hash_seed="random", thresholds="0,0,0") == here


def test_the_whole_cluster_in_other_processes_and_as_the_second_world():
    here = model.cluster_scenario(7)
    assert here[1] > 3000
    thresholds = gc.get_threshold()
    gc.set_threshold(11, 3, 3)
    try:
        assert model.cluster_scenario(7) == here
    finally:
        gc.set_threshold(*thresholds)
    assert in_process("cluster", 7, hash_seed="1", thresholds="99,5,5") == here
    assert in_process("cluster", 7, hash_seed="2") == here
    assert model.cluster_scenario(8) != here


def test_as_the_second_world_and_after_the_process_did_other_things():
    first = model.scenario(11)
    junk = [{str(i): [object()] for i in range(1000)} for _ in range(10)]
    asyncio.run(asyncio.sleep(0))
    gc.collect()
    assert model.scenario(11) == first
    del junk
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        assert model.scenario(11) == first
    finally:
        gc.set_threshold(*thresholds)


def test_another_seed_gives_another_trace():
    assert len({model.scenario(seed)[0] for seed in range(4)}) == 4


def test_stepping_in_pieces_is_the_same_run():
    def world():
        w = World(3)
        model.swim(w, 5, 0.1)
        return w

    with world() as whole, world() as pieces, world() as steps:
        whole.run_for(2)
        for _ in range(20):
            pieces.run_for(0.1)
        pieces.run_for(2 - pieces.now)
        while whole.callbacks - steps.callbacks > 17:
            assert steps.step(17) == 17
        steps.run_for(2 - steps.now)
        assert whole.callbacks == pieces.callbacks == steps.callbacks
        assert whole.trace.sha256 == pieces.trace.sha256 == steps.trace.sha256


def test_the_outer_programs_collector_settings_are_restored():
    async def main(world):
        return gc.isenabled()

    assert gc.isenabled()
    assert run(main) is False
    assert gc.isenabled()
    gc.disable()
    try:
        run(main)
        assert not gc.isenabled()
    finally:
        gc.enable()


GOLDEN = """
n0 call TaskStepMethWrapper n1/main
n1 call TaskStepMethWrapper client/run
C h2->h1 0 bytes e3b0c44298fc
n0 call SimServer._accept
n0 call SimStream._lose
F h1->h2 0 bytes e3b0c44298fc
n1 call _set_outcome
n1 call SimTask.task_wakeup client/run
n1 call SimStream._deliver
n1 call SimTask.task_wakeup client/run
n1 call SimStream._lose
n1 call World.run.<locals>.<lambda>
# crash n1
"""


def test_a_golden_trace():
    """What the lines look like, and that they do not change by accident."""
    lines: list[str] = []

    async def serve(node):
        server = await asyncio.start_server(lambda r, w: w.close(), node.address, 80)
        await server.serve_forever()

    async def client():
        reader, writer = await asyncio.open_connection("n1", 80)
        assert await reader.read() == b""
        writer.close()

    with World(1, trace_sink=lines.append) as world:
        world.add_node("n1", serve)
        world.run(client())
        world.crash("n1")
    # Times depend on the drawn latencies, the rest does not.
    assert [line.split(" ", 1)[1] for line in lines] == GOLDEN.strip().splitlines()


@pytest.mark.parametrize("purpose", ["a", "b"])
def test_random_streams_depend_on_seed_and_purpose_only(purpose):
    def draw(seed, *others):
        world = World(seed)
        for other in others:
            world.rng(other).random()
        return world.rng(purpose).random()

    assert draw(1) == draw(1, "x", "y")
    assert draw(1) != draw(2)
    assert World(1).rng("a").random() != World(1).rng("b").random()
