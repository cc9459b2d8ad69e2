"""Tests: answers in a batch that is refilled, a step that waits for nothing, --offload."""

# --- copied fixtures
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import data
import llada
import maskft
from data import IGNORE, Example, UserError
from tiny import world

HERE = Path(__file__).parent
torch.set_num_threads(1)


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def forked(script, *flags, status=0, before=lambda: None, kill_after=None):
    """The same by the main() of a module in a fork, which saves the seconds of importing.

    `before` is called first, in the fork. No end is a traceback; that of a fork which is killed
    after some seconds may be any."""

    def body():
        gc.freeze()  # what the parent left, process groups for one, is not for the child to free
        os.dup2(log.fileno(), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = log
        sys.argv = [f"{script.__name__}.py", *map(str, flags)]
        data.huggingface_hub.constants.HF_HUB_OFFLINE = True
        before()
        maskft.entry_point(script.main)

    with tempfile.TemporaryFile("w+") as log:
        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
        process.join(kill_after or 100)
        process.kill()
        process.join()
        log.seek(0)
        printed = log.read()
    assert kill_after or process.exitcode == status, printed
    assert "Traceback" not in printed, printed
    return printed


def losses(out):
    """What has to be the same where a run is repeated."""
    compared = ("step", "epoch", "loss", "lr", "grad_norm")
    lines = jsonl(out / "metrics.jsonl")
    return [[line[name] for name in compared] for line in lines if "loss" in line]


def cut(ids, stop_ids):
    """The ids before the first stop."""
    return list(itertools.takewhile(lambda token: token not in stop_ids, ids))


SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama(**changes):
    """The raw config of a small Llama."""
    return {**SIZES, "model_type": "llama", **changes}


def random_model(**changes):
    """A small Llama with random weights, norms and biases included."""
    torch.manual_seed(0)
    model = maskft.Model(maskft.parse_config(llama(**changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


MASK = 38
EOS = 39
EOT = 37

# the config.json of LLaDA-8B-Instruct, made small
RAW = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 40,
    "eos_token_id": EOS,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 256,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": EOS,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 40,
    "weight_tying": False,
}


def tiny_llada():
    """A random LLaDA with varied answers, its logits so far apart that rounding decides none."""
    model = maskft.Model(maskft.parse_config(RAW)).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1
            std = 1.0 if is_norm or "embed" in name else 2.0 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * std + is_norm)
        model.embed.weight[MASK] *= 0.1  # what surrounds a mask decides, more than that it is one
        model.head.weight[MASK] = 0.0
    return model


@pytest.fixture
def group():
    """A group of one process."""
    maskft.start_processes()
    yield
    maskft.dist.destroy_process_group()


def settings(**given):
    """The Settings of a command line without flags, but for those given."""
    args = maskft.arguments("", maskft.METHODS).parse_args([])
    models = ("tiny", "large")
    usual, *_ = maskft.given_settings(args, maskft.METHODS, models, torch.device("cpu"))
    return dataclasses.replace(usual, **given)


def run_of(tokenizer, documents=(), model=None, method="masked", **given):
    """A Run that has not begun."""
    return maskft.Run(
        settings=settings(**given),
        method=maskft.METHODS[method],
        device=torch.device("cpu"),
        directory=HERE / "tiny",
        out=None,
        tokenizer=tokenizer,
        dataset=data.Dataset("own", list(documents), []),
        model=model,
        stop=[],
    )


SHORT = shlex.split("--model tiny --data bio:6 --method masked --batch-size 4 --epochs 3")
SHORT += ["--eval-at", "0", "1"]


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


# --- end

# ------------------------------------------------------------------------------------------ answers


@torch.no_grad()
def plain_loop(model, prompts, length):
    """Greedy answers from whole forwards, a prompt at a time."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(length):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        answers.append(ids[len(prompt) :])
    return answers


def test_rows_are_refilled_and_answers_are_those_of_the_plain_loop():
    """In any batch; no row is computed without need, none beyond the budget is held."""
    model = random_model(tie_word_embeddings=True)
    rng = random.Random(0)
    lengths = [rng.choice([1, 2, 3, 9, 20]) for _ in range(18)] + [90, 1]
    prompts = [[rng.randrange(300) for _ in range(length)] for length in lengths]
    plain = plain_loop(model, prompts, 16)
    forwards = []
    beside = set()  # budgets with which prompts were computed while other rows went on
    real = maskft.KVCache.place

    def place(cache, first, past, *more):
        forwards.append((cache.rows, cache.size, first, past))
        assert first + len(past) <= cache.rows
        real(cache, first, past, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskft.KVCache, "place", place)
        for stops in ([], rng.sample(range(300), 15), [row[0] for row in plain]):
            expected = [cut(row, stops) for row in plain]
            needed = sum(min(16, len(row) + 1) for row in expected)
            for tokens in (1, 200, 400, 9216):
                forwards.clear()
                found = maskft.generate(model, prompts, 16, stops, batch_tokens=tokens)
                assert found == expected
                assert sum(len(past) for *_, past in forwards) == needed
                for rows, size, first, past in forwards:
                    assert rows == 1 or rows * size <= tokens
                    beside |= {tokens} if first and not any(past) else set()
    assert beside == {200, 400}
    ended = []
    assert maskft.generate(model, prompts, 16, on_answer=ended.append) == plain
    assert sum(ended) == len(prompts)
    assert maskft.generate(model, [], 16) == []


REFUSED = [
    ({"max_new_tokens": 254}, "257 tokens are more than the model takes, 256"),
    ({"max_new_tokens": 0}, "max_new_tokens is at least 1.*found 0, 0.0, 1.0"),
    ({"temperature": -1.0}, "found 128, -1.0, 1.0"),
    ({"temperature": 1.0, "top_p": 0.0}, "found 128, 1.0, 0.0"),
    ({"temperature": 1.0, "top_p": 1.5}, "found 128, 1.0, 1.5"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_what_cannot_be_generated_is_refused_before_anything(given, message):
    model = random_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    with pytest.raises(UserError, match=message):
        maskft.generate(model, [[5], [6, 7, 8]], **given)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_draws_have_the_distribution_of_the_softmax(temperature, top_p):
    """The first token, and the second behind the usual first one: chi-squared of 4,000 draws."""
    model = random_model(vocab_size=12)
    prompts = [[3, 4]] * 4000
    how = {"temperature": temperature, "top_p": top_p}
    state = torch.get_rng_state()
    answers = [
        maskft.generate(model, prompts, 2, **how, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = answers
    assert first == again != other
    tokens = [answer[0] for answer in first]
    usual = max(range(12), key=tokens.count)
    behind = [answer[1] for answer in first if answer[0] == usual]
    assert len(behind) > 300
    for prompt, drawn in (([3, 4], tokens), ([3, 4, usual], behind)):
        with torch.no_grad():
            expected = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1).tolist()
        ranked = sorted(range(12), key=lambda token: -expected[token])
        kept = next(n for n in range(1, 13) if sum(expected[i] for i in ranked[:n]) > top_p - 1e-6)
        assert set(drawn) <= set(ranked[:kept]) and (kept < 12) == (top_p < 1)
        total = sum(expected[i] for i in ranked[:kept])
        counts = [(drawn.count(i), len(drawn) * expected[i] / total) for i in ranked[:kept]]
        counts = [(found, mean) for found, mean in counts if mean > 5]
        squared = sum((found - mean) ** 2 / mean for found, mean in counts)
        assert squared < len(counts) + 4 * math.sqrt(2 * len(counts))


def test_a_diffusion_model_answers_in_batches_of_the_same_budget(monkeypatch):
    model = tiny_llada()
    prompts = [[1] * 20, [2] * 9, [3] * 8, [4, 5], [6]]
    whole = llada.sample(model, prompts, 8, 8, 4, stop_ids=(EOT,))
    batches = []
    real = llada.sample

    def sample(model, prompts, *given, **more):
        batches.append([len(prompt) for prompt in prompts])
        return real(model, prompts, *given, **more)

    monkeypatch.setattr(llada, "sample", sample)
    monkeypatch.setattr(maskft, "ANSWER_BATCH_TOKENS", 36)
    asked = type("Tokenizer", (), {"stop_ids": (EOT,)})
    done = []
    assert llada.answer(model, asked, prompts, 8, on_answer=done.append) == whole
    assert batches == [[20], [9, 8], [2, 1]] and done == [1, 2, 2]


# ------------------------------------------------------------------------------------------- a step


class Record(TorchDispatchMode):
    """Names of operators that wait for a GPU, or whose shape only its values tell."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._opname in self.WAITING:
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["masked", "llada"])
def test_a_step_waits_for_nothing(method, group, tokenizer, monkeypatch):
    """Labels are found once a micro-batch, where they are: on the CPU. Then no number is read."""
    documents, _ = world.make_bio(6)
    monkeypatch.setattr(maskft, "METHODS", maskft.METHODS | llada.METHODS)
    mask = [0.05, 0.95]
    run = run_of(tokenizer, documents, method=method, micro_batch_tokens=120, mask_ratio=mask)
    with torch.device("meta"):
        run.model = maskft.Model(maskft.read_config(maskft.find_model("tiny")))
    run.model.config.causal = method == "masked"
    maskft.shard(run.model, run.device, torch.float32)
    maskft.load_weights(run.model, run.directory, run.device)
    run.optimizer = maskft.make_optimizer(run.model, 1e-3)
    examples = [maskft.build(run, number, epoch=0) for number in range(6)]
    parts = len(maskft.micro_batches(examples, 120, 0, 1))
    recorder = Record()
    real = run.optimizer.step
    monkeypatch.setattr(run.optimizer, "step", lambda: (recorder.names.append("step"), real()))
    with recorder:
        loss_and_norm = maskft.update(run, examples, 1e-3)
    assert parts > 1 and recorder.names == ["nonzero"] * parts + ["step"]
    assert (loss_and_norm > 0).all()


def test_labels_stay_on_the_cpu(monkeypatch):
    """On `meta`, which has no values to find anything by; copies to it do not wait."""
    monkeypatch.setattr(maskft.RMSNorm, "forward", torch.nn.RMSNorm.forward)  # no autocast there
    with torch.device("meta"):
        model = maskft.Model(maskft.parse_config(llama()))
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function._opname == "_to_copy" and args[0].device.type == "cpu":
                copies.append(kwargs.get("non_blocking"))
            return function(*args, **kwargs)

    labels = torch.tensor([[IGNORE, 5, IGNORE, 7]])
    with Copies():
        ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
        loss = model(ids, labels=labels, weights=torch.ones(1))
    loss.backward()
    assert loss.shape == () and copies == [True] * 4


def test_a_batch_without_padding_needs_no_mask(group):
    """Of a diffusion model, which otherwise gets one; the loss is the same."""
    pair = [Example([5, MASK, 7], [IGNORE, 6, IGNORE], 1.0, 1.0)] * 2
    longer = Example([5, MASK], [IGNORE, 6], 1.0, 1.0)
    model = tiny_llada()
    batch = data.collate(pair, EOS)
    assert batch["key_mask"] is None and data.collate([], EOS)["key_mask"] is None
    assert data.collate([*pair, longer], EOS)["key_mask"].sum() == 8
    masked = model(**batch | {"key_mask": torch.ones(2, 3, dtype=torch.bool)})
    assert model(**batch).item() == pytest.approx(masked.item(), rel=1e-5)


def test_each_document_is_encoded_once(monkeypatch):
    tokenizer = data.load_tokenizer(HERE / "tiny")
    run = run_of(tokenizer, world.make_bio(4)[0], mask_ratio=[0.1, 0.9])
    first = [maskft.build(run, number, epoch=0) for number in range(4)]
    text = run.dataset.documents[0]["text"]
    tokenizer.encode(text).append(0)  # what a caller does to its ids is its own affair
    assert tokenizer.encode(text)[-1] != 0
    monkeypatch.setattr(data.Tokenizer, "_encode_plain", lambda *_: pytest.fail("encoded anew"))
    assert [maskft.build(run, number, epoch=0) for number in range(4)] == first
    later = [maskft.build(run, number, epoch=1) for number in range(4)]
    assert all(a.ids != b.ids and a.labels == b.labels for a, b in zip(first, later, strict=True))


ALLOCATOR = [  # what the user set -> what start_processes leaves
    ({}, "expandable_segments:True"),
    ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
]


@pytest.mark.parametrize("given, expected", ALLOCATOR)
def test_attention_and_allocator_on_a_gpu(given, expected, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    torch.backends.cuda.enable_cudnn_sdp(True)
    maskft.start_processes()
    maskft.dist.destroy_process_group()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


# ------------------------------------------------------------------------------------------ offload


def test_offload_changes_no_number(tmp_path):
    """Losses, answers and weights, also of a run that was stopped and went on."""

    def stop_at_once():
        maskft.listen_for_stop = lambda: [1]

    usual, moved, resumed = (tmp_path / name for name in ("usual", "moved", "resumed"))
    forked(maskft, *SHORT, "--out", usual)
    forked(maskft, *SHORT, "--offload", "--out", moved)
    forked(maskft, *SHORT, "--offload", "--out", resumed, before=stop_at_once)
    assert len(losses(resumed)) == 1
    forked(maskft, "--resume", resumed)
    for run in (moved, resumed):
        assert losses(run) == losses(usual)
        assert data.read_json(run / "results.json")["arguments"]["offload"] is True
        for file in ("model.safetensors", "preds.jsonl"):
            assert (run / file).read_bytes() == (usual / file).read_bytes()


@pytest.mark.parametrize("offload", [True, False])
def test_offload_is_the_policy_of_every_unit_and_answers_have_whole_weights(offload, group):
    with torch.device("meta"):
        model = maskft.Model(maskft.parse_config(llama()))
    maskft.shard(model, torch.device("cpu"), torch.float32, offload)
    model.to_empty(device="cpu")
    for unit in (model, *model.blocks):
        policy = unit._get_fsdp_state()._fsdp_param_group.offload_policy
        assert isinstance(policy, CPUOffloadPolicy) == offload
        assert not getattr(policy, "pin_memory", False)  # there is no GPU to copy to
    with maskft.gathered(model):
        # what all_gather made, so on the GPU: `generate` goes by the first one's device
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


# ------------------------------------------------------------------------ eight GPUs, without one

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,  # of 32
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
}
LLADA_8B = {
    "d_model": 4096,
    "n_layers": 2,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
}


class Fake(TorchDispatchMode):
    """Finds as many labels as there are, and records collectives: their shapes and dtypes."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = []
        self.collectives = []
        real = data.collate

        def collate(examples, pad_id):
            self.counts.append(sum(i != IGNORE for e in examples for i in e.labels))
            return real(examples, pad_id)

        monkeypatch.setattr(data, "collate", collate)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._opname == "nonzero":
            return torch.zeros(self.counts.pop(), 2, dtype=torch.int64)
        if function.namespace == "c10d":
            shapes = [(*t.shape, t.dtype) for t in args if isinstance(t, torch.Tensor)]
            self.collectives.append((function._opname, *shapes))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_group(rank, monkeypatch):
    """The device of one of 8 ranks, whose collectives do nothing."""
    start = partial(maskft.dist.init_process_group, "fake", store=FakeStore(), world_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(maskft.dist, "init_process_group", lambda *_, **__: start(rank=rank))
        device = maskft.start_processes()
    try:
        yield device
    finally:
        maskft.dist.destroy_process_group()


def collectives_of_a_step(method, directory, device, monkeypatch):
    """What a step of a run makes its ranks do together, on fake tensors.

    Reading a number of one fails, as it would wait on a GPU."""
    flags = ["--model", str(directory), "--data", "bio", "--dtype", "bfloat16"]
    methods = {method: (maskft.METHODS | llada.METHODS)[method]}
    args = maskft.arguments("", methods).parse_args(flags)
    (given,) = maskft.given_settings(args, methods, (None, None), device)
    run = maskft.prepare(given, methods[method], device, stop=[])
    settings = run.settings
    assert (settings.batch_size, settings.dtype, run.steps) == (64, "bfloat16", 5000)
    maskft.shard(run.model, device, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), Fake(monkeypatch) as fake:
        run.model.to_empty(device=device)
        run.optimizer = maskft.make_optimizer(run.model, settings.lr)
        loss_and_norm = maskft.update(run, maskft.examples_of_step(run, 0), settings.lr)
    held = sum(parameter.to_local().numel() for parameter in run.model.parameters())
    assert maskft.parameter_count(run.model) / held == pytest.approx(8, rel=1e-4)
    assert loss_and_norm.shape == (2,) and loss_and_norm.dtype == torch.float32
    return fake.collectives


@pytest.mark.parametrize("method", ["masked", "llada"])
def test_a_step_of_8b_on_a_group_of_eight(method, tmp_path, monkeypatch):
    """The first rank and the last meet in the same collectives, weights in bf16, sums in fp32."""
    source = {"masked": "tiny", "llada": "tiny-llada"}[method]
    for file in (HERE / source).glob("*token*"):
        shutil.copy(file, tmp_path)
    raw = data.read_json(HERE / source / "config.json")
    raw |= LLADA_8B if method == "llada" else LLAMA_8B
    raw |= {"tie_word_embeddings": False, "weight_tying": False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = []
    for rank in (0, 7):
        with fake_group(rank, monkeypatch) as device:
            found.append(collectives_of_a_step(method, tmp_path, device, monkeypatch))
    first, last = found
    assert first == last
    kinds = {"_allgather_base_": torch.bfloat16, "_reduce_scatter_base_": torch.float32}
    assert {name for name, *_ in first} >= kinds.keys()
    for name, *tensors in first:
        if name in kinds:
            assert {tensor[-1] for tensor in tensors} == {kinds[name]}
            assert max(size for size, _ in tensors) == 8 * min(size for size, _ in tensors)
