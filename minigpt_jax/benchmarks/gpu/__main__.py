"""Runs one part of the GPU benchmark: reads its setup from standard input, and prints its results as lines of JSON."""

import importlib
import json
import os
import sys
import traceback

from minigpt_jax.benchmarks.gpu.setup import Setup
from minigpt_jax.benchmarks.interleave import described


def main(name: str) -> None:
    setup = Setup(**json.load(sys.stdin))
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not a result
    module, _, preset = name.partition("_")
    module = importlib.import_module(f"minigpt_jax.benchmarks.gpu.{'training' if preset else module}")
    try:
        for result in module.measure(setup, *([preset] if preset else [])):
            print(json.dumps(result), file=results, flush=True)
    except Exception as error:  # of any library
        traceback.print_exc()
        print(json.dumps({"error": described(error)}), file=results, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
