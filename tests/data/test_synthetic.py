"""The synthetic environment: a truth that never changes, an exact judge, and a corpus inside the vocabulary."""

import hashlib
import importlib.util
import itertools
import pathlib
import random

import pytest
from support.encoding import encode_pair

from pjrlhf.data import synthetic
from pjrlhf.data.batching import split_by
from pjrlhf.data.preferences import combinations, sentences
from pjrlhf.data.tokenization import load_tokenizer

PROMPT = "tell me about sun ."


def fact(topic, aspect, specialist=False, wrong=0):
    """The statement of a fact; `wrong` counts values away from the true one."""
    templates, values = synthetic.ASPECTS[aspect]
    words = values.split()
    index = (synthetic.truth(topic, aspect) + wrong) % len(words)
    return templates[specialist].format(words[index].split("/")[specialist])


def score(criterion, *statements, preferences=synthetic.PREFERENCES):
    return synthetic.score(PROMPT, " ".join(statements), criterion, preferences=preferences)


def score16(criterion, *statements):
    return score(criterion, *statements, preferences=synthetic.PREFERENCES16)


PLAIN = [fact("sun", aspect) for aspect in synthetic.ASPECTS]
EXPERT = [fact("sun", aspect, specialist=True) for aspect in synthetic.ASPECTS]
WRONG = [fact("sun", aspect, wrong=1) for aspect in synthetic.ASPECTS]
KIND, RUDE = synthetic.FRIENDLY[0], synthetic.UNFRIENDLY[0]


@pytest.fixture(scope="module", params=synthetic.ENVIRONMENTS)
def environment(request):
    return request.param


@pytest.fixture(scope="module")
def preferences(environment):
    return synthetic.ENVIRONMENTS[environment]


def test_the_truth_is_fixed_for_all_time():
    pinned = {"sun": (1, 0, 0, 1), "salt": (0, 4, 1, 6), "bee": (2, 3, 6, 5)}
    for topic, values in pinned.items():
        assert tuple(synthetic.truth(topic, aspect) for aspect in synthetic.ASPECTS) == values
    assert fact("sun", "substance") == "it holds sugar ." and fact("sun", "deed", True) == "it exhibits proliferation ."


def test_requests_name_their_topic():
    prompts = synthetic.prompts()
    assert len(prompts) == len(set(prompts)) == len(synthetic.TOPICS) * len(synthetic.REQUESTS) == 192
    for i, prompt in enumerate(prompts):
        assert synthetic.topic_of(prompt) == synthetic.TOPICS[i // len(synthetic.REQUESTS)]
    assert synthetic.topic_of("tell me about philosophy .") is None


def test_the_larger_environment_has_sixteen_personas():
    plain, larger = synthetic.PREFERENCES, synthetic.PREFERENCES16
    assert len(combinations(plain, plain)) == 8 and len(combinations(larger, larger)) == 16
    assert list(larger)[:6] == list(plain) and all(larger[name] == plain[name] for name in plain)
    assert [larger[name].label for name in ("P3C", "P3D")] == ["sassy", "sarcastic"]
    assert synthetic.tones(larger) == synthetic.TONES and list(synthetic.tones(plain)) == ["P3A", "P3B"]


def test_the_plain_environment_never_changes():
    """Published results depend on it."""

    def digest(thing):
        return hashlib.sha256(repr(thing).encode()).hexdigest()[:16]

    made = records(0, 50)
    judged = [
        synthetic.score(r["prompt"], r["completion"], name)
        for r in made
        for name in (*synthetic.PREFERENCES, "helpful")
    ]
    assert digest(synthetic.vocabulary()) == "602efec10f223ea4"
    assert digest(made) == "0bf0cf10ffa8deb6"
    assert digest([round(1e6 * value) for value in judged]) == "c9a97acbe6548fa8"


# ---- the judge


def test_parse_counts():
    text = " ".join([KIND, PLAIN[0], EXPERT[1], WRONG[2], WRONG[2], RUDE, "it holds", "my head"])
    words = text.split()
    assert synthetic.parse(PROMPT, text) == {
        "plain": 3,
        "specialist": 1,
        "true": 2,
        "false": 1,
        "aspects": 3,
        "friendly": 1,
        "unfriendly": 1,
        "sassy": 0,
        "sarcastic": 0,
        "words": len(words),
        "junk": 4 / len(words),
    }
    empty = synthetic.parse(PROMPT, "")
    assert empty.pop("junk") == 1 and not any(empty.values())
    assert synthetic.parse("tell me about philosophy .", PLAIN[0])["true"] == 0
    assert synthetic.parse(PROMPT, f"{KIND} {KIND}")["friendly"] == 1  # repeating a remark adds none
    assert synthetic.parse(PROMPT, f"{PLAIN[0]} {EXPERT[0]}")["aspects"] == 1
    assert synthetic.parse(PROMPT, PLAIN[0].replace(" .", ""))["junk"] == 1  # a statement ends with its mark
    for tone, remarks in synthetic.REMARKS.items():
        parsed = synthetic.parse(PROMPT, " ".join(remarks))
        assert {name: parsed[name] for name in synthetic.REMARKS} == {
            name: 5 * (name == tone) for name in synthetic.REMARKS
        }
        assert parsed["junk"] == 0


def test_one_more_fact():
    for count in range(1, 4):
        few, many = PLAIN[:count], PLAIN[: count + 1]
        assert score("P2B", *many) > score("P2B", *few)
        assert score("P2A", *many) < score("P2A", *few)
        for name in ("P1A", "P1B", "P3A", "P3B"):
            assert score(name, *many) == score(name, *few)
    assert score("helpful", *PLAIN[:2]) > score("helpful", PLAIN[0]) > score("helpful")
    assert score("helpful", *PLAIN[:2], WRONG[2]) < score("helpful", *PLAIN[:2]) == score("helpful", *PLAIN)
    assert score("P2B", PLAIN[0], EXPERT[0]) == score("P2B", PLAIN[0])  # the same aspect again


def test_one_more_specialist_word():
    for count in range(4):
        less, more = (EXPERT[:c] + PLAIN[c:] for c in (count, count + 1))
        assert score("P1B", *more) > score("P1B", *less)
        assert score("P1A", *more) < score("P1A", *less)
        assert score("P2B", *more) == score("P2B", *less)
    assert score("P1A", *PLAIN) == 1 and score("P1B", *EXPERT) == 1


def test_one_more_remark():
    for kind, rude in zip(synthetic.FRIENDLY, synthetic.UNFRIENDLY, strict=True):
        plain = PLAIN[0]
        assert score("P3A", kind, plain) > score("P3A", plain) > score("P3A", rude, plain)
        assert score("P3B", kind, plain) < score("P3B", plain) < score("P3B", rude, plain)
    assert score("P3A", *synthetic.FRIENDLY[:2]) == 1 == score("P3A", *synthetic.FRIENDLY)
    assert score("P3A", KIND, RUDE) == 0


@pytest.mark.parametrize("style", synthetic.TONES)
def test_one_more_remark_of_four_tones(style):
    own = synthetic.REMARKS[synthetic.TONES[style]]
    for other in (name for name in synthetic.TONES if name != style):
        for remark, foreign in zip(own, synthetic.REMARKS[synthetic.TONES[other]], strict=True):
            assert score16(style, remark, PLAIN[0]) > score16(style, PLAIN[0]) > score16(style, foreign, PLAIN[0])
            assert score16(style, remark, foreign) == 0 == score16(other, remark, foreign)
    assert score16(style, *own[:2]) == 1 == score16(style, *own)
    assert score16(style, *(remarks[0] for remarks in synthetic.REMARKS.values())) == -1  # one for it, three against
    assert score16(style, own[0], "sun sun sun sun .") < score16(style, own[0])


def test_criteria_of_both_environments_agree():
    for record in records(size=200):
        for name in (*synthetic.PREFERENCES, "helpful"):
            one, other = (
                synthetic.score(record["prompt"], record["completion"], name, w)
                for w in synthetic.ENVIRONMENTS.values()
            )
            assert one == other


PAIRS = {
    "P1": (PLAIN[:2], EXPERT[:2]),
    "P2": (PLAIN[:1], PLAIN),
    "P3": ([KIND, PLAIN[0]], [RUDE, PLAIN[0]]),
}


@pytest.mark.parametrize("dimension", PAIRS)
def test_opposite_preferences_rank_opposite(dimension):
    a, b = PAIRS[dimension]
    assert score(f"{dimension}A", *a) > score(f"{dimension}A", *b)
    assert score(f"{dimension}B", *a) < score(f"{dimension}B", *b)


@pytest.mark.parametrize("criterion", [*synthetic.PREFERENCES16, "helpful"])
def test_nonsense_lowers_every_score(criterion):
    good = [KIND, *PLAIN[:2]]
    assert score16(criterion, *good, "sun sun sun sun .") < score16(criterion, *good)
    least = min(score16(criterion, *PLAIN[:2]), score16(criterion, *EXPERT[:2]))
    assert score16(criterion, "moon moon moon .") < least
    assert score16(criterion) <= -1  # an empty answer
    assert -2.5 <= score16(criterion, *WRONG) <= 1


@pytest.mark.parametrize("criterion", ["P9Z", "P3C", "P3D"])
def test_an_unknown_criterion_is_an_error(criterion):
    with pytest.raises(KeyError):
        score(criterion, *PLAIN)


# ---- the corpus


def records(seed=0, size=2000, preferences=synthetic.PREFERENCES):
    return synthetic.corpus(synthetic.prompts(), size, seed, preferences=preferences)


def test_the_corpus_is_fixed_by_its_seed(preferences):
    assert records(1, 50, preferences) == records(1, 50, preferences) != records(2, 50, preferences)


def test_every_answer_of_the_corpus_has_known_statements_and_fits(preferences):
    lengths = set()
    for record in records(preferences=preferences):
        parsed = synthetic.parse(record["prompt"], record["completion"])
        assert parsed["junk"] == 0 and 0 < parsed["words"] <= synthetic.MAX_WORDS, record
        lengths.add(parsed["words"])
    assert max(lengths) >= 0.9 * synthetic.MAX_WORDS


def test_the_corpus_makes_mistakes_evades_and_mixes_but_not_always():
    parsed = [synthetic.parse(record["prompt"], record["completion"]) for record in records()]
    facts = [p for p in parsed if p["aspects"]]
    wrong = sum(p["false"] for p in facts) / sum(p["aspects"] for p in facts)
    assert 0.15 < wrong < 0.3
    assert abs(1 - len(facts) / len(parsed) - synthetic.Habits().evasion) < 0.03
    assert any(p["plain"] and p["specialist"] for p in facts)
    assert any(p["friendly"] for p in facts) and any(p["unfriendly"] for p in facts)


def test_half_of_the_prompts_state_a_preference(preferences):
    prompts = [record["prompt"] for record in records(preferences=preferences)]
    stated = [[name for name, p in preferences.items() if p.sentence in prompt] for prompt in prompts]
    assert 0.45 < sum(map(bool, stated)) / len(stated) < 0.55
    assert {len(names) for names in stated} == {0, 1, 2, 3}
    for names in stated:
        assert len({name[:2] for name in names}) == len(names)
    assert {name for names in stated for name in names} == set(preferences)


def test_every_tone_occurs_unprompted_and_the_new_ones_less_often(preferences):
    rng = random.Random(4)
    answers = [synthetic.answer(PROMPT, (), rng, preferences=preferences) for _ in range(3000)]
    parsed = [synthetic.parse(PROMPT, text) for text in answers]
    fraction = {tone: sum(p[tone] > 0 for p in parsed if p["aspects"]) / len(parsed) for tone in synthetic.REMARKS}
    spoken = [tone for tone in synthetic.REMARKS if fraction[tone]]
    assert spoken == list(synthetic.tones(preferences).values())
    for tone in spoken:
        assert abs(fraction[tone] - 0.8 * getattr(synthetic.Habits(), tone)) < 0.03  # the rest evades
    assert max(fraction["sassy"], fraction["sarcastic"]) < min(fraction["friendly"], fraction["unfriendly"])


BOTH = [
    pytest.param(name, preferences, id=f"{key}-{name}")
    for key, preferences in synthetic.ENVIRONMENTS.items()
    for name in preferences
]


@pytest.mark.parametrize(("name", "preferences"), BOTH)
def test_a_stated_preference_is_followed_imperfectly(name, preferences):
    """The judge prefers answers written for it, on average; writers who always obey do better still."""

    def mean(stated, obedience):
        rng, habits = random.Random(3), synthetic.Habits(obedience=obedience)
        answers = [synthetic.answer(PROMPT, stated, rng, habits, preferences) for _ in range(1500)]
        return sum(synthetic.score(PROMPT, text, name, preferences) for text in answers) / len(answers)

    usual = synthetic.Habits().obedience
    unstated, stated, obeyed = mean((), usual), mean((name,), usual), mean((name,), 1.0)
    assert unstated + 0.03 < stated < obeyed - 0.03


def test_prompts_split_without_overlap():
    prompts = synthetic.prompts()
    train, held = split_by(prompts, 0.25, 0)
    assert len(held) == 48 and len(train) == 144
    assert not {prompts[i] for i in train} & {prompts[i] for i in held}


# ---- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(preferences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "tokenizer"
    synthetic.write_tokenizer(folder, preferences)
    return load_tokenizer(folder)


def test_the_vocabulary_covers_the_language(tokenizer, preferences):
    words = synthetic.vocabulary(preferences)
    assert len(words) == len(set(words)) == tokenizer.vocab_size
    unknown = tokenizer.backend.unk_token_id
    texts = list(itertools.chain.from_iterable(record.values() for record in records(5, 500, preferences)))
    remarks = itertools.chain.from_iterable(synthetic.REMARKS[tone] for tone in synthetic.tones(preferences).values())
    for text in [*texts, *synthetic.prompts(), *PLAIN, *EXPERT, *remarks, *(p.label for p in preferences.values())]:
        ids = tokenizer.backend(text, add_special_tokens=False)["input_ids"]
        assert unknown not in ids and len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
    assert len({tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, unknown}) == 4


def test_the_larger_vocabulary_begins_with_the_plain_one():
    """A token keeps its id, and models of the plain environment cannot make a remark of the new tones."""
    plain, larger = (synthetic.vocabulary(preferences) for preferences in synthetic.ENVIRONMENTS.values())
    assert larger[: len(plain)] == plain and {"sassy", "sarcastic"} < set(larger[len(plain) :])
    for remark in (*synthetic.SASSY, *synthetic.SARCASTIC):
        assert not set(remark.split()) <= set(plain)


def test_the_chat_template_gives_one_bos_and_one_eos(tokenizer):
    request, answer = "what is rain ? be kind .", "hello dear friend ! it holds water ."
    messages = [{"role": "user", "content": request}]
    prompt = tokenizer.encode_prompt(messages)
    assert tokenizer.decode(prompt, skip_special=False) == f"<s> <user> {request} <assistant>"
    start, rest = encode_pair(tokenizer, messages, answer)
    assert start == prompt
    assert rest.count(tokenizer.eos_id) == 1 and rest[-1] == tokenizer.eos_id
    assert (start + rest).count(tokenizer.bos_id) == 1 and start[0] == tokenizer.bos_id
    assert tokenizer.decode(rest).strip() == answer


def test_prompts_and_answers_fit_the_lengths_of_the_shipped_config(tokenizer, preferences, environment):
    """Requests with one preference of each dimension, and answers with their EOS."""
    spec = importlib.util.spec_from_file_location("soups", pathlib.Path(__file__).parents[2] / "configs" / "soups.py")
    config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config)
    shipped = config.get_config({"synthetic": "synthetic", "synthetic16": "styles"}[environment])
    assert shipped.preferences == shipped.model.tokenizer == environment and shipped.objectives == tuple(preferences)
    data = shipped.data
    personas = combinations(preferences, preferences)
    for prompt, ids in itertools.product(synthetic.prompts(), personas):
        text = f"{prompt} {sentences(preferences, ids)}"
        assert len(tokenizer.encode_prompt([{"role": "user", "content": text}])) <= data.max_prompt
    longest = max(len(record["completion"].split()) for record in records(preferences=preferences))
    assert longest + 1 <= data.max_completion
