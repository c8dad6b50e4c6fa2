"""Code that a SPEC names: hashed before it runs, and run only on the word of who uses it.

A run directory names the function that makes its network, so opening somebody else's run could run
anything. Naming a function yourself, as ``index --classifier`` does, is your word for it: its
source is remembered outside the run, and the same source at the same path runs for any run. Other
code runs inside ``trusting_code`` alone.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ood_heatmap.errors import OodHeatmapError, UsageError

log = logging.getLogger(__name__)

# as trustworthy as this module
_OWN_CODE = {"ood_heatmap.demo:digits_network"}
_LIBRARIES = {
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).parent,
}
_trusting: ContextVar[bool] = ContextVar("trusting_code", default=False)


@contextmanager
def trusting_code(trust: bool = True) -> Iterator[None]:
    """Let the runs that are opened inside run the code that they name."""
    token = _trusting.set(trust or _trusting.get())
    try:
        yield
    finally:
        _trusting.reset(token)


@dataclass(frozen=True)
class UserCode:
    """A function that makes a network, and the sources that it depends on.

    Args:
        place: A Python file, or the name of a module.
        function: The function's name.
    """

    place: str
    function: str

    def __str__(self) -> str:
        return f"{self.place}:{self.function}"

    @cached_property
    def sources(self) -> dict[str, bytes]:
        """The source of the module, named "", and of all it imports that is not a library.

        Imports are read from the text, inside functions too; nothing is run to find them.

        Raises:
            UsageError: There is no such module.
        """
        with self._importing():
            return _read_sources(self.place)

    @cached_property
    def hash(self) -> str:
        """The sha256 of the sources."""
        if len(self.sources) == 1:
            return hashlib.sha256(self.sources[""]).hexdigest()
        digest = hashlib.sha256()
        for name, source in sorted(self.sources.items()):
            digest.update(f"{name}\0{hashlib.sha256(source).hexdigest()}\n".encode())
        return digest.hexdigest()

    def make(self, num_classes: int | None) -> Any:
        """Import the module and return what the function returns.

        Args:
            num_classes: Passed on where the function takes an argument of this name.

        Raises:
            UsageError: The code fails, or the function is not defined in this module.
        """
        neighbours = [name for name in self.sources if name]
        with self._importing():
            # the module's own neighbours, whatever other code imported under these names
            hidden = {name: sys.modules.pop(name) for name in neighbours if name in sys.modules}
            try:
                return self._call(num_classes)
            except UsageError:
                raise
            # whatever a user's own code raises; a script without a main guard may exit
            except (Exception, SystemExit) as error:
                raise UsageError(f"{self} fails: {describe_error(error)}.") from error
            finally:
                sys.modules.update(hidden)

    def _call(self, num_classes: int | None) -> Any:
        """Import the module and call the function."""
        module = self._import()
        function = getattr(module, self.function, None)
        if not callable(function):
            raise UsageError(f"{self.place} has no function {self.function}.")
        home = getattr(function, "__module__", None)
        if home != module.__name__:
            raise UsageError(
                f"{self} is defined in {home}: name it there, or define a function in {self.place} "
                "that calls it."
            )
        signature = inspect.signature(function)
        takes_classes = any(
            parameter.name == "num_classes" or parameter.kind is parameter.VAR_KEYWORD
            for parameter in signature.parameters.values()
        )
        arguments = {"num_classes": num_classes} if takes_classes and num_classes else {}
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise UsageError(
                f"{self} cannot be called ({error}): it may need --num-classes, and no more."
            ) from error
        return function(**arguments)

    def _import(self) -> ModuleType:
        """Import the module; a file is run from the very bytes that were hashed."""
        if not self.place.endswith(".py"):
            return importlib.import_module(self.place)
        module = ModuleType(f"classifier_{Path(self.place).stem}_{self.hash[:8]}")
        module.__file__ = self.place
        # dataclasses look up the module of a class by its name
        sys.modules[module.__name__] = module
        exec(compile(self.sources[""], self.place, "exec"), vars(module))
        return module

    @contextmanager
    def _importing(self) -> Iterator[None]:
        """Put the folder of a file first on the path, as for a script that is run."""
        folder = str(Path(self.place).parent)
        importlib.invalidate_caches()
        if self.place.endswith(".py"):
            sys.path.insert(0, folder)
        try:
            yield
        finally:
            if self.place.endswith(".py") and folder in sys.path:
                sys.path.remove(folder)

    def remember(self) -> None:
        """Remember outside any run that the user trusts this function of this source."""
        marker = self._marker()
        try:
            marker.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            marker.write_text(f"{self}\n", "utf-8", errors="surrogateescape")
        except OSError as error:
            log.warning(
                "cannot remember that you trust %s (%s): later commands need --trust-code",
                self,
                error,
            )

    def require_trust(self) -> None:
        """Refuse code that the user has not named himself.

        Raises:
            OodHeatmapError: It names the file, the function and the way out.
        """
        if _trusting.get() or str(self) in _OWN_CODE or self._is_remembered():
            return
        raise OodHeatmapError(
            f"the run's classifier is code that you have not run here before: function "
            f"{self.function} of {self.place}. Read it, then add --trust-code (in Python "
            "trust_code=True) to run it."
        )

    def _is_remembered(self) -> bool:
        """Tell whether this function of this source was trusted before."""
        try:
            return self._marker().is_file()
        except OSError:
            return False

    def _marker(self) -> Path:
        """Return the file whose existence means trust: one a function, so that nothing races.

        Its name holds the place too: the same text elsewhere may read other files.
        """
        state = os.environ.get("XDG_STATE_HOME", "")
        try:
            root = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
        except RuntimeError as error:
            raise OSError("there is no home directory") from error
        key = f"{self}\n{self.hash}".encode(errors="surrogateescape")
        return root / "ood_heatmap" / "trusted" / hashlib.sha256(key).hexdigest()


def describe_error(error: BaseException, length: int = 200) -> str:
    """Return an error's type, its first line, and the line of the user's code that raised it."""
    text = (str(error).strip().splitlines() or [""])[0][:length].rstrip(".")
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if not _is_library(frame.filename)]
    return f"{reason}, {lines[-1].filename} line {lines[-1].lineno}" if lines else reason


def _read_sources(place: str) -> dict[str, bytes]:
    """Return the sources of a module and of what it imports, see ``UserCode.sources``."""
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UsageError(f"there is no file {place}.")
        name, origin = "", place
    else:
        found = _find(place)
        if found is None:
            raise UsageError(f"there is no module {place}: its folder must be on PYTHONPATH.")
        name, origin = found.name, found.origin or ""
    # a built-in module has no source
    sources = {"": Path(origin).read_bytes() if Path(origin).is_file() else b""}
    seen = {name}
    pending: list[str] = []
    if name == "" or not _is_library(origin):
        pending += [*_with_packages(name), *_imported_names(sources[""], _package(name, origin))]
    while pending:
        imported = pending.pop()
        found = None if imported in seen else _find(imported)
        seen.add(imported)
        origin = (found and found.origin) or ""
        if Path(origin).is_file() and not _is_library(origin):
            sources[imported] = Path(origin).read_bytes()
            pending += _imported_names(sources[imported], _package(imported, origin))
    return sources


def _package(name: str, origin: str) -> str:
    """Return the package that relative imports of a module start from."""
    return name if Path(origin).name == "__init__.py" else name.rpartition(".")[0]


def _imported_names(source: bytes, package: str) -> Iterator[str]:
    """Yield the full names of what a source may import, packages before their modules."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # the import itself will say so
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            start = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(start if node.level else []), *([node.module] if node.module else [])]
            names = [".".join([*parts, alias.name]) for alias in node.names]
        for name in names:
            yield from _with_packages(name)


def _with_packages(name: str) -> Iterator[str]:
    """Yield the packages that a module lies in, and the module."""
    parts = name.split(".")
    yield from (".".join(parts[: depth + 1]) for depth in range(len(parts)))


def _find(name: str) -> ModuleSpec | None:
    """Find a module as ``import`` would, without running the packages that it lies in."""
    found, path = None, None
    for full_name in _with_packages(name):
        specs = (finder.find_spec(full_name, path) for finder in sys.meta_path)
        found = next((item for item in specs if item is not None), None)
        if found is None:
            return None
        path = found.submodule_search_locations
    return found


def _is_library(origin: str) -> bool:
    """Tell whether a file belongs to Python, an installed package, or this package."""
    path = Path(origin)
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or any(
        path.is_relative_to(folder) for folder in _LIBRARIES
    )
