"""Text and JSON files that are whole or not there."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def open_whole(path: str | Path, mode: str = "wb", **options: Any) -> AbstractContextManager[IO]:
    """See `depthvlm.predictions.files.open_whole`."""
    from depthvlm.predictions import files  # here: the loading script reads rows without that package

    return files.open_whole(path, mode, **options)


def read_json(path: str | Path, remedy: str) -> Any:
    """Strict JSON: NaN and infinity are refused. Raises ValueError that ends in `remedy`."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); {remedy}") from error


def write_text(path: str | Path, text: str) -> None:
    with open_whole(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Indented; NaN and infinity, which JSON does not know, raise ValueError."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def shared_folder(folder: Path, unfinished: Iterable[str]) -> Iterator[None]:
    """
    For the time that a process writes to a folder: whoever is alone there removes what killed ones left of open_whole.

    unfinished: glob patterns, below the folder, of the names that open_whole gives. On a file system without locks of
    folders (NFS), leftovers stay.
    """
    import fcntl  # Linux and macOS

    descriptor = os.open(folder, os.O_RDONLY)

    def remove_leftovers():
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for pattern in unfinished:
                for path in folder.glob(pattern):
                    path.unlink()

    try:
        remove_leftovers()
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
        remove_leftovers()
    finally:
        os.close(descriptor)
