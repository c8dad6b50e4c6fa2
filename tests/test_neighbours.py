"""Nearest neighbours: the truth is a loop over all rows in float64, or scikit-learn's brute force.

What depends on the device runs on the CPU and, where there is one, on a GPU.
"""

import contextlib
import importlib
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_heatmap.cache import flat, neighbours
from ood_heatmap.cache.flat import FlatBank, unit_length
from ood_heatmap.cache.neighbours import Bank, _mark_first_occurrences, order_by_class
from ood_heatmap.cache.shards import Rows
from ood_heatmap.errors import DamagedCacheError

CPU = torch.device("cpu")


def bank_of(features, prediction, device=CPU) -> Bank:
    """Return a bank, after checking that it is on the device."""
    order = order_by_class(prediction, np.arange(len(features)))
    bank = Bank(features[order], prediction[order], order, device=device)
    assert bank.device.type == device.type
    return bank


def brute_force(query, query_class, bank, bank_class) -> np.ndarray:
    """Return the lowest row at the smallest float64 distance, query by query."""
    found = []
    for one, label in zip(query, query_class, strict=True):
        rows = np.flatnonzero(bank_class == label)
        rows = rows if len(rows) else np.arange(len(bank))
        distance = ((one.astype(np.float64) - bank[rows].astype(np.float64)) ** 2).sum(axis=1)
        found.append(rows[distance == distance.min()].min())
    return np.array(found)


def clusters(spread: float, *, num_rows: int = 3000, num_queries: int = 300, width: int = 64):
    """Return rows and queries in tight clusters, with duplicates, a lone and an empty class."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(7, width))
    centres *= 7 / np.linalg.norm(centres, axis=1, keepdims=True)
    bank_class = generator.integers(5, size=num_rows)
    bank_class[17] = 5  # a class with one member; class 6 has none
    bank = (centres[bank_class] + spread * generator.normal(size=(num_rows, width))).astype("f4")
    bank[100:140], bank_class[100:140] = bank[99], bank_class[99]
    query_class = generator.integers(7, size=num_queries)
    query = centres[query_class] + spread * generator.normal(size=(num_queries, width))
    query = query.astype("f4")
    query[0], query_class[0] = bank[120], bank_class[120]
    return query, query_class, bank, bank_class


# distances d^2/|z|^2 of about 1e-1, 1e-3, 1e-5 and 1e-7
@pytest.mark.parametrize("spread", [0.2, 2e-2, 2e-3, 2e-4])
def test_nearest_equals_brute_force_on_tight_clusters(spread, device):
    query, query_class, bank, bank_class = clusters(spread)
    found = bank_of(bank, bank_class, device).nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))
    assert found.row[0] == 99  # the lowest of 41 identical rows
    np.testing.assert_array_equal(found.same_class, query_class != 6)
    assert (found.row[query_class == 5] == 17).all()


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize(("dtype", "scale"), [("u1", 1e-3), ("i4", 1), ("i8", 1e3)])
def test_classes_of_every_size_answer_as_brute_force(size, dtype, scale, device):
    """Around the eight candidates, and around the blocks of FAISS."""
    generator = np.random.default_rng(size)
    bank = (scale * generator.gamma(1, 1, (size + 100, 24))).astype("f4")
    bank_class = np.repeat([3, 1], [size, 100]).astype(dtype)
    query = (scale * generator.gamma(1, 1, (60, 24))).astype("f4")
    query[:10] = bank[: min(size, 10)].repeat(10, axis=0)[:10]
    query_class = np.repeat([3, 1, 9], [40, 15, 5]).astype(dtype)
    found = bank_of(bank, bank_class, device).nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))
    distance = np.linalg.norm(query.astype("f8") - bank[found.row], axis=1)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-12)
    np.testing.assert_array_equal(found.same_class, query_class != 9)


def test_ties_and_duplicates_go_to_the_lowest_row(device):
    """A grid of small integers: every distance is exact, and most queries have several nearest."""
    generator = np.random.default_rng(0)
    bank = generator.integers(-2, 3, (3000, 3)).astype("f4")
    query = generator.integers(-2, 3, (200, 3)).astype("f4") + np.float32(0.5)
    bank_class, query_class = generator.integers(3, size=3000), generator.integers(4, size=200)
    found = bank_of(bank, bank_class, device).nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))


def test_a_tie_of_two_rows_is_settled_among_the_candidates(device):
    bank = np.eye(30, dtype="f4") * np.float32(10)
    bank[[3, 7]] /= 2
    found = bank_of(bank, np.zeros(30, int), device).nearest(
        np.zeros((2, 30), "f4"), np.zeros(2, int)
    )
    assert found.row.tolist() == [3, 3]
    assert (found.num_proven, found.num_scanned) == (0, 0)


def test_rows_far_from_the_query_on_all_sides_are_told_apart_in_float64(device):
    """Beside a class of rows near it, with a far smaller rounding error."""
    generator = np.random.default_rng(0)
    half = 1e3 * unit_length(generator.normal(size=(50, 8)).astype("f4"))
    bank = np.concatenate([half, -half, 1e-3 * half])
    query = (2e-5 * generator.normal(size=(200, 8))).astype("f4")
    query_class, bank_class = np.arange(200) % 2, np.repeat([1, 0], [100, 50])
    found = bank_of(bank, bank_class, device).nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))


def test_two_tight_clusters_in_one_class_need_and_get_a_float64_scan(device):
    generator = np.random.default_rng(0)
    centres = np.stack([np.full(32, 10.0), np.full(32, -10.0)])
    side = generator.integers(2, size=400)
    bank = (centres[side] + 1e-4 * generator.normal(size=(400, 32))).astype("f4")
    query = (centres[side[:50]] + 1e-4 * generator.normal(size=(50, 32))).astype("f4")
    one_class = np.zeros(400, int)
    found = bank_of(bank, one_class, device).nearest(query, one_class[:50])
    np.testing.assert_array_equal(found.row, brute_force(query, one_class[:50], bank, one_class))
    assert found.num_scanned > 0


@pytest.mark.parametrize("spread", [0.2, 2e-4])
@pytest.mark.parametrize("batch_size", [1, 7, 250, 4096])
def test_the_answer_does_not_depend_on_the_batch(spread, batch_size, device):
    # 4096: more than one class of them is beyond the 128,000 numbers where FAISS turns to BLAS
    query, query_class, bank, bank_class = clusters(spread, num_queries=max(500, batch_size + 9))
    searched = bank_of(bank, bank_class, device)
    whole = searched.nearest(query, query_class)
    starts = range(0, len(query), batch_size)
    parts = [
        searched.nearest(query[i : i + batch_size], query_class[i : i + batch_size]) for i in starts
    ]
    np.testing.assert_array_equal(whole.row, np.concatenate([part.row for part in parts]))
    np.testing.assert_array_equal(whole.distance, np.concatenate([part.distance for part in parts]))


def test_values_whose_squares_do_not_fit_into_float32_are_compared_in_float64():
    generator = np.random.default_rng(0)
    for num_rows in (1, 5, 40):
        # and a class of one row
        bank = (1e30 * generator.normal(size=(num_rows + 1, 6))).astype("f4")
        query = (1e30 * generator.normal(size=(20, 6))).astype("f4")
        bank_class, query_class = np.arange(num_rows + 1) == 2, np.arange(20) % 3 == 2
        with np.errstate(over="ignore", invalid="ignore"):
            found = bank_of(bank, 1 * bank_class).nearest(query, 1 * query_class)
        wanted = brute_force(query, query_class, bank, bank_class)
        np.testing.assert_array_equal(found.row, wanted)


def test_centred_rows_are_kept_up_to_a_limit_and_the_answer_is_the_same(monkeypatch):
    query, query_class, bank, bank_class = clusters(2e-3)
    whole = bank_of(bank, bank_class)
    wanted = whole.nearest(query, query_class).row
    assert sorted(whole.blocks.host_cache) == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(flat, "_max_cached_bytes", lambda: bank.nbytes // 3)
    monkeypatch.setattr(neighbours, "_CHUNK_BYTES", 50_000)
    scarce = bank_of(bank, bank_class)
    for _ in range(2):
        np.testing.assert_array_equal(scarce.nearest(query, query_class).row, wanted)
    assert sum(item.nbytes for item in scarce.blocks.host_cache.values()) <= bank.nbytes // 3


def test_only_the_classes_that_are_queried_are_opened():
    query, query_class, bank, bank_class = clusters(0.2)
    bank[bank_class == 3] = np.nan
    searched = bank_of(bank, bank_class)
    some = query_class == 2
    found = searched.nearest(query[some], query_class[some])
    wanted = brute_force(query[some], query_class[some], bank, bank_class)
    np.testing.assert_array_equal(found.row, wanted)
    assert searched.classes[searched.num_searched > 0].tolist() == [2]
    assert [*searched.blocks.host_cache] == [2]


def test_a_class_whose_opening_was_interrupted_is_opened_again(monkeypatch):
    query, query_class, bank, bank_class = clusters(0.2)
    searched = bank_of(bank, bank_class)
    mark, calls = neighbours._mark_first_occurrences, []

    def interrupt_the_third(features):
        calls.append(len(features))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return mark(features)

    monkeypatch.setattr(neighbours, "_mark_first_occurrences", interrupt_the_third)
    with pytest.raises(KeyboardInterrupt):
        searched.nearest(query, query_class)
    found = searched.nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))
    assert len(calls) == 7


def many_classes():
    """Return a query for each of 60 classes, of which every fifth has no row.

    The others have 1 to 30 rows: normal, on a grid where distances tie, identical, or of two tight
    clusters whose nearest row only float64 can tell.
    """
    generator = np.random.default_rng(0)
    bank, bank_class, query = [], [], []
    for label in range(60):
        size = 1 + label % 30
        rows = generator.normal(size=(size + 1, 8))
        if label % 4 == 1:
            rows = generator.integers(-1, 2, (size + 1, 8)).astype(float)
        if label % 4 == 2:
            rows[:] = rows[0]
        if label % 4 == 3:
            rows = 1e-5 * rows + 10 * generator.choice([-1, 1], (size + 1, 1))
        query.append(rows[-1])
        if label % 5:
            bank.append(rows[:-1])
            bank_class += [label] * size
    order, query_class = generator.permutation(len(bank_class)), generator.permutation(60)
    rows, queries = np.concatenate(bank)[order], np.array(query)[query_class]
    return queries.astype("f4"), query_class, rows.astype("f4"), np.array(bank_class)[order]


@pytest.mark.parametrize("chunk_bytes", [64 << 20, 32 * 8 * 7])
def test_one_query_in_each_of_many_classes_answers_as_brute_force(chunk_bytes, monkeypatch, device):
    """All at once, and seven at a time; among them ties, scans, and classes without a row."""
    query, query_class, bank, bank_class = many_classes()
    monkeypatch.setattr(neighbours, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(neighbours, "_CACHE_BYTES", chunk_bytes // 3)
    searched = bank_of(bank, bank_class, device)
    found = searched.nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))
    np.testing.assert_array_equal(found.same_class, query_class % 5 > 0)
    exact = ((query.astype("f8") - bank[found.row]) ** 2).sum(axis=1)
    np.testing.assert_allclose(found.distance**2, exact, rtol=1e-12)
    alone = [searched.nearest(query[[i]], query_class[[i]]) for i in range(60)]
    for name in ("num_proven", "num_scanned"):
        assert getattr(found, name) == sum(getattr(one, name) for one in alone) > 0
    of_all = searched.nearest_of_all(query, query_class)
    np.testing.assert_array_equal(of_all.row, brute_force(query, [-1] * 60, bank, bank_class))
    np.testing.assert_array_equal(of_all.same_class, found.same_class)


def test_the_memory_of_a_search_in_all_classes_does_not_grow_with_their_number(monkeypatch):
    generator = np.random.default_rng(0)
    bank, query = (generator.normal(size=(count, 8)).astype("f4") for count in (2000, 400))
    searched = bank_of(bank, np.arange(2000) % 200)
    wanted = brute_force(query, [-1] * 400, bank, np.zeros(2000))
    monkeypatch.setattr(neighbours, "_CHUNK_BYTES", 1 << 18)
    tracemalloc.start()
    try:
        found = searched.nearest_of_all(query, np.zeros(400, int))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found.row, wanted)
    # the candidates of all pairs of a query and a class would be 400 * 200 * 8 * 12 bytes, 7.7 MB
    assert peak < 3e6


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_rows=st.integers(1, 40), num_queries=st.integers(1, 10))
def test_ties_go_to_the_lowest_row(data, num_rows, num_queries):
    coordinates = st.lists(st.integers(-2, 2), min_size=2, max_size=2)

    def draw(count: int, what) -> np.ndarray:
        return np.array(data.draw(st.lists(what, min_size=count, max_size=count)))

    bank = draw(num_rows, coordinates).astype("f4")
    query = draw(num_queries, coordinates).astype("f4")
    bank_class, query_class = (
        draw(num_rows, st.integers(0, 2)),
        draw(num_queries, st.integers(0, 3)),
    )
    found = bank_of(bank, bank_class).nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))


def test_distance_is_euclidean_in_float64():
    bank, query = np.array([[3, 4], [30, 40]], np.float32), np.zeros((1, 2), np.float32)
    found = bank_of(bank, np.zeros(2, int)).nearest(query, np.zeros(1, int))
    assert found.distance.tolist() == [5.0]
    assert found.distance.dtype == np.float64


def test_a_hit_of_another_class_never_comes_through(monkeypatch):
    query, query_class, bank, bank_class = clusters(0.2)
    searched = bank_of(bank, bank_class)
    wrong = np.full((len(query), 8), 10**6)
    monkeypatch.setattr(faiss, "knn", lambda q, b, k: (np.zeros((len(q), k)), wrong[: len(q), :k]))
    with pytest.raises((AssertionError, IndexError)):
        searched.nearest(query, query_class)


def test_random_pairs_are_of_the_class_and_do_not_depend_on_the_batch():
    query, query_class, bank, bank_class = clusters(0.2)
    searched, rows = bank_of(bank, bank_class), np.arange(300)
    whole = searched.random(query, query_class, rows, seed=3)
    own = query_class != 6
    np.testing.assert_array_equal(bank_class[whole.row[own]], query_class[own])
    part = searched.random(query[40:50], query_class[40:50], rows[40:50], seed=3)
    np.testing.assert_array_equal(part.row, whole.row[40:50])
    assert (searched.random(query, query_class, rows, seed=4).row != whole.row).any()


def test_first_of_equals_keeps_the_first_also_where_hashes_collide(monkeypatch):
    features = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [1, 2]], np.float32)
    np.testing.assert_array_equal(
        _mark_first_occurrences(features), [True, True, False, True, False, False]
    )
    zeros = lambda *_, **__: np.zeros(2, np.uint64)  # noqa: E731  every hash is 0 then
    monkeypatch.setattr(np.random, "default_rng", lambda _: type("G", (), {"integers": zeros})())
    np.testing.assert_array_equal(
        _mark_first_occurrences(features), [True, True, False, True, False, False]
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value, device):
    features = np.zeros((5, 3), np.float32)
    features[3, 1] = value
    with pytest.raises(DamagedCacheError, match=r"NaN or infinite features \(class 2\)"):
        bank_of(features, np.array([0, 0, 2, 2, 2]), device).nearest(features[:1], np.array([2]))


class SimulatedGpu:
    """Stands in for CUDA and for FAISS on it: host memory, FAISS on the CPU, and failures.

    Args:
        room: Tensors that fit into its memory.
        opening: What taking the memory of FAISS raises, attempt by attempt.
        searching: What each search raises.
        copying: What each copy of queries to it and of results from it raises.
    """

    def __init__(self, room=100, opening=(), searching=(), copying=()) -> None:
        self.room, self.opening, self.searching = room, [*opening], [*searching]
        self.copying = [*copying]
        self.searches = self.freed = self.opened = self.copies = 0

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        self.room -= 1
        if self.room < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.copying and (error := self.copying.pop(0)):
            raise error
        self.copies += 1
        return tensor

    def knn(self, resources, queries, bank, k: int, *, device: int):
        assert (resources.ready, device) == (True, 3)
        assert queries.is_contiguous()
        if self.searching and (error := self.searching.pop(0)):
            raise error
        self.searches += 1
        found = faiss.knn(queries.numpy(), bank.numpy(), k)
        return tuple(torch.from_numpy(item) for item in found)

    def empty_cache(self) -> None:
        self.freed += 1

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Resources:
            """As FAISS's: what failed once says that it is initialized, and has no memory."""

            ready = failed = False

            def setPinnedMemory(self, size: int) -> None:
                assert size == 0

            def setTempMemory(self, size: int) -> None:
                assert size == 256 << 20

            def getDefaultStream(self, index: int) -> None:
                assert index == 3
                assert gpu.freed, "cuBLAS would abort without memory"
                if gpu.opening and (error := gpu.opening.pop(0)):
                    self.failed = True
                    raise error
                gpu.opened += 1
                self.ready = not self.failed

        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: self.take(tensor))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: self.copy(tensor))
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor, *_: self.copy(tensor))
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty_cache)
        monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
        monkeypatch.setattr(faiss, "knn_gpu", self.knn, raising=False)
        monkeypatch.setattr(importlib, "import_module", lambda _: None)


# the messages of FAISS and of the driver
NO_SCRATCH = RuntimeError(
    "Error: 'err == cudaSuccess' failed: StandardGpuResources: alloc fail type "
    "TemporaryMemoryBuffer dev 0 space Device stream 0x0 size 268435456 bytes "
    "(cudaMalloc error out of memory [2])"
)
NO_PINNED = RuntimeError(
    "failed to cudaHostAlloc 268435456 bytes for CPU <-> GPU async copy buffer"
)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
SAYS = "cuda:3 is out of memory for the search: falling back to the CPU"


@pytest.mark.parametrize(
    ("options", "opened", "searches", "says"),
    [
        ({}, 1, 6, ""),
        ({"room": 3}, 1, 0, SAYS),
        ({"opening": [NO_SCRATCH]}, 1, 6, ""),
        ({"opening": [NO_PINNED]}, 1, 6, ""),
        ({"opening": [NO_SCRATCH] * 2}, 0, 0, SAYS),
        ({"searching": [NO_SCRATCH]}, 1, 6, ""),
        ({"searching": [None, NO_SCRATCH]}, 1, 7, ""),
        ({"searching": [None, NO_SCRATCH, NO_SCRATCH]}, 1, 1, SAYS),
        ({"copying": [NO_PINNED]}, 1, 6, ""),
        ({"copying": [NO_PINNED] * 2}, 1, 0, SAYS),
        ({"copying": [None, None, NO_MEMORY]}, 1, 12, ""),
        ({"copying": [None, None, NO_MEMORY] * 2}, 1, 12, SAYS),
    ],
    ids=[
        "enough memory",
        "too little for the index",
        "too little for FAISS until PyTorch frees its cache",
        "too little pinned memory until PyTorch frees its cache",
        "too little for FAISS",
        "too little for the first search until PyTorch frees its cache",
        "too little for a search until PyTorch frees its cache",
        "too little for a search",
        "too little pinned memory for queries until PyTorch frees its cache",
        "too little pinned memory for queries",
        "too little for results until PyTorch frees its cache",
        "too little for results",
    ],
)
def test_a_gpu_with_and_without_memory_answers_as_brute_force(
    monkeypatch, caplog, options, opened, searches, says
):
    query, query_class, bank, bank_class = clusters(0.02)
    gpu = SimulatedGpu(**options)
    gpu.install(monkeypatch)
    order = order_by_class(bank_class, np.arange(len(bank)))
    searched = Bank(bank[order], bank_class[order], order, device=torch.device("cuda"))
    found = searched.nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))
    assert (gpu.opened, gpu.searches) == (opened, searches)
    assert caplog.messages == ([says] if says else [])
    assert searched.device == (torch.device("cpu") if says else torch.device("cuda:3"))


def test_a_gpu_gets_all_queries_and_returns_all_results_at_once(monkeypatch):
    query, query_class, bank, bank_class = many_classes()
    gpu = SimulatedGpu()
    gpu.install(monkeypatch)
    searched = bank_of(bank, bank_class, torch.device("cuda"))
    for function in (searched.nearest, partial(searched.k_nearest, k=3)):
        gpu.searches = gpu.copies = 0
        function(query, query_class)
        # the queries; distances and positions of 48 classes that have rows
        assert (gpu.searches, gpu.copies) == (48, 3)


@pytest.mark.parametrize(
    "message",
    ["an illegal instruction was encountered", "an illegal memory access was encountered"],
)
@pytest.mark.parametrize("where", ["opening", "searching"])
def test_any_other_error_of_a_gpu_is_not_hidden(monkeypatch, message, where):
    SimulatedGpu(**{where: [RuntimeError(message)]}).install(monkeypatch)
    query, query_class, bank, bank_class = clusters(0.02)
    with pytest.raises(RuntimeError, match=message):
        bank_of(bank, bank_class, torch.device("cuda")).nearest(query, query_class)


def test_a_gpu_searches_all_rows_and_leaves_what_it_cannot_to_the_cpu(monkeypatch):
    generator = np.random.default_rng(0)
    query, bank = (generator.normal(size=(count, 40)).astype("f4") for count in (30, 5000))
    monkeypatch.setattr(flat, "_MAX_BLOCK_BYTES", 4 * 40 * 1024)
    wanted = flat.k_nearest(query, bank, 50)
    gpu = SimulatedGpu()
    gpu.install(monkeypatch)
    searched = FlatBank(Rows([bank]), np.asarray, torch.device("cuda"))
    for found, expected in zip(searched.search(query, 50), wanted, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert gpu.searches == 5
    # FAISS on a GPU selects 2,048 at most
    assert searched.search(query, 2049)[0].shape == (30, 2049)
    assert gpu.searches == 5
    assert searched.blocks.device.type == "cuda"


IN_A_FULL_GPU = """
import logging, sys
import numpy as np
import torch
from test_neighbours import brute_force, clusters
from ood_heatmap.cache.neighbours import Bank, order_by_class

logging.basicConfig(stream=sys.stdout, format="%(message)s")
query, query_class, bank, bank_class = clusters(0.02)
order = order_by_class(bank_class, np.arange(len(bank)))
wanted = brute_force(query, query_class, bank, bank_class)

def search(device):
    searched = Bank(bank[order], bank_class[order], order, device=torch.device("cuda"))
    np.testing.assert_array_equal(searched.nearest(query, query_class).row, wanted)
    assert searched.device.type == device, searched.device

# loads the libraries' own code, which takes memory too
search("cuda")
torch.cuda.empty_cache()
held = torch.empty(torch.cuda.mem_get_info()[0] - (200 << 20), dtype=torch.uint8, device="cuda")
print("held")
search("cpu")
del held
print("cached")
search("cuda")
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_full_gpu_leaves_the_search_to_the_cpu_and_a_cache_does_not():
    """200 MiB are left, less than FAISS takes: held by a tensor, then only by PyTorch's cache.

    In a process of its own, as cuBLAS without memory would abort it.
    """
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FULL_GPU],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    lines = done.stdout.splitlines()
    says = "cuda:0 is out of memory for the search: falling back to the CPU"
    assert (done.returncode, lines) == (0, ["held", says, "cached"]), done.stderr


def test_k_nearest_of_the_class_match_brute_force(device):
    """With duplicates, a class of fewer rows than k, and one without rows."""
    rng = np.random.default_rng(0)
    bank, query = (rng.normal(100, 1, (count, 12)).astype(np.float32) for count in (300, 40))
    bank[20:30], bank[250:260] = bank[10:20], bank[100:110]
    bank_class = np.repeat([0, 1, 3], [120, 177, 3])
    query_class = rng.integers(0, 4, 40)
    row, distance = bank_of(bank, bank_class, device).k_nearest(query, query_class, 5)
    for i, label in enumerate(query_class):
        rows = np.flatnonzero(bank_class == label) if label != 2 else np.arange(300)
        rows = np.sort([row for row in rows if not 20 <= row < 30])
        exact = np.sqrt(((query[i].astype(np.float64) - bank[rows]) ** 2).sum(axis=1))
        wanted = np.argsort(exact, kind="stable")[:5]
        count = len(wanted)
        assert count == min(5, len(rows))
        assert row[i, :count].tolist() == rows[wanted].tolist()
        np.testing.assert_allclose(distance[i, :count], exact[wanted], rtol=1e-12)
        assert (row[i, count:] == -1).all()
        assert np.isinf(distance[i, count:]).all()
