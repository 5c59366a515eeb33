"""The service on Ray Serve: `python -m cluster serve --model .`, or `serve run cluster.serve:application model=.`"""

import asyncio
import json
import logging
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import TypeVar

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.exceptions import HTTPException

from depthvlm.predict import load

from . import api, waves
from .api import ApiError
from .settings import Settings

APPLICATION = "depthvlm"
PARTS = 1 << 16  # bytes that are read of a body together
HEALTH_SECONDS = 10.0
logger = logging.getLogger("ray.serve")
Parsed = TypeVar("Parsed", bound=BaseModel)


app = FastAPI(title="DepthVLM", openapi_url=None)


@app.exception_handler(ApiError)
async def refuse(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


@app.exception_handler(HTTPException)
async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
    return await refuse(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


@serve.deployment
@serve.ingress(app)
class DepthService:
    """One replica: a model, its waves, and the routes."""

    def __init__(self, settings: dict):
        self.settings = Settings(**settings)
        torch.set_num_threads(self.settings.threads)
        model, self.processor = load(self.settings.model, self.settings.device, self.settings.dtype)
        max_batch_size, max_wait = self.settings.max_batch_size, self.settings.max_wait_ms / 1000
        self.waves = Counter("depthvlm_waves", "batches that were run")
        self.requests = Counter("depthvlm_wave_requests", "requests of all waves")
        seconds = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]
        self.wave_seconds = Histogram("depthvlm_wave_seconds", "from prefill to the last token", boundaries=seconds)
        self.wave_waited = Histogram("depthvlm_wave_waited_seconds", "of its oldest request", boundaries=seconds)
        self.answer_tokens = Counter("depthvlm_answer_tokens", "of all answers")
        self.load = Gauge("depthvlm_load", "requests that run or wait, after a wave")
        self.engine = waves.WaveEngine(model, self.processor, max_batch_size, max_wait, self.observe)
        self.entering = 0  # requests that are read and preprocessed
        self.is_draining = False

    @app.get("/health")
    async def health(self) -> dict:
        if self.is_draining:
            raise ApiError(503, "the service is stopping")
        self.check_health()
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(self) -> dict:
        model = {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "depthvlm"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/depth")
    async def depth(self, request: Request) -> dict:
        with self.admitted():
            body = await self.read(request, api.DepthRequest)
            row = await asyncio.to_thread(api.encode_depth_request, self.processor, body, self.settings)
            events = self.submit(row)
        async with aclosing(events):
            depth = await anext(events)
        return (await asyncio.to_thread(api.depth_reply, depth, body.depth))[0]

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request):
        with self.admitted():
            body = await self.read(request, api.ChatRequest)
            self.check(body)
            row = await asyncio.to_thread(api.encode_chat, self.processor, body, self.settings)
            if body.depth and "image_grid_thw" not in row:
                raise ApiError(400, "depth was asked for, but the messages hold no image")
            limit = body.max_completion_tokens or body.max_tokens or self.settings.max_answer_tokens
            events = self.submit(row, sampling=body.sampling, max_tokens=limit, wants_depth=body.depth is not None)
        request_id, prompt_tokens = request.headers["x-request-id"], row["input_ids"].shape[1]
        if body.stream:
            chunks = self.chunks(request_id, body, events, prompt_tokens)
            first = await anext(chunks)  # what fails before it has a status of its own
            return StreamingResponse(self.stream(first, chunks), media_type="text/event-stream")
        text, depth = "", None
        async with aclosing(events):
            async for event in events:
                if isinstance(event, waves.Depth):
                    depth = await asyncio.to_thread(api.depth_reply, event, body.depth)
                elif isinstance(event, str):
                    text += event
        used = api.usage(prompt_tokens, event.tokens)
        return api.completion(request_id, self.settings.name, text, event.reason, used, depth)

    async def chunks(
        self, request_id: str, body: api.ChatRequest, events: AsyncGenerator, prompt_tokens: int
    ) -> AsyncGenerator[dict]:
        """The objects of a streamed answer; depth is in the first, before any text."""
        role = {"role": "assistant"}
        async with aclosing(events):
            async for event in events:
                if isinstance(event, waves.Depth):
                    depth = await asyncio.to_thread(api.depth_reply, event, body.depth)
                    yield api.chunk(request_id, self.settings.name, role | {"content": ""}, depth=depth)
                elif isinstance(event, str):
                    yield api.chunk(request_id, self.settings.name, role | {"content": event})
                else:
                    yield api.chunk(request_id, self.settings.name, role, event.reason)
                role = {}
        if body.stream_options and body.stream_options.include_usage:
            yield api.chunk(request_id, self.settings.name, None, usage=api.usage(prompt_tokens, event.tokens))

    async def stream(self, first: dict, chunks: AsyncGenerator[dict]) -> AsyncIterator[str]:
        """Server-sent events. A failure is the last of them: the status has long been sent."""
        async with aclosing(chunks):
            yield f"data: {json.dumps(first)}\n\n"
            try:
                async for chunk in chunks:
                    yield f"data: {json.dumps(chunk)}\n\n"
            except ApiError as error:
                yield f"data: {json.dumps(error.body)}\n\n"
            else:
                yield "data: [DONE]\n\n"

    def check(self, body: api.ChatRequest) -> None:
        if body.model != self.settings.name:
            raise ApiError(404, f"the model is called {self.settings.name!r}, not {body.model!r}", "model_not_found")
        asked, most = body.max_completion_tokens or body.max_tokens or 0, self.settings.max_answer_tokens
        if asked > most:
            raise ApiError(400, f"max_tokens is {asked}; ask for at most {most}")

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Refuse a request beyond what the replica takes, or count it until it is submitted."""
        if self.is_draining:
            raise ApiError(503, "the service is stopping; send the request again", retry_after=1)
        if self.entering + self.engine.load >= self.settings.max_requests:
            raise ApiError(
                429, f"{self.settings.max_requests} requests are running or waiting; try again later", retry_after=1
            )
        self.entering += 1
        try:
            yield
        finally:
            self.entering -= 1

    async def read(self, request: Request, schema: type[Parsed]) -> Parsed:
        """A request's body, refused as soon as it is too long."""
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self.settings.max_body_bytes:
                raise ApiError(413, f"the request is longer than {self.settings.max_body_bytes} bytes")
        try:
            return schema.model_validate_json(bytes(content))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            reason = "is not supported here; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
            raise ApiError(400, f"{where or 'the body'}: {reason}") from error

    def submit(self, row, **options) -> AsyncGenerator:
        """The request's events as they come; raises its failure. It is cancelled if nobody waits to the end."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def emit(event) -> None:
            with suppress(RuntimeError):  # the loop has ended, with the replica
                loop.call_soon_threadsafe(queue.put_nowait, event)

        job = waves.Request(row, emit, **options)
        self.engine.submit(job)

        async def events():
            try:
                while True:
                    event = await queue.get()
                    if isinstance(event, torch.OutOfMemoryError):
                        raise ApiError(503, "not enough memory; send a smaller max_pixels") from event
                    if isinstance(event, Exception):
                        logger.error("a wave failed", exc_info=event)
                        raise ApiError(500, f"the model failed: {type(event).__name__}") from event
                    yield event
                    if isinstance(event, waves.End) or job.sampling is None:
                        return
            finally:
                job.cancel()

        return events()

    def observe(self, wave: waves.Wave) -> None:
        self.waves.inc()
        self.requests.inc(wave.requests)
        self.wave_seconds.observe(wave.seconds)
        self.wave_waited.observe(wave.waited)
        if wave.tokens:
            self.answer_tokens.inc(wave.tokens)
        self.load.set(self.engine.load)
        fields = {"requests": wave.requests, "tokens": wave.tokens}
        fields |= {"seconds": round(wave.seconds, 4), "waited_seconds": round(wave.waited, 4)}
        logger.info("wave", extra=fields)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that fails."""
        if not self.engine.thread.is_alive():
            raise RuntimeError("the waves have ended")

    def drain(self) -> int:
        """Refuse new requests from now on; returns how many are left."""
        self.is_draining = True
        return self.entering + self.engine.load


def application(settings: Settings) -> serve.Application:
    """For `serve run cluster.serve:application model=... max_batch_size=...`, and `run`."""
    scaling = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        bounds = {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
        scaling = {"autoscaling_config": bounds | {"target_ongoing_requests": settings.max_batch_size}}
    deployment = DepthService.options(
        **scaling,
        # the replica refuses first, with a sentence in JSON; these bound what a burst may pile up before it
        max_ongoing_requests=2 * settings.max_requests,
        max_queued_requests=settings.max_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": int(settings.device == "cuda")},
        logging_config={"encoding": "JSON"},
    )
    return deployment.bind(settings.model_dump())


def run(settings: Settings, host: str, port: int, ends_serve: bool) -> None:
    """
    Serve until SIGTERM or Ctrl-C; then requests in flight end, and new ones are answered 503. Ray is connected.

    ends_serve: whether Serve ends too, with whatever other applications it has.
    """
    stopped = threading.Event()
    serve.start(http_options={"host": host, "port": port})
    handle = serve.run(application(settings), name=APPLICATION)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray's own handlers
        signal.signal(number, lambda *_: stopped.set())
    print(f"{settings.model} is served as {settings.name} at http://{host}:{port}/v1", flush=True)
    stopped.wait()
    print("stopping: requests in flight end, new ones are refused", flush=True)
    deadline = time.monotonic() + settings.drain_seconds
    while sum(handle.broadcast("drain").results()) and time.monotonic() < deadline:
        time.sleep(0.1)
    serve.delete(APPLICATION)  # waits for what is still being sent
    if ends_serve:
        serve.shutdown()
