import io

import numpy as np
import pytest
import scipy.optimize
from PIL import Image

from bench.build import load_row
from bench.sources import eth3d
from bench.sources._base import BadFrame
from bench.sources.eth3d import DEPTH, DISTORTED, SOURCE, UNDISTORTED, undistort

# A wide lens, so that both grids differ by many pixels. Principal points are counted from pixel centres here.
LENS = (0.08, -0.06, 0.002, -0.003, 0.03, -0.004, 0.0015, -0.001)  # k1 k2 p1 p2 k3 k4 sx1 sy1
LENS_SIZE, LENS_K = (96, 64), (60.0, 61.0, 47.2, 31.9)
SIZE, K = (120, 80), (60.0, 61.0, 59.6, 39.4)
NAME = "DSC_0259.JPG"


def distort(x, y, lens=LENS):
    """THIN_PRISM_FISHEYE forwards, x and y over z -> distorted, written with powers of the angle."""
    k1, k2, p1, p2, k3, k4, sx1, sy1 = lens
    theta, phi = np.arctan(np.hypot(x, y)), np.arctan2(y, x)
    a, b = theta * np.cos(phi), theta * np.sin(phi)
    gain = 1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8
    return (
        a * gain + 2 * p1 * a * b + p2 * (3 * a * a + b * b) + sx1 * theta**2,
        b * gain + 2 * p2 * a * b + p1 * (a * a + 3 * b * b) + sy1 * theta**2,
    )


def rays_of_lens_pixels():
    """x / z, y / z of each distorted pixel (h, w), by fixed-point iteration on the forward model."""
    u, v = np.meshgrid(np.arange(LENS_SIZE[0]), np.arange(LENS_SIZE[1]))
    target_x, target_y = (u - LENS_K[2]) / LENS_K[0], (v - LENS_K[3]) / LENS_K[1]
    x, y = target_x.copy(), target_y.copy()
    for _ in range(200):
        found_x, found_y = distort(x, y)
        x, y = x + 0.5 * (target_x - found_x), y + 0.5 * (target_y - found_y)
    assert max(abs(found_x - target_x).max(), abs(found_y - target_y).max()) < 1e-9
    return x, y


def wall_and_box(x, y):
    """z in metres along the ray (x, y, 1): the wall 0.3 x + 0.2 y + z = 4 behind a box front at z = 2."""
    box = (abs(2 * x - 0.3) <= 0.5) & (abs(2 * y) <= 0.4)
    return np.where(box, 2.0, 4 / (0.3 * x + 0.2 * y + 1))


def camera_line(camera, model, size, k, lens=()):
    """COLMAP counts the centre of the first pixel as 0.5."""
    numbers = [*k[:2], k[2] + 0.5, k[3] + 0.5, *lens]
    return f"{camera} {model} {size[0]} {size[1]} {' '.join(map(str, numbers))}\n"


def image_lines(camera, name, points=""):
    return f"{camera + 7} 1 0 0 0 0.5 -0.25 3 {camera} {name}\n{points}\n"


def write(
    raw, scenes=("terrace",), names=(NAME,), depth=None, lens=LENS, lens_k=LENS_K, lens_size=LENS_SIZE, k=K, size=SIZE
):
    """The raw layout; `depth` (h, w) float32 on the distorted grid, the wall and the box unless given."""
    depth = wall_and_box(*rays_of_lens_pixels()) if depth is None else depth
    header = (
        "# Image list with two lines of data per image:\n#   IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n"
    )
    for scene in scenes:
        for folder, images, model, *_ in (DISTORTED, UNDISTORTED):
            camera = (model, size, k) if model == "PINHOLE" else (model, lens_size, lens_k, lens)
            (raw / scene / folder).mkdir(parents=True)
            (raw / scene / folder / "cameras.txt").write_text("# Camera list\n" + camera_line(0, *camera))
            lines = [image_lines(0, f"{images}/{name}", "1.5 2.5 -1") for name in names]
            (raw / scene / folder / "images.txt").write_text(header + "".join(lines))
        (raw / scene / "images" / UNDISTORTED[1]).mkdir(parents=True)
        (raw / scene / DEPTH).mkdir(parents=True)
        for name in names:
            Image.new("RGB", size, (60, 90, 120)).save(raw / scene / "images" / UNDISTORTED[1] / name)
            (raw / scene / DEPTH / name).write_bytes(np.asarray(depth, dtype="<f4").tobytes())


def load(raw):
    source = SOURCE(raw)
    return source.load(next(source.frames("test")))


def bounds(size, k):
    """Least and greatest z (h, w) that the scene has within half a pixel of each undistorted pixel."""
    u, v = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    shifts = np.linspace(-0.5, 0.5, 11)
    z = [wall_and_box((u + du - k[2]) / k[0], (v + dv - k[3]) / k[1]) for du in shifts for dv in shifts]
    return np.min(z, axis=0), np.max(z, axis=0)


def test_depth_is_right_on_the_undistorted_grid(tmp_path):
    write(tmp_path)
    sample = load(tmp_path)
    assert sample.depth.dtype == np.float32 and sample.depth.shape == SIZE[::-1]
    assert sample.intrinsics == pytest.approx(K)
    assert sample.image == (tmp_path / "terrace/images/dslr_images_undistorted" / NAME).read_bytes()
    low, high = bounds(SIZE, K)
    measured = sample.depth > 0
    assert measured.mean() > 0.4
    assert np.all((sample.depth >= low - 1e-5) & (sample.depth <= high + 1e-5) | ~measured)


def test_trap_depth_belongs_to_the_distorted_image(tmp_path):
    # What pairing by file name gives: the distorted map stretched to the undistorted size.
    depth = wall_and_box(*rays_of_lens_pixels())
    u, v = (np.arange(SIZE[0]) + 0.5) * LENS_SIZE[0] / SIZE[0], (np.arange(SIZE[1]) + 0.5) * LENS_SIZE[1] / SIZE[1]
    stretched = depth[v.astype(int)[:, None], u.astype(int)]
    low, high = bounds(SIZE, K)
    assert np.mean((stretched < low - 1e-5) | (stretched > high + 1e-5)) > 0.5
    # One pixel: where it must land, by a general root finder on the forward model.
    depth = np.full(LENS_SIZE[::-1], np.inf, np.float32)
    depth[20, 70] = 3.25
    write(tmp_path, depth=depth)
    target = (70 - LENS_K[2]) / LENS_K[0], (20 - LENS_K[3]) / LENS_K[1]
    x, y = scipy.optimize.root(lambda p: np.subtract(distort(*p), target), target, tol=1e-12).x
    row, column = round(K[1] * y + K[3]), round(K[0] * x + K[2])
    found = load(tmp_path).depth
    assert np.argwhere(found).tolist() == [[row, column]] and found[row, column] == np.float32(3.25)
    assert abs(column - 70 * SIZE[0] / LENS_SIZE[0]) > 2


def test_trap_inf_is_no_measurement(tmp_path):
    depth = np.full(LENS_SIZE[::-1], np.inf)
    depth[30:34, 40:50] = 2
    write(tmp_path, depth=depth)
    found = load(tmp_path).depth
    assert np.all(np.isfinite(found)) and 30 <= np.count_nonzero(found == 2) <= 40
    assert np.count_nonzero(found) == np.count_nonzero(found == 2)


def test_no_measurement_at_all_is_a_map_of_zeros(tmp_path):
    write(tmp_path, depth=np.full(LENS_SIZE[::-1], np.inf))
    assert not load(tmp_path).depth.any()


def test_trap_jpg_that_is_float32(tmp_path):
    write(tmp_path)
    path = tmp_path / "terrace" / DEPTH / NAME
    assert path.suffix == ".JPG" and path.stat().st_size == 4 * LENS_SIZE[0] * LENS_SIZE[1]
    load(tmp_path)
    jpeg = io.BytesIO()
    Image.new("RGB", LENS_SIZE).save(jpeg, "JPEG")
    path.write_bytes(jpeg.getvalue())
    with pytest.raises(BadFrame, match="float32 are 24576"):
        load(tmp_path)


def test_trap_empty_second_line(tmp_path):
    names = ("DSC_0001.JPG", "DSC_0002.JPG", "DSC_0003.JPG", "DSC_0004.JPG")
    write(tmp_path, names=names)
    for folder, images, *_ in (DISTORTED, UNDISTORTED):
        points = ("1 2 -1 3 4 17", "", "", "5 6 -1")
        lines = [image_lines(0, f"{images}/{name}", p) for name, p in zip(names, points, strict=True)]
        (tmp_path / "terrace" / folder / "images.txt").write_text("# head\n" + "".join(lines))
    source = SOURCE(tmp_path)
    frames = list(source.frames("test"))
    assert [frame.id for frame in frames] == [f"terrace/{name[:-4]}" for name in names]
    for frame in frames:
        source.load(frame)


def test_trap_98_megabytes_only_measured_pixels_are_worked_on(tmp_path, monkeypatch):
    depth = np.full(LENS_SIZE[::-1], np.inf)
    depth[::8, ::8] = 2
    write(tmp_path, depth=depth)
    sizes = []
    monkeypatch.setattr(eth3d, "undistort", lambda x, y, lens: sizes.append(len(x)) or undistort(x, y, lens))
    load(tmp_path)
    assert sizes == [12 * 8]


def test_trap_size_is_the_cameras_not_6048x4032(tmp_path):
    write(tmp_path, depth=np.full((3, 5), 2.0), lens_size=(5, 3), lens_k=(60, 60, 2, 1), size=(7, 6), k=(60, 60, 3, 2))
    assert load(tmp_path).depth.shape == (6, 7)


def test_nearest_point_wins_a_pixel(tmp_path):
    # A lens pixel is a third of an undistorted one.
    depth = np.full((3, 3), 9.0)
    depth[0, 2], depth[2, 2] = 4.0, 5.0
    write(
        tmp_path,
        depth=depth,
        lens=(0,) * 8,
        lens_size=(3, 3),
        lens_k=(3000, 3000, 1, 1),
        size=(1, 1),
        k=(1000, 1000, 0, 0),
    )
    assert load(tmp_path).depth.tolist() == [[4.0]]


def test_pixel_centres_both_cameras_count_from_one_half(tmp_path):
    # Near the axis a fisheye is a pinhole: 5 px right of the centre at f = 1000 is 15 px right at f = 3000.
    depth = np.full((21, 21), np.inf)
    depth[10, 15] = depth[8, 10] = 2
    write(
        tmp_path,
        depth=depth,
        lens=(0,) * 8,
        lens_size=(21, 21),
        lens_k=(1000, 1000, 10, 10),
        size=(61, 61),
        k=(3000, 3000, 30, 30),
    )
    sample = load(tmp_path)
    assert np.argwhere(sample.depth).tolist() == [[24, 30], [30, 45]]
    assert sample.intrinsics == (3000, 3000, 30, 30)


def test_undistort_inverts_the_model():
    x, y = np.meshgrid(np.linspace(-0.9, 0.9, 41), np.linspace(-0.7, 0.7, 31))
    found_x, found_y, valid = undistort(*(a.ravel() for a in distort(x, y)), LENS)
    assert valid.all()
    np.testing.assert_allclose(found_x, x.ravel(), atol=2e-8)
    np.testing.assert_allclose(found_y, y.ravel(), atol=2e-8)


def test_undistort_is_invalid_past_the_turning_point_of_the_polynomial():
    # theta - theta^3 turns at theta = 1 / sqrt(3), where it is 0.3849.
    lens = (-1.0, 0, 0, 0, 0, 0, 0, 0)
    x, y, valid = undistort(np.array([0.0, 0.3, 0.384, 0.386, 0.9]), np.zeros(5), lens)
    assert valid.tolist() == [True, True, True, False, False]
    np.testing.assert_allclose(np.arctan(x[1]) - np.arctan(x[1]) ** 3, 0.3, atol=1e-9)


def test_undistort_is_invalid_at_90_degrees():
    _, _, valid = undistort(np.array([1.57, 1.58]), np.zeros(2), (0,) * 8)
    assert valid.tolist() == [True, False]


def test_lens_that_cannot_be_inverted_is_refused_with_its_count(tmp_path):
    write(tmp_path, depth=np.full(LENS_SIZE[::-1], 2.0), lens=(-3.0, 0, 0, 0, 0, 0, 0, 0))
    with pytest.raises(BadFrame, match=r"\d+ of 6144 depth pixels"):
        load(tmp_path)


def test_listing_is_sorted_by_scene_and_name(tmp_path):
    write(tmp_path, scenes=("terrace", "courtyard"), names=("DSC_0302.JPG", "DSC_0299.JPG"))
    (tmp_path / "readme.txt").write_text("not a scene")
    frames = list(SOURCE(tmp_path).frames("test"))
    expected = [f"{scene}/DSC_0{n}" for scene in ("courtyard", "terrace") for n in (299, 302)]
    assert [frame.id for frame in frames] == expected
    assert [frame.scene for frame in frames] == ["courtyard"] * 2 + ["terrace"] * 2
    with pytest.raises(ValueError, match="no split 'train'"):
        next(SOURCE(tmp_path).frames("train"))


@pytest.mark.parametrize("missing", [f"images/{UNDISTORTED[1]}/{NAME}", f"{DEPTH}/{NAME}", *(
    f"{kind[0]}/{file}.txt" for kind in (DISTORTED, UNDISTORTED) for file in ("images", "cameras")
)])  # fmt: skip
def test_missing_file_leaves_the_image_listed(tmp_path, missing):
    write(tmp_path)
    (tmp_path / "terrace" / missing).unlink()
    source = SOURCE(tmp_path)
    (frame,) = source.frames("test")
    with pytest.raises(FileNotFoundError):
        load_row(source, "test", frame)


def test_image_without_a_distorted_partner_is_refused(tmp_path):
    write(tmp_path, names=(NAME, "DSC_0300.JPG"))
    path = tmp_path / "terrace" / DISTORTED[0] / "images.txt"
    path.write_text(image_lines(0, f"dslr_images/{NAME}"))
    source = SOURCE(tmp_path)
    good, bad = source.frames("test")
    source.load(good)
    with pytest.raises(BadFrame, match="no image dslr_images/DSC_0300.JPG"):
        load_row(source, "test", bad)


def test_each_image_has_its_own_camera(tmp_path):
    write(tmp_path, names=(NAME, "DSC_0300.JPG"))
    other = (50.0, 50.0, 60.0, 40.0)
    folder = tmp_path / "terrace" / UNDISTORTED[0]
    with open(folder / "cameras.txt", "a") as file:
        file.write(camera_line(12, "PINHOLE", SIZE, other))
    lines = image_lines(12, f"{UNDISTORTED[1]}/DSC_0300.JPG") + image_lines(0, f"{UNDISTORTED[1]}/{NAME}")
    (folder / "images.txt").write_text(lines)
    source = SOURCE(tmp_path)
    found = [source.load(frame).intrinsics for frame in source.frames("test")]
    assert found == [pytest.approx(K), other]


def test_image_of_another_size_than_its_camera_is_refused(tmp_path):
    write(tmp_path)
    Image.new("RGB", (10, 10)).save(tmp_path / "terrace/images" / UNDISTORTED[1] / NAME)
    with pytest.raises(BadFrame, match="10x10, but its intrinsics are of 120x80"):
        load(tmp_path)


def test_hostile_link_out_of_the_raw_folder(tmp_path):
    write(tmp_path / "raw")
    path = tmp_path / "raw/terrace" / DEPTH / NAME
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(BadFrame, match="link"):
        load(tmp_path / "raw")


@pytest.mark.parametrize("change", [-4, -1, 1, 4096])
def test_hostile_length_of_the_depth_file(tmp_path, change):
    write(tmp_path)
    path = tmp_path / "terrace" / DEPTH / NAME
    path.write_bytes((path.read_bytes() + bytes(4096))[: 24576 + change])
    with pytest.raises(BadFrame, match=f"has {24576 + change} bytes, but 96x64 float32 are 24576"):
        load(tmp_path)


@pytest.mark.parametrize("value", [np.nan, -1.0, -np.inf])
def test_hostile_depth_values(tmp_path, value):
    depth = np.full(LENS_SIZE[::-1], 2.0)
    depth[3, 4] = value
    write(tmp_path, depth=depth)
    with pytest.raises(BadFrame, match="holds 1 values that are NaN or negative"):
        load(tmp_path)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("", "no PINHOLE of 4 numbers for camera 0"),
        ("1 PINHOLE 120 80 60 60 60 40", "no PINHOLE of 4 numbers for camera 0"),
        ("0 PINHOLE", "no PINHOLE of 4 numbers for camera 0"),
        ("0 SIMPLE_PINHOLE 120 80 60 60 40", "no PINHOLE of 4 numbers for camera 0"),
        ("0 PINHOLE 120 80 60 60 60", "no PINHOLE of 4 numbers for camera 0"),
        ("0 PINHOLE 120 80 60 60 nan 40", "not finite"),
        ("0 PINHOLE 120 80 -60 60 60 40", "fx, fy > 0"),
    ],
)
def test_broken_cameras_txt(tmp_path, line, reason):
    write(tmp_path)
    (tmp_path / "terrace" / UNDISTORTED[0] / "cameras.txt").write_text(line + "\n")
    source = SOURCE(tmp_path)
    with pytest.raises(BadFrame, match=reason):
        load_row(source, "test", next(source.frames("test")))


def test_needs_match_the_layout(tmp_path):
    write(tmp_path)
    assert all(any(tmp_path.glob(pattern)) for pattern, _ in SOURCE.needs)
