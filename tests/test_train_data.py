"""What training makes of a row: label mask, depth label, crop, augmentation; and the order in which rows come."""

import collections
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from fixed_batches import byte_processor
from PIL import Image
from tiny import tiny_model

from bench import sources
from bench.depthvlm_bench import FEATURES
from depthvlm.processing_depthvlm import DEPTH_RESPONSE
from training.data import DataArguments, DataSource, crop, draw_questions, read_sample
from training.encoding import Collator, Encoder
from training.held_out import EvalSamples
from training.loss import separate
from training.stream import TrainingStream

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden_row.json"
PAIRS = [("distance", "How far is the red box?", "2.5"), ("nearer", "Which is nearer, a or b?", "a")]


def png(array) -> dict:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_row(index=0, size=(64, 48), source="procedural", fx=200.0, qa=PAIRS, words=None, **changes) -> dict:
    """A row of the benchmark; its depth in millimetres is 1000 + 10 * column unless given."""
    width, height = size
    if words is None:
        words = np.broadcast_to(1000 + 10 * np.arange(width), (height, width))
    colors = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    row = {
        "id": f"row/{index}",
        "source": source,
        "split": "train",
        "scene": "",
        "camera": "",
        "image": png(colors),
        "depth": png(words.astype(np.uint16)),
        "depth_scale": 1000.0,
        "depth_type": "z",
        "fx": fx,
        "fy": fx,
        "cx": 31.5,
        "cy": 23.5,
        "points_u": [],
        "points_v": [],
        "points_depth": [],
        "qa": {key: [pair[i] for pair in qa] for i, key in enumerate(("kind", "question", "answer"))},
    }
    return row | changes


def write(folder: Path, rows: list[dict], shards=4, name="train") -> str:
    """A folder that `load_dataset` opens, with the rows dealt to shards in turn."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = datasets.Dataset.from_list(rows[shard::shards], features=FEATURES)
        part.to_parquet(folder / "data" / f"{name}-{shard:05d}-of-{shards:05d}.parquet")
    files = f"[{{split: {name}, path: data/{name}-*.parquet}}]"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
    return str(folder)


def sample_of(row, kind="depth", seed=0, depth_on_qa=False, **arguments) -> dict:
    source = DataSource("nowhere", kind=kind, depth_on_qa=depth_on_qa)
    (source,) = DataArguments(datasets=[source], **arguments).datasets
    return read_sample(row, source, np.random.default_rng(seed))


def collate(*samples) -> dict:
    encoder = Encoder(byte_processor())
    return Collator(byte_processor())([encoder(sample) for sample in samples])


def answers_of(batch) -> list[str]:
    """What the labels cover, row by row; pieces that do not touch are apart."""
    tokenizer = byte_processor().tokenizer
    rows = []
    for labels in batch["labels"].tolist():
        text = "".join("\0" if label == -100 else tokenizer.decode([label]) for label in labels)
        rows.append([piece for piece in text.split("\0") if piece])
    return rows


# Labels


def test_golden_row():
    """Token ids and labels of a stored conversation, with a tokenizer of bytes: what is learnt, to the token."""
    golden = json.loads(GOLDEN.read_text())
    batch = collate(sample_of(make_row(), "qa"))
    assert batch["input_ids"].tolist() == [golden["input_ids"]]
    assert batch["labels"].tolist() == [golden["labels"]]


def test_labels_cover_the_responses_and_nothing_else():
    batch = collate(sample_of(make_row()), sample_of(make_row(), "qa", seed=1))
    assert answers_of(batch)[0] == [DEPTH_RESPONSE + "<|im_end|>"]
    assert sorted(answers_of(batch)[1]) == ["2.5<|im_end|>", "a<|im_end|>"]
    trained = batch["labels"] != -100
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
    assert not batch["attention_mask"][trained].eq(0).any()


def test_prompt_is_the_one_that_depth_is_asked_with():
    """Up to the answer, the row is token for token what `processor(images=...)` makes."""
    processor = byte_processor()
    row = make_row()
    batch = collate(sample_of(row))
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    asked = processor(images=[image], focal_lengths=row["fx"], return_tensors="pt")
    length = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], asked["input_ids"])
    assert (batch["labels"][0] != -100).nonzero()[0] == length
    assert torch.equal(processor.normalize_patches(batch["pixel_values"]), asked["pixel_values"])
    assert torch.equal(batch["mm_token_type_ids"][:, :length], asked["mm_token_type_ids"])


def test_questions_come_in_another_order():
    pairs = [("count", f"{i}?", str(i)) for i in range(6)]
    orders = {tuple(answers_of(collate(sample_of(make_row(qa=pairs), "qa", seed)))[0]) for seed in range(5)}
    assert len(orders) > 1 and all(len(order) == 6 for order in orders)


def test_separate_questions_are_each_answered_as_if_asked_alone():
    """Log-probabilities of all answers in one pass, with another row and padding, against one pass per question."""
    qa = [*PAIRS, ("count", "How many boxes are there in this picture?", "12")]
    row = make_row(qa=qa, size=(96, 64))
    encoder, collator = Encoder(byte_processor()), Collator(byte_processor())
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    model = tiny_model(**{f"{name}_id": getattr(byte_processor(), f"{name}_id") for name in names})

    def log_probs(batch):
        """Of every answer token, in the order of the batch; their sum's gradients are added to the model's."""
        labels = batch.pop("labels")[:, 1:]
        batch["pixel_values"] = byte_processor().normalize_patches(batch["pixel_values"])
        for name in ("depth_labels", "row_sets", "image_sets"):
            batch.pop(name, None)
        if (branches := batch.pop("branches", None)) is not None:
            batch |= separate(model, branches, batch)
        states = model.model(**batch).last_hidden_state[:, :-1][labels != -100]
        values = model.lm_head(states).log_softmax(-1).gather(1, labels[labels != -100][:, None])[:, 0]
        values.sum().backward()
        return values.detach()

    def gradients():
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
        return found

    source = DataSource("nowhere", kind="qa", separate_questions=True)
    together = read_sample(row, source, np.random.default_rng(0))
    plain = read_sample(make_row(1, qa=qa[:2]), DataSource("nowhere", kind="qa"), np.random.default_rng(0))
    batch = collator([encoder(together), encoder(plain)])
    assert batch["input_ids"][0].tolist().count(byte_processor().image_token_id) == 3 * 2
    alone = []
    for messages in (together["messages"], *together["others"]):
        alone.append(log_probs(collator([encoder(together | {"messages": messages, "others": []})])))
    alone.append(log_probs(collator([encoder(plain)])))
    expected = gradients()
    torch.testing.assert_close(log_probs(batch), torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-4)


def test_separate_questions_need_sdpa():
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="separate_questions needs attn_implementation sdpa, but it is eager"):
        separate(model, torch.tensor([[0, 0, 1, 1]]), {"input_ids": torch.tensor([[1, 2, 3, 4]])})


def test_max_questions_of_a_row_are_drawn_anew():
    source = DataSource("nowhere", kind="qa", max_questions=1)
    rng = np.random.default_rng(0)
    drawn = [read_sample(make_row(), source, rng)["messages"] for _ in range(20)]
    assert {len(messages) for messages in drawn} == {3}
    assert {messages[2]["content"][0]["text"] for messages in drawn} == {"2.5", "a"}
    with pytest.raises(ValueError, match="max_questions of data set 'nowhere' is 0"):
        DataSource("nowhere", max_questions=0)


def test_drawn_questions_are_of_all_kinds_by_turns():
    kinds = ["point"] * 20 + ["half"] + ["pair"] * 5
    rng = np.random.default_rng(0)
    draws = [draw_questions(kinds, 9, rng) for _ in range(300)]
    for drawn in draws:
        assert len(set(drawn)) == 9
        assert collections.Counter(kinds[i] for i in drawn) == {"half": 1, "point": 4, "pair": 4}
    # each of a kind is as likely as the others, and in any place: 300 draws of 4 of 20, and 1 of 9 places
    points = collections.Counter(i for drawn in draws for i in drawn if i < 20)
    assert len(points) == 20 and max(abs(number - 60) for number in points.values()) < 5 * (60 * 0.8) ** 0.5
    firsts = sum(drawn[0] == 20 for drawn in draws)
    assert abs(firsts - 300 / 9) < 5 * (300 / 9) ** 0.5
    assert sorted(draw_questions(kinds, None, rng)) == sorted(draw_questions(kinds, 99, rng)) == list(range(26))


def test_instruction_rows():
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "a room"},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": "yes"},
    ]
    with_image = sample_of({"messages": messages, "images": [make_row()["image"]]}, "instruction")
    text_only = sample_of({"messages": messages, "images": []}, "instruction")
    batch = collate(with_image, text_only, sample_of(make_row(1)))
    assert answers_of(batch)[:2] == [["a room<|im_end|>", "yes<|im_end|>"]] * 2
    assert len(batch["image_grid_thw"]) == 2 and len(batch["depth_labels"]) == 2
    assert not batch["depth_labels"][0].any() and batch["depth_labels"][1].all()
    with pytest.raises(ValueError, match="2 images are placed .* but 1 are given"):
        placed = [{"role": "user", "content": [{"type": "image"}] * 2}, messages[1]]
        sample_of({"messages": placed, "images": [make_row()["image"]]}, "instruction")


def test_text_alone_has_no_image():
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    batch = collate(sample_of({"messages": messages, "images": None}, "instruction"))
    assert "pixel_values" not in batch and "depth_labels" not in batch


def test_conversation_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="without an answer"):
        collate(sample_of({"messages": [{"role": "user", "content": "1+1?"}], "images": []}, "instruction"))


# Depth


def test_depth_labels_are_the_processors():
    row = make_row(fx=150.0)
    batch = collate(sample_of(row), sample_of(row, "qa"), sample_of(row, "qa", depth_on_qa=True))
    depth = np.broadcast_to(1 + 0.01 * np.arange(64, dtype=np.float32), (48, 64))
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    expected = byte_processor()(images=[image], focal_lengths=150.0, depth_maps=[depth])["depth_labels"][0]
    assert torch.allclose(batch["depth_labels"][0], expected) and torch.allclose(batch["depth_labels"][2], expected)
    assert not batch["depth_labels"][1].any()


@pytest.mark.parametrize("edge, width", [(1024, 512), (None, 800), (4000, 800)])
def test_crop_rule(edge, width):
    """At f = 500 px, 1024 px after normalization to 1000 are 512 here; the middle stays."""
    row = make_row(size=(800, 600), fx=500.0)
    source = DataSource("data", max_canonical_edge=edge)
    sample = read_sample(row, source, np.random.default_rng(0))
    assert sample["images"][0].size == (width, 512 if width == 512 else 600)
    depth = sample["depth_maps"][0]
    assert depth.shape == sample["images"][0].size[::-1]
    left = (800 - width) // 2
    assert depth[0, 0] == pytest.approx(1 + 0.01 * left) and depth[0, -1] == pytest.approx(8.99 - 0.01 * left)
    assert sample["focal_lengths"] == [500.0]


def test_the_papers_recipes_crop_what_the_sources_say():
    for stage in ("stage1", "stage2"):
        mix = yaml.safe_load((ROOT / "configs" / f"{stage}.yaml").read_text())["datasets"]
        for entry in mix:
            assert entry.get("max_canonical_edge") == sources.get(entry["name"]).max_canonical_edge, entry


def test_crop_of_a_coarser_depth_map():
    """Image and map keep showing the same view: each of the map's columns lies over its four of the image."""
    image = Image.fromarray(np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None], (100, 200, 1)).repeat(3, 2))
    depth = np.broadcast_to(np.arange(50, dtype=np.float32), (25, 50))
    image, depth = crop(image, depth, 80)
    assert image.size == (80, 80) and depth.shape == (20, 20)
    assert np.asarray(image)[0, 0, 0] == 60 and depth[0, 0] == 15


def test_max_canonical_edge_is_checked():
    with pytest.raises(ValueError, match="max_canonical_edge of data set 'data' is 0; give px"):
        DataSource("data", max_canonical_edge=0)


def test_flip_takes_depth_along_but_leaves_questions_alone():
    row = make_row()
    flipped = [sample_of(row, seed=seed, flip=True) for seed in range(8)]
    plain = sample_of(row)
    kinds = set()
    for sample in flipped:
        mirrored = np.array_equal(sample["depth_maps"][0], plain["depth_maps"][0][:, ::-1])
        kinds.add(mirrored)
        image = np.asarray(sample["images"][0])
        assert np.array_equal(image, np.asarray(plain["images"][0])[:, :: -1 if mirrored else 1])
    assert kinds == {True, False}
    asked = [sample_of(row, "qa", seed, flip=True)["images"][0] for seed in range(8)]
    assert all(np.array_equal(image, plain["images"][0]) for image in asked)


def test_focal_jitter_keeps_metres():
    """However large the picture is processed, its label is metres * f_c / f_p, f_p being the true camera's there."""
    processor = byte_processor()
    row = make_row(size=(320, 240), fx=200.0, words=np.full((240, 320), 3000))
    sizes = set()
    for seed in range(6):
        sample = sample_of(row, seed=seed, focal_jitter=0.4)
        batch = processor(**{key: sample[key] for key in ("images", "focal_lengths", "depth_maps")})
        height, width = batch["cameras"][0]["processed_size"]
        sizes.add((height, width))
        focal = 200.0 * (height * width / (240 * 320)) ** 0.5
        assert batch["depth_labels"][0].unique().item() == pytest.approx(3 * processor.canonical_focal_length / focal)
    assert len(sizes) > 1


def test_color_jitter_leaves_depth():
    plain, colored = sample_of(make_row()), sample_of(make_row(), color_jitter=0.3)
    assert not np.array_equal(plain["images"][0], colored["images"][0])
    assert np.array_equal(plain["depth_maps"][0], colored["depth_maps"][0])


# Rows that cannot be used


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"image": {"bytes": b"no picture", "path": None}}, "cannot identify image file"),
        ({"depth": png(np.ones((48, 64), np.uint8))}, "16-bit"),
        ({"depth_type": "ray"}, "z-depth"),
        ({"image": {"bytes": make_row()["image"]["bytes"][:2000], "path": None}}, "truncated"),
        ({"fx": 0.0}, "fx is 0.0 px; it must be above 0"),
        ({"depth_scale": 0.0}, "depth_scale is 0.0 values per metre; it must be above 0"),
    ],
)
def test_unreadable_rows_are_refused(changes, reason):
    with pytest.raises((ValueError, OSError), match=reason):
        sample_of(make_row(**changes))


def ids(stream, count) -> list:
    """(id of the row, told by its first pixel; position) of the next samples."""
    return [(sample["images"][0].getpixel((0, 0)), sample["position"]) for sample in take(stream, count)]


def take(stream, count):
    iterator = iter(stream)
    return [next(iterator) for _ in range(count)]


def counts(stream, samples) -> dict:
    """Rows read and rows refused of each data set, up to the last sample."""
    return stream.bad_rows([samples[-1]["position"]])


def broken(index):
    return make_row(index, image={"bytes": b"no picture", "path": None})


def test_unreadable_row_is_counted_named_and_passed_over(tmp_path):
    path = write(tmp_path / "set", [broken(i) if i == 5 else make_row(i) for i in range(12)])
    stream = TrainingStream(DataArguments(datasets=[{"path": path}]), 0, log=tmp_path / "unreadable.jsonl")
    samples = take(stream, 11)
    assert len({np.asarray(sample["images"][0]).tobytes() for sample in samples}) == 11
    assert counts(stream, samples)["set"] in ((11, 0), (12, 1)) and counts(stream, take(stream, 12))["set"][1] == 1
    record = json.loads((tmp_path / "unreadable.jsonl").read_text().splitlines()[0])
    assert record["id"] == "row/5" and record["path"] == path and "cannot identify" in record["reason"]


def test_a_row_without_an_image_is_one_bad_row(tmp_path):
    path = write(tmp_path / "set", [make_row(i, image=None) if i == 5 else make_row(i) for i in range(12)])
    stream = TrainingStream(DataArguments(datasets=[{"path": path}]), 0)
    assert counts(stream, take(stream, 12))["set"][1] == 1


def test_a_part_of_a_message_has_no_keys_that_arrow_added():
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?", "image": None}]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
    ]
    row = {"messages": turns, "images": [make_row()["image"]]}
    found = sample_of(row, "instruction")["messages"][0]["content"]
    assert found == [{"type": "image"}, {"type": "text", "text": "What?"}]
    with pytest.raises(ValueError, match="without an answer"):
        sample_of({"messages": turns[:1], "images": row["images"]}, "instruction")


def test_unreadable_rows_are_counted_for_the_trainer(tmp_path):
    """Which judges `max_bad_share` on the sums over all ranks; the stream itself goes on."""
    path = write(tmp_path, [broken(i) if i % 20 == 0 else make_row(i) for i in range(60)])
    stream = TrainingStream(DataArguments(datasets=[{"path": path}]), 0, log=tmp_path / "log")
    read, refused = counts(stream, take(stream, 570))[tmp_path.stem]
    assert read == 570 + refused and 29 <= refused <= 31  # ten passes


def test_a_stream_without_a_row_to_use_ends(tmp_path):
    path = write(tmp_path / "set", [make_row(i, fx=-1.0) for i in range(8)])
    stream = TrainingStream(DataArguments(datasets=[{"path": path}]), 0, log=tmp_path / "log")
    with pytest.raises(ValueError, match="101 rows were read and none of them can be used; .* fx is -1.0 px"):
        next(iter(stream))
    assert len((tmp_path / "log").read_text().splitlines()) == 101


def test_missing_column(tmp_path):
    with pytest.raises(ValueError, match="has no column messages or conversations or completion, prompt, which kind"):
        DataSource(write(tmp_path, [make_row(i) for i in range(4)]), kind="instruction").open()


def test_unknown_kind_and_weight():
    with pytest.raises(ValueError, match="must be one of depth, qa, instruction"):
        DataSource("x", kind="video")
    with pytest.raises(ValueError, match="more than 0"):
        DataSource("x", weight=0)


# The stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows"), [make_row(i) for i in range(24)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_rows(folder, world_size):
    """Each time around, every row is read once by one rank, whether there are shards for all or not."""
    arguments = DataArguments(datasets=[{"path": folder}], shuffle_buffer=8)
    first_time, second_time = [], []
    for rank in range(world_size):
        # four shards of six rows; dealt to three ranks, they begin the second time where the first has ended
        first, second = ([12, 6, 6][rank], [6, 12, 6][rank]) if world_size == 3 else [24 // world_size] * 2
        rows = [row for row, _ in ids(TrainingStream(arguments, 0, rank, world_size), first + second)]
        first_time += rows[:first]
        second_time += rows[first:]
    assert len(first_time) == len(set(first_time)) == len(set(second_time)) == 24
    assert first_time != second_time


@pytest.mark.parametrize("workers, done", [(0, 3), (1, 5), (2, 3), (3, 4), (5, 6)])
def test_stream_resumes_at_the_sample(tmp_path, workers, done):
    """The batches that follow are those that would have followed, for any number of workers, bad rows included."""
    path = write(tmp_path, [broken(i) if i % 7 == 3 else make_row(i) for i in range(24)])
    arguments = DataArguments(
        datasets=[{"path": path}, {"path": path, "weight": 2.0}], shuffle_buffer=4, max_bad_share=1
    )

    def batches(stream, count):
        loader = iter(torch.utils.data.DataLoader(stream, 2, collate_fn=list, num_workers=workers))
        return [next(loader) for _ in range(count)]

    whole = batches(TrainingStream(arguments, 3), done + 6)
    positions = {}
    for batch in whole[:done]:
        positions[batch[-1]["position"][0]] = json.loads(json.dumps(batch[-1]["position"]))
    stream = TrainingStream(arguments, 3)
    stream.resume(done, list(positions.values()))
    for batch, expected in zip(batches(stream, 6), whole[done:], strict=True):
        assert [sample["position"] for sample in batch] == [sample["position"] for sample in expected]
        for sample, other in zip(batch, expected, strict=True):
            assert np.array_equal(sample["images"][0], other["images"][0])


def test_weights(tmp_path):
    small, large = (
        write(tmp_path / name, [make_row(100 * k + i, fx=100.0 + k) for i in range(count)], shards=2)
        for k, (name, count) in enumerate([("small", 4), ("large", 40)])
    )

    def share(**weights):
        mix = [{"path": small, **weights}, {"path": large}]
        samples = take(TrainingStream(DataArguments(datasets=mix), 0), 400)
        return np.mean([sample["focal_lengths"][0] == 100.0 for sample in samples])

    assert share() == pytest.approx(0.5, abs=0.08)  # by default in equal shares, whatever their sizes
    assert share(weight=3.0) == pytest.approx(0.75, abs=0.08)


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="datasets is empty"):
        TrainingStream(DataArguments(), 0)


def test_held_out_samples_are_the_first_and_the_same_each_time(tmp_path):
    path = write(tmp_path, [make_row(i) for i in range(8)], shards=1, name="test")
    arguments = DataArguments(eval_datasets=[{"path": path, "split": "test", "kind": "qa"}], max_eval_samples=5)
    first, second = (EvalSamples(arguments, Encoder(byte_processor())) for _ in range(2))
    assert len(first) == 5
    assert [first[i]["input_ids"].tolist() for i in range(5)] == [second[i]["input_ids"].tolist() for i in range(5)]
