"""Ray, for those who have it: a connection, and a pool of workers on it."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from . import manifest

RETRIES = 3  # of a task whose worker or node has died


def require_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Ray is missing: pip install 'depthvlm[ray]'") from error
    return ray


@contextmanager
def connected(address: str, **options) -> Iterator[None]:
    """
    For the block: connected to a Ray cluster, or, with "local", to one of this machine that ends with the block, for
    which the options of `ray.init` are.

    Raises `ConnectionError` where no cluster answers.
    """
    ray = require_ray()
    started = {"include_dashboard": False} | options if address == "local" else {}
    ray.init(address, logging_level="error", log_to_driver=False, **started)
    try:
        yield
    finally:
        ray.shutdown()


class RayWorkers:
    """
    The pool that `Workers` is, on the Ray cluster that is connected to: a task whose worker or node dies runs again.

    A task is refused on a node whose `manifest.versions` differ from those here.
    """

    def __init__(self):
        ray = require_ray()
        self.ray, self.call = ray, ray.remote(max_retries=RETRIES)(_call)

    @property
    def size(self) -> int:
        """CPUs of the cluster, which may grow."""
        return int(self.ray.cluster_resources()["CPU"])

    def submit(self, function: Callable, /, *args: Any) -> Future:
        """A task of one CPU. Its exception is the function's own, as in this process."""
        task, result = self.call.remote(manifest.versions(), function, *args).future(), Future()

        def finish(task: Future) -> None:
            error = task.exception()
            if error is None:
                result.set_result(task.result())
            else:
                result.set_exception(error.cause if isinstance(error, self.ray.exceptions.RayTaskError) else error)

        task.add_done_callback(finish)
        return result


def _call(versions: dict[str, str], function: Callable, *args: Any) -> Any:
    if differing := {name: value for name, value in manifest.versions().items() if value != versions[name]}:
        raise ValueError(
            f"node {socket.gethostname()} has {differing}, this machine {versions}; install the same versions on all"
        )
    return function(*args)


@contextmanager
def ray_workers(address: str) -> Iterator[RayWorkers]:
    """For the block; address: see `connected`."""
    with connected(address):
        yield RayWorkers()
