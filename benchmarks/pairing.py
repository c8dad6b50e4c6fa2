"""Does the pairing matter? The same decoder and seeds with four ways to pair OOD with ID images.

python benchmarks/pairing.py RUN --ood-train DIR --id DIR --ood NAME=DIR --ood NAME=DIR

RUN has a finished index with a feature map, to compare decoders with and without it. RUN is not
modified. Detection: AUROC of the learned score; localization: pixel AUROC of pasted patches of all
sizes; both averaged over the OOD sets.
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
from typing import Literal, TypeAlias

import harness
import numpy as np
import torch
from numpy.typing import NDArray

from ood_heatmap.classifier import Output
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.devices import choose_device, keep_freed_memory
from ood_heatmap.localization import localization_metrics
from ood_heatmap.metrics import detection_metrics
from ood_heatmap.patches import SQUARES, draw_patch, paste_all
from ood_heatmap.pipeline.config import LocalizeConfig, TargetsConfig, TrainConfig
from ood_heatmap.pipeline.inputs import split_named_source
from ood_heatmap.pipeline.localize import _read_sample
from ood_heatmap.pipeline.pixel_methods import resize
from ood_heatmap.pipeline.run import open_index
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.sources import open_images

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Pairing: TypeAlias = Literal["nearest", "random", "any", "scrambled"]
Target: TypeAlias = Literal["presence", "magnitude", "signed"]
PAIRINGS: tuple[Pairing, ...] = ("nearest", "random", "any", "scrambled")
LABELS = {
    "nearest": "nearest of the class",
    "random": "random of the class",
    "any": "nearest of all classes",
    "scrambled": "scrambled as in the released code",
}
TARGETS: tuple[Target, ...] = ("presence", "magnitude", "signed")


@dataclass(frozen=True)
class Line:
    """One row of the table; AUROC in [0, 1] for each seed."""

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
        what = (LABELS[self.pairing], self.target, str(self.feature_maps))
        return f"| {' | '.join((*what, *figures))} |"


HEAD = "| pairing | target | feature maps | detection | localization |\n|---|---|---|---|---|"


def main() -> None:
    """Train and evaluate every combination, and print a row for each."""
    options = parse()
    keep_freed_memory()
    device = choose_device(options.device)
    ood_train = open_images(options.ood_train)
    samples = read_samples(options)
    lines: list[Line] = []
    print(HEAD, flush=True)
    for pairing in options.pairing or PAIRINGS:
        with tempfile.TemporaryDirectory(prefix="pairing-", dir=options.scratch) as scratch:
            run = Path(scratch) / "run"
            # hard links: an index is large, and it is only read
            shutil.copytree(options.run / "index", run / "index", copy_function=os.link)
            config = TargetsConfig(limit=options.limit, pairing=pairing, patched=options.patched)
            build_targets(run, ood_train, device, config)
            for target, num_maps in product(options.target or TARGETS, (0, options.feature_maps)):
                figures = [
                    measure(run, samples, device, train_config)
                    for train_config in configs(options, target, num_maps)
                ]
                detection, localization = map(list, zip(*figures, strict=True))
                lines.append(Line(pairing, target, num_maps, detection, localization))
                print(lines[-1].to_markdown(), flush=True)
                write(options.out, lines, device)


def read_samples(options: argparse.Namespace) -> dict[str, UInt8]:
    """Read some images of the ID test set and of each OOD set, at the input size."""
    index = open_index(options.run)
    transform = index.classifier(torch.device("cpu")).config.transform
    sample = LocalizeConfig(count=options.count)
    sources = {"": options.id, **dict(map(split_named_source, options.ood))}
    return {
        name: _read_sample(open_images(source), transform, sample).pixels
        for name, source in sources.items()
    }


def configs(options: argparse.Namespace, target: Target, num_maps: int) -> list[TrainConfig]:
    """Return the settings of one decoder for each seed."""
    return [
        TrainConfig(
            epochs=options.epochs,
            seed=seed,
            target=target,
            stack="split" if target == "presence" else "plain",
            width=options.width,
            feature_maps=num_maps,
            overwrite=True,
        )
        for seed in range(options.seeds)
    ]


def measure(
    run: Path, samples: Mapping[str, UInt8], device: torch.device, config: TrainConfig
) -> tuple[float, float]:
    """Train one decoder; return its mean AUROC and mean pixel AUROC."""
    train_decoder(run, device, config)
    detector = HeatmapDetector.load(run, str(device))
    id_pixels, *ood_sets = samples.values()
    id_scores, _ = scores(detector, id_pixels)
    detection, localization = [], []
    for pixels in ood_sets:
        detection.append(detection_metrics(id_scores, scores(detector, pixels)[0]).auroc)
        count = min(len(id_pixels), len(pixels))
        patches = [draw_patch(pixels.shape[-1], 0, row, SQUARES) for row in range(count)]
        images, masks = paste_all(id_pixels[:count], pixels[:count], patches)
        metrics = localization_metrics(scores(detector, images)[1], masks)
        localization.append(metrics.pixel_auroc)
    return float(np.mean(detection)), float(np.mean(localization))


@torch.inference_mode()
def scores(detector: HeatmapDetector, pixels: UInt8) -> tuple[Float32, Float32]:
    """Return the learned score of images ``(N,)`` and the scores of their pixels ``(N, H, W)``.

    The latter are the log-odds of ``place_scores``, as in ``localize``.
    """
    images, places, decoder = [], [], detector.decoder
    for batch in torch.split(torch.from_numpy(pixels), LocalizeConfig.batch_size):
        output: Output = detector.classifier(batch.to(detector.device))
        maps = [item.half().float() for item in output.maps[: len(decoder.config.map_shapes)]]
        inputs = output.features, output.logits.argmax(dim=1), maps
        images.append(decoder.detect(*inputs)[1].cpu())
        places.append(resize(decoder.place_scores(*inputs).cpu(), pixels.shape[-1]))
    return torch.cat(images).numpy(), torch.cat(places).numpy()


def write(out: Path, lines: list[Line], device: torch.device) -> None:
    """Write all rows so far as JSON and as a Markdown table."""
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
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory with a finished index")
    parser.add_argument("--ood-train", required=True, help="OOD training images")
    parser.add_argument("--id", required=True, help="ID test images")
    parser.add_argument(
        "--ood", required=True, action="append", help="[NAME=]SOURCE, may be repeated"
    )
    parser.add_argument(
        "--pairing", action="append", choices=PAIRINGS, help="only this one; may be repeated"
    )
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="only this one; may be repeated"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of decoders of each kind")
    parser.add_argument("--epochs", type=int, default=TrainConfig.epochs)
    parser.add_argument("--width", type=int, default=TrainConfig.width)
    parser.add_argument("--feature-maps", type=int, default=2, help="compared with 0 feature maps")
    parser.add_argument("--limit", type=int, help="number of OOD training images")
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
