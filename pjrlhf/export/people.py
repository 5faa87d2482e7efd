"""User tokens as added vocabulary: names of the tokens, and a chat template that prints those of `user`."""

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from pjrlhf.data.messages import Prompt, as_turns
from pjrlhf.data.tokenization import Tokenizer
from pjrlhf.errors import UserError

WAY_OUT = "serve the people with pjrlhf serve instead"
EXAMPLES = (
    as_turns("what is rain ?"),
    [{"role": "user", "content": "Ä é 你好\n\n- x"}, {"role": "assistant", "content": "Yes."}, *as_turns("  Why?\n")],
)


@dataclasses.dataclass(frozen=True)
class PeopleTokens:
    """The added tokens of people.

    Attributes:
      names: of the people; the generic user, who is not among them, has number 0.
      count: E, tokens of each.
      mark: part of all token names, so that no text holds one by chance.
      fillers: tokens for rows of the embedding that no token had, before those of people.
    """

    names: tuple[str, ...]
    count: int
    mark: str
    fillers: int

    @classmethod
    def create(cls, names: Sequence[str], count: int, tokenizer: Tokenizer, content: bytes) -> "PeopleTokens":
        """Names that the tokenizer does not have; `content` is what the tokens stand for."""
        free = max(0, tokenizer.rows - len(tokenizer.backend))
        mark = xxhash.xxh3_64_hexdigest(content)
        while any(mark in token for token in tokenizer.backend.get_vocab()):
            mark = xxhash.xxh3_64_hexdigest(mark.encode())
        return cls(tuple(names), count, mark, free)

    def tokens(self, number: int) -> list[str]:
        """Of person `number` of `names`, counted from 1; of the generic user for 0."""
        return [f"<|person-{self.mark}-{number}-{i}|>" for i in range(self.count)]

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Name of a person -> their number; the generic user has 0."""
        return {name: number for number, name in enumerate(self.names, 1)}

    def text(self, name: str | None) -> str:
        """What stands for a person in a plain prompt; for the generic user, where the name is None or unknown."""
        return "".join(self.tokens(self.numbers.get(name or "", 0)))

    def extend(self, tokenizer: Tokenizer) -> Any:
        """The tokenizer of `transformers` with these tokens and, where it has one, a chat template that prints them.

        Raises:
          UserError: the template does not begin with a text that the tokens can follow, or text becomes other tokens.
        """
        from tokenizers import AddedToken

        backend = copy.deepcopy(tokenizer.backend)
        words = [f"<|unused-{self.mark}-{i}|>" for i in range(self.fillers)]
        for number in range(len(self.names) + 1):
            words += self.tokens(number)
        backend.add_tokens([AddedToken(word, special=True, normalized=False) for word in words], special_tokens=True)
        first = backend.convert_tokens_to_ids(self.tokens(0)[0])
        last = backend.convert_tokens_to_ids(self.tokens(len(self.names))[-1])
        if first < tokenizer.rows or last - first + 1 != self.count * (len(self.names) + 1):
            raise UserError(f"tokenizer: does not give the ids after {tokenizer.rows} to new tokens; {WAY_OUT}")
        if tokenizer.has_chat_template:
            start = self._start(tokenizer)
            old = backend.chat_template
            several = isinstance(old, dict)
            new = {key: self._template(one, start) for key, one in (old if several else {"default": old}).items()}
            backend.chat_template = new if several else new["default"]
            self._check(tokenizer, backend)
        return backend

    def _start(self, tokenizer: Tokenizer) -> str:
        """The text that comes before the tokens of people in a conversation: that of one token, or none."""
        if not tokenizer.add_bos:
            return ""
        first = tokenizer.encode_prompt(EXAMPLES[0])[0]
        text = tokenizer.backend.convert_ids_to_tokens(first)
        if first not in tokenizer.backend.added_tokens_decoder:
            raise UserError(
                f"chat template: starts with {text!r}, no special token that user tokens can follow; {WAY_OUT}"
            )
        return text

    def _template(self, old: str, start: str) -> str:
        # A template loses a newline at its end, and an environment that trims blocks loses one after a tag.
        old = old[:-1] if old.endswith("\n") else old
        number = "pjrlhf_people.get(user | string, 0) if user is defined and user is not none else 0"
        token = f"<|person-{self.mark}-{{{{ pjrlhf_person }}}}-{{{{ i }}}}|>"
        before = json.dumps(start, ensure_ascii=False)
        return (
            f"{{% set pjrlhf_text %}}\n{old}{{{{ '' }}}}{{% endset %}}"
            f"{{% set pjrlhf_people = {json.dumps(self.numbers, ensure_ascii=False)} %}}"
            f"{{% set pjrlhf_person = {number} %}}"
            f"{{% set pjrlhf_tokens %}}{{% for i in range({self.count}) %}}{token}{{% endfor %}}{{% endset %}}"
            f"{{% if not pjrlhf_text.startswith({before}) %}}"
            f"{{{{ raise_exception('the conversation does not start with ' ~ {before}) }}}}{{% endif %}}"
            f"{{{{ {before} ~ pjrlhf_tokens ~ pjrlhf_text[{len(start)}:] }}}}"
        )

    def _check(self, tokenizer: Tokenizer, backend: Any) -> None:
        """Compares the tokens of example conversations with those of training."""
        for conversation in EXAMPLES:
            try:
                before = tokenizer.encode_prompt(conversation)
            except ValueError:  # the template wants other messages
                continue
            for name in (None, *self.names[:1], *self.names[-1:]):
                got = self.encode(backend, conversation, {} if name is None else {"user": name})
                if got != self.inserted(before, name, tokenizer, backend):
                    raise UserError(
                        f"tokenizer: text after added tokens becomes other tokens than in training; {WAY_OUT}"
                    )

    @staticmethod
    def encode(backend: Any, conversation: Prompt, options: Mapping[str, Any]) -> list[int]:
        """Ids of a conversation as servers make them."""
        text = backend.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **options)
        return backend(text, add_special_tokens=False, verbose=False)["input_ids"]

    def inserted(self, ids: Sequence[int], name: str | None, tokenizer: Tokenizer, backend: Any) -> list[int]:
        """Ids of a prompt with those of a person where training has them."""
        number = self.numbers.get(name or "", 0)
        place = min(int(bool(tokenizer.add_bos)), len(ids))
        return [*ids[:place], *backend.convert_tokens_to_ids(self.tokens(number)), *ids[place:]]
