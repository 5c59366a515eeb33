"""DDAD (Dense Depth for Automated Driving): six cameras and the merged lidar cloud, each with its own world pose.

The files are protobuf JSON: fields at their default may be absent, 64-bit integers may be strings.
Pixel centres at whole numbers are assumed, as the set's own devkit (TRI-ML/dgp) does when it rescales intrinsics; its
depth maps truncate pixels instead, half a pixel away. Parts of the car's own body are seen by lidar and cameras.
"""

import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from ..geometry import apply, invert_rigid
from ._base import BadFrame, BadRaw, Frame, Sample
from ._lidar import LidarSource, pose, require_size

CAMERAS = ("CAMERA_01", "CAMERA_05", "CAMERA_06", "CAMERA_07", "CAMERA_08", "CAMERA_09")
LIDAR = "LIDAR"
# A cloud has some hundred thousand points of four numbers.
MAX_CLOUD_BYTES = 512_000_000


class DDAD(LidarSource):
    name = "ddad"
    title = "DDAD: Dense Depth for Automated Driving"
    page = "https://github.com/TRI-ML/DDAD"
    licence = "CC BY-NC-SA 4.0"
    citation = "Guizilini et al., 3D Packing for Self-Supervised Monocular Depth Estimation, CVPR, 2020"
    layout = """\
(the folder ddad_train_val of the archive)
ddad.json
{000000...000199}/
    scene_{sha1}.json
    calibration/{sha1}.json
    rgb/CAMERA_{01,05,06,07,08,09}/*.png
    point_cloud/LIDAR/*.npz"""
    needs = (
        ("ddad.json", "list of the scenes of each split"),
        ("*/scene_*.json", "samples of a scene"),
        ("*/calibration/*.json", "camera calibration of a scene"),
        ("*/rgb/CAMERA_01/*", "images of a scene"),
        ("*/point_cloud/LIDAR/*.npz", "lidar clouds of a scene"),
    )
    splits = {"train": ("0",), "test": ("1",)}
    depth_range = (0.05, 120.0)

    def frames(self, split: str) -> Iterator[Frame]:
        own_splits = self.own_splits(split)
        try:
            scene_splits = json.loads(self.read_text("ddad.json"))["scene_splits"]
            files = sorted(file for own in own_splits for file in scene_splits[own]["filenames"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadRaw(f"ddad.json in {self.raw} lists no scenes of split {own_splits} ({error!r})") from error
        for file in files:
            if not re.fullmatch(r"[\w-]+/[\w-]+\.json", str(file), re.ASCII):
                raise BadRaw(f"ddad.json names the scene {file!r}, not FOLDER/NAME.json; repair the file")
            yield from self.frames_of_scene(file)

    def frames_of_scene(self, file: str) -> Iterator[Frame]:
        scene = file.split("/")[0]
        try:
            content = json.loads(self.read_text(file))
            samples, datums = content["samples"], {datum["key"]: datum for datum in content["data"]}
        except (OSError, ValueError, TypeError, KeyError) as error:
            problem = f"{file} is missing or not a scene of this set ({error!r})"
            yield Frame(f"{scene}/none", scene, problem=problem)
            return
        for camera in CAMERAS:
            for i, sample in enumerate(samples):
                data, problem = None, ""
                try:
                    data = link(sample, datums, camera)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    problem = f"sample {i} of {file} has no usable {camera} with {LIDAR} ({error!r})"
                yield Frame(f"{scene}/{camera}/{i:06d}", scene, camera, data, problem)

    def load(self, frame: Frame) -> Sample:
        image_name, declared, cloud_name, calibration, transform = frame.data
        image, size = self.read_image(frame.scene, image_name)
        require_size(f"{frame.scene}/{image_name}", size, declared)
        intrinsics = self.intrinsics(f"{frame.scene}/calibration/{calibration}.json", frame.camera)
        points = read_cloud(self.read_bytes(frame.scene, cloud_name), f"{frame.scene}/{cloud_name}")
        return Sample(image, self.depth_from_points(apply(transform, points), intrinsics, size), intrinsics)

    def intrinsics(self, path: str, camera: str) -> tuple[float, float, float, float]:
        text = self.read_text(path)
        try:
            calibration = json.loads(text)
            entry = calibration["intrinsics"][[name.upper() for name in calibration["names"]].index(camera)]
            fx, fy, cx, cy, skew = (float(entry.get(key, 0)) for key in ("fx", "fy", "cx", "cy", "skew"))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise BadFrame(f"{path} has no intrinsics of {camera} ({error!r})") from error
        if skew:
            raise BadFrame(f"{path} gives {camera} a skew of {skew}; fx, fy, cx, cy cannot express it")
        return fx, fy, cx, cy


def link(sample: dict, datums: dict, camera: str) -> tuple:
    """A camera's image in a sample with its size, the cloud, the calibration and the 4x4 transform cloud -> camera."""
    named = {datums[key]["id"]["name"].upper(): datums[key]["datum"] for key in sample["datum_keys"]}
    image, cloud = named[camera]["image"], named[LIDAR]["point_cloud"]
    # Each pose is sensor -> world at the datum's own time, so the chain of the two accounts for the car's motion.
    transform = invert_rigid(read_pose(image["pose"], camera)) @ read_pose(cloud["pose"], LIDAR)
    size = int(image["width"]), int(image["height"])
    return image["filename"], size, cloud["filename"], sample["calibration_key"], transform


def read_pose(message: dict, name: str) -> np.ndarray:
    """4x4 transform of a protobuf-JSON pose, where components equal to 0 and an identity rotation may be absent."""
    rotation, translation = message.get("rotation", {}), message.get("translation", {})
    quaternion = [rotation.get(key, 0) for key in ("qw", "qx", "qy", "qz")]
    return pose(quaternion if any(quaternion) else (1, 0, 0, 0), [translation.get(key, 0) for key in "xyz"], name)


def read_cloud(content: bytes, name: str) -> np.ndarray:
    """Points (N, 3) float64 in metres of an .npz with `data` (N, 4): x, y, z, intensity. Its size is checked first."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entry = archive.getinfo("data.npy")
            if entry.file_size > MAX_CLOUD_BYTES:
                raise BadFrame(f"{name} unpacks to {entry.file_size} bytes; refused as a decompression bomb")
            array = io.BytesIO(archive.read(entry))
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[np.lib.format.read_magic(array)](array)
        size = len(array.getbuffer()) - array.tell()
        if dtype.kind != "f" or len(shape) != 2 or shape[1] != 4 or math.prod(shape) * dtype.itemsize != size:
            raise BadFrame(f"{name} holds {shape} of {dtype} in {size} bytes, not N x 4 floats")
        array.seek(0)
        points = np.lib.format.read_array(array, allow_pickle=False)[:, :3].astype(np.float64)
    except (KeyError, ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise BadFrame(f"{name} is not a readable .npz of points ({error})") from error
    return points[np.isfinite(points).all(axis=1)]


SOURCE = DDAD
