"""Say what accumulation costs, and what replaces it. No torch.

Advice, from the plan's own facts and published rules; nothing here changes a plan. docs/choosing-a-batch.md has the
sources.
"""

from __future__ import annotations

from ..plan import Plan
from .kinds import place

BETA2 = 0.999  # torch's default for Adam and AdamW; a plan doesn't hold the optimizer's own


def batch_choice(plan: Plan) -> list[str]:
    """Return the advice as sentences; none for one accumulation step."""
    if plan.accumulation_steps == 1:
        return []
    return [_time(plan), _reasons(plan), _without(plan), _hyperparameters(plan)]


def small_batch(plan: Plan) -> int:
    """Return the batch of a run without accumulation, over all ranks."""
    return plan.micro_batch * plan.world_size


def scaled_beta2(beta2: float, small: int, large: int) -> float:
    """Return beta2 with the same half-life at a smaller batch."""
    return float(beta2 ** (small / large))


def _time(plan: Plan) -> str:
    """Return what the steps of one window take, where that is known."""
    steps, seconds = plan.accumulation_steps, plan.timing.window_seconds
    text = f"An optimizer step runs {steps} micro-batches one after the other"
    if seconds is None or plan.device.is_virtual:
        why = "a virtual GPU computes nothing" if plan.device.is_virtual else "no window was run"
        return f"{text}; how long they take is unknown: {why}."
    return (
        f"{text}, {seconds:.3g} s in all, about {seconds / steps:.2g} s each (estimated from the verification run, "
        f"{place(plan)}); the optimizer's own part was not measured apart."
    )


def _reasons(plan: Plan) -> str:
    """Return what the large batch is needed for."""
    if "encodes apart" in plan.provenance.fingerprint.get("window", ""):
        return "This loss is over all samples of the batch at once, so that the batch is part of what is trained."
    return (
        f"{plan.target_batch:,} samples are needed to reproduce a run of that batch, for a loss over all samples at "
        "once (contrastive), and where several devices wait for each other's gradients."
    )


def _without(plan: Plan) -> str:
    """Return what a run without accumulation does instead."""
    small = small_batch(plan)
    return (
        f"Otherwise a run with a batch of {small:,} and no accumulation does {plan.target_batch / small:.3g} times the "
        "updates with the same samples, and often needs no more of them (language models: Marek et al., "
        "arXiv:2507.07101). A batch that grows during training is another way (Merrill et al., arXiv:2505.23971)."
    )


def _hyperparameters(plan: Plan) -> str:
    """Return how the optimizer's settings follow the batch."""
    small, large = small_batch(plan), plan.target_batch
    end = "Try it before you trust it; this plan keeps its target."
    if "Adam" not in plan.provenance.fingerprint.get("optimizer", ""):
        return (
            f"It takes other settings; for SGD, the learning rate in proportion to the batch, x {small / large:.3g} "
            f"(Goyal et al., arXiv:1706.02677). {end}"
        )
    return (
        f"It takes other settings: Adam's beta2 to the power of {small}/{large}, which keeps its half-life in samples "
        f"({BETA2} becomes {scaled_beta2(BETA2, small, large):.6g}; Marek et al.); a lower learning rate, "
        f"x {(small / large) ** 0.5:.3g} by the square root rule (Malladi et al., arXiv:2205.10287); and a weight "
        f"decay with which learning rate x weight decay is x {small / large:.3g}, a constant time scale (Wang "
        f"and Aitchison, arXiv:2405.13698). {end}"
    )
