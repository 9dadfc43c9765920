"""Splits that aren't balanced, where an allocator's memory doesn't grow with the size: on a virtual GPU, for real.

One process runs this file as a program and prints a line of JSON; what it says fits was trained in fresh processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autoaccum import Runner, fit_plan, virtual

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import truth_cases, truth_search
from benchmarks.truth_models import Made

REASON = virtual.available()
GiB = truth_cases.GiB


def llama() -> Made:
    """A small language model: what of its logits is left between two micro-batches hangs on the size."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=5000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    ids = torch.zeros(8, 128, dtype=torch.long)
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


CASE = truth_cases.Case("Llama", llama, "AdamW foreach", "bf16", 3 * GiB // 2, 512)
OTHER = 381  # three of 127, which don't fit either


def planned(of: truth_search.Truth, target: int, trained: tuple[int, ...] = ()) -> dict[str, Any]:
    """The plan in this process, and windows of so many samples trained by it here."""
    truth_cases.limit(CASE.capacity_bytes)
    work = truth_cases.workload(CASE, of.model.cuda(), of.batch)
    plan = fit_plan(work, target_batch=target, headroom=0, check=False)
    runner, done = Runner(work, plan), []
    for samples in trained:
        done.append(runner.step({name: ids[:1].repeat(samples, 1) for name, ids in of.batch.items()}))
    return {
        "split": plan.split,
        "largest": plan.largest_micro_batch,
        "explained": plan.explain(),
        "measured": [plan.measured_peak_bytes, plan.predicted_peak_bytes],
        "trained": [[result.split, result.retries] for result in done],
        "ooms": truth_search.count("num_ooms"),
    }


def main() -> None:
    """All of it, on the virtual GPU."""
    torch.set_num_threads(1)
    of = truth_search.Truth(CASE)
    found = {"512": truth_search.forked(lambda: planned(of, 512, (512, 512, 510, 100, 512)))}
    found |= {str(OTHER): truth_search.forked(lambda: planned(of, OTHER))}
    tried = {
        "even": (128,) * 4,
        "largest": (found["512"]["largest"],) * 2,
        "larger": (found["512"]["largest"] + 1,) * 2,
        **{target: tuple(each["split"]) for target, each in found.items()},
    }
    print(json.dumps(found | {"fits": {name: of.fits(split) for name, split in tried.items()}}))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if REASON is not None:
        pytest.skip(str(REASON))
    gpu = virtual.VirtualGpu(memory_bytes=truth_cases.DEVICE_BYTES)
    environment = virtual.environment(gpu) | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    out = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]
    answer: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return answer


def test_where_four_of_128_do_not_fit_a_larger_size_is_repeated(found: dict[str, Any]) -> None:
    plan = found["512"]
    assert not found["fits"]["even"] and found["fits"]["512"], "the truth, of windows in fresh processes"
    assert plan["split"] == [129, 129, 129, 125]
    assert plan["measured"][0] == plan["measured"][1], "verified: first, later, and the rest"
    assert plan["ooms"] == 0


def test_another_target_whose_balanced_split_does_not_fit_takes_no_step_more(found: dict[str, Any]) -> None:
    split = found[str(OTHER)]["split"]
    assert len(split) == 3 and sum(split) == OTHER and not {126, 127, 128} & set(split)
    assert found["fits"][str(OTHER)]


def test_the_largest_and_the_steps_tell_one_story(found: dict[str, Any]) -> None:
    plan = found["512"]
    assert found["fits"]["largest"] and not found["fits"]["larger"] and plan["largest"] == 137
    assert "129 is repeated, since 4 of 128 would need 1.64 GiB (within 1.47 GiB memory runs out" in plan["explained"]
    assert "4 steps" not in plan["explained"], "nothing says that four steps don't fit"
    assert "3 steps of up to 171 would need" in plan["explained"]


def test_the_runner_cuts_a_tail_as_it_was_planned(found: dict[str, Any]) -> None:
    """510 in balance would be 128 + 128 + 127 + 127, of the sizes that don't fit."""
    whole = [129, 129, 129, 125]
    splits = [split for split, _ in found["512"]["trained"]]
    assert splits == [whole, whole, [129, 129, 129, 123], [100], whole]
    assert all(retries == 0 for _, retries in found["512"]["trained"])


if __name__ == "__main__":
    main()
