"""Count the steps that uneven splits save, and their cost.

`python -m benchmarks.uneven [MODEL ...]` records each model once on the virtual GPU. Then 24 capacities, from the one
it was recorded within down to 42 % of that, are asked for seven targets each, with the splits that aren't balanced and
without. Replays answer; nothing is trained.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from unittest import mock

import torch

from autoaccum import fit_plan
from autoaccum.devices import virtual
from autoaccum.devices.virtual.control import is_virtual
from autoaccum.planning import build_plan
from autoaccum.planning.predictor_cuda import CudaPredictor
from autoaccum.planning.solution import solve
from autoaccum.simulation import solver
from autoaccum.simulation.solver import Solution, largest_micro_batch

from .truth_cases import DEVICE_BYTES, Case, GiB, limit, workload
from .truth_models import MODELS, Made
from .truth_search import Truth, forked

CAPACITIES, LOADS = 24, (1.7, 2.1, 2.9, 3.5, 3.9, 5.8, 7.9)  # targets, in largest micro-batches
MOST = 4096  # samples


def llama() -> Made:
    """Make the small language model of tests/test_uneven_splits.py."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=5000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    ids = torch.zeros(8, 128, dtype=torch.long)
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


MODELS_TOO = {**MODELS, "Llama": llama}
CASES = {
    name: Case(name, MODELS_TOO[name], optimizer, precision, int(size * GiB), target)
    for name, optimizer, precision, size, target in (
        ("ResNet-18", "AdamW foreach", "fp32", 2, 200),
        ("Llama", "AdamW foreach", "bf16", 1.5, 700),
        ("DenseNet-121", "SGD", "fp32", 5, 200),
        ("BERT", "AdamW fused", "fp32", 3, 200),
        ("U-Net", "SGD", "fp16", 2, 200),
        ("MLP", "AdamW foreach", "bf16", 2, 200),
        ("LSTM", "AdamW foreach", "fp32", 3.5, 700),
        ("GPT", "AdamW foreach", "bf16", 4, 200),
    )
}


@dataclass
class Count:
    """Of one model's questions, what came of them."""

    questions: int = 0
    steps_saved: int = 0
    tests: int = 0
    tests_balanced: int = 0
    seconds: float = 0.0


class _Recorded(BaseException):
    """Ends planning where the plan would be put together."""


def counted(case: Case) -> list[float]:
    """Asks one model all questions; what `Count` holds, in its order."""
    found = Count()

    def ask(predictor: CudaPredictor, *_: object, **__: object) -> None:
        for index in range(CAPACITIES):
            capacity = int(case.capacity_bytes * (1 - 0.025 * index))
            _ask_all(replace(predictor, budget=replace(predictor.budget, bytes=capacity)), found)
        raise _Recorded

    limit(case.capacity_bytes)
    truth = Truth(case)
    work = workload(case, truth.model.cuda(), truth.batch)
    with mock.patch.object(build_plan, "plan", ask), contextlib.suppress(_Recorded):
        fit_plan(work, target_batch=int(case.load), headroom=0, check=False, verify=False, train_in_new_process=True)
    return list(vars(found).values())


def _ask_all(predictor: CudaPredictor, found: Count) -> None:
    largest = largest_micro_batch(
        predictor.fits_surely, predictor.later_floor, budget_bytes=predictor.usable_bytes, max_size=MOST
    )
    for target in sorted({max(2, int(largest * load)) for load in LOADS if largest}):
        asked = replace(predictor, request=replace(predictor.request, samples=target, target_batch=target, most=target))
        with mock.patch.object(solver, "uneven", lambda *_, **__: iter(())):
            balanced = solve(asked)
        started = time.process_time()  # the balanced splits are remembered: what is left are the others
        solution = solve(asked)
        if balanced is None or solution is None:
            continue
        found.seconds += time.process_time() - started
        found.questions += 1
        found.steps_saved += _steps(solution) < _steps(balanced)
        found.tests += solution.tried
        found.tests_balanced += balanced.tried


def _steps(solution: Solution) -> int:
    return len(solution.split)


def main(names: list[str]) -> None:
    """Print a line for each model; restart on a virtual GPU first."""
    if not is_virtual():
        gpu = virtual.VirtualGpu(memory_bytes=DEVICE_BYTES, convolution_fallback=False)
        environment = virtual.environment(gpu) | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        raise SystemExit(subprocess.call([sys.executable, "-m", "benchmarks.uneven", *names], env=environment))
    torch.set_num_threads(1)
    for name in names or CASES:
        count = Count(*forked(functools.partial(counted, CASES[name])))
        more = (count.tests - count.tests_balanced) / max(1, count.questions)
        milliseconds = 1000 * count.seconds / max(1, count.questions)
        saved = f"{name:<14}{count.questions:>5} questions, {count.steps_saved:>3} a step less"
        print(f"{saved}; {more:.1f} further tests and {milliseconds:.1f} ms each", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
