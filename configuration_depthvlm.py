"""Configuration of DepthVLM: a Qwen3-VL with a depth head. The only channel by which the model is configured."""

import copy
import difflib
import math

import transformers
from packaging.version import Version
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.utils import logging

TESTED_TRANSFORMERS = ("5.19.0", "5.24.0")  # the oldest and the newest; requirements.txt and Makefile say the same

HEAD_TYPES = ("dpt", "dpt_original", "mlp", "mlp_multiscale")
DEPTH_FIELDS = (
    "depth_head_type",
    "depth_feature_source",
    "depth_head_widths",
    "depth_head_channels",
    "depth_llm_layers",
    "canonical_focal_length",
)
FEATURE_SOURCES = ("vit+llm", "vit", "llm")
REMOTE_CODE = {
    "AutoConfig": "configuration_depthvlm.DepthVLMConfig",
    "AutoModel": "modeling_depthvlm.DepthVLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_depthvlm.DepthVLMForConditionalGeneration",
    "AutoModelForDepthEstimation": "modeling_depthvlm.DepthVLMForConditionalGeneration",
}
PIPELINES = {
    "depth-estimation": {
        "impl": "processing_depthvlm.DepthVLMPipeline",
        "pt": ["AutoModelForImageTextToText"],
    }
}


def warn_of_untested_transformers() -> None:
    """One warning per process, however many of the repository's files are imported."""
    oldest, newest = TESTED_TRANSFORMERS
    minor = Version(transformers.__version__).release[:2]
    if not Version(oldest).release[:2] <= minor <= Version(newest).release[:2]:
        logging.get_logger("transformers.depthvlm").warning_once(
            f"DepthVLM was tested with transformers {oldest} to {newest}, and this is {transformers.__version__}; if "
            "something fails, install a tested version"
        )


warn_of_untested_transformers()


class DepthVLMConfig(Qwen3VLConfig):
    r"""
    Qwen3-VL's configuration and the depth head's fields.

    depth_head_type (`str`, defaults to `"dpt"`):
        `"dpt"`, the paper's head; of table 4 `"dpt_original"` (DPT's own resampling: x4, x2, x1, /2), `"mlp"` (two
        layers on the fourth feature alone) and `"mlp_multiscale"` (two layers on all four).
    depth_feature_source (`str`, defaults to `"vit+llm"`):
        Where the head's four features come from (table 5): three vision taps and the LLM's last state; `"vit"`, three
        vision taps and the vision tower's output; `"llm"`, three LLM layers and the LLM's last state.
    depth_head_widths (`list[int]`, defaults to `[256, 512, 1024, 1024]`):
        Channels that a DPT head projects its four features to, from the finest to the coarsest level.
    depth_head_channels (`int`, defaults to 256):
        Channels in which a DPT head fuses them.
    depth_llm_layers (`list[int]`, *optional*):
        The three decoder layers, counted from 0, that `depth_feature_source="llm"` reads. `None`: the quarter points.
    canonical_focal_length (`float`, defaults to 1000.0):
        Focal length in px that the depth head believes every image to have been taken with (f_c of the paper).
    """

    model_type = "depthvlm"

    depth_head_type: str = "dpt"
    depth_feature_source: str = "vit+llm"
    depth_head_widths: list[int] | tuple[int, ...] = (256, 512, 1024, 1024)
    depth_head_channels: int = 256
    depth_llm_layers: list[int] | None = None
    canonical_focal_length: float | int = 1000.0

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            # Qwen3VLConfig's own defaults disagree with each other: the tower's output must have the LLM's width
            text = self.text_config
            width = text.get("hidden_size") if isinstance(text, dict) else getattr(text, "hidden_size", None)
            self.vision_config = {"out_hidden_size": width or Qwen3VLTextConfig().hidden_size}
        for name in kwargs:
            if close := difflib.get_close_matches(name, DEPTH_FIELDS, n=1, cutoff=0.85):
                raise ValueError(f"{name} is no field of the configuration; {close[0]} is meant, perhaps")
        # Where the code lies is a property of the class: whatever a loaded file said, a saved one says this
        kwargs |= {"auto_map": dict(REMOTE_CODE), "custom_pipelines": copy.deepcopy(PIPELINES)}
        super().__post_init__(**kwargs)
        self.validate_architecture()  # called here: `@strict` would not raise a ValueError

    def validate_architecture(self) -> None:
        """Refuse depth fields that the head cannot be built from; Qwen3-VL's own fields are Qwen3-VL's matter."""
        super().validate_architecture()
        if self.depth_head_type not in HEAD_TYPES:
            raise ValueError(f"depth_head_type is {self.depth_head_type!r}; it must be one of {', '.join(HEAD_TYPES)}")
        if self.depth_feature_source not in FEATURE_SOURCES:
            raise ValueError(
                f"depth_feature_source is {self.depth_feature_source!r}; it must be one of {', '.join(FEATURE_SOURCES)}"
            )
        widths, channels = self.depth_head_widths, self.depth_head_channels
        if (
            not isinstance(widths, (list, tuple))
            or len(widths) != 4
            or any(not isinstance(width, int) or width < 1 for width in widths)
        ):
            raise ValueError(f"depth_head_widths is {widths}; it must be four positive numbers of channels")
        if not isinstance(channels, int) or channels < 2 or channels % 2:
            raise ValueError(f"depth_head_channels is {channels!r}; it must be a positive even number")
        focal = self.canonical_focal_length
        if not isinstance(focal, (int, float)) or not math.isfinite(focal) or focal <= 0:
            raise ValueError(f"canonical_focal_length is {focal!r}; it must be a positive number of pixels")
        taps, blocks = self.vision_config.deepstack_visual_indexes, self.vision_config.depth
        if self.depth_feature_source != "llm" and (len(taps) != 3 or any(not 0 <= tap < blocks for tap in taps)):
            raise ValueError(
                f"vision_config.deepstack_visual_indexes is {taps}; the depth head reads three of {blocks} blocks"
            )
        depth = self.text_config.num_hidden_layers
        if self.depth_llm_layers is None and self.depth_feature_source == "llm":
            self.depth_llm_layers = [depth * quarter // 4 - 1 for quarter in (1, 2, 3)]
        layers = self.depth_llm_layers
        if layers is not None and (
            not isinstance(layers, list)
            or len(layers) != 3
            or any(not isinstance(layer, int) for layer in layers)
            or layers != sorted(set(layers))
            or any(not 0 <= layer < depth for layer in layers)
        ):
            raise ValueError(f"depth_llm_layers is {layers}; it must be three ascending layers below {depth}")


__all__ = ["DepthVLMConfig"]
