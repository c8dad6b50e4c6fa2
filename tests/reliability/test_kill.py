"""A process killed at any file call leaves nothing partial, and the same command completes."""

import random

import pytest
from lab import (
    FULL,
    OUTPUTS,
    STAGES,
    Action,
    Call,
    Fault,
    Lab,
    Ledger,
    Snapshot,
    killed,
)

CHECKPOINTS = {"ood_heatmap.pipeline.train._CHECKPOINT_SECONDS": 0.0}
EPOCHS = {"epochs": 3}
NAMES = ("rename", "unlink", "rmdir", "mkdir", "open for writing")


def survives(
    lab: Lab, command: str, before: str, fault: Fault, wanted: Snapshot, **changed: object
) -> str:
    """Kill a command at a call and start it again; return what did not hold."""
    with lab.place(before) as place:
        old = lab.snapshot(place)
        outcome = lab.run(lab.arguments(command, place, **changed), place, fault=fault)
        if not killed(outcome):
            # threads make the number of calls differ by a few
            return lab.difference(place, wanted) if outcome.code == 0 else str(outcome)
        problem = lab.partial(place, old, wanted) or lab.completes(
            command, place, wanted, **changed
        )
        return problem and f"killed at {outcome.calls[-1]}: {problem}"


@pytest.mark.parametrize("action", [Action.KILL, Action.KILL_HALF])
def test_killed_before_or_inside_any_call_a_command_completes(
    shimmed: Lab, ledger: Ledger, action: Action
) -> None:
    calls = {command: shimmed.calls[command] for command in (*STAGES, *OUTPUTS)}
    if action == Action.KILL_HALF:
        calls = {
            command: tuple(call for call in some if "write" in call.name and call.num_bytes > 1)
            for command, some in calls.items()
        }
    name = {Action.KILL: "E1 killed before a call", Action.KILL_HALF: "E1 killed inside a write"}
    with ledger.experiment(name[action]) as trials:

        def trial(item: tuple[str, Call]) -> None:
            command, call = item
            fault = Fault(action, call.number)
            problem = survives(shimmed, command, command, fault, shimmed.after[command])
            trials.add(f"{command}, {call}", problem)

        shimmed.each(trial, shimmed.sample(calls, files=action == Action.KILL))


def test_killed_between_checkpoints_training_completes(shimmed: Lab, ledger: Ledger) -> None:
    wanted = shimmed.unbroken("train", "train", **EPOCHS)
    with shimmed.place("train") as place:
        arguments = shimmed.arguments("train", place, **EPOCHS)
        counted = shimmed.run(
            arguments, place, fault=Fault(Action.COUNT), constants=CHECKPOINTS
        ).calls
    names = ("last.ckpt", "history.jsonl")
    calls = [call for call in counted if call.path.endswith(names) and call.name == "rename"]
    near = [call.number + step for call in calls for step in range(-2, 5)]
    with ledger.experiment("E1 killed between checkpoints") as trials:

        def trial(number: int) -> None:
            with shimmed.place("train") as place:
                hits = []
                for fault in (Fault(Action.KILL, number), Fault(Action.KILL, number // 2)):
                    arguments = shimmed.arguments("train", place, **EPOCHS)
                    outcome = shimmed.run(arguments, place, fault=fault, constants=CHECKPOINTS)
                    hits += [str(call) for call in outcome.calls]
                problem = shimmed.completes("train", place, wanted, **EPOCHS)
                trials.add(f"train, killed at {' and '.join(hits)}", problem)

        shimmed.each(trial, near if FULL else random.Random(0).sample(near, 3))


OVERWRITTEN = STAGES[:4] if FULL else STAGES[:3]


def other_options(lab: Lab, command: str) -> dict[str, object]:
    """Return options with which a stage is made from something else."""
    others: dict[str, dict[str, object]] = {
        "index": {"id": lab.data / "fewer"},
        "targets": {"patched": 0},
    }
    return others.get(command, {"seed": 1})


def name_calls(lab: Lab, command: str, options: dict[str, object]) -> list[Call]:
    """Return the calls of ``--overwrite`` that change what names there are."""
    calls = lab.count(command, "end", options={**options, "overwrite": True})
    return [call for _, call in lab.sample({command: calls}) if call.name in NAMES]


@pytest.mark.parametrize("command", OVERWRITTEN)
def test_killed_inside_overwrite_no_old_file_gets_into_the_new_stage(
    shimmed: Lab, ledger: Ledger, command: str
) -> None:
    changed = other_options(shimmed, command)
    wanted = shimmed.unbroken(command, "end", **changed, overwrite=True)
    chosen = name_calls(shimmed, command, changed)
    if not FULL:
        chosen = random.Random(0).sample(chosen, 3 if command in ("index", "targets") else 1)
    with ledger.experiment("E1 killed inside --overwrite") as trials:

        def trial(call: Call) -> None:
            fault = Fault(Action.KILL, call.number)
            problem = survives(shimmed, command, "end", fault, wanted, **changed, overwrite=True)
            trials.add(f"{command} --overwrite, {call}", problem)

        shimmed.each(trial, chosen)


@pytest.mark.parametrize("command", OVERWRITTEN)
def test_killed_inside_overwrite_the_old_command_refuses_or_completes(
    shimmed: Lab, ledger: Ledger, command: str
) -> None:
    changed = other_options(shimmed, command)
    with shimmed.place("end") as place:
        wanted = shimmed.snapshot(place)
    chosen = name_calls(shimmed, command, changed)
    if not FULL:
        chosen = random.Random(1).sample(chosen, 1)
    with ledger.experiment("E1 killed inside --overwrite, old command") as trials:

        def trial(call: Call) -> None:
            with shimmed.place("end") as place:
                arguments = shimmed.arguments(command, place, **changed, overwrite=True)
                shimmed.run(arguments, place, fault=Fault(Action.KILL, call.number))
                outcome = shimmed.run(shimmed.arguments(command, place), place)
                problem = "" if outcome.is_one_line else str(outcome)
                if outcome.code == 0:
                    problem = shimmed.difference(place, wanted)
                trials.add(f"{command} --overwrite, {call}, {command}", problem)

        shimmed.each(trial, chosen)


def test_killed_at_random_moments_a_command_completes(lab: Lab, ledger: Ledger) -> None:
    dice = random.Random(0)
    chosen = STAGES[:4] * 10 if FULL else STAGES[:3]
    moments = [(command, [dice.uniform(0, 1.5) for _ in range(2)]) for command in chosen]
    with ledger.experiment("E1 killed at random moments") as trials:

        def trial(item: tuple[str, list[float]]) -> None:
            command, seconds = item
            with lab.place(command) as place:
                arguments = lab.arguments(command, place)
                for moment in seconds:
                    lab.run(arguments, place, kill_after=moment)
                problem = lab.completes(command, place, lab.after[command])
                trials.add(f"{command}, after {seconds}", problem)

        lab.each(trial, moments)
