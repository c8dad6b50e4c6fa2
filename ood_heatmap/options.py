"""Click options made from the settings dataclasses, and commands that list them by group."""

import contextlib
import errno
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from ood_heatmap.config_file import choose, use_config
from ood_heatmap.cores import local_world_size, num_cores
from ood_heatmap.errors import OodHeatmapError, UsageError, printable
from ood_heatmap.output import choose_level
from ood_heatmap.pipeline.config import (
    COMMAND_LINE,
    Field,
    Group,
    Option,
    Rgb,
    Settings,
    option_fields,
)

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_Decorator = Callable[[_Decorated], _Decorated]
_LOG = logging.getLogger("ood_heatmap")
_PATHS = {
    "file": click.Path(dir_okay=False, path_type=Path),
    "folder": click.Path(file_okay=False, path_type=Path),
    "run": click.Path(exists=True, file_okay=False, path_type=Path),
}


class GroupedOption(click.Option):
    """An option listed under the heading of its group in ``--help``."""

    def __init__(self, *arguments: Any, group: Group = "Other", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group = group


class Command(click.Command):
    """A command with grouped options, one-line errors, ``--config``, ``-v`` and ``-q``."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, including those that every command has."""
        *own, help_option = super().get_params(ctx)
        return [*own, *_COMMON, help_option]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each group, required options first."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in get_args(Group)}
        # newer versions of click have help records for arguments as well
        params = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for param in sorted(params, key=lambda param: not param.required):
            record = param.get_help_record(ctx)
            if record is not None:
                groups[getattr(param, "group", "Other")].append(record)
        names = [name for records in groups.values() for name, _ in records]
        # one width for all sections: click would align each section separately
        width = max((len(name) for name in names if len(name) <= 30), default=0)
        for group, records in groups.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl([(name.ljust(width), text) for name, text in records])

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of the help, not truncated."""
        paragraph = " ".join((self.help or "").split("\n\n")[0].split())
        return paragraph.partition(". ")[0].removesuffix(".") + "."

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error that the user can fix is reported in one line.

        There is no traceback, and the exit code is 1, or 2 with the usage of this command.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted: run the same command again to resume.", err=True)
            sys.exit(130)
        except (OodHeatmapError, OSError, MemoryError, EOFError) as error:
            _LOG.debug("traceback", exc_info=True)
            if isinstance(error, OSError) and error.errno in (None, errno.EPIPE):
                raise
            raise _click_error(error, ctx) from error
        except RuntimeError as error:
            # also click's own exit, and nothing here loads PyTorch
            if "torch" not in sys.modules:
                raise
            from ood_heatmap.devices import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            _LOG.debug("traceback", exc_info=True)
            reason = str(error).partition("\n")[0]
            raise _click_error(MemoryError(reason), ctx) from error


def _click_error(error: Exception, ctx: click.Context) -> Exception:
    """Return the exception that click reports for an error."""
    if isinstance(error, UsageError):
        return click.UsageError(printable(str(error)), ctx)
    if isinstance(error, EOFError):
        # click itself would print no more than "Aborted!"
        return RuntimeError(f"a file ended too early: {error}")
    if isinstance(error, MemoryError):
        return click.ClickException(
            f"out of memory ({error}). Use a smaller --batch-size or fewer --workers."
        )
    if isinstance(error, OSError):
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return click.ClickException(printable(f"{name}{error.strerror}."))
    return click.ClickException(printable(str(error)))


class CommandGroup(Command, click.Group):
    """A group that lists its commands in the order in which they were defined."""

    command_class = Command
    group_class = type

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; keep the command line for the manifests of stages."""
        # kept if this is a group inside another
        ctx.meta.setdefault(COMMAND_LINE, shlex.join([ctx.info_name or "ood-heatmap", *args]))
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in order."""
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, then the options."""
        self.format_commands(ctx, formatter)
        Command.format_options(self, ctx, formatter)


class _RgbType(click.ParamType):  # type: ignore[type-arg]
    """Three numbers, one per channel: 0.49,0.48,0.45."""

    name = "R,G,B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is not three numbers such as 0.49,0.48,0.45", param, ctx)
        return numbers


def options(**kinds: type[Settings]) -> _Decorator[Any]:
    """Add options to a command: one for each described field of some settings dataclasses.

    Args:
        **kinds: Maps each parameter of the command to the dataclass that it receives.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def run(**arguments: Any) -> Any:
            filled = {
                name: kind(
                    **{
                        field.name: arguments.pop(field.name)
                        for field in option_fields(kind)
                        if field.option is not None
                    }
                )
                for name, kind in kinds.items()
            }
            for settings in filled.values():
                _LOG.debug("%s", settings)
            choose(filled.values())
            return command(**filled, **arguments)

        for kind in reversed(kinds.values()):
            for field in reversed(option_fields(kind)):
                if field.option is not None:
                    run = _click_option(field, field.option)(run)
        return run

    return decorate


def _click_option(field: Field, option: Option) -> _Decorator[Any]:
    """Return the click option of one field."""
    flag = field.flag
    settings: dict[str, Any] = {
        "cls": GroupedOption,
        "group": option.group,
        "help": option.help,
        "metavar": option.metavar,
        "required": field.is_required,
    }
    if field.default is None:
        settings["show_default"] = option.unset or False
    elif not field.is_required and field.default != ():
        settings |= {"default": field.default, "show_default": field.default != ""}
    if field.type is bool:
        settings["is_flag"] = True
        # a flag that is on by default is switched off by --no-...
        flag = f"{flag}/--no-{flag.removeprefix('--')}" if field.default else flag
    elif get_origin(field.type) is tuple and field.type is not Rgb:
        settings |= {"multiple": True, "type": _click_type(get_args(field.type)[0], option)}
    else:
        settings["type"] = _click_type(field.type, option)
    return click.option(flag, field.name, **settings)


def _click_type(type_: Any, option: Option) -> Any:
    """Return the click type of a field: a choice, a range, a path or a plain type."""
    if NoneType in get_args(type_):
        (type_,) = (part for part in get_args(type_) if part is not NoneType)
    if get_origin(type_) is Literal:
        return click.Choice(get_args(type_))
    if type_ is Path:
        return _PATHS[option.path]
    if type_ == Rgb:
        return _RgbType()
    if type_ not in (int, float) or (option.min is None and option.max is None):
        return type_
    bounds: tuple[Any, ...] = (option.min, option.max, option.min_open, option.max_open)
    return click.IntRange(*bounds) if type_ is int else click.FloatRange(*bounds)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files, often 1,024 or 256, to the hard one."""
    # Windows has no such limit, macOS refuses its own hard limit
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def share_cores() -> None:
    """Give each rank its share of the cores, unless the user has set ``OMP_NUM_THREADS``.

    torchrun sets it to 1, which leaves most cores idle: PyTorch, BLAS and FAISS all follow it. Call
    this before they are imported: they read the variable once.
    """
    if (
        local_world_size() > 1
        and os.environ.get("OMP_NUM_THREADS") == "1"
        and not _is_set_in_parent()
    ):
        os.environ["OMP_NUM_THREADS"] = str(num_cores())


def _is_set_in_parent() -> bool:
    """Return whether torchrun itself was started with ``OMP_NUM_THREADS``; True if unknown."""
    try:
        # the environment at the start of the process, without what it sets for its children
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True
    return b"\0OMP_NUM_THREADS=" in b"\0" + environment


def _verbosity(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    """Return the callback of a flag that sets the log level, before or after the command name."""

    def callback(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            choose_level(ctx, level)

    return callback


def _take_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take the options that are not given from a file."""
    if path is not None:
        try:
            use_config(context, path)
        except UsageError as error:
            raise click.UsageError(printable(str(error)), context) from error


_COMMON = [
    GroupedOption(
        ["--config"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        # before the options whose defaults it sets
        is_eager=True,
        expose_value=False,
        callback=_take_config,
        help="YAML file with a section for each command: options that are not given are taken from "
        "it. It can name code to run.",
    ),
    GroupedOption(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=_verbosity(logging.DEBUG),
        help="Log details for debugging.",
    ),
    GroupedOption(
        ["-q", "--quiet"],
        is_flag=True,
        expose_value=False,
        callback=_verbosity(logging.WARNING),
        help="Print results, warnings and errors only, no progress.",
    ),
]


new_run = click.argument("run", type=click.Path(file_okay=False, path_type=Path))
existing_run = click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
run_or_bundle = click.argument("run", type=click.Path(exists=True, path_type=Path))
device_option = click.option(
    "--device",
    cls=GroupedOption,
    group="Speed",
    default="auto",
    help="Device to compute on: auto, cpu, cuda or cuda:N.",
)


def _trust_code(context: click.Context, _: click.Parameter, trust: bool) -> None:
    """Allow the command to run the model code that RUN names."""
    if trust:
        from ood_heatmap.user_code import trusting_code

        context.with_resource(trusting_code())


trust_option = click.option(
    "--trust-code",
    cls=GroupedOption,
    group="Other",
    is_flag=True,
    expose_value=False,
    callback=_trust_code,
    help="Run the model code that RUN names, even if you have not run it here before.",
)
