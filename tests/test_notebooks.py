"""The notebooks run from top to bottom, and are stored without outputs."""

import json
import pathlib

import matplotlib
import pytest
from matplotlib import pyplot as plt

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path: pathlib.Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_leaves_no_files(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beside = set(path.parent.iterdir())
    backend, namespace = matplotlib.get_backend(), {}
    plt.switch_backend("agg")
    try:
        for number, cell in enumerate(code_cells(path), 1):
            name = f"{path.name}, code cell {number}"
            exec(compile("".join(cell["source"]), name, "exec"), namespace)
        for figure in map(plt.figure, plt.get_fignums()):
            figure.canvas.draw()
    finally:
        plt.close("all")
        plt.switch_backend(backend)
    assert not list(tmp_path.iterdir())
    assert set(path.parent.iterdir()) == beside


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
