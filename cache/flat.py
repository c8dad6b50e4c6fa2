"""FAISS: the index file, and flat float32 search of blocks of rows on a GPU or the CPU."""

import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.cache.files import replacing
from ood_heatmap.cache.shards import Rows
from ood_heatmap.cores import local_world_size, physical_memory
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError

# after torch: the reverse order crashes where both ship a CUDA runtime; imported only here
try:
    import faiss  # isort: skip
except ModuleNotFoundError as error:
    raise OodHeatmapError(
        "FAISS is not installed: run `pip install 'ood-heatmap[cpu]'`, or 'ood-heatmap[cuda]' for "
        "an NVIDIA GPU."
    ) from error

log = logging.getLogger(__name__)
_Float32: TypeAlias = NDArray[np.float32]
_Int64: TypeAlias = NDArray[np.int64]
_Result = TypeVar("_Result")
_MAX_BLOCK_BYTES = 64 << 20
# FAISS multiplies blocks of this many rows on a CPU: cut elsewhere, the products round differently
_BLAS_ROWS = 1024
# scratch of FAISS on a GPU; what a search needs beyond it is allocated and freed each time
_GPU_SCRATCH_BYTES = 256 << 20
# rows whose distances to 512 queries, FAISS's tile, fit twice into the scratch
_MAX_BLOCK_ROWS = 32 * _BLAS_ROWS
# limit of FAISS on a GPU
_MAX_GPU_NEIGHBOURS = 2048


def check_faiss() -> None:
    """Reject an environment with two FAISS packages: they silently overwrite each other.

    Raises:
        OodHeatmapError: More than one package named faiss-* is installed.
    """
    names = {item.metadata["Name"] for item in importlib.metadata.distributions()}
    found = sorted(name for name in names if name and name.lower().startswith("faiss-"))
    if len(found) > 1:
        raise OodHeatmapError(
            f"this environment has {' and '.join(found)}, which overwrite each other. "
            f"Run `pip uninstall -y {' '.join(found)}`, then `pip install {found[-1]}`."
        )


def describe_backend(device: torch.device) -> str:
    """Return FAISS's version and the search device, for output."""
    name = "CPU"
    if device.type == "cuda":
        if not hasattr(faiss, "StandardGpuResources"):
            return f"faiss {faiss.__version__} on the CPU (this build has no GPU support)"
        name = torch.cuda.get_device_name(device)
    return f"faiss {faiss.__version__} on {name}"


class FlatBank:
    """All rows of a data set, searched as a whole by FAISS's float32 distances.

    Only a block is in memory beside the memory-mapped rows: on a GPU all blocks are uploaded once,
    on the CPU some are cached.

    Args:
        rows: ``(N, D)`` float32.
        prepare: Applied to the queries and to the rows of each block: centres them or makes their
            length 1, as FAISS loses precision far from the origin.
        device: Device to search on.
    """

    def __init__(
        self, rows: Rows, prepare: Callable[[_Float32], _Float32], device: torch.device
    ) -> None:
        self.rows, self.prepare = rows, prepare
        fitting = _MAX_BLOCK_BYTES // (4 * rows.shape[1]) // _BLAS_ROWS * _BLAS_ROWS
        self.step = min(max(fitting, _BLAS_ROWS), _MAX_BLOCK_ROWS)
        self.starts = range(0, len(rows), self.step)
        self.blocks = Blocks(self.starts, self._make_block, device)

    def _make_block(self, start: int) -> _Float32:
        """Return the prepared rows of one block."""
        stop = min(start + self.step, len(self.rows))
        return self.prepare(self.rows.take(np.arange(start, stop)))

    def search(self, queries: _Float32, k: int) -> tuple[_Float32, _Int64]:
        """Search the k nearest rows.

        Args:
            queries: ``(B, D)`` float32.
            k: Number of neighbours; at most N are returned.

        Returns:
            Euclidean distance, ascending, and position among the rows, ``(B, k)`` each.
        """
        nearest = faiss.ResultHeap(len(queries), min(k, len(self.rows)))
        parts = [(start, slice(None)) for start in self.starts]
        found = self.blocks.search(parts, self.prepare(queries), k)
        by_block = (item.reshape(len(parts), len(queries), k) for item in found)
        for start, squared, positions in zip(self.starts, *by_block, strict=True):
            nearest.add_result(squared, positions + start)
        nearest.finalize()
        return np.sqrt(np.maximum(nearest.D, 0)), nearest.I


class Blocks:
    """Blocks of rows, searched on a GPU as long as its memory suffices, otherwise on the CPU.

    Args:
        keys: Of all blocks.
        make: Returns the rows of a block, ``(N, D)`` float32. Called once for each on a GPU, and
            again for those beyond the cache on the CPU.
        device: Device to search on.
    """

    def __init__(
        self, keys: Iterable[int], make: Callable[[int], _Float32], device: torch.device
    ) -> None:
        self.make, self.device = make, device
        self.resources: Any = None
        self.on_gpu: dict[int, torch.Tensor] = {}
        self.host_cache: dict[int, _Float32] = {}
        self.host_room = _max_cached_bytes()
        if device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
            self._enter_gpu(keys)

    def _enter_gpu(self, keys: Iterable[int]) -> None:
        """Take the memory of FAISS and upload all blocks."""
        # lets FAISS take tensors and run on torch's current stream
        importlib.import_module("faiss.contrib.torch_utils")
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        try:
            self.resources = _retry_once(partial(_open_gpu, self.device.index))
            for key in keys:
                rows = torch.from_numpy(self.make(key))
                self.on_gpu[key] = _retry_once(partial(rows.to, self.device))
        except torch.OutOfMemoryError:
            self._leave_gpu()

    def _leave_gpu(self) -> None:
        """Fall back to searching on the CPU."""
        log.warning("%s is out of memory for the search: falling back to the CPU", self.device)
        self.on_gpu, self.resources = {}, None
        self.device = torch.device("cpu")
        torch.cuda.empty_cache()

    def search(
        self, parts: Sequence[tuple[int, slice]], queries: _Float32, k: int
    ) -> tuple[_Float32, _Int64]:
        """Search the k nearest rows of some of the queries in each of several blocks.

        Returns:
            Squared distances, ascending, and positions in the block, part after part, ``(n, k)``
            each; infinity and -1 beyond the block's number of rows.
        """
        if self.on_gpu and k <= _MAX_GPU_NEIGHBOURS:
            try:
                return _retry_once(partial(self._search_on_gpu, parts, queries, k))
            except torch.OutOfMemoryError:
                self._leave_gpu()
        found = []
        for key, selected in parts:
            rows = self._load_on_host(key)
            found.append(faiss.knn(queries[selected], rows, min(k, len(rows))))
        return _join(found, k, np.concatenate)

    def _search_on_gpu(
        self, parts: Sequence[tuple[int, slice]], queries: _Float32, k: int
    ) -> tuple[_Float32, _Int64]:
        """Enqueue the searches of all parts before waiting for their results."""
        pinned = torch.from_numpy(queries).pin_memory()
        # FAISS uses the current stream of the current device
        with torch.cuda.device(self.device):
            uploaded = pinned.to(self.device, non_blocking=True)
            found = []
            for key, selected in parts:
                rows = self.on_gpu[key]
                arguments = (self.resources, uploaded[selected], rows, min(k, len(rows)))
                found.append(faiss.knn_gpu(*arguments, device=self.device.index))
            # joined on the GPU: a download of each would wait each time
            return _join(found, k, lambda items: torch.cat(items).cpu().numpy())

    def _load_on_host(self, key: int) -> _Float32:
        """Return the rows of a block from a cache of limited size.

        Making them for every call would cost more than the search when there are few queries.
        """
        if key not in self.host_cache:
            rows = self.make(key)
            if rows.nbytes > self.host_room:
                return rows
            self.host_room -= rows.nbytes
            self.host_cache[key] = rows
        return self.host_cache[key]


def _max_cached_bytes() -> int:
    """Return how much one rank may cache: a quarter of the RAM for all ranks of this machine."""
    return physical_memory() // 4 // local_world_size()


def _open_gpu(index: int) -> Any:
    """Return the resources of FAISS on a GPU, with all of their memory allocated.

    FAISS itself allocates at the first search, when PyTorch may hold what is left.
    """
    # cuBLAS without memory aborts the process: no exception
    torch.cuda.empty_cache()
    # new for each attempt: FAISS takes those whose allocation failed for initialized
    resources = faiss.StandardGpuResources()
    # for rows on the host, and all are on the GPU
    resources.setPinnedMemory(0)
    resources.setTempMemory(_GPU_SCRATCH_BYTES)
    # allocates
    resources.getDefaultStream(index)
    return resources


def _retry_once(call: Callable[[], _Result]) -> _Result:
    """Call; if a GPU is out of memory, free the blocks that PyTorch caches and call once more.

    Raises:
        torch.OutOfMemoryError: It is out of memory even then.
    """
    for _ in range(2):
        try:
            return call()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error)
        # outside of the except block the error no longer holds tensors
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(reason)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether PyTorch, FAISS or the driver found no memory; FAISS has no class for it."""
    words = ("out of memory", "alloc fail", "cudaHostAlloc")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _join(
    found: Sequence[tuple[Any, Any]], k: int, concatenate: Callable[[list[Any]], NDArray[Any]]
) -> tuple[_Float32, _Int64]:
    """Join distances and positions of searches, of up to k columns each, to arrays of k."""
    num_rows, num_columns = np.array([item.shape for item, _ in found]).T
    present = np.arange(k) < num_columns.repeat(num_rows)[:, None]
    squared = np.full(present.shape, np.inf, np.float32)
    positions = np.full(present.shape, -1, np.int64)
    squared[present] = concatenate([item.ravel() for item, _ in found])
    positions[present] = concatenate([item.ravel() for _, item in found])
    return squared, positions


def unit_length(features: _Float32) -> _Float32:
    """Return features divided by their norm; a zero row stays zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(norms, np.finfo(np.float32).tiny), np.float32)


def k_nearest(queries: _Float32, bank: _Float32, k: int) -> tuple[_Float32, _Int64]:
    """Search the k nearest rows of a bank by FAISS's float32 distances.

    Args:
        queries: ``(B, D)``, centred or of unit length: FAISS loses precision far from the origin.
        bank: ``(N, D)``, likewise.
        k: Number of neighbours; at most N are returned.

    Returns:
        Euclidean distance, ascending, and position in the bank, ``(B, k)`` each.
    """
    squared, positions = faiss.knn(queries, bank, min(k, len(bank)))
    return np.sqrt(np.maximum(squared, 0)), positions


def write_index(
    path: Path,
    features: Rows,
    order: _Int64,
    *,
    record: Callable[[Path], None] | None = None,
) -> None:
    """Write the features in the given order as an ``IndexFlatL2``, atomically.

    Args:
        path: The file to write or replace.
        features: ``(N, D)`` float32.
        order: ``(N,)`` permutation of the rows of ``features``.
        record: As for ``cache.files.replacing``.
    """
    index = faiss.IndexFlatL2(features.shape[1])
    index.codes.resize(len(features) * index.code_size)
    index.ntotal = len(features)
    rows = faiss.rev_swig_ptr(index.get_xb(), len(features) * index.d).reshape(features.shape)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    # shard by shard: in the other order each row would be a read of its own, of a cold disk
    for shard, start in zip(features, features.starts, strict=False):
        rows[place[start : start + len(shard)]] = shard
    with replacing(path, record=record) as scratch:
        faiss.write_index(index, str(scratch))


def read_index(path: Path, num_rows: int, num_features: int) -> _Float32:
    """Memory-map the features of an index, read-only.

    Verify the file's checksum first: FAISS does not validate its input.

    Raises:
        DamagedCacheError: The file is not an ``IndexFlatL2`` of this size.
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
    array: _Float32 = features.reshape(num_rows, num_features).view(_MappedIndex)
    # the memory map lives as long as the index
    array.index = index  # type: ignore[attr-defined]
    return array


class _MappedIndex(np.ndarray[Any, Any]):
    """An array that keeps alive the FAISS index that owns its memory."""
