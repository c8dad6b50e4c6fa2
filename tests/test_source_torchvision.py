"""Image sets of torchvision."""

import numpy as np
import pytest

from ood_heatmap import source_torchvision as module
from ood_heatmap.decoding import decode
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import Transform
from ood_heatmap.sources import open_images


def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"cifar10/train is not complete under .*--download"):
        open_images("cifar10/train", data_root=tmp_path)
    with pytest.raises(UsageError, match="no split 'night'"):
        open_images("cifar10/night", data_root=tmp_path)


def test_a_torchvision_set_is_read(tmp_path):
    """CIFAR-10's own files, made small: torchvision then checks nothing but that they are there."""
    from torchvision.datasets import MNIST

    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    header = {3: b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in values.shape)}
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header[3] + values.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + (3).to_bytes(4, "big") + bytes([7, 0, 2])
        )
    assert MNIST(str(tmp_path), train=False)
    images = open_images("mnist/test", data_root=tmp_path)
    assert images.labels.tolist() == [7, 0, 2]
    (batch,) = [decode(images, np.arange(3), Transform(28))]
    np.testing.assert_array_equal(batch.pixels, np.repeat(values[:, None], 3, axis=1))
    assert batch.modes == {"L": 3}


def test_all_sets_are_torchvision_classes():
    assert {"cifar10", "cifar100", "svhn", "dtd", "places365"} <= set(module._torchvision_sets())
