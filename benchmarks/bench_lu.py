"""`hflow-fast bench --ops lu` with the same options: python benchmarks/bench_lu.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "lu", *sys.argv[1:]])
