"""What the page keeps of each visitor, in memory, and the files that Gradio makes of it, until the visitor leaves."""

import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from .engine import Engine, Result

# After so long a file that no visit has claimed was left by an upload that was never used, or fetched by its client
UNUSED_SECONDS, FETCHED_SECONDS = 3600, 120
FETCHED = "api-"  # begins the names of folders with answers to clients


@dataclass(frozen=True)
class Download:
    """A file to be made when it is asked for."""

    name: str
    kind: str  # media type
    make: Callable[[], bytes]


@dataclass
class Visit:
    """
    One open page.

    made_with: the file and detail of `result`. files: what the page shows; former: what it showed before, and may still
    be loading. downloads: by part of the page and secret token.
    """

    result: Result | None = None
    made_with: tuple = ()
    files: set[Path] = field(default_factory=set)
    former: set[Path] = field(default_factory=set)
    downloads: dict[str, dict[str, Download]] = field(default_factory=dict)


class Visits:
    """
    All open pages, by Gradio's session hash.

    folder: where Gradio puts its files. They are shared by their content, so one that another visit uses stays.
    """

    def __init__(self, engine: Engine, folder: Path):
        self.engine, self.folder = engine, folder
        self.visits: dict[str, Visit] = {}
        self.lock = threading.Lock()
        self.kept: set[Path] = set()  # of the page itself: samples

    def of(self, session: str) -> Visit:
        with self.lock:
            return self.visits.setdefault(session, Visit())

    def claim(self, visit: Visit, *files: str | Path) -> None:
        """The visit's files; those that it had before its last ones are removed."""
        with self.lock:
            visit.files, visit.former, old = {Path(file) for file in files}, visit.files, visit.former
            self._remove(old)

    def leave(self, session: str) -> None:
        with self.lock:
            visit = self.visits.pop(session, Visit())
            if visit.result is not None:
                self.engine.forget(visit.result)
            self._remove(visit.files | visit.former)
        self.sweep()

    def sweep(self) -> None:
        """Remove what nobody uses any more."""
        now = time.time()
        with self.lock:
            for parent, _, files in os.walk(self.folder):  # other visitors' files may go meanwhile
                age = FETCHED_SECONDS if Path(parent).name.startswith(FETCHED) else UNUSED_SECONDS
                for path in (Path(parent, name) for name in files):
                    with suppress(FileNotFoundError):
                        if now - path.stat().st_mtime > age:
                            self._remove([path])

    def offer(self, visit: Visit, part: str, downloads: list[Download]) -> dict[str, str]:
        """File name -> its address, for as long as the visit lasts or until the next offer of that part of the page."""
        tokens = {secrets.token_urlsafe(24): download for download in downloads}
        with self.lock:
            visit.downloads[part] = tokens
        return {download.name: f"download/{token}/{quote(download.name)}" for token, download in tokens.items()}

    def download(self, token: str) -> Download | None:
        with self.lock:
            for visit in self.visits.values():
                for offered in visit.downloads.values():
                    if token in offered:
                        return offered[token]
        return None

    def _remove(self, files) -> None:
        used = self.kept.union(*(visit.files | visit.former for visit in self.visits.values()))
        for path in set(files) - used:
            path.unlink(missing_ok=True)
            if path.parent != self.folder and path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()
