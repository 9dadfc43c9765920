"""Cut batches and loaders into windows of micro-batches."""
