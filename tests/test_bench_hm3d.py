import numpy as np
import pytest
from bench_fixtures_indoor import plane_error, put, write_omnidata_view

from bench.build import load_row
from bench.sources._base import BadFrame, BadRaw
from bench.sources.hm3d import HM3D

FIRST, SECOND, VAL = "00000-kfPV7w3FaU5", "00001-UVdNNRcVyV1", "00800-TEEsavR23oF"
METADATA = f"scene,split,furnished,navmesh_quality\n{SECOND},train,TRUE,0\n{FIRST},train,TRUE,\n{VAL},val,TRUE,0\n"
WIDE = np.radians(120)


@pytest.fixture
def root(tmp_path):
    put(tmp_path / "metadata.csv", METADATA)
    write_omnidata_view(tmp_path, "hm3d", VAL, "point_0_view_0", 1.0)
    write_omnidata_view(tmp_path, "hm3d", SECOND, "point_7_view_0", WIDE, camera="fixatedpose")
    write_omnidata_view(tmp_path, "hm3d", FIRST, "point_3_view_2", WIDE, camera="point_info")
    return tmp_path


def test_frames_are_sorted_and_of_the_train_scenes(root):
    frames = list(HM3D(root).frames("train"))
    assert [frame.id for frame in frames] == [f"{FIRST}/point_3_view_2", f"{SECOND}/point_7_view_0"]


def test_facts():
    assert (HM3D.depth_range, HM3D.depth_scale) == ((0.01, 10.0), 512.0)
    assert HM3D.max_canonical_edge == 1024 and HM3D.splits == {"train": ("train",)}


def test_trap_both_camera_file_names_and_wide_views(root):
    source = HM3D(root)
    for frame in source.frames("train"):
        sample = source.load(frame)
        assert sample.intrinsics == pytest.approx((32 / np.tan(WIDE / 2),) * 2 + (31.5, 31.5))
        assert plane_error(sample.depth, sample.intrinsics) < 2 / 512


def test_trap_mesh_holes_are_no_measurement(root):
    source = HM3D(root)
    depth = source.load(next(source.frames("train"))).depth
    assert not depth[:2, :3].any() and np.count_nonzero(depth) == 64 * 64 - 6


def test_trap_enormous_enlargement_of_wide_views(tmp_path):
    put(tmp_path / "metadata.csv", METADATA)
    write_omnidata_view(tmp_path, "hm3d", FIRST, "point_0_view_0", np.radians(125), size=512)
    source = HM3D(tmp_path)
    fx = source.load(next(source.frames("train"))).intrinsics[0]
    canonical = round(512 * 1000 / fx)
    assert canonical == 3842 and (canonical - source.max_canonical_edge) // 2 == 1409


def test_resolution_may_be_missing_or_differ(root):
    put(root / f"point_info/hm3d/{FIRST}/point_3_view_2_domain_point_info.json", f'{{"field_of_view_rads": {WIDE}}}')
    source = HM3D(root)
    assert source.load(next(source.frames("train"))).intrinsics[0] == pytest.approx(32 / np.tan(WIDE / 2))


def test_view_without_camera_is_named(root):
    (root / f"point_info/hm3d/{FIRST}/point_3_view_2_domain_point_info.json").unlink()
    source = HM3D(root)
    with pytest.raises(BadFrame, match="point_info.json nor .*fixatedpose.json"):
        load_row(source, "train", next(source.frames("train")))


def test_scene_without_renders_is_listed_once(root):
    put(root / "metadata.csv", METADATA + "00559-53jtKd53a1X,train,TRUE,0\n")
    source = HM3D(root)
    last = list(source.frames("train"))[-1]
    assert last.id == "00559-53jtKd53a1X"
    with pytest.raises(BadFrame, match="No such file.*00559"):
        load_row(source, "train", last)


def test_scene_behind_a_link_that_leads_out_is_refused(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    write_omnidata_view(outside, "hm3d", "x", "point_0_view_0", 1.0)
    put(root / "metadata.csv", METADATA + "00002-FxCkHAfgh7A,train,TRUE,0\n")
    (root / "rgb/hm3d/00002-FxCkHAfgh7A").symlink_to(outside / "rgb/hm3d/x")
    source = HM3D(root)
    with pytest.raises(BadFrame, match="through a link"):
        load_row(source, "train", list(source.frames("train"))[-1])


def test_missing_metadata_says_where_it_comes_from(root):
    (root / "metadata.csv").unlink()
    with pytest.raises(BadRaw, match="habitat-matterport-3dresearch"):
        list(HM3D(root).frames("train"))
