"""One contract for both samplers, with a LoRA adapter and with all weights trained, on a thin Qwen2.5.

What is drawn, with which log-probabilities, where it stops, what it costs, and whose weights are served. `make
test-vllm` runs vLLM's half.
"""

import gc
import json
import math
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_sampling import assert_distribution
from torch.testing import assert_close

import ppo
from config import TINY, Config, TreeConfig
from countdown import Problem
from policy import Policy
from ppo import make_optimizer, right_align, update
from runtime import samplers
from runtime.loading import load_policy
from runtime.run_folder import read_metrics
from runtime.samplers import SamplerPlan, make_sampler, pick_sampler
from runtime.torch_sampler import TorchSampler
from runtime.vllm_sampler import VLLMSampler
from runtime.weights import save_policy
from sampling import STEP_END, Sampler, SamplingParams, complete

CONTEXT = 512  # of the samplers under test, half the model's
GB = 2**30
PROBLEMS = [Problem((2, 3, 5), 25), Problem((7, 7, 1, 4), 9)]
needs_vllm = pytest.mark.skipif(
    not find_spec("vllm") or torch.cuda.is_available(), reason="vLLM on a CPU is not installed here: make test-vllm"
)
EACH = [
    pytest.param((kind, rank), id=f"{kind}-{'lora' if rank else 'full'}", marks=needs_vllm if kind == "vllm" else ())
    for kind in ("torch", "vllm")
    for rank in (8, 0)
]


@dataclass
class Engine:
    kind: str
    policy: Policy
    sampler: Sampler
    prefixes: list[list[int]]  # of different lengths, some behind the opening that the thin model was taught

    def draw(self, n=8, max_tokens=32, temperature=0.7, stop_at_step=True, prefixes=None, seeds=None):
        prefixes = self.prefixes if prefixes is None else prefixes
        seeds = [1000 * i for i in range(len(prefixes))] if seeds is None else seeds
        return self.sampler.sample(prefixes, seeds, SamplingParams(n, max_tokens, temperature, stop_at_step))

    def text(self, tokens: list[int]) -> str:
        return self.policy.tokenizer.decode(tokens)

    def trainer_logprobs(self, rows, temperature: float) -> list[list[float]]:
        """What policy.logprobs says of each sample's tokens."""
        prompts = [prefix for prefix, row in zip(self.prefixes, rows, strict=True) for _ in row]
        completions = [s.tokens for row in rows for s in row]
        with torch.no_grad():
            hidden, tokens = self.policy.states(self.policy.batch(prompts, completions))
            logprobs, _ = self.policy.logprobs(hidden, tokens, temperature)  # [B, T]
        return [row[-len(c) :] for row, c in zip(logprobs.tolist(), completions, strict=True)]


@pytest.fixture(scope="module")
def two_ends(qwen, tmp_path_factory):
    """The thin Qwen2.5 with both stop tokens equally likely, and with habits of sampling such as Qwen2.5's."""
    policy, folder = load_policy(qwen), tmp_path_factory.mktemp("two-ends")
    rare, usual = policy.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert policy.stop_ids == {rare, usual}
    policy.lm.get_input_embeddings().weight.data[rare] = policy.lm.get_input_embeddings().weight.data[usual]
    policy.lm.generation_config.update(do_sample=True, top_k=3, top_p=0.5, repetition_penalty=1.5)
    save_policy(policy, folder)
    return folder


@pytest.fixture(scope="module", params=EACH)
def started(request, two_ends):
    """A sampler of a policy whose trainable weights have left the checkpoint's."""
    kind, rank = request.param
    torch.manual_seed(2)
    policy = load_policy(two_ends, rank)
    for parameter in policy.lm.parameters():
        if parameter.requires_grad:
            parameter.data += (0.03 if rank else 0.005) * torch.randn_like(parameter)
    opening = "<|im_start|>assistant\n"
    texts = [opening, opening + "<step> 1 + 2 = 3 left 3 4 </step>", opening + "<step> 6 * 4 = 24 left 3 </step> <"]
    prefixes = [*policy.tokenizer(texts)["input_ids"], policy.encode(PROBLEMS[0])]
    plan = SamplerPlan(kind, CONTEXT, rows=1024, kept=4096, cache_gb=0.1)
    engine = Engine(kind, policy, make_sampler(plan, policy, seed=0), prefixes)
    yield engine
    engine.sampler = None
    gc.collect()


@pytest.fixture
def swept():
    """For a test that makes an engine. vLLM's process groups are global: an engine that is collected late takes the
    groups of the next one with it."""
    yield
    gc.collect()


@pytest.fixture
def engine(started):
    """The module's engine; a test may train its policy."""
    trained = {name: p.detach().clone() for name, p in started.policy.named_parameters() if p.requires_grad}
    version = started.policy.version
    yield started
    if started.policy.version != version:
        started.policy.load_state_dict(trained, strict=False)
        started.policy.version += 1


# ------------------------------------------------------------------------------------------------ where it stops


@pytest.mark.parametrize("stop_at_step", [True, False])
def test_every_sample_says_why_it_ended(engine, stop_at_step):
    """Prevents text after an end, a lost stop token or tag, a second stop token that is overlooked, and an ended answer
    that the search would expand."""
    rows, _ = engine.draw(n=32, stop_at_step=stop_at_step)
    samples = [s for row in rows for s in row]
    stops = engine.policy.stop_ids
    for s in samples:
        text, before = engine.text(s.tokens), engine.text(s.tokens[:-1])
        at_step = stop_at_step and STEP_END in text
        assert s.ended == ("end" if s.tokens[-1] in stops else "step" if at_step else "length")
        assert not stops & set(s.tokens[:-1]) and not (stop_at_step and STEP_END in before)
        assert s.ended != "step" or text.count(STEP_END) == 1
        assert len(s.tokens) == len(s.logprobs) <= 32
        assert len(s.tokens) == 32 or s.ended != "length"
    assert {s.ended for s in samples} == {"end", "length", *(["step"] if stop_at_step else [])}
    assert {s.tokens[-1] for s in samples if s.ended == "end"} == stops
    assert stop_at_step or any(STEP_END in engine.text(s.tokens[:-1]) for s in samples)


def test_an_end_on_the_last_allowed_token_is_no_length(engine):
    """Prevents finished answers that count as cut off, and steps that the search would take for terminal."""
    rows, _ = engine.draw(n=1, prefixes=engine.prefixes[1:2] * 200, temperature=1.2)
    for why in ("step", "end"):
        seed, sample = next((1000 * i, s) for i, (s,) in enumerate(rows) if s.ended == why)
        (((again,),), _) = engine.draw(1, len(sample.tokens), 1.2, prefixes=engine.prefixes[1:2], seeds=[seed])
        assert (again.tokens, again.ended) == (sample.tokens, why)


# ------------------------------------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_distribution_drawn_from(engine, temperature):
    """Prevents a ratio other than 1 before the first update, such as from vLLM's default, which reports the untempered
    distribution whatever the temperature."""
    rows, _ = engine.draw(temperature=temperature)
    recorded = [s.logprobs for row in rows for s in row]
    for mine, trainers in zip(recorded, engine.trainer_logprobs(rows, temperature), strict=True):
        assert_close(mine, trainers, atol=1e-4, rtol=0)
    untempered = [x for row in engine.trainer_logprobs(rows, 1.0) for x in row]
    furthest = max(abs(x - y) for x, y in zip(sum(recorded, []), untempered, strict=True))
    assert (furthest > 0.3) == (temperature != 1)


def test_first_tokens_follow_the_softmax_of_transformers(engine):
    """Prevents a top-p or penalty from the model's own generation config, siblings that share randomness, and an
    adapter or trained weights that are not there."""
    prefixes = [engine.prefixes[1], engine.prefixes[3]]
    rows, _ = engine.draw(2_000, 1, 2.0, prefixes=prefixes)
    for prefix, samples in zip(prefixes, rows, strict=True):
        with torch.no_grad():
            logits = engine.policy.lm(input_ids=torch.tensor([prefix])).logits[0, -1].double()
        assert_distribution([s.tokens[0] for s in samples], torch.softmax(logits / 2.0, -1))


def test_draws_depend_on_prefix_and_seed_alone(engine):
    """Prevents results that change with the number of workers, the order of problems or what an engine has cached."""
    seeds = [5, 2**61 + 1, 2**63 - 9, 7_000]
    together, _ = engine.draw(seeds=seeds)
    for i in (3, 0, 1, 2):
        (alone,), _ = engine.draw(prefixes=[engine.prefixes[i]], seeds=[seeds[i]])
        assert [(s.tokens, s.ended) for s in alone] == [(s.tokens, s.ended) for s in together[i]]


def test_other_seeds_and_siblings_draw_other_tokens(engine):
    """Prevents a group of identical samples."""
    rows, _ = engine.draw(n=4, temperature=1.0, stop_at_step=False, prefixes=[engine.prefixes[0]] * 3)
    assert len({tuple(s.tokens) for row in rows for s in row}) > 10  # of 12; those that end at once may coincide


# ------------------------------------------------------------------------------------------------ cost and limits


def test_usage_counts_what_was_run_through_the_model(engine):
    """Prevents curves at equal compute from counts that hide or invent a prefix cache."""
    prefix = engine.policy.encode(Problem((97, 89, 83), 997)) * 2  # of no other test
    _, first = engine.draw(n=4, prefixes=[prefix, prefix[:200]])
    rows, second = engine.draw(n=4, prefixes=[prefix, prefix[:200]])
    assert second.generated == sum(len(s.tokens) for row in rows for s in row)
    assert second.seconds > 0
    length = len(prefix) + 200
    if engine.kind == "torch":
        assert first.prefilled == second.prefilled == length
    else:  # whole blocks of 128 tokens are found again, siblings find each other's
        assert len(prefix) <= first.prefilled < 4 * length
        assert second.prefilled == 4 * (len(prefix) % 128 + 200 % 128) < first.prefilled


def test_no_prefixes_give_no_samples(engine):
    """Prevents a search wave without leaves that breaks."""
    rows, usage = engine.draw(prefixes=[])
    assert (rows, usage.generated, usage.prefilled) == ([], 0, 0)


def test_no_sequence_outgrows_the_context(engine):
    """Prevents positions beyond those the model was made for, and vLLM's errors of many lines."""
    limit = CONTEXT if engine.kind == "vllm" else 1024
    prefix = [engine.prefixes[0][0]] * (limit - 4)
    rows, _ = engine.draw(8, 4, prefixes=[prefix])
    assert "length" in {s.ended for s in rows[0]}
    if engine.kind == "vllm":  # a search may ask for more than it will keep
        more, _ = engine.draw(8, 9, prefixes=[prefix])
        assert [(s.tokens, s.ended) for s in more[0]] == [(s.tokens, s.ended) for s in rows[0]]
        prefix, message = [*prefix, 1, 1, 1, 1], f"^{limit} prefix . 1 new tokens exceed the context of {limit}$"
    else:
        message = f"^{limit - 4} prefix . 5 new tokens exceed the context of {limit}$"
    with pytest.raises(ValueError, match=message):
        engine.draw(1, 5, prefixes=[engine.prefixes[0], prefix])


# ------------------------------------------------------------------------------------------------ whose weights


def train_on(engine, temperature=0.7, seed=0):
    """Sample, then update at a high learning rate. Returns the losses, and how far a log-probability moved at most."""
    policy = engine.policy
    config = Config().change(temperature=temperature, kl_coefficient=0.0, clip_gradient=1e9, failures=True)
    optimizer = make_optimizer(policy, config)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 if policy.lora else 0.002
    params = SamplingParams(4, 16, temperature)
    rows, _ = complete(policy, engine.sampler, PROBLEMS, [1000 * seed, 1000 * seed + 500], params, policy.grade)
    trajectories = sum(rows, [])
    engine.sampler.rest()
    losses = update(policy, optimizer, trajectories, config.learning)
    batch = policy.batch([t.prompt for t in trajectories], [t.completion for t in trajectories])
    with torch.no_grad():
        after, _ = policy.logprobs(*policy.states(batch), temperature)  # [B, T]
    before = right_align([t.logprobs for t in trajectories], batch.completion)  # [B, T]
    return losses, ((after - before) * batch.completion).abs().max().item()


def test_weights_are_never_stale(engine):
    """Prevents training on what an old policy drew: an adapter that vLLM takes for a known one, a tied head that is not
    reloaded, prefixes cached under the weights before. Sampler and trainer agree before each of three updates and
    after the last."""
    for step in range(3):
        losses, moved = train_on(engine, seed=step)
        assert losses["disagreement_max"] < 1e-4 and moved > 0.05
    rows, _ = engine.draw()
    for mine, trainers in zip([s.logprobs for row in rows for s in row], engine.trainer_logprobs(rows, 0.7)):
        assert_close(mine, trainers, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("started", EACH[2:3], indirect=True)
def test_old_adapters_are_thrown_away(engine):
    """Prevents a disk and an engine that fill with an adapter a step."""
    for step in range(3):
        train_on(engine, seed=step)
    engine.draw(n=1)
    (folder,) = Path(engine.sampler.adapters.name).iterdir()
    assert engine.sampler.llm.llm_engine.list_loras() == {engine.sampler.adapter.lora_int_id}
    assert folder == Path(engine.sampler.adapter.lora_path)


# ------------------------------------------------------------------------------------------------ engines


def test_the_engine_is_picked_and_vllm_must_be_there(monkeypatch, qwen, misread):
    """Prevents vLLM as a surprise on a CPU, an engine that starts and then refuses its weights, and a traceback where
    vLLM is not installed."""

    def picked(sampler, device, distinct=False, model=str(qwen), **settings):
        settings = dict(dtype="bfloat16", quantize="none", lora_rank=8) | settings
        return pick_sampler(SimpleNamespace(sampler=sampler, **settings), model, device, distinct)

    assert picked("auto", "cpu") == picked("torch", "cuda") == "torch"
    monkeypatch.setattr(samplers, "find_spec", lambda name: None)
    assert picked("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match="^vLLM is not installed: pass --sampler torch.*$"):
        picked("vllm", "cpu")
    monkeypatch.setattr(samplers, "find_spec", lambda name: name)
    monkeypatch.setattr(samplers, "borrowed", lambda architectures: architectures == ["SeedOssForCausalLM"])
    assert picked("auto", "cuda:0") == picked("vllm", "cpu") == "vllm"
    assert picked("auto", "cuda", dtype="float32", lora_rank=0) == "vllm"
    assert picked("auto", "cpu") == picked("auto", "cuda", quantize="nf4") == "torch"
    assert picked("auto", "cuda", distinct=True) == "torch"
    assert picked("auto", "cuda", dtype="float32") == picked("auto", "cuda", lora_rank=513) == "torch"
    assert picked("auto", "cuda", model=str(misread), lora_rank=0) == "torch"  # its tokenizer is read in another way
    assert picked("auto", "cuda", model=str(TINY), dtype="float32", lora_rank=0) == "torch"
    with pytest.raises(ValueError, match="does not serve NF4"):
        picked("vllm", "cuda", quantize="nf4")


def test_auto_on_a_cpu_makes_a_torch_sampler(policy):
    """Prevents a name that is picked and then not made."""
    kind = pick_sampler(Config().machine, TINY, "cpu", False)
    sampler = make_sampler(SamplerPlan(kind, 64, rows=8, kept=99, cache_gb=0.1), policy, seed=0)
    assert isinstance(sampler, TorchSampler)


@pytest.mark.parametrize("engine", EACH)
def test_search_and_updates_run_on_each_engine(engine, qwen, tiny_config, swept):
    """Prevents samplers that work alone and not in a run: steps of a search joined into trajectories, evaluations and
    rests in between, the memory that the run plans for them."""
    sampler, rank = engine
    config = tiny_config(
        model=str(qwen), sampler=sampler, lora_rank=rank, tokens=0, steps=2, temperature=0.8, max_tokens=48,
        learning_rate=3e-3, tree=TreeConfig(simulations=8, children=2, step_tokens=24),
    )  # fmt: skip
    ppo.train(config, ppo.collect_mcts)
    steps = [row for row in read_metrics(config.folder) if "policy_loss" in row]
    assert len(steps) == 2
    for row in steps:
        assert all(math.isfinite(row[name]) for name in ("policy_loss", "value_loss", "kl", "gradient_norm"))
        assert row["disagreement_mean"] < 1e-3 and row["tree_visits"] == 8
    torch.manual_seed(config.seed)
    before, after = load_policy(qwen, rank), load_policy(config.folder / "policy", rank)
    pairs = zip(before.lm.state_dict().values(), after.lm.state_dict().values(), strict=True)
    assert any((x - y).abs().max() > 1e-3 for x, y in pairs)


@pytest.fixture
def misread(tmp_path):
    """The embedded policy as a Qwen2: the same network, but AutoTokenizer takes its word pieces for bytes."""
    folder = shutil.copytree(TINY, tmp_path / "misread")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings | name), encoding="utf-8")
    return folder


@needs_vllm
def test_a_tokenizer_that_vllm_reads_in_another_way_is_refused(misread, swept):
    """Prevents steps that never end. vLLM looks for </step> in the text of its AutoTokenizer."""
    with pytest.raises(ValueError, match="^vLLM reads this model's tokenizer in another way: pass --sampler torch$"):
        VLLMSampler(load_policy(misread), 256, 0.1)


@needs_vllm
def test_a_class_that_vllm_borrows_of_transformers_is_refused(swept):
    """Prevents a trainer whose model breaks in the first update: vLLM changes the class of transformers."""
    with pytest.raises(ValueError, match="^vLLM runs this model through transformers' classes: pass --sampler torch$"):
        VLLMSampler(load_policy(TINY), 256, 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and find_spec("vllm")), reason="needs an NVIDIA GPU and vLLM")
def test_a_resting_engine_gives_its_memory_and_wakes_with_new_weights(qwen, swept):
    """Prevents an update without memory, and an engine that wakes with the weights it fell asleep with. The bounds are
    wide, as it is in bf16: vLLM's LoRA kernels for GPUs take no fp32."""
    policy = load_policy(qwen, 8, "cuda", "bfloat16")
    sampler = make_sampler(SamplerPlan("vllm", CONTEXT, rows=1024, kept=4096, cache_gb=1.0), policy, seed=0)
    engine = Engine("vllm", policy, sampler, [policy.encode(PROBLEMS[0])])
    for step in range(2):
        engine.draw()
        awake = torch.cuda.mem_get_info()[0]
        engine.sampler.rest()
        assert torch.cuda.mem_get_info()[0] - awake > 0.9 * GB
        losses, moved = train_on(engine, seed=step)
        assert losses["disagreement_mean"] < 0.05 and moved > 0.5
    rows, _ = engine.draw()
    recorded, trainers = [s.logprobs for s in rows[0]], engine.trainer_logprobs(rows, 0.7)
    differences = [abs(x - y) for mine, theirs in zip(recorded, trainers) for x, y in zip(mine, theirs, strict=True)]
    assert sum(differences) / len(differences) < 0.05
