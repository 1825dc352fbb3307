"""What in clients' pictures is unlike those that the weights were trained on, one check after the
other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtl.data.examples import Pixels
from fedtl.evaluation.quick_head import sample_rows
from fedtl.input_checks.trials import LOOKED_AT, LOOKED_AT_EACH, Trial
from fedtl.ready_features import OpenedData, ReadyFeatures
from fedtl.transfer import pictures
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.pictures import Looks
from fedtl.types import Float64, Rows

COARSE = 0.75
"""Pictures with a shorter side below this share of the weights' own size lack detail."""

NAMED = 5
"""Clients that a sentence names."""

MATCHED = Trial("matched", matches=True)
"""``adaptation.input = "match"``."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Finding:
    """Something unlike what the weights were trained on.

    Attributes:
        clients: where, bool [K].
        change: what to do about it.
        trial: how the change is tried; None where it cannot be.
        why_not: said where it cannot be.
        probe: tried in its place, against ``probe_base``; what it loses hints at what the change
            would gain.
        mild: no warning, whatever is measured.
    """

    what: str
    clients: Mask
    change: str
    trial: Trial | None = None
    why_not: str | None = None
    probe: Trial | None = None
    probe_base: Trial | None = None
    mild: bool = False


@dataclass(frozen=True)
class Seen:
    """What the K clients' pictures are like: medians, means and deviations over those looked at.

    NaN where none of a client's was looked at.
    """

    names: tuple[str, ...]
    backbone: Backbone
    native: Backbone
    short: Float64
    squareness: Float64
    mean: Float64
    std: Float64
    grey: Float64
    top: Float64
    dark: Float64
    light: Float64

    @property
    def trained(self) -> bool:
        """Whether the weights were trained on pictures at all."""
        return self.backbone.weights_source != "random"

    @property
    def faint(self) -> Mask:
        """Clients whose brightest pixels are nearly black: 0 to 1 stored as whole numbers, say."""
        return self.top <= 32


def look(
    opened: OpenedData, features: ReadyFeatures, threads: int, check: Callable[[], None]
) -> Seen:
    """Looks at a seeded sample of each client's pictures."""
    scenario, split, images = opened.scenario, features.split, features.examples.images
    assert images is not None
    both = [np.concatenate([split.train.of(k), split.test.of(k)]) for k in range(len(split.names))]
    ends = np.cumsum([0, *map(len, both)]).astype(np.int64)
    rows = sample_rows(
        Rows(np.concatenate(both), ends), LOOKED_AT, scenario.seed, "look", LOOKED_AT_EACH
    )
    preprocessing = opened.backbone.preprocessing
    looks = pictures.look_at(images, rows.index, preprocessing, threads, check)
    section = scenario.backbone.model_copy(update={"image_size": None})
    native = open_backbone(section, scenario.seed)
    places = np.split(np.arange(len(rows.index)), rows.offsets[1:-1])
    table = np.array([_client(looks.of(own)) for own in places])
    return Seen(
        split.names,
        opened.backbone,
        native,
        table[:, 0],
        table[:, 1],
        table[:, 2:5],
        table[:, 5:8],
        *table[:, 8:].T,
    )


def _client(looks: Looks) -> list[float]:
    """One client's row: see ``Seen``."""
    looks = looks.of(np.flatnonzero(looks.short))
    if not len(looks.short):
        return [np.nan] * 12
    mean, std = pictures.pixel_statistics(looks)
    return [
        float(np.median(looks.short)),
        float(np.median(looks.short / looks.long)),
        *mean.tolist(),
        *std.tolist(),
        float((looks.colour <= pictures.SLIGHT).mean()),
        float(looks.top.max()),
        float(looks.dark.mean()),
        float(looks.light.mean()),
    ]


def _resolution(seen: Seen) -> Iterator[Finding]:
    """Pictures that hold less detail than the weights were trained on."""
    native, size = seen.native.image_size, seen.backbone.image_size
    coarse = seen.short < COARSE * native
    if not seen.trained or not coarse.any():
        return
    enlarged = f", enlarged to {size} px" if (seen.short[coarse] < size).any() else ""
    yield Finding(
        f"pictures of {_px(seen.short[coarse])} (shorter side, median of a client) go into weights "
        f"trained at {native} px{enlarged}: fine detail is missing",
        coarse,
        f"use the original pictures, of {native} px or more, where they exist",
        why_not="cannot be measured: these data hold no finer pictures",
        probe=Trial("halved", seen.native, lambda _, image: pictures.halve(image)),
        probe_base=_at_native(seen),
    )


def _size(seen: Seen) -> Iterator[Finding]:
    """``backbone.image_size`` that is not the weights' own."""
    native, size = seen.native.image_size, seen.backbone.image_size
    if not seen.trained or size == native:
        return
    finer = seen.short > size
    more = f"; pictures have up to {np.nanmax(seen.short):.0f} px" if finer.any() else ""
    cost, below = (native / size) ** 2, size < native
    times = f"{cost:.1f} times as long" if below else f"{100 * cost:.0f} % of the time"
    yield Finding(
        f"backbone.image_size = {size} is {'below' if below else 'above'} the {native} px that the "
        f"weights were trained at{more if below else ''}",
        ~np.isnan(seen.short),
        f"leave backbone.image_size out ({native} px): the trunk then takes {times}",
        _at_native(seen),
    )


def _aspect(seen: Seen) -> Iterator[Finding]:
    """Long pictures, of which the centre crop shows a part."""
    odd = seen.squareness < 2 / 3
    if odd.any():
        lost = 100 * (1 - np.nanmin(seen.squareness))
        yield Finding(
            f"pictures are far from square: the centre crop cuts up to {lost:.0f} % of them away",
            odd,
            "pad the pictures to squares, or cut the part that matters out of them",
            Trial("padded", pixels=lambda _, image: pictures.pad(image)),
        )


def _range(seen: Seen) -> Iterator[Finding]:
    """Pixels that were scaled to 0 to 1, or so, before they were stored as whole numbers."""
    if seen.faint.any():
        top = np.where(seen.faint, np.maximum(seen.top, 1.0), 255.0)
        yield Finding(
            f"pixels reach only {np.nanmax(seen.top[seen.faint]):.0f} of 255: they seem to be "
            "normalised already",
            seen.faint,
            "store the pixels as 0 to 255",
            Trial("stretched", pixels=_by_client(255.0 / top, np.zeros(len(top)))),
        )


def _polarity(seen: Seen) -> Iterator[Finding]:
    """Light strokes on an empty black ground; worse where others have dark ones on white."""
    dark = (seen.dark >= 0.5) & ~seen.faint
    light = seen.light >= 0.5
    if not dark.any() or not seen.trained:
        return

    def alter(client: int, image: Pixels) -> Pixels:
        return pictures.invert(image) if dark[client] else image

    share = 100 * np.nanmean(seen.dark[dark])
    others = f"; at {_who(seen.names, light)} it is the other way round" if light.any() else ""
    yield Finding(
        f"pictures are light on black ({share:.0f} % of their pixels), which natural pictures "
        f"seldom are{others}",
        dark,
        "invert these pictures (255 - pixel)",
        Trial("inverted", pixels=alter),
    )


def _colour(seen: Seen) -> Iterator[Finding]:
    """Grey pictures in a trunk for colour: all of them, or those of some clients only."""
    grey = (seen.grey >= 0.9) & ~seen.faint
    if not grey.any() or not seen.trained:
        return
    if (grey | np.isnan(seen.grey) | seen.faint).all():
        yield Finding(
            "all pictures are grey, and the weights were trained on colour: each channel gets the "
            "same pixels",
            grey,
            'set adaptation.input = "match"',
            MATCHED,
        )
        return
    yield Finding(
        "pictures are grey here and in colour at the others: the trunk tells clients apart by it",
        grey,
        "make everybody's pictures grey, or ask these clients for colour",
        Trial("grey", pixels=lambda _, image: pictures.to_grey(image)),
    )


def _statistics(seen: Seen) -> Iterator[Finding]:
    """Pixels far from those that the weights were trained on."""
    if not seen.trained:
        return
    mean, std = pictures.trained_on(seen.backbone.preprocessing)
    far, worst = _far(seen, mean, std)
    if far.any():
        yield Finding(
            "pixels are far from those the weights were trained on: at "
            f"{_name(seen.names[worst])} channels have mean {_three(seen.mean[worst])} and "
            f"deviation {_three(seen.std[worst])}, the weights' own "
            f"{_three(mean)} and {_three(std)}",
            far,
            'set adaptation.input = "match"',
            MATCHED,
        )


def _outliers(seen: Seen) -> Iterator[Finding]:
    """A few clients whose pixels are unlike everybody else's: another scanner, say."""
    if np.isfinite(seen.top).sum() < 3:
        return
    mean, std = pictures.trained_on(seen.backbone.preprocessing)
    told, _ = _far(seen, mean, std)
    mean, std = np.nanmedian(seen.mean, axis=0), np.nanmedian(seen.std, axis=0)
    odd, worst = _far(seen, mean, np.maximum(std, 1.0))
    if (odd & ~told).any() and odd.mean() < 0.5:
        yield Finding(
            "pixels are far from the other clients': at "
            f"{_name(seen.names[worst])} channels have mean {_three(seen.mean[worst])} and "
            f"deviation {_three(seen.std[worst])}, elsewhere {_three(mean)} and {_three(std)} "
            "(medians)",
            odd,
            'set adaptation.input = "match"',
            MATCHED,
        )


def _far(seen: Seen, mean: Float64, std: Float64) -> tuple[Mask, int]:
    """Clients more than a deviation away, or spread twice or half as far, and the worst of them."""
    away = np.abs(seen.mean - mean) / std
    spread = np.abs(np.log2(np.maximum(seen.std, 1.0) / std))
    worst = np.nan_to_num(np.maximum(away, spread).max(axis=1))
    far = (worst > 1) & ~seen.faint
    return far, int(np.argmax(np.where(far, worst, -1.0)))


CHECKS: tuple[Callable[[Seen], Iterator[Finding]], ...] = (
    _resolution,
    _size,
    _aspect,
    _range,
    _polarity,
    _colour,
    _statistics,
    _outliers,
)


def _at_native(seen: Seen) -> Trial:
    """At the size that the weights were trained at; as it is where that is the scenario's."""
    if seen.native.identity() == seen.backbone.identity():
        return Trial("as it is")
    return Trial("native size", backbone=seen.native)


def _by_client(scale: Float64, offset: Float64) -> Callable[[int, Pixels], Pixels]:
    """scale * pixel + offset, a row (or a number) of each for every client; NaN: as it is."""

    def alter(client: int, image: Pixels) -> Pixels:
        if np.isnan(scale[client]).any():
            return image
        return pictures.affine(image, scale[client], offset[client])

    return alter


def _px(sides: Float64) -> str:
    low, high = np.nanmin(sides), np.nanmax(sides)
    return f"{low:.0f} px" if low == high else f"{low:.0f} to {high:.0f} px"


def _three(values: Float64) -> str:
    return " / ".join(f"{value:.0f}" for value in values)


def _who(names: Sequence[str], here: Mask) -> str:
    chosen = [names[k] for k in np.flatnonzero(here).tolist()]
    more = f" and {len(chosen) - NAMED} more" if len(chosen) > NAMED else ""
    return ", ".join(map(_name, chosen[:NAMED])) + more


def _name(name: str) -> str:
    return name[:60]
