"""What each client makes of the last shared head for itself, and how good that is at home.

Its own head comes from the shared one and its own training rows alone (fine-tuning, FedBABU,
pFedMe, ridge, prior), or from what it kept over the rounds (``personal_training``); kNN-Per mixes
predictions (``neighbours``). Who has no training rows has the shared head.

Ridge: W_k(rho) = (A_k + rho I)^-1 (B_k + rho W_g), from the client's own optimum (rho -> 0) to
everybody's (rho -> infinity); each client takes the rho with the least squared error over its own
rows, each predicted without itself (PRESS; Allen 1974), in float64. W_g has seen these rows, which
favours it. Prior: linear discriminant analysis with the client's own class frequencies,
b_c - log pi_c + log pi_kc, or any head with tau log pi_kc added; BBSE: with frequencies estimated
from predictions (both: ``priors``).

pFedMe's theta is trained from the last head for as many steps as in a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtl.clients.blocks import labels_of, one_blas_thread, run_blocks
from fedtl.clients.evaluation import Right, evaluate_heads, evaluate_own
from fedtl.clients.neighbours import judge_neighbours
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.personal_training import (
    ALPHA,
    Place,
    Stacked,
    asked,
    kept,
    local_part,
    mixture,
    pulled,
    training_of,
    with_own,
)
from fedtl.clients.priors import log_prior, shifted_heads
from fedtl.clients.training import check_plan
from fedtl.plans import RoundPlan
from fedtl.types import ClientMetrics, Float32, Float64, Head, Int64, Population

EQUAL = 1e-9
"""Squared errors that differ by less than this share count as equal."""


def judge_personal(
    population: Population,
    head: Head,
    plan: RoundPlan,
    everyone: Int64 | None = None,
    *,
    store: PersonalStore | None = None,
    threads: int = 1,
    device: str = "cpu",
    right: tuple[Right, Right] | None = None,
) -> tuple[ClientMetrics, ClientMetrics | None]:
    """Judge each client's own head or predictor on its own test rows, and on everybody's.

    Args:
        population, threads, device: see ``train_clients``.
        head: the last shared one.
        plan: its ``round`` is one after the last; clients, batch keys, local training and
            ``personal`` say who makes what of the head.
        everyone: int64 [m], rows that all are judged on, or None.
        store: what the clients kept over the rounds.
        right: where to add which rows each client has right: its own, and everybody's.

    Returns:
        Metrics with a row per planned client, on the own rows and on everybody's.

    Raises:
        InputError, EnvironmentFault: as ``personal_heads``.
    """
    clients = plan.clients
    own_right, all_right = right if right is not None else (None, None)
    if asked(plan).method == "knnper":
        check_plan(population, plan)
        splits = [[population.test.of(client) for client in clients.tolist()]]
        if everyone is not None:
            splits.append([everyone] * len(clients))
        found = judge_neighbours(
            population, head, plan, splits, threads=threads, right=(own_right, all_right)
        )
        return found[0], found[1] if everyone is not None else None
    heads = personal_heads(population, head, plan, store=store, threads=threads, device=device)
    own = evaluate_own(population, heads, clients, threads=threads, device=device, right=own_right)
    if everyone is None:
        return own, None
    num_classes = len(population.classes)
    abroad = evaluate_heads(
        population.features, population.labels, everyone, heads, num_classes,
        threads=threads, device=device, right=all_right, tail=population.tail,
    )  # fmt: skip
    return own, replace(abroad, clients=clients)


def personal_heads(
    population: Population,
    head: Head,
    plan: RoundPlan,
    *,
    store: PersonalStore | None = None,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Float32]:
    """Each client's own head, float32 name -> [k, ...]; not for kNN-Per, which has none.

    A client that never took part has nothing of its own: with Ditto and APFL it has the shared
    head; with FedPer, LG-FedAvg and FedRep it trains its own layers now, on the shared ones.

    Args:
        population, head, plan, store, threads, device: see ``judge_personal``.

    Raises:
        InputError: shapes or ids that do not fit together, or no store where one is needed.
        EnvironmentFault: what a client keeps cannot be read, or is of another head.
    """
    check_plan(population, plan)
    heads = _MAKE[asked(plan).method](Place(population, store, threads, device), head, plan)
    nobody = population.train.counts[plan.clients] == 0
    for name, tensor in head.items():
        heads[name][nobody] = tensor
    return heads


def _fine_tuned(place: Place, head: Head, plan: RoundPlan) -> Stacked:
    return dict(place.train(head, training_of(plan, epochs=asked(plan).epochs)).tensors)


def _theta(place: Place, head: Head, plan: RoundPlan) -> Stacked:
    longer = training_of(plan, epochs=plan.training.epochs * asked(plan).inner_steps)
    shared = {name: tensor[None] for name, tensor in head.items()}
    start = with_own(head, {}, len(plan.clients))
    return dict(pulled(place, head, longer, shared, start).tensors)


def _put_together(place: Place, head: Head, plan: RoundPlan) -> Stacked:
    """The shared layers and the clients' own ones; newcomers train theirs."""
    own, known = kept(place, plan, local_part(head, plan))
    heads = with_own(head, own, len(plan.clients))
    if own and not known.all():
        last = "weight" in own
        newcomers = training_of(plan.part(~known), layers="last" if last else "hidden")
        trained = place.train(head, newcomers).tensors
        for name in own:
            heads[name][~known] = trained[name]
    return heads


def _pulled_along(place: Place, head: Head, plan: RoundPlan) -> Stacked:
    return kept(place, plan, head)[0]


def _mixed(place: Place, head: Head, plan: RoundPlan) -> Stacked:
    own, _ = kept(place, plan, {**head, ALPHA: np.array([asked(plan).alpha])})
    alpha = own.pop(ALPHA)[:, 0]
    return mixture(head, own, alpha)


def _with_priors(place: Place, head: Head, plan: RoundPlan) -> Stacked:
    heads = with_own(head, {}, len(plan.clients))
    num_classes, own = len(head["bias"]), asked(plan)
    everybodys = np.array(own.choices)
    for i, client in enumerate(plan.clients.tolist()):
        prior = own.scale * log_prior(place.population, client, num_classes)
        heads["bias"][i] = (head["bias"] + (prior - everybodys)).astype(np.float32)
    return heads


def _with_estimated_priors(place: Place, head: Head, plan: RoundPlan) -> Stacked:
    return shifted_heads(place.population, head, plan)


def _ridge_heads(place: Place, head: Head, plan: RoundPlan) -> Stacked:
    """Ridge heads in the shared head's scale; the classes that nobody has stay as they are."""
    own, population, heads = asked(plan), place.population, with_own(head, {}, len(plan.clients))
    held = np.flatnonzero(head["weight"].any(axis=1))
    biased = "bias" in own.local
    columns = [head["weight"], *([head["bias"][:, None]] if biased else [])]
    shared = np.concatenate(columns, axis=1)[held].T.astype(np.float64) * own.scale

    def work(first: int, stop: int) -> None:
        for i in range(first, stop):
            client = int(plan.clients[i])
            rows = population.train.of(client)
            if not len(rows):
                continue
            labels = labels_of(population, client, rows, len(head["bias"]))
            z = np.ones((len(rows), shared.shape[0]))
            z[:, : population.features.shape[1]] = population.features[rows]
            targets = (labels[:, None] == held).astype(np.float64)
            path = RidgePath.of(z, targets, shared)
            weights = path.weights(path.chosen(own.choices)).T / own.scale
            heads["weight"][i, held] = weights[:, : population.features.shape[1]]
            if biased:
                heads["bias"][i, held] = weights[:, -1]

    with one_blas_thread():
        run_blocks(work, len(plan.clients), threads=place.threads)
    return heads


@dataclass(frozen=True)
class RidgePath:
    """All W(rho) = (Z^T Z + rho I)^-1 (Z^T Y + rho W_g) of one client from one eigenbasis.

    With R = Y - Z W_g it is W_g + (Z^T Z + rho I)^-1 Z^T R. The basis is that of Z^T Z [W, W] or of
    Z Z^T [n, n], whichever is smaller.

    Attributes:
        shared: W_g, float64 [W, C].
        residuals: R, [n, C].
        values: eigenvalues l, [m].
        left: [n, m], Z V in the first case, the eigenvectors themselves in the second.
        back: [W, m], V in the first case, Z^T times the eigenvectors in the second.
        inner: left^T R, [m, C].
    """

    shared: Float64
    residuals: Float64
    values: Float64
    left: Float64
    back: Float64
    inner: Float64

    @staticmethod
    def of(z: Float64, targets: Float64, shared: Float64) -> RidgePath:
        """The path of rows z [n, W] with one-hot targets [n, C], at least one row."""
        residuals = targets - z @ shared
        tall = len(z) > z.shape[1]
        values, vectors = np.linalg.eigh(z.T @ z if tall else z @ z.T)
        left, back = (z @ vectors, vectors) if tall else (vectors, z.T @ vectors)
        values = np.maximum(values, 0)
        return RidgePath(shared, residuals, values, left, back, left.T @ residuals)

    def weights(self, pull: float) -> Float64:
        """W(rho), [W, C]."""
        return self.shared + self.back @ (self.inner / (self.values + pull)[:, None])

    def press(self, pull: float) -> float:
        """Squared error over all rows, each predicted by the W(rho) of the others.

        That error is the row's residual divided by 1 - h_ii, h = Z (Z^T Z + rho I)^-1 Z^T.
        """
        if len(self.back) < len(self.left):
            share = 1 / (self.values + pull)
            rest = self.residuals - self.left @ (share[:, None] * self.inner)
            spared = 1 - np.square(self.left) @ share
        else:  # the same without a difference of nearly equal numbers
            share = pull / (self.values + pull)
            rest = self.left @ (share[:, None] * self.inner)
            spared = np.square(self.left) @ share
        return float(np.square(rest / spared[:, None]).sum())

    def chosen(self, pulls: Sequence[float]) -> float:
        """The rho of least PRESS; of equal ones the largest, closest to everybody's head."""
        errors = np.array([self.press(pull) for pull in pulls])
        return float(np.array(pulls)[errors <= errors.min() * (1 + EQUAL)].max())


_MAKE: Mapping[str, Callable[[Place, Head, RoundPlan], Stacked]] = {
    "finetune": _fine_tuned,
    "fedbabu": _fine_tuned,
    "pfedme": _theta,
    "partial": _put_together,
    "fedrep": _put_together,
    "ditto": _pulled_along,
    "apfl": _mixed,
    "ridge": _ridge_heads,
    "prior": _with_priors,
    "bbse": _with_estimated_priors,
}
