"""Every kind of trunk, cut and head leaves the house as a file that answers as the run does."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.errors import InputError, SecurityRefusal
from fedtl.export import export_run, load_model
from fedtl.export.opened import open_model
from fedtl.export.samples import open_source
from fedtl.interrupts import Interrupts
from fedtl.parity import Quiet
from fedtl.scenario.load import validate
from fedtl.simulation import run_scenario

QUIET = Quiet(lambda *_: None)

NET = {"name": "timm", "model": "test_resnet", "weights": "none", "image_size": 32}
SCALED = {"mean": [120.0, 110.0, 100.0], "std": [60.0, 61.0, 62.0]}
TAIL = {"mode": "last_blocks", "cut": 1}
ONNX, ALL = ("onnx",), ("onnx", "torch", "safetensors")

IMAGES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "efficientnet_lite0": ({"backbone": {"image_size": 32}}, ONNX),
    "half precision": ({"backbone": {**NET, "feature_dtype": "float16"}}, ONNX),
    "last blocks": ({"backbone": NET, "transfer": TAIL}, ALL),
    "recomputed": ({"backbone": NET, "transfer": {**TAIL, "activations": "recompute"}}, ONNX),
    "low rank": ({"backbone": NET, "transfer": {"mode": "lora", "cut": 1, "rank": 2}},
                 ("onnx", "safetensors")),
    "adapter": ({"backbone": NET, "transfer": {"mode": "adapter", "cut": 1}}, ("onnx",)),
    "scratch": ({"backbone": NET, "transfer": {"mode": "scratch", "batch_norm": "aggregated"}},
                ONNX),
    "torchvision": ({"backbone": {"name": "squeezenet1_1", "weights": "none", "image_size": 32}},
                    ONNX),
    "module": ({"backbone": {"name": "module", "path": "own", "model": "contract_net:Net",
                             "weights": "net.safetensors", "image_size": 32, **SCALED}},
               ("onnx", "safetensors")),
    "onnx": ({"backbone": {"name": "onnx", "weights": "net.onnx", "image_size": 32, **SCALED}},
             ONNX),
    "onnx, one at a time": ({"backbone": {"name": "onnx", "weights": "nhwc.onnx"}}, ONNX),
}  # fmt: skip

MLP = {"kind": "mlp", "hidden": [7, 5]}
ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "identity": ({}, ALL),
    "mlp": ({"head": MLP}, ("onnx", "safetensors")),
    "cosine": ({"head": {"kind": "cosine"}}, ONNX),
    "prototype": ({"head": {"kind": "prototype"}}, ONNX),
    "closed form": ({"strategy": {"name": "fed3r"}}, ONNX),
    "random features": ({"strategy": {"name": "fed3r", "random_features": 16}}, ONNX),
    "fourier": ({"backbone": {"name": "fourier", "width": 20}}, ONNX),
    "windows": ({"backbone": {"name": "windows", "window": 3, "channels": 2}}, ("onnx", "torch")),
    "forest": ({"backbone": {"name": "forest", "path": "public.npz", "width": 64}}, ONNX),
    "onnx of rows": ({"backbone": {"name": "onnx", "weights": "rows.onnx"}}, ONNX),
}

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trunks, pictures and rows, all tiny."""
    import torch
    from safetensors.torch import save_file

    path = Path(__file__).with_name("test_trunks.py")
    spec = importlib.util.spec_from_file_location("trunks_for_export", path)
    assert spec is not None
    assert spec.loader is not None
    trunks = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = trunks  # dataclasses look for their module
    spec.loader.exec_module(trunks)
    folder = tmp_path_factory.mktemp("export")
    (folder / "own").mkdir()
    (folder / "own/contract_net.py").write_text(trunks.NET)
    space: dict[str, Any] = {}
    exec(trunks.NET, space)
    torch.manual_seed(1)
    net = space["Net"]().eval().requires_grad_(False)
    save_file(net.state_dict(), folder / "net.safetensors")
    trunks.write_pictures(net, folder)
    trunks.write_rows(folder / "rows.onnx")
    stream = np.random.default_rng(0)
    y = np.arange(90) % 3
    pixels = stream.integers(0, 256, (90, 36, 33, 3))
    pixels[np.arange(90), :, :, y] //= 2
    np.savez(folder / "pictures.npz", x=pixels.astype(np.uint8), y=y)
    x = stream.normal(size=(90, 12)).astype(np.float32)
    x[np.arange(90), y] += 2
    np.savez(folder / "rows.npz", x=x, y=y)
    np.savez(folder / "public.npz", x=x + 0.1, y=y)
    yield folder
    for name in ("contract_net", spec.name):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def make(folder: Path) -> Make:
    """Runs a case; every case once."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name in made:
            return made[name]
        images = name in IMAGES
        content = dict((IMAGES if images else ROWS)[name][0])
        backbone = dict(content.pop("backbone", {"name": "identity"}))
        for key in ("path", "weights"):
            if "." in backbone.get(key, "") or backbone.get(key) == "own":
                backbone[key] = str(folder / backbone[key])
        scenario = {
            "name": "exported",
            "seed": 5,
            "rounds": 2,
            "data": {"source": "arrays", "test_fraction": 0.3,
                     "path": str(folder / ("pictures.npz" if images else "rows.npz"))},
            "clients": {"num": 3},
            "backbone": backbone,
            "training": {"local_epochs": 1, "batch_size": 8},
            "evaluation": {"references": []},
            **content,
        }  # fmt: skip
        path = folder / f"run {len(made)}"
        run_scenario(validate(scenario, "test", {}), path, QUIET, Interrupts())
        made[name] = path
        return path

    return run


def check(run: Path, formats: tuple[str, ...]) -> dict[str, Any]:
    """Export in every format, and hold each file to the run once more, from outside."""
    source = open_source(open_model(run))
    sample = source.tests()
    assert sample.labels is not None, sample.note
    shifted = np.exp(sample.scores - sample.scores.max(1, keepdims=True))
    wanted = shifted / shifted.sum(1, keepdims=True)
    card: dict[str, Any] = {}
    for to in formats:
        facts = export_run(run, to, QUIET, Interrupts())
        card = facts["card"]
        assert not card["parity"]["note"]
        assert card["parity"]["examples"] == len(sample)
        assert card["parity"]["agreement"] == 1.0
        found = _answers(to, facts["files"][0], sample.inputs)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert np.ptp(wanted, axis=0).max() > 1e-3  # the examples do get different answers
    return card


def _answers(to: str, file: str, inputs: Any) -> np.ndarray:
    import torch

    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        fixed = session.get_inputs()[0].shape[0]
        size = fixed if isinstance(fixed, int) else 7
        count = len(next(iter(inputs.values())))
        parts = [
            session.run(["probabilities"], {n: a[i : i + size] for n, a in inputs.items()})[0]
            for i in range(0, count, size)
        ]
        return np.concatenate(parts)
    program = (
        torch.export.load(file).module() if to == "torch" else load_model(file, own_code=True)[0]
    )
    with torch.no_grad():
        return program(*(torch.from_numpy(a) for a in inputs.values()))[1].numpy()


@pytest.mark.parametrize("name", IMAGES)
def test_pictures(name: str, make: Make) -> None:
    card = check(make(name), IMAGES[name][1])
    assert card["inputs"] == {"pixels": "uint8 [n, 32, 32, 3], RGB, 0 to 255"}
    assert card["preprocessing"]["crop"] == 32


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, make: Make) -> None:
    card = check(make(name), ROWS[name][1])
    width = 64 if name == "forest" else 12  # a forest is no program: its leaves go in
    assert card["preprocessing"]["width"] == width
    assert ("no part of this file" in " ".join(card["preprocessing"]["steps"])) == (
        name == "forest"
    )


@pytest.mark.parametrize("name", ["onnx", "onnx of rows", "fourier"])
def test_what_does_not_go_into_a_format_is_refused(name: str, make: Make) -> None:
    with pytest.raises(InputError, match="does not go into safetensors"):
        export_run(make(name), "safetensors", QUIET, Interrupts())


def test_a_file_that_names_code_runs_none(make: Make) -> None:
    facts = export_run(make("module"), "safetensors", QUIET, Interrupts())
    with pytest.raises(SecurityRefusal, match="names code"):
        load_model(facts["files"][0])


@pytest.fixture(scope="module")
def text_run(folder: Path) -> Path:
    """Two rounds on a BERT of two layers that reads words it has never seen before."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    import torch

    place = folder / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]"
    )
    fast.save_pretrained(place)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).eval().save_pretrained(place)
    stream = np.random.default_rng(1)
    lines = ["text,label"]
    for i in range(60):
        words = stream.choice(list("abcdefgh")[i % 2 * 3 : i % 2 * 3 + 5], stream.integers(1, 30))
        lines.append(f"{' '.join(words)},{'good' if i % 2 else 'bad'}")
    (folder / "texts.csv").write_text("\n".join(lines) + "\n")
    scenario = {
        "name": "texts", "seed": 1, "rounds": 2,
        "data": {"source": "texts", "path": str(folder / "texts.csv"), "test_fraction": 0.4,
                 "leakage": "allow"},
        "clients": {"num": 2},
        "backbone": {"name": "hf", "weights": str(place), "max_tokens": 20},
        "training": {"local_epochs": 1},
        "evaluation": {"references": []},
    }  # fmt: skip
    run_scenario(validate(scenario, "test", {}), folder / "text run", QUIET, Interrupts())
    return folder / "text run"


def test_texts(text_run: Path) -> None:
    from fedtl.transfer.skeletons import SKELETONS

    card = check(text_run, ("onnx", "safetensors") if "hf" in SKELETONS else ONNX)
    assert set(card["inputs"]) == {"input_ids", "attention_mask"}
    assert (text_run / "export" / "tokenizer.json").is_file()


def test_texts_are_served_as_the_run_answers(text_run: Path) -> None:
    """From the words themselves, by the tokenizer in the file, however many are beside them."""
    from fedtl.serve.predictor import open_predictor

    facts = export_run(text_run, "onnx", QUIET, Interrupts())
    predictor = open_predictor(Path(facts["files"][0]))
    source = open_source(open_model(text_run))
    assert source.features is not None
    rows = source.features.split.test.index
    texts = [source.features.examples.texts[i] for i in rows.tolist()]  # type: ignore[index]
    sample = source.tests()
    together = predictor.answer(texts)
    for i, text in enumerate(texts):
        alone = predictor.answer([text])[0]["probabilities"]
        shifted = np.exp(sample.scores[i] - sample.scores[i].max())
        wanted = shifted / shifted.sum()
        assert np.abs(np.array(list(alone.values())) - wanted).max() < 1e-4
        assert np.abs(np.array(list(together[i]["probabilities"].values())) - wanted).max() < 1e-4


def test_a_program_without_the_data_is_held_to_made_up_inputs(make: Make, folder: Path) -> None:
    run = make("last blocks")
    (folder / "pictures.npz").rename(folder / "gone.npz")
    try:
        facts = export_run(run, "onnx", QUIET, Interrupts())
    finally:
        (folder / "gone.npz").rename(folder / "pictures.npz")
    parity = facts["card"]["parity"]
    assert "could not be opened" in parity["note"]
    assert parity["accuracy"] is None
    assert parity["difference"] < 1e-4


def test_the_card_is_in_the_file_and_beside_it(make: Make) -> None:
    import onnx

    run = make("identity")
    facts = export_run(run, "onnx", QUIET, Interrupts())
    file, beside, words = map(Path, facts["files"])
    props = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert json.loads(props["card"]) == json.loads(beside.read_text()) == facts["card"]
    assert json.loads(props["labels"]) == facts["card"]["labels"]
    assert words.read_text().startswith("# exported\n")
    assert load_card_of_torch(run) == facts["card"]["labels"]


def load_card_of_torch(run: Path) -> list[str]:
    import torch

    facts = export_run(run, "torch", QUIET, Interrupts())
    extra = {"labels.json": ""}
    torch.export.load(facts["files"][0], extra_files=extra)
    return list(json.loads(extra["labels.json"]))
