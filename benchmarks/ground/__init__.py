"""Training loops whose memory others measured on real GPUs, written as they are; see `benchmarks.ground_truth`."""
