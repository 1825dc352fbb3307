"""Domain-adversarial local training: hidden features from which domains cannot be told.

DANN, Ganin and Lempitsky 2015 (arXiv 1409.7495), equations 4 to 6: a linear classifier of domains
on the last hidden layer is trained like the head, and its loss's gradient goes back into the hidden
layers reversed, times a weight. Federated as in Peng et al. 2020 (1911.02054): a client knows the
number of its own domain and no more, and what domains look like meets in the averages.

The classifier's tensors are part of the head while it travels and is trained (``DOMAIN``), weight
decay, corrections and the proximal term with it, and no part of what is judged and kept.

Deviation: the weight is constant; the paper lets it grow over the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedtl.clients.losses import residuals
from fedtl.data.partitions import MIXED
from fedtl.errors import InputError
from fedtl.types import DOMAIN, Float32, Head, Int64, LocalTraining

if TYPE_CHECKING:
    import torch


def domain_numbers(domains: Sequence[str]) -> Int64:
    """Each client's domain by number, in the order of the names, int64 [K].

    Raises:
        InputError: fewer than two domains, or a client that has none or several.
    """
    names = sorted(set(domains))
    unknown = sum(domain in ("", MIXED) for domain in domains)
    if unknown or len(names) < 2:
        raise InputError(
            "domain-adversarial training needs clients of two domains or more, one each",
            where="adaptation.adversarial",
            got=f"{unknown} clients without one domain of their own"
            if unknown
            else f"one domain, {names[0]!r}"
            if names
            else "no client",
            do='Set adaptation.adversarial = 0, or use clients.partition = "domain" or '
            "clients.within_domains = true",
        )
    return np.searchsorted(names, domains).astype(np.int64)


def with_domains(head: Head, num_domains: int) -> dict[str, Float32]:
    """The head with a classifier of domains on its last hidden layer, all zeros at first."""
    width = head["weight"].shape[1]
    return {
        **head,
        DOMAIN + "weight": np.zeros((num_domains, width), np.float32),
        DOMAIN + "bias": np.zeros(num_domains, np.float32),
    }


@dataclass(frozen=True)
class Foe:
    """The classifier of domains against which hidden layers are trained.

    Attributes:
        domains: int64 [L], of each lane's client.
        absent: bool [G], domains that are padding.
        weight: lambda of the reversed gradient.
    """

    domains: torch.Tensor
    absent: torch.Tensor
    weight: float

    @staticmethod
    def of(layer: list[torch.Tensor], domains: Int64, training: LocalTraining, num: int) -> Foe:
        """Of a group of clients.

        Args:
            layer: the classifier, [L, G, H] and [L, 1, G], padded.
            domains: int64 [b], each client's number, b <= L.
            training: its ``adversarial`` is lambda.
            num: domains that are no padding.

        Raises:
            InputError: a domain that the classifier does not know.
        """
        import torch

        if len(domains) and domains.max() >= num:
            raise InputError("a classifier of too few domains", got=num)
        lanes, width = layer[0].shape[:2]
        padded = np.zeros(lanes, np.int64)
        padded[: len(domains)] = domains
        absent = torch.arange(width, device=layer[0].device) >= num
        return Foe(torch.from_numpy(padded).to(absent.device), absent, training.adversarial)

    def gradient(
        self, layer: list[torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The classifier's own gradient, and lambda times that in the hidden features [L, B, H]."""
        import torch

        matrix, bias = layer
        scores = torch.bmm(hidden, matrix.mT) + bias
        labels = self.domains[:, None].expand(weight.shape)
        delta, _ = residuals(scores.masked_fill(self.absent, -torch.inf), labels, weight)
        own = [torch.bmm(delta.mT, hidden), delta.sum(1, keepdim=True)]
        return own, self.weight * torch.bmm(delta, matrix)
