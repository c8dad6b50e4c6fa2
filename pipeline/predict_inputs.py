"""The images that ``predict`` is given: files, folders, lists on standard input, image sets."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import ImageSet
from ood_heatmap.listing import Names
from ood_heatmap.source_folder import find_images, from_paths
from ood_heatmap.sources import is_image_set, open_images
from ood_heatmap.union import unite

_STANDARD_INPUT = Path("-")


def list_images(inputs: Sequence[Path], out: Path) -> list[Path]:
    """List the given image files and all images below the given folders.

    Args:
        inputs: Files and folders; ``-`` reads further ones from standard input, one per line.
        out: The output folder; skipped if it lies below one of the folders.

    Raises:
        OodHeatmapError: A file or folder is missing, or a folder has no images.
    """
    paths: list[Path] = []
    for path in inputs:
        if path == _STANDARD_INPUT:
            paths += _read_list(out)
        elif path.is_dir():
            paths += find_images(path, skip=out)
        elif path.is_file():
            paths.append(path)
        else:
            raise OodHeatmapError(f"there is no image or folder {path}.")
    return paths


def open_inputs(inputs: Sequence[Path], out: Path) -> tuple[list[Path], ImageSet]:
    """Open image files, folders of them, and image sets of any other kind.

    Args:
        inputs: Files, folders, ``-`` and image sets, such as tar files.
        out: The output folder; skipped if it lies below one of the folders.

    Returns:
        The path of each image, where it has one, and the images.

    Raises:
        OodHeatmapError: An input is missing or cannot be read, or a folder has no images.
    """
    if not any(is_image_set(str(path)) for path in inputs):
        paths = list_images(inputs, out)
        return paths, from_paths(paths)
    paths, sets = [], []
    for path in inputs:
        if is_image_set(str(path)):
            images = open_images(str(path))
            found = list(map(Path, images.names))
        else:
            found = list_images([path], out)
            images = from_paths(found)
        paths += found
        sets.append(images)
    union = unite(sets, need_labels=False)
    return paths, replace(union, names=Names(map(str, paths)))


def _read_list(out: Path) -> Iterator[Path]:
    """Yield the paths listed on standard input; missing files raise only when they are read."""
    lines = [line.rstrip("\r") for line in os.fsdecode(sys.stdin.buffer.read()).split("\n")]
    if not any(lines):
        raise OodHeatmapError("standard input lists no images: write one path per line.")
    for path in map(Path, filter(None, lines)):
        if path.is_dir():
            yield from find_images(path, skip=out)
        else:
            yield path
