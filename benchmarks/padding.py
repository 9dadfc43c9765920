"""Padded tokens of ragged sequences, in order and longest first: `python -m benchmarks.padding`.

Lengths are log-normal, as texts' are. A figure is tokens in all micro-batches, padding included; no model is run.
"""

from __future__ import annotations

import argparse

import torch

from autoaccum.solve import split_within
from autoaccum.tokens import longest_first, padded_tokens, split_by_tokens

HEADER = "| window | micro-batch | real tokens | in order | longest first | saved | with 4,096 tokens at most: steps |"


def row(window: int, micro_batch: int, windows: int, generator: torch.Generator) -> str:
    """One line of the table, over some windows."""
    real = plain = ordered = steps = 0
    for _ in range(windows):
        drawn = torch.randn(window, generator=generator).mul(0.9).add(5.5).exp().clamp(1, 4096)
        lengths = [int(length) for length in drawn]
        sizes = split_within(window, micro_batch)
        sorted_lengths = [lengths[index] for index in longest_first(range(window), lengths)]
        real += sum(lengths)
        plain += padded_tokens(lengths, sizes)
        ordered += padded_tokens(sorted_lengths, sizes)
        steps += len(split_by_tokens(sorted_lengths, micro_batch, 4096))
    saved = f"{1 - ordered / plain:.0%}"
    return (
        f"| {window} | {micro_batch} | {real:,} | {plain:,} | {ordered:,} | {saved} | "
        f"{steps / windows:.1f} instead of {len(sizes)} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=20)
    windows = parser.parse_args().windows
    generator = torch.Generator().manual_seed(0)
    print(f"{HEADER}\n|{'---|' * 7}")
    for window in (64, 256, 1024):
        for micro_batch in (8, 32):
            print(row(window, micro_batch, windows, generator))


if __name__ == "__main__":
    main()
