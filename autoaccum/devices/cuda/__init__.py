"""Record and measure memory on a CUDA device."""
