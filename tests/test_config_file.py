"""Options from a YAML file: as if typed, refused by name if unknown; and the file of a run."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from ood_heatmap.cli import main
from ood_heatmap.cli_stages import plan
from ood_heatmap.config_file import _options_of, save_config
from ood_heatmap.options import Command, CommandGroup, existing_run, options, trust_option
from ood_heatmap.pipeline.config import Option, Rgb, Settings


@dataclass(frozen=True, kw_only=True)
class Example(Settings):
    source: Annotated[tuple[str, ...], Option("Images.", "Data", flag="--id")]
    epochs: Annotated[int, Option("Passes.", "Training", min=1)] = 2
    lr: Annotated[float, Option("Rate.", "Training")] = 1.0
    mean: Annotated[Rgb | None, Option("Mean of channels.", "Data")] = None
    pictures: Annotated[bool, Option("Write pictures.", "Output")] = True
    weights: Annotated[Path | None, Option("Weights.", "Data", path="file")] = None
    workers: Annotated[int, Option("Threads.", "Speed", affects_result=False)] = 1


received: list[Example] = []


@click.group(cls=CommandGroup)
def group() -> None:
    pass


@group.command()
@existing_run
@options(config=Example)
@trust_option
def learn(run: Path, config: Example) -> None:
    received.append(config)
    save_config(run)


@group.group("plan", cls=CommandGroup)
def plans() -> None:
    pass


@plans.command("learn")
@options(config=Example)
def plan_learn(config: Example) -> None:
    received.append(config)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Return a function that runs a command with a config file and returns what it received."""
    monkeypatch.chdir(tmp_path)

    def invoke(text: str | bytes, *arguments: str) -> tuple[Result, list[Example]]:
        content = text.encode() if isinstance(text, str) else text
        (tmp_path / "run.yaml").write_bytes(content)
        received.clear()
        return CliRunner().invoke(group, arguments), list(received)

    return invoke


AFTER = ("learn", ".", "--config", "run.yaml")
BEFORE = ("--config", "run.yaml", "learn", ".")


@pytest.mark.parametrize("arguments", [AFTER, BEFORE, ("plan", *AFTER[:1], *AFTER[2:])])
def test_options_are_taken_as_if_they_had_been_typed(call, arguments):
    text = """
learn:
  id: [a, "b c"]
  epochs: 7
  lr: 1e-3
  mean: [0.1, 0.2, 0.3]
  pictures: false
  weights: no
"""
    result, (found,) = call(text, *arguments)
    assert result.exit_code == 0, result.output
    assert found == Example(
        source=("a", "b c"),
        epochs=7,
        lr=0.001,
        mean=(0.1, 0.2, 0.3),
        pictures=False,
        weights=Path("no"),
    )


def test_what_is_given_wins_over_the_file_and_the_file_over_the_default(call):
    text = "learn: {id: a, epochs: 7, pictures: false}"
    _, (found,) = call(text, *AFTER, "--id", "b", "--pictures")
    assert found == Example(source=("b",), epochs=7, pictures=True)
    _, (found,) = call("learn:\n  id: a", *AFTER)
    assert found == Example(source=("a",))


def test_sections_of_other_commands_change_nothing(call):
    assert call("plan: {}\nlearn: {id: a}", *AFTER)[1] == [Example(source=("a",))]
    assert "Missing option '--id'" in call("plan: {}", *AFTER)[0].output
    assert "Missing option '--id'" in call("", *AFTER)[0].output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learn: {epoch: 3}", "run.yaml: learn has no option 'epoch': did you mean 'epochs'?"),
        ("lern: {}", "run.yaml: there is no command 'lern': did you mean 'learn'?"),
        ("xyz: {}", "there is no command 'xyz': there are learn, plan."),
        ("learn: {epochs: x}", "Invalid value for '--epochs': 'x' is not a valid integer"),
        ("learn: {epochs: 1.5}", "'1.5' is not a valid integer"),
        ("learn: {epochs: true}", "'true' is not a valid integer"),
        ("learn: {epochs: [1, 2]}", "'1,2' is not a valid integer"),
        ("learn: {epochs: 0}", "0 is not in the range x>=1"),
        ("learn: {pictures: maybe}", "'maybe' is not a valid boolean"),
        ("learn: {id: {a: b}}", "learn.id must be a value or a list of values"),
        ("learn: 3", "learn must be a section of options"),
        ("- learn", "must have a section for each command"),
        ("learn: {id: a, id: b}", "run.yaml, line 1: 'id' is there twice"),
        ("learn: {}\nlearn: {}", "run.yaml, line 2: 'learn' is there twice"),
        ("learn: {[a]: b}", "is not a name"),
        ("learn: {", "cannot read run.yaml as YAML (while parsing"),
        (b"\xff", "cannot read run.yaml as YAML ('utf-8' codec"),
        # what acts before the command starts is not for a file, which may come from someone else
        ("learn: {trust-code: true}", "learn has no option 'trust-code'"),
        ("learn: {config: other.yaml}", "learn has no option 'config'"),
    ],
)
@pytest.mark.parametrize("arguments", [AFTER, BEFORE])
def test_what_is_wrong_with_a_file_is_one_line(call, text, words, arguments):
    result, found = call(text, *arguments, "--id", "a")
    assert result.exit_code == 2, result.output
    assert [line for line in result.output.splitlines() if words in line]
    assert result.output.splitlines()[-1].startswith("Error: ")
    assert isinstance(result.exception, SystemExit)
    assert found == []


def test_a_file_that_is_not_there_is_one_line(call):
    result, _ = call("", "learn", ".", "--config", "missing.yaml")
    assert result.exit_code == 2
    assert "'missing.yaml' does not exist" in result.output


def test_the_file_of_a_run_gives_the_same_options_again(call, tmp_path):
    given = ["--id", "caf\u00e9: [x]", "--id", "\U0001f600", "--epochs", "7", "--lr", "1e-05"]
    given += ["--mean", "0.1,0.2,0.3", "--no-pictures", "--weights", "\udcff.pt", "--workers", "3"]
    _, (found,) = call("", "learn", ".", *given)
    saved = (tmp_path / "run.yaml").read_bytes()
    _, (again,) = call(saved, *AFTER, "--workers", "3")
    assert again == found
    # what changes no result is for the machine
    assert "workers" not in yaml.safe_load(saved)["learn"]
    assert (tmp_path / "run.yaml").read_bytes() == saved


def test_each_stage_replaces_its_section_of_the_file_and_no_other(call, tmp_path):
    call('evaluate:\n  ood: ["a"]\nlearn:\n  id: old\n', "learn", ".", "--id", "new")
    saved = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert saved["evaluate"] == {"ood": ["a"]}
    assert saved["learn"] == {"id": ["new"], "epochs": 2, "lr": 1.0, "pictures": True}


def test_a_run_that_cannot_be_written_is_no_error_at_the_end_of_a_stage(call, tmp_path, caplog):
    (tmp_path / "run.yaml.d").mkdir()
    target = tmp_path / "other"
    (target / "run.yaml").mkdir(parents=True)
    result, found = call("", "learn", "other", "--id", "a")
    assert result.exit_code == 0
    assert len(found) == 1
    assert re.search("cannot write .*run.yaml", caplog.text)


def test_every_command_takes_the_options_of_the_file_of_a_run(run):
    """A run that was made by the functions has none; one made by commands has all stages."""
    result = CliRunner().invoke(main, ["train", str(run), "--overwrite", "--epochs", "1"])
    assert result.exit_code == 0, result.output
    path = run / "run.yaml"
    saved: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())
    options = json.loads((run / "decoder" / "manifest.json").read_text())["inputs"]["options"]
    assert saved["train"]["epochs"] == options["epochs"] == 1
    assert saved["train"]["lr"] == options["lr"]
    assert saved.keys() == {"train"}
    # complete already: every option is the same
    result = CliRunner().invoke(main, ["train", str(run), "--config", str(path)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "command", [*main.commands.values(), *plan.commands.values()], ids=lambda item: item.name
)
def test_every_option_has_a_name_that_a_file_can_use(command):
    assert isinstance(command, Command)
    for option in _options_of(command):
        assert option.opts[0].startswith("--")
