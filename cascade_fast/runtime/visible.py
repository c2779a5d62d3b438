"""Text that others wrote - people, models, files - made safe to show."""

import re

# C0 and DEL but for newline and tab, C1, separators that some take for newlines, the bidirectional embeddings,
# overrides and isolates, lone surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """``text`` with the characters that a terminal or a page obeys instead of showing them, or that no encoding can
    hold, as Python writes them: ``\\x1b``, ``\\u202e``. Newlines and tabs stay."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
