"""`python -m benchmarks`: see bench.py."""
from data import run


def main(argv):
    from benchmarks import bench        # torch takes seconds to load; run() handles Ctrl-C meanwhile
    bench.main(argv)


if __name__ == "__main__":
    run(main, "benchmarks", "what was measured is in --out, if that was given")
