"""Run the benchmarks and write one table: ``python benchmarks/run.py [--quick] [--only NAME]``."""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import feed
import harness
import memory
import scale
import search
import stages
import train

from ood_heatmap.devices import choose_device, keep_freed_memory

BENCHMARKS = {
    "search": search.rows,
    "feed": feed.rows,
    "train": train.rows,
    "stages": stages.rows,
    "memory": memory.rows,
    "scale": scale.rows,
}
# takes longer than all others together
NOT_BY_DEFAULT = {"scale"}


def main() -> None:
    """Run the selected benchmarks; a missed bar is reported, but is not a failure."""
    options = parse()
    keep_freed_memory()
    device = choose_device(options.device)
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "quick": options.quick,
        "windows": options.windows,
        "hardware": harness.hardware(device),
        "versions": harness.versions(),
    }
    rows: list[harness.Row] = []
    for name in options.only or [name for name in BENCHMARKS if name not in NOT_BY_DEFAULT]:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.scratch) as scratch:
            setting = harness.Setting(device, Path(scratch), options.quick, options.windows)
            start = time.perf_counter()
            for row in BENCHMARKS[name](setting):
                rows.append(row)
                print(row.to_markdown(), flush=True)
                harness.write(options.out, about, rows)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument(
        "--only", action="append", choices=BENCHMARKS, help="only this one; may be repeated"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="write OUT.md and OUT.json (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--windows", type=int, default=5, help="timing windows of each variant")
    parser.add_argument("--scratch", type=Path, help="a directory for temporary data (1 GB)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
