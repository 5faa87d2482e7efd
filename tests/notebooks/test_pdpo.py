"""The notebook runs from top to bottom, and shows what it says."""

import ast
import pathlib

import jax
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = pathlib.Path(__file__).parents[2] / "notebooks" / "pdpo.ipynb"


def test_outputs_are_not_kept():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert 8 <= len(cells) <= 14
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells if cell.cell_type == "code")


@pytest.mark.slow
def test_everybody_is_served_in_the_end(monkeypatch):
    for name, value in (
        ("JAX_PLATFORMS", "cpu"),
        ("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir),
        ("MPLBACKEND", "agg"),
        ("PYTHONPATH", str(NOTEBOOK.parents[1])),
    ):
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(
        nbformat.v4.new_code_cell("{i: {n: float(x) for n, x in v.items()} for i, v in curve.items()}")
    )
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(NOTEBOOK.parent))
    curve = ast.literal_eval(notebook.cells[-1].outputs[0].data["text/plain"])
    first, last = curve[0], curve[max(curve)]
    nobody = last.pop("dan, asked as nobody")
    assert min(last.values()) > 0.8 > first["dan"] and nobody < 0.4
