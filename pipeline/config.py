"""The settings of each stage, every default written once.

Imports nothing heavy: the command line reads it.
"""

from dataclasses import dataclass

SHARD_MEGABYTES = 128


@dataclass(frozen=True)
class IndexConfig:
    """Settings of stage 1.

    Args:
        batch_size: Images the classifier takes at once.
        workers: Threads that decode images.
        shard_mb: Megabytes of a shard on disk, about.
        skip_unreadable: Leave out images that cannot be read, and list them, instead of stopping.
        ignore_labels: Take class folders for folders only.
        overwrite: Discard an index that was made from something else.
    """

    batch_size: int = 256
    workers: int = 2
    shard_mb: int = SHARD_MEGABYTES
    skip_unreadable: bool = False
    ignore_labels: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class TargetsConfig:
    """Settings of stage 2.

    Args:
        limit: Take this many OOD images, drawn at random; all when None.
        seed: Of that draw, and of random pairing.
        pairing: ``nearest``: the nearest of the predicted class. For comparison: ``random``, any of
            that class; ``any``, the nearest of all classes; ``scrambled``, the nearest of another
            OOD image, as in the released code.
        patched: ID images that carry a patch of an OOD image, for each OOD image.
        batch_size: Images the classifier takes at once.
        workers: Threads that decode images.
        shard_mb: Megabytes of a shard on disk, about.
        skip_unreadable: Leave out images that cannot be read, and list them, instead of stopping.
        overwrite: Discard targets that were made from something else.
    """

    limit: int | None = None
    seed: int = 0
    pairing: str = "nearest"
    patched: float = 0.0
    batch_size: int = 256
    workers: int = 2
    shard_mb: int = SHARD_MEGABYTES
    skip_unreadable: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """Settings of stage 3.

    Args:
        epochs: Passes over all ID and OOD images.
        batch_size: Images a step, over all devices.
        lr: Learning rate of Adam.
        seed: Of the decoder's first weights and of the order of images.
        target: ``magnitude``, or ``signed``: the difference itself, as in the paper.
        width: Channels of the decoder's first map; found from the features' width when 0.
        feature_maps: How many of the classifier's feature maps the decoder takes as well.
        feed: ``auto``, ``resident``, ``pinned`` or ``streaming``; the result is the same.
        precision: ``auto``, ``float32`` or ``bfloat16``.
        step: ``auto``, ``plain``, ``compiled`` or ``graph``: how a step is launched.
        overwrite: Discard a decoder that was trained otherwise.
    """

    epochs: int = 20
    batch_size: int = 200
    lr: float = 2e-4
    seed: int = 0
    target: str = "magnitude"
    width: int = 0
    feature_maps: int = 0
    feed: str = "auto"
    precision: str = "auto"
    step: str = "auto"
    overwrite: bool = False


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of stage 4.

    Args:
        near: Names of the OOD sets that count as near.
        batch_size: Images the classifier takes at once.
        workers: Threads that decode images.
        neighbours: k of the k-nearest-neighbour baseline.
        examples: Images of each set on the sheet.
        skip_unreadable: Leave out images that cannot be read, and list them, instead of stopping.
        overwrite: Discard an evaluation of something else.
    """

    near: tuple[str, ...] = ()
    batch_size: int = 256
    workers: int = 2
    neighbours: int = 50
    examples: int = 8
    skip_unreadable: bool = False
    overwrite: bool = False
