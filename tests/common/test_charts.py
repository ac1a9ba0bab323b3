"""Charts: what figures contain, and that their files are reproducible."""

import numpy as np
import pytest
from PIL import Image

from causalfusion_jax.common.charts import heat_map, line_chart, save_chart

LINES = {"a": {1: {"fd": 2.0, "accuracy": 0.5}, 4: {"fd": 3.0}}, "b": {4: {"fd": float("inf"), "accuracy": 0.7}}}


def test_line_chart_has_a_panel_a_score_and_a_line_a_run():
    figure = line_chart(LINES, ("fd", "accuracy"), (1, 4), "AR steps S")
    fd, accuracy = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["fd", "accuracy"] and fd.get_xlabel() == "AR steps S"
    assert [label.get_text() for label in fd.get_xticklabels()] == ["1", "4"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    drawn = {axes.get_title(): [line.get_ydata() for line in axes.get_lines()] for axes in figure.axes}
    np.testing.assert_array_equal(drawn["fd"], [[2.0, 3.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(drawn["accuracy"], [[0.5, np.nan], [np.nan, 0.7]])
    assert all(list(line.get_xdata()) == [0, 1] for line in fd.get_lines() + accuracy.get_lines())


def test_points_at_a_single_x_value_are_side_by_side():
    (axes,) = line_chart({"a": {1: {"fd": 1.0}}, "b": {1: {"fd": 1.0}}}, ("fd",), (1,), "S").axes
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[0], [1]] and axes.get_xticks() == [0.5]


def test_heat_map_shows_the_values():
    values = np.linspace(0.2, 0.9, 6).reshape(2, 3)
    panels = {"a": values, "b": values[::-1] / 2}
    figure = heat_map(panels, ["1", "2"], ["x", "y", "z"], row_label="layer", column_label="noise")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    for axes, shown in zip(figure.axes, panels.values(), strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("noise", "layer")
        assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
        (image,) = axes.get_images()
        np.testing.assert_array_equal(image.get_array(), shown)
        assert image.get_clim() == (0.1, 0.9) and image.origin == "lower", "one scale of colours"
        assert {text.get_position(): text.get_text() for text in axes.texts} == {
            (column, row): f"{100 * value:.1f}" for (row, column), value in np.ndenumerate(shown)
        }


@pytest.mark.parametrize("name", ["lines", "map"])
def test_the_same_chart_is_the_same_file(tmp_path, name):
    draw = {
        "lines": lambda: line_chart(LINES, ("fd",), (1, 4), "S"),
        "map": lambda: heat_map({"a": np.eye(2)}, ["1", "2"], ["x", "y"], row_label="r", column_label="c"),
    }[name]
    for path in (tmp_path / "one.png", tmp_path / "two.png"):
        save_chart(path, draw())
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.format == "PNG" and not image.text
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "two.png"}
