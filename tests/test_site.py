"""What the documentation site is made of: pages from the code leave nothing out, and links lead to its pages."""

import importlib.util
import pathlib

import pytest
import yaml

import pjrlhf
from pjrlhf.config import RunSettings
from pjrlhf.data.readers import MODULES
from pjrlhf.serving.settings import EngineSettings, ServerSettings
from pjrlhf.settings import fields_of, rule_of

ROOT = pathlib.Path(__file__).parents[1]


def hook(name):
    spec = importlib.util.spec_from_file_location(f"hook_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return hook("reference")


@pytest.fixture(scope="module")
def pages(reference):
    return reference.pages()


def test_every_setting_of_a_run_has_a_row_with_its_help(reference, pages):
    page = pages["reference/settings/run.md"]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| <code>")}
    for key, (_, field) in fields_of(RunSettings).items():
        row = rows[reference.breakable(key)]
        assert reference.cell(rule_of(field).help) in row, key
        assert row.replace("\\|", "").count("|") == 5, row  # four cells


def test_long_words_of_a_cell_may_be_broken(reference):
    number = "18,<wbr>446,<wbr>744,<wbr>073,<wbr>709,<wbr>551,<wbr>615"
    assert reference.cell("at most 18,446,744,073,709,551,615 a|b") == f"at most {number} a\\|b"
    assert reference.cell("mine.my_module:my_function, 0.5.") == "mine.<wbr>my_module:<wbr>my_function, 0.5."


def test_every_setting_of_the_server_has_a_row(reference, pages):
    for cls in (ServerSettings, EngineSettings):
        for key in fields_of(cls):
            assert f"| {reference.breakable(key)} |" in pages["reference/settings/server.md"]


def test_every_reader_and_rule_has_a_section(reference, pages):
    assert {f"## {kind}" for kind in MODULES} <= {*pages["reference/settings/readers.md"].splitlines()}
    for name in reference.RULES:
        assert f"### `{name}`" in pages["reference/settings/kinds.md"]


def test_every_public_name_is_described(pages):
    found = [line.rpartition(".")[2] for line in pages["reference/api.md"].splitlines() if line.startswith(":::")]
    assert sorted(found) == sorted(pjrlhf.__all__)


def test_every_paper_of_the_readme_is_in_the_index(pages):
    for paper in ("2310.11564", "2402.05133", "2604.04497"):
        assert f"https://arxiv.org/abs/{paper}" in pages["reference/papers.md"]


def test_the_menu_names_pages_that_exist(pages):
    def leaves(menu):
        for entry in menu:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from leaves(value) if isinstance(value, list) else [value]

    menu = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    outside = {"README_of_the_repository.md", "CONTRIBUTING.md", "BUILD_NOTES.md", "CHANGELOG.md"}
    outside |= {"benchmarks/README.md"}
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(menu) == sorted(written | outside | pages.keys())


def test_links_out_of_the_documentation_stay_in_the_site():
    pytest.importorskip("mkdocs")
    repository = hook("repository")
    for link, found in (
        ("[a](../README.md#methods)", "[a](README_of_the_repository.md#methods)"),
        ("[a](results/soups.md)", "[a](results/soups.md)"),
        ("`[a](../x.md)`", "`[a](../x.md)`"),
        ("[a](../benchmarks/results/load.json)", "[a](repository/benchmarks/results/load.json)"),
        ("[a](https://x.y)", "[a](https://x.y)"),
    ):
        assert repository.rewritten(link, "docs/serving.md", "serving.md") == found
    assert repository.rewritten("[a](docs/soups.png)", "README.md", "README_of_the_repository.md") == "[a](soups.png)"
