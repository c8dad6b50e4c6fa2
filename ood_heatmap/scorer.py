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
        """Return the log-odds ``(B,)`` that an image is OOD, from what ``forward`` returned.

        Increases with the score.
        """
        return score

    def local(self, places: Tensor) -> Tensor | None:
        """Return the log-odds that pixels are OOD in an image that is ID otherwise.

        Args:
            places: Log-odds of pixels, of any shape, as the decoder returns them.

        Returns:
            The same shape, on the scale of ``level``; None if that scale is not known.
        """
        return None


class HeatmapScorer(Scorer):
    """The image score of the decoder."""

    kind = "heatmap"

    def forward(self, output: "Output", learned: Tensor) -> Tensor:
        """Return the decoder's score ``(B,)``."""
        return learned
