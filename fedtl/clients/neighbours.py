"""kNN-Per: each client mixes the shared head's probabilities with its nearest examples' labels.

Source: Marfoq et al. 2022 (arXiv 2111.09360) and the authors' released code: of the k nearest
of its own training examples each votes for its class with exp(-|z - z_i|^2 / (H scale)), z what the
shared head's last layer sees [H]; p = lambda votes + (1 - lambda) softmax. Deviation: the client
chooses lambda by the cross-entropy of its own training examples, each judged without itself among
the neighbours, not on the test examples as the code's grid does. The shared head has seen these
examples, which favours it. All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtl.clients.blocks import labels_of, one_blas_thread, run_blocks
from fedtl.clients.evaluation import Right
from fedtl.plans import Personal, RoundPlan
from fedtl.types import LAST, ClientMetrics, Float64, Head, Int32, Int64, Population

ROWS = 256
"""Rows judged at once."""

LEAST = 1e-12
"""What a probability counts as, at least, in a loss: votes alone can be 0."""


def judge_neighbours(
    population: Population,
    head: Head,
    plan: RoundPlan,
    splits: Sequence[Sequence[Int64]],
    *,
    threads: int = 1,
    right: Sequence[Right | None] | None = None,
) -> list[ClientMetrics]:
    """Judge each planned client's mixture; of a single training row, or none, nobody votes.

    Args:
        head: the shared one.
        plan: its clients and its ``personal``; nothing else counts.
        splits: for each split the rows that client i is judged on, int64 [n_i].
        threads: clients at the same time; the result does not depend on it.
        right: for each split where to add which of its rows are predicted right.

    Raises:
        InputError: labels outside the head's classes.
    """
    personal = plan.personal
    assert personal is not None
    shape = (len(plan.clients), len(head["bias"]))
    found = [
        ClientMetrics(plan.clients, np.zeros(shape[0]), np.zeros(shape, int), np.zeros(shape, int))
        for _ in splits
    ]
    answers = [[np.zeros(len(rows), np.bool_) for rows in split] for split in splits]

    def work(first: int, stop: int) -> None:
        for i in range(first, stop):
            own = population.train.of(int(plan.clients[i]))
            for rows in (own, *(split[i] for split in splits)):
                labels_of(population, int(plan.clients[i]), rows, shape[1])
            voters = Voters.of(population, head, own, personal)
            share = chosen_share(population, head, own, voters, personal.choices)
            for metrics, split, answer in zip(found, splits, answers, strict=True):
                _judge(population, head, voters, share, split[i], metrics, i, answer[i])

    with one_blas_thread():
        run_blocks(work, len(plan.clients), threads=threads)
    for told, answer in zip(right or (), answers, strict=False):
        if told is not None:
            told.extend(answer)
    return found


def _judge(
    population: Population,
    head: Head,
    voters: Voters,
    share: float,
    rows: Int64,
    metrics: ClientMetrics,
    i: int,
    answer: npt.NDArray[np.bool_],
) -> None:
    """Fill in row i of the metrics, and which rows are right."""
    place = 0
    for part in _parts(rows):
        seen, probabilities = shared_view(population, head, part)
        if share > 0:
            probabilities = share * voters.votes(seen) + (1 - share) * probabilities
        labels = population.labels[part]
        hits = probabilities.argmax(axis=1) == labels
        answer[place : place + len(part)] = hits
        place += len(part)
        truth = probabilities[np.arange(len(part)), labels]
        metrics.loss_sum[i] -= np.log(np.maximum(truth, LEAST)).sum()
        metrics.correct[i] += np.bincount(labels[hits], minlength=voters.num_classes)
        metrics.count[i] += np.bincount(labels, minlength=voters.num_classes)


@dataclass(frozen=True)
class Voters:
    """A client's own examples as the shared head's last layer sees them.

    Attributes:
        seen: float64 [n, H].
        labels: int32 [n].
        num_classes: C.
        neighbours: k.
        scale: of the kernel.
    """

    seen: Float64
    labels: Int32
    num_classes: int
    neighbours: int
    scale: float

    @staticmethod
    def of(population: Population, head: Head, own: Int64, personal: Personal) -> Voters:
        """Those of the client whose training rows are ``own``."""
        seen = np.empty((len(own), head["weight"].shape[1]))
        for low in range(0, len(own), ROWS):
            seen[low : low + ROWS], _ = shared_view(population, head, own[low : low + ROWS])
        labels = population.labels[own]
        return Voters(seen, labels, len(head["bias"]), personal.neighbours, personal.scale)

    def votes(self, asked: Float64, itself: Int64 | None = None) -> Float64:
        """Each asked example's votes [m, C], summing to 1.

        Args:
            asked: float64 [m, H].
            itself: int64 [m], the voter that each of them is, and that may not vote; or None.
        """
        squares = np.square(asked).sum(axis=1)[:, None] + np.square(self.seen).sum(axis=1)
        squares = np.maximum(squares - 2 * asked @ self.seen.T, 0)
        places = np.arange(len(asked))
        voters = squares.shape[1]
        if itself is not None:
            squares[places, itself] = np.inf
            voters -= 1
        wanted = min(self.neighbours, voters)
        nearest = np.argpartition(squares, wanted - 1, axis=1)[:, :wanted]
        apart = np.take_along_axis(squares, nearest, axis=1)
        apart -= apart.min(axis=1, keepdims=True)  # the same shares, and no 0 / 0
        weight = np.exp(-apart / (self.seen.shape[1] * self.scale))
        votes = np.zeros((len(asked), self.num_classes))
        np.add.at(votes, (places[:, None], self.labels[nearest]), weight)
        return np.asarray(votes / weight.sum(axis=1, keepdims=True))


def chosen_share(
    population: Population, head: Head, own: Int64, voters: Voters, choices: tuple[float, ...]
) -> float:
    """The lambda with the least cross-entropy on the client's own rows; of equal ones the first."""
    if len(own) < 2:
        return 0.0
    losses = np.zeros(len(choices))
    first = 0
    for part in _parts(own):
        places, labels = np.arange(len(part)), population.labels[part]
        seen, probabilities = shared_view(population, head, part)
        theirs = probabilities[places, labels]
        voted = voters.votes(seen, first + places)[places, labels]
        for j, share in enumerate(choices):
            losses[j] -= np.log(np.maximum(share * voted + (1 - share) * theirs, LEAST)).sum()
        first += len(part)
    return choices[int(np.argmin(losses))]


def shared_view(population: Population, head: Head, rows: Int64) -> tuple[Float64, Float64]:
    """What the head's last layer sees of some rows [m, H], and the head's probabilities [m, C]."""
    seen = population.features[rows].astype(np.float64)
    for i in range(sum(name.startswith("hidden.") for name in head) // 2):
        weight, bias = (
            head[f"hidden.{i}.{kind}"].astype(np.float64) for kind in ("weight", "bias")
        )
        seen = np.maximum(seen @ weight.T + bias, 0)
    scores = _scores({name: head[name].astype(np.float64) for name in head if name in LAST}, seen)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return seen, scores / scores.sum(axis=1, keepdims=True)


def _scores(last: Mapping[str, Float64], seen: Float64) -> Float64:
    """Scores [m, C] of a head's last layer."""
    if set(last) == {"weight", "bias"}:
        return np.asarray(seen @ last["weight"].T + last["bias"])
    import torch

    from fedtl.clients.batched import classify

    torch.set_num_threads(1)
    tensors = {name: torch.from_numpy(own) for name, own in last.items()}
    return np.asarray(classify(tensors, torch.from_numpy(seen)).numpy())


def _parts(rows: Int64) -> Iterator[Int64]:
    for low in range(0, len(rows), ROWS):
        yield rows[low : low + ROWS]
