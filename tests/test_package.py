"""The package as a whole: what importing it loads, who imports whom, the catalogue, and what is installed."""

import ast
import configparser
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import ml_collections
import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "pjrlhf").rglob("*.py"))
}
# A room may import what stands after it.
ROOMS = (
    ("__main__",),
    ("cli",),
    ("main",),
    ("aot",),
    ("pipeline",),
    ("papers", "real_data"),
    ("config", "config_files"),
    ("protocols",),
    ("algorithms",),
    ("feedback",),
    ("runtime",),
    ("serving",),
    ("language_model",),
    ("export",),
    ("evaluation",),
    ("judges",),
    ("rewards",),
    ("rollout",),
    ("training",),
    ("data",),
    ("models",),
    ("merging",),
    ("objectives", "parallel"),
)
# Training never imports evaluation.
TRAINING = ("algorithms", "feedback", "runtime", "rollout", "training")
FREE = ("errors", "paths", "registry", "settings", "strict_json", "terminal", "types")  # for everyone
BELOW = ("pjrlhf", *(f"pjrlhf.{name}" for name in FREE if name != "paths"))  # also for objectives and merging


def room(module):
    return module.split(".")[1] if "." in module else ""


def level(name):
    return next(i for i, rooms in enumerate(ROOMS) if name in rooms)


def imports(path):
    """Every module or name of ours that `path` imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "pjrlhf")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pjrlhf":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"


def module_of(name):
    """The module that an imported name is, or is taken from."""
    return name if name in MODULES else name.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for name in imports(MODULES[module]):
        target = module_of(name)
        assert target in MODULES, f"{module} imports {name}, which does not exist"
        if room(target) in (*FREE, ""):
            allowed = room(module) not in ("objectives", "merging") or target in BELOW
        elif room(module) == room(target):
            allowed = True
        else:
            allowed = level(room(module)) < level(room(target)) and room(module) != "merging"
            allowed &= room(module) not in TRAINING or room(target) != "evaluation"
        assert allowed, f"{module} imports {name}"


def test_no_circles():
    graph = {module: {module_of(name) for name in imports(path)} - {module} for module, path in MODULES.items()}
    done = set()

    def visit(module, way):
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for target in graph[module]:
                visit(target, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def python(code):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_everything_loads_neither_torch_nor_tensorflow():
    code = f"import sys, importlib\nfor name in {list(MODULES)}: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = set(python(code))
    assert "jax" in loaded
    assert not loaded & {"torch", "tensorflow", "transformers", "datasets", "tensorflow_datasets", "matplotlib"}


def test_the_package_itself_and_main_are_light():
    loaded = set(python("import sys, pjrlhf, pjrlhf.main\nprint(*sys.modules)"))
    assert not loaded & {"jax", "flax", "transformers", "orbax", "numpy"}


def configs():
    """(file, variant) of the catalogue; variants are the words a config's docstring calls it with."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        yield path, None
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for word in sorted({word.rstrip(".,;)") for word in text.split() if f"configs/{path.name}:" in word}):
            yield path, word.rpartition(":")[2]


@pytest.mark.parametrize(("path", "variant"), [pytest.param(*one, id=f"{one[0].stem}:{one[1]}") for one in configs()])
def test_the_catalogue(path, variant):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([variant] if variant else []))
    assert isinstance(config, ml_collections.ConfigDict)
    from pjrlhf.pipeline.stages import STAGES

    assert config.stages and set(config.stages) <= set(STAGES)
    for stage in config.stages:
        assert importlib.util.find_spec(STAGES[stage]), f"{stage} has no module"


def test_an_unknown_variant_is_refused_with_the_known_ones():
    spec = importlib.util.spec_from_file_location("soups", ROOT / "configs" / "soups.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"configs/soups.py:xyz: unknown variant; use .*configs/soups.py:hf"):
        module.get_config("xyz")


def test_files_beside_the_code_are_installed():
    """Every file below pjrlhf that is no Python source is covered by package_data, and every folder is a package."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["pjrlhf"].split()
    covered = {path for pattern in patterns for path in (ROOT / "pjrlhf").glob(pattern)}
    others = {
        path
        for path in (ROOT / "pjrlhf").rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert ROOT / "pjrlhf" / "evaluation" / "report.html" in others <= covered
    folders = {path.parent for path in MODULES.values()}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    configs = {file.parent for file in (ROOT / "configs").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    packages |= {".".join(("pjrlhf", *folder.relative_to(ROOT).parts)) for folder in configs}
    assert sorted(setup["options"]["packages"].split()) == sorted(packages), "every package is installed"
    assert {file.suffix for folder in configs for file in folder.iterdir() if file.is_file()} == {".py", ".jsonl"}


@pytest.mark.slow
def test_a_wheel_runs_outside_the_source_tree(tmp_path):
    """Its configs are named without a path; the environment of the test has its dependencies and setuptools."""
    source = tmp_path / "source"
    kept = ("pjrlhf", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def ran(code, *arguments):
        command = [sys.executable, "-P", "-c", code, *arguments]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)

    where = ran("import pjrlhf; print(pjrlhf.__file__)")
    assert where.stdout.strip() == str(target / "pjrlhf" / "__init__.py"), where.stderr
    found = ran("from pjrlhf.config_files import shipped_configs; print(*shipped_configs())").stdout.split()
    files = (ROOT / "configs").rglob("*.py")
    assert found == sorted(file.relative_to(ROOT / "configs").with_suffix("").as_posix() for file in files)
    main = "import sys; from pjrlhf.cli import main; main()"
    for name in ("soups:instruct", "moc:stories", "smollm"):
        shown = ran(main, "train", f"--config={name}", "--help")
        assert shown.returncode == 0 and "--config.data.prompts" in shown.stdout, shown.stderr
    assert (
        f"{target}/pjrlhf/configs/instructions.jsonl" in ran(main, "train", "--config=soups:instruct", "--help").stdout
    )
    missing = ran(main, "train", "--config=soup")
    assert missing.returncode == 2 and "did you mean soups, which comes with the package?" in missing.stderr
