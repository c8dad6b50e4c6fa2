"""Data feeds for training: row order, and resident, memory and streaming feeds.

No image is decoded and no classifier runs here. ID rows come first and OOD rows after them; the
target of an ID row is 0 everywhere and is not stored.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_heatmap.cache.reader import RowReader
from ood_heatmap.cache.shards import Rows
from ood_heatmap.cores import local_world_size, num_cores, physical_memory
from ood_heatmap.devices import is_out_of_memory
from ood_heatmap.distributed import broadcast, rank, world_size
from ood_heatmap.errors import OodHeatmapError

log = logging.getLogger(__name__)
_Int64 = NDArray[np.int64]
_FeedKind: TypeAlias = Literal["resident", "memory", "streaming"]
# pinned is the former name of memory
_FeedChoice: TypeAlias = Literal["auto", _FeedKind, "pinned"]

# contiguous rows of the training set, and chunks that are shuffled together
_CHUNK, _GROUP = 4096, 64
# slots of the ring buffer: batches that are prefetched
_NUM_SLOTS = 4
# bytes of a batch that are worth a thread of their own
_BYTES_PER_READ = 4 << 20
# at most so many reader threads copy out of the page cache, and so many only wait for the disk
_MAX_READERS, _NUM_DIRECT_READERS = 8, 16
# batches whose row numbers are copied to the device at once
_BATCHES_PER_COPY = 64


# by controller in /proc/self/cgroup, "" is version 2: directory, files of the limit and the usage,
# prefix of the fields of memory.stat
_CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


@dataclass(frozen=True)
class TrainingBatch:
    """A batch of this rank, on the device.

    Args:
        features: ``(B, D)`` float32.
        prediction: ``(B,)`` int32.
        target: ``(B, C, H, W)`` int16 differences in steps of 1/255, 0 for ID rows.
        maps: Feature maps ``(B, c, h, w)`` float16.
        noise: ``(B, num_inputs)`` float32 for the decoder's scaled inputs.
        presence: ``(B, H, W)`` uint8 opacity of OOD content in steps of 1/255, 0 for ID rows; for a
            split decoder.
    """

    features: Tensor
    prediction: Tensor
    target: Tensor
    maps: tuple[Tensor, ...] = ()
    noise: Tensor | None = None
    presence: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, always in the same order."""
        optional = [item for item in (self.noise, self.presence) if item is not None]
        return (self.features, self.prediction, self.target, *self.maps, *optional)

    def like(self, tensors: Iterable[Tensor]) -> "TrainingBatch":
        """Return a batch of these tensors, in the order of ``tensors``."""
        features, prediction, target, *rest = tensors
        presence = None if self.presence is None else rest.pop()
        noise = None if self.noise is None else rest.pop()
        return TrainingBatch(features, prediction, target, tuple(rest), noise, presence)

    def clone(self) -> "TrainingBatch":
        """Return a copy."""
        return self.like(item.clone() for item in self.tensors)

    def split(self, size: int) -> "list[TrainingBatch]":
        """Split into micro-batches of ``size`` images; the last may be smaller."""
        micro_batches = zip(*(torch.split(item, size) for item in self.tensors), strict=True)
        return [self.like(tensors) for tensors in micro_batches]


@dataclass(frozen=True)
class TrainingSet:
    """All ID rows and then all OOD rows, as memory-mapped columns of the caches.

    Args:
        id_columns: ``features``, ``prediction`` and feature maps of the index.
        ood_columns: The same columns of the targets stage, and those of ``target_names``.
        num_maps: Number of feature maps that the decoder uses.
        target_names: Columns of the target: ``heatmap``, and ``presence`` for a split decoder.
        num_patched: Number of OOD rows that are ID images with a patch; for a split decoder.
    """

    id_columns: Mapping[str, Rows]
    ood_columns: Mapping[str, Rows]
    num_maps: int = 0
    target_names: tuple[str, ...] = ("heatmap",)
    num_patched: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns that ID and OOD rows share."""
        maps = (f"feature_maps_{number}" for number in range(1, self.num_maps + 1))
        return ("features", "prediction", *maps)

    @property
    def num_id(self) -> int:
        """Number of ID rows."""
        return len(self.id_columns["features"])

    def __len__(self) -> int:
        return self.num_id + len(self.ood_columns["features"])

    @property
    def columns(self) -> dict[str, Rows]:
        """One column per batch tensor, for its shape and dtype."""
        shared = {name: self.id_columns[name] for name in self.names}
        return {**shared, **self.target_columns}

    @property
    def target_columns(self) -> dict[str, Rows]:
        """Columns of the target of OOD rows; that of ID rows is 0."""
        return {name: self.ood_columns[name] for name in self.target_names}

    @property
    def num_bytes(self) -> int:
        """Size of all columns."""
        shared = sum(
            self.id_columns[name].num_bytes + self.ood_columns[name].num_bytes
            for name in self.names
        )
        return shared + sum(column.num_bytes for column in self.target_columns.values())


def _iter_groups(num_rows: int, seed: int, epoch: int) -> Iterator[_Int64]:
    """Yield the order of rows in an epoch, group by group; depends only on the arguments.

    Chunks of contiguous rows are assigned to groups at random and each group is shuffled, so that
    a streaming feed reads from few regions of the disk. Up to one group (262,144 rows) this is a
    full shuffle.

    Yields:
        ``(N,)`` int64; concatenated they are a permutation of all rows.
    """
    generator = np.random.default_rng([seed, epoch])
    if num_rows <= _CHUNK * _GROUP:
        yield generator.permutation(num_rows)
        return
    chunks = generator.permutation(-(-num_rows // _CHUNK))
    for start in range(0, len(chunks), _GROUP):
        rows = (chunks[start : start + _GROUP, None] * _CHUNK + np.arange(_CHUNK)).ravel()
        yield generator.permutation(rows[rows < num_rows])


def iter_batches(num_rows: int, size: int, seed: int, epochs: Iterable[int]) -> Iterator[_Int64]:
    """Yield this rank's rows of every batch of every epoch.

    The last, smaller batch of an epoch is dropped, so that all batches have the same shape. The
    rows of a batch ascend: ID rows come first, and rows that are adjacent on disk stay together.

    Args:
        num_rows: Number of rows of the training set.
        size: Batch size over all ranks.
        seed: Random seed of the order.
        epochs: Numbers of the epochs.
    """
    for epoch in epochs:
        order = np.empty(0, np.int64)
        for group in _iter_groups(num_rows, seed, epoch):
            order = np.concatenate([order, group])
            while len(order) >= size:
                yield np.sort(order[:size])[rank() :: world_size()]
                order = order[size:]


def available_memory(device: torch.device) -> int:
    """Return the free bytes of a device; for the CPU, those available without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return min([int(fields["MemAvailable"].split()[0]) * 1024, *_iter_cgroup_memory(Path("/"))])
    return physical_memory() // 2


def _iter_cgroup_memory(root: Path) -> Iterator[int]:
    """Yield the free bytes of each cgroup of this process that limits its memory.

    A container or batch job often has less memory than its machine. As in ``MemAvailable``, the
    page cache counts as free.

    Args:
        root: Root of the file system.
    """
    # without the files that Linux documents, no limit is known
    with suppress(OSError, ValueError, KeyError):
        for entry in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = entry.split(":", 2)
            if controllers not in _CGROUP_FILES:
                continue
            mount, limit, usage, prefix = _CGROUP_FILES[controllers]
            folder = root / "sys/fs/cgroup" / mount
            for part in ("", *Path(group).parts[1:]):
                folder /= part
                # inside a container the outer groups do not exist, and its own group is the mount
                if not (folder / limit).is_file() or (folder / limit).read_text().strip() == "max":
                    continue
                lines = (folder / "memory.stat").read_text().splitlines()
                stat = dict(item.split() for item in lines)
                used = int((folder / usage).read_text())
                cached = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
                yield int((folder / limit).read_text()) - used + cached


def choose_feed(data: TrainingSet, device: torch.device, choice: _FeedChoice) -> _FeedKind:
    """Choose a feed; ``auto`` is the first that fits in half of the free memory.

    In order: ``resident`` (device memory), ``memory`` (host memory, for a GPU), and ``streaming``,
    which always fits.
    """
    if choice == "pinned":
        return "memory"
    if choice != "auto":
        return choice
    on_host = data.num_bytes * local_world_size()
    on_device = data.num_bytes if device.type == "cuda" else on_host
    if on_device < available_memory(device) // 2:
        return "resident"
    if device.type == "cuda" and on_host < available_memory(torch.device("cpu")) // 2:
        return "memory"
    return "streaming"


class Feed(Protocol):
    """Moves batches to the device."""

    def batches(self, batches: Iterable[_Int64]) -> Iterator[TrainingBatch]:
        """Yield a batch for each array of ascending rows; valid until the next is requested."""


def open_feed(
    data: TrainingSet, device: torch.device, choice: _FeedChoice, size: int
) -> tuple[_FeedKind, Feed]:
    """Return the kind of feed and the feed; falls back to streaming on out-of-memory.

    Args:
        data: The training set.
        device: Device of this rank.
        choice: ``auto``, ``resident``, ``memory`` or ``streaming``.
        size: Images of the largest batch.

    Raises:
        OodHeatmapError: There is not even memory for the ring buffer of the streaming feed.
    """
    kind: _FeedKind = broadcast(choose_feed(data, device, choice))
    try:
        if kind == "resident":
            _require_memory(data, device)
            return kind, _ResidentFeed(data, device)
        if kind == "memory":
            _require_memory(data, torch.device("cpu"))
            return kind, _StreamingFeed(_load_into_memory(data), device, size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        log.warning("no memory for the %s feed on %s: falling back to streaming", kind, device)
    try:
        return "streaming", _StreamingFeed(data, device, size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OodHeatmapError(
            f"{device} has no memory for a ring buffer of {_NUM_SLOTS} batches of {size} images. "
            "Use a smaller --batch-size."
        ) from error


def _require_memory(data: TrainingSet, device: torch.device) -> None:
    """Raise before a copy in host memory ends this process, which Linux does without an error.

    Raises:
        MemoryError: The copies of all ranks do not fit.
    """
    if device.type == "cpu" and data.num_bytes * local_world_size() > available_memory(device):
        raise MemoryError


def _empty(column: Rows, count: int, device: torch.device, *, pinned: bool = False) -> Tensor:
    """Return an empty tensor for ``count`` rows of a column."""
    dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
    return torch.empty((count, *column.shape[1:]), dtype=dtype, device=device, pin_memory=pinned)


def _to_batch(columns: Mapping[str, Tensor], count: int) -> TrainingBatch:
    """Return the first ``count`` rows of columns as a batch."""
    rows = {name: item[:count] for name, item in columns.items()}
    maps = tuple(item for name, item in rows.items() if name.startswith("feature_maps_"))
    return TrainingBatch(
        rows["features"],
        rows["prediction"],
        rows["heatmap"],
        maps,
        presence=rows.get("presence"),
    )


class _ResidentFeed:
    """Batches gathered on the device from a training set in its memory."""

    def __init__(self, data: TrainingSet, device: torch.device) -> None:
        self.num_id, self.device = data.num_id, device
        self.columns = {
            name: self._load([*data.id_columns[name], *data.ood_columns[name]])
            for name in data.names
        }
        # row 0 is the target of all ID rows: gathering zeros is cheaper than masking
        self.targets = {
            name: self._load([np.zeros((1, *rows.shape[1:]), rows.dtype), *rows])
            for name, rows in data.target_columns.items()
        }

    def _load(self, parts: list[NDArray[Any]]) -> Tensor:
        """Concatenate arrays on the device without a temporary copy of all of them."""
        column = Rows(parts)
        out = _empty(column, len(column), self.device)
        for start, part in zip(column.starts, parts, strict=False):
            # np.array copies: PyTorch warns about read-only memory maps
            out[start : start + len(part)] = torch.from_numpy(np.array(part))
        return out

    def batches(self, batches: Iterable[_Int64]) -> Iterator[TrainingBatch]:
        """Yield a batch for each array of rows."""
        remaining = iter(batches)
        while block := list(islice(remaining, _BATCHES_PER_COPY)):
            rows = torch.from_numpy(np.concatenate(block))
            # a copy from pageable memory would block until the GPU is done
            if self.device.type == "cuda":
                rows = rows.pin_memory().to(self.device, non_blocking=True)
            for batch in rows.split([len(item) for item in block]):  # type: ignore[no-untyped-call]
                yield self._gather(batch)

    def _gather(self, rows: Tensor) -> TrainingBatch:
        shared = {name: item.index_select(0, rows) for name, item in self.columns.items()}
        ood_rows = (rows - (self.num_id - 1)).clamp_(min=0)
        targets = {name: item.index_select(0, ood_rows) for name, item in self.targets.items()}
        return _to_batch({**shared, **targets}, len(rows))


def _load_into_memory(data: TrainingSet) -> TrainingSet:
    """Return a copy of the training set in RAM.

    It is not page-locked: batches go through the ring buffer, which is.
    """

    def load(rows: Rows) -> Rows:
        out = np.empty(rows.shape, rows.dtype)
        for start, part in zip(rows.starts, rows, strict=False):
            out[start : start + len(part)] = part
        return Rows([out])

    return replace(
        data,
        id_columns={name: load(data.id_columns[name]) for name in data.names},
        ood_columns={name: load(data.ood_columns[name]) for name in data.columns},
    )


class _BatchReader:
    """Reads batches of a training set into host memory; safe to share between threads.

    Args:
        data: The training set.
        direct: Read past the page cache what is not there.
    """

    def __init__(self, data: TrainingSet, *, direct: bool = False) -> None:
        self.num_id = data.num_id
        id_columns = {name: data.id_columns[name] for name in data.names}
        ood_columns = {name: data.ood_columns[name] for name in data.columns}
        self.target_names = data.target_names
        self.id_rows = RowReader(id_columns, direct=direct)
        self.ood_rows = RowReader(ood_columns, direct=direct)

    def read(self, rows: _Int64, out: Mapping[str, NDArray[Any]]) -> None:
        """Read ascending rows into the first rows of buffers, one per column.

        Raises:
            ValueError: The rows do not ascend.
            IndexError: A row is out of range.
            OodHeatmapError: A shard cannot be read.
        """
        if (rows[1:] < rows[:-1]).any():
            raise ValueError("the rows of a batch must ascend")
        num_id, count = int(rows.searchsorted(self.num_id)), len(rows)
        if num_id:
            self.id_rows.read(rows[:num_id], {name: item[:num_id] for name, item in out.items()})
            for name in self.target_names:
                out[name][:num_id] = 0
        ood = {name: item[num_id:count] for name, item in out.items()}
        self.ood_rows.read(rows[num_id:] - self.num_id, ood)


def read_batch(data: TrainingSet, rows: _Int64, device: torch.device) -> TrainingBatch:
    """Return one batch on the device, without a feed."""
    host = torch.device("cpu")
    buffers = {name: _empty(item, len(rows), host) for name, item in data.columns.items()}
    _BatchReader(data).read(rows, {name: item.numpy() for name, item in buffers.items()})
    return _to_batch({name: item.to(device) for name, item in buffers.items()}, len(rows))


def _untimed_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class _Slot:
    """One ring-buffer slot: a pinned host batch and its device copy.

    On a CPU both are the same memory. On a GPU two events guard it: the readers wait for
    ``copied`` before they fill the host batch again, the copy stream for ``used`` before it
    overwrites the device copy.
    """

    def __init__(self, host: dict[str, Tensor], device: torch.device) -> None:
        self.host, self.on_gpu = host, device.type == "cuda"
        self.arrays = {name: item.numpy() for name, item in host.items()}
        self.row_bytes = sum(item[0].nbytes for item in host.values())
        self.device, self.count, self.num_reads = host, 0, 0
        if self.on_gpu:
            self.device = {name: item.to(device) for name, item in self.host.items()}
            self.copied, self.used = _untimed_event(), _untimed_event()

    def start(self, rows: _Int64, num_readers: int) -> "list[_Read]":
        """Return the reads that fill the slot, for each reader one; waits until it was copied."""
        if self.on_gpu:
            self.copied.synchronize()
        self.count = len(rows)
        # an entry for each finished read: its error, or None. A new queue: reads of a loop that was
        # left early may still finish
        self.finished: SimpleQueue[BaseException | None] = SimpleQueue()
        num_large = len(rows) * self.row_bytes // _BYTES_PER_READ
        self.num_reads = min(num_readers, len(rows), num_large) or 1
        edges = np.linspace(0, len(rows), self.num_reads + 1).astype(int).tolist()
        return [
            _Read(
                rows[first:last],
                {name: item[first:last] for name, item in self.arrays.items()},
                self.finished,
            )
            for first, last in pairwise(edges)
        ]

    def to_device(self, stream: torch.cuda.Stream | None) -> TrainingBatch:
        """Wait for the reads and return the batch on the device, copied on a separate stream."""
        errors = [self.finished.get() for _ in range(self.num_reads)]
        for error in errors:
            if error is not None:
                raise error
        if stream is not None:
            stream.wait_event(self.used)
            with torch.cuda.stream(stream):
                for name, item in self.host.items():
                    self.device[name][: self.count].copy_(item[: self.count], non_blocking=True)
                self.copied.record()
            torch.cuda.current_stream(stream.device).wait_event(self.copied)
        return _to_batch(self.device, self.count)

    def mark_used(self, device: torch.device) -> None:
        """Record that the device is done with this slot."""
        if self.on_gpu:
            self.used.record(torch.cuda.current_stream(device))


def _allocate_ring(data: TrainingSet, device: torch.device, size: int) -> list[dict[str, Tensor]]:
    """Return host memory for the slots of a ring buffer, page-locked if the device is a GPU."""

    def allocate(pinned: bool) -> list[dict[str, Tensor]]:
        cpu = torch.device("cpu")
        return [
            {name: _empty(item, size, cpu, pinned=pinned) for name, item in data.columns.items()}
            for _ in range(_NUM_SLOTS)
        ]

    if device.type == "cuda":
        try:
            return allocate(pinned=True)
        # torch.AcceleratorError or torch.OutOfMemoryError, by version
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            log.warning("no page-locked memory for batches: copies to %s wait (%s)", device, reason)
    return allocate(pinned=False)


@dataclass(frozen=True)
class _Read:
    """Rows that one thread reads into a part of a slot."""

    rows: _Int64
    arrays: Mapping[str, NDArray[Any]]
    finished: "SimpleQueue[BaseException | None]"

    def run(self, reader: _BatchReader) -> None:
        """Read, and hand over the error if there is one."""
        try:
            reader.read(self.rows, self.arrays)
        except BaseException as error:
            self.finished.put(error)
        else:
            self.finished.put(None)


class _StreamingFeed:
    """Batches from shards or RAM: threads prefetch into a ring buffer."""

    def __init__(self, data: TrainingSet, device: torch.device, size: int) -> None:
        # every row comes once an epoch: a page cache that cannot keep them all keeps none
        on_disk = bool(data.ood_columns["heatmap"].paths)
        direct = on_disk and data.num_bytes > available_memory(torch.device("cpu"))
        self.reader, self.device = _BatchReader(data, direct=direct), device
        self.slots = [_Slot(host, device) for host in _allocate_ring(data, device, size)]
        self.num_readers = _NUM_DIRECT_READERS if direct else _choose_num_readers()
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        log.info(
            "train: %d reader threads%s, ring buffer of %d batches (%.0f MB)",
            *(
                self.num_readers,
                " (direct reads)" if direct else "",
                _NUM_SLOTS,
                _NUM_SLOTS * size * self.slots[0].row_bytes / 1e6,
            ),
        )

    def batches(self, batches: Iterable[_Int64]) -> Iterator[TrainingBatch]:
        """Yield a batch for each array of rows."""
        free: SimpleQueue[_Slot] = SimpleQueue()
        full: SimpleQueue[_Slot | BaseException | None] = SimpleQueue()
        for slot in self.slots:
            free.put(slot)
        stopped, lock = threading.Event(), threading.Lock()
        reads = self._iter_reads(batches, free, full, stopped)
        # daemons: they wait for ever if the process ends while this generator is suspended
        threads = [
            threading.Thread(target=self._run, args=(reads, lock), name="reader", daemon=True)
            for _ in range(self.num_readers)
        ]
        try:
            for thread in threads:
                thread.start()
            while (item := full.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item.to_device(self.stream)
                item.mark_used(self.device)
                free.put(item)
        finally:
            stopped.set()
            free.put(self.slots[0])
            for thread in threads:
                # not before it was started
                if thread.is_alive():
                    thread.join()
            for slot in self.slots:
                slot.mark_used(self.device)

    def _run(self, reads: Iterator[_Read], lock: threading.Lock) -> None:
        """Run reads until there are none; the body of a thread."""
        while True:
            with lock:
                read = next(reads, None)
            if read is None:
                return
            read.run(self.reader)

    def _iter_reads(
        self,
        batches: Iterable[_Int64],
        free: "SimpleQueue[_Slot]",
        full: "SimpleQueue[_Slot | BaseException | None]",
        stopped: threading.Event,
    ) -> Iterator[_Read]:
        """Yield the reads of all batches as slots become free; put the slots in order."""
        try:
            for rows in batches:
                slot = free.get()
                reads = slot.start(rows, self.num_readers)
                full.put(slot)
                for read in reads:
                    if stopped.is_set():
                        return
                    yield read
            full.put(None)
        except BaseException as error:
            full.put(error)


def _choose_num_readers() -> int:
    """Return the number of reader threads of this rank, from the cores that it may use."""
    return max(2, min(_MAX_READERS, num_cores()))
