"""Train one window: micro-batches, their weights, the optimizer step."""
