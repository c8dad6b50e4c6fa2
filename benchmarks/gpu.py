"""Figures of one GPU, in images or queries per second: ``python benchmarks/gpu.py [--only NAME]``.

Not ratios: docs/gpu.md has them with the card's name. Needs no data; ``--device cpu --quick`` shows
that everything runs.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import data
import numpy as np
import torch
import train
from harness import Setting, hardware, versions
from PIL import Image
from search import clusters
from torch.profiler import ProfilerActivity, profile

from ood_heatmap import decoding
from ood_heatmap.cache.flat import FlatBank, unit_length
from ood_heatmap.cache.neighbours import Bank, order_by_class
from ood_heatmap.cache.shards import Rows
from ood_heatmap.combined import KnnDistance, make_bank
from ood_heatmap.decoding import iter_batches
from ood_heatmap.devices import choose_device
from ood_heatmap.images import Transform
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.step import _time_windows
from ood_heatmap.sources import open_images


def steps(setting: Setting) -> Iterator[str]:
    """Time the training step on one batch, and the share of it in which kernels run."""
    on_gpu = setting.device.type == "cuda"
    kinds: tuple[Literal["eager", "graph"], ...] = ("eager", "graph") if on_gpu else ("eager",)
    precisions: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    sizes = (20,) if setting.quick else (200, 1000)
    torch.backends.cudnn.benchmark = True
    for name, base in train.CONFIGS.items():
        count = setting.pick(quick=100, cpu=1_000)
        training_set = data.training_set(
            setting.scratch / name,
            count,
            count,
            base.feature_maps or 0,
            split=base.stack == "split",
        )
        for size, precision, kind in product(sizes, precisions, kinds):
            config = replace(
                base, batch_size=size, precision=precision, step=kind, width=32 * setting.quick
            )
            _, step, batch, _ = train.prepare_step(config, training_set, setting.device)
            windows = _time_windows(step, batch, 3 + setting.windows, 2 if setting.quick else 40)
            seconds = float(np.median(windows[3:]))
            busy = ""
            if on_gpu:
                share = _kernel_seconds(lambda: step(batch)) / seconds  # noqa: B023
                busy = f", kernels are busy {share:.0%}"
            yield f"{name}, batch {size}, {precision}, {kind}: {size / seconds:,.0f} images/s{busy}"


def _kernel_seconds(step: Callable[[], object], count: int = 10) -> float:
    """Return the seconds of GPU kernels in one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    microseconds: float = sum(event.self_device_time_total for event in profiled.key_averages())
    return microseconds / count / 1e6


def classifier(setting: Setting) -> Iterator[str]:
    """Time the CIFAR ResNet-18 on batches that are on the device, as the stages run it."""
    network = data.make_classifier(data.SMALL if setting.quick else data.RESNET18, setting.scratch)
    forward = BatchedClassifier(network.to(setting.device), 256)
    images = torch.from_numpy(data.random_images(forward.size, seed=0)).to(setting.device)
    forward.repeat(images, 3)
    passes = setting.pick(quick=1, cpu=3, gpu=100)
    start = time.perf_counter()
    forward.repeat(images, passes)
    seconds = time.perf_counter() - start
    yield f"classifier alone at 32 px: {passes * forward.size / seconds:,.0f} images/s"


def decode(setting: Setting) -> Iterator[str]:
    """Decode photographs and small images, in threads and in processes."""
    count = setting.pick(quick=16, cpu=512)
    for kind, source, size in (("jpg", (500, 375), 224), ("png", (32, 32), 32)):
        folder = setting.scratch / kind
        folder.mkdir()
        for number, image in enumerate(data.random_images(count, seed=3)):
            picture = Image.fromarray(image.transpose(1, 2, 0)).resize(source)
            picture.save(folder / f"{number:04d}.{kind}")
        images, transform = open_images(str(folder)), Transform(size)
        for workers, in_processes in product((1, 2, 4, 8, 15), (False, True)):
            if in_processes and workers < decoding._MIN_PROCESSES:
                continue
            chunks = np.array_split(np.tile(np.arange(count), workers), 4 * workers)
            in_threads = patch.object(decoding, "_use_processes", lambda *_: False)
            start = time.perf_counter()
            with nullcontext() if in_processes else in_threads:
                for _ in iter_batches(images, chunks, transform, workers=workers):
                    pass
            rate = count * workers / (time.perf_counter() - start)
            how = "processes" if in_processes else "threads"
            yield f"decoding {kind} to {size} px, {workers} {how}: {rate:,.0f} images/s"


def search(setting: Setting) -> Iterator[str]:
    """Search the ten nearest of all ID features, at the size of ImageNet on a GPU."""
    num_rows = setting.pick(quick=2_000, cpu=80_000, gpu=1_281_167)
    num_features = setting.pick(quick=64, cpu=2_048)
    generator = np.random.default_rng(0)
    block = np.abs(generator.standard_normal((4_096, num_features), np.float32))
    features = np.resize(block, (num_rows, num_features))
    features *= np.linspace(1, 2, num_rows, dtype=np.float32)[:, None]
    queries = np.abs(generator.standard_normal((1_024, num_features), np.float32))
    start = time.perf_counter()
    bank = FlatBank(Rows([features]), unit_length, setting.device)
    bank.search(queries[:64], 10)
    yield f"{num_rows:,} x {num_features} features: {time.perf_counter() - start:.1f} s to prepare"
    start = time.perf_counter()
    bank.search(queries, 10)
    yield f"1,024 queries: {1000 * (time.perf_counter() - start):.0f} ms"


def classes(setting: Setting) -> Iterator[str]:
    """Search the nearest ID features within the predicted class, in calls of two sizes."""
    # so many that no class is without a row: its queries would be searched for in all
    num_rows = setting.pick(quick=20_000, cpu=50_000, gpu=400_000)
    num_queries = setting.pick(quick=256, cpu=8_192)
    width = setting.pick(quick=16, cpu=512, gpu=2_048)
    for num_classes in (10, 1_000):
        features, label = clusters(num_classes, num_rows + num_queries, width)
        row = order_by_class(label[:num_rows], np.arange(num_rows))
        bank = Bank(features[row], label[row], row, device=setting.device)
        queries, query_label = features[num_rows:], label[num_rows:]
        # opens the classes
        bank.nearest(queries, query_label)
        for size in (256, 2_048):
            start = time.perf_counter()
            for first in range(0, num_queries, size):
                part = slice(first, first + size)
                bank.nearest(queries[part], query_label[part])
            rate = num_queries / (time.perf_counter() - start)
            about = f"{num_rows:,} x {width:,} features, {num_classes:,} classes"
            yield f"{about}, {size:,} queries a call: {rate:,.0f} queries/s"


def knn_distance(setting: Setting) -> Iterator[str]:
    """Compute the kNN distance of the combined score, on batches that are on the device."""
    num_rows = setting.pick(quick=2_000, cpu=50_000)
    for width in (512, 2_048):
        generator = torch.Generator().manual_seed(0)
        features = torch.rand(num_rows, width, generator=generator)
        module = KnnDistance(make_bank(features)).to(setting.device)
        queries = torch.rand(256, width, generator=generator).to(setting.device)
        passes = setting.pick(quick=1, cpu=3, gpu=100)
        module(queries, 50)[0].item()
        start = time.perf_counter()
        for _ in range(passes):
            found = module(queries, 50)
        # waits for the device
        found[0].item()
        milliseconds = 1000 * (time.perf_counter() - start) / passes
        yield f"256 of {num_rows:,} x {width:,} features: {milliseconds:.2f} ms"


FIGURES = {
    "steps": steps,
    "classifier": classifier,
    "decode": decode,
    "search": search,
    "classes": classes,
    "knn": knn_distance,
}


def main() -> None:
    """Print the figures that were asked for, and what they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=FIGURES, help="may be repeated")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--windows", type=int, default=5, help="times each step is timed")
    options = parser.parse_args()
    device = choose_device(options.device)
    print(hardware(device), versions(), sep="\n")
    for name in options.only or FIGURES:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
            setting = Setting(device, Path(scratch), options.quick, options.windows)
            for line in FIGURES[name](setting):
                print(line, flush=True)


if __name__ == "__main__":
    main()
