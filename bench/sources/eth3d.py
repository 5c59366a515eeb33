"""ETH3D, high-resolution multi-view training scenes: 24-megapixel photographs, laser-scanned depth. Evaluation only.

The depth maps belong to the *distorted* photographs, the pinhole images are the undistorted ones, and both cannot be
paired pixel by pixel. So each measured pixel is unprojected through the lens model (THIN_PRISM_FISHEYE) and projected
into the undistorted image, where the nearest point wins a pixel; z is kept, since both cameras share their axes.
A point moves to a whole pixel there, at most half a pixel away. Nothing is removed as hidden: the set's depth
already is without occluded points.

Both calibrations are COLMAP's, whose first pixel has its centre at 0.5, so 0.5 is taken off cx and cy. The depth
pixel (u, v) is read as the ray through its centre: the set's pipeline rounds projections to integer centres, and adds
the 0.5 when it writes its calibration.
"""

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from ._base import BadFrame, Frame, Sample, Source
from ._lidar import splat

# Kind of images -> calibration folder, image folder, camera model, number of its parameters.
DISTORTED = ("dslr_calibration_jpg", "dslr_images", "THIN_PRISM_FISHEYE", 12)
UNDISTORTED = ("dslr_calibration_undistorted", "dslr_images_undistorted", "PINHOLE", 4)
DEPTH = "ground_truth_depth/dslr_images"


class Eth3d(Source):
    name = "eth3d"
    title = "ETH3D high-resolution multi-view (training)"
    page = "https://www.eth3d.net/datasets"
    licence = "see its page (CC BY-NC-SA 4.0 is reported, not confirmed)"
    citation = (
        "Schöps, Schönberger, Galliani, Sattler, Schindler, Pollefeys, Geiger: "
        "A Multi-View Stereo Benchmark with High-Resolution Images and Multi-Camera Videos, CVPR 2017"
    )
    layout = (
        "the 7z archives dslr_undistorted, dslr_jpg (its calibration) and dslr_depth of each scene, unpacked together: "
        f"SCENE/{{images/{UNDISTORTED[1]}/*.JPG, {UNDISTORTED[0]}/{{cameras,images}}.txt, "
        f"{DISTORTED[0]}/{{cameras,images}}.txt, {DEPTH}/*.JPG}}"
    )
    needs = (
        (f"*/images/{UNDISTORTED[1]}/*.JPG", "undistorted images"),
        (f"*/{UNDISTORTED[0]}/images.txt", "calibration of the undistorted images"),
        (f"*/{DISTORTED[0]}/images.txt", "calibration of the distorted images, which depth belongs to"),
        (f"*/{DEPTH}/*.JPG", "depth maps (raw float32, despite their names)"),
    )
    splits = {"test": ("high-res multi-view training",)}
    depth_range = (0.01, 50.0)
    depth_scale = 1000.0  # 1 mm

    def frames(self, split: str) -> Iterator[Frame]:
        """The images of each scene's undistorted images.txt. Where that is missing or broken, what the scene's folders
        hold, so that `load` names the reason for each image."""
        self.official_splits(split)
        for scene in self.listdir():
            try:
                names = set(self._camera_ids(scene, UNDISTORTED))
            except (ValueError, OSError):
                folders = [(scene, "images", UNDISTORTED[1]), (scene, DEPTH)]
                names = {name for folder in folders if self.path(*folder).is_dir() for name in self.listdir(*folder)}
            for name in sorted(names):
                frame_id = re.sub(r"[^A-Za-z0-9_./-]", "_", f"{scene}/{name.rpartition('.')[0] or name}")
                yield Frame(frame_id, scene, "", (scene, name))

    def load(self, frame: Frame) -> Sample:
        scene, name = frame.data
        lens_size, (lens_fx, lens_fy, lens_cx, lens_cy, *lens) = self._camera(scene, name, DISTORTED)
        size, (fx, fy, cx, cy) = self._camera(scene, name, UNDISTORTED)
        image, _ = self.read_image(scene, "images", UNDISTORTED[1], name, size=size)
        u, v, z = self._depth_pixels(f"{scene}/{DEPTH}/{name}", lens_size)
        x, y, valid = undistort((u - lens_cx) / lens_fx, (v - lens_cy) / lens_fy, lens)
        # The set made these pixels by projecting points, so a lens that cannot be inverted there is not theirs.
        if (lost := np.count_nonzero(~valid)) > 0.01 * len(valid):
            raise BadFrame(
                f"{scene}/{name}: {lost} of {len(valid)} depth pixels lie where the lens model cannot be inverted; "
                f"check {scene}/{DISTORTED[0]}/cameras.txt"
            )
        depth = splat(fx * x[valid] + cx, fy * y[valid] + cy, z[valid], size, fx, remove_hidden=False)
        return Sample(image, depth, (fx, fy, cx, cy))

    def _depth_pixels(self, name: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Measured pixels of a raw little-endian float32 map: columns, rows and metres, each (N,)."""
        path, (width, height) = self.path(name), size
        if (length := path.stat().st_size) != 4 * width * height:
            raise BadFrame(f"{name} has {length} bytes, but {width}x{height} float32 are {4 * width * height}")
        depth = np.fromfile(path, dtype="<f4")
        # +inf is the set's "none"; NaN compares false.
        if bad := np.count_nonzero(~(depth >= 0)):
            raise BadFrame(f"{name} holds {bad} values that are NaN or negative; it is damaged, download it again")
        measured = np.flatnonzero((depth > 0) & (depth < np.inf))
        v, u = np.divmod(measured, width)
        return u, v, depth[measured]

    def _camera(self, scene: str, name: str, kind: tuple[str, str, str, int]) -> tuple[tuple[int, int], list[float]]:
        """Size (W, H) and parameters of an image's camera, with cx and cy counted from pixel centres."""
        folder, images, model, count = kind
        ids = self._camera_ids(scene, kind)
        if name not in ids:
            raise BadFrame(f"{scene}/{folder}/images.txt has no image {images}/{name}; it has no calibration")
        lines = [line.split() for line in self.read_text(scene, folder, "cameras.txt").splitlines()]
        fields = next((fields for fields in lines if fields[:2] == [ids[name], model]), [])
        if len(fields) != 4 + count:
            raise BadFrame(f"{scene}/{folder}/cameras.txt has no {model} of {count} numbers for camera {ids[name]}")
        fx, fy, cx, cy, *lens = map(float, fields[4:])
        return (int(fields[2]), int(fields[3])), [fx, fy, cx - 0.5, cy - 0.5, *lens]

    def _camera_ids(self, scene: str, kind: tuple[str, str, str, int]) -> dict[str, str]:
        """File name -> camera id, of an images.txt. Two lines per image; the second, its 2-D points, may be empty."""
        ids, lines = {}, iter(self.read_text(scene, kind[0], "images.txt").splitlines())
        for line in lines:
            if line.strip() and not line.startswith("#"):
                *_, camera, name = line.split()
                ids[name.rpartition("/")[2]] = camera
                next(lines, None)
        return ids


def undistort(
    x_distorted: np.ndarray, y_distorted: np.ndarray, lens: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Invert THIN_PRISM_FISHEYE: distorted normalised coordinates (N,) -> x / z, y / z and which are valid, each (N,).

    lens: k1, k2, p1, p2, k3, k4, sx1, sy1. Forwards, a direction at angle theta from the axis is first put at radius
    theta (equidistant); then a = (x, y) of squared length r2 goes to a * (1 + k1 r2 + k2 r2^2 + k3 r2^3 + k4 r2^4)
    + (2 p1 x y + p2 (r2 + 2 x^2) + sx1 r2, 2 p2 x y + p1 (r2 + 2 y^2) + sy1 r2). Backwards by Newton's method.

    Invalid: not converged, or beyond the angle from which the radial polynomial falls again (or 90 degrees), where
    several directions share a pixel.
    """
    k1, k2, p1, p2, k3, k4, sx1, sy1 = lens
    x, y = np.array(x_distorted, dtype=np.float64), np.array(y_distorted, dtype=np.float64)
    with np.errstate(all="ignore"):
        for _ in range(30):
            r2 = x * x + y * y
            radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
            error_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x) + sx1 * r2 - x_distorted
            error_y = y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y) + sy1 * r2 - y_distorted
            converged = np.maximum(np.abs(error_x), np.abs(error_y)) < 1e-9
            if converged.all():
                break
            slope = 2 * (k1 + r2 * (2 * k2 + r2 * (3 * k3 + r2 * 4 * k4)))  # of radial, over r, divided by r
            shared = x * y * slope + 2 * (p1 * x + p2 * y)
            xx = radial + x * x * slope + 2 * p1 * y + 6 * p2 * x + 2 * sx1 * x
            yy = radial + y * y * slope + 2 * p2 * x + 6 * p1 * y + 2 * sy1 * y
            xy, yx = shared + 2 * sx1 * y, shared + 2 * sy1 * x
            determinant = xx * yy - xy * yx
            x -= (yy * error_x - xy * error_y) / determinant
            y -= (xx * error_y - yx * error_x) / determinant
        theta = np.hypot(x, y)
        turns = np.roots([9 * k4, 7 * k3, 5 * k2, 3 * k1, 1])  # in theta^2
        limits = [math.sqrt(turn.real) for turn in turns if turn.real > 0 and abs(turn.imag) < 1e-12]
        scale = np.where(theta > 1e-9, np.tan(theta) / theta, 1.0)
    return x * scale, y * scale, converged & (theta < min([math.pi / 2, *limits]))


SOURCE = Eth3d
