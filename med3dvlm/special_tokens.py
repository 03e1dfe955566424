"""Keep the texts of special tokens in data sets and user input as plain words: what a tokenizer would take for a special token is broken up."""

import re
from functools import lru_cache
from typing import Any


def only_words(tokenizer: Any, text: str, inserted: str = " ") -> str:
    """Insert `inserted` after the first character of whatever the tokenizer would take for a special token.

    `split_special_tokens` does not suffice: a Unigram model has its special tokens among its words, too.
    """
    return _openings(tokenizer, len(tokenizer)).sub(lambda found: found[0] + inserted, text)


@lru_cache(maxsize=8)
def _openings(tokenizer: Any, size: int) -> re.Pattern[str]:
    """Return a pattern for the first character of each special token's text. `size`, of the vocabulary, grows when tokens are added."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    texts = sorted(text for text in special if len(text) > 1)
    return re.compile("|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in texts) or "(?!)")
