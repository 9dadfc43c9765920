"""What autoaccum claims, measured again: `python -m benchmarks`."""
