"""Documents of the two tasks beside this file, from CPython's reference text, which Python itself ships: no download.

Only the last fifth of the topics is used. A run with ``--shuffle off`` reads the topics in order, so that it has seen
none of these; the default, which shuffles them, may have trained on some.
"""

import random

import datasets

from cascade_fast.base.texts import pydoc_texts

PIECE = 1000  # characters, about 250 tokens
SHOWN, ASKED = 24, 12  # words of a paragraph that are given, and that are asked for


def _held_out() -> list[str]:
    texts = pydoc_texts()
    return texts[-(len(texts) // 5) :]


def pieces(**_metadata: object) -> dict[str, datasets.Dataset]:
    """``text``: paragraphs, joined up to about ``PIECE`` characters."""
    found = []
    for text in _held_out():
        piece = ""
        for paragraph in text.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= PIECE:
                found.append(piece.strip())
                piece = ""
        if len(piece) >= PIECE // 2:
            found.append(piece.strip())
    return {"test": datasets.Dataset.from_dict({"text": found})}


def continuations(**_metadata: object) -> dict[str, datasets.Dataset]:
    """``start`` of a paragraph, four ``choices`` of how it goes on, one of them true: number ``answer``."""
    words = [paragraph.split() for text in _held_out() for paragraph in text.split("\n\n")]
    words = [w for w in words if len(w) >= SHOWN + ASKED]
    goes_on = [" ".join(w[SHOWN : SHOWN + ASKED]) for w in words]
    rng = random.Random(0)
    rows: dict[str, list] = {"start": [], "choices": [], "answer": []}
    for number, paragraph in enumerate(words):
        others = [other for other in goes_on if other != goes_on[number]]
        choices = [goes_on[number], *rng.sample(others, 3)]
        rng.shuffle(choices)
        rows["start"].append(" ".join(paragraph[:SHOWN]))
        rows["choices"].append(choices)
        rows["answer"].append(choices.index(goes_on[number]))
    return {"test": datasets.Dataset.from_dict(rows)}
