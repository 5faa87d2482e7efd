"""What a person chose before, as text before the prompt: the baseline without a user model."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pjrlhf.data.messages import request_of, text_of, with_text
from pjrlhf.data.schema import Example
from pjrlhf.errors import UserError

TEMPLATE = "Question: {prompt}\nPreferred: {chosen}\nNot preferred: {rejected}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """How many comparisons of a person stand before the prompt, and how one is written.

    Attributes:
      count: k, at most; people with fewer have those they have.
      template: with the fields prompt, chosen and rejected.
      permuted: in the training part, everybody's pairs carry the comparisons of somebody else: the control.
    """

    count: int
    template: str = TEMPLATE
    permuted: bool = False


def check_template(template: str) -> None:
    """Raises UserError for a template that cannot write a comparison."""
    try:
        told = template.format(prompt="", chosen="\0", rejected="\1")
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"history_template: cannot be filled in ({error}); its fields are {{prompt}}, {{chosen}} and {{rejected}}"
        ) from error
    if not {"\0", "\1"} <= set(told):
        raise UserError("history_template: must name {chosen} and {rejected}, or nothing tells them apart")


def with_history(
    parts: Mapping[str, Sequence[Example]], history: History, rng: np.random.Generator
) -> dict[str, list[Example]]:
    """Every example after up to k random other comparisons of its person, all of the training part; those of a new
    person are of the prompts that are not held out.

    Args:
      parts: "train", "heldout" and perhaps "new_users" -> examples, see `feedback.pairs.split`.
    """
    past: dict[str, list[Example]] = {}
    for name, examples in parts.items():
        for example in examples:
            if name == "train" or (name == "new_users" and not example.extra["held_out"]):
                past.setdefault(str(example.user_id), []).append(example)
    found = {}
    for name, examples in parts.items():
        shuffled = history.permuted and name == "train"
        order = rng.permutation(len(examples)) if shuffled else range(len(examples))
        owners = [str(examples[i].user_id) for i in order]
        found[name] = [
            _after(example, past.get(owner, ()), history, rng) for example, owner in zip(examples, owners, strict=True)
        ]
    return found


def _after(example: Example, known: Sequence[Example], history: History, rng: np.random.Generator) -> Example:
    drawn = [known[i] for i in rng.permutation(len(known))[: history.count + 1].tolist()]
    drawn = [one for one in drawn if one is not example][: history.count]
    told = [
        history.template.format(
            prompt=request_of(one.prompt or ""), chosen=text_of(one.chosen or ""), rejected=text_of(one.rejected or "")
        )
        for one in drawn
    ]
    return dataclasses.replace(example, prompt=with_text(example.prompt or "", "\n".join(told))) if told else example
