"""What the command needs is looked for first; then it runs, within a time that began here."""

from __future__ import annotations

import os
import sys
import time

from reports.gpu.packages import BAD_INPUT, BASE, how_to_install, missing

if __name__ == "__main__":
    began_s = time.monotonic()
    # Imports that ask whether there is a GPU would begin to use it, and no step could be a child.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if absent := missing(BASE):
        print(f"reports.gpu: {how_to_install(absent)}", file=sys.stderr)
        raise SystemExit(BAD_INPUT)

    from reports.gpu.cli import main

    main(began_s)
