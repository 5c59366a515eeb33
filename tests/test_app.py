"""The web page: in a real browser, through its API, and under what visitors should not do."""

import base64
import contextlib
import csv
import functools
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import app
import predict as script
from depthvlm import handler

pytest.importorskip("gradio", reason="app.py needs gradio: pip install -e '.[app]'")
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from web import engine as engines  # noqa: E402
from web import views  # noqa: E402
from web.visits import Visits  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ROOM = ROOT / "samples" / "room.jpg"
CHROMIUM = shutil.which("chromium")
# of Babylon, which tries WebGPU before WebGL, of drawing in software, and of a test that reads pixels
EXPECTED = re.compile(
    r"WebGPU|No available adapters|Method not implemented|GL Driver Message|GPU stall|willReadFrequently"
)


# The engine


def load(dtype="float32"):
    return script.load(str(ROOT), "cpu", dtype)


@pytest.fixture(scope="module")
def model_and_processor():
    return load()


@pytest.fixture
def engine(model_and_processor):
    return engines.Engine(*model_and_processor, {})


@pytest.fixture
def encodings(model_and_processor, monkeypatch):
    """How often a photo went through the vision tower."""
    tower, calls = model_and_processor[0].model.visual, []
    forward = tower.forward

    def counted(*arguments, **options):
        calls.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(tower, "forward", counted)
    return calls


def see(engine, photo, question=None, **options):
    result = engine.prepare(photo, "photo", options.get("focal_length"), "given", None, question)
    return result, list(engine.see(result, question is not None))


def fresh_answer(engine, photo, turns):
    """The answer to the last question of a conversation, from a run over all of it."""
    processor = engine.processor
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for number, (question, answer) in enumerate(turns):
        image = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[photo], text=[text], return_tensors="pt")
    with torch.inference_mode():
        ids = engine.model.generate(**inputs, max_new_tokens=handler.MAX_NEW_TOKENS, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


QUESTIONS = [
    "How far is the door from the camera, in meters?",
    "How many windows are there?",
    "How many doors are there?",
]


@pytest.mark.parametrize("asks_at_once", [False, True])
def test_a_conversation_encodes_its_photo_once_and_answers_as_a_fresh_run(engine, encodings, asks_at_once):
    photo = Image.open(ROOM)
    other = Image.open(ROOT / "samples" / "street.jpg")
    result, steps = see(engine, photo, QUESTIONS[0] if asks_at_once else None)
    assert steps[0] is None and all(isinstance(step, str) for step in steps[1:])
    assert bool(steps[1:]) == asks_at_once and len(encodings) == 1
    turns = [(QUESTIONS[0], result.answer)] if asks_at_once else []
    see(engine, other, "How far is the red car?")  # another visitor, between the questions
    encodings.clear()
    for question in QUESTIONS[len(turns) :]:
        *_, answer = engine.ask(result, question)
        assert answer == result.answer and not encodings
        turns.append((question, answer))
    for number in range(len(turns)):
        asked = [*turns[:number], (turns[number][0], None)]
        assert fresh_answer(engine, photo, asked) == turns[number][1]


def test_conversations_in_threads_do_not_mix(engine):
    """The page runs one at a time; whoever uses the engine otherwise gets the same answers."""
    photos = [Image.open(ROOM), Image.open(ROOT / "samples" / "street.jpg")]
    expected = []
    for photo in photos:
        result, _ = see(engine, photo)
        expected.append([list(engine.ask(result, question))[-1] for question in QUESTIONS])

    def talk(index):
        result, _ = see(engine, photos[index % 2])
        return [list(engine.ask(result, question))[-1] for question in QUESTIONS]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(talk, range(6))) == expected * 3


def test_a_conversation_whose_cache_is_gone_begins_anew(engine, encodings, monkeypatch):
    monkeypatch.setattr(engines, "KEPT_CONVERSATIONS", 2)
    photo = Image.open(ROOM)
    results = [see(engine, photo)[0] for _ in range(3)]
    assert len(engine.conversations) == 2 and len(encodings) == 3
    results[0].rescale(600.0)
    depth = engine.depth(results[0])
    *_, answer = engine.ask(results[0], QUESTIONS[0])
    assert answer == fresh_answer(engine, photo, [(QUESTIONS[0], None)]) and len(encodings) == 5
    np.testing.assert_array_equal(engine.depth(results[0]), depth)
    *_, second = engine.ask(results[0], QUESTIONS[1])
    assert second == fresh_answer(engine, photo, [(QUESTIONS[0], answer), (QUESTIONS[1], None)])


def test_an_answer_that_nobody_waits_for_is_stopped(engine, model_and_processor, monkeypatch):
    model, steps = model_and_processor[0], []
    forward = model.forward

    @functools.wraps(forward)
    def counted(*arguments, **options):
        steps.append(1)
        time.sleep(0.01)
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)  # it would go on to the last token
    result = engine.prepare(Image.open(ROOM), "room", None, "", None, "How far?")
    stream = engine.see(result, True)
    assert next(stream) is None
    stream.close()
    before = len(steps)
    time.sleep(0.1)
    assert len(steps) == before < handler.MAX_NEW_TOKENS


def test_what_fails_in_the_thread_reaches_the_visitor(engine, model_and_processor, monkeypatch):
    def broken(*_, **__):
        raise ValueError("out of order")

    monkeypatch.setattr(model_and_processor[0].model.visual, "forward", broken)
    with pytest.raises(ValueError, match="out of order"):
        see(engine, Image.open(ROOM))


def test_rescaled_metres_grow_with_the_focal_length_and_x_and_y_stay(engine):
    result, _ = see(engine, Image.open(ROOM))
    before, camera = engine.depth(result), handler.describe_camera(result.camera)
    result.rescale(2 * camera["fx"])
    after = handler.describe_camera(result.camera)
    np.testing.assert_allclose(engine.depth(result), 2 * before, rtol=1e-6)
    assert after["fx"] == after["fy"] == 2 * camera["fx"] and "rescaled" in after["focal_length_source"]
    np.testing.assert_allclose(2 * before / after["fx"], before / camera["fx"], rtol=1e-6)  # x and y per pixel
    assert json.loads(engine.encode(result, "json"))["camera"] == after


def test_the_map_that_a_browser_is_sent_is_exact_to_a_fiftieth_of_a_percent(engine):
    result, _ = see(engine, Image.open(ROOT / "samples" / "street.jpg").resize((1600, 1200)), focal_length=1130.0)
    sent = json.loads(views.payload(engine, result))
    assert sent["width"] * sent["height"] <= engines.VIEW_PIXELS and sent["width"] > 1100
    stored = np.frombuffer(zlib.decompress(base64.b64decode(sent["depth"])), "<u2").reshape(sent["height"], -1)
    np.testing.assert_allclose(
        np.exp(sent["a"] + sent["b"] * stored), engine.depth(result, (sent["height"], sent["width"])), rtol=2e-4
    )
    assert sent["fx"] == pytest.approx(1130 * sent["width"] / 1600)
    assert sent["cx"] == pytest.approx((sent["width"] - 1) / 2)


# What is kept of visitors


def test_a_file_of_two_visitors_goes_with_the_second(tmp_path, engine):
    visits = Visits(engine, tmp_path)
    shared, own, sample = (tmp_path / name / "photo.jpg" for name in ("shared", "own", "sample"))
    for path in (shared, own, sample):
        path.parent.mkdir()
        path.write_bytes(b"x")
    visits.kept = {sample}
    visits.claim(visits.of("a"), shared, own)
    visits.claim(visits.of("b"), shared, sample)
    visits.leave("a")
    assert shared.exists() and not own.parent.exists()
    visits.leave("b")
    assert not shared.exists() and sample.exists()
    fetched, unused = tmp_path / "api-1" / "depth.png", tmp_path / "upload" / "photo.jpg"
    for path in (fetched, unused):
        path.parent.mkdir()
        path.write_bytes(b"x")
        os.utime(path, (time.time() - 200,) * 2)
    visits.sweep()
    assert not fetched.exists() and unused.exists()
    os.utime(unused, (time.time() - 4000,) * 2)
    visits.leave("nobody")
    assert not unused.exists()


# The server


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@contextlib.contextmanager
def served(folder, *options):
    """The page's address and its process; its files lie below `folder`."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), *options]
    environment = os.environ | {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log = folder.parent / "log"

    def started():
        return process.poll() is not None or "To create a public link" in log.read_text()

    for _ in range(3):  # Gradio gives up where its first page takes 3 s, as it may while the machine is busy
        with open(log, "w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=folder)
        if wait_for(started, 240) and process.poll() is None:
            break
        process.kill()
    try:
        assert process.poll() is None and started(), log.read_text()
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "tmp"
    with served(folder, "--max-upload", "8mb") as (address, process):
        yield address, process, folder


@pytest.fixture(scope="module")
def address(server):
    return server[0]


def visitors_files(folder):
    """What lies on the disk beside the page's own samples."""
    walk = os.walk(folder)  # passes over what is removed meanwhile
    names = {Path(parent, name).relative_to(folder).as_posix() for parent, _, files in walk for name in files}
    return {name for name in names if Path(name).name not in ("room.jpg", "street.jpg")}


def smooth_photo(path, size=(160, 120), seed=0):
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


# The API


def ask_api(address, photo, focal_length=None, question="", folder=None):
    client = Client(address, verbose=False, download_files=str(folder))
    return client.predict(handle_file(photo), focal_length, question, api_name="/predict")


def test_the_api_has_names_and_gives_what_the_command_line_gives(address, tmp_path):
    described = Client(address, verbose=False).view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(described) == ["/predict"]
    names = [[part["label"] for part in described["/predict"][kind]] for kind in ("parameters", "returns")]
    assert names == [["photo", "focal_length", "question"], ["depth", "answer", "camera", "cloud"]]
    assert [part["parameter_name"] for part in described["/predict"]["parameters"]] == names[0]
    depth, answer, camera, cloud = ask_api(address, ROOM, 470.5, QUESTIONS[0], tmp_path / "client")
    assert script.main([str(ROOM), "--focal-length", "470.5", "--ask", QUESTIONS[0], "--save", "png,json",
                        "--output", str(tmp_path / "out")]) == 0  # fmt: skip
    record = json.loads((tmp_path / "out" / "room.json").read_text())
    np.testing.assert_array_equal(
        np.asarray(Image.open(depth)), np.asarray(Image.open(tmp_path / "out/room_depth.png"))
    )
    assert (camera, answer) == (record["camera"], record["answer"])
    trimesh = pytest.importorskip("trimesh")
    (mesh,) = trimesh.load(cloud, process=False).geometry.values()
    assert -mesh.bounds[0, 2] == pytest.approx(record["depth"]["max"], rel=0.02)


def test_the_readmes_call(address, tmp_path, monkeypatch):
    call = re.search(r"Client\(address\)\.predict\(.*\)", (ROOT / "README.md").read_text(encoding="utf-8"))[0]
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOM, "photo.jpg")
    quiet = functools.partial(Client, verbose=False, download_files=str(tmp_path / "client"))
    depth, answer, camera, cloud = eval(call, {"Client": quiet, "handle_file": handle_file, "address": address})
    assert Image.open(depth).size == (640, 480) and isinstance(answer, str) and cloud.endswith(".glb")
    assert (camera["fx"], camera["focal_length_source"]) == (1430.0, "given")


def test_ten_visitors_at_once_are_each_answered_about_their_own_photo(address, tmp_path):
    photos = [smooth_photo(tmp_path / f"{n}.png", (100 + 8 * n, 90), n) for n in range(10)]
    assert (
        script.main([*map(str, photos), "--batch-size", "1", "--save", "png", "--output", str(tmp_path / "out")]) == 0
    )
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda n: ask_api(address, photos[n], None, "How far?", tmp_path / str(n)), range(10)))
    for number, (depth, answer, camera, _) in enumerate(answers):
        assert camera["width"] == 100 + 8 * number and isinstance(answer, str)
        ours = np.asarray(Image.open(tmp_path / "out" / f"{number}_depth.png")).astype(float)
        # a question makes the sequence longer, and bfloat16 rounds other shapes otherwise
        np.testing.assert_allclose(np.asarray(Image.open(depth)), ours, rtol=0.03)


def test_memory_stays_flat_over_many_requests(server, tmp_path):
    address, process, folder = server
    used = []
    for number in range(200):
        if number % 20 == 0:
            client = Client(address, verbose=False, download_files=str(tmp_path / "client"))
        photo = smooth_photo(tmp_path / f"{number}.png", (320, 240), number)
        client.predict(handle_file(photo), None, "", api_name="/predict")
        used.append(psutil.Process(process.pid).memory_info().rss / 2**20)
    print(f"RSS after 40, 100, 200 requests: {used[39]:.0f}, {used[99]:.0f}, {used[-1]:.0f} MiB")
    assert used[-1] - used[39] < 60


def test_no_path_and_no_url_is_read(address, tmp_path):
    secret = tmp_path / "secret.png"
    smooth_photo(secret)
    for value in (
        {"path": str(secret), "meta": {"_type": "gradio.FileData"}},
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": f"{address}/gradio_api/file=x", "meta": {"_type": "gradio.FileData"}},
        {"path": "http://example.com/photo.png", "meta": {"_type": "gradio.FileData"}},
        {"path": None, "url": "http://example.com/photo.png", "meta": {"_type": "gradio.FileData"}},
        str(secret),
        None,
    ):
        body = json.dumps({"data": [value, None, ""]}).encode()
        call = urllib.request.Request(f"{address}/gradio_api/call/predict", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=60) as response:
            event = json.loads(response.read())["event_id"]
        with urllib.request.urlopen(f"{address}/gradio_api/call/predict/{event}", timeout=60) as response:
            reply = response.read().decode()
        assert "event: error" in reply and "event: complete" not in reply, (value, reply)


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=../../../../etc/passwd",
        "gradio_api/file=http://example.com/",
        "gradio_api/file=https://example.com/",
        "gradio_api/proxy=http://example.com/",
        "gradio_api/deep_link?session_hash=x",
        "gradio_api/run-history/records",
        "download/guess/room.json",
        "download/../../etc/passwd",
    ],
)
def test_closed_doors(address, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/{path}", timeout=30)
    assert refused.value.code in (403, 404)


def upload(address, name, body_size=None, content=b""):
    """Status and reply of a form with one file, made up of zeros where `body_size` is given."""
    host, port = address.removeprefix("http://").split(":")
    edge = "edge"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
    head = (head + "Content-Type: image/png\r\n\r\n").encode()
    tail = f"\r\n--{edge}--\r\n".encode()
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", f"multipart/form-data; boundary={edge}")
    connection.putheader("Content-Length", str(len(head) + (body_size or len(content)) + len(tail)))
    connection.endheaders()
    sent = 0
    try:
        connection.send(head)
        if body_size is None:
            connection.send(content)
        while body_size and sent < body_size:
            connection.send(bytes(2**20))
            sent += 2**20
        connection.send(tail)
        response = connection.getresponse()
        return response.status, response.read(), sent
    except (BrokenPipeError, ConnectionResetError):
        return None, b"", sent
    finally:
        connection.close()


def test_an_upload_of_a_gigabyte_is_refused_and_leaves_nothing(server):
    address, process, folder = server
    before, memory = visitors_files(folder), psutil.Process(process.pid).memory_info().rss
    status, _, _ = upload(address, "large.png", 2**30)
    assert status in (413, None)
    assert psutil.Process(process.pid).memory_info().rss - memory < 100 * 2**20
    left = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 9 * 2**20]
    assert not left and len(visitors_files(folder) - before) <= 1  # a first part, which the next sweep removes


def test_names_of_uploads_lead_nowhere(server):
    address, _, folder = server
    for name in (
        "../../../../tmp/evil.png",
        "..\\\\..\\\\evil.png",
        "/etc/evil.png",
        "a/../../evil.png",
        "%2e%2e%2fevil.png",
    ):
        status, reply, _ = upload(address, name, content=ROOM.read_bytes())
        assert status == 200
        (path,) = json.loads(reply)
        assert Path(path).resolve().is_relative_to(folder.resolve()) and ".." not in Path(path).parts
    assert not Path("/tmp/evil.png").exists() and not Path("/etc/evil.png").exists()


def png_of_size(path, width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes((3 * width + 1) * 16))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_bombs_and_what_is_no_photo_are_refused_in_plain_words(address, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    files = {
        png_of_size(tmp_path / "bomb.png", 20000, 10000): "pixels|megapixels",
        png_of_size(tmp_path / "large.png", 10000, 8000): "80 megapixels; this page takes 50",
        tmp_path / "text.jpg": "cannot be read as an image",
    }
    for path, message in files.items():
        with pytest.raises(AppError, match=message) as refused:
            ask_api(address, path, folder=tmp_path / "client")
        assert str(tmp_path) not in str(refused.value) and "depthvlm-" not in str(refused.value)
    with pytest.raises(AppError, match="-5"):
        ask_api(address, ROOM, -5, folder=tmp_path / "client")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_when_the_server_is_stopped(tmp_path, how):
    with served(tmp_path / "tmp") as (address, process):
        ask_api(address, ROOM, question="How far?", folder=tmp_path / "client")
        (folder,) = (tmp_path / "tmp").glob("depthvlm-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        process.send_signal(how)
        assert process.wait(60) in (0, 130)
    assert list((tmp_path / "tmp").glob("**/*.*")) == []
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_package_of_the_page_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which is set for good otherwise
    monkeypatch.setitem(sys.modules, "web.actions", None)
    with pytest.raises(ValueError, match=r'a package is missing .*: pip install -e "\.\[app\]"'):
        app.serve(app.parse_args([]), tmp_path)


def test_it_is_served_on_this_machine_alone(server):
    _, process, _ = server
    listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


# The browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser's tests need playwright")
    if CHROMIUM is None:
        pytest.skip("the browser's tests need chromium on the path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Open the page; what its console says at the end must be expected."""
    contexts, complaints = [], []

    def visit(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60000)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: complaints.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
        )
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [text for text in complaints if not EXPECTED.search(text)] == []


def choose(page, path):
    page.locator("#photo input[type=file]").set_input_files(path)
    page.locator("#viewer canvas.depth").wait_for()


def place(page, canvas, x, y):
    """The middle of a pixel on the screen."""
    canvas = page.locator(f"#viewer canvas.{canvas}")
    canvas.scroll_into_view_if_needed()
    box, size = canvas.bounding_box(), canvas.evaluate("c => [c.width, c.height]")
    return box["x"] + (x + 0.5) * box["width"] / size[0], box["y"] + (y + 0.5) * box["height"] / size[1]


def click_points(page, tool, points, canvas="depth"):
    page.locator(f'#viewer button[data-tool="{tool}"]').click()
    for point in points:
        page.mouse.click(*place(page, canvas, *point))
    return float(page.locator("#viewer .reading").get_attribute("data-value"))


def download(page, name, tmp_path):
    with page.expect_download() as waiting:
        page.locator("#downloads a", has_text=name).click()
    waiting.value.save_as(tmp_path / name)
    return tmp_path / name


def unprojected(stored):
    """Points `(H, W, 3)` of an NPZ, by its own intrinsics."""
    depth, k = stored["depth"].astype(np.float64), stored["intrinsics"]
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]]
    return np.stack([(u - k[0, 2]) / k[0, 0] * depth, (v - k[1, 2]) / k[1, 1] * depth, depth], axis=-1)


def test_measuring_agrees_with_the_arrays(visit, tmp_path):
    page = visit()
    choose(page, ROOM)
    page.locator("#downloads a").first.wait_for()
    with np.load(download(page, "room.npz", tmp_path)) as file:
        stored = dict(file)
    points = unprojected(stored)
    for x, y in ((320, 240), (3, 470), (600, 30)):
        for canvas in ("depth", "photo"):
            page.mouse.move(*place(page, canvas, x, y))
            reading = page.locator("#viewer .reading")
            assert float(reading.get_attribute("data-value")) == pytest.approx(points[y, x, 2], rel=3e-4)
            assert f"({x}, {y})" in reading.inner_text() and " m at " in reading.inner_text()
    a, b, c, d = (60, 400), (500, 120), (620, 300), (300, 60)
    distance = click_points(page, "distance", [a, b])
    assert distance == pytest.approx(np.linalg.norm(points[a[::-1]] - points[b[::-1]]), rel=1e-3)
    assert page.locator("#viewer .reading").inner_text().startswith("Distance ")
    pieces = [np.linalg.norm(points[p[::-1]] - points[q[::-1]]) for p, q in ((a, b), (b, c), (c, d))]
    assert click_points(page, "line", [a, b, c, d], "photo") == pytest.approx(sum(pieces), rel=1e-3)
    # a drawn line has points along the way
    page.locator("#viewer button[data-tool=line]").click()
    page.mouse.move(*place(page, "depth", 100, 300))
    page.mouse.down()
    page.mouse.move(*place(page, "depth", 500, 310), steps=25)
    page.mouse.up()
    drawn = float(page.locator("#viewer .reading").get_attribute("data-value"))
    straight = np.linalg.norm(points[300, 100] - points[310, 500])
    assert straight * 0.9 < drawn < straight * 2.5
    # on the wall: the plane that fits its points best by another way, and the polygon of the corners on it
    corners = [(240, 60), (320, 60), (320, 200), (240, 200)]
    area = click_points(page, "area", corners)
    inside = points[60:201, 240:321].reshape(-1, 3)
    normal = np.linalg.svd(inside - inside.mean(axis=0), full_matrices=False)[2][2]
    k = stored["intrinsics"]
    rays = np.array([[(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], 1] for x, y in corners])
    on_plane = rays * (inside.mean(axis=0) @ normal / (rays @ normal))[:, None]
    halves = np.cross(on_plane[1:-1] - on_plane[0], on_plane[2:] - on_plane[0])
    assert area == pytest.approx(np.linalg.norm(halves, axis=1).sum() / 2, rel=0.05)
    assert "m²" in page.locator("#viewer .reading").inner_text()
    page.locator("#viewer button[data-clear]").click()
    assert "Area" not in page.locator("#viewer .reading").inner_text()


def test_files_of_the_page_are_those_of_the_command_line(visit, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    page = visit()
    choose(page, ROOM)
    page.locator("#downloads a").first.wait_for()
    assert script.main([str(ROOM), "--save", "png,npz,ply,glb,color,json", "--output", str(tmp_path / "out")]) == 0
    for name in ("room_depth.png", "room_color.png", "room.ply", "room.glb"):
        ours, theirs = (tmp_path / "out" / name).read_bytes(), download(page, name, tmp_path).read_bytes()
        assert ours == theirs, name
    page.locator("#cloud canvas").wait_for()
    shown = page.locator("#cloud a[data-testid=model3d-download-link]").get_attribute("href")
    (mesh,) = trimesh.load(io.BytesIO(urllib.request.urlopen(shown).read()), file_type="glb").geometry.values()
    assert len(mesh.faces) > 50_000


def test_the_map_is_there_before_the_first_word(visit):
    page = visit()
    page.evaluate(
        """() => {
            window.order = [];
            const seen = (what) => window.order.includes(what) || window.order.push(what);
            new MutationObserver(() => {
                const canvas = document.querySelector("#viewer canvas.depth");
                if (canvas && canvas.offsetWidth) seen("map");
                const word = document.querySelector("#chat [data-testid=bot]");
                if (word && getComputedStyle(word).visibility == "visible") seen("word");
            }).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
        }"""
    )
    page.locator("#question textarea, #question input").fill(QUESTIONS[0])
    choose(page, ROOM)
    page.locator("#chat [data-testid=bot]").first.wait_for()
    assert page.evaluate("window.order") == ["map", "word"]
    page.locator("#question textarea, #question input").fill(QUESTIONS[1])
    page.locator("#ask").click()
    page.locator("#chat [data-testid=bot]").nth(1).wait_for()
    assert page.locator("#chat [data-testid=user]").count() == 2


def test_the_camera_is_said_and_corrected_at_once(visit):
    page = visit()
    choose(page, ROOM)
    page.locator("#status", has_text="from the photo's EXIF data").wait_for()
    tokens = page.locator("#status").inner_text()
    assert "63 image tokens (288x224 px)" in tokens and re.search(r"after \d+ ms", tokens)
    page.mouse.move(*place(page, "depth", 320, 240))
    reading = page.locator("#viewer .reading")
    before = float(reading.get_attribute("data-value"))
    page.locator("#camera button").first.click()
    page.locator("#camera-text", has_text="455.2 px at 640x480").wait_for()
    page.locator("#focal input").fill("910.444")
    page.locator("#rescale").click()
    page.locator("#status", has_text="metres were rescaled").wait_for()
    wait_for(lambda: float(reading.get_attribute("data-value")) > 1.5 * before)
    assert float(reading.get_attribute("data-value")) == pytest.approx(2 * before, rel=1e-3)
    page.locator("#focal input").fill("60")
    page.locator("#unit input").click()
    page.get_by_role("option", name="degrees").click()
    page.locator("#again").click()
    page.locator("#status", has_text="Focal length 554 px: as given").wait_for()


def test_a_photo_without_exif_is_said_to_be_assumed(visit, tmp_path):
    page = visit()
    choose(page, smooth_photo(tmp_path / "plain.png"))
    page.locator("#status", has_text="Focal length").wait_for()
    assert "assumed (60 degrees of view)" in page.locator("#status").inner_text()


def test_keyboard(visit):
    page = visit()
    choose(page, ROOM)
    canvas, reading = page.locator("#viewer canvas.depth"), page.locator("#viewer .reading")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    assert "(321, 250)" in reading.inner_text()
    page.locator("#viewer button[data-tool=distance]").press("Enter")
    canvas.focus()
    page.keyboard.press("Enter")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Enter")
    assert reading.inner_text().startswith("Distance ")
    page.keyboard.press("Escape")
    assert "Distance" not in reading.inner_text()
    names = page.locator("#viewer canvas").evaluate_all("all => all.map(c => c.getAttribute('aria-label'))")
    assert all(names) and names[2].startswith("Scale from ")


def test_photo_and_depth_on_a_slider(visit):
    page = visit()
    choose(page, ROOM)
    page.locator("#viewer button[data-view]").click()
    assert not page.locator("#viewer canvas.depth").is_visible()
    at = "([x]) => [...document.querySelector('#viewer canvas.photo').getContext('2d').getImageData(x, 300, 1, 1).data]"
    page.locator("#viewer input[type=range]").fill("0")
    depth = page.evaluate(at, [100])
    page.locator("#viewer input[type=range]").fill("100")
    assert page.evaluate(at, [100]) != depth
    page.locator("#viewer input[type=range]").fill("10")
    assert page.evaluate(at, [100]) == depth


def test_what_cannot_be_read_is_said(visit, tmp_path):
    page = visit()
    (tmp_path / "bad.jpg").write_text("no image")
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "bad.jpg")
    toast = page.locator("[data-testid=toast-body]")
    toast.first.wait_for()
    assert "cannot be read as an image" in toast.first.inner_text() and "/tmp" not in toast.first.inner_text()
    page.locator("#ask").click()
    page.locator("[data-testid=toast-body]", has_text="Write a question first").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_phone(visit, theme):
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme=theme)
    choose(page, ROOM)
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.touchscreen.tap(*place(page, "depth", 100, 100))
    assert "(100, 100)" in page.locator("#viewer .reading").inner_text()
    smallest = page.locator("#viewer button").evaluate_all("all => Math.min(...all.map(b => b.offsetHeight))")
    assert smallest >= 36


def test_an_example_fills_in_its_question_and_is_answered(visit):
    page = visit()
    page.locator("#examples tr", has_text="right half").click()
    page.locator("#viewer canvas.depth").wait_for()
    page.locator("#chat [data-testid=bot]").first.wait_for()
    assert "right half" in page.locator("#chat [data-testid=user]").inner_text()
    assert page.locator("#chat [data-testid=bot]").inner_text().strip()


def test_several_photos_give_a_table_and_an_archive(visit, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    files = [ROOM, ROOT / "samples" / "street.jpg", tmp_path / "bad.png"]
    page = visit()
    page.get_by_role("tab", name="Several photos").click()
    page.locator("#files input[type=file]").set_input_files(files)
    page.locator("#files", has_text=re.compile(r"street\s+\.jpg")).wait_for()  # as in the list of those uploaded
    page.locator("#files-start").click()
    with page.expect_download() as waiting:
        page.locator("#zip a").click()
    waiting.value.save_as(tmp_path / "depth.zip")
    with zipfile.ZipFile(tmp_path / "depth.zip") as archive:
        assert archive.testzip() is None
        content = {name: archive.read(name) for name in archive.namelist()}
    rows = list(csv.DictReader(io.StringIO(content["table.csv"].decode())))
    assert [row["photo"] for row in rows] == ["room.jpg", "street.jpg", "bad.png"] and rows[0]["source"] == "exif"
    assert "not read" in rows[2]["answer"]
    depth = np.asarray(Image.open(io.BytesIO(content["room_depth.png"]))) / 1000
    assert [float(rows[0][name]) for name in ("min", "median", "max")] == pytest.approx(
        [depth.min(), np.median(depth), depth.max()], abs=6e-4
    )
    assert set(content) == {"table.csv"} | {
        f"{name}{end}" for name in ("room", "street") for end in ("_depth.png", "_color.png", ".ply", ".json")
    }
    assert "not read" in page.locator("#table").inner_text()


def test_a_video(visit, tmp_path):
    av = pytest.importorskip("av")
    picture = np.asarray(Image.open(smooth_photo(tmp_path / "p.png", (160, 96))))
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for number in range(8):
            frame = np.ascontiguousarray(picture[:, 8 * number : 8 * number + 96])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    page = visit()
    page.get_by_role("tab", name="Video").click()
    page.locator("#video input[type=file]").set_input_files(tmp_path / "clip.mp4")
    page.locator("#video", has_text="clip.mp4").wait_for()
    page.locator("#video-start").click()
    page.locator("#video-status", has_text="4 frames").wait_for()
    page.locator("#player video").wait_for()
    wait_for(lambda: page.locator("#player video").evaluate("v => v.readyState") >= 1)
    assert page.locator("#player video").evaluate("v => v.duration") == pytest.approx(2, abs=0.1)
    with page.expect_download() as waiting:
        page.locator("#frames a", has_text="frames.zip").click()
    with zipfile.ZipFile(waiting.value.path()) as archive:
        assert len([name for name in archive.namelist() if name.endswith("s_depth.png")]) == 4


def test_a_visitors_files_go_with_the_page(visit, server, tmp_path):
    _, _, folder = server
    page = visit()
    before = visitors_files(folder)
    choose(page, smooth_photo(tmp_path / "private.png", seed=77))
    page.locator("#downloads a").first.wait_for()
    link = page.locator("#downloads a").first.evaluate("a => a.href")
    with urllib.request.urlopen(link) as response:
        assert response.headers["Cache-Control"] == "no-store"
    assert len(visitors_files(folder) - before) == 2  # the photo and its cloud
    page.close()
    assert wait_for(lambda: not visitors_files(folder) - before)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(link)


def test_a_second_photo_replaces_the_first(visit, server, tmp_path):
    _, _, folder = server
    page = visit()
    before = visitors_files(folder)
    with page.expect_response(lambda response: response.url.endswith(".glb")) as cloud:
        choose(page, smooth_photo(tmp_path / "first.png", seed=78))
    cloud.value.finished()
    page.locator("#downloads a", has_text="first.ply").wait_for()
    page.wait_for_timeout(
        1000
    )  # for Babylon, which stumbles over a file that is taken away while it draws the first time
    page.locator("#photo button[aria-label='Remove Image']").click()
    page.locator("#viewer .empty").wait_for()
    choose(page, smooth_photo(tmp_path / "second.png", seed=79))
    page.locator("#downloads a", has_text="second.ply").wait_for()
    assert wait_for(lambda: len(visitors_files(folder) - before) == 2)
    assert not [name for name in visitors_files(folder) if "first" in name]


def test_the_threads_of_a_server_end(server):
    """Nothing of a request goes on when it is answered."""
    _, process, _ = server
    wait_for(lambda: psutil.Process(process.pid).cpu_percent(0.5) < 50)
    assert threading.active_count() < 50 and psutil.Process(process.pid).num_threads() < 120
