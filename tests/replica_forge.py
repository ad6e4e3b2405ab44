"""A process that has imported everything and forks servers on order: real `promptd serve` processes in a second each.

One JSON order a line on stdin, one line back: `{"load": folder}` loads a model once, so that what loading imports is
imported before the forks; `{"settings": {…}, "log": path}` forks a server and answers its pid; `{"wait": pid,
"seconds": s}` answers its exit status when it has ended (negative: the signal), or null when it runs for longer. Beside
the settings, `{"lease_seconds": s}` gives a worker shorter leases than the product's, `{"step_seconds": s}` makes each
step of a job take at least so long, and `{"model_seconds": s}` puts a model in the served one's place that sleeps so
long in each step and says nothing; `{"connects": path}` writes down every address that is connected to.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import promptd.app  # noqa: F401 - imported here, once for all servers
from promptd import logs
from promptd.commands.launch import listen
from promptd.commands.serve import _start
from promptd.commands.worker import run_worker
from promptd.engine.runner import Answers, Made, Runner
from promptd.engine.schedule import Schedule
from promptd.jobs import claims
from promptd.modeling import load_model
from promptd.settings import Settings
from promptd.training import job, job_run
from promptd.training import worker as training_worker

STACKS = signal.SIGUSR2
"""Has a server write where its threads are."""
PARTING_SECONDS = 10
"""For threads that have ended to be gone."""


def say(**message: object) -> None:
    """Write one line in one system call."""
    os.write(1, json.dumps(message).encode() + b"\n")


def become(order: dict[str, object]) -> int:
    """Be a server, or a worker, until the end; return the exit code."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(STACKS)
    settings = Settings(**order["settings"])  # type: ignore[arg-type]
    if "lease_seconds" in order:
        claims.LEASE_SECONDS = float(order["lease_seconds"])  # type: ignore[arg-type]
        job_run.HEARTBEAT_SECONDS = training_worker.POLL_SECONDS = claims.LEASE_SECONDS / 5
    if "step_seconds" in order:
        slow_down(float(order["step_seconds"]))  # type: ignore[arg-type]
    if "model_seconds" in order:
        sleep_for_the_model(float(order["model_seconds"]))  # type: ignore[arg-type]
    if "connects" in order:
        write_down_connects(str(order["connects"]))
    try:
        if order.get("worker"):
            import asyncio

            logs.configure(secrets=settings.secrets)
            asyncio.run(run_worker(settings))
        else:
            with listen(settings.host, settings.port) as listener:
                _start(settings, listener)
    except SystemExit as ending:
        return int(ending.code or 0)
    except BaseException:  # noqa: BLE001 - into the log, as a process of its own would
        import traceback

        traceback.print_exc()
        return 1
    return 0


def slow_down(step_seconds: float) -> None:
    """Make training take its time, on however fast a machine."""
    learn = job.TrainingJob._learn

    def slow(self: job.TrainingJob, *args: Any) -> Any:
        time.sleep(step_seconds)
        return learn(self, *args)

    job.TrainingJob._learn = slow  # type: ignore[method-assign]


def sleep_for_the_model(model_seconds: float) -> None:
    """Have every step of the engine take so long without any processor's time: what is left is everything around it."""

    def run(self: Runner, step: Schedule, made: Made | None = None) -> Answers:
        time.sleep(model_seconds)
        num_logits = sum(row.is_final for row in step.rows)
        return Answers([], torch.zeros(num_logits, self._model.spec.vocab_size))

    Runner.run = run  # type: ignore[method-assign]


def write_down_connects(path: str) -> None:
    """Write every address that Python connects or sends to into a file, whichever library does it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto"):
            os.write(file, f"{arguments[1]}\n".encode())

    sys.addaudithook(hook)


def wait(pid: int, seconds: float) -> int | None:
    """Wait for a server's end and return its exit status; None where it does not come."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def num_threads() -> int:
    """Threads of this process, as the system sees them."""
    threads = Path("/proc/self/task")
    return len(list(threads.iterdir())) if threads.exists() else 1


def main() -> None:
    """Carry out orders until there are no more."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread would never end
    num_own = num_threads()  # those of BLAS, which end before a fork
    for line in sys.stdin:
        order = json.loads(line)
        if "load" in order:
            load_model(order["load"])
            gc.freeze()  # a collection in a fork would copy all pages that it walks
            say(loaded=order["load"])
        elif "wait" in order:
            say(status=wait(order["wait"], order["seconds"]))
        else:
            # Python's `join` returns before a thread is gone. On its way out it takes locks of the C libraries, which
            # in a fork at that moment nobody would ever release: servers hung in MKL's memory manager.
            end = time.monotonic() + PARTING_SECONDS
            while num_threads() > num_own and time.monotonic() < end:
                time.sleep(0.001)
            pid = os.fork()
            if pid == 0:
                code = become(order)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            say(pid=pid)
    gc.unfreeze()  # or it would not be taken down in order


if __name__ == "__main__":
    main()
