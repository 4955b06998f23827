"""Tests of loading.py: what loads, and the one line that what can't be loaded gets."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from countdown import Problem
from runtime.loading import load_policy, locate, pick_device
from runtime.weights import save_policy


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture
def no_network(monkeypatch):
    """Any look-up of a host and any connection fails the test."""
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *args, **options: pytest.fail(f"network: {args}"))


def refused(model):
    """The one line that says why `model` can't be loaded."""
    with pytest.raises(ValueError) as error:
        load_policy(model)
    assert "\n" not in str(error.value) and str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "~/no", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name, no_network):
    """Prevents a look-up of a path that can't be a hub name, and advice about downloads for a typo."""
    assert refused(name) == f"there is no folder {name}"


@pytest.mark.parametrize("name", ["no/such", "nosuch"])
def test_a_missing_model_is_told_in_one_line(name, no_network):
    """Prevents a traceback of transformers where a sentence helps: the hub is out of reach, or has no such model."""
    told = refused(name)
    assert told.startswith(f"can't load '{name}': no such folder, and not found on the Hugging Face hub")
    assert f"hf download {name} --local-dir FOLDER; then pass the folder" in told


def test_what_is_no_model_folder_is_told_with_what_to_do(tmp_path, checkpoint, no_network):
    """Prevents errors of transformers about files that nobody has heard of: GGUF, a file, an empty or another folder,
    pickled weights, a run that has not ended."""
    gguf, folder, other, run, pickled = (tmp_path / name for name in ("m.gguf", "q4", "other", "run", "pickled"))
    for path in (folder, other, run / "checkpoint"):
        path.mkdir(parents=True)
    for path in (gguf, folder / "model-q4.gguf", *(other / name for name in "edcba")):
        path.write_bytes(b"GGUF")
    (run / "config.json").write_text("{}", encoding="utf-8")
    shutil.copytree(checkpoint, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    convert = "is GGUF: convert it first, python -m scripts.from_gguf FILE.gguf FOLDER"
    assert refused(gguf) == f"{gguf} {convert}" and refused(folder) == f"{folder} {convert}"
    assert refused("not-there.gguf") == f"not-there.gguf {convert}"
    assert refused(folder / "model-q4.gguf").endswith(convert)
    weights = checkpoint / "model.safetensors"
    assert refused(weights) == f"{weights} is a file: pass the folder of a Hugging Face model"
    assert refused(other) == f"{other} is no model folder: it has no config.json (it holds a, b, c, d)"
    assert refused(tmp_path / "run" / "checkpoint").endswith("it has no config.json (it holds nothing)")
    assert f"--resume {run}, or pass {run}/checkpoint" in refused(run)
    assert refused(pickled) == f"{pickled} holds no safetensors weights; pickled ones (.bin) are not read"


def test_a_folder_beside_a_gguf_file_is_used(tmp_path, checkpoint):
    """Prevents a refusal of a model whose folder also holds its GGUF file."""
    both = shutil.copytree(checkpoint, tmp_path / "both")
    (both / "model.gguf").write_bytes(b"GGUF")
    assert locate(both) == (str(both), str(both))


@pytest.mark.parametrize("broken", ["cut", "shape", "json", "type", "tokenizer", "tensor"])
def test_a_broken_model_is_told_in_one_line(tmp_path, checkpoint, no_network, broken):
    """Prevents a traceback for a download that was cut off, and for a model that transformers does not know."""
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    if broken == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    elif broken == "shape":
        edit(folder / "config.json", hidden_size=32)
    elif broken == "json":
        (folder / "config.json").write_text("{", encoding="utf-8")
    elif broken == "type":
        edit(folder / "config.json", model_type="made-up")
    elif broken == "tensor":
        weights = load_file(folder / "model.safetensors")
        weights.pop("model.norm.weight")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        (folder / "tokenizer.json").unlink()
    assert refused(folder).startswith(f"can't load '{folder}': ")


def test_adapters_are_told_apart_from_their_base(tmp_path, checkpoint, no_network):
    """Prevents an adapter that loads without its weights or its base, and an error that blames the wrong folder."""
    save_policy(load_policy(checkpoint, lora_rank=2), tmp_path / "a")
    for base, why in {
        None: f"{tmp_path}/a: the adapter doesn't name its base model (adapter_config.json)",
        "/no/base": f"{tmp_path}/a: its base model can't be found: there is no folder /no/base",
        "model.gguf": f"{tmp_path}/a: its base model can't be found: model.gguf is GGUF: convert it first",
        "Qwen/no-such": f"{tmp_path}/a: its base model can't be found: can't load 'Qwen/no-such': no such folder",
    }.items():
        edit(tmp_path / "a" / "adapter_config.json", base_model_name_or_path=base)
        assert refused(tmp_path / "a").startswith(why)
    assert "hf download Qwen/no-such --local-dir FOLDER" in refused(tmp_path / "a")
    edit(tmp_path / "a" / "adapter_config.json", base_model_name_or_path=str(checkpoint))
    (tmp_path / "a" / "tokenizer.json").unlink()
    assert load_policy(tmp_path / "a").encode(Problem((1, 2), 3)) == load_policy(checkpoint).encode(Problem((1, 2), 3))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"torn")
    assert refused(tmp_path / "a").startswith(f"can't load '{tmp_path}/a': ")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    assert "the adapter has no weights" in refused(tmp_path / "a")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_folder_stands_for_its_final_policy(tmp_path, checkpoint, monkeypatch, rank):
    """Prevents an evaluation of another policy than the run's: not the base, not the checkpoint. A relative name is
    resolved: what is written into config.json or an adapter holds from any directory."""
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    policy = load_policy(checkpoint, lora_rank=rank)
    save_policy(policy, tmp_path / "run" / "policy")
    final = str(tmp_path / "run" / "policy")
    assert locate(tmp_path / "run") == locate(final) == (final, str(checkpoint) if rank else final)
    monkeypatch.chdir(tmp_path)
    assert locate("run") == (final, str(checkpoint) if rank else final)
    assert load_policy("run").lora == bool(rank)


@pytest.mark.parametrize("model_type", ["seed_oss", "made-up"])
def test_code_that_comes_with_a_model_never_runs(tmp_path, checkpoint, model_type, no_network):
    """Prevents a model folder that runs its own Python: the class of transformers is taken, or the folder refused."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    names = {f"Auto{kind}": "evil.Evil" for kind in ("Config", "Model", "ModelForCausalLM")}
    edit(folder / "config.json", model_type=model_type, auto_map=names)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    if model_type == "seed_oss":
        assert type(load_policy(folder).lm).__name__ == "SeedOssForCausalLM"
    else:
        assert "contains custom code" in refused(folder)
    assert not (tmp_path / "ran").exists()


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
    saved = json.loads((bare / "tokenizer_config.json").read_text(encoding="utf-8"))
    del saved["pad_token"]
    (bare / "tokenizer_config.json").write_text(json.dumps(saved), encoding="utf-8")
    policy = load_policy(bare)
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == 1


def test_device_auto_is_the_gpu_where_there_is_one(monkeypatch):
    """Prevents a long run on the CPU beside an idle GPU, and a traceback where there is none."""
    for present, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert pick_device("auto") == device and pick_device(device) == device and pick_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device cpu"):
        pick_device("cuda")
