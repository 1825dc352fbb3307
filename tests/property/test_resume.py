"""Whatever happens on the way - stops, damage, torn records - the end is the unbroken run's."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedtl.engines import LocalEngine
from fedtl.errors import Interrupted
from fedtl.interrupts import Interrupts
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.scenario.schema import Scenario
from fedtl.strategies import make_strategy
from fedtl.types import Population, Rows

ROUNDS = 6


def federation() -> Federation:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4)).astype(np.float32)
    labels = rng.integers(0, 2, 60).astype(np.int32)
    train = Rows(np.arange(45), np.array([0, 10, 15, 45]))
    test = Rows(np.arange(45, 60), np.array([0, 5, 10, 15]))
    people = Population(features, labels, ("a", "b"), train, test, ("p", "q", "r"), ("",) * 3)
    scenario = Scenario.model_validate(
        {
            "name": "x",
            "rounds": ROUNDS,
            "clients": {"fraction": 0.67},
            "training": {"local_epochs": 1, "batch_size": 4},
            "strategy": {"name": "fedyogi"},
        }
    )
    head = {"weight": np.zeros((2, 4), np.float32), "bias": np.zeros(2, np.float32)}
    return Federation(
        scenario,
        people.roster(),
        head,
        make_strategy(scenario, people.names),
        LocalEngine(people, 1),
        {},
    )


class StopAfter(Interrupts):
    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.left = rounds

    def check(self, what: str = "", do: str | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted(what)


def outcome(folder: RunFolder, made: Federation, interrupts: Interrupts):
    state, progress = run_rounds(made, folder, lambda row, updates: None, interrupts)
    rows = folder.clients.read().to_pylist()
    return {n: t.tobytes() for n, t in state.head.items()}, progress.bytes_up, rows


class Life(RuleBasedStateMachine):
    """One run folder to which things happen."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.made = federation()
        whole = RunFolder.create(self.place / "whole", "")
        self.expected = outcome(whole, self.made, Interrupts())
        whole.release()
        RunFolder.create(self.place / "run", "").release()

    def teardown(self) -> None:
        folder = RunFolder.reopen(self.place / "run")
        assert outcome(folder, self.made, Interrupts()) == self.expected
        folder.release()
        shutil.rmtree(self.place)

    @property
    def commits(self) -> list[Path]:
        return sorted((self.place / "run" / "checkpoints").glob("*.safetensors"))

    @rule()
    def train_one_round_and_stop(self) -> None:
        self._train(1)

    @rule()
    def train_two_rounds_and_stop(self) -> None:
        self._train(2)

    def _train(self, rounds: int) -> None:
        folder = RunFolder.reopen(self.place / "run")
        try:
            run_rounds(self.made, folder, lambda row, updates: None, StopAfter(rounds))
        except Interrupted:
            pass
        finally:
            folder.release()

    @precondition(lambda self: len(self.commits) > 1)
    @rule()
    def damage_the_newest_commit(self) -> None:
        self.commits[-1].write_bytes(self.commits[-1].read_bytes()[:-1])

    @precondition(lambda self: len(self.commits) > 1)
    @rule()
    def lose_the_newest_manifest(self) -> None:
        self.commits[-1].with_suffix(".json").unlink(missing_ok=True)

    @precondition(lambda self: len(self.commits) > 0)
    @rule()
    def tear_the_records(self) -> None:
        for stream in ("rounds", "clients"):
            with open(self.place / "run" / "records" / f"{stream}.arrows", "ab") as file:
                file.write(b"torn")

    @invariant()
    def no_temporary_files(self) -> None:
        assert list(self.place.rglob("*.tmp")) == []


Life.TestCase.settings = settings(max_examples=15, stateful_step_count=8, deadline=None)
TestLife = Life.TestCase
