"""The command line: mistakes end in one line on stderr and exit code 2."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pjrlhf.errors import missing_key
from pjrlhf.main import default_workdir

ROOT = pathlib.Path(__file__).parents[1]


def call(*arguments):
    """The finished process `python -m pjrlhf.main ...`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pjrlhf.main", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


SOUPS = "--config=configs/soups.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: not given; for example --config=configs/soups.py"),
        (["--config.seed=1"], "--config: not given; for example --config=configs/soups.py"),
        (["--config=configs/none.py"], "--config: .*No such file or directory: 'configs/none.py'; check it"),
        ([SOUPS, "--config.policy.stpes=3"], "--config.policy.stpes=3: the config has no stpes; did you mean steps?"),
        ([SOUPS, "--config.polcy.steps=3"], "--config.polcy.steps=3: the config has no polcy; did you mean policy?"),
        ([SOUPS, "--config.policy.steps=many"], "--config.policy.steps=many: invalid literal for int"),
        ([f"{SOUPS}:none"], "configs/soups.py:none: unknown variant; use configs/soups.py or configs/soups.py:hf"),
        ([SOUPS, "--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
        ([SOUPS, "seed=1"], "seed=1: not a flag; settings of the config start with --config."),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, arguments, message):
    """In this process, with flags of its own, as a process each would take minutes in all."""
    from absl import flags
    from ml_collections import config_flags

    from pjrlhf import main

    values = flags.FlagValues()
    monkeypatch.setattr(main, "FLAGS", values)
    config = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    monkeypatch.setattr(main, "_CONFIG", config)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(main.app, "run", lambda _, flags_parser: flags_parser(["main", *arguments]))
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in message.split(".*"):
        assert part in line


def test_a_mistake_ends_in_one_line(tmp_path):
    done = call(SOUPS, "--config.policy.stpes=3", f"--workdir={tmp_path / 'run'}")
    expected = "error: --config.policy.stpes=3: the config has no stpes; did you mean steps?"
    assert (done.returncode, done.stderr.splitlines(), done.stdout) == (2, [expected], "")
    assert not (tmp_path / "run").exists()


def test_a_changed_config_is_refused_and_named(tmp_path):
    (tmp_path / "run").mkdir()
    done = call(SOUPS, "--config.stages=()", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
    done = call(SOUPS, "--config.stages=()", "--config.seed=7", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path / 'run'}: holds a run with another config (seed: 0 -> 7)" in line
    assert "choose another --workdir" in line


def test_help_is_no_error_and_needs_no_library():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['main', '--help']\n"
        "try:\n"
        "    runpy.run_module('pjrlhf.main', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print('exit', stop.code)\n"
        "print('loaded', sorted({'jax', 'transformers', 'numpy', 'orbax', 'datasets'} & set(sys.modules)))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "exit 0" in done.stdout and "loaded []" in done.stdout, done.stdout + done.stderr
    assert "--workdir" in done.stdout


def test_default_workdir():
    assert default_workdir("configs/soups.py") == "runs/soups"
    assert default_workdir("configs/soups.py:hf") == "runs/soups-hf"


def test_only_keys_missing_from_a_config_count_as_such():
    import ml_collections

    config = ml_collections.ConfigDict({"data": {"max_prompt": 1}})
    for look in (lambda: config.data.max_promt, lambda: config.data["max_promt"]):
        with pytest.raises((AttributeError, KeyError)) as caught:
            look()
        assert missing_key(caught.value) == ("max_promt", "max_prompt")
    with pytest.raises(AttributeError) as caught:
        _ = config.zzz
    assert missing_key(caught.value) == ("zzz", "")
    for error in (KeyError("x"), KeyError(), AttributeError("'str' object has no attribute 'x'"), AttributeError()):
        assert missing_key(error) is None
