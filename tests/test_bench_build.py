import functools
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from bench_fixtures_toy import DEPTH_SIZE, INTRINSICS, SIZE, HidingToy, Toy, bomb, plane, write_ibims1, write_toy
from PIL import Image

from bench import build, card, manifest, sampling, sources
from bench.__main__ import main
from bench.depthvlm_bench import FEATURES, VERSION, DepthVLMBench
from bench.files import shared_folder
from bench.sources._base import BadFrame, BadRaw, Frame, Sample

TESTS = Path(__file__).parent
GROUPS = {"hall/left": 7, "hall/right": 5, "yard/left": 9}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "SHARD_IMAGES", 4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(out, raw, split="test", source=Toy, max_frames=None, seed=0, keep_hidden=False, **options):
    reader = build.SourceReader(source, str(raw), split, seed, keep_hidden)
    parameters, items = reader.plan(max_frames)
    return build.write_split(out, source, split, reader, parameters, items, **options)


def load(out, name="toy", split="test", **options):
    return datasets.load_dataset(str(out), name, split=split, **options)


def contents(out, without=("README.md",)):
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in without)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


# What is written


def test_load_dataset_equals_what_was_built(tmp_path):
    raw = write_toy(tmp_path / "raw", GROUPS)
    write_toy(raw, {"street/left": 3}, "train")
    record = run(tmp_path / "out", raw)
    run(tmp_path / "out", raw, "train")
    rows = load(tmp_path / "out")
    assert rows.features == FEATURES and len(rows) == record["written"] == 21
    assert [row["id"] for row in rows] == [frame.id for frame in Toy(raw).frames("test")]
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    for row, file in zip(rows, undecoded, strict=True):
        number = int(row["id"][-3:])
        true = plane(number)
        true[(true < 0.5) | (true > 9.0)] = 0
        depth = np.asarray(row["depth"])
        assert row["depth"].mode == "I;16" and depth.shape == DEPTH_SIZE[::-1]
        np.testing.assert_allclose(depth / row["depth_scale"], true, atol=0.0005 + 1e-6)
        assert ((depth > 0) == (true > 0)).all()
        assert row["image"].size == SIZE and row["depth_type"] == "z"
        assert file["image"]["bytes"] == (raw / "test" / f"{row['id']}.jpg").read_bytes()  # never re-encoded
        assert (row["fx"], row["fy"], row["cx"], row["cy"]) == INTRINSICS
        assert (row["source"], row["split"], row["scene"]) == ("toy", "test", row["id"].split("/")[0])
        assert row["camera"] == row["id"].split("/")[1]
        assert row["qa"] == {"kind": ["count"], "question": ["How many?"], "answer": [str(len(row["id"]))]}
        for u, v, metres in zip(row["points_u"], row["points_v"], row["points_depth"], strict=True):
            column, line = (u + 0.5) * DEPTH_SIZE[0] / SIZE[0] - 0.5, (v + 0.5) * DEPTH_SIZE[1] / SIZE[1] - 0.5
            assert metres == depth[round(line), round(column)] / 1000.0
            assert abs(metres - (0.25 + 0.5 * column + 0.0625 * line + 0.001 * number)) < 0.001
    assert list(load(tmp_path / "out", streaming=True)) == list(rows)
    train = load(tmp_path / "out", split="train")
    assert len(train) == 3 and all(row["points_u"] == row["points_depth"] == [] for row in train)


def test_points_of_a_split_add_up(tmp_path):
    raw = write_toy(tmp_path / "raw", {"a/x": 200})
    record = run(tmp_path / "out", raw, max_frames=60)
    counts = [len(row["points_u"]) for row in load(tmp_path / "out")]
    assert counts == [167] * 40 + [166] * 20 and record["points"] == 10_000


def test_images_are_balanced_over_scenes_and_cameras(tmp_path):
    raw = write_toy(tmp_path / "raw", GROUPS)
    run(tmp_path / "out", raw, max_frames=9)
    rows = load(tmp_path / "out")
    for group in GROUPS:
        assert sum(f"{row['scene']}/{row['camera']}" == group for row in rows) == 3


def test_row_groups_are_moderate(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SHARD_IMAGES", 20)
    monkeypatch.setattr(build, "ROW_GROUP_IMAGES", 8)
    run(tmp_path / "out", write_toy(tmp_path / "raw", {"a/x": 20}))
    meta = pq.read_metadata(tmp_path / "out" / "toy" / "test-00000-of-00001.parquet")
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [8, 8, 4]


def test_record_holds_seed_sampling_and_counts(tmp_path):
    raw = write_toy(tmp_path / "raw", GROUPS)
    record = run(tmp_path / "out", raw, seed=7, max_frames=6)
    assert record == json.loads((tmp_path / "out" / "toy" / "test.json").read_text())
    parameters = record["parameters"]
    assert (parameters["seed"], parameters["images"], parameters["images_limit"], parameters["points"]) == (
        7,
        6,
        6,
        10_000,
    )
    assert (parameters["images_listed"], parameters["groups"], parameters["version"]) == (21, 3, VERSION)
    assert (record["written"], record["shards"], record["skipped"], record["finished"]) == (6, 2, [], True)
    words = [np.asarray(row["depth"]) for row in load(tmp_path / "out")]
    assert record["valid_pixels"] == sum((w > 0).sum() for w in words) and record["pixels"] == sum(
        w.size for w in words
    )


def test_hidden_points_stay_where_asked(tmp_path):
    raw = write_toy(tmp_path / "raw", {"a/x": 1})
    run(tmp_path / "out", raw, source=HidingToy)
    run(tmp_path / "kept", raw, source=HidingToy, keep_hidden=True)
    assert (np.asarray(load(tmp_path / "out")[0]["depth"])[0, :5] == 0).all()
    assert (np.asarray(load(tmp_path / "kept")[0]["depth"])[0, :5] == 3000).all()
    with pytest.raises(ValueError, match="no rule for hidden points"):
        run(tmp_path / "other", raw, keep_hidden=True)


def test_card_names_configs_groups_and_licences(tmp_path):
    class Ibims(Toy):
        name = "ibims1"

    raw = write_toy(tmp_path / "raw", {"a/x": 2})
    run(tmp_path / "out", raw)
    run(tmp_path / "out", raw, source=Ibims)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Licence: none" in text and "Nobody: Toy, 2020" in text and "not in this folder: argoverse2, ddad" in text
    assert datasets.get_dataset_config_names(str(tmp_path / "out")) == ["ibims1", "toy", "paper_eval"]
    assert set(datasets.load_dataset(str(tmp_path / "out"))["test"]["source"]) == {"ibims1"}  # paper_eval by default
    assert card.section("Columns").count("points_u") >= 1


# Determinism


def test_order_of_files_and_processes_change_nothing(tmp_path):
    raw = write_toy(tmp_path / "raw", GROUPS)
    backwards = write_toy(tmp_path / "backwards", dict(reversed(GROUPS.items())), backwards=True)
    run(tmp_path / "one", raw, max_frames=14)
    run(tmp_path / "two", backwards, max_frames=14)
    run(tmp_path / "three", raw, max_frames=14, num_proc=3)
    assert contents(tmp_path / "one", ()) == contents(tmp_path / "two", ()) == contents(tmp_path / "three", ())


def test_seed_changes_points_and_a_frame_s_points_depend_on_no_other_frame(tmp_path):
    raw = write_toy(tmp_path / "raw", {"a/x": 60})
    for out, seed in (("zero", 0), ("again", 0), ("one", 1)):
        run(tmp_path / out, raw, seed=seed)
    zero, again, one = (load(tmp_path / out)["points_u"][:] for out in ("zero", "again", "one"))
    assert zero == again and all(a != b for a, b in zip(zero, one, strict=True))
    frame = list(Toy(raw).frames("test"))[45]
    row, _ = build.SourceReader(Toy, str(raw), "test")(frame, 166)
    assert row["points_u"].tolist() == zero[45]


# Frames that cannot be used


def spoil(raw):
    """Break five of ten frames, each in its own way; returns what their reasons must say."""
    folder = raw / "test" / "a" / "x"
    (folder / "001.npy").unlink()
    depth = plane(0)
    depth[3, 3] = np.nan
    np.save(folder / "003.npy", depth)
    data = (folder / "004.jpg").read_bytes()
    (folder / "004.jpg").write_bytes(data[:-30])
    (folder / "006.jpg").write_bytes(bomb())
    np.save(folder / "008.npy", np.full(DEPTH_SIZE[::-1], 50.0, np.float32))
    return {"001": "001.npy", "003": "NaN", "004": "broken", "006": "bomb", "008": "no depth within 0.5..9.0"}


def test_bad_frames_are_listed_with_reason_and_counted(tmp_path):
    raw = write_toy(tmp_path / "raw", {"a/x": 10})
    reasons = spoil(raw)
    record = run(tmp_path / "out", raw)
    assert record["written"] == len(load(tmp_path / "out")) == 5
    assert {frame["id"][-3:] for frame in record["skipped"]} == set(reasons)
    for frame in record["skipped"]:
        assert reasons[frame["id"][-3:]] in frame["reason"], frame
    assert record["points"] < 10_000  # the points of a missing image are not given to others


def test_strict_makes_a_skipped_frame_an_error(tmp_path):
    raw = write_toy(tmp_path / "raw", {"a/x": 10})
    spoil(raw)
    for num_proc in (1, 2):
        with pytest.raises(build.Skipped, match="a/x/00"):
            run(tmp_path / "out", raw, strict=True, num_proc=num_proc)
    run(tmp_path / "out", raw)
    with pytest.raises(build.Skipped, match="5 frames were skipped by an earlier run"):
        run(tmp_path / "out", raw, strict=True)


def test_a_shard_of_bad_frames_alone_still_loads(tmp_path):
    raw = write_toy(tmp_path / "raw", {"a/x": 8})
    for n in range(4):
        (raw / "test" / "a" / "x" / f"{n:03d}.npy").unlink()
    assert run(tmp_path / "out", raw)["written"] == 4
    assert len(load(tmp_path / "out")) == len(list(load(tmp_path / "out", streaming=True))) == 4


def test_unforeseen_error_of_a_reader_is_listed_with_its_place(tmp_path):
    class Broken(Toy):
        def load(self, frame):
            return super().load(frame) if frame.id == "a/x/000" else {}[frame.id]

    (skipped,) = run(tmp_path / "out", write_toy(tmp_path / "raw", {"a/x": 2}), source=Broken)["skipped"]
    assert skipped["reason"].startswith("KeyError: 'a/x/001'") and "test_bench_build.py:" in skipped["reason"]


def test_nothing_usable_is_an_error(tmp_path):
    class Broken(Toy):
        def load(self, frame):
            raise BadFrame("no good")

    with pytest.raises(BadRaw, match="none of the 2 test frames of toy can be used; the first, a/x/000: no good"):
        run(tmp_path / "out", write_toy(tmp_path / "raw", {"a/x": 2}), source=Broken)


def turned():
    image, exif = Image.fromarray(np.zeros((8, 10, 3), np.uint8)), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": np.full((4, 5), np.inf, np.float32)}, "infinite"),
        ({"depth": np.full((4, 5), -1, np.float32)}, "negative"),
        ({"depth": np.zeros((4, 5), np.float32)}, "no depth within"),
        ({"depth": np.zeros((4, 5, 3), np.float32)}, "shape"),
        ({"depth": np.zeros((0, 5), np.float32)}, "shape"),
        ({"depth": np.broadcast_to(np.float32(1), (100_000, 1000))}, "shape"),
        ({"intrinsics": (30.0, float("nan"), 1.0, 1.0)}, "finite"),
        ({"intrinsics": (0.0, 30.0, 1.0, 1.0)}, "fx, fy > 0"),
        ({"image": b"GIF89a"}, "not a readable"),
        ({"image": turned()}, "EXIF orientation 6"),
    ],
)
def test_samples_are_checked(change, message):
    sample = Sample(np.zeros((8, 10, 3), np.uint8), np.full((4, 5), 2, np.float32), INTRINSICS)
    for key, value in change.items():
        setattr(sample, key, value)
    with pytest.raises(BadFrame, match=message):
        build.make_row(Toy, "test", Frame("a", ""), sample)


def test_frame_id_scene_and_camera_must_be_safe():
    sample = Sample(np.zeros((8, 10, 3), np.uint8), np.full((4, 5), 2, np.float32), INTRINSICS)
    for frame in (Frame("a b\n", ""), Frame("a", "\ud800"), Frame("a", "", "\x1b[2J")):
        with pytest.raises(BadFrame, match="frame id|not printable"):
            build.make_row(Toy, "test", frame, sample)


def test_range_bounds_are_included_and_what_is_outside_is_never_clipped():
    depth = np.array([[0.4999, 0.5, 5.0, 9.0, 9.0001]], np.float32)
    assert build.encode_depth(depth, (0.5, 9.0), 1000.0, "f").tolist() == [[0, 500, 5000, 9000, 0]]


def test_depth_range_that_overflows_16_bits_is_refused(tmp_path):
    class Far(Toy):
        depth_range = (0.5, 100.0)

    with pytest.raises(ValueError, match="16 bits"):
        run(tmp_path / "out", write_toy(tmp_path / "raw", {"a/x": 1}), source=Far)


def test_empty_split_and_unknown_split_are_refused(tmp_path):
    raw = write_toy(tmp_path / "raw", {"a/x": 1})
    (raw / "train").mkdir()
    with pytest.raises(BadRaw, match="no train frames"):
        run(tmp_path / "out", raw, "train")
    with pytest.raises(ValueError, match="no split 'val'"):
        run(tmp_path / "out", raw, "val")


def test_two_frames_of_one_id_are_refused(tmp_path):
    class Twice(Toy):
        def frames(self, split):
            for frame in super().frames(split):
                yield Frame("same", "", "", frame.data)

    with pytest.raises(ValueError, match="must be unique"):
        run(tmp_path / "out", write_toy(tmp_path / "raw", {"a/x": 2}), source=Twice)


# Interrupted builds

CHILD = """
import sys
sys.path[:0] = {paths!r}
from bench import build
import bench.sources
from bench_fixtures_toy import SlowToy
if __name__ == "__main__":
    build.SHARD_IMAGES = 4
    bench.sources.get = lambda name: SlowToy
    from bench.__main__ import main
    sys.exit(main(sys.argv[1:]))
"""


def start(tmp_path, raw, out, num_proc):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(paths=[str(TESTS.parent), str(TESTS)]))
    command = [sys.executable, script, "build", "toy", "--raw", raw, "--out", out, "--split", "test"]
    command += ["--num-proc", str(num_proc)]
    # a shell's background jobs, and what they start, ignore Ctrl-C: not so the build under test
    listen = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listen)


def wait_for_shards(out, n, process):
    deadline = time.monotonic() + 60
    while len(list(out.glob("toy/test-*.json"))) < n:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def wait_for_end_of_group(group):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("worker processes outlived the build")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_killed_build_goes_on_without_redoing_finished_shards(tmp_path, num_proc):
    raw, out = write_toy(tmp_path / "raw", {"a/x": 60}), tmp_path / "out"
    process = start(tmp_path, raw, out, num_proc)
    wait_for_shards(out, 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for_end_of_group(process.pid)
    finished = [path.with_suffix(".parquet") for path in out.glob("toy/test-*.json")]
    assert 2 <= len(finished) < 15 and not json.loads((out / "toy" / "test.json").read_text())["finished"]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}
    (out / "toy" / "test-00014-of-00015.parquet").write_bytes(b"half")  # in place, but its report was never written
    (out / "toy" / ".test-00013-of-00015.parquet.99.tmp").write_bytes(b"half")

    record = run(out, raw)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished} == before
    assert record["written"] == 60
    run(tmp_path / "whole", raw)
    assert contents(out, ()) == contents(tmp_path / "whole", ())


@pytest.mark.parametrize("num_proc", [1, 2])
def test_ctrl_c_leaves_a_resumable_build_and_exits_130(tmp_path, num_proc):
    raw, out = write_toy(tmp_path / "raw", {"a/x": 60}), tmp_path / "out"
    process = start(tmp_path, raw, out, num_proc)
    wait_for_shards(out, 1, process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "go" in stderr and len(stderr.strip().splitlines()) == 1
    wait_for_end_of_group(process.pid)
    assert run(out, raw)["written"] == 60


def test_other_parameters_are_refused_in_a_sentence(tmp_path):
    raw = write_toy(tmp_path / "raw", GROUPS)
    run(tmp_path / "out", raw)
    with pytest.raises(ValueError, match=r"built with seed 0 \(now 3\); give another --out, or remove .*toy/test\*"):
        run(tmp_path / "out", raw, seed=3)
    with pytest.raises(ValueError, match="images_limit 1000"):
        run(tmp_path / "out", raw, max_frames=5)
    write_toy(raw, {"hall/left": 8})
    with pytest.raises(ValueError, match="listing"):
        run(tmp_path / "out", raw)


def test_a_folder_whose_frames_changed_names_is_refused(tmp_path):
    raw = write_toy(tmp_path / "raw", {"a/x": 8})
    run(tmp_path / "out", raw)
    for path in sorted((raw / "test" / "a" / "x").glob("003.*")):
        path.rename(path.with_stem("0035"))
    with pytest.raises(ValueError, match="other frames"):
        run(tmp_path / "out", raw)


# Several builds of one folder, and what is left of broken ones


@pytest.mark.parametrize(("builds", "num_proc"), [(2, 1), (2, 2), (4, 1)])
def test_builds_at_once_and_one_killed_leave_what_a_single_one_leaves(tmp_path, builds, num_proc):
    raw, out = write_toy(tmp_path / "raw", {"a/x": 60}), tmp_path / "out"
    processes = [start(tmp_path, raw, out, num_proc) for _ in range(builds)]
    wait_for_shards(out, 3, processes[0])
    processes[0].send_signal(signal.SIGKILL)
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if process is processes[0] else 0), stderr
        assert "again" not in stderr and "Traceback" not in stderr
    run(tmp_path / "single", raw)
    assert contents(out, ()) == contents(tmp_path / "single", ())


def test_what_another_build_is_writing_is_left_alone(tmp_path):
    raw, out = write_toy(tmp_path / "raw", {"a/x": 4}), tmp_path / "out"
    run(out, raw)
    unfinished = out / "toy" / ".test-00000-of-00001.parquet.0123abcd.tmp"
    with shared_folder(out, ()):  # as another build holds it
        unfinished.write_bytes(b"half")
        run(out, raw)
        assert unfinished.exists()
    run(out, raw)
    assert not unfinished.exists()


def test_builds_of_two_sources_at_once_are_both_in_the_card(tmp_path, monkeypatch):
    """The card is written with what there is, and again if another build ended meanwhile."""
    raw, out, render = write_toy(tmp_path / "raw", {"a/x": 4}), tmp_path / "out", card.render

    def slow(folder):
        text = render(folder)
        monkeypatch.setattr(card, "render", render)
        run(out, write_ibims1(tmp_path / "ibims1"), source=sources.get("ibims1"))  # begins and ends meanwhile
        return text

    monkeypatch.setattr(card, "render", slow)
    run(out, raw)
    assert datasets.get_dataset_config_names(str(out)) == ["ibims1", "toy", "paper_eval"]


def broken_record(folder):
    (folder / "test-00001-of-00003.json").write_bytes(b"")


def truncated_record(folder):
    path = folder / "test-00001-of-00003.json"
    path.write_bytes(path.read_bytes()[:100])


def truncated_shard(folder):
    path = folder / "test-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def changed_shard(folder):
    path = folder / "test-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:1000] + b"?" + path.read_bytes()[1001:])


def broken_summary(folder):
    (folder / "test.json").write_bytes(b"")


def changed_summary(folder):
    text = (folder / "test.json").read_text()
    (folder / "test.json").write_text(text.replace('"seed": 0', '"seed": 1'))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (broken_record, "test-00001-of-00003.json"),
        (truncated_record, "test-00001-of-00003.json"),
        (truncated_shard, "test-00001-of-00003.parquet"),
        (changed_shard, "test-00001-of-00003.parquet"),
        (broken_summary, "test.json"),
        (changed_summary, "test.json"),
    ],
)
def test_what_is_broken_is_built_again_and_said(tmp_path, caplog, capsys, damage, named):
    raw, out = write_toy(tmp_path / "raw", {"a/x": 12}), tmp_path / "out"
    run(out, raw)
    whole = contents(out, ())
    untouched = {path: path.stat().st_mtime_ns for path in out.glob("toy/test-0000[02]*")}
    damage(out / "toy")
    assert main(["verify", str(out)]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert len(problems) >= 1 and named in problems[0]
    run(out, raw)
    assert named in caplog.text and "again" in caplog.text
    assert contents(out, ()) == whole
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert main(["verify", str(out)]) == 0


def test_shards_of_other_parameters_are_refused_without_the_summary(tmp_path):
    raw = write_toy(tmp_path / "raw", GROUPS)
    run(tmp_path / "out", raw)
    (tmp_path / "out" / "toy" / "test.json").unlink()
    with pytest.raises(ValueError, match=r"built with seed 0 \(now 3\)"):
        run(tmp_path / "out", raw, seed=3)


# Manifests


def test_records_hold_hashes_rows_frames_parameters_versions_and_seed(tmp_path):
    raw, out = write_toy(tmp_path / "raw", GROUPS), tmp_path / "out"
    record = run(out, raw, seed=7)
    assert record["versions"]["pyarrow"] == pyarrow.__version__ and record["parameters"]["seed"] == 7
    assert record["images_of"] == 21 and sum(file["rows"] for file in record["files"]) == 21
    hashes = []
    for file in record["files"]:
        content = (out / "toy" / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        shard = json.loads((out / "toy" / file["name"]).with_suffix(".json").read_text())
        assert shard["parameters"] == record["parameters"] and shard["versions"] == record["versions"]
        assert list(shard["rows"]) == pq.read_table(out / "toy" / file["name"])["id"].to_pylist()
        hashes += shard["rows"].values()
    assert record["content"] == hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    assert record["content"][:12] in (out / "README.md").read_text()


def test_the_hash_of_the_rows_is_of_every_column_and_of_no_file(tmp_path, monkeypatch):
    raw = write_toy(tmp_path / "raw", {"a/x": 60})
    record = run(tmp_path / "out", raw)
    monkeypatch.setattr(build, "SHARD_IMAGES", 17)
    assert run(tmp_path / "others", raw)["content"] == record["content"]
    assert run(tmp_path / "seed", raw, seed=1)["content"] != record["content"]
    rows = pq.read_table(tmp_path / "out" / "toy" / "test-00000-of-00015.parquet")
    row = rows.to_pylist()[0]
    changes = {"id": "b", "source": "b", "split": "b", "scene": "b", "camera": "b", "depth_type": "ray"}
    changes |= {name: {"bytes": row[name]["bytes"] + b"0", "path": None} for name in ("image", "depth")}
    changes |= {name: row[name] + 1e-9 for name in ("depth_scale", "fx", "fy", "cx", "cy")}
    changes |= {name: [1.5, *row[name][1:]] for name in ("points_u", "points_v", "points_depth")}
    changes |= {"qa": row["qa"] | {"answer": ["no"]}}
    assert set(changes) == set(FEATURES)
    for name, value in changes.items():
        assert manifest.row_hash(row | {name: value}) != manifest.row_hash(row), name


def test_images_of_is_the_number_of_the_whole_test_set(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "IMAGES", {"test": 15})
    raw = write_toy(tmp_path / "raw", {"a/x": 20})
    for max_frames, expected in ((4, 15), (None, 15), (18, 18)):
        record = run(tmp_path / f"out-{max_frames}", raw, max_frames=max_frames)
        assert record["images_of"] == expected


def test_verify_names_what_is_missing_added_unfinished_or_not_listed(tmp_path, capsys):
    raw, out = write_toy(tmp_path / "raw", {"a/x": 12}), tmp_path / "out"
    run(out, raw)

    def problems(folder=out):
        code = main(["verify", str(folder)])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
        assert code == (1 if lines else 0)
        return lines

    assert problems() == []
    shutil.copy(out / "toy" / "test-00000-of-00003.parquet", out / "toy" / "test-00000-of-00009.parquet")
    (problem,) = problems()
    assert "test-00000-of-00009.parquet is in no record, and `load_dataset` would read it; remove it" in problem
    (out / "toy" / "test-00000-of-00009.parquet").unlink()
    text = (out / "README.md").read_text()
    (out / "README.md").write_text(text.replace("toy/test-*", "toy/train-*"))
    (problem,) = problems()
    assert "README.md lists other files than the records" in problem
    (out / "README.md").write_text(text)
    (out / "toy" / "test-00002-of-00003.parquet").unlink()
    (out / "toy" / "test-00001-of-00003.json").unlink()
    missing, record = problems()
    assert "test-00001-of-00003.json" in missing and "test-00002-of-00003.parquet is missing" in record
    manifest.write_record(out / "toy" / "test.json", {"finished": False})
    assert "of a build that has not finished" in problems()[0]
    assert main(["verify", str(raw)]) == 2


# The builder


def test_builder_yields_the_rows_of_the_build(tmp_path):
    raw = write_ibims1(tmp_path / "ibims1")
    run(tmp_path / "out", raw, source=sources.get("ibims1"))
    built = load(tmp_path / "out", "ibims1")
    builder = DepthVLMBench(config_name="ibims1", data_dir=str(raw), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    assert builder.info.features == FEATURES and builder.info.license
    assert list(builder.as_dataset(split="test")) == list(built) and len(built) == 2
    one = DepthVLMBench(config_name="ibims1", data_dir=str(raw), max_frames=1, cache_dir=str(tmp_path / "cache"))
    assert len(list(one.as_streaming_dataset("test"))) == 1


def test_group_holds_the_sources_that_are_there_and_names_the_others(tmp_path, caplog):
    write_ibims1(tmp_path / "raw" / "ibims1")
    datasets.logging.enable_propagation()
    builder = DepthVLMBench(config_name="paper_eval", data_dir=str(tmp_path / "raw"), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    assert [row["source"] for row in builder.as_dataset(split="test")] == ["ibims1"] * 2
    assert "without argoverse2, ddad, eth3d, nuscenes, nyuv2, scannetpp, sunrgbd, waymo" in caplog.text


def test_builder_skips_aloud(tmp_path, caplog):
    raw = write_ibims1(tmp_path / "raw")
    (raw / "depth" / "room_01.png").unlink()
    datasets.logging.enable_propagation()
    builder = DepthVLMBench(config_name="ibims1", data_dir=str(raw), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    assert len(builder.as_dataset(split="test")) == 1 and "1 frames skipped" in caplog.text and "room_01" in caplog.text


def test_builder_has_a_config_for_every_source_and_group():
    assert list(DepthVLMBench.builder_configs) == [*sources.names(), "paper_train", "paper_eval"]


def test_groups_are_the_paper_s():
    from bench.depthvlm_bench import GROUPS as groups

    assert [len(members) for _, members in groups.values()] == [8, 9]
    assert sampling.IMAGES == {"train": 800_000, "test": 1000} and sampling.POINTS == 10_000
