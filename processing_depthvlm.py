"""DepthVLM's processor: a photo becomes tokens at a known focal length; depth becomes metres at the photo's own size.

The way there: every photo is resized once, to the size that it would have had, had it been taken with the canonical
focal length f_c, rounded to whole tokens and kept within a budget of pixels. The way back: a network that believes in
f_c sees a scene, processed at focal length f_p, at depth * f_c / f_p; so metres = prediction * f_p / f_c, and a
training label is metres * f_c / f_p (paper, section 3.3, and metric compensation).
"""

import math
import numbers
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature, Pipeline, Qwen3VLConfig, Qwen3VLProcessor

from .configuration_depthvlm import warn_of_untested_transformers
from .photos_depthvlm import FIELD_OF_VIEW, focal_of_view, open_photo, plausible, view_of_focal

SYSTEM_PROMPT = "You are a helpful assistant."
DEPTH_PROMPT = (
    "Given this image, estimate the metric depth (in meters, rounded to two decimal places) "
    "for every pixel of the image."
)
DEPTH_RESPONSE = "OK, I will estimate the depth map of this image."

MAX_ASPECT_RATIO = 30

warn_of_untested_transformers()  # a processor can be loaded without the model


class DepthVLMProcessor(Qwen3VLProcessor):
    r"""
    Qwen3-VL's processor, which knows focal lengths.

    canonical_focal_length (`float`, defaults to 1000.0): f_c in px; must be the model's.
    default_fov (`float`, defaults to 60.0): field of view, in degrees over the photo's longer side, assumed where the
        focal length is neither given nor in the EXIF data.
    """

    # No video processor in the signature: it would need torchvision, and depth is for images
    def __init__(
        self, image_processor=None, tokenizer=None, chat_template=None, canonical_focal_length=1000.0, default_fov=60.0
    ):
        if not 0 < canonical_focal_length < math.inf:
            raise ValueError(f"canonical_focal_length is {canonical_focal_length}; it must be a positive number of px")
        if not FIELD_OF_VIEW[0] < default_fov < FIELD_OF_VIEW[1]:
            raise ValueError(f"default_fov is {default_fov}; it must lie between {FIELD_OF_VIEW} degrees")
        self.canonical_focal_length = canonical_focal_length
        self.default_fov = default_fov
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, *args, **kwargs):
        # AutoTokenizer would read config.json, whose model type it does not know without the remote code
        return super()._load_tokenizer_from_pretrained(*args, config=Qwen3VLConfig(), **kwargs)

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        focal_lengths: float | Sequence[float | None] | None = None,
        depth_maps: Sequence | None = None,
        max_pixels: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Qwen3-VL's call, with:

        images: a photo or a (nested) list of photos: PIL images, paths, URLs, or arrays. Turned upright by EXIF and
            converted to RGB; transparent parts become white.
        text: as Qwen3-VL's, one `<|image_pad|>` a photo. `None`: the depth prompt, a row a photo.
        focal_lengths: in px at the photo's own size, one for all photos or one a photo in the order of `images`; where
            `None`: from EXIF, else from `default_fov`.
        depth_maps: `(h, w)` arrays, z-depth in metres, 0 = no label, one a photo or `None`; upright like the photo, in
            its aspect ratio, at any size.
        max_pixels: budget for the processed photo; default `image_processor.size["longest_edge"]`.

        Returns Qwen3-VL's batch and

        - `cameras`: one dict a photo: `focal_length` (px at the photo's own size), `focal_length_source` ("given",
          "exif" or "assumed"), `canonical_focal_length` (f_c, px), `size` and `processed_size` (height, width),
          `metric_scale` (f_p / f_c);
        - `depth_labels`, with `depth_maps`: one float32 tensor `(height, width)` a photo on the processed grid, the
          nearest value's metres / metric_scale, 0 = no label: what `predicted_depth` is to equal.

        Raises `ValueError` or `TypeError` for what cannot be used, naming the argument, the value and the remedy.
        """
        if videos is not None:
            raise ValueError("videos were given, but depth is for images; pass frames as images, or use Qwen3-VL")
        if images is None:
            for name, value in (("focal_lengths", focal_lengths), ("depth_maps", depth_maps)):
                if value is not None:
                    raise ValueError(f"{name} came without images; pass the photos that they belong to")
            if text is not None:
                self._check_placeholders(text, 0)
            return super().__call__(text=text, **kwargs)
        settings = {*kwargs, *kwargs.get("images_kwargs", {})}  # max_pixels among them is not the call's own
        if ignored := {"do_resize", "size", "min_pixels", "max_pixels", "resample"} & settings:
            raise ValueError(
                f"{', '.join(sorted(ignored))} cannot be set: the focal length says the size; use the call's max_pixels"
            )
        named = flatten(images, "images")
        if not named:
            raise ValueError("images is an empty list; pass at least one photo, or None")
        opened = [open_photo(image, name) for image, name in named]
        photos = [photo for photo, _ in opened]
        if text is None:
            text = [self.depth_text()] * len(photos)
            kwargs.setdefault("padding", True)
        self._check_placeholders(text, len(photos), images)
        given = per_image(focal_lengths, len(photos), "focal_lengths")
        cameras = [
            self._camera(photo.size, focal_length, from_exif, max_pixels, index)
            for index, ((photo, from_exif), focal_length) in enumerate(zip(opened, given, strict=True))
        ]
        resized = [
            photo.resize(camera["processed_size"][::-1], Image.Resampling.BILINEAR)
            for photo, camera in zip(photos, cameras, strict=True)
        ]
        batch = super().__call__(images=resized, text=text, **{**kwargs, "do_resize": False})
        batch["cameras"] = cameras
        if depth_maps is not None:
            several = isinstance(depth_maps, (list, tuple)) or getattr(depth_maps, "ndim", None) == 3
            maps = list(depth_maps) if several else [depth_maps]
            maps = per_image(maps, len(photos), "depth_maps")
            batch["depth_labels"] = [
                depth_label(depth, camera, f"depth_maps[{index}]")
                for index, (depth, camera) in enumerate(zip(maps, cameras, strict=True))
            ]
        return batch

    def depth_text(self) -> str:
        """The conversation that depth is trained with, up to where the answer begins, with one image placeholder."""
        return self.apply_chat_template(
            [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DEPTH_PROMPT}]},
            ],
            add_generation_prompt=True,
        )

    def post_process_depth_estimation(self, outputs, target_sizes=None) -> list[dict[str, torch.Tensor]]:
        """
        From the network's camera and grid to the photo's: the only place where a map is resized back.

        outputs: of the model's `forward`, or of `generate` with `return_dict_in_generate=True`, for a batch that this
            processor made. target_sizes: `(height, width)` a photo; default: each photo's own size.

        Returns one `{"predicted_depth": (height, width)}` a photo: float32, z-depth in metres.
        """
        depths, cameras = outputs.predicted_depth, outputs.cameras
        if depths is None:
            raise ValueError("outputs have no predicted_depth; run the model without output_depth=False")
        if len(depths) and cameras is None:
            raise ValueError(
                "outputs have no cameras, so metres are unknown; pass the processor's whole batch to the model"
            )
        if target_sizes is None:
            target_sizes = [camera["size"] for camera in cameras or ()]
        if len(target_sizes) != len(depths):
            raise ValueError(
                f"got {len(target_sizes)} target_sizes for {len(depths)} depth maps; pass one a photo, or None"
            )
        for size in target_sizes:
            if np.shape(size) != (2,) or min(size) < 1:
                raise ValueError(f"target_sizes holds {size}; pass (height, width) in px, one a photo")
        results = []
        for depth, camera, size in zip(depths, cameras or (), target_sizes, strict=True):
            metres = depth[None, None].float() * camera["metric_scale"]
            metres = F.interpolate(metres, size=tuple(int(side) for side in size), mode="bilinear", align_corners=False)
            results.append({"predicted_depth": metres[0, 0]})
        return results

    @staticmethod
    def to_point_cloud(depth, focal_length: float, principal_point: tuple[float, float] | None = None) -> torch.Tensor:
        """
        depth: `(height, width)`, z-depth in metres. focal_length: px at the map's size. principal_point: (cx, cy) in px
        from the centre of the top-left pixel; default: the map's middle.

        Returns `(height, width, 3)`, float32: x right, y down, z forward (OpenCV camera frame), in metres.
        """
        depth = torch.as_tensor(depth, dtype=torch.float32)
        if depth.ndim != 2:
            raise ValueError(f"depth has shape {tuple(depth.shape)}; pass one (height, width) map")
        if not (math.isfinite(focal_length) and focal_length > 0):
            raise ValueError(f"focal_length is {focal_length}; it must be a positive number of px at the map's size")
        height, width = depth.shape
        cx, cy = ((width - 1) / 2, (height - 1) / 2) if principal_point is None else principal_point
        columns = torch.arange(width, dtype=torch.float32, device=depth.device) - cx
        rows = torch.arange(height, dtype=torch.float32, device=depth.device) - cy
        return torch.stack([columns * depth / focal_length, rows[:, None] * depth / focal_length, depth], dim=-1)

    @staticmethod
    def load_photo(photo) -> Image.Image:
        """The upright RGB photo that depth is laid over, from anything that `images` takes."""
        return open_photo(photo, "photo")[0]

    def _camera(self, size, given, from_exif, max_pixels, index) -> dict:
        width, height = size
        name = f"images[{index}]"
        if max(size) / min(size) > MAX_ASPECT_RATIO:
            raise ValueError(f"{name} is {width}x{height}, past an aspect ratio of {MAX_ASPECT_RATIO}; crop it first")
        if given is not None:
            focal_length, source = check_focal_length(given, max(size), f"focal_lengths[{index}]"), "given"
        elif from_exif is not None:
            focal_length, source = from_exif, "exif"
        else:
            focal_length, source = focal_of_view(self.default_fov, max(size)), "assumed"
        processed = self._processed_size(height, width, self.canonical_focal_length / focal_length, max_pixels)
        # the rounding to whole tokens stretches the axes unequally; f_p is their geometric mean
        zoom = math.sqrt(processed[0] * processed[1] / (height * width))
        return {
            "focal_length": focal_length,
            "focal_length_source": source,
            "canonical_focal_length": self.canonical_focal_length,
            "size": (height, width),
            "processed_size": processed,
            "metric_scale": focal_length * zoom / self.canonical_focal_length,
        }

    def _processed_size(self, height, width, zoom, max_pixels) -> tuple[int, int]:
        """`(height, width)` of the photo at `zoom`, in whole tokens and within the budget."""
        token = self.image_processor.patch_size * self.image_processor.merge_size
        budget = self.image_processor.size["longest_edge"] if max_pixels is None else max_pixels
        if not (isinstance(budget, numbers.Real) and budget >= token * token):
            raise ValueError(f"max_pixels is {budget}; it must be at least one token's {token}x{token} = {token**2}")
        floor = min(self.image_processor.size["shortest_edge"], budget)  # both are pixel counts, whatever their names
        zoom = max(zoom, math.sqrt(floor / (height * width)))
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

    def _check_placeholders(self, text, num_images, images=None):
        rows = [text] if isinstance(text, str) else text
        found = [row.count(self.image_token) for row in rows]
        if sum(found) != num_images:
            raise ValueError(
                f"text has {sum(found)} {self.image_token} placeholders for {num_images} images; write one an image"
            )
        if isinstance(images, (list, tuple)) and len(images) == len(rows):
            given = [len(flatten(row, "images")) for row in images]
            # a flat list says nothing of rows; a nested one does
            if any(isinstance(row, (list, tuple)) for row in images) and given != found:
                raise ValueError(
                    f"text has {found} {self.image_token} placeholders a row for {given} images a row; nest them alike"
                )


def flatten(images, name):
    """(image, its name in messages) of a photo or a nested list of photos."""
    if isinstance(images, (list, tuple)):
        return [pair for index, image in enumerate(images) for pair in flatten(image, f"{name}[{index}]")]
    return [(images, name)]


def check_focal_length(focal_length, longer_side: int, name: str) -> float:
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


def per_image(values, num_images: int, name: str) -> list:
    """One value an image, from one for all, a list, an array or None."""
    if values is None or isinstance(values, (int, float, str)) or getattr(values, "ndim", None) == 0:
        return [values] * num_images
    values = list(flatten_values(values))
    if len(values) != num_images:
        raise ValueError(f"got {len(values)} {name} for {num_images} images; pass one an image, or None")
    return values


def flatten_values(values):
    for value in values:
        yield from flatten_values(value) if isinstance(value, (list, tuple)) else (value,)


def depth_label(depth, camera: dict, name: str) -> torch.Tensor:
    """A depth map in metres, or None -> its label on the processed grid, as the canonical camera sees it."""
    height, width = camera["processed_size"]
    if depth is None:
        return torch.zeros(height, width)
    try:
        if isinstance(depth, torch.Tensor):
            depth = depth.detach().cpu().float()
        else:
            depth = torch.from_numpy(np.array(depth, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {str(depth)[:200]!r}; pass a (height, width) array of metres, or None") from error
    if depth.ndim != 2 or 0 in depth.shape:
        raise ValueError(f"{name} has shape {tuple(depth.shape)}; pass one (height, width) map in metres")
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
    `pipeline("depth-estimation", model=..., trust_remote_code=True)`: photos (path, URL or PIL image) -> metres.

    Call it with one photo or a list, and optionally `focal_length` (px at the photos' own size) and `max_pixels`.
    Each photo gives `{"predicted_depth": float32 tensor (height, width) in metres, "depth": 8-bit PIL image}`.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(self, focal_length=None, max_pixels=None, **kwargs):
        if kwargs:
            raise TypeError(f"unknown argument {', '.join(kwargs)}; the pipeline takes focal_length and max_pixels")
        given = {"focal_length": focal_length, "max_pixels": max_pixels}
        # only what is given: a call's None must not undo what the pipeline was made with
        return {name: value for name, value in given.items() if value is not None}, {}, {}

    def preprocess(self, photo, focal_length=None, max_pixels=None):
        return self.processor(images=[photo], focal_lengths=focal_length, max_pixels=max_pixels, return_tensors="pt")

    def _forward(self, model_inputs):
        return self.model(**model_inputs, logits_to_keep=1)

    def postprocess(self, model_outputs):
        depth = self.processor.post_process_depth_estimation(model_outputs)[0]["predicted_depth"]
        picture = (depth / depth.max() * 255).to(torch.uint8).cpu().numpy()
        return {"predicted_depth": depth, "depth": Image.fromarray(picture)}


__all__ = ["DepthVLMPipeline", "DepthVLMProcessor"]
