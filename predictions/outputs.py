"""Files of predictions, for predict.py and app.py: one function per format, from a map to the bytes of a file.

Maps are z-depth in metres, float32 `(height, width)`, none of them 0; cameras are `handler.describe_camera`'s.
"""

import io
import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from depthvlm.handler import MAX_MILLIMETRES, depth_npz, depth_png

from .files import open_whole

SUFFIXES = {  # what --save names -> how its file ends
    "png": "_depth.png",
    "color": "_color.png",
    "npz": ".npz",
    "npy": ".npy",
    "ply": ".ply",
    "glb": ".glb",
    "json": ".json",
}
SHADES = 240  # of the colours of depth; what is left of a palette are greys, for the scale
PALETTE = np.concatenate(  # near is red
    [colormaps["turbo_r"](np.linspace(0, 1, SHADES)), colormaps["gray"](np.linspace(0, 1, 256 - SHADES))]
)
PALETTE = (PALETTE[:, :3] * 255 + 0.5).astype(np.uint8)
COARSE, FINE = (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)  # steps of a scale within a power of ten
MAX_PICTURE_PIXELS = 2_000_000
MAX_TEXTURE_SIDE = 2048
# A surface seen at less than 5 degrees is a depth edge, whose pixels lie between two objects and on neither.
MAX_SLOPE = math.tan(math.radians(85))


@dataclass
class Prediction:
    """
    One photo's depth and what is known of it.

    camera: `handler.describe_camera`'s. answer: `None` without a question. seconds: of the pass, per photo.
    colors: RGB pixels `(rows, columns, 3)` on `cloud_grid`, and texture: the photo as a JPEG, as far as the formats
    need them. settings: what the prediction was made with.
    """

    photo: str
    depth: np.ndarray
    camera: dict
    answer: str | None = None
    seconds: float = 0.0
    colors: np.ndarray | None = None
    texture: bytes | None = None
    settings: dict = field(default_factory=dict)

    def record(self) -> dict:
        """For JSON: camera, where its focal length came from, distances, answer, time."""
        distances = {"min": self.depth.min(), "median": np.median(self.depth), "max": self.depth.max()}
        return {
            "photo": self.photo,
            "camera": self.camera,
            "depth": {name: round(float(value), 4) for name, value in distances.items()},
            "too_far_for_png": int((self.depth > (MAX_MILLIMETRES + 0.5) / 1000).sum()),
            "answer": self.answer,
            "seconds": round(self.seconds, 4),
            "settings": self.settings,
        }


def write(prediction: Prediction, stem: Path, formats: list[str], points: int, overwrite: bool) -> dict:
    """Write a prediction's files, STEM with each format's suffix, and return its record, `files` included."""
    record = prediction.record()
    record["files"] = [f"{stem}{SUFFIXES[name]}" for name in formats]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for name, path in zip(formats, record["files"], strict=True):
        with open_whole(path, overwrite=overwrite) as file:
            file.write(encode(prediction, name, points, record))
    return record


def encode(prediction: Prediction, name: str, points: int, record: dict) -> bytes:
    """A prediction in the format `name`, a key of `SUFFIXES`. points: of clouds, at most."""
    depth, camera = prediction.depth, prediction.camera
    if name == "png":
        return depth_png(depth)
    if name == "color":
        return color_png(depth)
    if name == "npz":
        settings = json.dumps(prediction.settings)
        intrinsics = np.array([[camera["fx"], 0, camera["cx"]], [0, camera["fy"], camera["cy"]], [0, 0, 1]])
        return depth_npz(depth, camera, intrinsics=intrinsics, settings=settings)
    if name == "npy":
        file = io.BytesIO()
        np.save(file, depth)
        return file.getvalue()
    if name == "ply":
        return ply(depth, camera, prediction.colors, points)
    if name == "glb":
        return glb(depth, camera, prediction.texture, points)
    return (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


# Pictures


def color_limits(depth: np.ndarray) -> tuple[float, float]:
    """Between which metres a map's colours lie: all but its nearest and farthest hundredth."""
    near, far = np.maximum(np.percentile(depth[::2, ::2], [1, 99]), 1e-3)
    return float(near), float(max(far, near * 1.01))


def color_index(depth: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Each depth's place in `PALETTE`, uint8, by its logarithm: near things keep most of the colours."""
    near, far = limits
    shade = np.log(depth / near) * (SHADES / math.log(far / near))
    return np.clip(shade, 0, SHADES - 1).astype(np.uint8)


def color_png(depth: np.ndarray) -> bytes:
    """The map in colours over a scale in metres, with a palette; a large map is thinned out."""
    thinned = depth[(slice(None, None, math.ceil(math.sqrt(depth.size / MAX_PICTURE_PIXELS))),) * 2]
    limits = color_limits(thinned)
    scale = draw_scale(max(thinned.shape[1], 240), limits)
    page = Image.new("P", (scale.width, len(thinned) + scale.height), 255)
    page.putpalette(PALETTE.tobytes())
    page.paste(Image.fromarray(color_index(thinned, limits)), ((page.width - thinned.shape[1]) // 2, 0))
    page.paste(scale, (0, len(thinned)))
    file = io.BytesIO()
    page.save(file, "png", compress_level=1)
    return file.getvalue()


def draw_scale(width: int, limits: tuple[float, float]) -> Image.Image:
    """A bar of the colours, `width` px wide, with round metres below it; values are places in `PALETTE`."""
    size = min(max(width // 45, 12), 32)
    font, margin, length = ImageFont.load_default(size=size), 2 * size, width - 4 * size
    near, far = limits
    labels, free = Image.new("L", (width, 3 * size + size // 2), "white"), 0.0
    draw = ImageDraw.Draw(labels)
    for tick in round_metres(near, far):
        x = margin + length * math.log(tick / near) / math.log(far / near)
        label = f"{tick:g} m"
        half = draw.textlength(label, font=font) / 2
        if x - half < free or x + half > width:
            continue
        draw.line([(x, 1.5 * size), (x, 1.8 * size)], fill="black", width=max(1, size // 12))
        draw.text((x, 1.9 * size), label, fill="black", font=font, anchor="ma")
        free = x + half + size / 2
    scale = labels.point(lambda grey: SHADES + grey // 16)
    bar = np.tile(np.linspace(0, SHADES - 1, length).round(), (size, 1)).astype(np.uint8)
    scale.paste(Image.fromarray(bar), (margin, size // 2))
    return scale


def round_metres(near: float, far: float) -> list[float]:
    """Distances for a scale's ticks; the limits themselves, to three digits, where no round ones lie between them."""
    for steps in (COARSE, FINE):
        ticks = [step * 10.0**power for power in range(-3, 5) for step in steps]
        ticks = [tick for tick in ticks if near <= tick <= far]
        if len(ticks) > 3:
            return ticks
    return ticks if len(ticks) > 1 else [float(f"{near:.3g}"), float(f"{far:.3g}")]


# Clouds


def cloud_step(height: int, width: int, points: int) -> int:
    """Every how many rows and columns a cloud of at most `points` takes a pixel."""
    step = max(1, math.isqrt(height * width // points))
    while math.ceil(height / step) * math.ceil(width / step) > points and step < max(height, width):
        step += 1
    return step


def unproject(depth: np.ndarray, camera: dict, step: int) -> np.ndarray:
    """Every `step`-th row and column as points `(rows, columns, 3)`, float32: x right, y down, z forward, metres."""
    z = depth[::step, ::step]
    x = (np.arange(0, depth.shape[1], step) - camera["cx"]) / camera["fx"]
    y = (np.arange(0, depth.shape[0], step) - camera["cy"]) / camera["fy"]
    return np.stack([x * z, y[:, None] * z, z], axis=-1).astype(np.float32)


def on_surface(depth: np.ndarray, camera: dict, step: int) -> np.ndarray:
    """Which of every `step`-th row and column lie on a surface, not on a depth edge between two (`MAX_SLOPE`)."""
    rows, columns = (np.arange(0, side, step) for side in depth.shape)
    above, below = np.maximum(rows - 1, 0), np.minimum(rows + 1, depth.shape[0] - 1)
    left, right = np.maximum(columns - 1, 0), np.minimum(columns + 1, depth.shape[1] - 1)
    thin = depth[rows]
    # metres of depth per metre across, times z: a pixel is z / f wide
    across = (thin[:, right] - thin[:, left]) / np.maximum(right - left, 1) * camera["fx"]
    down = (depth[below] - depth[above])[:, columns] / np.maximum(below - above, 1)[:, None] * camera["fy"]
    return np.hypot(across, down) <= MAX_SLOPE * thin[:, columns]


def ply(depth: np.ndarray, camera: dict, colors: np.ndarray, points: int) -> bytes:
    """
    Coloured point cloud, binary PLY: x right, y down, z forward, in metres; without the points of depth edges.

    colors: uint8 RGB of every `cloud_step`-th row and column.
    """
    step = cloud_step(*depth.shape, points)
    kept = on_surface(depth, camera, step)
    vertices = np.empty((*kept.shape, 15), np.uint8)
    vertices[..., :12] = unproject(depth, camera, step).astype("<f4").view(np.uint8)
    vertices[..., 12:] = colors
    vertices = vertices.view("V15")[..., 0][kept]
    header = ["ply", "format binary_little_endian 1.0", "comment x right, y down, z forward, metres"]
    header += [f"element vertex {len(vertices)}", *(f"property float {axis}" for axis in "xyz")]
    header += [*(f"property uchar {channel}" for channel in ("red", "green", "blue")), "end_header\n"]
    return "\n".join(header).encode("ascii") + vertices.tobytes()


def jpeg_texture(photo: Image.Image) -> bytes:
    """The photo for `glb`, reduced to what graphics cards take."""
    if max(photo.size) > MAX_TEXTURE_SIDE:
        photo = photo.copy()
        photo.thumbnail((MAX_TEXTURE_SIDE, MAX_TEXTURE_SIDE))
    file = io.BytesIO()
    photo.save(file, "jpeg", quality=90)
    return file.getvalue()


def glb(depth: np.ndarray, camera: dict, texture: bytes, points: int, farthest: float = math.inf) -> bytes:
    """
    Binary glTF 2.0: the surface with the photo, a JPEG, laid over it; x right, y up, the camera looks along -z; metres.

    Cells between two objects are left open (`MAX_SLOPE`), as are those beyond `farthest` metres.
    """
    height, width = depth.shape
    step = cloud_step(height, width, points)
    vertices = unproject(depth, camera, step) * np.array([1, -1, -1], np.float32)
    z = depth[::step, ::step]
    rows, columns = z.shape
    across = np.abs(np.diff(z, axis=1)) * (camera["fx"] / step)
    down = np.abs(np.diff(z, axis=0)) * (camera["fy"] / step)
    steepest = np.maximum(np.maximum(across[:-1], across[1:]), np.maximum(down[:, :-1], down[:, 1:]))
    corners = z[:-1, :-1], z[:-1, 1:], z[1:, :-1], z[1:, 1:]
    kept = (steepest <= MAX_SLOPE * np.minimum.reduce(corners)) & (np.maximum.reduce(corners) <= farthest)
    first = np.arange(rows * columns, dtype="<u4").reshape(rows, columns)[:-1, :-1][kept][:, None]
    faces = (first + np.array([0, columns, 1, 1, columns, columns + 1], "<u4")).reshape(-1, 3)
    uv = np.empty((rows, columns, 2), "<f4")
    uv[..., 0] = (np.arange(0, width, step) + 0.5) / width
    uv[..., 1] = ((np.arange(0, height, step) + 0.5) / height)[:, None]
    buffers = [vertices.reshape(-1, 3).astype("<f4").tobytes(), uv.tobytes(), faces.tobytes(), texture]
    views, start = [], 0
    for number, buffer in enumerate(buffers):
        views.append({"buffer": 0, "byteOffset": start, "byteLength": len(buffer)})
        buffers[number] = buffer + b"\0" * (-len(buffer) % 4)
        start += len(buffers[number])
    views[2]["target"] = 34963  # ELEMENT_ARRAY_BUFFER
    flat = vertices.reshape(-1, 3)
    bounds = {"min": flat.min(axis=0).tolist(), "max": flat.max(axis=0).tolist()}
    count = rows * columns
    material = {
        "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0},
        "extensions": {"KHR_materials_unlit": {}},
        "doubleSided": True,
    }
    primitive = {"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "material": 0}
    primitive |= {"indices": 2} if len(faces) else {"mode": 0}  # POINTS, where no cell lies on one surface
    document = {
        "asset": {"version": "2.0", "generator": "DepthVLM"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [material],
        "textures": [{"source": 0, "sampler": 0}],
        "samplers": [{"wrapS": 33071, "wrapT": 33071}],  # CLAMP_TO_EDGE
        "images": [{"bufferView": 3, "mimeType": "image/jpeg"}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": count, "type": "VEC3"} | bounds,
            {"bufferView": 1, "componentType": 5126, "count": count, "type": "VEC2"},
            *([{"bufferView": 2, "componentType": 5125, "count": faces.size, "type": "SCALAR"}] if len(faces) else []),
        ],
        "bufferViews": views,
        "buffers": [{"byteLength": start}],
    }
    content = json.dumps(document).encode()
    content += b" " * (-len(content) % 4)
    body = b"".join(buffers)
    parts = struct.pack("<II", len(content), 0x4E4F534A), content, struct.pack("<II", len(body), 0x004E4942), body
    return struct.pack("<4sII", b"glTF", 2, 12 + sum(map(len, parts))) + b"".join(parts)
