"""Compute a window's peak memory from recordings. No torch here."""
