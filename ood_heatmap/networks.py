"""Networks by name: those of the reference, torchvision, timm, and user code.

The networks of the reference are CIFAR ResNet-18, ResNet-50 for 64 pixels, and WRN-40-2. Names and
shapes of their parameters match its released checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import Transform
from ood_heatmap.user_code import UserCode, describe_error

# begins the SPEC of a network that was passed from Python
IN_MEMORY = "in-memory/"


class _ResidualBlock(nn.Module):
    """Convolutions with batch norm, and a shortcut.

    Args:
        kernels: Kernel size of each convolution; the first of size 3 has the stride.
        channels: Channels before, between and after the convolutions.
        stride: 1, or 2 to halve the map.
    """

    def __init__(self, kernels: Sequence[int], channels: Sequence[int], stride: int) -> None:
        super().__init__()
        self.depth = len(kernels)
        for number, (kernel, (before, after)) in enumerate(
            zip(kernels, pairwise(channels), strict=True), start=1
        ):
            step = stride if number == kernels.index(3) + 1 else 1
            convolution = nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", nn.BatchNorm2d(after))
        self.shortcut = nn.Sequential()
        if stride != 1 or channels[0] != channels[-1]:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels[0], channels[-1], 1, stride, bias=False),
                nn.BatchNorm2d(channels[-1]),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, h, w)`` to the block's channels and stride."""
        y = x
        for number in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self.depth:
                y = functional.relu(y)
        return functional.relu(y + self.shortcut(x))


class _ResNet(nn.Module):
    """A ResNet for small images.

    Args:
        depths: Number of blocks in each of the four stages.
        bottleneck: Use blocks of three convolutions with four times the channels, as in ResNet-50.
        num_classes: L.
        pooled: Add a max pool before the first stage, for 64-pixel images.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
    """

    def __init__(
        self, depths: Sequence[int], *, bottleneck: bool, num_classes: int, pooled: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(2) if pooled else nn.Identity()
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        before = 64
        for number, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), 1):
            after = 4 * width if bottleneck else width
            blocks = []
            for block in range(depth):
                channels = [before, *[width] * (len(kernels) - 1), after]
                stride = 2 if number > 1 and block == 0 else 1
                blocks.append(_ResidualBlock(kernels, channels, stride))
                before = after
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, L)`` of normalized images ``(B, 3, H, W)``."""
        x = self.pool(functional.relu(self.bn1(self.conv1(x))))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class _WideBlock(nn.Module):
    """Norm, ReLU and convolution, twice, and a shortcut; the second convolution has the stride."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, stride, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, before, h, w)`` to ``(B, after, h / stride, w / stride)``."""
        y = self.conv1(functional.relu(self.bn1(x)))
        y = self.conv2(functional.relu(self.bn2(y)))
        total: Tensor = y + self.shortcut(x)
        return total


class _WideResNet(nn.Module):
    """A wide ResNet for 32-pixel images.

    Args:
        depth: 6 n + 4 for n blocks per stage.
        widen: Factor on the channels 16, 32 and 64.
        num_classes: L.

    Source: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.
    """

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        for number, (before, after) in enumerate(pairwise(widths), start=1):
            first = _WideBlock(before, after, 1 if number == 1 else 2)
            rest = [_WideBlock(after, after, 1) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, L)`` of normalized images ``(B, 3, 32, 32)``."""
        x = self.conv1(x)
        for number in range(1, 4):
            x = self.get_submodule(f"layer{number}")(x)
        x = functional.relu(self.bn1(x))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def cifar_resnet18(num_classes: int = 10) -> nn.Module:
    """Return ResNet-18 for 32-pixel images: 512 features."""
    return _ResNet((2, 2, 2, 2), bottleneck=False, num_classes=num_classes)


def _cifar_resnet50_64px(num_classes: int = 200) -> nn.Module:
    """Return ResNet-50 for 64-pixel images: 2048 features."""
    return _ResNet((3, 4, 6, 3), bottleneck=True, num_classes=num_classes, pooled=True)


def _wrn_40_2(num_classes: int = 10) -> nn.Module:
    """Return WRN-40-2 for 32-pixel images: 128 features."""
    return _WideResNet(40, 2, num_classes)


@dataclass(frozen=True)
class _BuiltIn:
    """A network with its defaults; the reference uses the same normalization for all of them."""

    build: Callable[[int], nn.Module]
    num_classes: int
    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


_BUILT_IN = {
    "cifar-resnet18": _BuiltIn(cifar_resnet18, 10, 32),
    "cifar-resnet50-64px": _BuiltIn(_cifar_resnet50_64px, 200, 64),
    "wrn-40-2": _BuiltIn(_wrn_40_2, 10, 32),
}


# a network with its default transform, mean and std
_Built: TypeAlias = tuple[nn.Module, Transform | None, tuple[float, ...], tuple[float, ...]]


def build(
    spec: str, num_classes: int | None, *, pretrained: bool, code: UserCode | None = None
) -> _Built:
    """Build the network of a SPEC, and return it with its default transform, mean and std.

    Args:
        spec: See ``ClassifierConfig``.
        num_classes: Number of classes; the network's default if None.
        pretrained: Load the library's pretrained weights.
        code: The user code that the SPEC names, if any; found by the SPEC if None.

    Raises:
        UsageError: There is no such network, or it does not accept the arguments.
        OodHeatmapError: Its weights cannot be downloaded.
    """
    if spec in _BUILT_IN:
        return _build_own(spec, num_classes, pretrained)
    family, _, name = spec.partition("/")
    if family == "torchvision":
        return _build_torchvision(name, num_classes, pretrained)
    if family == "timm":
        return _build_timm(name, num_classes, pretrained)
    code = code or parse_user_code(spec)
    if code is not None:
        return _build_from_code(code, num_classes)
    raise UsageError(
        f"there is no classifier {spec!r}: use {', '.join(_BUILT_IN)}, "
        "torchvision/NAME, timm/NAME, path/to/file.py:function or package.module:function."
    )


def is_in_memory(spec: str) -> bool:
    """Return whether a SPEC names a network that was passed from Python."""
    is_name = spec not in _BUILT_IN and "/" not in spec and ":" not in spec
    return spec.startswith(IN_MEMORY) or is_name


def parse_user_code(spec: str) -> UserCode | None:
    """Return the user code named by a SPEC; None for networks of this package and of libraries."""
    module, colon, function = spec.rpartition(":")
    if not colon or spec.startswith(("torchvision/", "timm/")):
        return None
    return UserCode(module, function)


def _build_own(spec: str, num_classes: int | None, pretrained: bool) -> _Built:
    """Build a network of the reference."""
    if pretrained:
        raise UsageError(f"{spec} comes without weights: add --weights FILE.")
    entry = _BUILT_IN[spec]
    network = entry.build(num_classes or entry.num_classes)
    return network, Transform(entry.size), entry.mean, entry.std


def _build_torchvision(name: str, num_classes: int | None, pretrained: bool) -> _Built:
    """Build ``NAME`` or ``NAME:WEIGHTS`` of torchvision, with the transform of its weights."""
    from torchvision import models

    name, _, choice = name.partition(":")
    try:
        enum = models.get_model_weights(name)
        weights = enum[choice] if choice else enum["DEFAULT"]
    except (ValueError, KeyError) as error:
        raise UsageError(f"torchvision has no such classifier: {error}.") from error
    preset = weights.transforms()
    transform = Transform.from_torchvision(preset)
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    if not pretrained:
        arguments |= _arguments_of_pretrained(name, weights)
    try:
        network = models.get_model(name, weights=weights if pretrained else None, **arguments)
    except (OSError, RuntimeError) as error:
        raise OodHeatmapError(
            f"the weights {weights} cannot be downloaded ({error}). Add --weights FILE."
        ) from error
    except ValueError as error:
        raise UsageError(
            f"torchvision/{name}: {error} Add --weights FILE to use other classes."
        ) from error
    if name == "inception_v3":
        # torchvision itself does the same for GoogLeNet
        network.aux_logits, network.AuxLogits = False, None
    return network, transform, tuple(preset.mean), tuple(preset.std)


def _arguments_of_pretrained(name: str, weights: Any) -> dict[str, Any]:
    """Return the arguments that torchvision sets when it loads pretrained weights.

    Without them the same weights give a different network: GoogLeNet and Inception v3 normalize
    their input again, and the number of positions of a vision transformer depends on the image size
    of its weights.
    """
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True, "aux_logits": False, "init_weights": False}
    if name.startswith("vit_"):
        return {"image_size": weights.meta["min_size"][0]}
    if name.startswith("maxvit_"):
        return {"input_size": weights.meta["min_size"]}
    return {}


def _build_timm(name: str, num_classes: int | None, pretrained: bool) -> _Built:
    """Build ``NAME`` of timm, with its default transform."""
    try:
        import timm
        import timm.data
    except ImportError:
        raise UsageError("timm is not installed: pip install 'ood-heatmap[timm]'.") from None
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    try:
        network = timm.create_model(name, pretrained=pretrained, **arguments)
    # unknown names, missing packages and failed downloads each raise a different exception
    except Exception as error:
        remedy = "Add --weights FILE." if pretrained else "Check --classifier and --num-classes."
        raise OodHeatmapError(
            f"timm/{name} cannot be built ({describe_error(error)}). {remedy}"
        ) from error
    preset = timm.data.config.resolve_data_config({}, model=network)
    transform = Transform.from_timm(preset)
    return network, transform, tuple(preset["mean"]), tuple(preset["std"])


def _build_from_code(code: UserCode, num_classes: int | None) -> _Built:
    """Build the network of user code; its default input is pixels in [0, 1]."""
    network = code.make(num_classes)
    if not isinstance(network, nn.Module):
        raise UsageError(f"{code} returned {type(network).__name__}, not a torch.nn.Module.")
    size = getattr(network, "input_size", None)
    transform = Transform(size) if isinstance(size, int) else None
    return network, transform, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
