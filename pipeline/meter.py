"""Time accounting of a stage: wait times, throughput and its bottleneck."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ood_heatmap.decoding import Batch, Unreadable
from ood_heatmap.distributed import all_gather, is_main
from ood_heatmap.pipeline.progress import Progress, format_rate

log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
# duration of the ceiling measurement: its maximum, and its share of the stage's own time
_MAX_PROBE_SECONDS, _PROBE_SHARE = 1.5, 0.2


@dataclass
class Meter:
    """Progress and time accounting of a stage.

    Args:
        total: Images to process.
        label: Name of the stage.
        done: Images processed so far.
        modes: Number of images converted to RGB, by original mode.
        notes: Number of images with another peculiarity, by description.
        skipped: Images skipped as unreadable.
        wait_seconds: Seconds that the main loop waited, by phase: ``decode``, ``embed``,
            ``search``, ``write``, ``finish``.
        thread_seconds: Seconds of work in the decoding and writing threads.
        stolen_seconds: Seconds that decoding took from the classifier's cores on a CPU.
        started: Start time of the stage, from ``time.perf_counter``.
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
        self.progress = Progress(self.total, self.label)

    def add(self, batch: Batch, *, stolen_seconds: float = 0.0) -> None:
        """Count a decoded batch.

        Args:
            batch: The batch.
            stolen_seconds: Seconds that decoding it took from the classifier's cores.
        """
        self.modes.update(batch.modes)
        self.notes.update(batch.notes)
        self.skipped.extend(batch.skipped)
        self.thread_seconds["decode"] += batch.seconds
        self.stolen_seconds += stolen_seconds
        count = len(batch.rows) + len(batch.skipped)
        self.done += count
        self.progress.update(count)

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to the wait time of a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.wait_seconds[phase] += time.perf_counter() - started

    def iter_timed(self, items: Iterable[_Item], phase: str) -> Iterator[_Item]:
        """Yield the items; add the time to get each one to the wait time of a phase."""
        iterator, sentinel = iter(items), object()
        while True:
            with self.waiting(phase):
                item: Any = next(iterator, sentinel)
            if item is sentinel:
                return
            yield item

    def close(self, ceiling: Callable[[float], float] | None = None) -> dict[str, Any]:
        """Log the totals over all ranks and return them (``{}`` except on rank 0).

        Args:
            ceiling: Measures images/s of the classifier alone over the given seconds. It is called
                on all ranks simultaneously, as they may share a machine.
        """
        self.progress.close()
        stats = self.stats()
        if ceiling is not None:
            # a barrier: all ranks start measuring together
            all_gather(None)
            seconds = min(_MAX_PROBE_SECONDS, _PROBE_SHARE * stats["seconds"])
            stats["ceiling"] = ceiling(seconds)
        ranks = all_gather(stats)
        return _log_summary(self.label, ranks) if is_main() else {}

    def stats(self) -> dict[str, Any]:
        """Return the stats of this rank so far."""
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
    """Log and return the merged stats of all ranks."""
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
        measured = any(stats["ceiling"] for stats in ranks)
        log.info("%s: %s", label, _format_summary(merged, measured=measured))
    return merged


def _merge_ranks(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the stats of all ranks: counts are summed, times averaged."""
    images = sum(stats["images"] for stats in ranks)
    seconds = max(stats["seconds"] for stats in ranks)
    ceiling = sum(stats["ceiling"] for stats in ranks)
    merged: dict[str, Any] = {**throughput(images, seconds, ceiling), "processes": len(ranks)}
    for kind in ("wait_seconds", "thread_seconds"):
        phases = sorted(set().union(*(stats[kind] for stats in ranks)))
        merged[kind] = {
            phase: _mean([stats[kind].get(phase, 0.0) for stats in ranks]) for phase in phases
        }
    if "share_of_ceiling" in merged:
        stolen = _mean([stats["stolen_seconds"] for stats in ranks])
        phase, cost = _find_bottleneck(merged["wait_seconds"], images / ceiling, stolen)
        merged |= {"bottleneck": phase, "bottleneck_seconds": round(cost, 3)}
    return merged


def throughput(images: int, seconds: float, ceiling: float) -> dict[str, Any]:
    """Return images, seconds, images/s and, if it could be measured, the share of a ceiling.

    A ceiling below the rate itself is none: other work took the device while it was measured.

    Args:
        images: Number of images processed.
        seconds: The time they took.
        ceiling: Images/s of the computation alone, 0 if it was not measured.
    """
    rate = images / seconds
    stats = {
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(rate, 1),
    }
    if rate > ceiling:
        return stats
    return {
        **stats,
        "ceiling_images_per_second": round(ceiling, 1),
        "share_of_ceiling": round(rate / ceiling, 4),
    }


def _mean(seconds: list[float]) -> float:
    """Return the mean, rounded to milliseconds."""
    return round(sum(seconds) / len(seconds), 3)


def _find_bottleneck(
    wait_seconds: dict[str, float], alone: float, stolen: float
) -> tuple[str, float]:
    """Return the phase that cost the most time, and its seconds.

    Args:
        wait_seconds: Wait time by phase.
        alone: Seconds that the classifier alone needs; only the excess counts as ``embed``.
        stolen: Seconds that decoding took from the classifier's cores; counted as ``decode``.
    """
    cost = {
        **wait_seconds,
        "embed": wait_seconds.get("embed", 0.0) - alone - stolen,
        "decode": wait_seconds.get("decode", 0.0) + stolen,
    }
    phase = max(cost, key=lambda phase: cost[phase])
    return phase, cost[phase]


def _format_summary(stats: dict[str, Any], *, measured: bool = False) -> str:
    """Format the stats of a stage as one line.

    Args:
        stats: Merged stats.
        measured: The classifier alone was measured, if not always with success.
    """
    rate = format_rate(stats["images_per_second"])
    text = f"{stats['images']} images in {stats['seconds']:.1f} s, {rate}"
    if "share_of_ceiling" not in stats:
        return f"{text}{', the classifier alone could not be measured' if measured else ''}"
    return (
        f"{text}, {stats['share_of_ceiling']:.0%} of the classifier alone "
        f"({format_rate(stats['ceiling_images_per_second'])}); bottleneck: "
        f"{stats['bottleneck']} ({stats['bottleneck_seconds']:.1f} s)"
    )
