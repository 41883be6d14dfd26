"""The paged KV cache: shape, tensors, blocks."""
