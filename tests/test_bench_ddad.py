"""DDAD: scenes written in the set's format from an analytic street, read back."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bench_fixtures_lidar import LOOK_FORWARD, View, image_bytes, move, street, transform, turn, wxyz
from PIL import Image

from bench.build import load_row
from bench.sources._base import BadFrame, BadRaw
from bench.sources.ddad import CAMERAS, SOURCE, read_cloud, read_pose

SIZES = {"CAMERA_01": (194, 122), "CAMERA_09": (194, 122)}
INTRINSICS = {"CAMERA_01": (216.8, 215.9, 96.3, 60.9), "CAMERA_09": (105.9, 106.2, 97.1, 61.3)}
VEHICLE_SENSOR = {
    "CAMERA_01": transform(turn(0, 1, 0.5) * LOOK_FORWARD, (1.7, 0, 1.5)),
    "CAMERA_09": transform(turn(178, -1, 0.5) * LOOK_FORWARD, (-0.4, 0, 1.6)),
}
# Seconds after the cloud at which each camera fires.
DELAY = {"CAMERA_01": 0.03, "CAMERA_09": -0.02}
CALIBRATION = "c" * 40


def world_from_vehicle(seconds: float) -> np.ndarray:
    return transform(turn(-40 + 15 * seconds, 0.5, -1), (300 + 18 * seconds, 80 - 9 * seconds, 3))


def view(camera: str, sample: int) -> View:
    vehicle = world_from_vehicle(0.1 * sample + DELAY[camera])
    return View(vehicle @ VEHICLE_SENSOR[camera], INTRINSICS[camera], SIZES[camera])


def pose_message(matrix: np.ndarray) -> dict:
    w, x, y, z = wxyz(matrix)
    tx, ty, tz = map(float, matrix[:3, 3])
    return {"translation": {"x": tx, "y": ty, "z": tz}, "rotation": {"qw": w, "qx": x, "qy": y, "qz": z}}


def write_cloud(path, points, dtype=np.float64):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, data=np.c_[points, np.zeros(len(points))].astype(dtype))


def write_scene(root, scene: str, samples: int = 2, dtype=np.float64) -> str:
    """A scene of two cameras, fired at their own times, and the merged cloud; -> its file name."""
    folder, data = root / scene, []
    content = {"name": "test", "samples": [], "data": data}
    for i in range(samples):
        points = []
        for camera in SIZES:
            path = folder / f"rgb/{camera}/{15_000_000 + i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(SIZES[camera], "PNG"))
            points.append(street(view(camera, i))[0])
            width, height = SIZES[camera]
            image = {"filename": str(path.relative_to(folder)), "width": width, "height": height, "channels": 3}
            image["pose"] = pose_message(view(camera, i).world_from_camera)
            data.append({"id": {"name": camera}, "key": f"{camera}-{i}", "datum": {"image": image}})
        vehicle = world_from_vehicle(0.1 * i)
        write_cloud(folder / f"point_cloud/LIDAR/{i}.npz", move(np.linalg.inv(vehicle), np.concatenate(points)), dtype)
        cloud = {"filename": f"point_cloud/LIDAR/{i}.npz", "point_format": ["X", "Y", "Z", "INTENSITY"]}
        cloud["pose"] = pose_message(vehicle)
        # The set's own tools compare names without case.
        data.append({"id": {"name": "lidar"}, "key": f"lidar-{i}", "datum": {"point_cloud": cloud}})
        keys = [f"{name}-{i}" for name in ("lidar", "CAMERA_09", "CAMERA_01")]
        time = f"2019-05-08T15:21:00.{i}00Z"
        content["samples"].append(
            {"id": {"index": str(i), "timestamp": time}, "datum_keys": keys, "calibration_key": CALIBRATION}
        )
    names = ["LIDAR", "camera_09", "CAMERA_01"]
    calibration = {"names": names, "intrinsics": [{}], "extrinsics": [pose_message(np.eye(4))]}
    for name in ("CAMERA_09", "CAMERA_01"):
        calibration["intrinsics"].append(dict(zip(("fx", "fy", "cx", "cy"), INTRINSICS[name], strict=True)))
        calibration["extrinsics"].append(pose_message(VEHICLE_SENSOR[name]))
    (folder / "calibration").mkdir(exist_ok=True)
    (folder / f"calibration/{CALIBRATION}.json").write_text(json.dumps(calibration))
    (folder / "scene_abc.json").write_text(json.dumps(content))
    return f"{scene}/scene_abc.json"


def write_index(root, train, val):
    splits = {"0": {"filenames": train}, "1": {"filenames": val}, "2": {}}
    (root / "ddad.json").write_text(json.dumps({"metadata": {"name": "DDAD"}, "scene_splits": splits}))


def edit_scene(root, change, scene="000000"):
    path = root / scene / "scene_abc.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def raw(tmp_path):
    write_index(tmp_path, [write_scene(tmp_path, "000000")], [write_scene(tmp_path, "000150", samples=1)])
    return tmp_path


def frame_of(source, camera, index=0):
    return [f for f in source.frames("train") if f.camera == camera][index]


@pytest.mark.parametrize("camera", SIZES)
@pytest.mark.parametrize("index", [0, 1])
def test_ego_motion_compensated_depth_of_an_analytic_street(raw, camera, index):
    source = SOURCE(raw)
    sample = source.load(frame_of(source, camera, index))
    _, expected, _ = street(view(camera, index))
    assert sample.depth.dtype == np.float32 and sample.depth.shape == (122, 194)
    assert np.array_equal(sample.depth > 0, expected > 0)
    assert np.abs(sample.depth - expected).max() < 1e-5
    assert sample.intrinsics == INTRINSICS[camera]
    assert sample.image == image_bytes(SIZES[camera], "PNG")


def test_hidden_points_are_kept_on_request(raw):
    source = SOURCE(raw, remove_hidden=False)
    _, expected, hidden = street(view("CAMERA_01", 0))
    assert np.abs(source.load(frame_of(source, "CAMERA_01")).depth - expected - hidden).max() < 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_float_type_of_cloud(tmp_path, dtype):
    write_index(tmp_path, [write_scene(tmp_path, "000000", dtype=dtype)], [])
    source = SOURCE(tmp_path)
    _, expected, _ = street(view("CAMERA_01", 0))
    assert np.abs(source.load(frame_of(source, "CAMERA_01")).depth - expected).max() < 1e-4


def test_splits_are_numbers_as_strings_and_frames_are_sorted(raw):
    write_scene(raw, "000007", samples=1)
    write_index(raw, [f"{scene}/scene_abc.json" for scene in ("000007", "000000")], ["000150/scene_abc.json"])
    source = SOURCE(raw)
    assert {f.scene for f in source.frames("test")} == {"000150"}
    ids = [f"000000/{c}/{i:06d}" for c in CAMERAS for i in (0, 1)] + [f"000007/{c}/000000" for c in CAMERAS]
    assert [f.id for f in source.frames("train")] == ids


def test_camera_numbers():
    assert CAMERAS == tuple(f"CAMERA_0{i}" for i in (1, 5, 6, 7, 8, 9))


def test_cameras_that_a_sample_lacks_are_listed_and_refused(raw):
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="sample 1 of 000000/scene_abc.json has no usable CAMERA_05"):
        load_row(source, "train", frame_of(source, "CAMERA_05", 1))


def test_omitted_defaults():
    """Golden: {"translation": {"x": 1.5}, "rotation": {"qw": 1.0}} means (1.5, 0, 0), identity."""
    expected = transform(turn(0), (1.5, 0, 0))
    assert np.array_equal(read_pose({"translation": {"x": 1.5}, "rotation": {"qw": 1.0}}, "a"), expected)
    assert np.array_equal(read_pose({"translation": {"x": 1.5}}, "a"), expected)
    assert np.array_equal(read_pose({"rotation": {}}, "a"), np.eye(4))
    half_turn = read_pose({"rotation": {"qz": 1.0}}, "a")
    assert np.allclose(half_turn, transform(turn(180), (0, 0, 0)))


def test_omitted_defaults_in_a_scene(raw):
    """A camera pose of nothing but a translation along y, and a cloud pose without any field."""

    def change(content):
        for datum in content["data"]:
            if "point_cloud" in datum["datum"]:
                datum["datum"]["point_cloud"]["pose"] = {}
            else:
                datum["datum"]["image"]["pose"] = {"translation": {"y": 2.0}}

    edit_scene(raw, change)
    write_cloud(raw / "000000/point_cloud/LIDAR/0.npz", [[0.0, 2.0, 9.0]])
    source = SOURCE(raw)
    depth = source.load(frame_of(source, "CAMERA_01")).depth
    assert np.argwhere(depth).tolist() == [[61, 96]] and depth[61, 96] == 9


def test_pose_that_is_absent_is_not_taken_for_identity(raw):
    edit_scene(raw, lambda content: content["data"][0]["datum"]["image"].pop("pose"))
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="KeyError.'pose'"):
        load_row(source, "train", frame_of(source, "CAMERA_01"))


def test_two_points_on_one_pixel_nearest_wins(raw):
    fx, fy, cx, cy = INTRINSICS["CAMERA_01"]
    ray = np.array([(20 - cx) / fx, (30 - cy) / fy, 1])
    in_world = move(view("CAMERA_01", 0).world_from_camera, np.array([6 * ray, 5 * ray, 8 * ray]))
    write_cloud(raw / "000000/point_cloud/LIDAR/0.npz", move(np.linalg.inv(world_from_vehicle(0)), in_world))
    source = SOURCE(raw)
    depth = source.load(frame_of(source, "CAMERA_01")).depth
    assert np.argwhere(depth).tolist() == [[30, 20]]
    assert depth[30, 20] == pytest.approx(5)


def test_depth_is_z_not_ray_distance(raw):
    source = SOURCE(raw)
    sample = source.load(frame_of(source, "CAMERA_09"))
    _, expected, _ = street(view("CAMERA_09", 0))
    corner = np.linalg.norm([96.9 / 105.9, 61.3 / 106.2, 1])
    assert corner > 1.3 and sample.depth[0, 0] == pytest.approx(expected[0, 0])


def test_missing_scene_file_is_listed(raw):
    (raw / "000000/scene_abc.json").unlink()
    source = SOURCE(raw)
    (frame,) = source.frames("train")
    with pytest.raises(BadFrame, match="000000/scene_abc.json is missing"):
        load_row(source, "train", frame)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scene_splits": {"0": {}}}', '{"scene_splits": {"0": 5}}'])
def test_index_that_lists_nothing_is_refused(raw, text):
    (raw / "ddad.json").write_text(text)
    with pytest.raises(BadRaw, match="ddad.json"):
        list(SOURCE(raw).frames("train"))


@pytest.mark.parametrize("name", ["../x/scene.json", "/etc/scene.json", "a/../b.json"])
def test_scene_outside_the_raw_folder_is_refused(raw, name):
    write_index(raw, [name], [])
    source = SOURCE(raw)
    (frame,) = source.frames("train")
    with pytest.raises(BadFrame, match="leads out"):
        load_row(source, "train", frame)


@pytest.mark.parametrize("kind", ["image", "point_cloud"])
@pytest.mark.parametrize("name", ["../000150/rgb/CAMERA_01/15000000.png", "/etc/passwd"])
def test_file_outside_the_scene_is_refused(raw, kind, name):
    def change(content):
        for datum in content["data"]:
            if kind in datum["datum"]:
                datum["datum"][kind]["filename"] = name

    edit_scene(raw, change)
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="leads out"):
        load_row(source, "train", frame_of(source, "CAMERA_01"))


def test_calibration_outside_the_scene_is_refused(raw):
    edit_scene(raw, lambda content: content["samples"][0].update(calibration_key=f"../../000150/{CALIBRATION}"))
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="leads out"):
        load_row(source, "train", frame_of(source, "CAMERA_01"))


def test_calibration_without_the_camera_or_with_skew_is_refused(raw):
    path = raw / f"000000/calibration/{CALIBRATION}.json"
    calibration = json.loads(path.read_text())
    source = SOURCE(raw)
    path.write_text(json.dumps({**calibration, "names": ["LIDAR", "CAMERA_09", "CAMERA_02"]}))
    with pytest.raises(BadFrame, match="no intrinsics of CAMERA_01"):
        load_row(source, "train", frame_of(source, "CAMERA_01"))
    calibration["intrinsics"][2]["skew"] = 3.0
    path.write_text(json.dumps(calibration))
    with pytest.raises(BadFrame, match="skew"):
        load_row(source, "train", frame_of(source, "CAMERA_01"))


def test_resized_image_is_refused(raw):
    Image.new("RGB", (97, 61)).save(raw / "000000/rgb/CAMERA_01/15000000.png")
    source = SOURCE(raw)
    with pytest.raises(BadFrame, match="use the set's own image"):
        load_row(source, "train", frame_of(source, "CAMERA_01"))


def npz(npy: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", npy)
    return file.getvalue()


def npy(array, **header) -> bytes:
    file = io.BytesIO()
    fields = {**np.lib.format.header_data_from_array_1_0(np.asarray(array)), **header}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue() + np.asarray(array).tobytes()


def test_fortran_order_is_read():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    content = npz(npy(array, fortran_order=True)[:-48] + array.T.tobytes())
    assert np.array_equal(read_cloud(content, "x.npz"), array[:, :3])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK not a zip",
        npz(b""),
        npz(b"\x93NUMPY\x09\x09"),
        npz(npy(np.zeros(4))),
        npz(npy(np.zeros((2, 4)), shape=(-2, -4))),
        npz(npy(np.zeros((2, 4)), descr="|O")),
    ],
)
def test_cloud_that_is_no_array_of_points_is_refused(content):
    with pytest.raises(BadFrame, match="x.npz"):
        read_cloud(content, "x.npz")


def test_pickled_cloud_is_refused():
    file = io.BytesIO()
    np.savez(file, data=np.array([[{}, 1, 2, 3]], dtype=object))
    with pytest.raises(BadFrame, match="x.npz"):
        read_cloud(file.getvalue(), "x.npz")


# A real sample: DGP's test scene, in DDAD's format


def rotation(qw, qx, qy, qz) -> np.ndarray:
    """The columns are the turned axes, each q e q* written out."""
    return np.array(
        [
            [qw * qw + qx * qx - qy * qy - qz * qz, 2 * (qx * qy - qw * qz), 2 * (qx * qz + qw * qy)],
            [2 * (qx * qy + qw * qz), qw * qw - qx * qx + qy * qy - qz * qz, 2 * (qy * qz - qw * qx)],
            [2 * (qx * qz - qw * qy), 2 * (qy * qz + qw * qx), qw * qw - qx * qx - qy * qy + qz * qz],
        ]
    )


def project(camera: str, scene: dict, calibration: dict, points: np.ndarray):
    """u, v and z of lidar points in the last sample's image, by one pose after the other."""
    keys = scene["samples"][-1]["datum_keys"]
    datums = {datum["id"]["name"]: datum["datum"] for datum in scene["data"] if datum["key"] in keys}
    to_world, from_world = datums["LIDAR"]["point_cloud"]["pose"], datums[camera]["image"]["pose"]
    world = points @ rotation(**to_world["rotation"]).T + list(to_world["translation"].values())
    x, y, z = ((world - list(from_world["translation"].values())) @ rotation(**from_world["rotation"])).T
    k = calibration["intrinsics"][calibration["names"].index(camera)]
    return k["fx"] * x / z + k["cx"], k["fy"] * y / z + k["cy"], z


def test_real_scene_of_dgp(tmp_path):
    """Every pixel against the chain of poses restated above. The car stands: its motion is tested on the street."""
    shutil.copytree(Path(__file__).parent / "data/dgp", tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob("scene_01/scene_*.json")
    write_index(tmp_path, [f"scene_01/{file.name}"], [])
    source = SOURCE(tmp_path, remove_hidden=False)
    frame = next(frame for frame in source.frames("train") if frame.id == "scene_01/CAMERA_05/000002")
    sample = source.load(frame)

    (calibration,) = tmp_path.glob("scene_01/calibration/*.json")
    (cloud,) = tmp_path.glob("scene_01/point_cloud/LIDAR/*.npz")
    calibration, points = json.loads(calibration.read_text()), np.load(cloud)["data"][:, :3]
    u, v, z = project("CAMERA_05", json.loads(file.read_text()), calibration, points)
    nearest = {}
    for column, row, depth in zip(np.floor(u + 0.5), np.floor(v + 0.5), z, strict=True):
        if depth > 0 and 0 <= column < 1936 and 0 <= row < 1216:
            nearest[row, column] = min(depth, nearest.get((row, column), np.inf))
    rows, columns = np.nonzero(sample.depth)
    assert set(zip(rows, columns, strict=True)) == set(nearest) and len(nearest) > 10_000
    expected = [nearest[pixel] for pixel in zip(rows, columns, strict=True)]
    np.testing.assert_allclose(sample.depth[rows, columns], expected, rtol=1e-6)
    assert sample.intrinsics == pytest.approx([calibration["intrinsics"][2][key] for key in ("fx", "fy", "cx", "cy")])
    assert Image.open(io.BytesIO(sample.image)).size == (1936, 1216)

    visible = SOURCE(tmp_path).load(frame).depth
    assert 0.9 < np.count_nonzero(visible) / len(nearest) < 1
    assert (visible == np.where(visible > 0, sample.depth, 0)).all()


def test_nan_and_infinite_points_are_no_measurement(raw):
    write_cloud(raw / "000000/point_cloud/LIDAR/0.npz", [[np.nan, 0, 0], [np.inf, 1, 1], [0, 0, -np.inf]])
    source = SOURCE(raw)
    assert not source.load(frame_of(source, "CAMERA_01")).depth.any()
