"""Tests of runtime/model_checks.py: models that would be trained or judged wrongly without a word."""

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.modeling_outputs import CausalLMOutput

import baselines
import ppo
from config import Config, preset_for
from countdown import Problem
from runtime import loading, model_checks
from runtime.guard import Stopped
from runtime.loading import load_policy, recorded
from runtime.run_folder import read_metrics
from runtime.torch_sampler import TorchSampler
from runtime.vllm_sampler import VLLMSampler
from runtime.weights import VALUE_HEAD, load_weights, save_policy
from sampling import SamplingParams

COLLECTORS = ppo.COLLECTORS | baselines.COLLECTORS
SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    eos_token_id=1, pad_token_id=0,
)  # fmt: skip


MIXTURES = [
    (MixtralConfig, dict(num_local_experts=4)),
    (Qwen2MoeConfig, dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    (Qwen3MoeConfig, dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16)),
    (DeepseekV3Config, dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
     moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
     num_key_value_heads=2)),
]  # fmt: skip


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture
def make_model(tmp_path, checkpoint):
    """A folder with a random model of a configuration, and the tokenizer of `checkpoint`."""

    def make(kind=LlamaConfig, **settings):
        folder = shutil.copytree(checkpoint, tmp_path / "model")
        vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
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
    (Gemma2Config, dict(head_dim=16)),  # a cap of 30, which its random logits of 0.1 do not reach
    (GraniteConfig, dict(logits_scaling=4.0)),
    (CohereConfig, dict(logit_scale=0.25)),
])  # fmt: skip
def test_logits_that_are_more_than_the_output_embedding_are_refused(make_model, monkeypatch, kind, settings):
    """Prevents log-probabilities that are wrong by whole nats without a word. The names of settings are one check; the
    comparison of logits finds what no name tells."""
    folder = make_model(kind, **settings)
    assert "changes its logits" in refused(folder)
    monkeypatch.setattr(loading, "LOGIT_SETTINGS", ())
    assert "more than its output embedding times its hidden states" in refused(folder)
    assert "more than its output embedding times its hidden states" in refused(folder, lora_rank=2, dtype="bfloat16")


HEADS = {
    "scale": lambda hidden: 1.1 * hidden,
    "norm": lambda hidden: hidden / hidden.norm(dim=-1, keepdim=True),
    "projection": lambda hidden: hidden.roll(1, -1),
}


@pytest.mark.parametrize("options", [{}, dict(dtype="bfloat16", lora_rank=2), dict(quantize="nf4", lora_rank=2)])
@pytest.mark.parametrize("before_head", HEADS.values(), ids=HEADS)
def test_a_layer_before_the_head_is_found(checkpoint, before_head, options):
    """Prevents the same for a model whose forward pass has a norm, a scale or a projection that no setting names."""
    policy = load_policy(checkpoint, **options)
    lm = policy.base

    def forward(input_ids, **_):
        hidden = lm.model(input_ids).last_hidden_state
        return CausalLMOutput(logits=lm.lm_head(before_head(hidden)))

    lm.forward = forward
    with pytest.raises(ValueError, match="m: the logits of seed_oss are more than"):
        model_checks.check_policy(policy, "m")


@pytest.mark.parametrize("tokens", ["prompts", "new"])
def test_padding_and_cached_keys_must_not_change_logits(checkpoint, monkeypatch, tokens):
    """Prevents answers that depend on how long the other prompts of a batch are, or on which tokens were cached."""
    policy = load_policy(checkpoint)
    hidden = policy.hidden

    def unmasked(ids, attention, **options):
        wrong = (ids.shape[1] > 1) == (tokens == "prompts")
        return hidden(ids, torch.ones_like(attention) if wrong else attention, **options)

    monkeypatch.setattr(policy, "hidden", unmasked)
    with pytest.raises(ValueError, match="gives other logits with padding or with cached keys and values"):
        model_checks.check_policy(policy, "m")


def test_a_model_beside_its_backbone_is_refused(make_model):
    """Prevents answers of another model: the logits of OPT come from a part of its backbone that numbers positions in
    another way."""
    folder = make_model(OPTConfig, ffn_dim=64, word_embed_proj_dim=32)
    assert refused(folder).endswith("its logits are not made of what its backbone returns")


def test_a_checkpoint_that_asks_for_tuples_is_used(tmp_path, checkpoint):
    """Prevents an AttributeError for `return_dict: false` in config.json."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    edit(folder / "config.json", return_dict=False, use_cache=False, output_hidden_states=True)
    assert load_policy(folder).lm.config.return_dict


@pytest.mark.parametrize("options", [
    {}, dict(lora_rank=2), dict(dtype="bfloat16", lora_rank=2), dict(quantize="nf4", lora_rank=2, dtype="bfloat16"),
    dict(dtype="bfloat16", train=False),
])  # fmt: skip
@pytest.mark.parametrize("kind, settings", [(Qwen2Config, {}), (LlamaConfig, dict(tie_word_embeddings=True)),
    *MIXTURES])  # fmt: skip
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


@pytest.mark.parametrize("method", COLLECTORS)
@pytest.mark.parametrize("module", ["lm", "value_head"])
def test_a_run_whose_weights_are_destroyed_stops(tiny_config, method, module):
    """Prevents a run that saves NaN and ends as if it had worked, a traceback inside a tree, and a checkpoint of NaN in
    the place of the last good one."""
    config = tiny_config(method, tokens=0, steps=4, checkpoints=4)

    def collect(policy, *rest):
        if policy.version == 2:
            next(getattr(policy, module).parameters()).data[0] = float("nan")
        return COLLECTORS[method](policy, *rest)

    for resume in (False, True):
        with pytest.raises(Stopped, match="not finite|nan in update 3"):
            ppo.train(config, collect, resume)
        assert "stopped" in read_metrics(config.folder)[-1] and not (config.folder / "policy").exists()
        files = [*config.folder.rglob("*.safetensors")]
        assert files and all(weight.isfinite().all() for file in files for weight in load_file(file).values())
    collect = COLLECTORS[method]
    ppo.train(config, collect, resume=True)
    assert (config.folder / "policy").exists()


@pytest.mark.parametrize("file", ["model.safetensors", VALUE_HEAD])
def test_a_checkpoint_that_is_not_finite_is_not_gone_on_with(policy, tmp_path, file):
    """Prevents a resumed run of noise."""
    save_policy(policy, tmp_path)
    weights = load_file(tmp_path / file)
    weights[sorted(weights)[-1]].view(-1)[0] = float("inf")
    save_file(weights, tmp_path / file, {"format": "pt"})
    with pytest.raises(ValueError, match="are not finite .*: start the run anew"):
        load_weights(policy, tmp_path)


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
    (folder / "chat_template.jinja").write_text("<image>" + template, encoding="utf-8")
    assert "token 285 ('<image>') is used, but the embedding has 285 rows" in refused(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    policy.tokenizer.pad_token = "<image>"
    policy.tokenizer.save_pretrained(folder)
    assert "is used, but the embedding has" in refused(folder)


def test_other_ends_that_are_no_tokens(tmp_path, checkpoint):
    """Prevents a TypeError for a damaged list of ends, and a refusal of an end that the model can't draw."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    edit(folder / "generation_config.json", eos_token_id=[1, 9999])
    load_policy(folder)
    edit(folder / "generation_config.json", eos_token_id="end")
    assert "generation_config.json is damaged: eos_token_id is 'end', no token" in refused(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_is_stored_in_few_bits(make_model, tiny_config, bits):
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
    config = tiny_config("none", model=str(folder), lora_rank=2, tokens=0, steps=2, checkpoints=2)
    ppo.train(config, ppo.collect_samples)
    assert load_policy(config.folder).lora
    assert load_policy(folder, train=False).reference is None
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "its weights are stored as gptq, which is not read here" in refused(folder, lora_rank=2)


def test_vllm_does_not_get_what_it_serves_wrongly(make_model):
    """Prevents answers of the experts before the last update, and an error inside vLLM."""
    module = type("vllm", (), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", module)
        policy = load_policy(make_model(MixtralConfig, num_local_experts=4))
        with pytest.raises(ValueError, match="new weights of a mixture of experts: pass --sampler torch"):
            VLLMSampler(policy, 64)
        policy.base.is_quantized = True
        with pytest.raises(ValueError, match="does not serve weights in few bits: pass --sampler torch"):
            VLLMSampler(policy, 64)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("kind, settings", [*MIXTURES,
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
    fault = "hold tensors without a place in the model" if change == "foreign" else "lack tensors of the model"
    with pytest.raises(ValueError, match=f"weights do not fit the model.*its weights {fault}: "):
        load_weights(policy, folder)
    assert f"its weights {fault}: " in refused(folder)


@pytest.mark.parametrize("change", ["missing", "foreign", "shape"])
def test_experts_that_do_not_fit_are_refused(make_model, change, capfd):
    """Prevents a table of tensors, and a message that points to it, for a mixture of experts that was cut off."""
    folder = make_model(MixtralConfig, num_local_experts=4)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "experts.1.w1" in name)
    if change == "foreign":
        weights[name.replace("experts.1", "experts.4")] = weights[name].clone()
    elif change == "shape":
        weights[name] = weights[name][:5].clone()
    else:
        del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "the tensors of its experts do not fit together" in refused(folder)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_weights_of_another_shape_are_refused(tmp_path, checkpoint, capfd):
    """Prevents a message that points to a report above it: the line names the tensor."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    edit(folder / "config.json", vocab_size=300)
    why = "its weights model.embed_tokens.weight have the shape (285, 64), but its config.json asks for (300, 64)"
    assert refused(folder).endswith(why) and "LOAD REPORT" not in capfd.readouterr().err


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
    (tmp_path / "below").mkdir()
    assert recorded(config.change(model="below/../a")).model == str(tmp_path / "a")
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


@pytest.fixture
def make_adapter(tmp_path, checkpoint):
    """A folder with a random LoRA of PEFT on `checkpoint`."""

    def make(**settings):
        torch.manual_seed(0)
        options = dict(r=2, target_modules="all-linear", init_lora_weights=False) | settings
        lm = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig(**options))
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        lm.save_pretrained(tmp_path / "a")
        return tmp_path / "a"

    return make


@pytest.mark.parametrize("settings", [
    dict(use_dora=True), dict(use_rslora=True), dict(lora_bias=True), dict(rank_pattern={"q_proj": 4}),
    dict(modules_to_save=["lm_head"]), dict(modules_to_save=["embed_tokens", "norm"]),
    dict(target_modules=["q_proj", "embed_tokens"]), dict(target_modules=["q_proj", "lm_head"]),
])  # fmt: skip
def test_other_loras_load_and_keep_their_reference(tmp_path, checkpoint, make_adapter, settings):
    """Prevents a reference that is not the base: with the adapter off, the model has to be the base again. What is
    saved of it loads again, also as a checkpoint."""
    make_adapter(**settings)
    policy, base = load_policy(tmp_path / "a"), load_policy(checkpoint)
    batch = policy.batch([policy.encode(Problem((1, 2), 3))], [[5, 6, 1]])
    torch.testing.assert_close(policy.reference_logprobs(batch), base.reference_logprobs(batch))
    logprobs = policy.logprobs(*policy.states(batch), 1.0)[0]
    assert not torch.allclose(logprobs, base.reference_logprobs(batch), atol=1e-3)
    save_policy(policy, tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    load_weights(again, tmp_path / "saved")
    assert torch.equal(again.logprobs(*again.states(batch), 1.0)[0], logprobs)


@pytest.mark.parametrize("settings", [dict(bias="all"), dict(bias="lora_only"), dict(init_lora_weights="pissa")])
def test_an_adapter_that_changes_its_base_is_not_trained(make_adapter, settings):
    """Prevents a KL penalty towards another model than the base. Without training the adapter works."""
    folder = make_adapter(**settings)
    assert "the KL penalty would have no reference: merge it into the base" in refused(folder)
    assert load_policy(folder, train=False).lora


def test_damaged_adapter_settings_are_refused(tmp_path, checkpoint):
    """Prevents a comparison of PEFT's between a text and a number as the message, and an adapter that is never on."""
    save_policy(load_policy(checkpoint, lora_rank=2), tmp_path / "a")
    for rank in (None, "2"):
        edit(tmp_path / "a" / "adapter_config.json", r=rank)
        assert refused(tmp_path / "a").endswith(f"adapter_config.json is damaged: the rank r is {rank!r}, no number")
    edit(tmp_path / "a" / "adapter_config.json", r=4)
    assert "size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A" in refused(tmp_path / "a")
    edit(tmp_path / "a" / "adapter_config.json", r=2, alora_invocation_tokens=[3])
    assert "is an activated LoRA" in refused(tmp_path / "a")


# ------------------------------------------------------------------------------------------------ files


def test_a_tokenizer_in_parts_is_told_by_its_missing_file(tmp_path, checkpoint):
    """Prevents a sentence of transformers that ends in its middle, and blame for a file that is there."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    assert refused(folder).endswith("it has no tokenizer_config.json, which names the token that ends an answer")
    shutil.copy(tmp_path / "tokenizer_config.json", folder)
    (folder / "tokenizer.json").unlink()
    assert refused(folder).endswith("it has no tokenizer.json")
    for name in ("added_tokens.json", "merges.txt", "vocab.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    why = "it has no tokenizer.json, only vocab.json, merges.txt, added_tokens.json: AutoTokenizer.from_pretrained("
    assert why in refused(folder)


def test_the_chat_template_may_stand_in_either_file(tmp_path, checkpoint):
    """Prevents a refusal of an older model, whose chat template is in tokenizer_config.json."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=template)
    assert load_policy(folder).encode(Problem((1, 2), 3)) == load_policy(checkpoint).encode(Problem((1, 2), 3))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_file_is_named(tmp_path, checkpoint, name, content):
    """Prevents a message about a column of an unknown file, and ends of answers that are lost without a word."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / name).write_text(content, encoding="utf-8")
    assert f"/{name} is damaged" in refused(folder)


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "eager", "nonsense", None])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_the_kit_chooses_the_attention(tmp_path, checkpoint, key, name):
    """Prevents a demand for a package that is not installed, and a slow attention, because a checkpoint names one."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    edit(folder / "config.json", **{key: name})
    assert load_policy(folder).lm.config._attn_implementation == load_policy(checkpoint).lm.config._attn_implementation
