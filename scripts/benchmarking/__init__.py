"""What the benchmarks share: model shapes, workloads, and sides that take turns, each in a process of its own."""
