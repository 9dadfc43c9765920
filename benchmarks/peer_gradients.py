"""The gradient that trainers accumulate, against one whole batch's: `python -m benchmarks.peer_gradients`.

The cases in which accumulation is known to go wrong, through Accelerate, Lightning, the Hugging Face Trainer and
autoaccum's Runner, each as documented; on the CPU, in double precision except for bf16 and Hugging Face
models. It writes benchmarks/results/<today>-peer-gradients.md and .csv, and the table of docs/peer-gradients.md. The
packages come with `pip install '.[peers]'`; what is missing is skipped, by name.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence

from torch import Tensor

from . import tables
from .peer_gradient_cases import CASES, Case, whole_gradients
from .peer_gradient_trainers import TRAINERS, Done
from .tables import Row

RIGHT = {
    "torch.float64": 1e-12,
    "torch.float32": 1e-5,
    "torch.bfloat16": 2**-8,
}  # relative L2, by the parameters' dtype


def error_of(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest relative L2 distance over the windows.

    Infinite where one isn't finite, or where steps are missing.
    """
    if len(found) != len(wanted):
        return math.inf
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def compare(case: Case, name: str, how: str | None, wanted: Sequence[Tensor]) -> Row:
    """One trainer's gradients in one case, in one way."""
    done: Done = TRAINERS[name].run(case, how)
    dtype = str(next(case.make().parameters()).dtype)
    error = error_of(done.gradients, wanted)
    row: Row = {"case": case.title, "dtype": dtype.removeprefix("torch."), "trainer": name, "how": how or "as usual"}
    row |= {"error": f"{error:.1e}", "right": error <= RIGHT[dtype]}
    return row | {"steps": len(done.gradients), "steps_wanted": len(wanted), "said": done.said}


def rows_of(case: Case, trainers: Sequence[str]) -> list[Row]:
    """All rows of one case."""
    wanted = whole_gradients(case)
    return [compare(case, name, how, wanted) for name in trainers for how in TRAINERS[name].ways(case)]


def table(rows: Sequence[Row]) -> str:
    """Render a line for each case and a column for each trainer.

    The usual way first; where that is wrong, the trainer's other ways follow.
    """
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        line: Row = {"case": case}
        for trainer in dict.fromkeys(row["trainer"] for row in rows):
            line[trainer] = _cell([row for row in rows if row["case"] == case and row["trainer"] == trainer])
        lines.append(line)
    return tables.markdown(lines)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "not asked"
    usual, *others = rows
    words = [_words(usual)]
    if not usual["right"]:
        words += [f"{_words(row)} with {row['how']}" for row in others]
        words += [f"*`autoaccum check`: {usual['said'].split(':')[0]}*"] if usual["said"] else []
    return "; ".join(words)


def _words(row: Row) -> str:
    if row["steps"] != row["steps_wanted"]:
        return f"**{row['steps']} steps in place of {row['steps_wanted']}**"
    return row["error"] if row["right"] else f"**{row['error']}**"


def page(rows: Sequence[Row], missing: Sequence[str]) -> str:
    """Render the table with the versions it was made with."""
    modules = ["torch", *(TRAINERS[name].package for name in TRAINERS)]
    versions = ", ".join(f"{name} {version}" for name, version in tables.installed(modules).items())
    skipped = f"\n\nSkipped, since their packages aren't installed: {', '.join(missing)}." if missing else ""
    return (
        f"*Measured on this CPU* by `python -m benchmarks.peer_gradients` with {versions}.{skipped}\n\n{table(rows)}\n"
    )


def compare_all(cases: Sequence[Case], trainers: Sequence[str], say: Callable[[str], None]) -> list[Row]:
    """All rows; what trainers print goes to stderr."""
    rows = []
    for case in cases:
        say(case.title)
        with contextlib.redirect_stdout(sys.stderr):
            rows += rows_of(case, trainers)
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case.title for case in CASES], help="leave out: all")
    parser.add_argument("--trainer", action="append", choices=list(TRAINERS), help="leave out: all that are installed")
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    asked = args.trainer or list(TRAINERS)
    there = tables.installed(TRAINERS[name].package for name in asked)
    trainers = [name for name in asked if TRAINERS[name].package in there]
    missing = [name for name in asked if name not in trainers]
    cases = [case for case in CASES if not args.case or case.title in args.case]
    rows = compare_all(cases, trainers, lambda text: print(text, file=sys.stderr, flush=True))
    text = page(rows, missing)
    print(text)
    if not (args.no_write or args.case or args.trainer):
        path = tables.write_results("peer-gradients", f"# Gradients of trainers that accumulate\n\n{text}", rows)
        tables.write_between_marks(tables.DOCS / "peer-gradients.md", text)
        print(f"wrote {path}, its .csv, and docs/peer-gradients.md", file=sys.stderr)


if __name__ == "__main__":
    main()
