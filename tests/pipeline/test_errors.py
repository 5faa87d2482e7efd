"""The error table: what goes wrong in a user's hands ends in one sentence that names the thing and the way out."""

import errno
import json
import os
import re
import shutil
import socket
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from pjrlhf import settings
from pjrlhf.algorithms import banks, policy, reward, sft
from pjrlhf.config import RunSettings
from pjrlhf.data.tokenization import load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.feedback import comparisons, samplers
from pjrlhf.judges.judge import ScoreJudge
from pjrlhf.models import folders
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.pipeline import stages
from pjrlhf.protocols import soups as evaluate
from pjrlhf.training.workdir import Workdir


def fails(message, folder, config):
    """Running `config` in `folder` raises one sentence that matches `message`."""
    with pytest.raises(UserError, match=message) as caught:
        tiny.run(folder, config)
    assert "\n" not in str(caught.value)


# What reading a config refuses. Values that a flag would refuse already come from a file.
MISTAKES = [
    ("preferences", "papers", "preferences: 'papers' is unknown; did you mean 'paper'\\? The choices are synthetic, "),
    ("prompt_preference", "sometimes", "prompt_preference: 'sometimes' is unknown; choose one of never, always, half"),
    ("seed", "one", "seed: 'one' is not a whole number; choose a number at least -9,223,372,036,854,775,808"),
    ("seed", True, "seed: True is not a whole number"),
    ("seed", 1.5, "seed: 1.5 is not a whole number"),
    ("temperature", float("nan"), "temperature: nan is not finite; choose a number at least 0 and at most 100"),
    ("seed", 10**400, "seed: 10{56}\\.\\.\\. is out of range; choose a number at least"),
    ("policy.steps", 10**400, "policy.steps: 10{56}\\.\\.\\. is out of range"),
    ("data.prompt_buckets", (12, 10**400), "data.prompt_buckets: 10{56}\\.\\.\\. is out of range"),
    ("mesh", 8, "mesh: 8 is not a section of settings"),
    ("mesh.tensr", 8, "mesh.tensr: no such setting; did you mean mesh.tensor\\?"),
    ("model.attention", "flash", "model.attention: 'flash' is unknown; .* auto, blocks"),
    ("model.remat", "some", "model.remat: 'some' is unknown; choose one of none, full, dots"),
    ("model.param_dtype", "int8", "model.param_dtype: 'int8' is unknown; .*float32, bfloat16, float16"),
    ("data.long_prompt", "cut", "data.long_prompt: 'cut' is unknown; choose one of drop, truncate_left, error"),
    ("data.heldout_fraction", 1.5, "data.heldout_fraction: 1.5 is out of range; choose a number above 0 and below 1"),
    ("data.prompt_buckets", (12, "x"), "data.prompt_buckets: \\(12, 'x'\\) is not a list of whole numbers"),
    (
        "sft.optimizer.schedule",
        "cosin",
        "sft.optimizer.schedule: 'cosin' is unknown; did you mean 'cosine'\\? The choices are constant, linear, cosine",
    ),
    (
        "sft.optimizer.learning_rate",
        -1.0,
        "sft.optimizer.learning_rate: -1.0 is out of range; choose a number at least 0",
    ),
    ("sft.optimizer.warmup_steps", 60, "sft.optimizer.warmup_steps: 60 leaves none of the 60 updates; .*at most 59"),
    ("model.max_length", 25, "model.max_length: 25 is less than data.max_prompt .* = 20 . 10; raise it or shorten one"),
    ("stages", ("sft", "reward", "sft"), "stages: 'sft' comes twice; name each stage once"),
    ("stages", ("sft", "pjrlhf.algorithms.sft:STAGE"), "stages: 'sft' comes twice; name each stage once"),
    ("sft.steps", -1, "sft.steps: -1 is out of range; choose a number at least 1"),
    ("sft.data", "wrold", "sft.data: 'wrold' is unknown; choose one of synthetic, or give a section"),
    ("policy.ppo.clip", -1, "policy.ppo.clip: -1.0 is out of range; choose a number above 0"),
    ("policy.top_k", 5, "policy.top_k: truncated sampling would train .*; set top_k to 0 and top_p to 1"),
    ("policy.combine.kind", "summ", "policy.combine.*'summ'.*; did you mean sum\\?"),
]


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES, ids=[f"{key}={value}" for key, value, _ in MISTAKES])
def test_a_wrong_setting_is_refused_when_it_is_read(key, value, message):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        stages.read(with_value(tiny.settings(), key, value))
    assert "\n" not in str(caught.value)


def with_value(config, key, value):
    """`config` with a value that it may not be of the right type for, or have no such key for."""
    section, _, name = key.rpartition(".")
    with config.ignore_type(), config.unlocked():
        target = config
        for part in filter(None, section.split(".")):
            target = target[part]
        target[name] = value
    return config


WRONG_RUNS = [
    (
        "model.path",
        "/no/such/model",
        "/no/such/model/config.json: no such file; name a folder in Hugging Face layout with safetensors weights",
    ),
    ("model.eos_token", "<end>", "eos_token '<end>': not in the tokenizer's vocabulary; name one of its tokens"),
    (
        "data.max_prompt",
        4,
        "prompt too long .* tokens, the limit is 4; raise --config.data.max_prompt, or cut .*correct the data",
    ),
    ("sft.batch_size", 10_000, "sft.batch_size: a batch takes 10000 rows, and there are only 640 to train on"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG_RUNS, ids=[key for key, _, _ in WRONG_RUNS])
def test_settings_that_do_not_fit_the_data_or_the_model(tmp_path, key, value, message):
    fails(message, tmp_path / "new", tiny.settings(stages=("sft",), **{key: value}))


SECTIONS = {
    name: kind
    for name, hint in typing.get_type_hints(RunSettings).items()
    if (kind := settings.nested_class(hint)) is not None
}


@pytest.mark.parametrize("name", SECTIONS)
def test_an_empty_section_holds_the_defaults(name):
    """What a config leaves out keeps its default, at every depth."""
    default = getattr(stages.read({}).settings, name)
    found = getattr(stages.read({name: {}}).settings, name)
    assert found == (SECTIONS[name]() if default is None else default)
    for inner in found.to_dict():
        if isinstance(getattr(found, inner), settings.Settings):
            assert getattr(stages.read({name: {inner: {}}}).settings, name) == found


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "mesh: .*does not fit 8 devices; the sizes must multiply to 8"),
        ({"data": -1, "fsdp": -1}, "mesh: more than one axis is -1"),
    ],
)
def test_wrong_mesh(tmp_path, axes, message):
    config = tiny.settings(stages=("sft",))
    config.mesh.update(axes)
    with pytest.raises(UserError, match=message):
        stages.run(config, Workdir(tmp_path))


def test_rows_that_eight_devices_cannot_share(tmp_path):
    with pytest.raises(UserError, match="batch of 12 rows: cannot be split over data x fsdp = 8 devices; make it a"):
        stages.read(tiny.settings()).run(Workdir(tmp_path)).devices.place({"user": np.zeros(12)})


# ---- tokenizers


@pytest.fixture
def tokenizer_folder(finished, tmp_path):
    """A tokenizer whose settings a test may change."""
    return shutil.copytree(finished / "tokenizer", tmp_path / "tokenizer")


def without(folder, name):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


def test_a_tokenizer_without_eos(tokenizer_folder):
    without(tokenizer_folder, "eos_token")
    with pytest.raises(UserError, match=r"no end-of-sequence token, .*name one .* with --config.model.eos_token="):
        load_tokenizer(tokenizer_folder)
    assert load_tokenizer(tokenizer_folder, eos_token="</s>").eos_id == 2


def test_a_tokenizer_without_pad_works(finished, tmp_path):
    model = shutil.copytree(finished / "sft" / "model", tmp_path / "model")
    without(model, "pad_token")
    config = tiny.settings(stages=("sft",), sft__steps=3, model__path=str(model))
    folder = tiny.run(tmp_path / "run", config)
    assert tiny.start(folder, config).workspace.tokenizer.pad_id != 2
    assert all(row["loss"] < 3 for row in tiny.lines(folder)), "the trained base is where it starts"


# ---- records


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"kind": "jsonl", "path": str(path)}


GOOD = {"prompt": "what is rain ?", "chosen": "it can shine .", "rejected": "it can grow .", "objective": "P1A"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "P7"}, "pairs.jsonl line 2: objective 'P7' is not one of P1A, .*; mend the record or add it"),
        ({"chosen": ""}, "pairs.jsonl: 1 of 3 records are bad .1 empty chosen., .*line 2.*; correct the data, or"),
        ({"chosen": "it can grow ."}, "1 of 3 records are bad .1 chosen equals rejected., .*line 2"),
        ({"rejected": None}, "1 of 3 records are bad .1 rejected is null., .*line 2"),
        ({"prompt": "rain " * 30}, "1 of 3 records are bad .1 prompt too long., .*line 2: .*the limit is 20"),
        ({}, "no training pair for objective|no held-out pair for objective"),
    ],
)
def test_bad_preference_records(finished, tmp_path, change, message):
    records = [GOOD, GOOD | change, GOOD | {"prompt": "what is snow ?"}]
    config = tiny.settings(stages=("reward",), model__path=str(finished / "sft" / "model"))
    with config.ignore_type():
        config.reward.data = type(config)(write_records(tmp_path / "pairs.jsonl", records))
    fails(message, tmp_path / "run", config)


def test_bad_completion_records(finished, tmp_path):
    records = [{"prompt": "what is rain ?", "completion": text} for text in ("it can grow .", " ")]
    config = tiny.settings(stages=("sft",), model__path=str(finished / "sft" / "model"))
    with config.ignore_type():
        config.sft.data = type(config)(write_records(tmp_path / "answers.jsonl", records))
    fails(
        "answers.jsonl: 1 of 2 records are bad .1 empty completion., the first at answers.jsonl line 2",
        tmp_path / "run",
        config,
    )


def test_a_held_out_prompt_that_is_too_long(copied):
    run = tiny.start(copied, tiny.settings(data__max_prompt=9))
    with pytest.raises(UserError, match=r"prompt .*tokens, more than data.max_prompt=9; raise it"):
        run.text.encode([run.records.ask(run.records.requests[1][0], "use easy words . keep it short .")])


def test_answers_that_no_judge_can_tell_apart(copied, monkeypatch):
    run = tiny.start(copied, tiny.settings())
    monkeypatch.setattr(samplers, "sample_base", lambda run, prompts, key, stage: ["it can grow ."] * len(prompts))
    with pytest.raises(UserError, match="none of 32 pairs of answers differs by 'P1A'; train the base longer or raise"):
        comparisons.run(run)


# ---- files


def test_a_file_where_the_run_directory_should_be(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/run: cannot be written, a file stands .*; choose another --work"):
        Workdir(tmp_path / "run")


@pytest.mark.parametrize(
    ("stage", "method", "writer"),
    [
        (sft, "pjrlhf.algorithms.banks.save_params", None),
        (reward, None, "save_tree"),
        (policy, "pjrlhf.algorithms.banks.save_peft", None),
        (comparisons, "pathlib.Path.write_text", None),
        (evaluate, "pjrlhf.protocols.reporting.write_report", None),
    ],
    ids=["sft", "reward", "policy", "comparisons", "evaluate"],
)
def test_a_full_disk(copied, monkeypatch, stage, method, writer):
    """Training and sampling are over when the disk fills up; what was trained is in its checkpoint."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = {policy: "policy", evaluate: "report"}.get(stage, stage.__name__.rpartition(".")[2])
    monkeypatch.setattr(method or f"{stage.__name__}.{writer}", full)
    run = tiny.start(copied, tiny.settings(evaluate__sweep_points=2))
    with pytest.raises(
        UserError,
        match=f"{copied}/{folder}.*: cannot be written, the disk is full; free",
    ):
        stage.run(run)


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_truncated_reward_model(copied, share):
    truncate(copied / "reward" / "model.safetensors", share)
    with pytest.raises(UserError, match=r"reward/model.safetensors: cannot be read \(.*\); "):
        reward.load(tiny.start(copied, tiny.settings()))


def test_a_reward_model_that_gives_nan(copied, monkeypatch):
    path = copied / "reward" / "model.safetensors"
    tree, note = load_tree(path)
    tree["heads"]["kernel"] = tree["heads"]["kernel"].at[1].set(jnp.nan)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "all_finite", lambda x: True)  # no writer of ours writes it
        save_tree(path, tree, note)
    with pytest.raises(UserError, match=r"reward/model.safetensors: .*not finite"):
        policy.method_of(tiny.start(copied, tiny.settings()))


def test_reward_models_of_other_preferences(copied):
    path = copied / "reward" / "model.safetensors"
    tree, note = load_tree(path)
    save_tree(path, tree, note | {"rewards": ["P1A"]})
    with pytest.raises(UserError, match=r"holds reward models for \['P1A'\], this run needs \['P1A', 'P1B'"):
        policy.method_of(tiny.start(copied, tiny.settings()))


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 10**30 * 10**300, 10**400, None, "high"])
def test_a_judge_whose_score_is_no_finite_number(score):
    judge = ScoreJudge(lambda prompt, text, criterion: score)
    with pytest.raises(UserError, match=r"criterion 'P1A': score .* for 'a'; scores must be finite"):
        judge(["q"], ["a"], ["b"], "P1A")


def test_a_stage_whose_predecessor_is_missing(copied):
    for path, load in (("reward/model.safetensors", reward.load), ("policy/bank.safetensors", banks.load)):
        (copied / path).unlink()
        with pytest.raises(UserError, match=f"{path}: there is no such file; run the stage that writes it first"):
            load(tiny.start(copied, tiny.settings()))
    (copied / "comparisons" / "comparisons.jsonl").unlink()
    with pytest.raises(UserError, match=r"comparisons.jsonl: no such file"):
        reward.method_of(tiny.start(copied, tiny.settings()))


def test_servers_that_are_not_there_are_told_at_the_start(tmp_path, caplog):
    """A stage may ask one hours later. Stages that are not run, and replays, ask none."""
    with socket.create_server(("127.0.0.1", 0)) as there:
        here = f"http://127.0.0.1:{there.getsockname()[1]}/v1"
        away = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
        config = tiny.settings(stages=("sft", "comparisons", "evaluate"))
        with config.ignore_type():
            config.evaluate.judge = {**away, "base_url": here}
            config.evaluate.judges = ({**away, "replay": True},)
            config.comparisons.judge = away
            config.rewards = {"P1A": {"kind": "http", "url": "http://127.0.0.1:9/rewards"}}
        stages.read(config).check_inputs(Workdir(tmp_path))
        told = [line for line in caplog.messages if "nothing listens at" in line]
        assert [line.partition(" now; start it")[0] for line in told] == [
            "comparisons.judge.base_url: nothing listens at http://127.0.0.1:9/v1",
            "rewards.P1A.url: nothing listens at http://127.0.0.1:9/rewards",
        ]
        caplog.clear()
        config.stages, config.rewards = ("sft",), {}
        stages.read(config).check_inputs(Workdir(tmp_path))
    assert "nothing listens" not in caplog.text


def test_policies_without_the_stage_that_makes_their_rewards(tmp_path):
    """Also where all rewards are functions: their scale is measured there."""
    for stages_ in (("sft", "policy"), ("policy", "reward")):
        with pytest.raises(UserError, match="stages: policy comes without reward before it"):
            stages.run(tiny.settings(stages=stages_), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_config_that_differs_from_that_of_the_folder(finished):
    with pytest.raises(UserError, match=r"another config \(policy.steps: 4 -> 5; seed: 0 -> 3\); undo the change, ch"):
        tiny.run(finished, tiny.settings(seed=3, policy__steps=5))


# ---- training


def train_sft(folder, config):
    run = tiny.start(folder, config)
    return run.train(sft.method_of(run), "sft", config.sft.steps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_damaged_checkpoints(tmp_path, caplog):
    config = tiny.settings(checkpoint_every=30)
    whole = tiny.bits(train_sft(tmp_path, config))
    checkpoints = tmp_path / "sft" / "checkpoints"

    def damage(step):
        for path in (checkpoints / step / "state").glob("**/d/*"):
            truncate(path)

    damage("60")
    again = train_sft(tmp_path, config)
    assert f"{checkpoints}/60 cannot be read" in caplog.text and "going on from step 30" in caplog.text
    assert tiny.bits(again) == whole
    for step in ("30", "60"):
        damage(step)
    with pytest.raises(UserError, match=f"{checkpoints}/60: this checkpoint cannot be read .*delete {checkpoints}"):
        train_sft(tmp_path, config)


def test_a_loss_that_is_nan_stops_the_run_and_keeps_the_batch(tmp_path):
    config = tiny.settings(stages=("sft",), sft__optimizer__learning_rate=1e38, sft__optimizer__max_grad_norm=0.0)
    batch = re.escape(str(tmp_path / "run" / "sft" / "nan_batch_"))
    fails(
        f"sft: (loss|grad_norm) is (nan|inf).* at step .; its batch is in {batch}.*; lower the learning rate",
        tmp_path / "run",
        config,
    )
    assert list((tmp_path / "run" / "sft").glob("nan_batch_*.npz"))
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy__ppo__policies_at_once": 3},
            r"policies_at_once=3: must divide the \d policies, .*; set it to 1, or to 0",
        ),
        ({"temperature": 0.0}, "temperature: a policy cannot learn from greedy samples; set it above 0"),
    ],
)
def test_settings_that_policies_cannot_be_trained_with(finished, changes, message):
    with pytest.raises(UserError, match=message):
        policy.method_of(tiny.start(finished, tiny.settings(**changes)))


# ---- merging


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (0.5,)}, "merge.weights: .*1.*2.*; give one finite number per ingredient"),
        ({"weights": (0.5, float("nan"))}, "merge.weights: nan is not finite; give a finite number"),
        (
            {"space": "deltas"},
            "merge.space: 'deltas' is unknown; did you mean 'delta'.* The choices are delta, factors, concat",
        ),
        ({"ingredients": ("/no/such", "/no/other")}, "/no/such: holds neither config.json nor adapter_config.json; "),
        ({"base": None}, "merge.base: LoRA folders need the model they adapt; set it"),
    ],
)
def test_wrong_merges(finished, tmp_path, changes, message):
    values = {
        "base": str(finished / "sft" / "model"),
        "ingredients": tuple(str(finished / "policy" / "ingredients" / name) for name in ("P1A", "P2A")),
        "weights": (0.5, 0.5),
        "output": str(tmp_path / "out"),
        **changes,
    }
    with pytest.raises(UserError, match=message):
        merge.merge(settings.parse(MergeSettings, values, "merge"))
    assert not (tmp_path / "out").exists()
