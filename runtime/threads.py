"""How threads wait for work. Every program imports this before torch, which reads these variables when it is loaded;
Ray's and torchrun's processes do too.

OpenMP's threads spin while they wait. Beside another busy process they then hold the cores that they wait for: on two
cores a run is 3.5 times slower there. Threads that sleep are 0.9 to 1.7 times slower there. On an idle machine they
have 0.56 of the speed of those that spin (benchmarks/neighbour.py, docs/LOG.md). A user's own choice stays.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # of GNU's OpenMP, in PyTorch's builds for Linux
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # milliseconds; of LLVM's and Intel's
