"""PersonalLLM (arXiv 2409.20296): eight answers to each prompt, scored by ten reward models, and people who weigh them.

A person is a vector of weights of the ten reward models, drawn from a symmetric Dirichlet distribution. The person's
reward for an answer is the weighted sum of its standardised scores.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, number, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting

ANSWERS = 8
# Reward model -> (mean, standard deviation) of its scores, those of eval/constants.py of the authors. Weights of people
# are in the order of the names.
SCALES = {
    "beaver_7b": (6.233516894340515, 3.012641148973965),
    "gemma_2b": (4.3304170169830325, 2.038611338958803),
    "gemma_7b": (1.6259730467796325, 2.6096741570264976),
    "llama3_sfairx": (1.0637639780044557, 2.953017385451928),
    "mistral_raft": (8.309211883544922, 3.0728436748484533),
    "mistral_ray": (3.0136284782886507, 1.6902981149232585),
    "mistral_weqweasdas": (7.071075622558594, 2.578636650248985),
    "oasst_deberta_v3": (2.8976835689097644, 1.7207868789061331),
    "oasst_pythia_1b": (4.293944010734558, 2.3018268820938133),
    "oasst_pythia_7b": (4.706351243972779, 1.3659142113789966),
}
COST = "beaver_7b"  # beaver-7b-v1.0-cost: a higher score is more harm


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonalLLMSettings(ReaderSettings):
    """What a config may say about PersonalLLM."""

    gives: str = setting(
        "pairs", "pairs that people compare, or single answers with their ten rewards", choices=("pairs", "answers")
    )
    people: int = setting(100, "number of people", low=1, high=100_000)
    # Below 0.01 all ten gamma variates of a draw may underflow, which leaves no weights.
    alpha: float = setting(0.01, "concentration of the Dirichlet distribution of weights", low=0.01)
    seed: int = setting(100, "of the people's weights and of what they compare", low=0, high=2**32 - 1)
    comparisons: int = setting(50, "prompts that each person compares answers to, all where there are fewer", low=1)
    pair: str = setting(
        "extremes",
        "of eight answers: those that the person likes most and least, or two at random",
        choices=("extremes", "random"),
    )
    normalize: bool = setting(True, "standardise the scores of each reward model with the constants of the authors")
    negate_cost: bool = setting(False, f"turn the sign of {COST}, which scores harm; the authors leave it")


@dataclasses.dataclass(frozen=True)
class Scored:
    """A prompt with its answers.

    Attributes:
      scores: float64 [answers, reward models], models in the order of `SCALES`.
    """

    prompt: str
    answers: tuple[str, ...]
    scores: np.ndarray
    where: str


def people(count: int, alpha: float, seed: int) -> np.ndarray:
    """Weights of people, float64 [count, 10], rows of sum 1: the draws of the authors for the same seed."""
    return np.random.RandomState(seed).dirichlet([alpha] * len(SCALES), size=count)


def scored(row: Row, settings: PersonalLLMSettings) -> Scored:
    """A raw row: `prompt`, `response_1` to `response_8`, and `response_<i>_<reward model>`.

    Raises:
      RecordError: a column is missing, null or of another type.
    """
    places = range(1, ANSWERS + 1)
    scores = np.array([[number(row, f"response_{i}_{name}") for name in SCALES] for i in places])
    if settings.normalize:
        mean, deviation = np.array(list(SCALES.values())).T
        scores = (scores - mean) / deviation
    if settings.negate_cost:
        scores[:, list(SCALES).index(COST)] *= -1
    return Scored(text(row, "prompt"), tuple(text(row, f"response_{i}") for i in places), scores, row.where)


def answers(one: Scored) -> Iterator[Row]:
    """Completion records of all answers, with their rewards by name."""
    for answer, scores in zip(one.answers, one.scores, strict=True):
        rewards = dict(zip(SCALES, scores.tolist(), strict=True))
        yield Row({"prompt": one.prompt, "completion": answer, "rewards": rewards}, one.where)


def compared(prompts: Sequence[Scored], settings: PersonalLLMSettings, raw: Raw) -> Iterator[Row]:
    """Preference records of all people, one after the other; each compares answers to prompts of their own draw."""
    for person, weights in enumerate(people(settings.people, settings.alpha, settings.seed)):
        rng = np.random.default_rng([settings.seed, person])
        drawn = rng.permutation(len(prompts))[: settings.comparisons]
        named = dict(zip(SCALES, weights.tolist(), strict=True))
        for one in (prompts[i] for i in drawn):
            rewards = one.scores @ weights
            if settings.pair == "extremes":
                best, worst = int(rewards.argmax()), int(rewards.argmin())
            else:
                best, worst = sorted(rng.permutation(ANSWERS)[:2].tolist(), key=lambda i: -rewards[i])
            if rewards[best] == rewards[worst]:
                raw.drop("ties")
            elif one.answers[best] == one.answers[worst]:
                raw.drop("identical answers")
            else:
                record: Record = {"prompt": one.prompt, "chosen": one.answers[best], "rejected": one.answers[worst]}
                record |= {"user_id": f"person {person}", "margin": float(rewards[best] - rewards[worst])}
                yield Row({**record, "preference_weights": named}, one.where)


def read(settings: PersonalLLMSettings, raw: Raw) -> Iterator[Row | RecordError]:
    """The records of the set; bad rows come first, because people compare what is left."""
    prompts: list[Scored] = []
    for row in raw():
        if isinstance(row, RecordError):
            yield row
            continue
        try:
            prompts.append(scored(row, settings))
        except RecordError as error:
            yield error.at(row.where)
    if settings.gives == "pairs":
        yield from compared(prompts, settings, raw)
        return
    for one in prompts:
        yield from answers(one)


READER = DataReader(
    kind="personal_llm",
    settings=PersonalLLMSettings,
    read=read,
    title="PersonalLLM (arXiv 2409.20296): 9,402 + 1,000 prompts, eight answers each, scored by ten reward models",
    home="https://huggingface.co/datasets/namkoong-lab/PersonalLLM",
    licence="CC BY 4.0",
    mapping={
        "prompt": "prompt",
        "chosen": "response_<i> with the larger reward of the person",
        "rejected": "response_<j> with the smaller one",
        "user_id": '"person <n>", n-th draw of weights',
        "preference_weights": "the person's weights by reward model",
        "margin": "difference of the person's rewards",
        "completion": "with gives=answers, each response_<i>",
        "rewards": "with gives=answers, response_<i>_<reward model>, standardised",
    },
    traps=(
        "scores of the ten models have different scales: they are standardised with the constants of the authors",
        "beaver_7b is a cost model, whose higher scores mean more harm, but the authors weigh it like the others, so "
        "that some people like harm: negate_cost turns its sign",
        "people are not in the files: alpha and seed draw the weights that the authors' code draws",
        "the authors found that scores change with the batch size (padding): small margins are noise",
        "ties and identical answers are left out and counted",
    ),
)
