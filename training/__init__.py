"""Training of DepthVLM: data, losses, trainer, questions. The command is train_sft.py."""
