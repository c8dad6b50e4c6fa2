"""Index of the images in a WebDataset shard: read once from its headers, then cached.

Consecutive members whose names are equal up to the first dot are a sample. Nothing is extracted to
disk, and only labels are read.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ood_heatmap.errors import OodHeatmapError, printable
from ood_heatmap.listing import Labels, Names, stamp_of
from ood_heatmap.packed import PackedFile
from ood_heatmap.source_folder import image_suffixes

log = logging.getLogger(__name__)

_FORMAT = 1
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK, _NAME, _PREFIX = tarfile.BLOCKSIZE, slice(100), slice(345, 500)
_OCTAL = re.compile(rb"[0-7]+")
_MAX_JSON_BYTES, _MAX_TEXT_BYTES = 2**24, 1000
# keys of a sample's JSON that may contain its class; the first that exists is used
_JSON_KEYS = ("label", "cls", "class", "target")
# names of webdataset's own metadata
_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")


class _Member(NamedTuple):
    """A member of a tar file.

    Args:
        name: Its name; empty unless it is a regular file.
        offset: Position of its bytes.
        num_bytes: Number of its bytes.
        next_header: Position of the next member's header.
    """

    name: str
    offset: int
    num_bytes: int
    next_header: int


@dataclass(frozen=True)
class TarIndex:
    """The images of one shard, and their labels.

    Args:
        images: Where the images are.
        labels: Label of each image.
        class_texts: Maps a label to the ``.txt`` of its samples; empty where they differ.
        num_without_image: Number of samples that have no image.
    """

    images: PackedFile
    labels: Labels
    class_texts: dict[str, str]
    num_without_image: int


def add_text(texts: dict[str, str], label: str, text: str) -> None:
    """Record the text of samples of a class; "" if samples of a class differ."""
    if texts.setdefault(label, text) != text:
        texts[label] = ""


def index_tar(path: str) -> TarIndex:
    """Return where the images of a shard are; from the cache if the shard has not changed.

    Raises:
        OodHeatmapError: The file is damaged, compressed or not a tar file, or a label or a sample
            is ambiguous.
    """
    stamp = stamp_of(path)
    cached = _load_index(path, stamp)
    if cached is not None:
        return cached
    index = _read_index(path, stamp)
    try:
        _save_index(path, index)
    except OSError as error:
        log.debug("the index of %s is not cached: %s", path, error)
    return index


def _read_index(path: str, stamp: tuple[int, int]) -> TarIndex:
    """List a shard."""
    shown = printable(path)
    try:
        with open(path, "rb") as file:
            _refuse_compressed(file.read(6), shown)
            file.seek(0)
            return _list_samples(file, path, stamp)
    except (MemoryError, OodHeatmapError):
        raise
    except Exception as error:
        # on damaged bytes tarfile can raise anything
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise OodHeatmapError(
            f"{shown} cannot be read as a tar file ({reason}). Download or write it again."
        ) from error


def _list_samples(file: BinaryIO, path: str, stamp: tuple[int, int]) -> TarIndex:
    """List the samples of an open shard."""
    shown = printable(path)
    names, offset, num_bytes = Names(), array("q"), array("q")
    labels, class_texts, num_without_image = Labels(shown), dict[str, str](), 0
    for sample in _iter_samples(_iter_members(file), shown):
        image = _choose_image(sample, shown)
        if image is None:
            num_without_image += 1
            continue
        names.append(image.name)
        offset.append(image.offset)
        num_bytes.append(image.num_bytes)
        label = _read_label(sample, file, shown)
        labels.append(label)
        if label is not None and "txt" in sample:
            text = _read(sample["txt"], file, _MAX_TEXT_BYTES)
            add_text(class_texts, label, (text or b"").decode(errors="replace").strip())
    images = PackedFile(
        path, stamp, names, np.array(num_bytes, np.int64), np.array(offset, np.int64)
    )
    return TarIndex(images, labels, class_texts, num_without_image)


def _refuse_compressed(magic: bytes, shown: str) -> None:
    """Refuse a compressed file.

    Raises:
        OodHeatmapError: It is compressed.
    """
    for start, kind in _COMPRESSED.items():
        if magic.startswith(start):
            raise OodHeatmapError(
                f"{shown} is compressed ({kind}): its images cannot be read one by one. "
                "Decompress it to a .tar file."
            )


def _iter_members(file: BinaryIO) -> Iterator[_Member]:
    """Yield the regular files of a tar file.

    Raises:
        ValueError: There is something between two members that is not a member.
    """
    end = os.fstat(file.fileno()).st_size
    position = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := _read_header(tar, file, position)) is not None:
            if member.next_header <= position or member.num_bytes < 0:
                raise ValueError(f"damaged at byte {position}")
            # also in the padding of the last member: more may have followed
            if member.next_header > end:
                raise ValueError("it ends too early")
            if member.name:
                yield member
            position = member.next_header
    # the end marker may be missing
    if os.pread(file.fileno(), _BLOCK, position).strip(b"\0"):
        raise ValueError(f"damaged at byte {position}")


def _read_header(tar: tarfile.TarFile, file: BinaryIO, position: int) -> _Member | None:
    """Read the header of a member; None at the end."""
    file.seek(position)
    # a global header has fields of all members after it
    member = None if tar.pax_headers else _parse_plain(file.read(_BLOCK), position)
    if member is not None:
        return member
    file.seek(position)
    try:
        info = tarfile.TarInfo.fromtarfile(tar)
    except tarfile.HeaderError:
        return None
    # the bytes of a sparse file are not contiguous
    is_plain = info.isreg() and not info.issparse()
    return _Member(info.name if is_plain else "", info.offset_data, info.size, tar.offset)


def _parse_plain(header: bytes, position: int) -> _Member | None:
    """Parse the header of a regular file; None for any other header, which tarfile parses.

    Much faster than tarfile, which parses all fields: there may be millions of headers.
    """
    octal = header[124:136].strip(b" \0"), header[148:156].strip(b" \0")
    if header[156:157] not in (b"0", b"\0") or not all(map(_OCTAL.fullmatch, octal)):
        return None
    num_bytes, checksum = int(octal[0], 8), int(octal[1], 8)
    name, prefix = (header[part].partition(b"\0")[0] for part in (_NAME, _PREFIX))
    is_damaged = sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum
    if is_damaged or not name or name.endswith(b"/"):
        return None
    path = os.fsdecode(prefix + b"/" + name if prefix else name)
    offset = position + _BLOCK
    return _Member(path, offset, num_bytes, offset + -(-num_bytes // _BLOCK) * _BLOCK)


def _iter_samples(members: Iterator[_Member], shown: str) -> Iterator[dict[str, _Member]]:
    """Group members as webdataset does; yield each sample as a mapping from suffix to member.

    Raises:
        OodHeatmapError: Two members of a sample have the same suffix.
    """
    current, sample = "", dict[str, _Member]()
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        if not stem or not dot or _NO_SAMPLE.match(member.name):
            continue
        key = folder + slash + stem
        if sample and key != current:
            yield sample
            sample = {}
        current, suffix = key, suffix.lower()
        if suffix in sample:
            raise OodHeatmapError(
                f"{shown} has {printable(member.name)} twice in one sample. "
                "Give every sample its own name."
            )
        sample[suffix] = member
    if sample:
        yield sample


def _choose_image(sample: Mapping[str, _Member], shown: str) -> _Member | None:
    """Return the image of a sample: ``.jpg``, and ``.input.jpg`` only if there is no other.

    Raises:
        OodHeatmapError: There are several.
    """
    found = [suffix for suffix in sample if f".{suffix.rpartition('.')[2]}" in image_suffixes()]
    plain = [suffix for suffix in found if "." not in suffix] or found
    if len(plain) > 1:
        name = printable(sample[plain[0]].name)
        raise OodHeatmapError(
            f"{shown} has several images in the sample of {name} ({printable(', '.join(plain))}): "
            "it is ambiguous which one is meant. Keep one image per sample."
        )
    return sample[plain[0]] if plain else None


def _read_label(sample: Mapping[str, _Member], file: BinaryIO, shown: str) -> str | None:
    """Return the label of a sample; None without one.

    Raises:
        OodHeatmapError: There is one that cannot be read.
    """
    is_text = "cls" in sample
    member = sample.get("cls" if is_text else "json")
    if member is None:
        return None
    content = _read(member, file, _MAX_TEXT_BYTES if is_text else _MAX_JSON_BYTES)
    try:
        if content is None:
            raise ValueError(f"{member.num_bytes} bytes are too many")
        return (content.decode().strip() or None) if is_text else _label_from_json(content)
    except (ValueError, RecursionError) as error:
        raise OodHeatmapError(
            f"the label {printable(member.name)} in {shown} cannot be read ({error}). "
            "Correct or remove it."
        ) from error


def _label_from_json(content: bytes) -> str | None:
    """Return the class that the JSON of a sample names; None if it names none."""
    fields = json.loads(content)
    if not isinstance(fields, dict):
        return None
    label = next((fields[key] for key in _JSON_KEYS if key in fields), None)
    is_label = isinstance(label, int | str) and not isinstance(label, bool)
    return str(label) if is_label else None


def _read(member: _Member, file: BinaryIO, limit: int) -> bytes | None:
    """Return the content of a member; None if it is larger than ``limit``."""
    if member.num_bytes > limit:
        return None
    return os.pread(file.fileno(), member.num_bytes, member.offset)


def _load_index(path: str, stamp: tuple[int, int]) -> TarIndex | None:
    """Return the cached index of a shard; None if there is no current one."""
    try:
        arrays = load(_cache_path(path).read_bytes())
        labels, texts = Labels(printable(path)), json.loads(arrays["texts"].tobytes())
        labels.extend(arrays["codes"], texts["labels"])
        names = Names.from_arrays(arrays["names"], arrays["name_ends"])
        images = PackedFile(path, stamp, names, arrays["num_bytes"], arrays["offset"])
        index = TarIndex(images, labels, texts["class_texts"], texts["num_without_image"])
        fits = arrays["stamp"].tolist() == [_FORMAT, *stamp]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return index if fits else None


def _save_index(path: str, index: TarIndex) -> None:
    """Cache the index of a shard; the file is written atomically.

    Raises:
        OSError: It cannot be written.
    """
    names, name_ends = index.images.names.to_arrays()
    texts = {
        "labels": index.labels.texts,
        "class_texts": index.class_texts,
        "num_without_image": index.num_without_image,
    }
    content = save(
        {
            "stamp": np.array([_FORMAT, *index.images.stamp]),
            "names": names,
            "name_ends": name_ends,
            "offset": index.images.offset,
            "num_bytes": index.images.sizes,
            "codes": np.array(index.labels.codes, np.int32),
            "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
        }
    )
    target = _cache_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # a unique name: several processes may list the same shard
    descriptor, scratch = tempfile.mkstemp(prefix=".", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        os.replace(scratch, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(scratch)


def _cache_path(path: str) -> Path:
    """Return the cache file of a shard.

    Raises:
        OSError: There is no home directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError("there is no home directory") from error
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return root / "ood_heatmap" / "tar" / f"{key}.safetensors"
