"""Charts: line plots of scores and heat maps of accuracies, with matplotlib and no display."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from causalfusion_jax.common.pictures import save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scores = Mapping[int, Mapping[str, float]]
"""Scores by x value, then by name."""


def line_chart(lines: Mapping[str, Scores], names: Sequence[str], x_values: Sequence[int], x_label: str) -> "Figure":
    """Draws a panel for each score with a line for each of `lines`; the legend below keeps their order.

    Args:
      lines: scores of each line, by its label. Missing scores and those that are not finite leave a gap.
      names: scores to draw.
      x_values: evenly spaced on the x axis, ascending.
      x_label: label of the x axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(names), 3.4 + 0.2 * len(lines)), layout="constrained")
    positions = np.arange(len(x_values))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.set(title=name, xlabel=x_label)
        center = 0.0 if len(x_values) > 1 else (len(lines) - 1) / 2
        axes.set_xticks(positions + center, [str(x) for x in x_values])
        axes.grid(axis="y", alpha=0.4)
        for i, (label, scores) in enumerate(lines.items()):
            values = np.array([scores.get(x, {}).get(name, np.nan) for x in x_values], np.float64)
            values[~np.isfinite(values)] = np.nan
            # With a single x value the lines are points, drawn side by side.
            shift = 0.0 if len(x_values) > 1 else i
            axes.plot(positions + shift, values, marker="o", markersize=4, label=label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", frameon=False)
    return figure


def heat_map(
    panels: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], *, row_label: str, column_label: str
) -> "Figure":
    """Draws tables side by side on one colour scale, with each value in percent in its cell.

    Args:
      panels: values [rows, columns] in 0..1, by title.
      rows, columns: tick labels; the first row is at the bottom.
      row_label, column_label: labels of the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=((1.0 + 0.64 * len(columns)) * len(panels), 1.0 + 0.36 * len(rows)), layout="constrained")
    low, high = (float(bound(list(panels.values()))) for bound in (np.min, np.max))
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        image = axes.imshow(values, vmin=low, vmax=high, origin="lower", aspect="auto")
        axes.set(title=title, xlabel=column_label, ylabel=row_label)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        for (row, column), value in np.ndenumerate(values):
            red, green, blue, _ = image.to_rgba(value)
            color = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"
            axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=color)
    return figure


def save_chart(path: pathlib.Path, figure: "Figure") -> None:
    """Writes a figure as an RGB PNG, whole or not at all; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(120)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(path, np.asarray(canvas.buffer_rgba())[..., :3])
