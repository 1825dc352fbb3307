"""Malformed replies and dying workers under Flower's simulation: real messages, real processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from fedtl import seeding
from fedtl.engines import LocalEngine
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.plans import RoundPlan
from fedtl.strategies.validation import accept_updates
from fedtl.types import LocalTraining

HEAD = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
EVERYBODY = np.arange(5)

# FAULTS 19 to 26: what is done in the round of that number to the reply of the node that hosts
# clients 0, 2 and 4; who is refused, and the reason that is given
LIES = {
    19: ("nan in client 2", [2], "weight has a value that is not finite"),
    20: ("broadcastable shape", [0, 2, 4], r"weight has shape \(1, 9\) instead of \(3, 9\)"),
    21: ("float64", [0, 2, 4], "bias is float64 instead of float32"),
    22: ("missing key", [0, 2, 4], r"tensors \['weight'\] instead of \['bias', 'weight'\]"),
    23: ("huge in client 2", [2], "times the cohort's median, allowed 10000"),
    24: ("10^12 examples", [0, 2, 4], r"trained on 1\d{12} examples, declared"),
    25: ("stale round", [0, 2, 4], "refused: it answers another round"),
    26: ("replay", [0, 2, 4], "refused: it answers another nonce"),
    27: ("other run", [0, 2, 4], "refused: it answers another run"),
    28: ("garbage", [0, 2, 4], "refused: a malformed message"),
    29: ("no content", [0, 2, 4], "refused: a malformed message: it holds nothing"),
}


def lying_app(place: str):
    """A ClientApp whose first node lies; everything it needs is inside, as it is sent by value."""

    def answer(message, context):
        from pathlib import Path

        import numpy as np
        from flwr.app import ConfigRecord, Message, RecordDict

        from fedtl.engines.flower_client import answer_simulated, read_message, write_record
        from fedtl.engines.wire import pack, unpack

        reply = answer_simulated(message, context)
        asked, _ = unpack(read_message(message)[0], 10**6)
        content, _ = read_message(reply)
        facts, tensors = unpack(content, 10**6)
        round, tensors = asked["round"], dict(tensors)
        if message.metadata.message_type != "train" or context.node_config["partition-id"] != 0:
            return reply
        kept = Path(place) / "yesterday"
        if round == 19:
            tensors["head.weight"] = tensors["head.weight"].copy()
            tensors["head.weight"][1, 2, 3] = np.nan
        elif round == 20:
            tensors["head.weight"] = tensors["head.weight"][:, :1]
        elif round == 21:
            tensors["head.bias"] = tensors["head.bias"].astype(np.float64)
        elif round == 22:
            del tensors["head.bias"]
        elif round == 23:
            tensors["head.weight"] = tensors["head.weight"].copy()
            tensors["head.weight"][1] *= np.float32(1e9)
        elif round == 24:
            tensors["examples"] = tensors["examples"] + 10**12
        elif round == 25:
            facts["round"] = 24
        elif round == 27:
            facts["run"] = "0" * 32
        changed = pack(facts, tensors)
        if round == 26 and kept.exists():
            changed = kept.read_bytes()
        elif round == 26:
            kept.write_bytes(changed)
        elif round == 28:
            changed = b"\x80\x04\x95 not ours"
        elif round == 29:
            return Message(RecordDict({"x": ConfigRecord({"y": 1})}), reply_to=message)
        return Message(write_record(changed), reply_to=message)

    from fedtl.engines.flower_client import make_app

    return make_app(answer)


@pytest.fixture(scope="module")
def engine(make_population, tmp_path_factory) -> Iterator[FlowerEngine]:
    from fedtl.engines.flower_simulation import flower_engine

    place = tmp_path_factory.mktemp("lies")
    with pytest.MonkeyPatch.context() as patch:
        # one worker dies in round 30, after it has trained and before it answers
        patch.setenv("FEDTL_FAIL", f"client_after_train:kill:30:once={place / 'died'}")
        made = flower_engine(make_population(), num_nodes=2, num_cpus=2, app=lying_app(str(place)))
        try:
            made.start(HEAD)
            yield made
        finally:
            made.close()


def plan(round: int, epochs: int = 2) -> RoundPlan:
    keys = seeding.client_keys(1, "batches", round, EVERYBODY)
    return RoundPlan(round, EVERYBODY, keys, LocalTraining(epochs, 8, 0.1))


def accepted(engine, population, round: int, epochs: int = 2):
    step = plan(round, epochs)
    replies = engine.run_clients(step, HEAD)
    updates, _ = accept_updates(replies, step, HEAD, population.train.counts, 1e4)
    return updates, {failure.client: failure.reason for failure in updates.failures}


def bits(updates) -> dict[int, bytes]:
    weight = updates.tensors["weight"]
    return {client: weight[i].tobytes() for i, client in enumerate(updates.clients.tolist())}


@pytest.mark.parametrize("round", list(LIES), ids=[lie[0] for lie in LIES.values()])
def test_a_malformed_reply_is_refused_by_client_and_the_others_count(
    engine, population, round: int
) -> None:
    lie, refused, why = LIES[round]
    if lie == "replay":
        assert accepted(engine, population, round)[1] == {}  # honest, and kept
    updates, missing = accepted(engine, population, round)
    assert sorted(missing) == refused
    assert all(re.search(why, missing[client]) for client in refused), missing
    (local,) = LocalEngine(population, 1).run_clients(plan(round), HEAD)
    assert bits(updates) == {c: b for c, b in bits(local).items() if c not in refused}


def test_a_killed_worker_is_replaced_and_its_block_trained_again(engine, population) -> None:
    started = time.monotonic()
    updates, missing = accepted(engine, population, 30)
    assert time.monotonic() - started < 60
    assert missing == {}
    (local,) = LocalEngine(population, 1).run_clients(plan(30), HEAD)
    assert bits(updates) == bits(local)
    metrics = engine.evaluate(HEAD, EVERYBODY)
    wanted = LocalEngine(population, 1).evaluate(HEAD, EVERYBODY)
    assert metrics.loss_sum.tobytes() == wanted.loss_sum.tobytes()


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_rays_own_death_in_a_round_is_survived(engine, population, part: str) -> None:
    import ray

    epochs = 100_000  # a second and more
    (process,) = ray._private.worker.global_worker.node.all_processes[part]
    killer = threading.Timer(0.5, os.kill, (process.process.pid, signal.SIGKILL))
    killer.start()
    started = time.monotonic()
    updates, missing = accepted(engine, population, 31, epochs)
    killer.join()
    assert process.process.poll() is not None
    assert time.monotonic() - started < 90
    assert missing == {}
    (local,) = LocalEngine(population, 1).run_clients(plan(31, epochs), HEAD)
    assert bits(updates) == bits(local)


def test_flowers_log_does_not_litter_the_terminal(engine, population, capfd) -> None:
    accepted(engine, population, 29)
    logging.getLogger("flwr").error("something of Flower's own")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
