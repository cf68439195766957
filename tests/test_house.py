"""The rules of docs/architecture.md, read from the source: what may import what, and how long a function is."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "metacontroller"
GROUND = {"kernels", "data", "storage"}
ALLOWED: dict[str, set[str]] = {
    "ranges": set(),
    "arguments": set(),
    "tensors": set(),
    "storage": set(),
    "kernels": set(),
    "data": {"storage"},
    "models": GROUND,
    "metrics": {"data"},
    "training": {"data", "storage"},
    "domains": {"data", "storage"},
    "control": {"models", *GROUND},
    "report": {"metrics", "storage"},
}
LAYERS = ("objectives", "phases", "environments", "baselines", "analysis", "recipes", "presets", "commands", "cli")
below = {"control", "domains", "training", "metrics", "models", *GROUND}
for layer in LAYERS:
    ALLOWED[layer] = {*below, *({"report"} if layer in ("analysis", "recipes", "commands") else ())}
    below.add(layer)
ALLOWED["__init__"] = {"control", "models", "environments"}
ALLOWED["variants"] = {"control", "models", *GROUND}
"""What the paper does not have and no preset needs: found by name, imported by the adapter alone."""
ALLOWED["compat"] = {"control", "models", "variants", *GROUND}
"""The adapter for the names of another library; its modules import each other relatively, and nothing imports them."""
SHARED = {"errors", "ranges", "arguments", "tensors", "__version__", ""}
"""What all may import: errors of users, kinds of fields, arguments and tensors, and the package for its version."""
ORDINARY = {"offline", "ant"}
"""Names of worlds that are also words of their own."""
WORLDS = {path.name for path in (ROOT / "domains").iterdir() if (path / "domain.py").exists()}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def place(path: Path) -> tuple[str, ...]:
    """A file as the parts of its module's name below the package."""
    return path.relative_to(ROOT).with_suffix("").parts


@cache
def imports(path: Path) -> set[tuple[str, ...]]:
    """What a file imports of this package, wherever in the file and if only for types: parts of modules' names."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "metacontroller":
                found.add(parts[1:])
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: "/".join(place(path)))
def test_arrows_point_down(path: Path) -> None:
    package = place(path)[0]
    if package == "errors":
        assert imports(path) == set()
        return
    targets = {"".join(target[:1]) for target in imports(path)} - SHARED
    assert targets - {package} <= ALLOWED[package]


def test_nothing_imports_the_adapter_and_it_shadows_nothing() -> None:
    adapter = {path.stem for path in (ROOT / "compat").glob("*.py")} - {"__init__"}
    house = {path.stem for path in ROOT.iterdir() if path.name != "compat"}
    assert adapter & house == set()  # its modules are found beside the house's, see `__path__` of the package
    for path in modules():
        named = {target[0] for target in imports(path) if target}
        assert named & (adapter | {"compat"}) == set(), path


def test_the_core_imports_no_variant_and_no_variant_a_phase() -> None:
    for path in modules():
        package, targets = place(path)[0], {target[0] for target in imports(path) if target}
        if package not in ("variants", "compat"):
            assert targets & {"variants", "compat"} == set(), path
        if package == "variants":
            assert targets <= {"variants", "control", "models", *GROUND, *SHARED}, path


def test_there_are_no_circles() -> None:
    files = {place(path): path for path in modules()}
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for name, path in files.items():
        reached: set[tuple[str, ...]] = set()
        for target in imports(path):
            for length in range(len(target), 0, -1):
                found = next((t for t in (target[:length], (*target[:length], "__init__")) if t in files), None)
                if found is not None:
                    reached.add(found)
                    break
        graph[name] = reached - {name}
    done: set[tuple[str, ...]] = set()

    def visit(name: tuple[str, ...], trail: list[tuple[str, ...]]) -> None:
        assert name not in trail, f"circle: {' -> '.join('.'.join(part) for part in [*trail, name])}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_world_is_imported_outside_its_folder_and_presets() -> None:
    for path in modules():
        for world in WORLDS:
            if any(target[:2] == ("domains", world) for target in imports(path)):
                assert place(path)[:2] == ("domains", world) or place(path)[0] == "presets", f"{path} imports {world}"


def test_no_world_is_named_outside_domains_and_presets() -> None:
    words = {word for world in WORLDS for word in (world, world.replace("_", "-"), world.split("_")[0])} | {"pinpad"}
    words -= ORDINARY
    for path in [*modules(), *ROOT.rglob("*.html")]:
        if path.relative_to(ROOT).parts[0] in ("domains", "presets"):
            continue
        text = path.read_text(encoding="utf-8").lower()
        assert [word for word in words if word in text] == [], path


def longer_than(most: int, path: Path) -> list[str]:
    """The functions of a file with more lines, decorators and docstring included."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    named = (node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return [f"{path}: {node.name}" for node in named if (node.end_lineno or 0) - node.lineno >= most]


def test_no_function_is_longer_than_sixty_lines() -> None:
    files = [*modules(), *(ROOT.parents[1] / "benchmarks").glob("*.py")]
    assert [name for path in files for name in longer_than(60, path)] == []


def test_the_phase_of_discovery_can_be_read_at_once() -> None:
    assert len((ROOT / "phases" / "discover.py").read_text(encoding="utf-8").splitlines()) <= 120


def test_what_steers_has_no_mixins() -> None:
    for path in (ROOT / "control").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base) for base in node.bases} - {"nn.Module", "Saveable"}
                assert len(bases) <= 1, f"{path}: {node.name} is made of {bases}"
