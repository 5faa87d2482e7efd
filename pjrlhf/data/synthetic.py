"""The synthetic environment: a small generated language in which answers differ along the three dimensions of
Personalized Soups.

A request names a topic. An answer is a sequence of statements, each ended by a mark: facts about the topic, every
one of them sayable in plain or in specialist words, and friendly or unfriendly remarks. Because every statement is
known, any text can be judged exactly. The world stands in for a public instruction corpus and for GPT-4 as a judge;
nothing that trains knows about it.

A larger world has two more styles, sassy and sarcastic remarks, as in the scaling experiment of the paper. What
differs between the two takes the registry of preferences.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import random

from pjrlhf.data.preferences import Preference, Preferences, dimensions
from pjrlhf.data.tokenization import write_folder

PREFERENCES: Preferences = {
    "P1A": Preference(dimension="expertise", sentence="use easy words .", label="easy"),
    "P1B": Preference(dimension="expertise", sentence="use expert words .", label="expert"),
    "P2A": Preference(dimension="informativeness", sentence="keep it short .", label="short"),
    "P2B": Preference(dimension="informativeness", sentence="tell me everything .", label="everything"),
    "P3A": Preference(dimension="style", sentence="be kind .", label="kind"),
    "P3B": Preference(dimension="style", sentence="be rude .", label="rude"),
}
# 2 x 2 x 4 = 16 kinds of people.
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
# The first remarks of a tone open an answer, the others close it.
OPENERS = 3
REMARKS = {"friendly": FRIENDLY, "unfriendly": UNFRIENDLY, "sassy": SASSY, "sarcastic": SARCASTIC}
# Style -> the tone it asks for.
TONES = {"P3A": "friendly", "P3B": "unfriendly", "P3C": "sassy", "P3D": "sarcastic"}

# No answer of the world itself is longer: two remarks and every aspect, in words.
MAX_WORDS = 5 + 5 + 5 * len(ASPECTS)


def _values(aspect: str) -> list[tuple[str, str]]:
    return [tuple(pair.split("/")) for pair in ASPECTS[aspect][1].split()]


@functools.cache
def truth(topic: str, aspect: str) -> int:
    """Index of the true value of `aspect` for `topic`; fixed for all time by a hash."""
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


def tones(registry: Preferences) -> dict[str, str]:
    """`TONES` of the styles in `registry`."""
    return {name: tone for name, tone in TONES.items() if name in registry}


def prompts() -> list[str]:
    """All requests, topic by topic."""
    return [request.format(topic) for topic in TOPICS for request in REQUESTS]


def topic_of(prompt: str) -> str | None:
    """The topic a request names, or None."""
    return next((word for word in prompt.split() if word in TOPICS), None)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Habits:
    """How the writers of the corpus answer; defaults make a base that follows a stated preference imperfectly."""

    obedience: float = 0.5  # chance that a stated preference decides its dimension
    error: float = 0.25  # chance that a fact is wrong
    evasion: float = 0.2  # chance of remarks without a single fact
    specialist: float = 0.35  # share of specialist wording where no preference decides
    friendly: float = 0.3  # chance of each tone the world has, where no preference decides
    unfriendly: float = 0.15
    sassy: float = 0.1
    sarcastic: float = 0.1


def answer(
    prompt: str,
    stated: tuple[str, ...],
    rng: random.Random,
    habits: Habits = Habits(),
    registry: Preferences = PREFERENCES,
) -> str:
    """One answer as a writer of the corpus would give it, following each stated preference with chance
    `habits.obedience`.
    """
    obeyed = {name for name in stated if rng.random() < habits.obedience}
    topic = topic_of(prompt)

    if "P2A" in obeyed:
        count = 1
    elif "P2B" in obeyed:
        count = len(ASPECTS)
    else:
        count = rng.randint(1, len(ASPECTS))
    # A writer has a register of his own and now and then slips out of it.
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

    known = tones(registry)
    draw = rng.random()
    evasive = rng.random() < habits.evasion
    # The chances of the tones lie end to end, and the draw falls into one of them or beyond.
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
    prompt_list: list[str],
    size: int,
    seed: int,
    habits: Habits = Habits(),
    registry: Preferences = PREFERENCES,
) -> list[dict[str, str]]:
    """`size` records {"prompt", "completion"}: half without preference sentences, half with one to three of them."""
    rng = random.Random(seed)
    groups = list(dimensions(registry, registry).values())
    records = []
    for _ in range(size):
        prompt = rng.choice(prompt_list)
        stated: tuple[str, ...] = ()
        if rng.random() < 0.5:
            stated = tuple(sorted(rng.choice(group) for group in rng.sample(groups, rng.randint(1, len(groups)))))
        text = " ".join([prompt, *(registry[name].sentence for name in stated)])
        records.append({"prompt": text, "completion": answer(prompt, stated, rng, habits, registry)})
    return records


# ---------------------------------------------------------------------------------------------------------------------
# The exact judge


def parse(prompt: str, text: str) -> dict[str, float]:
    """Counts what an answer contains.

    Returns:
      plain, specialist: facts in each wording; true, false: distinct facts that hold or do not hold for the topic;
      aspects: distinct aspects covered; friendly, unfriendly, sassy, sarcastic: distinct remarks; words: length;
      junk: share of words in no known statement, in [0, 1] (1 for an empty text).
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


def score(prompt: str, text: str, criterion: str, registry: Preferences = PREFERENCES) -> float:
    """How well `text` answers `prompt` by one criterion, higher is better, about -2 to 1; nonsense costs by its share.

    Criteria: the preferences, a style by its own remarks less those of other tones, and "helpful", what people agree
    on: two facts or more, none of them wrong, and nothing rude. It plays the part of general helpfulness in RLHF.
    Raises KeyError for another criterion.
    """
    p = parse(prompt, text)
    facts = p["plain"] + p["specialist"]
    lean = (p["specialist"] - p["plain"]) / facts if facts else -1.0
    remarks = sum(p[tone] for tone in REMARKS)
    styles = {name: min(max(2 * p[tone] - remarks, -2), 2) / 2 for name, tone in tones(registry).items()}
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
    "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def vocabulary(registry: Preferences = PREFERENCES) -> list[str]:
    """Every word of the language, special tokens first; words that only the larger world has come last."""
    words = list(SPECIAL)
    for known in (PREFERENCES, registry):
        remarks = itertools.chain.from_iterable(REMARKS[tone] for tone in tones(known).values())
        texts = [*REQUESTS, *TOPICS, *_facts(), *remarks, *(p.sentence for p in known.values())]
        words += sorted({word for text in texts for word in text.split()} - {"{}", *words})
    return words


def write_tokenizer(folder, registry: Preferences = PREFERENCES) -> None:
    """Writes a Hugging Face tokenizer of the language (word level) into `folder`: tokenizer.json and
    tokenizer_config.json.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = {word: i for i, word in enumerate(vocabulary(registry))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    write_folder(folder, tokenizer, unk_token="<unk>", chat_template=CHAT_TEMPLATE)
