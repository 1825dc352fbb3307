"""fedtl from Python: run a scenario, load a run, look at its tables and figures.

run = fedtl.run("quickstart", rounds=5)
run.verdict
run.plot_home_and_everywhere()
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtl.errors import InputError
from fedtl.interrupts import Interrupts
from fedtl.parity import Quiet
from fedtl.results.tables import RunTables, read_run
from fedtl.scenario.load import load_scenario, validate
from fedtl.scenario.schema import Scenario
from fedtl.simulation import find_run, new_run_path, run_scenario

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Run:
    """A run's folder, read when it is asked for. Made by ``run`` and ``load``.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.verdict}"

    def _repr_html_(self) -> str:
        """What a notebook shows: name, verdict, and a row for each model."""
        from fedtl.results import report

        rows = "".join(
            f"<tr><th style='text-align: left'>{escape(row['title'])}</th>"
            + "".join(f"<td>{report.percent(row[key])}</td>" for key in ("home", "everywhere"))
            + "</tr>"
            for row in report.heads(self.tables)
        )
        return (
            f"<p><b>{escape(self.tables.name)}</b>: {escape(self.verdict)}</p><table><thead><tr>"
            "<th style='text-align: left'>model</th><th>at home</th><th>everywhere</th></tr>"
            f"</thead><tbody>{rows}</tbody></table>"
        )

    @cached_property
    def tables(self) -> RunTables:
        """Everything the run's folder holds, as ``fedtl report`` reads it."""
        return read_run(self.path)

    @property
    def summary(self) -> Mapping[str, Any] | None:
        """``summary.json``; None of an interrupted run."""
        return self.tables.summary

    @property
    def rounds(self) -> pd.DataFrame:
        """One row a round, see ``results.records.ROUNDS``."""
        return self.tables.rounds

    @property
    def clients(self) -> pd.DataFrame:
        """One row per round, client and split, see ``results.records.CLIENTS``."""
        return self.tables.clients

    @property
    def classes(self) -> pd.DataFrame | None:
        """One row per client and class, see ``results.records.CLASSES``; None of older runs."""
        return self.tables.classes

    @property
    def gap(self) -> Mapping[str, Any] | None:
        """Distances between the clients' data, where they were measured."""
        return self.tables.gap

    @property
    def verdict(self) -> str:
        """Who should join, personalise or stay alone, in a sentence."""
        from fedtl.results import answer

        return str(answer.verdict(self.tables)["headline"])

    @cached_property
    def head(self) -> dict[str, Any]:
        """The trained head's tensors by name, float32. Raises InputError where there is none."""
        from safetensors.numpy import load_file

        path = self.path / "head.safetensors"
        if not path.is_file():
            raise InputError("this run has no head yet", where=self.path, do="Finish it first")
        return load_file(path)

    def plot_learning_curves(self) -> Figure:
        """Accuracy over the rounds, with the pooled head and the clients alone."""
        from fedtl.results import plots

        return plots.learning_curves(self.tables)

    def plot_home_and_everywhere(self) -> Figure:
        """Every model on the clients' own tests and on everybody's."""
        from fedtl.results import plots

        return plots.home_and_everywhere(self.tables)

    def plot_differences(self) -> Figure:
        """Shared minus alone for every client, with intervals."""
        from fedtl.results import plots

        return plots.differences(self.tables)

    def plot_gap(self, kind: str | None = None) -> Figure:
        """Each client's distance to the others against what federating gains it.

        Args:
            kind: a measure of ``gap``; by default its first.

        Raises:
            InputError: no gap was measured.
        """
        from fedtl.results import plots

        try:
            return plots.gap_and_gain(self.tables, kind)
        except ValueError as error:
            raise InputError(str(error), where=self.path) from error

    def plot_who_has_what(self) -> Figure:
        """Training examples by client and class. Raises InputError where they are not known."""
        from fedtl.results import plots, report

        table = report.who_has_what(self.tables)
        if table is None:
            raise InputError("this run did not keep its classes", where=self.path)
        title = f"Training examples of each {table['by']}"
        return plots.matrix(table["rows"], table["columns"], table["values"], title)

    def report(self, *, gap: bool | None = None) -> Path:
        """Write the run's page and return its path, see ``fedtl report``."""
        from fedtl.report import write_report

        with Interrupts() as interrupts:
            page = write_report(self.path, interrupts, gap=gap)
        self.__dict__.pop("tables", None)  # the gap may be there now
        return page


def run(
    scenario: str | Path | Mapping[str, Any] | Scenario,
    *,
    out: str | Path | None = None,
    engine: str | None = None,
    **overrides: Any,
) -> Run:
    """Run a scenario to its end, as ``fedtl run`` does, and show nothing but notes.

    Args:
        scenario: a name, a path to a .toml file, its content as a dict, or a Scenario.
        out: the run's folder; default ``runs/<scenario>-<time>``.
        engine: replaces ``engine.kind``.
        **overrides: keys laid over the scenario: ``rounds=5``, a table as a dict
            (``training={"learning_rate": 0.1}``).

    Raises:
        FedtlError: see ``fedtl.errors``; an interrupted run can be resumed with ``fedtl resume``.
    """
    chosen = _scenario(scenario, overrides, engine)
    path = Path(out) if out is not None else new_run_path(chosen)
    with Interrupts() as interrupts:
        run_scenario(chosen, path, Quiet(lambda note: print(f"note: {note}")), interrupts)
    return Run(path)


def load(run: str | Path) -> Run:
    """A run that was made before: a folder, its name under ``runs/``, or "last".

    Raises:
        InputError: there is no such run, or nothing was recorded in it yet.
    """
    found = Run(find_run(str(run)))
    _ = found.tables  # so that a wrong name is told here
    return found


def _scenario(
    scenario: str | Path | Mapping[str, Any] | Scenario,
    overrides: Mapping[str, Any],
    engine: str | None,
) -> Scenario:
    if isinstance(scenario, str | Path):
        settings = [f"{key}={_toml(value)}" for key, value in _leaves(overrides)]
        return load_scenario(str(scenario), settings, engine=engine)
    content: dict[str, Any] = (
        scenario.model_dump() if isinstance(scenario, Scenario) else dict(scenario)
    )
    for key, value in overrides.items():
        content[key] = _laid_over(content.get(key), value)
    if engine is not None:
        content["engine"] = {**content.get("engine", {}), "kind": engine}
    return validate(content, str(content.get("name", "scenario")), {})


def _laid_over(old: Any, new: Any) -> Any:
    """A table's new keys over its old ones; another strategy has parameters of its own."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if new.get("name", old.get("name")) != old.get("name"):
        return new
    return {**old, **new}


def _leaves(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _toml(value: Any) -> str:
    """A value as ``--set`` takes it; JSON's numbers, texts, lists and booleans are TOML's too."""
    return json.dumps(str(value) if isinstance(value, Path) else value)
