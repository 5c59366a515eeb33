"""Waymo Open Dataset (perception), from the v2 Parquet tables or the v1 TFRecord files.

Depth comes from the TOP lidar's first return, as in the paper. Only the TOP range image carries a vehicle pose for each
pixel, which takes a point to the world as the lidar turned; the four short-range lidars have none and are not read.

- Pixel: the set's own projection of the point (`lidar_camera_projection`), which knows the rolling shutter. It is a
  whole number that names a pixel, the leftmost being 0. The set keeps two cameras per point: a third one gets nothing.
- Depth: z along the optical axis at the image's own pose (`camera_image.pose`), not the distance to the camera.
- Distortion: the stored images are distorted, and the schema has a pinhole camera. So the image is undistorted onto the
  *same* focal lengths and principal point (bilinear), and written as JPEG again (quality 95, no chroma subsampling).
  Each lidar point moves to its undistorted place before points are rounded to pixels: no point is lost or doubled
  by resampling a sparse map. Pixels from outside the stored image are black and have no depth.

Sources: waymo_open_dataset's dataset.proto, the v2 component definitions and its range image functions (formulas).
The lens (Brown's model with five coefficients) is OpenCV's.
"""

import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..geometry import apply
from . import _tfrecord as tfrecord
from ._base import AbsentSplit, BadFrame, BadRaw, Frame, Sample, import_package, open_image, pixels_of
from ._lidar import LidarSource, splat
from ._tfrecord import fields, fixed, last

CAMERAS = {1: "front", 2: "front_left", 3: "front_right", 4: "side_left", 5: "side_right"}
TOP = 1  # laser name

# Waymo's camera axes are x forward, y left, z up: (z, -x, -y) of OpenCV's.
WAYMO_FROM_OPENCV = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])

TIMESTAMP, CAMERA, LASER = "key.frame_timestamp_micros", "key.camera_name", "key.laser_name"
INTRINSIC = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")


@dataclass(frozen=True)
class Camera:
    """intrinsic: (9,) in the order of INTRINSIC, px counted from the *edge* of the first pixel; size: (W, H)."""

    intrinsic: np.ndarray
    vehicle_from_camera: np.ndarray
    size: tuple[int, int]


# Geometry


def beam_inclinations(values: Sequence[float] | None, low: float, high: float, height: int) -> np.ndarray:
    """Inclination in radians of each row of a range image (height,), row 0 (the highest beam) first.

    `values` is stored lowest first; where it is None or empty the beams are uniform, at half steps from low to high.
    """
    if values is None or len(values) == 0:
        low, high = np.array([low, high], dtype=np.float64)
        values = low + (np.arange(height) + 0.5) / height * (high - low)
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (height,) or not np.isfinite(values).all():
        raise ValueError(
            f"{values.size} beam inclinations do not fit a range image of {height} rows, or are not finite"
        )
    return values[::-1]


def points_in_vehicle(ranges: np.ndarray, inclinations: np.ndarray, vehicle_from_lidar: np.ndarray) -> np.ndarray:
    """Range image (H, W) metres -> points (H, W, 3) in the vehicle frame (x forward, y left, z up)."""
    width = ranges.shape[1]
    # The columns are even in the *vehicle's* azimuth, from +pi to -pi; the sensor's own differs by its yaw.
    yaw = np.arctan2(vehicle_from_lidar[1, 0], vehicle_from_lidar[0, 0])
    azimuth = np.pi * (2 * (width - np.arange(width) - 0.5) / width - 1) - yaw
    inclination = inclinations[:, None]
    direction = np.stack(
        np.broadcast_arrays(
            np.cos(azimuth) * np.cos(inclination), np.sin(azimuth) * np.cos(inclination), np.sin(inclination)
        ),
        axis=-1,
    )
    return apply(vehicle_from_lidar, ranges[..., None] * direction)


def points_in_world(points: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Vehicle points (N, 3), each with its own pose (N, 6) roll, pitch, yaw, x, y, z (vehicle -> world), to world."""
    # SciPy's Rotation.from_euler takes seven times as long for the 160 000 poses of a sweep.
    x, y, z = points.T
    roll, pitch, yaw, *origin = poses.T
    y, z = y * np.cos(roll) - z * np.sin(roll), y * np.sin(roll) + z * np.cos(roll)
    x, z = x * np.cos(pitch) + z * np.sin(pitch), z * np.cos(pitch) - x * np.sin(pitch)
    x, y = x * np.cos(yaw) - y * np.sin(yaw), x * np.sin(yaw) + y * np.cos(yaw)
    return np.stack([x + origin[0], y + origin[1], z + origin[2]], axis=-1)


def opencv_camera(intrinsic: np.ndarray) -> tuple[ModuleType, np.ndarray, np.ndarray]:
    """OpenCV, its camera matrix, which counts from the centre of the first pixel, and its distortion coefficients."""
    f_u, f_v, c_u, c_v, *distortion = intrinsic
    matrix = np.array([[f_u, 0, c_u - 0.5], [0, f_v, c_v - 0.5], [0, 0, 1]])
    return import_package("cv2", "opencv-python-headless"), matrix, np.array(distortion)


def undistort(pixels: np.ndarray, intrinsic: np.ndarray) -> np.ndarray:
    """Pixels (N, 2) of the stored image -> where a pinhole camera of the same f_u, f_v, c_u, c_v sees them (N, 2).

    Both count from the centre of the first pixel. Raises ValueError where the lens cannot be inverted to 0.01 px.
    """
    if not len(pixels):
        return pixels  # OpenCV takes no empty list
    cv2, matrix, distortion = opencv_camera(intrinsic)
    stop = cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 50, 1e-9
    pinhole = cv2.undistortImagePoints(pixels, matrix, distortion, None, stop)[:, 0]
    rays = cv2.convertPointsToHomogeneous((pinhole - matrix[:2, 2]) / np.diag(matrix)[:2])
    distorted, _ = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), matrix, distortion)
    if not (np.abs(distorted[:, 0] - pixels) < 0.01).all():
        raise ValueError(f"the lens distortion {distortion.tolist()} cannot be inverted over this image")
    return pinhole


def undistort_image(image: np.ndarray, intrinsic: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) that a pinhole camera of the same f_u, f_v, c_u, c_v sees; outside the stored image black."""
    cv2, matrix, distortion = opencv_camera(intrinsic)
    return cv2.undistort(image, matrix, distortion)


def sweep(
    ranges: np.ndarray, projection: np.ndarray, poses: np.ndarray, inclination: tuple, vehicle_from_lidar: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One TOP range image -> its points (N, 3) in the world and their projection (N, 6), empty cells (<= 0) left out.

    ranges (H, W, 4), projection (H, W, 6), poses (H, W, 6) as stored; inclination: (values or None, low, high).
    """
    ranges = ranges[..., 0].astype(np.float64)
    filled = ~(ranges <= 0)
    projection, poses = projection[filled].astype(np.float64), poses[filled].astype(np.float64)
    if not all(np.isfinite(a).all() for a in (ranges, projection, poses)):
        raise ValueError("the range image, its projection or its poses hold NaN or infinity")
    points = points_in_vehicle(ranges, beam_inclinations(*inclination, len(ranges)), vehicle_from_lidar)
    return points_in_world(points[filled], poses), projection


def projected_pixels(camera: int, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which points a camera sees (N,) bool, and their whole-number pixels u, v in its stored image (n seen, 2)."""
    first, second = projection[:, 0] == camera, projection[:, 3] == camera
    seen = first | second
    return seen, np.where(first[:, None], projection[:, 1:3], projection[:, 4:6])[seen]


def matrix4(values: Sequence[float] | None, what: str) -> np.ndarray:
    """16 numbers, row-major -> a checked rigid 4x4 transform."""
    values = np.asarray([] if values is None else values, dtype=np.float64)
    if values.shape == (16,) and np.isfinite(values).all():
        transform = values.reshape(4, 4)
        rotation = transform[:3, :3]
        if np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) and np.allclose(transform[3], [0, 0, 0, 1]):
            return transform
    raise ValueError(f"{what} is not a 4x4 rotation and translation: {values.tolist()[:16]}")


def make_camera(intrinsic: Sequence[float], extrinsic: Sequence[float], width: int, height: int) -> Camera:
    return Camera(np.array(intrinsic, np.float64), matrix4(extrinsic, "the camera's extrinsic"), (width, height))


# v2: Parquet tables, one per component


class Rows:
    """Rows of one Parquet table by their key, in bounded memory.

    The files have few and large row groups, so a row is reached by streaming: rows in the file's order cost one pass in
    all, any other row a new start at its row group.
    """

    def __init__(self, path: Path, keys: tuple[str, ...], component: str, *columns: str):
        self.component = component
        self.columns = [f"[{component}Component].{name}" for name in columns]
        self.file = open_parquet(path)
        groups = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.cumsum([0, *groups])
        self.index = {key: row for row, key in enumerate(key_rows(self.file, keys))}
        self.stream, self.next, self.recent = None, 0, []

    def get(self, *key: int) -> list[pa.Scalar]:
        """The row's columns. Raises ValueError for a key that is not there."""
        if key not in self.index:
            raise ValueError(f"{self.component} has no row for {key}; the component's file is incomplete")
        row = self.index[key]
        while not any(start <= row < start + batch.num_rows for start, batch in self.recent):
            group = int(np.searchsorted(self.starts, row, side="right")) - 1
            if self.stream is None or not self.starts[group] <= self.next <= row:
                groups = range(group, self.file.num_row_groups)
                # Five rows at a time, one timestamp's cameras; two batches are kept, as the cameras are in no order.
                self.stream = self.file.iter_batches(5, groups, self.columns, use_threads=False)
                self.next, self.recent = int(self.starts[group]), []
            stream, self.stream = self.stream, None  # dropped where reading fails
            batch = next(stream)
            self.stream = stream
            self.recent = [*self.recent[-1:], (self.next, batch)]
            self.next += batch.num_rows
        start, batch = next((s, b) for s, b in self.recent if s <= row < s + b.num_rows)
        return [batch.column(name)[row - start] for name in self.columns]


def open_parquet(path: Path) -> pq.ParquetFile:
    # Pages as they come: by default a whole row group's column is read into memory at once.
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def key_rows(file: pq.ParquetFile, keys: tuple[str, ...]) -> list[tuple]:
    table = file.read(columns=list(keys))
    return list(zip(*(table.column(key).to_pylist() for key in keys), strict=True))


class Segment:
    """A v2 segment; its frames' keys are their timestamps."""

    def __init__(self, source: LidarSource, folder: str, file: str):
        def rows(component: str, *keys_and_columns) -> Rows:
            return Rows(source.path(folder, component, file), *keys_and_columns)

        first_return = "range_image_return1.values", "range_image_return1.shape"
        by_laser = TIMESTAMP, LASER
        self.images = rows("camera_image", (TIMESTAMP, CAMERA), "CameraImage", "image", "pose.transform")
        self.ranges = rows("lidar", by_laser, "LiDAR", *first_return)
        self.projections = rows("lidar_camera_projection", by_laser, "LiDARCameraProjection", *first_return)
        self.poses = rows("lidar_pose", by_laser, "LiDARPose", *first_return)
        # The calibrations have no timestamp: one row per sensor.
        camera = "extrinsic.transform", "width", "height", *(f"intrinsic.{name}" for name in INTRINSIC)
        self.cameras = rows("camera_calibration", (CAMERA,), "CameraCalibration", *camera)
        laser = "extrinsic.transform", "beam_inclination.values", "beam_inclination.min", "beam_inclination.max"
        self.lasers = rows("lidar_calibration", (LASER,), "LiDARCalibration", *laser)

    def image(self, timestamp: int, camera: int) -> tuple[bytes, np.ndarray]:
        image, pose = (value.as_py() for value in self.images.get(timestamp, camera))
        return image or b"", matrix4(pose, "the image's pose")

    def camera(self, timestamp: int, camera: int) -> Camera:
        extrinsic, width, height, *intrinsic = (value.as_py() for value in self.cameras.get(camera))
        return make_camera(intrinsic, extrinsic, width, height)

    def sweep(self, timestamp: int) -> tuple[np.ndarray, np.ndarray]:
        extrinsic, *inclination = (value.as_py() for value in self.lasers.get(TOP))
        images = []
        for rows in (self.ranges, self.projections, self.poses):
            values, shape = rows.get(timestamp, TOP)
            if not values.is_valid or not shape.is_valid:
                raise ValueError(f"{rows.component} has no first return of the TOP lidar")
            images.append(values.values.to_numpy(zero_copy_only=False).reshape(shape.as_py()))
        return sweep(*images, inclination, matrix4(extrinsic, "the TOP lidar's extrinsic"))


def list_segment(path: Path) -> tuple[list[tuple[int, int, int]], list]:
    """Images of a v2 segment as (timestamp, camera, key), from the key columns alone; no broken ones."""
    rows = key_rows(open_parquet(path), (TIMESTAMP, CAMERA))
    return [(timestamp, camera, timestamp) for timestamp, camera in rows], []


# v1: TFRecord files of Frame messages (field numbers: dataset.proto)


class Records:
    """A v1 segment; its frames' keys are their records' offsets in the file."""

    def __init__(self, source: LidarSource, folder: str, file: str):
        self.data = tfrecord.map_file(source.path(folder, file))

    def frame(self, offset: int) -> dict[int, list]:
        return fields(tfrecord.payload(self.data, offset))

    def image(self, offset: int, camera: int) -> tuple[bytes, np.ndarray]:
        image = named(self.frame(offset).get(4, []), camera, "camera image")
        return bytes(last(image, 2, memoryview, "CameraImage.image")), transform(image, 3, "the image's pose")

    def camera(self, offset: int, camera: int) -> Camera:
        context = fields(last(self.frame(offset), 1, memoryview, "Frame.context"))
        calibration = named(context.get(2, []), camera, "camera calibration")
        width, height = (last(calibration, number, int, "CameraCalibration.width or height") for number in (4, 5))
        extrinsic = transform(calibration, 3, "the camera's extrinsic").ravel()
        return make_camera(fixed(calibration.get(2, []), "<f8"), extrinsic, width, height)

    def sweep(self, offset: int) -> tuple[np.ndarray, np.ndarray]:
        frame = self.frame(offset)
        context = fields(last(frame, 1, memoryview, "Frame.context"))
        calibration = named(context.get(3, []), TOP, "laser calibration")
        # Beams, and their minimum and maximum: NaN where one is not set, which is refused where it is needed.
        values, *ends = (fixed(calibration.get(number, []), "<f8") for number in (2, 3, 4))
        low, high = (end[-1] if len(end) else np.nan for end in ends)
        laser = named(frame.get(5, []), TOP, "laser")
        first_return = fields(last(laser, 2, memoryview, "Laser.ri_return1"))
        images = [
            matrix(first_return, 2, "range_image_compressed"),
            matrix(first_return, 3, "camera_projection_compressed", whole=True),
            matrix(first_return, 4, "range_image_pose_compressed"),
        ]
        return sweep(*images, (values, low, high), transform(calibration, 5, "the TOP lidar's extrinsic"))


def list_records(path: Path) -> tuple[list[tuple[int, int, int]], list[tuple[str, str]]]:
    """Images of a v1 file as (timestamp, camera, key), and its broken records as (place, reason).

    Walks over the lengths in the file and reads little else.
    """
    data = tfrecord.map_file(path)
    images, broken, offset = [], [], 0
    while offset < len(data):
        try:
            record = tfrecord.payload(data, offset)
        except ValueError as error:
            broken.append((f"byte_{offset}", str(error)))
            break  # nothing behind it can be found
        try:
            frame = fields(record)
            timestamp = last(frame, 2, int, "Frame.timestamp_micros")
            cameras = {last(fields(image), 1, int, "CameraImage.name") for image in frame.get(4, [])}
            images += [(timestamp, camera, offset) for camera in cameras]
        except ValueError as error:
            broken.append((f"byte_{offset}", f"the record at byte {offset}: {error}"))
        offset += tfrecord.FRAMING + len(record)
    return images, broken


def named(messages: list, name: int, what: str) -> dict[int, list]:
    """The fields of the message whose field 1 is `name`."""
    for message in map(fields, messages):
        if message.get(1, [0])[-1] == name:
            return message
    raise ValueError(f"the record has no {what} of name {name}")


def transform(message: dict[int, list], number: int, what: str) -> np.ndarray:
    return matrix4(fixed(fields(last(message, number, memoryview, what)).get(1, []), "<f8"), what)


def matrix(message: dict[int, list], number: int, what: str, whole: bool = False) -> np.ndarray:
    """A zlib stream of a MatrixFloat, or where `whole` of a MatrixInt32 -> (H, W, channels)."""
    content = fields(zlib.decompress(last(message, number, memoryview, what)))
    data = content.get(1, [])
    shape = tfrecord.varints(fields(last(content, 2, memoryview, f"{what}'s shape")).get(1, []))
    return (tfrecord.varints(data) if whole else fixed(data, "<f4")).reshape(shape)


def is_v2(file: str) -> bool:
    return file.endswith(".parquet")


class Waymo(LidarSource):
    name = "waymo"
    title = "Waymo Open Dataset (perception)"
    page = "https://waymo.com/open/download/"
    licence = "Waymo Dataset License Agreement for Non-Commercial Use (registration)"
    citation = "Sun et al., Scalability in Perception for Autonomous Driving: Waymo Open Dataset, CVPR 2020"
    layout = """\
v2 (Parquet): {training,testing}/COMPONENT/SEGMENT.parquet, COMPONENT being camera_image, camera_calibration,
  lidar, lidar_calibration, lidar_pose and lidar_camera_projection
or v1: {training,testing}/*.tfrecord"""
    needs = (("t*ing/*", "a folder training or testing with v2 component folders or v1 .tfrecord files"),)
    splits = {"train": ("training",), "test": ("testing",)}
    depth_range = (0.05, 70.0)

    def __init__(self, raw: str | Path, remove_hidden: bool = True):
        super().__init__(raw, remove_hidden)
        # The last segment and the last sweep used, each with what it belongs to: five cameras share a sweep.
        self.segment = self.points = (None, None)

    def __reduce__(self):
        return type(self), (self.raw, self.remove_hidden)  # open files stay behind

    def frames(self, split: str) -> Iterator[Frame]:
        for folder in self.official_splits(split):
            for file in self.segment_files(folder):
                scene = re.sub(r"^segment-|(_with_camera_labels)?\.\w+$", "", file)
                try:
                    path = self.path(folder, "camera_image", file) if is_v2(file) else self.path(folder, file)
                    images, broken = list_segment(path) if is_v2(file) else list_records(path)
                    images.sort()
                except (ValueError, OSError, pa.ArrowException) as error:
                    images, broken = [], [("unreadable", str(error))]
                for timestamp, camera, key in images:
                    name = CAMERAS.get(camera, f"camera{camera}")
                    yield Frame(f"{scene}/{timestamp}_{name}", scene, name, (folder, file, key, camera))
                for place, reason in broken:
                    yield Frame(f"{scene}/{place}", scene, problem=f"{folder}/{file}: {reason}")

    def segment_files(self, folder: str) -> list[str]:
        """Sorted segment files of v2 (.parquet, in every component folder under the same name) or v1 (.tfrecord)."""
        expected = f"{folder}/camera_image/*.parquet and the other v2 components, or {folder}/*.tfrecord"
        if not self.path(folder).is_dir():
            raise AbsentSplit(f"{self.raw} has no folder {folder}; expected {expected} (validation is not used)")
        v1 = [name for name in self.listdir(folder) if name.endswith(".tfrecord")]
        v2 = self.listdir(folder, "camera_image") if self.path(folder, "camera_image").is_dir() else []
        v2 = [name for name in v2 if is_v2(name)]
        if bool(v1) == bool(v2):
            raise BadRaw(f"{self.raw} has {'both' if v1 else 'neither'} of the two forms; expected {expected}")
        return v1 or v2

    def load(self, frame: Frame) -> Sample:
        folder, file, key, camera = frame.data
        try:
            return self.sample(folder, file, key, camera)
        except (ValueError, zlib.error, pa.ArrowException) as error:
            raise BadFrame(f"{folder}/{file}, frame {frame.id}: {error}") from error

    def sample(self, folder: str, file: str, key: int, camera_name: int) -> Sample:
        if camera_name not in CAMERAS:
            raise ValueError(f"camera {camera_name} is not one of the five cameras, 1 to 5")
        if self.segment[0] != (folder, file):
            self.segment = (folder, file), (Segment if is_v2(file) else Records)(self, folder, file)
        segment = self.segment[1]
        if self.points[0] != (folder, file, key):
            self.points = (folder, file, key), segment.sweep(key)
        points, projection = self.points[1]
        data, world_from_vehicle = segment.image(key, camera_name)
        camera = segment.camera(key, camera_name)
        image = open_image(data, "its image")
        if image.size != camera.size:
            raise ValueError(f"its image is {image.size} and its calibration is for {camera.size}")
        jpeg = io.BytesIO()
        pinhole_image = undistort_image(pixels_of(image, "its image"), camera.intrinsic)
        Image.fromarray(pinhole_image).save(jpeg, "JPEG", quality=95, subsampling=0)

        f_u, f_v, c_u, c_v = (float(number) for number in camera.intrinsic[:4])
        seen, pixels = projected_pixels(camera_name, projection)
        camera_from_world = np.linalg.inv(world_from_vehicle @ camera.vehicle_from_camera @ WAYMO_FROM_OPENCV)
        z = apply(camera_from_world, points[seen])[:, 2]
        u, v = undistort(pixels, camera.intrinsic).T
        depth = splat(u, v, z, camera.size, f_u, self.remove_hidden, self.window)
        return Sample(jpeg.getvalue(), depth, (f_u, f_v, c_u - 0.5, c_v - 0.5))


SOURCE = Waymo
