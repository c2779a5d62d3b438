"""Text that others wrote - people, models, files - made safe to show. Loads no torch: mistakes are answered at once."""

import re
import sys

# C0 and DEL but for newline and tab, C1, separators that some take for newlines, the bidirectional embeddings,
# overrides and isolates, lone surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """``text`` with every character that a terminal or a page would obey instead of show made visible.

    C0 and DEL become their Control Pictures (ESC is ``␛``), C1, separators and bidirectional controls ``\\x9b`` or
    ``\\u202e``, and lone surrogates, which no encoding can hold, U+FFFD. Newlines and tabs stay.
    """
    return _CONTROL.sub(_picture, text)


def say_error(text: str) -> None:
    """One line on standard error that says what is wrong."""
    print(f"error: {visible(' '.join(text.splitlines()))}", file=sys.stderr)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
