"""NYUv2: the 654 labelled test frames of a Kinect v1. Evaluation only; two releases are read, never mixed.

- Inside SUN RGB-D (the paper's choice, taken where both are present): 561x427 images, the originals from their pixel
  (40, 44) on, counted from 0; depth is `depth_bfx`, with holes filled (see `_sun.py`).
- nyu_depth_v2_labeled.mat: the original 640x480 images, and `rawDepths`, which are measured pixels only: 0 = none, and
  10 m is where the set cuts off all farther values, so it is no measurement either. float32 metres, stored in 1 mm.

Uncertain by 1 px: cx and cy. SUN's are the original's less (41, 45), not (40, 44), which is right if the original's
count pixels from 1 and SUN's from 0. Neither set says; here both are taken as counted from 0.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ._base import BadFrame, BadRaw, Frame, Sample, Source, import_package
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

    def __init__(self, raw: str | Path):
        super().__init__(raw)
        self.in_sun = self.path("SUNRGBD/kv1/NYUdata").is_dir()

    def frames(self, split: str) -> Iterator[Frame]:
        self.official_splits(split)
        if not self.in_sun and not self.path(LABELED).is_file():
            raise BadRaw(f"{self.raw} has neither SUNRGBD/kv1/NYUdata nor {LABELED}; pass the folder that holds one")
        if self.path("splits.mat").is_file():
            numbers = read_mat(self, "splits.mat", "testNdxs").ravel().astype(int)  # they count from 1
            if numbers.min() < 1:
                raise BadRaw("splits.mat: testNdxs must be whole numbers from 1 up; download it again")
            names = [f"NYU{number:04d}" for number in sorted(numbers)]
        elif self.in_sun:
            names = [folder.rsplit("/", 1)[1] for folder in alltest_folders(self) if folder.startswith("kv1/NYUdata/")]
        else:
            raise BadRaw(f"splits.mat is not beside {LABELED}; download it from {self.page}")
        for name in names:
            yield Frame(name, scene="")

    def load(self, frame: Frame) -> Sample:
        if self.in_sun:
            return load_scene(self, f"kv1/NYUdata/{frame.id}")
        index = int(frame.id.removeprefix("NYU")) - 1
        with import_package("h5py", "h5py").File(self.path(LABELED), "r") as file:
            images, depths = file["images"], file["rawDepths"]
            # HDF5 reverses MATLAB's axes: (frame, channel, column, row).
            if (images.shape[1:], depths.shape[1:]) != ((3, 640, 480), (640, 480)):
                raise BadFrame(f"{LABELED}: images is {images.shape}, rawDepths is {depths.shape}; download it again")
            image, depth = images[index].transpose(2, 1, 0), depths[index].T
        depth[depth == SATURATED] = 0
        return Sample(np.ascontiguousarray(image), depth, INTRINSICS)


SOURCE = NyuV2
