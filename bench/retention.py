"""Does a tuned model still answer as its base did? `python -m bench retention --base A --tuned B --data ...`.

Fixed questions about fixed photos, answered greedily by both models, which see the same pixels and the same tokens.
People who trained on depth alone report a model that answers nearly every question with the depth prompt's response.
"""

import argparse
import json
import string
from pathlib import Path

from .arguments import positive

SUFFIXES = (".jpg", ".jpeg", ".png")
# Qwen3-VL's own, and DepthVLM's as released, which keeps Qwen3-VL's name: text plays the same part in both
MODEL_TYPES = ("depthvlm", "qwen3_vl")


def add_retention(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("retention", help="base and tuned model on fixed questions: canned replies, agreement")
    parser.add_argument("--base", metavar="MODEL", required=True, help="what the tuned model was; a Qwen3-VL will do")
    parser.add_argument("--tuned", metavar="MODEL", required=True, help="a DepthVLM; its processor is used for both")
    photos = "photos, folders of photos, or data sets that `bench build` wrote (DIR/SOURCE)"
    parser.add_argument("--data", metavar="PATH", type=Path, nargs="+", required=True, help=photos)
    parser.add_argument("--limit", type=positive, default=20, metavar="N", help="photos, the first, of each folder")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", metavar="FILE.json", type=Path, default=Path("retention.json"), help="every answer")
    parser.set_defaults(run=run_retention)


def run_retention(args: argparse.Namespace) -> int:
    photos = [photo for path in args.data for photo in read_photos(path, args.limit)]
    record = compare(args.base, args.tuned, photos, args.max_new_tokens, args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False))
    print(
        f"{record['questions']} questions about {len(photos)} photos\n"
        f"canned depth replies: base {record['canned_base']:.1%}, tuned {record['canned_tuned']:.1%}\n"
        f"agreement: {record['agreement_exact']:.1%} to the letter, {record['agreement_normalised']:.1%} but for case, "
        f"punctuation and spaces\nevery answer: {args.out}"
    )
    return 0


def read_photos(path: Path, limit: int) -> list[tuple[str, object, float | None]]:
    """(name, RGB photo, focal length in px, None if unknown): a file, or the first `limit` of a folder, by name.

    A folder that `bench build` wrote is read by its shards, test before train. Raises ValueError for one with neither.
    """
    from PIL import Image

    def opened(file):
        with Image.open(file) as image:
            image.load()
        return str(file), image, None

    if path.is_file():
        return [opened(path)]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; pass photos, a folder of photos, or DIR/SOURCE of `bench build`")
    if files := sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES):
        return [opened(file) for file in files[:limit]]
    shards = sorted(path.glob("test-*.parquet")) or sorted(path.glob("train-*.parquet"))
    if not shards:
        raise ValueError(
            f"{path} holds neither {', '.join(SUFFIXES)} files nor shards of `bench build`; pass DIR/SOURCE of a build"
        )
    return read_shards(shards, limit)


def read_shards(shards: list[Path], limit: int) -> list[tuple[str, object, float]]:
    import datasets

    from training.data import decode

    rows = datasets.load_dataset("parquet", data_files=[str(shard) for shard in shards], split="train", streaming=True)
    return [
        (f"{row['source']}/{row['split']}/{row['id']}", decode(row["image"]), row["fx"])
        for row in rows.decode(False).take(limit)
    ]


def compare(base: str, tuned: str, photos: list[tuple], max_new_tokens: int = 64, device: str = "cpu") -> dict:
    """Answers of both to all `RETENTION_QUESTIONS` about all photos, shares of canned replies, and agreement.

    base, tuned: folders or Hub ids. photos: as `read_photos` returns them. Raises ValueError for models whose
    tokenizers cannot be the same.
    """
    from depthvlm.processing_depthvlm import DEPTH_RESPONSE, DepthVLMProcessor
    from training.questions import RETENTION_QUESTIONS

    check_same_tokens(base, tuned)
    processor = DepthVLMProcessor.from_pretrained(tuned, trust_remote_code=False)
    rows = [
        {"image": image, "focal_length": focal_length, "question": question}
        for _, image, focal_length in photos
        for question in RETENTION_QUESTIONS
    ]
    answers = {model: ask(model, processor, rows, max_new_tokens, device) for model in dict.fromkeys((base, tuned))}
    pairs = list(zip(answers[base], answers[tuned], strict=True))
    named = [(name, question) for name, *_ in photos for question in RETENTION_QUESTIONS]
    return {
        "base": base,
        "tuned": tuned,
        "canned_reply": DEPTH_RESPONSE,
        "questions": len(rows),
        **scores(pairs),
        "answers": [
            {"photo": name, "question": question, "base": before, "tuned": after}
            for (name, question), (before, after) in zip(named, pairs, strict=True)
        ],
    }


def scores(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Shares over (base's answer, tuned model's). A canned reply counts whatever its case, punctuation and spaces."""
    from depthvlm.processing_depthvlm import DEPTH_RESPONSE

    canned = normalised(DEPTH_RESPONSE)
    return {
        "canned_base": sum(normalised(before) == canned for before, _ in pairs) / len(pairs),
        "canned_tuned": sum(normalised(after) == canned for _, after in pairs) / len(pairs),
        "agreement_exact": sum(before == after for before, after in pairs) / len(pairs),
        "agreement_normalised": sum(normalised(before) == normalised(after) for before, after in pairs) / len(pairs),
    }


def normalised(answer: str) -> str:
    """Lower case, without punctuation, single spaces."""
    return " ".join(answer.lower().translate(str.maketrans("", "", string.punctuation)).split())


def check_same_tokens(base: str, tuned: str) -> None:
    from transformers import PreTrainedConfig

    configs = {name: PreTrainedConfig.get_config_dict(name)[0] for name in (base, tuned)}
    for name, config in configs.items():
        if config.get("model_type") not in MODEL_TYPES:
            raise ValueError(f"{name} is a {config.get('model_type')!r}; pass a Qwen3-VL or a DepthVLM")
    fields = {name: (config["text_config"]["vocab_size"], config["image_token_id"]) for name, config in configs.items()}
    if fields[base] != fields[tuned]:
        raise ValueError(
            f"{base} has (vocab_size, image_token_id) {fields[base]} but {tuned} {fields[tuned]}; pass the base "
            "that the tuned model was made of"
        )


def ask(checkpoint: str, processor, rows: list[dict], max_new_tokens: int, device: str) -> list[str]:
    from transformers import PreTrainedConfig, Qwen3VLForConditionalGeneration

    from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
    from training.questions import generate_answers

    depthvlm = PreTrainedConfig.get_config_dict(checkpoint)[0]["model_type"] == "depthvlm"
    cls = DepthVLMForConditionalGeneration if depthvlm else Qwen3VLForConditionalGeneration
    model = cls.from_pretrained(checkpoint, use_safetensors=True).to(device).eval()
    processor = processor if depthvlm else WithoutCameras(processor)
    return generate_answers(model, processor, rows, max_new_tokens=max_new_tokens)


class WithoutCameras:
    """DepthVLM's processor for a plain Qwen3-VL, whose `generate` refuses `cameras`."""

    def __init__(self, processor):
        self.processor = processor
        self.apply_chat_template, self.batch_decode = processor.apply_chat_template, processor.batch_decode

    def __call__(self, **kwargs):
        batch = self.processor(**kwargs)
        del batch["cameras"]
        return batch
