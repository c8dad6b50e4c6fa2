"""Cost of each part of a run as a function of its rows: ``benchmarks/scale.py [--rows N ...]``.

Runs of 10^4 to 10^7 OOD images (three rows of targets each) and as many ID images, at most the
1,281,167 of ImageNet, are laid out as sparse files (``sparse.py``). Each cost is measured in a
process of its own: ``scale.py --measure COST RUN FILES NUM_OOD`` prints it as JSON. Forward passes
and training steps are left out and all data are zeros, so that only the cost of the size remains.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import harness
import memory
import numpy as np
import sparse
import torch
from harness import Row, Setting

from ood_heatmap.cache import manifest as manifests
from ood_heatmap.cache.files import hash_file
from ood_heatmap.cache.manifest import MANIFEST
from ood_heatmap.cache.stamps import STAMPS
from ood_heatmap.images import ImageSet
from ood_heatmap.options import raise_descriptor_limit
from ood_heatmap.pipeline import feed, plan, targets, train, verify
from ood_heatmap.pipeline.config import TargetsConfig, TrainConfig
from ood_heatmap.pipeline.run import Index, Targets, open_index, open_targets, read_manifest
from ood_heatmap.pipeline.stage import _JOURNAL
from ood_heatmap.sources import open_images

ROWS = (10_000, 100_000, 1_000_000, 10_000_000)
_BATCH, _NUM_BATCHES = 200, 300
# a cost that takes longer is measured once
_LONG_SECONDS = 10.0
# a cost that would take more CPU time at the next size is not measured there
_MAX_CPU_SECONDS = 60.0
_CPU = torch.device("cpu")
# narrow: its arithmetic is not measured
_TRAIN = TrainConfig(epochs=1, batch_size=_BATCH, width=8, feed="streaming")


class _Reached(Exception):
    """Raised where work that is not measured would begin."""


@dataclass(frozen=True)
class Case:
    """A run of one size.

    Args:
        run: The run directory.
        folder: Folder of its image files.
        num_ood: Number of OOD images.
    """

    run: Path
    folder: Path
    num_ood: int

    def open(self) -> tuple[Index, Targets]:
        """Open both stages."""
        index = open_index(self.run)
        return index, open_targets(self.run, index)


@contextmanager
def _hashing() -> Iterator[None]:
    """Read every file that is hashed, and accept it: sparse files have no checksum."""

    def hash_all(path: Path) -> str:
        hash_file(path)
        return sparse.hash_small(path)

    with patch.object(manifests, "hash_file", hash_all):
        yield


@contextmanager
def _not_hashing() -> Iterator[None]:
    """Accept every checksum without reading the file, and what is stored of the OOD images."""
    with (
        patch.object(manifests, "hash_file", sparse.hash_small),
        patch.object(verify, "_check_presence", lambda *_: None),
    ):
        yield


@dataclass
class Stopwatch:
    """Measures the seconds of a block, per unit of work."""

    wall: float = 0.0
    cpu: float = 0.0
    units: int = 1

    def __enter__(self) -> "Stopwatch":
        self.start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = (time.perf_counter() - self.start[0]) / self.units
        self.cpu = (time.process_time() - self.start[1]) / self.units


def measure_listing(case: Case) -> Stopwatch:
    """Open a folder of so many files in class folders."""
    with Stopwatch() as watch:
        assert len(open_images(str(case.folder))) == case.num_ood
    return watch


def measure_open(case: Case) -> Stopwatch:
    """Open stages 1 and 2."""
    with _hashing(), Stopwatch() as watch:
        case.open()
    return watch


def measure_plan(case: Case) -> Stopwatch:
    """Plan stages 2 and 3 without their probes."""
    images = sparse.image_set(case.folder, case.num_ood)
    with (
        patch.object(plan, "_measure_embedding_rate", lambda *_: 1.0),
        patch.object(plan, "_measure_training_rate", lambda *_: 1.0),
        patch.object(Index, "classifier", MagicMock()),
        Stopwatch() as watch,
    ):
        plan.plan_targets(case.run, images, _CPU, TargetsConfig(patched=2.0))
        plan.plan_train(case.run, _CPU, _TRAIN)
    return watch


def measure_verify(case: Case) -> Stopwatch:
    """Verify all that ``verify`` does but reading every byte."""
    with _not_hashing(), Stopwatch() as watch:
        verify.verify(case.run, num_samples=2)
    return watch


def measure_resume(case: Case) -> Stopwatch:
    """Start stage 2 again when only its last shard is missing, until it would embed."""
    images, config = sparse.image_set(case.folder, case.num_ood), TargetsConfig(patched=2.0)
    if (case.run / "targets" / MANIFEST).is_file():
        _take_apart(case, images, config)
    with (
        _hashing(),
        patch.object(Index, "classifier", MagicMock()),
        patch.object(Index, "bank", MagicMock()),
        patch.object(targets, "embed", _embed_nothing),
        patch.object(targets, "BatchedClassifier", MagicMock()),
        contextlib.suppress(_Reached),
        Stopwatch() as watch,
    ):
        targets.build_targets(case.run, images, _CPU, config)
    return watch


def _take_apart(case: Case, images: ImageSet, config: TargetsConfig) -> None:
    """Turn finished targets into those of a process that was killed before the last shard."""
    with _not_hashing():
        stage = sparse.targets_stage(case.run, open_index(case.run), images, config)
        manifest = read_manifest(case.run, "targets")
    (stage.directory / STAMPS).rename(stage.directory / _JOURNAL.format(0))
    (stage.directory / MANIFEST).unlink()
    manifest.shard_paths(stage.directory)[-1].unlink()
    stage.prepare(overwrite=False)


def _embed_nothing(_: object, shards: Sequence[object], *__: object, **___: object) -> list[Any]:
    """Stand in for ``embed``: stop where an image would be embedded."""
    if shards:
        raise _Reached
    return []


def measure_train(case: Case) -> Stopwatch:
    """Start training, until the first batch reaches the step."""

    def step(_: object) -> None:
        raise _Reached

    with (
        _hashing(),
        patch.object(train, "make_step", lambda *_: ("eager", step)),
        patch.object(train, "measure_ceiling", lambda *_: 1.0),
        contextlib.suppress(_Reached),
        Stopwatch() as watch,
    ):
        train.train_decoder(case.run, _CPU, _TRAIN)
    shutil.rmtree(case.run / "decoder")
    return watch


def measure_order(case: Case) -> Stopwatch:
    """Draw the order of an epoch, batch by batch."""
    data = _training_set(case)
    with Stopwatch() as watch:
        deque(feed.iter_batches(len(data), _BATCH, 0, [0]), maxlen=0)
    return watch


def measure_batch(case: Case) -> Stopwatch:
    """Read batches of a few bytes a row: what finding the rows costs, without reading them.

    Bytes that nobody has written say nothing about a disk; ``feed.py`` reads real ones.
    """
    data = _training_set(case)
    id_column, ood_column = (
        columns["prediction"] for columns in (data.id_columns, data.ood_columns)
    )
    return _watch_batches(
        feed.TrainingSet(
            {"features": id_column, "prediction": id_column},
            {"features": ood_column, "prediction": ood_column, "heatmap": ood_column},
        )
    )


def _watch_batches(data: feed.TrainingSet) -> Stopwatch:
    """Time some batches of an epoch, after as many as a warm-up: it opens the shards."""
    reader = feed._BatchReader(data)
    slot = feed._allocate_ring(data, _CPU, _BATCH)[0]
    out = {name: item.numpy() for name, item in slot.items()}
    batches = feed.iter_batches(len(data), _BATCH, 0, count())
    watch = Stopwatch(units=_NUM_BATCHES)
    for _ in range(2):
        some = list(islice(batches, _NUM_BATCHES))
        with watch:
            for rows in some:
                reader.read(rows, out)
    return watch


def _training_set(case: Case) -> feed.TrainingSet:
    """Return the training set of a run, whose files are not checked."""
    with _not_hashing():
        index, opened = case.open()
    return feed.TrainingSet(index.columns, opened.columns, 1)


@dataclass(frozen=True)
class Cost:
    """What is measured.

    Args:
        title: Its line in the table.
        measure: Measures it in a process of its own.
        on_folder: It takes a folder of as many files, not a run.
    """

    title: str
    measure: Callable[[Case], Stopwatch]
    on_folder: bool = False


# in the order in which they are measured: `resume` takes the run apart
COSTS = {
    "list": Cost("list the OOD images in class folders", measure_listing, on_folder=True),
    "open": Cost("open index and targets", measure_open),
    "plan": Cost("`plan targets` and `plan train`, without their probes", measure_plan),
    "verify": Cost("`verify`, without reading every byte", measure_verify),
    "train": Cost("`train`, start to first step", measure_train),
    "order": Cost("order of an epoch, batch by batch", measure_order),
    "batch": Cost("reader: find the rows of a batch of 200", measure_batch),
    "resume": Cost("resume `targets`, to the first image", measure_resume),
}


@dataclass(frozen=True)
class Sample:
    """A cost at a size.

    Args:
        wall: Seconds.
        cpu: Seconds of CPU time, over all threads.
        resident: Peak bytes, pages of mapped files included.
        anonymous: Peak bytes of the process's own memory, without mapped files.
        measured: False if extrapolated in proportion from a tenth of the size.
    """

    wall: float
    cpu: float
    resident: float = 0.0
    anonymous: float = 0.0
    measured: bool = True

    def scaled(self, factor: float) -> "Sample":
        """Return the times of a run so many times as large, in proportion; no memory."""
        return Sample(self.wall * factor, self.cpu * factor, measured=False)


def measure(name: str, case: Case) -> Sample:
    """Measure a cost in a process of its own, which shows its memory."""
    command = [sys.executable, __file__, "--measure", name]
    command += [str(case.run), str(case.folder), str(case.num_ood)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Sample(*json.loads(output.splitlines()[-1]))


def measure_here(name: str, run: str, folder: str, num_ood: str) -> None:
    """Measure a cost in this process three times, or once if it takes long; print the medians."""
    raise_descriptor_limit()
    peak = [0]
    done = threading.Event()
    sampler = threading.Thread(target=_watch_memory, args=(peak, done), daemon=True)
    sampler.start()
    case = Case(Path(run), Path(folder), int(num_ood))
    times: list[tuple[float, float]] = []
    while len(times) < (1 if times and times[0][0] > _LONG_SECONDS else 3):
        watch = COSTS[name].measure(case)
        times.append((watch.wall, watch.cpu))
    done.set()
    sampler.join()
    print(json.dumps([*np.median(times, axis=0).tolist(), memory.peak(), peak[0]]))


def _watch_memory(peak: list[int], done: threading.Event) -> None:
    """Keep the largest anonymous memory seen; the kernel keeps no such peak."""
    while True:
        fields = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        peak[0] = max(peak[0], int(fields["RssAnon"].split()[0]) * 1024)
        if done.wait(0.02):
            return


# cost by name, by number of OOD images
Curve = dict[int, dict[str, Sample]]


def measure_all(scratch: Path, sizes: Sequence[int], only: Sequence[str]) -> Iterator[Curve]:
    """Yield the curve measured so far, after each cost of each size, from small to large.

    Args:
        scratch: A directory for sparse files.
        sizes: Numbers of OOD images, ascending.
        only: Names of costs.
    """
    curve: Curve = {}
    for number, size in enumerate(sizes):
        smaller = curve[sizes[number - 1]] if number else {}
        factor = size / sizes[number - 1] if number else 1.0
        skipped = {
            name: sample.scaled(factor)
            for name, sample in smaller.items()
            if sample.cpu * factor > _MAX_CPU_SECONDS or not sample.measured
        }
        curve[size] = skipped
        names = [name for name in COSTS if name in only and name not in skipped]
        case = Case(scratch / f"run-{size}", scratch / "files", size)
        if any(not COSTS[name].on_folder for name in names):
            sparse.make_run(case.run, case.folder, size)
        for name in names:
            if COSTS[name].on_folder:
                folder = sparse.make_folder(scratch / f"ood-{size}", case.folder, size)
                curve[size][name] = measure(name, Case(case.run, folder, size))
                shutil.rmtree(folder)
            else:
                curve[size][name] = measure(name, case)
            yield curve
        shutil.rmtree(case.run, ignore_errors=True)


def rows(setting: Setting) -> Iterator[Row]:
    """Compare the costs of the largest run with bars, and with those of smaller ones."""
    sizes = (1_000, 10_000) if setting.quick else (100_000, 1_000_000, 10_000_000)
    names = ("open", "train", "batch", "resume")
    *_, curve = measure_all(setting.scratch, sizes, names)
    small, middle, large = (curve[sizes[number]] for number in (0, -2, -1))
    ratio = large["batch"].cpu / small["batch"].cpu
    note = f"CPU time, {sizes[0]:,} and {sizes[-1]:,} OOD images"
    yield Row("reader: finding the rows of a batch", [ratio], 1.5, note, True)
    for name, sample, size, bar in (
        ("open", middle["open"], sizes[-2], 10.0),
        ("train", middle["train"], sizes[-2], 30.0),
        ("resume", large["resume"], sizes[-1], 120.0),
    ):
        note = f"{size:,} OOD images; CPU time {_format_seconds(sample.cpu)}"
        yield Row(f"seconds: {COSTS[name].title}", [sample.wall], bar, note, True)
    for name in ("open", "train"):
        ratio = large[name].anonymous / middle[name].anonymous
        note = f"{sizes[-2]:,} and {sizes[-1]:,} OOD images, without mapped files"
        yield Row(f"peak memory: {COSTS[name].title}", [ratio], 1.05, note, True)


def to_table(curve: Curve) -> str:
    """Return Markdown tables of times and of memory."""
    sizes = list(curve)
    head = "| | " + " | ".join(f"{size:,}" for size in sizes) + " |\n|---|" + "---|" * len(sizes)
    lines = [
        "OOD images: seconds (CPU seconds); in brackets what is in proportion to a tenth",
        head,
    ]
    names = [name for name in COSTS if any(name in samples for samples in curve.values())]
    for name in names:
        cells = [_format_times(curve[size].get(name)) for size in sizes]
        lines.append(f"| {COSTS[name].title} | " + " | ".join(cells) + " |")
    lines += ["", "Peak memory of the process in MB, without mapped files (with them)", head]
    for name in names:
        cells = [_format_memory(curve[size].get(name)) for size in sizes]
        lines.append(f"| {COSTS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _format_times(sample: Sample | None) -> str:
    if sample is None:
        return ""
    text = f"{_format_seconds(sample.wall)} ({_format_seconds(sample.cpu)})"
    return text if sample.measured else f"[{text}]"


def _format_seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{harness.figure(1000 * seconds)} ms"
    return f"{harness.figure(seconds)} s"


def _format_memory(sample: Sample | None) -> str:
    if sample is None or not sample.measured:
        return ""
    return f"{sample.anonymous / 1e6:.0f} ({sample.resident / 1e6:.0f})"


def main() -> None:
    """Measure the curve and write it to ``OUT.md`` and ``OUT.json``."""
    options = parse()
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": harness.hardware(_CPU),
        "versions": harness.versions(),
    }
    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.scratch) as scratch:
        start = time.perf_counter()
        for curve in measure_all(Path(scratch), sorted(options.rows), options.only or list(COSTS)):
            size, samples = list(curve.items())[-1]
            name, sample = list(samples.items())[-1]
            print(f"{size:,} {name}: {_format_times(sample)}", flush=True)
            content = {
                **about,
                "curve": {s: {n: asdict(x) for n, x in c.items()} for s, c in curve.items()},
            }
            options.out.with_suffix(".json").write_text(
                json.dumps(content, indent=1) + "\n", "utf-8"
            )
            options.out.with_suffix(".md").write_text(to_table(curve), "utf-8")
    print(to_table(curve))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=ROWS, help="numbers of OOD images (default: all)"
    )
    parser.add_argument("--only", action="append", choices=COSTS, help="this one; may be repeated")
    parser.add_argument("--scratch", type=Path, help="a directory for sparse files (2 GB)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "scale-results",
        help="write OUT.md and OUT.json (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure_here(*sys.argv[2:])
    else:
        main()
