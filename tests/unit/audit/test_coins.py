"""Directions and the best linear guess, against matrices written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtl.audit.bounds import no_pairs, planted_coins, split_coins
from fedtl.audit.coins import Coins, Directions, best_guess, coin_scores
from fedtl.audit.reopened import reopen
from fedtl.audit.shadows import halves
from fedtl.interrupts import Interrupts


def coins_of(owner: list[int], signs: list[float]) -> Coins:
    count = max(owner) + 1
    inside = np.random.default_rng(1).random(count) < 0.5
    where = np.arange(len(owner))
    return Coins(inside, where, np.array(owner), np.array(signs), lambda way: pytest.fail("dealt"))


@pytest.mark.parametrize(
    "owner",
    [[0, 1, 2, 3], [0, 0, 1, 1, 2, 2], [0] * 9 + [1] * 7 + [2] * 5],
    ids=["single", "pairs", "clients"],
)
def test_directions_written_out(owner: list[int]) -> None:
    rng = np.random.default_rng(0)
    signs = np.tile([1.0, -1.0], len(owner))[: len(owner)]
    coins = coins_of(owner, signs.tolist())
    z, push = rng.normal(size=(len(owner), 8)), rng.normal(size=(len(owner), 3))
    directions = Directions.of(z, push, coins)
    full = np.zeros((len(coins), 3, 8))
    for i, k in enumerate(owner):
        full[k] += signs[i] * np.outer(push[i], z[i])
    np.testing.assert_allclose(directions.gram, np.einsum("icw,jcw->ij", full, full), atol=1e-12)
    matrix = rng.normal(size=(3, 8))
    np.testing.assert_allclose(
        directions.along(matrix), np.einsum("icw,cw->i", full, matrix), atol=1e-12
    )


def test_without_noise_every_coin_is_told_whatever_pushes_the_same_way() -> None:
    rng = np.random.default_rng(2)
    coins = coins_of(list(range(40)), [1.0] * 40)
    z, push = rng.normal(size=(40, 30)) + 5, rng.normal(size=(40, 4))  # all much alike
    directions = Directions.of(z, push, coins)
    s = np.where(coins.inside, 0.5, -0.5)
    movement = 0.3 * np.einsum("i,ic,iw->cw", s, push, z)
    np.testing.assert_allclose(best_guess(directions, movement, 0.3), s, atol=0.01)
    by_filter = directions.along(movement)
    assert ((by_filter > 0) == coins.inside).mean() < 1  # the plain inner product does not


def test_much_noise_shrinks_the_guess_to_nothing() -> None:
    rng = np.random.default_rng(3)
    coins = coins_of(list(range(20)), [1.0] * 20)
    directions = Directions.of(rng.normal(size=(20, 30)), rng.normal(size=(20, 4)), coins)
    assert np.abs(best_guess(directions, 1e4 * rng.normal(size=(4, 30)))).max() < 0.01
    assert (best_guess(directions, np.zeros((4, 30)), 0.0) == 0).all()


@pytest.mark.parametrize("strategy", ["fedavg", "fed3r"])
def test_scores_do_not_look_at_the_coins(make_run: Callable[..., Any], strategy: str) -> None:
    """The same head and the other coins written down: the same scores."""
    path, _ = make_run("privacy.canaries=60", f"strategy.name={strategy}")
    run = reopen(path)
    coins = planted_coins(run)
    scores, _ = coin_scores(run, coins, Interrupts())
    turned = replace(run.planted, inside=~run.planted.inside)
    other = replace(run, planted=turned, trained=coins.deal(turned.inside))
    again, _ = coin_scores(other, planted_coins(other), Interrupts())
    np.testing.assert_array_equal(scores, again)


RELEASE = ("strategy.name=fed3r", "rounds=1", "privacy.mechanism=release", "privacy.epsilon=20")


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("strategy.name=fed3r",),
        (*RELEASE, "privacy.clip=20"),
        (*RELEASE, "privacy.clip=5", "privacy.unit=client"),
    ],
    ids=" ".join,
)
def test_scores_of_pairs_do_not_look_at_the_split(
    make_run: Callable[..., Any], settings: tuple[str, ...]
) -> None:
    path, _ = make_run(*settings)
    run = reopen(path)
    coins = split_coins(run)
    scores, _ = coin_scores(run, coins, Interrupts())
    dealt = coins.deal(~coins.inside)
    other = replace(run, trained=dealt, built=replace(run.built, population=dealt))
    again, _ = coin_scores(other, replace(coins, inside=~coins.inside), Interrupts())
    np.testing.assert_allclose(scores, again, rtol=1e-7, atol=1e-9 * np.abs(scores).max())


@pytest.mark.parametrize("strategy", ["fedavg", "fed3r"])
def test_shadow_heads_share_all_rows_in_twos(make_run: Callable[..., Any], strategy: str) -> None:
    path, _ = make_run(f"strategy.name={strategy}")
    run = reopen(path)
    rows = np.concatenate([run.population.train.index, run.population.test.index])
    found = []
    for head, mask in halves(run, Interrupts()):
        found.append(mask[rows])
        assert {name: t.shape for name, t in head.items()} == {
            name: t.shape for name, t in run.head.items()
        }
        if len(found) == 4:
            break
    assert (found[0] != found[1]).all()
    assert (found[2] != found[3]).all()
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("attack.kind=label_flip", "attack.fraction=0.2"), "liars"),
        (("adaptation.features=standardise", "adaptation.allow_label_skew=true"), "adapted"),
    ],
)
def test_pairs_that_the_data_would_tell_apart(
    make_run: Callable[..., Any], settings: tuple[str, ...], why: str
) -> None:
    path, _ = make_run(*settings)
    reason = no_pairs(reopen(path))
    assert reason is not None
    assert why in reason
