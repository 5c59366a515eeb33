import io

import numpy as np
import pytest
from bench_fixtures_toy import reason
from PIL import Image

from bench.build import load_row
from bench.sources._base import BadFrame
from bench.sources.ibims1 import SOURCE

SIZE = (64, 48)
# Two of the set's four cameras (fx, fy, cx, cy), at a tenth of the size.
CALIBS = {"livingroom_05": "55.962,55.814,36.187,24.199", "corridor_01": "62.616,62.616,32.0,24.0"}


def plane(k):
    """z in metres of the slanted floor y = 1.2 - 0.05 z as far as 20 m, 0 above it."""
    _, fy, _, cy = k
    v = np.arange(SIZE[1])[:, None] + np.zeros((1, SIZE[0]))
    with np.errstate(divide="ignore"):
        z = 1.2 / ((v - cy) / fy + 0.05)
    return np.where((z > 0) & (z < 20), z, 0)


def save(path, array_or_image, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    (image.convert(mode) if mode else image).save(path)


def write(raw, names=tuple(CALIBS), words=None, invalid=None, transp=None, imagelist=True):
    """The raw layout; `words` uint16, masks bool with true = keep, saved as 1-bit PNG."""
    for name in names:
        k = tuple(map(float, CALIBS[name].split(",")))
        values = np.rint(plane(k) / 50 * 65535).astype(np.uint16) if words is None else words
        keep = np.ones(values.shape, bool)
        save(raw / "rgb" / f"{name}.png", Image.new("RGB", values.shape[::-1], (200, 180, 160)))
        save(raw / "depth" / f"{name}.png", values)
        save(raw / "mask_invalid" / f"{name}.png", keep if invalid is None else invalid)
        save(raw / "mask_transp" / f"{name}.png", keep if transp is None else transp)
        (raw / "calib").mkdir(exist_ok=True)
        (raw / "calib" / f"{name}.txt").write_text(CALIBS[name] + "\n")
    if imagelist:
        (raw / "imagelist.txt").write_text("".join(f"{name}\n" for name in names))


def one(raw, **kwargs):
    write(raw, ["livingroom_05"], **kwargs)
    return SOURCE(raw), next(SOURCE(raw).frames("test"))


def test_depth_image_and_listing(tmp_path):
    write(tmp_path)
    source = SOURCE(tmp_path)
    frames = list(source.frames("test"))
    assert [(frame.id, frame.scene, frame.camera) for frame in frames] == [
        ("corridor_01", "corridor", ""),
        ("livingroom_05", "livingroom", ""),
    ]
    for frame in frames:
        sample = source.load(frame)
        k = tuple(map(float, CALIBS[frame.id].split(",")))
        assert sample.depth.dtype == np.float32 and sample.depth.shape == (48, 64)
        np.testing.assert_allclose(sample.depth, plane(k), atol=0.51 * 50 / 65535)
        assert sample.image == (tmp_path / "rgb" / f"{frame.id}.png").read_bytes()


@pytest.mark.parametrize("imagelist", [True, False])
def test_listing_is_sorted_with_and_without_imagelist(tmp_path, imagelist):
    write(tmp_path, ["livingroom_05", "corridor_01"], imagelist=imagelist)
    assert [frame.id for frame in SOURCE(tmp_path).frames("test")] == ["corridor_01", "livingroom_05"]


def test_imagelist_decides_and_a_missing_image_is_listed(tmp_path):
    write(tmp_path)
    (tmp_path / "imagelist.txt").write_text("livingroom_05.png\nlab_02.png\n")
    source = SOURCE(tmp_path)
    frames = list(source.frames("test"))
    assert [frame.id for frame in frames] == ["lab_02", "livingroom_05"]
    with pytest.raises(FileNotFoundError):
        load_row(source, "test", frames[0])


def test_evaluation_only(tmp_path):
    with pytest.raises(ValueError, match="no split 'train'"):
        next(SOURCE(tmp_path).frames("train"))


@pytest.mark.parametrize("word, z", [(65535, 50.0), (1311, 1.00023), (0, 0.0)])
def test_golden_words(tmp_path, word, z):
    source, frame = one(tmp_path, words=np.full((2, 3), word, np.uint16))
    np.testing.assert_allclose(source.load(frame).depth, z, atol=5e-6)


def test_every_word_survives_the_depth_scale(tmp_path):
    words = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    source, frame = one(tmp_path, words=words)
    assert SOURCE.depth_scale == 65535 / 50
    np.testing.assert_array_equal(np.rint(source.load(frame).depth * SOURCE.depth_scale), words)


@pytest.mark.parametrize("mask", ["invalid", "transp"])
def test_trap_mask_polarity_nonzero_is_kept(tmp_path, mask):
    keep = np.array([[True, False, True], [True, True, False]])
    source, frame = one(tmp_path, words=np.full((2, 3), 13107, np.uint16), **{mask: keep})
    np.testing.assert_allclose(source.load(frame).depth, np.where(keep, 10.0, 0.0), atol=1e-5)


def test_both_masks_are_applied(tmp_path):
    invalid, transp = np.array([[True, False, True]]), np.array([[True, True, False]])
    source, frame = one(tmp_path, words=np.full((1, 3), 13107, np.uint16), invalid=invalid, transp=transp)
    assert (source.load(frame).depth > 0).tolist() == [[True, False, False]]


def test_trap_one_bit_png(tmp_path):
    keep = np.array([[True, False]])
    source, frame = one(tmp_path, words=np.full((1, 2), 13107, np.uint16), invalid=keep)
    path = tmp_path / "mask_invalid" / "livingroom_05.png"
    assert Image.open(path).mode == "1" and path.read_bytes()[24] == 1  # bit depth in the PNG header
    one_bit = source.load(frame).depth
    save(path, keep, "L")  # 0 and 255
    np.testing.assert_array_equal(source.load(frame).depth, one_bit)


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_mask_whose_zero_means_nothing_is_refused(tmp_path, mode):
    source, frame = one(tmp_path)
    save(tmp_path / "mask_transp" / "livingroom_05.png", Image.new(mode, SIZE))
    with pytest.raises(BadFrame, match="1-bit mask"):
        load_row(source, "test", frame)


def test_mask_of_another_size_is_refused(tmp_path):
    source, frame = one(tmp_path, invalid=np.ones((2, 2), bool))
    with pytest.raises(BadFrame, match="1-bit mask"):
        load_row(source, "test", frame)


def test_missing_mask_is_an_error_not_a_mask_of_ones(tmp_path):
    source, frame = one(tmp_path)
    (tmp_path / "mask_transp" / "livingroom_05.png").unlink()
    with pytest.raises(FileNotFoundError):
        load_row(source, "test", frame)


def test_truncated_mask_is_refused(tmp_path):
    source, frame = one(tmp_path)
    path = tmp_path / "mask_transp" / "livingroom_05.png"
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(BadFrame, match="mask_transp"):
        load_row(source, "test", frame)


def test_trap_intrinsics_differ_between_images(tmp_path):
    write(tmp_path)
    source = SOURCE(tmp_path)
    found = {frame.id: source.load(frame).intrinsics for frame in source.frames("test")}
    assert found == {"livingroom_05": (55.962, 55.814, 36.187, 24.199), "corridor_01": (62.616, 62.616, 32.0, 24.0)}


NOT_A_LINE, NOT_A_CAMERA = "calib/livingroom_05.txt", "not finite with fx, fy > 0"


@pytest.mark.parametrize(
    "text, expected",
    [(text, NOT_A_LINE) for text in ("", "1,2,3", "1,2,3,4,5", "a,b,c,d")]
    + [(text, NOT_A_CAMERA) for text in ("nan,5,2,2", "0,5,2,2", "5,5,inf,2")],
)
def test_bad_calib_is_refused(tmp_path, text, expected):
    source, frame = one(tmp_path)
    (tmp_path / "calib" / "livingroom_05.txt").write_text(text)
    with pytest.raises(BadFrame, match=expected):
        load_row(source, "test", frame)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "rgb\\..\\x"])
def test_hostile_name_in_imagelist(tmp_path, name):
    write(tmp_path)
    (tmp_path / "imagelist.txt").write_text(name + "\n")
    source = SOURCE(tmp_path)
    (frame,) = source.frames("test")
    assert ("No such file" if "\\" in name else "leads out") in reason(source, frame)


def test_hostile_png_that_declares_an_absurd_size(tmp_path):
    source, frame = one(tmp_path)
    path = tmp_path / "mask_invalid" / "livingroom_05.png"
    data = io.BytesIO()
    Image.new("1", (9000, 9000)).save(data, "PNG")
    path.write_bytes(data.getvalue())
    with pytest.raises(BadFrame, match="bomb|pixels"):
        load_row(source, "test", frame)


def test_needs_match_the_layout(tmp_path):
    write(tmp_path)
    assert all(any(tmp_path.glob(pattern)) for pattern, _ in SOURCE.needs)
