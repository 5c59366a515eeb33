"""Depth Anything 3 (Lin et al., "Depth Anything 3", 2025): `depth_anything_3:depth-anything/DA3METRIC-LARGE`, and
`depth-anything/DA3NESTED-GIANT-LARGE-1.1`, through the package depth-anything-3.

DA3METRIC answers metres for a focal length of 300 px: its depth times the focal length in px of the *processed* image
(long side 504) / 300, which the package leaves to us. DA3NESTED finds the camera itself. Both answer at the processed
size and are interpolated to the image's. The sky's depth comes from a random sample, and images given together are
cropped to one shape, so each goes alone. The package sets the precision itself: bfloat16 or float16.
"""

import numpy as np
import torch
import torch.nn.functional as F

from ._base import Query, package
from ._dense import PerImage


class DepthAnything3(PerImage):
    title = "Depth Anything 3"
    uses_intrinsics = True  # DA3METRIC; DA3NESTED does not
    batch_safe = False

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        install = "pip install depth-anything-3, in an environment of its own (it wants numpy below 2)"
        with package("depth_anything_3", "Depth Anything 3", install):
            from depth_anything_3.api import DepthAnything3
        self.model = DepthAnything3.from_pretrained(checkpoint)
        if not self.model.model_name.startswith(("da3metric", "da3nested")):
            raise ValueError(
                f"{checkpoint} ({self.model.model_name}) answers relative depth, not metres; "
                "pass depth-anything/DA3METRIC-LARGE or a DA3NESTED one"
            )
        self.uses_intrinsics = self.model.model_name.startswith("da3metric")
        self.model.to(device).eval()

    def map(self, query: Query) -> np.ndarray:
        depth = np.asarray(self.model.inference([query.image]).depth[0], np.float32)
        width, height = query.image.size
        if self.uses_intrinsics:
            fx, fy, *_ = query.intrinsics
            depth = depth * (fx * depth.shape[1] / width + fy * depth.shape[0] / height) / 2 / 300
        depth = torch.from_numpy(depth.astype(np.float32))[None, None]
        return F.interpolate(depth, size=(height, width), mode="bilinear")[0, 0].numpy()


CONTESTANT = DepthAnything3
