"""Settings of every command: type, default, bounds, choices and help of each option, written once.

``ood_heatmap.options`` makes the options of the command line from these dataclasses, and the
fingerprint of a stage takes all fields that affect its result. Imports nothing heavy: ``--help``
reads this module.
"""

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from ood_heatmap.cores import num_cores
from ood_heatmap.errors import UsageError

Group: TypeAlias = Literal[
    "Data", "Classifier", "Pairing", "Decoder", "Training", "Evaluation", "Speed", "Output", "Other"
]
Rgb: TypeAlias = tuple[float, float, float]
# where click's context keeps the command line, for the manifests of stages
COMMAND_LINE = "ood_heatmap.command"


@dataclass(frozen=True)
class Option:
    """How a setting appears on the command line, and whether the result depends on it.

    Args:
        help: A sentence that stands alone.
        group: Heading under which ``--help`` lists it.
        min, max: Bounds, inclusive unless ``min_open`` or ``max_open``.
        flag: Name of the option; by default the field's, with dashes.
        metavar: Placeholder for the value in the help.
        unset: What None means, shown as the default.
        path: Whether a path is a file, a folder, or the directory of an existing run.
        affects_result: False if the result of the stage does not depend on it, such as the number
            of threads. All other settings are part of the stage's fingerprint.
    """

    help: str
    group: Group
    min: float | None = None
    max: float | None = None
    min_open: bool = False
    max_open: bool = False
    flag: str = ""
    metavar: str | None = None
    unset: str = ""
    path: Literal["file", "folder", "run"] = "folder"
    affects_result: bool = True


@dataclass(frozen=True)
class Field:
    """One field of a settings dataclass, with the option that it becomes."""

    name: str
    type: Any
    default: Any
    option: Option | None

    @property
    def flag(self) -> str:
        """The name of its option."""
        named = self.option.flag if self.option else ""
        return named or "--" + self.name.replace("_", "-")

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING

    def check(self, value: Any) -> None:
        """Raise ``UsageError`` if a value is not a choice, not finite or out of bounds."""
        if get_origin(self.type) is Literal and value not in get_args(self.type):
            choices = ", ".join(get_args(self.type))
            raise UsageError(f"{self.flag} must be one of {choices}, got {value!r}.")
        if self.option is None or not isinstance(value, int | float) or isinstance(value, bool):
            return
        low, high = self.option.min, self.option.max
        bounds = []
        if low is not None:
            bounds.append(f"above {low}" if self.option.min_open else f"at least {low}")
        if high is not None:
            bounds.append(f"below {high}" if self.option.max_open else f"at most {high}")
        too_low = low is not None and (value < low or (self.option.min_open and value == low))
        too_high = high is not None and (value > high or (self.option.max_open and value == high))
        if too_low or too_high or not math.isfinite(value):
            raise UsageError(
                f"{self.flag} must be {' and '.join(bounds) or 'finite'}, got {value}."
            )


class Settings:
    """Base class of all settings; checks choices and bounds, in Python as on the command line."""

    def __post_init__(self) -> None:
        for field in option_fields(type(self)):
            field.check(getattr(self, field.name))


def option_fields(kind: type[Any]) -> tuple[Field, ...]:
    """Return the fields of a settings dataclass; those from its base classes come last."""
    hints = get_type_hints(kind, include_extras=True)
    bases = [base.__annotations__ for base in kind.__mro__[1:-1]]
    found = []
    for field in sorted(fields(kind), key=lambda field: any(field.name in base for base in bases)):
        hint = hints[field.name]
        is_described = hasattr(hint, "__metadata__")
        bare, option = get_args(hint) if is_described else (hint, None)
        found.append(Field(field.name, bare, field.default, option))
    return tuple(found)


def result_options(config: Settings) -> dict[str, Any]:
    """Return the settings that the result of a stage depends on, for its fingerprint.

    A new field counts unless it says ``affects_result=False``.
    """
    return {
        field.name: getattr(config, field.name)
        for field in option_fields(type(config))
        if field.option is None or field.option.affects_result
    }


_SHARD_MEGABYTES = 128
# the second sharpens the places of a heatmap; a third, with more pixels, costs four times as much
_FEATURE_MAPS = 2


def _seed(text: str, group: Group) -> Option:
    # NumPy does not accept negative seeds
    return Option(text, group, min=0, max=2**32 - 1)


def _workers(text: str) -> Option:
    # more threads would only wait for each other, and the system limits their number
    return Option(text, "Speed", min=1, max=256, affects_result=False, unset="from the cores")


def _workers_from_cores() -> int:
    """Return one worker per core of this rank but one, which feeds the device; at most 32."""
    # each decodes some 500 photographs a second at 224 px and holds two batches in memory
    return min(32, max(1, num_cores() - 1))


def _source(images: str, flag: str) -> Option:
    text = (
        f"{images}: a folder, WebDataset shards ('x-{{000..147}}.tar'), Parquet or Arrow files of "
        "Hugging Face datasets, a .txt or .csv list of files, an .npy or .npz file, or a "
        "torchvision NAME/SPLIT; may be repeated."
    )
    return Option(text, "Data", flag=flag, metavar="SOURCE")


def _false_alarm(unset: str = "") -> Option:
    return Option(
        "Share of ID images that may be called OOD.",
        "Evaluation",
        min=0,
        max=1,
        min_open=True,
        max_open=True,
        unset=unset,
    )


_OodTestSets: TypeAlias = Annotated[
    tuple[str, ...],
    Option("OOD test set; may be repeated.", "Data", flag="--ood", metavar="[NAME=]SOURCE"),
]
_Overwrite: TypeAlias = Annotated[
    bool,
    Option("Rebuild a stage that was made from other inputs.", "Output", affects_result=False),
]
_ShardMegabytes: TypeAlias = Annotated[
    int,
    Option(
        "Approximate size of a shard on disk, in megabytes; larger if needed for at most 20,000 "
        "shards.",
        "Output",
        min=1,
    ),
]
_AllowSuspicious: TypeAlias = Annotated[
    bool,
    Option(
        "Exit with 0 even if a result is suspicious, such as chance accuracy.",
        "Output",
        affects_result=False,
    ),
]
_BatchSize: TypeAlias = Annotated[
    int,
    Option("Images per forward pass of the classifier.", "Speed", min=1, affects_result=False),
]
_Deterministic: TypeAlias = Annotated[
    bool,
    Option(
        "Use only deterministic algorithms: bit-identical results on the same kind of GPU, but "
        "slower. On a CPU results are deterministic without it.",
        "Speed",
        affects_result=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class DataOptions(Settings):
    """Where image sets are found."""

    data_root: Annotated[Path, Option("Root folder of torchvision datasets.", "Data")] = Path(
        "data"
    )
    download: Annotated[bool, Option("Download a torchvision dataset that is missing.", "Data")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class IndexData(DataOptions):
    """Images of ``index``."""

    id_sources: Annotated[tuple[str, ...], _source("ID training images", "--id")]
    class_order: Annotated[
        Literal["name", "natural", "case-insensitive"],
        Option(
            "Order in which class folders are numbered, which must be the classifier's: name, as "
            "in torchvision (1, 10, 2; B, a), natural, as in timm (1, 2, 10; a, B), or "
            "case-insensitive (1, 10, 2; a, B).",
            "Data",
        ),
    ] = "name"


@dataclass(frozen=True, kw_only=True)
class TargetsData(DataOptions):
    """Images of ``targets``."""

    ood_sources: Annotated[tuple[str, ...], _source("OOD training images", "--ood")]


@dataclass(frozen=True, kw_only=True)
class TestData(DataOptions):
    """ID and OOD test images."""

    id_sources: Annotated[tuple[str, ...], _source("ID test images", "--id")]
    ood_sources: _OodTestSets


@dataclass(frozen=True, kw_only=True)
class LocalizeData(TestData):
    """Images of ``localize``."""

    ceiling: Annotated[
        tuple[str, ...],
        Option(
            "OOD training images, those of `targets`: also measure a U-Net that is trained on the "
            "pixels of the same patched images (ten minutes on two cores); may be repeated.",
            "Data",
            metavar="SOURCE",
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluateData(TestData):
    """Images of ``evaluate``, and further runs to average over."""

    calibration: Annotated[
        str | None,
        Option(
            "Held-out ID images that set the decision thresholds and are not in the table.",
            "Data",
            metavar="SOURCE",
            unset="a share of --id",
        ),
    ] = None
    runs: Annotated[
        tuple[Path, ...],
        Option(
            "Run trained with another seed, for mean and spread; may be repeated.",
            "Data",
            metavar="OTHER_RUN",
            path="run",
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(Settings):
    """The classifier that ``index`` makes a run with."""

    spec: Annotated[
        str,
        Option(
            "Network: cifar-resnet18, cifar-resnet50-64px, wrn-40-2, torchvision/NAME, timm/NAME, "
            "file.py:function or package.module:function.",
            "Classifier",
            flag="--classifier",
            metavar="SPEC",
        ),
    ]
    weights: Annotated[
        Path | None,
        Option(
            "Weights of the network: safetensors, or a PyTorch state dict.",
            "Classifier",
            path="file",
            unset="the network's own",
        ),
    ] = None
    num_classes: Annotated[
        int | None,
        Option("Number of classes.", "Classifier", min=2, unset="the network's own"),
    ] = None
    mean: Annotated[
        Rgb | None,
        Option(
            "Mean of each channel, subtracted from images in [0, 1].",
            "Classifier",
            unset="the network's own, or 0,0,0",
        ),
    ] = None
    std: Annotated[
        Rgb | None,
        Option(
            "Standard deviation of each channel, which images in [0, 1] are divided by.",
            "Classifier",
            unset="the network's own, or 1,1,1",
        ),
    ] = None
    size: Annotated[
        int | None,
        Option(
            "Side of the classifier's square input, in pixels.",
            "Classifier",
            min=4,
            unset="the network's own",
        ),
    ] = None
    head: Annotated[
        str,
        Option(
            "Name of the last linear layer, whose input is the features; detected automatically by "
            "default.",
            "Classifier",
            metavar="NAME",
        ),
    ] = ""
    feature_maps: Annotated[
        int,
        Option(
            "Number of the classifier's spatial feature maps to cache, deepest first.",
            "Classifier",
            min=0,
            max=3,
        ),
    ] = _FEATURE_MAPS
    autocast: Annotated[
        bool, Option("Run the classifier in bfloat16, in every stage of RUN.", "Classifier")
    ] = False


@dataclass(frozen=True, kw_only=True)
class ReadConfig(Settings):
    """Settings of every command that runs image sets through the classifier."""

    batch_size: _BatchSize = 256
    workers: Annotated[
        int | None, _workers("Threads that decode images; 3 or more are processes.")
    ] = None
    skip_unreadable: Annotated[
        bool, Option("Skip images that cannot be read, and list them.", "Data")
    ] = False

    @property
    def num_workers(self) -> int:
        """Number of threads or processes that decode images."""
        return self.workers or _workers_from_cores()


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ReadConfig):
    """Settings of every stage that runs image sets through the classifier."""

    overwrite: _Overwrite = False


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EmbedConfig):
    """Settings of stage 1, ``index``."""

    ignore_labels: Annotated[
        bool, Option("Ignore class folders: index the images without labels.", "Data")
    ] = False
    map_channels: Annotated[
        int,
        Option(
            "Maximum number of channels of a cached feature map. Wider maps are projected to their "
            "principal components over ID images, the larger to fewer. 0 for all channels.",
            "Classifier",
            min=0,
        ),
    ] = 128
    shard_mb: _ShardMegabytes = _SHARD_MEGABYTES
    allow_suspicious: _AllowSuspicious = False
    deterministic: _Deterministic = False


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(EmbedConfig):
    """Settings of stage 2, ``targets``.

    Pairings other than ``nearest`` are for comparison; ``scrambled`` uses the nearest image of
    another OOD image, as the paper's released code does.
    """

    limit: Annotated[
        int | None,
        Option("Number of OOD images to draw at random.", "Data", min=1, unset="all"),
    ] = None
    pairing: Annotated[
        Literal["nearest", "random", "any", "scrambled"],
        Option(
            "ID image that an OOD image is paired with: the nearest of its predicted class, a "
            "random one of that class, the nearest of any class, or scrambled as in the paper's "
            "released code.",
            "Pairing",
        ),
    ] = "nearest"
    patched: Annotated[
        float | None,
        Option(
            "Number of ID images with a pasted OOD patch, per OOD image; by default 2, and more "
            "where there are few OOD images: 3 per ID image, but not more than 20,000 in all.",
            "Pairing",
            min=0,
        ),
    ] = None
    patch_shapes: Annotated[
        Literal["mixed", "squares"],
        Option(
            "Pasted patches: squares, ellipses and blobs, opaque, blended or translucent (mixed), "
            "or squares only, opaque or blended.",
            "Pairing",
        ),
    ] = "mixed"
    heatmap_size: Annotated[
        int | None,
        Option(
            "Side of targets and heatmaps in pixels; below the images' size, targets are area "
            "averages of the difference.",
            "Pairing",
            min=4,
            unset="the images' size, halved until it is at most 64",
        ),
    ] = None
    seed: Annotated[
        int,
        _seed("Random seed of the draw, of patches and of random pairing.", "Pairing"),
    ] = 0
    shard_mb: _ShardMegabytes = _SHARD_MEGABYTES
    allow_suspicious: _AllowSuspicious = False
    deterministic: _Deterministic = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of stage 3, ``train``."""

    epochs: Annotated[int, Option("Passes over all ID and OOD images.", "Training", min=1)] = 20
    batch_size: Annotated[
        int, Option("Images per training step, over all devices.", "Training", min=2)
    ] = 200
    lr: Annotated[float, Option("Learning rate of Adam.", "Training", min=0, min_open=True)] = 1e-3
    schedule: Annotated[
        Literal["cosine", "constant"],
        Option("Learning rate schedule: cosine with 10 % linear warm-up, or constant.", "Training"),
    ] = "cosine"
    noise: Annotated[
        float,
        Option(
            "Gaussian noise added in training to the inputs of the image head, or of the plain "
            "decoder, in standard deviations of each input.",
            "Training",
            min=0,
        ),
    ] = 0.5
    region_weight: Annotated[
        float,
        Option(
            "Exponent r of the loss weight (image area / OOD area)^r of patched images; 0 weights "
            "all images alike, as in the paper.",
            "Training",
            min=0,
            max=1,
        ),
    ] = 0.5
    seed: Annotated[
        int,
        _seed("Random seed of initial weights, image order and noise.", "Training"),
    ] = 0
    stack: Annotated[
        Literal["split", "plain", "dcgan"],
        Option(
            "Decoder architecture: split (one head for the image, one for places), plain (no batch "
            "norm) or dcgan (batch norm, as in the paper).",
            "Decoder",
        ),
    ] = "split"
    target: Annotated[
        Literal["presence", "signed", "magnitude"],
        Option(
            "What the heatmap is: the presence of OOD content (--stack split), or the signed "
            "difference to the nearest ID image, as in the paper, or its absolute value (--stack "
            "plain or dcgan).",
            "Decoder",
        ),
    ] = "presence"
    width: Annotated[
        int,
        Option(
            "Channels of the decoder's first map; 0 derives them from the width of the features.",
            "Decoder",
            min=0,
        ),
    ] = 0
    feature_maps: Annotated[
        int | None,
        Option(
            "Number of the classifier's feature maps that the decoder uses; all that are cached by "
            "default.",
            "Decoder",
            min=0,
            max=3,
        ),
    ] = None
    feed: Annotated[
        Literal["auto", "resident", "memory", "streaming", "pinned"],
        Option(
            "Where the training set is kept: in device memory (resident), in host memory (memory, "
            "formerly pinned), or on disk (streaming).",
            "Speed",
            affects_result=False,
        ),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Option(
            "Precision of the decoder; auto is bfloat16 on a GPU that has it, else float32.",
            "Speed",
        ),
    ] = "auto"
    step: Annotated[
        Literal["auto", "eager", "compiled", "graph", "plain"],
        Option(
            "How a training step is launched: eager (formerly plain), through torch.compile "
            "(compiled), or as a CUDA graph (graph); auto is the faster of eager and graph on a "
            "GPU.",
            "Speed",
            affects_result=False,
        ),
    ] = "auto"
    deterministic: _Deterministic = False
    log: Annotated[
        tuple[str, ...],
        Option(
            "Log every epoch to tensorboard[:DIR] (default: in tensorboard/ of RUN) or to "
            "mlflow[:URI] (default: where MLflow's own settings say); may be repeated.",
            "Output",
            metavar="TRACKER",
            affects_result=False,
        ),
    ] = ()
    overwrite: _Overwrite = False


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EmbedConfig):
    """Settings of stage 4, ``evaluate``."""

    near: Annotated[
        tuple[str, ...],
        Option(
            "OOD test set that counts as near-OOD, by name or source; may be repeated.",
            "Data",
            metavar="NAME",
        ),
    ] = ()
    protocol: Annotated[
        Literal["all", "paper", "openood"],
        Option(
            "What the table compares: all images; paper (ID positive, five ID images drawn per OOD "
            "image); or openood (OOD positive, means over near and far sets).",
            "Evaluation",
        ),
    ] = "all"
    calibration_share: Annotated[
        float,
        Option(
            "Share of --id that is held out to set the thresholds; 0 for no thresholds.",
            "Evaluation",
            min=0,
            max=1,
            max_open=True,
        ),
    ] = 0.1
    false_alarm: Annotated[float, _false_alarm()] = 0.05
    seed: Annotated[
        int,
        _seed(
            "Random seed of the protocol's sample, the held-out images and the bootstrap.",
            "Evaluation",
        ),
    ] = 0
    gallery: Annotated[
        int, Option("Maximum number of images of each set in the report.", "Output", min=1)
    ] = 40
    allow_suspicious: _AllowSuspicious = False
    deterministic: _Deterministic = False
    neighbours: Annotated[
        int | None,
        Option(
            "Number k of neighbours of the kNN baseline.",
            "Evaluation",
            min=1,
            unset="from the class sizes",
        ),
    ] = None
    # of the bootstrap
    resamples: int = 1000
    # images of each set in examples.png
    examples: int = 8


@dataclass(frozen=True, kw_only=True)
class AuditData(DataOptions):
    """Images of ``audit``."""

    id_sources: Annotated[
        tuple[str, ...],
        Option(
            "ID images that the classifier was not trained on; may be repeated.",
            "Data",
            flag="--id",
            metavar="SOURCE",
        ),
    ] = ()
    ood_sources: _OodTestSets = ()


@dataclass(frozen=True, kw_only=True)
class AuditConfig(ReadConfig):
    """Settings of ``audit``."""

    allow_suspicious: _AllowSuspicious = False


@dataclass(frozen=True, kw_only=True)
class LocalizeConfig(EmbedConfig):
    """Settings of ``localize``."""

    count: Annotated[
        int,
        Option(
            "Number of ID images, and of images of each OOD set; each pair is measured with 12 "
            "patches: every size and shape, and three kinds of edges in turn.",
            "Evaluation",
            min=1,
        ),
    ] = 100
    seed: Annotated[
        int,
        _seed("Random seed of images, patch positions and sanity checks.", "Evaluation"),
    ] = 0
    # of the bootstrap
    resamples: int = 1000


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Settings):
    """Settings of ``predict``."""

    batch_size: _BatchSize = 64
    workers: Annotated[
        int | None,
        _workers(
            "Threads that decode images (3 or more are processes), and as many threads that draw "
            "and write."
        ),
    ] = None
    format: Annotated[
        Literal["csv", "jsonl"],
        Option(
            "Format of the table: scores.csv, or scores.jsonl with one object per line.", "Output"
        ),
    ] = "csv"
    pictures: Annotated[
        Literal["panel", "overlay", "none"],
        Option(
            "Picture of each image, beside its raw heatmap: a panel with the photo, the heatmap "
            "over it and the decision in words; the heatmap over the photo alone; or neither "
            "picture nor heatmap. At the photo's size, at most 2,000 px.",
            "Output",
        ),
    ] = "panel"
    nearest: Annotated[
        int,
        Option("Number of nearest ID images of the predicted class in a panel.", "Output", max=5),
    ] = 0
    overwrite: Annotated[
        bool, Option("Replace the results of an earlier run in the output folder.", "Output")
    ] = False

    @property
    def num_workers(self) -> int:
        """Number of threads or processes that decode images, and of threads that draw and write."""
        return self.workers or _workers_from_cores()


@dataclass(frozen=True, kw_only=True)
class DetectorOptions(Settings):
    """Decision level of a detector that is loaded from a run."""

    false_alarm: Annotated[float | None, _false_alarm(unset="that of `evaluate`")] = None


@dataclass(frozen=True, kw_only=True)
class PredictOptions(DetectorOptions):
    """Detector and output of ``predict``."""

    out: Annotated[Path, Option("Folder for the results.", "Output")]


@dataclass(frozen=True, kw_only=True)
class ExportOptions(DetectorOptions):
    """Detector and output of ``export``."""

    format: Annotated[
        Literal["onnx", "torch"],
        Option("File format: ONNX, or an exported program of torch.export.", "Output"),
    ]
    out: Annotated[
        Path,
        Option("File to write, such as detector.onnx or detector.pt2.", "Output", path="file"),
    ]


@dataclass(frozen=True, kw_only=True)
class BundleOptions(DetectorOptions):
    """Detector and output of ``bundle``."""

    out: Annotated[
        Path, Option("File to write, such as detector.safetensors.", "Output", path="file")
    ]


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Settings):
    """Settings of ``verify``."""

    samples: Annotated[int, Option("Targets to recompute by brute force.", "Evaluation", min=0)] = (
        200
    )
    seed: Annotated[int, _seed("Random seed of the sample.", "Evaluation")] = 0
