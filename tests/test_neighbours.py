"""Nearest neighbours: the truth is a loop over all rows in float64."""

import contextlib
import importlib.metadata
import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_heatmap.cache import neighbours
from ood_heatmap.cache.neighbours import Bank, _mark_first_occurrences, order_by_class
from ood_heatmap.cache.shards import Rows
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError


def bank_of(features, prediction) -> Bank:
    order = order_by_class(prediction, np.arange(len(features)))
    return Bank(features[order], prediction[order], order)


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
def test_nearest_equals_brute_force_on_tight_clusters(spread):
    query, query_class, bank, bank_class = clusters(spread)
    found = bank_of(bank, bank_class).nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))
    assert found.row[0] == 99  # the lowest of 41 identical rows
    np.testing.assert_array_equal(found.same_class, query_class != 6)
    assert (found.row[query_class == 5] == 17).all()


def test_two_tight_clusters_in_one_class_need_and_get_a_float64_scan():
    generator = np.random.default_rng(0)
    centres = np.stack([np.full(32, 10.0), np.full(32, -10.0)])
    side = generator.integers(2, size=400)
    bank = (centres[side] + 1e-4 * generator.normal(size=(400, 32))).astype("f4")
    query = (centres[side[:50]] + 1e-4 * generator.normal(size=(50, 32))).astype("f4")
    one_class = np.zeros(400, int)
    found = bank_of(bank, one_class).nearest(query, one_class[:50])
    np.testing.assert_array_equal(found.row, brute_force(query, one_class[:50], bank, one_class))
    assert found.num_scanned > 0


@pytest.mark.parametrize("spread", [0.2, 2e-4])
@pytest.mark.parametrize("batch_size", [1, 7, 250, 4096])
def test_the_answer_does_not_depend_on_the_batch(spread, batch_size):
    # 4096: more than one class of them is beyond the 128,000 numbers where FAISS turns to BLAS
    query, query_class, bank, bank_class = clusters(spread, num_queries=max(500, batch_size + 9))
    searched = bank_of(bank, bank_class)
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
        bank = (1e30 * generator.normal(size=(num_rows, 6))).astype("f4")
        query = (1e30 * generator.normal(size=(20, 6))).astype("f4")
        one_class = np.zeros(num_rows, int)
        with np.errstate(over="ignore", invalid="ignore"):
            found = bank_of(bank, one_class).nearest(query, np.zeros(20, int))
        np.testing.assert_array_equal(
            found.row, brute_force(query, np.zeros(20, int), bank, one_class)
        )


def test_centred_rows_are_kept_up_to_a_limit_and_the_answer_is_the_same(monkeypatch):
    query, query_class, bank, bank_class = clusters(2e-3)
    whole = bank_of(bank, bank_class)
    wanted = whole.nearest(query, query_class).row
    assert sorted(whole.host_cache) == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(neighbours, "_CACHE_BYTES", bank.nbytes // 3)
    monkeypatch.setattr(neighbours, "_CHUNK_BYTES", 50_000)
    scarce = bank_of(bank, bank_class)
    for _ in range(2):
        np.testing.assert_array_equal(scarce.nearest(query, query_class).row, wanted)
    assert sum(item.nbytes for item in scarce.host_cache.values()) <= bank.nbytes // 3


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


def test_the_index_file_holds_the_rows_in_order_and_damage_is_refused(tmp_path):
    import faiss

    features = np.random.default_rng(0).normal(size=(10, 3)).astype("f4")
    order = np.random.default_rng(1).permutation(10)
    path = tmp_path / "index.faiss"
    neighbours.write_index(path, Rows([features[:4], features[4:]]), order)
    np.testing.assert_array_equal(neighbours.read_index(path, 10, 3), features[order])
    assert isinstance(faiss.read_index(str(path)), faiss.IndexFlatL2)
    with pytest.raises(DamagedCacheError, match="not a flat index with 11 rows"):
        neighbours.read_index(path, 11, 3)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DamagedCacheError, match="cannot be read by FAISS"):
        neighbours.read_index(path, 10, 3)


def test_the_k_nearest_rows_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    queries, bank = (rng.normal(size=(count, 6)).astype(np.float32) for count in (20, 30))
    distance, position = neighbours.k_nearest(queries, bank, 4)
    wanted = np.linalg.norm(queries[:, None] - bank.astype(np.float64), axis=2)
    np.testing.assert_array_equal(position, wanted.argsort(axis=1)[:, :4])
    np.testing.assert_allclose(distance, np.sort(wanted, axis=1)[:, :4], rtol=1e-5)
    assert neighbours.k_nearest(queries, bank[:3], 4)[0].shape == (20, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value):
    features = np.zeros((5, 3), np.float32)
    features[3, 1] = value
    with pytest.raises(DamagedCacheError, match=r"NaN or infinite features \(class 2\)"):
        Bank(features, np.array([0, 0, 2, 2, 2]), np.arange(5))


def test_two_faiss_packages_are_refused_with_the_way_out(monkeypatch):
    class Distribution:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    both = [Distribution("faiss-cpu"), Distribution("numpy"), Distribution("faiss-gpu")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: both)
    with pytest.raises(OodHeatmapError, match="pip uninstall -y faiss-cpu faiss-gpu"):
        neighbours.check_faiss()


def test_torch_is_imported_before_faiss():
    code = (
        "import sys, ood_heatmap.cache.neighbours; names = list(sys.modules);"
        "assert names.index('torch') < names.index('faiss')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class SimulatedGpu:
    """Stands in for CUDA and for FAISS on it: host memory, FAISS on the CPU, and failures.

    Args:
        room: Classes that fit into its memory.
        error: What a search raises, if anything.
    """

    def __init__(self, room: int = 100, error: Exception | None = None) -> None:
        self.room, self.error, self.searches = room, error, 0

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        self.room -= 1
        if self.room < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor

    def knn(self, _: object, queries: torch.Tensor, bank: torch.Tensor, k: int):
        self.searches += 1
        if self.error is not None:
            raise self.error
        found = faiss.knn(queries.numpy(), bank.numpy(), k)
        return tuple(torch.from_numpy(item) for item in found)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: self.take(tensor))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
        monkeypatch.setattr(faiss, "knn_gpu", self.knn, raising=False)
        monkeypatch.setattr(importlib, "import_module", lambda _: None)


OUT_OF_MEMORY = RuntimeError("Error: 'err == cudaSuccess' failed: out of memory")


@pytest.mark.parametrize(
    ("gpu", "searches", "says"),
    [
        (SimulatedGpu(), 6, ""),
        (SimulatedGpu(room=3), 0, "out of memory for the search: falling back to the CPU"),
        (SimulatedGpu(error=OUT_OF_MEMORY), 1, "falling back to the CPU"),
    ],
    ids=["enough memory", "too little for the index", "too little for a search"],
)
def test_a_gpu_with_and_without_memory_answers_as_brute_force(
    monkeypatch, caplog, gpu, searches, says
):
    query, query_class, bank, bank_class = clusters(0.02)
    gpu.install(monkeypatch)
    order = order_by_class(bank_class, np.arange(len(bank)))
    searched = Bank(bank[order], bank_class[order], order, device=torch.device("cuda"))
    found = searched.nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))
    assert gpu.searches == searches
    assert says in caplog.text


def test_any_other_error_of_a_gpu_is_not_hidden(monkeypatch):
    SimulatedGpu(error=RuntimeError("an illegal instruction was encountered")).install(monkeypatch)
    query, query_class, bank, bank_class = clusters(0.02)
    order = order_by_class(bank_class, np.arange(len(bank)))
    searched = Bank(bank[order], bank_class[order], order, device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="illegal instruction"):
        searched.nearest(query, query_class)


def test_the_backend_says_where_faiss_searches(monkeypatch):
    version, cuda = faiss.__version__, torch.device("cuda:0")
    assert neighbours.describe_backend(torch.device("cpu")) == f"faiss {version} on CPU"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    assert neighbours.describe_backend(cuda) == f"faiss {version} on A GPU"
    monkeypatch.delattr(faiss, "StandardGpuResources")
    assert "this build has no GPU support" in neighbours.describe_backend(cuda)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("spread", [0.2, 2e-4])
def test_the_gpu_answers_as_brute_force_does(spread):
    query, query_class, bank, bank_class = clusters(spread)
    order = order_by_class(bank_class, np.arange(len(bank)))
    searched = Bank(bank[order], bank_class[order], order, device=torch.device("cuda"))
    found = searched.nearest(query, query_class)
    np.testing.assert_array_equal(found.row, brute_force(query, query_class, bank, bank_class))
