"""ZoeDepth (Bhat et al., "ZoeDepth", 2023), through transformers: `zoedepth:Intel/zoedepth-nyu-kitti`.

The NYU-KITTI model chooses its indoor or outdoor head once for a whole batch, so each image is run alone. The reflected
border that its processor adds is cut off again, as in transformers' `post_process_depth_estimation(source_sizes=...)`,
which itself needs torchvision.
"""

import math

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoImageProcessor, ZoeDepthForDepthEstimation

from ..contestant import Contestant


class ZoeDepth(Contestant):
    title = "ZoeDepth"
    dense = True
    batch_safe = False
    model_types = ("zoedepth",)

    def __init__(self, checkpoint, device="cpu", dtype="float32"):
        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type not in self.model_types:
            raise ValueError(f"{checkpoint} is a {config.model_type!r} model, not ZoeDepth; try pipeline:{checkpoint}")
        self.processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.model = ZoeDepthForDepthEstimation.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
        self.model.to(device).eval()

    @torch.inference_mode()
    def maps(self, queries):
        return [self.map(query.image) for query in queries]

    def map(self, image):
        inputs = self.processor(image, return_tensors="pt").to(self.model.device, self.model.dtype)
        depth = self.model(**inputs).predicted_depth.float()
        width, height = image.size
        pad_x, pad_y = (int(3 * math.sqrt(side / 2)) if self.processor.do_pad else 0 for side in image.size)
        depth = F.interpolate(depth[None], size=(height + 2 * pad_y, width + 2 * pad_x), mode="bicubic")[0, 0]
        return depth[pad_y : pad_y + height, pad_x : pad_x + width].numpy(force=True)


CONTESTANT = ZoeDepth
