"""README and docs: links lead somewhere, every page is in the navigation, generated pages are complete."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.paths import ROOT
from tiger.core.config import describe
from tiger.run import RunConfig

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
GENERATED = {"configuration.md", "log.md", "changelog.md", "pictures/pipeline.svg"}


def load_script(name: str) -> ModuleType:
    """Import a script of .ci, which is not a package."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / ".ci" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return load_script("docs.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if name in GENERATED:
            continue
        assert file.is_file(), f"{page.name} links {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named: set[str] = set()

    def collect(entry: object) -> None:
        for value in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            named.add(value) if isinstance(value, str) else collect(value)

    collect(config["nav"])
    assert named == {page.name for page in DOCS.glob("*.md")} | {name for name in GENERATED if name.endswith(".md")}


def test_configuration_reference_has_every_key_with_its_meaning(hooks: ModuleType) -> None:
    text = hooks.configuration()
    for key, _, _, meaning in describe(RunConfig):
        assert f"| `{key}` |" in text
        assert meaning.replace("|", "\\|").replace("<", "&lt;") in text
    assert '## model.kind = "sasrec"' in text
    assert "`num_trials`" in text


def test_picture_of_the_pipeline_is_drawn(hooks: ModuleType) -> None:
    svg = hooks.pipeline_picture()
    for words in ("raw files", "semantic IDs", "report"):
        assert words in svg


def test_readme_is_one_screen_with_both_commands_and_no_placeholder() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 80
    for words in (
        "uv run tiger pipeline",
        "uv run tiger pipeline beauty-cpu",
        "Recommender.load",
        "docs/pictures/report.png",
    ):
        assert words in text
    for page in PAGES:
        assert not re.search(r"\b(SAMPLE_OUTPUT|SAMPLE_ROWS|PYTHON_OUTPUT|TODO)\b", page.read_text()), page.name


def test_log_has_an_index_with_a_verdict_for_every_entry() -> None:
    module = load_script("log_index.py")
    text = (ROOT / "LOG.md").read_text()
    assert module.updated(text) == text, "run: uv run python .ci/log_index.py"
    assert "no verdict" not in module.index(text)
    assert module.index(text).count("\n") == len(re.findall(r"(?m)^## ", text)) + 2


def test_template_names_what_exists() -> None:
    job = yaml.safe_load((ROOT / "template/job.yaml").read_text())
    service = yaml.safe_load((ROOT / "template/service.yaml").read_text())
    for manifest in (job, service):
        assert (ROOT / "template" / manifest["containerfile"]).is_file()
        assert (ROOT / "template" / manifest["working_dir"]).resolve() == ROOT
    deployed = yaml.safe_load((ROOT / "deploy/rayservice.yaml").read_text())["spec"]["serveConfigV2"]
    (application,) = yaml.safe_load(deployed)["applications"]
    assert service["applications"][0]["import_path"] == application["import_path"]
    assert service["applications"][0]["args"].keys() == application["args"].keys()
    (server,), (expected,) = service["applications"][0]["deployments"], application["deployments"]
    assert server["name"] == expected["name"]
    assert server["user_config"].keys() == expected["user_config"].keys()
