"""Options of the commands: made from the dataclasses of settings, which are the only place."""

import errno
import os
import re
import subprocess
import sys
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ood_heatmap.cli import main
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.options import Command, options
from ood_heatmap.pipeline import config as settings
from ood_heatmap.pipeline.config import (
    AuditConfig,
    EvaluateConfig,
    IndexConfig,
    LocalizeConfig,
    Option,
    PredictConfig,
    Rgb,
    Settings,
    TargetsConfig,
    TrainConfig,
    result_options,
)

STAGES = [IndexConfig, TargetsConfig, TrainConfig, EvaluateConfig, LocalizeConfig]


@dataclass(frozen=True, kw_only=True)
class Shared(Settings):
    workers: Annotated[int, Option("Number of threads.", "Speed", min=1)] = 2


@dataclass(frozen=True, kw_only=True)
class Example(Shared):
    source: Annotated[str, Option("Images to read.", "Data", flag="--id", metavar="SOURCE")]
    kind: Annotated[Literal["a", "b"], Option("Kind of thing.", "Training")] = "a"
    share: Annotated[float, Option("Share of it.", "Training", min=0, max=1, min_open=True)] = 0.5
    limit: Annotated[int | None, Option("How many.", "Data", unset="all")] = None
    mean: Annotated[Rgb | None, Option("Mean of channels.", "Data")] = None
    near: Annotated[tuple[str, ...], Option("Near set; may be repeated.", "Data")] = ()
    weights: Annotated[Path | None, Option("Weights to load.", "Data", path="file")] = None
    pictures: Annotated[bool, Option("Write pictures.", "Output")] = True
    overwrite: Annotated[bool, Option("Write again.", "Output", affects_result=False)] = False
    hidden: int = 7


def call(*arguments: str, terminal_width: int = 100):
    """Return the result of a command with the options of ``Example``, and what it received."""
    received = []

    @click.command(cls=Command, context_settings={"show_default": True})
    @options(config=Example)
    def command(config: Example) -> None:
        received.append(config)

    result = CliRunner().invoke(command, arguments, terminal_width=terminal_width)
    return result, received


def test_the_help_is_that_of_the_fields_by_group():
    result, _ = call("--help")
    assert (
        result.output
        == """\
Usage: command [OPTIONS]

Data:
  --id SOURCE                 Images to read.  [required]
  --limit INTEGER             How many.  [default: (all)]
  --mean R,G,B                Mean of channels.
  --near TEXT                 Near set; may be repeated.
  --weights FILE              Weights to load.

Training:
  --kind [a|b]                Kind of thing.  [default: a]
  --share FLOAT RANGE         Share of it.  [default: 0.5; 0<x<=1]

Speed:
  --workers INTEGER RANGE     Number of threads.  [default: 2; x>=1]

Output:
  --pictures / --no-pictures  Write pictures.  [default: pictures]
  --overwrite                 Write again.

Other:
  --config FILE               YAML file with a section for each command: options that are not given
                              are taken from it. It can name code to run.
  -v, --verbose               Log details for debugging.
  -q, --quiet                 Print results, warnings and errors only, no progress.
  --help                      Show this message and exit.
"""
    )


def test_a_command_receives_its_dataclass():
    assert call("--id", "x")[1] == [Example(source="x")]
    given = ["--id", "y", "--kind", "b", "--share", "1", "--limit", "3", "--mean", "1,2,3"]
    given += ["--near", "p", "--near", "q", "--weights", "w", "--no-pictures", "--overwrite"]
    expected = Example(
        source="y",
        kind="b",
        share=1.0,
        limit=3,
        mean=(1, 2, 3),
        near=("p", "q"),
        weights=Path("w"),
        pictures=False,
        overwrite=True,
    )
    assert call(*given)[1] == [expected]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing option '--id'"),
        (["--id", "x", "--workers", "0"], "0 is not in the range x>=1"),
        (["--id", "x", "--workers", "1.5"], "'1.5' is not a valid integer"),
        (["--id", "x", "--share", "0"], "0.0 is not in the range 0<x<=1"),
        (["--id", "x", "--kind", "c"], "'c' is not one of 'a', 'b'"),
        (["--id", "x", "--mean", "1,2"], "'1,2' is not three numbers"),
        (["--id", "x", "--mean", "1,2,nan"], "'1,2,nan' is not three numbers"),
        (["--id", "x", "--weights", "/"], "File '/' is a directory"),
    ],
)
def test_what_is_out_of_bounds_is_a_usage_error(arguments, words):
    result, received = call(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert received == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("no set 'a\nb'."), "Error: no set 'a\\nb'."),
        (OodHeatmapError("no image \x1b[31m."), "Error: no image \\x1b[31m."),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "Error: /x/y: No space left"),
        (OSError(errno.EMFILE, "Too many open files"), "Error: Too many open files."),
        (PermissionError(errno.EACCES, "Permission denied", b"/x"), "Error: /x: Permission denied"),
        (MemoryError("274 GiB"), "Error: out of memory (274 GiB). Use a smaller --batch-size"),
        (torch.OutOfMemoryError("274 GiB"), "Error: out of memory (274 GiB). Use a smaller"),
    ],
)
def test_what_a_user_or_the_machine_can_fix_is_one_line(error, line):
    @click.command(cls=Command)
    def command() -> None:
        raise error

    result = CliRunner().invoke(command)
    assert result.exit_code == (2 if isinstance(error, UsageError) else 1)
    assert result.output.splitlines()[-1].startswith(line)
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("error", [EOFError("no data"), OSError("broken image"), KeyError("x")])
def test_what_only_a_programmer_can_fix_keeps_its_traceback(error):
    @click.command(cls=Command)
    def command() -> None:
        raise error

    result = CliRunner().invoke(command)
    assert result.exception is not None
    assert error in (result.exception, result.exception.__cause__)
    assert not isinstance(result.exception, SystemExit)
    assert "Aborted" not in result.output


def test_a_field_affects_the_result_unless_it_says_otherwise():
    everything = {field.name for field in fields(Example)}
    assert set(result_options(Example(source="x"))) == everything - {"overwrite"}
    assert result_options(Example(source="x"))["hidden"] == 7


@pytest.mark.parametrize("kind", STAGES)
def test_the_fingerprint_leaves_out_what_cannot_change_a_result(kind):
    config = kind()
    without = {field.name for field in fields(config)} - set(result_options(config))
    irrelevant = {"batch_size", "workers", "overwrite", "allow_suspicious", "feed", "step"}
    irrelevant |= {"deterministic", "log"}
    assert without <= irrelevant
    assert ("batch_size" in without) == (kind is not TrainConfig)
    for name, value in result_options(config).items():
        changed = copy(config)
        object.__setattr__(changed, name, (value, "other"))
        assert result_options(changed) != result_options(config)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (TrainConfig, {"epochs": 0}, "--epochs must be at least 1, got 0."),
        (TrainConfig, {"lr": 0.0}, "--lr must be above 0, got 0.0."),
        (TrainConfig, {"lr": float("nan")}, "--lr must be above 0, got nan."),
        (TrainConfig, {"noise": float("inf")}, "--noise must be at least 0, got inf."),
        (TrainConfig, {"region_weight": 1.5}, "--region-weight must be at least 0 and at most 1,"),
        (TrainConfig, {"schedule": "linear"}, "--schedule must be one of cosine, constant, got"),
        (EvaluateConfig, {"false_alarm": 1}, "--false-alarm must be above 0 and below 1, got 1."),
        (TargetsConfig, {"seed": -1}, "--seed must be at least 0 and at most 4294967295, got -1."),
        (LocalizeConfig, {"workers": 10**6}, "--workers must be at least 1 and at most 256, got"),
    ],
)
def test_choices_and_bounds_hold_in_python_too(kind, given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        kind(**given)


@pytest.mark.parametrize("kind", [TargetsConfig, TrainConfig, EvaluateConfig, LocalizeConfig])
def test_every_seed_is_one_that_numpy_and_pytorch_take(kind):
    for seed in (0, 2**32 - 1):
        np.random.default_rng(kind(seed=seed).seed)
        torch.Generator().manual_seed(kind(seed=seed).seed)
    with pytest.raises(UsageError, match="--seed must be"):
        kind(seed=-1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--seed", "-1"],
        ["train", "--noise", "nan"],
        ["train", "--lr", "inf"],
        ["targets", "--ood", "nowhere", "--patched", "inf"],
        ["plan", "train", "--noise", "inf"],
    ],
)
def test_numbers_that_are_none_are_usage_errors(run, arguments):
    verb = arguments[: 2 if arguments[0] == "plan" else 1]
    result = CliRunner().invoke(main, [*verb, str(run), *arguments[len(verb) :]])
    assert result.exit_code == 2
    assert f"Usage: ood-heatmap {' '.join(verb)} " in result.output
    assert arguments[-2] in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "flag", "help_text", "kind", "default"),
    [
        ("index", "--size", "Side of the classifier's square input, in pixels.", "x>=4", None),
        ("targets", "--limit", "Number of OOD images to draw at random.", "x>=1", None),
        ("targets", "--seed", "Random seed of the draw, of patches and of random pairing.", "", 0),
        ("train", "--epochs", "Passes over all ID and OOD images.", "x>=1", 20),
        ("train", "--batch-size", "Images per training step, over all devices.", "x>=2", 200),
        ("train", "--lr", "Learning rate of Adam.", "x>0", 1e-3),
        ("evaluate", "--batch-size", "Images per forward pass of the classifier.", "x>=1", 256),
        ("evaluate", "--false-alarm", "Share of ID images that may be called OOD.", "0<x<1", 0.05),
        ("predict", "--batch-size", "Images per forward pass of the classifier.", "x>=1", 64),
        (
            "localize",
            "--workers",
            "Threads that decode images; 3 or more are processes.",
            "1<=x<=256",
            None,
        ),
        ("verify", "--samples", "Targets to recompute by brute force.", "x>=0", 200),
    ],
)
def test_options_of_the_commands_word_for_word(command, flag, help_text, kind, default):
    (option,) = (item for item in main.commands[command].params if flag in item.opts)
    assert option.help == help_text
    assert kind in str(option.type)
    if default is not None:
        assert option.get_default(click.Context(main.commands[command])) == default


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(1, 1, 1), (2, 1, 1), (16, 1, 15), (128, 8, 15), (256, 1, 32)]
)
@pytest.mark.parametrize("kind", [IndexConfig, AuditConfig, PredictConfig])
def test_as_many_workers_as_a_process_has_cores_but_one(monkeypatch, kind, cores, ranks, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert kind().num_workers == workers
    assert kind(workers=2).num_workers == 2


def test_help_says_where_the_number_of_workers_is_from():
    result = CliRunner().invoke(main, ["targets", "--help"])
    assert "[default: (from the cores); 1<=x<=256]" in " ".join(result.output.split())


def test_choices_of_the_commands_word_for_word():
    expected = {
        ("targets", "pairing"): ["nearest", "random", "any", "scrambled"],
        ("targets", "patch_shapes"): ["mixed", "squares"],
        ("train", "schedule"): ["cosine", "constant"],
        ("train", "stack"): ["split", "plain", "dcgan"],
        ("train", "target"): ["presence", "signed", "magnitude"],
        ("train", "feed"): ["auto", "resident", "memory", "streaming", "pinned"],
        ("train", "precision"): ["auto", "float32", "bfloat16"],
        ("train", "step"): ["auto", "eager", "compiled", "graph", "plain"],
        ("evaluate", "protocol"): ["all", "paper", "openood"],
        ("predict", "format"): ["csv", "jsonl"],
        ("export", "format"): ["onnx", "torch"],
    }
    for (command, name), choices in expected.items():
        (option,) = (item for item in main.commands[command].params if item.name == name)
        assert isinstance(option.type, click.Choice)
        assert list(option.type.choices) == choices


def every_command(group: click.Group, path: str = ""):
    for name, command in group.commands.items():
        yield f"{path} {name}".strip(), command
        if isinstance(command, click.Group):
            yield from every_command(command, name)


@pytest.mark.parametrize(("path", "command"), list(every_command(main)))
def test_every_help_is_a_sentence_that_stands_alone(path, command):
    assert f"ood-heatmap {path} " in command.help
    for item in command.params:
        if isinstance(item, click.Option):
            text = item.help or ""
            assert re.fullmatch(r"[A-Z].+\.", text), item.opts
            # what begins so needs another line to be understood
            assert not re.match(r"(Of|On|That|The very|Those) ", text), item.opts


def test_settings_import_nothing_heavy():
    assert "import torch" not in Path(settings.__file__).read_text("utf-8")


def test_a_command_may_open_as_many_files_as_the_system_allows(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        CliRunner().invoke(main, ["verify", str(tmp_path)])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def cores_under_torchrun(ranks: int, *, user: dict[str, str]) -> str:
    """Return OMP_NUM_THREADS of one of several ranks on 12 cores, by two processes.

    The first stands for torchrun: it sets the variable for its children unless the user has.
    """
    child = (
        "import os; os.sched_getaffinity = lambda _: range(12)\n"
        "from ood_heatmap.options import share_cores\n"
        "share_cores(); print(os.environ['OMP_NUM_THREADS'])"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"os.environ['LOCAL_WORLD_SIZE'] = '{ranks}'\n"
        "os.environ.setdefault('OMP_NUM_THREADS', '1')\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    others = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", parent],
        env={**others, **user},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="not Linux")
def test_ranks_share_the_cores_unless_the_user_says_otherwise():
    assert cores_under_torchrun(4, user={}) == "3"
    assert cores_under_torchrun(5, user={}) == "2"
    assert cores_under_torchrun(16, user={}) == "1"
    assert cores_under_torchrun(4, user={"OMP_NUM_THREADS": "1"}) == "1"
    assert cores_under_torchrun(4, user={"OMP_NUM_THREADS": "2"}) == "2"
    assert cores_under_torchrun(1, user={}) == "1"
