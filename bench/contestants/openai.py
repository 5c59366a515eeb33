"""Any OpenAI-compatible endpoint (OpenAI, vLLM and others), asked in words (_prompt.py): `openai:MODEL`.

`OPENAI_API_KEY` holds the key, `OPENAI_BASE_URL` an endpoint other than OpenAI's, as in http://127.0.0.1:8000/v1.
Neither temperature nor a token limit is sent: reasoning models refuse the one and count their thoughts in the other.
Retries, backoff, Retry-After (up to two minutes) and time limits are those of the client, the package `openai`.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from ..arguments import positive
from ..files import write_text
from . import _prompt
from ._base import Answer, Contestant, NotRunnable, Query, package

PARALLEL = 8  # requests under way
TOKENS = (1200, 50)  # read and written per request, assumed for an estimate of the cost
HOPELESS = (301, 302, 303, 307, 308, 401, 402, 403, 404)  # statuses that every further request would meet


class Refused(Exception):
    """A request without a usable reply, though others may have one."""


class OpenAI(Contestant[list[Query]]):
    """
    A model behind Chat Completions. Each point is a request with the marked image as PNG.

    cache: folder of replies; a question whose reply it holds is not asked again, so that a stopped run goes on.
    requests_per_minute: of this process, retries included. timeout: seconds without a byte from the server.
    retries: of a request that failed (408, 409, 429, 5xx, a lost or silent connection) or whose reply is no chat
    completion; after them its answer is "failed". price_per_million: of tokens read and written, for `estimate`.

    Raises NotRunnable, also while it runs, for what each further request would meet: no key, a wrong one, no credit,
    no such model, a redirect. Other refusals (400) make a "failed" answer.
    """

    title = "OpenAI-compatible endpoint"
    group = "General-Purpose VLMs"
    dense = False
    paid = True

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
        with package("openai", "The client of OpenAI-compatible endpoints", "pip install openai"):
            from openai import DefaultHttpxClient
            from openai import OpenAI as Client
        self.title = self.model = checkpoint
        self.cache = cache and Path(cache)
        self.requests_per_minute, self.retries = requests_per_minute, retries
        self.price_per_million = price_per_million
        base_url = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
        self.served_at = base_url + "/chat/completions"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", base_url):
            raise NotRunnable("OPENAI_BASE_URL is no plain http(s) address; write it as in http://127.0.0.1:8000/v1")
        if not self.key and "OPENAI_BASE_URL" not in os.environ:
            raise NotRunnable("OPENAI_API_KEY is not set; set it, or OPENAI_BASE_URL to a server that needs no key")
        if not re.fullmatch(r"[!-~]*", self.key):
            raise NotRunnable("OPENAI_API_KEY has spaces or other characters that no key has; copy it again")
        self.lock, self.next_start, self.stopped = threading.Lock(), 0.0, threading.Event()
        transport = DefaultHttpxClient(
            follow_redirects=False,  # a redirect would take the key to another host
            trust_env=base_url.startswith("https:"),  # a proxy would read the key of a plain http request
            event_hooks={"request": [self.wait_turn], "response": [self.stop_if_hopeless]},
        )
        self.client = Client(
            api_key=self.key or "EMPTY",  # the client wants one even for a server that needs none
            base_url=base_url,
            timeout=timeout,
            max_retries=retries,
            http_client=transport,
        )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("openai:MODEL, any compatible endpoint (key: OPENAI_API_KEY)")
        group.add_argument(
            "--requests-per-minute", type=positive, default=60, metavar="N", help="per process; default: 60"
        )
        group.add_argument("--price", type=float, nargs=2, metavar=("READ", "WRITTEN"), help="per million tokens")

    @classmethod
    def from_arguments(cls, checkpoint: str, args: argparse.Namespace, out: Path, device: str) -> "OpenAI":
        return cls(
            checkpoint,
            cache=out / "replies",
            requests_per_minute=args.requests_per_minute,
            price_per_million=args.price,
        )

    def estimate(self, images: int, points: int) -> str:
        minutes = points / self.requests_per_minute
        read, written = (points * tokens / 1e6 for tokens in TOKENS)
        text = (
            f"{points} requests to {self.model} about {images} images, less those answered before; at "
            f"least {minutes:.0f} min at {self.requests_per_minute:g} per minute; about {read:.2f} M tokens read and "
            f"{written:.2f} M written, at {TOKENS[0]} and {TOKENS[1]} per request; a reasoning model writes many more"
        )
        if self.price_per_million:
            cost = sum(tokens * price for tokens, price in zip((read, written), self.price_per_million, strict=True))
            text += f"; about {cost:.2f} in the prices' currency"
        return text

    def answers(self, prepared: list[Query]) -> list[list[Answer]]:
        self.stopped.clear()
        with ThreadPoolExecutor(PARALLEL) as pool:
            try:
                return _prompt.answers(prepared, lambda questions: list(pool.map(self.ask, questions)), 4 * PARALLEL)
            except BaseException:
                self.stopped.set()  # the pool waits for its threads; they ask nothing more
                raise

    def ask(self, question: _prompt.Question) -> Answer:
        """The answer to one question, from the cache if it has one."""
        image, prompt = question
        facts = [self.served_at, self.model, prompt, list(image.size)]
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
                path.parent.mkdir(parents=True, exist_ok=True)
                record = {"model": self.model, "prompt": prompt, "choice": choice, "usage": reply.get("usage")}
                write_text(path, json.dumps(record, indent=1))
        message = choice["message"]
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            return Answer(math.nan, "refused", message.get("refusal") or message.get("content") or "")
        return _prompt.read(message.get("content") or "", choice.get("finish_reason") != "length")

    def request(self, image: Image.Image, prompt: str) -> dict:
        """A chat completion. Raises Refused, or NotRunnable."""
        from openai import APIConnectionError, APIStatusError

        png = io.BytesIO()
        image.save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
            {"type": "text", "text": prompt},
        ]
        messages = [{"role": "user", "content": content}]
        for _ in range(self.retries + 1):
            try:
                reply = self.client.chat.completions.with_raw_response.create(model=self.model, messages=messages)
            except APIStatusError as error:
                raise Refused(f"HTTP {error.status_code}: {self.shown(error.response.text)}") from None
            except APIConnectionError as error:  # time limits, too
                raise Refused(self.shown(f"{error} {error.__cause__}")) from None
            if completion := read_completion(self.without_key(reply.text)):
                return completion
        raise Refused(f"{self.retries + 1} replies were no chat completion, the last: {self.shown(reply.text)!r}")

    def wait_turn(self, request: Any = None) -> None:
        """Called before each request, retries included: sleep until the rate limit allows one more."""
        with self.lock:
            now = time.monotonic()
            start = max(self.next_start, now)
            self.next_start = start + 60 / self.requests_per_minute
        self.sleep(start - now)

    def sleep(self, seconds: float) -> None:
        """Raises Refused when `answers` has ended meanwhile, by an error or by Ctrl-C."""
        if self.stopped.wait(seconds):
            raise Refused("stopped before it was asked")

    def stop_if_hopeless(self, response: Any) -> None:
        """Called with each reply, before the client retries. Raises NotRunnable for what every request would meet."""
        if response.status_code not in (*HOPELESS, 429):
            return
        response.read()
        if response.status_code in HOPELESS or "insufficient_quota" in response.text:
            self.stopped.set()  # here: `answers` hears of it only when the questions before have their answers
            raise NotRunnable(
                f"{self.served_at} answers HTTP {response.status_code}: {self.shown(response.text)}; see to key, model "
                "and credit"
            )

    def without_key(self, text: str) -> str:
        """A server may repeat the key; one below 16 characters is a local server's dummy."""
        return text.replace(self.key, "***") if len(self.key) >= 16 else text

    def shown(self, text: str) -> str:
        """As much of a server's text as an error message holds."""
        return self.without_key(text)[:2000].strip()


def read_completion(body: str) -> dict | None:
    """A chat completion whose first choice has a message; None for any other body."""
    try:
        completion = json.loads(body)
        message = completion["choices"][0]["message"]
        texts = [message.get("content"), message.get("refusal")]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return completion if all(text is None or isinstance(text, str) for text in texts) else None


CONTESTANT = OpenAI
