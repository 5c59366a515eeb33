"""Trains DepthVLM with TRL: the paper's two stages, or any other, are sets of flags in a YAML file.

    accelerate launch --config_file configs/fsdp2.yaml train_sft.py --config configs/stage1.yaml
    accelerate launch --config_file configs/fsdp2.yaml train_sft.py --config configs/stage2.yaml
    python train_sft.py --config configs/stage1.yaml --dry_run 80    # data, batches and memory of 80 processes
    python train_sft.py --config configs/tiny_stage1.yaml            # on a CPU

Stage 1 trains the depth head alone, with SILog; stage 2 the language model too, with cross-entropy on the answers +
`depth_weight` * SILog, both from one pass. `--help` lists every flag; flags win over the file.
"""

import tempfile
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig
from transformers.initialization import no_init_weights
from transformers.integrations import is_fsdp_enabled
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor
from training.arguments import DepthSFTConfig, freeze
from training.checkpoints import last_checkpoint, merge_adapters, register_code, save_example
from training.data import DataArguments
from training.encoding import Collator, Encoder
from training.held_out import EvalSamples
from training.plan import dry_run, set_length, shares, warnings
from training.questions import RetentionWatch, score_questions
from training.stream import TrainingStream
from training.trainer import DepthSFTTrainer, EpochCallback

logger = logging.get_logger(__name__)


def peft_config(model_args: ModelConfig, trains: list[str]) -> PeftConfig | None:
    """LoRA on the LLM's linear layers where nothing else is asked for; the depth head is trained whole."""
    if model_args.use_peft:
        if "language_model" not in trains:
            raise ValueError(f"use_peft puts adapters on the LLM, which trains ({', '.join(trains)}) lacks; add it")
        if others := set(trains) - {"language_model", "depth_head"}:
            raise ValueError(f"trains names {', '.join(sorted(others))}, which adapters leave frozen; leave it out")
        model_args.lora_target_modules = model_args.lora_target_modules or r".*language_model.*_proj"
        if "depth_head" in trains:
            model_args.lora_modules_to_save = model_args.lora_modules_to_save or ["depth_head"]
    return get_peft_config(model_args)


def quantization(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """4 bits for the language model's linear layers, in which adapters are trained (QLoRA)."""
    if model_args.load_in_8bit:
        raise ValueError("load_in_8bit is not supported; use load_in_4bit")
    if model_args.load_in_4bit and not model_args.use_peft:
        raise ValueError("load_in_4bit is set, but 4-bit weights cannot be trained themselves; set use_peft too")
    config = get_quantization_config(model_args)
    if config is not None:
        config.llm_int8_skip_modules = ["model.visual", "depth_head", "lm_head"]  # bitsandbytes' name, of 4 bits too
    return config


def load_model(model_args: ModelConfig) -> tuple[DepthVLMForConditionalGeneration, DepthVLMProcessor]:
    register_code()
    path, dtype = model_args.model_name_or_path, model_args.dtype or "float32"
    hub, options = {"revision": model_args.model_revision}, {"attn_implementation": model_args.attn_implementation}
    if is_fsdp_enabled() and torch.distributed.get_rank():  # rank 0 reads the weights and sends the others theirs
        config = DepthVLMConfig.from_pretrained(path, **hub)
        options["dtype"] = config.dtype if dtype == "auto" else getattr(torch, dtype)
        with no_init_weights():
            model = DepthVLMForConditionalGeneration._from_config(config, **options)
        model.tie_weights()
    else:
        model = DepthVLMForConditionalGeneration.from_pretrained(
            path, dtype=dtype, quantization_config=quantization(model_args), **hub, **options
        )
    (model.generation_config,) = broadcast_object_list([model.generation_config])
    return model, DepthVLMProcessor.from_pretrained(path, trust_remote_code=False, **hub)


def save(trainer: DepthSFTTrainer, model_args: ModelConfig) -> None:
    """A complete repository of weights, processor, code and card; adapters are merged into the base."""
    args, output = trainer.args, Path(trainer.args.output_dir)
    save_example(trainer.model, trainer.processing_class, output, args.should_save)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if isinstance(trainer.model, PeftModel):
        with tempfile.TemporaryDirectory() as adapters:
            trainer.save_model(adapters, _internal_call=True)
            trainer.is_fsdp_enabled = False
            if args.should_save:
                trainer.model = merge_adapters(model_args, adapters)
                for file in output.glob("adapter_*"):  # pushed from a checkpoint: they are merged now
                    file.unlink()
    if args.save_dtype:
        trainer.model.to(getattr(torch, args.save_dtype))
    trainer.save_model(_internal_call=True)
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()


def main(data_args: DataArguments, training_args: DepthSFTConfig, model_args: ModelConfig) -> None:
    adapters = peft_config(model_args, training_args.trains)
    if training_args.dry_run is not None:
        return dry_run(data_args, training_args, model_args, adapters)
    output = Path(training_args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    # Model
    checkpoint = training_args.resume_from_checkpoint
    written = "trainer_state.json" if training_args.save_only_model else "data_position_0.json"
    if not checkpoint and list(output.glob(f"checkpoint-*/{written}")):
        raise ValueError(
            f"{output} holds checkpoints of an earlier run; go on with --resume_from_checkpoint last, or remove them"
        )
    model, processor = load_model(model_args)
    freeze(model, training_args.trains)

    # Data
    rank, world_size = training_args.process_index, training_args.world_size
    encoder, log = Encoder(processor, training_args.max_length), output / "unreadable.jsonl"
    batch_size = training_args.per_device_train_batch_size
    train_dataset = TrainingStream(data_args, training_args.seed, rank, world_size, log, encoder, batch_size)
    eval_dataset = EvalSamples(data_args, encoder, log) if data_args.eval_datasets else None

    # Plan
    mix = shares(train_dataset)
    set_length(training_args, mix)
    for sentence in warnings(data_args, training_args, mix):
        logger.warning(sentence)

    # Training
    trainer = DepthSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator(processor),
        processing_class=processor,
        peft_config=adapters,
        rows={share.label: share.rows for share in mix},
        callbacks=[EpochCallback(sum(share.rows for share in mix))],
    )
    if training_args.retention_steps:
        trainer.add_callback(RetentionWatch(trainer, data_args, training_args.retention_steps))
    trainer.train(resume_from_checkpoint=last_checkpoint(output) if checkpoint == "last" else checkpoint)

    # Evaluation
    if eval_dataset:
        trainer.save_metrics("eval", metrics := trainer.evaluate())
        trainer.log_metrics("eval", metrics)
    if training_args.eval_questions:
        core = trainer.accelerator.unwrap_model(trainer.model)
        metrics = score_questions(core, processor, data_args, training_args.eval_questions)
        trainer.log_metrics("questions", metrics)
        trainer.save_metrics("questions", metrics)

    save(trainer, model_args)


if __name__ == "__main__":
    parser = TrlParser((DataArguments, DepthSFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
