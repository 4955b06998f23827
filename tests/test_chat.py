"""Tests of the prompt as chat templates of many kinds write it, and of the token that ends an answer."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from config import TINY
from countdown import RULES, Problem, verify
from runtime.loading import load_policy
from runtime.torch_sampler import TorchSampler
from runtime.weights import save_policy
from sampling import SamplingParams

PROBLEM = Problem((3, 5, 7, 9), 44)
NUMBERS = "Numbers: 3 5 7 9 Target: 44"
LOOP = "{% for m in messages %}"
TEMPLATES = {  # short forms of what models have: how the rules and the numbers stand in the prompt, what ends a turn
    "chatml": (
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        f"<|im_start|>system\n{RULES}<|im_end|>\n<|im_start|>user\n{NUMBERS}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "refuses system": (  # Gemma, Mistral 0.1
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + LOOP + "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
        f"<|im_start|>user\n{RULES}\n\n{NUMBERS}<|im_end|>\n<|im_start|>model\n",
        "<|im_end|>",
    ),
    "drops system": (  # Phi-3 of early days
        LOOP + "{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% elif m.role == 'assistant' %}"
        "{{ m.content }}<|endoftext|>{% endif %}{% endfor %}",
        f"<|im_start|>{RULES}\n\n{NUMBERS}",
        "<|endoftext|>",
    ),
    "parts": (
        LOOP + "[{{ m.role }}]{% for part in m.content %}{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}",
        f"[system]{RULES}<|im_end|>[user]{NUMBERS}<|im_end|>",
        "<|im_end|>",
    ),
    "parts, refuses system": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        + LOOP + "[{{ m.role }}]{% for part in m.content %}{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}",
        f"[user]{RULES}\n\n{NUMBERS}<|im_end|>",
        "<|im_end|>",
    ),
    "ends in plain text": (
        LOOP + "{{ m.role }}: {{ m.content }}\n\n{% endfor %}", f"system: {RULES}\n\nuser: {NUMBERS}\n\n", None,
    ),
}  # fmt: skip


@pytest.fixture
def chat(tmp_path, qwen):
    """A folder with the thin Qwen2.5 and another chat template."""

    def make(template: str):
        folder = shutil.copytree(qwen, tmp_path / "model", dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return make


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("template, expected, end", TEMPLATES.values(), ids=TEMPLATES)
def test_rules_and_numbers_are_in_every_prompt(chat, template, expected, end):
    """Prevents a model that is asked without the rules or the numbers, because its template drops or refuses the system
    turn, or reads content as parts: its score is 0 and nothing says why."""
    policy = load_policy(chat(template), train=False)
    assert policy.tokenizer.decode(policy.encode(PROBLEM)) == expected
    stop = policy.tokenizer.convert_tokens_to_ids(end) if end else None
    assert policy.chat.turn_end() == stop and (stop is None or stop in policy.stop_ids)


@pytest.mark.parametrize("template, message", [
    (LOOP + "{{ m.role }}{% endfor %}", "leaves out the rules or the problem"),
    (LOOP + "{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out the rules or the problem"),
    (LOOP + "{{ m.content[:40] }}{% endfor %}", "leaves out the rules or the problem"),
    ("{{ raise_exception('only tools\nare served') }}", "only tools are served"),
    ("{{ messages[7].content }}", "has no attribute|has no element"),
])  # fmt: skip
def test_a_template_that_leaves_out_the_game_is_refused(chat, template, message):
    """Prevents the same where nothing helps."""
    with pytest.raises(ValueError, match=message) as error:
        load_policy(chat(template))
    assert "\n" not in str(error.value)


def test_numbers_without_tokens_are_refused(policy):
    """Prevents numbers that the tokenizer turns into its unknown token, all of them alike."""
    policy.tokenizer.add_special_tokens({"unk_token": "3"})
    with pytest.raises(ValueError, match="its tokenizer has no tokens for 'Numbers: 3 5 7 9 Target: 44'"):
        policy.encode(PROBLEM)


def test_the_embedded_policy_gets_the_numbers_alone():
    """Prevents a prompt of unknown tokens: its vocabulary has no words for the rules, which it has learnt."""
    policy = load_policy(TINY, train=False)
    assert policy.tokenizer.decode(policy.encode(PROBLEM)) == f"<|user|> {NUMBERS} <|assistant|>"
    assert policy.stop_ids == {1}


@pytest.mark.parametrize("config", [{}, {"eos_token_id": None}, {"eos_token_id": [5]}])
def test_an_answer_stops_at_the_end_of_its_turn(chat, config):
    """Prevents answers that run on, with a format of 0, for a model whose configs do not name the token that ends a
    turn (old Qwen, converted models)."""
    folder = chat(TEMPLATES["chatml"][0])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.eos_token = "<|endoftext|>"  # noqa: S105
    tokenizer.save_pretrained(folder)
    edit(folder / "config.json", eos_token_id=None)
    GenerationConfig(**config).save_pretrained(folder)
    policy = load_policy(folder, train=False)
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert {end, policy.tokenizer.eos_token_id} <= policy.stop_ids
    policy.lm.get_output_embeddings().weight.data.zero_()
    policy.lm.get_output_embeddings().weight.data[end] = 0  # all tokens alike: every answer ends at a stop or is cut
    rows, _ = TorchSampler(policy).sample([policy.encode(PROBLEM)], [0], SamplingParams(64, 40))
    assert {s.ended for s in rows[0] if end in s.tokens} <= {"end"}
    assert all(end not in s.tokens[:-1] for s in rows[0])


THINKS = (
    TEMPLATES["chatml"][0] + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def test_an_option_of_the_chat_template_reaches_it_and_stays(chat, tmp_path):
    """Prevents a model that thinks although it is asked not to, and a trained policy that is evaluated with another
    prompt than it was trained with. A later training may change the option."""
    off, on = '{"enable_thinking": false}', '{"enable_thinking": true}'
    folder = chat(THINKS)
    ends = [load_policy(folder, template_options=options).encode(PROBLEM) for options in ("", on, off)]
    assert ends[0] == ends[1] and len(ends[2]) > len(ends[0])
    save_policy(load_policy(folder, template_options=off), tmp_path / "saved")
    assert load_policy(tmp_path / "saved").encode(PROBLEM) == ends[2]
    assert load_policy(tmp_path / "saved", template_options=on).encode(PROBLEM) == ends[0]


@pytest.mark.parametrize("options, message", [
    ('{"enable_thoughts": false}', "its chat template has no option 'enable_thoughts'"),
    ('{"a b": 1}', "its chat template has no option 'a b'"), ("enable_thinking=false", "must be a JSON object"),
    ("[1]", "must be a JSON object"), ("7", "must be a JSON object"),
    ('{"enable_thinking": [1]}', "must be a text, a number, true or false"),
])  # fmt: skip
def test_an_option_that_the_template_does_not_read_is_refused(chat, options, message):
    """Prevents a misspelt option that changes nothing without a word."""
    with pytest.raises(ValueError, match=message):
        load_policy(chat(THINKS), template_options=options)


@pytest.mark.parametrize("odd", [
    dict(do_sample=False, temperature=0.6, top_p=0.9), dict(pad_token_id=-1), dict(num_beams=1, length_penalty=2.0),
])  # fmt: skip
def test_a_generation_config_that_cannot_be_saved_does_no_harm(chat, tmp_path, odd):
    """Prevents a run that dies at its first checkpoint, after the whole first test: transformers refuses to save what
    it has loaded. The stop ids are kept, for the kit and for others."""
    folder = chat(TEMPLATES["chatml"][0])
    saved = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    (folder / "generation_config.json").write_text(json.dumps(saved | odd), encoding="utf-8")
    policy = load_policy(folder)
    save_policy(policy, tmp_path / "saved")
    again = load_policy(tmp_path / "saved", train=False)
    assert again.stop_ids == policy.stop_ids and len(again.stop_ids) > 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {*plain.generation_config.eos_token_id} == policy.stop_ids
    ids = torch.tensor([policy.encode(PROBLEM)])
    assert plain.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


@pytest.mark.parametrize("odd", [dict(do_sample=False, num_return_sequences=4), dict(max_new_tokens=-3)])
def test_a_generation_config_that_transformers_refuses_is_told_at_once(chat, odd):
    """Prevents a traceback, and a run that dies late."""
    folder = chat(TEMPLATES["chatml"][0])
    edit(folder / "generation_config.json", **odd)
    with pytest.raises(ValueError, match="can't load .*(num_return_sequences|max_new_tokens)"):
        load_policy(folder)


@pytest.mark.parametrize("completion, correct", [
    ("<think> <answer> 3 + 5 </answer> no </think> <answer> 5 * 7 + 9 </answer>", True),
    ("<answer> 3 + 5 </answer> no </think> <answer> 5 * 7 + 9 </answer>", True),  # the template opens the thoughts
    ("<think> a </think> b </think> <answer> 5 * 7 + 9 </answer>", True),
    ("<think> <answer> 5 * 7 + 9 </answer> </think>", False),
    ("<answer> 5 * 7 + 9 </think> </answer>", False),
    ("<think> <answer> 3 + 5 </answer> <answer> 5 * 7 + 9 </answer>", False),  # never closed: two answers
    ("<think> <answer> 5 * 7 + 9 </answer>", True),
    ("</think>" * 5_000 + "<answer> 5 * 7 + 9 </answer>", True),
])  # fmt: skip
def test_an_answer_drafted_in_closed_thoughts_does_not_count(completion, correct):
    """Prevents a thinking model whose right answers are refused as second ones."""
    assert verify(completion, PROBLEM).correct == correct
