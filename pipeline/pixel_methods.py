"""Pixel scores of every method for localization: the heatmap, controls and sanity checks."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ood_heatmap.cache.flat import FlatBank
from ood_heatmap.cache.neighbours import Bank
from ood_heatmap.cache.shards import Rows
from ood_heatmap.classifier import Classifier, Output
from ood_heatmap.decoder import Decoder
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.pipeline.config import LocalizeConfig
from ood_heatmap.pipeline.forward import BatchedClassifier
from ood_heatmap.pipeline.run import Index
from ood_heatmap.pipeline.scoring import HEATMAP

_Float32 = NDArray[np.float32]
_UInt8 = NDArray[np.uint8]
# (B, H, W) by method, larger is more OOD
PixelScores = dict[str, _Float32]

CENTRE, _DIFFERENCE, DISTANCE = "centre prior", "nearest difference", "feature distance"
SHUFFLED, SWAPPED = "shuffled weights", "swapped class"
# ID training images and locations in them for the feature distance
NUM_IMAGES, NUM_LOCATIONS = 2_000, 20_000


@dataclass(frozen=True)
class LocalizationMethods:
    """The heatmap, its controls and its sanity checks.

    Args:
        index: Index of the run, for the nearest ID images.
        bank: Features of the index.
        decoder: Trained decoder, in eval mode.
        forward: The classifier; returns at least one feature map if its network has any.
        shuffled: The classifier with the elements of each weight shuffled.
        locations: Features of locations in ID training images; None without feature maps.
        batch_size: Images per forward pass of the decoder.
        trained: Further methods by name: images ``(B, 3, H, W)`` uint8 to pixel scores.
    """

    index: Index
    bank: Bank
    decoder: Decoder
    forward: BatchedClassifier
    shuffled: BatchedClassifier
    locations: FlatBank | None
    batch_size: int
    trained: dict[str, Callable[[_UInt8], _Float32]] = field(default_factory=dict)

    def __call__(self, pixels: _UInt8) -> PixelScores:
        """Score the pixels of images ``(B, 3, H, W)``."""
        output = self.forward(pixels)
        prediction = output.logits.argmax(dim=1)
        scores = {
            HEATMAP: self._heatmap(output, prediction),
            CENTRE: np.broadcast_to(_centre_prior(pixels.shape[-1]), pixels[:, 0].shape),
            _DIFFERENCE: self._difference(pixels, output, prediction),
        }
        if self.locations is not None:
            scores[DISTANCE] = self._distance(output.maps[0], pixels.shape[-1])
        shuffled = self.shuffled(pixels)
        scores[SHUFFLED] = self._heatmap(shuffled, shuffled.logits.argmax(dim=1))
        if self.decoder.places_see_class:
            swapped = (prediction + 1) % self.forward.classifier.num_classes
            scores[SWAPPED] = self._heatmap(output, swapped)
        return scores | {name: method(pixels) for name, method in self.trained.items()}

    def predict(self, pixels: _UInt8) -> NDArray[np.int64]:
        """Return the predicted classes of images, ``(B,)``."""
        prediction: NDArray[np.int64] = self.forward(pixels).logits.argmax(dim=1).numpy()
        return prediction

    @torch.inference_mode()
    def _heatmap(self, output: Output, prediction: Tensor) -> _Float32:
        """Return the decoder's pixel scores at the images' size, ``(B, H, W)``."""
        device, pixel_scores = self.forward.classifier.device, []
        maps = output.maps[: len(self.decoder.config.map_shapes)]
        for start in range(0, len(prediction), self.batch_size):
            rows = slice(start, start + self.batch_size)
            found = self.decoder.place_scores(
                output.features[rows].to(device),
                prediction[rows].to(device),
                [item[rows].to(device).float() for item in maps],
            )
            pixel_scores.append(resize(found.cpu(), self.index.size))
        # shuffled weights may overflow to infinity and give NaN
        scores: _Float32 = torch.cat(pixel_scores).nan_to_num(0.0).numpy()
        return scores

    def _difference(self, pixels: _UInt8, output: Output, prediction: Tensor) -> _Float32:
        """Return the absolute difference to the nearest ID image of the predicted class."""
        found = self.bank.nearest(output.features.numpy(), prediction.numpy())
        nearest = self.index.columns["images"].take(self.index.positions(found.row))
        difference: _Float32 = np.abs(nearest.astype(np.float32) - pixels).max(axis=1)
        return difference

    def _distance(self, maps: Tensor, size: int) -> _Float32:
        """Return each location's distance to the nearest ID location, ``(B, size, size)``.

        Source: after Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022.
        """
        assert self.locations is not None
        distance, _ = self.locations.search(_locations(maps).reshape(-1, maps.shape[1]), k=1)
        coarse = torch.from_numpy(distance).view(len(maps), *maps.shape[2:])
        fine: _Float32 = resize(coarse, size).numpy()
        return fine


def resize(pixel_scores: Tensor, size: int) -> Tensor:
    """Interpolate pixel scores ``(B, h, w)`` to ``(B, size, size)``; unchanged if equal."""
    if pixel_scores.shape[-1] == size:
        return pixel_scores
    return interpolate(pixel_scores[:, None], (size, size), mode="bilinear")[:, 0]


def make_localization_methods(
    index: Index, decoder: Decoder, device: torch.device, config: LocalizeConfig
) -> LocalizationMethods:
    """Make all methods; ``config.seed`` determines ID locations and shuffled weights."""
    num_maps = len(decoder.config.map_shapes)
    classifier = index.classifier(device, num_maps)
    if not num_maps:
        # one map for the feature distance, if the network has any
        with contextlib.suppress(OodHeatmapError):
            classifier = index.classifier(device, 1)
    shuffled = index.classifier(device, num_maps)
    _shuffle_weights(shuffled, config.seed)
    forward = BatchedClassifier(classifier, config.batch_size)
    locations = None
    if classifier.map_names:
        drawn = _draw_locations(index, forward, config)
        centre = drawn.mean(axis=0)
        locations = FlatBank(Rows([drawn]), lambda rows: rows - centre, device)
    return LocalizationMethods(
        index,
        # on the CPU: a few queries, and only the classes that are predicted for them
        index.bank(torch.device("cpu")),
        decoder,
        forward,
        BatchedClassifier(shuffled, config.batch_size),
        locations,
        config.batch_size,
    )


def _shuffle_weights(classifier: Classifier, seed: int) -> None:
    """Shuffle the elements of each weight of a classifier.

    Source: after Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in classifier.network.parameters():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.data.copy_(weight.data.flatten()[order].view(weight.shape))


def _locations(maps: Tensor) -> _Float32:
    """Reshape feature maps ``(B, C, h, w)`` to features of locations, ``(B, h w, C)`` float32."""
    locations: _Float32 = maps.float().flatten(2).transpose(1, 2).contiguous().numpy()
    return locations


def _draw_locations(index: Index, forward: BatchedClassifier, config: LocalizeConfig) -> _Float32:
    """Sample features at random locations of random ID training images, from the deepest map.

    Returns:
        ``(M, C)`` float32, M at most ``NUM_LOCATIONS``.
    """
    generator = np.random.default_rng(config.seed)
    num_id = len(index.columns["row"])
    rows = np.sort(generator.choice(num_id, min(num_id, NUM_IMAGES), replace=False))
    sampled = []
    for start in range(0, len(rows), config.batch_size):
        images = index.columns["images"].take(rows[start : start + config.batch_size])
        features = _locations(forward(images).maps[0])
        order = generator.permuted(
            np.tile(np.arange(features.shape[1]), (len(features), 1)), axis=1
        )
        chosen = order[:, : max(1, NUM_LOCATIONS // len(rows)), None]
        sampled.append(np.take_along_axis(features, chosen, axis=1).reshape(-1, features.shape[2]))
    return np.concatenate(sampled)


def _centre_prior(size: int) -> _Float32:
    """Return scores that increase towards the centre, independent of the image, ``(H, W)``."""
    offset = np.arange(size) - (size - 1) / 2
    prior: _Float32 = -np.hypot(offset[:, None], offset).astype(np.float32)
    return prior
