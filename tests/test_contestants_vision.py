"""Vision contestants: those in transformers against its own post-processing, the others against stand-in packages."""

import ast
import inspect
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.models.zoedepth import image_processing_pil_zoedepth

from bench import contestants
from bench.contestants import _dense, depth_pro
from bench.contestants._base import NotRunnable, Query

NAMES = ("zoedepth", "depth_pro", "depth_anything_v2", "pipeline", "depth_anything_v1", "depth_anything_3", "unidepth")
NAMES += ("metric3d", "moge", "unik3d")
SIZES = [(70, 42), (42, 56), (70, 42)]  # W, H


def photo(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def query(image, intrinsics=(50.0, 50.0, 20.0, 20.0)):
    return Query("toy/test/0", image, intrinsics, np.zeros((1, 2)))


def queries():
    return [query(photo(*size, seed)) for seed, size in enumerate(SIZES)]


def make(name, checkpoint, **kwargs):
    return contestants.get(name)(str(checkpoint), **kwargs)


def lively(model):
    """Weights with which every pixel gets another depth."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


def assert_same(answer, expected):
    """Maps of one size, float32, equal but for the rounding of the largest depth."""
    assert answer.dtype == np.float32 and answer.shape == tuple(expected.shape)
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-5 * float(expected.max()))
    assert answer.std() > 1e-4 * answer.mean()


def save(folder, model, processor=None):
    model.save_pretrained(folder)
    if processor:
        processor.save_pretrained(folder)
    return folder


def backbone(**fields):
    return {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "out_indices": [1, 2, 3, 4]} | fields


def depth_anything(kind="metric"):
    encoder = backbone(model_type="dinov2", patch_size=14, image_size=56, reshape_hidden_states=False)
    config = transformers.DepthAnythingConfig(
        backbone_config=encoder,
        patch_size=14,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 16, 32, 32],
        fusion_hidden_size=16,
        head_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=80,
    )
    return lively(transformers.DepthAnythingForDepthEstimation(config))


def dpt_processor():
    size = {"height": 56, "width": 56}
    return transformers.DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14)


def zoedepth(heads):
    beit = backbone(model_type="beit", intermediate_size=64, image_size=64, patch_size=16, reshape_hidden_states=False)
    bins = [{"n_bins": 8, "min_depth": 1e-3, "max_depth": far, "name": name} for name, far in heads.items()]
    config = transformers.ZoeDepthConfig(
        backbone_config=beit,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        bottleneck_features=16,
        num_relative_features=8,
        bin_embedding_dim=16,
        num_attractors=[4, 2, 2, 1],
        bin_configurations=bins,
        patch_transformer_hidden_size=128,
        patch_transformer_intermediate_size=64,
        num_patch_transformer_layers=4,
        patch_transformer_num_attention_heads=2,
    )
    return lively(transformers.ZoeDepthForDepthEstimation(config))


def zoedepth_processor(**kwargs):
    size = {"height": 64, "width": 96}
    return transformers.ZoeDepthImageProcessorPil(size=size, ensure_multiple_of=32, **kwargs)


def depth_pro_model(**fields):
    encoder = backbone(model_type="dinov2", patch_size=8, image_size=32, hidden_size=16, num_hidden_layers=2)
    encoder.pop("out_indices")
    config = transformers.DepthProConfig(
        patch_size=32,
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[8, 8],
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[8, 8],
        fusion_hidden_size=16,
        num_fov_head_layers=1,
        image_model_config=encoder,
        patch_model_config=encoder,
        fov_model_config=encoder,
        **{"use_fov_model": True} | fields,
    )
    model = lively(transformers.DepthProForDepthEstimation(config))
    with torch.no_grad():
        for part, value in ((model.head, 1.0), (model.fov_model, 60.0)):  # 1 / m at 60 degrees, or about
            if part is not None:
                *_, weight, bias = part.parameters()
                weight *= 0.1
                bias.fill_(value)
    return model


# Declared conventions


@pytest.mark.parametrize("name", NAMES)
def test_every_contestant_declares_its_conventions(name):
    contestant = contestants.get(name)
    assert contestant.dense and contestant.quantity == "z"
    assert contestant.uses_intrinsics == (name in ("metric3d", "depth_anything_3"))
    assert contestant.batch_safe == (name not in ("zoedepth", "depth_anything_3"))


# Depth Anything V2


def test_depth_anything_v2_is_transformers_own_answer(tmp_path):
    model, processor, asked = depth_anything(), dpt_processor(), queries()
    maps = make("depth_anything_v2", save(tmp_path, model, processor)).maps(asked)
    for answer, one in zip(maps, asked, strict=True):
        with torch.no_grad():
            outputs = model(**processor(one.image, return_tensors="pt"))
        expected = processor.post_process_depth_estimation(outputs, [one.image.size[::-1]])[0]["predicted_depth"]
        assert answer.shape == one.image.size[::-1]
        assert_same(answer, expected)
    assert np.abs(maps[0] - maps[2]).max() > 0.1  # the same size, not the same image


def test_depth_anything_v2_in_half_precision_is_near(tmp_path):
    save(tmp_path, depth_anything(), dpt_processor())
    full, half = (make("depth_anything_v2", tmp_path, dtype=dtype).maps(queries()) for dtype in ("float32", "bfloat16"))
    assert all(answer.dtype == np.float32 for answer in half)
    assert np.median(np.abs(full[1] - half[1]) / full[1]) < 0.05


def test_depth_anything_v2_refuses_relative_depth_and_other_models(tmp_path):
    save(tmp_path / "relative", depth_anything("relative"), dpt_processor())
    with pytest.raises(ValueError, match="answers relative depth, not metres; pass one of depth-anything/"):
        make("depth_anything_v2", tmp_path / "relative")
    transformers.GLPNConfig().save_pretrained(tmp_path / "glpn")
    for name in ("depth_anything_v2", "zoedepth", "depth_pro"):
        with pytest.raises(ValueError, match="'glpn' model, not .*; try pipeline:"):
            make(name, tmp_path / "glpn")


def test_pickled_weights_are_not_read(tmp_path):
    model = depth_anything()
    model.config.save_pretrained(tmp_path)
    dpt_processor().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for name in ("depth_anything_v2", "pipeline"):
        with pytest.raises(OSError, match="safetensors"):
            make(name, tmp_path)


# ZoeDepth


@pytest.fixture
def torchvision_resize(monkeypatch):
    """transformers' post-processing of ZoeDepth calls torchvision for one thing, a bicubic resize."""

    def resize(depth, size, interpolation, antialias):
        assert interpolation == "bicubic" and not antialias
        return nn.functional.interpolate(depth[None], size=size, mode="bicubic")[0]

    functional = types.SimpleNamespace(resize=resize, InterpolationMode=types.SimpleNamespace(BICUBIC="bicubic"))
    monkeypatch.setattr(image_processing_pil_zoedepth, "tvF", functional, raising=False)


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("heads", [{"nyu": 10.0}, {"nyu": 10.0, "kitti": 80.0}])
def test_zoedepth_is_transformers_own_answer_for_each_image_alone(tmp_path, torchvision_resize, heads, do_pad):
    model, processor, asked = zoedepth(heads), zoedepth_processor(do_pad=do_pad), queries()
    maps = make("zoedepth", save(tmp_path, model, processor)).maps(asked)
    for answer, one in zip(maps, asked, strict=True):
        with torch.no_grad():
            outputs = model(**processor(one.image, return_tensors="pt"))
        sizes = [one.image.size[::-1]]
        expected = processor.post_process_depth_estimation(outputs, source_sizes=sizes)[0]["predicted_depth"]
        assert answer.shape == sizes[0]
        assert_same(answer, expected)


# Depth Pro


def depth_pro_post_process():
    """transformers' own function, cut out of a file that cannot be imported without torchvision."""
    path = Path(inspect.getfile(transformers.DepthProConfig)).with_name("image_processing_depth_pro.py")
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    (function,) = (node for node in functions if node.name == "post_process_depth_estimation")
    function.returns, function.args.args = None, [ast.arg(arg.arg) for arg in function.args.args]
    space = {"torch": torch, "pil_torch_interpolation_mapping": {None: types.SimpleNamespace(value="bilinear")}}
    exec(compile(ast.fix_missing_locations(ast.Module([function], [])), str(path), "exec"), space)
    return space["post_process_depth_estimation"]


class DepthProProcessor:
    """Depth Pro's preparation, at 64x64."""

    resample = None
    post_process_depth_estimation = depth_pro_post_process()

    def __call__(self, images, return_tensors):
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1 for image in images]
        pixels = torch.cat([nn.functional.interpolate(one, size=(64, 64), mode="bilinear") for one in pixels])
        return transformers.BatchFeature({"pixel_values": pixels})


@pytest.fixture
def torchvision(monkeypatch):
    monkeypatch.setattr(depth_pro, "is_torchvision_available", lambda: True)
    loader = types.SimpleNamespace(from_pretrained=lambda checkpoint: DepthProProcessor())
    monkeypatch.setattr(_dense, "AutoImageProcessor", loader)


def test_depth_pro_is_transformers_own_answer(tmp_path, torchvision):
    model, processor, asked = depth_pro_model(), DepthProProcessor(), queries()
    maps = make("depth_pro", save(tmp_path, model)).maps(asked)
    for answer, one in zip(maps, asked, strict=True):
        with torch.no_grad():
            outputs = model(**processor([one.image], return_tensors="pt"))
        sizes = [one.image.size[::-1]]
        expected = processor.post_process_depth_estimation(outputs, sizes)[0]["predicted_depth"]
        assert answer.shape == sizes[0]
        assert_same(answer, expected)


def test_depth_pro_depth_follows_the_predicted_field_of_view(tmp_path, torchvision):
    contestant = make("depth_pro", save(tmp_path, depth_pro_model()))
    contestant.model.forward = lambda pixel_values: types.SimpleNamespace(
        predicted_depth=torch.stack([torch.full((8, 8), 0.25), torch.zeros(8, 8)]),
        field_of_view=torch.tensor([90.0, 90.0]),
    )
    near, infinite = contestant.maps([query(photo(60, 40)), query(photo(30, 40))])
    # 90 degrees: the focal length is half the width, so the inverse depth is 0.25 * 2
    np.testing.assert_allclose(near, np.full((40, 60), 2.0), rtol=1e-5)
    np.testing.assert_allclose(infinite, np.full((40, 30), 1e4), rtol=1e-5)


def test_depth_pro_says_what_it_lacks(tmp_path, monkeypatch):
    depth_pro_model().config.save_pretrained(tmp_path / "whole")
    monkeypatch.setattr(depth_pro, "is_torchvision_available", lambda: False)
    with pytest.raises(NotRunnable, match="pip install torchvision"):
        make("depth_pro", tmp_path / "whole")
    depth_pro_model(use_fov_model=False).config.save_pretrained(tmp_path / "canonical")
    with pytest.raises(ValueError, match="no field of view"):
        make("depth_pro", tmp_path / "canonical")


# Any pipeline


def test_pipeline_answers_as_the_model_does(tmp_path):
    save(tmp_path, depth_anything(), dpt_processor())
    contestant = make("pipeline", tmp_path)
    assert contestant.title == f"{tmp_path} (pipeline)"
    maps, expected = contestant.maps(queries()), make("depth_anything_v2", tmp_path).maps(queries())
    for answer, other in zip(maps, expected, strict=True):
        assert_same(answer, other)


def test_pipeline_takes_models_without_a_file_here(tmp_path):
    layers = {"num_encoder_blocks": 4, "depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4}
    config = transformers.GLPNConfig(**layers, decoder_hidden_size=8, max_depth=10)
    model, image = lively(transformers.GLPNForDepthEstimation(config)), photo(64, 96)
    processor = transformers.GLPNImageProcessorPil()
    (answer,) = make("pipeline", save(tmp_path, model, processor)).maps([query(image)])
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).predicted_depth[0]
    assert answer.shape == (96, 64)
    assert_same(answer, expected)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.DPTConfig(), "MiDaS"),
        (transformers.DepthAnythingConfig(), "'relative'"),
        (transformers.PromptDepthAnythingConfig(depth_estimation_type="metric"), "lidar"),
        (transformers.CHMv2Config(), "trees"),
        (transformers.DepthProConfig(), "field of view"),
    ],
)
def test_pipeline_refuses_models_without_metric_depth(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has no metric depth: .*{reason}"):
        make("pipeline", tmp_path)


def test_pipeline_says_what_it_lacks(tmp_path, monkeypatch):
    zoedepth({"nyu": 10.0}).config.save_pretrained(tmp_path / "zoedepth")
    monkeypatch.setattr(contestants.pipeline, "is_torchvision_available", lambda: False)
    with pytest.raises(NotRunnable, match="pip install torchvision"):
        make("pipeline", tmp_path / "zoedepth")
    depth_anything().config.save_pretrained(tmp_path / "metric")
    with pytest.raises(ValueError, match="bfloat16"):
        make("pipeline", tmp_path / "metric", dtype="bfloat16")


# Packages


def stand_in(monkeypatch, name, **contents):
    """A module in sys.modules, and its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    if len(parts) > 1:
        monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], module, raising=False)


class Model(nn.Module):
    """What a package's class shares: loaded by `from_pretrained`."""

    @classmethod
    def from_pretrained(cls, checkpoint):
        model = cls()
        model.checkpoint = checkpoint
        return model


PACKAGES = {
    "depth_anything_3": ("depth_anything_3", "depth-anything/DA3METRIC-LARGE", "pip install depth-anything-3"),
    "unidepth": ("unidepth", "lpiccinelli/unidepth-v2-vitl14", "github.com/lpiccinelli-eth/UniDepth"),
    "moge": ("moge", "Ruicheng/moge-2-vitl", "pip install git.https://github.com/microsoft/MoGe"),
    "unik3d": ("unik3d", "lpiccinelli/unik3d-vitl", "pip install git.https://github.com/lpiccinelli-eth/UniK3D"),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(monkeypatch, name):
    package, checkpoint, remedy = PACKAGES[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotRunnable, match=remedy):
        make(name, checkpoint)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import pkg_resources_that_is_gone", "ModuleNotFoundError: No module named 'pkg_resources_that_is_gone'"),
        ("from json import loadz", "ImportError: cannot import name 'loadz' from 'json'"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
    ],
)
def test_a_package_that_fails_to_import_is_not_called_missing(monkeypatch, tmp_path, code, said):
    (tmp_path / "unik3d").mkdir()
    (tmp_path / "unik3d" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotRunnable, match=f"UniK3D is installed, but its import fails with {said}.*setuptools<81"):
        make("unik3d", "lpiccinelli/unik3d-vitl")


@pytest.mark.parametrize("name", ["unidepth", "unik3d", "moge", "metric3d", "depth_anything_v1"])
def test_a_precision_that_a_package_has_not_is_refused(name):
    checkpoint = {"metric3d": "metric3d_vit_small"}.get(name, PACKAGES.get(name, ("", ""))[1])
    with pytest.raises(ValueError, match="bfloat16.*; pass"):
        make(name, checkpoint, dtype="bfloat16")


@pytest.mark.parametrize(("model_name", "metric"), [("da3metric-large", True), ("da3nested-giant-large", False)])
def test_depth_anything_3_scales_by_the_focal_length_at_the_processed_size(monkeypatch, model_name, metric):
    class DepthAnything3(Model):
        def inference(self, image, extrinsics=None, intrinsics=None, process_res=504):
            (one,) = image  # several would be cropped to one shape
            scale = process_res / max(one.size)
            width, height = (round(side * scale / 14) * 14 for side in one.size)
            ramp = np.linspace(1, 3, width, dtype=np.float32)
            return types.SimpleNamespace(depth=np.tile(ramp, (1, height, 1)))

    DepthAnything3.model_name = model_name
    stand_in(monkeypatch, "depth_anything_3.api", DepthAnything3=DepthAnything3)
    contestant = make("depth_anything_3", "depth-anything/DA3METRIC-LARGE")
    assert contestant.uses_intrinsics == metric and contestant.model.checkpoint == "depth-anything/DA3METRIC-LARGE"
    asked = [query(photo(1008, 756), (1200.0, 1100.0, 503.5, 377.5)), query(photo(600, 1008), (900.0, 900.0, 0.0, 0.0))]
    wide, tall = contestant.maps(asked)
    assert wide.shape == (756, 1008) and tall.shape == (1008, 600)
    # 1008x756 is processed at 504x378: both focal lengths halve
    scale = (600 + 550) / 2 / 300 if metric else 1.0
    np.testing.assert_allclose(wide[:, [0, -1]].mean(0), [scale, 3 * scale], rtol=1e-3)
    # 600x1008 is processed at 294x504 (300 rounded to 21 x 14): the axes' scales differ
    scale = (900 * 294 / 600 + 450) / 2 / 300 if metric else 1.0
    np.testing.assert_allclose(np.median(tall), 2 * scale, rtol=1e-3)
    np.testing.assert_allclose(tall, contestant.maps(asked[1:])[0])


def test_depth_anything_3_refuses_a_model_without_metres(monkeypatch):
    stand_in(monkeypatch, "depth_anything_3.api", DepthAnything3=type("Large", (Model,), {"model_name": "da3-large"}))
    with pytest.raises(ValueError, match="answers relative depth.*DA3METRIC-LARGE"):
        make("depth_anything_3", "depth-anything/DA3-LARGE")


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_unidepth_answers_z_without_being_told_the_camera(monkeypatch, tmp_path, version):
    class UniDepthV1(Model):
        def infer(self, rgbs, intrinsics=None, skip_camera=False):
            assert rgbs.dtype == torch.uint8 and intrinsics is None
            depth = rgbs[None, :1].float()
            return {"depth": depth, "radius": 2 * depth, "points": depth.repeat(1, 3, 1, 1)}

    class UniDepthV2(Model):
        def infer(self, rgb, camera=None, normalize=True):
            return UniDepthV1.infer(self, rgb, camera)

    stand_in(monkeypatch, "unidepth.models", UniDepthV1=UniDepthV1, UniDepthV2=UniDepthV2)
    stand_in(monkeypatch, "xformers.components.attention", NystromAttention=None)
    config = {"data": {}, "model": {"name": f"UniDepth{version}", "num_heads": 8}}  # as their config.json
    (tmp_path / "config.json").write_text(json.dumps(config))
    contestant = make("unidepth", tmp_path)
    assert type(contestant.model).__name__ == f"UniDepth{version}" and contestant.title == f"UniDepth {version}"
    asked = queries()
    for answer, one in zip(contestant.maps(asked), asked, strict=True):
        np.testing.assert_array_equal(answer, np.array(one.image)[..., 0])
    (tmp_path / "config.json").write_text('{"model": {"name": "UniK3D"}}')
    with pytest.raises(ValueError, match="names the model 'UniK3D', neither UniDepthV1 nor UniDepthV2"):
        make("unidepth", tmp_path)


def test_unidepth_v1_names_the_xformers_that_it_needs_before_it_is_loaded(monkeypatch, tmp_path):
    stand_in(monkeypatch, "unidepth.models")  # without the class: reading weights would be another error
    stand_in(monkeypatch, "xformers")  # 0.0.29 and later have no xformers.components
    (tmp_path / "config.json").write_text('{"model": {"name": "UniDepthV1"}}')
    with pytest.raises(NotRunnable, match="No module named 'xformers.components'.*xformers==0.0.28.post3"):
        make("unidepth", tmp_path)


def test_unik3d_answers_z_of_its_points_in_evaluation_mode(monkeypatch):
    class UniK3D(Model):
        def infer(self, rgb, camera=None, normalize=True, rays=None):
            assert rgb.dtype == torch.uint8 and camera is None and not self.training
            return {"points": rgb[None].float()}

    stand_in(monkeypatch, "unik3d.models", UniK3D=UniK3D)
    asked = queries()
    for answer, one in zip(make("unik3d", "lpiccinelli/unik3d-vitl").maps(asked), asked, strict=True):
        np.testing.assert_array_equal(answer, np.array(one.image)[..., 2])


def test_moge_answers_where_its_mask_is_not_and_hands_on_invalid_values(monkeypatch):
    class MoGeModel(Model):
        scale_head = None

        def infer(
            self,
            image,
            num_tokens=None,
            resolution_level=9,
            force_projection=True,
            apply_mask=True,
            fov_x=None,
            use_fp16=True,
        ):
            assert 0.9 < image.max() <= 1 and fov_x is None and not use_fp16
            depth = image[0] * 255
            depth[0, :3] = torch.tensor([float("nan"), float("inf"), -1.0])
            return {"depth": torch.where(depth > 200, torch.inf, depth) if apply_mask else depth}

    stand_in(monkeypatch, "moge.model.v2", MoGeModel=MoGeModel)
    asked = queries()
    for answer, one in zip(make("moge", "Ruicheng/moge-2-vitl").maps(asked), asked, strict=True):
        expected = np.array(one.image)[..., 0].astype(np.float32)
        expected[0, :3] = np.nan, np.inf, -1
        np.testing.assert_allclose(answer, expected, rtol=1e-6)
    monkeypatch.delattr(MoGeModel, "scale_head")
    with pytest.raises(ValueError, match="no metric scale"):
        make("moge", "Ruicheng/moge-vitl")


class Metric3DNet(nn.Module):
    """Answers what it was shown, as canonical depth."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def inference(self, data):
        self.shown = data["input"]
        return self.weight * self.shown.mean(1, keepdim=True), None, {}


@pytest.fixture
def metric3d_hub(monkeypatch, tmp_path):
    def load(repository, model, *, pretrain, trust_repo):
        assert repository == "yvanyin/metric3d" and not pretrain and trust_repo
        return Metric3DNet()

    def download(repository, filename):
        assert repository == "JUGGHM/Metric3D"
        torch.save({"model_state_dict": {"weight": torch.full((1,), 2.0)}}, tmp_path / filename)
        return tmp_path / filename

    monkeypatch.setattr(torch.hub, "load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(contestants.metric3d, "hf_hub_download", download)


@pytest.mark.parametrize(
    ("checkpoint", "title", "size"),
    [("metric3d_vit_giant2", "Metric3D v2", (616, 1064)), ("metric3d_convnext_large", "Metric3D", (544, 1216))],
)
@pytest.mark.parametrize("shape", [(120, 532), (532, 120)])
def test_metric3d_scales_by_the_focal_length_of_the_resized_image(metric3d_hub, checkpoint, title, size, shape):
    contestant = make("metric3d", checkpoint)
    assert contestant.title == title
    image = Image.fromarray(np.full((*shape, 3), 240, np.uint8))
    (answer,) = contestant.maps([query(image, (500.0, 450.0, 0.0, 0.0))])
    shown = contestant.model.shown
    scale = min(size[0] / shape[0], size[1] / shape[1])
    colour = (240 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    assert shown.shape == (1, 3, *size)
    np.testing.assert_allclose(shown[0, :, size[0] // 2, size[1] // 2], colour, rtol=1e-5)
    corner = shown[0, :, 0, 0]  # the padding, in the mean colour
    assert not corner.any() and answer.shape == shape
    np.testing.assert_allclose(answer, 2 * colour.mean() * 500 * scale / 1000, rtol=1e-4)


def test_metric3d_says_what_it_lacks(monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("Missing dependencies: torchvision")

    monkeypatch.setattr(torch.hub, "load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnable, match="machine with a CUDA GPU"):
        make("metric3d", "metric3d_vit_small")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(NotRunnable, match="pip install mmcv-lite mmengine"):
        make("metric3d", "metric3d_vit_small")
    with pytest.raises(ValueError, match="unknown Metric3D model 'vit'; they are metric3d_convnext_tiny"):
        make("metric3d", "vit")


@pytest.mark.parametrize(("place", "dataset"), [("indoor", "nyu"), ("outdoor", "kitti")])
def test_depth_anything_v1_runs_in_its_repository_and_comes_back(monkeypatch, tmp_path, place, dataset):
    class ZoeDepth(nn.Module):
        def forward(self, x, **kwargs):
            assert x.shape[1] == 3 and 0.9 < x.max() <= 1
            ramp = torch.linspace(1, 5, 16).expand(1, 1, 12, 16)
            return {"metric_depth": ramp, "rel_depth": -ramp[:, 0]}

    def build_model(config):
        assert config.pretrained_resource == f"local::{checkpoint}" and config.dataset == dataset
        assert Path("zoedepth").is_dir()
        Path("./checkpoints/depth_anything_vitl14.pth").open().close()
        return ZoeDepth()

    folder = tmp_path / "Depth-Anything" / "metric_depth"
    (folder / "zoedepth" / "models").mkdir(parents=True)
    checkpoint = tmp_path / f"depth_anything_metric_depth_{place}.pt"
    with pytest.raises(ValueError, match="is not a file; pass depth_anything_metric_depth_indoor.pt"):
        make("depth_anything_v1", checkpoint)
    checkpoint.touch()
    monkeypatch.setitem(sys.modules, "zoedepth", None)
    with pytest.raises(NotRunnable, match="git clone https://github.com/LiheYoung/Depth-Anything"):
        make("depth_anything_v1", checkpoint)
    configs = {"get_config": lambda model, mode, dataset: types.SimpleNamespace(model=model, dataset=dataset)}
    stand_in(monkeypatch, "zoedepth.utils.config", **configs)
    builder = {"build_model": build_model, "__file__": str(folder / "zoedepth" / "models" / "builder.py")}
    stand_in(monkeypatch, "zoedepth.models.builder", **builder)
    home = Path.cwd()
    with pytest.raises(NotRunnable, match="lacks a file .*depth_anything_vitl14.pth into metric_depth/checkpoints/"):
        make("depth_anything_v1", checkpoint)
    assert Path.cwd() == home
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "depth_anything_vitl14.pth").touch()
    (answer,) = make("depth_anything_v1", checkpoint).maps([query(photo(61, 40))])
    assert Path.cwd() == home and answer.shape == (40, 61) and answer.dtype == np.float32
    np.testing.assert_allclose(answer, np.tile(np.linspace(1, 5, 61), (40, 1)), rtol=1e-5)


def test_depth_anything_v1_checkpoint_must_name_its_place(tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(ValueError, match="neither indoor nor outdoor"):
        make("depth_anything_v1", tmp_path / "model.pt")
