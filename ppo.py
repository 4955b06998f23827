"""Tree search distillation: search, keep the search's choice, train the policy on it, repeat.

    python ppo.py --search mcts                    # distil tree search (preset tiny without a GPU, else qwen1.5b)
    python ppo.py --search none                    # plain PPO on single samples, for comparison
    python ppo.py --resume runs/mcts-tiny-seed0    # go on with an interrupted run

One step: `collect` turns problems into trajectories, `update` (learner.py: the losses) turns trajectories into new
weights. Every method of the kit (baselines.py too) differs in `collect` alone; optimiser, schedule, KL and losses are
shared, and every generated and prefilled token is counted.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import explorer
import memory
import runs
from config import Config, parse
from countdown import Problem, make_splits
from distill import LESSONS
from engines import make_sampler, pick_sampler
from evaluate import Score, evaluate
from learner import make_optimizer, update
from loading import load_policy, pick_device
from mcts import search
from policy import Policy, read_tensors
from sampling import Sampler, Trajectory, Usage, complete

Collected = tuple[list[Trajectory], Usage, dict[str, float]]

# ------------------------------------------------------------------------------------------------ collecting


def collect_mcts(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """One tree a problem; the trainer gets what `config.distill` makes of it."""
    seeds = rng.integers(2**63, size=len(problems)).tolist()
    prompts = [policy.encode(problem) for problem in problems]

    def grade(problem, completion):
        return policy.grade(problem, completion, config.strict)

    settings = config.search_config
    trees, usage = search(problems, prompts, sampler, sampler.values, grade, settings, seeds)
    trajectories = [
        Trajectory(
            tree.problem,
            tree.prompt,
            lesson.answer.completion(),
            [logprob for node in lesson.answer.path() for logprob in node.logprobs],
            lesson.answer.reward,
            policy.version,
            config.distill,
            lesson.advantages,
            lesson.returns,
            lesson.critic_only,
        )
        for tree in trees
        for lesson in LESSONS[config.distill](tree, settings)
    ]
    if config.dump_trees:
        file = config.folder / "trees" / f"{policy.version:06d}.json"
        explorer.dump(trees[: config.dump_trees], policy, settings, file)
    statistics = [tree.statistics() for tree in trees]
    info = {f"tree_{key}": float(np.mean([row[key] for row in statistics])) for key in statistics[0]}
    return trajectories, usage, info


def collect_samples(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """No search: one sample a problem (plain PPO)."""
    rows, usage = sample_rows(policy, sampler, problems, 1, config, rng)
    return [row[0] for row in rows], usage, {}


def sample_rows(policy, sampler, problems, n: int, config: Config, rng) -> tuple[list[list[Trajectory]], Usage]:
    """`n` graded completions of each problem, as the run's settings say."""
    seeds = rng.integers(2**63, size=len(problems)).tolist()
    return complete(
        policy, sampler, problems, n, seeds, config.max_tokens, config.temperature, config.search, config.strict
    )


# ------------------------------------------------------------------------------------------------ training


def train(config: Config, collect: Callable[..., Collected], resume: bool = False) -> dict[str, Score]:
    """Run a method to the end of its budget; returns the test scores before and after."""
    device = pick_device(config.device)
    engine = pick_sampler(config.sampler, device, config.quantize)
    torch.manual_seed(config.seed)
    plan = memory.plan(config, device)
    if plan.parts:
        print(plan)
    policy = load_policy(
        config.model, config.lora_rank, device, config.dtype, config.quantize, config.gradient_checkpointing
    )
    sampler = make_sampler(engine, policy, plan.context, plan.rows, plan.kept, plan.cache_gb, config.seed)
    optimizer = make_optimizer(policy, config)
    data = make_splits(
        config.split,
        train=config.train_problems,
        validation=config.eval_problems,
        test=config.test_problems,
        size=config.size,
    )
    run = runs.Run(config.folder, config, resume)
    state = {"step": 0, "progress": 0.0, "generated": 0, "prefilled": 0, "valued": 0, "seconds": 0.0, "evaluated": 0}
    state["micro_tokens"] = plan.micro_tokens
    if resume:
        folder, saved = run.restore()
        state |= saved
        state["micro_tokens"] = min(state["micro_tokens"], plan.micro_tokens)
        policy.load_weights(folder)
        optimizer.load_state_dict(read_tensors(folder / "optimizer.pt"))
        policy.version = state["step"]

    def save(folder: Path) -> None:
        policy.save(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    def measure(name: str, samples: int) -> Score:
        return evaluate(
            policy, sampler, data[name], samples, config.eval_temperature, config.max_tokens, config.seed, progress=True
        )

    def record(row: dict) -> None:
        counters = {key: state[key] for key in ("step", "generated", "prefilled", "valued", "seconds")}
        run.log(counters | row)

    def test(when: str) -> Score:
        score = measure("test", config.test_samples)
        record({f"test_{key}": value for key, value in asdict(score).items() if key != "usage"})
        tqdm.write(f"test {when}: {score.line()}")
        return score

    scores = {}
    if config.test_before:
        scores["before"] = Score(**state["before"]) if "before" in state else test("before")
        state["before"] = asdict(scores["before"])
    bar = tqdm(total=100, initial=int(100 * state["progress"]), desc=config.search, unit="%", bar_format=BAR)
    shown = {}
    while state["progress"] < 1:
        began = time.perf_counter()
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        rng = np.random.default_rng([config.seed, state["step"]])
        problems = [data["train"][i] for i in rng.integers(len(data["train"]), size=config.problems)]
        trajectories, usage, info = collect(policy, sampler, problems, config, rng)
        for trajectory in trajectories:
            trajectory.critic_only |= not (config.failures or trajectory.reward.correct)
        warmup = min(1.0, (state["step"] + 1) / max(config.warmup, 1))
        decay = 1 - state["progress"] if config.schedule == "linear" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warmup * decay
        sampler.rest()
        collected = time.perf_counter()
        losses = update(policy, optimizer, trajectories, config, state["micro_tokens"]) if trajectories else {}

        ended = time.perf_counter()
        state["step"] += 1
        state["seconds"] += ended - began
        state["micro_tokens"] = losses.get("micro_tokens", state["micro_tokens"])
        for name in ("generated", "prefilled", "valued"):
            state[name] += getattr(usage, name)
        state["progress"] = progress(state, config)
        row = summarize(trajectories) | info | losses
        row |= {"tokens_per_second": usage.generated / usage.seconds, "sampler_seconds": usage.seconds}
        row |= {"critic_seconds": usage.critic_seconds, "update_seconds": ended - collected}
        if device.startswith("cuda"):
            # PyTorch's, without CUDA's own; vLLM's sleeping share counts too
            row["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if (due := int(state["progress"] * config.evaluations)) > state["evaluated"]:
            state["evaluated"] = due
            score = measure("validation", config.eval_samples)
            row |= {"eval_mean": score.mean_at_k, "eval_pass": score.pass_at_k, "eval_reward": score.reward}
            row |= {"eval_parsed": score.parsed, "eval_k": config.eval_samples}
            shown["eval"] = f"{score.mean_at_k:.1%}"
        record(row)
        if "eval_mean" in row or state["progress"] >= 1:
            run.checkpoint(save, state)
        shown |= {"reward": f"{row.get('reward', 0):+.2f}", "tok/s": f"{row['tokens_per_second']:.0f}"}
        bar.set_postfix(shown)
        bar.update(min(100, 100 * state["progress"]) - bar.n)
    bar.close()
    policy.save(run.folder / "policy")
    scores["after"] = test("after")
    print(report(scores, state, config))
    return scores


BAR = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}"


def progress(state: dict, config: Config) -> float:
    """The share of the budget that is spent, in [0, 1]."""
    shares = [state[key] / limit for key, limit in (("generated", config.tokens), ("step", config.steps)) if limit]
    return min(1.0, max(shares))


def summarize(trajectories: list[Trajectory]) -> dict[str, float]:
    """What the trainer was given this step."""
    if not trajectories:
        return {"trajectories": 0}
    return {
        "trajectories": len(trajectories),
        "reward": float(np.mean([t.reward.value for t in trajectories])),
        "correct": float(np.mean([t.reward.correct for t in trajectories])),
        "parsed": float(np.mean([t.reward.parsed for t in trajectories])),
        "length": float(np.mean([len(t.completion) for t in trajectories])),
    }


def report(scores: dict[str, Score], state: dict, config: Config) -> str:
    """The table at the end of a run, and what to do next."""
    lines = [f"\n{config.search} ({config.preset}, seed {config.seed}), {config.test_problems} held-out problems"]
    lines += [f"  {when:7s} {score.line()}" for when, score in scores.items()]
    minutes = state["seconds"] / 60
    lines += [
        f"  {state['step']} steps, {state['generated']:,} tokens generated, {state['prefilled']:,} prefilled, "
        f"{state['valued']:,} read by the critic, "
        f"{minutes:.1f} min",
        f"  {config.folder}/: metrics.jsonl, config.json, checkpoint/, policy/",
        f"  next: python evaluate.py {config.folder} --search mcts --budget 1024 --max-tokens {config.max_tokens} "
        f"--temperature {config.temperature} --dtype {config.dtype} --quantize {config.quantize}",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ command line


def run(collectors: dict[str, Callable[..., Collected]], args: list[str], method: str) -> None:
    """Parse, refuse what is not this program's, print the configuration, train."""
    config, resume = parse(args, method)
    if config.search not in collectors:
        runs.fail(f"this program runs {', '.join(collectors)}, not {config.search!r}")
    print("\n".join(f"  {key:20s} {value}" for key, value in asdict(config).items()))
    try:
        train(config, collectors[config.search], resume)
    except torch.OutOfMemoryError as error:
        runs.fail(f"out of GPU memory, the last checkpoint is kept: pass a smaller --gpu-memory ({str(error)[:80]} …)")


COLLECTORS = {"mcts": collect_mcts, "none": collect_samples}

if __name__ == "__main__":
    runs.command(lambda: run(COLLECTORS, sys.argv[1:], "mcts"))
