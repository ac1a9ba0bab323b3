"""A table of accuracies as a picture."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 2
"""Drawn at this multiple of the size and shrunk: Pillow's lines are not smooth."""
CELL, LEFT, TOP, BOTTOM, RIGHT = (64, 36), 76, 48, 48, 20
COLORS = np.array([(52, 40, 95), (43, 94, 140), (38, 145, 140), (104, 193, 99), (250, 230, 70)], np.float64)
"""From the lowest value to the highest; lightness rises evenly."""


class Panel(NamedTuple):
    """One table.

    Attributes:
      title: above it.
      values: [rows, columns], in 0..1.
    """

    title: str
    values: np.ndarray


def color(value: float, low: float, high: float) -> tuple[int, int, int]:
    """The colour of a value between `low` and `high`."""
    place = np.clip((value - low) / max(high - low, 1e-9), 0.0, 1.0) * (len(COLORS) - 1)
    index = min(int(place), len(COLORS) - 2)
    mixed = COLORS[index] + (place - index) * (COLORS[index + 1] - COLORS[index])
    return tuple(int(round(v)) for v in mixed)


def heat_map(panels: Sequence[Panel], rows: Sequence[str], columns: Sequence[str], row_title: str, column_title: str):
    """Panels side by side with one scale of colours; every cell says its value in percent.

    Args:
      panels: tables of one shape.
      rows, columns: what they are called; the first row is at the bottom.
      row_title, column_title: what rows and columns are.

    Returns:
      uint8 [height, width, 3].
    """
    width, height = LEFT + CELL[0] * len(columns) + RIGHT, TOP + CELL[1] * len(rows) + BOTTOM
    image = Image.new("RGB", (width * len(panels) * SCALE, height * SCALE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12 * SCALE)
    values = np.stack([panel.values for panel in panels])
    low, high = float(values.min()), float(values.max())

    def text(x, y, words, anchor, fill="black"):
        draw.text((x * SCALE, y * SCALE), words, fill, font, anchor=anchor)

    for i, panel in enumerate(panels):
        left = i * width + LEFT
        centre = left + CELL[0] * len(columns) / 2
        text(centre, TOP - 12, panel.title, "mb")
        text(centre, height - 8, column_title, "mb")
        text(i * width + 8, TOP - 12, row_title, "lb")
        for column, name in enumerate(columns):
            text(left + CELL[0] * (column + 0.5), TOP + CELL[1] * len(rows) + 6, name, "mt")
        for row, name in enumerate(rows):
            y = TOP + CELL[1] * (len(rows) - 1 - row)
            text(left - 8, y + CELL[1] / 2, name, "rm")
            for column, value in enumerate(panel.values[row]):
                x, fill = left + CELL[0] * column, color(value, low, high)
                box = (x, y, x + CELL[0] - 1, y + CELL[1] - 1)
                draw.rectangle([SCALE * side for side in box], fill=fill)
                dark = np.dot(fill, (0.3, 0.59, 0.11)) < 140
                text(x + CELL[0] / 2, y + CELL[1] / 2, f"{100 * value:.1f}", "mm", "white" if dark else "black")
    return np.asarray(image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS))
