"""What every produced page must satisfy, whatever the run looked like."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

VOID = {"meta", "br", "hr", "img", "input", "link"}
LOADING = {"src", "href", "data", "action", "poster", "srcset", "xlink:href"}
MAX_BYTES = 3 * 2**20


class Page(HTMLParser):
    """Parses a page, failing on unbalanced tags and on anything loaded from outside."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "img"), f"<{tag}> on the page"
        for name, value in attrs:
            assert not name.startswith("on"), f"event handler {name}"
            if name in LOADING:
                assert (value or "").startswith("#"), f"{name}={value!r} leaves the page"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def images(html: str) -> list[ET.Element]:
    """Return every inline SVG, parsed strictly."""
    return [ET.fromstring(part) for part in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def check(html: str) -> Page:
    """Check a page and return it parsed."""
    page = Page(html)
    assert len(html.encode()) < MAX_BYTES
    assert "url(" not in html
    assert "@import" not in html
    for image in images(html):
        for element in image.iter():
            for name, value in element.attrib.items():
                if name not in ("class", "aria-label"):
                    assert "nan" not in value, f"{name}={value!r}"
                    assert "inf" not in value, f"{name}={value!r}"
    return page
