"""Training data: rows of `load_dataset` -> conversations with images and depth maps -> batches.

A *row* is as stored, images still encoded. A *sample* is a conversation ready for the processor:

    {"messages": [{"role": ..., "content": ...}, ...], "images": [PIL image, ...],
     "focal_lengths": [px of the image or None, ...], "depth_maps": [(h, w) in metres or None, ...]}
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageEnhance
from transformers.utils import logging

from depthvlm.processing_depthvlm import DEPTH_PROMPT, DEPTH_RESPONSE, SYSTEM_PROMPT

logger = logging.get_logger(__name__)

KINDS = ("depth", "qa", "instruction")
ROWS_BEFORE_STOP = 100  # read by a worker before its share of unreadable rows is judged
READ_AT_ONCE = 16  # rows of a shard that are turned from Arrow into Python together


@dataclass
class DataSource:
    """One data set of the mix.

    path, name, split: as for `load_dataset`. weight: its share of the samples, relative to the others'.
    kind: `"depth"`, a DepthVLM-Bench row becomes the paper's prompt and response; `"qa"`, it becomes a conversation of
    all its questions, in an order drawn anew each time; `"instruction"`, columns `messages` and `images` as they are.
    depth_on_qa: whether a qa row's depth map is learnt from as well, in the same pass.
    max_canonical_edge: longest side, in px at a focal length of 1000 px, that is kept of a photo, around its centre;
    the card of a build states it for the sets that need one.
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float = 1.0
    kind: str = "depth"
    depth_on_qa: bool = False
    max_canonical_edge: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind of data set {self.path!r} is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.max_canonical_edge is not None and not self.max_canonical_edge > 0:
            raise ValueError(
                f"max_canonical_edge of data set {self.path!r} is {self.max_canonical_edge}; give px, or leave it out"
            )
        if not self.weight > 0:
            raise ValueError(f"weight of data set {self.path!r} is {self.weight}; leave it out or give it more than 0")

    @property
    def label(self) -> str:
        """Name in logs and reports."""
        name = self.name or Path(self.path).name
        return name if self.kind == "depth" else f"{name}-{self.kind}"

    def open(self) -> datasets.IterableDataset:
        """The rows as a stream, images left encoded, so that one that is broken does not end it."""
        rows = datasets.load_dataset(self.path, self.name, split=self.split, streaming=True).decode(False)
        needed = {"messages", "images"} if self.kind == "instruction" else {"image", "depth", "depth_scale", "fx"}
        if self.kind == "qa":
            needed.add("qa")
        if missing := needed - set(rows.column_names):
            raise ValueError(
                f"data set {self.path!r} ({self.name}) has no column {', '.join(sorted(missing))}, which kind "
                f"{self.kind!r} needs; it has {', '.join(rows.column_names)}"
            )
        return rows


@dataclass
class DataArguments:
    """What is trained on."""

    datasets: list[DataSource] = field(default_factory=list, metadata={"help": "the mix, a list of mappings in YAML"})
    eval_datasets: list[DataSource] = field(default_factory=list, metadata={"help": "held-out data, likewise"})
    max_eval_samples: int = field(default=500, metadata={"help": "first rows of each held-out data set"})
    sampling: str = field(
        default="sets", metadata={"help": "draw a data set by weight (sets) or by weight times its rows (rows)"}
    )
    shuffle_buffer: int = field(default=200, metadata={"help": "rows of each data set that are shuffled together"})
    max_pixels: int | None = field(default=None, metadata={"help": "budget for a processed photo; the processor's"})
    max_bad_share: float = field(default=0.01, metadata={"help": "share of unreadable rows past which training stops"})
    flip: bool = field(default=False, metadata={"help": "mirror depth samples, half of them, at random"})
    color_jitter: float = field(default=0.0, metadata={"help": "brightness, contrast, saturation within 1 +- this"})
    focal_jitter: float = field(
        default=0.0, metadata={"help": "process depth samples at the canonical size times 1 +- this; metres stay right"}
    )

    def __post_init__(self):
        for mix in (self.datasets, self.eval_datasets):
            mix[:] = [DataSource(**entry) if isinstance(entry, dict) else entry for entry in mix]


def row_counts(source: DataSource) -> tuple[int | None, int]:
    """Rows and shards of a data set, from its metadata alone; rows are None where the format does not state them."""
    files = datasets.load_dataset_builder(source.path, source.name).config.data_files[source.split]
    if not all(str(file).endswith(".parquet") for file in files):
        return None, len(files)
    return sum(pq.read_metadata(file).num_rows for file in files), len(files)


# A row -> a sample


def read_sample(row: dict, source: DataSource, arguments: DataArguments, rng: np.random.Generator) -> dict:
    """Raises for a row that cannot be read, whatever a decoder raises."""
    if source.kind == "instruction":
        images = [decode(image) for image in row["images"] or []]
        messages = [{"role": turn["role"], "content": parts(turn["content"])} for turn in row["messages"]]
        if not any(turn["role"] == "assistant" for turn in messages):
            raise ValueError("a conversation without an answer of the assistant teaches nothing")
        placed = sum(part["type"] == "image" for turn in messages for part in turn["content"])
        if images and not placed:  # as TRL does: images without a place go before the first question
            first = next(turn for turn in messages if turn["role"] == "user")
            first["content"] = [{"type": "image"}] * len(images) + first["content"]
        elif placed != len(images):
            raise ValueError(f"{placed} images are placed in the messages but {len(images)} are given")
        return {
            "messages": messages,
            "images": images,
            "focal_lengths": [None] * len(images),
            "depth_maps": [None] * len(images),
        }
    if row.get("depth_type", "z") != "z":
        raise ValueError(f"depth_type is {row['depth_type']!r}; training needs z-depth")
    image = decode(row["image"])
    depth, focal_length = None, row["fx"]
    if not (math.isfinite(focal_length) and focal_length > 0):
        raise ValueError(f"fx is {focal_length} px; it must be above 0")
    if source.kind == "depth" or source.depth_on_qa:
        depth = read_depth(row)
    if source.max_canonical_edge is not None:
        image, depth = crop(image, depth, source.max_canonical_edge * focal_length / 1000)
    if source.kind == "qa":
        pairs = list(zip(row["qa"]["question"], row["qa"]["answer"], strict=True))
        if not pairs:
            raise ValueError("no question")
        turns = [pairs[i] for i in rng.permutation(len(pairs))]
    else:
        turns = [(DEPTH_PROMPT, DEPTH_RESPONSE)]
        if arguments.flip and rng.random() < 0.5:
            image, depth = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), depth[:, ::-1].copy()
        if arguments.focal_jitter:
            # a picture of a camera with another focal length of a scene that is as many times further away
            zoom = 1 + arguments.focal_jitter * rng.uniform(-1, 1)
            focal_length, depth = focal_length / zoom, depth / zoom
    if arguments.color_jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + arguments.color_jitter * rng.uniform(-1, 1))
    return {
        "messages": conversation(turns),
        "images": [image],
        "focal_lengths": [focal_length],
        "depth_maps": [depth],
    }


def conversation(turns: list[tuple[str, str]]) -> list[dict]:
    """Questions and answers about one image, which stands before the first question."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    for index, (question, answer) in enumerate(turns):
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [{"type": "image"}, text] if index == 0 else [text]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def parts(content) -> list[dict]:
    """Content as a list, without the keys that Arrow adds: a template takes `image: None` for an image."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def decode(encoded: dict) -> Image.Image:
    image = datasets.Image().decode_example(encoded)
    image.load()
    return image


def read_depth(row: dict) -> np.ndarray:
    """`(h, w)`, z-depth in metres, 0 = no label."""
    words = np.asarray(decode(row["depth"]))
    if words.ndim != 2 or words.dtype == np.uint8:
        raise ValueError(f"depth is an image of shape {words.shape}, {words.dtype}; it must be a 16-bit gray one")
    if not (math.isfinite(row["depth_scale"]) and row["depth_scale"] > 0):
        raise ValueError(f"depth_scale is {row['depth_scale']} words a metre; it must be above 0")
    return (words / row["depth_scale"]).astype(np.float32)


def crop(image: Image.Image, depth: np.ndarray | None, side: float) -> tuple[Image.Image, np.ndarray | None]:
    """The middle of both, at most `side` px of the photo wide and high."""
    width, height = image.size
    new_width, new_height = (min(old, max(1, round(side))) if old > side else old for old in (width, height))
    if (new_width, new_height) == (width, height):
        return image, depth
    left, top = (width - new_width) // 2, (height - new_height) // 2
    image = image.crop((left, top, left + new_width, top + new_height))
    if depth is not None:
        rows, columns = depth.shape[0] / height, depth.shape[1] / width
        depth = depth[
            round(top * rows) : round((top + new_height) * rows),
            round(left * columns) : round((left + new_width) * columns),
        ]
    return image, depth


# Samples -> a batch


@dataclass
class Collator:
    """Samples -> the model's inputs, `labels`, `depth_labels` and their bookkeeping.

    Every piece of a conversation is tokenized for itself, answers apart from what comes between them, so `labels` cover
    exactly the answers, each with the token that ends it. `depth_labels` is a list of `(height, width)`, one an image,
    or absent where no image has one.
    """

    processor: object
    max_pixels: int | None = None

    def __call__(self, samples: list[dict]) -> dict:
        rows = [self.pieces(sample["messages"]) for sample in samples]
        images, focal_lengths, depth_maps = (
            [value for sample in samples for value in sample[key]] for key in ("images", "focal_lengths", "depth_maps")
        )
        extra = {}
        if images:
            extra = {"images": images, "focal_lengths": focal_lengths, "max_pixels": self.max_pixels}
            if any(depth is not None for depth in depth_maps):
                extra["depth_maps"] = depth_maps
        flat = self.processor(text=[text for row in rows for text, _ in row], **extra)
        encoded = iter(zip(flat["input_ids"], flat["mm_token_type_ids"], strict=True))
        columns = {"input_ids": [], "labels": [], "mm_token_type_ids": []}
        for row in rows:
            ids, labels, types = [], [], []
            for (_, is_answer), (piece, piece_types) in zip(row, encoded, strict=False):
                ids += piece
                labels += piece if is_answer else [-100] * len(piece)
                types += piece_types
            for column, values in zip(columns.values(), (ids, labels, types), strict=True):
                column.append(torch.tensor(values))
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100, "mm_token_type_ids": 0}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding[name])
            for name, column in columns.items()
        }
        lengths = torch.tensor([len(ids) for ids in columns["input_ids"]])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        if images:
            batch["pixel_values"] = torch.as_tensor(np.asarray(flat["pixel_values"]))
            batch["image_grid_thw"] = torch.as_tensor(np.asarray(flat["image_grid_thw"]))
        if "depth_labels" in flat:
            batch["depth_labels"] = flat["depth_labels"]
        if "position" in samples[-1]:
            batch["position"] = samples[-1]["position"]
        batch["row_sets"] = [sample.get("set", 0) for sample in samples]
        batch["image_sets"] = [sample.get("set", 0) for sample in samples for _ in sample["images"]]
        return batch

    def pieces(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """The conversation's text in pieces, each with whether it is an answer."""
        pieces, done = [], ""
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            before = self.processor.apply_chat_template(messages[:index], add_generation_prompt=True)
            after = self.processor.apply_chat_template(messages[: index + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise ValueError(
                    "the chat template renders a conversation otherwise when it goes on, so answers cannot be told "
                    f"from prompts; use one that appends (at turn {index})"
                )
            end = self.processor.tokenizer.eos_token
            answer, _, _ = after[len(before) :].rpartition(end)
            pieces += [(before[len(done) :], False), (answer + end, True)]
            done = before + answer + end
        if not pieces:
            raise ValueError("a conversation without an answer of the assistant teaches nothing")
        return pieces


# Streams


class TrainingStream(torch.utils.data.IterableDataset):
    """The endless mix of a rank, split over its DataLoader workers, that can go on from any sample.

    Each pair of rank and worker reads its own shards of every data set, shuffled anew each time around, and draws from
    them by weight. Every sample holds its `position`: (worker, rows read, rows unreadable, rank, both per data set).
    A row that cannot be read is written to `log`, and the next one is read; past `max_bad_share` training stops.
    """

    def __init__(
        self, arguments: DataArguments, seed: int, rank: int = 0, world_size: int = 1, log: Path | None = None
    ):
        if not arguments.datasets:
            raise ValueError("datasets is empty; list at least one data set with its path in the YAML file")
        self.arguments, self.seed, self.rank, self.world_size, self.log = arguments, seed, rank, world_size, log
        self.rows = [source.open() for source in arguments.datasets]
        self.batches_done, self.start = 0, {}

    def resume(self, batches_done: int, positions: list) -> None:
        """Go on after `batches_done` batches per rank; positions: of the last batch of each worker of each rank."""
        self.batches_done = batches_done
        self.start = {worker: counts for worker, _, _, rank, counts in positions if rank == self.rank}

    def bad_rows(self, positions: list) -> dict[str, tuple[int, int]]:
        """Data set -> rows read and rows refused, summed over the positions."""
        totals = np.sum([counts for *_, counts in positions], axis=0).tolist() if positions else []
        return {source.label: (read, bad) for source, (read, bad) in zip(self.arguments.datasets, totals, strict=False)}

    def __iter__(self) -> Iterator[dict]:
        info = torch.utils.data.get_worker_info()
        workers = info.num_workers if info else 1
        # a resumed DataLoader asks its first worker first; it plays the one whose turn it is
        worker = ((info.id if info else 0) + self.batches_done) % workers
        counts = [list(pair) for pair in self.start.get(worker, [(0, 0)] * len(self.rows))]
        first, bad = (sum(column) for column in zip(*counts, strict=True))
        piece, pieces = self.rank * workers + worker, self.world_size * workers
        streams = [endless(rows, self.arguments.shuffle_buffer, self.seed, piece, pieces) for rows in self.rows]
        weights = np.array([source.weight for source in self.arguments.datasets])
        draw = np.random.default_rng([self.seed, piece])
        for number in itertools.count():
            index = draw.choice(len(streams), p=weights / weights.sum())
            row = next(streams[index])
            if number < first:
                continue
            source = self.arguments.datasets[index]
            counts[index][0] += 1
            try:
                sample = read_sample(row, source, self.arguments, np.random.default_rng([self.seed, piece, number]))
            except Exception as error:  # whatever a decoder raises for what it was given
                bad += 1
                counts[index][1] += 1
                self.report(source, row, error, bad, number + 1)
                continue
            position = (worker, number + 1, bad, self.rank, [tuple(pair) for pair in counts])
            yield sample | {"position": position, "set": int(index)}

    def report(self, source: DataSource, row: dict, error: Exception, bad: int, read: int):
        line = json.dumps({"path": source.path, "name": source.name, "id": row.get("id"), "reason": str(error)})
        logger.warning(f"unreadable row, left out: {line}")
        if self.log:
            with open(self.log, "a") as file:
                file.write(line + "\n")
        if read >= ROWS_BEFORE_STOP and bad > self.arguments.max_bad_share * read:
            raise ValueError(
                f"{bad} of {read} rows cannot be read, more than max_bad_share {self.arguments.max_bad_share}; repair "
                f"the data, listed in {self.log}, or raise max_bad_share; the last: {line}"
            )


def endless(rows: datasets.IterableDataset, buffer: int, seed: int, piece: int, pieces: int) -> Iterator[dict]:
    """Piece `piece` of `pieces` of the rows, over and over: whole shards, or single rows if they are too few.

    Each time around, the shards come in another order, the same for all pieces, and rows are shuffled in a buffer.
    """
    shards = rows.num_shards
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(shards)
        if shards >= pieces:
            mine = rows_of(rows, order[piece::pieces])
        else:
            mine = itertools.islice(rows_of(rows, order), piece, None, pieces)
        empty = True
        for row in shuffled(mine, buffer, np.random.default_rng([seed, epoch, piece])):
            empty = False
            yield row
        if empty:
            raise ValueError(f"a data set has no row for piece {piece} of {pieces}; use fewer ranks or workers")


def rows_of(rows: datasets.IterableDataset, shards) -> Iterator[dict]:
    for shard in shards:
        # `iter`, not `__iter__`, which would split the rows over the DataLoader's workers a second time
        for batch in rows.shard(rows.num_shards, int(shard)).iter(READ_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


def shuffled(rows: Iterator[dict], buffer: int, draw: np.random.Generator) -> Iterator[dict]:
    # not IterableDataset.shuffle: it reads with threads, which a forked worker does not have, and sleeps at each end
    held = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        index = draw.integers(buffer)
        yield held[index]
        held[index] = row
    draw.shuffle(held)
    yield from held


class EvalSamples(torch.utils.data.Dataset):
    """The first rows of the held-out data, the same each time; an unreadable one is an error."""

    def __init__(self, arguments: DataArguments):
        self.rows = [
            (row, source)
            for source in arguments.eval_datasets
            for row in source.open().take(arguments.max_eval_samples)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row, source = self.rows[index]
        return read_sample(row, source, DataArguments(), np.random.default_rng(index))
