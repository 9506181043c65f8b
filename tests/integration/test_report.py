"""The report of a finished run: one file, whose figures are those of the artifacts."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.paths import ROOT
from tiger.core.artifacts import Artifact, newest
from tiger.data.catalog import Catalog
from tiger.evaluation.evaluator import EvaluationResult
from tiger.pipeline.report import PAGE, main
from tiger.report.markup import escaped
from tiger.report.page import SECTIONS

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects the text of every section, attributes that load, and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.sections: dict[str, str] = {}
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.section = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.loads += [str(values[name]) for name in ("src", "href", "xlink:href") if name in values]
        if tag == "section":
            self.section = str(values["id"])
            self.anchors.add(self.section)
        if tag == "a":
            self.links.append(str(values["href"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.sections[self.section] = self.sections.get(self.section, "") + " " + data


@pytest.fixture(scope="module")
def text(finished: Artifact) -> str:
    return newest(str(Path(finished.folder.uri).parent), "report").folder.read_bytes(PAGE).decode()


def test_report_is_one_file_with_every_section(text: str) -> None:
    page = Page(text)
    assert [link.removeprefix("#") for link in page.links] == [name for name in page.sections if name]
    assert len(page.links) == len(SECTIONS)
    assert set(page.links) == {f"#{anchor}" for anchor in page.anchors}
    outside = [each for each in page.loads if not each.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert "<script" not in text
    assert re.findall(r"(?<!xmlns=\")(?<!xmlns:xlink=\")https?://", re.sub(r"<!DOCTYPE.*?>|<!--.*?-->", "", text)) == []
    assert re.findall(r"#01020[345]", text) == []  # every ink follows the page's colors


def test_figures_of_the_report_are_those_of_the_artifacts(text: str, finished: Artifact) -> None:
    page, result = Page(text), EvaluationResult.model_validate(finished.folder.read_json("evaluation.json"))
    results = page.sections["results"]
    for method in result.splits["test"].methods.values():
        assert f"{method.metrics['recall@10']:.4f}" in results  # in the picture
        assert escaped(method.metrics["ndcg@50"]) in results  # in the table
    difference, low, high = result.splits["test"].paired["markov_chain"]["recall@10"]
    assert f"{difference:+.4f}" in results
    assert f"{low:+.4f} to {high:+.4f}" in results
    for group in result.splits["test"].methods["tiger"].by_history_length.values():
        assert escaped(group.recall) in page.sections["for-whom-it-works"]
    assert f"{result.exact_search['exact']:.4f}" in page.sections["beam-search-and-exact-search"]
    for part in finished.lineage():
        assert f"{part.kind}-{part.fingerprint}" in page.sections["configuration-and-lineage"]
        for check in part.health:
            assert check["name"] in page.sections["health"]
            assert escaped(float(check["value"])) in page.sections["health"]
        assert (part.manifest["peak_memory_bytes"] or 0) > 50e6
    catalog = finished.inputs["model"].inputs["catalog"]
    assert f"{catalog.metrics['interactions']:,}" in page.sections["data"]


def test_report_shows_titles_of_recommendations(text: str, finished: Artifact) -> None:
    recommendations = newest(str(Path(finished.folder.uri).parent), "recommendations")
    titles = Catalog(recommendations.inputs["model"].inputs["catalog"]).titles
    first = recommendations.folder.read_table("recommendations")["items"][0].as_py()[0]
    assert html.escape(titles[first]) in text


def test_command_writes_reports_of_one_run_and_of_two(finished: Artifact, tmp_path: Path) -> None:
    root = str(Path(finished.folder.uri).parent)
    assert main([root, "--output", str(tmp_path / "one.html"), "--dollars-per-hour", "3600"]) == 0
    page = Page((tmp_path / "one.html").read_text())
    seconds = sum(part.manifest["seconds"] for part in finished.lineage())
    assert "$ " in page.sections["time--memory-and-cost"]
    assert seconds > 0
    assert main([finished.folder.uri, finished.folder.uri, "--output", str(tmp_path / "two.html")]) == 0
    both = Page((tmp_path / "two.html").read_text())
    assert "All options of all stages are equal" in both.sections["what-differs"]
    value = EvaluationResult.model_validate(finished.folder.read_json("evaluation.json"))
    assert both.sections["results"].count(f"{value.splits['test'].methods['tiger'].metrics['recall@10']:.4f}") >= 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 4, "contains no finished evaluation"),
        (["{model}"], 4, "is a model artifact; a report is made of a run's folder"),
        (["{root}", "--output", "/nowhere/report.html"], 5, "/nowhere/report.html cannot be written"),
    ],
)
def test_command_names_what_is_wrong(
    arguments: list[str], code: int, message: str, finished: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"root": str(Path(finished.folder.uri).parent), "model": finished.inputs["model"].folder.uri}
    assert main([argument.format(**names) for argument in arguments]) == code
    assert message in capsys.readouterr().err


def test_job_of_the_report_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.report", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: tiger report")


def test_models_without_semantic_ids_are_reported_too(local_ray: None, tmp_path: Path) -> None:
    from tests.pipelines import TINY
    from tiger.pipeline.evaluate import evaluate
    from tiger.pipeline.train import ensure_model
    from tiger.run import load_config

    others = [key for key in TINY if not key.startswith("model.")]
    run = load_config("sample", [*others, f"root={tmp_path}/runs", "model.kind=popularity"])
    evaluation = evaluate(run, ensure_model(run))
    assert main([evaluation.folder.uri, "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "Left out, because this run has nothing for it: Example users, Training, Semantic IDs" in text
    Page(text)
