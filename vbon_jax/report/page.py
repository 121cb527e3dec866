"""The pieces of the page, as plain data, and the templates that make HTML of them.

Each piece names its template in ``templates/``, which is given the piece as ``block``. Jinja
escapes every text, and every image is inside the page.
"""

import base64
import dataclasses
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

import jinja2

from vbon_jax.report.table import Table

TEMPLATES = Path(__file__).with_name("templates")
COMMAND = "vbon {} --config=CONFIG --workdir=DIR"


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A paragraph of text.

    Attributes:
        text: The text.
        kind: Its CSS class; may be empty.
    """

    template: ClassVar[str] = "paragraph.html"
    text: str
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading within a section.

    Attributes:
        text: The heading.
    """

    template: ClassVar[str] = "heading.html"
    text: str


@dataclasses.dataclass(frozen=True)
class Items:
    """A list of sentences.

    Attributes:
        texts: The sentences.
    """

    template: ClassVar[str] = "items.html"
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tables:
    """Tables below each other, each in a box of its own that scrolls sideways.

    Attributes:
        tables: The tables, one or more.
    """

    template: ClassVar[str] = "tables.html"
    tables: tuple[Table, ...]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG file.

    Attributes:
        path: The file.
        alt: What the picture shows, for those who cannot see it.
        caption: The text below the picture.
    """

    path: Path
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        picture = base64.b64encode(self.path.read_bytes()).decode("ascii")
        return f"data:image/png;base64,{picture}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, so that the page does not move when the picture loads."""
        with self.path.open("rb") as file:
            width, height = struct.unpack(">II", file.read(24)[16:])  # of the PNG's header
        return width, height


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures, next to each other where the screen is wide enough.

    Attributes:
        figures: The figures, one or more.
        wide: Whether each takes the full width instead. On a narrow screen such a figure scrolls in
            its card, as shrinking would make it unreadable.
    """

    template: ClassVar[str] = "figures.html"
    figures: tuple[Figure, ...]
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Code:
    """Text in a fixed-width font.

    Attributes:
        text: The text.
        label: What it is, for those who cannot see it.
    """

    template: ClassVar[str] = "code.html"
    text: str
    label: str


@dataclasses.dataclass(frozen=True)
class Folded:
    """A piece that is folded away until asked for.

    Attributes:
        summary: What is folded away.
        block: The piece.
    """

    template: ClassVar[str] = "folded.html"
    summary: str
    block: "Block"


Block = Paragraph | Heading | Items | Tables | Figures | Code | Folded


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page that has something to show.

    Attributes:
        anchor: Its id in links.
        title: Its heading.
        blocks: Its content, in order.
    """

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Missing:
    """A part of the page that has nothing to show.

    Attributes:
        what: What was not run, or what is not there.
        stage: The stage that makes it.
    """

    what: str
    stage: str

    @property
    def command(self) -> str:
        """The command that makes it."""
        return COMMAND.format(self.stage)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(
    title: str, summary: str, sections: Sequence[Section], missing: Sequence[Missing] = ()
) -> str:
    """Renders the whole page.

    Args:
        title: The title.
        summary: The paragraph below the title.
        sections: The sections in order, which the table of contents links to.
        missing: What was not run, in one line at the end; entries that repeat are shown once.

    Returns:
        The HTML of the page, which refers to nothing outside itself.
    """
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            summary=summary,
            sections=sections,
            missing=list(dict.fromkeys(missing)),
        )
    )
