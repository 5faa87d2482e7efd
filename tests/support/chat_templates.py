"""What chat templates of public families do, in a few lines each, on a tokenizer of bytes."""

import dataclasses

import tokenizers
import transformers

START, END = "<|im_start|>", "<|im_end|>"


def chatml(default="", think=False):
    """ChatML; `default` is the system turn of conversations without one, `think` handles reasoning as Qwen 3 does."""
    system = (
        f"{{% if messages[0]['role'] != 'system' %}}{START}system\n{default}{END}\n{{% endif %}}" if default else ""
    )
    content, ready = "m['content']", ""
    if think:
        # Reasoning of turns before the last question goes; the answer to it has some, if only an empty one.
        system += (
            "{% set ns = namespace(last=0) %}"
            "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        )
        content = (
            "(('<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n') if m['role'] == 'assistant' and "
            "loop.index0 > ns.last and (loop.last or m.reasoning_content) else '') + m['content'].split('</think>')[-1]"
        )
        ready = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    return (
        f"{system}{{% for m in messages %}}{START}{{{{ m['role'] + '\n' + {content} }}}}{END}\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{START}assistant\n{ready}{{% endif %}}"
    )


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    f"{{% for m in messages %}}{ALTERNATE}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The system turn stands in the last message of the user, and only while nothing answers it.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    f"{{% for m in rest %}}{ALTERNATE}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m['content'] }}[/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
MISTRAL_TEKKEN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'] }}"
    "[/SYSTEM_PROMPT]{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}</s>"
    "{% endif %}{% endfor %}"
)
# Leaves out what it does not know.
SILENT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% elif m['role'] == 'assistant' %}"
    "<|assistant|>{{ m['content'] }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A chat template with its special tokens, the EOS last; whether it writes a system turn in every place."""

    template: str
    special: tuple[str, ...]
    knows_system: bool = True

    def backend(self):
        """A `transformers` tokenizer whose tokens are bytes."""
        special = ["<pad>", "<s>", *self.special]
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        model = tokenizers.Tokenizer(
            tokenizers.models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, [])
        )
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        model.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="<s>", eos_token=self.special[-1], pad_token="<pad>"
        )
        made.chat_template = self.template
        return made


FAMILIES = {
    "llama3": Family(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "qwen2.5": Family(chatml("You are Qwen."), (START, END)),
    "qwen3": Family(chatml(think=True), (START, END)),
    "smollm2": Family(chatml("You are SmolLM."), (START, END)),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), knows_system=False),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]", "</s>"), knows_system=False),
    "mistral_tekken": Family(MISTRAL_TEKKEN, ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "</s>")),
    "silent": Family(SILENT, ("<|user|>", "<|assistant|>", "</s>"), knows_system=False),
}
