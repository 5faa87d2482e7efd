"""Conversations: messages with a role and a content, and what else chat templates render: tool calls and reasoning."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pjrlhf.data.records import RecordError, from_json
from pjrlhf.settings import shown
from pjrlhf.types import Json

Message = dict[str, Any]
Prompt = str | list[Message]  # plain text or a conversation, also a `Conversation`
# Plain text, or all messages from the assistant's first to its last: one that has more than its content, or several.
Answer = str | list[Message]


class Conversation(list[Message]):
    """Messages with arguments for the chat template. Nothing changes one, so that it can be a key; without arguments it
    equals the list of its messages.

    Attributes:
      options: `tools`, JSON schemas of the tools that the model may call, and variables of the template by name.
    """

    def __init__(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None):
        super().__init__(messages)
        self.options = dict(options or {})

    def __eq__(self, other: object) -> bool:
        return list.__eq__(self, other) is True and self.options == options_of(other)

    def __ne__(self, other: object) -> bool:  # that of `list` knows no options
        return not self == other

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] - see the docstring
        return hash(tuple((message["role"], message.get("content")) for message in self))

    def __repr__(self) -> str:
        return f"{super().__repr__()} with {self.options}" if self.options else super().__repr__()


Request = str | Conversation  # a prompt that can be a key


def as_request(prompt: Prompt) -> Request:
    """A prompt that can be a key."""
    return prompt if isinstance(prompt, str | Conversation) else Conversation(prompt)


def options_of(prompt: object) -> dict[str, Any]:
    """The arguments for the chat template that come with a prompt."""
    return prompt.options if isinstance(prompt, Conversation) else {}


def what_needs_template(prompt: Sequence[Message]) -> str:
    """Why a prompt needs a chat template: a text with arguments for the template is a `Conversation`, too."""
    return f"has {_given(prompt)}, which a chat template reads" if _given(prompt) else "is a conversation"


def without_template(prompt: Sequence[Message]) -> str:
    """How to do without a chat template."""
    columns = _given(prompt)
    more = f", without {columns}" if columns else ""
    return f"give prompts as text{more}"


def _given(prompt: Sequence[Message]) -> str:
    """The columns of a record that are arguments for the template."""
    return " and ".join(columns_of(cast(Prompt, prompt)))


def columns_of(prompt: Prompt) -> dict[str, Any]:
    """The columns of a record, beside its prompt, from which `read_options` makes the arguments of the template."""
    options = options_of(prompt)
    variables = {name: value for name, value in options.items() if name != "tools"}
    columns = {"tools": options.get("tools"), "chat_template_kwargs": variables}
    return {name: value for name, value in columns.items() if value}


# Roles of the turns that instruct the assistant and are no part of the exchange.
SYSTEM = ("system", "developer")
# Roles of the protocol of OpenAI; a chat template may name further ones.
ROLES = (*SYSTEM, "user", "assistant", "tool", "function")
# Keys of a message, besides its content, that are part of what it says.
SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "images", "audio")
# Arguments of `apply_chat_template` that this package sets, or that are no variables of a template. A template of a
# request would be a program of a stranger, which need not end.
_RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "tokenize", "add_generation_prompt"),
        *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of content parts that hold `text`


def text_of(value: Prompt | Answer) -> str:
    """The text of a prompt or an answer: the contents of its messages, one after the other."""
    if isinstance(value, str):
        return value
    return "\n".join(message["content"] for message in value if message.get("content"))


def request_of(prompt: Prompt) -> str:
    """The text to answer: a text prompt, or the last message of a conversation."""
    return prompt if isinstance(prompt, str) else text_of(prompt[-1:])


def with_text(prompt: Prompt, text: str) -> Prompt:
    """`prompt` after `text`; in a conversation the text stands in the last message of the user."""
    if isinstance(prompt, str):
        return f"{text}\n{prompt}"
    last = _last_request(prompt)
    return _with_content(prompt, last, f"{text}\n{text_of(prompt[last : last + 1])}")


def with_words(prompt: Prompt, words: str, turn: str = "user") -> Prompt:
    """`prompt` followed by `words` about preferences; in a conversation they end a turn.

    Args:
      turn: "user", the last message of the user; "system", the system turn, which a conversation without one gets.
    """
    if not words:
        return prompt
    if isinstance(prompt, str):
        return " ".join(filter(None, [prompt, words]))
    place = _last_request(prompt)
    if turn == "system":
        if prompt[0]["role"] not in SYSTEM:
            return Conversation([{"role": "system", "content": words}, *prompt], options_of(prompt))
        place = 0
    return _with_content(prompt, place, " ".join(filter(None, [text_of(prompt[place : place + 1]), words])))


def _last_request(prompt: list[Message]) -> int:
    """The place of the last message of the user; of the last message where there is none."""
    return max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)


def _with_content(prompt: list[Message], place: int, content: str) -> Conversation:
    told = {**prompt[place], "content": content}
    return Conversation([*prompt[:place], told, *prompt[place + 1 :]], options_of(prompt))


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The same conversation for a template that knows no system role: what such a turn says begins the next message of
    the user. Turns that no message of the user follows stay.
    """
    found: list[Message] = []
    waiting: list[Message] = []
    for message in messages:
        if message["role"] in SYSTEM:
            waiting.append(message)
        elif message["role"] == "user":
            content = "\n\n".join(filter(None, [text_of([one]) for one in (*waiting, message)]))
            found.append({**message, "content": content})
            waiting = []
        else:
            found.append(message)
    return [*found, *waiting]


def dialogue(prompt: Prompt) -> str:
    """A prompt as text for a reader: all turns of a conversation, each after the name of its role, and the tools that
    the model may call; the text alone of a text prompt and of a single message of the user without tools.
    """
    named = tools_of(prompt)
    if isinstance(prompt, str) or (len(prompt) == 1 and prompt[0]["role"] == "user" and not named):
        return text_of(prompt)
    parts = [f"{message['role'].capitalize()}: {said(message)}" for message in prompt]
    listed = "; ".join(f"{name} ({about})" if about else name for name, about in named)
    return "\n\n".join([*parts, *([f"[tools: {listed}]"] if named else ())])


def tools_of(prompt: object) -> list[tuple[str, str]]:
    """(name, what it is for) of the tools that come with a prompt; what it is for may be empty."""
    schemas = [one.get("function", one) for one in options_of(prompt).get("tools") or () if isinstance(one, Mapping)]
    known = [schema for schema in schemas if isinstance(schema, Mapping)]
    return [(str(schema.get("name", "")), str(schema.get("description") or "")) for schema in known]


def said(message: Message) -> str:
    """All that a message says, as text for a reader: also reasoning and tool calls, in brackets."""
    parts = [f"[{name}: {message[name]}]" for name in SAID if name != "tool_calls" and message.get(name)]
    parts.append(message.get("content") or "")
    for call in message.get("tool_calls") or ():
        inner = call.get("function", call)
        parts.append(f"[calls {inner['name']}({json.dumps(inner.get('arguments') or {}, ensure_ascii=False)})]")
    return "\n".join(filter(None, parts))


def as_turns(text: str) -> list[Message]:
    """A text prompt as a conversation: one message of the user, or the turns of a transcript."""
    return transcript(text) or [{"role": "user", "content": text}]


def transcript(text: str) -> list[Message] | None:
    """The turns of a prompt in the format of HH-RLHF, "\\n\\nHuman: ...\\n\\nAssistant:"; None for any other text."""
    before, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    names, contents = turns[::2], [turn.strip() for turn in turns[1::2]]
    if before.strip() or names[-2:] != ["Human", "Assistant"] or contents.pop() or not all(contents):
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": content} for name, content in zip(names, contents, strict=False)]


def read_messages(value: Json, name: str) -> list[Message]:
    """A conversation as a list of messages.

    Also from one message alone, and from the form `{"role": [...], "content": [...]}` of tfds. Content parts that are
    text become one text. Arguments of tool calls that are JSON text become objects, as chat templates expect. Keys
    of value None go, which columnar files add to all messages; only a content may be None, beside a tool call.

    Args:
      name: of the column, for messages of errors.

    Raises:
      RecordError: not a conversation, or a message that a text model cannot read.
    """
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    elif isinstance(value, Mapping) and isinstance(value.get("role"), str):
        value = [value]
    if not isinstance(value, list):
        raise RecordError(f"{name} is not text", f"a {type(value).__name__}, neither text nor a list of messages")
    if not value:
        raise RecordError(f"empty {name}")
    return [_message(message, name) for message in value]


def _message(message: Json, name: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RecordError(f"{name} is not a conversation", "every message needs a role, as text")
    found = {key: item for key, item in message.items() if item is not None}
    if found.get("tool_calls") == []:
        del found["tool_calls"]
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"], name)
    content = message.get("content")
    if isinstance(content, list):
        found["content"] = "".join(_part(part, name) for part in content)
    elif content is None and any(found.get(key) for key in SAID):
        if "content" in message:
            found["content"] = None
    elif content is None:
        raise RecordError(f"{name} is not a conversation", "a message has no content")
    elif not isinstance(content, str):
        raise RecordError(f"{name} is not a conversation", f"the content of a message is a {type(content).__name__}")
    if message["role"] == "user" and not str(found.get("content") or "").strip():
        raise RecordError(f"empty user message in {name}")
    return found


def _part(part: Json, name: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise RecordError(f"{name} has a content part of type {kind!r}", "only text can be read")
    return part["text"]


def _tool_calls(calls: Json, name: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RecordError(f"bad tool_calls in {name}", "they are not a list of calls")
    found = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RecordError(f"bad tool_calls in {name}", "a call names no function")
        if isinstance(inner.get("arguments"), str):
            inner = {**inner, "arguments": _from_json(inner["arguments"], f"bad tool_calls in {name}")}
        call = {**call, "function": inner} if "function" in call else inner
        found.append({key: item for key, item in call.items() if item is not None})
    return found


def _from_json(text: str, reason: str) -> Any:
    try:
        return from_json(text) if text.strip() else None
    except RecordError as error:
        raise RecordError(reason, str(error)) from error


def read_turns(value: Json, name: str) -> list[Message]:
    """A conversation that waits for an answer; see `read_messages`.

    Raises:
      RecordError: also where the assistant has the last word.
    """
    messages = read_messages(value, name)
    if messages[-1]["role"] == "assistant":
        raise RecordError(f"{name} ends with the assistant", "the last message of a prompt is the one to answer")
    return messages


def read_answer(messages: Sequence[Message], name: str) -> Answer:
    """The messages that follow a prompt as an answer: text where it is one message with nothing but a content.

    Raises:
      RecordError: they do not start and end with the assistant, or say nothing.
    """
    roles = [message["role"] for message in messages]
    if not roles or {roles[0], roles[-1]} != {"assistant"}:
        raise RecordError(
            f"{name} is not an answer", f"{shown(roles)} follow the prompt, not messages of the assistant"
        )
    if not any((messages[-1].get("content") or "").strip() or messages[-1].get(key) for key in SAID):
        raise RecordError(f"empty {name}")
    if len(messages) == 1 and messages[0].keys() == {"role", "content"}:
        return messages[0]["content"]
    return list(messages)


def read_options(values: Mapping[str, Json]) -> dict[str, Any]:
    """The columns `tools`, a list of JSON schemas, and `chat_template_kwargs`, an object, each also as JSON text, as
    arguments for the chat template. Keys of value None, which columnar files add, go.

    Raises:
      RecordError: a column of another kind, or a name in `chat_template_kwargs` that this package sets.
    """
    tools, options = (_parsed(values.get(name), name) for name in ("tools", "chat_template_kwargs"))
    if not isinstance(tools, list | None) or not all(isinstance(tool, Mapping) for tool in tools or ()):
        raise RecordError("bad tools", "not a list of JSON schemas")
    if not isinstance(options, Mapping | None):
        raise RecordError("bad chat_template_kwargs", f"a {type(options).__name__}, not an object")
    if reserved := sorted(set(options or ()) & _RESERVED):
        raise RecordError("bad chat_template_kwargs", f"{reserved[0]} cannot be set there; leave it out")
    found = {key: item for key, item in (options or {}).items() if item is not None}
    return found | ({"tools": _without_none(tools)} if tools else {})


def _parsed(value: Json, name: str) -> Any:
    return _from_json(value, f"bad {name}") if isinstance(value, str) else value


def _without_none(value: Json) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
