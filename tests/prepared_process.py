"""Processes of tests that are forked from one which has imported torch: each begins some seconds of imports later.

A forked process has what importing leaves, and nothing else: no thread, no CUDA context, no group of ranks. It ends as
any interpreter does. Each pytest process starts at most two to fork from, one of them on a virtual GPU, when a test
first asks for it. Tests that measure a process's own memory, or set what torch reads while it is imported, use
`subprocess`.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoaccum.devices import virtual
from autoaccum.devices.virtual import VirtualGpu, control

IMPORTED = ("numpy", "torch._dynamo", "torch.utils.data", "autoaccum.planning.fit", "autoaccum.runner.runner")
READ_AT_IMPORT = ("LD_", "PYTORCH_", "TORCH", "CUBLAS_")
GPU_SETTINGS = "AUTOACCUM_GPU_"


def run_forked(
    program: str | Path, *arguments: str, gpu: VirtualGpu | None = None, env: Mapping[str, str] | None = None,
    cwd: Path | None = None, timeout: float = 240,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run code, or a file of it, in a forked process; return what it printed and its exit code.

    Args:
        program: Code as for `python -c`, or the file of a script.
        arguments: What `sys.argv` has after the program.
        gpu: The virtual GPU that it runs on; None for none.
        env: Variables beside those of this process.
        cwd: Its working directory; None for this process's.
        timeout: Seconds after which it is killed.

    Raises:
        subprocess.TimeoutExpired: It was killed.
    """
    more = dict(env or {}) | (gpu.settings() if gpu is not None else {})
    late = [name for name in more if name.startswith(READ_AT_IMPORT)]
    assert not late, f"{late} is read when torch is imported: start a process of its own"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(GPU_SETTINGS)}
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        request = {
            "program": str(program), "is_file": isinstance(program, Path), "arguments": arguments, "env": kept | more,
            "cwd": str(cwd or Path.cwd()), "files": list(map(str, files)),
        }  # fmt: skip
        status = _ask(gpu is not None, request, timeout)
        out, err = (file.read_text(errors="replace") for file in files)
    return subprocess.CompletedProcess([str(program), *arguments], os.waitstatus_to_exitcode(status), out, err)


@functools.cache
def _process(on_gpu: bool) -> subprocess.Popen[bytes]:
    """Start the process to fork from; it ends with this one, which then closes its pipe."""
    env = dict(virtual.environment(VirtualGpu())) if on_gpu else dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [env.get("PYTHONPATH")])])
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}  # for `select`
    return subprocess.Popen([sys.executable, __file__], env=env, **pipes)


def _ask(on_gpu: bool, request: dict[str, Any], timeout: float) -> int:
    """Have a request served; return the wait status of its process."""
    process = _process(on_gpu)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    child = process.stdout.readline()
    assert child, f"the process to fork from ended with {process.wait()}"
    if not select.select([process.stdout], [], [], timeout)[0]:
        os.killpg(int(child), 9)
        process.stdout.readline()
        raise subprocess.TimeoutExpired(request["program"], timeout)
    return int(process.stdout.readline())


# -- in the process to fork from, and in those that are forked


def serve() -> dict[str, Any] | None:
    """Fork a process for each request; return the request in that process, and None at the end."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each of the many collections would go through all that torch has
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            os.setsid()
            request: dict[str, Any] = json.loads(line)
            return request
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
    return None


def prepare(request: dict[str, Any]) -> None:
    """Give this process its variables, files and working directory."""
    imported = {name: value for name, value in os.environ.items() if name.startswith(READ_AT_IMPORT)}
    os.environ.clear()
    os.environ.update(request["env"] | imported)
    if control.is_virtual():
        control.read_settings()
    os.chdir(request["cwd"])
    sources = [os.open(os.devnull, os.O_RDONLY)]
    sources += [os.open(file, os.O_WRONLY | os.O_CREAT, 0o600) for file in request["files"]]
    for number, source in enumerate(sources):
        os.dup2(source, number)
        os.close(source)
    sys.stdin = open(0)  # noqa: SIM115  # what the other had read ahead is not ours


def become(program: str, arguments: list[str], *, is_file: bool) -> None:
    """Run a program as `__main__`, whose names last until the interpreter ends."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv, sys.path[0] = ["-c", *arguments], ""
    if is_file:
        module.__file__ = sys.argv[0] = program
        sys.path[0] = str(Path(program).parent)
    source = Path(program).read_text() if is_file else program
    exec(compile(source, program if is_file else "<string>", "exec", dont_inherit=True), module.__dict__)


if __name__ == "__main__" and (request := serve()) is not None:
    prepare(request)
    become(request["program"], request["arguments"], is_file=request["is_file"])
