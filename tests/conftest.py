"""
How a run of the tests ends: all exit handlers, but not the interpreter's finalization.

The libraries of all tests lie in one process, with threads of their own that outlive a `shutdown` (Ray's gRPC client,
Arrow's pools). Such a thread can meet memory that finalization has freed, and the run that had passed ends in SIGSEGV.
The commands themselves are run in processes of their own, to their very end.
"""

import atexit
import os
import sys

_sessions = []


def pytest_sessionfinish(session):
    _sessions.append(session)


@atexit.register  # before the libraries' own handlers, and so called after them
def leave():
    if _sessions:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(_sessions[-1].exitstatus))
