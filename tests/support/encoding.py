"""One prompt and one answer as token ids."""


def encode_pair(tokenizer, prompt, answer):
    """(prompt ids, answer ids with EOS)."""
    ids, (found,) = tokenizer.encode_answers(prompt, [answer])
    return ids, found.ids
