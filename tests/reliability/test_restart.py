"""Started again with something changed, a command notices it, or it makes no difference."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import (
    DIRECTORIES,
    FULL,
    NUM_ID,
    NUM_OOD,
    Action,
    Fault,
    Lab,
    Ledger,
    Outcome,
    Snapshot,
    killed,
)
from PIL import Image


def rows_are_right(lab: Lab, place: Path, command: str) -> str:
    """Return what is wrong with the rows of a stage's shards: each image once, ascending."""
    prefix, count = ("images", NUM_ID) if command == "index" else ("targets", NUM_OOD)
    folder = str(place / "run" / command)
    outcome = lab.call("check_rows", folder, f"{prefix}-[0-9]*.h5", count, root=place)
    return "" if outcome.code == 0 else str(outcome)


@pytest.mark.parametrize("command", ["index", "targets"])
def test_another_batch_size_neither_loses_nor_doubles_a_row(
    shimmed: Lab, ledger: Ledger, command: str
) -> None:
    dice = random.Random(0)
    renames = [
        call.number
        for call in shimmed.calls[command]
        if call.name == "rename" and call.path.endswith(".h5")
    ]
    cases = [
        (moment, first, second)
        for moment in [None, *renames]
        for first, second in [(32, 16), (32, 7), (7, 100), (16, 40)]
    ]
    with ledger.experiment("E5 another batch size") as trials:

        def trial(case: tuple[int | None, int, int]) -> None:
            moment, first, second = case
            with shimmed.place(command) as place:
                fault = None if moment is None else Fault(Action.KILL, moment + 1)
                arguments = shimmed.arguments(command, place, batch_size=first)
                shimmed.run(arguments, place, fault=fault)
                before = shimmed.snapshot(place)
                arguments = shimmed.arguments(command, place, batch_size=second)
                outcome = shimmed.run(arguments, place)
                problem = "" if outcome.is_one_line else str(outcome)
                if outcome.code == 0:
                    problem = rows_are_right(shimmed, place, command)
                    verified = shimmed.run(shimmed.arguments("verify", place), place)
                    problem = problem or ("" if verified.code == 0 else str(verified))
                    if moment is None:
                        problem = problem or shimmed.difference(place, before)
            where = "finished" if moment is None else f"killed at call {moment + 1}"
            trials.add(f"{command}, batches of {first}, {where}, batches of {second}", problem)

        shimmed.each(trial, cases if FULL else dice.sample(cases, 3))


# command, option, other value; a name that the message must have, when not the option's
OPTIONS: list[tuple[str, str, object]] = [
    ("index", "size", 48),
    ("index", "feature_maps", 1),
    ("index", "shard_mb", 2),
    ("index", "mean", "0.5,0.5,0.5"),
    ("index", "autocast", True),
    ("index", "id", "fewer"),
    ("targets", "pairing", "random"),
    ("targets", "patched", 0),
    ("targets", "limit", 30),
    ("targets", "ood", "far"),
    ("train", "epochs", 3),
    ("train", "lr", 0.01),
    ("train", "noise", 0.3),
    ("train", "seed", 1),
    ("train", "width", 16),
    ("train", "batch_size", 16),
    ("train", "target", "signed"),
    ("train", "region_weight", 5),
    ("train", "feature_maps", 0),
    ("train", "stack", "dcgan"),
    ("evaluate", "seed", 1),
    ("evaluate", "false_alarm", 0.2),
    ("evaluate", "calibration_share", 0.3),
    ("evaluate", "gallery", 2),
    ("evaluate", "protocol", "paper"),
    ("evaluate", "near", "far"),
    ("localize", "seed", 1),
    ("localize", "count", 2),
]


def visible(snapshot: Snapshot) -> Snapshot:
    """Return a tree without hidden files: the lock, and what a killed command left."""
    return {name: item for name, item in snapshot.items() if not Path(name).name.startswith(".")}


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_another_value_of_an_option_is_refused(shimmed: Lab, ledger: Ledger, state: str) -> None:
    chosen = OPTIONS if FULL else random.Random(0).sample(OPTIONS, 5)
    with ledger.experiment(f"E5 another value of an option, {state}") as trials:

        def trial(case: tuple[str, str, object]) -> None:
            command, option, value = case
            if option in ("id", "ood"):
                value = shimmed.data / str(value)
            with shimmed.place("end" if state == "finished" else command) as place:
                if state == "unfinished":
                    last = shimmed.calls[command][-1].number
                    fault = Fault(Action.KILL, last // 2)
                    shimmed.run(shimmed.arguments(command, place), place, fault=fault)
                before = visible(shimmed.snapshot(place))
                changed = {option: value}
                outcome = shimmed.run(shimmed.arguments(command, place, **changed), place)
                problem = "" if outcome.is_one_line else str(outcome)
                same = visible(shimmed.snapshot(place)) == before
                problem = problem or ("" if same else "it has changed the run")
            trials.add(f"{command} --{option} {value}", problem)

        shimmed.each(trial, chosen)


def swap(folder: Path) -> None:
    """Give the first two images of a folder each other's content."""
    first, second = sorted(folder.rglob("*.bmp"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def copy_data(data: Path, place: Path) -> Path:
    """Copy images and classifier; as BMP, so that all images of a set have the same size."""
    copy = Path(shutil.copytree(data, place / "data"))
    for path in copy.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    (copy / "package").mkdir()
    (copy / "package" / "__init__.py").touch()
    shutil.copy(copy / "network.py", copy / "package" / "module.py")
    (copy / "helper.py").write_text("def scaled(images):\n    return images * 1\n")
    (copy / "parts.py").write_text(NETWORK_IN_PARTS)
    return copy


def edit(path: Path, old: str, new: str) -> None:
    """Replace text in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


NETWORK_IN_PARTS = """
import helper
from package.module import Network as Base


class Network(Base):
    def forward(self, images):
        return super().forward(helper.scaled(images))


def network(num_classes=4):
    return Network(num_classes)
"""

# command that must notice, SPEC of the classifier, change
CHANGES: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "two ID images swapped": ("index", "network.py", lambda data: swap(data / "id")),
    "two OOD images swapped": ("targets", "network.py", lambda data: swap(data / "ood")),
    "two ID test images swapped": ("evaluate", "network.py", lambda data: swap(data / "test")),
    "two OOD test images swapped": ("evaluate", "network.py", lambda data: swap(data / "far")),
    "other weights": (
        "index",
        "network.py",
        lambda data: shutil.copy(data / "other.safetensors", data / "weights.safetensors"),
    ),
}
HALVED = "self.layer1(images)", "self.layer1(images / 2)"
# later stages run the run's own copy of the code
CHANGES |= {
    "code of file.py": ("index", "network.py", lambda data: edit(data / "network.py", *HALVED)),
    "code that file.py imports": (
        "index",
        "parts.py",
        lambda data: edit(data / "helper.py", "images * 1", "images * 0.5"),
    ),
    "code of package.module": (
        "index",
        "package.module",
        lambda data: edit(data / "package" / "module.py", *HALVED),
    ),
}


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_images_and_code_cannot_change_unnoticed(shimmed: Lab, ledger: Ledger, state: str) -> None:
    chosen = list(CHANGES) if FULL else random.Random(0).sample(list(CHANGES), 2)
    with ledger.experiment(f"E5 images or code changed, {state}") as trials:

        def trial(change: str) -> None:
            with shimmed.place("index") as place:
                trials.add(change, notices(shimmed, place, change, state))

        shimmed.each(trial, chosen)


def notices(lab: Lab, place: Path, change: str, state: str) -> str:
    """Change what a stage is made from, start it again, and return what did not hold."""
    command, spec, make = CHANGES[change]
    data = copy_data(lab.data, place)
    source = f"{data / spec}:network" if spec.endswith(".py") else f"{spec}:network"
    options: dict[str, dict[str, object]] = {
        "index": {
            "id": data / "id",
            "classifier": source,
            "weights": data / "weights.safetensors",
        },
        "targets": {"ood": data / "ood"},
        "evaluate": {"id": data / "test", "ood": f"far={data / 'far'}"},
    }

    def run(name: str, fault: Fault | None = None) -> Outcome:
        arguments = lab.arguments(name, place, **options.get(name, {}))
        environment = {"PYTHONPATH": str(data), "PYTHONDONTWRITEBYTECODE": "1"}
        return lab.run(arguments, place, fault=fault, environment=environment)

    order = ["index", "targets", "train", "evaluate"]
    for name in order[: order.index(command)]:
        outcome = run(name)
        assert outcome.code == 0, outcome
    commit = [call for call in lab.calls[command] if call.path.endswith("/manifest.json")][-1]
    outcome = run(command, Fault(Action.KILL, commit.number - 3) if state == "unfinished" else None)
    assert killed(outcome) if state == "unfinished" else outcome.code == 0, outcome
    make(data)
    outcome = run(command)
    if outcome.code != 0:
        return "" if outcome.is_one_line else str(outcome)
    # then it must have been made again from what is there now
    found = lab.snapshot(place / "run")
    shutil.rmtree(place / "run" / DIRECTORIES.get(command, command))
    fresh = run(command)
    if fresh.code == 0 and lab.snapshot(place / "run") == found:
        return ""
    return f"not noticed, {outcome}"
