"""Ranges of the decoder's inputs: mean and deviation of the ID features and feature maps.

Stage 1 computes their moments while the maps are on the device, shard by shard, and adds the shards
in order, so that the result does not depend on ranks or restarts. Reading all maps again would cost
stage 3 as much as an epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import Tensor

from ood_heatmap.errors import DamagedCacheError
from ood_heatmap.pipeline.run import Index, map_column, read_file

# count, sum and sum of squares of vectors, (3, N)
Moments: TypeAlias = NDArray[np.float64]
_Float32: TypeAlias = NDArray[np.float32]
Range: TypeAlias = tuple[_Float32, _Float32]

STATISTICS = "statistics.safetensors"
# standard deviations of the deepest feature map over its locations, also inputs of the decoder
_MAP_STD = f"{map_column(0)}.std"
_ROWS_PER_CHUNK = 4096
# number of rows sampled from an index without statistics
_SAMPLE = 20_000
_CHUNK_BYTES = 64 << 20


def spatial_statistics(maps: Tensor) -> Tensor:
    """Return mean and sum of squared deviations over the locations of each channel.

    Args:
        maps: ``(B, C, h, w)``.

    Returns:
        ``(B, 2, C)`` float32, on the same device. Deviations from the mean keep the precision that
        a sum of squares would lose, and are 0 for a constant channel.
    """
    values = maps.flatten(2).float()
    mean = values.mean(2)
    deviations = torch.linalg.vector_norm(values - mean[..., None], dim=2)
    return torch.stack([mean, deviations.square()], dim=1)


def shard_moments(
    features: _Float32, spatial: Sequence[_Float32], shapes: Sequence[tuple[int, ...]]
) -> dict[str, Moments]:
    """Return the moments of some rows by name: features, map deviations, and each map's locations.

    Args:
        features: ``(B, D)``.
        spatial: ``(B, 2, C)`` of each feature map, see ``spatial_statistics``.
        shapes: ``(C, h, w)`` of each feature map.
    """
    moments = {"features": _vector_moments(features)}
    for number, (statistics, (_, height, width)) in enumerate(zip(spatial, shapes, strict=True)):
        count = height * width
        mean, squares = statistics[:, 0], statistics[:, 1]
        if number == 0:
            moments[_MAP_STD] = _vector_moments(np.sqrt(squares / max(count - 1, 1)))
        moments[map_column(number)] = count * _vector_moments(mean)
        moments[map_column(number)][2] += squares.sum(axis=0, dtype=np.float64)
    return moments


def _vector_moments(vectors: _Float32) -> Moments:
    """Return the moments of vectors ``(M, N)``, summed in float64."""
    moments = np.zeros((3, vectors.shape[1]))
    for start in range(0, len(vectors), _ROWS_PER_CHUNK):
        chunk = vectors[start : start + _ROWS_PER_CHUNK]
        moments[0] += len(chunk)
        moments[1] += chunk.sum(axis=0, dtype=np.float64)
        moments[2] += np.square(chunk, dtype=np.float64).sum(axis=0)
    return moments


def input_ranges(index: Index, num_maps: int) -> tuple[Range, list[Range]]:
    """Return the ranges of the plain decoder's inputs and of the feature maps that it uses.

    Each range is the mean, and the mean plus one standard deviation, over all ID training images,
    or over a sample of them for an index made by an earlier version.

    Args:
        index: The index.
        num_maps: Number of feature maps, deepest first.

    Raises:
        DamagedCacheError: The statistics are damaged.
    """
    moments = _read_statistics(index) or _sample_moments(index, num_maps)
    inputs = [_to_range(moments["features"])]
    if num_maps:
        inputs.append(_to_range(moments[_MAP_STD]))
    low, high = (np.concatenate(ends) for ends in zip(*inputs, strict=True))
    maps = [_to_range(moments[map_column(number)]) for number in range(num_maps)]
    return (low, high), maps


def _to_range(moments: Moments) -> Range:
    """Return mean, and mean plus one standard deviation."""
    count, total, squares = moments
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return np.float32(mean), np.float32(mean + deviation)


def _read_statistics(index: Index) -> Mapping[str, Moments] | None:
    """Return the moments stored with an index; None if an earlier version made it."""
    if STATISTICS not in index.manifest.files:
        return None
    try:
        moments: dict[str, Moments] = load(read_file(index.run, index.manifest, STATISTICS))
    except SafetensorError as error:
        path = index.run / "index" / STATISTICS
        raise DamagedCacheError(f"{path} is not safetensors ({error}). Index again.") from error
    return moments


def _sample_moments(index: Index, num_maps: int) -> dict[str, Moments]:
    """Return the moments of all rows of an index, or of a seeded sample of them."""
    count = len(index.columns["features"])
    rows = np.arange(count)
    if count > _SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(count, _SAMPLE, replace=False))
    return sum_moments(_iter_moments(index, rows, num_maps))


def _iter_moments(
    index: Index, rows: NDArray[np.int64], num_maps: int
) -> Iterator[dict[str, Moments]]:
    """Yield the moments of rows of an index, chunk by chunk."""
    columns = [index.columns[map_column(number)] for number in range(num_maps)]
    bytes_per_row = 4 * max((int(np.prod(item.shape[1:])) for item in columns), default=1)
    step = min(_ROWS_PER_CHUNK, max(1, _CHUNK_BYTES // bytes_per_row))
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        yield moments_of_arrays(
            index.columns["features"].take(chunk), [column.take(chunk) for column in columns]
        )


def moments_of_arrays(
    features: _Float32, maps: Sequence[NDArray[np.float16]]
) -> dict[str, Moments]:
    """Return the moments of cached rows, as ``shard_moments``.

    Args:
        features: ``(B, D)``.
        maps: ``(B, C, h, w)`` each.
    """
    # a copy: PyTorch warns about read-only memory maps; NumPy takes ten times as long to float32
    tensors = [torch.from_numpy(np.array(values)) for values in maps]
    spatial = [spatial_statistics(item).numpy() for item in tensors]
    return shard_moments(features, spatial, [values.shape[1:] for values in maps])


def sum_moments(parts: Iterator[Mapping[str, Moments]]) -> dict[str, Moments]:
    """Sum moments by name, in the given order; there must be at least one."""
    total = {name: values.copy() for name, values in next(parts).items()}
    for part in parts:
        for name, values in part.items():
            total[name] += values
    return total
