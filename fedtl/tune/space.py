"""What is searched over: keys of a scenario with the values they may take."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fedtl.errors import InputError, Problem, ScenarioError
from fedtl.scenario.load import load_scenario
from fedtl.scenario.schema import Scenario

SEARCHED = (
    "rounds", "training", "head", "strategy", "adaptation", "augmentation", "transfer", "backbone",
    "compression",
)  # fmt: skip
"""Keys and tables that say how something is trained."""

LOG_FROM = 10.0
"""Ranges that span this factor are searched by their logarithm, unless told otherwise."""

DIGITS = 3
"""Significant digits of a number from a range: more would only look exact."""


@dataclass(frozen=True)
class Dimension:
    """One key and its values: some choices, or a range.

    Attributes:
        choices: empty for a range.
        low, high: of a range, both included; whole numbers where both are.
        log: a range is searched by its logarithm.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether a range has whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that are allowed if all are."""
        return self.choices or (self.low, self.high)

    @property
    def words(self) -> str:
        """The values, for people."""
        if self.choices:
            return ", ".join(map(json.dumps, self.choices))
        scale = "log" if self.log else "linear"
        return f"{self.low:g} to {self.high:g}, {scale}"

    def setting(self, value: Any) -> str:
        """What ``--set`` takes."""
        return f"{self.key}={json.dumps(value)}"

    def suggested(self, trial: Any) -> Any:
        """The value that an Optuna trial has for it."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.whole:
            return trial.suggest_int(self.key, self.low, self.high, log=self.log)
        found = trial.suggest_float(self.key, self.low, self.high, log=self.log)
        return min(max(float(f"{found:.{DIGITS}g}"), self.low), self.high)

    def distribution(self) -> Any:
        """The same for trials that are done."""
        from optuna import distributions

        if self.choices:
            return distributions.CategoricalDistribution(self.choices)
        if self.whole:
            return distributions.IntDistribution(int(self.low), int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)


def read_dimension(text: str) -> Dimension:
    """``KEY=LOW:HIGH``, ``KEY=LOW:HIGH:log`` (or ``linear``), or ``KEY=A,B,C``.

    Raises:
        InputError: none of these.
    """
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not key or not values:
        raise _malformed(text)
    parts = values.split(":")
    numbers = [_value(part) for part in parts[:2]]
    if len(parts) in (2, 3) and all(type(number) in (int, float) for number in numbers):
        low, high = numbers
        scale = parts[2].strip() if len(parts) == 3 else None
        wide = low > 0 and high / low >= LOG_FROM
        if not low < high or scale not in (None, "log", "linear") or (scale == "log" and low <= 0):
            raise _malformed(text)
        return Dimension(key, (), low, high, scale == "log" or (scale is None and wide))
    choices = tuple(dict.fromkeys(map(_value, values.split(","))))
    if len(parts) > 1 or not all(isinstance(one, (str, int, float, bool)) for one in choices):
        raise _malformed(text)
    return Dimension(key, choices)


def _malformed(text: str) -> InputError:
    return InputError(
        "not a key with values to search",
        where="--over",
        got=repr(text[:80]),
        allowed="KEY=LOW:HIGH, KEY=LOW:HIGH:log (LOW above 0), KEY=LOW:HIGH:linear, or KEY=A,B,C",
        do="e.g. --over training.learning_rate=0.001:1 --over training.local_epochs=1,2,5",
    )


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def check_space(
    name: str, overrides: Sequence[str], engine: str | None, space: Sequence[Dimension]
) -> Scenario:
    """The scenario itself, once every value of every key is known to be allowed.

    Raises:
        InputError: nothing to search over, or a key twice.
        ScenarioError: all problems at once.
    """
    base = load_scenario(name, overrides, engine=engine)
    keys = [one.key for one in space]
    if not keys or len(set(keys)) != len(keys):
        twice = next((key for key in keys if keys.count(key) > 1), None)
        raise InputError(
            "the same key twice" if twice else "nothing to search over",
            where="--over",
            got=twice,
            do="Give --over KEY=VALUES for each key, or --lr for a learning-rate range test",
        )
    problems = [_fixed(one) for one in space if _is_fixed(one.key)]
    first = {one.key: one.setting(one.ends[0]) for one in space if not _is_fixed(one.key)}
    free = [one for one in space if one.key in first]
    for changed in chain([{}], ({o.key: o.setting(v)} for o in free for v in o.ends[1:])):
        given: Mapping[str, str] = {**first, **changed}
        try:
            load_scenario(name, [*overrides, *given.values()], engine=engine)
        except ScenarioError as error:
            problems += [one for one in error.problems if one not in problems]
    if problems:
        raise ScenarioError(f"{name}, --over", problems)
    return base


def _is_fixed(key: str) -> bool:
    table = key.partition(".")[0]
    return table in Scenario.model_fields and table not in SEARCHED


def _fixed(one: Dimension) -> Problem:
    return Problem(
        one.key,
        "says what is judged or where it runs, not how it is trained; trials with others could not "
        "be compared",
        allowed=", ".join(SEARCHED),
    )
