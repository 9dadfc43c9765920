"""Run child processes and load the user's code."""
