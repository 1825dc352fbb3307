"""The table ``[data]``: where the examples come from, and what kind of examples they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtl.scenario.sections import (
    Count,
    FilePath,
    OpenFraction,
    Section,
)

ColumnName = Annotated[str, Field(min_length=1, max_length=200)]
"""A column of a table, as its header has it."""


class Data(Section):
    """Where the examples come from."""

    source: Literal[
        "digits", "folder", "arrays", "torchvision", "texts", "datasets", "table", "sound"
    ] = Field(
        "digits",
        description="digits is embedded; the others read from disk: texts and table from csv or "
        "Parquet, datasets from Hugging Face's library, sound from wav",
    )
    path: FilePath | None = Field(
        None, description="folder, .npz or .csv file, or torchvision's root folder"
    )
    name: str | None = Field(
        None, description="torchvision data set, e.g. CIFAR10; of datasets a name on the hub"
    )
    subset: Literal["train", "test", "all"] = Field(
        "train", description="which official part of a torchvision data set is federated"
    )
    domains: bool = Field(False, description="folder: <domain>/<class>/<image> on disk")
    classes: Literal["folder", "path"] = Field(
        "folder",
        description="folder with domains: one class for all folders of a name, or (path) for each "
        "<domain>/<class>, as where character01 of two alphabets are two characters",
    )
    label_pattern: Annotated[str, Field(min_length=3, max_length=500)] | None = Field(
        None,
        description="sound: regular expression whose groups name the class in a file's path, e.g. "
        r"^(\d)_ where files are not in class folders",
    )
    domain_pattern: Annotated[str, Field(min_length=3, max_length=500)] | None = Field(
        None, description="sound: the same for the domain, where there are no folders of domains"
    )
    client_pattern: Annotated[str, Field(min_length=3, max_length=500)] | None = Field(
        None,
        description="folder, sound: regular expression whose groups name the client in a path, "
        r"e.g. _(\d+)\.png$ for Omniglot's drawers",
    )
    test_fraction: OpenFraction = Field(
        0.2, description="of each client's examples, stratified; a given split column wins"
    )
    on_bad_file: Literal["stop", "skip"] = Field(
        "stop", description="what to do with an image that cannot be decoded"
    )
    leakage: Literal["stop", "allow"] = Field(
        "stop", description="what to do when the same image is in train and test or at two clients"
    )
    max_pixels: Count = Field(
        50_000_000, description="an image that claims more is refused before it is decoded"
    )
    shots: Count | None = Field(
        None,
        description="few-shot: at most so many training examples per class and client (seeded)",
    )
    # texts, datasets, table: which column is what
    label: ColumnName = Field("label", description="texts, datasets, table: column of the classes")
    text: ColumnName = Field("text", description="texts, datasets: column of the texts")
    domain: ColumnName | None = Field(
        None, description="texts, datasets, table: column of the domains; default 'domain' if there"
    )
    client: ColumnName | None = Field(
        None, description="texts, datasets, table: column of natural clients; default 'client'"
    )
    numeric: list[ColumnName] | None = Field(
        None, description="table: columns of numbers; default all numeric ones"
    )
    categorical: list[ColumnName] = Field(
        default_factory=list, description="table: columns whose values are names, as indicators"
    )
    categories: dict[ColumnName, list[str]] = Field(
        default_factory=dict,
        description="table: the values a categorical column may have; default those in the file, "
        "which real clients cannot know of each other",
    )
    ignore: list[ColumnName] = Field(
        default_factory=list, description="table: columns that are left out, e.g. identifiers"
    )
    scaling: Literal["client", "federated", "none"] = Field(
        "client",
        description="table: numbers are centred, scaled and where missing filled in by each "
        "client's own training means and deviations, by those of everybody's sums, or not at all "
        "(then nothing may be missing)",
    )
    rate: Annotated[int, Field(ge=1000, le=192_000)] = Field(
        8000, description="sound: samples a second; recordings of another rate are resampled"
    )
    seconds: Annotated[float, Field(gt=0.0, le=60.0)] = Field(
        1.0, description="sound: length of what is looked at; shorter ones are put amid silence"
    )
    mel_bands: Annotated[int, Field(ge=8, le=512)] | None = Field(
        None,
        description="sound: height of the log-mel picture; default a square one, 100 bands for 1 s",
    )
