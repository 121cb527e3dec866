"""How every figure looks: one color, marker and name per method, and the shared pieces.

The reference and best-of-n look the same in every run and have their looks here. The looks of
fine-tuned methods are passed in by the caller, as a mapping from the method's label in the result
files to a `Look`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vbon_jax.errors import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE_COLOR = "#7f7f7f"
BON_COLOR = "#d55e00"
FIRST_COLOR = "#0072b2"  # of the lines of a training panel
SECOND_COLOR = "#009e73"  # the other line of a training panel
DPI = 150


class Look(Protocol):
    """How a method appears in figures and tables; any object with these attributes will do."""

    @property
    def name(self) -> str:
        """The name a reader sees, such as "vBoN"."""

    @property
    def color(self) -> str:
        """A matplotlib color, such as "#0072b2"."""

    @property
    def marker(self) -> str:
        """A matplotlib marker, such as "o"."""

    @property
    def in_front(self) -> bool:
        """Whether the method is drawn in the main Pareto figure (Figure 2 of the paper)."""


Looks = Mapping[str, Look]


class FixedLook(NamedTuple):
    """The look of a policy that is no registered method; see `Look` for the attributes."""

    name: str
    color: str
    marker: str
    in_front: bool = True


FIXED_LOOKS: dict[str, Look] = {
    "reference": FixedLook("reference", REFERENCE_COLOR, "x", in_front=False),
    "bon": FixedLook("BoN", BON_COLOR, ".", in_front=False),
}
# For labels that have no look, such as those of a method that has been removed since.
_SPARE = (("#117733", "<"), ("#999933", ">"), ("#aa4499", "p"), ("#332288", "h"))


def _known(looks: Looks) -> dict[str, Look]:
    return FIXED_LOOKS | {label: look for label, look in looks.items() if label not in FIXED_LOOKS}


def method_name(method: str, looks: Looks) -> str:
    """Returns the name a reader sees for a method.

    Args:
        method: The method's label in the result files.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The name of the method's look; the label itself where it has none.
    """
    known = _known(looks)
    return known[method].name if method in known else method


def method_looks(methods: Collection[str], looks: Looks) -> dict[str, Look]:
    """Returns the look of each method, in the order of the legends.

    Args:
        methods: Labels as the result files have them, in any order, repeats allowed.
        looks: The looks of the fine-tuned methods, by label; its order is the legends'.

    Returns:
        The looks by label: reference and best-of-n first, then the methods of ``looks`` in its
        order, then labels that it lacks, by name, with spare colors.
    """
    known = _known(looks)
    others = sorted(set(methods) - set(known))
    spare = {m: FixedLook(m, *_SPARE[at % len(_SPARE)]) for at, m in enumerate(others)}
    present = set(methods)
    return {m: look for m, look in (known | spare).items() if m in present}


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure outside pyplot's global state.

    Args:
        width: Width in inches.
        height: Height in inches.

    Returns:
        A figure of `DPI` dots per inch with a constrained layout.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", workdir: Path, name: str) -> Path:
    """Writes a figure to ``figures/<name>.png`` in the workdir.

    Args:
        figure: What to write.
        workdir: The folder of the run.
        name: The file's name without its ending.

    Returns:
        The path of the file.
    """
    path = Path(workdir) / "figures" / f"{name}.png"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=figure.dpi)
    return path


def dress(ax: "Axes", title: str, xlabel: str, ylabel: str) -> None:
    """Sets titles and a faint grid, and removes the frame at the top and right.

    Args:
        ax: The axes to change.
        title: The title, aligned left.
        xlabel: The label of the horizontal axis.
        ylabel: The label of the vertical axis.
    """
    ax.set_title(title, fontsize=11, loc="left")
    ax.set_xlabel(xlabel, fontsize=9.5)
    ax.set_ylabel(ylabel, fontsize=9.5)
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
