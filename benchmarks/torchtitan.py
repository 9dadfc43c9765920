"""Compare planned peaks with torchtitan's published ones: `python -m benchmarks.torchtitan`.

Llama 3.1 8B, FSDP2, 2 samples a rank, selective checkpointing, from benchmarks/llama3_h100_202412_torchtitan.md of
github.com/pytorch/torchtitan: 82.4 GiB on 8 H100 with 96 GB, 67.0 on 128. The model, the policy of its checkpointing
and the loop are written after torchtitan of that time; the table names no length, and 8,192 tokens are its Llama 3
configuration's. Published figures are the allocator's reserved bytes, of torch's nightly builds of December 2024.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LENGTH, SAMPLES = 8192, 2
PUBLISHED = {8: 82.4, 128: 67.0}  # GiB
WIDTH, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY = 4096, 32, 32, 8, 14_336, 128_256
GPU, MEMORY = "h200", "96GiB"  # an H100's processor, and more memory than the limit


class RMSNorm(nn.Module):
    """Normalize in fp32, as torchtitan's "rmsnorm"."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized input."""
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def rotated(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of entries by complex numbers."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns.view(1, x.shape[1], 1, -1)).flatten(3).type_as(x)


class Block(nn.Module):
    """Attend and feed forward, as a block of torchtitan's."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, KV_HEADS * size, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)
        self.attention_norm, self.ffn_norm = RMSNorm(), RMSNorm()

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        h = x + self._attend(self.attention_norm(x), turns)
        inner = self.ffn_norm(h)
        out: torch.Tensor = h + self.w2(F.silu(self.w1(inner)) * self.w3(inner))
        return out

    def _attend(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        q, k, v = (each.view(rows, length, -1, WIDTH // HEADS) for each in (self.wq(x), self.wk(x), self.wv(x)))
        q, k = rotated(q, turns), rotated(k, turns)
        k, v = (
            each[:, :, :, None, :].expand(-1, -1, -1, HEADS // KV_HEADS, -1).reshape(rows, length, HEADS, -1)
            for each in (k, v)
        )
        out = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)), is_causal=True)
        mixed: torch.Tensor = self.wo(out.transpose(1, 2).contiguous().view(rows, length, -1))
        return mixed


class Llama(nn.Module):
    """Predict the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.output = RMSNorm(), nn.Linear(WIDTH, VOCABULARY, bias=False)
        half = WIDTH // HEADS // 2
        self.register_buffer("turns", torch.zeros(LENGTH, half, dtype=torch.complex64), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.turns)
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


def checkpointed(block: nn.Module) -> nn.Module:
    """Keep attention and every other matrix product; compute the rest again.

    torchtitan's selective_ac_option = "op".
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    aten = torch.ops.aten
    kept = {
        aten.mm.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten.abs.default,
        aten.max.default,
    }

    def contexts() -> Any:
        products: Counter[bool] = Counter()

        def policy(context: Any, function: Any, *_: Any, **__: Any) -> CheckpointPolicy:
            if function == aten.mm.default:
                products[context.is_recompute] += 1
            drops = function == aten.mm.default and products[context.is_recompute] % 2 == 0
            keeps = function in kept and not drops
            return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    wrapped: nn.Module = checkpoint_wrapper(block, context_fn=contexts, preserve_rng_state=False)
    return wrapped


def sharded(ranks: int) -> nn.Module:
    """Return the model, sharded over ranks that are not here."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from autoaccum.ranks.torch_internals import open_fake_group

    # torch of then took flash attention, whose output the checkpointing keeps; later ones take cuDNN's, which its list
    # of kept operations doesn't name: 128 MiB less in each of 32 blocks.
    torch.backends.cuda.enable_cudnn_sdp(False)
    open_fake_group(0, ranks)
    with torch.device("meta"):
        model = Llama()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for place, block in enumerate(model.layers):
        model.layers[place] = checkpointed(block)
        fully_shard(model.layers[place], mp_policy=policy, reshard_after_forward=place < LAYERS - 1)
    fully_shard(model, mp_policy=policy, reshard_after_forward=True)
    return model.to_empty(device="cuda")


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean cross-entropy in fp32, of logits that are freed first."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1).float(), batch[1].flatten())


def workload() -> Any:
    """Return the workload of as many ranks as the environment says."""
    from autoaccum import Workload

    sample = torch.zeros(2, LENGTH, dtype=torch.long, device="cpu")
    model = sharded(int(os.environ["RANKS"]))
    adamw = functools.partial(torch.optim.AdamW, lr=3e-4, foreach=True)
    return Workload(model, (sample, sample), loss=loss, optimizer=adamw, clip_grad_norm=1.0, count=lambda batch: 1)


def bare() -> float:
    """Return the GiB that torchtitan's loop reserves, nothing of autoaccum in it."""
    model = sharded(int(os.environ["RANKS"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, foreach=True)
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.long, device="cpu")
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, (tokens.cuda(), tokens.cuda())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
    return torch.cuda.max_memory_reserved() / 2**30


def main() -> None:
    """Print a table."""
    from autoaccum.devices.virtual import planning_environment

    if "RANKS" in os.environ:
        print(bare())
        return
    print(
        "| ranks | published | planned | real allocator on a virtual GPU | planned / published |\n|---|---|---|---|---|"
    )
    for ranks, published in PUBLISHED.items():
        own = {**os.environ, "RANKS": str(ranks)}
        virtual = planning_environment(GPU, own)
        assert virtual is not None
        loop = subprocess.run([sys.executable, "-m", __spec__.name], env=virtual, capture_output=True, check=True)
        command = ["-m", "autoaccum", "plan", "--gpu", GPU, "--memory", MEMORY, "--target-batch", str(SAMPLES * ranks)]
        options = [
            "--max-micro-batch",
            str(SAMPLES),
            "--headroom",
            "0B",
            "--no-verify",  # what is predicted, without a look at the window
            "--workload",
            f"{Path(__file__)}:workload",
            "--json",
        ]
        made = subprocess.run([sys.executable, *command, *options], env=own, capture_output=True, check=True)
        plan = json.loads(made.stdout)
        if plan["schedule"]["split"] != [SAMPLES]:
            raise SystemExit(f"The plan's steps are {plan['schedule']['split']}, not one of {SAMPLES}: another window.")
        memory = plan["memory"]
        planned = (memory["plain_loop_peak_bytes"] or memory["predicted_peak_bytes"]) / 2**30
        error = planned / published - 1
        print(f"| {ranks} | {published} | {planned:.2f} | {float(loop.stdout):.2f} | {error:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
