"""Whether files are still what was written: hashes of files and of rows, and JSON records that hold their own checksum.

A record is JSON whose last field, `checksum`, is the SHA-256 of the file without that field. It says that nothing
changed by accident, not that nobody did it on purpose.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from .files import json_text, write_text

logger = logging.getLogger(__name__)


def fingerprint(path: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            digest.update(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def difference(path: Path, recorded: dict) -> str:
    """What tells a file from its fingerprint; "" for nothing."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != recorded["bytes"]:
        return f"{path} has {size} bytes, its record says {recorded['bytes']}"
    if fingerprint(path)["sha256"] != recorded["sha256"]:
        return f"{path} differs from its record, sha256 {recorded['sha256']}"
    return ""


def write_record(path: Path, content: dict) -> dict:
    """Write `content` with its checksum; returns what was written, as JSON gives it back."""
    text = json_text(content)
    record = json.loads(text) | {"checksum": checksum(text)}
    write_text(path, json_text(record))
    return record


def read_record(path: Path, older: bool = False) -> dict:
    """
    A file of `write_record`. Raises ValueError unless it is as it was written, byte by byte, or OSError.

    older: accept a record without a checksum too, as builds wrote them before there were checksums.
    """
    content = path.read_bytes()
    try:
        record = json.loads(content)
        body = {key: value for key, value in record.items() if key != "checksum"}
        if older and body == record:
            return record
        intact = record["checksum"] == checksum(json_text(body)) and json_text(record).encode() == content
    except (ValueError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is no record with a checksum ({type(error).__name__}: {error})") from error
    if not intact:
        raise ValueError(f"{path} has changed since it was written: its checksum does not match")
    return record


def record_beside(file: Path) -> dict | None:
    """The record FILE.json of a file, if both are as they were written; None, with a warning, if they are not."""
    try:
        record = read_record(file.with_suffix(".json"))
    except FileNotFoundError:
        return None  # the file is unfinished, if it is there
    except ValueError as error:
        logger.warning("%s; it is made again", error)
        return None
    if reason := difference(file, record["file"]):
        logger.warning("%s; it is made again", reason)
        return None
    return record


def write_record_beside(file: Path, content: dict) -> dict:
    return write_record(file.with_suffix(".json"), content | {"file": {"name": file.name} | fingerprint(file)})


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def row_hash(row: dict) -> str:
    """SHA-256 of a row as Arrow gives it: of all its columns, an image by the hash of its file."""
    images = {name: row[name] and hashlib.sha256(row[name]["bytes"] or b"").hexdigest() for name in ("image", "depth")}
    return checksum(json.dumps(row | images, sort_keys=True))


def content_hash(hashes: Iterable[str]) -> str:
    """The hash that names a source's rows, whatever files they lie in: of the hashes of its rows, in their order."""
    return checksum("\n".join(hashes))


def versions() -> dict[str, str]:
    """Of what decides the bytes of a build."""
    return {"python": python_version()} | {name: version(name) for name in ("numpy", "pillow", "pyarrow", "datasets")}
