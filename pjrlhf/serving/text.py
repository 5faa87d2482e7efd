"""The text of an answer while it is drawn: what of it is certain, and where a stop string ends it."""

from collections.abc import Sequence

from pjrlhf.data.tokenization import Tokenizer

CONTEXT = 8  # tokens before a window, which decide on white space at its start
WINDOW = 64  # tokens that are decoded again when more arrive, at most about so many
UNFINISHED = "\ufffd"  # what a tokenizer writes for the bytes of a character that is not complete


class AnswerText:
    """Joins the tokens of an answer; its pieces together are what `Tokenizer.decode_answer` gives for all tokens.

    Args:
      prompt: ids of a plain-text prompt, after which the answer keeps its leading space; None where it is a turn of a
        conversation, which has no white space around it.
      stop: strings that end the answer and are no part of it.

    Attributes:
      stopped: whether a stop string has occurred.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | None = None, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._turn, self._stop = tokenizer, prompt is None, tuple(stop)
        self._context = [] if prompt is None else list(prompt[-CONTEXT:])
        self._ids: list[int] = []
        self._before = self._text = ""  # of the tokens before the window, and with it
        self._sent = 0

    def add(self, ids: Sequence[int]) -> None:
        """Adds tokens, without one that ends the answer."""
        self._ids += ids
        decode = self._tokenizer.decode
        window = decode([*self._context, *self._ids])[len(decode(self._context)) :]
        known, self._text = len(self._text), self._before + window
        if len(self._ids) > WINDOW and not window.endswith(UNFINISHED):
            self._before, self._context, self._ids = self._text, (self._context + self._ids)[-CONTEXT:], []
        # A stop string may have begun in what was there before.
        starts = [self._text.find(one, max(0, known - len(one) - len(UNFINISHED))) for one in self._stop]
        if found := [start for start in starts if start >= 0]:
            self.stopped, self._text = True, self._text[: min(found)]

    def take(self, end: bool = False) -> str:
        """What is certain by now and was not taken before; everything at the `end` of the answer."""
        text = self._text
        if not (end or self.stopped):
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - max((_overlap(text, one) for one in self._stop), default=0)]
        if self._turn:
            text = text.strip()  # white space after it may yet be followed by text
        piece, self._sent = text[self._sent :], max(self._sent, len(text))
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` may begin."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
