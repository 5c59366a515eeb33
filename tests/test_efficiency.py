"""bench/efficiency.py on a tiny model: what is compared is the same computation, and taking turns is fair."""

import json

import pytest
import torch
import transformers
from tiny import tiny_config, tiny_model

from bench import efficiency
from depthvlm.modeling_depthvlm import DepthVLMDPTHead

GRID = (3, 4)


@pytest.fixture(scope="module")
def report():
    return efficiency.efficiency(tiny_config(), GRID, torch.float32, repeats=2, new_tokens=3)


def test_every_contestant_is_timed_in_every_counted_round(report):
    assert all(len(samples) == 2 and min(samples) > 0 for samples in report["seconds"].values())
    assert set(report["ratios"]) == set(efficiency.ALTERNATIVE)
    assert {*efficiency.ALTERNATIVE, *efficiency.ALTERNATIVE.values()} <= set(report["seconds"])


def test_depth_leaves_the_text_as_it_was(report):
    assert report["same_logits"] and report["same_answer"]


def test_the_two_heads_agree_in_float32(report):
    assert report["head_float32_difference"] < 1e-5


def test_the_two_heads_agree_on_a_map_with_relief():
    config = tiny_config()
    head = efficiency.random_model(config, torch.float32, "cpu").depth_head
    features = [torch.randn(2 * GRID[0] * GRID[1], config.text_config.hidden_size) for _ in range(4)]
    with torch.no_grad():
        ours, theirs = head(features, GRID), efficiency.straightforward_head(head, features, GRID)
    assert ours.shape == (2, 96, 128)
    assert ours.std() > 0.1 * ours.mean()  # else any two heads would agree
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_contestants_take_turns_and_the_warm_up_is_not_counted():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds, _ = efficiency.measure(runs, 3, "cpu")
    assert "".join(order) == "abababab"
    assert [len(samples) for samples in seconds.values()] == [3, 3]


def test_ratio_is_the_median_over_the_rounds(monkeypatch):
    # a neighbour slows the second round down tenfold, both contestants alike
    seconds = {name: [1.0, 10.0, 1.0] for name in (*efficiency.ALTERNATIVE, *efficiency.ALTERNATIVE.values())}
    seconds["head"] = [0.5, 5.0, 0.5]
    monkeypatch.setattr(efficiency, "measure", lambda runs, *_: (seconds, {name: run() for name, run in runs.items()}))
    ratios = efficiency.efficiency(tiny_config(), (1, 2), torch.float32, new_tokens=1)["ratios"]
    assert ratios == {"forward with depth": 1.0, "head": 0.5, "generate with depth": 1.0}


def test_plain_qwen3_vl_shares_every_parameter():
    model = tiny_model()
    plain = efficiency.plain_qwen3_vl(model)
    assert type(plain).__module__.startswith("transformers.") and type(plain.model).__module__.startswith(
        "transformers."
    )
    assert plain.config.image_token_id == model.config.image_token_id
    ours = dict(model.named_parameters())
    theirs = dict(plain.named_parameters())
    assert all(parameter is ours[name] for name, parameter in theirs.items())
    assert {name.split(".")[0] for name in ours.keys() - theirs.keys()} == {"depth_head"}


def test_random_model_is_of_the_dtype_finite_tied_and_has_working_buffers():
    model = efficiency.random_model(tiny_config(), torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    rows = model.lm_head.weight
    assert len(rows.unique(dim=0)) == len(rows)
    assert dict(model.named_buffers()).keys() == dict(tiny_model().named_buffers()).keys()
    for name, buffer in tiny_model().named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_sizes_are_qwen3_vl_4b():
    config = efficiency.config_4b()
    assert config.text_config.num_hidden_layers == 36 and config.vision_config.depth == 24
    assert config.vision_config.deepstack_visual_indexes == [5, 11, 17]
    assert efficiency.config_4b(3, 4).vision_config.deepstack_visual_indexes == [0, 1, 2]
    with torch.device("meta"):
        head = DepthVLMDPTHead(config)
    assert sum(parameter.numel() for parameter in head.parameters()) == pytest.approx(35.1e6, rel=2e-3)


def test_specialists_have_the_published_sizes():
    published = {"Depth Anything V2 Large": 335.3e6, "ZoeDepth": 345e6, "Depth Pro": 952e6}  # parameters
    for name, (model_class, config, size) in efficiency.specialists().items():
        with torch.device("meta"):
            model = model_class(config)
            depth = model(torch.zeros(1, 3, *size)).predicted_depth if name != "Depth Pro" else None
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(
            published.pop(name), rel=0.05
        )
        assert depth is None or depth.shape[-2:] == size
    assert not published


def test_peers_take_turns_with_ours_and_a_map_in_words_is_extrapolated(monkeypatch):
    encoder = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    encoder |= {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    config = transformers.DepthAnythingConfig(backbone_config=encoder, reassemble_hidden_size=32)
    peer = (transformers.DepthAnythingForDepthEstimation, config, (28, 42))
    monkeypatch.setattr(efficiency, "specialists", lambda: {"small": peer})
    report = efficiency.efficiency(tiny_config(), (2, 3), torch.float32, repeats=1, new_tokens=1, with_peers=True)
    assert report["alternatives"]["small"] == "forward with depth" and report["ratios"]["small"] > 0
    (a_point,) = report["seconds"]["one point in words"]
    assert report["extrapolated"] == {"a map of 96 x 64 points in words": a_point * 96 * 64}
    assert "96 x 64 points in words: " in efficiency.table(report) and "extrapolated" in efficiency.table(report)


@pytest.mark.parametrize("option", ["--repeats", "--new-tokens"])
def test_a_number_below_one_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        efficiency.main([option, "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_table_and_file(report, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(efficiency, "efficiency", lambda *args, **kwargs: report)
    efficiency.main(["--output", str(tmp_path / "report.json"), "--repeats", "2"])
    printed = capsys.readouterr().out
    assert "of straightforward head" in printed and "same answer: True" in printed
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["layers"] == 36 and saved["grid"] == [29, 39] and saved["dtype"] == "bfloat16"
    assert saved["seconds"] == report["seconds"] and saved["machine"]["torch"] == torch.__version__


def test_predict_is_timed_around_a_model_that_only_waits():
    found = efficiency.prediction_overhead(photos=3, seconds=0.01, size=(64, 48))
    assert found["photos"] == 6 and found["size"] == [64, 48]
    assert found["share_of_forwards"] == pytest.approx(found["images_per_second"] * 0.01)
    assert 0 < found["share_of_forwards"] < 1 and found["cpu_seconds_per_photo"] < 5
