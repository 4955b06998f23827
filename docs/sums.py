"""A task of one's own, explained in docs/your_task.md: add up four numbers, step by step, with + alone.

python ppo.py --search mcts --task docs/sums.py:Sums --out runs/sums
"""

import re

import numpy as np

from sampling import Reward

SPLITS = ("train", "validation", "test")
SUM = re.compile(r"<answer>([0-9+() ]{1,100})</answer>")
RULES = "Add up the numbers, one + a step: <step> a + b = c </step>, and end with <answer> a + b + c + d </answer>"


class Sums:
    def problems(self, split: str, count: int) -> list[tuple[int, ...]]:
        """A problem is four numbers. Their sum decides the split: no test problem is a training problem in disguise."""
        rng, problems = np.random.default_rng(SPLITS.index(split)), []
        while len(problems) < count:
            numbers = tuple(rng.integers(1, 14, size=4).tolist())
            if sum(numbers) % 3 == SPLITS.index(split):
                problems.append(numbers)
        return problems

    def prompt(self, problem: tuple[int, ...]) -> list[dict[str, str]]:
        """The user text is one that the embedded policy can read. It has no words for the rules."""
        numbers = f"Numbers: {' '.join(map(str, problem))} Target: {sum(problem)}"
        return [{"role": "system", "content": RULES}, {"role": "user", "content": numbers}]

    def grade(self, problem: tuple[int, ...], text: str) -> Reward:
        """1 for a sum of all the numbers; the more of them are missing the less; -1 for anything else."""
        answers = SUM.findall(text[:10_000])  # model output is hostile input: its length is bounded, nothing is run
        if len(answers) != 1:
            return Reward(-1.0, correct=False, parsed=False, reason="no sum")
        missing = list(problem)
        for number in map(int, re.findall("[0-9]{1,9}", answers[0])):
            if number not in missing:
                return Reward(-0.9, correct=False, parsed=False, reason="other numbers")
            missing.remove(number)
        if missing:
            return Reward(0.5 - len(missing) / len(problem), correct=False, parsed=True, reason="numbers are missing")
        return Reward(1.0, correct=True, parsed=True, reason="correct")

    # optional: what play.py and the explorer ask for

    def parse(self, text: str) -> tuple[int, ...]:
        return tuple(int(word) for word in text.split())

    def solution(self, problem: tuple[int, ...]) -> str:
        return " + ".join(map(str, problem))

    def reachable(self, problem: tuple[int, ...], steps: list[str]) -> bool:
        return all("+" in step for step in steps)
