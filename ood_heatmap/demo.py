"""Images, classifier and commands of the demo, from data shipped with the dependencies.

ID: scikit-learn's handwritten digits. OOD for training: crops of one of its two sample photographs.
OOD for testing: crops of the other, and, as the near set, letters drawn with matplotlib's fonts.
"""

import string
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

WEIGHTS = "classifier.safetensors"
# the whole photograph behind the crops of ``photo-test``
PHOTOGRAPH = "photo/flower.jpg"
FOLDERS = ("id-train", "id-test", "ood-train", "photo-test", "letters")
_SIZE = 32
_NUM_OOD_TRAIN, _NUM_OOD_TEST = 1000, 300
# without letters that look like digits
_LETTERS = sorted(set(string.ascii_uppercase) - set("BDGIOQSZ"))


class DigitsNetwork(nn.Module):
    """A small convolutional classifier of digits: 64 features, 10 classes, 32x32 pixels."""

    input_size = _SIZE

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
            )
            for before, after in pairwise(widths)
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Classify float images ``(B, 3, 32, 32)``."""
        for stage in self.stages:
            images = stage(images)
        logits: Tensor = self.linear(images.mean(dim=(2, 3)))
        return logits


def digits_network() -> DigitsNetwork:
    """Return the demo's classifier, untrained; its SPEC is ``ood_heatmap.demo:digits_network``."""
    return DigitsNetwork()


def demo_commands(run: Path, data: Path) -> list[list[str]]:
    """Return the commands of the four stages and ``predict``, starting with the command name."""
    weights = data / WEIGHTS
    commands: list[list[str | Path | int]] = [
        ["index", run, "--id", data / "id-train"],
        ["targets", run, "--ood", data / "ood-train"],
        ["train", run, "--epochs", 15, "--batch-size", 100],
        ["evaluate", run, "--id", data / "id-test", "--near", "letters"],
    ]
    commands[0] += ["--classifier", "ood_heatmap.demo:digits_network", "--weights", weights]
    commands[-1] += ["--ood", f"photo={data / 'photo-test'}"]
    commands[-1] += ["--ood", f"letters={data / 'letters'}"]
    # letters that look like no digit, and two digits
    names = [*(f"letters/{number:04d}.png" for number in range(4)), "id-test/3", "id-test/8"]
    pictures: list[str | Path | int] = ["predict", run]
    pictures += [data / name for name in (PHOTOGRAPH, *names)]
    commands.append([*pictures, "--out", run / "predictions", "--overwrite"])
    return [[str(argument) for argument in command] for command in commands]


def whole_photograph() -> bytes:
    """Return the JPEG file of which ``photo-test`` are crops, as it comes with scikit-learn."""
    # the second one
    return (files("sklearn.datasets.images") / "flower.jpg").read_bytes()


def demo_images() -> Iterator[tuple[str, Image.Image]]:
    """Yield the path and content of every image of the demo; deterministic.

    Paths begin with one of ``FOLDERS``; ID images are in one subfolder per class.
    """
    digits = load_digits()
    # the data set is ordered by writer: the last fifth is by other writers
    num_train = len(digits.images) * 4 // 5
    for number, (digit, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = "id-train" if number < num_train else "id-test"
        yield f"{folder}/{label}/{number:04d}.png", _draw_digit(digit)
    photographs = load_sample_images().images
    generator = np.random.default_rng(0)
    for number in range(_NUM_OOD_TRAIN):
        yield f"ood-train/{number:04d}.png", _random_crop(photographs[0], generator)
    for number in range(_NUM_OOD_TEST):
        yield f"photo-test/{number:04d}.png", _random_crop(photographs[1], generator)
    for number, image in enumerate(_draw_letters(_NUM_OOD_TEST, generator)):
        yield f"letters/{number:04d}.png", image


def _draw_digit(digit: NDArray[np.float64]) -> Image.Image:
    """Resize an 8x8 digit with values 0 to 16 to the network's input size."""
    small = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return small.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR).convert("RGB")


def _random_crop(photograph: NDArray[np.uint8], generator: np.random.Generator) -> Image.Image:
    """Return a square crop of a photograph, at random position and scale."""
    height, width, _ = photograph.shape
    side = int(generator.integers(_SIZE, 4 * _SIZE))
    top, left = int(generator.integers(height - side)), int(generator.integers(width - side))
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    return crop.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)


def _draw_letters(count: int, generator: np.random.Generator) -> Iterator[Image.Image]:
    """Yield capital letters, light on dark and reduced to 8x8 pixels, like the digits."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [
        ImageFont.truetype(folder / name, 26)
        for name in ("DejaVuSans.ttf", "DejaVuSerif-Italic.ttf")
    ]
    for _ in range(count):
        picture = Image.new("L", (_SIZE, _SIZE))
        center = (_SIZE / 2 + generator.uniform(-2, 2), _SIZE / 2 + generator.uniform(-2, 2))
        letter, font = _LETTERS[generator.integers(len(_LETTERS))], fonts[generator.integers(2)]
        ImageDraw.Draw(picture).text(center, letter, fill=255, font=font, anchor="mm")
        small = picture.resize((8, 8), Image.Resampling.BOX)
        yield _draw_digit(np.asarray(small, dtype=np.float64) * (16 / 255))


def train_classifier(
    images: NDArray[np.uint8], labels: NDArray[np.int64], epochs: int = 25
) -> DigitsNetwork:
    """Train the demo's classifier.

    Args:
        images: ``(N, H, W, 3)`` uint8.
        labels: ``(N,)`` int64.
        epochs: Number of epochs.

    Returns:
        The network in eval mode.
    """
    # in the order of class folders
    by_class = np.argsort(labels, kind="stable")
    inputs = torch.from_numpy(images[by_class]).permute(0, 3, 1, 2).contiguous().float() / 255
    targets = torch.from_numpy(labels[by_class])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DigitsNetwork().train()
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(inputs)), 64):
                loss = nn.functional.cross_entropy(network(inputs[rows]), targets[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return network.eval()
