"""`bench/efficiency.py --train` compares two ways of one computation."""

import torch
from tiny import tiny_config

from bench.efficiency import training_efficiency


def test_both_steps_have_the_same_loss_and_gradients():
    report = training_efficiency(tiny_config(), (2, 3), images=2, dtype=torch.float32, repeats=1)
    assert report["loss_difference"] < 1e-6 and report["gradient_difference"] < 1e-5
    assert set(report["seconds"]) == set(report["peak_bytes"]) == {"straightforward stage-1 step", "stage-1 step"}
    assert report["ratios"]["stage-1 step"] > 0
