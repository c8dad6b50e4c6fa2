"""Decisions: p-values by their definition, and false alarms as promised."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from scipy.stats import binomtest

from ood_heatmap.calibration import Calibration, num_needed
from ood_heatmap.errors import DamagedCacheError

tied = st.lists(st.integers(0, 6), min_size=1, max_size=40).map(
    lambda values: np.array(values, dtype=np.float32)
)


@given(tied, tied, st.sampled_from([0.01, 0.05, 0.1, 0.29, 0.5]))
@settings(max_examples=200, deadline=None)
def test_p_values_are_their_definition_and_agree_with_the_threshold(held_out, scores, level):
    calibration = Calibration.fit(held_out, held_out)
    wanted = [(1 + np.sum(held_out >= score)) / (len(held_out) + 1) for score in scores]
    found = calibration.p_value(scores)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found <= level + 1e-12, scores > calibration.threshold(level))


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_false_alarms_on_fresh_id_data_stay_within_the_binomial_interval(level):
    generator = np.random.default_rng(0)
    flagged = total = 0
    for _ in range(200):  # the promise is about both draws, of held-out and of fresh images
        calibration = Calibration.fit(*generator.gamma(2, 1, (2, 500)))
        flagged += int((generator.gamma(2, 1, 50) > calibration.threshold(level)).sum())
        total += 50
    interval = binomtest(flagged, total).proportion_ci(0.999)
    assert interval.low <= level <= interval.high


def test_pixels_are_flagged_in_few_id_images():
    peaks = np.random.default_rng(0).random(999).astype(np.float32)
    threshold = Calibration.fit(peaks, peaks).pixel_threshold(0.1)
    assert (peaks > threshold).sum() == 99


@pytest.mark.parametrize(("level", "wanted"), [(0.5, 1), (0.05, 19), (0.01, 99), (0.29, 3)])
def test_too_few_images_for_a_level_have_no_threshold(level, wanted):
    assert num_needed(level) == wanted
    for count in range(max(1, wanted - 2), wanted + 2):
        ascending = np.arange(count, dtype=np.float32)
        calibration = Calibration.fit(ascending, ascending)
        assert calibration.has_threshold(level) == (count >= wanted)
        assert (calibration.threshold(level) == math.inf) == (count < wanted)
        assert (calibration.pixel_threshold(level) == math.inf) == (count < wanted)


@given(st.floats(1e-4, 0.9999), st.integers(1, 30_000))
def test_there_is_a_threshold_when_the_lowest_p_value_is_as_low_as_the_level(level, count):
    calibration = Calibration.fit(np.zeros(count, np.float32), np.zeros(count, np.float32))
    assert calibration.has_threshold(level) == math.isfinite(calibration.threshold(level))
    lowest = calibration.p_value(np.ones(1))[0]
    if abs(lowest - level) > 1e-8:
        assert calibration.has_threshold(level) == (lowest <= level)


def test_it_comes_back_from_bytes_and_damaged_ones_are_one_line():
    calibration = Calibration.fit(np.array([3, 1, 2]), np.array([0.3, 0.1, 0.2]))
    loaded = Calibration.from_bytes(calibration.to_bytes(), "name")
    np.testing.assert_array_equal(loaded.scores, [1, 2, 3])
    np.testing.assert_array_equal(loaded.max_pixel_scores, np.array([0.1, 0.2, 0.3], np.float32))
    assert calibration.to_bytes() == loaded.to_bytes()
    for content in (b"damaged", b"", save({"scores": np.zeros(1)})):
        with pytest.raises(DamagedCacheError, match="name is not a calibration file"):
            Calibration.from_bytes(content, "name")
