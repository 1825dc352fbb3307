"""Text trunks of every kind: tiny random models made on the spot, with a tokenizer of a few words.

The oracle is the model alone, one text at a time, without any padding.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal
from fedtl.scenario import schema
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.extraction import Exports, open_forward
from fedtl.transfer.features import FeatureStore
from fedtl.transfer.hf_trunk import PADDING
from fedtl.transfer.text_features import batches, read_tokens, run, sample, text_features
from tests.text_models import KINDS, Rows, sentences, tiny_model


def opened(folder: Path, **keys: Any) -> Backbone:
    return open_backbone(schema.Backbone(name="hf", weights=str(folder), **keys), 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(kind, root / kind) for kind in KINDS}


@functools.cache
def alone(folder: str, kind: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer, T5EncoderModel

    loader: Any = T5EncoderModel if kind == "t5" else AutoModel
    model = loader.from_pretrained(folder, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def oracle(backbone: Backbone, text: str, pooling: str) -> np.ndarray[Any, Any]:
    """Transformers' own model on one text."""
    import torch

    model, tokenizer = alone(str(backbone.weights_path), backbone.settings["model"])
    tokens = tokenizer(text, truncation=True, max_length=16)
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([tokens["input_ids"]])).last_hidden_state[0].numpy()
    return np.asarray({"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling])


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_model_alone(kind: str, folders: dict[str, Path]) -> None:
    texts = sentences(9)
    for pooling in ("cls", "mean", "last"):
        backbone = opened(folders[kind], max_tokens=16, pooling=pooling)
        tokens = read_tokens(backbone, texts)
        import torch

        with torch.inference_mode():
            ours = backbone.trunk()(torch.from_numpy(sample(backbone, tokens))).numpy()
        order = np.argsort([len(numbers) for numbers in tokens[:8]], kind="stable")
        theirs = [oracle(backbone, texts[i], pooling) for i in order]
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
        assert backbone.dim == ours.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_embedding(kind: str, folders: dict[str, Path]) -> None:
    import torch

    backbone = opened(folders[kind], max_tokens=16)
    trunk, tokens = backbone.trunk(), read_tokens(backbone, sentences(6))
    for numbers in tokens:
        padded = np.full((2, 30), PADDING)
        padded[:, : len(numbers)] = numbers
        with torch.inference_mode():
            alone = trunk(torch.from_numpy(numbers[None])).numpy()
            beside = trunk(torch.from_numpy(padded)).numpy()
        np.testing.assert_allclose(beside, np.repeat(alone, 2, 0), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ways_agree_and_a_text_has_the_same_bits_in_any_company(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    backbone = opened(folders[kind], max_tokens=16)
    texts = sentences(23)
    tokens = read_tokens(backbone, texts)
    found = {}
    for way in ("onnx", "torch"):
        forward = open_forward(way, backbone, Exports(tmp_path), lambda: sample(backbone, tokens))
        rows = np.zeros((len(texts), forward.dim), np.float32)
        run(tokens, forward, rows.__setitem__, threads=2)
        few = np.zeros((5, forward.dim), np.float32)
        some = [22, 3, 11, 7, 0]
        run([tokens[i] for i in some], forward, few.__setitem__, threads=1)
        np.testing.assert_array_equal(few, rows[some])
        found[way] = rows
    np.testing.assert_allclose(found["onnx"], found["torch"], atol=1e-5)


def test_batches_are_of_one_length_and_hold_every_row_once() -> None:
    tokens = [np.arange(1 + i % 4, dtype=np.int64) for i in range(13)]
    seen: list[int] = []
    for rows, batch in batches(tokens, 4):
        assert batch.shape == (4, len(tokens[rows[0]]))
        for row, numbers in zip(rows, batch, strict=False):
            np.testing.assert_array_equal(numbers, tokens[row])
        seen += rows.tolist()
    assert sorted(seen) == list(range(13))


def test_long_texts_are_cut_by_tokens(folders: dict[str, Path]) -> None:
    backbone = opened(folders["bert"], max_tokens=8)
    long, short = read_tokens(backbone, ["good film " * 10_000, "good"])
    assert len(long) == 8
    assert len(short) == 3  # between two special ones


def test_position_limit_of_the_model_is_kept(folders: dict[str, Path]) -> None:
    for kind in ("bert", "roberta", "gpt2"):
        backbone = opened(folders[kind], max_tokens=512)
        (tokens,) = read_tokens(backbone, ["good film " * 100])
        import torch

        with torch.inference_mode():
            assert np.isfinite(backbone.trunk()(torch.from_numpy(tokens[None])).numpy()).all()


def test_identity_names_all_that_features_depend_on(folders: dict[str, Path]) -> None:
    base = opened(folders["bert"]).identity()
    assert opened(folders["bert"]).identity() == base
    others = [
        opened(folders["bert"], pooling="cls").identity(),
        opened(folders["bert"], max_tokens=16).identity(),
        opened(folders["distilbert"]).identity(),
        open_backbone(schema.Backbone(name="hf", weights="none"), 0).identity(),
        open_backbone(schema.Backbone(name="hf", weights="none"), 1).identity(),
    ]
    assert len({json.dumps(one) for one in [base, *others]}) == 6


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_every_file_is_in_the_hash(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "m"))
    before = opened(folder).weights_hash
    content = bytearray((folder / name).read_bytes())
    content[-2:-2] = b" " if name.endswith("json") else b""
    content[-1] ^= 0 if name.endswith("json") else 1
    (folder / name).write_bytes(bytes(content))
    assert opened(folder).weights_hash != before


def test_pooling_and_length_one_as_the_files_say(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "m"))
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    stated = {"word_embedding_dimension": 8, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(stated))
    backbone = opened(folder, max_tokens=16)
    assert backbone.settings["pooling"] == "cls"
    texts = Rows(sentences(3))
    plain = oracle(backbone, texts[0], "cls")
    store = FeatureStore(tmp_path / "store")
    stored = text_features(store, backbone, texts, "f", way="torch")
    np.testing.assert_allclose(stored.matrix[0], plain / np.linalg.norm(plain), atol=1e-6)
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Dense"}]))
    with pytest.raises(InputError, match="layers that are not known"):
        opened(folder)


def test_the_store_finds_what_it_made(folders: dict[str, Path], tmp_path: Path) -> None:
    store, backbone = FeatureStore(tmp_path), opened(folders["distilbert"], max_tokens=16)
    texts = Rows([*sentences(5), sentences(1)[0]])
    first = text_features(store, backbone, texts, "f", threads=2)
    again = text_features(store, backbone, texts, "f")
    assert not first.cached
    assert again.cached
    np.testing.assert_array_equal(first.matrix, again.matrix)
    assert (first.content[0] == first.content[5]).all()
    assert len({row.tobytes() for row in first.content}) == 5
    half = text_features(store, backbone, texts, "f", dtype="float16")
    assert not half.cached
    assert half.matrix.dtype == np.float16


def test_packaged_model_is_a_sentence_encoder() -> None:
    backbone = open_backbone(schema.Backbone(name="hf"), 0)
    assert backbone.weights_source == "packaged"
    assert backbone.settings == {
        "model": "bert",
        "pooling": "mean",
        "normalize": True,
        "max_tokens": 128,
    }
    assert backbone.dim == 384


def test_folders_that_will_not_do(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        opened(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        opened(tmp_path / "not there")
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "m"))
    with pytest.raises(SecurityRefusal, match="SHA-256 differs"):
        opened(folder, sha256="00000000")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        opened(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SecurityRefusal, match="only pickle can read"):
        opened(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        opened(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="JSON object"):
        opened(folder)


def test_weights_of_another_form_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match="do not fit"):
        opened(folder).trunk()


def test_files_that_change_meanwhile_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "m"))
    backbone = opened(folder)
    shutil.copy(folders["distilbert"] / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(SecurityRefusal, match="changed meanwhile"):
        backbone.trunk()


def test_a_name_on_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refused(*_: object, **__: object) -> str:
        raise ConnectionError("no network in a test")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(EnvironmentFault, match="could not be downloaded"):
        open_backbone(schema.Backbone(name="hf", weights="somebody/some-model"), 0)


def test_a_name_on_the_hub_is_taken_from_its_cache(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def here(name: str, **how: Any) -> str:
        asked.append(how)
        return str(folders["bert"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", here)
    backbone = open_backbone(schema.Backbone(name="hf", weights="somebody/some-model"), 0)
    assert backbone.weights_source == "somebody/some-model"
    assert backbone.weights_hash == opened(folders["bert"]).weights_hash
    assert [how["local_files_only"] for how in asked] == [True]
    assert not any(p.endswith((".py", ".bin", ".pt")) for p in asked[0]["allow_patterns"])
