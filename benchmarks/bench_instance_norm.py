"""`hflow-fast bench --ops instance_norm` with the same options: python benchmarks/bench_instance_norm.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "instance_norm", *sys.argv[1:]])
