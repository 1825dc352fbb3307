"""DP-SGD at the clients against Opacus: the norm of every example, and whole steps."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedtl.clients.private_training import train_private
from fedtl.types import Head, LocalTraining, Population

here = Path(__file__)
oracle = SimpleNamespace(**run_path(str(here.with_name("oracle.py"))))
slow = SimpleNamespace(**run_path(str(here.with_name("private_oracle.py"))))
private_plan, agree, moved = slow.private_plan, slow.agree, slow.moved

HEAD = oracle.linear_head(19, 4)


@pytest.fixture
def opacus() -> Iterator[SimpleNamespace]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        yield SimpleNamespace(GradSampleModule=GradSampleModule, DPOptimizer=DPOptimizer)


def linear(opacus: SimpleNamespace, head: Head) -> torch.nn.Module:
    """Opacus' module of a head, in float64."""
    layer = torch.nn.Linear(*reversed(head["weight"].shape), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head["weight"]))
        layer.bias.copy_(torch.from_numpy(head["bias"]))
    return opacus.GradSampleModule(layer)


def backward(module: torch.nn.Module, people: Population, client: int) -> None:
    data = people.client(client)
    scores = module(torch.from_numpy(data.features).double())
    torch.nn.functional.cross_entropy(scores, torch.from_numpy(data.labels).long()).backward()


def test_opacus_has_the_same_norm_of_every_example(opacus: SimpleNamespace) -> None:
    """One row a client: its step is the example's gradient, or that shortened to the clip."""
    people = oracle.federation([1] * 40, 19, 4)
    everyone = dataclasses.replace(
        people, train=dataclasses.replace(people.train, offsets=np.array([0, 40]))
    )
    module = linear(opacus, HEAD)
    backward(module, everyone, 0)
    norms = np.sqrt(sum(p.grad_sample.flatten(1).square().sum(1) for p in module.parameters()))
    clip = float(np.median(norms))
    for bound in (1e6, clip):
        plan = private_plan(people, LocalTraining(1, 1, 1.0), clip=bound, noise=0.0)
        updates = train_private(people, HEAD, plan)
        own = [np.linalg.norm(moved(updates, HEAD, i)) for i in range(40)]
        np.testing.assert_allclose(own, np.minimum(norms, bound), rtol=3e-6)


@pytest.mark.parametrize("clip", [0.1, 1.5, 1e6])
def test_opacus_takes_the_same_step(opacus: SimpleNamespace, clip: float) -> None:
    people = oracle.federation([60], 19, 4)
    module = linear(opacus, HEAD)
    optimizer = opacus.DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=60,
    )
    training = LocalTraining(1, 60, 0.3, momentum=0.9, weight_decay=0.01)
    for epochs in (1, 2, 3):
        optimizer.zero_grad()
        backward(module, people, 0)
        optimizer.step()
        # Opacus shortens to clip / (norm + 1e-6): a part in 10^5 less at a clip of 0.1.
        plan = private_plan(
            people, dataclasses.replace(training, epochs=epochs), clip=clip, noise=0.0
        )
        updates = train_private(people, HEAD, plan)
        layer = module._module
        agree(
            updates,
            {
                "weight": layer.weight.detach().numpy()[None],
                "bias": layer.bias.detach().numpy()[None],
            },
            atol=1e-5 * min(clip, 1),
        )
