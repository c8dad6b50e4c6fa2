"""The settings of each stage, every default written once.

Imports nothing heavy: the command line reads it.
"""

from dataclasses import dataclass

SHARD_MEGABYTES = 128
FEATURE_MAPS = (
    1  # the deepest alone: shallower ones see how an image was resized, not what it shows
)


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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
    patched: float = 2.0
    batch_size: int = 256
    workers: int = 2
    shard_mb: int = SHARD_MEGABYTES
    skip_unreadable: bool = False
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of stage 3.

    Args:
        epochs: Passes over all ID and OOD images.
        batch_size: Images a step, over all devices.
        lr: Learning rate of Adam.
        schedule: ``cosine``: up in a tenth of the steps and down to 0; or ``constant``.
        noise: Added to the decoder's inputs in training, in their standard deviations; for the
            ``plain`` stack.
        seed: Of the decoder's first weights, of the order of images and of the noise.
        stack: ``plain``, or ``dcgan``: with batch norm, as in the paper.
        target: ``magnitude``, or ``signed``: the difference itself, as in the paper.
        region_weight: The power of (pixels of the image / pixels of its OOD region) by which an
            image counts in the loss, so that patches are not lost in it; 0 is the paper's loss.
        width: Channels of the decoder's first map; found from the features' width when 0.
        feature_maps: How many of the classifier's feature maps the decoder takes as well.
        feed: ``auto``, ``resident``, ``pinned`` or ``streaming``; the result is the same.
        precision: ``auto``, ``float32`` or ``bfloat16``.
        step: ``auto``, ``plain``, ``compiled`` or ``graph``: how a step is launched.
        overwrite: Discard a decoder that was trained otherwise.
    """

    epochs: int = 20
    batch_size: int = 200
    lr: float = 1e-3
    schedule: str = "cosine"
    noise: float = 0.5
    seed: int = 0
    stack: str = "plain"
    target: str = "magnitude"
    region_weight: float = 0.5
    width: int = 0
    feature_maps: int = FEATURE_MAPS
    feed: str = "auto"
    precision: str = "auto"
    step: str = "auto"
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Settings of ``predict``.

    Args:
        batch_size: Images the classifier takes at once.
        workers: Threads that decode images, and as many that draw and write.
        format: Of the table of scores, ``csv`` or ``jsonl``.
        pictures: Write an overlay and the raw heatmap of each image as well.
    """

    batch_size: int = 64
    workers: int = 2
    format: str = "csv"
    pictures: bool = True


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of stage 4.

    Args:
        near: Names of the OOD sets that count as near.
        protocol: ``all`` images; ``paper``: one OOD image for five ID images, drawn at random, ID
            positive; ``openood``: all images, OOD positive, means over near and far.
        calibration_share: Share of the ID test set that is held out for the thresholds.
        false_alarm: Share of ID images that may be called OOD.
        seed: Of those two draws, the bootstrap and the controls.
        batch_size: Images the classifier takes at once.
        workers: Threads that decode images.
        neighbours: k of the k-nearest-neighbour baseline.
        resamples: Of the bootstrap.
        examples: Images of each set on the sheet.
        gallery: Images of each set in the report; fewer when there are many sets.
        skip_unreadable: Leave out images that cannot be read, and list them, instead of stopping.
        overwrite: Discard an evaluation of something else.
    """

    near: tuple[str, ...] = ()
    protocol: str = "all"
    calibration_share: float = 0.1
    false_alarm: float = 0.05
    seed: int = 0
    batch_size: int = 256
    workers: int = 2
    neighbours: int = 50
    resamples: int = 1000
    examples: int = 8
    gallery: int = 40
    skip_unreadable: bool = False
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class LocalizeConfig:
    """Settings of the measurement of where.

    Args:
        count: ID images, and images of each OOD set; each pair for every size and kind of edges.
        seed: Of images, places, ID locations, shuffled weights and the bootstrap.
        resamples: Of the bootstrap.
        batch_size: Images the classifier takes at once.
        workers: Threads that decode images.
        skip_unreadable: Leave out images that cannot be read instead of stopping.
        overwrite: Discard a measurement of something else.
    """

    count: int = 100
    seed: int = 0
    resamples: int = 1000
    batch_size: int = 256
    workers: int = 2
    skip_unreadable: bool = False
    overwrite: bool = False
