"""`train_sft.py` under FSDP2 without a GPU, which accelerate itself refuses: torchrun ... train_fsdp.py FILE.yaml ...

All is the real thing (accelerate's wrapping, the Trainer, checkpoints) but for the lines that make accelerate take CPUs
for devices that can be sharded over. Runs one file after the other. A rank other than the first must read no weights.
"""

# ruff: noqa: E402, I001  a script of its own: the paths come first, then the package that other imports are from

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ |= {"ACCELERATE_USE_CPU": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from trl import ModelConfig, TrlParser

import train_sft
from training.arguments import DepthSFTConfig
from training.data import DataArguments
from training.trainer import DepthSFTTrainer


class TrainerOnCPUs(DepthSFTTrainer):
    def create_accelerator_and_postprocess(self):
        del os.environ["ACCELERATE_USE_FSDP"]  # until here, for the loading of weights
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True
        self.accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate's own state does
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=True,
            state_dict_type="SHARDED_STATE_DICT",
        )


def read_no_weights(*args, **kwargs):
    raise AssertionError("a rank other than the first reads weights")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_sft.DepthSFTTrainer = TrainerOnCPUs
    if os.environ["RANK"] != "0":
        train_sft.DepthVLMForConditionalGeneration.from_pretrained = read_no_weights
    for file in sys.argv[1:]:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        parser = TrlParser((DataArguments, DepthSFTConfig, ModelConfig))
        train_sft.main(*parser.parse_args_and_config(["--config", file]))
        torch.distributed.barrier()
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    torch.distributed.destroy_process_group()
