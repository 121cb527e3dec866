"""How every figure looks: one colour, marker and name a method, and the shared pieces."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE_COLOUR = "#7f7f7f"
BON_COLOUR = "#d55e00"
DPI = 150


class Look(NamedTuple):
    """How a method appears: the name a reader sees, its colour, its marker."""

    name: str
    colour: str
    marker: str


# Okabe and Ito's palette, which colour-blind eyes can tell apart, without its yellow (too faint on
# white; a dark red of Paul Tol's stands in). The marker tells the methods apart as well.
LOOKS = {
    "reference": Look("reference", REFERENCE_COLOUR, "x"),
    "bon": Look("BoN", BON_COLOUR, "."),
    "vbon": Look("vBoN", "#0072b2", "o"),
    "lower_bound": Look("vBoN, bound L", "#882255", "P"),
    "ppo": Look("PPO", "#009e73", "s"),
    "dpo": Look("DPO", "#cc79a7", "^"),
    "bonbon": Look("BoNBoN", "#e69f00", "D"),
    "bond": Look("BOND", "#56b4e9", "v"),
    "bon_sft": Look("BoN-SFT", "#1a1a1a", "X"),
}
_SPARE = (("#117733", "<"), ("#999933", ">"), ("#aa4499", "p"), ("#332288", "h"))


def method_name(method: str) -> str:
    """The name a reader sees; a method that has no `Look` keeps its own."""
    return LOOKS[method].name if method in LOOKS else method


def method_looks(methods: Collection[str]) -> dict[str, Look]:
    """The look of each method, in the order of the legends; those not known here come last, by
    name, with spare colours."""
    others = sorted(set(methods) - set(LOOKS))
    spare = {m: Look(m, *_SPARE[at % len(_SPARE)]) for at, m in enumerate(others)}
    present = set(methods)
    return {m: look for m, look in (LOOKS | spare).items() if m in present}


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, outside pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", workdir: Path, name: str) -> Path:
    """Writes ``figures/<name>.png`` below the workdir."""
    path = Path(workdir) / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=figure.dpi)
    return path


def dress(ax: "Axes", title: str, xlabel: str, ylabel: str) -> None:
    """Titles, a faint grid, and no frame at the top and right."""
    ax.set_title(title, fontsize=11, loc="left")
    ax.set_xlabel(xlabel, fontsize=9.5)
    ax.set_ylabel(ylabel, fontsize=9.5)
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
