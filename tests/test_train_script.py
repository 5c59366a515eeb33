"""`train_sft.py` from its command line: both stages, a kill in the middle, what a save holds, the retention watch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from fixed_batches import byte_processor
from test_train_data import make_row, write
from tiny import tiny_config
from torch.distributed.fsdp import FSDPModule
from torch.distributed.utils import _apply_to_tensors

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DEPTH_RESPONSE
from train_sft import main
from training.arguments import DepthSFTConfig
from training.checkpoints import last_checkpoint, register_code, restore_class_name
from training.data import DataArguments
from training.questions import RetentionWatch, is_right

ROOT = Path(__file__).resolve().parent.parent
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "max_steps": 6,
    "dataloader_num_workers": 2,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A complete repository of a tiny untrained model."""
    folder = tmp_path_factory.mktemp("start")
    processor = byte_processor()
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {field: processor.tokenizer.convert_tokens_to_ids(token) for field, token in names.items()}
    torch.manual_seed(0)
    model = DepthVLMForConditionalGeneration(
        tiny_config(**ids, canonical_focal_length=processor.canonical_focal_length)
    )
    register_code()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), [make_row(i) for i in range(24)])


def arguments(start, data, output, **changes) -> dict:
    stage2 = {
        "model_name_or_path": start,
        "output_dir": str(output),
        "trains": ["language_model", "lm_head", "depth_head"],
        "datasets": [{"path": data}, {"path": data, "kind": "qa", "depth_on_qa": True}],
    }
    return COMMON | stage2 | changes


def launch(settings: dict, *flags) -> subprocess.Popen:
    config = Path(settings["output_dir"]).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "train_sft.py", "--config", str(config), *flags]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def losses(folder: Path) -> dict[int, tuple]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "lm_loss", "depth_loss", "grad_norm", "num_tokens", "epoch")
    return {entry["step"]: tuple(entry[name] for name in names) for entry in history if "loss" in entry}


def test_killed_run_resumes_to_the_bit(start, data, tmp_path):
    """SIGKILL after a checkpoint; the same command with `last` gives the uninterrupted run's losses and weights."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = {"max_steps": 16, "save_steps": 4, "lr_scheduler_type": "cosine"}
    assert launch(arguments(start, data, whole, **steps)).wait(timeout=200) == 0
    run = launch(arguments(start, data, killed, **steps))
    while not list(killed.glob("checkpoint-*/data_position_0.json")):
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    (killed / "checkpoint-99999").mkdir()  # as of a save that was cut short: passed over
    step = int(last_checkpoint(killed).name.split("-")[1])
    assert step < 16
    assert launch(arguments(start, data, killed, **steps), "--resume_from_checkpoint", "last").wait(timeout=200) == 0
    expected, resumed = losses(whole / "checkpoint-16"), losses(killed / "checkpoint-16")
    assert set(expected) == set(resumed) == set(range(1, 17))
    assert {i: expected[i] for i in range(step + 1, 17)} == {i: resumed[i] for i in range(step + 1, 17)}
    first, second = (
        DepthVLMForConditionalGeneration.from_pretrained(folder, dtype="float32").state_dict()
        for folder in (whole, killed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stage_1_save_is_a_complete_repository(start, data, tmp_path):
    """A fresh process loads a checkpoint and the final save by the Auto classes; the save's dtype is as asked for."""
    settings = arguments(start, data, tmp_path / "out", trains=["depth_head"], datasets=[{"path": data}], max_steps=2)
    settings |= {"save_dtype": "bfloat16", "eval_datasets": [{"path": data}], "max_eval_samples": 3}
    assert launch(settings).wait(timeout=200) == 0
    code = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=[Image.new("RGB", (64, 48))], focal_lengths=200.0, return_tensors="pt")
    depth = model.float()(**inputs).predicted_depth[0]
    print(type(model).__name__, type(processor).__name__, model.config.dtype, tuple(depth.shape))
"""
    folders = [str(tmp_path / "out"), str(tmp_path / "out" / "checkpoint-2")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("DepthVLMForConditionalGeneration DepthVLMProcessor") == 2
    assert "bfloat16" in done.stdout.splitlines()[0]
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert {"eval_depth_loss", "eval_delta1", "eval_abs_rel", "eval_loss"} <= metrics.keys()
    assert "eval_lm_loss" not in metrics and metrics["eval_loss"] == pytest.approx(metrics["eval_depth_loss"], abs=1e-4)


def run_here(settings: dict, peft=False):
    from trl import ModelConfig, TrlParser

    config = Path(settings["output_dir"]).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings | ({"use_peft": True, "lora_r": 2} if peft else {})))
    main(*TrlParser((DataArguments, DepthSFTConfig, ModelConfig)).parse_args_and_config(["--config", str(config)]))


def test_lora_ends_merged(start, data, tmp_path):
    output = tmp_path / "lora"
    settings = arguments(start, data, output, trains=["language_model", "depth_head"], max_steps=2)
    run_here(settings | {"dataloader_num_workers": 0}, peft=True)
    with pytest.raises(ValueError, match="trains names vision, which adapters leave frozen"):
        run_here(settings | {"trains": ["language_model", "vision"], "output_dir": str(tmp_path / "no")}, peft=True)
    with pytest.raises(ValueError, match=r"adapters on the LLM, which trains \(depth_head\) lacks; add it"):
        run_here(settings | {"trains": ["depth_head"], "output_dir": str(tmp_path / "no")}, peft=True)
    before, after = (
        DepthVLMForConditionalGeneration.from_pretrained(folder, dtype="float32").state_dict()
        for folder in (start, output)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    adapted = {name for name in before if "language_model" in name and name.endswith("_proj.weight")}
    assert moved <= adapted | {name for name in before if name.startswith("depth_head.")}
    assert any("depth_head" in name for name in moved) and moved & adapted
    assert (output / "checkpoint-2" / "adapter_config.json").exists()


def test_retention_watch_and_questions(start, data, tmp_path):
    output = tmp_path / "watched"
    settings = arguments(start, data, output, max_steps=2, dataloader_num_workers=0, retention_steps=1)
    settings |= {"eval_datasets": [{"path": data, "kind": "qa"}], "eval_questions": 2, "max_eval_samples": 2}
    run_here(settings)
    history = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert all({"canned_depth_replies", "base_agreement"} <= entry.keys() for entry in logged)
    assert len(json.loads((output / "base_answers.json").read_text())) == 8
    scores = json.loads((output / "questions_results.json").read_text())
    assert scores.keys() == {"questions_distance", "questions_nearer", "questions_all"}


def test_retention_watch_tells_a_forgetful_model(monkeypatch):
    """Shares are of the fixed questions: three of four answers are canned, one is what it was."""
    watch = RetentionWatch.__new__(RetentionWatch)
    watch.every, watch.base = 10, ["a", "b", "c", "d"]
    watch.trainer = type("Trainer", (), {"_metrics": {"train": {"canned_depth_replies": [], "base_agreement": []}}})()
    monkeypatch.setattr(watch, "answers", lambda: ["a", *[DEPTH_RESPONSE] * 3], raising=False)
    state = type("State", (), {"global_step": 10})()
    watch.on_step_end(None, state, None)
    assert watch.trainer._metrics["train"] == {"canned_depth_replies": [0.75], "base_agreement": [0.25]}
    state.global_step = 11
    watch.on_step_end(None, state, None)
    assert len(watch.trainer._metrics["train"]["base_agreement"]) == 1


def test_mix_without_questions_is_warned_of(start, data, tmp_path, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    settings = arguments(start, data, tmp_path / "warned", max_steps=1, dataloader_num_workers=0)
    run_here(settings)
    assert "every question with the depth prompt" not in caplog.text
    run_here(settings | {"datasets": [{"path": data}], "output_dir": str(tmp_path / "alone")})
    assert "every question with the depth prompt" in " ".join(caplog.text.split())


def test_resume_with_other_sizes_is_refused(start, data, tmp_path):
    output = tmp_path / "sizes"
    settings = arguments(start, data, output, max_steps=2, dataloader_num_workers=0)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run_here(settings | {"resume_from_checkpoint": "last"})
    run_here(settings)
    again = settings | {"resume_from_checkpoint": "last", "max_steps": 3}
    with pytest.raises(ValueError, match="made with per_device_train_batch_size 2, now it is 1"):
        run_here(again | {"per_device_train_batch_size": 1})
    with pytest.raises(ValueError, match="made with seed 42, now it is 7"):
        run_here(again | {"seed": 7})
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run; go on with --resume"):
        run_here(settings)


def test_a_finished_run_that_is_resumed_is_evaluated_and_saved_as_it_was(start, data, tmp_path):
    """As after a kill in the last evaluation: no step is added."""
    output = tmp_path / "finished"
    settings = arguments(start, data, output, max_steps=2, dataloader_num_workers=0)
    run_here(settings)
    before = (output / "model.safetensors").read_bytes()
    (output / "model.safetensors").unlink()
    run_here(settings | {"resume_from_checkpoint": "last"})
    assert (output / "model.safetensors").read_bytes() == before and not (output / "checkpoint-3").exists()


def test_retention_watch_needs_an_image(tmp_path):
    with pytest.raises(ValueError, match="retention_steps is 5 but eval_datasets holds no image"):
        RetentionWatch(None, DataArguments(), 5)


@pytest.mark.parametrize("flag", [{"ignore_data_skip": False}, {"remove_unused_columns": True}])
def test_a_flag_that_must_stay_is_refused(start, data, tmp_path, flag):
    with pytest.raises(ValueError, match="it must stay as it is"):
        run_here(arguments(start, data, tmp_path / "out", **flag))


def test_a_model_that_fsdp2_has_wrapped_is_saved_with_its_code(start, tmp_path):
    """FSDP2 makes a class of its own, `FSDP` + the name, in a module of torch's."""
    model = DepthVLMForConditionalGeneration.from_pretrained(start)
    cls = type(model)
    model.__class__ = type(f"FSDP{cls.__name__}", (FSDPModule, cls), {"__module__": FSDPModule.__module__})
    restore_class_name(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForImageTextToText"] == "modeling_depthvlm.DepthVLMForConditionalGeneration"
    assert saved["architectures"] == ["DepthVLMForConditionalGeneration"]
    names = {file.name for file in tmp_path.glob("*.py")}
    assert "modeling_depthvlm.py" in names and not any("fsdp" in name for name in names)


def test_fsdp2_leaves_labels_and_scale_in_float32():
    targets = SimpleNamespace(labels=[torch.ones(2, 2)], scale=torch.tensor(0.1))
    given = {"pixel_values": torch.ones(2), "depth_targets": targets}
    cast = _apply_to_tensors(lambda tensor: tensor.bfloat16(), given)  # what its `cast_forward_inputs` does
    assert cast["pixel_values"].dtype == torch.bfloat16 and cast["depth_targets"] is targets
    assert targets.labels[0].dtype == targets.scale.dtype == torch.float32


@pytest.mark.parametrize(
    "kind, answer, truth, right",
    [
        ("distance", "2.0", "2.5", True),
        ("distance", "1.8", "2.5", False),
        ("distance", "far", "2.5", False),
        ("nearer", "the red box", "the red box", True),
        ("count", "2", "12", False),
        ("point_distance", "9.9", "12", True),
        ("camera_height", "1.6", "1.5", True),
        ("camera_height", "1.7", "1.5", False),
        ("nearer_point", "A", "B", False),
    ],
)
def test_what_counts_as_right(kind, answer, truth, right):
    assert is_right(kind, answer, truth) == right


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("[st]*.yaml")))
def test_configs_parse(name, monkeypatch, tmp_path):
    """Every stage's file holds known arguments and names its launch line first; the paper's numbers are in theirs."""
    from trl import ModelConfig, TrlParser

    monkeypatch.chdir(tmp_path)
    file = ROOT / "configs" / f"{name}.yaml"
    assert file.read_text().startswith("# ") and f"train_sft.py --config configs/{name}.yaml" in file.read_text()
    parser = TrlParser((DataArguments, DepthSFTConfig, ModelConfig))
    data_args, training_args, _ = parser.parse_args_and_config(["--config", str(file), "--use_cpu", "true"])
    assert data_args.datasets and training_args.lr_scheduler_type == "cosine"
    expected = {"stage1": (3.5e-4, 0.04, 2560 / 80), "stage2": (2e-5, 0.05, 640 / 80)}.get(name)
    if expected:
        found = (training_args.learning_rate, training_args.warmup_steps, training_args.per_device_train_batch_size)
        assert found == expected and training_args.max_grad_norm == 1.0 and training_args.depth_weight == 1.0
