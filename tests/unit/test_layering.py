"""The rules of the layout: layers import downward only, Ray stays in tiger/on_ray, and the tree of docs is complete."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault_catalog import FAULTS
from tests.paths import ROOT

SOURCES = sorted(ROOT.glob("tiger/**/*.py"))

LAYERS = (
    {"core"},
    {"data", "embedding", "semantic_ids", "training"},
    {"metrics"},
    {"tokenizers", "models"},
    {"evaluation"},
    {"report"},
    {"serving", "export"},
    {"run"},
    {"tuning"},
    {"on_ray"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
)
"""Folders and modules of tiger/, lowest layer first. A layer imports from layers below it, and from itself."""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def runtime_imports(path: Path) -> Iterator[str]:
    """Imports at the top of a module, without those for type checkers."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def component(path: Path) -> str:
    return path.relative_to(ROOT / "tiger").parts[0].removesuffix(".py")


def test_layers_name_every_component() -> None:
    assert {component(path) for path in SOURCES} - {"__init__"} == set().union(*LAYERS)


def test_tree_of_the_docs_names_every_component() -> None:
    tree = re.search(r"```\n(tiger/\n.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    assert tree, "docs/architecture.md has no tree of the layout"
    named = set(re.findall(r"^  (\w+)(?:\.py|/) ", tree[1], re.MULTILINE))
    assert named == {component(path) for path in SOURCES} - {"__init__", "__main__"} | {"configs"}
    for folder in re.findall(r"^(\w+)/ ", tree[1], re.MULTILINE):
        assert (ROOT / folder).is_dir(), f"docs/architecture.md names {folder}/, which does not exist"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    own = component(path)
    if own == "__init__":  # the public names are imported when they are used
        assert {name for name in runtime_imports(path) if name.split(".")[0] == "tiger"} == set()
        return
    level = next(level for level, layer in enumerate(LAYERS) if own in layer)
    allowed = {own}.union(*LAYERS[: level + 1])
    for name in imports(path):
        if name.startswith("tiger."):
            assert name.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {name} from a higher layer"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_on_ray_imports_ray(path: Path) -> None:
    if component(path) != "on_ray":
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


def test_jobs_hold_no_logic() -> None:
    jobs = {path.stem: path.read_text() for path in ROOT.glob("jobs/*.py") if path.stem != "__init__"}
    assert jobs.keys() == {path.stem for path in ROOT.glob("tiger/pipeline/*.py")} - {"__init__"}
    for name, text in jobs.items():
        assert len(text.splitlines()) < 12
        assert f'main(["{name}", *sys.argv[1:]])' in text


def test_no_module_imports_a_test_module() -> None:
    for path in ROOT.glob("tests/**/*.py"):
        for name in imports(path):
            assert not re.match(r"(tests\.)?(\w+\.)?test_", name), (
                f"{path.relative_to(ROOT)} imports {name}; move what both need to a helper module in tests/"
            )


def test_scripts_of_tests_are_files() -> None:
    for path in ROOT.glob("tests/**/*.py"):
        lists = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.List)]
        strings = {each.value for node in lists for each in node.elts if isinstance(each, ast.Constant)}
        assert "-c" not in strings, f"{path.relative_to(ROOT)} runs a script in a string; move it to tests/scripts/"


def test_every_fault_of_the_catalogue_has_its_test() -> None:
    found = {
        f"{path.stem}::{node.name}"
        for path in ROOT.glob("tests/*/test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert not FAULTS.keys() - found
