"""Measure windows in lanes: `python -m benchmarks.lanes [--exactness | ...]`.

Without an option: the time of a window in lanes against plain accumulation and one whole batch, on this CPU, and the
bytes that lanes on a GPU move. `--exactness`: gradients and running statistics against one whole batch's, for models of
torchvision, a U-Net, a PointNet and a net of volumes. `--memory`: plans against what the real allocator reserves on a
virtual GPU. `--host`: what lanes hold on such a device and on the host. `--digits`: what exact statistics are good for,
in two minutes.
Tables are printed and written to benchmarks/results/.
"""

from __future__ import annotations

import argparse

from ..tables import markdown, write_results
from . import digits, exactness, host, memory, price


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lanes", description=__doc__)
    parser.add_argument("--exactness", action="store_true")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--only", help="names of models, separated by commas")
    parser.add_argument("--picture", help="where --digits writes its picture")
    given = parser.parse_args()
    if given.digits:
        name, rows = "lanes-digits", digits.run(given.picture)
    elif given.exactness:
        name, rows = "lanes-exactness", exactness.run(given.only.split(",") if given.only else None)
    elif given.memory:
        name, rows = "lanes-memory", memory.run(given.only.split(",") if given.only else None)
    elif given.host:
        name, rows = "lanes-host", host.run()
    else:
        name, rows = "lanes-price", price.run()
    text = markdown(rows)
    print(text)
    if not given.only:
        print(write_results(name, text, rows))


if __name__ == "__main__":
    main()
