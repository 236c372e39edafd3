"""The page to try a server with: what it may load, and, in a browser, that its users get their scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Tab, browsing, find_browser
from PIL import Image
from serving import Server, serving

Photo = Callable[..., Path]
HOSTILE = "<img src=x onerror=document.title='run'>.png"
DONE = "document.querySelector('[role=status]').textContent.includes('scored')"
ROWS = "[...document.querySelectorAll('#rows li')]"


@pytest.fixture(scope="module")
def server(shared_bundle: Path) -> Iterator[Server]:
    with serving(shared_bundle) as running:
        yield running


def test_only_what_is_in_the_page_may_run(server: Server) -> None:
    answer = server.request("GET", "/")
    assert answer.status == 200
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for rule in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules[rule])
    assert b"//" not in re.sub(rb"^\s*// .*$", b"", answer.body, flags=re.MULTILINE)  # no address of another host


def test_the_page_names_bundle_backend_and_scale(server: Server) -> None:
    page = server.request("GET", "/").body.decode()
    assert "{{" not in page
    bundle = server.score(b"text").json["bundle"]
    assert f'<code id="bundle">tiny fp32, {bundle}</code>' in page
    assert '<code id="backend">onnxruntime-cpu</code>' in page
    assert 'data-minimum="1" data-maximum="5"' in page


@pytest.fixture(scope="module")
def program() -> str:
    found = find_browser()
    if found is None:
        pytest.skip("needs Chromium")
    return found


@pytest.fixture
def tab(program: str, server: Server, tmp_path: Path) -> Iterator[Tab]:
    with browsing(program, tmp_path / "profile") as opened:
        opened.open(server.url + "/")
        yield opened


@pytest.fixture
def files(photo: Photo, tmp_path: Path) -> list[Path]:
    """Photographs, one of them with a hostile name, beside a file that is none and one without a finite score."""
    (tmp_path / "notes.jpg").write_text("text")
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    good = [photo(name, seed=seed) for seed, name in enumerate(("a.png", "b.jpg", "c.webp", HOSTILE))]
    return [*good, tmp_path / "notes.jpg", tmp_path / "black.png"]


@pytest.mark.slow
def test_photographs_come_sorted_with_thumbnail_or_reason(server: Server, tab: Tab, files: list[Path]) -> None:
    tab.choose("#files", *files)
    tab.wait_for(DONE)
    names = tab.evaluate(f"{ROWS}.map(row => row.querySelector('.name').textContent)")
    expected = {file.name: server.score(file.read_bytes()).json["results"][0] for file in files}
    scored = [name for name in names if expected[name]["score"] is not None]
    assert names[:4] == scored == sorted(scored, key=lambda name: -expected[name]["score"])
    shown = tab.evaluate(f"{ROWS}.slice(0, 4).map(row => row.querySelector('.score').textContent)")
    assert shown == [f"{expected[name]['score']:.2f}" for name in scored]
    reasons = tab.evaluate(f"{ROWS}.slice(4).map(row => row.querySelector('.reason').textContent)")
    assert reasons == [expected[name]["reason"] for name in names[4:]]
    assert all(reasons)
    tab.wait_for("document.querySelectorAll('#rows canvas').length === 5")
    tab.wait_for("document.querySelector('#rows').textContent.includes('no preview')")
    assert tab.evaluate("document.querySelector('[role=status]').textContent") == (
        "6 photographs: 4 scored, 2 without a score"
    )
    assert {*tab.requests} == {server.url + "/", server.url + "/score"}
    assert [text for text in tab.problems if "422" not in text] == []  # the answer to one image without a score


@pytest.mark.slow
def test_photographs_can_be_dropped_anywhere_on_the_page(tab: Tab) -> None:
    tab.evaluate(
        """
        const dropped = new DataTransfer();
        dropped.items.add(new File(["text"], "dropped.txt"));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
        """
    )
    tab.wait_for(DONE)
    assert "not an image" in tab.evaluate(f"{ROWS}[0].textContent")


@pytest.mark.slow
def test_what_gets_into_the_page_does_not_run(tab: Tab, files: list[Path]) -> None:
    tab.choose("#files", *files)
    tab.wait_for(DONE)
    assert tab.evaluate(f"{ROWS}.some(row => row.querySelector('.name').textContent.startsWith('<img src=x'))")
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=\"document.title='run'\">`)")
    tab.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: \"document.title='run'\"}))"
    )
    tab.wait_for("new Promise(done => setTimeout(() => done(true), 300))")
    assert tab.evaluate("document.title") == "MD-Net: tiny fp32"
    assert any("Content Security Policy" in text for text in tab.problems)


@pytest.mark.slow
def test_the_keyboard_reaches_everything_in_order(tab: Tab, files: list[Path]) -> None:
    tab.choose("#files", *files[:2])
    tab.wait_for(DONE)
    reached = []
    for _ in range(3):
        tab.press("Tab", 9)
        reached.append(tab.evaluate("document.activeElement.id"))
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == ["files", "order", "clear"]
    tab.press("Enter", 13, text="\r")
    assert tab.evaluate(f"{ROWS}.length") == 0
    assert tab.evaluate("document.activeElement.id") == "files"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_phone_shows_it_whole_in_light_and_dark(tab: Tab, files: list[Path], mode: str) -> None:
    tab.call("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=2, mobile=True)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
    tab.choose("#files", *files)
    tab.wait_for(DONE)
    assert tab.evaluate("document.documentElement.scrollWidth") == 320
    contrast = tab.evaluate(CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast  # WCAG 2, level AA


CONTRAST = """
(() => {
  const light = (colour) => {
    const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/\\d+/g).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  return Object.fromEntries(["body", ".muted", ".warn", ".failed .reason", ".score"].map((selector) => {
    const text = light(getComputedStyle(document.querySelector(selector)).color);
    return [selector, (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05)];
  }));
})()
"""
