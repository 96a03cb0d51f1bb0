"""`hflow-fast bench --ops actnorm` with the same options: python benchmarks/bench_actnorm.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "actnorm", *sys.argv[1:]])
