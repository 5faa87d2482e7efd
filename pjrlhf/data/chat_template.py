"""Chat templates: conversations as text, with nothing left out in silence."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from absl import logging

from pjrlhf.data.messages import (
    SAID,
    SYSTEM,
    Conversation,
    Message,
    as_turns,
    options_of,
    what_needs_template,
    without_system,
    without_template,
)
from pjrlhf.data.records import RecordError
from pjrlhf.errors import UserError


class ChatTemplate:
    """The chat template of a `transformers` tokenizer."""

    def __init__(self, backend: Any):
        self.backend = backend

    def render(self, prompt: list[Message], more: Sequence[Message] = (), *, generate: bool = False) -> str:
        """The text of a conversation, with its generation prompt where it is the assistant's turn."""
        if not self.backend.chat_template:
            raise UserError(
                f"prompt: {what_needs_template(prompt)}, and the tokenizer has no chat template; add chat_template to "
                f"tokenizer_config.json, or {without_template(prompt)}"
            )
        if any(message["role"] in SYSTEM for message in (*prompt, *more)) and not self._knows_system:
            prompt, more = Conversation(without_system(prompt), options_of(prompt)), without_system(more)
        try:
            text = self._apply([*prompt, *more], generate, options_of(prompt))
        except RecordError as error:
            # A template that knows no tool calls fails at a message without content.
            unknown = [name for name in SAID if not self._reads(name) and any(m.get(name) for m in [*prompt, *more])]
            if unknown:
                raise RecordError(f"{unknown[0]} unknown to the chat template", str(error)) from error
            raise
        for name, messages, options in self._ignorable(prompt, more):
            try:
                ignored = self._apply(messages, generate, options) == text
            except RecordError:  # the template needs it
                ignored = False
            if ignored:
                raise RecordError(f"{name} ignored by the chat template", "leave it out, or use another template")
        return text

    @functools.cached_property
    def _knows_system(self) -> bool:
        """Whether the chat template writes what a system turn says: some refuse such a turn, some leave it out, and
        some leave it out once the assistant has answered.
        """
        instruction, question = "An instruction", as_turns("A question")
        system, answer = {"role": "system", "content": instruction}, {"role": "assistant", "content": "An answer"}
        try:
            self._apply(question, True, {})
        except RecordError:
            return True  # it refuses more than that
        try:
            texts = [self._apply([system, *question], True, {}), self._apply([system, *question, answer], False, {})]
            found = all(instruction in text for text in texts)
        except RecordError:
            found = False
        if not found:  # said once, for the first conversation with a system turn
            logging.warning(
                "the chat template knows no system role: what a system turn says begins the next message of the user"
            )
        return found

    def _ignorable(
        self, prompt: list[Message], more: Sequence[Message]
    ) -> Iterator[tuple[str, list[Message], dict[str, Any]]]:
        """What the template may leave out of the text, as (name, messages and options without it).

        Templates may drop the reasoning of earlier turns, but what the last turn of an answer says must be there.
        """
        options, messages = options_of(prompt), [*prompt, *more]
        for name, value in options.items():
            if value and not re.search(rf"{{[{{%][^}}]*\b{re.escape(name)}\b", str(self.backend.chat_template)):
                yield name, messages, {key: item for key, item in options.items() if key != name}
        for name in SAID:
            last = len(messages) - 1 if more and more[-1].get(name) else 0
            if last or (not self._reads(name) and any(message.get(name) for message in messages)):
                without = [{key: item for key, item in message.items() if key != name} for message in messages[last:]]
                yield name, [*messages[:last], *without], options

    def _reads(self, name: str) -> bool:
        """Whether the chat template reads a key of messages, as far as its text tells."""
        return bool(re.search(rf"(\.|['\"]){name}\b", str(self.backend.chat_template)))

    def _apply(self, messages: Sequence[Message], generate: bool, options: Mapping[str, Any]) -> str:
        try:
            return self.backend.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate, **options
            )
        except Exception as error:  # a template is a program that may fail in any way
            reason = " ".join(str(error).split()) or "no reason given"
            raise RecordError("refused by the chat template", reason) from error


def check_template(backend: Any) -> None:
    """Refuses a chat template that is no program, and warns of one that writes today's date.

    Raises:
      UserError: it cannot be read as a template.
    """
    place = f"tokenizer {backend.name_or_path or type(backend).__name__}"
    try:
        template = backend.get_chat_template()
        if not isinstance(template, str):
            raise TypeError(f"a {type(template).__name__}, no text")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        # Templates may use tags of extensions that `transformers` adds.
        if "unknown tag" not in str(error):
            reason = " ".join(str(error).split())
            raise UserError(f"{place}: the chat template is no template ({reason}); correct it") from error
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: the chat template cannot be used ({reason}); give it one, named default") from error
    else:
        if "strftime_now" in template:
            logging.warning(
                "%s: the chat template writes the date of today, so that another day gives other prompts; to fix it, "
                "give records chat_template_kwargs, such as date_string where the template reads that",
                place,
            )
