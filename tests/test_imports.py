"""Who imports whom: no circles, and no arrow from the model's files to training, or from training to the benchmark."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ("configuration_depthvlm", "handler", "modeling_depthvlm", "photos_depthvlm", "processing_depthvlm")
# root files that stand above training, the benchmark or the page
SCRIPTS = {"depthvlm.train_sft": 1, "depthvlm.predict": 2, "depthvlm.app": 2}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the project."""
    found = {f"depthvlm.{path.stem}": path for path in ROOT.glob("*.py")}
    for package in ("predictions", "training", "bench", "web", "cluster"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if package == "predictions":
                parts = "depthvlm", *parts
            if "lmms" in parts:  # a distribution of its own
                continue
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The project's modules that a module imports, inside functions too; a package stands for what it is asked for."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return (found & known) - {name}


def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: imports(name, path, set(found)) for name, path in found.items()}


def test_imports_have_no_circle():
    left = {name: set(targets) for name, targets in graph().items()}
    while free := [name for name, targets in left.items() if not targets]:
        for name in free:
            del left[name]
        for targets in left.values():
            targets.difference_update(free)
    assert not left, left


def test_arrows_point_one_way():
    """Model files import each other alone; root scripts the model; training the model; bench and cluster all below."""
    layers = {"depthvlm": 0, "training": 1, "bench": 2, "web": 2, "cluster": 3}
    for name, targets in graph().items():
        package, _, stem = name.partition(".")
        layer = SCRIPTS.get(name, layers[package.split(".")[0]])
        for target in targets:
            assert layers[target.split(".")[0]] <= layer, f"{name} imports {target}"
            if package == "depthvlm" and stem in MODEL:
                assert target.partition(".")[2] in MODEL, f"{name} imports {target}"


def test_the_reader_of_imports_sees_them():
    """The two tests above would pass on an empty graph."""
    found = graph()
    assert {"training.data", "training.trainer"} <= found["depthvlm.train_sft"]
    assert "depthvlm.photos_depthvlm" in found["depthvlm.processing_depthvlm"]
    assert "bench.sources._base" in found["bench.sources.waymo"] and "training.questions" in found["bench.retention"]
