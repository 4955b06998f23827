"""Tests of runtime/memory.py: counts against counts by hand, the estimate against fake tensors, choices, refusals."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from benchmarks.memory import bare, count_critic, count_sampling, count_update, frozen_weights
from benchmarks.random_qwen import Shape
from config import PRESETS, preset_for
from countdown import make_problems
from ppo import make_optimizer
from runtime import memory
from runtime.loading import load_policy, read_chat
from runtime.memory import CONTEXT_GB, GB, Costs, fit, plan, read_sizes
from runtime.session import Session
from runtime.torch_sampler import KEPT
from runtime.vllm_sampler import MAX_SEQUENCES
from runtime.weights import save_policy

QWEN = PRESETS["qwen1.5b"]
FULL = dict(lora_rank=0, dtype="float32")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder that says Qwen2.5-1.5B and has no weights."""
    return bare(Shape(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def sizes(qwen):
    return read_sizes(qwen, qwen)


@pytest.fixture(scope="module")
def quick(qwen, sizes):
    """`plan` for Qwen2.5-1.5B on a CPU that stands for a GPU, its config.json read once; vLLM counts as installed."""
    longest = read_chat(qwen, qwen).longest(make_problems(100, "train"))

    def run(config):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "read_sizes", lambda *_: sizes)
            patch.setattr("runtime.samplers.find_spec", lambda name: True)
            return plan(config.change(model=qwen), "cpu", longest)

    return run


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Qwen2.5-1.5B with few layers and tokens."""
    return bare(Shape(tmp_path_factory.mktemp("few"), layers=2, vocabulary=4096))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose logits outweigh the rest."""
    size = dict(layers=1, hidden=512, intermediate=1024, heads=4, vocabulary=50_000)
    return bare(Shape(tmp_path_factory.mktemp("wide"), **size))


# ------------------------------------------------------------------------------------------------ counts


def test_sizes_of_qwen_by_hand(sizes):
    """Prevents tied embeddings counted twice, a LoRA adapter on the output head, a value head of another width."""
    layer = 2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960  # weights
    assert sizes.linear == 28 * layer and sizes.largest == 1536 * 8960
    extras = 1536 + 2 * 256 + 2 * 1536  # biases, two norms
    assert sizes.parameters == 151_936 * 1536 + 28 * (layer + extras) + 1536 == 1_543_714_304
    assert sizes.adapter == 28 * (2 * 3072 + 2 * 1792 + 3 * 10_496) and 32 * sizes.adapter == 36_929_536
    assert sizes.value_head == 2 * 1536 + (1536 + 1) * 6144 + (6144 + 1) * 1536 + 1537
    assert (sizes.layers, sizes.linear_layers, sizes.linear_inputs) == (28, 7, 6 * 1536 + 8960)
    assert (sizes.queries, sizes.keys, sizes.head_dim, sizes.mlp) == (1536, 256, 128, 8960)


def test_resident_bytes_of_qwen_by_hand(sizes):
    """Prevents weights in the wrong dtype, a forgotten gradient, moment, reference or quantisation scale."""
    trained = 36_929_536 + 18_886_657
    lora = Costs(QWEN, sizes, 200, "torch")
    assert lora.frozen == 2 * 1_543_714_304 and lora.trainable == 16 * trained and lora.cached == 28_672
    paged = Costs(QWEN.change(optimizer="paged-adamw8bit"), sizes, 200, "torch")
    assert paged.trainable == trained * (4 + 4 + 1 + 1 + 8 / 256)
    full = Costs(QWEN.change(**FULL), sizes, 200, "torch")
    assert full.frozen == 4 * 1_543_714_304 and full.trainable == 16 * (1_543_714_304 + 18_886_657)
    packed = Costs(QWEN.change(quantize="nf4"), sizes, 200, "torch")
    scales = sizes.linear / 64 + 4 * sizes.linear / 64 / 256 + 196 * 4 * (16 + 256 + 1)
    rest = 1_543_714_304 - sizes.linear + sizes.largest
    assert packed.frozen == pytest.approx(sizes.linear / 2 + scales + 2 * rest, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 4])
def test_resident_bytes_are_those_of_a_real_policy(checkpoint, rank):
    """Prevents formulas that miss what `load_policy` and `make_optimizer` make."""
    config = QWEN.change(model=str(checkpoint), lora_rank=rank, dtype="float32")
    policy, costs = load_policy(checkpoint, rank), Costs(config, read_sizes(checkpoint, checkpoint), 1, "torch")
    trained = [p for group in make_optimizer(policy, config).param_groups for p in group["params"]]
    assert costs.trained == sum(p.numel() for p in trained)
    frozen = policy.reference.parameters() if rank == 0 else [p for p in policy.lm.parameters() if not p.requires_grad]
    assert costs.frozen == sum(p.nbytes for p in frozen)


def test_bytes_of_bitsandbytes(checkpoint):
    """Prevents NF4 scales or 8-bit moments of another size than bitsandbytes makes."""
    pytest.importorskip("bitsandbytes")
    config = QWEN.change(model=str(checkpoint), lora_rank=32, quantize="nf4", optimizer="paged-adamw8bit")
    policy, sizes = load_policy(checkpoint, 32, quantize="nf4", dtype="bfloat16"), read_sizes(checkpoint, checkpoint)
    costs = Costs(config, sizes, 1, "torch")
    assert frozen_weights(policy) == pytest.approx(costs.frozen - 2 * sizes.largest, rel=1e-3)
    optimizer = make_optimizer(policy, config)
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.numel() >= 4096]
    for parameter in weights:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = ("state1", "state2", "absmax1", "absmax2")
    kept = sum(optimizer.state[p][name].nbytes for p in weights for name in moments)
    share = sum(p.numel() for p in weights) / costs.trained
    assert kept == pytest.approx(costs.trainable * share - 8 * share * costs.trained, rel=1e-3)


# ------------------------------------------------------------------------------------------------ against fake tensors

KINDS = {
    "lora": dict(),
    "lora-kept": dict(gradient_checkpointing=False, lora_rank=256),
    "lora-fp32": dict(dtype="float32"),
    "full": FULL,
    "full-kept": FULL | dict(gradient_checkpointing=False),
}


def assert_close_above(estimate, count, slack=1.06):
    assert count <= estimate <= slack * count


@pytest.mark.parametrize("kind, rows, length", [*((kind, 8, 400) for kind in KINDS), ("lora", 1, 40), ("full", 1, 100)])
def test_update_is_never_below_the_count(kind, rows, length, few):
    """Prevents a run that the estimate lets start and that dies in its first update; and one refused for nothing."""
    config = QWEN.change(model=few, max_tokens=length - 10, **KINDS[kind])
    costs = Costs(config, read_sizes(few, few), 10, "torch")
    assert_close_above(costs.frozen + costs.trainable + costs.update(rows * length), count_update(config, rows, length))


@pytest.mark.parametrize("kind", ["lora-kept", "full", "full-kept"])
def test_logits_are_never_below_the_count(kind, wide, monkeypatch):
    """Prevents an update that dies where logits, or the gradients of a tied embedding, outweigh the layers."""
    for module in "runtime.memory", "policy":
        monkeypatch.setattr(f"{module}.LOGIT_CHUNK", 2**22)  # many chunks in 720 tokens, as in a real batch
    config = QWEN.change(model=wide, max_tokens=90, **KINDS[kind])
    costs = Costs(config, read_sizes(wide, wide), 10, "torch")
    assert_close_above(costs.frozen + costs.trainable + costs.update(800), count_update(config, 8, 100), 1.15)


@pytest.mark.parametrize("rows, n, model", [(32, 4, "few"), (32, 16, "few"), (32, 16, "wide")])
def test_sampling_is_never_below_the_count(rows, n, model, request, monkeypatch):
    """Prevents a run that dies while it samples: prefill, caches and draws that the estimate forgot."""
    folder = request.getfixturevalue(model)
    length = 400 if model == "few" else 20
    sizes = dict(children=n, step_tokens=1, eval_samples=n, test_samples=n)
    config = QWEN.change(model=folder, max_tokens=length - 10, **sizes)
    monkeypatch.setattr(memory, "CRITIC_TOKENS", 0)
    costs = Costs(config, read_sizes(folder, folder), 10, "torch")
    count = count_sampling(config, rows, n, length)
    assert_close_above(costs.frozen + 4 * costs.trained + costs.sampling(rows), count)


def test_the_critic_is_never_below_the_count(few):
    """Prevents a search that dies when its states are valued."""
    config = QWEN.change(model=few, max_tokens=300, problems=4)
    costs = Costs(config, read_sizes(few, few), 100, "torch")
    assert_close_above(costs.frozen + 4 * costs.trained + costs.critic, count_critic(config, 16, 400))


# ------------------------------------------------------------------------------------------------ choices

CONFIGS = st.builds(
    lambda method, engine, **changes: preset_for("qwen1.5b", method).change(
        sampler=engine[0], quantize=engine[1], **changes
    ),
    engine=st.sampled_from([("torch", "none"), ("torch", "nf4"), ("vllm", "none")]),
    optimizer=st.sampled_from(["adamw", "paged-adamw8bit"]),
    gradient_checkpointing=st.booleans(),
    lora_rank=st.sampled_from([8, 64]),
    max_tokens=st.sampled_from([64, 512]),
    method=st.sampled_from(["mcts", "none", "grpo"]),
)


@settings(max_examples=40)
@given(CONFIGS, st.floats(1, 40), st.floats(0, 20))
def test_a_larger_budget_never_gives_less(sizes, config, budget, more):
    """Prevents budgets that are overrun, sequences that fit no micro-batch, and a larger card that runs slower."""
    small, large = (fit(Costs(config, sizes, 200, config.machine.sampler), gb) for gb in (budget, budget + more))
    for found in (small, large):
        assert found.micro_tokens >= found.context == 200 + config.task.max_tokens
        assert found.rows >= 1 and (found.cache_gb > 0) == (config.machine.sampler == "vllm")
    assert (small.micro_tokens, small.rows) <= (large.micro_tokens, large.rows)
    assert small.micro_tokens <= large.micro_tokens <= config.machine.micro_batch_tokens
    assert small.cache_gb <= large.cache_gb
    assert small.need > budget or large.need <= budget + more


@settings(max_examples=40)
@given(CONFIGS, st.floats(2, 40))
def test_what_is_refused_fits_when_the_advice_is_followed(quick, config, budget):
    """Prevents advice that doesn't help, refusals of more than a line, and a budget that is overrun in silence."""
    config = config.change(gpu_memory=budget)
    try:
        assert quick(config).need <= budget
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and f"has {budget:.2f}" in message
        options = message.partition(": ")[2].removesuffix(" would make it fit").split()
        if options[0] == "no":
            return
        changes, values = {}, dict(zip(options, options[1:]))
        for option in filter(lambda word: word.startswith("--"), options):
            value = values.get(option, "--")
            key = option[2:].replace("-", "_")
            changes[key] = True if value.startswith("--") else int(value) if value.isdigit() else value
        assert quick(config.change(**changes)).need <= budget


def test_advice_is_the_single_mildest_change(quick):
    """Prevents a list of every option where one is enough, and hopeless cases without a word."""
    tight = dict(sampler="torch", gradient_checkpointing=False, micro_batch_tokens=64)
    found = quick(QWEN.change(**tight, gpu_memory=24.0))
    assert found.micro_tokens == 64 and found.need <= 24
    for budget, options in (5.0, "--gradient-checkpointing"), (4.0, "--gradient-checkpointing --quantize nf4"):
        with pytest.raises(ValueError, match=rf"has {budget:.2f}: {options} would make it fit"):
            quick(preset_for("qwen1.5b", "none").change(**tight, gpu_memory=budget))
    with pytest.raises(ValueError, match=r"has 12\.00: --sampler torch would make it fit"):
        quick(QWEN.change(gpu_memory=12.0, sampler="vllm"))
    with pytest.raises(ValueError, match="no option makes it fit, take a smaller model"):
        quick(QWEN.change(gpu_memory=1.0))


def test_vllm_and_the_update_take_turns(sizes):
    """Prevents the update's memory added to vLLM's, vLLM without a second copy, and a cache beyond its use."""
    config = QWEN.change(sampler="vllm")
    costs = Costs(config, sizes, 200, "vllm")
    found = fit(costs, 80)
    gb = {name: found.estimate[f"{name}, peak"] for name in ("sampling", "update")}
    used = (costs.frozen + costs.trainable) / GB + memory.VLLM_GB
    assert gb["update"] == pytest.approx(CONTEXT_GB + 1.05 * (used + costs.update(4096) / GB))
    assert found.cache_gb == pytest.approx(MAX_SEQUENCES * (712 + 32) * 28_672 / GB)
    assert gb["sampling"] == pytest.approx(
        CONTEXT_GB + 1.05 * (used + (costs.frozen + costs.critic) / GB + found.cache_gb)
    )
    assert fit(costs, 1).cache_gb == pytest.approx(744 * 28_672 / GB)  # one sequence, or vLLM does not start


def test_calls_of_the_sampler(sizes):
    """Prevents evaluations or a method whose siblings or prefixes are larger than what was planned for."""

    def of(method="mcts", **changes):
        return Costs(preset_for("qwen1.5b", method).change(**changes), sizes, 200, "torch")

    assert of().calls() == [(4, 200), (16, 200), (4, 712)]
    assert of("none").calls()[-1] == (1, 200) and of("grpo", samples=9).calls()[-1] == (9, 200)
    assert of("none").critic == 0 < of(problems=2).critic < of().critic == of(problems=200).critic
    assert (of().kept_tokens(8), of("none").kept_tokens(8), of().kept_tokens(10**6)) == (8 * 356, 0, KEPT)
    assert of().sampling(1) > of().kept_tokens(1) * of().cached
    assert of(problems=1).sampling(1) == of(problems=1).sampling(4) >= 16 * 712 * of().cached  # evaluation draws 16


# ------------------------------------------------------------------------------------------------ plan


def test_a_cpu_without_a_budget_is_not_estimated(few, monkeypatch):
    """Prevents a slower start, numbers about a GPU that isn't there, and a look at the hub."""
    monkeypatch.setattr(memory, "read_sizes", None)
    config = QWEN.change(model=few)
    found = plan(config, "cpu", 100)
    assert (found.micro_tokens, found.rows, found.cache_gb, str(found)) == (4096, 1024, 1.0, "")
    assert found.context == 100 + memory.MARGIN + 512


def test_nothing_loads_weights(few, monkeypatch):
    """Prevents minutes of loading before a refusal."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    before = torch.get_rng_state()
    text = str(plan(QWEN.change(model=few, gpu_memory=8.0, sampler="torch"), "cpu", 100))
    assert torch.equal(before, torch.get_rng_state())
    first, *parts = text.splitlines()
    assert first.endswith("of 8.00 GB:") and len(parts) == 4 and len({line.index(".") for line in parts}) == 1
    assert "sequences together" in parts[2] and "4,096 tokens" in parts[3]


def test_no_prompt_is_longer_than_the_context(few, checkpoint):
    """Prevents a vLLM that refuses a prompt in the middle of a run, for each tokenizer of the kit."""
    for folder in (few, str(checkpoint)):
        chat = read_chat(folder, folder)
        for size in (3, 4):
            problems = make_problems(1_000, "train", size=size)
            assert max(len(chat.encode(problem)) for problem in problems) == chat.longest(problems)


def test_an_adapter_keeps_its_own_rank(checkpoint, tmp_path):
    """Prevents an adapter that is counted with the rank of the command line, which loading it ignores."""
    save_policy(load_policy(checkpoint, lora_rank=3), tmp_path)
    config = QWEN.change(model=str(tmp_path), gpu_memory=4.0, sampler="torch", max_tokens=64)
    sizes = read_sizes(checkpoint, checkpoint)
    assert plan(config, "cpu", 100).estimate["trainable ones"] * GB == pytest.approx(
        16 * (sizes.value_head + 3 * sizes.adapter)
    )


@pytest.mark.parametrize("sampler", ["torch", "vllm"])
@pytest.mark.parametrize("asked, free, budget", [(0, 22, 22), (12, 22, 12), (24, 22, 22)])
def test_pytorch_is_held_to_the_budget(sampler, asked, free, budget, few, monkeypatch):
    """Prevents --gpu-memory that only advises, a plan for memory that others hold, and an update under a cap that
    counts what vLLM gave back."""
    capped = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GB, 32 * GB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", capped.append)
    monkeypatch.setattr("runtime.samplers.find_spec", lambda name: True)
    monkeypatch.setattr("runtime.samplers.borrowed", lambda architectures: False)
    found = plan(QWEN.change(model=few, gpu_memory=float(asked), sampler=sampler), "cuda", 100)
    assert found.budget == budget and (found.cache_gb > 0) == (sampler == "vllm")
    asleep = found.estimate["frozen weights"] + found.cache_gb if sampler == "vllm" else 0
    assert capped == ([pytest.approx((budget - CONTEXT_GB + asleep) / 32)] if asked else [])


@pytest.mark.parametrize(("sampler", "free", "engine"), [("auto", 22, "vllm"), ("auto", 2, "torch"), ("vllm", 2, "")])
def test_a_small_card_samples_with_torch_where_the_choice_is_open(sampler, free, engine, few, monkeypatch):
    """Prevents a first run on 8 or 12 GB that is refused because vLLM is installed."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GB, 32 * GB))
    monkeypatch.setattr("runtime.samplers.find_spec", lambda name: True)
    monkeypatch.setattr("runtime.samplers.borrowed", lambda architectures: False)
    if engine:
        assert plan(QWEN.change(model=few, sampler=sampler), "cuda", 100).engine == engine
    else:
        with pytest.raises(ValueError, match="--sampler torch would make it fit"):
            plan(QWEN.change(model=few, sampler=sampler), "cuda", 100)


def test_unusable_models_are_one_line(few, tmp_path):
    """Prevents tracebacks for a model whose config.json or tokenizer can't be read."""
    for file in ("config.json", "tokenizer.json"):
        folder = tmp_path / file
        shutil.copytree(few, folder)
        (folder / file).write_text("{", encoding="utf-8")
        with pytest.raises(ValueError, match="can't load") as error:
            Session(QWEN.change(model=str(folder), gpu_memory=8.0), make_optimizer)
        assert "\n" not in str(error.value)
