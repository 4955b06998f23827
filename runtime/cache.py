"""Keys and values of the tokens that a sampler has read: what its attention looks back at.

    Rows    the sequences of one call, a buffer a layer, written in place; rows that end make room
    Pool    what is kept between calls, a slot a token: a step of a tree search inherits the states of all tokens before
            it and none is ever run again (vLLM's paged attention, Kwon et al. 2023, with blocks of one token)

grouped_attention looks back at them. Rows and Pool take a model's shapes from its first pass, so any decoder will do in
which each layer is attention, with sliding windows too (they are kept whole: transformers masks them). Layers that
remember in another way, as Mamba's, linear attention or convolutions do, are refused by loading.py.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 8  # columns that buffers grow by
GROUPED = "grouped"  # transformers' name for the attention below


class Layer(DynamicLayer):
    """One layer's keys and values of the first `length` columns, buffers [rows, heads, room, dim] with little room to
    spare: a gap of a kilobyte between rows halves a CPU's memory bandwidth."""

    def __init__(self, length: int = 0):
        super().__init__()
        self.length = length
        self.buffers: list[Tensor] = []
        self.most = 0  # rows that there may be later

    def hold(self, rows: int, states: Sequence[Tensor]) -> list[Tensor]:
        """Make buffers for `rows` rows, shaped and typed like keys and values [..., heads, _, dim]; returns the filled
        part [rows, heads, length, dim] of each."""
        room = -(-(self.length + 1) // BLOCK) * BLOCK
        self.buffers = [s.new_empty(rows, s.shape[-3], room, s.shape[-1]) for s in states]
        self.is_initialized = True
        return [buffer[:, :, : self.length] for buffer in self.buffers]

    def update(self, keys, values, *args, **kwargs):
        """Append keys and values [rows, heads, tokens, dim]; returns those of all columns."""
        start, self.length = self.length, self.length + keys.shape[2]
        if not self.buffers or self.length > self.buffers[0].shape[2]:
            old = [buffer[: len(keys), :, :start] for buffer in self.buffers]
            for source, target in zip(old, self.hold(max(len(keys), self.most), (keys, values))):
                target[: len(keys), :, :start] = source
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[: len(new), :, start : self.length] = new
        self.keys, self.values = (buffer[: len(keys), :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class Rows(Cache):
    """The sequences of a batch."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=Layer)

    def move(self, source: Tensor, target: Tensor, most: int) -> None:
        """Copy the rows `source` [m] over the rows `target` [m], of which there will be at most `most` from now on."""
        if not len(source) and most == self.layers[0].most:
            return
        for layer in self.layers:
            if most > len(layer.buffers[0]):
                for old, new in zip(layer.buffers, layer.hold(most, layer.buffers)):
                    new[: len(old)] = old[:, :, : layer.length]
            layer.most = most
            for buffer in layer.buffers:
                buffer[target, :, : layer.length] = buffer[source, :, : layer.length]


class Pool:
    """Keys and values of at most `size` tokens, and which sequences they belong to."""

    def __init__(self, size: int):
        self.size = size
        self.forget()

    def forget(self) -> None:
        """Start empty; the memory is given back."""
        self.slots: dict[tuple[int, ...], np.ndarray] = {(): np.empty(0, int)}  # of each token of a known sequence
        self.layers: list[list[Tensor]] = []  # keys and values [size, heads, dim] of a layer
        self.used, self.full = 0, False

    def find(self, sequence: list[int]) -> np.ndarray:
        """The slots of all tokens but the last, which must be run for what follows it; none if they aren't known."""
        return self.slots.get(tuple(sequence[:-1]), self.slots[()])

    def load(self, slots: np.ndarray) -> Rows:
        """Rows that hold the tokens in `slots` [rows, columns]."""
        rows, index = Rows(), torch.from_numpy(slots)
        for kept in self.layers if index.shape[1] else []:
            layer = Layer(index.shape[1])
            for states, target in zip(kept, layer.hold(len(index), [states.transpose(0, 1) for states in kept])):
                target[:] = states[index.to(states.device)].transpose(1, 2)
            rows.layers.append(layer)
        return rows

    def keep(self, rows: Rows, held: dict[int, tuple[list[int], int]]) -> None:
        """Keep what some rows hold: `held[row]` is a sequence, whose last token is in the last column, and how many of
        its first tokens are known already. Where that is too much, nothing more is kept before all is forgotten."""
        fresh = {tuple(tokens): row for row, (tokens, _) in held.items() if tuple(tokens) not in self.slots}
        held = {row: held[row] for row in fresh.values()}  # identical siblings once
        end = rows.get_seq_length()
        row = torch.tensor([row for row, (tokens, known) in held.items() for _ in tokens[known:]], dtype=torch.long)
        column = torch.tensor([end - i for tokens, known in held.values() for i in range(len(tokens) - known, 0, -1)])
        self.full = self.full or self.used + len(row) > self.size
        if self.full:
            return
        if not self.layers:
            buffers = [layer.buffers for layer in rows.layers]
            self.layers = [[b.new_empty(self.size, b.shape[1], b.shape[3]) for b in pair] for pair in buffers]
        if len(row):
            for kept, layer in zip(self.layers, rows.layers):
                for states, buffer in zip(kept, layer.buffers):
                    states[self.used : self.used + len(row)] = buffer[row, :, column]
        for tokens, known in held.values():
            new = np.arange(self.used, self.used + len(tokens) - known)
            self.slots[tuple(tokens)] = np.concatenate([self.slots[tuple(tokens[:known])], new])
            self.used += len(new)


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' sdpa attention, but for one new token a row: the query heads [K * G] that share the K keys and
    values stand as G rows of one product, where transformers copies keys and values for every head."""
    masked = attention_mask is not None and attention_mask.shape[1] > 1  # head by head
    if query.shape[2] > 1 or masked or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    rows = query.squeeze(2).unflatten(1, (key.shape[1], -1))  # [B, K, G, dim]
    out = scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.flatten(1, 2)[:, None], None  # [B, 1, K * G, dim]


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
