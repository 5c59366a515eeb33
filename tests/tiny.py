"""A DepthVLM that fits in a test: random weights, 64 wide, and batches for it made by hand."""

import inspect
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE, VIDEO, VISION_START, VISION_END = 300, 301, 302, 303
PIXELS = 32  # a token's side: patch 16, merged 2x2
# `cache` since transformers 5.24, `past_key_values` before
CACHE = next(
    name
    for name in inspect.signature(Qwen3VLForConditionalGeneration.forward).parameters
    if name in ("cache", "past_key_values")
)

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 400,
    "initializer_range": 0.1,  # wide enough for every token to feel the others
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 5,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1, 2, 3],
    "initializer_range": 0.1,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def tiny_config(**fields) -> DepthVLMConfig:
    fields = {"depth_head_widths": [8, 12, 16, 16], "depth_head_channels": 16, "tie_word_embeddings": True} | fields
    text, vision = TEXT | fields.pop("text_config", {}), VISION | fields.pop("vision_config", {})
    return DepthVLMConfig(text_config=text, vision_config=vision, **TOKENS | fields)


def tiny_model(seed=0, attn_implementation="sdpa", **fields) -> DepthVLMForConditionalGeneration:
    torch.manual_seed(seed)
    model = DepthVLMForConditionalGeneration._from_config(
        tiny_config(**fields), attn_implementation=attn_implementation
    )
    enliven(model.depth_head)
    return model.eval()


def enliven(head: nn.Module) -> nn.Module:
    """Weights with which the depth varies from decimetres to tens of metres: a fresh head says 0.7 m everywhere."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
            elif name == "norm.weight":
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, std=0.3)
        *_, weight, bias = head.parameters()
        weight *= 0.3
        bias += 3
    return head


def plain_qwen(model, attn_implementation="sdpa") -> Qwen3VLForConditionalGeneration:
    """transformers' own Qwen3-VL with the model's weights, its dtype too."""
    config = Qwen3VLConfig(
        text_config=model.config.text_config.to_dict(),
        vision_config=model.config.vision_config.to_dict(),
        tie_word_embeddings=model.config.tie_word_embeddings,
        **TOKENS,
    )
    plain = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(key.startswith("depth_head.") for key in unexpected)
    return plain.to(model.dtype).eval()


def tiny_batch(grids_per_row, padding="left", seed=0, dtype=torch.float32) -> dict:
    """
    grids_per_row: for each row the token grids `(grid_h, grid_w)` of its images; `[]` is a row of text alone.

    Returns what the processor returns, images being noise that depends on their place in the batch and on `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, grids, pixels = [], [], []
    for row in grids_per_row:
        ids = torch.randint(0, 256, (4,), generator=generator).tolist()
        for grid_h, grid_w in row:
            ids += [VISION_START] + [IMAGE] * (grid_h * grid_w) + [VISION_END]
            ids += torch.randint(0, 256, (3,), generator=generator).tolist()
            grids.append([1, 2 * grid_h, 2 * grid_w])
            pixels.append(torch.randn(4 * grid_h * grid_w, 3 * 2 * 16 * 16, generator=generator))
        rows.append(ids + torch.randint(0, 256, (2,), generator=generator).tolist())
    batch = collate(rows, padding)
    if pixels:
        batch |= {"pixel_values": torch.cat(pixels).to(dtype), "image_grid_thw": torch.tensor(grids)}
    return batch


def collate(rows, padding="left") -> dict:
    length = max(map(len, rows))
    input_ids, attention_mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if padding == "left" else slice(0, len(row))
        input_ids[index, place], attention_mask[index, place] = torch.tensor(row), 1
    types = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
    return {"input_ids": input_ids, "attention_mask": attention_mask, "mm_token_type_ids": types}


def single(batch, row, image_slice) -> dict:
    """One row of a batch on its own, without padding; image_slice: which of the batch's images are the row's."""
    kept = batch["attention_mask"][row].bool()
    out = {name: batch[name][row : row + 1, kept] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    patches = batch["image_grid_thw"].prod(-1).tolist()
    images = range(len(patches))[image_slice]
    if len(images):
        out["pixel_values"] = torch.cat([batch["pixel_values"].split(patches)[index] for index in images])
        out["image_grid_thw"] = batch["image_grid_thw"][image_slice]
    return out
