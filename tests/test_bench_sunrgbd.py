import numpy as np
import pytest
from bench_fixtures_sun import plane_and_box, rotated, write_allsplit, write_scene
from PIL import Image

from bench.build import load_row
from bench.sources import _sun as sun
from bench.sources._base import BadFrame, BadRaw
from bench.sources.sunrgbd import SOURCE

ROOT = "/n/fs/sun3d/data/SUNRGBD/"
# folder, size (W, H), intrinsics: one a sensor, xtion nested deeper.
SCENES = [
    ("xtion/sun3ddata/brown_bm_1/brown_bm_1/0000001-000000000000", (64, 48), (57.0, 57.1, 32.0, 24.0)),
    ("kv1/b3dodata/img_0063", (56, 43), (51.8, 51.9, 28.4, 20.8)),
    ("realsense/lg/2014_10_21-18_15_22-1311000049", (68, 53), (69.1, 69.2, 34.0, 26.5)),
    ("kv2/kinect2data/000002_2014-05-26_14-23-37_260595134347", (73, 53), (52.9, 52.8, 36.5, 26.2)),
]


def write(raw, scenes=SCENES):
    """All scenes with the wall and the box; -> millimetres of each folder."""
    depths = {folder: np.rint(1000 * plane_and_box(size, k)).astype(int) for folder, size, k in scenes}
    for folder, _, k in scenes:
        write_scene(raw, folder, depths[folder], k)
    write_allsplit(raw, [ROOT + folder for folder in depths])
    return depths


def one(raw, folder="kv2/align_kv2/scene", millimetres=None, **kwargs):
    """A raw folder of one scene, and its frame."""
    write_scene(raw, folder, np.full((4, 5), 2000) if millimetres is None else millimetres, (5, 5, 2, 2), **kwargs)
    write_allsplit(raw, [ROOT + folder])
    return SOURCE(raw), next(SOURCE(raw).frames("test"))


def test_depth_intrinsics_and_camera_of_every_sensor(tmp_path):
    depths = write(tmp_path)
    source = SOURCE(tmp_path)
    frames = {frame.id: frame for frame in source.frames("test")}
    assert set(frames) == set(depths)
    for folder, size, k in SCENES:
        sample = source.load(frames[folder])
        assert sample.depth.dtype == np.float32 and sample.depth.shape == size[::-1]
        np.testing.assert_allclose(sample.depth, plane_and_box(size, k), atol=0.00051)
        assert sample.intrinsics == k
        assert frames[folder].camera == "/".join(folder.split("/")[:2])
        assert frames[folder].scene == ""  # one image a scene: sampling balances over cameras


def test_image_bytes_are_the_file(tmp_path):
    jpeg = write_scene(tmp_path, "kv1/b3dodata/a", np.full((4, 5), 1000), (5, 5, 2, 2))
    write_allsplit(tmp_path, [ROOT + "kv1/b3dodata/a"])
    source = SOURCE(tmp_path)
    assert source.load(next(source.frames("test"))).image == jpeg


def test_listing_is_sorted_whatever_the_order_of_the_list(tmp_path):
    write(tmp_path, SCENES[::-1])
    ids = [frame.id for frame in SOURCE(tmp_path).frames("test")]
    assert ids == sorted(ids) and len(ids) == 4


def test_test_split_only_and_without_nyu(tmp_path):
    write_allsplit(tmp_path, [ROOT + "kv1/NYUdata/NYU0001", ROOT + "kv1/b3dodata/img_0063"])
    assert [frame.id for frame in SOURCE(tmp_path).frames("test")] == ["kv1/b3dodata/img_0063"]
    with pytest.raises(ValueError, match="no split 'train'"):
        next(SOURCE(tmp_path).frames("train"))


@pytest.mark.parametrize("word, z", [(8000, 1.0), (65528, 8.191), (1, 8.192), (6465, 9.0), (14465, 10.0), (0, 0)])
def test_trap_three_bit_rotation_golden_words(word, z):
    assert sun.metres(np.array([[word]], dtype=np.uint16))[0, 0] == np.float32(z)


def test_trap_three_bit_rotation_in_a_file(tmp_path):
    source, frame = one(tmp_path, millimetres=np.array([[500, 8000, 9000, 0]]))
    np.testing.assert_array_equal(source.load(frame).depth, np.float32([[0.5, 8.0, 9.0, 0]]))


def test_every_word_survives_the_depth_scale():
    words = np.arange(65536, dtype=np.uint16)[None]
    millimetres = np.rint(sun.metres(words) * SOURCE.depth_scale).astype(int)
    np.testing.assert_array_equal(rotated(millimetres), words)


def test_trap_two_depth_folders(tmp_path):
    source, frame = one(tmp_path, millimetres=np.array([[1000, 2000]]))
    folder = tmp_path / "SUNRGBD" / frame.data
    Image.fromarray(rotated([[1001, 2001]])).save(folder / "depth" / "0000001-000001490246.png")
    assert source.load(frame).depth.tolist() == [[1.0, 2.0]]


def test_trap_two_depth_folders_raw_depth_where_there_is_no_other(tmp_path):
    source, frame = one(tmp_path, millimetres=np.array([[1000, 0]]), folders=("depth",))
    assert source.load(frame).depth.tolist() == [[1.0, 0.0]]


def test_trap_filled_pixels_are_not_measurements_yet_kept_as_the_paper_does(tmp_path):
    source, frame = one(tmp_path, millimetres=np.array([[1000, 2000]]))
    folder = tmp_path / "SUNRGBD" / frame.data
    Image.fromarray(rotated([[1000, 0]])).save(folder / "depth" / "0000001-000001490246.png")
    assert source.load(frame).depth.tolist() == [[1.0, 2.0]]
    assert "not measurements" in sun.load_scene.__doc__


def test_trap_path_normalisation(tmp_path):
    entries = [ROOT + "kv2//align_kv2/b/", ROOT + "/kv1/b3dodata/img_0063//", "SUNRGBD/xtion/xtion_align_data/c"]
    write_allsplit(tmp_path, entries)
    ids = [frame.id for frame in SOURCE(tmp_path).frames("test")]
    assert ids == ["kv1/b3dodata/img_0063", "kv2/align_kv2/b", "xtion/xtion_align_data/c"]


def test_trap_size_and_focal_length_vary_within_a_camera(tmp_path):
    scenes = [("kv2/align_kv2/a", (8, 6), (7.0, 7.5, 4.0, 3.0)), ("kv2/align_kv2/b", (9, 5), (6.0, 6.5, 4.5, 2.5))]
    write(tmp_path, scenes)
    source = SOURCE(tmp_path)
    samples = [source.load(frame) for frame in source.frames("test")]
    assert [sample.depth.shape for sample in samples] == [(6, 8), (5, 9)]
    assert [sample.intrinsics for sample in samples] == [k for _, _, k in scenes]


def test_missing_folder_is_listed_and_raises_in_load_never_a_similar_one(tmp_path):
    write_scene(tmp_path, "kv2/align_kv2/deeper/scene", np.full((4, 5), 1000), (5, 5, 2, 2))
    write_allsplit(tmp_path, [ROOT + "kv2/align_kv2/scene"])
    source = SOURCE(tmp_path)
    (frame,) = source.frames("test")
    with pytest.raises(FileNotFoundError):
        load_row(source, "test", frame)


def test_missing_split_file(tmp_path):
    with pytest.raises(BadRaw, match="SUNRGBDtoolbox.zip"):
        next(SOURCE(tmp_path).frames("test"))


def test_depth_of_another_size_is_refused(tmp_path):
    source, frame = one(tmp_path)
    Image.fromarray(rotated(np.ones((3, 3)))).save(
        tmp_path / "SUNRGBD" / frame.data / "depth_bfx" / "0000001-000001490246.png"
    )
    with pytest.raises(BadFrame, match="3x3 and its image 5x4"):
        load_row(source, "test", frame)


def test_two_images_in_a_scene_are_refused(tmp_path):
    source, frame = one(tmp_path)
    (tmp_path / "SUNRGBD" / frame.data / "image" / "other.jpg").write_bytes(b"")
    with pytest.raises(BadFrame, match=r"holds 2 \*.jpg"):
        load_row(source, "test", frame)


def test_eight_bit_depth_is_refused(tmp_path):
    source, frame = one(tmp_path)
    path = tmp_path / "SUNRGBD" / frame.data / "depth_bfx" / "0000001-000001490246.png"
    Image.new("L", (5, 4), 9).save(path)
    with pytest.raises(BadFrame, match="16-bit"):
        load_row(source, "test", frame)


@pytest.mark.parametrize(
    "text, expected",
    [(text, "intrinsics.txt is not") for text in ("", "5 0 2 0 5 2 0 0", "5 1 2 0 5 2 0 0 1")]
    + [(f"{fx} 0 {cx} 0 5 2 0 0 1", "not finite with fx, fy > 0") for fx, cx in (("nan", 2), (-5, 2), (5, "inf"))],
)
def test_bad_intrinsics_are_refused(tmp_path, text, expected):
    source, frame = one(tmp_path)
    (tmp_path / "SUNRGBD" / frame.data / "intrinsics.txt").write_text(text)
    with pytest.raises(BadFrame, match=expected):
        load_row(source, "test", frame)


def test_hostile_path_in_the_split_list(tmp_path):
    write_allsplit(tmp_path, [ROOT + "kv2/align_kv2/../../../secret"])
    source = SOURCE(tmp_path)
    (frame,) = source.frames("test")
    with pytest.raises(BadFrame, match="leads out"):
        load_row(source, "test", frame)


def test_hostile_link_out_of_the_raw_folder(tmp_path):
    write_scene(tmp_path / "outside", "kv2/align_kv2/scene", np.full((4, 5), 1000), (5, 5, 2, 2))
    raw = tmp_path / "raw"
    (raw / "SUNRGBD/kv2/align_kv2").mkdir(parents=True)
    (raw / "SUNRGBD/kv2/align_kv2/scene").symlink_to(tmp_path / "outside/SUNRGBD/kv2/align_kv2/scene")
    write_allsplit(raw, [ROOT + "kv2/align_kv2/scene"])
    source = SOURCE(raw)
    (frame,) = source.frames("test")
    with pytest.raises(BadFrame, match="link"):
        load_row(source, "test", frame)


@pytest.mark.parametrize("data", [b"", b"not a mat file", bytes(300)])
def test_broken_mat(tmp_path, data):
    write_allsplit(tmp_path, [])
    (tmp_path / sun.ALLSPLIT).write_bytes(data)
    with pytest.raises(BadRaw, match="MAT v5"):
        next(SOURCE(tmp_path).frames("test"))


def test_needs_match_the_layout(tmp_path):
    write(tmp_path)
    assert all(any(tmp_path.glob(pattern)) for pattern, _ in SOURCE.needs)
