"""Tables as Markdown."""


def markdown(header: list[str], rows: list[list], labels: int = 1) -> str:
    """A table whose first `labels` columns are aligned to the left, the others, numbers, to the right."""
    rule = ["---"] * labels + ["---:"] * (len(header) - labels)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, rule, *rows)) + "\n"
