"""Any checkpoint of transformers' `depth-estimation` pipeline: `pipeline:CHECKPOINT`.

Scored is its `predicted_depth` at the image's own size, never `depth`, a picture stretched to 0..255. A config that
says that its model gives no metres is refused; of GLPN and of DPT on DINOv2 it says nothing, and their word is taken.
"""

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation, PreTrainedConfig, pipeline
from transformers.utils import is_torchvision_available

from ._base import Contestant, NotRunnable, Query


class Pipeline(Contestant[list[Query]]):
    title = "Pipeline"
    dense = True

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        self.title = f"{checkpoint} (pipeline)"
        config = AutoConfig.from_pretrained(checkpoint)
        if reason := why_not_metric(config):
            raise ValueError(f"{checkpoint} has no metric depth: {reason}; pass a checkpoint that answers in metres")
        if config.model_type in ("depth_pro", "zoedepth") and not is_torchvision_available():
            raise NotRunnable(f"the pipeline of {config.model_type} needs torchvision: pip install torchvision")
        if dtype == "bfloat16":
            raise ValueError("the pipeline cannot return bfloat16; pass float32 or float16")
        # loaded here: when the pipeline cannot load a checkpoint, it tries again in float32
        model = AutoModelForDepthEstimation.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.pipeline = pipeline("depth-estimation", model, image_processor=processor, device=device)

    def maps(self, prepared: list[Query]) -> list[np.ndarray]:
        answers = self.pipeline([query.image for query in prepared], batch_size=1)
        return [answer["predicted_depth"].to(torch.float32).numpy(force=True) for answer in answers]


def why_not_metric(config: PreTrainedConfig) -> str:
    """What its config says against a checkpoint's answers being metres of distance; "" if nothing does."""
    backbone = getattr(config, "backbone_config", None)
    if config.model_type == "chmv2":
        return "it measures the height of trees"
    if config.model_type == "prompt_depth_anything":
        return "it wants a lidar's depth beside the image"
    if config.model_type == "dpt" and getattr(backbone, "model_type", None) != "dinov2":
        return "it is one of MiDaS, which answer relative inverse depth"
    if config.model_type == "depth_pro" and not config.use_fov_model:
        return "it predicts no field of view"
    if config.model_type == "depth_anything" and config.depth_estimation_type != "metric":
        return f"its depth_estimation_type is {config.depth_estimation_type!r}"
    return ""


CONTESTANT = Pipeline
