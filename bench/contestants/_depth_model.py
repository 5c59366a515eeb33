"""Metric depth models of transformers."""

from typing import ClassVar

from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from ._base import Contestant, Query


class DepthModel(Contestant[list[Query]]):
    """A checkpoint of `model_class`; its config is checked before its weights are read."""

    dense = True
    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: str = "float32"):
        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type not in self.model_types:
            raise ValueError(
                f"{checkpoint} is a {config.model_type!r} model, not {self.title}; try pipeline:{checkpoint}"
            )
        self.check(checkpoint, config)
        self.processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.model = self.model_class.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
        self.model.to(device).eval()

    def check(self, checkpoint: str, config: PreTrainedConfig) -> None:
        """Raise ValueError for a checkpoint without metres, NotRunnable for what is not installed."""
