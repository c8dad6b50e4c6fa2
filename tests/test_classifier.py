"""The classifier: features are what enters the last linear layer; what does not fit is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ood_heatmap.classifier import (
    Classifier,
    ClassifierConfig,
    load_classifier,
    restore_classifier,
)
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.images import Transform

PLAIN = ClassifierConfig("test", None, Transform(16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def pixels(count: int = 5, size: int = 16) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, 3, size, size)).astype(np.uint8)
    )


def test_features_logits_and_maps_are_the_networks_own(data, spec):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    classifier = load_classifier(
        spec, weights=data / "weights.safetensors", mean=mean, std=std, num_maps=2
    )
    network, images = classifier.network, pixels()
    values = (images.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    with torch.no_grad():
        first = network.layer1(torch.from_numpy(values).float())
        second = network.layer2(first)
        logits = network.linear(second.mean(dim=(2, 3)))
    output = classifier(images)
    torch.testing.assert_close(output.features, second.mean(dim=(2, 3)))
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.maps[0], second)  # the deepest first
    torch.testing.assert_close(output.maps[1], first)
    assert classifier.head == "linear"
    assert classifier.map_names == ("layer2", "layer1")
    assert classifier.map_shapes == ((8, 4, 4), (6, 8, 8))


@pytest.mark.parametrize(
    ("name", "head", "maps", "num_features"),
    [
        ("resnet18", "fc", ("layer4", "layer3", "layer2"), 512),
        ("mobilenet_v3_small", "classifier.3", (), 1024),
        ("vgg11", "classifier.6", (), 4096),
        ("vit_b_32", "heads.head", (), 768),
    ],
)
def test_the_head_and_the_ends_of_stages_of_known_networks_are_found(
    name, head, maps, num_features
):
    from torchvision import models

    network = models.get_model(name, weights=None, num_classes=7)
    size = 224 if name.startswith(("vit", "vgg")) else 64
    config = ClassifierConfig(name, None, Transform(size), (0.0,) * 3, (1.0,) * 3, "", len(maps))
    classifier = Classifier(network, config)
    assert classifier.head == head
    assert classifier.map_names == maps
    assert (classifier.num_features, classifier.num_classes) == (num_features, 7)


def test_a_network_without_a_linear_head_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(OodHeatmapError, match=r"no linear layer .* \(the last are 0\): .*pooling"):
        Classifier(network, PLAIN)


def test_a_network_that_returns_no_logits_is_refused():
    with pytest.raises(OodHeatmapError, match=r"returns shape \(2, 4, 16, 16\)"):
        Classifier(nn.Conv2d(3, 4, 1), PLAIN)


def test_a_wrong_head_lists_the_linear_layers(data, spec):
    with pytest.raises(UsageError, match="fc is not a linear layer; the last ones are linear"):
        load_classifier(spec, weights=data / "weights.safetensors", head="fc")


def test_too_many_feature_maps_are_refused(data, spec):
    with pytest.raises(OodHeatmapError, match="feature maps of 2 sizes, --feature-maps asks for 3"):
        load_classifier(spec, weights=data / "weights.safetensors", num_maps=3)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet", "there is no classifier 'resnet': use cifar-resnet18"),
        ("torchvision/resnet999", "torchvision has no such classifier"),
        ("torchvision/resnet18:NONE", "torchvision has no such classifier"),
        ("nowhere.py:network", r"there is no file .*/nowhere\.py"),
        ("no_such_module:network", "there is no module no_such_module: .*PYTHONPATH"),
        ("json:nothing", "json has no function nothing"),
        ("json:dumps", r"cannot be called \(missing a required argument.*--num-classes"),
        ("os:system", "os:system is defined in posix"),
        ("torchvision/fcn_resnet50", "not of an image classifier"),
        ("cifar-resnet18", "comes without weights: add --weights"),
    ],
)
def test_a_wrong_spec_is_one_line(spec, words):
    with pytest.raises(UsageError, match=words):
        load_classifier(spec)


def test_a_wrong_number_of_classes_is_refused(tmp_path):
    (tmp_path / "fixed.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))\n"
    )
    with pytest.raises(UsageError, match="has 5 classes, not --num-classes 6"):
        load_classifier(f"{tmp_path / 'fixed.py'}:network", size=8, num_classes=6)
    with pytest.raises(UsageError, match="--size"):
        load_classifier(f"{tmp_path / 'fixed.py'}:network")
    classifier = load_classifier(f"{tmp_path / 'fixed.py'}:network", size=8, num_classes=5)
    assert classifier.num_features == 3


def test_a_restored_classifier_returns_the_same(classifier, saved):
    config = ClassifierConfig.from_json(classifier.config.to_json())
    again = restore_classifier(config, saved)
    assert again.fingerprint() == classifier.fingerprint()
    torch.testing.assert_close(again(pixels()).logits, classifier(pixels()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("field", ["weights", "mean", "std", "transform", "num_maps"])
def test_the_fingerprint_knows_all_that_matters(data, spec, tmp_path, field):
    state = load_file(data / "weights.safetensors")
    base = {"weights": data / "weights.safetensors"}
    state["linear.bias"][0] += 1e-6
    save_file(state, tmp_path / "w.safetensors")
    changed = {
        "weights": {"weights": tmp_path / "w.safetensors"},
        "mean": {"mean": (0.0, 0.0, 0.1)},
        "std": {"std": (1.0, 1.0, 0.9)},
        "transform": {"size": 20},
        "num_maps": {"num_maps": 1},
    }[field]
    before = load_classifier(spec, **base).fingerprint()
    now = load_classifier(spec, **{**base, **changed}).fingerprint()
    differing = [name for name in before if before[name] != now[name]]
    assert differing == [field, *(["maps"] if field == "num_maps" else [])]


def test_a_counter_of_training_steps_is_no_weight():
    def network() -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
        )

    torch.manual_seed(0)
    one = Classifier(network(), PLAIN)
    before = one.fingerprint()
    one.network[0].num_batches_tracked += 5
    assert one.fingerprint() == before


def test_a_file_keeps_working_from_another_directory(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    classifier = load_classifier("network.py:network", weights=Path("weights.safetensors"))
    assert classifier.fingerprint()["spec"] == "network.py:network"
    monkeypatch.chdir(tmp_path)
    restore_classifier(classifier.config, data / "weights.safetensors")


def test_the_code_of_the_users_file_is_part_of_the_fingerprint(data, spec, tmp_path):
    copy = tmp_path / "network.py"
    copy.write_text((data / "network.py").read_text())
    weights = data / "weights.safetensors"
    before = load_classifier(f"{copy}:network", weights=weights).fingerprint()
    assert before == load_classifier(spec, weights=weights).fingerprint()
    copy.write_text(copy.read_text().replace("mean(dim=(2, 3))", "amax(dim=(2, 3))"))
    now = load_classifier(f"{copy}:network", weights=weights).fingerprint()
    assert [name for name in before if before[name] != now[name]] == ["source"]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"mean": (123.675, 116.28, 103.53)}, "divide values for pixels from 0 to 255 by 255"),
        ({"std": (58.395, 57.12, 57.375)}, "divide values for pixels from 0 to 255 by 255"),
        ({"mean": (-0.5, 0.5, 0.5)}, "for pixels in"),
        ({"std": (float("inf"), 1.0, 1.0)}, "three finite numbers"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "three finite numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"mean": (0.5,)}, "three finite numbers"),
    ],
)
def test_mean_and_std_that_cannot_be_meant_are_refused(data, spec, numbers, words):
    with pytest.raises(UsageError, match=f"--mean and --std .*{words}"):
        load_classifier(spec, weights=data / "weights.safetensors", **numbers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spec", 3),
        ("spec", None),
        ("num_classes", "touch PWNED"),
        ("num_classes", 2.5),
        ("transform", {"size": "16"}),
        ("transform", {"size": 16, "crop_mode": "other"}),
        ("transform", [16]),
        ("mean", "abc"),
        ("mean", [1000.0, 0.0, 0.0]),
        ("std", None),
        ("head", ["linear"]),
        ("num_maps", "1"),
        ("autocast", "yes"),
        ("unknown", 1),
    ],
)
def test_a_description_of_another_type_is_damaged(classifier, field, value):
    content = classifier.config.to_json()
    assert ClassifierConfig.from_json(json.loads(json.dumps(content))) == classifier.config
    with pytest.raises(DamagedCacheError, match="description of its classifier is damaged"):
        ClassifierConfig.from_json({**content, field: value})


@pytest.mark.parametrize("field", sorted(ClassifierConfig.__dataclass_fields__))
def test_no_field_of_a_description_may_be_missing(classifier, field):
    content = classifier.config.to_json()
    del content[field]
    if field in ("head", "num_maps", "autocast"):
        ClassifierConfig.from_json(content)
    else:
        with pytest.raises(DamagedCacheError, match=field):
            ClassifierConfig.from_json(content)


@pytest.fixture
def saved(classifier, tmp_path) -> Path:
    """Return the run's own copy of the weights."""
    path = tmp_path / "copy.safetensors"
    state = classifier.network.state_dict()
    save_file({name: item.contiguous() for name, item in state.items()}, path)
    return path


@pytest.mark.parametrize("num_maps", [None, 0, 1, 2])
def test_a_restored_classifier_has_the_maps_of_the_run_and_as_many_as_wanted(
    classifier, saved, num_maps
):
    again = restore_classifier(classifier.config, saved, classifier.fingerprint(), num_maps)
    wanted = 2 if num_maps is None else num_maps
    assert again.map_names == classifier.map_names[:wanted]
    for found, expected in zip(again(pixels()).maps, classifier(pixels()).maps, strict=False):
        assert torch.equal(found, expected)


def test_a_restored_classifier_takes_the_maps_that_were_indexed(classifier, saved):
    """Not what a search would find by now."""
    fingerprint = classifier.fingerprint() | {"maps": ["layer1.0", "layer2.0"]}
    again = restore_classifier(classifier.config, saved, fingerprint)
    assert again.map_names == ("layer1.0", "layer2.0")
    with pytest.raises(OodHeatmapError, match="cannot classify images"):
        restore_classifier(classifier.config, saved, fingerprint | {"maps": ["gone", "layer1"]})


@pytest.mark.parametrize("field", ["weights", "source", "head", "mean", "num_classes"])
def test_a_restored_classifier_that_is_another_is_refused_by_what_differs(classifier, saved, field):
    fingerprint = classifier.fingerprint() | {field: "another"}
    with pytest.raises(StaleCacheError, match=f"{field} was another, now .*--overwrite"):
        restore_classifier(classifier.config, saved, fingerprint)
