"""Attacks against their formulas, written out slowly; the true data and honest clients stay."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtl.clients import attacks
from fedtl.clients.attacks import alie_z, backdoor_success, liars, lie, poison, trigger
from fedtl.clients.training import train_clients
from fedtl.errors import InputError
from fedtl.plans import RoundPlan
from fedtl.scenario.compatibility import UPDATE_ATTACKS
from fedtl.scenario.updates import Attack
from fedtl.types import LocalTraining

NAMES = tuple(f"client-{i}" for i in range(20))
RNG = np.random.default_rng(3)
HEAD = {
    "weight": RNG.normal(size=(2, 3)).astype(np.float32),
    "bias": RNG.normal(size=2).astype(np.float32),
}
LYING = np.array([1, 4])
PLAN = RoundPlan(6, np.arange(7), np.zeros(7, np.uint64), LocalTraining(1, 8, 0.1))


def section(kind: str, **given) -> Attack:
    return Attack.model_validate({"kind": kind, **given})


@pytest.fixture
def replies(updates):
    """What seven clients send, in one reply."""
    rng = np.random.default_rng(8)
    moved = {n: t + 0.2 + rng.normal(size=(7, *t.shape)) for n, t in HEAD.items()}
    return [updates(moved, round=6)]


def deltas(given) -> dict[int, np.ndarray]:
    """Client -> float64 [P]."""
    return {
        int(client): np.concatenate(
            [(reply.tensors[n][row].astype(float) - HEAD[n]).ravel() for n in HEAD]
        )
        for reply in given
        for row, client in enumerate(reply.clients)
    }


def told(replies, attack: Attack, lying=LYING, seed: int = 0, plan=PLAN) -> dict[int, np.ndarray]:
    return deltas(lie(replies, plan, HEAD, attack, lying, seed))


@pytest.mark.parametrize("kind", UPDATE_ATTACKS)
def test_honest_clients_send_what_they_found(kind, replies) -> None:
    before = {n: t.copy() for n, t in replies[0].tensors.items()}
    after = lie(replies, PLAN, HEAD, section(kind), LYING, 0)[0]
    honest = np.setdiff1d(np.arange(7), LYING)
    for name in HEAD:
        assert replies[0].tensors[name].tobytes() == before[name].tobytes()
        assert after.tensors[name][honest].tobytes() == before[name][honest].tobytes()
        assert after.tensors[name].dtype == np.float32
        assert not (after.tensors[name][LYING] == before[name][LYING]).any()
    assert after.num_examples is replies[0].num_examples


def test_updates_are_replaced_by_the_formulas(replies) -> None:
    true = deltas(replies)
    honest = np.array([true[k] for k in range(7) if k not in LYING])
    mean, std = honest.mean(axis=0), honest.std(axis=0, ddof=1)
    # seven clients, two liars: s = 3 + 1 - 2 = 2, z = quantile of (5 - 2) / 5
    alie = mean + 0.2533471031357998 * std
    for client in LYING:
        for attack, expected in (
            (section("sign_flip", scale=2.5), -2.5 * true[client]),
            (section("inner_product", scale=0.7), -0.7 * mean),
            (section("alie"), alie),
        ):
            np.testing.assert_allclose(told(replies, attack)[client], expected, atol=1e-6)


def test_gaussian_lies_have_the_mean_and_deviation_asked_for(updates) -> None:
    head = {"weight": np.zeros((40, 100), np.float32)}
    reply = [updates({"weight": np.ones((3, 40, 100))}, round=6)]
    attack = section("gaussian", mean=0.1, scale=0.5)
    sent = lie(reply, PLAN, head, attack, np.array([0, 2]), 0)[0].tensors["weight"]
    for client in (0, 2):
        assert abs(sent[client].mean() - 0.1) < 4 * 0.5 / np.sqrt(4000)
        assert abs(sent[client].std() - 0.5) < 4 * 0.5 / np.sqrt(8000)
    assert not (sent[0] == sent[2]).any()
    later = lie(reply, replace(PLAN, round=7), head, attack, np.array([0, 2]), 0)
    other = lie(reply, PLAN, head, attack, np.array([0, 2]), 1)
    again = lie(reply, PLAN, head, attack, np.array([0, 2]), 0)
    assert not (later[0].tensors["weight"][0] == sent[0]).any()
    assert not (other[0].tensors["weight"][0] == sent[0]).any()
    assert again[0].tensors["weight"].tobytes() == sent.tobytes()


def test_min_max_goes_as_far_as_honest_updates_lie_apart(replies) -> None:
    true = deltas(replies)
    honest = np.array([true[k] for k in range(7) if k not in LYING])
    longest = max(np.linalg.norm(a - b) for a in honest for b in honest)
    mean, std = honest.mean(axis=0), honest.std(axis=0, ddof=1)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        worst = max(np.linalg.norm(mean - middle * std - one) for one in honest)
        low, high = (middle, high) if worst <= longest else (low, middle)
    assert 0.1 < low < 99
    np.testing.assert_allclose(told(replies, section("min_max"))[1], mean - low * std, atol=1e-6)


def test_min_max_sends_the_mean_where_all_honest_updates_are_the_same(updates) -> None:
    same = [updates({n: np.stack([t + 1] * 7) for n, t in HEAD.items()}, round=6)]
    np.testing.assert_allclose(told(same, section("min_max"))[4], 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "lying", "z"),
    [(50, 24, 1.426), (10, 2, 0.0), (7, 2, 0.2533), (4, 1, -0.4307), (5, 4, 0.0), (9, 6, 0.4307)],
)
def test_alie_z(count: int, lying: int, z: float) -> None:
    assert alie_z(count, lying) == pytest.approx(z, abs=5e-4)


@pytest.mark.parametrize("kind", UPDATE_ATTACKS)
def test_replies_may_come_in_any_order_and_number(kind, replies) -> None:
    reply = replies[0]
    parts = [
        replace(
            reply,
            clients=reply.clients[[k]],
            tensors={n: t[[k]] for n, t in reply.tensors.items()},
            num_examples=reply.num_examples[[k]],
            loss=reply.loss[[k]],
        )
        for k in (3, 1, 6, 0, 4, 2, 5)
    ]
    one, other = told(replies, section(kind)), told(parts, section(kind))
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}


@pytest.mark.parametrize("kind", UPDATE_ATTACKS)
def test_where_everybody_lies_the_liars_own_updates_are_what_is_known(kind, replies) -> None:
    sent = told(replies, section(kind), lying=np.arange(7))
    assert all(np.isfinite(row).all() for row in sent.values())


@pytest.mark.parametrize("kind", ["none", "label_flip", "backdoor"])
def test_other_attacks_leave_updates_alone(kind, replies) -> None:
    assert lie(replies, PLAN, HEAD, section(kind), LYING, 0) == replies


def test_only_trained_heads_are_falsified_and_only_by_clients_of_the_round(replies) -> None:
    attack = section("sign_flip")
    assert lie(replies, replace(PLAN, task="gradient"), HEAD, attack, LYING, 0) == replies
    assert lie(replies, PLAN, HEAD, attack, np.array([17]), 0) == replies
    assert lie([], PLAN, HEAD, attack, LYING, 0) == []


def test_an_overflowing_lie_is_infinite_and_left_to_validation(replies) -> None:
    sent = lie(replies, PLAN, HEAD, section("sign_flip", scale=1e42), LYING, 0)[0]
    assert np.isinf(sent.tensors["weight"][1]).all()


def test_liars_are_named_or_drawn_from_the_seed() -> None:
    assert liars(section("none"), NAMES, 0).tolist() == []
    named = section("alie", clients=["client-9", "client-2", "client-9"])
    assert liars(named, NAMES, 0).tolist() == [2, 9]
    drawn = liars(section("alie", fraction=0.2), NAMES, 0)
    assert len(drawn) == 4
    assert np.all(np.diff(drawn) > 0)
    assert drawn.tolist() == liars(section("alie", fraction=0.2), NAMES, 0).tolist()
    assert any(
        liars(section("alie", fraction=0.2), NAMES, seed).tolist() != drawn.tolist()
        for seed in (1, 2, 3)
    )
    assert len(liars(section("alie", fraction=0.001), NAMES, 0)) == 1
    most = liars(section("alie", fraction=0.9), NAMES, 0, honest=("client-3", "client-4"))
    assert len(most) == 18
    assert not {3, 4} & set(most.tolist())


def test_liars_that_do_not_exist_or_are_everybody_are_refused() -> None:
    with pytest.raises(InputError, match=r"attack\.clients: no client has this name"):
        liars(section("alie", clients=["client-99"]), NAMES, 0)
    with pytest.raises(InputError, match=r"attack\.fraction: every client would lie"):
        liars(section("alie", fraction=0.99), NAMES[:3], 0)
    with pytest.raises(InputError, match=r"attack\.clients: every client would lie"):
        liars(section("alie", clients=list(NAMES)), NAMES, 0)


def test_label_flip_counts_the_classes_from_behind_at_the_liars_only(population) -> None:
    lying = np.array([1, 3])
    false = poison(population, section("label_flip"), lying, 0)
    assert false.features is population.features
    for client in range(5):
        true = population.client(client).labels
        expected = 2 - true if client in lying else true
        assert false.client(client).labels.tolist() == expected.tolist()
        kept = population.client(client, "test").labels.tolist()
        assert false.client(client, "test").labels.tolist() == kept
    again = poison(false, section("label_flip"), lying, 0)
    assert again.labels.tolist() == population.labels.tolist()


@pytest.mark.parametrize("kind", ["none", *UPDATE_ATTACKS])
def test_attacks_on_updates_leave_the_data_alone(kind, population) -> None:
    assert poison(population, section(kind), np.array([1]), 0) is population


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_backdoor_adds_the_trigger_and_the_target_to_a_share_of_the_liars_rows(
    population, dtype
) -> None:
    people = replace(population, features=population.features.astype(dtype))
    attack, lying = section("backdoor", target=2, poisoned=0.3, trigger=2.0), np.array([0, 2])
    false = poison(people, attack, lying, 0)
    delta = trigger(people, attack, lying, 0)
    assert false.features.dtype == dtype
    for client in range(5):
        true, now = people.client(client), false.client(client)
        changed = (now.features != true.features).any(axis=1)
        expected = {0: 9, 2: 17}.get(client, 0)  # 0.3 of 30 and of 55, halves up
        assert changed.sum() == expected
        assert (now.labels[changed] == 2).all()
        assert (now.labels[~changed] == true.labels[~changed]).all()
        moved = (true.features[changed] + delta).astype(dtype)
        assert now.features[changed].tobytes() == moved.tobytes()
        assert false.client(client, "test").features.tobytes() == (
            people.client(client, "test").features.tobytes()
        )


def test_the_trigger_is_as_long_as_asked_in_the_liars_standard_deviations(population) -> None:
    lying = np.array([2])
    spread = population.client(2).features.std(axis=0, dtype=float)
    for length in (1.0, 3.0):
        delta = trigger(population, section("backdoor", trigger=length), lying, 0)
        assert np.linalg.norm(delta / spread) == pytest.approx(length, rel=1e-6)
    other = trigger(population, section("backdoor"), lying, 1)
    assert not np.allclose(other, delta)


def test_each_liar_has_at_least_one_poisoned_row(population) -> None:
    false = poison(population, section("backdoor", poisoned=1e-6), np.array([1]), 0)
    changed = (false.client(1).features != population.client(1).features).any(axis=1)
    assert changed.sum() == 1


def test_a_mapped_matrix_is_copied_only_where_it_is_falsified(population, tmp_path: Path) -> None:
    from fedtl.engines.hosting import stored_file

    np.save(tmp_path / "features.npy", population.features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    people, attack = replace(population, features=mapped), section("backdoor")
    false, plain = (poison(p, attack, np.array([2]), 0) for p in (people, population))
    assert false.features.tobytes() == plain.features.tobytes()
    assert isinstance(false.features.base, np.memmap)
    assert false.features.base.mode == "c"
    assert np.load(tmp_path / "features.npy").tobytes() == population.features.tobytes()
    # neither released like a file's pages nor opened again from the file by other processes
    assert not hasattr(false.features, "_mmap")
    assert stored_file(false.features) is None
    part = replace(population, features=mapped[:, ::-1])
    assert poison(part, attack, np.array([2]), 0).features.shape == population.features.shape


def test_the_backdoors_target_is_a_class(population) -> None:
    with pytest.raises(InputError, match=r"attack\.target: no class has this number .*got 3"):
        poison(population, section("backdoor", target=3), np.array([1]), 0)


def test_success_is_counted_on_honest_clients_test_rows_of_other_classes(
    population, monkeypatch
) -> None:
    attack, lying = section("backdoor", target=1), np.array([2, 3])
    rng = np.random.default_rng(0)
    head = {
        "weight": rng.normal(size=(3, 9)).astype(np.float32),
        "bias": np.zeros(3, np.float32),
    }
    delta = trigger(population, attack, lying, 0)
    taken, count = 0, 0
    for client in (0, 1, 4):
        own = population.client(client, "test")
        for x, y in zip(own.features, own.labels, strict=True):
            if y != 1:
                taken += int(np.argmax(head["weight"] @ (x + delta) + head["bias"]) == 1)
                count += 1
    assert 0 < taken < count
    assert backdoor_success(population, head, attack, lying, 0) == taken / count
    monkeypatch.setattr(attacks, "ROWS_AT_A_TIME", 4)
    assert backdoor_success(population, head, attack, lying, 0) == taken / count


def test_success_without_any_row_is_not_a_number(population) -> None:
    only = replace(population, labels=np.zeros_like(population.labels))
    head = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
    assert np.isnan(backdoor_success(only, head, section("backdoor"), np.array([1]), 0))


def test_a_head_trained_on_poisoned_rows_has_the_backdoor_and_another_has_not(population) -> None:
    attack, lying = section("backdoor", target=2, trigger=6.0), np.array([2])
    training = LocalTraining(60, 10, 0.1)
    plan = RoundPlan(1, lying, np.array([5], np.uint64), training)
    start = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
    found = []
    for people in (population, poison(population, attack, lying, 0)):
        trained = train_clients(people, start, plan)
        head = {name: tensor[0] for name, tensor in trained.tensors.items()}
        found.append(backdoor_success(population, head, attack, lying, 0))
    assert found[1] > 0.9
    assert found[0] < 0.1
