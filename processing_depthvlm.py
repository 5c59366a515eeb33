"""DepthVLM's processor: a photo becomes tokens at a known focal length; depth becomes metres at the photo's own size.

Preprocessing resizes every photo once, to the size that it would have at the canonical focal length f_c, rounded to
whole tokens and kept within a budget of pixels (paper, section 3.3, eq. 6). A network that assumes f_c sees a scene,
processed at focal length f_p, at depth * f_c / f_p; so metres = prediction * f_p / f_c, and a training label is
metres * f_c / f_p (metric compensation).
"""

import functools
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    BaseImageProcessor,
    BatchFeature,
    Pipeline,
    PreTrainedTokenizerBase,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)
from transformers.processing_utils import ImagesKwargs, TextKwargs, VideosKwargs
from transformers.utils import ModelOutput

from .configuration_depthvlm import warn_of_untested_transformers
from .photos_depthvlm import FIELD_OF_VIEW, Photo, focal_of_view, open_photo, plausible, view_of_focal

if TYPE_CHECKING:  # never run: a checkpoint is saved with the files that this one imports from beside itself
    from .handler import EndpointHandler  # noqa: F401

SYSTEM_PROMPT = "You are a helpful assistant."
DEPTH_PROMPT = (
    "Given this image, estimate the metric depth (in meters, rounded to two decimal places) "
    "for every pixel of the image."
)
DEPTH_RESPONSE = "OK, I will estimate the depth map of this image."

MAX_ASPECT_RATIO = 30
# arguments of Qwen3-VL's call that concern text; how photos are resized and normalised is the processor's matter
TEXT_ARGUMENTS = frozenset(TextKwargs.__annotations__) | {
    "text_kwargs",
    "common_kwargs",
    "return_tensors",
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
}
# and those that concern photos, which are Qwen3-VL's without focal normalization
VISION_ARGUMENTS = {*ImagesKwargs.__annotations__, *VideosKwargs.__annotations__, "images_kwargs", "videos_kwargs"}

warn_of_untested_transformers()  # a processor can be loaded without the model


class DepthVLMProcessor(Qwen3VLProcessor):
    r"""
    Qwen3-VL's processor, which knows focal lengths.

    canonical_focal_length (`float`, defaults to 1000.0): f_c in px; must be the model's.
    default_fov (`float`, defaults to 60.0): field of view, in degrees over the photo's longer side, assumed where the
        focal length is neither given nor in the EXIF data.
    focal_normalization (`bool`, defaults to `True`): what a call does unless it says otherwise.
    """

    # No video processor in the signature: it would need torchvision, and depth is for images
    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        canonical_focal_length: float = 1000.0,
        default_fov: float = 60.0,
        focal_normalization: bool = True,
    ):
        if not (is_number(canonical_focal_length) and 0 < canonical_focal_length < math.inf):
            raise ValueError(
                f"canonical_focal_length is {canonical_focal_length!r}; it must be a positive number of px"
            )
        if not (is_number(default_fov) and FIELD_OF_VIEW[0] < default_fov < FIELD_OF_VIEW[1]):
            raise ValueError(f"default_fov is {default_fov!r}; it must lie between {FIELD_OF_VIEW} degrees")
        self.canonical_focal_length = canonical_focal_length
        self.default_fov = default_fov
        self.focal_normalization = focal_normalization
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, *args, **kwargs):
        # AutoTokenizer would read config.json, whose model type it does not know without the remote code
        return super()._load_tokenizer_from_pretrained(*args, config=Qwen3VLConfig(), **kwargs)

    def __call__(
        self,
        images: Photo | Sequence | None = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        focal_lengths: float | Sequence[float | tuple[float, float] | None] | None = None,
        depth_maps: Sequence | None = None,
        max_pixels: int | None = None,
        focal_normalization: bool | None = None,
        uint8_patches: bool = False,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Qwen3-VL's call, with:

        images: a photo or a (nested) list of photos: PIL images, paths, URLs, bytes, binary files, `{"bytes", "path"}`
            dicts or arrays. Turned upright by EXIF and converted to RGB; transparent parts become white.
        text: as Qwen3-VL's, one `<|image_pad|>` per photo. `None`: the depth prompt, one row per photo.
        focal_lengths: in px at the photo's own size, one for all photos or one per photo in the order of `images`; a
            tuple is (fx, fy). Where `None`: from EXIF, else from `default_fov`.
        depth_maps: `(h, w)` arrays, z-depth in metres, 0 = no label, one per photo or `None`; upright like the photo,
            in its aspect ratio, at any size.
        max_pixels: budget for the processed photo; default `image_processor.size["longest_edge"]`.
        focal_normalization: `False` sizes photos as Qwen3-VL does, so that ids and pixels equal its processor's, for
            questions that are not about metres; depth stays metric, by `metric_scale`. Default: the processor's.
        uint8_patches: whether `pixel_values` are the patches in 8 bits, an eighth of the bytes, for
            `normalize_patches` to finish on the device.

        Returns Qwen3-VL's batch and

        - `cameras`: one dict per photo: `focal_length` (px at the photo's own size, a tuple where one was given),
          `focal_length_source` ("given", "exif" or "assumed"), `canonical_focal_length` (f_c, px), `size` and
          `processed_size` (height, width), `metric_scale` (f_p / f_c);
        - `depth_labels`, with `depth_maps`: one float32 tensor `(height, width)` per photo on the processed grid, the
          nearest value's metres / metric_scale, 0 = no label: the target of `predicted_depth`.

        Raises `ValueError` or `TypeError` for what cannot be used, naming the argument, the value and the remedy.
        """
        if focal_normalization is None:
            focal_normalization = self.focal_normalization
        known = TEXT_ARGUMENTS if focal_normalization else TEXT_ARGUMENTS | VISION_ARGUMENTS
        if unknown := sorted(set(kwargs) - known):
            raise TypeError(
                f"{', '.join(unknown)} cannot be set: of photos a call takes focal_lengths, depth_maps, max_pixels, "
                "focal_normalization and uint8_patches"
            )
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"{name} were given, but depth is for images; pass frames as images, or use Qwen3-VL")
        if text is not None and not is_text(text):
            raise TypeError(f"text is {str(text)[:200]!r}; pass a string or a list of strings")
        if images is None:
            for name, value in (("focal_lengths", focal_lengths), ("depth_maps", depth_maps)):
                if value is not None:
                    raise ValueError(f"{name} came without images; pass the photos that they belong to")
            if text is not None:
                self._check_placeholders(text, 0)
            return super().__call__(text=text, **kwargs)
        named = flatten(images, "images")
        if not named:
            raise ValueError("images is an empty list; pass at least one photo, or None")
        opened = [open_photo(image, name) for image, name in named]
        if text is None:
            text = [self.depth_text()] * len(opened)
            kwargs.setdefault("padding", True)
        self._check_placeholders(text, len(opened), images)
        cameras = [
            self._camera(photo.size, focal_length, from_exif, index)
            for index, ((photo, from_exif), focal_length) in enumerate(
                zip(opened, per_image(focal_lengths, len(opened), "focal_lengths"), strict=True)
            )
        ]
        photos = [photo for photo, _ in opened]
        settings = {}
        if focal_normalization:
            settings["do_resize"] = False
            for index, (photo, camera) in enumerate(zip(photos, cameras, strict=True)):
                if max(photo.size) / min(photo.size) > MAX_ASPECT_RATIO:
                    raise ValueError(
                        f"images[{index}] is {photo.width}x{photo.height}, past an aspect ratio of {MAX_ASPECT_RATIO}; "
                        "crop it first"
                    )
                size = self._processed_size(camera, max_pixels)[::-1]
                photos[index] = photo.resize(size, Image.Resampling.BILINEAR)
        elif max_pixels is not None:
            settings["size"] = {**dict(self.image_processor.size), "longest_edge": self._budget(max_pixels)}
        in_uint8 = focal_normalization or uint8_patches
        if in_uint8:
            settings |= {"do_rescale": False, "do_normalize": False}
        batch = super().__call__(images=photos, text=text, **kwargs, **settings)
        patch = self.image_processor.patch_size
        for camera, (_, rows, columns) in zip(cameras, np.asarray(batch["image_grid_thw"]).tolist(), strict=True):
            camera["processed_size"] = rows * patch, columns * patch
            # the rounding to whole tokens stretches the axes unequally; f_p is the geometric mean of both
            (height, width), focal_length = camera["size"], np.broadcast_to(camera["focal_length"], 2)
            zoom = math.sqrt(rows * patch * columns * patch / (height * width))
            camera["metric_scale"] = float(math.sqrt(focal_length.prod()) * zoom / self.canonical_focal_length)
        batch["cameras"] = cameras
        if in_uint8 and not uint8_patches:
            batch["pixel_values"] = self.normalize_patches(batch["pixel_values"])
        if depth_maps is not None:
            several = isinstance(depth_maps, (list, tuple)) or getattr(depth_maps, "ndim", None) == 3
            maps = per_image(list(depth_maps) if several else [depth_maps], len(photos), "depth_maps")
            batch["depth_labels"] = [
                depth_label(depth, camera, f"depth_maps[{index}]")
                for index, (depth, camera) in enumerate(zip(maps, cameras, strict=True))
            ]
        return batch

    def _process_images(self, images: list[Image.Image], **kwargs) -> tuple[dict, list[str]]:
        if kwargs.get("do_normalize", True):
            return super()._process_images(images, **kwargs)
        patch, merge = self.image_processor.patch_size, self.image_processor.merge_size
        if kwargs.get("do_resize", True):
            batch = self.image_processor(images, **kwargs | {"return_tensors": "np"})
            frames = batch["pixel_values"].reshape(-1, 3, self.image_processor.temporal_patch_size, patch**2)
            patches, grids = frames[:, :, 0].reshape(len(frames), -1).astype(np.uint8), batch["image_grid_thw"]
        else:
            pairs = [patchify(np.asarray(image), patch, merge) for image in images]
            patches, grids = np.concatenate([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
        batch = {"pixel_values": patches, "image_grid_thw": grids}
        return batch, [self.replace_image_token(batch, image_idx=index) for index in range(len(grids))]

    def normalize_patches(self, patches: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
        """
        uint8 patches `(num_patches, 3 * patch_size**2)` -> the model's `pixel_values`, float32 of shape
        `(num_patches, 3 * temporal_patch_size * patch_size**2)`, where `patches` are: the image processor's, bit for
        bit.
        """
        if isinstance(patches, np.ndarray):
            return self.normalize_patches(torch.from_numpy(patches)).numpy()
        images = self.image_processor
        settings = (*images.image_mean, *images.image_std, images.rescale_factor)
        table = normalized_values(images, settings).to(patches.device)
        pixels = table.index_select(0, channel_index(patches).flatten()).view(len(patches), 3, 1, -1)
        return pixels.expand(-1, -1, images.temporal_patch_size, -1).reshape(len(patches), -1)

    def depth_text(self, question: str = DEPTH_PROMPT) -> str:
        """
        The conversation that depth is trained with, or the one that asks `question` instead, up to where the answer
        begins, with one image placeholder.

        The image's tokens attend to what stands before them alone: after the same system message, any question leaves
        depth as it is.
        """
        return self.apply_chat_template(
            [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            ],
            add_generation_prompt=True,
        )

    def apply_chat_template(self, conversation: list, *args, **kwargs) -> str | list | BatchFeature:
        """As Qwen3-VL's; of the photos a call takes `processor_kwargs={"focal_lengths": [...]}` and the like."""
        rows = conversation if conversation and isinstance(conversation[0], (list, tuple)) else [conversation]
        contents = [turn["content"] for row in rows for turn in row if isinstance(turn.get("content"), list)]
        named = {name for content in contents for part in content if isinstance(part, dict) for name in part}
        misplaced = named & {"focal_length", "focal_lengths", "depth_maps", "max_pixels"} | {"focal_length"} & set(
            kwargs
        )
        if misplaced:
            raise TypeError(
                f"{', '.join(sorted(misplaced))} would be ignored there; pass one value per photo in "
                "processor_kwargs={'focal_lengths': [...]}"
            )
        return super().apply_chat_template(conversation, *args, **kwargs)

    def follow_up(self, outputs: ModelOutput, question: str) -> BatchFeature:
        """
        The next question about the photos of a conversation, for `generate` to go on from where it stopped: the
        earlier prompt and answer lie in the cache, and no photo is encoded again.

        outputs: of `generate` with `return_dict_in_generate=True` for one conversation and one returned sequence. Its
        cache is extended in place; `copy.deepcopy(outputs)` first to ask several questions from the same point.

        Returns `input_ids`, `attention_mask` and the cache: pass all to `generate`. Raises `ValueError` for several
        sequences, or an output without a cache.
        """
        name = "cache" if "cache" in outputs else "past_key_values"  # renamed by transformers 5.24
        cache, sequence = outputs.get(name), outputs.sequences
        if cache is None or len(sequence) != 1:
            raise ValueError(
                f"outputs hold {len(sequence)} sequences and {'no' if cache is None else 'a'} cache; pass those of one "
                "conversation, generated with return_dict_in_generate=True and use_cache=True"
            )
        marks = [chr(0xE000 + number) for number in range(2)]  # of the private use area: in no template
        turns = zip(("user", "assistant", "user"), (*marks, question), strict=True)
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        tail = self.apply_chat_template(chat, add_generation_prompt=True).split(marks[1])[1]
        end = self.tokenizer.eos_token
        if sequence[0, -1] == self.tokenizer.eos_token_id and tail.startswith(end):
            tail = tail[len(end) :]
        ids = self.tokenizer(tail, add_special_tokens=False, return_tensors="pt")["input_ids"].to(sequence.device)
        sequence = torch.cat([sequence, ids], dim=1)
        return BatchFeature({"input_ids": sequence, "attention_mask": torch.ones_like(sequence), name: cache})

    def post_process_depth_estimation(
        self, outputs: ModelOutput, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """
        From the network's camera and grid to the photo's: the only place where a map is resized back.

        outputs: of the model's `forward`, or of `generate` with `return_dict_in_generate=True`, for a batch that this
            processor made. target_sizes: `(height, width)` per photo; default: each photo's own size.

        Returns one `{"predicted_depth": (height, width)}` per photo: float32, z-depth in metres.
        """
        if not hasattr(outputs, "predicted_depth") or not hasattr(outputs, "cameras"):
            raise TypeError(f"outputs is a {type(outputs).__name__}; pass what the model returned for a whole batch")
        depths, cameras = outputs.predicted_depth, outputs.cameras
        if depths is None:
            raise ValueError("outputs have no predicted_depth; run the model without output_depth=False")
        if len(depths) and cameras is None:
            raise ValueError(
                "outputs have no cameras, so metres are unknown; pass the processor's whole batch to the model"
            )
        cameras = cameras or ()
        if len(cameras) != len(depths) or any(not {"size", "metric_scale"} <= set(camera) for camera in cameras):
            raise ValueError(
                f"outputs have {len(cameras)} cameras for {len(depths)} depth maps, each of which must have size and "
                "metric_scale; pass the processor's cameras as they are"
            )
        if target_sizes is None:
            target_sizes = [camera["size"] for camera in cameras]
        if isinstance(target_sizes, numbers.Number) or len(target_sizes) != len(depths):
            count = 1 if isinstance(target_sizes, numbers.Number) else len(target_sizes)
            raise ValueError(f"got {count} target_sizes for {len(depths)} depth maps; pass one per photo, or None")
        for size in target_sizes:
            sides = np.asarray(size)
            if sides.shape != (2,) or sides.dtype.kind not in "iu" or sides.min() < 1:
                raise ValueError(f"target_sizes holds {size!r}; pass (height, width) in whole px, one per photo")
        results = []
        for depth, camera, size in zip(depths, cameras, target_sizes, strict=True):
            metres = depth[None, None].float() * camera["metric_scale"]
            metres = F.interpolate(metres, size=tuple(int(side) for side in size), mode="bilinear", align_corners=False)
            results.append({"predicted_depth": metres[0, 0]})
        return results

    @staticmethod
    def to_point_cloud(
        depth: torch.Tensor | np.ndarray | Sequence,
        focal_length: float | tuple[float, float],
        principal_point: tuple[float, float] | None = None,
    ) -> torch.Tensor:
        """
        depth: `(height, width)`, z-depth in metres. focal_length: px at the map's size, or (fx, fy). principal_point:
        (cx, cy) in px from the centre of the top-left pixel; default: the map's middle.

        Returns `(height, width, 3)`, float32: x right, y down, z forward (OpenCV camera frame), in metres.
        """
        depth = to_map(depth, "depth")
        height, width = depth.shape
        fx, fy = focal_length if isinstance(focal_length, tuple) and len(focal_length) == 2 else [focal_length] * 2
        if not all(is_number(focal) and 0 < focal < math.inf for focal in (fx, fy)):
            raise ValueError(
                f"focal_length is {focal_length!r}; it must be a positive number of px at the map's size, or (fx, fy)"
            )
        if principal_point is None:
            principal_point = (width - 1) / 2, (height - 1) / 2
        if np.shape(principal_point) != (2,) or not np.isfinite(principal_point).all():
            raise ValueError(f"principal_point is {principal_point!r}; pass (cx, cy) in px of the map, or None")
        cx, cy = principal_point
        columns = torch.arange(width, dtype=torch.float32, device=depth.device) - cx
        rows = torch.arange(height, dtype=torch.float32, device=depth.device) - cy
        return torch.stack([columns * depth / fx, rows[:, None] * depth / fy, depth], dim=-1)

    @staticmethod
    def load_photo(photo: Photo) -> Image.Image:
        """The upright RGB photo that depth is laid over, from anything that `images` takes."""
        return open_photo(photo, "photo")[0]

    def _camera(
        self, size: tuple[int, int], given: float | tuple[float, float] | None, from_exif: float | None, index: int
    ) -> dict:
        width, height = size
        if given is not None:
            focal_length, source = check_focal_length(given, max(size), f"focal_lengths[{index}]"), "given"
        elif from_exif is not None:
            focal_length, source = from_exif, "exif"
        else:
            focal_length, source = focal_of_view(self.default_fov, max(size)), "assumed"
        return {
            "focal_length": focal_length,
            "focal_length_source": source,
            "canonical_focal_length": self.canonical_focal_length,
            "size": (height, width),
        }

    def _budget(self, max_pixels: int | None) -> int:
        token = self.image_processor.patch_size * self.image_processor.merge_size
        budget = self.image_processor.size["longest_edge"] if max_pixels is None else max_pixels
        if not (is_number(budget) and token * token <= budget < math.inf):
            raise ValueError(f"max_pixels is {budget!r}; it must be at least one token's {token}x{token} = {token**2}")
        return int(budget)

    def _processed_size(self, camera: dict, max_pixels: int | None) -> tuple[int, int]:
        """`(height, width)` of the photo at the canonical focal length, in whole tokens and within the budget."""
        height, width = camera["size"]
        fx, fy = np.broadcast_to(camera["focal_length"], 2).tolist()
        height *= fx / fy  # as if its pixels were square
        token = self.image_processor.patch_size * self.image_processor.merge_size
        budget = self._budget(max_pixels)
        floor = min(self.image_processor.size["shortest_edge"], budget)  # both are pixel counts, whatever their names
        zoom = max(self.canonical_focal_length / fx, math.sqrt(floor / (height * width)))
        sides = [max(1, round(side * zoom / token)) for side in (height, width)]
        if sides[0] * sides[1] * token * token < floor:
            sides = [math.ceil(side * zoom / token) for side in (height, width)]
        if sides[0] * sides[1] * token * token > budget:
            zoom = math.sqrt(budget / (height * width))
            sides = [max(1, math.floor(side * zoom / token)) for side in (height, width)]
            # a side of less than a token was rounded up: the other one pays for it
            longer = 0 if height > width else 1
            sides[longer] = min(sides[longer], budget // (token * token * sides[1 - longer]))
        return sides[0] * token, sides[1] * token

    def _check_placeholders(
        self, text: str | Sequence[str], num_images: int, images: Photo | Sequence | None = None
    ) -> None:
        rows = [text] if isinstance(text, str) else text
        counts = [row.count(self.image_token) for row in rows]
        if sum(counts) != num_images:
            raise ValueError(
                f"text has {sum(counts)} {self.image_token} placeholders for {num_images} images; write one per image"
            )
        if isinstance(images, (list, tuple)) and len(images) == len(rows):
            given = [len(flatten(row, "images")) for row in images]
            # a flat list says nothing of rows; a nested one does
            if any(isinstance(row, (list, tuple)) for row in images) and given != counts:
                raise ValueError(
                    f"text has {counts} {self.image_token} placeholders per row for {given} images; nest them alike"
                )


def flatten(images: Photo | Sequence, name: str) -> list[tuple[Photo, str]]:
    """(image, its name in messages) of a photo or a nested list of photos."""
    if isinstance(images, (list, tuple)):
        return [pair for index, image in enumerate(images) for pair in flatten(image, f"{name}[{index}]")]
    return [(images, name)]


def check_focal_length(focal_length: float | tuple, longer_side: int, name: str) -> float | tuple[float, float]:
    """A focal length in px, or (fx, fy), as floats."""
    if isinstance(focal_length, tuple):
        if len(focal_length) != 2:
            raise ValueError(f"{name} is {focal_length}; pass one number of px, (fx, fy) or None")
        return tuple(check_focal_length(value, longer_side, name) for value in focal_length)
    try:
        if isinstance(focal_length, str):
            raise TypeError("text")
        focal_length = float(focal_length)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {focal_length!r}; pass a number of px at the photo's own size, or None") from error
    if not (math.isfinite(focal_length) and focal_length > 0):
        raise ValueError(f"{name} is {focal_length}; it must be a positive number of px at the photo's own size")
    if plausible(focal_length, longer_side) is None:
        raise ValueError(
            f"{name} is {focal_length} px, {view_of_focal(focal_length, longer_side):.1f} degrees of view over "
            f"{longer_side} px; pass px (not mm) at the photo's own size"
        )
    return focal_length


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_text(text: object) -> bool:
    return isinstance(text, str) or (isinstance(text, (list, tuple)) and all(isinstance(row, str) for row in text))


def patchify(image: np.ndarray, patch: int, merge: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """
    `(height, width, 3)` of whole tokens -> `(num_patches, 3 * patch**2)` in Qwen3-VL's order, the merge x merge patches
    of a token one after the other, and the grid `(1, rows, columns)` of patches.
    """
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    patches = image.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3).transpose(
        0, 3, 1, 4, 6, 2, 5
    )
    return patches.reshape(rows * columns, -1), (1, rows, columns)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept serves training too
def normalized_values(image_processor: BaseImageProcessor, settings: tuple[float, ...]) -> torch.Tensor:
    """
    What the image processor makes of each of the 256 values in each channel: `(3 * 256,)`, see `channel_index`.

    settings: of `image_processor`, on which the values depend.
    """
    patch, merge, frames = (getattr(image_processor, f"{name}_size") for name in ("patch", "merge", "temporal_patch"))
    side = patch * merge * math.ceil(16 / (patch * merge))
    ramp = np.resize(np.arange(256, dtype=np.uint8), (side, side, 1)).repeat(3, axis=2)
    values = image_processor(Image.fromarray(ramp), do_resize=False, return_tensors="pt")["pixel_values"]
    table = torch.empty(3 * 256)
    table[channel_index(torch.from_numpy(patchify(ramp, patch, merge)[0]))] = values.unflatten(1, (3, frames, -1))[
        :, :, 0
    ]
    return table


def channel_index(patches: torch.Tensor) -> torch.Tensor:
    """`(num_patches, 3 * n)` 8-bit values -> `(num_patches, 3, n)`, value + 256 * channel."""
    offsets = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=patches.device)
    return patches.unflatten(1, (3, -1)).int() + offsets[:, None]


def per_image(values: object, num_images: int, name: str) -> list:
    """One value per image, from one for all, a list, an array or None."""
    if not isinstance(values, (list, tuple)) and not getattr(values, "ndim", 0):
        return [values] * num_images
    values = list(flatten_values(values))
    if len(values) != num_images:
        raise ValueError(f"got {len(values)} {name} for {num_images} images; pass one per image, or None")
    return values


def flatten_values(values: Sequence) -> Iterator:
    """The values of nested lists; a tuple within a list is a value, (fx, fy)."""
    for value in values:
        yield from flatten_values(value) if isinstance(value, list) else (value,)


def to_map(depth: torch.Tensor | np.ndarray | Sequence, name: str) -> torch.Tensor:
    """A `(height, width)` map as a float32 tensor, from an array, a tensor or nested lists."""
    try:
        if isinstance(depth, torch.Tensor):
            depth = depth.detach().float()
        else:
            depth = torch.from_numpy(np.asarray(depth).astype(np.float32, casting="same_kind"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {str(depth)[:200]!r}; pass a (height, width) array of metres") from error
    if depth.ndim != 2 or 0 in depth.shape:
        raise ValueError(f"{name} has shape {tuple(depth.shape)}; pass one (height, width) map in metres")
    return depth


def depth_label(depth: torch.Tensor | np.ndarray | Sequence | None, camera: dict, name: str) -> torch.Tensor:
    """A depth map in metres, or None -> its label on the processed grid, as the canonical camera sees it."""
    height, width = camera["processed_size"]
    if depth is None:
        return torch.zeros(height, width)
    depth = to_map(depth, name).cpu()
    ratio = depth.shape[1] / depth.shape[0] * camera["size"][0] / camera["size"][1]
    if not 0.95 < ratio < 1.05:
        raise ValueError(
            f"{name} has shape {tuple(depth.shape)} but its photo {camera['size']}; both must show the same view; "
            "give the map the photo's aspect ratio"
        )
    if not torch.isfinite(depth).all() or (depth < 0).any():
        raise ValueError(f"{name} holds negative, infinite or NaN values; write 0 where there is no measurement")
    label = F.interpolate(depth[None, None], size=(height, width), mode="nearest-exact")[0, 0]
    return label / camera["metric_scale"]


class DepthVLMPipeline(Pipeline):
    """
    `pipeline("depth-estimation", model=..., trust_remote_code=True)`: photos (whatever the processor takes) -> metres.

    Call it with one photo or a list, and optionally `focal_lengths` (px at the photos' own size, one for all or one per
    photo) and `max_pixels`. Each photo gives `{"predicted_depth": float32 tensor (height, width) in metres, "depth":
    8-bit PIL image}`.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(
        self,
        images: Photo | Sequence,
        focal_lengths: float | Sequence[float | tuple[float, float] | None] | None = None,
        **kwargs,
    ) -> dict | list[dict]:
        if isinstance(images, (list, tuple)) and focal_lengths is not None:
            lengths = per_image(focal_lengths, len(images), "focal_lengths")
            images = [{"photo": photo, "focal_length": length} for photo, length in zip(images, lengths, strict=True)]
            focal_lengths = None
        return super().__call__(images, focal_lengths=focal_lengths, **kwargs)

    def _sanitize_parameters(
        self, focal_lengths: float | None = None, max_pixels: int | None = None, **kwargs
    ) -> tuple[dict, dict, dict]:
        if kwargs:
            raise TypeError(f"unknown argument {', '.join(kwargs)}; the pipeline takes focal_lengths and max_pixels")
        given = {"focal_lengths": focal_lengths, "max_pixels": max_pixels}
        # only what is given: a call's None must not undo what the pipeline was made with
        return {name: value for name, value in given.items() if value is not None}, {}, {}

    def preprocess(
        self, photo: Photo, focal_lengths: float | None = None, max_pixels: int | None = None
    ) -> BatchFeature:
        if isinstance(photo, dict) and "photo" in photo:
            photo, focal_lengths = photo["photo"], photo["focal_length"]
        return self.processor(images=[photo], focal_lengths=focal_lengths, max_pixels=max_pixels, return_tensors="pt")

    def _forward(self, model_inputs: BatchFeature) -> ModelOutput:
        return self.model(**model_inputs, logits_to_keep=1)

    def postprocess(self, model_outputs: ModelOutput) -> dict:
        depth = self.processor.post_process_depth_estimation(model_outputs)[0]["predicted_depth"]
        picture = (depth / depth.max() * 255).to(torch.uint8).cpu().numpy()
        return {"predicted_depth": depth, "depth": Image.fromarray(picture)}


__all__ = ["DepthVLMPipeline", "DepthVLMProcessor"]
