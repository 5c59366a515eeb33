"""The service on real Ray Serve, started and stopped by its command, asked by the `openai` client and by plain HTTP."""

import base64
import io
import json
import re
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import rays
import torch
from PIL import Image

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor

pytest.importorskip("ray", reason="Ray is missing: pip install -e '.[ray]'")
openai = pytest.importorskip("openai", reason="openai is missing: pip install -e '.[ray]'")
FOCAL = 200.0
CLIENTS, REQUESTS = 16, 20
MAX_REQUESTS = 16
LONG = 2000  # tokens, of an answer that nobody waits for


class Service:
    """A running `python -m cluster serve`."""

    def __init__(self, environment: dict, model: Path):
        self.port, self.metrics_port = rays.free_port(), rays.free_port()
        self.folder = Path(environment["RAY_TMPDIR"])
        options = [
            "--dtype",
            "float32",
            "--port",
            self.port,
            "--metrics-port",
            self.metrics_port,
            "--max-requests",
            MAX_REQUESTS,
        ]
        options += ["--max-batch-size", 8, "--max-answer-tokens", LONG, "--max-body-bytes", 1_000_000]
        options += ["--max-image-pixels", 1_000_000, "--max-images", 2, "--max-prompt-tokens", 1000]
        self.process = rays.start(environment, "serve", "--model", model, *options)
        self.lines = []
        threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True).start()
        rays.wait_for(lambda: self.process.poll() is not None or self.get("/health")[0] == 200, "the service")
        assert self.process.poll() is None, "".join(self.lines)
        url = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=rays.PATIENCE)

    def get(self, path, port=None) -> tuple[int, dict, str]:
        return self.open(urllib.request.Request(f"http://127.0.0.1:{port or self.port}{path}"))

    def post(self, path, body) -> tuple[int, dict, str]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.open(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", content))

    def open(self, request) -> tuple[int, dict, str]:
        try:
            with urllib.request.urlopen(request, timeout=rays.PATIENCE) as reply:
                return reply.status, dict(reply.headers), reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read().decode()
        except OSError as error:
            return 0, {}, str(error)

    def refused(self, path, body) -> tuple[int, str]:
        """Status and message of a refusal, which has OpenAI's form."""
        status, _, text = self.post(path, body)
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return status, error["message"]

    def waves(self) -> list[dict]:
        """What the replica has logged of its waves, as JSON."""
        logs = self.folder.glob("ray/session_latest/logs/serve/replica_*.log")
        lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        return [line for line in lines if line["message"] == "wave"]

    def metric(self, name: str) -> float:
        text = self.get("/metrics", self.metrics_port)[2]
        return sum(float(value) for value in re.findall(rf"^\w*{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))

    def stream(self, tokens: int, **options):
        """A long streamed answer that has begun."""
        messages = [{"role": "user", "content": "Hello"}]
        options = {"model": "depthvlm", "messages": messages, "max_tokens": tokens, "stream": True} | options
        chunks = self.client.chat.completions.create(**options)
        next(iter(chunks))
        return chunks


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The checkpoint, but no token ends an answer: it has as many tokens as it was allowed."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("*.json", "*.py", "*.jinja", "*.safetensors"):
        for file in rays.ROOT.glob(name):
            shutil.copy(file, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"eos_token_id": 479, "suppress_tokens": [469, 475, 476, 479]}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(model_folder):
    """Processor and model in float32, as in the service: in bfloat16 two tokens tie now and then."""
    processor = DepthVLMProcessor.from_pretrained(model_folder, trust_remote_code=False)
    return processor, DepthVLMForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def environment():
    with rays.ray_environment() as environment:
        yield environment


@pytest.fixture(scope="module")
def service(environment, model_folder):
    service = Service(environment, model_folder)
    yield service
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(rays.PATIENCE) == 0, "".join(service.lines)


def photo(seed) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    size = [(96, 64), (64, 96), (128, 96)][seed % 3]
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def conversation(seed) -> list[dict]:
    image = {"type": "image_url", "image_url": {"url": data_url(photo(seed))}}
    return [{"role": "user", "content": [image, {"type": "text", "text": f"How many posts are there? {seed}"}]}]


def decode(reply: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["png"])))) / 1000


def alone(model, seed, tokens) -> tuple[str, np.ndarray]:
    """Answer and metres, by the model's own `generate`."""
    processor, model = model
    content = [{"type": "image"}, {"type": "text", "text": f"How many posts are there? {seed}"}]
    system = {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]}
    text = processor.apply_chat_template([system, {"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(images=[photo(seed)], text=[text], focal_lengths=FOCAL, return_tensors="pt")
    with torch.inference_mode():
        outputs = model.generate(**batch, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
    answer = processor.decode(outputs.sequences[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, processor.post_process_depth_estimation(outputs)[0]["predicted_depth"].numpy()


def test_the_openai_client_streams_an_answer_and_reads_the_depth(service, model):
    options = {"model": "depthvlm", "messages": conversation(0), "max_tokens": 12}
    extra = {"depth": "png", "focal_lengths": [FOCAL]}
    expected, metres = alone(model, 0, 12)
    whole = service.client.chat.completions.create(**options, extra_body=extra)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (expected, "length")
    chunks = list(
        service.client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}, extra_body=extra
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert not chunks[0].choices[0].delta.content  # depth comes before any text
    for depth in (whole.depth, chunks[0].depth):
        np.testing.assert_allclose(decode(depth[0]), metres, rtol=1e-3, atol=6e-4)
        assert depth[0]["camera"]["fx"] == FOCAL and depth[0]["camera"]["focal_length_source"] == "given"
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 12
    assert len({whole.id, chunks[0].id}) == 2 and len({chunk.id for chunk in chunks}) == 1


def test_the_readmes_client_runs(service, monkeypatch):
    (code,) = re.findall(r"```py\n(.*?)```", (rays.ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(rays.ROOT)
    names = {}
    exec(code.replace(":8000/", f":{service.port}/"), names)
    assert names["depth"].shape == Image.open("samples/room.jpg").size[::-1] and names["depth"].min() > 0
    assert names["camera"]["fx"] == 250.0 and names["reply"].usage.completion_tokens == 32 and names["answer"]


def test_depth_alone_as_npz(service, model):
    status, headers, text = service.post("/v1/depth", {"image": data_url(photo(1)), "depth": "npz"})
    reply = json.loads(text)
    assert status == 200 and headers["x-request-id"] and reply["camera"]["focal_length_source"] == "assumed"
    processor, network = model
    with torch.inference_mode():
        outputs = network(**processor(images=[photo(1)], return_tensors="pt"))
    expected = processor.post_process_depth_estimation(outputs)[0]["predicted_depth"].numpy()
    with np.load(io.BytesIO(base64.b64decode(reply["npz"]))) as file:
        assert file["depth"].dtype == np.float16
        np.testing.assert_allclose(file["depth"], expected, rtol=2e-3)


@pytest.mark.parametrize("requests", [2, pytest.param(REQUESTS, marks=pytest.mark.slow)])
def test_distinct_photos_of_many_clients_are_not_mixed_up(service, model, requests):
    """Each client waits for its answer before its next request."""

    def ask(client: int) -> list:
        replies = []
        for number in range(requests):
            options = {"messages": conversation(client * requests + number), "max_tokens": 4}
            extra = {"depth": "png", "focal_lengths": FOCAL}
            reply = service.client.chat.completions.create(model="depthvlm", **options, extra_body=extra)
            replies.append((reply.choices[0].message.content, decode(reply.depth[0])))
        return replies

    before = len(service.waves())
    with ThreadPoolExecutor(CLIENTS) as pool:
        replies = [reply for replies in pool.map(ask, range(CLIENTS)) for reply in replies]
    expected = [alone(model, seed, 4) for seed in range(CLIENTS * requests)]
    assert [answer for answer, _ in replies] == [answer for answer, _ in expected]
    for (_, depth), (_, metres) in zip(replies, expected, strict=True):
        np.testing.assert_allclose(depth, metres, rtol=1e-3, atol=6e-4)
    others = [metres for _, metres in expected[3::3]]  # of the first one's size
    assert not any(np.allclose(other, expected[0][1], rtol=1e-3, atol=6e-4) for other in others)
    waves = service.waves()[before:]
    assert sum(wave["requests"] for wave in waves) == CLIENTS * requests
    assert max(wave["requests"] for wave in waves) > 1
    rays.wait_for(lambda: service.metric("depthvlm_wave_requests_total") >= CLIENTS * requests, "metrics", 60)
    assert 0 < service.metric("depthvlm_waves_total") < service.metric("depthvlm_wave_requests_total")


def test_beyond_the_limit_of_requests_is_429(service):
    """More clients than there is room for, who ask for long answers again and again."""
    leave, depth = threading.Event(), {"image": data_url(photo(0))}

    def ask(_) -> set[str]:
        refused = set()
        while not leave.is_set():
            try:
                for _ in service.stream(LONG // 5):
                    if leave.is_set():
                        break
            except openai.RateLimitError as error:
                refused.add(error.message)
                time.sleep(0.1)
        return refused

    clients = MAX_REQUESTS + 4  # Serve itself refuses beyond twice as many as the replica takes
    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(ask, number) for number in range(clients)]
        try:
            status, headers, text = rays.wait_for(
                lambda: (reply := service.post("/v1/depth", depth))[0] != 200 and reply, "a refusal"
            )
        finally:
            leave.set()
        refused = set().union(*(future.result() for future in asked))
    assert all("16 requests are running or waiting; try again later" in message for message in refused) and refused
    assert status == 429 and headers["retry-after"] == "1"
    assert json.loads(text)["error"]["type"] == "rate_limit_error"
    rays.wait_for(lambda: service.post("/v1/depth", depth)[0] == 200, "room again", 60)


def test_what_is_too_much_or_no_image_is_refused_in_a_sentence(service):
    large = io.BytesIO()
    Image.new("RGB", (1001, 1000)).save(large, "png")
    cases = [
        ({"image": "x" * 1_100_000}, 413, "the request is longer than 1000000 bytes"),
        ({"image": data_url(large.getvalue())}, 413, "1001x1000 pixels; send at most 1000000"),
        ({"image": "/etc/passwd"}, 400, "no file is opened here"),
        ({"image": "file:///etc/passwd"}, 400, "no file is opened here"),
        ({"image": f"http://127.0.0.1:{service.port}/health"}, 400, "no address"),
        ({"image": data_url(b"no image at all, but some bytes of text")}, 400, "cannot be read as an image"),
        ({"image": "data:image/png;base64,a"}, 400, "cannot be decoded"),
        ({"image": data_url(photo(0)), "focal_length": 0.5}, 400, "degrees of view"),
        ({"image": data_url(photo(0)), "max_pixels": 5}, 400, "max_pixels is 5"),
        ({"picture": data_url(photo(0))}, 400, "image: Field required"),
        (b"{", 400, "Invalid JSON"),
    ]
    for body, status, message in cases:
        refused = service.refused("/v1/depth", body)
        assert refused[0] == status and message in refused[1], (str(body)[:80], refused)
    cases = [
        ({"stop": ["x"]}, 400, "stop: is not supported here; leave it out"),
        ({"model": "gpt-4o"}, 404, "the model is called 'depthvlm', not 'gpt-4o'"),
        ({"max_tokens": LONG + 1}, 400, f"ask for at most {LONG}"),
        ({"depth": "png"}, 400, "the messages hold no image"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 413, "send at most 1000"),
        ({"messages": 3 * conversation(0)}, 413, "the request has 3 images; send at most 2"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}]}, 400, "placeholders"),
    ]
    for change, status, message in cases:
        body = {"model": "depthvlm", "messages": [{"role": "user", "content": "Hello"}]} | change
        refused = service.refused("/v1/chat/completions", body)
        assert refused[0] == status and message in refused[1], (str(change)[:80], refused)
    assert service.refused("/v1/images", {})[0] == 404


def test_a_client_that_goes_away_stops_its_request(service):
    before = len(service.waves())
    stream = service.stream(LONG)
    for _, chunk in zip(range(3), stream, strict=False):
        assert chunk.choices[0].delta.content
    stream.close()
    (wave,) = rays.wait_for(lambda: service.waves()[before:], "the end of the wave", 60)
    assert 0 < wave["tokens"] < LONG / 2


def test_a_conversation_without_photos(service):
    reply = service.client.chat.completions.create(
        model="depthvlm", messages=[{"role": "user", "content": "Hello"}], max_tokens=3, temperature=0.7, top_p=0.9
    )
    assert reply.usage.completion_tokens == 3 and "depth" not in reply.model_extra
    assert [model.id for model in service.client.models.list()] == ["depthvlm"]


def test_only_this_machine_is_served_and_rays_token_guards_its_ports(service, environment):
    listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == service.port]
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
    assert (Path(environment["HOME"]) / ".ray" / "auth_token").stat().st_size > 0


def test_sigterm_lets_requests_end_and_refuses_new_ones(environment, service, model_folder):
    """The last test of the module: it stops the service."""
    tokens = 600
    received = []
    stream = service.stream(tokens)
    reader = threading.Thread(target=lambda: received.extend(stream))
    reader.start()
    processes = psutil.Process(service.process.pid).children(recursive=True)
    service.process.send_signal(signal.SIGTERM)
    rays.wait_for(lambda: service.get("/health")[0] == 503, "the service's draining", 60)
    assert reader.is_alive(), "the answer has ended before the service could be asked"
    status, message = service.refused("/v1/depth", {"image": data_url(photo(0))})
    assert (status, message) == (503, "the service is stopping; send the request again")
    reader.join(rays.PATIENCE)
    assert received[-1].choices[0].finish_reason == "length"
    assert service.process.wait(rays.PATIENCE) == 0, "".join(service.lines)
    gone, left = psutil.wait_procs(processes, timeout=30)
    assert len(gone) > 5 and not left
