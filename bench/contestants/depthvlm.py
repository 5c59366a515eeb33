"""DepthVLM: the processor normalises the focal length, the model sees once, the processor brings metres back."""

import numpy as np
import torch
from transformers import BatchFeature

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor

from ._base import Contestant, Query


class DepthVLM(Contestant[BatchFeature]):
    title = "DepthVLM"
    group = "VLMs Trained on Metric Depth Estimation"
    dense = True
    uses_intrinsics = True
    model_types = ("depthvlm",)

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        dtype = getattr(torch, dtype)
        self.model = DepthVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
        self.processor = DepthVLMProcessor.from_pretrained(checkpoint, trust_remote_code=False)

    def prepare(self, queries: list[Query]) -> BatchFeature:
        return self.processor(
            images=[query.image for query in queries],
            focal_lengths=[query.intrinsics[0] for query in queries],
            uint8_patches=True,  # an eighth of the bytes between the processes
            return_tensors="pt",
        )

    @torch.inference_mode()
    def maps(self, prepared: BatchFeature) -> list[np.ndarray]:
        inputs = dict(prepared.to(self.model.device))
        inputs["pixel_values"] = self.processor.normalize_patches(inputs["pixel_values"])
        outputs = self.model(**inputs, logits_to_keep=1)
        maps = self.processor.post_process_depth_estimation(outputs)
        return [depth["predicted_depth"].float().cpu().numpy() for depth in maps]


CONTESTANT = DepthVLM
