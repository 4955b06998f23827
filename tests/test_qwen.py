"""The proof on a thin Qwen2.5 (benchmarks/random_qwen.py): byte-level BPE, padded vocabulary, two stop tokens, grouped
queries. The whole loop in fp32, bf16 and 4 bits, held against plain transformers and PEFT."""

import json
import math

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import policy as module
from config import Config, LearningConfig, MachineConfig, TreeConfig
from ppo import collect_mcts, make_optimizer, train, update
from runtime import session, torch_sampler
from runtime.cli import parse
from runtime.loading import keep_packing, load_policy
from runtime.run_folder import read_metrics
from runtime.torch_sampler import TorchSampler
from sampling import SamplingParams, complete

TIMES = {"seconds", "tokens_per_second", "sampler_seconds", "critic_seconds", "update_seconds", "cpu_seconds"}
KINDS = {
    "full-fp32": dict(),
    "lora-fp32": dict(lora_rank=4),
    "lora-bf16": dict(lora_rank=4, dtype="bfloat16"),
    "lora-nf4": dict(
        lora_rank=4, dtype="bfloat16", quantize="nf4", optimizer="paged-adamw8bit", gradient_checkpointing=True
    ),
}


@pytest.fixture
def qwen_config(qwen, tmp_path):
    """Configurations of runs of two steps of search; a kind of KINDS, and any setting by its name."""

    def make(kind, **changes):
        small = dict(
            model=str(qwen), out=tmp_path / "run", device="cpu", train_problems=20, tokens=0, steps=2, problems=3,
            max_tokens=24, warmup=0, evaluations=1, eval_problems=1, eval_samples=1, test_problems=1, test_samples=1,
            learning_rate=1e-3, failures=True,
        )  # fmt: skip
        tree = TreeConfig(simulations=6, children=2, step_tokens=12)
        return Config(tree=tree).change(**(small | KINDS[kind] | changes))

    return make


def load(kind, folder, **changes):
    return load_policy(folder, **{key: KINDS[kind][key] for key in KINDS[kind] if key != "optimizer"} | changes)


def base_model(kind, folder):
    """What transformers alone makes of the folder, in the kind's precision."""
    dtype = getattr(torch, KINDS[kind].get("dtype", "float32"))
    options = {}
    if KINDS[kind].get("quantize") == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    keep_packing(lm)
    return lm


def examples(policy, problems):
    """Prompts, and completions of a few steps with every kind of token in them."""
    games = ["<step> 2 + 3 = 5 </step>\n<answer> 2 + 3 </answer>", "<step>10 * 5</step>", "seven", "<answer>"]
    return [policy.encode(p) for p in problems], [policy.tokenizer(game)["input_ids"] for game in games]


@torch.no_grad()
def policy_logprobs(policy, prompts, completions, reference=False):
    """A row at a time, so that no padding and no other shape changes how bf16 rounds."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        batch = policy.batch([prompt], [completion])
        logprobs = policy.reference_logprobs(batch) if reference else policy.logprobs(*policy.states(batch), 1.0)[0]
        found.append(logprobs)
    return torch.cat(found, 1)[0]


@torch.no_grad()
def plain_logprobs(lm, prompts, completions):
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = lm(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        found.append(torch.log_softmax(logits, -1)[range(len(completion)), completion])
    return torch.cat(found)


def moved_policy(kind, folder, by=0.05):
    torch.manual_seed(1)
    policy = load(kind, folder)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn_like(parameter)
    return policy


# ------------------------------------------------------------------------------------------------ the whole loop


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_loop_trains_what_it_should_and_its_policy_loads_anywhere(
    qwen_config, qwen, problems, monkeypatch, kind
):
    """Prevents a setting that runs on the embedded model alone: losses that are not finite, an adapter or a value head
    that stays, frozen weights that move, a sampler that disagrees with the trainer, a result that can't be used."""
    kept = []

    def loads(*args, **options):
        policy = load_policy(*args, **options)
        kept.append((policy, {name: p.detach().clone() for name, p in policy.named_parameters()}))
        return policy

    monkeypatch.setattr(session, "load_policy", loads)
    config = qwen_config(kind)
    train(config, collect_mcts)
    ((policy, before),) = kept
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert moved == trained and policy.version == 2
    assert any(name.startswith("value_head") for name in moved)
    assert all("lora_" in name or name.startswith("value_head") for name in moved) == policy.lora

    rows = [row for row in read_metrics(config.folder) if row.get("trajectories")]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        names = ("policy_loss", "value_loss", "kl", "entropy", "ratio", "gradient_norm", "disagreement_max")
        assert all(math.isfinite(row[name]) for name in names) and row["gradient_norm"] > 0
        assert row["disagreement_mean"] < (1e-4 if config.machine.dtype == "float32" else 0.02)  # 1e-6, 1e-3
        assert row["tree_answers"] > 0 and row["valued"] == 0  # the sampler has read them

    folder, (prompts, completions) = config.folder / "policy", examples(policy, problems)
    expected = policy_logprobs(policy, prompts, completions)
    assert_close(policy_logprobs(load(kind, folder), prompts, completions), expected)
    lm = base_model(kind, qwen if policy.lora else folder)
    lm = PeftModel.from_pretrained(lm, folder).eval() if policy.lora else lm
    assert_close(plain_logprobs(lm, prompts, completions), expected, atol=1e-4, rtol=0)


def test_a_resumed_run_in_4_bits_ends_like_an_uninterrupted_one(qwen_config, tmp_path):
    """Prevents a resume that loses 8-bit optimiser state, the adapter or the value head over a quantised base."""
    settings = dict(evaluations=2)
    train(qwen_config("lora-nf4", out=tmp_path / "a", **settings), collect_mcts)

    def interrupted(*args):
        if len(read_metrics(tmp_path / "b")) == 2:
            raise KeyboardInterrupt
        return collect_mcts(*args)

    with pytest.raises(KeyboardInterrupt):
        train(qwen_config("lora-nf4", out=tmp_path / "b", **settings), interrupted)
    assert json.loads((tmp_path / "b" / "checkpoint" / "state.json").read_text(encoding="utf-8"))["step"] == 1
    config, resume = parse(["--resume", str(tmp_path / "b")], "mcts")
    train(config, collect_mcts, resume)
    histories, weights = [], []
    for run in (tmp_path / "a", tmp_path / "b"):
        histories.append([{key: row[key] for key in row.keys() - TIMES} for row in read_metrics(run)])
        names = ("adapter_model.safetensors", "value_head/weights.safetensors")
        weights.append([load_file(run / "policy" / name) for name in names])
    assert histories[0] == histories[1]
    assert_close(weights[0], weights[1], atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------ adapter and base


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_base_models_own_word(qwen, problems, kind):
    """Prevents a KL penalty towards something else than the model that was loaded, quantised as it is."""
    policy = moved_policy(kind, qwen)
    prompts, completions = examples(policy, problems)
    expected = plain_logprobs(base_model(kind, qwen), prompts, completions)
    assert_close(policy_logprobs(policy, prompts, completions, reference=True), expected, atol=1e-4, rtol=0)
    assert (policy_logprobs(policy, prompts, completions) - expected).abs().mean() > 0.01


@pytest.mark.parametrize(("kind", "tolerance"), [("lora-fp32", 1e-4), ("lora-nf4", 0.5)])
def test_a_merged_adapter_is_the_policy(qwen, problems, kind, tolerance):
    """Prevents an adapter whose scale or place differs between training and what is published. Merged into a 4-bit base
    it is rounded to 4 bits with it, an error of a sixth of what the adapter does here."""
    policy = moved_policy(kind, qwen, by=0.1)
    prompts, completions = examples(policy, problems)
    expected = policy_logprobs(policy, prompts, completions)
    moved = (policy_logprobs(policy, prompts, completions, reference=True) - expected).abs().mean()
    merged = plain_logprobs(policy.lm.merge_and_unload(), prompts, completions)
    assert moved > 0.1 and (merged - expected).abs().mean() < tolerance * moved


def test_gradients_flow_through_4_bit_layers_that_have_sampled(qwen):
    """Prevents an adapter that is trained on part of its gradient: on CPUs with bf16, bitsandbytes' kernel for passes
    without gradients has no backward pass, and stays in place."""
    policy = load("lora-nf4", qwen)
    policy.values([[1, 2, 3]])
    layer = next(m for name, m in policy.base.named_modules() if name.endswith("o_proj.base_layer"))
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(3, weight.shape[1], dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert_close(x.grad, weight.sum(0).expand_as(x), atol=0.05, rtol=0.05)


# ------------------------------------------------------------------------------------------------ vocabulary


def test_tokens_beyond_the_tokenizer_do_no_harm(qwen, problems, monkeypatch):
    """Prevents a crash in hour five, when one of the padded vocabulary's nameless tokens is drawn."""
    policy = load_policy(qwen, lora_rank=4)
    named, size = len(policy.tokenizer), policy.lm.config.vocab_size
    assert named < size
    plain, bonus = policy.head, torch.zeros(size)
    bonus[named:] = 20.0
    monkeypatch.setattr(policy, "head", lambda hidden, **options: plain(hidden, **options) + bonus)
    prompts = [policy.encode(p) for p in problems]
    steps, _ = TorchSampler(policy).sample(prompts, [1, 2, 3, 4], SamplingParams(2, 8, stop_at_step=True))
    rows, _ = complete(policy, TorchSampler(policy), problems, [1, 2, 3, 4], SamplingParams(2, 8), policy.grade)
    drawn = [s.tokens for row in steps for s in row] + [t.completion for row in rows for t in row]
    assert sum(token >= named for tokens in drawn for token in tokens) > 100
    assert not any(t.reward.parsed for row in rows for t in row) and isinstance(policy.decode([named, size - 1]), str)
    config = Config(learning=LearningConfig(failures=True), machine=MachineConfig(lora_rank=4))
    losses = update(policy, make_optimizer(policy, config), [t for row in rows for t in row], config.learning)
    assert math.isfinite(losses["policy_loss"]) and losses["disagreement_mean"] < 1e-3


TAGGED = [
    "<step> 2 + 3 = 5 </step>",
    "<step> 2 + 3 = 5</step>",
    "<step>5 </step>\n",
    "</step>",
    "> 1>2 <a></s> <step></step>",
]


@pytest.mark.parametrize("step", TAGGED)
def test_both_spellings_of_the_tag_end_a_step(qwen, monkeypatch, step):
    """Prevents a search that runs on where Qwen writes </step> with another first token: after a space, after a digit,
    before a new line."""
    policy = load_policy(qwen)
    tags = [policy.tokenizer(text)["input_ids"][1:] for text in ("5</step>", "5 </step>")]
    assert tags[0][0] != tags[1][0]
    ids = policy.tokenizer(step)["input_ids"]
    script = iter([*ids, *policy.tokenizer(" and more")["input_ids"]])
    monkeypatch.setattr(torch_sampler, "inverse_cdf", lambda logp, uniform: torch.tensor([next(script)]))
    (((sample,),), _) = TorchSampler(policy).sample([[7]], [0], SamplingParams(1, len(ids) + 3, stop_at_step=True))
    assert (sample.tokens, sample.ended) == (ids, "step")


@pytest.mark.parametrize("kind", ["full-fp32", "lora-nf4"])
def test_an_update_never_holds_the_logits_of_a_batch(qwen, problems, monkeypatch, kind):
    """Prevents [B, T, V] with V = 151,936, by any way through the head: 1.2 GB for a batch of 2,048 tokens in fp32."""
    policy, rows = moved_policy(kind, qwen), []
    for lm in (policy.lm, policy.reference):
        if lm is not None:
            lm.get_output_embeddings().register_forward_hook(lambda layer, given, out: rows.append(out.numel() // 640))
    items, _ = complete(policy, TorchSampler(policy), problems, [1, 2, 3, 4], SamplingParams(2, 8), policy.grade)
    rows.clear()
    monkeypatch.setattr(module, "LOGIT_CHUNK", 4 * 640)
    learning = LearningConfig(failures=True, old_logprobs="truncated")
    optimizer = make_optimizer(policy, Config(learning=learning))
    update(policy, optimizer, [t for row in items for t in row], learning)
    assert max(rows) == 4 and sum(rows) > 4 * 8 * 4
