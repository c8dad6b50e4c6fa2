"""A file call that fails ends in one line, leaves nothing partial, and the command completes."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import (
    FULL,
    OUTPUTS,
    STAGES,
    Action,
    Call,
    Fault,
    Kind,
    Lab,
    Ledger,
    Snapshot,
    applicable_errors,
)


def is_refused(lab: Lab, command: str, fault: Fault, wanted: Snapshot) -> str:
    """Let a call fail, and start the command again; return what did not hold."""
    with lab.place(command) as place:
        old = lab.snapshot(place)
        outcome = lab.run(lab.arguments(command, place), place, fault=fault)
        hit = f"{outcome.calls[-1]}: " if outcome.calls else "no call hit: "
        if outcome.code == 0:  # the failed call was of no account
            problem = lab.difference(place, wanted)
            return problem and hit + problem
        problems = [
            "" if outcome.is_one_line else f"not one line, {outcome}",
            lab.partial(place, old, wanted),
            lab.completes(command, place, wanted),
        ]
        return hit + "; ".join(filter(None, problems)) if any(problems) else ""


@pytest.mark.parametrize("action", [Action.FAIL_ONCE, Action.FAIL_ALWAYS, Action.SHORT])
def test_a_refused_call_ends_in_one_line_and_the_command_completes(
    shimmed: Lab, ledger: Ledger, action: Action
) -> None:
    calls = {command: shimmed.calls[command] for command in (*STAGES, *OUTPUTS)}
    names = {
        Action.FAIL_ONCE: "E2 a call fails once",
        Action.FAIL_ALWAYS: "E2 a call fails, and all after it",
        Action.SHORT: "E2 a short write",
    }
    if action == Action.SHORT:
        calls = {
            command: tuple(call for call in some if "write" in call.name and call.num_bytes > 1)
            for command, some in calls.items()
        }
    chosen = shimmed.sample(calls, files=action != Action.SHORT)
    if action != Action.SHORT:  # each call once, in turn in one way or the other
        chosen = chosen[action == Action.FAIL_ALWAYS :: 2]
    with ledger.experiment(names[action]) as trials:

        def trial(item: tuple[int, tuple[str, Call]]) -> None:
            turn, (command, call) = item
            errors = applicable_errors(call)
            error = errors[turn % len(errors)]
            fault = Fault(action, call.number, error)
            problem = is_refused(shimmed, command, fault, shimmed.after[command])
            trials.add(f"{command}, {errno.errorcode[error]} at {call}", problem)

        shimmed.each(trial, list(enumerate(chosen)))


def test_a_file_that_cannot_be_read_ends_in_one_line(shimmed: Lab, ledger: Ledger) -> None:
    states = {"targets": "targets", "train": "train", "evaluate": "evaluate", "predict": "predict"}
    states |= {"verify": "end"}
    calls = {
        command: shimmed.count(command, before, kinds=Kind.READS)
        for command, before in states.items()
    }
    with ledger.experiment("E2 a read fails with EIO") as trials:

        def trial(item: tuple[str, Call]) -> None:
            command, call = item
            with shimmed.place(states[command]) as place:
                fault = Fault(Action.FAIL_ONCE, call.number, errno.EIO, Kind.READS)
                outcome = shimmed.run(shimmed.arguments(command, place), place, fault=fault)
                problem = "" if outcome.is_one_line or outcome.code == 0 else str(outcome)
                if "--overwrite" in outcome.output or "elete" in outcome.output:
                    problem = f"advice that destroys good data, {outcome}"
                if outcome.code == 0 and command in STAGES:
                    problem = shimmed.difference(place, shimmed.after[command])
            trials.add(f"{command}, EIO at {call}", problem)

        shimmed.each(trial, shimmed.sample(calls, files=False))


@contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[None]:
    """Mount something at a directory; skip the test where that is not allowed."""
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root may mount a file system")
    done = subprocess.run(["mount", *arguments, place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine mounts no file system: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def size_of(place: Path) -> int:
    """Return the bytes that a directory takes in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in place.rglob("*"))


@pytest.mark.parametrize("command", STAGES[:4])
def test_on_a_full_disk_a_command_ends_in_one_line_and_completes_with_more_room(
    lab: Lab, ledger: Ledger, command: str, tmp_path: Path
) -> None:
    before = size_of(lab.before(command))
    following = (*STAGES, *OUTPUTS)[STAGES.index(command) + 1]
    added = size_of(lab.before(following)) - before
    steps = 10 if FULL else 1
    disk = tmp_path / "disk"
    disk.mkdir()
    with ledger.experiment("E2 a really full disk") as trials:
        for step in range(steps):
            room = before + added * (2 * step + 1) // (2 * steps)
            with mounted(disk, "-t", "tmpfs", "-o", f"size={room},mode=700", "tmpfs"):
                place = disk / "place"
                shutil.copytree(lab.before(command), place)
                old = lab.snapshot(place)
                outcome = lab.run(lab.arguments(command, place), place)
                problems = [
                    "" if outcome.is_one_line or outcome.code == 0 else str(outcome),
                    lab.partial(place, old, lab.after[command]),
                ]
                subprocess.run(["mount", "-o", "remount,size=100M", disk], check=True)
                problems.append(lab.completes(command, place, lab.after[command]))
            trials.add(f"{command} with {room} bytes", "; ".join(filter(None, problems)))


def test_in_a_directory_for_reading_only_every_command_ends_in_one_line(
    lab: Lab, ledger: Ledger
) -> None:
    with (
        ledger.experiment("E2 a directory for reading only") as trials,
        lab.place("end") as place,
        mounted(place, "--bind", str(place)),
    ):
        done = subprocess.run(["mount", "-o", "remount,bind,ro", place], capture_output=True)
        if done.returncode:
            pytest.skip("this machine mounts nothing for reading only")
        for command in (*STAGES, *OUTPUTS, "export"):
            changed: dict[str, object] = {"seed": 5, "overwrite": True}
            if command in (*OUTPUTS, "export"):
                changed = {"out": place / "new"}
            if command == "index":
                changed = {"id": lab.data / "fewer", "overwrite": True}
            outcome = lab.run(lab.arguments(command, place, **changed), place)
            trials.add(f"{command} {changed}", "" if outcome.is_one_line else str(outcome))
        outcome = lab.run(lab.arguments("verify", place), place)
        trials.add("verify", "" if outcome.code == 0 else str(outcome))
