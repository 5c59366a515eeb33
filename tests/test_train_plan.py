"""What is known of a run before it starts: batches, lengths, warnings, memory, `--dry_run`; and refused arguments."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from test_train_data import make_row, write
from test_train_script import arguments, data, run_here, start  # noqa: F401
from tiny import tiny_config, tiny_model
from trl import ModelConfig, TrlParser

from training import memory, plan
from training.arguments import DepthSFTConfig
from training.data import DataArguments
from training.plan import Share
from training.stream import TrainingStream
from training.trainer import DepthSFTTrainer

ROOT = Path(__file__).resolve().parent.parent


def parse(*flags):
    parser = TrlParser((DataArguments, DepthSFTConfig, ModelConfig))
    return parser.parse_args_and_config([*map(str, flags), "--use_cpu", "true"])


@pytest.mark.parametrize("stage, whole, at_once", [("stage1", 2560, 32), ("stage2", 640, 8)])
@pytest.mark.parametrize("processes", [1, 3, 8, 80])
def test_the_papers_batch_or_a_refusal(stage, whole, at_once, processes, tmp_path):
    flags = "--config", ROOT / "configs" / f"{stage}.yaml", "--output_dir", tmp_path, "--dry_run", processes
    if processes == 3:
        with pytest.raises(ValueError, match=rf"{whole}, which is not a multiple of 3 processes .* = {3 * at_once};"):
            parse(*flags)
        return
    _, training_args, _ = parse(*flags)
    assert training_args.gradient_accumulation_steps == whole // processes // at_once
    assert training_args.samples_per_step == whole and training_args.save_total_limit == 2


def test_a_batch_that_is_smaller_than_one_micro_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="global_batch_size is 8, .* = 16; .* or set global_batch_size to 16 or"):
        parse("--output_dir", tmp_path, "--global_batch_size", 8, "--per_device_train_batch_size", 16)
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 3, .* make it 2; leave one of them out"):
        flags = "--global_batch_size", 8, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 3
        parse("--output_dir", tmp_path, *flags)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (("--label_smoothing_factor", 0.1), "label_smoothing_factor is 0.1, but it needs the logits"),
        (("--assistant_only_loss", "true"), "assistant_only_loss is True, but the loss is always over"),
        (("--completion_only_loss", "true"), "completion_only_loss is True, but the loss is always over"),
        (("--auto_find_batch_size", "true"), "auto_find_batch_size is True, but it would change the global batch"),
        (("--loss_type", "dft"), "loss_type is 'dft', but lm_loss is"),
        (("--depth_losses", '{"berhu": 1.0}'), "depth_losses names berhu; the terms are silog, gradient_matching"),
        (("--max_steps", 5, "--num_train_epochs", 1), "each sets the length of the run"),
    ],
)
def test_arguments_without_effect_are_refused(tmp_path, flags, reason):
    with pytest.raises(ValueError, match=reason):
        parse("--output_dir", tmp_path, *flags)


def test_length_of_a_run(tmp_path):
    """Steps from epochs; passes over each data set from its share of the samples, by equal sets or by rows."""
    small, large = (
        write(tmp_path / name, [make_row(i) for i in range(rows)]) for name, rows in (("small", 8), ("large", 24))
    )
    flags = "--output_dir", tmp_path, "--num_train_epochs", 3, "--global_batch_size", 16
    for sampling, passes in (("sets", [6, 2]), ("rows", [3, 3])):
        data_args = DataArguments(datasets=[{"path": small}, {"path": large}], sampling=sampling)
        _, training_args, _ = parse(*flags, "--per_device_train_batch_size", 4)
        mix = plan.shares(TrainingStream(data_args, 0))
        plan.set_length(training_args, mix)
        assert training_args.max_steps == 3 * 32 / 16
        assert [share.passes for share in mix] == passes and [share.rows for share in mix] == [8, 24]
    _, training_args, _ = parse("--output_dir", tmp_path)
    with pytest.raises(ValueError, match="neither max_steps nor num_train_epochs"):
        plan.set_length(training_args, mix)


def test_epochs_are_logged_by_what_was_read(start, data, tmp_path):  # noqa: F811
    """24 rows from each of two data sets, 24 samples a pass over one of them: each ends near one epoch."""
    import json

    output = tmp_path / "epochs"
    settings = arguments(start, data, output, num_train_epochs=1.0, global_batch_size=4, save_steps=6)
    settings |= {"trains": ["depth_head"], "max_steps": -1, "dataloader_num_workers": 0}
    settings["datasets"] = [{"path": data, "label": "first"}, {"path": data, "label": "second"}]
    run_here(settings)
    state = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())
    (last,) = (entry for entry in state["log_history"] if entry["step"] == 12 and "loss" in entry)
    assert state["global_step"] == state["max_steps"] == 12 and last["epoch"] == 1.0
    assert last["epochs/first"] + last["epochs/second"] == pytest.approx(2.0, abs=1e-3)
    assert last["epochs/first"] == pytest.approx(1.0, abs=0.1)  # batches are by length, which no data set leads


def test_warnings(tmp_path):
    data_args = DataArguments(datasets=[{"path": "few"}, {"path": "many"}])
    _, training_args, _ = parse("--output_dir", tmp_path, "--max_steps", 100, "--dry_run", 2, "--trains", "depth_head")
    training_args.dataloader_num_workers = 4
    mix = [Share("few", 100, 7, 0.5, 4.5), Share("many", 1000, 8, 0.5, 0.9)]
    first, second = plan.warnings(data_args, training_args, mix)
    assert first.startswith("few has 7 blocks") and "8 readers (2 processes x 4 workers)" in first
    assert second.startswith("each row of few is seen 4.5 times")
    training_args.trains = ["language_model", "depth_head"]
    assert plan.warnings(data_args, training_args, mix)[2] == plan.NO_INSTRUCTIONS


def test_activations_are_those_that_autograd_keeps():
    """Of a whole model in bfloat16 beside the sum of its parts; embeddings and M-RoPE make the difference."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 400}
    model = tiny_model(text_config=wide, vision_config={"out_hidden_size": 256}).bfloat16()
    states = torch.randn(2, 100, 256, dtype=torch.bfloat16, requires_grad=True)
    real = memory.saved_bytes(model.model.language_model, inputs_embeds=states, use_cache=False)
    with torch.device("meta"):
        empty = type(model)(model.config).bfloat16()
    per_token = memory.activations_per_token(empty)
    assert per_token["layer"] * 200 * 6 == pytest.approx(real, rel=0.1)
    features = [torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True) for _ in range(4)]
    real = memory.saved_bytes(model.depth_head, features, (8, 8))
    assert per_token["head"] * 64 == pytest.approx(real, rel=0.15)


def test_memory_by_shapes(tmp_path):
    """Weights, gradients and AdamW's two moments in float32, divided by the ranks under FSDP2."""
    _, training_args, model_args = parse(
        "--output_dir", tmp_path, "--dry_run", 4, "--trains", "language_model", "lm_head", "depth_head", "--bf16", "0"
    )
    model = tiny_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = total - sum(parameter.numel() for parameter in model.model.visual.parameters())
    ddp, fsdp = memory.memory_per_rank(tiny_config(), training_args, model_args, None, 64, 32, 16)
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (4 * total, 4 * trained, 8 * trained)
    assert (fsdp.gradients, fsdp.optimizer) == (trained, 2 * trained)
    assert ddp.checkpoint == 4 * total + 8 * trained and fsdp.checkpoint == 12 * trained
    assert ddp.activations < ddp.other_activations  # with and without checkpointing


def test_dry_run(start, data, tmp_path, capsys):  # noqa: F811
    """From a repository without weights: numbers, conversations in pieces, pictures, warnings; nothing else is made."""
    bare = tmp_path / "bare"
    shutil.copytree(start, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    output = tmp_path / "out"
    settings = arguments(str(bare), data, output, max_steps=30, global_batch_size=24, per_device_train_batch_size=4)
    run_here(settings | {"dry_run": 3, "device_memory": 1e-3})
    text = capsys.readouterr().out
    assert "global batch 24 = 3 processes x 4 x 2 micro-batches; 30 steps, 720 samples, 15.00 epochs of 48 rows" in text
    assert "tokens per sample: median" in text and "prompt | '<|im_start|>system" in text
    assert "answer | 'OK, I will estimate the depth map of this image.<|im_end|>'" in text
    warned = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert sum("for 6 readers (3 processes x 2 workers)" in line for line in warned) == 2
    assert sum("is seen 15.0 times" in line for line in warned) == 2
    assert sum("the device has 0.0" in line for line in warned) == 2
    pictures = list((output / "dry_run").iterdir())
    assert pictures and not (output / "config.json").exists()
    assert np.asarray(Image.open(pictures[0]).convert("RGB")).std() > 10


def test_dry_run_of_the_papers_mix(tmp_path, capsys):
    """4.44 million rows in 8 data sets and 5240 shards, most of them one file under many names."""
    counts = {"scannetpp": 800, "taskonomy": 800, "hm3d": 800, "matterport3d": 158}
    counts |= {"argoverse2": 800, "waymo": 800, "ddad": 76, "nuscenes": 206}
    folder = Path(write(tmp_path / "one", [make_row(i) for i in range(4)], shards=1))
    table = pq.read_table(next(folder.rglob("*.parquet")))
    shard = tmp_path / "shard.parquet"
    pq.write_table(table.take([i % 4 for i in range(1000)]), shard, row_group_size=500)
    card = ["---", "configs:"]
    for name, shards in counts.items():
        (tmp_path / "index" / name).mkdir(parents=True)
        for number in range(shards):
            os.link(shard, tmp_path / "index" / name / f"train-{number:05d}-of-{shards:05d}.parquet")
        card += [f"- config_name: {name}", "  data_files:", f"  - {{split: train, path: {name}/train-*.parquet}}"]
    (tmp_path / "index" / "README.md").write_text("\n".join([*card, "---", ""]))
    settings = yaml.safe_load((ROOT / "configs" / "stage1.yaml").read_text())
    settings |= {"model_name_or_path": str(ROOT), "output_dir": str(tmp_path / "out"), "dry_run": 8}
    settings["datasets"] = [source | {"path": str(tmp_path / "index")} for source in settings["datasets"]]
    run_here(settings)
    text = capsys.readouterr().out
    assert "1,719 steps, 4,400,640 samples, 0.99 epochs of 4,440,000 rows" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:9]}
    assert {name: row[0] for name, row in rows.items()} == {name: f"{n * 1000:,}" for name, n in counts.items()}
    assert {row[-1] for row in rows.values()} == {"0.99"}


def judged(counts, limit=0.01) -> dict[str, tuple]:
    trainer = DepthSFTTrainer.__new__(DepthSFTTrainer)
    trainer.train_dataset = type("Stream", (), {"arguments": DataArguments(max_bad_share=limit), "log": "the log"})
    trainer.set_names = {"train": ["a", "b"]}
    trainer.judge_refused_rows(counts)
    return trainer.refused_rows


def test_refused_rows_are_judged_by_the_sums_over_all_ranks():
    assert judged([(60, 6), (39, 3)]) == {"a": (60, 6), "b": (39, 3)}  # too few to tell
    assert judged([(600, 6), (400, 4)])
    with pytest.raises(ValueError, match=r"11 of 1000 rows cannot be used \(a 7 of 600, b 4 of 400\), more than"):
        judged([(600, 7), (400, 4)])


def test_a_tenth_of_the_limit_does_not_stop_64_workers():
    """A true share of 0.1 % at a limit of 1 %: one worker in a few looks worse, their sum never does."""
    draw = np.random.default_rng(0)
    alone = 0
    for _ in range(50):
        refused = draw.random((64, 40, 16)) < 0.001  # workers, updates, rows of each
        sums = refused.sum(2).cumsum(1)
        alone += (sums[:, 7:] > 0.01 * 16 * np.arange(8, 41)).any()
        for update, total in enumerate(sums.sum(0), start=1):
            judged([(64 * 16 * update, total), (0, 0)])
    assert alone > 25  # of 50 runs that each worker would have stopped on its own
