"""Runs a worker: reads its spec, JSON, from standard input, and prints its measurement as a last line of JSON.

Usage: ``python start.py MODULE``, with the workers of this library under their full names. The others are modules of
a package ``workers``, which is this folder: the environment of TRL does not have this library.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch

if __name__ == "__main__":
    # Last, so that files of that folder do not hide installed modules.
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    spec = json.load(sys.stdin)
    torch.set_num_threads(spec["threads"])
    # Libraries may have printed a line without its end.
    print("\n" + json.dumps(import_module(sys.argv[1]).measure(spec)))
