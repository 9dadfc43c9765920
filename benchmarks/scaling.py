"""Time planning by model size, and solving by target: `python -m benchmarks.scaling`.

Llama-like models from 10 million to 70 billion parameters, in bf16 with AdamW, planned by `autoaccum plan --gpu` for
one GPU: whole commands, model building and imports included, in this machine's memory. Where a model doesn't fit, the
answer is by how much, and its time counts as well. Solving is timed for a recorded program of 10,000 events (CPU), and
as the whole plan of the smallest model (CUDA).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GPU = "h200"
REPEATS, PLANS = 3, 3
TARGETS = (512, 4_096, 32_768, 262_144, 1_000_000)
# name: width, width of the feed-forward net, layers, heads, vocabulary, tokens in a sample
SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "llama_10m": (256, 688, 8, 4, 8_000, 512),
    "llama_110m": (768, 2_048, 12, 12, 16_000, 512),
    "llama_1b": (2_048, 5_632, 22, 32, 32_000, 512),
    "llama_7b": (4_096, 11_008, 32, 32, 32_000, 512),
    "llama_13b": (5_120, 13_824, 40, 40, 32_000, 512),
    "llama_33b": (6_656, 17_920, 60, 52, 32_000, 512),
    "llama_70b": (8_192, 28_672, 80, 64, 32_000, 512),
    "llama_70b_norms_only": (8_192, 28_672, 80, 64, 32_000, 128),
}
QUICK = ("llama_10m", "llama_1b")


def _llama(width: int, inner: int, layers: int, heads: int, vocabulary: int, tokens: int, norms: bool) -> Any:
    """Make a Llama workload; train all of it or its norms.

    Grouped keys and values from a width of 8,192 on, as in Llama 2.
    """
    import torch
    import transformers

    from autoaccum import Workload

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8 if width >= 8_192 else heads, max_position_embeddings=tokens,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if norms:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
    ids = torch.zeros(2, tokens, dtype=torch.long)
    return Workload(model, {"input_ids": ids, "labels": ids})


def _named(name: str) -> Callable[[], Any]:
    return functools.partial(_llama, *SIZES[name], "norms" in name)


globals().update({name: _named(name) for name in SIZES})  # FILE.py:FUNCTION finds them


def parameters(name: str) -> int:
    """How many a model has."""
    width, inner, layers, heads, vocabulary, _ = SIZES[name]
    values = width * (8 if width >= 8_192 else heads) // heads  # of keys, and of values
    block = 2 * width * width + 2 * width * values + 3 * width * inner + 2 * width
    return 2 * vocabulary * width + layers * block + width


def plan(name: str, target: int, *, gpu: str = GPU) -> dict[str, Any]:
    """Run one `autoaccum plan`; return its answer, seconds and resident memory."""
    command = [sys.executable, "-m", "autoaccum", "plan", "--target-batch", str(target), "--gpu", gpu, "--json",
               "--workload", f"{Path(__file__)}:{name}"]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    row = {"seconds": seconds, "held MiB": usage.ru_maxrss / 1024}
    if process.returncode == 0:
        found = json.loads(output)
        split = f"{found['accumulation_steps']:,} of at most {found['micro_batch']:,}"
        passes = sum(note["passes"] for note in found["recordings"])
        return row | {"answer": split, "peak GiB": found["predicted_peak_bytes"] / 2**30, "recorded passes": passes}
    if process.returncode == 3:
        missing = re.search(r"\(([\d,]+) bytes\) are missing", errors)
        assert missing is not None, errors
        lacking = int(missing[1].replace(",", "")) / 2**30
        return row | {"answer": f"does not fit by {lacking:.1f} GiB", "peak GiB": None, "recorded passes": None}
    raise RuntimeError(f"{name}: {errors.strip().splitlines()[0]}")


def sizes_table(names: Sequence[str], repeats: int = 1) -> list[dict[str, Any]]:
    """Return one row for each model, with its median seconds."""
    rows = []
    for name in names:
        found = [plan(name, 512) for _ in range(repeats)]
        seconds = [each["seconds"] for each in found]
        rows.append({"model": name, "parameters": parameters(name), "target": 512} | found[0])
        rows[-1] |= {"seconds": statistics.median(seconds), "all seconds": seconds}
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def targets_table(targets: Sequence[int]) -> list[dict[str, Any]]:
    """Return one row for each target.

    Solving alone on the CPU, and a whole plan for CUDA.
    """
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--solve", json.dumps(list(targets))],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    solved = json.loads(answer.stdout)
    rows = []
    for target, found in zip(targets, solved, strict=True):
        planned = plan("llama_10m", target)
        rows.append({"target": target} | found | {"CUDA plan": planned["answer"], "CUDA plan s": planned["seconds"]})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def solve(targets: Sequence[int], repeats: int = REPEATS, blocks: int = 24) -> list[dict[str, Any]]:
    """Time solving for a recorded program, replays forgotten each time."""
    import torch

    from autoaccum.devices.registry import get_device
    from autoaccum.planning import predictor_cpu
    from autoaccum.planning.request import PlanRequest
    from autoaccum.planning.resolved_request import resolve
    from autoaccum.planning.solution import solve

    from .speed import recorded_program

    device = get_device(torch.device("cpu"))
    workload, subject, evidence, budget = recorded_program(blocks)
    rows = []
    for target in targets:
        device.clean()  # as planning does before it reads the base
        predictor = predictor_cpu.make_predictor(
            subject,
            resolve(PlanRequest(target_batch=target, budget=budget), workload, computes=True),
            evidence,
            sample_bytes=0,
            own_bytes=0,
        )
        seconds = []
        for _ in range(repeats):
            evidence.clear_simulators()
            started = time.perf_counter()
            solution = solve(predictor)
            seconds.append(time.perf_counter() - started)
        assert solution is not None and sum(solution.split) == target
        row = {"steps": len(solution.split), "micro-batch": solution.split[0], "splits tried": solution.tried}
        median, low, high = statistics.median(seconds), min(seconds), max(seconds)
        rows.append(row | {"solving s": median, "solving s low": low, "solving s high": high})
    return rows


def table(quick: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both tables."""
    return sizes_table(QUICK if quick else tuple(SIZES)), targets_table((512, 1_000_000) if quick else TARGETS)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, two targets")
    parser.add_argument("--model", action="append", choices=list(SIZES))
    parser.add_argument("--solve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.solve:
        print(json.dumps(solve(json.loads(args.solve))))
        return
    import pandas

    if args.model:
        print(pandas.DataFrame(sizes_table(args.model)).to_string(index=False))
        return
    for rows in table(args.quick):
        print(pandas.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
