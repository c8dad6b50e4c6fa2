"""A fixed classifier: uint8 images in, penultimate features, logits and feature maps out."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ood_heatmap.checkpoints import first_few, hash_of_weights, load_weights, put_weights
from ood_heatmap.checks import (
    check_finite_outputs,
    check_head,
    check_logits,
    check_repeatable,
    check_same_outputs,
    device_bound,
    rounding_bound,
)
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.images import Transform
from ood_heatmap.networks import build, parse_user_code
from ood_heatmap.probing import (
    FeatureMap,
    find_head,
    find_maps,
    last_layers,
    random_pixels,
    watching,
)
from ood_heatmap.user_code import describe_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """What the classifier returns for a batch.

    Args:
        features: ``(B, D)`` float32, the input of the last linear layer.
        logits: ``(B, L)`` float32.
        maps: Spatial feature maps ``(B, C, h, w)`` float32, the deepest first; as many as were
            asked for.
    """

    features: Tensor
    logits: Tensor
    maps: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ClassifierConfig:
    """All that is needed to build a classifier again, apart from its weights.

    Args:
        spec: ``cifar-resnet18``, ``torchvision/NAME``, ``timm/NAME``, ``file.py:function``,
            ``package.module:function``.
        num_classes: Classes of the network; its own default when None.
        transform: Brings images to the network's input size.
        mean: Of each channel, in [0, 1]; subtracted from pixels in [0, 1].
        std: Of each channel, in (0, 1]; the difference is divided by it.
        head: Name of the last linear layer; found when "".
        num_maps: Number of spatial feature maps to return.
        autocast: Run the network under bfloat16 autocast, which changes the features.

    Raises:
        UsageError: ``mean`` or ``std`` are not three numbers of that range.
    """

    spec: str
    num_classes: int | None
    transform: Transform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: str = ""
    num_maps: int = 0
    autocast: bool = False

    def __post_init__(self) -> None:
        values = [*self.mean, *self.std]
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, values)):
            problem = "must be three finite numbers each"
        elif max(values) > 1 or min(values) < 0:
            problem = "are of pixels in [0, 1]: divide values of the 0 to 255 convention by 255"
        elif min(self.std) == 0:
            problem = "must have std above 0"
        else:
            return
        raise UsageError(f"--mean and --std {problem}; got {self.mean} and {self.std}.")

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "ClassifierConfig":
        """Return what ``to_json`` made.

        Raises:
            DamagedCacheError: A field is missing, unknown, or of another type.
        """
        try:
            transform = Transform(**content["transform"])
            mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
            arguments = {**content, "transform": transform, "mean": mean, "std": std}
            config = ClassifierConfig(**arguments)
            _check_types(transform)
            _check_types(config)
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise DamagedCacheError(
                f"the run's description of its classifier is damaged ({error}). "
                "Run `ood-heatmap index` again with --overwrite."
            ) from error
        return config


def _check_types(settings: Any) -> None:
    """Raise TypeError when a field of a dataclass does not have the type it is declared with."""
    for name, hint in get_type_hints(type(settings)).items():
        value, origin = getattr(settings, name), get_origin(hint)
        kind = tuple if origin is tuple else hint
        fits = value in get_args(hint) if origin is Literal else isinstance(value, kind)
        if not fits:
            raise TypeError(f"{name} is {value!r:.40}")


class Classifier(nn.Module):
    """A network with its normalization, and hooks that read its features and feature maps.

    What it returns can be relied on: random pixels have shown that the head's output is the
    logits, that nothing is random or depends on the rest of a batch, and that all is finite.

    Args:
        network: Normalized float images ``(B, 3, H, W)`` to logits ``(B, L)``.
        config: The head's name is found when it gives none.
        maps: The feature maps to return; ``config.num_maps`` of them are found when None.

    Raises:
        UsageError: The head is not a linear layer.
        OodHeatmapError: The network fails, or one of the above does not hold.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        config: ClassifierConfig,
        maps: Sequence[FeatureMap] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)
        self._to_float32()
        size = config.transform.size
        pixels = random_pixels(2, size)
        check_logits(config.spec, self._choose_memory_format(pixels))
        if config.head and config.head not in last_layers(network):
            raise UsageError(
                f"--head {config.head} is not a linear layer; the last ones are "
                f"{first_few(list(last_layers(network))[::-1])}."
            )
        self.head = config.head or find_head(network, self._run, pixels)
        if maps is None:
            maps = find_maps(network, self._run, size, config.num_maps) if config.num_maps else ()
        self.maps = tuple(maps)
        with self._explaining():
            output = self._check_outputs(pixels)
        self.num_features, self.num_classes = output.features.shape[1], output.logits.shape[1]
        self.map_shapes = tuple(tuple(item.shape[1:]) for item in output.maps)

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.mean.device

    @property
    def map_names(self) -> tuple[str, ...]:
        """The modules whose outputs are the feature maps, with their layout if not (B, C, h, w)."""
        return tuple(map(str, self.maps))

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Output:
        """Classify uint8 images ``(B, 3, H, W)`` of the classifier's input size."""
        modules = dict(self.network.named_modules())
        wanted = {name: modules[name] for name in (self.head, *(item.name for item in self.maps))}
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def see(name: str, arguments: tuple[Any, ...], output: Tensor) -> None:
            # copies: later layers may work in place
            if name == self.head:
                inputs[name] = arguments[0].flatten(1).clone()
            else:
                outputs[name] = output.clone()

        with watching(wanted, see):
            logits = self._logits(images)
        maps = tuple(item.to_grid(outputs[item.name]).float() for item in self.maps)
        return Output(inputs[self.head].float(), logits.float(), maps)

    def last_layer(self) -> nn.Linear:
        """Return the head as a linear layer; a copy where it is a 1x1 convolution."""
        layer = self.network.get_submodule(self.head)
        if isinstance(layer, nn.Linear):
            return layer
        weight = self.network.get_parameter(f"{self.head}.weight").flatten(1)
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        bias = layer.bias
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias) if isinstance(bias, Tensor) else linear.bias.zero_()
        return linear.requires_grad_(False)

    def check_same_outputs(
        self,
        images: NDArray[np.uint8],
        features: NDArray[np.float32],
        maps: Sequence[NDArray[np.float16]] = (),
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Compare what this restored classifier returns with what the index holds.

        Weights, settings and the user's own sources are compared by their hashes. This finds what
        no hash holds: another version of a library, data that the user's code reads, the processor.

        Args:
            images: ``(n, 3, H, W)`` uint8 of the index, a few.
            features: ``(n, D)`` float32 of these images.
            maps: ``(n, C, h, w)`` float16 of each feature map of these images.
            versions: ``library_versions()`` when the index was made, to name what changed.

        Raises:
            StaleCacheError: The features or maps differ by more than rounding on other hardware.
        """
        output: Output = self(torch.from_numpy(images).to(self.device))
        check_same_outputs(
            self.config.spec,
            {"features": output.features, **dict(zip(self.map_names, output.maps, strict=True))},
            [features, *maps],
            device_bound(self.config.autocast),
            versions or {},
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return what the results depend on: weights and code by their hash, and the settings."""
        code = parse_user_code(self.config.spec)
        is_file = code is not None and code.place.endswith(".py")
        return {
            "weights": hash_of_weights(self.network),
            **self.config.to_json(),
            "spec": self.config.spec.rpartition("/")[2] if is_file else self.config.spec,
            "source": code.hash if code else "",
            "num_classes": self.num_classes,
            "head": self.head,
            "maps": list(self.map_names),
        }

    def _logits(self, images: Tensor) -> Any:
        """Return what the network returns for uint8 images."""
        pixels = images.to(torch.float32, memory_format=self._memory_format)
        with self._precision():
            return self.network((pixels / 255 - self.mean) / self.std)

    def _precision(self) -> AbstractContextManager[None]:
        """Return the context in which the network computes."""
        if not self.config.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @torch.inference_mode()
    def _run(self, pixels: Tensor) -> Tensor:
        """Return the logits of random pixels.

        Raises:
            OodHeatmapError: The network cannot take them, or returns something else.
        """
        with self._explaining():
            logits = self._logits(pixels)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(pixels):
            is_tensor = isinstance(logits, Tensor)
            returned = f"shape {tuple(logits.shape)}" if is_tensor else type(logits).__name__
            raise OodHeatmapError(
                f"the network returns {returned} for {tuple(pixels.shape)}; logits must be (B, L). "
                "Wrap it in a network that returns them alone."
            )
        return logits

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn whatever a network raises into one line."""
        try:
            yield
        except OodHeatmapError:
            raise
        except Exception as error:
            raise OodHeatmapError(
                f"{self.config.spec} cannot classify images of {self.config.transform.size} px "
                f"({describe_error(error)}). Check --size and --classifier."
            ) from error

    def _to_float32(self) -> None:
        """Convert weights of another precision, which images are not given in."""
        weights = [item.dtype for item in self.network.parameters() if item.is_floating_point()]
        if any(dtype != torch.float32 for dtype in weights):
            log.info("weights of %s are converted to float32", self.config.spec)
            self.network.float()

    def _choose_memory_format(self, pixels: Tensor) -> Tensor:
        """Choose the memory format of weights and images; return the logits of pixels."""
        # up to twice as fast, also on CPUs
        self._memory_format = torch.channels_last
        self.network.to(memory_format=self._memory_format)
        try:
            return self._run(pixels)
        except OodHeatmapError:
            # a network that flattens its maps with view takes contiguous ones alone
            self._memory_format = torch.contiguous_format
            self.network.to(memory_format=self._memory_format)
            return self._run(pixels)

    def _check_outputs(self, pixels: Tensor) -> Output:
        """Check on two images that what is returned can be relied on, and return it."""
        spec, bound = self.config.spec, rounding_bound(self.config.autocast)
        output: Output = self(torch.cat([pixels, pixels[:1]]))
        alone: Output = self(pixels[1:])
        check_finite_outputs(spec, output.logits, output.features, output.maps)
        with torch.inference_mode(), self._precision():
            logits = self.last_layer()(output.features)
        check_head(f"{self.head}(features) of {spec}", logits, output.logits, bound)
        check_repeatable(spec, output.features, alone.features, bound)
        return output


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
    """Load the classifier that a user names, on the CPU.

    Code that the spec names is run, and trusted from now on: see ``user_code``.

    Args:
        spec: See ``ClassifierConfig``.
        weights: Its weights; those that the network comes with when None.
        num_classes: Number of classes; the network's default when None.
        mean: Of each channel, of pixels in [0, 1]; the network's own when None.
        std: Likewise.
        size: Pixels of its input; the network's own when None.
        head: Name of the last linear layer; found when "".
        num_maps: Number of spatial feature maps to return.
        autocast: Run the network under bfloat16 autocast.

    Raises:
        UsageError: The spec or an option is wrong.
        OodHeatmapError: The weights do not fit, or the network cannot be used, see ``Classifier``.
    """
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        # means the same from any directory
        spec = f"{Path(place).resolve()}:{name}"
    network, transform, own_mean, own_std = build(spec, num_classes, pretrained=weights is None)
    if size is not None:
        transform = replace(transform, size=size, resize=0) if transform else Transform(size)
    if transform is None:
        raise UsageError(f"the input size of {spec} is not known: add --size PX.")
    config = ClassifierConfig(
        spec, num_classes, transform, mean or own_mean, std or own_std, head, num_maps, autocast
    )
    classifier = _make_classifier(network, config, weights)
    code = parse_user_code(spec)
    if code is not None:
        code.remember()
    return classifier


def restore_classifier(
    config: ClassifierConfig,
    weights: Path,
    fingerprint: Mapping[str, Any] | None = None,
    num_maps: int | None = None,
) -> Classifier:
    """Load the classifier that a run was made with, from its own copy of the weights.

    Args:
        config: Of the classifier.
        weights: The run's copy.
        fingerprint: Of the classifier that the run was made with; not compared when None.
        num_maps: Number of spatial feature maps to return; as many as the run's when None.

    Raises:
        StaleCacheError: It is another classifier by now; names what differs. The user's code has
            not run when its source differs.
        OodHeatmapError: The user's code is not trusted, see ``user_code``.
    """
    code = parse_user_code(config.spec)
    if code is not None:
        if fingerprint is not None:
            _check_same(config.spec, {"source": fingerprint.get("source")}, {"source": code.hash})
        code.require_trust()
    network, *_ = build(config.spec, config.num_classes, pretrained=False)
    num_maps = config.num_maps if num_maps is None else num_maps
    maps = [FeatureMap.parse(text) for text in (fingerprint or {}).get("maps", ())][:num_maps]
    classifier = _make_classifier(
        network,
        replace(config, num_maps=num_maps),
        weights,
        # those of the run, unless it has fewer
        maps if len(maps) == num_maps else None,
    )
    if fingerprint is not None:
        _check_same(config.spec, fingerprint, classifier.fingerprint())
    return classifier


def _make_classifier(
    network: nn.Module,
    config: ClassifierConfig,
    weights: Path | None,
    maps: Sequence[FeatureMap] | None = None,
) -> Classifier:
    """Put weights into a network and wrap it."""
    tensors = [*network.parameters(), *network.buffers()]
    if any(is_lazy(item) for item in tensors):
        # lazy layers get their shapes from a first image; what it brings up is said by Classifier
        with torch.no_grad(), suppress(Exception):
            network.eval()(random_pixels(1, config.transform.size) / 255)
    if weights is not None:
        put_weights(network, load_weights(weights), weights)
    classifier = Classifier(network, config, maps)
    if config.num_classes is not None and classifier.num_classes != config.num_classes:
        raise UsageError(
            f"{config.spec} has {classifier.num_classes} classes, not --num-classes "
            f"{config.num_classes}."
        )
    return classifier


def _check_same(spec: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise StaleCacheError when fingerprints differ, but for the number of feature maps."""
    for name in sorted((before.keys() | now.keys()) - {"num_maps", "maps"}):
        if before.get(name) != now.get(name):
            raise StaleCacheError(
                f"the run was made with another classifier than {spec} is now: {name} was "
                f"{before.get(name)!s:.80}, is {now.get(name)!s:.80}. Run `ood-heatmap index` "
                "again with --overwrite."
            )
