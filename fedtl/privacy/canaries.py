"""Members of the protected unit that are in the federated training or not, by a coin flip each.

What the trained head tells about the coins is a lower bound of epsilon (``one_run``). The coins
come from a seeded stream, so that an audit can repeat them: they are a secret of the scenario's
seed, not of anybody. Only the federated training is touched: references and judges keep the true
population.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.errors import InputError
from fedtl.scenario.privacy import Privacy, unit_of
from fedtl.types import Int32, Int64, Population, Rows

Unit = Literal["example", "client"]


@dataclass(frozen=True)
class Planted:
    """The canaries of a run.

    Attributes:
        unit: what a canary is.
        members: rows of the feature matrix or ids of clients, ascending, int64 [m].
        inside: which of them are in the training, bool [m].
        labels: with which a canary row is trained, int32 [m]; none for clients.
    """

    unit: Unit
    members: Int64
    inside: npt.NDArray[np.bool_]
    labels: Int32


def canary_unit(privacy: Privacy) -> Unit:
    """What a canary is: the unit of the promise, or single examples where nothing is promised."""
    return "client" if (unit_of(privacy) or privacy.unit) == "client" else "example"


def plant(population: Population, privacy: Privacy, seed: int) -> tuple[Population, Planted]:
    """The population as it is trained on, and which canaries are in it.

    Canary rows are training rows; of each client one row is never chosen, so that nobody is left
    without data. A client that is a canary and out has no training rows. With
    ``canary_labels = "random"`` canary rows have a random wrong label.

    Args:
        population: everybody's true data.
        privacy: ``canaries`` is m; 0 gives the population back.
        seed: the scenario's.

    Raises:
        InputError: more canaries than there can be.
    """
    unit = canary_unit(privacy)
    if not privacy.canaries:
        nothing = np.empty(0, np.int64)
        return population, Planted(unit, nothing, nothing.astype(bool), nothing.astype(np.int32))
    stream = seeding.generator(seed, "canaries")
    candidates = _candidates(population, unit, stream)
    if privacy.canaries > len(candidates):
        what = "one client must stay" if unit == "client" else "each client must keep an example"
        raise InputError(
            f"more canaries than there can be: {what}",
            where="privacy.canaries",
            got=privacy.canaries,
            allowed=f"at most {len(candidates)}",
        )
    members = np.sort(stream.permutation(candidates)[: privacy.canaries])
    inside = stream.integers(0, 2, len(members)).astype(bool)
    if unit == "client":
        planted = Planted(unit, members, inside, np.empty(0, np.int32))
        return deal_coins(population, planted), planted
    labels = population.labels[members]
    if privacy.canary_labels == "random":
        num_classes = len(population.classes)
        labels = ((labels + stream.integers(1, num_classes, len(labels))) % num_classes).astype(
            np.int32
        )
    planted = Planted(unit, members, inside, labels)
    return deal_coins(population, planted), planted


def deal_coins(population: Population, planted: Planted) -> Population:
    """The population with these canaries in or out; a pure function of both.

    Test rows, and rows that are no canaries, stay as they are.
    """
    out = planted.members[~planted.inside]
    if planted.unit == "client":
        return replace(population, train=_thinned(population.train, out_clients=out))
    labels = population.labels.copy()
    labels[planted.members] = planted.labels
    return replace(population, labels=labels, train=_thinned(population.train, out_rows=out))


def canary_notes(planted: Planted, labels: str) -> list[str]:
    """What a user should know before the first round, a line each; nothing without canaries.

    Args:
        labels: ``privacy.canary_labels``.
    """
    count = len(planted.members)
    if not count:
        return []
    what = "clients" if planted.unit == "client" else "training examples"
    wrong = ", those with wrong labels" if labels == "random" and planted.unit == "example" else ""
    return [
        f"{count} {what} are canaries for 'fedtl audit': a coin each left "
        f"{int((~planted.inside).sum())} of them out of the federated training and the others in"
        f"{wrong}; references train on everything"
    ]


def _candidates(population: Population, unit: Unit, stream: np.random.Generator) -> Int64:
    """Rows or clients that may become canaries."""
    if unit == "client":
        return stream.permutation(population.num_clients)[1:].astype(np.int64)
    train = population.train
    counts = train.counts
    spared = train.offsets[:-1] + stream.integers(0, np.maximum(counts, 1))
    return np.delete(train.index, spared[counts > 0])


NOBODY = np.empty(0, np.int64)
NOBODY.flags.writeable = False


def _thinned(rows: Rows, *, out_rows: Int64 = NOBODY, out_clients: Int64 = NOBODY) -> Rows:
    """The same without some rows, or without all rows of some clients."""
    owner = np.repeat(np.arange(len(rows.counts)), rows.counts)
    keep = ~np.isin(rows.index, out_rows) & ~np.isin(owner, out_clients)
    counts = np.bincount(owner[keep], minlength=len(rows.counts))
    return Rows(rows.index[keep], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
