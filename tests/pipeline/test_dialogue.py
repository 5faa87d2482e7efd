"""A whole run on requests that are conversations: fine-tuning, comparisons, rewards, policies, evaluation, export."""

import json

import pytest
from support import tiny, tiny_users
from support.pages import Page

import pjrlhf
from pjrlhf.data import synthetic
from pjrlhf.data.messages import Conversation

pytestmark = pytest.mark.slow

SYSTEM = {"role": "system", "content": "be kind ."}
SEEN = []  # prompts that the reward function got


def conversations():
    """Requests of every form: text, a system turn, earlier turns, a variable of the template."""
    for i, text in enumerate(synthetic.prompts()[:40]):
        asked = {"role": "user", "content": text}
        earlier = [
            {"role": "user", "content": "what is rain ?"},
            {"role": "assistant", "content": "it <b>can</b> burn ."},
        ]
        yield {"prompt": [text, [SYSTEM, asked], [*earlier, asked], [SYSTEM, *earlier, asked]][i % 4]}
    yield {"messages": [SYSTEM, asked, earlier[1]], "chat_template_kwargs": {"style": "plain"}}


def rewarded(prompts, completions):
    """Minus the number of words; keeps the prompts, and spoils them as other people's code may."""
    for prompt in prompts:
        SEEN.append(prompt if isinstance(prompt, str) else [dict(message) for message in prompt])
        if isinstance(prompt, list):
            prompt[-1]["content"] = "spoilt"
            prompt.clear()
    return [-float(len(text.split())) for text in completions]


def settings(folder, **changes):
    config = tiny.settings(
        objectives=("P2A", "P2B"),
        general="",
        data__max_prompt=45,
        model__max_length=64,
        comparisons__pairs=16,
        reward__batch_size=2,
        sft__steps=30,
        policy__steps=2,
        stages=("sft", "comparisons", "reward", "policy", "evaluate"),
        **changes,
    )
    path = tiny_users.write_records(folder / "prompts.jsonl", list(conversations()))
    with config.ignore_type():
        config.data.prompts = {"kind": "jsonl", "path": path}
        config.rewards = {"P2A": f"{__name__}:rewarded"}
        config.judge = {"P2A": "short", "P2B": "long"}
    return config


@pytest.fixture(scope="module")
def talked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talked")
    # The template does not know the variable of the last record, which is left out.
    return tiny.run(folder / "run", settings(folder, data__max_bad_fraction=0.1))


def test_rewards_get_prompts_as_their_records_have_them(talked):
    given = [record["prompt"] for record in conversations() if "prompt" in record]
    assert SEEN and all(prompt in given for prompt in SEEN)
    assert {isinstance(prompt, str) for prompt in SEEN} == {True, False}


def test_files_keep_conversations(talked):
    pairs = [json.loads(line) for line in (talked / "comparisons" / "comparisons.jsonl").read_text().splitlines()]
    assert any(len(pair["request"]) > 2 and pair["request"] == pair["prompt"] for pair in pairs)
    answers = [json.loads(line) for line in (talked / "report" / "answers.jsonl").read_text().splitlines()]
    assert any(isinstance(one["prompt"], list) for one in answers)
    assert all("spoilt" not in json.dumps(one) for one in (*pairs, *answers))


def test_the_report_shows_the_turns(talked):
    text = (talked / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    shown = "".join(page.text)
    assert ("ol", {"class": "dialogue"}) in page.tags or "it <b>can</b> burn ." not in shown
    assert "<b>can</b>" not in text


def test_the_export_answers_conversations(talked):
    model = pjrlhf.load_model(talked / "sft" / "model")
    prompts = [record["prompt"] for record in conversations() if "prompt" in record][:4]
    answers = model.generate(prompts, max_new_tokens=6)
    assert answers == [model.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert model.generate([Conversation(prompts[3])], max_new_tokens=6) == answers[3:]


@pytest.mark.slow
def test_a_second_run_of_the_same_gives_the_same(talked, tmp_path):
    again = tiny.run(tmp_path / "run", settings(tmp_path, data__max_bad_fraction=0.1))
    for name in ("comparisons/comparisons.jsonl", "report/answers.jsonl"):
        assert (again / name).read_bytes() == (talked / name).read_bytes()
