"""What only a real GPU can show: equal bytes on request, and the same rows as on a CPU."""

import shutil

import numpy as np
import pytest
import torch

from ood_heatmap.cache.shards import map_shard
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.train import train_decoder
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


@pytest.mark.parametrize("step", ["auto", "graph"])
def test_a_deterministic_training_with_feature_maps_is_the_same_twice(run, tree, step):
    """Maps are interpolated: by default the gradients of that are added in any order."""
    config = TrainConfig(
        epochs=3, batch_size=32, width=32, feature_maps=2, step=step, deterministic=True
    )
    made = []
    for _ in range(2):
        shutil.rmtree(run / "decoder")
        train_decoder(run, CUDA, config)
        made.append(tree(run / "decoder"))
    assert made[0] == made[1]


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
