"""Domain-adversarial training against autograd with a reversed gradient, and through whole runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedtl.clients.adversarial import domain_numbers, with_domains
from fedtl.clients.batches import batch_order
from fedtl.clients.training import train_clients
from fedtl.errors import InputError
from fedtl.types import LocalTraining, Population

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("oracle.py"))))
HEADS = {"one": oracle.mlp_head(7, [6], 3), "two": oracle.mlp_head(7, [9, 5], 3)}
DOMAINS = ("snow", "rain", "fog", "rain")
PLAIN = LocalTraining(3, 8, 0.1, adversarial=0.7)
FULL = LocalTraining(3, 8, 0.1, 0.9, 0.05, 0.2, adversarial=0.7)


def people() -> Population:
    return dataclasses.replace(oracle.federation([31, 12, 9, 0], 7, 3), domains=DOMAINS)


def begun(kind: str) -> dict[str, np.ndarray]:
    """A head whose classifier of domains is no longer at zero."""
    head = with_domains(HEADS[kind], 3)
    random = np.random.default_rng(7)
    return {
        n: random.normal(size=t.shape).astype(np.float32) if n.startswith("domain.") else t
        for n, t in head.items()
    }


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight):
        context.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return -context.weight * gradient, None


def trained_against(data, head, key, own: LocalTraining, domain: int):
    """Ganin and Lempitsky's layer in autograd, float64."""
    x, y = torch.tensor(data.features.astype(np.float64)), torch.tensor(data.labels.astype(int))
    start = {name: torch.tensor(tensor.astype(np.float64)) for name, tensor in head.items()}
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.SGD(
        tensors.values(), own.learning_rate, own.momentum, weight_decay=own.weight_decay
    )
    entropy = torch.nn.functional.cross_entropy
    for epoch in range(own.epochs):
        for chosen in torch.tensor(batch_order(key, len(y), epoch)).split(own.batch_size):
            optimizer.zero_grad()
            hidden = x[chosen]
            for i in range(sum(name.startswith("hidden.") for name in head) // 2):
                weight, bias = tensors[f"hidden.{i}.weight"], tensors[f"hidden.{i}.bias"]
                hidden = torch.relu(hidden @ weight.T + bias)
            loss = entropy(hidden @ tensors["weight"].T + tensors["bias"], y[chosen])
            turned = Reversed.apply(hidden, own.adversarial)
            told = turned @ tensors["domain.weight"].T + tensors["domain.bias"]
            loss = loss + entropy(told, torch.full_like(y[chosen], domain))
            pull = sum((tensors[n] - start[n]).square().sum() for n in tensors)
            (loss + own.proximal / 2 * pull).backward()
            optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("training", [PLAIN, FULL], ids=["plain", "full"])
def test_agrees_with_a_reversed_gradient_in_autograd(kind, training) -> None:
    world, head = people(), begun(kind)
    plan = oracle.plan_for(world, training)
    found = train_clients(world, head, plan, threads=2)
    for client, domain in enumerate((2, 1, 0)):  # in the order of their names
        key = int(plan.batch_keys[client])
        expected = trained_against(world.client(client), head, key, training, domain)
        for name, tensor in expected.items():
            np.testing.assert_allclose(found.tensors[name][client], tensor, atol=2e-5)
    assert all(np.array_equal(found.tensors[n][3], t) for n, t in head.items())


def test_without_weight_the_head_is_that_of_plain_training() -> None:
    world, head = people(), begun("two")
    silent = oracle.plan_for(world, dataclasses.replace(FULL, adversarial=0.0))
    beside = train_clients(world, head, silent).tensors
    plain = train_clients(world, HEADS["two"], silent).tensors
    assert all(beside[name].tobytes() == tensor.tobytes() for name, tensor in plain.items())
    assert not np.array_equal(beside["domain.weight"][0], head["domain.weight"])


def test_a_client_does_not_depend_on_who_else_trains() -> None:
    world, head, plan = people(), begun("one"), oracle.plan_for(people(), FULL)
    together = train_clients(world, head, plan, threads=2).tensors
    alone = train_clients(world, head, plan.part(np.array([1]))).tensors
    assert all(together[name][1].tobytes() == alone[name][0].tobytes() for name in head)


def test_domains_that_cannot_be_told_apart() -> None:
    assert domain_numbers(("b", "a", "b")).tolist() == [1, 0, 1]
    for domains, got in (
        (("a", "a"), "one domain, 'a'"),
        (("a", "", "b"), "1 clients without"),
        (("a", "mixed", "b"), "1 clients without"),
    ):
        with pytest.raises(InputError, match="two domains or more") as error:
            domain_numbers(domains)
        assert got in error.value.line()
    with pytest.raises(InputError, match="too few domains"):
        train_clients(people(), with_domains(HEADS["one"], 2), oracle.plan_for(people(), PLAIN))


SCENARIO = """name = "foe"
seed = 2
rounds = 4
[data]
source = "arrays"
path = "foe.npz"
[clients]
partition = "domain"
[backbone]
name = "identity"
[head]
kind = "mlp"
hidden = [12]
[training]
local_epochs = 2
batch_size = 16
[evaluation]
references = ["local_only", "centralised"]
[adaptation]
adversarial = 0.3
"""


@pytest.fixture
def foe(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    domain, y = np.repeat(["x", "y", "z"], 60), np.tile(np.arange(3), 60)
    x = random.normal(size=(180, 6)) + 2 * np.eye(6)[y]
    x[domain == "y", 4:] += 2
    np.savez(tmp_path / "foe.npz", x=x.astype(np.float32), y=y, domain=domain)
    (tmp_path / "foe.toml").write_text(SCENARIO)


def test_a_run_keeps_a_plain_head_and_resumes_to_the_same(foe, fedtl, tmp_path) -> None:
    done = fedtl("run", "foe.toml", "--out", "whole")
    assert done.returncode == 0, done.stderr
    assert set(load_file(tmp_path / "whole/head.safetensors")) == set(HEADS["one"])
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    plain = 12 * 6 + 12 + 3 * 12 + 3
    travelling = 4 * (plain + 3 * 12 + 3)
    assert summary["bytes_up"] == 3 * 4 * travelling, "the classifier travels"
    stop = {"FEDTL_FAIL": "after_commit:interrupt:2"}
    assert fedtl("run", "foe.toml", "--out", "broken", env=stop).returncode == 130
    assert fedtl("resume", "broken").returncode == 0
    resumed = json.loads((tmp_path / "broken/summary.json").read_text())
    assert resumed["head_sha256"] == summary["head_sha256"]
    without = fedtl("run", "foe.toml", "--out", "plain", "--set", "adaptation.adversarial=0")
    assert without.returncode == 0
    other = json.loads((tmp_path / "plain/summary.json").read_text())
    assert other["head_sha256"] != summary["head_sha256"]


def test_one_domain_is_refused_before_anything_is_trained(foe, fedtl) -> None:
    told = ("--set", "clients.partition=iid", "--set", "clients.num=3")
    for command in (("check", "foe.toml"), ("run", "foe.toml", "--out", "none")):
        refused = fedtl(*command, *told)
        assert refused.returncode == 2
        assert "two domains or more" in refused.stderr


@pytest.mark.parametrize(
    "sets",
    [
        ("strategy.name=scaffold",),
        ("strategy.name=median",),
        ("strategy.name=knnper", "strategy.neighbours=3"),
        ("compression.kind=int8",),
        ("adaptation.prior=balanced_softmax", "training.weight_decay=0.01"),
    ],
    ids=lambda sets: sets[0].partition("=")[2],
)
def test_any_strategy_that_trains_one_head(foe, fedtl, tmp_path, sets) -> None:
    sets = (*sets, "rounds=2", "evaluation.references=[]")
    told = [part for one in sets for part in ("--set", one)]
    done = fedtl("run", "foe.toml", "--out", "out", *told)
    assert done.returncode == 0, done.stderr
    assert set(load_file(tmp_path / "out/head.safetensors")) == set(HEADS["one"])
