"""Test the whole project on a real GPU: `python -m benchmarks.on_gpu` (docs/on-gpu.md).

schedule   the trials, in order of importance, with their memory and time limits
drive      run each in a separate process, side by side or alone, within a deadline
trial      what such a process runs: one of the parts
memory, stand_in, context, gradients, times, finders, command_line   the parts (a) to (g)
report     rows as one table, and as files for benchmarks/results
"""
