"""Waymo: the v2 Parquet and v1 TFRecord forms of one made-up segment whose depth is known.

The FRONT camera looks straight at a wall: z-depth is WALL everywhere, while distances to the camera are not. All
matrices, projections, messages and checksums here are written apart from the code under test.
"""

import io
import pickle
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench.build import load_row
from bench.sources import _tfrecord as tfrecord
from bench.sources import waymo
from bench.sources._base import BadFrame, BadRaw
from bench.sources.waymo import SOURCE as Waymo

WALL = 20.0
SEGMENT = "10023947602400723454_1120_000_1140_000"
FRONT, FRONT_LEFT, SIDE_LEFT = 1, 2, 4
TOP, LASER_SIDE_LEFT = 1, 3
TIMES = (1553735853462203, 1553735853562235)
ROWS, COLUMNS = 16, 180
# f_u, f_v, c_u, c_v, k1, k2, p1, p2, k3 and W, H; the second has the side cameras' flat shape.
CAMERAS = {
    FRONT: ((80.0, 81.0, 47.3, 32.6, 0.0323, -0.3214, 0.00079, -0.00063, 0.0), (96, 64)),
    SIDE_LEFT: ((80.0, 80.0, 48.4, 21.1, 0.04, -0.33, -0.0004, 0.0005, 0.01), (96, 44)),
}


# The scene


def turn(axis: str, angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    r = np.eye(3)
    r[i, i] = r[j, j] = c
    r[i, j], r[j, i] = -s, s
    return r


def pose(roll, pitch, yaw, x, y, z) -> np.ndarray:
    t = np.eye(4)
    t[:3, :3] = turn("z", yaw) @ turn("y", pitch) @ turn("x", roll)
    t[:3, 3] = x, y, z
    return t


EXTRINSICS = {
    FRONT: pose(0.004, -0.006, 0.01, 1.54, -0.02, 2.11),
    SIDE_LEFT: pose(-0.003, 0.005, 1.55, 1.43, 0.11, 2.1),
}
TOP_EXTRINSIC = pose(0.003, -0.004, 2.58, 1.43, 0.0, 2.18)
BEAMS = np.sort(np.random.default_rng(1).uniform(-0.3, 0.25, ROWS))  # lowest first, as stored


def image_pose(time: int, camera: int) -> np.ndarray:
    return pose(0.01, -0.02, 0.71 + 0.01 * time, 103.0 + 1.5 * time + 0.02 * camera, -47.0, 6.0)


def pixel_poses(time: int) -> np.ndarray:
    """(ROWS, COLUMNS, 6): the vehicle moves and turns while the lidar turns once."""
    lag = np.linspace(-0.5, 0.5, COLUMNS) + 0.1 * np.linspace(0, 1, ROWS)[:, None]
    zero = np.zeros_like(lag)
    angles = (0.01 + 0.004 * lag, -0.02 + zero, 0.71 + 0.01 * time + 0.03 * lag)
    return np.stack([*angles, 103.0 + 1.5 * time + 1.5 * lag, -47.0 + 0.2 * lag, 6.0 + zero], -1).astype(np.float32)


def brown(x, y, k):
    """The lens in OpenCV's documented form."""
    k1, k2, p1, p2, k3 = k
    r2 = x**2 + y**2
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    return x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2), y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y


def see(points, camera: int, time: int):
    """World points (N, 3) -> pinhole x right, y down and z of the camera at the image's pose."""
    local = np.linalg.inv(image_pose(time, camera) @ EXTRINSICS[camera]) @ np.c_[points, np.ones(len(points))].T
    forward, left, up = local[:3]
    return -left / forward, -up / forward, forward


def world_points(time: int, inclinations):
    """World points (ROWS, COLUMNS, 3) on the wall, and the range of each; NaN where a ray does not meet it."""
    camera = image_pose(time, FRONT) @ EXTRINSICS[FRONT]
    normal, offset = camera[:3, 0], camera[:3, 0] @ camera[:3, 3] + WALL
    points, ranges = np.full((ROWS, COLUMNS, 3), np.nan), np.full((ROWS, COLUMNS), np.nan)
    for (row, column), six in ((at, pixel_poses(time)[at]) for at in np.ndindex(ROWS, COLUMNS)):
        t = pose(*six.astype(float)) @ TOP_EXTRINSIC
        # Column 0 looks back, turning clockwise; the azimuth is the vehicle's, so the sensor's own yaw is taken off.
        azimuth = np.pi - 2 * np.pi * (column + 0.5) / COLUMNS - 2.58
        beam = inclinations[ROWS - 1 - row]
        ray = t[:3, :3] @ [np.cos(azimuth) * np.cos(beam), np.sin(azimuth) * np.cos(beam), np.sin(beam)]
        distance = (offset - normal @ t[:3, 3]) / (normal @ ray)
        if 0 < distance < 75:
            points[row, column], ranges[row, column] = t[:3, 3] + distance * ray, distance
    return points, ranges


def pattern(x, y):
    """Colour seen in direction (x, y) from the camera: red and green step by two levels a pixel, blue by minus one."""
    return np.stack([128 + 160 * x, 128 + 160 * y, 128 - 80 * x - 80 * y], -1)


def photo(camera: int) -> bytes:
    """The distorted image as stored, by a search for the direction of each pixel."""
    (f_u, f_v, c_u, c_v, *k), (width, height) = CAMERAS[camera]
    u, v = np.meshgrid((np.arange(width) + 0.5 - c_u) / f_u, (np.arange(height) + 0.5 - c_v) / f_v)
    x, y = u, v
    for _ in range(60):
        dx, dy = brown(x, y, k)
        x, y = x - 0.7 * (dx - u), y - 0.7 * (dy - v)
    data = io.BytesIO()
    Image.fromarray(np.clip(pattern(x, y) + 0.5, 0, 255).astype(np.uint8)).save(
        data, "JPEG", quality=100, subsampling=0
    )
    return data.getvalue()


def make_frame(time: int = 0, uniform: bool = False) -> dict:
    """One timestamp: what the sensors store."""
    beams = -0.3 + (np.arange(ROWS) + 0.5) / ROWS * 0.55 if uniform else BEAMS
    points, ranges = world_points(time, beams)
    projection = np.zeros((ROWS, COLUMNS, 6), np.int32)
    for camera, ((f_u, f_v, c_u, c_v, *k), (width, height)) in CAMERAS.items():
        with np.errstate(all="ignore"):
            x, y, z = (a.reshape(ROWS, COLUMNS) for a in see(points.reshape(-1, 3), camera, time))
            u, v = brown(x, y, k)
            u, v = np.floor(u * f_u + c_u), np.floor(v * f_v + c_v)
            hit = (z > 0) & (np.hypot(x, y) < 0.8) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        projection[hit, :3] = np.stack([np.full(hit.sum(), camera), u[hit], v[hit]], -1)
    filled = np.isfinite(ranges)
    lidar = np.zeros((ROWS, COLUMNS, 4), np.float32)
    lidar[..., 0] = np.where(filled, ranges, -1)
    lidar[..., 1:3] = 0.25
    # A side lidar with no pixel poses, whose points would be seen 5 m away in the middle of the front image.
    side = np.full((2, 8, 4), 5.0, np.float32)
    side_projection = np.tile(np.array([FRONT, 40, 30, 0, 0, 0], np.int32), (2, 8, 1))
    return {
        "time": TIMES[time],
        "images": {c: [photo(c), image_pose(time, c)] for c in CAMERAS},
        "cameras": {c: [intrinsic, EXTRINSICS[c], size] for c, (intrinsic, size) in CAMERAS.items()},
        "lidar": {TOP: lidar, LASER_SIDE_LEFT: side},
        "projection": {TOP: projection, LASER_SIDE_LEFT: side_projection},
        "poses": {TOP: pixel_poses(time)},
        "lasers": {
            TOP: [None if uniform else BEAMS, -0.3, 0.25, TOP_EXTRINSIC],
            LASER_SIDE_LEFT: [None, -1.5, 0.5, pose(0, 0, 1.5, 1, 1, 1)],
        },
        "points": points,
    }


@pytest.fixture(scope="module")
def made():
    return [make_frame(0), make_frame(1)]


@pytest.fixture
def frames(made):
    """Two timestamps, for a test to change."""
    return pickle.loads(pickle.dumps(made))


# v2 writer

MATRIX = pa.list_(pa.float64(), 16)


def write_table(root, folder, component, segment, columns: dict, row_group_size):
    path = root / folder / component / f"{segment}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    first = {"index": pa.array([f"{i}" for i in range(rows)]), "key.segment_context_name": pa.array([segment] * rows)}
    pq.write_table(pa.table(first | columns), path, row_group_size=row_group_size)


def write_v2(root, frames, folder="training", segment=SEGMENT, row_group_size=3):
    def keys(sensor, rows):
        names = {"key.frame_timestamp_micros": pa.int64(), f"key.{sensor}_name": pa.int8()}
        return {name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(names.items())}

    def flat(matrices):
        return pa.array([m.ravel().tolist() for m in matrices], MATRIX)

    def put(component, columns):
        write_table(root, folder, component, segment, columns, row_group_size)

    rows = [(f["time"], c, *f["images"][c]) for f in frames for c in sorted(f["images"], reverse=True)]
    name = "[CameraImageComponent]."
    pictures = {
        f"{name}image": pa.array([r[2] for r in rows], pa.binary()),
        f"{name}pose.transform": flat(r[3] for r in rows),
    }
    put("camera_image", keys("camera", rows) | pictures)

    name, cameras = "[CameraCalibrationComponent].", frames[0]["cameras"]
    columns = {"key.camera_name": pa.array(list(cameras), pa.int8())}
    for i, parameter in enumerate(("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")):
        columns[f"{name}intrinsic.{parameter}"] = pa.array([c[0][i] for c in cameras.values()], pa.float64())
    columns[f"{name}extrinsic.transform"] = flat(c[1] for c in cameras.values())
    for i, side in enumerate(("width", "height")):
        columns[name + side] = pa.array([c[2][i] for c in cameras.values()], pa.int32())
    put("camera_calibration", columns)

    name, lasers = "[LiDARCalibrationComponent].", frames[0]["lasers"]
    columns = {"key.laser_name": pa.array(list(lasers), pa.int8())}
    columns[f"{name}extrinsic.transform"] = flat(laser[3] for laser in lasers.values())
    for i, bound in ((1, "min"), (2, "max")):
        columns[f"{name}beam_inclination.{bound}"] = pa.array([laser[i] for laser in lasers.values()], pa.float64())
    beams = [None if laser[0] is None else list(laser[0]) for laser in lasers.values()]
    columns[f"{name}beam_inclination.values"] = pa.array(beams, pa.list_(pa.float64()))
    put("lidar_calibration", columns)

    tables = {"lidar": "LiDAR", "projection": "LiDARCameraProjection", "poses": "LiDARPose"}
    folders = {"lidar": "lidar", "projection": "lidar_camera_projection", "poses": "lidar_pose"}
    for part, component in tables.items():
        rows = [(f["time"], laser, image) for f in frames for laser, image in f[part].items()]
        name = f"[{component}Component].range_image_return1."
        values = pa.array([r[2].astype(np.float32).ravel().tolist() for r in rows], pa.list_(pa.float32()))
        shapes = pa.array([frames[0].get(f"{part} shape", r[2].shape) for r in rows], pa.list_(pa.int32(), 3))
        put(folders[part], keys("laser", rows) | {f"{name}values": values, f"{name}shape": shapes})
    return root


# v1 writer


def number(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def field(place: int, value) -> bytes:
    """int -> varint, float -> double, bytes -> length-delimited."""
    if isinstance(value, float):
        return number(place << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, int):
        return number(place << 3) + number(value)
    return number(place << 3 | 2) + number(len(value)) + value


def doubles(place: int, values) -> bytes:
    """proto2 does not pack repeated doubles."""
    return b"".join(field(place, float(value)) for value in values)


def transform(place: int, matrix) -> bytes:
    return field(place, doubles(1, np.asarray(matrix).ravel()))


def compressed_matrix(image: np.ndarray, shape=None) -> bytes:
    whole = image.dtype == np.int32
    data = b"".join(map(number, image.ravel().tolist())) if whole else image.astype("<f4").tobytes()
    shape = b"".join(field(1, side) for side in shape or image.shape)
    return zlib.compress(field(1, data) + field(2, shape))


# Fields of every wire type that no reader here knows.
UNKNOWN = field(101, 7) + field(102, b"label") + field(103, 1.5) + number(104 << 3 | 5) + b"abcd"


def frame_message(f: dict) -> bytes:
    context = field(1, SEGMENT.encode())
    for name, (intrinsic, extrinsic, (width, height)) in f["cameras"].items():
        calibration = field(1, name) + doubles(2, intrinsic) + transform(3, extrinsic)
        context += field(2, calibration + field(4, width) + field(5, height) + field(6, 2) + UNKNOWN)
    for name, (beams, low, high, extrinsic) in f["lasers"].items():
        calibration = field(1, name) + doubles(2, [] if beams is None else beams)
        context += field(3, calibration + field(3, low) + field(4, high) + transform(5, extrinsic))
    message = field(1, context) + field(2, f["time"]) + transform(3, pose(0, 0, 3, 5, 5, 5))
    for name, (jpeg, matrix) in sorted(f["images"].items(), reverse=True):
        message += field(4, field(1, name) + field(2, jpeg) + transform(3, matrix) + field(5, 1.25))
    for name, lidar in reversed(f["lidar"].items()):
        returns = field(2, compressed_matrix(lidar, f.get("lidar shape")))
        returns += field(3, compressed_matrix(f["projection"][name]))
        if name in f["poses"]:
            returns += field(4, compressed_matrix(f["poses"][name]))
        message += field(5, field(1, name) + field(2, returns))
    return message + field(6, b"a laser label") + UNKNOWN


CRC_TABLE = []
for octet in range(256):
    for _ in range(8):
        octet = octet >> 1 ^ 0x82F63B78 * (octet & 1)
    CRC_TABLE.append(octet)


def masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def record(message: bytes, length: int | None = None) -> bytes:
    head = struct.pack("<Q", len(message) if length is None else length)
    return head + masked_crc(head) + message + b"crc?"


def write_v1(root, frames, folder="training", tail=b""):
    path = root / folder / f"segment-{SEGMENT}_with_camera_labels.tfrecord"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(record(frame_message(f)) for f in frames) + tail)
    return root


@pytest.fixture(params=[write_v2, write_v1], ids=["v2", "v1"])
def write(request):
    return request.param


def load(root, camera="front", time=TIMES[0], split="train", **options):
    source = Waymo(root, **options)
    return source.load(next(f for f in source.frames(split) if f.id.endswith(f"{time}_{camera}")))


# Golden numbers of the devkit's camera test

GOLDEN = (2055.55614936, 2055.55614936, 939.657469886, 641.072182194)
GOLDEN += (0.032316008498, -0.321412482553, 0.000793258395371, -0.000625749354133, 0.0)
GOLDEN_EXTRINSIC = np.array(
    [
        [0.999892684989, -0.00599320840002, 0.0133678704017, 1.53891424471],
        [0.00604223652133, 0.999975156055, -0.0036302411765, -0.0236339408393],
        [-0.0133457814992, 0.00371062343188, 0.999904056092, 2.11527057298],
        [0, 0, 0, 1],
    ]
)


def golden_direction():
    """Of the stored pixel (100, 1000), counted from the edge of the first one."""
    ((u, v),) = waymo.undistort(np.array([[99.5, 999.5]]), GOLDEN)
    return (u + 0.5 - GOLDEN[2]) / GOLDEN[0], (v + 0.5 - GOLDEN[3]) / GOLDEN[1]


def test_golden_undistorted_direction():
    x, y = golden_direction()
    assert (x, y) == pytest.approx((-0.410633, 0.175428), abs=1e-6)
    u, v = brown(x, y, GOLDEN[4:])
    assert (u * GOLDEN[0] + GOLDEN[2], v * GOLDEN[1] + GOLDEN[3]) == pytest.approx((100, 1000), abs=1e-6)


def test_golden_vehicle_point_and_camera_axes():
    x, y = golden_direction()
    point = waymo.apply(GOLDEN_EXTRINSIC @ waymo.WAYMO_FROM_OPENCV, np.array([[20 * x, 20 * y, 20.0]]))[0]
    assert point == pytest.approx((21.44065, 8.32241, -1.62939), abs=1e-5)
    assert np.linalg.norm(point - GOLDEN_EXTRINSIC[:3, 3]) == pytest.approx(21.9034, abs=1e-4)
    back = waymo.apply(np.linalg.inv(GOLDEN_EXTRINSIC @ waymo.WAYMO_FROM_OPENCV), point[None])[0]
    assert back == pytest.approx((20 * x, 20 * y, 20), abs=1e-6)


# The frame


def test_depth_is_the_wall_at_every_pixel(tmp_path, frames, write):
    source = Waymo(write(tmp_path, frames))
    front = [f for f in source.frames("train") if f.camera == "front"]
    for frame in (*front, front[0]):  # one source for all, in any order
        depth = source.load(frame).depth
        assert depth.shape == (64, 96) and depth.dtype == np.float32
        assert (depth > 0).sum() > 250
        np.testing.assert_allclose(depth[depth > 0], WALL, atol=1e-4)


def test_depth_is_z_and_not_euclidean(tmp_path, frames, write):
    """The distances to the same points differ by up to a fifth."""
    _, _, z = see(frames[0]["points"][frames[0]["projection"][TOP][..., 0] == FRONT], FRONT, 0)
    x, y, _ = see(frames[0]["points"][frames[0]["projection"][TOP][..., 0] == FRONT], FRONT, 0)
    assert (z * np.sqrt(1 + x**2 + y**2)).max() > 1.15 * WALL
    assert load(write(tmp_path, frames)).depth.max() < WALL + 1e-4


@pytest.mark.parametrize("camera", [FRONT, SIDE_LEFT])
def test_points_land_where_a_pinhole_sees_them(tmp_path, frames, write, camera):
    """Place by place, and on average without an offset: a pixel's whole number stands for the pixel, not its edge."""
    sample = load(write(tmp_path, frames), waymo.CAMERAS[camera], remove_hidden=False)
    fx, fy, cx, cy = sample.intrinsics
    x, y, z = see(frames[0]["points"][frames[0]["projection"][TOP][..., 0] == camera], camera, 0)
    u, v = fx * x + cx, fy * y + cy
    rows, columns = np.nonzero(sample.depth)
    height, width = sample.depth.shape
    inside = (u > 1) & (u < width - 2) & (v > 1) & (v < height - 2)
    assert inside.sum() > 60
    offsets = []
    for point in np.flatnonzero(inside):
        places = np.flatnonzero(np.abs(sample.depth[rows, columns] - z[point]) < max(1e-4, 0.02 * z[point]))
        squares = (columns[places] - u[point]) ** 2 + (rows[places] - v[point]) ** 2
        nearest = places[squares.argmin()]
        offsets.append((columns[nearest] - u[point], rows[nearest] - v[point]))
    assert np.abs(offsets).max() < 1.2
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.2


def test_depth_of_a_slanted_wall(tmp_path, frames, write):
    """The side camera sees the front camera's wall at a slant: depth agrees with the plane within a pixel's step."""
    sample = load(write(tmp_path, frames), "side_left", remove_hidden=False)
    fx, fy, cx, cy = sample.intrinsics
    rows, columns = np.nonzero(sample.depth)
    front = image_pose(0, FRONT) @ EXTRINSICS[FRONT]
    side = image_pose(0, SIDE_LEFT) @ EXTRINSICS[SIDE_LEFT]
    normal = front[:3, 0]
    height = normal @ (front[:3, 3] - side[:3, 3]) + WALL
    forward, left, up = (normal @ side[:3, axis] for axis in range(3))

    def plane(u, v):
        return height / (forward - left * (u - cx) / fx - up * (v - cy) / fy)

    near = [plane(columns + du, rows + dv) for du in (-1.2, 1.2) for dv in (-1.2, 1.2)]
    depth = sample.depth[rows, columns]
    assert len(depth) > 60 and np.ptp(depth) > 10
    assert (depth >= np.min(near, axis=0)).all() and (depth <= np.max(near, axis=0)).all()


def test_v1_and_v2_give_the_same(tmp_path, frames):
    one, two = Waymo(write_v1(tmp_path / "1", frames)), Waymo(write_v2(tmp_path / "2", frames))
    listed = list(one.frames("train"))
    assert [(f.id, f.scene, f.camera) for f in listed] == [(f.id, f.scene, f.camera) for f in two.frames("train")]
    for a, b in zip(listed, two.frames("train"), strict=True):
        a, b = one.load(a), two.load(b)
        np.testing.assert_allclose(a.depth, b.depth, atol=1e-4)
        assert a.intrinsics == b.intrinsics and a.image == b.image


def test_intrinsics_keep_the_principal_point(tmp_path, frames, write):
    """Counted from the first pixel's centre; the official code moves it to the image's middle."""
    assert load(write(tmp_path, frames)).intrinsics == pytest.approx((80.0, 81.0, 46.8, 32.1))
    assert load(tmp_path, "side_left").intrinsics == pytest.approx((80.0, 80.0, 47.9, 20.6))


@pytest.mark.parametrize("camera", ["front", "side_left"])
def test_image_is_undistorted(tmp_path, frames, camera):
    sample = load(write_v2(tmp_path, frames), camera)
    image = Image.open(io.BytesIO(sample.image))
    assert image.format == "JPEG" and image.size == sample.depth.shape[::-1]
    fx, fy, cx, cy = sample.intrinsics
    u, v = np.meshgrid(np.arange(image.width), np.arange(image.height))
    expected = np.clip(pattern((u - cx) / fx, (v - cy) / fy), 0, 255)
    error = np.asarray(image, float) - expected
    seen = np.asarray(image).sum(-1) > 0
    assert seen.mean() > 0.97
    assert np.abs(error[seen]).mean() < 1.2 and np.percentile(np.abs(error[seen]), 99) < 3
    red, green, blue = error[seen].mean(axis=0)
    brightness = (red + green + 2 * blue) / 4
    assert abs(brightness) < 1 and max(abs(red - brightness), abs(green - brightness)) / 2 < 0.2  # px
    raw = np.asarray(Image.open(io.BytesIO(photo({v: k for k, v in waymo.CAMERAS.items()}[camera]))), float)
    assert np.percentile(np.abs(raw - expected), 99) > 3.5  # the lens does something


# Traps


def test_inclinations_are_stored_lowest_first():
    np.testing.assert_array_equal(waymo.beam_inclinations([-0.3, -0.1, 0.0], 9, 9, 3), [0.0, -0.1, -0.3])


def test_uniform_inclinations_are_at_half_steps():
    for values in (None, []):
        np.testing.assert_allclose(waymo.beam_inclinations(values, -0.2, 0.2, 4), [0.15, 0.05, -0.05, -0.15])


def test_null_inclinations_of_the_top_lidar(tmp_path, write):
    depth = load(write(tmp_path, [make_frame(uniform=True)])).depth
    assert (depth > 0).sum() > 250
    np.testing.assert_allclose(depth[depth > 0], WALL, atol=1e-4)


@pytest.mark.parametrize("yaw", [0.0, 2.58, -1.0])
def test_azimuth_is_corrected_by_the_extrinsic_yaw(yaw):
    points = waymo.points_in_vehicle(np.full((1, 8), 10.0), np.array([0.0]), pose(0, 0, yaw, 0, 0, 0))
    azimuth = np.pi * np.array([7, 5, 3, 1, -1, -3, -5, -7]) / 8
    np.testing.assert_allclose(
        points[0], 10 * np.stack([np.cos(azimuth), np.sin(azimuth), 0 * azimuth], -1), atol=1e-12
    )


def test_pixel_poses_are_roll_pitch_yaw_of_each_point():
    poses = np.array([[0.1, -0.2, 0.3, 1, 2, 3], [0, 0, 0, 0, 0, 0], [0, 0, np.pi / 2, 5, 0, 0]])
    points = np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3]])
    expected = [(pose(*p) @ [*q, 1])[:3] for p, q in zip(poses, points, strict=True)]
    np.testing.assert_allclose(waymo.points_in_world(points, poses), expected, atol=1e-12)
    np.testing.assert_allclose(expected[2], [3, 1, 3], atol=1e-12)


def test_rolling_pixel_poses_matter(tmp_path, frames, write):
    """One pose for all pixels would put the wall up to a metre off."""
    frames[0]["poses"][TOP][:] = frames[0]["poses"][TOP][8, 90]
    depth = load(write(tmp_path, frames)).depth
    assert np.abs(depth[depth > 0] - WALL).max() > 0.1


def test_identity_pixel_poses(tmp_path, frames, write):
    """A vehicle at the world's origin: poses of zeros, the image's pose the identity."""
    frames[0]["poses"][TOP][:] = 0
    frames[0]["images"][FRONT][1] = np.eye(4)
    frames[0]["lidar"][TOP][..., 0] = 10.0
    frames[0]["projection"][TOP][:] = 0
    frames[0]["projection"][TOP][5, 90] = [FRONT, 40, 30, 0, 0, 0]
    depth = load(write(tmp_path, frames)).depth
    azimuth = np.pi - 2 * np.pi * 90.5 / COLUMNS - 2.58
    beam = BEAMS[ROWS - 1 - 5]
    ray = np.array([np.cos(azimuth) * np.cos(beam), np.sin(azimuth) * np.cos(beam), np.sin(beam)])
    point = TOP_EXTRINSIC @ [*(10 * ray), 1]
    assert np.flatnonzero(depth).size == 1
    assert depth.max() == pytest.approx((np.linalg.inv(EXTRINSICS[FRONT]) @ point)[0], abs=1e-4)


def test_side_lidar_without_pixel_poses_is_ignored(tmp_path, frames, write):
    assert LASER_SIDE_LEFT not in frames[0]["poses"]
    with_side = load(write(tmp_path / "with", frames)).depth
    for part in ("lidar", "projection"):
        del frames[0][part][LASER_SIDE_LEFT]
    np.testing.assert_array_equal(with_side, load(write(tmp_path / "without", frames)).depth)


def test_top_lidar_needs_pixel_poses(tmp_path, frames, write):
    del frames[0]["poses"][TOP]
    with pytest.raises(BadFrame, match="LiDARPose has no row|range_image_pose_compressed is missing"):
        load(write(tmp_path, frames))
    assert load(tmp_path, time=TIMES[1]).depth.any()


def test_projection_columns_are_floats(tmp_path, frames):
    write_v2(tmp_path, frames)
    table = pq.read_table(tmp_path / "training" / "lidar_camera_projection" / f"{SEGMENT}.parquet")
    values = table.column("[LiDARCameraProjectionComponent].range_image_return1.values")
    assert values.type == pa.list_(pa.float32())
    assert load(tmp_path).depth.any()


def test_calibration_has_no_timestamp_and_tables_an_extra_column(tmp_path, frames):
    write_v2(tmp_path, frames)
    for component in ("camera_calibration", "lidar_calibration"):
        names = pq.read_schema(tmp_path / "training" / component / f"{SEGMENT}.parquet").names
        assert names[0] == "index" and "key.frame_timestamp_micros" not in names
    assert load(tmp_path, time=TIMES[1]).depth.any()


def test_empty_cells_are_left_out(tmp_path, frames, write):
    """-1 and 0 are empty, even where the projection names a pixel."""
    before = load(write(tmp_path / "before", frames)).depth
    seen = np.argwhere(frames[0]["projection"][TOP][..., 0] == FRONT)
    frames[0]["lidar"][TOP][tuple(seen[::2].T)] = -1
    frames[0]["lidar"][TOP][tuple(seen[1::4].T)] = 0
    after = load(write(tmp_path / "after", frames)).depth
    assert 0 < (after > 0).sum() < 0.3 * (before > 0).sum()
    np.testing.assert_allclose(after[after > 0], WALL, atol=1e-4)


def test_second_camera_of_a_point_counts_and_a_third_has_none(tmp_path, frames, write):
    first = load(write(tmp_path / "first", frames)).depth
    projection = frames[0]["projection"][TOP]
    front = projection[..., 0] == FRONT
    projection[front] = np.c_[np.tile([FRONT_LEFT, 3, 4], (front.sum(), 1)), projection[front][:, :3]]
    np.testing.assert_array_equal(load(write(tmp_path / "second", frames)).depth, first)
    projection[front, 3] = 3
    assert not load(write(tmp_path / "third", frames)).depth.any()


def test_hidden_points_are_removed_unless_kept(tmp_path, frames, write):
    """A far point inside a ring of near ones: the lidar looks over what hides it from the camera."""
    frames[0]["poses"][TOP][:] = 0
    frames[0]["images"][FRONT][1] = np.eye(4)
    frames[0]["projection"][TOP][:] = 0
    frames[0]["lidar"][TOP][..., 0] = 10.0
    for k, (du, dv) in enumerate(((-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0))):
        frames[0]["projection"][TOP][8, 88 + k] = [FRONT, 47 + du, 32 + dv, 0, 0, 0]
    frames[0]["lidar"][TOP][8, 92, 0] = 40.0
    write(tmp_path, frames)
    assert (load(tmp_path).depth > 20).sum() == 0
    assert (load(tmp_path, remove_hidden=False).depth > 20).sum() == 1


# Listing


def test_splits_are_the_papers_and_validation_is_not_used(tmp_path, frames, write):
    assert Waymo.splits == {"train": ("training",), "test": ("testing",)}
    write(tmp_path, frames[:1], "training")
    write(tmp_path, frames[1:], "validation")
    source = Waymo(tmp_path)
    assert len(list(source.frames("train"))) == 2
    with pytest.raises(BadRaw, match="no folder testing"):
        list(source.frames("test"))
    write(tmp_path, frames, "testing")
    assert len(list(source.frames("test"))) == 4


def test_listing_is_sorted_and_reads_no_pixels(tmp_path, frames):
    for segment in ("9_b", "1_a"):
        write_v2(tmp_path, frames[::-1], segment=segment)
        for component in ("lidar", "camera_calibration"):
            (tmp_path / "training" / component / f"{segment}.parquet").unlink()
    listed = [f.id for f in Waymo(tmp_path).frames("train")]
    names = [f"{time}_{camera}" for time in TIMES for camera in ("front", "side_left")]
    assert listed == [f"{segment}/{name}" for segment in ("1_a", "9_b") for name in names]


def test_facts():
    assert (Waymo.name, Waymo.depth_range, Waymo.depth_scale) == ("waymo", (0.05, 70.0), 512.0)
    assert list(waymo.CAMERAS.values()) == ["front", "front_left", "front_right", "side_left", "side_right"]


def test_pickles_after_use(tmp_path, frames, write):
    source = Waymo(write(tmp_path, frames), remove_hidden=False)
    frame = next(source.frames("train"))
    before = source.load(frame).depth
    again = pickle.loads(pickle.dumps(source))
    assert again.remove_hidden is False
    np.testing.assert_array_equal(again.load(pickle.loads(pickle.dumps(frame))).depth, before)


def test_raw_folder_must_hold_one_form(tmp_path, frames):
    (tmp_path / "training").mkdir()
    with pytest.raises(BadRaw, match="neither"):
        list(Waymo(tmp_path).frames("train"))
    write_v1(write_v2(tmp_path, frames), frames)
    with pytest.raises(BadRaw, match="both"):
        list(Waymo(tmp_path).frames("train"))


@pytest.mark.parametrize("row_group_size", [1, 4, 7, 100])
def test_rows_in_any_order(tmp_path, row_group_size):
    columns = {"key.camera_name": pa.array(range(50)), "[XComponent].a": pa.array([i * i for i in range(50)])}
    write_table(tmp_path, "t", "x", "s", columns, row_group_size)
    rows = waymo.Rows(tmp_path / "t" / "x" / "s.parquet", ("key.camera_name",), "X", "a")
    for i in [*range(50), *np.random.default_rng(0).permutation(50).tolist()]:
        assert rows.get(i)[0].as_py() == i * i
    with pytest.raises(ValueError, match="no row"):
        rows.get(50)


# Broken and hostile files


def test_missing_component_is_an_os_error(tmp_path, frames):
    write_v2(tmp_path, frames)
    (tmp_path / "training" / "lidar_pose" / f"{SEGMENT}.parquet").unlink()
    with pytest.raises(OSError, match="lidar_pose"):
        load(tmp_path)


def broken_frames(root):
    source = Waymo(root)
    return source, [f for f in source.frames("train") if not f.camera]


def test_unreadable_files_are_listed_and_refused(tmp_path, frames, write):
    write(tmp_path, frames)
    for file in (tmp_path / "training").rglob("*.*"):
        file.write_bytes(b"not what the name says" * 3)
    source, broken = broken_frames(tmp_path)
    assert len(broken) == 1 and broken[0].scene == SEGMENT
    with pytest.raises(BadFrame, match=SEGMENT):
        load_row(source, "train", broken[0])


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (record(b"x" * 100)[:60], "says 100 bytes but the file ends"),
        (record(b"x" * 100, length=2**62), "says 4611686018427387904 bytes but the file ends"),
        (b"\0" * 40, "checksum"),
        (b"abc", "truncated"),
        (record(b"\x22\xff\xff\xff\x7fx"), "field 4 says"),
        (record(b"\xff" * 12), "varint"),
    ],
)
def test_broken_record_is_listed_and_the_others_are_read(tmp_path, frames, tail, reason):
    source, broken = broken_frames(write_v1(tmp_path, frames[:1], tail=tail))
    assert len(broken) == 1 and len(list(source.frames("train"))) == 3
    with pytest.raises(BadFrame, match=reason):
        load_row(source, "train", broken[0])
    assert load(tmp_path).depth.any()


@pytest.mark.parametrize("shape", [(2**30, 2**30, 4), (ROWS, COLUMNS, 3), (ROWS + 1, COLUMNS, 4), (-1, -1, 4)])
def test_absurd_shape_is_refused(tmp_path, frames, write, shape):
    frames[0]["lidar shape"] = shape
    with pytest.raises(BadFrame, match="reshape|one unknown dimension"):
        load(write(tmp_path, frames))


@pytest.mark.parametrize("part", ["lidar", "poses", "beams", "extrinsic", "intrinsic", "image pose"])
def test_nan_is_refused(tmp_path, frames, write, part):
    for f in frames:
        if part in ("lidar", "poses"):
            f[part][TOP][3, 90, 0] = np.nan
        elif part == "beams":
            f["lasers"][TOP][0] = np.full(ROWS, np.nan)
        elif part == "extrinsic":
            f["lasers"][TOP][3] = np.full((4, 4), np.inf)
        elif part == "intrinsic":
            f["cameras"][FRONT][0] = (np.nan, *f["cameras"][FRONT][0][1:])
        else:
            f["images"][FRONT][1] = np.zeros((4, 4))
    f["lidar"][TOP][3, 90, 0] = max(f["lidar"][TOP][3, 90, 0], 1)
    with pytest.raises(BadFrame):
        load(write(tmp_path, frames))


def test_image_must_match_its_calibration(tmp_path, frames, write):
    frames[0]["images"][FRONT][0] = photo(SIDE_LEFT)
    with pytest.raises(BadFrame, match="calibration is for"):
        load(write(tmp_path, frames))


def test_broken_image_is_refused(tmp_path, frames, write):
    frames[0]["images"][FRONT][0] = photo(FRONT)[:700]
    with pytest.raises(BadFrame, match="truncated or broken"):
        load(write(tmp_path, frames))


def test_unknown_camera_is_listed_and_refused(tmp_path, frames, write):
    """Camera 0 means "no camera" in the projection: its image must not collect all points without one."""
    frames[0]["images"][0] = frames[0]["images"][FRONT]
    frames[0]["cameras"][0] = frames[0]["cameras"][FRONT]
    with pytest.raises(BadFrame, match="not one of the five cameras"):
        load(write(tmp_path, frames), "camera0")


def test_lens_that_cannot_be_inverted_is_refused():
    with pytest.raises(ValueError, match="cannot be inverted"):
        waymo.undistort(np.c_[np.arange(1920.0), np.zeros(1920)], (*GOLDEN[:4], -9.0, 5.0, 0, 0, 0))


# The wire format


def test_varints_of_every_length():
    values = [0, 1, 127, 128, 300, 2**31 - 1, -1, -(2**31), 2**62, 5]
    packed = field(1, b"".join(map(number, values)))
    unpacked = b"".join(field(1, value) for value in values)
    for message in (packed, unpacked, packed + unpacked):
        read = tfrecord.varints(tfrecord.fields(message)[1])
        assert read.tolist() == values * (len(read) // len(values))


def test_repeated_doubles_packed_or_not():
    values = [1.5, -2.25, 1e300]
    for message in (doubles(2, values), field(2, struct.pack("<3d", *values))):
        assert tfrecord.fixed(tfrecord.fields(message)[2], "<f8").tolist() == values


@pytest.mark.parametrize("message", [b"\x0b", b"\x08", b"\x09abc", b"\x0a\x05abc", b"\x08" + b"\x80" * 11])
def test_damaged_message_is_refused(message):
    with pytest.raises(ValueError):
        tfrecord.fields(message)
