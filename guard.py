"""The guard: when a run that has collapsed is stopped, told from its rows of metrics alone.

A policy can be lost in a few steps, to a learning rate too high or to a reward that it has learnt to cheat, and the
rest of the budget then buys nothing. What is not finite is refused before it reaches the weights (learner.py); what
has gone wrong slowly is seen here. `identical` and `wrong_reward` in metrics.jsonl are for the reader's eye: a policy
that repeats itself, or earns reward without being right.
"""

from dataclasses import dataclass


@dataclass
class Guard:
    """A step is bad if the KL divergence from the reference is above `max_kl` nats a token, or if less than a fifth of
    its answers have the format although most of an earlier step's had it. `patience` bad steps in a row stop the run:
    one alone may be an outlier, the estimate of the divergence being an exponential of the log-ratio. A step that
    taught the policy nothing has no KL: unless its format is bad, it neither adds to a row of bad steps nor ends it."""

    max_kl: float
    patience: int
    knew: bool = False  # most answers of some step had the format
    bad: int = 0  # steps in a row
    measured: bool = False  # some step had a KL

    def check(self, row: dict) -> str:
        """Take one step's row of metrics; why the run should stop after it, or nothing."""
        if "parsed" not in row:  # no trajectories, or no step
            return ""
        self.knew |= row["parsed"] > 0.5
        reasons = []
        if row.get("kl", 0.0) > self.max_kl:
            reasons.append(f"KL {row['kl']:.1f} nats a token, --max-kl {self.max_kl:g}")
        if self.knew and row["parsed"] < 0.2:
            reasons.append(f"{row['parsed']:.0%} of the answers have the format")
        self.measured |= "kl" in row
        if reasons or "kl" in row or not self.measured:
            self.bad = self.bad + 1 if reasons else 0
        if self.bad < self.patience:
            return ""
        return f"collapsed, {self.bad} bad steps in a row: {'; '.join(reasons)}"
