"""Makes the repository's root importable as the package `depthvlm`, as Hugging Face's remote code does."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if "depthvlm" not in sys.modules:
    spec = importlib.machinery.ModuleSpec("depthvlm", None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules["depthvlm"] = importlib.util.module_from_spec(spec)
