"""One prompt and one answer as token ids."""


def encode_pair(tokenizer, prompt, answer):
    """(prompt ids, answer ids with EOS)."""
    ids, (answer_ids,) = tokenizer.encode_answers(prompt, [answer])
    return ids, answer_ids
