"""The notebooks run from top to bottom, and are stored with what their cells show."""

import ast
import json
import pathlib
import re

import matplotlib
import pytest
from matplotlib import pyplot as plt

from dpojax import losses
from tests import finished_frontier

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.])/(?:tmp|home|root|Users)/")  # a folder of whoever ran it

# Public names of dpojax.losses that are no curve: containers, parts and look-ups.
NOT_DRAWN = {
    "GapStatistics",
    "PRESETS",
    "RunningMean",
    "epsilon_steps",
    "gap_statistics",
    "implicit_rewards",
    "kto_baseline",
    "log_ratios",
    "optimal_values",
    "per_token",
    "shared_length",
    "update_baseline",
}


def code_cells(path: pathlib.Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a small frontier run."""
    folder = tmp_path_factory.mktemp("frontier")
    finished_frontier.write(folder)
    return folder


@pytest.fixture(autouse=True)
def frontier_of_the_notebook(finished_run, monkeypatch):
    monkeypatch.setenv("DPOJAX_FRONTIER", str(finished_run))


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.slow
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
def test_a_notebook_is_stored_with_the_outputs_of_one_run_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for data in (output.get("data", {}) for output in outputs):
        assert "image/png" in data or "<Figure" not in "".join(data.get("text/plain", ()))
    texts = ["".join(output.get("text", ())) for output in outputs]
    texts += ["".join(output.get("data", {}).get("text/plain", ())) for output in outputs]
    assert not [text for text in texts if MACHINE.search(text)]


@pytest.mark.parametrize("start", [".", "notebooks"])
def test_the_notebook_of_the_frontier_finds_a_run_from_the_root_and_from_its_own_folder(
    start, tmp_path, monkeypatch
):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.delenv("DPOJAX_FRONTIER")
    monkeypatch.chdir(tmp_path / start)
    (path,) = (path for path in NOTEBOOKS if path.stem == "frontier")
    first_cell = compile("".join(code_cells(path)[0]["source"]), path.name, "exec")
    with pytest.raises(FileNotFoundError, match="--workdir=runs/frontier"):
        exec(first_cell, {})
    run, namespace = tmp_path / "runs/frontier", {}
    run.mkdir(parents=True)
    (run / "frontier.csv").touch()
    exec(first_cell, namespace)
    assert namespace["run"].resolve() == run.resolve()


def test_every_public_loss_is_in_the_notebook_of_losses():
    (path,) = (path for path in NOTEBOOKS if path.stem == "losses")
    nodes = [
        node
        for cell in code_cells(path)
        for node in ast.walk(ast.parse("".join(cell["source"])))
        if not isinstance(node, ast.ImportFrom)
    ]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert set(losses.__all__) - names == NOT_DRAWN
