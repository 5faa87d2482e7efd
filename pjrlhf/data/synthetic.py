"""The synthetic environment: a small generated language whose answers differ along the three dimensions of
Personalized Soups (arXiv 2310.11564).

A request names a topic. An answer is a sequence of statements, and each ends with a punctuation mark. A statement is a
fact about the topic, in plain or in specialist words, or a friendly or unfriendly remark. All statements are known, so
any text can be judged exactly. The environment replaces a public instruction corpus and GPT-4 as a judge. Training code
treats it like any other data.

The larger environment has two more styles, sassy and sarcastic remarks, as in the scaling experiment of the paper.
Functions that differ between the two environments take their preferences.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from pjrlhf.data.messages import Prompt, text_of, with_words
from pjrlhf.data.preferences import Preference, Preferences, dimensions
from pjrlhf.data.tokenizer_files import write_folder

PREFERENCES: Preferences = {
    "P1A": Preference(dimension="expertise", sentence="use easy words .", label="easy"),
    "P1B": Preference(dimension="expertise", sentence="use expert words .", label="expert"),
    "P2A": Preference(dimension="informativeness", sentence="keep it short .", label="short"),
    "P2B": Preference(dimension="informativeness", sentence="tell me everything .", label="everything"),
    "P3A": Preference(dimension="style", sentence="be kind .", label="kind"),
    "P3B": Preference(dimension="style", sentence="be rude .", label="rude"),
}
# 2 x 2 x 4 = 16 personas.
PREFERENCES16: Preferences = {
    **PREFERENCES,
    "P3C": Preference(dimension="style", sentence="be sassy .", label="sassy"),
    "P3D": Preference(dimension="style", sentence="be sarcastic .", label="sarcastic"),
}
ENVIRONMENTS = {"synthetic": PREFERENCES, "synthetic16": PREFERENCES16}

TOPICS = [
    "sun",
    "rain",
    "wind",
    "snow",
    "river",
    "ocean",
    "stone",
    "sand",
    "tree",
    "flower",
    "grass",
    "seed",
    "cat",
    "dog",
    "horse",
    "bee",
    "bird",
    "fish",
    "bread",
    "milk",
    "cheese",
    "apple",
    "honey",
    "salt",
]

REQUESTS = (
    "tell me about {} .",
    "what is {} ?",
    "please explain {} .",
    "i want to know {} .",
    "describe {} for me .",
    "how does {} work ?",
    "why do we have {} ?",
    "teach me about {} .",
)

# aspect -> ((plain template, specialist template), values as (plain word, specialist word))
ASPECTS = {
    "substance": (
        ("it holds {} .", "it comprises {} ."),
        "water/hydrate sugar/glucose rock/silicate air/nitrogen dust/particulate fat/lipid iron/ferrite",
    ),
    "place": (
        ("it is near {} .", "it inhabits {} ."),
        "fields/grassland hills/uplands woods/silva shores/littoral towns/conurbation caves/hypogea ponds/lentic",
    ),
    "deed": (
        ("it can {} .", "it exhibits {} ."),
        "grow/proliferation move/locomotion shine/luminescence melt/liquefaction burn/combustion "
        "float/buoyancy spread/diffusion",
    ),
    "use": (
        ("it helps {} .", "it facilitates {} ."),
        "eating/nutrition play/recreation health/homeostasis sleep/repose warmth/thermogenesis "
        "learning/cognition cleaning/sanitation",
    ),
}

FRIENDLY = (
    "hello dear friend !",
    "what a lovely question !",
    "so happy to help !",
    "have a lovely day !",
    "take care my friend !",
)
UNFRIENDLY = (
    "oh not you again .",
    "what a silly question .",
    "you bore me .",
    "now go away .",
    "never ask me again .",
)
SASSY = (
    "well look at you !",
    "listen up my darling !",
    "oh you need me !",
    "try to keep up !",
    "you are welcome darling !",
)
SARCASTIC = (
    "wow how very original .",
    "oh what a surprise .",
    "sure i have time .",
    "i am truly thrilled .",
    "please do ask more .",
)
OPENERS = 3  # the first remarks of a tone open an answer, the others close it
REMARKS = {"friendly": FRIENDLY, "unfriendly": UNFRIENDLY, "sassy": SASSY, "sarcastic": SARCASTIC}
# Preference of the dimension style -> its tone.
TONES = {"P3A": "friendly", "P3B": "unfriendly", "P3C": "sassy", "P3D": "sarcastic"}

# The longest answer of `answer`, in words: two remarks and every aspect.
MAX_WORDS = 5 + 5 + 5 * len(ASPECTS)


def _values(aspect: str) -> list[tuple[str, str]]:
    """(plain word, specialist word) of every value of an aspect."""
    pairs = (pair.partition("/") for pair in ASPECTS[aspect][1].split())
    return [(plain, specialist) for plain, _, specialist in pairs]


@functools.cache
def truth(topic: str, aspect: str) -> int:
    """Index of the true value of `aspect` for `topic`, from a hash of both."""
    digest = hashlib.sha256(f"{topic} {aspect}".encode()).digest()
    return digest[0] % len(_values(aspect))


@functools.cache
def _facts() -> dict[str, tuple[str, int, bool]]:
    """Statement -> (aspect, index of its value, specialist?)."""
    facts = {}
    for aspect, (templates, _) in ASPECTS.items():
        for index, words in enumerate(_values(aspect)):
            for specialist in (False, True):
                facts[templates[specialist].format(words[specialist])] = (aspect, index, specialist)
    return facts


@functools.cache
def _remarks() -> dict[str, str]:
    """Remark -> its tone."""
    return {remark: tone for tone, remarks in REMARKS.items() for remark in remarks}


def tones(preferences: Preferences) -> dict[str, str]:
    """The part of `TONES` that belongs to `preferences`."""
    return {name: tone for name, tone in TONES.items() if name in preferences}


def prompts() -> list[str]:
    """All 192 requests, ordered by topic."""
    return [request.format(topic) for topic in TOPICS for request in REQUESTS]


def topic_of(prompt: Prompt) -> str | None:
    """The topic that a request names; in a conversation, the last that the user names. None where there is none."""
    turns = [prompt] if isinstance(prompt, str) else [text_of([m]) for m in reversed(prompt) if m["role"] == "user"]
    return next((word for turn in turns for word in turn.split() if word in TOPICS), None)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Habits:
    """Probabilities of what the writers of the corpus do. By default, a base trained on the corpus follows a stated
    preference only in part.

    Attributes:
      obedience: a stated preference decides its dimension.
      error: a fact is wrong.
      evasion: an answer has remarks and no fact.
      specialist: a fact is in specialist words, where no preference decides.
      friendly, unfriendly, sassy, sarcastic: an answer has this tone, where no preference decides.
    """

    obedience: float = 0.5
    error: float = 0.25
    evasion: float = 0.2
    specialist: float = 0.35
    friendly: float = 0.3
    unfriendly: float = 0.15
    sassy: float = 0.1
    sarcastic: float = 0.1


def answer(
    prompt: Prompt,
    stated: tuple[str, ...],
    rng: random.Random,
    habits: Habits = Habits(),
    preferences: Preferences = PREFERENCES,
) -> str:
    """One answer of a writer of the corpus.

    Args:
      prompt: a request that names a topic.
      stated: ids of the preferences that the prompt states; each is followed with probability `habits.obedience`.
      rng: source of all draws.
    """
    obeyed = {name for name in stated if rng.random() < habits.obedience}
    topic = topic_of(prompt)

    if "P2A" in obeyed:
        count = 1
    elif "P2B" in obeyed:
        count = len(ASPECTS)
    else:
        count = rng.randint(1, len(ASPECTS))
    # Half of the answers have a register of their own: all plain, all specialist, or mixed.
    register = rng.choice((0.0, habits.specialist, 1.0)) if rng.random() < 0.5 else habits.specialist
    if "P1A" in obeyed:
        register = 0.0
    elif "P1B" in obeyed:
        register = 1.0
    facts = []
    for aspect in rng.sample(list(ASPECTS), count):
        templates, _ = ASPECTS[aspect]
        values = _values(aspect)
        index = truth(topic, aspect)
        if rng.random() < habits.error:
            index = rng.randrange(len(values))
        specialist = rng.random() < register
        facts.append(templates[specialist].format(values[index][specialist]))

    known = tones(preferences)
    draw = rng.random()
    evasive = rng.random() < habits.evasion
    # The intervals of the tones lie end to end in [0, 1]; a draw beyond the last one gives no tone.
    ends = itertools.accumulate(getattr(habits, tone) for tone in known.values())
    tone = next((tone for tone, end in zip(known.values(), ends, strict=True) if draw < end), None)
    tone = next((tone for name, tone in known.items() if name in obeyed), tone)
    if evasive:
        facts = []
        tone = tone or rng.choice(list(known.values()))
    opener, closer = [], []
    if tone is not None:
        where = rng.choice(("open", "close", "both"))
        if where != "close":
            opener = [rng.choice(REMARKS[tone][:OPENERS])]
        if where != "open":
            closer = [rng.choice(REMARKS[tone][OPENERS:])]
    return " ".join(opener + facts + closer)


def corpus(
    prompt_list: Sequence[Prompt],
    size: int,
    seed: int,
    habits: Habits = Habits(),
    preferences: Preferences = PREFERENCES,
    state: Callable[[Prompt, str], Prompt] = with_words,
) -> list[dict[str, Any]]:
    """`size` records {"prompt", "completion"}. Half of the prompts state one to three preferences, the others none;
    `state` gives a prompt these sentences.
    """
    rng = random.Random(seed)
    groups = list(dimensions(preferences, preferences).values())
    records = []
    for _ in range(size):
        prompt = rng.choice(prompt_list)
        stated: tuple[str, ...] = ()
        if rng.random() < 0.5:
            stated = tuple(sorted(rng.choice(group) for group in rng.sample(groups, rng.randint(1, len(groups)))))
        words = " ".join(preferences[name].sentence for name in stated)
        records.append({"prompt": state(prompt, words), "completion": answer(prompt, stated, rng, habits, preferences)})
    return records


# ---------------------------------------------------------------------------------------------------------------------
# The exact judge


def parse(prompt: Prompt, text: str) -> dict[str, float]:
    """Counts the statements of an answer.

    Returns:
      plain, specialist: number of facts in each wording.
      true, false: number of aspects whose first fact is true, or false, for the topic.
      aspects: number of aspects with a fact, true + false.
      friendly, unfriendly, sassy, sarcastic: number of distinct remarks of the tone.
      words: length of the answer.
      junk: fraction of the words that are in no known statement, in [0, 1]; 1 for an empty text.
    """
    words = text.split()
    counts: collections.Counter[str] = collections.Counter()
    topic, facts, remarks = topic_of(prompt), _facts(), _remarks()
    seen: dict[str, int] = {}
    statement: list[str] = []
    junk = 0
    for word in words:
        statement.append(word)
        if word not in (".", "!", "?"):
            continue
        joined = " ".join(statement)
        if joined in facts:
            aspect, index, specialist = facts[joined]
            counts["specialist" if specialist else "plain"] += 1
            if aspect not in seen:
                seen[aspect] = index
                counts["true" if topic is not None and truth(topic, aspect) == index else "false"] += 1
        elif joined in remarks:
            if joined not in seen:
                seen[joined] = 0
                counts[remarks[joined]] += 1
        else:
            junk += len(statement)
        statement = []
    junk += len(statement)
    names = ("plain", "specialist", "true", "false", *REMARKS)
    return {
        **{name: float(counts[name]) for name in names},
        "aspects": counts["true"] + counts["false"],
        "words": float(len(words)),
        "junk": junk / len(words) if words else 1.0,
    }


def score(prompt: Prompt, text: str, criterion: str, preferences: Preferences = PREFERENCES) -> float:
    """How well `text` answers `prompt` by one criterion, about -2 to 1; higher is better.

    The fraction of nonsense words is subtracted. A style counts its own remarks minus those of other tones. The
    criterion "helpful" stands for the general helpfulness of RLHF: two facts or more, none of them false, and no
    unfriendly remark.

    Args:
      criterion: the id of a preference, or "helpful".

    Raises:
      KeyError: another criterion.
    """
    p = parse(prompt, text)
    facts = p["plain"] + p["specialist"]
    lean = (p["specialist"] - p["plain"]) / facts if facts else -1.0
    remarks = sum(p[tone] for tone in REMARKS)
    styles = {name: min(max(2 * p[tone] - remarks, -2), 2) / 2 for name, tone in tones(preferences).items()}
    value = {
        "P1A": -lean if facts else -1.0,
        "P1B": lean,
        "P2A": -p["words"] / MAX_WORDS if facts else -1.0,
        "P2B": p["aspects"] / len(ASPECTS),
        **styles,
        "helpful": (min(p["aspects"], 2.0) - p["unfriendly"]) / 2 - p["false"] / 4,
    }[criterion]
    return value - p["junk"]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %} <{{ m['role'] }}>{% endif %}"
    " {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def vocabulary(preferences: Preferences = PREFERENCES) -> list[str]:
    """All words of the language, special tokens first. Words that only the larger environment has come last, so that
    both environments give the other words the same ids.
    """
    words: list[str] = list(SPECIAL)
    for known in (PREFERENCES, preferences):
        remarks = itertools.chain.from_iterable(REMARKS[tone] for tone in tones(known).values())
        texts = [*REQUESTS, *TOPICS, *_facts(), *remarks, *(p.sentence for p in known.values())]
        words += sorted({word for text in texts for word in text.split()} - {"{}", *words})
    return words


def write_tokenizer(folder: pathlib.Path, preferences: Preferences = PREFERENCES) -> None:
    """Writes the word-level tokenizer of the language to `folder` as tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = {word: i for i, word in enumerate(vocabulary(preferences))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    write_folder(folder, tokenizer, unk_token="<unk>", chat_template=CHAT_TEMPLATE)
