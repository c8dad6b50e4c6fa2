"""Killed with -9 at random moments and started again, a run ends byte for byte the same."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

NUM_KILLS = int(os.environ.get("OOD_HEATMAP_KILLS", "3"))
ALL_STAGES = """
import sys, torch
from ood_heatmap.cli import main
torch.set_num_threads(1)
run, data, spec = sys.argv[1:]
sets = ["--id", f"{data}/test", "--ood", f"{data}/far"]
common = ["--device", "cpu"]
for command in (
    ["index", run, "--id", f"{data}/id.npz", "--classifier", spec, "--shard-mb", "1"]
    + ["--weights", f"{data}/weights.safetensors", "--feature-maps", "1", "--batch-size", "64"],
    ["targets", run, "--ood", f"{data}/ood.npz", "--shard-mb", "1", "--batch-size", "64"]
    + ["--patched", "0.5"],
    ["train", run, "--epochs", "4", "--width", "32", "--feature-maps", "1"],
    ["evaluate", run, *sets],
):
    main.main([*command, *common], standalone_mode=False)
    print("done", command[0], flush=True)
"""


def start(run: Path, data: Path, spec: str) -> subprocess.Popen[bytes]:
    with (data / "stderr").open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", ALL_STAGES, str(run), str(data), spec],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


@pytest.mark.slow
def test_killed_and_started_again_it_ends_byte_for_byte_the_same(data, spec, tmp_path, tree):
    generator = np.random.default_rng(0)
    for name, count in (("id", 3000), ("ood", 1500)):
        coarse = generator.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
        np.savez(data / f"{name}.npz", images=coarse.repeat(4, axis=1).repeat(4, axis=2))
    began = time.monotonic()
    assert start(tmp_path / "unbroken", data, spec).wait() == 0
    seconds = time.monotonic() - began
    dice, run, kills = random.Random(0), tmp_path / "killed", 0
    wanted = tree(tmp_path / "unbroken")
    assert len([name for name in wanted if name.endswith(".h5")]) >= 4
    while kills < NUM_KILLS:
        process = start(run, data, spec)
        try:
            process.wait(timeout=dice.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0, (data / "stderr").read_text()[-2000:]
        assert tree(run) == wanted
        run = tmp_path / f"killed-{kills}"  # finished: the next kills hit a new one
    assert start(run, data, spec).wait() == 0
    assert tree(run) == wanted
