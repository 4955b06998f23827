"""Bad input on every command line: one line on stderr and exit code 2, before a model is loaded or a file is made."""

import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from test_loading import edit
from transformers import AutoModelForCausalLM, BertConfig, Gemma2Config, GPT2Config, MambaConfig, T5Config

from runtime.files import check_writable
from runtime.loading import load_policy
from runtime.weights import save_policy

HERE = Path(__file__).parent.parent

# a command line | a part of what it says; the files and models are those of `place`
CASES = """
ppo.py stray                                       | unexpected: stray (--help lists the options)
ppo.py --learning-rat 1                            | there is no option --learning-rat: did you mean --learning-rate?
ppo.py --lerning-rate=1                            | there is no option --lerning-rate: did you mean --learning-rate?
ppo.py --SEED 1                                    | there is no option --SEED: did you mean --seed?
ppo.py --nonsense                                  | there is no option --nonsense (--help lists the options)
ppo.py --serach mcts                               | did you mean --search?
ppo.py --resum runs/good                           | did you mean --resume?
ppo.py --sampels 8                                 | there is no option --sampels: did you mean --samples?
ppo.py -seed 1                                     | unexpected: -seed, 1
ppo.py --no-seed                                   | unexpected: --no-seed
ppo.py --test-before yes                           | unexpected: yes
ppo.py --tree.simulations 3                        | there is no option --tree.simulations: did you mean --simulations?
ppo.py --gae-lambda 0.9                            | there is no option --gae-lambda
ppo.py --distill visits                            | there is no option --distill
ppo.py --token-budget 99                           | there is no option --token-budget
ppo.py --force                                     | a new run has no use for --force: leave it out
ppo.py --seed                                      | --seed needs a value
ppo.py --seed --problems 8                         | --seed needs a value
ppo.py --seed=                                     | --seed is empty
ppo.py --out ''                                    | --out is empty
ppo.py --model ''                                  | --model is empty
ppo.py --seed 1.5                                  | --seed must be a whole number, not '1.5'
ppo.py --tokens 1e6                                | --tokens must be a whole number, not '1e6'
ppo.py --learning-rate fast                        | --learning-rate must be a number, not 'fast'
ppo.py --cutoff no                                 | --cutoff must be a number or None, not 'no'
ppo.py --cutoff -0.1                               | cutoff must be at least 0
ppo.py --cutoff 1.1                                | cutoff must be at most 1
ppo.py --seed -1                                   | seed must be from 0 to
ppo.py --seed 99999999999999999999999              | seed must be from 0 to
ppo.py --preset huge                               | preset must be one of tiny, qwen1.5b, post, not 'huge'
ppo.py --preset                                    | preset must be one of
ppo.py --search beam                               | method must be one of mcts, best-of-n, cispo, grpo, none, not
ppo.py --method beam                               | method must be one of mcts, best-of-n, cispo, grpo, none, not
ppo.py --search                                    | method must be one of
ppo.py --search mcts --method none                 | --search and --method are one option: leave one of them out
ppo.py --search cispo                              | this program runs mcts, none, not 'cispo'
ppo.py --split random                              | split must be one of multiset, post
ppo.py --lesson all                                | lesson must be one of best-path, best-answer,
ppo.py --sampler sglang                            | sampler must be one of auto, torch, vllm, not 'sglang'
ppo.py --dtype float16                             | dtype must be one of
ppo.py --quantize int8                             | quantize must be one of none, nf4
ppo.py --optimizer sgd                             | optimizer must be one of adamw, paged-adamw8bit
ppo.py --old-logprobs old                          | old_logprobs must be one of recorded, recomputed, truncated
ppo.py --loss dpo                                  | loss must be one of
ppo.py --loss ppo                                  | must be below 1, not 5.0: try --clip 0.2
ppo.py --clip 0                                    | clip must be above 0
ppo.py --normalize batch                           | normalize must be one of
ppo.py --device tpu                                | device must be one of auto, cpu, cuda, not 'tpu'
ppo.py --device cuda                               | no NVIDIA GPU is visible to PyTorch: pass --device cpu
ppo.py --search none --sampler vllm                | vLLM is not installed
ppo.py --sampler vllm                              | vLLM does not draw steps without replacement
ppo.py --size 1                                    | size must be from 2 to 5, not 1
ppo.py --size 6                                    | size must be from 2 to 5, not 6
ppo.py --problems 0                                | problems must be at least 1, not 0
ppo.py --test-samples 0                            | test_samples must be at least 1
ppo.py --micro-batch-tokens 0                      | micro_batch_tokens must be at least 1
ppo.py --steps -1                                  | steps must be at least 0
ppo.py --tokens 0                                  | the run would never end
ppo.py --learning-rate -1                          | learning_rate must be at least 0
ppo.py --value-learning-rate -1                    | value_learning_rate must be at least 0
ppo.py --learning-rate nan                         | learning_rate must be a finite number, not nan
ppo.py --kl-coefficient inf                        | kl_coefficient must be a finite number, not inf
ppo.py --gpu-memory -1                             | gpu_memory must be at least 0
ppo.py --gpu-memory 0.1                            | GB of GPU memory and has 0.10: no option makes it fit
ppo.py --temperature 0                             | temperature must be above 0
ppo.py --clip-gradient 0                           | clip_gradient must be above 0
ppo.py --checkpoints 0                             | checkpoints must be at least 1
ppo.py --reward sparse                             | reward must be one of dense, exact
ppo.py --dtype bfloat16                            | training all weights needs dtype float32
ppo.py --quantize nf4                              | 4-bit weights can't be trained: set lora_rank above 0
ppo.py --sampler vllm --quantize nf4 --lora-rank 8 | vLLM does not serve NF4 weights: set sampler to torch
ppo.py --search none --lesson steps                | none has no use for --lesson: leave it out
ppo.py --search none --step_tokens 2               | none has no use for --step_tokens: leave it out
ppo.py --search none --simulations 8               | none has no use for --simulations: leave it out
ppo.py --data nowhere.jsonl                        | nowhere.jsonl. Of a data set of Hugging Face, pass a file
ppo.py --data models                               | models needs one file test.jsonl, test.json or test.parquet
ppo.py --data empty.jsonl                          | empty.jsonl is empty: it holds no problem
ppo.py --data second.jsonl                         | second.jsonl, line 2: not a problem
ppo.py --data deep.jsonl                           | deep.jsonl, line 1: not a problem
ppo.py --data ''                                   | --data is empty
ppo.py --data second.jsonl --size 3                | --size has no effect here (--data brings its own problems)
ppo.py --data second.jsonl --train-problems=9      | --train-problems has no effect here
ppo.py --selection gumbel --c-puct 1               | --c-puct has no effect here (--selection gumbel
ppo.py --workers 1 --virtual_loss visit            | --virtual_loss has no effect here (with --workers 1
ppo.py --max-staleness 0                           | --max-staleness has no effect here (there is no --cluster)
ppo.py --clip 4                                    | --clip has no effect here (with --inner-steps 1
baselines.py --method cispo --evaluations 0 --eval-samples 2 | --eval-samples has no effect here
ppo.py --generators 2                              | several generators need a cluster
ppo.py --cluster ray                               | cluster must be one of none, local, auto
ppo.py --shards 99                                 | 16 problems a step can't be cut into 99 shards
ppo.py --simulations 0                             | simulations must be at least 1
ppo.py --children 0                                | children must be at least 1
ppo.py --c-puct inf                                | c_puct must be a finite number
ppo.py --prior best                                | prior must be one of mean, sum, count, uniform
ppo.py --search mcts --max-tokens 440              | 503 new tokens exceed the context of 512
ppo.py --max-tokens 500                            | new tokens exceed the context of 512
ppo.py --out empty.jsonl                           | empty.jsonl can't be written
ppo.py --out empty.jsonl/run                       | empty.jsonl/run can't be written
ppo.py --out /proc/run                             | /proc/run can't be written
ppo.py --resume                                    | --resume needs the folder of a run
ppo.py --resume=                                   | --resume needs the folder of a run
ppo.py --resume --force                            | --resume needs the folder of a run
ppo.py --resume nowhere                            | nowhere holds no run
ppo.py --resume=nowhere                            | nowhere holds no run
ppo.py --resume runs/words --out runs/other        | leave out --out
ppo.py --resume models/no-json                     | models/no-json/config.json is damaged
ppo.py --resume runs/words                         | seed must be from 0 to 4294967295, not 'one'
ppo.py --resume runs/list                          | temperature must be a finite number, not [1]
ppo.py --resume runs/choice                        | loss must be one of cispo, ppo, not ['ppo']
ppo.py --resume runs/tree                          | runs/tree/config.json is damaged
ppo.py --resume runs/null                          | runs/null/config.json is damaged
ppo.py --resume runs/topics                        | cispo has other topics than these
ppo.py --resume runs/good --problems 8             | (problems 16 there, 8 here): --force goes on
ppo.py --resume runs/good --preset post --force    | runs/good is a run of preset tiny
ppo.py --resume runs/good --method none            | runs/good is a run of mcts
ppo.py --resume runs/good --resume runs/words      | a resumed run has no use for --resume
ppo.py --resume runs/older                         | runs/older has other settings (min_p is no setting here)
ppo.py --model nowhere/at/all                      | there is no folder nowhere/at/all
ppo.py --model no/such                             | can't load 'no/such': no such folder, and not found
ppo.py --model empty.jsonl                         | is a file: pass the folder
ppo.py --model models/no-template                  | no chat template: use an instruct model
baselines.py                                       | pass --method best-of-n | cispo | grpo
baselines.py --method                              | pass --method
baselines.py --method mcts                         | pass --method
baselines.py --method beam                         | pass --method
baselines.py cispo                                 | pass --method
baselines.py --search cispo --problems 0           | problems must be at least 1
baselines.py --method cispo stray                  | unexpected: stray
baselines.py --resume=nowhere                      | nowhere holds no run
baselines.py --method grpo --clip 1                | with loss ppo clip is epsilon and must be below 1
baselines.py --method cispo --search mcts          | --search and --method are one option: leave one of them out
baselines.py --method cispo --samples 1            | cispo compares the samples of a problem
baselines.py --method grpo --samples 1             | grpo compares the samples of a problem
baselines.py --method best-of-n --samples 0        | samples must be at least 1
baselines.py --method best-of-n --lesson steps     | best-of-n has no use for --lesson
baselines.py --method cispo --simulations 8        | cispo has no use for --simulations: leave it out
ppo.py --search none --samples=64                  | none has no use for --samples: leave it out
ppo.py --min-p 0.3                                 | there is no option --min-p
baselines.py --method cispo --cutoff 1.5           | cutoff must be at most 1
baselines.py --method cispo --cutoff 1             | samples must be at least 2, cutoff below 1
baselines.py --method cispo --cutoff 0.3 --sampler vllm | vLLM does not draw steps without replacement
ppo.py --samples 64                                | mcts has no use for --samples
baselines.py --method grpo --loss cispo            | the loss of grpo is ppo: leave out loss
baselines.py --method cispo --no-value-gradient    | cispo has no use for --no-value-gradient
evaluate.py --search beam                          | search must be one of none, mcts, best-of-n, not 'beam'
evaluate.py --method beam                          | search must be one of none, mcts, best-of-n
evaluate.py --search mcts --method none            | --search and --method are one option
evaluate.py --search                               | search must be one of
evaluate.py assets/tiny stray                      | unexpected: stray
evaluate.py ''                                     | an argument is empty
evaluate.py --sample 8                             | there is no option --sample: did you mean --samples?
evaluate.py --samples                              | --samples needs a value
evaluate.py --preset tiny                          | there is no option --preset
evaluate.py --search mcts --tree.simulations 3     | did you mean --simulations?
evaluate.py --search mcts --min-p 0.3              | there is no option --min-p
evaluate.py --search mcts --budget 64,256          | --budget can't be '64,256'
evaluate.py --search mcts --selection gumbel       | gumbel takes no token_budget
evaluate.py --search mcts --cutoff 2               | cutoff must be at most 1
evaluate.py --simulations 8                        | --search none has no use for --simulations: leave it out
evaluate.py --search mcts --cutoff 0.3 --sampler vllm | vLLM does not draw steps without replacement
evaluate.py --sampler sglang                       | sampler must be one of
evaluate.py --sampler vllm                         | vLLM is not installed
evaluate.py --sampler vllm --quantize nf4          | vLLM does not serve NF4 weights
evaluate.py --kept 9                               | --kept has no effect here (a search alone keeps
evaluate.py --cache-gb 2                           | --cache-gb has no effect here
evaluate.py --search mcts --virtual-loss visit     | --virtual-loss has no effect here
evaluate.py --dtype float16                        | dtype must be one of
evaluate.py --device cuda                          | no NVIDIA GPU is visible
evaluate.py --problems 0                           | problems must be at least 1
evaluate.py --problems 999 --size 2                | distinct test problems of size 2; ask for fewer
evaluate.py --size 6                               | size must be from 2 to 5
evaluate.py --samples 0                            | samples must be at least 1
evaluate.py --search mcts --budget 0               | budget must be at least 1
evaluate.py --temperature nan                      | temperature must be a finite number
evaluate.py --max-tokens 0                         | max_tokens must be at least 1
evaluate.py --max-tokens 503                       | 10 prefix + 503 new tokens exceed the context of 512
evaluate.py --search mcts --simulations 0          | simulations must be at least 1
evaluate.py --search mcts --children 0             | children must be at least 1
evaluate.py --search mcts --prior nonsense         | prior must be one of
evaluate.py --rows 0                               | rows must be at least 1
evaluate.py --kept -1                              | kept must be at least 0
evaluate.py --cache-gb 0                           | cache_gb must be above 0
evaluate.py --seed -1                              | seed must be from 0
evaluate.py --out models                           | models is a folder: name a file
evaluate.py --out /proc/result.json                | /proc/result.json can't be written
evaluate.py --budget 1024                          | --search none has no use for --budget: leave it out
evaluate.py --search best-of-n --cutoff 0.3        | --search best-of-n has no use for --cutoff: leave it out
evaluate.py --search mcts --samples=16             | --search mcts has no use for --samples: leave it out
evaluate.py --data empty.jsonl --skip 820          | --skip has no effect here (--data brings its own problems)
evaluate.py --data nowhere.jsonl                   | there is no file nowhere.jsonl
evaluate.py --data models                          | models needs one file test.jsonl
evaluate.py --data empty.jsonl                     | empty.jsonl is empty: it holds no problem
evaluate.py --data second.jsonl                    | second.jsonl, line 2: not a problem
evaluate.py --data binary.jsonl                    | binary.jsonl, line 1: not a problem
evaluate.py --data deep.jsonl                      | deep.jsonl, line 1: not a problem
evaluate.py --data negative.jsonl                  | numbers and target must be positive integers
evaluate.py --data numberless.jsonl                | numbers and target must be positive integers
evaluate.py --data long.jsonl                      | new tokens exceed the context of 512
evaluate.py no/such                                | hf download no/such
evaluate.py models/no-template                     | no chat template: use an instruct model
evaluate.py models/no-system                       | /models/no-system': no system text here
evaluate.py models/bad-template                    | /models/bad-template'
evaluate.py models/no-end                          | no eos_token: answers would never end
evaluate.py models/no-tokenizer                    | /models/no-tokenizer'
evaluate.py models/no-json                         | /models/no-json'
evaluate.py models/unknown                         | /models/unknown'
evaluate.py models/mamba                           | mamba
evaluate.py models/conv                            | layers without attention
evaluate.py models/gpt2                            | gpt2 is no decoder of text like Llama
evaluate.py models/bert                            | bert is no decoder
evaluate.py models/t5                              | t5 is no decoder
evaluate.py models/gemma2                          | gemma2 changes its logits (final_logit_softcapping)
evaluate.py models/no-weights                      | holds no safetensors weights
evaluate.py models/adapter                         | its base model can't be found: there is no folder /no/base
evaluate.py models/adapter-json                    | adapter_config.json is damaged: it holds no JSON object
evaluate.py models/adapter-base                    | the adapter doesn't name its base model
evaluate.py models/shards                          | model.safetensors.index.json is damaged
evaluate.py models/map                             | model.safetensors.index.json is damaged
evaluate.py models/odd                             | /models/odd'
scripts/make_data.py --nonsense                    | there is no option --nonsense
scripts/make_data.py --train one                   | --train must be a whole number, not 'one'
scripts/make_data.py --train -1                    | train must be at least 0
scripts/make_data.py --size 6                      | size must be from 2 to 5, not 6
scripts/make_data.py --highest 1                   | highest must be from 2
scripts/make_data.py --plays 0                     | plays must be from 1
scripts/make_data.py --plays 99999999999999999999999 | plays must be from 1
scripts/make_data.py --preview -1                  | preview must be at least 0
scripts/make_data.py --split random                | split must be one of multiset, post
scripts/make_data.py --size 2 --highest 2          | distinct train problems of size 2; ask for fewer
scripts/make_data.py --out empty.jsonl             | empty.jsonl can't be written
experiments/pretrain.py --steps 0                  | steps must be at least 1
experiments/pretrain.py --batch 0                  | batch must be at least 1
experiments/pretrain.py --width 513                | width must be at most 512
experiments/pretrain.py --warmup 0                 | warmup must be at least 1
experiments/pretrain.py --save-every 0             | save_every must be at least 1
experiments/pretrain.py --learning-rate inf        | learning_rate must be a finite number
experiments/pretrain.py --on-target 2              | on_target must be at most 1
experiments/pretrain.py --rarity nan               | rarity must be a finite number
experiments/pretrain.py --largest-result 51        | largest_result must be at least 52
experiments/pretrain.py --hidden 33                | hidden must be a multiple of 32
experiments/pretrain.py --layers 0                 | layers must be at least 1
experiments/pretrain.py --size 1                   | size must be from 2 to 5
experiments/pretrain.py --out empty.jsonl          | empty.jsonl can't be written
experiments/plots.py pie models                    | pie
experiments/plots.py curves nowhere                | there is no nowhere
experiments/plots.py curves models nowhere         | there is no nowhere
experiments/plots.py curves models                 | none of the folders holds a run
experiments/plots.py curves runs/words --out models | none of the folders holds a run
ppo.py --resume runs/good --samples 8              | mcts has no use for --samples
experiments/plots.py search empty.jsonl --out models.png | models.png is a folder: name a file
experiments/plots.py search models                 | search wants files, not folders like models
experiments/plots.py tree models                   | models holds no trees
experiments/plots.py scores scores.json models     | scores wants files, not folders like models
experiments/plots.py search scores.json --out curves | out must end in .png, .pdf or .svg, not 'curves'
experiments/plots.py scores scores.json --out scores.png | scores has no use for --out: leave it out
experiments/plots.py search scores.json --x seconds | search has no use for --x: leave it out
experiments/plots.py search scores.json            | scores.json holds no scores
experiments/plots.py tree nowhere.json             | nowhere.json
experiments/plots.py tree second.jsonl             | holds no trees
experiments/plots.py tree deep.jsonl               | holds no trees
experiments/plots.py search nowhere.json           | nowhere.json
experiments/plots.py search models/adapter-json/config.json | config.json
experiments/oracle.py                              | name at least one model
experiments/oracle.py no/such --samples 0          | samples
experiments/oracle.py models/no-template no/such   | hf download no/such
experiments/study.py guess                         | guess
experiments/study.py tune --methods dpo            | dpo
experiments/study.py tune --jobs 0                 | jobs must be at least 1
experiments/study.py tune --seeds 0                | seeds must be at least 1
scripts/doctor.py --verbose                        | doctor.py takes no options
benchmarks/speed.py --rows 4                       | rows must be at least 8
benchmarks/speed.py --rows                         | rows needs a value
benchmarks/speed.py --threads 0                    | threads must be at least 1
benchmarks/speed.py --repeats 0                    | repeats must be at least 1
benchmarks/speed.py --children 0                   | children must be at least 1
benchmarks/speed.py --out models                   | models is a folder: name a file
benchmarks/speed.py --only training                | only must be
benchmarks/training.py --models big                | models must be
benchmarks/training.py --kit 0                     | kit must be at least 1
benchmarks/training.py --trl 8                     | trl must be at least 16
benchmarks/scaling.py --trees 0                    | trees must be at least 1
benchmarks/game.py --problems 0                    | problems must be at least 1
benchmarks/learning.py --score 0                   | score must be above 0
benchmarks/shares.py --rows 4                      | rows must be at least 8
benchmarks/trials.py --trials fp8                  | trials must be
benchmarks/memory.py --length 512                  | length must be at least 513
benchmarks/memory.py --length 99999                | length must be at most 32768
scripts/warm_up.py /no/such new                    | there is no folder /no/such
scripts/warm_up.py assets/tiny models              | models exists already
scripts/warm_up.py assets/tiny new --steps 0       | steps must be at least 1
scripts/warm_up.py assets/tiny new --device tpu    | device must be auto, cpu or cuda
benchmarks/one_gpu.py                              | no NVIDIA GPU is visible
benchmarks/one_gpu.py --device cpu --caps 8 nan    | caps must be a finite number
benchmarks/one_gpu.py --device cpu --steps 1       | steps must be at least 2
benchmarks/one_gpu.py --device cpu --samplers sglang | samplers must be one of torch, vllm
benchmarks/one_gpu.py --device cpu --model /no/such | there is no folder /no/such
benchmarks/long_haul.py --rows 9                   | rows must be at least 10
benchmarks/long_haul.py --steps 19                 | steps must be at least 20
benchmarks/long_haul.py --out models               | models exists already
benchmarks/random_qwen.py                          | missing: PATH folder
benchmarks/random_qwen.py new --heads 5            | a head's width must be whole and even
benchmarks/random_qwen.py new --vocabulary 100     | vocabulary must be at least 259
benchmarks/random_qwen.py new --dtype int8         | dtype must be one of
scripts/cluster_test.py --alone 1                  | alone must be at least 2
scripts/cluster_test.py --generators 7             | 7 generators, but at most 6 shards in work
scripts/cluster_test.py --max-staleness -1         | max_staleness must be at least 0
scripts/cluster_test.py --out models               | models exists already
scripts/crash_test.py --runs 0                     | runs must be at least 1
scripts/crash_test.py --kills -1                   | kills must be at least 0
scripts/crash_test.py --out models                 | models exists already
scripts/from_gguf.py                               | missing: PATH file
scripts/from_gguf.py nowhere.gguf new              | nowhere.gguf
scripts/from_gguf.py empty.jsonl new               | empty.jsonl is not a whole GGUF file
scripts/from_gguf.py empty.jsonl models            | models exists already
scripts/from_gguf.py empty.jsonl empty.jsonl/new   | empty.jsonl/new can't be written
"""
CASES = [[part.strip() for part in case.split(" | ", 1)] for case in CASES.strip().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint):
    """A folder with bad files, and models in folders without weights: what loads them fails the test."""
    place = tmp_path_factory.mktemp("place")
    for name, text in {
        "empty": b"",
        "second": b'{"numbers": [1, 2], "target": 3}\n{"numbers": [1, 2]}\n',
        "binary": b"\xff\xfe\x00",
        "deep": b"[" * 100_000,
        "negative": b'{"numbers": [1, -2], "target": 3}',
        "numberless": b'{"numbers": [], "target": 3}',
        "long": b'{"numbers": [%s], "target": 3}' % b", ".join([b"1"] * 480),
    }.items():
        (place / f"{name}.jsonl").write_bytes(text)

    (place / "models.png").mkdir()
    (place / "scores.json").write_text(
        '{"scores": [], "model": "a", "search": "mcts", "children": 2}', encoding="utf-8"
    )
    for name, settings in {
        "words": '{"seed": "one", "tree": {}}',
        "list": '{"learning": {"temperature": [1]}, "tree": {}}',
        "choice": '{"learning": {"loss": ["ppo"]}, "tree": {}}',
        "good": '{"seed": 1}',
        "tree": '{"tree": 3}',
        "null": '{"learning": null}',
        "topics": '{"method": "cispo"}',
        "older": '{"min_p": 0.3}',
    }.items():
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "config.json").write_text(settings, encoding="utf-8")

    def model(name, **changes):
        folder = shutil.copytree(checkpoint, place / "models" / name)
        (folder / "model.safetensors").write_bytes(b"")
        edit(folder / "config.json", **changes)
        return folder

    (model("no-template") / "chat_template.jinja").unlink()
    (model("no-system") / "chat_template.jinja").write_text(
        "{{ raise_exception('no system text here') }}", encoding="utf-8"
    )
    (model("bad-template") / "chat_template.jinja").write_text("{% for", encoding="utf-8")
    edit(model("no-end") / "tokenizer_config.json", eos_token=None)
    (model("no-tokenizer") / "tokenizer.json").write_text("{", encoding="utf-8")
    (model("no-json") / "config.json").write_text("{", encoding="utf-8")
    (model("no-weights") / "model.safetensors").unlink()
    (model("shards") / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    (model("map") / "model.safetensors.index.json").write_text('{"weight_map": []}', encoding="utf-8")
    model("unknown", model_type="made-up")
    model("odd", hidden_size="wide")
    model("conv", layer_types=["full_attention", "conv"])
    others = dict(mamba=MambaConfig, gpt2=GPT2Config, bert=BertConfig, t5=T5Config, gemma2=Gemma2Config)
    for name, config in others.items():
        config().save_pretrained(model(name))
    save_policy(load_policy(checkpoint, lora_rank=2), place / "models" / "adapter")
    shutil.copytree(place / "models" / "adapter", place / "models" / "adapter-json")
    edit(place / "models" / "adapter" / "adapter_config.json", base_model_name_or_path="/no/base")
    (place / "models" / "adapter-json" / "adapter_config.json").write_text("{", encoding="utf-8")
    shutil.copytree(place / "models" / "adapter", place / "models" / "adapter-base")
    edit(place / "models" / "adapter-base" / "adapter_config.json", base_model_name_or_path=3)
    return place


@pytest.mark.parametrize(("command", "message"), CASES, ids=[command for command, _ in CASES])
def test_bad_input_is_one_line(command, message, place, monkeypatch, capsys):
    """Prevents a traceback, and an error that comes after minutes of loading or hours of work."""
    program, *args = shlex.split(command)
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", [program, *args])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("runtime.samplers.find_spec", lambda name: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / program), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("ppo.py --help", "--simulations"),
        ("ppo.py -h --nonsense --problems 0", "--simulations"),
        ("ppo.py --help --preset huge --search beam", "--simulations"),
        ("ppo.py --search=none --help-all", "--value-gradient"),
        ("baselines.py --help", "--samples"),
        ("baselines.py --search grpo --help-all", "--clip"),
        ("evaluate.py --help", "--samples"),
        ("evaluate.py --search mcts --help", "--simulations"),
        ("evaluate.py --help --search best-of-n", "--budget"),
    ],
)
def test_help_is_answered_whatever_else_is_asked(command, option, monkeypatch, capsys):
    """Prevents a student who asks for help from being told of another mistake first, or of another method's options."""
    program, *args = shlex.split(command)
    monkeypatch.setattr("sys.argv", [program, *args])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / program), run_name="__main__")
    out, error = capsys.readouterr()
    assert stop.value.code in (0, None) and not error
    assert option in out and ("--simulations" in out) == (option == "--simulations")


def test_what_can_be_written_is_not_refused(tmp_path):
    """Prevents a refusal of folders that are only missing, and a check that leaves something behind."""
    check_writable(tmp_path / "new" / "deeper" / "result.json")
    check_writable(tmp_path / "new" / "run", folder=True)
    check_writable(tmp_path, folder=True)
    assert not list(tmp_path.iterdir())
