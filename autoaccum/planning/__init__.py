"""Plan a workload: record, predict, solve, verify."""
