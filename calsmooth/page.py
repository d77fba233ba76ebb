"""Self-contained HTML pages: one file with its pictures inside, no script and no request to anywhere.

Every function returns a piece of HTML as text, and escapes what it is given. `page` puts pieces together, with a style
that follows the reader's light or dark setting.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from calsmooth.plots import Reliability, figure_bytes, plot_reliability_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #626b77; --line: #dfe3e8; --back: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6ea; --soft: #98a2ae; --line: #343a42; --back: #14171b; --card: #1c2026; }
  figure img { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 48rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
figcaption { max-width: 48rem; }
ul { margin: .5rem 0; padding-left: 1.2rem; max-width: 56rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .32rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
.left { text-align: left; }
.left ~ .left { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
th:first-child, td:first-child { padding-left: 0; }
td b { font-weight: 700; }
.group { text-align: center; border-bottom: 0; color: var(--ink); }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.pictures { display: flex; flex-wrap: wrap; align-items: flex-end; gap: .8rem 1.2rem; margin: 1rem 0; }
.pictures figure { margin: 0; max-width: 100%; }
.verdicts { list-style: none; padding: .8rem 1.1rem; margin: 1.2rem 0 0; max-width: none; background: var(--card);
  border-left: 4px solid var(--soft); border-radius: 4px; }
.verdicts li { margin: .3rem 0; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  body { padding: 1.2rem .9rem 3rem; }
  .scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--back);
    white-space: normal; min-width: 6rem; max-width: 9rem; }
  .left ~ .left { min-width: 10rem; }
  th, td { padding: .32rem .55rem; }
}
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto;
  font-size: .85rem; line-height: 1.45; }
"""


def page(title: str, subtitle: str, *pieces: str) -> str:
    """A whole document. Its policy forbids the browser to load anything from anywhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="soft">{escape(subtitle)}</p>
"""
    return head + "\n".join(pieces) + "\n</body>\n</html>\n"


def section(heading: str, *pieces: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(pieces) + "\n</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int = 1,
    bold: Iterable[tuple[int, int]] = (),
    groups: Sequence[tuple[str, int]] = (),
    caption: str = "",
) -> str:
    """Cells are text; the first `left` columns are words and aligned left, the others numbers.

    bold: (row, column) places that stand out. groups: (words, number of columns) of a heading above the headings.
    """
    outstanding = set(bold)

    def cell(tag: str, column: int, content: str) -> str:
        return f'<{tag} class="left">{content}</{tag}>' if column < left else f"<{tag}>{content}</{tag}>"

    body = ""
    for r, row in enumerate(rows):
        contents = (f"<b>{escape(text)}</b>" if (r, c) in outstanding else escape(text) for c, text in enumerate(row))
        body += "<tr>" + "".join(cell("td", c, content) for c, content in enumerate(contents)) + "</tr>\n"
    above = "".join(f'<th class="group" colspan="{span}">{escape(words)}</th>' for words, span in groups)
    head = f"<tr>{above}</tr>\n" if above else ""
    if any(headings):
        head += "<tr>" + "".join(cell("th", c, escape(h)) for c, h in enumerate(headings)) + "</tr>"
    # Not a <caption>, which is as wide as the table and would be scrolled out of sight with it.
    below = f'\n<p class="soft">{escape(caption)}</p>' if caption else ""
    scrolled = f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{scrolled}</div>{below}'


def facts(values: Mapping[str, Any]) -> str:
    """Names and what they are, one to a line."""
    return table((), [(name, str(value)) for name, value in values.items()], left=2)


def picture(figure: "Figure", words: str, caption: str = "") -> str:
    """A figure as a vector picture inside the page; `words` say to those who don't see it what it shows."""
    data = base64.b64encode(figure_bytes(figure, "svg")).decode("ascii")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">{below}</figure>'


def pictures(figures: Iterable[tuple["Figure", str]], caption: str = "") -> str:
    """Figures with their words side by side, as many as the window is wide enough for; on a phone one below the other.

    Each should be narrow enough (about 3.6 inches) to be shown there in its own size.
    """
    below = f'<p class="soft">{escape(caption)}</p>' if caption else ""
    return '<div class="pictures">' + "".join(picture(figure, words) for figure, words in figures) + f"</div>{below}"


def reliability(panels: Sequence[Reliability]) -> str:
    """Reliability diagrams, one a panel, with equal axes."""
    key, *diagrams = plot_reliability_apart(panels)
    words = (f"reliability diagram of {panel.title}: accuracy against confidence" for panel in panels)
    return pictures([(key, "what the marks of the diagrams mean")]) + pictures(zip(diagrams, words, strict=True))


def verdicts(lines: Iterable[tuple[str, str]]) -> str:
    """What a page comes to, to be read before anything else: (subject, what is to be said of it) a line."""
    items = "".join(f"<li><b>{escape(subject)}</b>: {escape(words)}.</li>" for subject, words in lines)
    return f'<ul class="verdicts">{items}</ul>'


def folded(summary: str, *pieces: str) -> str:
    """Pieces that show once the reader asks for them."""
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(pieces) + "\n</details>"


def verbatim(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
