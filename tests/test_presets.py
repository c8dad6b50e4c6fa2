"""Transforms of torchvision are read as they work."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models, transforms
from torchvision.transforms import InterpolationMode, v2

from ood_heatmap.errors import UsageError
from ood_heatmap.images import Transform
from ood_heatmap.presets import read_preset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZE = transforms.Normalize(MEAN, STD)


@pytest.mark.parametrize(
    "compose",
    [
        transforms.Compose(
            [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor(), NORMALIZE]
        ),
        v2.Compose(
            [
                v2.ToImage(),
                v2.Compose([v2.Resize(32, InterpolationMode.BICUBIC), v2.CenterCrop(32)]),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        ),
        transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor(), NORMALIZE]),
        models.ResNet18_Weights.DEFAULT.transforms(),
    ],
)
def test_a_transform_does_what_that_of_torchvision_does(compose):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8))
    preset = read_preset(compose)
    assert (preset.mean, preset.std) == (MEAN, STD)
    found = torch.from_numpy(preset.transform(photo)) / 255
    found = (found - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    wanted = compose(photo)
    # one level of 255: kernels of Pillow and PyTorch are rounded differently
    assert (found - wanted).abs().max() < 1.1 / 255 / 0.22
    assert (found - wanted).abs().mean() < 0.1 / 255


def test_a_side_and_a_transform_are_what_they_say():
    assert read_preset(64).transform == Transform(64)
    assert read_preset(Transform(64, 70)).transform == Transform(64, 70)
    assert read_preset(64).mean is None
    bare = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])
    assert read_preset(bare).transform == Transform(56, 64)
    assert read_preset(bare).std is None


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ([transforms.RandomCrop(32)], "a step RandomCrop"),
        ([transforms.Resize(32), transforms.RandomHorizontalFlip()], "RandomHorizontalFlip"),
        ([transforms.Resize(32)], "add CenterCrop"),
        ([transforms.CenterCrop(32)], "add a Resize"),
        ([transforms.Resize((32, 40))], "not square"),
        ([transforms.ToTensor(), NORMALIZE], "not square"),
        ([NORMALIZE, transforms.Resize((32, 32))], "Resize after Normalize"),
        ([transforms.Resize((9, 9)), transforms.Resize((32, 32))], "a step Resize"),
        ([lambda image: image], "a step function"),
    ],
)
def test_other_transforms_are_refused_in_one_line(steps, named):
    with pytest.raises(UsageError, match=named) as caught:
        read_preset(transforms.Compose(steps))
    assert "\n" not in str(caught.value)
