"""How a server reads the texts of comparisons: asked, cut and encoded as in training."""

import contextlib
import dataclasses
from collections.abc import Sequence

from pjrlhf.data.schema import Example, in_conversation
from pjrlhf.data.token_table import EncodedRow, Lengths, TokenRow, encode_example, tokenize
from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.errors import UserError


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads comparisons and answers.

    Attributes:
      tokenizer: of the base.
      chat: text prompts are the first message of a conversation.
      lengths: how texts are cut.
    """

    tokenizer: Tokenizer
    chat: bool
    lengths: Lengths

    def encoded(self, example: Example, kind: str = "preference") -> EncodedRow:
        """An example as tokens.

        Raises:
          RecordError, UserError: the model cannot read it.
        """
        return encode_example(self.asked(example), kind, self.tokenizer, self.lengths)

    def rows(self, comparisons: Sequence[Example]) -> list[TokenRow]:
        """The token ids of comparisons; what the model cannot read is left out."""
        rows: list[TokenRow] = []
        for example in comparisons:
            with contextlib.suppress(UserError):
                rows += tokenize([self.asked(example)], "preference", self.tokenizer, self.lengths)
        return rows

    def asked(self, example: Example) -> Example:
        """As `runtime.records` asks it in training."""
        return in_conversation(example) if self.chat else example
