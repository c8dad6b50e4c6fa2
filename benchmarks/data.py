"""Random data in the shape of real data: images, classifiers, finished caches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import network
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ood_heatmap.cache.shards import Rows, open_rows, write_shard
from ood_heatmap.classifier import Classifier, load_classifier
from ood_heatmap.networks import cifar_resnet18
from ood_heatmap.pipeline.config import _SHARD_MEGABYTES
from ood_heatmap.pipeline.feed import TrainingSet

SIZE, NUM_CLASSES, NUM_FEATURES = 32, 10, 512
# of a feature map
MAP_SHAPE = (64, 8, 8)
SMALL, RESNET18 = "small", "cifar-resnet18"


def random_images(count: int, seed: int) -> NDArray[np.uint8]:
    """Return distinct images ``(count, 3, 32, 32)`` uint8: coarse colours with noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 216, (count, 3, 4, 4), np.uint8)
    fine = generator.integers(0, 40, (count, 3, SIZE, SIZE), np.uint8)
    images: NDArray[np.uint8] = coarse.repeat(SIZE // 4, axis=2).repeat(SIZE // 4, axis=3) + fine
    return images


def write_pngs(folder: Path, count: int, seed: int, *, distinct: int | None = None) -> Path:
    """Write ``count`` PNG files; ``distinct`` of them differ, the others are hard links."""
    folder.mkdir(parents=True)
    kinds = min(count, distinct or count)
    for number, image in enumerate(random_images(kinds, seed)):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:06d}.png")
    for number in range(kinds, count):
        (folder / f"{number:06d}.png").hardlink_to(folder / f"{number % kinds:06d}.png")
    return folder


def make_classifier(kind: str, scratch: Path) -> Classifier:
    """Return a classifier with random weights that predicts all of its classes."""
    torch.manual_seed(0)
    if kind == SMALL:
        spec, net = f"{network.__file__}:network", network.network(NUM_CLASSES)
    else:
        spec, net = RESNET18, cifar_resnet18(NUM_CLASSES)
    path = scratch / f"{kind}.safetensors"
    classifier = load_with(spec, net, path)
    # random networks predict one class for everything: subtract the mean logits
    features = classifier(torch.from_numpy(random_images(256, seed=99))).features
    head: nn.Linear = net.linear  # type: ignore[assignment]
    with torch.no_grad():
        head.bias.copy_(-(head.weight @ features.mean(dim=0)))
    return load_with(spec, net, path)


def load_with(spec: str, net: nn.Module, path: Path) -> Classifier:
    """Save a network's weights, and load the classifier with them."""
    save_file(net.state_dict(), path)
    return load_classifier(spec, weights=path, num_classes=NUM_CLASSES)


def write_columns(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Rows]:
    """Write arrays as shards of the stages' default size, and open them."""
    folder.mkdir(parents=True)
    num_rows = len(next(iter(arrays.values())))
    row_bytes = sum(array[0].nbytes for array in arrays.values())
    size = max(1, _SHARD_MEGABYTES * 1_000_000 // row_bytes)
    for number, start in enumerate(range(0, num_rows, size)):
        rows = {name: array[start : start + size] for name, array in arrays.items()}
        write_shard(folder / f"part-{number:05d}.h5", rows)
    return open_rows(sorted(folder.glob("*.h5")))


def shared_columns(
    count: int, generator: np.random.Generator, num_maps: int = 0
) -> dict[str, NDArray[Any]]:
    """Return the columns that ID and OOD rows share."""
    return {
        "features": generator.random((count, NUM_FEATURES), np.float32),
        "prediction": generator.integers(0, NUM_CLASSES, count, np.int32),
        **{
            f"feature_maps_{number + 1}": generator.random((count, *MAP_SHAPE), np.float32).astype(
                np.float16
            )
            for number in range(num_maps)
        },
    }


def heatmaps(count: int, generator: np.random.Generator) -> NDArray[np.int16]:
    """Return ``(count, 3, 32, 32)`` int16 in [-255, 255]."""
    return generator.integers(-255, 256, (count, 3, SIZE, SIZE), np.int16)


def training_set(
    folder: Path, num_id: int, num_ood: int, num_maps: int = 0, *, split: bool = False
) -> TrainingSet:
    """Return ID and OOD rows in memory-mapped shards, as written by stages 1 and 2.

    For a split decoder, a third of the OOD rows is OOD as a whole.
    """
    generator = np.random.default_rng(0)
    id_columns = write_columns(folder / "id", shared_columns(num_id, generator, num_maps))
    ood = shared_columns(num_ood, generator, num_maps) | {"heatmap": heatmaps(num_ood, generator)}
    if split:
        ood["presence"] = np.zeros((num_ood, SIZE, SIZE), np.uint8)
        ood["presence"][:, : SIZE // 2] = 255
        ood["presence"][: num_ood // 3] = 255
    names = ("heatmap", "presence") if split else ("heatmap",)
    num_patched = num_ood - num_ood // 3 if split else 0
    columns = write_columns(folder / "ood", ood)
    return TrainingSet(id_columns, columns, num_maps, names, num_patched)
