"""Sums in the ring against whole numbers, and a protocol under messages that somebody spoiled."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtl.errors import FedtlError
from fedtl.privacy.ring import Beyond, quantise, ring_dtype, scale_for, to_signed, to_values
from fedtl.privacy.secure_client import ClientSide
from fedtl.privacy.secure_messages import HEADER, PHASES, Step
from fedtl.privacy.secure_simulation import SimulatedSum
from fedtl.privacy.secure_sum import SecureAbort

UNIT = Path(__file__).parents[1] / "unit" / "privacy"
oracle = SimpleNamespace(**run_path(str(UNIT / "secure_oracle.py")))

PHASE_NAMES = ["", "secagg_keys", "secagg_shares", "secagg_reveal", "secagg_\x00", "ключ"]
CLIENTS = [0, 1, 2, 3, 4]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 50),
    st.integers(0, 30),
    st.sampled_from([32, 64]),
    st.floats(1e-6, 1e6),
    st.integers(0, 2**32 - 1),
)
def test_a_ring_sum_is_the_sum_of_the_whole_numbers(
    clients: int, size: int, bits: int, value_range: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    scale, limit = scale_for(value_range, clients, bits)
    values = random.uniform(-value_range, value_range, (clients, size))
    values[random.random(values.shape) < 0.2] = value_range  # the very end of the range
    whole = quantise(values, scale, limit, bits)
    total = whole.sum(axis=0, dtype=ring_dtype(bits))
    columns = np.rint(values * scale).T.tolist()
    assert to_signed(total, bits).tolist() == [sum(map(int, column)) for column in columns]
    error = np.abs(to_values(total, scale, bits) - values.sum(axis=0))
    rounding = 1e-15 * clients * clients * value_range  # of the float64 sum itself
    assert error.max(initial=0.0) <= clients / (2 * scale) + rounding


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 10**6), st.sampled_from([32, 64]), st.floats(1e-3, 1e3), st.floats())
def test_nothing_that_could_wrap_is_sent(
    clients: int, bits: int, value_range: float, value: float
) -> None:
    scale, limit = scale_for(value_range, clients, bits)
    try:
        sent = quantise([value], scale, limit, bits)
    except Beyond:
        assert not abs(value) <= value_range
    else:
        assert clients * abs(int(to_signed(sent, bits)[0])) < 2 ** (bits - 1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sets(st.integers(0, 1000), min_size=2, max_size=12),
    st.sampled_from([None, 2, 4, 7]),
    st.sampled_from([32, 64]),
    st.integers(1, 20),
    st.integers(0, 2**32 - 1),
)
def test_masks_cancel(
    ids: set[int], neighbours: int | None, bits: int, size: int, seed: int
) -> None:
    clients = np.array(sorted(ids))
    vectors = oracle.vectors_for(sorted(ids), size, bits, seed)
    total = SimulatedSum(clients, 2, neighbours, bits, size=size, run="r", round=1, seed=seed)
    assert total.begin().tolist() == sorted(ids)
    total.add(clients, np.stack(list(vectors.values())))
    summed, survivors = total.finish()
    assert survivors.tolist() == sorted(ids)
    assert summed.tolist() == oracle.plain(vectors, sorted(ids), bits).tolist()


def spoiled(content: bytes, kind: str, place: int, by: bytes) -> bytes:
    place %= len(content) + 1
    if kind == "cut":
        return content[:place]
    if kind == "longer":
        return content + by
    if kind == "anything":
        return by
    if kind == "body":  # a proper header, and then anything
        return content[: HEADER.size] + by
    return content[:place] + by + content[place + len(by) :]


spoilings = st.tuples(
    st.sampled_from(["cut", "longer", "anything", "body", "written over"]),
    st.integers(0, 2**16),
    st.binary(min_size=1, max_size=200),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(list(Step)), st.sampled_from(CLIENTS), spoilings)
def test_spoiled_answers_end_in_the_right_sum_or_in_none(
    where: Step, whose: int, spoiling: tuple[str, int, bytes]
) -> None:
    def change(step: Step, client: int, content: bytes) -> bytes:
        return spoiled(content, *spoiling) if (step, client) == (where, whose) else content

    vectors = oracle.vectors_for(CLIENTS)
    total, carrier = oracle.secure_sum(CLIENTS, 3, change=change)
    try:
        summed, survivors = oracle.play(total, carrier, vectors, set(CLIENTS) - {3})
    except SecureAbort:
        return
    # Who lies about its own key spoils the sum, as it could with its vector; see the docstring.
    if where is not Step.KEYS or whose not in survivors:
        assert summed.tolist() == oracle.plain(vectors, survivors, 32).tolist()


@pytest.fixture(scope="module")
def asked() -> dict[tuple[Step, int], bytes]:
    total, carrier = oracle.secure_sum(CLIENTS, 3)
    oracle.play(total, carrier, oracle.vectors_for(CLIENTS), set(CLIENTS))
    return dict(carrier.sent)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(list(Step)), spoilings, st.sampled_from(PHASE_NAMES))
def test_a_client_refuses_spoiled_messages_in_words(
    asked: dict[tuple[Step, int], bytes], where: Step, spoiling: tuple[str, int, bytes], phase: str
) -> None:
    side = ClientSide(oracle.seeded(1, 1, 2))
    for step in Step:
        if step is Step.REVEAL:
            side.mask(np.zeros(7, np.uint32))
        if step is where:
            break
        side.answer(PHASES[step], asked[step, 2])
    with pytest.raises(FedtlError):
        side.answer(phase if phase != PHASES[where] else "train", asked[where, 2])
    try:
        side.answer(PHASES[where], spoiled(asked[where, 2], *spoiling))
    except FedtlError:
        side.answer(PHASES[where], asked[where, 2])  # still open for the right one
