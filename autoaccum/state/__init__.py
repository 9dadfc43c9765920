"""Snapshot and restore everything that a training step changes."""
