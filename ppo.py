"""Tree search distillation: search, keep the search's choice, train the policy on it, repeat.

    python ppo.py --search mcts                    # distil tree search (preset tiny without a GPU, else qwen1.5b)
    python ppo.py --search none                    # plain PPO on single samples, for comparison: with one update a
                                                   # step, REINFORCE with a learnt baseline
    python ppo.py --resume runs/mcts-tiny-seed0    # go on with an interrupted run, to the same result

One step: `collect` turns problems into trajectories, `update` (learner.py: the losses) turns trajectories into new
weights. Every method of the kit (baselines.py too) differs in `collect` alone (GRPO in its loss; presets in rate,
reward and size of a step); the trainer is shared, and every generated and prefilled token is counted.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import explorer
import ranks
import runs
from cluster import Collected, collecting
from config import Config, parse
from countdown import Problem, Reward
from distill import LESSONS
from evaluate import Score
from guard import Guard
from learner import follow_updates, update
from loading import pick_device
from mcts import search
from parts import draw, prepare, record
from policy import Policy
from sampling import Distinct, Sampler, Trajectory, Usage, complete

BAR = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}"

# ------------------------------------------------------------------------------------------------ collecting


def collect_mcts(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """One tree a problem; the trainer gets what `config.distill` makes of it."""
    seeds = rng.integers(2**63, size=len(problems)).tolist()
    prompts = [policy.encode(problem) for problem in problems]
    settings = config.search_config
    trees, usage = search(problems, prompts, sampler, sampler.values, grader(policy, config), settings, seeds)
    trajectories = [
        Trajectory(
            problem=tree.problem,
            prompt=tree.prompt,
            completion=lesson.answer.completion(),
            logprobs=[logprob for node in lesson.answer.path() for logprob in node.logprobs],
            reward=lesson.answer.reward,
            version=policy.version,
            source=config.distill,
            advantages=lesson.advantages,
            returns=lesson.returns,
            critic_only=lesson.critic_only,
        )
        for tree in trees
        for lesson in LESSONS[config.distill](tree, settings)
    ]
    if config.dump_trees:
        file = config.folder / "trees" / f"{policy.version:06d}.json"
        explorer.dump(trees[: config.dump_trees], policy, settings, file)
    statistics = [tree.statistics() for tree in trees]
    info = {f"tree_{key}": float(np.mean([row[key] for row in statistics])) for key in statistics[0]}
    if not info["tree_answers"]:
        tqdm.write("warning: no tree of this step has an answer to teach: see --tree.simulations")
    return trajectories, usage, info


def collect_samples(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """No search: one sample a problem (plain PPO)."""
    rows, usage = sample_rows(policy, sampler, problems, 1, config, rng)
    return [row[0] for row in rows], usage, {}


def sample_rows(policy, sampler, problems, n: int, config: Config, rng) -> tuple[list[list[Trajectory]], Usage]:
    """`n` graded completions of each problem, as the run's settings say."""
    seeds, grade = rng.integers(2**63, size=len(problems)).tolist(), grader(policy, config)
    distinct = Distinct(config.min_p) if config.min_p else None
    shared = config.max_tokens, config.temperature, config.search, grade, distinct
    return complete(policy, sampler, problems, n, seeds, *shared)


def grader(policy: Policy, config: Config) -> Callable[[Problem, list[int]], Reward]:
    """The verifier as the run's settings want it: strict or not, its reward dense or exact."""
    return partial(policy.grade, strict=config.strict, exact=config.reward == "exact")


# ------------------------------------------------------------------------------------------------ training


def train(config: Config, collect: Callable[..., Collected], resume: bool = False) -> dict[str, Score]:
    """Run a method to the end of its budget; returns the test scores before and after."""
    parts = prepare(config)
    policy, sampler, optimizer, data = parts.policy, parts.sampler, parts.optimizer, parts.data["train"]
    bar = tqdm(total=100, desc=config.search, bar_format=BAR)
    with bar, runs.Run(config.folder, config, resume) as run:
        state = parts.load(run)
        if run.restored:
            run.write_config()
        ranks.synchronize(policy, optimizer)
        state["progress"] = progress(state, config)
        bar.n = bar.initial = int(100 * state["progress"])
        guard = Guard(config.max_kl, config.patience)
        for row in runs.read_metrics(run.folder) if resume else []:
            guard.check(row)
        scores = {}
        if config.test_before:
            state["before"] = state.get("before") or asdict(parts.test(run, state, "before"))
            scores["before"] = Score.read(state["before"])
        if not run.restored:
            run.checkpoint(parts.save, state)

        while state["progress"] < 1:
            began, cpu, before = time.perf_counter(), time.process_time(), state["progress"]
            problems, rng = draw(data, config, state["step"])
            trajectories, usage, info = collect(policy, sampler, problems, config, rng)
            for trajectory in trajectories:
                trajectory.critic_only |= not (config.failures or trajectory.reward.correct)
            set_rates(optimizer, state, config)
            sampler.rest()
            collected = time.perf_counter()
            try:
                losses = update(policy, optimizer, trajectories, config, state["micro_tokens"]) if trajectories else {}
            except runs.Stopped as reason:
                record(run, state | {"step": state["step"] + 1}, {"stopped": str(reason)})
                raise

            ended = time.perf_counter()
            advance(state, usage, losses, ended - began, config)
            policy.version = state["step"]
            row = summarize(trajectories) | info | losses | costs(usage, ended - collected, parts.device)
            row["cpu_seconds"] = time.process_time() - cpu
            if is_due(before, state["progress"], config.evaluations):
                row |= parts.validate(run, state)
            if reason := guard.check(row):
                row["stopped"] = reason
            record(run, state, row)
            if reason:
                raise runs.Stopped(f"step {state['step']}: {reason}")
            if is_due(before, state["progress"], config.checkpoints):
                run.checkpoint(parts.save, state)
            show(bar, state, row)
        bar.close()
        run.publish("policy", policy.save)
        scores["after"] = parts.test(run, state, "after")
    print(report(scores, state, config))
    return scores


# ------------------------------------------------------------------------------------------------ a step's mechanics


def is_due(before: float, after: float, times: int) -> bool:
    """Whether a step from one share of the budget to another has passed one of `times` evenly spaced points."""
    return int(before * times + 1e-9) < int(after * times + 1e-9)  # 0.29 * 100 is 28.999999999999996


def set_rates(optimizer: torch.optim.Optimizer, state: dict, config: Config) -> None:
    """The schedule: warm-up by steps, decay by the share of the budget that is spent."""
    warmup = min(1.0, (state["step"] + 1) / max(config.warmup, 1))
    decay = 1 - state["progress"] if config.schedule == "linear" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * warmup * decay


def advance(state: dict, usage: Usage, losses: dict, seconds: float, config: Config) -> None:
    """Count a step and what it cost."""
    state["step"] += 1
    state["seconds"] += seconds
    state["micro_tokens"] = losses.get("micro_tokens", state["micro_tokens"])
    for name in ("generated", "prefilled", "valued"):
        state[name] += getattr(usage, name)
    state["progress"] = progress(state, config)


def progress(state: dict, config: Config) -> float:
    """The share of the budget that is spent, in [0, 1]."""
    shares = [state[key] / limit for key, limit in (("generated", config.tokens), ("step", config.steps)) if limit]
    return min(1.0, max(shares))


def summarize(trajectories: list[Trajectory]) -> dict[str, float]:
    """What the trainer was given this step."""
    if not trajectories:
        return {"trajectories": 0}
    row = {
        "trajectories": len(trajectories),
        "reward": float(np.mean([t.reward.value for t in trajectories])),
        "correct": float(np.mean([t.reward.correct for t in trajectories])),
        "parsed": float(np.mean([t.reward.parsed for t in trajectories])),
        "length": float(np.mean([len(t.completion) for t in trajectories])),
        "identical": 1 - len({tuple(t.completion) for t in trajectories}) / len(trajectories),
    }
    if wrong := [t.reward.value for t in trajectories if not t.reward.correct]:
        row["wrong_reward"] = float(np.mean(wrong))
    return row


def costs(usage: Usage, update_seconds: float, device: str) -> dict[str, float]:
    """Where a step's time went, and the most of the GPU's memory that was held since the last one."""
    row = {"tokens_per_second": usage.generated / max(usage.seconds, 1e-9), "sampler_seconds": usage.seconds}
    row |= {"critic_seconds": usage.critic_seconds, "update_seconds": update_seconds}
    if device.startswith("cuda"):
        # PyTorch's, without CUDA's own; vLLM's sleeping share counts too
        row["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return row


def show(bar: tqdm, state: dict, row: dict) -> None:
    """How far the run is, its best evaluation, the step's reward."""
    shown = {"best": f"{state['best']:.1%}"} if state["best"] >= 0 else {}
    shown |= {"reward": f"{row.get('reward', 0):+.2f}", "tok/s": f"{row['tokens_per_second']:.0f}"}
    bar.set_postfix(shown)
    bar.update(min(100, 100 * state["progress"]) - bar.n)


def report(scores: dict[str, Score], state: dict, config: Config) -> str:
    """The table at the end of a run, and what to do next."""
    lines = [f"\n{config.search} ({config.preset}, seed {config.seed}), {config.test_problems} held-out problems"]
    lines += [f"  {when:7s} {score.line()}" for when, score in scores.items()]
    minutes, trees = state["seconds"] / 60, " --children 8 --distinct --min-p 0.02" if config.tree.distinct else ""
    best = "best/, " * (config.evaluations > 0)
    lines += [
        f"  {state['step']} steps, {state['generated']:,} tokens generated, {state['prefilled']:,} prefilled, "
        f"{state['valued']:,} read by the critic, {minutes:.1f} min",
        f"  {config.folder}/: metrics.jsonl, config.json, checkpoint/, {best}policy/",
    ]
    if config.split != "post":  # whose test problems it has seen
        lines.append(
            f"  next: python evaluate.py {config.folder} --search mcts --budget 1024{trees} "
            f"--prior {config.tree.prior} --size {config.size} --max-tokens {config.max_tokens} "
            f"--temperature {config.temperature} --dtype {config.dtype} --quantize {config.quantize}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ command line


def run(collectors: dict[str, Callable[..., Collected]], args: list[str], method: str) -> None:
    """Parse, refuse what is not this program's, print the configuration, train."""
    config, resume = parse(args, method)
    if config.search not in collectors:
        runs.fail(f"this program runs {', '.join(collectors)}, not {config.search!r}")
    if not resume:
        runs.check_unused(config.folder)
    elif runs.finished(config.folder):
        if "--force" in args:
            runs.fail(f"{config.folder} is finished: a new run can start from its policy, --model {config.folder}")
        print(f"{config.folder} is finished: nothing is left to do")
        return
    if ranks.join(pick_device(config.device)):  # torchrun has started several processes, and this is not the first
        parts = prepare(config)
        return follow_updates(parts.policy, parts.optimizer, config)
    print("\n".join(f"  {key:20s} {value}" for key, value in asdict(config).items()))
    try:
        with collecting(config, collectors[config.search]) as collect:
            train(config, collect, resume)
        ranks.leave()
    except torch.OutOfMemoryError as error:
        runs.fail(f"out of GPU memory, the last checkpoint is kept: pass a smaller --gpu-memory ({str(error)[:80]} …)")
    except runs.Stopped as reason:
        raise runs.Stopped(f"{reason}; the last checkpoint is kept in {config.folder}") from None
    except KeyboardInterrupt:
        if (config.folder / "config.json").exists():
            print(f"\ninterrupted; to go on: python {Path(sys.argv[0]).name} --resume {config.folder}", file=sys.stderr)
        raise


COLLECTORS = {"mcts": collect_mcts, "none": collect_samples}

if __name__ == "__main__":
    runs.command(lambda: run(COLLECTORS, sys.argv[1:], "mcts"))
