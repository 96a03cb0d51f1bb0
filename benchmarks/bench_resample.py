"""`hflow-fast bench --ops resample` with the same options: python benchmarks/bench_resample.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "resample", *sys.argv[1:]])
