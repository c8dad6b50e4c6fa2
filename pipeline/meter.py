"""How fast a stage is, how close that comes to the classifier alone, and what holds it back."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm import tqdm

from ood_heatmap.distributed import all_gather, is_main
from ood_heatmap.images import Batch, Unreadable
from ood_heatmap.pipeline.forward import BatchedClassifier

log = logging.getLogger(__name__)
Item = TypeVar("Item")
MAX_PROBE_SECONDS, PROBE_SHARE = 1.5, 0.2  # of the ceiling: at most, and of the stage's own time


@dataclass
class Meter:
    """Progress of a stage, what each part of it took, and what is worth saying at its end.

    Args:
        total: Images there are to do.
        label: Name of the stage.
        waited: Seconds the main loop waited for each part: ``decode``, ``embed``, ``search``,
            ``write``, ``finish``.
        busy: Seconds of work in the threads that decode and write.
        taken: Seconds that decoding kept the classifier from running on a core of its CPU.
        forward: The classifier as it was run.
    """

    total: int
    label: str
    done: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    skipped: list[Unreadable] = field(default_factory=list)
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    taken: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    forward: BatchedClassifier | None = None

    def __post_init__(self) -> None:
        self.bar = tqdm(
            total=self.total,
            desc=self.label,
            unit=" images",
            disable=None if is_main() and log.isEnabledFor(logging.INFO) else True,
            leave=False,
        )

    def add(self, batch: Batch, count: int) -> None:
        """Count a batch of ``count`` images asked for."""
        self.modes.update(batch.modes)
        self.notes.update(batch.notes)
        self.skipped.extend(batch.skipped)
        self.busy["decode"] += batch.seconds
        if self.forward is not None and not self.forward.on_gpu:
            self.taken += batch.cpu_seconds / self.forward.num_threads
        self.advance(count)

    def advance(self, count: int) -> None:
        """Count images."""
        self.done += count
        self.bar.update(count)

    @contextmanager
    def waiting(self, part: str) -> Iterator[None]:
        """Count the time of the block as spent on one part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited[part] += time.perf_counter() - started

    def each(self, items: Iterable[Item], part: str) -> Iterator[Item]:
        """Yield the items; waiting for the next one counts as spent on one part."""
        iterator, nothing = iter(items), object()
        while True:
            with self.waiting(part):
                item: Any = next(iterator, nothing)
            if item is nothing:
                return
            yield item

    def close(self) -> dict[str, Any]:
        """Say what all processes did, and return it; nothing in any but the first."""
        self.bar.close()
        everyone = all_gather(self.figures())
        return say(self.label, everyone) if is_main() else {}

    def figures(self) -> dict[str, Any]:
        """Return what this process did so far."""
        return {
            "images": self.done,
            "seconds": time.perf_counter() - self.started,
            "modes": self.modes,
            "notes": self.notes,
            "skipped": self.skipped,
            "waited": dict(self.waited),
            "busy": dict(self.busy),
            "taken": self.taken,
            "ceiling": 0.0,
        }


def report(meter: Meter) -> dict[str, Any]:
    """Say how fast all processes were, beside the classifier alone, and return it.

    The classifier alone is measured now, in every process at once: they may share a machine.

    Args:
        meter: Of this process; its clock ends here.
    """
    meter.bar.close()
    figures = meter.figures()
    all_gather(None)  # all begin together
    if meter.forward is not None:
        seconds = min(MAX_PROBE_SECONDS, PROBE_SHARE * figures["seconds"])
        figures["ceiling"] = meter.forward.rate(seconds)
    everyone = all_gather(figures)
    return say(meter.label, everyone) if is_main() else {}


def say(label: str, everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """Say in words what all processes did together, and return the figures."""
    modes: Counter[str] = sum((one["modes"] for one in everyone), Counter())
    if modes:
        kinds = ", ".join(f"{count} {mode}" for mode, count in sorted(modes.items()))
        log.warning("%s: converted to RGB: %s", label, kinds)
    notes: Counter[str] = sum((one["notes"] for one in everyone), Counter())
    for note, count in sorted(notes.items()):
        log.warning("%s: %s: %d images", label, note, count)
    num_skipped = sum(len(one["skipped"]) for one in everyone)
    if num_skipped:
        log.warning("%s: skipped %d unreadable images", label, num_skipped)
    figures = together(everyone)
    if figures["images"]:
        log.info("%s: %s", label, in_words(figures))
    return figures


def together(everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all processes as one: what was waited for is their mean."""
    images = sum(one["images"] for one in everyone)
    seconds = max(one["seconds"] for one in everyone)
    figures = {
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
        "processes": len(everyone),
    }
    for kind in ("waited", "busy"):
        parts = sorted(set().union(*(one[kind] for one in everyone)))
        figures[kind] = {
            part: mean([one[kind].get(part, 0.0) for one in everyone]) for part in parts
        }
    ceiling = sum(one["ceiling"] for one in everyone)
    if ceiling:
        figures["ceiling_images_per_second"] = round(ceiling, 1)
        figures["share_of_ceiling"] = round(images / seconds / ceiling, 4)
        taken = mean([one["taken"] for one in everyone])
        part, lost = held_back_by(figures["waited"], images / ceiling, taken)
        figures |= {"held_back_by": part, "held_back_seconds": round(lost, 3)}
    return figures


def mean(seconds: list[float]) -> float:
    """Return the mean to a millisecond."""
    return round(sum(seconds) / len(seconds), 3)


def held_back_by(waited: dict[str, float], alone: float, taken: float) -> tuple[str, float]:
    """Return the part that cost the most, and how many seconds.

    Of the classifier only what is beyond the ``alone`` seconds that it needs, and beyond what
    decoding has ``taken`` of its cores.
    """
    cost = {
        **waited,
        "embed": waited.get("embed", 0.0) - alone - taken,
        "decode": waited.get("decode", 0.0) + taken,
    }
    part = max(cost, key=lambda part: cost[part])
    return part, cost[part]


def in_words(figures: dict[str, Any]) -> str:
    """Return the one line for the figures of a stage."""
    rate = figures["images_per_second"]
    text = f"{figures['images']} images in {figures['seconds']:.1f} s, {rate:.0f} images/s"
    if "ceiling_images_per_second" not in figures:
        return text
    return (
        f"{text}, {figures['share_of_ceiling']:.0%} of the classifier alone "
        f"({figures['ceiling_images_per_second']:.0f} images/s); held back by "
        f"{figures['held_back_by']} ({figures['held_back_seconds']:.1f} s)"
    )
