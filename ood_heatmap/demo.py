"""All four stages on data that come with the dependencies: nothing is fetched.

ID: scikit-learn's handwritten digits. OOD to train with: crops of one of its two sample
photographs; to test on: crops of the other, and, as the near set, letters drawn with matplotlib's
own font.
"""

import logging
import string
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

from ood_heatmap.cache.files import make_directory, replacing
from ood_heatmap.errors import UsageError
from ood_heatmap.images import Transform, open_images

log = logging.getLogger(__name__)

SIZE = 32
FOLDERS = ("id-train", "id-test", "ood-train", "photo-test", "letters")
NUM_OOD_TRAIN, NUM_OOD_TEST = 1000, 300
LETTERS = sorted(
    set(string.ascii_uppercase) - set("BDGIOQSZ")
)  # without those that pass for digits


class DigitsNetwork(nn.Module):
    """A small convolutional classifier of digits: 64 features, 10 classes, 32x32 pixels."""

    input_size = SIZE

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
    """Return the demo's classifier, untrained; the SPEC is ``ood_heatmap.demo:digits_network``."""
    return DigitsNetwork()


def prepare_demo(run: Path) -> list[list[str]]:
    """Make the data, train the classifier, and return the commands of the four stages.

    Raises:
        UsageError: ``run`` holds something that is not the demo's.
    """
    data, weights = run / "data", run / "data" / "classifier.safetensors"
    if not weights.is_file():
        if not _is_free(run):
            raise UsageError(f"{run} is not a run of the demo: name a new directory.")
        log.info("writing images to %s and training a small classifier of digits", data)
        write_data(data)
        train_classifier(data / "id-train", weights)
    sets = {"photo": data / "photo-test", "letters": data / "letters"}
    spec = "ood_heatmap.demo:digits_network"
    commands = [
        ["index", run, "--id", data / "id-train", "--classifier", spec, "--weights", weights],
        ["targets", run, "--ood", data / "ood-train"],
        ["train", run, "--epochs", 15, "--batch-size", 100],
        ["evaluate", run, "--id", data / "id-test", "--near", "letters"],
    ]
    for name, folder in sets.items():
        commands[-1] += ["--ood", f"{name}={folder}"]
    return [[str(item) for item in command] for command in commands]


def _is_free(run: Path) -> bool:
    """Tell whether a directory is missing, empty, or holds data of a demo that was interrupted."""
    if not run.exists():
        return True
    inside = {path.relative_to(run).parts[:2] for path in run.glob("*/*")}
    return {path.name for path in run.iterdir()} <= {"data"} and inside <= {
        ("data", folder) for folder in FOLDERS
    }


def write_data(data: Path) -> None:
    """Write all sets as folders of PNG files, the same every time."""
    digits = load_digits()
    images = [digit_image(digit) for digit in digits.images]
    # the sets of writers differ from front to back: the last fifth is written by others
    split = len(images) * 4 // 5
    for number, (image, label) in enumerate(zip(images, digits.target, strict=True)):
        folder = "id-train" if number < split else "id-test"
        save(image, data / folder / str(label) / f"{number:04d}.png")
    photographs = load_sample_images().images
    generator = np.random.default_rng(0)
    for folder, photograph, count in (
        ("ood-train", photographs[0], NUM_OOD_TRAIN),
        ("photo-test", photographs[1], NUM_OOD_TEST),
    ):
        for number in range(count):
            save(crop(photograph, generator), data / folder / f"{number:04d}.png")
    for number, image in enumerate(letter_images(NUM_OOD_TEST, generator)):
        save(image, data / "letters" / f"{number:04d}.png")


def save(image: Image.Image, path: Path) -> None:
    """Write one PNG, whole."""
    make_directory(path.parent)
    with replacing(path) as scratch:
        image.save(scratch, "png")


def digit_image(digit: NDArray[np.float64]) -> Image.Image:
    """Return an 8x8 digit with values 0 to 16 as a picture."""
    small = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB")


def crop(photograph: NDArray[np.uint8], generator: np.random.Generator) -> Image.Image:
    """Return a square piece of a photograph, of random place and size."""
    height, width, _ = photograph.shape
    side = int(generator.integers(SIZE, 4 * SIZE))
    top, left = int(generator.integers(height - side)), int(generator.integers(width - side))
    piece = Image.fromarray(photograph[top : top + side, left : left + side])
    return piece.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def letter_images(count: int, generator: np.random.Generator) -> Iterator[Image.Image]:
    """Yield capital letters, light on dark as the digits are, brought down to 8x8 and up again as
    they were."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [
        ImageFont.truetype(folder / name, 26)
        for name in ("DejaVuSans.ttf", "DejaVuSerif-Italic.ttf")
    ]
    for _ in range(count):
        picture = Image.new("L", (SIZE, SIZE))
        place = (SIZE / 2 + generator.uniform(-2, 2), SIZE / 2 + generator.uniform(-2, 2))
        letter, font = LETTERS[generator.integers(len(LETTERS))], fonts[generator.integers(2)]
        ImageDraw.Draw(picture).text(place, letter, fill=255, font=font, anchor="mm")
        small = picture.resize((8, 8), Image.Resampling.BOX)
        yield digit_image(np.asarray(small, dtype=np.float64) * (16 / 255))


def train_classifier(folder: Path, weights: Path, epochs: int = 25) -> None:
    """Train the demo's classifier, which is fixed from then on."""
    images = open_images(str(folder))
    transform = Transform(SIZE)
    pixels = np.stack([transform(images.read(row)[0]) for row in range(len(images))])
    inputs = torch.from_numpy(pixels).float() / 255
    labels = torch.from_numpy(images.labels).long()
    torch.manual_seed(0)
    network = digits_network().train()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(inputs)), 64):
            loss = nn.functional.cross_entropy(network(inputs[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with replacing(weights) as scratch:
        save_file(network.eval().state_dict(), scratch)
