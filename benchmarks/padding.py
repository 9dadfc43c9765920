"""Count padded tokens of ragged sequences: `python -m benchmarks.padding`.

In order, longest first, and with a budget of tokens.

Lengths are log-normal, as texts' are. A figure is tokens in all micro-batches, padding included; no model is run.
"""

from __future__ import annotations

import argparse

import torch

from autoaccum.data.tokens import longest_first, most_rows, padded_tokens, split_by_tokens
from autoaccum.simulation.solver import split_within

LONGEST = 4096
HEADER = (
    "| window | micro-batch | real tokens | in order | longest first | saved "
    "| with a budget of tokens | saved | steps |"
)


def row(window: int, micro_batch: int, windows: int, generator: torch.Generator) -> str:
    """One line of the table, over some windows."""
    real = plain = ordered = within = steps = 0
    tokens = micro_batch * LONGEST  # what a plan at the longest has shown to fit
    for _ in range(windows):
        drawn = torch.randn(window, generator=generator).mul(0.9).add(5.5).exp().clamp(1, LONGEST)
        lengths = [int(length) for length in drawn]
        sizes = split_within(window, micro_batch)
        sorted_lengths = [lengths[index] for index in longest_first(range(window), lengths)]
        real += sum(lengths)
        plain += padded_tokens(lengths, sizes)
        ordered += padded_tokens(sorted_lengths, sizes)
        by_tokens = split_by_tokens(sorted_lengths, most_rows(lengths, tokens, window), tokens)
        within += padded_tokens(sorted_lengths, by_tokens)
        steps += len(by_tokens)
    return (
        f"| {window} | {micro_batch} | {real:,} | {plain:,} | {ordered:,} | {1 - ordered / plain:.0%} | "
        f"{within:,} | {1 - within / plain:.0%} | {steps / windows:.1f} instead of {len(sizes)} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=20)
    windows = parser.parse_args().windows
    generator = torch.Generator().manual_seed(0)
    print(f"{HEADER}\n|{'---|' * 9}")
    for window in (64, 256, 1024):
        for micro_batch in (8, 32):
            print(row(window, micro_batch, windows, generator))


if __name__ == "__main__":
    main()
