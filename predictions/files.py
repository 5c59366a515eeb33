"""Files that are whole or not there: whoever looks, and whenever the writer is killed."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def open_whole(path: str | Path, mode: str = "wb", overwrite: bool = True, **options: Any) -> Iterator[IO]:
    """
    Open a file for writing that takes its name when the block ends, on the disk by then, and is removed if it fails.

    With `overwrite` an older file of that name is replaced in one step, a link of that name by a file, and of several
    processes that write the same file the last one wins; without, `FileExistsError`. options: of `open`. An `OSError`
    of the writing names `path`.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(unfinished, mode.replace("w", "x"), **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not overwrite:
            check_free(path)
        os.replace(unfinished, path)
    except OSError as error:
        if error.filename in (None, str(unfinished)):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Raises `FileExistsError` where something, a broken link included, has that name."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
