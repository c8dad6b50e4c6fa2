"""Open the image set that a user names: a folder, a file of arrays, or a torchvision data set."""

from pathlib import Path

from ood_heatmap.images import ClassOrder, ImageSet
from ood_heatmap.source_array import open_array_file
from ood_heatmap.source_folder import open_folder
from ood_heatmap.source_torchvision import open_torchvision


def open_images(
    source: str,
    *,
    data_root: Path = Path("data"),
    download: bool = False,
    class_order: ClassOrder = "name",
) -> ImageSet:
    """Open an image set: a folder, an ``.npy`` or ``.npz`` file, or ``name/split``.

    Args:
        source: Path of a folder of images or class folders, path of a file of uint8 arrays, or name
            of a torchvision data set.
        data_root: Root of torchvision data sets.
        download: Let torchvision download a missing data set.
        class_order: Order of class folders that defines the labels, see ``sort_classes``.

    Raises:
        OodHeatmapError: The source does not exist or contains no images.
    """
    path = Path(source)
    if path.is_dir():
        return open_folder(path, class_order=class_order)
    if path.suffix in (".npy", ".npz"):
        return open_array_file(path)
    return open_torchvision(source, data_root, download)
