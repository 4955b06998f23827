"""Keys and values of the tokens that a model has read, for the attention of the tokens that follow.

    KVCache      the sequences of one call, one in each row; a buffer a layer, written in place
    Pool         tokens that stay between calls, one in each slot: a search runs no token twice (the prefix caching of
                 vLLM's paged attention, Kwon et al. 2023, with blocks of one token)
    merge_rows   which samples of a call share a row

Cache and pool take their shapes from the model's first pass, so they serve any decoder whose layers are all attention.
Of a layer with a sliding window they hold all tokens, and transformers masks the older ones. Layers that remember in
another way, such as Mamba's, linear attention or convolutions, are refused by loading.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


class LayerCache(DynamicLayer):
    """Keys and values of one layer: two buffers [rows, heads, columns, dim], whose first `length` columns are filled.

    Buffers have few spare columns: a gap of a kilobyte between rows halves a CPU's memory bandwidth.
    """

    def __init__(self, length: int = 0):
        super().__init__()
        self.length = length
        self.buffers: list[Tensor] = []
        self.capacity = 0  # rows that new buffers have at least

    def allocate(self, rows: int, states: Sequence[Tensor]) -> list[Tensor]:
        """Make buffers of `rows` rows for keys and values like `states` [..., heads, _, dim]. Returns of each buffer
        the columns that the caller must fill. [rows, heads, length, dim]"""
        blocks = self.length // BLOCK + 1
        self.buffers = [s.new_empty(rows, s.shape[-3], blocks * BLOCK, s.shape[-1]) for s in states]
        self.is_initialized = True
        return [buffer[:, :, : self.length] for buffer in self.buffers]

    def update(self, keys, values, *args, **kwargs):
        """Append keys and values [rows, heads, tokens, dim]. Returns those of all columns."""
        rows, start = len(keys), self.length
        self.length += keys.shape[2]
        if not self.buffers or self.length > self.buffers[0].shape[2]:
            old = [buffer[:rows, :, :start] for buffer in self.buffers]
            new = self.allocate(max(rows, self.capacity), (keys, values))
            for source, target in zip(old, new):
                target[:rows, :, :start] = source
        for buffer, states in zip(self.buffers, (keys, values)):
            buffer[:rows, :, start : self.length] = states
        self.keys, self.values = (buffer[:rows, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class KVCache(Cache):
    """Keys and values of the sequences of one call, in all layers."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=LayerCache)

    def reorder(self, source: Tensor, capacity: int) -> None:
        """Let row i hold what row source[i] holds, for r rows. There will never be more than `capacity` rows later."""
        moved = (source != torch.arange(len(source), device=source.device)).nonzero().flatten()  # [m]
        if not len(moved) and capacity == self.layers[0].capacity:
            return
        source = source[moved]
        for layer in self.layers:
            layer.capacity = capacity
            if capacity > len(layer.buffers[0]):
                old = layer.buffers
                for states, new in zip(old, layer.allocate(capacity, old)):
                    new[: len(states)] = states[:, :, : layer.length]
            for buffer in layer.buffers:
                buffer[moved, :, : layer.length] = buffer[source, :, : layer.length]


@dataclass
class Entry:
    """A sequence to keep. A row of the cache holds it, with its last token in the last column."""

    tokens: list[int]
    row: int
    known: int  # how many of its first tokens the pool has already


class Pool:
    """Keys and values of at most `size` tokens, and the sequences that they belong to."""

    def __init__(self, size: int):
        self.size = size
        self.forget()

    def forget(self) -> None:
        """Start empty, and free the memory."""
        self.slots: dict[tuple[int, ...], np.ndarray] = {(): np.empty(0, int)}  # sequence -> the slot of each token
        self.layers: list[list[Tensor]] = []  # keys and values [size, heads, dim] of each layer
        self.used = 0  # slots
        self.full = False  # a sequence did not fit; until `forget` nothing more is kept

    def find(self, sequence: list[int]) -> np.ndarray:
        """The slots of all tokens but the last; empty if they are not known. The last token is run in any case, for the
        hidden state that the next token is drawn from."""
        return self.slots.get(tuple(sequence[:-1]), self.slots[()])

    def load(self, slots: np.ndarray) -> KVCache:
        """A cache that holds the tokens in `slots` [rows, columns]."""
        cache = KVCache()
        rows, columns = slots.shape
        if not columns:
            return cache
        index = torch.from_numpy(slots)
        for kept in self.layers:
            layer = LayerCache(columns)
            shapes = [states.transpose(0, 1) for states in kept]  # [heads, size, dim]
            for states, target in zip(kept, layer.allocate(rows, shapes)):
                target[:] = states[index.to(states.device)].transpose(1, 2)  # [rows, heads, columns, dim]
            cache.layers.append(layer)
        return cache

    def keep(self, cache: KVCache, entries: list[Entry]) -> None:
        """Keep the entries' tokens that are not known yet, or nothing if they do not all fit."""
        fresh = {tuple(e.tokens): e for e in entries if tuple(e.tokens) not in self.slots}  # identical siblings once
        added = sum(len(e.tokens) - e.known for e in fresh.values())
        if self.used + added > self.size:
            self.full = True
        if self.full:
            return
        rows, columns = [], []  # [added] each: where in the cache the tokens are
        end, start = cache.get_seq_length(), self.used
        for sequence, entry in fresh.items():
            count = len(sequence) - entry.known
            rows += [entry.row] * count
            columns += range(end - count, end)
            new = np.arange(self.used, self.used + count)
            self.slots[sequence] = np.concatenate([self.slots[sequence[: entry.known]], new])
            self.used += count
        self.copy(cache, rows, columns, start)

    def copy(self, cache: KVCache, rows: list[int], columns: list[int], start: int) -> None:
        """Copy the cache's tokens at (row, column) to the slots from `start` on."""
        if not self.layers:
            buffers = [layer.buffers for layer in cache.layers]
            self.layers = [[b.new_empty(self.size, b.shape[1], b.shape[3]) for b in pair] for pair in buffers]
        if not rows:
            return
        rows, columns = torch.tensor(rows), torch.tensor(columns)
        for kept, layer in zip(self.layers, cache.layers):
            for states, buffer in zip(kept, layer.buffers):
                states[start : start + len(rows)] = buffer[rows, :, columns]


def merge_rows(row: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give one new row to all samples that were in the same old row and have drawn the same token.

    `row` and `token` [s] are the old row and the token of each sample. Returns the old row that each new row goes on
    from [r], the token of each new row [r], and the new row of each sample [s]. New rows are 0 ... r - 1. The first one
    that goes on from an old row stays there if it can; the others fill the free places.
    """
    vocabulary = int(token.max()) + 1
    pairs, index = torch.unique(row * vocabulary + token, return_inverse=True)  # [r] sorted by row, [s]
    parent, ids = pairs // vocabulary, pairs % vocabulary  # [r]
    stays = parent < len(pairs)  # [r]
    stays[1:] &= parent[1:] != parent[:-1]  # the first that goes on from each old row
    free = torch.ones_like(stays)  # [r]
    free[parent[stays]] = False
    place = parent.clone()  # [r]
    place[~stays] = free.nonzero().flatten()
    source = torch.empty_like(parent).scatter_(0, place, parent)
    ids = torch.empty_like(parent).scatter_(0, place, ids)
    return source, ids, place[index]


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """The sdpa attention of transformers, faster for one new token a row.

    G query heads share each of the K heads of keys and values. Here they are G rows of one product; transformers would
    copy keys and values for every query head.
    """
    masked_by_head = attention_mask is not None and attention_mask.shape[1] > 1
    if query.shape[2] > 1 or masked_by_head or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))  # [B, K, G, dim]
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.flatten(1, 2)[:, None], None  # [B, 1, K * G, dim]


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
