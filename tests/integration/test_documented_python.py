"""Python in README and docs runs, with a model of the tests in place of the one that is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.pipelines import TINY
from tiger.core.artifacts import Artifact
from tiger.data.catalog import Catalog
from tiger.export import main

BLOCKS = [
    (path.name, block)
    for path in (ROOT / "README.md", ROOT / "docs/python.md", ROOT / "docs/export.md")
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
]


PARAMETERS = [
    pytest.param(page, block, id=f"{page}-{row}", marks=[pytest.mark.slow] if "run_pipeline" in block else [])
    for row, (page, block) in enumerate(BLOCKS)
]


@pytest.mark.parametrize(("page", "block"), PARAMETERS)
def test_python_block_runs(page: str, block: str, finished: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    model = finished.inputs["model"]
    names = Catalog(model.inputs["catalog"]).source_ids
    monkeypatch.chdir(tmp_path)
    assert main([model.folder.uri, "--output", "my-model"]) == 0
    root = Path(finished.folder.uri).parent
    code = re.sub(r"runs/model-[0-9a-f]{8}", model.folder.uri, block)
    code = code.replace("B000142FVW", names[0]).replace("B0009V1YR8", names[1])
    own = ", ".join(repr(override) for override in [*TINY, f"root={root}"])
    code = code.replace('tiger.load_config("sample", ["data.users=1000"])', f'tiger.load_config("sample", [{own}])')
    names_of = {"tiger": __import__("tiger")}  # blocks of a page follow each other
    exec(compile(code, page, "exec"), names_of)
    if "print(" in code:
        assert "   1. " in capsys.readouterr().out
