"""The Markdown files: links, files, tests and commands that they name exist, and README's code runs."""

import ast
import functools
import importlib.util
import pathlib
import re
import urllib.parse

import pytest
import yaml

import pjrlhf
from pjrlhf.data import synthetic

ROOT = pathlib.Path(__file__).parents[1]
NOT_OURS = re.compile(r"^(runs|build|dist|site|node_modules|\.(?!github)[^/]*|[^/]*\.egg-info)(/|$)")
PAGES = sorted(x for x in ROOT.rglob("*.md") if not NOT_OURS.match(x.relative_to(ROOT).as_posix()))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CONFIG = re.compile(r"--config=(configs/[^\s`'\"),;]+)")
# A path of this repository in backticks, perhaps with the name of a test.
PATH = re.compile(r"`((?:benchmarks|configs|docs|launch|notebooks|pjrlhf|tests)/[\w./-]+?)(?:::(\w+))?(?::\w+)?`")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(page):
    """What GitHub calls the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for title in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pages
def test_relative_links_exist(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = urllib.parse.unquote(link).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        if anchor:
            assert anchor in set(anchors(target)), f"{link}: no such heading"


@pages
def test_files_and_tests_exist(page):
    for name, test in PATH.findall(page.read_text(encoding="utf-8")):
        path = ROOT / name
        assert path.exists(), f"{name}: no such file"
        if test:
            assert re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{name}::{test}"


@functools.cache
def load(path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLONE = ("README.md", "docs/README.md", "docs/start/quickstart.md", "docs/performance.md", "docs/results/")


@pages
def test_commands_run_outside_a_clone(page):
    """But for pages that start with one, and those of results, which tell how figures of the clone were made."""
    name = page.relative_to(ROOT).as_posix()
    if name.startswith("docs/") and not name.startswith(CLONE):
        found = re.findall(r"--config=configs/|pjrlhf\.main --config=", page.read_text(encoding="utf-8"))
        assert not found, "write pjrlhf train --config=NAME: the configs come with the package"


@pages
def test_commands_name_configs(page):
    for given in CONFIG.findall(page.read_text(encoding="utf-8")):
        path, _, variant = given.partition(":")
        assert (ROOT / path).is_file(), f"{given}: no such config"
        if variant != "...":
            load(ROOT / path).get_config(*([variant] if variant else []))


def test_the_first_screen_of_readme_says_how_to_run_and_to_test():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks[0].strip() == "pip install -e . && python -m pjrlhf.main --config=configs/soups.py"
    assert blocks[1].strip() == "pip install -e '.[test]' && pytest"


def test_readme_stays_short():
    """What needs more words has a page in docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80 and len(re.findall(r"!\[", text)) <= 2
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 6


@pytest.mark.slow
def test_the_code_of_readme_runs(finished, tmp_path, monkeypatch, capsys):
    """On a run of the tests in place of the one that README makes."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "soups").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_new_tokens=28", "max_new_tokens=10"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_configs_point_to_pages_of_results():
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        for page in re.findall(r"docs/[\w/]+\.md", text):
            assert (ROOT / page).is_file(), f"{path.name}: {page}"


def test_the_forms_of_the_repository_are_well_formed():
    forms = [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"]
    loaded = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in forms}
    assert loaded["CITATION.cff"]["version"] == pjrlhf.__version__
    assert loaded["CITATION.cff"].keys() >= {"cff-version", "title", "message", "authors", "references"}
    assert {x["url"].rpartition("/")[2] for x in loaded["CITATION.cff"]["references"]} == {
        "2310.11564",
        "2402.05133",
        "2604.04497",
    }
    for name in ("bug.yml", "feature.yml", "question.yml"):
        assert loaded[name].keys() >= {"name", "description", "body"}
        fields = [part["id"] for part in loaded[name]["body"]]
        assert len(set(fields)) == len(fields)
    for job, script in (("ci", ".ci/run"), ("oldest", ".ci/oldest"), ("release", ".ci/release")):
        assert {"run": f"bash {script}"} in loaded["ci.yml"]["jobs"][job]["steps"] and (ROOT / script).is_file()


def test_the_quickstart_names_preferences_as_the_page_of_the_server_does():
    text = (ROOT / "docs" / "start" / "quickstart.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"\| `(P\w+)` ([^|`]+?) (?=\|)", text))
    assert named == {name: one.label for name, one in synthetic.PREFERENCES.items()}
