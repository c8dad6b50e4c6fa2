"""User code named by a SPEC: hashed before it runs, and run only if the user trusts it.

A run directory names the function that makes its network, so opening a run from someone else could
execute arbitrary code. Naming a function yourself, as with ``index --classifier``, makes it
trusted: its source is recorded outside the run, and the same source at the same path is run for any
run. Other code is run only inside ``trusting_code``.

A run keeps a copy of the sources, and from then on the copy is what runs: the original may change,
or be on another machine.
"""

import ast
import hashlib
import importlib
import importlib.abc
import inspect
import logging
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.machinery import ModuleSpec
from importlib.util import decode_source, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from ood_heatmap.errors import OodHeatmapError, UsageError

log = logging.getLogger(__name__)

# folder, beside the main module, of what it imports
_IMPORTS = "imports"
# part of this package
_OWN_CODE = {"ood_heatmap.demo:digits_network"}
_LIBRARIES = {
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).parent,
}
_trusting: ContextVar[bool] = ContextVar("trusting_code", default=False)


@contextmanager
def trusting_code(trust: bool = True) -> Iterator[None]:
    """Trust the code named by runs that are opened in this context."""
    token = _trusting.set(trust or _trusting.get())
    try:
        yield
    finally:
        _trusting.reset(token)


@dataclass(frozen=True)
class UserCode:
    """A function that makes a network, and the sources that it depends on.

    Args:
        module: A Python file, or the name of a module.
        function: Name of the function.
        kept: A copy of ``sources``, executed instead of what is on disk.
        place: Where the copy can be read, for messages.
    """

    module: str
    function: str
    kept: Mapping[str, bytes] | None = field(default=None, repr=False)
    place: str = ""

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"

    @cached_property
    def sources(self) -> dict[str, bytes]:
        """Source of the module, under "", and of everything it imports that is not a library.

        Imports are found by parsing, including those inside functions; nothing is executed.

        Raises:
            UsageError: There is no such module.
        """
        if self.kept is not None:
            return dict(self.kept)
        with self._importing():
            return _read_sources(self.module)

    def keep(self) -> "UserCode":
        """Return the same function with a copy of its sources; a library has none."""
        if self.kept is not None or (
            not self.module.endswith(".py") and _is_installed(self.module)
        ):
            return self
        return replace(self, kept=self.sources)

    def without_folder(self) -> "UserCode":
        """Return the same kept code, its file named without its folder; trusted if this is."""
        if self.kept is None or not self.module.endswith(".py"):
            return self
        renamed = replace(self, module=self._main, place="")
        if self._is_remembered():
            renamed.remember()
        return renamed

    @property
    def _main(self) -> str:
        """File name of the main module in ``kept_files``."""
        return Path(self.module).name if self.module.endswith(".py") else f"{self.module}.py"

    def kept_files(self) -> dict[str, bytes]:
        """Return the kept sources by file name, for ``from_kept_files``."""
        return {
            f"{_IMPORTS}/{name}.py" if name else self._main: source
            for name, source in (self.kept or {}).items()
        }

    def from_kept_files(self, files: Mapping[str, bytes], folder: Path | None) -> "UserCode":
        """Return the same function with the sources in ``kept_files``; as it is if there are none.

        Args:
            files: Sources by file name.
            folder: Where the files can be read, for messages.
        """
        if self._main not in files:
            return self
        kept = {
            name.removeprefix(f"{_IMPORTS}/").removesuffix(".py"): source
            for name, source in files.items()
            if name != self._main
        }
        place = str(folder / self._main) if folder else ""
        return replace(self, kept={"": files[self._main], **kept}, place=place)

    @cached_property
    def hash(self) -> str:
        """sha256 of the sources."""
        if len(self.sources) == 1:
            return hashlib.sha256(self.sources[""]).hexdigest()
        digest = hashlib.sha256()
        for name, source in sorted(self.sources.items()):
            digest.update(f"{name}\0{hashlib.sha256(source).hexdigest()}\n".encode())
        return digest.hexdigest()

    def make(self, num_classes: int | None) -> Any:
        """Import the module and call the function.

        Args:
            num_classes: Passed on if the function has an argument of this name.

        Raises:
            UsageError: The code fails, or the function is not defined in this module.
        """
        imported = [name for name in self.sources if name]
        if self.kept is not None:
            imported.append(self.module)
        with self._importing():
            # other code may have imported different modules under these names
            hidden = {name: sys.modules.pop(name) for name in imported if name in sys.modules}
            try:
                return self._call(num_classes)
            except UsageError:
                raise
            # user code may raise anything; a script without a main guard may exit
            except (Exception, SystemExit) as error:
                hint = ""
                if isinstance(error, ModuleNotFoundError) and self.kept is not None:
                    hint = " Import it with an import statement: a run keeps what those name."
                raise UsageError(f"{self} fails: {describe_error(error)}.{hint}") from error
            finally:
                sys.modules.update(hidden)

    def _call(self, num_classes: int | None) -> Any:
        """Import the module and call the function."""
        module = self._import()
        function = getattr(module, self.function, None)
        if not callable(function):
            raise UsageError(f"{self.module} has no function {self.function}.")
        home = getattr(function, "__module__", None)
        if home != module.__name__:
            raise UsageError(
                f"{self} is defined in {home}: use {home}:{self.function}, or define a function in "
                f"{self.module} that calls it."
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
                f"{self} cannot be called ({error}): it may take num_classes (--num-classes) and "
                "nothing else."
            ) from error
        return function(**arguments)

    def _import(self) -> ModuleType:
        """Import the module; a file is executed from the same bytes that were hashed."""
        if not self.module.endswith(".py"):
            return importlib.import_module(self.module)
        module = ModuleType(f"classifier_{Path(self.module).stem}_{self.hash[:8]}")
        module.__file__ = self.module
        # dataclasses look up the module of a class in sys.modules
        sys.modules[module.__name__] = module
        exec(compile(self.sources[""], self.module, "exec"), vars(module))
        return module

    @contextmanager
    def _importing(self) -> Iterator[None]:
        """Put the folder of a file first on ``sys.path``, as Python does for a script.

        Kept sources are imported from memory, and their folder is not searched.
        """
        folder = str(Path(self.module).parent)
        importlib.invalidate_caches()
        if self.kept is not None:
            finder = _KeptSources(self.module, self.kept)
            sys.meta_path.insert(0, finder)
            try:
                yield
            finally:
                sys.meta_path.remove(finder)
            return
        if self.module.endswith(".py"):
            sys.path.insert(0, folder)
        try:
            yield
        finally:
            if self.module.endswith(".py") and folder in sys.path:
                sys.path.remove(folder)

    def remember(self) -> None:
        """Record outside any run that the user trusts this function with this source."""
        marker = self._marker()
        try:
            marker.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            marker.write_text(f"{self}\n", "utf-8", errors="surrogateescape")
        except OSError as error:
            log.warning(
                "cannot record that you trust %s (%s): later commands need --trust-code",
                self,
                error,
            )

    def require_trust(self) -> None:
        """Refuse code that the user has not trusted.

        Raises:
            OodHeatmapError: The code is not trusted; the message names the file and function.
        """
        if _trusting.get() or str(self) in _OWN_CODE or self._is_remembered():
            return
        raise OodHeatmapError(
            f"the run's classifier is code that you have not run here before: function "
            f"{self.function} of {self.place or self.module}. Read it, then add --trust-code (in "
            "Python trust_code=True) to run it."
        )

    def _is_remembered(self) -> bool:
        """Return whether this function with this source was trusted before."""
        try:
            return self._marker().is_file()
        except OSError:
            return False

    def _marker(self) -> Path:
        """Return the file whose existence means trust; one per function, to avoid races.

        Its name depends on the path as well: the same source elsewhere may read other files.
        """
        state = os.environ.get("XDG_STATE_HOME", "")
        try:
            root = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
        except RuntimeError as error:
            raise OSError("there is no home directory") from error
        key = f"{self}\n{self.hash}".encode(errors="surrogateescape")
        return root / "ood_heatmap" / "trusted" / hashlib.sha256(key).hexdigest()


class _KeptSources(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports modules from sources in memory; ``__file__`` is where the original was.

    Args:
        module: Name or file of the main module.
        sources: Source of each module by name; that of the main module under "".
    """

    def __init__(self, module: str, sources: Mapping[str, bytes]) -> None:
        is_file = module.endswith(".py")
        self._folder = Path(module).parent if is_file else Path()
        self._sources = {name: source for name, source in sources.items() if name}
        if not is_file:
            self._sources[module] = sources[""]

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that was kept, or that is a package of one."""
        if fullname not in self._sources and not self.is_package(fullname):
            return None
        spec = spec_from_loader(fullname, self, is_package=self.is_package(fullname))
        if spec is not None:
            spec.origin = str(self._folder / f"{fullname.replace('.', '/')}.py")
            spec.has_location = True
        return spec

    def is_package(self, fullname: str) -> bool:
        """Return whether a module that was kept is inside this one."""
        return any(name.startswith(f"{fullname}.") for name in self._sources)

    def get_source(self, fullname: str) -> str:
        """Return the source of a module; none for a package that is only a folder."""
        return decode_source(self._sources.get(fullname, b""))


def describe_error(error: BaseException, length: int = 200) -> str:
    """Return an error's type, its first line, and the line of user code that raised it."""
    text = (str(error).strip().splitlines() or [""])[0][:length].rstrip(".")
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if not _is_library(frame.filename)]
    return f"{reason}, {lines[-1].filename} line {lines[-1].lineno}" if lines else reason


def _read_sources(module: str) -> dict[str, bytes]:
    """Return the sources of a module and of its imports, see ``UserCode.sources``."""
    if module.endswith(".py"):
        if not Path(module).is_file():
            raise UsageError(f"there is no file {module}.")
        name, origin = "", module
    else:
        found = _find(module)
        if found is None:
            raise UsageError(f"there is no module {module}: its folder must be on PYTHONPATH.")
        name, origin = module, found.origin or ""
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


def _is_installed(module: str) -> bool:
    """Return whether a module comes with Python or a package, or has no source."""
    found = _find(module)
    origin = (found and found.origin) or ""
    return _is_library(origin) or not Path(origin).is_file()


def _package(name: str, origin: str) -> str:
    """Return the package that relative imports of a module refer to."""
    return name if Path(origin).name == "__init__.py" else name.rpartition(".")[0]


def _imported_names(source: bytes, package: str) -> Iterator[str]:
    """Yield the full names of everything a source may import, packages before their modules."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # the import itself will fail with a message
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
    """Yield the packages that contain a module, and the module."""
    parts = name.split(".")
    yield from (".".join(parts[: depth + 1]) for depth in range(len(parts)))


def _find(name: str) -> ModuleSpec | None:
    """Find a module as ``import`` would, without executing the packages that contain it."""
    found, path = None, None
    for full_name in _with_packages(name):
        try:
            found = _find_in(full_name, path)
        except KeyError:
            # folders without __init__.py ask for the module of the folder above, not imported here
            found = _find_in(full_name.rpartition(".")[2], path)
        if found is None:
            return None
        path = found.submodule_search_locations
    return found


def _find_in(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Return the first spec that a finder has for a module in a package with this path."""
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((item for item in specs if item is not None), None)


def _is_library(origin: str) -> bool:
    """Return whether a file belongs to Python, an installed package, or this package."""
    path = Path(origin)
    if not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
        return True
    installed = {Path(entry) for entry in sys.path if entry and _has_packages(entry)}
    return any(path.is_relative_to(folder) for folder in _LIBRARIES | installed)


@cache
def _has_packages(folder: str) -> bool:
    """Return whether packages were installed into a folder, as by ``pip install --target``."""
    return any(Path(folder).glob("*.dist-info"))
