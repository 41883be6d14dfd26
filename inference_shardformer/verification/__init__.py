"""Proves that a sharded model is the unsharded one: structure, weights, activations of every module, logits."""
