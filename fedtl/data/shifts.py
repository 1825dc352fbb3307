"""Clients made unlike each other on purpose: shifted images, permuted labels. For studies only.

Kinds and severities 1 to 5 are in the manner of ImageNet-C (Hendrycks and Dietterich 2019,
arXiv:1903.12261), with its constants for noise, blur, JPEG, contrast and down-sampling. Deviations:

- Each client has its own draw of what it does: a direction, a mixture of channels, and a
  ``strength`` in [0.75, 1.25] by which the constant is multiplied, the same at every severity.
- Images have any size here. Blur, the grain of noise and the size to sample down to are those of an
  image whose shorter side is 224, as in ImageNet-C, so that a severity does as much to large photos
  as to small ones. JPEG works on the image as it is.
- Rotation, colour cast and grey are not in ImageNet-C.

What happens to an image follows from the seed, its client's name and its row alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from fedtl import seeding
from fedtl.data.clients import ClientSplit
from fedtl.data.examples import BadImage, Examples, Images, Pixels, content_hash
from fedtl.errors import InputError
from fedtl.scenario.schema import Shift
from fedtl.types import Float32, Int32, Int64

SIDE = 224
"""Shorter side, in pixels, of the images that ImageNet-C's constants are for."""

SHOWN = 3
"""Clients named in a note."""

LUMA = (0.299, 0.587, 0.114)
"""Of ITU-R BT.601."""


@dataclass(frozen=True)
class Draw:
    """What one client does to all its images.

    Attributes:
        kind: a name in ``KINDS``.
        severity: 1 to 5.
        key: of the streams of its images.
        strength: in [0.75, 1.25], multiplies the severity's constant.
        direction: in [-1, 1): sense of a rotation, hue of a cast.
        mixture: weights of red, green and blue that add up to 1.
    """

    kind: str
    severity: int
    key: int
    strength: float
    direction: float
    mixture: tuple[float, float, float]

    def apply(self, pixels: Pixels, row: int) -> Pixels:
        """The image, uint8 [h, w, 3], as this client's camera would have it; ``row`` is its own."""
        shifted = KINDS[self.kind](pixels, self, row)
        if shifted.dtype != np.uint8:
            shifted = np.rint(np.clip(shifted, 0, 255)).astype(np.uint8)
        return np.ascontiguousarray(shifted)


Kind = Callable[[Pixels, Draw, int], Pixels | Float32]


def rotation(pixels: Pixels, draw: Draw, row: int) -> Pixels:
    """Turned about the centre; the corners get the border's median colour."""
    degrees = (10, 20, 30, 45, 60)[draw.severity - 1] * draw.strength
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    fill = tuple(int(value) for value in np.median(border, axis=0))
    turned = Image.fromarray(pixels).rotate(
        math.copysign(degrees, draw.direction), Image.Resampling.BILINEAR, fillcolor=fill
    )
    return np.asarray(turned)


def blur(pixels: Pixels, draw: Draw, row: int) -> Pixels:
    """Gaussian blur; Pillow's, which is three box blurs."""
    sigma = (1, 2, 3, 4, 6)[draw.severity - 1] * draw.strength * min(pixels.shape[:2]) / SIDE
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def noise(pixels: Pixels, draw: Draw, row: int) -> Float32:
    """Gaussian noise on each channel, another for each image."""
    sigma = (0.08, 0.12, 0.18, 0.26, 0.38)[draw.severity - 1] * draw.strength
    high, wide = grid(pixels)
    stream = seeding.generator(draw.key, "noise", row)
    grain = stream.standard_normal((high, wide, 3), dtype=np.float32)
    rows, columns = (
        np.arange(side) * cells // side
        for side, cells in zip(pixels.shape, (high, wide), strict=False)
    )
    return np.asarray(pixels + np.float32(255 * sigma) * grain[rows[:, None], columns])


def jpeg(pixels: Pixels, draw: Draw, row: int) -> Pixels:
    """Packed as JPEG and unpacked again."""
    quality = round((25, 18, 15, 10, 7)[draw.severity - 1] / draw.strength)
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG", quality=quality)
    return np.asarray(Image.open(packed))


def contrast(pixels: Pixels, draw: Draw, row: int) -> Float32:
    """Every channel drawn towards its mean over the image."""
    kept = (0.4, 0.3, 0.2, 0.1, 0.05)[draw.severity - 1] / draw.strength
    mean = pixels.mean(axis=(0, 1), dtype=np.float32)
    return np.asarray((pixels - mean) * np.float32(kept) + mean)


def colour(pixels: Pixels, draw: Draw, row: int) -> Float32:
    """A tint, as of a wrong white balance: channels are dimmed, none is brightened."""
    depth = (0.15, 0.3, 0.45, 0.6, 0.75)[draw.severity - 1] * draw.strength
    angles = np.pi * draw.direction + np.arange(3) * 2 * np.pi / 3
    gains = np.exp(depth * np.cos(angles))
    return np.asarray(pixels * (gains / gains.max()).astype(np.float32))


def grey(pixels: Pixels, draw: Draw, row: int) -> Float32:
    """Colour faded towards grey, all of it at severity 5; each client weighs the channels."""
    share = np.float32(draw.severity / 5)
    weights = (np.array(LUMA) + np.array(draw.mixture)) / 2
    light = pixels @ weights.astype(np.float32)
    return np.asarray(pixels * (1 - share) + light[:, :, None] * share)


def downsample(pixels: Pixels, draw: Draw, row: int) -> Pixels:
    """Fewer pixels and back to the old size, both by Pillow's box filter."""
    kept = (0.6, 0.5, 0.4, 0.3, 0.25)[draw.severity - 1] / draw.strength
    height, width = pixels.shape[:2]
    small_height, small_width = (max(1, round(side * kept)) for side in grid(pixels))
    image = Image.fromarray(pixels).resize((small_width, small_height), Image.Resampling.BOX)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def grid(pixels: Pixels) -> tuple[int, int]:
    """Rows and columns of the image, or of one whose shorter side is 224 if that is smaller."""
    height, width = pixels.shape[:2]
    scale = min(1.0, SIDE / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


KINDS: Mapping[str, Kind] = {
    "rotation": rotation,
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "contrast": contrast,
    "colour": colour,
    "grey": grey,
    "downsample": downsample,
}


class ShiftedImages:
    """Images as their clients would have them.

    Attributes:
        original: the images before.
    """

    def __init__(self, original: Images, client: Int32, draws: Sequence[Draw]) -> None:
        self.original = original
        self._client, self._draws = client, tuple(draws)

    def __len__(self) -> int:
        return len(self.original)

    def load(self, i: int) -> Pixels:
        """Image ``i``, shifted if its client (its place among the draws; -1: none) is."""
        pixels, client = self.original.load(i), int(self._client[i])
        if client < 0:
            return pixels
        try:
            return self._draws[client].apply(pixels, i)
        except (OSError, ValueError) as error:  # JPEG has no room for more than 65,500 a side
            raise BadImage(self.where(i), f"cannot be shifted: {error}") from error

    def where(self, i: int) -> str:
        """Where the image lies."""
        return self.original.where(i)


def unshifted(images: Images) -> Images:
    """The images before any shift: by these, copies of one image are told."""
    while (before := getattr(images, "original", None)) is not None:
        images = before
    return images


def shifted(examples: Examples, split: ClientSplit, shift: Shift, seed: int) -> Examples:
    """The examples as a shift leaves them; its notes say who is shifted how.

    Shifted images have another fingerprint, so their features are stored apart; permuted labels
    only another identity.

    Raises:
        InputError: images are to be shifted and there are none, or labels permuted and there is
            one class.
    """
    if shift.kinds and shift.fraction:
        examples = shift_images(examples, split, shift, seed)
    if shift.concept_fraction:
        examples = shift_concepts(examples, split, shift, seed)
    return examples


def shift_images(examples: Examples, split: ClientSplit, shift: Shift, seed: int) -> Examples:
    """The images of some clients shifted; several kinds are dealt evenly over them."""
    if examples.images is None:
        raise InputError(
            "shifts are made to images, and these data are features already",
            where="shift.kinds",
            got=repr(list(shift.kinds)),
            allowed="[]",
        )
    chosen = choose(split.names, shift.fraction, seed, "shift")
    draws = [
        draw_for(split.names[client], shift.kinds[i % len(shift.kinds)], shift.severity, seed)
        for i, client in enumerate(chosen.tolist())
    ]
    client = np.full(len(examples), -1, dtype=np.int32)
    for place, one in enumerate(chosen.tolist()):
        client[rows_of(split, one)] = place
    return replace(
        examples,
        images=ShiftedImages(examples.images, client, draws),
        fingerprint=content_hash("shift", examples.fingerprint, client, list(map(repr, draws))),
        notes=(*examples.notes, *told(split.names, chosen, draws)),
    )


def draw_for(name: str, kind: str, severity: int, seed: int) -> Draw:
    """What the client of this name does; the same whoever else there is."""
    key = int(seeding.named_keys(seed, f"shift-{kind}", [name])[0])
    stream = seeding.generator(key, "draw")
    red, green, blue = stream.dirichlet((1.0, 1.0, 1.0)).tolist()
    strength, direction = stream.uniform(0.75, 1.25), stream.uniform(-1.0, 1.0)
    return Draw(kind, severity, key, strength, direction, (red, green, blue))


def shift_concepts(examples: Examples, split: ClientSplit, shift: Shift, seed: int) -> Examples:
    """The labels of some clients permuted, in training and test, so that no class stays itself.

    Each client draws one cycle through all classes (Sattolo's), so one of (C - 1)! permutations.
    """
    num_classes = len(examples.classes)
    if num_classes < 2:
        raise InputError("one class cannot be permuted", where="shift.concept_fraction")
    chosen = choose(split.names, shift.concept_fraction, seed, "concept")
    labels = examples.labels.copy()
    for client in chosen.tolist():
        key = int(seeding.named_keys(seed, "concept-cycle", [split.names[client]])[0])
        cycle = seeding.generator(key, "draw").permutation(num_classes)
        other = np.empty(num_classes, dtype=np.int32)
        other[cycle] = np.roll(cycle, 1)
        rows = rows_of(split, client)
        labels[rows] = other[labels[rows]]
    what = "has its labels" if len(chosen) == 1 else "have their labels"
    note = f"concept shift: {some(split.names, chosen)} {what} permuted, in training and test"
    dealt = content_hash("concept", examples.dealt, labels)
    return replace(examples, labels=labels, dealt=dealt, notes=(*examples.notes, note))


def choose(names: Sequence[str], fraction: float, seed: int, purpose: str) -> Int64:
    """Some of the clients, by their names: one at least if ``fraction`` > 0; in a random order."""
    count = max(math.ceil(fraction), round(fraction * len(names)))
    return np.argsort(seeding.named_keys(seed, purpose, names), kind="stable")[:count]


def rows_of(split: ClientSplit, client: int) -> Int64:
    """A client's training and test rows."""
    return np.concatenate([split.train.of(client), split.test.of(client)])


def told(names: Sequence[str], chosen: Int64, draws: Sequence[Draw]) -> list[str]:
    """A note for each kind: how many clients, and the first of them."""
    kinds = np.array([draw.kind for draw in draws])
    return [
        f"shift {kind} at severity {draws[0].severity}: {some(names, chosen[kinds == kind])}"
        for kind in KINDS
        if kind in kinds
    ]


def some(names: Sequence[str], chosen: Int64) -> str:
    """How many clients, and the names of the first."""
    first = ", ".join(names[client] for client in np.sort(chosen)[:SHOWN].tolist())
    more = f" and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
    return f"{len(chosen)} of {len(names)} clients ({first}{more})"
