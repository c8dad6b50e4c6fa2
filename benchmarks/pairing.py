"""Does the pairing matter? The same decoder and seeds on four ways to choose a partner.

python benchmarks/pairing.py RUN --ood-train DIR --id DIR --ood NAME=DIR --ood NAME=DIR

RUN has a finished index, with a feature map to compare decoders with and without. It is not written
into. Detection: mean AUROC over the OOD sets; localisation: pixel AUROC of pasted patches.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

from ood_heatmap.cli import named_source
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.devices import choose_device
from ood_heatmap.images import ImageSet, open_images
from ood_heatmap.metrics import detection_metrics
from ood_heatmap.pipeline.config import LocalizeConfig, TargetsConfig, TrainConfig
from ood_heatmap.pipeline.localize import HEATMAP, MEAN, localize, read_sample
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.pipeline.train import train_decoder

PAIRINGS = ("nearest", "random", "any", "scrambled")
IN_WORDS = {
    "nearest": "nearest of the class",
    "random": "random of the class",
    "any": "nearest of all classes",
    "scrambled": "confused as in the released code",
}
TARGETS = ("magnitude", "signed")


@dataclass(frozen=True)
class Line:
    """One line of the table; a figure for each seed, AUROC in [0, 1]."""

    pairing: str
    target: str
    feature_maps: int
    detection: list[float]
    localization: list[float]

    def to_markdown(self) -> str:
        """Return mean and standard deviation over seeds, in percent."""
        figures = (
            f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f}"
            for values in (self.detection, self.localization)
        )
        what = (IN_WORDS[self.pairing], self.target, str(self.feature_maps))
        return f"| {' | '.join((*what, *figures))} |"


HEAD = "| partner | target | feature maps | detection | localisation |\n|---|---|---|---|---|"


def main() -> None:
    """Train and measure every combination, and print a line for each."""
    options = parse()
    device = choose_device(options.device)
    ood_train = open_images(options.ood_train)
    id_images = open_images(options.id)
    ood_sets = {name: open_images(place) for name, place in map(named_source, options.ood)}
    lines: list[Line] = []
    print(HEAD, flush=True)
    for pairing in PAIRINGS:
        with tempfile.TemporaryDirectory(prefix="pairing-", dir=options.scratch) as scratch:
            run = Path(scratch) / "run"
            # links: an index is large, and nobody writes into it
            shutil.copytree(options.run / "index", run / "index", copy_function=os.link)
            config = TargetsConfig(options.limit, pairing=pairing, patched=options.patched)
            build_targets(run, ood_train, device, config)
            for target, num_maps in product(TARGETS, (0, options.feature_maps)):
                figures = [
                    measure(run, id_images, ood_sets, device, train_config, options.count)
                    for train_config in configs(options, target, num_maps)
                ]
                detection, localization = map(list, zip(*figures, strict=True))
                lines.append(Line(pairing, target, num_maps, detection, localization))
                print(lines[-1].to_markdown(), flush=True)
                write(options.out, lines, device)


def configs(options: argparse.Namespace, target: str, num_maps: int) -> list[TrainConfig]:
    """Return the settings of one decoder for each seed."""
    return [
        TrainConfig(
            epochs=options.epochs,
            seed=seed,
            target=target,
            width=options.width,
            feature_maps=num_maps,
            overwrite=True,
        )
        for seed in range(options.seeds)
    ]


def measure(
    run: Path,
    id_images: ImageSet,
    ood_sets: Mapping[str, ImageSet],
    device: torch.device,
    config: TrainConfig,
    count: int,
) -> tuple[float, float]:
    """Train one decoder; return its mean AUROC and its pixel AUROC."""
    train_decoder(run, device, config)
    detector = HeatmapDetector.load(run, str(device))
    sample = LocalizeConfig(count, overwrite=True)
    scores = {
        name: scores_of(detector, images, sample)
        for name, images in {"": id_images, **ood_sets}.items()
    }
    id_scores = scores.pop("")
    detection = [detection_metrics(id_scores, own).auroc for own in scores.values()]
    localize(run, id_images, ood_sets, device, LocalizeConfig(min(count, 100), overwrite=True))
    content = json.loads((run / "localization" / "localization.json").read_text("utf-8"))
    return float(np.mean(detection)), heatmap_figure(content)


def scores_of(
    detector: HeatmapDetector, images: ImageSet, sample: LocalizeConfig
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the scores of a sample of a set."""
    pixels = read_sample(images, detector.classifier.config.transform, sample).pixels
    size = sample.batch_size
    return np.concatenate(
        [
            detector.detect(pixels[start : start + size])[0].score
            for start in range(0, len(pixels), size)
        ]
    )


def heatmap_figure(content: Mapping[str, Any]) -> float:
    """Return the heatmap's overall pixel AUROC out of ``localization.json``."""
    wanted = (HEATMAP, MEAN, MEAN, MEAN)
    keys = ("method", "set", "side", "edges")
    return next(
        float(row["pixel_auroc"])
        for row in content["table"]
        if tuple(row[key] for key in keys) == wanted
    )


def write(out: Path, lines: list[Line], device: torch.device) -> None:
    """Write all lines so far as JSON and as a Markdown table."""
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": harness.hardware(device),
        "versions": harness.versions(),
        "lines": [vars(line) for line in lines],
    }
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    table = "\n".join([HEAD, *(line.to_markdown() for line in lines)])
    out.with_suffix(".md").write_text(f"{table}\n\n`{content['command']}`\n", "utf-8")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory with a finished index")
    parser.add_argument("--ood-train", required=True, help="OOD training images")
    parser.add_argument("--id", required=True, help="ID test images")
    parser.add_argument(
        "--ood", required=True, action="append", help="[NAME=]SOURCE, may be repeated"
    )
    parser.add_argument("--seeds", type=int, default=3, help="decoders of each kind")
    parser.add_argument("--epochs", type=int, default=TrainConfig.epochs)
    parser.add_argument("--width", type=int, default=TrainConfig.width)
    parser.add_argument("--feature-maps", type=int, default=1, help="beside decoders without any")
    parser.add_argument("--limit", type=int, help="OOD training images")
    parser.add_argument("--patched", type=float, default=TargetsConfig.patched)
    parser.add_argument("--count", type=int, default=1000, help="test images of each set")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--scratch", type=Path, help="a directory for targets and decoders, on RUN's disk"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pairing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
