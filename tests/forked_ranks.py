"""Scripts on ranks that are forked from one process, which has imported what they import; in torchrun's variables.

    python tests/forked_ranks.py RANKS MODULE,MODULE... SCRIPT [ARGUMENT...] [-- SCRIPT [ARGUMENT...]]...

Each rank's interpreter ends as it does elsewhere: what fails at its end fails here, too. `run_scripts` starts it in a
process that has imported torch (prepared_process.py).
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from prepared_process import become, run_forked

SEPARATOR = "--"


def run_scripts(ranks: int, scripts: Sequence[Sequence[str]], folder: Path, imports: Sequence[str]) -> list[str]:
    """Run scripts one after the other in a folder; return what each printed on all its ranks.

    Raises:
        AssertionError: A rank ended with an exit code other than 0.
    """
    separated = [word for script in scripts for word in (SEPARATOR, *script)][1:]
    env = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = run_forked(Path(__file__), str(ranks), ",".join(imports), *separated, cwd=folder, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [[f"{number}-{rank}.out" for rank in range(ranks)] for number in range(len(scripts))]
    return ["".join((folder / name).read_text() for name in of_one) for of_one in names]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def fork(number: int, ranks: int) -> dict[int, int] | None:
    """Fork a script's ranks; return their process ids and ranks, or None in a rank."""
    port, found = free_port(), dict[int, int]()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            out = os.open(f"{number}-{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            return None
        found[child] = rank
    return found


def wait_for(running: dict[int, int], script: str) -> None:
    """Wait for a script's ranks; where one fails, end the others, which may wait for it."""
    while running:
        child, status = os.wait()
        rank = running.pop(child)
        if status:
            for other in running:
                os.kill(other, 9)
                os.waitpid(other, 0)
            raise SystemExit(f"{script}: rank {rank} ended with {os.waitstatus_to_exitcode(status)}")


def main() -> list[str]:
    """Run every script after the one before; return that which this process is a rank of, and [] at the end."""
    ranks, imports, *words = sys.argv[1:]
    import torch._dynamo  # noqa: F401  as the first optimizer does, on every rank

    for name in filter(None, imports.split(",")):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each of the many collections would go through all that torch has
    scripts: list[list[str]] = [[]]
    for word in words:
        scripts.append([]) if word == SEPARATOR else scripts[-1].append(word)
    for number, script in enumerate(scripts):
        running = fork(number, int(ranks))
        if running is None:
            return script
        wait_for(running, script[0])
    return []


if __name__ == "__main__" and (script := main()):
    become(script[0], script[1:], is_file=True)
