"""The photos of a run: a listing, and the files that rows of it name.

A listing is a table with a row per photo, in a fixed order:

- `id`: unique; the path below the input, with `#ROW` for rows of Parquet, or a column of the data;
- `file`, `offset`, `size`: the file, and where in it: the first byte and the number of bytes in a tar, the row in
  Parquet; a row of a data set has no file;
- `fx`, `fy`: the focal length in px that the data state, or null.
"""

import bisect
import functools
import hashlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from depthvlm.predict import PHOTO_SUFFIXES

FORMATS = ("images", "parquet", "webdataset", "dataset")
LISTING = pa.schema(
    [("id", pa.string()), ("file", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
    + [("fx", pa.float64()), ("fy", pa.float64())]
)
FILES_AT_ONCE = 16  # whose footers or headers are read; most of the time is a bucket's latency


@dataclass(frozen=True)
class Input:
    """
    Where photos come from.

    path: a folder or file of any file system that fsspec knows (`data/photos`, `s3://bucket/photos`), or of
        `load_dataset`. format: "images", a folder of image files; "parquet", one or more files with a column of images;
        "webdataset", one or more tars; "dataset", what `load_dataset` opens.
    image_column: of Parquet and data sets. id_column: of these, else the row's number serves.
    focal_length_columns: one of px, one of [fx, fy], or two; of a WebDataset, fields of a sample's JSON.
    config, split: of a data set.
    """

    path: str
    format: str = "images"
    image_column: str = "image"
    id_column: str | None = None
    focal_length_columns: tuple[str, ...] = ()
    config: str | None = None
    split: str = "train"


def list_photos(source: Input) -> pa.Table:
    """The listing of an input. Raises `ValueError` without photos, or where two have one id."""
    lister = {"images": _list_images, "parquet": _list_parquet, "webdataset": _list_tars, "dataset": _list_dataset}
    listing = pa.Table.from_batches(lister[source.format](source), LISTING)
    if not len(listing):
        raise ValueError(f"{source.path} has no photos of format {source.format}; name another input, or its --format")
    if repeated := len(listing) - len(listing["id"].unique()):
        raise ValueError(f"{repeated} ids of {source.path} occur twice; name a unique --id-column, or leave it out")
    return listing


def digest(listing: pa.Table) -> str:
    """SHA-256 of ids, places, sizes and focal lengths, in order."""
    hashed = hashlib.sha256()
    for batch in listing.to_batches(1 << 16):
        hashed.update(repr(batch.to_pydict()).encode())
    return hashed.hexdigest()


def read_photos(source: Input, rows: list[dict]) -> list:
    """
    What the processor opens for each row of a listing: the bytes of a file, or a `{"bytes", "path"}`.

    A missing or forbidden file gives the exception instead. Other faults of a file system are raised: they may pass.
    """
    if source.format == "dataset":
        return _dataset(source)[[row["offset"] for row in rows]][source.image_column]
    files, opened = [row["file"] for row in rows], _file_system(source)
    if source.format == "parquet":
        return [_embedded(_parquet_image(source, row["file"], row["offset"])) for row in rows]
    if source.format == "webdataset":
        ends = [row["offset"] + row["size"] for row in rows]
        photos = opened.cat_ranges(files, [row["offset"] for row in rows], ends, on_error="return")
    else:
        contents = opened.cat(files, on_error="return")
        photos = [contents[file] for file in files]
    for photo in photos:
        if isinstance(photo, Exception) and not isinstance(photo, (FileNotFoundError, PermissionError)):
            raise photo
    return photos


# Files


def _file_system(source: Input) -> fsspec.AbstractFileSystem:
    return fsspec.core.url_to_fs(source.path)[0]


def _files(source: Input, suffixes: set[str]) -> list[tuple[str, str, int]]:
    """(path, path below the input, bytes) of each file with one of the suffixes, hidden ones left out."""
    opened, root = fsspec.core.url_to_fs(source.path)
    files = []
    for path, info in sorted(opened.find(root, detail=True).items()):
        below = PurePosixPath(path).relative_to(root) if path != root else PurePosixPath(PurePosixPath(path).name)
        if below.suffix.lower() in suffixes and not any(part.startswith(".") for part in below.parts):
            files.append((path, str(below), info["size"]))
    return files


def _list_images(source: Input) -> Iterator[pa.RecordBatch]:
    files = _files(source, PHOTO_SUFFIXES)
    if files:
        paths, ids, sizes = map(list, zip(*files, strict=True))
        yield _batch(ids, paths, None, sizes, None)


def _list_parquet(source: Input) -> Iterator[pa.RecordBatch]:
    def read(file):
        path, below, _ = file
        with pq.ParquetFile(_file_system(source).open(path, "rb")) as opened:
            columns = [name for name in (source.id_column, *source.focal_length_columns) if name]
            _check_columns(source, opened.schema_arrow.names, path)
            table = opened.read(columns) if columns else None
            return path, below, opened.metadata.num_rows, table

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for path, below, count, table in pool.map(read, _files(source, {".parquet"})):
            ids = [f"{below}#{row}" for row in range(count)]
            if source.id_column:
                ids = [str(value) for value in table[source.id_column].to_pylist()]
            yield _batch(ids, [path] * count, list(range(count)), None, _focal_lengths(source, table))


def _list_tars(source: Input) -> Iterator[pa.RecordBatch]:
    def read(file):
        path, below, _ = file
        photos, fields = [], {}
        try:
            with _file_system(source).open(path, "rb") as content, tarfile.open(fileobj=content, mode="r:") as tar:
                for member in tar:
                    name = PurePosixPath(member.name)
                    key = str(name.parent / name.name.partition(".")[0])
                    if member.isfile() and name.suffix.lower() in PHOTO_SUFFIXES:
                        photos.append((f"{below}/{member.name}", key, member.offset_data, member.size))
                    elif member.isfile() and source.focal_length_columns and name.suffix == ".json":
                        fields[key] = json.load(tar.extractfile(member))
        except tarfile.TarError as error:
            raise ValueError(f"{path} cannot be read as a tar: {error}; unpack compressed ones") from error
        return path, photos, [fields.get(key, {}) for _, key, _, _ in photos]

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for path, photos, fields in pool.map(read, _files(source, {".tar"})):
            if photos:
                ids, _, offsets, sizes = map(list, zip(*photos, strict=True))
                columns = {name: [sample.get(name) for sample in fields] for name in source.focal_length_columns}
                table = pa.table(columns) if columns else None
                yield _batch(ids, [path] * len(ids), offsets, sizes, _focal_lengths(source, table))


@functools.lru_cache(maxsize=1)
def _dataset(source: Input):
    import datasets

    opened = datasets.load_dataset(source.path, source.config, split=source.split)
    _check_columns(source, opened.column_names, source.path)
    return opened.cast_column(source.image_column, datasets.Image(decode=False))


def _list_dataset(source: Input) -> Iterator[pa.RecordBatch]:
    opened = _dataset(source)
    columns = [name for name in (source.id_column, *source.focal_length_columns) if name]
    table = opened.select_columns(columns).with_format("arrow")[:] if columns else None
    ids = [str(value) for value in (table[source.id_column].to_pylist() if source.id_column else range(len(opened)))]
    yield _batch(ids, None, list(range(len(ids))), None, _focal_lengths(source, table))


def _check_columns(source: Input, names: list[str], path: str) -> None:
    needed = (source.image_column, source.id_column, *source.focal_length_columns)
    if missing := [name for name in needed if name and name not in names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}")


def _focal_lengths(source: Input, table: pa.Table | None) -> list[tuple] | None:
    if not source.focal_length_columns:
        return None
    columns = [table[name].to_pylist() for name in source.focal_length_columns]
    if len(columns) == 2:
        return list(zip(*columns, strict=True))
    return [tuple(value) if isinstance(value, list) else (value, value) for value in columns[0]]


def _batch(ids: list[str], files, offsets, sizes, focal_lengths) -> pa.RecordBatch:
    nothing = [None] * len(ids)
    fx, fy = zip(*focal_lengths, strict=True) if focal_lengths else (nothing, nothing)
    columns = (ids, files or nothing, offsets or nothing, sizes or nothing, fx, fy)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, LISTING, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=LISTING)


# Rows of Parquet


@functools.lru_cache(maxsize=1)
def _parquet(source: Input, path: str) -> tuple[pq.ParquetFile, list[int]]:
    """An open file, and the number of the first row of each row group."""
    opened = pq.ParquetFile(_file_system(source).open(path, "rb"))
    firsts = [0]
    for group in range(opened.num_row_groups):
        firsts.append(firsts[-1] + opened.metadata.row_group(group).num_rows)
    return opened, firsts


def _parquet_image(source: Input, path: str, row: int):
    firsts = _parquet(source, path)[1]
    group = bisect.bisect_right(firsts, row) - 1
    return _images(source, path, group)[row - firsts[group]].as_py()


@functools.lru_cache(maxsize=2)
def _images(source: Input, path: str, group: int) -> pa.ChunkedArray:
    return _parquet(source, path)[0].read_row_group(group, columns=[source.image_column])[source.image_column]


def _embedded(photo):
    """An image's bytes, from bytes or `{"bytes", "path"}`; paths in Parquet are not followed."""
    content = photo.get("bytes") if isinstance(photo, dict) else photo
    if isinstance(content, bytes):
        return content
    return ValueError(f"the image column holds {str(photo)[:100]!r}, not an image's bytes")
