"""What a run leaves behind: cards, code, merged adapters, what can be resumed; and in which dtype it trains."""

import copy
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from fixed_batches import STAGE2, make_batch, make_trainer
from huggingface_hub import ModelCard
from peft import LoraConfig
from test_train_script import arguments, data, run_here, start  # noqa: F401
from tiny import tiny_model
from transformers import Trainer
from transformers.utils import logging as transformers_logging

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from training.checkpoints import last_checkpoint

HEAD_ONLY = {"trains": ["depth_head"], "dataloader_num_workers": 0, "max_steps": 2}


@pytest.fixture(scope="module")
def run(start, data, tmp_path_factory):  # noqa: F811
    """Folder of a finished run of the depth head with held-out rows from two data sets."""
    output = tmp_path_factory.mktemp("run") / "tuned"
    eval_datasets = [{"path": data, "label": "indoors"}, {"path": data, "label": "outdoors"}]
    settings = arguments(start, data, output, **HEAD_ONLY, eval_datasets=eval_datasets, max_eval_samples=3)
    run_here(settings | {"datasets": [{"path": data, "label": "rooms"}, {"path": data, "label": "streets"}]})
    return output


def test_card(run, start):  # noqa: F811
    """It names base, data, stage and metrics, the same as the evaluation's file, and shows a depth map."""
    card = ModelCard.load(run / "README.md", ignore_metadata_errors=False)
    metrics = json.loads((run / "eval_results.json").read_text())
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert results == {
        (name, metric): round(metrics[f"eval_{metric}/{name}"], 4)
        for metric in ("delta1", "abs_rel")
        for name in ("indoors", "outdoors")
    }
    assert card.data.pipeline_tag == "depth-estimation" and card.data.model_name == "tuned"
    assert f"Trained from `{Path(start).name}`" in card.text and str(Path(start).parent) not in card.text
    assert "training the depth head alone" in card.text and "2 of 2 steps of 2 samples" in card.text
    epochs = re.findall(r"\| (?:rooms|streets) \| depth \| 1.0 \| 24 \| ([\d.]+) \|", card.text)
    assert sum(map(float, epochs)) == pytest.approx(4 / 24, abs=1e-3) and len(epochs) == 2
    assert "![its depth](depth_example.png)" in card.text
    assert (run / "depth_example.png").stat().st_size > 5000 and (run / "depth_example_photo.jpg").exists()
    of_checkpoint = (run / "checkpoint-2" / "README.md").read_text()
    assert "Of the last training steps" in of_checkpoint and "depth_example" not in of_checkpoint


def test_every_push_holds_the_code(start, data, tmp_path, monkeypatch):  # noqa: F811
    """What lies in the run's folder when Trainer uploads it, at a checkpoint of adapters and at the end."""
    uploaded = []

    def push(trainer, *args, **kwargs):
        uploaded.append({file.name for file in Path(trainer.args.output_dir).glob("*.*")})

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "push_to_hub", push)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer: None)
    settings = arguments(start, data, tmp_path / "pushed", push_to_hub=True, max_steps=2, dataloader_num_workers=0)
    run_here(settings | {"trains": ["language_model", "depth_head"]}, peft=True)
    files = {"config.json", "modeling_depthvlm.py", "processing_depthvlm.py", "configuration_depthvlm.py", "README.md"}
    assert len(uploaded) == 2 and all(files <= names for names in uploaded)
    assert "model.safetensors" in uploaded[1]


def test_losses_of_an_evaluation_are_those_of_its_data_sets(run):
    metrics = json.loads((run / "eval_results.json").read_text())
    assert metrics["eval_depth_share/indoors"] == metrics["eval_depth_share/outdoors"] == 0.5
    for name in ("delta1", "abs_rel", "depth_loss"):
        parts = [metrics[f"eval_{name}/{label}"] for label in ("indoors", "outdoors")]
        assert sum(parts) / 2 == pytest.approx(metrics[f"eval_{name}"], abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_each_held_out_row_counts_once(tmp_path, batch_size, monkeypatch):
    """Three rows on one rank, and the same on each of two ranks whose sums are added: no row is counted again."""
    grids = [[(2, 3)], [(2, 2), (1, 2)], [(3, 2)]]
    rows = [make_batch([grid], labelled=tuple(range(len(grid))), seed=i) for i, grid in enumerate(grids)]
    samples = [{"images": row["depth_labels"], "depth_labels": row["depth_labels"], "row": row} for row in rows]

    def collate(samples):
        """One row after another, padded."""
        rows = [copy.deepcopy(sample["row"]) for sample in samples]
        width = max(row["input_ids"].shape[1] for row in rows)
        padding = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "labels": -100}
        batch = {
            name: torch.cat(
                [torch.nn.functional.pad(row[name], (0, width - row[name].shape[1]), value=value) for row in rows]
            )
            for name, value in padding.items()
        }
        batch |= {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "image_grid_thw")}
        lists = ("depth_labels", "row_sets", "image_sets")
        return batch | {name: [value for row in rows for value in row[name]] for name in lists}

    def sums(rank, ranks, size):
        trainer, _ = make_trainer(tiny_model(), [rows[0]], tmp_path, STAGE2, per_device_eval_batch_size=size)
        trainer.data_collator, trainer.eval_dataset = collate, samples
        monkeypatch.setattr(type(trainer.args), "process_index", rank)
        monkeypatch.setattr(type(trainer.args), "world_size", ranks)
        loader = trainer.get_eval_dataloader()
        monkeypatch.undo()
        trainer.model.eval()
        for batch in loader:
            trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
        return trainer.sums["eval"], len(loader)

    whole, _ = sums(0, 1, 3)
    parts, batches = zip(*(sums(rank, 2, batch_size) for rank in (0, 1)), strict=True)
    assert batches[0] == batches[1]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-5)


def test_resume_true_goes_on_with_the_last_checkpoint(run, start, data, tmp_path):  # noqa: F811
    output = tmp_path / "again"
    shutil.copytree(run, output)
    (output / "model.safetensors").unlink()
    settings = arguments(start, data, output, **HEAD_ONLY)
    settings["datasets"] = [{"path": data, "label": "rooms"}, {"path": data, "label": "streets"}]
    run_here(settings | {"resume_from_checkpoint": "true", "max_steps": 3})
    state = json.loads((last_checkpoint(output) / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and [entry["step"] for entry in state["log_history"] if "loss" in entry] == [
        1,
        2,
        3,
    ]


def test_a_run_goes_on_with_another_number_of_workers(run, start, data, tmp_path):  # noqa: F811
    """Through the Trainer, from what its checkpoint keeps: the counts of rows go on."""
    output = tmp_path / "again"
    shutil.copytree(run, output)
    settings = arguments(start, data, output, **HEAD_ONLY | {"max_steps": 4, "dataloader_num_workers": 2})
    settings["datasets"] = [{"path": data, "label": "rooms"}, {"path": data, "label": "streets"}]
    run_here(settings | {"resume_from_checkpoint": "last"})
    history = json.loads((last_checkpoint(output) / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    read = [24 * (entry["epochs/rooms"] + entry["epochs/streets"]) for entry in logged]
    assert read == pytest.approx([2, 4, 6, 8], abs=0.01)  # two rows per step, before and after


def test_weights_alone_are_no_checkpoint_to_resume_from(start, data, tmp_path):  # noqa: F811
    output = tmp_path / "weights"
    settings = arguments(start, data, output, **HEAD_ONLY, save_only_model=True)
    run_here(settings)
    DepthVLMForConditionalGeneration.from_pretrained(output / "checkpoint-2")
    with pytest.raises(ValueError, match="holds no complete checkpoint to resume from"):
        run_here(settings | {"resume_from_checkpoint": "last"})
    with pytest.raises(
        ValueError, match="no checkpoint to resume from .save_only_model, .*model_name_or_path set to it"
    ):
        run_here(settings | {"resume_from_checkpoint": str(output / "checkpoint-2")})
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run_here(settings)


# Dtypes


def dtypes(model) -> dict[bool, set]:
    """Whether trained -> dtypes."""
    return {
        trained: {parameter.dtype for parameter in model.parameters() if parameter.requires_grad == trained}
        for trained in (True, False)
    }


def test_adapters_and_head_are_float32_over_a_bfloat16_base(tmp_path, caplog):
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["depth_head"])
    model = tiny_model().bfloat16()
    head = {name: value.clone() for name, value in model.depth_head.named_parameters()}
    transformers_logging.enable_propagation()
    trainer, _ = make_trainer(model, [make_batch([[(2, 3)]], (0,))], tmp_path, STAGE2, config, bf16=True)
    assert dtypes(trainer.model)[True] == {torch.float32}
    assert torch.bfloat16 in dtypes(trainer.model)[False]
    trainer.train()
    after = dict(trainer.model.named_parameters())
    names = [f"base_model.model.depth_head.modules_to_save.default.{name}" for name in head]
    assert all(after[name].dtype == torch.float32 for name in names)
    assert any((after[name] != after[name].bfloat16()).any() for name in names)  # finer than bfloat16 tells
    assert "rounds small updates away" not in caplog.text


@pytest.mark.parametrize("dtype, warns", [(torch.bfloat16, True), (torch.float32, False)])
def test_full_training_in_bfloat16_is_warned_of(tmp_path, caplog, dtype, warns):
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        trainer, _ = make_trainer(tiny_model().to(dtype), [make_batch([[(2, 3)]], (0,))], tmp_path, STAGE2)
    assert ("weights are trained in torch.bfloat16, which rounds small updates away" in caplog.text) == warns
    assert {parameter.dtype for parameter in trainer.model.depth_head.parameters()} == {torch.float32}


def test_4_bits_need_adapters(start, data, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="4-bit weights cannot be trained themselves; set use_peft too"):
        run_here(arguments(start, data, tmp_path / "out", load_in_4bit=True))
    with pytest.raises(ValueError, match="load_in_8bit is not supported; use load_in_4bit"):
        run_here(arguments(start, data, tmp_path / "out", load_in_8bit=True))


def test_4_bit_base_ends_merged_in_its_own_dtype(start, data, tmp_path, monkeypatch):  # noqa: F811
    """The LLM's linear layers are in 4 bits while it trains; saved are the base from disk and what was learnt."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    trained = {}
    finish = Trainer.train

    def train(trainer, *args, **kwargs):
        core = trainer.model.get_base_model()
        trained["kinds"] = {
            name.split(".")[1 if name.startswith("model.") else 0]
            for name, module in core.named_modules()
            if isinstance(module, bitsandbytes.nn.Linear4bit)
        }
        trained["dtypes"] = dtypes(trainer.model)[True]
        trained["head"] = copy.deepcopy(core.depth_head.modules_to_save["default"].state_dict())
        return finish(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train)
    settings = arguments(start, data, tmp_path / "out", load_in_4bit=True, dtype="bfloat16", learning_rate=0.0)
    settings |= {"trains": ["language_model", "depth_head"], "max_steps": 1, "dataloader_num_workers": 0}
    run_here(settings | {"bf16": True}, peft=True)
    assert trained["kinds"] == {"language_model"} and trained["dtypes"] == {torch.float32}
    before, after = (
        DepthVLMForConditionalGeneration.from_pretrained(folder, dtype="bfloat16").state_dict()
        for folder in (start, tmp_path / "out")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)  # nothing was learnt, and nothing lost
    base = DepthVLMForConditionalGeneration.from_pretrained(start, dtype="bfloat16").depth_head.float().state_dict()
    assert all(torch.equal(base[name], trained["head"][name]) for name in base)
