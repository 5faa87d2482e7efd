"""The tokenizer of models trained from scratch on text."""

import pytest
from support.encoding import encode_pair

from pjrlhf.data import bpe
from pjrlhf.data.tokenization import load_tokenizer
from pjrlhf.errors import UserError

TEXTS = ["the quick brown fox jumps over the lazy dog", "the lazy dog sleeps , the fox does not"] * 10
ASKED = [{"role": "user", "content": "the fox ?"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    bpe.write_tokenizer(folder, TEXTS, 300)
    return load_tokenizer(folder)


def test_any_text_comes_back(tokenizer):
    for text in ("the lazy fox", " leading and  double  spaces ", "a\n\tb\r\n", "naïve café — 数字 🦊", "\x00\x7f"):
        assert tokenizer.decode(encode_pair(tokenizer, "", text)[1]) == text


def test_what_was_seen_often_becomes_short(tokenizer):
    assert tokenizer.vocab_size == 300
    seen, unseen = (encode_pair(tokenizer, "", text)[1] for text in (" the lazy dog", " xvz qjkw pdb"))
    assert len(seen) < 7 < 13 <= len(unseen)  # EOS included


def test_same_texts_same_files(tmp_path):
    for name in ("a", "b"):
        bpe.write_tokenizer(tmp_path / name, iter(TEXTS), 290)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_conversations_have_one_bos_one_eos_and_a_boundary(tokenizer):
    assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}) == 3
    prompt, answer = encode_pair(tokenizer, ASKED, "the dog")
    assert prompt == tokenizer.encode_prompt(ASKED)
    assert tokenizer.decode(prompt, skip_special=False) == "<s><user>the fox ?<assistant>"
    assert tokenizer.decode(answer, skip_special=False) == "the dog</s>"
    assert (prompt.count(tokenizer.bos_id), answer.count(tokenizer.eos_id)) == (1, 1)


def test_plain_text_starts_with_one_bos(tokenizer):
    prompt, answer = encode_pair(tokenizer, "the fox", " jumps")
    assert tokenizer.decode(prompt, skip_special=False) == "<s>the fox"
    assert tokenizer.decode(answer, skip_special=False) == " jumps</s>"


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(UserError, match="vocab_size: 100 is less than the 261 bytes and special tokens; raise it"):
        bpe.write_tokenizer(tmp_path, TEXTS, 100)
