"""What each figure of the gap is called, and what it means, in words for the page."""

from __future__ import annotations

from collections.abc import Mapping

SUMMED, SAMPLED = "summed statistics", "sampled rows"

Kind = Mapping[str, str]


def _kind(title: str, range_: str, made_from: str, note: str) -> Kind:
    return {"title": title, "range": range_, "made_from": made_from, "note": note}


KINDS: Mapping[str, Kind] = {
    "js": _kind(
        "label distance (Jensen-Shannon)",
        "0 same mix of classes, 1 no class in common",
        SUMMED,
        "How differently the classes are mixed. Says nothing about how the examples look.",
    ),
    "hellinger": _kind(
        "label distance (Hellinger)",
        "0 to 1",
        SUMMED,
        "The same question; weighs rare classes more.",
    ),
    "emd": _kind(
        "label distance (earth mover's)",
        "0 to 1",
        SUMMED,
        "The share of examples whose class would have to change to make the mixes equal.",
    ),
    "conditional": _kind(
        "feature distance within classes",
        "0 same; 1 class centres as far apart as examples of one class lie from their centre",
        SUMMED,
        "How differently examples of one and the same class look; the mix of classes does not "
        "enter, and what chance adds is taken off. Undefined without a class in common.",
    ),
    "coral": _kind(
        "covariance distance (CORAL)",
        "0 and up, in units of the features to the fourth",
        SUMMED,
        "How differently features vary together. A different mix of classes counts too, and "
        "clients with few examples look further away than they are.",
    ),
    "frechet": _kind(
        "Frechet distance",
        "0 and up, in squared units of the features",
        SUMMED,
        "How far means and covariances lie apart, covariances shrunk (OAS). A different mix of "
        "classes counts too, and clients with few examples look further away than they are.",
    ),
    "a_distance": _kind(
        "proxy A-distance",
        "0 cannot be told apart, 2 always told apart",
        SAMPLED,
        "How well a linear classifier tells whose example it is, on examples it has not seen; "
        "worse than guessing counts as 0. A different mix of classes counts too.",
    ),
    "mmd2": _kind(
        "MMD squared",
        "around 0 for the same distribution, which may be below 0, up to 2",
        SAMPLED,
        "Unbiased, under a Gaussian kernel as wide as the median distance. A different mix of "
        "classes counts too.",
    ),
    "mmd_p": _kind(
        "p-value of MMD",
        "0.005 to 1; small says that chance alone would hardly do it",
        SAMPLED,
        "From 199 permutations, not corrected for the number of comparisons.",
    ),
}
"""Every distance, between two clients and from one to all others together."""

SCORES: Mapping[str, Kind] = {
    "h_score": _kind(
        "H-score",
        "0 to the number of classes less one; higher is better",
        SUMMED,
        "How far class centres lie apart against the spread of the features.",
    ),
    "logme": _kind(
        "LogME",
        "higher is better; compare backbones on one data set",
        SUMMED,
        "How well a linear model explains the labels, fitted with the best priors.",
    ),
    "nce": _kind(
        "NCE",
        "at most 0; higher is better",
        SAMPLED,
        "How well the class that the backbone was trained for and sees here tells the label.",
    ),
    "leep": _kind(
        "LEEP",
        "at most 0; higher is better",
        SAMPLED,
        "The same with the backbone's probabilities of its own classes.",
    ),
}
"""How well the backbone's features suit each client's task, and everybody's."""

HOME = "Needs rows side by side, and those of real clients stay where they are."
