"""Import this first in a script at the repository's root: it makes the root's files the package `depthvlm`.

The model's files import each other relatively, as Hugging Face's remote code must; a plain `import modeling_depthvlm`
would fail.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

if "depthvlm" not in sys.modules:
    spec = importlib.machinery.ModuleSpec("depthvlm", None, is_package=True)
    spec.submodule_search_locations = [str(Path(__file__).resolve().parent)]
    sys.modules["depthvlm"] = importlib.util.module_from_spec(spec)
