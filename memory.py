"""GPU memory, told before anything is loaded."""

from dataclasses import dataclass

from config import Config


@dataclass(frozen=True)
class Plan:
    context: int
    micro_tokens: int
    rows: int
    cache_gb: float


def plan(config: Config, device: str) -> Plan:
    return Plan(2048, config.micro_batch_tokens, 1024, 1.0)
