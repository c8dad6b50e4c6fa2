"""The decoder's shape, its input, what it returns, and its file."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import distributed
from torch.utils.flop_counter import FlopCounterMode

from ood_heatmap import decoder as decoder_module
from ood_heatmap.decoder import (
    DcganDecoder,
    DecoderConfig,
    PlainDecoder,
    decoder_metadata,
    load_decoder,
    make_decoder,
)
from ood_heatmap.errors import DamagedCacheError

DATA = Path(__file__).parent / "data"
make_config = partial(DecoderConfig, target="magnitude", stack="dcgan")
KNOWN = asdict(make_config(4, 2, 8))


@pytest.mark.parametrize(
    ("num_features", "size", "widths"),
    [  # the reference's own
        (512, 32, (512, 256, 128, 64)),
        (128, 32, (256, 128, 64, 32)),
        (2048, 64, (2048, 1024, 512, 256, 128)),
    ],
)
def test_widths_are_those_of_the_reference(num_features, size, widths):
    config = make_config(num_features, 10, size)
    assert config.widths == widths
    assert config.first_size == 4


@given(
    num_features=st.sampled_from([64, 512, 1280, 2048]),
    size=st.integers(8, 300),
    stack=st.sampled_from(["dcgan", "plain"]),
)
def test_multiplications_are_as_pytorch_counts_them_and_bounded(num_features, size, stack):
    config = make_config(num_features, 10, size, stack=stack)
    bounded = config.bounded()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        decoder = make_decoder(bounded).eval()
        decoder(torch.empty(1, num_features), torch.empty(1, dtype=torch.int64))
    counts = counter.get_flop_counts()
    convolutions = [
        f"{type(decoder).__name__}.steps.{step}" for step in range(bounded.num_doublings)
    ]
    # an operation is a multiplication or an addition
    assert 2 * bounded.multiplications == sum(sum(counts[key].values()) for key in convolutions)
    assert bounded.multiplications <= 200_000_000 or bounded.widths[0] == 16
    if bounded != config:
        twice = replace(bounded, width=2 * bounded.widths[0])
        assert twice.multiplications > 200_000_000


@given(size=st.integers(4, 300))
def test_any_size_is_reached_by_doubling(size):
    config = make_config(8, 2, size)
    reached = config.first_size * 2**config.num_doublings
    assert 4 <= config.first_size <= 8
    assert size <= reached < size + 2**config.num_doublings


@pytest.mark.parametrize("size", [4, 5, 16, 28, 33])
@pytest.mark.parametrize(("target", "low"), [("signed", -1), ("magnitude", 0)])
def test_a_heatmap_has_the_images_shape_and_range(size, target, low):
    torch.manual_seed(0)
    decoder = make_decoder(DecoderConfig(8, 3, size, target, width=16, stack="dcgan")).eval()
    torch.nn.init.normal_(
        decoder.get_parameter("last.weight"), 0, 1e6
    )  # far into the ends of tanh and sigmoid
    heatmap = decoder(torch.rand(5, 8), torch.tensor([0, 1, 2, 0, 1]))
    assert heatmap.shape == (5, 3, size, size)
    assert low <= heatmap.min() < low + 0.1
    assert 0.9 < heatmap.max() <= 1


@pytest.mark.parametrize("stack", ["plain", "dcgan"])
@pytest.mark.parametrize("target", ["signed", "magnitude"])
def test_under_autocast_a_heatmap_keeps_the_steps_of_its_target(stack, target):
    """Of the 128 targets from 128/255 on, a bfloat16 heatmap could tell apart 2 of 3 at most."""
    torch.manual_seed(0)
    decoder = make_decoder(DecoderConfig(8, 3, 8, target, width=16, stack=stack)).eval()
    logits = []
    decoder.last.register_forward_hook(lambda _, given, found: logits.append(found))
    with torch.autocast("cpu", torch.bfloat16):
        heatmap = decoder(torch.rand(5, 8), torch.tensor([0, 1, 2, 0, 1]))
    assert logits[0].dtype == torch.bfloat16
    wanted = (torch.tanh if target == "signed" else torch.sigmoid)(logits[0].double())
    torch.testing.assert_close(heatmap.double(), wanted, rtol=0, atol=1e-6)


def test_features_are_scaled_by_the_range_over_all_id_features():
    torch.manual_seed(0)
    plain = make_decoder(make_config(4, 2, 8, width=16)).eval()
    scaled = make_decoder(make_config(4, 2, 8, width=16), (-2.0, 6.0)).eval()
    state = {**plain.state_dict(), "feature_range": scaled.feature_range}
    scaled.load_state_dict(state)
    features, prediction = torch.rand(3, 4), torch.tensor([0, 1, 1])
    torch.testing.assert_close(
        plain(features, prediction), scaled(features * 8 - 2, prediction), rtol=0, atol=1e-6
    )


def test_the_predicted_class_is_part_of_the_input():
    torch.manual_seed(0)
    decoder = make_decoder(make_config(4, 3, 8, width=16)).eval()
    features = torch.rand(1, 4).expand(3, 4)
    heatmap = decoder(features, torch.arange(3))
    assert isinstance(decoder, DcganDecoder)
    first = decoder.first(torch.cat([features, torch.eye(3)], dim=1))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(heatmap[0], heatmap[1])


def test_feature_maps_join_where_they_fit_and_say_where():
    torch.manual_seed(0)
    shapes = ((6, 4, 4), (5, 7, 7), (2, 16, 16))
    decoder = make_decoder(make_config(4, 2, 16, width=32, map_shapes=shapes)).eval()
    assert decoder.config.joins == (0, 1, 2)
    maps = [torch.zeros(2, *shape) for shape in shapes]
    maps[2][1, :, 3, 5] = 10
    heatmap = decoder(torch.rand(1, 4).expand(2, 4), torch.zeros(2, dtype=torch.int64), maps)
    changed = (heatmap[0] - heatmap[1]).abs().sum(dim=0).nonzero().tolist()
    assert changed == [[3, 5]]  # the last map is at full size: nothing after it spreads


def test_one_image_is_decoded_as_it_is_in_a_batch():
    torch.manual_seed(0)
    decoder = make_decoder(make_config(4, 2, 8, width=16)).eval()
    features, prediction = torch.rand(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    whole = decoder(features, prediction)
    for i in range(6):
        torch.testing.assert_close(
            whole[i : i + 1], decoder(features[i : i + 1], prediction[i : i + 1])
        )


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_batch_norm_of_two_processes_is_that_of_their_batches_together(monkeypatch, offset):
    """One process with 2 images and one with 3, one after the other in this process.

    A float32 near 300 is 3e-5 from the next; squares of it lose a variance of 1 to 5e-3.
    """
    torch.manual_seed(0)
    x = torch.randn(5, 4, 3, 3) + offset
    whole = torch.nn.BatchNorm2d(4).double()
    wanted = whole(x.double())
    parts = [x[:2], x[2:]]
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(decoder_module, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda mine: sent.append(mine.clone()))
    for part in parts:
        decoder_module._BatchNorm(4)(part)
    monkeypatch.setattr(distributed, "all_reduce", lambda mine: mine.copy_(sum(sent)))
    tolerance = 1e-5 + 2e-6 * offset
    for part, value in zip(parts, wanted.split([2, 3]), strict=True):
        ours = decoder_module._BatchNorm(4)
        torch.testing.assert_close(ours(part).double(), value, rtol=0, atol=tolerance)
        for name, item in whole.state_dict().items():
            found = ours.state_dict()[name].to(item.dtype)
            torch.testing.assert_close(found, item, rtol=1e-5, atol=tolerance)


def test_gradients_flow_through_the_statistics_of_all_processes(monkeypatch):
    """Two processes with the same images: a sum over both doubles what one of them has."""
    monkeypatch.setattr(decoder_module, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda mine: mine.mul_(2))
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    (decoder_module._BatchNorm(3)(x) * weight).sum().backward()
    other = x.detach().double().requires_grad_()
    both = torch.cat([other, other.detach()])
    whole = torch.nn.BatchNorm2d(3).double()
    (whole(both) * torch.cat([weight, weight])).sum().backward()
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=1e-5, atol=1e-6)


def test_the_plain_decoder_sees_where_a_map_is_high_its_deviation_and_noise():
    torch.manual_seed(0)
    config = make_config(4, 2, 16, width=32, map_shapes=((6, 4, 4), (5, 8, 8)), stack="plain")
    assert config.num_inputs == 4 + 6
    decoder = make_decoder(config).eval()
    torch.nn.init.normal_(decoder.get_parameter("last.weight"))
    features, prediction = torch.rand(1, 4), torch.tensor([1])
    maps = [torch.rand(1, *shape) for shape in config.map_shapes]
    heatmap = decoder(features, prediction, maps)
    assert heatmap.shape == (1, 3, 16, 16)
    says: list[torch.Tensor] = []
    decoder.maps[1].register_forward_hook(lambda _, given, found: says.append(found))
    moved = [maps[0], maps[1].roll(4, dims=3)]
    assert not torch.equal(decoder(features, prediction, moved), heatmap)
    assert says[0].abs().max() > 1e-3  # where, but not how much
    torch.testing.assert_close(says[0].mean(dim=(2, 3)), torch.zeros(1, 3), rtol=0, atol=1e-6)
    none, some = torch.zeros(1, 10), torch.ones(1, 10)
    torch.testing.assert_close(decoder(features, prediction, maps, none), heatmap)
    assert not torch.equal(decoder(features, prediction, maps, some), heatmap)


def test_inputs_are_scaled_one_by_one_and_a_constant_one_stays_finite():
    config = make_config(2, 2, 8, width=16, stack="plain")
    low, high = np.array([1, 5], np.float32), np.array([3, 5], np.float32)
    decoder = make_decoder(config, (low, high))
    assert isinstance(decoder, PlainDecoder)
    np.testing.assert_array_equal(decoder.feature_range, [[1, 5], [3, 6]])
    inputs = []
    decoder.hidden.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    decoder(torch.tensor([[2.0, 5.0]]), torch.tensor([1]))
    assert inputs[0].tolist() == [[0.5, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("stack", ["plain", "dcgan"])
def test_a_decoder_of_version_0_1_loads_and_returns_what_it_did(stack):
    """The files and their float64 heatmaps were written by version 0.1.0."""
    path = DATA / f"decoder-0.1-{stack}.safetensors"
    decoder = load_decoder(path.read_bytes(), path)
    assert not decoder.training
    with np.load(DATA / f"decoder-0.1-{stack}.npz") as file:
        inputs = {name: torch.from_numpy(file[name]) for name in file.files}
    maps = [item for name, item in inputs.items() if name.startswith("feature_maps_")]
    with torch.inference_mode():
        found = decoder(inputs["features"], inputs["prediction"], maps)
    # one forward pass in float32, of numbers that it holds exactly
    torch.testing.assert_close(found.double(), inputs["heatmap"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stack", ["plain", "dcgan"])
def test_a_saved_decoder_is_loaded_as_it_was(stack):
    shapes = ((6, 4, 4), (5, 8, 8))
    config = DecoderConfig(4, 2, 12, "signed", width=32, map_shapes=shapes, stack=stack)
    decoder = make_decoder(config, (-1.0, 2.0), [(0.0, 3.0), (-2.0, 2.0)])
    content = save(decoder.state_dict(), decoder_metadata(config, "0" * 64))
    again = load_decoder(content, Path("decoder.safetensors"))
    assert again.config == config
    assert list(again.state_dict()) == list(decoder.state_dict())
    for name, item in decoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], item), name


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no decoder at all",
        save({"first.weight": torch.zeros(2)}),
        save({"first.weight": torch.zeros(2)}, {"ood_heatmap": "{}"}),
        save({"first.weight": torch.zeros(2)}, decoder_metadata(make_config(4, 2, 8), "0")),
        save({}, {"ood_heatmap": json.dumps({"decoder": {**KNOWN, "stack": "other"}})}),
        save({}, {"ood_heatmap": json.dumps({"decoder": {**KNOWN, "new": 1}})}),
    ],
)
def test_a_file_that_is_not_a_decoder_is_one_line(content):
    with pytest.raises(DamagedCacheError, match=r"run/decoder is not a decoder (.*)\. Train again"):
        load_decoder(content, Path("run/decoder"))


@pytest.mark.parametrize("option", [{"target": "both"}, {"stack": "unet"}])
def test_an_unknown_choice_is_refused(option):
    with pytest.raises(ValueError, match=rf"{next(iter(option))} of a decoder must be one of"):
        make_config(4, 2, 8, **option)
