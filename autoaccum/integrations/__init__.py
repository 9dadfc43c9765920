"""Train a plan's windows in other loops and trainers."""
