"""A fixed classifier: uint8 images in, penultimate features, logits and feature maps out."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ood_heatmap.checkpoints import hash_of_weights, load_weights, put_weights
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import Transform
from ood_heatmap.networks import build


@dataclass(frozen=True)
class Output:
    """What the classifier says of a batch.

    Args:
        features: ``(B, D)`` float32, the input of the last linear layer.
        logits: ``(B, L)`` float32.
        maps: Spatial feature maps ``(B, C, h, w)``, the deepest first; as many as were asked for.
    """

    features: Tensor
    logits: Tensor
    maps: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ClassifierConfig:
    """All that is needed to build a classifier again, but for its weights.

    Args:
        spec: ``cifar-resnet18``, ``torchvision/NAME``, ``timm/NAME``, ``file.py:function``,
            ``package.module:function``.
        num_classes: Classes of the network; its own default when None.
        transform: How images come to the network's input size.
        mean: Of each channel, in [0, 1] units; subtracted before the network.
        std: Of each channel, in [0, 1] units; divided by.
        head: Name of the last linear layer; found when "".
        num_maps: How many spatial feature maps to return, 0 to 3.
        autocast: Compute in bfloat16 where PyTorch deems it safe: faster, and other features.
    """

    spec: str
    num_classes: int | None
    transform: Transform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: str = ""
    num_maps: int = 0
    autocast: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        content = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        if not self.autocast:  # named only where it is used: runs from before it stay valid
            del content["autocast"]
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "ClassifierConfig":
        """Return what ``to_json`` made."""
        return ClassifierConfig(
            **{
                **content,
                "transform": Transform(**content["transform"]),
                "mean": tuple(content["mean"]),
                "std": tuple(content["std"]),
            }
        )


class Classifier(nn.Module):
    """A network with its normalisation, and hooks where its features pass.

    Args:
        network: Normalised float images ``(B, 3, H, W)`` to logits ``(B, L)``.
        config: The head's name is found when it gives none.

    Raises:
        OodHeatmapError: There is no last linear layer, or the logits are not ``(B, L)``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, config: ClassifierConfig) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        # up to twice as fast, also on CPUs
        self.network.to(memory_format=torch.channels_last)
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)
        probe = torch.zeros(2, 3, config.transform.size, config.transform.size)
        self.head = config.head or find_head(network, probe)
        self.map_names = find_maps(network, probe, config.num_maps) if config.num_maps else ()
        output = self(probe.to(torch.uint8))
        self.num_features, self.num_classes = output.features.shape[1], output.logits.shape[1]
        self.map_shapes = tuple(tuple(item.shape[1:]) for item in output.maps)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mean.device

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Output:
        """Classify uint8 images ``(B, 3, H, W)`` of the classifier's input size."""
        modules = dict(self.network.named_modules())
        seen: dict[str, Tensor] = {}
        wanted = {self.head: "input"} | dict.fromkeys(self.map_names, "output")
        with hooked(modules, wanted, seen), self.precision():
            logits = self.network(self.normalised(images))
        maps = tuple(seen[name].float() for name in self.map_names)
        return Output(seen[self.head].float(), logits.float(), maps)

    def precision(self) -> AbstractContextManager[None]:
        """Return the context in which the network computes."""
        if not self.config.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def normalised(self, images: Tensor) -> Tensor:
        """Return what the network itself takes: float images less mean, over deviation."""
        images = images.to(torch.float32, memory_format=torch.channels_last)
        return (images / 255 - self.mean) / self.std

    def fingerprint(self) -> dict[str, Any]:
        """Return what the results depend on: weights and code by their hash, and the settings."""
        place = self.config.spec.rpartition(":")[0]
        source = Path(place).read_bytes() if place.endswith(".py") else b""
        return {
            "weights": hash_of_weights(self.network),
            **self.config.to_json(),
            "spec": self.config.spec.rpartition("/")[2] if source else self.config.spec,
            "source": hashlib.sha256(source).hexdigest(),
            "num_classes": self.num_classes,
            "head": self.head,
        }


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], wanted: Mapping[str, str], seen: dict[str, Tensor]
) -> Iterator[None]:
    """Keep the input or output of the named modules of a forward pass in ``seen``."""

    def keep_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.__setitem__(name, inputs[0])

    def keep_output(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: seen.__setitem__(name, output)

    handles = [
        modules[name].register_forward_pre_hook(keep_input(name))
        if what == "input"
        else modules[name].register_forward_hook(keep_output(name))
        for name, what in wanted.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def find_head(network: nn.Module, probe: Tensor) -> str:
    """Return the name of the linear layer whose output is the logits.

    Raises:
        OodHeatmapError: There is none; lists the linear layers there are.
    """
    linear = {name: item for name, item in network.named_modules() if isinstance(item, nn.Linear)}
    seen: dict[str, Tensor] = {}
    with hooked(linear, dict.fromkeys(linear, "output"), seen):
        logits = network(probe)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise OodHeatmapError(
            f"the network returns {describe(logits)} for {tuple(probe.shape)}; logits must be (B, "
            f"L). "
            "Wrap it in a function that returns them alone."
        )
    heads = [name for name, output in seen.items() if torch.equal(output, logits)]
    if not heads:
        raise OodHeatmapError(
            "no linear layer of the network returns its logits (linear layers: "
            f"{', '.join(seen) or 'none'}). Name the last one with --head."
        )
    return heads[-1]


@torch.inference_mode()
def find_maps(network: nn.Module, probe: Tensor, count: int) -> tuple[str, ...]:
    """Return the modules with the last feature map of each resolution, the deepest first.

    Of all modules whose output has a resolution, the outermost are looked at, and of those the
    last: the end of a stage,
    not a layer inside the next one.
    """
    modules = {name: item for name, item in network.named_modules() if name}
    seen: dict[str, Tensor] = {}
    with hooked(modules, dict.fromkeys(modules, "output"), seen):
        network(probe)
    by_size: dict[tuple[int, ...], list[str]] = {}
    for name, output in seen.items():
        if (
            isinstance(output, Tensor)
            and output.ndim == 4
            and output.shape[2] * output.shape[3] > 1
        ):
            by_size.setdefault(tuple(output.shape[2:]), []).append(name)
    ends = []
    for _, names in sorted(by_size.items()):
        outermost = min(name.count(".") for name in names)
        ends.append([name for name in names if name.count(".") == outermost][-1])
    if len(ends) < count:
        raise OodHeatmapError(
            f"the network has spatial feature maps of {len(ends)} sizes, --feature-maps asks for "
            f"{count}: use --feature-maps {len(ends)}, and the same with train."
        )
    return tuple(ends[:count])


def describe(value: object) -> str:
    """Return a value's kind for a message."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def load_classifier(
    spec: str,
    *,
    weights: Path | None = None,
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: int | None = None,
    head: str = "",
    num_maps: int = 0,
    autocast: bool = False,
) -> Classifier:
    """Return the classifier that a user names, on the CPU.

    Args:
        spec: See ``ClassifierConfig``.
        weights: Its weights; without them the network's own.
        num_classes: Its classes; the network's default otherwise.
        mean: Of each channel in [0, 1] units; the network's own otherwise.
        std: Likewise.
        size: Pixels of its input; the network's own otherwise.
        head: Name of the last linear layer, found otherwise.
        num_maps: How many spatial feature maps it shall return.
        autocast: Compute in bfloat16 where PyTorch deems it safe.

    Raises:
        UsageError: The spec or an option is wrong.
        OodHeatmapError: The weights do not fit.
    """
    spec = with_whole_path(spec)
    network, transform, own_mean, own_std = build(spec, num_classes, pretrained=weights is None)
    if size is not None:
        transform = replace(transform, size=size, resize=0) if transform else Transform(size)
    if transform is None:
        raise UsageError(f"the input size of {spec} is not known: add --size PX.")
    config = ClassifierConfig(
        spec,
        num_classes,
        transform,
        mean or own_mean,
        std or own_std,
        head,
        num_maps,
        autocast,
    )
    if len(config.mean) != 3 or len(config.std) != 3 or min(config.std) <= 0:
        raise UsageError(
            f"--mean and --std are three numbers, std above 0; got {config.mean}, {config.std}."
        )
    if weights is not None:
        put_weights(network, load_weights(weights), weights)
    return finished(network, config)


def with_whole_path(spec: str) -> str:
    """Return a SPEC that means the same from any directory."""
    place, _, name = spec.rpartition(":")
    return f"{Path(place).resolve()}:{name}" if place.endswith(".py") else spec


def restore_classifier(config: ClassifierConfig, weights: Path) -> Classifier:
    """Return the classifier that a run was made with, from its own copy of the weights."""
    network, *_ = build(config.spec, config.num_classes, pretrained=False)
    put_weights(network, load_weights(weights), weights)
    return finished(network, config)


def finished(network: nn.Module, config: ClassifierConfig) -> Classifier:
    """Wrap a network; check its head's name and its number of classes."""
    linear = [name for name, item in network.named_modules() if isinstance(item, nn.Linear)]
    if config.head and config.head not in linear:
        raise UsageError(
            f"--head {config.head} is no linear layer; there are: {', '.join(linear)}."
        )
    try:
        classifier = Classifier(network, config)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OodHeatmapError(
            f"{config.spec} cannot classify images of {config.transform.size} px ({reason}). "
            "Check --size and --classifier."
        ) from error
    if config.num_classes is not None and classifier.num_classes != config.num_classes:
        raise UsageError(
            f"{config.spec} has {classifier.num_classes} classes, not --num-classes "
            f"{config.num_classes}."
        )
    return classifier


def check_finite(
    features: NDArray[np.float32], rows: NDArray[np.int64], names: Sequence[str]
) -> None:
    """Raise when the classifier returned NaN or infinity, and name the image."""
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        row = int(rows[int(finite.argmin())])
        raise OodHeatmapError(
            f"the classifier returns NaN or infinite features for {names[row]}. "
            "Check its weights, --mean and --std."
        )
