"""Simulate PyTorch's CUDA caching allocator. No torch here."""
