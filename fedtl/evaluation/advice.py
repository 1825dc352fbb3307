"""What each client should do: join, personalise, stay alone, or wait for more evidence.

A client's own head, trained alone, is what it has without the federation. Against it stand the
federated head and the heads that the client makes of that one for itself ("tuned": fine-tuned, and
the strategy's own personal heads). Each difference counts, or not, by the scenario's ``[verdict]``.

    federated at home      | elsewhere        | tuned                             | advice
    -----------------------+------------------+-----------------------------------+------------
    gains                  | any              | any                               | join
    no evidence, or harmed | any              | gains at home                     | personalise
    no evidence, and holds | gains everywhere | else                              | join
    no evidence, or harmed | else             | holds at home, gains everywhere   | personalise
    harmed                 | else             | else                              | stay alone
    no evidence            | harmed           | else                              | stay alone
    no evidence            | else             | else                              | not enough ...

"At home" are the client's own tests, "everywhere" everybody's. A head "holds" at home where nothing
speaks clearly against it and what was measured is no loss beyond the margin: with few tests much is
uncertain, and a loss that is merely not certain is no reason to join. (Without that condition, on
PACS by domain and label, nine in ten of those told to join lost on held-out tests.) So who gains
everywhere and holds at home is told to join or to personalise: its head then also knows what only
others have seen. A client without tests has not enough evidence, whatever the others have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedtl.evaluation.significance import Evidence, Pairs, weigh
from fedtl.scenario.schema import Verdict as Rule
from fedtl.types import Int64

ADVICE = ("join", "personalise", "stay alone", "not enough evidence")

EFFECTS = ("gains", "no evidence", "harmed")
"""Of the federated head on a client's own tests, for a sign of 1, 0 and -1."""

FEDERATED = "federated"


@dataclass(frozen=True)
class Compared:
    """One head against each client's own head, trained alone, on the same test examples.

    Attributes:
        home: on the client's own tests.
        everyone: on everybody's; None where own heads stayed with their clients.
    """

    home: Pairs
    everyone: Pairs | None


@dataclass(frozen=True)
class Counsel:
    """What every compared client is told.

    Attributes:
        clients: int64 [k].
        home: evidence on the federated head at home.
        effects: one of EFFECTS for each, None for a client without tests.
        advice: one of ADVICE for each.
    """

    clients: Int64
    home: Evidence
    effects: tuple[str | None, ...]
    advice: tuple[str, ...]


def counsel(clients: Int64, compared: Mapping[str, Compared], rule: Rule, seed: int) -> Counsel:
    """Weigh the federated head, and what clients make of it, against their own heads.

    Holm's correction runs over the clients, for tuned heads over the clients and these heads.

    Args:
        clients: int64 [k], whose rows the pairs are.
        compared: the federated head and the tuned ones (any other name).
        seed: of the bootstrap's draws.
    """
    federated = compared[FEDERATED]
    tuned = [found for name, found in compared.items() if name != FEDERATED]
    home = weigh(federated.home, rule, seed)
    everywhere = _signs([federated], rule, seed)[0]
    theirs = weigh(_joined([one.home for one in tuned]), rule, seed)
    tuned_home = _split(theirs.sign, len(tuned))
    tuned_holds = _split(_holds(theirs, rule), len(tuned))
    tuned_everywhere = _signs(tuned, rule, seed)
    holds = _holds(home, rule)
    effects, advice = [], []
    for i, examples in enumerate(federated.home.examples.tolist()):
        effects.append(EFFECTS[1 - int(home.sign[i])] if examples else None)
        columns = zip(tuned_home, tuned_everywhere, tuned_holds, strict=True)
        others = [Standing(int(a[i]), int(b[i]), bool(c[i])) for a, b, c in columns]
        own = Standing(int(home.sign[i]), int(everywhere[i]), bool(holds[i]))
        advice.append(advise(own, others) if examples else ADVICE[3])
    return Counsel(clients, home, tuple(effects), tuple(advice))


class Standing(NamedTuple):
    """One head against a client's own: 1 better, -1 worse, 0 neither or unknown.

    Attributes:
        home, everywhere: clear differences.
        holds: nothing speaks clearly against it at home, and it lost no more than the margin.
    """

    home: int
    everywhere: int
    holds: bool


def advise(federated: Standing, tuned: Sequence[Standing]) -> str:
    """The table above for one client."""
    if federated.home > 0:
        return "join"
    if any(one.home > 0 for one in tuned):
        return "personalise"
    if federated.holds and federated.everywhere > 0:
        return "join"
    if any(one.holds and one.everywhere > 0 for one in tuned):
        return "personalise"
    if federated.home < 0 or federated.everywhere < 0:
        return "stay alone"
    return "not enough evidence"


def _holds(evidence: Evidence, rule: Rule) -> npt.NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return (evidence.sign >= 0) & (evidence.difference >= -rule.margin)


def _signs(heads: Sequence[Compared], rule: Rule, seed: int) -> list[Int64]:
    """Where each head is better than the clients' own on everybody's tests; 0 where unknown."""
    known = [one.everyone for one in heads if one.everyone is not None]
    if len(known) < len(heads):
        return [np.zeros(len(one.home.examples), np.int64) for one in heads]
    return _split(weigh(_joined(known), rule, seed).sign, len(heads))


def _joined(parts: Sequence[Pairs]) -> Pairs:
    nobody = np.empty(0, np.int64)
    columns = zip(*([nobody] * 3, *(vars(part).values() for part in parts)), strict=True)
    return Pairs(*(np.concatenate(column) for column in columns))


def _split(values: npt.NDArray[Any], parts: int) -> list[npt.NDArray[Any]]:
    return np.split(values, parts) if parts else []
