"""Training methods and stages of other code, named in a config."""

import json

import pytest
from support import tiny
from support.toy_extensions import CountSettings

from pjrlhf.config import to_config
from pjrlhf.errors import UserError
from pjrlhf.pipeline import stages
from pjrlhf.protocols.front import FrontSettings
from pjrlhf.training.workdir import Workdir

MODULE = "support.toy_extensions"
POINTS = ((1.0, 0.0, 0.0, 0.0), (0.5, 0.0, 0.5, 0.0))


def settings(**entry):
    """The tiny config with a stage and an entry of methods of another module."""
    names = ("sft", "comparisons", "reward", "methods", "evaluate_front")
    config = tiny.settings(stages=(f"{MODULE}:STAGE", *names))
    with config.unlocked():
        config.count = to_config(CountSettings(letter="e"))
        config.evaluate_front = to_config(FrontSettings(points=POINTS, unseen=False, base_samples=1))
        config.methods.best_of = {"train": f"{MODULE}:TRAINER", "steps": 3, **entry}
    return config


@pytest.mark.slow
def test_a_method_and_a_stage_of_other_code_run_beside_those_of_the_package(copied):
    config = settings()
    (copied / "config.json").unlink()  # of another config
    with tiny.one_device():
        stages.run(config, Workdir(copied))
    run = tiny.start(copied, config)
    requests = run.records.requests[0]
    assert run.workdir.finished("count")["found"] == sum(request.count("e") for request in requests)
    assert run.workdir.finished("methods/best_of")["samples"] == 64
    assert [line["step"] for line in tiny.lines(copied, "methods/best_of")] == [1, 2, 3]
    assert (copied / "methods/best_of/ingredients/policy/adapter_model.safetensors").is_file()
    summary = json.loads((copied / "report" / "summary.json").read_text())
    found = summary["methods"]["best_of"]
    assert found["samples"] == 64 and found["points"]["weights"] == [list(point) for point in POINTS]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"step": 3}, "methods.best_of.step: no such setting; did you mean methods.best_of.steps?"),
        ({"steps": 0}, "methods.best_of.steps: 0 is out of range; choose a number at least 1"),
        ({"train": f"{MODULE}:STAGE"}, f"methods: train '{MODULE}:STAGE' is no trainer; choose one of modpo, policy"),
        ({"train": f"{MODULE}:NOBODY"}, f"{MODULE} has no NOBODY"),
        ({"answer": "vote"}, "methods.best_of.answer: 'vote' is unknown; choose one of soup, bone, mod"),
    ],
)
def test_wrong_entries_are_refused_before_anything_runs(entry, message):
    with pytest.raises(UserError) as error:
        stages.read(settings(**entry))
    assert message in str(error.value)


def test_a_trainer_is_no_stage():
    config = settings()
    config.stages = (f"{MODULE}:TRAINER",)
    with pytest.raises(UserError, match=f"stages: {MODULE}:TRAINER is no Stage; make it one"):
        stages.read(config)
