"""What the page says and sends of a result: its camera in words, the viewer's map, download links, a table."""

import base64
import csv
import html
import io
import json
import math
import zipfile
import zlib

import gradio as gr
import numpy as np

from depthvlm.handler import describe_camera
from depthvlm.photos_depthvlm import FIELD_OF_VIEW, FULL_FRAME_DIAGONAL, focal_of_35mm, focal_of_view, view_of_focal
from depthvlm.predictions import outputs

from .engine import Engine, Result

UNITS = ["px", "mm (35 mm equivalent)", "degrees (field of view)"]


def to_pixels(value, unit: str, size: tuple[int, int]) -> float:
    """A stated focal length in px of a photo of `size`."""
    if value is None or not value > 0:
        raise gr.Error("Write a focal length above 0 first.")
    if unit == UNITS[1]:
        return focal_of_35mm(value, size)
    if unit == UNITS[2]:
        narrowest, widest = FIELD_OF_VIEW
        if not narrowest < value < widest:
            raise gr.Error(
                f"A field of view of {value:g} degrees cannot be; write one between {narrowest:g} and {widest:g}."
            )
        return focal_of_view(value, max(size))
    return value


def source_text(camera: dict) -> str:
    """Where a focal length came from, in plain words."""
    source = camera["focal_length_source"]
    known = {
        "exif": "from the photo's EXIF data.",
        "assumed": "**assumed** (60 degrees of view). Metres are as far off as it is: correct it under *Camera*.",
        "given": "as given.",
        "given, rescaled": "as given; metres were rescaled, without a new run.",
    }
    return known.get(source, f"{source}.")


def camera_text(camera: dict) -> str:
    focal, size = camera["fx"], (camera["width"], camera["height"])
    equivalent = focal / math.hypot(*size) * FULL_FRAME_DIAGONAL
    view = view_of_focal(focal, max(size))
    text = f"{focal:.1f} px at {size[0]}x{size[1]}, {equivalent:.1f} mm (35 mm equivalent), {view:.1f} degrees"
    return f"{text}: {source_text(camera)}"


def resized(camera: dict, size: tuple[int, int]) -> dict:
    """The camera of the same photo at another size."""
    across, down = size[0] / camera["width"], size[1] / camera["height"]
    changed = {"width": size[0], "height": size[1], "fx": camera["fx"] * across, "fy": camera["fy"] * down}
    changed |= {"cx": (camera["cx"] + 0.5) * across - 0.5, "cy": (camera["cy"] + 0.5) * down - 0.5}
    return camera | changed


def payload(engine: Engine, result: Result) -> str:
    """What viewer.js draws: the map at the view's size, as uint16 of the logarithm, steps of 0.02 % at most."""
    depth = engine.depth(result, result.view.size[::-1])
    near, far = float(depth.min()), float(depth.max())
    step = max(math.log(far / near), 1e-6) / 65535
    stored = np.rint(np.log(depth / near) / step).astype("<u2")
    limits = outputs.color_limits(depth)
    camera = resized(describe_camera(result.camera), result.view.size)
    file = io.BytesIO()
    result.view.save(file, "jpeg", quality=90)
    return json.dumps(
        {name: camera[name] for name in ("width", "height", "fx", "fy", "cx", "cy")}
        | {
            "key": result.key,
            "a": math.log(near),
            "b": step,
            "depth": base64.b64encode(zlib.compress(stored.tobytes(), 1)).decode("ascii"),
            "photo": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}",
            "near": limits[0],
            "far": limits[1],
            "ticks": outputs.round_metres(*limits),
            "palette": outputs.PALETTE[: outputs.SHADES].tolist(),
        }
    )


def links(addresses: dict[str, str]) -> str:
    items = "".join(
        f'<li><a href="{address}" download>{html.escape(name)}</a></li>' for name, address in addresses.items()
    )
    return f'<ul class="downloads" aria-label="Downloads">{items}</ul>' if items else ""


def table_of(rows: list[list]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["photo", "size", "focal_length", "source", "min", "median", "max", "answer"], *rows])
    return file.getvalue().encode()


def zipped(content: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()
