"""Shared parts of the benchmarks: interleaved timing, the result table, hardware and versions."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGES = (
    "ood-heatmap",
    "torch",
    "faiss-gpu",
    "faiss-cpu",
    "h5py",
    "numpy",
    "scikit-learn",
    "pillow",
)


@dataclass(frozen=True)
class Setting:
    """How a benchmark is run.

    Args:
        device: Device to compute on.
        scratch: A directory for temporary data; removed at the end.
        quick: Use small sizes, to test that everything runs; results are then not meaningful.
        windows: Number of timing windows of each variant.
    """

    device: torch.device
    scratch: Path
    quick: bool = False
    windows: int = 5

    def pick(self, *, quick: int, cpu: int, gpu: int | None = None) -> int:
        """Return the size for this device, or for a quick run."""
        if self.quick:
            return quick
        return gpu if gpu is not None and self.device.type == "cuda" else cpu


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: What is compared.
        ratios: The ratio of each window.
        bar: Required minimum of the median; the maximum if ``at_most``.
        note: Sizes, and whatever is needed to interpret the ratio.
        at_most: The bar is an upper bound.
    """

    name: str
    ratios: Sequence[float]
    bar: float
    note: str
    at_most: bool = False

    @property
    def median(self) -> float:
        """Median over the windows."""
        return float(np.median(self.ratios))

    @property
    def verdict(self) -> str:
        """``pass`` or ``miss``."""
        reached = self.median <= self.bar if self.at_most else self.median >= self.bar
        return "pass" if reached else "miss"

    def to_markdown(self) -> str:
        """Format as a row of a Markdown table."""
        sign = "at most" if self.at_most else "at least"
        spread = f"{figure(min(self.ratios))} to {figure(max(self.ratios))}"
        cells = (
            self.name,
            figure(self.median),
            f"{spread} (n={len(self.ratios)})",
            f"{sign} {figure(self.bar)}",
            self.verdict,
            self.note,
        )
        return "| " + " | ".join(cells) + " |"

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON-serializable values."""
        return {**asdict(self), "median": self.median, "verdict": self.verdict}


def figure(value: float) -> str:
    """Format a number with three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass
class Times:
    """Seconds per unit of work, one entry per window."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(
    variants: Mapping[str, Callable[[], int]],
    windows: int,
    device: torch.device,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Time variants in turn, A B A B, so that other load on the machine affects all of them.

    Args:
        variants: Maps a name to a function that does some work and returns the number of units
            (images, rows, queries). Each is called once before the first window, untimed.
        windows: Number of timing windows of each.
        device: Synchronized at the end of each window.
        prepare: Called before each window, untimed.
    """
    times = {name: Times() for name in variants}
    for window in range(-1, windows):
        for name, work in variants.items():
            prepare()
            wall, cpu = time.perf_counter(), time.process_time()
            units = work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if window >= 0:
                times[name].wall.append((time.perf_counter() - wall) / units)
                times[name].cpu.append((time.process_time() - cpu) / units)
    return times


def quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of two timings in each window."""
    return [a / b for a, b in zip(above, below, strict=True)]


def cpu_note(above: Times, below: Times) -> str:
    """Format the ratio of CPU times of the process, which depend less on other load."""
    return f"by CPU time {figure(float(np.median(quotients(above.cpu, below.cpu))))}"


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that affect the results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    """Describe the machine."""
    on_gpu = device.type == "cuda"
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(terse=True),
    }


def to_markdown(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Format the whole table with hardware, versions and command."""
    lines = ["# Benchmarks", ""]
    if about["quick"]:
        lines += ["**Quick run: sizes too small for meaningful ratios.**", ""]
    for name in ("hardware", "versions"):
        facts = ", ".join(f"{key} {value}" for key, value in about[name].items() if value)
        lines.append(f"- {name}: {facts}")
    lines += [
        f"- command: `{about['command']}`",
        "",
        "Each ratio is the median over interleaved windows of one process, with the range.",
        "",
        "| what | ratio | range | bar | verdict | note |",
        "|---|---|---|---|---|---|",
        *(row.to_markdown() for row in rows),
        "",
    ]
    return "\n".join(lines)


def write(out: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write ``OUT.md`` and ``OUT.json``; called after each row, to keep those of a stopped run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(to_markdown(about, rows), "utf-8")
    content = {**about, "rows": [row.to_json() for row in rows]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
