"""Argoverse 2: a log written in the set's format from an analytic street, read back."""

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from bench_fixtures_lidar import LOOK_FORWARD, View, image_bytes, move, street, transform, turn, wxyz
from bench_fixtures_toy import reason
from PIL import Image

from bench.build import load_row
from bench.sources._base import BadFrame, BadRaw
from bench.sources.argoverse2 import CAMERAS, SOURCE, nearest

LOG = "0a1b2c3d-0000-4000-8000-00000000000a"
START = 315_966_253_660_000_000
# Two images a camera; each sweep comes some ms before an image. Camera times of two cameras differ.
IMAGE_TIMES = {"ring_front_center": (START + 30_000_000, START + 130_000_000)}
IMAGE_TIMES["ring_rear_left"] = tuple(t + 4_000_000 for t in IMAGE_TIMES["ring_front_center"])
SWEEP_TIMES = (START, START + 100_000_000)
SIZES = {"ring_front_center": (155, 205), "ring_rear_left": (205, 155)}
INTRINSICS = {"ring_front_center": (177.6, 177.6, 77.8, 101.35), "ring_rear_left": (168.5, 168.5, 102.1, 77.4)}
EGO_SENSOR = {
    "ring_front_center": transform(turn(0.5, -1, 0.3) * LOOK_FORWARD, (1.6, 0.0, 1.4)),
    "ring_rear_left": transform(turn(152, 0.5, -0.4) * LOOK_FORWARD, (1.1, 0.2, 1.4)),
}
# A half-float has 10 bits: below 16 m it is right to 4 mm.
HALF_STEP = 0.008


def city_from_ego(time: int) -> np.ndarray:
    """The car drives at 20 m/s and turns by 20 degrees a second."""
    seconds = (time - START) / 1e9
    return transform(turn(30 + 20 * seconds, 1, 0.5), (2000 + 20 * seconds, -700 + 10 * seconds, 12.5))


def view(camera: str, time: int) -> View:
    return View(city_from_ego(time) @ EGO_SENSOR[camera], INTRINSICS[camera], SIZES[camera])


def write_table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.feather.write_feather(pa.table(columns), path)


def pose_columns(matrices) -> dict:
    names = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")
    rows = [[*wxyz(m), *m[:3, 3]] for m in matrices]
    return dict(zip(names, (np.array(column) for column in zip(*rows, strict=True)), strict=True))


def write_sweep(path, points):
    write_table(
        path,
        **dict(zip("xyz", np.asarray(points).T.astype(np.float16), strict=True)),
        intensity=np.zeros(len(points), np.uint8),
        laser_number=np.zeros(len(points), np.uint8),
        offset_ns=np.zeros(len(points), np.int32),
    )


def write_log(root, own="train", log=LOG, stereo_rows=True):
    """A log of two cameras (one portrait), two sweeps and two images a camera, written in no sorted order."""
    folder = root / own / log
    for i in (1, 0):
        points = []
        for camera in ("ring_rear_left", "ring_front_center"):
            time = IMAGE_TIMES[camera][i]
            path = folder / "sensors/cameras" / camera / f"{time}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(SIZES[camera]))
            points.append(street(view(camera, time))[0])
        in_ego = move(np.linalg.inv(city_from_ego(SWEEP_TIMES[i])), np.concatenate(points))
        write_sweep(folder / f"sensors/lidar/{SWEEP_TIMES[i]}.feather", in_ego)
    cameras = list(INTRINSICS) + (["stereo_front_left", "stereo_front_right"] if stereo_rows else [])
    rows = [(*INTRINSICS.get(c, (1.0, 1.0, 1.0, 1.0)), *SIZES.get(c, (2, 2))) for c in cameras]
    fx, fy, cx, cy, width, height = zip(*rows, strict=True)
    write_table(
        folder / "calibration/intrinsics.feather",
        **dict(sensor_name=cameras, fx_px=fx, fy_px=fy, cx_px=cx, cy_px=cy),
        **dict(k1=[-0.25] * len(rows), k2=[0.1] * len(rows), k3=[0.02] * len(rows)),
        height_px=np.array(height, np.uint16),
        width_px=np.array(width, np.uint16),
    )
    write_table(
        folder / "calibration/egovehicle_SE3_sensor.feather",
        sensor_name=[*EGO_SENSOR, "up_lidar"],
        **pose_columns([*EGO_SENSOR.values(), transform(turn(0), (1.3, 0, 1.7))]),
    )
    # Each pose has a neighbour a few ns off that is far from it, before and after.
    times = [t for own_times in (*IMAGE_TIMES.values(), SWEEP_TIMES) for t in own_times]
    table = {t + d: city_from_ego(t) @ transform(turn(0), (3.0 * d, 0, 0)) for t in times for d in (-3, 0, 1)}
    write_table(
        folder / "city_SE3_egovehicle.feather",
        timestamp_ns=np.array(sorted(table), np.int64),
        **pose_columns([table[t] for t in sorted(table)]),
    )
    return folder


@pytest.fixture
def raw(tmp_path):
    write_log(tmp_path)
    (tmp_path / "test").mkdir()
    return tmp_path


def frame_of(source, camera, index=0, split="train"):
    return [f for f in source.frames(split) if f.camera == camera][index]


@pytest.mark.parametrize("camera", SIZES)
@pytest.mark.parametrize("index", [0, 1])
def test_ego_motion_compensated_depth_of_an_analytic_street(raw, camera, index):
    source = SOURCE(raw)
    sample = source.load(frame_of(source, camera, index))
    _, expected, _ = street(view(camera, IMAGE_TIMES[camera][index]))
    assert sample.depth.dtype == np.float32 and sample.depth.shape == expected.shape
    assert np.array_equal(sample.depth > 0, expected > 0)
    assert np.abs(sample.depth - expected).max() < 2 * HALF_STEP
    assert sample.intrinsics == INTRINSICS[camera]
    assert sample.image == image_bytes(SIZES[camera])


def test_hidden_points_are_kept_on_request(raw):
    source = SOURCE(raw, remove_hidden=False)
    camera = "ring_front_center"
    sample = source.load(frame_of(source, camera))
    _, expected, hidden = street(view(camera, IMAGE_TIMES[camera][0]))
    assert np.abs(sample.depth - expected - hidden).max() < 2 * HALF_STEP


def test_portrait_camera(raw):
    source = SOURCE(raw)
    sample = source.load(frame_of(source, "ring_front_center"))
    assert sample.depth.shape == (205, 155)


def test_frames_are_sorted_and_cameras_without_images_are_named(raw):
    write_log(raw, log="00000000-0000-4000-8000-000000000000")
    frames = list(SOURCE(raw).frames("train"))
    assert len({frame.id for frame in frames}) == len(frames) == 2 * (2 * 2 + 5)
    times = {c: [str(t) for t in IMAGE_TIMES.get(c, ())] or ["none"] for c in CAMERAS}
    logs = ["00000000-0000-4000-8000-000000000000", LOG]
    assert [f.id for f in frames] == [f"{log}/{c}/{t}" for log in logs for c in CAMERAS for t in times[c]]
    with pytest.raises(BadFrame, match="sensors/cameras/ring_front_left"):
        load_row(SOURCE(raw), "train", next(f for f in frames if f.camera == "ring_front_left"))


def test_splits_are_the_directories(raw):
    source = SOURCE(raw)
    assert list(source.frames("test")) == []
    write_log(raw, own="test", log="b")
    write_log(raw, own="val", log="c")
    assert {f.scene for f in source.frames("test")} == {"b"}
    assert {f.scene for f in source.frames("train")} == {LOG}
    (raw / "test").rename(raw / "other")
    with pytest.raises(BadRaw, match="'test'"):
        list(source.frames("test"))


def test_half_float_points(raw):
    """Golden: 100.03 m is stored as 100.0 and 130.1 m as 130.125; sums are done in float64."""
    assert np.float16(100.03) == 100.0 and np.float16(130.1) == 130.125
    write_sweep(raw / "train/x.feather", [[100.03, -130.1, 0.1]])
    points = SOURCE(raw).points("train/x.feather")
    assert points.dtype == np.float64
    assert points.tolist() == [[100.0, -130.125, float(np.float16(0.1))]]


def test_distortion_columns_are_ignored(raw):
    """The fixture's k1 of -0.25 would move corner pixels by tens of px; the published images have no distortion."""
    source = SOURCE(raw)
    sample = source.load(frame_of(source, "ring_rear_left"))
    _, expected, _ = street(view("ring_rear_left", IMAGE_TIMES["ring_rear_left"][0]))
    assert sample.depth[0, 0] == pytest.approx(expected[0, 0], abs=2 * HALF_STEP) and expected[0, 0] > 0


def test_exact_pose_lookup_takes_no_neighbour_some_ns_off(raw):
    source = SOURCE(raw)
    path = f"train/{LOG}/city_SE3_egovehicle.feather"
    for time in SWEEP_TIMES:
        assert np.allclose(source.pose(path, "timestamp_ns", time), city_from_ego(time), atol=1e-9)
        neighbour = city_from_ego(time) @ transform(turn(0), (3, 0, 0))
        assert np.allclose(source.pose(path, "timestamp_ns", time + 1), neighbour, atol=1e-9)


def test_missing_pose_is_a_bad_frame(raw):
    path = raw / "train" / LOG / "city_SE3_egovehicle.feather"
    table = pyarrow.feather.read_table(path)
    keep = [t != IMAGE_TIMES["ring_front_center"][0] for t in table["timestamp_ns"].to_pylist()]
    pyarrow.feather.write_feather(table.filter(pa.array(keep)), path)
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match=f"timestamp_ns {IMAGE_TIMES['ring_front_center'][0]}"):
        load_row(source, "train", frame_of(source, "ring_front_center"))
    source.load(frame_of(source, "ring_front_center", 1))


def test_stereo_rows_are_optional(tmp_path):
    write_log(tmp_path, stereo_rows=False)
    source = SOURCE(tmp_path)
    assert source.load(frame_of(source, "ring_rear_left")).depth.any()


def test_annotations_are_not_needed(raw):
    """The test split has none; the fixture writes none."""
    assert not list(raw.rglob("annotations.feather"))


def test_two_points_on_one_pixel_nearest_wins(raw):
    camera = "ring_front_center"
    time, size = IMAGE_TIMES[camera][0], SIZES[camera]
    fx, fy, cx, cy = INTRINSICS[camera]
    on_axis = np.array([[(20 - cx) / fx * z, (30 - cy) / fy * z, z] for z in (6.0, 5.0, 8.0)])
    in_city = move(view(camera, time).world_from_camera, on_axis)
    in_ego = move(np.linalg.inv(city_from_ego(SWEEP_TIMES[0])), in_city)
    write_sweep(raw / "train" / LOG / f"sensors/lidar/{SWEEP_TIMES[0]}.feather", in_ego)
    source = SOURCE(raw)
    depth = source.load(frame_of(source, camera)).depth
    assert np.argwhere(depth).tolist() == [[30, 20]] and depth.shape == size[::-1]
    assert depth[30, 20] == pytest.approx(5.0, abs=HALF_STEP)


def test_nearest_sweep():
    times = [0, 100, 200]
    assert [nearest(times, t) for t in (-500, 49, 50, 51, 100, 149, 151, 900)] == [0, 0, 0, 100, 100, 100, 200, 200]
    assert nearest([], 5) is None


@pytest.mark.parametrize(("gap_ms", "ok"), [(51, True), (52, False), (-51, True), (-52, False)])
def test_closest_sweep_within_51_ms(raw, gap_ms, ok):
    camera = "ring_front_center"
    folder = raw / "train" / LOG
    (folder / f"sensors/lidar/{SWEEP_TIMES[1]}.feather").unlink()
    time = SWEEP_TIMES[0] + gap_ms * 1_000_000
    poses = pyarrow.feather.read_table(folder / "city_SE3_egovehicle.feather").to_pydict()
    poses["timestamp_ns"][0] = time
    write_table(folder / "city_SE3_egovehicle.feather", **poses)
    (folder / f"sensors/cameras/{camera}/{time}.jpg").write_bytes(image_bytes(SIZES[camera]))
    source = SOURCE(raw)
    frame = next(f for f in source.frames("train") if f.id == f"{LOG}/{camera}/{time}")
    if ok:
        source.load(frame)
    else:
        with pytest.raises(BadFrame, match="no lidar sweep within 51 ms"):
            load_row(source, "train", frame)


def test_log_without_sweeps_is_listed_and_refused(raw):
    for path in (raw / "train" / LOG / "sensors/lidar").iterdir():
        path.unlink()
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="no lidar sweep"):
        load_row(source, "train", frame_of(source, "ring_front_center"))


def test_image_of_another_size_is_refused(raw):
    camera = "ring_front_center"
    path = raw / "train" / LOG / f"sensors/cameras/{camera}/{IMAGE_TIMES[camera][0]}.jpg"
    Image.new("RGB", (205, 155)).save(path)
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="intrinsics"):
        load_row(source, "train", frame_of(source, camera))


@pytest.mark.parametrize("file", ["calibration/intrinsics.feather", "sensors/lidar/{sweep}.feather"])
@pytest.mark.parametrize("content", [b"", b"not a table", None])
def test_broken_tables_are_listed(raw, file, content):
    path = raw / "train" / LOG / file.format(sweep=SWEEP_TIMES[0])
    if content is None:
        write_table(path, something=[1, 2])
    else:
        path.write_bytes(content)
    source = SOURCE(raw)
    expected = "No match for FieldRef" if content is None else path.name
    assert expected in reason(source, frame_of(source, "ring_front_center"))


def test_nan_and_infinite_points_are_no_measurement(raw):
    write_sweep(raw / "train" / LOG / f"sensors/lidar/{SWEEP_TIMES[0]}.feather", [[np.nan, 0, 0], [np.inf, 1, 1]])
    source = SOURCE(raw)
    assert not source.load(frame_of(source, "ring_front_center")).depth.any()


def test_a_link_out_of_the_raw_folder_is_refused(raw, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.feather"
    path = raw / "train" / LOG / f"sensors/lidar/{SWEEP_TIMES[0]}.feather"
    path.rename(outside)
    path.symlink_to(outside)
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="link"):
        load_row(source, "train", frame_of(source, "ring_front_center"))
