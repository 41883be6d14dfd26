"""A parent for launch tests: one launch for each argument, fields separated by commas; prints the codes as JSON."""

from __future__ import annotations

import json
import os
import sys

from inference_shardformer.distributed.launch import launch_ranks


def main() -> None:
    before = dict(os.environ)
    codes = {}
    for case in sys.argv[1:]:
        module, *argv = case.split(",")
        codes[case] = launch_ranks(argv, nproc=2, module=module)
    print(json.dumps({"codes": codes, "environment_kept": dict(os.environ) == before}), flush=True)
    sys.exit(max(codes.values()))


if __name__ == "__main__":
    main()
