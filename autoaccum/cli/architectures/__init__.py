"""Build workloads from architectures' names and configurations, without weights."""
