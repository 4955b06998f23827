"""Tests of runtime/model_checks.py: models that would be trained or judged wrongly without a word."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

import ppo
from config import Config, preset_for
from countdown import Problem
from runtime import loading, model_checks
from runtime.guard import Stopped
from runtime.loading import load_policy, recorded
from runtime.run_folder import read_metrics
from runtime.torch_sampler import TorchSampler
from runtime.weights import load_weights, save_policy
from sampling import SamplingParams

SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def make_model(tmp_path, checkpoint):
    """A folder with a random model of a configuration, and the tokenizer of `checkpoint`."""

    def make(kind=LlamaConfig, **settings):
        folder = shutil.copytree(checkpoint, tmp_path / "model")
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        (folder / "model.safetensors").unlink()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**{**SMALL, "vocab_size": vocabulary, **settings}))
        model.save_pretrained(folder)
        return folder

    return make


def refused(model, **options):
    """The one line that says why `model` can't be loaded."""
    with pytest.raises(ValueError) as error:
        load_policy(model, **options)
    assert "\n" not in str(error.value) and not str(error.value).endswith(":")
    return str(error.value)


# ------------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("kind, settings", [
    (Gemma2Config, dict(final_logit_softcapping=0.1, head_dim=16)),
    (GraniteConfig, dict(logits_scaling=4.0)),
    (CohereConfig, dict(logit_scale=0.25)),
])  # fmt: skip
def test_logits_that_are_more_than_the_output_embedding_are_refused(make_model, monkeypatch, kind, settings):
    """Prevents log-probabilities that are wrong by whole nats without a word. The names of settings are one check; the
    comparison of logits finds what no name tells."""
    folder = make_model(kind, **settings)
    assert "changes its logits" in refused(folder)
    monkeypatch.setattr(loading, "LOGIT_SETTINGS", ())
    assert "log-probabilities would be wrong by" in refused(folder)


def test_a_layer_before_the_head_is_found(checkpoint):
    """Prevents the same for a model whose forward pass has a norm, a scale or a projection that no setting names."""
    policy = load_policy(checkpoint)
    model_checks.check_policy(policy, "m")
    forward = type(policy.lm).forward

    class Scaled(type(policy.lm)):
        def forward(self, *args, **options):
            output = forward(self, *args, **options)
            output.logits = output.logits * 1.5
            return output

    policy.lm.__class__ = Scaled
    with pytest.raises(ValueError, match="m: qwen2 does more than multiply hidden states"):
        model_checks.check_policy(policy, "m")


def test_a_model_that_reads_padding_is_found(checkpoint, monkeypatch):
    """Prevents answers that depend on how long the other prompts of a batch are."""
    policy = load_policy(checkpoint)
    hidden = policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda ids, attention, **o: hidden(ids, torch.ones_like(attention), **o))
    with pytest.raises(ValueError, match="or reads padding"):
        model_checks.check_policy(policy, "m")


@pytest.mark.parametrize("options", [
    {}, dict(lora_rank=2), dict(dtype="bfloat16", lora_rank=2), dict(quantize="nf4", lora_rank=2, dtype="bfloat16"),
    dict(dtype="bfloat16", train=False),
])  # fmt: skip
@pytest.mark.parametrize("kind, settings", [(Qwen2Config, {}), (LlamaConfig, dict(tie_word_embeddings=True)),
    (MixtralConfig, dict(num_local_experts=4)),
    (Qwen3MoeConfig, dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16))])  # fmt: skip
def test_sound_models_pass_in_every_precision(make_model, kind, settings, options):
    """Prevents a refusal of a model that works: rounding is no fault."""
    load_policy(make_model(kind, **settings), **options)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", ["model.safetensors", "value_head/weights.safetensors", "adapter_model.safetensors"])
def test_weights_that_are_not_finite_are_refused(tmp_path, checkpoint, file, value):
    """Prevents an evaluation that prints 0.00 % and a run that saves NaN, both as if they had worked."""
    folder = tmp_path / "policy"
    save_policy(load_policy(checkpoint, lora_rank=2 * file.startswith("adapter")), folder)
    weights = load_file(folder / file)
    weights[sorted(weights)[-1]].view(-1)[0] = value
    save_file(weights, folder / file, {"format": "pt"})
    assert "not finite (NaN or infinity): the model is damaged" in refused(folder)


@pytest.mark.parametrize("cutoff", [None, 0.1])
def test_the_sampler_refuses_logits_that_are_not_finite(policy, cutoff):
    """Prevents answers made of noise, and a traceback inside the beams, when weights are destroyed during training."""
    policy.lm.model.norm.weight.data[3] = float("nan")
    sampler = TorchSampler(policy)
    with pytest.raises(Stopped, match="the policy's logits are not finite"):
        sampler.sample([[5, 6]], [0], SamplingParams(2, 4, cutoff=cutoff))


def test_a_token_without_a_row_is_refused(tmp_path, checkpoint, monkeypatch):
    """Prevents an IndexError in the first prompt for a tokenizer that has more tokens than the embedding. Added tokens
    that no prompt uses do no harm: Gemma 3 has one."""
    folder = shutil.copytree(checkpoint, tmp_path / "larger")
    policy = load_policy(folder)
    policy.tokenizer.add_tokens(["<image>"])
    policy.tokenizer.save_pretrained(folder)
    assert len(load_policy(folder).tokenizer) > policy.lm.config.vocab_size
    template = policy.tokenizer.chat_template
    (folder / "chat_template.jinja").write_text("<image>" + template)
    assert "token 285 ('<image>') is used, but the embedding has 285 rows" in refused(folder)
    (folder / "chat_template.jinja").write_text(template)
    policy.tokenizer.pad_token = "<image>"
    policy.tokenizer.save_pretrained(folder)
    assert "is used, but the embedding has" in refused(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_is_stored_in_few_bits(tmp_path, make_model, bits):
    """Prevents a wrong message after minutes: with an adapter it is trained, without one it can't be."""
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    folder = make_model(LlamaConfig)
    stored = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"})
    (folder / "model.safetensors").unlink()
    stored.save_pretrained(folder)
    assert "stored in few bits, which can't be trained: pass --lora-rank 32" in refused(folder)
    policy = load_policy(folder, lora_rank=2)
    batch = policy.batch([policy.encode(Problem((1, 2), 3))], [[5, 6, 1]])
    hidden, tokens = policy.states(batch)
    policy.logprobs(hidden, tokens, 1.0)[0].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.lm.parameters() if p.requires_grad)
    assert load_policy(folder, train=False).reference is None
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "its weights are stored as gptq, which is not read here" in refused(folder, lora_rank=2)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("kind, settings", [(MixtralConfig, dict(num_local_experts=4)),
    (Qwen3MoeConfig, dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16)),
    (LlamaConfig, dict(tie_word_embeddings=True)), (LlamaConfig, dict(attention_bias=True))])  # fmt: skip
def test_a_checkpoint_of_any_model_is_gone_on_with_bit_for_bit(make_model, tiny_config, tmp_path, kind, settings):
    """Prevents a run of a mixture of experts that can't be resumed: its saved names are not those of its weights."""
    steps = dict(model=str(make_model(kind, **settings)), steps=4, tokens=0, checkpoints=4, evaluations=0)
    ppo.train(tiny_config("none", out=tmp_path / "one", **steps), ppo.collect_samples)

    def interrupted(policy, *rest):
        if policy.version == 2:
            raise KeyboardInterrupt
        return ppo.collect_samples(policy, *rest)

    config = tiny_config("none", out=tmp_path / "two", **steps)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(config, interrupted)
    ppo.train(config, ppo.collect_samples, resume=True)
    one, two = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert read_metrics(tmp_path / "two")[-1]["step"] == 4


@pytest.mark.parametrize("change", ["foreign", "missing"])
@pytest.mark.parametrize("rank", [0, 2])
def test_tensors_that_fit_nowhere_are_refused(tmp_path, checkpoint, rank, change):
    """Prevents a part of an adapter or a checkpoint that is left out, or drawn at random, without a word."""
    folder, file = tmp_path / "policy", "adapter_model.safetensors" if rank else "model.safetensors"
    policy = load_policy(checkpoint, lora_rank=rank)
    save_policy(policy, folder)
    weights = load_file(folder / file)
    name = sorted(weights)[-1]
    if change == "foreign":
        weights[name.replace("layers.1", "layers.7").replace("model.norm", "model.form")] = weights[name].clone()
    else:
        del weights[name]
    save_file(weights, folder / file, {"format": "pt"})
    with pytest.raises(ValueError, match="weights do not fit the model.* tensors"):
        load_weights(policy, folder)
    if rank or change == "missing":
        assert "tensors" in refused(folder) or "its weights lack" in refused(folder)


# ------------------------------------------------------------------------------------------------ adapters


def test_another_rank_than_the_adapters_is_refused(tmp_path, checkpoint):
    """Prevents a config.json that names a rank which was not trained."""
    save_policy(load_policy(checkpoint, lora_rank=2), tmp_path / "a")
    assert refused(tmp_path / "a", lora_rank=4).endswith("is an adapter of rank 2, not 4: pass --lora-rank 2")
    assert load_policy(tmp_path / "a", lora_rank=2).lora


def test_a_run_records_the_rank_and_the_whole_path(tmp_path, checkpoint, monkeypatch):
    """Prevents a config.json whose relative model is another folder from another directory, or that calls the training
    of an adapter a training of all weights."""
    save_policy(load_policy(checkpoint, lora_rank=2), tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    config: Config = preset_for("tiny", "mcts")
    adapter = recorded(config.change(model="a"))
    assert (adapter.model, adapter.machine.lora_rank) == (str(tmp_path / "a"), 2)
    assert recorded(config) == config  # the embedded policy has its name everywhere
    shutil.copytree(checkpoint, tmp_path / "base")
    save_policy(load_policy("base", lora_rank=2), tmp_path / "b")
    monkeypatch.chdir("/")
    assert load_policy(tmp_path / "b").lora


def test_other_adapters_than_lora_are_refused(tmp_path, checkpoint):
    """Prevents a traceback of PEFT for a kind of adapter that the kit does not train."""
    save_policy(load_policy(checkpoint, lora_rank=2), tmp_path / "a")
    edit(tmp_path / "a" / "adapter_config.json", peft_type="IA3")
    assert refused(tmp_path / "a").endswith("is an adapter of kind IA3: only LoRA is trained here")


@pytest.mark.parametrize("settings", [dict(use_dora=True), dict(modules_to_save=["lm_head"]), dict(use_rslora=True)])
def test_other_loras_load_and_keep_their_reference(tmp_path, checkpoint, settings):
    """Prevents a reference that is not the base: with the adapter off, the model has to be the base again."""
    lm = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(0)
    get_peft_model(
        lm, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **settings)
    ).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a" / "adapter_config.json", base_model_name_or_path=str(checkpoint))
    policy, base = load_policy(tmp_path / "a"), load_policy(checkpoint)
    batch = policy.batch([policy.encode(Problem((1, 2), 3))], [[5, 6, 1]])
    torch.testing.assert_close(policy.reference_logprobs(batch), base.reference_logprobs(batch))
    assert not torch.allclose(policy.logprobs(*policy.states(batch), 1.0)[0], base.reference_logprobs(batch), atol=1e-3)


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "eager", "nonsense", None])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_the_kit_chooses_the_attention(tmp_path, checkpoint, key, name):
    """Prevents a demand for a package that is not installed, and a slow attention, because a checkpoint names one."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    edit(folder / "config.json", **{key: name})
    assert load_policy(folder).lm.config._attn_implementation == load_policy(checkpoint).lm.config._attn_implementation
