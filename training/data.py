"""What is trained on: arguments, and rows -> samples.

A *row* is as stored (`rows.py`), images still encoded. `open_sample` makes a sample of it, with images that are opened
but not decoded, and `load_sample` finishes it: a conversation with images and depth maps, ready for the processor.

    {"messages": [{"role": ..., "content": ...}, ...], "images": [PIL image, ...], "max_pixels": budget or None,
     "focal_lengths": [px of the image or None, ...], "depth_maps": [(h, w) in metres or None, ...],
     "others": [messages, ...]}

`others` are conversations that begin as `messages` does, up to the last image, and share that pass over the images.
"""

import base64
import collections
import dataclasses
import io
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageEnhance, ImageOps

from depthvlm.photos_depthvlm import exif_focal_length
from depthvlm.processing_depthvlm import DEPTH_PROMPT, DEPTH_RESPONSE, SYSTEM_PROMPT

from .folder import EXIF, inside
from .instructions import COLUMNS, FORMS, read_conversation
from .rows import Rows, open_rows

KINDS = ("depth", "qa", "instruction")
SAMPLINGS = ("sets", "rows")
DEPTH_COLUMNS = ("id", "image", "depth", "depth_scale", "depth_type", "fx", "qa")
Stored = Image.Image | dict | bytes | str  # an image as rows hold it, see `open_image`
SHARED = ("max_pixels", "flip", "color_jitter", "focal_jitter")  # of a data set, else of all


@dataclass
class DataSource:
    """One data set of the mix.

    path, name, split, data_files: as for `load_dataset`; path may also be a folder of `save_to_disk`, a .json, .jsonl
    or .parquet file, or a folder with rgb/, depth/ and camera.json (`folder.py`).
    label: its name in logs; default: name, or the last part of path. weight: its share of the samples, relative to the
    others'.
    kind: `"depth"`, a DepthVLM-Bench row or a frame of a folder becomes the paper's prompt and response; `"qa"`, a
    DepthVLM-Bench row becomes a conversation of all its questions, in an order drawn anew each time; `"instruction"`,
    conversations in any of the forms of `instructions.py`.
    image_root: folder that paths of images start from and do not leave; default: path, where it is a folder.
    depth_on_qa: whether a qa row's depth map is learnt from as well, in the same pass.
    max_questions: of a qa row's questions, drawn anew each time, of all kinds by turns; default: all.
    separate_questions: whether each question of a qa row is asked as the first one: from one pass over the image, but
        without the other questions and answers before it, which would give away much of its answer.
    max_canonical_edge: longest side, in px at a focal length of 1000 px, that is kept of an image, around its centre;
    the card of a build states it for the sets that need one.
    max_pixels, flip, color_jitter, focal_jitter: as in `DataArguments`, for this data set alone.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | list | dict | None = None
    label: str | None = None
    weight: float = 1.0
    kind: str = "depth"
    image_root: str | None = None
    depth_on_qa: bool = False
    max_questions: int | None = None
    separate_questions: bool = False
    max_canonical_edge: float | None = None
    max_pixels: int | None = None
    flip: bool | None = None
    color_jitter: float | None = None
    focal_jitter: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind of data set {self.path!r} is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.max_canonical_edge is not None and not self.max_canonical_edge > 0:
            raise ValueError(
                f"max_canonical_edge of data set {self.path!r} is {self.max_canonical_edge}; give px, or leave it out"
            )
        if self.max_questions is not None and not self.max_questions > 0:
            raise ValueError(
                f"max_questions of data set {self.path!r} is {self.max_questions}; leave it out or give it more than 0"
            )
        if not self.weight > 0:
            raise ValueError(f"weight of data set {self.path!r} is {self.weight}; leave it out or give it more than 0")

    @cached_property
    def root(self) -> str | None:
        return self.path if self.image_root is None and Path(self.path).is_dir() else self.image_root

    def open(self) -> Rows:
        """The rows, in blocks; of their columns those that the kind may need."""
        rows = open_rows(self.path, self.name, self.split, self.data_files, self.columns)
        needed = {"image", "depth", "depth_scale", "fx"} | ({"qa"} if self.kind == "qa" else set())
        forms = FORMS if self.kind == "instruction" else (needed,)
        if len(rows.sizes) and not any(form <= set(rows.columns) for form in forms):
            missing = " or ".join(", ".join(sorted(form - set(rows.columns))) for form in forms)
            raise ValueError(
                f"data set {self.path!r} ({self.name}) has no column {missing}, which kind {self.kind!r} needs; "
                f"it has {', '.join(rows.columns)}"
            )
        return rows

    @property
    def columns(self) -> tuple[str, ...]:
        return COLUMNS if self.kind == "instruction" else DEPTH_COLUMNS


@dataclass
class DataArguments:
    """What is trained on."""

    datasets: list[DataSource] = field(default_factory=list, metadata={"help": "the mix, a list of mappings in YAML"})
    eval_datasets: list[DataSource] = field(default_factory=list, metadata={"help": "held-out data, likewise"})
    max_eval_samples: int = field(default=500, metadata={"help": "first rows of each held-out data set"})
    sampling: str = field(
        default="sets",
        metadata={
            "help": "sets: data sets in equal shares; rows: in proportion to their rows; both times their weight"
        },
    )
    shuffle_buffer: int = field(default=200, metadata={"help": "rows of each data set that are shuffled together"})
    max_pixels: int | None = field(default=None, metadata={"help": "budget for a processed image; the processor's"})
    max_bad_share: float = field(default=0.01, metadata={"help": "share of unreadable rows past which training stops"})
    flip: bool = field(default=False, metadata={"help": "mirror depth samples, half of them, at random"})
    color_jitter: float = field(default=0.0, metadata={"help": "brightness, contrast, saturation within 1 +- this"})
    focal_jitter: float = field(
        default=0.0, metadata={"help": "process depth samples at the canonical size times 1 +- this; metres stay right"}
    )

    def __post_init__(self):
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling is {self.sampling!r}; it must be one of {', '.join(SAMPLINGS)}")
        for mix_name in ("datasets", "eval_datasets"):
            mix = [
                data_source(entry, f"{mix_name}[{index}]") if isinstance(entry, dict) else dataclasses.replace(entry)
                for index, entry in enumerate(getattr(self, mix_name))
            ]
            setattr(self, mix_name, mix)
            set_labels(mix)
            for source in mix:
                for name in SHARED:
                    if getattr(source, name) is None:
                        # what is held out is never augmented
                        shared = self if mix_name == "datasets" or name == "max_pixels" else type(self)
                        setattr(source, name, getattr(shared, name))


def data_source(entry: dict, place: str) -> DataSource:
    known = [known.name for known in dataclasses.fields(DataSource)]
    if unknown := entry.keys() - set(known):
        raise ValueError(f"{place} has unknown key {', '.join(sorted(unknown))}; the keys are {', '.join(known)}")
    if "path" not in entry:
        raise ValueError(f"{place} has no path; give what `load_dataset` takes, a folder or a file")
    return DataSource(**entry)


def set_labels(mix: list[DataSource]) -> None:
    """Give each data set that states no label one of its own."""
    stated = [source.label for source in mix if source.label is not None]
    if len(set(stated)) < len(stated):
        raise ValueError(f"two data sets have the same label among {', '.join(stated)}; give each its own")
    for form in ("{name}", "{name}-{kind}", "{name}-{kind}-{number}"):
        proposed = [
            source.label or form.format(name=source.name or Path(source.path).stem, kind=source.kind, number=number)
            for number, source in enumerate(mix)
        ]
        counts = collections.Counter(proposed)
        for source, name in zip(mix, proposed, strict=True):
            if counts[name] == 1:
                source.label = name


# A row -> a sample


def read_sample(row: dict, source: DataSource, rng: np.random.Generator) -> dict:
    """Raises for a row that cannot be read, whatever a decoder raises."""
    return load_sample(open_sample(row, source, rng), source, rng)


def open_sample(row: dict, source: DataSource, rng: np.random.Generator) -> dict:
    """A sample with images whose pixels are still to be decoded, a depth map that is still a row's, and no crop yet."""
    if source.kind == "instruction":
        messages, images = read_conversation(row)
        images = [open_image(image, source.root) for image in images]
        return {
            "messages": messages,
            "others": [],
            "images": images,
            "focal_lengths": [None] * len(images),
            "depth_maps": [None] * len(images),
            "max_pixels": source.max_pixels,
        }
    if (row.get("depth_type") or "z") != "z":
        raise ValueError(f"depth_type is {row['depth_type']!r}; training needs z-depth")
    image, focal_length, zoom = open_image(row["image"], source.root), row["fx"], 1.0
    if focal_length == EXIF:
        focal_length = exif_focal_length(image)
        if focal_length is None:
            raise ValueError("the image's EXIF data state no focal length; give px in camera.json")
    if not (isinstance(focal_length, (int, float)) and math.isfinite(focal_length) and focal_length > 0):
        raise ValueError(f"fx is {focal_length} px; it must be above 0")
    if source.kind == "qa":
        pairs = list(zip(row["qa"]["question"], row["qa"]["answer"], strict=True))
        if not pairs:
            raise ValueError("no question")
        questions = [pairs[i] for i in draw_questions(row["qa"]["kind"], source.max_questions, rng)]
    else:
        questions = [(DEPTH_PROMPT, DEPTH_RESPONSE)]
        if source.focal_jitter:
            # a picture of a camera with another focal length of a scene that is as many times further away
            zoom = 1 + source.focal_jitter * rng.uniform(-1, 1)
    has_depth = source.kind == "depth" or source.depth_on_qa
    crop_side = None if source.max_canonical_edge is None else source.max_canonical_edge * focal_length / 1000
    conversations = [[pair] for pair in questions] if source.separate_questions else [questions]
    first, *others = map(conversation, conversations)
    return {
        "messages": first,
        "others": others,
        "images": [image],
        "focal_lengths": [focal_length / zoom],
        "depth_maps": [{"image": row["depth"], "scale": row["depth_scale"], "zoom": zoom} if has_depth else None],
        "max_pixels": source.max_pixels,
        "crop_side": crop_side,
    }


def draw_questions(kinds: list[str], number: int | None, rng: np.random.Generator) -> list[int]:
    """Indices of up to `number` questions in an order drawn anew, of all kinds by turns: none is lost among another."""
    order, drawn, turns = rng.permutation(len(kinds)).tolist(), collections.Counter(), {}
    for index in order:
        turns[index] = drawn[kinds[index]]
        drawn[kinds[index]] += 1
    kept = set(sorted(order, key=turns.get)[:number])
    return [index for index in order if index in kept]


def load_sample(sample: dict, source: DataSource, rng: np.random.Generator) -> dict:
    """Decode, crop and augment an opened sample."""
    if source.kind == "instruction":
        return sample | {"images": [upright(image) for image in sample["images"]]}
    (image,), (depth,) = sample["images"], sample["depth_maps"]
    if depth is not None and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        raise ValueError(
            "the image's EXIF data say to turn it, its depth map's do not; save both upright, without the tag"
        )
    image = upright(image)
    if depth is not None:
        depth = read_depth(depth["image"], depth["scale"], source.root) / np.float32(depth["zoom"])
    if sample["crop_side"] is not None:
        image, depth = crop(image, depth, sample["crop_side"])
    if source.flip and source.kind == "depth" and rng.random() < 0.5:
        image, depth = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), depth[:, ::-1].copy()
    if source.color_jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + source.color_jitter * rng.uniform(-1, 1))
    return sample | {"images": [image], "depth_maps": [depth]}


def conversation(questions: list[tuple[str, str]]) -> list[dict]:
    """Questions and answers about one image, which stands before the first question."""
    messages = [{"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]}]
    for index, (question, answer) in enumerate(questions):
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [{"type": "image"}, text] if index == 0 else [text]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def open_image(image: Stored, root: str | None) -> Image.Image:
    """
    An image as rows hold it, not yet decoded: bytes, a path below `root`, a data URL, a dict of `bytes` and `path` as
    `datasets` stores it, or a PIL image. Raises ValueError for a path that leads out of `root`, and for other URLs.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if image is None:
        raise ValueError("the row has no image")
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    head, _, data = image.partition(",")
    if head.startswith("data:"):
        if not head.endswith(";base64"):
            raise ValueError(f"an image's data URL begins with {head[:50]!r}; it must be base64")
        return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    if "://" in image:
        raise ValueError(f"the image is the URL {image[:200]!r}; download it, and give its path below image_root")
    if root is None:
        raise ValueError(f"the image is the path {image[:200]!r}, but the data set states no image_root")
    return Image.open(io.BytesIO(inside(root, image).read_bytes()))


def upright(image: Image.Image) -> Image.Image:
    """Decode it, and turn it as its EXIF data say."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def decode(encoded: Stored, root: str | None = None) -> Image.Image:
    return upright(open_image(encoded, root))


def read_depth(encoded: Stored, depth_scale: float, root: str | None = None) -> np.ndarray:
    """`(h, w)`, z-depth in metres, 0 = no label."""
    values = np.asarray(decode(encoded, root))
    if values.ndim != 2 or values.dtype == np.uint8:
        raise ValueError(f"depth is an image of shape {values.shape}, {values.dtype}; it must be a 16-bit gray one")
    if not (math.isfinite(depth_scale) and depth_scale > 0):
        raise ValueError(f"depth_scale is {depth_scale} values per metre; it must be above 0")
    return (values / depth_scale).astype(np.float32)


def crop(image: Image.Image, depth: np.ndarray | None, side: float) -> tuple[Image.Image, np.ndarray | None]:
    """The middle of both, at most `side` px of the image wide and high."""
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
