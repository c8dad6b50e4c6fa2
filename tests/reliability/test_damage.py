"""Whatever changes on disk is found: by ``verify``, by the next stage, and when a stage resumes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from lab import DIRECTORIES, FULL, STAGES, Action, Fault, Lab, Ledger
from mutations import NO_MANIFESTS, damages, flip, flip_several, mutations
from PIL import Image

# which stage reads the files of a stage
READERS = {"index": ("targets",), "targets": ("train",), "train": ("evaluate",)}
FUZZED = (
    "run/index/images-00000.h5",
    "run/index/index.faiss",
    "run/index/manifest.json",
    "run/evaluation/calibration.safetensors",
)
CHECKPOINTS = {"ood_heatmap.pipeline.train._CHECKPOINT_SECONDS": 0.0}


def directory(place: Path, command: str) -> Path:
    """Return where a stage keeps its files."""
    return place / "run" / DIRECTORIES.get(command, command)


def data_files(folder: Path) -> list[Path]:
    """Return a stage's files but for its manifest, the drawn page and what is hidden."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in ("manifest.json", "report.html")
        and not path.name.startswith(".")
    ]


@pytest.mark.parametrize("command", STAGES)
def test_any_change_of_a_finished_file_is_found(lab: Lab, ledger: Ledger, command: str) -> None:
    dice = random.Random(STAGES.index(command))
    names = [
        path.relative_to(lab.before("end"))
        for path in data_files(directory(lab.before("end"), command))
    ]
    cases = []
    for name in names:
        content = (lab.before("end") / name).read_bytes()
        found = list(damages(content, dice, 12 if FULL else 3))
        cases += [(name, *one) for one in (found if FULL else dice.sample(found, 1))]
    with (
        ledger.experiment("E3 finished file changed: verify finds it") as verified,
        ledger.experiment("E3 finished file changed: the next stage refuses") as refused,
    ):

        def trial(case: tuple[Path, str, bytes]) -> None:
            name, what, content = case
            with lab.place("end") as place:
                (place / name).write_bytes(content)
                outcome = lab.run(lab.arguments("verify", place), place)
                named = outcome.is_one_line and name.name in outcome.output
                verified.add(f"{name}, {what}", "" if named else str(outcome))
            for reader in READERS.get(command, ()):
                with lab.place(reader) as place:
                    (place / name).write_bytes(content)
                    outcome = lab.run(lab.arguments(reader, place), place)
                    problem = "" if outcome.is_one_line else str(outcome)
                    if outcome.code == 0:  # a file that the stage does not need
                        (place / name).write_bytes((lab.before("end") / name).read_bytes())
                        problem = lab.difference(place, lab.after[reader])
                refused.add(f"{name}, {what}, {reader}", problem)

        lab.each(trial, cases)
        if command not in READERS:
            refused.add(f"{command}: no stage reads it", None)


@pytest.mark.parametrize("command", STAGES)
def test_any_change_of_a_manifest_but_its_speed_is_found(
    lab: Lab, ledger: Ledger, command: str
) -> None:
    dice = random.Random(STAGES.index(command))
    path = directory(lab.before("end"), command) / "manifest.json"
    original = path.read_bytes()
    manifest = json.loads(original)
    structural = [
        (what, json.dumps(changed, indent=1).encode()) for what, changed in mutations(manifest)
    ]
    flips = [(f"a bit of byte {at}", flip(original, at, dice)) for at in range(len(original))]
    chosen = [
        *dice.sample(list(NO_MANIFESTS.items()), len(NO_MANIFESTS) if FULL else 2),
        *dice.sample(structural, min(len(structural), 60 if FULL else 4)),
        *dice.sample(flips, min(len(flips), 40 if FULL else 3)),
    ]
    with (
        ledger.experiment("E3 manifest changed: verify finds it") as verified,
        ledger.experiment("E3 manifest changed: the detector loads only what is right") as loaded,
    ):

        def trial(case: tuple[str, bytes]) -> None:
            what, content = case
            same = means_the_same(content, manifest)
            with lab.place("end") as place:
                (directory(place, command) / "manifest.json").write_bytes(content)
                outcome = lab.run(lab.arguments("verify", place), place)
                good = outcome.is_one_line or (same and outcome.code == 0)
                verified.add(f"{command}, {what}", "" if good else str(outcome))
                if command in ("index", "train", "evaluate"):
                    outcome = lab.run(lab.arguments("predict", place), place)
                    good = outcome.is_one_line or (same and outcome.code == 0)
                    loaded.add(f"{command}, {what}, predict", "" if good else str(outcome))

        lab.each(trial, chosen)
        if command not in ("index", "train", "evaluate"):
            loaded.add(f"{command}: not read", None)


def means_the_same(content: bytes, manifest: dict[str, Any]) -> bool:
    """Tell whether a manifest says the same but for how fast the stage was."""
    try:
        unimportant = {"speed": None, "checksum": None}
        return {**json.loads(content), **unimportant} == {**manifest, **unimportant}
    except (ValueError, TypeError, RecursionError):
        return False


@pytest.mark.parametrize("command", STAGES if FULL else STAGES[:4])
def test_an_unfinished_stage_makes_again_or_refuses_what_has_changed(
    shimmed: Lab, ledger: Ledger, command: str
) -> None:
    constants = CHECKPOINTS if command == "train" else {}
    dice = random.Random(STAGES.index(command))
    with shimmed.place(command) as place:  # the last moment before the stage is finished
        arguments = shimmed.arguments(command, place)
        counted = shimmed.run(arguments, place, fault=Fault(Action.COUNT), constants=constants)
    commits = [
        call.number
        for call in counted.calls
        if call.name == "rename" and call.path.endswith("/manifest.json")
    ]
    checkpoints = [
        call.number
        for call in counted.calls
        if call.name == "rename" and call.path.endswith("/last.ckpt")
    ]
    moments = [commits[0], *checkpoints[1:2]]
    with ledger.experiment("E3 unfinished file changed: made again or refused") as trials:
        for moment in moments:
            with shimmed.place(command) as unfinished:
                shimmed.run(
                    shimmed.arguments(command, unfinished),
                    unfinished,
                    fault=Fault(Action.KILL, moment),
                    constants=constants,
                )
                cases = []
                for path in data_files(directory(unfinished, command)):
                    found = list(damages(path.read_bytes(), dice, 8 if FULL else 4))
                    found = found if FULL else dice.sample(found, 1)
                    cases += [(path, *one) for one in found]

                def trial(case: tuple[Path, str, bytes], unfinished: Path = unfinished) -> None:
                    path, what, content = case
                    with shimmed.place_of(unfinished) as place:
                        (place / path.relative_to(unfinished)).write_bytes(content)
                        outcome = shimmed.run(shimmed.arguments(command, place), place)
                        problem = "" if outcome.is_one_line else str(outcome)
                        if outcome.code == 0:
                            problem = shimmed.difference(place, shimmed.after[command])
                        trials.add(f"{command}, {path.name}, {what}", problem)

                shimmed.each(trial, cases if FULL else dice.sample(cases, min(3, len(cases))))


@pytest.mark.parametrize("name", FUZZED)
def test_a_file_of_any_content_ends_in_a_typed_error(lab: Lab, ledger: Ledger, name: str) -> None:
    count = 400 if FULL else 40
    with ledger.experiment("E6 fuzzed files") as trials, lab.place("end") as place:
        outcome = lab.call("fuzz", str(place), name, count, root=place)
        failed = [line for line in outcome.output.splitlines() if line.startswith("FAILED")]
        if outcome.code != 0:
            failed = [str(outcome)] * count
        for number in range(count):
            trials.add(f"{name}, fuzzed", failed[number] if number < len(failed) else None)


def test_images_of_any_content_are_named_and_skipped(lab: Lab, ledger: Ledger) -> None:
    count = 30 if FULL else 4
    dice = random.Random(0)
    formats = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
    with ledger.experiment("E6 fuzzed images") as trials, lab.place("end") as place:
        folder = place / "fuzzed"
        folder.mkdir()
        for form in formats:
            whole = folder / f"whole.{form.lower()}"
            Image.open(lab.data / "few" / "000.png").save(whole, form)
            for number in range(count):
                content = flip_several(whole.read_bytes(), dice, dice.choice([1, 2, 8, 64]))
                if dice.random() < 0.3:
                    content = content[: dice.randrange(len(content))]
                (folder / f"{form.lower()}-{number}.{form.lower()}").write_bytes(content)
        arguments = ["predict", place / "run", folder, "--out", place / "out"]
        outcome = lab.run([*map(str, arguments), "--device", "cpu"], place)
        for _ in range(count * len(formats)):
            good = outcome.is_one_line or outcome.code == 0
            trials.add("predict, fuzzed images", "" if good else str(outcome))
