"""The transform against torchvision's and timm's own evaluation transforms; no weights needed."""

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms._presets import SemanticSegmentation

from ood_heatmap import images as module
from ood_heatmap.errors import UsageError
from ood_heatmap.images import Transform

# (width, height): odd margins on either side, portraits, squares, small and large. None that makes
# many exact halves, which PyTorch and Pillow round differently, as 640 to 512 does
SHAPES = [
    *((401, 299), (299, 401), (641, 427), (427, 641)),
    *((301, 301), (33, 50), (512, 384), (350, 900)),
]


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture with edges, gradients and grain."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 9, 3)).astype(np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[height // 3 :, width // 2 :] = 255 - pixels[height // 3 :, width // 2 :]
    pixels += generator.integers(-8, 9, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def assert_equal_up_to_rounding(found: np.ndarray, wanted: np.ndarray, mean: float = 0.01) -> None:
    """One pixel off would be a mean difference of more than one level."""
    assert found.shape == wanted.shape
    difference = np.abs(found.astype(int) - wanted.astype(int))
    assert difference.max() <= 2
    assert difference.mean() <= mean


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def test_an_image_of_the_input_size_passes_unchanged():
    image = noise(8, 8)
    np.testing.assert_array_equal(Transform(8)(image), np.asarray(image).transpose(2, 0, 1))


def antialiased(pixels: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """Return ``(length, ...)`` resized along its first axis, by the definition, in float64.

    The mean of all pixels under the kernel, which is as much wider as the image becomes smaller.
    """
    scale = len(pixels) / size
    centre = (np.arange(size) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(len(pixels)) - centre[:, None]) / max(scale, 1)
    if interpolation == "bilinear":
        weight = np.maximum(1 - distance, 0)
    else:  # Keys' cubic kernel, a = -0.5
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weight = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.tensordot(weight, pixels.astype(np.float64), axes=1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("width", "height"), [(20, 10), (10, 20), (13, 17), (1, 9), (90, 61), (500, 375)]
)
def test_the_shorter_side_is_resized_and_the_centre_cropped(width, height, interpolation):
    image = noise(width, height)
    new_width, new_height = (6 * side // min(width, height) for side in (width, height))
    pixels = np.asarray(image)
    # as all do: along the rows first, rounded to whole pixels, then along the columns
    wide = antialiased(pixels.transpose(1, 0, 2), new_width, interpolation)
    wide = wide.clip(0, 255).round().transpose(1, 0, 2)
    whole = antialiased(wide, new_height, interpolation).clip(0, 255)
    left, top = round((new_width - 4) / 2), round((new_height - 4) / 2)
    wanted = whole[top : top + 4, left : left + 4].transpose(2, 0, 1)
    found = Transform(4, resize=6, interpolation=interpolation)(image)
    assert found.shape == (3, 4, 4)
    assert np.abs(found - wanted).max() < 1.1  # half a level each for two roundings


def test_an_array_is_resized_as_the_picture_of_it():
    image = noise(40, 30)
    array = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    np.testing.assert_array_equal(Transform(8)(array), Transform(8)(image))


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing: all 0 or all 255
    small = Transform(8)(Image.fromarray(stripes))
    assert small.min() > 100
    assert small.max() < 156


def pixels_before_normalization(preset, image: Image.Image) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in (preset.mean, preset.std))
    return ((preset(image) * std + mean) * 255).round().to(torch.uint8).numpy()


def torchvision_presets() -> dict[str, object]:
    """Return one preset for each transform that torchvision's classifiers have."""
    found = {}
    for family in (models, models.quantization):
        for name in models.list_models(module=family):
            for weights in models.get_model_weights(name):
                preset = weights.transforms()
                found[f"{preset.crop_size}{preset.resize_size}{preset.interpolation}"] = preset
    return found


@pytest.mark.parametrize("preset", torchvision_presets().values(), ids=torchvision_presets())
def test_torchvision_presets(preset):
    transform = Transform.from_torchvision(preset)
    for shape in SHAPES:
        image = photograph(*shape)
        assert_equal_up_to_rounding(transform(image), pixels_before_normalization(preset, image))


def timm_configs() -> dict[str, dict]:
    """Return one configuration for each transform that timm's pretrained models have."""
    timm = pytest.importorskip("timm")
    found = {}
    for name in timm.list_pretrained():
        config = timm.data.resolve_data_config(
            pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()
        )
        fill = config["mean"] if config["crop_mode"] == "border" else ()
        keys = ("input_size", "crop_pct", "crop_mode", "interpolation")
        found[f"{[config[key] for key in keys]}{fill}"] = config
    return found


def test_timm_configs():
    timm = pytest.importorskip("timm")
    configs = timm_configs()
    assert {config["crop_mode"] for config in configs.values()} == {"center", "squash", "border"}
    for config in configs.values():
        if config["input_size"][1] != config["input_size"][2]:
            with pytest.raises(UsageError, match="inputs must be square"):
                Transform.from_timm(config)
            continue
        transform = Transform.from_timm(config)
        theirs = timm.data.create_transform(**config, normalize=False)
        for shape in SHAPES[:3]:
            image = photograph(*shape)
            assert_equal_up_to_rounding(transform(image), theirs(image).numpy())


def test_random_shapes_against_torchvision():
    generator = np.random.default_rng(0)
    for number in range(100):
        width, height, size = (int(value) for value in generator.integers(1, (300, 300, 100)))
        # smaller than the crop at times: torchvision then pads with zeros
        resize = int(size * generator.uniform(0.7, 1.4)) + 1
        interpolation: Literal["bilinear", "bicubic"] = "bicubic" if number % 2 else "bilinear"
        image = photograph(width, height, seed=number)
        theirs = v2.Compose(
            [v2.Resize(resize, InterpolationMode(interpolation)), v2.CenterCrop(size)]
        )
        wanted = np.asarray(theirs(image)).transpose(2, 0, 1)
        # some of them make many exact halves
        found = Transform(size, resize, interpolation)(image)
        assert_equal_up_to_rounding(found, wanted, mean=0.05)


@pytest.mark.parametrize("shape", [(3, 4000), (4000, 3), (1, 9000), (1500, 2000)])
@pytest.mark.parametrize("crop_mode", ["center", "border"])
def test_what_is_too_large_to_resize_whole_is_resized_where_the_crop_is(
    monkeypatch, shape, crop_mode
):
    image = photograph(*shape)
    transform = Transform(31, 33, "bicubic", crop_mode)
    whole = transform(image).astype(int)
    monkeypatch.setattr(module, "_MAX_RESIZED_PIXELS", 0)
    # the passes along rows and columns may change places, and each rounds
    assert np.abs(transform(image) - whole).max() <= 2


def test_thin_images_are_transformed_in_little_memory():
    """Resized whole, they would take 4 GB and more; half a GB is left for them."""
    code = """
import resource
from pathlib import Path
import numpy as np
from PIL import Image
from ood_heatmap.images import Transform
Transform(4)(Image.new("RGB", (9, 9)))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
for length, shape in ((30_000, (-1, 1)), (30_000, (1, -1)), (1_000_000, (-1, 1))):
    gradient = (np.arange(length) * 256 // length).astype(np.uint8)
    pixels = Transform(224)(Image.fromarray(gradient.reshape(shape)))
    assert pixels.shape == (3, 224, 224)
    assert np.abs(pixels.astype(int) - 128).max() <= 1, shape
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_round_trip():
    transform = Transform(224, 256, "bicubic", "border", "#7f7f80")
    assert Transform(**json.loads(json.dumps(asdict(transform)))) == transform


def test_json_of_the_first_version_is_a_center_crop():
    content: dict[str, Any] = {"size": 224, "resize": 256, "interpolation": "bicubic"}
    assert Transform(**content) == Transform(224, 256, "bicubic", "center", "#000000")


def timm_config(**changes) -> dict:
    return {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "crop_pct": 0.9,
        "crop_mode": "center",
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (3, 1024, 768)}, "1024 x 768 px, but inputs must be square"),
        ({"interpolation": "lanczos"}, "'lanczos' is not supported.*bilinear, bicubic"),
        ({"crop_mode": "five"}, "'five' is not supported.*center, squash, border"),
    ],
)
def test_transforms_that_cannot_be_had_are_refused(changes, message):
    assert Transform.from_timm(timm_config()) == Transform(224, 248, "bicubic")
    with pytest.raises(UsageError, match=message):
        Transform.from_timm(timm_config(**changes))


def test_weights_that_are_not_of_a_classifier_are_refused():
    with pytest.raises(UsageError, match=r"not of an image classifier.*SemanticSegmentation"):
        Transform.from_torchvision(SemanticSegmentation(resize_size=520))
