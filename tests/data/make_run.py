"""Make the small run that later versions must open: `python make_run.py DIRECTORY`.

Run once for each format of manifests or shards, and keep what it writes.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from small_network import network  # type: ignore[import-not-found]

from ood_heatmap.cli import main


def make(directory: Path) -> None:
    """Write the sets, the weights and the run; all names in it are relative."""
    directory.mkdir(parents=True)
    os.chdir(directory)
    generator = np.random.default_rng(0)
    for name, count in (("id", 24), ("ood", 12), ("test", 20), ("far", 8)):
        coarse = generator.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
        np.savez(f"{name}.npz", images=coarse.repeat(2, axis=1).repeat(2, axis=2))
    torch.manual_seed(0)
    save_file(network().state_dict(), "weights.safetensors")
    torch.set_num_threads(1)
    sets = ["--id", "test.npz", "--ood", "far=far.npz"]
    for command in (
        [
            "index",
            "run",
            "--id",
            "id.npz",
            "--classifier",
            "small_network:network",
            "--weights",
            "weights.safetensors",
            "--size",
            "8",
            "--allow-suspicious",
        ],
        ["targets", "run", "--ood", "ood.npz", "--patched", "0.5"],
        ["train", "run", "--epochs", "1", "--width", "8"],
        [
            "evaluate",
            "run",
            *sets,
            "--gallery",
            "1",
            "--calibration-share",
            "0.5",
            "--allow-suspicious",
        ],
    ):
        main.main([*command, "--device", "cpu"], standalone_mode=False)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
