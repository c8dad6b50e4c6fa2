"""The reference's networks: known sizes, known names, and the released nesting of checkpoints."""

import pytest
import torch
from torch.nn import functional

from ood_heatmap.classifier import Classifier, ClassifierConfig
from ood_heatmap.images import Transform
from ood_heatmap.networks import BUILT_IN

# names and shapes as they stand in the released checkpoints
RELEASED = {
    "cifar-resnet18": {
        "conv1.weight": (64, 3, 3, 3),
        "layer1.1.bn2.running_mean": (64,),
        "layer2.0.shortcut.0.weight": (128, 64, 1, 1),
        "layer4.0.shortcut.1.bias": (512,),
        "linear.weight": (10, 512),
    },
    "cifar-resnet50-64px": {
        "layer1.0.conv3.weight": (256, 64, 1, 1),
        "layer1.0.shortcut.0.weight": (256, 64, 1, 1),
        "layer3.5.conv2.weight": (256, 256, 3, 3),
        "linear.bias": (200,),
    },
    "wrn-40-2": {
        "conv1.bias": (16,),
        "layer1.0.shortcut.0.bias": (32,),
        "layer3.5.conv2.weight": (128, 128, 3, 3),
        "bn1.running_var": (128,),
        "linear.weight": (10, 128),
    },
}


def resnet18_parameters(num_classes: int) -> int:
    """Count them from the paper's table: stem, stages of 3x3 convolutions, shortcuts and head."""
    total = 3 * 64 * 9 + 2 * 64
    before = 64
    for width in (64, 128, 256, 512):
        total += before * width * 9 + 3 * width * width * 9 + 4 * 2 * width
        total += before * width + 2 * width if before != width else 0
        before = width
    return total + 512 * num_classes + num_classes


@pytest.mark.parametrize("name", BUILT_IN)
def test_names_and_shapes_are_those_of_the_release(name):
    state = BUILT_IN[name].build(BUILT_IN[name].num_classes).state_dict()
    for key, shape in RELEASED[name].items():
        assert tuple(state[key].shape) == shape


def test_parameter_counts_are_the_known_ones():
    counts = {
        name: sum(item.numel() for item in entry.build(10).parameters())
        for name, entry in BUILT_IN.items()
    }
    assert counts["cifar-resnet18"] == resnet18_parameters(10) == 11_173_962
    assert counts["cifar-resnet50-64px"] == 23_520_842
    # 2,243,546 is the known count without biases of convolutions; 16 are the stem's
    assert counts["wrn-40-2"] == 2_243_546 + 16 + wrn_biases()


def wrn_biases() -> int:
    """Count biases of all convolutions but the stem: two a block and one for each shortcut."""
    return sum(6 * 2 * width + width for width in (32, 64, 128))


@pytest.mark.parametrize(
    ("name", "num_features", "shapes"),
    [
        ("cifar-resnet18", 512, ((512, 4, 4), (256, 8, 8), (128, 16, 16))),
        ("cifar-resnet50-64px", 2048, ((2048, 4, 4), (1024, 8, 8), (512, 16, 16))),
        ("wrn-40-2", 128, ((128, 8, 8), (64, 16, 16), (32, 32, 32))),
    ],
)
def test_features_and_maps_have_the_references_shapes(name, num_features, shapes):
    entry = BUILT_IN[name]
    config = ClassifierConfig(name, None, Transform(entry.size), entry.mean, entry.std, "", 3)
    classifier = Classifier(entry.build(7), config)
    assert (classifier.num_features, classifier.num_classes) == (num_features, 7)
    assert classifier.head == "linear"
    assert classifier.map_shapes == shapes


def test_a_basic_block_is_two_convolutions_and_a_shortcut():
    torch.manual_seed(0)
    block = BUILT_IN["cifar-resnet18"].build(10).eval().layer2[0]
    x = torch.randn(2, 64, 8, 8)

    def norm(y, bn):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return (y - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]

    with torch.no_grad():
        y = norm(functional.conv2d(x, block.conv1.weight, None, 2, 1), block.bn1).clamp(min=0)
        y = norm(functional.conv2d(y, block.conv2.weight, None, 1, 1), block.bn2)
        shortcut = norm(functional.conv2d(x, block.shortcut[0].weight, None, 2), block.shortcut[1])
        torch.testing.assert_close(block(x), (y + shortcut).clamp(min=0), rtol=1e-4, atol=1e-5)
