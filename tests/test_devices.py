"""Devices: memory that is used up, deterministic kernels, and what a manifest says of them."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from ood_heatmap import devices as module
from ood_heatmap.classifier import load_classifier
from ood_heatmap.devices import (
    choose_device,
    computes_in_bfloat16,
    describe_environment,
    is_out_of_memory,
    kernel_selection,
    one_blas_thread,
)
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.pipeline import evaluate, localize, targets, verify
from ood_heatmap.pipeline.run import read_manifest


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError("Unable to allocate 7.45 GiB for an array"),
    ],
    ids=str,
)
def test_memory_that_is_used_up_is_told_whoever_asked_for_it(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        # in it the word, and nothing to do with its size
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_the_cpus_own_allocator_says_it_in_these_words():
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(info.value)


def modes() -> tuple[bool, bool, bool]:
    """Return whether PyTorch is deterministic, may choose by timing, and fills new memory."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.fixture
def deterministic_before():
    """Turn PyTorch's deterministic mode on, as a caller may have, until the test's end."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_kernels_are_chosen_by_timing_or_deterministic_and_then_all_is_as_before():
    before = modes()
    assert not before[1]
    with kernel_selection(deterministic=False, benchmark=True):
        assert modes() == (False, True, before[2])
    with kernel_selection(deterministic=False):
        assert modes() == (False, False, before[2])
    assert modes() == before
    with kernel_selection(deterministic=True, benchmark=True):
        assert modes() == (True, False, False)
        # PyTorch's documentation, "Reproducibility": cuBLAS needs it
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    assert modes() == before


def test_what_the_caller_has_made_deterministic_stays_so(deterministic_before):
    with kernel_selection(deterministic=False):
        assert modes()[:2] == (True, False)
    assert torch.are_deterministic_algorithms_enabled()


def test_what_pytorch_cannot_do_deterministically_is_one_line():
    place, value = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    torch.zeros(3).put_(place, value)
    with (
        pytest.raises(OodHeatmapError, match=r"put_ has no deterministic implementation.*Leave it"),
        kernel_selection(deterministic=True),
    ):
        torch.zeros(3).put_(place, value)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_environment_names_processor_and_version():
    found = describe_environment(torch.device("cpu"), deterministic=True)
    assert found["torch"] == torch.__version__
    assert found["deterministic"] is True
    assert torch.backends.cpu.get_cpu_capability() in found["device"]
    assert json.loads(json.dumps(found)) == found


def test_all_four_stages_compute_deterministically_when_asked_to_and_a_cpu_does_anyway(
    data, spec, make_run, finished_run, tmp_path, tree, monkeypatch
):
    forward, seen = torch.nn.Linear.forward, list[bool]()

    def watched(self, inputs):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return forward(self, inputs)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    load_classifier(spec, weights=data / "weights.safetensors", num_maps=2)
    # the classifier is loaded before the stages begin
    before = len(seen)
    seen.clear()
    run = make_run(tmp_path / "run", deterministic=True)
    assert seen.count(False) == before
    assert seen.count(True) > 50
    assert tree(run) == tree(finished_run)
    for stage in ("index", "targets", "decoder", "evaluation"):
        (environment,) = read_manifest(run, stage).speed["environments"]
        assert environment == describe_environment(torch.device("cpu"), deterministic=True)


@pytest.fixture
def gpu_without_cuda(monkeypatch, tmp_path):
    """Pretend to have a GPU that PyTorch cannot use; yields the file of the driver's version."""
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    monkeypatch.setattr(module, "_DRIVER_FILE", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/dev/nvidia0")]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver


def test_a_driver_that_is_too_old_is_named_with_the_way_out(gpu_without_cuda, caplog):
    assert choose_device("auto") == torch.device("cpu")
    assert "computing on the CPU: the NVIDIA driver 535.104.05 is too old" in caplog.text
    assert "needs 580 or later. Update the driver, or install a PyTorch built" in caplog.text
    with pytest.raises(UsageError, match=r"driver 535\.104\.05 is too old .* Use --device cpu\."):
        choose_device("cuda")


def test_other_reasons_why_a_gpu_is_not_used(gpu_without_cuda, caplog, monkeypatch):
    gpu_without_cuda.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n"
    )
    choose_device("auto")
    assert "cannot use the NVIDIA GPU (driver 580.159.04)" in caplog.text
    gpu_without_cuda.unlink()
    choose_device("auto")
    assert "(driver unknown)" in caplog.text
    monkeypatch.setattr(torch.version, "cuda", None)
    choose_device("auto")
    assert "is built without CUDA" in caplog.text


def test_no_gpu_or_a_hidden_one_is_nothing_to_speak_of(gpu_without_cuda, caplog, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    choose_device("auto")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(Path, "glob", lambda *_: iter([]))
    choose_device("auto")
    assert not caplog.text


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_is_chosen_where_it_is_not_emulated(monkeypatch, has_it):
    def is_supported(including_emulation: bool = True) -> bool:
        return has_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert computes_in_bfloat16(torch.device("cuda", 0)) is has_it
    assert not computes_in_bfloat16(torch.device("cpu"))


def numpy_threads() -> list[int]:
    """Return the threads of the BLAS in NumPy's wheel; empty with another NumPy."""
    found = threadpool_info()
    return [item["num_threads"] for item in found if "numpy.libs" in item["filepath"]]


@pytest.fixture
def two_blas_threads():
    """Give NumPy two threads, whatever the environment says."""
    with threadpool_limits({"libscipy_openblas": 2}):
        if numpy_threads() != [2]:
            pytest.skip("NumPy is not from its wheel")
        yield


def test_numpy_multiplies_in_one_thread_and_torch_and_faiss_in_theirs(two_blas_threads):
    others = torch.get_num_threads(), faiss.omp_get_max_threads()
    with one_blas_thread():
        assert numpy_threads() == [1]
        np.ones((300, 300)) @ np.ones((300, 300))
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == others
    assert numpy_threads() == [2]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_so_do_processes_that_are_forked_meanwhile(two_blas_threads):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with one_blas_thread():
        process = multiprocessing.get_context("fork").Process(
            target=lambda: sender.send(numpy_threads())
        )
        process.start()
        assert receiver.recv() == [1]
        process.join()


class _ReachedError(Exception):
    """The stage has begun."""


@pytest.mark.parametrize(
    ("module", "stage", "called", "arguments"),
    [
        (targets, "build_targets", "check_faiss", 4),
        (evaluate, "evaluate", "_check_names", 5),
        (localize, "localize", "open_index", 5),
        (verify, "verify", "read_manifest", 1),
    ],
)
def test_stages_with_small_products_multiply_in_one_thread(
    module, stage, called, arguments, run, monkeypatch, two_blas_threads
):
    def begin(*_):
        assert numpy_threads() == [1]
        raise _ReachedError

    monkeypatch.setattr(module, called, begin)
    with pytest.raises(_ReachedError):
        getattr(module, stage)(run, *[()] * (arguments - 1))
    assert numpy_threads() == [2]
