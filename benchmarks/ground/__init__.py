"""Training loops whose memory others measured on GPUs; see `benchmarks.ground_truth`."""
