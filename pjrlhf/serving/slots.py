"""The answers in the slots of the engine, as the host knows them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pjrlhf.serving.programs import Drawn
from pjrlhf.serving.text import AnswerText
from pjrlhf.serving.tickets import Ticket, Token


@dataclasses.dataclass(eq=False)
class Answer:
    """One of the n answers of a request, from its slot on.

    Attributes:
      text: of the tokens so far.
      sent: steps that were dispatched for it.
      count: tokens that were read.
      finish: see `Piece`.
    """

    ticket: Ticket
    index: int
    text: AnswerText
    sent: int = 0
    count: int = 0
    finish: str | None = None

    def add(self, drawn: Drawn, slot: int, ends: Sequence[int]) -> tuple[list[Token], str | None]:
        """Adds what a dispatch drew in the slot.

        Args:
          drawn: on the host.
          ends: tokens that end an answer.

        Returns:
          The tokens that are part of the answer, and why it ends with them, or None.
        """
        request, finish = self.ticket.request, None
        tokens = [_token(drawn, i, slot, request.alternatives) for i in np.flatnonzero(drawn.emitted[:, slot]).tolist()]
        ids = [token.id for token in tokens]
        over = [i for i, token in enumerate(ids) if token in ends]
        if over:
            tokens, ids, finish = tokens[: over[0] + 1], ids[: over[0]], "stop"
        if not request.stop:
            self.text.add(ids)
        else:  # the token that completes a stop string is the last
            for i, token in enumerate(ids):
                self.text.add([token])
                if self.text.stopped:
                    tokens, finish = tokens[: i + 1], "stop"
                    break
        self.count += len(tokens)
        return tokens, finish or ("length" if self.count == request.max_new_tokens else None)


def _token(drawn: Drawn, step: int, slot: int, alternatives: int) -> Token:
    top = ()
    if alternatives:
        ids, logps = (x[step, slot, :alternatives].tolist() for x in (drawn.top_ids, drawn.top_logps))
        top = tuple(zip(ids, logps, strict=True))
    return Token(int(drawn.tokens[step, slot]), float(drawn.logps[step, slot]), top)
