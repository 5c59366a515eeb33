"""nuScenes: keyframes of six cameras with the lidar sweep of the same sample, each in the ego frame of its own time.

A pixel's depth: lidar -> ego at the sweep's time -> global -> ego at the image's time -> camera.
Splits: the names of the official train and val scenes are not in the data, so "train" here is all of v1.0-trainval
(850 scenes, about the 206K images of the paper) and "test" is v1.0-test.
Images are published undistorted. Pixel centres at whole numbers are assumed; the set does not say.
The tables hold millions of rows of which keyframes need few: they are streamed and only those are kept.
"""

from collections.abc import Iterator

import numpy as np

from ..geometry import apply
from ._base import AbsentSplit, BadFrame, BadRaw, Frame, Sample, import_package, pinhole
from ._lidar import LidarSource, pose

CAMERAS = ("CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT", "CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT")
LIDAR = "LIDAR_TOP"
# What is kept of a keyframe's row of sample_data.
KEPT = ("ego_pose_token", "calibrated_sensor_token", "filename", "width", "height")
# x, y, z, intensity, ring index
POINT_FIELDS = 5


class NuScenes(LidarSource):
    name = "nuscenes"
    title = "nuScenes"
    page = "https://www.nuscenes.org/nuscenes"
    licence = "nuScenes terms of use: non-commercial, registration"
    citation = "Caesar et al., nuScenes: A Multimodal Dataset for Autonomous Driving, CVPR, 2020"
    layout = """\
v1.0-trainval/*.json    (train)
v1.0-test/*.json        (test)
samples/CAM_{FRONT,BACK}{,_LEFT,_RIGHT}/*.jpg
samples/LIDAR_TOP/*.pcd.bin"""
    needs = (
        ("v1.0-*/sample_data.json", "tables of trainval or test"),
        ("samples/CAM_FRONT/*.jpg", "keyframe images"),
        ("samples/LIDAR_TOP/*.pcd.bin", "keyframe lidar sweeps"),
    )
    splits = {"train": ("v1.0-trainval",), "test": ("v1.0-test",)}
    depth_range = (0.05, 80.0)
    # 32 beams, about 1.3 degrees apart.
    window = 1.6

    def frames(self, split: str) -> Iterator[Frame]:
        for folder in self.official_splits(split):
            if not self.path(folder).is_dir():
                raise AbsentSplit(f"no folder {folder} in {self.raw}; unpack the archive of its tables there")
            yield from self.frames_of_tables(folder)

    def frames_of_tables(self, folder: str) -> Iterator[Frame]:
        try:
            scenes = sorted((row["name"], row["token"]) for row in self.rows(folder, "scene"))
            samples: dict[str, list] = {token: [] for _, token in scenes}
            for row in self.rows(folder, "sample"):
                samples[row["scene_token"]].append((row["timestamp"], row["token"]))
            channels = {row["token"]: row["channel"] for row in self.rows(folder, "sensor")}
            sensors = {row["token"]: row for row in self.rows(folder, "calibrated_sensor")}
            # The link from a sample to its files is in no table: it is rebuilt from the keyframe rows.
            keyframes = {}
            for row in self.rows(folder, "sample_data"):
                if row["is_key_frame"]:
                    channel = channels[sensors[row["calibrated_sensor_token"]]["sensor_token"]]
                    if channel in CAMERAS or channel == LIDAR:
                        keyframes[row["sample_token"], channel] = tuple(row[key] for key in KEPT)
            used = {ego for ego, *_ in keyframes.values()}
            egos = {
                row["token"]: (row["rotation"], row["translation"])
                for row in self.rows(folder, "ego_pose")
                if row["token"] in used
            }
        except (TypeError, KeyError) as error:
            raise BadRaw(f"a row of the tables in {folder} lacks a field or names a missing row ({error!r})") from error
        for scene, scene_token in scenes:
            for camera in CAMERAS:
                for timestamp, token in sorted(samples[scene_token]):
                    data, problem = None, ""
                    try:
                        data = link(keyframes[token, camera], keyframes[token, LIDAR], sensors, egos)
                    except (ValueError, TypeError, KeyError) as error:
                        problem = f"sample {token} has no usable {camera} with {LIDAR} ({error!r})"
                    yield Frame(f"{scene}/{camera}/{timestamp}", scene, camera, data, problem)

    def rows(self, folder: str, table: str) -> Iterator[dict]:
        """The rows of one table, a JSON list of objects, of which few are in memory at a time."""
        ijson, name = import_package("ijson", "ijson"), f"{folder}/{table}.json"
        try:
            with self.path(name).open("rb") as file:
                yield from ijson.items(file, "item", use_float=True)
        except (OSError, ijson.JSONError) as error:
            raise BadRaw(f"{name} cannot be read in {self.raw} ({error}); unpack the archive of tables") from error

    def load(self, frame: Frame) -> Sample:
        image_name, size, lidar_name, intrinsics, transform = frame.data
        image, _ = self.read_image(image_name, size=size)
        content = self.read_bytes(lidar_name)
        if len(content) % (4 * POINT_FIELDS):
            raise BadFrame(f"{lidar_name} has {len(content)} bytes, not whole points of {POINT_FIELDS} float32")
        points = np.frombuffer(content, "<f4").reshape(-1, POINT_FIELDS)[:, :3]
        return Sample(image, self.depth_from_points(apply(transform, points), intrinsics, size), intrinsics)


def link(camera_row: tuple, lidar_row: tuple, sensors: dict, egos: dict) -> tuple:
    """A camera's image of a keyframe with its size, the sweep, fx, fy, cx, cy and the 4x4 transform lidar -> camera."""
    camera_ego, camera, image_name, width, height = camera_row
    lidar_ego, lidar, lidar_name, _, _ = lidar_row
    camera_to_global, lidar_to_global = (
        pose(*egos[ego], f"ego {ego}")
        @ pose(sensors[sensor]["rotation"], sensors[sensor]["translation"], f"sensor {sensor}")
        for ego, sensor in ((camera_ego, camera), (lidar_ego, lidar))
    )
    transform = np.linalg.inv(camera_to_global) @ lidar_to_global
    intrinsics = pinhole(sensors[camera]["camera_intrinsic"], f"the camera_intrinsic of sensor {camera}")
    return image_name, (width, height), lidar_name, intrinsics, transform


SOURCE = NuScenes
