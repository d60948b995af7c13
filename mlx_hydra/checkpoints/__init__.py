"""Checkpoints: read and written a tensor at a time, from Qwen3, from PyTorch and back."""
