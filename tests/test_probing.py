"""The head and the feature maps are found by what they do, not by what they are called."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision import models

from ood_heatmap.classifier import Classifier, ClassifierConfig
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import Transform
from ood_heatmap.probing import FeatureMap, random_pixels


def config_of(size: int, num_maps: int) -> ClassifierConfig:
    return ClassifierConfig("net", None, Transform(size), (0.0,) * 3, (1.0,) * 3, "", num_maps)


def pixels_with_a_blob(size: int, row: int, column: int, cell: int) -> torch.Tensor:
    """Return two images of noise, the second with other pixels in one cell of a grid."""
    images = random_pixels(1, size, seed=5).repeat(2, 1, 1, 1)
    blob = images[1, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
    blob.copy_(255 - blob)
    return images


def changed_cell(classifier: Classifier, number: int, images: torch.Tensor) -> tuple[int, int]:
    """Return the cell of a feature map that differs most between two images."""
    grid = classifier(images).maps[number]
    change = (grid[1] - grid[0]).square().sum(dim=0)
    return divmod(int(change.argmax()), change.shape[1])


class Block(nn.Module):
    """A transformer block with its keys of each head as a module's output (B, heads, N, d)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.keys, self.key_norm = nn.Linear(width, width), nn.Identity()
        self.softmax = nn.Softmax(dim=-1)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        keys = self.key_norm(self.keys(y).unflatten(2, (self.heads, -1)).transpose(1, 2))
        attention = self.softmax(keys @ keys.transpose(2, 3) / keys.shape[3] ** 0.5)
        x = x + (attention @ keys).transpose(1, 2).flatten(2)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """A small vision transformer of a fixed input size.

    Args:
        size: Pixels of the input.
        first: Tokens before those of the grid.
        last: Tokens behind them.
    """

    def __init__(self, size: int = 32, first: int = 1, last: int = 0) -> None:
        super().__init__()
        self.size, self.first, self.last = size, first, last
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.others = nn.Parameter(torch.randn(1, first + last, 32))
        num_tokens = (size // 4) ** 2 + first + last
        self.positions = nn.Parameter(torch.randn(1, num_tokens, 32) / 10)
        self.blocks = nn.Sequential(Block(32, 4), Block(32, 4))
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == self.size
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        others = self.others.expand(len(x), -1, -1)
        tokens = torch.cat([others[:, : self.first], tokens, others[:, self.first :]], dim=1)
        return self.head(self.blocks(tokens + self.positions).mean(dim=1))


@pytest.mark.parametrize("first", [0, 1, 2, 5])
def test_tokens_of_a_transformer_are_a_map_without_those_before_the_grid(first):
    torch.manual_seed(0)
    classifier = Classifier(Transformer(first=first), config_of(32, 1))
    assert classifier.map_names == ("blocks (tokens)",)
    assert classifier.map_shapes == ((32, 8, 8),)
    for cell in ((0, 0), (2, 5), (7, 7)):
        assert changed_cell(classifier, 0, pixels_with_a_blob(32, *cell, 4)) == cell


def test_tokens_of_eight_by_eight_with_keys_of_width_eight_are_told_apart():
    """Keys of each head, (heads, 64 tokens, 8) and so on, could be grids by their shape."""
    torch.manual_seed(0)
    for size in (16, 32):
        network = Transformer(size, first=0)
        classifier = Classifier(network, config_of(size, 1))
        assert classifier.map_names == ("blocks (tokens)",)


def test_tokens_with_a_class_token_behind_the_grid_are_not_shifted_silently():
    torch.manual_seed(0)
    classifier = Classifier(Transformer(first=0, last=1), config_of(32, 1))
    assert classifier.map_names == ("patches",)


class LastChannels(nn.Module):
    """A network of channels-last stages, as Swin is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)
        self.mlp, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        # a table of 4 axes that is not a map of the images
        self.table = nn.Identity()
        self.bias = nn.Parameter(torch.randn(1, 8, 8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.stem(x))
        x = x + self.table(self.bias).mean()
        x = self.norm(self.mlp(x.permute(0, 2, 3, 1)))
        return self.head(x.mean(dim=(1, 2)))


def test_channels_last_outputs_come_as_channels_first():
    torch.manual_seed(0)
    # 8 channels on an 8x8 grid: the shape tells nothing
    classifier = Classifier(LastChannels(), config_of(32, 2))
    assert classifier.map_names == ("norm (channels last)", "stem")
    images = random_pixels(3, 32)
    network, x = classifier.network, images / 255
    with torch.no_grad():
        grid = network.down(network.stem(x)) + network.bias.mean()
        wanted = network.norm(network.mlp(grid.permute(0, 2, 3, 1)))
    torch.testing.assert_close(classifier(images).maps[0], wanted.permute(0, 3, 1, 2))
    assert changed_cell(classifier, 0, pixels_with_a_blob(32, 1, 6, 4)) == (1, 6)


class FixedLeNet(nn.Module):
    """A network whose linear layer fixes the input size, and whose weights are module outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(3, 3, 3, 2, 1))
        self.conv2 = spectral_norm(nn.Conv2d(3, 10, 3, 2, 1))
        self.linear = nn.Linear(10 * 4 * 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))


def test_weights_of_parametrizations_are_not_maps():
    torch.manual_seed(0)
    classifier = Classifier(FixedLeNet(), config_of(16, 2))
    assert classifier.map_names == ("conv2", "conv1")
    assert classifier.map_shapes == ((10, 4, 4), (3, 8, 8))
    with pytest.raises(OodHeatmapError, match="maps of 2 sizes, --feature-maps asks for 3"):
        Classifier(FixedLeNet(), config_of(16, 3))


def test_a_network_that_resizes_its_input_has_maps():
    class Resizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.resnet18(num_classes=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(nn.functional.interpolate(x, (64, 64)))

    torch.manual_seed(0)
    classifier = Classifier(Resizing(), config_of(32, 2))
    assert classifier.map_names == ("inner.layer4", "inner.layer3")


@pytest.mark.parametrize(
    ("name", "size", "names", "shapes"),
    [
        (
            "swin_t",
            64,
            ("permute", "features.5 (channels last)"),
            ((768, 2, 2), (384, 4, 4)),
        ),
        ("swin_v2_t", 64, ("permute", "features.5 (channels last)"), ((768, 2, 2), (384, 4, 4))),
        ("convnext_tiny", 64, ("features", "features.5"), ((768, 2, 2), (384, 4, 4))),
        ("vit_b_32", 224, ("encoder (tokens)",), ((768, 7, 7),)),
    ],
)
def test_maps_of_torchvisions_transformers(name, size, names, shapes):
    torch.manual_seed(0)
    network = models.get_model(name, weights=None, num_classes=3)
    classifier = Classifier(network, config_of(size, len(names)))
    assert classifier.map_names == names
    assert classifier.map_shapes == shapes


@pytest.mark.parametrize(
    ("name", "options", "names", "shapes"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {},
            ("norm (channels last)", "layers.2 (channels last)"),
            ((768, 7, 7), (384, 14, 14)),
        ),
        ("vit_tiny_patch16_224", {}, ("norm (tokens)",), ((192, 14, 14),)),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, ("norm (tokens)",), ((192, 14, 14),)),
        ("mixer_s32_224", {}, ("norm (tokens)",), ((512, 7, 7),)),
    ],
)
def test_maps_of_timms_networks(name, options, names, shapes):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=3, **options)
    classifier = Classifier(network, config_of(224, len(names)))
    assert classifier.map_names == names
    assert classifier.map_shapes == shapes
    cell = 224 // shapes[0][1]
    assert changed_cell(classifier, 0, pixels_with_a_blob(224, 2, 5, cell)) == (2, 5)


@pytest.mark.parametrize("layout", ["channels first", "channels last", "tokens"])
def test_the_name_of_a_map_says_its_layout(layout):
    item = FeatureMap("features.7", layout)
    assert FeatureMap.parse(str(item)) == item


class Twice(nn.Module):
    """A network whose head is used on an image and its mirror image."""

    def __init__(self, combine: str) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.combine = combine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = (
            self.fc(torch.relu(self.conv(view))[..., :3].mean(dim=(2, 3)))
            for view in (x, x.flip(3))
        )
        return one if self.combine == "first" else (one + other) / 2


@pytest.mark.parametrize("combine", ["first", "mean"])
def test_a_head_that_is_used_for_several_views_is_refused(combine):
    torch.manual_seed(0)
    with pytest.raises(OodHeatmapError, match=r"no linear layer .*\(the last are fc\)"):
        Classifier(Twice(combine), config_of(16, 0))


def test_a_convolution_on_a_pooled_map_is_a_head():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.Flatten()
    )
    classifier = Classifier(network, config_of(8, 0))
    assert classifier.head == "3"
    images = random_pixels(3, 8)
    output = classifier(images)
    torch.testing.assert_close(output.features, network[:3](images / 255).flatten(1))
    head = classifier.last_layer()
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(head(output.features), output.logits)
    assert classifier.last_layer().weight.shape == (4, 6)
