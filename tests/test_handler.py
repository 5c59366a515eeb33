"""handler.py as Inference Endpoints' toolkit runs it: loaded from its file, called in threads, answered as JSON."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

import predict as script
from create_tiny import create

ROOT = Path(__file__).resolve().parent.parent


def load_handler(folder):
    """As the toolkit does: the repository first on the path, its handler.py as a module without a package."""
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("endpoint", Path(folder) / "handler.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.EndpointHandler(str(folder))
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def handler():
    return load_handler(ROOT)


@pytest.fixture(scope="module")
def address(handler):
    """A server that hands over what the toolkit would: JSON as it is, an image body as a PIL image."""

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                if self.headers["Content-Type"].startswith("image/"):
                    reply, status = handler({"inputs": Image.open(io.BytesIO(body)).convert("RGB")}), 200
                else:
                    reply, status = handler(json.loads(body)), 200
            except Exception as error:
                reply, status = {"error": str(error)}, 400
            content = json.dumps(reply, allow_nan=False).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def post(address, content, kind="application/json"):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def png_of(reply):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["png"]))))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight photos of several sizes, three with a focal length in EXIF, one turned, and predict.py's maps of them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(8):
        exif = Image.Exif()
        if number in (1, 4, 6):
            exif.get_ifd(0x8769)[41989] = 30 + number
        if number == 4:
            exif[0x0112] = 6
        coarse = Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8))
        coarse.resize((160 + 16 * (number % 3), 120), Image.Resampling.BICUBIC).save(
            folder / f"{number}.jpg", exif=exif
        )
    arguments = [str(folder), "--output", str(folder / "maps"), "--batch-size", "1", "--save", "png,json"]
    assert script.main(arguments) == 0
    return folder


def test_eight_requests_at_once_get_the_depth_of_the_command_line_to_the_bit(address, photos):
    def ask(number):
        content = (photos / f"{number}.jpg").read_bytes()
        text = base64.b64encode(content).decode()
        if number % 4 == 0:
            return post(address, content, "image/jpeg")
        if number % 4 == 1:
            return post(address, {"inputs": text})
        if number % 4 == 2:
            return post(address, {"inputs": f"data:image/jpeg;base64,{text}", "parameters": {}})
        return post(address, {"inputs": text, "parameters": {"outputs": ["png", "npz"]}})

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, range(8)))
    for number, reply in enumerate(replies):
        expected = np.asarray(Image.open(photos / "maps" / f"{number}_depth.png"))
        np.testing.assert_array_equal(png_of(reply), expected)
        record = json.loads((photos / "maps" / f"{number}.json").read_text())
        assert reply["camera"] == record["camera"] and reply["answer"] is None
        assert reply.keys() == {"png", "camera", "answer"} | ({"npz"} if number % 4 == 3 else set())


def test_a_float16_map_comes_with_its_camera(handler, photos):
    content = (photos / "1.jpg").read_bytes()
    reply = handler({"inputs": content, "parameters": {"outputs": "npz"}})
    with np.load(io.BytesIO(base64.b64decode(reply["npz"]))) as file:  # nothing pickled
        stored = {name: file[name] for name in file}
    assert stored["depth"].dtype == np.float16 and "png" not in reply
    expected = np.asarray(Image.open(photos / "maps" / "1_depth.png")) / 1000
    np.testing.assert_allclose(stored["depth"], expected, rtol=1e-3)
    assert stored["focal_length_source"] == "exif"
    assert {name: stored[name] for name in ("fx", "fy", "cx", "cy", "width", "height")} == {
        name: value for name, value in reply["camera"].items() if name in ("fx", "fy", "cx", "cy", "width", "height")
    }


def test_parameters(handler, photos):
    content = (photos / "0.jpg").read_bytes()
    plain = handler({"inputs": content})
    asked = handler({"inputs": content, "parameters": {"question": "How far is it?", "focal_length": 150.5}})
    assert isinstance(asked["answer"], str) and asked["camera"]["focal_length_source"] == "given"
    by_query = handler({"inputs": content, "parameters": {"focal_length": "150.5", "outputs": "png"}})
    assert by_query["camera"]["fx"] == asked["camera"]["fx"] == 150.5
    np.testing.assert_allclose(png_of(by_query), png_of(asked), rtol=0.02)  # bfloat16, other shapes
    both = handler({"inputs": content, "parameters": {"focal_length": [150, 155]}})
    assert (both["camera"]["fx"], both["camera"]["fy"]) == (150, 155)
    small = handler({"inputs": content, "parameters": {"max_pixels": 9000}})
    assert np.prod(small["camera"]["processed_size"]) <= 9000 < np.prod(plain["camera"]["processed_size"])


REFUSED = {
    "path": ({"inputs": "/etc/passwd"}, "paths and URLs are not read"),
    "relative path": ({"inputs": "../samples/room.jpg"}, "paths and URLs are not read"),
    "URL": ({"inputs": "http://127.0.0.1:9/photo.jpg"}, "paths and URLs are not read"),
    "file URL": ({"inputs": "file:///etc/passwd"}, "paths and URLs are not read"),
    "a name that is base64": ({"inputs": "samplesroom1"}, "cannot be read as an image"),
    "nothing": ({}, "inputs is a NoneType"),
    "number": ({"inputs": 5}, "inputs is a int"),
    "list": ({"inputs": ["a"]}, "inputs is a list"),
    "empty": ({"inputs": ""}, "cannot be read as an image"),
    "no image": ({"inputs": base64.b64encode(b"x" * 100).decode()}, "cannot be read as an image"),
    "data URL without data": ({"inputs": "data:image/png;base64,"}, "cannot be read as an image"),
    "unknown": ({"inputs": "", "parameters": {"focal": 1}}, "unknown parameters focal; known are"),
    "outputs": ({"inputs": "", "parameters": {"outputs": ["jpg"]}}, "outputs is ['jpg']"),
    "outputs of another kind": ({"inputs": "", "parameters": {"outputs": 5}}, "outputs is 5"),
    "question": ({"inputs": "", "parameters": {"question": " "}}, "question is ' '"),
    "question of another kind": ({"inputs": "", "parameters": {"question": 5}}, "question is 5"),
    "focal length": ({"inputs": "", "parameters": {"focal_length": "wide"}}, "focal_length is 'wide'"),
    "negative focal length": ({"parameters": {"focal_length": -5}}, "is -5.0"),
    "three focal lengths": ({"parameters": {"focal_length": [1, 2, 3]}}, "(fx, fy)"),
    "budget": ({"parameters": {"max_pixels": 3}}, "max_pixels is 3"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_requests_are_answered_with_a_sentence(address, photos, fault):
    request, message = REFUSED[fault]
    if fault in ("negative focal length", "three focal lengths", "budget"):
        request = {"inputs": base64.b64encode((photos / "0.jpg").read_bytes()).decode()} | request
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(address, request)
    assert refused.value.code == 400
    assert message in json.loads(refused.value.read())["error"]


def test_the_readmes_request(address, photos, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("the README's request needs curl")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Serving")[1]
    command = textwrap.dedent(re.search(r"    curl .*?\n    END\n", section, re.DOTALL)[0])
    shutil.copy(photos / "0.jpg", tmp_path / "photo.jpg")
    environment = os.environ | {"ENDPOINT": address, "HF_TOKEN": "token", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    reply = json.loads(done.stdout)
    assert png_of(reply).shape == (120, 160) and isinstance(reply["answer"], str) and reply["camera"]["width"] == 160


def test_every_save_holds_the_handler(tmp_path):
    """What is saved from the package, as training does, and what is saved again from another checkpoint's code."""
    create(tmp_path / "new")
    assert (tmp_path / "new" / "handler.py").read_bytes() == (ROOT / "handler.py").read_bytes()
    AutoProcessor.from_pretrained(tmp_path / "new", trust_remote_code=True).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "handler.py").read_bytes() == (ROOT / "handler.py").read_bytes()
    reply = load_handler(tmp_path / "new")({"inputs": Image.new("RGB", (64, 48))})
    assert png_of(reply).shape == (48, 64)
