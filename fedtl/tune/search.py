"""A search over named keys by Optuna, judged by the clients' own validation parts.

Trials are drawn by a tree-structured Parzen estimator (TPE, Bergstra et al. 2011) and ended early
where they are below the median of the others at the same round. Each trial's draw has a stream of
its own, so a search that was interrupted, or is given more trials, goes on as if it had never
stopped. The first trial is the scenario as it stands, where its values are among those searched.
Where there are no more combinations than trials, each is tried once instead.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from fedtl import seeding
from fedtl.errors import EnvironmentFault, InputError, Interrupted, PolicyStop
from fedtl.interrupts import Interrupts
from fedtl.results.files import write_atomic
from fedtl.scenario.load import load_scenario
from fedtl.scenario.schema import Scenario
from fedtl.tune.space import Dimension, check_space
from fedtl.tune.validation import FRACTION, Trials, plain
from fedtl.types import ClientUpdates

STUDY = "study.json"
JUDGED_BY = (
    f"{100 * FRACTION:.0f} % of each client's training examples, kept out of training; nobody's "
    "test examples were looked at"
)
UNPRUNED = 4
"""Trials before any is ended early."""


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: 0 for the first.
        values: of the searched keys.
        state: "complete", "pruned" (ended early) or "failed".
        accuracy: of the shared head on all validation parts together, after the last round it had.
        rounds: the same after each round.
        reason: why it failed.
    """

    number: int
    values: Mapping[str, Any]
    state: str
    accuracy: float | None
    rounds: Sequence[float] = ()
    seconds: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class Asked:
    """A search as it was asked for.

    Attributes:
        name, overrides, engine: of the scenario, as on the command line.
        space: what is searched.
        trials: how many in all.
    """

    name: str
    overrides: Sequence[str]
    engine: str | None
    space: Sequence[Dimension]
    trials: int

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """Every combination, where there are no more than trials; empty where there are."""
        choices = [one.choices for one in self.space]
        if not all(choices) or prod(map(len, choices)) > self.trials:
            return []
        keys = [one.key for one in self.space]
        return [dict(zip(keys, values, strict=True)) for values in product(*choices)]

    @property
    def total(self) -> int:
        """Trials there will be."""
        return len(self.combinations) or self.trials

    def scenario(self, values: Mapping[str, Any]) -> Scenario:
        """The scenario of a trial."""
        given = [one.setting(values[one.key]) for one in self.space]
        return plain(load_scenario(self.name, [*self.overrides, *given], engine=self.engine))


@dataclass
class Search:
    """A search and what is done of it; ``path`` holds it as JSON after every trial."""

    asked: Asked
    base: Scenario
    path: Path
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The first trial with the highest accuracy; None where none is complete."""
        whole = [one for one in self.trials if one.state == "complete"]
        return max(whole, key=lambda one: one.accuracy or 0.0, default=None)

    def settings(self, trial: Trial) -> list[str]:
        """A trial's values as ``--set`` takes them."""
        return [one.setting(trial.values[one.key]) for one in self.asked.space]

    @property
    def facts(self) -> dict[str, Any]:
        """Plain JSON values."""
        best = self.best
        return {
            **self._identity(),
            "name": self.base.name,
            "judged_by": JUDGED_BY,
            "trials": [asdict(one) for one in self.trials],
            "best": None if best is None else {**asdict(best), "set": self.settings(best)},
        }

    def save(self) -> None:
        """What is done so far."""
        write_atomic(self.path / STUDY, (json.dumps(self.facts, indent=2) + "\n").encode())

    def load(self) -> None:
        """Trials of the same search that were done before.

        Raises:
            InputError: the folder holds another search, or something else.
        """
        file = self.path / STUDY
        if not file.is_file():
            return
        try:
            told = json.loads(file.read_text())
            same = {key: told[key] for key in self._identity()} == self._identity()
            trials = [Trial(**one) for one in told["trials"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                "not a search of fedtl", where=file, do="Give another folder with --out"
            ) from error
        if not same:
            raise InputError(
                "this folder holds a search over other values, or of another scenario",
                where=self.path,
                do="Give another folder with --out",
            )
        self.trials = trials

    def _identity(self) -> dict[str, Any]:
        over = {one.key: list(one.ends) if one.choices else one.words for one in self.asked.space}
        return {"scenario_hash": self.base.hash(), "over": over, "fraction": FRACTION}


def optuna_here() -> Any:
    """Optuna, silent. Raises EnvironmentFault where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise EnvironmentFault(
            "a search needs Optuna, which is not installed", do="Type 'uv sync --extra tune'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def run_search(
    asked: Asked,
    path: Path | None,
    interrupts: Interrupts,
    begun: Callable[[Search], None],
    done: Callable[[Search, Trial], None],
    extracting: Callable[[int, int], None] = lambda done, total: None,
) -> Search:
    """Search, or go on with a search that is in the folder already.

    Args:
        path: default ``tunes/<scenario>-<the search's hash>``.
        begun: called before the first trial.
        done: called after each trial, which is saved by then.

    Raises:
        InputError: values that are not allowed, all at once; another search's folder; no trial that
            could be judged.
        EnvironmentFault: Optuna is not there.
        Interrupted: what is done is kept; the same command goes on.
    """
    optuna = optuna_here()
    base = check_space(asked.name, asked.overrides, asked.engine, asked.space)
    search = Search(asked, base, path or _folder(asked, base))
    search.load()
    search.path.mkdir(parents=True, exist_ok=True)
    interrupts.hint = f"Type the same command again to go on; what is done is in {search.path}"
    begun(search)
    trials = Trials(search.path, interrupts, extracting)
    with _silent(optuna):
        pruner = optuna.pruners.MedianPruner(UNPRUNED, max(1, base.rounds // 4))
        study = optuna.create_study(direction="maximize", pruner=pruner)
        for one in search.trials:
            study.add_trial(_frozen(optuna, asked, one))
        every = asked.combinations
        while (number := len(search.trials)) < asked.total:
            seed = seeding.key(base.seed, "tune", number) % 2**32
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            if every:
                study.enqueue_trial(every[number])
            elif number == 0 and (own := _own_values(asked, base)) is not None:
                study.enqueue_trial(own)
            drawn = study.ask()
            values = {one.key: one.suggested(drawn) for one in asked.space}
            try:
                trial = _tried(search, number, values, drawn, trials)
            except Interrupted as stop:
                stop.what = f"interrupted after {number} of {asked.total} trials"
                raise
            state = getattr(optuna.trial.TrialState, _STATES[trial.state])
            study.tell(drawn, trial.accuracy if trial.state == "complete" else None, state=state)
            search.trials.append(trial)
            search.save()
            done(search, trial)
            interrupts.check(f"interrupted after {number + 1} of {asked.total} trials")
    if search.best is None:
        raise InputError(
            "no trial came to its end",
            where=search.path / STUDY,
            got=next((one.reason for one in search.trials if one.reason), "no trial"),
        )
    return search


_STATES = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}


class _Pruned(Exception):
    """This trial is worse than the others were by now."""


def _tried(
    search: Search, number: int, values: Mapping[str, Any], drawn: Any, trials: Trials
) -> Trial:
    """One trial from its start to its end; the same values again are not trained again."""
    for one in search.trials:
        if one.values == values:
            return replace(one, number=number, seconds=0.0)
    rounds: list[float] = []

    def observe(row: Mapping[str, Any], updates: ClientUpdates) -> None:
        if row["accuracy"] is None:
            raise InputError(
                "a search goes by the shared head's accuracy, and here only clients' own heads "
                "have one",
                where="strategy.name",
                got=repr(search.base.strategy.name),
            )
        rounds.append(float(row["accuracy"]))
        drawn.report(rounds[-1], row["round"])
        if drawn.should_prune():
            raise _Pruned

    began, state, reason = time.perf_counter(), "complete", None
    try:
        trials.run(search.asked.scenario(values), observe)
    except _Pruned:
        state = "pruned"
    except PolicyStop as error:
        state, reason = "failed", error.what
    except InputError as error:  # of combinations that only the data can tell
        if not rounds and not any(one.rounds for one in search.trials):
            raise
        state, reason = "failed", error.what
    seconds = round(time.perf_counter() - began, 3)
    accuracy = rounds[-1] if rounds and state != "failed" else None
    return Trial(number, values, state, accuracy, rounds, seconds, reason)


def _frozen(optuna: Any, asked: Asked, one: Trial) -> Any:
    """A trial that is done, for Optuna."""
    return optuna.trial.create_trial(
        state=getattr(optuna.trial.TrialState, _STATES[one.state]),
        value=one.accuracy if one.state == "complete" else None,
        params=dict(one.values),
        distributions={each.key: each.distribution() for each in asked.space},
        intermediate_values={i + 1: accuracy for i, accuracy in enumerate(one.rounds)},
    )


def _own_values(asked: Asked, base: Scenario) -> dict[str, Any] | None:
    """The scenario's own values, where all are among those searched."""
    content, found = base.model_dump(mode="json"), {}
    for one in asked.space:
        value: Any = content
        for part in one.key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if one.choices:
            inside = value in one.choices
        else:
            inside = isinstance(value, (int, float)) and one.low <= value <= one.high
        if not inside:
            return None
        found[one.key] = value
    return found


def _folder(asked: Asked, base: Scenario) -> Path:
    """Where this search is found again by the same command."""
    over = "/".join(f"{one.key}={one.words}" for one in asked.space)
    return Path("tunes") / f"{base.name}-{seeding.key(0, base.hash() + over) % 16**8:08x}"


@contextmanager
def _silent(optuna: Any) -> Iterator[None]:
    """Without Optuna's remarks on what is new in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
