"""Does the simulated GPU find mistakes? Each is planted, and the same work without it passes."""

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from simulated_cuda import CUDA, Event, Stream, refuse_waiting, simulated_cuda
from torch import Tensor

from ood_heatmap.cache.shards import Rows
from ood_heatmap.classifier import Classifier, ClassifierConfig
from ood_heatmap.decoder import Decoder, DecoderConfig, make_decoder
from ood_heatmap.heatmap import weighted_squared_error
from ood_heatmap.images import Transform
from ood_heatmap.pipeline import feed as feed_module
from ood_heatmap.pipeline import step as step_module
from ood_heatmap.pipeline import train as train_module
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.feed import TrainingBatch, TrainingSet, read_batch
from ood_heatmap.pipeline.forward import BatchedClassifier, PendingOutputs

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch_size=6, stack="plain", width=16)


def batch_of(seed: int, device: torch.device) -> TrainingBatch:
    generator = torch.Generator().manual_seed(seed)
    batch = TrainingBatch(
        torch.rand(6, 8, generator=generator),
        torch.randint(3, (6,), dtype=torch.int32, generator=generator),
        torch.randint(-255, 256, (6, 3, 8, 8), dtype=torch.int16, generator=generator),
        (torch.rand(6, 5, 3, 3, generator=generator).half(),),
    )
    return batch.like(item.to(device) for item in batch.tensors)


def fresh(device: torch.device) -> tuple[Decoder, torch.optim.Adam, step_module.Step]:
    torch.manual_seed(0)
    config = DecoderConfig(8, 3, 8, "magnitude", width=16, map_shapes=((5, 3, 3),), stack="plain")
    decoder = make_decoder(config).to(device).train()
    optimizer = step_module.make_adam(decoder, CONFIG)
    return decoder, optimizer, step_module._make_eager_step(decoder, optimizer, CONFIG)


def run_steps(
    step: step_module.Step, optimizer: torch.optim.Adam, device: torch.device
) -> list[Tensor]:
    """Take steps as an epoch does, and return the losses where they are."""
    generator = train_module._noise_generator(0, 0, device)
    batches = [batch_of(seed, device) for seed in range(3)]
    losses = []
    with refuse_waiting(device):
        for number, batch in enumerate(batches):
            step_module.set_lr(optimizer, 1e-3 / (1 + number))
            noisy = train_module._add_noise(batch, generator, 8 + 5, CONFIG)
            losses.append(step(noisy) + 0)
    return losses


def eager_steps(device: torch.device) -> list[Tensor]:
    _, optimizer, step = fresh(device)
    return run_steps(step, optimizer, device)


def graph_steps(device: torch.device) -> list[Tensor]:
    """Take captured steps; on the CPU eager ones."""
    decoder, optimizer, step = fresh(device)
    if device == CUDA:
        restore = step_module.snapshot(decoder, optimizer)
        noise = torch.zeros(6, 8 + 5, device=device)
        step = step_module._capture_graph(step, optimizer, replace(batch_of(9, CUDA), noise=noise))
        restore()
    return run_steps(step, optimizer, device)


def training_set() -> TrainingSet:
    generator = np.random.default_rng(0)
    shared = {
        "features": Rows([generator.random((20, 4), np.float32)]),
        "prediction": Rows([np.arange(20, dtype=np.int32)]),
    }
    target = Rows([generator.integers(-9, 9, (20, 3, 2, 2)).astype(np.int16)])
    return TrainingSet(shared, {**shared, "heatmap": target})


def read_all(
    make: Callable[[TrainingSet, torch.device], feed_module.Feed], device: torch.device
) -> list[Tensor]:
    """Return the features of batches from a feed, each doubled by the device in good time."""
    data, generator = training_set(), np.random.default_rng(1)
    rows = [np.sort(generator.choice(40, 8, replace=False)) for _ in range(12)]
    if device == CPU:
        return [read_batch(data, item, CPU).features * 2 for item in rows]
    batches = make(data, device).batches(rows)
    with refuse_waiting(device), closing(batches):  # type: ignore[type-var]
        return [batch.features * 2 for batch in batches]


def streaming_feed(device: torch.device) -> list[Tensor]:
    return read_all(lambda data, device: feed_module._StreamingFeed(data, device, 8), device)


def resident_feed(device: torch.device) -> list[Tensor]:
    return read_all(feed_module._ResidentFeed, device)


def forward_passes(device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).append(torch.nn.Linear(4, 3))
    config = ClassifierConfig("x", 3, Transform(8), (0.0,) * 3, (1.0,) * 3, num_maps=1)
    batched = BatchedClassifier(Classifier(network, config).to(device), 4)
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8)).astype(np.uint8)
    pending = batched.start(images)
    outputs = pending.wait()
    return [item for out in outputs for item in (out.features, out.logits, *out.maps)]


def check(work: Callable[[torch.device], list[Tensor]], *patch: Any) -> None:
    """Do work on the CPU, and with a mistake, if any, on the simulated GPU; compare."""
    wanted = work(CPU)
    with simulated_cuda(), mock.patch.object(*patch) if patch else nullcontext():
        found = [item.cpu().clone() for item in work(CUDA)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


WORK = [eager_steps, graph_steps, streaming_feed, resident_feed, forward_passes]


@pytest.mark.parametrize("work", WORK)
def test_work_without_mistakes_passes(work):
    check(work)


def loss_with(change: Callable[..., Any]) -> tuple[object, str, object]:
    """Return a patch of the loss: ``change`` gets heatmap, target and weight."""

    def loss(heatmap: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return weighted_squared_error(*change(heatmap, target, weight))

    return step_module, "weighted_squared_error", loss


def read_back(heatmap: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    assert heatmap.mean().item() < 1
    return heatmap, target, weight


def select(index: Callable[[Tensor], Tensor]) -> tuple[object, str, object]:
    return loss_with(lambda *tensors: [item[index(tensors[0])] for item in tensors])


def read_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] += lr - group["lr"].item()


def replace_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros((), device=CUDA) + lr


def keep_warm_up(decoder: Decoder, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    return lambda: None


def restore_weights_only(decoder: Decoder, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    before = [item.detach().clone() for item in decoder.parameters()]

    @torch.no_grad()
    def restore() -> None:
        for item, value in zip(decoder.parameters(), before, strict=True):
            item.copy_(value)

    return restore


def replace_weights(decoder: Decoder, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    before = {name: item.clone() for name, item in decoder.state_dict().items()}
    return lambda: decoder.load_state_dict(before, assign=True) and None


def pageable(*args: Any, pinned: bool = False) -> Tensor:
    return EMPTY(*args)


EMPTY = feed_module._empty


def wait_for_copies_only(stream: Stream, event: Event) -> None:
    """Leave out the wait of the copy stream for the device to be done with a batch."""
    if stream == torch.cuda.current_stream():
        WAIT_EVENT(stream, event)


def wait_for_use_only(stream: Stream, event: Event) -> None:
    """Leave out the wait of the current stream for a batch to arrive."""
    if stream != torch.cuda.current_stream():
        WAIT_EVENT(stream, event)


WAIT_EVENT = Stream.wait_event


def one_pinned_block(batched: BatchedClassifier, images: np.ndarray, size: int) -> Tensor:
    """Fill the same pinned memory again for each batch."""
    if not hasattr(batched, "block"):
        batched.block = torch.empty((size, *images.shape[1:]), dtype=torch.uint8, pin_memory=True)  # type: ignore[attr-defined]
    block: Tensor = batched.block  # type: ignore[attr-defined]
    block[: len(images)] = torch.from_numpy(images)
    return block.to(batched.classifier.device, non_blocking=True)


def wait_for_threads_only(pending: PendingOutputs) -> list[Any]:
    return [output for future in pending.outputs for output in future.result()]


def host_generator(seed: int, epoch: int, device: torch.device) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_on_the_host(batch: TrainingBatch, *_: object) -> TrainingBatch:
    return replace(batch, noise=torch.randn(6, 8 + 5).to(batch.features.device))


MISTAKES = {
    "a loss read in every step": (
        eager_steps,
        loss_with(read_back),
        "synchronizing .*local_scalar",
    ),
    "a loss read inside a capture": (
        graph_steps,
        loss_with(read_back),
        "previous error during capture",
    ),
    "a weight left on the host": (
        eager_steps,
        (step_module, "region_weight", lambda target, _: torch.ones(len(target), 1, 1, 1)),
        "on the same device",
    ),
    "a boolean mask": (eager_steps, select(lambda heatmap: heatmap > 0), "indexing by a mask"),
    "an index left on the host": (
        eager_steps,
        select(lambda _: torch.arange(6)),
        "by a tensor of the host",
    ),
    "noise drawn on the host": (
        eager_steps,
        (train_module, "_add_noise", draw_on_the_host),
        "pageable memory",
    ),
    "a generator of the host": (
        eager_steps,
        (train_module, "_noise_generator", host_generator),
        "on the same device",
    ),
    "the learning rate read back": (
        eager_steps,
        (step_module, "set_lr", read_lr),
        "synchronizing .*local_scalar",
    ),
    "a learning rate in other memory than the graph's": (
        graph_steps,
        (step_module, "set_lr", replace_lr),
        "not close",
    ),
    "weights in other memory than the graph's": (
        graph_steps,
        (step_module, "snapshot", replace_weights),
        "freed after its capture",
    ),
    "warm-up steps kept": (
        graph_steps,
        (step_module, "snapshot", keep_warm_up),
        "not close",
    ),
    "the state of the optimizer kept": (
        graph_steps,
        (step_module, "snapshot", restore_weights_only),
        "not close",
    ),
    "a capture that does not wait for the weights": (
        graph_steps,
        (Stream, "wait_stream", lambda *_: None),
        "two streams",
    ),
    "a slot filled before it was copied": (
        streaming_feed,
        (Event, "synchronize", lambda _: None),
        "changed while it was copied",
    ),
    "a slot copied before it was used": (
        streaming_feed,
        (Stream, "wait_event", wait_for_copies_only),
        "two streams",
    ),
    "a batch used before it arrived": (
        streaming_feed,
        (Stream, "wait_event", wait_for_use_only),
        "two streams",
    ),
    "a slot in pageable memory": (
        streaming_feed,
        (feed_module, "_empty", pageable),
        "pageable memory",
    ),
    "row numbers in pageable memory": (
        resident_feed,
        (Tensor, "pin_memory", lambda rows: rows),
        "pageable memory",
    ),
    "a pinned block filled before it was copied": (
        forward_passes,
        (BatchedClassifier, "_to_device", one_pinned_block),
        "changed while it was copied",
    ),
    "outputs read before they arrived": (
        forward_passes,
        (PendingOutputs, "wait", wait_for_threads_only),
        "not close",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name):
    work, patch, message = MISTAKES[name]
    with pytest.raises((RuntimeError, AssertionError), match=message):
        check(work, *patch)


def test_a_loss_that_waits_for_each_step_is_found():
    """Moving it to the host with ``to`` waits as ``item`` does."""
    with simulated_cuda():
        _, optimizer, step = fresh(CUDA)
        with pytest.raises(RuntimeError, match=r"synchronizing .*to pageable memory"):
            run_steps(lambda batch: step(batch).to("cpu"), optimizer, CUDA)


@pytest.mark.parametrize("target", [{"device": CUDA}, {"dtype": torch.float32}, {"device": CPU}])
def test_a_copy_is_made_where_one_is_asked_for(target):
    with simulated_cuda():
        made = torch.ones(3, device=target.get("device", CUDA))
        copied = made.to(**target, copy=True)
        assert copied.device == made.device
        copied.zero_()
        assert made.tolist() == [1, 1, 1]
        assert made.to(**target) is made


def test_an_array_of_a_device_tensor_is_refused():
    with simulated_cuda(), pytest.raises(TypeError, match="can't convert cuda:0"):
        torch.zeros(3, device=CUDA).numpy()


def test_the_captured_step_is_the_faster_one(monkeypatch):
    """Time is the number of launches: a graph is one, beside the copies of its inputs."""
    monkeypatch.setattr(step_module, "_STEPS_PER_WINDOW", 1)
    with simulated_cuda():
        _, optimizer, step = fresh(CUDA)
        noise = torch.zeros(6, 8 + 5, device=CUDA)
        example = replace(batch_of(0, CUDA), noise=noise)
        kind, _ = step_module._faster_of_eager_and_graph(step, optimizer, example)
    assert kind == "graph"
