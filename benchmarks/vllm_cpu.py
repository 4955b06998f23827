"""vLLM's part of benchmarks/speed.py, run by the Python of an environment that has vLLM (`make test-vllm` makes one).

    .venv-vllm/bin/python -m benchmarks.vllm_cpu 64 512     # a line of JSON: tokens a CPU second for each size

Prompts and completions are token ids, without log-probabilities. All prompts of a size are submitted at once.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/vllm_cpu.py`

import runtime.threads

from benchmarks.speed import LENGTH, SIBLINGS
from config import TINY
from countdown import make_problems
from runtime import cli
from runtime.loading import load_policy

REPEATS = 3
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, whose CPU seconds are counted
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
}


def main() -> None:
    if not sys.argv[1:] or not all(size.isdecimal() for size in sys.argv[1:]):
        raise ValueError("pass numbers of rows: 64 512")
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    policy, rates_of = load_policy(TINY, train=False), {}
    llm = LLM(  # its layers are a Qwen2's, for which vLLM has code of its own; for seed_oss it borrows slower code
        str(TINY), hf_overrides={"architectures": ["Qwen2ForCausalLM"]},
        skip_tokenizer_init=True, dtype="float32", generation_config="vllm", enforce_eager=True,
        max_num_seqs=max(map(int, sys.argv[1:])), enable_prefix_caching=True,
    )  # fmt: skip
    for rows in map(int, sys.argv[1:]):
        problems, rates = make_problems(rows // SIBLINGS, "train"), []
        prompts = [{"prompt_token_ids": policy.encode(problem)} for problem in problems]
        stops = sorted(policy.stop_ids)
        params = SamplingParams(n=SIBLINGS, max_tokens=LENGTH, stop_token_ids=stops, detokenize=False)
        for _ in range(REPEATS + 1):
            began = time.process_time()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
            rates.append(tokens / (time.process_time() - began))
        rates_of[rows] = rates[1:]  # the first one compiles
    print(json.dumps(rates_of))


if __name__ == "__main__":
    cli.command(main)
