"""Both notebooks run headless, from the first cell to the last."""

import nbformat
import pytest
import quick_compilation
from helpers import ROOT
from nbclient import NotebookClient

FOLDER = ROOT / "launch" / "colab"
TINY = dict(hidden=32, heads=2, layers=2, dtype="float32")
PARAMETERS = {
    "causalfusion_digits": dict(STEPS=12, SOLVER_STEPS=4, IMAGES=20),
    "causalfusion_tpu": dict(
        BATCH=2,
        IMAGES=2,
        ROUNDS=1,
        OVERRIDES={"model": TINY, "data": dict(image_size=4), "sampling": dict(solver_steps=4)},
    ),
}


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_every_notebook_has_a_case():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_outputs_are_stripped(name):
    text = (FOLDER / f"{name}.ipynb").read_bytes()
    assert len(text) < 30_000
    for cell in read(name).cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.parametrize("name", PARAMETERS)
def test_runs_from_the_first_cell_to_the_last(name, tmp_path, monkeypatch):
    """With the parameters that its tagged cell names, made small."""
    notebook = read(name)
    (index,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    values = PARAMETERS[name] | {"WORKDIR": str(tmp_path / "run")}
    for parameter in values:
        assert f"\n{parameter} = " in "\n" + notebook.cells[index].source, parameter
    given = "\n".join(f"{parameter} = {value!r}" for parameter, value in values.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(given))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    # One device, as there.
    monkeypatch.setenv("XLA_FLAGS", quick_compilation.FLAGS)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    if name == "causalfusion_digits":
        assert "step 12/12" in printed and len(pictures) == 5
        assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 6
    else:
        assert "of a matrix product" in printed and "S=8: " in printed and len(pictures) >= 1
        assert "arrays, written to" in printed
