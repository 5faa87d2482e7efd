"""A profile of the person that a language model writes from their comparisons.

    profile = LM(instruction, comparisons of the person)

`instruction` is one of `INSTRUCTIONS`, after these papers, or a text of your own:

* "persona": who would choose like this (SynthesizeMe, arXiv 2506.05598, section 3; it also bootstraps the reasoning and
  picks demonstrations, which is not done here);
* "rules": rules that turn the other answer into the preferred one (preference agents, arXiv 2410.03731, section 3);
* "hypotheses": several guesses at what the person wants, each with its evidence (HyPerAlign, arXiv 2505.00038);
* "differences": what sets the person apart from others who chose between the same answers (DPL, arXiv 2503.02450,
  section 3). `population.pool` gives simulated people the same answers.

Traps: a profile written from the very pair that it is then trained on tells its label, so that the model learns to
trust it more than profiles deserve; a training prompt therefore has a profile of the other half of the person's
prompts (`Writer.once`). Held-out comparisons are never read.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from pjrlhf.data.messages import text_of
from pjrlhf.errors import UserError
from pjrlhf.feedback.samplers import sampler
from pjrlhf.feedback.writers.base import Base, Known, Writer, check_fields
from pjrlhf.feedback.writers.fewshot import FewShot
from pjrlhf.settings import setting

INSTRUCTIONS = {
    "persona": "{comparisons}\n\nDescribe in at most three sentences the person who chose like this: who they may be, "
    "and what they look for in an answer. Do not repeat the answers.",
    "rules": "{comparisons}\n\nWrite at most five short rules that turn an answer this person did not prefer into one "
    "that they prefer. One rule a line, no comments.",
    "hypotheses": "{comparisons}\n\nWrite three hypotheses about what this person wants from an answer, the likeliest "
    "first, each in one sentence with the choices that support it.",
    "differences": "{comparisons}\n\nOther people chose between the same answers:\n{others}\n\nDescribe in at most "
    "three sentences how this person's taste differs from that of the others. Do not repeat the answers.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile(Writer):
    """A profile by a language model."""

    once = True

    sampler: str | Mapping[str, Any] = setting(
        "base", "who writes: base, the folder of a model, or a sampler such as {'kind': 'chat', ...}"
    )
    instruction: str = setting(
        "persona", f"{', '.join(INSTRUCTIONS)}, or a text with {{comparisons}} and perhaps {{others}}"
    )
    comparisons: FewShot = setting(FewShot())
    template: str = setting("About the person: {profile}", "how the profile stands before the prompt")

    def __hash__(self) -> int:
        return hash(repr(self))  # a specification of a sampler is a mapping

    @property
    def _instruction(self) -> str:
        return INSTRUCTIONS.get(self.instruction, self.instruction)

    def check(self) -> None:
        super().check()
        check_fields("instruction", self._instruction, ("comparisons", "others"), ("comparisons",))
        check_fields("template", self.template, ("profile",), ("profile",))
        try:
            sampler(None, self.sampler)
        except UserError as error:
            raise UserError(f"sampler: {error}") from error

    def request(self, known: Known) -> str:
        """What the language model is asked about one person."""
        told = "\n\n".join(map(self.comparisons.shot, known.shots))
        others = "\n".join(
            f"- {len(by)} of them preferred: {text_of(by[0].chosen or '').strip()}" for by in known.others if by
        )
        return self._instruction.format(comparisons=told, others=others or "none")

    @property
    def unserved(self) -> str:
        return "asks a language model, whose log of requests would keep what people delete"

    def write(self, known: Sequence[Known], base: Base) -> list[str]:
        assert base.run is not None  # servers refuse it, see `unserved`
        requests = [self.request(one) if one.shots else "" for one in known]
        asked = [request for request in dict.fromkeys(requests) if request]
        written = sampler(base.run, self.sampler)(asked, [""] * len(asked), "profiles of people") if asked else []
        profiles = {request: " ".join(text.split()) for request, text in zip(asked, written, strict=True)}
        if empty := sum(not text for text in profiles.values()):
            logging.warning("writer: %d of %d profiles are empty; these people have no text", empty, len(profiles))
        found = [profiles.get(request, "") for request in requests]
        return [self.template.format(profile=text) if text else "" for text in found]


WRITER = Profile
