"""What each client's own head, or predictor, is worth: beside the shared one, not in its place."""

from __future__ import annotations

from collections.abc import Callable

from fedtl import seeding
from fedtl.clients.evaluation import Right
from fedtl.clients.personal import judge_personal
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.priors import informed
from fedtl.evaluation.answers import Answers
from fedtl.evaluation.references import HEADS_AT_A_TIME, Judge, Judgement, judged
from fedtl.plans import Personal, RoundPlan
from fedtl.types import ClientMetrics, Head, Int64, LocalTraining, join_metrics


def last_plan(
    personal: Personal, training: LocalTraining, rounds: int, seed: int, clients: Int64
) -> RoundPlan:
    """What clients do for themselves after the last round; the same wherever they are.

    Args:
        personal, training, rounds, seed: see ``judge_personalised``.
        clients: int64 [k], sorted.
    """
    keys = seeding.client_keys(seed, "personal", rounds + 1, clients)
    return RoundPlan(rounds + 1, clients, keys, training, personal=personal)


def judge_personalised(
    judge: Judge,
    head: Head,
    personal: Personal,
    training: LocalTraining,
    rounds: int,
    seed: int,
    store: PersonalStore | None = None,
    check: Callable[[], None] = lambda: None,
) -> Judgement:
    """Each client makes what is its own of the last shared head, and is judged with it.

    Args:
        judge: where.
        head: the last shared one.
        personal: what clients make of it.
        training: their local training; a fine-tuning takes its number of epochs from ``personal``.
        rounds: how many there were.
        seed: the scenario's; orders batches.
        store: what the clients kept over the rounds.
        check: called before each group of clients; may raise to stop.

    Returns:
        ``accuracy`` is over all test examples, each judged by its own client's head;
        ``accuracy_everyone`` is the mean over clients of their head's accuracy on everybody's.

    Raises:
        InputError: BBSE's confusion matrix cannot be inverted well.
    """
    personal = informed(judge.population, head, personal, judge.threads)
    own: list[ClientMetrics] = []
    everyone: list[ClientMetrics] = []
    answers: list[Answers] = []
    for start in range(0, len(judge.clients), HEADS_AT_A_TIME):
        check()
        right: tuple[Right, Right] = ([], [])
        clients = judge.clients[start : start + HEADS_AT_A_TIME]
        plan = last_plan(personal, training, rounds, seed, clients)
        mine, abroad = judge_personal(
            judge.population,
            head,
            plan,
            judge.everyone,
            store=store,
            threads=judge.threads,
            device=judge.device,
            right=right,
        )
        assert abroad is not None
        own.append(mine)
        everyone.append(abroad)
        answers.append(Answers.of(*right))
    return judged(
        join_metrics(own), join_metrics(everyone), len(judge.everyone), Answers.join(answers)
    )


def forgotten(shared: Judgement, tuned: Judgement) -> float | None:
    """What the clients' tuned heads lose of the shared one's accuracy on everybody's examples."""
    before, after = shared.facts["accuracy_everyone"], tuned.facts["accuracy_everyone"]
    return None if before is None or after is None else before - after
