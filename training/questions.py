"""Questions in training: what held-out answers are right, and whether the model still answers as before."""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from depthvlm.processing_depthvlm import DEPTH_RESPONSE, DepthVLMProcessor

from .answers import is_right
from .arguments import DepthSFTConfig
from .data import DataArguments, conversation, decode, read_sample
from .trainer import DepthSFTTrainer

RETENTION_QUESTIONS = (
    "Describe this image.",
    "How many people are there?",
    "What is the largest object made of?",
    "Is this indoors or outdoors? Answer with one word.",
    "Which colours do you see?",
    "Is there any text in this image? If so, what does it say?",
    "What would you find if you walked to the left?",
    "Write a short title for this photo.",
)


@torch.no_grad()  # not inference mode: what FSDP2 allocates now, training uses later
def generate_answers(
    model: PreTrainedModel,
    processor: DepthVLMProcessor,
    rows: list[dict],
    max_pixels: int | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to `{"image", "focal_length", "question"}`."""
    training, answers = model.training, []
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [
            processor.apply_chat_template(conversation([(row["question"], "")])[:-1], add_generation_prompt=True)
            for row in batch
        ]
        inputs = processor(
            images=[row["image"] for row in batch],
            text=prompts,
            focal_lengths=[row["focal_length"] for row in batch],
            max_pixels=max_pixels,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(training)
    return [answer.strip() for answer in answers]


def score_questions(
    model: PreTrainedModel, processor: DepthVLMProcessor, data_args: DataArguments, limit: int
) -> dict[str, float]:
    """
    Share of right answers to each kind of question, over the first `limit` rows of each held-out data set.

    Every process has to call it; each gets the answers of all.
    """
    asked = []
    for source in data_args.eval_datasets:
        for row in source.open().take(limit):
            questions = row.get("qa") or {"kind": [], "question": [], "answer": []}
            sample = {"image": decode(row["image"], source.root), "focal_length": row["fx"]}
            for kind, question, answer in zip(*(questions[k] for k in ("kind", "question", "answer")), strict=True):
                asked.append((kind, answer, sample | {"question": question}))
    samples = [sample for *_, sample in asked]
    if isinstance(model, FSDPModule):  # its processes run in step, so each answers everything
        answers = generate_answers(model, processor, samples, data_args.max_pixels)
    else:
        with PartialState().split_between_processes(samples) as own:
            answers = gather_object(generate_answers(model, processor, own, data_args.max_pixels))
    right = {}
    for (kind, truth, _), answer in zip(asked, answers, strict=True):
        right.setdefault(kind, []).append(is_right(kind, answer, truth))
    right["all"] = [value for values in right.values() for value in values]
    return {f"questions_{kind}": sum(values) / len(values) for kind, values in right.items() if values}


class RetentionWatch(TrainerCallback):
    """
    Asks fixed questions about the first held-out images, before training and every so many steps, and logs

    - `canned_depth_replies`: the share of answers that are the depth prompt's;
    - `base_agreement`: the share of answers that are what they were before training.
    """

    def __init__(self, trainer: DepthSFTTrainer, data_args: DataArguments, every: int, limit: int = 8) -> None:
        self.trainer, self.every, self.max_pixels = trainer, every, data_args.max_pixels
        self.rows = []
        for source in data_args.eval_datasets:
            for row, question in zip(source.open().take(limit), itertools.cycle(RETENTION_QUESTIONS), strict=False):
                asked = (row.get("qa") or {}).get("question") or [question]
                sample = read_sample(row, source, np.random.default_rng(0))
                if sample["images"]:
                    image, focal_length = sample["images"][0], sample["focal_lengths"][0]
                    self.rows.append({"image": image, "focal_length": focal_length, "question": asked[0]})
        if not self.rows:
            raise ValueError(f"retention_steps is {every} but eval_datasets holds no image to ask about; add one")

    def answers(self) -> list[str]:
        core = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return generate_answers(core, self.trainer.processing_class, self.rows, self.max_pixels)

    def on_train_begin(self, args: DepthSFTConfig, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        stored = Path(args.output_dir) / "base_answers.json"
        if state.global_step and stored.exists():
            self.base = json.loads(stored.read_text())
            return
        self.base = self.answers()
        if args.should_save:
            stored.write_text(json.dumps(self.base, indent=1))

    def on_step_end(self, args: DepthSFTConfig, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step % self.every:
            return
        answers = self.answers()
        canned = sum(answer == DEPTH_RESPONSE for answer in answers)
        kept = sum(answer == base for answer, base in zip(answers, self.base, strict=True))
        metrics = self.trainer._metrics["train"]
        metrics["canned_depth_replies"].append(canned / len(answers))
        metrics["base_agreement"].append(kept / len(answers))
