"""What depth costs: `python -m bench.efficiency [--peers] [--layers N] [--grid 29 39] [--output FILE.json]`.

One model of Qwen3-VL-4B's sizes with random weights, one image, one process. Every ratio is between two contestants of
the same run that took turns, so that drift of the machine hits both; it is the median over the rounds. `--peers` adds
what else gives a depth map: the same VLM asked in words about one point after another, as DepthLM is, and depth models
of the published sizes, each on the input that its checkpoint asks for. All times are of the models alone.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DepthProConfig,
    DepthProForDepthEstimation,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)
from transformers.initialization import no_init_weights

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMDPTHead, DepthVLMForConditionalGeneration, DepthVLMSeen

TEXT_TOKENS = 64  # of the prompt, beside the image's: about the depth prompt with its system message
ALTERNATIVE = {  # contestant -> what its ratio is against
    "forward with depth": "plain prefill",
    "head": "straightforward head",
    "generate with depth": "forward + generate",
}
OURS = "forward with depth"  # what peers' ratios are against
ONE_POINT = "one point in words"
POINT_TOKENS = 8  # of an answer like "3.27 meters"; DepthLM's own, with its thoughts, is many times longer
ROOT = Path(__file__).resolve().parent.parent


def config_4b(layers: int = 36, vision_layers: int = 24) -> DepthVLMConfig:
    """DepthVLM on Qwen3-VL-4B-Instruct's sizes, with the first `layers` decoder and `vision_layers` vision layers."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": layers}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": rope}
    deepstack = [level * vision_layers // 4 - 1 for level in (1, 2, 3)]  # 5, 11 and 17 of 24
    vision = {"depth": vision_layers, "deepstack_visual_indexes": deepstack, "num_position_embeddings": 2304}
    vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560}
    return DepthVLMConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def random_model(config: DepthVLMConfig, dtype: torch.dtype, device: str) -> DepthVLMForConditionalGeneration:
    """A model with quickly made random weights, in `dtype` from the start: there is never a float32 copy."""
    return with_random_weights(DepthVLMForConditionalGeneration, config, dtype, device)


def with_random_weights(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    with no_init_weights(), torch.device(device):
        model = model_class._from_config(config, dtype=dtype)
    model.tie_weights()
    # a prime length, so that no two rows of a matrix are equal
    block = torch.randn(1000003, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.fill_(float(name.endswith("weight")))
                continue
            scale = (2 / parameter[0].numel()) ** 0.5  # He's: neither vanishes nor overflows
            for part in parameter.view(-1).split(len(block)):
                torch.mul(block[: len(part)], scale, out=part)
    return model.eval()


def plain_qwen3_vl(model: DepthVLMForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """transformers' own Qwen3-VL around the very modules of `model`: memory holds one copy of the weights."""
    fields = ("text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id")
    config = Qwen3VLConfig(**{field: getattr(model.config, field) for field in (*fields, "vision_end_token_id")})
    with torch.device("meta"):
        plain = Qwen3VLForConditionalGeneration._from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    plain.model.visual, plain.model.language_model = model.model.visual, model.model.language_model
    plain.lm_head = model.lm_head
    return plain.eval()


def random_inputs(config: DepthVLMConfig, grid: tuple[int, int], dtype: torch.dtype, device: str) -> dict:
    """What a processor makes of one photo of `grid` tokens (rows, columns) and a question."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(1)
    image_tokens = [config.image_token_id] * (grid[0] * grid[1])
    text = torch.randint(0, config.vision_start_token_id, (TEXT_TOKENS,), generator=generator).tolist()
    before, after = text[: TEXT_TOKENS // 3], text[TEXT_TOKENS // 3 :]
    input_ids = torch.tensor(
        [[*before, config.vision_start_token_id, *image_tokens, config.vision_end_token_id, *after]], device=device
    )
    rows, columns = (side * vision.spatial_merge_size for side in grid)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == config.image_token_id).int(),
        "pixel_values": torch.randn(rows * columns, patch, generator=generator).to(device, dtype),
        "image_grid_thw": torch.tensor([[1, rows, columns]], device=device),
    }


def straightforward_head(head: DepthVLMDPTHead, features: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """The paper's head as one writes it down: contiguous maps, 1x1 convolution after resizing, one dtype throughout."""
    scratch, pyramid = head.scratch, []

    def resize(maps, height, width):
        return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=True)

    def residual(unit, maps):
        maps = F.relu(maps)
        return maps + unit.conv2(F.relu(unit.conv1(maps)))

    for level, tokens in enumerate(features):
        maps = head.norm(tokens).view(-1, *grid, tokens.shape[-1]).permute(0, 3, 1, 2).contiguous()
        maps = head.resize_layers[level](head.projects[level](maps))
        pyramid.append(getattr(scratch, f"layer{level + 1}_rn")(maps))
    maps = None
    for level in (3, 2, 1, 0):
        block, skip = getattr(scratch, f"refinenet{level + 1}"), pyramid[level]
        maps = skip if maps is None else maps + residual(block.resConfUnit1, skip)
        height, width = pyramid[level - 1].shape[-2:] if level else (2 * side for side in skip.shape[-2:])
        maps = block.out_conv(resize(residual(block.resConfUnit2, maps), height, width))
    maps = resize(scratch.output_conv1(maps), *(side * head.pixels_per_token for side in grid))
    return F.softplus(scratch.output_conv2(maps)).squeeze(1)


def specialists() -> dict[str, tuple[type[PreTrainedModel], PreTrainedConfig, tuple[int, int]]]:
    """Depth models at the sizes of their published checkpoints: class, config and the input (height, width) in px.

    The input is what the checkpoint's processor makes of a photo of 4:3.
    """
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    dinov2 = large | {"model_type": "dinov2", "image_size": 518, "patch_size": 14, "reshape_hidden_states": False}
    depth_anything = DepthAnythingConfig(
        backbone_config=dinov2 | {"out_indices": [5, 12, 18, 24], "apply_layernorm": True},
        reassemble_hidden_size=1024,
        neck_hidden_sizes=[256, 512, 1024, 1024],
        fusion_hidden_size=256,
        depth_estimation_type="metric",
        max_depth=20,
    )
    vit = large | {"model_type": "dinov2", "image_size": 384, "patch_size": 16}
    depth_pro = DepthProConfig(image_model_config=vit, patch_model_config=vit, fov_model_config=vit, use_fov_model=True)
    return {
        "Depth Anything V2 Large": (DepthAnythingForDepthEstimation, depth_anything, (518, 686)),
        "ZoeDepth": (ZoeDepthForDepthEstimation, ZoeDepthConfig(), (384, 512)),
        "Depth Pro": (DepthProForDepthEstimation, depth_pro, (1536, 1536)),
    }


def peers(plain: Qwen3VLForConditionalGeneration, inputs: dict, dtype, device: str) -> dict[str, Callable]:
    """What `--peers` adds to the contestants."""
    answer = {"max_new_tokens": POINT_TOKENS, "min_new_tokens": POINT_TOKENS, "do_sample": False}
    contestants = {ONE_POINT: lambda: plain.generate(**inputs, **answer)}
    for name, (model_class, config, size) in specialists().items():
        model = with_random_weights(model_class, config, dtype, device)
        pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        contestants[name] = functools.partial(model, pixels)
    return contestants


def measure(contestants: dict[str, Callable], repeats: int, device: str) -> tuple[dict, dict]:
    """Seconds of each contestant in each round, and what each returned. They take turns; a first round is a warm-up."""

    def now():
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    seconds, results = {name: [] for name in contestants}, {}
    for _ in range(repeats + 1):
        for name, run in contestants.items():
            start = now()
            results[name] = run()
            seconds[name].append(now() - start)
    return {name: samples[1:] for name, samples in seconds.items()}, results


@torch.no_grad()
def efficiency(
    config: DepthVLMConfig,
    grid: tuple[int, int] = (29, 39),
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 5,
    new_tokens: int = 8,
    device: str = "cpu",
    with_peers: bool = False,
) -> dict:
    """
    Times prefill, its stages and generation for one image of `grid` tokens (rows, columns).

    Returns `seconds` (all samples by contestant), `ratios` (median over the rounds, against `alternatives`),
    `extrapolated` (seconds of a dense map by asking in words, one pixel of the depth head's map after another: never
    measured, a point's median times the pixels), `head_float32_difference` (norm of the two heads' difference in
    float32, relative to the map's), `same_logits` and `same_answer` (depth left the text as it was, bit for bit) and
    `machine`.
    """
    model, inputs = random_model(config, dtype, device), random_inputs(config, grid, dtype, device)
    plain, head = plain_qwen3_vl(model), model.depth_head
    text_inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
    images = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    features = [level[0] for level in images.visual_maps]
    greedy = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def llm():
        # plain Qwen3-VL with the image already encoded
        return plain(**text_inputs, mm_encoder_outputs={"image": images}, logits_to_keep=1)

    def forward_and_generate():
        model(**inputs, logits_to_keep=1)
        return plain.generate(**inputs, **greedy)

    contestants = {  # each beside its alternative
        "plain prefill": lambda: plain(**inputs, logits_to_keep=1),
        "forward with depth": lambda: model(**inputs, logits_to_keep=1),
        "vision tower": lambda: model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]),
        "language model": llm,
        "straightforward head": lambda: straightforward_head(head, features, grid),
        "head": lambda: head(features, grid),
        "forward + generate": forward_and_generate,
        "generate with depth": lambda: model.generate(**inputs, **greedy, return_dict_in_generate=True),
    }
    alternatives, extrapolated = dict(ALTERNATIVE), {}
    if with_peers:
        others = peers(plain, inputs, dtype, device)
        contestants |= others
        alternatives |= dict.fromkeys(others, OURS)
    seconds, results = measure(contestants, repeats, device)
    if with_peers:
        rows, columns = (side * head.pixels_per_token for side in grid)
        name = f"a map of {columns} x {rows} points in words"
        extrapolated[name] = statistics.median(seconds[ONE_POINT]) * rows * columns
    head, features = head.float(), [level.float() for level in features]
    ours, theirs = head(features, grid), straightforward_head(head, features, grid)
    return {
        "seconds": seconds,
        "ratios": ratios(seconds, alternatives),
        "alternatives": alternatives,
        "extrapolated": extrapolated,
        "head_float32_difference": (torch.dist(ours, theirs) / theirs.norm()).item(),
        "same_logits": torch.equal(results["plain prefill"].logits, results["forward with depth"].logits),
        "same_answer": torch.equal(results["forward + generate"], results["generate with depth"].sequences),
        "machine": machine(device),
    }


def ratios(seconds: dict[str, list[float]], alternatives: dict[str, str]) -> dict[str, float]:
    """Median over the rounds of each contestant's seconds over those of its alternative in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))
        for name, other in alternatives.items()
    }


STAGES = {1: ["depth_head"], 2: ["language_model", "lm_head", "depth_head"]}  # what each trains
ANSWER_TOKENS = 16  # of a row: about the depth prompt's response


def training_steps(
    config: DepthVLMConfig, grid: tuple[int, int], images: int, dtype: torch.dtype, stage: int, device: str
) -> dict[str, Callable]:
    """A step of `train_sft.py`, up to the gradients, and the same one as one writes it down."""
    from trl.trainer.utils import add_fused_lm_head

    from training.arguments import freeze
    from training.loss import add_depth_loss

    model = random_model(config, dtype, device).train()
    freeze(model, STAGES[stage])
    one = random_inputs(config, grid, dtype, device)
    inputs = {name: torch.cat([value] * images) for name, value in one.items()}
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -ANSWER_TOKENS:] = inputs["input_ids"][:, -ANSWER_TOKENS:]
    token = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    depth = torch.rand(images, grid[0] * token, grid[1] * token, generator=torch.Generator().manual_seed(2)) * 9 + 1
    depth = depth.to(device)
    # compared in the two steps, besides the loss
    watched = [model.depth_head, *([model.model.language_model.layers[-1]] if stage == 2 else [])]
    straightforward_forward = model.forward

    def finish(loss):
        loss.backward()
        gradients = [parameter.grad for module in watched for parameter in module.parameters()]
        return loss.item(), torch.cat([gradient.flatten().float() for gradient in gradients])

    def step():
        model.zero_grad()
        add_fused_lm_head(model)
        add_depth_loss(model, trains_text=stage == 2)
        targets = SimpleNamespace(labels=list(depth), scale=1 / images)
        text = {"labels": labels, "fused_lm_head": True} if stage == 2 else {}
        outputs = model(**inputs, **text, depth_targets=targets)
        model.forward = straightforward_forward
        loss = outputs.depth_loss
        if stage == 2:
            loss = loss - outputs.log_probs.sum() / (labels != -100).sum()
        return finish(loss)

    def straightforward_step():
        """Logits of all positions and their loss, which stage 1 logs; the head for one image after another."""
        model.zero_grad()
        seen = DepthVLMSeen()
        states = model.model(**inputs, seen=seen).last_hidden_state
        logits = model.lm_head(states).float()
        text_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        losses = []
        for index in range(images):
            features = [level[index] for level in seen.images.visual_maps[:-1]]
            features.append(states[index][inputs["input_ids"][index] == config.image_token_id])
            d = straightforward_head(model.depth_head, features, grid)[0].float().log() - depth[index].log()
            losses.append(torch.sqrt(d.pow(2).mean() - 0.5 * d.mean().pow(2) + 1e-8))
        return finish(sum(losses) / images + (text_loss if stage == 2 else 0))

    return {f"straightforward stage-{stage} step": straightforward_step, f"stage-{stage} step": step}


def peak_memory(name: str, *sizes) -> int:
    """Bytes that one step takes at its peak beyond the model; on a CPU in a process that does nothing else."""
    step = training_steps(*sizes)[name]
    if sizes[-1] != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def training_efficiency(
    config: DepthVLMConfig,
    grid: tuple[int, int],
    images: int,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 3,
    stage: int = 1,
    device: str = "cpu",
) -> dict:
    """Seconds of both steps, taking turns, and the peak memory of each in a process of its own (on a CPU: Linux)."""
    sizes = (config, grid, images, dtype, stage, device)
    theirs, ours = f"straightforward stage-{stage} step", f"stage-{stage} step"
    peaks = {}
    for name in (theirs, ours):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name] = pool.apply(peak_memory, (name, *sizes))
    seconds, results = measure(training_steps(*sizes), repeats, device)
    (their_loss, their_gradients), (loss, gradients) = results[theirs], results[ours]
    return {
        "seconds": seconds,
        "peak_bytes": peaks,
        "ratios": ratios(seconds, {ours: theirs}),
        "alternatives": {ours: theirs},
        "memory_ratio": peaks[ours] / peaks[theirs],
        "loss_difference": abs(loss - their_loss),
        "gradient_difference": (torch.dist(gradients, their_gradients) / their_gradients.norm()).item(),
        "machine": machine(device),
    }


def loader_efficiency(checkpoint: str, size: tuple[int, int], images: int, repeats: int) -> dict:
    """
    From a stored row (a JPEG of `size`, (height, width), and 256 x 192 depth values) to a batch of `images` rows: what
    training does, and the processor's plain call, whose patches are floats. Seconds per sample, bytes per batch.

    checkpoint: whose tokenizer and template are used, at the paper's canonical focal length and Qwen3-VL's budget.
    """
    import numpy as np
    from PIL import Image

    from depthvlm.processing_depthvlm import DEPTH_PROMPT, DEPTH_RESPONSE, DepthVLMProcessor
    from training.data import DataSource, conversation, decode, load_sample, open_sample, read_depth
    from training.encoding import Collator, Encoder

    processor = DepthVLMProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    processor.canonical_focal_length = 1000.0
    processor.image_processor.size = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
    encoder, collator, source = Encoder(processor), Collator(processor), DataSource("synthetic")
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(size[::-1], Image.BICUBIC)
    depth = Image.fromarray((draw.random((192, 256)) * 9000 + 1000).astype(np.uint16))
    stored = {}
    for name, image, form in (("image", picture, "JPEG"), ("depth", depth, "PNG")):
        image.save(buffer := io.BytesIO(), form)
        stored[name] = {"bytes": buffer.getvalue(), "path": None}
    row = stored | {"fx": 0.745 * max(size), "depth_scale": 1000.0, "depth_type": "z", "id": "row"}
    text = processor.apply_chat_template(conversation([(DEPTH_PROMPT, DEPTH_RESPONSE)]))

    def sample():
        opened = open_sample(row, source, draw)
        encoder.measure(opened)
        return encoder(load_sample(opened, source, draw))

    def plain_sample():
        metres = read_depth(row["depth"], row["depth_scale"])
        return processor(
            images=[decode(row["image"])],
            text=text,
            focal_lengths=[row["fx"]],
            depth_maps=[metres],
            return_tensors="pt",
        )

    seconds, _ = measure({"plain sample": plain_sample, "sample": sample}, repeats, "cpu")
    batch = collator([sample() for _ in range(images)])
    plain = plain_sample()
    tensors = [batch[name] for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "pixel_values")]
    ours = sum(tensor.nbytes for tensor in [*tensors, *batch["depth_labels"]])
    theirs = sum(value.nbytes for value in plain.values() if torch.is_tensor(value))
    theirs = images * (theirs + plain["input_ids"].nbytes + plain["depth_labels"][0].nbytes)  # labels, too
    return {
        "seconds": seconds,
        "batch_bytes": {"plain sample": theirs, "sample": ours},
        "ratios": ratios(seconds, {"sample": "plain sample"}),
        "alternatives": {"sample": "plain sample"},
        "memory_ratio": ours / theirs,
    }


class WaitingModel:
    """A model on a device that takes `seconds` per photo and none of the CPU: what predict.py adds shows beside it."""

    device = torch.device("cpu")
    dtype = torch.bfloat16

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, cameras, **inputs):
        time.sleep(self.seconds * len(cameras))
        sizes = [camera["processed_size"] for camera in cameras]
        depths = tuple(torch.linspace(1, 9, rows * columns).view(rows, columns) for rows, columns in sizes)
        return SimpleNamespace(predicted_depth=depths, cameras=cameras)


def prediction_overhead(photos: int = 64, seconds: float = 0.1, size: tuple[int, int] = (640, 480)) -> dict:
    """
    predict.py with its default files on JPEGs of `size`, around a model of `WaitingModel`'s with the released
    checkpoints' processor (f_c = 1000 px, Qwen3-VL's budget).

    Returns `share_of_forwards`, images per second over those of the waiting alone, from the first photo to the last
    file, and `cpu_seconds_per_photo`, all processes' without their start: of `photos` and of twice as many, the
    difference.
    """
    from depthvlm import predict
    from depthvlm.processing_depthvlm import DepthVLMProcessor

    processor = DepthVLMProcessor.from_pretrained(Path(__file__).parent.parent, trust_remote_code=False)
    processor.canonical_focal_length = 1000.0
    processor.image_processor.size = {"shortest_edge": 65536, "longest_edge": 16777216}
    processor.normalize_patches = lambda patches: patches  # the device's work
    noise = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(noise[None], size=size[::-1], mode="bilinear")[0].permute(1, 2, 0).mul(255).byte().numpy()

    def run(count: int, folder: Path) -> tuple[float, float]:
        for index in range(count):
            Image.fromarray(np.roll(pixels, index, axis=1)).save(folder / f"{index:04d}.jpg", quality=92)
        args = predict.parse_args([str(folder), "--output", str(folder / "output")])
        sources, _ = predict.find_sources(args.photos, args.output, args.recursive)
        before, start = cpu_seconds(), time.perf_counter()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            everything = predict.Run(args, WaitingModel(seconds), processor, None, {})
            predict.run_all(everything, sources, [None] * count)
        return time.perf_counter() - start, cpu_seconds() - before

    with tempfile.TemporaryDirectory() as once, tempfile.TemporaryDirectory() as twice:
        (_, cpu), (wall, twice_the_cpu) = run(photos, Path(once)), run(2 * photos, Path(twice))
    return {
        "photos": 2 * photos,
        "size": list(size),
        "forward_seconds_per_photo": seconds,
        "images_per_second": 2 * photos / wall,
        "share_of_forwards": 2 * photos * seconds / wall,
        "cpu_seconds_per_photo": (twice_the_cpu - cpu) / photos,
        "machine": machine("cpu"),
    }


def cpu_seconds() -> float:
    """Of this process and of those that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def machine(device: str) -> dict:
    """Versions and the processor that was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kinds = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "cpu": fields.get("model name", platform.processor()),
        "cpu_instructions": [kind for kind in kinds if kind in fields.get("flags", "").split()],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def table(report: dict) -> str:
    rows = [f"{'':24}{'seconds':>10}{'fastest':>10}{'ratio':>8}"]
    for name, samples in report["seconds"].items():
        other = report["alternatives"].get(name)
        ratio = f"{report['ratios'][name]:8.3f} of {other}" if other else ""
        rows.append(f"{name:24}{statistics.median(samples):10.3f}{min(samples):10.3f}{ratio}")
    rows += [f"{name}: {seconds:.4g} s, extrapolated" for name, seconds in report.get("extrapolated", {}).items()]
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.efficiency", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36, help="decoder layers: the 4B model's 36, or 3 and more")
    parser.add_argument("--grid", type=int, nargs=2, default=(29, 39), metavar=("ROWS", "COLUMNS"), help="in tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds, after one that is not")
    parser.add_argument("--new-tokens", type=int, default=8, help="length of the generated answer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", action="store_true", help="other ways to a depth map beside ours; 4 GB more")
    parser.add_argument("--train", action="store_true", help="a step of both stages, and the loader")
    parser.add_argument(
        "--vision-layers", type=int, default=24, help="of the --train steps: the 4B model's 24, or fewer"
    )
    parser.add_argument("--images", type=int, default=2, help="per --train step and per batch of the loader")
    parser.add_argument("--photo", type=int, nargs=2, default=(1440, 1920), metavar=("HEIGHT", "WIDTH"), help="in px")
    parser.add_argument("--processor", default=str(ROOT), metavar="CHECKPOINT", help="of the loader; default: here")
    parser.add_argument("--predict", action="store_true", help="what predict.py adds to a model of 0.1 s per photo")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    sizes = {"repeats": options.repeats, "new_tokens": options.new_tokens, "grid": tuple(options.grid)}
    if min(options.repeats, options.new_tokens, *options.grid) < 1:
        parser.error(f"got {sizes}; each must be at least 1")
    if options.predict:
        print(json.dumps(prediction_overhead(), indent=1))
        return
    report = {"layers": options.layers, "dtype": options.dtype, **sizes}
    if options.train:
        dtype = getattr(torch, options.dtype)
        config = config_4b(options.layers, options.vision_layers)
        settings = (config, tuple(options.grid), options.images, dtype, options.repeats)
        report |= {f"stage {stage}": training_efficiency(*settings, stage, options.device) for stage in STAGES}
        report["loader"] = loader_efficiency(options.processor, options.photo, options.images, options.repeats)
        for name in (*(f"stage {stage}" for stage in STAGES), "loader"):
            memory = report[name].get("peak_bytes", report[name].get("batch_bytes"))
            print(f"{name}:\n{table(report[name])}")
            print(", ".join(f"{key} {size / 2**20:.1f} MiB" for key, size in memory.items()), end=", ")
            print(f"ratio {report[name]['memory_ratio']:.3f}\n")
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
        return
    sizes |= {"device": options.device, "with_peers": options.peers}
    report |= efficiency(config_4b(options.layers), dtype=getattr(torch, options.dtype), **sizes)
    print(table(report))
    print(f"the heads differ by {report['head_float32_difference']:.1e} in float32, ", end="")
    print(f"same logits: {report['same_logits']}, same answer: {report['same_answer']}")
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
