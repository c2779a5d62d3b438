"""GGUF files as folders of safetensors: converted once (10 to 20 s for 135M), kept in the cache folder, checked."""

import contextlib
import importlib.util
import io
import shutil
import tempfile
from pathlib import Path

import torch

from cascade_fast.input_checks import InputError, one_line, shown
from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import DamagedFile, file_sha256, locked, read_json, room_for, set_mode, write_json
from cascade_fast.runtime.visible import visible

MANIFEST = "converted.json"  # written last: names every file with its checksum


def converted(base: str, gguf: Path, cache: Path) -> Path:
    """The folder of the model in ``gguf``, converted if it has not been yet, or if a file of it is damaged.

    Raises:
        InputError: packages are missing, or the file cannot be read as GGUF. ``base``: the setting, for the message.
    """
    if any(importlib.util.find_spec(package) is None for package in ("gguf", "accelerate")):
        raise InputError(f"base: {shown(base)}; reading GGUF needs two packages: pip install gguf accelerate")
    models = cache / "models"
    folder = models / f"{gguf.stem}-{file_sha256(gguf)[:16]}"
    with locked(cache / "locks" / "models.lock"):  # another process that converts it is waited for
        models.mkdir(parents=True, exist_ok=True)
        for left in models.glob("tmp*"):  # by a process that was killed
            shutil.rmtree(left)
        if folder.exists():
            try:
                _check(folder)
                return folder
            except DamagedFile as error:
                say(f"base: {error}; converted anew")
                shutil.rmtree(folder)
        say(f"converting {visible(gguf.name)} to safetensors (once; kept in {folder})")
        with tempfile.TemporaryDirectory(dir=models) as temporary:
            _convert(base, gguf, Path(temporary) / "model")
            (Path(temporary) / "model").rename(folder)
    return folder


def _check(folder: Path) -> None:
    """Raises DamagedFile where a file is not what the conversion wrote."""
    for name, checksum in read_json(folder / MANIFEST, needs=("files",))["files"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != checksum:
            raise DamagedFile(f"{str(folder / name)!r} is missing or damaged")


def _convert(base: str, gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The reader draws its own progress bar on standard error, terminal or not; errors come as exceptions. It gets the
    # file alone: of what lies beside it nothing is read.
    with tempfile.TemporaryDirectory() as alone, contextlib.redirect_stderr(io.StringIO()):
        (Path(alone) / gguf.name).symlink_to(gguf.resolve())
        try:
            model = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=gguf.name, trust_remote_code=False, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=gguf.name, trust_remote_code=False)
        except Exception as error:  # whatever a damaged file leads to
            raise InputError(f"base: {shown(base)}; cannot be read as GGUF: {one_line(error)}") from error
    # The weights are plain float32 now; the mark of the quantised file would forbid saving them.
    del model.hf_quantizer
    del model.config.quantization_config
    with room_for(folder, model.num_parameters() * 4):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        set_mode(path)
    checksums = {str(path.relative_to(folder)): file_sha256(path) for path in files}
    write_json(folder / MANIFEST, {"files": checksums})
