"""Calls that people get wrong: each ends in a sentence, in a ValueError or TypeError; none in silence."""

import functools
import io
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
DEPTH = np.full((48, 64), 2.0, np.float32)


@functools.cache
def loaded():
    processor = DepthVLMProcessor.from_pretrained(ROOT, trust_remote_code=False)
    return processor, DepthVLMForConditionalGeneration.from_pretrained(ROOT, dtype="float32").eval()


def call(**arguments):
    processor, _ = loaded()
    processor(**{"images": [PHOTO], "return_tensors": "pt"} | arguments)


def chat(part=(), **arguments):
    content = [{"type": "image", "image": PHOTO, **dict(part)}, {"type": "text", "text": "How far?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    loaded()[0].apply_chat_template([{"role": "user", "content": content}], **options | arguments)


def cloud(depth=DEPTH, focal_length=100.0, **arguments):
    loaded()[0].to_point_cloud(depth, focal_length, **arguments)


def post_process(outputs, **arguments):
    loaded()[0].post_process_depth_estimation(outputs, **arguments)


@functools.cache
def batch():
    return loaded()[0](images=[PHOTO, PHOTO.resize((96, 64))], focal_lengths=60.0, return_tensors="pt")


def forward(**changes):
    with torch.no_grad():
        loaded()[1](**{**batch(), **changes})


def generate(**changes):
    with torch.no_grad():
        loaded()[1].generate(**{**batch(), **changes}, max_new_tokens=2)


def without(run, *names):
    return lambda: run(**dict.fromkeys(names))


def outputs(**fields):
    return SimpleNamespace(**{"predicted_depth": (torch.ones(4, 4),), "cameras": [CAMERA]} | fields)


CAMERA = {"size": (48, 64), "metric_scale": 1.0}
NUMBERS = {  # what is no positive finite number
    "0": 0,
    "-1": -1,
    "nan": math.nan,
    "inf": math.inf,
    "text": "x",
    "complex": 1j,
    "dict": {},
    "object": object(),
}
PHOTOS = {
    "None in a list": [None],
    "number": 5,
    "complex": 1j,
    "set": {1},
    "object": object(),
    "empty list": [],
    "empty dict": {},
    "dict without bytes": {"bytes": None, "path": None},
    "empty bytes": b"",
    "bytes of text": b"no photo at all, and long enough",
    "file of text": io.BytesIO(b"no photo at all"),
    "missing path": "no/such/photo.jpg",
    "empty path": "",
    "folder": str(ROOT / "tests"),
    "text file": str(ROOT / "README.md"),
    "0-dimensional array": np.zeros((), np.uint8),
    "1-dimensional array": np.zeros(7, np.uint8),
    "2 channels": np.zeros((8, 8, 2), np.uint8),
    "5 channels": np.zeros((5, 8, 8), np.uint8),
    "channels first or last": np.zeros((3, 64, 4), np.uint8),
    "4-dimensional array": np.zeros((1, 8, 8, 3), np.uint8),
    "no pixels": np.zeros((0, 4, 3), np.uint8),
    "floats to 255": np.full((8, 8, 3), 255.0),
    "NaN": np.full((8, 8, 3), np.nan),
    "negative": np.full((8, 8, 3), -1),
    "complex array": np.zeros((8, 8), complex),
    "text array": np.full((8, 8), "x"),
    "tensor of 3 axes past 1": torch.full((3, 8, 8), 2.0),
    "panorama of 31:1": Image.new("RGB", (31 * 64, 64)),
    "heic": b"\0\0\0\x18ftypheic" + bytes(64),
}
DEPTH_MAPS = {
    "number": 5.0,
    "text": "x",
    "list of text": ["x"],
    "3 axes": np.ones((2, 48, 64, 1)),
    "transposed": DEPTH.T,
    "negative": -DEPTH,
    "nan": DEPTH * math.nan,
    "inf": DEPTH * math.inf,
    "empty": np.zeros((0, 0)),
    "two for one photo": [DEPTH, DEPTH],
    "ragged": [[[1.0], [1.0, 2.0]]],
    "complex": DEPTH * 1j,
    "object": [object()],
}
CASES = {f"focal_lengths {name}": lambda v=value: call(focal_lengths=v) for name, value in NUMBERS.items()}
CASES |= {f"focal_lengths [{name}]": lambda v=value: call(focal_lengths=[v]) for name, value in NUMBERS.items()}
CASES |= {
    f"focal_lengths ({name}, 60)": lambda v=value: call(focal_lengths=[(v, 60.0)]) for name, value in NUMBERS.items()
}
CASES |= {
    "focal_lengths of three": lambda: call(focal_lengths=[(60.0, 60.0, 60.0)]),
    "focal_lengths, two for one photo": lambda: call(focal_lengths=[60.0, 60.0]),
    "focal_lengths, none for one photo": lambda: call(focal_lengths=[]),
    "focal_lengths in mm": lambda: call(focal_lengths=4.2),
    "focal_lengths of a telescope": lambda: call(focal_lengths=1e6),
    "focal_lengths, a tensor of two": lambda: call(focal_lengths=torch.ones(2)),
    "focal_lengths without photos": lambda: call(images=None, text="hello", focal_lengths=60.0),
    "depth_maps without photos": lambda: call(images=None, text="hello", depth_maps=[DEPTH]),
}
CASES |= {f"images {name}": lambda v=value: call(images=v) for name, value in PHOTOS.items()}
CASES |= {
    f"images [..., {name}]": lambda v=value: call(images=[PHOTO, v])
    for name, value in PHOTOS.items()
    if name != "empty list"  # a row without photos
}
CASES |= {f"load_photo {name}": lambda v=value: loaded()[0].load_photo(v) for name, value in list(PHOTOS.items())[6:28]}
CASES |= {f"depth_maps {name}": lambda v=value: call(depth_maps=v) for name, value in DEPTH_MAPS.items()}
CASES |= {f"max_pixels {name}": lambda v=value: call(max_pixels=v) for name, value in NUMBERS.items()}
CASES |= {
    f"default_fov {name}": lambda v=value: DepthVLMProcessor(loaded()[0].image_processor, default_fov=v)
    for name, value in (NUMBERS | {"180": 180}).items()
}
CASES |= {
    f"canonical_focal_length {name}": lambda v=value: DepthVLMProcessor(None, canonical_focal_length=v)
    for name, value in NUMBERS.items()
}
CASES |= {
    f"text {name}": lambda v=value: call(text=v)
    for name, value in {
        "number": 5,
        "list of numbers": [5],
        "none in a list": [None],
        "dict": {},
        "no place": "hi",
    }.items()
}
CASES |= {
    f"{name} of a call": lambda n=name, v=value: call(**{n: v})
    for name, value in {
        "focal_length": 60.0,
        "focal_lenghts": 60.0,
        "fov": 60.0,
        "size": {"longest_edge": 4096, "shortest_edge": 1024},
        "min_pixels": 1024,
        "do_resize": False,
        "merge_size": 1,
        "patch_size": 8,
        "temporal_patch_size": 1,
        "image_mean": [0.0, 0.0, 0.0],
        "do_normalize": False,
        "images_kwargs": {"max_pixels": 4096},
        "videos": [PHOTO],
        "audio": np.zeros(9),
    }.items()
}
CASES |= {
    f"{name} beside an image": lambda n=name: chat({n: 60.0})
    for name in ("focal_length", "focal_lengths", "max_pixels", "depth_maps")
}
CASES |= {
    "focal_length of a chat": lambda: chat(focal_length=60.0),
    "focal_length of a chat's processor": lambda: chat(processor_kwargs={"focal_length": 60.0}),
    "focal_lengths of a chat, two for one": lambda: chat(processor_kwargs={"focal_lengths": [60.0, 60.0]}),
}
CASES |= {f"focal_length of a cloud {name}": lambda v=value: cloud(focal_length=v) for name, value in NUMBERS.items()}
CASES |= {
    f"focal_length of a cloud {name}": lambda v=value: cloud(focal_length=v)
    for name, value in {
        "None": None,
        "tuple of one": (1.0,),
        "tuple of three": (1.0,) * 3,
        "list": [1.0],
        "True": True,
    }.items()
}
CASES |= {
    f"principal_point of a cloud {name}": lambda v=value: cloud(principal_point=v)
    for name, value in {
        "number": 1.0,
        "text": "ab",
        "tuple of three": (1.0,) * 3,
        "nan": (math.nan, 1.0),
        "object": object(),
    }.items()
}
CASES |= {
    f"depth of a cloud {name}": lambda v=value: cloud(v)
    for name, value in {
        "3 axes": DEPTH[None],
        "text": "x",
        "None": None,
        "number": 1.0,
        "dict": {},
        "ragged": [[1.0], []],
    }.items()
}
CASES |= {
    f"outputs {name}": lambda v=value: post_process(v)
    for name, value in {
        "tensor": torch.ones(1, 4, 4),
        "None": None,
        "dict": {"predicted_depth": DEPTH},
        "without depth": outputs(predicted_depth=None),
        "without cameras": outputs(cameras=None),
        "empty camera": outputs(cameras=[{}]),
        "camera of text": outputs(cameras=["x"]),
        "two cameras": outputs(cameras=[CAMERA] * 2),
    }.items()
}
CASES |= {
    f"target_sizes {name}": lambda v=value: post_process(outputs(), target_sizes=v)
    for name, value in {
        "number": 5,
        "none": [],
        "two": [(4, 4)] * 2,
        "of one number": [4],
        "of three": [(4, 4, 4)],
        "zero": [(0, 4)],
        "text": ["ab"],
        "floats": [(4.5, 4.0)],
        "nan": [(math.nan, 4)],
    }.items()
}
CASES |= {
    "pixel_values without a grid": without(forward, "image_grid_thw"),
    "pixel_values without ids": without(forward, "input_ids"),
    "generate without a grid": without(generate, "image_grid_thw"),
    "generate without token types": without(generate, "mm_token_type_ids"),
    "one camera for two images": lambda: forward(cameras=batch()["cameras"][:1]),
    "cameras in another order": lambda: forward(cameras=batch()["cameras"][::-1]),
    "swapped grids": lambda: forward(image_grid_thw=batch()["image_grid_thw"][:, [0, 2, 1]]),
    "generate with swapped grids": lambda: generate(
        image_grid_thw=batch()["image_grid_thw"][:, [0, 2, 1]], return_dict_in_generate=True
    ),
    "another canonical camera": lambda: forward(
        cameras=[camera | {"canonical_focal_length": 1000.0} for camera in batch()["cameras"]]
    ),
    "8-bit patches": lambda: forward(pixel_values=batch()["pixel_values"].byte()),
    "depth labels": lambda: forward(depth_labels=[]),
    "depth without a dict": lambda: generate(output_depth=True),
    "a callback without depth": lambda: generate(output_depth=False, depth_callback=print),
    "chunks with depth": lambda: generate(return_dict_in_generate=True, prefill_chunk_size=4),
    "a misspelt field": lambda: DepthVLMConfig(depth_head_tpye="mlp"),
    "a misspelt focal length": lambda: DepthVLMConfig(canonical_focal_lenght=500.0),
    "a head of no type": lambda: DepthVLMConfig(depth_head_type="unet"),
    "a source of no kind": lambda: DepthVLMConfig(depth_feature_source="clip"),
    "widths of three": lambda: DepthVLMConfig(depth_head_widths=[8, 8, 8]),
    "odd channels": lambda: DepthVLMConfig(depth_head_channels=7),
    "another feature source for trained weights": lambda: DepthVLMForConditionalGeneration.from_pretrained(
        ROOT, depth_feature_source="llm"
    ),
    "another canonical focal length for trained weights": lambda: DepthVLMForConditionalGeneration.from_pretrained(
        ROOT, canonical_focal_length=1000.0
    ),
}


def test_there_are_as_many_as_people_tried():
    assert len(CASES) >= 204


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_a_sentence(name):
    with pytest.raises((ValueError, TypeError)) as caught:
        CASES[name]()
    message = str(caught.value)
    assert re.search(r"[a-z_]{3,}.*[;:,].*[a-z]{2,}", message, re.DOTALL) and len(message) < 900, message
