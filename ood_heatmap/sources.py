"""Open the image sets that a user names: folders, files of several kinds, torchvision data sets."""

import re
from collections.abc import Sequence
from pathlib import Path

from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.patterns import find_files, find_shards, is_pattern
from ood_heatmap.source_array import open_array_file
from ood_heatmap.source_folder import open_folder
from ood_heatmap.source_list import TABLES, open_list
from ood_heatmap.source_tar import open_tars
from ood_heatmap.source_torchvision import open_torchvision
from ood_heatmap.union import SEPARATOR, unite

# compressed ones are refused with the reason
_TAR = re.compile(r".*\.(tar|tgz|tar\.(gz|bz2|xz|zst))", re.IGNORECASE)


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
        shards = find_shards(str(path), _is_shard)
        if shards:
            return _open_shards(shards, source, class_order)
        return open_folder(path, class_order=class_order)
    if path.suffix in (".npy", ".npz"):
        return open_array_file(path)
    if path.suffix in (".txt", *TABLES):
        return open_list(path, class_order=class_order)
    if path.is_file():
        return _open_shards([str(path)], source, class_order)
    return open_torchvision(source, data_root, download)


def _is_shard(name: str) -> bool:
    return _TAR.fullmatch(name) is not None


def _open_shards(paths: Sequence[str], source: str, class_order: ClassOrder) -> ImageSet:
    """Open files of one kind as one image set.

    Raises:
        UsageError: They are not shards.
    """
    other = next((path for path in paths if not _is_shard(path)), None)
    if other is not None:
        raise UsageError(
            f"{other} is not an image set: use a folder, .tar files, a .txt or .csv list, an .npy "
            "or .npz file, or a torchvision NAME/SPLIT."
        )
    return open_tars(paths, source=source, class_order=class_order)


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
