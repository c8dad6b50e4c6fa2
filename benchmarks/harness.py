"""What all benchmarks share: interleaved windows, rows of a table, and what it was measured on."""

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
        device: Where to compute.
        scratch: A directory for what is made on the way; removed at the end.
        quick: Small sizes, to see that everything runs; the figures then mean little.
        windows: How often each variant is timed.
    """

    device: torch.device
    scratch: Path
    quick: bool = False
    windows: int = 5

    def pick(self, *, quick: int, cpu: int, gpu: int | None = None) -> int:
        """Return the size that fits this run."""
        if self.quick:
            return quick
        return gpu if gpu is not None and self.device.type == "cuda" else cpu


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: What is compared.
        ratios: One for each window.
        bar: What the median should reach, or stay below.
        note: Sizes, and what else one has to know to read the figure.
        at_most: The bar is an upper one.
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
        """Return the line of a Markdown table."""
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
        """Return all of it as JSON can hold it."""
        return {**asdict(self), "median": self.median, "verdict": self.verdict}


def figure(value: float) -> str:
    """Return a number with three digits that mean something."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass
class Times:
    """Seconds per unit of work, one entry for each window."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(
    variants: Mapping[str, Callable[[], int]],
    windows: int,
    device: torch.device,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Time variants in turn, A B A B, so that a busy machine is busy for all of them.

    Args:
        variants: Name to a function that works and returns how many units (images, rows, queries)
            it did. Each is called once more before the first window, untimed.
        windows: How often each is timed.
        device: Waited for at the end of each window.
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
    """Return the ratio of each window."""
    return [a / b for a, b in zip(above, below, strict=True)]


def cpu_note(above: Times, below: Times) -> str:
    """Return the same ratio by the CPU time of the process, which other jobs disturb less."""
    return f"by CPU time {figure(float(np.median(quotients(above.cpu, below.cpu))))}"


def versions() -> dict[str, str]:
    """Return the installed version of each package that matters."""
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
    """Return what the figures were measured on."""
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
    """Return the whole table with what it was measured on."""
    lines = ["# Benchmarks", ""]
    if about["quick"]:
        lines += ["**Quick run: sizes too small for the figures to mean much.**", ""]
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
    """Write ``OUT.md`` and ``OUT.json``; called after each row, so that a stopped run keeps its."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(to_markdown(about, rows), "utf-8")
    content = {**about, "rows": [row.to_json() for row in rows]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
