"""Kernels in Triton. Nothing here is imported before a backend or a compute kernel that uses it is constructed.

Each has a twin of the same meaning in `kernels.reference`. Modules whose names end in `_kernel` hold device code.
"""
