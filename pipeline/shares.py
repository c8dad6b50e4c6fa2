"""What the processes of stages 1 and 2 share: which shards are left, who makes them, the lock."""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.cache.files import locked, require_space
from ood_heatmap.cache.manifest import Manifest, Stage, fingerprint_of
from ood_heatmap.cache.shards import map_shard, read_attributes, write_shard
from ood_heatmap.distributed import from_main, is_main, rank, world_size
from ood_heatmap.errors import StaleCacheError
from ood_heatmap.images import ImageSet
from ood_heatmap.pipeline.meter import Meter

log = logging.getLogger(__name__)
Int64 = NDArray[np.int64]
Work = tuple[Path, Int64]  # path and rows of a shard to be made


def content_of(digests: bytes) -> str:
    """Return the hash of a shard's images from the hash of each."""
    return hashlib.sha256(digests).hexdigest()


def split_rows(rows: Int64, bytes_per_row: int, shard_mb: int, batch_size: int) -> list[Int64]:
    """Split rows into shards of about ``shard_mb`` megabytes, whole batches each.

    The same for any number of processes, so that they can share the work shard by shard.
    """
    return whole_batches(rows, shard_mb * 1_000_000 // bytes_per_row, batch_size)


def whole_batches(rows: Int64, size: int, batch_size: int) -> list[Int64]:
    """Split rows into pieces of about ``size``, whole batches each: the same in any process."""
    size = max(batch_size, size // batch_size * batch_size)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextmanager
def sole_writer(run: Path) -> Iterator[None]:
    """Hold a run's lock in the first process, for all that share the work."""
    with locked(run) if is_main() else nullcontext():
        yield


def begin(
    stage: Stage,
    images: ImageSet,
    shards: Mapping[str, Sequence[Int64]],
    bytes_per_row: int,
    *,
    overwrite: bool,
) -> tuple[Manifest | None, dict[str, list[Work]]]:
    """Begin a stage, or take it up where it was, and share what is left among all processes.

    The first process looks; the shards still to be made are dealt out one by one.

    Args:
        stage: To be begun.
        images: The set.
        shards: What the shards' names begin with, to the rows of each shard.
        bytes_per_row: Bytes of one image in a shard.
        overwrite: Discard what was made from something else.

    Returns:
        The manifest when nothing is left to do, otherwise None; and this process's own shards, by
        the beginning of their names.

    Raises:
        OodHeatmapError: The stage was made from something else, or the disk is too small.
    """
    everything = [
        (prefix, (stage.directory / f"{prefix}-{number:05d}.h5", rows))
        for prefix, parts in shards.items()
        for number, rows in enumerate(parts)
    ]
    works = [work for _, work in everything]
    finished, left = from_main(
        look(stage, images, works, bytes_per_row, overwrite) if is_main() else (None, [])
    )
    if finished is not None and not left:
        log.info("%s is finished already", stage.directory)
        return finished, {}
    mine = [everything[number] for number in left[rank() :: world_size()]]
    return None, {name: [work for prefix, work in mine if prefix == name] for name in shards}


def look(
    stage: Stage, images: ImageSet, works: Sequence[Work], bytes_per_row: int, overwrite: bool
) -> tuple[Manifest | None, list[int]]:
    """Return the manifest of a finished stage, and which of its shards are still to be made."""
    finished = stage.begin(overwrite=overwrite)
    left = unfinished(stage, images, works)
    num_rows = sum(len(works[number][1]) for number in left)
    if left:
        megabytes = num_rows * bytes_per_row / 1e6
        log.info("%s: will write %d rows, %.0f MB", stage.name, num_rows, megabytes)
    require_space(stage.run, num_rows * bytes_per_row)
    return finished, left


def unfinished(stage: Stage, images: ImageSet, works: Sequence[Work]) -> list[int]:
    """Return which shards are still to be made.

    Raises:
        StaleCacheError: The images of a finished shard have changed since.
    """
    left = []
    for number, (path, rows) in enumerate(works):
        attributes = read_attributes(path) if path.is_file() else {}
        if attributes.get("fingerprint") != stage.settings_fingerprint:
            left.append(number)
        elif attributes["content"] != content_now(images, map_shard(path)["row"]):
            raise StaleCacheError(
                f"{path} was made from other images (images.content differs in rows {rows[0]} to "
                f"{rows[-1]} "
                f"of {images.source}). Add --overwrite to make this stage again."
            )
    done = len(works) - len(left)
    if done:
        log.info("%s: %d of %d shards are there already", stage.directory, done, len(works))
    return left


def content_now(images: ImageSet, rows: Int64) -> str:
    """Return the hash of images as they are now."""
    return content_of(b"".join(images.digest(int(row)) for row in rows))


def content_of_stage(paths: Sequence[Path]) -> str:
    """Return the hash of all images of a stage from its shards."""
    return fingerprint_of([read_attributes(path)["content"] for path in paths])


class Writer:
    """Writes shards one behind the other while the next is computed.

    An error shows at the next call.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.pool = ThreadPoolExecutor(1)
        self.last: Future[None] | None = None

    def write(
        self,
        path: Path,
        arrays: dict[str, NDArray[Any]],
        attributes: Mapping[str, str | int],
        notes: Mapping[str, Mapping[str, str | float]],
    ) -> None:
        """Write one shard after the one before."""
        self.wait()
        self.last = self.pool.submit(self.write_now, path, arrays, attributes, notes)

    def write_now(
        self,
        path: Path,
        arrays: dict[str, NDArray[Any]],
        attributes: Mapping[str, str | int],
        notes: Mapping[str, Mapping[str, str | float]],
    ) -> None:
        """Write one shard, and count the time that it takes."""
        started = time.perf_counter()
        write_shard(path, arrays, attributes=attributes, notes=notes)
        self.meter.busy["write"] += time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the shard in writing."""
        with self.meter.waiting("write"):
            if self.last is not None:
                self.last.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        # whatever went wrong: what was computed is kept
        self.wait()
        self.pool.shutdown()
