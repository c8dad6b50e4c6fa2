"""Peak host memory of stage 2 with 1 and 10 times as many OOD images.

Run as a script, it runs stage 2 once and prints the peak: ``memory.py RUN FOLDER SHARD_MB DEVICE``.
"""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import data
import numpy as np
from harness import Row, Setting

from ood_heatmap.devices import choose_device, keep_freed_memory
from ood_heatmap.pipeline.config import IndexConfig, TargetsConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images

BAR = 1.10


def rows(setting: Setting) -> Iterator[Row]:
    """Compare the peak memory of two processes, several times."""
    run = setting.scratch / "memory-run"
    classifier = data.make_classifier(data.SMALL, setting.scratch)
    build_index(run, from_array(data.random_images(1_000, seed=1)), classifier, IndexConfig())
    few = setting.pick(quick=512, cpu=2_560)
    shard_mb = setting.pick(quick=1, cpu=8)
    folders = [
        data.write_pngs(setting.scratch / f"ood{many}", many, seed=2, distinct=512)
        for many in (few, 10 * few)
    ]
    ratios, growths, bases = [], [], []
    for _ in range(setting.windows):
        (_, small), (base, large) = (
            measure_peak(run, folder, shard_mb, setting.device.type) for folder in folders
        )
        ratios.append(large / small)
        growths.append((large - small) / 1e6)
        bases.append(base / 1e6)
    note = (
        f"{few:,} and {10 * few:,} PNG files, small classifier, shards of {shard_mb} MB; "
        f"{np.median(growths):+.0f} MB, compared with {np.median(bases):.0f} MB before the stage"
    )
    yield Row("targets: peak memory with 10 times the images", ratios, BAR, note, True)


def measure_peak(run: Path, folder: Path, shard_mb: int, device: str) -> tuple[int, int]:
    """Run stage 2 in a process of its own; return its bytes before the stage and at the peak."""
    shutil.rmtree(run / "targets", ignore_errors=True)
    command = [sys.executable, __file__, str(run), str(folder), str(shard_mb), device]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    before, peak = json.loads(output.splitlines()[-1])
    return before, peak


def peak() -> int:
    """Return the peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    # on Linux a child inherits ru_maxrss of its parent
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(run: str, folder: str, shard_mb: str, device: str) -> None:
    """Run stage 2 and print the peak memory before and after it."""
    keep_freed_memory()
    chosen = choose_device(device)
    images = open_images(folder)
    before = peak()
    build_targets(Path(run), images, chosen, TargetsConfig(shard_mb=int(shard_mb)))
    print(json.dumps([before, peak()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
