"""Plans for CUDA on the real caching allocator of a virtual GPU: the smallest k, to the byte, and nothing left behind.

Held against windows trained in fresh processes, as in `benchmarks/truth.py`: the plan's split fits, none of fewer steps
does; the largest micro-batch fits, the next three don't. Each case is a process of its own that runs this file as a
program; a line of JSON is its answer. The wide version, which tries every size, is `python -m benchmarks.truth`.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_process import run_forked
from torch import nn

from autoaccum import fit_plan
from autoaccum.data.split import tile
from autoaccum.devices import virtual
from autoaccum.simulation.solver import balanced
from autoaccum.state import snapshot
from autoaccum.window import step

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import truth_cases, truth_plans, truth_search
from benchmarks.truth_models import MODELS, Made, Mlp

REASON = virtual.available()
GiB = truth_cases.GiB


class Counting(nn.Module):
    """Changes what a real copy can change, since kernels compute nothing here: a buffer, and an attribute."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.register_buffer("seen", torch.zeros(10_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.copy_(torch.full((10_000,), float(self.calls)))
        return self.inner(x)


def counting() -> Made:
    return Counting(Mlp(1024)), MODELS["MLP"]()[1]


def case(
    make: Any, optimizer: str, precision: str, gib: float, target: int, workspace: str | None = None
) -> truth_cases.Case:
    name = make if isinstance(make, str) else make.__name__
    make = MODELS[make] if isinstance(make, str) else make
    return truth_cases.Case(
        name, make, optimizer, precision, int(gib * GiB), target, workspace, clip=precision == "fp16"
    )


def generated(seed: int) -> truth_cases.Case:
    """A generated model, with the target that its load comes to at about what fits."""
    found = truth_cases.generated_case(seed)
    return replace(found, load={3: 886, 7: 1155, 50: 1200, 52: 2700, 61: 2700, 67: 100}[seed])


QUICK = [
    case("ResNet-18", "AdamW foreach", "fp32", 2, 230),  # with retries in the first windows
]
SLOW = [
    case(counting, "AdamW foreach", "fp32", 0.25, 240),
    case("GPT", "AdamW loop", "bf16", 2, 10),  # too small for two primes
    case("BERT", "AdamW fused", "fp32", 3, 40),  # sizes that step with the rows
    case("ResNet-18", "SGD", "bf16", 2, 400, "0.5x"),  # workspaces of a + b n
    case("U-Net", "SGD", "fp16", 2, 60),
    case("ViT-S", "SGD", "fp16", 7.5, 1138),  # buffers that saturate at 108 MiB
    case("U-Net", "AdamW foreach", "bf16", 23.5, 702, "0.5x"),  # equal free blocks: the oldest segment's is taken
    case("LSTM", "AdamW foreach", "fp32", 3.5, 839),
    case("BERT", "AdamW loop", "fp16", 9.5, 330),
    case("checkpointed", "SGD", "bf16", 4, 300),
    case("ViT-S", "AdamW foreach", "fp32", 5.5, 296),  # reductions that end between the recordings
    case("DenseNet-121", "SGD", "fp32", 5, 256),  # 37 fits beside 36, but not window after window by itself
    *(generated(seed) for seed in (3, 7, 50, 52, 61, 67)),
]
CASES = QUICK + SLOW


def answered(number: int) -> dict[str, Any]:
    gpu = virtual.VirtualGpu(
        memory_bytes=truth_cases.DEVICE_BYTES, convolution_workspace=CASES[number].workspace, convolution_fallback=False
    )
    out = run_forked(Path(__file__), str(number), gpu=gpu, timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(
    "number",
    [*range(len(QUICK)), *(pytest.param(n, marks=pytest.mark.slow) for n in range(len(QUICK), len(CASES)))],
    ids=[each.label for each in CASES],
)
def test_a_plan_is_the_truth_and_leaves_no_trace(number: int) -> None:
    found = answered(number)
    plan = found["plan"]
    assert found["fits"], "it does not fit in a fresh process"
    assert found["fewer"] == [], "fewer steps fit, too"
    assert found["largest fits"]
    assert found["larger"] == []
    assert plan["here"][2] == plan["predicted"], "training took another peak than predicted"
    assert plan["ooms"] == 0
    assert plan["verifications"] == 1
    assert plan["passes"] <= 10
    assert plan["method"] == "bracketed" or plan["samples"] <= 3 * max(plan["split"])
    assert plan["holds here"]
    assert found["kept"]["holds here"], "with optimizer state kept, and 2 % less memory than there was"
    assert plan["left as it was"], "the allocator holds more than before: what the plan says of here is not so"
    assert found["changed"] == []


def changed(work: Any, plan: Any) -> list[str]:
    """Plans, and names what isn't bitwise as before."""
    model, optimizer = work.model, work.optimizer
    before = _seen(model, optimizer)
    plan()
    after = _seen(model, optimizer)
    return [name for name in before | after if not _same(before.get(name), after.get(name))]


def _seen(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found = {name: _bits(value) for name, value in model.state_dict().items()}
    for index, state in enumerate(optimizer.state.values()):
        found |= {f"state {index} {name}": _bits(value) for name, value in state.items()}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found |= {"calls": getattr(model, "calls", None), "states": len(optimizer.state), "training": model.training}
    return found | {"RNG": (0, torch.get_rng_state()), "CUDA RNG": (0, torch.cuda.get_rng_state())}


def _bits(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Where it lies, and its bits; not of small ones: a kernel, which does nothing here, joins them."""
    bits = tensor.cpu().clone() if tensor.nbytes > snapshot._SMALL_BYTES else torch.zeros(0)
    return tensor.data_ptr(), bits


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[0] == other[0] and torch.equal(one[1], other[1])
    return type(one) is type(other) and one == other


def _changed(of: truth_search.Truth, target: int, *, state: bool) -> list[str]:
    truth_cases.limit(of.case.capacity_bytes)
    work = truth_cases.workload(of.case, of.model.cuda().eval(), of.batch)
    context = step.open_context(work)
    work = replace(work, optimizer=context.optimizer)
    if state:
        step.train_window(context, [tile(work.sample, 2)], (2,))
    return changed(work, partial(fit_plan, work, target_batch=target, headroom=0))


def main(number: int) -> None:
    """The answer of one case, on the virtual GPU."""
    import torch._dynamo

    gc.freeze()
    torch.set_num_threads(1)
    of = truth_search.Truth(CASES[number])
    target = int(of.case.load)
    plan = truth_search.forked(lambda: truth_plans.planned(of, target, state=False, less=False))
    split, largest = tuple(plan["split"]), plan["largest"]
    steps, several = len(split), len(split) > 1  # of one micro-batch the largest is the target
    found = {
        "plan": plan,
        "fits": of.fits(split),
        "fewer": [k for k in range(1, steps) if of.fits(balanced(target, k))],
        "largest fits": not several or of.fits((largest, largest)),
        "larger": [n for n in range(largest + 1, largest + 4) if several and of.fits((n, n))],
        "kept": truth_search.forked(lambda: truth_plans.planned(of, target, state=True, less=True)),
        "changed": truth_search.forked(lambda: _changed(of, target, state=number % 2 == 1)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
