"""The results of each stage: what is read from a manifest, and what the terminal shows of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from ood_heatmap.errors import DamagedCacheError
from ood_heatmap.pipeline.results import DecoderResults, IndexResults, TargetsResults
from ood_heatmap.pipeline.run import read_manifest

RUN = Path(__file__).parent / "data" / "format-2" / "run"


def test_an_index_is_summarized_with_its_accuracy_and_empty_classes():
    results = IndexResults.from_manifest(read_manifest(RUN, "index"))
    results = replace(
        results, num_images=7, backend="faiss", accuracy=0.5, class_counts=(3, *[0] * 12, 4)
    )
    assert results.summary() == [
        "7 ID images, faiss",
        "accuracy 50.00%",
        "images predicted as each class: 0 to 4",
        "no image is predicted as class 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more",
    ]
    results = replace(results, accuracy=None, class_counts=(3, 4))
    assert results.summary()[1:] == [
        "accuracy unknown: no labels",
        "images predicted as each class: 3 to 4",
    ]


def test_targets_are_summarized_with_what_is_unusual():
    results = TargetsResults.from_manifest(read_manifest(RUN, "targets"))
    results = replace(
        results, num_images=40, backend="faiss", median_distance=1.2345, num_patched=0
    )
    expected = ["40 OOD images paired (nearest), faiss", "median distance 1.23"]
    assert results.summary() == expected
    assert replace(results, num_without_class=2, num_patched=80).summary() == [
        *expected,
        "2 had no ID image of their class: searched all",
        "80 ID images with a patch of an OOD image",
    ]


def test_a_decoder_is_summarized_with_its_training_set():
    results = DecoderResults.from_manifest(read_manifest(RUN, "decoder"))
    results = replace(results, num_parameters=12345, num_id=24, num_ood=12)
    assert results.summary() == [
        "decoder of 12,345 parameters, magnitude target",
        "trained on 24 ID and 12 OOD images",
    ]


@pytest.mark.parametrize(("field", "value"), [("num_images", "7"), ("classes", 3), ("head", None)])
def test_a_field_of_another_type_is_damage(field, value):
    manifest = read_manifest(RUN, "index")
    with pytest.raises(DamagedCacheError, match=rf"stage index is damaged \(results\.{field}\)"):
        IndexResults.from_manifest(replace(manifest, results={**manifest.results, field: value}))
