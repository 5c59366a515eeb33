"""ZoeDepth (Bhat et al., "ZoeDepth", 2023), through transformers: `zoedepth:Intel/zoedepth-nyu-kitti`.

The NYU-KITTI model chooses its indoor or outdoor head once for a whole batch, so each image is run alone. The reflected
border that its processor adds is cut off again, as in transformers' `post_process_depth_estimation(source_sizes=...)`,
which itself needs torchvision.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ZoeDepthForDepthEstimation

from ._base import Query
from ._dense import DepthModel


class ZoeDepth(DepthModel):
    title = "ZoeDepth"
    batch_safe = False
    model_types = ("zoedepth",)
    model_class = ZoeDepthForDepthEstimation

    @torch.inference_mode()
    def maps(self, prepared: list[Query]) -> list[np.ndarray]:
        return [self.map(query.image) for query in prepared]

    def map(self, image: Image.Image) -> np.ndarray:
        inputs = self.processor(image, return_tensors="pt").to(self.model.device, self.model.dtype)
        depth = self.model(**inputs).predicted_depth.float()
        width, height = image.size
        pad_x, pad_y = (int(3 * math.sqrt(side / 2)) if self.processor.do_pad else 0 for side in image.size)
        depth = F.interpolate(depth[None], size=(height + 2 * pad_y, width + 2 * pad_x), mode="bicubic")[0, 0]
        return depth[pad_y : pad_y + height, pad_x : pad_x + width].numpy(force=True)


CONTESTANT = ZoeDepth
