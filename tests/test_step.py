"""The step: every way to launch it trains the same, and measuring it leaves no trace."""

import math
from dataclasses import replace

import pytest
import torch

from ood_heatmap.decoder import Decoder, DecoderConfig, make_decoder
from ood_heatmap.errors import UsageError
from ood_heatmap.pipeline import step as module
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.feed import TrainingBatch
from ood_heatmap.pipeline.step import (
    adam,
    captured,
    faster_of_plain_and_graph,
    make_step,
    measure_ceiling,
    snapshot,
    training_step,
)

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]
CONFIG = TrainConfig(batch_size=6, precision="float32")


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
    decoder = make_decoder(DecoderConfig(8, 3, 8, width=16)).double().to(device).train()
    decoder.to(memory_format=torch.channels_last)
    optimizer = adam(decoder, CONFIG)
    return decoder, optimizer, training_step(decoder, optimizer, CONFIG, device)


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_restored_snapshot_trains_on_as_if_nothing_had_been(device, steps_before):
    decoder, optimizer, step = fresh(torch.device(device))
    losses(step, device, steps_before)
    restore = snapshot(decoder, optimizer)
    wanted = losses(step, device)
    losses(step, device, 3)
    places = [item.data_ptr() for item in decoder.parameters()]
    restore()
    assert losses(step, device) == pytest.approx(wanted, rel=0 if device == "cpu" else 1e-6)
    assert places == [item.data_ptr() for item in decoder.parameters()]  # a graph knows them


@pytest.mark.slow
def test_a_compiled_step_trains_as_a_plain_one():
    decoder, optimizer, plain = fresh()
    wanted = losses(plain)
    decoder, optimizer, _ = fresh()
    compiled = training_step(decoder, optimizer, CONFIG, CPU, compiled=True)
    assert losses(compiled) == pytest.approx(wanted, rel=1e-6)  # summed in float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_trains_as_a_plain_one():
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = losses(fresh(device)[2], device)
    decoder, optimizer, plain = fresh(device)
    restore = snapshot(decoder, optimizer)
    graph = captured(plain, optimizer, example(device))
    restore()
    assert losses(graph, device) == pytest.approx(wanted, rel=1e-6)  # summed in float32


def test_on_the_cpu_a_step_is_plain_unless_another_is_asked_for():
    decoder, optimizer, _ = fresh()
    kind, step = make_step(decoder, optimizer, CONFIG, example())
    assert kind == "plain"
    assert losses(step) == losses(fresh()[2])
    with pytest.raises(UsageError, match="--step graph is for one process on a GPU"):
        make_step(decoder, optimizer, TrainConfig(step="graph"), example())


def test_a_step_that_cannot_be_captured_is_plain_with_a_word(monkeypatch, caplog):
    def fails(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(module, "captured", fails)
    _, optimizer, plain = fresh()
    assert faster_of_plain_and_graph(plain, optimizer, example()) == ("plain", plain)
    assert "captured (operation not permitted when stream is capturing): going" in caplog.text


@pytest.mark.parametrize(("graph", "kind"), [(0.004, "graph"), (0.006, "plain")])
def test_the_faster_of_plain_and_graph_is_taken(monkeypatch, clock, graph, kind):
    monkeypatch.setattr(module, "captured", lambda *_: clock.step(graph))
    _, optimizer, _ = fresh()
    assert faster_of_plain_and_graph(clock.step(0.005), optimizer, example())[0] == kind


@pytest.mark.parametrize(
    ("num_steps", "counted"), [(0, 3), (30, 3), (70, 5), (100, 10), (10**6, 255)]
)
def test_the_ceiling_takes_a_tenth_of_a_short_training_and_two_seconds_of_a_long_one(
    clock, num_steps, counted
):
    rate = measure_ceiling(clock.step(2**-7), example(), 6, num_steps)
    assert rate == pytest.approx(6 * 2**7)
    assert clock.seconds == (module.WARM_UP + counted) * 2**-7


class Small:
    """Stands in for a decoder on a device with memory for a few images only."""

    def __init__(self, decoder: Decoder, memory: int) -> None:
        self.decoder, self.memory, self.sizes = decoder, memory, []

    def __call__(self, features: torch.Tensor, *inputs: object) -> torch.Tensor:
        self.sizes.append(len(features))
        if len(features) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.decoder(features, *inputs)


def plain_stack() -> tuple[Decoder, torch.optim.Adam]:
    torch.manual_seed(0)
    decoder = make_decoder(DecoderConfig(8, 3, 8, width=16, stack="plain")).double().train()
    return decoder, adam(decoder, CONFIG)


def test_without_memory_for_a_step_its_halves_train_the_same(caplog):
    decoder, optimizer = plain_stack()
    wanted = losses(training_step(decoder, optimizer, CONFIG, CPU))
    halved, optimizer = plain_stack()
    small = Small(halved, 2)
    found = losses(training_step(small, optimizer, CONFIG, CPU))
    assert small.sizes == [6, 3, *[2, 2, 2] * 5]  # remembered
    assert "steps go on in parts of 2 images" in caplog.text
    assert found == pytest.approx(wanted, rel=1e-6)  # summed in float32
    for ours, theirs in zip(halved.parameters(), decoder.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("memory", "stack"), [(0, "plain"), (5, "dcgan")])
def test_a_step_that_halves_would_not_help_is_an_error(memory, stack):
    decoder, optimizer = plain_stack()
    config = replace(CONFIG, stack=stack)
    with pytest.raises(torch.OutOfMemoryError):
        training_step(Small(decoder, memory), optimizer, config, CPU)(example())


@pytest.mark.parametrize("size", [4, 6])
def test_a_loss_is_the_mean_over_the_whole_batch(monkeypatch, size):
    """What a process of two does with an uneven part: its mean over both is that of the batch."""
    monkeypatch.setattr(module, "world_size", lambda: 2)
    config = TrainConfig(batch_size=size, lr=1e-30, precision="float32")
    decoder = make_decoder(DecoderConfig(8, 3, 8, width=16)).eval()  # images are independent
    step = training_step(decoder, adam(decoder, config), config, CPU)
    whole, parts = example(), []
    for part in (slice(0, size - 1), slice(size - 1, size)):
        batch = TrainingBatch(*(item[part] for item in whole.tensors))
        parts.append(step(batch).item())
    with torch.no_grad():
        found = decoder(whole.features, whole.prediction)[:size]
    target = whole.heatmap[:size].abs() / 255
    wanted = ((1 + 5 * target) * (found - target) ** 2).sum().item() / size
    assert math.fsum(parts) / 2 == pytest.approx(wanted, rel=1e-5)
