"""What a prediction over many photos does, fixed before it starts: OUT/plan.json and OUT/inputs.parquet.

Shard i holds the inputs i * shard_size .. (i + 1) * shard_size of the listing and becomes the file
OUT/shards/part-{i}-of-{n}.parquet. A shard whose file exists is finished; nothing else is remembered. So any number of
processes on any number of machines, killed and started again as often as you like, ends in the same files.
"""

import functools
import json
import math
import socket
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq

from bench.files import open_whole, write_json

from .inputs import Input, digest, list_photos

DEPTH_SIZES = ("photo", "processed")
LISTED_TOGETHER = 1 << 16  # rows of a row group of inputs.parquet


@dataclass(frozen=True)
class Settings:
    """
    What decides the output, to the byte.

    source: the photos. model: folder or hub id of a checkpoint; checkpoint: what that name stands for, a digest of its
        files or a commit. device: "cpu" or "cuda". dtype: of the model.
    question: about each photo, with at most max_new_tokens of answer; `None`: depth alone.
    focal_length: px at the photos' own size, for those without one in the listing; `None`: from EXIF, else assumed.
    max_pixels: budget for the processed photo. depth_size: "photo", maps at each photo's size, or "processed", at the
        size that the network works at, which holds as much detail.
    shard_size: photos per file. batch_size: photos per forward pass. threads: of torch, in each process with a model.
    """

    source: Input
    model: str
    checkpoint: str
    device: str
    dtype: str
    question: str | None = None
    max_new_tokens: int = 128
    focal_length: float | None = None
    max_pixels: int | None = None
    depth_size: str = "photo"
    shard_size: int = 128
    batch_size: int = 4
    threads: int = 1


@dataclass(frozen=True)
class Plan:
    """Settings, the folder that the output goes to, and the number of photos."""

    settings: Settings
    out: Path
    photos: int

    @property
    def shards(self) -> int:
        return math.ceil(self.photos / self.settings.shard_size)

    def size(self, shard: int) -> int:
        """Number of photos of a shard."""
        return min(self.settings.shard_size, self.photos - shard * self.settings.shard_size)

    def path(self, shard: int) -> Path:
        return self.out / "shards" / f"part-{shard:05d}-of-{self.shards:05d}.parquet"

    def unfinished(self) -> list[int]:
        present = {path.name for path in (self.out / "shards").glob("part-*.parquet")}
        return [shard for shard in range(self.shards) if self.path(shard).name not in present]

    def inputs(self, shard: int) -> list[dict]:
        """A shard's rows of the listing."""
        first, rows = shard * self.settings.shard_size, []
        last = first + self.size(shard)
        while first < last:
            group, start = divmod(first, LISTED_TOGETHER)
            table = _listed(self.out, group).slice(start, last - first)
            rows += table.to_pylist()
            first += len(table)
        return rows


@functools.lru_cache(maxsize=2)
def _listed(out: Path, group: int):
    with pq.ParquetFile(out / "inputs.parquet") as file:
        return file.read_row_group(group)


def begin(settings: Settings, out: Path) -> Plan:
    """
    List the input and write the plan, or check that the one in `out` is the same.

    Raises `ValueError` for a folder that holds another plan, or one of other photos.
    """
    listing = list_photos(settings.source)
    record = json.loads(json.dumps(asdict(settings)))
    record |= {"photos": len(listing), "listing": digest(listing), "versions": versions()}
    file = out / "plan.json"
    if file.exists():
        begun = json.loads(file.read_text(encoding="utf-8"))
        if differing := [key for key in record if record[key] != begun.get(key)]:
            changes = ", ".join(f"{key} {begun.get(key)!r} (now {record[key]!r})" for key in differing)
            raise ValueError(
                f"{out} holds the predictions of another plan: {changes}; repeat its command, give another --out, or "
                "remove it"
            )
    else:
        (out / "shards").mkdir(parents=True, exist_ok=True)
        with open_whole(out / "inputs.parquet") as content:
            pq.write_table(listing, content, row_group_size=LISTED_TOGETHER, compression="zstd")
        write_json(file, record)
    return Plan(settings, out, len(listing))


def open_plan(out: Path) -> Plan:
    """The plan that `begin` wrote, for another process. Raises `ValueError` where it would write other bytes."""
    record = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    if record["versions"] != versions():
        raise ValueError(
            f"node {socket.gethostname()} has {versions()}, the plan is of {record['versions']}; install the same "
            "versions on all nodes"
        )
    fields = {name: record[name] for name in Settings.__dataclass_fields__}
    source = Input(**fields["source"] | {"focal_length_columns": tuple(fields["source"]["focal_length_columns"])})
    return Plan(Settings(**fields | {"source": source}), out, record["photos"])


def versions() -> dict[str, str]:
    """Of the packages that decide a shard's bytes."""
    return {name: version(name) for name in ("torch", "transformers", "numpy", "pillow", "pyarrow")}
