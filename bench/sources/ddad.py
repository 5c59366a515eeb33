"""DDAD (Dense Depth for Automated Driving): six cameras and the merged lidar cloud, each with its own world pose.

The files are protobuf JSON: fields at their default may be absent, 64-bit integers may be strings.
Pixel centres at whole numbers are assumed, as the set's devkit (TRI-ML/dgp) does when it rescales intrinsics; its
depth maps truncate pixels instead, half a pixel away. Parts of the car itself are seen by lidar and cameras.
"""

import io
import json
import zipfile
from collections.abc import Iterator

import numpy as np

from ..geometry import Intrinsics, apply
from ._base import BadFrame, BadRaw, Frame, Sample
from ._lidar import LidarSource, pose

CAMERAS = ("CAMERA_01", "CAMERA_05", "CAMERA_06", "CAMERA_07", "CAMERA_08", "CAMERA_09")
LIDAR = "LIDAR"


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
        names = self.official_splits(split)
        try:
            scene_splits = json.loads(self.read_text("ddad.json"))["scene_splits"]
            files = sorted(file for name in names for file in scene_splits[name]["filenames"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadRaw(f"ddad.json in {self.raw} lists no scenes of split {names} ({error!r})") from error
        for file in files:
            yield from self.frames_of_scene(file)

    def frames_of_scene(self, file: str) -> Iterator[Frame]:
        scene = file.split("/")[0]
        try:
            content = json.loads(self.read_text(file))
            samples, datums = content["samples"], {datum["key"]: datum for datum in content["data"]}
        except (OSError, ValueError, KeyError) as error:
            problem = f"{file} is missing or not a scene of this set ({error!r})"
            yield Frame(f"{scene}/none", scene, problem=problem)
            return
        for camera in CAMERAS:
            for i, sample in enumerate(samples):
                data, problem = None, ""
                try:
                    data = link(sample, datums, camera)
                except (ValueError, KeyError) as error:
                    problem = f"sample {i} of {file} has no usable {camera} with {LIDAR} ({error!r})"
                yield Frame(f"{scene}/{camera}/{i:06d}", scene, camera, data, problem)

    def load(self, frame: Frame) -> Sample:
        image_name, size, cloud_name, calibration, transform = frame.data
        image, _ = self.read_image(frame.scene, image_name, size=size)
        intrinsics = self.intrinsics(f"{frame.scene}/calibration/{calibration}.json", frame.camera)
        points = read_cloud(self.read_bytes(frame.scene, cloud_name), f"{frame.scene}/{cloud_name}")
        return Sample(image, self.depth_from_points(apply(transform, points), intrinsics, size), intrinsics)

    def intrinsics(self, path: str, camera: str) -> Intrinsics:
        calibration = json.loads(self.read_text(path))
        cameras = dict(zip(map(str.upper, calibration["names"]), calibration["intrinsics"], strict=True))
        if camera not in cameras:
            raise BadFrame(f"{path} has no intrinsics of {camera}")
        fx, fy, cx, cy, skew = (float(cameras[camera].get(key, 0)) for key in ("fx", "fy", "cx", "cy", "skew"))
        if skew:
            raise BadFrame(f"{path} gives {camera} a skew of {skew}; fx, fy, cx, cy cannot express it")
        return fx, fy, cx, cy


def link(sample: dict, datums: dict, camera: str) -> tuple:
    """A camera's image in a sample with its size, the cloud, the calibration and the 4x4 transform cloud -> camera."""
    named = {datums[key]["id"]["name"].upper(): datums[key]["datum"] for key in sample["datum_keys"]}
    image, cloud = named[camera]["image"], named[LIDAR]["point_cloud"]
    # Each pose is sensor -> world at the datum's own time, so the chain of the two accounts for the car's motion.
    transform = np.linalg.inv(read_pose(image["pose"], camera)) @ read_pose(cloud["pose"], LIDAR)
    size = int(image["width"]), int(image["height"])
    return image["filename"], size, cloud["filename"], sample["calibration_key"], transform


def read_pose(message: dict, name: str) -> np.ndarray:
    """4x4 transform of a protobuf-JSON pose, where components equal to 0 and an identity rotation may be absent."""
    rotation, translation = message.get("rotation", {}), message.get("translation", {})
    quaternion = [rotation.get(key, 0) for key in ("qw", "qx", "qy", "qz")]
    return pose(quaternion if any(quaternion) else (1, 0, 0, 0), [translation.get(key, 0) for key in "xyz"], name)


def read_cloud(content: bytes, name: str) -> np.ndarray:
    """Points (N, 3) float64 in metres of an .npz with `data` (N, 4): x, y, z, intensity. Raises BadFrame."""
    try:
        return np.load(io.BytesIO(content))["data"][:, :3].astype(np.float64)
    except (LookupError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadFrame(f"{name} is not a readable .npz of points ({error!r})") from error


SOURCE = DDAD
