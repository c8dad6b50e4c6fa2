"""Cached arrays to the training step: the order of rows, and three ways to bring them.

No image is decoded and no classifier runs here. ID rows come first and OOD rows after them; the
target of an ID row is 0 everywhere and is stored nowhere.
"""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import Queue
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_heatmap.cache.shards import Rows, take_ascending
from ood_heatmap.distributed import broadcast, rank, world_size

log = logging.getLogger(__name__)
Int64 = NDArray[np.int64]
CHUNK, GROUP = 4096, 64  # rows that lie together on disk; chunks that are shuffled together
RING = 4  # batches that are read ahead
BLOCK = 64  # batches whose rows are copied to the device at once


@dataclass(frozen=True)
class TrainingBatch:
    """What a training step takes.

    Args:
        features: ``(B, D)`` float32.
        prediction: ``(B,)`` int32.
        heatmap: ``(B, C, H, W)`` int16, 0 for ID rows.
        maps: Feature maps ``(B, c, h, w)`` float16.
        noise: ``(B, N)`` float32 for the decoder's scaled inputs, drawn anew for each step.
    """

    features: Tensor
    prediction: Tensor
    heatmap: Tensor
    maps: tuple[Tensor, ...] = ()
    noise: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, always in the same order."""
        noise = () if self.noise is None else (self.noise,)
        return (self.features, self.prediction, self.heatmap, *self.maps, *noise)

    def like(self, tensors: Iterable[Tensor]) -> "TrainingBatch":
        """Return a batch of these tensors, in the order of ``tensors``."""
        features, prediction, heatmap, *rest = tensors
        noise = None if self.noise is None else rest.pop()
        return TrainingBatch(features, prediction, heatmap, tuple(rest), noise)

    def clone(self) -> "TrainingBatch":
        """Return a copy in memory of its own."""
        return self.like(item.clone() for item in self.tensors)

    def split(self, size: int) -> "list[TrainingBatch]":
        """Return the batch in parts of ``size`` images; the last may be smaller."""
        parts = zip(*(torch.split(item, size) for item in self.tensors), strict=True)
        return [self.like(part) for part in parts]


@dataclass(frozen=True)
class TrainingSet:
    """All ID rows and then all OOD rows, as they lie in the caches.

    Args:
        id_columns: ``features``, ``prediction`` and feature maps of the index.
        ood_columns: The same and ``heatmap`` of the targets.
        num_maps: How many feature maps the decoder takes.
    """

    id_columns: Mapping[str, Rows]
    ood_columns: Mapping[str, Rows]
    num_maps: int = 0

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
        """A column of the kind of each that a batch has."""
        shared = {name: self.id_columns[name] for name in self.names}
        return {**shared, "heatmap": self.ood_columns["heatmap"]}

    @property
    def num_bytes(self) -> int:
        """Bytes of all that training touches."""
        shared = sum(
            self.id_columns[name].num_bytes + self.ood_columns[name].num_bytes
            for name in self.names
        )
        return shared + self.ood_columns["heatmap"].num_bytes


def epoch_order(num_rows: int, seed: int, epoch: int) -> Int64:
    """Return the order of rows in an epoch.

    A function of its arguments alone, so the same for every feed.

    Chunks of neighbouring rows are dealt out at random into groups, and each group is shuffled, so
    that a streaming feed reads near places of the disk. Up to one group (262,144 rows) it is a
    plain shuffle of everything.

    Returns:
        ``(num_rows,)`` int64, a permutation.
    """
    generator = np.random.default_rng([seed, epoch])
    if num_rows <= CHUNK * GROUP:
        return generator.permutation(num_rows)
    chunks = generator.permutation(-(-num_rows // CHUNK))
    groups = []
    for start in range(0, len(chunks), GROUP):
        rows = (chunks[start : start + GROUP, None] * CHUNK + np.arange(CHUNK)).ravel()
        groups.append(generator.permutation(rows[rows < num_rows]))
    return np.concatenate(groups)


def batches_of(num_rows: int, size: int, seed: int, epochs: Iterable[int]) -> Iterator[Int64]:
    """Yield the rows of every batch of every epoch, of this process's part of it.

    What is left of an epoch when no whole batch fits any more is dropped, so that every batch has
    one shape. In a batch the rows ascend: ID rows first, and neighbours on disk beside each other.

    Args:
        num_rows: Of the training set.
        size: Images of a batch, over all processes.
        seed: Of the order.
        epochs: Their numbers.
    """
    for epoch in epochs:
        order = epoch_order(num_rows, seed, epoch)
        for start in range(0, num_rows - size + 1, size):
            yield np.sort(order[start : start + size])[rank() :: world_size()]


def available_memory(device: torch.device) -> int:
    """Return the bytes a device has free.

    For the CPU, what the system can give without swapping.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def choose_feed(data: TrainingSet, device: torch.device, wanted: str) -> str:
    """Return the first feed that fits in half of the free memory.

    ``resident`` (the device's memory), ``pinned`` (the host's, where the device is a GPU), or
    ``streaming``, which always fits.
    """
    if wanted != "auto":
        return wanted
    on_host = data.num_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_device = data.num_bytes if device.type == "cuda" else on_host
    if on_device < available_memory(device) // 2:
        return "resident"
    if device.type == "cuda" and on_host < available_memory(torch.device("cpu")) // 2:
        return "pinned"
    return "streaming"


class Feed(Protocol):
    """Brings batches to the device."""

    def batches(self, batches: Iterable[Int64]) -> Iterator[TrainingBatch]:
        """Yield a batch for each array of ascending rows, valid until the next is asked for."""


def open_feed(data: TrainingSet, device: torch.device, wanted: str, size: int) -> tuple[str, Feed]:
    """Return a feed and its name; what does not fit in memory after all is streamed.

    Args:
        data: What to bring.
        device: Where to.
        wanted: ``auto``, ``resident``, ``pinned`` or ``streaming``.
        size: Images of the largest batch.
    """
    kind = broadcast(choose_feed(data, device, wanted))
    try:
        if kind == "resident":
            return kind, ResidentFeed(data, device)
        if kind == "pinned":
            return kind, StreamingFeed(in_memory(data, device), device, size)
    except (torch.OutOfMemoryError, MemoryError):
        log.warning("no memory for the %s feed on %s: going on with streaming", kind, device)
    return "streaming", StreamingFeed(data, device, size)


def empty_like(rows: Rows, count: int, device: torch.device, *, pinned: bool = False) -> Tensor:
    """Return an empty tensor for ``count`` rows of a column."""
    kind = torch.from_numpy(np.empty(0, rows.dtype)).dtype
    return torch.empty((count, *rows.shape[1:]), dtype=kind, device=device, pin_memory=pinned)


def batch_of(columns: Mapping[str, Tensor], count: int) -> TrainingBatch:
    """Return the first ``count`` rows of columns as a batch."""
    parts = {name: item[:count] for name, item in columns.items()}
    maps = tuple(item for name, item in parts.items() if name.startswith("feature_maps_"))
    return TrainingBatch(parts["features"], parts["prediction"], parts["heatmap"], maps)


class ResidentFeed:
    """Everything on the device; a batch is a gather there."""

    def __init__(self, data: TrainingSet, device: torch.device) -> None:
        self.num_id, self.device = data.num_id, device
        self.shared = {
            name: self.load([*data.id_columns[name], *data.ood_columns[name]])
            for name in data.names
        }
        # the target of all ID rows is row 0: a gather of zeros is cheaper than to mask them
        heatmap = data.ood_columns["heatmap"]
        zero = np.zeros((1, *heatmap.shape[1:]), heatmap.dtype)
        self.heatmaps = self.load([zero, *heatmap])

    def load(self, parts: list[NDArray[Any]]) -> Tensor:
        """Return parts as one tensor on the device, without a second copy of the whole there."""
        column = Rows(parts)
        out = empty_like(column, len(column), self.device)
        for start, part in zip(column.starts, parts, strict=False):
            # np.array: PyTorch warns of read-only maps
            out[start : start + len(part)] = torch.from_numpy(np.array(part))
        return out

    def batches(self, batches: Iterable[Int64]) -> Iterator[TrainingBatch]:
        """Yield a batch for each array of rows."""
        remaining = iter(batches)
        while block := list(islice(remaining, BLOCK)):
            rows = torch.from_numpy(np.concatenate(block))
            if self.device.type == "cuda":  # from pageable memory the copy would wait for the GPU
                rows = rows.pin_memory().to(self.device, non_blocking=True)
            for part in rows.split([len(item) for item in block]):  # type: ignore[no-untyped-call]
                yield self.batch(part)

    def batch(self, rows: Tensor) -> TrainingBatch:
        """Return one batch."""
        features, prediction, *maps = (item.index_select(0, rows) for item in self.shared.values())
        heatmap = self.heatmaps.index_select(0, (rows - (self.num_id - 1)).clamp_(min=0))
        return TrainingBatch(features, prediction, heatmap, tuple(maps))


def in_memory(data: TrainingSet, device: torch.device) -> TrainingSet:
    """Return the same rows in RAM, page-locked where a GPU is fed from it."""

    def column(rows: Rows) -> Rows:
        out = empty_like(rows, len(rows), torch.device("cpu"), pinned=device.type == "cuda").numpy()
        for start, part in zip(rows.starts, rows, strict=False):
            out[start : start + len(part)] = part
        return Rows([out])

    ood_names = (*data.names, "heatmap")
    return TrainingSet(
        {name: column(data.id_columns[name]) for name in data.names},
        {name: column(data.ood_columns[name]) for name in ood_names},
        data.num_maps,
    )


def gather(data: TrainingSet, rows: Int64, out: Mapping[str, NDArray[Any]]) -> None:
    """Read ascending rows into the first places of buffers.

    Raises:
        ValueError: The rows do not ascend.
        IndexError: A row is out of range.
    """
    if (rows[1:] < rows[:-1]).any():
        raise ValueError("the rows of a batch must ascend")
    num_id, count = int(np.searchsorted(rows, data.num_id)), len(rows)
    id_rows, ood_rows = rows[:num_id], rows[num_id:] - data.num_id
    for columns, part, first, last in (
        (data.id_columns, id_rows, 0, num_id),
        (data.ood_columns, ood_rows, num_id, count),
    ):
        names = [name for name in out if name in columns]
        take_ascending(
            [columns[name] for name in names], part, [out[name][first:last] for name in names]
        )
    out["heatmap"][:num_id] = 0


def read_batch(data: TrainingSet, rows: Int64, device: torch.device) -> TrainingBatch:
    """Return one batch of its own, without a feed."""
    host = torch.device("cpu")
    buffers = {name: empty_like(item, len(rows), host) for name, item in data.columns.items()}
    gather(data, rows, {name: item.numpy() for name, item in buffers.items()})
    return batch_of({name: item.to(device) for name, item in buffers.items()}, len(rows))


def event() -> torch.cuda.Event:
    """Return an event that nobody needs to time."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class Place:
    """One place of the ring: a batch on the host, and the same on the device.

    On the CPU both are one. On a GPU the host's part is page-locked and two events guard it:
    ``copied`` before the reader fills it again, ``used`` before the next copy to the device.
    """

    def __init__(self, data: TrainingSet, device: torch.device, size: int) -> None:
        cpu, self.on_gpu = torch.device("cpu"), device.type == "cuda"
        self.host = {
            name: empty_like(item, size, cpu, pinned=self.on_gpu)
            for name, item in data.columns.items()
        }
        self.arrays = {name: item.numpy() for name, item in self.host.items()}
        self.device, self.count = self.host, 0
        if self.on_gpu:
            self.device = {name: item.to(device) for name, item in self.host.items()}
            self.copied, self.used = event(), event()

    def fill(self, data: TrainingSet, rows: Int64) -> None:
        """Read a batch; the reader's thread waits here, never the step."""
        if self.on_gpu:
            self.copied.synchronize()
        gather(data, rows, self.arrays)
        self.count = len(rows)

    def bring(self, stream: torch.cuda.Stream | None) -> TrainingBatch:
        """Return the batch on the device, copied on a stream of its own."""
        if stream is not None:
            stream.wait_event(self.used)
            with torch.cuda.stream(stream):
                for name, item in self.host.items():
                    self.device[name][: self.count].copy_(item[: self.count], non_blocking=True)
                self.copied.record()
            torch.cuda.current_stream(stream.device).wait_event(self.copied)
        return batch_of(self.device, self.count)

    def release(self, device: torch.device) -> None:
        """Mark the end of what the device was given to do with the batch."""
        if self.on_gpu:
            self.used.record(torch.cuda.current_stream(device))


class StreamingFeed:
    """Batches out of mapped shards, or RAM: one thread reads ahead of the step into a ring."""

    def __init__(self, data: TrainingSet, device: torch.device, size: int) -> None:
        self.data, self.device = data, device
        self.ring = [Place(data, device, size) for _ in range(RING)]
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def batches(self, batches: Iterable[Int64]) -> Iterator[TrainingBatch]:
        """Yield a batch for each array of rows."""
        free: Queue[Place | None] = Queue()
        full: Queue[Place | BaseException | None] = Queue()
        for place in self.ring:
            free.put(place)
        arguments = (batches, free, full)
        thread = threading.Thread(target=self.read, args=arguments, name="reader", daemon=True)
        thread.start()
        try:
            while (item := full.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item.bring(self.stream)
                item.release(self.device)
                free.put(item)
        finally:
            # a reader that is ahead takes its free places first, then this, and stops
            free.put(None)
            thread.join()
            for place in self.ring:
                place.release(self.device)

    def read(
        self,
        batches: Iterable[Int64],
        free: "Queue[Place | None]",
        full: "Queue[Place | BaseException | None]",
    ) -> None:
        """Fill free places, batch after batch; the body of the thread."""
        try:
            for rows in batches:
                place = free.get()
                if place is None:
                    return
                place.fill(self.data, rows)
                full.put(place)
            full.put(None)
        except BaseException as error:
            full.put(error)
