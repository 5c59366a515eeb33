"""Depth Anything V2's metric checkpoints (Yang et al., "Depth Anything V2", NeurIPS 2024), through transformers:
`depth_anything_v2:depth-anything/Depth-Anything-V2-Metric-{Indoor,Outdoor}-{Small,Base,Large}-hf`.

The head is a sigmoid times `max_depth` (20 m indoors, 80 m outdoors), so the sky gets that depth; it needs no focal
length. The encoder's other checkpoints answer relative depth and are refused.
"""

import numpy as np
import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

from ._base import Query
from ._dense import DepthModel


class DepthAnythingV2(DepthModel):
    title = "Depth Anything V2"
    model_types = ("depth_anything",)
    model_class = DepthAnythingForDepthEstimation

    def check(self, checkpoint: str, config: DepthAnythingConfig) -> None:
        if config.depth_estimation_type != "metric":
            raise ValueError(
                f"{checkpoint} answers {config.depth_estimation_type} depth, not metres; "
                "pass one of depth-anything/Depth-Anything-V2-Metric-*-hf"
            )

    @torch.inference_mode()
    def maps(self, prepared: list[Query]) -> list[np.ndarray]:
        maps = [None] * len(prepared)
        for size in {query.image.size for query in prepared}:  # the processor keeps the aspect: only equals stack
            rows = [row for row, query in enumerate(prepared) if query.image.size == size]
            inputs = self.processor([prepared[row].image for row in rows], return_tensors="pt")
            outputs = self.model(**inputs.to(self.model.device, self.model.dtype))
            outputs.predicted_depth = outputs.predicted_depth.float()
            depths = self.processor.post_process_depth_estimation(outputs, [size[::-1]] * len(rows))
            for row, depth in zip(rows, depths, strict=True):
                maps[row] = depth["predicted_depth"].numpy(force=True)
        return maps


CONTESTANT = DepthAnythingV2
