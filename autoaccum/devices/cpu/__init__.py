"""Record and measure memory on the CPU."""
