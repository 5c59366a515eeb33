"""Answers and depth for many requests at once: one batch after another, each from one `generate`, in one thread.

A wave is what waits with equal sampling settings, up to `max_batch_size` requests. Its prefill makes depth of all its
photos; then tokens go to each request as they come, and a row ends for itself: by its end token, its number of tokens,
or because nobody waits for it any more. The next wave starts when the last row has ended.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import BatchFeature, StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

from .photos import collate, to_device


@dataclass(frozen=True)
class Sampling:
    """What rows of one `generate` have in common. temperature: 0 takes the likeliest token."""

    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Depth:
    """Of a request's photos: z-depth in metres `(height, width)` and the processor's camera, one per photo."""

    maps: list[np.ndarray]
    cameras: list[dict]


@dataclass(frozen=True)
class End:
    """The last event of an answer. reason: "stop" or "length". tokens: of the answer."""

    reason: str
    tokens: int


@dataclass
class Request:
    """
    One row of a wave.

    row: of `photos.encode`. emit: called in the engine's thread with `Depth` (if `wants_depth`), the text in pieces
        (`str`), and at last with `End` or an exception; without `sampling` there is no text, and `Depth` comes last.
    """

    row: BatchFeature
    emit: Callable[[object], None]
    sampling: Sampling | None = None
    max_tokens: int = 0
    wants_depth: bool = True
    arrived: float = field(default_factory=time.monotonic)
    tokens: int = 0
    is_done: bool = False
    is_cancelled: bool = False

    @property
    def photos(self) -> int:
        return len(self.row.get("image_grid_thw", ()))

    def cancel(self) -> None:
        """Nobody waits for it any more; from any thread."""
        self.is_cancelled = True

    def end(self, event: object) -> None:
        self.is_done = True
        self.emit(event)


@dataclass(frozen=True)
class Wave:
    """What a wave was, for logs and metrics. waited: seconds of its oldest request."""

    requests: int
    tokens: int
    waited: float
    seconds: float


class WaveEngine:
    """
    Runs requests in a thread of its own.

    max_wait: seconds that a request waits for others to fill its wave. max_batch_size 1 runs requests one by one, with
    which every answer is independent of what else is asked. observe: called after each wave, in the engine's thread.
    """

    def __init__(self, model, processor, max_batch_size: int, max_wait: float, observe: Callable[[Wave], None]):
        self.model, self.processor = model, processor
        self.max_batch_size, self.max_wait, self.observe = max_batch_size, max_wait, observe
        ends = model.generation_config.eos_token_id
        self.end_tokens = set(ends if isinstance(ends, list) else [ends])
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.changed = threading.Condition()
        self.is_closed = False
        self.thread = threading.Thread(target=self._run, name="waves", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        with self.changed:
            self.waiting.append(request)
            self.changed.notify()

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        with self.changed:
            alive = [request for request in (*self.waiting, *self.running) if not request.is_cancelled]
            return sum(not request.is_done for request in alive)

    def close(self) -> None:
        """End the thread after the wave that runs."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        while wave := self._next_wave():
            start = time.monotonic()
            try:
                self._run_wave(wave)
            except Exception as error:  # of this wave; the next one may be well
                for request in wave:
                    if not request.is_done:
                        request.end(error)
            with self.changed:
                self.running = []
            waited = start - min(request.arrived for request in wave)
            tokens = sum(request.tokens for request in wave)
            self.observe(Wave(len(wave), tokens, waited, time.monotonic() - start))

    def _next_wave(self) -> list[Request]:
        """The oldest request and those that fit it, as soon as they are enough or it has waited; none once closed."""
        with self.changed:
            while not self.is_closed:
                self.waiting = deque(request for request in self.waiting if not request.is_cancelled)
                like = [request for request in self.waiting if request.sampling == self.waiting[0].sampling]
                left = self.waiting[0].arrived + self.max_wait - time.monotonic() if like else None
                if like and (len(like) >= self.max_batch_size or left <= 0):
                    self.running = like[: self.max_batch_size]
                    taken = set(map(id, self.running))
                    self.waiting = deque(request for request in self.waiting if id(request) not in taken)
                    return self.running
                self.changed.wait(left)
        return []

    @torch.inference_mode()
    def _run_wave(self, wave: list[Request]) -> None:
        batch = collate(self.processor, [request.row for request in wave])
        inputs = to_device(self.processor, batch, self.model.device)
        wants_depth = any(request.wants_depth and request.photos for request in wave)
        sampling = wave[0].sampling
        if sampling is None:
            self._hand_out_depth(wave, self.model(**inputs, logits_to_keep=1))
            return
        options = {"do_sample": False}
        if sampling.temperature:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        self.model.generate(
            **inputs,
            **options,
            max_new_tokens=max(request.max_tokens for request in wave),
            streamer=WaveStreamer(wave, self.processor.tokenizer, self.end_tokens),
            stopping_criteria=[WaveStop(wave)],
            depth_callback=(lambda outputs: self._hand_out_depth(wave, outputs)) if wants_depth else None,
        )

    def _hand_out_depth(self, wave: list[Request], outputs) -> None:
        depths = self.processor.post_process_depth_estimation(outputs)
        maps, cameras = iter(depths), iter(outputs.cameras or ())
        for request in wave:
            depth = Depth(
                [next(maps)["predicted_depth"].cpu().numpy() for _ in range(request.photos)],
                [next(cameras) for _ in range(request.photos)],
            )
            if request.sampling is None:
                request.end(depth)
            elif request.wants_depth:
                request.emit(depth)


class WaveStreamer(BaseStreamer):
    """Hands each row's tokens to its request as text, and ends it."""

    def __init__(self, wave: list[Request], tokenizer, end_tokens: set[int]):
        self.wave, self.end_tokens, self.is_prompt = wave, end_tokens, True
        self.texts = [RowStreamer(tokenizer, request.emit) for request in wave]

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        for request, text, token in zip(self.wave, self.texts, value.tolist(), strict=True):
            if request.is_done or request.is_cancelled:
                continue
            request.tokens += 1
            text.put(torch.tensor([token]))
            at_end = token in self.end_tokens
            if at_end or request.tokens == request.max_tokens:
                text.end()
                request.end(End("stop" if at_end else "length", request.tokens))

    def end(self) -> None:
        pass


class RowStreamer(TextStreamer):
    """transformers' streamer of one row's text, into a function."""

    def __init__(self, tokenizer, emit: Callable[[str], None]):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.emit(text)


class WaveStop(StoppingCriteria):
    """Per row: whether its request has ended or was cancelled."""

    def __init__(self, wave: list[Request]):
        self.wave = wave

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.tensor([request.is_done or request.is_cancelled for request in self.wave], device=input_ids.device)
