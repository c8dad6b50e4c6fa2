"""Weights load from every usual kind of checkpoint, strictly; what does not fit is named."""

import argparse
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from ood_heatmap.checkpoints import hash_weights, load_state_dict, load_weights
from ood_heatmap.classifier import load_classifier
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.networks import _BUILT_IN


def wrapped(state, kind):
    """Return a checkpoint as training code of each kind saves it."""
    network = nn.Sequential()
    for name, value in state.items():
        network.register_buffer(name.replace(".", "/"), value)
    holder = nn.Module()
    holder.model = network
    saved = {
        "plain": network.state_dict,
        "data parallel": nn.DataParallel(network).state_dict,
        "compiled": compile_module(network).state_dict,
        "compiled in parallel": nn.DataParallel(compile_module(network)).state_dict,
        "parallel twice": nn.DataParallel(nn.DataParallel(network)).state_dict,
        "lightning": holder.state_dict,
    }[kind]()
    return {name.replace("/", "."): value for name, value in saved.items()}


WRAPPERS = [
    "plain",
    "data parallel",
    "compiled",
    "compiled in parallel",
    "parallel twice",
    "lightning",
]


def compile_module(network: nn.Module) -> nn.Module:
    """Return a module compiled, which is a module, whatever the types of PyTorch say."""
    compiled = torch.compile(network)
    assert isinstance(compiled, nn.Module)
    return compiled


@pytest.mark.parametrize("nesting", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_load_from_the_usual_nestings_and_wrappers(data, spec, tmp_path, nesting, wrapper):
    state = load_file(data / "weights.safetensors")
    saved = wrapped(state, wrapper)
    torch.save({"epoch": 3, nesting: saved} if nesting else saved, tmp_path / "w.pt")
    network = load_classifier(spec, weights=tmp_path / "w.pt").network
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_part_that_was_compiled_by_itself_loads():
    network, other = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)) for _ in range(2))
    network[0] = compile_module(network[0])
    assert "0._orig_mod.weight" in network.state_dict()
    load_state_dict(other, network.state_dict(), Path("w.pt"))
    torch.testing.assert_close(other[0].weight, network[0].weight, rtol=0, atol=0)


def test_of_two_networks_in_one_checkpoint_none_is_guessed():
    network = nn.Linear(2, 3)
    state = nn.ModuleDict({"student": nn.Linear(2, 3), "teacher": nn.Linear(2, 3)}).state_dict()
    with pytest.raises(OodHeatmapError, match=r"missing: weight, bias; unexpected: student\."):
        load_state_dict(network, state, Path("w.pt"))


def test_averaged_weights_beside_the_taken_ones_are_mentioned(data, tmp_path, caplog):
    state = load_file(data / "weights.safetensors")
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        assert load_weights(tmp_path / "w.pt").keys() == state.keys()
    assert "averaged weights (state_dict_ema)" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"args": argparse.Namespace(lr=1)}, r"it contains a pickled argparse\.Namespace"),
        ({"best": np.float64(3)}, r"it contains a pickled numpy\S*\.multiarray\.scalar"),
        (nn.Sequential(), r"it contains a pickled torch\.nn\.modules\.container\.Sequential"),
    ],
)
def test_a_checkpoint_with_pickled_objects_names_their_class(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(OodHeatmapError, match=words):
        load_weights(tmp_path / "w.pt")


def test_auxiliary_heads_of_training_may_be_in_the_file_or_not():
    network, state = nn.Linear(2, 3), nn.Linear(2, 3).state_dict()
    load_state_dict(network, {**state, "aux1.fc.weight": torch.zeros(3)}, Path("w.pt"))
    assert torch.equal(network.weight, state["weight"])
    with pytest.raises(OodHeatmapError, match=r"unexpected: other\.weight"):
        load_state_dict(network, {**state, "other.weight": torch.zeros(3)}, Path("w.pt"))


@pytest.mark.parametrize(
    ("name", "new", "old"),
    [
        ("densenet121", r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2"),
        ("vit_b_32", r"mlp\.0", "mlp.linear_1"),
    ],
)
def test_torchvisions_own_files_of_an_earlier_version_load(name, new, old):
    """Names as ``densenet._load_state_dict`` and ``MLPBlock`` of torchvision take them."""
    network, other = (models.get_model(name, num_classes=2) for _ in range(2))
    state = other.state_dict()
    file = {re.sub(new, old, key).replace("mlp.3", "mlp.linear_2"): state[key] for key in state}
    assert file.keys() != state.keys()
    load_state_dict(network, file, Path("w.pth"))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_a_module_that_asks_for_the_version_of_its_weights_gets_it():
    network = models.mnasnet0_5(num_classes=2)
    state = {name: value + 1 for name, value in network.state_dict().items()}
    load_state_dict(network, state, Path("w.pt"))
    assert torch.equal(network.state_dict()["classifier.1.bias"], state["classifier.1.bias"])


def test_missing_unexpected_and_reshaped_keys_are_named(data, spec, tmp_path):
    state = load_file(data / "weights.safetensors")
    state["extra.weight"] = state.pop("layer1.0.bias")
    state["linear.bias"] = torch.zeros(9)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(OodHeatmapError) as caught:
        load_classifier(spec, weights=tmp_path / "w.safetensors")
    for words in ("missing: layer1.0.bias", "unexpected: extra.weight", "linear.bias (9,) instead"):
        assert words in str(caught.value)


class Evil:
    def __reduce__(self):
        return (print, ("never",))


@pytest.mark.parametrize("content", ["pickle", "text", "empty", "tensor", "no tensors"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_without_weights_is_one_line(tmp_path, content, suffix, capsys):
    path = tmp_path / f"w{suffix}"
    if content == "pickle":
        torch.save({"state_dict": Evil()}, path)
    elif content in ("text", "empty"):
        path.write_text("hello" if content == "text" else "")
    else:
        torch.save(torch.zeros(3) if content == "tensor" else {"epoch": 3}, path)
    with pytest.raises(OodHeatmapError, match=r"w\.(pt|safetensors)"):
        load_weights(path)
    assert "never" not in capsys.readouterr().out


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"no weights file .*w\.pt"):
        load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_checkpoint_loads(tmp_path, prefix):
    torch.manual_seed(0)
    network = _BUILT_IN["wrn-40-2"].build(10).eval()
    state = network.state_dict()
    torch.save(
        {
            "epoch": 99,
            "net_state_dict": {
                prefix + name: item for name, item in state.items() if not name.startswith("linear")
            },
            "cls_state_dict": {
                prefix + name: item for name, item in state.items() if name.startswith("linear")
            },
        },
        tmp_path / "released.pt",
    )
    classifier = load_classifier("wrn-40-2", weights=tmp_path / "released.pt")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        wanted = network(images / 127.5 - 1)
    torch.testing.assert_close(classifier(images).logits, wanted, rtol=1e-4, atol=1e-4)


def test_weights_hash_the_same_in_any_layout():
    """A 1x1 convolution is contiguous in both layouts, with other strides."""
    network = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    network.register_buffer("scale", torch.tensor(2.0))
    before = hash_weights(network)
    assert hash_weights(network.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        network[0].weight[0, 0] += 1
    assert hash_weights(network) != before
