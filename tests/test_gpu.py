"""What only a real GPU can show: equal bytes on request, and the same rows as on a CPU."""

import numpy as np
import pytest
import torch

from ood_heatmap.cache.shards import map_shard
from ood_heatmap.pipeline.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_deterministic_runs_are_equal_byte_for_byte(make_run, tree, tmp_path):
    # from three workers on, images are decoded in processes, forked beside CUDA
    runs = [
        make_run(tmp_path / name, CUDA, deterministic=True, workers=workers)
        for name, workers in (("threads", 1), ("processes", 4))
    ]
    threads, processes = map(tree, runs)
    different = [name for name in threads if processes.get(name) != threads[name]]
    assert different == []
    assert processes.keys() == threads.keys()


def test_the_caches_of_a_gpu_are_those_of_a_cpu_to_rounding(make_run, tmp_path):
    mine, theirs = make_run(tmp_path / "gpu", CUDA), make_run(tmp_path / "cpu", CPU)
    for stage in ("index", "targets"):
        for path in sorted((mine / stage).glob("*.h5")):
            one, other = map_shard(path), map_shard(theirs / stage / path.name)
            for name in one:
                if name in ("images", "label", "row"):
                    np.testing.assert_array_equal(one[name], other[name])
                elif name.startswith("feature"):
                    # convolutions run in TF32 on a GPU
                    scale = np.abs(other[name].astype(np.float64)).max()
                    np.testing.assert_allclose(one[name], other[name], rtol=0, atol=5e-3 * scale)
    # pairs of the features that the GPU has computed, by brute force
    assert verify(mine)
