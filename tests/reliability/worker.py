"""Imports ood_heatmap once, then runs each command it is sent in a fork of itself.

Started by ``lab.Lab`` with the shim preloaded: ``python worker.py DESCRIPTOR...``, one socket
for each lane. A lane takes one request at a time, a line of JSON, and answers with a line of JSON.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

STAGES = ("index", "targets", "train", "evaluate", "localize", "predict", "export", "verify")
NO_ANSWER = -1  # instead of an exit status: the command was still running at its time limit


def serve(lane: socket.socket) -> None:
    """Answer requests until the other end is closed."""
    stopped: dict[str, Any] = {}
    with lane.makefile("rw", encoding="utf-8") as file:
        for line in file:
            request = json.loads(line)
            if request.get("resume"):
                os.kill(stopped["pid"], signal.SIGCONT)
                answer = wait(stopped)
            else:
                pid = os.fork()
                if not pid:
                    run(request)
                answer = wait({"pid": pid, "timeout": request["timeout"], **request})
            if "stopped" in answer:
                stopped = answer["stopped"]
                answer = {"stopped": True}
            file.write(json.dumps(answer) + "\n")
            file.flush()


def wait(child: dict[str, Any]) -> dict[str, Any]:
    """Wait for a child to end or to stop itself; kill it at its time limit, or when asked to."""
    began = time.monotonic()
    kill_after = child.get("kill_after")
    limit = child["timeout"] if kill_after is None else kill_after
    while True:
        pid, status = os.waitpid(child["pid"], os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            return {"stopped": child}
        if pid:
            return {"status": os.waitstatus_to_exitcode(status)}
        if time.monotonic() - began > limit:
            os.kill(child["pid"], signal.SIGKILL)
            os.waitpid(child["pid"], 0)
            return {"status": NO_ANSWER if kill_after is None else -signal.SIGKILL}
        time.sleep(0.002)


def run(request: dict[str, Any]) -> None:
    """Run the command line, or the function, of a request, and end the process."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.umask(0o022)
    os.environ.update(request["environment"])
    sys.path[:0] = filter(None, request["environment"].get("PYTHONPATH", "").split(os.pathsep))
    for name, value in request["constants"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant), name
        setattr(importlib.import_module(module), constant, value)
    if request["fault"]:
        ctypes.CDLL(None).shim_arm(*(as_argument(item) for item in request["fault"]))
    code = 0
    try:
        if "call" in request:
            function, *arguments = request["call"]
            getattr(importlib.import_module("inside"), function)(*arguments)
        else:
            from ood_heatmap.cli import main

            main.main(request["arguments"], prog_name="ood-heatmap")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 70
    threading._shutdown()  # type: ignore[attr-defined]  # as at the end of any program
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def as_argument(item: str | int) -> Any:
    """Return an argument for a C function."""
    return os.fsencode(item) if isinstance(item, str) else ctypes.c_long(item)


def main() -> None:
    """Import everything that takes long, fork a process for each lane, and serve."""
    for name in STAGES:
        importlib.import_module(f"ood_heatmap.pipeline.{name}")
    importlib.import_module("inside")
    importlib.import_module("matplotlib.pyplot").figure()  # finds the fonts
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page of it
    lanes = [socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:]]
    for number in range(1, len(lanes)):
        if not os.fork():
            for other in (*lanes[:number], *lanes[number + 1 :]):
                other.close()
            serve(lanes[number])
            os._exit(0)
    for other in lanes[1:]:
        other.close()
    serve(lanes[0])
    for _ in lanes[1:]:
        os.wait()
    os._exit(0)  # nothing to put away, and PyTorch takes its time


if __name__ == "__main__":
    main()
