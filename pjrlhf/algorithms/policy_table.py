"""Tables of what a step of policies sampled."""

import math
from collections.abc import Iterator

import numpy as np

from pjrlhf.algorithms.policy_step import Judged
from pjrlhf.algorithms.targets import PromptRows
from pjrlhf.parallel.processes import to_host
from pjrlhf.rollout.batches import PromptBatch
from pjrlhf.training.completions import Row


def answer_rows(data: PromptRows, batch: PromptBatch, judged: Judged) -> Iterator[Row]:
    """A table of the responses [K n, N] to a batch [K n, ...] of `data`; prompts are as the policies read them."""
    (scores, advantages), policies = to_host((judged.scores, judged.advantages)), data.targets.policies
    names, tokenizer = data.targets.audience.rewards, data.text.workspace.tokenizer
    answers = data.text.decode(batch.prompts, judged.rollout)
    tokens, valid = np.asarray(batch.prompts.tokens), np.asarray(batch.prompts.valid)
    prompts = (ids[kept] for ids, kept in zip(tokens, valid, strict=True))
    numbers, weights = np.asarray(batch.targets.objectives), np.asarray(batch.targets.weights)
    asked = sorted({int(i) for i in numbers.ravel()})
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        values = dict(zip(numbers[i].tolist(), scores[i].tolist(), strict=True))
        yield {
            "policy": policies[i * len(policies) // len(answers)],
            "prompt": tokenizer.backend.decode(prompt.tolist()),
            "completion": answer,
            "weights": ", ".join(f"{names[j]} {w:.3g}" for j, w in zip(numbers[i], weights[i], strict=True)),
            **{f"rewards/{names[j]}": _number(values.get(j)) for j in asked},
            "advantage": _number(advantages[i].item()),
        }


def _number(x: float | None) -> float | None:
    return None if x is None or math.isnan(x) else x
