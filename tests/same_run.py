"""`python tests/same_run.py RUN OTHER [TOLERANCE]`: the same samples and losses, step by step?"""

import sys
from pathlib import Path

from tiny_runs import read_losses, read_samples


def main() -> None:
    one, other = Path(sys.argv[1]), Path(sys.argv[2])
    tolerance = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    losses, others = read_losses(one), read_losses(other)
    if losses.keys() != others.keys() or not losses:
        sys.exit(f"steps differ: {sorted(losses)} and {sorted(others)}")
    worst = max(abs(losses[step] - others[step]) for step in losses)
    if worst > tolerance:
        sys.exit(f"losses differ by {worst} (allowed {tolerance})")
    if read_samples(one) != read_samples(other):
        sys.exit("sample ids differ")
    print(f"{len(losses)} steps: the same sample ids, losses differ by at most {worst:.2g}")


if __name__ == "__main__":
    main()
