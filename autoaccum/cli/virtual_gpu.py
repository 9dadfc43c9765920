"""Implement `autoaccum virtual-gpu`."""

from __future__ import annotations

import os
from typing import Any, cast

import typer

from ..devices.virtual.gpu import VirtualGpu
from ..errors import UsageError
from .terminal import show_error

_DEFAULT = VirtualGpu()
_COPIES = ("tensors", "all", "zero")
_ADDRESSES = ("up", "down")


def virtual_gpu(
    command: list[str] = typer.Argument(None, metavar="-- COMMAND ...", help="Command to run.", show_default=False),
    memory: str = typer.Option("16GiB", metavar="SIZE", help="Memory of each device."),
    context: str = typer.Option("512MiB", metavar="SIZE", help="Memory that the process's context uses."),
    other: str = typer.Option("0", metavar="SIZE", help="Memory that another process uses."),
    devices: int = typer.Option(_DEFAULT.devices, metavar="N", help="Number of devices."),
    compute_capability: str = typer.Option(_DEFAULT.compute_capability, metavar="X.Y", help="Compute capability."),
    multiprocessors: int = typer.Option(_DEFAULT.multiprocessors, metavar="N", help="Multiprocessors."),
    name: str = typer.Option(_DEFAULT.name, help="The device's name."),
    convolution_workspace: str | None = typer.Option(
        None, metavar="SIZE|FACTORx|transposed", help="Workspace of each convolution; none by default."
    ),
    convolution_fallback: bool = typer.Option(True, help="A convolution can run without its workspace."),
    trial_workspace: str = typer.Option("0", metavar="SIZE", help="Workspace that cudnn.benchmark tries in vain."),
    kernel: str = typer.Option("0", metavar="SIZE", help="Memory that the context gains by a kernel's first launch."),
    lag: int = typer.Option(_DEFAULT.lag_launches, metavar="N", help="Kernel launches until a stream's work is done."),
    copies: str = typer.Option(_DEFAULT.copies, metavar="|".join(_COPIES), help="Bytes that copies write."),
    addresses: str = typer.Option(_DEFAULT.addresses, metavar="|".join(_ADDRESSES), help="Order of new addresses."),
    trace: bool = typer.Option(False, "--trace", help="Print each called function that isn't modelled, once."),
) -> None:
    """Run a command on a virtual GPU.

    Kernels compute nothing; memory is counted.
    """
    from ..devices.virtual import environment
    from ..units import parse_bytes, parse_part

    if not command or not command[0]:
        raise UsageError(
            "The command to run is empty." if command else "The command to run is missing.",
            hint="Name it after --: autoaccum virtual-gpu --memory 4GiB -- python train.py",
        )
    for option, value, allowed in (("--copies", copies, _COPIES), ("--addresses", addresses, _ADDRESSES)):
        if value not in allowed:
            raise UsageError(f"{option} cannot be {value!r}.", hint=f"Use one of: {', '.join(allowed)}.")
    memory_bytes = parse_bytes(memory, what="an amount of memory")
    gpu = VirtualGpu(
        memory_bytes=memory_bytes,
        context_bytes=parse_part(context, memory_bytes, what="a context's size") or 0,
        other_bytes=parse_part(other, memory_bytes, what="the other process's memory") or 0,
        devices=devices,
        compute_capability=compute_capability,
        multiprocessors=multiprocessors,
        name=name,
        convolution_workspace=convolution_workspace,
        convolution_fallback=convolution_fallback,
        trial_workspace_bytes=parse_part(trial_workspace, memory_bytes, what="a workspace") or 0,
        kernel_bytes=parse_part(kernel, memory_bytes, what="a kernel's size") or 0,
        lag_launches=lag,
        copies=cast(Any, copies),
        addresses=cast(Any, addresses),
    )
    variables = environment(gpu) | ({"AUTOACCUM_GPU_TRACE": "1"} if trace else {})
    try:
        os.execvpe(command[0], command, variables)  # its exit code and its signals are its own
    except OSError as error:
        what = f"{command[0]!r} cannot be run: {error.strerror}."
        show_error(UsageError(what, hint="Name a command, as you would without the virtual GPU."), with_traceback=False)
        raise typer.Exit(127) from None  # as a shell's
