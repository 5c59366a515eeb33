"""Checkpoints as they are published (config in transformers 4's words, bf16 shards, no code), only tiny."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, Qwen2TokenizerFast, Qwen3VLForConditionalGeneration

import convert_checkpoint
from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMDPTHead, DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor

ROOT = Path(convert_checkpoint.__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
IDS = {token: 256 + index for index, token in enumerate(SPECIAL)}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL_HEAD = {"depth_head_widths": [8, 8, 8, 8], "depth_head_channels": 8}
IMAGES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def released_settings(tied=True, **extra):
    """config.json with the fields, and the names for them, that Qwen's and the released checkpoints have."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "depth_head_type": "dpt",
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "text_config": {
            "model_type": "qwen3_vl_text",
            "dtype": "bfloat16",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 272,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-06,
            "rope_theta": 12345,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
    } | extra


def plain_settings(tied=True, **extra):
    settings = released_settings(tied, **extra)
    del settings["depth_head_type"]
    return settings


def weights(settings):
    """What a training run would leave: no tensor at a round value, all in bf16."""
    torch.manual_seed(1)
    model = DepthVLMForConditionalGeneration(DepthVLMConfig.from_dict(settings | {"model_type": "depthvlm"}))
    tensors = {
        name: (value + 0.05 * torch.randn(value.shape)).bfloat16()
        for name, value in model.state_dict().items()
        if "depth_head_type" in settings or not name.startswith("depth_head.")
    }
    if settings["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    return tensors


def write_weights(folder, tensors, shards):
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts = [{} for _ in names]
    for index, (name, value) in enumerate(tensors.items()):
        parts[index * shards // len(tensors)][name] = value
    if shards == 1:
        names = ["model.safetensors"]
    else:
        index = {
            "metadata": {},
            "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
        }
        write_json(folder / "model.safetensors.index.json", index)
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})


def write_checkpoint(folder, settings, shards=1, tensors=None):
    folder.mkdir()
    write_json(folder / "config.json", settings)
    write_weights(folder, tensors if tensors is not None else weights(settings), shards)
    write_json(
        folder / "generation_config.json", {"eos_token_id": IDS["<|im_end|>"], "temperature": 0.7, "do_sample": True}
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, *SPECIAL])}
    Qwen2TokenizerFast(
        vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=SPECIAL
    ).save_pretrained(folder)
    tokenizer = {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen3VLProcessor",
        "additional_special_tokens": SPECIAL[1:],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 2048,
    }
    write_json(folder / "tokenizer_config.json", tokenizer)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    common = IMAGES | {"processor_class": "Qwen3VLProcessor"}
    image = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 4096, "longest_edge": 16384},
    }
    write_json(folder / "preprocessor_config.json", image | common)
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "size": {"shortest_edge": 4096, "longest_edge": 99999}}
    write_json(folder / "video_preprocessor_config.json", video | common)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content))


def read_json(path):
    return json.loads(path.read_text())


def edit_json(path, **changes):
    write_json(path, read_json(path) | changes)


def read_weights(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name


def photo():
    return Image.linear_gradient("L").resize((96, 64)).convert("RGB")


def depth_batch(folder):
    return DepthVLMProcessor.from_pretrained(folder)(images=[photo()], focal_lengths=[1000.0], return_tensors="pt")


@torch.no_grad()
def run(model_class, folder, batch):
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    return model(**{name: value for name, value in batch.items() if model_class is not Qwen3VL or name != "cameras"})


Qwen3VL = Qwen3VLForConditionalGeneration


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released checkpoint with the head's true sizes, in three files, with untied embeddings, and its conversion."""
    folder = tmp_path_factory.mktemp("released")
    src = write_checkpoint(folder / "src", released_settings(tied=False), shards=3)
    return src, convert_checkpoint.convert(src, folder / "dst")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain Qwen3-VL with tied embeddings, its conversion and the plain view of that."""
    folder = tmp_path_factory.mktemp("base")
    src = write_checkpoint(folder / "src", plain_settings())
    dst = convert_checkpoint.convert(src, folder / "dst")
    return src, dst, convert_checkpoint.convert(dst, folder / "back", to_qwen3_vl=True)


@pytest.fixture
def small(tmp_path):
    """A released checkpoint with a small head in one file, to be spoilt."""
    return write_checkpoint(tmp_path / "small", released_settings(**SMALL_HEAD))


def test_released_weights_arrive_unchanged_in_a_complete_repo(released):
    src, dst = released
    assert_same_weights(read_weights(src), read_weights(dst))
    assert {path.name for path in dst.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "configuration_depthvlm.py",
        "generation_config.json",
        "handler.py",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "modeling_depthvlm.py",
        "photos_depthvlm.py",
        "processing_depthvlm.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    }
    for name in ("tokenizer.json", "generation_config.json"):
        assert (dst / name).read_bytes() == (src / name).read_bytes()
    for name in convert_checkpoint.CODE:
        assert (dst / name).read_bytes() == (ROOT / name).read_bytes()
    config = read_json(dst / "config.json")
    assert config["model_type"] == "depthvlm" and config["architectures"] == ["DepthVLMForConditionalGeneration"]
    assert config["depth_head_type"] == "dpt" and config["canonical_focal_length"] == 1000
    assert config["text_config"] == read_json(src / "config.json")["text_config"]  # the names of rope included
    assert config["auto_map"]["AutoModel"] == "modeling_depthvlm.DepthVLMForConditionalGeneration"
    processor = read_json(dst / "processor_config.json")
    assert processor["auto_map"] == {"AutoProcessor": "processing_depthvlm.DepthVLMProcessor"}
    assert processor["canonical_focal_length"] == 1000
    assert processor["image_processor"]["size"] == {"shortest_edge": 4096, "longest_edge": 16384}
    mode = (dst / "config.json").stat().st_mode
    assert all(path.stat().st_mode == mode for path in dst.glob("*.safetensors"))


LOAD_AND_RUN = """
import sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
dst, image, result = sys.argv[1:]
model = AutoModel.from_pretrained(dst, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(dst, trust_remote_code=True)
batch = processor(images=[Image.open(image)], focal_lengths=[1000.0], return_tensors="pt")
with torch.no_grad():
    outputs = model(**batch)
pipe = pipeline("depth-estimation", model=dst, trust_remote_code=True, dtype=torch.float32)
piped = pipe(image, focal_lengths=1000.0)["predicted_depth"]
post = processor.post_process_depth_estimation(outputs)[0]["predicted_depth"]
torch.save([dict(batch), outputs.logits, outputs.predicted_depth[0], post, piped], result)
"""


def test_converted_repo_in_a_fresh_process_gives_the_sources_logits_and_depth(released, tmp_path):
    src, dst = released
    photo().save(tmp_path / "photo.png")
    command = [sys.executable, "-c", LOAD_AND_RUN, str(dst), str(tmp_path / "photo.png"), str(tmp_path / "result.pt")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    batch, logits, depth, post, piped = torch.load(tmp_path / "result.pt", weights_only=True)
    plain = run(Qwen3VL, src, batch)
    ours = run(DepthVLMForConditionalGeneration, src, batch)
    torch.testing.assert_close(logits, plain.logits)
    assert depth.shape == (64, 96) and depth.std() > 0
    torch.testing.assert_close(depth, ours.predicted_depth[0])
    torch.testing.assert_close(post, ours.predicted_depth[0])  # taken at the canonical focal length, at full size
    torch.testing.assert_close(piped, post)


def test_base_gets_a_fresh_head_as_pytorch_makes_it(base):
    src, dst, _ = base
    before, after = read_weights(src), read_weights(dst)
    head = {name: value for name, value in after.items() if name.startswith("depth_head.")}
    assert_same_weights(before, {name: value for name, value in after.items() if name not in head})
    torch.manual_seed(0)
    expected = DepthVLMDPTHead(DepthVLMConfig.from_pretrained(dst)).bfloat16().state_dict()
    assert_same_weights(head, {f"depth_head.{name}": value for name, value in expected.items()})


def test_base_conversion_says_that_the_head_is_untrained_and_leaves_the_random_state(tmp_path, capsys):
    src = write_checkpoint(tmp_path / "src", plain_settings())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    dst = convert_checkpoint.convert(src, tmp_path / "dst")
    assert torch.equal(state, torch.get_rng_state())
    assert "no depth head, so a fresh one" in capsys.readouterr().out
    assert "untrained" in (dst / "README.md").read_text()


def test_round_trip_gives_the_plain_model_back(base):
    src, dst, back = base
    assert_same_weights(read_weights(src), read_weights(back))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert read_json(back / name) == read_json(src / name), name
    assert read_json(back / "video_preprocessor_config.json") == read_json(src / "video_preprocessor_config.json")
    image, image_before = (read_json(folder / "preprocessor_config.json") for folder in (back, src))
    assert image["processor_class"] == "Qwen3VLProcessor" and image["image_processor_type"] == "Qwen2VLImageProcessor"
    assert {name: image[name] for name in IMAGES | {"size": 0}} == {
        name: image_before[name] for name in IMAGES | {"size": 0}
    }
    assert (back / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert not list(back.glob("*.py")) and not (back / "processor_config.json").exists()
    batch = depth_batch(src)
    logits = [
        run(model_class, folder, batch).logits
        for model_class, folder in ((Qwen3VL, src), (Qwen3VL, back), (DepthVLMForConditionalGeneration, dst))
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    text = "<|im_start|>user\nhow far?<|image_pad|>"
    assert AutoTokenizer.from_pretrained(back)(text) == AutoTokenizer.from_pretrained(src)(text)


@pytest.mark.parametrize(("tied", "shards"), [(True, 1), (True, 2), (False, 1)])
def test_released_round_trip_single_and_sharded_tied_and_not(tmp_path, tied, shards):
    src = write_checkpoint(tmp_path / "src", released_settings(tied, **SMALL_HEAD), shards)
    dst = convert_checkpoint.convert(src, tmp_path / "dst")
    tensors = read_weights(src)
    assert_same_weights(tensors, read_weights(dst))
    assert ("lm_head.weight" in tensors) is not tied
    assert len(list(dst.glob("*.safetensors"))) == shards
    back = convert_checkpoint.convert(dst, tmp_path / "back", to_qwen3_vl=True)
    plain = {name: value for name, value in tensors.items() if not name.startswith("depth_head.")}
    assert_same_weights(plain, read_weights(back))
    expected = released_settings(tied)
    del expected["depth_head_type"]
    assert read_json(back / "config.json") == expected
    _, info = Qwen3VL.from_pretrained(back, output_loading_info=True)
    assert not any(info.values())


def test_a_shard_of_the_head_alone_leaves_no_empty_file(tmp_path):
    settings = released_settings(**SMALL_HEAD)
    tensors = weights(settings)
    src = write_checkpoint(tmp_path / "src", settings, tensors={})
    (src / "model.safetensors").unlink()
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("depth_head.")}
    weight_map = {}
    for filename, part in (("a.safetensors", tensors), ("b.safetensors", head)):
        save_file(part, src / filename)
        weight_map |= dict.fromkeys(part, filename)
    write_json(src / "model.safetensors.index.json", {"weight_map": weight_map})
    # straight from the released form, too
    back = convert_checkpoint.convert(src, tmp_path / "back", to_qwen3_vl=True)
    assert [path.name for path in back.glob("model*")] == ["model.safetensors"]
    assert_same_weights(read_weights(back), tensors)


def test_index_of_the_result_lists_every_tensor_with_its_file_and_the_bytes(released):
    _, dst = released
    index = read_json(dst / "model.safetensors.index.json")
    found, size = {}, 0
    for path in dst.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
        size += sum(value.nbytes for value in load_file(path).values())
    assert index == {"metadata": {"total_size": size}, "weight_map": found}


def test_tied_lm_head_that_equals_the_embedding_is_dropped(small, tmp_path):
    tensors = read_weights(small)
    copy = tensors["model.language_model.embed_tokens.weight"].clone()
    write_weights(small, tensors | {"lm_head.weight": copy}, 1)
    assert_same_weights(read_weights(convert_checkpoint.convert(small, tmp_path / "dst")), tensors)


def test_video_settings_of_a_newer_layout_are_kept_for_the_way_back(small, tmp_path):
    video = read_json(small / "video_preprocessor_config.json")
    (small / "video_preprocessor_config.json").unlink()
    image = read_json(small / "preprocessor_config.json")
    (small / "preprocessor_config.json").unlink()
    newer = {"processor_class": "Qwen3VLProcessor", "image_processor": image, "video_processor": video}
    write_json(small / "processor_config.json", newer)
    dst = convert_checkpoint.convert(small, tmp_path / "dst")
    back = convert_checkpoint.convert(dst, tmp_path / "back", to_qwen3_vl=True)
    assert read_json(back / "video_preprocessor_config.json") == video
    assert read_json(back / "preprocessor_config.json")["size"] == image["size"]


def test_plain_view_of_a_repo_that_lost_its_video_settings_says_so(small, tmp_path, capsys):
    dst = convert_checkpoint.convert(small, tmp_path / "dst")
    (dst / "video_preprocessor_config.json").unlink()  # as after training
    back = convert_checkpoint.convert(dst, tmp_path / "back", to_qwen3_vl=True)
    assert "Qwen3-VL's defaults are written" in capsys.readouterr().out
    assert read_json(back / "video_preprocessor_config.json") == {
        "processor_class": "Qwen3VLProcessor",
        "video_processor_type": "Qwen3VLVideoProcessor",
        **IMAGES,
    }


def test_code_beside_the_source_is_not_run_and_not_named_by_the_result(small, tmp_path):
    (small / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    edit_json(small / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    edit_json(small / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    dst = convert_checkpoint.convert(small, tmp_path / "dst")
    assert not (tmp_path / "ran").exists() and not (dst / "evil.py").exists()
    assert not [path for path in dst.glob("*.json") if "evil" in path.read_text()]


def test_model_card(small, tmp_path, monkeypatch):
    header = re.match(
        r"---\n(.*?)---\n", (convert_checkpoint.convert(small, tmp_path / "dst") / "README.md").read_text(), re.S
    )
    assert header[1].splitlines()[:3] == [
        "license: apache-2.0",
        "pipeline_tag: depth-estimation",
        "library_name: transformers",
    ]
    (small / "README.md").unlink()
    asked = {}
    monkeypatch.setattr(convert_checkpoint, "snapshot_download", lambda src, **kwargs: asked.update(kwargs) or small)
    text = (convert_checkpoint.convert("someone/model", tmp_path / "hub") / "README.md").read_text()
    assert "license: unknown\nbase_model: someone/model\n" in text and 'from_pretrained("hub"' in text
    assert "untrained" not in text
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])


class FakeHub:
    def __init__(self):
        self.calls = []

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create", repo_id, kwargs))

    def upload_folder(self, *, repo_id, folder_path):
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_push_to_hub(small, tmp_path, monkeypatch, capsys):
    hub = FakeHub()
    monkeypatch.setattr(convert_checkpoint, "HfApi", lambda: hub)
    assert convert_checkpoint.main([str(small), str(tmp_path / "dst"), "--push-to-hub", "me/depth"]) == 0
    (create, upload) = hub.calls
    assert create == ("create", "me/depth", {"exist_ok": True})
    assert upload == ("upload", "me/depth", sorted(path.name for path in (tmp_path / "dst").iterdir()))
    assert 'from_pretrained("me/depth"' in (tmp_path / "dst" / "README.md").read_text()
    assert "https://huggingface.co/me/depth" in capsys.readouterr().out


def drop(prefix):
    def spoil(src):
        write_weights(src, {name: value for name, value in read_weights(src).items() if not name.startswith(prefix)}, 1)

    return spoil


def put(name, value):
    return lambda src: write_weights(src, read_weights(src) | {name: value}, 1)


def pickled(src):
    torch.save(read_weights(src), src / "pytorch_model.bin")
    (src / "model.safetensors").unlink()


def truncated(src):
    content = (src / "model.safetensors").read_bytes()
    (src / "model.safetensors").write_bytes(content[: len(content) // 2])


def outside(src):
    (src / "model.safetensors").rename(src.parent / "other.safetensors")
    write_json(src / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "../other.safetensors"}})


def twice(src):
    (src / "model.safetensors").rename(src / "a.safetensors")
    (src / "b.safetensors").write_bytes((src / "a.safetensors").read_bytes())
    write_json(src / "model.safetensors.index.json", {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})


def absent_shard(src):
    (src / "model.safetensors").unlink()
    write_json(src / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "a.safetensors"}})


def empty_index(src):
    (src / "model.safetensors").unlink()
    write_json(src / "model.safetensors.index.json", {})


def replace(name, change):
    """Another value, dtype included, of a tensor."""
    return lambda src: write_weights(src, read_weights(src) | {name: change(read_weights(src)[name])}, 1)


def with_value(value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


def to_folder(name):
    def spoil(src):
        (src / name).unlink()
        (src / name).mkdir()

    return spoil


def section(name, **changes):
    return lambda src: edit_json(src / "config.json", **{name: read_json(src / "config.json")[name] | changes})


def config(**changes):
    return lambda src: edit_json(src / "config.json", **changes)


def remove(*names):
    return lambda src: [(src / name).unlink() for name in names]


def template(content):
    return lambda src: write_json(src / "chat_template.json", {"chat_template": content})


def text(name, content):
    return lambda src: (src / name).write_text(content)


NORM = "depth_head.norm.weight"
SPOILT = {
    "a missing key": (drop("depth_head.norm."), r"2 missing: depth_head.norm.bias, depth_head.norm.weight$"),
    "many missing keys": (drop("depth_head."), r"62 missing: depth_head.norm.bias, .*, .* and 59 more$"),
    "an extra key": (put("depth_head.more", torch.zeros(1)), r"1 extra: depth_head.more$"),
    "a wrong shape": (put(NORM, torch.zeros(7)), r"1 tensors of another shape .*norm.weight .*\(7,\), not \(32,\)"),
    "a tied LM head of its own": (put("lm_head.weight", torch.zeros(272, 32)), "lm_head.weight differs .*to false"),
    "pickled weights": (pickled, "pytorch_model.bin.* never opened.*save_pretrained"),
    "a truncated file": (truncated, "model.safetensors cannot be read .*download it again"),
    "a file outside the folder": (outside, r"'../other.safetensors' outside its folder"),
    "a tensor in two files": (twice, "b.safetensors holds tensors that another file"),
    "an absent shard": (absent_shard, "a.safetensors cannot be read"),
    "an index without a map": (empty_index, "no weight_map"),
    "no config": (remove("config.json"), "has no config.json"),
    "a broken config": (text("config.json", "{"), "config.json is no JSON"),
    "a config of another kind": (text("config.json", "[]"), "config.json holds no JSON object"),
    "another architecture": (config(model_type="qwen3_vl_moe"), "model_type 'qwen3_vl_moe'.*dense"),
    "another head": (config(depth_head_type="conv"), "describes no DepthVLM: depth_head_type is 'conv'"),
    "an untyped field": (config(image_token_id="x"), "describes no DepthVLM"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "no image processor": (remove("preprocessor_config.json"), "no tokenizer and image processor that load"),
    "no chat template": (remove("chat_template.json"), "no chat template; copy"),
    "no vocabulary": (remove("tokenizer.json"), "has no tokenizer.json, nor vocab.json and merges.txt; copy"),
    "a broken tokenizer": (text("tokenizer.json", "["), "no tokenizer and image processor that load"),
    "a tokenizer of another kind": (text("tokenizer.json", "[]"), "no tokenizer and image processor that load"),
    "another model's tokenizer": (
        config(image_token_id=3),
        r"image_token_id 3 .*tokenizer gives <|image_pad|> \[262\]",
    ),
    "no tokenizer settings": (remove("tokenizer_config.json"), "has no tokenizer_config.json"),
    "an image processor of another kind": (text("preprocessor_config.json", "[]"), "image processor that load"),
    "another model's image processor": (
        text("preprocessor_config.json", "{}"),
        "patch_size is 14, .* whose is 16; copy",
    ),
    "a chat template that breaks off": (template("{% for"), "chat template that cannot be used .*; copy"),
    "a chat template without images": (template("{{ messages }}"), "leaves out the image or the question; copy"),
    "an empty chat template": (template(""), "no chat template; copy"),
    "NaN": (replace(NORM, with_value(math.nan)), "NaN or infinity in 1 tensors: depth_head.norm.weight; take"),
    "infinity": (replace(NORM, with_value(-math.inf)), "NaN or infinity in 1 tensors: depth_head.norm.weight; take"),
    "8-bit integers": (replace(NORM, lambda value: value.to(torch.int8)), "tensors of I8, .*norm.weight; convert"),
    "8-bit floats": (replace(NORM, lambda value: value.to(torch.float8_e4m3fn)), "tensors of F8_E4M3, .*; convert"),
    "64-bit floats": (replace(NORM, lambda value: value.double()), "tensors of F64, .*; convert"),
    "a download's pointer": (
        text("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "cannot be read",
    ),
    "an empty file": (text("model.safetensors", ""), "model.safetensors cannot be read .*download it again"),
    "a folder for a file": (to_folder("model.safetensors"), "model.safetensors cannot be read"),
    "no heads": (section("text_config", num_attention_heads=0), "describes no model that can be built"),
    "a negative width": (section("text_config", hidden_size=-4), "describes no model that can be built"),
    "a width in words": (section("text_config", hidden_size="a"), "describes no DepthVLM: .*hidden_size.*expected int"),
    "a level past the tower": (
        section("vision_config", deepstack_visual_indexes=[0, 1, 9]),
        "reads three of 4 blocks",
    ),
    "no focal length": (config(canonical_focal_length=0), "canonical_focal_length is 0; it must be"),
    "a broken generation config": (text("generation_config.json", "{"), "generation_config.json is no JSON"),
    "a broken card": (text("README.md", "---\na: [\n---\n"), "README.md has a YAML header that cannot be read"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_bad_source_is_one_sentence_and_leaves_nothing(small, tmp_path, capsys, fault):
    spoil, message = SPOILT[fault]
    spoil(small)
    before = set(tmp_path.iterdir())
    assert convert_checkpoint.main([str(small), str(tmp_path / "dst")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("convert_checkpoint.py: ") and re.search(message, error), error
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("fault", ["no vocabulary", "8-bit integers", "another model's image processor"])
def test_the_plain_view_takes_a_whole_source_too(small, tmp_path, capsys, fault):
    spoil, message = SPOILT[fault]
    spoil(small)
    assert convert_checkpoint.main([str(small), str(tmp_path / "dst"), "--to-qwen3-vl"]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "dst").exists()


def test_wrong_direction_is_refused(base, tmp_path):
    src, dst, _ = base
    with pytest.raises(ValueError, match="is a DepthVLM repo already"):
        convert_checkpoint.convert(dst, tmp_path / "x")
    with pytest.raises(ValueError, match="has no depth head to take off"):
        convert_checkpoint.convert(src, tmp_path / "x", to_qwen3_vl=True)


def test_destination_in_use_is_refused(small, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (convert_checkpoint.convert(small, tmp_path / "empty") / "config.json").exists()
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_checkpoint.convert(small, tmp_path / "empty")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_checkpoint.convert(small, small / "config.json")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(ValueError, match="new.partial is left from a conversion that was cut off"):
        convert_checkpoint.convert(small, tmp_path / "new")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_conversion_leaves_nothing(small, tmp_path, monkeypatch, error):
    def save_file(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error("no space left")

    monkeypatch.setattr(convert_checkpoint, "save_file", save_file)
    with pytest.raises(error):
        convert_checkpoint.convert(small, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_command_line_without_a_traceback(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "convert_checkpoint.py"), "nobody/no-such-model", "dst"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(
        "convert_checkpoint.py: SRC 'nobody/no-such-model' is no folder, and the hub did not give it"
    )
    assert not (tmp_path / "dst").exists()


def test_bad_hub_id_is_refused_before_the_work(small, tmp_path, capsys):
    assert convert_checkpoint.main([str(small), str(tmp_path / "dst"), "--push-to-hub", "a/b/c"]) == 2
    assert "a/b/c" in capsys.readouterr().err and not (tmp_path / "dst").exists()
