"""Measure batch normalization over a window: exactness, price and use."""
