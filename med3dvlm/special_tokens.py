"""Texts of data sets and users as words alone: what a tokenizer would take for one of its special tokens is broken up."""

import re
from functools import lru_cache
from typing import Any


def only_words(tokenizer: Any, text: str, inserted: str = " ") -> str:
    """The text with `inserted` after the first character of whatever the tokenizer would take for a special token.

    `split_special_tokens` does not suffice: a Unigram model has its special tokens among its words, too.
    """
    return _openings(tokenizer, len(tokenizer)).sub(lambda found: found[0] + inserted, text)


@lru_cache(maxsize=8)
def _openings(tokenizer: Any, size: int) -> re.Pattern[str]:
    """The first character of a special token's text, wherever one stands. `size`, of the vocabulary, grows where tokens are added."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    texts = sorted(text for text in special if len(text) > 1)
    return re.compile("|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in texts) or "(?!)")
