"""NYUv2: the 654 labelled test frames of a Kinect v1. Evaluation only; two releases are read, never mixed.

- Inside SUN RGB-D (the paper's choice, taken when both are there): 561x427 images, a crop of the original, whose top
  left pixel is the original's (41, 45); depth is `depth_bfx`, filled (see `bench.sun`).
- nyu_depth_v2_labeled.mat: the original 640x480 images, and `rawDepths`, which are measured pixels only: 0 = none, and
  10 m is where the set cuts off all farther values, so it is no measurement either. float32 metres, stored in 1 mm.
"""

from collections.abc import Iterator

import numpy as np

from ._base import MAX_PIXELS, BadFrame, BadRaw, Frame, Sample, Source
from ._sun import ALLSPLIT, alltest_folders, load_scene, read_mat

LABELED = "nyu_depth_v2_labeled.mat"
# fx, fy, cx, cy of the original 640x480 images.
INTRINSICS = (518.8579, 519.4696, 325.5824, 253.7362)
SATURATED = 10.0


class NyuV2(Source):
    name = "nyuv2"
    title = "NYU Depth V2"
    page = "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"
    licence = "research use, no explicit text"
    citation = "Silberman, Hoiem, Kohli, Fergus: Indoor Segmentation and Support Inference from RGBD Images, ECCV 2012"
    layout = (
        "SUNRGBD/kv1/NYUdata/NYU0001/{image/*.jpg, depth_bfx/*.png, intrinsics.txt} with splits.mat or "
        f"{ALLSPLIT}; or {LABELED} with splits.mat"
    )
    # One of the two; which split file is needed depends on it, and `frames` says so.
    needs = (("[Sn][Uy][Nu]*[Dd]*", f"SUNRGBD (with kv1/NYUdata) or {LABELED}"),)
    splits = {"test": ("test",)}
    depth_range = (0.005, 10.0)
    depth_scale = 1000.0

    def frames(self, split: str) -> Iterator[Frame]:
        self.own_splits(split)
        in_sun = self._in_sun()
        if not in_sun and not self.path(LABELED).is_file():
            raise BadRaw(f"{self.raw} has neither SUNRGBD/kv1/NYUdata nor {LABELED}; pass the folder that holds one")
        if self.path("splits.mat").is_file():
            names = [f"NYU{number:04d}" for number in self._test_numbers()]
        elif in_sun:
            names = [folder.rsplit("/", 1)[1] for folder in alltest_folders(self) if folder.startswith("kv1/NYUdata/")]
        else:
            raise BadRaw(f"splits.mat is not beside {LABELED}; download it from {self.page}")
        for name in names:
            yield Frame(name, "")

    def _in_sun(self) -> bool:
        return self.path("SUNRGBD/kv1/NYUdata").is_dir()

    def _test_numbers(self) -> list[int]:
        """testNdxs of splits.mat, which count from 1, sorted."""
        numbers = np.asarray(read_mat(self, "splits.mat", "testNdxs"), dtype=np.float64).ravel()
        if not np.all((numbers >= 1) & (numbers <= 9999) & (numbers == np.floor(numbers))):
            raise BadRaw("splits.mat: testNdxs must be whole numbers from 1 up; download it again")
        return sorted({int(number) for number in numbers})

    def load(self, frame: Frame) -> Sample:
        return (
            load_scene(self, f"kv1/NYUdata/{frame.id}") if self._in_sun() else self._load_labeled(int(frame.id[3:]) - 1)
        )

    def _load_labeled(self, index: int) -> Sample:
        try:
            import h5py
        except ImportError as error:
            raise ImportError(f"reading {LABELED} needs h5py; run: pip install h5py") from error
        with h5py.File(self.path(LABELED), "r") as file:
            # HDF5 reverses MATLAB's axes: (frame, channel, column, row).
            image = _one(file, "images", index, "uint8", (3, 640, 480)).transpose(2, 1, 0)
            depth = _one(file, "rawDepths", index, "float32", (640, 480)).T
        if not np.all(np.isfinite(depth)) or depth.min() < 0:
            raise BadFrame(f"{LABELED} frame {index + 1}: rawDepths holds NaN, infinite or negative metres")
        depth = np.where(depth < SATURATED, depth, np.float32(0))
        return Sample(np.ascontiguousarray(image), depth, INTRINSICS)


def _one(file, name: str, index: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Entry `index` of an HDF5 data set that must be as the release has it, its values inside the file itself."""
    import h5py

    link = file.get(name, getlink=True)
    data = file.get(name) if isinstance(link, h5py.HardLink) else None
    if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
        raise BadFrame(f"{LABELED} has no data set {name!r} of its own; download it again")
    if data.dtype != dtype or data.shape[1:] != shape:
        raise BadFrame(f"{LABELED}: {name} is {data.dtype} {data.shape}, not {dtype} (N, {', '.join(map(str, shape))})")
    if data.chunks and np.prod(data.chunks, dtype=np.float64) > MAX_PIXELS:
        raise BadFrame(f"{LABELED}: {name} has chunks of {data.chunks}; refused as a decompression bomb")
    if not 0 <= index < len(data):
        raise BadFrame(f"{LABELED} holds {len(data)} frames, but splits.mat lists number {index + 1}")
    return data[index]


SOURCE = NyuV2
