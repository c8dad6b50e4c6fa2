"""The command line: every command as typed; what is wrong ends in one line and an exit code."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ood_heatmap import __version__
from ood_heatmap.cli import main
from ood_heatmap.cli_stages import plan
from ood_heatmap.output import conclude
from ood_heatmap.pipeline.results import Results


def run_command(*arguments: object):
    return CliRunner().invoke(main, [str(item) for item in arguments])


def index_arguments(data, spec, run):
    weights = ["--weights", data / "weights.safetensors"]
    # its weights are random
    return [
        *("index", run, "--id", data / "id", "--classifier", spec, *weights),
        "--allow-suspicious",
    ]


def test_the_four_verbs_predict_and_verify_as_typed(data, spec, tmp_path):
    run = tmp_path / "run"
    sets = ["--ood", data / "far", "--ood", f"n={data / 'ood'}"]
    commands = [
        index_arguments(data, spec, run),
        ["targets", run, "--ood", data / "ood", "--limit", 40],
        ["train", run, "--epochs", 1, "--batch-size", 32, "--width", 16],
        # n is the OOD training set
        ["evaluate", run, "--id", data / "test", *sets, "--near", "n", "--allow-suspicious"],
        ["predict", run, data / "far", "--out", tmp_path / "out"],
        ["verify", run],
        ["localize", run, "--id", data / "test", *sets, "--count", 4],
    ]
    outputs = []
    for command in commands:
        result = run_command(*command, *([] if command[0] == "verify" else ["--device", "cpu"]))
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
    assert "accuracy" in outputs[0]
    assert "next: ood-heatmap targets" in outputs[0]
    assert "40 OOD images paired (nearest), faiss" in outputs[1]
    assert "mean all" in outputs[3]
    assert "25 images, scores in" in outputs[4]
    assert "40 of 40 paired again" in outputs[5]
    assert "shuffled weights" in outputs[6]
    for command in commands[:4]:  # each started again: nothing to do, same output
        assert run_command(*command, "--device", "cpu").exit_code == 0
    renamed = run_command("evaluate", run, "--id", data / "test", "--ood", f"m={data / 'ood'}")
    assert "images.far (given, now none)" in renamed.output
    metrics = run / "evaluation" / "metrics.json"
    metrics.write_text(metrics.read_text().replace("0.9", "0.8"))
    changed = run_command(*commands[3], "--device", "cpu")
    assert changed.exit_code == 1
    assert "metrics.json has changed since it was written" in changed.output


@pytest.mark.parametrize("command", main.commands.values(), ids=main.commands)
def test_every_command_has_an_example_and_every_option_help(command):
    assert f"ood-heatmap {command.name} " in command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys; from ood_heatmap.cli import main; plan = main.commands['plan']\n"
        "verbs = [[], *([name] for name in main.commands)]\n"
        "verbs += [['plan', name] for name in plan.commands]\n"
        "for verb in verbs: main([*verb, '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'faiss', 'h5py', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_version_is_the_packages():
    assert run_command("--version").output == f"ood-heatmap, version {__version__}\n"


def test_it_runs_as_a_module_from_anywhere(tmp_path):
    command = [sys.executable, "-m", "ood_heatmap", "--version"]
    output = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert __version__ in output


def bad_calls(data: Path, spec: str, run: Path, folder: Path):
    """Return (arguments, exit code, words of the one line) of what a user can get wrong."""
    index = index_arguments(data, spec, folder / "new")
    broken, empty = folder / "broken", folder / "empty"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_bytes(b"broken")
    (folder / "file").write_text("")
    return {
        "an empty folder": (["targets", run, "--ood", empty], 1, "contains no images"),
        "an unknown set": (["targets", run, "--ood", "nowhere"], 2, "no folder, file or data set"),
        "too few images": (
            ["targets", run, "--ood", data / "ood", "--limit", 99],
            1,
            "--limit asks",
        ),
        "a missing run": (["train", folder / "nowhere"], 2, "does not exist"),
        "no index": (["train", empty], 1, "no index stage: run `ood-heatmap index"),
        "a stale cache": (["train", run, "--epochs", 3], 1, "different options.epochs"),
        "no GPU": (["train", run, "--device", "cuda:7"], 2, "this machine has"),
        "no such device": (["train", run, "--device", "tpu"], 2, "no device 'tpu'"),
        "a wrong class count": ([*index, "--num-classes", 5], 1, "does not fit the classifier"),
        "a wrong spec": (
            ["index", run, "--id", data / "id", "--classifier", "x"],
            2,
            "no classifier",
        ),
        "a wrong mean": ([*index, "--mean", "1,2"], 2, "is not three numbers"),
        "a zero std": ([*index, "--std", "0,1,1"], 2, "std above 0"),
        "a run below a file": (
            [*index[:1], folder / "file" / "run", *index[2:]],
            1,
            "cannot write",
        ),
        "a missing image": (["predict", run, "no.png", "--out", folder], 1, "no image or folder"),
        "two sets of one name": (
            ["evaluate", run, "--id", data / "test", "--ood", data / "far", "--ood", data / "far"],
            2,
            "two OOD sets are named 'far'",
        ),
        "an unknown near set": (
            ["evaluate", run, "--id", data / "test", "--ood", data / "far", "--near", "x"],
            2,
            "--near x is not one of the OOD sets",
        ),
        # last: --overwrite has discarded what was there
        "a truncated image": (
            ["targets", run, "--ood", broken, "--overwrite"],
            1,
            "a.png is not a",
        ),
    }


def test_class_folders_are_numbered_in_the_order_that_is_named(data, spec, tmp_path):
    (tmp_path / "id").mkdir()
    for label, name in enumerate(["1", "2", "10", "11"]):
        (tmp_path / "id" / name).symlink_to(data / "id" / f"class{label}")
    orders = {"name": ["1", "10", "11", "2"], "natural": ["1", "2", "10", "11"]}
    counted = {}
    for order, names in orders.items():
        run = tmp_path / order
        arguments = index_arguments(data, spec, run)
        arguments[arguments.index("--id") + 1] = tmp_path / "id"
        result = run_command(*arguments, "--class-order", order, "--allow-suspicious")
        assert result.exit_code == 0, result.output
        results = json.loads((run / "index" / "manifest.json").read_text())["results"]
        assert results["classes"] == names
        counted[order] = results["accuracy"]
    assert counted["name"] != counted["natural"]
    result = run_command(*arguments, "--class-order", "name")
    assert "was made with a different images.listing" in result.output


def test_what_is_wrong_ends_in_one_line_and_leaves_the_run_as_it_was(data, spec, run, tmp_path):
    def tree():
        return {
            path: path.read_bytes()
            for path in run.rglob("*")
            if path.is_file() and path.name != "unfinished.json"
        }

    for name, (arguments, code, words) in bad_calls(data, spec, run, tmp_path).items():
        before = tree()
        result = run_command(*arguments)
        assert result.exit_code == code, (name, result.output, result.exception)
        lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, (name, result.output)
        assert words in lines[0], name
        assert "Traceback" not in result.output, name
        if "--overwrite" not in arguments:
            assert tree() == before, name


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_is_one_line(run):
    run.chmod(0o500)
    result = run_command("train", run, "--overwrite")
    run.chmod(0o700)
    assert result.exit_code == 1
    assert "cannot write" in result.output


def test_a_second_writer_is_one_line(run):
    from ood_heatmap.cache.files import locked

    with locked(run):
        result = run_command("train", run)
    assert result.exit_code == 1
    assert "is being written by process" in result.output


def test_commands_are_listed_in_the_order_of_the_stages_and_described_whole():
    listed = [line.split() for line in run_command("--help").output.splitlines()]
    names = [words[0] for words in listed if words and words[0] in main.commands]
    assert names == [
        *("index", "targets", "train", "evaluate"),
        *("predict", "audit", "localize", "export", "bundle", "plan", "verify", "demo"),
    ]
    for group in (["--help"], ["plan", "--help"]):
        assert "..." not in run_command(*group).output.replace("COMMAND [ARGS]...", "")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["targets", "RUN", "--ood", "nowhere"], "targets"),
        (["plan", "targets", "RUN", "--ood", "nowhere"], "plan targets"),
        (["train", "RUN", "--device", "tpu"], "train"),
        (["train", "RUN", "--epochs", "x"], "train"),
    ],
)
def test_a_usage_error_points_to_the_help_of_its_command(run, arguments, command):
    result = run_command(*(run if word == "RUN" else word for word in arguments))
    assert result.exit_code == 2
    assert result.output.startswith(f"Usage: ood-heatmap {command} [OPTIONS] RUN")
    assert f"'ood-heatmap {command} -h'" in result.output.replace("--help", "-h")


def test_verbose_and_quiet_before_and_after_the_verb(run, caplog):
    package = logging.getLogger("ood_heatmap")
    levels = []

    @main.command("levels")
    def show_levels():
        levels.append(package.getEffectiveLevel())

    try:
        for words in (["-v", "levels"], ["levels", "-v"], ["levels"], ["levels", "-q"]):
            assert run_command(*words).exit_code == 0
    finally:
        del main.commands["levels"]
    assert levels == [logging.DEBUG, logging.DEBUG, logging.INFO, logging.WARNING]
    assert package.level == logging.NOTSET


def test_warnings_come_last_before_the_next_command(capsys):
    conclude(Results(warnings=("accuracy is that of chance",)), "train runs/x")
    printed = capsys.readouterr()
    assert printed.err == "warning: accuracy is that of chance\n"
    assert printed.out == "next: ood-heatmap train runs/x\n"
    conclude(Results(), "")
    assert capsys.readouterr() == ("", "")


def test_verbose_shows_settings_and_where_an_error_came_from(run, caplog):
    assert run_command("train", run, "--epochs", 3).exit_code == 1
    assert "TrainConfig(" not in caplog.text
    assert run_command("train", run, "--epochs", 3, "-v").exit_code == 1
    assert "TrainConfig(epochs=3, " in caplog.text
    assert "Traceback" in caplog.text


def test_log_records_stay_in_their_line(run, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    @main.command("note")
    def note():
        logging.getLogger("ood_heatmap.test").warning("skipped %s", "a\nb\x1b[31m\udcff")

    try:
        stderr = run_command("note").stderr
    finally:
        del main.commands["note"]
    line = re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)\n", stderr)
    assert line is not None
    assert abs(datetime.now() - datetime.fromisoformat(line[1])) < timedelta(minutes=5)
    assert line[2] == "skipped a\\nb\\x1b[31m\\udcff"


def test_quiet_shows_no_progress_and_verbose_what_was_written(run):
    command = ["train", run, "--overwrite", "--device", "cpu", "--epochs"]
    for flag, epochs, words in (("-q", 2, []), ("-v", 1, ["epoch 1/1", "wrote", "TrainConfig("])):
        done = subprocess.run(
            [sys.executable, "-m", "ood_heatmap", *map(str, command), str(epochs), flag],
            cwd=run,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "decoder of" in done.stdout
        assert all(word in done.stderr for word in words)
        if flag == "-q":
            assert done.stderr == ""


# one process: starting three takes seconds
RUN_EACH = """
import sys
from ood_heatmap.cli import main

for command in sys.argv[1].split(";"):
    try:
        main(command.split("|"))
    except SystemExit as end:
        print(end.code)
"""


def test_names_that_are_not_utf8_are_printed_escaped(tmp_path):
    folder = os.fsencode(tmp_path)
    name = folder + b"/\xff.png"
    commands = [
        [b"targets", folder, b"--ood", name],
        [b"predict", folder, name, b"--out", folder],
        [b"train", name],
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, b";".join(map(b"|".join, commands))],
        cwd=tmp_path,
        capture_output=True,
    )
    assert set(done.stdout.split()) <= {b"1", b"2"}
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("Error: ")]
    assert len(errors) == len(done.stdout.split()) == 3
    assert all(".png" in line for line in errors)
    assert b"Traceback" not in done.stderr


def examples():
    """Yield the command lines of the README, of the manual and of the help texts."""
    root = Path(__file__).parent.parent
    pages = (root / "README.md", *sorted((root / "docs").glob("*.md")))
    texts = [page.read_text("utf-8") for page in pages]
    commands = [*main.commands.values(), *plan.commands.values()]
    texts += [command.help or "" for command in commands]
    for text in texts:
        # a line that begins with an option goes on with the line above
        joined = re.sub(r"\s*\\?\n\s+(?=--)", " ", text)
        for line in re.findall(r"^ +(?:find .*\| )?ood-heatmap (.+)", joined, re.MULTILINE):
            yield line.partition(" #")[0].strip()


@pytest.mark.parametrize("line", sorted(set(examples())))
def test_examples_of_readme_manual_and_help_are_commands_that_parse(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/c10", "runs/own", "RUN", "..."):
        Path(run).mkdir(parents=True, exist_ok=True)
    name, *arguments = shlex.split(line)
    group: click.Group = main
    if name == "plan":
        group, (name, *arguments) = plan, arguments
    with group.commands[name].make_context(name, arguments) as context:
        assert context.params


def test_the_readme_is_short_and_shows_its_picture():
    root = Path(__file__).parent.parent
    text = (root / "README.md").read_text("utf-8")
    assert len(text.split()) <= 800
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures
    assert all((root / picture).is_file() for picture in pictures)


def test_the_demo_writes_nothing_for_a_device_that_is_not_there(tmp_path):
    result = run_command("demo", tmp_path / "demo", "--device", "tpu")
    assert result.exit_code == 2
    assert "'tpu'" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "opened"), [([], False), (["--open"], True)])
def test_the_demo_ends_with_its_report_and_pictures(tmp_path, monkeypatch, flags, opened):
    launched: list[str] = []
    monkeypatch.setattr("ood_heatmap.pipeline.demo.prepare_demo", lambda run: run / "data")
    monkeypatch.setattr("ood_heatmap.demo.demo_commands", lambda run, data: [])
    monkeypatch.setattr(click, "launch", lambda url: launched.append(url) or 0)
    monkeypatch.chdir(tmp_path)
    result = run_command("demo", "a run", "--device", "cpu", *flags)
    assert result.exit_code == 0, result.output
    report, pictures = result.output.splitlines()[-2:]
    run = tmp_path / "a run"
    assert report == f"report:   {(run / 'evaluation' / 'report.html').as_uri()}"
    assert pictures == f"pictures: {(run / 'predictions' / 'pictures').as_uri()}"
    assert launched == ([str(run / "evaluation" / "report.html")] if opened else [])


def test_the_demo_leaves_another_run_alone(run):
    before = sorted(run.rglob("*"))
    result = run_command("demo", run)
    assert result.exit_code == 2
    assert "is not a run of the demo" in result.output
    assert sorted(run.rglob("*")) == before


def test_a_suspicious_index_is_kept_and_ends_with_1_unless_allowed(data, spec, tmp_path):
    run, allow = tmp_path / "run", "--allow-suspicious"
    refused = [item for item in index_arguments(data, spec, run) if item != allow]
    for _ in range(2):  # started again it says the same
        result = run_command(*refused, "--device", "cpu")
        assert result.exit_code == 1
        assert "warning: accuracy is" in result.output
        assert "the stage is complete, but its result is suspicious" in result.output
        assert "next:" not in result.output
        assert "Traceback" not in result.output
    assert (run / "index" / "manifest.json").is_file()
    result = run_command(*refused, allow, "--device", "cpu")
    assert result.exit_code == 0
    assert "warning: accuracy is" in result.output
    assert "next: ood-heatmap targets" in result.output


def test_files_tests_and_names_of_the_contributors_guide_are_there():
    root = Path(__file__).parent.parent
    text = (root / "CONTRIBUTING.md").read_text("utf-8")
    paths = set(re.findall(r"`((?:\w+/)+\w+\.py|[\w.]+\.(?:md|cfg))`", text))
    assert len(paths) > 10
    assert all((root / path).is_file() for path in paths - {"tests/test_x.py"})
    for name, path in re.findall(r"`(test_\w+)`\s+in\s+`(tests/\w+\.py)`", text):
        assert f"def {name}(" in (root / path).read_text("utf-8")
    for name, path in re.findall(r"`(\w+)`\s+in\s+`((?:ood_heatmap|pipeline)/\w+\.py)`", text):
        assert re.search(rf"\b{name}\b", (root / path).read_text("utf-8"))
