"""What each client should do: join, personalise, stay alone, or wait for more evidence.

A client's own head, trained alone, is what it has without the federation. Against it stand the
federated head and the heads that the client makes of that one for itself ("tuned": fine-tuned, and
the strategy's own personal heads). Each difference counts, or not, by the scenario's ``[verdict]``.

    federated at home | tuned at home | federated everywhere  | advice
    ------------------+---------------+-----------------------+--------------------
    gains             | any           | any                   | join
    no evidence       | gains         | any                   | personalise
    no evidence       | else          | gains                 | join
    no evidence       | else          | no evidence, unknown  | not enough evidence
    no evidence       | else          | harmed                | stay alone
    harmed            | gains         | any                   | personalise
    harmed            | no evidence   | any; tuned gains      | personalise
    harmed            | else          | any                   | stay alone

"At home" are the client's own tests, "everywhere" everybody's. So who loses nothing at home and
clearly gains elsewhere is told to join: its head then also knows what only others have seen. Who is
harmed at home is told to personalise where a tuned head is better than its own, or as good at home
and better everywhere; where no tuned head was judged, none is. A client without tests has not
enough evidence, whatever the others have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
    tuned_home = _split(weigh(_joined([one.home for one in tuned]), rule, seed).sign, len(tuned))
    tuned_everywhere = _signs(tuned, rule, seed)
    effects, advice = [], []
    for i, examples in enumerate(federated.home.examples.tolist()):
        effects.append(EFFECTS[1 - int(home.sign[i])] if examples else None)
        others = [(int(a[i]), int(b[i])) for a, b in zip(tuned_home, tuned_everywhere, strict=True)]
        told = advise(int(home.sign[i]), int(everywhere[i]), others)
        advice.append(told if examples else ADVICE[3])
    return Counsel(clients, home, tuple(effects), tuple(advice))


def advise(home: int, everywhere: int, tuned: Sequence[tuple[int, int]]) -> str:
    """The table above for one client: 1 better than its own head, -1 worse, 0 neither or unknown.

    Args:
        home, everywhere: of the federated head.
        tuned: of each tuned head, at home and everywhere.
    """
    if home > 0:
        return "join"
    if any(at_home > 0 for at_home, _ in tuned):
        return "personalise"
    if home < 0:
        won_back = any(at_home == 0 and abroad > 0 for at_home, abroad in tuned)
        return "personalise" if won_back else "stay alone"
    return {1: "join", 0: "not enough evidence", -1: "stay alone"}[everywhere]


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


def _split(values: Int64, parts: int) -> list[Int64]:
    return np.split(values, parts) if parts else []
