"""Leaving a client out from sums against leaving its rows out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtl.clients.statistics import statistics
from fedtl.engines import LocalEngine
from fedtl.errors import InputError, PolicyStop
from fedtl.evaluation.contributions import (
    contribution_table,
    forget_client,
    open_kept,
    squared_error,
    without,
)
from fedtl.evaluation.ridge import fit_ridge
from fedtl.interrupts import Interrupts
from fedtl.plans import RoundPlan, Statistics
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.scenario.load import dump_scenario
from fedtl.scenario.schema import Scenario
from fedtl.strategies import make_strategy
from fedtl.strategies.closed_form import ridge_weights
from fedtl.types import LocalTraining, Population, Rows

HEAD = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
RIDGE = 0.05


def sums_of(population: Population):
    clients = np.arange(population.num_clients)
    keys = np.zeros(len(clients), np.uint64)
    plan = RoundPlan(1, clients, keys, LocalTraining(1, 1, 0.1), task="statistics")
    got = statistics(population, HEAD, replace(plan, statistics=Statistics()))
    each = [{name: t[k] for name, t in got.tensors.items()} for k in clients]
    total = {name: sum(own[name] for own in each) for name in each[0]}
    return total, list(enumerate(each))


def rows_of(population: Population, clients: list[int]):
    rows = np.concatenate([population.train.of(k) for k in clients])
    z = np.c_[population.features[rows].astype(np.float64), np.ones(len(rows))]
    return z, np.eye(3)[population.labels[rows]]


def direct(population: Population, clients: list[int], ridge: float = RIDGE) -> np.ndarray:
    z, y = rows_of(population, clients)
    return np.linalg.solve(z.T @ z + ridge * np.eye(z.shape[1]), z.T @ y)


def error(weights: np.ndarray, population: Population, clients: list[int]) -> float:
    z, y = rows_of(population, clients)
    return float(np.square(z @ weights - y).sum())


def test_leaving_out_equals_training_without(population) -> None:
    total, clients = sums_of(population)
    for k, own in clients:
        left, _ = ridge_weights(without(total, own), RIDGE)
        others = [i for i in range(5) if i != k]
        np.testing.assert_allclose(left, direct(population, others), rtol=0, atol=1e-12)
        assert squared_error(left, own) == pytest.approx(error(left, population, [k]), rel=1e-12)


def test_the_table_says_what_each_client_gives_and_takes(population) -> None:
    table = contribution_table(*sums_of(population), RIDGE)
    whole = direct(population, list(range(5)))
    for k, row in enumerate(table):
        others = [i for i in range(5) if i != k]
        left = direct(population, others)
        own, rest = int(population.train.counts[k]), 124 - int(population.train.counts[k])
        assert (row.client, row.examples) == (k, own)
        wanted = [
            error(whole, population, [k]) / own,
            error(left, population, [k]) / own,
            error(whole, population, others) / rest,
            error(left, population, others) / rest,
        ]
        got = [row.own_error, row.own_error_without, row.others_error, row.others_error_without]
        np.testing.assert_allclose(got, wanted, rtol=1e-11)
        # The head with a client fits it no worse than the head without it, and the others no better
        # (up to the ridge): both are optima of their own sums.
        assert row.gain_own > 0
        assert row.gain_others < 1e-3


def test_a_client_alone_contributes_everything(population) -> None:
    alone = replace(population, train=Rows(np.arange(30), np.array([0, 30])), names=("a",))
    (row,) = contribution_table(*sums_of(alone), RIDGE)
    assert row.own_error_without == pytest.approx(1.0)  # W = 0 errs by |y|^2
    assert np.isnan(row.others_error)


def test_the_pooled_ridge_is_the_solution_over_everybodys_rows(population) -> None:
    head = fit_ridge(population, HEAD, RIDGE)
    want = direct(population, list(range(5)))
    np.testing.assert_allclose(head["weight"], want[:-1].T, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(head["bias"], want[-1], rtol=1e-5, atol=1e-7)
    again = fit_ridge(population, HEAD, RIDGE, threads=3)
    assert all(again[name].tobytes() == head[name].tobytes() for name in head)


def federation(population: Population, **strategy: object) -> Federation:
    scenario = Scenario.model_validate(
        {
            "name": "x",
            "rounds": 6,
            "clients": {"fraction": 0.6},
            "strategy": {"name": "fed3r", **strategy},
        }
    )
    made = make_strategy(scenario, population.names)
    engine = LocalEngine(population, 1)
    return Federation(scenario, population.roster(), HEAD, made, engine, {"who": "me"})


def finished_run(population: Population, path: Path, **strategy: object):
    given = federation(population, **strategy)
    folder = RunFolder.create(path, dump_scenario(given.scenario))
    with Interrupts() as interrupts:
        state, _ = run_rounds(given, folder, lambda row, updates: None, interrupts)
    folder.write_head(state.result, {"classes": "a"})
    folder.release()
    return state


def test_a_run_forgets_a_client_exactly(population, tmp_path) -> None:
    state = finished_run(population, tmp_path / "run", normalise=False, temperature=1.0)
    assert state.slots["reported"].tolist() == [1] * 5
    before = (tmp_path / "run" / "head.safetensors").read_bytes()
    path = forget_client(tmp_path / "run", "client-2")
    assert path.name == "head-without-client-2.safetensors"
    left, want = load_file(path), direct(population, [0, 1, 3, 4], 0.01)
    np.testing.assert_allclose(left["weight"], want[:-1].T, rtol=1e-6, atol=1e-7)
    assert (tmp_path / "run" / "head.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="client-3"):
        forget_client(tmp_path / "run", "client-33")


def test_what_is_left_in_float64_is_what_was_never_there(population, tmp_path) -> None:
    finished_run(population, tmp_path / "run")
    run = open_kept(tmp_path / "run")
    total, clients = sums_of(population)
    kept = dict(run.clients())
    assert list(kept) == [0, 1, 2, 3, 4]
    for name in total:
        assert all(kept[k][name].tobytes() == own[name].tobytes() for k, own in clients)
        never = sum(own[name] for k, own in clients if k != 2)
        np.testing.assert_allclose(
            without(run.total, kept[2])[name], never, rtol=0, atol=1e-12 * np.abs(never).max()
        )
    assert [row.client for row in run.contributions()] == [0, 1, 2, 3, 4]


def test_a_run_that_kept_nothing_says_so(population, tmp_path) -> None:
    finished_run(population, tmp_path / "run", keep_statistics=False)
    assert not (tmp_path / "run" / "statistics").exists()
    with pytest.raises(InputError, match="kept no statistics"):
        forget_client(tmp_path / "run", "client-1")


def test_the_last_client_cannot_be_forgotten(population, tmp_path) -> None:
    alone = replace(
        population,
        train=Rows(np.arange(30), np.array([0, 30])),
        test=Rows(np.arange(8), np.array([0, 8])),
        names=("only",),
        domains=("",),
    )
    finished_run(alone, tmp_path / "run")
    with pytest.raises(InputError, match="nobody would be left"):
        forget_client(tmp_path / "run", "only")


def test_statistics_survive_an_interruption(population, tmp_path, monkeypatch) -> None:
    given = federation(population)
    whole = finished_run(population, tmp_path / "unbroken")
    folder = RunFolder.create(tmp_path / "run", dump_scenario(given.scenario))

    class Stop(Exception):
        pass

    def stop(row: object, updates: object) -> None:
        raise Stop

    with Interrupts() as interrupts, pytest.raises(Stop):
        run_rounds(given, folder, stop, interrupts)
    folder.release()
    folder = RunFolder.reopen(tmp_path / "run")
    with Interrupts() as interrupts:
        state, _ = run_rounds(given, folder, lambda row, updates: None, interrupts)
    folder.release()
    assert state.head["weight"].tobytes() == whole.head["weight"].tobytes()
    assert list(dict(open_kept(tmp_path / "run").clients())) == [0, 1, 2, 3, 4]


def test_a_cohort_of_liars_stops_the_run(population, tmp_path) -> None:
    given = federation(population)

    class Liars(LocalEngine):
        def run_clients(self, plan, head):
            (reply,) = super().run_clients(plan, head)
            reply.tensors["sums"][:] *= 3
            return [reply]

    lying = replace(given, engine=Liars(population, 1))
    folder = RunFolder.create(tmp_path / "run", dump_scenario(given.scenario))
    with Interrupts() as interrupts, pytest.raises(PolicyStop, match="statistics: "):
        run_rounds(lying, folder, lambda row, updates: None, interrupts)
    folder.release()
    assert not (tmp_path / "run" / "statistics").exists()
