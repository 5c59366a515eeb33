"""Convert a checkpoint to a complete DepthVLM repo, or a DepthVLM back to a plain Qwen3-VL.

    python convert_checkpoint.py Qwen/Qwen3-VL-4B-Instruct my-depthvlm     # a base: gets a fresh depth head
    python convert_checkpoint.py JonnyYu828/DepthVLM-4B depthvlm-4b        # released weights: head included
    python convert_checkpoint.py depthvlm-4b qwen3-vl-4b --to-qwen3-vl     # for servers that know text only

Tensors go from file to file, one shard in memory at a time, in the dtype they have; no code of the source is run.
"""

import argparse
import copy
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jinja2
import torch
import yaml
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Qwen3VLConfig

from depthvlm.configuration_depthvlm import DepthVLMConfig
from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DEPTH_PROMPT, DepthVLMProcessor

ROOT = Path(__file__).resolve().parent
CODE = (
    "configuration_depthvlm.py",
    "handler.py",
    "modeling_depthvlm.py",
    "photos_depthvlm.py",
    "processing_depthvlm.py",
)
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
VOCABULARY = ("vocab.json", "merges.txt")  # where there is no tokenizer.json
# a sub-processor's section in processor_config.json, and its own file
IMAGE_PROCESSOR = ("image_processor", "preprocessor_config.json")
VIDEO_PROCESSOR = ("video_processor", "video_preprocessor_config.json")
DTYPES = ("BF16", "F16", "F32")
EMBEDDING, LM_HEAD, DEPTH_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight", "depth_head."


def convert(src: str | Path, dst: str | Path, to_qwen3_vl: bool = False, name: str | None = None) -> Path:
    """
    Write the repo `dst`, which must not exist or be empty, from `src`, a folder or a hub id. Returns `dst`'s path.
    `name` is what the model card calls it; default: the folder's name.

    Raises ValueError, with nothing left behind, for a source that is not what it says: another architecture, a missing,
    extra or wrongly shaped tensor, weights that are not safetensors, not floats or not finite, no tokenizer.
    """
    dst = Path(dst).resolve()
    partial = dst.with_name(dst.name + ".partial")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"DST {dst} exists and is not empty; name a new folder")
    if partial.exists():
        raise ValueError(f"{partial} is left from a conversion that was cut off, or still runs; delete it first")
    source = source_folder(src)
    settings = read_json(source / "config.json")
    tensors = list_tensors(source)
    has_head = "depth_head_type" in settings or any(name.startswith(DEPTH_HEAD) for name in tensors)
    check_model_type(src, settings.get("model_type"), has_head, to_qwen3_vl)
    config = depthvlm_config(source, settings)
    model = empty_model(source, config)
    check_tensors(source, tensors, model, has_head)
    if (source / "generation_config.json").exists():
        read_json(source / "generation_config.json")
    card = read_card(source)
    if not Path(src).is_dir():
        card["base_model"] = str(src)
    print(f"{src}: {len(tensors)} tensors in {len({path for path, *_ in tensors.values()})} files, all accounted for")

    fresh = {}
    processor = load_processor(source, config)
    if to_qwen3_vl:
        tensors = {name: where for name, where in tensors.items() if not name.startswith(DEPTH_HEAD)}
    elif not has_head:
        print(
            "It has no depth head, so a fresh one is added, with PyTorch's own initialisation (seed 0): "
            "its depth means nothing until it is trained"
        )
        fresh = fresh_head(model, config, dtype_of(tensors))
    if config.tie_word_embeddings:
        tensors.pop(LM_HEAD, None)  # a copy of the embedding, checked: loading ties it again

    partial.mkdir(parents=True)
    try:
        described = qwen3_vl_settings(settings) if to_qwen3_vl else depthvlm_settings(settings, config)
        write_json(partial / "config.json", described)
        write_tensors(partial, tensors, fresh)
        if to_qwen3_vl:
            write_qwen3_vl_processor(partial, source)
        else:
            write_depthvlm_processor(partial, source, processor)
            for filename in CODE:
                shutil.copyfile(ROOT / filename, partial / filename)
        # as they are: what reads the source reads the result
        copy_if_there(source, partial, "generation_config.json", *TOKENIZER)
        (partial / "README.md").write_text(model_card(name or dst.name, card, has_head, to_qwen3_vl), encoding="utf-8")
        if dst.exists():
            dst.rmdir()
        partial.rename(dst)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return dst


def source_folder(src: str | Path) -> Path:
    if Path(src).is_dir():
        return Path(src)
    try:
        wanted = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "README.md"]
        return Path(snapshot_download(str(src), allow_patterns=wanted, ignore_patterns="*/*"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"SRC {str(src)!r} is no folder, and the hub did not give it ({first_line(error)}); "
            "pass a folder, or a hub id such as Qwen/Qwen3-VL-4B-Instruct"
        ) from error


def check_model_type(src, model_type, has_head: bool, to_qwen3_vl: bool) -> None:
    if model_type not in ("qwen3_vl", "depthvlm"):
        raise ValueError(f"{src} has model_type {model_type!r}; pass a Qwen3-VL (dense, not MoE) or a DepthVLM")
    if to_qwen3_vl and not has_head:
        raise ValueError(f"{src} has no depth head to take off; it can be served as it is")
    if not to_qwen3_vl and model_type == "depthvlm":
        raise ValueError(f"{src} is a DepthVLM repo already; copy it, or pass --to-qwen3-vl for the plain view")


def depthvlm_config(source: Path, settings: dict) -> DepthVLMConfig:
    settings = copy.deepcopy(settings) | {"model_type": DepthVLMConfig.model_type}  # from_dict edits the inner dicts
    try:
        return DepthVLMConfig.from_dict(settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source / 'config.json'} describes no DepthVLM: {reason}") from error


def empty_model(source: Path, config: DepthVLMConfig) -> DepthVLMForConditionalGeneration:
    try:
        with torch.device("meta"):
            return DepthVLMForConditionalGeneration(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:  # of sizes that cannot be
        raise ValueError(
            f"{source / 'config.json'} describes no model that can be built: {first_line(error)}"
        ) from error


def list_tensors(source: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Each tensor's file, shape and dtype (in safetensors' names), from the files' headers."""
    index = source / "model.safetensors.index.json"
    if (source / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; download it again")
        names = sorted(set(map(str, weight_map.values())))
    else:
        raise ValueError(
            f"{source} has no model.safetensors and no model.safetensors.index.json, and pickled weights "
            "(pytorch_model.bin) are never opened here; save the model again with transformers' save_pretrained"
        )
    tensors = {}
    for name in names:
        path = source / name
        if Path(name).name != name:
            raise ValueError(f"{index} names the file {name!r} outside its folder; do not use this checkpoint")
        try:
            with safe_open(path, framework="pt") as file:
                headers = {key: file.get_slice(key) for key in file.keys()}
                shapes = {key: (path, tuple(part.get_shape()), part.get_dtype()) for key, part in headers.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({first_line(error)}); download it again") from error
        if twice := tensors.keys() & shapes.keys():
            raise ValueError(f"{path} holds tensors that another file of the checkpoint holds too: {listed(twice)}")
        tensors |= shapes
    return tensors


def check_tensors(source: Path, tensors: dict, model: DepthVLMForConditionalGeneration, has_head: bool) -> None:
    """Refuse tensors that are no floats, or not exactly the model's (without the depth head's, for a base)."""
    if quantized := {name: dtype for name, (_, _, dtype) in tensors.items() if dtype not in DTYPES}:
        raise ValueError(
            f"{source} holds tensors of {', '.join(sorted(set(quantized.values())))}, not {', '.join(DTYPES)}: "
            f"{listed(quantized)}; convert the checkpoint that it was quantized from, and quantize when loading"
        )
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if not has_head:
        expected = {name: shape for name, shape in expected.items() if not name.startswith(DEPTH_HEAD)}
    tied = model.config.tie_word_embeddings
    missing = [name for name in expected if name not in tensors and not (tied and name == LM_HEAD)]
    extra = [name for name in tensors if name not in expected]
    faults = {"missing": missing, "extra": extra}
    if any(faults.values()):
        faults = [f"{len(names)} {what}: {listed(names)}" for what, names in faults.items() if names]
        raise ValueError(f"{source} does not hold the tensors that its config.json describes; {'; '.join(faults)}")
    for name, (_, shape, _) in tensors.items():
        if shape != expected[name]:
            wrong = [key for key in tensors if tensors[key][1] != expected[key]]
            raise ValueError(
                f"{source} has {len(wrong)} tensors of another shape than its config.json describes: {listed(wrong)} "
                f"(the first is {shape}, not {expected[name]})"
            )
    if tied and LM_HEAD in tensors:
        lm_head, embedding = read_tensor(tensors, LM_HEAD), read_tensor(tensors, EMBEDDING)
        if lm_head.dtype != embedding.dtype or not torch.equal(lm_head, embedding):
            raise ValueError(
                f"{source} has tie_word_embeddings, yet its {LM_HEAD} differs from {EMBEDDING}; "
                "set tie_word_embeddings to false in its config.json if the LM head was trained on its own"
            )


def read_tensor(tensors: dict, name: str) -> torch.Tensor:
    with safe_open(tensors[name][0], framework="pt") as file:
        return file.get_tensor(name)


def dtype_of(tensors: dict) -> torch.dtype:
    with safe_open(tensors[EMBEDDING][0], framework="pt") as file:
        return file.get_slice(EMBEDDING)[:1].dtype


def fresh_head(model: DepthVLMForConditionalGeneration, config: DepthVLMConfig, dtype: torch.dtype) -> dict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = type(model.depth_head)(config)
    return {DEPTH_HEAD + name: value.to(dtype) for name, value in head.state_dict().items()}


def write_tensors(folder: Path, tensors: dict, fresh: dict) -> None:
    """The source's shards one by one, `fresh` in the last."""
    shards = {}
    for name, (path, *_) in tensors.items():
        shards.setdefault(path, []).append(name)
    weight_map, total_size = {}, 0
    for number, (path, names) in enumerate(shards.items(), start=1):
        with safe_open(path, framework="pt") as file:
            shard = {name: file.get_tensor(name) for name in names}
        if broken := [name for name, value in shard.items() if not value.isfinite().all()]:
            raise ValueError(
                f"{path} holds NaN or infinity in {len(broken)} tensors: {listed(broken)}; take a checkpoint from "
                "before the training diverged, or download it again"
            )
        if number == len(shards):
            shard |= fresh
        filename = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        print(f"[{number}/{len(shards)}] {filename}: {len(shard)} tensors")
        save_file(shard, folder / filename, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / filename)  # safetensors makes it unreadable for other users
        weight_map |= dict.fromkeys(shard, filename)
        total_size += sum(value.nbytes for value in shard.values())
        del shard  # before the next one is opened
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def depthvlm_settings(settings: dict, config: DepthVLMConfig) -> dict:
    """config.json with our fields; the source's stay word for word, so that the way back gives them back."""
    fields = {field.name for field in dataclasses.fields(DepthVLMConfig)}
    fields -= {field.name for field in dataclasses.fields(Qwen3VLConfig)}
    fields |= {"auto_map", "custom_pipelines"}
    described = {name: value for name, value in config.to_dict().items() if name in fields}
    return (
        settings
        | described
        | {
            "model_type": DepthVLMConfig.model_type,
            "architectures": [DepthVLMForConditionalGeneration.__name__],
        }
    )


def qwen3_vl_settings(settings: dict) -> dict:
    ours = ("auto_map", "custom_pipelines", "canonical_focal_length")
    plain = {name: value for name, value in settings.items() if name not in ours and not name.startswith("depth_")}
    return plain | {"model_type": Qwen3VLConfig.model_type, "architectures": ["Qwen3VLForConditionalGeneration"]}


def load_processor(source: Path, config: DepthVLMConfig) -> DepthVLMProcessor:
    read_json(source / "tokenizer_config.json")
    # without these transformers makes a tokenizer of special tokens alone
    if not (source / "tokenizer.json").is_file() and not all((source / name).is_file() for name in VOCABULARY):
        raise ValueError(
            f"{source} has no tokenizer.json, nor {' and '.join(VOCABULARY)}; copy the base model's tokenizer "
            "beside the weights"
        )
    try:
        processor = DepthVLMProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:  # what broken files raise
        raise ValueError(
            f"{source} has no tokenizer and image processor that load ({first_line(error)}); "
            "copy the base model's beside the weights"
        ) from error
    ids = processor.tokenizer(processor.image_token)["input_ids"]
    if ids != [config.image_token_id]:
        raise ValueError(
            f"{source} has image_token_id {config.image_token_id} in its config.json, and its tokenizer gives "
            f"{processor.image_token} {ids}; copy the tokenizer of the same model beside the weights"
        )
    vision = config.vision_config
    reads = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    reads["merge_size"] = vision.spatial_merge_size
    if wrong := [name for name, value in reads.items() if getattr(processor.image_processor, name) != value]:
        raise ValueError(
            f"{source} has an image processor whose {wrong[0]} is {getattr(processor.image_processor, wrong[0])}, and "
            f"a model whose is {reads[wrong[0]]}; copy the same model's preprocessor_config.json beside the weights"
        )
    check_chat_template(source, processor)
    processor.canonical_focal_length = config.canonical_focal_length
    return processor


def check_chat_template(source: Path, processor: DepthVLMProcessor) -> None:
    remedy = "copy the base model's chat_template.jinja beside the weights"
    if not processor.chat_template:
        raise ValueError(f"{source} has no chat template; {remedy}")
    try:
        text = processor.depth_text()
    except jinja2.TemplateError as error:
        raise ValueError(f"{source} has a chat template that cannot be used ({first_line(error)}); {remedy}") from error
    if text.count(processor.image_token) != 1 or DEPTH_PROMPT not in text:
        raise ValueError(f"{source} has a chat template that leaves out the image or the question; {remedy}")


def write_depthvlm_processor(folder: Path, source: Path, processor: DepthVLMProcessor) -> None:
    DepthVLMProcessor.register_for_auto_class()
    processor.save_pretrained(folder)
    # of no use to a depth model, but the plain view needs it again
    if video := processor_section(source, *VIDEO_PROCESSOR):
        write_json(folder / VIDEO_PROCESSOR[1], video)
    write_tokenizer_config(folder, source, "DepthVLMProcessor")


def write_qwen3_vl_processor(folder: Path, source: Path) -> None:
    """In the layout of Qwen's own repos, which old and new servers read."""
    image = processor_section(source, *IMAGE_PROCESSOR)
    if image is None:
        raise ValueError(f"{source} has no image processor; copy the base model's preprocessor_config.json there")
    video = processor_section(source, *VIDEO_PROCESSOR)
    if video is None:
        print("The source says nothing of videos (training does not keep it): Qwen3-VL's defaults are written for them")
        same = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
        video = {name: image[name] for name in same if name in image} | {
            "video_processor_type": "Qwen3VLVideoProcessor"
        }
    for (_, filename), settings in ((IMAGE_PROCESSOR, image), (VIDEO_PROCESSOR, video)):
        write_json(folder / filename, settings | {"processor_class": "Qwen3VLProcessor"})
    write_tokenizer_config(folder, source, "Qwen3VLProcessor")
    copy_if_there(source, folder, "chat_template.jinja", "chat_template.json")


def write_tokenizer_config(folder: Path, source: Path, processor_class: str) -> None:
    tokenizer = read_json(source / "tokenizer_config.json")
    tokenizer.pop("auto_map", None)
    write_json(folder / "tokenizer_config.json", tokenizer | {"processor_class": processor_class})


def processor_section(source: Path, section: str, filename: str) -> dict | None:
    """A sub-processor's settings, from processor_config.json or from its own file; None without."""
    settings = None
    if (source / "processor_config.json").exists():
        settings = read_json(source / "processor_config.json").get(section)
    if settings is None and (source / filename).exists():
        settings = read_json(source / filename)
    return settings and {name: value for name, value in settings.items() if name != "auto_map"}


def read_card(source: Path) -> dict:
    """Licence and base model as the source's README.md states them."""
    path = source / "README.md"
    try:
        card = metadata_load(path) if path.exists() else None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} has a YAML header that cannot be read; correct it or remove it") from error
    known = ("license", "license_name", "license_link", "base_model")
    return {"license": "unknown"} | {name: card[name] for name in known if name in (card or {})}


def model_card(name: str, card: dict, has_head: bool, to_qwen3_vl: bool) -> str:
    if to_qwen3_vl:
        task, tags = "image-text-to-text", ["qwen3_vl"]
        body = f"# {name}\n\nA DepthVLM as a plain Qwen3-VL: the same weights without the depth head.\n"
    else:
        task, tags = "depth-estimation", ["depthvlm", "qwen3_vl", "metric-depth", "custom_code"]
        body = DEPTHVLM_CARD.format(name=name, warning="" if has_head else UNTRAINED)
    header = card | {"pipeline_tag": task, "library_name": "transformers", "tags": tags}
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{body}"


UNTRAINED = "\n**The depth head of this checkpoint is untrained: its depth means nothing until you train it.**\n"
DEPTHVLM_CARD = """\
# {name}

Qwen3-VL that answers in text and in metres: one forward pass gives logits and a dense metric depth map of every image.
{warning}
```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
inputs = processor(images=[Image.open("photo.jpg")], focal_lengths=[1234.5], return_tensors="pt")  # px; None: from EXIF
with torch.inference_mode():
    outputs = model(**inputs)
depth = processor.post_process_depth_estimation(outputs)[0]["predicted_depth"]  # (height, width) of the photo, metres
```
"""


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; pass a whole transformers checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return content


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_if_there(source: Path, folder: Path, *names: str) -> None:
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def listed(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="folder or hub id: a plain Qwen3-VL, released DepthVLM weights, or a DepthVLM repo")
    parser.add_argument("dst", help="folder to write; must not exist or be empty")
    parser.add_argument("--to-qwen3-vl", action="store_true", help="write the plain Qwen3-VL view of a DepthVLM")
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the result to this (public) hub repo")
    args = parser.parse_args(argv)
    try:
        if args.push_to_hub is not None:
            validate_repo_id(args.push_to_hub)
        dst = convert(args.src, args.dst, args.to_qwen3_vl, name=args.push_to_hub)
        print(f"wrote {dst}")
        if args.push_to_hub:
            api = HfApi()
            api.create_repo(args.push_to_hub, exist_ok=True)
            api.upload_folder(repo_id=args.push_to_hub, folder_path=dst)
            print(f"uploaded to https://huggingface.co/{args.push_to_hub}")
    except (ValueError, OSError, SafetensorError) as error:
        print(f"convert_checkpoint.py: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
