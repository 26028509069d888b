"""Examples of what a user of the benchmarks can add."""
