"""The service's engine, without Ray: what a wave gives each request, against `generate` and `forward` one at a time."""

import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.photos import collate, encode, to_device
from cluster.waves import Depth, End, Request, Sampling, WaveEngine
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor

ROOT = str(Path(__file__).resolve().parent.parent)
SIZES = [(96, 64), (64, 96), (128, 128), (160, 96)]
QUESTIONS = ["How many posts are there?", "How far is 3 6 from the camera, in meters?", "Which is nearer?", "Hello"]
GREEDY = Sampling()
ROUNDING = 0.02  # of bfloat16, in which a sum depends on the batch's shape; two photos' depth differs far more


@pytest.fixture(scope="module")
def processor():
    return DepthVLMProcessor.from_pretrained(ROOT, trust_remote_code=False)


@pytest.fixture(scope="module")
def model():
    return DepthVLMForConditionalGeneration.from_pretrained(ROOT).eval()


@pytest.fixture
def start_engine(model, processor):
    """A function that starts an engine, and the list of its waves."""
    engines, waves = [], []

    def start(max_batch_size=8, max_wait=0.2, model=model):
        engines.append(WaveEngine(model, processor, max_batch_size, max_wait, waves.append))
        return engines[-1], waves

    yield start
    for engine in engines:
        engine.close()


def photo(seed, size=(96, 64)):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def ask(processor, seed, **options):
    """A request with a photo and a question of its own, and the queue of its events."""
    text = processor.depth_text(f"{QUESTIONS[seed % 4]} {seed}")
    row = encode(processor, [photo(seed, SIZES[seed // 4 % 4])], text, 200.0)
    events = queue.Queue()
    return Request(row, events.put, **{"sampling": GREEDY, "max_tokens": 16} | options), events


def drain(events, last=End):
    """All events of a request, up to the last."""
    received = [events.get(timeout=120)]
    while not isinstance(received[-1], (last, Exception)):
        received.append(events.get(timeout=120))
    return received


def alone(model, processor, request):
    """(text, tokens, maps) of a request by `generate` on its own."""
    inputs = to_device(processor, collate(processor, [request.row]), model.device)
    with torch.inference_mode():
        outputs = model.generate(
            **inputs, do_sample=False, max_new_tokens=request.max_tokens, return_dict_in_generate=True
        )
    tokens = outputs.sequences[0, inputs["input_ids"].shape[1] :]
    maps = [depth["predicted_depth"].numpy() for depth in processor.post_process_depth_estimation(outputs)]
    return processor.decode(tokens, skip_special_tokens=True), len(tokens), maps


def test_forty_greedy_answers_in_waves_are_those_one_at_a_time(model, processor, start_engine):
    engine, waves = start_engine(max_batch_size=8)
    jobs = [ask(processor, seed) for seed in range(40)]
    for request, _ in jobs:
        engine.submit(request)
    for request, events in jobs:
        received = drain(events)
        text, tokens, maps = alone(model, processor, request)
        assert isinstance(received[0], Depth)  # before any text
        np.testing.assert_allclose(received[0].maps[0], maps[0], rtol=ROUNDING)
        assert "".join(event for event in received if isinstance(event, str)) == text
        assert received[-1].tokens == tokens
        assert received[-1].reason == ("length" if tokens == 16 else "stop")
    assert [wave.requests for wave in waves] == [8] * 5


def test_rows_end_for_themselves(model, processor, start_engine):
    engine, _ = start_engine()
    jobs = [ask(processor, seed, max_tokens=count) for seed, count in enumerate((1, 2, 3, 16))]
    for request, _ in jobs:
        engine.submit(request)
    for request, events in jobs:
        text, tokens, _ = alone(model, processor, request)
        received = drain(events)
        assert (received[-1].tokens, "".join(event for event in received[1:-1])) == (tokens, text)


def endless(model, monkeypatch):
    """No token ends an answer any more."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", 479)
    suppress = [479, model.config.image_token_id, model.config.video_token_id]
    monkeypatch.setattr(model.generation_config, "suppress_tokens", suppress)


def test_a_cancelled_row_ends_and_the_others_go_on(model, processor, start_engine, monkeypatch):
    endless(model, monkeypatch)
    engine, waves = start_engine(max_batch_size=2)
    (left, left_events), (stays, stays_events) = ask(processor, 0, max_tokens=400), ask(processor, 1, max_tokens=40)
    engine.submit(left)
    engine.submit(stays)
    while not isinstance(left_events.get(timeout=120), str):
        pass
    left.cancel()
    assert drain(stays_events)[-1] == End("length", 40)
    engine.close()
    assert waves[0].requests == 2 and left.tokens < 100 and engine.load == 0


def test_a_request_cancelled_while_it_waits_never_runs(processor, start_engine):
    engine, waves = start_engine(max_batch_size=8, max_wait=0.5)
    (left, events), (stays, stays_events) = ask(processor, 0), ask(processor, 1)
    engine.submit(left)
    left.cancel()
    engine.submit(stays)
    drain(stays_events)
    engine.close()
    assert events.empty() and [wave.requests for wave in waves] == [1]


def test_a_wave_has_one_kind_of_sampling(processor, start_engine):
    """Greedy, sampled and depth alone arrive mixed; each kind is a wave, and the oldest request's comes first."""
    engine, waves = start_engine(max_batch_size=8, max_wait=1.0)
    kinds = [GREEDY, None, Sampling(0.7, 0.9)]
    jobs = [ask(processor, seed, sampling=kinds[seed % 3]) for seed in range(6)]
    for request, _ in jobs:
        engine.submit(request)
    for request, events in jobs:
        drain(events, Depth if request.sampling is None else End)
    engine.close()
    assert [wave.requests for wave in waves] == [2, 2, 2]
    assert waves[1].tokens == 0 < waves[0].tokens


def test_depth_alone_is_forwards(model, processor, start_engine):
    engine, _ = start_engine(max_batch_size=4)
    jobs = [ask(processor, seed, sampling=None) for seed in range(4)]
    for request, _ in jobs:
        engine.submit(request)
    for request, events in jobs:
        (received,) = drain(events, Depth)
        inputs = to_device(processor, collate(processor, [request.row]), model.device)
        with torch.inference_mode():
            outputs = model(**inputs)
        expected = processor.post_process_depth_estimation(outputs)[0]["predicted_depth"]
        np.testing.assert_allclose(received.maps[0], expected.numpy(), rtol=ROUNDING)
        assert received.cameras == outputs.cameras


def test_requests_with_none_one_and_two_photos_share_a_wave(model, processor, start_engine):
    engine, waves = start_engine(max_batch_size=3)
    jobs = []
    for count in (0, 1, 2):
        content = [{"type": "image"}] * count + [{"type": "text", "text": "Hello"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        row = encode(processor, [photo(count * 10 + number) for number in range(count)], text, 200.0)
        events = queue.Queue()
        jobs.append((Request(row, events.put, GREEDY, 4), events))
        engine.submit(jobs[-1][0])
    for count, (request, events) in enumerate(jobs):
        received = drain(events)
        text, _, maps = alone(model, processor, request)
        assert "".join(event for event in received if isinstance(event, str)) == text
        assert len(received[0].maps) == len(received[0].cameras) == count
        for ours, expected in zip(received[0].maps, maps, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=ROUNDING)
    engine.close()
    assert [wave.requests for wave in waves] == [3]


def test_depth_is_not_made_where_nobody_wants_it(model, processor, start_engine, monkeypatch):
    calls = []
    monkeypatch.setattr(model, "predict_depth", lambda *args: calls.append(args))
    engine, _ = start_engine()
    request, events = ask(processor, 0, wants_depth=False)
    engine.submit(request)
    assert not any(isinstance(event, Depth) for event in drain(events)) and not calls


def test_a_wave_that_fails_tells_its_requests_and_the_next_one_runs(model, processor, start_engine, monkeypatch):
    engine, _ = start_engine(max_batch_size=2)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    jobs = [ask(processor, seed) for seed in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(model, "generate", fail)
        for request, _ in jobs:
            engine.submit(request)
        assert all(isinstance(drain(events)[-1], torch.OutOfMemoryError) for _, events in jobs)
    request, events = ask(processor, 2)
    engine.submit(request)
    assert isinstance(drain(events)[-1], End) and engine.thread.is_alive()


def test_requests_from_many_threads_are_all_answered(processor, start_engine):
    engine, waves = start_engine(max_batch_size=4, max_wait=0.01)
    jobs = [ask(processor, seed, max_tokens=2) for seed in range(24)]
    threads = [threading.Thread(target=engine.submit, args=(request,)) for request, _ in jobs]
    for thread in threads:
        thread.start()
    assert all(isinstance(drain(events)[-1], End) for _, events in jobs)
    engine.close()
    assert sum(wave.requests for wave in waves) == 24 and engine.load == 0
