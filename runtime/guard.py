"""When a run that has collapsed is stopped, told from its rows of metrics alone.

A learning rate too high, or a reward that can be earned without being right, can destroy a policy in a few steps. The
rest of the budget then buys nothing. Losses that are not finite are refused before they reach the weights (ppo.py).
What goes wrong slowly is seen here.
"""

from dataclasses import dataclass

MAX_KL = 5.0  # nats a token from the reference, above which a step is bad
PATIENCE = 5  # bad steps in a row after which a run is stopped
IDLE = 100  # steps in a row without a lesson for the policy, likewise; committed runs that learn have 11 at most


class Stopped(Exception):
    """Why a run is not worth going on with."""


@dataclass
class Guard:
    """A step is bad if its KL divergence is above `max_kl`, or if less than a fifth of its answers have the format
    although most of an earlier step's had it. `patience` bad steps in a row stop the run.

    So do `idle` steps in a row that teach the policy nothing: no answer was right, or no group had unequal rewards. A
    step whose groups are all right teaches nothing either, but nothing is left to learn there.

    One bad step may be an outlier: the estimate of the divergence is an exponential of the log-ratio. A step that
    taught the policy nothing has no KL. Unless its format is bad, it neither adds to a row of bad steps nor ends it.
    """

    max_kl: float = MAX_KL
    patience: int = PATIENCE
    idle: int = IDLE
    knew_format: bool = False  # most answers of some step had the format
    bad_steps: int = 0  # in a row
    idle_steps: int = 0  # in a row
    all_idle_steps: int = 0
    measured_kl: bool = False  # some step had a KL

    def check(self, row: dict) -> str:
        """Take one step's row of metrics; why the run should stop after it, or nothing."""
        if "trajectories" in row:
            is_idle = not ("policy_loss" in row or row.get("solved"))
            self.idle_steps = self.idle_steps + 1 if is_idle else 0
            self.all_idle_steps += is_idle
        if self.idle_steps >= self.idle:
            return f"{self.idle_steps} steps in a row have taught the policy nothing"
        if "parsed" not in row:  # no answers, or no step
            return ""
        self.knew_format |= row["parsed"] > 0.5
        reasons = []
        if row.get("kl", 0.0) > self.max_kl:
            reasons.append(f"KL {row['kl']:.1f} nats a token, the limit is {self.max_kl:g}")
        if self.knew_format and row["parsed"] < 0.2:
            reasons.append(f"{row['parsed']:.0%} of the answers have the format")
        self.measured_kl |= "kl" in row
        if reasons or "kl" in row or not self.measured_kl:
            self.bad_steps = self.bad_steps + 1 if reasons else 0
        if self.bad_steps < self.patience:
            return ""
        return f"collapsed, {self.bad_steps} bad steps in a row: {'; '.join(reasons)}"
