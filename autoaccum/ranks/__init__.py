"""Agree over ranks: control words, shares, one reduction a window."""
