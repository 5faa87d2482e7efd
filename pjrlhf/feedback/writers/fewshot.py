"""Labelled comparisons of the person, written out before the prompt (FSPO, arXiv 2502.19312, section 4; PPT, arXiv
2410.14001): the model learns in context, and k more comparisons of a new person cost no step.

    text = shot_1 \\n ... \\n shot_k,   loss = P-DPO(text + prompt, chosen, rejected)

FSPO trains with IPO, PPT with a DPO loss on the history; both are `loss` of the entry. The shots are random ones, or,
with `similar` in the entry, those on the prompts most like the one that is asked. FSPO's RAT, which has the model write
a description of the person first, is the writer `profile`.

Traps of public code: the preferred answer always stood in the same place, so that its place carried the label; the
order of a shot is drawn here. A config said 4 shots and read 8; here the number is `history` alone.
"""

import dataclasses
from collections.abc import Sequence

from pjrlhf.errors import UserError
from pjrlhf.feedback.writers.base import Base, Known, Shot, Writer, check_fields
from pjrlhf.settings import setting

FIELDS = ("prompt", "chosen", "rejected", "first", "second", "first_verdict", "second_verdict")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(Writer):
    """Labelled comparisons."""

    template: str = setting(
        "Question: {prompt}\n{first_verdict}: {first}\n{second_verdict}: {second}",
        "how a comparison is written; {chosen} and {rejected} have fixed places, {first} and {second} random ones",
    )
    verdicts: tuple[str, ...] = setting(
        ("Preferred", "Not preferred"), "{first_verdict} and {second_verdict} of the preferred and the other answer"
    )

    def check(self) -> None:
        if len(self.verdicts) != 2 or self.verdicts[0] == self.verdicts[1]:
            raise UserError(f"verdicts: {self.verdicts} are not two different texts; give one for each answer")
        check_fields("template", self.template, FIELDS, ())
        placed = all(f"{{{field}}}" in self.template for field in ("chosen", "rejected"))
        drawn = all(f"{{{field}}}" in self.template for field in FIELDS[3:])
        if not (placed or drawn):
            raise UserError(
                "template: does not tell preferred and other answers apart; it must name {chosen} and {rejected}, or "
                "{first}, {second} and their verdicts"
            )

    def shot(self, shot: Shot) -> str:
        """One comparison."""
        preferred, other = self.verdicts
        first, second = (preferred, other) if shot.chosen_first else (other, preferred)
        return self.template.format(**shot.fields(), first_verdict=first, second_verdict=second)

    def write(self, known: Sequence[Known], base: Base) -> list[str]:
        return ["\n".join(map(self.shot, one.shots)) for one in known]


WRITER = FewShot
