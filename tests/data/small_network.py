"""The classifier of the small run: it must not change, a run knows it by its source."""

import torch
from torch import nn


class Network(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU())
        self.linear = nn.Linear(6, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits ``(B, L)``."""
        logits: torch.Tensor = self.linear(self.layer2(self.layer1(images)).mean(dim=(2, 3)))
        return logits


def network(num_classes: int = 3) -> Network:
    """Return the network with random weights."""
    return Network(num_classes)
