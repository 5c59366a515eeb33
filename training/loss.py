"""The losses of a training step: TRL's fused text loss and the depth loss, from one pass of the backbone."""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration, DepthVLMSeen, no_autocast, resize, silog_loss

DELTA1 = 1.25
GRADIENT_SCALES = 4
BRANCHED = "sdpa_with_branches"  # attention of a batch whose questions are separate, see `attend`


def gradient_matching_loss(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """
    Gradient matching of one image (Ranftl et al. 2020, eq. 11), in log depth: the sum over 4 scales, each of half the
    resolution of the one before, of mean(|dR/dx| + |dR/dy|) with R = ln prediction - ln label.

    prediction: `(height, width)`, positive. label: `(height, width)`, in the same unit, 0 = no label. Differences count
    between neighbours that both have a label; the mean is over the labelled pixels of the scale.
    """
    with no_autocast(prediction):
        total = prediction.new_zeros((), dtype=torch.float32)
        for scale in range(GRADIENT_SCALES):
            depth, metres = (maps[:: 2**scale, :: 2**scale].float() for maps in (prediction, label))
            labelled = metres > 0
            residual = depth.log() - torch.where(labelled, metres, 1).log()
            for axis in (0, 1):
                size = residual.shape[axis] - 1
                both = labelled.narrow(axis, 0, size) & labelled.narrow(axis, 1, size)
                total = total + residual.diff(dim=axis)[both].abs().sum() / labelled.sum().clamp(min=1)
        return total


DEPTH_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    # name in `depth_losses` -> loss of one image: (height, width) prediction and label, at least one pixel labelled
    "silog": silog_loss,
    "gradient_matching": gradient_matching_loss,
}


@dataclass
class DepthTrainingOutput(FusedCausalLMOutput):
    """
    TRL's fused output and, of the images that have a label:

    depth_loss (`torch.Tensor` of shape `()`): the sum of their depth losses, times the targets' scale.
    depth_scores (`torch.Tensor` of shape `(num_labelled, 3)`): depth loss, delta1 and AbsRel per image, no gradient.

    The text fields hold the positions that have a label, `(1, num_answer_tokens)`, in the batch's order.
    """

    depth_loss: torch.Tensor | None = None
    depth_scores: torch.Tensor | None = None


def add_depth_loss(
    model: DepthVLMForConditionalGeneration,
    trains_text: bool,
    depth_losses: dict[str, float] | None = None,
    head_alone: bool = False,
) -> None:
    """
    Extend TRL's fused forward, which has to be there already, by the depth loss from the same backbone pass.

    depth_losses: weights of the terms of `DEPTH_LOSSES` whose sum is the depth loss; default: SILog alone.
    head_alone: whether the depth loss's gradient ends at the head's inputs.

    `model(..., depth_targets=SimpleNamespace(labels=[...], scale=1.0))` then returns a `DepthTrainingOutput`; in plain
    arguments FSDP2 would round labels and scale to the parameters' dtype. It has to happen inside
    `model.forward`, so that DDP and FSDP, which wrap the model, see the head's parameters used. Without `trains_text`
    the backbone runs without gradients and the LM head not at all.
    """
    fused_forward, depth_losses = model.forward, depth_losses or {"silog": 1.0}

    @functools.wraps(type(model).forward)
    def forward(self, *args, depth_targets=None, **kwargs):
        if depth_targets is None:
            return fused_forward(*args, **kwargs)
        depth_labels, depth_scale = depth_targets.labels, depth_targets.scale
        seen = DepthVLMSeen()  # made here: DDP and FSDP would hand on a copy
        if isinstance(self.depth_head, FSDPModule):
            raise ValueError(
                "FSDP2 has sharded the depth head by itself, but ranks call it once per labelled image, so they would "
                "wait for each other; set fsdp_transformer_layer_cls_to_wrap without it, as configs/fsdp2.yaml does"
            )
        branches = kwargs.pop("branches", None)
        if branches is not None:
            kwargs |= separate(self, branches, kwargs)
        zero = connected_zero(self, has_images=kwargs.get("pixel_values") is not None)
        if self.config.depth_feature_source == "llm":
            kwargs["output_hidden_states"] = True
        text = {}
        if trains_text:
            answers = kwargs.pop("labels")[:, 1:]
            with states_at(self.base_model, answers != -100):
                text = fused_forward(*args, seen=seen, shift_labels=answers[answers != -100][None], **kwargs)
        else:
            with torch.no_grad():
                self.base_model(*args, seen=seen, **kwargs)
        has_label = [bool((label > 0).any()) for label in depth_labels]
        images = self.depth_features(seen) if any(has_label) else []
        pairs = zip(images, depth_labels, strict=bool(images))
        labelled = [(*image, label) for (image, label), has in zip(pairs, has_label, strict=False) if has]
        if head_alone:
            labelled = [([level.detach() for level in levels], grid, label) for levels, grid, label in labelled]
        trained = [parameter for parameter in self.depth_head.parameters() if parameter.requires_grad]
        if not labelled:
            zero = zero + sum(0 * parameter.sum() for parameter in trained)
            return DepthTrainingOutput(**text, depth_loss=zero, depth_scores=torch.zeros(0, 3, device=self.device))
        flat = [level for features, _, _ in labelled for level in features]
        sizes = [(len(features), grid, label) for features, grid, label in labelled]
        if torch.is_grad_enabled():
            loss, scores = ImageByImage.apply(
                self.depth_head, sizes, depth_losses, depth_scale, len(trained), *trained, *flat
            )
        else:
            scores = [
                score(self.depth_head(features, grid)[0], label, depth_losses) for features, grid, label in labelled
            ]
            scores = torch.stack(scores)
            loss = depth_scale * scores[:, 0].sum()
        return DepthTrainingOutput(**text, depth_loss=zero + loss, depth_scores=scores)

    model.forward = types.MethodType(forward, model)


@dataclass
class BranchLayout:
    """
    Where a batch's branches lie.

    shared (`int`): the length of the longest branch 0, with which sequences begin.
    own (`torch.Tensor` of shape `(batch_size, num_branches, max_own)`): the tokens of each branch from 1 on, as indices
        into the flattened batch; 0 where `is_own` (bool, same shape) is not.
    bias (`torch.Tensor` of shape `(batch_size, num_branches, 1, 1, max_own, shared + max_own)`): 0 for what they see,
        all of branch 0 and their own up to themselves, else -inf.
    """

    shared: int
    own: torch.Tensor
    is_own: torch.Tensor
    bias: torch.Tensor


def separate(model: DepthVLMForConditionalGeneration, branches: torch.Tensor, inputs: dict) -> dict:
    """
    What makes each branch see branch 0 and itself alone, at the positions that it would have right after branch 0.

    branches: `(batch_size, sequence_length)`, -1 in the padding; ascending in each row. Returns `position_ids` and
    `branch_layout`, which the language model's attention gets (`attend`).
    """
    attention = model.base_model.language_model.config
    if attention._attn_implementation == "sdpa":
        attention._attn_implementation = BRANCHED
    elif attention._attn_implementation != BRANCHED:
        raise ValueError(
            f"separate_questions needs attn_implementation sdpa, but it is {attention._attn_implementation}; change "
            "it, or leave separate_questions out"
        )
    rope = {name: inputs.get(name) for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
    positions, _ = model.base_model.get_rope_index(**rope)
    length, numbers = branches.shape[1], torch.arange(1, branches.max() + 1, device=branches.device)
    before = ((branches >= 0) & (branches < numbers[:, None, None])).sum(2).T  # of each branch from 1 on
    starts = positions[0].gather(1, before.clamp(max=length - 1))
    shift = F.pad(starts - starts[:, :1], (1, 0))
    sizes = (branches == numbers[:, None, None]).sum(2).T
    steps = torch.arange(sizes.max(), device=branches.device)
    is_own = steps < sizes[:, :, None]
    tokens = before[:, :, None] + steps + length * torch.arange(len(branches), device=branches.device)[:, None, None]
    shared = int((branches == 0).sum(1).max())
    causal = steps[:, None] >= steps
    seen = torch.cat(
        [(branches[:, :shared] == 0)[:, None, None].expand(*is_own.shape, -1), causal.expand(*is_own.shape, -1)], -1
    )
    bias = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)
    return {
        "position_ids": positions - shift.gather(1, branches.clamp(min=0)),
        "branch_layout": BranchLayout(shared, tokens.where(is_own, 0), is_own, bias[:, :, None, None]),
    }


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    branch_layout: BranchLayout | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    SDPA, of a batch with branches without what they do not see of each other: most of a long sequence.

    query: `(batch_size, num_heads, sequence_length, head_dim)`; key, value: the same with `num_key_value_heads`.
    """
    if branch_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    shared, own, bias = branch_layout.shared, branch_layout.own, branch_layout.bias
    batch, length, groups = len(own), query.shape[2], key.shape[1]
    first = [states[:, :, :shared] for states in (query, key, value)]

    def of_branches(states):
        """`(batch_size, num_branches, max_own, heads, head_dim)` of `(batch_size, heads, sequence_length, head_dim)`"""
        states = states.transpose(1, 2).flatten(0, 1)
        return states.flatten(1).index_select(0, own.flatten()).view(*own.shape, *states.shape[1:])

    def beside(shared_states, states):
        """What branches may see: `(batch_size, num_branches, num_key_value_heads, shared + max_own, head_dim)`"""
        shared_states = shared_states[:, None].expand(-1, own.shape[1], -1, -1, -1)
        return torch.cat([shared_states, of_branches(states).transpose(2, 3)], 3)

    # the heads of a group see the same keys: they become rows of one product
    queries = (of_branches(query) * scaling).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    scores = queries.flatten(3, 4) @ beside(first[1], key).mT
    scores = scores.view(*queries.shape[:5], -1).add_(bias.to(scores.dtype)).flatten(3, 4)
    answers = scores.softmax(-1).to(value.dtype) @ beside(first[2], value)
    answers = answers.view(queries.shape).permute(0, 1, 4, 2, 3, 5).reshape(own.numel(), -1)
    first = F.scaled_dot_product_attention(*first, is_causal=True, scale=scaling, enable_gqa=True)
    states = F.pad(first.transpose(1, 2).flatten(2), (0, 0, 0, length - shared)).flatten(0, 1)
    states = states.index_copy(0, own[branch_layout.is_own], answers[branch_layout.is_own.flatten()])
    return states.view(batch, length, *query.shape[1::2]), None


AttentionInterface.register(BRANCHED, attend)
AttentionMaskInterface.register(BRANCHED, sdpa_mask)


@contextmanager
def states_at(backbone: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """
    Within the block, `backbone` returns the last hidden states at these positions alone, `(1, number, hidden_size)`.

    positions: bool, `(batch_size, sequence_length - 1)`. Without Triton, TRL's fused head would score every position.
    """

    def pick(_, __, outputs):
        return BaseModelOutputWithPast(last_hidden_state=outputs.last_hidden_state[:, :-1][positions][None])

    handle = backbone.register_forward_hook(pick)
    try:
        yield
    finally:
        handle.remove()


class ImageByImage(torch.autograd.Function):
    """
    The sum of the images' depth losses, times a scale. Its gradients are computed on the way, so that the head's
    activations, two gigabytes per image at the paper's size, are held for one image at a time and not for the batch.
    """

    @staticmethod
    def forward(ctx, head, images, depth_losses, scale, num_parameters, *tensors):
        """
        images: (number of features, grid, label) of each. depth_losses: name -> weight. scale: of the loss. tensors:
        `num_parameters` parameters, then all features.

        Returns the loss and, per image, depth loss, delta1 and AbsRel, `(num_images, 3)`.
        """
        parameters, features = tensors[:num_parameters], iter(tensors[num_parameters:])
        scores, sums, gradients = [], [None] * num_parameters, []
        for number, grid, label in images:
            levels = [next(features) for _ in range(number)]
            levels = [level.detach().requires_grad_(level.requires_grad) for level in levels]
            inputs = [*parameters, *levels]
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            with torch.enable_grad():
                image_scores = score(head(levels, grid)[0], label, depth_losses)
                computed = iter(torch.autograd.grad(image_scores[0] * scale, wanted, allow_unused=True))
            computed = [next(computed) if tensor.requires_grad else None for tensor in inputs]
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, computed, strict=False)]
            gradients += computed[num_parameters:]
            scores.append(image_scores.detach())
        ctx.gradients = [*sums, *gradients]
        scores = torch.stack(scores)
        total = scores[:, 0].sum() * scale
        ctx.mark_non_differentiable(scores)
        return total, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, _):
        return (None,) * 5 + tuple(gradient if gradient is None else gradient * scale for gradient in ctx.gradients)


def connected_zero(model: DepthVLMForConditionalGeneration, has_images: bool) -> torch.Tensor:
    """
    0, connected to what this micro-batch may leave out and another rank's may use: DDP and FSDP wait for every rank.

    Without an image the vision tower sees one of a single token. An LM head that FSDP2 has sharded by itself is called
    before TRL reads its weight: from then on, and only so, its gradient is averaged over ranks.
    """
    zero = torch.zeros((), device=model.device)
    head = model.lm_head
    if isinstance(head.weight, DTensor) and head.weight.requires_grad and not model.config.tie_word_embeddings:
        zero = zero + 0 * head(torch.zeros(1, head.in_features, device=model.device, dtype=model.dtype)).sum()
    if not has_images:
        vision = model.config.vision_config
        side = vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2  # of a patch
        black = torch.zeros(side * side, values, device=model.device, dtype=model.dtype)
        grid = torch.tensor([[1, side, side]], device=model.device)
        features = model.base_model.get_image_features(black, grid)
        zero = zero + sum(0 * level[0].float().sum() for level in features.visual_maps)
    return zero


def score(prediction: torch.Tensor, label: torch.Tensor, depth_losses: dict[str, float]) -> torch.Tensor:
    """
    Depth loss, delta1 and AbsRel of one image over its labelled pixels, `(3,)`; only the loss has a gradient.

    prediction: `(height, width)`, resized to the label's size where they differ. depth_losses: name -> weight.
    """
    if prediction.shape != label.shape:
        prediction = resize(prediction[None, None], label.shape)[0, 0]
    loss = sum(weight * DEPTH_LOSSES[name](prediction, label) for name, weight in depth_losses.items())
    depth, metres = prediction.detach()[label > 0], label[label > 0]
    ratio = torch.maximum(depth / metres, metres / depth)
    return torch.stack([loss, (ratio < DELTA1).float().mean(), ((depth - metres).abs() / metres).mean()])
