"""Contestants beside the code that they stand for: its own classes with random weights, called as its authors document.

`make test-peers` makes the environment for all of them; a test whose package is missing is skipped. MoGe's package is
on PyPI and small, so that its test runs with the others.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_contestants_vision import depth_pro_model, lively, save, zoedepth
from torch import nn
from torch.overrides import TorchFunctionMode

from bench import contestants
from bench.contestants._base import Query

INTRINSICS = (330.0, 310.0, 80.0, 60.0)


def package(name: str):
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed here: make test-peers")


def query(width: int, height: int) -> Query:
    """A picture with both smooth shades and noise."""
    shades = np.add.outer(np.arange(height) / height, np.arange(width) / width)[..., None] * [60, 90, 120]
    noise = np.random.default_rng(0).integers(0, 16, (height, width, 3))
    return Query("toy/test/0", Image.fromarray((shades + noise).astype(np.uint8)), INTRINSICS, np.zeros((1, 2)))


def tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def randomise(model: nn.Module) -> nn.Module:
    """Weights for which every pixel has another depth; a package leaves some of its own uninitialised."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval()


def compare(answer: np.ndarray, expected: torch.Tensor | np.ndarray, rtol: float = 1e-6) -> None:
    expected = np.asarray(expected)
    assert answer.dtype == np.float32 and answer.shape == expected.shape
    assert np.isfinite(answer).all() and answer.std() > 1e-4 * np.abs(answer).mean()
    np.testing.assert_allclose(answer, expected, rtol=rtol)


def test_moge(tmp_path):
    moge = package("moge.model.v2")
    widths = [48, 24, 24, 12, 12]
    up = {"resamplers": ["conv_transpose", "conv_transpose", "conv_transpose", "bilinear"]}
    up |= {"res_block_in_norm": "none", "res_block_hidden_norm": "none"}
    head = up | {"dim_in": widths, "dim_res_blocks": widths, "num_res_blocks": [0, 1, 1, 1, 0]}
    config = {
        "encoder": {"backbone": "dinov2_vits14", "intermediate_layers": [2, 5, 8, 11], "dim_out": 48},
        "neck": up
        | {"dim_in": [50, 2, 2, 2, 2], "dim_out": None, "dim_res_blocks": widths, "num_res_blocks": [0, 1, 1, 1, 0]},
        "points_head": head | {"dim_out": [None, None, None, None, 3]},
        "mask_head": head | {"dim_out": [None, None, None, None, 1]},
        "scale_head": {"dims": [384, 32, 1]},
        "remap_output": "exp",
        "num_tokens_range": [60, 180],
    }
    model = randomise(moge.MoGeModel(**config))
    torch.save({"model_config": config, "model": model.state_dict()}, tmp_path / "model.pt")
    asked = query(160, 120)
    (answer,) = contestants.get("moge")(str(tmp_path / "model.pt")).maps([asked])
    output = model.infer(tensor(asked.image).float() / 255, use_fp16=False)
    mask, depth = output["mask"].numpy(), output["depth"].numpy()
    assert mask.any() and not np.isfinite(depth[~mask]).any()
    np.testing.assert_allclose(answer[mask], depth[mask], rtol=1e-6)
    compare(answer, model.infer(tensor(asked.image).float() / 255, use_fp16=False, apply_mask=False)["depth"])


def test_depth_anything_3(tmp_path, monkeypatch):
    cv2, registry, omegaconf = package("cv2"), package("depth_anything_3.registry"), package("omegaconf")
    from depth_anything_3.api import DepthAnything3

    config = omegaconf.OmegaConf.load(registry.MODEL_REGISTRY["da3metric-large"])
    config.net |= {"name": "vits", "out_layers": [2, 5, 8, 11]}
    config.head |= {"dim_in": 384, "features": 32, "out_channels": [48, 96, 192, 384]}
    omegaconf.OmegaConf.save(config, tmp_path / "da3metric-small.yaml")
    monkeypatch.setitem(registry.MODEL_REGISTRY, "da3metric-small", str(tmp_path / "da3metric-small.yaml"))
    model = randomise(DepthAnything3("da3metric-small"))
    model.save_pretrained(tmp_path / "checkpoint")
    asked = query(1008, 300)
    camera = np.array([[INTRINSICS[0], 0, INTRINSICS[2]], [0, INTRINSICS[1], INTRINSICS[3]], [0, 0, 1]])
    (answer,) = contestants.get("depth_anything_3")(str(tmp_path / "checkpoint")).maps([asked])
    # "metric_depth = focal * net_output / 300", the focal length being that of the image as the package resizes it
    shown, _, intrinsics = model.input_processor([asked.image], intrinsics=camera[None], num_workers=1)
    focal_length = (intrinsics[0, 0, 0] + intrinsics[0, 1, 1]).item() / 2
    depth = model.inference([asked.image]).depth[0]
    assert shown.shape[-2:] == depth.shape == (154, 504)
    expected = cv2.resize(depth * (focal_length / 300), asked.image.size, interpolation=cv2.INTER_LINEAR)
    compare(answer, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["v2_vits14", "v1_cnvnxtl"])
def test_unidepth(tmp_path, name):
    models = package("unidepth.models")
    if name.startswith("v1"):
        package("xformers.components.attention")
    config = json.loads((Path(models.__file__).parents[2] / "configs" / f"config_{name}.json").read_text())
    config["model"]["pixel_encoder"]["pretrained"] = None
    model = randomise({"v1": models.UniDepthV1, "v2": models.UniDepthV2}[name[:2]](config))
    model.save_pretrained(tmp_path, config=config)
    asked = query(320, 240)
    (answer,) = contestants.get("unidepth")(str(tmp_path)).maps([asked])
    with torch.no_grad():
        compare(answer, model.infer(tensor(asked.image))["depth"][0, 0])


def test_unik3d(tmp_path):
    models = package("unik3d.models")
    config = json.loads((Path(models.__file__).parents[2] / "configs" / "eval" / "vits.json").read_text())
    config["model"]["pixel_encoder"]["pretrained"] = None
    model = randomise(models.UniK3D(config))
    model.save_pretrained(tmp_path, config=config)
    asked = query(320, 240)
    (answer,) = contestants.get("unik3d")(str(tmp_path)).maps([asked])
    with torch.no_grad():
        predictions = model.infer(tensor(asked.image))
    compare(answer, predictions["points"][0, 2])
    compare(answer, predictions["depth"][0, 0])


class NoGPU(TorchFunctionMode):
    """Makes tensors on the CPU that code puts on "cuda" by name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {}))


@pytest.fixture
def cuda_by_name(monkeypatch):
    if torch.cuda.is_available():
        yield
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with NoGPU():
        yield


@pytest.mark.parametrize("name", ["metric3d_vit_small", "metric3d_convnext_tiny"])
def test_metric3d(tmp_path, monkeypatch, cuda_by_name, name):
    cv2, _ = package("cv2"), package("mmengine")
    if not (Path(torch.hub.get_dir()) / "yvanyin_metric3d_main").is_dir():
        pytest.skip("the repository is not in torch.hub's folder: make test-peers")
    model = randomise(torch.hub.load("yvanyin/metric3d", name, pretrain=False, trust_repo=True))
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "weights.pth")
    monkeypatch.setattr(
        contestants.get("metric3d").__module__ + ".hf_hub_download", lambda *_: tmp_path / "weights.pth"
    )
    contestant = contestants.get("metric3d")(name)
    size = (616, 1064) if "vit" in name else (544, 1216)
    # the first needs no resizing; of the other, the documented call rounds the resized picture to whole numbers
    for asked, rtol in ((query(640, size[0]), 1e-5), (query(400, 300), 1e-2)):
        (answer,) = contestant.maps([asked])
        height, width = np.array(asked.image).shape[:2]
        scale = min(size[0] / height, size[1] / width)
        rgb = cv2.resize(
            np.array(asked.image), (int(width * scale), int(height * scale)), interpolation=cv2.INTER_LINEAR
        )
        missing = [size[0] - rgb.shape[0], size[1] - rgb.shape[1]]
        top, left = (side // 2 for side in missing)
        mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
        edges = (top, missing[0] - top, left, missing[1] - left)
        rgb = cv2.copyMakeBorder(rgb.astype(np.float64), *edges, cv2.BORDER_CONSTANT, value=mean)
        shown = torch.from_numpy((rgb - mean) / std).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            depth, _, _ = model.inference({"input": shown})
        depth = depth.squeeze()[edges[0] : size[0] - edges[1], edges[2] : size[1] - edges[3]]
        depth = F.interpolate(depth[None, None], (height, width), mode="bilinear").squeeze()
        compare(answer, (depth * (INTRINSICS[0] * scale / 1000)).clamp(0, 300), rtol)


def test_depth_anything_v1(tmp_path, monkeypatch):
    builder = package("zoedepth.models.builder")
    from torchvision.transforms import ToTensor
    from zoedepth.models.base_models.dpt_dinov2.dpt import DPT_DINOv2
    from zoedepth.utils.config import get_config

    def load(path, **_):
        if Path(path).name == "depth_anything_vitl14.pth":
            return DPT_DINOv2(out_channels=[256, 512, 1024, 1024], use_clstoken=False).state_dict()
        return model.state_dict()

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.chdir(Path(builder.__file__).parents[2])
    config = get_config("zoedepth", "eval", "nyu")
    config.pretrained_resource = ""
    model = randomise(builder.build_model(config))
    checkpoint = tmp_path / "depth_anything_metric_depth_indoor.pt"
    checkpoint.touch()
    asked = query(320, 240)
    (answer,) = contestants.get("depth_anything_v1")(str(checkpoint)).maps([asked])
    with torch.no_grad():
        depth = model(ToTensor()(asked.image)[None], dataset="nyu")["metric_depth"]
    compare(answer, F.interpolate(depth, (240, 320), mode="bilinear", align_corners=True)[0, 0])


def test_depth_pro(tmp_path):
    package("torchvision")
    from transformers import DepthProImageProcessor, pipeline

    model, processor, asked = depth_pro_model(), DepthProImageProcessor(size={"height": 64, "width": 64}), query(70, 42)
    save(tmp_path, model, processor)
    with torch.no_grad():
        outputs = model(**processor(asked.image, return_tensors="pt"))
    expected = processor.post_process_depth_estimation(outputs, target_sizes=[(42, 70)])[0]["predicted_depth"]
    compare(contestants.get("depth_pro")(str(tmp_path)).maps([asked])[0], expected)
    compare(contestants.get("pipeline")(str(tmp_path)).maps([asked])[0], expected)
    documented = pipeline("depth-estimation", model=str(tmp_path), device="cpu")
    compare(documented(asked.image)["predicted_depth"].numpy(), expected)


def test_zoedepth(tmp_path):
    package("torchvision")
    from transformers import ZoeDepthImageProcessor

    model, asked = lively(zoedepth({"nyu": 10.0, "kitti": 80.0})), query(70, 42)
    processor = ZoeDepthImageProcessor(size={"height": 64, "width": 96}, ensure_multiple_of=32)
    save(tmp_path, model, processor)
    with torch.no_grad():
        outputs = model(**processor(asked.image, return_tensors="pt"))
    expected = processor.post_process_depth_estimation(outputs, source_sizes=[(42, 70)])[0]["predicted_depth"]
    compare(contestants.get("zoedepth")(str(tmp_path)).maps([asked])[0], expected, rtol=1e-5)
    compare(contestants.get("pipeline")(str(tmp_path)).maps([asked])[0], expected, rtol=1e-5)
