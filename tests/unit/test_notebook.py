"""The example notebook runs, and the outputs in the repository are of a run without errors."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "example.ipynb"

FULL = "rounds=10"
SHORT = 'rounds=2, backbone={"image_size": 32}, evaluation={"references": ["local_only"]}'


def test_its_outputs_are_there() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code)
    kinds = [kind for cell in code for out in cell.outputs for kind in out.get("data", {})]
    assert kinds.count("image/png") == 3
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_it_runs(tmp_path: Path) -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    assert FULL in first.source
    first.source = first.source.replace(FULL, SHORT)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=240, kernel_name="python3", resources=where).execute()
    assert (tmp_path / "example-run" / "report.html").is_file()
