"""Modules as files: written by runs, read with suspicion, and put on their trunk again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from fedtl.errors import InputError
from fedtl.interrupts import Interrupts
from fedtl.modules import applying, find_module, list_modules
from fedtl.modules.applying import apply_modules, facts_of, write_predictions
from fedtl.modules.trunk_of import comes_along, given_trunk, next_step, scenario_of
from fedtl.parity import Quiet
from fedtl.results.module_card import FORMAT, HEAD, read_card
from fedtl.scenario.load import dump_scenario, validate
from fedtl.scenario.schema import Scenario
from fedtl.simulation import run_scenario

NET = {"name": "squeezenet1_1", "weights": "none", "image_size": 32, "extraction": "torch"}


def pictures(folder: Path, classes: tuple[str, ...], each: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
            pixels[:, :, number % 3] += 150
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def asked(data: Path, **changes: Any) -> Scenario:
    raw = {
        "name": "module", "seed": 4, "rounds": 2,
        "data": {"source": "folder", "path": str(data)},
        "clients": {"num": 2},
        "backbone": NET,
        "training": {"local_epochs": 1, "learning_rate": 0.05},
        "evaluation": {"references": []},
        **changes,
    }  # fmt: skip
    return validate(raw, "test", {})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of three modes over the same pictures, and their summaries."""
    place = tmp_path_factory.mktemp("modules")
    data = pictures(place / "data", ("green", "red"))
    found: dict[str, Any] = {"data": data}
    transfers = {
        "fedit": {"mode": "lora", "rank": 2},
        "flora": {"mode": "lora", "rank": 2, "aggregation": "flora"},
        "bitfit": {"mode": "bitfit"},
    }
    for name, transfer in transfers.items():
        scenario = asked(data, transfer={**transfer, "rate_factor": 20.0})
        with Interrupts() as interrupts:
            summary = run_scenario(scenario, place / name, Quiet(lambda *_: None), interrupts)
        found[name] = (place / name, scenario, summary)
    return found


def test_wire_bytes_are_as_the_formula_says(runs) -> None:
    """r (in + out) floats a layer, up and down; FLoRA's sum goes down besides."""
    rounds = clients = 2
    for name in ("fedit", "flora"):
        path, _, summary = runs[name]
        head = load_file(path / HEAD)
        sums = sum(t.nbytes for n, t in head.items() if n.endswith(".merged"))
        factors = 0
        for own, a in head.items():
            if own.endswith(".A"):
                b = head[own.removesuffix("A") + "B"]
                assert (a.shape[0], b.shape[1]) == (2, 2)
                factors += 4 * 2 * (a.shape[1] + b.shape[0])
        assert factors > 0
        linear = head["weight"].nbytes + head["bias"].nbytes
        assert summary["bytes_up"] == rounds * clients * (factors + linear)
        assert summary["bytes_down"] == summary["bytes_up"] + rounds * clients * sums
        assert (sums > 0) == (name == "flora")


def test_the_card_says_what_it_fits_and_nothing_of_this_machine(runs) -> None:
    path, scenario, summary = runs["fedit"]
    card = find_module(str(path))
    facts = card.as_facts()
    assert facts["format"] == FORMAT
    assert facts["classes"] == ["green", "red"]
    assert facts["scenario_hash"] == scenario.hash()
    assert facts["trained_on"]["examples"] == summary["data"]["train"]
    assert facts["measured"]["accuracy"] == summary["final"]["accuracy"]
    assert card.kind == "lora, linear head"
    assert str(path.parent) not in json.dumps({**facts, "path": ""})


def test_a_module_judges_as_its_run_did_and_one_pass_serves_all(runs, monkeypatch, tmp_path):
    cards = [find_module(str(runs[name][0])) for name in ("fedit", "flora", "bitfit")]
    passes = []
    made = applying.make_features
    monkeypatch.setattr(applying, "make_features", lambda *a: passes.append(1) or made(*a))
    found = apply_modules(cards, runs["fedit"][1], whole=False)
    assert passes == [1]
    facts = facts_of(found, predict=False)
    for one, name in zip(facts["modules"], ("fedit", "flora", "bitfit"), strict=True):
        assert one["accuracy"] == pytest.approx(runs[name][2]["final"]["accuracy"])
    write_predictions(found, tmp_path / "out.csv")
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table) == facts["examples"] == runs["fedit"][2]["data"]["test"]
    right = (table["label"] == table["predicted_2"]).mean()
    assert right == pytest.approx(facts["modules"][1]["accuracy"])


def test_all_of_a_folder_by_the_card_alone(runs, tmp_path) -> None:
    alone = tmp_path / "mine.safetensors"
    alone.write_bytes((runs["fedit"][0] / HEAD).read_bytes())
    card = read_card(alone)
    found = apply_modules([card], scenario_of(card, runs["data"]), whole=True)
    assert facts_of(found, predict=False)["examples"] == 24
    beside = find_module(str(runs["fedit"][0]))
    other = apply_modules([beside], scenario_of(beside, runs["data"]), whole=True)
    assert np.array_equal(found.modules[0].probability, other.modules[0].probability)


def test_other_classes(runs, tmp_path) -> None:
    card = find_module(str(runs["fedit"][0]))
    data = pictures(tmp_path / "data", ("cat", "dog", "red"), each=3)
    scenario = scenario_of(card, data)
    with pytest.raises(InputError, match=r"knows not all classes.*cat, dog"):
        apply_modules([card], scenario, whole=True)
    facts = facts_of(apply_modules([card], scenario, whole=True, predict=True), predict=True)
    assert sum(facts["modules"][0]["predicted"].values()) == 9
    assert facts["modules"][0]["accuracy"] is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backbone": {**NET, "image_size": 64}}, "image size"),
        ({"seed": 5}, "for another trunk.*squeezenet1_1"),
    ],
)
def test_another_trunk_is_refused_by_name(runs, changes, says) -> None:
    card = find_module(str(runs["fedit"][0]))
    with pytest.raises(InputError, match=says):
        apply_modules([card], asked(runs["data"], **changes), whole=True)


def rewritten(runs, place: Path, change: Callable[[dict[str, str], dict[str, Any]], None]) -> Path:
    """The LoRA module with another card or other tensors."""
    card = find_module(str(runs["fedit"][0]))
    facts, tensors = dict(card.facts), dict(load_file(card.path))
    change(facts, tensors)
    save_file(tensors, place / "m.safetensors", metadata=facts)
    return place / "m.safetensors"


def _sections(**own: Any) -> str:
    return json.dumps({"backbone": NET, "transfer": {"mode": "head"}, "head": {}, **own})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f, t: f.update(cut="features.3"), "another cut"),
        (lambda f, t: f.update(whole="no"), "no model alone"),
        (lambda f, t: f.update(aligned="coral"), "aligned for itself"),
        (lambda f, t: f.update(sections="{"), "damaged"),
        (lambda f, t: f.update(sections="[]"), "damaged"),
        (lambda f, t: f.update(seed="x"), "damaged"),
        (lambda f, t: f.update(classes="green"), "no two classes"),
        (lambda f, t: t.update(bias=np.zeros(3, np.float32)), "'bias' is not as its card says"),
        (lambda f, t: t.update(bias=np.full(2, np.nan, np.float32)), "not finite"),
        (lambda f, t: t.update(bias=np.zeros(2)), "F64"),
        (lambda f, t: f.pop("cut"), "lacks cut"),
        (lambda f, t: f.update(format="fedtl-module 9"), "no module"),
        (lambda f, t: f.clear(), "no card"),
    ],
)
def test_a_strange_module_is_refused(runs, tmp_path, change, says) -> None:
    path = rewritten(runs, tmp_path, change)
    with pytest.raises(InputError, match=says):
        apply_modules([read_card(path)], runs["fedit"][1], whole=False, predict=True)


def test_a_card_brings_no_code(runs, tmp_path) -> None:
    backbone = {"name": "module", "model": "os:system"}
    path = rewritten(runs, tmp_path, lambda f, t: f.update(sections=_sections(backbone=backbone)))
    with pytest.raises(InputError, match="cannot bring code"):
        scenario_of(read_card(path), runs["data"])


def test_a_scenario_that_came_with_it_brings_no_code(runs, tmp_path) -> None:
    path = rewritten(runs, tmp_path, lambda f, t: None)
    code = {"name": "module", "model": "os:system", "image_size": 8}
    strange = asked(runs["data"], backbone=code)
    (tmp_path / "scenario.toml").write_text(dump_scenario(strange))
    with pytest.raises(InputError, match="cannot bring code"):
        scenario_of(read_card(path), runs["data"])


@pytest.mark.parametrize(
    ("backbone", "plain"),
    [
        ({}, True),
        ({"name": "efficientnet_lite0", "weights": "default"}, True),
        ({"name": "efficientnet_lite0", "weights": "/home/me/other.pth"}, False),
        ({"name": "hf"}, True),
        ({"name": "hf", "weights": "somebody/model"}, False),
        ({"name": "hf", "weights": "/etc"}, False),
        ({"name": "identity"}, True),
        ({"name": "fourier"}, True),
        ({"name": "forest", "weights": "none"}, False),  # its public set is a file
        ({"name": "mobilenet_v2"}, False),
        ({"name": "mobilenet_v2", "weights": "none"}, True),
        ({"name": "timm", "model": "hf-hub:a/b", "weights": "none"}, False),
        ({"name": "onnx", "weights": "/x.onnx"}, False),
        ({"name": "hub", "weights": "none"}, False),
        ({"name": "module", "weights": "none"}, False),
    ],
)
def test_what_needs_no_network_no_file_and_no_code(backbone: dict[str, Any], plain: bool) -> None:
    assert comes_along(backbone) is plain


@pytest.mark.parametrize("beside", [False, True])
def test_a_trunk_from_elsewhere_is_the_users_to_name(runs, tmp_path, monkeypatch, beside) -> None:
    """Neither a card nor the scenario that came with it has a model fetched."""
    from fedtl.transfer import hf_trunk

    monkeypatch.setattr(hf_trunk, "fetch", lambda name: pytest.fail(f"{name} was fetched"))
    far = {"name": "hf", "weights": "somebody/model"}
    path = rewritten(runs, tmp_path, lambda f, t: f.update(sections=_sections(backbone=far)))
    strange = """name = "x"
    data = { source = "texts", path = "x.csv" }
    backbone = { name = "hf", weights = "somebody/model" }"""
    if beside:
        (tmp_path / "scenario.toml").write_text(strange)
    card, data = read_card(path), runs["data"]
    with pytest.raises(InputError, match="would have to be fetched") as caught:
        scenario_of(card, data)
    to = str(tmp_path) if beside else "SCENARIO"
    typed = f"fedtl module apply {path} --to {to} --data"
    assert f"type '{typed} {data}'" in caught.value.line()
    assert next_step(card, "FOLDER") == f"{typed} FOLDER"
    if beside:
        given = given_trunk(to).backbone
        assert scenario_of(card, data, given).backbone.weights == "somebody/model"


def test_the_users_own_trunk_over_other_data(runs) -> None:
    """--to RUN --data PATH is what --data PATH gives where the trunk comes along."""
    path = runs["fedit"][0]
    card = find_module(str(path))
    assert given_trunk(str(path)) == runs["fedit"][1]
    own = scenario_of(card, runs["data"], given_trunk(str(path), ("seed=9",)).backbone)
    assert own == scenario_of(card, runs["data"])
    assert next_step(card, "a b") == f"fedtl module apply {card.path} --data 'a b'"


def test_modules_are_found(runs, tmp_path) -> None:
    place = runs["fedit"][0].parent
    cards, others = list_modules([place])
    assert {card.path.parent.name for card in cards} == {"fedit", "flora", "bitfit"}
    assert others == []
    (tmp_path / "x.safetensors").write_bytes(b"no")
    cards, others = list_modules([tmp_path])
    assert cards == []
    assert others[0][1].startswith("it is no safetensors file")
    with pytest.raises(InputError, match="no such folder"):
        list_modules([tmp_path / "gone"])
