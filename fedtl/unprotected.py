"""The same training without differential privacy: what the protection cost in accuracy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from fedtl.build import ENGINES, Built
from fedtl.clients.personal_store import PersonalStore
from fedtl.interrupts import Interrupts
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.scenario.load import dump_scenario
from fedtl.scenario.privacy import Privacy
from fedtl.scenario.schema import Engine, Scenario
from fedtl.strategies import make_strategy
from fedtl.types import Head


def without_privacy(scenario: Scenario) -> Scenario:
    """The scenario with nothing clipped, noised or masked, in this process, judged once."""
    engine = Engine.model_validate(
        {**scenario.engine.model_dump(include={"device", "threads", "block_size"}), "kind": "local"}
    )
    judged = scenario.evaluation.model_copy(update={"every": scenario.rounds})
    plain = {"privacy": Privacy(), "engine": engine, "evaluation": judged}
    return scenario.model_copy(update=plain)


def train_unprotected(built: Built, check: Callable[[], None]) -> Head:
    """The head that the scenario's training ends with where nothing is protected.

    Every client's examples take part, canaries too. What it writes on the way is thrown away.

    Args:
        built: the protected federation and everybody's true data.
        check: called after each round; it raises to stop.
    """
    protected, roster = built.federation, built.population.roster()
    scenario = without_privacy(protected.scenario)
    with TemporaryDirectory(prefix="fedtl-unprotected-") as place:
        store = PersonalStore(Path(place) / "personal")
        engine = ENGINES["local"](scenario, built.population, store)
        strategy = make_strategy(scenario, roster.names)
        federation = Federation(
            scenario, roster, protected.head, strategy, engine, protected.identity
        )
        folder = RunFolder.create(Path(place) / "run", dump_scenario(scenario))
        try:
            with closing(engine):
                engine.start(federation.head)
                state, _ = run_rounds(
                    federation, folder, lambda row, updates: check(), Interrupts()
                )
        finally:
            folder.release()
    return state.result
