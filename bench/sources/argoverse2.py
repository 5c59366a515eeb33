"""Argoverse 2 sensor data: seven ring cameras and lidar sweeps, at their own times, in the moving ego frame.

A pixel's depth: sweep points, in the ego frame at the sweep's time -> city -> ego at the image's time -> camera.
Images are published undistorted, so k1, k2, k3 are not used. Pixel centres at whole numbers are assumed, as the
devkit's users round; the set does not say.
"""

from bisect import bisect
from collections.abc import Iterator

import numpy as np
import pyarrow.dataset as arrow_dataset

from ..geometry import apply
from ._base import AbsentSplit, BadFrame, Frame, Sample
from ._lidar import LidarSource, pose

CAMERAS = (
    "ring_front_center",
    "ring_front_left",
    "ring_front_right",
    "ring_rear_left",
    "ring_rear_right",
    "ring_side_left",
    "ring_side_right",
)
POSE = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")
INTRINSICS = ("fx_px", "fy_px", "cx_px", "cy_px", "width_px", "height_px")
# Sweeps come at 10 Hz, so one is never further than 50 ms from an image, but for the first and last of a log.
MAX_GAP_NS = 51_000_000


class Argoverse2(LidarSource):
    name = "argoverse2"
    title = "Argoverse 2 Sensor Dataset"
    page = "https://www.argoverse.org/av2.html"
    licence = "CC BY-NC-SA 4.0"
    citation = (
        "Wilson et al., Argoverse 2: Next Generation Datasets for Self-Driving Perception and Forecasting, "
        "NeurIPS Datasets and Benchmarks, 2021"
    )
    layout = """\
{train,test}/{log}/
    sensors/cameras/{ring camera}/{timestamp_ns}.jpg
    sensors/lidar/{timestamp_ns}.feather
    calibration/{intrinsics,egovehicle_SE3_sensor}.feather
    city_SE3_egovehicle.feather"""
    needs = (
        ("*/*/sensors/cameras/ring_front_center/*.jpg", "images of a log of train or test"),
        ("*/*/sensors/lidar/*.feather", "lidar sweeps of a log"),
        ("*/*/calibration/intrinsics.feather", "camera intrinsics of a log"),
        ("*/*/calibration/egovehicle_SE3_sensor.feather", "camera poses in the ego frame of a log"),
        ("*/*/city_SE3_egovehicle.feather", "ego poses of a log"),
    )
    splits = {"train": ("train",), "test": ("test",)}
    depth_range = (0.05, 120.0)
    # Two lidars with beams 1/3 degree apart about the horizon, and further apart below it, where near objects are.
    window = 0.7

    def frames(self, split: str) -> Iterator[Frame]:
        for official_split in self.official_splits(split):
            if not self.path(official_split).is_dir():
                raise AbsentSplit(f"no folder {official_split!r} in {self.raw}; download its logs into it")
            for log in self.listdir(official_split):
                if self.path(official_split, log).is_dir():
                    yield from self.frames_of_log(f"{official_split}/{log}", log)

    def frames_of_log(self, folder: str, log: str) -> Iterator[Frame]:
        sweeps = self.timestamps(f"{folder}/sensors/lidar", ".feather")
        for camera in CAMERAS:
            images = self.timestamps(f"{folder}/sensors/cameras/{camera}", ".jpg")
            if not images:
                problem = f"no image in {folder}/sensors/cameras/{camera}"
                yield Frame(f"{log}/{camera}/none", log, camera, problem=problem)
            for timestamp in images:
                data = folder, timestamp, nearest(sweeps, timestamp)
                yield Frame(f"{log}/{camera}/{timestamp}", log, camera, data)

    def timestamps(self, folder: str, suffix: str) -> list[int]:
        """Sorted timestamps in ns that name the files of a folder; empty when there is no such folder."""
        names = self.listdir(folder) if self.path(folder).is_dir() else []
        return sorted(int(name.removesuffix(suffix)) for name in names if name.endswith(suffix))

    def load(self, frame: Frame) -> Sample:
        folder, timestamp, sweep = frame.data
        name = f"{folder}/sensors/cameras/{frame.camera}/{timestamp}.jpg"
        if sweep is None or abs(sweep - timestamp) > MAX_GAP_NS:
            raise BadFrame(f"{name} has no lidar sweep within {MAX_GAP_NS // 1_000_000} ms; the nearest is {sweep}")
        calibration = f"{folder}/calibration/intrinsics.feather"
        *intrinsics, width, height = self.row(calibration, "sensor_name", frame.camera, INTRINSICS)
        image, size = self.read_image(name, size=(width, height))
        camera = self.pose(f"{folder}/calibration/egovehicle_SE3_sensor.feather", "sensor_name", frame.camera)
        ego_camera, ego_lidar = (
            self.pose(f"{folder}/city_SE3_egovehicle.feather", "timestamp_ns", t) for t in (timestamp, sweep)
        )
        points = self.points(f"{folder}/sensors/lidar/{sweep}.feather")
        in_camera = apply(np.linalg.inv(ego_camera @ camera) @ ego_lidar, points)
        return Sample(image, self.depth_from_points(in_camera, intrinsics, size), tuple(intrinsics))

    def points(self, path: str) -> np.ndarray:
        """A sweep's points (N, 3) float64 in metres in the ego frame at the sweep's time; half-floats in the file."""
        table = self.dataset(path).to_table(["x", "y", "z"], use_threads=False)
        return np.stack([column.to_numpy().astype(np.float64) for column in table.columns], axis=1)

    def pose(self, path: str, key: str, value: str | int) -> np.ndarray:
        numbers = self.row(path, key, value, POSE)
        return pose(numbers[:4], numbers[4:], f"{value} in {path}")

    def row(self, path: str, key: str, value: str | int, columns: tuple[str, ...]) -> list[float]:
        """Numbers in the row that has exactly this value: timestamps 1-5 ns apart are different poses."""
        condition = arrow_dataset.field(key) == value
        rows = self.dataset(path).to_table(list(columns), filter=condition, use_threads=False).to_pylist()
        if not rows:
            raise BadFrame(f"{path} has no row with {key} {value}; the log is not complete")
        return [rows[0][column] for column in columns]

    def dataset(self, path: str) -> arrow_dataset.Dataset:
        return arrow_dataset.dataset(self.path(path), format="feather")


def nearest(times: list[int], time: int) -> int | None:
    """The one of sorted `times` that is closest to `time`, the earlier one in a tie."""
    i = bisect(times, time)
    return min(times[max(i - 1, 0) : i + 1], key=lambda t: abs(t - time), default=None)


SOURCE = Argoverse2
