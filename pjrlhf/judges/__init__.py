"""Judges: which of two answers is better by a criterion; by scores, or by a language model behind an API."""
