"""One file per contestant. A file here is all that a new one takes: a `Contestant` subclass named `CONTESTANT`."""

import importlib
import pkgutil

from ._base import Contestant


def names() -> list[str]:
    """Names of all contestants, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> type[Contestant]:
    """The contestant called `name`."""
    if name not in names():
        raise ValueError(f"unknown contestant {name!r}; they are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").CONTESTANT
