"""Real Ray for tests: its files in one short folder that goes with them, and nothing left running."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds; a process that loads a model takes 10 on a quiet machine


@contextmanager
def ray_environment() -> Iterator[dict[str, str]]:
    """The environment of processes that use Ray; sockets need a short path, and Ray's token goes below HOME."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    (folder / "home").mkdir()
    changes = {"HOME": str(folder / "home"), "RAY_TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    changes |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_metrics_report_interval_ms": "1000"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | changes
    try:
        yield environment
        wait_for(lambda: not processes_of(folder), f"the end of {processes_of(folder)}", seconds=30)
    finally:
        left = processes_of(folder)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=30)
        shutil.rmtree(folder)


def processes_of(folder: Path) -> list[psutil.Process]:
    """All processes that were started with `folder`, but this one."""

    def uses(process) -> bool:
        try:
            return process.environ().get("RAY_TMPDIR") == str(folder) and process.pid != os.getpid()
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if uses(process)]


def start(environment: dict[str, str], *arguments) -> subprocess.Popen:
    """`python -m cluster ARGUMENTS`; started elsewhere, so that workers find the package because it is installed."""
    command = [sys.executable, "-m", "cluster", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, cwd=environment["HOME"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(environment: dict[str, str], *arguments, seconds: float = PATIENCE) -> str:
    """The same, to its successful end; returns what it printed."""
    process = start(environment, *arguments)
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE):
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come within {seconds} s")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
