"""`hflow-fast bench --ops glow_step` with the same options: python benchmarks/bench_glow_step.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "glow_step", *sys.argv[1:]])
