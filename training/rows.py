"""Rows as they are stored, in blocks.

A *block* is the least that is read on its own: a row group of a Parquet file, or `BLOCK` rows of a format that gives
access to every row. All classes here have `columns`, `sizes` (rows per block), `read(block)`, which returns the block's
rows, each as a dict with its images still encoded, and `name(block, row)`, which says where a row is stored.
"""

import bisect
import itertools
import json
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from .folder import RGBDFolder

BLOCK = 16
LINES_AT_ONCE = 1 << 26  # bytes in which line ends are searched together
FOOTERS_AT_ONCE = 16  # threads that read the footers of Parquet files


class Rows:
    columns: list[str]
    sizes: np.ndarray

    def read(self, block: int) -> Sequence[dict]:
        raise NotImplementedError

    def name(self, block: int, row: int) -> str:
        raise NotImplementedError

    def take(self, number: int) -> Iterator[dict]:
        """The first rows, in the order in which they are stored."""
        return itertools.islice((row for block in range(len(self.sizes)) for row in self.read(block)), number)


class Table(Sequence):
    """The rows of an Arrow table, each turned into Python when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @cached_property
    def features(self) -> datasets.Features:
        """Those of the table, images left encoded; a column of mixed types is stored as JSON, which they decode."""
        stored = json.dumps(datasets.Features.from_arrow_schema(self.table.schema).to_dict())
        encoded = json.loads(
            stored, object_hook=lambda node: node | {"decode": False} if node.get("_type") == "Image" else node
        )
        return datasets.Features.from_dict(encoded)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict:
        row = {name: self.table.column(name)[index].as_py() for name in self.table.column_names}
        return self.features.decode_example(row)


class ParquetRows(Rows):
    """files: paths or URLs that `fsspec` opens. columns: those to read, where a file has them."""

    def __init__(self, files: list[str], columns: Sequence[str]) -> None:
        self.files = files
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            footers = list(pool.map(row_groups, files))
        with open_parquet(files[0]) as file:
            present = file.schema_arrow.names
        self.columns = [name for name in columns if name in present] or present
        groups = [(file, group, size) for file, sizes in enumerate(footers) for group, size in enumerate(sizes) if size]
        self.groups = np.array([group[:2] for group in groups], dtype=np.int64).reshape(-1, 2)
        self.sizes = np.array([size for *_, size in groups], dtype=np.int64)

    def read(self, block: int) -> Table:
        file, group = self.groups[block].tolist()
        with open_parquet(self.files[file]) as opened:
            return Table(opened.read_row_group(group, columns=self.columns, use_threads=False))

    def name(self, block: int, row: int) -> str:
        file, group = self.groups[block].tolist()
        return f"{self.files[file]}, row group {group}, row {row}"


def row_groups(file: str) -> list[int]:
    """Rows of each row group, from the footer alone."""
    try:
        with open_parquet(file) as opened:
            return [opened.metadata.row_group(index).num_rows for index in range(opened.num_row_groups)]
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} cannot be read as Parquet ({error}); copy it again, or leave it out") from error


@contextmanager
def open_parquet(file: str) -> Iterator[pq.ParquetFile]:
    filesystem, path = fsspec.core.url_to_fs(file)
    with filesystem.open(path) as opened:
        yield pq.ParquetFile(opened)


class ArrowRows(Rows):
    """dataset: one of `datasets` with an index, memory-mapped."""

    def __init__(self, dataset: datasets.Dataset, columns: Sequence[str]) -> None:
        self.columns = [name for name in columns if name in dataset.column_names] or dataset.column_names
        self.dataset = dataset.select_columns(self.columns).with_format("arrow")
        self.sizes = block_sizes(len(dataset))

    def read(self, block: int) -> Table:
        start = block * BLOCK
        return Table(self.dataset[start : start + int(self.sizes[block])])

    def name(self, block: int, row: int) -> str:
        return f"row {block * BLOCK + row}"


class JsonRows(Rows):
    """files: local paths, each with one JSON object per line, or a list of objects. Nothing is held to one schema."""

    def __init__(self, files: list[str]) -> None:
        self.files = [json_file(file) for file in files]
        sizes = [block_sizes(len(file)) for file in self.files]
        self.firsts = np.cumsum([0, *map(len, sizes)]).tolist()  # block that each file begins with
        self.sizes = np.concatenate(sizes)
        first = self.read(0)[0] if len(self.sizes) else {}
        if not isinstance(first, dict):
            raise ValueError(f"{files[0]} begins with {str(first)[:100]!r}; every row must be a JSON object")
        self.columns = list(first)

    def place(self, block: int) -> tuple["JsonLines", int]:
        file = bisect.bisect_right(self.firsts, block) - 1
        return self.files[file], (block - self.firsts[file]) * BLOCK

    def read(self, block: int) -> list[dict]:
        file, start = self.place(block)
        return file[start : start + int(self.sizes[block])]

    def name(self, block: int, row: int) -> str:
        file, start = self.place(block)
        return f"{file.path}, row {start + row}"


class JsonLines:
    """Objects of a file with one per line, read at their places in it."""

    def __init__(self, path: str) -> None:
        self.path = path
        ends, size = [], 0
        with open(path, "rb") as file:
            while chunk := file.read(LINES_AT_ONCE):
                ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size + 1)
                size += len(chunk)
        ends = np.concatenate([np.zeros(1, np.int64), *ends])
        if ends[-1] < size:  # a last line that no line end follows
            ends = np.append(ends, size)
        self.spans = np.stack([ends[:-1], ends[1:]], axis=1)
        short = np.flatnonzero(np.diff(ends) <= len("{}\r"))  # too short for an object: a blank line, most often
        blank = [index for index in short.tolist() if not self.text(index, index + 1).strip()]
        self.spans = np.delete(self.spans, blank, axis=0)

    def __len__(self) -> int:
        return len(self.spans)

    def text(self, start: int, stop: int) -> bytes:
        begin, end = int(self.spans[start, 0]), int(self.spans[stop - 1, 1])
        with open(self.path, "rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def __getitem__(self, rows: slice) -> list[dict]:
        begin, text = int(self.spans[rows.start, 0]), self.text(rows.start, rows.stop)
        return [parse(text[start - begin : end - begin], self.path) for start, end in self.spans[rows].tolist()]


class JsonList:
    """Objects of a file that is one list, kept as text, which takes a tenth of the memory of Python objects."""

    def __init__(self, path: str) -> None:
        self.path = path
        rows = [json.dumps(row, ensure_ascii=False).encode() for row in parse(Path(path).read_bytes(), path)]
        self.ends, self.data = np.cumsum([0, *map(len, rows)]), b"".join(rows)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, rows: slice) -> list[dict]:
        bounds = itertools.pairwise(self.ends[rows.start : rows.stop + 1].tolist())
        return [json.loads(self.data[start:end]) for start, end in bounds]


def json_file(path: str) -> JsonLines | JsonList:
    with open(path, "rb") as file:
        return JsonList(path) if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else JsonLines(path)


def parse(text: bytes, path: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} holds neither one JSON object per line nor a list of them: {error}") from error


class FolderRows(Rows):
    """A plain folder of images and depth maps (`folder.py`), in the columns of DepthVLM-Bench."""

    columns = ["id", "image", "depth", "depth_scale", "fx"]

    def __init__(self, path: str) -> None:
        self.folder = RGBDFolder(path)
        self.sizes = block_sizes(len(self.folder.names))

    def read(self, block: int) -> list[dict]:
        start, folder = block * BLOCK, self.folder
        return [
            {
                "id": name,
                "image": {"bytes": None, "path": folder.image(name)},
                "depth": {"bytes": None, "path": folder.depth(name)},
                "depth_scale": folder.depth_scale,
                "fx": folder.focal_length(name),
            }
            for name in folder.names[start : start + int(self.sizes[block])]
        ]

    def name(self, block: int, row: int) -> str:
        return self.folder.names[block * BLOCK + row]


def block_sizes(rows: int) -> np.ndarray:
    return np.diff([*range(0, rows, BLOCK), rows])


def open_rows(
    path: str, name: str | None, split: str, data_files: str | list | dict | None, columns: Sequence[str]
) -> Rows:
    """
    The rows of a plain RGB-D folder, a JSON or Parquet file, a folder of `save_to_disk`, or whatever `load_dataset`
    takes. Raises `ValueError` for a split that is not there.
    """
    local = Path(path)
    if data_files is None and RGBDFolder.is_one(path):
        return FolderRows(path)
    if local.is_file():
        loader = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(local.suffix)
        if loader is None:
            raise ValueError(f"{path} is neither .json, .jsonl nor .parquet; convert it, or pass a folder of files")
        return open_rows(loader, None, split, {split: [path]}, columns)
    if (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(path)
        saved = saved if isinstance(saved, datasets.DatasetDict) else {split: saved}
        check_split(path, split, saved)
        return ArrowRows(saved[split], columns)
    builder = datasets.load_dataset_builder(path, name, data_files=data_files)
    check_split(path, split, builder.config.data_files)
    files = [str(file) for file in builder.config.data_files[split]]
    if isinstance(builder, Parquet):
        return ParquetRows(files, columns)
    if isinstance(builder, Json):
        return JsonRows(datasets.DownloadManager().download_and_extract(files))
    # by the files, because by its name `load_dataset` may take what it has cached for another folder of that name
    loader = type(builder).__module__.rpartition(".")[2]
    return ArrowRows(datasets.load_dataset(loader, data_files={split: files}, split=split), columns)


def check_split(path: str, split: str, splits: Container[str]) -> None:
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}")
