"""Options from a YAML file, and the file in a run that has the options of its stages.

A file has a section for each command, with the names of its options without the leading dashes::

    train:
      epochs: 150
      stack: dcgan

Every value is read as if it had been typed on the command line, so ``1e-3`` is a number and ``no``
is text. PyYAML is loaded with the first file: ``--help`` reads this module.
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import click

from ood_heatmap.errors import OodHeatmapError, UsageError, printable
from ood_heatmap.pipeline.config import Settings, option_fields

_log = logging.getLogger(__name__)
_FILE_NAME = "run.yaml"
_CHOSEN = "ood_heatmap.chosen"
_HEADER = """\
# Options of the stages of this run, as far as their results depend on them. To make another:
#     ood-heatmap index OTHER_RUN --config run.yaml
# then targets, train and evaluate likewise. Relative paths begin at the working directory.
"""
# as written by save_config
_SECTION = re.compile(r"^([\w-]+):\n((?: .*\n)*)", re.MULTILINE)
# by command, then by option
_Sections: TypeAlias = dict[str, dict[str, Any]]


def use_config(context: click.Context, path: Path) -> None:
    """Take the options that are not given from a file, for a command or those of a group.

    Raises:
        UsageError: The file is not such a file, or names a command or an option that is not there.
    """
    root = context.find_root().command
    commands = root.commands if isinstance(root, click.Group) else {str(root.name): root}
    sections: _Sections = {}
    for name, values in _read(path).items():
        command = commands[_require(name, commands, f"{path}: there is no command")]
        known = {option.opts[0].lstrip("-"): option for option in _options_of(command)}
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {name} must be a section of options, such as 'seed: 1'.")
        sections[name] = {}
        for key, value in values.items():
            option = known[_require(key, known, f"{path}: {name} has no option")]
            sections[name][str(option.name)] = _to_default(option, value, f"{path}: {name}.{key}")
    if not isinstance(context.command, click.Group):
        context.default_map = sections.get(str(context.command.name), {})
        return
    # the commands of a group below, `plan`, have the options of the stages
    groups = [name for name, item in commands.items() if isinstance(item, click.Group)]
    context.default_map = {**sections, **dict.fromkeys(groups, sections)}


def _options_of(command: click.Command) -> Iterable[click.Option]:
    """Return the options of a command that are parameters of its function.

    The others act before it starts, such as ``--trust-code``, which a file must not set.
    """
    return (item for item in command.params if isinstance(item, click.Option) and item.expose_value)


def _require(name: str, known: Iterable[str], problem: str) -> str:
    """Return the name, or raise ``UsageError`` with the nearest known one."""
    names = list(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1)
    remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}."
    raise UsageError(f"{problem} {printable(name)!r}: {remedy}")


def _to_default(option: click.Option, value: Any, where: str) -> Any:
    """Return a value in the form in which click takes a default."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise UsageError(f"{where} must be a value or a list of values.")
    if option.multiple:
        return values
    if isinstance(value, list):
        # such as the mean of the channels
        return ",".join(values)
    return value


def _read(path: Path) -> _Sections:
    """Read a YAML file; all scalars are texts.

    Raises:
        UsageError: The file cannot be read or parsed, or names something twice.
    """
    import yaml

    try:
        node = yaml.compose(path.read_text("utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot read {path} as YAML ({printable(reason)}).") from error
    content = {} if node is None else _from_node(node, path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} must have a section for each command, such as 'train:'.")
    return content


def _from_node(node: Any, path: Path) -> Any:
    """Convert a YAML node to dictionaries, lists and texts; an alias is its anchor's content."""
    if node.id == "sequence":
        return [_from_node(item, path) for item in node.value]
    if node.id == "scalar":
        return node.value
    content = {}
    for key, value in node.value:
        name = _from_node(key, path)
        if not isinstance(name, str) or name in content:
            problem = "is there twice" if isinstance(name, str) else "is not a name"
            line = key.start_mark.line + 1
            raise UsageError(f"{path}, line {line}: {printable(str(name))!r} {problem}.")
        content[name] = _from_node(value, path)
    return content


def choose(settings: Iterable[Settings]) -> None:
    """Keep the settings of the command that runs, for ``save_config``."""
    chosen = {}
    for item in settings:
        for field in option_fields(type(item)):
            value = getattr(item, field.name)
            if field.option is None or not field.option.affects_result or value in (None, (), ""):
                continue
            if isinstance(value, tuple | Path):
                value = list(value) if isinstance(value, tuple) else str(value)
            chosen[field.flag.lstrip("-")] = value
    click.get_current_context().meta[_CHOSEN] = chosen


def save_config(run: Path) -> None:
    """Write the settings of the command that runs to its section of ``run.yaml`` of a run.

    Values are JSON, of which YAML is a superset: a command needs no PyYAML at its end.
    """
    from ood_heatmap.cache.files import write_bytes

    if os.environ.get("RANK", "0") != "0":
        return
    context, path = click.get_current_context(), run / _FILE_NAME
    try:
        # a link in a run of someone else could point to any file
        is_file = path.is_file() and not path.is_symlink()
        text = path.read_text("utf-8", "replace") if is_file else ""
        sections = dict(_SECTION.findall(text))
        sections[str(context.command.name)] = "".join(
            f"  {key}: {json.dumps(value, ensure_ascii=False)}\n"
            for key, value in context.meta[_CHOSEN].items()
        )
        text = "".join(f"{name}:\n{lines}" for name, lines in sections.items())
        # a byte of a file name that is not UTF-8 is an escape of JSON then
        write_bytes(path, (_HEADER + text).encode("utf-8", "backslashreplace"))
    except (OSError, OodHeatmapError) as error:
        # the stage is complete: do not fail because of this file
        _log.warning("%s", error)
