"""`hflow-fast bench --ops coupling` with the same options: python benchmarks/bench_coupling.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "coupling", *sys.argv[1:]])
