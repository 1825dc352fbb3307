"""The exact softmax head: full-batch L-BFGS at the server on the clients' summed gradients.

Every round asks all clients for the gradient of their mean loss at one trial head. Weighted by
examples the answers add up to the gradient of the pooled objective

    sum_k p_k F_k(w) + weight_decay / 2 |w|^2,

the one that ``evaluation/pooled.py`` minimises, to rounding and for any split of the rows. So the
server walks to the very head that training on all data together would give, and no data move.

Sources: L-BFGS with two-loop recursion and scaling s'y / y'y, Liu and Nocedal 1989 (Mathematical
Programming 45); sufficient decrease and cubic interpolation, Nocedal and Wright, Numerical
Optimization (2nd ed.), 3.4, 3.6a and 3.59; decrease that rounding hides, Hager and Zhang 2005 (SIAM
J. Optim. 16), 4.3, taken only where the gradient's largest entry falls, as float32 heads could
wander for ever otherwise. Deviations: the search asks for one evaluation a round, so that it is a
state machine over rounds; the first step has length 1; trial heads are float32, as clients are sent
them, and steps are measured between them, so that what is evaluated is what is meant.

Who is missing would change the objective: a round in which a client is missing that had answered
before teaches nothing and asks the same again. A client that answers for the first time begins the
search anew from that round's head. An MLP head has no one optimum; it comes to a local one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.plans import RoundPlan
from fedtl.strategies.base import RESULT, ServerState, client_weights
from fedtl.types import ClientUpdates, Float32, Float64, Head, float32

DECREASE = 1e-4
"""Share of the decrease that the slope promises with which a step is taken."""
NOISE = 1e-13
"""Relative size of losses' differences that mean nothing."""
SHRINK = 0.1, 0.5
"""A refused step is followed by one between these shares of it."""
MAX_TRIES = 20
"""Refused steps after which nothing is to be gained in this direction."""
CURVED = 1e-10
"""Smallest cosine between a move and the gradient's change that is remembered."""
UNKNOWN = -1


@dataclass(frozen=True)
class _Search:
    """Where the search stands; vectors are float64 [P], all tensors in the order of their names.

    Attributes:
        point, gradient, value: the best head so far, and the objective there.
        direction: where it goes from there, with the share ``rate`` of it to be tried next.
        moves, bends: [m, P], the last moves and what the gradient changed by; newest last.
        pairs: how many of them there are.
        tries: refused steps in this direction.
        finished: whether it has converged, or can come no nearer in float32.
    """

    point: Float64
    gradient: Float64
    direction: Float64
    moves: Float64
    bends: Float64
    value: float = 0.0
    rate: float = 0.0
    pairs: int = 0
    tries: int = 0
    finished: int = 0

    @property
    def trial(self) -> Float64:
        """The point to be evaluated next."""
        return self.point if self.finished else _single(self.point + self.rate * self.direction)

    @property
    def moves_on(self) -> bool:
        """Whether that is another point at all, in float32."""
        return bool((self.trial != self.point).any())


@dataclass(frozen=True)
class Lbfgs:
    """Minimises the pooled objective, with one evaluation a round.

    Attributes:
        history: m, moves that are remembered; the state holds 2 m + 3 heads in float64.
        tolerance: largest entry of the objective's gradient at which it ends.
    """

    history: int = 10
    tolerance: float = 1e-6

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The first point to be evaluated is the head itself."""
        point = _flat(head)
        none, past = np.zeros(len(point)), np.zeros((self.history, len(point)))
        examples = np.full(num_clients, UNKNOWN, np.int64)
        return ServerState(head, _slots(_Search(point, none, none, past, past), head, examples))

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Asks for gradients."""
        return replace(plan, task="gradient")

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """Judge the point that was tried, and choose the next."""
        known = state.slots["examples"]
        examples = np.full_like(known, UNKNOWN)
        examples[updates.clients] = updates.num_examples
        if (known > examples).any():  # somebody is missing
            return state
        trial = _flat(state.head)
        value, gradient = _objective(trial, updates)
        search = _search(state)
        if (known < examples).any():
            none = np.zeros_like(search.moves)
            start = _Search(trial, gradient, trial, none, none, value)
            search = self._aim(start)
        else:
            search = self._judge(search, trial, value, gradient)
        head = _tensors(search.trial, state.head)
        return ServerState(head, _slots(search, head, examples))

    def finished(self, state: ServerState) -> bool:
        """Converged, or as near as float32 heads can come."""
        return bool(state.slots["counts"][2])

    def _judge(self, search: _Search, trial: Float64, value: float, gradient: Float64) -> _Search:
        """Take the step that was tried, or try a shorter one."""
        move = trial - search.point
        promised, slope = float(search.gradient @ move), float(gradient @ move)
        rise = value - search.value
        hidden = rise <= NOISE * abs(search.value) and slope <= (2 * DECREASE - 1) * promised
        nearer = np.abs(gradient).max() < np.abs(search.gradient).max()
        if rise <= DECREASE * promised or (hidden and nearer):
            return self._aim(_taken(search, move, value, gradient))
        low, high = SHRINK
        share = min(max(_lowest(rise, promised, slope), low), high)
        shorter = replace(search, rate=share * search.rate, tries=search.tries + 1)
        return shorter if shorter.tries < MAX_TRIES and shorter.moves_on else _other_way(shorter)

    def _aim(self, search: _Search) -> _Search:
        """The next direction from a point that was just taken."""
        if float(np.abs(search.gradient).max()) <= self.tolerance:
            return replace(search, finished=1)
        direction = -_two_loop(search)
        rate = 1.0 if search.pairs else 1 / float(np.sqrt(direction @ direction))
        aimed = replace(search, direction=direction, rate=rate, tries=0)
        return aimed if aimed.moves_on else _other_way(aimed)


def _other_way(search: _Search) -> _Search:
    """Straight down the gradient where nothing is gained along the direction; else the end."""
    if search.pairs:
        scale = _scale(search)
        down = replace(search, direction=-scale * search.gradient, rate=1.0, pairs=0, tries=0)
        if down.moves_on:
            return down
    return replace(search, finished=1)


def _taken(search: _Search, move: Float64, value: float, gradient: Float64) -> _Search:
    """The search at its new point, with the move remembered where the objective is convex."""
    bend = gradient - search.gradient
    moved = replace(search, point=search.point + move, gradient=gradient, value=value)
    if move @ bend <= CURVED * np.sqrt((move @ move) * (bend @ bend)):
        return moved
    return replace(
        moved,
        moves=np.concatenate([search.moves[1:], move[None]]),
        bends=np.concatenate([search.bends[1:], bend[None]]),
        pairs=min(search.pairs + 1, len(search.moves)),
    )


def _two_loop(search: _Search) -> Float64:
    """The inverse Hessian's approximation times the gradient."""
    result = search.gradient.copy()
    newest = range(len(search.moves) - 1, len(search.moves) - 1 - search.pairs, -1)
    shares: dict[int, float] = {}
    for i in newest:
        shares[i] = float(search.moves[i] @ result) / float(search.moves[i] @ search.bends[i])
        result -= shares[i] * search.bends[i]
    if search.pairs:
        result *= _scale(search)
    for i in reversed(newest):
        back = float(search.bends[i] @ result) / float(search.moves[i] @ search.bends[i])
        result += (shares[i] - back) * search.moves[i]
    return result


def _scale(search: _Search) -> float:
    """s'y / y'y of the newest pair."""
    move, bend = search.moves[-1], search.bends[-1]
    return float(move @ bend) / float(bend @ bend)


def _lowest(rise: float, before: float, after: float) -> float:
    """Where the cubic through value and slope at 0 and 1 is lowest; 0 where it has no such place.

    Args:
        rise: value at 1, that at 0 being 0.
        before, after: slopes at 0 and 1.
    """
    middle = before + after - 3 * rise
    root = middle * middle - before * after
    if root < 0 or not np.isfinite(root):
        return 0.0
    root = float(np.sqrt(root))
    width = after - before + 2 * root
    return 1 - (after + root - middle) / width if width > 0 else 0.0


def _objective(point: Float64, updates: ClientUpdates) -> tuple[float, Float64]:
    """The pooled objective and its gradient, added in float64 in client order."""
    assert updates.training is not None, "known once updates are accepted"
    decay = updates.training.weight_decay
    value, gradient = decay / 2 * float(point @ point), decay * point
    for place, weight in enumerate(client_weights(updates, "examples").tolist()):
        if weight == 0:  # without examples: no loss
            continue
        own = {name: tensor[place] for name, tensor in updates.tensors.items()}
        value += weight * float(updates.loss[place])
        gradient += weight * _flat(own)
    return value, gradient


def _flat(tensors: Mapping[str, npt.NDArray[Any]]) -> Float64:
    """One vector; in the order of names, which a commit does not change."""
    return np.concatenate([tensors[n].reshape(-1) for n in sorted(tensors)]).astype(np.float64)


def _tensors(vector: Float64, head: Head) -> dict[str, Float32]:
    cuts = np.cumsum([head[name].size for name in sorted(head)])
    parts = dict(zip(sorted(head), np.split(vector, cuts[:-1]), strict=True))
    return {n: parts[n].astype(np.float32).reshape(t.shape) for n, t in head.items()}


def _single(vector: Float64) -> Float64:
    return float32(vector).astype(np.float64)


def _slots(search: _Search, head: Head, examples: npt.NDArray[np.int64]) -> dict[str, Any]:
    best = _tensors(search.point, head)
    return {
        **{RESULT + name: tensor for name, tensor in best.items()},
        "gradient": search.gradient,
        "direction": search.direction,
        "moves": search.moves,
        "bends": search.bends,
        "reals": np.array([search.value, search.rate]),
        "counts": np.array([search.pairs, search.tries, search.finished], np.int64),
        "examples": examples,
    }


def _search(state: ServerState) -> _Search:
    slots = state.slots
    value, rate = slots["reals"].tolist()
    return _Search(
        _flat({name: slots[RESULT + name] for name in state.head}),
        slots["gradient"],
        slots["direction"],
        slots["moves"],
        slots["bends"],
        value,
        rate,
        *slots["counts"].tolist(),
    )
