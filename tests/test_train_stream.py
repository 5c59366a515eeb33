"""The order of rows: who reads what, resuming anywhere, batches of like length; and rows that cannot be used."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fixed_batches import byte_processor
from PIL import Image
from test_own_data import losses, settings, write_folder
from test_train_data import broken, make_row, png, take, write
from test_train_script import run_here

from training.data import DataArguments, DataSource, load_sample, open_sample
from training.encoding import Collator, Encoder
from training.held_out import EvalSamples
from training.passes import Passes
from training.rows import Rows
from training.stream import TrainingStream
from training.trainer import DepthSFTTrainer


def passes(sizes: list[int], reader: int, readers: int, buffer=1, seed=0) -> Passes:
    rows = Rows()
    rows.sizes = np.array(sizes)
    return Passes(rows, buffer, (seed, 0), reader, readers, 0, 0, 0)


def write_texts(path: Path, lengths, bad=()) -> str:
    """Conversations whose questions have these lengths and whose answers are their numbers."""
    rows = [
        {"prompt": "x" * int(length), **({} if number in bad else {"completion": str(number)})}
        for number, length in enumerate(lengths)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


class NumberEncoder:
    """Stands in for the processor: a row's inputs are its number."""

    def measure(self, sample):
        return len(sample["messages"][0]["content"][0]["text"])

    def __call__(self, sample):
        return {"number": int(sample["messages"][1]["content"][0]["text"]), "length": self.measure(sample)}


def texts(*paths, **arguments) -> DataArguments:
    return DataArguments(datasets=[{"path": path, "kind": "instruction"} for path in paths], **arguments)


# Who reads what


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("buffer", [1, 25])
def test_each_pass_gives_each_row_to_one_reader(readers, buffer):
    """And all readers as many blocks, but for one."""
    blocks, size, turns = 7, 10, 4
    seen = Counter()
    for reader in range(readers):
        one = passes([size] * blocks, reader, readers, buffer)
        seen.update(one.next() for _ in range(size * len(range(reader, blocks * turns, readers))))
    assert seen == Counter({(block, row): turns for block in range(blocks) for row in range(size)})


@pytest.mark.parametrize("readers", [4, 8, 16])
def test_readers_of_one_block_begin_at_different_rows_of_it(readers):
    """As many rows as there are come from all readers together, each once, whenever that many have been read."""
    blocks, size = 2, 24
    each = [passes([size] * blocks, reader, readers) for reader in range(readers)]
    for _ in range(readers // blocks):
        together = [one.next() for one in each for _ in range(blocks * size // readers)]
        assert sorted(together) == [(block, row) for block in range(blocks) for row in range(size)]


def test_a_reader_gets_all_rows_of_the_one_block_in_time():
    one = passes([40], reader=3, readers=8)
    assert Counter(one.next() for _ in range(120)) == Counter({(0, row): 3 for row in range(40)})


def test_readers_get_other_blocks_from_pass_to_pass():
    one = passes([5] * 6, reader=1, readers=3, buffer=100)
    blocks = [{one.next()[0] for _ in range(10)} for _ in range(6)]
    assert len(set(map(frozenset, blocks))) > 1 and set().union(*blocks) == set(range(6))


def test_rows_are_shuffled_over_several_blocks_of_a_pass():
    one = passes([10] * 20, reader=0, readers=2, buffer=30)
    first = [one.next()[0] for _ in range(30)]
    assert len(set(first)) == 3 and first != sorted(first)


def test_as_many_readers_as_there_are_read_no_block_twice(tmp_path, monkeypatch):
    """Rows are never read to be thrown away: eight readers of two blocks open 64 rows each and one block a time."""
    path = write_texts(tmp_path / "rows.jsonl", [3] * 32)
    read = []
    for reader in range(8):
        stream = TrainingStream(texts(path), 0, reader, 8)
        monkeypatch.setattr(
            stream.rows[0],
            "read",
            lambda block, rows=stream.rows[0]: read.append(block) or type(rows).read(rows, block),
        )
        take(stream, 64)
    assert len(read) == 8 * 64 / 16


def test_data_sets_are_drawn_in_exact_shares(tmp_path):
    paths = [write_texts(tmp_path / f"{name}.jsonl", [3] * count) for name, count in (("a", 4), ("b", 40), ("c", 9))]
    arguments = DataArguments(
        datasets=[
            {"path": path, "kind": "instruction", "weight": weight}
            for path, weight in zip(paths, (1, 2, 1), strict=True)
        ]
    )
    sets = [sample["set"] for sample in take(TrainingStream(arguments, 0), 400)]
    for count in range(1, 401):
        found = Counter(sets[:count])
        assert all(abs(found[index] - share * count) <= 1 for index, share in enumerate((0.25, 0.5, 0.25)))


def test_sampling_by_rows_is_one_pass_over_all(tmp_path):
    paths = [write_texts(tmp_path / f"{name}.jsonl", [3] * count) for name, count in (("a", 10), ("b", 30), ("c", 60))]
    samples = take(TrainingStream(texts(*paths, sampling="rows"), 0), 100)
    seen = Counter((sample["set"], sample["messages"][1]["content"][0]["text"]) for sample in samples)
    assert len(seen) == 100 and max(seen.values()) == 1
    with pytest.raises(ValueError, match="sampling is 'images'; it must be one of sets, rows"):
        DataArguments(sampling="images")


# Batches of like length


def padding(lengths: list[int], batch_size: int) -> float:
    batches = np.reshape(lengths, (-1, batch_size))
    return 1 - batches.sum() / (batches.max(1) * batch_size).sum()


def test_batches_are_of_like_length(tmp_path):
    """Conversations from 60 to 8000 tokens: less than 8 % of a batch of 32 is padding, where it was three quarters."""
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(6.2, 0.8, 20000)), 60, 8000)
    arguments = texts(write_texts(tmp_path / "rows.jsonl", lengths))
    alone = [sample["length"] for sample in take(TrainingStream(arguments, 0, encoder=NumberEncoder()), 3200)]
    together = [
        sample["length"] for sample in take(TrainingStream(arguments, 0, encoder=NumberEncoder(), batch_size=32), 9600)
    ]
    assert padding(alone, 32) > 0.6 and padding(together, 32) < 0.08
    assert np.median(together) == pytest.approx(np.median(lengths), rel=0.05)  # none is preferred
    first, second = (
        np.mean([len(set(part)) for part in np.reshape(kind, (-1, 32))]) for kind in (alone[:3200], together[:3200])
    )
    assert first > second > 1


def test_no_row_waits_for_ever(tmp_path):
    """One long conversation among short ones has no like; it comes once a pass all the same."""
    stream = TrainingStream(
        texts(write_texts(tmp_path / "rows.jsonl", [9] * 639 + [5000])), 0, encoder=NumberEncoder(), batch_size=8
    )
    numbers = [sample["number"] for sample in take(stream, 640 * 6)]
    assert 5 <= numbers.count(639) <= 6
    counts = Counter(numbers)
    assert len(counts) == 640 and max(counts.values()) <= 8


# Resuming


def loader_batches(stream, count, workers=0, batch_size=4) -> list:
    loader = iter(torch.utils.data.DataLoader(stream, batch_size, collate_fn=list, num_workers=workers))
    return [next(loader) for _ in range(count)]


def as_stored(positions) -> list:
    return json.loads(json.dumps(positions))


@pytest.mark.parametrize("workers, done", [(0, 1), (0, 40), (2, 7), (3, 2)])
def test_batches_of_like_length_resume_to_the_row(tmp_path, workers, done):
    """Over several passes, with refused rows, from what JSON keeps of the positions."""
    lengths = np.random.default_rng(1).integers(5, 500, 80)
    paths = [write_texts(tmp_path / f"{name}.jsonl", lengths, bad=(3, 40)) for name in "ab"]

    def stream():
        return TrainingStream(texts(*paths), 5, encoder=NumberEncoder(), batch_size=4)

    whole = loader_batches(stream(), done + 6, workers)
    positions = {batch[-1]["position"][0]: batch[-1]["position"] for batch in whole[:done]}
    resumed = stream()
    resumed.resume(done, as_stored(list(positions.values())))
    assert loader_batches(resumed, 6, workers) == whole[done:]


def test_resuming_reads_only_what_it_needs(tmp_path):
    path = write_texts(tmp_path / "rows.jsonl", [3] * 20000)
    stream = TrainingStream(texts(path), 0, encoder=NumberEncoder(), batch_size=4)
    position = take(stream, 12000)[-1]["position"]
    resumed, read = TrainingStream(texts(path), 0, encoder=NumberEncoder(), batch_size=4), []
    resumed.resume(3000, as_stored([position]))
    rows = resumed.rows[0]
    rows.read = lambda block: read.append(block) or type(rows).read(rows, block)
    take(resumed, 4)
    assert len(read) < 64 + 200 / 16 + 2 < len(rows.sizes) / 10  # the pool's, and those that are shuffled together


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("readers, now", [(3, 2), (2, 5), (4, 64)])
def test_resuming_with_other_readers_goes_on_in_the_pass(tmp_path, caplog, readers, now, batch_size):
    """From the first block that was not finished; the rows that come again and those that are skipped are counted."""
    from transformers.utils import logging

    logging.enable_propagation()
    blocks, size = 40, 16
    arguments = texts(write_texts(tmp_path / "rows.jsonl", np.arange(blocks * size) + 1), shuffle_buffer=32)

    def stream(rank, ranks):
        return TrainingStream(arguments, 7, rank, ranks, encoder=NumberEncoder(), batch_size=batch_size)

    used, held, positions = set(), set(), []
    for rank in range(readers):
        samples = take(stream(rank, readers), 4 * (12 + 5 * rank))
        used |= {sample["number"] for sample in samples}
        positions.append(samples[-1]["position"])
        held |= {block * size + row for _, _, block, row in positions[-1][1]["pool"]}
    streams = [stream(rank, now) for rank in range(now)]
    for resumed in streams:
        resumed.resume(20, as_stored(positions))
    first = streams[0].divide_anew(now, is_first=False)["first"][0]
    order = passes([size] * blocks, 0, 1, seed=7)
    left = {order.block(number) * size + row for number in range(first, blocks) for row in range(size)}
    after = set()
    for rank, resumed in enumerate(streams):
        rows = size * len(range(first + rank, blocks, now))
        after |= {sample["number"] for sample in take(resumed, rows or 1)} if batch_size == 1 or not rank else set()
    again, skipped = map(int, re.search(r"rows: (\d+) rows come again, (\d+) are skipped", caplog.text).groups())
    assert again == len(used & left) and skipped == len(held - left)
    assert used | held | left == set(range(blocks * size)) and first > 0
    assert batch_size > 1 or left <= after
    assert caplog.text.count("readers (ranks x workers) are now") == 1


def test_another_mix_is_refused(tmp_path):
    paths = [write_texts(tmp_path / f"{name}.jsonl", [3] * count) for name, count in (("a", 20), ("b", 30))]
    position = take(TrainingStream(texts(*paths), 0), 1)[0]["position"]
    for mix in (texts(paths[0]), texts(*paths[::-1]), texts(*paths, sampling="rows")):
        with pytest.raises(ValueError, match="the checkpoint's mix has .* where this one has .*; resume with the same"):
            TrainingStream(mix, 0).resume(1, as_stored([position]))
    write_texts(tmp_path / "a.jsonl", [3] * 21)
    with pytest.raises(ValueError, match="'a', 'instruction', 1.0, 20, 2"):
        TrainingStream(texts(*paths), 0).resume(1, as_stored([position]))


# Rows that cannot be used


def in_millimetres(row):
    return row | {"fx": 4.2}


def transposed(row):
    return row | {"depth": png(np.full((64, 48), 3000, np.uint16))}


def narrow(row):
    return row | {"image": png(np.zeros((4, 160, 3), np.uint8)), "depth": png(np.full((4, 160), 3000, np.uint16))}


def truncated(row):
    file = io.BytesIO()
    Image.open(io.BytesIO(row["image"]["bytes"])).save(file, "JPEG")
    return row | {"image": {"bytes": file.getvalue()[:1500], "path": None}}


def not_a_number(row):
    return row | {"fx": float("nan")}


BAD = {
    in_millimetres: "pass px (not mm) at the photo's own size",
    transposed: "both must show the same view",
    narrow: "past an aspect ratio of 30",
    truncated: "image file is truncated",
    not_a_number: "fx is nan px; it must be above 0",
}


def test_a_run_passes_over_every_kind_of_bad_row(tmp_path):
    """One in 21 rows of each kind: the run ends well, as does one that resumes it; the log names every one of them."""
    mix = []
    for make, _ in BAD.items():
        rows = [make(make_row(i)) if i == 7 else make_row(i) for i in range(21)]
        mix.append({"path": write(tmp_path / make.__name__, rows, shards=1), "label": make.__name__})
    output = tmp_path / "out"
    recipe = settings(output) | {"datasets": mix, "max_bad_share": 0.1, "trains": ["depth_head"], "save_steps": 6}
    run_here(recipe | {"max_steps": 30})
    run_here(recipe | {"max_steps": 84, "resume_from_checkpoint": "last"})
    assert len(losses(output)) == 84
    named = {}
    for line in (output / "unreadable.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["id"] == "row/7"
        named[record["data_set"]] = record["reason"]
    assert named.keys() == {make.__name__ for make in BAD}
    for make, reason in BAD.items():
        assert reason in named[make.__name__]


def test_a_run_of_too_many_bad_rows_is_stopped(tmp_path):
    path = write(tmp_path / "rows", [broken(i) if i % 20 == 0 else make_row(i) for i in range(60)])
    recipe = settings(tmp_path / "out", path=path) | {"max_bad_share": 0.02, "trains": ["depth_head"], "max_steps": 90}
    with pytest.raises(ValueError, match="more than max_bad_share 0.02"):
        run_here(recipe)


def test_64_readers_of_data_with_one_bad_row_in_a_thousand_are_not_stopped(tmp_path):
    """The share is of all readers' rows together; of one reader's, some pass any limit that it is held to."""
    path = write_texts(tmp_path / "rows.jsonl", [3] * 4000, bad=(500, 1500, 2500, 3500))
    readers = [iter(TrainingStream(texts(path), 0, rank, 64, encoder=NumberEncoder())) for rank in range(64)]
    stream, alone = TrainingStream(texts(path), 0), 0
    trainer = SimpleNamespace(train_dataset=stream, set_names={"train": ["rows"]})
    for _ in range(60):
        positions = [next(reader)["position"] for reader in readers]
        DepthSFTTrainer.judge_refused_rows(trainer, stream.bad_rows(positions).values())
        alone += any(bad > 0.01 * read for read, bad in (stream.bad_rows([one])["rows"] for one in positions))
    read, bad = stream.bad_rows(positions)["rows"]
    assert read == 64 * 60 + bad and 1 <= bad <= 8 and alone > 0


def test_conversations_beyond_max_length_are_refused(tmp_path):
    path = write_texts(tmp_path / "rows.jsonl", [10, 500])
    stream = TrainingStream(texts(path), 0, log=tmp_path / "log", encoder=Encoder(byte_processor(), max_length=100))
    assert len({len(sample["input_ids"]) for sample in take(stream, 4)}) == 1
    record = json.loads((tmp_path / "log").read_text().splitlines()[0])
    assert re.search("has 5.. tokens, more than max_length 100", record["reason"]) and record["id"].endswith("row 1")


def test_a_shard_that_is_damaged_is_as_many_bad_rows(tmp_path):
    path = Path(write(tmp_path / "rows", [make_row(i) for i in range(40)], shards=2))
    shard = sorted((path / "data").iterdir())[0]
    content = bytearray(shard.read_bytes())
    content[200:6000] = bytes(5800)
    shard.write_bytes(content)
    stream = TrainingStream(DataArguments(datasets=[{"path": str(path)}]), 0, log=tmp_path / "log")
    read, refused = stream.bad_rows([take(stream, 60)[-1]["position"]])["rows"]
    assert read == 60 + refused and refused >= 40
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        shard.write_bytes(content[:5000])
        DataSource(str(path)).open()


# Evaluation


def test_a_held_out_row_that_cannot_be_used_counts_nowhere(tmp_path):
    path = write(tmp_path / "rows", [broken(i) if i == 2 else make_row(i) for i in range(5)], shards=1)
    arguments = DataArguments(
        eval_datasets=[{"path": path}, {"path": path, "kind": "qa"}], max_eval_samples=4, flip=True
    )
    samples = EvalSamples(arguments, Encoder(byte_processor()), tmp_path / "log")
    assert len(samples) == 8 and [samples[i]["set"] for i in range(8)] == [0] * 4 + [1] * 4
    batch = Collator(byte_processor())([samples[i] for i in range(8)])
    answers = (batch["labels"] != -100).any(1).tolist()
    assert answers == [True, True, False, True] * 2
    assert batch["image_sets"] == [0] * 3 + [1] * 3 and batch["row_sets"] == [0] * 4 + [1] * 4
    assert [bool(label.any()) for label in batch["depth_labels"]] == [True] * 3 + [False] * 3
    assert {json.loads(line)["id"] for line in (tmp_path / "log").read_text().splitlines()} == {"row/2"}


# Settings of a data set


def test_settings_of_one_data_set(tmp_path):
    """Those of a data set come first, then the mix's; what is held out is never augmented."""
    arguments = DataArguments(
        datasets=[{"path": "a"}, {"path": "b", "max_pixels": 4096, "flip": False, "color_jitter": 0.1}],
        eval_datasets=[{"path": "a"}],
        max_pixels=8192,
        flip=True,
        focal_jitter=0.2,
    )
    names = ("max_pixels", "flip", "color_jitter", "focal_jitter")
    first, second, held_out = (
        tuple(getattr(source, name) for name in names) for source in (*arguments.datasets, *arguments.eval_datasets)
    )
    assert first == (8192, True, 0.0, 0.2) and second == (4096, False, 0.1, 0.2) and held_out == (8192, False, 0.0, 0.0)


def test_max_pixels_of_each_data_set_is_kept(tmp_path):
    path = write(tmp_path / "rows", [make_row(i, size=(256, 192)) for i in range(4)], shards=1)
    chats = [{"image": row["image"], "prompt": "?", "completion": "!"} for row in (make_row(0, size=(256, 192)),)]
    encode = Encoder(byte_processor())
    tokens = []
    for entry in ({}, {"max_pixels": 16384}, {"kind": "instruction"}, {"kind": "instruction", "max_pixels": 16384}):
        (source,) = DataArguments(datasets=[{"path": path} | entry]).datasets
        row = chats[0] if source.kind == "instruction" else next(iter(source.open().take(1)))
        sample = open_sample(row, source, np.random.default_rng(0))
        estimate = encode.measure(sample)
        row = encode(load_sample(sample, source, np.random.default_rng(0)))
        tokens.append(int(row["image_grid_thw"].prod()) // 4)
        text = sum(len(part.get("text", "")) for turn in sample["messages"] for part in turn["content"])
        assert estimate - text / 4 == pytest.approx(tokens[-1], rel=0.35)  # of few tokens, rounding moves a third
    assert tokens == [48, 12, 48, 12]


def test_a_photo_without_a_focal_length_is_sized_as_qwen3_vl_does():
    """224x224, and a page: Qwen3-VL's own processor gives the same grid and the same 8-bit pixels."""
    processor = byte_processor()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 210, 3), dtype=np.uint8)
    (source,) = DataArguments(datasets=[{"path": "x", "kind": "instruction"}]).datasets
    row = {"image": png(pixels), "prompt": "What does it say?", "completion": "nothing"}
    batch = Collator(processor)([Encoder(processor)(load_sample(open_sample(row, source, None), source, None))])
    expected = processor.image_processor(Image.fromarray(pixels), return_tensors="pt")
    assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(processor.normalize_patches(batch["pixel_values"]), expected["pixel_values"])


def test_labels_name_each_data_set():
    mix = [{"path": "data", "name": "ddad"}, {"path": "data", "name": "procedural"}, {"path": "chats/train.jsonl"}]
    twice = {"path": "data", "name": "procedural", "kind": "qa"}
    entries = [*mix, twice, twice, {"path": "more/train.jsonl", "label": "more"}]
    labels = [source.label for source in DataArguments(datasets=entries).datasets]
    assert labels == ["ddad", "procedural-depth", "train", "procedural-qa-3", "procedural-qa-4", "more"]
    with pytest.raises(ValueError, match="two data sets have the same label"):
        DataArguments(datasets=[{"path": "a", "label": "x"}, {"path": "b", "label": "x"}])


def test_an_unknown_key_of_a_data_set_is_refused():
    with pytest.raises(ValueError, match=r"datasets\[1\] has unknown key wieght; the keys are path, name, "):
        DataArguments(datasets=[{"path": "a"}, {"path": "b", "wieght": 2}])
    with pytest.raises(ValueError, match=r"eval_datasets\[0\] has no path"):
        DataArguments(eval_datasets=[{"name": "a"}])


def test_rows_are_counted_without_reading_one(tmp_path, monkeypatch):
    path = write(tmp_path / "rows", [make_row(i) for i in range(30)], shards=3)
    folder = write_folder(tmp_path / "own", [make_row(i) for i in range(20)])
    lines = write_texts(tmp_path / "rows.jsonl", [3] * 50)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_, **__: pytest.fail("a row was read"))
    sources = DataArguments(
        datasets=[{"path": path}, {"path": str(folder)}, {"path": lines, "kind": "instruction"}]
    ).datasets
    sizes = [source.open().sizes for source in sources]
    assert [(each.sum(), len(each)) for each in sizes] == [(30, 3), (20, 2), (50, 4)]


# Speed


def test_a_large_jpeg_is_decoded_at_the_size_that_is_needed():
    """A half of its size: what the processor makes of it differs by less than what JPEG itself loses."""
    width, height = 640, 480
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), (x + y) / 5], 2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    row = make_row(image={"bytes": file.getvalue(), "path": None}, words=np.full((48, 64), 3000), fx=450.0)
    (source,) = DataArguments(datasets=[{"path": "x", "max_canonical_edge": 1200}]).datasets
    encode = Encoder(byte_processor())
    whole, reduced = (open_sample(row, source, None) for _ in range(2))
    encode.measure(reduced)
    assert whole["images"][0].size == (640, 480) and reduced["images"][0].size == (320, 240)
    first, second = (encode(load_sample(sample, source, None)) for sample in (whole, reduced))
    assert torch.equal(first["image_grid_thw"], second["image_grid_thw"])
    assert torch.allclose(first["depth_labels"][0], second["depth_labels"][0])
    assert (first["pixel_values"].float() - second["pixel_values"].float()).abs().mean() < 1


def test_a_batch_holds_8_bit_patches():
    processor = byte_processor()
    (source,) = DataArguments(datasets=[{"path": "x"}]).datasets
    sample = load_sample(open_sample(make_row(size=(320, 240)), source, None), source, None)
    batch = Collator(processor)([Encoder(processor)(sample)])
    floats = processor(images=sample["images"], focal_lengths=sample["focal_lengths"], return_tensors="pt")
    assert batch["pixel_values"].dtype == torch.uint8
    assert 8 * batch["pixel_values"].nbytes == floats["pixel_values"].nbytes
    assert torch.equal(processor.normalize_patches(batch["pixel_values"]), floats["pixel_values"])
