"""Writers: what they may read of a person, what they make of it, and the mistakes of public code."""

import collections
import dataclasses
import itertools
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, tiny_users
from support.chat_server import ChatServer

from pjrlhf.algorithms.pdpo_settings import EntrySettings
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError
from pjrlhf.feedback.history import History, by_similarity, with_history
from pjrlhf.feedback.writers.answers import Answers
from pjrlhf.feedback.writers.attributes import Attributes, choose
from pjrlhf.feedback.writers.base import Writer
from pjrlhf.feedback.writers.fewshot import FewShot
from pjrlhf.feedback.writers.hindsight import Hindsight, likelihood
from pjrlhf.feedback.writers.identity import Identity
from pjrlhf.feedback.writers.kinds import kinds, writer
from pjrlhf.feedback.writers.profile import Profile
from pjrlhf.objectives.preference import pairwise_loss, sft_term
from pjrlhf.pipeline import stages
from pjrlhf.runtime.inputs import fingerprints
from pjrlhf.settings import parse
from pjrlhf.training.workdir import Workdir

PEOPLE = ("ann", "bob", "cleo")
PROMPTS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that draws; nothing is trained."""
    return tiny.start(tmp_path_factory.mktemp("run"), tiny_users.settings())


def comparison(user, prompt, part, held_out=None, **extra):
    """One with answers that say whose they are, and on which prompt of which part."""
    sides = {side: f"{side} of {user} on {part} {prompt}" for side in ("chosen", "rejected")}
    where = f"{part} {user} {prompt}"
    return Example(prompt=f"{part} {prompt}", user_id=user, held_out=held_out, extra=extra, where=where, **sides)


@pytest.fixture
def parts():
    train = [comparison(user, i, "train") for user in PEOPLE for i in range(PROMPTS)]
    held = [comparison(user, i, "held") for user in PEOPLE for i in range(6)]
    new = [comparison(f"new {user}", i, "new", held_out=i >= PROMPTS // 2) for user in PEOPLE for i in range(PROMPTS)]
    return {"train": train, "heldout": held, "new_users": new}


class Reader:
    """In the place of `write`: notes what a writer could read, and writes its number."""

    def __init__(self, patch, kind):
        self.seen = []
        patch.setattr(kind, "write", lambda _, known, run: self(known))

    def __call__(self, known):
        first = len(self.seen)
        self.seen += known
        return [f"[{first + i}]" for i in range(len(known))]

    def of(self, example):
        """What could be read for a record."""
        return self.seen[int(re.match(r"\[(\d+)\]", example.prompt)[1])]


@pytest.mark.parametrize("kind", kinds().values(), ids=kinds())
def test_writers_read_known_comparisons_of_the_person_alone(run, parts, kind, monkeypatch):
    """None that is held out, and none on the prompt that is asked."""
    reader = Reader(monkeypatch, kind)
    monkeypatch.setattr(kind, "ask", Writer.ask)
    found = with_history(parts, History(count=3, writer=kind()), run)
    for name, examples in found.items():
        for before, told in zip(parts[name], examples, strict=True):
            known = reader.of(told)
            assert known.person == (before.user_id if name != "new_users" else None)
            assert known.example.user_id == before.user_id
            assert len(known.shots) == (3 if kind.reads else 0)
            for shot in known.shots:
                assert shot.example.user_id == before.user_id
                assert shot.example.prompt != before.prompt
                assert shot.example.prompt.startswith("new" if name == "new_users" else "train")
                assert not shot.example.held_out
            assert told.prompt.endswith(f"\n{before.prompt}") and told.chosen == before.chosen
    texts = [len({e.prompt.split("\n")[0] for e in found["heldout"] if e.user_id == user}) for user in PEOPLE]
    assert texts == [1 if kind.once else 6] * 3, "what is expensive is written once for a person"


def test_ties_are_not_read(run, monkeypatch):
    train = [comparison("ann", i, "train") for i in range(4)]
    ties = [Example(prompt="p", chosen="a", rejected="b", user_id="ann", preference=0.5)]
    reader = Reader(monkeypatch, FewShot)
    with_history({"train": train + ties, "heldout": []}, History(count=9), run)
    assert {shot.example.prompt for known in reader.seen for shot in known.shots} == {f"train {i}" for i in range(4)}


def test_what_is_written_once_comes_from_other_prompts_in_training(run, parts, monkeypatch):
    reader = Reader(monkeypatch, Attributes)
    found = with_history(parts, History(count=PROMPTS, writer=Attributes()), run)
    for user in PEOPLE:
        own = [example for example in found["train"] if example.user_id == user]
        assert len({example.prompt.split("\n")[0] for example in own}) == 2
        read = [{shot.example.prompt for shot in reader.of(example).shots} for example in own]
        assert all(len(prompts) == PROMPTS // 2 for prompts in read)
    held = reader.of(found["heldout"][0])
    assert len(held.shots) == PROMPTS, "outside training all that is known counts"


def test_the_number_of_comparisons_is_the_setting_and_fewer_are_the_first_of_more(run, parts):
    lines = {}
    for count in (1, 2, 5, 100):
        history = History(count=count, writer=FewShot(template="{prompt}: {chosen} > {rejected}"))
        lines[count] = [e.prompt.split("\n") for e in with_history(parts, history, run)["heldout"]]
        assert {len(one) - 1 for one in lines[count]} == {min(count, PROMPTS)}
    for few, many in itertools.pairwise(lines.values()):
        assert all(b[: len(a) - 1] == a[:-1] for a, b in zip(few, many, strict=True))


def test_varied_numbers_of_comparisons_in_training_alone(run):
    train = [comparison("ann", i, "train") for i in range(300)]
    held = [comparison("ann", i, "held") for i in range(20)]
    history = History(count=3, varied=True, writer=Answers(template="{chosen}"))
    found = with_history({"train": train, "heldout": held}, history, run)
    numbers = collections.Counter(example.prompt.count("\n") for example in found["train"])
    assert set(numbers) == {0, 1, 2, 3} and min(numbers.values()) > 45
    assert {example.prompt.count("\n") for example in found["heldout"]} == {3}
    assert EntrySettings(history=3, varied=True).trained_texts["history"].varied


@pytest.mark.parametrize("kind", [kind for kind in kinds().values() if kind.reads], ids=lambda kind: kind.__name__)
def test_without_comparisons_a_prompt_stands_alone(run, parts, kind):
    end = " Good:" if kind is Hindsight else ""
    found = with_history(parts, History(count=0, writer=kind()), run, only=("heldout",))["heldout"]
    assert [one.prompt for one in found] == [one.prompt + end for one in parts["heldout"]]


# ---- fewshot


def test_the_place_of_an_answer_tells_nothing_and_its_verdict_everything(run):
    train = [comparison("ann", i, "train") for i in range(200)]
    found = with_history({"train": train, "heldout": []}, History(count=1), run)["train"]
    firsts = []
    for example in found:
        _, first, second, _ = example.prompt.split("\n")
        firsts.append(first.startswith("Preferred: chosen of ann"))
        assert {first.split(" of ann")[0], second.split(" of ann")[0]} == {
            "Preferred: chosen",
            "Not preferred: rejected",
        }
    assert 0.35 < np.mean(firsts) < 0.65


def test_reversed_labels_change_verdicts_and_nothing_else(run, parts):
    plain = with_history(parts, History(count=3), run)
    flipped = with_history(parts, History(count=3, flipped=True), run)
    assert plain["train"] == flipped["train"]
    swap = {"Preferred": "Not preferred", "Not preferred": "Preferred"}
    for part in ("heldout", "new_users"):
        for one, other in zip(plain[part], flipped[part], strict=True):
            told = re.sub("^(Preferred|Not preferred)", lambda m: swap[m[0]], one.prompt, flags=re.MULTILINE)
            assert told == other.prompt and one.chosen == other.chosen


def test_somebody_elses_text_is_that_of_one_other_person(run, parts):
    history = History(count=2, writer=Answers(template="{chosen}"), others=True)
    found = with_history(parts, history, run)
    whose = collections.defaultdict(set)
    for example in found["heldout"]:
        whose[example.user_id] |= set(re.findall(r"chosen of (\w+) on train", example.prompt))
    assert all(len(names) == 1 and user not in names for user, names in whose.items())
    assert {name for names in whose.values() for name in names} == set(PEOPLE)
    assert all(f"chosen of {e.user_id} on" in e.prompt for e in found["train"])


def test_a_text_of_one_part_does_not_depend_on_the_others(run, parts):
    history = History(count=3)
    alone = with_history(parts, history, run, only=("new_users",))
    assert list(alone) == ["new_users"] and alone["new_users"] == with_history(parts, history, run)["new_users"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "{prompt}"}, "template: does not tell preferred and other answers apart"),
        ({"template": "{first} {second}"}, "template: does not tell preferred and other answers apart"),
        ({"template": "{chosen} {other}"}, "template: cannot be filled in .*its fields are {prompt}, {chosen}"),
        ({"verdicts": ("x", "x")}, "verdicts: .* are not two different texts"),
    ],
)
def test_bad_templates_of_comparisons(values, message):
    with pytest.raises(UserError, match=message):
        parse(FewShot, values)


# ---- retrieval


def test_the_most_similar_comes_first_and_ties_keep_their_order():
    others = np.array([[0.0, 1.0], [2.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert by_similarity(np.array([3.0, 0.0]), others).tolist() == [1, 3, 0, 4, 2]
    assert by_similarity(np.zeros(2), others).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", [FewShot, Answers, Attributes])
def test_what_is_read_is_most_like_what_is_asked(run, kind, monkeypatch):
    """The prompt that is asked is always the most similar one, and its own comparisons would tell the label."""
    words, asked = [f"prompt {i}" for i in range(8)], "now"
    drawn = dict(zip([*words, asked], np.random.default_rng(0).normal(1.0, 1.0, (9, 5)), strict=True))
    features = lambda run, prompts: np.array([drawn[prompt] for prompt in prompts])  # noqa: E731
    monkeypatch.setattr("pjrlhf.feedback.history.prompt_features", features)
    train = [dataclasses.replace(comparison("ann", i, "train"), prompt=words[i % 8]) for i in range(16)]
    parts = {"train": train, "heldout": [dataclasses.replace(comparison("ann", 0, "held"), prompt=asked)]}
    reader, mean = Reader(monkeypatch, kind), np.mean([drawn[word] for word in words], axis=0)
    found = with_history(parts, History(count=3, writer=kind(), similar=True), run)
    for before, told in zip(train + parts["heldout"], found["train"] + found["heldout"], strict=True):
        one = drawn[before.prompt] - mean
        likeness = {word: one @ (drawn[word] - mean) / np.linalg.norm(drawn[word] - mean) for word in words}
        likeness.pop(before.prompt, None)
        best = sorted(likeness, key=lambda word: -likeness[word])
        read = [shot.example.prompt for shot in reader.of(told).shots]
        assert read == [best[1], best[0], best[0]], "the most similar last, with both of its comparisons"


def test_similar_needs_comparisons():
    with pytest.raises(UserError, match="similar: there is nothing to choose from"):
        parse(EntrySettings, {"writer": "identity", "similar": True})
    assert parse(EntrySettings, {"history": 2, "similar": True}).read.similar


# ---- Chain of Hindsight


def test_answers_stand_after_the_phrase_that_fits_them(run):
    train = [comparison("ann", i, "train") for i in range(400)]
    held = [comparison("ann", i, "held") for i in range(50)]
    found = with_history({"train": train, "heldout": held}, History(count=1, writer=Hindsight()), run)
    forms = collections.Counter()
    for before, told in zip(train, found["train"], strict=True):
        _, asked = told.prompt.split("\n")
        good = told.chosen == before.chosen
        assert {told.chosen, told.rejected} == {before.chosen, before.rejected}
        own, other = ("Good:", "Bad:") if good else ("Bad:", "Good:")
        chained = f"{before.prompt} {other} {told.rejected} {own}"
        assert asked in (f"{before.prompt} {own}", chained)
        forms[good, asked == chained] += 1
    assert len(forms) == 4 and min(forms.values()) > 70, "both answers, both orders"
    for before, told in zip(held, found["heldout"], strict=True):
        assert told.prompt.endswith(f"\n{before.prompt} Good:"), "nothing of the pair itself"
        assert (told.chosen, told.rejected) == (before.chosen, before.rejected)


def test_the_loss_of_hindsight_is_the_likelihood_of_the_answer(tmp_path):
    logps, reference = jnp.array([[-8.0, -3.0], [-2.0, -9.0]]), jnp.array([[-7.0, -4.0], [-1.0, -1.0]])
    lengths = jnp.array([[4.0, 2.0], [3.0, 3.0]])
    name = f"{likelihood.function.__module__}:likelihood"

    def loss(logps):
        return pairwise_loss(name, logps, reference, 0.1, lengths=lengths).sum()

    want = jax.grad(lambda logps: sft_term(logps[0], lengths[0]).sum())(logps)
    np.testing.assert_allclose(jax.grad(loss)(logps), want, rtol=1e-6)
    config = tiny_users.settings(preference__loss=name)
    assert tiny.start(tmp_path, config).settings is not None


# ---- own answers, names


def test_own_answers_are_the_latest_of_the_training_part(run, parts):
    history = History(count=3, writer=Answers(template="{chosen}"))
    for example in with_history(parts, history, run)["heldout"]:
        told = example.prompt.split("\n")[:-1]
        assert told == [f"chosen of {example.user_id} on train {i}" for i in range(PROMPTS)[-3:]]


def test_a_person_never_trained_on_has_the_generic_tag(run, parts):
    history = History(count=0, writer=Identity(template="by {name}", generic="by anybody", generic_fraction=0.25))
    train = [comparison(user, i, "train") for user in PEOPLE for i in range(200)]
    found = with_history({**parts, "train": train}, history, run)
    assert all(e.prompt.startswith(f"by {e.user_id}\n") for e in found["heldout"])
    assert all(e.prompt.startswith("by anybody\n") for e in found["new_users"])
    generic = [e.prompt.startswith("by anybody\n") for e in found["train"]]
    assert 0.19 < np.mean(generic) < 0.31
    assert all(e.prompt.startswith((f"by {e.user_id}\n", "by anybody\n")) for e in found["train"])


def test_a_community_is_the_name_where_a_column_has_it(run):
    train = [comparison(user, i, "train", community="tea") for user in PEOPLE[:2] for i in range(3)]
    held = [comparison("ann", 0, "held", community="tea"), comparison("dave", 0, "held")]
    writer = Identity(template="r/{name}", generic="Reddit", generic_fraction=0.0, column="community")
    found = with_history({"train": train, "heldout": held}, History(count=0, writer=writer), run)
    assert {e.prompt.split("\n")[0] for e in found["train"]} == {"r/tea"}
    assert [e.prompt.split("\n")[0] for e in found["heldout"]] == ["r/tea", "Reddit"]


# ---- profiles by a language model


def whose(body):
    """The person whose comparisons a request shows; more than one would be a mistake."""
    (name,) = set(re.findall(r"chosen of ([\w ]+) on (?:train|new) ", body["messages"][-1]["content"]))
    return f"likes\n{name}"


def test_profiles_are_asked_once_for_each_half_and_kept(run, parts):
    pytest.importorskip("openai")
    server = ChatServer(whose)
    with server.running() as url:
        chat = {"kind": "chat", "model": "m", "base_url": url, "temperature": 0.0}
        history = History(count=4, writer=Profile(sampler=chat))
        found = with_history(parts, history, run)
        requests = len(server.bodies)
        assert hash(history) == hash(History(count=4, writer=Profile(sampler=chat)))
    for examples in found.values():
        assert all(e.prompt.startswith(f"About the person: likes {e.user_id}\n") for e in examples)
    # Two halves of the known prompts of six people, and all of them for other prompts.
    assert requests == 18
    asked = [body["messages"][-1]["content"] for body in server.bodies]
    assert not any("on held" in text or "on new 6" in text for text in asked)
    assert all(text.count("Not preferred: rejected of") in (3, 4) for text in asked)
    replayed = History(count=4, writer=Profile(sampler={**chat, "replay": True}))
    assert with_history(parts, replayed, run) == found  # the server is gone


def test_an_empty_profile_is_no_text(run, parts, monkeypatch):
    monkeypatch.setattr(
        "pjrlhf.feedback.writers.profile.sampler", lambda run, spec: lambda asked, *_: [""] * len(asked)
    )
    found = with_history(parts, History(count=2, writer=Profile()), run)
    assert found["heldout"] == parts["heldout"]


def test_differences_name_what_others_chose_between_the_same_answers(run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pjrlhf.feedback.writers.profile.sampler",
        lambda run, spec: lambda requests, *_: asked.extend(requests) or ["x"] * len(requests),
    )
    sides = {"ann": ("tea", "beer"), "bob": ("beer", "tea"), "cleo": ("tea", "beer")}
    train = [
        Example(prompt=f"drink {i}", chosen=a, rejected=b, user_id=user) for user, (a, b) in sides.items() for i in "12"
    ]
    held = [Example(prompt="h", chosen="beer", rejected="tea", user_id="bob")]
    parts = {"train": train, "heldout": held}
    with_history(parts, History(count=2, writer=Profile(instruction="differences")), run, only=("heldout",))
    assert len(asked) == 1 and asked[0].count("- 2 of them preferred: tea") == 2


# ---- attributes by likelihood


def test_greedy_choice_of_attributes():
    # One attribute: chosen where it makes the choices likelier than chance, for a logistic likelihood where sum > 0.
    assert choose(np.array([[2.0], [-1.0]]), 1, 1.0) == []  # log s(2) + log s(-1) < 2 log s(0)
    assert choose(np.array([[2.0], [-0.1]]), 1, 1.0) == [0]
    # Each of two attributes explains half of the choices; the third repeats the first.
    shifts = np.array([[1.0, 0.0, 0.9], [0.0, 0.8, 0.0]])
    assert choose(shifts, 3, 1.0) == [0, 1, 2] and choose(shifts, 2, 1.0) == [0, 1]
    # Never worse than nothing or any single attribute.
    rng = np.random.default_rng(0)
    for _ in range(20):
        shifts = rng.normal(size=(6, 2))
        value = {
            subset: -np.logaddexp(0, -shifts[:, list(subset)].sum(1)).sum()
            for size in range(3)
            for subset in itertools.combinations(range(2), size)
        }
        found = tuple(sorted(choose(shifts, 2, 1.0)))
        assert value[found] >= max(value[()], value[(0,)], value[(1,)])


def test_an_attribute_that_makes_all_answers_likelier_is_not_chosen(run, monkeypatch):
    """A base with known log-probs: an attribute adds a bonus to the answers it names; "well" to all answers."""
    bonus = {"tea": ("tea",), "beer": ("beer",), "well": ("tea", "beer")}
    likes = {"ann": ("tea", "beer"), "bob": ("beer", "tea")}
    train = [
        Example(prompt=f"drink {i}", chosen=a, rejected=b, user_id=user, where=f"{user} {i}")
        for user, (a, b) in likes.items()
        for i in range(6)
    ]
    held = [Example(prompt="now", chosen=a, rejected=b, user_id=user) for user, (a, b) in likes.items()]
    scored = []

    def reference(table, rows):
        words = [text_after(example) for example in table.examples]
        scored.append(len(words))
        sides = [[example.chosen, example.rejected] for example in table.examples]
        return np.array(
            [[-5.0 + 9.0 * (a in bonus.get(w, ())) for a in two] for w, two in zip(words, sides, strict=True)]
        )

    def text_after(example):
        return re.sub(r"^drink \d+ ?", "", str(example.prompt))

    class Table:
        def __init__(self, examples):
            self.examples = tuple(examples)

    monkeypatch.setattr(run, "reference", reference)
    monkeypatch.setattr(run.text, "tokenized", lambda examples, lengths, name: Table(examples))
    monkeypatch.setattr(run.records, "ask", lambda request, words="": f"{request} {words}".strip())
    writer = Attributes(attributes=("well", "beer", "tea"), most=2)
    found = with_history({"train": train, "heldout": held}, History(count=4, writer=writer), run)
    assert [e.prompt for e in found["heldout"]] == ["tea\nnow", "beer\nnow"]
    assert all(e.prompt.startswith(f"{likes[e.user_id][0]}\n") for e in found["train"])
    flipped = with_history({"train": train, "heldout": held}, History(count=4, writer=writer, flipped=True), run)
    assert [e.prompt for e in flipped["heldout"]] == ["beer\nnow", "tea\nnow"]


# ---- settings


class Nearest(Writer):
    """A writer of other code."""

    def write(self, known, base):
        return [f"{len(one.shots)} known" for one in known]


def test_a_writer_of_other_code(run, parts):
    found = writer({"kind": f"{__name__}:Nearest"})
    assert isinstance(found, Nearest)
    told = with_history(parts, History(count=3, writer=found), run)
    assert {e.prompt.split("\n")[0] for e in told["heldout"]} == {"3 known"}


def test_the_toy_of_the_page_is_a_writer(run, parts, tmp_path, monkeypatch):
    page = pathlib.Path(__file__).parents[2] / "docs" / "user_models.md"
    *_, code = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "my_writers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    history = History(count=3, writer=writer("my_writers:Count"))
    monkeypatch.delitem(sys.modules, "my_writers")
    told = with_history(parts, history, run, only=("heldout",))["heldout"]
    assert {e.prompt.split("\n")[0] for e in told} == {"About 6 words."}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fewshots", "kind 'fewshots' is unknown; did you mean 'fewshot'"),
        ({"count": 3}, "kind None is unknown; choose one of answers, attributes"),
        ("pjrlhf.data.schema:Example", "is no writer; derive it from"),
        ({"kind": "answers", "template": "{prompt}"}, r"writer.template: has no \{chosen\}"),
        ({"kind": "identity", "template": "x"}, r"writer.template: has no \{name\}"),
        ({"kind": "hindsight", "bad": "Good:"}, "writer.good, bad: .* do not tell answers apart"),
        ({"kind": "attributes", "attributes": ("a", "a")}, "writer.attributes: one is empty or comes twice"),
        ({"kind": "profile", "instruction": "who"}, r"writer.instruction: has no \{comparisons\}"),
        ({"kind": "profile", "sampler": {"kind": "chat"}}, "writer.sampler: sampler: names no model"),
    ],
)
def test_bad_writers_are_refused_when_the_config_is_read(spec, message):
    with pytest.raises(UserError, match=f"models.x.*{message}"):
        parse(EntrySettings, {"writer": spec, "history": 2}, "models.x")


@pytest.mark.parametrize("form", [lambda path: path, lambda path: {"kind": "model", "path": path}])
def test_the_model_of_a_profile_is_an_input_of_the_run(tmp_path, form):
    def config(path):
        told = {"kind": "uniform", "history": 2, "writer": {"kind": "profile", "sampler": form(path)}}
        return stages.read(tiny_users.settings(preference__models={"told": told}))

    with pytest.raises(UserError, match=r"preference\.models\.told\.writer\.sampler\.path: nowhere: no such file"):
        config("nowhere").check_inputs(Workdir(tmp_path / "run"))
    path = str(tiny_users.save_base(tmp_path))
    found = fingerprints(config(path).values(), tmp_path / "run")
    assert [one["path"] for key, one in found.items() if key.startswith("preference.models.told.writer")] == [path]


def test_a_writer_without_anything_to_read():
    with pytest.raises(UserError, match=r"history: writer 'profile' has nothing to read; set it to 1 or more"):
        parse(EntrySettings, {"writer": "profile"}, "models.x")
    assert parse(EntrySettings, {"writer": "identity"}).read.count == 0
    assert EntrySettings().read is None and EntrySettings(history=2).read.writer == FewShot()
