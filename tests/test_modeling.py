"""DepthVLM's model: text against transformers' Qwen3-VL, the head against the paper's table written out again."""

import contextlib
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny import (
    CACHE,
    IMAGE,
    PIXELS,
    ROOT,
    TOKENS,
    VIDEO,
    VISION_END,
    VISION_START,
    collate,
    enliven,
    plain_qwen,
    single,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import (
    DepthVLMDPTHead,
    DepthVLMForConditionalGeneration,
    DepthVLMMLPHead,
)

LAYOUTS = {
    "text only": [[], []],
    "one image": [[(2, 3)]],
    "several images": [[(2, 3), (2, 3), (1, 4)]],
    "0, 1 and 2 images": [[(2, 3)], [], [(2, 3), (4, 2)]],
}
RAGGED = LAYOUTS["0, 1 and 2 images"]
SINCE_5_23 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="before 5.23 Qwen3-VL takes -1 and lists of hidden states for True, and chunked prefills change its tokens",
)
SETTINGS = {"max_new_tokens": 4, "suppress_tokens": list(TOKENS.values())}


@pytest.fixture(scope="module", autouse=True)
def _no_gradients_on_one_thread():
    """Tensors this small are slower on many threads, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@functools.cache
def models(attn_implementation="sdpa", dtype=torch.float32, source="vit+llm"):
    """(ours, plain Qwen3-VL), of the same weights."""
    model = tiny_model(depth_feature_source=source, attn_implementation=attn_implementation).to(dtype)
    return model, plain_qwen(model, attn_implementation)


@pytest.fixture(scope="module")
def model():
    return models()[0]


@pytest.fixture(scope="module")
def plain():
    return models()[1]


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """The model, saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


def assert_same_depth(actual, expected, relative=1e-5):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        assert (one - other).abs().max() <= relative * other.abs().max()


def count_calls(stack, *modules):
    """For each module a list that gets, of every call, the shape of its input: embeddings or the first argument."""
    calls = [[] for _ in modules]

    def note(call, module, args, kwargs, output):
        call.append(getattr(kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0], "shape", None))

    for module, call in zip(modules, calls, strict=True):
        handle = module.register_forward_hook(functools.partial(note, call), with_kwargs=True)
        stack.callback(handle.remove)
    return calls


def head_inputs(model, batch):
    """What forward gives the depth head: a list of (four features, grid)."""
    inputs = []
    handle = model.depth_head.register_forward_pre_hook(lambda module, args: inputs.append(args))
    model(**batch)
    handle.remove()
    return inputs


# Text


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_logits_equal_qwen3_vl_bit_for_bit(attn_implementation, dtype, layout, padding):
    model, plain = models(attn_implementation, dtype)
    batch = tiny_batch(LAYOUTS[layout], padding, dtype=dtype)
    expected = plain(**batch)
    assert type(plain) is Qwen3VLForConditionalGeneration and expected.logits.std() > 0.1
    with_depth, without = model(**batch), model(**batch, output_depth=False)
    assert torch.equal(with_depth.logits, expected.logits) and torch.equal(without.logits, expected.logits)
    grids = [(PIXELS * height, PIXELS * width) for row in LAYOUTS[layout] for height, width in row]
    assert [tuple(depth.shape) for depth in with_depth.predicted_depth] == grids
    assert all(depth.dtype == torch.float32 and (depth > 0).all() for depth in with_depth.predicted_depth)
    assert without.predicted_depth is None


@pytest.mark.parametrize("output_depth", [True, False])
def test_forward_encodes_the_images_once(model, output_depth):
    with contextlib.ExitStack() as stack:
        vision, llm = count_calls(stack, model.model.visual, model.model.language_model)
        model(**tiny_batch(RAGGED), output_depth=output_depth)
    assert len(vision) == len(llm) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_equals_qwen3_vls(dtype):
    model, plain = models(dtype=dtype)
    batch = tiny_batch(RAGGED, dtype=dtype)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :10] = -100
    expected = plain(**batch).loss
    assert torch.equal(model(**batch).loss, expected)
    assert torch.equal(model(**batch, output_depth=False).loss, expected)
    assert torch.equal(model(**batch, num_items_in_batch=7).loss, plain(**batch, num_items_in_batch=7).loss)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2, 5])], ids=str)
def test_logits_to_keep_leaves_depth_alone(model, plain, keep):
    batch = tiny_batch(RAGGED)
    output = model(**batch, logits_to_keep=keep)
    assert torch.equal(output.logits, plain(**batch, logits_to_keep=keep).logits)
    assert_same_depth(output.predicted_depth, model(**batch).predicted_depth)


def test_tuple_starts_with_logits_and_depth(model):
    batch = tiny_batch(RAGGED)
    expected = model(**batch, labels=batch["input_ids"])
    logits, depth, cache = model(**batch, return_dict=False)
    assert torch.equal(logits, expected.logits) and cache.get_seq_length() == logits.shape[1]
    assert isinstance(depth, tuple) and all(map(torch.equal, depth, expected.predicted_depth))
    loss, logits, depth, _ = model(**batch, labels=batch["input_ids"], return_dict=False)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits) and len(depth) == 3
    logits, cache = model(**batch, output_depth=False, return_dict=False)
    assert torch.equal(logits, expected.logits) and not isinstance(cache, tuple)


@pytest.mark.parametrize("source", ["vit+llm", "llm"])
@pytest.mark.parametrize(
    "hidden", [True, False, None, *(pytest.param(some, marks=SINCE_5_23) for some in (-1, [1, 2]))], ids=str
)
def test_hidden_states_and_attentions_are_the_parents(source, hidden):
    model, plain = models("eager", source=source)
    batch = tiny_batch(RAGGED)
    ours = model(**batch, output_hidden_states=hidden, output_attentions=True)
    theirs = plain(**batch, output_hidden_states=hidden, output_attentions=True)
    assert (ours.hidden_states is None) == (theirs.hidden_states is None)
    for one, other in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
        assert torch.equal(one, other) if other is not None else one is None
    assert len(ours.attentions) == len(theirs.attentions) == 4
    assert all(map(torch.equal, ours.attentions, theirs.attentions))
    assert_same_depth(ours.predicted_depth, model(**batch).predicted_depth)


def test_a_next_step_has_no_depth(model, plain):
    """A generate loop written by hand: only the pass that sees the images has their depth."""
    batch = tiny_batch([[(2, 3)]])
    step = torch.tensor([[9]])
    ours = model(input_ids=step, **{CACHE: model(**batch, use_cache=True)[CACHE]})
    theirs = plain(input_ids=step, **{CACHE: plain(**batch, use_cache=True)[CACHE]})
    assert torch.equal(ours.logits, theirs.logits) and ours.predicted_depth == ()


def video_batch(images=()):
    """A row with a video of two frames and, before it, images of the given grids."""
    batch = tiny_batch([list(images)])
    frames = [VISION_START, *[VIDEO] * 6, VISION_END, 17] * 2
    row = batch["input_ids"][0].tolist() + frames + [5, 6]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2 * 4 * 6, 3 * 2 * 16 * 16, generator=generator)
    return batch | collate([row]) | {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[2, 4, 6]])}


def test_video_is_qwen3_vls_and_without_depth(model, plain):
    batch = video_batch()
    ours, theirs = model(**batch), plain(**batch)
    assert torch.equal(ours.logits, theirs.logits) and ours.predicted_depth == ()
    other = batch | {"pixel_values_videos": -batch["pixel_values_videos"]}
    assert not torch.equal(model(**other).logits, ours.logits)


def test_an_image_beside_a_video_has_its_depth(model, plain):
    batch = video_batch(images=[(2, 3), (1, 2)])
    ours = model(**batch)
    assert torch.equal(ours.logits, plain(**batch).logits)
    assert_same_depth(ours.predicted_depth, model(**tiny_batch([[(2, 3), (1, 2)]])).predicted_depth)
    generated = model.generate(**batch, **SETTINGS, return_dict_in_generate=True)
    assert torch.equal(generated.sequences, plain.generate(**batch, **SETTINGS))
    assert_same_depth(generated.predicted_depth, ours.predicted_depth)


# The DPT head, against its table


def residual(weights, name, x, rectified=True):
    hidden = F.conv2d(torch.relu(x), weights[f"{name}.conv1.weight"], weights[f"{name}.conv1.bias"], padding=1)
    hidden = F.conv2d(torch.relu(hidden), weights[f"{name}.conv2.weight"], weights[f"{name}.conv2.bias"], padding=1)
    return (torch.relu(x) if rectified else x) + hidden


def upsample(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def restated_dpt(weights, features, grid, original=False, rectified=True):
    """The table of the depth head line by line, everything contiguous and in the order in which it stands there."""
    levels = []
    for level, tokens in enumerate(features):
        tokens = F.layer_norm(tokens, tokens.shape[-1:], weights["norm.weight"], weights["norm.bias"], 1e-5)
        x = tokens.reshape(-1, *grid, tokens.shape[-1]).permute(0, 3, 1, 2).contiguous()
        x = F.conv2d(x, weights[f"projects.{level}.weight"], weights[f"projects.{level}.bias"])
        kernel = weights.get(f"resize_layers.{level}.weight")
        if original and level == 3:
            x = F.conv2d(x, kernel, weights["resize_layers.3.bias"], stride=2, padding=1)
        elif kernel is not None:
            x = F.conv_transpose2d(x, kernel, weights[f"resize_layers.{level}.bias"], stride=kernel.shape[-1])
        levels.append(F.conv2d(x, weights[f"scratch.layer{level + 1}_rn.weight"], padding=1))
    y = levels[3]
    for block in (4, 3, 2, 1):
        name = f"scratch.refinenet{block}"
        if block != 4:
            y = y + residual(weights, f"{name}.resConfUnit1", levels[block - 1], rectified)
        y = residual(weights, f"{name}.resConfUnit2", y, rectified)
        y = upsample(y, levels[block - 2].shape[-2:] if block > 1 else [2 * side for side in y.shape[-2:]])
        y = F.conv2d(y, weights[f"{name}.out_conv.weight"], weights[f"{name}.out_conv.bias"])
    y = F.conv2d(y, weights["scratch.output_conv1.weight"], weights["scratch.output_conv1.bias"], padding=1)
    y = upsample(y, [PIXELS * side for side in grid])
    y = F.conv2d(y, weights["scratch.output_conv2.0.weight"], weights["scratch.output_conv2.0.bias"], padding=1)
    y = F.conv2d(torch.relu(y), weights["scratch.output_conv2.2.weight"], weights["scratch.output_conv2.2.bias"])
    return F.softplus(y)[:, 0]


def random_head(seed=0, **fields):
    config = tiny_config(**fields)
    torch.manual_seed(seed)
    return enliven((DepthVLMDPTHead if config.depth_head_type.startswith("dpt") else DepthVLMMLPHead)(config))


def random_features(grid, batch_size=1, width=64):
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    return [torch.randn(batch_size * grid[0] * grid[1], width, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("original", [False, True], ids=["dpt", "dpt_original"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (3, 3), (4, 2), (5, 7)], ids=str)
def test_dpt_head_is_the_table(grid, original):
    head = random_head(depth_head_type="dpt_original" if original else "dpt")
    features = random_features(grid, batch_size=2)
    expected = restated_dpt(head.state_dict(), features, grid, original)
    assert expected.shape == (2, PIXELS * grid[0], PIXELS * grid[1]) and expected.std() > 0.1 * expected.mean()
    assert_same_depth(head(features, grid), expected)


def test_dpt_head_is_the_table_at_its_real_channels():
    head = random_head(depth_head_widths=[256, 512, 1024, 1024], depth_head_channels=256)
    features = random_features((1, 2))
    assert_same_depth(head(features, (1, 2)), restated_dpt(head.state_dict(), features, (1, 2)))


def test_the_shortcut_is_rectified():
    """The check above would see the plain residual x + ...: it predicts something else altogether."""
    head = random_head()
    features = random_features((2, 3))
    plain_residual = restated_dpt(head.state_dict(), features, (2, 3), rectified=False)
    assert (head(features, (2, 3)) - plain_residual).abs().max() > 0.1 * plain_residual.max()


def test_dpt_head_does_not_change_its_inputs():
    head = random_head()
    features = random_features((2, 3))
    copies = [feature.clone() for feature in features]
    head(features, (2, 3))
    assert all(map(torch.equal, features, copies))


def test_dpt_head_has_the_released_keys_and_35_million_parameters():
    hidden, widths, channels = 2560, (256, 512, 1024, 1024), 256
    expected = {"norm.weight": (hidden,), "norm.bias": (hidden,)}
    for level, width in enumerate(widths):
        expected |= {f"projects.{level}.weight": (width, hidden, 1, 1), f"projects.{level}.bias": (width,)}
        expected[f"scratch.layer{level + 1}_rn.weight"] = (channels, width, 3, 3)
    for level, (width, factor) in enumerate(zip(widths, (8, 4, 2), strict=False)):
        expected[f"resize_layers.{level}.weight"] = (width, width, factor, factor)
        expected[f"resize_layers.{level}.bias"] = (width,)
    for block in (1, 2, 3, 4):
        name = f"scratch.refinenet{block}"
        expected |= {f"{name}.out_conv.weight": (channels, channels, 1, 1), f"{name}.out_conv.bias": (channels,)}
        for unit in ("resConfUnit1", "resConfUnit2")[block == 4 :]:
            for conv in ("conv1", "conv2"):
                expected[f"{name}.{unit}.{conv}.weight"] = (channels, channels, 3, 3)
                expected[f"{name}.{unit}.{conv}.bias"] = (channels,)
    expected |= {"scratch.output_conv1.weight": (128, 256, 3, 3), "scratch.output_conv1.bias": (128,)}
    expected |= {"scratch.output_conv2.0.weight": (32, 128, 3, 3), "scratch.output_conv2.0.bias": (32,)}
    expected |= {"scratch.output_conv2.2.weight": (1, 32, 1, 1), "scratch.output_conv2.2.bias": (1,)}

    config = DepthVLMConfig(text_config={"hidden_size": hidden})
    with torch.device("meta"):
        head = DepthVLMDPTHead(config)
    assert {name: tuple(weight.shape) for name, weight in head.state_dict().items()} == expected
    assert f"{sum(parameter.numel() for parameter in head.parameters()) / 1e6:.1f}" == "35.1"
    assert head.norm.eps == 1e-5


@pytest.mark.parametrize("head_type, factors", [("dpt", (8, 4, 2, 1)), ("dpt_original", (4, 2, 1, 0.5))])
def test_pyramid_sizes(head_type, factors):
    head = random_head(depth_head_type=head_type)
    with contextlib.ExitStack() as stack:
        calls = count_calls(stack, *[getattr(head.scratch, f"layer{level}_rn") for level in (1, 2, 3, 4)])
        head(random_features((4, 6)), (4, 6))
    assert [call[0][-2:] for call in calls] == [(4 * factor, 6 * factor) for factor in factors]


# The MLP heads


@pytest.mark.parametrize("head_type", ["mlp", "mlp_multiscale"])
def test_mlp_head_puts_a_block_where_its_token_is(head_type):
    head = random_head(depth_head_type=head_type)
    grid_h, grid_w = 2, 3
    features = random_features((grid_h, grid_w), batch_size=2)
    weights = head.state_dict()
    expected = torch.empty(2, grid_h * PIXELS, grid_w * PIXELS)
    for image in range(2):
        for row in range(grid_h):
            for column in range(grid_w):
                index = (image * grid_h + row) * grid_w + column
                token = torch.cat([level[index] for level in features]) if "multi" in head_type else features[3][index]
                token = F.layer_norm(token, token.shape, weights["norm.weight"], weights["norm.bias"], 1e-5)
                hidden = F.gelu(weights["fc1.weight"] @ token + weights["fc1.bias"])
                block = F.softplus(weights["fc2.weight"] @ hidden + weights["fc2.bias"]).reshape(PIXELS, PIXELS)
                top, left = row * PIXELS, column * PIXELS
                expected[image, top : top + PIXELS, left : left + PIXELS] = block
    assert weights["fc1.weight"].shape == (1024, 256 if "multi" in head_type else 64)
    assert weights["fc2.weight"].shape == (PIXELS**2, 1024)
    assert_same_depth(head(features, (grid_h, grid_w)), expected)


@pytest.mark.parametrize("head_type", ["dpt_original", "mlp", "mlp_multiscale"])
def test_other_heads_in_the_model(head_type):
    model = tiny_model(depth_head_type=head_type)
    batch = tiny_batch(RAGGED)
    output = model(**batch)
    assert [tuple(depth.shape) for depth in output.predicted_depth] == [(64, 96), (64, 96), (128, 64)]
    assert_same_depth(output.predicted_depth[:1], model(**single(batch, 0, slice(0, 1))).predicted_depth)
    assert torch.equal(output.logits, models()[1](**batch).logits)


# What the head reads


@pytest.mark.parametrize("layers", [None, [0, 2, 3]], ids=str)
@pytest.mark.parametrize("source", ["vit+llm", "vit", "llm"])
def test_feature_sources_are_what_qwen3_vl_computes(source, layers):
    model = tiny_model(depth_feature_source=source, depth_llm_layers=layers)
    plain = plain_qwen(model)
    batch = tiny_batch(RAGGED)
    vision = plain.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    states = plain(**batch, output_hidden_states=True).hidden_states
    at_images = batch["input_ids"] == IMAGE
    taps = [torch.cat(level) for level in vision.deepstack_features]
    last = states[-1][at_images]  # after the final norm
    expected = {
        "vit+llm": [*taps, last],
        "vit": [*taps, torch.cat(vision.pooler_output)],
        "llm": [*(states[layer + 1][at_images] for layer in layers or [0, 1, 2]), last],
    }[source]
    seen = {grid: features for features, grid in head_inputs(model, batch)}
    for level, feature in enumerate(expected):  # rows of tokens: 6 and 6 of the grid (2, 3), 8 of (4, 2)
        assert torch.equal(seen[2, 3][level], feature[:12]) and torch.equal(seen[4, 2][level], feature[12:])


def test_the_head_runs_once_a_grid(model):
    batch = tiny_batch([[(2, 3)], [], [(4, 2), (2, 3)], [(3, 2)], [(4, 2), (2, 3)]])
    calls = Counter((grid, len(features[0])) for features, grid in head_inputs(model, batch))
    assert calls == {((2, 3), 18): 1, ((4, 2), 16): 1, ((3, 2), 6): 1}


def test_a_batch_is_its_rows(model):
    batch = tiny_batch([[(2, 3)], [], [(4, 2), (2, 3)], [(3, 2)]])
    together = model(**batch)
    for row, images in enumerate([slice(0, 1), slice(1, 1), slice(1, 3), slice(3, 4)]):
        alone = model(**single(batch, row, images))
        assert_same_depth(together.predicted_depth[images], alone.predicted_depth)
        kept = batch["attention_mask"][row].bool()
        assert torch.allclose(together.logits[row, kept], alone.logits[0], atol=1e-5)


def test_padding_side_does_not_matter(model):
    left, right = (model(**tiny_batch(RAGGED, padding)).predicted_depth for padding in ("left", "right"))
    assert_same_depth(left, right)


def test_text_matters_before_the_image_and_not_after(model):
    batch = tiny_batch([[(2, 3)]])
    ids = batch["input_ids"][0].tolist()
    depth = model(**batch).predicted_depth
    assert_same_depth(model(**batch | collate([ids + [41, 42, 43]])).predicted_depth, depth)
    assert_same_depth(model(**batch | collate([ids[:-4]])).predicted_depth, depth)
    question_first = model(**batch | collate([[41, 42, 43] + ids])).predicted_depth
    assert (question_first[0] - depth[0]).abs().max() > 0.01 * depth[0].max()


class Synchronisations(TorchDispatchMode):
    """Counts what makes the host wait for the device: values read, and shapes that depend on values."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self.counting(getattr(torch.Tensor, name)))

    def counting(self, method):
        def call(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        is_masked = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool for index in (args[1] if isinstance(args[1], list) else ())
        )
        self.count += is_masked or name in ("_local_scalar_dense", "nonzero", "masked_select")
        return function(*args, **(kwargs or {}))


def test_synchronisations_do_not_grow_with_images(model, monkeypatch):
    counts = []
    predict_depth = model.predict_depth
    for rows in ([[(2, 3)]], [[(2, 3)] * 3, [(2, 3)] * 3], [[(2, 3), (1, 2)] * 3]):
        with monkeypatch.context() as patch:

            def watched(*args, patch=patch, **kwargs):
                with Synchronisations(patch) as synchronisations:
                    depth = predict_depth(*args, **kwargs)
                counts.append(synchronisations.count)
                patch.undo()
                return depth

            patch.setattr(model, "predict_depth", watched)
            model(**tiny_batch(rows))
    assert len(counts) == 3 and 1 <= counts[0] == counts[1] == counts[2]


# generate


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "two samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "two of three beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "with scores": {"output_scores": True, "output_logits": True, "output_hidden_states": True},
}
ASSISTED = {
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 2},
    "our class assists": lambda: {"assistant_model": tiny_model(seed=1)},
    "Qwen3-VL assists": lambda: {"assistant_model": plain_qwen(tiny_model(seed=1))},
}


def generate_twice(model, plain, batch, settings):
    """Ours with depth and plain Qwen3-VL; asserts one vision pass, one prefill, as many steps, equal tokens."""
    with contextlib.ExitStack() as stack:
        vision, llm, head, plain_llm = count_calls(
            stack, model.model.visual, model.model.language_model, model.depth_head, plain.model.language_model
        )
        torch.manual_seed(0)
        generated = model.generate(**batch, **SETTINGS, **settings, return_dict_in_generate=True)
        torch.manual_seed(0)
        expected = plain.generate(**batch, **SETTINGS, **settings)
    assert torch.equal(generated.sequences, expected)
    assert llm == plain_llm  # every pass of the same shape
    length = batch["input_ids"].shape[1]
    if settings.get("use_cache", True):
        assert [shape[1] >= length for shape in llm].count(True) == 1
    assert len(vision) == ("pixel_values" in batch)
    return generated, head


@pytest.mark.parametrize(
    "mode, source",
    [(mode, "vit+llm") for mode in MODES]
    + [
        (mode, source)
        for mode in ("greedy", "two of three beams", "no cache", "with scores")
        for source in ("vit", "llm")
    ],
)
def test_generate_returns_the_prefills_depth(mode, source):
    model, plain = models(source=source)
    batch = tiny_batch(RAGGED)
    generated, head = generate_twice(model, plain, batch, MODES[mode])
    assert len(head) == 2  # two grids
    assert_same_depth(generated.predicted_depth, model(**batch).predicted_depth)
    assert type(generated).__name__ == f"DepthVLMGenerate{'Beam' if 'beams' in mode else ''}Output"
    if mode == "with scores":
        theirs = plain.generate(**batch, **SETTINGS, **MODES[mode], return_dict_in_generate=True)
        for name in ("scores", "logits", "hidden_states"):
            ours = torch.utils._pytree.tree_leaves(generated[name])
            assert all(map(torch.equal, ours, torch.utils._pytree.tree_leaves(theirs[name])))


@pytest.mark.parametrize("mode", ASSISTED)
def test_generate_with_help_returns_the_prefills_depth(model, plain, mode):
    batch = tiny_batch([[(2, 3), (4, 2)]])
    settings = ASSISTED[mode]()
    helper_heads = 0
    with contextlib.ExitStack() as stack:
        if hasattr(settings.get("assistant_model"), "depth_head"):
            (helper_heads,) = count_calls(stack, settings["assistant_model"].depth_head)
        generated, head = generate_twice(model, plain, batch, settings)
    assert len(head) == 2 and not helper_heads
    assert torch.equal(generated.sequences, plain.generate(**batch, **SETTINGS))
    assert_same_depth(generated.predicted_depth, model(**batch).predicted_depth)


def test_a_model_may_assist_itself(model, plain):
    batch = tiny_batch([[(2, 3), (4, 2)]])
    generated = model.generate(**batch, **SETTINGS, assistant_model=model, return_dict_in_generate=True)
    assert torch.equal(generated.sequences, plain.generate(**batch, **SETTINGS))
    assert_same_depth(generated.predicted_depth, model(**batch).predicted_depth)


def test_our_model_assists_qwen3_vl(plain):
    batch, assistant = tiny_batch([[(2, 3)]]), tiny_model(seed=1)
    generated = plain.generate(**batch, **SETTINGS, assistant_model=assistant, return_dict_in_generate=True)
    assert torch.equal(generated.sequences, plain.generate(**batch, **SETTINGS))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"return_dict_in_generate": True, "output_depth": False},
        pytest.param({"output_depth": False, "prefill_chunk_size": 4}, marks=SINCE_5_23),
    ],
    ids=["no dict", "output_depth=False", "chunked prefill"],
)
def test_generate_without_depth_costs_nothing(model, plain, settings):
    batch = tiny_batch([[(2, 3), (4, 2)]])
    with contextlib.ExitStack() as stack:
        head, vision = count_calls(stack, model.depth_head, model.model.visual)
        generated = model.generate(**batch, **SETTINGS, **settings)
    assert len(head) == 0 and len(vision) == 1
    sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
    assert torch.equal(sequences, plain.generate(**batch, **SETTINGS))
    assert "predicted_depth" not in dir(generated)


def test_generate_of_text_alone(model, plain):
    generated, head = generate_twice(model, plain, tiny_batch([[], []]), {})
    assert generated.predicted_depth == () and not head


def test_generation_config_may_ask_for_the_dict(model):
    batch = tiny_batch([[(2, 3)]])
    settings = GenerationConfig(**SETTINGS, return_dict_in_generate=True)
    generated = model.generate(**batch, generation_config=settings)
    assert_same_depth(generated.predicted_depth, model(**batch).predicted_depth)


def test_cameras_are_handed_on(model):
    batch, cameras = tiny_batch([[(2, 3)], [(4, 2)]]), [{"focal_length": 500.0}, {"focal_length": 700.0}]
    assert model(**batch, cameras=cameras).cameras == cameras
    assert model.generate(**batch, **SETTINGS, cameras=cameras, return_dict_in_generate=True).cameras == cameras
    beams = model.generate(**batch, **SETTINGS, cameras=cameras, return_dict_in_generate=True, num_beams=2)
    assert beams.cameras == cameras
    assert isinstance(model.generate(**batch, **SETTINGS, cameras=cameras), torch.Tensor)


def test_cameras_of_another_focal_length_are_refused(model):
    batch, ours = tiny_batch([[(2, 3)]]), model.config.canonical_focal_length
    model(**batch, cameras=[{"canonical_focal_length": ours}])
    for call in (model, functools.partial(model.generate, return_dict_in_generate=True)):
        with pytest.raises(ValueError, match=f"is 123 px in the processor and {ours} px in the model.*one checkpoint"):
            call(**batch, cameras=[{"canonical_focal_length": 123}])


def test_depth_labels_are_not_dropped_in_silence(model):
    with pytest.raises(ValueError, match="depth_labels are no input of the model; pop them"):
        model(**tiny_batch([[(2, 3)]]), depth_labels=[torch.ones(32, 48)])


def test_threads_do_not_share_their_depth(model):
    """The second call begins its prefill before the first one's depth is stored, and ends after it."""
    batches = [tiny_batch([[(2, 3)]], seed=1), tiny_batch([[(4, 2)]], seed=2)]
    expected = [model.generate(**batch, **SETTINGS, return_dict_in_generate=True) for batch in batches]
    began, first_is_done, found = threading.Event(), threading.Event(), [None, None]

    def second():
        def wait(input_ids, scores):
            began.set()
            assert first_is_done.wait(60)
            return scores

        settings = SETTINGS | {"return_dict_in_generate": True, "logits_processor": [wait]}
        found[1] = model.generate(**batches[1], **settings)

    thread = threading.Thread(target=second)

    def start_second(input_ids, scores):
        if not began.is_set():
            thread.start()
            assert began.wait(60)
        return scores

    found[0] = model.generate(**batches[0], **SETTINGS, return_dict_in_generate=True, logits_processor=[start_second])
    first_is_done.set()
    thread.join(60)
    for ours, alone in zip(found, expected, strict=True):
        assert [depth.shape for depth in ours.predicted_depth] == [depth.shape for depth in alone.predicted_depth]
        assert_same_depth(ours.predicted_depth, alone.predicted_depth)


def test_a_failed_generate_leaves_nothing_behind(model):
    def fail(input_ids, scores):
        raise RuntimeError("stop here")

    batch = tiny_batch([[(2, 3)]])
    with pytest.raises(RuntimeError, match="stop here"):
        model.generate(**batch, **SETTINGS, return_dict_in_generate=True, logits_processor=[fail])
    with contextlib.ExitStack() as stack:
        (head,) = count_calls(stack, model.depth_head)
        model.generate(**batch, **SETTINGS)
        assert not head
        model.generate(**batch, **SETTINGS, return_dict_in_generate=True)
        assert len(head) == 1


def test_a_second_turn_on_the_first_ones_cache(model, plain):
    batch, turns = tiny_batch([[(2, 3)]]), []
    for one in (model, plain):
        cache = DynamicCache(config=one.config)
        first = one.generate(**batch, **SETTINGS, **{CACHE: cache})
        ids = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
        turns.append(one.generate(input_ids=ids, **SETTINGS, **{CACHE: cache}, return_dict_in_generate=True))
    assert torch.equal(turns[0].sequences, turns[1].sequences) and turns[0].predicted_depth == ()


def test_image_features_encoded_beforehand(model):
    batch = tiny_batch(RAGGED)
    expected = model(**batch)
    features = {"image": model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])}
    inputs = {name: value for name, value in batch.items() if name != "pixel_values"}
    with contextlib.ExitStack() as stack:
        (vision,) = count_calls(stack, model.model.visual)
        output = model(**inputs, mm_encoder_outputs=features)
        assert not vision
    assert torch.equal(output.logits, expected.logits)
    assert_same_depth(output.predicted_depth, expected.predicted_depth)


def test_image_features_as_a_tuple_start_as_qwen3_vls(model, plain):
    batch = tiny_batch([[(2, 3)]])
    inputs = batch["pixel_values"], batch["image_grid_thw"]
    ours, theirs = (one.get_image_features(*inputs, return_dict=False) for one in (model, plain))
    ours, theirs = torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs)
    assert theirs and all(map(torch.equal, ours[: len(theirs)], theirs))


# Precision


@pytest.mark.parametrize("head_type", ["dpt", "dpt_original", "mlp", "mlp_multiscale"])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_depth_has_the_resolution_of_float32(how, head_type):
    model = tiny_model(depth_head_type=head_type)
    batch = tiny_batch([[(4, 5)]])
    expected = model(**batch).predicted_depth[0]
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            depth = model(**batch).predicted_depth[0]
    else:
        depth = model.to(getattr(torch, how))(**batch).predicted_depth[0]
    assert depth.dtype == torch.float32
    assert (depth - expected).abs().mean() < 0.1 * expected.mean()
    coarse = torch.float16 if how == "float16" else torch.bfloat16
    assert depth.unique().numel() > 0.9 * depth.numel()
    assert depth.to(coarse).unique().numel() < (0.2 if coarse == torch.bfloat16 else 0.5) * depth.numel()


class LastSteps(TorchFunctionMode):
    """Notes the dtypes that convolutions, linear layers and Softplus really run in."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("conv2d", "linear", "softplus"):
            self.dtypes.append((function.__name__, args[0].dtype, output.dtype))
        return output


@pytest.mark.parametrize("head_type, layer", [("dpt", "conv2d"), ("mlp", "linear")])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_the_last_layer_and_softplus_run_in_float32(head_type, layer, autocast):
    head = random_head(depth_head_type=head_type)
    dtype = torch.float32 if autocast else torch.bfloat16
    features = [feature.to(dtype) for feature in random_features((2, 2))]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), LastSteps() as steps:
        head.to(dtype)(features, (2, 2))
    assert steps.dtypes[-2:] == [(layer, torch.float32, torch.float32), ("softplus", torch.float32, torch.float32)]
    assert steps.dtypes[-3][2] == torch.bfloat16  # the layers before stay fast


def test_float16_text_equals_qwen3_vls():
    model, plain = models(dtype=torch.float16)
    batch = tiny_batch(RAGGED, dtype=torch.float16)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


# Training, compilation, placement


@pytest.mark.parametrize("source", ["vit+llm", "llm"])
def test_gradients_with_checkpointing_are_the_same(source):
    batch, gradients = tiny_batch(RAGGED), []
    for checkpointing in (False, True):
        model = tiny_model(depth_feature_source=source).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.enable_grad():
            output = model(**batch, labels=batch["input_ids"])
            (output.loss + sum(depth.log().mean() for depth in output.predicted_depth)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-6), name


def test_depth_alone_trains_the_head_through_a_frozen_backbone(model):
    depth_model = tiny_model()
    depth_model.requires_grad_(False)
    depth_model.depth_head.requires_grad_(True)
    with torch.enable_grad():
        sum(depth.mean() for depth in depth_model(**tiny_batch(RAGGED)).predicted_depth).backward()
    trained = {name for name, parameter in depth_model.named_parameters() if parameter.grad is not None}
    assert trained == {f"depth_head.{name}" for name, _ in depth_model.depth_head.named_parameters()}


def test_compiled_head_is_the_same():
    """Traced as one graph; what a backend makes of that is torch's."""
    model = tiny_model()
    batch = tiny_batch([[(2, 3), (2, 3)]])
    expected = model(**batch).predicted_depth
    model.depth_head = torch.compile(model.depth_head, backend="aot_eager", fullgraph=True, dynamic=False)
    assert_same_depth(model(**batch).predicted_depth, expected)


def test_device_map_auto(model, checkpoint):
    loaded = DepthVLMForConditionalGeneration.from_pretrained(checkpoint, device_map="auto")
    batch = tiny_batch(RAGGED)
    actual, expected = loaded(**batch), model(**batch)
    assert torch.equal(actual.logits, expected.logits)
    assert_same_depth(actual.predicted_depth, expected.predicted_depth)


@pytest.mark.parametrize("head_type", ["dpt", "mlp"])
def test_an_offloaded_head(tmp_path, head_type):
    """What device_map="auto" does where memory is short: the head's weights come when a layer is called."""
    model = tiny_model(depth_head_type=head_type)
    model.save_pretrained(tmp_path / "model")
    offloaded = DepthVLMForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map={"model": "cpu", "lm_head": "cpu", "depth_head": "disk"},
        offload_folder=tmp_path / "offload",
    )
    batch = tiny_batch(RAGGED)
    assert_same_depth(offloaded(**batch).predicted_depth, model(**batch).predicted_depth)


def test_a_head_is_never_split_over_devices(model):
    assert {type(model.depth_head).__name__, "Qwen3VLTextDecoderLayer"} <= set(model._no_split_modules)


def test_peft_trains_saves_and_reloads_the_head(checkpoint, model, tmp_path):
    peft = pytest.importorskip("peft")
    batch = tiny_batch([[(2, 3), (4, 2)]])
    settings = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["depth_head"], init_lora_weights=False
    )
    base = DepthVLMForConditionalGeneration.from_pretrained(checkpoint)
    tuned = peft.get_peft_model(base, settings).eval()
    with torch.enable_grad():
        sum(depth.mean() for depth in tuned(**batch).predicted_depth).backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert any("depth_head.modules_to_save" in name for name in trained) and any("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "depth_head.modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = tuned(**batch)
    assert (expected.predicted_depth[0] - model(**batch).predicted_depth[0]).abs().max() > 0.1
    generated = tuned.generate(**batch, **SETTINGS, return_dict_in_generate=True)
    assert_same_depth(generated.predicted_depth, expected.predicted_depth)

    tuned.save_pretrained(tmp_path)
    base = DepthVLMForConditionalGeneration.from_pretrained(checkpoint)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path)(**batch)
    assert torch.equal(reloaded.logits, expected.logits)
    assert_same_depth(reloaded.predicted_depth, expected.predicted_depth)


# Checkpoints


def test_auto_classes_in_a_fresh_process(model, checkpoint, tmp_path):
    """AutoModel and trust_remote_code on a folder with the code; saved there and loaded again, still the same."""
    repository = tmp_path / "model-repo"
    shutil.copytree(checkpoint, repository)
    for name in ("configuration_depthvlm.py", "modeling_depthvlm.py"):
        shutil.copy(ROOT / name, repository)
    batch = tiny_batch(RAGGED)
    torch.save(batch, tmp_path / "batch.pt")
    code = """
        import json, sys, torch
        from pathlib import Path
        from transformers import AutoConfig, AutoModel, AutoModelForDepthEstimation, AutoModelForImageTextToText
        repository, again, batch, out = sys.argv[1:]
        names, outputs = [], []
        for auto in (AutoModel, AutoModelForDepthEstimation, AutoModelForImageTextToText):
            model = auto.from_pretrained(repository, trust_remote_code=True).eval()
            names.append(type(model).__name__)
            with torch.no_grad():
                output = model(**torch.load(batch))
            outputs.append([output.logits, *output.predicted_depth])
            if auto is AutoModel:
                model.save_pretrained(again)
                repository = again
        assert type(AutoConfig.from_pretrained(again, trust_remote_code=True)).__name__ == "DepthVLMConfig"
        torch.save({"names": names, "outputs": outputs}, out)
    """
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    paths = [repository, tmp_path / "again", tmp_path / "batch.pt", tmp_path / "out.pt"]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, paths)], cwd=tmp_path, env=environment, check=True
    )
    result = torch.load(tmp_path / "out.pt")
    assert result["names"] == ["DepthVLMForConditionalGeneration"] * 3
    expected = model(**batch)
    for logits, *depth in result["outputs"]:
        assert torch.allclose(logits, expected.logits, atol=1e-5)
        assert_same_depth(depth, expected.predicted_depth)
    first, again = (json.loads((folder / "config.json").read_text()) for folder in paths[:2])
    for field in ("auto_map", "custom_pipelines", "model_type", "depth_head_type", "depth_head_widths"):
        assert again[field] == first[field]


def edited(checkpoint, folder, config=None, weights=None):
    """A copy of a checkpoint with another config.json (a function of its dict) or other weights."""
    shutil.copytree(checkpoint, folder)
    if config is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text()))))
    if weights is not None:
        save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_released_checkpoint_loads_with_no_key_missing_or_left_over(checkpoint, model, tmp_path):
    """As published: a Qwen3-VL state dict in bf16 plus depth_head.*, called qwen3_vl."""

    def released(config):
        for name in ("auto_map", "custom_pipelines", "depth_feature_source", "canonical_focal_length"):
            config.pop(name)
        return config | {"model_type": "qwen3_vl", "depth_head_type": "dpt"}

    folder = edited(
        checkpoint,
        tmp_path / "released",
        released,
        lambda weights: {name: weight.bfloat16() for name, weight in weights.items()},
    )
    loaded, info = DepthVLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config.depth_feature_source == "vit+llm"
    batch = tiny_batch(RAGGED)
    assert_same_depth(loaded(**batch).predicted_depth, model(**batch).predicted_depth, relative=0.1)
    loaded.save_pretrained(tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["model_type"] == "depthvlm"


def is_pytorchs_own(layer):
    """Uniform within 1/sqrt(fan_in), as Conv2d, ConvTranspose2d and Linear start in PyTorch; the bias alike."""
    weight = layer.weight
    bound = weight[0].numel() ** -0.5
    is_uniform = weight.abs().max() <= bound and weight.abs().max() > 0.8 * bound
    spread = weight.std() / (bound / 3**0.5)
    has_bias = layer.bias is None or 0 < layer.bias.abs().max() <= bound
    return bool(is_uniform and 0.8 < spread < 1.2 and has_bias)


def layers_of(head):
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
    return {name: layer for name, layer in head.named_modules() if isinstance(layer, kinds)}


@pytest.mark.parametrize("head_type", ["dpt", "dpt_original", "mlp", "mlp_multiscale"])
def test_a_new_head_starts_as_pytorch_does(head_type):
    torch.manual_seed(0)
    model = DepthVLMForConditionalGeneration(tiny_config(depth_head_type=head_type))
    layers = layers_of(model.depth_head)
    assert layers and all(is_pytorchs_own(layer) for layer in layers.values())
    assert (model.depth_head.norm.weight == 1).all() and (model.depth_head.norm.bias == 0).all()
    assert not is_pytorchs_own(model.lm_head)  # the language model starts as transformers has it


@pytest.mark.parametrize(
    "model_type, lost",
    [
        ("depthvlm", "depth_head."),
        ("depthvlm", "depth_head.projects."),
        ("qwen3_vl", "depth_head.scratch.output_conv2.2.bias"),
    ],
)
def test_a_checkpoint_that_lacks_head_weights_is_refused(checkpoint, tmp_path, model_type, lost):
    """Whole or in part. A qwen3_vl with no head at all is a base model, which gets a new one (the next test)."""

    def incomplete(weights):
        return {name: weight for name, weight in weights.items() if not name.startswith(lost)}

    folder = edited(checkpoint, tmp_path / "lost", lambda config: config | {"model_type": model_type}, incomplete)
    for load in (
        DepthVLMForConditionalGeneration.from_pretrained,
        functools.partial(DepthVLMForConditionalGeneration.from_pretrained, output_loading_info=True),
    ):
        assert_refused(
            functools.partial(load, folder), str(folder), lost, "of the depth head's 62", "convert_checkpoint"
        )


def test_a_plain_qwen3_vl_gets_a_new_head(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded, info = DepthVLMForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, depth_head_widths=[8, 12, 16, 16], depth_head_channels=16
    )
    head = {name for name in loaded.state_dict() if name.startswith("depth_head.")}
    assert set(info["missing_keys"]) == head and not info["unexpected_keys"]
    assert all(is_pytorchs_own(layer) for layer in layers_of(loaded.depth_head).values())
    expected = plain.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items() if name not in head)
    batch = tiny_batch(RAGGED)
    assert torch.equal(loaded(**batch).logits, plain(**batch).logits)


def test_untied_embeddings_survive(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = DepthVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.model.language_model.embed_tokens.weight
    batch = tiny_batch([[(2, 3)]])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "field, value",
    [("depth_head_type", "unet"), ("depth_feature_source", "clip"), ("canonical_focal_length", -1.0)],
)
def test_fields_given_at_loading_are_checked_too(checkpoint, field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        DepthVLMForConditionalGeneration.from_pretrained(checkpoint, **{field: value})


@pytest.mark.parametrize("field, value", [("depth_feature_source", "llm"), ("canonical_focal_length", 500.0)])
def test_trained_weights_are_read_as_they_were_trained(checkpoint, field, value):
    """Weights of these settings have the same shapes, so nothing but the stored configuration tells them apart."""
    config = DepthVLMConfig.from_pretrained(checkpoint)
    setattr(config, field, value)
    for options in ({field: value}, {"config": config}):
        with pytest.raises(ValueError, match=f"{field} is {value!r}, but the weights were trained with"):
            DepthVLMForConditionalGeneration.from_pretrained(checkpoint, **options)


def test_the_backbone_is_built_once(monkeypatch):
    from depthvlm import modeling_depthvlm

    built = []
    original = modeling_depthvlm.Qwen3VLModel.__init__
    monkeypatch.setattr(
        modeling_depthvlm.Qwen3VLModel, "__init__", lambda self, config: (built.append(1), original(self, config))[1]
    )
    DepthVLMForConditionalGeneration(tiny_config())
    assert len(built) == 1


def test_depth_callback_runs_once_before_the_first_token(model):
    batch, calls = tiny_batch(RAGGED), []

    class Streamer:
        def put(self, value):
            calls.append(("tokens", tuple(value.shape)))

        def end(self):
            calls.append(("end",))

    batch = tiny_batch([[(2, 3), (4, 2)]])
    cameras = [{"number": 1}, {"number": 2}]
    settings = SETTINGS | {"depth_callback": lambda depth: calls.append(("depth", depth)), "cameras": cameras}
    tensor = model.generate(**batch, **settings, streamer=Streamer())
    assert [call[0] for call in calls] == ["tokens", "depth", *["tokens"] * SETTINGS["max_new_tokens"], "end"]
    assert_same_depth(calls[1][1].predicted_depth, model(**batch).predicted_depth)
    assert calls[1][1].cameras == cameras
    assert torch.equal(tensor, model.generate(**batch, **SETTINGS))  # without return_dict_in_generate: a tensor still
    calls.clear()
    generated = model.generate(**batch, **settings, return_dict_in_generate=True, num_beams=2)
    ((_, depth),) = calls
    assert_same_depth(generated.predicted_depth, depth.predicted_depth)
    with pytest.raises(ValueError, match="depth_callback came with output_depth=False"):
        model.generate(**batch, **settings, output_depth=False)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_cache_goes_on_whatever_ran_in_between(threads):
    """
    Qwen3-VL keeps the last prompt's M-RoPE offset on the model. Each conversation here has another offset, and another
    prompt runs before each second turn; a fresh run over the whole conversation is the reference.
    """
    model = tiny_model().eval()
    layouts = [[(2, 3)], [(6, 6)], [(1, 4), (5, 2)], []] * 3
    failures = []

    def converse(numbers):
        with torch.no_grad():
            for number in numbers:
                batch = tiny_batch([layouts[number]], seed=number)
                first = model.generate(**batch, **SETTINGS, return_dict_in_generate=True)
                model.generate(**tiny_batch([[(3, 7)]], seed=99), **SETTINGS)
                ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
                types = F.pad(batch["mm_token_type_ids"], (0, ids.shape[1] - batch["input_ids"].shape[1]))
                whole = batch | {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
                settings = SETTINGS | {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
                later = model.generate(input_ids=ids, **{CACHE: first[CACHE]}, **settings)
                fresh = model.generate(**whole, **settings)
                same = torch.equal(later.sequences, fresh.sequences)
                near = all(torch.allclose(a, b, atol=1e-4) for a, b in zip(later.logits, fresh.logits, strict=True))
                if not (same and near):
                    failures.append(number)

    workers = [threading.Thread(target=converse, args=(range(n, len(layouts), threads),)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_cameras_tell_swapped_grids(model):
    batch = tiny_batch([[(2, 3), (4, 2)]])
    cameras = [{"processed_size": (2 * PIXELS, 3 * PIXELS)}, {"processed_size": (4 * PIXELS, 2 * PIXELS)}]
    model(**batch, cameras=cameras)
    swapped = batch | {"image_grid_thw": batch["image_grid_thw"][:, [0, 2, 1]]}
    for run in (model, functools.partial(model.generate, **SETTINGS, return_dict_in_generate=True)):
        with pytest.raises(ValueError, match=r"image 0 has 96x64 px by image_grid_thw, but its camera says \(64, 96\)"):
            run(**swapped, cameras=cameras)
        with pytest.raises(ValueError, match="image 0 has 64x96"):
            run(**batch, cameras=cameras[::-1])


def test_8_bit_patches_are_refused(model):
    batch = tiny_batch([[(2, 3)]])
    with pytest.raises(ValueError, match="8-bit patches; pass processor.normalize_patches"):
        model(**batch | {"pixel_values": batch["pixel_values"].byte()})


def test_the_cache_has_two_names(model):
    """Upstream's old and new one, on every transformers; each step decodes one token on the prefill's keys."""
    batch = tiny_batch([[(2, 3)]])
    expected = model(input_ids=torch.tensor([[9]]), past_key_values=model(**batch, use_cache=True)[CACHE]).logits
    again = model(input_ids=torch.tensor([[9]]), cache=model(**batch, use_cache=True)[CACHE]).logits
    assert torch.equal(again, expected)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="two names of one argument; pass one"):
        model(**batch, cache=cache, past_key_values=cache)


def test_generate_decodes_one_token_a_step(model):
    """However upstream names the cache: without it, each step would decode the whole sequence again."""
    batch = tiny_batch([[(2, 3)]])
    length = batch["input_ids"].shape[1]
    for settings, steps in (
        (MODES["greedy"], [1, 1, 1]),
        (MODES["beams"], [1, 1, 1]),
        (MODES["static cache"], [1, 1, 1]),
    ):
        with contextlib.ExitStack() as stack:
            (llm,) = count_calls(stack, model.model.language_model)
            model.generate(**batch, **SETTINGS, **settings, return_dict_in_generate=True)
        assert [shape[1] for shape in llm] == [length, *steps]
    with contextlib.ExitStack() as stack:
        (llm,) = count_calls(stack, model.model.language_model)
        model.generate(**batch, **SETTINGS, prompt_lookup_num_tokens=2, return_dict_in_generate=True)
    assert [shape[1] for shape in llm][0] == length and max(shape[1] for shape in llm[1:]) <= 3


def test_forward_takes_all_that_qwen3_vl_takes():
    ours = inspect.signature(DepthVLMForConditionalGeneration.forward).parameters
    assert set(inspect.signature(Qwen3VLForConditionalGeneration.forward).parameters) <= set(ours)
    assert DepthVLMForConditionalGeneration.__mro__[1] is Qwen3VLForConditionalGeneration
    assert issubclass(DepthVLMForConditionalGeneration.config_class, Qwen3VLConfig)


# Refusals


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


def assert_refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and ". " not in message  # one sentence


@pytest.mark.parametrize("call", ["__call__", "generate"])
def test_refuses_images_without_their_grid(model, call):
    batch = without(tiny_batch([[(2, 3)]]), "image_grid_thw")
    assert_refused(lambda: getattr(model, call)(**batch), "pixel_values", "image_grid_thw", "processor")


def test_refuses_images_without_ids(model):
    batch = tiny_batch([[(2, 3)]])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    inputs = without(batch, "input_ids") | {"inputs_embeds": embeds}
    assert_refused(lambda: model(**inputs), "pixel_values", "input_ids", "output_depth=False")
    assert_refused(
        lambda: model.generate(**inputs, return_dict_in_generate=True), "pixel_values", "input_ids", "output_depth"
    )
    features = {"image": model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])}
    positions = torch.arange(embeds.shape[1]).expand(3, 1, -1)
    inputs = {"inputs_embeds": embeds, "position_ids": positions, "mm_encoder_outputs": features}
    assert_refused(lambda: model(**inputs), "mm_encoder_outputs", "input_ids", "output_depth=False")


def test_ids_are_not_needed_without_depth(model, plain):
    batch = tiny_batch([[(2, 3)]])
    features = {"image": plain.get_image_features(batch["pixel_values"], batch["image_grid_thw"])}
    inputs = {"inputs_embeds": plain.get_input_embeddings()(batch["input_ids"]), "mm_encoder_outputs": features}
    position_ids, _ = plain.model.get_rope_index(**without(batch, "pixel_values"))
    ours = model(**inputs, position_ids=position_ids, output_depth=False)
    assert torch.equal(ours.logits, plain(**inputs, position_ids=position_ids).logits)


def test_refuses_images_without_token_types(model):
    batch = without(tiny_batch([[(2, 3)]]), "mm_token_type_ids")
    assert_refused(lambda: model.generate(**batch), "mm_token_type_ids", "pixel_values", "processor")
    with pytest.raises(ValueError, match="mm_token_type_ids"):  # transformers' own
        model(**batch)


def test_refuses_a_wrong_number_of_placeholders(model):
    batch = tiny_batch([[(2, 3)]])
    ids = batch["input_ids"][0].tolist()
    ids.remove(IMAGE)
    with pytest.raises(ValueError, match="tokens: 5, features: 6"):  # transformers' own
        model(**batch | collate([ids]))


@pytest.mark.parametrize("call", ["__call__", "generate"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_refuses_a_wrong_number_of_cameras(model, call, count):
    batch, cameras = tiny_batch([[(2, 3)], [(4, 2)]]), [{}] * count
    assert_refused(
        lambda: getattr(model, call)(**batch, cameras=cameras), f"{count} cameras", "2 images", "one an image"
    )


def test_refuses_features_without_their_grid(model, plain):
    batch = tiny_batch([[(2, 3)]])
    features = {"image": plain.get_image_features(batch["pixel_values"], batch["image_grid_thw"])}
    inputs = without(batch, "pixel_values") | {"mm_encoder_outputs": features}
    assert_refused(
        lambda: model(**inputs), "mm_encoder_outputs", "image_grid_thw", "get_image_features", "output_depth=False"
    )
    assert torch.equal(model(**inputs, output_depth=False).logits, plain(**batch).logits)


def test_refuses_depth_without_a_place_for_it(model):
    batch = tiny_batch([[(2, 3)]])
    assert_refused(
        lambda: model.generate(**batch, output_depth=True), "output_depth=True", "return_dict_in_generate=True"
    )


@pytest.mark.parametrize("in_config", [False, True])
def test_refuses_depth_from_a_chunked_prefill(model, in_config):
    batch, settings = tiny_batch([[(2, 3)]]), {"prefill_chunk_size": 4, "return_dict_in_generate": True}
    if in_config:
        settings = {"generation_config": GenerationConfig(**settings)}
    assert_refused(lambda: model.generate(**batch, **settings), "prefill_chunk_size", "output_depth=False")
