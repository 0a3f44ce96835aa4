"""`python -m benchmarks`: see bench.py."""
import sys

from benchmarks.bench import main

main(sys.argv[1:])
