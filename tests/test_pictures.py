"""Pictures of photographs: where the heatmap lies, what its colours and its contour say."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage

from ood_heatmap import pictures
from ood_heatmap.images import Transform, to_rgb
from ood_heatmap.pictures import (
    MAX_SIDE,
    ColorScale,
    Decision,
    Neighbour,
    _truncate,
    draw_overlay,
    draw_panel,
)

SCALE = ColorScale(color_max=0.8, pixel_threshold=0.4)
NAMES = [r"$\foo{$", "a\nb", "\x07bell", "\udcff", "猫", "_hidden", "a" * 400]


def ramp(width: int, height: int) -> Image.Image:
    """Return a photo whose red is the column and whose green is the row, as shares of 250."""
    columns, rows = np.meshgrid(
        (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    )
    pixels = np.stack([250 * columns, 250 * rows, 0 * rows], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def grey(width: int, height: int, value: int = 128) -> Image.Image:
    return Image.new("RGB", (width, height), (value,) * 3)


TRANSFORMS = [
    Transform(64),
    Transform(64, 80, "bicubic"),
    Transform(64, 80, crop_mode="squash"),
    Transform(64, 64, crop_mode="border", fill="#010203"),
    Transform(64, 48),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("size", [(320, 240), (200, 500), (256, 256), (333, 257)])
def test_the_box_is_what_the_transform_shows(transform, size):
    """Read from the pixels: the photo's own colours say where they come from."""
    pixels = transform(ramp(*size)).astype(np.float64)
    left, top, right, bottom = transform.seen_box(*size)
    inner = np.s_[20:44]
    # centers of the output pixels, in pixels of the photo
    steps = (np.arange(64)[inner] + 0.5) / 64
    for channel, (start, stop), side in ((0, (left, right), size[0]), (1, (top, bottom), size[1])):
        line = pixels[channel, 32] if channel == 0 else pixels[channel, :, 32]
        found = line[inner] / 250 * side
        tolerance = 1.5 * side / 250 + 0.5
        np.testing.assert_allclose(start + steps * (stop - start), found, atol=tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_heatmap_lies_on_what_it_was_computed_from_in_every_orientation(orientation):
    """A white square on black, found in the classifier's input, is covered where it is upright."""
    upright = np.zeros((300, 220, 3), np.uint8)
    upright[190:230, 60:110] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = {value: Image.fromarray(upright) for value in (1,)}[1]
    # Pillow's own inverse of the orientation
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    if orientation in turns:
        stored = stored.transpose(turns[orientation])
    buffer = io.BytesIO()
    stored.save(buffer, "png", exif=exif)
    opened = Image.open(buffer)
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(opened)), upright)

    transform = Transform(112, 128)
    heatmap = (transform(opened).mean(axis=0) / 255 * 0.7).astype(np.float32)
    photo = to_rgb(opened)
    picture = draw_overlay(photo, heatmap, transform.seen_box(*photo.size), SCALE)
    assert picture.size == (220, 300)
    pixels = np.asarray(picture).astype(int)
    warm = pixels[..., 0] - pixels[..., 2] > 60
    rows, columns = np.nonzero(warm)
    # the contour, 1 pixel wide, is white
    np.testing.assert_allclose((rows.min(), rows.max()), (190, 229), atol=2.5)
    np.testing.assert_allclose((columns.min(), columns.max()), (60, 109), atol=2.5)


def test_a_photo_is_at_most_half_covered_and_unchanged_where_the_heatmap_is_zero():
    photo = ramp(300, 240)
    box = Transform(64).seen_box(*photo.size)
    zero = np.asarray(draw_overlay(photo, np.zeros((16, 16), np.float32), box, SCALE))
    np.testing.assert_array_equal(zero[:, 30:270], np.asarray(photo)[:, 30:270])
    for value in (0.1, 0.39, 0.41, 0.6, 5.0):
        heatmap = np.full((16, 16), value, np.float32)
        light, dark = (
            np.asarray(draw_overlay(grey(300, 240, tone), heatmap, box, SCALE)).astype(int)
            for tone in (255, 0)
        )
        # what is left of a difference of 255 is the photo's share
        share = (light - dark)[20:220, 50:250] / 255
        assert (share >= 0.5).all()


def test_a_colour_is_a_decision_whatever_the_image():
    scores = np.linspace(0, 1, 1001, dtype=np.float32)
    colors = SCALE.colors(scores).astype(int)
    warm = colors[:, 0] > colors[:, 2]
    np.testing.assert_array_equal(warm, scores > 0.4)
    assert (np.diff(colors[:, 3]) >= 0).all()
    assert colors[:, 3].max() <= 127
    assert (colors[0, 3], colors[-1, 3]) == (0, 127)
    alone = SCALE.colors(np.full((3, 2), 0.7, np.float32))
    np.testing.assert_array_equal(alone, np.broadcast_to(colors[700], (3, 2, 4)))


@pytest.mark.parametrize(("color_max", "threshold"), [(0.3, 0.4), (0.4, 0.4), (0.0, 0.0), (0.5, 1)])
def test_a_threshold_above_all_colours_still_divides_them(color_max, threshold):
    scale = ColorScale(color_max, threshold)
    above = np.nextafter(np.float32(threshold), np.float32(2))
    cold, warm = scale.colors(np.array([threshold, above], np.float32)).astype(int)
    assert cold[2] > cold[0]
    assert warm[0] > warm[2]
    assert scale.top > threshold


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_without_a_threshold_no_colour_and_no_contour_says_ood(threshold):
    scale = ColorScale(0.5, threshold)
    scores = np.linspace(0, 1, 100, dtype=np.float32)
    colors = scale.colors(scores).astype(int)
    assert (colors[:, 2] > colors[:, 0]).all()
    assert not scale.is_ood(scores).any()
    heatmap = np.zeros((8, 8), np.float32)
    heatmap[2:5, 2:5] = 0.5
    drawn = np.asarray(draw_overlay(grey(240, 240), heatmap, (0, 0, 240, 240), scale))
    assert drawn.max() < 200


def contour_of(photo: Image.Image, heatmap: np.ndarray, box=None) -> np.ndarray:
    picture = draw_overlay(photo, heatmap, box or (0, 0, *photo.size), SCALE)
    return (np.asarray(picture) == 255).all(axis=2)


def test_the_contour_encloses_what_exceeds_the_threshold():
    """Against bilinear interpolation by SciPy, thresholded."""
    rng = np.random.default_rng(0)
    heatmap = ndimage.gaussian_filter(rng.random((14, 14)), 2).astype(np.float32)
    heatmap = 0.8 * (heatmap - heatmap.min()) / np.ptp(heatmap)
    places = (np.arange(560) + 0.5) / 40 - 0.5
    rows, columns = np.meshgrid(places, places, indexing="ij")
    wanted = ndimage.map_coordinates(heatmap, [rows, columns], order=1, mode="nearest") > 0.4
    edge = wanted & ndimage.binary_dilation(~wanted, np.ones((3, 3)), border_value=1)
    line = contour_of(grey(560, 560), heatmap)
    assert 0.1 < wanted.mean() < 0.9
    # where the score equals the threshold up to rounding
    assert (line ^ edge).sum() < 0.01 * edge.sum()


def test_the_contour_of_an_image_that_is_ood_everywhere_is_its_frame():
    line = contour_of(grey(240, 300), np.ones((4, 4), np.float32))
    assert line[0].all()
    assert line[-1].all()
    assert line[:, [0, -1]].all()
    assert not line[1:-1, 1:-1].any()
    assert not contour_of(grey(240, 300), np.full((4, 4), 0.4, np.float32)).any()


def test_what_the_classifier_does_not_see_is_dimmed():
    photo = grey(400, 240, 200)
    box = Transform(64).seen_box(400, 240)
    assert box == pytest.approx((80, 0, 320, 240), abs=4)
    drawn = np.asarray(draw_overlay(photo, np.zeros((8, 8), np.float32), box, SCALE))
    left, right = round(box[0]), round(box[2])
    assert (drawn[:, left:right] == 200).all()
    assert (drawn[:, :left] < 100).all()
    assert (drawn[:, right:] < 100).all()


def test_a_padded_heatmap_is_cropped_to_the_photo():
    """With ``border``, a wide photo fills half of the input: the middle half of the heatmap."""
    transform = Transform(64, 64, crop_mode="border")
    heatmap = np.zeros((64, 64), np.float32)
    heatmap[16:32] = 0.7
    photo = grey(640, 320)
    picture = draw_overlay(photo, heatmap, transform.seen_box(640, 320), SCALE)
    warm = np.asarray(picture).astype(int)
    warm = warm[..., 0] - warm[..., 2] > 40
    assert warm[10:150, 10:-10].all()
    assert not warm[170:].any()


def test_photos_keep_their_size_and_large_ones_are_reduced():
    heatmap = np.zeros((8, 8), np.float32)
    for size, wanted in (
        ((224, 300), (224, 300)),
        ((2000, 1), (2000, 1)),
        ((5000, 2500), (MAX_SIDE, MAX_SIDE // 2)),
        ((3, 80_000), (1, MAX_SIDE)),
        ((32, 32), (224, 224)),
        ((1, 40), (6, 240)),
    ):
        photo = grey(*size)
        picture = draw_overlay(photo, heatmap, Transform(64).seen_box(*size), SCALE)
        assert picture.size == wanted
        decision = Decision(0.1, "cat")
        draw_panel(photo, heatmap, Transform(64).seen_box(*size), SCALE, decision)


def test_a_panel_shows_the_photo_the_overlay_and_the_nearest_images():
    photo, heatmap = ramp(320, 240), np.eye(8, dtype=np.float32)
    box = (40.0, 0.0, 280.0, 240.0)
    overlay = np.asarray(draw_overlay(photo, heatmap, box, SCALE))
    colors = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))
    near = [Neighbour(Image.new("RGB", (64, 64), color), 1.5, "cat") for color in colors]
    for count in range(6):
        panel = draw_panel(photo, heatmap, box, SCALE, Decision(0.1, "cat"), near[:count])
        pixels = np.asarray(panel)
        for wanted in (np.asarray(photo), overlay):
            starts = [
                (row, column)
                for row, column in np.argwhere((pixels == wanted[0, 0]).all(axis=2)).tolist()
                if np.array_equal(pixels[row : row + 240, column : column + 320], wanted)
            ]
            assert len(starts) == 1
        shown = [(pixels == color).all(axis=2).sum() for color in colors]
        assert [area > 5000 for area in shown] == [number < count for number in range(5)]
        assert (pixels[[0, -1]] == 255).all()


@pytest.mark.parametrize(
    ("name", "title"), [("cat", "nearest ID: cat"), ("a class with a long name", "nearest ID")]
)
def test_the_nearest_image_is_called_so_also_where_its_class_has_no_room(monkeypatch, name, title):
    drawn = []
    monkeypatch.setattr(pictures, "_draw_line", lambda canvas, text, *_: drawn.append(text))
    near = [Neighbour(grey(32, 32), 1.5, name)] * 2
    heatmap, box = np.zeros((8, 8), np.float32), (0, 0, 400, 400)
    draw_panel(grey(400, 400), heatmap, box, SCALE, Decision(0.1, name), near)
    assert drawn[4:8] == [title, "distance 1.5", name, "distance 1.5"]


@pytest.mark.parametrize("name", NAMES)
def test_any_class_name_can_be_drawn(name):
    near = [Neighbour(grey(32, 32), 1.0, name)]
    heatmap = np.zeros((8, 8), np.float32)
    decision = Decision(0.1, name, threshold=0.3, p_value=0.2)
    panel = draw_panel(grey(64, 64), heatmap, (0, 0, 64, 64), SCALE, decision, near)
    # long names are cut, nothing is cut off
    assert (np.asarray(panel)[:, [0, -1]] == 255).all()


@pytest.mark.parametrize(
    ("decision", "title", "words"),
    [
        (Decision(0.5, "cat", True, 0.3, 0.05, 0.01), "OOD", "above the threshold 0.3"),
        (Decision(0.3, "cat", False, 0.3, 0.05, 0.06), "ID", "not above the threshold 0.3"),
        (Decision(0.5, "cat"), "no decision", "not calibrated"),
        (Decision(0.5, "cat", None, math.inf, 0.01, 0.02), "no decision", "level of 1%"),
    ],
)
def test_the_decision_in_words(decision, title, words):
    found, lines = decision.words()
    assert found.startswith(title)
    text = "\n".join(lines)
    assert words in text
    assert ("p-value" in text) == (not math.isnan(decision.p_value))
    assert "predicted class: cat (97%)" in replace(decision, confidence=0.9701).words()[1]
    if math.isfinite(decision.threshold):
        assert "at most 5% of ID images" in text


def test_long_names_are_cut_at_the_width():
    from ood_heatmap.pictures import _load_font

    font = _load_font(12)
    assert _truncate("cat", font, 200) == "cat"
    cut = _truncate("Cardigan Welsh corgi, Cardigan", font, 100)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 100 < font.getlength(cut[:-1] + "xxx…")
