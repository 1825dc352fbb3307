"""What a run will cost, told before it begins. Estimates, from figures measured on a plain CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedtl import machine
from fedtl.planning import cohort_size, plan_round, scratch_rates
from fedtl.plans import Task
from fedtl.privacy.promise import Promise, make_promise
from fedtl.ready_features import OpenedData, allowed_threads
from fedtl.scenario.schema import Scenario
from fedtl.strategies import Strategy, make_strategy, protected
from fedtl.strategies.warm_start import WarmStart
from fedtl.transfer.backbones import EMBEDDED, INPUT, OPENERS, Backbone
from fedtl.transfer.features import FeatureStore
from fedtl.transfer.flops import tail_flops
from fedtl.transfer.row_trunks import rows_width
from fedtl.transfer.tails import WHOLE, first_head
from fedtl.transfer.text_features import expected_macs, text_width
from fedtl.transfer.views import fingerprints, rows_in_all
from fedtl.types import TAIL, Head, Roster, Tail, head_bytes

MACS_PER_CORE_SECOND = 30e9
"""Multiply-adds of a convolutional trunk in ONNX Runtime per core (benchmarks/extraction.py)."""

FLOPS_PER_CORE_SECOND = {"linear": 60e9, "mlp": 12e9, "cosine": 5e9, "prototype": 5e9}
"""Float operations of local training per core (benchmarks/kernel.py)."""

TAIL_FLOPS_PER_CORE_SECOND = 20e9
"""The same of a network behind the cut (benchmarks/tails.py); a backward pass is two forward."""

SCRATCH_MACS_PER_SECOND = 10e9
"""The same forward and backward in torch on the one thread that trains from scratch; a backward
pass counts as two forward ones."""

EMBEDDED_GMACS = (0.385, 224)
"""EfficientNet-Lite0's billions of multiply-adds for one image of that size."""

BASE_BYTES = {True: 600 * 2**20, False: 1100 * 2**20}
"""Resident memory of the rest, measured: with features in the store, and with a trunk to run."""


@dataclass(frozen=True)
class Forecast:
    """Counts are exact; seconds and memory are estimates, None where nothing is known."""

    clients: int
    domains: int
    examples: int
    classes: int
    train: int
    test: int
    rounds: int
    cohort: int
    head_parameters: int
    bytes_down: int
    bytes_up: int
    cached: bool
    feature_bytes: int
    memory_bytes: int
    extract_seconds: float | None
    train_seconds: float
    task: Task
    scratch_epochs: int = 0
    """Of the reference from_scratch, 0 where it is not asked for; each takes all images."""
    scratch_seconds: float | None = 0.0
    epsilon: float | None = None
    """After all rounds; None where nothing bounds it."""
    privacy_notes: tuple[str, ...] = ()
    """What to warn of before relying on it."""
    tail_parameters: int = 0
    """Of ``head_parameters``, those behind the cut."""
    stored_each: int = 0
    """Bytes of one example in the feature store."""


def forecast(opened: OpenedData) -> Forecast:
    """What running this scenario on this machine will take."""
    scenario, split, examples = opened.scenario, opened.split, opened.examples
    stored = stored_width(opened)
    cached, stored = stored is not None, stored or opened.backbone.dim
    width = stored if opened.tail is None else opened.tail.width
    head = first_head(scenario, opened.tail, width, len(examples.classes))
    clients = len(split.names)
    cohort = min(clients, cohort_size(scenario, clients))
    share = cohort / clients
    parameters = sum(tensor.size for tensor in head.values())
    roster = Roster(
        split.names, split.domains, examples.classes, split.train.counts, split.test.counts, width
    )
    promise = make_promise(scenario, roster)
    sent = _exchanged(scenario, roster, promise, head, cohort)
    bytes_each = stored * np.dtype(_stored_dtype(opened)).itemsize
    rows = rows_in_all(scenario.augmentation, split, len(examples))
    trained = scenario.augmentation.views * len(split.train.index)
    feature_bytes = rows * bytes_each
    behind = sum(tensor.size for name, tensor in head.items() if name.startswith(TAIL))
    flops = 4.0 * trained * share * (parameters - behind)
    flops *= scenario.training.local_epochs * sent.rounds if sent.task == "train" else sent.rounds
    if sent.task == "statistics":
        wide = max(width, getattr(scenario.strategy, "random_features", 0))
        flops = 2.0 * trained * wide**2
    threads = allowed_threads(scenario)
    through = 3 * tail_flops(opened.tail) * trained * share
    through *= scenario.training.local_epochs * sent.rounds / (TAIL_FLOPS_PER_CORE_SECOND * threads)
    memory = BASE_BYTES[cached] + int(feature_bytes * share) + 3 * head_bytes(head) * cohort
    memory += sent.held_bytes
    return Forecast(
        clients,
        len(set(split.domains)),
        len(examples),
        len(examples.classes),
        len(split.train.index),
        len(split.test.index),
        sent.rounds,
        cohort,
        parameters,
        sent.bytes_down,
        sent.bytes_up,
        cached,
        feature_bytes,
        memory,
        0.0 if cached else _extract_seconds(opened, threads),
        flops / (FLOPS_PER_CORE_SECOND[scenario.head.kind] * threads) + through,
        sent.task,
        *_scratch(opened),
        None if promise is None else promise.epsilon_after(scenario.rounds),
        () if promise is None else promise.notes,
        behind,
        bytes_each,
    )


def _stored_dtype(opened: OpenedData) -> str:
    """Of what is stored; images as they are are whole numbers that half a float holds."""
    if opened.backbone.cut != INPUT:
        return opened.scenario.backbone.feature_dtype
    return "float16" if opened.examples.images is not None else "float32"


def _scratch(opened: OpenedData) -> tuple[int, float | None]:
    """Epochs and seconds of training the whole network from scratch, where it is asked for."""
    scenario = opened.scenario
    if "from_scratch" not in scenario.evaluation.references:
        return 0, 0.0
    epochs = len(scratch_rates(scenario))
    macs = _macs(opened)
    trained = scenario.augmentation.views * len(opened.split.train.index)
    passes = 3 * epochs * trained
    return epochs, None if macs is None else passes * macs / SCRATCH_MACS_PER_SECOND


class Exchanged(NamedTuple):
    """What clients mostly do, in how many rounds, bytes on the way, and what the server holds."""

    task: Task
    rounds: int
    bytes_down: int
    bytes_up: int
    held_bytes: int


def _exchanged(
    scenario: Scenario, roster: Roster, promise: Promise | None, head: Head, cohort: int
) -> Exchanged:
    """Of statistics every client sends its own once, so rounds end when all have."""
    strategy, clients = make_strategy(scenario, roster.names), roster.num_clients
    rounds, down, up = scenario.rounds, 0, 0

    def guarded(strategy: Strategy) -> Strategy:
        return protected(strategy, scenario, promise, roster.train)

    if isinstance(strategy, WarmStart):
        whole = guarded(strategy)
        first = plan_round(scenario, clients, whole, whole.init(head, clients), 1)
        down, up = first.down_bytes(head) * cohort, first.up_bytes(head) * cohort
        rounds -= 1
        strategy = strategy.then
    strategy = guarded(strategy)
    state = strategy.init(head, clients)
    plan = plan_round(scenario, clients, strategy, state, 1)
    if plan.task == "statistics":
        rounds = min(rounds, -(-clients // cohort))
    times = min(clients, cohort * rounds) if plan.task == "statistics" else cohort * rounds
    held = 4 * plan.up_bytes(head) if plan.task == "statistics" else 0
    held += 3 * sum(slot.nbytes for slot in state.slots.values())
    return Exchanged(
        plan.task,
        rounds,
        down + plan.down_bytes(head) * times,
        up + plan.up_bytes(head) * times,
        held,
    )


def stored_width(opened: OpenedData) -> int | None:
    """D where the features are there already, None where the trunk has to make them."""
    section, examples = opened.scenario.backbone, opened.examples
    if examples.kind == "rows":
        return rows_width(opened.backbone, examples, opened.scenario.data)
    width: Any = FeatureStore().width if examples.texts is None else text_width
    scenario = opened.scenario
    views = fingerprints(examples.fingerprint, opened.split, scenario.augmentation, scenario.seed)
    found = [
        width(
            opened.backbone,
            examples.texts or examples.images,
            fingerprint,
            dtype=_stored_dtype(opened),
            way=section.extraction,
            device=opened.scenario.engine.device,
        )
        for fingerprint in (examples.fingerprint, *views)
    ]
    return None if None in found else found[0]


def _extract_seconds(opened: OpenedData, threads: int) -> float | None:
    macs, section = _macs(opened), opened.scenario.augmentation
    rows = rows_in_all(section, opened.split, len(opened.examples))
    return None if macs is None else macs * rows / (MACS_PER_CORE_SECOND * threads)


def _macs(opened: OpenedData) -> float | None:
    """Multiply-adds for one image; None on a GPU and for models whose cost is not published."""
    if machine.gpu_present() and opened.scenario.engine.device != "cpu":
        return None
    if opened.examples.texts is not None:
        return expected_macs(opened.backbone, opened.examples.texts)
    known = _gmacs(opened.scenario.backbone.name)
    if known is None:
        return None
    gmacs, trained_size = known
    return 1e9 * gmacs * (opened.backbone.image_size / trained_size) ** 2


def _gmacs(name: str) -> tuple[float, int] | None:
    if name == EMBEDDED:
        return EMBEDDED_GMACS
    if name in OPENERS:  # from elsewhere: nobody has published its cost
        return None
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    operations = weights.meta.get("_ops")
    return (float(operations), weights.transforms().crop_size[0]) if operations else None


def cut_words(tail: Tail | None, plan: Forecast, each: str) -> str | None:
    """Where the network is cut, what of it is trained, and what is kept of an example; or None.

    Args:
        each: bytes that are stored for one example, in words.
    """
    if tail is None:
        return None
    facts, shape = tail.recipe, " x ".join(map(str, tail.shape))
    where = "everything" if facts["cut"] == INPUT else facts["cut"]
    trained = f"before {where}: {plan.tail_parameters:,} parameters behind it are trained"
    if facts["mode"] in (*WHOLE, "last_blocks"):
        trained += f", batch norm {facts['batch_norm']}"
    if facts["recompute"]:
        return f"{trained}; inputs are stored ({each} each), the frozen part runs in every epoch"
    what = "inputs" if facts["cut"] == INPUT else f"activations {shape}"
    return f"{trained}; {what} are stored, {each} each"


def called(opened: OpenedData) -> str:
    """What examples are called: recordings are pictures to the trunk, and not to who has them."""
    if opened.scenario.data.source == "sound":
        return "recordings"
    return "examples" if opened.examples.kind == "rows" else opened.examples.kind


def seen_words(backbone: Backbone) -> str:
    """How much of an example the trunk sees."""
    if backbone.takes == "texts":
        return f"up to {backbone.settings['max_tokens']} tokens"
    return f"{backbone.image_size} px"
