"""DepthVLM: Qwen3-VL that returns, from the same forward pass, a dense metric depth map for every image.

The vision tower encodes each image once. Its three DeepStack features (merged, of the LLM's width) and the LLM's last
hidden state at the image tokens are four maps on the token grid, from which `DepthVLMDPTHead` predicts one depth per
pixel of the processed image. The text path is Qwen3-VL's, bit for bit.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, GenerationConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
from transformers.utils import can_return_tuple

from .configuration_depthvlm import DepthVLMConfig

# id of a model -> the depth that its running `generate` is asked for; not on the model, which threads share
depth_requests: ContextVar[Mapping[int, "DepthRequest"]] = ContextVar("depth_requests", default=MappingProxyType({}))


# arguments of the backbone's forward; what else comes goes to every part of it
BACKBONE_ARGUMENTS = frozenset(inspect.signature(Qwen3VLModel.forward).parameters)
CACHE = "cache" if "cache" in BACKBONE_ARGUMENTS else "past_key_values"  # renamed by transformers 5.24


@dataclass
class DepthVLMOutput(CausalLMOutputWithPast):
    """
    Qwen3-VL's loss, logits, cache, hidden states and attentions, and the depth of the batch's images.

    predicted_depth (tuple of `torch.FloatTensor` of shape `(height, width)`, one per image, in the batch's order):
        z-depth in metres as a camera of `config.canonical_focal_length` sees it, float32, at the processed image's
        size. `processor.post_process_depth_estimation` takes it to the photo's own camera and size. `None` with
        `output_depth=False`.
    cameras (list of dict, one per image): the processor's `cameras`, passed on for post-processing.
    """

    predicted_depth: tuple[torch.FloatTensor, ...] | None = None
    cameras: list[dict] | None = None

    def to_tuple(self) -> tuple:
        """Loss (with `labels`), logits and depth, then the other fields that are not `None`."""
        first = [name for name in ("loss", "logits", "predicted_depth") if name in self]
        return tuple(self[name] for name in (*first, *(name for name in self if name not in first)))


@dataclass
class DepthVLMGenerateOutput(GenerateDecoderOnlyOutput):
    """`generate`'s output, and `predicted_depth` and `cameras` per image of the prompt, as in `DepthVLMOutput`."""

    predicted_depth: tuple[torch.FloatTensor, ...] | None = None
    cameras: list[dict] | None = None


@dataclass
class DepthVLMGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """Beam search's output, and `predicted_depth` and `cameras` per image of the prompt, as in `DepthVLMOutput`."""

    predicted_depth: tuple[torch.FloatTensor, ...] | None = None
    cameras: list[dict] | None = None


@dataclass
class DepthVLMImageFeatures(BaseModelOutputWithDeepstackFeatures):
    """
    The vision tower's output with the depth head's fields, as `generate` drops the grid and repeats the features for
    each beam.

    image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`): the patch grid of each image.
    visual_maps (tuple of tuples of `torch.FloatTensor` of shape `(num_tokens, hidden_size)`): the DeepStack levels and
        the tower's output, each with one tensor per image.
    """

    image_grid_thw: torch.LongTensor | None = None
    visual_maps: tuple | None = None


@dataclass
class DepthRequest:
    """
    The depth that one call of `generate` is asked for.

    callback: see `generate`. cameras: the processor's. predicted_depth: `None` until the prefill has run.
    """

    callback: Callable[[DepthVLMOutput], None] | None
    cameras: list[dict] | None
    predicted_depth: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DepthVLMSeen:
    """
    What the depth head reads of one backbone pass; `DepthVLMModel.forward` fills it in.

    input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): they say where the image tokens are.
    images (`DepthVLMImageFeatures`): `None` without images.
    outputs (`BaseModelOutputWithPast`): of the LLM.
    """

    input_ids: torch.LongTensor | None = None
    images: DepthVLMImageFeatures | None = None
    outputs: BaseModelOutputWithPast | None = None


class DepthVLMModel(Qwen3VLModel):
    """Qwen3-VL's backbone, whose image features and last hidden state can be had for the depth head."""

    config: DepthVLMConfig

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, image_grid_thw: torch.LongTensor | None = None, **kwargs
    ) -> DepthVLMImageFeatures:
        if pixel_values.dtype == torch.uint8:
            raise ValueError("pixel_values are 8-bit patches; pass processor.normalize_patches(pixel_values) instead")
        features = super().get_image_features(pixel_values, image_grid_thw, **kwargs)
        return DepthVLMImageFeatures(
            **features,
            image_grid_thw=image_grid_thw,
            visual_maps=(*features.deepstack_features, features.pooler_output),
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        *,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        seen: DepthVLMSeen | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPast:
        """As Qwen3-VL's; `seen`, if given, is filled in. The cache goes by upstream's name."""
        if seen is not None and mm_encoder_outputs is None:
            # encoded here and handed over: only transformers 5.24 and later return the features that the LLM reads
            options = {name: value for name, value in kwargs.items() if name not in BACKBONE_ARGUMENTS}
            mm_encoder_outputs = {}
            if pixel_values is not None:
                mm_encoder_outputs["image"] = self.get_image_features(pixel_values, image_grid_thw, **options)
            if pixel_values_videos is not None:
                mm_encoder_outputs["video"] = self.get_video_features(pixel_values_videos, video_grid_thw, **options)
            pixel_values = pixel_values_videos = None
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        if seen is not None:
            seen.input_ids, seen.images, seen.outputs = input_ids, (mm_encoder_outputs or {}).get("image"), outputs
        return outputs


class DepthVLMResidualUnit(nn.Module):
    """R(x) = ReLU(x) + conv2(ReLU(conv1(ReLU(x)))): the shortcut is rectified, as the released weights were trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.relu(hidden_states)
        return hidden_states + self.conv2(F.relu_(self.conv1(hidden_states)))


class DepthVLMFusion(nn.Module):
    """Adds a skip connection to the coarser map and resizes the sum to the grid of the next finer level."""

    def __init__(self, channels: int, has_skip: bool):
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, kernel_size=1)
        if has_skip:
            self.resConfUnit1 = DepthVLMResidualUnit(channels)
        self.resConfUnit2 = DepthVLMResidualUnit(channels)

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor | None, size: Sequence[int]) -> torch.Tensor:
        if skip is not None:
            hidden_states = hidden_states + self.resConfUnit1(skip)
        hidden_states = self.resConfUnit2(hidden_states)
        # a 1x1 convolution commutes with bilinear resizing, and costs a quarter on the smaller grid
        return resize(self.out_conv(hidden_states), size)


class DepthVLMFloat32Conv(nn.Conv2d):
    """A convolution in float32, whatever the dtype of its weights. A module, so that accelerate's offloading works."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(hidden_states.float(), self.weight.float(), self.bias.float())


class DepthVLMFloat32Linear(nn.Linear):
    """A linear layer in float32, as `DepthVLMFloat32Conv`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states.float(), self.weight.float(), self.bias.float())


class DepthVLMDPTHead(nn.Module):
    """
    The paper's DPT head: four maps on the token grid -> one positive depth per pixel.

    1. one LayerNorm for all four; 1x1 projections; a pyramid of 8, 4, 2 and 1 times the token grid (`"dpt_original"`:
       4, 2, 1 and 1/2 times);
    2. 3x3 convolutions to 256 channels, fused from the coarsest to the finest;
    3. two 3x3 convolutions around the last resize, a 1x1 convolution and Softplus, these two in float32.
    """

    def __init__(self, config: DepthVLMConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        widths, channels = config.depth_head_widths, config.depth_head_channels
        self.pixels_per_token = pixels_per_token(config)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.projects = nn.ModuleList([nn.Conv2d(hidden_size, width, kernel_size=1) for width in widths])
        factors = (4, 2, 1, 0.5) if config.depth_head_type == "dpt_original" else (8, 4, 2, 1)
        self.resize_layers = nn.ModuleList(map(resampling, widths, factors))
        self.scratch = nn.Module()
        for level, width in enumerate(widths, start=1):
            conv = nn.Conv2d(width, channels, kernel_size=3, padding=1, bias=False)
            self.scratch.add_module(f"layer{level}_rn", conv)
            self.scratch.add_module(f"refinenet{level}", DepthVLMFusion(channels, has_skip=level < len(widths)))
        self.scratch.output_conv1 = nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(channels // 2, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            DepthVLMFloat32Conv(32, 1, kernel_size=1),
        )

    def forward(self, features: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """
        features: four tensors of shape `(batch_size * grid_h * grid_w, hidden_size)`, in raster order per image.
        grid: `(grid_h, grid_w)`, in tokens.

        Returns a float32 tensor of shape `(batch_size, grid_h * pixels_per_token, grid_w * pixels_per_token)`.
        """
        scratch = self.scratch
        pyramid = []
        for level, tokens in enumerate(features):
            # (B, D, g_h, g_w) by strides alone: the tokens are channels-last already, the fast format for convolutions
            maps = self.norm(tokens).unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)
            maps = self.resize_layers[level](self.projects[level](maps))
            pyramid.append(getattr(scratch, f"layer{level + 1}_rn")(maps))
        fused = scratch.refinenet4(pyramid[3], None, pyramid[2].shape[-2:])
        fused = scratch.refinenet3(fused, pyramid[2], pyramid[1].shape[-2:])
        fused = scratch.refinenet2(fused, pyramid[1], pyramid[0].shape[-2:])
        fused = scratch.refinenet1(fused, pyramid[0], [2 * side for side in pyramid[0].shape[-2:]])
        fused = resize(scratch.output_conv1(fused), [side * self.pixels_per_token for side in grid])
        fused = F.relu_(scratch.output_conv2[0](fused))
        with no_autocast(fused):
            return F.softplus(scratch.output_conv2[2](fused)).squeeze(1)


class DepthVLMMLPHead(nn.Module):
    """The two-layer head of table 4: each token predicts a block of pixels_per_token x pixels_per_token depths."""

    def __init__(self, config: DepthVLMConfig):
        super().__init__()
        self.multiscale = config.depth_head_type == "mlp_multiscale"
        in_features = config.text_config.hidden_size * (4 if self.multiscale else 1)
        self.pixels_per_token = pixels_per_token(config)
        self.norm = nn.LayerNorm(in_features, eps=1e-5)
        self.fc1 = nn.Linear(in_features, 1024)
        self.fc2 = DepthVLMFloat32Linear(1024, self.pixels_per_token**2)

    def forward(self, features: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """As `DepthVLMDPTHead.forward`; the single-scale head reads the fourth feature alone."""
        tokens = torch.cat(list(features), dim=-1) if self.multiscale else features[-1]
        hidden_states = F.gelu(self.fc1(self.norm(tokens)))
        with no_autocast(hidden_states):
            blocks = (
                F.softplus(self.fc2(hidden_states))
                .unflatten(-1, (self.pixels_per_token,) * 2)
                .unflatten(0, (-1, *grid))
            )
            return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)


HEADS = {  # depth_head_type -> class
    "dpt": DepthVLMDPTHead,
    "dpt_original": DepthVLMDPTHead,
    "mlp": DepthVLMMLPHead,
    "mlp_multiscale": DepthVLMMLPHead,
}


def pixels_per_token(config: DepthVLMConfig) -> int:
    """Side of a token in px of the processed image."""
    return config.vision_config.patch_size * config.vision_config.spatial_merge_size


def resampling(channels: int, factor: float) -> nn.Module:
    """A layer that resizes a map by `factor`: a transposed convolution, a strided one, or nothing."""
    if factor == 1:
        return nn.Identity()
    if factor < 1:
        return nn.Conv2d(channels, channels, kernel_size=3, stride=round(1 / factor), padding=1)
    return nn.ConvTranspose2d(channels, channels, kernel_size=factor, stride=factor)


def resize(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear, with corners aligned, as in the released code. maps: `(batch_size, channels, height, width)`."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def no_autocast(tensor: torch.Tensor) -> torch.autocast:
    """A context without autocast: bfloat16 has three significant digits, too few to tell neighbouring pixels apart."""
    return torch.autocast(tensor.device.type, enabled=False)


class DepthVLMForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """
    Qwen3-VL with a depth head: `forward` returns logits and depth, `generate` tokens and depth.

    Depth is predicted for images; videos are processed as in Qwen3-VL, without depth.
    """

    config: DepthVLMConfig
    _no_split_modules = [
        *Qwen3VLForConditionalGeneration._no_split_modules,
        *sorted({head.__name__ for head in HEADS.values()}),
    ]

    def __init__(self, config: DepthVLMConfig):
        config.validate_architecture()  # again: from_pretrained sets the fields it was given after construction
        # not the parent's __init__, which builds a backbone of its own and runs post_init before the head exists
        super(Qwen3VLForConditionalGeneration, self).__init__(config)
        self.model = DepthVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.depth_head = HEADS[config.depth_head_type](config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The head is initialised as PyTorch initialises its layers, the rest as in Qwen3-VL."""
        if module not in set(self.depth_head.modules()):
            super()._init_weights(module)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, output_loading_info: bool = False, **kwargs
    ) -> "DepthVLMForConditionalGeneration | tuple[DepthVLMForConditionalGeneration, dict]":
        """
        As in transformers, with two more checks: only a plain Qwen3-VL gets a newly initialised depth head, and a
        trained one is loaded with the feature source and the canonical focal length that it was trained with.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        head = {name for name in model.state_dict() if name.startswith("depth_head.")}
        missing = sorted(head & set(info["missing_keys"]))
        is_base = model.config.model_type == Qwen3VLForConditionalGeneration.config_class.model_type
        if missing and not (is_base and len(missing) == len(head)):
            raise ValueError(
                f"{model.config.name_or_path or 'the checkpoint'} lacks {len(missing)} of the depth head's {len(head)} "
                f"tensors ({', '.join(missing[:3])}, ...), so its depth would be random; download it again, or add "
                "a new head to a plain Qwen3-VL with convert_checkpoint.py"
            )
        if not missing:
            hub = {
                name: kwargs[name] for name in ("cache_dir", "local_files_only", "token", "revision") if name in kwargs
            }
            stored, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **hub)
            for name in ("depth_feature_source", "depth_llm_layers", "canonical_focal_length"):  # of equal shapes
                if stored.get(name) is not None and stored[name] != getattr(model.config, name):
                    raise ValueError(
                        f"{name} is {getattr(model.config, name)!r}, but the weights were trained with "
                        f"{stored[name]!r}, so depth would be wrong; leave it out, or train a new head"
                    )
        return (model, info) if output_loading_info else model

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        cache: Cache | None = None,
        output_depth: bool = True,
        cameras: list[dict] | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> tuple | DepthVLMOutput:
        r"""
        As Qwen3-VL's `forward`, with:

        cache (`Cache`, *optional*): as `past_key_values`; upstream's name for it since transformers 5.24.
        output_depth (`bool`, defaults to `True`): whether to predict depth for the batch's images.
        cameras (list of dict, one per image): the processor's `cameras`, passed on for post-processing.

        ```python
        >>> inputs = processor(images=[photo], return_tensors="pt")
        >>> outputs = model(**inputs)
        >>> processor.post_process_depth_estimation(outputs)[0]["predicted_depth"]  # (H, W), metres
        ```
        """
        if "depth_labels" in kwargs:
            raise ValueError(
                "depth_labels are no input of the model; pop them from the batch and give them to silog_loss, with "
                "outputs.predicted_depth"
            )
        check_image_inputs(self.config, input_ids, pixel_values, image_grid_thw, cameras, output_depth)
        if output_depth and input_ids is None and mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            raise ValueError(
                "mm_encoder_outputs['image'] came without input_ids, which say where the image's tokens are; pass "
                "input_ids too, or output_depth=False"
            )
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
        seen = DepthVLMSeen() if output_depth else None  # not a dict: accelerate's hooks would fill a copy
        needs_states = output_depth and self.config.depth_feature_source == "llm"
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            output_hidden_states=needs_states or output_hidden_states,
            return_dict=True,
            seen=seen,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        return DepthVLMOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            hidden_states=select_states(outputs.hidden_states, output_hidden_states)
            if needs_states
            else outputs.hidden_states,
            attentions=outputs.attentions,
            predicted_depth=self.predict_depth(seen, cameras) if output_depth else None,
            cameras=cameras,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def predict_depth(self, seen: DepthVLMSeen, cameras: list[dict] | None = None) -> tuple[torch.Tensor, ...]:
        """
        Depth from one backbone pass; the head runs once per group of images of one grid.

        Returns one float32 `(height, width)` per image, as `DepthVLMOutput.predicted_depth`. Raises `ValueError` where
        the processor made other grids than the vision tower was given.
        """
        images = self.depth_features(seen)
        groups = {}
        for index, (_, grid) in enumerate(images):
            groups.setdefault(grid, []).append(index)
            size = tuple(side * self.depth_head.pixels_per_token for side in grid)
            if cameras is not None and size != tuple(first_of(cameras[index]).get("processed_size", size)):
                raise ValueError(
                    f"image {index} has {size[0]}x{size[1]} px by image_grid_thw, but its camera says "
                    f"{cameras[index]['processed_size']}; pass the processor's batch as it is"
                )
        depth = [None] * len(images)
        for grid, members in groups.items():
            levels = zip(*(images[index][0] for index in members), strict=True)
            features = [torch.cat(level) for level in levels]
            for index, prediction in zip(members, self.depth_head(features, grid), strict=True):
                depth[index] = prediction
        return tuple(depth)

    def depth_features(self, seen: DepthVLMSeen) -> list[tuple[list[torch.Tensor], tuple[int, int]]]:
        """The depth head's arguments for each image: four features `(grid_h * grid_w, hidden_size)`, and the grid."""
        images = seen.images
        if images is None:
            return []
        if getattr(images, "image_grid_thw", None) is None:
            raise ValueError(
                "mm_encoder_outputs['image'] has no image_grid_thw, so its depth cannot be laid out; make it with this "
                "model's get_image_features, or pass output_depth=False"
            )
        merge = self.config.vision_config.spatial_merge_size
        # the batch's one synchronisation; everything after it is planned on the host
        grids = [(height // merge, width // merge) for _, height, width in images.image_grid_thw.tolist()]
        sizes = [height * width for height, width in grids]
        # beams repeat a row; the copies are equal up to the last image token, so the first is enough
        copies = len(images.pooler_output) // len(grids)
        at_images = seen.input_ids[::copies] == self.config.image_token_id

        def on_tokens(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return states[::copies][at_images.to(states.device)].split(sizes)

        if self.config.depth_feature_source == "vit":
            maps = images.visual_maps
        elif self.config.depth_feature_source == "llm":
            layers = [seen.outputs.hidden_states[layer + 1] for layer in self.config.depth_llm_layers]
            maps = [on_tokens(states) for states in (*layers, seen.outputs.last_hidden_state)]
        else:
            maps = [*images.visual_maps[:-1], on_tokens(seen.outputs.last_hidden_state)]
        head = next(self.depth_head.parameters())
        return [([level[index].to(head.dtype) for level in maps], grid) for index, grid in enumerate(grids)]

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        output_depth: bool | None = None,
        depth_callback: Callable[[DepthVLMOutput], None] | None = None,
        cameras: list[dict] | None = None,
        **kwargs,
    ) -> torch.LongTensor | DepthVLMGenerateOutput | DepthVLMGenerateBeamOutput:
        r"""
        As Qwen3-VL's `generate`. With `return_dict_in_generate=True` the output also holds `predicted_depth`, one map
        per image of the prompt (not per returned sequence), made by the prefill that the answer starts from.

        output_depth (`bool`, *optional*): `False` leaves depth out, `True` insists; by default it comes with the dict,
            and with `depth_callback`.
        depth_callback (callable, *optional*): called once, as soon as the prefill has depth and before the first token
            goes to a streamer, in the thread of `generate`, with an output that holds `predicted_depth` and `cameras`
            for `processor.post_process_depth_estimation`.
        cameras (list of dict, one per image): the processor's, handed on to the output for post-processing.

        A conversation goes on from the cache of an earlier output with `processor.follow_up(outputs, question)`.
        """
        settings = generation_config or self.generation_config
        returns_dict = kwargs.get("return_dict_in_generate", settings.return_dict_in_generate)
        if output_depth and not returns_dict and depth_callback is None:
            raise ValueError("output_depth=True needs return_dict_in_generate=True; a tensor has no room for depth")
        if depth_callback is not None and output_depth is False:
            raise ValueError("depth_callback came with output_depth=False; leave one of them out")
        output_depth = bool(returns_dict) or depth_callback is not None if output_depth is None else output_depth
        pixel_values, grid = kwargs.get("pixel_values"), kwargs.get("image_grid_thw")
        check_image_inputs(self.config, kwargs.get("input_ids", inputs), pixel_values, grid, cameras, output_depth)
        if pixel_values is not None and kwargs.get("mm_token_type_ids") is None:
            raise ValueError(
                "mm_token_type_ids is missing beside pixel_values; without it the image would be placed like text, "
                "so pass on everything that the processor returned"
            )
        if output_depth and kwargs.get("prefill_chunk_size", settings.prefill_chunk_size) is not None:
            raise ValueError(
                "prefill_chunk_size cuts images into pieces without depth; leave it out or pass output_depth=False"
            )
        request = DepthRequest(depth_callback, cameras) if output_depth else None
        token = depth_requests.set({**depth_requests.get(), id(self): request})
        try:
            outputs = super().generate(inputs, generation_config, **kwargs)
        finally:
            depth_requests.reset(token)  # to another `generate`'s where a model assists itself
        if request is None or not returns_dict:
            return outputs
        is_beam = isinstance(outputs, GenerateBeamDecoderOnlyOutput)
        output_class = DepthVLMGenerateBeamOutput if is_beam else DepthVLMGenerateOutput
        return output_class(**outputs, predicted_depth=request.predicted_depth or (), cameras=cameras)

    @functools.wraps(Qwen3VLForConditionalGeneration.prepare_inputs_for_generation)  # `generate` reads its signature
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        model_inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        request = depth_requests.get().get(id(self))
        is_prefill = request is not None and request.predicted_depth is None
        return model_inputs | {"output_depth": is_prefill, "cameras": request.cameras if is_prefill else None}

    def _update_model_kwargs_for_generation(self, outputs: DepthVLMOutput, model_kwargs: dict, *args, **kwargs) -> dict:
        request = depth_requests.get().get(id(self))
        if request is not None and request.predicted_depth is None:
            request.predicted_depth = outputs.predicted_depth
            if request.callback is not None:
                depth = DepthVLMOutput(predicted_depth=outputs.predicted_depth, cameras=request.cameras)
                request.callback(depth)
        positions, cache = model_kwargs.get("position_ids"), outputs.get(CACHE)
        if cache is not None and positions is not None and len(positions) == 4:
            # text positions, then three of M-RoPE: what a later `generate` on this cache has to add to the former
            cache.rope_deltas = positions[1, :, -1:] - positions[0, :, -1:]
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        """As Qwen3-VL's, which would take the `rope_deltas` of the model's last prompt, whosever that was."""
        cache, types = model_kwargs.get(CACHE), model_kwargs.get("mm_token_type_ids")
        deltas = getattr(cache, "rope_deltas", None)
        past = cache.get_seq_length() if deltas is not None else 0
        if past == 0 or (types is not None and types[:, past:].any()):  # a new prompt, or new images
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        positions = super(Qwen3VLForConditionalGeneration, self)._prepare_position_ids_for_generation(
            inputs_tensor, model_kwargs
        )
        return positions[None] + deltas


def silog_loss(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """
    SILog of one image (paper, eq. 4): sqrt(mean d^2 - 0.5 mean(d)^2 + 1e-8), d = ln prediction - ln label, over the
    labelled pixels.

    prediction: `(height, width)`, positive. label: `(h, w)`, in the same unit, 0 = no label, at least one pixel
    labelled. The prediction is resized to the label's size where they differ. Computed in float32.
    """
    if prediction.shape != label.shape:
        prediction = resize(prediction[None, None], label.shape)[0, 0]
    with no_autocast(prediction):
        labelled = label > 0
        difference = prediction[labelled].float().log() - label[labelled].float().log()
        return torch.sqrt(difference.square().mean() - 0.5 * difference.mean().square() + 1e-8)


def select_states(
    states: tuple[torch.Tensor, ...], selection: bool | int | list[int] | None
) -> tuple[torch.Tensor | None, ...] | None:
    """The hidden states that `output_hidden_states` selects; those not in a list of layers are None."""
    if not selection:
        return None
    if selection is True:
        return states
    layers = [layer % len(states) for layer in ([selection] if isinstance(selection, int) else selection)]
    return tuple(state if layer in layers else None for layer, state in enumerate(states))


def first_of(camera: dict | list[dict]) -> dict:
    """A camera, which a pipeline's batch wraps in a list."""
    return camera[0] if isinstance(camera, list) else camera


def check_image_inputs(
    config: DepthVLMConfig,
    input_ids: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    image_grid_thw: torch.Tensor | None,
    cameras: list[dict] | None,
    output_depth: bool,
) -> None:
    """Raise `ValueError` for image inputs that do not belong together."""
    if pixel_values is None:
        return
    if image_grid_thw is None:
        raise ValueError("pixel_values came without image_grid_thw; pass on everything that the processor returned")
    if input_ids is None and output_depth:
        raise ValueError(
            "pixel_values came without input_ids, which say where the image's tokens are; pass input_ids too, "
            "or output_depth=False"
        )
    if cameras is not None and len(cameras) != len(image_grid_thw):
        raise ValueError(f"got {len(cameras)} cameras for {len(image_grid_thw)} images; pass one per image, or None")
    for camera in map(first_of, cameras or ()):
        sized_for = camera.get("canonical_focal_length", config.canonical_focal_length)
        if sized_for != config.canonical_focal_length:
            raise ValueError(
                f"canonical_focal_length is {sized_for} px in the processor and {config.canonical_focal_length} px in "
                "the model, so metres would be wrong; load both from one checkpoint"
            )


__all__ = ["DepthVLMForConditionalGeneration", "DepthVLMModel"]
