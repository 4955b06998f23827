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
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import policy as module
from policy import ValueHead, chunked_logprobs, left_pad, load_policy, pick_device

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


def gradients(parameters):
    return [p.grad for p in parameters if p.grad is not None and p.grad.any()]


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
        found = moved.logprobs_and_values(moved.batch(list(prompts), list(completions)), temperature)
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


# ------------------------------------------------------------------------------------------------ one critic


def test_search_and_trainer_see_one_critic(moved):
    """Prevents the post's two critics: V(s_t) in training is what the search's critic says of the same state."""
    with torch.no_grad():
        _, values, _ = moved.logprobs_and_values(moved.batch(PROMPTS, COMPLETIONS))
    assert values.std() > 0.01
    for row, prompt, completion in zip(values, PROMPTS, COMPLETIONS):
        states = [prompt + completion[:t] for t in range(len(completion))]
        assert_close(torch.tensor(moved.values(states)), row[-len(completion) :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("through", [False, True])
def test_the_value_loss_reaches_the_backbone_only_if_asked(moved, through):
    """Prevents a critic that wrecks a small policy, and an option that does nothing."""
    _, values, _ = moved.logprobs_and_values(moved.batch(PROMPTS, COMPLETIONS), value_gradient=through)
    (values**2).sum().backward()
    assert len(gradients(moved.value_head.parameters())) == 8
    assert bool(gradients(moved.lm.parameters())) == through


# ------------------------------------------------------------------------------------------------ reference


@pytest.mark.parametrize("rank", [0, 4])
def test_an_untrained_policy_is_its_reference(checkpoint, rank):
    """Prevents a KL penalty before the first update."""
    policy = load_policy(checkpoint, lora_rank=rank)
    batch = policy.batch(PROMPTS, COMPLETIONS)
    assert_close(policy.logprobs_and_values(batch)[0].detach(), policy.reference_logprobs(batch))


def test_the_reference_stays_the_initial_model(moved, checkpoint):
    """Prevents a KL penalty towards the moving policy, and a policy left without its adapter."""
    batch, base = moved.batch(PROMPTS, COMPLETIONS), AutoModelForCausalLM.from_pretrained(checkpoint)
    before = moved.logprobs_and_values(batch, 0.7)[0]
    reference = moved.reference_logprobs(batch, 0.7)
    assert not reference.requires_grad
    for row, prompt, completion in zip(reference, PROMPTS, COMPLETIONS):
        assert_close(row[-len(completion) :], plain(base, prompt, completion, 0.7)[0], atol=1e-4, rtol=0)
    assert ((before - reference) * batch.completion).abs().max() > 0.01
    assert_close(moved.logprobs_and_values(batch, 0.7)[0], before)


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
    assert policy.logprobs_and_values(policy.batch(PROMPTS, COMPLETIONS))[0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------ text


def test_prompt_ends_where_the_assistant_speaks_and_its_text_is_graded_alone(policy, problems):
    """Prevents a prompt without its turn marker, stop tokens in the graded text and a strict flag that is dropped."""
    assert policy.tokenizer.decode(policy.encode(problems[1])) == "<|user|> Numbers: 2 3 5 10 Target: 25 <|assistant|>"
    completion = policy.tokenizer("<answer> 5 * (2 + 3) </answer> <|end|>")["input_ids"]
    assert policy.grade(problems[1], completion).correct and not policy.grade(problems[0], completion).correct
    negative = policy.tokenizer("<answer> 2 - 3 + 10 </answer>")["input_ids"]
    assert [policy.grade(problems[1], negative, strict).parsed for strict in (True, False)] == [False, True]


@pytest.mark.parametrize(("stops", "expected"), [(None, {1}), (7, {1, 7}), ([7, 9], {1, 7, 9})])
def test_all_stop_tokens_count(policy, stops, expected):
    """Prevents completions of Qwen's instruct models, which have two stop tokens, from running on."""
    policy.lm.generation_config.eos_token_id = stops
    assert policy.stop_ids == expected


# ------------------------------------------------------------------------------------------------ files


def test_saved_policies_load_again_and_in_plain_transformers(moved, checkpoint, tmp_path):
    """Prevents a run whose result can't be used: policy, reference and value head, for us and for others."""
    moved.save(tmp_path)
    batch = moved.batch(PROMPTS, COMPLETIONS)
    rank = 4 if moved.lora else 0
    fresh = load_policy(checkpoint, lora_rank=rank)
    fresh.load_weights(tmp_path)
    for policy in (fresh, load_policy(tmp_path)):
        for found, expected in zip(policy.logprobs_and_values(batch), moved.logprobs_and_values(batch)):
            assert_close(found, expected)
    assert_close(fresh.reference_logprobs(batch), moved.reference_logprobs(batch))
    base = AutoModelForCausalLM.from_pretrained(checkpoint if moved.lora else tmp_path)
    other = PeftModel.from_pretrained(base, tmp_path) if moved.lora else base
    assert_close(other(batch.ids[1:2, -6:]).logits, moved.lm(batch.ids[1:2, -6:]).logits)


def test_foreign_weights_are_refused(policy, tmp_path):
    """Prevents a resume that silently keeps the initial weights."""
    policy.save(tmp_path)
    weights = module.load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    module.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit.*model.norm.weight"):
        policy.load_weights(tmp_path)


@pytest.mark.parametrize("model", ["no/such", "nosuch", "/no/such/folder"])
def test_a_missing_model_is_told_in_one_line(model):
    """Prevents a traceback of transformers where a sentence helps."""
    with pytest.raises(ValueError, match=rf"can't load '{model}': pass a Hugging Face name or a local folder") as error:
        load_policy(model)
    assert "\n" not in str(error.value)


def test_unusable_settings_and_models_are_refused(checkpoint, tmp_path):
    """Prevents bf16 weights under Adam, and a base model without a chat format."""
    with pytest.raises(ValueError, match="float32"):
        load_policy(checkpoint, dtype="bfloat16")
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template: use an instruct model"):
        load_policy(bare)


def test_a_tokenizer_without_a_pad_token_gets_one(checkpoint, tmp_path):
    """Prevents a crash in the first batch of a model such as Llama."""
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    saved = json.loads((bare / "tokenizer_config.json").read_text())
    del saved["pad_token"]
    (bare / "tokenizer_config.json").write_text(json.dumps(saved))
    policy = load_policy(bare)
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == 1


def test_device_auto_is_the_gpu_where_there_is_one(monkeypatch):
    """Prevents a long run on the CPU beside an idle GPU, and a traceback where there is none."""
    for present, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert pick_device("auto") == device and pick_device(device) == device and pick_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device cpu"):
        pick_device("cuda:1")
