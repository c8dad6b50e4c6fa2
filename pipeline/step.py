"""The training step: eager, compiled, or replayed as a CUDA graph; and its throughput ceiling."""

import inspect
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ood_heatmap.devices import computes_in_bfloat16, is_out_of_memory
from ood_heatmap.distributed import broadcast, world_size
from ood_heatmap.errors import UsageError
from ood_heatmap.heatmap import region_weight, target_heatmap, weighted_squared_error
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.feed import TrainingBatch
from ood_heatmap.split_decoder import UNBALANCED, Balance, split_loss

log = logging.getLogger(__name__)
Step: TypeAlias = Callable[[TrainingBatch], Tensor]
StepKind: TypeAlias = Literal["eager", "compiled", "graph"]

# steps before a capture or a measurement: the first ones allocate and choose kernels
_WARM_UP = 3
_WINDOWS = 5
_STEPS_PER_WINDOW = 10
# a step is warm after this many calls, on a CPU or a GPU, of which none took less than this share
# of the fastest before: a compiled one compiles, then records CUDA graphs, in its first calls
_CPU_PATIENCE, _GPU_PATIENCE, _FASTER, _MAX_WARM_UP = 5, 20, 0.8, 60
_CEILING_SECONDS = 2.0
# before 2.13 the allocator could treat an invalidated capture as still in progress
_RECOVERS_FROM_FAILED_CAPTURE = torch.__version__ >= "2.13"


def training_step(
    loss_of: Callable[[TrainingBatch], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: TrainingBatch,
    micro_batch_size: int,
) -> Tensor:
    """Take one step and return the loss, left on the device.

    Args:
        loss_of: Computes the loss of a micro-batch, see ``_batch_loss``.
        optimizer: Optimizer of the decoder.
        batch: Batch of this rank.
        micro_batch_size: Images per forward pass of the decoder; gradients accumulate.
    """
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=batch.features.device)
    for micro_batch in batch.split(micro_batch_size):
        loss = loss_of(micro_batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    optimizer.step()
    return total


def _batch_loss(
    decoder: nn.Module,
    config: TrainConfig,
    batch: TrainingBatch,
    balance: Balance = UNBALANCED,
) -> Tensor:
    """Return the loss of a micro-batch, scaled as its share of the loss of the whole batch.

    Summed over micro-batches and averaged over ranks, as DistributedDataParallel averages
    gradients, it is the mean over all ``config.batch_size`` images for any split.
    """
    with _autocast(batch.features.device, config):
        maps = [item.float() for item in batch.maps]
        output = decoder(batch.features, batch.prediction, maps, batch.noise)
    share = len(batch.features) * world_size() / config.batch_size
    target = target_heatmap(batch.target, signed=config.target == "signed")
    if batch.presence is not None:
        return share * split_loss(output, batch.presence, target, config.region_weight, balance)
    weight = region_weight(batch.target, config.region_weight)
    return weighted_squared_error(output, target, weight) * share


def _autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 with float32 weights, or float32."""
    half = config.precision == "bfloat16" or (
        config.precision == "auto" and computes_in_bfloat16(device)
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def make_adam(decoder: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Return the optimizer of the reference: Adam with betas (0.5, 0.999)."""
    device = next(decoder.parameters()).device
    on_gpu = device.type == "cuda"
    # a CUDA graph reads the learning rate from GPU memory
    lr = torch.tensor(config.lr, device=device) if on_gpu else config.lr
    return torch.optim.Adam(
        decoder.parameters(), lr, betas=(0.5, 0.999), fused=True, capturable=on_gpu
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step, without a synchronisation with the GPU."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def lr_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: constant, or cosine with 10 % linear warm-up.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017 (the cosine); Goyal et al., 2017 (the warm-up).
    """
    if config.schedule == "constant":
        return config.lr
    warm_up = max(1, num_steps // 10)
    if step < warm_up:
        return config.lr * (step + 1) / warm_up
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (num_steps - warm_up)))


def wrap_ddp(decoder: nn.Module) -> nn.Module:
    """Wrap the decoder in DistributedDataParallel if there are several ranks."""
    if world_size() == 1:
        return decoder
    # the decoder's batch norm already computes its running statistics over all ranks
    arguments = inspect.signature(DistributedDataParallel).parameters
    # PyTorch 2.14 renames it and warns of its former name
    new, old = "forward_sync_buffers", "broadcast_buffers"
    options: dict[str, Any] = {new if new in arguments else old: False}
    # gradients are not copied from the exchanged buckets in every step
    return DistributedDataParallel(decoder, gradient_as_bucket_view=True, **options)


def make_step(
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    example: TrainingBatch,
    balance: Balance = UNBALANCED,
) -> tuple[StepKind, Step]:
    """Return the kind of step that ``config.step`` selects, and the step.

    ``auto`` on a GPU is the faster of eager and graph. On a CPU it is always eager: a choice by
    timing would make results depend on the load of the machine. ``compiled`` is 1.3 times as fast
    there (CPU time, widths 256-128-64-32, batch size 100) after a minute of compilation, and rounds
    differently.

    Updates the weights: restore them afterwards, see ``snapshot``.

    Raises:
        UsageError: This kind of step is not available here.
    """
    if config.step == "compiled":
        # compiled, the sums over all ranks in its batch norm are not what they are in eager steps
        if config.stack == "dcgan" and world_size() > 1:
            raise UsageError(
                "--step compiled with --stack dcgan is for one process: use --step auto."
            )
        return "compiled", _make_compiled_step(decoder, optimizer, config, example, balance)
    eager = _make_eager_step(decoder, optimizer, config, balance)
    on_gpu, num_ranks = example.features.device.type == "cuda", world_size()
    single_gpu = on_gpu and num_ranks == 1
    if config.step == "graph":
        if not single_gpu:
            raise UsageError("--step graph is for one process on a GPU: use --step auto.")
        return "graph", _capture_or_usage_error(eager, optimizer, example)
    # a choice by timing is not deterministic
    if config.step == "auto" and single_gpu and not config.deterministic:
        kind, step = _faster_of_eager_and_graph(eager, optimizer, example)
        # the step that was not chosen still has gradients and cached blocks
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return kind, step
    if on_gpu and num_ranks > 1:
        log.info(
            "step: eager (a CUDA graph is for one process, so one GPU alone may train faster); "
            "each of %d GPUs takes %d images of --batch-size %d: a larger one uses them better",
            *(num_ranks, config.batch_size // num_ranks, config.batch_size),
        )
    return "eager", eager


def _make_eager_step(
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    balance: Balance = UNBALANCED,
    *,
    compiled: bool = False,
) -> Step:
    """Return a step without a CUDA graph, with the loss through ``torch.compile`` if ``compiled``.

    Halves its micro-batches on out-of-memory if that does not change the gradients: not with batch
    norm, whose statistics would be those of half a batch, and not with several ranks, since the
    others would not halve.

    Args:
        decoder: Decoder with ``channels_last`` weights.
        optimizer: Optimizer of its weights.
        config: Settings; ``batch_size`` is the actual one.
        balance: Weights of ID and OOD images in the loss of the image head.
        compiled: Use ``torch.compile``, which needs a C++ compiler.
    """

    def loss_of(batch: TrainingBatch) -> Tensor:
        return _batch_loss(decoder, config, batch, balance)

    run = torch.compile(loss_of, mode="reduce-overhead") if compiled else loss_of
    step = partial(training_step, run, optimizer)
    if config.stack != "dcgan" and world_size() == 1:
        return _halve_on_out_of_memory(step, config.batch_size)
    return partial(step, micro_batch_size=config.batch_size)


def _halve_on_out_of_memory(
    step: Callable[[TrainingBatch, int], Tensor], micro_batch_size: int
) -> Step:
    """Wrap a step so that its micro-batch size is halved on out-of-memory.

    It is not halved inside a capture, where no memory can be freed: the error ends the capture.
    """
    size = micro_batch_size

    def halving_step(batch: TrainingBatch) -> Tensor:
        nonlocal size
        device = batch.features.device
        while True:
            try:
                return step(batch, size)
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error) or _is_capturing(device):
                    raise
            # outside of the except block the error no longer holds the activations
            size = -(-min(size, len(batch.features)) // 2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning("out of memory on %s: micro-batch size reduced to %d images", device, size)

    return halving_step


def _is_capturing(device: torch.device) -> bool:
    """Return whether the current stream of a device is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _make_compiled_step(
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    example: TrainingBatch,
    balance: Balance,
) -> Step:
    """Return a compiled step after a first run, which compiles it.

    Raises:
        UsageError: ``torch.compile`` fails.
    """
    step = _make_eager_step(decoder, optimizer, config, balance, compiled=True)
    try:
        step(example)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split("\n")[:2])
        raise UsageError(f"torch.compile failed ({reason}): use --step eager.") from error
    return step


def _capture_graph(step: Step, optimizer: torch.optim.Optimizer, example: TrainingBatch) -> Step:
    """Capture a step as one CUDA graph: a single launch instead of more than a hundred.

    Warm-up steps update the weights; restore them afterwards.

    Args:
        step: See ``_make_eager_step``.
        optimizer: Its optimizer, capturable.
        example: A batch of the only shape that the graph accepts.

    Source: PyTorch's documentation, CUDA semantics, "Whole-network capture".
    """
    device = example.features.device
    static = example.clone()
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step(static)
    current.wait_stream(side)
    # so that the capture allocates the gradients in the graph's own memory pool
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    # the outer context restores the current stream also if the end of the capture raises
    with torch.cuda.stream(current), torch.cuda.graph(graph, stream=side):
        loss = step(static)

    def replay(batch: TrainingBatch) -> Tensor:
        for static_tensor, tensor in zip(static.tensors, batch.tensors, strict=True):
            static_tensor.copy_(tensor)
        graph.replay()
        return loss

    return replay


def _capture_or_usage_error(
    step: Step, optimizer: torch.optim.Optimizer, example: TrainingBatch
) -> Step:
    """Return the captured step, see ``_capture_graph``.

    Raises:
        UsageError: The step cannot be captured.
    """
    try:
        return _capture_graph(step, optimizer, example)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"the step cannot be captured ({_first_line(error)}): use --step eager."
        ) from error


def _faster_of_eager_and_graph(
    eager: Step, optimizer: torch.optim.Optimizer, example: TrainingBatch
) -> tuple[StepKind, Step]:
    """Return the faster step; eager, with a warning, if the capture fails.

    Raises:
        UsageError: The capture failed in a way that this version of PyTorch does not recover from.
    """
    try:
        capture = _capture_graph if _RECOVERS_FROM_FAILED_CAPTURE else _capture_or_usage_error
        graph = capture(eager, optimizer, example)
    except RuntimeError as error:
        reason = _first_line(error)
        log.warning("the step cannot be captured (%s): falling back to eager steps", reason)
        return "eager", eager
    eager_seconds, graph_seconds = (
        float(np.median(_time_windows(step, example, _WINDOWS, _STEPS_PER_WINDOW)))
        for step in (eager, graph)
    )
    log.info("step: graph %.3g ms, eager %.3g ms", 1000 * graph_seconds, 1000 * eager_seconds)
    return ("graph", graph) if graph_seconds < eager_seconds else ("eager", eager)


def _first_line(error: BaseException) -> str:
    """Return the first line of the original error: the end of a failed capture raises another."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return str(error).partition("\n")[0]


def snapshot(decoder: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a function that restores the current weights and optimizer state.

    They are restored in place, because a CUDA graph holds their addresses. Warm-up and measurement
    can then run the real step.
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
                # the initial state of Adam is zeros
                item.copy_(moments[weight][name]) if weight in moments else item.zero_()

    return restore


def measure_ceiling(step: Step, batch: TrainingBatch, size: int, num_steps: int) -> float:
    """Measure the images/s of a step on one fixed batch without a feed, the best of some windows.

    Takes 2 seconds or a tenth of the training, whichever is shorter, after a warm-up. Updates the
    weights: restore them afterwards.

    Args:
        step: The training step.
        batch: A batch on the device.
        size: Batch size over all ranks.
        num_steps: Number of steps of the training.
    """
    seconds_per_step = _warm_up(step, batch)
    steps = max(3, min(int(_CEILING_SECONDS / seconds_per_step), num_steps // 10))
    windows = min(_WINDOWS, steps)
    return size / broadcast(min(_time_windows(step, batch, windows, steps // windows)))


def _warm_up(step: Step, batch: TrainingBatch) -> float:
    """Run a step until it becomes no faster, and return the seconds of the fastest."""
    patience = _CPU_PATIENCE if batch.features.device.type == "cpu" else _GPU_PATIENCE
    fastest, last_faster = math.inf, 0
    for number in range(_MAX_WARM_UP):
        # all ranks must take the same number of steps
        seconds = broadcast(_time_windows(step, batch, 1, 1)[0])
        if seconds < _FASTER * fastest:
            last_faster = number
        fastest = min(fastest, seconds)
        if number - last_faster == patience:
            break
    return fastest


def _time_windows(step: Step, batch: TrainingBatch, windows: int, steps: int) -> list[float]:
    """Return the seconds per step in each window; synchronises with a GPU only at the end."""
    device = batch.features.device
    marks = [_timestamp(device)]
    for _ in range(windows):
        for _ in range(steps):
            step(batch)
        marks.append(_timestamp(device))
    if device.type != "cuda":
        return [(end - start) / steps for start, end in pairwise(marks)]
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 / steps for start, end in pairwise(marks)]


def _timestamp(device: torch.device) -> Any:
    """Return a timestamp: seconds on a CPU, a recorded event on a GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
