"""Run directories with one file damaged or unreadable: the next run ends in success or in one line."""

import collections
import json
import shutil

import numpy as np
import pytest
from support import tiny, tiny_users

from pjrlhf.data import synthetic
from pjrlhf.errors import UserError

MODELS = {"individualized": {"kind": "individualized", "tokens": 2}}


def cut(path, rng):
    path.write_bytes(path.read_bytes()[: int(rng.integers(0, path.stat().st_size))])


def flip(path, rng):
    content = bytearray(path.read_bytes())
    for place in rng.integers(0, len(content), 3):
        content[place] ^= int(rng.integers(1, 256))
    path.write_bytes(bytes(content))


def noise(path, rng):
    path.write_bytes(rng.bytes(int(rng.integers(1, 200))))


def other_json(path, rng):
    path.write_text(json.dumps([[], {}, 3, None, "x", {"stages": 1}, {"stages": {"preference": []}}][rng.integers(7)]))


def folder(path, rng):
    path.unlink()
    path.mkdir()


def dangling(path, rng):
    path.unlink()
    path.symlink_to(path)


def missing(path, rng):
    path.unlink()


DAMAGES = (cut, flip, noise, other_json, folder, dangling, missing)
# What a later run meets: everything finished, a stage to run again from its checkpoints, or training to go on with.
STATES = ("finished", "again", "unfinished")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(config, state -> folder of a run in that state)."""
    root = tmp_path_factory.mktemp("runs")
    base = tiny_users.save_base(root / "base")
    answers = ("it can shine .", "it can melt .")
    lines = [
        {"prompt": request, "chosen": pair[0], "rejected": pair[1], "user_id": user}
        for request in synthetic.prompts()[:12]
        for user, pair in (("ann", answers), ("bob", answers[::-1]))
    ]
    sizes = {"data__max_prompt": 16, "data__max_completion": 8, "checkpoint_every": 2, "evaluate_users__cold_start": ()}
    path = tiny_users.write_records(root / "records.jsonl", lines)
    config = tiny_users.settings(
        "records", **sizes, model__path=str(base), preference__models=MODELS, preference__data__path=path
    )
    config.stages = ("preference",)
    whole = tiny.run(root / "finished", config)
    again = shutil.copytree(whole, root / "again")
    (again / "manifest.json").unlink()
    unfinished = shutil.copytree(again, root / "unfinished")
    shutil.rmtree(unfinished / "preference" / "individualized" / "checkpoints" / "6")
    (unfinished / "preference" / "individualized" / "model.safetensors").unlink()
    return config, dict(zip(STATES, (whole, again, unfinished), strict=True))


def outcome(config, workdir):
    """ "success", or what is wrong with how the run ended."""
    try:
        tiny.run(workdir, config)
    except UserError as error:
        return "one line" if "\n" not in str(error) and len(str(error)) < 2000 else f"many lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "success"


def damaged(runs, tmp_path):
    """How runs end after one damage each: every sixth case."""
    config, folders = runs
    found, number = collections.defaultdict(list), -1
    for state, source in folders.items():
        for path in sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file()):
            for damage in DAMAGES:
                number += 1
                if number % 6 or (not (source / path).stat().st_size and damage in (cut, flip)):
                    continue
                target = shutil.copytree(source, tmp_path / "run")
                damage(target / path, np.random.default_rng(number))
                found[outcome(config, target)].append(f"{state}: {damage.__name__} {path}")
                shutil.rmtree(target)
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")  # lost futures
def test_a_sixth_of_all_damages_ends_in_success_or_one_line(runs, tmp_path):
    found = damaged(runs, tmp_path)
    print({how: len(cases) for how, cases in found.items()})
    wrong = {how: cases for how, cases in found.items() if how not in ("success", "one line")}
    assert not wrong, json.dumps(wrong, indent=1)
    assert found["success"] and found["one line"]
