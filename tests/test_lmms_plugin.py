"""The lmms-eval plug-in against stand-ins with lmms-eval 0.7.3's names: what it declares, and what it loads."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_processing import PlainProcessor, photo
from test_train_script import start  # noqa: F401
from tiny import ROOT
from transformers import Qwen3VLForConditionalGeneration

FOLDER = ROOT / "bench" / "lmms"


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in's two modules over a stand-in lmms_eval: a base class, its simple and its chat Qwen3-VL."""

    class Lmms:
        def __init__(self):
            self.task_dict = {}

    class Simple(Lmms):
        def __init__(self, **kwargs):
            raise AssertionError("would load transformers' own Qwen3-VL")

        model = property(lambda self: self._model)

    class Chat(Simple):
        is_simple = False

    modules = {
        "lmms_eval.models.chat.qwen3_vl": {"Qwen3_VL": Chat},
        "lmms_eval.models.registry_v2": {
            "ModelManifest": lambda model_id, chat_class_path: SimpleNamespace(id=model_id, path=chat_class_path)
        },
    }
    for name, content in modules.items():
        for depth in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:depth])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("depthvlm_lmms", "depthvlm_lmms_manifest"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("depthvlm_lmms", "depthvlm_lmms_manifest"):
        sys.modules.pop(name, None)


def test_entry_point_names_the_class(plugin):
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    target = project["project"]["entry-points"]["lmms_eval.models"]["depthvlm"]
    module, _, name = target.partition(":")
    manifest = getattr(importlib.import_module(module), name)
    assert manifest.id == "depthvlm" and "depthvlm_lmms" not in sys.modules  # read for every model: nothing is loaded
    module, _, name = manifest.path.rpartition(".")
    assert getattr(importlib.import_module(module), name).is_simple is False
    assert {"depthvlm_lmms", "depthvlm_lmms_manifest"} == set(project["tool"]["setuptools"]["py-modules"])


def test_loads_the_checkpoint_with_its_own_code(plugin, start, monkeypatch):  # noqa: F811
    module = importlib.import_module("depthvlm_lmms")
    plugged = module.DepthVLM(start, device="cpu", batch_size="2")
    assert type(plugged.model).__name__ == "DepthVLMForConditionalGeneration" and not plugged.model.training
    assert "transformers_modules" in type(plugged.model).__module__ and plugged.model.dtype == torch.bfloat16
    assert plugged.batch_size_per_gpu == 2 and plugged.device_map == "cpu"
    assert type(plugged.processor).__name__ == "DepthVLMProcessor" and plugged.processor.chat_template


def test_photos_and_answers_are_the_base_models(plugin, start):  # noqa: F811
    """lmms-eval's own call, on photos that it has sized: what Qwen3-VL's processor and model make of it."""
    plugged = importlib.import_module("depthvlm_lmms").DepthVLM(start, device="cpu")
    plain = PlainProcessor(
        plugged.processor.image_processor, plugged.processor.tokenizer, chat_template=plugged.processor.chat_template
    )
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many chairs?"}]}]
    texts = [plugged.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)]
    asked = {"text": texts, "images": [photo(96, 64)], "videos": None, "video_metadata": None}
    asked |= {**plugged._build_video_kwargs(), "do_sample_frames": False, "do_resize": False, "return_tensors": "pt"}
    ours, theirs = plugged.processor(**asked), plain(**asked)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    base = Qwen3VLForConditionalGeneration(plugged.model.config).to(torch.bfloat16).eval()
    base.load_state_dict(plugged.model.state_dict(), strict=False)
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": list(range(3, 8))}
    assert torch.equal(plugged.model.generate(**ours, **settings), base.generate(**theirs, **settings))


def test_unknown_argument_is_refused(plugin, start):  # noqa: F811
    with pytest.raises(TypeError, match="fps"):
        importlib.import_module("depthvlm_lmms").DepthVLM(start, device="cpu", fps=2)


def test_requirements_and_readme_name_what_is_needed():
    requirements, readme = (FOLDER / "requirements.txt").read_text(), (FOLDER / "README.md").read_text()
    assert "lmms_eval==0.7" in requirements and "./bench/lmms" in requirements
    tasks = readme.split("--tasks ")[1].split()[0].split(",")
    assert len(tasks) == 8 and all(f"`{task}`" in readme for task in tasks)
