"""Tests of policy.py on a random model: its log-probabilities, values and gradients are compared with plain calls of
transformers on one unpadded row at a time."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import policy as module
from policy import Policy, ValueHead, chunked_logprobs, left_pad
from runtime.loading import load_policy
from runtime.micro_batches import group_by_length
from runtime.torch_sampler import TorchSampler, read_values
from runtime.weights import load_weights, save_policy
from sampling import SamplingParams

IDS = st.lists(st.integers(0, 284), min_size=1, max_size=12)
PAIRS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4)  # prompts and completions
PROMPTS, COMPLETIONS = [[5, 9, 9, 40, 2], [7], [11, 12, 0]], [[30, 1], [8, 4, 100, 284, 3], [6]]


def plain(lm, prompt, completion, temperature):
    """log pi(a_t | s_t), its entropy and the states' hidden vectors [T, ...] by one call of transformers."""
    with torch.no_grad():
        output = lm(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True)
    steps = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    logprobs = torch.log_softmax(output.logits[0, steps].double() / temperature, -1)
    chosen = logprobs[range(len(completion)), completion]
    return chosen.float(), -(logprobs.exp() * logprobs).sum(-1).float(), output.hidden_states[-1][0, steps]


def forward(policy, batch, temperature=1.0):
    """log pi(a_t | s_t), V(s_t) and the entropy of pi(. | s_t), as the trainer computes them. [B, T] each"""
    hidden, tokens = policy.states(batch)
    logprobs, entropy = policy.logprobs(hidden, tokens, temperature)
    return logprobs, policy.value_head(hidden), entropy


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ value head


def test_value_head_is_the_documented_network():
    """Prevents a critic without LayerNorm, with another width or without tanh."""
    torch.manual_seed(0)
    head, hidden = ValueHead(6), torch.randn(3, 6)
    for parameter in head.parameters():
        parameter.data.normal_()
    scale, shift, w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in head.parameters())
    assert (w1.shape, w2.shape, w3.shape) == ((24, 6), (6, 24), (1, 6))
    x = hidden.numpy()
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * scale + shift
    x = np.maximum(np.maximum(x @ w1.T + b1, 0) @ w2.T + b2, 0) @ w3.T + b3
    assert_close(head(hidden).detach(), torch.tensor(np.tanh(x[:, 0])), atol=1e-5, rtol=0)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 3), max_size=2), st.floats(0, 1e4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_values_are_zero_at_first_and_then_in_range(shape, scale, dtype):
    """Prevents a biased untrained critic, values outside the rewards' range and a value head in bf16."""
    torch.manual_seed(0)
    head, hidden = ValueHead(8), (scale * torch.randn(*shape, 8)).to(dtype)
    assert not head(hidden).any()
    head.layers[-1].weight.data.normal_(std=10)
    values = head(hidden)
    assert values.shape == tuple(shape) and values.dtype == torch.float32 and values.abs().max() <= 1


# ------------------------------------------------------------------------------------------------ forward passes


@given(st.lists(IDS, min_size=1, max_size=5))
def test_left_padding_keeps_every_token_and_masks_the_rest(rows):
    """Prevents tokens lost or masked, a pad token of a row taken for padding, and padding on the right."""
    ids, attention = left_pad(rows, 0)
    assert ids.shape == attention.shape == (len(rows), max(map(len, rows)))
    assert [row[mask == 1].tolist() for row, mask in zip(ids, attention)] == rows
    assert (attention.diff(dim=1) >= 0).all()


@settings(max_examples=15)
@given(PAIRS, st.sampled_from([1.0, 0.7]))
def test_a_padded_batch_equals_plain_calls_of_transformers(moved, pairs, temperature):
    """Prevents log-probabilities, entropies or values that depend on padding, neighbours or chunking, or are shifted
    by one token."""
    prompts, completions = zip(*pairs)
    with torch.no_grad():
        found = forward(moved, moved.batch(list(prompts), list(completions)), temperature)
    for i, (prompt, completion) in enumerate(pairs):
        logprobs, entropy, hidden = plain(moved.lm, prompt, completion, temperature)
        for row, expected in zip(found, (logprobs, moved.value_head(hidden).detach(), entropy), strict=True):
            assert_close(row[i, -len(completion) :], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_change_neither_values_nor_gradients_and_bound_the_rows(monkeypatch, temperature):
    """Prevents a [B, T, V] tensor (out of memory with Qwen's vocabulary) and a chunked backward pass that is wrong."""
    torch.manual_seed(0)
    matrix, targets = torch.randn(50, 8, requires_grad=True), torch.randint(50, (3, 7))
    hidden, rows = torch.randn(3, 7, 8, requires_grad=True), []

    def head(states):
        rows.append(len(states))
        return states @ matrix.T

    monkeypatch.setattr(module, "LOGIT_CHUNK", 4 * 50)
    logprobs, entropy = chunked_logprobs(head, hidden, targets, temperature)
    full = torch.log_softmax(hidden @ matrix.T / temperature, -1)
    expected = full.gather(-1, targets[..., None]).squeeze(-1)
    assert_close(logprobs, expected)
    assert_close(entropy, torch.distributions.Categorical(logits=full).entropy())
    assert not entropy.requires_grad
    weights = torch.randn(3, 7)
    found = torch.autograd.grad((logprobs * weights).sum(), (hidden, matrix))
    assert_close(found, torch.autograd.grad((expected * weights).sum(), (hidden, matrix)))
    assert max(rows) == 4


# ------------------------------------------------------------------------------------------------ checkpointing


@pytest.fixture(params=[0, 4], ids=["full", "lora"])
def twins(request, checkpoint, tmp_path):
    """The same moved policy without and with gradient checkpointing, with dropout in every place that has one."""
    base = shutil.copytree(checkpoint, tmp_path / "base")
    edit(base / "config.json", attention_dropout=0.5)
    torch.manual_seed(2)
    start = load_policy(base, lora_rank=request.param)
    for parameter in start.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_policy(start, tmp_path / "start")
    if request.param:
        edit(tmp_path / "start" / "adapter_config.json", lora_dropout=0.5)
    return [load_policy(tmp_path / "start", gradient_checkpointing=on) for on in (False, True)]


def in_training(policy):
    return [name for name, layer in policy.lm.named_modules() if layer.training]


def test_gradient_checkpointing_changes_memory_and_nothing_else(twins):
    """Prevents other log-probabilities, values or gradients, dropout that training mode would switch on, and an option
    that saves no memory. The layers' saved bytes fall to their inputs."""
    found, saved = [], []
    for policy in twins:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, k=kept: k.update({x.data_ptr(): x.nbytes}) or x, id):
            forward(policy, policy.batch(PROMPTS, COMPLETIONS), 0.7)
        saved.append(sum(kept.values()))
        logprobs, values, entropy = forward(policy, policy.batch(PROMPTS, COMPLETIONS), 0.7)
        loss = (logprobs * torch.arange(1, 6)).sum() + (values**2).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
        assert all(gradient.any() for gradient in gradients.values())
        found.append({"logprobs": logprobs, "values": values, "entropy": entropy, "loss": loss} | gradients)
    assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert saved[1] < saved[0] / 2


def test_gradient_checkpointing_ends_with_the_forward_pass(twins, monkeypatch):
    """Prevents layers left in training mode, where they drop the KV cache: a sampler that draws nonsense. The same
    after an error."""
    plain, checkpointed = twins
    params = SamplingParams(2, 8)
    drawn = [TorchSampler(policy).sample(PROMPTS, [1, 2, 3], params)[0] for policy in twins]
    batch = checkpointed.batch(PROMPTS, COMPLETIONS)
    forward(checkpointed, batch)[0].sum().backward()
    assert in_training(checkpointed) == in_training(plain) == []
    with checkpointed.recomputing():
        layers = [checkpointed.base.get_submodule(f"model.layers.{i}") for i in range(2)]
        assert all(layer.training for layer in layers) and len(in_training(checkpointed)) == 2
    again, _ = TorchSampler(checkpointed).sample(PROMPTS, [1, 2, 3], params)
    tokens = [[[s.tokens for s in row] for row in rows] for rows in (*drawn, again)]
    assert tokens[0] == tokens[1] == tokens[2]
    monkeypatch.setattr(checkpointed, "hidden", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpointed.states(batch)
    assert in_training(checkpointed) == []


# ------------------------------------------------------------------------------------------------ one critic


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 200))
def test_batches_hold_every_index_once_and_fit(lengths, tokens):
    """Prevents a state without a value, a trajectory trained twice, and a batch that does not fit into memory where the
    longest alone does."""
    groups = group_by_length(lengths, tokens)
    assert sorted(sum(groups, [])) == list(range(len(lengths))) and all(groups)
    assert all(len(group) == 1 or max(lengths[i] for i in group) * len(group) <= tokens for group in groups)
    in_order = [lengths[i] for group in groups for i in group]
    assert in_order == sorted(in_order, reverse=True)
    for one in groups[:-1]:  # as few as that allows
        assert lengths[one[0]] * (len(one) + 1) > tokens
    for group in group_by_length(lengths, tokens, padding=0.1):
        area = len(group) * max(lengths[i] for i in group)
        assert area - sum(lengths[i] for i in group) <= 0.1 * area


@pytest.mark.parametrize(("tokens", "shapes"), [(1, 6), (12, 3), (10_000, 1)])
def test_the_critic_reads_in_chunks_and_answers_in_order(moved, monkeypatch, tokens, shapes):
    """Prevents running out of memory on the states of 64 trees, and the value of a neighbour's state."""
    states = [[5], [9, 9, 40, 2], [7, 8], [11, 12, 0, 4, 4, 4], [3, 3, 3, 3], [6]]
    alone = [moved.values([state])[0] for state in states]
    seen, plain = [], moved.hidden
    monkeypatch.setattr(moved, "hidden", lambda ids, *rest, **kw: seen.append(ids.shape) or plain(ids, *rest, **kw))
    monkeypatch.setattr("runtime.torch_sampler.CRITIC_TOKENS", tokens)
    assert_close(read_values(moved, states)[0], alone, atol=1e-5, rtol=0)
    assert len({round(value, 4) for value in alone}) == 6 and read_values(moved, [])[0] == []
    assert len(seen) == shapes and all(len(shape) == 2 and (shape[0] == 1 or shape.numel() <= tokens) for shape in seen)


def test_search_and_trainer_see_one_critic(moved):
    """Prevents the post's two critics: V(s_t) in training is what the search's critic says of the same state."""
    with torch.no_grad():
        values = forward(moved, moved.batch(PROMPTS, COMPLETIONS))[1]
    assert values.std() > 0.01
    for row, prompt, completion in zip(values, PROMPTS, COMPLETIONS):
        states = [prompt + completion[:t] for t in range(len(completion))]
        assert_close(torch.tensor(moved.values(states)), row[-len(completion) :], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ reference


@pytest.mark.parametrize("rank", [0, 4])
def test_an_untrained_policy_is_its_reference(checkpoint, rank):
    """Prevents a KL penalty before the first update."""
    policy = load_policy(checkpoint, lora_rank=rank)
    batch = policy.batch(PROMPTS, COMPLETIONS)
    assert_close(forward(policy, batch)[0].detach(), policy.reference_logprobs(batch))


def test_the_reference_stays_the_initial_model(moved, checkpoint):
    """Prevents a KL penalty towards the moving policy, and a policy left without its adapter."""
    batch, base = moved.batch(PROMPTS, COMPLETIONS), AutoModelForCausalLM.from_pretrained(checkpoint)
    before = forward(moved, batch, 0.7)[0]
    reference = moved.reference_logprobs(batch, 0.7)
    assert not reference.requires_grad
    for row, prompt, completion in zip(reference, PROMPTS, COMPLETIONS):
        assert_close(row[-len(completion) :], plain(base, prompt, completion, 0.7)[0], atol=1e-4, rtol=0)
    assert ((before - reference) * batch.completion).abs().max() > 0.01
    assert_close(forward(moved, batch, 0.7)[0], before)


@pytest.mark.parametrize(("rank", "dtype"), [(0, "float32"), (4, "float32"), (4, "bfloat16")])
def test_what_is_trained_is_in_fp32(checkpoint, rank, dtype):
    """Prevents updates that round to nothing in bf16, a trained base under LoRA and a trained reference."""
    policy = load_policy(checkpoint, lora_rank=rank, dtype=dtype)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not any(name.startswith("reference") for name in trained)
    in_model = [name for name in trained if not name.startswith("value_head")]
    assert in_model and all("lora_" in name for name in in_model) == bool(rank)
    frozen = {p.dtype for p in policy.lm.parameters() if not p.requires_grad}
    assert frozen == ({getattr(torch, dtype)} if rank else set())
    assert {x.dtype for x in forward(policy, policy.batch(PROMPTS, COMPLETIONS))} == {torch.float32}


# ------------------------------------------------------------------------------------------------ text


def test_prompt_ends_where_the_assistant_speaks_and_its_text_is_graded_alone(policy, problems):
    """Prevents a prompt without its turn marker, a stop token in the graded text, other special ones left out of it,
    and answers that are graded by other rules than the prompt's."""
    assert policy.tokenizer.decode(policy.encode(problems[1])) == "<|user|> Numbers: 2 3 5 10 Target: 25 <|assistant|>"
    completion = policy.tokenizer("<answer> 5 * (2 + 3) </answer> <|end|>")["input_ids"]
    assert policy.grade(problems[1], completion).correct and not policy.grade(problems[0], completion).correct
    for said in ("<|unknown|>", "<|user|>", "<|end|>"):  # no part of an answer
        broken = policy.tokenizer(f"<answer> 5 * (2 {said} + 3) </answer> <|end|>")["input_ids"]
        assert not policy.grade(problems[1], broken).parsed
    negative = policy.tokenizer("<answer> 2 - 3 + 10 </answer>")["input_ids"]
    assert not policy.grade(problems[1], negative).parsed  # a step below zero breaks them


@pytest.mark.parametrize(("stops", "expected"), [(None, {1}), (7, {1, 7}), ([7, 9], {1, 7, 9})])
def test_all_stop_tokens_count(policy, stops, expected):
    """Prevents completions of Qwen's instruct models, which have two stop tokens, from running on."""
    policy.lm.generation_config.eos_token_id = stops
    assert Policy(policy.lm, policy.chat, lora=False, train=False).stop_ids == expected


# ------------------------------------------------------------------------------------------------ files


def test_saved_policies_load_again_and_in_plain_transformers(moved, checkpoint, tmp_path):
    """Prevents a run whose result can't be used: policy, reference and value head, for us and for others."""
    save_policy(moved, tmp_path)
    batch = moved.batch(PROMPTS, COMPLETIONS)
    rank = 4 if moved.lora else 0
    fresh = load_policy(checkpoint, lora_rank=rank)
    load_weights(fresh, tmp_path)
    for policy in (fresh, load_policy(tmp_path)):
        for found, expected in zip(forward(policy, batch), forward(moved, batch)):
            assert_close(found, expected)
    assert_close(fresh.reference_logprobs(batch), moved.reference_logprobs(batch))
    base = AutoModelForCausalLM.from_pretrained(checkpoint if moved.lora else tmp_path)
    other = PeftModel.from_pretrained(base, tmp_path) if moved.lora else base
    assert_close(other(batch.ids[1:2, -6:]).logits, moved.lm(batch.ids[1:2, -6:]).logits)


def test_foreign_weights_are_refused(policy, tmp_path):
    """Prevents a resume that silently keeps the initial weights."""
    save_policy(policy, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit.*model.norm.weight"):
        load_weights(policy, tmp_path)


def test_saving_an_adapter_asks_nobody(moved, tmp_path, monkeypatch):
    """Prevents PEFT's look at the hub for a changed vocabulary: minutes of retries in every checkpoint without network,
    and a request that nobody asked for with one."""
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *asked: pytest.fail(f"asks for {asked}"))
    if moved.lora:
        moved.lm.peft_config["default"].base_model_name_or_path = "no/such"
    save_policy(moved, tmp_path)
    names = {"value_head/weights.safetensors", "adapter_model.safetensors" if moved.lora else "model.safetensors"}
    assert all((tmp_path / name).exists() for name in names)
