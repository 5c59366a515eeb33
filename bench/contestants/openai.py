"""Any OpenAI-compatible endpoint (OpenAI, vLLM and others), asked in words (_prompt.py): `openai:MODEL`.

`OPENAI_API_KEY` holds the key, `OPENAI_BASE_URL` an endpoint other than OpenAI's, as in http://127.0.0.1:8000/v1.
Neither temperature nor a token limit is sent: reasoning models refuse the one, and hide their thoughts in the other.
"""

import base64
import hashlib
import http.client
import io
import json
import math
import os
import re
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from . import _prompt
from ._base import Answer, Contestant, NotRunnable

PARALLEL = 8  # requests under way
MAX_REPLY = 1 << 22  # bytes; a longer reply is none
BACKOFF = 1.0  # seconds before the first retry, doubled each time
LONGEST_WAIT = 300.0  # seconds, whatever Retry-After says
RETRIED = (408, 429, 500, 502, 503, 504)
TOKENS = (1200, 50)  # read and written per request, assumed for an estimate of the cost


class Refused(Exception):
    """A request that no retry can save, though others may succeed."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None  # a redirect would take the key to another host


class OpenAI(Contestant):
    """
    A model behind Chat Completions. Each point is a request with the marked image as PNG.

    cache: folder of replies; a question found there is not asked again, so that a run that was stopped goes on.
    requests_per_minute: of this process, retries included. timeout: seconds a request may take.
    retries: on 408, 429, 500, 502, 503, 504, a reply that is no completion, lost or slow connections; then "failed".
    price_per_million: of tokens read and written, for `estimate`.

    Raises NotRunnable, also while it runs, for what each further request would meet: no key, a wrong one, no credit,
    no such model, a redirect. Other refusals (400) make a "failed" answer.
    """

    title = "OpenAI-compatible endpoint"
    group = "General-Purpose VLMs"
    dense = False
    deterministic = False

    def __init__(
        self,
        checkpoint: str,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        cache: str | Path | None = None,
        requests_per_minute: float = 60,
        timeout: float = 60,
        retries: int = 5,
        price_per_million: tuple[float, float] | None = None,
    ):
        self.title = self.model = checkpoint
        self.cache = cache and Path(cache)
        self.requests_per_minute, self.timeout, self.retries = requests_per_minute, timeout, retries
        self.price_per_million = price_per_million
        self.url = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/") + "/chat/completions"
        self.served_at = self.url
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname or address.username is not None:
            raise NotRunnable("OPENAI_BASE_URL is no plain http(s) address; write it as in http://127.0.0.1:8000/v1")
        if not self.key and "OPENAI_BASE_URL" not in os.environ:
            raise NotRunnable("OPENAI_API_KEY is not set; set it, or OPENAI_BASE_URL to a server that needs no key")
        if not re.fullmatch(r"[!-~]*", self.key):
            raise NotRunnable("OPENAI_API_KEY has spaces or other characters that no key has; copy it again")
        # plain http goes straight to its host: a proxy would read the key
        proxies = {name: proxy for name, proxy in urllib.request.getproxies().items() if name == "https"}
        self.opener = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler(proxies))
        self.lock, self.next_start, self.stopped = threading.Lock(), 0.0, threading.Event()

    def estimate(self, queries_count: int, points_count: int) -> str:
        """What asking about `points_count` points of `queries_count` images takes, in words."""
        minutes = points_count / self.requests_per_minute
        read, written = (points_count * tokens / 1e6 for tokens in TOKENS)
        text = (
            f"{points_count} requests to {self.model} about {queries_count} images, less those answered before; "
            f"at least {minutes:.0f} min at {self.requests_per_minute:g} a minute; about {read:.2f} M tokens read and "
            f"{written:.2f} M written, at {TOKENS[0]} and {TOKENS[1]} a request; a reasoning model writes many more"
        )
        if self.price_per_million:
            cost = sum(tokens * price for tokens, price in zip((read, written), self.price_per_million, strict=True))
            text += f"; about {cost:.2f} in the prices' currency"
        return text

    def answers(self, queries):
        self.stopped.clear()
        with ThreadPoolExecutor(PARALLEL) as pool:
            try:
                return _prompt.answers(queries, lambda questions: list(pool.map(self.ask, questions)), 4 * PARALLEL)
            except BaseException:
                self.stopped.set()  # the pool waits for its threads; they ask nothing more
                raise

    def ask(self, question) -> Answer:
        image, prompt = question
        facts = [self.url, self.model, prompt, list(image.size)]
        digest = hashlib.sha256(json.dumps(facts).encode() + image.tobytes()).hexdigest()
        path = self.cache and self.cache / digest[:2] / f"{digest}.json"
        if path and path.exists():
            choice = json.loads(path.read_bytes())["choice"]
        else:
            try:
                reply = self.request(image, prompt)
            except Refused as error:
                return Answer(math.nan, "failed", str(error))
            choice = reply["choices"][0]
            if path:
                record = {"model": self.model, "prompt": prompt, "choice": choice, "usage": reply.get("usage")}
                write(path, json.dumps(record, indent=1).encode())
        message = choice["message"]
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            return Answer(math.nan, "refused", message.get("refusal") or message.get("content") or "")
        return _prompt.read(message.get("content") or "", choice.get("finish_reason") != "length")

    def request(self, image, prompt: str) -> dict:
        """The server's reply, with text in its first choice. Raises Refused, or NotRunnable."""
        png = io.BytesIO()
        image.save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
            {"type": "text", "text": prompt},
        ]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        for attempt in range(self.retries + 1):
            self.wait_turn()
            wait = BACKOFF * 2**attempt
            try:
                reply = json.loads(self.send(request))
                check(reply)
                return reply
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {self.clean(read_error(error))}"
                if error.code in (301, 302, 303, 307, 308, 401, 402, 403, 404) or "insufficient_quota" in reason:
                    self.stopped.set()  # here: `answers` hears of it only when the questions before have their answers
                    raise NotRunnable(f"{self.url} answers {reason}; see to key, model and credit") from None
                if error.code not in RETRIED:
                    raise Refused(reason) from None
                wait = retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = self.clean(f"{type(error).__name__}: {error}".encode())
            if attempt < self.retries:
                self.sleep(min(wait, LONGEST_WAIT))
        raise Refused(f"{self.retries + 1} requests failed, the last with {reason}")

    def send(self, request) -> str:
        """One request -> the body of its reply. The socket's own time limit is for a single read; this is for all."""
        end, body = time.monotonic() + self.timeout, b""
        with self.opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(1 << 16):
                body += part
                if time.monotonic() > end:
                    raise TimeoutError(f"no complete reply in {self.timeout:g} s")
                if len(body) > MAX_REPLY:
                    raise ValueError(f"a reply of more than {MAX_REPLY} bytes")
        return self.clean(body)

    def clean(self, body: bytes) -> str:
        """As text, without the key, should a server repeat it; one below 16 characters is a local server's dummy."""
        text = body.decode("utf-8", "replace")
        return text.replace(self.key, "***") if len(self.key) >= 16 else text

    def wait_turn(self) -> None:
        """Sleep until the rate limit allows one more request."""
        with self.lock:
            start = max(self.next_start, time.monotonic())
            self.next_start = start + 60 / self.requests_per_minute
        self.sleep(max(0, start - time.monotonic()))

    def sleep(self, seconds: float) -> None:
        """Raises Refused when `answers` has ended meanwhile, by an error or by Ctrl-C."""
        if self.stopped.wait(seconds):
            raise Refused("stopped before it was asked")


def read_error(error: urllib.error.HTTPError) -> bytes:
    """The beginning of what came with an error; nothing, if the connection broke meanwhile."""
    try:
        with error:
            return error.read(2000)
    except (OSError, http.client.HTTPException):
        return b""


def check(reply) -> None:
    """Raises ValueError unless the reply is a chat completion."""
    try:
        message = reply["choices"][0]["message"]
        texts = [message.get("content"), message.get("refusal")]
    except (TypeError, KeyError, IndexError, AttributeError):
        texts = [0]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError("the reply is no chat completion")


def retry_after(header: str | None, otherwise: float) -> float:
    """Seconds that a Retry-After header asks for; `otherwise` where it has none, or a date."""
    return float(header) if header and re.fullmatch(r"\d+(\.\d+)?", header) else otherwise


def write(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


CONTESTANT = OpenAI
