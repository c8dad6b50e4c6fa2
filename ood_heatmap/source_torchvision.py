"""Image sets of torchvision, by name."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import Decoded, ImageSet, unreadable


def _torchvision_sets() -> dict[str, Callable[[str, dict[str, Any]], Any]]:
    """Map each data set name to a function of (split, common arguments) that opens it."""
    from torchvision import datasets as tv

    def by_flag(kind: Any) -> Callable[[str, dict[str, Any]], Any]:
        return lambda split, common: kind(train={"train": True, "test": False}[split], **common)

    def by_split(kind: Any) -> Callable[[str, dict[str, Any]], Any]:
        return lambda split, common: kind(split=split, **common)

    def places(split: str, common: dict[str, Any]) -> Any:
        return tv.Places365(
            split={"train": "train-standard"}.get(split, split), small=True, **common
        )

    return {
        "cifar10": by_flag(tv.CIFAR10),
        "cifar100": by_flag(tv.CIFAR100),
        "dtd": by_split(tv.DTD),
        "fashion-mnist": by_flag(tv.FashionMNIST),
        "flowers102": by_split(tv.Flowers102),
        "food101": by_split(tv.Food101),
        "gtsrb": by_split(tv.GTSRB),
        "mnist": by_flag(tv.MNIST),
        "pets": lambda split, common: tv.OxfordIIITPet(
            split={"train": "trainval"}.get(split, split), **common
        ),
        "places365": places,
        "stl10": by_split(tv.STL10),
        "svhn": by_split(tv.SVHN),
    }


@dataclass(frozen=True)
class _TorchvisionReader:
    """Reads images of a torchvision data set; digests are of the decoded pixels."""

    dataset: Any
    source: str

    def read(self, row: int) -> tuple[Decoded, bytes]:
        try:
            image = self.dataset[row][0]
        except (OSError, ValueError, SyntaxError) as error:
            raise unreadable(f"{self.source}/{row}", error) from error
        content = f"{image.mode}{image.size}".encode() + image.tobytes()
        return image, hashlib.sha256(content).digest()

    def digest(self, row: int) -> bytes:
        return self.read(row)[1]


def open_torchvision(source: str, data_root: Path, download: bool) -> ImageSet:
    """Open a torchvision data set named ``name/split``; the split defaults to ``test``."""
    name, _, split = source.partition("/")
    sets = _torchvision_sets()
    if name not in sets:
        raise UsageError(
            f"there is no folder, file or data set {source!r}. "
            f"Data sets: {', '.join(sets)}, each with /train or /test."
        )
    if name == "places365" and split in ("", "test"):
        split = "val"
    try:
        dataset = sets[name](split or "test", {"root": str(data_root), "download": download})
    except KeyError:
        raise UsageError(
            f"{name} has no split {split!r}: use {name}/train or {name}/test."
        ) from None
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error
    except (RuntimeError, OSError) as error:
        raise OodHeatmapError(
            f"{source} is not complete under {data_root} ({str(error).splitlines()[0]}). "
            "Add --download, or set its location with --data-root."
        ) from error
    labels = _torchvision_labels(dataset)
    names = getattr(dataset, "classes", None)
    return ImageSet(
        source=source,
        names=[f"{source}/{row}" for row in range(len(dataset))],
        labels=labels,
        classes=tuple(map(str, range(int(labels.max()) + 1) if names is None else names)),
        reader=_TorchvisionReader(dataset, source),
        listing=hashlib.sha256(f"{source}\0{len(dataset)}".encode() + labels.tobytes()).hexdigest(),
        has_class_names=names is not None,
    )


def _torchvision_labels(dataset: Any) -> NDArray[np.int32]:
    """Return a data set's labels without decoding images; -1 if it has no such attribute."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name), dtype=np.int32)
    return np.full(len(dataset), -1, dtype=np.int32)
