"""Splits that aren't balanced, where an allocator's memory doesn't grow with the size: on a virtual GPU, for real.

One process runs this file as a program and prints a line of JSON; what it says fits was trained in fresh processes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plan_fields import changed_plan
from strategies import made_up_plan

from autoaccum import Runner, fit_plan
from autoaccum.devices import virtual
from autoaccum.plan import FEWEST_STEPS
from autoaccum.planning import build_plan
from autoaccum.simulation.cuda_allocator.ties import OLDEST_SEGMENT, tie_rule_of

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import truth_cases, truth_search
from benchmarks.truth_models import Made

REASON = virtual.available()


def llama() -> Made:
    """A small language model: what of its logits is left between two micro-batches hangs on the size."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=5000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    ids = torch.zeros(8, 128, dtype=torch.long)
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


# Which of equal free blocks is taken decides what fits: these are torch 2.13's figures, and those of later ones.
FIGURES = tie_rule_of(torch.__version__) in (OLDEST_SEGMENT, None)
CASE = truth_cases.Case("Llama", llama, "AdamW foreach", "bf16", 1360 << 20, 512)
OTHER = 381  # three of 127, which don't fit either
ROOMY = 1536 << 20  # in which they do


def planned(
    of: truth_search.Truth, target: int, trained: tuple[int, ...] = (), capacity_bytes: int = CASE.capacity_bytes
) -> dict[str, Any]:
    """The plan in this process, and windows of so many samples trained by it here."""
    truth_cases.limit(capacity_bytes)
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
    roomy = truth_search.forked(lambda: planned(of, 512, capacity_bytes=ROOMY))
    tried = {
        "even": (128,) * 4,
        "largest": (found["512"]["largest"],) * 2,
        "larger": (found["512"]["largest"] + 1,) * 2,
        **{target: tuple(each["split"]) for target, each in found.items()},
    }
    print(json.dumps(found | {"roomy": roomy, "fits": {name: of.fits(split) for name, split in tried.items()}}))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if REASON is not None:
        pytest.skip(str(REASON))
    gpu = virtual.VirtualGpu(memory_bytes=truth_cases.DEVICE_BYTES)
    environment = virtual.environment(gpu) | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment["TORCH_CUBLAS_WORKSPACE_CACHE"] = "1"  # torch 2.15 keeps no workspace by itself, and four of 128 fit
    out = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]
    answer: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return answer


@pytest.mark.slow
def test_where_four_of_128_do_not_fit_a_larger_size_is_repeated(found: dict[str, Any]) -> None:
    plan = found["512"]
    assert not found["fits"]["even"] and found["fits"]["512"], "the truth, of windows in fresh processes"
    assert plan["split"] == [129, 129, 129, 125]
    assert plan["measured"][0] == plan["measured"][1], "verified: first, later, and the rest"
    assert plan["ooms"] == 0


@pytest.mark.slow
def test_another_target_whose_balanced_split_does_not_fit_takes_no_step_more(found: dict[str, Any]) -> None:
    split = found[str(OTHER)]["split"]
    assert len(split) == 3 and sum(split) == OTHER and not {126, 127, 128} & set(split)
    assert found["fits"][str(OTHER)]


@pytest.mark.slow
def test_the_largest_and_the_steps_tell_one_story(found: dict[str, Any]) -> None:
    plan = found["512"]
    assert found["fits"]["largest"] and not found["fits"]["larger"], "the truth, of windows in fresh processes"
    if FIGURES:
        assert plan["largest"] == 129
    message = r"129 is repeated, since 4 of 128 would need 1\.\d\d GiB \(within 1\.3\d GiB memory runs out"
    assert re.search(message, plan["explained"]), plan["explained"]
    assert "4 steps" not in plan["explained"], "nothing says that four steps don't fit"
    assert "3 steps of up to 171 would need" in plan["explained"]


@pytest.mark.slow
def test_where_the_balanced_split_fits_it_is_taken_and_no_size_is_both_too_large_and_not(found: dict[str, Any]) -> None:
    """In 2 GiB of a GPU, 0.5 of them CUDA's own: "4 steps of up to 128 would need 1.64 GiB", "137 is the largest"."""
    plan = found["roomy"]
    assert plan["split"] == [128] * 4 and plan["largest"] >= 128
    if FIGURES:
        assert plan["largest"] == 137
    assert "of up to 128" not in plan["explained"] and "3 steps of up to 171 would need" in plan["explained"]


@pytest.mark.slow
def test_the_runner_cuts_a_tail_as_it_was_planned(found: dict[str, Any]) -> None:
    """510 in balance would be 128 + 128 + 127 + 127, of the sizes that don't fit."""
    whole = [129, 129, 129, 125]
    splits = [split for split, _ in found["512"]["trained"]]
    assert splits == [whole, whole, [129, 129, 129, 123], [100], whole]
    assert all(retries == 0 for _, retries in found["512"]["trained"])


# Without a GPU: what is said where sizes alone don't tell what fits.


def an_outlook(fits: Any, most: int = 256) -> Any:
    """As much of an outlook as is asked for the largest micro-batch and for why not fewer steps."""
    return SimpleNamespace(
        request=SimpleNamespace(samples=most, most=most, objective=FEWEST_STEPS, uniform=False),
        evidence=SimpleNamespace(recordings=[SimpleNamespace(micro_batch=31)], fallback_reason=None),
        fits_surely=fits,
        later_floor=lambda n: n,
        usable_bytes=60,
        shortfall=lambda split: f"would need {sum(split)} GiB",
    )


def test_a_size_that_fits_beside_a_smaller_one_only_is_not_the_largest_that_fits() -> None:
    """As of a DenseNet-121 in 5 GiB: windows of 37 alone need a retry each time, 37 + 37 + 36 don't."""
    predictor = an_outlook(lambda split: max(split) <= 37 and set(split) != {37})
    assert build_plan._largest(predictor, (37, 37, 36)) == (36, False)
    assert build_plan._largest(predictor, (36, 36, 36)) == (36, False)
    assert build_plan._largest(an_outlook(lambda split: False), (37, 37, 37)) == (37, False), (
        "the plan's own window fits"
    )
    assert build_plan._largest(an_outlook(lambda split: max(split) <= 41), (37, 37, 36)) == (41, False)


def test_the_summary_says_that_the_largest_is_smaller_than_the_plans() -> None:
    plan = changed_plan(made_up_plan(), largest_micro_batch=51, largest_is_capped=False)
    assert "a micro-batch of 51 is the largest that fits throughout a window; 52 fits beside" in plan.explain()
    plan = changed_plan(plan, largest_micro_batch=57)
    assert "a micro-batch of 57 is the largest that fits" in plan.explain() and "beside" not in plan.explain()


@pytest.mark.parametrize(
    ("split", "largest", "why"),
    [
        ((14, 14, 14, 13), 19, "3 steps don't fit: 1 of 19 and 2 of 18 would need 55 GiB, and neither does a larger"),
        ((30, 30), 60, "1 step doesn't fit: 1 of 60 would need 60 GiB"),
        ((14, 14, 14, 13), 18, None),  # 19 is more than the largest: that tells it
        ((60,), 60, None),
    ],
)
def test_why_a_step_fewer_does_not_fit_is_said_where_its_sizes_would(
    split: tuple[int, ...], largest: int, why: str | None
) -> None:
    found = build_plan._why_not_fewer(an_outlook(lambda split: False), split, largest)
    if why is None:
        assert found == {}
        return
    assert found["fewer_steps"].startswith(why)
    message = changed_plan(made_up_plan(), reasons=dict(made_up_plan().provenance.reasons) | found)
    assert message.explain().count(found["fewer_steps"]) == 2, "in the summary and under fewer steps"
    assert "would need micro-batches of up to" not in message.explain()


if __name__ == "__main__":
    main()
