"""What a request may ask of training and of an answer before it leaves, and what makes no sense."""

from __future__ import annotations

import math

from fedtl.plans import Protection, RoundPlan
from fedtl.types import LocalTraining

BELOW_ONE = ("dropout", "validation_fraction", "label_smoothing")
AT_LEAST_ZERO = ("tail_rate", "l2_pretrained", "unfrozen", "mixup", "noise", "early_stopping")


def flaw_of(plan: RoundPlan) -> str | None:
    """Why a plan cannot be carried out as it says; None for one that can."""
    flaw = flaw_of_training(plan.training)
    return flaw or (flaw_of_protection(plan.protection) if plan.protection else None)


def flaw_of_training(asked: LocalTraining) -> str | None:
    """Why nobody can train so; None where it can be done, however little comes of it."""
    if any(type(name) is not str for name in asked.still):
        return "its training leaves out tensors without a name"
    if wrong := [name for name in BELOW_ONE if not 0 <= getattr(asked, name) < 1]:
        return f"its training has an impossible {wrong[0]}"
    if wrong := [name for name in AT_LEAST_ZERO if not 0 <= getattr(asked, name) < math.inf]:
        return f"its training has an impossible {wrong[0]}"
    return None


def flaw_of_protection(asked: Protection) -> str | None:
    """Why a protection protects nothing, or cannot be computed; None for one that can be kept."""
    numbers = {name: value for name, value in vars(asked).items() if type(value) is not bool}
    if wrong := [name for name, value in numbers.items() if not 0 <= value < math.inf]:
        return f"its protection has an impossible {wrong[0]}"
    if asked.least_per_class < 1:
        return "its protection has an impossible least_per_class"
    if asked.noise and not (asked.clip or asked.row_clip):
        return "it asks for noise where nothing is clipped"
    if asked.example_noise and not asked.example_clip:
        return "it asks for noise where no example's gradient is clipped"
    if asked.ring_bits not in (0, 32, 64):
        return "its protection has an unknown ring"
    if asked.ring_bits and not (asked.scale and 1 <= asked.limit < 2 ** (asked.ring_bits - 1)):
        return "its ring cannot hold what is to be sent"
    if not asked.ring_bits and (asked.scale or asked.limit or asked.masked):
        return "it asks for a sum in a ring, and for no ring"
    return None
