"""HTML pieces: escaped, self-contained, and well-formed to a parser that this project did not write."""

import base64
import re
from html.parser import HTMLParser

import pytest

from calsmooth import page
from calsmooth.plots import new_figure


class Checker(HTMLParser):
    """Collects what a browser would fetch, and fails on tags that don't match."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        assert tag != "script"
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def document():
    figure, (ax,) = new_figure(2, 2)
    ax.plot([0, 1])
    return page.page(
        'A <b> & "title"',
        "below",
        page.section("S", page.table(["a", "b"], [["<i>", "1"], ["y", "2"]], bold=[(1, 1)], caption="c")),
        page.picture(figure, 'words "quoted"'),
        page.folded("more", page.facts({"k": "<v>"}), page.verbatim("x < y")),
        page.bullets(["<script>alert(1)</script>"]),
    )


def test_a_page_fetches_nothing_but_its_own_pictures(document):
    checker = parse(document)
    assert [source.split(",")[0] for source in checker.fetched] == ["data:image/svg+xml;base64"]
    svg = base64.b64decode(checker.fetched[0].split(",")[1])
    assert svg.startswith(b"<?xml")
    assert not re.search(rb'(?:href|src)="https?:', svg)
    assert "url(" not in document
    assert "default-src 'none'" in document


def test_everything_given_is_escaped(document):
    text = parse(document).text
    for words in ('A <b> & "title"', "<i>", "<v>", "x < y", "<script>alert(1)</script>"):
        assert words in text


def test_bold_groups_and_alignment():
    html = page.table(["run", "x", "y"], [["a", "1", "2"]], bold=[(0, 2)], groups=[("", 1), ("task", 2)])
    assert '<td class="left">a</td><td>1</td><td><b>2</b></td>' in html
    assert '<th class="group" colspan="2">task</th>' in html
    assert page.bullets([]) == ""


def test_the_same_page_has_the_same_bytes(document):
    figure, (ax,) = new_figure(2, 2)
    ax.plot([0, 1])
    assert page.picture(figure, 'words "quoted"') in document
