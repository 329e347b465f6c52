"""The demo, the benchmarks and (later) sweeps: programs that use a testbed as any user could."""
