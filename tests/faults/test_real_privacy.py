"""Real clients under noise and masks: two of them die in the middle of the protocol.

A SuperLink and three SuperNodes under TLS. Clients write down what they are about to hide, the
server what it sees: the sums it gets are those of what was hidden, and the head is that of the
sums. (FAULTS 8 and 72, for secure sums.)
"""

from __future__ import annotations

import json
import math
import re
import signal
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtl.privacy.ring import scale_for

CLIP, NOISE, DELTA, ROUNDS, DIES = 0.2, 1.0, 0.01, 12, 10
THRESHOLD = 0.6

SCENARIO = f"""name = "hidden"
seed = 3
rounds = {ROUNDS}
[data]
source = "arrays"
path = "all.npz"
[clients]
partition = "natural"
[backbone]
name = "identity"
[training]
local_epochs = 1
batch_size = 8
[strategy]
name = "fedavg"
weighting = "uniform"
[privacy]
mechanism = "central"
noise_multiplier = {NOISE}
clip = {CLIP}
delta = {DELTA}
secure_aggregation = "secagg"
threshold = {THRESHOLD}
[participation]
quorum = 2
patience = 1000
[evaluation]
references = []
every = 1000
[engine]
deadline_seconds = 8.0
join_seconds = 60.0
"""

RUN = "\nimport sys\nfrom fedtl.cli import run_command\nsys.exit(run_command(sys.argv[1:]))"

HIDING = (
    """
import numpy as np
from pathlib import Path
from fedtl.engines.masking import Masking
mask = Masking.mask
def writing(self, run, updates):
    np.save(Path(f"bare-{updates.round}.npy"), updates.tensors["ring.values"][0])
    return mask(self, run, updates)
Masking.mask = writing
"""
    + RUN
)

"""A client that writes down what it hides."""

SEEING = (
    """
import json
import numpy as np
from pathlib import Path
from fedtl.engines.masking import CarriedSum
finish, add = CarriedSum.finish, CarriedSum.add
def finished(self):
    total, survivors = finish(self)
    np.savez(f"seen-{self._round}.npz", total=total, survivors=survivors)
    return total, survivors
def added(self, clients, vectors):
    for client, vector in zip(clients.tolist(), vectors):
        np.save(f"masked-{self._round}-{client}.npy", vector)
    add(self, clients, vectors)
CarriedSum.finish, CarriedSum.add = finished, added
"""
    + RUN
)

"""A server that keeps all that it sees."""


def gaussian_epsilon() -> float:
    """Of all rounds together, by the analytic Gaussian mechanism (Balle and Wang 2018, (6))."""
    mu, normal = math.sqrt(ROUNDS) / NOISE, NormalDist()

    def delta(epsilon: float) -> float:
        low, high = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return normal.cdf(low) - math.exp(epsilon) * normal.cdf(high)

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    return high


@pytest.fixture(scope="module")
def ended(make_fleet: Any) -> Any:
    """The run: b dies between its shares and its answer, c between its answer and the reveal."""
    fleet = make_fleet("abc")
    a, b, c = fleet.sites.values()
    a.start("a", "--require", "secagg", "--require", "dp", program=HIDING)
    b.start(program=HIDING, FEDTL_FAIL="client_before_train:kill:2")
    c.start(program=HIDING, FEDTL_FAIL=f"client_before_secagg_reveal:kill:{DIES}")
    (fleet.place / "hidden.toml").write_text(SCENARIO)
    server = fleet.server("run", "hidden.toml", "--out", "hidden", run="hidden", program=SEEING)
    server.says("here b", 60)
    assert b.ends(seconds=60) == -signal.SIGKILL
    b.start(program=HIDING)
    assert c.ends(seconds=120) == -signal.SIGKILL
    assert server.ends(seconds=120) == 0
    return fleet, server


def test_the_run_ends_and_says_what_was_spent_and_who_dropped_out(ended: Any) -> None:
    fleet, server = ended
    fleet.clean()
    summary = json.loads((server.run / "summary.json").read_bytes())
    told = summary["privacy"]
    assert summary["epsilon"] == told["epsilon"] == pytest.approx(gaussian_epsilon(), rel=0.02)
    assert told["noise_source"] == "operating system"
    assert told["noise_at"] == "clients"
    missed = {name: server.missed(name) for name in "abc"}
    assert told["secure_aggregation"]["protocol"] == "secagg"
    assert told["secure_aggregation"]["dropouts"] == sum(map(len, missed.values()))
    assert re.match("unused: (its node went away|no answer within 8 s)", missed["b"][2])
    assert max(missed["b"]) < DIES, "it came back, and the sums hid it again"
    assert min(missed["c"]) == DIES + 1, "its answer counts although it died before the reveal"
    assert f"epsilon is {told['epsilon']:.4g}" in fleet.sites["a"].out
    assert "no differential privacy" not in fleet.sites["a"].out
    said = fleet.call("client", "audit", str(fleet.sites["a"].place / "a.audit.jsonl"))
    assert re.search(rf"train, under masks +{ROUNDS - len(missed['a'])} ", said), said


def test_the_sums_are_those_of_what_was_hidden_and_the_head_is_that_of_the_sums(
    ended: Any,
) -> None:
    fleet, server = ended
    sums: dict[int, tuple[np.ndarray[Any, Any], int]] = {}
    for path in sorted(fleet.place.glob("seen-*.npz")):
        round, seen = int(path.stem[5:]), np.load(path)
        total = np.zeros_like(seen["total"])
        for client in seen["survivors"].tolist():
            bare = np.load(fleet.sites["abc"[client]].place / f"bare-{round}.npy")
            masked = np.load(fleet.place / f"masked-{round}-{client}.npy")
            assert (masked == bare).mean() < 0.01
            total += bare
        np.testing.assert_array_equal(seen["total"], total)
        sums[round] = total, len(seen["survivors"])
    missed_by_b = {round for round, why in server.missed("b").items() if "no secure sum" not in why}
    assert {round for round, (_, count) in sums.items() if count == 2} >= missed_by_b & set(sums)
    whole = NOISE * CLIP / np.sqrt(THRESHOLD)  # so much of all three that fewer are enough
    share = whole / np.sqrt(3)
    scale, _ = scale_for(CLIP + 12 * whole, 3, 32)
    heads = {int(p.stem[6:]): load_file(p) for p in (server.run / "checkpoints").glob("*.saf*")}
    followed = 0
    for round in sorted(heads):
        if round - 1 in heads and round in sums:
            way = {n: heads[round][n] - heads[round - 1][n] for n in ("head.bias", "head.weight")}
            moved = np.concatenate([way[name].ravel() for name in sorted(way)])
            wanted = sums[round][0].view(np.int32) / scale / 3  # the mean's denominator is fixed
            rest = 3 * (moved - wanted)  # what the server added for those that are missing
            if sums[round][1] == 3:
                np.testing.assert_allclose(rest, 0, atol=3e-6)
            else:
                assert 0.9 < rest.std() / share / np.sqrt(3 - sums[round][1]) < 1.1
            spread = 2 * wanted.std() * 3 / share / np.sqrt(sums[round][1])
            assert 1.8 < spread < 2.2, "as much noise as was promised, and hardly anything else"
            followed += 1
    assert followed >= 1
