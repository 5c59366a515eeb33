import json
import pickle
import shutil
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from bench_fixtures_indoor import picture, plane_depth, plane_error, png16, put

from bench.build import load_row
from bench.geometry import change_grid_intrinsics
from bench.sources._base import BadFrame, BadRaw
from bench.sources.scannetpp import ScanNetPP, unpack

PNG, STREAM, LZ4, DEFLATE, VAL = "00aa11bb22", "11aa11bb22", "22aa11bb22", "33aa11bb22", "44aa11bb22"
FOCAL = {0: 1430.0, 60: 1425.5, 120: 1433.0}
SHARED = Path(__file__).parents[2] / "shared/data/scannetpp"
JPEG = picture(1920, 1440, "JPEG")


def depth_of(number):
    """Metres (192, 256) of a frame at its own focal length, principal point in the image's middle."""
    return plane_depth(256, 192, FOCAL.get(number, 1430.0) / 7.5, 128, 96)


def millimetres(number):
    return np.round(depth_of(number) * 1000).astype("<u2")


def deflate(data):
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS, level=1)
    return packer.compress(data) + packer.flush()


def lz4_literals(data):
    """An LZ4 block (no frame header) of one run of literals, spelled out: token, length in bytes of 255, data."""
    rest = len(data) - 15
    return b"\xf0" + b"\xff" * (rest // 255) + bytes([rest % 255]) + data


def blocks(*data):
    return b"".join(len(block).to_bytes(4, "little") + block for block in data)


def float_frame(number):
    return depth_of(number).astype("<f4").tobytes()


def write_scene(root, scene, numbers=(120, 0, 60), skip_key=None):
    folder = root / "data" / scene / "iphone"
    for number in numbers:
        put(folder / f"rgb/frame_{number:06d}.jpg", JPEG)
    cameras = {
        f"frame_{number:06d}": {"intrinsic": [[f, 0, 959.5], [0, f, 719.5], [0, 0, 1]], "pose": np.eye(4).tolist()}
        for number, f in FOCAL.items()
        if number != skip_key
    }
    put(folder / "pose_intrinsic_imu.json", json.dumps(cameras))
    return folder


@pytest.fixture
def root(tmp_path):
    put(tmp_path / "splits/nvs_sem_train.txt", f"{STREAM}\n{PNG}\n")
    put(tmp_path / "splits/nvs_sem_val.txt", f"{VAL}\n")
    for scene in (PNG, VAL):
        folder = write_scene(tmp_path, scene)
        for number in FOCAL:
            put(folder / f"depth/frame_{number:06d}.png", png16(millimetres(number)))
    return tmp_path


@pytest.fixture
def only(tmp_path):
    """A writer of a set whose only scene has this depth.bin; gives the source and its frames."""

    def write(depth_bin, numbers=(0,)):
        put(tmp_path / "splits/nvs_sem_train.txt", PNG)
        put(write_scene(tmp_path, PNG, numbers) / "depth.bin", depth_bin)
        source = ScanNetPP(tmp_path)
        return source, list(source.frames("train"))

    return write


def stream_of(count):
    """Encoding (a) with `count` frames; those that no test looks at are zero."""
    empty = bytes(4 * 192 * 256)
    return deflate(b"".join(float_frame(number) if number in FOCAL else empty for number in range(count)))


def test_frames_are_sorted_and_split(root):
    write_scene(root, STREAM)
    source = ScanNetPP(root)
    train = [f"{scene}/frame_{number:06d}" for scene in (PNG, STREAM) for number in (0, 60, 120)]
    assert [frame.id for frame in source.frames("train")] == train
    assert {frame.scene for frame in source.frames("test")} == {VAL}


def test_extracted_depth_camera_and_image_bytes(root):
    source = ScanNetPP(root)
    for frame, (number, focal) in zip(source.frames("test"), FOCAL.items(), strict=True):
        sample = source.load(frame)
        assert sample.image == JPEG and sample.intrinsics == (focal, focal, 959.5, 719.5)
        assert sample.depth.dtype == np.float32
        assert np.array_equal(np.round(sample.depth * 1000), millimetres(number))


def test_facts_and_golden_numbers(root):
    assert (ScanNetPP.depth_range, ScanNetPP.depth_scale) == ((0.001, 10.0), 1000.0)
    assert ScanNetPP.splits == {"train": ("nvs_sem_train",), "test": ("nvs_sem_val",)}
    put(root / f"data/{VAL}/iphone/depth/frame_000000.png", png16([[0, 1000]]))
    source = ScanNetPP(root)
    sample = source.load(next(source.frames("test")))
    assert sample.depth.tolist() == [[0, 1]]
    assert [round(size * 1000 / sample.intrinsics[0]) for size in (1920, 1440)] == [1343, 1007]


def test_trap_depth_grid_is_not_the_image_grid(root):
    source = ScanNetPP(root)
    sample = source.load(next(source.frames("test")))
    height, width = sample.depth.shape
    assert (width, height) == (256, 192)
    intrinsics = change_grid_intrinsics(sample.intrinsics, (1920, 1440), (width, height))
    assert plane_error(sample.depth, intrinsics) < 1 / 1000


def test_trap_encoding_a_whole_file(only):
    source, frames = only(stream_of(121), FOCAL)
    for frame, number in zip(frames, FOCAL, strict=True):
        assert np.array_equal(source.load(frame).depth, depth_of(number).astype(np.float32))
    assert np.array_equal(source.load(frames[1]).depth, depth_of(60).astype(np.float32))  # backwards


def test_trap_encoding_b_deflate(only):
    source, frames = only(blocks(*[deflate(float_frame(number)) for number in range(61)]), (0, 60))
    for frame, number in zip(frames, (0, 60), strict=True):
        assert np.array_equal(source.load(frame).depth, depth_of(number).astype(np.float32))


def test_trap_encoding_b_lz4(only):
    lz4_block = pytest.importorskip("lz4.block", reason="the optional package lz4 is not installed")
    packed = [lz4_block.compress(millimetres(number).tobytes(), store_size=False) for number in range(61)]
    packed[0] = lz4_literals(millimetres(0).tobytes())
    source, frames = only(blocks(*packed), (0, 60))
    for frame, number in zip(frames, (0, 60), strict=True):
        assert np.array_equal(np.round(source.load(frame).depth * 1000), millimetres(number))


def test_blocks_of_both_kinds_in_one_file(only):
    pytest.importorskip("lz4.block", reason="the optional package lz4 is not installed")
    first, other = lz4_literals(millimetres(0).tobytes()), deflate(float_frame(60))
    source, frames = only(blocks(first, *[other] * 60), (0, 60))
    assert source.load(frames[0]).depth == pytest.approx(depth_of(0), abs=0.0006)
    assert np.array_equal(source.load(frames[1]).depth, depth_of(60).astype(np.float32))


def test_missing_lz4_says_what_to_install(only, monkeypatch):
    monkeypatch.setitem(sys.modules, "lz4", None)
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    source, [frame] = only(blocks(lz4_literals(millimetres(0).tobytes())))
    with pytest.raises(ImportError, match="pip install lz4"):
        load_row(source, "train", frame)


def test_trap_missing_json_key_is_listed_and_moves_no_other(root):
    write_scene(root, VAL, skip_key=60)
    source = ScanNetPP(root)
    first, missing, last = source.frames("test")
    with pytest.raises(BadFrame, match="frame_000060"):
        load_row(source, "test", missing)
    assert [source.load(frame).intrinsics[0] for frame in (first, last)] == [FOCAL[0], FOCAL[120]]


def test_trap_depth_one_frame_shorter_than_the_images(only):
    source, frames = only(stream_of(60), (0, 60))
    assert source.load(frames[0]).depth.any()
    with pytest.raises(BadFrame, match="60 readable frames, none of number 60"):
        load_row(source, "test", frames[1])


def test_trap_one_frame_a_second_of_a_full_extraction(root):
    for number in (1, 30, 59, 61):
        put(root / f"data/{VAL}/iphone/rgb/frame_{number:06d}.jpg", JPEG)
    assert [frame.data[0] for frame in ScanNetPP(root).frames("test")] == [0, 60, 120]


@pytest.mark.parametrize("video", ["rgb.mkv", "rgb.mp4"])
def test_trap_video_that_was_not_extracted(root, video):
    shutil.rmtree(root / f"data/{VAL}/iphone/rgb")
    put(root / f"data/{VAL}/iphone" / video, b"")
    source = ScanNetPP(root)
    [frame] = source.frames("test")
    with pytest.raises(BadFrame, match="extract the video's frames with the official toolkit"):
        load_row(source, "test", frame)


def test_missing_depth_is_a_missing_file(root):
    (root / f"data/{VAL}/iphone/depth/frame_000000.png").unlink()
    source = ScanNetPP(root)
    with pytest.raises(FileNotFoundError):
        load_row(source, "test", next(source.frames("test")))


def test_floats_that_are_no_depth_become_zero(only):
    depth = depth_of(0).astype("<f4")
    depth[0, :4] = np.nan, np.inf, -np.inf, -1
    source, [frame] = only(blocks(deflate(depth.tobytes())))
    loaded = source.load(frame).depth
    assert not loaded[0, :4].any() and np.isfinite(loaded).all() and np.count_nonzero(loaded) == loaded.size - 4


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        b"not a depth file at all",
        blocks(deflate(float_frame(0)))[:-1],  # cut off
        stream_of(1)[:-40],
        deflate(float_frame(0)[:-4]),
        blocks(b""),
        (2**32 - 1).to_bytes(4, "little") + b"x",  # a size of 4 GiB
    ],
)
def test_broken_depth_bin(only, data):
    source, [frame] = only(data)
    with pytest.raises(BadFrame):
        load_row(source, "train", frame)


@pytest.mark.parametrize("encoding", ["deflate", "lz4"])
def test_block_that_unpacks_to_too_much_costs_no_memory(encoding):
    lz4_block = pytest.importorskip("lz4.block", reason="the optional package lz4 is not installed")
    data = bytes(50_000_000)
    block = deflate(data) if encoding == "deflate" else lz4_block.compress(data, store_size=False)
    tracemalloc.start()
    with pytest.raises(BadFrame):
        unpack(block, "a bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    "intrinsic", [None, 5, [[1, 2], [3, 4]], [["a", 0, 1], [0, 1, 1], [0, 0, 1]], [[1e999, 0, 1], [0, 1, 1], [0, 0, 1]]]
)
def test_hostile_intrinsics(root, intrinsic):
    cameras = {"frame_000000": {"intrinsic": intrinsic}}
    put(root / f"data/{VAL}/iphone/pose_intrinsic_imu.json", json.dumps(cameras))
    source = ScanNetPP(root)
    with pytest.raises(BadFrame, match="frame_000000"):
        load_row(source, "test", next(source.frames("test")))


@pytest.mark.parametrize("text", ["", "{"])
def test_broken_json_leaves_every_frame_listed(root, text):
    put(root / f"data/{VAL}/iphone/pose_intrinsic_imu.json", text)
    source = ScanNetPP(root)
    frames = list(source.frames("test"))
    assert len(frames) == 3
    with pytest.raises(BadFrame, match="pose_intrinsic_imu.json"):
        load_row(source, "test", frames[1])


def test_resized_image_is_refused(root):
    put(root / f"data/{VAL}/iphone/rgb/frame_000000.jpg", picture(1280, 960, "JPEG"))
    source = ScanNetPP(root)
    with pytest.raises(BadFrame, match="1280x960"):
        load_row(source, "test", next(source.frames("test")))


def test_split_file_with_a_path_is_refused(root):
    put(root / "splits/nvs_sem_val.txt", "../../../etc")
    source = ScanNetPP(root)
    (frame,) = source.frames("test")
    with pytest.raises(BadFrame, match="leads out"):
        load_row(source, "test", frame)


def test_missing_split_file(root):
    (root / "splits/nvs_sem_val.txt").unlink()
    with pytest.raises(BadRaw, match="nvs_sem_val.txt"):
        list(ScanNetPP(root).frames("test"))


def test_source_can_be_pickled_amid_a_stream(only):
    source, frames = only(stream_of(61), (0, 60))
    source.load(frames[0])
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.load(frames[1]).depth, source.load(frames[1]).depth)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real frames at ../shared/data/scannetpp are missing")
def test_real_frames(tmp_path):
    records = [json.loads(line) for line in (SHARED / "annotations.jsonl").read_text().splitlines()][:4]
    put(tmp_path / "splits/nvs_sem_train.txt", "\n".join(record["scene_id"] for record in records))
    cameras = {}
    for record in records:
        key, folder = Path(record["image"]).stem[11:], tmp_path / "data" / record["scene_id"] / "iphone"
        put(folder / f"rgb/{key}.jpg", (SHARED / "rgb" / record["image"]).read_bytes())
        put(folder / f"depth/{key}.png", (SHARED / "depth" / record["depth_path"]).read_bytes())
        rows = [[record["original_fx"], 0, 959.5], [0, record["original_fx"], 719.5], [0, 0, 1]]
        cameras.setdefault(record["scene_id"], {})[key] = {"intrinsic": rows}
        put(folder / "pose_intrinsic_imu.json", json.dumps(cameras[record["scene_id"]]))
    source = ScanNetPP(tmp_path)
    samples = {frame.id: source.load(frame) for frame in source.frames("train")}
    assert len(samples) == len(records)
    for record in records:
        depth = samples[f"{record['scene_id']}/{Path(record['image']).stem[11:]}"].depth
        assert [float(depth[v, u]) for u, v in record["pixel_coords"]] == pytest.approx(record["depth"], abs=1e-4)
