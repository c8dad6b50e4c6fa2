"""The split decoder: heads without a common weight, and what its heatmap and score are."""

import math

import pytest
import torch
from torch.nn import functional

from ood_heatmap.decoder import DecoderConfig, decoder_metadata, load_decoder, make_decoder
from ood_heatmap.split_decoder import Balance, SplitLogits, split_loss

SHAPES = ((6, 2, 2), (4, 4, 4))
CONFIG = DecoderConfig(
    5, 3, 8, "presence", map_shapes=SHAPES, num_channels=1, width=8, stack="split"
)


def example(count: int = 4) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    maps = [torch.randn(count, *shape) for shape in SHAPES]
    return torch.randn(count, 5), torch.arange(count) % 3, maps


def decoder() -> torch.nn.Module:
    torch.manual_seed(0)
    made = make_decoder(CONFIG).eval()
    with torch.no_grad():
        made.place.weight.mul_(100)  # so that places differ
    return made


def test_the_largest_pixel_of_a_heatmap_is_the_level_of_its_image():
    made, inputs = decoder(), example()
    places, score = made.detect(*inputs)
    level = torch.tensor([-9.0, -3.0, 0.0, 30.0])
    heatmap = made.heatmap(places, level)
    assert heatmap.shape == (4, 1, 8, 8)
    assert torch.equal(heatmap.amax(dim=(1, 2, 3)), level.sigmoid())
    assert torch.equal(score, made(*inputs).image)
    assert torch.equal(places, made(*inputs).place)


def test_a_pixel_is_as_ood_as_its_image_says_or_as_it_is_itself():
    made, inputs = decoder(), example()
    places, _ = made.detect(*inputs)
    local = 2 * places - 1
    level = torch.tensor([-9.0, -3.0, 0.0, 30.0])
    wanted = torch.maximum(made.heatmap(places, level), local.sigmoid())
    assert (wanted > made.heatmap(places, level)).any()
    torch.testing.assert_close(made.heatmap(places, level, local), wanted)


def test_pixels_differ_in_their_log_odds_as_the_places_do():
    made, inputs = decoder(), example()
    logits = made(*inputs).place.double().flatten(1)
    heatmap = made.heatmap(made.detect(*inputs)[0], torch.zeros(4)).double().flatten(1)
    log_odds = torch.log(heatmap / (1 - heatmap))
    torch.testing.assert_close(
        log_odds - log_odds[:, :1], logits - logits[:, :1], rtol=1e-4, atol=1e-4
    )


def test_places_do_not_depend_on_the_level_of_the_image():
    made, inputs = decoder(), example()
    places, scores = made.detect(*inputs)[0], made.place_scores(*inputs)
    log_mean_exp = scores.double().flatten(1).logsumexp(1) - math.log(64)
    torch.testing.assert_close(log_mean_exp, torch.zeros(4).double(), atol=1e-5, rtol=0)
    with torch.no_grad():
        made.image.bias += 40
    assert torch.equal(made.detect(*inputs)[0], places)
    assert torch.equal(made.place_scores(*inputs), scores)


def test_without_feature_maps_the_heatmap_has_the_level_of_the_image():
    made = make_decoder(DecoderConfig(5, 3, 8, "presence", num_channels=1, stack="split"))
    places, score = made.detect(torch.randn(2, 5), torch.tensor([0, 2]))
    heatmap = made.heatmap(places, score)
    wanted = score.sigmoid()[:, None, None, None].expand(2, 1, 8, 8)
    torch.testing.assert_close(heatmap[:, :, 3:5, 3:5], wanted[:, :, 3:5, 3:5], atol=0.1, rtol=0)


@pytest.mark.parametrize("head", ["image", "place"])
def test_a_head_is_trained_by_its_own_loss_alone(head):
    made = decoder()
    made(*example())._asdict()[head].sum().backward()
    trained = {
        name.split(".")[0] for name, item in made.named_parameters() if item.grad is not None
    }
    other = {"image", "image_head"} if head == "place" else {"place", "places", "maps", "deepest"}
    assert trained
    assert not trained & other


def test_noise_reaches_the_image_head_alone():
    made, inputs = decoder(), example()
    plain, noisy = made(*inputs), made(*inputs, torch.ones(4, 11))
    assert (plain.image != noisy.image).all()
    assert torch.equal(plain.place, noisy.place)


def test_the_loss_is_its_formula_image_by_image():
    torch.manual_seed(2)
    presence = torch.zeros(4, 8, 8, dtype=torch.uint8)  # ID, OOD, patch, translucent patch
    presence[1] = 255
    presence[2, 2:4, 2:6] = 255
    presence[3, 4:, 4:] = 102
    magnitude = torch.rand(4, 3, 8, 8)
    output = SplitLogits(torch.randn(4), torch.randn(4, 1, 8, 8), torch.rand(4, 3, 8, 8))
    balance, wanted = Balance(0.5, 3.0), torch.zeros(())
    for i, (weight, region) in enumerate([(0.5, 1.0), (3.0, None), (0, 8 / 64), (0, 16 / 64)]):
        opacity = presence[i].float() / 255
        label = torch.tensor(float(i == 1))
        image = functional.binary_cross_entropy(output.image[i].sigmoid(), label)
        place = functional.binary_cross_entropy(output.place[i, 0].sigmoid(), opacity)
        error = (output.difference[i] - magnitude[i]) ** 2
        wanted += weight * image + (error.mean(0) * opacity).mean()
        wanted += place * region**-0.5 if region else 0
    found = split_loss(output, presence, magnitude, 0.5, balance)
    torch.testing.assert_close(found, wanted / 4)


def test_id_and_ood_images_weigh_the_same():
    balance = Balance.of(30, 10, 60)
    assert balance.id * 30 == balance.ood * 10 == 30


def test_a_saved_decoder_is_the_same(tmp_path):
    from safetensors.torch import save

    made, inputs = decoder(), example()
    content = save(made.state_dict(), decoder_metadata(CONFIG, "index"))
    loaded = load_decoder(content, tmp_path / "decoder")
    for ours, theirs in zip(loaded.detect(*inputs), made.detect(*inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("stack", "target"), [("split", "signed"), ("plain", "presence")])
def test_a_target_of_another_decoder_is_refused(stack, target):
    with pytest.raises(ValueError, match=f"a {stack} decoder has no {target} target"):
        DecoderConfig(5, 3, 8, target, stack=stack)
