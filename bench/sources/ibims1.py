"""iBims-1: 100 indoor photographs with laser-scanned depth. Evaluation only.

Depth words are value * 50 / 65535 metres, 0 = none, read as z (what the set does not state, but its values agree with).
The 1-bit masks say which pixels to *keep*, despite their names: `mask_invalid` is 0 where depth is invalid,
`mask_transp` is 0 on transparent things. Both are applied.
"""

import math
import re
from collections.abc import Iterator

import numpy as np

from ._base import BadFrame, BadRaw, Frame, Sample, Source, open_image


class Ibims1(Source):
    name = "ibims1"
    title = "iBims-1"
    page = "https://www.asg.ed.tum.de/lmf/ibims1/"
    licence = "no explicit text found; ask on its page"
    citation = (
        "Koch, Liebel, Fraundorfer, Körner: Evaluation of CNN-based Single-Image Depth Estimation Methods, ECCVW 2018"
    )
    layout = (
        "the contents of ibims1_core_raw.zip: {rgb, depth, mask_invalid, mask_transp}/NAME.png, calib/NAME.txt and "
        "imagelist.txt (without it, all of rgb/ is taken)"
    )
    needs = (
        ("rgb/*.png", "images"),
        ("depth/*.png", "depth maps"),
        ("calib/*.txt", "intrinsics"),
        ("mask_invalid/*.png", "masks of valid depth"),
        ("mask_transp/*.png", "masks of things that are not transparent"),
    )
    splits = {"test": ("all",)}
    depth_range = (0.005, 25.0)
    depth_scale = 65535 / 50  # the set's own words

    def frames(self, split: str) -> Iterator[Frame]:
        self.own_splits(split)
        if self.path("imagelist.txt").is_file():
            names = self.read_text("imagelist.txt").split()
        else:
            names = [name for name in self.listdir("rgb") if name.endswith(".png")]
        for name in sorted({name.removesuffix(".png") for name in names}):
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise BadRaw(f"imagelist.txt or rgb/ has the image name {name!r}; a name is like livingroom_05")
            yield Frame(name, name.rpartition("_")[0])

    def load(self, frame: Frame) -> Sample:
        file = f"{frame.id}.png"
        image, _ = self.read_image("rgb", file)
        depth = self.read_depth16("depth", file).astype(np.float32) * np.float32(50 / 65535)
        for mask in ("mask_invalid", "mask_transp"):
            depth[~self._keep(f"{mask}/{file}", depth.shape)] = 0
        return Sample(image, depth, self._intrinsics(f"calib/{frame.id}.txt"))

    def _keep(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """A mask file -> (h, w) bool, true = keep."""
        image = open_image(self.read_bytes(name), name)
        # Colour or palette indexes would not mean zero / non-zero.
        if image.mode not in ("1", "L") or image.size != shape[::-1]:
            raise BadFrame(
                f"{name} is {image.size} of Pillow mode {image.mode!r}; it must be a 1-bit mask of {shape[::-1]}"
            )
        try:
            return np.asarray(image) != 0
        except (OSError, ValueError, SyntaxError) as error:
            raise BadFrame(f"{name} is truncated or broken ({error})") from error

    def _intrinsics(self, name: str) -> tuple[float, float, float, float]:
        """One line fx,fy,cx,cy in px."""
        try:
            fx, fy, cx, cy = map(float, self.read_text(name).split(","))
        except ValueError as error:
            raise BadFrame(f"{name} is not one line fx,fy,cx,cy ({error})") from error
        if not all(map(math.isfinite, (fx, fy, cx, cy))) or min(fx, fy) <= 0:
            raise BadFrame(f"{name} holds {fx}, {fy}, {cx}, {cy}; focal lengths must be positive, all numbers finite")
        return fx, fy, cx, cy


SOURCE = Ibims1
