"""A run made by an earlier version opens, verifies, and scores as it did."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ood_heatmap import HeatmapDetector
from ood_heatmap.cache.manifest import FORMAT
from ood_heatmap.pipeline.verify import verify

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("number", range(2, FORMAT + 1))
def test_a_run_of_each_format_opens_and_scores_as_it_did(number, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DATA)
    folder = shutil.copytree(DATA / f"format-{number}", tmp_path / "data")
    run = folder / "run"
    assert verify(run)[2:4] == [
        "targets: 12 of 12 paired again, all equal",
        "targets: 6 of 6 pasted again, all equal",
    ]
    detector = HeatmapDetector.load(run, "cpu", trust_code=True)
    with np.load(run / "evaluation" / "scores-id.npz") as saved:
        before = {name: saved[name] for name in ("heatmap", "row")}
    images = np.load(folder / "test.npz")["images"][before["row"]]
    # another processor rounds otherwise
    np.testing.assert_allclose(detector(images).score, before["heatmap"], rtol=1e-3)
