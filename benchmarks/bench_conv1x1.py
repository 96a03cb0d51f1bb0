"""`hflow-fast bench --ops conv1x1` with the same options: python benchmarks/bench_conv1x1.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "conv1x1", *sys.argv[1:]])
