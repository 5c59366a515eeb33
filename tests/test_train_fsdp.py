"""FSDP2 through the real Trainer, on two processes: checkpoints in shards, resuming, repositories, merged adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train_script import arguments, data, start  # noqa: F401

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from training.checkpoints import FROZEN, TRAINED, assemble

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(start, data, tmp_path_factory):  # noqa: F811
    """Folder of three runs, in one launch: `whole`; `resumed`, which takes up its first checkpoint; and `adapters`."""
    folder = tmp_path_factory.mktemp("fsdp")
    shared = {"max_steps": 2, "save_steps": 1, "dataloader_num_workers": 1, "eval_datasets": [{"path": data}]}
    shared |= {"max_eval_samples": 3, "gradient_checkpointing": True}
    lora = {"trains": ["language_model", "depth_head"], "use_peft": True, "lora_r": 2, "dtype": "bfloat16"}
    settings = {
        "whole": {},
        "resumed": {"resume_from_checkpoint": str(folder / "whole" / "checkpoint-1")},
        "adapters": lora | {"bf16": True, "save_steps": 2},
    }
    files = []
    for name, changes in settings.items():
        files.append(str(folder / f"{name}.yaml"))
        Path(files[-1]).write_text(yaml.safe_dump(arguments(start, data, folder / name, **shared | changes)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(HERE / "train_fsdp.py"), *files], env=environment, check=True, timeout=400)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_in_shards_becomes_a_repository(runs, start, tmp_path):  # noqa: F811
    """Of the last checkpoint it is the final save; frozen weights lie in the run's folder, once."""
    whole = runs / "whole"
    assemble(whole / "checkpoint-2", tmp_path)
    assert equal(weights(tmp_path), weights(whole)) and not equal(weights(tmp_path), weights(Path(start)))
    names = {file.name for file in tmp_path.iterdir()}
    assert {"modeling_depthvlm.py", "config.json", "tokenizer.json", "processor_config.json"} <= names
    DepthVLMForConditionalGeneration.from_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in (whole / "checkpoint-2" / TRAINED).iterdir())
    frozen = sum(file.stat().st_size for file in (whole / FROZEN).iterdir())
    assert size + frozen == pytest.approx((whole / "model.safetensors").stat().st_size, rel=0.1)
    assert not list(whole.rglob("pytorch_model*"))


def test_a_run_in_shards_resumes_to_the_bit(runs):
    assert equal(weights(runs / "whole"), weights(runs / "resumed"))
    logged = [json.loads((runs / name / "eval_results.json").read_text()) for name in ("whole", "resumed")]
    assert all(logged[0][name] == logged[1][name] for name in ("eval_loss", "eval_delta1"))


def test_adapters_end_merged(runs, start):  # noqa: F811
    before, after = weights(Path(start)), weights(runs / "adapters")
    moved = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    adapted = {name for name in before if "language_model" in name and name.endswith("_proj.weight")}
    assert before.keys() == after.keys() and moved & adapted == adapted
    assert moved - adapted and all(name.startswith("depth_head.") for name in moved - adapted)
    assert {value.dtype for name, value in after.items() if name not in moved - adapted} == {torch.bfloat16}
    assert after["depth_head.norm.weight"].dtype == torch.float32
    assert (runs / "adapters" / "checkpoint-2" / "modeling_depthvlm.py").exists()


def test_what_is_no_checkpoint_in_shards_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="trained_weights does not exist; pass RUN/checkpoint-N"):
        assemble(runs / "whole", tmp_path)
