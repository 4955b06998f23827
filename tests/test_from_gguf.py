"""Tests of scripts/from_gguf.py: the folder is the file's model, speaks its tokens, and stops where it does."""

import copy
import runpy
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from runtime.loading import load_policy

gguf = pytest.importorskip("gguf", reason="the package gguf writes the file under test: requirements-dev.txt")
from gguf.quants import dequantize, quantize  # noqa: E402

Q4 = gguf.GGMLQuantizationType.Q4_1
HEADS = {"q_proj": 4, "k_proj": 2}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<file_sep>"]  # the last has no role
MERGED = ["Ċ Ċ", "Ġ Ġ", "i n", "Ġ 7", "2 5"]  # a tokenizer that cuts at digits has no use for the last two
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in MERGED), "<step>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["in\n\n25  37 = 62", "a  7\n\n\n1", "naïve 東京 🙂\t1,234.5 \r\n", " <|im_start|>user\n12<|im_end|> ", ""]


def permute(weight, heads):
    """Rows of a query or key projection in llama.cpp's order: the halves that rotate together side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file, weights, pre="smollm", template=TEMPLATE, skip=(), extra=None):
    """A one-layer llama with tied embeddings and a byte-level tokenizer, written as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Small One")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-3)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 5 + [1] * (len(TOKENS) - 6) + [4])  # control, normal, user-defined
    writer.add_token_merges(MERGED)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_unk_token_id(0)
    if template:
        writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, weight in weights.items():
        part = name.split(".")[-2]
        if part in skip:
            continue
        data = permute(weight.numpy(), HEADS[part]) if part in HEADS else weight.numpy()
        data, kind = (quantize(np.ascontiguousarray(data), Q4), Q4) if data.ndim == 2 else (data, None)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    if extra:
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def reference():
    """The model that the file holds, in fp32: its matrices are what 4 bits leave of random ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-3, rope_theta=100_000.0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape)
        parameter.data = torch.tensor(dequantize(quantize(drawn.numpy(), Q4), Q4)) if drawn.ndim == 2 else drawn
    return model


@pytest.fixture(scope="module")
def weights(reference):
    return {name: weight.detach() for name, weight in reference.named_parameters()}


@pytest.fixture
def convert(monkeypatch):
    """The command line, in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["from_gguf", *map(str, words)])
        runpy.run_module("scripts.from_gguf", run_name="__main__")

    return run


@pytest.fixture
def folder(weights, convert, tmp_path):
    convert(write_gguf(tmp_path / "small.gguf", weights), tmp_path / "models" / "small")
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["small"]
    return tmp_path / "models" / "small"


# ------------------------------------------------------------------------------------------------ what is kept


def test_weights_are_the_files_in_bfloat16(folder, weights):
    """Prevents queries and keys in llama.cpp's order, half-read blocks, and a second copy of tied embeddings."""
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == weights.keys() and "lm_head.weight" not in stored
    for name, weight in weights.items():
        assert stored[name].dtype == torch.bfloat16 and torch.equal(stored[name], weight.bfloat16()), name


def test_the_policy_computes_what_the_files_model_does(folder, reference):
    """Prevents a lost rotation base, norm epsilon or head count, and weights that claim to be still quantized."""
    policy = load_policy(folder)
    assert "quantization_config" not in (folder / "config.json").read_text(encoding="utf-8")
    assert policy.lm.lm_head.weight is policy.lm.model.embed_tokens.weight and policy.lm.dtype == torch.float32
    expected = copy.deepcopy(reference)
    expected.load_state_dict(policy.lm.state_dict())  # so that only the settings can differ
    ids = torch.arange(3, 43)[None]  # [1, 40]
    with torch.no_grad():
        torch.testing.assert_close(policy.lm(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, AutoTokenizer])  # the policy's and vLLM's
def test_text_comes_back_from_the_tokens_that_the_model_learned(folder, kind):
    """Prevents lost characters, cut special tokens, and digits merged with the space or line break before them."""
    tokenizer = kind.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(TEXTS[0]) == "in ĊĊ 2 5 ĠĠ 3 7 Ġ = Ġ 6 2".split()
    assert tokenizer.tokenize(" 7<file_sep>in<step>") == ["Ġ", "7", "<file_sep>", "in", "<step>"]


def test_prompts_follow_the_files_template_and_completions_end_with_the_turn(folder, problems):
    """Prevents a prompt the model was never trained on, and completions that run on past <|im_end|>."""
    policy = load_policy(folder)
    assert policy.tokenizer.chat_template == TEMPLATE
    assert policy.tokenizer.decode(policy.encode(problems[0])).endswith("5<|im_end|>\n<|im_start|>assistant\n")
    assert policy.stop_ids == {2} and policy.tokenizer.convert_ids_to_tokens(2) == "<|im_end|>"
    names = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>", pad_token="<|pad|>")
    assert policy.tokenizer.special_tokens_map == names
    assert policy.decode([*policy.tokenizer("<step> 7")["input_ids"], 2]) == "<step> 7"


# ------------------------------------------------------------------------------------------------ what is refused


def refused(convert, capsys, *words):
    """The one line that tells why."""
    with pytest.raises(SystemExit) as stop:
        convert(*words)
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]  # after the progress bars of transformers
    assert stop.value.code == 2 and last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pre="qwen2"), "'qwen2'"),
        (dict(template=None), "no chat template"),
        (dict(template=TEMPLATE.replace("m.content + '<|im_end|>", "m.content + '")), "ends no turn with <|im_end|>"),
        (dict(skip=["up_proj"]), "weights"),
        (dict(extra="rope_freqs.weight"), "weights"),
    ],
)
def test_a_model_that_would_come_out_different_is_refused(weights, convert, tmp_path, capsys, changes, message):
    """Prevents a folder that loads and is not the file's model: other tokens, random weights, no end."""
    file = write_gguf(tmp_path / "small.gguf", weights, **changes)
    assert message in refused(convert, capsys, file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "the metadata has no tokens"),
        ({"merges": None, "token_type": 3}, "the metadata has no token_type and no merges"),
        ({"merges": ["no such"]}, "tokens and merges don't fit together"),
        ({"merges": ["one"]}, "tokens and merges don't fit together"),
        ({"merges": ["a b c"]}, "tokens and merges don't fit together"),
        ({"merges": [7]}, "tokens and merges don't fit together"),
        ({"tokens": [["a"]] * 9}, "tokens and merges don't fit together"),
        ({"eos_token_id": len(TOKENS)}, "the eos_token is number"),
        ({"padding_token_id": -1}, "the pad_token is number -1 of"),
        ({"eos_token_id": "two"}, "the eos_token is number two of"),
        ({"chat_template": "{% for"}, "the chat template fails"),
        ({"chat_template": "{{ 1 / 0 }}"}, "the chat template fails"),
        ({"chat_template": "{{ raise_exception('no\n\nway') }}"}, "the chat template fails: no"),
    ],
)
def test_hostile_metadata_is_one_line(changes, message):
    """Prevents a traceback out of tokenizers or Jinja, and a last token taken for number -1."""
    build_tokenizer = runpy.run_module("scripts.from_gguf")["build_tokenizer"]
    header = {"pre": "smollm", "tokens": TOKENS, "merges": MERGED, "chat_template": TEMPLATE, "eos_token_id": 2}
    header["token_type"] = [3] * 5 + [1] * (len(TOKENS) - 6) + [4]
    assert build_tokenizer(header).eos_token == "<|im_end|>"
    with pytest.raises(ValueError, match=message) as told:
        build_tokenizer({key: value for key, value in (header | changes).items() if value is not None})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("size", [0, 2, 10, 100, 300, 2_000, -1])
def test_a_torn_file_is_refused(weights, convert, tmp_path, capsys, size):
    """Prevents a traceback, or a model with holes, from a download that broke off."""
    file = write_gguf(tmp_path / "small.gguf", weights)
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file} is not a whole GGUF file" in refused(convert, capsys, file, tmp_path / "out")


def test_bad_input_is_one_line(weights, convert, tmp_path, capsys, monkeypatch):
    """Prevents tracebacks for wrong paths and a missing package, and a model that is written over."""
    file, text, out = write_gguf(tmp_path / "small.gguf", weights), tmp_path / "text", tmp_path / "out"
    text.write_text("no model at all", encoding="utf-8")
    assert "No such file" in refused(convert, capsys, tmp_path / "none.gguf", out)
    assert "not a whole GGUF file" in refused(convert, capsys, text, out)
    assert "folder" in refused(convert, capsys, file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'gguf" in refused(convert, capsys, file, out)
    out.mkdir()
    (out / "config.json").write_text("{}", encoding="utf-8")
    assert (
        "exists already" in refused(convert, capsys, file, out)
        and (out / "config.json").read_text(encoding="utf-8") == "{}"
    )


def test_a_folder_is_written_whole_or_not_at_all(weights, convert, tmp_path, capsys, monkeypatch):
    """Prevents a full disk from leaving half a model that the next `make smollm2` takes for a whole one."""

    def full(self, folder):
        raise OSError("disk full")

    file = write_gguf(tmp_path / "small.gguf", weights)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    assert "disk full" in refused(convert, capsys, file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]
