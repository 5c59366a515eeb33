"""Depth asked in words: what a model is shown, what its reply means, and transformers' VLMs as contestants."""

import copy
import math

import numpy as np
import pytest
import torch
from fixed_batches import byte_processor
from PIL import Image
from tiny import TEXT, VISION
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from bench.contestants import depthlm, vlm3
from bench.contestants import vlm as contestant
from bench.contestants._base import NotRunnable, Query
from bench.contestants._prompt import (
    PROMPT,
    arrow_pixels,
    downscale,
    map_points,
    mark,
    parse_depth,
    questions,
    save_marked,
)


def photo(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8))


def query(width=96, height=64, points=((40, 30), (50.4, 20.5), (30, 33)), seed=0, name="toy/test/a"):
    return Query(name, photo(width, height, seed), (80.0, 80.0, width / 2, height / 2), np.array(points, np.float64))


def painted(before, after):
    return {(int(u), int(v)) for v, u in zip(*np.nonzero((np.array(before) != np.array(after)).any(-1)), strict=True)}


# What is shown


def test_the_longest_edge_comes_down_to_1024_and_never_up():
    assert downscale(photo(2048, 1000)).size == (1024, 500)
    assert downscale(photo(999, 3000)).size == (341, 1024)
    small = photo(1024, 3)
    assert downscale(small) is small


def test_points_keep_their_place_by_pixel_centres():
    points = np.array([(0, 0), (3, 1), (4, 4), (7, 7), (7.49, 3.5), (-0.5, 7.5)])
    assert map_points(points, (8, 8), (8, 8)).tolist() == [[0, 0], [3, 1], [4, 4], [7, 7], [7, 4], [0, 7]]
    # halved, pixels 2k and 2k + 1 are pixel k
    assert map_points(points, (8, 8), (4, 4)).tolist() == [[0, 0], [1, 0], [2, 2], [3, 3], [3, 2], [0, 3]]
    assert map_points(np.array([(9, 0)]), (10, 10), (3, 5)).tolist() == [[2, 0]]


@pytest.mark.parametrize("size", [5, 20])
def test_the_arrow_is_depthlms(size):
    image, (x, y) = photo(80, 60), (40, 30)
    expected = np.array(image)
    for k in range(1, size + 1):
        expected[y, x - k] = (255, 0, 0)
    for k in range(1, math.floor(size / 2) + 1):
        expected[y + k, x - k - 1] = expected[y - k, x - k - 1] = (255, 0, 0)
    assert (np.array(mark(image, (x, y), size)) == expected).all()
    assert (expected[y, x] == np.array(image)[y, x]).all()


@pytest.mark.parametrize("size", [5, 20])
def test_an_arrow_that_would_leave_the_image_comes_from_another_side(size):
    half, image = size // 2, photo(90, 70)
    right = {tuple(offset) for offset in arrow_pixels(size).tolist()}
    for pixel, turned in {
        (size, 35): right,
        (size - 1, 35): {(-u, v) for u, v in right},
        (45, half - 1): {(v, -u) for u, v in right},  # no room above: from below
        (45, 70 - half): {(v, u) for u, v in right},
    }.items():
        marked = mark(image, pixel, size)
        assert painted(image, marked) == {(pixel[0] + u, pixel[1] + v) for u, v in turned}
        assert all(marked.getpixel(place) == (255, 0, 0) for place in painted(image, marked))
    for corner in ((half - 1, half - 1), (90 - half, half - 1), (half - 1, 70 - half), (89, 69)):
        assert mark(image, corner, size) is None


def test_every_point_but_those_in_the_corners_can_be_marked():
    image = photo(60, 50)
    unmarkable = {(u, v) for u in range(60) for v in range(50) if mark(image, (u, v)) is None}
    assert unmarkable == {(u, v) for u in range(60) for v in range(50) if (u < 10 or u > 49) and (v < 10 or v > 39)}


def test_questions_and_saved_images_show_the_downscaled_marked_photo(tmp_path):
    asked = query(2048, 1024, [(1000, 500), (0, 0)], name="toy/test/../a b")
    (marked, prompt), (unmarkable, _) = questions(asked)
    assert prompt == PROMPT and unmarkable is None and marked.size == (1024, 512)
    assert marked.getpixel((499, 250)) == (255, 0, 0) and marked.getpixel((500, 250)) != (255, 0, 0)
    (path,) = save_marked([asked], tmp_path / "marked")
    assert path.parent == tmp_path / "marked" and path.name == "toy_test_.._a_b_0.png"
    assert Image.open(path).tobytes() == marked.tobytes()


# What a reply means

METRES = {
    "2.5": 2.5,
    " 2.5\n": 2.5,
    "2.5.": 2.5,
    "**2.5**": 2.5,
    '"2.5"': 2.5,
    "7": 7,
    ".75 m": 0.75,
    "1e1": 10,
    "2.5m": 2.5,
    "2.5 M": 2.5,
    "2.5 [m]": 2.5,
    "3 meter": 3,
    "3 metre": 3,
    "2.5 meters.": 2.5,
    "2.5 Metres": 2.5,
    "about 250 cm": 2.5,
    "250 centimetres": 2.5,
    "1500 mm": 1.5,
    "1500 millimeters": 1.5,
    "0.4 km": 400,
    "0.4 kilometers": 400,
    "12 ft": 3.6576,
    "12 feet": 3.6576,
    "1 foot": 0.3048,
    "10 inches": 0.254,
    "1 inch": 0.0254,
    "10 in": 0.254,
    "10 in.": 0.254,
    "35 cm, i.e. 0.35 m": 0.35,
    "~3 m": 3,
    "approximately 2.5 meters": 2.5,
    "The depth is approximately 2.5": 2.5,
    "Depth: 2.5": 2.5,
    "depth=2.5 m": 2.5,
    "Depth (in meters): 2.5": 2.5,
    "- 2.5 m": 2.5,  # a list's bullet
    "The point at (512, 300) is 3.2 m away.": 3.2,
    "point 1: 3.2 m": 3.2,
    "the 2 chairs are 3.2 m away": 3.2,
    "$2.5 \\text{ m}$": 2.5,
    # commas
    "1,234.5 mm": 1.2345,
    "1,234,567 mm": 1234.567,
    "2,5 m": 2.5,
    "2,50": 2.5,
    "0,375 m": 0.375,
    # marked answers
    "<answer>7.5</answer>": 7.5,
    "<answer> 250 cm </answer>": 2.5,
    "It is 3 to 4 m, near 3.5 m. <answer>3.4</answer>": 3.4,
    "<answer>1</answer> no, <answer>2</answer>": 2,
    "I cannot measure it, so I guess. <answer>2</answer>": 2,
    '{"depth": 2.5}': 2.5,
    '```json\n{"depth": 250, "unit": "cm"}\n```': 2.5,
    '{"depth": "2.5 m", "confidence": 0.7}': 2.5,
    "between 2 and 3 meters\n\\boxed{2.4 \\text{ m}}": 2.4,
    "2 m or 3 m\n**Final answer: 2.5 m**": 2.5,
    "2 m or 3 m\n**Final Answer:**\n\n2.5 m": 2.5,
    "Answer:\n2.5 meters": 2.5,
    "Answer: 1 m\nAnswer: 2 m": 2,
    # thoughts
    "<think>3 m or 4 m</think> 7.5": 7.5,
    "maybe 3 m? <answer>3</answer></think>\n\n7.5 m": 7.5,
}
UNPARSABLE = [
    "",
    "  \n",
    "meters",
    "five meters",
    "nan",
    "infinity m",
    "3-4 meters",
    "3 – 4 m",
    "3~4 m",
    "3 to 4 meters",
    "3 m to 4 m",
    "3 m to 4",
    "3m-4",
    "between 3 m and 4",
    "3 m ± 0.5",
    "3 m or more",
    "3 meters or less",
    "3 m at most",
    "3 m, at least",
    "3 m maximum",
    "between 2 and 3",
    "between 2 and 3 meters, so 2.5",
    "2 or 3",
    "3 ± 0.5 m",
    "1/2 m",
    "1 200 mm",
    "12\u202f345 mm",
    "3 .2 m",
    "2x3 m",
    "3.2×10^0 m",
    "2.5 at a scale of 1:10",
    "3.2 meters (10.5 feet)",
    "the wall is 4 m away, the chair 2.5 m",
    "5 feet 6 inches",
    "5'6\"",
    "12'",
    '12"',
    "3 yards",
    "250 pixels",
    "50%",
    "2.5 in meters",
    "2 in front of the door",
    "3 m²",
    "3 m/s",
    "Depth in cm: 250",
    "in feet: 10",
    '{"depth_cm": 250}',
    "less than 2 m",
    "more than about 3 meters",
    "over 3 m",
    "at least 3",
    "> 3 m",
    "3+ m",
    "1,234",
    "1.234,5",
    "1.2.3",
    "2.5 3.5",
    "<answer>3-4 meters</answer>",
    "<answer></answer> 3 m",
    "Answer: 2 or 3",
    "<think>it is 3 m",
    '{"depth": null}',
]
INVALID = ["-2.5", "−2.5 m", "depth: -1", "0", "0.00 meters", "<answer>-3</answer>", "1e999", '{"depth": 0}']
REFUSED = [
    "I cannot determine the depth.",
    "I can't tell how far it is.",
    "I’m sorry, but I can’t help with that.",
    "I am unable to estimate the distance.",
    "There is no red arrow in the image. Therefore, the distance cannot be determined.",
    "It is not possible to measure this from an image of 640 by 480.",
    "I cannot determine whether it is 3 m away.",
    "<answer>cannot be determined</answer>",
    "<answer>unknown</answer>",
    "I don't know.",
]


@pytest.mark.parametrize(("text", "metres"), METRES.items())
def test_one_stated_depth_is_read_in_metres(text, metres):
    depth, status = parse_depth(text)
    assert status == "ok" and depth == pytest.approx(metres, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "status"),
    [(text, "unparsable") for text in UNPARSABLE]
    + [(text, "invalid") for text in INVALID]
    + [(text, "refused") for text in REFUSED],
)
def test_all_else_is_no_depth(text, status):
    depth, found = parse_depth(text)
    assert math.isnan(depth) and found == status


def test_long_replies_are_read_in_time():
    for text in (
        "1 " * 50_000,
        "{" * 50_000,
        "1," * 50_000,
        "cannot " * 20_000,
        "<answer>" * 20_000,
        "<think>" * 20_000,
    ):
        assert parse_depth(text)[1] != "ok"


# transformers' models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A plain Qwen3-VL of random weights, with a tokenizer of bytes; it is saved with the settings of sampling."""
    folder = tmp_path_factory.mktemp("qwen")
    parts = byte_processor()
    tokenizer = parts.tokenizer
    tokens = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")}
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    config = Qwen3VLConfig(
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "eos_token_id": tokens["<|im_end|>"], "pad_token_id": tokens["<|endoftext|>"]},
        vision_config=VISION,
        tie_word_embeddings=False,  # tied, it would repeat its first token
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    torch.manual_seed(4)  # with these weights the replies differ from point to point
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.generation_config.update(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=[tokens["<|im_end|>"], 65],
        pad_token_id=tokens["<|endoftext|>"],
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def plain_processor():
    """Stands in for transformers' Qwen3-VL processor, which needs torchvision, for videos: as ours, but no cameras."""
    processor = copy.copy(byte_processor())

    class Plain(type(processor)):
        def __call__(self, *args, **kwargs):
            inputs = super().__call__(*args, **kwargs)
            inputs.pop("cameras", None)
            return inputs

    processor.__class__ = Plain
    return processor


@pytest.fixture
def model(checkpoint, monkeypatch):
    monkeypatch.setattr(contestant.VisionLanguageModel, "max_new_tokens", 12)
    monkeypatch.setattr(contestant.AutoProcessor, "from_pretrained", lambda *args, **kwargs: plain_processor())
    return contestant.CONTESTANT(str(checkpoint))


def direct(model, image, prompt):
    """One question to `generate` by hand: the text around the image's tokens, no template, no padding."""
    inputs = model.processor(
        text=[
            f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ],
        images=[image],
        return_tensors="pt",
    )
    tokens = model.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return model.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(), len(tokens) < 12


def test_answers_are_what_generate_gives_alone(model):
    queries = [query(), query(130, 70, [(60, 30), (1, 1)], seed=1, name="toy/test/b")]
    expected = [[image and direct(model, image, prompt) for image, prompt in questions(q)] for q in queries]
    found = model.answers(queries)
    assert [len(each) for each in found] == [3, 2]
    assert found[1][1].status == "unmarkable" and expected[1][1] is None
    pairs = [(a, e) for q, texts in zip(found, expected, strict=True) for a, e in zip(q, texts, strict=True) if e]
    assert [answer.text for answer, _ in pairs] == [text for _, (text, _) in pairs]
    assert len({text for _, (text, _) in pairs}) > 1  # the images matter
    assert all(answer.status == "unparsable" for answer, (_, ended) in pairs if not ended)
    model.batch_size = 1
    assert [[a.text for a in q] for q in model.answers(queries)] == [[a.text for a in q] for q in found]


def test_only_a_reply_that_ends_is_read(model, monkeypatch):
    texts = ["2.5 m", "2."]
    end = model.model.generation_config.eos_token_id[0]

    def generate(input_ids, **kwargs):
        assert kwargs["do_sample"] is False
        replies = [model.processor.tokenizer(text)["input_ids"] for text in texts]
        rows = torch.full((2, 7), model.processor.tokenizer.pad_token_id)
        rows[0, :6] = torch.tensor([*replies[0], end])
        rows[1] = torch.tensor(replies[1] + [replies[1][0]] * 5)  # cut off
        return torch.cat([input_ids, rows], dim=1)

    monkeypatch.setattr(model.model, "generate", generate)
    ((first, second),) = model.answers([query(points=[(40, 30), (50, 20)])])
    assert (first.depth, first.status, first.text) == (2.5, "ok", "2.5 m")
    assert second.status == "unparsable" and second.text == "2.22222"


def test_a_model_without_images_or_unknown_to_transformers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(NotRunnable, match="model_type 'bert'"):
        contestant.CONTESTANT(str(tmp_path))
    (tmp_path / "config.json").write_text(
        '{"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}}'
    )
    with pytest.raises(NotRunnable, match="-HF"):
        contestant.CONTESTANT(str(tmp_path))


def test_depthlm_sees_its_own_focal_length_and_arrow():
    asked = query(640, 480, [(320, 240), (0, 0)])
    asked = Query(asked.id, asked.image, (600.0, 600.0, 320.0, 240.0), asked.points)
    (marked, prompt), (corner, _) = depthlm.questions(asked)
    resized = asked.image.resize((800, 600))  # 750 / 600
    assert corner is None and "<answer>" in prompt and marked.size == resized.size
    assert painted(resized, marked) == {(400 + u, 300 + v) for u, v in arrow_pixels(5).tolist()}
    assert depthlm.CONTESTANT.quantity == "ray" and depthlm.CONTESTANT.uses_intrinsics


def test_vlm3_names_the_pixel_as_its_sample_data_does():
    pixels = [(10, 488), (191, 119), (710, 320), (1182, 773), (1166, 467), (0, 410)]
    named = [(16, 1061), (314, 259), (1169, 696), (1946, 1680), (1919, 1015), (0, 891)]
    image = photo(1215, 920)
    asked = list(vlm3.questions(Query("a", image, (1000.0, 1000.0, 609.1, 458.1), np.array(pixels, np.float64))))
    assert all(np.array_equal(shown, image) for shown, _ in asked)
    for (_, prompt), (u, v) in zip(asked, named, strict=True):
        assert f"coordinates ({u}, {v}) from" in prompt
    assert vlm3.CONTESTANT.quantity == "ray" and vlm3.CONTESTANT.uses_intrinsics
