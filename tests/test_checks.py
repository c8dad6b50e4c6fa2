"""What a classifier must do to be used is checked on random pixels, each fault with one line."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ood_heatmap.checks import _relative_distance, check_finite, library_versions
from ood_heatmap.classifier import Classifier, ClassifierConfig
from ood_heatmap.errors import OodHeatmapError, StaleCacheError
from ood_heatmap.images import Transform
from ood_heatmap.probing import random_pixels


class Network(nn.Module):
    """A small network whose features or logits go through functions."""

    def __init__(self, before=None, after=None, num_classes: int = 4) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, num_classes)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        features = functional.relu(self.conv(x)).mean(dim=(2, 3))
        logits = self.fc(self.before(features) if self.before else features)
        return self.after(logits) if self.after else logits


def classifier_of(network: nn.Module, head: str = "", **settings) -> Classifier:
    config = ClassifierConfig(
        "net.py:f", None, Transform(16), (0.0,) * 3, (1.0,) * 3, head, **settings
    )
    return Classifier(network, config)


def with_nan_bias(network: Network) -> Network:
    with torch.no_grad():
        network.fc.bias[2] = torch.nan
    return network


@pytest.mark.parametrize(
    ("network", "head", "words"),
    [
        (Network(after=lambda x: x.log_softmax(1)), "", r"no linear layer .*log_softmax"),
        (
            Network(after=lambda x: x.log_softmax(1)),
            "fc",
            r"fc\(features\) of net.py:f is not what",
        ),
        (Network(after=lambda x: x / 3), "fc", r"fc\(features\) of net.py:f is not what"),
        (Network(before=lambda x: functional.dropout(x, 0.3)), "", "random in eval mode"),
        (Network(before=lambda x: x + torch.rand_like(x) / 99), "", "random in eval mode"),
        (Network(before=lambda x: x - x.mean(dim=0)), "", "depend on the other images"),
        (
            Network(before=lambda x: functional.batch_norm(x, None, None, training=True)),
            "",
            "depend on the other images|Expected more than 1 value per channel",
        ),
        (with_nan_bias(Network()), "", "NaN or infinite logits, first for class 2"),
        (with_nan_bias(Network()), "fc", "NaN or infinite logits, first for class 2"),
        (Network(before=lambda x: x / 0), "fc", "NaN or infinite logits"),
        (Network(num_classes=1), "", "one logit per image"),
        (Network(after=lambda x: x[:, 0]), "", r"returns shape \(2,\).*must be \(B, L\)"),
        (Network(after=lambda x: (x, x)), "", "returns tuple"),
        (Network(after=lambda x: {"logits": x}), "", "returns dict"),
        (Network(after=lambda x: x[:1]), "", r"returns shape \(1, 4\)"),
    ],
)
def test_a_network_that_cannot_be_relied_on_is_refused(network, head, words):
    torch.manual_seed(0)
    with pytest.raises(OodHeatmapError, match=words) as caught:
        classifier_of(network, head)
    assert "\n" not in str(caught.value)


def test_features_are_kept_as_they_were_whatever_changes_them_in_place():
    torch.manual_seed(0)
    kept: list[torch.Tensor] = []

    class InPlace(Network):
        def forward(self, x: Tensor) -> Tensor:
            grid = self.conv(x)
            features = functional.relu(grid).mean(dim=(2, 3))
            kept[:] = [grid.clone(), features.clone()]
            logits = self.fc(features)
            features.zero_()
            grid.zero_()
            return logits

    classifier = classifier_of(InPlace(), num_maps=1)
    output = classifier(random_pixels(3, 16))
    assert torch.equal(output.maps[0], kept[0])
    assert torch.equal(output.features, kept[1])


def test_a_network_that_flattens_with_view_computes_what_it_does_by_itself():
    class OldLeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 5), nn.Linear(6 * 6 * 6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.max_pool2d(functional.relu(self.conv(x)), 2)
            return self.fc(x.view(x.size(0), -1))

    torch.manual_seed(0)
    network, images = OldLeNet(), random_pixels(5, 16)
    with torch.no_grad():
        wanted = network(images / 255)
    torch.testing.assert_close(classifier_of(network, num_maps=1)(images).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_converted(dtype):
    torch.manual_seed(0)
    network = Network().to(dtype)
    wanted = Network()
    wanted.load_state_dict(network.state_dict())
    classifier = classifier_of(network)
    images = random_pixels(3, 16)
    torch.testing.assert_close(classifier(images).logits, wanted(images / 255))
    assert {item.dtype for item in classifier.network.state_dict().values()} == {torch.float32}


def test_a_network_that_fails_is_one_line_with_its_reason():
    def fail(features: Tensor) -> Tensor:
        assert features.shape[1] == 9, "Wrong image height!"
        return features

    words = r"net.py:f cannot classify images of 16 px \(AssertionError: Wrong image height!, .*"
    with pytest.raises(OodHeatmapError, match=words + r"test_checks\.py line \d+\)\. Check --size"):
        classifier_of(Network(before=fail))


def test_nan_features_name_the_image():
    features = np.zeros((3, 2), np.float32)
    features[1, 0] = np.nan
    names = [""] * 7 + ["b.png"]
    for kind in ("features", "logits"):
        with pytest.raises(OodHeatmapError, match=rf"NaN or infinite {kind} for b\.png"):
            check_finite(features, np.array([4, 7, 9]), names, kind)


def test_relative_distance_is_the_largest_of_all_rows():
    expected = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    values = torch.tensor([[3.0, 4.5], [0.5, 2.0], [0.0, 0.0]])
    assert _relative_distance(values, expected) == pytest.approx(max(0.5 / 5, 0.5 / 2))
    assert _relative_distance(expected, expected) == 0
    values[2, 0] = 1e-9
    assert _relative_distance(values, expected) > 1
    assert np.isnan(_relative_distance(values * torch.nan, expected))


@pytest.fixture
def indexed():
    """Return a classifier, a few images, and what an index holds of them."""
    torch.manual_seed(0)
    classifier = classifier_of(Network(), num_maps=1)
    images = random_pixels(4, 16)
    output = classifier(images)
    return (
        classifier,
        images.numpy(),
        output.features.numpy(),
        [item.half().numpy() for item in output.maps],
    )


def test_the_same_classifier_returns_the_same(indexed):
    classifier, images, features, maps = indexed
    classifier.check_same_outputs(images, features, maps)
    # rounding, as of other hardware; and fewer maps than the index holds
    classifier.check_same_outputs(images, features * np.float32(1 + 1e-3), maps)
    classifier.maps = ()
    classifier.check_same_outputs(images, features, maps)


@pytest.mark.parametrize("change", ["features", "map", "nan", "width"])
def test_a_classifier_that_returns_something_else_is_refused(indexed, change):
    classifier, images, features, maps = indexed
    features, maps = features.copy(), [item.copy() for item in maps]
    if change == "features":
        features[2] *= 1.05
    elif change == "map":
        maps[0][3] = maps[0][3].transpose(0, 2, 1)
    elif change == "nan":
        features[0, 0] = np.nan
    else:
        features = features[:, :-1]
    other = "conv" if change == "map" else "features"
    with pytest.raises(StaleCacheError, match=rf"net\.py:f returns different {other} than when"):
        classifier.check_same_outputs(images, features, maps)


def test_what_was_upgraded_is_named(indexed):
    classifier, images, features, maps = indexed
    versions = library_versions() | {"torchvision": "0.1.0", "timm": "0.2.0"}
    with pytest.raises(StaleCacheError, match=r"torchvision 0\.1\.0 then, \S+ now; timm 0\.2\.0"):
        classifier.check_same_outputs(images, 2 * features, maps, versions)
    assert torch.__version__.startswith(library_versions()["torch"].partition("+")[0])
