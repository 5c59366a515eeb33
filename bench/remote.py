"""Ray, for those who have it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def require_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Ray is missing: pip install 'depthvlm[ray]'") from error
    return ray


@contextmanager
def connected(address: str, **options) -> Iterator[None]:
    """
    For the block: connected to a Ray cluster, or, with "local", to one of this machine that ends with the block, for
    which the options of `ray.init` are.

    Raises `ConnectionError` where no cluster answers.
    """
    ray = require_ray()
    started = {"include_dashboard": False} | options if address == "local" else {}
    ray.init(address, logging_level="error", log_to_driver=False, **started)
    try:
        yield
    finally:
        ray.shutdown()
