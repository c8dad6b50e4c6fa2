"""Scorers: one OOD score for each image, from the classifier's output and the heatmap."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ood_heatmap.heatmap import score

if TYPE_CHECKING:
    # only for annotations
    from ood_heatmap.classifier import Output


class Scorer(nn.Module):
    """Base class of scorers; what one needs to know is in its buffers, saved as safetensors."""

    # recorded where the buffers are saved
    kind: str

    def forward(self, output: "Output", heatmap: Tensor) -> Tensor:
        """Return the score ``(B,)`` float32 of images; larger is more OOD.

        Args:
            output: Output of the classifier.
            heatmap: ``(B, C, H, W)`` output of the decoder.
        """
        raise NotImplementedError


class HeatmapScorer(Scorer):
    """The mean pixel score of the heatmap, in [0, 1]."""

    kind = "heatmap"

    def forward(self, output: "Output", heatmap: Tensor) -> Tensor:
        """Return the mean pixel score ``(B,)``."""
        return score(heatmap)
