from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedtl.clients.batched import train_batched
from fedtl.clients.blocks import block_rows, run_blocks
from fedtl.clients.training import train_clients
from fedtl.errors import EnvironmentFault, InputError
from fedtl.types import ClientUpdates, LocalTraining, Population

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("oracle.py"))))
PLAIN = LocalTraining(2, 5, 0.1)
FULL = LocalTraining(2, 5, 0.1, momentum=0.9, weight_decay=0.01, proximal=0.1)


def same(a: ClientUpdates, b: ClientUpdates) -> bool:
    return all(
        np.array_equal(a.tensors[name], b.tensors[name], equal_nan=True) for name in a.tensors
    ) and np.array_equal(a.loss, b.loss, equal_nan=True)


HEADS = {
    "linear": oracle.linear_head(19, 4),
    "mlp": oracle.mlp_head(19, [7], 4),
    "deep": oracle.mlp_head(19, [17, 5], 4),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("training", [PLAIN, FULL])
def test_agrees_with_the_autograd_loop(kind: str, training: LocalTraining) -> None:
    people = oracle.federation([11, 0, 3, 24, 5, 1, 9, 2, 30, 10], 19, 4)
    plan = oracle.plan_for(people, training)
    updates = train_clients(people, HEADS[kind], plan)
    tensors, loss = oracle.train_all(people, HEADS[kind], plan)
    for name, expected in tensors.items():
        np.testing.assert_allclose(updates.tensors[name], expected, rtol=0, atol=3e-6)
    np.testing.assert_allclose(updates.loss, loss, rtol=1e-5)
    assert updates.num_examples.tolist() == [11, 0, 3, 24, 5, 1, 9, 2, 30, 10]
    assert updates.round == 1


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_client_without_rows_returns_its_start(kind: str) -> None:
    people = oracle.federation([0, 4], 19, 4)
    updates = train_clients(people, HEADS[kind], oracle.plan_for(people, FULL))
    assert np.isnan(updates.loss[0])
    assert np.isfinite(updates.loss[1])
    for name, tensor in HEADS[kind].items():
        assert np.array_equal(updates.tensors[name][0], tensor)
        assert not np.array_equal(updates.tensors[name][1], tensor)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_own_starts_and_the_proximal_pull_towards_them(kind: str) -> None:
    people = oracle.federation([6, 9, 4], 19, 4)
    plan = oracle.plan_for(people, FULL)
    own = {
        name: np.stack([tensor * factor for factor in (1, -0.5, 2)]).astype(np.float32)
        for name, tensor in HEADS[kind].items()
    }
    updates = train_clients(people, HEADS[kind], plan, initial=own, threads=2, block_size=1)
    tensors, _ = oracle.train_all(people, HEADS[kind], plan, initial=own)
    for name, expected in tensors.items():
        np.testing.assert_allclose(updates.tensors[name], expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_one_epoch_of_one_batch_is_a_gradient_step(kind: str) -> None:
    people = oracle.federation([300], 19, 4)  # longer than any piece a batch is cut into
    updates = train_clients(
        people, HEADS[kind], oracle.plan_for(people, LocalTraining(1, 1000, 0.5))
    )
    data = people.client(0)
    head = {
        n: torch.tensor(t, dtype=torch.float64).requires_grad_() for n, t in HEADS[kind].items()
    }
    scores = oracle.scores(head, torch.from_numpy(data.features).double())
    torch.nn.functional.cross_entropy(scores, torch.from_numpy(data.labels).long()).backward()
    for name, tensor in head.items():
        expected = (tensor - 0.5 * tensor.grad).detach().numpy()
        np.testing.assert_allclose(updates.tensors[name][0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_zero_proximal_is_plain_sgd_to_the_bit(kind: str) -> None:
    people = oracle.federation([8, 13], 19, 4)
    momentum = dataclasses.replace(PLAIN, momentum=0.9)
    runs = [
        train_clients(people, HEADS[kind], oracle.plan_for(people, training))
        for training in (momentum, dataclasses.replace(momentum, proximal=0.0))
    ]
    pulled = dataclasses.replace(momentum, proximal=1.0)
    assert same(*runs)
    assert not same(runs[0], train_clients(people, HEADS[kind], oracle.plan_for(people, pulled)))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_survives_and_stays_with_its_client(kind: str, bad: float) -> None:
    people = oracle.federation([8, 13, 6], 19, 4)
    plan = oracle.plan_for(people, PLAIN)
    clean = train_clients(people, HEADS[kind], plan)
    features = people.features.copy()
    features[people.train.of(1)[2], 3] = bad
    spoiled = train_clients(dataclasses.replace(people, features=features), HEADS[kind], plan)
    assert not np.isfinite(spoiled.tensors["weight"][1]).all()
    assert not np.isfinite(spoiled.loss[1])
    for name, tensor in clean.tensors.items():
        assert np.array_equal(spoiled.tensors[name][[0, 2]], tensor[[0, 2]])


def test_huge_scores_stay_finite() -> None:
    people = oracle.federation([20], 19, 4)
    head = {name: tensor * 1e4 for name, tensor in HEADS["linear"].items()}
    updates = train_clients(people, head, oracle.plan_for(people, PLAIN))
    assert np.isfinite(updates.tensors["weight"]).all()
    _, loss = oracle.train_all(people, head, oracle.plan_for(people, PLAIN))
    np.testing.assert_allclose(updates.loss, loss, rtol=1e-5)


@pytest.mark.parametrize("width", [16, 19])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_half_width_features_are_their_float32_values(kind: str, width: int) -> None:
    people = oracle.federation([8, 13], width, 4, dtype=np.float16)
    # Subnormals, zeros of both signs and the largest half must widen exactly too.
    people.features[people.train.of(0)[0], :6] = [6e-8, -6e-8, 0.0, -0.0, 1e-5, 60000]
    head = oracle.linear_head(width, 4) if kind == "linear" else oracle.mlp_head(width, [7], 4)
    plan = oracle.plan_for(people, PLAIN)
    wide = dataclasses.replace(people, features=people.features.astype(np.float32))
    assert same(train_clients(people, head, plan), train_clients(wide, head, plan))


def test_every_half_is_widened_exactly() -> None:
    from fedtl.clients.kernel import _widen

    bits = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        expected = bits.view(np.float16).astype(np.float32)
    widened = np.array([_widen(half) for half in bits[::7]], dtype=np.float32)
    assert np.array_equal(widened, expected[::7], equal_nan=True)
    assert np.array_equal(np.signbit(widened), np.signbit(expected[::7]))


def test_memory_mapped_and_read_only_features(tmp_path: Path) -> None:
    people = oracle.federation([8, 13], 19, 4)
    np.save(tmp_path / "features.npy", people.features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    plan = oracle.plan_for(people, PLAIN)
    for head in (HEADS["linear"], HEADS["mlp"]):
        fixed = {name: tensor.copy() for name, tensor in head.items()}
        for tensor in fixed.values():
            tensor.flags.writeable = False
        again = train_clients(dataclasses.replace(people, features=mapped), fixed, plan)
        assert same(again, train_clients(people, head, plan))


def test_the_matrix_is_passed_on_without_a_copy() -> None:
    people = oracle.federation([8, 13], 19, 4)
    rows = block_rows(people.features, people.labels, [people.train.of(0)])
    assert np.shares_memory(rows.features, people.features)
    halves = people.features.astype(np.float16)
    assert np.shares_memory(block_rows(halves, people.labels, [rows.index]).halves, halves)


def test_lanes_do_not_know_each_other() -> None:
    """A client's bits in the torch path: whatever its lane, its companions and the threads."""
    people = oracle.federation([11, 0, 3, 24, 5, 1, 9, 2, 30, 10, 7], 19, 4)
    plan = oracle.plan_for(people, FULL)
    threads = torch.get_num_threads()
    for head in (HEADS["linear"], HEADS["mlp"], HEADS["deep"]):
        starts = {name: tensor[None] for name, tensor in head.items()}
        whole = train_batched(people, starts, plan, threads=2, device="cpu")
        for client in range(11):
            for companions in ([client], sorted({client, 3, 8})):
                small = dataclasses.replace(
                    plan, clients=np.array(companions), batch_keys=plan.batch_keys[companions]
                )
                alone = train_batched(people, starts, small, threads=1, device="cpu")
                for name in head:
                    assert np.array_equal(alone.tensors[name], whole.tensors[name][companions])
                assert np.array_equal(alone.loss, whole.loss[companions], equal_nan=True)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_agrees_with_the_loop() -> None:
    people = oracle.federation([11, 0, 3, 24], 19, 4)
    plan = oracle.plan_for(people, FULL)
    for head in HEADS.values():
        updates = train_clients(people, head, plan, device="cuda")
        tensors, _ = oracle.train_all(people, head, plan)
        for name, expected in tensors.items():
            np.testing.assert_allclose(updates.tensors[name], expected, rtol=0, atol=1e-5)


def test_a_missing_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    people = oracle.federation([2], 19, 4)
    with pytest.raises(EnvironmentFault, match="no GPU"):
        train_clients(people, HEADS["linear"], oracle.plan_for(people, PLAIN), device="cuda")


def broken(what: str) -> tuple[Population, dict[str, object], dict[str, object]]:
    people = oracle.federation([3, 4], 19, 4)
    plan = oracle.plan_for(people, PLAIN)
    arguments: dict[str, object] = {"head": HEADS["linear"], "plan": plan}
    options: dict[str, object] = {}
    if what == "label":
        people.labels[people.train.of(1)[0]] = 4
    elif what == "row":
        people.train.index[0] = 99
    elif what == "client":
        arguments["plan"] = dataclasses.replace(plan, clients=np.array([0, 2]))
    elif what == "keys":
        arguments["plan"] = dataclasses.replace(plan, batch_keys=plan.batch_keys[:1])
    elif what == "batch":
        training = dataclasses.replace(PLAIN, batch_size=0)
        arguments["plan"] = dataclasses.replace(plan, training=training)
    elif what == "width":
        arguments["head"] = oracle.linear_head(18, 4)
    elif what == "initial":
        options["initial"] = {name: tensor[None] for name, tensor in HEADS["linear"].items()}
    else:
        options["threads"] = 0
    return people, arguments, options


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("label", r"client 1 \(c1\).*0 to 3"),
        ("row", "rows that the features do not have"),
        ("client", "unknown client id"),
        ("keys", "one batch key per client"),
        ("batch", "batch_size must be at least 1"),
        ("width", "does not fit the features"),
        ("initial", "lack a fitting 'weight'"),
        ("threads", "threads must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(what: str, told: str) -> None:
    people, arguments, options = broken(what)
    with pytest.raises(InputError, match=told):
        train_clients(people, **arguments, **options)


def test_labels_are_checked_in_the_torch_path_too() -> None:
    people, _, _ = broken("label")
    with pytest.raises(InputError, match="client 1"):
        train_clients(people, HEADS["mlp"], oracle.plan_for(people, PLAIN))


def test_a_change_of_the_tiles_reaches_the_compiled_kernel() -> None:
    from fedtl.clients import kernel

    folder = Path(str(kernel.__file__)).parent
    text = "".join(
        (folder / name).read_text(encoding="utf-8") for name in ("batches.py", "tiles.py")
    )
    assert hashlib.blake2b(text.encode(), digest_size=4).hexdigest() == kernel.BUILT_ON


def test_blocks_cover_everything_once() -> None:
    for count in (0, 1, 7, 100):
        for threads in (1, 2, 3):
            for size in (None, 1, 3, 1000):
                seen: list[int] = []
                run_blocks(
                    lambda first, stop, seen=seen: seen.extend(range(first, stop)),
                    count,
                    threads=threads,
                    block_size=size,
                )
                assert sorted(seen) == list(range(count))


def test_importing_the_entries_loads_neither_numba_nor_torch() -> None:
    code = (
        "import sys, fedtl.clients.training, fedtl.clients.evaluation;"
        "sys.exit(bool({'numba', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
