"""The step: every way to launch it trains the same, and measuring it leaves no trace."""

import math
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulated_cuda import CUDA, refuse_waiting, simulated_cuda
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ood_heatmap.decoder import Decoder, DecoderConfig, make_decoder
from ood_heatmap.errors import UsageError
from ood_heatmap.pipeline import step as module
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.feed import TrainingBatch
from ood_heatmap.pipeline.step import (
    _capture_graph,
    _faster_of_eager_and_graph,
    _make_eager_step,
    make_adam,
    make_step,
    measure_ceiling,
    set_lr,
    snapshot,
    wrap_ddp,
)

CPU = torch.device("cpu")
DCGAN = DecoderConfig(8, 3, 8, "magnitude", width=16, stack="dcgan")
CONFIG = TrainConfig(batch_size=6, precision="float32", stack="plain", target="magnitude")
PLAIN = CONFIG


def example(device: torch.device = CPU, seed: int = 0) -> TrainingBatch:
    generator = torch.Generator().manual_seed(seed)
    return TrainingBatch(
        torch.rand(6, 8, generator=generator).to(device),
        torch.randint(3, (6,), dtype=torch.int32, generator=generator).to(device),
        torch.randint(-255, 256, (6, 3, 8, 8), dtype=torch.int16, generator=generator).to(device),
    )


def fresh(device: torch.device = CPU) -> tuple[Decoder, torch.optim.Adam, module.Step]:
    """Return a decoder in float64, where steps that round differently stay together."""
    torch.manual_seed(0)
    decoder = make_decoder(DCGAN).double().to(device).train()
    decoder.to(memory_format=torch.channels_last)
    optimizer = make_adam(decoder, CONFIG)
    return decoder, optimizer, _make_eager_step(decoder, optimizer, CONFIG)


class Clock:
    """Stands in for the module ``time``: steps move it on, whatever else the machine does."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def step(self, seconds: float) -> module.Step:
        def step(batch: TrainingBatch) -> torch.Tensor:
            self.seconds += seconds
            return torch.zeros(())

        return step


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def losses(step: module.Step, device: torch.device = CPU, count: int = 5) -> list[float]:
    return [step(example(device, seed)).item() for seed in range(count)]


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_restored_snapshot_trains_on_as_if_nothing_had_been(device, steps_before):
    decoder, optimizer, step = fresh(device)
    losses(step, device, steps_before)
    restore = snapshot(decoder, optimizer)
    wanted = losses(step, device)
    losses(step, device, 3)
    places = [item.data_ptr() for item in decoder.parameters()]
    restore()
    assert losses(step, device) == pytest.approx(wanted, rel=0 if device == CPU else 1e-6)
    assert places == [item.data_ptr() for item in decoder.parameters()]  # a graph knows them


def test_a_gpu_takes_the_steps_of_the_cpu_and_never_waits(gpu):
    wanted = losses(fresh()[2])
    _, optimizer, step = fresh(gpu)
    first, *batches = (example(gpu, seed) for seed in range(5))
    found = [step(first)]
    with refuse_waiting(gpu):
        for batch in batches:
            set_lr(optimizer, CONFIG.lr)
            found.append(step(batch))
    # the learning rate of a GPU is a float32
    assert [item.item() for item in found] == pytest.approx(wanted, rel=1e-6)


def test_a_step_that_cannot_be_compiled_is_one_line(monkeypatch):
    def fails(_: object) -> None:
        raise RuntimeError("backend='inductor' raised:\nCppCompileError: C++ compile error")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    decoder, optimizer, _ = fresh()
    with pytest.raises(UsageError, match=r"C\+\+ compile error\): use --step eager"):
        make_step(decoder, optimizer, replace(CONFIG, step="compiled"), example())


def test_compiled_batch_norm_over_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(module, "world_size", lambda: 2)
    decoder, optimizer, _ = fresh()
    config = replace(CONFIG, step="compiled", stack="dcgan")
    with pytest.raises(UsageError, match=r"dcgan is for one process: use --step auto"):
        make_step(decoder, optimizer, config, example())


@pytest.mark.slow
@pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ, reason="PyTorch compiles for the processor regardless"
)
def test_a_compiled_step_trains_as_an_eager_one():
    decoder, optimizer, eager = fresh()
    wanted = losses(eager)
    decoder, optimizer, _ = fresh()
    restore = snapshot(decoder, optimizer)
    kind, compiled = make_step(decoder, optimizer, replace(CONFIG, step="compiled"), example())
    restore()
    assert kind == "compiled"
    assert losses(compiled) == pytest.approx(wanted, rel=1e-6)  # summed in float32


def test_a_captured_step_trains_as_an_eager_one(gpu):
    wanted = losses(fresh(gpu)[2], gpu)
    decoder, optimizer, eager = fresh(gpu)
    restore = snapshot(decoder, optimizer)
    graph = _capture_graph(eager, optimizer, example(gpu))
    restore()
    assert losses(graph, gpu) == pytest.approx(wanted, rel=1e-6)  # summed in float32


class FullInCapture(torch.nn.Module):
    """Stands in for a decoder on a device whose memory suffices for eager steps only."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.sizes: list[int] = []

    def forward(self, features: torch.Tensor, *inputs: object) -> torch.Tensor:
        self.sizes.append(len(features))
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.decoder(features, *inputs)


def test_out_of_memory_in_a_capture_leaves_an_eager_step_as_it_was(gpu, caplog):
    decoder, _ = plain_stack(gpu)
    full = FullInCapture(decoder)
    optimizer = make_adam(full, PLAIN)
    restore, stream = snapshot(full, optimizer), torch.cuda.current_stream()
    kind, step = make_step(full, optimizer, PLAIN, example(gpu))
    restore()
    assert kind == "eager"
    assert "captured (CUDA out of memory): falling back to eager steps" in caplog.text
    assert "micro-batch" not in caplog.text
    assert torch.cuda.current_stream() == stream
    decoder, optimizer = plain_stack(gpu)
    wanted = losses(_make_eager_step(decoder, optimizer, PLAIN), gpu)
    assert losses(step, gpu) == pytest.approx(wanted, rel=1e-6)
    assert set(full.sizes) == {6}
    with pytest.raises(torch.OutOfMemoryError):
        make_step(full, optimizer, replace(PLAIN, step="graph"), example(gpu))


class ReadInCapture(torch.nn.Module):
    """Stands in for a decoder that makes the host wait, which ends a capture."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: torch.Tensor, *inputs: object) -> torch.Tensor:
        assert features.sum().item() > 0
        return self.decoder(features, *inputs)


def test_after_an_invalid_capture_steps_run_on_the_stream_of_before(monkeypatch, caplog):
    """On the simulated GPU only: with PyTorch before 2.13 a real one would not recover."""
    monkeypatch.setattr(module, "_RECOVERS_FROM_FAILED_CAPTURE", True)
    with simulated_cuda():
        decoder, optimizer = plain_stack(CUDA)
        stream, reading = torch.cuda.current_stream(), ReadInCapture(decoder)
        assert make_step(reading, optimizer, PLAIN, example(CUDA))[0] == "eager"
        assert torch.cuda.current_stream() is stream
        config = replace(PLAIN, step="graph")
        with pytest.raises(UsageError, match=r"\(operation not permitted .*\): use --step eager"):
            make_step(reading, optimizer, config, example(CUDA))


def test_after_the_choice_by_timing_the_other_step_holds_no_memory():
    with simulated_cuda() as state:
        decoder, optimizer = plain_stack(CUDA)
        kind, _ = make_step(decoder, optimizer, PLAIN, example(CUDA))
        assert kind == "graph"
        assert state.num_emptied == 1
        assert all(item.grad is None for item in decoder.parameters())


def test_on_the_cpu_a_step_is_eager_unless_another_is_asked_for():
    decoder, optimizer, _ = fresh()
    kind, step = make_step(decoder, optimizer, CONFIG, example())
    assert kind == "eager"
    assert losses(step) == losses(fresh()[2])
    kind, step = make_step(decoder, optimizer, replace(CONFIG, step="plain"), example())
    assert kind == "eager"  # its former name
    with pytest.raises(UsageError, match="--step graph is for one process on a GPU"):
        make_step(decoder, optimizer, TrainConfig(step="graph"), example())


def cannot_be_captured(*_: object) -> None:
    """Fail as a capture does: its end finds that something in it was not permitted."""
    try:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    except RuntimeError:
        raise RuntimeError("operation failed due to a previous error")  # noqa: B904


def test_a_step_that_cannot_be_captured_is_eager_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(module, "_capture_graph", cannot_be_captured)
    monkeypatch.setattr(module, "_RECOVERS_FROM_FAILED_CAPTURE", True)
    _, optimizer, eager = fresh()
    assert _faster_of_eager_and_graph(eager, optimizer, example()) == ("eager", eager)
    assert (
        "captured (operation not permitted when stream is capturing): falling back" in caplog.text
    )


def test_where_pytorch_does_not_recover_a_failed_capture_is_one_line(monkeypatch):
    monkeypatch.setattr(module, "_capture_graph", cannot_be_captured)
    monkeypatch.setattr(module, "_RECOVERS_FROM_FAILED_CAPTURE", False)
    _, optimizer, eager = fresh()
    with pytest.raises(UsageError, match=r"\(operation not permitted .*\): use --step eager"):
        _faster_of_eager_and_graph(eager, optimizer, example())


@pytest.mark.parametrize(("graph", "kind"), [(0.004, "graph"), (0.006, "eager")])
def test_the_faster_of_eager_and_graph_is_taken(monkeypatch, clock, graph, kind):
    monkeypatch.setattr(module, "_capture_graph", lambda *_: clock.step(graph))
    _, optimizer, _ = fresh()
    assert _faster_of_eager_and_graph(clock.step(0.005), optimizer, example())[0] == kind


@pytest.mark.parametrize(
    ("num_steps", "counted"), [(0, 3), (30, 3), (70, 5), (100, 10), (10**6, 255)]
)
def test_the_ceiling_takes_a_tenth_of_a_short_training_and_two_seconds_of_a_long_one(
    clock, num_steps, counted
):
    rate = measure_ceiling(clock.step(2**-7), example(), 6, num_steps)
    assert rate == pytest.approx(6 * 2**7)
    assert clock.seconds == (1 + module._CPU_PATIENCE + counted) * 2**-7


def test_the_ceiling_is_that_of_a_step_whose_first_calls_compile_and_record(clock):
    """In the manner of ``torch.compile(mode="reduce-overhead")``; windows are no warm-up."""
    seconds = iter([8.0, 4.0, 0.25, 0.25, 0.25, 0.25, *[2**-7] * 1000])

    def step(batch: TrainingBatch) -> torch.Tensor:
        clock.seconds += next(seconds)
        return torch.zeros(())

    assert measure_ceiling(step, example(), 6, 100) == pytest.approx(6 * 2**7)


def test_a_warm_up_whose_steps_never_settle_ends(clock):
    seconds = (0.7**number for number in range(1000))

    def step(batch: TrainingBatch) -> torch.Tensor:
        clock.seconds += next(seconds)
        return torch.zeros(())

    assert module._warm_up(step, example()) == pytest.approx(0.7 ** (module._MAX_WARM_UP - 1))


class Small(torch.nn.Module):
    """Stands in for a decoder on a device with memory for a few images only."""

    def __init__(
        self, decoder: Decoder, memory: int, error: type[RuntimeError] = torch.OutOfMemoryError
    ) -> None:
        super().__init__()
        self.decoder, self.memory, self.error = decoder, memory, error
        self.sizes: list[int] = []

    def forward(self, features: torch.Tensor, *inputs: object) -> torch.Tensor:
        self.sizes.append(len(features))
        if len(features) > self.memory:
            raise self.error("CUDA error: out of memory")
        return self.decoder(features, *inputs)


def plain_stack(device: torch.device = CPU) -> tuple[Decoder, torch.optim.Adam]:
    torch.manual_seed(0)
    decoder = make_decoder(replace(DCGAN, stack="plain")).double().to(device).train()
    return decoder, make_adam(decoder, CONFIG)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_without_memory_for_a_step_its_halves_train_the_same(caplog, error):
    decoder, optimizer = plain_stack()
    wanted = losses(_make_eager_step(decoder, optimizer, CONFIG))
    halved, optimizer = plain_stack()
    small = Small(halved, 2, error)
    found = losses(_make_eager_step(small, optimizer, CONFIG))
    assert small.sizes == [6, 3, *[2, 2, 2] * 5]  # remembered
    assert "micro-batch size reduced to 2 images" in caplog.text
    assert found == pytest.approx(wanted, rel=1e-6)  # summed in float32
    for ours, theirs in zip(halved.parameters(), decoder.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("memory", "stack"), [(0, "plain"), (5, "dcgan")])
def test_a_step_that_halves_would_not_help_is_an_error(memory, stack):
    decoder, optimizer = plain_stack()
    config = replace(CONFIG, stack=stack)
    with pytest.raises(torch.OutOfMemoryError):
        _make_eager_step(Small(decoder, memory), optimizer, config)(example())


def test_a_deterministic_step_is_not_chosen_by_timing():
    on_gpu: Any = SimpleNamespace(features=SimpleNamespace(device=torch.device("cuda", 0)))
    decoder, optimizer = plain_stack()
    assert make_step(decoder, optimizer, replace(CONFIG, deterministic=True), on_gpu)[0] == "eager"


def test_steps_of_several_gpus_are_eager_and_say_how_many_images_each_takes(monkeypatch, caplog):
    monkeypatch.setattr(module, "world_size", lambda: 8)
    on_gpu: Any = SimpleNamespace(features=SimpleNamespace(device=torch.device("cuda", 0)))
    decoder, optimizer = plain_stack()
    with caplog.at_level("INFO"):
        assert make_step(decoder, optimizer, TrainConfig(batch_size=200), on_gpu)[0] == "eager"
    assert "each of 8 GPUs takes 25 images of --batch-size 200" in caplog.text


def test_with_several_processes_gradients_lie_where_they_are_exchanged(tmp_path, monkeypatch):
    """A process group of one: its sums over all processes change nothing."""
    _, _, step = fresh()
    wanted = losses(step)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        decoder, optimizer, _ = fresh()
        step = _make_eager_step(wrap_ddp(decoder), optimizer, CONFIG)
        monkeypatch.setattr(module, "world_size", lambda: 1)
        assert losses(step) == wanted
        places = {item.grad.untyped_storage().data_ptr() for item in decoder.parameters()}
        assert len(places) < len(list(decoder.parameters()))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("size", [4, 6])
def test_a_loss_is_the_mean_over_the_whole_batch(monkeypatch, size):
    """What a process of two does with an uneven part: its mean over both is that of the batch."""
    monkeypatch.setattr(module, "world_size", lambda: 2)
    config = TrainConfig(batch_size=size, lr=1e-30, precision="float32")
    decoder = make_decoder(DCGAN).eval()  # images are independent
    step = _make_eager_step(decoder, make_adam(decoder, config), config)
    whole, parts = example(), []
    for part in (slice(0, size - 1), slice(size - 1, size)):
        batch = TrainingBatch(*(item[part] for item in whole.tensors))  # type: ignore[arg-type]
        parts.append(step(batch).item())
    with torch.no_grad():
        found = decoder(whole.features, whole.prediction)[:size]
    target = whole.target[:size].abs() / 255
    wanted = ((1 + 5 * target) * (found - target) ** 2).sum().item() / size
    assert math.fsum(parts) / 2 == pytest.approx(wanted, rel=1e-5)


class Dtypes(TorchDispatchMode):
    """Notes the dtypes that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.of.setdefault(func.overloadpacket.__name__, set()).add(out.dtype)
        return out


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs PyTorch with CUDA")
@pytest.mark.parametrize(("stack", "num_maps"), [("plain", 0), ("plain", 1), ("dcgan", 1)])
def test_in_bfloat16_only_products_are_bfloat16_at_the_shapes_of_imagenet(
    monkeypatch, stack, num_maps
):
    """Shapes and dtypes of a GPU, without a GPU: nothing is computed."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    maps = ((2048, 7, 7),) * num_maps
    shape = DecoderConfig(2048, 1000, 224, "magnitude", map_shapes=maps, stack=stack)
    with FakeTensorMode(), torch.device("cuda"):
        decoder = make_decoder(shape)
        batch = TrainingBatch(
            torch.empty(200, 2048),
            torch.empty(200, dtype=torch.int32),
            torch.empty(200, 3, 224, 224, dtype=torch.int16),
            tuple(torch.empty(200, *item, dtype=torch.float16) for item in maps),
            torch.empty(200, shape.num_inputs) if stack == "plain" else None,
        )
        with Dtypes() as dtypes:
            loss = module._batch_loss(decoder, TrainConfig(stack=stack), batch)
    assert (loss.dtype, loss.shape, loss.device.type) == (torch.float32, (), "cuda")
    assert dtypes.of["convolution"] == {torch.bfloat16}
    assert dtypes.of["sigmoid"] == {torch.float32}
    assert dtypes.of.get("std", {torch.float32}) == {torch.float32}
    assert dtypes.of["sum"] <= {torch.float32}
