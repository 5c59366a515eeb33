"""The repository as users meet it: a folder that Auto classes load, and its README."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from depthvlm.configuration_depthvlm import TESTED_TRANSFORMERS

ROOT = Path(__file__).resolve().parent.parent
SMOKE = """
import torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers import Qwen3VLForConditionalGeneration

root = {root!r}
processor = AutoProcessor.from_pretrained(root, trust_remote_code=True)
model = AutoModel.from_pretrained(root, trust_remote_code=True, dtype=torch.float32).eval()
same = AutoModelForImageTextToText.from_pretrained(root, trust_remote_code=True)
assert type(model).__name__ == type(same).__name__ == "DepthVLMForConditionalGeneration"
config = AutoConfig.from_pretrained(root, trust_remote_code=True)
assert config.canonical_focal_length == processor.canonical_focal_length
plain = Qwen3VLForConditionalGeneration(model.config).eval()
left_over = plain.load_state_dict(model.state_dict(), strict=False)
assert not left_over.missing_keys and all(key.startswith("depth_head.") for key in left_over.unexpected_keys)
photos = [Image.new("RGB", (90, 60), colour) for colour in ("red", "blue")]
inputs = processor(images=photos, focal_lengths=80, return_tensors="pt")
cameras = inputs.pop("cameras")
with torch.no_grad():
    ours = model(**inputs, cameras=cameras)
    assert torch.equal(ours.logits, plain(**inputs).logits)
    options = dict(max_new_tokens=4, num_beams=2, suppress_tokens=[processor.image_token_id, processor.video_token_id])
    both = model.generate(**inputs, cameras=cameras, return_dict_in_generate=True, **options)
    assert torch.equal(both.sequences, plain.generate(**inputs, **options))
    for one, other in zip(both.predicted_depth, ours.predicted_depth):
        torch.testing.assert_close(one, other)
maps = processor.post_process_depth_estimation(both)
assert [tuple(found["predicted_depth"].shape) for found in maps] == [(60, 90), (60, 90)]
print("ok", transformers.__version__)
"""


def run_python(python, code, tmp_path, cwd=ROOT):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=environment, cwd=cwd)


def test_root_is_a_model_repository(tmp_path):
    run = run_python(sys.executable, SMOKE.format(root=str(ROOT)), tmp_path, cwd=tmp_path)
    assert run.returncode == 0 and "ok" in run.stdout, run.stderr


@pytest.mark.parametrize("version, warnings", [("5.18.4", 1), ("5.19.0", 0), ("5.24.9", 0), ("5.25.0.dev0", 1)])
def test_an_untested_transformers_is_named_once(tmp_path, version, warnings):
    """Config, model and processor each import the check, under module names of their own."""
    code = f"""
import sys
from transformers import AutoModel, AutoProcessor
sys.modules["transformers"].__version__ = {version!r}
AutoProcessor.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
AutoModel.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
"""
    run = run_python(sys.executable, code, tmp_path)
    said = [line for line in run.stderr.splitlines() if "was tested with transformers" in line]
    assert run.returncode == 0 and len(said) == warnings, run.stderr
    assert all(f"5.19.0 to 5.24.0, and this is {version}" in line for line in said)


def test_the_tested_range_is_stated_alike():
    oldest, newest = TESTED_TRANSFORMERS
    minor = newest.split(".")[1]
    assert f"transformers>=5.{oldest.split('.')[1]},<5.{int(minor) + 1}\n" in (ROOT / "requirements.txt").read_text()
    assert f"\ntransformers=={newest}\n" in (ROOT / "constraints.txt").read_text()
    assert f"transformers=={oldest}" in (ROOT / "Makefile").read_text()


def test_loading_says_nothing_of_model_types(tmp_path):
    """What our commands load their models with: `AutoTokenizer` would ask for a model type that it does not know."""
    code = f"""
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor
DepthVLMForConditionalGeneration.from_pretrained({str(ROOT)!r})
DepthVLMProcessor.from_pretrained({str(ROOT)!r}, trust_remote_code=False)
"""
    run = run_python(sys.executable, code, tmp_path)
    assert run.returncode == 0 and "model of type" not in run.stderr + run.stdout, run.stderr


def test_readme_code_runs(tmp_path):
    """Every Python block of the README, one after the other, in one process at the root."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    code = (
        "\n".join(blocks)
        .replace('"photo.jpg"', '"samples/room.jpg"')
        .replace("focal_lengths=1430.0", "focal_lengths=250.0")
    )
    code += "\nassert isinstance(answer, str) and points.numpy().shape[-1] == 3\nprint('ok')"
    run = run_python(sys.executable, code, tmp_path)
    assert run.returncode == 0 and "ok" in run.stdout, run.stderr


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Files")[1].split("## Limits")[0]
    for name in re.findall(r"`([\w./]+\.py|[\w]+/)`", table):
        assert (ROOT / name).exists(), name
