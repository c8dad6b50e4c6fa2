"""The benchmark of scale: sparse runs are whole to the stages, and every cost can be measured."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from ood_heatmap.pipeline.run import open_index, open_targets
from ood_heatmap.pipeline.verify import verify

NUM_OOD = 600


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        yield importlib.import_module("scale"), importlib.import_module("sparse")


@pytest.fixture(scope="module")
def case(modules, tmp_path_factory):
    scale, sparse = modules
    folder = tmp_path_factory.mktemp("scale")
    case = scale.Case(folder / "run", folder / "files", NUM_OOD)
    sparse.make_run(case.run, case.folder, NUM_OOD)
    return case


def test_a_sparse_run_is_whole_but_takes_no_space(modules, case):
    scale, _ = modules
    with scale._not_hashing():
        index = open_index(case.run)
        targets = open_targets(case.run, index)
        lines = verify(case.run, num_samples=5)
    np.testing.assert_array_equal(index.columns["row"].read(), np.arange(NUM_OOD))
    assert len(targets.columns["row"]) == 3 * NUM_OOD
    assert "targets: 5 of 600 paired again, all equal" in "\n".join(lines)
    statuses = [path.stat() for path in case.run.rglob("*")]
    # 600 x 183,824 bytes of the index and 1,800 x 55,258 of the targets, on paper
    assert sum(item.st_size for item in statuses) > 600 * 183_824 + 1_800 * 55_258
    assert sum(512 * item.st_blocks for item in statuses) < 5e6


@pytest.mark.parametrize("name", ["open", "plan", "verify", "train", "order", "batch", "resume"])
def test_a_cost_is_measured(modules, case, name):
    """In this order: ``resume`` takes the run apart."""
    scale, _ = modules
    assert scale.COSTS[name].measure(case).wall > 0


def test_the_folder_of_a_listing_has_as_many_images(modules, case, tmp_path):
    scale, sparse = modules
    folder = sparse.make_folder(tmp_path / "ood", case.folder, 1_500)
    cost = scale.COSTS["list"]
    assert cost.measure(scale.Case(case.run, folder, 1_500)).wall > 0
