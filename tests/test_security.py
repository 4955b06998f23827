"""Tests that data never runs as code: checkpoints and models are traps here, and the rules against the rest are on."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ppo
from experiments.pretrain import PretrainConfig, pretrain
from runtime import cli, files
from runtime.loading import load_policy
from runtime.weights import VALUE_HEAD, save_policy

HERE = Path(__file__).parent.parent


class Trap:
    """Its pickle makes a file when it is loaded without care."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self):
        return open, (str(self.sprung), "w")


@pytest.fixture
def trap(tmp_path):
    """The bytes of an optimiser's state with a trap in it, and the file that the trap makes."""
    file, sprung = tmp_path / "trap.pt", tmp_path / "sprung"
    torch.save({"state": Trap(sprung), "param_groups": []}, file)
    torch.load(file, weights_only=False)  # noqa: TID251
    assert sprung.exists(), "a trap that does not work proves nothing"
    sprung.unlink()
    return file.read_bytes(), sprung


def refused(main, sprung, capsys):
    """The one line that a program ends with; the trap has not sprung."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.command(main)
    (message,) = re.findall("^error: .*", capsys.readouterr().err, re.M | re.S)
    assert stop.value.code == 2 and message.count("\n") == 1 and not sprung.exists()
    return message


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        (0, "optimizer.pt"),
        (0, "random.pt"),
        (0, "model.safetensors"),
        (0, VALUE_HEAD),
        (2, "adapter_model.safetensors"),
    ],
)
def test_a_hostile_checkpoint_is_refused(trap, tiny_config, capsys, rank, name):
    """Prevents --resume of somebody's run from running their code, and a traceback."""
    config = tiny_config("none", lora_rank=rank, tokens=0, steps=1)
    ppo.train(config, ppo.collect_samples)
    file = config.folder / "checkpoint" / name
    file.write_bytes(trap[0])
    files.seal(config.folder / "checkpoint")  # a hostile checkpoint has the right sums
    message = refused(lambda: ppo.train(config, ppo.collect_samples, resume=True), trap[1], capsys)
    assert message.startswith(f"error: {file} can't be read as plain tensors")


def test_a_hostile_checkpoint_of_the_pretraining_is_refused(trap, tmp_path, capsys):
    """Prevents the same in `experiments.pretrain`, which goes on with what it finds in --out."""
    (tmp_path / "pretrain.pt").write_bytes(trap[0])
    message = refused(lambda: pretrain(PretrainConfig(out=tmp_path)), trap[1], capsys)
    assert message.startswith(f"error: {tmp_path}/pretrain.pt can't be read as plain tensors")


@pytest.mark.parametrize("place", ["bin", "beside", "index", "safetensors", "value head", "adapter"])
def test_a_hostile_model_is_refused(trap, checkpoint, tmp_path, capsys, place):
    """Prevents pickled weights from being read, whatever they are called and whatever lies beside them."""
    model = tmp_path / "model"
    if place == "adapter":
        save_policy(load_policy(checkpoint, lora_rank=2), model)
    else:
        shutil.copytree(checkpoint, model)
    weights = model / "model.safetensors"
    names = {"safetensors": weights.name, "value head": VALUE_HEAD, "adapter": "adapter_model.safetensors"}
    hostile = model / names.get(place, "pytorch_model.bin")
    if place in ("bin", "beside", "index"):
        weights.rename(model / ("kept" if place == "bin" else "other.safetensors"))
    if place == "index":
        index = {"metadata": {}, "weight_map": {"lm_head.weight": hostile.name}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    hostile.parent.mkdir(exist_ok=True)
    hostile.write_bytes(trap[0])
    message = refused(lambda: load_policy(model), trap[1], capsys)
    assert str(model) in message and (place not in ("bin", "index") or "pickled ones (.bin) are not read" in message)


SINS = {
    "S102": "exec(text)",
    "S301": "pickle.loads(text)",
    "S307": "eval(text)",
    "S602": "subprocess.run(text, shell=True)",
    "S605": "os.system(text)",
    "TID251": "torch.load(text)",
}


def test_ruff_forbids_what_runs_text_as_code():
    """Prevents these rules from being switched off, and with them the scan that is part of `make test`."""
    code = "\n".join(["import os", "import pickle", "import subprocess", "import torch", "text = ''", *SINS.values()])
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--stdin-filename", "new.py", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=HERE, encoding="utf-8")
    assert SINS.keys() <= {found["code"] for found in json.loads(done.stdout)}


def test_no_option_that_lets_a_model_run_code_is_used():
    """Prevents what ruff has no rule for: options of torch, transformers and numpy that trust a file."""
    careless = r"(trust_remote_code|allow_pickle)\W+\b(?!False)|(weights_only|use_safetensors)\W+\b(?!True)"
    files = {file for kind in ("*.py", "*/*.py", "*/*.ipynb") for file in HERE.glob(kind)} - {Path(__file__)}
    read = {"policy.py", "runtime/loading.py", "experiments/pretrain.py", "notebooks/04_results.ipynb"}
    assert {HERE / name for name in read} <= files
    assert not [
        (file.name, found) for file in files if (found := re.search(careless, file.read_text(encoding="utf-8")))
    ]
