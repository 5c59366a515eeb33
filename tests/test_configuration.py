"""DepthVLMConfig: what it refuses, what it fills in, and what a save keeps."""

import ast
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import ROOT, TEXT, TOKENS, VISION, tiny_config
from transformers import Qwen3VLConfig

from depthvlm.configuration_depthvlm import DepthVLMConfig

AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForDepthEstimation")


def refused(value, *words, **fields):
    """One case: the fields given, the value that the message must quote, and words that it must say."""
    return pytest.param(fields, (str(value), *words), id=" ".join(str(word) for word in (words[0], value)))


@pytest.mark.parametrize(
    "fields, words",
    [
        refused("unet", "depth_head_type", "mlp_multiscale", depth_head_type="unet"),
        refused(None, "depth_head_type", "dpt_original", depth_head_type=None),
        refused("clip", "depth_feature_source", "vit+llm", depth_feature_source="clip"),
        refused([8, 12, 16], "depth_head_widths", "four", depth_head_widths=[8, 12, 16]),
        refused([8, 12, 16, 0], "depth_head_widths", "positive", depth_head_widths=[8, 12, 16, 0]),
        refused([8, 12, 16, 1.5], "depth_head_widths", "four", depth_head_widths=[8, 12, 16, 1.5]),
        refused(256, "depth_head_widths", "four", depth_head_widths=256),
        refused(15, "depth_head_channels", "even", depth_head_channels=15),
        refused(0, "depth_head_channels", "positive", depth_head_channels=0),
        refused("16", "depth_head_channels", "number", depth_head_channels="16"),
        refused(0, "canonical_focal_length", "positive", canonical_focal_length=0),
        refused(-1000.0, "canonical_focal_length", "positive", canonical_focal_length=-1000.0),
        refused("nan", "canonical_focal_length", "positive", canonical_focal_length=float("nan")),
        refused("inf", "canonical_focal_length", "positive", canonical_focal_length=float("inf")),
        refused("1000", "canonical_focal_length", "number", canonical_focal_length="1000"),
        refused([0, 1], "depth_llm_layers", "three", depth_llm_layers=[0, 1]),
        refused([1, 2, 4], "depth_llm_layers", "below 4", depth_llm_layers=[1, 2, 4]),
        refused([2, 1, 0], "depth_llm_layers", "ascending", depth_llm_layers=[2, 1, 0]),
        refused([0.5, 1.5, 2], "depth_llm_layers", "layers", depth_llm_layers=[0.5, 1.5, 2]),
        refused(2, "depth_llm_layers", "three", depth_llm_layers=2),
        refused(2, "deepstack_visual_indexes", "three", vision_config={"deepstack_visual_indexes": [1, 2]}),
    ],
)
def test_refuses_with_name_value_and_remedy(fields, words):
    with pytest.raises(ValueError) as error:
        tiny_config(**fields)
    assert all(word in str(error.value) for word in words), error.value


def test_refuses_an_odd_head_dim():
    with pytest.raises((ValueError, StrictDataclassError), match="even"):  # the latter is transformers' own refusal
        tiny_config(text_config={"head_dim": 15})


@pytest.mark.parametrize("head_type", ["dpt", "dpt_original", "mlp", "mlp_multiscale"])
@pytest.mark.parametrize("source", ["vit+llm", "vit", "llm"])
def test_every_head_reads_every_source(head_type, source):
    config = tiny_config(depth_head_type=head_type, depth_feature_source=source)
    assert (config.depth_head_type, config.depth_feature_source) == (head_type, source)


def test_defaults_are_the_papers_and_agree_with_each_other():
    config = DepthVLMConfig()
    assert config.model_type == "depthvlm"
    assert config.depth_head_type == "dpt" and config.depth_feature_source == "vit+llm"
    assert list(config.depth_head_widths) == [256, 512, 1024, 1024] and config.depth_head_channels == 256
    assert config.canonical_focal_length == 1000
    assert config.vision_config.out_hidden_size == config.text_config.hidden_size


def test_text_width_alone_decides_the_towers_output():
    assert DepthVLMConfig(text_config={"hidden_size": 2560}).vision_config.out_hidden_size == 2560


@pytest.mark.parametrize("layers, expected", [(36, [8, 17, 26]), (4, [0, 1, 2]), (8, [1, 3, 5])])
def test_llm_source_defaults_to_the_quarter_points(layers, expected):
    config = tiny_config(depth_feature_source="llm", text_config={"num_hidden_layers": layers})
    assert config.depth_llm_layers == expected  # counted from 0: after a quarter, a half, three quarters of the layers


def test_llm_source_needs_no_vision_taps():
    config = tiny_config(depth_feature_source="llm", vision_config={"deepstack_visual_indexes": [2]})
    assert config.vision_config.deepstack_visual_indexes == [2]


def test_save_and_load_keep_every_field(tmp_path):
    fields = {
        "depth_head_type": "mlp_multiscale",
        "depth_feature_source": "llm",
        "depth_head_widths": [2, 4, 6, 8],
        "depth_head_channels": 10,
        "depth_llm_layers": [0, 1, 3],
        "canonical_focal_length": 721.5,
    }
    tiny_config(**fields).save_pretrained(tmp_path / "one")
    DepthVLMConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    loaded = DepthVLMConfig.from_pretrained(tmp_path / "two")
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert loaded.text_config.rope_parameters["mrope_section"] == [4, 2, 2]
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()


def test_saves_keep_the_way_to_the_code(tmp_path):
    """auto_map and custom_pipelines come from the class: a loaded file can neither lose nor redirect them."""
    tiny_config().save_pretrained(tmp_path)
    first = json.loads((tmp_path / "config.json").read_text())
    assert sorted(first["auto_map"]) == sorted(AUTO_CLASSES)
    assert first["custom_pipelines"]["depth-estimation"]["pt"] == ["AutoModelForImageTextToText"]
    for change in (
        {"auto_map": {"AutoModel": "somebody/else--modeling_other.Other"}, "custom_pipelines": {}},
        {"auto_map": None, "custom_pipelines": None},
    ):
        (tmp_path / "config.json").write_text(json.dumps(first | change))
        config = DepthVLMConfig.from_pretrained(tmp_path)
        config.save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again" / "config.json").read_text())
        assert again["auto_map"] == config.auto_map == first["auto_map"]
        assert again["custom_pipelines"] == config.custom_pipelines == first["custom_pipelines"]


def test_auto_map_points_at_classes_that_exist():
    for entry in tiny_config().auto_map.values():
        module, name = entry.split(".")
        tree = ast.parse((ROOT / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}, entry


def test_reads_a_plain_qwen3_vl_config(tmp_path):
    """The released checkpoints say `"model_type": "qwen3_vl"`; a base model says nothing of a head."""
    Qwen3VLConfig(text_config=TEXT, vision_config=VISION, **TOKENS).save_pretrained(tmp_path)
    config = DepthVLMConfig.from_pretrained(tmp_path)
    assert config.depth_head_type == "dpt" and config.text_config.hidden_size == 64
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "depthvlm"
