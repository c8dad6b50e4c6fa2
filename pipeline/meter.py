"""Progress of a stage, where its time goes, and how close it comes to the classifier alone."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm import tqdm

from ood_heatmap.distributed import all_gather, is_main
from ood_heatmap.images import Batch, Unreadable

log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
# how long the ceiling is measured: at most, and as a share of the stage's own time
_MAX_PROBE_SECONDS, _PROBE_SHARE = 1.5, 0.2


@dataclass
class Meter:
    """Progress bar and time accounting of a stage.

    Args:
        total: Images to process.
        label: Name of the stage.
        done: Images processed.
        modes: Images converted to RGB, by their mode.
        notes: Images with something else to be said of them, by what it is.
        skipped: Images left out as unreadable.
        wait_seconds: Seconds that the main loop waited for each part: ``decode``, ``embed``,
            ``search``, ``write``, ``finish``.
        thread_seconds: Seconds of work in the threads that decode and write.
        stolen_seconds: Seconds for which decoding kept the classifier from all cores of a CPU.
        started: When the stage started.
    """

    total: int
    label: str
    done: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    skipped: list[Unreadable] = field(default_factory=list)
    wait_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    thread_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stolen_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.bar = tqdm(
            total=self.total,
            desc=self.label,
            unit=" images",
            disable=None if is_main() and log.isEnabledFor(logging.INFO) else True,
            leave=False,
        )

    def add(self, batch: Batch, *, stolen_seconds: float = 0.0) -> None:
        """Count a decoded batch.

        Args:
            batch: The batch.
            stolen_seconds: For which decoding it kept the classifier from all cores.
        """
        self.modes.update(batch.modes)
        self.notes.update(batch.notes)
        self.skipped.extend(batch.skipped)
        self.thread_seconds["decode"] += batch.seconds
        self.stolen_seconds += stolen_seconds
        count = len(batch.rows) + len(batch.skipped)
        self.done += count
        self.bar.update(count)

    @contextmanager
    def waiting(self, part: str) -> Iterator[None]:
        """Count the time of the block as spent on one part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.wait_seconds[part] += time.perf_counter() - started

    def each(self, items: Iterable[_Item], part: str) -> Iterator[_Item]:
        """Yield the items; waiting for the next one counts as spent on one part."""
        iterator, nothing = iter(items), object()
        while True:
            with self.waiting(part):
                item: Any = next(iterator, nothing)
            if item is nothing:
                return
            yield item

    def close(self, ceiling: Callable[[float], float] | None = None) -> dict[str, Any]:
        """Log the totals over all ranks and return them (``{}`` except on rank 0).

        Args:
            ceiling: Returns the images/s of the classifier alone, measured over some seconds. It
                is called on all ranks at once, as they may share a machine.
        """
        self.bar.close()
        stats = self.stats()
        if ceiling is not None:
            all_gather(None)
            seconds = min(_MAX_PROBE_SECONDS, _PROBE_SHARE * stats["seconds"])
            stats["ceiling"] = ceiling(seconds)
        ranks = all_gather(stats)
        return _log_summary(self.label, ranks) if is_main() else {}

    def stats(self) -> dict[str, Any]:
        """Return what this rank did so far."""
        return {
            "images": self.done,
            "seconds": time.perf_counter() - self.started,
            "modes": self.modes,
            "notes": self.notes,
            "skipped": self.skipped,
            "wait_seconds": dict(self.wait_seconds),
            "thread_seconds": dict(self.thread_seconds),
            "stolen_seconds": self.stolen_seconds,
            "ceiling": 0.0,
        }


def _log_summary(label: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Log what all ranks did together, and return it."""
    modes: Counter[str] = sum((stats["modes"] for stats in ranks), Counter())
    if modes:
        kinds = ", ".join(f"{count} {mode}" for mode, count in sorted(modes.items()))
        log.warning("%s: converted to RGB: %s", label, kinds)
    notes: Counter[str] = sum((stats["notes"] for stats in ranks), Counter())
    for note, count in sorted(notes.items()):
        log.warning("%s: %s: %d images", label, note, count)
    num_skipped = sum(len(stats["skipped"]) for stats in ranks)
    if num_skipped:
        log.warning("%s: skipped %d unreadable images", label, num_skipped)
    merged = _merge_ranks(ranks)
    if merged["images"]:
        log.info("%s: %s", label, _format_summary(merged))
    return merged


def _merge_ranks(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the stats of all ranks as one: counts are summed, wait times averaged."""
    images = sum(stats["images"] for stats in ranks)
    seconds = max(stats["seconds"] for stats in ranks)
    merged = {
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
        "processes": len(ranks),
    }
    for kind in ("wait_seconds", "thread_seconds"):
        parts = sorted(set().union(*(stats[kind] for stats in ranks)))
        merged[kind] = {
            part: _mean([stats[kind].get(part, 0.0) for stats in ranks]) for part in parts
        }
    ceiling = sum(stats["ceiling"] for stats in ranks)
    if ceiling:
        merged["ceiling_images_per_second"] = round(ceiling, 1)
        merged["share_of_ceiling"] = round(images / seconds / ceiling, 4)
        stolen = _mean([stats["stolen_seconds"] for stats in ranks])
        part, lost = _find_bottleneck(merged["wait_seconds"], images / ceiling, stolen)
        merged |= {"bottleneck": part, "bottleneck_seconds": round(lost, 3)}
    return merged


def _mean(seconds: list[float]) -> float:
    """Return the mean to a millisecond."""
    return round(sum(seconds) / len(seconds), 3)


def _find_bottleneck(
    wait_seconds: dict[str, float], alone: float, stolen: float
) -> tuple[str, float]:
    """Return the part that cost the most, and its seconds.

    Args:
        wait_seconds: By part.
        alone: Seconds that the classifier alone needs; only what is beyond them counts as
            ``embed``.
        stolen: Seconds that decoding took from the classifier's cores: they count as decoding.
    """
    cost = {
        **wait_seconds,
        "embed": wait_seconds.get("embed", 0.0) - alone - stolen,
        "decode": wait_seconds.get("decode", 0.0) + stolen,
    }
    part = max(cost, key=lambda part: cost[part])
    return part, cost[part]


def _format_summary(stats: dict[str, Any]) -> str:
    """Return the stats of a stage as one line."""
    rate = stats["images_per_second"]
    digits = 0 if rate >= 10 else 1
    text = f"{stats['images']} images in {stats['seconds']:.1f} s, {rate:.{digits}f} images/s"
    if "ceiling_images_per_second" not in stats:
        return text
    return (
        f"{text}, {stats['share_of_ceiling']:.0%} of the classifier alone "
        f"({stats['ceiling_images_per_second']:.0f} images/s); bottleneck: "
        f"{stats['bottleneck']} ({stats['bottleneck_seconds']:.1f} s)"
    )
