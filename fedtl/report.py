"""``fedtl report``: what a run's tables lack for its page, and the page.

The gap between the clients' data is measured where that is quick or asked for, and kept in the
run's folder. Example images are taken from the data at hand, only where the scenario asks for them.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedtl import seeding
from fedtl.build import open_data
from fedtl.data.examples import BadImage, Images
from fedtl.errors import FedtlError, Interrupted
from fedtl.forecast import stored_width
from fedtl.interrupts import Interrupts
from fedtl.ready_features import OpenedData
from fedtl.results.files import write_atomic
from fedtl.results.page import run_page
from fedtl.results.runs import SCENARIO
from fedtl.results.tables import GAP, RunTables, read_run
from fedtl.scenario.load import load_scenario
from fedtl.types import Int64

PAGE = "report.html"

QUICK_CLIENTS = 50
"""Up to so many clients the gaps are measured unasked, if the features are in the store."""

SIDE = 96
"""Pixels of an example image's longer side."""

IMAGES_MOST = 600
"""Example images on a page: about 3 kB each."""


def write_report(run: Path, interrupts: Interrupts, *, gap: bool | None) -> Path:
    """Write ``report.html`` into a run's folder.

    Args:
        gap: measure the gaps between the clients; None: where that is quick. What was measured
            before is shown in any case.

    Returns:
        The page.

    Raises:
        InputError: not a run's folder, nothing recorded yet, or damaged tables.
        Interrupted: by a signal, before the page was written.
    """
    tables = read_run(run)
    notes: list[str] = []
    wants_gap = tables.gap is None and gap is not False and not tables.real
    shown = int(tables.scenario.get("report", {}).get("examples", 0))
    examples: list[dict[str, Any]] = []
    if wants_gap or shown:
        try:
            opened = _open(tables)
            if wants_gap and (gap or _quick(opened)):
                from fedtl.gap import measure_gap

                facts = measure_gap(opened.scenario, interrupts)
                write_atomic(run / GAP, (json.dumps(facts, indent=2) + "\n").encode())
                tables = read_run(run)
            if shown:
                examples = example_images(opened, shown, interrupts)
        except Interrupted:
            raise
        except FedtlError as error:  # its place may be a private path
            notes.append(f"The data of this run could not be looked at: {error.what}.")
        except Exception as error:  # a page without gaps is better than none
            notes.append(f"The data of this run could not be looked at ({type(error).__name__}).")
    page, content = run / PAGE, run_page(tables, examples, notes).encode()
    interrupts.check("interrupted while the page was made")
    write_atomic(page, content)
    return page


def _open(tables: RunTables) -> OpenedData:
    """The data that the run was made with. Raises FedtlError where they are not at hand."""
    if tables.real:
        raise FedtlError("they are with the clients")
    opened = open_data(load_scenario(str(tables.path / SCENARIO)))
    known = (tables.summary or {}).get("data", {})
    skipped = known.get("skipped_examples", 0)  # then the fingerprint is that of the rest
    if known.get("fingerprint") not in (None, opened.examples.fingerprint) and not skipped:
        raise FedtlError("they are not those the run was made with")
    return opened


def _quick(opened: OpenedData) -> bool:
    return len(opened.split.names) <= QUICK_CLIENTS and stored_width(opened) is not None


def example_images(opened: OpenedData, each: int, interrupts: Interrupts) -> list[dict[str, Any]]:
    """A few training images of each client, as the client has them, small.

    Args:
        each: images of a client at most; of many clients only the first are shown.

    Returns:
        Per client ``name`` and ``images`` (``source``: a data URI, ``label``: the class's name).
    """
    examples, split = opened.examples, opened.split
    if examples.images is None:
        return []
    found = []
    for client, name in enumerate(split.names[: max(1, IMAGES_MOST // each)]):
        interrupts.check()
        rows: Int64 = split.train.of(client)
        stream = seeding.generator(opened.scenario.seed, "report_examples", client)
        chosen = np.sort(stream.permutation(rows)[:each])
        images = []
        for row in chosen.tolist():
            source = _thumbnail(examples.images, row)
            if source is not None:
                label = examples.classes[int(examples.labels[row])]
                images.append({"source": source, "label": label})
        found.append({"name": name, "images": images})
    return found


def _thumbnail(images: Images, row: int) -> str | None:
    """One image as a JPEG data URI, without any of the file's own metadata; None if unreadable."""
    from PIL import Image

    try:
        image = Image.fromarray(images.load(row))
    except BadImage:
        return None
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
