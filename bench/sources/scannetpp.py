"""ScanNet++, iPhone stream: 1920x1440 video frames with 256x192 lidar depth.

Facts: scannetpp/scannetpp, README and iphone toolkit. RGB must be extracted from rgb.mkv first, with the toolkit;
depth is read from the extracted PNGs or, where there are none, from depth.bin.
"""

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ._base import BadFrame, BadRaw, Frame, Sample, Source, import_package, pinhole

FRAME_STEP = 60  # every 60th frame of the 60 fps video, as the official lists take them
IMAGE_SIZE = (1920, 1440)  # W, H that the intrinsics in pose_intrinsic_imu.json are of
BIN_SHAPE = (192, 256)  # rows, columns of depth.bin, which does not say; a PNG has its size
METRES_BYTES = 4 * BIN_SHAPE[0] * BIN_SHAPE[1]  # one frame as float32 metres
MILLIMETRES_BYTES = 2 * BIN_SHAPE[0] * BIN_SHAPE[1]  # one frame as uint16 millimetres
RGB_NAME = re.compile(r"frame_(\d{6})\.jpg", re.ASCII)


class ScanNetPP(Source):
    name = "scannetpp"
    title = "ScanNet++ (iPhone stream)"
    page = "https://kaldir.vc.in.tum.de/scannetpp/"
    licence = "ScanNet++ Terms of Use (application), non-commercial"
    citation = "Yeshwanth et al., ScanNet++: A High-Fidelity Dataset of 3D Indoor Scenes, ICCV 2023"
    layout = (
        "splits/nvs_sem_{train,val}.txt, and in data/SCENE/iphone: rgb/frame_NNNNNN.jpg (extracted by the official "
        "toolkit, iphone/prepare_iphone_data.py; the videos rgb.mkv and rgb.mp4 themselves are not read), "
        "pose_intrinsic_imu.json, and depth/frame_NNNNNN.png or depth.bin (needs the package lz4)"
    )
    needs = (
        ("splits/nvs_sem_train.txt", "the list of training scenes"),
        ("splits/nvs_sem_val.txt", "the list of test scenes"),
        ("data/*/iphone/rgb/frame_*.jpg", "images, extracted from the video by the official toolkit"),
        ("data/*/iphone/pose_intrinsic_imu.json", "cameras"),
        ("data/*/iphone/depth*", "depth, as depth.bin or extracted to depth/"),
    )
    splits = {"train": ("nvs_sem_train",), "test": ("nvs_sem_val",)}
    depth_range = (0.001, 10.0)
    depth_scale = 1000.0

    def __init__(self, raw: str | Path):
        super().__init__(raw)
        self._depth_bin: tuple[str, DepthBin] | None = None  # of the last scene read

    def frames(self, split: str) -> Iterator[Frame]:
        for official_split in self.official_splits(split):
            name = f"splits/{official_split}.txt"
            try:
                scenes = sorted(set(self.read_text(name).split()))
            except OSError as error:
                raise BadRaw(f"{name} cannot be read ({error}); it comes with every ScanNet++ download") from error
            for scene in scenes:
                yield from self._scene_frames(scene)

    def _scene_frames(self, scene: str) -> Iterator[Frame]:
        """Every 60th image of a scene."""
        folder = f"data/{scene}/iphone"
        try:
            numbers = [int(match[1]) for name in self.listdir(folder, "rgb") if (match := RGB_NAME.fullmatch(name))]
            problem = f"{folder}/rgb holds no frame_NNNNNN.jpg with a multiple of {FRAME_STEP}"
        except (OSError, BadFrame) as error:
            numbers, problem = [], f"{folder}/rgb cannot be listed ({error})"
        numbers = [number for number in numbers if number % FRAME_STEP == 0]
        if not numbers:
            yield Frame(scene, scene, problem=f"{problem}; extract the video's frames with the official toolkit")
            return
        cameras, problem = {}, ""
        try:
            cameras = json.loads(self.read_text(folder, "pose_intrinsic_imu.json"))
        except (OSError, ValueError) as error:
            problem = f"{folder}/pose_intrinsic_imu.json cannot be read ({error})"
        for number in numbers:
            key = f"frame_{number:06d}"
            matrix = cameras.get(key, {}).get("intrinsic")  # by name, so that a missing entry moves no other
            yield Frame(f"{scene}/{key}", scene, data=(number, matrix), problem=problem)

    def load(self, frame: Frame) -> Sample:
        number, matrix = frame.data
        folder, key = f"data/{frame.scene}/iphone", f"frame_{number:06d}"
        intrinsics = pinhole(matrix, f"{folder}/pose_intrinsic_imu.json: 'intrinsic' of {key}")
        image, _ = self.read_image(folder, "rgb", f"{key}.jpg", size=IMAGE_SIZE)
        png, binary = self.path(folder, "depth", f"{key}.png"), self.path(folder, "depth.bin")
        if binary.is_file() and not png.is_file():
            if self._depth_bin is None or self._depth_bin[0] != frame.scene:
                self._depth_bin = frame.scene, DepthBin(binary)
            return Sample(image, self._depth_bin[1].read(number), intrinsics)
        stored = self.read_depth16(folder, "depth", f"{key}.png")
        return Sample(image, stored / np.float32(self.depth_scale), intrinsics)


class DepthBin:
    """The frames of a depth.bin, in either of its encodings:

    (a) one raw-deflate stream of float32 metres, frame after frame: reading forwards is cheap, going back starts anew;
    (b) a block per frame, [uint32 little-endian size][data], data as `unpack` takes it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.blocks = find_blocks(path)  # none: encoding (a)
        self.stream: Iterator[bytes] | None = None
        self.next = 0  # number of the frame that `stream` gives next

    def __reduce__(self):  # an open stream cannot be pickled, and another process begins its own
        return DepthBin, (self.path,)

    def read(self, number: int) -> np.ndarray:
        """Frame `number`: (192, 256) float32 metres, 0 = none. Raises BadFrame."""
        if not self.blocks:
            return metres(self._from_stream(number))
        if number >= len(self.blocks):
            raise BadFrame(f"{self.path} holds {len(self.blocks)} frames, none of number {number}")
        offset, size = self.blocks[number]
        with self.path.open("rb") as file:
            file.seek(offset)
            return unpack(file.read(size), f"{self.path}, frame {number}")

    def _from_stream(self, number: int) -> bytes:
        if self.stream is None or number < self.next:
            self.stream, self.next = read_stream(self.path), 0
        try:
            for data in self.stream:
                self.next += 1
                if self.next > number:
                    return data
        except zlib.error as error:
            why = f"is not made of whole blocks and, as one stream, ends at frame {self.next} ({error})"
            raise BadFrame(f"{self.path} {why}; download it again") from error
        raise BadFrame(f"{self.path} holds {self.next} readable frames, none of number {number}")


def find_blocks(path: Path) -> list[tuple[int, int]]:
    """(offset, size) of every block of encoding (b); empty if the sizes do not lead exactly to the end of the file."""
    blocks, offset, end = [], 0, path.stat().st_size
    with path.open("rb", buffering=0) as file:
        while offset < end:
            file.seek(offset)
            size = int.from_bytes(file.read(4), "little")
            # a block that cannot be compressed is hardly larger than its frame
            if size > 2 * METRES_BYTES or offset + 4 + size > end:
                return []
            blocks.append((offset + 4, size))
            offset += 4 + size
    return blocks


def read_stream(path: Path) -> Iterator[bytes]:
    """Frames of encoding (a), unpacked one at a time; zlib.error if it is another format or is cut off."""
    inflate, frame = zlib.decompressobj(-zlib.MAX_WBITS), b""
    with path.open("rb") as file:
        while not inflate.eof:
            data = inflate.unconsumed_tail or file.read(1 << 16)
            more = inflate.decompress(data, METRES_BYTES - len(frame))
            if not data and not more and not inflate.eof:
                raise zlib.error("unexpected end of the file")
            frame += more
            if len(frame) == METRES_BYTES:
                yield frame
                frame = b""
    if frame:
        raise zlib.error(f"{len(frame)} bytes are left over")


def unpack(block: bytes, where: str) -> np.ndarray:
    """A block of encoding (b): raw-deflate of float32 metres or LZ4 (no frame header) of uint16 millimetres -> metres.

    Raises BadFrame, or ImportError where lz4 is needed and missing.
    """
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflate.decompress(block, METRES_BYTES + 1)  # one more, to notice what is too long
        if inflate.eof and len(data) == METRES_BYTES:
            return metres(data)
    except zlib.error:
        pass  # then it is LZ4
    lz4_block = import_package("lz4.block", "lz4")
    try:
        data = lz4_block.decompress(block, uncompressed_size=MILLIMETRES_BYTES)
        return np.frombuffer(data, "<u2").reshape(BIN_SHAPE) / np.float32(1000)
    except (lz4_block.LZ4BlockError, ValueError) as error:
        raise BadFrame(f"{where} is neither raw-deflate nor LZ4 of a 256x192 frame ({error})") from error


def metres(data: bytes) -> np.ndarray:
    """A frame of float32 metres as it is, with 0 for what is not a positive number."""
    depth = np.frombuffer(data, "<f4").reshape(BIN_SHAPE)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


SOURCE = ScanNetPP
