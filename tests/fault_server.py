"""Runs commands in forked children of one process that has everything imported: a command costs what it computes.

Reads a request a line, JSON, and answers each with a line. A request with ``argv`` starts a child and is answered with
its ``pid``. ``argv``: a command's name, or the path of a script, and its arguments; ``environment``: variables to set
first; ``folder``: file operations below it are counted (null: none); ``die_at``: the process kills itself before its
n-th file operation, from 1 (null: never); ``die_when``: a pattern, it kills itself before the first operation at which
such a file is in the folder; ``fill_at``: before its n-th file operation it fills the disk with a file ``ballast`` in
the folder. A request with ``pid`` alone asks for what has become of that child: ``code`` (negative: the signal),
``out``, ``err``, ``operations`` (how many there were), or null while it runs.
"""

import contextlib
import gc
import importlib
import json
import mmap
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime", "shutil.rmtree"}


# What commands import when they need it.
ON_DEMAND = (
    *(f"cascade_fast.{name}" for name in ("cascade", "model.modeling", "model.measuring", "base.texts")),
    *(f"cascade_fast.{name}" for name in ("runtime.run_folder", "training.data_parallel", "training.sharding")),
    *("matplotlib.backends.backend_agg", "matplotlib.figure", "torch.distributed.fsdp"),
)


def main() -> None:
    names = ("train", "evaluate", "generate", "report", "base_pass")
    commands = {name: importlib.import_module(f"cascade_fast.{name}").main for name in names}
    for name in ON_DEMAND:
        importlib.import_module(name)
    import torch
    import transformers

    from cascade_fast.planning.devices import this_machine
    from cascade_fast.runtime.compute import Compute

    _ = transformers.LlamaForCausalLM, transformers.AutoTokenizer, transformers.DynamicCache, transformers.TextStreamer
    assert torch.get_num_threads() == 1, "children of a process with threads would hang"
    this_machine(Compute(torch.device("cpu"), torch.float32))  # half a second, once
    gc.freeze()  # what is imported is not looked through again by every collection in a child
    children = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(sys.stdin):
            request = json.loads(line)
            if "argv" in request:
                files = [Path(folder) / f"{number}.{name}" for name in ("out", "err")]
                counter = mmap.mmap(-1, 8)  # shared with the child
                child = os.fork()
                if child == 0:
                    _child(commands, request, files, counter)
                children[child] = files, counter
                answer = {"pid": child}
            else:
                answer = _ended(request["pid"], *children[request["pid"]])
                if answer is not None:
                    del children[request["pid"]]
            print(json.dumps(answer), flush=True)
    for child in children:  # nobody waits for them any more
        os.kill(child, signal.SIGKILL)
    gc.unfreeze()  # else nanobind counts what is left as leaks


def _ended(child: int, files: list[Path], counter: mmap.mmap) -> dict | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid == 0:
        return None
    out, err = (file.read_text(errors="replace") for file in files)
    code, operations = os.waitstatus_to_exitcode(status), int.from_bytes(counter[:], "little")
    return {"code": code, "out": out, "err": err, "operations": operations}


def _run(commands: dict, argv: list[str]) -> int | None:
    if argv[0] in commands:
        return commands[argv[0]](argv[1:])
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")
    return 0


def _fill_disk(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    for size in (2**20, 2**12, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(size))


def _child(commands, request, files, counter) -> None:
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(request["environment"])
    if request["folder"] is not None:
        _count_operations(request, counter)
    code = 1
    try:
        code = _run(commands, request["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _count_operations(request, counter) -> None:
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


if __name__ == "__main__":
    main()
