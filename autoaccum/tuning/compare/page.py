"""A comparison as a table, as JSON and as a page. No torch here."""

from __future__ import annotations

from typing import Any

from ... import __version__
from ...files.escape import one_line
from ...files.json_text import to_json
from ...reporting.kinds import Kind, byte_word, measured
from ...reporting.table_page import Bar, Section, Sheet, Tile
from ...units import show_bytes
from .candidates import PLAN, Comparison, Trained, median_of

NONE = "\u2013"
UNSTABLE = 0.1  # of the median: windows that spread further are said to be unstable
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
    """The median over its windows, the lowest and the highest; None where there are no times."""
    seconds = median_of(row.window_seconds)
    if seconds is None:
        return None
    n = row.effective_batch
    return n / seconds, n / max(row.window_seconds), n / min(row.window_seconds)


def is_unstable(row: Trained) -> bool:
    """Whether its windows' times spread too far to rank it by a few percent."""
    seconds = median_of(row.window_seconds)
    return seconds is not None and max(row.window_seconds) - min(row.window_seconds) > UNSTABLE * seconds


def cells(row: Trained, target_batch: int) -> tuple[str, ...]:
    """A candidate's line."""
    speed = samples_per_second(row)
    met = "" if row.effective_batch == target_batch else f", not {target_batch:,}"
    return (
        row.name,
        f"{row.steps:,} \u00d7 {row.micro_batch:,}" if row.steps > 1 else f"{row.micro_batch:,}",
        f"{row.effective_batch:,}{met}" if row.trains else "none: OOM" if row.ooms else "none",
        NONE if speed is None else f"{speed[0]:,.1f}",
        NONE if speed is None else f"{speed[1]:,.1f} to {speed[2]:,.1f}{' (unstable)' if is_unstable(row) else ''}",
        show_bytes(row.peak_bytes) if row.peak_bytes else NONE,
        str(row.ooms),
        f"{row.search_seconds:.1f} s" if row.trains else NONE,
    )


def as_text(found: Comparison) -> str:
    """The table for a terminal, and what to know about it."""
    lines = [HEAD, *(cells(row, found.target_batch) for row in found.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    table = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    told = [answer(found), "", *table, "", *(f"note        {note}" for note in notes(found))]
    return "\n".join(map(one_line, told))


def answer(found: Comparison) -> str:
    """What came out, in one sentence."""
    plan = next(row for row in found.rows if row.name == PLAN)
    failed = sum(not row.trains for row in found.rows)
    missed = sum(row.trains and row.effective_batch != found.target_batch for row in found.rows)
    speed = samples_per_second(plan)
    told = [f"{failed} ran out of memory or failed"] if failed else []
    told += [f"{missed} trained another batch than {found.target_batch:,}"] if missed else []
    others = f"; of the {len(found.rows)} candidates {' and '.join(told)}" if told else ""
    if not plan.trains:
        return f"autoaccum's plan did not train: {plan.why}{others}."
    at = "" if speed is None else f" at {speed[0]:,.1f} samples/s"
    return (
        f"Within {show_bytes(found.plan.budget.bytes)}, autoaccum's plan trains exactly {plan.effective_batch:,} "
        f"samples per optimizer step{at}, with {_oom(plan.ooms)}{others}."
    )


def _oom(count: int) -> str:
    return "no out-of-memory" if count == 0 else f"{count} out-of-memory error{'s' * (count > 1)}"


def notes(found: Comparison) -> list[str]:
    """What the figures mean and what they don't."""
    plan, kind = found.plan, measured(found.plan)
    told = [
        f"Each candidate trained in a process of its own that may use {show_bytes(plan.budget.bytes)} and no more "
        f"({'a data limit' if not plan.on_cuda else 'the allocator, limited'}): a first window, up to {found.windows} "
        "timed ones, a last one. Windows are made of the workload's sample; no loader is timed.",
        f"Times and peaks: {kind.value}. A peak is {byte_word(plan)} bytes; of what ran out of memory, those it had.",
        "Hand-picked sizes accumulate target // micro-batch steps, rounded down, as most scripts do. Halving begins "
        "with the whole target and halves at each out-of-memory.",
    ]
    if not plan.on_cuda and plan.mmap_threshold_bytes is not None:
        told.append(
            "Hand-picked sizes and halving leave malloc alone; autoaccum's plan fixes its mmap threshold, so that "
            "memory is predictable, at the price of fresh pages: part of its time. --malloc default compares without "
            "that. What an out-of-memory leaves in malloc's heap stays there when halving goes on."
        )
    if plan.virtual:
        told.append("A virtual GPU computes nothing, so there are no times.")
    told += [f"Left out: {text}." for text in found.left_out]
    told += [f"{row.name}: {row.why.rstrip('.')}." for row in found.rows if row.why and not row.ooms]
    told += [f"{row.name} also sets {row.changes_numerics}." for row in found.rows if row.changes_numerics]
    return told


def as_json(found: Comparison) -> str:
    """All of it, for other programs."""
    rows: list[dict[str, Any]] = []
    for row in found.rows:
        speed = samples_per_second(row)
        rows.append(
            row.to_dict() | {"samples_per_second": None if speed is None else speed[0], "unstable": is_unstable(row)}
        )
    told = {"kind": "autoaccum bench", "schema_version": 1, "autoaccum": __version__, "workload": found.workload}
    told |= {"target_batch": found.target_batch, "budget_bytes": found.plan.budget.bytes, "device": found.plan.device}
    told |= {"measured": measured(found.plan).value, "answer": answer(found), "candidates": rows}
    told |= {"left_out": list(found.left_out), "notes": notes(found), "environment": found.environment}
    return to_json(told, indent=1) + "\n"


def sheet(found: Comparison) -> Sheet:
    """The page."""
    facts = ({"device": found.plan.device} | found.environment).items()
    return Sheet(
        what="autoaccum bench",
        title=found.workload,
        answer=answer(found),
        tiles=_tiles(found),
        sections=(_candidates(found), *_speeds(found), _peaks(found)),
        facts=tuple((name, str(value)) for name, value in facts),
        notes=tuple(notes(found)),
        command="autoaccum bench",
    )


def _candidates(found: Comparison) -> Section:
    return Section(
        name="candidates",
        title="Candidates",
        lead="Each trained for a few windows under the same budget.",
        head=HEAD,
        rows=tuple(cells(row, found.target_batch) for row in found.rows),
        numbers=frozenset({"samples/s", "peak", "OOMs", "until it trains"}),
        strong=frozenset(index for index, row in enumerate(found.rows) if row.name == PLAN),
        kinds=(measured(found.plan),),
    )


def _speeds(found: Comparison) -> list[Section]:
    """None where nothing was timed."""
    speeds = {row.name: speed[0] for row in found.rows if (speed := samples_per_second(row))}
    most = max(speeds.values(), default=0.0)
    if not most:
        return []
    bars = []
    for row in found.rows:
        told = f"{speeds[row.name]:,.1f}" if row.name in speeds else "did not train"
        bars.append(Bar(row.name, round(100 * speeds.get(row.name, 0) / most, 2), told, row.name == PLAN))
    lead, kinds = "The median of the timed windows.", (measured(found.plan),)
    return [Section("speed", "Speed", lead, (), (), kinds=kinds, bars=tuple(bars), bars_title="samples per second")]


def _peaks(found: Comparison) -> Section:
    budget = found.plan.budget.bytes
    bars = []
    for row in found.rows:
        told = f"{show_bytes(row.peak_bytes)}{'' if row.trains else ', OOM'}" if row.peak_bytes else "not known"
        bars.append(Bar(row.name, round(100 * row.peak_bytes / budget, 2), told, row.name == PLAN))
    lead, kinds = f"Each peak; the whole width is the budget, {show_bytes(budget)}.", (measured(found.plan),)
    return Section("memory", "Memory", lead, (), (), kinds=kinds, bars=tuple(bars), bars_title="peak")


def _tiles(found: Comparison) -> tuple[Tile, ...]:
    plan, kind = found.plan, measured(found.plan)
    row = next(row for row in found.rows if row.name == PLAN)
    speed = samples_per_second(row)
    tiles = [
        Tile("effective batch", f"{row.effective_batch:,}", kind),
        Tile("micro-batch", f"{plan.micro_batch:,}", Kind.PREDICTED),
        Tile("peak", show_bytes(row.peak_bytes), kind),
        Tile("budget", show_bytes(plan.budget.bytes), Kind.GIVEN),
        Tile("out-of-memory errors", str(row.ooms), kind),
    ]
    if speed is not None:
        tiles.insert(1, Tile("samples/s", f"{speed[0]:,.1f}", kind))
    return tuple(tiles)
