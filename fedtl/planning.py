"""A round before it runs: who trains, in what batch order, with what hyper-parameters.

Everything follows from the scenario and the seeded streams, so every engine and every resumed run
has the same plan. Flower's own sampling is unseeded and its node ids are random: it has no say.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fedtl import seeding
from fedtl.clients.attacks import liars
from fedtl.errors import client_of
from fedtl.plans import Compression, Personal, Protection, RoundPlan
from fedtl.scenario.schema import Scenario
from fedtl.strategies.base import ServerState, Strategy, personal_of
from fedtl.types import TAIL, ClientFailure, ClientUpdates, Float64, Int64, LocalTraining


def plan_round(
    scenario: Scenario,
    num_clients: int,
    strategy: Strategy,
    state: ServerState,
    round: int,
    *,
    seeded_noise: bool = True,
) -> RoundPlan:
    """The plan of a round (1 for the first), after the strategy has had its say.

    Args:
        seeded_noise: clients that add noise draw it from streams of the seed; real ones do not.
    """
    wanted = cohort_size(scenario, num_clients)
    size = min(num_clients, math.ceil(wanted * scenario.participation.over_selection))
    clients = _cohort(scenario, num_clients, round, size)
    keys = seeding.client_keys(scenario.seed, "batches", round, clients)
    needed = wanted if wanted < size else None
    training = local_training(scenario, round)
    if scenario.adaptation.prior == "balanced_softmax":  # only here: who trains alone is at home
        training = replace(training, prior_strength=scenario.adaptation.prior_strength)
    plan = RoundPlan(round, clients, keys, training, needed)
    plan = strategy.plan(state, plan)
    least = scenario.privacy.min_class_examples
    if plan.task == "statistics" and least > 1:
        gated = replace(plan.protection or Protection(), least_per_class=least)
        plan = replace(plan, protection=gated)
    own = plan.protection
    if own is not None and (own.noise or own.example_noise) and seeded_noise:
        streams = seeding.client_keys(scenario.seed, "noise", round, plan.clients)
        plan = replace(plan, noise_keys=streams)
    packing = scenario.compression
    if packing.kind == "none" or plan.task != "train":
        return plan
    packed = Compression(packing.kind, packing.fraction, packing.error_feedback)
    return replace(plan, compression=packed)


def local_training(scenario: Scenario, round: int) -> LocalTraining:
    """What a client does with its data in a round, before the strategy has its say.

    Behind the cut nothing is trained while the head warms up, and then one block more from the
    back every so many rounds, where the scenario has it so (gradual unfreezing, Howard and Ruder
    2018). What rests in a round travels all the same, unchanged.
    """
    section, transfer = scenario.training, scenario.transfer
    warm, every = round - transfer.warmup_rounds, transfer.unfreeze_every
    behind = transfer.mode != "head"
    return LocalTraining(
        section.local_epochs,
        section.batch_size,
        scheduled_rate(scenario, round),
        section.momentum,
        section.weight_decay,
        tail_rate=transfer.rate_factor if behind else 1.0,
        l2_pretrained=transfer.l2_pretrained if behind else 0.0,
        still=(TAIL,) if behind and warm < 1 else (),
        unfrozen=1 + (warm - 1) // every if behind and every and warm >= 1 else 0,
        label_smoothing=section.label_smoothing,
        mixup=section.mixup,
        dropout=section.dropout,
        noise=scenario.augmentation.noise,
        validation_fraction=section.validation_fraction,
        early_stopping=section.early_stopping,
    )


def training_at_end(scenario: Scenario) -> LocalTraining:
    """What a client does for itself after the last round, before ``plans.Personal`` has its say.

    It trains all that the last round does, and at the first round's rate: a schedule may have ended
    near zero, and a warm-up trains the head alone.
    """
    last = local_training(scenario, scenario.rounds)
    return replace(last, learning_rate=scheduled_rate(scenario, 1))


def personal_at_end(
    scenario: Scenario, strategy: Strategy, state: ServerState, num_classes: int
) -> Personal | None:
    """What each client makes of the last head for itself: by the strategy or by its own classes."""
    adaptation = scenario.adaptation
    if adaptation.prior == "logit_adjustment":
        return Personal("prior", scale=adaptation.prior_strength, choices=(0.0,) * num_classes)
    return Personal("bbse") if adaptation.prior == "bbse" else personal_of(strategy, state)


def cohort_size(scenario: Scenario, num_clients: int) -> int:
    """Clients whose updates a round shall have."""
    return max(1, round_half_up(scenario.clients.fraction * num_clients))


def drawn_by_coins(scenario: Scenario) -> bool:
    """Whether each client is in a round by a coin of its own, so that there may be none."""
    return scenario.privacy.mechanism == "central" and scenario.privacy.sampling == "poisson"


def _cohort(scenario: Scenario, num_clients: int, round: int, size: int) -> Int64:
    """A round's clients, in the way that its promise of privacy counts on."""
    if drawn_by_coins(scenario):
        return poisson_cohort(scenario.seed, round, num_clients, scenario.clients.fraction)
    if scenario.privacy.mechanism == "central" and scenario.privacy.sampling == "cyclic":
        return cyclic_cohort(scenario.seed, round, num_clients, size)
    return sample_cohort(scenario.seed, round, num_clients, size)


def sample_cohort(seed: int, round: int, num_clients: int, size: int) -> Int64:
    """Sorted ids of a round's clients, drawn without replacement from the seeded stream."""
    return _drawn(num_clients, size, seeding.generator(seed, "cohort", round))


def poisson_cohort(seed: int, round: int, num_clients: int, rate: float) -> Int64:
    """Sorted ids of a round's clients, each by a coin of its own; there may be none."""
    if rate >= 1:
        return np.arange(num_clients, dtype=np.int64)
    coins = seeding.generator(seed, "cohort", round).random(num_clients)
    return np.flatnonzero(coins < rate).astype(np.int64)


def cyclic_cohort(seed: int, round: int, num_clients: int, size: int) -> Int64:
    """Sorted ids of a round's clients: a seeded order of all, dealt out ``size`` at a time.

    Everybody has one turn in every ceil(K / size) rounds; the last turn may be smaller.
    """
    order = seeding.generator(seed, "cohort").permutation(num_clients)
    turn = (round - 1) % -(-num_clients // size)
    return np.sort(order[turn * size : (turn + 1) * size]).astype(np.int64)


def judged_clients(scenario: Scenario, num_clients: int) -> Int64:
    """The clients on whose test examples heads are judged, the same in every round."""
    size = max(1, round_half_up(scenario.evaluation.fraction * num_clients))
    return _drawn(num_clients, size, seeding.generator(scenario.seed, "judged"))


def _drawn(num_clients: int, size: int, stream: np.random.Generator) -> Int64:
    """``size`` of all clients without replacement, sorted; all where that many are wanted."""
    if size >= num_clients:
        return np.arange(num_clients, dtype=np.int64)
    return np.sort(stream.choice(num_clients, size, replace=False).astype(np.int64))


def round_half_up(value: float) -> int:
    """Nearest whole number; halves go up, as people expect of "10 % of 25"."""
    return math.floor(value + 0.5)


def scheduled_rate(scenario: Scenario, round: int) -> float:
    """The clients' learning rate in a round (1 for the first)."""
    section = scenario.training
    if section.schedule == "cosine":
        return section.learning_rate * 0.5 * (1 + math.cos(math.pi * (round - 1) / scenario.rounds))
    if section.schedule == "exponential":
        return float(section.learning_rate * section.decay ** (round - 1))
    return section.learning_rate


def scratch_rates(scenario: Scenario) -> list[float]:
    """Learning rates of the reference from_scratch, one per epoch: the clients', over its epochs.

    By default as many epochs as the clients have local ones in all rounds.
    """
    planned = scenario.rounds * scenario.training.local_epochs
    epochs = scenario.evaluation.scratch_epochs or planned
    rounds = [1 + epoch * scenario.rounds // epochs for epoch in range(epochs)]
    return [scheduled_rate(scenario, round) for round in rounds]


def absent_clients(scenario: Scenario, names: tuple[str, ...], round: int) -> Int64:
    """Ids of the clients that the scenario has drop out of a round.

    Raises:
        InputError: a name that no client has.
    """
    missing = [c for a in scenario.participation.absent if a.round == round for c in a.clients]
    if not missing:
        return np.empty(0, np.int64)
    where = f"participation.absent, round {round}"
    return np.unique(np.array([client_of(name, names, where) for name in missing], np.int64))


def liars_of(scenario: Scenario, names: tuple[str, ...]) -> Int64:
    """Ids of the clients that lie, where the scenario has an attack."""
    root = getattr(scenario.strategy, "root", None)
    return liars(scenario.attack, names, scenario.seed, [root] if root else [])


def first_answers(
    updates: ClientUpdates, norms: Float64, plan: RoundPlan, seed: int
) -> tuple[ClientUpdates, Float64]:
    """Of more answers than the round needs, the first ones.

    Simulated clients answer in a seeded order. Where real ones were waited for, the engine closed
    the round itself, and only those that came together are drawn from.
    """
    if plan.needed is None or len(updates.clients) <= plan.needed:
        return updates, norms
    arrival = seeding.client_keys(seed, "arrival", plan.round, updates.clients)
    keep = np.sort(np.argsort(arrival, kind="stable")[: plan.needed])
    late = np.setdiff1d(updates.clients, updates.clients[keep])
    reason = f"late: the round had its {plan.needed} answers"
    failures = [*updates.failures, *(ClientFailure(client, reason) for client in late.tolist())]
    tensors = {name: tensor[keep] for name, tensor in updates.tensors.items()}
    return replace(
        updates,
        clients=updates.clients[keep],
        tensors=tensors,
        num_examples=updates.num_examples[keep],
        loss=updates.loss[keep],
        failures=tuple(sorted(failures, key=lambda failure: failure.client)),
    ), norms[keep]


def extend_digest(
    digest: str, arrays: Iterable[np.ndarray[tuple[int], np.dtype[np.generic]]]
) -> str:
    """A chain of hashes: BLAKE2b-256 over the last link and some arrays, 64 hex digits."""
    link = hashlib.blake2b(digest.encode(), digest_size=32)
    for array in arrays:
        link.update(np.ascontiguousarray(array).tobytes())
    return link.hexdigest()
