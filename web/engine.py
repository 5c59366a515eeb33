"""One model for many visitors: depth as soon as the prefill has it, then the answer word by word, then follow-ups."""

import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList, TextStreamer

from depthvlm.handler import MAX_NEW_TOKENS, describe_camera, encode_inputs
from depthvlm.predictions import outputs

VIEW_PIXELS = 1_000_000  # of the map that a browser is sent
POINTS = 100_000  # of a cloud
KEPT_CONVERSATIONS = 8  # whose caches stay on the device; of the 4B model about 0.2 GB each


@dataclass
class Conversation:
    """
    What lies in a cache.

    outputs: `generate`'s last, with the cache of everything but its last token. start: how many tokens of them end with
    the photo: a first question goes on from there. asked: whether there was a question yet.
    """

    outputs: object
    start: int
    asked: bool


@dataclass(eq=False)
class Result:
    """
    A visitor's photo and its depth.

    inputs: `handler.encode_inputs`'s, to run it again. prediction: `predicted_depth` and `cameras` as the model gives
    them, on the CPU. view: the photo at no more than `VIEW_PIXELS`. colors, texture: see `outputs.Prediction`.
    seconds: of the prefill. tokens: of the image. key: tells it from others.
    """

    name: str
    inputs: object
    view: Image.Image
    colors: np.ndarray
    texture: bytes
    tokens: int
    prediction: SimpleNamespace | None = None
    seconds: float = 0.0
    settings: dict = field(default_factory=dict)
    answer: str | None = None
    key: str = field(default_factory=partial(secrets.token_hex, 8))

    @property
    def camera(self) -> dict:
        """The processor's."""
        return self.prediction.cameras[0]

    def rescale(self, focal_length: float) -> None:
        """
        Another focal length without another pass: metres grow with it, and nothing else changes.

        A new pass would see the photo at another size and answer a little differently.
        """
        camera = self.camera
        factor = focal_length / float(np.sqrt(np.prod(np.broadcast_to(camera["focal_length"], 2))))
        new = {"focal_length": focal_length, "focal_length_source": "given, rescaled"}
        self.prediction.cameras = [camera | new | {"metric_scale": camera["metric_scale"] * factor}]


class Engine:
    """model, processor: `predict.load`'s. estimate: `predict.load_estimator`'s, with its name, or `None`."""

    def __init__(self, model, processor, settings: dict, estimate=None, estimator: str | None = None):
        self.model, self.processor, self.settings = model, processor, settings
        self.estimate, self.estimator = estimate, estimator
        self.conversations: OrderedDict[Result, Conversation] = OrderedDict()  # the longest unused first

    def prepare(
        self,
        photo: Image.Image,
        name: str,
        focal_length: float | None,
        source: str,
        max_pixels: int | None,
        question: str | None,
    ) -> Result:
        """The photo as the model takes it. source: where `focal_length` is from."""
        if focal_length is None and self.estimate is not None:
            focal_length, source = self.estimate(photo), f"estimated by {self.estimator}"
        inputs = encode_inputs(self.processor, [photo], question, [focal_length], max_pixels)
        inputs["cameras"][0]["focal_length_source"] = "assumed" if focal_length is None else source
        view = photo.copy()
        if photo.width * photo.height > VIEW_PIXELS:
            shrink = (VIEW_PIXELS / (photo.width * photo.height)) ** 0.5
            view = photo.resize((max(1, int(photo.width * shrink)), max(1, int(photo.height * shrink))))
        step = outputs.cloud_step(photo.height, photo.width, POINTS)
        merged = self.processor.image_processor.merge_size**2
        return Result(
            name=name,
            inputs=inputs,
            view=view,
            colors=np.asarray(photo)[::step, ::step].copy(),
            texture=outputs.jpeg_texture(photo),
            tokens=int(inputs["image_grid_thw"].prod()) // merged,
            settings=self.settings | {"max_pixels": max_pixels, "question": question},
        )

    def see(self, result: Result, asks: bool) -> Iterator[str | None]:
        """
        The pass over a photo, and the answer to the question that `prepare` was given, if it `asks` one.

        Yields `None` once `result` has its depth, then the answer as far as it goes.
        """
        inputs = BatchFeature(dict(result.inputs)).to(self.model.device)
        inputs["pixel_values"] = self.processor.normalize_patches(inputs["pixel_values"])
        began = time.perf_counter()
        for kind, value in self._generate(dict(inputs), MAX_NEW_TOKENS if asks else 1):
            if kind == "depth":
                result.seconds = time.perf_counter() - began
                depths = tuple(depth.float().cpu() for depth in value.predicted_depth)
                result.prediction = SimpleNamespace(predicted_depth=depths, cameras=value.cameras)
                yield None
            elif kind == "end":
                self._keep(result, Conversation(value, self._end_of_photo(inputs["input_ids"]), asks))
            elif asks:
                result.answer = value
                yield value

    def ask(self, result: Result, question: str) -> Iterator[str]:
        """The answer to a question about a photo that was seen, as far as it goes; the photo is not encoded again."""
        conversation = self.conversations.pop(result, None)
        if conversation is None:  # others came since: begin anew
            result.inputs, seen = self._begin_anew(result.inputs, question), result.prediction
            for text in self.see(result, True):
                result.prediction = seen  # it may have been rescaled
                if text is not None:
                    yield text
            return
        inputs = self._follow_up(conversation, question)
        for kind, value in self._generate(dict(inputs), MAX_NEW_TOKENS):
            if kind == "end":
                self._keep(result, Conversation(value, conversation.start, True))
            elif kind == "text":
                result.answer = value
                yield value

    def forget(self, result: Result) -> None:
        self.conversations.pop(result, None)

    def depth(self, result: Result, size: tuple[int, int] | None = None) -> np.ndarray:
        """Metres at `(height, width)`; default: the photo's own size."""
        sizes = None if size is None else [size]
        maps = self.processor.post_process_depth_estimation(result.prediction, target_sizes=sizes)
        return maps[0]["predicted_depth"].numpy()

    def encode(self, result: Result, name: str) -> bytes:
        """A file of predict.py's: `name` is a key of `outputs.SUFFIXES`."""
        prediction = outputs.Prediction(
            photo=result.name,
            depth=self.depth(result),
            camera=describe_camera(result.camera),
            answer=result.answer,
            seconds=result.seconds,
            colors=result.colors,
            texture=result.texture,
            settings=result.settings,
        )
        return outputs.encode(prediction, name, POINTS, prediction.record() if name == "json" else {})

    def _end_of_photo(self, ids: torch.Tensor) -> int:
        """How many tokens of a prompt end with the photo."""
        return int((ids[0] == self.model.config.vision_end_token_id).nonzero()[-1]) + 1

    def _question_after_photo(self, ids: torch.Tensor, question: str) -> torch.Tensor:
        """The ids of a prompt up to its photo, then `question`."""
        end = self.processor.tokenizer.convert_ids_to_tokens(self.model.config.vision_end_token_id)
        text = self.processor.depth_text(question).rpartition(end)[2]
        rest = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([ids[:, : self._end_of_photo(ids)], rest.to(ids.device)], dim=1)

    def _begin_anew(self, inputs: BatchFeature, question: str) -> BatchFeature:
        """The inputs of a photo that was prepared, with another question."""
        ids = self._question_after_photo(inputs["input_ids"], question)
        start = self._end_of_photo(ids)
        types = torch.zeros_like(ids)
        types[:, :start] = inputs["mm_token_type_ids"][:, :start]
        new = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
        return BatchFeature({**inputs, **new})

    def _follow_up(self, conversation: Conversation, question: str) -> BatchFeature:
        """The inputs that go on from a conversation: after its last answer, or after the photo."""
        if conversation.asked:
            return self.processor.follow_up(conversation.outputs, question)
        name = "cache" if "cache" in conversation.outputs else "past_key_values"  # renamed by transformers 5.24
        cache = conversation.outputs[name]
        cache.crop(conversation.start - cache.get_seq_length())  # below 0: so many from the end
        ids = self._question_after_photo(conversation.outputs.sequences[:, : conversation.start], question)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), name: cache})

    def _keep(self, result: Result, conversation: Conversation) -> None:
        self.conversations[result] = conversation
        while len(self.conversations) > KEPT_CONVERSATIONS:
            self.conversations.popitem(last=False)

    def _generate(self, inputs: dict, max_new_tokens: int) -> Iterator[tuple[str, object]]:
        """
        ("depth", output) from the prefill of a photo, ("text", the answer so far), ("end", `generate`'s output).

        It runs in a thread of its own, which stops at the next token where this iterator is closed.
        """
        events, stop = queue.SimpleQueue(), threading.Event()
        callback = {"depth_callback": lambda output: events.put(("depth", output))} if "cameras" in inputs else {}

        def work():
            try:
                with torch.inference_mode():
                    events.put(("end", self.model.generate(
                        **inputs,
                        **callback,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        return_dict_in_generate=True,
                        streamer=Words(self.processor.tokenizer, events),
                        stopping_criteria=StoppingCriteriaList([Stopped(stop)]),
                    )))  # fmt: skip
            except Exception as error:  # for the thread that waits
                events.put(("error", error))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                kind, value = events.get()
                if kind == "error":
                    raise value
                yield kind, value
                if kind == "end":
                    return
        finally:
            stop.set()
            thread.join()


class Words(TextStreamer):
    """Puts ("text", the answer so far) into a queue."""

    def __init__(self, tokenizer, events: queue.SimpleQueue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.events, self.text = events, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.text += text
            self.events.put(("text", self.text.strip()))


class Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
