"""The policy: a causal language model, its value head and its chat (tokenizer and task).

One base model has three roles. With its adapter on (or with its trained weights) it is the policy pi. With the adapter
off it is the frozen reference of the KL penalty. The value head reads the same final hidden states and is the critic,
of the search and of the trainer. Trainable weights are fp32. Frozen weights are fp32, bf16 or, under LoRA, 4-bit NF4
(QLoRA, Dettmers et al. 2023). Logits are computed in chunks: [B, T, V] never exists.

Where this differs from the post: one critic with one normalisation (the post's training had a LayerNorm that its search
left out), fp32 trainable weights where the post has bf16, and the value loss does not train the backbone by default.
"""

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from sampling import Problem, Reward

# largest [rows, V] in memory; with smaller chunks the head's gradient is added up more often
LOGIT_CHUNK = 2**24


class ValueHead(nn.Module):
    """V(s) in [-1, 1] from the final hidden state of the state's last token: LayerNorm, then an MLP h -> 4h -> h -> 1
    with ReLU and a tanh at the end (the post). The last layer starts at zero, so an untrained critic says 0."""

    def __init__(self, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 4 * hidden),
            nn.ReLU(),
            nn.Linear(4 * hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.layers(hidden.float())).squeeze(-1)  # [...]


@dataclass
class Batch:
    """Left-padded sequences of prompt and completion, the completion at the right end. All tensors on one device."""

    ids: Tensor  # [B, L] prompt and completion
    attention: Tensor  # [B, L] 1 on tokens
    completion: Tensor  # [B, T] 1 on the completion's tokens, at the right end of ids


def left_pad(rows: list[list[int]], pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids [B, L] padded on the left, and the attention mask [B, L]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    attention = (torch.arange(width) >= (width - lengths)[:, None]).long()
    return ids.to(device), attention.to(device)


class Policy(nn.Module):
    """A causal LM with a value head. `version` counts the updates that its weights have seen."""

    def __init__(self, lm: nn.Module, chat, lora: bool, train: bool = True):
        """`lm` is a transformers model, wrapped by PEFT if `lora`. `chat` turns problems into token ids, and token ids
        into rewards (`runtime.chat.Chat`). Without `train` there is no reference copy."""
        super().__init__()
        self.lm = lm
        self.chat = chat
        self.tokenizer = chat.tokenizer
        self.lora = lora
        self.value_head = ValueHead(lm.config.hidden_size)
        self.reference = copy.deepcopy(lm).requires_grad_(False) if train and not lora else None
        self.version = 0
        self.value_head.to(lm.device)
        self.stop_ids = chat.stop_ids(self.base.generation_config.eos_token_id)  # the tokens that end a completion
        # nothing else of it is read here, and transformers does not save every one that it loads
        pad = self.tokenizer.pad_token_id
        self.base.generation_config = GenerationConfig(eos_token_id=[*self.stop_ids], pad_token_id=pad)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def base(self) -> nn.Module:
        """The transformers model inside, without PEFT's wrapping; an adapter still acts in its layers."""
        return self.lm.get_base_model() if self.lora else self.lm

    def encode(self, problem: Problem) -> list[int]:
        """The prompt's token ids, up to where the assistant speaks."""
        return self.chat.encode(problem)

    def decode(self, completion: list[int]) -> str:
        """The text without the token that ends it; other special tokens stay."""
        ended = completion[-1:] and completion[-1] in self.stop_ids
        return self.tokenizer.decode(completion[:-1] if ended else completion)

    def grade(self, problem: Problem, completion: list[int], exact: bool = False) -> Reward:
        """The task's reward of a completion, given as token ids; with `exact` a near miss earns nothing."""
        reward = self.chat.task.grade(problem, self.decode(completion))
        return reward.exact() if exact else reward

    # -------------------------------------------------------------------------------------------- forward passes

    def hidden(self, ids: Tensor, attention: Tensor, **cache):
        """The backbone's output, hidden states [B, L, H] first; positions follow the attention mask."""
        positions = (attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # [B, L]
        return self.base.model(input_ids=ids, attention_mask=attention, position_ids=positions, **cache)

    @contextmanager
    def recomputing(self):
        """Gradient checkpointing, if the model was loaded so: inside, layers keep their inputs only. `train()` would
        switch on dropout too."""
        layers = [layer for layer in self.lm.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    @contextmanager
    def as_reference(self):
        """Inside, `self.lm` is the reference: under LoRA the model with its adapter off, else the frozen copy."""
        trained = self.lm
        try:
            self.lm = trained if self.lora else self.reference
            with trained.disable_adapter() if self.lora else nullcontext():
                yield
        finally:
            self.lm = trained

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in fp32 from hidden states [..., H]."""
        return self.lm.get_output_embeddings()(hidden).float()

    @torch.no_grad()
    def values(self, states: list[list[int]]) -> list[float]:
        """The critic's V(s) in [-1, 1] of each state, a token sequence, read at its last token."""
        ids, attention = left_pad(states, self.tokenizer.pad_token_id, self.device)
        hidden = self.hidden(ids, attention, use_cache=False).last_hidden_state[:, -1]  # [B, H]
        return self.value_head(hidden).tolist()

    def batch(self, prompts: list[list[int]], completions: list[list[int]]) -> Batch:
        rows = [p + c for p, c in zip(prompts, completions, strict=True)]
        ids, attention = left_pad(rows, self.tokenizer.pad_token_id, self.device)
        lengths = torch.tensor([len(c) for c in completions], device=self.device)
        width = int(lengths.max())
        completion = (torch.arange(width, device=self.device) >= (width - lengths)[:, None]).float()  # [B, T]
        return Batch(ids, attention, completion)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The hidden states s_t [B, T, H] of a batch's completions, and the tokens a_t [B, T] that followed them."""
        width = batch.completion.shape[1]
        with self.recomputing() if torch.is_grad_enabled() else nullcontext():
            hidden = self.hidden(batch.ids, batch.attention, use_cache=False).last_hidden_state
        return hidden[:, -width - 1 : -1], batch.ids[:, -width:]

    def logprobs(self, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """log pi(a_t | s_t) at `temperature`, and the entropy of pi(. | s_t) without gradient. [B, T] each"""
        return chunked_logprobs(self.head, hidden, tokens, temperature)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """log pi_ref(a_t | s_t) of the frozen initial model. [B, T]"""
        with self.as_reference():
            return self.logprobs(*self.states(batch), temperature)[0]


def chunked_logprobs(head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(head(hidden) / temperature) at `targets` and the entropy, each [B, T], for hidden [B, T, H].

    Rows go through the head a chunk at a time, and the backward pass recomputes a chunk instead of keeping it, so
    that [B, T, V] never exists (Qwen2.5: V = 151,936).
    """

    def chunk(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(head(states) / temperature, -1)  # [rows, V]
        chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)  # [rows]
        with torch.no_grad():  # last: the backward pass recomputes no further than it needs
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return chosen, entropy

    states, tokens = hidden.flatten(0, 1), targets.flatten()  # [B T, H], [B T]
    vocabulary = head(states[:1]).shape[-1]
    size = max(1, LOGIT_CHUNK // vocabulary)
    pieces = [
        checkpoint(chunk, s, t, use_reentrant=False) if torch.is_grad_enabled() and len(states) > size else chunk(s, t)
        for s, t in zip(states.split(size), tokens.split(size), strict=True)
    ]
    return tuple(torch.cat(parts).view_as(targets) for parts in zip(*pieces, strict=True))
