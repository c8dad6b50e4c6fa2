"""A fixed linear projection of feature maps to fewer channels, fitted on ID images."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import conv2d

from ood_heatmap.devices import at_most_threads
from ood_heatmap.errors import DamagedCacheError


@dataclass(frozen=True)
class Projection:
    """Principal components of the channel vectors of a feature map.

    Args:
        weight: ``(K, C)`` float32, orthonormal rows, the largest variance first.
        mean: ``(C,)`` float32, subtracted before.
    """

    weight: Tensor
    mean: Tensor

    def __call__(self, maps: Tensor) -> Tensor:
        """Project ``(B, C, h, w)`` float32 to ``(B, K, h, w)``."""
        return conv2d(maps, self.weight[:, :, None, None], -(self.weight @ self.mean))


def fit_projection(batches: Iterable[Tensor], num_channels: int) -> Projection:
    """Fit a projection to the channel vectors at all places.

    Args:
        batches: ``(B, C, h, w)`` float32 each, on the CPU.
        num_channels: Number of components, less than C.
    """
    # results must not depend on how many threads add up their parts
    with at_most_threads(1):
        count, total, products = 0, torch.zeros(()), torch.zeros(())
        for maps in batches:
            vectors = maps.flatten(2).transpose(1, 2).flatten(0, 1)
            count += len(vectors)
            total = total + vectors.double().sum(dim=0)
            products = products + (vectors.T @ vectors).double()
        mean = total / count
        _, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        # in ascending order of the variance
        weight = vectors[:, -num_channels:].flip(1).T
        # a principal component has no sign: that of its largest entry
        largest = weight.gather(1, weight.abs().argmax(dim=1, keepdim=True))
        return Projection((weight * largest.sign()).float().contiguous(), mean.float())


def to_tensors(projections: Mapping[str, Projection]) -> dict[str, Tensor]:
    """Return the tensors of a file of projections, by name of the feature map."""
    return {
        f"{name}.{field}": getattr(item, field)
        for name, item in projections.items()
        for field in ("weight", "mean")
    }


def load_projections(content: bytes, path: Path) -> dict[str, Projection]:
    """Read a file of projections.

    Args:
        content: Its bytes.
        path: Its path, for messages.

    Raises:
        DamagedCacheError: It is not a file of projections.
    """
    try:
        tensors = load(content)
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return {
            name: Projection(tensors[f"{name}.weight"], tensors[f"{name}.mean"]) for name in names
        }
    except (SafetensorError, KeyError) as error:
        raise DamagedCacheError(f"{path} has no projections ({error}). Index again.") from error
