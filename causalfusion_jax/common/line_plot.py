"""Scores as lines: a panel for each score, with Pillow alone."""

import math
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

Scores = Mapping[int, Mapping[str, float]]
"""By place on the x axis, then by name."""

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
WIDTH, HEIGHT, KEY_HEIGHT = 460, 320, 20
"""Pixels of a panel, and of a line of the key."""
SCALE = 2
"""Drawn larger by this and shrunk: Pillow's lines are not smooth."""


def line_plot(lines: Mapping[str, Scores], names: Sequence[str], places: Sequence[int], x_name: str) -> Image.Image:
    """Draws a panel for each score and a line for each of `lines`; keyed below, in their order.

    Args:
      lines: what is drawn, by name.
      names: of the scores.
      places: on the x axis, ascending.
      x_name: what they are.
    """
    size = (WIDTH * len(names), HEIGHT + KEY_HEIGHT * len(lines) + 16)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12 * SCALE)
    for i, name in enumerate(names):
        box = tuple(SCALE * v for v in (i * WIDTH + 60, 30, (i + 1) * WIDTH - 20, HEIGHT - 40))
        values = [[of_line.get(place, {}).get(name) for place in places] for of_line in lines.values()]
        _panel(draw, font, box, name, values)
        _x_axis(draw, font, box, places, x_name)
    for i, line in enumerate(lines):
        y = SCALE * (HEIGHT + KEY_HEIGHT * i + 8)
        draw.line((20 * SCALE, y, 44 * SCALE, y), COLORS[i % len(COLORS)], 2 * SCALE)
        draw.text((52 * SCALE, y), line, "black", font, anchor="lm")
    return image.resize(size, Image.Resampling.LANCZOS)


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers from low to high."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = unit * max(factor for factor in (1, 2, 5) if unit * factor <= (high - low) / 3)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _column(box, index: int, count: int) -> float:
    """Middle of one of `count` columns of the panel."""
    return box[0] + (box[2] - box[0]) * (index + 0.5) / count


def _x_axis(draw, font, box, places: Sequence[int], x_name: str) -> None:
    left, _, right, bottom = box
    draw.text(((left + right) / 2, bottom + 36), x_name, "black", font, anchor="mt")
    for i, place in enumerate(places):
        draw.text((_column(box, i, len(places)), bottom + 8), str(place), "black", font, anchor="mt")


def _measured(values: Sequence[float | None]) -> Iterator[tuple[int, float]]:
    """Those that were measured, with their indices."""
    return ((i, value) for i, value in enumerate(values) if value is not None and math.isfinite(value))


def _panel(draw, font, box, name: str, lines: Sequence[Sequence[float | None]]) -> None:
    """One score: frame, y axis, and a line for each of `lines`, whose values are by place."""
    left, top, right, bottom = box
    found = [value for values in lines for _, value in _measured(values)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    margin = 0.08 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def y_of(value):
        return bottom - (bottom - top) * (value - low) / (high - low)

    for value in _ticks(low, high):
        draw.line((left, y_of(value), right, y_of(value)), "#e0e0e0", 2)
        draw.text((left - 8, y_of(value)), f"{value:.4g}", "black", font, anchor="rm")
    draw.rectangle(box, outline="black", width=2)
    draw.text(((left + right) / 2, top - 8), name, "black", font, anchor="mb")
    for i, values in enumerate(lines):
        color = COLORS[i % len(COLORS)]
        # At a single place, the lines stand side by side.
        columns = (lambda _, i=i: (i, len(lines))) if len(values) == 1 else (lambda j, v=values: (j, len(v)))
        points = [(_column(box, *columns(j)), y_of(value)) for j, value in _measured(values)]
        draw.line(points, color, 4, joint="curve")
        for x, y in points:
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=color)
