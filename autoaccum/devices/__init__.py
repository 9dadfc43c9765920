"""Record, measure and limit memory on each kind of device."""
