"""`python -m autoaccum.devices.virtual [--memory 4GiB ...] -- COMMAND ...`: runs a command on a virtual GPU."""

from __future__ import annotations

import argparse
import os
import sys

from ...cli.terminal import show_error
from ...errors import UsageError
from ...units import parse_bytes, parse_part
from . import VirtualGpu, environment

_DEFAULT = VirtualGpu()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m autoaccum.devices.virtual",
        description="Runs a command on a GPU that isn't there: kernels compute nothing, memory is counted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--memory", default="16GiB", metavar="SIZE", help="memory of each device (default: %(default)s)")
    add("--context", default="512MiB", metavar="SIZE", help="taken by the process's context (default: %(default)s)")
    add("--other", default="0", metavar="SIZE", help="taken by another process (default: nothing)")
    add("--devices", type=int, default=_DEFAULT.devices, metavar="N", help="how many (default: %(default)s)")
    add("--compute-capability", default=_DEFAULT.compute_capability, metavar="X.Y", help="default: %(default)s")
    add("--multiprocessors", type=int, default=_DEFAULT.multiprocessors, metavar="N", help="default: %(default)s")
    add("--name", default=_DEFAULT.name, help="default: %(default)s")
    add("--convolution-workspace", metavar="SIZE|FACTORx|transposed", help="of each convolution (default: nothing)")
    add("--no-convolution-fallback", action="store_true", help="no convolution does without its workspace")
    add("--copies", default=_DEFAULT.copies, choices=("tensors", "all", "zero"), help="default: %(default)s")
    add("--addresses", default=_DEFAULT.addresses, choices=("up", "down"), help="default: %(default)s")
    add("--trace", action="store_true", help="name each function that was called and isn't modelled, once")
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run")
    return parser


def _gpu(options: argparse.Namespace) -> VirtualGpu:
    memory_bytes = parse_bytes(options.memory, what="an amount of memory")
    return VirtualGpu(
        memory_bytes=memory_bytes,
        context_bytes=parse_part(options.context, memory_bytes, what="a context's size") or 0,
        other_bytes=parse_part(options.other, memory_bytes, what="the other process's memory") or 0,
        devices=options.devices,
        compute_capability=options.compute_capability,
        multiprocessors=options.multiprocessors,
        name=options.name,
        convolution_workspace=options.convolution_workspace,
        convolution_fallback=not options.no_convolution_fallback,
        copies=options.copies,
        addresses=options.addresses,
    )


def main(argv: list[str]) -> int:
    """Becomes the command, so that its exit code and its signals are its own; returns only where it can't."""
    parser = _parser()
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("name the command to run, after --")
    try:
        told = environment(_gpu(options))
    except UsageError as error:
        show_error(error, with_traceback=False)
        return error.exit_code
    if options.trace:
        told["AUTOACCUM_GPU_TRACE"] = "1"
    try:
        os.execvpe(command[0], command, told)
    except OSError as error:
        what = f"{command[0]!r} can't be run: {error.strerror}."
        show_error(UsageError(what, hint="Name a command, as you would without the virtual GPU."), with_traceback=False)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
