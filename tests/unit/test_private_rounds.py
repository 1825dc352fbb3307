"""Rounds that promise something: charged once, summed in secret, stopped in time, resumed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fedtl import seeding
from fedtl.checkpoints import Progress
from fedtl.clients.tasks import do_task
from fedtl.engines import LocalEngine
from fedtl.errors import Interrupted, PolicyStop, SecurityRefusal
from fedtl.interrupts import Interrupts
from fedtl.planning import cyclic_cohort, plan_round, poisson_cohort
from fedtl.plans import RING, RoundPlan
from fedtl.privacy.ledger import Ledger
from fedtl.privacy.noise import seeded
from fedtl.privacy.promise import make_promise
from fedtl.privacy.ring import to_signed
from fedtl.privacy.secure_sum import PlainSum
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.scenario.schema import Scenario
from fedtl.secure_rounds import simulated_sums
from fedtl.strategies import make_strategy, protected
from fedtl.strategies.base import ServerState
from fedtl.types import Population, Rows

CENTRAL = {"mechanism": "central", "noise_multiplier": 1.0, "clip": 0.5, "delta": 1e-3}
ARITHMETIC = {"secure_aggregation": "arithmetic"}


def federation(population: Population, engine: Any = None, **changes: Any) -> Federation:
    content = {"name": "x", "rounds": 4, "training": {"local_epochs": 2, "batch_size": 8}}
    scenario = Scenario.model_validate({**content, **changes})
    classes, width = len(population.classes), population.features.shape[1]
    head = {"weight": np.zeros((classes, width), np.float32), "bias": np.zeros(classes, np.float32)}
    roster = population.roster()
    promise = make_promise(scenario, roster)
    return Federation(
        scenario,
        roster,
        head,
        protected(make_strategy(scenario, population.names), scenario, promise, roster.train),
        engine or LocalEngine(population, 1),
        {"scenario_hash": "a"},
        promise,
        simulated_sums(scenario, roster.train),
    )


def run(
    made: Federation,
    path: Path,
    interrupts: Interrupts | None = None,
    observe: Any = None,
    allow_changes: bool = False,
) -> tuple[ServerState, Progress]:
    folder = RunFolder.reopen(path) if path.exists() else RunFolder.create(path, "")
    try:
        observe = observe or (lambda row, updates: None)
        interrupts = interrupts or Interrupts()
        return run_rounds(made, folder, observe, interrupts, allow_changes=allow_changes)
    finally:
        folder.write_tables()
        folder.release()


def same_bits(a: ServerState, b: ServerState) -> bool:
    return all(
        one[n].tobytes() == other[n].tobytes()
        for one, other in ((a.head, b.head), (a.slots, b.slots))
        for n in one
    )


def charged(path: Path) -> list[int]:
    return [entry.round for entry in Ledger(path / "ledger.jsonl").entries]


class Stop(Interrupts):
    """Asks for a stop after some commits, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def check(self, what: str = "", do: str | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted(what, do=do)


PRIVATE: dict[str, dict[str, Any]] = {
    "central": {"privacy": CENTRAL, "clients": {"fraction": 0.6}},
    "adaptive": {"privacy": {**CENTRAL, "adaptive_clip": True}, "strategy": {"name": "fedadam"}},
    "banded": {
        "privacy": {**CENTRAL, "sampling": "cyclic", "noise": "banded"},
        "clients": {"fraction": 0.4},
        "rounds": 6,
    },
    "local": {"privacy": {**CENTRAL, "mechanism": "local"}, "clients": {"fraction": 0.6}},
    "noise in a secure sum": {"privacy": {**CENTRAL, **ARITHMETIC}},
    "secagg": {"privacy": {**CENTRAL, "secure_aggregation": "secagg"}, "rounds": 2},
}


class TestRepeated:
    @pytest.mark.parametrize("name", PRIVATE)
    def test_stopped_and_resumed_is_the_unbroken_run_and_charged_once(
        self, name: str, population: Population, tmp_path: Path
    ) -> None:
        made = federation(population, **PRIVATE[name])
        whole, done = run(made, tmp_path / "whole")
        with pytest.raises(Interrupted):
            run(made, tmp_path / "broken", Stop(1))
        resumed, again = run(federation(population, **PRIVATE[name]), tmp_path / "broken")
        assert same_bits(whole, resumed)
        assert replace(again, train_seconds=0) == replace(done, train_seconds=0)
        assert charged(tmp_path / "broken") == [*range(1, made.scenario.rounds + 1)]
        ledgers = [(tmp_path / n / "ledger.jsonl").read_text() for n in ("whole", "broken")]
        assert ledgers[0] == ledgers[1]

    @pytest.mark.parametrize("name", ["central", "local", "noise in a secure sum"])
    def test_threads_and_blocks_do_not_change_a_bit(
        self, name: str, population: Population, tmp_path: Path
    ) -> None:
        one, _ = run(federation(population, **PRIVATE[name]), tmp_path / "one")
        engine = LocalEngine(population, 2, block_size=2)
        other, _ = run(federation(population, engine, **PRIVATE[name]), tmp_path / "other")
        assert same_bits(one, other)

    @pytest.mark.parametrize(
        "place",
        ["after_train", "after_charge", "after_aggregate", "before_commit", "before_manifest"],
    )
    @pytest.mark.parametrize("name", ["adaptive", "banded", "noise in a secure sum"])
    def test_killed_anywhere_and_resumed_it_is_charged_once(
        self, name: str, place: str, population: Population, tmp_path: Path
    ) -> None:
        made = federation(population, **PRIVATE[name])
        whole, _ = run(made, tmp_path / "whole")
        child = os.fork()
        if child == 0:
            os.environ["FEDTL_FAIL"] = f"{place}:kill:2"
            try:
                run(made, tmp_path / "broken")
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        before = place == "after_train" and "secure" not in name
        assert charged(tmp_path / "broken") == ([1] if before else [1, 2])
        resumed, _ = run(federation(population, **PRIVATE[name]), tmp_path / "broken")
        assert same_bits(whole, resumed)
        ledgers = [(tmp_path / n / "ledger.jsonl").read_text() for n in ("whole", "broken")]
        assert ledgers[0] == ledgers[1]

    def test_a_line_that_a_crash_cut_short_is_told_of_and_counts_as_nothing(
        self, population: Population, tmp_path: Path
    ) -> None:
        made = federation(population, **PRIVATE["adaptive"])
        with pytest.raises(Interrupted):
            run(made, tmp_path / "run", Stop(2))
        with open(tmp_path / "run" / "ledger.jsonl", "ab") as file:
            file.write(b'{"round":3,"ki')
        told: list[str] = []
        folder = RunFolder.reopen(tmp_path / "run")
        run_rounds(made, folder, lambda row, _: None, Interrupts(), tell=told.append)
        folder.release()
        assert any("cut short" in line for line in told)
        assert charged(tmp_path / "run") == [1, 2, 3, 4]

    def test_fresh_noise_of_a_repeated_round_is_another_release(
        self, population: Population, tmp_path: Path
    ) -> None:
        """With noise of the system a round that is done again has been released twice."""
        made = replace(federation(population, **PRIVATE["adaptive"]), noise="system")
        child = os.fork()
        if child == 0:
            os.environ["FEDTL_FAIL"] = "after_charge:kill:2"
            try:
                run(made, tmp_path / "run")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        run(made, tmp_path / "run")
        assert charged(tmp_path / "run") == [1, 2, 2, 3, 4]
        assert made.promise is not None
        entries = Ledger(tmp_path / "run" / "ledger.jsonl").entries
        spent, planned = made.promise.epsilon(entries), made.promise.epsilon_after(4)
        assert spent is not None
        assert planned is not None
        assert spent > planned


EXAMPLE = {**CENTRAL, "mechanism": "example"}
LONG = {"local_epochs": 9, "batch_size": 8}


class TestResumedOtherwise:
    """What was spent is added up by what holds now, so little of that may change."""

    @pytest.mark.parametrize("lost", ["", "half", "file"])
    def test_a_ledger_that_lost_lines_is_refused(
        self, lost: str, population: Population, tmp_path: Path
    ) -> None:
        made, ledger = federation(population, privacy=CENTRAL), tmp_path / "run" / "ledger.jsonl"
        with pytest.raises(Interrupted):
            run(made, tmp_path / "run", Stop(2))
        lines = ledger.read_text().splitlines(keepends=True)
        ledger.write_text(lines[0] if lost == "half" else "")
        if lost == "file":
            ledger.unlink()
        with pytest.raises(SecurityRefusal, match="lost lines"):
            run(made, tmp_path / "run", allow_changes=True)

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({}, {"privacy": CENTRAL}),
            ({"privacy": CENTRAL}, {}),
            ({"privacy": {**CENTRAL, "mechanism": "local"}}, {"privacy": CENTRAL}),
            ({"privacy": EXAMPLE, "training": LONG}, {"privacy": EXAMPLE}),
            (
                {"privacy": CENTRAL},
                {"privacy": {**CENTRAL, "sampling": "fixed"}, "clients": {"fraction": 0.6}},
            ),
            (PRIVATE["banded"], {**PRIVATE["banded"], "rounds": 9}),
            (PRIVATE["banded"], {**PRIVATE["banded"], "seed": 9}),
        ],
        ids=["none", "to none", "local", "example", "fixed", "banded", "seed"],
    )
    def test_another_promise_is_refused_even_where_changes_are_allowed(
        self, before: dict[str, Any], after: dict[str, Any], population: Population, tmp_path: Path
    ) -> None:
        with pytest.raises(Interrupted):
            run(federation(population, **before), tmp_path / "run", Stop(1))
        with pytest.raises(SecurityRefusal, match="another promise"):
            run(federation(population, **after), tmp_path / "run", allow_changes=True)

    def test_rounds_of_less_noise_count_against_the_budget(
        self, population: Population, tmp_path: Path
    ) -> None:
        with pytest.raises(Interrupted):
            run(federation(population, privacy=CENTRAL), tmp_path / "run", Stop(2))
        more = {**CENTRAL, "noise_multiplier": 9.0}
        made = federation(population, privacy={**more, "budget": 4.0})
        assert made.promise is not None
        assert made.promise.epsilon_after(4) < 4.0  # type: ignore[operator]
        with pytest.raises(PolicyStop, match="round 3 would bring"):
            run(made, tmp_path / "run", allow_changes=True)
        made = federation(population, privacy=more)
        run(made, tmp_path / "run", allow_changes=True)
        entries = Ledger(tmp_path / "run" / "ledger.jsonl").entries
        assert [entry.noise_multiplier for entry in entries] == [1.0, 1.0, 9.0, 9.0]


class TestSecureSums:
    def test_the_head_is_the_plain_weighted_one_to_the_rounding(
        self, population: Population, tmp_path: Path
    ) -> None:
        """K / (2 f) in the sum, over its weight, in each round."""
        plain, _ = run(federation(population, rounds=1), tmp_path / "plain")
        made = federation(population, rounds=1, privacy=ARITHMETIC)
        secure, _ = run(made, tmp_path / "secure")
        plan = first_plan(made)
        assert plan.protection is not None
        assert plan.weights is not None
        bound = 5 / (2 * plan.protection.scale) / plan.weights.sum()
        for name in plain.head:
            rounding = np.spacing(np.abs(plain.head[name]).max())
            assert np.abs(plain.head[name] - secure.head[name]).max() <= bound + rounding

    def test_the_sum_is_that_of_the_quantised_updates_exactly(
        self, population: Population, tmp_path: Path
    ) -> None:
        totals = []

        class Kept(PlainSum):
            def finish(self) -> Any:
                found = super().finish()
                totals.append(found[0].copy())
                return found

        made = federation(population, rounds=1, privacy=ARITHMETIC)
        plan = first_plan(made)

        def make(plan: RoundPlan, head: Any) -> PlainSum:
            ((size,), _) = plan.reply(head)[RING]
            return Kept(plan.clients, 1, size, 32)

        run(replace(made, secure=make), tmp_path / "run")
        sent = do_task(population, made.head, plan).tensors[RING]
        wanted = to_signed(sent, 32).astype(object).sum(axis=0)  # Python's own whole numbers
        assert to_signed(totals[0], 32).tolist() == wanted.tolist()

    @pytest.mark.parametrize("privacy", [{}, {**CENTRAL}], ids=["plain", "private"])
    def test_masks_change_nothing(
        self, privacy: dict[str, Any], population: Population, tmp_path: Path
    ) -> None:
        ends = [
            run(
                federation(population, rounds=2, privacy={**privacy, "secure_aggregation": kind}),
                tmp_path / kind,
            )[0]
            for kind in ("arithmetic", "secagg", "secagg_plus")
        ]
        assert same_bits(ends[0], ends[1])
        assert same_bits(ends[0], ends[2])

    def test_statistics_sum_to_the_plain_head(self, population: Population, tmp_path: Path) -> None:
        ridge = {"strategy": {"name": "fed3r"}, "rounds": 1}
        plain, _ = run(federation(population, **ridge), tmp_path / "plain")
        for kind in ("arithmetic", "secagg"):
            made = federation(population, **ridge, privacy={"secure_aggregation": kind})
            secure, _ = run(made, tmp_path / kind)
            assert np.array_equal(secure.slots["counts"], plain.slots["counts"])
            assert secure.slots["reported"].all()
            for name in plain.head:
                np.testing.assert_allclose(secure.head[name], plain.head[name], atol=1e-5)

    def test_statistics_in_waves_of_one_are_the_same_sum(
        self, population: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changes = {"strategy": {"name": "fed3r"}, "rounds": 1, "privacy": ARITHMETIC}
        one, _ = run(federation(population, **changes), tmp_path / "one")
        monkeypatch.setattr("fedtl.round_training.WAVE_BYTES", 1)
        other, _ = run(federation(population, **changes), tmp_path / "other")
        assert same_bits(one, other)

    @pytest.mark.parametrize("kind", ["arithmetic", "secagg"])
    def test_who_drops_out_is_not_in_the_sum(
        self, kind: str, population: Population, tmp_path: Path
    ) -> None:
        absent = {"absent": [{"round": 1, "clients": ["client-3"]}]}
        plain, _ = run(federation(population, rounds=1, participation=absent), tmp_path / "plain")
        made = federation(
            population, rounds=1, participation=absent, privacy={"secure_aggregation": kind}
        )
        secure, progress = run(made, tmp_path / "secure")
        assert (progress.dropouts, progress.aborted) == (1, 0)
        for name in plain.head:
            np.testing.assert_allclose(secure.head[name], plain.head[name], atol=1e-5)
        rows = pq.read_table(tmp_path / "secure" / "clients.parquet").to_pylist()
        status = {row["name"]: row["status"] for row in rows if row["split"] == "train"}
        assert status.pop("client-3").startswith("unused: absent")
        assert set(status.values()) == {"ok"}

    @pytest.mark.parametrize("kind", ["arithmetic", "secagg"])
    def test_below_the_threshold_nothing_moves_and_nothing_is_charged(
        self, kind: str, population: Population, tmp_path: Path
    ) -> None:
        away = ["client-0", "client-2", "client-4"]
        absent = {"absent": [{"round": 2, "clients": away}]}
        made = federation(
            population, rounds=3, participation=absent,
            privacy={**CENTRAL, "secure_aggregation": kind},
        )  # fmt: skip
        rows: list[Any] = []
        heads = []
        engine = made.engine

        class Watched:
            def run_clients(self, plan: RoundPlan, head: Any) -> Any:
                heads.append({name: tensor.copy() for name, tensor in head.items()})
                return engine.run_clients(plan, head)

            def evaluate(self, head: Any, clients: Any) -> Any:
                return engine.evaluate(head, clients)

        watched = replace(made, engine=Watched())  # type: ignore[arg-type]
        _, progress = run(watched, tmp_path / "run", observe=lambda row, _: rows.append(row))
        assert [row["abandoned"] for row in rows] == [False, True, False]
        assert [row["accepted"] for row in rows] == [5, 0, 5]
        assert all(heads[1][n].tobytes() == heads[2][n].tobytes() for n in heads[1])
        assert charged(tmp_path / "run") == [1, 3]
        assert (progress.aborted, progress.dropouts) == (1, 3)
        table = pq.read_table(tmp_path / "run" / "clients.parquet").to_pylist()
        train = [r for r in table if r["split"] == "train" and r["round"] == 2]
        reasons = {row["name"]: row["status"] for row in train}
        assert all("absent" in reasons[name] for name in away)
        assert "no secure sum" in reasons["client-1"]

    def test_a_bad_client_is_left_out_alone(self, population: Population, tmp_path: Path) -> None:
        features = population.features.copy()
        features[population.train.of(1)] = np.nan
        bad = replace(population, features=features)
        seen: list[Any] = []
        made = federation(population, LocalEngine(bad, 1), privacy=ARITHMETIC, rounds=2)
        state, _ = run(made, tmp_path / "run", observe=lambda _, updates: seen.append(updates))
        assert [u.clients.tolist() for u in seen] == [[0, 2, 3, 4]] * 2
        assert "not finite" in seen[0].failures[0].reason
        assert all(np.isfinite(tensor).all() for tensor in state.head.values())

    def test_what_is_no_answer_is_refused_before_it_is_added(
        self, population: Population, tmp_path: Path
    ) -> None:
        engine, seen = LocalEngine(population, 1), []

        class Lying:
            """Clients 0 and 1 say too many examples, too many entries; 2 answers twice."""

            def run_clients(self, plan: RoundPlan, head: Any) -> Any:
                each = [engine.run_clients(plan.part(np.array([i])), head)[0] for i in range(5)]
                each[0] = replace(each[0], num_examples=each[0].num_examples + 1)
                longer = np.concatenate([each[1].tensors[RING]] * 2, axis=1)
                each[1] = replace(each[1], tensors={RING: longer})
                return [*each, each[2]]

            def evaluate(self, head: Any, clients: Any) -> Any:
                return engine.evaluate(head, clients)

        made = federation(population, Lying(), privacy={**ARITHMETIC, "threshold": 0.4}, rounds=1)
        run(made, tmp_path / "run", observe=lambda _, updates: seen.append(updates))
        assert seen[0].clients.tolist() == [2, 3, 4]
        reasons = {failure.client: failure.reason for failure in seen[0].failures}
        assert "31 examples, declared 30" in reasons[0]
        assert "shape" in reasons[1]

    @pytest.mark.parametrize("kind", ["none", "arithmetic", "secagg"])
    def test_a_federation_of_one(self, kind: str, population: Population, tmp_path: Path) -> None:
        """Under noise it may be summed with nobody: all the noise is its own."""
        test, train = population.test.of(0), population.train.of(0)
        rows = (Rows(own, np.array([0, len(own)])) for own in (train, test))
        alone = replace(
            population, train=next(rows), test=next(rows), names=("me",), domains=("x",)
        )
        made = federation(alone, rounds=2, privacy={**CENTRAL, "secure_aggregation": kind})
        state, _ = run(made, tmp_path / "run")
        assert charged(tmp_path / "run") == [1, 2]
        assert all(np.isfinite(tensor).all() for tensor in state.head.values())


class TestCentral:
    def test_the_run_is_the_algorithm_written_out(
        self, population: Population, tmp_path: Path
    ) -> None:
        """Algorithm 1 of McMahan et al. 2018 step by step, with the run's own coins and noise."""
        made = federation(population, clients={"fraction": 0.6}, privacy=CENTRAL)
        state, _ = run(made, tmp_path / "run")
        head = {name: tensor.astype(float) for name, tensor in made.head.items()}
        for t in range(1, 5):
            sent = {name: tensor.astype(np.float32) for name, tensor in head.items()}
            coins = seeding.generator(0, "cohort", t).random(5)
            total = {name: np.zeros(tensor.shape) for name, tensor in head.items()}
            for client in np.flatnonzero(coins < 0.6):
                ids = np.array([client])
                keys = seeding.client_keys(0, "batches", t, ids)
                plan = RoundPlan(t, ids, keys, first_plan(made).training)
                trained = do_task(population, sent, plan).tensors
                delta = {n: trained[n][0].astype(float) - sent[n] for n in head}
                norm = np.sqrt(sum((d**2).sum() for d in delta.values()))
                for name in head:
                    total[name] += delta[name] * min(1.0, 0.5 / norm)
            stream = seeded(seeding.key(0, "noise", t))
            for name in sorted(head):
                noise = stream.normal(total[name].size).reshape(total[name].shape)
                head[name] = sent[name] + (total[name] + 1.0 * 0.5 * noise) / (0.6 * 5)
        for name in head:
            np.testing.assert_allclose(state.head[name], head[name], rtol=1e-6, atol=1e-6)

    def test_without_noise_and_with_a_wide_clip_it_is_plain_uniform_averaging(
        self, population: Population, tmp_path: Path
    ) -> None:
        """To 2.5e-7 after four rounds: float32's rounding of another order of addition."""
        uniform = {"name": "fedavg", "weighting": "uniform"}
        plain, _ = run(federation(population, strategy=uniform), tmp_path / "plain")
        privacy = {"mechanism": "central", "noise_multiplier": 0.0, "clip": 1e6}
        made = federation(population, privacy=privacy)
        private, _ = run(made, tmp_path / "private")
        for name in plain.head:
            np.testing.assert_allclose(private.head[name], plain.head[name], atol=2.5e-7)
        assert made.promise is not None
        assert made.promise.epsilon(Ledger(tmp_path / "private" / "ledger.jsonl").entries) is None

    @pytest.mark.parametrize("secure", ["none", "arithmetic", "secagg"])
    def test_rounds_of_nobody_and_of_one_are_rounds(
        self, secure: str, population: Population, tmp_path: Path
    ) -> None:
        """Coins of 0.15 among five clients: most cohorts are empty or a single client."""
        made = federation(
            population, rounds=8, clients={"fraction": 0.15}, participation={"quorum": 2},
            privacy={**CENTRAL, "secure_aggregation": secure},
        )  # fmt: skip
        rows: list[Any] = []
        heads: list[bytes] = []

        def observe(row: Any, updates: Any) -> None:
            rows.append(row)
            commit = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))[-1]
            heads.append(commit.read_bytes())

        run(made, tmp_path / "run", observe=observe)
        sizes = [row["cohort"] for row in rows]
        assert 0 in sizes
        assert 1 in sizes
        done = [row["round"] for row in rows if not row["abandoned"]]
        assert done == charged(tmp_path / "run") == [*range(1, 9)]
        assert len(set(heads)) == 8  # that nobody was there must not show

    def test_a_single_unprotected_update_is_no_secret_sum(
        self, population: Population, tmp_path: Path
    ) -> None:
        made = federation(
            population, clients={"fraction": 0.2}, participation={"patience": 3},
            privacy={"secure_aggregation": "secagg"},
        )  # fmt: skip
        with pytest.raises(PolicyStop, match="no secure sum"):
            run(made, tmp_path / "run")

    def test_nobody_is_judged_by_the_others_lengths(
        self, population: Population, tmp_path: Path
    ) -> None:
        """Else leaving out one client would change who else counts."""
        seen: list[Any] = []
        made = federation(population, validation={"max_norm_ratio": 1.01}, privacy=CENTRAL)
        run(made, tmp_path / "run", observe=lambda _, updates: seen.append(updates))
        assert all(len(updates.clients) == 5 for updates in seen)

    @pytest.mark.parametrize("privacy", [CENTRAL, {**CENTRAL, "mechanism": "local"}, ARITHMETIC])
    def test_losses_and_lengths_are_written_nowhere(
        self, privacy: dict[str, Any], population: Population, tmp_path: Path
    ) -> None:
        run(federation(population, privacy=privacy), tmp_path / "run")
        rows = pq.read_table(tmp_path / "run" / "clients.parquet").to_pylist()
        train = [row for row in rows if row["split"] == "train"]
        assert {row["loss"] for row in train} == {row["update_norm"] for row in train} == {None}
        rounds = pq.read_table(tmp_path / "run" / "rounds.parquet").to_pylist()
        assert {row["train_loss"] for row in rounds} == {None}

    def test_epsilon_grows_and_is_the_ledgers(self, population: Population, tmp_path: Path) -> None:
        made = federation(population, **PRIVATE["central"])
        run(made, tmp_path / "run")
        told = pq.read_table(tmp_path / "run" / "rounds.parquet")["epsilon"].to_pylist()
        assert all(one < other for one, other in pairwise(told))
        assert made.promise is not None
        assert told[-1] == made.promise.epsilon(Ledger(tmp_path / "run" / "ledger.jsonl").entries)
        run(federation(population), tmp_path / "plain")
        assert not (tmp_path / "plain" / "ledger.jsonl").exists()

    @pytest.mark.parametrize("mechanism", ["central", "local", "example"])
    def test_the_budget_stops_before_the_round_that_would_exceed_it(
        self, mechanism: str, population: Population, tmp_path: Path
    ) -> None:
        privacy = {**CENTRAL, "mechanism": mechanism, "noise_multiplier": 2.0}
        free = federation(population, rounds=6, privacy=privacy)
        assert free.promise is not None
        budget = free.promise.epsilon_after(3)
        assert budget is not None
        made = federation(population, rounds=6, privacy={**privacy, "budget": budget * (1 + 1e-9)})
        rows: list[Any] = []
        with pytest.raises(PolicyStop) as stop:
            run(made, tmp_path / "run", observe=lambda row, _: rows.append(row))
        assert stop.value.exit_code == 4
        assert "3 rounds are kept" in stop.value.line()
        assert "noise_multiplier" in stop.value.line()
        assert [row["round"] for row in rows] == charged(tmp_path / "run") == [1, 2, 3]
        with pytest.raises(PolicyStop):  # and again, without another charge
            run(made, tmp_path / "run")
        assert charged(tmp_path / "run") == [1, 2, 3]

    def test_what_was_released_twice_counts_twice_against_the_budget(
        self, population: Population, tmp_path: Path
    ) -> None:
        """Fresh noise, and a crash after each charge: rounds done fewer than the budget allows."""
        privacy = {**CENTRAL, "mechanism": "local", "noise_multiplier": 2.0}
        free = federation(population, rounds=6, privacy=privacy)
        assert free.promise is not None
        budget = free.promise.epsilon_after(3)
        assert budget is not None
        engine = LocalEngine(population, 1)

        class Real:
            def run_clients(self, plan: RoundPlan, head: Any) -> Any:
                assert plan.noise_keys is None
                return [do_task(population, head, plan, secure=True)]

            def evaluate(self, head: Any, clients: Any) -> Any:
                return engine.evaluate(head, clients)

        asked = {**privacy, "budget": budget * 1.001}
        made = replace(federation(population, Real(), rounds=6, privacy=asked), noise="system")
        child = os.fork()
        if child == 0:
            os.environ["FEDTL_FAIL"] = "after_train:kill:2"
            try:
                run(made, tmp_path / "run")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(PolicyStop, match="round 3 would bring"):
            run(made, tmp_path / "run")
        assert charged(tmp_path / "run") == [1, 2, 2]

    def test_a_round_below_its_quorum_costs_nothing(
        self, population: Population, tmp_path: Path
    ) -> None:
        absent = [{"round": 2, "clients": ["client-0", "client-1"]}]
        made = federation(
            population, participation={"quorum": 4, "absent": absent}, privacy=CENTRAL
        )
        run(made, tmp_path / "run")
        assert charged(tmp_path / "run") == [1, 3, 4]

    def test_noise_at_the_clients_is_charged_before_it_is_made(
        self, population: Population, tmp_path: Path
    ) -> None:
        engine = LocalEngine(population, 1)
        found: list[list[int]] = []

        class Watched:
            def run_clients(self, plan: RoundPlan, head: Any) -> Any:
                found.append(charged(tmp_path / "run"))
                return engine.run_clients(plan, head)

            def evaluate(self, head: Any, clients: Any) -> Any:
                return engine.evaluate(head, clients)

        absent = [{"round": 2, "clients": ["client-1"]}]
        privacy = {**CENTRAL, "mechanism": "local"}
        made = federation(population, Watched(), privacy=privacy, participation={"absent": absent})
        run(made, tmp_path / "run")
        assert found == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
        entries = Ledger(tmp_path / "run" / "ledger.jsonl").entries
        assert entries[0].clients == (0, 1, 2, 3, 4)
        assert entries[1].clients == (0, 2, 3, 4)  # who was away made no noise


class TestCohorts:
    def test_coins_are_independent_and_fair(self) -> None:
        """1,000 clients, 200 rounds at 0.3: sizes and each client's turns within 6 deviations."""
        cohorts = [poisson_cohort(1, t, 1000, 0.3) for t in range(1, 201)]
        sizes = np.array([len(c) for c in cohorts])
        assert abs(sizes.mean() - 300) < 6 * (210 / 200) ** 0.5
        assert 0.6 < sizes.var() / 210 < 1.6
        turns = np.bincount(np.concatenate(cohorts), minlength=1000)
        assert np.abs(turns - 60).max() < 6 * 42**0.5
        assert all((np.diff(c) > 0).all() for c in cohorts)
        assert np.array_equal(poisson_cohort(1, 5, 1000, 0.3), cohorts[4])
        assert len(poisson_cohort(1, 1, 9, 1.0)) == 9

    @pytest.mark.parametrize(("clients", "size"), [(10, 3), (12, 4), (5, 5), (7, 1)])
    def test_everybody_has_one_turn_in_each_turn_of_all(self, clients: int, size: int) -> None:
        turn = -(-clients // size)
        cohorts = [cyclic_cohort(4, t, clients, size).tolist() for t in range(1, 2 * turn + 1)]
        assert sorted(chain(*cohorts[:turn])) == [*range(clients)]
        assert cohorts[:turn] == cohorts[turn:]
        assert max(map(len, cohorts)) == size

    def test_the_promise_counts_the_cohorts_that_are_drawn(self, population: Population) -> None:
        for sampling in ("poisson", "fixed", "cyclic"):
            made = federation(
                population, rounds=9, clients={"fraction": 0.4},
                privacy={**CENTRAL, **ARITHMETIC, "sampling": sampling},
            )  # fmt: skip
            assert made.promise is not None
            turns = np.zeros(5, np.int64)
            for round in range(1, 10):
                state = made.strategy.init(made.head, 5)
                plan = plan_round(made.scenario, 5, made.strategy, state, round)
                turns[plan.clients] += 1
            assert np.array_equal(made.promise._turns(9), turns)


def first_plan(made: Federation) -> RoundPlan:
    clients = made.roster.num_clients
    state = made.strategy.init(made.head, clients)
    return plan_round(made.scenario, clients, made.strategy, state, 1)
