"""The contestant that asks a DepthVLM in words: which question each point becomes, and what its replies count as."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.contestants import depthvlm_words
from bench.contestants._base import Query
from depthvlm.processing_depthvlm import DepthVLMProcessor

ROOT = Path(__file__).resolve().parent.parent


def test_each_point_is_asked_about_at_its_place(monkeypatch):
    """The pixel that holds the stated per cents is at most half a per cent of the side and a pixel away."""
    asked = []

    def reply(model, processor, rows, **_):
        asked.extend(rows)
        return [str(index) for index in range(len(rows) - 1)] + ["no idea"]

    monkeypatch.setattr(depthvlm_words, "generate_answers", reply)
    contestant = depthvlm_words.DepthVLMWords.__new__(depthvlm_words.DepthVLMWords)
    contestant.model = contestant.processor = None
    size = (320, 240)
    points = np.random.default_rng(0).uniform(0, 1, (40, 2)) * np.subtract(size, 1)
    queries = [
        Query("a/test/0", Image.new("RGB", size), (300.0, 300.0, 160.0, 120.0), points[:30]),
        Query("a/test/1", Image.new("RGB", size), (200.0, 200.0, 160.0, 120.0), points[30:]),
    ]
    first, second = contestant.answers(contestant.prepare(queries))
    assert [row["focal_length"] for row in asked] == [300.0] * 30 + [200.0] * 10
    for row, point in zip(asked, points, strict=True):
        x, y = map(
            int, re.fullmatch(r"How far is the point at (\d+) % from the left and (\d+) .*", row["question"]).groups()
        )
        stated = np.array([x, y]) / 100 * size - 0.5
        assert (np.abs(stated - point) <= np.array(size) * 0.005 + 1).all()
    assert [answer.depth for answer in first[1:]] == list(range(1, 30)) and first[0].status == "invalid"
    assert second[-1].status == "unparsable" and math.isnan(second[-1].depth)


@pytest.mark.parametrize(
    "point, expected", [((-0.5, -0.5), [0, 0]), ((319.5, 239.5), [100, 100]), ((159.5, 60), [50, 25])]
)
def test_per_cents(point, expected):
    assert depthvlm_words.per_cents(point, (320, 240)) == expected


def test_the_question_is_the_one_that_procedural_trains():
    from bench.sources.procedural.source import render

    pattern = re.escape(depthvlm_words.PROMPT).replace(re.escape("{}"), r"\d+")
    asked = [question for kind, question, _ in render("train", 0, (64, 48)).qa if kind == "point_distance"]
    assert asked and all(re.fullmatch(pattern, question) for question in asked)


def test_the_tokenizer_here_has_every_word_of_the_questions():
    """No text is lost on the way to ids and back, special tokens keep their places, and a question stays short."""
    from bench.sources.procedural.source import render

    processor = DepthVLMProcessor.from_pretrained(ROOT, trust_remote_code=False)
    config = json.loads((ROOT / "config.json").read_text())
    assert processor.image_token_id == config["image_token_id"]
    for split in ("train", "easy_train"):
        for kind, question, answer in render(split, 0, (64, 48)).qa:
            for text in (question, answer):
                ids = processor.tokenizer(text)["input_ids"]
                assert processor.tokenizer.decode(ids) == text and max(ids) < config["text_config"]["vocab_size"]
                assert kind != "point_distance" or len(ids) <= 22
