"""SUN RGB-D: single RGB-D images of four sensors; test split without the NYUv2 part. Evaluation only.

Depth is stored as millimetres rotated left by 3 bits (see `_sun.py`). A folder that the split lists is never looked for
under another name: if it is missing, its frame is reported.
"""

import re
from collections.abc import Iterator

from ._base import Frame, Sample, Source
from ._sun import ALLSPLIT, alltest_folders, load_scene


class SunRgbd(Source):
    name = "sunrgbd"
    title = "SUN RGB-D"
    page = "https://rgbd.cs.princeton.edu"
    licence = "research use, no explicit text; parts come from NYUv2, B3DO and SUN3D"
    citation = "Song, Lichtenberg, Xiao: SUN RGB-D: A RGB-D Scene Understanding Benchmark Suite, CVPR 2015"
    layout = (
        "SUNRGBD/SENSOR/SOURCE/.../SCENE/{image/*.jpg, depth_bfx/*.png, depth/*.png, intrinsics.txt} (SUNRGBD.zip) and "
        "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat (SUNRGBDtoolbox.zip)"
    )
    needs = (
        (ALLSPLIT, "the split lists, from SUNRGBDtoolbox.zip"),
        ("SUNRGBD/kv1/b3dodata/*", "scenes of sensor kv1"),
        ("SUNRGBD/kv2/*/*", "scenes of sensor kv2"),
        ("SUNRGBD/realsense/*/*", "scenes of sensor realsense"),
        ("SUNRGBD/xtion/*/*", "scenes of sensor xtion"),
    )
    splits = {"test": ("alltest",)}
    depth_range = (0.005, 8.0)
    depth_scale = 1000.0  # the set's step, 1 mm

    def frames(self, split: str) -> Iterator[Frame]:
        """Every image is a scene of its own, so none is named: sampling then balances over the sources of images."""
        self.official_splits(split)
        for folder in alltest_folders(self):
            sensor, source, _ = folder.split("/", 2)
            if (sensor, source) != ("kv1", "NYUdata"):
                yield Frame(re.sub(r"[^A-Za-z0-9_./-]", "_", folder), "", f"{sensor}/{source}", folder)

    def load(self, frame: Frame) -> Sample:
        return load_scene(self, frame.data)


SOURCE = SunRgbd
