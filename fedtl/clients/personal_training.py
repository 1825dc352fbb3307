"""What clients do in a round beside what they share: heads, or parts of one, of their own.

Sources: FedPer, Arivazhagan et al. 2019 (arXiv 1912.00818); LG-FedAvg, Liang et al. 2020
(2001.01523); FedRep, Collins et al. 2021 (2102.07078), Algorithm 1; FedBABU, Oh et al. 2022
(2106.06042), Algorithm 1; Ditto, Li et al. 2021 (2012.04221), Algorithm 1; pFedMe, Dinh et al. 2020
(2006.08848), Algorithm 1; APFL, Deng et al. 2020 (2003.13461), Algorithm 1.

All training goes through ``train_clients``. With Ditto's v <- v - eta (grad + lambda (v - w)) that
is weight decay lambda and a correction -lambda w; pFedMe's inner problem is the same on one batch.
Ditto and APFL train the own head on the batches of the shared one, in the same order.

Deviations. FedRep, FedPer, LG-FedAvg: one learning rate for all layers. pFedMe: one learning rate
for theta and w; theta goes on from batch to batch, as in the authors' code; momentum, where given,
acts within the K steps of a batch. APFL: the own head v is trained through the mixture
u = alpha v + (1 - alpha) w, with w held at the round's instead of moving along, at the rate
alpha^2 eta, which is what eta amounts to in v; weight decay is u's; alpha moves once a round, along
its gradient over all the client's rows, before u is trained. All: a state that is not finite is not
kept, the client goes on from its last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.clients.batches import batch_order
from fedtl.clients.blocks import run_blocks
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.training import LINEAR, check_plan, train_clients
from fedtl.errors import EnvironmentFault, InputError
from fedtl.plans import Personal, RoundPlan
from fedtl.types import ClientUpdates, Float32, Float64, Head, Population, Rows

PURPOSE = "personal"
"""What the store files a client's own tensors under."""

ALPHA = "alpha"
"""Of APFL, kept beside the own head; float64 [1]."""

LEAST_ALPHA = 1e-3
"""Below it APFL's own head stays: its step, alpha eta, is lost in the rounding of u in float32."""

Stacked = dict[str, npt.NDArray[Any]]
"""Tensors by name, a row per client."""


@dataclass(frozen=True)
class Place:
    """Where clients train and keep what is their own.

    Attributes:
        population, threads, device, block_size: see ``train_clients``.
        store: None where nothing is kept.
    """

    population: Population
    store: PersonalStore | None = None
    threads: int = 1
    device: str = "cpu"
    block_size: int | None = None

    def train(self, head: Head, plan: RoundPlan, initial: Stacked | None = None) -> ClientUpdates:
        """``train_clients`` here."""
        return train_clients(
            self.population,
            head,
            plan,
            threads=self.threads,
            device=self.device,
            block_size=self.block_size,
            initial=initial,
        )


def train_personal(
    population: Population,
    head: Head,
    plan: RoundPlan,
    *,
    store: PersonalStore | None = None,
    threads: int = 1,
    device: str = "cpu",
    block_size: int | None = None,
) -> ClientUpdates:
    """One round of a plan with ``personal``: what is shared comes back, the rest stays here.

    Args:
        population, threads, device, block_size: see ``train_clients``.
        head: the round's; of tensors that are local, only where clients begin.
        plan: who trains and what is the clients' own.
        store: where clients keep it; the round reads what earlier rounds left, and no later ones.

    Returns:
        The tensors that ``plan.reply(head)`` names, and no other.

    Raises:
        InputError: shapes or ids that do not fit together, or no store where one is needed.
        EnvironmentFault: what a client keeps cannot be read, written, or is of another head.
    """
    check_plan(population, plan)
    own = asked(plan)
    place = Place(population, store, threads, device, block_size)
    updates = _WORK.get(own.method, Place.train)(place, head, plan)
    sent = {name: tensor for name, tensor in updates.tensors.items() if name not in own.local}
    return replace(updates, tensors=sent)


def asked(plan: RoundPlan) -> Personal:
    """What the plan has the clients do for themselves."""
    assert plan.personal is not None
    return plan.personal


def kept(
    place: Place, plan: RoundPlan, start: Mapping[str, npt.NDArray[Any]]
) -> tuple[Stacked, npt.NDArray[np.bool_]]:
    """What each client of the plan has kept from rounds before the plan's.

    Args:
        start: the tensors looked for [...], with the values of a client that has none yet.

    Returns:
        name -> [k, ...], and which clients had something, bool [k].

    Raises:
        InputError: there is no store.
        EnvironmentFault: a file is damaged, or holds other tensors.
    """
    if not start:
        return {}, np.ones(len(plan.clients), np.bool_)
    if place.store is None:
        raise InputError(
            f"{asked(plan).method} needs a place where clients keep what is their own",
            where="strategy.name",
            do="Give the engine a store",
        )
    found: Stacked = {n: np.repeat(t[None], len(plan.clients), axis=0) for n, t in start.items()}
    known = np.zeros(len(plan.clients), np.bool_)
    forms = {name: (tensor.shape, tensor.dtype) for name, tensor in start.items()}
    for i, client in enumerate(plan.clients.tolist()):
        name = place.population.names[client]
        loaded = place.store.load(PURPOSE, name, plan.round)
        if loaded is None:
            continue
        round, tensors = loaded
        if {n: (t.shape, t.dtype) for n, t in tensors.items()} != forms:
            raise EnvironmentFault(
                f"what {name!r} has kept since round {round} belongs to another head or strategy",
                where=place.store.folder,
                do="Use a folder of its own for each run",
            )
        for n, tensor in tensors.items():
            found[n][i] = tensor
        known[i] = True
    return found, known


def _keep(place: Place, plan: RoundPlan, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """File each client's own tensors under the plan's round, where they are finite."""
    if not tensors:
        return
    assert place.store is not None
    for i, client in enumerate(plan.clients.tolist()):
        mine = {name: tensor[i] for name, tensor in tensors.items()}
        if all(np.isfinite(tensor).all() for tensor in mine.values()):
            place.store.save(PURPOSE, place.population.names[client], plan.round, mine)


def with_own(head: Head, own: Stacked, num_clients: int) -> Stacked:
    """Heads [k, ...]: the clients' own tensors, and the shared head's where they have none."""
    return {
        name: own[name] if name in own else np.repeat(tensor[None], num_clients, axis=0)
        for name, tensor in head.items()
    }


def training_of(plan: RoundPlan, **changes: Any) -> RoundPlan:
    """The plan with another local training, and nothing to report."""
    return replace(plan, training=replace(plan.training, **changes), reports=())


def local_part(head: Head, plan: RoundPlan) -> Head:
    """The head's tensors that are the clients' own."""
    return {name: tensor for name, tensor in head.items() if name in asked(plan).local}


def _partial(place: Place, head: Head, plan: RoundPlan) -> ClientUpdates:
    """All layers together, from the shared ones and the client's own."""
    own, _ = kept(place, plan, local_part(head, plan))
    updates = place.train(head, plan, with_own(head, own, len(plan.clients)))
    _keep(place, plan, {name: updates.tensors[name] for name in own})
    return updates


def _fedrep(place: Place, head: Head, plan: RoundPlan) -> ClientUpdates:
    """First the own last layer on the round's hidden ones, then these below it."""
    own, _ = kept(place, plan, local_part(head, plan))
    start = with_own(head, own, len(plan.clients))
    last = training_of(plan, layers="last", epochs=asked(plan).epochs)
    first = place.train(head, last, start)
    _keep(place, plan, {name: first.tensors[name] for name in own})
    updates = place.train(head, training_of(plan, layers="hidden"), dict(first.tensors))
    return replace(updates, loss=first.loss)


def _ditto(place: Place, head: Head, plan: RoundPlan) -> ClientUpdates:
    """The shared head as in FedAvg, and the own one, pulled towards the round's."""
    updates = place.train(head, plan)
    own, _ = kept(place, plan, head)
    own_training = training_of(plan, epochs=asked(plan).epochs or plan.training.epochs)
    trained = pulled(place, head, own_training, {n: t[None] for n, t in head.items()}, own)
    _keep(place, plan, trained.tensors)
    return updates


def pulled(
    place: Place, head: Head, plan: RoundPlan, targets: Mapping[str, Float32], initial: Stacked
) -> ClientUpdates:
    """Train heads that are pulled towards others: each step's gradient gains lambda (v - target).

    Args:
        targets: name -> [k or 1, ...].
        initial: where the clients start, name -> [k, ...].
    """
    strength = asked(plan).strength
    corrections = {
        name: np.broadcast_to(np.float32(-strength) * targets[name], (len(plan.clients), *t.shape))
        for name, t in head.items()
        if strength
    }
    decay = plan.training.weight_decay + strength
    plan = replace(training_of(plan, weight_decay=decay), corrections=corrections)
    return place.train(head, plan, initial)


def _pfedme(place: Place, head: Head, plan: RoundPlan) -> ClientUpdates:
    """On each batch K steps on theta, which w_k pulls, then w_k <- w_k - eta lambda (w_k - theta).

    A batch is trained on as if it were all that its client has.
    """
    population, training, count = place.population, plan.training, len(plan.clients)
    rows = [population.train.of(client) for client in plan.clients.tolist()]
    moving = with_own(head, {}, count)
    theta = {name: tensor.copy() for name, tensor in moving.items()}
    rate = np.float32(training.learning_rate * asked(plan).strength)
    inner = replace(
        training_of(plan, epochs=asked(plan).inner_steps),
        clients=np.arange(count, dtype=np.int64),
    )
    names = tuple(population.names[client] for client in plan.clients.tolist())
    summed = np.zeros(count)
    for epoch in range(training.epochs):
        orders = [
            own[batch_order(int(key), len(own), epoch)]
            for own, key in zip(rows, plan.batch_keys, strict=True)
        ]
        for low in range(0, max(map(len, orders), default=0), training.batch_size):
            batches = [order[low : low + training.batch_size] for order in orders]
            sizes = np.array([len(batch) for batch in batches], np.int64)
            offsets = np.concatenate([[0], np.cumsum(sizes)])
            here = replace(population, train=Rows(np.concatenate(batches), offsets), names=names)
            busy = np.flatnonzero(sizes)
            trained = pulled(
                replace(place, population=here),
                head,
                inner.part(busy),
                {name: tensor[busy] for name, tensor in moving.items()},
                {name: tensor[busy] for name, tensor in theta.items()},
            )
            for name, own in trained.tensors.items():
                theta[name][busy] = own
                moving[name][busy] -= rate * (moving[name][busy] - own)
            if epoch == 0:
                summed[busy] += trained.loss * sizes[busy]
    counts = population.train.counts[plan.clients]
    loss = np.where(counts > 0, summed / np.maximum(counts, 1), np.nan)
    return ClientUpdates(plan.round, plan.clients, moving, counts, loss)


def _apfl(place: Place, head: Head, plan: RoundPlan) -> ClientUpdates:
    """The shared head as in FedAvg, and the own one through its mixture with the round's."""
    updates = place.train(head, plan)
    start = {**head, ALPHA: np.array([asked(plan).alpha])}
    own, _ = kept(place, plan, start)
    alpha = own.pop(ALPHA)[:, 0]
    if asked(plan).adaptive:
        alpha = _followed(place, head, plan, own, alpha)
    mixed = mixture(head, own, alpha)
    trained = {name: tensor.copy() for name, tensor in mixed.items()}
    shares = np.unique(alpha[alpha >= LEAST_ALPHA])
    apart = len(shares) > 1 and set(head) == LINEAR and place.device == "cpu"
    one = replace(place, threads=1) if apart else place

    def work(first: int, stop: int) -> None:
        for share in shares[first:stop].tolist():
            places = np.flatnonzero(alpha == share)
            rate = plan.training.learning_rate * share**2
            start = {name: tensor[places] for name, tensor in mixed.items()}
            ended = one.train(head, training_of(plan.part(places), learning_rate=rate), start)
            for name, tensor in ended.tensors.items():
                trained[name][places] = tensor

    run_blocks(work, len(shares), threads=place.threads if apart else 1)
    for name, tensor in own.items():
        share = _column(np.maximum(alpha, LEAST_ALPHA), tensor)
        moved = (trained[name].astype(np.float64) - mixed[name]) / share
        own[name] = (tensor + moved).astype(np.float32)
    _keep(place, plan, {**own, ALPHA: alpha[:, None]})
    return updates


def _followed(place: Place, head: Head, plan: RoundPlan, own: Stacked, alpha: Float64) -> Float64:
    """alpha - eta <v - w, grad F(u)>, within [0, 1]; as it was where that is not finite.

    One step at rate 1 on all rows shows the gradient.
    """
    rows = int(place.population.train.counts[plan.clients].max(initial=1))
    step = training_of(plan, epochs=1, batch_size=rows, learning_rate=1.0, momentum=0.0)
    mixed = mixture(head, own, alpha)
    after = place.train(head, step, mixed).tensors
    slope = np.zeros(len(alpha))
    for name, start in head.items():
        for i in range(len(alpha)):
            gradient = mixed[name][i].astype(np.float64) - after[name][i]
            slope[i] += ((own[name][i].astype(np.float64) - start) * gradient).sum()
    moved = np.clip(alpha - plan.training.learning_rate * slope, 0.0, 1.0)
    return np.where(np.isfinite(moved), moved, alpha)


def mixture(head: Head, own: Stacked, alpha: Float64) -> Stacked:
    """u = alpha v + (1 - alpha) w for each client, float32 [k, ...]; ``alpha`` is float64 [k]."""
    mixed: Stacked = {}
    for name, tensor in own.items():
        share = _column(alpha, tensor)
        mixed[name] = (share * tensor + (1 - share) * head[name]).astype(np.float32)
    return mixed


def _column(values: Float64, like: npt.NDArray[Any]) -> Float64:
    return values.reshape(-1, *[1] * (like.ndim - 1))


_WORK: Mapping[str, Callable[[Place, Head, RoundPlan], ClientUpdates]] = {
    "partial": _partial,
    "fedrep": _fedrep,
    "ditto": _ditto,
    "pfedme": _pfedme,
    "apfl": _apfl,
}
