"""Memory that a run needs on a rank, from the shapes of its weights and batches."""

import math
from dataclasses import dataclass

import torch
from peft import PeftConfig, get_peft_model
from transformers import Trainer
from trl import ModelConfig

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration

from .arguments import DepthSFTConfig, freeze

TOKENS_MEASURED = 16  # a square
BITS_4 = 0.5 + 4 / 64  # bytes per weight: 4 bits, and a float32 scale per 64 weights


@dataclass
class Memory:
    """Bytes on a rank. engine: how the model is divided among the ranks."""

    engine: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    other_activations: float  # with the other setting of gradient checkpointing
    checkpoint: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def empty_model(
    config: DepthVLMConfig, arguments: DepthSFTConfig, peft_config: PeftConfig | None
) -> DepthVLMForConditionalGeneration:
    """The model on the meta device, with adapters if asked for, frozen as it will be trained."""
    with torch.device("meta"):
        model = DepthVLMForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        freeze(model, arguments.trains)
        if peft_config is not None:
            get_peft_model(model, peft_config)
    return model


def saved_bytes(module: torch.nn.Module, *args, **kwargs) -> int:
    """Bytes of the activations that autograd keeps for the backward pass of `module(*args, **kwargs)`."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages, kept = {}, []

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*args, **kwargs)
    return sum(size for address, size in storages.items() if address not in weights)


def activations_per_token(model: DepthVLMForConditionalGeneration) -> dict[str, float]:
    """
    Bytes per token that one decoder layer, one vision block (per patch) and the depth head (per image token) keep.

    Measured on a few tokens, in bfloat16, on the CPU, with weights that hold nothing: all grow linearly with tokens.
    """
    text, vision, number = model.config.text_config, model.config.vision_config, TOKENS_MEASURED
    states = {"dtype": torch.bfloat16, "requires_grad": True}
    layer = model.model.language_model.layers[0].to_empty(device="cpu")
    block = model.model.visual.blocks[0].to_empty(device="cpu")
    head = model.depth_head.to_empty(device="cpu").bfloat16()
    side = math.isqrt(number)
    total = {
        "layer": saved_bytes(
            layer,
            torch.zeros(1, number, text.hidden_size, **states),
            position_embeddings=(torch.zeros(1, number, text.head_dim, dtype=torch.bfloat16),) * 2,
            attention_mask=None,
        ),
        "block": saved_bytes(
            block,
            torch.zeros(number, vision.hidden_size, **states),
            cu_seqlens=torch.tensor([0, number]),
            position_embeddings=(torch.zeros(number, vision.hidden_size // vision.num_heads),) * 2,
        ),
        "head": saved_bytes(head, [torch.zeros(number, text.hidden_size, **states) for _ in range(4)], (side, side)),
    }
    return {name: size / number for name, size in total.items()}


def activations(
    model: DepthVLMForConditionalGeneration,
    per_token: dict[str, float],
    trains: list[str],
    tokens: int,
    image_tokens: int,
    image: int,
    kept: bool,
) -> float:
    """
    Bytes of activations. per_token: of `activations_per_token`. tokens, image_tokens: of a micro-batch, padding
    included. image: tokens of its largest image. kept: whether every layer keeps its activations, or its input alone
    (gradient checkpointing).
    """
    text, vision = model.config.text_config, model.config.vision_config
    total = per_token["head"] * image + 4 * 2 * text.hidden_size * image_tokens  # of one image at a time; its features
    patches = image_tokens * vision.spatial_merge_size**2
    for trained, layers, size, count, width in (
        ("language_model" in trains, text.num_hidden_layers, per_token["layer"], tokens, text.hidden_size),
        ("vision" in trains, vision.depth, per_token["block"], patches, vision.hidden_size),
    ):
        through = trained or ("vision" in trains)  # what comes after a trained part passes gradients on
        if through and kept:
            total += layers * size * count
        else:  # one layer at work; the inputs of all, with checkpointing
            total += size * count + (layers * 2 * width * count if through else 0)
    return total


def optimizer_bytes(arguments: DepthSFTConfig) -> float:
    """Bytes of optimizer state per trained float32 weight: one step of the optimizer on a small tensor."""
    weights = torch.nn.Parameter(torch.zeros(64, 64))
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = cls([weights], **options)
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    states = [value for value in optimizer.state[weights].values() if torch.is_tensor(value) and value.numel() > 1]
    return sum(state.nbytes for state in states) / weights.numel()


def memory_per_rank(
    config: DepthVLMConfig,
    training_args: DepthSFTConfig,
    model_args: ModelConfig,
    peft_config: PeftConfig | None,
    tokens: int,
    image_tokens: int,
    image: int,
) -> list[Memory]:
    """Per rank, with a copy of the model on each (DDP) and with its weights divided among them (FSDP2, full shard)."""
    model = empty_model(config, training_args, peft_config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    in_16_bits = model_args.dtype in ("bfloat16", "float16")
    head = sum(parameter.numel() for parameter in model.depth_head.parameters() if parameter.requires_grad)
    # adapters and head are always float32; other trained parts under FSDP2
    masters = trained if peft_config is not None or not in_16_bits else head
    frozen_bytes = frozen * (2 if in_16_bits else 4)
    if model_args.load_in_4bit:
        linear = sum(
            parameter.numel()
            for name, parameter in model.model.language_model.named_parameters()
            if not parameter.requires_grad and parameter.ndim == 2 and "embed_tokens" not in name
        )
        frozen_bytes = linear * BITS_4 + (frozen - linear) * (2 if in_16_bits else 4)
    layers = [model.model.language_model.layers[0], model.model.visual.blocks[0]]
    unit = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    rest = model.get_input_embeddings().weight.numel()
    state = optimizer_bytes(training_args)
    sizes = (model, activations_per_token(model), training_args.trains, tokens, image_tokens, image)
    kept, inputs = (activations(*sizes, kept=kept) for kept in (True, False))
    if training_args.gradient_checkpointing:
        kept, inputs = inputs, kept
    ranks, plans = training_args.processes, []
    copies = 2 * trained if training_args.bf16 else 0  # autocast's copies of trained weights
    bytes_trained = 4 * masters + 2 * (trained - masters)
    plans.append(
        Memory(
            "DDP",
            frozen_bytes + bytes_trained + copies,
            bytes_trained,
            state * bytes_trained / 4,
            kept,
            inputs,
            (frozen_bytes if peft_config is None else 0) + bytes_trained + state * bytes_trained / 4,
        )
    )
    whole = 2 * (2 * unit + rest)  # two layers and the embeddings are gathered at a time, in 16 bits
    plans.append(
        Memory(
            "FSDP2",
            (frozen_bytes + 4 * trained) / ranks + whole,
            4 * trained / ranks,
            state * trained / ranks,
            kept,
            inputs,
            4 * trained + state * trained,
        )
    )
    return plans
