"""vLLM's share of benchmarks/speed.py, run by the Python of an environment that has it (`make test-vllm` makes one).

.venv-vllm/bin/python -m benchmarks.vllm_cpu 64 512     # a line of JSON: CPU seconds and tokens for each size
"""

import json
import os
import sys
import time

from benchmarks.speed import LENGTH, SIBLINGS
from countdown import make_problems
from engines import VLLMSampler
from loading import TINY, load_policy

REPEATS = 3


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    policy, found = load_policy(TINY, train=False), {}
    sampler = VLLMSampler(policy, policy.lm.config.max_position_embeddings)
    for rows in map(int, sys.argv[1:]):
        prompts, rates = [policy.encode(problem) for problem in make_problems(rows // SIBLINGS, "train")], []
        for _ in range(REPEATS + 1):
            began = time.process_time()
            _, usage = sampler.sample(prompts, SIBLINGS, list(range(len(prompts))), LENGTH)
            rates.append(usage.generated / (time.process_time() - began))
        found[rows] = rates[1:]  # the first one compiles
    print(json.dumps(found))


if __name__ == "__main__":
    main()
