"""From the scenario's ``[data]`` table to examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedtl.data.arrays import load_arrays
from fedtl.data.digits import load_digits
from fedtl.data.examples import Examples
from fedtl.data.folder import load_folder
from fedtl.data.hub_sets import load_datasets
from fedtl.data.sound import load_sound
from fedtl.data.tables import load_table
from fedtl.data.texts import load_texts
from fedtl.data.torchvision_sets import load_torchvision
from fedtl.errors import unknown_name
from fedtl.scenario.schema import Data

SOURCES: Mapping[str, Callable[[Data], Examples]] = {
    "digits": load_digits,
    "folder": load_folder,
    "arrays": load_arrays,
    "torchvision": load_torchvision,
    "texts": load_texts,
    "datasets": load_datasets,
    "table": load_table,
    "sound": load_sound,
}


def load_examples(data: Data) -> Examples:
    """All examples of the source that ``data`` names; ``data.path`` is absolute by now.

    Raises:
        InputError: the source does not exist, is empty or holds something wrong.
        SecurityRefusal: it holds something unsafe (pickle, a path that leads out of it).
    """
    if data.source not in SOURCES:
        raise unknown_name("data source", data.source, SOURCES, where="data.source")
    return SOURCES[data.source](data)
