"""Depth Pro (Bochkovskii et al., "Depth Pro", ICLR 2025), through transformers: `depth_pro:apple/DepthPro-hf`.

Metres come from the field of view that the model itself predicts, not from the camera's focal length: its canonical
inverse depth times width / focal length, inverted and held within 0.1 mm and 10 km.
"""

import math

import numpy as np
import torch
from PIL import Image
from transformers import DepthProConfig, DepthProForDepthEstimation
from transformers.utils import is_torchvision_available

from ._base import NotRunnable, Query
from ._dense import DepthModel


class DepthPro(DepthModel):
    title = "Depth Pro"
    estimates_camera = True
    model_types = ("depth_pro",)
    model_class = DepthProForDepthEstimation

    def check(self, checkpoint: str, config: DepthProConfig) -> None:
        if not config.use_fov_model:
            raise ValueError(f"{checkpoint} predicts no field of view, hence no metres; pass apple/DepthPro-hf")
        if not is_torchvision_available():
            raise NotRunnable(
                "transformers prepares images for Depth Pro with torchvision alone: pip install torchvision"
            )

    @torch.inference_mode()
    def maps(self, prepared: list[Query]) -> list[np.ndarray]:
        inputs = self.processor([query.image for query in prepared], return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device, self.model.dtype))
        outputs.predicted_depth = outputs.predicted_depth.float()
        outputs.field_of_view = outputs.field_of_view.float()
        # Without sizes the answer would be canonical, not metric.
        sizes = [query.image.size[::-1] for query in prepared]
        depths = self.processor.post_process_depth_estimation(outputs, target_sizes=sizes)
        return [depth["predicted_depth"].numpy(force=True) for depth in depths]

    @torch.inference_mode()
    def focal_length(self, image: Image.Image) -> float:
        inputs = self.processor(image, return_tensors="pt").to(self.model.device, self.model.dtype)
        fov = math.radians(self.model(**inputs).field_of_view.item())  # over the image's width
        return image.width / 2 / math.tan(fov / 2)


CONTESTANT = DepthPro
