"""The one loop, with the real kernel on a small federation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from fedtl.engines import LocalEngine
from fedtl.errors import InputError, Interrupted, PolicyStop
from fedtl.interrupts import Interrupts
from fedtl.planning import sample_cohort, scheduled_rate
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.scenario.schema import Scenario
from fedtl.strategies import make_strategy
from fedtl.types import Population


def federation(population: Population, engine=None, **changes) -> Federation:
    content = {"name": "x", "rounds": 4, "training": {"local_epochs": 2, "batch_size": 8}}
    scenario = Scenario.model_validate({**content, **changes})
    classes, width = len(population.classes), population.features.shape[1]
    head = {"weight": np.zeros((classes, width), np.float32), "bias": np.zeros(classes, np.float32)}
    engine = engine or LocalEngine(population, 1)
    strategy = make_strategy(scenario, population.names)
    return Federation(scenario, population.roster(), head, strategy, engine, {"scenario_hash": "a"})


def run(made: Federation, path: Path, interrupts: Interrupts | None = None, observe=None, **more):
    folder = RunFolder.reopen(path) if path.exists() else RunFolder.create(path, "")
    try:
        observe = observe or (lambda row, updates: None)
        state, progress = run_rounds(made, folder, observe, interrupts or Interrupts(), **more)
        folder.write_tables()
    finally:
        folder.release()
    return state, progress


def same_bits(a, b) -> bool:
    return all(a.head[name].tobytes() == b.head[name].tobytes() for name in a.head)


class Stop(Interrupts):
    """Asks for a stop after some commits, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def check(self, what: str = "", do: str | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted(what, do=do)


STRATEGIES = ["fedavg", "fedavgm", "fedadam"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("after", [1, 2, 3])
def test_stop_and_resume_ends_with_the_unbroken_head(
    population: Population, tmp_path: Path, strategy: str, after: int
) -> None:
    made = federation(population, strategy={"name": strategy}, clients={"fraction": 0.6})
    whole, progress = run(made, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"saved round {after} of 4"):
        run(made, tmp_path / "broken", Stop(after))
    resumed, again = run(made, tmp_path / "broken")
    assert same_bits(whole, resumed)
    assert (progress.bytes_up, progress.round) == (again.bytes_up, again.round)
    for name in ("rounds.parquet", "clients.parquet"):
        a, b = (pq.read_table(tmp_path / which / name) for which in ("whole", "broken"))
        drop = [c for c in ("seconds",) if c in a.schema.names]
        assert a.drop_columns(drop) == b.drop_columns(drop)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_size", [1, 3, None])
def test_threads_and_blocks_do_not_change_a_bit(
    population: Population, tmp_path: Path, threads: int, block_size: int | None
) -> None:
    one, _ = run(federation(population), tmp_path / "one")
    engine = LocalEngine(population, threads, block_size=block_size)
    other, _ = run(federation(population, engine), tmp_path / "other")
    assert same_bits(one, other)


def test_fedprox_with_mu_zero_is_fedavg_bit_for_bit(population: Population, tmp_path: Path) -> None:
    a, _ = run(federation(population), tmp_path / "a")
    prox = {"name": "fedprox", "mu": 0.0}
    b, _ = run(federation(population, strategy=prox), tmp_path / "b")
    c, _ = run(federation(population, strategy={**prox, "mu": 1.0}), tmp_path / "c")
    assert same_bits(a, b)
    assert not same_bits(a, c)


def test_one_epoch_full_batch_full_participation_is_gradient_descent_on_the_pool(
    population: Population, tmp_path: Path
) -> None:
    training = {"local_epochs": 1, "batch_size": 1000, "learning_rate": 0.3}
    state, _ = run(federation(population, training=training), tmp_path / "run")
    rows = population.train.index
    x, y = population.features[rows].astype(float), population.labels[rows]
    w, b = np.zeros((3, 9)), np.zeros(3)
    for _ in range(4):
        logits = x @ w.T + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / len(y)
        w, b = w - 0.3 * error.T @ x, b - 0.3 * error.sum(0)
    np.testing.assert_allclose(state.head["weight"], w, atol=2e-6)
    np.testing.assert_allclose(state.head["bias"], b, atol=2e-6)


class Tampered:
    """An engine one of whose clients sends nonsense."""

    def __init__(self, population: Population, tamper: Callable, rounds: set[int]) -> None:
        self.inner, self.tamper, self.rounds = LocalEngine(population, 1), tamper, rounds

    def start(self, head) -> None:
        pass

    def run_clients(self, plan, head):
        (updates,) = self.inner.run_clients(plan, head)
        if plan.round in self.rounds:
            tensors = {name: tensor.copy() for name, tensor in updates.tensors.items()}
            self.tamper(tensors)
            updates = replace(updates, tensors=tensors)
        return [updates]

    def evaluate(self, head, clients):
        return self.inner.evaluate(head, clients)

    def close(self) -> None:
        pass


def test_a_poisoned_client_is_named_and_the_round_goes_on(
    population: Population, tmp_path: Path
) -> None:
    engine = Tampered(population, lambda t: t["weight"][1].fill(np.nan), {2})
    seen = []
    state, _ = run(
        federation(population, engine),
        tmp_path / "run",
        observe=lambda row, updates: seen.append((row["accepted"], updates.failures)),
    )
    assert [accepted for accepted, _ in seen] == [5, 4, 5, 5]
    assert seen[1][1][0].client == 1
    assert all(np.isfinite(tensor).all() for tensor in state.head.values())
    table = pq.read_table(tmp_path / "run" / "clients.parquet").to_pylist()
    refused = [row for row in table if row["status"] != "ok"]
    assert [(row["round"], row["client"], row["split"]) for row in refused] == [(2, 1, "train")]
    assert "weight has a value that is not finite" in refused[0]["status"]


def test_the_round_without_a_client_equals_the_round_it_never_joined(
    population: Population, tmp_path: Path
) -> None:
    # Nothing of a refused update may count: not its values, not its weight.
    engine = Tampered(population, lambda t: t["bias"][4].fill(np.inf), {1})
    state, _ = run(federation(population, engine, rounds=1), tmp_path / "run")
    (updates,) = LocalEngine(population, 1).run_clients(_plan(population), _zeros(population))
    weights = updates.num_examples[:4] / updates.num_examples[:4].sum()
    mean = np.tensordot(weights, updates.tensors["weight"][:4].astype(float), 1)
    np.testing.assert_allclose(state.head["weight"], mean, atol=1e-6)


def _zeros(population: Population):
    return federation(population).head


def _plan(population: Population):
    from fedtl.planning import plan_round
    from fedtl.strategies import ServerState

    made = federation(population)
    return plan_round(
        made.scenario, made.roster.num_clients, made.strategy, ServerState(made.head), 1
    )


def test_divergence_stops_with_the_last_commit_kept(population: Population, tmp_path: Path) -> None:
    engine = Tampered(population, lambda t: t["weight"].fill(np.nan), {3})
    made = federation(population, engine)
    with pytest.raises(PolicyStop, match="round 3") as stopped:
        run(made, tmp_path / "run")
    assert stopped.value.exit_code == 4
    healed, progress = run(federation(population), tmp_path / "run")
    whole, _ = run(federation(population), tmp_path / "whole")
    assert progress.round == 4
    assert same_bits(healed, whole)


def test_going_on_with_something_else_is_refused_unless_allowed(
    population: Population, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(federation(population), tmp_path / "run", Stop(1))
    other = replace(federation(population), identity={"scenario_hash": "b"})
    with pytest.raises(InputError, match="scenario_hash: was a, is b"):
        run(other, tmp_path / "run")
    _, progress = run(other, tmp_path / "run", allow_changes=True)
    assert progress.round == 4


def test_bytes_are_counted_from_heads_and_clients(population: Population, tmp_path: Path) -> None:
    made = federation(population, clients={"fraction": 0.4})
    _, progress = run(made, tmp_path / "run")
    assert progress.bytes_up == progress.bytes_down == 4 * 2 * (3 * 9 + 3) * 4
    table = pq.read_table(tmp_path / "run" / "rounds.parquet")
    assert sum(table["bytes_up"].to_pylist()) == progress.bytes_up


def test_evaluation_every_so_often_leaves_nulls_and_judges_the_last(
    population: Population, tmp_path: Path
) -> None:
    run(federation(population, evaluation={"every": 3}), tmp_path / "run")
    table = pq.read_table(tmp_path / "run" / "rounds.parquet")
    assert [a is not None for a in table["accuracy"].to_pylist()] == [False, False, True, True]


def test_cohorts_are_seeded_sorted_distinct_and_of_the_right_size() -> None:
    seen = [sample_cohort(7, round, 1000, 100) for round in range(1, 4)]
    assert all(len(set(c.tolist())) == 100 and (np.diff(c) > 0).all() for c in seen)
    assert seen[0].tolist() == sample_cohort(7, 1, 1000, 100).tolist()
    assert seen[0].tolist() != seen[1].tolist()
    assert sample_cohort(7, 1, 5, 5).tolist() == [0, 1, 2, 3, 4]


def test_every_client_is_sampled_about_equally_often() -> None:
    counts = np.zeros(20)
    for round in range(2000):
        counts[sample_cohort(0, round, 20, 5)] += 1
    # mean 500, standard deviation about 19: six of them never happen by chance
    assert np.abs(counts - 500).max() < 6 * 19.4


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1, 1]),
        ("exponential", [1, 0.5, 0.25, 0.125]),
        ("cosine", [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_schedules(schedule: str, rates: list[float]) -> None:
    training = {"learning_rate": 1.0, "schedule": schedule, "decay": 0.5}
    scenario = Scenario.model_validate({"name": "x", "rounds": 4, "training": training})
    assert [scheduled_rate(scenario, r) for r in range(1, 5)] == pytest.approx(rates)


def test_no_number_is_lost_in_json(population: Population, tmp_path: Path) -> None:
    run(federation(population), tmp_path / "run")
    manifests = sorted((tmp_path / "run" / "checkpoints").glob("*.json"))
    facts = json.loads(manifests[-1].read_text())["facts"]
    assert facts["round"] == 4
    assert facts["client_rounds"] == 20


def test_a_server_step_that_overflows_is_stopped_before_it_is_committed(
    population: Population, tmp_path: Path
) -> None:
    strategy = {"name": "fedadam", "server_learning_rate": 1e300}
    with pytest.raises(PolicyStop, match="server's step of round 1 is not finite"):
        run(federation(population, strategy=strategy), tmp_path / "run")
    manifests = sorted((tmp_path / "run" / "checkpoints").glob("*.json"))
    assert [path.stem for path in manifests] == ["round-000000"]


def test_records_that_lost_committed_rows_are_refused(
    population: Population, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(federation(population), tmp_path / "run", Stop(2))
    stream = tmp_path / "run" / "records" / "clients.arrows"
    stream.write_bytes(stream.read_bytes()[:100])
    with pytest.raises(InputError, match="records of committed rounds are damaged"):
        run(federation(population), tmp_path / "run")


def test_when_no_commit_is_whole_nothing_begins_anew_unasked(
    population: Population, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(federation(population), tmp_path / "run", Stop(2))
    for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no commit of this run is whole"):
        run(federation(population), tmp_path / "run")
    _, progress = run(federation(population), tmp_path / "run", allow_changes=True)
    assert progress.round == 4


def test_a_damaged_commit_is_told(population: Population, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(federation(population), tmp_path / "run", Stop(2))
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*.json"))[-1]
    newest.write_text(newest.read_text().replace('"bytes_up": ', '"bytes_up": 1'))
    told: list[str] = []
    run(federation(population), tmp_path / "run", tell=told.append)
    assert len(told) == 1
    assert "round-000002 is damaged" in told[0]


def test_the_state_of_another_strategy_cannot_be_gone_on_from(
    population: Population, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(federation(population), tmp_path / "run", Stop(1))
    other = federation(population, strategy={"name": "fedadam"})
    with pytest.raises(InputError, match="another head or strategy"):
        run(other, tmp_path / "run", allow_changes=True)


def test_one_client_federated_is_plain_sgd_on_its_data(
    population: Population, tmp_path: Path
) -> None:
    from fedtl import seeding
    from fedtl.clients.training import train_clients
    from fedtl.plans import RoundPlan
    from fedtl.types import LocalTraining, Rows

    rows, tests = population.train.index, population.test.index
    ends = [np.array([0, len(index)], np.int64) for index in (rows, tests)]
    alone = replace(
        population,
        train=Rows(rows, ends[0]),
        test=Rows(tests, ends[1]),
        names=("a",),
        domains=("",),
    )
    state, _ = run(federation(alone), tmp_path / "run")
    heads = None
    for round in range(1, 5):
        keys = seeding.client_keys(0, "batches", round, np.array([0]))
        plan = RoundPlan(round, np.array([0]), keys, LocalTraining(2, 8, 0.05))
        heads = train_clients(alone, federation(alone).head, plan, initial=heads).tensors
    assert all(state.head[name].tobytes() == heads[name][0].tobytes() for name in state.head)


class Sparse:
    """The local engine, but only some clients answer in a round."""

    def __init__(self, population: Population, answers: Callable[[int], list[int]]) -> None:
        self.inner, self.answers = LocalEngine(population, 1), answers

    def run_clients(self, plan, head):
        kept = np.intersect1d(plan.clients, self.answers(plan.round))
        left = np.setdiff1d(plan.clients, kept)
        return self.inner.run_clients(plan.without(left), head) if len(kept) else []

    def evaluate(self, head, clients):
        return self.inner.evaluate(head, clients)


def test_a_round_below_its_quorum_changes_nothing(population: Population, tmp_path: Path) -> None:
    engine = Sparse(population, lambda round: [0, 2] if round == 2 else [0, 1, 2, 3, 4])
    made = federation(population, engine, rounds=2, participation={"quorum": 3})
    rows: list = []
    state, progress = run(made, tmp_path / "run", observe=lambda row, updates: rows.append(row))
    one, _ = run(federation(population, rounds=1), tmp_path / "one")
    assert same_bits(state, one)
    assert (progress.round, progress.abandoned) == (2, 1)
    assert [row["abandoned"] for row in rows] == [False, True]
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    second = clients[(clients["round"] == 2) & (clients["split"] == "train")]
    assert dict(zip(second["client"], second["status"], strict=True)) == {
        0: "unused: the round missed the quorum",
        2: "unused: the round missed the quorum",
        1: "unused: no answer",
        3: "unused: no answer",
        4: "unused: no answer",
    }


def test_a_run_without_its_quorum_stops_and_can_go_on(
    population: Population, tmp_path: Path
) -> None:
    engine = Sparse(population, lambda round: [0, 1, 2, 3, 4] if round == 1 else [])
    participation = {"quorum": 2, "patience": 2}
    made = federation(population, engine, rounds=6, participation=participation)
    with pytest.raises(PolicyStop, match=r"2 rounds in a row missed the quorum.*client-0: no ans"):
        run(made, tmp_path / "run")
    back = federation(population, rounds=6, participation=participation)
    state, progress = run(back, tmp_path / "run")
    absent = [{"round": r, "clients": list(population.names)} for r in (2, 3)]
    replayed, _ = run(
        federation(population, rounds=6, participation={**participation, "patience": 9,
                                                        "absent": absent}),
        tmp_path / "replayed",
    )  # fmt: skip
    assert progress.round == 6
    assert same_bits(state, replayed)


def test_absent_clients_are_as_those_that_do_not_answer(
    population: Population, tmp_path: Path
) -> None:
    engine = Sparse(population, lambda round: [0, 1, 3] if round == 3 else [0, 1, 2, 3, 4])
    silent, _ = run(federation(population, engine), tmp_path / "silent")
    absent = [{"round": 3, "clients": ["client-2", "client-4"]}]
    made = federation(population, participation={"absent": absent})
    replayed, _ = run(made, tmp_path / "replayed")
    assert same_bits(silent, replayed)
    wrong = [{"round": 3, "clients": ["client-22"]}]
    with pytest.raises(InputError, match="Did you mean 'client-2'"):
        run(federation(population, participation={"absent": wrong}), tmp_path / "wrong")
    assert not list((tmp_path / "wrong" / "checkpoints").iterdir()), "told before any round"


def test_over_selection_asks_more_and_uses_the_first(
    population: Population, tmp_path: Path
) -> None:
    changes = {"clients": {"fraction": 0.4}, "participation": {"over_selection": 2.0}}
    made = federation(population, **changes)
    seen: list = []
    state, progress = run(made, tmp_path / "run", observe=lambda row, updates: seen.append(updates))
    assert progress.client_rounds == 2 * 4
    for updates in seen:
        assert len(updates.clients) == 2
        assert len(updates.failures) == 2
        assert {f.reason for f in updates.failures} == {"late: the round had its 2 answers"}
    assert len({tuple(u.clients.tolist()) for u in seen}) > 1
    blocks, _ = run(
        federation(population, LocalEngine(population, 2, block_size=1), **changes),
        tmp_path / "blocks",
    )
    assert same_bits(state, blocks)


def test_two_runs_can_be_compared_by_what_they_planned(
    population: Population, tmp_path: Path
) -> None:
    _, a = run(federation(population), tmp_path / "a")
    _, b = run(federation(population, LocalEngine(population, 2)), tmp_path / "b")
    _, c = run(federation(population, seed=1), tmp_path / "c")
    _, d = run(
        federation(population, training={"local_epochs": 1, "batch_size": 8}), tmp_path / "d"
    )
    assert (a.cohorts, a.batches) == (b.cohorts, b.batches)
    assert a.cohorts == c.cohorts == d.cohorts  # everybody takes part
    assert len({a.batches, c.batches, d.batches}) == 3


class Asked:
    """The local engine; writes down who was asked together, and falsifies statistics."""

    def __init__(self, population: Population, liars: tuple[int, ...] = ()) -> None:
        self.inner, self.liars, self.asked = LocalEngine(population, 1), liars, []

    def run_clients(self, plan, head):
        self.asked.append(plan.clients.tolist())
        (reply,) = self.inner.run_clients(plan, head)
        reply.tensors["sums"][np.isin(reply.clients, self.liars)] *= 3
        return [reply]

    def evaluate(self, head, clients):
        return self.inner.evaluate(head, clients)


FED3R = {"strategy": {"name": "fed3r"}, "clients": {"fraction": 0.6}, "rounds": 5}


@pytest.mark.parametrize("options", [{}, {"random_features": 5, "scale": 0.2}])
def test_statistics_in_waves_of_one_give_the_bits_of_one_wave(
    options: dict, population: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**FED3R, "strategy": {"name": "fed3r", **options}}
    together, apart = Asked(population), Asked(population)
    one, progress = run(federation(population, together, **changes), tmp_path / "one")
    monkeypatch.setattr("fedtl.round_training.WAVE_BYTES", 1)
    many, again = run(federation(population, apart, **changes), tmp_path / "many")
    assert [len(wave) for wave in apart.asked] == [1] * 5
    assert [k for wave in together.asked for k in wave] == [k for wave in apart.asked for k in wave]
    assert len(together.asked) < 5
    for a, b in ((one.head, many.head), (one.slots, many.slots)):
        assert {n: t.tobytes() for n, t in a.items()} == {n: t.tobytes() for n, t in b.items()}
    assert one.slots["reported"].all()
    for key in ("cohorts", "batches", "bytes_up", "bytes_down", "client_rounds"):
        assert getattr(progress, key) == getattr(again, key)
    rows = [pd.read_parquet(tmp_path / name / "clients.parquet") for name in ("one", "many")]
    pd.testing.assert_frame_equal(*rows, check_exact=True)


def test_a_liar_alone_in_its_wave_stops_nobody(
    population: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtl.round_training.WAVE_BYTES", 1)
    changes = {"rounds": 2, "strategy": {"name": "fed3r"}}
    state, _ = run(federation(population, Asked(population, (2,)), **changes), tmp_path / "lie")
    assert state.slots["reported"].tolist() == [1, 1, 0, 1, 1]
    table = pd.read_parquet(tmp_path / "lie" / "clients.parquet").query("client == 2")
    refused = table[table["split"] == "train"]["status"].tolist()
    assert len(refused) == 2  # asked again, and refused again
    assert all(why.startswith("unused: statistics: ") for why in refused)
    absent = [{"round": r, "clients": ["client-2"]} for r in (1, 2)]
    made = federation(population, **changes, participation={"absent": absent})
    without, _ = run(made, tmp_path / "absent")
    assert same_bits(state, without)


def test_where_all_lie_the_run_stops_by_its_quorum(population: Population, tmp_path: Path) -> None:
    made = federation(population, Asked(population, (0, 1, 2, 3, 4)), strategy={"name": "fed3r"})
    with pytest.raises(PolicyStop, match=r"3 rounds in a row missed the quorum.*statistics"):
        run(made, tmp_path / "run")


def test_who_has_reported_before_counts_for_the_quorum(
    population: Population, tmp_path: Path
) -> None:
    first, second = (sample_cohort(0, round, 5, 3).tolist() for round in (1, 2))
    new = sorted(set(second) - set(first))
    assert len(new) == 2  # one of the second cohort has reported
    missing = [new, new[:1], []]
    for quorum, wanted in ((2, [True, False, False]), (3, [True, True, False])):
        for away, abandoned in zip(missing, wanted, strict=True):
            answers = {1: first, 2: sorted(set(second) - set(away))}
            engine = Sparse(population, lambda round, answers=answers: answers[round])
            made = federation(
                population, engine, **{**FED3R, "rounds": 2}, participation={"quorum": quorum}
            )
            rows: list = []
            place = tmp_path / f"{quorum} {len(away)}"
            state, _ = run(made, place, observe=lambda row, updates, rows=rows: rows.append(row))
            assert [row["abandoned"] for row in rows] == [False, abandoned]
            reported = set(np.flatnonzero(state.slots["reported"]).tolist())
            assert reported == set(first) | (set() if abandoned else set(new) - set(away))
