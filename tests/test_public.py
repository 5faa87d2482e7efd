"""The public names: documented, few, loaded when asked for, and the way a notebook uses them."""

import ast
import inspect
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from support import tiny_users

import pjrlhf
from pjrlhf import cli
from pjrlhf.errors import UserError

STUB = pathlib.Path(pjrlhf.__file__).with_suffix(".pyi")


def test_the_names_are_few_documented_and_where_the_stub_says():
    names = [
        (node.module, alias.name)
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert len(names) <= 42 and sorted(pjrlhf.__all__) == sorted(name for _, name in names)
    for module, name in names:
        found = getattr(pjrlhf, name)
        assert inspect.getdoc(found), name
        if inspect.isclass(found) or inspect.isfunction(found):
            assert found.__module__ == f"pjrlhf.{module}", name


def test_the_package_is_light_until_a_name_is_used():
    code = "import pjrlhf, sys; assert 'jax' not in sys.modules; pjrlhf.AdapterConfig; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pjrlhf.no_such_name


# ---- a model in a notebook


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_users.save_base(tmp_path_factory.mktemp("base"))
    return pjrlhf.load_model(folder, adapter=pjrlhf.AdapterConfig(rank=2, alpha=4.0))


@pytest.fixture(scope="module")
def bank(model):
    import jax

    bank = pjrlhf.init_bank(model.backbone.base, model.backbone.adapter, 2, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), bank)


PROMPTS = ["what is rain ?", "where is the sun ?"]


def test_answers_do_not_depend_on_the_other_prompts(model, bank):
    mix = [[1.0, 0.0], [0.25, 0.75]]
    both = model.generate(PROMPTS, bank, mix, max_new_tokens=5)
    alone = [model.generate([p], bank, [m], max_new_tokens=5)[0] for p, m in zip(PROMPTS, mix, strict=True)]
    assert both == alone and all(isinstance(text, str) for text in both)


def test_a_row_of_zeros_is_the_base_and_one_row_serves_all(model, bank):
    base = model.score(PROMPTS, ["it can shine .", "it can grow ."])
    np.testing.assert_array_equal(model.score(PROMPTS, ["it can shine .", "it can grow ."], bank, [0.0, 0.0]), base)
    one = model.score(PROMPTS, ["it can shine .", "it can grow ."], bank, [0.5, 0.5])
    rows = model.score(PROMPTS, ["it can shine .", "it can grow ."], bank, [[0.5, 0.5]] * 2)
    np.testing.assert_allclose(one, rows, rtol=1e-6)
    assert (one != base).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (["rain"] * 2, "bank", [1.0]),
            r"mix: has shape \[1, 1\]; give 2 weights, or 2 for each of the 2",
        ),
        ((["rain"] * 2, "bank", [[1.0, 0.0]] * 3), r"mix: has shape \[3, 2\]"),
        ((["rain"], None, [1.0]), "mix: has no bank to mix"),
        ((["rain"], "bank", [float("nan"), 1.0]), "mix: is not a list of finite numbers"),
        ((["rain"], "bank", [10**400, 1.0]), "mix: is not a list of finite numbers"),
        ((["rain"], "bank", ["a", 1.0]), "mix: is not a list of finite numbers"),
        ((["rain " * 100], None, None), "tokens do not fit the context of 40"),
    ],
)
def test_mistakes_are_named(model, bank, arguments, message):
    prompts, which, mix = arguments
    with pytest.raises(UserError, match=message):
        model.generate(prompts, bank if which else None, mix)


SYSTEM, ASKED, ANSWER = (
    {"role": role, "content": text}
    for role, text in (("system", "be kind ."), ("user", PROMPTS[0]), ("assistant", "it holds air ."))
)


def test_conversations_are_answered(model):
    talk = [SYSTEM, ASKED, ANSWER, {"role": "user", "content": PROMPTS[1]}]
    parts = [*talk[:-1], {"role": "user", "content": [{"type": "text", "text": PROMPTS[1]}]}]
    answers = model.generate([talk, PROMPTS[0], [ASKED]], max_new_tokens=5)
    assert (
        answers[0] == model.generate([parts], max_new_tokens=5)[0] == model.generate([tuple(talk)], max_new_tokens=5)[0]
    )
    assert model.score([talk], ["it can grow ."]) != model.score([talk[-1:]], ["it can grow ."])
    assert model.generate([]) == [] and len(model.score([], [])) == 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PROMPTS[0], r"prompts: is a single prompt; give a list of prompts, as \[prompt\]"),
        ([SYSTEM, ASKED], "prompts: is a single prompt"),
        ([PROMPTS[0], [ASKED, ANSWER]], "prompt 2: prompt ends with the assistant .*; correct it"),
        ([[]], "prompt 1: empty prompt"),
        ([[{"role": "user", "content": " "}]], "prompt 1: empty user message in prompt"),
        ([[{"content": "what"}]], "prompt 1: prompt is not a conversation .*every message needs a role"),
        (
            [[{"role": "user", "content": 1}]],
            "prompt 1: prompt is not a conversation .*the content of a message is a int",
        ),
        ([[{"role": "user", "content": [{"type": "image"}]}]], "prompt 1: prompt has a content part of type 'image'"),
        ([None], "prompt 1: prompt is not text"),
        ([PROMPTS[0], "what \udcff"], "prompt 2: not UTF-8"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(model, prompts, message):
    for ask in (model.generate, lambda prompts: model.score(prompts, ["it can grow ."] * len(prompts))):
        with pytest.raises(UserError, match=message):
            ask(prompts)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "prompt 1.*: refused by the chat template .*alternate"),
        ("{{ messages[0].nothing.more }}", "prompt 1.*: refused by the chat template"),
        (None, "prompt: is a conversation, and the tokenizer has no chat template; add chat_template"),
    ],
)
def test_a_prompt_that_the_template_refuses_is_named(tmp_path, template, message):
    folder = tiny_users.save_base(tmp_path)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    refusing = pjrlhf.load_model(folder)
    with pytest.raises(UserError, match=message):
        refusing.generate([[ASKED]])
    with pytest.raises(UserError, match=message):
        refusing.score([[ASKED]], ["it can grow ."])


@pytest.mark.parametrize("limit", [0, -5])
def test_an_answer_has_at_least_one_token(model, limit):
    with pytest.raises(UserError, match=f"max_new_tokens {limit}: below 1"):
        model.generate(PROMPTS, max_new_tokens=limit)


def test_an_answer_that_is_too_long_is_told_how_long_it_may_be(model):
    with pytest.raises(UserError, match=r"ask for \d+ at most") as refused:
        model.generate(PROMPTS, max_new_tokens=1000)
    assert model.generate(PROMPTS, max_new_tokens=int(str(refused.value).split()[-3]))
    room = model.backbone.model.config.max_length
    assert model.generate(["what is rain ? " * ((room - 9) // 4)])[0], "the default is what the context leaves"


def test_answers_are_as_many_as_prompts_and_have_tokens(model):
    with pytest.raises(UserError, match="answers: there are 1 for 2 prompts"):
        model.score(PROMPTS, ["it can grow ."])
    with pytest.raises(UserError, match="prompt 2 and its answer: answer without tokens"):
        model.score(PROMPTS, ["it can grow .", ""])


def test_a_file_that_is_no_bank(tmp_path):
    from pjrlhf.models.storage import save_tree

    save_tree(tmp_path / "bank.safetensors", {"a": np.zeros(1)})
    with pytest.raises(UserError, match="is not an adapter bank; name"):
        pjrlhf.load_bank(tmp_path)


# ---- the command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from pjrlhf.cli import main; main()", *arguments], capture_output=True, text=True
    )


def test_the_command_says_what_it_can_do_without_loading_jax():
    code = (
        "import sys, atexit; atexit.register(lambda: print('jax' in sys.modules)); from pjrlhf.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    assert all(verb in done.stdout for verb in ("train", "merge", "report"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("report", "nowhere"),
            "error: nowhere/report: no summary.json; name the directory of a run whose stage of evaluation has ended",
        ),
        (("merge", "nowhere", "--weights", "1", "--output", "out"), "error: nowhere: .*"),
        (
            ("merge", "nowhere", "--weights", "1", "2", "--output", "out"),
            "error: --weights: 2 weights for 1 ingredient; give one finite number per ingredient",
        ),
        (("trian",), "; did you mean train?"),
        (("serve", "runs/soups"), "error: unrecognized arguments: runs/soups; did you mean --run runs/soups?"),
        (("users", "list", "--rnu", "runs/soups"), "required: --run; did you mean --run?"),
        (
            ("generate", "--run", "x", "--mixture", "P1A", "hi"),
            "unrecognized arguments: --mixture; did you mean --mix?",
        ),
    ],
)
def test_mistakes_of_the_command_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line.startswith("error: ") and message.removesuffix(".*") in line


def test_a_mistake_of_training_is_one_line():
    done = command("train")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("error: --config: not given; for example --config=soups")


def test_a_config_of_ones_own_begins_with_one_that_comes_with_the_package(tmp_path):
    lines = ("import pjrlhf", "def get_config():", "  config = pjrlhf.load_config('soups')")
    lines += ("  config.seed = 7", "  return config")
    (tmp_path / "mine.py").write_text("\n".join(lines))
    config = pjrlhf.load_config(str(tmp_path / "mine.py"))
    assert config.seed == 7 and config.stages == pjrlhf.load_config("soups").stages
    with pytest.raises(UserError, match="did you mean soups:hf, which comes with the package"):
        pjrlhf.load_config("configs/soup.py:hf")
