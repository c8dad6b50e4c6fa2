"""The FAISS index: rows sorted by predicted class, and the exact nearest neighbour among them.

FAISS computes float32 distances by expanding the square, which loses the nearest row when a class
is a tight cluster far from the origin. Here the class mean is subtracted first, and every answer is
either proven by a bound on the rounding error or recomputed in float64; ties go to the lowest row.
The answer therefore does not depend on batch size, threads or device.
"""

import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.files import replacing
from ood_heatmap.cache.shards import Rows
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError

# after torch (the other way round crashes where both bring a CUDA runtime), and only here
import faiss  # isort: skip

log = logging.getLogger(__name__)
Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
Int64: TypeAlias = NDArray[np.int64]
_NUM_CANDIDATES = 8
# of float32; FAISS never uses TF32 on its own
_UNIT_ROUNDOFF = 2.0**-24
_CHUNK_BYTES = 64 << 20
# of centred rows cached in memory beside the mapped index: a quarter of what the machine has
_CACHE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def check_faiss() -> None:
    """Refuse an environment with two FAISS packages: they overwrite each other without a word."""
    names = {item.metadata["Name"] for item in importlib.metadata.distributions()}
    found = sorted(name for name in names if name and name.lower().startswith("faiss-"))
    if len(found) > 1:
        raise OodHeatmapError(
            f"this environment has {' and '.join(found)}, which overwrite each other. "
            f"Run `pip uninstall -y {' '.join(found)}`, then `pip install {found[-1]}`."
        )


def describe_backend(device: torch.device) -> str:
    """Return what searches, for the output: FAISS's version and the device."""
    name = "CPU"
    if device.type == "cuda":
        if not hasattr(faiss, "StandardGpuResources"):
            return f"faiss {faiss.__version__} on the CPU (this build has no GPU part)"
        name = torch.cuda.get_device_name(device)
    return f"faiss {faiss.__version__} on {name}"


@dataclass(frozen=True)
class Nearest:
    """The answer for B queries.

    Args:
        row: ``(B,)`` int64, the data set row of the nearest ID image.
        distance: ``(B,)`` float64, Euclidean.
        same_class: ``(B,)`` bool, False where the query's class has no row and all were searched.
        num_proven: Queries whose float32 answer was proven without another look.
        num_scanned: Queries that needed a float64 scan of their whole class.
    """

    row: Int64
    distance: Float64
    same_class: NDArray[np.bool_]
    num_proven: int = 0
    num_scanned: int = 0

    def subset(self, queries: slice) -> "Nearest":
        """Return the answer for some of the queries; the counts stay those of all."""
        return replace(
            self,
            row=self.row[queries],
            distance=self.distance[queries],
            same_class=self.same_class[queries],
        )


def squared_distances(queries: NDArray[Any], rows: NDArray[Any]) -> Float64:
    """Return float64 squared distances between the last axes, by plain differences.

    The oracle's arithmetic.
    """
    difference = queries.astype(np.float64) - rows
    squared: Float64 = np.einsum("...d,...d->...", difference, difference)
    return squared


def order_by_class(prediction: NDArray[np.integer[Any]], row: Int64) -> Int64:
    """Return the order of rows by (predicted class, row)."""
    return np.lexsort((row, prediction))


def mark_first_of_duplicates(features: Float32) -> NDArray[np.bool_]:
    """Mark each row that has no byte-identical row before it.

    Args:
        features: ``(N, D)`` float32 without negative zeros.
    """
    words = np.ascontiguousarray(features).view(np.uint32)
    multipliers = np.random.default_rng(0).integers(1, 2**63, words.shape[1], dtype=np.uint64)
    hashes = np.empty(len(words), np.uint64)
    step = max(1, _CHUNK_BYTES // (8 * words.shape[1]))
    for start in range(0, len(words), step):  # the product wraps around: a hash, not a sum
        hashes[start : start + step] = words[start : start + step].astype(np.uint64) @ multipliers
    first = np.ones(len(words), dtype=bool)
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0])
    ends = np.r_[starts[1:], len(words)]
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        group = order[start:end]
        while len(group) > 1:  # more than one round only where two rows share a hash by chance
            equal = np.concatenate(
                [
                    (words[chunk] == words[group[0]]).all(axis=1)
                    for chunk in _chunks(group, 4 * words.shape[1])
                ]
            )
            first[group[equal][1:]] = False
            group = group[~equal]
    return first


class Bank:
    """All ID features by predicted class, to be searched.

    Args:
        features: ``(N, D)`` float32, sorted by (prediction, row).
        prediction: ``(N,)`` predicted class of each, ascending.
        row: ``(N,)`` data set row of each, ascending inside a class.
        device: Where to search; on a GPU the bank is copied there once.
    """

    def __init__(
        self,
        features: Float32,
        prediction: NDArray[np.integer[Any]],
        row: Int64,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.features, self.row = features, row
        self.device = device or torch.device("cpu")
        self.classes, starts = np.unique(prediction, return_index=True)
        self.slices = dict(
            zip(
                self.classes.tolist(),
                map(slice, starts.tolist(), [*starts[1:].tolist(), len(features)]),
                strict=True,
            )
        )
        # positions in each class that are searched: of identical rows only the lowest
        self.unique = {
            label: np.flatnonzero(mark_first_of_duplicates(features[part]))
            for label, part in self.slices.items()
        }
        self.means = {
            label: features[part].mean(axis=0, dtype=np.float64)
            for label, part in self.slices.items()
        }
        bad = [label for label, mean in self.means.items() if not np.isfinite(mean).all()]
        if bad:
            raise DamagedCacheError(
                f"the index holds NaN or infinite features (class {bad[0]}). "
                "Run `ood-heatmap index` again with --overwrite."
            )
        # centred rows by class, and the norm of the longest
        self.on_gpu: dict[int, torch.Tensor] = {}
        self.host_cache: dict[int, Float32] = {}
        self.longest: dict[int, float] = {}
        if self.device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
            # FAISS then takes tensors, on torch's own stream
            importlib.import_module("faiss.contrib.torch_utils")
            self.resources = faiss.StandardGpuResources()
            try:
                for label in self.slices:
                    centred = torch.from_numpy(self._centred(label))
                    self.on_gpu[label] = centred.to(self.device)
            except torch.OutOfMemoryError:
                self._leave_gpu()

    def __len__(self) -> int:
        return len(self.features)

    def _leave_gpu(self) -> None:
        """_Search on the CPU from now on; the answers are the same."""
        log.warning("%s is out of memory for the search: searching on the CPU", self.device)
        self.on_gpu = {}
        self.device = torch.device("cpu")
        torch.cuda.empty_cache()

    def _centred(self, label: int) -> Float32:
        """Return the searched rows of a class minus their mean, float32."""
        rows, unique = self.features[self.slices[label]], self.unique[label]
        centred = np.empty((len(unique), rows.shape[1]), np.float32)
        start = 0
        for chunk in _chunks(unique, 8 * rows.shape[1]):
            centred[start : start + len(chunk)] = rows[chunk] - self.means[label]
            start += len(chunk)
        squared = np.einsum("nd,nd->n", centred, centred)
        self.longest[label] = float(np.sqrt(squared.max()))
        return centred

    def _cached_centred(self, label: int) -> Float32:
        """Return ``_centred``, cached for the next search as long as there is memory for it.

        Computed for every shard, it costs more than the search where a shard has few queries.
        """
        if label not in self.host_cache:
            centred = self._centred(label)
            cached_bytes = sum(item.nbytes for item in self.host_cache.values())
            if cached_bytes + centred.nbytes > _CACHE_BYTES:
                return centred
            self.host_cache[label] = centred
        return self.host_cache[label]

    def nearest(self, queries: Float32, prediction: NDArray[np.integer[Any]]) -> Nearest:
        """Return the nearest row of the query's predicted class; of all if that class is empty.

        Args:
            queries: ``(B, D)`` float32, finite.
            prediction: ``(B,)`` predicted class of each query.
        """
        row = np.full(len(queries), -1, np.int64)
        squared = np.full(len(queries), np.inf)
        same_class = np.isin(prediction, self.classes)
        proven = scanned = 0
        asked = {
            label: mine
            for label in self.slices
            if len(mine := np.flatnonzero((prediction == label) | ~same_class))
        }
        # a GPU has all classes under way before the first answer is looked at
        searches = {label: self._search(label, queries[mine]) for label, mine in asked.items()}
        for label, mine in asked.items():
            found, distance, num_proven, num_scanned = self._nearest_in(
                label, queries[mine], searches.pop(label)
            )
            # only a query without a class of its own meets more than one class here
            closer = (distance < squared[mine]) | (
                (distance == squared[mine]) & (found < row[mine])
            )
            row[mine[closer]], squared[mine[closer]] = found[closer], distance[closer]
            proven, scanned = proven + num_proven, scanned + num_scanned
        assert (row >= 0).all(), "every query has an answer"
        return Nearest(row, np.sqrt(squared), same_class, proven, scanned)

    def nearest_of_all(self, queries: Float32, prediction: NDArray[np.integer[Any]]) -> Nearest:
        """Return the nearest row of all classes; ``same_class`` as for the other searches."""
        of_none = np.full(len(queries), self.classes.min() - 1)
        found = self.nearest(queries, of_none)
        return replace(found, same_class=np.isin(prediction, self.classes))

    def random(
        self, queries: Float32, prediction: NDArray[np.integer[Any]], rows: Int64, seed: int
    ) -> Nearest:
        """Return a random row of the query's predicted class; of all if that class is empty.

        The draw depends on the seed and the query's own row alone, not on the batch it comes in.
        """
        everything = slice(0, len(self))
        position = np.empty(len(queries), np.int64)
        for number, (label, row) in enumerate(zip(prediction.tolist(), rows.tolist(), strict=True)):
            part = self.slices.get(label, everything)
            position[number] = np.random.default_rng([seed, row]).integers(part.start, part.stop)
        squared = squared_distances(queries, self.features[position])
        return Nearest(self.row[position], np.sqrt(squared), np.isin(prediction, self.classes))

    def _nearest_in(
        self, label: int, queries: Float32, search: "_Search"
    ) -> tuple[Int64, Float64, int, int]:
        """Search one class.

        Returns:
            Row and squared distance of the nearest, ``(B,)`` each; queries proven; queries scanned.
        """
        unique, part = self.unique[label], self.slices[label]
        rounded, candidates = (_to_numpy(item) for item in (search.squared, search.positions))
        rounded, bound = rounded.astype(np.float64), search.bound
        # far enough ahead of the second: no rounding can have swapped them
        best = candidates[:, 0].copy()
        clear = np.ones(len(queries), dtype=bool)
        if candidates.shape[1] > 1:
            clear = rounded[:, 1] - rounded[:, 0] > 2 * bound
        scanned = 0
        for start in _chunks(np.flatnonzero(~clear), 16 * candidates.shape[1] * queries.shape[1]):
            near = candidates[start]
            exact = squared_distances(queries[start, None], self.features[part][unique[near]])
            exact[near < 0] = np.inf
            lowest = np.where(exact == exact.min(axis=1, keepdims=True), near, len(unique)).min(
                axis=1
            )
            best[start] = lowest
            # a row outside the candidates is at least (last candidate - bound) away
            proven = exact.min(axis=1) < rounded[start, -1] - bound[start]
            # where the squares do not fit into float32 there are no candidates
            open_still = start[(near < 0).any(axis=1) | (near.shape[1] < len(unique)) & ~proven]
            for one in open_still:
                best[one] = self._scan(label, queries[one])
            scanned += len(open_still)
        position = part.start + unique[best]
        assert ((position >= part.start) & (position < part.stop)).all(), "a hit of another class"
        exact = np.empty(len(queries))
        for chunk in _chunks(np.arange(len(queries)), 16 * queries.shape[1]):
            exact[chunk] = squared_distances(queries[chunk], self.features[position[chunk]])
        return self.row[position], exact, int(clear.sum()), scanned

    def _search(self, label: int, queries: Float32) -> "_Search":
        """Return the nearest rows of a class by float32 distances, and the bound on the rounding.

        The bound: a float32 sum of D products is off by at most ``D u |q| |b|`` (u: unit
        roundoff), in any order of summation; three such sums, their difference, and the rounding
        of the centred values make ``(D + 8) u (|q| + |b|)^2``.
        """
        centred_queries = (queries - self.means[label]).astype(np.float32)
        if self.on_gpu:
            squared, positions = self._search_on_gpu(label, centred_queries)
        else:
            squared, positions = self._search_on_host(label, centred_queries)
        norms = np.linalg.norm(centred_queries.astype(np.float64), axis=1) + self.longest[label]
        bound = 1.001 * (queries.shape[1] + 8) * _UNIT_ROUNDOFF * norms**2
        return _Search(squared, positions, bound)

    def _search_on_gpu(self, label: int, centred_queries: Float32) -> tuple[Any, Any]:
        """Return squared distances and positions as tensors that are still being computed."""
        bank = self.on_gpu[label]
        asked = torch.from_numpy(centred_queries).pin_memory()
        try:
            with torch.cuda.device(self.device):  # FAISS takes the current device and its stream
                asked = asked.to(self.device, non_blocking=True)
                found: tuple[Any, Any] = faiss.knn_gpu(
                    self.resources, asked, bank, min(_NUM_CANDIDATES, len(bank))
                )
                return found
        except RuntimeError as error:  # torch's and FAISS's own, which has no class for it
            if "memory" not in str(error) and "alloc" not in str(error):
                raise
            self._leave_gpu()
        return self._search_on_host(label, centred_queries)

    def _search_on_host(self, label: int, centred_queries: Float32) -> tuple[Any, Any]:
        """Return squared distances and positions as arrays."""
        bank = self._cached_centred(label)
        found: tuple[Any, Any] = faiss.knn(centred_queries, bank, min(_NUM_CANDIDATES, len(bank)))
        return found

    def _scan(self, label: int, query: Float32) -> int:
        """Return the position of the nearest searched row in float64; ties go to the lowest."""
        rows, unique = self.features[self.slices[label]], self.unique[label]
        distances = np.concatenate(
            [squared_distances(query, rows[chunk]) for chunk in _chunks(unique, 16 * rows.shape[1])]
        )
        return int(distances.argmin())


@dataclass(frozen=True)
class _Search:
    """What a float32 search of one class found for B queries: arrays, or tensors on a GPU.

    Args:
        squared: ``(B, K)`` float32 squared distances, ascending.
        positions: ``(B, K)`` int64 positions among the class's searched rows, -1 where none.
        bound: ``(B,)`` float64, how far a squared distance can be off.
    """

    squared: Any
    positions: Any
    bound: Float64


def _to_numpy(item: Any) -> NDArray[Any]:
    """Return an array, or a tensor once it is computed, as an array."""
    array: NDArray[Any] = item.cpu().numpy() if isinstance(item, torch.Tensor) else item
    return array


def _chunks(items: Int64, bytes_each: int) -> Sequence[Int64]:
    """Split items so that the work on each chunk stays small in memory."""
    step = max(1, _CHUNK_BYTES // bytes_each)
    return [items[start : start + step] for start in range(0, len(items), step)]


def k_nearest(queries: Float32, bank: Float32, k: int) -> tuple[Float32, Int64]:
    """Return each query's nearest rows of a bank, by FAISS's float32 distances.

    Args:
        queries: ``(B, D)``, centred or of unit length: FAISS loses digits far from the origin.
        bank: ``(N, D)``, likewise.
        k: How many; all N if there are fewer.

    Returns:
        Euclidean distance, ascending, and position in the bank, ``(B, k)`` each.
    """
    squared, positions = faiss.knn(queries, bank, min(k, len(bank)))
    return np.sqrt(np.maximum(squared, 0)), positions


def write_index(
    path: Path,
    features: Rows,
    order: Int64,
    *,
    record: Callable[[Path], None] | None = None,
) -> None:
    """Write the features in the given order as an ``IndexFlatL2``, atomically.

    Args:
        path: The file to write or replace.
        features: ``(N, D)`` float32.
        order: ``(N,)`` rows of ``features`` in the order of the index.
        record: As for ``cache.files.replacing``.
    """
    index = faiss.IndexFlatL2(features.shape[1])
    for chunk in _chunks(order, 4 * features.shape[1]):
        index.add(features.take(chunk))
    with replacing(path, record=record) as scratch:
        faiss.write_index(index, str(scratch))


def read_index(path: Path, num_rows: int, num_features: int) -> Float32:
    """Return the features of an index as a read-only map.

    Check its checksum first: FAISS trusts what it reads.

    Raises:
        DamagedCacheError: It is not an ``IndexFlatL2`` of this size.
    """
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise DamagedCacheError(f"{path} cannot be read by FAISS. Delete it.") from error
    if not isinstance(index, faiss.IndexFlatL2) or (index.ntotal, index.d) != (
        num_rows,
        num_features,
    ):
        raise DamagedCacheError(f"{path} is not a flat index with {num_rows} rows. Delete it.")
    features = faiss.rev_swig_ptr(index.get_xb(), num_rows * num_features)
    array: Float32 = features.reshape(num_rows, num_features).view(_MappedIndex)
    array.index = index  # type: ignore[attr-defined]  # the map lives as long as the index
    return array


class _MappedIndex(np.ndarray[Any, Any]):
    """An array that keeps the FAISS index alive in whose memory it lies."""
