"""Heads trained as the audited one was, on other draws of who is in: what an attacker can make.

``shadow_head`` repeats the whole federation, with its strategy and its clipping but without noise
and with streams of its own: the cohorts and batches of the audited run stay the secret for which
the account of epsilon takes them. ``half_sums`` is the quick way where the head follows from sums:
rows are dealt to a few groups, their sums are made once, each head is solved from half the groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.audit.reopened import Reopened
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.statistics import statistics
from fedtl.engines import LocalEngine
from fedtl.interrupts import Interrupts
from fedtl.planning import cohort_size, liars_of
from fedtl.results.runs import RunFolder
from fedtl.rounds import run_rounds
from fedtl.strategies import make_strategy
from fedtl.strategies.class_means import FedLDA, FedNCM
from fedtl.strategies.closed_form import AFL, Fed3R, OneShot
from fedtl.types import Head, Int64, Population, Rows

Mask = npt.NDArray[np.bool_]

GROUPS = 16
"""Into which rows are dealt: 12,870 different halves, and as many matrices in memory."""

SOLVED_MOST, SOLVED_FEWEST = 256, 64
"""Shadow heads from sums; fewer where features are wide, as a solve grows with their cube."""

SOLVED_WIDTH = 500
"""Features up to which there are most."""

TRAINED_MOST, TRAINED_FEWEST = 16, 4
"""Shadow federations."""

TRAINED_WORK = 2e11
"""Products of a weight and a feature in all shadow federations together: about a minute."""


def shadow_head(run: Reopened, population: Population, number: int, interrupts: Interrupts) -> Head:
    """The head that the run's federation trains on another population, without noise.

    Args:
        population: as ``run.trained``, with other training rows.
        number: of the shadow: its own cohorts and batches.
    """
    quiet, own = run.quiet, run.scenario
    lying = liars_of(own, population.names).tolist()
    attack = own.attack.model_copy(update={"clients": [population.names[k] for k in lying]})
    evaluation = quiet.scenario.evaluation.model_copy(update={"every": own.rounds})
    seed = seeding.key(own.seed, "shadows", number) % 2**32
    promise = None if quiet.promise is None else replace(quiet.promise, seed=seed)
    changed = {
        "seed": seed,
        "attack": attack if lying else own.attack,
        # other cohorts than the run's must not stop for want of answers
        "participation": own.participation.model_copy(update={"quorum": 0}),
        "evaluation": evaluation,
    }
    with TemporaryDirectory(prefix="fedtl-audit-") as name:
        store = PersonalStore(Path(name) / "personal")
        engine = LocalEngine(
            population, run.threads, "cpu", quiet.scenario.engine.block_size, store
        )
        folder = RunFolder.create(Path(name) / "run", "")
        federation = replace(
            quiet,
            scenario=quiet.scenario.model_copy(update=changed),
            roster=population.roster(),
            engine=engine,
            promise=promise,
        )
        try:
            state, _ = run_rounds(federation, folder, lambda row, updates: None, interrupts)
        finally:
            folder.release()
    return state.result


def affordable(run: Reopened) -> int:
    """Shadow federations that are trained: an even number, 0 where they would take too long."""
    scenario, population = run.scenario, run.population
    if "weight" not in run.head:
        return 0
    rounds = int(run.summary.get("rounds_completed", scenario.rounds))
    answers = rounds * cohort_size(scenario, population.num_clients)
    visits = answers * scenario.training.local_epochs * float(population.train.counts.mean())
    each = max(1.0, visits * sum(tensor.size for tensor in run.head.values()))
    number = min(TRAINED_MOST, int(TRAINED_WORK / each))
    return number - number % 2 if number >= TRAINED_FEWEST else 0


def solves_from_sums(run: Reopened) -> OneShot | None:
    """The strategy without its protections, where its head is quickly solved from sums."""
    plain = run.scenario.privacy.model_copy(
        update={"mechanism": "none", "secure_aggregation": "none", "epsilon": None}
    )
    scenario = run.scenario.model_copy(update={"privacy": plain})
    strategy = make_strategy(scenario, run.population.names)
    return strategy if isinstance(strategy, Fed3R | AFL | FedNCM | FedLDA) else None


def halves(run: Reopened, interrupts: Interrupts) -> Iterator[tuple[Head, Mask]]:
    """Shadow heads, each with the rows of the feature matrix that it was trained on, bool [N].

    Two after the other share all training and test rows of all clients between them.
    """
    strategy = solves_from_sums(run)
    if strategy is not None:
        yield from half_sums(run, strategy, interrupts)
        return
    true, trained = run.population, run.trained
    for number in range(affordable(run) // 2):
        stream = seeding.generator(run.scenario.seed, "shadow_halves", number)
        inside = np.zeros(len(true.labels), np.bool_)
        pools = [np.concatenate([true.train.of(k), true.test.of(k)]) for k in _clients(true)]
        for pool in pools:
            inside[stream.permutation(pool)[: (len(pool) + 1) // 2]] = True
        for side, mask in enumerate((inside, ~inside)):
            own = [pool[mask[pool]] for pool in pools]
            some = replace(trained, train=as_rows(own))
            interrupts.check("interrupted while shadow heads were trained")
            yield shadow_head(run, some, 2 * number + side, interrupts), mask


def half_sums(
    run: Reopened, strategy: OneShot, interrupts: Interrupts
) -> Iterator[tuple[Head, Mask]]:
    """The same from sums of groups."""
    true, seed = run.population, run.scenario.seed
    pool = np.concatenate([true.train.index, true.test.index])
    group = np.full(len(true.labels), -1)
    dealt = seeding.generator(seed, "shadow_groups").permutation(len(pool)) % GROUPS
    group[pool] = dealt
    rows = as_rows([np.sort(pool[dealt == g]) for g in range(GROUPS)])
    grouped = replace(run.trained, train=rows, names=("",) * GROUPS, domains=("",) * GROUPS)
    state = strategy.init(run.built.federation.head, GROUPS)
    nobody = strategy.question()
    everybody = np.arange(GROUPS)
    plan = replace(nobody, clients=everybody, batch_keys=everybody.astype(np.uint64))
    sums = statistics(grouped, state.head, plan, threads=run.threads).tensors
    for number in range(_solves(run, strategy)):
        interrupts.check("interrupted while shadow heads were solved")
        stream = seeding.generator(seed, "shadow_halves", number // 2)
        chosen = stream.permutation(GROUPS)
        mine = np.sort(chosen[: GROUPS // 2] if number % 2 == 0 else chosen[GROUPS // 2 :])
        added = {name: tensor[mine].sum(axis=0) for name, tensor in sums.items()}
        half = replace(state, slots={**state.slots, **added})
        yield strategy.solve(half).head, np.isin(group, mine)


def _solves(run: Reopened, strategy: OneShot) -> int:
    width = strategy.asked().width(run.trained.features.shape[1])
    if isinstance(strategy, AFL):  # half the rows may have no inverse, and then it takes long
        return TRAINED_MOST
    return int(np.clip(SOLVED_MOST * (SOLVED_WIDTH / width) ** 3, SOLVED_FEWEST, SOLVED_MOST))


def as_rows(parts: list[Int64]) -> Rows:
    """Rows of some clients, ascending within each."""
    ends = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return Rows(np.concatenate([np.sort(part) for part in parts]).astype(np.int64), ends)


def _clients(population: Population) -> range:
    return range(population.num_clients)
