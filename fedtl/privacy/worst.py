"""Which client's examples lose most by DP-SGD, found without composing every client's steps.

A client with n_k examples takes ceil(n_k / B) steps an epoch, each on a share B / n_k of them: the
small ones' are seen more often, the large ones take more steps. More steps at the same share, or a
larger share in as many steps, cost more; so a group of clients costs no more than one with the
group's largest share and most steps, and groups are looked into while they might hold the worst.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from fedtl.privacy.accounting import Release, epsilon_of, loosely

FEW = 4
"""Costs of a smaller group are looked at one by one; a larger one may be left out as a whole."""


@dataclass(frozen=True, order=True)
class Cost:
    """Noisy steps of a client.

    Attributes:
        rate: chance of each example to be in a step, in (0, 1].
        steps: in all.
    """

    rate: float
    steps: int

    def releases(self, noise: float) -> list[Release]:
        """The same for the accountant."""
        return [Release(noise, self.steps, "poisson" if self.rate < 1 else "none", self.rate)]


def worst_cost(costs: Sequence[Cost], noise: float, delta: float, accountant: str) -> Cost | None:
    """The dearest of them at this noise multiplier; None where there are none.

    Best first over groups that are halved, each at first by a bound that is quick to have: what
    comes out alone costs no less than the bound of any group that is left.
    """
    front = _not_beaten(costs)
    if noise <= 0 or len(front) < 2:
        return front[0] if front else None

    def most(group: Sequence[Cost]) -> list[Release]:
        return Cost(group[0].rate, group[-1].steps).releases(noise)

    made = count()
    queue = [(-math.inf, next(made), False, front)]
    while True:
        _, _, exact, group = heapq.heappop(queue)
        if not exact and (len(group) == 1 or FEW <= len(group) < len(front)):
            spent = epsilon_of(most(group), delta, accountant)
            heapq.heappush(queue, (-spent, next(made), True, group))
        elif exact and len(group) == 1:
            return group[0]
        else:
            middle = len(group) // 2
            for half in (group[:middle], group[middle:]):
                bound = loosely(most(half), delta)
                heapq.heappush(queue, (-bound, next(made), False, half))


def _not_beaten(costs: Sequence[Cost]) -> list[Cost]:
    """Those without another that has a larger share and as many steps; shares fall, steps grow."""
    front: list[Cost] = []
    for cost in sorted(costs, key=lambda cost: (-cost.rate, -cost.steps)):
        if not front or cost.steps > front[-1].steps:
            front.append(cost)
    return front
