"""The contestant behind an OpenAI-compatible endpoint, against a local server: good, bad and missing replies."""

import base64
import io
import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from test_evaluate import make_row, write_bench

from bench.__main__ import main
from bench.contestants import openai
from bench.contestants._base import NotRunnable, Query
from bench.contestants._prompt import PROMPT, mark

KEY = "sk-test-0123456789abcdef"


class Server(ThreadingHTTPServer):
    """Answers by its list of replies, the last one for ever: (status, body), (status, body, headers), or "hang"."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests, self.release, self.lock = [], [], threading.Event(), threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers, body))
            replies = self.server.replies
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if reply == "hang":
            self.server.release.wait(30)
            return
        status, text, *headers = reply
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(text.encode()))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST

    def log_message(self, *args):
        pass


def said(text, finish_reason="stop", **message):
    message = {"role": "assistant", "content": text} | message
    return 200, json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}], "usage": {}})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def make(**settings):
    return openai.CONTESTANT("gpt-toy", **{"requests_per_minute": 1e6, "timeout": 5, "retries": 2} | settings)


def query(points=((40, 30),), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 200, (64, 96, 3), dtype=np.uint8)
    return Query(f"toy/test/{seed}", Image.fromarray(pixels), (80.0, 80.0, 48.0, 32.0), np.array(points, np.float64))


def only(contestant):
    ((answer,),) = contestant.answers([query()])
    return answer


def test_a_question_is_the_marked_image_and_the_prompt_and_no_more(server):
    server.replies = [said("2.5 m")]
    answer = only(make())
    assert (answer.depth, answer.status, answer.text) == (2.5, "ok", "2.5 m")
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body.keys() == {"model", "messages"} and body["model"] == "gpt-toy"
    ((image, text),) = [message["content"] for message in body["messages"]]
    assert text == {"type": "text", "text": PROMPT}
    kind, data = image["image_url"]["url"].split(",")
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;base64" and sent.format == "PNG"
    assert sent.tobytes() == mark(query().image, (40, 30)).tobytes()


@pytest.mark.parametrize(
    ("replies", "status", "requests"),
    [
        ([said("2.5 m")], "ok", 1),
        ([(429, "{}", ("Retry-After", "0")), said("2.5 m")], "ok", 2),
        ([(500, "oops"), (502, ""), said("2.5 m")], "ok", 3),
        (["hang", said("2.5 m")], "ok", 2),
        ([(200, "<html>"), said("2.5 m")], "ok", 2),
        ([(200, ""), said("2.5 m")], "ok", 2),
        ([said("3-4 meters")], "unparsable", 1),
        ([said("")], "unparsable", 1),
        ([said(None)], "unparsable", 1),
        ([said("2", "length")], "unparsable", 1),
        ([said("-1")], "invalid", 1),
        ([said("I cannot determine the depth.")], "refused", 1),
        ([said(None, refusal="I will not.")], "refused", 1),
        ([said("", "content_filter")], "refused", 1),
        ([(429, "{}", ("Retry-After", "0"))], "failed", 3),
        ([(500, "oops")], "failed", 3),
        ([(503, "oops")], "failed", 3),
        ([(200, "not json")], "failed", 3),
        ([(200, '{"choices": []}')], "failed", 3),
        ([(200, '{"choices": [{"message": {"content": 2.5}}]}')], "failed", 3),
        (["hang"], "failed", 3),
        ([(400, '{"error": {"message": "bad image"}}')], "failed", 1),
    ],
)
def test_each_outcome_has_its_status(server, replies, status, requests):
    server.replies = replies
    answer = only(make(timeout=0.3 if "hang" in replies else 5))
    assert answer.status == status and len(server.requests) == requests
    assert answer.depth == 2.5 if status == "ok" else math.isnan(answer.depth)


@pytest.mark.parametrize(
    "reply", [(401, f"wrong key {KEY}"), (404, "no such model"), (429, '{"error": {"code": "insufficient_quota"}}')]
)
def test_what_every_request_would_meet_ends_the_run_and_shows_no_key(server, reply):
    server.replies = [reply]
    with pytest.raises(NotRunnable, match=str(reply[0])) as caught:
        make().answers([query()])
    assert KEY not in str(caught.value) and len(server.requests) == 1


@pytest.fixture
def other():
    """Another host's server, which nothing should reach."""
    other = Server()
    threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    other.replies = [said("2.5 m")]
    yield other
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_is_not_taken_to_another_host(server, other, status):
    server.replies = [(status, "", ("Location", f"http://127.0.0.1:{other.server_port}/v1/chat/completions"))]
    with pytest.raises(NotRunnable, match=str(status)):
        make().answers([query()])
    assert not other.requests and len(server.requests) == 1


def test_a_proxy_does_not_read_the_key_of_a_plain_http_request(server, other, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{other.server_port}")
    server.replies = [said("2.5 m")]
    assert only(make()).depth == 2.5
    assert not other.requests and len(server.requests) == 1


def test_a_second_run_asks_nothing_and_the_key_is_in_no_file(server, tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    server.replies = [said("2.5 m"), said("3-4 meters"), said("", refusal=f"no, {KEY}"), (500, KEY)]
    queries = [query([(40, 30)]), query([(50, 20)]), query([(1, 1), (60, 40)]), query([(30, 30)], seed=1)]
    first = [make(cache=tmp_path, retries=0).answers([each]) for each in queries]
    assert [answer.status for ((*answers,),) in first for answer in answers] == [
        "ok", "unparsable", "unmarkable", "refused", "failed",
    ]  # fmt: skip
    assert len(server.requests) == 4
    server.replies = [said("9 m")]
    second = [make(cache=tmp_path, retries=0).answers([each]) for each in queries]
    assert len(server.requests) == 5  # the failed one alone
    assert repr(second[:3]) == repr(first[:3]) and second[3][0][0].depth == 9
    make(cache=tmp_path).answers(queries)
    assert len(server.requests) == 5
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4 and all(path.suffix == ".json" for path in files)
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    output = capfd.readouterr()
    assert KEY not in caplog.text + output.out + output.err + repr(first) + repr(second)


def test_another_model_prompt_or_image_is_another_question(server, tmp_path):
    server.replies = [said("2.5 m")]
    make(cache=tmp_path).answers([query(), query(seed=1)])
    openai.CONTESTANT("other", cache=tmp_path, requests_per_minute=1e6).answers([query()])
    contestant = make(cache=tmp_path)
    contestant.ask((query().image, "How far?"))
    contestant.ask((query().image, "How far?"))
    assert len(server.requests) == 4


def test_a_killed_run_goes_on_from_what_was_answered(server, tmp_path, monkeypatch):
    server.replies = [said("2.5 m")]
    asked = query([(30 + index, 30) for index in range(20)])
    request, count = openai.OpenAI.request, iter(range(100))

    def dies(self, *args):
        if next(count) >= 12:
            raise KeyboardInterrupt
        return request(self, *args)

    monkeypatch.setattr(openai.OpenAI, "request", dies)
    with pytest.raises(KeyboardInterrupt):
        make(cache=tmp_path).answers([asked])
    done = len(server.requests)
    assert 0 < done < 20
    monkeypatch.setattr(openai.OpenAI, "request", request)
    (answers,) = make(cache=tmp_path).answers([asked])
    assert len(server.requests) == 20 and [answer.depth for answer in answers] == [2.5] * 20


def test_after_an_error_nothing_more_is_asked(server):
    server.replies = [(401, "wrong key"), said("2.5 m")]
    with pytest.raises(NotRunnable, match="401"):  # before the second one's turn
        make(requests_per_minute=6).answers([query(points=[(40, 30), (41, 30), (42, 30)])])
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [200, 503])
def test_a_reply_that_breaks_off_is_asked_for_again(server, status):
    server.replies = [(status, "half", ("Content-Length", "1000")), said("2.5 m")]
    assert only(make()).depth == 2.5 and len(server.requests) == 2
    server.replies = [(status, "half", ("Content-Length", "1000"))]
    assert only(make()).status == "failed"


def test_retry_after_is_kept_to_and_retries_take_their_turn(server, monkeypatch):
    backoff, turns = [], []
    monkeypatch.setattr("openai._base_client.time.sleep", backoff.append)
    contestant = make(requests_per_minute=30)
    monkeypatch.setattr(contestant, "sleep", turns.append)
    server.replies = [(429, "{}", ("Retry-After", "7")), (503, "{}"), said("2.5 m")]
    assert only(contestant).depth == 2.5
    assert backoff[0] == 7 and backoff[1] < 1
    assert turns == pytest.approx([0, 2, 4], abs=0.5)


def test_without_the_client_it_says_how_to_install_it(monkeypatch, server):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(NotRunnable, match="pip install openai"):
        make()


def test_evaluate_shows_why_requests_failed(server, tmp_path, capsys):
    bench = write_bench(tmp_path / "bench", alpha=[make_row("alpha", 0, 3)])
    server.replies = [(500, '{"detail": "CUDA out of memory"}')]
    command = ["evaluate", "--model", "openai:gpt-toy", "--data", str(bench), "--out", str(tmp_path / "out"), "--yes"]
    assert main([*command, "--requests-per-minute", "1000000"]) == 0
    shown = capsys.readouterr().out
    assert 'requests failed, and the same command makes them again; the first: HTTP 500: {"detail": "CUDA out' in shown
    server.replies = [said("2.5 m")]
    assert main([*command, "--requests-per-minute", "1000000"]) == 0
    assert "failed" not in capsys.readouterr().out


def test_requests_keep_to_the_rate(monkeypatch, server):
    now, slept = [100.0], []
    contestant = make(requests_per_minute=30)
    monkeypatch.setattr(openai.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(contestant, "sleep", slept.append)
    for _ in range(3):
        contestant.wait_turn()
    now[0] = 200.0
    contestant.wait_turn()
    assert slept == [0, 2, 4, 0]


def test_the_estimate_says_requests_and_cost(server):
    assert "10000 requests to gpt-toy about 1000 images" in make().estimate(1000, 10000)
    assert "cost" not in make().estimate(1, 10) and "currency" not in make().estimate(1, 10)
    priced = make(requests_per_minute=60, price_per_million=(2.0, 10.0)).estimate(1000, 10000)
    assert "167 min" in priced and "12.00 M tokens read and 0.50 M written" in priced and "about 29.00" in priced


def test_what_is_missing_is_said_at_once(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(NotRunnable, match="OPENAI_API_KEY is not set"):
        make()
    monkeypatch.setenv("OPENAI_BASE_URL", "ftp://127.0.0.1/v1")
    with pytest.raises(NotRunnable, match="OPENAI_BASE_URL"):
        make()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    make()  # a local server needs no key
    monkeypatch.setenv("OPENAI_API_KEY", "sk-two\nlines")
    with pytest.raises(NotRunnable) as caught:
        make()
    assert "two" not in str(caught.value)
