"""Devices: which errors say that the memory is used up."""

import pytest
import torch

from ood_heatmap.devices import is_out_of_memory


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
