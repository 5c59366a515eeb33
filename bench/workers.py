"""Worker processes that end quietly: by Ctrl-C, and with their parent, however that ends."""

import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor


class Workers(ProcessPoolExecutor):
    """A pool of spawned processes, for a `with` block: when it ends by an error, the tasks in work are given up."""

    def __init__(self, num_proc: int):
        super().__init__(num_proc, multiprocessing.get_context("spawn"), initializer=_begin)
        self.size = num_proc
        self.processes = set()

    def submit(self, function, /, *args) -> Future:
        others = set(multiprocessing.active_children())
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a process that starts here is not yet quiet
        future = super().submit(function, *args)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self.processes |= set(multiprocessing.active_children()) - others
        return future

    def __exit__(self, error, *args) -> None:
        self.shutdown(wait=error is None, cancel_futures=True)
        if error is not None:
            for process in self.processes:
                with contextlib.suppress(OSError):
                    process.kill()


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent()


def end_with_parent(*_) -> None:
    """End this process when its parent has ended; `worker_init_fn` of DataLoader, whose workers may outlive it."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
