import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from bench_fixtures_sun import NYU_CROP, plane_and_box, rotated, write_allsplit, write_scene
from bench_fixtures_toy import reason

from bench.build import load_row
from bench.sources import nyuv2
from bench.sources._base import BadFrame, BadRaw
from bench.sources.nyuv2 import INTRINSICS, LABELED, SOURCE

ROOT = "/n/fs/sun3d/data/SUNRGBD/"
FULL = (640, 480)


def write_in_sun(raw, numbers=(1, 2), size=(40, 30), k=(37.1, 37.2, 20.3, 14.9)):
    for number in numbers:
        millimetres = np.rint(1000 * plane_and_box(size, k)).astype(int) + number
        write_scene(raw, f"kv1/NYUdata/NYU{number:04d}", millimetres, k, name=f"NYU{number:04d}")


def write_splits(raw, test, train=(1,)):
    column = {"testNdxs": np.array(test, float).reshape(-1, 1), "trainNdxs": np.array(train, float).reshape(-1, 1)}
    scipy.io.savemat(raw / "splits.mat", column)


def colours(number):
    """(480, 640, 3) uint8 whose rows, columns and channels all differ."""
    v, u = np.mgrid[: FULL[1], : FULL[0]]
    return np.stack([u % 256, v % 256, np.full_like(u, number)], axis=-1).astype(np.uint8)


def measured(number):
    depth = plane_and_box(FULL, INTRINSICS).astype(np.float32) + np.float32(number)
    depth[:100, :50], depth[-1] = 0, 10.0
    return depth


def write_labeled(raw, count=3, **other):
    """The file as MATLAB writes it: axes reversed, so (frame, channel, column, row)."""
    data = {
        "images": np.stack([colours(i + 1).T for i in range(count)]),
        "rawDepths": np.stack([measured(i + 1).T for i in range(count)]),
        "depths": np.full((count, *FULL), 7.5, np.float32),
    } | other
    with h5py.File(raw / LABELED, "w") as file:
        for name, values in data.items():
            file[name] = values


def one_labeled(raw, **other):
    write_labeled(raw, 1, **other)
    write_splits(raw, [1])
    return SOURCE(raw), next(SOURCE(raw).frames("test"))


def test_inside_sun(tmp_path):
    write_in_sun(tmp_path)
    write_allsplit(tmp_path, [ROOT + "kv1/NYUdata/NYU0002/", ROOT + "kv1/NYUdata/NYU0001", ROOT + "kv2/align_kv2/x"])
    source = SOURCE(tmp_path)
    frames = list(source.frames("test"))
    assert [frame.id for frame in frames] == ["NYU0001", "NYU0002"]
    for number, frame in enumerate(frames, 1):
        sample = source.load(frame)
        expected = plane_and_box((40, 30), (37.1, 37.2, 20.3, 14.9)) + number / 1000
        np.testing.assert_allclose(sample.depth, expected, atol=0.00051)
        assert sample.intrinsics == (37.1, 37.2, 20.3, 14.9) and sample.image[:2] == b"\xff\xd8"


def test_inside_sun_with_nyus_own_split(tmp_path):
    write_in_sun(tmp_path, (1, 2, 3))
    write_splits(tmp_path, [3, 1])
    assert [frame.id for frame in SOURCE(tmp_path).frames("test")] == ["NYU0001", "NYU0003"]


def test_labeled_file(tmp_path):
    write_labeled(tmp_path)
    write_splits(tmp_path, [3, 2])
    source = SOURCE(tmp_path)
    frames = list(source.frames("test"))
    assert [frame.id for frame in frames] == ["NYU0002", "NYU0003"]
    for number, frame in zip((2, 3), frames, strict=True):
        sample = source.load(frame)
        expected = measured(number)
        expected[-1] = 0
        np.testing.assert_array_equal(sample.depth, expected)
        assert sample.depth.dtype == np.float32
        np.testing.assert_array_equal(sample.image, colours(number))
        assert sample.intrinsics == (518.8579, 519.4696, 325.5824, 253.7362)


def test_paper_layout_is_taken_where_both_are_there(tmp_path):
    write_in_sun(tmp_path, (1,))
    write_labeled(tmp_path, 1)
    write_splits(tmp_path, [1])
    source = SOURCE(tmp_path)
    assert source.load(next(source.frames("test"))).depth.shape == (30, 40)


def test_trap_crop_offset(tmp_path):
    # SUN -> NYU: K of the crop + (41, 45) = K of the 640x480 frame.
    fx, fy, cx, cy = NYU_CROP
    np.testing.assert_allclose((fx, fy, cx + 41, cy + 45), INTRINSICS, atol=1e-9)
    write_scene(tmp_path, "kv1/NYUdata/NYU0001", np.full((427, 561), 2000), NYU_CROP)
    write_allsplit(tmp_path, [ROOT + "kv1/NYUdata/NYU0001"])
    source = SOURCE(tmp_path)
    assert source.load(next(source.frames("test"))).intrinsics == NYU_CROP


def test_crop_and_its_uncertainty_are_stated():
    """SUN's images are the original's from pixel (40, 44) on, counted from 0, where its intrinsics say (41, 45)."""
    for text in (nyuv2.__doc__, (Path(nyuv2.__file__).parents[1] / "README.md").read_text()):
        text = " ".join(text.split())
        assert "pixel (40, 44) on, counted from 0" in text and "1 px" in text and "less (41, 45)" in text


def test_trap_transposed_hdf5(tmp_path):
    source, frame = one_labeled(tmp_path)
    sample = source.load(frame)
    assert sample.image.shape == (480, 640, 3) and sample.depth.shape == (480, 640)
    assert sample.image[7, 200].tolist() == [200, 7, 1]
    assert sample.depth[99, 49] == 0 and sample.depth[99, 50] > 0 and sample.depth[100, 49] > 0


def test_trap_indices_count_from_one(tmp_path):
    write_labeled(tmp_path)
    write_splits(tmp_path, [1])
    source = SOURCE(tmp_path)
    assert source.load(next(source.frames("test"))).image[0, 0, 2] == 1
    write_splits(tmp_path, [0, 1])
    with pytest.raises(BadRaw, match="from 1 up"):
        next(source.frames("test"))


@pytest.mark.parametrize("millimetres", [8191, 8192, 9000, 10000])
def test_trap_rotation_not_division_by_8000(tmp_path, millimetres):
    write_scene(tmp_path, "kv1/NYUdata/NYU0001", np.full((2, 2), millimetres), (5, 5, 1, 1))
    write_allsplit(tmp_path, [ROOT + "kv1/NYUdata/NYU0001"])
    source = SOURCE(tmp_path)
    depth = source.load(next(source.frames("test"))).depth
    assert np.all(depth == np.float32(millimetres / 1000))
    assert (int(rotated(millimetres)) / 8000 == millimetres / 1000) == (millimetres < 8192)


def test_trap_the_fill_is_not_read_from_the_labeled_file(tmp_path):
    source, frame = one_labeled(tmp_path)
    depth = source.load(frame).depth
    assert not np.any(depth == 7.5)
    assert np.all(depth[:100, :50] == 0)


def test_trap_saturated_depth_is_no_measurement(tmp_path):
    source, frame = one_labeled(tmp_path)
    assert np.all(source.load(frame).depth[-1] == 0)


def test_raw_folder_without_either_release(tmp_path):
    with pytest.raises(BadRaw, match="neither"):
        next(SOURCE(tmp_path).frames("test"))


def test_labeled_file_without_its_split(tmp_path):
    write_labeled(tmp_path, 1)
    with pytest.raises(BadRaw, match="splits.mat"):
        next(SOURCE(tmp_path).frames("test"))


def test_split_number_past_the_file_is_listed_and_refused(tmp_path):
    write_labeled(tmp_path, 1)
    write_splits(tmp_path, [2])
    source = SOURCE(tmp_path)
    assert "out of range" in reason(source, next(source.frames("test")))


def test_split_number_below_one(tmp_path):
    write_labeled(tmp_path, 1)
    write_splits(tmp_path, [-1])
    with pytest.raises(BadRaw, match="testNdxs"):
        next(SOURCE(tmp_path).frames("test"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_hostile_depth_values(tmp_path, value):
    depth = measured(1)
    depth[5, 6] = value
    source, frame = one_labeled(tmp_path, rawDepths=depth.T[None])
    with pytest.raises(BadFrame, match="NaN, infinite or negative"):
        load_row(source, "test", frame)


@pytest.mark.parametrize("values", [np.zeros((1, 480, 640), np.float32), np.zeros(3, np.float32)])
def test_other_shapes_are_refused(tmp_path, values):
    source, frame = one_labeled(tmp_path, rawDepths=values)
    with pytest.raises(BadFrame, match="rawDepths is"):
        load_row(source, "test", frame)


def test_file_that_is_not_hdf5(tmp_path):
    source, frame = one_labeled(tmp_path)
    (tmp_path / LABELED).write_bytes(b"MATLAB 7.3")
    with pytest.raises(OSError):
        load_row(source, "test", frame)


def test_without_h5py_the_error_says_what_to_install(tmp_path, monkeypatch):
    source, frame = one_labeled(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        load_row(source, "test", frame)


@pytest.mark.parametrize("write", [write_in_sun, write_labeled])
def test_needs_match_either_layout(tmp_path, write):
    write(tmp_path)
    assert all(any(tmp_path.glob(pattern)) for pattern, _ in SOURCE.needs)
