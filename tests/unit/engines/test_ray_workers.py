from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedtl import machine, seeding
from fedtl.engines import LocalEngine, hosting
from fedtl.engines.ray_actor import in_memory, refuse_others
from fedtl.engines.ray_workers import RayEngine, room
from fedtl.errors import EnvironmentFault, InputError
from fedtl.plans import RoundPlan
from fedtl.types import ClientMetrics, LocalTraining, Population

HEAD = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
CLIENTS = np.arange(5)
PLAN = RoundPlan(
    2, CLIENTS, seeding.client_keys(1, "batches", 2, CLIENTS), LocalTraining(2, 8, 0.1)
)


@pytest.fixture(scope="module")
def engine(make_population) -> Iterator[RayEngine]:
    made = RayEngine(make_population(), num_cpus=2, block_size=1)
    try:
        made.start(HEAD)
        yield made
    finally:
        made.close()


@pytest.fixture
def expected(population: Population) -> dict[int, bytes]:
    return answers(LocalEngine(population, 1).run_clients(PLAN, HEAD))


def answers(replies) -> dict[int, bytes]:
    return {
        client: reply.tensors["weight"][i].tobytes()
        for reply in replies
        for i, client in enumerate(reply.clients.tolist())
    }


def process_ids(engine: RayEngine) -> list[int]:
    """Of all workers, once they are loaded."""
    import ray

    engine._share_out([], lambda actor, block: None, 60, everybody=True)
    return [ray.get(actor.__ray_call__.remote(lambda self: os.getpid())) for actor in engine._idle]


def test_on_a_cluster_of_two_machines_of_which_one_dies(population, expected) -> None:
    from ray.cluster_utils import Cluster

    here = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
    handler = signal.getsignal(signal.SIGTERM)
    with hosting.scratch_folder("machines") as place:
        head = {**here, "include_dashboard": False, "temp_dir": str(place)}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        second = cluster.add_node(**here)
        signal.signal(signal.SIGTERM, handler)  # the cluster has set its own
        engine = RayEngine(population, address=cluster.address, block_size=1)
        try:
            engine.start(HEAD)
            assert engine._size == 2
            assert answers(engine.run_clients(PLAN, HEAD)) == expected
            cluster.remove_node(second, allow_graceful=False)
            assert answers(engine.run_clients(PLAN, HEAD)) == expected
            assert engine.evaluate(HEAD, CLIENTS).clients.tolist() == CLIENTS.tolist()
            engine.close()
            again = RayEngine(population, address=cluster.address)  # it was left running
            again.start(HEAD)
            assert again._size == 1
            assert answers(again.run_clients(PLAN, HEAD)) == expected
            again.close()
        finally:
            engine.close()
            cluster.shutdown()


def test_blocks_go_to_all_workers_and_cover_every_client_once(engine, expected) -> None:
    replies = engine.run_clients(PLAN, HEAD)
    assert [len(reply.clients) for reply in replies] == [1] * 5
    assert answers(replies) == expected


def test_a_killed_worker_is_replaced_its_block_done_again_and_nothing_printed(
    engine, expected, capfd
) -> None:
    before = process_ids(engine)
    os.kill(before[0], signal.SIGKILL)
    assert answers(engine.run_clients(PLAN, HEAD)) == expected
    after = process_ids(engine)
    assert len(set(after)) == 2
    assert set(before) & set(after) == {before[1]}
    time.sleep(1.5)  # Ray looks once a second for something to print
    assert capfd.readouterr() == ("", "")


def test_a_stopped_worker_costs_a_round_its_block_and_no_more(engine, expected) -> None:
    stopped, other = process_ids(engine)
    os.kill(stopped, signal.SIGSTOP)
    engine.deadline_seconds = 1.0
    try:
        began = time.monotonic()
        *replies, last = engine.run_clients(PLAN, HEAD)
        assert time.monotonic() - began < 5
        (failure,) = last.failures
        assert failure.reason == "no answer within 1 s"
        assert len(last.clients) == 0
        assert last.tensors["weight"].shape == (0, 3, 9)
        done = {client: w for client, w in expected.items() if client != failure.client}
        assert answers(replies) == done
    finally:
        engine.deadline_seconds = None
    assert answers(engine.run_clients(PLAN, HEAD)) == expected
    assert stopped not in process_ids(engine)
    assert other in process_ids(engine)


def test_nobody_answers_before_the_deadline(engine) -> None:
    for stopped in process_ids(engine):
        os.kill(stopped, signal.SIGSTOP)
    engine.deadline_seconds = 0.5
    try:
        (reply,) = engine.run_clients(PLAN, HEAD)
        assert sorted(failure.client for failure in reply.failures) == CLIENTS.tolist()
        for stopped in process_ids(engine):
            os.kill(stopped, signal.SIGSTOP)
        metrics = engine.evaluate(HEAD, CLIENTS)
        assert (len(metrics.clients), metrics.count.shape) == (0, (0, 3))
    finally:
        engine.deadline_seconds = None
    assert len(engine.evaluate(HEAD, CLIENTS).clients) == 5


def test_what_is_wrong_in_a_worker_is_told_as_what_it_is(engine, expected) -> None:
    narrow = {"weight": np.zeros((2, 9), np.float32), "bias": np.zeros(2, np.float32)}
    with pytest.raises(InputError, match=r"client \d \(client-\d\): labels outside") as caught:
        engine.run_clients(PLAN, narrow)
    assert caught.value.allowed == "0 to 1"
    assert answers(engine.run_clients(PLAN, HEAD)) == expected
    assert len(process_ids(engine)) == 2


def test_when_all_workers_die_the_run_stops_resumably(engine, expected) -> None:
    for worker in process_ids(engine):
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match=r"2 of Ray's workers died.*fedtl resume") as caught:
        engine.run_clients(PLAN, HEAD)
    assert caught.value.exit_code == 3


def test_close_twice_and_before_the_start(population) -> None:
    made = RayEngine(population)
    made.close()
    made.close()


def test_large_arrays_reach_a_clusters_workers_unpickled(population, tmp_path) -> None:
    import pickle

    path = tmp_path / "features.npy"
    np.save(path, population.features)
    mapped = replace(population, features=np.load(path, mmap_mode="r")[:, ::2])
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(in_memory(mapped), protocol=5, buffer_callback=buffers.append)
    assert sum(buffer.raw().nbytes for buffer in buffers) >= mapped.features.nbytes


@pytest.mark.parametrize(
    ("free", "asked", "expected"),
    [
        ((8, 0), (None, 0.0, "cpu"), (8, 0.0)),
        ((8, 0), (3, 0.0, "cpu"), (3, 0.0)),
        ((2, 0), (8, 0.0, "cpu"), (2, 0.0)),
        ((8, 2), (None, 0.0, "cuda"), (8, 0.25)),
        ((3, 2), (None, 0.0, "cuda"), (3, 0.5)),  # a share is of one GPU: not two thirds
        ((1, 2), (None, 0.0, "cuda"), (1, 1.0)),
        ((8, 2), (None, 0.4, "cuda"), (4, 0.4)),  # two fit on a GPU, not two and a half
        ((8, 4), (None, 2.0, "cuda"), (2, 2.0)),
        ((8, 1), (None, 1 / 3, "cuda"), (3, 1 / 3)),
    ],
)
def test_how_many_workers_have_room(free, asked, expected) -> None:
    cluster = SimpleNamespace(num_cpus=free[0], num_gpus=float(free[1]))
    assert room(cluster, *asked) == expected


@pytest.mark.parametrize(
    ("free", "asked", "told"),
    [
        ((0, 0), (2, 0.0, "cpu"), "0 free CPUs.*allowed: 1 CPU"),
        ((4, 0), (2, 0.5, "cpu"), "0 free GPUs.*0.5 GPUs"),
        ((4, 1), (2, 2.0, "cuda"), "1 free GPUs.*2 GPUs"),
        ((4, 0), (2, 0.0, "cuda"), "0 free GPUs.*a GPU"),
    ],
)
def test_no_room_is_told(free, asked, told: str) -> None:
    cluster = SimpleNamespace(num_cpus=free[0], num_gpus=float(free[1]))
    with pytest.raises(EnvironmentFault, match=told):
        room(cluster, *asked)


def test_blocks_are_even_and_their_replies_bounded(population) -> None:
    engine = RayEngine(population)
    engine._size = 2

    def sizes(clients: int, rows: int, num_bytes: int = 80) -> list[int]:
        return [len(block) for block in engine._blocks(np.arange(clients), rows, num_bytes)]

    assert sizes(200, 10**7) == [25] * 8
    assert sizes(200, 100_000) == [50] * 4
    assert sizes(200, 1000) == [100] * 2
    assert max(sizes(10_000, 50_000)) == 256
    assert set(sizes(200, 1000, 40 * 2**20)) == {1}
    assert sizes(0, 0) == []
    engine.block_size = 7
    assert sizes(16, 10**7) == [7, 7, 2]


def test_other_versions_on_a_machine_of_the_cluster_are_refused() -> None:
    refuse_others(machine.versions())
    with pytest.raises(EnvironmentFault, match=r"numba 0\.1 \(here .*every machine"):
        refuse_others({**machine.versions(), "numba": "0.1"})


def test_metrics_come_back_sorted(engine_of_blocks: RayEngine) -> None:
    metrics = engine_of_blocks.evaluate(HEAD, CLIENTS)
    assert isinstance(metrics, ClientMetrics)
    assert metrics.clients.tolist() == CLIENTS.tolist()


@pytest.fixture
def engine_of_blocks(population, monkeypatch) -> RayEngine:
    """One whose blocks are done in the wrong order, by nobody but itself."""
    engine, here = RayEngine(population, block_size=2), LocalEngine(population, 1)

    def backwards(blocks, submit, seconds):
        return [here.evaluate(HEAD, block) for block in reversed(blocks)], []

    monkeypatch.setattr(engine, "_sent", dict)
    monkeypatch.setattr(engine, "_share_out", backwards)
    return engine
