"""The structure of the package: imports run downward, no cycles, no overfull folder or file; old module names still work."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sbft

HOUSE = Path(sbft.__file__).parent
MODULES = {
    ".".join(("sbft", *path.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in HOUSE.rglob("*.py")
}
FLOORS = [
    ["sbft.tokens", "sbft.rounding", "sbft.errors", "sbft.files"],
    ["sbft.native", "sbft.metrics"],
    ["sbft.grid"],
    ["sbft.grid"],
    ["sbft.recipe", "sbft.models", "sbft.optim"],
    ["sbft.data"],
    ["sbft.evaluation"],
    ["sbft.training"],
    ["sbft.runs"],
    ["sbft.planning"],
    ["sbft.runs.run_recipe"],
    ["sbft.export", "sbft.bench"],
    ["sbft.cli"],
    ["sbft", "sbft.__main__"],
]
"""From the ground up. A room imports neither from the other rooms of its floor nor from the floors above."""


def imports_of(name: str) -> set[str]:
    """Modules of sbft that a module imports, also within functions and for types."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else node.module for module in inner}
    return (found & MODULES.keys()) - {name}


def floor_and_room(name: str) -> tuple[int, str]:
    """The floor of a module, and its room: the longest matching name."""
    rooms = [(number, room) for number, rooms in enumerate(FLOORS) for room in rooms]
    within = [(number, room) for number, room in rooms if name == room or (room != "sbft" and name.startswith(f"{room}."))]
    return max(within, key=lambda entry: len(entry[1]))


def arrows_up() -> Iterator[str]:
    for name in MODULES:
        floor, room = floor_and_room(name)
        for other in imports_of(name):
            other_floor, other_room = floor_and_room(other)
            if other_room != room and other_floor >= floor and other != "sbft":  # `sbft` itself only has lazy names
                yield f"{name} -> {other}"


def test_imports_run_downward() -> None:
    assert sorted(arrows_up()) == []


def test_no_circle() -> None:
    """A package's `__init__` is left out: it may import its own modules."""
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    TopologicalSorter({name: imports_of(name) - packages for name in MODULES.keys() - packages}).prepare()


def test_nothing_is_overfull() -> None:
    modules = sorted(path.name for path in HOUSE.glob("*.py"))
    assert len(modules) <= 6, modules
    folders = {path.parent for path in MODULES.values()}
    assert {str(folder): len(list(folder.glob("*.py"))) for folder in folders if len(list(folder.glob("*.py"))) > 20} == {}
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("sbft.fine_tuning", "run"),
        ("sbft.likelihood", "evaluate_loss"),
        ("sbft.memory", "PeakMemory"),
        ("sbft.memory_pool", "use_pool"),
        ("sbft.methods", "METHODS"),
        ("sbft.models", "load_model"),
        ("sbft.models", "load_tokenizer"),
        ("sbft.quantization", "scales_bytes"),
        ("sbft.training.record", "RunRecord"),
    ],
)
def test_a_documented_name_goes_on_working(former: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = __import__(former, fromlist=[name])
    new = sys.modules[getattr(module, name).__module__] if callable(getattr(module, name)) else module
    assert getattr(module, name) is getattr(new, name)


def test_a_former_name_warns_once_of_the_new_one() -> None:
    code = "import sbft.fine_tuning, sbft.runs.run_recipe as new; assert sbft.fine_tuning is new; print(new.__spec__.name)"
    done = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "sbft.runs.run_recipe"
    assert done.stderr.count("sbft.fine_tuning is sbft.runs.run_recipe now") == 1
