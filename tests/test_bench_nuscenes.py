"""nuScenes: tables and files written in the set's format from an analytic street, read back."""

import json
import random
import tracemalloc

import numpy as np
import pytest
from bench_fixtures_lidar import LOOK_FORWARD, View, image_bytes, move, street, transform, turn, wxyz
from PIL import Image

from bench.build import load_row
from bench.sources._base import BadFrame, BadRaw
from bench.sources.nuscenes import CAMERAS, SOURCE

TABLES = (
    "category attribute visibility instance sensor calibrated_sensor ego_pose log scene sample sample_data "
    "sample_annotation map"
).split()
SIZE = (160, 90)
INTRINSICS = {"CAM_FRONT": (126.6, 126.4, 81.6, 49.1), "CAM_BACK": (80.9, 80.8, 79.9, 45.2)}
EGO_SENSOR = {
    "CAM_FRONT": transform(turn(0.3, 0.5, 0.2) * LOOK_FORWARD, (1.7, 0, 1.5)),
    "CAM_BACK": transform(turn(179, -0.5, 0.3) * LOOK_FORWARD, (0, 0, 1.5)),
    # The lidar's y points forward.
    "LIDAR_TOP": transform(turn(-90, 0.4, -0.2), (0.9, 0, 1.8)),
}
DELAY = {"CAM_FRONT": -20_000, "CAM_BACK": 35_000, "LIDAR_TOP": 0}
START = 1_532_402_927_647_951


def global_from_ego(time: int) -> np.ndarray:
    """The car drives at 18 m/s and turns by 20 degrees a second."""
    seconds = (time - START) / 1e6
    return transform(turn(110 + 20 * seconds), (411.3 + 16 * seconds, 1180.9 - 8 * seconds, 0))


def view(channel: str, sample_time: int) -> View:
    return View(global_from_ego(sample_time + DELAY[channel]) @ EGO_SENSOR[channel], INTRINSICS[channel], SIZE)


def write_sweep(path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.c_[points, np.full(len(points), 7.0), np.arange(len(points)) % 32]
    rows.astype("<f4").tofile(path)


def write_scenes(root, version, scenes, indent=0):
    """Scenes of two samples, cameras CAM_FRONT and CAM_BACK, and a non-keyframe of each channel between them."""
    rows = {table: [] for table in TABLES}
    for channel in EGO_SENSOR:
        modality = "lidar" if channel == "LIDAR_TOP" else "camera"
        rows["sensor"].append({"token": f"sensor-{channel}", "channel": channel, "modality": modality})
    for scene, start in scenes.items():
        for channel, matrix in EGO_SENSOR.items():
            fx, fy, cx, cy = INTRINSICS.get(channel, (0, 0, 0, 0))
            k = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] if channel in INTRINSICS else []
            pose = {"translation": matrix[:3, 3].tolist(), "rotation": wxyz(matrix)}
            token = {"token": f"calibrated-{scene}-{channel}", "sensor_token": f"sensor-{channel}"}
            rows["calibrated_sensor"].append({**token, **pose, "camera_intrinsic": k})
        for i in range(2):
            time = start + 500_000 * i
            sample = {"token": f"sample-{scene}-{i}", "timestamp": time, "scene_token": f"scene-{scene}"}
            rows["sample"].append({**sample, "next": "", "prev": ""})
            points = []
            for channel in EGO_SENSOR:
                folder, suffix = ("samples", ".pcd.bin" if channel == "LIDAR_TOP" else ".jpg")
                for is_key_frame in (True, False):
                    own_time = time + DELAY[channel] + (0 if is_key_frame else 83_000)
                    name = f"{folder if is_key_frame else 'sweeps'}/{channel}/{scene}__{own_time}{suffix}"
                    token = f"{scene}-{channel}-{own_time}"
                    pose = global_from_ego(own_time)
                    pose = {"translation": pose[:3, 3].tolist(), "rotation": wxyz(pose)}
                    rows["ego_pose"].append({"token": f"ego-{token}", **pose, "timestamp": own_time})
                    width, height = SIZE if channel in INTRINSICS else (0, 0)
                    rows["sample_data"].append(
                        {
                            **{"token": token, "sample_token": sample["token"], "ego_pose_token": f"ego-{token}"},
                            **{"calibrated_sensor_token": f"calibrated-{scene}-{channel}", "timestamp": own_time},
                            **{"filename": name, "fileformat": suffix[1:], "width": width, "height": height},
                            **{"is_key_frame": is_key_frame, "next": "", "prev": ""},
                        }
                    )
                if channel in INTRINSICS:
                    points.append(street(view(channel, time))[0])
                    path = root / f"samples/{channel}/{scene}__{time + DELAY[channel]}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(image_bytes(SIZE))
            lidar = global_from_ego(time) @ EGO_SENSOR["LIDAR_TOP"]
            sweep = move(np.linalg.inv(lidar), np.concatenate(points))
            write_sweep(root / f"samples/LIDAR_TOP/{scene}__{time}.pcd.bin", sweep)
        rows["scene"].append({"token": f"scene-{scene}", "name": scene, "nbr_samples": 2})
    for table, content in rows.items():
        random.Random(0).shuffle(content)
        write_table(root, version, table, content, indent)


def write_table(root, version, table, content, indent=0):
    (root / version).mkdir(exist_ok=True)
    (root / version / f"{table}.json").write_text(json.dumps(content, indent=indent))


def edit_table(root, table, change, version="v1.0-trainval"):
    content = json.loads((root / version / f"{table}.json").read_text())
    change(content)
    write_table(root, version, table, content)


@pytest.fixture
def raw(tmp_path):
    write_scenes(tmp_path, "v1.0-trainval", {"scene-0002": START + 9_000_000, "scene-0001": START})
    write_scenes(tmp_path, "v1.0-test", {"scene-0077": START + 30_000_000})
    return tmp_path


def frame_of(source, camera, index=0):
    return [f for f in source.frames("train") if f.camera == camera][index]


@pytest.mark.parametrize("camera", INTRINSICS)
@pytest.mark.parametrize("index", [0, 1])
def test_ego_motion_compensated_depth_of_an_analytic_street(raw, camera, index):
    """Three ego poses a sample: the lidar's and one of each camera, up to 0.7 m and 0.8 degrees apart."""
    source = SOURCE(raw)
    sample = source.load(frame_of(source, camera, index))
    _, expected, _ = street(view(camera, START + 500_000 * index))
    assert sample.depth.dtype == np.float32 and sample.depth.shape == (90, 160)
    assert np.array_equal(sample.depth > 0, expected > 0)
    assert np.abs(sample.depth - expected).max() < 1e-4
    assert sample.intrinsics == INTRINSICS[camera]
    assert sample.image == image_bytes(SIZE)


def test_hidden_points_are_kept_on_request(raw):
    source = SOURCE(raw, remove_hidden=False)
    _, expected, hidden = street(view("CAM_FRONT", START))
    assert np.abs(source.load(frame_of(source, "CAM_FRONT")).depth - expected - hidden).max() < 1e-4


def test_all_thirteen_tables_are_in_the_fixture(raw):
    assert len(list((raw / "v1.0-trainval").glob("*.json"))) == 13


def test_frames_are_sorted_and_splits_are_the_versions(raw):
    source = SOURCE(raw)
    times = {"scene-0001": START, "scene-0002": START + 9_000_000}
    expected = [f"{s}/{c}/{t + 500_000 * i}" for s, t in times.items() for c in CAMERAS for i in (0, 1)]
    assert [f.id for f in source.frames("train")] == expected
    assert {f.scene for f in source.frames("test")} == {"scene-0077"}


def test_non_keyframe_ignored(raw):
    """Rows between keyframes name files in sweeps/, which the fixture does not even write."""
    assert not (raw / "sweeps").exists()
    frames = [f for f in SOURCE(raw).frames("train") if f.camera in INTRINSICS]
    assert len(frames) == 2 * 2 * 2 and all("sweeps" not in str(f.data) for f in frames)


def test_quaternion_order(raw):
    """Scalar first: a table with the scalar last would be another rotation, not an error."""

    def change(content):
        for row in content:
            w, x, y, z = row["rotation"]
            row["rotation"] = [x, y, z, w]

    edit_table(raw, "calibrated_sensor", change)
    source = SOURCE(raw)
    _, expected, _ = street(view("CAM_FRONT", START))
    assert not np.array_equal(source.load(frame_of(source, "CAM_FRONT")).depth > 0, expected > 0)


def test_points_have_five_columns(raw):
    path = raw / f"samples/LIDAR_TOP/scene-0001__{START}.pcd.bin"
    path.write_bytes(path.read_bytes()[:-4])
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="not whole points of 5 float32"):
        load_row(source, "train", frame_of(source, "CAM_FRONT"))


def test_two_points_on_one_pixel_nearest_wins(raw):
    fx, fy, cx, cy = INTRINSICS["CAM_FRONT"]
    ray = np.array([(20 - cx) / fx, (30 - cy) / fy, 1])
    in_global = move(view("CAM_FRONT", START).world_from_camera, np.array([6 * ray, 5 * ray, 8 * ray]))
    lidar = global_from_ego(START) @ EGO_SENSOR["LIDAR_TOP"]
    write_sweep(raw / f"samples/LIDAR_TOP/scene-0001__{START}.pcd.bin", move(np.linalg.inv(lidar), in_global))
    source = SOURCE(raw)
    depth = source.load(frame_of(source, "CAM_FRONT")).depth
    assert np.argwhere(depth).tolist() == [[30, 20]]
    assert depth[30, 20] == pytest.approx(5, abs=1e-4)


def test_depth_is_z_not_ray_distance(raw):
    source = SOURCE(raw)
    _, expected, _ = street(view("CAM_BACK", START))
    corner = np.linalg.norm([79.9 / 80.9, 45.2 / 80.8, 1])
    depth = source.load(frame_of(source, "CAM_BACK")).depth
    assert corner > 1.5 and depth[0, 0] == pytest.approx(expected[0, 0], abs=1e-4)


def test_cameras_that_a_sample_lacks_are_listed_and_refused(raw):
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="sample sample-scene-0001-0 has no usable CAM_BACK_LEFT"):
        load_row(source, "train", frame_of(source, "CAM_BACK_LEFT"))


def test_missing_files_are_errors(raw):
    (raw / f"samples/LIDAR_TOP/scene-0001__{START}.pcd.bin").unlink()
    source = SOURCE(raw)
    with pytest.raises(FileNotFoundError):
        load_row(source, "train", frame_of(source, "CAM_FRONT"))
    (raw / "v1.0-trainval/ego_pose.json").unlink()
    with pytest.raises(BadRaw, match="v1.0-trainval/ego_pose.json"):
        list(source.frames("train"))


@pytest.mark.parametrize("indent", [None, 0, 4])
def test_tables_in_any_layout(tmp_path, indent):
    write_scenes(tmp_path, "v1.0-trainval", {"scene-0001": START}, indent)
    assert len(list(SOURCE(tmp_path).frames("train"))) == 12


def test_rows_are_those_of_the_table(raw):
    rows = [{"token": str(i), "nested": [[i, 2.5], {"a": "]},{ \u00e9"}], "e": []} for i in range(50)]
    write_table(raw, "v1.0-trainval", "log", rows)
    assert list(SOURCE(raw).rows("v1.0-trainval", "log")) == rows


def test_a_large_table_takes_little_memory(raw):
    with (raw / "v1.0-trainval/ego_pose.json").open("w") as file:
        file.write("[\n")
        for i in range(20_000):
            file.write(f'{{\n"token": "{i:032x}",\n"rotation": [1.0, 0.0, 0.0, 0.0],\n"translation": [0, 0, 0]\n}},\n')
        file.write('{"token": "last"}]')
    tracemalloc.start()
    assert sum(1 for _ in SOURCE(raw).rows("v1.0-trainval", "ego_pose")) == 20_001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


@pytest.mark.parametrize("text", ["", "[", "[ROW", '[{"token": ', "[{]", "[ROW, x]"])
def test_broken_table_is_refused(raw, text):
    row = '{"token": "scene-scene-0001", "name": "scene-0001"}'
    (raw / "v1.0-trainval/scene.json").write_text(text.replace("ROW", row))
    with pytest.raises(BadRaw, match="scene.json"):
        list(SOURCE(raw).frames("train"))


def test_row_without_end_is_refused(raw):
    (raw / "v1.0-trainval/scene.json").write_text('[{"name": "' + "x" * 10_000)
    with pytest.raises(BadRaw, match="scene.json"):
        list(SOURCE(raw).frames("train"))


def test_rows_that_lack_a_field_or_name_a_missing_row_are_refused(raw):
    edit_table(raw, "scene", lambda content: content[0].pop("token"))
    with pytest.raises(BadRaw, match="KeyError"):
        list(SOURCE(raw).frames("train"))


def test_missing_ego_pose_is_a_bad_frame(raw):
    token = f"ego-scene-0001-CAM_FRONT-{START + DELAY['CAM_FRONT']}"
    edit_table(raw, "ego_pose", lambda content: content.remove(next(r for r in content if r["token"] == token)))
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match=token):
        load_row(source, "train", frame_of(source, "CAM_FRONT"))
    source.load(frame_of(source, "CAM_BACK"))


@pytest.mark.parametrize("key", ["rotation", "translation", "camera_intrinsic"])
@pytest.mark.parametrize(
    "value", [[], None, "x", [0.0, 0.0, 0.0], [[1, 5, 1], [0, 1, 1], [0, 0, 1]], [float("nan")] * 4]
)
def test_impossible_calibration_is_a_bad_frame(raw, key, value):
    if key == "translation" and value == [0.0, 0.0, 0.0]:
        value = [float("inf"), 0.0, 0.0]
    edit_table(raw, "calibrated_sensor", lambda content: [row.update({key: value}) for row in content])
    source = SOURCE(raw)
    with pytest.raises((BadFrame, BadRaw)):  # NaN and Infinity are not JSON
        load_row(source, "train", frame_of(source, "CAM_FRONT"))


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "samples/../../secret"])
def test_file_outside_the_raw_folder_is_refused(raw, name):
    edit_table(raw, "sample_data", lambda content: [row.update(filename=name) for row in content])
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="leads out"):
        load_row(source, "train", frame_of(source, "CAM_FRONT"))


def test_resized_image_is_refused(raw):
    Image.new("RGB", (80, 45)).save(raw / f"samples/CAM_FRONT/scene-0001__{START + DELAY['CAM_FRONT']}.jpg")
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="use the set's own image"):
        load_row(source, "train", frame_of(source, "CAM_FRONT"))


def test_nan_and_infinite_points_are_no_measurement(raw):
    write_sweep(
        raw / f"samples/LIDAR_TOP/scene-0001__{START}.pcd.bin", [[np.nan, 0, 0], [np.inf, 1, 1], [0, -np.inf, 0]]
    )
    source = SOURCE(raw)
    assert not source.load(frame_of(source, "CAM_FRONT")).depth.any()
