"""Tutorials run from top to bottom with public names alone, and what they say comes out."""

import ast
import pathlib
import re

import jax
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
TUTORIALS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells


def source(name):
    return "\n".join(cell.source for cell in cells(name) if cell.cell_type == "code")


@pytest.mark.parametrize("name", TUTORIALS)
def test_outputs_are_not_kept(name):
    code = [cell for cell in cells(name) if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("name", TUTORIALS)
def test_public_names_alone(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("pjrlhf"), ast.unparse(node)
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("pjrlhf.")], ast.unparse(node)


def test_a_method_takes_as_many_lines_as_the_notebook_says():
    (cell,) = (cell for cell in cells("your_own_method") if "class OnlineDPO(" in cell.source)
    lines = [line for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 70


def test_every_tutorial_is_in_the_list():
    page = (FOLDER.parent / "docs" / "start" / "tutorials.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"notebooks/(\w+)\.ipynb\)", page)) == TUTORIALS


def value_of(name, expression, monkeypatch):
    """What an expression is after the last cell."""
    for variable, value in (
        ("JAX_PLATFORMS", "cpu"),
        ("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir),
        ("MPLBACKEND", "agg"),
        ("PYTHONPATH", str(FOLDER.parent)),
    ):
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(expression))
    NotebookClient(notebook, timeout=1200, kernel_name="python3").execute(cwd=str(FOLDER))
    return ast.literal_eval(notebook.cells[-1].outputs[0].data["text/plain"])


@pytest.mark.slow
def test_the_weight_of_a_soup_moves_its_answers(monkeypatch):
    words, same = value_of("soups_from_nothing", "(words, alone == mixed)", monkeypatch)
    assert same and words[-1] > words[0] + 3


@pytest.mark.slow
def test_a_method_of_ones_own_learns(monkeypatch):
    before, after = value_of(
        "your_own_method", "[sum(len(text.split()) for text in texts) for texts in (before, after)]", monkeypatch
    )
    assert after > before


@pytest.mark.slow
def test_the_one_who_disagrees_is_served_too(monkeypatch):
    """Pooled DPO serves the majority; with user tokens the one who disagrees is served, too."""
    pooled, personal = value_of("pdpo", "(nobody, individualized)", monkeypatch)
    assert pooled["dan"] < 0.3 and personal["dan"] > pooled["dan"] + 0.3
    assert min(personal[user] for user in ("ann", "bob", "cat")) > 0.8


@pytest.mark.slow
def test_a_function_and_a_judge_train_policies(monkeypatch):
    found = value_of("rewards_and_judges", "found", monkeypatch)
    assert found["brief"][0] < found["base"][0] and found["friendly"][1] > found["base"][1] + 0.3


@pytest.mark.slow
def test_votes_move_a_person_who_is_then_forgotten(monkeypatch):
    pytest.importorskip("uvicorn", reason="pip install -e '.[serve]'")
    path, deleted, gone, code = value_of("serve_and_teach", "(path, deleted, gone, code)", monkeypatch)
    assert path[-1]["P2B"] > path[0]["P2B"] + 0.1
    assert (deleted // 100, gone, code) == (2, 404, 0)


@pytest.mark.slow
def test_layouts_of_a_mesh_give_the_same_losses(monkeypatch):
    apart, plan = value_of("scaling_up", "(float(apart), plan)", monkeypatch)
    assert apart < 1e-3
    assert not plan or "v5e" in plan
