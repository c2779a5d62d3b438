"""Shared by all tests: offline, no cache of the user's is touched, and a tiny model with a tokenizer."""

import gc
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 300


def pytest_sessionstart(session):
    """``make test-gpu`` fails where there is nothing to test on: skipped tests would look like passed ones."""
    if os.environ.get("CASCADE_FAST_REQUIRE_GPU") == "1" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"CASCADE_FAST_REQUIRE_GPU=1, and PyTorch {torch.__version__} finds no CUDA device. On a machine with an "
            "NVIDIA GPU install a CUDA build of PyTorch: make test-gpu TORCH='torch>=2.10' in a new environment"
        )


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Converted models and base passes go to a folder of the test session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """What is there before a file's tests, modules most of all, is not looked through again by every collection of
    garbage: a run asks for five, and they would be most of its time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # else nanobind counts what is left as leaks


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def tiny_llama_config(**changes) -> LlamaConfig:
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaConfig(**{**settings, **changes})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: no training, no files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{symbol: i for i, symbol in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def save_tiny_base(folder: Path, seed: int = 0, **changes) -> Path:
    """A tiny random Llama, taught a little so that its hidden states are not all alike, with a byte tokenizer."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama_config(**changes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer(text)["input_ids"][:64] for text in english_texts(32, 70)])
    for _ in range(30):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def english_texts(count: int, length: int, start: int = 0) -> list[str]:
    """Pieces of CPython's reference text."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics.values())
    return [whole[i : i + length] for i in range(start, start + count * length, length)]


def text_ids(rows: int = 4, length: int = 24) -> torch.Tensor:
    """Token ids of pieces of text, so that tokens leave at every exit."""
    text = torch.tensor(byte_tokenizer()("".join(english_texts(30, 200)))["input_ids"])
    starts = torch.randint(0, len(text) - length, (rows, 1))
    return text[starts + torch.arange(length)]


@pytest.fixture
def own_criteria(monkeypatch):
    """What a test registers is forgotten after it."""
    from cascade_fast import criteria, settings

    names = list(settings.CRITERIA)
    monkeypatch.setattr(criteria, "CRITERIA", dict(criteria.CRITERIA))
    yield
    settings.CRITERIA[:] = names


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def nf4_base(tmp_path_factory) -> Path:
    """The same with matrices of whole blocks of 64 weights, as 4 bit needs them."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "nf4", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A jsonl file with one column, ``text``: 120 texts of 200 bytes."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in english_texts(120, 200)))
    return path


@pytest.fixture(scope="session")
def server():
    """Runs commands that are killed, or whose disk is full; see ``fault_server.py``."""
    from run_faults import FaultServer

    with FaultServer() as running:
        yield running


@pytest.fixture
def tiny_settings(tiny_base, tiny_data) -> dict:
    """Settings of a run that takes a second or two."""
    return _settings(tiny_base, tiny_data)


@pytest.fixture
def look_settings(tiny_settings) -> dict:
    """The same of second looks at two layers, with stores that round nothing."""
    return {**tiny_settings, "stage_kind": "second-look", "layers_per_stage": 2, "store_dtype": "float32"}


@pytest.fixture
def adapter_settings(look_settings) -> dict:
    """The same with adapters."""
    return {**look_settings, "adapter": "lora", "lora_rank": 4, "lora_alpha": 8.0}


@pytest.fixture(scope="session")
def tiny_runs(tiny_base, tiny_data, tmp_path_factory) -> dict[str, Path]:
    """Finished runs with two stages each: ``warm`` (entropy, shared head), ``seed`` (cosine, own heads) and ``look``
    (as warm, but second looks)."""
    from cascade_fast.cascade import run_cascade
    from cascade_fast.settings import make_settings

    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    kinds = {"warm": {"preset": "warm"}, "seed": {"preset": "seed"}, "look": {"stage_kind": "second-look"}}
    for name, kind in kinds.items():
        settings = {
            **_settings(tiny_base, tiny_data),
            **kind,
            "out": str(folder / name),
            "cache_dir": str(folder / "cache"),
            "store_dtype": "float32",
            "accept": "always",
            "num_stages": 2,
            "test_blocks": 12,
        }
        runs[name] = run_cascade(make_settings(settings)).path
    return runs


def _settings(base: Path, data: Path) -> dict:
    return {
        "base": str(base),
        "dataset": str(data),
        "general_dataset": "none",
        "seq_len": 32,
        "train_blocks": 40,
        "val_blocks": 12,
        "layers_per_stage": 2,
        "epochs": 2,
        "batch_tokens": 64,
        "lr": 3e-3,
        "warmup_steps": 2,
        "dtype": "float32",
        "device": "cpu",
        "seed": 7,
    }
