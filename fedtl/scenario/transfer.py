"""The tables of what is transferred: the trunk, the head, and where the one ends.

A trunk is everything before the cut. It runs once per example; what stands behind the cut is
trained in the federation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtl.scenario.sections import Count, FilePath, NonNegative, Positive, Section, Width

FROM_STATISTICS = ("fed3r", "class_means")
"""Values of ``head.initial`` for which round 1 makes the start, from sums of everybody's rows."""


class Backbone(Section):
    """The frozen trunk and how its features are made and stored."""

    name: str = Field(
        "efficientnet_lite0",
        description="efficientnet_lite0 (embedded), a torchvision model, or identity; hf, onnx, "
        "timm, hub, module: a trunk from elsewhere; fourier, forest, windows: features of rows",
    )
    model: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None,
        description="timm: its name; hub: the entry point; module: a dotted path, package:Class; "
        "forest: forest, extra_trees, or quantiles",
    )
    path: FilePath | None = Field(
        None,
        description="hub: the local clone; module: the folder it is imported from (default: this "
        "one); forest: the public source set it is fitted on",
    )
    weights: str = Field(
        "default",
        description="default, one of torchvision's names (IMAGENET1K_V2), none (random, seeded), "
        "or a .safetensors/.pth path; hf: a folder, or a name on the hub; onnx: the file",
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{8,64}$")] | None = Field(
        None, description="the weights file must have this SHA-256 (or begin with it)"
    )
    image_size: Annotated[int, Field(ge=8, le=2048)] | None = Field(
        None, description="pixels; default: what the weights were trained for"
    )
    feature_dtype: Literal["float32", "float16"] = "float32"
    extraction: Literal["auto", "onnx", "torch"] = Field(
        "auto", description="which way runs the trunk; part of the feature store's key"
    )
    pooling: Literal["auto", "cls", "mean", "last"] = Field(
        "auto", description="hf: how tokens become one vector; auto: as the weights' files say"
    )
    max_tokens: Annotated[int, Field(ge=2, le=8192)] = Field(
        128, description="hf: longer texts are cut there"
    )
    mean: list[float] | None = Field(
        None, description="onnx, hub, module: subtracted from each channel, in pixels of 0 to 255"
    )
    std: list[Positive] | None = Field(
        None, description="onnx, hub, module: each channel is divided by it, likewise"
    )
    layout: Literal["auto", "nchw", "nhwc"] = Field(
        "auto", description="onnx: order of the input's axes; auto: where its 3 channels stand"
    )
    output: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        None,
        description="onnx: which of its values is the feature vector; default its only output",
    )
    width: Width = Field(512, description="fourier: number of random features")
    scale: Positive = Field(
        1.0, description="fourier: bandwidth of the Gaussian kernel, in units of sqrt(columns)"
    )
    channels: Count = Field(1, description="windows: channels of the series, side by side in x")
    window: Count = Field(32, description="windows: steps over which statistics are taken")
    licence: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="of the weights, for the card; what is known of a source is filled in"
    )


class Head(Section):
    """What is trained on the features."""

    kind: Literal["linear", "mlp", "cosine", "prototype"] = Field(
        "linear",
        description="cosine: scores are scaled cosines; prototype: scaled negative distances to a "
        "trained point per class (Snell et al. 2017)",
    )
    hidden: Annotated[list[Width], Field(min_length=1, max_length=4)] = Field(
        default=[128], description="mlp: widths of the hidden layers"
    )
    scale: Positive | None = Field(
        None,
        description="cosine, prototype: where the trained scale begins; default 16 for cosine, and "
        "for prototype half the width of what enters it, as of a Gaussian of variance 1",
    )
    initial: Literal["zeros", "fed3r", "class_means", "names"] = Field(
        "zeros",
        description="fed3r, class_means: round 1 makes a closed-form head to start from, the "
        "second of everybody's class means; names: zero-shot, the embeddings of the classes' names "
        "by a trunk that reads text",
    )
    names: list[Annotated[str, Field(min_length=1, max_length=500)]] = Field(
        default_factory=list,
        description="initial = names: what the classes are in words, in their order; default as "
        "the labels are called",
    )
    prompt: Annotated[str, Field(min_length=2, max_length=500)] = Field(
        "{}", description="initial = names: the text that a class's name is put into"
    )

    @property
    def from_statistics(self) -> bool:
        """Whether round 1 makes the start."""
        return self.initial in FROM_STATISTICS


class Augmentation(Section):
    """More of the same examples: stored views of images, or noise on features."""

    views: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="stored versions of each training image, the first as it is (seeded)"
    )
    kinds: list[Literal["flip", "crop", "colour", "randaugment"]] = Field(
        default=["flip", "crop"], description="what is done to the other views"
    )
    noise: NonNegative = Field(
        0.0,
        description="Gaussian noise on stored activations in training, in units of their own "
        "standard deviation at each client",
    )


class Transfer(Section):
    """Where the network is cut, and what behind the cut is trained how."""

    mode: Literal[
        "head", "last_blocks", "lora", "bitfit", "adapter", "prompt", "full", "scratch"
    ] = Field(
        "head",
        description="what is trained beside the head: nothing, all behind the cut, low-rank "
        "additions, biases, small modules or prompt vectors there, the whole network, or the whole "
        "network from random weights",
    )
    cut: Annotated[int, Field(ge=0, le=1000)] | Annotated[str, Field(max_length=200)] | None = (
        Field(
            None,
            description="the first module behind the cut, e.g. layer4, or how many of the last "
            "blocks stand behind it; default 1, and everything for full and scratch",
        )
    )
    batch_norm: Literal["frozen", "local", "aggregated", "group"] = Field(
        "frozen",
        description="behind the cut: as pretrained; each client's own (FedBN); averaged with all "
        "else; or replaced by group norm",
    )
    warmup_rounds: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(
        0, description="rounds in which only the head is trained"
    )
    unfreeze_every: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(
        0,
        description="after the warm-up one more block from the back is trained every so many "
        "rounds; 0: all at once",
    )
    rate_factor: Positive = Field(
        1.0, description="learning rate behind the cut, as a multiple of the head's"
    )
    l2_pretrained: NonNegative = Field(
        0.0, description="pull of what is behind the cut to its pretrained values (L2-SP)"
    )
    activations: Literal["auto", "store", "recompute"] = Field(
        "auto",
        description="store those at the cut, or run the frozen part again in every epoch; auto: "
        "store where they fit",
    )
    rank: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="lora: rank")
    alpha: Positive = Field(16.0, description="lora: additions are scaled by alpha / rank")
    aggregation: Literal["fedit", "ffa", "flora"] = Field(
        "fedit",
        description="lora: factors averaged one by one (FedIT); only B trained and averaged "
        "(FFA-LoRA); products summed exactly by stacking (FLoRA)",
    )
    targets: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default_factory=list,
        description="lora, adapter: names, or parts of names, of the layers behind the cut; "
        "default all linear layers and convolutions",
    )
    width: Annotated[int, Field(ge=1, le=4096)] = Field(
        16, description="adapter: width of the bottleneck; prompt: number of vectors"
    )
