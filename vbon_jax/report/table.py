"""A table, and its three renderings: on the screen (rich), as Markdown, and on the HTML page.

Every table of the project is a `Table` of plain texts. ``Console().print(table)`` shows it on the
screen, `markdown` turns it into Markdown, and ``templates/table.html`` puts it on the page.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import rich.table
    from rich.console import Console, ConsoleOptions, RenderableType


@dataclasses.dataclass(frozen=True)
class Column:
    r"""A column of a `Table`.

    Attributes:
        title: The heading; "\n" where the page may break it into lines.
        align: "right" for numbers, "left" for text. Only text is ever wrapped.
        narrow: The heading on the screen, with "\n" where it breaks; empty for ``title``.
    """

    title: str
    align: Literal["left", "right"] = "right"
    narrow: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of plain texts, none of them markup of any kind.

    Attributes:
        columns: The columns, in order.
        rows: The cells of each row, as many as there are columns.
        title: A short title, shown on the screen.
        caption: What the numbers are, shown on the page; empty for ``title``.
        row_heads: How many columns at the start name the row. They are repeated where a table that
            is too wide for the screen is split.
        rules: Places of rows before which a new group starts.
        strong: Places of rows that stand out.
        kind: The CSS class of the table on the page; may be empty.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    caption: str = ""
    row_heads: int = 1
    rules: tuple[int, ...] = ()
    strong: tuple[int, ...] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        """Checks the rows.

        Raises:
            ValueError: A row has another number of cells than there are columns.
        """
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {row} has {len(row)} cells for {len(self.columns)} columns")

    def __rich_console__(
        self, console: "Console", options: "ConsoleOptions"
    ) -> "Iterator[RenderableType]":
        """Renders the table for the screen.

        Columns are set closer, and then those that do not fit are continued below with the row
        heads repeated, so that no number is ever broken over two lines.

        Args:
            console: The console that prints.
            options: Its options; the table takes at most ``options.max_width`` characters a line.

        Yields:
            The title and one rich table for each group of columns.
        """
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="italic")
        gap, groups = column_groups(self._widths(), self.row_heads, options.max_width)
        for group in groups:
            yield self._rich(group, gap)
            yield Text("")  # sets it off from what is printed next

    def _widths(self) -> list[int]:
        """The characters that each column takes on the screen."""
        from rich.cells import cell_len

        columns = zip(self.columns, zip(*self.rows) if self.rows else [()] * len(self.columns))
        return [
            max(cell_len(line) for text in (c.narrow or c.title, *cells) for line in lines(text))
            for c, cells in columns
        ]

    def _rich(self, group: Sequence[int], gap: int) -> "rich.table.Table":
        import rich.table
        from rich import box
        from rich.text import Text

        shown = rich.table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        shown.padding = (0, gap - 1, 0, 0)  # the box itself puts one space between columns
        for at in group:
            column = self.columns[at]
            text = column.align == "left"
            shown.add_column(
                Text(column.narrow or column.title), justify=column.align, vertical="top",
                no_wrap=not text, overflow="fold",
            )  # fmt: skip
        for at, row in enumerate(self.rows):
            shown.add_row(
                *(Text(row[column]) for column in group),
                style="bold" if at in self.strong else None,
                end_section=at + 1 in self.rules,
            )
        return shown


def lines(text: str) -> list[str]:
    """Returns the lines of a text; one empty line for an empty text.

    Args:
        text: Any text.

    Returns:
        At least one line.
    """
    return text.splitlines() or [""]


def column_groups(
    widths: Sequence[int], row_heads: int, room: int
) -> tuple[int, list[tuple[int, ...]]]:
    """Divides columns into groups that fit a width, the row heads repeated in each.

    Args:
        widths: The characters that each column takes.
        row_heads: How many columns at the start are part of every group.
        room: The characters of a line.

    Returns:
        The spaces between two columns (2, or 1 where that makes all columns fit), and the places
        of the columns of each group. A column that does not fit beside the row heads alone has a
        group of its own all the same.
    """
    everything = tuple(range(len(widths)))
    for gap in (2, 1):
        if sum(widths) + gap * (len(widths) - 1) <= room:
            return gap, [everything]
    heads = everything[:row_heads]
    groups: list[tuple[int, ...]] = []
    group = heads
    for at in everything[row_heads:]:
        wider = (*group, at)
        if group != heads and sum(widths[i] + 2 for i in wider) - 2 > room:
            groups.append(group)
            wider = (*heads, at)
        group = wider
    return 2, [*groups, group]


def markdown(table: Table) -> str:
    """Returns a table as Markdown, without its title.

    Args:
        table: What to render.

    Returns:
        The lines of the table, each ended by a newline, with characters that Markdown would act on
        escaped.
    """
    titles = (column.title.replace("\n/", "/").replace("\n", " ") for column in table.columns)
    head = [escape_markdown(title) for title in titles]
    rule = ["---" if column.align == "left" else "---:" for column in table.columns]
    cells = [[escape_markdown(cell) for cell in row] for row in table.rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *cells))


def escape_markdown(text: str) -> str:
    """Returns text that a cell of a Markdown table shows as it is.

    Args:
        text: Any text.

    Returns:
        The text with special characters escaped and line ends as ``<br>``.
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    return re.sub(r"\r\n|\r|\n", "<br>", text)
