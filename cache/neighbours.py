"""Exact nearest-neighbour search among ID features of the predicted class.

FAISS computes float32 distances by expanding the square, which can miss the nearest row when a
class is a tight cluster far from the origin. Here the class mean is subtracted first, and every
result is either proven by a bound on the rounding error or recomputed in float64; ties go to the
lowest row. Results therefore do not depend on batch size, threads or device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.flat import Blocks
from ood_heatmap.errors import DamagedCacheError

_Float32: TypeAlias = NDArray[np.float32]
_Float64: TypeAlias = NDArray[np.float64]
_Int64: TypeAlias = NDArray[np.int64]
_NUM_CANDIDATES = 8
# unit roundoff of float32; FAISS does not use TF32 unless asked to
_UNIT_ROUNDOFF = 2.0**-24
_CHUNK_BYTES = 64 << 20
# of a processor: arrays beyond it are computed at half the speed
_CACHE_BYTES = 4 << 20


@dataclass(frozen=True)
class Nearest:
    """Search result for B queries.

    Args:
        row: ``(B,)`` int64 data set row of the nearest ID image.
        distance: ``(B,)`` float64 Euclidean distance.
        same_class: ``(B,)`` bool, False where the query's class has no row and all were searched.
        num_proven: Queries whose float32 result was proven without recomputation.
        num_scanned: Queries that needed a float64 scan of their whole class.
    """

    row: _Int64
    distance: _Float64
    same_class: NDArray[np.bool_]
    num_proven: int = 0
    num_scanned: int = 0

    def subset(self, queries: slice) -> "Nearest":
        """Return the result of a range of queries; the counts remain those of all queries."""
        return replace(
            self,
            row=self.row[queries],
            distance=self.distance[queries],
            same_class=self.same_class[queries],
        )


def squared_distances(queries: NDArray[Any], rows: NDArray[Any]) -> _Float64:
    """Return float64 squared distances over the last axis.

    Differences are squared directly, not expanded: slower than FAISS, without its cancellation.
    """
    difference = queries.astype(np.float64) - rows
    squared: _Float64 = np.einsum("...d,...d->...", difference, difference)
    return squared


def order_by_class(prediction: NDArray[np.integer[Any]], row: _Int64) -> _Int64:
    """Return the permutation that sorts rows by (predicted class, row)."""
    return np.lexsort((row, prediction))


def _mark_first_occurrences(features: _Float32) -> NDArray[np.bool_]:
    """Mark each row that has no byte-identical predecessor.

    Args:
        features: ``(N, D)`` float32 without negative zeros.

    Returns:
        ``(N,)`` bool.
    """
    words = np.ascontiguousarray(features).view(np.uint32)
    multipliers = np.random.default_rng(0).integers(1, 2**63, words.shape[1], dtype=np.uint64)
    hashes = np.empty(len(words), np.uint64)
    step = max(1, _CHUNK_BYTES // (8 * words.shape[1]))
    for start in range(0, len(words), step):
        # uint64 overflow is intended: this is a multiplicative hash
        hashes[start : start + step] = words[start : start + step].astype(np.uint64) @ multipliers
    first = np.ones(len(words), dtype=bool)
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0])
    ends = np.r_[starts[1:], len(words)]
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        group = order[start:end]
        # more than one iteration only on a hash collision
        while len(group) > 1:
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
    """Search structure over all ID features, grouped by predicted class.

    Args:
        features: ``(N, D)`` float32, sorted by (prediction, row).
        prediction: ``(N,)`` predicted class of each row, ascending.
        row: ``(N,)`` data set row of each, ascending within a class.
        device: Device to search on. The bank is copied to a GPU once; on a CPU a class is opened
            at its first query.
    """

    def __init__(
        self,
        features: _Float32,
        prediction: NDArray[np.integer[Any]],
        row: _Int64,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.features, self.row = features, row
        # class number i has label classes[i] and the rows starts[i] to ends[i]
        self.classes: NDArray[np.integer[Any]]
        self.classes, self.starts = np.unique(prediction, return_index=True)
        self.ends = np.append(self.starts[1:], len(features))
        num_classes = len(self.classes)
        # positions searched in class i, from starts[i]: of identical rows only the lowest
        self.searched = np.empty(len(features), np.int64)
        # their number; 0 before the class is opened
        self.num_searched = np.zeros(num_classes, np.int64)
        self.means = np.empty((num_classes, features.shape[1]))
        # largest norm among the centred rows of each class
        self.longest = np.empty(num_classes)
        self.blocks = Blocks(range(num_classes), self._centred, device or torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.features)

    @property
    def device(self) -> torch.device:
        """Device that is searched on: the CPU if a GPU ran out of memory."""
        return self.blocks.device

    def _open_class(self, number: int) -> None:
        """Find the distinct rows and the mean of a class.

        Raises:
            DamagedCacheError: A feature is not finite.
        """
        start = self.starts[number]
        features = self.features[start : self.ends[number]]
        mean = features.mean(axis=0, dtype=np.float64)
        if not np.isfinite(mean).all():
            raise DamagedCacheError(
                f"the index contains NaN or infinite features (class {self.classes[number]}). "
                "Run `ood-heatmap index` again with --overwrite."
            )
        distinct = np.flatnonzero(_mark_first_occurrences(features))
        self.searched[start : start + len(distinct)] = start + distinct
        self.means[number] = mean
        # last: an interrupted class is opened again
        self.num_searched[number] = len(distinct)

    def _positions(self, number: int) -> _Int64:
        """Return the positions searched in a class, ascending."""
        start = self.starts[number]
        return self.searched[start : start + self.num_searched[number]]

    def _centred(self, number: int) -> _Float32:
        """Return the searched rows of a class minus their mean, float32."""
        if not self.num_searched[number]:
            self._open_class(number)
        positions, width = self._positions(number), self.features.shape[1]
        centred = np.empty((len(positions), width), np.float32)
        start = 0
        for chunk in _chunks(positions, 8 * width):
            centred[start : start + len(chunk)] = self.features[chunk] - self.means[number]
            start += len(chunk)
        squared = np.einsum("nd,nd->n", centred, centred)
        self.longest[number] = np.sqrt(squared.max())
        return centred

    def nearest(self, queries: _Float32, prediction: NDArray[np.integer[Any]]) -> Nearest:
        """Find the nearest row in the query's predicted class, or in all classes if it is empty.

        Args:
            queries: ``(B, D)`` float32, finite.
            prediction: ``(B,)`` predicted class of each query.
        """
        return self._nearest(queries, self._numbers(prediction))

    def nearest_of_all(self, queries: _Float32, prediction: NDArray[np.integer[Any]]) -> Nearest:
        """Find the nearest row over all classes; ``same_class`` as in ``nearest``."""
        found = self._nearest(queries, np.full(len(queries), -1))
        return replace(found, same_class=self._numbers(prediction) >= 0)

    def k_nearest(
        self, queries: _Float32, prediction: NDArray[np.integer[Any]], k: int
    ) -> tuple[_Int64, _Float64]:
        """Find the k nearest distinct rows in the predicted class, or in all if it is empty.

        Args:
            queries: ``(B, D)`` float32, finite.
            prediction: ``(B,)`` predicted class of each query.
            k: Number of neighbours; of candidates of equal float32 distance, any may be found.

        Returns:
            Data set row and Euclidean distance, ascending, ``(B, k)`` each; -1 and infinity where
            a class has fewer rows.
        """
        row = np.full((len(queries), k), -1, np.int64)
        squared = np.full((len(queries), k), np.inf)
        for found in self._search(queries, self._numbers(prediction), max(k, _NUM_CANDIDATES)):
            for pairs, exact in self._recompute(found, np.arange(len(found.query))):
                near = self.row[found.position[pairs]]
                _keep_nearest(row, squared, found.query[pairs], near, exact)
        return np.where(np.isinf(squared), -1, row), np.sqrt(squared)

    def random(
        self, queries: _Float32, prediction: NDArray[np.integer[Any]], rows: _Int64, seed: int
    ) -> Nearest:
        """Draw a random row of the query's predicted class, or of all classes if it is empty.

        The draw depends only on the seed and the query's own row, not on its batch.
        """
        number, position = self._numbers(prediction), np.empty(len(queries), np.int64)
        start = np.where(number < 0, 0, self.starts[number])
        end = np.where(number < 0, len(self), self.ends[number])
        for i, row in enumerate(rows.tolist()):
            position[i] = np.random.default_rng([seed, row]).integers(start[i], end[i])
        squared = squared_distances(queries, self.features[position])
        return Nearest(self.row[position], np.sqrt(squared), number >= 0)

    def _numbers(self, prediction: NDArray[np.integer[Any]]) -> _Int64:
        """Return the number of each predicted class, -1 where it has no row."""
        number = np.searchsorted(self.classes, prediction).clip(max=len(self.classes) - 1)
        return np.where(self.classes[number] == prediction, number, -1)

    def _nearest(self, queries: _Float32, number: _Int64) -> Nearest:
        """Find the nearest row in a class for each query, or in all where its number is -1."""
        row = np.full((len(queries), 1), -1, np.int64)
        squared = np.full((len(queries), 1), np.inf)
        proven = scanned = 0
        for found in self._search(queries, number, _NUM_CANDIDATES):
            position, num_proven, num_scanned = self._prove(found)
            exact = np.empty((len(position), 1))
            for some in _cached_slices(found.features):
                near = self.features[position[some]]
                exact[some, 0] = squared_distances(found.features[some], near)
            _keep_nearest(row, squared, found.query, self.row[position, None], exact)
            proven, scanned = proven + num_proven, scanned + num_scanned
        assert (row >= 0).all(), "every query has a result"
        return Nearest(row[:, 0], np.sqrt(squared[:, 0]), number >= 0, proven, scanned)

    def _search(self, queries: _Float32, number: _Int64, k: int) -> "Iterator[_Search]":
        """Search each query in a class, or in all where its number is -1, chunk by chunk.

        A chunk has many classes: what is done once for it costs little for each of them.
        """
        # queries without a class (-1) come first, and are the first to be searched in every class
        order = np.argsort(number, kind="stable")
        counts = np.bincount(number + 1, minlength=len(self.classes) + 1)
        num_pairs = counts[1:] + counts[0]
        ends = num_pairs.cumsum()
        step = max(1, _CHUNK_BYTES // (32 * queries.shape[1]))
        for start in range(0, ends[-1], step):
            pair = np.arange(start, min(start + step, ends[-1]))
            searched = np.searchsorted(ends, pair, side="right")
            place = pair - (ends - num_pairs)[searched]
            query = order[np.where(place < counts[0], place, pair - counts[0] * searched)]
            yield self._search_pairs(queries[query], query, searched, k)

    def _search_pairs(self, features: _Float32, query: _Int64, number: _Int64, k: int) -> "_Search":
        """Search queries in classes in float32, and bound the rounding error of the distances.

        The error of a float32 sum of D products is at most ``D u |q| |b|`` (u: unit roundoff) for
        any order of summation; three such sums, their difference and the rounding of the centred
        values give ``(D + 8) u (|q| + |b|)^2``.
        """
        numbers, starts = np.unique(number, return_index=True)
        for closed in numbers[self.num_searched[numbers] == 0].tolist():
            self._open_class(closed)
        centred, norms = np.empty(features.shape, np.float32), np.empty(len(number))
        for some in _cached_slices(features):
            part, means = centred[some], self.means[number[some]]
            np.subtract(features[some], means, out=part, casting="same_kind")
            norms[some] = np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64))
        slices = map(slice, starts.tolist(), [*starts[1:].tolist(), len(number)])
        parts = list(zip(numbers.tolist(), slices, strict=True))
        squared, nearest = self.blocks.search(parts, centred, k)
        assert (nearest < self.num_searched[number, None]).all(), "another class"
        position = self.searched[self.starts[number, None] + nearest.clip(min=0)]
        norms += self.longest[number]
        bound = 1.001 * (features.shape[1] + 8) * _UNIT_ROUNDOFF * norms**2
        rounded = squared.astype(np.float64)
        return _Search(features, query, number, position, nearest >= 0, rounded, bound)

    def _prove(self, found: "_Search") -> tuple[_Int64, int, int]:
        """Turn float32 candidates into exact results.

        Returns:
            Position of the nearest row, ``(n,)``; number of pairs proven; number of pairs scanned.
        """
        num_rows, num_candidates = self.num_searched[found.number], found.position.shape[1]
        best = found.position[:, 0].copy()
        # the gap to the second candidate exceeds twice the rounding error: they cannot be swapped
        clear = found.squared[:, 1] - found.squared[:, 0] > 2 * found.bound
        scanned = 0
        for pairs, exact in self._recompute(found, np.flatnonzero(~clear)):
            lowest = exact.min(axis=1, keepdims=True)
            best[pairs] = np.where(exact == lowest, found.position[pairs], len(self)).min(axis=1)
            # a row that is not a candidate is at least (last candidate - bound) away
            proven = lowest[:, 0] < found.squared[pairs, -1] - found.bound[pairs]
            # FAISS finds fewer where the squares overflow float32
            missing = found.present[pairs].sum(axis=1) < num_rows[pairs].clip(max=num_candidates)
            unproven = pairs[missing | (num_candidates < num_rows[pairs]) & ~proven]
            for pair in unproven.tolist():
                best[pair] = self._scan(int(found.number[pair]), found.features[pair])
            scanned += len(unproven)
        return best, int(clear.sum()), scanned

    def _recompute(self, found: "_Search", pairs: _Int64) -> Iterator[tuple[_Int64, _Float64]]:
        """Yield chunks of the pairs and their candidates' squared distances in float64."""
        for chunk in _chunks(pairs, 16 * found.position.shape[1] * found.features.shape[1]):
            near = self.features[found.position[chunk]]
            exact = squared_distances(found.features[chunk, None], near)
            yield chunk, np.where(found.present[chunk], exact, np.inf)

    def _scan(self, number: int, query: _Float32) -> int:
        """Return the position of the nearest row of a class in float64; ties go to the lowest."""
        positions = self._positions(number)
        chunks = _chunks(positions, 16 * len(query))
        distances = [squared_distances(query, self.features[chunk]) for chunk in chunks]
        return int(positions[np.concatenate(distances).argmin()])


@dataclass(frozen=True)
class _Search:
    """Float32 candidates for n pairs of a query and a class to search.

    Args:
        features: ``(n, D)`` float32 features of the query.
        query: ``(n,)`` int64 number of the query.
        number: ``(n,)`` int64 number of the class, ascending.
        position: ``(n, K)`` int64 positions of the candidates in the bank.
        present: ``(n, K)`` bool, False where there is no candidate.
        squared: ``(n, K)`` float64 of the float32 squared distances, ascending; infinity beyond the
            class's number of rows.
        bound: ``(n,)`` float64 bound on the rounding error of a squared distance.
    """

    features: _Float32
    query: _Int64
    number: _Int64
    position: _Int64
    present: NDArray[np.bool_]
    squared: _Float64
    bound: _Float64


def _keep_nearest(
    row: _Int64, squared: _Float64, query: _Int64, near: _Int64, near_squared: _Float64
) -> None:
    """Merge rows ``(n, K)`` near n queries into the nearest ``(B, k)`` of all, in place.

    A query without a class has candidates of several classes. Ties go to the lowest row.
    """
    k, changed = row.shape[1], np.unique(query)
    owner = np.concatenate([changed.repeat(k), query.repeat(near.shape[1])])
    rows = np.concatenate([row[changed].ravel(), near.ravel()])
    distances = np.concatenate([squared[changed].ravel(), near_squared.ravel()])
    order = np.lexsort((rows, distances, owner))
    owner = owner[order]
    first = order[np.arange(len(order)) - np.searchsorted(owner, owner) < k]
    row[changed], squared[changed] = rows[first].reshape(-1, k), distances[first].reshape(-1, k)


def _chunks(items: _Int64, bytes_each: int) -> Sequence[_Int64]:
    """Split items into chunks of about ``_CHUNK_BYTES`` working memory."""
    step = max(1, _CHUNK_BYTES // bytes_each)
    return [items[start : start + step] for start in range(0, len(items), step)]


def _cached_slices(features: _Float32) -> Iterator[slice]:
    """Return slices of rows that stay in a processor's cache with their float64 copies."""
    step = max(1, _CACHE_BYTES // (32 * features.shape[1]))
    return (slice(start, start + step) for start in range(0, len(features), step))
