"""predict.py from end to end, as a person runs it, with the checkpoint at the repository's root."""

import contextlib
import http.server
import io
import json
import math
import os
import resource
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import convert_checkpoint
import predict as script
from bench import contestants
from bench.contestants.depth_pro import DepthPro
from bench.contestants.moge import MoGe
from depthvlm import handler
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.predictions import outputs, videos

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, str(ROOT / "predict.py"), *map(str, arguments), "--output", str(tmp_path / "out")]
    return {"args": words, "text": True, "env": environment, "cwd": tmp_path}


def predict(*arguments, tmp_path):
    return subprocess.run(**command(*arguments, tmp_path=tmp_path), capture_output=True)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """predict.py in this process, in an empty folder: `run(*arguments)` gives its status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        try:
            code = script.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


def save_photo(path, size=(96, 64), seed=0, **options):
    """A photo of smooth colours, so that its depth is no noise."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


def exif_of(equivalent):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[41989] = equivalent
    return exif


def records(stdout):
    return [json.loads(line) for line in stdout.splitlines()]


def read_ply(path):
    """Vertices of a binary PLY as `(N, 6)`, read by its own header."""
    data = path.read_bytes()
    header, body = data.split(b"end_header\n", 1)
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\n")
    count = int(header.split(b"element vertex ")[1].split()[0])
    record = struct.Struct("<fffBBB")
    assert len(body) == count * record.size
    return np.array(list(record.iter_unpack(body)))


def listing(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Files of a photo


def test_files_of_a_photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    run = predict(tmp_path / "photo.png", "--focal-length", 80, tmp_path=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "90x60 px, focal length 80.0 px (given)" in run.stdout
    depth = np.asarray(Image.open(tmp_path / "out" / "photo_depth.png"))
    assert depth.dtype == np.uint16 and depth.shape == (60, 90) and depth.min() > 0
    low, middle, high = (float(word) for word in run.stdout.split("depth ")[1].split(" m ")[0].split(" / "))
    assert [low, middle, high] == pytest.approx(
        [depth.min() / 1e3, np.median(depth) / 1e3, depth.max() / 1e3], abs=0.006
    )
    cloud = read_ply(tmp_path / "out" / "photo.ply")
    # a point projects to the pixel that it came from, each to another
    columns = cloud[:, 0] / cloud[:, 2] * 80 + 44.5
    rows = cloud[:, 1] / cloud[:, 2] * 80 + 29.5
    places = np.rint(rows).astype(int), np.rint(columns).astype(int)
    np.testing.assert_allclose(columns, places[1], atol=1e-3)
    np.testing.assert_allclose(rows, places[0], atol=1e-3)
    assert len(set(zip(*places, strict=True))) == len(cloud) > 0.9 * depth.size
    np.testing.assert_array_equal(cloud[:, 3:], pixels[places])
    np.testing.assert_allclose(cloud[:, 2], depth[places] / 1e3, atol=0.00051)
    # the picture's colours are the map's: of two pixels the nearer one is never the farther one's colour
    picture = np.asarray(Image.open(tmp_path / "out" / "photo_color.png"))[:60, 75:165]
    order = np.argsort(depth.ravel(), kind="stable")
    assert (np.diff(picture.ravel()[order].astype(int)) >= -1).all() and len(np.unique(picture)) > 50


def test_every_format_says_the_same_to_independent_readers(run, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    photo = save_photo(tmp_path / "photo.png", (121, 80))
    done = run(photo, "--focal-length", "100,104", "--principal-point", "58.5,41", "--save", ",".join(outputs.SUFFIXES))
    assert done.returncode == 0, done.stderr
    stem = tmp_path / "output" / "photo"
    with np.load(f"{stem}.npz") as file:  # nothing pickled
        stored = {name: file[name] for name in file}
    depth = stored["depth"]
    assert depth.dtype == np.float32 and depth.shape == (80, 121)
    np.testing.assert_array_equal(np.load(f"{stem}.npy"), depth)
    np.testing.assert_array_equal(stored["intrinsics"], [[100, 0, 58.5], [0, 104, 41], [0, 0, 1]])
    assert stored["focal_length_source"] == "given" and json.loads(str(stored["settings"]))["dtype"] == "bfloat16"
    png = np.asarray(Image.open(f"{stem}_depth.png"))
    np.testing.assert_allclose(png / 1000, depth, atol=0.0005001)
    record = json.loads(Path(f"{stem}.json").read_text())
    assert record["depth"] == pytest.approx(
        {"min": float(depth.min()), "median": float(np.median(depth)), "max": float(depth.max())}, abs=6e-5
    )
    camera = record["camera"]
    assert (camera["fx"], camera["fy"], camera["cx"], camera["cy"]) == (100, 104, 58.5, 41)
    assert (camera["width"], camera["height"]) == (121, 80) and record["answer"] is None
    assert [Path(file).name for file in record["files"]] == [f"photo{suffix}" for suffix in outputs.SUFFIXES.values()]

    def pixels_of(points):
        u, v = points[:, 0] / points[:, 2] * 100 + 58.5, points[:, 1] / points[:, 2] * 104 + 41
        np.testing.assert_allclose(u, np.rint(u), atol=2e-3)
        np.testing.assert_allclose(v, np.rint(v), atol=2e-3)
        return np.rint(v).astype(int), np.rint(u).astype(int)

    cloud = trimesh.load(f"{stem}.ply", process=False)
    rows, columns = pixels_of(cloud.vertices)
    np.testing.assert_allclose(cloud.vertices[:, 2], depth[rows, columns], rtol=1e-6)
    image = np.asarray(Image.open(photo))
    np.testing.assert_array_equal(cloud.colors[:, :3], image[rows, columns])
    (mesh,) = trimesh.load(f"{stem}.glb", process=False).geometry.values()
    rows, columns = pixels_of(mesh.vertices * [1, -1, -1])  # glTF: y up, the camera looks along -z
    np.testing.assert_allclose(-mesh.vertices[:, 2], depth[rows, columns], rtol=1e-6)
    # trimesh counts v from the texture's lower edge
    np.testing.assert_allclose(
        mesh.visual.uv, np.stack([(columns + 0.5) / 121, 1 - (rows + 0.5) / 80], axis=1), atol=1e-6
    )
    texture = np.asarray(mesh.visual.material.baseColorTexture.convert("RGB"), dtype=int)
    assert texture.shape == image.shape and np.abs(texture - image).mean() < 3
    # seen from the camera, each face is one cell's half, front side first
    corners = mesh.vertices[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert (np.einsum("ij,ij->i", normals, corners[:, 0]) < 0).all()
    assert len(mesh.faces) > 0.9 * 2 * 79 * 120


def test_distance_beyond_the_png_is_counted(tmp_path):
    depth = np.array([[1.0, 65.5350, 65.5356, 70.0]], np.float32)
    camera = handler.describe_camera(
        {"size": (1, 4), "focal_length": 5.0, "focal_length_source": "given", "processed_size": (32, 128)}
    )
    record = outputs.write(outputs.Prediction("x", depth, camera), tmp_path / "far", ["png"], 10, False)
    assert record["too_far_for_png"] == 2
    assert np.asarray(Image.open(tmp_path / "far_depth.png")).tolist() == [[1000, 65535, 65535, 65535]]


def test_orientation_is_honoured_in_every_file(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: stored rows are columns
    Image.new("RGB", (96, 64), "red").save(tmp_path / "photo.jpg", exif=exif)
    done = run("photo.jpg")
    assert done.returncode == 0, done.stderr
    assert "64x96 px" in done.stdout and "(assumed)" in done.stdout
    assert Image.open(tmp_path / "output" / "photo_depth.png").size == (64, 96)


def test_answer_comes_with_the_map(run, tmp_path):
    Image.new("RGB", (96, 64), "blue").save(tmp_path / "photo.png")
    done = run("photo.png", "--ask", "How many posts are there?")
    assert done.returncode == 0, done.stderr
    assert "answer:" in done.stdout


def test_a_question_leaves_the_map_as_it_is(run, tmp_path):
    """Both are read after the same system message, which the paper's training has; nothing after the image counts."""
    args = [ROOT / "samples" / "room.jpg", "--dtype", "float32", "--save", "npy"]
    assert run(*args, "--output", "plain").returncode == 0
    for number, question in enumerate(["How far is the door?", "Describe the room in detail, please. " * 5]):
        assert run(*args, "--output", f"asked{number}", "--ask", question).returncode == 0
        asked = np.load(tmp_path / f"asked{number}" / "room.npy")
        np.testing.assert_allclose(asked, np.load(tmp_path / "plain" / "room.npy"), rtol=1e-4)


# Clouds


def edge_camera(width, height, focal_length=100.0):
    return {"fx": focal_length, "fy": focal_length, "cx": (width - 1) / 2, "cy": (height - 1) / 2}


def test_points_of_a_depth_edge_are_left_out_and_those_of_a_slanted_floor_stay():
    width, height = 120, 80
    camera = edge_camera(width, height)
    wall = np.full((height, width), 8.0, np.float32)
    wall[:, :50] = 3.0
    wall[:, 50:54] = [3.9, 4.8, 5.8, 6.9]  # what upsampling makes of the edge
    kept = outputs.on_surface(wall, camera, 1)
    assert not kept[:, 50:54].any() and kept[:, :49].all() and kept[:, 55:].all()
    rows = np.arange(height)[:, None] - camera["cy"]
    angle = np.degrees(np.arctan2(rows, camera["fx"]))  # below the horizon, of the floor's pixels in the middle
    floor = np.where(rows > 1, 1.5 * camera["fx"] / np.maximum(rows, 1), 60.0).astype(np.float32)
    floor = np.broadcast_to(floor, (height, width))
    kept = outputs.on_surface(floor, camera, 1)[:, width // 2]
    assert kept[angle[:, 0] > 5.7].all() and not kept[(angle[:, 0] > 1.5) & (angle[:, 0] < 4.3)].any()
    np.testing.assert_array_equal(outputs.on_surface(wall, camera, 3), outputs.on_surface(wall, camera, 1)[::3, ::3])
    mesh = outputs.glb(wall, camera, outputs.jpeg_texture(Image.new("RGB", (width, height))), 10**6)
    trimesh = pytest.importorskip("trimesh")
    (mesh,) = trimesh.load(io.BytesIO(mesh), file_type="glb", process=False).geometry.values()
    z = -mesh.vertices[:, 2][mesh.faces]
    assert (np.ptp(z, axis=1) < 1e-6).all() and set(np.unique(z)) == {3.0, 8.0}


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (480, 640), (37, 1110), (4000, 3000)])
@pytest.mark.parametrize("points", [1, 10, 1000, 100_000])
def test_clouds_have_at_most_the_points_that_are_asked_for(size, points):
    step = outputs.cloud_step(*size, points)
    count = math.ceil(size[0] / step) * math.ceil(size[1] / step)
    assert count <= points
    if step > 1:  # and not far fewer
        assert math.ceil(size[0] / (step - 1)) * math.ceil(size[1] / (step - 1)) > points


def test_a_mesh_of_edges_alone_is_points():
    trimesh = pytest.importorskip("trimesh")
    depth = np.array([[1, 50], [50, 1]], np.float32)
    content = outputs.glb(depth, edge_camera(2, 2), outputs.jpeg_texture(Image.new("RGB", (2, 2))), 100)
    (cloud,) = trimesh.load(io.BytesIO(content), file_type="glb", process=False).geometry.values()
    assert len(cloud.vertices) == 4


@pytest.mark.parametrize("size", [(3000, 100), (40, 900), (640, 480), (1, 1)])
@pytest.mark.parametrize("far", [2.0, 2.1, 70.0])
def test_the_scale_is_whole_in_pictures_of_any_form(size, far):
    depth = np.linspace(2, far, size[0] * size[1], dtype=np.float32).reshape(size[::-1])
    picture = Image.open(io.BytesIO(outputs.color_png(depth)))
    scale = np.asarray(picture)[size[1] :]
    shades = scale[len(scale) // 4][scale[len(scale) // 4] < outputs.SHADES]
    assert picture.width >= 240 and shades[0] == 0 and shades[-1] == outputs.SHADES - 1
    assert (np.diff(shades.astype(int)) >= 0).all() and len(shades) > 0.5 * picture.width
    ink = np.argwhere((scale >= outputs.SHADES) & (scale < 248))
    assert ink[:, 1].min() > 0 and ink[:, 1].max() < picture.width - 1 and ink[:, 0].max() < len(scale) - 1
    assert len(outputs.round_metres(*outputs.color_limits(depth))) >= 2


# No file is lost


def test_what_exists_is_not_replaced_unless_asked(run, tmp_path):
    save_photo(tmp_path / "photo.png")
    (tmp_path / "gt").mkdir()
    (tmp_path / "gt" / "photo_depth.png").write_bytes(b"a ground truth")
    refused = run("photo.png", "--output", "gt")
    assert refused.returncode == 2 and "gt/photo_depth.png exists; name another --output" in refused.stderr
    assert listing(tmp_path / "gt") == {Path("photo_depth.png"): b"a ground truth"}
    assert run("photo.png").returncode == 0
    first = listing(tmp_path / "output")
    assert run("photo.png").returncode == 2 and listing(tmp_path / "output") == first
    replaced = run("photo.png", "--overwrite", "--focal-length", 80)
    assert replaced.returncode == 0 and listing(tmp_path / "output").keys() == first.keys()
    assert listing(tmp_path / "output") != first


def test_a_link_is_not_written_through(run, tmp_path):
    save_photo(tmp_path / "photo.png")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "output").mkdir()
    for name, target in (("photo_depth.png", "../precious"), ("photo.ply", "../nowhere")):
        (tmp_path / "output" / name).symlink_to(target)
    assert run("photo.png", "--save", "png").returncode == 2
    assert run("photo.png", "--save", "ply").returncode == 2  # a broken link too
    assert run("photo.png", "--save", "png,ply", "--overwrite").returncode == 0
    assert (tmp_path / "precious").read_bytes() == b"precious" and not (tmp_path / "nowhere").exists()
    assert not any(path.is_symlink() for path in (tmp_path / "output").iterdir())


def test_no_photo_is_read_from_another_ones_output(run, tmp_path):
    save_photo(tmp_path / "a.png")
    save_photo(tmp_path / "a_depth.png", seed=1)
    before = listing(tmp_path)
    for more in ([], ["--overwrite"]):
        refused = run("a.png", "a_depth.png", "--output", ".", *more)
        assert refused.returncode == 2 and "a_depth.png is one of the photos" in refused.stderr
    assert listing(tmp_path) == before
    assert run("a.png", "a_depth.png", "--save", "png").returncode == 0
    alone = {}
    for name in ("a", "a_depth"):
        assert run(f"{name}.png", "--save", "png", "--output", f"alone_{name}").returncode == 0
        alone |= listing(tmp_path / f"alone_{name}")
    assert listing(tmp_path / "output") == alone and len(alone) == 2


def test_photos_of_one_name_are_numbered_whatever_the_file_system_makes_of_capitals(run, tmp_path):
    for folder, name in (("a", "Same.png"), ("b", "same.png"), ("c", "same-2.png")):
        (tmp_path / folder).mkdir()
        save_photo(tmp_path / folder / name)
    done = run("a/Same.png", "b/same.png", "c/same-2.png", "a/../a/Same.png", "--save", "json", "--json")
    assert done.returncode == 0, done.stderr
    assert [record["files"] for record in records(done.stdout)] == [
        ["output/Same.json"],
        ["output/same-2.json"],
        ["output/same-2-2.json"],
    ]


def test_a_full_disk_names_the_file_and_leaves_no_half_one(tmp_path):
    save_photo(tmp_path / "photo.png", (640, 480))

    def limit():  # as a full disk: writing past it fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    options = command(tmp_path / "photo.png", "--save", "npy", tmp_path=tmp_path)
    done = subprocess.run(**options, capture_output=True, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"predict.py: [Errno 27] File too large: '{tmp_path / 'out' / 'photo.npy'}'" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("seconds", [0.0, 0.4, 1.0, 2.0, None])
def test_an_interrupt_ends_quietly_at_any_time(tmp_path, seconds):
    """From the first import that takes long on, and (None) while files are written."""
    for number in range(40):
        save_photo(tmp_path / f"{number}.png", seed=number)
    process = subprocess.Popen(
        **command(tmp_path, tmp_path=tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    start = time.monotonic()
    maps = Path(f"/proc/{process.pid}/maps")

    def under_way():
        return "numpy" in maps.read_text() if seconds is not None else list(tmp_path.glob("out/*_depth.png"))

    while not under_way() and time.monotonic() - start < 100:
        time.sleep(0.02)
    time.sleep(seconds or 0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    for path in (tmp_path / "out").glob("*") if (tmp_path / "out").exists() else ():
        assert not path.name.startswith(".")
        if path.suffix == ".png":
            Image.open(path).load()


def test_the_readmes_commands(run, clip, tmp_path):
    """From weights in another form, here the checkpoint's plain view, to files."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("**With photos**")[1].split("**With weights**")[0]
    convert, predict = (line.split("python ")[1] for line in section.splitlines() if line.startswith("    python "))
    convert_checkpoint.convert(ROOT, tmp_path / "released", to_qwen3_vl=True)
    name, *arguments = shlex.split(convert.replace("JonnyYu828/DepthVLM-4B", "released"))
    assert name == "convert_checkpoint.py" and convert_checkpoint.main(arguments) == 0
    name, *arguments = shlex.split(predict)
    (tmp_path / "folder").mkdir()
    save_photo(tmp_path / "photo.jpg")
    save_photo(tmp_path / "folder" / "other.jpg")
    clip[0].rename("video.mp4")
    done = run(*arguments)
    assert name == "predict.py" and done.returncode == 0 and "answer: " in done.stdout, done.stderr
    names = {str(name) for name in listing(tmp_path / "out")}
    assert {"photo_depth.png", "other_color.png", "other.ply", "video_color.mp4"} < names


# Which photos


def test_one_bad_photo_is_named_and_the_rest_goes_on(run, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 48), "green").save(tmp_path / folder / "same.png")
    (tmp_path / "bad.jpg").write_text("no image")
    photos = [tmp_path / "a" / "same.png", tmp_path / "bad.jpg", tmp_path / "b" / "same.png"]
    done = run(*photos)
    assert done.returncode == 1
    assert "1 of 3 photos failed" in done.stderr and "bad.jpg" in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "output").glob("*.ply")} == {"same.ply", "same-2.ply"}


def test_photos_that_are_too_much_for_memory_together_are_taken_one_by_one(tmp_path, monkeypatch, run):
    def limited(shots, batch, everything):
        if len(shots) > 1 or shots[0].stem.name == "large":
            raise torch.OutOfMemoryError("out of memory, tried to allocate 900 GiB")
        return whole(shots, batch, everything)

    for name in ("small", "large", "other"):
        Image.new("RGB", (64, 48), "green").save(tmp_path / f"{name}.png")
    whole = script.predict
    monkeypatch.setattr(script, "predict", limited)
    done = run(*(tmp_path / f"{name}.png" for name in ("small", "large", "other")), "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "large.png: not enough memory; lower --max-pixels" in done.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.ply")} == {"small.ply", "other.ply"}


def test_folders(run, tmp_path):
    for name in ("photos/b.PNG", "photos/a.jpg", "photos/deep/a.jpg", "photos/.hidden/a.jpg", "photos/.x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        save_photo(tmp_path / name)
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    flat = run("photos", "--save", "json", "--json", "--output", "flat")
    assert [record["photo"] for record in records(flat.stdout)] == ["photos/a.jpg", "photos/b.PNG"]
    assert "photos: left out 1 folders, for which there is --recursive" in flat.stderr
    assert "photos: left out 1 files .txt" in flat.stderr and "photos: left out 2 hidden ones" in flat.stderr
    # its own output is no input, wherever it lies
    for attempt in (1, 2):
        deep = run("photos", "--recursive", "--save", "png,json", "--output", "photos/output", "--json", "--overwrite")
        assert [record["files"][1] for record in records(deep.stdout)] == [
            "photos/output/a.json",
            "photos/output/b.json",
            "photos/output/deep/a.json",
        ], attempt
    (tmp_path / "empty").mkdir()
    nothing = run("empty")
    assert nothing.returncode == 2 and "no photo or video lies in empty" in nothing.stderr


def test_a_name_that_begins_with_a_dash(run, tmp_path):
    save_photo(tmp_path / "-x.jpg")
    hinted = run("-x.jpg")
    assert hinted.returncode == 2 and "write ./-x.jpg" in hinted.stderr
    assert run("./-x.jpg", "--save", "png").returncode == 0
    assert run("--save", "json", "--", "-x.jpg").returncode == 0
    assert set(listing(tmp_path / "output")) == {Path("-x_depth.png"), Path("-x.json")}


@contextlib.contextmanager
def served(folder):
    handler = lambda *arguments: http.server.SimpleHTTPRequestHandler(*arguments, directory=folder)  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls(run, tmp_path):
    (tmp_path / "www").mkdir()
    save_photo(tmp_path / "www" / "a photo.jpg")
    with served(tmp_path / "www") as address:
        done = run(f"{address}/a photo.jpg?size=1", f"{address}/x/..%2F..%2Fa.jpg", "--save", "json", "--json")
    assert done.returncode == 1
    written, failed = sorted(records(done.stdout), key=lambda record: "error" in record)
    assert written["files"] == ["output/a_photo.json"] and "404" in failed["error"]
    assert set(listing(tmp_path / "output")) == {Path("a_photo.json")}
    urls = ["http://x/y/..%2F..%2F.bashrc", "http://x/", "http://x/a%2Fb.png"]
    sources, _ = script.find_sources(urls, Path("output"), recursive=False)
    assert [str(stem) for _, stem in sources] == ["output/bashrc", "output/photo", "output/b"]


def test_heic(run, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    png = save_photo(tmp_path / "a.png")
    pillow_heif.from_pillow(Image.open(png)).save(tmp_path / "b.heic", quality=100)
    done = run(".", "--save", "npy", "--json")
    assert done.returncode == 0, done.stderr
    ours, heic = (np.load(tmp_path / "output" / f"{name}.npy") for name in "ab")
    assert heic.shape == ours.shape and np.median(np.abs(heic / ours - 1)) < 0.02


def png_of_size(path, width, height):
    """A PNG whose header alone is true."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_photos_that_cannot_be_read_are_each_named_with_a_reason(run, tmp_path):
    whole = save_photo(tmp_path / "whole.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "drawing.svg").write_text("<svg/>")
    png_of_size(tmp_path / "bomb.png", 20000, 10000)
    Image.new("RGB", (4000, 10)).save(tmp_path / "strip.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "clip.mp4").write_text("no video")
    (tmp_path / "folder.jpg").mkdir()
    names = ["text.jpg", "empty.jpg", "cut.png", "drawing.svg", "bomb.png", "strip.png", "pipe.jpg", "missing.jpg"]
    names += ["ftp://host/photo.jpg", "http://127.0.0.1:9/photo.jpg", "clip.mp4", "x" * 300]
    done = run(*names, whole, "--save", "json", "--json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    by_name = {record["photo"]: record for record in records(done.stdout)}
    assert "error" not in by_name.pop(str(whole))
    assert by_name.keys() == set(names)
    for name, record in by_name.items():
        assert record["error"] and "images[0]" not in record["error"] and "object at" not in record["error"], record
        assert f"{name}: " in done.stderr
    assert f"{len(names)} of {len(names) + 1} photos failed" in done.stderr
    assert set(listing(tmp_path / "output")) == {Path("whole.json")}


# Cameras


def test_a_focal_length_per_photo(run, tmp_path):
    for name in "ab":
        save_photo(tmp_path / f"{name}.png", (96, 64))
    done = run("a.png", "b.png", "--focal-length", 80, "--focal-length", "90,95", "--save", "json", "--json")
    cameras = [record["camera"] for record in records(done.stdout)]
    assert [(camera["fx"], camera["fy"]) for camera in cameras] == [(80, 80), (90, 95)]
    counted = run("a.png", "b.png", "--focal-length", 80, "--focal-length", 90, "--focal-length", 70)
    assert counted.returncode == 2 and "got 3 times --focal-length for 2 photos" in counted.stderr


def test_ways_to_state_the_camera(run, tmp_path):
    save_photo(tmp_path / "a.jpg", (120, 90), exif=exif_of(35))
    exif = 35 / math.hypot(36, 24) * 150  # the photo's diagonal is 150 px

    def camera(*arguments):
        done = run("a.jpg", "--save", "json", "--overwrite", "--json", *arguments)
        return records(done.stdout)[0]["camera"]

    found = camera()
    assert found["fx"] == pytest.approx(exif) and found["focal_length_source"] == "exif"
    found = camera("--fov", 90)
    assert found["fx"] == pytest.approx(60) and found["focal_length_source"] == "given"
    assert camera("--focal-length-35mm", 50)["fx"] == pytest.approx(exif * 50 / 35)
    assert (found["cx"], found["cy"]) == (59.5, 44.5)
    found = camera("--principal-point", "50,40.5")
    assert (found["cx"], found["cy"]) == (50, 40.5) and found["fx"] == pytest.approx(exif)


def test_another_model_estimates_what_nobody_knows(run, tmp_path, monkeypatch):
    class Estimator(contestants._base.Contestant):
        estimates_camera = True

        def __init__(self, checkpoint, device="cpu", dtype="float32"):
            assert (checkpoint, device) == ("some/model", "cpu")

        def focal_length(self, image):
            return 0.9 * image.width

    monkeypatch.setattr(contestants, "get", {"estimator": Estimator}.get)
    save_photo(tmp_path / "known.jpg", (120, 90), exif=exif_of(35))
    save_photo(tmp_path / "unknown.png", (100, 80))
    done = run("known.jpg", "unknown.png", "--camera-from", "estimator:some/model", "--save", "json")
    assert done.returncode == 0, done.stderr
    assert "unknown.png: 100x80 px, focal length 90.0 px (estimated by estimator:some/model)" in done.stdout
    assert "known.jpg: 120x90 px, focal length 121.3 px (exif)" in done.stdout


def test_focal_lengths_of_depth_pro_and_moge():
    class Processor(dict):
        def to(self, *_):
            return self

    depth_pro, moge = DepthPro.__new__(DepthPro), MoGe.__new__(MoGe)
    photo = Image.new("RGB", (200, 100))
    depth_pro.processor = lambda image, return_tensors: Processor()
    model = lambda: SimpleNamespace(field_of_view=torch.tensor([90.0]))  # noqa: E731
    depth_pro.model = type("Model", (), {"device": "cpu", "dtype": None, "__call__": lambda self: model()})()
    assert depth_pro.focal_length(photo) == pytest.approx(100)  # 90 degrees over 200 px
    intrinsics = torch.tensor([[0.7, 0, 0.5], [0, 1.4, 0.5], [0, 0, 1]])
    moge.half, moge.model = False, SimpleNamespace(infer=lambda *_, **__: {"intrinsics": intrinsics})
    assert moge.focal_length(photo) == pytest.approx(140)  # relative to the width


# Videos


@pytest.fixture
def clip(tmp_path):
    """3 s at 10 fps of a picture that moves to the right, 3 px per frame."""
    av = pytest.importorskip("av")
    picture = np.asarray(Image.open(save_photo(tmp_path / "picture.png", (200, 64))))
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(30):
            frame = np.ascontiguousarray(picture[:, 3 * number : 3 * number + 96])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return tmp_path / "clip.mp4", picture


def test_frames_of_a_video_are_the_first_at_or_after_their_times(clip):
    path, picture = clip
    found = list(videos.read_frames(path, 4))
    assert [round(seconds, 3) for seconds, _ in found] == [0, 0.3, 0.5, 0.8, 1, 1.3, 1.5, 1.8, 2, 2.3, 2.5, 2.8]
    for seconds, frame in found:
        first = 3 * round(10 * seconds)
        assert np.abs(np.asarray(frame, dtype=int) - picture[:, first : first + 96]).mean() < 6
    assert len(list(videos.read_frames(path, 100))) == 30


def test_frames_are_turned_upright(clip):
    path, picture = clip
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # after version, times, track, duration, layer and volume
    turn = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]  # players turn it by a quarter, clockwise
    content[matrix : matrix + 36] = struct.pack(">9i", *turn)
    path.write_bytes(content)
    _, frame = next(videos.read_frames(path, 1))
    assert np.abs(np.asarray(frame, dtype=int) - np.rot90(picture[:, :96], -1)).mean() < 6


def test_a_video_gives_a_map_per_frame_and_one_depth_video(run, clip, tmp_path):
    av = pytest.importorskip("av")
    done = run("clip.mp4", "--focal-length", 80, "--json", "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    found = records(done.stdout)
    assert [record["photo"] for record in found] == [f"clip.mp4 at {second:.3f} s" for second in np.arange(0, 3, 0.5)]
    assert [record["files"] for record in found][1] == ["output/clip/00000.500s_depth.png"]
    assert all(record["camera"]["fx"] == 80 for record in found)
    with av.open(str(tmp_path / "output" / "clip_color.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 2 and len(frames) == 6
    # all on one scale: the nearest pixel of all is red, the farthest violet
    maps = [np.asarray(Image.open(record["files"][0])) for record in found]
    limits = [outputs.color_limits(depth / 1000) for depth in maps]
    limits = min(near for near, _ in limits), max(far for _, far in limits)
    for frame, depth in zip(frames, maps, strict=True):
        expected = outputs.PALETTE[outputs.color_index(depth / 1000, limits)].astype(int)
        assert np.abs(frame[:64, :96] - expected).mean() < 20
    # the second time refuses, and other files may be chosen
    assert run("clip.mp4").returncode == 2
    more = run("clip.mp4", "--output", "more", "--fps", 1, "--save", "png,json,ply", "--ask", "How far?")
    assert more.returncode == 0 and len(listing(tmp_path / "more")) == 9
    alone = run("clip.mp4", "--output", "alone", "--save", "color")
    assert alone.returncode == 2 and "add png to --save" in alone.stderr


def test_a_video_that_breaks_off_is_named_after_its_frames(run, clip, tmp_path):
    path, _ = clip
    save_photo(tmp_path / "photo.png")
    (tmp_path / "broken.mkv").write_bytes(path.read_bytes()[:900])
    done = run("broken.mkv", "photo.png", "--save", "png")
    assert done.returncode == 1 and "broken.mkv cannot be read as a video" in done.stderr
    assert Path("photo_depth.png") in listing(tmp_path / "output")


def test_the_package_for_videos_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    done = run("clip.mp4")
    assert done.returncode == 1 and "pip install av" in done.stderr


# Model


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_are_smaller_but_for_the_depth_head(kind):
    pytest.importorskip("bitsandbytes")
    whole, processor = script.load(str(ROOT), "cpu")
    model, _ = script.load(str(ROOT), "cpu", quantize=kind)
    share = 0.6 if kind == "int8" else 0.4
    assert model.get_memory_footprint() < share * whole.get_memory_footprint()
    for name, value in whole.depth_head.state_dict().items():
        assert torch.equal(model.depth_head.state_dict()[name], value), name
    photo = [Image.open(ROOT / "samples" / "room.jpg")]
    with torch.inference_mode():
        ours, small = (
            handler.predict(one, processor, handler.encode_inputs(processor, photo, None, [None], None), False)[0][1]
            for one in (whole, model)
        )
    assert 0 < np.median(np.abs(small / ours - 1)) < 0.05


def test_the_package_for_quantized_weights_is_named(run, tmp_path, monkeypatch):
    save_photo(tmp_path / "photo.png")

    def from_pretrained(*_, **__):
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes")

    monkeypatch.setattr(DepthVLMForConditionalGeneration, "from_pretrained", from_pretrained)
    done = run("photo.png", "--quantize", "int4")
    assert done.returncode == 2 and "pip install bitsandbytes" in done.stderr


def test_a_bad_argument_is_refused_in_a_sentence(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
    done = predict(tmp_path / "photo.png", "--model", "no/such/folder/here", tmp_path=tmp_path)
    assert done.returncode in (1, 2)
    assert "no/such/folder/here" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--focal-length", "-3"], "focal_lengths[0] is -3.0"),
        (["--max-pixels", "10"], "max_pixels is 10"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(run, arguments, said, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
    done = run("photo.png", *arguments)
    assert done.returncode in (1, 2)
    assert said in done.stderr and "Traceback" not in done.stderr


REFUSED = {
    "--focal-length": {"x": "invalid focal_length", "1,2,3": "invalid focal_length", "nan,1": "no pair", "": "invalid"},
    "--focal-length-35mm": {"0": "not above 0", "inf": "not above 0", "x": "invalid"},
    "--fov": {"0": "between 1 and 160", "180": "between 1 and 160", "nan": "between 1 and 160"},
    "--principal-point": {"5": "invalid pair", "nan,1": "no pair of numbers"},
    "--batch-size": {"-1": "at least 1", "1.5": "invalid int"},
    "--points": {"0": "at least 1", "x": "invalid int"},
    "--fps": {"0": "not above 0", "nan": "not above 0"},
    "--save": {"jpg": "'jpg' is none of", "png,": "'' is none of", "": "is none of"},
    "--ask": {"": "--ask is empty", "  ": "--ask is empty"},
    "--dtype": {"int8": "invalid choice"},
    "--quantize": {"int2": "invalid choice"},
    "--device": {"nonsense": "device nonsense cannot be used", "cuda:99": "device cuda:99 cannot be used"},
    "--camera-from": {
        "nobody:x": "unknown contestant 'nobody'",
        "zoedepth:x": "estimates no focal length",
        "depth_pro": "estimates no focal length",
    },
    "--output": {"photo.png": "File exists", "photo.png/x": "Not a directory", "/proc/x": "/proc/x"},
    "--model": {"photo.png": "model photo.png is a file", "": "", "other": "other"},
    "--unknown": {"x": "unrecognized arguments"},
}


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [(option, value, said) for option, values in REFUSED.items() for value, said in values.items()],
)
def test_more_bad_arguments_are_refused_in_a_sentence(run, tmp_path, option, value, said):
    save_photo(tmp_path / "photo.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    before = listing(tmp_path)
    done = run("photo.png", option, value)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["photo.png", "--fov", "60", "--focal-length", "80"],
        ["photo.png", "--focal-length-35mm", "28", "--fov", "60"],
    ],
)
def test_what_does_not_go_together_is_refused(run, tmp_path, arguments):
    save_photo(tmp_path / "photo.png")
    assert run(*arguments).returncode == 2


def test_json_lines_hold_the_answer_and_nothing_else_is_printed(run, tmp_path):
    save_photo(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    done = run("a.png", "b.png", "--json", "--ask", "How far?", "--save", "json", "--max-pixels", 20000)
    assert done.returncode == 1
    whole, broken = sorted(records(done.stdout), key=lambda record: "error" in record)
    assert whole == json.loads((tmp_path / "output" / "a.json").read_text()) | {"files": whole["files"]}
    assert isinstance(whole["answer"], str) and whole["seconds"] > 0
    assert whole["settings"] | {"model": ""} == {
        "model": "",
        "dtype": "bfloat16",
        "quantize": None,
        "max_pixels": 20000,
        "question": "How far?",
    }
    assert broken["photo"] == "b.png" and "b.png" in broken["error"]


def test_batches_of_any_size_give_the_same_maps(run, tmp_path):
    for number in range(5):
        save_photo(tmp_path / f"{number}.png", (96, 64) if number % 2 else (64, 120), seed=number)
    for size in (1, 4):
        done = run(".", "--batch-size", size, "--save", "npy", "--output", f"by{size}", "--dtype", "float32")
        assert done.returncode == 0, done.stderr
    for number in range(5):
        one, four = (np.load(tmp_path / f"by{size}" / f"{number}.npy") for size in (1, 4))
        np.testing.assert_allclose(four, one, rtol=1e-4)
