"""The pieces of a self-contained HTML page: every text escaped, every image inside the page."""

import base64
import html
import struct
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

TEMPLATE = Path(__file__).with_name("report.html")


class Section(NamedTuple):
    """A part of the page.

    ``anchor`` is its id in links, ``body`` its HTML, and ``run`` whether there is a result to show.
    """

    anchor: str
    title: str
    body: str
    run: bool = True


def escape(value: object) -> str:
    """A value as HTML text or attribute: "<", ">", "&" and quotes escaped."""
    return html.escape(str(value), quote=True)


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def items(texts: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>\n" + "\n".join(f"<li>{escape(text)}</li>" for text in texts) + "\n</ul>"


def not_run(why: str, command: str) -> str:
    """Says that a part was not run, why that is known, and the command that runs it."""
    return (f'<p class="absent"><strong>Not run.</strong> {escape(why)} '
            f"Make it with <code>{escape(command)}</code>.</p>")  # fmt: skip


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    left: int = 1,
    kind: str = "",
    caption_kind: str = "",
) -> str:
    """A table of plain texts that scrolls sideways in its own box.

    Args:
      head: the columns' titles, with line ends where they may take several lines.
      rows: as many cells a row; the first is the row's heading.
      caption: says what the numbers are; stands above the box, so that it is never cut.
      left: so many columns are text, aligned left; the others are numbers.
      kind, caption_kind: CSS classes of the table and of its caption.
    """

    def cell(tag: str, at: int, text: str, scope: str = "") -> str:
        text_class = ' class="text"' if at < left else ""
        return f"<{tag}{scope}{text_class}>{escape(text)}</{tag}>"

    top = "".join(cell("th", at, text, ' scope="col"') for at, text in enumerate(head))
    lines = [
        "<tr>"
        + cell("th", 0, row[0], ' scope="row"')
        + "".join(cell("td", at, text) for at, text in enumerate(row[1:], start=1))
        + "</tr>"
        for row in rows
    ]
    return (
        f"<figure><figcaption{_class(caption_kind)}>{escape(caption)}</figcaption>\n"
        '<div class="scroll" role="region" tabindex="0" aria-label="table">\n'
        f"<table{_class(kind)}>\n<thead><tr>{top}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table>\n</div></figure>"
    )


def figure(path: Path, alt: str, caption: str, wide: bool = False) -> str:
    """A PNG file put into the page as a data URI, on a white card.

    Args:
      alt: what the picture shows, for who cannot see it.
      wide: on a narrow screen it scrolls in its card, as shrinking would make it unreadable.
    """
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # of the PNG's header; keeps the page still
    picture = base64.b64encode(data).decode("ascii")
    card = 'class="card wide" tabindex="0"' if wide else 'class="card"'
    return (
        f'<figure><div {card}><img src="data:image/png;base64,{picture}" width="{width}" '
        f'height="{height}" alt="{escape(alt)}"></div>\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def side_by_side(figures: Sequence[str]) -> str:
    """Figures next to each other where the screen is wide enough."""
    return '<div class="figures">\n' + "\n".join(figures) + "\n</div>"


def details(summary: str, body: str) -> str:
    """HTML that is folded away until asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def render(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
      title: plain text.
      summary: HTML below the title.
      sections: in order, linked from the table of contents.
    """
    contents = "\n".join(
        f'<li><a href="#{s.anchor}">{escape(s.title)}</a>'
        + ("" if s.run else ' <span class="none">(not run)</span>')
        + "</li>"
        for s in sections
    )
    body = "\n".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title">\n'
        f'<h2 id="{s.anchor}-title">{escape(s.title)}</h2>\n{s.body}\n</section>'
        for s in sections
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), summary=summary, contents=contents, sections=body
    )
