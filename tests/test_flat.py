"""FAISS and its index file: the truth is scikit-learn's brute force, or FAISS in all rows at once.

What depends on the device runs on the CPU and, where there is one, on a GPU.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from ood_heatmap.cache import flat
from ood_heatmap.cache.flat import FlatBank, unit_length
from ood_heatmap.cache.shards import Rows
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError

CPU = torch.device("cpu")
MEMORY = Path("/proc/meminfo")


def test_the_index_file_holds_the_rows_in_order_and_damage_is_refused(tmp_path):
    features = np.random.default_rng(0).normal(size=(10, 3)).astype("f4")
    order = np.random.default_rng(1).permutation(10)
    path = tmp_path / "index.faiss"
    flat.write_index(path, Rows([features[:4], features[4:]]), order)
    np.testing.assert_array_equal(flat.read_index(path, 10, 3), features[order])
    index = faiss.IndexFlatL2(3)
    index.add(features[order])
    faiss.write_index(index, str(tmp_path / "added.faiss"))
    assert path.read_bytes() == (tmp_path / "added.faiss").read_bytes()
    with pytest.raises(DamagedCacheError, match="not a flat index with 11 rows"):
        flat.read_index(path, 11, 3)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DamagedCacheError, match="cannot be read by FAISS"):
        flat.read_index(path, 10, 3)


def test_the_k_nearest_rows_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    queries, bank = (rng.normal(size=(count, 6)).astype(np.float32) for count in (20, 30))
    distance, position = flat.k_nearest(queries, bank, 4)
    wanted = np.linalg.norm(queries[:, None] - bank.astype(np.float64), axis=2)
    np.testing.assert_array_equal(position, wanted.argsort(axis=1)[:, :4])
    np.testing.assert_allclose(distance, np.sort(wanted, axis=1)[:, :4], rtol=1e-5)
    assert flat.k_nearest(queries, bank[:3], 4)[0].shape == (20, 3)


def unit_rows(num_rows: int, num_queries: int, width: int):
    """Return rows and queries of unit length, with duplicates at both ends of the rows."""
    generator = np.random.default_rng(num_rows)
    bank = unit_length(generator.gamma(1, 1, (num_rows, width)).astype("f4"))
    bank[-20:] = bank[:20]
    query = unit_length(generator.gamma(1, 1, (num_queries, width)).astype("f4"))
    query[:5] = bank[: len(query[:5])]
    return query, bank


@pytest.mark.parametrize(("num_rows", "k"), [(30, 1), (30, 50), (5000, 50), (70_000, 7)])
def test_the_k_nearest_of_all_rows_are_those_of_scikit_learn(num_rows, k, device):
    """70,000 rows are several blocks."""
    query, bank = unit_rows(num_rows, 200, 16)
    k = min(k, num_rows)
    searched = FlatBank(Rows([bank[:7], bank[7:]]), np.asarray, device)
    assert searched.blocks.device.type == device.type
    distance, position = searched.search(query, k)
    truth = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.astype("f8"))
    wanted, _ = truth.kneighbors(query.astype("f8"))
    # FAISS expands the square: the error of a squared distance is some units of its last place
    np.testing.assert_allclose(distance**2, wanted**2, rtol=1e-5, atol=2e-6)
    # the rows themselves, wherever ties and rounding leave no choice
    exact = np.linalg.norm(query.astype("f8")[:, None] - bank[position], axis=2)
    np.testing.assert_allclose(exact**2, wanted**2, rtol=1e-5, atol=2e-6)
    assert all(len(set(line)) == k for line in position.tolist())


@pytest.mark.parametrize("num_queries", [1, 19, 300])
@pytest.mark.parametrize("k", [1, 50, 2500])
def test_blocks_change_no_bit_of_what_faiss_finds_in_all_rows_at_once(num_queries, k, monkeypatch):
    query, bank = unit_rows(5000, num_queries, 40)
    squared, position = faiss.knn(query, bank, k)
    monkeypatch.setattr(flat, "_MAX_BLOCK_BYTES", 4 * 40 * 2500)
    searched = FlatBank(Rows([bank]), np.asarray, CPU)
    assert [*searched.starts] == [0, 2048, 4096]
    found = searched.search(query, k)
    np.testing.assert_array_equal(found[0], np.sqrt(np.maximum(squared, 0)))
    np.testing.assert_array_equal(found[1], position)


def test_all_rows_are_prepared_block_by_block_and_kept_up_to_a_limit(monkeypatch):
    bank = np.random.default_rng(0).gamma(1, 1, (5000, 40)).astype("f4")
    sizes = []

    def prepare(rows):
        sizes.append(len(rows))
        return unit_length(rows)

    monkeypatch.setattr(flat, "_MAX_BLOCK_BYTES", 4 * 40 * 1024)
    monkeypatch.setattr(flat, "_max_cached_bytes", lambda: 4 * 40 * 2100)
    searched = FlatBank(Rows([bank]), prepare, CPU)
    for _ in range(2):
        distance, _ = searched.search(bank[:30], 3)
    np.testing.assert_array_equal(distance, flat.k_nearest(
        unit_length(bank[:30]), unit_length(bank), 3
    )[0])  # fmt: skip
    # two blocks fit, the other three are made again
    assert sizes == [30, 1024, 1024, 1024, 1024, 904, 30, 1024, 1024, 904]


def test_without_faiss_a_stage_says_what_to_install():
    code = "import sys; sys.modules['faiss'] = None; import ood_heatmap.cache.flat"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ood_heatmap.errors.OodHeatmapError: FAISS is not installed: run `pip")
    assert "ood-heatmap[cpu]" in last


def test_two_faiss_packages_are_refused_with_the_way_out(monkeypatch):
    class Distribution:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    both = [Distribution("faiss-cpu"), Distribution("numpy"), Distribution("faiss-gpu")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: both)
    with pytest.raises(OodHeatmapError, match="pip uninstall -y faiss-cpu faiss-gpu"):
        flat.check_faiss()


def test_torch_is_imported_before_faiss():
    code = (
        "import sys, ood_heatmap.cache.flat; names = list(sys.modules);"
        "assert names.index('torch') < names.index('faiss')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not MEMORY.is_file(), reason="not Linux")
def test_the_ranks_of_a_machine_share_a_quarter_of_its_memory(monkeypatch):
    total = 1024 * int(MEMORY.read_text().split()[1])
    for num_ranks in (1, 8):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))
        assert flat._max_cached_bytes() == pytest.approx(total / 4 / num_ranks, rel=0.01)


def test_the_backend_says_where_faiss_searches(monkeypatch):
    version, cuda = faiss.__version__, torch.device("cuda:0")
    assert flat.describe_backend(torch.device("cpu")) == f"faiss {version} on CPU"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    assert flat.describe_backend(cuda) == f"faiss {version} on A GPU"
    monkeypatch.delattr(faiss, "StandardGpuResources")
    assert "this build has no GPU support" in flat.describe_backend(cuda)
