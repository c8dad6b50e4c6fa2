"""A fixed classifier: uint8 images in, penultimate features, logits and feature maps out."""

import copy
import logging
import math
import threading
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

from ood_heatmap.checkpoints import first_few, hash_weights, load_state_dict, load_weights
from ood_heatmap.checks import (
    check_deterministic,
    check_finite_outputs,
    check_head,
    check_logits,
    check_same_outputs,
    device_bound,
    rounding_bound,
)
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.images import Transform
from ood_heatmap.in_memory import find_network
from ood_heatmap.networks import build, is_in_memory, parse_user_code
from ood_heatmap.probing import (
    FeatureMap,
    find_head,
    find_maps,
    forward_hooks,
    head_candidates,
    random_pixels,
)
from ood_heatmap.projection import Projection
from ood_heatmap.user_code import UserCode, describe_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """Outputs of the classifier for a batch.

    Args:
        features: ``(B, D)`` float32, the input of the last linear layer.
        logits: ``(B, L)`` float32.
        maps: Spatial feature maps ``(B, C, h, w)`` float32, deepest first; projected to fewer
            channels if the classifier does, see ``Classifier.project``.
    """

    features: Tensor
    logits: Tensor
    maps: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> "Output":
        """Return the outputs on a device."""
        maps = tuple(item.to(device) for item in self.maps)
        return Output(self.features.to(device), self.logits.to(device), maps)


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything needed to rebuild a classifier, except its weights.

    Args:
        spec: ``cifar-resnet18``, ``torchvision/NAME``, ``timm/NAME``, ``file.py:function``,
            ``package.module:function``.
        num_classes: Number of classes; the network's default if None.
        transform: Resizes images to the network's input size.
        mean: Mean of each channel, in [0, 1]; subtracted from pixels in [0, 1].
        std: Standard deviation of each channel, in (0, 1]; the difference is divided by it.
        head: Name of the last linear layer; detected if "".
        num_maps: Number of spatial feature maps to return.
        autocast: Run the network under bfloat16 autocast, which changes the features.

    Raises:
        UsageError: ``mean`` or ``std`` are not three numbers in their range.
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
            problem = "are for pixels in [0, 1]: divide values for pixels from 0 to 255 by 255"
        elif min(self.std) == 0:
            problem = "must have std above 0"
        else:
            return
        raise UsageError(f"--mean and --std {problem}; got {self.mean} and {self.std}.")

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON-serializable values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "ClassifierConfig":
        """Parse the output of ``to_json``.

        Raises:
            DamagedCacheError: A field is missing, unknown, or of the wrong type.
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
    """Raise TypeError if a field of a dataclass does not have its declared type."""
    for name, hint in get_type_hints(type(settings)).items():
        value, origin = getattr(settings, name), get_origin(hint)
        kind = tuple if origin is tuple else hint
        fits = value in get_args(hint) if origin is Literal else isinstance(value, kind)
        if not fits:
            raise TypeError(f"{name} is {value!r:.40}")


class Classifier(nn.Module):
    """A network with its normalization, and hooks that read its features and feature maps.

    It is checked with random pixels: the head's output must be the logits, and outputs must be
    finite, deterministic and independent of the rest of the batch.

    Args:
        network: Maps normalized float images ``(B, 3, H, W)`` to logits ``(B, L)``.
        config: Configuration; the head is detected if it names none.
        maps: The feature maps to return; if None, ``config.num_maps`` are detected.
        code: The user code that made the network, with its sources; None for other networks.

    Raises:
        UsageError: The head is not a linear layer.
        OodHeatmapError: The network fails, or fails one of these checks.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        config: ClassifierConfig,
        maps: Sequence[FeatureMap] | None = None,
        code: UserCode | None = None,
    ) -> None:
        super().__init__()
        self.code = code
        self.network = network.eval().requires_grad_(False)
        self.config = config
        self._lock = threading.Lock()
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)
        self._to_float32()
        size = config.transform.size
        pixels = random_pixels(2, size)
        check_logits(config.spec, self._choose_memory_format(pixels))
        if config.head and config.head not in head_candidates(network):
            raise UsageError(
                f"--head {config.head} is not a linear layer; the last ones are "
                f"{first_few(list(head_candidates(network))[::-1])}."
            )
        self.head = config.head or find_head(network, self._run, pixels)
        if maps is None:
            maps = find_maps(network, self._run, size, config.num_maps) if config.num_maps else ()
        self.maps = tuple(maps)
        self._projected: tuple[str, ...] = ()
        with self._explaining():
            output = self._check_outputs(pixels)
        self.num_features, self.num_classes = output.features.shape[1], output.logits.shape[1]
        self.whole_shapes = tuple(tuple(item.shape[1:]) for item in output.maps)
        self.project({})

    def __reduce__(self) -> tuple[Any, ...]:
        # a class in a user's file, or made by a function of timm, cannot be imported by name
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        network = copy.deepcopy(self.network).cpu() if is_in_memory(self.config.spec) else None
        projections = {
            name: Projection(item.weight.cpu(), item.mean.cpu())
            for name, item in self.projections().items()
        }
        arguments = (self.config, state, self.maps, projections, self.code, network)
        return rebuild_classifier, arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> "Classifier":
        copied = Classifier.__new__(Classifier)
        memo[id(self)] = copied
        attributes = {name: value for name, value in vars(self).items() if name != "_lock"}
        vars(copied).update(copy.deepcopy(attributes, memo), _lock=threading.Lock())
        return copied

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.mean.device

    @property
    def map_names(self) -> tuple[str, ...]:
        """Modules whose outputs are the feature maps, with their layout if not (B, C, h, w)."""
        return tuple(map(str, self.maps))

    def project(self, projections: Mapping[str, Projection]) -> None:
        """Project feature maps from now on, given a projection by name of the map.

        Those without one stay as they are, also if they were projected before.
        """
        self._projected = tuple(name for name in self.map_names if name in projections)
        shapes = dict(zip(self.map_names, self.whole_shapes, strict=True))
        for number, name in enumerate(self._projected):
            # buffers, which move and are copied with the network; its own weights are stored
            for field in ("weight", "mean"):
                value = getattr(projections[name], field).to(self.device)
                self.register_buffer(f"projection_{field}_{number}", value, persistent=False)
            shapes[name] = (len(projections[name].weight), *shapes[name][1:])
        self.map_shapes = tuple(shapes.values())

    def projections(self) -> dict[str, Projection]:
        """Return the projections in use, by name of the feature map."""
        return {
            name: Projection(
                self.get_buffer(f"projection_weight_{number}"),
                self.get_buffer(f"projection_mean_{number}"),
            )
            for number, name in enumerate(self._projected)
        }

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Output:
        """Classify images of the classifier's input size.

        Threads take turns: the hooks of one pass would also record another.

        Args:
            images: ``(B, 3, H, W)`` uint8, or normalized float32.
        """
        modules = dict(self.network.named_modules())
        wanted = {name: modules[name] for name in (self.head, *(item.name for item in self.maps))}
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def record(name: str, arguments: tuple[Any, ...], output: Tensor) -> None:
            # copies: later layers may modify them in place
            if name == self.head:
                inputs[name] = arguments[0].flatten(1).clone()
            else:
                outputs[name] = output.clone()

        with self._lock, forward_hooks(wanted, record):
            logits = self._logits(images)
        maps = {str(item): item.to_grid(outputs[item.name]).float() for item in self.maps}
        for name, projection in self.projections().items():
            maps[name] = projection(maps[name])
        return Output(inputs[self.head].float(), logits.float(), tuple(maps.values()))

    def last_layer(self) -> nn.Linear:
        """Return the head as a linear layer; a copy if it is a 1x1 convolution."""
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
        """Compare the outputs of this restored classifier with those in the index.

        Weights, settings and the user's own sources are compared by hash. This check finds what no
        hash covers: the versions of libraries, data that the user's code reads, the hardware.

        Args:
            images: ``(n, 3, H, W)`` uint8, a few images of the index.
            features: ``(n, D)`` float32 features of these images.
            maps: ``(n, C, h, w)`` float16 for each feature map.
            versions: ``library_versions()`` when the index was made, to name what changed.

        Raises:
            StaleCacheError: The outputs differ by more than rounding on other hardware.
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
        """Return what the outputs depend on: hashes of weights and code, and the settings."""
        code = self.code or parse_user_code(self.config.spec)
        is_file = code is not None and code.module.endswith(".py")
        return {
            "weights": hash_weights(self.network),
            **self.config.to_json(),
            "spec": self.config.spec.rpartition("/")[2] if is_file else self.config.spec,
            "source": code.hash if code else "",
            "num_classes": self.num_classes,
            "head": self.head,
            "maps": list(self.map_names),
        }

    def _logits(self, images: Tensor) -> Any:
        """Return the output of the network for uint8 or normalized float images."""
        pixels = images.to(torch.float32, memory_format=self._memory_format)
        if not images.is_floating_point():
            pixels = (pixels / 255 - self.mean) / self.std
        with self._precision():
            return self.network(pixels)

    def _precision(self) -> AbstractContextManager[None]:
        """Return the autocast context of the network."""
        if not self.config.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @torch.inference_mode()
    def _run(self, pixels: Tensor) -> Tensor:
        """Return the logits of uint8 images.

        Raises:
            OodHeatmapError: The network fails, or does not return logits.
        """
        with self._explaining():
            logits = self._logits(pixels)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(pixels):
            is_tensor = isinstance(logits, Tensor)
            returned = f"shape {tuple(logits.shape)}" if is_tensor else type(logits).__name__
            raise OodHeatmapError(
                f"the network returns {returned} for {tuple(pixels.shape)}; logits must be (B, L). "
                "Wrap it in a network that returns only those."
            )
        return logits

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn any exception of the network into a one-line error."""
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
        """Convert weights of another precision to float32, the dtype of the images."""
        dtypes = [item.dtype for item in self.network.parameters() if item.is_floating_point()]
        if any(dtype != torch.float32 for dtype in dtypes):
            log.info("converting the weights of %s to float32", self.config.spec)
            self.network.float()

    def _choose_memory_format(self, pixels: Tensor) -> Tensor:
        """Choose the memory format of weights and images; return the logits of ``pixels``."""
        # up to twice as fast, also on CPUs
        self._memory_format = torch.channels_last
        self.network.to(memory_format=self._memory_format)
        try:
            return self._run(pixels)
        except OodHeatmapError:
            # a network that flattens its maps with view needs contiguous tensors
            self._memory_format = torch.contiguous_format
            self.network.to(memory_format=self._memory_format)
            return self._run(pixels)

    def _check_outputs(self, pixels: Tensor) -> Output:
        """Check the outputs for two images, and return them."""
        spec, bound = self.config.spec, rounding_bound(self.config.autocast)
        output: Output = self(torch.cat([pixels, pixels[:1]]))
        alone: Output = self(pixels[1:])
        check_finite_outputs(spec, output.logits, output.features, output.maps)
        with torch.inference_mode(), self._precision():
            logits = self.last_layer()(output.features)
        check_head(f"{self.head}(features) of {spec}", logits, output.logits, bound)
        check_deterministic(spec, output.features, alone.features, bound)
        return output


def load_classifier(
    spec: str,
    *,
    weights: Path | None = None,
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: int | None = None,
    transform: Transform | None = None,
    head: str = "",
    num_maps: int = 0,
    autocast: bool = False,
) -> Classifier:
    """Load a classifier by its spec, on the CPU.

    Code that the spec names is run, and trusted from now on, see ``user_code``.

    Args:
        spec: See ``ClassifierConfig``.
        weights: File with its weights; the library's pretrained weights if None.
        num_classes: Number of classes; the network's default if None.
        mean: Mean of each channel, for pixels in [0, 1]; the network's own if None.
        std: Standard deviation of each channel; the network's own if None.
        size: Height and width of its input in pixels; the network's own if None.
        transform: Size and crop of its input; the network's own if None.
        head: Name of the last linear layer; detected if "".
        num_maps: Number of spatial feature maps to return.
        autocast: Run the network under bfloat16 autocast.

    Raises:
        UsageError: The spec or an option is wrong.
        OodHeatmapError: The weights do not fit, or the network fails a check of ``Classifier``.
    """
    module, _, function = spec.rpartition(":")
    if module.endswith(".py"):
        # absolute, so that it does not depend on the working directory
        spec = f"{Path(module).resolve()}:{function}"
    code = parse_user_code(spec)
    if code is not None:
        code = code.keep()
    network, own_transform, own_mean, own_std = build(
        spec, num_classes, pretrained=weights is None, code=code
    )
    transform = transform or own_transform
    if size is not None:
        transform = replace(transform, size=size, resize=0) if transform else Transform(size)
    if transform is None:
        raise UsageError(f"the input size of {spec} is not known: add --size PX.")
    config = ClassifierConfig(
        spec, num_classes, transform, mean or own_mean, std or own_std, head, num_maps, autocast
    )
    classifier = _make_classifier(network, config, weights, code=code)
    if code is not None:
        code.remember()
    return classifier


def restore_classifier(
    config: ClassifierConfig,
    weights: Path,
    fingerprint: Mapping[str, Any] | None = None,
    num_maps: int | None = None,
    code: UserCode | None = None,
) -> Classifier:
    """Load the classifier of a run from the run's copy of its weights.

    Args:
        config: Configuration in the run.
        weights: The run's copy of the weights.
        fingerprint: Fingerprint in the run; not compared if None.
        num_maps: Number of spatial feature maps to return; that of the run if None.
        code: The run's copy of the user's code; what the SPEC names if None.

    Raises:
        StaleCacheError: The classifier has changed; the message names what differs. User code
            whose source has changed is not run.
        OodHeatmapError: The user's code is not trusted, see ``user_code``.
    """
    code = code or parse_user_code(config.spec)
    if code is not None:
        if fingerprint is not None:
            _check_same(config.spec, {"source": fingerprint.get("source")}, {"source": code.hash})
        code.require_trust()
    if is_in_memory(config.spec):
        network = find_network(config.spec, str((fingerprint or {}).get("weights", "")))
        state: Path | None = None
    else:
        network, *_ = build(config.spec, config.num_classes, pretrained=False, code=code)
        state = weights
    num_maps = config.num_maps if num_maps is None else num_maps
    maps = [FeatureMap.parse(text) for text in (fingerprint or {}).get("maps", ())][:num_maps]
    classifier = _make_classifier(
        network,
        replace(config, num_maps=num_maps),
        state,
        # detected again if the run has fewer
        maps if len(maps) == num_maps else None,
        code,
    )
    if fingerprint is not None:
        _check_same(config.spec, fingerprint, classifier.fingerprint())
    return classifier


def rebuild_classifier(
    config: ClassifierConfig,
    state: Mapping[str, Tensor],
    maps: Sequence[FeatureMap],
    projections: Mapping[str, Projection],
    code: UserCode | None,
    network: nn.Module | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> Classifier:
    """Rebuild a classifier from its weights in memory, on the CPU.

    Args:
        config: Its configuration.
        state: State dict of its network.
        maps: Its feature maps.
        projections: Projections of feature maps by name.
        code: The user's code that makes the network, if any.
        network: The network itself; made as the configuration says if None.
        fingerprint: What the classifier must be; with it, code runs only if the user trusts it.

    Raises:
        StaleCacheError: The classifier is another one than the fingerprint says.
        OodHeatmapError: The weights do not fit, or the code is not trusted.
    """
    if fingerprint is not None and code is not None:
        _check_same(config.spec, {"source": fingerprint.get("source")}, {"source": code.hash})
        code.require_trust()
    if network is None and is_in_memory(config.spec):
        network = find_network(config.spec, str((fingerprint or {}).get("weights", "")))
    elif network is None:
        network, *_ = build(config.spec, config.num_classes, pretrained=False, code=code)
        _initialize(network, config.transform.size)
        load_state_dict(network, state, Path("the classifier's weights"))
    classifier = Classifier(network, config, maps, code)
    classifier.project(projections)
    if fingerprint is not None:
        _check_same(config.spec, fingerprint, classifier.fingerprint())
    return classifier


def _initialize(network: nn.Module, size: int) -> None:
    """Give lazy layers their shapes from a first image; if that fails, Classifier reports it."""
    tensors = [*network.parameters(), *network.buffers()]
    if any(is_lazy(item) for item in tensors):
        with torch.no_grad(), suppress(Exception):
            network.eval()(random_pixels(1, size) / 255)


def _make_classifier(
    network: nn.Module,
    config: ClassifierConfig,
    weights: Path | None,
    maps: Sequence[FeatureMap] | None = None,
    code: UserCode | None = None,
) -> Classifier:
    """Load weights into a network and wrap it."""
    _initialize(network, config.transform.size)
    if weights is not None:
        load_state_dict(network, load_weights(weights), weights)
    classifier = Classifier(network, config, maps, code)
    if config.num_classes is not None and classifier.num_classes != config.num_classes:
        raise UsageError(
            f"{config.spec} has {classifier.num_classes} classes, not --num-classes "
            f"{config.num_classes}."
        )
    return classifier


def _check_same(spec: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise StaleCacheError if fingerprints differ, apart from the feature maps."""
    for name in sorted((before.keys() | now.keys()) - {"num_maps", "maps"}):
        if before.get(name) != now.get(name):
            raise StaleCacheError(
                f"{spec} is no longer the classifier that the run was made with: {name} was "
                f"{before.get(name)!s:.80}, now {now.get(name)!s:.80}. Run `ood-heatmap index` "
                "again with --overwrite."
            )
