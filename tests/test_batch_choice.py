"""The advice on accumulating at all: from the plan's facts, with sources, and only where there is accumulation."""

from __future__ import annotations

import math

import pytest
from plan_fields import changed_plan
from strategies import made_up_plan

from autoaccum import Plan
from autoaccum.reporting import render
from autoaccum.reporting.batch_choice import batch_choice, scaled_beta2


def accumulating(**changes: object) -> Plan:
    plan = made_up_plan()
    assert plan.accumulation_steps > 1
    fingerprint = {**plan.provenance.fingerprint, "optimizer": "AdamW foreach", "window": "plain"}
    return changed_plan(plan, **{"fingerprint": fingerprint, "is_virtual": False, **changes})


@pytest.mark.parametrize(("beta2", "small", "large"), [(0.999, 8, 512), (0.95, 1, 512), (0.98, 7, 9)])
def test_beta2_keeps_its_half_life_in_samples(beta2: float, small: int, large: int) -> None:
    found = scaled_beta2(beta2, small, large)
    assert math.isclose(small * math.log(2) / -math.log(found), large * math.log(2) / -math.log(beta2), rel_tol=1e-9)


def test_seconds_are_the_plans_or_unknown() -> None:
    plan = accumulating(window_seconds=12.0)
    each = f"about {12 / plan.accumulation_steps:.2g} s each"
    assert each in batch_choice(plan)[0] and "12 s in all" in batch_choice(plan)[0]
    for unknown, why in (({"window_seconds": None}, "no window was run"), ({"is_virtual": True}, "computes nothing")):
        text = batch_choice(accumulating(**unknown))[0]
        assert "unknown" in text and why in text and " s each" not in text


def test_the_advice_has_this_plans_numbers_and_sources() -> None:
    plan = accumulating()
    small = plan.micro_batch * plan.world_size
    text = " ".join(batch_choice(plan))
    assert f"beta2 to the power of {small}/{plan.target_batch}" in text
    assert f"{scaled_beta2(0.999, small, plan.target_batch):.6g}" in text and "keeps its target" in text
    for source in ("2507.07101", "2505.23971", "2205.10287", "2405.13698"):
        assert source in text
    sgd = accumulating(fingerprint={"optimizer": "SGD foreach"})
    assert "1706.02677" in batch_choice(sgd)[-1] and "beta2" not in batch_choice(sgd)[-1]
    contrastive = accumulating(fingerprint={"optimizer": "AdamW", "window": "encodes apart"})
    assert "over all samples of the batch at once" in batch_choice(contrastive)[1]


def test_explain_and_reports_show_it_only_where_there_is_accumulation() -> None:
    plan = accumulating()
    assert "accumulating at all" in plan.explain()
    for suffix in (".md", ".html"):
        assert "Accumulating at all" in render(plan, suffix)
    whole = changed_plan(
        plan, split=(plan.target_batch // plan.world_size,), accumulation_steps=1,
        micro_batch=plan.target_batch // plan.world_size,
    )  # fmt: skip
    assert batch_choice(whole) == [] and "accumulating at all" not in whole.explain()
    assert "Accumulating at all" not in render(whole, ".md")
