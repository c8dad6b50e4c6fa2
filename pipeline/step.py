"""One step of training: plain, compiled, or captured as a CUDA graph; and its ceiling."""

import logging
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ood_heatmap.distributed import broadcast, world_size
from ood_heatmap.errors import UsageError
from ood_heatmap.heatmap import region_weight, target_heatmap, weighted_squared_error
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.feed import TrainingBatch

log = logging.getLogger(__name__)
Step = Callable[[TrainingBatch], Tensor]

WARM_UP = 3  # steps before a capture or a measurement: the first ones allocate and choose kernels
WINDOWS = 5
CEILING_SECONDS = 2.0


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 with float32 weights, or nothing."""
    half = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def adam(decoder: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Return the reference's optimiser."""
    device = next(decoder.parameters()).device
    on_gpu = device.type == "cuda"
    # a captured step reads the learning rate from where it is on the GPU
    lr = torch.tensor(config.lr, device=device) if on_gpu else config.lr
    return torch.optim.Adam(
        decoder.parameters(), lr, betas=(0.5, 0.999), fused=True, capturable=on_gpu
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step, without waiting for a GPU."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def lr_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: constant, or up in a tenth of the steps and then down.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017 (the cosine); Goyal et al., 2017 (the warm-up).
    """
    if config.schedule == "constant":
        return config.lr
    warm_up = max(1, num_steps // 10)
    if step < warm_up:
        return config.lr * (step + 1) / warm_up
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (num_steps - warm_up)))


def shared(decoder: nn.Module) -> nn.Module:
    """Return the decoder, or what keeps it equal in all processes."""
    if world_size() == 1:
        return decoder
    # batch norm's running statistics are those of all processes already
    return DistributedDataParallel(decoder, broadcast_buffers=False)


def training_step(
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    device: torch.device,
    *,
    compiled: bool = False,
) -> Step:
    """Return the function that takes one step and returns the loss, left on the device.

    The mean of the loss over processes is the loss of the whole batch, as is that of the gradients.
    When the device runs out of memory a batch goes through in halves from then on, whose gradients
    add up to the same. Not with batch norm, whose statistics would be those of a half; and not
    with several processes, of which the others would not know.

    Args:
        decoder: With ``channels_last`` weights.
        optimizer: Of its weights.
        config: Settings; ``batch_size`` is exact here.
        device: Where all of it is.
        compiled: Through ``torch.compile``; needs a C++ compiler.
    """
    can_halve = config.stack == "plain" and world_size() == 1

    def loss_of(batch: TrainingBatch) -> Tensor:
        with autocast(device, config):
            maps = [item.float() for item in batch.maps]
            heatmap = decoder(batch.features, batch.prediction, maps, batch.noise)
        target = target_heatmap(batch.heatmap, signed=config.target == "signed")
        share = len(target) * world_size() / config.batch_size  # not 1 where the split is uneven
        weight = region_weight(batch.heatmap, config.region_weight)
        return weighted_squared_error(heatmap, target, weight) * share

    run = torch.compile(loss_of, mode="reduce-overhead") if compiled else loss_of
    size = config.batch_size  # of what goes through the decoder at once

    def take(batch: TrainingBatch) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for part in batch.split(size):
            loss = run(part)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        optimizer.step()
        return total

    def step(batch: TrainingBatch) -> Tensor:
        nonlocal size
        while True:
            try:
                return take(batch)
            except torch.OutOfMemoryError:
                if not (can_halve and size > 1):
                    raise
            # out here the error no longer holds on to what the step has computed
            size = -(-min(size, len(batch.features)) // 2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning("out of memory on %s: steps go on in parts of %d images", device, size)

    return step


def captured(step: Step, optimizer: torch.optim.Optimizer, example: TrainingBatch) -> Step:
    """Return a step as one CUDA graph: a single launch instead of more than a hundred.

    The warm-up trains in earnest: put the weights back afterwards.

    Args:
        step: From ``training_step``.
        optimizer: Its optimiser, capturable.
        example: A batch of the only shape that the graph takes.

    Source: PyTorch's documentation, CUDA semantics, "Whole-network capture".
    """
    device = example.features.device
    static = example.clone()
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step(static)
    current.wait_stream(side)
    optimizer.zero_grad(set_to_none=True)  # so that the capture makes gradients in its own pool
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        loss = step(static)

    def replay(batch: TrainingBatch) -> Tensor:
        for ours, given in zip(static.tensors, batch.tensors, strict=True):
            ours.copy_(given)
        graph.replay()
        return loss

    return replay


def make_step(
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    example: TrainingBatch,
) -> tuple[str, Step]:
    """Return the kind of step that was asked for, or chosen, and the step.

    ``auto`` on a GPU is the faster of plain and graph. On the CPU it is plain, always: a choice by
    timing would make results depend on who else computes. There ``compiled`` is 1.3 times as fast
    (by CPU time, widths 256-128-64-32, batch 100), after a minute of compiling, and rounds
    otherwise. Takes steps: put the weights back afterwards.
    """
    device, kind = example.features.device, config.step
    plain = training_step(decoder, optimizer, config, device)
    if kind == "compiled":
        return kind, training_step(decoder, optimizer, config, device, compiled=True)
    alone_on_gpu = device.type == "cuda" and world_size() == 1
    if kind == "graph":
        if not alone_on_gpu:
            raise UsageError("--step graph is for one process on a GPU: use --step auto.")
        return kind, captured(plain, optimizer, example)
    if kind == "auto" and alone_on_gpu:
        return faster_of_plain_and_graph(plain, optimizer, example)
    return "plain", plain


def faster_of_plain_and_graph(
    plain: Step, optimizer: torch.optim.Optimizer, example: TrainingBatch
) -> tuple[str, Step]:
    """Return the faster one; plain, with a word, where the capture fails."""
    try:
        graph = captured(plain, optimizer, example)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        log.warning("the step cannot be captured (%s): going on with plain steps", reason)
        return "plain", plain
    steps = {"graph": graph, "plain": plain}
    seconds = {
        kind: float(np.median(time_windows(step, example, WINDOWS, 10)))
        for kind, step in steps.items()
    }
    kind = min(seconds, key=lambda name: seconds[name])
    log.info("step: graph %.3g ms, plain %.3g ms", *(1000 * seconds[name] for name in steps))
    return kind, steps[kind]


def snapshot(decoder: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a function that puts weights and optimiser back as they are now.

    In place, because a graph remembers where they are. It is what lets the steps of a warm-up and
    of a measurement be the real ones.
    """
    tensors = [*decoder.parameters(), *decoder.buffers()]
    before = [item.detach().clone() for item in tensors]
    moments = {
        weight: {name: item.clone() for name, item in state.items()}
        for weight, state in optimizer.state.items()
    }

    @torch.no_grad()
    def restore() -> None:
        for item, value in zip(tensors, before, strict=True):
            item.copy_(value)
        for weight, state in optimizer.state.items():
            for name, item in state.items():
                # Adam begins with zeros
                item.copy_(moments[weight][name]) if weight in moments else item.zero_()

    return restore


def measure_ceiling(step: Step, batch: TrainingBatch, size: int, num_steps: int) -> float:
    """Return the images/s of a step on one fixed batch without a feed, the median over windows.

    It takes ``CEILING_SECONDS`` or a tenth of the training, whichever is shorter.

    Args:
        step: The step that will train. Put the weights back afterwards.
        batch: On the device.
        size: Images of a batch, over all processes.
        num_steps: Of the training.
    """
    for _ in range(WARM_UP - 1):
        step(batch)
    (once,) = time_windows(step, batch, 1, 1)
    # every process must take equally many steps
    steps = broadcast(max(3, min(int(CEILING_SECONDS / once), num_steps // 10)))
    windows = min(WINDOWS, steps)
    seconds = float(np.median(time_windows(step, batch, windows, steps // windows)))
    return size / broadcast(seconds)


def time_windows(step: Step, batch: TrainingBatch, windows: int, steps: int) -> list[float]:
    """Return the seconds of a step in each window of several; a GPU is waited for at the end."""
    device = batch.features.device
    marks = [now(device)]
    for _ in range(windows):
        for _ in range(steps):
            step(batch)
        marks.append(now(device))
    if device.type != "cuda":
        return [(end - start) / steps for start, end in pairwise(marks)]
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 / steps for start, end in pairwise(marks)]


def now(device: torch.device) -> Any:
    """Return seconds; for a GPU an event: the moment when it has done what it was given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
