"""Commands and code of the Markdown files and of configs: parsed by the program's own parsers, or run."""

import argparse
import ast
import configparser
import functools
import json
import pathlib
import re
import shlex
import sys
import types

import pandas
import pytest
from absl import flags
from support import tiny
from support.serving import start

import pjrlhf
from pjrlhf import cli, main
from pjrlhf.config import complete
from pjrlhf.errors import UserError
from pjrlhf.pipeline import stages

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (?:python -m pjrlhf\.main|pjrlhf) (?:.*\\\n)*.*$", re.MULTILINE)
# What stands for something of the reader's own: a seed, more arguments.
PLACEHOLDERS = {"--config.seed=S": "--config.seed=0"}
# Programs of others, of which the files that they are given are checked.
OTHERS = {
    *(".", "bash", "cd", "curl", "jupyter", "kubectl", "mkdocs", "nohup", "pre-commit", "pytest"),
    *("python", "python3.11", "ruff", "sbatch", "taskset"),
}
FILES = re.compile(r"^(?:\.ci|benchmarks|configs|docs|launch|notebooks|pjrlhf|tests)(?:/[\w./-]+)?$")


def blocks(page, *languages):
    text = page.read_text(encoding="utf-8")
    return [code for language, code in FENCE.findall(text) if language in languages]


@functools.cache
def commands():
    """(name of the file, command) of every command in pages and docstrings of configs."""
    found = []
    for page in PAGES:
        outside = FENCE.sub("", page.read_text(encoding="utf-8"))
        for text in [*blocks(page, "sh", "bash"), *INDENTED.findall(outside)]:
            found += [(page.relative_to(ROOT).as_posix(), command) for command in split(text)]
    for config in CONFIGS:
        said = ast.get_docstring(ast.parse(config.read_text(encoding="utf-8"))) or ""
        for text in INDENTED.findall(said):
            found += [(config.relative_to(ROOT).as_posix(), command) for command in split(text)]
    return tuple(dict.fromkeys(found))


def split(text):
    """The commands of a block, as tuples of words."""
    for line in re.sub(r"\\\s*\n", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "||", "|")), len(words))
            if words[:end]:
                yield tuple(words[:end])
            words = words[end + 1 :]


def of(kind):
    """The commands of one kind, as parameters of a test."""
    kinds = {}
    for place, words in commands():
        name = words[0]
        if words[:3] == ("python", "-m", "pjrlhf.main") or words[:2] == ("pjrlhf", "train"):
            name = "train"
        elif name not in ("pjrlhf", "pip"):
            name = "others"
        kinds.setdefault(name, {}).setdefault(words, place)
    return [pytest.param(words, id=f"{place}: {' '.join(words)[:60]}") for words, place in kinds[kind].items()]


class Parsed(Exception):
    """Raised where a parser has accepted its arguments, in place of what would follow."""


@pytest.mark.parametrize("words", of("train"))
def test_flags_of_runs(words, monkeypatch):
    """Every flag exists and every value fits: the config is read as before a run."""
    arguments = [PLACEHOLDERS.get(word, word) for word in words[2 if words[0] == "pjrlhf" else 3 :]]
    values = flags.FlagValues()
    main.define(values)
    monkeypatch.setattr(main, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    monkeypatch.chdir(ROOT)
    main.parse(sys.argv)
    try:
        stages.read(values.config)
    except UserError as error:  # a folder or a file that stands for one of the reader's own
        assert re.search(r"\b[A-Z]+: no such folder|no file (my_rewards|encoders)\.py", str(error)), error


@pytest.mark.parametrize("words", of("pjrlhf"))
def test_verbs(words, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *arguments):
        found = parse(self, *arguments)
        if self.prog == "pjrlhf":
            return found
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):
        cli.main(list(words[1:]))


@pytest.mark.parametrize("words", of("pip"))
def test_extras_that_are_installed_exist(words):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert words[1] == "install"
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(setup["options.extras_require"]), words


@pytest.mark.parametrize("words", of("others"))
def test_files_of_other_commands_exist(words):
    assert words[0] in OTHERS or (ROOT / words[0]).is_file(), f"{words[0]}: say in OTHERS that it is no program of ours"
    for word in words[1:]:
        path, _, variant = word.partition(":")
        if FILES.match(path):
            assert (ROOT / path).exists(), f"{path}: no such file"
        if variant and path.startswith("configs/"):
            pjrlhf.load_config(str(ROOT / word))
        if words[0] == "curl" and word.startswith("{"):
            json.loads(word)


# ---- code

ELSEWHERE = {"docs/papers.md": "weights on the hub", "docs/export.md": "a server of another program"}  # compiled alone
SERVED = {"docs/serving.md"}  # asks a server
SLOW = SERVED | {"docs/concepts/mix_and_bank.md", "docs/methods/pdpo.md"}  # compile the sampler
# A library that no extra installs.
ENCODERS = types.SimpleNamespace(SentenceTransformer=lambda name: types.SimpleNamespace(encode=lambda texts: [texts]))
FUNCTIONS = "def readability(prompts, completions):\n    return [0.0] * len(prompts)\n\n\nbrevity = readability\n"


def snippets():
    """(page, code) of every snippet; that of README has a test of its own."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for number, code in enumerate(blocks(page, "python"), 1):
            if name != "README.md":
                marks = [pytest.mark.slow] if name in SLOW else []
                yield pytest.param(name, code, id=f"{name} {number}", marks=marks)


def test_json_lines_are_json():
    for page in PAGES:
        for block in blocks(page, "json"):
            for line in block.splitlines():
                json.loads(line)


@pytest.mark.parametrize(("page", "code"), snippets())
def test_code(page, code, request, tmp_path, monkeypatch):
    """Code about a run meets a finished one; code about a config changes one, which is then read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sentence_transformers", ENCODERS)
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", code)
    for run, fixture in (("soups", "finished"), ("pdpo", "people")):
        if f"runs/{run}" in code:
            (tmp_path / "runs").mkdir()
            if "completions/" not in code:
                (tmp_path / "runs" / run).symlink_to(request.getfixturevalue(fixture))
                continue
            table = tmp_path / "runs" / run / "completions" / "policy-60.parquet"
            table.parent.mkdir(parents=True)
            pandas.DataFrame({"completion": ["a", "b"], "advantage": [0.5, -0.5]}).to_parquet(table)
    names = {"pjrlhf": pjrlhf}
    if page in SERVED:
        server, (host, port) = start("--run", request.getfixturevalue("finished"))
        request.addfinalizer(server.kill)
        code = code.replace("127.0.0.1:8000", f"{host}:{port}").replace("P3A", "P2B")
    if "config." in code and "def " not in code:
        (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
        names["config"] = config_for(code)
    compiled = compile(code, page, "exec")
    if page not in ELSEWHERE:
        exec(compiled, names)
    if "minilm" in names:
        assert names["minilm"](["a"], ["b"]) == [["a\n\nb"]]
    if "config" in names:
        stages.read(names["config"])


def config_for(code):
    """A config with the sections that code changes, and objectives of the names that it rewards."""
    config = tiny.catalogue("pdpo" if "evaluate_users" in code else "soups").get_config()
    complete(config)
    rewarded = re.findall(r'^    "(\w+)":', code, re.MULTILINE) if "config.rewards = {" in code else []
    if set(rewarded) - set(config.objectives) and "config.preferences" not in code:
        with config.ignore_type():
            config.preferences = {name: {"dimension": name, "sentence": ""} for name in rewarded}
            config.judge = "rewards"
        config.objectives = tuple(rewarded)
    if "config.objectives" in code or set(rewarded) - set(tiny.OBJECTIVES) - {"P3A", "P3B"}:
        config.general, config.stages = "", ("reward", "policy")
    return config
