"""`hflow-fast bench --ops flow_step` with the same options: python benchmarks/bench_flow_step.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "flow_step", *sys.argv[1:]])
