"""Text and JSON files that are whole or not there."""

import json
from pathlib import Path
from typing import Any

from depthvlm.files import open_whole


def write_text(path: str | Path, text: str) -> None:
    with open_whole(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(path: str | Path, content: Any) -> None:
    """Indented UTF-8; NaN and infinity, which JSON does not know, raise ValueError."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
