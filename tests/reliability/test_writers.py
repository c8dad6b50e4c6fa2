"""Two processes at once: one of them is refused, or neither disturbs the other."""

import hashlib
import random
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab import FULL, STAGES, Action, Fault, Kind, Lab, Ledger, Outcome, killed


@pytest.mark.parametrize("locking", ["TRUE", "FALSE"])
def test_a_second_writer_is_refused_and_the_first_is_not_disturbed(
    shimmed: Lab, ledger: Ledger, locking: str
) -> None:
    dice = random.Random(locking)
    environment = {"HDF5_USE_FILE_LOCKING": locking}
    pairs = [(first, second) for first in STAGES for second in STAGES]
    with ledger.experiment("E4 a second writer") as trials:
        for command, other in pairs if FULL else dice.sample(pairs[:15], 2):
            with shimmed.place(command) as place, shimmed.lane() as lane:
                # while the first holds its lock: between its first and its last write
                calls = shimmed.calls[command]
                number = dice.randrange(len(calls) // 4, len(calls) * 3 // 4)
                words = {"arguments": shimmed.arguments(command, place)}
                fault = Fault(Action.STOP, number)
                assert lane.start(words, place, fault=fault, environment=environment) is None
                arguments = shimmed.arguments(other, place)
                outcome = shimmed.run(arguments, place, environment=environment)
                problem = "" if outcome.is_one_line else str(outcome)
                first = lane.resume()
                problem = problem or ("" if first.code == 0 else str(first))
                problem = problem or shimmed.difference(place, shimmed.after[command])
            trials.add(f"{command} at call {number}, {other}", problem)


def test_of_two_predictions_into_one_folder_each_is_whole_or_refused(
    shimmed: Lab, ledger: Ledger
) -> None:
    with shimmed.place("predict") as place:
        arguments = shimmed.arguments("predict", place)
        arguments[arguments.index(str(shimmed.data / "few"))] = str(shimmed.data / "far")
        assert shimmed.run(arguments, place).code == 0
        theirs = (place / "out" / "scores.csv").read_bytes()
    ours = shimmed.after["predict"]["out/scores.csv"][1]
    numbers = [call.number for _, call in shimmed.sample({"predict": shimmed.calls["predict"]})]
    chosen = random.Random(0).sample(numbers, min(40, len(numbers)) if FULL else 4)
    with ledger.experiment("E4 two predictions into one folder") as trials:
        for number in chosen:
            with shimmed.place("predict") as place, shimmed.lane() as lane:
                words = {"arguments": shimmed.arguments("predict", place)}
                stopped = lane.start(words, place, fault=Fault(Action.STOP, number)) is None
                arguments = shimmed.arguments("predict", place)
                arguments[arguments.index(str(shimmed.data / "few"))] = str(shimmed.data / "far")
                second = shimmed.run(arguments, place)
                table = place / "out" / "scores.csv"
                problems = []
                if second.code != 0 and not second.is_one_line:
                    problems.append(str(second))
                if second.code == 0 and table.read_bytes() != theirs:
                    problems.append("the second one's table is not its own")
                if stopped:
                    first = lane.resume()
                    if first.code != 0 and not first.is_one_line:
                        problems.append(str(first))
                    if first.code == 0 and table.read_bytes() not in (ours, theirs):
                        problems.append("the table is neither one's")
                    if second.code == 0 and first.code != 0 and table.read_bytes() != theirs:
                        problems.append("the second one's table was changed")
                    if second.code != 0 and first.code != 0:
                        problems.append(f"both have failed, {first}")
            trials.add(f"predict stopped at call {number}, predict", "; ".join(problems))


EMPTY = hashlib.sha256(b"").hexdigest()[:8]  # of no calibration, in the words of ``inside.load``


def test_a_detector_is_of_one_state_of_its_run_or_is_not_loaded(
    shimmed: Lab, ledger: Ledger
) -> None:
    # stands in for another process that makes both stages again between two reads
    def load(place: Path, fault: Fault | None = None) -> Outcome:
        return shimmed.call("load", str(place / "run"), root=place, fault=fault)

    with shimmed.place("train") as place:
        for command in ("train", "evaluate"):
            outcome = shimmed.run(shimmed.arguments(command, place, seed=1), place)
            assert outcome.code == 0, outcome.output
        other = shimmed.folder / "another run"
        shutil.copytree(place, other)
        new = load(place).output.splitlines()[-1]
    with shimmed.place("end") as place:
        old = load(place).output.splitlines()[-1]
        reads = load(place, Fault(Action.COUNT, kinds=Kind.READS)).calls
    assert old != new
    opens = [call for call in reads if call.name == "open"]
    chosen = reads if FULL else opens[::2]
    with ledger.experiment("E4 a detector loaded while it is made again") as trials:

        def trial(number: int) -> None:
            with shimmed.place("end") as place, shimmed.lane() as lane:
                words = {"call": ["load", str(place / "run")]}
                fault = Fault(Action.STOP, number, kinds=Kind.READS)
                stopped = lane.start(words, place, fault=fault)
                assert stopped is None
                for name in ("decoder", "evaluation"):
                    shutil.rmtree(place / "run" / name)
                    shutil.copytree(other / "run" / name, place / "run" / name)
                outcome = lane.resume()
                last = outcome.output.strip().splitlines()[-1]
                good = "OodHeatmapError" in last or "CacheError" in last
                if outcome.code == 0:
                    decoders = [line.split()[0] for line in (old, new)]
                    said = "not calibrated" in outcome.output
                    uncalibrated = said and last in [f"{one} {EMPTY} loaded" for one in decoders]
                    good = last in (old, new) or uncalibrated
                trials.add(f"load stopped at {outcome.calls[-1]}", "" if good else last)

        shimmed.each(trial, [call.number for call in chosen])
    shutil.rmtree(other)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_on_two(
    lab: Lab, command: str, place: Path, fault: Fault | None = None, faulty: int = 0
) -> list[Outcome]:
    """Run a command in two processes, as torchrun does; when one dies the other is killed."""
    port = free_port()

    def run(rank: int) -> Outcome:
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        mine = fault if rank == faulty else None
        return lab.run(lab.arguments(command, place), place, fault=mine, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


@pytest.mark.parametrize(
    "command", ["index", "targets", "evaluate"] if FULL else ["index", "targets"]
)
def test_two_processes_make_what_one_makes_also_when_one_is_killed(
    shimmed: Lab, ledger: Ledger, command: str
) -> None:
    wanted = shimmed.after[command]
    dice = random.Random(command)
    with ledger.experiment("E7 one process or two") as trials:
        with shimmed.place(command) as place:
            outcomes = run_on_two(shimmed, command, place)
            bad = [str(outcome) for outcome in outcomes if outcome.code != 0]
            trials.add(f"{command}, 2 processes", "".join(bad) or shimmed.difference(place, wanted))
        for number in range(6 if FULL else 1):
            rank = number % 2
            last = len(shimmed.calls[command])
            # of two processes each writes about half; the second one only shards
            call = dice.randrange(2, last // 2 if rank == 0 else 20)
            with shimmed.place(command) as place:
                fault = Fault(Action.KILL, call)
                outcomes = run_on_two(shimmed, command, place, fault, rank)
                problem = ""
                if killed(outcomes[rank]) and not (
                    outcomes[1 - rank].is_one_line or killed(outcomes[1 - rank])
                ):
                    problem = f"process {1 - rank}: {outcomes[1 - rank]}"
                problem = problem or shimmed.completes(command, place, wanted)
            trials.add(f"{command}, 2 processes, {rank} killed at call {call}, then 1", problem)
        for _ in range(2 if FULL else 1):
            call = dice.randrange(2, len(shimmed.calls[command]) - 2)
            with shimmed.place(command) as place:
                arguments = shimmed.arguments(command, place)
                shimmed.run(arguments, place, fault=Fault(Action.KILL, call))
                outcomes = run_on_two(shimmed, command, place)
                bad = [str(outcome) for outcome in outcomes if outcome.code != 0]
                problem = "".join(bad) or shimmed.difference(place, wanted)
            trials.add(f"{command}, 1 process killed at call {call}, then 2", problem)
