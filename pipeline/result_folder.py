"""The output folder of ``predict``: results of one run only, named as the images are.

scores.csv, or scores.jsonl    written last
pictures/a/b.jpg               of the image a/b.jpg
heatmaps/a/b.jpg.npy
"""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ood_heatmap.cache.files import locked, make_directory, move, remove_directory, write_bytes
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.pipeline.score_table import FORMULA_STARTS

PICTURES, HEATMAPS = "pictures", "heatmaps"
# formats in which pictures are written; those of other images are PNG
JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi")
_TABLES = ("scores.csv", "scores.jsonl")
_SCRATCH = ".unfinished"
# a folder that has it may be replaced
_MARK = ".written-by-predict"
# maximum bytes of a file name without suffix; some encrypted file systems allow 143 in total
_MAX_NAME_BYTES = 120


@contextmanager
def replacing_results(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder for results, put in place only if the block succeeds.

    Until then ``out`` has its earlier results, afterwards only the new ones.

    Args:
        out: The output folder; created if missing, and locked during the block.
        overwrite: Replace the results of an earlier run.

    Raises:
        OodHeatmapError: The folder has results and ``overwrite`` is False, has other folders of
            their names, cannot be written, or another process writes to it.
    """
    make_directory(out)
    with locked(out):
        _check_free(out, overwrite)
        scratch = out / _SCRATCH
        remove_directory(scratch)
        for folder in (PICTURES, HEATMAPS):
            make_directory(scratch / folder)
            write_bytes(scratch / folder / _MARK, b"")
        try:
            yield scratch
            _put_in_place(scratch, out)
        except BaseException:
            # must not hide the first error
            with contextlib.suppress(OodHeatmapError):
                remove_directory(scratch)
            raise
        remove_directory(scratch)


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise OodHeatmapError unless the results may be put into a folder."""
    for folder in (out / PICTURES, out / HEATMAPS):
        is_ours = not folder.is_symlink() and (folder / _MARK).is_file()
        if os.path.lexists(folder) and not is_ours:
            raise OodHeatmapError(
                f"{folder} was not written by predict: name another folder with --out."
            )
    # written last: without it, folders are leftovers of a killed run
    found = [name for name in _TABLES if os.path.lexists(out / name)]
    if found and not overwrite:
        raise OodHeatmapError(
            f"{out} has the results of an earlier run ({found[0]}): name another folder with "
            "--out, or replace them with --overwrite."
        )


def _put_in_place(scratch: Path, out: Path) -> None:
    """Replace the results of a folder; while they are mixed, there is no table."""
    try:
        for name in _TABLES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise OodHeatmapError(f"cannot replace {out / name}: {error.strerror}.") from error
    for name in (PICTURES, HEATMAPS):
        remove_directory(out / name)
        if len(os.listdir(scratch / name)) > 1:
            move(scratch / name, out / name)
    for name in _TABLES:
        if (scratch / name).is_file():
            move(scratch / name, out / name)


def common_folder(inputs: Iterable[Path], paths: Iterable[Path]) -> Path | None:
    """Return the folder that contains all images.

    Args:
        inputs: Files and folders as named by the user. A folder is kept as it is, although all of
            its images may be in one subfolder.
        paths: The images found.

    Returns:
        None if they are on different drives.
    """
    folders = {os.path.abspath(path) for path in inputs if path.is_dir()}
    folders |= {os.path.abspath(folder) for folder in {os.path.dirname(path) for path in paths}}
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:
        return None


def mirrored_names(paths: Sequence[Path], root: Path | None) -> list[str]:
    """Return the unique name of each image's picture, relative to the folder of pictures.

    Names are the images' own, below ``root``. Characters that some file system or spreadsheet does
    not support become ``_``, long names are truncated and end in a hash, duplicates get a number.

    Args:
        paths: The images.
        root: A folder that contains them all; None to keep all folders.
    """
    taken: set[str] = set()
    counts = Counter[str]()
    names = []
    for path in paths:
        folders, file = os.path.split(_relative(path, root))
        parent = "".join(f"{_portable(folder)}/" for folder in Path(folders).parts)
        stem, suffix = os.path.splitext(file)
        if suffix.lower() not in (*JPEG_SUFFIXES, ".png"):
            stem, suffix = file, ".png"
        stem = name = f"{parent}{_portable(stem)}"
        # some file systems are case-insensitive
        while f"{name}{suffix}".casefold() in taken:
            counts[stem] += 1
            name = f"{stem}-{counts[stem] + 1}"
        taken.add(f"{name}{suffix}".casefold())
        names.append(f"{name}{suffix}")
    return names


def _relative(path: Path, root: Path | None) -> str:
    """Return the path below a root, or below its drive."""
    absolute = os.path.abspath(path)
    if root is None:
        return absolute.lstrip(os.sep + ":")
    return os.path.relpath(absolute, root)


def _portable(name: str) -> str:
    """Make a name that is valid on every file system and in a spreadsheet."""
    portable = "".join(
        character if character.isprintable() and character not in '/\\:*?"<>|' else "_"
        for character in name
    )
    # a leading dot would hide the file, Windows drops trailing ones
    if portable.startswith((*FORMULA_STARTS, ".")):
        portable = f"_{portable[1:]}"
    if portable.endswith((".", " ")):
        portable = f"{portable[:-1]}_"
    encoded = portable.encode()
    if len(encoded) <= _MAX_NAME_BYTES:
        return portable
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f"{encoded[: _MAX_NAME_BYTES - 17].decode(errors='ignore')}-{digest}"
