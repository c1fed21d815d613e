"""The rule of the house: a file imports only files on a lower step; commands are doors, which no library imports.

Every import is read from the source, those inside functions too. The steps are explained in docs/code.md.
"""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A module's step is that of the longest name here that it is or lies below.
STEPS = {
    "pcgjax": 0,  # the package itself: its version
    "pcgjax.runtime": 1, "pcgjax.kernels": 1, "pcgjax.metrics": 1, "pcgjax.thresholds": 1, "pcgjax.published": 1,
    "pcgjax.datasets": 2, "pcgjax.features": 2, "pcgjax.models": 2, "pcgjax.losses": 2, "pcgjax.segmentation": 2,
    "pcgjax.data": 3,
    "pcgjax.tasks": 4, "pcgjax.runs": 4,
    "pcgjax.pages": 5,
    "pcgjax.training": 6,
    "pcgjax.classical": 7, "pcgjax.audio_llm": 7,
    "pcgjax.systems": 8,
    "pcgjax.prepare": 9, "pcgjax.train": 9, "pcgjax.evaluate": 9, "pcgjax.predict": 9, "pcgjax.report": 9,
    "pcgjax.__main__": 9, "pcgjax.api": 9, "pcgjax.sites": 9, "pcgjax.splits": 9, "pcgjax.ablation": 9,
    "pcgjax.reproduce": 10, "pcgjax.bench": 10,
}  # fmt: skip
DOORS = {name for name, step in STEPS.items() if step == 9 and name != "pcgjax.ablation"}
# Imports inside a step, from folder to folder.
ALLOWED = {
    ("pcgjax.features", "pcgjax.datasets"), ("pcgjax.segmentation", "pcgjax.datasets"), ("pcgjax.runs", "pcgjax.tasks"),
}  # fmt: skip


def name_of(path: pathlib.Path, root: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The entry of STEPS that a module belongs to."""
    parts = module.split(".")
    rooms = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    room = next(room for room in rooms if room in STEPS)
    assert room != "pcgjax" or module == "pcgjax", f"{module}: give it a step in tests/test_layers.py"
    return room


def imports(root: pathlib.Path) -> dict[str, set[str]]:
    """module -> the package's modules that it imports, at its top or inside a function.

    Left out is the package's own file: every import of the package runs it, and `pcgjax.load` is api's, when called.
    """
    sources = {name_of(path, root): ast.parse(path.read_text()) for path in (root / "pcgjax").rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, tree in sources.items():
        names: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}: a relative import, which this test does not follow"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    names.add(inner if inner in sources else node.module or "")
        found[module] = set() if module == "pcgjax" else {name for name in names if name in sources and name != module}
    return found


def uphill(graph: dict[str, set[str]]) -> list[str]:
    """The imports that break the rule."""
    broken = []
    for module, targets in graph.items():
        here = room_of(module)
        for target in targets:
            there = room_of(target)
            if there == here or (here, there) in ALLOWED:
                continue
            if STEPS[there] >= STEPS[here]:
                broken.append(f"{module} (step {STEPS[here]}) imports {target} (step {STEPS[there]})")
    return sorted(broken)


def doors_imported(graph: dict[str, set[str]]) -> list[str]:
    """The imports of a command by a library: of a door, or of a package's __main__."""
    broken = []
    for module, targets in graph.items():
        whole_work = STEPS[room_of(module)] == 10
        for target in targets:
            if (target in DOORS and not whole_work) or target.endswith(".__main__"):
                broken.append(f"{module} imports {target}")
    return sorted(broken)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other in a circle: the strongly connected components of more than one (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            component = [stack.pop()]
            while component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1:
                components.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return components


def test_a_file_imports_only_lower_steps():
    assert uphill(imports(ROOT)) == []


def test_no_library_imports_a_command():
    assert doors_imported(imports(ROOT)) == []


def test_no_import_circle():
    assert circles(imports(ROOT)) == []


@pytest.mark.parametrize(
    ("module", "code", "broken"),
    [
        ("pcgjax/runtime/files.py", "from pcgjax.models import cnn1d", "uphill"),
        ("pcgjax/data/plan.py", "def late():\n    from pcgjax.training import loop", "uphill"),
        ("pcgjax/tasks/cnn.py", "import pcgjax.runs.log", "uphill"),  # the arrow inside the step goes the other way
        ("pcgjax/training/loop.py", "def late():\n    from pcgjax.train import main", "doors_imported"),
        ("pcgjax/bench/ours.py", "from pcgjax.ablation.__main__ import main", "doors_imported"),
    ],
)
def test_what_breaks_the_rule_is_seen(tmp_path, module, code, broken):
    for name in (module, "pcgjax/models/cnn1d.py", "pcgjax/training/loop.py", "pcgjax/runs/log.py", "pcgjax/train.py",
                 "pcgjax/ablation/__main__.py"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code if name == module else "")
    check = {"uphill": uphill, "doors_imported": doors_imported}[broken]
    [line] = check(imports(tmp_path))
    assert line.startswith(module.removesuffix(".py").replace("/", "."))


def test_a_circle_is_seen(tmp_path):
    for name, code in (("a", "from pcgjax.data import b"), ("b", "def late():\n    import pcgjax.data.a")):
        path = tmp_path / "pcgjax" / "data" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    assert circles(imports(tmp_path)) == [["pcgjax.data.a", "pcgjax.data.b"]]
