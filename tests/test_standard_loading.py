"""transformers' own loading gives what the kit gives: tokens, logits, answers; and a model card says how."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from config import TINY, Config
from countdown import make_problems, prompt
from experiments.pretrain import PretrainConfig, games
from policy import left_pad
from ppo import collect_samples, train
from runtime import model_card
from runtime.files import is_whole
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler
from runtime.weights import save_policy
from sampling import Progress, SamplingParams

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny():
    return load_policy(ROOT / TINY, train=False)


def test_both_tokenizers_are_one(tiny):
    """Prevents prompts whose numbers run together without an error: a thousand prompts and answers, tokens and texts,
    numbers above 255 among them."""
    standard = AutoTokenizer.from_pretrained(ROOT / TINY)
    for problem, answer in games(PretrainConfig(batch=1_000), 0):
        messages = [*prompt(problem), {"role": "assistant", "content": answer}]
        asked = standard.apply_chat_template(messages[:2], add_generation_prompt=True, tokenize=False)
        assert standard(asked, add_special_tokens=False)["input_ids"] == tiny.encode(problem)
        tokens = tiny.tokenizer(answer)["input_ids"]
        assert standard(answer)["input_ids"] == tokens and standard.decode(tokens) == tiny.tokenizer.decode(tokens)


def kit_answer(policy, problem):
    """The likeliest answer, drawn by the kit's sampler."""
    ((sample,),), _ = TorchSampler(policy).sample([policy.encode(problem)], [0], SamplingParams(1, 64, 1e-4))
    return policy.decode(sample.tokens).strip()


def test_the_pipeline_answers_as_the_kit_does(tiny):
    """Prevents a policy that is good here and poor for whoever loads it in the usual way."""
    generate = pipeline("text-generation", model=str(ROOT / TINY))
    for problem in make_problems(5, "validation"):
        answer = generate(prompt(problem), max_new_tokens=64, do_sample=False)[0]["generated_text"][-1]["content"]
        assert answer.strip() == kit_answer(tiny, problem)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_saved_policy_loads_in_the_usual_way(rank, tmp_path):
    """Prevents a saved policy, or an adapter, that transformers reads as something else."""
    torch.manual_seed(1)
    policy = load_policy(ROOT / TINY, lora_rank=rank)
    for parameter in policy.lm.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    save_policy(policy, tmp_path)
    standard, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    problem = make_problems(1, "validation")[0]
    asked = tokenizer.apply_chat_template(prompt(problem), add_generation_prompt=True, tokenize=False)
    ids, attention = left_pad([tokenizer(asked, add_special_tokens=False)["input_ids"]], 0)
    assert ids[0].tolist() == policy.encode(problem)
    with torch.no_grad():
        ours = policy.head(policy.hidden(ids, attention, use_cache=False).last_hidden_state)
        assert (standard(ids).logits - ours).abs().max() < 1e-4
        if rank:
            adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
            assert (adapter(ids).logits - ours).abs().max() < 1e-4
    generate = pipeline("text-generation", model=str(tmp_path))
    answer = generate(prompt(problem), max_new_tokens=64, do_sample=False)[0]["generated_text"][-1]["content"]
    assert answer.strip() == kit_answer(policy, problem)


def run_code(card):
    """Run a card's lines of use; they print an answer."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", cwd=ROOT, timeout=120
    )
    assert done.returncode == 0 and "<step>" in done.stdout, done.stderr


def test_the_embedded_policys_card_runs():
    """Prevents lines of use that fail for the model that everybody tries first."""
    run_code((ROOT / TINY / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_a_model_card_tells_what_it_is_and_its_code_runs(rank, tiny_config, monkeypatch):
    """Prevents a policy on the hub without scores, command or licence, lines of use that fail, and checksums that the
    card breaks."""
    config = tiny_config("none", tokens=0, steps=1, model=str(ROOT / TINY), lora_rank=rank, max_tokens=40)
    monkeypatch.chdir(ROOT)
    scores = train(config, collect_samples)
    card = (config.folder / "policy" / "README.md").read_text(encoding="utf-8")
    assert is_whole(config.folder / "policy")
    for score in scores.values():
        assert f"| {100 * score.mean_at_k:.1f} % [{100 * score.mean_low:.1f}, {100 * score.mean_high:.1f}] |" in card
    assert "python ppo.py --search none" in card and "1 steps" in card
    _, front, _ = card.split("---\n", 2)
    settings = {line.partition(": ")[0]: json.loads(line.partition(": ")[2]) for line in front.splitlines()}
    assert settings["library_name"] == ("peft" if rank else "transformers") and settings["license"] == "other"
    assert "tree-search" not in settings["tags"] and ("`pip install peft`" in card) == bool(rank)
    run_code(card)
    assert "Not tested yet" in (config.folder / "checkpoint" / "README.md").read_text(encoding="utf-8")


def test_lines_of_use_are_python_whatever_folder_and_prompt():
    """Prevents lines of use that do not run: a Windows folder whose \\n would be a line break, quotes, emoji."""
    folder, text = 'C:\\new\\the "best"', "{3} 'and' \\n \N{PARTY POPPER}"
    task = SimpleNamespace(prompt=lambda _: [{"role": "user", "content": text}])
    chat = SimpleNamespace(task=task, can_spell=lambda _: True)
    (code,) = re.findall(r"```python\n(.*?)```", model_card.card(Config(), Progress(), {}, chat, 0, folder), re.S)
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert folder in texts and text in texts
