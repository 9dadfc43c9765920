"""Run a window's micro-batches in lanes that meet where samples interact."""
