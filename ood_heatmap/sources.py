"""Open the image sets that a user names: folders, files of several kinds, torchvision data sets."""

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import get_args

from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.patterns import find_files, find_shards, is_pattern
from ood_heatmap.source_array import open_array_file
from ood_heatmap.source_arrow import find_saved_files, open_arrow
from ood_heatmap.source_folder import open_folder, suffix_of
from ood_heatmap.source_list import TABLES, open_list
from ood_heatmap.source_parquet import open_parquet
from ood_heatmap.source_tar import open_tars
from ood_heatmap.source_torchvision import open_torchvision
from ood_heatmap.union import SEPARATOR, unite

_ARRAYS, _LISTS = (".npy", ".npz"), (".txt", *TABLES)
# compressed ones are refused with the reason
_TAR = re.compile(r".*\.(tar|tgz|tar\.(gz|bz2|xz|zst))", re.IGNORECASE)
_OPENERS = {".tar": open_tars, ".parquet": open_parquet, ".arrow": open_arrow}
# how Hugging Face names the files of a split
_SPLIT = re.compile(r"(.*)-[0-9]+-of-[0-9]+\.(?:parquet|arrow)")


def open_images(
    source: str,
    *,
    data_root: Path = Path("data"),
    download: bool = False,
    class_order: ClassOrder = "name",
) -> ImageSet:
    """Open an image set, see ``docs/sources.md`` for all kinds.

    Args:
        source: Path of a folder of images, class folders or shards, of a file of uint8 arrays, of
            a list of files or of a shard, pattern of the names of shards, or name of a torchvision
            data set.
        data_root: Root of torchvision data sets.
        download: Let torchvision download a missing data set.
        class_order: Order of class names that defines the labels, see ``sort_classes``.

    Raises:
        OodHeatmapError: The source does not exist or contains no images.
    """
    path = Path(source)
    if is_pattern(source):
        return _open_shards(find_files(source), source, class_order)
    if path.is_dir():
        shards = find_saved_files(source) or find_shards(source, _shard_kind)
        if shards:
            return _open_shards(shards, source, class_order)
        return open_folder(path, class_order=class_order)
    if path.suffix in _ARRAYS:
        return open_array_file(path)
    if path.suffix in _LISTS:
        return open_list(path, class_order=class_order)
    if path.is_file():
        return _open_shards([str(path)], source, class_order)
    return open_torchvision(source, data_root, download)


def is_image_set(source: str) -> bool:
    """Return whether a path is that of an image set which is not a folder of image files."""
    if is_pattern(source):
        return True
    if os.path.isdir(source):
        return bool(find_saved_files(source) or find_shards(source, _shard_kind))
    return Path(source).suffix in (*_ARRAYS, *_LISTS) or bool(_shard_kind(source))


def _shard_kind(path: str) -> str:
    """Return the suffix of a shard's kind, empty for any other file."""
    suffix = ".tar" if _TAR.fullmatch(path) else suffix_of(path)
    return suffix if suffix in _OPENERS else ""


def _open_shards(paths: Sequence[str], source: str, class_order: ClassOrder) -> ImageSet:
    """Open files of one kind as one image set.

    Raises:
        UsageError: They are not shards, or of several kinds or splits.
    """
    kinds = {_shard_kind(path): path for path in paths}
    if "" in kinds:
        raise UsageError(
            f"{kinds['']} is not an image set: use a folder, .tar, .parquet or .arrow files, a "
            ".txt or .csv list, an .npy or .npz file, or a torchvision NAME/SPLIT."
        )
    if len(kinds) > 1:
        raise UsageError(f"{source} has files of several kinds: {', '.join(sorted(kinds))}.")
    splits = {match[1] for match in map(_SPLIT.fullmatch, paths) if match}
    if len(splits) > 1:
        first, second, *_ = sorted(splits)
        raise UsageError(
            f"{source} has several splits, {os.path.basename(first)} and "
            f"{os.path.basename(second)}: name one, such as '{first}-*'."
        )
    return _OPENERS[next(iter(kinds))](paths, source=source, class_order=class_order)


def open_union(
    sources: Sequence[str],
    *,
    data_root: Path = Path("data"),
    download: bool = False,
    class_order: ClassOrder = "name",
    need_labels: bool = True,
) -> ImageSet:
    """Open several image sets as one, see ``open_images`` and ``unite``.

    Raises:
        OodHeatmapError: A source does not exist, or the classes cannot be matched.
        UsageError: A source is named twice.
    """
    twice = next((source for source in sources if sources.count(source) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice: name each source once.")
    sets = [
        open_images(source, data_root=data_root, download=download, class_order=class_order)
        for source in sources
    ]
    return unite(sets, class_order=class_order, need_labels=need_labels)


def reopen_images(source: str, *, class_order: ClassOrder = "name") -> ImageSet:
    """Open what a manifest names as its source: one, or several.

    Raises:
        OodHeatmapError: It is no longer there.
    """
    try:
        return open_images(source, class_order=class_order)
    except OodHeatmapError:
        sources = source.split(SEPARATOR)
        if len(sources) == 1:
            raise
    return open_union(sources, class_order=class_order, need_labels=False)


@lru_cache(maxsize=4)
def reopen_listed(source: str, listing: str) -> ImageSet | None:
    """Open the set that a manifest was made from, or return None if it was moved or has changed.

    Args:
        source: What the manifest names as its source.
        listing: Hash of its names in the manifest.
    """
    for order in get_args(ClassOrder):
        try:
            images = reopen_images(source, class_order=order)
        except OodHeatmapError:
            return None
        if images.listing == listing:
            return images
    return None
