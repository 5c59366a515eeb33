"""One file per source. A file here is all that a new source takes: it holds a `Source` subclass named `SOURCE`."""

import importlib
import pkgutil

from ._base import Source


def names() -> list[str]:
    """Names of all sources, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> type[Source]:
    """The source called `name`."""
    if name not in names():
        raise ValueError(f"unknown source {name!r}; the sources are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").SOURCE
