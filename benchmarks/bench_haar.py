"""`hflow-fast bench --ops haar` with the same options: python benchmarks/bench_haar.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "haar", *sys.argv[1:]])
