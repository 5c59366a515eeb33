"""Conversations in the forms that instruction data have -> messages for a chat template, and their images.

Read are `messages` (OpenAI, Qwen, TRL), `conversations` (LLaVA, ShareGPT), and `prompt` with `completion` (TRL); images
come from the columns `images` or `image`, or stand in the messages.
"""

import itertools
from collections.abc import Iterator

FORMS = ({"messages"}, {"conversations"}, {"prompt", "completion"})  # columns of which a row needs one set
COLUMNS = ("id", *itertools.chain(*map(sorted, FORMS)), "image", "images")
PLACE = "<image>"  # in text, where an image of the row's columns belongs
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names
IMAGE_KEYS = ("image", "image_url", "url", "path")  # of a part that holds its image


def read_conversation(row: dict) -> tuple[list[dict], list]:
    """
    Returns messages, each `{"role", "content"}` with a list of parts, `{"type": "text", "text"}` or
    `{"type": "image"}`, and the images in the order of their parts, as they are stored. Raises ValueError for a
    conversation without an answer, an unknown role or part, and places that differ in number from the images.
    """
    columns = [row.get("images"), row.get("image")]
    given = [image for column in columns if column is not None for image in as_list(column)]
    remaining, images, messages = iter(given), [], []
    places = 0
    for role, content in turns(row):
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"a turn's role is {role!r}; it must be system, user or assistant, or LLaVA's names of them"
            )
        parts = []
        for part in split(content, role) if isinstance(content, str) else content:
            part, image = read_part(part)
            parts.append(part)
            if part["type"] == "image":
                places += image is None
                images.append(next(remaining, None) if image is None else image)
        messages.append({"role": role, "content": parts})
    if not any(turn["role"] == "assistant" for turn in messages):
        raise ValueError("a conversation without an answer of the assistant teaches nothing")
    if given and not places:  # as TRL does: images without a place go before the first question
        first = next((index for index, turn in enumerate(messages) if turn["role"] == "user"), None)
        if first is None:
            raise ValueError("images without a place go before the first question, but the user asks none")
        before = sum(part["type"] == "image" for turn in messages[:first] for part in turn["content"])
        messages[first]["content"] = [{"type": "image"}] * len(given) + messages[first]["content"]
        images[before:before] = given
    elif places != len(given):
        raise ValueError(f"{places} images are placed in the messages but {len(given)} are given")
    return messages, images


def turns(row: dict) -> Iterator[tuple[str, str | list]]:
    """Role and content of each turn."""
    stored = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    if stored is None:
        if row.get("prompt") is None or row.get("completion") is None:
            raise ValueError(f"the row holds {', '.join(row)} but no messages, conversations or prompt and completion")
        stored = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            if not isinstance(row[name], (str, list)):
                raise ValueError(f"{name} is {row[name]!r}; it must be text or a list of messages")
            stored += [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
    for turn in stored:
        # Arrow fills the keys that a turn lacks with None
        role = turn["role"] if turn.get("role") is not None else turn["from"]
        content = turn["content"] if turn.get("content") is not None else turn["value"]
        yield ROLES.get(role, role), content


def split(content: str, role: str) -> Iterator[str | dict]:
    """Text and places of a content; an answer's `<image>` is text."""
    if role == "assistant" or PLACE not in content:
        yield content
        return
    for index, text in enumerate(content.split(PLACE)):
        if index:
            yield {"type": "image"}
        if text := text.strip():
            yield text


def read_part(part: str | dict) -> tuple[dict, object]:
    """A part for the template, and its image where it holds one itself."""
    if isinstance(part, str):
        return {"type": "text", "text": part}, None
    # without the keys that Arrow adds: a template takes `image: None` for an image
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "text" or part.keys() == {"text"}:
        return {"type": "text", "text": part["text"]}, None
    if part.get("type") not in ("image", "image_url", None) or not part:
        raise ValueError(f"a message has a part of type {part.get('type')!r}; text and images are trained on")
    if unknown := part.keys() - {"type", *IMAGE_KEYS}:
        raise ValueError(
            f"an image in a message has {', '.join(sorted(unknown))}; the image alone is read, leave it out"
        )
    image = next((part[key] for key in IMAGE_KEYS if key in part), None)
    if isinstance(image, dict) and "url" in image:  # OpenAI's
        image = image["url"]
    return {"type": "image"}, image


def as_list(images: object) -> list:
    return list(images) if isinstance(images, (list, tuple)) else [images]
