"""The reference's networks: known sizes, known names, and the released nesting of checkpoints."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torchvision import models

from ood_heatmap.classifier import (
    Classifier,
    ClassifierConfig,
    load_classifier,
    restore_classifier,
)
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import Transform
from ood_heatmap.networks import _BUILT_IN, build

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


@pytest.mark.parametrize("name", _BUILT_IN)
def test_names_and_shapes_are_those_of_the_release(name):
    state = _BUILT_IN[name].build(_BUILT_IN[name].num_classes).state_dict()
    for key, shape in RELEASED[name].items():
        assert tuple(state[key].shape) == shape


def test_parameter_counts_are_the_known_ones():
    counts = {
        name: sum(item.numel() for item in entry.build(10).parameters())
        for name, entry in _BUILT_IN.items()
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
    entry = _BUILT_IN[name]
    config = ClassifierConfig(name, None, Transform(entry.size), entry.mean, entry.std, "", 3)
    classifier = Classifier(entry.build(7), config)
    assert (classifier.num_features, classifier.num_classes) == (num_features, 7)
    assert classifier.head == "linear"
    assert classifier.map_shapes == shapes


def test_a_basic_block_is_two_convolutions_and_a_shortcut():
    torch.manual_seed(0)
    block = _BUILT_IN["cifar-resnet18"].build(10).eval().layer2[0]
    x = torch.randn(2, 64, 8, 8)

    def norm(y, bn):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return (y - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]

    with torch.no_grad():
        y = norm(functional.conv2d(x, block.conv1.weight, None, 2, 1), block.bn1).clamp(min=0)
        y = norm(functional.conv2d(y, block.conv2.weight, None, 1, 1), block.bn2)
        shortcut = norm(functional.conv2d(x, block.shortcut[0].weight, None, 2), block.shortcut[1])
        torch.testing.assert_close(block(x), (y + shortcut).clamp(min=0), rtol=1e-4, atol=1e-5)


def structure(network: nn.Module) -> dict[str, object]:
    """Return what a network computes with: its modules, shapes, and plain attributes."""
    plain = (bool, int, float, str, tuple)
    attributes = {
        f"{name}.{attribute}": value
        for name, module in network.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, plain) and attribute != "training"
    }
    kinds = {name: (type(item), item.extra_repr()) for name, item in network.named_modules()}
    shapes = {f"{name}.shape": value.shape for name, value in network.state_dict().items()}
    return {**kinds, **attributes, **shapes}


@pytest.fixture
def nothing_is_fetched(monkeypatch):
    """Let torchvision build networks as for its weights, without these and without memory."""
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    make_blocks = models.regnet.BlockParams.from_init_params

    def on_cpu(*arguments, **options):
        with torch.device("cpu"):
            return make_blocks(*arguments, **options)

    # it computes the widths of the network with tensors
    monkeypatch.setattr(models.regnet.BlockParams, "from_init_params", on_cpu)
    with torch.device("meta"):
        yield


# networks of one module are built by one function: one of them stands for all
FAMILIES = {
    models.get_model_builder(name).__module__: name
    for name in sorted(models.list_models(module=models), key=len, reverse=True)
}
SPECS = [
    f"torchvision/{name}:{weights.name}"
    for name in {*FAMILIES.values(), "vit_b_16", "vit_h_14", "regnet_y_16gf"}
    for weights in models.get_model_weights(name)
]


@pytest.mark.parametrize("spec", sorted(SPECS))
def test_the_network_for_a_file_is_the_one_that_torchvision_builds_itself(spec, nothing_is_fetched):
    fetched, *settings = build(spec, None, pretrained=True)
    restored, *others = build(spec, None, pretrained=False)
    assert structure(restored) == structure(fetched)
    assert others == settings


def test_inception_normalizes_its_input_as_torchvision_does_with_its_weights():
    """Sources of torchvision: ``_transform_input`` for weights that came from TensorFlow."""
    torch.manual_seed(0)
    network, _, mean, std = build("torchvision/inception_v3", None, pretrained=False)
    plain = models.inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    plain.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 299, 299)
    normalized = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(
            network.eval()(normalized), plain((images - 0.5) / 0.5), rtol=1e-3, atol=1e-4
        )


def test_other_classes_than_those_of_the_weights_need_a_file(monkeypatch):
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **__: {})
    with pytest.raises(UsageError, match="Add --weights FILE to use other classes"):
        build("torchvision/resnet18", 7, pretrained=True)
    network, *_ = build("torchvision/resnet18", 7, pretrained=False)
    assert network.fc.out_features == 7


@pytest.mark.parametrize("name", ["no_such_model", "resnet18.no_such_tag"])
def test_an_unknown_model_of_timm_is_one_line(name):
    pytest.importorskip("timm")
    with pytest.raises(OodHeatmapError, match=rf"timm/{name} cannot be built .*Check --classifier"):
        build(f"timm/{name}", None, pretrained=False)


def test_lazy_layers_get_their_shapes_before_their_weights(tmp_path):
    body = (
        "from torch import nn\n\ndef network():\n"
        "    return nn.Sequential(nn.LazyConv2d(6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.LazyLinear(4))\n"
    )
    (tmp_path / "lazy.py").write_text(body)
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    spec = f"{tmp_path / 'lazy.py'}:network"
    classifier = load_classifier(spec, weights=tmp_path / "w.safetensors", size=8)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images).logits, plain(images / 255))
    again = restore_classifier(classifier.config, tmp_path / "w.safetensors")
    assert again.fingerprint() == classifier.fingerprint()


@pytest.mark.parametrize("spec", ["torchvision/vit_b_32", "timm/vit_tiny_patch16_224"])
def test_a_vision_transformer_of_another_input_size_is_one_line(spec, tmp_path):
    if spec.startswith("timm"):
        pytest.importorskip("timm")
    network, *_ = build(spec, 3, pretrained=False)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    words = r"cannot classify images of 32 px \(AssertionError: .*\)\. Check --size"
    with pytest.raises(OodHeatmapError, match=words):
        load_classifier(spec, weights=tmp_path / "w.safetensors", num_classes=3, size=32)
