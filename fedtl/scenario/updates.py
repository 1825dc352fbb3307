"""What may become of updates before the server has them: packed to save bytes, or falsified."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtl.scenario.sections import CountOrNone, Fraction, OpenFraction, Positive, Section


class Compression(Section):
    """How updates are packed before they leave a client."""

    kind: Literal["none", "top_k", "int8", "sign"] = "none"
    fraction: Fraction = Field(0.01, description="top_k: of the head's entries that are sent")
    error_feedback: bool = Field(
        True, description="what was not sent is added to the client's next update"
    )


class Attack(Section):
    """Clients that lie, to see what a strategy withstands. Simulation only."""

    kind: Literal[
        "none", "label_flip", "sign_flip", "gaussian", "inner_product", "alie", "min_max",
        "backdoor",
    ] = "none"  # fmt: skip
    fraction: OpenFraction = Field(0.2, description="of the clients that lie (seeded)")
    clients: list[str] = Field(
        default_factory=list, description="names of those that lie, instead of a fraction"
    )
    scale: Positive | None = Field(
        None,
        description="sign_flip, inner_product: length, default 1; gaussian: deviation, default 0.1",
    )
    mean: float = Field(0.1, description="gaussian: mean")
    target: CountOrNone = Field(0, description="backdoor: class that triggered examples shall get")
    trigger: Positive = Field(
        3.0, description="backdoor: length of the trigger, in standard deviations of the features"
    )
    poisoned: Fraction = Field(
        0.5, description="backdoor: share of the liars' examples that carry the trigger"
    )
