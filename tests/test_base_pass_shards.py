"""The base pass in shards, of several processes or of jobs: the same files as one process writes."""

import json

import pytest
import torch
from test_ragged import ragged_texts
from torchrun import together

from cascade_fast import base_pass as command
from cascade_fast import ops, train
from cascade_fast.base import fill_store
from cascade_fast.base import shards as module
from cascade_fast.base.base_pass import base_pass, make_shard
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.model import find_base
from cascade_fast.base.shards import Chunk, Shards
from cascade_fast.base.split_store import ranges
from cascade_fast.base.splits import split_texts
from cascade_fast.base.texts import load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.runtime import processes as processes_module
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import make_settings
from cascade_fast.stages.kind import base_needs

RAGGED = {"train_blocks": None, "val_blocks": None, "train_tokens": 900, "val_tokens": 300, "test_tokens": 200}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(processes_module, "_stays_alone", False)  # a job with --shard ends with its process
    monkeypatch.setitem(fill_store.TOKENS_AT_ONCE, "cpu", 128)


def _arguments(settings, cache, texts=None):
    settings = make_settings(settings)
    base = find_base(settings)
    sequences = load_sequences(settings, base.tokenizer()) if texts is None else split_texts(texts, settings)
    return base, sequences, settings, base_needs(settings), Compute(torch.device("cpu"), torch.float32), cache


def _files(cache):
    """Of the one pass in a cache folder, beside its record, which has seconds in it."""
    (folder,) = (cache / "base-pass").iterdir()
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "base_pass.json"
    }


def _read(monkeypatch):
    """Tokens that go into the base, as they are read."""
    read, real = [], fill_store._Kept

    def counted(kept_BS, *args):
        read.append(kept_BS.numel())
        return real(kept_BS, *args)

    monkeypatch.setattr(fill_store, "_Kept", counted)
    return read


@pytest.mark.parametrize("case", ["blocks", "ragged", "context and keys and values"])
def test_shards_are_joined_to_the_files_of_one_process(tiny_settings, look_settings, tmp_path, capsys, case):
    settings, texts = tiny_settings, None
    if case != "blocks":
        settings, texts = {**tiny_settings, **RAGGED}, ragged_texts()
    if case.startswith("context"):
        settings = {**look_settings, **RAGGED, "kv": "store"}
    whole = base_pass(*_arguments(settings, tmp_path / "whole", texts))
    assert ("kv" in whole.stores["train"]) is case.startswith("context")
    for number in (3, 1, 2):
        made = make_shard(*_arguments(settings, tmp_path / "parts", texts), number, 3)
        assert (made is None) is (number != 2)
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")
    assert "shard 1 of 3 is there; missing: 2\n" in capsys.readouterr().out
    assert base_pass(*_arguments(settings, tmp_path / "parts", texts)).reused


def test_a_run_makes_the_shards_that_are_missing_and_no_others(tiny_settings, tmp_path, monkeypatch, capsys):
    base_pass(*_arguments(tiny_settings, tmp_path / "whole"))
    arguments, read = _arguments(tiny_settings, tmp_path / "parts"), _read(monkeypatch)
    for number in (1, 4):
        make_shard(*arguments, number, 5)
    base_pass(*arguments)
    assert sum(read) == sum(of.tokens for of in arguments[1].read.values())  # every token once
    assert "train: 2 of 5 shards are there; to be made: 2-3, 5" in capsys.readouterr().out
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


def test_an_interrupted_shard_and_an_interrupted_join_go_on(tiny_settings, tmp_path, monkeypatch):
    settings = {**tiny_settings, "criterion": "cosine"}
    base_pass(*_arguments(settings, tmp_path / "whole"))
    monkeypatch.setattr(fill_store, "SAVE_PROGRESS_SECONDS", 0.0)
    arguments = _arguments(settings, tmp_path / "parts")
    real, calls = ops.cosine_score, []

    def dies_in_the_fourth_batch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "cosine_score", dies_in_the_fourth_batch)
    with pytest.raises(KeyboardInterrupt):
        make_shard(*arguments, 2, 2)  # five of the ten batches of training text
    assert make_shard(*arguments, 2, 2) is None
    others = sum(len(s.length_B) for name, s in arguments[1].splits.items() if name != "train")
    assert len(calls) <= 4 + 2 + -(-others // 4)  # the three batches were not run again
    assert make_shard(*arguments, 2, 2) is None
    before = len(calls)

    appended, real_append = [], module._append

    def dies_in_the_ninth(*args):
        appended.append(args[0])
        if len(appended) == 9:
            real_append(*args)
            raise KeyboardInterrupt
        return real_append(*args)

    monkeypatch.setattr(module, "_append", dies_in_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        make_shard(*arguments, 1, 2)
    made = len(calls) - before
    (folder,) = (tmp_path / "parts/base-pass").iterdir()
    assert [p.name for p in sorted((folder / "train/shards").glob("*-of-*")) if p.is_dir()] == ["00002-of-00002"]
    base_pass(*arguments)
    assert len(calls) == before + made
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


def test_what_is_damaged_is_made_again(tiny_settings, tmp_path, monkeypatch, capsys):
    base_pass(*_arguments(tiny_settings, tmp_path / "whole"))
    arguments = _arguments(tiny_settings, tmp_path / "parts")
    for number in (1, 2):
        make_shard(*arguments, number, 3)
    (path,) = (tmp_path / "parts/base-pass").glob("*/train/shards/00002-of-00003/hidden.bin")
    content = bytearray(path.read_bytes())
    content[50] ^= 0xFF
    path.write_bytes(content)
    read = _read(monkeypatch)
    make_shard(*arguments, 3, 3)
    assert (
        "00002-of-00003/hidden.bin: damaged (checksum differs); what is damaged is made anew" in capsys.readouterr().out
    )
    assert read.count(128) <= 10
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


def test_shards_of_another_count_or_of_something_else_are_not_mixed(tiny_settings, tmp_path, capsys):
    arguments = _arguments(tiny_settings, tmp_path)
    make_shard(*arguments, 1, 3)
    with pytest.raises(InputError, match=r"shard: of 2; jobs of 3 shards have begun this pass: give --shard N/3, or"):
        make_shard(*arguments, 1, 2)
    (manifest,) = tmp_path.glob("base-pass/*/train/shards/manifest.json")
    content = json.loads(manifest.read_text())
    assert [shard["rows"] for shard in content["shards"]] == [[0, 384], [384, 896], [896, 1280]]
    assert [shard["sequences"] for shard in content["shards"]] == [[0, 12], [12, 28], [28, 40]]
    del content["sha256"]
    manifest.write_text(json.dumps({**content, "fingerprint": "another"}))
    passed = base_pass(*arguments)
    assert "base pass, train: there are shards of something else; made anew" in capsys.readouterr().out
    assert len(passed.stores["train"]) == 1280
    assert not list(tmp_path.rglob("shards"))


def test_all_shards_are_in_float32_where_one_of_them_needs_it(tiny_settings, tmp_path, monkeypatch, capsys):
    settings = {**tiny_settings, "store_dtype": "auto"}
    exact = base_pass(*_arguments(settings, tmp_path / "exact")).stores["train"].hidden.float().abs().amax(1)
    most = [float(exact[part].max()) for part in (slice(0, 640), slice(640, None))]
    large = 1 + most.index(max(most))
    small = 3 - large
    monkeypatch.setattr(fill_store, "FLOAT16_MAX", (most[0] + most[1]) / 2)
    whole = base_pass(*_arguments(settings, tmp_path / "whole"))
    assert whole.stores["train"].hidden.dtype == torch.float32
    arguments = _arguments(settings, tmp_path / "parts")
    assert make_shard(*arguments, small, 2) is None  # in float16
    assert make_shard(*arguments, large, 2) is None  # in float32, so that the other one is of no use
    assert f"shard {large} of 2 is there; missing: {small}\n" in capsys.readouterr().out
    assert make_shard(*arguments, small, 2) is not None
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_shards_are_even_and_hold_every_chunk_once(count):
    chunks = [Chunk(rows=n, work=2 * n, sequences=1) for n in (9, 9, 8, 8, 7, 6, 5, 5, 2, 1)]
    shards = Shards.cut(None, None, chunks, count)
    held = [n for number in range(1, count + 1) for n in range(10)[shards.chunks(number)]]
    assert held == list(range(10))
    works = [shards.work_of(number) for number in range(1, count + 1)]
    assert sum(works) == 120
    assert max(works) <= 120 / count + 18
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


# --- the command, and several processes -------------------------------------------------------------------------------


@pytest.fixture
def flags(tiny_settings, tmp_path):
    settings = {**tiny_settings, "num_stages": 1, "epochs": 1, "cache_dir": tmp_path / "cache"}
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("3", "shard: '3'; must be N/COUNT, the part and how many there are: 3/64"),
        ("a/b", "shard: 'a/b'; must be N/COUNT"),
        ("0/4", "shard: '0/4'; the parts are 1/4 to 4/4"),
        ("5/4", "shard: '5/4'; the parts are 1/4 to 4/4"),
        ("1/0", "shard: '1/0'; the count must be 1 to 99,999"),
    ],
)
def test_a_wrong_shard_is_one_line(capsys, flags, shard, said):
    assert command.main([*flags, "--shard", shard]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1


def test_jobs_settle_nothing_by_the_machine_they_are_on(capsys, flags):
    assert command.main([*flags, "--shard", "1/4", "--stage-kind", "second-look"]) == 2
    assert "kv: auto; depends on the machine, and all shards must be made alike" in capsys.readouterr().err


def test_a_training_uses_the_shards_of_jobs(capsys, flags, tmp_path):
    assert command.main([*flags, "--shard", "2/2"]) == 0
    assert train.main([*flags, "--out", str(tmp_path / "first")]) == 0
    assert "base pass, train: 1 of 2 shards are there; to be made: 1" in capsys.readouterr().out
    assert command.main(flags) == 0
    assert train.main([*flags, "--out", str(tmp_path / "second")]) == 0
    assert capsys.readouterr().out.count("base pass: reused, ") == 2


def test_two_processes_make_the_pass_of_one(server, flags, tmp_path, monkeypatch):
    monkeypatch.setitem(fill_store.TOKENS_AT_ONCE, "cpu", 2048)  # as in the processes
    done = together(server, 2, "base_pass", *flags, "--train-blocks", "160")
    assert done.returncode == 0, done.stderr
    several = _files(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("shards"))
    (tmp_path / "cache").rename(tmp_path / "of-two")
    assert command.main([*flags, "--train-blocks", "160"]) == 0
    assert _files(tmp_path / "cache") == several


SCRIPT = """
import sys
from pathlib import Path
import torch
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.shards import store_of_all
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.processes import end_processes, start_processes
from cascade_fast.runtime import shared_folder

folder, these = Path(sys.argv[1]), start_processes()
shared_folder.check_shared(folder, "cache_dir", "--cache-dir")
shared_folder.SECONDS = 0.1
try:
    shared_folder.check_shared(folder / f"of-{these.rank}", "cache_dir", "--cache-dir")
except InputError as error:
    (folder / f"error-{these.rank}").write_text(str(error))
filled = []

def create(where, rows, meta):
    return HiddenStore.create(where, rows, 2, torch.float32, with_loss=False, meta=meta)

def fill(store, part):
    for number in range(5)[part]:
        filled.append(number)
        hidden = torch.full((number, 2), float(number))
        store.append({"hidden": hidden, "label": torch.full((number,), number)})

for _ in range(2):
    store = store_of_all(folder / "store", range(5), {"kind": "test"}, create, fill)
(folder / f"filled-{these.rank}").write_text(f"{filled} {store['label'].tolist()} {store.hidden[:, 1].tolist()}")
end_processes()
"""


def test_two_processes_fill_one_store_and_notice_folders_that_are_not_the_same(server, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = together(server, 2, script, tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        said = (tmp_path / f"error-{rank}").read_text()
        assert said.startswith(f"cache_dir: '{tmp_path}/of-{rank}'; must be on a file system that all processes of")
        assert said.endswith(
            "process 1 does not see there what process 0 has written: name another folder with --cache-dir"
        )
    numbers = [n for n in range(5) for _ in range(n)]
    filled = [(tmp_path / f"filled-{rank}").read_text() for rank in (0, 1)]
    rows = f" {numbers} {[float(n) for n in numbers]}"
    assert filled == [f"[0, 1, 2, 3]{rows}", f"[4]{rows}"]  # six rows and four
    assert HiddenStore.open(tmp_path / "store").meta == {"kind": "test"}
