"""Texts to token blocks: ``x = block[:-1]``, ``y = block[1:]``, blocks of ``seq_len + 1`` tokens, one after another.

Training, validation and test blocks never come from the same text: where a split is full in the middle of a text,
the rest of that text is left out, so that validation does not continue what training has read.
"""

import hashlib
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.config import ConfigError, RunConfig

SPLITS = ("train", "val", "test")
_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_DEFAULT_COLUMNS = (("text",), ("instruction", "input", "output"))
_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class TokenBlocks:
    """``ids``: split -> ``(blocks, seq_len + 1)`` int32. ``source`` names the texts for reports."""

    ids: dict[str, Tensor]
    source: str

    def fingerprint(self) -> str:
        """SHA-256 of every split's tokens."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(f"{split} {tuple(self.ids[split].shape)}".encode())
            digest.update(self.ids[split].numpy().tobytes())
        return digest.hexdigest()


def load_blocks(config: RunConfig, tokenizer: Any) -> TokenBlocks:
    """Tokenises ``config.dataset`` and cuts it into the blocks of each split.

    Raises:
        ConfigError: an unknown dataset or column, texts too short for a block, or fewer blocks than asked.
    """
    return cut_blocks(load_texts(config), tokenizer, config)


def cut_blocks(texts: Iterable[str], tokenizer: Any, config: RunConfig) -> TokenBlocks:
    """The blocks of each split, in the order of ``texts``; reads no further than it needs to."""
    want_test = config.val_blocks if config.test_blocks is None else config.test_blocks
    wanted = {"train": config.train_blocks, "val": config.val_blocks, "test": want_test}
    blocks: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    splits = iter(SPLITS)
    split, found, longest = next(splits), 0, 0
    for ids in _tokenised(texts, tokenizer):
        while len(blocks[split]) >= wanted[split] and split != "test":
            split = next(splits)
        if all(len(blocks[name]) >= wanted[name] for name in SPLITS):
            break
        longest = max(longest, len(ids))
        cut = _cut(ids, config.seq_len)
        found += len(cut)
        blocks[split] += cut[: wanted[split] - len(blocks[split])]
    if found == 0:
        raise ConfigError(
            f"dataset: {config.dataset!r}: every text is shorter than one block of seq_len + 1 = {config.seq_len + 1} "
            f"tokens (the longest has {longest}); lower seq_len"
        )
    required = ("train", "val") if config.test_blocks is None else SPLITS
    if any(len(blocks[name]) < wanted[name] for name in required):
        asked = " + ".join(f"{wanted[name]} {name}" for name in required)
        raise ConfigError(
            f"train_blocks, val_blocks, test_blocks: {asked} blocks asked, but {config.dataset!r} has {found} of "
            f"{config.seq_len} tokens (a text is never shared between splits)"
        )
    shape = (-1, config.seq_len + 1)
    ids_by_split = {name: torch.tensor(rows, dtype=torch.int32).reshape(shape) for name, rows in blocks.items()}
    return TokenBlocks(ids_by_split, config.dataset)


def text_blocks(config: RunConfig, tokenizer: Any, limit: int | None = None) -> Tensor:
    """All blocks of ``config.dataset``, or the first ``limit``: ``(blocks, seq_len + 1)`` int32. No splits.

    Raises:
        ConfigError: as :func:`load_blocks`.
    """
    blocks: list[list[int]] = []
    for ids in _tokenised(load_texts(config), tokenizer):
        blocks += _cut(ids, config.seq_len)
        if limit is not None and len(blocks) >= limit:
            break
    if not blocks:
        raise ConfigError(
            f"dataset: {config.dataset!r}: every text is shorter than one block of seq_len + 1 = {config.seq_len + 1} "
            f"tokens; lower seq_len"
        )
    return torch.tensor(blocks[:limit], dtype=torch.int32)


def _cut(ids: list[int], seq_len: int) -> list[list[int]]:
    return [ids[i : i + seq_len + 1] for i in range(0, len(ids) - seq_len, seq_len)]


def _tokenised(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _TEXTS_AT_ONCE)):
        yield from tokenizer(batch, verbose=False)["input_ids"]


# --- texts ----------------------------------------------------------------------------------------------------------


def load_texts(config: RunConfig) -> Iterable[str]:
    """The texts of ``config.dataset``, in order. Raises ConfigError when there is no such dataset or column."""
    if config.dataset == "pydoc":
        if config.text_columns or config.text_template is not None:
            raise ConfigError("text_columns, text_template: pydoc has no columns; leave them out")
        return pydoc_texts()
    rows = _load_rows(config.dataset)
    return _render(rows, config)


def pydoc_texts() -> list[str]:
    """CPython's reference manual as shipped in ``pydoc_data``, by topic.

    Some topics quote whole sections of others; a paragraph is kept where it comes first, so that no split holds
    what another one has.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = []
    for topic in topics.values():
        paragraphs = []
        for paragraph in topic.split("\n\n"):
            key = paragraph.strip()
            if key not in seen or len(key) < 40:  # short ones (headings, single words) are no quotation
                paragraphs.append(paragraph)
            seen.add(key)
        texts.append("\n\n".join(paragraphs))
    return texts


def _load_rows(dataset: str) -> Any:
    import datasets

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    path = Path(dataset)
    if path.exists():
        builder, files = _local_files(path)
        options = {"sample_by": "document"} if builder == "text" else {}
        try:
            return datasets.load_dataset(builder, data_files=files, split="train", **options)
        except Exception as error:  # whatever the parser of the user's file raises
            cause = error.__cause__ or error
            raise ConfigError(f"dataset: {dataset!r} cannot be read as {builder}: {_first_line(cause)}") from error
    if path.suffix in _SUFFIXES or path.is_absolute():
        raise ConfigError(f"dataset: {dataset!r}; no such file or folder")
    from cascade_fast.base_model import hub_reachable

    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # what has been downloaded before is still found
    try:
        return datasets.load_dataset(dataset, split="train")
    except Exception as error:
        raise ConfigError(
            f"dataset: {dataset!r}; not a local path, not 'pydoc', and not to be had from the Hugging Face Hub: "
            f"{_first_line(error)}"
        ) from error


def _local_files(path: Path) -> tuple[str, list[str]]:
    """The ``datasets`` builder for ``path`` and the files it reads, sorted."""
    files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES) if path.is_dir() else [path]
    kinds = {_SUFFIXES.get(p.suffix) for p in files}
    allowed = ", ".join(_SUFFIXES)
    if not files:
        raise ConfigError(f"dataset: {str(path)!r}; the folder holds no file of {allowed}")
    if len(kinds) > 1:
        raise ConfigError(
            f"dataset: {str(path)!r}; the folder mixes kinds of files: {', '.join(sorted(map(str, kinds)))}"
        )
    (kind,) = kinds
    if kind is None:
        raise ConfigError(f"dataset: {str(path)!r}; must be a file of {allowed}, or a folder of them")
    return kind, [str(p) for p in files]


def _render(rows: Any, config: RunConfig) -> Iterator[str]:
    """One text a row: the template filled in, or the columns joined by newlines."""
    columns = list(rows.column_names)
    template = config.text_template
    if template is None:
        wanted = config.text_columns or next((c for c in _DEFAULT_COLUMNS if set(c) <= set(columns)), ())
        if not wanted:
            raise ConfigError(f"text_columns: not given, and {config.dataset!r} has columns {', '.join(columns)}")
        _check_columns("text_columns", wanted, columns)
        return ("\n".join("" if row[c] is None else str(row[c]) for c in wanted) for row in rows)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"text_template: {template!r}; {error}") from None
    if not names:
        raise ConfigError(f"text_template: {template!r}; names no column in braces; has {', '.join(columns)}")
    _check_columns("text_template", names, columns)
    return (template.format_map({c: "" if row[c] is None else row[c] for c in names}) for row in rows)


def _check_columns(setting: str, wanted: Iterable[str], columns: list[str]) -> None:
    for name in wanted:
        if name not in columns:
            raise ConfigError(f"{setting}: {name!r}; the dataset's columns are {', '.join(columns)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
