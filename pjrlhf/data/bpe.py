"""A byte-level BPE tokenizer for models trained from scratch on text."""

import pathlib
from collections.abc import Iterable

from pjrlhf.data.tokenizer_files import write_folder
from pjrlhf.errors import UserError

SPECIAL = ("<pad>", "<s>", "</s>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(folder: pathlib.Path, texts: Iterable[str], vocab_size: int) -> None:
    """Trains a tokenizer on `texts` and writes it to `folder` as tokenizer.json and tokenizer_config.json.

    Every byte is a token (byte-level BPE, Radford et al. 2019, section 2.2), so every text can be encoded, and decoding
    returns it. The same texts give the same files.

    Args:
      vocab_size: number of tokens, special tokens included.

    Raises:
      UserError: `vocab_size` is less than the number of bytes and special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL)
    if vocab_size < smallest:
        raise UserError(
            f"model.tokenizer.vocab_size: {vocab_size} is less than the {smallest} bytes and special tokens; raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_folder(folder, tokenizer, add_bos_token=True, chat_template=CHAT_TEMPLATE)
