"""The latest answers that the person preferred, or wrote, without those they did not: the history of LaMP (arXiv
2304.11406), in the prompt.

Trap: the latest answers of a file in which the person's held-out prompts stand last are held-out ones; what is read
here is of the training part alone.
"""

import dataclasses
from collections.abc import Sequence

from pjrlhf.feedback.writers.base import Base, Known, Writer, check_fields
from pjrlhf.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers(Writer):
    """Own answers, the latest last."""

    latest = True

    template: str = setting("Question: {prompt}\nAnswer: {chosen}", "how an answer is written")

    def check(self) -> None:
        check_fields("template", self.template, ("prompt", "chosen"), ("chosen",))

    def write(self, known: Sequence[Known], base: Base) -> list[str]:
        def told(one: Known) -> list[str]:
            fields = [shot.fields() for shot in one.shots]
            return [self.template.format(prompt=each["prompt"], chosen=each["chosen"]) for each in fields]

        return ["\n".join(told(one)) for one in known]


WRITER = Answers
