"""The page in a headless Chromium, of a service that needs a token: what a person does, at two widths."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from tests.browser import CHROMIUM, Page, browser
from tests.processes import free_ports
from tests.serving import TOKEN, ToyService, toy_model
from tiger.serving.app import build_app

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")

HOSTILE = "<img src=x onerror=alert(1)><b>&amp;"


@pytest.fixture(scope="module")
def service() -> ToyService:
    model = toy_model(60)
    model.items.titles[6] = f"Red soap {HOSTILE}"
    return ToyService(model, beam=20)


@pytest.fixture(scope="module")
def url(service: ToyService) -> Iterator[str]:
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(build_app(service, token=TOKEN), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as page:
        yield page


def enter_token(page: Page) -> None:
    page.wait("!document.querySelector('#token-form').hidden")
    page.type(TOKEN)  # the field has the focus
    page.press("Enter", 13, "\r")
    page.wait("document.querySelectorAll('#results li').length === 10")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_finds_items_and_gets_recommendations(
    page: Page, url: str, service: ToyService, width: int, tmp_path: Path
) -> None:
    page.problems.clear()
    page.open(url, width)
    page.run("sessionStorage.clear()")
    page.open(url, width)
    enter_token(page)
    assert "healthy · model-0 · 60 items" in page.texts("#status")[0]
    assert "most popular" in page.texts("#results-note")[0]

    page.click("#query")
    page.type("red soap")
    page.wait("document.querySelectorAll('#found li').length === 8")
    assert HOSTILE in page.run("document.querySelector('#found').innerText")  # as text, and nothing else
    for number in range(3):
        page.click("#found .act", number)
        page.wait(f"document.querySelectorAll('#chosen li').length === {number + 1}")
    page.wait("document.querySelector('#results-note').innerText === ''")
    chosen = page.run("state.history.map((each) => each.item)")
    model = service.model
    found = model.recommender.recommend([[model.items.index[name] for name in chosen]], k=10, beam=20).items[0]
    page.wait("document.querySelectorAll('#beam li').length > 10")
    assert page.texts("#results .open") == [model.items.titles[item] for item in found]
    assert model.tree is not None
    assert page.texts("#results .code") == [" ".join(map(str, model.tree.codes(item))) for item in found.tolist()]
    assert len(page.texts("#beam .open")) == 10  # the beam ends at every recommended item

    page.click("#results .open", 1)
    page.wait("document.querySelector('#item').open")
    assert page.texts("#item-title") == [model.items.titles[found[1]]]
    assert f"i{found[1]}" in page.texts("#item-facts")[0]
    page.click("#item-browse")
    page.wait("!document.querySelector('#item').open && document.querySelectorAll('#prefix-items li').length > 0")
    assert model.items.titles[found[1]] in page.texts("#prefix-items .open")
    page.click("#crumbs button")  # back to all
    page.wait("document.querySelectorAll('#prefixes li').length === 4")
    page.click("#prefixes button")
    page.wait("document.querySelectorAll('#crumbs li').length === 2")

    assert page.run("document.documentElement.scrollWidth") <= width  # nothing is cut off
    assert set(page.problems) == {"Failed to load resource: the server responded with a status of 401 (Unauthorized)"}


@needs_chromium
def test_filters_errors_and_keys(page: Page, url: str, service: ToyService) -> None:
    page.open(url, 1280)
    page.run("sessionStorage.clear()")
    page.open(url, 1280)
    page.wait("!document.querySelector('#token-form').hidden")
    page.type("wrong")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('#token-form h2').innerText.includes('does not accept')")
    enter_token(page)
    assert page.run("[...document.querySelectorAll('input')].every((each) => each.labels.length === 1)")

    page.run("document.querySelector('#query').focus()")  # from here on with keys alone
    page.type("blue soap")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelectorAll('#found li').length > 0")
    for _ in range(4):  # the button Search; the title, semantic ID, and Add of the first item
        page.press("Tab", 9)
    assert page.run("document.activeElement.innerText") == "Add"
    assert page.run("document.activeElement.getAttribute('aria-label')").startswith("Add blue soap")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelectorAll('#chosen li').length === 1")

    page.run("document.querySelector('details').open = true")
    page.run("document.querySelector('[name=category]').focus()")
    page.type("kinds 1")
    page.press("Enter", 13, "\r")
    page.wait("!document.querySelector('#error').hidden")
    assert "no item is in 'kinds 1'; similar: kind" in page.texts("#error")[0]
    page.run("document.querySelector('[name=category]').value = 'Kind 1'")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('#error').hidden")
    page.wait("[...document.querySelectorAll('#results .open')].every((each) => each.innerText.startsWith('blue'))")
    page.click("#token-change")
    page.wait("!document.querySelector('#token-form').hidden && document.querySelector('#main').hidden")


@needs_chromium
def test_only_the_last_answer_counts(page: Page, url: str) -> None:
    """Answers and errors that a later request of the same kind has overtaken neither draw nor hide its error."""
    page.open(url, 1280)
    page.run("sessionStorage.clear()")
    page.open(url, 1280)
    enter_token(page)
    page.run("""(() => {
        const send = window.fetch;
        window.held = [];
        window.fetch = (path, options) => {
            if (path !== 'recommend') return send(path, options);
            return new Promise((done) => held.push(() => send(path, options).then(done)));
        };
    })()""")
    shown = page.texts("#results .open")
    for category in ("", "kinds 1", "", "Kind 1"):  # of these, the service refuses the second
        page.run(f"document.querySelector('[name=category]').value = '{category}'")
        page.run("document.querySelector('#options').requestSubmit()")
    page.wait("held.length === 4")

    def answer(number: int) -> None:
        page.run(f"held[{number}]()")
        page.run("new Promise((done) => setTimeout(done, 200))")  # nothing shows that an answer was left unused

    answer(1)
    assert page.run("document.querySelector('#error').hidden")
    answer(2)
    assert page.texts("#results .open") == shown
    answer(3)
    page.wait("[...document.querySelectorAll('#results .open')].every((each) => each.innerText.startsWith('blue'))")

    page.run("document.querySelector('[name=category]').value = 'kinds 1'")
    page.run("document.querySelector('#options').requestSubmit()")
    page.wait("held.length === 5")
    answer(4)
    page.wait("!document.querySelector('#error').hidden")
    answer(0)
    assert "no item is in 'kinds 1'" in page.texts("#error")[0]
    assert all(title.startswith("blue") for title in page.texts("#results .open"))


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colors_have_contrast() -> None:
    """4.5 to 1 for text in both color schemes, as WCAG 2 AA asks."""
    style = (Path(__file__).parents[2] / "tiger/serving/page/style.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--([\w-]+): (#\w+)", scheme))
        pairs = [(front, back) for front in ("text", "soft", "accent", "bad", "good") for back in ("ground", "card")]
        for front, back in [*pairs, ("on-accent", "accent"), ("text", "code"), ("accent", "code")]:
            bright, dark = sorted((luminance(colors[front]), luminance(colors[back])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (front, back)
