"""Labels of points in a figure, put where they hide nothing."""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Where a label may stand around its point: points of type to its edge, and degrees.
RADII = (9, 14, 22, 32, 44, 58, 74)
ANGLES = (-45, 0, 45, 90, 135, 180, 225, 270, -22, 22, 158, 202)
LEADER = 14  # further off, a line joins the two

Text = tuple[list[np.ndarray], str, str, float]  # points, label, color, size


def place(figure: "Figure", ax: "Axes", texts: list[Text], obstacles: np.ndarray) -> None:
    """Writes each label at the nearest free place around one of its points.

    Free means inside the axes, off the obstacles, off the points of all labels and off the labels
    written before. Where no place is free, the one that hides least is taken. A thin leader line
    joins a label that is not right beside its point.

    Args:
        figure: The figure of the axes; its layout is settled here and does not change later.
        ax: Where to write.
        texts: Points in data coordinates, label, color and font size of each.
        obstacles: Points [k, 2] in data coordinates that no label may cover.
    """
    from matplotlib.transforms import Bbox

    figure.canvas.draw()  # settles the layout, so that text can be measured
    figure.set_layout_engine("none")
    pixels = figure.dpi / 72  # a point of type
    frame = ax.get_window_extent()
    marks = ax.transData.transform(np.concatenate([obstacles, *(text[0] for text in texts)]))
    taken: list[Any] = []

    def hidden(box: Any) -> float:
        inside = np.all((marks > box.min) & (marks < box.max), axis=1).sum()
        outside = not (frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0
                       and box.y1 < frame.y1)  # fmt: skip
        return inside + 50 * sum(box.overlaps(other) for other in taken) + 1000 * outside

    for points, label, color, size in texts:
        probe = ax.text(0, 0, label, fontsize=size)
        extent = np.array(probe.get_window_extent().size)
        probe.remove()
        trials = []
        for radius, at, angle in itertools.product(RADII, ax.transData.transform(points), ANGLES):
            # The radius is to the label's edge, so its centre lies half an extent further on.
            towards = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
            centre = at + towards * (radius * pixels + extent / 2)
            box = Bbox([centre - extent / 2, centre + extent / 2]).padded(2 * pixels)
            trials.append((hidden(box), radius, at, centre, box))
            if trials[-1][0] == 0:
                break
        _, radius, at, centre, box = min(trials, key=lambda trial: trial[0])
        taken.append(box)
        ax.annotate(
            label, tuple(ax.transData.inverted().transform(at)), xytext=(centre - at) / pixels,
            textcoords="offset points", fontsize=size, color=color, ha="center", va="center",
            zorder=5, arrowprops={"arrowstyle": "-", "color": color, "lw": 0.7}
            if radius > LEADER else None,
        )  # fmt: skip
