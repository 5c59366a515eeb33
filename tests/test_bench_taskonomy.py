import numpy as np
import pytest
from bench_fixtures_indoor import picture, plane_error, png16, put, write_omnidata_view
from bench_fixtures_toy import reason

from bench.build import load_row
from bench.sources._base import BadFrame, BadRaw
from bench.sources.taskonomy import SPLIT_FILE, Taskonomy

ROWS = ["id,train,val,test", "bee,1,0,0", "ant,1,0,0", "cow,0,1,0", "dog,0,0,1"]
VIEWS = {"point_10_view_0": np.radians(61), "point_2_view_1": np.radians(95)}


@pytest.fixture
def root(tmp_path):
    put(tmp_path / SPLIT_FILE, "\r".join(ROWS))
    for building in ("cow", "bee", "ant"):
        for view, fov in VIEWS.items():
            write_omnidata_view(tmp_path, "taskonomy", building, view, fov)
    return tmp_path


def test_frames_are_sorted_and_of_the_train_buildings(root):
    frames = list(Taskonomy(root).frames("train"))
    assert [frame.id for frame in frames] == [f"{b}/{view}" for b in ("ant", "bee") for view in sorted(VIEWS)]
    assert {frame.scene for frame in frames} == {"ant", "bee"}


def test_depth_camera_and_image_bytes(root):
    source = Taskonomy(root)
    for frame in source.frames("train"):
        sample = source.load(frame)
        assert sample.depth.dtype == np.float32 and sample.depth.shape == (64, 64)
        assert plane_error(sample.depth, sample.intrinsics) < 2 / 512
        assert sample.image == (root / f"rgb/taskonomy/{frame.id}_domain_rgb.png").read_bytes()


def test_facts():
    assert (Taskonomy.depth_range, Taskonomy.depth_scale) == ((0.005, 15.0), 512.0)
    assert Taskonomy.max_canonical_edge == 1024 and Taskonomy.splits == {"train": ("train",)}


def test_there_is_no_test_split(root):
    with pytest.raises(ValueError, match="no split 'test'"):
        list(Taskonomy(root).frames("test"))


def test_golden_depth_words(root):
    words = np.full((64, 64), 512)
    words[0, :3] = 0, 65535, 65534
    put(root / "depth_zbuffer/taskonomy/ant/point_2_view_1_domain_depth_zbuffer.png", png16(words))
    source = Taskonomy(root)
    depth = source.load(list(source.frames("train"))[1]).depth
    assert depth[0, :4].tolist() == [0, 0, 65534 / 512, 1]


def test_trap_65535_is_no_measurement(root):
    source = Taskonomy(root)
    depth = source.load(next(source.frames("train"))).depth
    assert not depth[:2, :3].any() and np.count_nonzero(depth) == 64 * 64 - 6


@pytest.mark.parametrize("line_end", ["\r", "\r\n", "\n"])
def test_trap_line_ends_of_the_split_file(root, line_end):
    put(root / SPLIT_FILE, line_end.join(ROWS) + line_end)
    assert {frame.scene for frame in Taskonomy(root).frames("train")} == {"ant", "bee"}


def test_trap_euclidean_depth_is_not_read(root):
    put(root / "depth_euclidean/taskonomy/ant/point_10_view_0_domain_depth_euclidean.png", png16(np.full((64, 64), 9)))
    (root / "depth_zbuffer/taskonomy/ant/point_10_view_0_domain_depth_zbuffer.png").unlink()
    source = Taskonomy(root)
    with pytest.raises(FileNotFoundError, match="depth_zbuffer"):
        load_row(source, "train", next(source.frames("train")))


def test_trap_field_of_view_varies_from_view_to_view(root):
    source = Taskonomy(root)
    focals = {frame.data: source.load(frame).intrinsics[0] for frame in source.frames("train")}
    assert focals == pytest.approx({view: 32 / np.tan(fov / 2) for view, fov in VIEWS.items()})


@pytest.mark.parametrize(("degrees", "focal"), [(61, 434.6), (30, 955.4), (125, 133.3)])
def test_golden_focal_lengths_of_512_px(tmp_path, degrees, focal):
    put(tmp_path / SPLIT_FILE, "\r".join(ROWS))
    write_omnidata_view(tmp_path, "taskonomy", "ant", "point_0_view_0", np.radians(degrees), size=512)
    source = Taskonomy(tmp_path)
    fx, fy, cx, cy = source.load(next(source.frames("train"))).intrinsics
    assert round(fx, 1) == focal and fy == fx and (cx, cy) == (255.5, 255.5)


def test_trap_mask_valid_is_optional_and_not_used(root):
    put(root / "mask_valid/taskonomy/ant/point_10_view_0_domain_mask_valid.png", picture(64, 64))
    source = Taskonomy(root)
    assert np.count_nonzero(source.load(next(source.frames("train"))).depth) == 64 * 64 - 6


def test_trap_rgb_without_depth_is_listed_and_does_not_load(root):
    write_omnidata_view(root, "taskonomy", "ant", "point_0_view_0", 1.0, depth=False)
    source = Taskonomy(root)
    frame = next(source.frames("train"))
    assert frame.id == "ant/point_0_view_0"
    with pytest.raises(FileNotFoundError):
        load_row(source, "train", frame)


def test_building_without_files_is_listed_once(root):
    put(root / SPLIT_FILE, "\r".join([*ROWS, "eel,1,0,0", "fly,1,0,0"]))
    (root / "rgb/taskonomy/fly").mkdir()
    source = Taskonomy(root)
    eel, fly = list(source.frames("train"))[-2:]
    with pytest.raises(BadFrame, match="No such file.*eel"):
        load_row(source, "train", eel)
    with pytest.raises(BadFrame, match="fly holds no point_P_view_V"):
        load_row(source, "train", fly)


def test_eight_bit_depth_is_refused(root):
    put(root / "depth_zbuffer/taskonomy/ant/point_10_view_0_domain_depth_zbuffer.png", picture(64, 64))
    source = Taskonomy(root)
    with pytest.raises(BadFrame, match="16-bit"):
        load_row(source, "train", next(source.frames("train")))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{}", "KeyError: 'field_of_view_rads'"),
        ("{", "JSONDecodeError"),
        ("[" * 10**5, "RecursionError"),
        ('{"field_of_view_rads": NaN}', "field_of_view_rads is nan; it must lie between 0 and pi"),
        ('{"field_of_view_rads": 61}', "field_of_view_rads is 61; it must lie between 0 and pi"),
    ],
)
def test_hostile_camera_files(root, text, expected):
    put(root / "point_info/taskonomy/ant/point_10_view_0_domain_point_info.json", text)
    source = Taskonomy(root)
    assert expected in reason(source, next(source.frames("train")))


@pytest.mark.parametrize("text", ["", "a,b\n1,2", "id,train\nant,yes", "id,train\nant", "id,train\nant,0", "\0"])
def test_hostile_split_files(root, text):
    put(root / SPLIT_FILE, text)
    with pytest.raises(BadRaw):
        list(Taskonomy(root).frames("train"))


def test_hostile_path_in_the_split_file(root):
    put(root / SPLIT_FILE, "id,train\n../../etc,1")
    source = Taskonomy(root)
    (frame,) = source.frames("train")
    assert "leads out" in reason(source, frame)


def test_missing_split_file_says_where_it_comes_from(root):
    (root / SPLIT_FILE).unlink()
    with pytest.raises(BadRaw, match="splits_taskonomy.zip"):
        list(Taskonomy(root).frames("train"))
