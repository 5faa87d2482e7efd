"""A training method and a stage that are no part of the package, as a config names them."""

import dataclasses
import functools

from pjrlhf.algorithms import banks
from pjrlhf.algorithms.ric import Ric, Round
from pjrlhf.data.schema import Example
from pjrlhf.runtime.answers import sample_base
from pjrlhf.runtime.run import Stage, Trainer
from pjrlhf.settings import Settings, setting
from pjrlhf.training.optimizer import OptimizerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfSettings(Settings):
    steps: int = setting(4, "updates", low=1)
    batch_size: int = setting(8, "answers a step", low=1)
    criterion: str = setting("P2A", "what makes an answer the better one")
    optimizer: OptimizerSettings = setting(OptimizerSettings(learning_rate=1e-2))


def train_best_of(run, settings, stage):
    """Fine-tunes one adapter on the better of two answers of the base to each request."""
    requests, keys = run.records.requests[0][:32], functools.partial(run.streams.key, "best_of/answers")
    texts = sample_base(run, [run.records.ask(request) for request in requests] * 2, keys, stage)
    pairs = zip(requests, texts, texts[len(requests) :], strict=False)
    best = [(q, max(pair, key=lambda text: run.audience.score(q, text, settings.criterion))) for q, *pair in pairs]
    examples = [Example(prompt=run.records.ask(q), completion=text) for q, text in best if text.strip()]
    data = Round(run.text.tokenized(examples, run.text.sampled_lengths, stage, "completion"), settings.steps)
    method = Ric(settings, data, run.devices, run.workspace.backbone, run.text, run.streams)
    base = banks.save(run, stage, ["policy"], run.train(method, stage, settings.steps).trainable)
    return {"ingredients": ["policy"], "samples": len(texts), "base": base}


TRAINER = Trainer(lambda run: BestOfSettings(), train_best_of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountSettings(Settings):
    letter: str = setting("a", "the letter to count in the requests")


def count(run):
    settings = run.section(CountSettings)
    return {"found": sum(request.count(settings.letter) for request in run.records.requests[0])}


STAGE = Stage("count", count, CountSettings)


def brevity(prompts, completions):
    """A reward function: minus the number of characters; nothing about empty answers."""
    return [-float(len(text)) if text.strip() else None for text in completions]


async def patient_brevity(prompts, completions):
    return brevity(prompts, completions)


def seen(prompts, completions, number, user_id):
    """What tests replace."""


def numbered(prompts, completions, number, user_id):
    """A reward function of columns of the records."""
    seen(prompts, completions, number, user_id)
    return [float(len(text)) + i for text, i in zip(completions, number, strict=True)]


def solved(prompts, completions, solution):
    """A reward function of a column that few records have."""
    return [float(a == b) for a, b in zip(completions, solution, strict=True)]


def multiple(of, factor):
    """Makes reward functions: `factor` times the number of letters `of`."""
    return lambda prompts, completions: [factor * text.count(of) for text in completions]
