"""Print a comparison as a table or as JSON. No torch here."""

from __future__ import annotations

from typing import Any

from ... import __version__
from ...files.escape import one_line
from ...files.json_text import to_json
from ...reporting.kinds import byte_word, measured
from ...units import show_bytes
from .candidates import PLAN, Comparison, Trained, median_of

NO_VALUE = "\u2013"
UNSTABLE_RATIO = 0.1  # of the median: windows that spread further are called unstable
HEAD = (
    "candidate",
    "micro-batches",
    "effective batch",
    "samples/s",
    "lowest to highest",
    "peak",
    "OOMs",
    "until it trains",
)


def samples_per_second(row: Trained) -> tuple[float, float, float] | None:
    """Return the median, lowest and highest over windows; None without times."""
    seconds = median_of(row.window_seconds)
    if seconds is None:
        return None
    n = row.effective_batch
    return n / seconds, n / max(row.window_seconds), n / min(row.window_seconds)


def is_unstable(row: Trained) -> bool:
    """Return whether times spread too far to rank by a few percent."""
    seconds = median_of(row.window_seconds)
    return seconds is not None and max(row.window_seconds) - min(row.window_seconds) > UNSTABLE_RATIO * seconds


def cells(row: Trained, target_batch: int) -> tuple[str, ...]:
    """Return a candidate's row of the table."""
    speed = samples_per_second(row)
    met = "" if row.effective_batch == target_batch else f", not {target_batch:,}"
    return (
        row.name,
        f"{row.steps:,} \u00d7 {row.micro_batch:,}" if row.steps > 1 else f"{row.micro_batch:,}",
        f"{row.effective_batch:,}{met}" if row.trains else "none: OOM" if row.ooms else "none",
        NO_VALUE if speed is None else f"{speed[0]:,.1f}",
        NO_VALUE if speed is None else f"{speed[1]:,.1f} to {speed[2]:,.1f}{' (unstable)' if is_unstable(row) else ''}",
        show_bytes(row.peak_bytes) if row.peak_bytes else NO_VALUE,
        str(row.ooms),
        f"{row.search_seconds:.1f} s" if row.trains else NO_VALUE,
    )


def as_text(found: Comparison) -> str:
    """Return the answer, the table and the notes."""
    rows = [HEAD, *(cells(row, found.target_batch) for row in found.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    table = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = [answer(found), "", *table, "", *(f"note        {note}" for note in notes(found))]
    return "\n".join(map(one_line, lines))


def answer(found: Comparison) -> str:
    """Return the result in one sentence."""
    plan = next(row for row in found.rows if row.name == PLAN)
    failed = sum(not row.trains for row in found.rows)
    missed = sum(row.trains and row.effective_batch != found.target_batch for row in found.rows)
    speed = samples_per_second(plan)
    parts = [f"{failed} ran out of memory or failed"] if failed else []
    parts += [f"{missed} trained another batch than {found.target_batch:,}"] if missed else []
    others = f"; of the {len(found.rows)} candidates {' and '.join(parts)}" if parts else ""
    if not plan.trains:
        return f"autoaccum's plan did not train: {plan.why}{others}."
    at = "" if speed is None else f" at {speed[0]:,.1f} samples/s"
    return (
        f"Within {show_bytes(found.plan.budget_bytes)}, autoaccum's plan trains exactly {plan.effective_batch:,} "
        f"samples per optimizer step{at}, with {_oom(plan.ooms)}{others}."
    )


def _oom(count: int) -> str:
    return "no out-of-memory" if count == 0 else f"{count} out-of-memory error{'s' * (count > 1)}"


def notes(found: Comparison) -> list[str]:
    """Return how the figures were obtained and what limits them."""
    plan, kind = found.plan, measured(found.plan)
    lines = [
        f"Each candidate trained in a new process limited to {show_bytes(plan.budget_bytes)} "
        f"({'a data limit' if not plan.on_cuda else 'the allocator, limited'}): a first window, up to {found.windows} "
        "timed ones, a last one. Windows are made of the workload's sample; no loader is timed.",
        f"Times and peaks: {kind.value}. A peak is {byte_word(plan)} bytes, up to the failure if memory ran out.",
        "Hand-picked sizes accumulate target // micro-batch steps, rounded down, as most scripts do. Halving begins "
        "with the whole target and halves at each out-of-memory.",
    ]
    if not plan.on_cuda:
        how = {
            "cached": "; autoaccum's plan keeps freed pages in a cache, which saves fresh ones' time",
            "fixed": "; autoaccum's plan fixes its mmap threshold, which costs time for fresh pages",
        }.get(plan.device.malloc, "")
        lines.append(
            f"Hand-picked sizes and halving leave malloc alone{how}. Holes that an out-of-memory leaves in malloc's "
            "heap stay while halving continues."
        )
    if plan.device.is_virtual:
        lines.append("A virtual GPU computes nothing, so there are no times.")
    lines += [f"Left out: {text}." for text in found.left_out]
    lines += [f"{row.name}: {row.why.rstrip('.')}." for row in found.rows if row.why and not row.ooms]
    lines += [f"{row.name} also sets {row.changes_numerics}." for row in found.rows if row.changes_numerics]
    return lines


def as_json(found: Comparison) -> str:
    """Return everything as JSON, for other programs."""
    rows: list[dict[str, Any]] = []
    for row in found.rows:
        speed = samples_per_second(row)
        rows.append(
            row.to_dict() | {"samples_per_second": None if speed is None else speed[0], "unstable": is_unstable(row)}
        )
    values = {"kind": "autoaccum bench", "schema_version": 1, "autoaccum": __version__, "workload": found.workload}
    values |= {
        "target_batch": found.target_batch,
        "budget_bytes": found.plan.budget_bytes,
        "device": found.plan.device.name,
    }
    values |= {"measured": measured(found.plan).value, "answer": answer(found), "candidates": rows}
    values |= {"left_out": list(found.left_out), "notes": notes(found), "environment": found.environment}
    return to_json(values, indent=1) + "\n"
