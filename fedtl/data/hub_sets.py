"""``data.source = "datasets"``: texts from Hugging Face's library, on disk or by name.

Nothing of a data set is ever executed or unpickled: on disk these are Arrow tables, and of what a
name stands for only tables are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtl.data.examples import Examples
from fedtl.data.texts import find_columns, text_examples
from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal, unknown_name
from fedtl.scenario.schema import Data

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""What a data set by name may consist of; none of these can hold code or pickles."""


def load_datasets(data: Data, *, one_client: bool = False) -> Examples:
    """The data set that ``save_to_disk`` wrote to ``data.path``, or the one called ``data.name``.

    Of a set with parts ``data.subset`` is taken. Columns are found as in a csv; a label that is a
    ``ClassLabel`` has its own names and order of classes.

    Raises:
        InputError: no such set, part or columns, or rows as in ``load_texts``.
        SecurityRefusal: the set of this name is not made of tables.
        EnvironmentFault: ``datasets`` is not installed, or the set cannot be downloaded.
    """
    where = data.path or data.name
    if where is None:
        raise InputError("missing", where="data.path", do="Give data.path or data.name")
    table = _on_disk(Path(data.path), data) if data.path is not None else _by_name(where, data)
    roles = find_columns(table.column_names, data, where)
    feature = table.features[roles["label"]]
    classes = tuple(map(str, getattr(feature, "names", None) or ()))
    columns = {role: [_text(value) for value in table[name]] for role, name in roles.items()}
    if classes:
        columns["label"] = [_named(value, classes) for value in columns["label"]]
    return text_examples(columns, roles, data, where, classes=classes, one_client=one_client)


def _text(value: object) -> str:
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float):
        raise InputError("a column holds neither texts nor numbers", where="data")
    return str(value)


def _named(value: str, classes: tuple[str, ...]) -> str:
    """A class's name; a number that stands for none (-1 by custom) is no label."""
    return classes[int(value)] if value.isdecimal() and int(value) < len(classes) else ""


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault(
            "the package datasets is not installed", where="data.source", do="uv sync --extra text"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _on_disk(path: Path, data: Data) -> Dataset:
    library = _library()
    if not path.is_dir():
        raise InputError("no such folder of a data set", where="data.path", got=str(path))
    try:
        return _part(library.load_from_disk(str(path)), data, library)
    except InputError:
        raise
    except Exception as error:  # Arrow's, JSON's and the library's own share no base
        raise InputError(
            "not a data set that can be read",
            where=str(path),
            allowed="a folder written by Dataset.save_to_disk",
        ) from error


def _part(found: Any, data: Data, library: Any) -> Dataset:
    """The part that ``data.subset`` asks for; a set without parts as it is."""
    if isinstance(found, library.Dataset):
        return found
    if data.subset == "all":
        return library.concatenate_datasets([found[name] for name in sorted(found)])
    if data.subset not in found:
        raise unknown_name("part of this data set", data.subset, found, where="data.subset")
    return found[data.subset]


def _by_name(name: str, data: Data) -> Dataset:
    library = _library()
    try:
        builder = library.load_dataset_builder(name)
        if builder.name not in FORMATS and getattr(builder, "repo_id", None) is not None:
            raise SecurityRefusal(
                "this data set is not made of tables alone",
                where="data.name",
                got=builder.name,
                allowed=", ".join(FORMATS),
                do="Load it yourself, save it with save_to_disk, and give data.path",
            )
        builder.download_and_prepare()
        return _part(builder.as_dataset(), data, library)
    except (InputError, SecurityRefusal):
        raise
    except Exception as error:  # of the network, the hub and Arrow
        raise EnvironmentFault(
            f"the data set cannot be had: {type(error).__name__}",
            where="data.name",
            got=repr(name),
            do="Check the name and the network, or save it elsewhere with save_to_disk and give "
            "data.path",
        ) from error
