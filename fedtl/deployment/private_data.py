"""Private data on their way to features: read, labelled, split and put through the trunk, here.

An error's ``what`` travels to the server (see ``engines.node``), so none that leaves this module
through ``discreet`` holds a path, a file's name or a value; the rest of it stays at the client.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from fedtl.build import open_examples, population_of
from fedtl.clients.alignment import align
from fedtl.data.arrays import load_arrays
from fedtl.data.csv_features import LABELS
from fedtl.data.examples import BadFiles, Examples
from fedtl.data.files import open_files
from fedtl.data.folder import load_folder
from fedtl.data.leakage import find_leaks
from fedtl.data.sound import EXTENSIONS, load_sound
from fedtl.data.table_files import SUFFIXES, column_names
from fedtl.data.tables import load_table
from fedtl.data.texts import load_texts
from fedtl.deployment.backbone_transfer import Announcement
from fedtl.deployment.consent import Consent
from fedtl.deployment.pledge import Pledge
from fedtl.errors import InputError, printable
from fedtl.ready_features import allowed_threads, make_features
from fedtl.scenario import schema
from fedtl.transfer.backbones import TAKES, open_backbone
from fedtl.types import Int32, Population

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """What a server said when it asked this client to join.

    Attributes:
        run: the server's id of this federation.
        scenario: the server's, with this client's data, backbone and machine in it.
        announced: the server's backbone.
        tasks: all that this client will ever do in a round of it.
        pledge: what will be done to protect its answers.
    """

    run: str
    scenario: schema.Scenario
    announced: Announcement
    tasks: tuple[str, ...]
    pledge: Pledge


@dataclass(frozen=True)
class Ready:
    """What preparing gave: the data, and what the server is told of it."""

    population: Population
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Order:
    """What is to be prepared."""

    session: Session
    classes: tuple[str, ...]
    key: bytes


class Task(Generic[T]):
    """A call in a thread of its own: requests are answered meanwhile.

    Attributes:
        finished: set when it is over.
    """

    def __init__(self, call: Callable[[], T], name: str) -> None:
        self.finished = threading.Event()
        self._call = call
        self._result: list[T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def outcome(self) -> T:
        """What the call gave, or raises what it raised; waits for its end."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:
            self._failure = error
        finally:
            self.finished.set()


class _Stopped(Exception):
    """The work is not wanted any more."""


class Work:
    """Features on their way.

    Attributes:
        order: what is asked for.
        done, total: examples.
        notes: for the client's own terminal, once it is over.
        task: gives what is ready.
    """

    def __init__(self, order: Order, examples: Examples, weights: Path | None, name: str) -> None:
        self.order = order
        self.done, self.total = 0, len(examples)
        self.notes: tuple[str, ...] = ()
        self._examples, self._weights, self._name = examples, weights, name
        self._stopping = threading.Event()
        self.task = Task(self._prepare, "prepare")

    def stop(self) -> None:
        """End it; returns when it has ended."""
        self._stopping.set()
        with suppress(BaseException):
            self.task.outcome()

    def _progress(self, done: int, total: int) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self.done, self.total = done, total

    def _prepare(self) -> Ready:
        session, mine = self.order.session, self._examples
        least = session.scenario.clients.min_examples
        if len(mine) < least:
            raise Told(f"it has {len(mine)} examples, and the scenario wants {least} at least")
        backbone = session.announced.located(self._weights)
        scenario = session.scenario.model_copy(update={"backbone": backbone})
        takes = TAKES.get(session.announced.section.name, "images")
        if mine.kind not in takes:
            called = {"rows": "features"}
            given, wanted = (called.get(kind, kind) for kind in (mine.kind, takes))
            raise Told(f"its data are {given}, and the scenario's backbone takes {wanted}")
        opened = open_examples(scenario, owned(mine, self.order.classes, self._name))
        features = make_features(opened, self._progress)
        leaks = find_leaks(features.content, features.split, features.examples)
        if leaks.train_test and scenario.data.leakage == "stop":
            raise Told(
                f"{leaks.train_test} of its contents are in both train and test; "
                "data.leakage = 'allow' would accept them",
                got="".join(f"\n  {line}" for line in leaks.examples),
            )
        population = population_of(features)
        if (kind := scenario.adaptation.features) == "coral":
            raise Told("nobody has everybody's covariance, to which features were to be aligned")
        if kind != "none":
            population, _ = align(population, kind, threads=allowed_threads(scenario))
        self.notes = features.notes
        facts = {
            "ready": True,
            "train": int(population.train.counts[0]),
            "test": int(population.test.counts[0]),
            "width": population.width,
            "domain": population.domains[0],
            "left_out": len(opened.examples) + features.views - len(features.examples),
            "leaks": leaks.train_test,
            "way": features.facts["way"],
            "seconds": round(features.seconds, 3),
            "fingerprint": keyed(mine.fingerprint, self.order.key),
            "backbone": open_backbone(scenario.backbone, scenario.seed).identity(),
        }
        return Ready(population, facts)


class Told(InputError):
    """An error of ours whose ``what`` may be told to the server as it is."""


LOADERS: Mapping[str, Callable[..., Examples]] = {
    "arrays": load_arrays,
    "folder": load_folder,
    "table": load_table,
    "sound": load_sound,
    "texts": load_texts,
}
"""Sources that one client may have."""

TOLD = {
    "table": ("label", "numeric", "categorical", "categories", "ignore", "scaling"),
    "sound": ("label_pattern", "rate", "seconds", "mel_bands"),
    "texts": ("label", "text"),
}
"""What a client is told of how its data are read, beside which source they are."""


def told_of(data: schema.Data) -> dict[str, Any]:
    """What a server tells its clients of ``[data]``; no path of its own."""
    # a client's texts are a file of its own, whatever the server's come from
    source = "texts" if data.source == "datasets" else data.source
    return {"source": source} | {key: getattr(data, key) for key in TOLD.get(source, ())}


def own_data(path: Path, told: Any) -> dict[str, Any]:
    """A client's ``[data]``: its own path, read as the server says where that can be.

    Raises:
        InputError: the server's words are none that fedtl knows.
    """
    if not isinstance(told, dict):
        raise InputError("the server does not say how data are read")
    source = str(told.get("source", ""))
    own = {"path": str(path.absolute())}
    if source not in TOLD or (source in ("table", "texts")) != (path.suffix.lower() in SUFFIXES):
        return own | {"source": source_of(path)}
    if (pattern := told.get("label_pattern")) is not None:
        _check_pattern(pattern)
    return own | {"source": source} | {key: told.get(key) for key in TOLD[source]}


def _check_pattern(pattern: Any) -> None:
    """Refuse a regular expression of somebody else that could take forever on a file's path.

    Raises:
        InputError: it is none, or repeats what repeats already, or repeats too often.
    """
    text = pattern if isinstance(pattern, str) else ""
    nested = re.search(r"\)[*+{]", text) or len(re.findall(r"[*+}]", text)) > MOST_REPEATS
    try:
        groups = re.compile(text).groups
    except (re.error, OverflowError, RecursionError):
        groups = 0
    if nested or not groups or len(text) > LONGEST_PATTERN:
        raise InputError(
            "the server's pattern for classes is not one that is run on this machine's paths",
            where="data.label_pattern",
            got=repr(str(pattern)[:100]),
            allowed=f"one with a group, none of which is repeated, and {MOST_REPEATS} repeats",
        )


MOST_REPEATS, LONGEST_PATTERN = 3, 200
"""In a regular expression that another machine sent."""

FEW_CLASSES = 20
"""As many may be told of even where hardly two examples share one."""


def classes_told(examples: Examples, data: schema.Data) -> str:
    """What a client says to itself before its classes' names are told; "" where it chose them.

    The server says which column, or which part of a file's name, is the class, and is told all
    that stands there.

    Raises:
        Told: most examples have a class of their own, so that these are names of something else.
    """
    if data.source not in TOLD:
        return ""
    count = len(examples.classes)
    if count > FEW_CLASSES and 2 * count > len(examples):
        raise Told("what its scenario calls a class is another for most examples: it is none")
    what = f"what data.label_pattern = {printable(str(data.label_pattern))} finds in file names"
    if data.source != "sound":
        what = f"column {printable(data.label)!r}"
    elif data.label_pattern is None:
        what = "the class folders' names"
    return f"the server is told the names of {count} classes: {what}, as its scenario says"


def source_of(path: Path) -> str:
    """Which data source reads a client's path, as long as nothing is said of it."""
    return "arrays" if path.suffix.lower() in (".npz", ".csv") else "folder"


def load_private(path: Path, section: schema.Data | None = None) -> Examples:
    """A client's own data; one class will do.

    Args:
        path: a folder or .zip of ``<class>/<image>`` or of wav files, an .npz, or a .csv of
            features or any table.
        section: how to read it; default the scenario's defaults.

    Raises:
        InputError: whatever is wrong with it. For the client's own eyes.
    """
    if section is None:
        facts = {"source": source_of(path), "path": str(path.absolute())}
        section = schema.Data.model_validate(facts)
    return LOADERS[section.source](section, one_client=True)


def first_look(path: Path, consent: Consent | None = None) -> tuple[str, dict[str, int]]:
    """What can be said of a client's data before a server says how they are read.

    Args:
        consent: of a table whose user said what may be read, no value is.

    Returns:
        One line, and examples by class; none where only the scenario knows what a column is.

    Raises:
        InputError: they can be nothing that any scenario reads.
    """
    table = path.suffix.lower() in SUFFIXES
    named = table and consent not in (None, Consent())
    if table and (not set(LABELS) & set(names := column_names(path)) or named):
        return f"a table of {len(names)} columns; the scenario says which is what", {}
    try:
        examples = load_private(path)
    except InputError as error:
        if table and len(column_names(path)) > 1:
            return f"no table of ready features ({error.what}); the scenario says what is what", {}
        sounds = 0
        if not table and (path.is_dir() or path.suffix.lower() == ".zip"):
            sounds = sum(name.lower().endswith(EXTENSIONS) for name in open_files(path).paths)
        if not sounds:
            raise
        return f"{sounds:,} recordings", {}
    counts = np.bincount(examples.labels, minlength=len(examples.classes)).tolist()
    line = f"{len(examples):,} examples in {len(examples.classes)} classes"
    return line, dict(zip(examples.classes, counts, strict=True))


def owned(examples: Examples, classes: tuple[str, ...], name: str) -> Examples:
    """The examples as those of one client, labelled by the federation's classes.

    Raises:
        InputError: one of their classes is not among the federation's.
    """
    place = {label: i for i, label in enumerate(classes)}
    if missing := [label for label in examples.classes if label not in place]:
        raise Told("some of its classes are not the federation's", got=", ".join(missing[:5]))
    index: Int32 = np.array([place[label] for label in examples.classes], np.int32)
    return replace(
        examples,
        labels=index[examples.labels],
        classes=classes,
        clients=np.zeros(len(examples), np.int32),
        client_names=(name,),
    )


def keyed(fingerprint: str, key: bytes) -> str:
    """A fingerprint that only tells the holder of the run's key whether the data are the same."""
    return hashlib.blake2b(fingerprint.encode(), key=key, digest_size=16).hexdigest()


@contextmanager
def discreet() -> Iterator[None]:
    """Errors of private data: their kind and a count are told, their words stay here."""
    try:
        yield
    except Told:
        raise
    except BadFiles as error:
        examples = "example" if error.count == 1 else "examples"
        raise InputError(
            f"{error.count} {examples} cannot be read (named on the client's own terminal)",
            got=error.line(),
        ) from error
    except InputError as error:
        raise InputError(
            "its data cannot be used (why is said on the client's own terminal)", got=error.line()
        ) from error
