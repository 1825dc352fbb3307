"""One client with data of its own, as a node asks it: to join, to take weights, to prepare.

What the server is told: class names, counts, the features' width, a keyed fingerprint, versions and
what the machine is. Paths, file names and values are in no reply and in no error that is sent.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from fedtl import machine
from fedtl.build import resolve_device
from fedtl.clients.personal_store import PersonalStore
from fedtl.data.examples import Examples
from fedtl.deployment.backbone_transfer import (
    FILE,
    Reception,
    find_weights,
    read_announcement,
    weights_folder,
)
from fedtl.deployment.class_table import MAX_CLASSES
from fedtl.deployment.consent import Consent, use_of
from fedtl.deployment.keys import check_name
from fedtl.deployment.pledge import Pledge, check_demands, read_pledge
from fedtl.deployment.private_data import (
    Order,
    Ready,
    Session,
    Task,
    Work,
    classes_told,
    discreet,
    load_private,
    own_data,
)
from fedtl.deployment.terms import refuse_other_version
from fedtl.engines.node import NotPrepared
from fedtl.engines.wire import Tensors
from fedtl.errors import EnvironmentFault, FedtlError, InputError, SecurityRefusal
from fedtl.plans import RoundPlan
from fedtl.scenario import schema
from fedtl.types import Int64, Population

REPLY_SECONDS = 1.0
"""So long a request waits for data or features before it answers how far they are."""

PERSONAL = "personal"

IN_WORDS: Mapping[str, str] = {
    "train": "the update of the head that was trained here: averages over your examples",
    "gradient": "the gradient of the head's loss here: averages over your examples",
    PERSONAL: "how good a head of this client's own is, made here; the head itself stays",
    "statistics": "sums of your features, of their products, and counts, class by class: of a "
    "class with one example that is the example's features themselves",
}
"""What a client is told of each task before it does one."""


class PrivateHost:
    """One client with data of its own; what ``engines.node`` calls a Host.

    Args:
        name: as the client's key is approved.
        data: a folder or .zip of ``<class>/<image>``, an .npz, or a .csv of features.
        threads: for features; default all cores the machine allows.
        device: "auto", "cpu" or "cuda".
        tell: takes lines for the client's own terminal; default the log.
        keeps: folder for what the client has of its own from round to round; None for nothing.
        demands: without which it takes no part, see ``pledge.DEMANDS``.
        consent: what of the data may be read; default whatever a scenario names.
    """

    def __init__(
        self,
        name: str,
        data: Path,
        *,
        threads: int | None = None,
        device: str = "auto",
        tell: Callable[[str], None] | None = None,
        keeps: Path | None = None,
        demands: Collection[str] = (),
        consent: Consent | None = None,
    ) -> None:
        self._consent = consent or Consent()
        self._keeps, self._demands = keeps, check_demands(demands)
        self.name, self._data = check_name(name), data
        self._tell = tell or logging.getLogger("fedtl").warning
        self._engine = schema.Engine.model_validate({"threads": threads, "device": device})
        self._session: Session | None = None
        self._reading: tuple[Session, Task[Examples]] | None = None
        self._examples: Examples | None = None
        self._weights: Path | None = None
        self._reception: Reception | None = None
        self._work: Work | None = None
        self._ready: Ready | None = None
        self._pledge: Pledge | None = None
        self._last_round = 0

    def join(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        """Who is here, or only that the data are still being read.

        A run that was not known here makes the data be read anew.

        Raises:
            InputError: another version, another backbone, or data that cannot be used.
            SecurityRefusal: the key was approved under another name, what is said of privacy is
                less than this client demands, or than was said before, or more of the data would
                be read than its user consents to; none is read then.
        """
        if facts.get("key_name") != self.name:
            raise SecurityRefusal(
                f"this client calls itself {self.name!r}, and its key is approved as "
                f"{facts.get('key_name')!r}"
            )
        refuse_other_version(facts.get("versions"), "the server", "this client")
        session = self._read_terms(facts)
        if session != self._session and not self._read(session):
            return {"name": self.name, "reading": True}
        assert self._examples is not None
        self._settle(facts)
        return {
            "name": self.name,
            "classes": list(self._examples.classes),
            "numbered": session.scenario.data.source in ("arrays", "table"),
            "examples": len(self._examples),
            "versions": machine.versions(),
            "cpu": machine.cpu_model(),
            "device": resolve_device(session.scenario),
            "threads": self._engine.threads or machine.allowed_cores(),
            "has_backbone": self._look_for_backbone(session),
            "free_disk_bytes": shutil.disk_usage(_existing(weights_folder())).free,
        }

    def weights(self, facts: Mapping[str, Any], tensors: Tensors) -> Mapping[str, Any]:
        """Take one piece of the weights; says which piece is wanted next."""
        session = self._joined()
        if session.announced.kind != FILE:
            raise SecurityRefusal("weights were sent although this backbone needs none")
        if self._weights is not None or self._look_for_backbone(session):
            self._stop_receiving()  # another client on this machine was quicker
            return {"next": session.announced.count}
        if self._reception is None:
            self._tell("receiving the backbone's weights")
            self._reception = Reception(session.announced, self.name)
        try:
            following = self._reception.take(facts, tensors.get("piece"))
        except FedtlError:
            self._stop_receiving()
            raise
        if following == session.announced.count:
            self._reception = None
            if not self._look_for_backbone(session):
                raise EnvironmentFault("the weights that were received are not there any more")
        return {"next": following}

    def prepare(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make the features, in the background; says how far they are, or what there is now.

        Raises:
            NotPrepared: the server did not ask this client to join, or the weights are missing.
            InputError: data that cannot be used.
        """
        session = self._joined()
        if session.announced.kind == FILE and self._weights is None:
            raise NotPrepared("the backbone's weights are not here yet")
        assert self._examples is not None
        order = Order(session, _read_classes(facts), _read_key(facts))
        if self._work is None or self._work.order != order:
            self._stop_work()
            self._work = Work(order, self._examples, self._weights, self.name)
        work = self._work
        if not work.task.finished.wait(REPLY_SECONDS):
            return {"ready": False, "done": work.done, "total": work.total}
        try:
            with discreet():
                self._ready = work.task.outcome()
        except BaseException:
            self._work = None  # asked once more, it tries once more
            raise
        for note in work.notes:
            self._tell(note)
        work.notes = ()
        return self._ready.facts

    def population(self) -> Population:
        """This one client's data. Raises NotPrepared."""
        if self._ready is None:
            raise NotPrepared("this client has no data ready: it was not asked to prepare")
        return self._ready.population

    def consent(self, plan: RoundPlan) -> None:
        """Refuse what was not told when this client joined."""
        told = self._joined().tasks
        idle = plan.training.epochs == 0 and not (plan.reports or plan.corrections)
        if plan.task not in told and not (plan.task == "train" and idle):
            raise SecurityRefusal(f"the server asks for {plan.task}, which it did not say before")
        if plan.personal is not None and PERSONAL not in told:
            raise SecurityRefusal("the server asks for a head of one's own, which it did not say")
        if "start_gradient" in plan.reports and "gradient" not in told:
            raise SecurityRefusal("the server asks for a gradient, which it did not say before")

    def protected(self, plan: RoundPlan) -> None:
        """Refuse what protects less than was told, and a round's answer asked for once more."""
        session = self._joined()
        if _sends_back(plan):
            return
        pledge, private = self._pledge or session.pledge, session.pledge.asked.mechanism != "none"
        if private and not pledge.settled:
            raise NotPrepared("the server has not said yet what epsilon is")
        pledge.hold(plan)
        if private and plan.round <= self._last_round:
            raise SecurityRefusal(
                f"the server asks for round {plan.round} after round {self._last_round}: each "
                "answer spends privacy, and once is what it said"
            )
        self._last_round = plan.round

    def store(self) -> PersonalStore | None:
        """A folder for each run, by what stays the same when it is resumed."""
        if self._keeps is None:
            return None
        if self._work is None:
            raise NotPrepared("this client has no data ready: it was not asked to prepare")
        name = hashlib.blake2b(self._work.order.key, digest_size=8).hexdigest()
        return PersonalStore(self._keeps / name)

    def ids(self, clients: Int64) -> Int64:
        """Row 0, whatever the client's number in the federation; int64 [1]."""
        if len(clients) != 1:
            raise InputError("this node has one client, and was asked for another number of them")
        return np.zeros(1, np.int64)

    def close(self) -> None:
        """Stop working; nothing half-done stays on the disk."""
        self._forget()

    def _read(self, session: Session) -> bool:
        """Whether the data are here for this session; reads them in the background."""
        if self._reading is None or self._reading[0] != session:
            self._forget()
            with discreet():
                use = use_of(self._data, session.scenario.data)
            for line in self._consent.hold(use):
                self._tell(line)
            call = partial(load_private, self._data, session.scenario.data)
            self._reading = session, Task(call, "read")
        task = self._reading[1]
        if not task.finished.wait(REPLY_SECONDS):
            return False
        self._reading = None
        with discreet():
            examples = task.outcome()
            line = classes_told(examples, session.scenario.data)
        if line:
            self._tell(line)
        self._examples, self._session = examples, session
        for asked in session.tasks:
            self._tell(f"in a round, what leaves is {IN_WORDS[asked]}")
        if session.scenario.transfer.mode != "head":
            self._tell(
                "with the head goes what is trained of the network behind the cut: from it, "
                "something like an example may be made again, unless sums are masked or noised"
            )
        for line in session.pledge.words():
            self._tell(line)
        return True

    def _settle(self, facts: Mapping[str, Any]) -> None:
        """Take in, and tell, what is known once everybody has gathered."""
        settled = facts.get("settled")
        if settled is None:
            return
        if not isinstance(settled, dict):
            raise InputError("the server's terms of privacy are none that fedtl knows")
        before = self._pledge or self._joined().pledge
        pledge = before.settle(settled)
        pledge.insist(self._demands)
        if self._pledge is None and pledge.asked.mechanism != "none":
            self._tell(pledge.numbers())
        self._pledge = pledge

    def _read_terms(self, facts: Mapping[str, Any]) -> Session:
        announced = read_announcement(facts.get("backbone"))
        own = own_data(self._data, facts.get("data"))
        keys = ("test_fraction", "on_bad_file", "leakage", "max_pixels")
        try:
            scenario = schema.Scenario.model_validate(
                {
                    "name": facts.get("scenario"),
                    "seed": facts.get("seed"),
                    "data": own | {key: facts.get(key) for key in keys},
                    # the one natural client of these data is this one
                    "clients": {
                        "partition": "natural",
                        "min_examples": facts.get("min_examples"),
                    },
                    "adaptation": facts.get("adaptation"),
                    "backbone": announced.section,
                    "transfer": facts.get("transfer"),
                    "engine": self._engine,
                }
            )
        except ValidationError as error:
            raise InputError("the server's terms are none that fedtl knows") from error
        tasks = facts.get("tasks")
        if not isinstance(tasks, list) or not all(task in IN_WORDS for task in tasks):
            raise InputError("the server does not say what it will ask for, or nothing fedtl knows")
        pledge = read_pledge(facts)
        pledge.insist(self._demands)
        return Session(str(facts.get("run", "")), scenario, announced, tuple(tasks), pledge)

    def _look_for_backbone(self, session: Session) -> bool:
        """Whether the server's backbone can be opened here; refuses one that differs."""
        announced = session.announced
        if announced.kind == FILE:
            self._weights = self._weights or find_weights(announced)
            if self._weights is None:
                return False
        announced.open(self._weights, session.scenario.seed)
        return True

    def _joined(self) -> Session:
        if self._session is None:
            raise NotPrepared("this client was not asked to join")
        return self._session

    def _forget(self) -> None:
        self._stop_work()
        self._stop_receiving()
        self._session = self._reading = self._examples = self._weights = self._pledge = None
        self._last_round = 0

    def _stop_receiving(self) -> None:
        if self._reception is not None:
            self._reception.close()
            self._reception = None

    def _stop_work(self) -> None:
        if self._work is not None:
            self._work.stop()
        self._work = self._ready = None


def _sends_back(plan: RoundPlan) -> bool:
    """Whether all that a plan asks for is the head that was sent, untouched."""
    own = plan.training
    idle = plan.task == "train" and own.epochs == 0 and own.prior_strength == 0
    more = plan.reports or plan.corrections or plan.personal or plan.compression
    return idle and not more


def _read_classes(facts: Mapping[str, Any]) -> tuple[str, ...]:
    classes = facts.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError("the server names no classes")
    if not 2 <= len(set(classes)) == len(classes) <= MAX_CLASSES:
        raise InputError(f"the server names {len(classes)} classes, or one twice")
    return tuple(classes)


def _read_key(facts: Mapping[str, Any]) -> bytes:
    try:
        key = bytes.fromhex(facts["data_key"])
    except (KeyError, TypeError, ValueError):
        key = b""
    if not 16 <= len(key) <= 64:
        raise InputError("the server sends no key for the data's fingerprint")
    return key


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))
