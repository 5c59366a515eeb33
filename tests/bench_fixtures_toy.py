"""A toy source over a tiny raw folder, and a writer of a tiny iBims-1, for the tests of the shared machinery."""

import io
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from bench.build import load_row, read_row
from bench.sources._base import BadFrame, Frame, Sample, Source

SIZE, DEPTH_SIZE = (40, 24), (20, 12)  # (W, H) of image and depth map
INTRINSICS = (30.0, 31.0, 19.5, 11.5)


def plane(number: int) -> np.ndarray:
    """Depth of frame `number` in metres (h, w): slanted, from below the toy's range to above it."""
    v, u = np.mgrid[: DEPTH_SIZE[1], : DEPTH_SIZE[0]]
    return (0.25 + 0.5 * u + 0.0625 * v + 0.001 * number).astype(np.float32)


def picture(number: int) -> np.ndarray:
    v, u = np.mgrid[: SIZE[1], : SIZE[0]]
    return np.stack([5 * u, 9 * v, (u + v + number) % 256], -1).astype(np.uint8)


def encoded(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def reason(source: Source, frame: Frame) -> str:
    """Why a build lists the frame as one that cannot be used."""
    row, why, _ = read_row(lambda frame, _: load_row(source, "test", frame), frame, 0)
    assert row is None
    return why


def write_toy(raw: Path, groups: dict[str, int], split: str = "test", backwards: bool = False) -> Path:
    """{raw}/{split}/{scene}/{camera}/{n}.jpg and .npy; groups: "scene/camera" -> number of frames."""
    files = [(group, n) for group, count in groups.items() for n in range(count)]
    for group, n in reversed(files) if backwards else files:
        folder = raw / split / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n:03d}.jpg").write_bytes(encoded(picture(n), "JPEG"))
        np.save(folder / f"{n:03d}.npy", plane(n))
    return raw


class Toy(Source):
    name = "toy"
    title = "Toy set"
    page = "https://example.org"
    licence = "none"
    citation = "Nobody: Toy, 2020"
    layout = "SPLIT/SCENE/CAMERA/NNN.jpg and .npy"
    needs = (("*/*/*/*.jpg", "images"), ("*/*/*/*.npy", "depth maps"))
    splits = {"train": ("train",), "test": ("test",)}
    depth_range = (0.5, 9.0)
    depth_scale = 1000.0

    def frames(self, split):
        (own,) = self.official_splits(split)
        for scene in self.listdir(own):
            for camera in self.listdir(own, scene):
                for file in self.listdir(own, scene, camera):
                    if file.endswith(".jpg"):
                        path = f"{own}/{scene}/{camera}/{file[:-4]}"
                        yield Frame(path.removeprefix(f"{own}/"), scene, camera, path)

    def load(self, frame):
        image, _ = self.read_image(f"{frame.data}.jpg")
        try:
            depth = np.load(self.path(f"{frame.data}.npy"), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise BadFrame(f"{frame.data}.npy is not an array ({error})") from error
        return Sample(image, depth, INTRINSICS, [("count", "How many?", str(len(frame.id)))])


class SlowToy(Toy):
    """Slow enough that a test can interrupt it."""

    def load(self, frame):
        time.sleep(0.03)
        return super().load(frame)


class DyingToy(Toy):
    """Its process is killed, as by lack of memory."""

    def load(self, frame):
        os._exit(9)


class HidingToy(Toy):
    """Takes the switch that lidar sources take."""

    def __init__(self, raw, remove_hidden=True):
        super().__init__(raw)
        self.remove_hidden = remove_hidden

    def load(self, frame):
        sample = super().load(frame)
        sample.depth[0, :5] = 0 if self.remove_hidden else 3.0
        return sample


def write_ibims1(raw: Path, names=("room_01", "room_02")) -> Path:
    """A tiny iBims-1 in its real layout; depth words 13107 = 10 m but for a masked corner."""
    words = np.full((12, 16), 13107, np.uint16)
    mask = np.ones((12, 16), bool)
    mask[0, 0] = False
    for name in names:
        for folder, image in (
            ("rgb", picture(0)[:12, :16]),
            ("depth", words),
            ("mask_invalid", mask),
            ("mask_transp", np.ones_like(mask)),
        ):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            (raw / folder / f"{name}.png").write_bytes(encoded(image, "PNG"))
        (raw / "calib").mkdir(exist_ok=True)
        (raw / "calib" / f"{name}.txt").write_text("14.0,14.1,7.5,5.5\n")
    return raw
