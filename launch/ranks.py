"""Start a command on several ranks: python launch/ranks.py --nproc-per-node N launch/quantize.py --model PATH ...

As torchrun, with all its options, but the last line is the command's own, and so is the exit code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shardq.parallel.launcher import main  # noqa: E402  the checkout comes first on the path

if __name__ == "__main__":
    main()
