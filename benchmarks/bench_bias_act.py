"""`hflow-fast bench --ops bias_act` with the same options: python benchmarks/bench_bias_act.py --threads 2 --dry-run."""

import sys

from hflow_fast.cli.bench import bench

bench(["--ops", "bias_act", *sys.argv[1:]])
