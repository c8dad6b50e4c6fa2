"""Images through the classifier: decoding runs ahead in threads, and whole shards come out."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ood_heatmap.cache.files import locked, require_space
from ood_heatmap.cache.manifest import Manifest, Stage, fingerprint_of
from ood_heatmap.cache.shards import map_shard, read_attributes, write_shard
from ood_heatmap.classifier import Classifier, Output, check_finite
from ood_heatmap.distributed import from_main, is_main, rank, world_size
from ood_heatmap.errors import OodHeatmapError, StaleCacheError
from ood_heatmap.images import Batch, ImageSet, Transform, batches

log = logging.getLogger(__name__)
Int64 = NDArray[np.int64]
Work = tuple[Path, Int64]  # path and rows of a shard to be made


@dataclass(frozen=True)
class Embedded:
    """Images of one shard with all that the classifier says of them, on the host.

    Args:
        rows: ``(B,)`` int64 rows of the set.
        images: ``(B, 3, H, W)`` uint8.
        features: ``(B, D)`` float32.
        logits: ``(B, L)`` float32.
        maps: Feature maps ``(B, C, h, w)`` float16, the deepest first.
        content: sha256 of the images' bytes.
    """

    rows: Int64
    images: NDArray[np.uint8]
    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    maps: tuple[NDArray[np.float16], ...]
    content: str

    @property
    def prediction(self) -> NDArray[np.int32]:
        """``(B,)`` int32 predicted classes."""
        prediction: NDArray[np.int32] = self.logits.argmax(axis=1).astype(np.int32)
        return prediction


@dataclass
class Meter:
    """Progress of a stage, and what is worth saying at its end."""

    total: int
    label: str
    done: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.bar = tqdm(
            total=self.total,
            desc=self.label,
            unit=" images",
            disable=None if is_main() else True,
            leave=False,
        )

    def add(self, batch: Batch, count: int) -> None:
        """Count a batch of ``count`` images asked for."""
        self.modes.update(batch.modes)
        self.skipped.extend(batch.skipped)
        self.advance(count)

    def advance(self, count: int) -> None:
        """Count images."""
        self.done += count
        self.bar.update(count)

    def close(self) -> dict[str, Any]:
        """Say what happened, and return it."""
        self.bar.close()
        seconds = time.perf_counter() - self.started
        rate = self.done / seconds
        if self.modes:
            kinds = ", ".join(f"{count} {mode}" for mode, count in sorted(self.modes.items()))
            log.warning("%s: converted to RGB: %s", self.label, kinds)
        if self.skipped:
            log.warning("%s: skipped %d unreadable images", self.label, len(self.skipped))
        if self.done:
            log.info("%s: %d images in %.1f s, %.0f images/s", self.label, self.done, seconds, rate)
        return {
            "images": self.done,
            "seconds": round(seconds, 3),
            "images_per_second": round(rate, 1),
        }


def classify(classifier: Classifier, images: NDArray[np.uint8], batch_size: int) -> Output:
    """Classify a batch, padded to ``batch_size`` so that no result depends on how many came along.

    When the device runs out of memory the batch is halved, again and again, and that is said.
    """
    num_images, step = len(images), batch_size
    outputs: list[Output] = []
    start = 0
    while start < num_images:
        piece = torch.from_numpy(images[start : start + step])
        padded = torch.zeros((step, *piece.shape[1:]), dtype=torch.uint8)
        padded[: len(piece)] = piece
        try:
            outputs.append(trim(classifier(padded.to(classifier.device)), len(piece)))
        except torch.OutOfMemoryError:
            if step == 1:
                raise OodHeatmapError(
                    f"{classifier.device} has no memory for a single image. Use --device cpu."
                ) from None
            step = step // 2
            log.warning("out of memory on %s: going on with batches of %d", classifier.device, step)
            continue
        start += step
    return outputs[0] if len(outputs) == 1 else joined(outputs)


def trim(output: Output, count: int) -> Output:
    """Return the first rows of an output, on the host; feature maps as float16."""
    maps = tuple(item[:count].to(torch.float16).cpu() for item in output.maps)
    return Output(output.features[:count].cpu(), output.logits[:count].cpu(), maps)


def joined(outputs: Sequence[Output]) -> Output:
    """Return several outputs as one."""
    maps = zip(*(item.maps for item in outputs), strict=True)
    return Output(
        torch.cat([item.features for item in outputs]),
        torch.cat([item.logits for item in outputs]),
        tuple(torch.cat(item) for item in maps),
    )


def embed(
    images: ImageSet,
    shards: Sequence[Int64],
    classifier: Classifier,
    meter: Meter,
    *,
    batch_size: int,
    workers: int,
    skip_unreadable: bool,
    transform: Transform | None = None,
) -> Iterator[Embedded]:
    """Yield the images of each shard with their embedding.

    Decoding goes on across the shards' borders.

    Args:
        images: The set.
        shards: Rows of each shard, ascending.
        classifier: On its device.
        meter: Counts what was read.
        batch_size: Images the classifier takes at once.
        workers: Threads that decode.
        skip_unreadable: Leave unreadable images out.
        transform: The classifier's when None.

    Raises:
        OodHeatmapError: An image is unreadable, features are not finite, or no image of a shard is
            left.
    """
    split = [
        [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        for rows in shards
    ]
    decoded = batches(
        images,
        [piece for pieces in split for piece in pieces],
        transform or classifier.config.transform,
        workers=workers,
        skip_unreadable=skip_unreadable,
    )
    for pieces in split:
        taken: list[Batch] = []
        outputs: list[Output] = []
        for piece, batch in zip(pieces, islice(decoded, len(pieces)), strict=True):
            if len(batch.rows):
                taken.append(batch)
                outputs.append(classify(classifier, batch.pixels, batch_size))
                check_finite(outputs[-1].features.numpy(), batch.rows, images.names)
            meter.add(batch, len(piece))
        if not taken:
            raise OodHeatmapError(
                f"none of {len(pieces[0])} images in a row of {images.source} is readable."
            )
        output = joined(outputs)
        yield Embedded(
            rows=np.concatenate([batch.rows for batch in taken]),
            images=np.concatenate([batch.pixels for batch in taken]),
            features=output.features.numpy(),
            logits=output.logits.numpy(),
            maps=tuple(item.numpy() for item in output.maps),
            content=content_of(b"".join(batch.digests for batch in taken)),
        )


def content_of(digests: bytes) -> str:
    """Return the hash of a shard's images from the hash of each."""
    return hashlib.sha256(digests).hexdigest()


def split_rows(rows: Int64, bytes_per_row: int, shard_mb: int, batch_size: int) -> list[Int64]:
    """Split rows into shards of about ``shard_mb`` megabytes, whole batches each.

    The same for any number of processes, so that they can share the work shard by shard.
    """
    per_shard = max(1, shard_mb * 1_000_000 // bytes_per_row)
    per_shard = max(batch_size, per_shard // batch_size * batch_size)
    return [rows[start : start + per_shard] for start in range(0, len(rows), per_shard)]


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

    def __init__(self) -> None:
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
        self.last = self.pool.submit(write_shard, path, arrays, attributes=attributes, notes=notes)

    def wait(self) -> None:
        """Wait for the shard in writing."""
        if self.last is not None:
            self.last.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        # whatever went wrong: what was computed is kept
        self.pool.shutdown(wait=True)
        self.wait()
