"""Runs commands in forked children of one process that has everything imported: a command costs what it computes.

Reads a request a line, JSON: ``argv`` (the command's name and its arguments), ``folder`` (file operations below it are
counted), ``die_at`` (the process kills itself before its n-th file operation, from 1; null: never), ``die_when`` (a
pattern: it kills itself before the first operation at which such a file is in the folder), ``fill_at`` (before its n-th
file operation it fills the disk with a file ``ballast`` in the folder). Answers with a line:
``code`` (negative: the signal), ``out``, ``err``, ``operations`` (how many there were).
"""

import contextlib
import gc
import importlib
import json
import mmap
import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime", "shutil.rmtree"}


def main() -> None:
    commands = {
        name: importlib.import_module(f"cascade_fast.{name}") for name in ("train", "evaluate", "generate", "report")
    }
    for name in ("cascade", "model.modeling", "model.measuring", "base.texts", "runtime.run_folder"):
        importlib.import_module(f"cascade_fast.{name}")
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers

    from cascade_fast.planning.devices import this_machine
    from cascade_fast.runtime.compute import Compute

    _ = transformers.LlamaForCausalLM, transformers.AutoTokenizer, transformers.DynamicCache, transformers.TextStreamer
    assert torch.get_num_threads() == 1, "children of a process with threads would hang"
    this_machine(Compute(torch.device("cpu"), torch.float32))  # half a second, once
    gc.freeze()  # what is imported is not looked through again by every collection in a child
    counter = mmap.mmap(-1, 8)  # shared with the children
    for line in sys.stdin:
        request = json.loads(line)
        counter[:] = bytes(8)
        files = [Path(tempfile.gettempdir()) / f"{os.getpid()}.{name}" for name in ("out", "err")]
        child = os.fork()
        if child == 0:
            _child(commands[request["argv"][0]].main, request, files, counter)
        _, status = os.waitpid(child, 0)
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "out": files[0].read_text(errors="replace"),
            "err": files[1].read_text(errors="replace"),
            "operations": int.from_bytes(counter[:], "little"),
        }
        for file in files:
            file.unlink()
        print(json.dumps(answer), flush=True)


def _fill_disk(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    for size in (2**20, 2**12, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(size))


def _child(command, request, files, counter) -> None:
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    folder, die_at, die_when = os.path.abspath(request["folder"]), request["die_at"], request["die_when"]
    counting = threading.RLock()  # filling the disk is an operation, too

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & WRITES:
                return
        elif event not in OPERATIONS:
            return
        path = args[0]
        if not isinstance(path, str | bytes | os.PathLike) or not os.path.abspath(os.fsdecode(path)).startswith(folder):
            return
        with counting:  # checkpoints have a thread of their own
            done = int.from_bytes(counter[:], "little") + 1
            if done == die_at or (die_when and any(Path(folder).glob(die_when))):
                os.kill(os.getpid(), signal.SIGKILL)
            counter[:] = done.to_bytes(8, "little")
            if done == request["fill_at"]:
                _fill_disk(os.path.join(folder, "ballast"))

    sys.addaudithook(hook)
    code = 1
    try:
        code = command(request["argv"][1:])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
