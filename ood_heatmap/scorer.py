"""Scorers: one OOD score for each image, from the outputs of classifier and decoder."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    # only for annotations
    from ood_heatmap.classifier import Output


class Scorer(nn.Module):
    """Base class of scorers; what one needs to know is in its buffers, saved as safetensors."""

    # recorded where the buffers are saved
    kind: str

    def forward(self, output: "Output", learned: Tensor) -> Tensor:
        """Return the score ``(B,)`` float32 of images; larger is more OOD.

        Args:
            output: Output of the classifier.
            learned: ``(B,)`` image scores of the decoder.
        """
        raise NotImplementedError

    def level(self, score: Tensor) -> Tensor:
        """Return the log-odds ``(B,)`` that heatmaps show at most, from what ``forward`` returned.

        Increases with the score.
        """
        return score


class HeatmapScorer(Scorer):
    """The image score of the decoder."""

    kind = "heatmap"

    def forward(self, output: "Output", learned: Tensor) -> Tensor:
        """Return the decoder's score ``(B,)``."""
        return learned
