"""The two rules of the layout: files import only from files above them, and Ray stays in tiger/scale and jobs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import FAULTS

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("tiger/**/*.py"), *ROOT.glob("jobs/*.py")])


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def order() -> list[str]:
    """Modules of tiger/ in the order of the README's tree; a folder stands for all its files."""
    tree = re.search(r"```\n(tiger/\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree, "the README has no tree of the layout"
    names = re.findall(r"^  (\w+)(?:\.py|/) ", tree[1].split("jobs/")[0], re.MULTILINE)
    return [name for name in names if name != "__init__"]


def test_the_readme_names_every_module() -> None:
    found = {path.stem for path in ROOT.glob("tiger/*.py")} | {path.parent.name for path in ROOT.glob("tiger/*/*.py")}
    assert set(order()) == found - {"__init__"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[-2] != "jobs"], ids=str)
def test_imports_point_upwards(path: Path) -> None:
    own = path.relative_to(ROOT / "tiger").parts[0].removesuffix(".py")
    if own == "__init__":
        assert not list(imports(path))
        return
    allowed = set(order()[: order().index(own) + 1])
    for name in imports(path):
        if name.startswith("tiger."):
            module = name.split(".")[1]
            assert module in allowed, f"{path.name} imports {name}, which stands below it"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_ray_is_imported_in_scale_and_jobs_only(path: Path) -> None:
    if "scale" not in path.parts and "jobs" not in path.parts:
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


def test_every_fault_of_the_catalogue_has_its_test() -> None:
    found = {
        f"{path.stem}::{node.name}"
        for path in ROOT.glob("tests/test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert not FAULTS.keys() - found
