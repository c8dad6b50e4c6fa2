"""A run directory, or a folder of images, that somebody else made cannot do harm."""

import csv
import os
import shutil
from pathlib import Path

import pytest
from lab import DIRECTORIES, FULL, OUTPUTS, STAGES, Lab, Ledger

SPECS = ["os:system", "subprocess:getoutput", "builtins:exec", "os.path:os.system"]


def forge(lab: Lab, place: Path, stage: str, change: str) -> None:
    """Change a manifest and all its hashes."""
    outcome = lab.call("forge", str(place / "run"), stage, change, root=place)
    assert outcome.code == 0, outcome.output


def test_a_run_made_of_data_alone_runs_no_code(lab: Lab, ledger: Ledger) -> None:
    commands = ("targets", "evaluate", "localize", "predict", "export", "verify")
    parts = ("results", "inputs and results")
    cases = [(part, spec, command) for spec in SPECS for command in commands for part in parts]
    with ledger.experiment("S code in a run directory") as trials:

        def trial(case: tuple[str, str, str]) -> None:
            part, spec, command = case
            with lab.place("end") as place:
                ran = place / "ran"
                code = f"touch {ran}" if "exec" not in spec else f"open({str(ran)!r}, 'w')"
                change = (
                    f"for part in {part.split(' and ')}:\n"
                    f" content[part]['classifier'].update(spec={spec!r}, num_classes={code!r})"
                )
                forge(lab, place, "index", change)
                outcome = lab.run(lab.arguments(command, place), place)
                problem = "" if outcome.is_one_line or outcome.code == 0 else str(outcome)
                if ran.exists():
                    problem = "it has run the code"
            trials.add(f"{command}, {spec} in {part}", problem)

        lab.each(trial, cases if FULL else cases[:8])


def test_a_link_in_a_run_directory_leads_to_no_write_elsewhere(
    shimmed: Lab, ledger: Ledger
) -> None:
    names: dict[str, set[str]] = {}
    for command in (*STAGES, *OUTPUTS) if FULL else ("index", "targets", "train", "predict"):
        paths = {call.path for call in shimmed.calls[command] if call.name == "open for writing"}
        names[command] = paths if FULL else set(sorted(paths)[:: max(1, len(paths) // 2)])
    names["index"] |= {"run/.lock", "run/log.jsonl"}
    cases = [(command, name) for command, some in names.items() for name in sorted(some)]
    with ledger.experiment("S a link in a run directory") as trials:

        def trial(case: tuple[str, str]) -> None:
            command, name = case
            with shimmed.place(command) as place:
                target, link = place / "precious", place / name
                target.write_bytes(b"precious")
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(target)
                outcome = shimmed.run(shimmed.arguments(command, place), place)
                problem = "" if outcome.is_one_line or outcome.code == 0 else str(outcome)
                if target.read_bytes() != b"precious":
                    problem = "the file that the link leads to has changed"
            trials.add(f"{command}, {name} is a link", problem)

        shimmed.each(trial, cases)


@pytest.mark.parametrize("command", STAGES[:4])
def test_a_stage_that_is_a_link_to_a_directory_is_made_again_or_refused(
    lab: Lab, ledger: Ledger, command: str
) -> None:
    changed: dict[str, object] = {"seed": 5} if command in ("train", "evaluate") else {}
    changed = changed or ({"id": lab.data / "fewer"} if command == "index" else {"patched": 0})
    with ledger.experiment("S a stage is a link") as trials, lab.place("end") as place:
        folder = place / "run" / DIRECTORIES.get(command, command)
        shutil.move(folder, place / "elsewhere")
        folder.symlink_to(place / "elsewhere")
        before = lab.snapshot(place / "elsewhere")
        arguments = lab.arguments(command, place, **changed, overwrite=True)
        outcome = lab.run(arguments, place)
        problem = "" if outcome.is_one_line or outcome.code == 0 else str(outcome)
        if outcome.code != 0:
            problem = problem or lab.difference(place / "elsewhere", before)
        trials.add(f"{command} --overwrite", problem)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "../targets/manifest.json"])
def test_a_manifest_names_files_of_its_own_directory_only(
    lab: Lab, ledger: Ledger, name: str
) -> None:
    with ledger.experiment("S a path in a manifest") as trials, lab.place("end") as place:
        target = (place / "run" / "index" / name).resolve()
        if not target.is_file():
            target = Path("/etc/passwd")
        change = f"content['files'][{name!r}] = record({str(target)!r})"
        forge(lab, place, "index", change)
        outcome = lab.run(lab.arguments("verify", place), place)
        trials.add(f"verify, {name}", "" if outcome.is_one_line else str(outcome))


FORMULAS = ["=1+1.png", "+1.png", "-2+3.png", "@SUM(1).png", "=HYPERLINK(1).png", "a,b.png"]


def test_no_cell_of_a_table_is_a_formula(lab: Lab, ledger: Ledger) -> None:
    with ledger.experiment("S formulas in tables") as trials, lab.place("end") as place:
        folder = place / "images"
        folder.mkdir()
        for name in FORMULAS:
            shutil.copy(lab.data / "few" / "000.png", folder / name)
        words = ["predict", place / "run", folder, "--out", place / "table", "--device", "cpu"]
        cwd_is_elsewhere = lab.run([*map(str, words)], place)
        assert cwd_is_elsewhere.code == 0, cwd_is_elsewhere.output
        with (place / "table" / "scores.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) == 1 + len(FORMULAS)
        score = rows[0].index("score")
        for row in rows[1:]:
            texts = row[:score] + row[score + 1 :]
            bad = [cell for cell in texts if cell.startswith(("=", "+", "@", "\t", "-"))]
            trials.add(f"predict, {os.path.basename(row[0])}", f"{bad}" if bad else None)
