"""What benchmarks share: their options, and time of the processor."""

import argparse
import time
from collections.abc import Callable

import torch


def rounds(doc: str | None, usual: int = 15) -> int:
    """How many rounds the command line asks for; as many threads are set as it says."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=usual)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args.rounds


def seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began
