"""Video files by PyAV, an optional package: frames of one, and a depth video of many maps."""

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from .files import open_whole
from .outputs import PALETTE, color_index, color_limits, draw_scale

SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp"}


def import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ValueError("videos are read by a package that is missing: pip install av") from error
    return av


def read_frames(path: str | Path, fps: float, max_megapixels: float = math.inf) -> Iterator[tuple[float, Image.Image]]:
    """
    (seconds from the start, upright RGB frame) of a video, `fps` per second: each the first at or after its time.

    Raises `ValueError` for a file that is no video, has larger frames, or where it breaks off, after the frames before.
    """
    av = import_av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no pictures")
            stream = container.streams.video[0]
            if (megapixels := stream.width * stream.height / 1e6) > max_megapixels:
                raise ValueError(f"its frames have {megapixels:.0f} megapixels, more than {max_megapixels:g}")
            stream.thread_type = "AUTO"
            start, number = None, 0
            for frame in container.decode(stream):
                start = frame.time if start is None else start
                seconds = frame.time - start
                if seconds * fps < number - 1e-6:
                    continue
                number = int(seconds * fps + 1e-6) + 1
                # the angle is counterclockwise, as PIL's
                yield seconds, frame.to_image().rotate(frame.rotation, expand=True)
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read as a video: {reason}") from error


def write_depth_video(path: Path, maps: list[Path], fps: float, overwrite: bool) -> None:
    """An MP4 of 16-bit depth PNGs in colours, all on one scale, which stands below them."""
    av = import_av()
    limits = [color_limits(read_map(file)) for file in maps]
    limits = min(near for near, _ in limits), max(far for _, far in limits)
    with open_whole(path, overwrite=overwrite) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        for index, source in enumerate(maps):
            picture = color_index(read_map(source), limits)
            if index == 0:
                scale = np.asarray(draw_scale(picture.shape[1], limits))
                stream.height, stream.width = (side // 2 * 2 for side in (len(picture) + len(scale), picture.shape[1]))
            page = PALETTE[np.concatenate([picture, scale])[: stream.height, : stream.width]]
            for packet in stream.encode(av.VideoFrame.from_ndarray(page, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def read_map(path: Path) -> np.ndarray:
    return np.maximum(np.asarray(Image.open(path)), 1).astype(np.float32) / 1000
