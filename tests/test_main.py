"""The command line: mistakes end in one line on stderr and exit code 2."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import Any, cast

import pytest
from support import tiny

from pjrlhf.main import default_workdir
from pjrlhf.settings import RENAMED

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
        ([], "--config: not given; for example --config=soups"),
        (["--config.seed=1"], "--config: not given; for example --config=soups"),
        (["--config="], "--config: no file ''; name one that exists, for example --config=soups"),
        (["--config=configs/none.py"], "--config: no file 'configs/none.py'; name one that exists, for example"),
        (["--config=elsewhere/configs/soups.py:hf"], "did you mean soups:hf, which comes with the package?"),
        (["--config=configs"], "--config: 'configs' is a folder; name a file in it"),
        ([SOUPS, "--config.data.path=x"], "--config.data.path: no such setting; did you mean --config.model.path"),
        (["--config.seed=1", SOUPS], "before a value for --config"),
        (
            [SOUPS, "--config.policy.stpes=3"],
            "--config.policy.stpes: no such setting; did you mean --config.policy.steps?",
        ),
        ([SOUPS, "--config.polcy.steps=3"], "--config.polcy: no such setting; did you mean --config.policy?"),
        ([SOUPS, "--config.xyz=3"], "--config.xyz: no such setting; known keys: "),
        ([SOUPS, "--noconfig.profil"], "--config.profil: no such setting; did you mean --config.profile?"),
        ([SOUPS, "--config.seed.x=3"], "--config.seed.x: --config.seed is a value, not a section; set --config.seed"),
        ([SOUPS, "--config.merge.seed=3"], "--config.merge: this config has no section merge; add it to the file, or"),
        ([SOUPS, "--config.mesh.model=8"], "--config.mesh.model: no such setting; known keys: data, fsdp, tensor"),
        (
            [SOUPS, "--config.policy.steps=many"],
            "policy.steps: 'many' is not a whole number; choose a number at least 1",
        ),
        ([SOUPS, "--config.policy.steps=3.5"], "policy.steps: 3.5 is not a whole number; choose a number at least 1"),
        ([SOUPS, "--config.seed=1e3"], "seed: 1000.0 is not a whole number"),
        ([SOUPS, "--config.policy.optimizer.learning_rate=x"], "policy.optimizer.learning_rate: 'x' is not a number"),
        ([SOUPS, "--config.profile=maybe"], "profile: 'maybe' is not True or False"),
        ([SOUPS, "--config.seeds=(1,"], "seeds: '(1,' is not a list of whole numbers"),
        ([SOUPS, "--config.policy.steps"], "Missing value for flag --config.policy.steps"),
        ([SOUPS, "--config.policy=3"], "policy: 3 is not a section of settings; set --config.policy.KEY"),
        ([SOUPS, "--config.objectives[=3"], "objectives["),
        ([SOUPS, "--config.objectives[9]=3"], "check the flags"),
        ([SOUPS, "--config.policy.steps=-1"], "policy.steps: -1 is out of range; choose a number at least 1"),
        ([SOUPS, "--config.policy.optimizer.schedule=cosin"], "policy.optimizer.schedule: 'cosin' is unknown; did you"),
        ([f"{SOUPS}:none"], "configs/soups.py:none: unknown variant; use one of configs/soups.py, configs/soups.py:hf"),
        (["--config=configs/merge.py:none"], "configs/merge.py: get_config has no variant; leave out :none"),
        ([SOUPS, "--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
        ([SOUPS, "--num_processes=x"], "--num_processes: 'x' is not a whole number"),
        ([SOUPS, "seed=1"], "seed=1: not a flag; settings of the config start with --config."),
    ],
)
def test_mistakes_on_the_command_line(ended, arguments, message):
    code, (line,) = ended(*arguments)
    assert code == 2 and line.startswith("error: ") and message in line


@pytest.mark.parametrize("config", ["soups", "pdpo", "family"])
def test_a_flag_of_a_renamed_setting_is_answered_with_its_new_name(ended, config):
    """Every renamed key of every section that the config has."""
    keys = tiny.catalogue(config).get_config().to_dict()

    def sections(values, prefix=""):
        yield prefix, values
        for key, value in values.items():
            if isinstance(value, dict):
                yield from sections(value, f"{prefix}{key}.")

    asked = set()
    for prefix, values in sections(keys):
        for old, new in RENAMED.items():
            section, _, name = old.rpartition(".")
            if new in values and section in ("", prefix[:-1]) and not ("." not in old and f"{prefix}{old}" in RENAMED):
                code, (line,) = ended(f"--config=configs/{config}.py", f"--config.{prefix}{name}=1")
                assert code == 2
                assert line == f"error: --config.{prefix}{name}: is called --config.{prefix}{new} now; rename it"
                asked.add(old)
    assert asked


FILES = {
    "def get_config(:": "FILE: SyntaxError: invalid syntax (config.py, line 1); correct the config file",
    "x = 1": "FILE: has no function get_config; define one that returns a ConfigDict",
    "get_config = 3": "FILE: has no function get_config",
    "import no_such_module": "FILE line 1: ModuleNotFoundError: No module named 'no_such_module'; correct the config",
    "raise SystemExit": "FILE line 1: SystemExit; correct the config file",
    "\x00": "FILE: ",
    "def get_config():\n    return 1 / 0": "FILE line 2: ZeroDivisionError: division by zero; correct the config file",
    "def get_config():\n    pass": "FILE: get_config returns nothing; return an ml_collections.ConfigDict",
    "def get_config():\n    return {'seed': 1}": "FILE: get_config returns a dict; return an ml_collections.ConfigDict",
    "def get_config(size):\n    pass": "FILE: get_config needs a variant; name one as FILE:VARIANT",
    "def get_config():\n    raise ValueError('two\\nlines')": "FILE line 2: ValueError: two lines; correct",
    **{
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({values})": message
        for values, message in {
            "{'seed': lambda: 1}": "seed: <function get_config.<locals>.<lambda> at ",
            "{'methods': {'a': {'rollouts': max}}}": "methods.a.rollouts: <built-in function max> is not text, a",
            "{'methods': {'a': {'rollouts': [object()]}}}": "methods.a.rollouts: <object object at ",
            "{'sft': {'stpes': 1}}": "sft.stpes: no such setting; did you mean sft.steps?",
            "{'keep': 1}": "keep: is called max_to_keep now; rename it",
            "{'mesh': {'model': 1}}": "mesh.model: no such setting; known keys: data, fsdp, tensor",
            "{'stages': 3}": "stages: 3 is not a list of names",
            "{'sft': 3}": "sft: 3 is not a section of settings",
        }.items()
    },
}


@pytest.mark.parametrize("content", FILES, ids=list(map(str, range(len(FILES)))))
def test_a_file_that_is_no_config_ends_in_one_line(ended, tmp_path, content):
    file = tmp_path / "config.py"
    file.write_text(content)
    code, (line,) = ended(f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and line.startswith(f"error: {FILES[content]}".replace("FILE", str(file)))
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["config.py"]


def test_a_flag_reaches_what_a_config_leaves_out(ended, tmp_path):
    """Shared settings, and those of sections and stages, of which the file names few or none."""
    file = tmp_path / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'stages': ('sft', 'comparisons'), 'sft': {'steps': 30}})\n"
    )
    names = ("seed=1", "model.num_layers=3", "sft.optimizer.learning_rate=0.5", "comparisons.pairs=7")
    assert ended(f"--config={file}", *(f"--config.{name}" for name in names)) == (0, [])
    from pjrlhf import main
    from pjrlhf.pipeline import stages

    found = stages.read(main.FLAGS.config).settings
    assert (found.seed, found.model.num_layers, found.sft.steps, found.comparisons.pairs) == (1, 3, 30, 7)
    assert found.sft.optimizer.learning_rate == 0.5 and found.sft.optimizer.schedule == "cosine"


def test_a_signal_and_a_failure_have_codes_of_their_own(monkeypatch, capsys):
    from pjrlhf import main
    from pjrlhf.training.loop import Interrupted

    def stop(error):
        def start(*_, **__):
            raise error

        monkeypatch.setattr(main.app, "run", start)
        with pytest.raises(SystemExit) as stopped:
            main.run()
        return stopped.value.code, capsys.readouterr().err

    assert stop(Interrupted("sft: stopped", 15)) == (143, "sft: stopped\n")
    assert stop(SystemExit(0)) == (0, "")
    code, text = stop(RuntimeError("a bug"))
    assert code == 1 and text.startswith("Traceback") and "RuntimeError: a bug" in text


def test_a_mistake_does_not_wait_for_threads_of_libraries():
    """After a write that fails, a library's thread may wait for minutes."""
    code = (
        "import threading, time\n"
        "from pjrlhf import main\n"
        "from pjrlhf.errors import UserError\n"
        "def start(*_, **__):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    raise UserError('disk: is full')\n"
        "main.app.run = start\n"
        "main.run()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (2, "error: disk: is full\n")


SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "stopped by SIGTERM", "SIGHUP": "stopped by SIGHUP"}


def unignored():
    """In a child: signals as a terminal gives them to a program, whatever started the tests."""
    for name in SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_DFL)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("swallowed", [False, True])
def test_an_interrupt_that_a_library_changes_or_swallows_ends_the_process_too(swallowed, name):
    code = (
        "import os, signal, sys, time\n"
        "from pjrlhf import main\n"
        "main.CLEANUP_SECONDS = 0.5\n"
        "def start(*_, **__):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt as error:\n"
        "        if len(sys.argv) > 1:\n"
        "            time.sleep(60)\n"
        "        raise RuntimeError('INTERNAL: in a callback') from error\n"
        "main.app.run = start\n"
        "main.run()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *(["swallow"] if swallowed else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, preexec_fn=unignored)
    told = f"{SIGNALS[name]}; the same command goes on from what is saved\n"
    assert (done.returncode, done.stderr) == (128 + signal.Signals[name], told)


def test_signals_that_the_starter_ignores_stay_ignored():
    """As nohup does."""
    code = (
        "import os, signal\n"
        "from pjrlhf import main\n"
        "def start(*_, **__):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('goes on')\n"
        "main.app.run = start\n"
        "main.run()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["nohup", sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def test_a_device_without_enough_memory_ends_in_one_line():
    code = (
        "import jax\n"
        "from pjrlhf import main\n"
        "def start(*_, **__):\n"
        "    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\\nmany lines')\n"
        "main.app.run = start\n"
        "main.run()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Out of memory allocating 9 bytes." in done.stderr and "--config.model.remat=full" in done.stderr


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("program", ["module", "command"])
def test_a_signal_during_the_first_import_ends_in_one_line(program, name, tmp_path):
    """The handler is there before anything of other packages is imported."""
    (tmp_path / "lazy_loader.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pjrlhf").write_text("from pjrlhf.cli import main\nmain()\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = ["-m", "pjrlhf.main"] if program == "module" else [str(tmp_path / "bin" / "pjrlhf"), "train"]
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=30, preexec_fn=unignored
    )
    assert (done.returncode, done.stderr) == (128 + signal.Signals[name], f"{SIGNALS[name]}\n")


def test_importing_the_package_leaves_signals_alone():
    code = (
        "import signal\n"
        "before = [signal.getsignal(number) for number in (1, 2, 15)]\n"
        "import pjrlhf, pjrlhf.cli\n"
        "print(before == [signal.getsignal(number) for number in (1, 2, 15)])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert done.stdout == "True\n"


def test_a_mistake_ends_in_one_line(tmp_path):
    """A bad value is told before anything is written or compiled."""
    done = call(SOUPS, "--config.policy.steps=0", f"--workdir={tmp_path / 'run'}")
    expected = "error: policy.steps: 0 is out of range; choose a number at least 1 and at most 1,000,000,000"
    assert (done.returncode, done.stderr.splitlines(), done.stdout) == (2, [expected], "")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def refused(settings, monkeypatch):
    """What `main` refuses to do, in this process; the lines above show how an error reaches the terminal."""
    from absl import logging

    from pjrlhf import main
    from pjrlhf.errors import UserError

    monkeypatch.setattr(logging.get_absl_handler(), "filters", [])

    def call(*arguments):
        settings(*arguments)
        with pytest.raises(UserError) as caught:
            main.main([])
        return str(caught.value)

    return call


def test_a_changed_config_is_refused_and_named(refused, tmp_path):
    (tmp_path / "run").mkdir()
    done = call(SOUPS, "--config.stages=()", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"finished: {tmp_path / 'run'}"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
    message = refused(SOUPS, "--config.stages=()", "--config.seed=7", f"--workdir={tmp_path / 'run'}")
    assert f"{tmp_path / 'run'}: holds a run with another config (seed: 0 -> 7)" in message
    assert "choose another --workdir" in message


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


# ---- remedies: what a message tells a user to do works


@pytest.fixture
def settings(ended):
    """The settings that the command line gives."""

    def read(*arguments):
        from pjrlhf import main
        from pjrlhf.pipeline import stages

        assert ended(*arguments) == (0, [])
        return stages.read(main.FLAGS.config).settings

    return read


RECORDS = "--config=configs/pdpo.py:records"


def comparisons(settings):
    """The records of `preference.data`, or the message."""
    from pjrlhf.data.sources import check_source
    from pjrlhf.errors import UserError
    from pjrlhf.runtime.records import Records
    from pjrlhf.runtime.streams import Streams

    records = Records(settings.data, settings.audience, Streams(0), None, lambda: False)
    try:
        check_source(settings.preference.data, "preference.data")
        return records.comparisons(settings.preference.data, "preference.data")[0]
    except UserError as error:
        return str(error)


FLAG = re.compile(r"--config\.[\w.]+=[\w.]+")
GOOD = {"prompt": "Sky?", "chosen": " blue", "rejected": " green", "user_id": "ann"}
MISNAMED = {"question": "Sky?", "better": " blue", "worse": " green", "who": "ann"}
CASES = {
    "a list": ("a.json", json.dumps([GOOD])),
    "other columns": ("a.jsonl", json.dumps(MISNAMED)),
    "some bad records": ("a.jsonl", "\n".join([json.dumps(GOOD)] * 9 + ["{"])),
}


@pytest.mark.parametrize("case", CASES)
def test_following_the_advice_leads_to_the_data(settings, tmp_path, case):
    name, content = CASES[case]
    (tmp_path / name).write_text(content)
    yours = {"chosen": "better", "rejected": "worse", "prompt": "question"}
    flags = [RECORDS, f"--config.preference.data.path={tmp_path / name}"]
    for _ in range(4):
        found = comparisons(settings(*flags))
        if not isinstance(found, str):
            break
        advised = FLAG.findall(found)
        assert advised, found
        flags += [re.sub(r"columns\.(\w+)=YOURS", lambda m: f"columns.{m[1]}={yours[m[1]]}", flag) for flag in advised]
    assert {(e.prompt, e.chosen, e.rejected) for e in found} == {("Sky?", " blue", " green")}
    assert len(flags) > 2


def test_a_path_that_is_not_set_is_asked_for_by_its_own_flag(settings, tmp_path):
    message = comparisons(settings(RECORDS))
    assert message == "data kind 'jsonl': needs 'path'; set --config.preference.data.path"
    message = comparisons(settings(RECORDS, f"--config.preference.data.path={tmp_path}"))
    assert FLAG.findall(message) == ["--config.preference.data.kind=datasets"]


def test_flags_reach_sections_whose_keys_a_config_chooses(settings):
    """Columns, entries and what they leave out, sources in place of a name; and they are checked."""
    found = settings(
        *(SOUPS, "--config.data.columns.chosen=x", "--config.methods.pmorl.optimizer.learning_rate=0.5"),
        *("--config.data.prompts.kind=jsonl", "--config.data.prompts.path=a.jsonl"),
    )
    assert found.data.columns == {"chosen": "x"}
    assert found.methods["pmorl"]["optimizer"] == {"learning_rate": 0.5}
    assert found.data.prompts == {"kind": "jsonl", "path": "a.jsonl"}
    found = settings("--config=configs/pdpo.py", "--config.preference.models.cluster.beta=0.3")
    assert found.preference.entry("cluster").objective.beta == 0.3


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.methods.pmorl.optimizer.learning_rat=0.5",
            "learning_rat: no such setting; did you mean methods.pmorl.optimizer.learning_rate?",
        ),
        ("--config.methods.pmorl.stpes=3", "methods.pmorl.stpes: no such setting; did you mean methods.pmorl.steps?"),
        ("--config.data.columns=x", "data.columns: 'x' is not a section of settings"),
    ],
)
def test_a_wrong_flag_of_such_a_section_is_told(ended, flag, message):
    code, (line,) = ended(SOUPS, flag)
    assert code == 2 and message in line


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_seeds_of_any_sign_and_64_bits(settings, seed):
    from pjrlhf.runtime.streams import Streams

    found = settings(SOUPS, f"--config.seed={seed}").seed
    streams = Streams(found)
    assert found == seed and (streams.seed == seed) == (0 <= seed < 2**32)
    streams.key("base/init"), streams.numpy("ric/kept").random(), streams.python("x").random()


def test_seeds_are_different_streams():
    import jax

    from pjrlhf.runtime.streams import Streams

    seeds = (0, 1, -1, 2**32 - 1, 2**32, 2**64 - 1)
    assert len({tuple(jax.random.key_data(Streams(seed).root).tolist()) for seed in seeds}) == len(seeds)


def test_help_of_a_config_lists_its_settings(ended, capsys):
    from pjrlhf import main

    with pytest.raises(SystemExit) as stopped:
        main.parse(["main", "--help", SOUPS])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "  --config.policy.steps=60\n      rollouts, each followed by an update - at least 1" in text
    assert "\npolicy: " in text and "--config.merge" not in text
    assert "default" in text and "\x1b" not in text


def test_errors_reach_the_terminal_in_one_line_without_secrets(ended, tmp_path):
    file = tmp_path / "config.py"
    file.write_text("def get_config():\n    raise ValueError('\x1b[31m s3://key:secret@bucket/x')")
    code, (line,) = ended(f"--config={file}")
    assert code == 2 and "secret" not in line and "\x1b" not in line and r"\x1b[31m s3://***@bucket/x" in line


def test_secrets_are_masked_in_what_a_run_keeps(settings, tmp_path):
    from pjrlhf import main
    from pjrlhf.pipeline import stages

    settings(RECORDS, "--config.preference.data.path=gs://key:secret@bucket/x.jsonl")
    plan = stages.read(main.FLAGS.config)
    assert "secret" in plan.settings.preference.data["path"] and "secret" not in json.dumps(plan.to_dict())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.evaluate_front.points=((0.5, 0.6),)", "evaluate_front.points (0.5, 0.6): not shares"),
        (
            "--config.evaluate_front.points=corner",
            "evaluate_front.points: 'corner' is unknown; did you mean 'corners'?",
        ),
        (
            "--config.evaluate_front.points=centre",
            "evaluate_front.points: 'centre' is one point, or has one twice; give",
        ),
        (
            "--config.evaluate_front.points=((1.0, 0.0), (1.0, 0.0))",
            "evaluate_front.points: ((1.0, 0.0), (1.0, 0.0)) is",
        ),
        ("--config.evaluate_front.target=some", "evaluate_front.target: 'some' is unknown"),
        ("--config.methods.psoups.preferences.kind=fixd", "methods.psoups.preferences.kind: 'fixd' is unknown"),
        ("--config.methods.morl.preferences.points=corner", "methods.morl.preferences.points: 'corner' is unknown"),
        ("--config.methods.clp.preferences.kind=own", "methods.clp: mix 'weights': needs weights over all objectives"),
        ("--config.methods.moc.scale=std", "methods.moc: policy.combine: the rule compares rewards with preference"),
        (
            "--config.methods.psoups.ppo.policies_at_once=3",
            "methods.psoups: policy.ppo.policies_at_once=3: must divide",
        ),
    ],
)
def test_settings_of_late_stages_are_checked_at_the_start(ended, flag, message):
    code, (line,) = ended("--config=configs/family.py", flag)
    assert code == 2 and message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.evaluate_users.resamples=0"], "evaluate_users.resamples: 0 is out of range"),
        (["--config.population.new_pairs_per_user=16"], "evaluate_users.cold_start: 16 comparisons of each new person"),
        (["--config.evaluate_users.cold_start_models=('pooled',)"], "'pooled' has nothing of a person's own to fit"),
        (
            ["--config.preference.models.pooled.kind=soup"],
            "preference.bank: entry 'pooled' mixes policies; name the bank",
        ),
        (
            ["--config.preference.data.kind=jsonl"],
            "evaluate_users.cold_start: nobody is new; set --config.preference.ne",
        ),
        (["--config.preference.models.base.kind=uniform"], "preference.models: 'base' is the name of the base itself"),
    ],
)
def test_settings_of_the_evaluation_of_users_are_checked_at_the_start(ended, flags, message):
    code, (line,) = ended("--config=configs/pdpo.py", *flags)
    assert code == 2 and message in line
    remedy = re.search(r"--config\.preference\.new_user_fraction=[\d.]+", line)
    if remedy:
        assert ended("--config=configs/pdpo.py", *flags, remedy[0]) == (0, [])


ODD_NAMES = ("a/b", "..", "", " a", "a b", "a\\b", "a\x1b[31m", "x" * 101, "a,b", "soup:x", "a=1", "base", "personal")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_cannot_name_a_folder_or_a_served_model_is_refused(name):
    from pjrlhf.algorithms.pdpo_settings import PreferenceSettings
    from pjrlhf.config import RunSettings
    from pjrlhf.errors import UserError
    from pjrlhf.serving.catalogue import Catalogue

    refused = r"(so it cannot name a folder and a served model|is the name of .*); choose another one"
    known = {"preferences": {name: {"dimension": "d", "sentence": ""}}, "judge": {name: "shorter"}}
    for key, use in {
        "models": lambda: PreferenceSettings(models={name: {"kind": "uniform"}}),
        "objectives": lambda: RunSettings(objectives=(name,), general="short", **known),
        "methods": lambda: RunSettings(methods={name: {}}),
        "ingredients": lambda: Catalogue(cast(Any, None), (name,)),
    }.items():
        with pytest.raises(UserError, match=f"^{key}: .* {refused}"):
            use()
    PreferenceSettings(models={"a$b_$<i>[bold]é你": {"kind": "uniform"}})


def test_names_that_look_alike_are_refused():
    from pjrlhf.algorithms.pdpo_settings import PreferenceSettings
    from pjrlhf.errors import UserError

    for pair in (("Ann", "ann"), ("é", "e\u0301"), ("\ufb01t", "fit")):
        with pytest.raises(UserError, match="look alike; choose another name for one of them"):
            PreferenceSettings(models={name: {"kind": "uniform"} for name in pair})


@pytest.mark.parametrize("name", ["soup:x", "base", "a/b", "a b"])
def test_a_name_of_an_ingredient_is_checked_before_anything_is_read(name, capsys):
    from pjrlhf import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "hi", "--model", "nowhere", "--ingredients", f"{name}=nowhere"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pjrlhf: --ingredients: ") or "--ingredients: " in line


def test_home_is_expanded_in_every_setting_that_is_a_path(monkeypatch, tmp_path):
    from pjrlhf.config import RunSettings
    from pjrlhf.pipeline import stages
    from pjrlhf.settings import fields_of, rule_of

    monkeypatch.setenv("HOME", str(tmp_path))
    asked = 0
    for key, (hint, field) in fields_of(RunSettings).items():
        if re.search(r"\bfolders?\b|bank\.safetensors|another run", rule_of(field).help) and "str" in str(hint):
            section = {}
            for part in reversed(key.split(".")):
                section = {part: section or (("~/x",) if "tuple" in str(hint) else "~/x")}
            found = stages.read(section).to_dict()
            for part in key.split("."):
                found = found[part]
            assert found in (f"{tmp_path}/x", [f"{tmp_path}/x"], (f"{tmp_path}/x",)), key
            asked += 1
    assert asked >= 7


def test_a_workdir_inside_a_run_is_refused_and_not_made(refused, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "manifest.json").write_text('{"stages": {}}')
    message = refused(SOUPS, "--config.stages=()", f"--workdir={tmp_path / 'policy'}")
    assert "\n" not in message and f"is inside the run {tmp_path}" in message
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("module", ["pjrlhf.cli", "pjrlhf.main"])
def test_a_module_with_a_command_runs_it(module):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "pjrlhf", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: pjrlhf ")


@pytest.mark.parametrize("value", ["nan", "-1", "inf", "-inf"])
def test_a_tolerance_that_decides_nothing_is_refused_before_anything_is_read(value, capsys):
    from pjrlhf import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", "--model", "nowhere", "--check", "http://127.0.0.1:9", f"--tolerance={value}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"error: --tolerance {value}: is no number of nats")


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["serve", "--model", "nowhere", "--mesh", "data=x"], "--mesh: 'data=x' is no size of an axis"),
        (["generate", "hi", "--model", "nowhere", "--mix", "x="], "--mix: 'x=' is no soup"),
        (["export", "--for=peft", "--output=OUT", "--model", "nowhere", "--mix", "x="], "--mix: 'x=' is no soup"),
    ],
)
def test_a_mistake_in_a_flag_names_the_flag(arguments, start, capsys):
    from pjrlhf import cli

    with pytest.raises(SystemExit):
        cli.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {start}")
