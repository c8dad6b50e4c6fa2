"""Find the head and the feature maps of a network with forward hooks and random pixels.

The head is the layer whose output the network returns. A feature map is an output that follows the
image: its grid grows with the image, or it changes where the image changes. The number of
dimensions is not enough: attention weights, the keys of each head, bias tables, outputs of
parametrizations and channels-last grids have four dimensions as well.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ood_heatmap.errors import OodHeatmapError

_Layout = Literal["channels first", "channels last", "tokens"]
# uint8 images (B, 3, S, S) to logits; raises OodHeatmapError if the network fails on them
Forward = Callable[[Tensor], Any]
# contrast between the halves of a map, see _contrast: 0.3 to 1 for maps of forty architectures;
# attention weights and windowed grids, where the image's rows lie along some axis, reach 0.13
_CERTAIN = 0.2
# enough if the grid has the size of a certain map; keys and misread grids are within 0.01 of 0
_PLAUSIBLE = 0.03


def random_pixels(count: int, size: int, seed: int = 0) -> Tensor:
    """Return random uint8 images ``(count, 3, size, size)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@contextmanager
def forward_hooks(
    modules: Mapping[str, nn.Module], record: Callable[[str, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Call ``record(name, inputs, output)`` after each forward pass of one of the modules."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _, inputs, output: record(name, inputs, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head_candidates(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that may be the head, by name: linear layers and 1x1 convolutions."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
    }


def find_head(network: nn.Module, forward: Forward, pixels: Tensor) -> str:
    """Find the layer whose output is the logits.

    Args:
        network: The network.
        forward: Runs the network.
        pixels: uint8 images of the network's input size.

    Returns:
        The layer's name.

    Raises:
        OodHeatmapError: There is no such layer.
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str, _: tuple[Any, ...], output: Tensor) -> None:
        # a 1x1 convolution on a pooled map is a linear layer
        if output[0].numel() == output.shape[1]:
            # a copy: later layers may modify it in place
            outputs[name] = output.flatten(1).clone()

    layers = head_candidates(network)
    with forward_hooks(layers, record):
        logits = forward(pixels)
    heads = [name for name, output in outputs.items() if torch.equal(output, logits)]
    if not heads:
        last = f"the last are {', '.join(list(layers)[-2:])}" if layers else "it has none"
        raise OodHeatmapError(
            f"no linear layer of the network returns its logits ({last}): something follows, such "
            "as a log_softmax, pooling, or the mean of several heads or views. Pass --classifier a "
            "function whose network ends in one linear layer."
        )
    return heads[-1]


@dataclass(frozen=True)
class FeatureMap:
    """An output of a network that is a spatial feature map.

    Args:
        name: Name of the module that returns it.
        layout: ``(B, C, h, w)``; ``(B, h, w, C)``; or ``(B, N, C)``, tokens of a square grid in
            row-major order, preceded by those without a position (class token, registers).
    """

    name: str
    layout: _Layout

    def __str__(self) -> str:
        return self.name if self.layout == "channels first" else f"{self.name} ({self.layout})"

    @staticmethod
    def parse(text: str) -> "FeatureMap":
        """Parse the output of ``str``."""
        name, _, layout = text.removesuffix(")").partition(" (")
        layouts = {known: known for known in get_args(_Layout)}
        return FeatureMap(name, layouts.get(layout, "channels first"))

    def to_grid(self, output: Tensor) -> Tensor:
        """Return the module's output as ``(B, C, h, w)``."""
        if self.layout == "channels first":
            return output
        if self.layout == "channels last":
            return output.permute(0, 3, 1, 2)
        side = math.isqrt(output.shape[1])
        return output[:, -side * side :].transpose(1, 2).reshape(output.shape[0], -1, side, side)


def find_maps(
    network: nn.Module, forward: Forward, size: int, count: int
) -> tuple[FeatureMap, ...]:
    """Find the last feature map of each resolution, deepest first.

    Among the modules whose output has a given resolution, the last of the outermost ones is chosen:
    the end of a stage, not a layer inside the next one.

    Args:
        network: The network.
        forward: Runs the network.
        size: Height and width of its input in pixels.
        count: Number of feature maps to return.

    Raises:
        OodHeatmapError: There are fewer.
    """
    by_size: dict[tuple[int, ...], list[FeatureMap]] = {}
    for feature_map, shape in _all_maps(network, forward, size).items():
        by_size.setdefault(tuple(shape[2:]), []).append(feature_map)
    ends = []
    for _, maps in sorted(by_size.items()):
        outermost = min(feature_map.name.count(".") for feature_map in maps)
        ends.append([item for item in maps if item.name.count(".") == outermost][-1])
    if len(ends) < count:
        raise OodHeatmapError(
            f"the network has spatial feature maps of {len(ends)} sizes, --feature-maps asks for "
            f"{count}: use --feature-maps {len(ends)}, also for train."
        )
    return tuple(ends[:count])


def _all_maps(network: nn.Module, forward: Forward, size: int) -> dict[FeatureMap, torch.Size]:
    """Return all feature maps with their shapes ``(B, C, h, w)``, in the order of computation."""
    modules = {name: module for name, module in network.named_modules() if name}
    grids = _grids(modules, forward, random_pixels(2, size))
    larger = 2 * size if size <= 64 else size + 64
    # a network with a fixed input size fails at some module: the modules before it are recorded
    larger_grids = _grids(modules, forward, random_pixels(3, larger))
    maps = {item for item in grids if _grows(grids[item], larger_grids.get(item), larger / size)}
    decided = {item.name for item in maps}
    undecided = {item.name: modules[item.name] for item in grids if item.name not in decided}
    contrasts = _contrasts(undecided, forward, size) if undecided else {}
    maps |= {item for item, contrast in contrasts.items() if contrast > _CERTAIN}
    # deep in a transformer each token depends on the whole image, and little on its own position
    sides = {grids[item][2:] for item in maps}
    maps |= {
        item
        for item, contrast in contrasts.items()
        if contrast > _PLAUSIBLE and grids[item][2:] in sides
    }
    return {item: shape for item, shape in grids.items() if item in maps}


def _grids(
    modules: Mapping[str, nn.Module], forward: Forward, pixels: Tensor
) -> dict[FeatureMap, torch.Size]:
    """Return every reading of a module's output as a feature map, and its shape."""
    grids: dict[FeatureMap, torch.Size] = {}

    def record(name: str, _: tuple[Any, ...], output: Any) -> None:
        for item, grid in _readings(name, output, len(pixels)):
            grids[item] = grid.shape

    with forward_hooks(modules, record), suppress(OodHeatmapError):
        forward(pixels)
    return grids


def _readings(name: str, output: Any, batch: int) -> Iterator[tuple[FeatureMap, Tensor]]:
    """Yield the readings of an output as a feature map with more than one row and column."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or len(output) != batch:
        return
    layouts: tuple[_Layout, ...] = ("channels first", "channels last")
    for layout in layouts if output.ndim == 4 else ("tokens",):
        item = FeatureMap(name, layout)
        grid = item.to_grid(output)
        if min(grid.shape[2:]) > 1:
            yield item, grid


def _grows(shape: torch.Size, larger: torch.Size | None, ratio: float) -> bool:
    """Return whether a grid scales with the input by ``ratio``, up to one row and column."""
    if larger is None or larger[1] != shape[1]:
        return False
    return all(
        after > before and abs(after - ratio * before) <= 1
        for before, after in zip(shape[2:], larger[2:], strict=True)
    )


def _contrasts(
    modules: Mapping[str, nn.Module], forward: Forward, size: int
) -> dict[FeatureMap, float]:
    """Return the contrast of the best reading of each module's output as a feature map.

    One quadrant of the image at a time is replaced; in a feature map the change is in the same
    quadrant.
    """
    image, other = random_pixels(2, size)
    pixels = image.repeat(5, 1, 1, 1)
    half = size // 2
    for number, (rows, columns) in enumerate(product((slice(half), slice(half, size)), repeat=2)):
        pixels[number + 1, :, rows, columns] = other[:, rows, columns]
    best: dict[str, tuple[float, FeatureMap]] = {}

    def record(name: str, _: tuple[Any, ...], output: Any) -> None:
        readings = []
        for item, grid in _readings(name, output, len(pixels)):
            contrast = _contrast(grid)
            # a class token after the others would shift the grid by one
            if item.layout == "tokens" and contrast < _contrast(item.to_grid(output.roll(1, 1))):
                contrast = 0.0
            readings.append((contrast, item))
        if readings:
            best[name] = max(readings, key=itemgetter(0))

    with forward_hooks(modules, record):
        forward(pixels)
    return {item: contrast for contrast, item in best.values()}


def _contrast(grid: Tensor) -> float:
    """Return how much more each half of a grid depends on its own half of the image.

    Args:
        grid: ``(5, C, h, w)`` for an image and its copies with the upper left, upper right, lower
            left and lower right quadrant replaced.

    Returns:
        The smaller of the contrasts between upper and lower, and left and right half, in [-1, 1].
    """
    grid = grid.float()
    change = (grid[1:] - grid[:1]).square().sum(dim=1)  # (4, h, w)
    # share of each quadrant in the change at each position; 0 where nothing changes
    upper_left, upper_right, lower_left, lower_right = (change / change.sum(dim=0)).nan_to_num()
    contrasts = []
    for dim, first, last in (
        (0, upper_left + upper_right, lower_left + lower_right),
        (1, upper_left + lower_left, upper_right + lower_right),
    ):
        half = first.shape[dim] // 2
        difference = (first - last).movedim(dim, 0)
        contrasts.append(float(difference[:half].mean() - difference[-half:].mean()) / 2)
    return min(contrasts)
