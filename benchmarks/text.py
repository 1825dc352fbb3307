"""Texts through MiniLM: this project's way beside eager torch, on two cores, in one process.

    uv run python benchmarks/text.py SENTENCES.csv

Eager torch takes 32 texts at a time in the given order, padded to the longest of them, on two
threads; here two workers take texts of one length. Both include the tokenizer. The ways take turns
on the same texts, and the best time of each counts: other programs of the machine only slow down.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from fedtl.scenario import schema
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.extraction import Exports, Forward, open_forward
from fedtl.transfer.text_features import read_tokens, run, sample

BATCH = 32
THREADS = 2


def eager(model: torch.nn.Module, backbone: Backbone, texts: list[str]) -> np.ndarray:
    """As it is commonly written, with the attention that transformers chooses itself."""
    tokenizer = AutoTokenizer.from_pretrained(str(backbone.weights_path))
    pool, found = backbone.trunk().pool, []
    with torch.inference_mode():
        for first in range(0, len(texts), BATCH):
            given = tokenizer(
                texts[first : first + BATCH],
                padding=True,
                truncation=True,
                max_length=backbone.settings["max_tokens"],
                return_tensors="pt",
            )
            states = model(**given).last_hidden_state
            found.append(pool(states, given["attention_mask"] > 0).numpy())
    return np.concatenate(found)


def ours(backbone: Backbone, texts: list[str], forward: Forward) -> np.ndarray:
    """What the feature store is filled by."""
    rows = np.empty((len(texts), forward.dim), np.float32)
    run(read_tokens(backbone, texts), forward, rows.__setitem__, threads=THREADS)
    return rows


def main() -> None:
    """Measure the ways in turns and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", type=Path, help="a csv with a column text")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    with asked.sentences.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    texts = texts[:: max(1, len(texts) // asked.texts)][: asked.texts]
    backbone = open_backbone(schema.Backbone(name="hf"), 0)
    model = AutoModel.from_pretrained(str(backbone.weights_path)).eval()
    tokens = read_tokens(backbone, texts)
    print(f"{len(texts)} texts of {np.mean([len(t) for t in tokens]):.1f} tokens on average")
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            way: open_forward(
                way, backbone, Exports(Path(folder)), lambda: sample(backbone, tokens)
            )
            for way in ("onnx", "torch")
        }
        best = dict.fromkeys(("eager", *ways), float("inf"))
        found = {}
        for _ in range(asked.repeats):
            for name in best:
                began = time.perf_counter()
                if name == "eager":
                    found[name] = eager(model, backbone, texts)
                else:
                    found[name] = ours(backbone, texts, ways[name])
                best[name] = min(best[name], time.perf_counter() - began)
    for name, seconds in best.items():
        difference = np.abs(found[name] - found["eager"]).max()
        print(
            f"{name:6} {len(texts) / seconds:7.0f} texts/s, {best['eager'] / seconds:.2f} x eager, "
            f"largest difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
