"""The long run."""

import argparse
import os
import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers.utils import logging

from support import fuzzing
from support.fuzzing.cases import MEMORY, address_space, describe, make_bench, make_case, run, tell


def main() -> None:
    """The long run."""
    parser = argparse.ArgumentParser(description=fuzzing.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # errors are raised as well
    with TemporaryDirectory() as place:
        bench = make_bench(Path(place))
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + 4 * MEMORY,) * 2)
        numbers = range(options.cases) if options.case is None else range(options.case, options.case + 1)
        outcomes, failures = run(bench, options.seed, numbers, tell)
        for outcome, count in outcomes.most_common():
            print(f"{count:7}  {outcome}")
        if options.case is not None:
            print(describe(make_case(bench, options.seed, options.case), options.seed, options.case))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
