"""The repository as users meet it: a folder that Auto classes load, on the oldest transformers too, and its README."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLDEST = ROOT / ".venv-oldest" / "bin" / "python"
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


def test_oldest_supported_transformers(tmp_path):
    if not OLDEST.exists():
        pytest.skip(f"{OLDEST.parent.parent.name} is not there; `make test` makes it")
    run = run_python(OLDEST, SMOKE.format(root=str(ROOT)), tmp_path, cwd=tmp_path)
    assert run.returncode == 0 and "ok 5.19.0" in run.stdout, run.stderr


def test_readme_code_runs(tmp_path):
    """Every Python block of the README, one after the other, in one process at the root."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    code = (
        "\n".join(blocks)
        .replace('"photo.jpg"', '"samples/room.jpg"')
        .replace("focal_length=1430.0", "focal_length=250.0")
    )
    code += "\nassert isinstance(answer, str) and points.numpy().shape[-1] == 3\nprint('ok')"
    run = run_python(sys.executable, code, tmp_path)
    assert run.returncode == 0 and "ok" in run.stdout, run.stderr


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Files")[1].split("## Limits")[0]
    for name in re.findall(r"`([\w./]+\.py|[\w]+/)`", table):
        assert (ROOT / name).exists(), name
