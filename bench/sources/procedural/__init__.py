"""Rendered rooms and streets: the one source that needs no raw folder."""

from .source import SOURCE

__all__ = ["SOURCE"]
