import numpy as np
import pytest
from bench_fixtures_indoor import picture, plane_depth, plane_error, png16, put

from bench.build import load_row
from bench.sources._base import BadFrame, BadRaw, pinhole
from bench.sources.matterport3d import Matterport3D, read_conf

SCAN, PANO = "17DRP5sb8fy", "0f37bd0737e349de9d536263a4bdd60d"
CAMERAS = {0: (1076.45, 631.0, 514.0), 1: (1074.56, 640.0, 515.0)}  # focal, cx, cy from the top
POSE = "1 0 0 5.5  0 -1 0 2  0 0 -1 1.5  0 0 0 1"  # OpenGL axes
CONF = f"{SCAN}/undistorted_camera_parameters/{SCAN}.conf"
JPEG = picture(1280, 1024, "JPEG")


def scan_line(camera, yaw, pano=PANO):
    return f"scan {pano}_d{camera}_{yaw}.png {pano}_i{camera}_{yaw}.jpg {POSE}"


def conf(*lines):
    head = ["dataset matterport", f"n_images {sum(line.startswith('scan') for line in lines)}"]
    head += ["depth_directory undistorted_depth_images", "color_directory undistorted_color_images", ""]
    return "\n".join([*head, *lines, ""])


def matrix(camera):
    focal, cx, cy = CAMERAS[camera]
    return f"intrinsics_matrix {focal} 0 {cx}  0 {focal} {1023 - cy}  0 0 1"  # which counts from the bottom


@pytest.fixture
def root(tmp_path):
    """Yaw 1 of camera 0 has no depth file."""
    put(tmp_path / "scenes_train.txt", f"{SCAN}\n")
    put(tmp_path / CONF, conf(matrix(1), scan_line(1, 5), matrix(0), scan_line(0, 2), scan_line(0, 1)))
    for camera, yaw in ((1, 5), (0, 2), (0, 1)):
        put(tmp_path / SCAN / f"undistorted_color_images/{PANO}_i{camera}_{yaw}.jpg", JPEG)
        if yaw != 1:
            focal, cx, cy = CAMERAS[camera]
            words = np.round(plane_depth(1280, 1024, focal, cx + 0.5, cy + 0.5) * 4000)
            words[0, :3] = 0
            words[1, :2] = 4000, 65535
            put(tmp_path / SCAN / f"undistorted_depth_images/{PANO}_d{camera}_{yaw}.png", png16(words))
    return tmp_path


def failures(root):
    """Frame id -> why it cannot be loaded, of the frames that cannot."""
    source, found = Matterport3D(root), {}
    for frame in source.frames("train"):
        try:
            load_row(source, "train", frame)
        except (BadFrame, OSError) as error:
            found[frame.id] = str(error)
    return found


def test_frames_are_sorted_whatever_the_order_in_the_conf(root):
    frames = list(Matterport3D(root).frames("train"))
    assert [frame.id for frame in frames] == [f"{SCAN}/{PANO}_i{view}" for view in ("0_1", "0_2", "1_5")]
    assert [frame.camera for frame in frames] == ["i0", "i0", "i1"]


def test_depth_and_golden_words(root):
    source = Matterport3D(root)
    for frame in list(source.frames("train"))[1:]:
        sample = source.load(frame)
        assert sample.image == JPEG and sample.depth.dtype == np.float32
        assert sample.depth[0, :3].tolist() == [0, 0, 0]
        assert sample.depth[1, :2] == pytest.approx([1.0, 65535 / 4000])
        sample.depth[1, :2] = 0
        assert plane_error(sample.depth, sample.intrinsics) < 1 / 4000


def test_facts():
    assert (Matterport3D.depth_range, Matterport3D.depth_scale) == ((0.01, 10.0), 4000.0)
    assert Matterport3D.max_canonical_edge is None and Matterport3D.splits == {"train": ("train",)}


def test_trap_intrinsics_are_of_the_nearest_preceding_line(root):
    source = Matterport3D(root)
    _, second, third = source.frames("train")
    assert source.load(second).intrinsics == (1076.45, 1076.45, 631.0, 514.0)
    assert source.load(third).intrinsics == (1074.56, 1074.56, 640.0, 515.0)


def test_trap_cy_counts_from_the_bottom(root):
    """A line of a released .conf, and the same camera in matterport_camera_intrinsics: w h fx fy cx cy."""
    raw = "1280 1024 1076.45 1077.19 631.116 513.798"
    put(root / CONF, conf("intrinsics_matrix 1076.45 0 631.116  0 1077.19 509.202  0 0 1", scan_line(0, 2)))
    source = Matterport3D(root)
    expected = tuple(map(float, raw.split()[2:]))
    assert source.load(next(source.frames("train"))).intrinsics == pytest.approx(expected, abs=1e-9)


def test_trap_double_blanks_tabs_and_line_ends():
    text = conf("intrinsics_matrix  1000\t0 640   0 1001 512   0 0 1", scan_line(2, 0)).replace("\n", "\r\n")
    count, [(number, files, numbers)] = read_conf(text)
    assert (count, number) == ("1", 7)
    assert pinhole(numbers, "intrinsics_matrix") == (1000.0, 1001.0, 640.0, 512.0)
    assert files == f"{PANO}_d2_0.png {PANO}_i2_0.jpg"


def test_trap_missing_depth_file_is_listed_and_does_not_load(root):
    [(name, why)] = failures(root).items()
    assert name == f"{SCAN}/{PANO}_i0_1" and f"{PANO}_d0_1.png" in why


@pytest.mark.parametrize("depth", [f"{PANO}_d0_1", f"{PANO}_d1_2", f"{PANO[::-1]}_d0_2", f"{PANO}_i0_2"])
def test_trap_depth_and_colour_of_different_views_are_refused(root, depth):
    put(root / CONF, conf(matrix(0), f"scan {depth}.png {PANO}_i0_2.jpg {POSE}"))
    assert "not the depth and colour image of one view" in failures(root)[f"{SCAN}/line_7"]


@pytest.mark.parametrize(
    "bad, why",
    [
        ("", "the intrinsics_matrix of"),
        ("intrinsics_matrix 1 2 3", "the intrinsics_matrix of"),
        ("intrinsics_matrix nan 0 1 0 1 1 0 0 1", "not finite with fx, fy > 0"),
        ("intrinsics_matrix x", "the intrinsics_matrix of"),
    ],
)
def test_scan_without_valid_intrinsics_takes_no_earlier_ones(root, bad, why):
    lines = [bad, scan_line(0, 2)] if not bad else [matrix(1), bad, scan_line(0, 2)]
    put(root / CONF, conf(*lines))
    assert why in failures(root)[f"{SCAN}/{PANO}_i0_2"]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", f"../{PANO}_d0_2.png"])
def test_hostile_paths_in_the_conf(root, name):
    put(root / CONF, conf(matrix(0), f"scan {name} {PANO}_i0_2.jpg {POSE}", "scan"))
    assert sorted(failures(root)) == [f"{SCAN}/line_7", f"{SCAN}/line_8"]


def test_conf_that_breaks_off_is_noticed(root):
    text = conf(matrix(0), scan_line(0, 2), scan_line(1, 5))
    put(root / CONF, text[: text.index(scan_line(1, 5))])
    assert "n_images '2', but has 1 scan lines" in failures(root)[f"{SCAN}/n_images"]


def test_resized_image_is_refused(root):
    put(root / SCAN / f"undistorted_color_images/{PANO}_i0_2.jpg", picture(640, 512, "JPEG"))
    assert "640x512" in failures(root)[f"{SCAN}/{PANO}_i0_2"]


def test_scan_that_was_not_downloaded_is_listed_once(root):
    put(root / "scenes_train.txt", f"{SCAN}\n1LXtFkjw3qL\n")
    assert "1LXtFkjw3qL.conf cannot be read" in failures(root)["1LXtFkjw3qL"]


def test_scene_list_may_lie_in_tasks_benchmark(root):
    put(root / "tasks/benchmark/scenes_train.txt", (root / "scenes_train.txt").read_bytes())
    (root / "scenes_train.txt").unlink()
    assert len(list(Matterport3D(root).frames("train"))) == 3


def test_missing_scene_list_says_where_it_comes_from(root):
    (root / "scenes_train.txt").unlink()
    with pytest.raises(BadRaw, match="tasks/benchmark of niessner/Matterport"):
        list(Matterport3D(root).frames("train"))


def test_hostile_path_in_the_scene_list(root):
    put(root / "scenes_train.txt", "../secret\n")
    assert "leads out" in failures(root)["../secret"]
