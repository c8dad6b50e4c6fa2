"""Stages 1 and 2 as a whole, against their upper bound: the throughput of the classifier."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import data
import numpy as np
import torch
from harness import Row, Setting, interleaved, quotients
from PIL import Image

from ood_heatmap import decoding
from ood_heatmap.cache.neighbours import Bank, Nearest
from ood_heatmap.classifier import Classifier
from ood_heatmap.cores import num_cores
from ood_heatmap.decoding import iter_batches
from ood_heatmap.images import ImageSet, Transform
from ood_heatmap.pipeline.config import IndexConfig, TargetsConfig
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.run import Index, open_index
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images

BATCH = IndexConfig.batch_size
BAR_ARRAYS, BAR_FILES, BAR_SEARCH = 0.85, 0.95, 0.05
NUM_OOD_OF_PAPER = 10_000


def rows(setting: Setting) -> Iterator[Row]:
    """Measure with arrays and with PNG files, then the share of the search in stage 2."""
    kind = data.SMALL if setting.quick else data.RESNET18
    classifier = data.make_classifier(kind, setting.scratch).to(setting.device)
    num_images = setting.pick(quick=2 * BATCH, cpu=6 * BATCH, gpu=192 * BATCH)
    about = f"{kind} with random weights, {num_images:,} images of 32 px, {setting.device.type}"
    arrays = [from_array(data.random_images(num_images, seed)) for seed in (1, 2)]
    yield from compare(setting, "arrays", Stages(setting, classifier, *arrays), about)
    folders = [data.write_pngs(setting.scratch / f"png{seed}", num_images, seed) for seed in (1, 2)]
    files = [open_images(str(folder)) for folder in folders]
    yield from compare(setting, "PNG files", Stages(setting, classifier, *files), about)
    yield search_share(setting, Stages(setting, classifier, *arrays), about)
    yield processes_against_threads(setting)


@dataclass(frozen=True)
class Stages:
    """The timed functions, each of which returns the number of images it processed."""

    setting: Setting
    classifier: Classifier
    id_images: ImageSet
    ood_images: ImageSet

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.setting.scratch / "run"

    def forward(self) -> int:
        """Run the classifier as the stages do, on images that are already on its device."""
        forward = BatchedClassifier(self.classifier, BATCH)
        batch = torch.from_numpy(data.random_images(forward.size, seed=0))
        images, passes = batch.to(self.classifier.device), len(self.ood_images) // forward.size
        forward.repeat(images, passes)
        return passes * forward.size

    def decode(self) -> int:
        """Decode all images, without the classifier."""
        chunks = np.array_split(np.arange(len(self.ood_images)), len(self.ood_images) // BATCH)
        transform = self.classifier.config.transform
        for _ in iter_batches(
            self.ood_images, chunks, transform, workers=IndexConfig().num_workers
        ):
            pass
        return len(self.ood_images)

    def index(self) -> int:
        """Run stage 1 from scratch; stage 2 uses its run."""
        shutil.rmtree(self.run, ignore_errors=True)
        build_index(self.run, self.id_images, self.classifier, IndexConfig())
        return len(self.id_images)

    def targets(self, patched: float = 0.5) -> int:
        """Run stage 2 from scratch; patched images count as well."""
        shutil.rmtree(self.run / "targets", ignore_errors=True)
        config = TargetsConfig(patched=patched)
        build_targets(self.run, self.ood_images, self.setting.device, config)
        return len(self.ood_images) + round(patched * len(self.ood_images))


def compare(setting: Setting, kind: str, stages: Stages, about: str) -> Iterator[Row]:
    """Compare both stages with the slower of decoding and classifier (arrays: the classifier)."""
    variants: dict[str, Callable[[], int]] = {"forward": stages.forward, "decode": stages.decode}
    variants |= {"index": stages.index, "targets": stages.targets}
    # each stage ends with 1 to 2 seconds of measuring the classifier, too much of so short a run
    with patch.object(BatchedClassifier, "rate", lambda *_: 0.0):
        times = interleaved(variants, setting.windows, setting.device)
    forward, decode = (np.array(times[name].wall) for name in ("forward", "decode"))
    share = f"decoding takes {np.median(decode / forward):.2g} of the classifier's time"
    from_files = kind != "arrays"
    floor = np.maximum(forward, decode).tolist() if from_files else forward.tolist()
    against = "the slower of decoding and classifier" if from_files else "the classifier alone"
    for name in ("index", "targets"):
        ratios = quotients(floor, times[name].wall)
        bar = BAR_FILES if from_files else BAR_ARRAYS
        yield Row(
            f"{name} from {kind}: share of the speed of {against}", ratios, bar, f"{about}; {share}"
        )


class Stopwatch:
    """Wraps the search and accumulates its wall time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.nearest = Bank.nearest

    def __call__(self, bank: Bank, *arguments: object) -> Nearest:
        """Search, and add the wall time."""
        start = time.perf_counter()
        try:
            return self.nearest(bank, *arguments)  # type: ignore[arg-type]
        finally:
            self.seconds += time.perf_counter() - start


def search_share(setting: Setting, stages: Stages, about: str) -> Row:
    """Measure the share of the search in stage 2, with a bank of the size of CIFAR-10."""
    stages.index()
    num_bank = setting.pick(quick=5_000, cpu=50_000)
    start = time.perf_counter()
    bank = large_bank(open_index(stages.run), num_bank, setting.device)
    built = time.perf_counter() - start
    shares, whole = [], []
    for _ in range(setting.windows):
        watch = Stopwatch()
        timed = lambda bank, *arguments, watch=watch: watch(bank, *arguments)  # noqa: E731
        with (
            patch.object(Index, "bank", lambda index, device: bank),
            patch.object(Bank, "nearest", timed),
        ):
            start = time.perf_counter()
            # without patched images the share is largest
            stages.targets(patched=0.0)
            seconds = time.perf_counter() - start
        factor = NUM_OOD_OF_PAPER / len(stages.ood_images)
        shares.append(watch.seconds / seconds)
        whole.append((watch.seconds * factor + built) / (seconds * factor + built))
    note = (
        f"{about}; bank of {num_bank:,} rows (the index's own, repeated with noise), built before; "
        f"with building it, and {NUM_OOD_OF_PAPER:,} OOD images: {np.median(whole):.3g}"
    )
    return Row("targets: share of the search in the wall time", shares, BAR_SEARCH, note, True)


def processes_against_threads(setting: Setting) -> Row:
    """Decode photographs in processes, against as many threads, of which one runs Python."""
    folder = setting.scratch / "photographs"
    count = setting.pick(quick=8, cpu=256)
    for number, image in enumerate(data.random_images(count, seed=3)):
        photograph = Image.fromarray(image.transpose(1, 2, 0)).resize((500, 375))
        folder.mkdir(exist_ok=True)
        photograph.save(folder / f"{number:03d}.jpg", quality=90)
    images, workers = open_images(str(folder)), max(3, num_cores() - 1)
    chunks = np.array_split(np.tile(np.arange(count), workers), 4 * workers)

    def decode() -> int:
        for _ in iter_batches(images, chunks, Transform(224), workers=workers):
            pass
        return count * workers

    def decode_in_threads() -> int:
        with patch.object(decoding, "_use_processes", lambda *_: False):
            return decode()

    variants = {"processes": decode, "threads": decode_in_threads}
    times = interleaved(variants, setting.windows, torch.device("cpu"))
    seconds = float(np.median(times["processes"].wall))
    note = (
        f"{count * workers} JPEG files of 500 x 375 px to 224, {workers} workers on {num_cores()} "
        f"cores, start of the processes included; {1 / seconds:.0f} images/s in processes"
    )
    ratios = quotients(times["threads"].wall, times["processes"].wall)
    return Row("decoding: threads / processes, time per image", ratios, 1, note)


def large_bank(index: Index, num_bank: int, device: torch.device) -> Bank:
    """Return a bank of ``num_bank`` rows, made from a smaller index by repetition with noise."""
    features, prediction = (index.columns[name].read() for name in ("features", "prediction"))
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.integers(0, len(features), num_bank))
    order = chosen[np.argsort(prediction[chosen], kind="stable")]
    noise = generator.normal(0, 0.1 * features.std(), (num_bank, features.shape[1]))
    row = index.columns["row"].read()[order]
    return Bank(features[order] + noise.astype(np.float32), prediction[order], row, device=device)
