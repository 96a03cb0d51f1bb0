"""`hflow-fast bench --ops lu_many` with the same options: python benchmarks/bench_lu_many.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "lu_many", *sys.argv[1:]])
