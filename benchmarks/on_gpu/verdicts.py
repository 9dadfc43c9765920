"""Judge rows: what was predicted against what was measured. No torch here.

Each part has a function from a trial's rows, by step, to the lines of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .rows import Row

PEAK_TOLERANCE = 0.005  # of a peak: replays are exact, so more than rounding is a fault
FP64_TOLERANCE, FP32_TOLERANCE = 1e-12, 1e-5  # relative L2 of a window's gradient
LOOP_TOLERANCE = 0.02  # Runner.step over the loop by hand
KNEE_TOLERANCE = 0.03  # time a sample at the knee over the best measured
GIB, MIB = 1 << 30, 1 << 20
FAULT = "FAULT: "
Steps = Mapping[str, Row]
Line = dict[str, Any]


def memory(steps: Steps, others: Mapping[str, Steps]) -> list[Line]:
    """Judge part (a): one line for a model."""
    plan, fresh, truth = (steps.get(name, {}) for name in ("plan", "fresh", "truth"))
    if not plan:
        return []
    if "refused" in plan:
        return [{"verdict": FAULT + f"refused: {plan['refused']}"}]
    line = {
        "predicted GiB": _gib(plan["predicted"]), "measured GiB": _gib(fresh.get("reserved")),
        "off %": _percent(plan["predicted"], fresh.get("reserved")), "largest": plan["largest"],
        "true largest": _true(truth), "OOMs": plan["ooms"],
        "retries": f"{sum(fresh['retries'])} of {sum(plan['retries'])}" if fresh else "",
        "passes": plan["passes"], "s": round(plan["seconds"], 1),
    }  # fmt: skip
    wrong, remarks = [], []
    if plan["ooms"]:
        wrong.append(f"{plan['ooms']} out-of-memory errors while planning")
    if _is_off(plan["predicted here"] or plan["predicted"], plan["measured"]):
        wrong.append(f"verified at {_gib(plan['measured'])} GiB, not as predicted")
    if fresh and fresh["ooms"]:
        wrong.append("the plan runs out of memory in a fresh process")
    elif fresh and _is_off(plan["predicted"], fresh["reserved"]):
        wrong.append("not trained as predicted")
    if fresh and any(found > planned for found, planned in _pairs(fresh["retries"], plan["retries"])):
        wrong.append("unforeseen retries")
    if plan["method"] != "replayed":
        remarks.append(plan["method"])
    if not plan["exactness"].startswith(("exact", "unknown", "not tested")):
        remarks.append(plan["exactness"].partition(":")[0][:60])
    if truth:
        wrong += _against_truth(plan, truth)
        if not truth["complete"]:
            remarks.append("no time to find the largest")
        tried = {each["split"][0] for each in truth.get("tries detail", ()) if each.get("raised")}
        silent = sorted(set(truth.get("tried", ())) & {each["split"][0] for each in truth.get("tries detail", ())
                        if not each["fits"]} - tried)  # fmt: skip
        if silent:
            remarks.append(f"at {silent[0]} nothing was raised: a convolution did without its workspace, or retries")
    else:
        remarks.append("the truth was not reached")
    return [line | {"verdict": _verdict(wrong, remarks)}]


def _against_truth(plan: Row, truth: Row) -> list[str]:
    largest, true = plan["largest"], truth["largest"]
    if true is None:
        return ["no size fits"] if truth["complete"] else []
    if largest > true:
        return [f"the largest is too high by {largest - true}"]
    if largest < true and not plan.get("capped"):
        return [f"the largest is low by {true - largest} ({100 * (true / largest - 1):.1f} %)"]
    return []


def stand_in(steps: Steps, others: Mapping[str, Steps]) -> list[Line]:
    """Judge part (b) against part (a): the virtual GPU's own difference."""
    plan, card = steps.get("plan"), others.get("a", {}).get("plan", {})
    if plan is None:
        return []
    if "refused" in plan or "refused" in card:
        same = "refused" in plan and "refused" in card
        return [{"verdict": "refused, as on the card" if same else FAULT + "only one of the two plans was refused"}]
    line = {
        "predicted GiB": _gib(plan["predicted"]), "measured GiB": _gib(card.get("predicted")),
        "off %": _percent(plan["predicted"], card.get("predicted")), "largest": plan["largest"],
        "true largest": card.get("largest"), "s": round(plan["seconds"], 1),
    }  # fmt: skip
    if not card:
        return [line | {"verdict": "no plan on the card to compare with"}]
    wrong = []
    if plan["largest"] != card["largest"]:
        wrong.append(f"largest {plan['largest']}, and {card['largest']} on the card")
    if list(plan["split"]) == list(card["split"]) and _is_off(plan["predicted"], card["predicted"]):
        wrong.append("another peak for the same split")
    steps_here, steps_there = len(plan["split"]), len(card["split"])
    fewer = f"{steps_here} steps, found by trying, and {steps_there} on the card"
    remarks = [fewer] if steps_here < steps_there else []
    return [line | {"verdict": _verdict(wrong, remarks, good="as on the card")}]


def context(steps: Steps, others: Mapping[str, Steps]) -> list[Line]:
    """Judge part (c): what is outside the allocator, against the table's."""
    row = steps.get("context")
    if row is None:
        return []
    measured = row["window 3"]
    line = {
        "predicted GiB": _gib(row["assumed"]),
        "measured GiB": _gib(measured),
        "off %": _percent(row["assumed"], measured),
    }
    wrong, remarks = (
        [],
        [f"{_mib(row['empty'])} before the first kernel", f"budgets read {_mib(row['read by budgets'])}"],
    )
    if measured > row["assumed"]:
        wrong.append(f"{row['gpu']}'s row assumes {_mib(measured - row['assumed'])} too little")
    if row["read by budgets"] < measured - MIB:  # NVML's count and CUDA's differ by less
        wrong.append("a budget read here assumes too little")
    return [line | {"verdict": _verdict(wrong, remarks, good="within what is assumed")}]


def gradients(steps: Steps, others: Mapping[str, Steps]) -> list[Line]:
    """Judge part (d): one line for the window, one after the out-of-memory."""
    lines: list[Line] = []
    errors = {name: steps[f"window {name}"]["error"] for name in ("fp32", "fp64") if f"window {name}" in steps}
    if errors:
        limits = {"fp32": FP32_TOLERANCE, "fp64": FP64_TOLERANCE}
        wrong = [f"{name} is {error:.1e} off" for name, error in errors.items() if error and error > limits[name]]
        found = [f"{name} {error:.1e}" for name, error in errors.items() if error is not None]
        good = "the whole batch's gradient" if found else "nothing is computed here"
        lines.append({"verdict": _verdict(wrong, found, good=good)})
    row = steps.get("after out of memory")
    if row is not None:
        wrong = []
        if row["ooms before"]:
            wrong.append(f"{row['ooms before']} out-of-memory errors before memory was lowered")
        if not row["retries"]:
            wrong.append("the window did not run out of memory")
        if row["samples"] != sum(row["planned"]):
            wrong.append(f"{row['samples']} samples were trained, not {sum(row['planned'])}")
        if row["error"] is not None and row["error"] > FP64_TOLERANCE:
            wrong.append(f"fp64 is {row['error']:.1e} off")
        shown = "nothing is computed here" if row["error"] is None else f"fp64 {row['error']:.1e}"
        sizes = f"{max(row['planned'])} to {max(row['split'])} samples a micro-batch"
        remarks = [shown, f"{sizes}, {row['retries']} restarts"]
        good = "recovered with the same gradient" if row["error"] is not None else "recovered"
        lines.append({"OOMs": row["ooms"], "verdict": _verdict(wrong, remarks, good=good)})
    return lines


def times(steps: Steps, others: Mapping[str, Steps]) -> list[Line]:
    """Judge part (e): lines for the Runner, the knee and copies."""
    lines: list[Line] = []
    row = steps.get("runner")
    if row is not None:
        interval = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}) of the loop's time"
        wrong = ["the Runner is slower than the loop"] if row["low"] > 1 + LOOP_TOLERANCE else []
        lines.append({"s": round(row["runner seconds"], 4), "verdict": _timed(row, wrong, [interval], "as the loop")})
    row = steps.get("knee")
    if row is not None:
        lines.append(_knee(row))
    row = steps.get("copies")
    if row is not None:
        saved = row["own stream / pageable"]
        text = f"{100 * (1 - saved['ratio']):+.1f} % saved against pageable memory, "
        text += f"{100 * (1 - row['own stream / pinned']['ratio']):+.1f} % against pinned memory alone"
        lines.append(
            {"s": round(row["seconds"]["own stream"], 4), "verdict": _timed(row, [], [text], "pinned, own stream")}
        )
    return lines


def _knee(row: Row) -> Line:
    scan = {int(n): seconds for n, seconds in row["seconds per sample"].items()}
    best = min(scan, key=scan.__getitem__)
    shown = f"by hand the fastest is {best}, at {1e3 * scan[best]:.3g} ms a sample"
    if "knee" not in row:
        return {"verdict": _timed(row, [], [shown], "planning for the fastest needs times")}
    below = [n for n in scan if n <= row["knee"]]
    wrong = []
    if below and min(scan[n] for n in below) > (1 + KNEE_TOLERANCE) * scan[best]:
        wrong.append("larger micro-batches are faster")
    return {"largest": row["largest"], "verdict": _timed(row, wrong, [shown], f"knee at {row['knee']}")}


def _timed(row: Row, wrong: list[str], remarks: list[str], good: str) -> str:
    """Return a verdict on times, which a virtual GPU has none of."""
    return "times mean nothing here" if row.get("virtual") else _verdict(wrong, remarks, good=good)


def finders(steps: Steps, others: Mapping[str, Steps]) -> list[Line]:
    """Show part (f): what others find, beside ours of part (a)."""
    ours = others.get("a", {}).get("plan", {})
    true = others.get("a", {}).get("truth", {})
    lines = []
    for name in ("accelerate", "halving"):
        row = steps.get(name)
        if row is None:
            continue
        if not row["chosen"]:
            verdict = f"found nothing: {row['failure']}"
        else:
            retried = row["trains afresh"] and any(row["retries afresh"][2:])
            afresh = "trains afresh, with retries in each window" if retried else "trains afresh"
            verdict = afresh if row["trains afresh"] else "out of memory in a fresh process"
        verdict = f"{row['tries']} sizes tried; {verdict}"
        if "largest" in ours:
            verdict += f"; ours {ours['largest']}, {ours['ooms']} OOMs, {ours['seconds']:.1f} s"
        lines.append(
            {
                "what": name, "largest": row["chosen"], "true largest": _true(true), "OOMs": row["ooms"],
                "s": round(row["seconds"], 1), "verdict": verdict,
            }
        )  # fmt: skip
    return lines


def commands(steps: Steps, others: Mapping[str, Steps]) -> list[Line]:
    """Judge part (g): one line for a command."""
    lines = []
    for name, row in steps.items():
        if "code" not in row:
            continue
        wrong = (
            [] if row["code"] == 0 else [f"exit code {row['code']}: {(row['said'].strip().splitlines() or [''])[-1]}"]
        )
        line = {"what": name, "s": round(row["seconds"], 1), "verdict": _verdict(wrong, [], good="exit code 0")}
        if name == "plan" and "measured" in row:
            line |= {"predicted GiB": _gib(row["predicted"]), "measured GiB": _gib(row["measured"])}
            line |= {"off %": _percent(row["predicted"], row["measured"])}
        lines.append(line)
    return lines


def library_calls(steps: Steps, others: Mapping[str, Steps]) -> list[Line]:
    """Show part (h): how many calls were recorded."""
    lines: list[Line] = []
    for name, row in steps.items():
        if "calls" not in row:
            continue
        failed = [each for each in row["calls"] if "failed" in each]
        largest = max((size for each in row["calls"] for size, _ in each.get("blocks", ())), default=0)
        wrong = [f"{len(failed)} calls failed: {failed[0]['failed']}"] if failed else []
        text = f"{len(row['calls'])} calls, blocks of up to {_mib(largest)}"
        lines.append({"what": name, "verdict": _verdict(wrong, [text], good="recorded")})
    return lines


PARTS: dict[str, Callable[[Steps, Mapping[str, Steps]], list[Line]]] = {
    "a": memory,
    "b": stand_in,
    "c": context,
    "d": gradients,
    "e": times,
    "f": finders,
    "g": commands,
    "h": library_calls,
}


def _verdict(wrong: list[str], remarks: list[str], good: str = "as predicted") -> str:
    return (FAULT + "; ".join([*wrong, *remarks])) if wrong else "; ".join([good, *remarks])


def _true(truth: Row) -> str:
    """Return the largest that fitted; a lower bound without time."""
    if not truth:
        return ""
    return f"{truth['largest']}" if truth["complete"] else f"{truth['largest']} or more"


def _pairs(found: list[int], planned: list[int]) -> list[tuple[int, int]]:
    """Pair retries by window; the plan's last stands for later ones."""
    last = planned[-1] if planned else 0
    return [(each, planned[i] if i < len(planned) else last) for i, each in enumerate(found)]


def _is_off(predicted: int, measured: int | None) -> bool:
    return measured is not None and abs(predicted - measured) > PEAK_TOLERANCE * measured


def _percent(predicted: int, measured: int | None) -> str:
    return "" if not measured else f"{100 * (predicted / measured - 1):+.2f}"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.3f}"


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"
