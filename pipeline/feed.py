"""Cached arrays to the training step: the order of rows, and two ways to bring them.

No image is decoded and no classifier runs here. ID rows come first and OOD rows after them; the
target of an ID row is
0 everywhere and is stored nowhere.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_heatmap.cache.shards import Rows

Int64 = NDArray[np.int64]
CHUNK, GROUP = 4096, 64  # rows that lie together on disk; chunks that are shuffled together
RING = 4


@dataclass(frozen=True)
class TrainingBatch:
    """What a training step takes.

    Args:
        features: ``(B, D)`` float32.
        prediction: ``(B,)`` int32.
        heatmap: ``(B, C, H, W)`` int16, 0 for ID rows.
        maps: Feature maps ``(B, c, h, w)`` float16.
    """

    features: Tensor
    prediction: Tensor
    heatmap: Tensor
    maps: tuple[Tensor, ...] = ()


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
    that a streaming
    feed reads near places of the disk. Up to one group (262,144 rows) it is a plain shuffle of
    everything.

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
    """Return ``resident`` when everything fits in half of the free memory, otherwise
    ``streaming``."""
    if wanted != "auto":
        return wanted
    return "resident" if data.num_bytes < available_memory(device) // 2 else "streaming"


class ResidentFeed:
    """Everything on the device; a batch is a gather there."""

    def __init__(self, data: TrainingSet, device: torch.device) -> None:
        self.num_id, self.device = data.num_id, device
        self.shared = {
            name: torch.cat(
                [
                    torch.from_numpy(part).to(device)
                    if part.flags.writeable
                    else copied(part, device)
                    for rows in (data.id_columns[name], data.ood_columns[name])
                    for part in rows
                ]
            )
            for name in data.names
        }
        self.heatmaps = torch.cat([copied(part, device) for part in data.ood_columns["heatmap"]])

    def batches(self, batches: list[Int64]) -> Iterator[TrainingBatch]:
        """Yield a batch for each array of rows."""
        for rows in batches:
            yield self.batch(torch.from_numpy(rows).to(self.device, non_blocking=True))

    def batch(self, rows: Tensor) -> TrainingBatch:
        """Return one batch."""
        features, prediction, *maps = (item.index_select(0, rows) for item in self.shared.values())
        heatmap = self.heatmaps.index_select(0, (rows - self.num_id).clamp_(min=0))
        heatmap *= (rows >= self.num_id)[:, None, None, None]
        return TrainingBatch(features, prediction, heatmap, tuple(maps))


def copied(part: NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor of its own, not a view of a read-only map."""
    return torch.from_numpy(np.array(part)).to(device)


class StreamingFeed:
    """Batches out of memory-mapped shards: one thread fills a ring of (on a GPU.

    Pinned) buffers ahead of the step.
    """

    def __init__(self, data: TrainingSet, device: torch.device) -> None:
        self.data, self.device = data, device

    def batches(self, batches: list[Int64]) -> Iterator[TrainingBatch]:
        """Yield a batch for each array of rows."""
        size = max(map(len, batches), default=0)
        free: Queue[dict[str, Tensor]] = Queue()
        full: Queue[dict[str, Tensor] | BaseException] = Queue()
        stop = threading.Event()
        for _ in range(RING):
            free.put(self.buffers(size))

        def fill() -> None:
            try:
                for rows in batches:
                    buffers = free.get()
                    if stop.is_set():
                        return
                    full.put(self.read(rows, buffers))
            except BaseException as error:
                full.put(error)

        thread = threading.Thread(target=fill, name="reader", daemon=True)
        thread.start()
        try:
            for rows in batches:
                item = full.get()
                if isinstance(item, BaseException):
                    raise item
                yield self.on_device(item, len(rows))
                free.put(item)
        finally:
            stop.set()
            free.put({})
            thread.join()

    def buffers(self, size: int) -> dict[str, Tensor]:
        """Return one place of the ring."""
        columns = {name: self.data.id_columns[name] for name in self.data.names}
        columns["heatmap"] = self.data.ood_columns["heatmap"]
        return {
            name: torch.empty(
                (size, *rows.shape[1:]),
                dtype=torch.from_numpy(np.empty(0, rows.dtype)).dtype,
                pin_memory=self.device.type == "cuda",
            )
            for name, rows in columns.items()
        }

    def read(self, rows: Int64, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather rows into buffers."""
        is_id = rows < self.data.num_id
        id_places, ood_places = np.flatnonzero(is_id), np.flatnonzero(~is_id)
        ood_rows = rows[ood_places] - self.data.num_id
        for name in self.data.names:
            out = buffers[name].numpy()
            out[id_places] = self.data.id_columns[name].take(rows[id_places])
            out[ood_places] = self.data.ood_columns[name].take(ood_rows)
        out = buffers["heatmap"].numpy()
        out[id_places] = 0
        out[ood_places] = self.data.ood_columns["heatmap"].take(ood_rows)
        return buffers

    def on_device(self, buffers: dict[str, Tensor], count: int) -> TrainingBatch:
        """Return a filled place of the ring as a batch of its own on the device."""
        # a copy on the CPU too: the ring's place is filled again while the step may still hold it
        moved = {
            name: item[:count].to(self.device, non_blocking=True, copy=True)
            for name, item in buffers.items()
        }
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        heatmap, features, prediction = (
            moved.pop(name) for name in ("heatmap", "features", "prediction")
        )
        return TrainingBatch(features, prediction, heatmap, tuple(moved.values()))
