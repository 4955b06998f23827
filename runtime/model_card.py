"""The model card of a saved policy: its README.md, ready for the hub.

hf upload NAME RUN/policy
"""

import json
from pathlib import Path

from config import TINY, Config
from runtime.chat import Chat
from runtime.scores import Score
from runtime.settings import command
from sampling import Problem, Progress

CARD = """\
---
{front}
---
# {title}

A policy for {task}, trained by {method} ([tree search distillation](https://github.com/at2005/llm-mcts), a reproduction kit). It answers alone, without a search.

- **Base**: {base}.
- **Training**: {cost}.
- **Command**: `{command}`

{scores}

## Use

{note}```python
from transformers import pipeline

policy = pipeline("text-generation", model={folder!r})  # or its name on the hub
messages = {messages!r}
answer = policy(messages, max_new_tokens={max_tokens}, temperature={temperature}, do_sample=True)
print(answer[0]["generated_text"][-1]["content"])
```

`value_head/weights.safetensors` is the critic of the search. transformers does not read it.

## Limits

It has learnt one task. {limits} Its answers were checked by a verifier, not by people.
"""  # noqa: E501, a line of Markdown is a paragraph


def card(
    config: Config, progress: Progress, scores: dict[str, Score], chat: Chat, problem: Problem, folder: str
) -> str:
    """A policy's model card. `scores`: of the tests before and after training, as far as they are known; `problem`: the
    example; `folder`: where the policy lies."""
    countdown, embedded = config.task.task == "countdown", config.model == TINY
    adapter = bool(config.machine.lora_rank)
    tags = ["reinforcement-learning", *(["tree-search"] if config.tree else []), *(["countdown"] if countdown else [])]
    front = {"license": "apache-2.0"}
    base = "the embedded policy of the kit, 1.7 million parameters, Apache-2.0"
    limits = "It knows numbers from 1 to 13."
    if not embedded:
        front = {"license": "other", "license_name": "that-of-the-base-model"}
        front |= {} if Path(config.model).exists() else {"base_model": config.model}
        base = f"{config.model}; its licence holds for this policy too"
        limits = "It may have lost other abilities of its base."
    front |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    messages = [message for message in chat.task.prompt(problem) if chat.can_spell(message["content"])]
    return CARD.format(
        front="\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items()),
        title=f"{config.method} on {config.model}",
        task=f"Countdown with {config.task.size} numbers" if countdown else f"the task {config.task.task}",
        method=config.method,
        base=base,
        cost=f"{progress.step:,} steps, {progress.generated:,} generated tokens, {progress.seconds / 60:.1f} minutes",
        command=command(config),
        scores=table(scores),
        folder=folder,
        note=f"An adapter: it needs `pip install peft` and its base, `{config.model}`.\n\n" if adapter else "",
        messages=messages,
        max_tokens=config.task.max_tokens,
        temperature=config.measuring.eval_temperature,
        limits=limits,
    )


def table(scores: dict[str, Score]) -> str:
    """The test scores, a row each."""
    if not scores:
        return "Not tested yet."
    samples = next(iter(scores.values())).samples
    lines = [f"| training | mean@{samples} | pass@{samples} | format |", "|---|---|---|---|"]
    for when, score in scores.items():
        shares = (score.mean_at_k, score.mean_low, score.mean_high), (score.pass_at_k, score.pass_low, score.pass_high)
        mean, passed = (f"{100 * a:.1f} % [{100 * b:.1f}, {100 * c:.1f}]" for a, b, c in shares)
        lines.append(f"| {when} | {mean} | {passed} | {100 * score.parsed:.1f} % |")
    problems = next(iter(scores.values())).problems
    lines += ["", f"{problems} held-out problems, {samples} samples each; in brackets 95 % intervals over problems."]
    return "\n".join(lines)
