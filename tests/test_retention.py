"""`bench retention`: shares by hand, both ways to load a base, and what cannot be compared."""

import argparse
import json

import pytest
from PIL import Image
from test_train_script import start  # noqa: F401
from tiny import TOKENS, plain_qwen

from bench import retention
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DEPTH_RESPONSE
from training.questions import RETENTION_QUESTIONS


def parse(*argv):
    parser = argparse.ArgumentParser()
    retention.add_retention(parser.add_subparsers())
    return parser.parse_args(["retention", *map(str, argv)])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 48), colour).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("not a photo")
    return folder


def test_shares():
    """Of five pairs one is equal to the letter and one more but for its writing; two tuned answers are canned."""
    pairs = [
        ("A red box.", "A red box."),
        ("Indoors", " indoors. "),
        ("2", DEPTH_RESPONSE),
        ("", DEPTH_RESPONSE.lower().rstrip(".")),
        ("no", "yes"),
    ]
    assert retention.scores(pairs) == {
        "canned_base": 0,
        "canned_tuned": 0.4,
        "agreement_exact": 0.2,
        "agreement_normalised": 0.4,
    }


def test_depthvlm_and_its_plain_qwen_agree(start, photos, tmp_path, capsys):  # noqa: F811
    """A Qwen3-VL with the same weights gives the same words: all of them agree, and the record holds every one."""
    plain = tmp_path / "plain"
    model = DepthVLMForConditionalGeneration.from_pretrained(start)
    qwen = plain_qwen(model)
    for name in TOKENS:  # the fixture's are another tokenizer's
        setattr(qwen.config, name, getattr(model.config, name))
    qwen.save_pretrained(plain)
    out = tmp_path / "deep" / "retention.json"
    options = ("--base", plain, "--tuned", start, "--data", photos, photos / "0.png")
    args = parse(*options, "--limit", 2, "--max-new-tokens", 3, "--out", out)
    assert args.run(args) == 0
    record = json.loads(out.read_text())
    assert record["questions"] == len(record["answers"]) == 3 * len(RETENTION_QUESTIONS)
    assert record["agreement_exact"] == record["agreement_normalised"] == 1
    assert record["canned_base"] == record["canned_tuned"] == 0
    assert [answer["photo"] for answer in record["answers"][:: len(RETENTION_QUESTIONS)]] == [
        str(photos / name) for name in ("0.png", "1.png", "0.png")
    ]
    assert "100.0% to the letter" in capsys.readouterr().out


def test_a_model_of_one_answer_is_told(start, photos, monkeypatch):  # noqa: F811
    def ask(checkpoint, processor, rows, max_new_tokens, device):
        return [DEPTH_RESPONSE if checkpoint == start else row["question"] for row in rows]

    monkeypatch.setattr(retention, "ask", ask)
    monkeypatch.setattr(retention, "check_same_tokens", lambda base, tuned: None)
    record = retention.compare("base", start, retention.read_photos(photos, 1))
    assert (record["canned_base"], record["canned_tuned"], record["agreement_exact"]) == (0, 1, 0)


def test_built_data_is_read_with_its_focal_lengths(tmp_path):
    from bench.ablate import build_data

    rows = retention.read_photos(build_data(tmp_path, 3, 1) / "procedural", 5)
    assert len(rows) == 1  # the held-out one
    name, photo, focal_length = rows[0]
    assert name.startswith("procedural/test/") and photo.size[0] > 100 and 50 < focal_length < 1000


def test_refusals(start, photos, tmp_path):  # noqa: F811
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="does not exist"):
        retention.read_photos(tmp_path / "nowhere", 1)
    with pytest.raises(ValueError, match="neither .* nor shards of `bench build`"):
        retention.read_photos(empty, 1)
    (empty / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a 'llama'; pass a Qwen3-VL"):
        retention.compare(str(empty), start, [])
    config = {"model_type": "qwen3_vl", "text_config": {"vocab_size": 7}, "image_token_id": 3}
    (empty / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\(7, 3\).*pass the base that the tuned"):
        retention.compare(str(empty), start, [])
