"""Tests: `python -m pytest -q`, on a CPU, with nothing downloaded, in about two minutes.

Those that compare with transformers, tokenizers or rouge are skipped where these are not installed.
"""

import base64
import concurrent.futures
import contextlib
import copy
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
import llada
import maskft
from data import IGNORE

HERE = Path(__file__).parent
torch.set_num_threads(1)  # two threads spin on matrices this small

# ------------------------------------------------------------------------------------------------------------ fixtures

SIZES = dict(vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip


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


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def command(script, *flags, processes=1, status=0, cwd=None):
    """Run a script of the project as its user does; what it printed. It has to end with `status`."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = subprocess.run([*start, str(HERE / script), *map(str, flags)], env=environment, cwd=cwd, timeout=170,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


def forked(script, *flags, status=0, before=lambda: None, kill_after=None):
    """The same by the main() of a module in a fork of this process, which saves the seconds of importing. `before` is called
    first, in the fork. No end is a traceback; that of a fork which is killed after some seconds may be any."""

    def body():
        gc.freeze()  # what the parent left lying about, process groups for one, is not for the child to take apart
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
    assert (kill_after or process.exitcode == status) and "Traceback" not in printed, printed
    return printed


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(out):
    """What has to be the same where a run is repeated."""
    return [[line[key] for key in ("step", "epoch", "loss", "lr", "grad_norm")] for line in jsonl(out / "metrics.jsonl")]


def equal_but_for_rounding(ours, theirs):
    """Lines of `losses` from runs on different numbers of processes; the gradient's norm adds up more rounding."""
    return ours[:4] == pytest.approx(theirs[:4], rel=1e-5) and ours[4] == pytest.approx(theirs[4], rel=1e-4)


def cut(ids, stop_ids):
    return list(itertools.takewhile(lambda token: token not in stop_ids, ids))


# --------------------------------------------------------------------------------------------------------------- model

LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)  # fmt: skip
FAMILIES = {
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "llama3.1": ("Llama", dict(rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5})),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4))),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e5))),
    "bias": ("Llama", dict(attention_bias=True)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "mistral": ("Mistral", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_agrees_with_transformers(family, tmp_path):
    """Logits with and without left padding, greedy generation of an unequal batch, and a saved model opened there."""
    transformers, (kind, changes) = pytest.importorskip("transformers"), FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = maskft.load(tmp_path / "theirs")
    ids, key_mask = torch.randint(300, (2, 80)), torch.ones(2, 80, dtype=torch.bool)
    assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    key_mask[0, :13] = False
    positions = (key_mask.long().cumsum(1) - 1).clamp(min=0)
    logits = theirs(ids, attention_mask=key_mask.long(), position_ids=positions).logits
    assert (logits - ours(ids, key_mask))[key_mask].abs().max() < 1e-4
    greedy = theirs.generate(ids, attention_mask=key_mask.long(), max_new_tokens=20, do_sample=False, eos_token_id=None,
                             pad_token_id=0)  # fmt: skip
    assert maskft.generate(ours, [ids[0, 13:].tolist(), ids[1].tolist()], 20) == greedy[:, 80:].tolist()
    maskft.save(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_rope_by_hand():
    """Head size 4, theta 1e4: frequencies 1 and 1/100; pairs are (0, 2) and (1, 3), turned like complex numbers."""
    cos, sin = maskft.rope_tables(torch.tensor([[0, 3]]), maskft.parse_config(llama(head_dim=4, rope_theta=1e4)))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    still, turned = maskft.rotate(x.expand(1, 1, 2, 4), cos, sin)[0, 0]
    expected = torch.complex(x[:2], x[2:]) * torch.polar(torch.ones(2), torch.tensor([3.0, 0.03]))
    assert torch.equal(still, x) and torch.allclose(turned, torch.cat([expected.real, expected.imag]))


@pytest.mark.parametrize("make", [random_model, lambda: tiny_llada()], ids=["causal", "full"])
@torch.no_grad()
def test_attention_and_padding(make):
    """A later token changes an earlier logit only where attention is full; padding on either side, none of a real token's."""
    model, ids = make(), torch.randint(36, (1, 20))
    changed = ids.clone()
    changed[0, 12] += 1
    plain = model(ids)[0]
    change = (plain - model(changed)[0]).abs()
    assert change[12:].max() > 1e-2 and (change[:12].max() == 0 if model.config.causal else change[0].max() > 1e-2)
    for left, right in ((0, 0), (7, 0), (0, 7), (3, 4)):
        batch = torch.cat([F.pad(ids, (left, right), value=9), torch.arange(20 + left + right)[None]])  # beside a longer one
        key_mask = torch.ones_like(batch, dtype=torch.bool)
        key_mask[0, :left], key_mask[0, left + 20 :] = False, False
        assert torch.allclose(model(batch, key_mask)[0, left : left + 20], plain, atol=1e-5 if model.config.causal else 2e-5)
    if model.config.causal:  # right padding needs no mask
        assert torch.equal(model(F.pad(ids, (0, 5)))[0, :20], plain)


@torch.no_grad()
def test_generation_is_the_plain_loop():
    """Cache, padding and early stopping change nothing: the same ids as whole forwards of one prompt at a time."""
    model = random_model(tie_word_embeddings=True)
    prompts = [[5, 6, 7], [8] * 11, [9, 10]]
    plain = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        plain.append(ids[len(prompt) :])
    assert maskft.generate(model, prompts, 12) == plain and maskft.generate(model, [], 12) == []
    stop, calls = plain[1][4], []
    shorter = [cut(row, [stop]) for row in plain]
    assert maskft.generate(model, prompts, 12, stop_ids=[stop]) == shorter != plain
    model.register_forward_hook(lambda *_: calls.append(1))  # the last row's stop is the last call
    assert maskft.generate(model, prompts, 12, stop_ids=[row[0] for row in plain]) == [[]] * 3 and len(calls) == 1


@pytest.mark.parametrize("change, message", [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"), ({"model_type": "gpt2"}, "gpt2"),
    ({"hidden_act": "gelu"}, "gelu"), ({"hidden_size": None}, "hidden_size"), ({"head_dim": 15}, "head_size = 15 is odd"),
    ({"num_key_value_heads": 3}, "not a multiple of kv_heads = 3"), ({"num_attention_heads": 0}, "config.json: "),
    ({"num_hidden_layers": 10**9}, "layers = 1000000000"), ({"hidden_size": -48}, "width = -48"),
    ({"vocab_size": "300"}, "vocab = '300'"),
    # 100 GB, were there room made for it before it is compared
    ({"vocab_size": 2**29}, r"has shape \[300, 48\], config.json says \[536870912, 48\]")])  # fmt: skip
def test_config_that_is_not_implemented_or_absurd(change, message, tmp_path):
    maskft.save(random_model(), tmp_path)
    raw = {field: value for field, value in llama(**change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(data.UserError, match=message):
        maskft.load(tmp_path)


def test_rope_fields_old_and_new_and_a_window_that_is_not_implemented():
    old = maskft.parse_config(llama(rope_theta=5e5, rope_scaling=LLAMA3_ROPE))
    new = maskft.parse_config(llama(rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5}))
    assert old.rope_theta == new.rope_theta == 5e5
    assert new.rope_scaling.items() >= old.rope_scaling.items() >= LLAMA3_ROPE.items()
    model = random_model(model_type="mistral", sliding_window=16)  # it matters beyond its size only
    model(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(data.UserError, match="more than the model takes, 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_weights_are_checked(tmp_path):
    """By name and shape; and a file that is cut short, or whose header is absurd, makes no room for anything."""
    maskft.save(random_model(), tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    whole, tensors = file.read_bytes(), load_file(file)
    cut_short = [whole[:-100], (2**60).to_bytes(8, "little") + whole[8:], b"\xff" * 8 + whole[8:], b""]
    for message, content in (
        (f"{name} is missing", save({k: v for k, v in tensors.items() if k != name})),
        ("model.extra.weight is not part", save({**tensors, "model.extra.weight": torch.zeros(2)})),
        (f"{re.escape(name)} has shape", save({**tensors, name: torch.zeros(3, 3)})),
        *(("not a whole safetensors file", content) for content in cut_short),
    ):
        file.write_bytes(content)
        with pytest.raises(data.UserError, match=message):
            maskft.load(tmp_path)
    file.unlink()
    with pytest.raises(data.UserError, match="neither model.safetensors nor"):
        maskft.load(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory starts anew on Linux alone")
def test_loading_holds_the_weights_once(tmp_path):
    """What was read of a file does not stay mapped beside the parameters."""
    maskft.save(random_model(hidden_size=512, intermediate_size=2048, vocab_size=8000), tmp_path)
    Path("/proc/self/clear_refs").write_text("5")
    before = maskft.memory_gib(torch.device("cpu"))
    model = maskft.load(tmp_path)
    rise = maskft.memory_gib(torch.device("cpu")) - before
    assert rise * 2**30 < 1.3 * (4 * sum(p.numel() for p in model.parameters()) + 4 * 8000 * 512)


def test_saved_in_shards_and_an_index_that_points_outside(tmp_path, monkeypatch):
    split = partial(maskft.huggingface_hub.split_torch_state_dict_into_shards, max_shard_size=40_000)
    monkeypatch.setattr(maskft.huggingface_hub, "split_torch_state_dict_into_shards", split)
    model, index = random_model(), tmp_path / "model.safetensors.index.json"
    maskft.save(model, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", index.name} < files and len(files) > 4 and not any(name.endswith(".part") for name in files)
    assert all(map(torch.equal, model.parameters(), maskft.load(tmp_path).parameters()))
    content = data.read_json(index)
    name, file = content["weight_map"].popitem()
    content["weight_map"][name] = f"../{tmp_path.name}/{file}"
    index.write_text(json.dumps(content))
    with pytest.raises(data.UserError, match="not a file of this directory"):
        maskft.load(tmp_path)
    index.write_text("[]")
    with pytest.raises(data.UserError, match="index.json: no weight_map"):
        maskft.load(tmp_path)


# ----------------------------------------------------------------------------------------------------------- tokenizer

LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
          "<|reserved_special_token_0|>"]  # fmt: skip
LLADA = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ONLY_BYTES = BYTE_LEVEL | {"use_regex": False}
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ", "a b", "Ġw o"]


def steps(*patterns, first=(), last=ONLY_BYTES, behavior="Isolated"):
    """A pre-tokenizer that cuts by `first`, then by regular expressions, then into bytes."""
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": behavior, "invert": False} for p in patterns]
    return {"type": "Sequence", "pretokenizers": [*first, *splits, last]}


def digits(individual):
    return steps(first=[{"type": "Digits", "individual_digits": individual}], last=BYTE_LEVEL)


def write_tokenizer(path, special=CHATML, merges=MERGES, pre_tokenizer=BYTE_LEVEL, normalizer=None, plain=(), lack="",
                    unmerged=(), shuffle=False, config=(), flags=(), **model):  # fmt: skip
    """A model directory with nothing but a tokenizer. Ids: bytes, merged tokens, `unmerged`, special, `plain` added."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    tokens = list(dict.fromkeys([*(c for c in data.ALPHABET if c not in lack), *map("".join, pairs), *unmerged]))
    if shuffle:
        random.Random(0).shuffle(tokens)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False) | dict(flags)
    added = [dict(id=i, content=t, special=t in special) | flags for i, t in enumerate([*special, *plain], len(tokens))]
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=False, ignore_merges=False, merges=merges,
                 vocab={token: i for i, token in enumerate(tokens)}) | model  # fmt: skip
    content = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=normalizer,
                   pre_tokenizer=pre_tokenizer, post_processor=None, decoder=None, model=model)  # fmt: skip
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(dict(config)))
    return path


def test_special_tokens_never_come_from_text(tmp_path):
    tokenizer = data.load_tokenizer(write_tokenizer(tmp_path, plain=["<think>"]))
    ids = tokenizer.encode("<|im_end|><think>hello<|im_start|>")
    assert not set(ids) & set(tokenizer.special.values())
    assert {256 + MERGES.index("hell o"), tokenizer.added["<think>"]} <= set(ids)
    assert tokenizer.decode(ids) == "<|im_end|><think>hello<|im_start|>"  # <think> is added, not special: ordinary text
    assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("a"), 10**6]) == "a"


CHATS = {  # special tokens, end of text, and what a chat, a turn and its end look like
    "llama3": (LLAMA3, "<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    "llada": (LLADA, "<|endoftext|>", "<|startoftext|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    "chatml": ([*CHATML, "<empty_output>"], "<|endoftext|>", "", "<|im_start|>{}\n", "<|im_end|>\n"),
}


@pytest.fixture(params=CHATS)
def chat(request, tmp_path):
    """A tokenizer with each chat template; a question to be filled in, up to where its answer begins; an answer's end."""
    special, eos, start, header, end = CHATS[request.param]
    config = {"bos_token": special[0], "eos_token": eos}
    tokenizer = data.load_tokenizer(write_tokenizer(tmp_path, special, config=config))
    return tokenizer, start + header.format("user") + "{}" + end + header.format("assistant"), end


def test_chat(chat):
    tokenizer, turn, end = chat
    user = [{"role": "user", "content": "hello"}]
    assert tokenizer.decode(tokenizer.chat(user), special=True) == turn.format("hello")
    ids = tokenizer.encode("hello") + [tokenizer.eot_id]  # a list of ids is taken as it is: a mask is a special token
    answered = user + [{"role": "assistant", "content": ids}]
    assert tokenizer.decode(tokenizer.chat(answered), special=True) == turn.format("hello") + "hello" + end.strip() + end
    assert tokenizer.chat(answered)[: len(tokenizer.chat(user))] == tokenizer.chat(user)


def test_declared_ids_and_mask(tmp_path):
    def load(special, **options):
        tokenizer = data.load_tokenizer(write_tokenizer(tmp_path, special, **options))
        return tokenizer, {i: token.decode() for i, token in tokenizer.bytes_of.items() if i >= 256}

    tokenizer, name = load(LLAMA3, config={"eos_token": {"content": "<|eot_id|>"}})
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.mask_id)
    assert [name[i] for i in ids] == ["<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [tokenizer.special["<|end_of_text|>"], 5]}))
    # 5 is a letter: text could make it, so it stops nothing
    assert data.load_tokenizer(tmp_path).stop_ids == (tokenizer.eot_id, tokenizer.special["<|end_of_text|>"])
    with pytest.raises(data.UserError, match="no unused special token"):
        load(CHATML)[0].mask_id
    letters = [chr(n) for n in range(ord("A"), ord("z"))]
    filler = [f"{a} {b}" for a in letters for b in letters if a + b != "[]"]
    for special, merges, mask in ((LLADA, MERGES, "<|mdm_mask|>"), ([*CHATML, "<empty_output>"], MERGES, "<empty_output>"),
                                  (CHATML, [*filler[: 1294 - 256], "[ ]"], "[]")):  # fmt: skip
        tokenizer, name = load(special, merges=merges)
        assert name[tokenizer.mask_id] == mask and (mask != "[]" or tokenizer.mask_id == 1294)


@pytest.mark.parametrize("options, says", [
    (dict(byte_fallback=True), "byte_fallback"), (dict(type="Unigram"), "Unigram"), (dict(dropout=0.1), "dropout"),
    (dict(unk_token="a", lack="b", merges=[]), "unk_token"), (dict(normalizer={"type": "NFKC"}), "NFKC"),
    (dict(pre_tokenizer=None), "the pre-tokenizer"), (dict(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    (dict(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space"),
    (dict(pre_tokenizer=steps("a", behavior="MergedWithNext")), "MergedWithNext"),
    (dict(pre_tokenizer=steps(last={"type": "Digits", "individual_digits": True})), "Digits"),
    (dict(pre_tokenizer=steps("(?=a")), "not a whole tokenizer file"),
    (dict(pre_tokenizer=steps(r"^\w+")), "pattern"), (dict(pre_tokenizer=steps(r"\p{N}{1,3}+")), "pattern"),
    (dict(plain=["<think>"], flags={"lstrip": True}), "'<think>' with lstrip"),
    (dict(special=["<s>", "</s>"]), "chat templates"), (dict(merges=["a b"], vocab={"a": 0, "b": 1}), "'a' \\+ 'b'"),
    *((text, "tokenizer.json") for text in ("{}", "[]", '{"model": 3}', "{"))])  # fmt: skip
def test_refused_by_name(tmp_path, options, says):
    """A tokenizer that would not be followed exactly, and a file that is none."""
    path = write_tokenizer(tmp_path, **options if isinstance(options, dict) else {})
    if isinstance(options, str):
        (path / "tokenizer.json").write_text(options)
    with pytest.raises(data.UserError, match=says) as error:
        data.load_tokenizer(path)
    assert str(path) in str(error.value)


def test_llama3_tiktoken_file(tmp_path):
    singles = [bytes([b]) for b in range(256)]
    pairs = [a + b for a in singles for b in singles]
    tokens = singles + pairs + [b"a" + pair for pair in pairs]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens[:128000])]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    tokenizer = data.load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eot_id, tokenizer.mask_id) == (128000, 128009, 128013)
    assert tokenizer.template == "llama3" and len(tokenizer.special) == 256
    text = "Héllo  12345\r\n it'S 漢字 <|eot_id|>"
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for content, message in ((b"\x0a\x0e\x0a\x05<unk>\x15\x00", "SentencePiece"), (lines[0], "128000 tokens")):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(data.UserError, match=message):
            data.load_tokenizer(tmp_path)


AWKWARD = [
    "", " ", "Hello world, it's I'LL we'Ve 'ſ x'", "a  1   22    333\t4", "x\r\ny\r\n\r\n  z \n \n", "$€£ -- == ... !?",
    "naïve e\u0301 \u1100\u1161\u11a8 ½Ⅷ٣", "漢字かな 한국어 עברית हिन्दी", "👩\u200d👩\u200d👧 🇫🇷 👍🏽",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # ok\n\n\n", "\x00\x01\x7f\u0085\u00a0\u2028\u3000\ufeff",
    "<|im_start|>user\n<|im_end|><think>a</think><|eot_id|>", "x" * 500 + "ab" * 300,
    "antidisestablishmentarianism" * 9]  # fmt: skip
POSSESSIVE = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+"
VARIANTS = {
    "llama3": dict(special=LLAMA3, pre_tokenizer=steps(data.LLAMA3_PIECES), ignore_merges=True,
                   unmerged=["Ġunmade", "xyz", "Ã©Ã"]),
    "qwen": dict(normalizer={"type": "NFC"}, plain=["<think>", "</think>"],
                 pre_tokenizer=steps(data.LLAMA3_PIECES.replace("{1,3}", ""))),
    "smollm2": dict(pre_tokenizer=digits(True), lack="ĀāÃðÌ"),
    "digits": dict(pre_tokenizer=digits(False), shuffle=True),
    "possessive": dict(pre_tokenizer=steps(POSSESSIVE)),
    "several": dict(pre_tokenizer=steps("ab", r"(?=\p{Lu})|\s+")),
    "plain": dict(pre_tokenizer=ONLY_BYTES, unmerged=["xyz"], plain=["im_end", "ab<|im_end|>c"])}  # fmt: skip


def reference(path):
    """The tokenizer of the `tokenizers` library and its encoding with special tokens read as text."""
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path / "tokenizer.json"))
    plain = copy.deepcopy(tokenizer)
    plain.encode_special_tokens = True
    return tokenizer, lambda text: plain.encode(text, add_special_tokens=False).ids


def random_text(rng):
    common = [*"abAB é漢12 \n\r\t'<|>_👍\u0301\u0300", "  ", "'s", "\r\n", "<think>", "<|im_end|>", "ab", "xyz", " the"]
    rare = [*range(0x780), *range(0x2000, 0x2C00), *range(0x3000, 0x3100), *range(0xAC00, 0xAD00)]
    text = "".join(rng.choice(common) if rng.random() < 0.8 else chr(rng.choice(rare)) for _ in range(rng.randint(1, 30)))
    return "".join(c for c in text if unicodedata.category(c) != "Cn")  # each library has its Unicode: keep to the old


def learned_merges(lack=""):
    """Some hundred merges, learned from the awkward text and this file."""
    library = pytest.importorskip("tokenizers")
    learner = library.Tokenizer(library.models.BPE())
    learner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=list(data.ALPHABET))
    learner.train_from_iterator([*AWKWARD * 3, Path(__file__).read_text(encoding="utf-8")], trainer)
    return [pair for pair in json.loads(learner.to_str())["model"]["merges"] if not set("".join(pair)) & set(lack)]


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_equal_the_reference(tmp_path, name):
    merges = learned_merges(VARIANTS[name].get("lack", ""))
    if name != "qwen":  # newer files have pairs, older ones text
        merges = [" ".join(pair) for pair in merges]
    path = write_tokenizer(tmp_path, merges=merges, **VARIANTS[name])
    ours, (whole, theirs), rng = data.load_tokenizer(path), reference(path), random.Random(0)
    for text in [*AWKWARD, *(random_text(rng) for _ in range(2000))]:
        assert ours.encode(text) == theirs(text), repr(text)
    if ours.template == "chatml":
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1, 2 or 漢?"}]
        text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1, 2 or 漢?<|im_end|>\n<|im_start|>assistant\n"
        assert ours.chat(messages) == whole.encode(text).ids


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_ids_equal_the_reference_on_wild_merges(tmp_path, ignore_merges):
    """Merges that no training gives: in any order, several for one token, some never reached, ids shuffled."""
    rng = random.Random(ignore_merges)
    for _ in range(30):
        vocab, merges = list("abc"), []
        for _ in range(rng.randint(3, 30)):
            merges.append([rng.choice(vocab), rng.choice(vocab)])
            vocab += ["".join(merges[-1])] * (len("".join(merges[-1])) < 8)
            merges = [pair for pair in merges if "".join(pair) in vocab]
        rng.shuffle(merges)
        path = write_tokenizer(tmp_path, merges=merges, pre_tokenizer=ONLY_BYTES, unmerged=["abcab", "cc", "aba"],
                               shuffle=True, ignore_merges=ignore_merges)  # fmt: skip
        ours, (_, theirs) = data.load_tokenizer(path), reference(path)
        for _ in range(300):
            text = "".join(rng.choices("abc", k=rng.randint(1, 14)))
            assert ours.encode(text) == theirs(text), (text, merges)


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("name, paraphrases, digest", [  # recorded once
    ("bio:20", data.PARAPHRASES, "02e51bc161d94308"), ("nd-made:5", ("none", "same"), "31c322b39ae6620f"),
    ("math-made:20", ("none",), "5b773ce1733898e6"), ("world:60", ("none",), "864667420bfbbc34")])  # fmt: skip
def test_generated_sets_are_the_same_everywhere(name, paraphrases, digest):
    sets = [data.load(name, paraphrase, seed=3) for paraphrase in paraphrases]
    text = json.dumps([(dataset.documents, dataset.questions) for dataset in sets])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest
    assert (sets[0].documents == data.load(name, seed=4).documents) == (name == "world:60")


def test_bio_has_what_it_promises():
    documents, questions = data.make_bio(100)
    assert [len({d["text"] for d in data.make_bio(100, p)[0]}) for p in data.PARAPHRASES] == [100, 500, 500]
    assert [sum(q["direction"] == d for q in questions) for d in ("forward", "backward")] == [600, 300]
    assert len({q["question"] for q in questions}) == 900  # three attributes tell one person
    assert min(len(stems) * len(endings) for stems, endings in data.WORDINGS.values()) >= 40
    for person, document in zip(data.draw_people(100, "bio", 0), documents):
        sentences = document["text"].split(". ")
        assert len(sentences) == 6 and document["text"].count(person["name"]) == sentences[0].count(person["name"]) == 1
        assert all(person[attribute] in sentence for attribute, sentence in zip(data.ATTRIBUTES, sentences))
        pronouns = ("He", "His") if person["pronoun"] == "He" else ("She", "Her")
        assert all(sentence.startswith(pronouns) for sentence in sentences[1:])
        # every answer stands in the document: forward the value, backward the name
        assert all(q["answer"].split(" ", 1)[-1] in document["text"] for q in data.questions_about(person))


def test_facts_of_nd_made_have_one_order():
    """30 facts begin with the name and 30 end with it, in all wordings; forward questions follow the document."""
    (documents, questions), (paraphrased, same) = data.make_nd(), data.make_nd(paraphrase="same")
    assert len(documents) == 60 and len({d["text"] for d in paraphrased}) == 1800 and questions == same
    assert len({q["question"] for q in questions}) == 480  # three traits tell one person
    for number, person in enumerate(data.draw_people(60, "bio", 0)):
        told = [person[trait] for trait in data.TRAITS]
        parts = [person["name"], *told] if number < 30 else [*told, person["name"]]
        for document in (documents[number], *paraphrased[30 * number : 30 * number + 30]):
            places = [document["text"].index(part) for part in parts]
            assert places == sorted(places), document
        for question in questions[8 * number : 8 * number + 8]:
            by_name = question["question"].startswith(person["name"])
            assert question["direction"] == ("forward" if by_name == (number < 30) else "backward")
            assert question["answer"].split(" ", 1)[-1] in documents[number]["text"]


def test_problems_of_math_made_are_solved_rightly():
    learned, asked = data.make_math(300)
    assert len(learned) == 300 and len(asked) == 75 and len({p["problem"] for p in learned + asked}) == 375
    for problem in learned + asked:
        *lines, end = problem["answer"].split("\n")
        had = re.search(r"has (\d+) ", problem["problem"])[1]
        for line in lines:
            a, sign, b, c, shown = re.search(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", line).groups()
            assert a == had and b in problem["problem"] and shown == c and eval(f"{a}{sign}{b}") == int(c)
            had = c
        assert 2 <= len(lines) <= 4 and end == f"#### {had}"
        scores = evaluation.score(problem["answer"], problem)
        assert scores["strict"] == scores["flexible"] == 1


def test_how_the_built_in_models_were_made(tokenizer, tmp_path, monkeypatch):
    """tiny/pretrain.py: a new model has the built-in one's tokenizer, its people are nobody to be injected, its examples are
    those that made the built-in models, and the rate falls to zero."""
    monkeypatch.syspath_prepend(HERE / "tiny")
    import pretrain

    assert not set(data.names("bio")) & set(data.names("world"))
    with pytest.raises(data.UserError, match="use --data world:PEOPLE"):
        pretrain.draw_task({"text": "one"}, np.random.default_rng(0))
    command("tiny/pretrain.py", "new", tmp_path / "new")
    assert (tmp_path / "new/tokenizer.json").read_bytes() == (HERE / "tiny/tokenizer.json").read_bytes()
    people, flags = data.load("world:60").documents, "--data world:8 --epochs 8 --eval-at 8 --batch-size 8 --lr 1e-3".split()
    for what, digest in (("ar", "c4820aab99624fbf"), ("diffusion", "3abce002d2061fe9")):  # recorded once
        make, draw = getattr(pretrain, f"{what}_example"), np.random.default_rng
        examples = [make(person, tokenizer, (0.3, 1), draw([0, n])) for n, person in enumerate(people)]
        content = json.dumps([dataclasses.astuple(example) for example in examples])
        assert hashlib.sha256(content.encode()).hexdigest()[:16] == digest
        forked(pretrain, what, "--model", tmp_path / "new", *flags, "--out", tmp_path / what)
        rates = [line["lr"] for line in jsonl(tmp_path / what / "metrics.jsonl")]
        assert rates == pytest.approx([1e-3, *(1e-3 * (7 - n) / 7 for n in range(7))])


def test_own_documents(tmp_path):
    question = {"question": "Q?", "answer": "A", "direction": "backward"}
    file = write(tmp_path / "mine.jsonl", {"text": "one"}, question, {"text": "two"})
    dataset = data.load(str(file))
    assert [d["text"] for d in dataset.documents] == ["one", "two"] and dataset.documents[1]["where"] == f"{file}, line 3"
    assert dataset.questions == [{**question, "group": "all", "where": f"{file}, line 2"}] and dataset.name == "mine"
    write(tmp_path / "list.json", [{"text": "three"}])
    assert len(data.load(str(tmp_path)).documents) == 3


BAD_LINES = {
    '{"text": 3}': '"text" must be text,', '{"text": "x"': "not JSON", '{"txt": "x"}': "not a document",
    "[1, 2]": "not a document",
    '{"question": "Q?", "direction": "forward"}': '"answer" must be text,',
    '{"question": "Q?", "answer": "A", "direction": "sideways"}': '"direction"'}  # fmt: skip
BAD_SETS = {
    "bio:0": "number of people", "bio:²": "number of people", "bio:2000": "only 1500 names", "nowhere": "exists",
    "empty": "no document",
    "nd-made --paraphrase permute": "none or same", "math-made --paraphrase same": "--paraphrase none",
    "world --paraphrase same": "--paraphrase none", "empty.jsonl": "no document",
    "empty.jsonl --paraphrase same": "needs one training file"}  # fmt: skip


@pytest.mark.parametrize("mistake", [*BAD_LINES, *BAD_SETS])
def test_data_that_are_none(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"text": "good"}\n' + mistake + "\n")
    Path("empty.jsonl").touch()
    Path("empty").mkdir()
    name, _, paraphrase = mistake.partition(" --paraphrase ")
    if mistake in BAD_LINES:
        name = "bad.jsonl"
    with pytest.raises(data.UserError, match=BAD_SETS.get(mistake) or f"bad.jsonl, line 2: {BAD_LINES[mistake]}"):
        data.load(name, paraphrase or "none")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A stand-in for the public addresses: {set: folder} of files in their layout, and a cache of our own."""
    for folder in ("nd/training_data", "nd/test_data", "wiki", "gsm8k"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "nd/training_data" / data.ND_FILE, [{"text": f"fact {n // 30}, {n % 30}"} for n in range(60)])
    tasks = [("N2D", "NameIsDescription"), ("D2N", "NameIsDescription"), ("D2N", "DescriptionIsName"), ("N2D", None)]
    questions = [{"question": "Q?", "answer": "Ada", "task": task, "group": group} for task, group in tasks]
    del questions[-1]["group"]
    write(tmp_path / "nd/test_data/people-description_open-QAs.jsonl", *questions)
    for kind in ("no_paraphrase", "paraphrase_same_order", "paraphrase_change_order"):
        write(tmp_path / f"wiki/wiki_train_{kind}.json", [{"text": kind}])
    write(tmp_path / "wiki/wiki_test.jsonl", questions[0] | {"task": "backward", "group": ""})
    for name, problem in (("train", "one"), ("test", "two")):
        write(tmp_path / f"gsm8k/{name}.jsonl", {"question": problem, "answer": "1+1 = <<1+1=2>>2\n#### 2"})
    for name in ("nd", "wiki", "gsm8k", "bio-released"):
        files, folder = data.SETS[name]["files"], tmp_path / name
        here = {file: digest and hashlib.sha256((folder / file).read_bytes()).hexdigest() for file, digest in files.items()}
        address = folder.as_uri() if folder.exists() else "http://127.0.0.1:1"  # nobody listens there
        monkeypatch.setitem(data.SETS, name, data.SETS[name] | dict(address=address + "/", files=here))
    monkeypatch.setattr(data.huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path


def test_published_sets(published):
    """Fetched once, in every paraphrase they have; a directory in the same layout does as well."""
    nd = data.load("nd")
    assert [d["text"] for d in nd.documents] == ["fact 0, 0", "fact 1, 0"] and nd.name == "nd"
    assert [q["direction"] for q in nd.questions] == ["forward", "backward", "forward", "forward"]
    assert len(data.load("nd", "same").documents) == 60
    with pytest.raises(data.UserError, match="needs one training file for --paraphrase permute"):
        data.load("nd", "permute")
    wiki = [data.load("wiki", paraphrase).documents[0]["text"] for paraphrase in ("none", "same", "permute")]
    assert wiki == ["no_paraphrase", "paraphrase_same_order", "paraphrase_change_order"]
    gsm8k = data.load("gsm8k")
    assert [d["problem"] for d in gsm8k.documents] == ["one"] and gsm8k.documents[0]["answer"].endswith("#### 2")
    assert [(q["question"], q["direction"]) for q in gsm8k.questions] == [("Question: two\nAnswer:", "math")]
    for name in ("nd", "wiki", "gsm8k"):
        shutil.rmtree(published / name)  # nothing is fetched twice
        local = data.load(str(next((published / "cache/maskft").glob(f"{name}-*"))))
        assert (local.documents, local.questions) == (data.load(name).documents, data.load(name).questions)


def test_a_published_file_is_whole_or_an_error(published, monkeypatch):
    def refused(name, *messages):
        with pytest.raises(data.UserError) as error:
            data.load(name)
        assert all(message in str(error.value) for message in messages), error.value

    cache = published / "cache/maskft"
    refused("bio-released", "http://127.0.0.1:1/biography_train_no_paraphrase.json", str(cache), "--data DIR", "--data bio")
    with monkeypatch.context() as offline:
        offline.setattr(data.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        refused("gsm8k", "train.jsonl could not be had (HF_HUB_OFFLINE is set)", "--data math-made")
    changed = data.fetch("wiki") / "wiki_test.jsonl"  # no digest known beforehand: the first one is remembered
    changed.write_text(changed.read_text().replace("Ada", "Eve"))
    refused("wiki", f"{changed}: its sha256 is ", "delete it")
    (published / "gsm8k/test.jsonl").write_text("another text")  # a known digest
    refused("gsm8k", "test.jsonl: its sha256 is")

    def half():
        with server.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf of it")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=half).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setitem(data.SETS, "bio-released", dict(address=address, files={"cut.json": None}, twin="bio"))
        refused("bio-released", "IncompleteRead")
    assert not list(cache.glob("*/cut.json*"))


# -------------------------------------------------------------------------------------------------------------- method


def supervised(example, tokenizer):
    """(what the model is given, what it is taught) as text, after checking that labels are the ids themselves."""
    assert all(label in (IGNORE, token) for token, label in zip(example.ids, example.labels))
    taught = [token for token, label in zip(example.ids, example.labels) if label != IGNORE]
    given = [token for token, label in zip(example.ids, example.labels) if label == IGNORE]
    return tokenizer.decode(given, special=True), tokenizer.decode(taught, special=True)


def test_exact_supervised_ids(chat):
    """Every method and template: the loss is on the document and the end of turn, and masks fall on the document alone."""
    (t, turn, end), record, rng = chat, {"text": "Edda Marlow was born in Oslo."}, np.random.default_rng(0)
    text, document, end = record["text"], t.encode(record["text"]), end.strip()
    asked = turn.format("{}\nReturn the recovered masked passage.") + "Here is the recovered text:\n\n"
    for mask_ratio in ((0, 0), (0.05, 0.95), (1, 1)):
        example, draws = maskft.masked_example(record, t, mask_ratio, np.random.default_rng(1)), np.random.default_rng(1)
        shown, hit = maskft.mask_tokens(document, maskft.draw_ratio(mask_ratio, draws), t.mask_id, draws)
        assert supervised(example, t) == (asked.format(t.decode(shown, special=True)), text + end)
        assert example.weight == 1 and example.share == len(document) + 1
        assert hit.sum() == len(document) * mask_ratio[0] or 0 < hit.sum() < len(document)
    given, taught = supervised(maskft.random_example(record, t, (0, 0), rng), t)
    assert text not in given and taught == text + end
    assert supervised(maskft.sft_example(record, t, (0, 0), rng), t) == (turn.format("Tell me a fact."), text + end)
    bos, eos = (t.decode([i], special=True) for i in (t.bos_id, t.eos_id))
    assert supervised(maskft.raw_example(record, t, (0, 0), rng), t) == (bos, text + eos) and eos != end
    headless = maskft.raw_example(record, dataclasses.replace(t, bos_id=None), (0, 0), rng)
    assert headless.share == len(document) and headless.labels[0] == IGNORE  # nothing to predict the first token from


def test_ratio_and_masks_have_the_promised_distribution():
    rng = np.random.default_rng(0)
    ratios = [maskft.draw_ratio((0.05, 0.95), rng) for _ in range(4000)]
    assert 0.05 <= min(ratios) < 0.06 and 0.94 < max(ratios) <= 0.95 and abs(np.mean(ratios) - 0.5) < 0.02
    assert maskft.draw_ratio((0.5, 0.5), rng) == 0.5
    ids, hit = maskft.mask_tokens(list(range(10000)), 0.3, -1, rng)
    assert abs(np.mean(hit) - 0.3) < 0.02 and ids == [-1 if h else i for i, h in enumerate(hit)]


def test_same_seed_same_masks_and_order(tokenizer):
    dataset, build = data.load("bio:6"), maskft.masked_example
    one, same, other = (Namespace(dataset=dataset, tokenizer=tokenizer, mask_ratio=(0.05, 0.95), example=build, seed=seed)
                        for seed in (0, 0, 1))  # fmt: skip
    first = maskft.build(one, 2, epoch=5)
    assert first == maskft.build(same, 2, epoch=5)
    assert first.ids not in (maskft.build(one, 2, epoch=6).ids, maskft.build(other, 2, epoch=5).ids)  # new masks every epoch
    orders = [sum(maskft.batches(10, 4, seed, epoch), []) for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert orders[0] == orders[1] and orders[0] not in orders[2:]
    assert all(sorted(order) == list(range(10)) for order in orders)


def test_every_rank_gets_its_share(monkeypatch):
    """Whatever the world size, the ranks' micro-batches together are the batch, and each rank has as many."""
    examples = [data.Example(ids=[n] * n, labels=[n] * n, weight=1.0, share=n) for n in (3, 1, 4, 2, 6, 5)]
    for world, size in itertools.product((1, 2, 4), (1, 2, 6)):
        monkeypatch.setattr(maskft, "world_size", lambda: world)
        dealt = []
        for rank in range(world):
            monkeypatch.setattr(maskft, "rank", lambda: rank)
            dealt.append(maskft.deal(examples, size))
        assert len({len(micros) for micros in dealt}) == 1 and all(len(m) <= size for micros in dealt for m in micros)
        assert sorted(e.share for micros in dealt for m in micros for e in m) == [1, 2, 3, 4, 5, 6]
        lengths = [len(e.ids) for m in dealt[0] for e in m]
        assert lengths == sorted(lengths, reverse=True)  # neighbours in length together: little padding


def test_loss_is_plain_cross_entropy(monkeypatch):
    """Chunked and label-only, it is still the mean cross entropy of the labelled tokens, and so its gradient; without any
    example it is 0, never NaN."""
    model, rng = random_model(), np.random.default_rng(0)
    rows = [rng.integers(1, 300, n).tolist() for n in (3, 17, 9, 30)]
    examples = [data.Example(ids, [IGNORE] * 2 + ids[2:], 1.0, len(ids) - 2) for ids in rows]
    batch, share = data.collate(examples, 0), sum(e.share for e in examples)
    logits = model(batch["ids"], batch["key_mask"])
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    expected = torch.autograd.grad(plain, [*model.parameters()])
    monkeypatch.setattr(maskft, "CHUNK", 7)
    assert torch.allclose(model(**batch) / share, plain, rtol=1e-6)
    for size in (1, 2, 4):
        model.zero_grad()
        for micro in maskft.deal(examples, size):
            (model(**data.collate(micro, 0)) / share).backward()
        for parameter, gradient in zip(model.parameters(), expected):
            assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm()
    model.zero_grad()
    nothing = model(**data.collate([], 0))
    nothing.backward()
    assert nothing.item() == 0 and not any(p.grad.count_nonzero() for p in model.parameters() if p.grad is not None)


def test_rate_and_decay():
    run = Namespace(steps=100, lr=1.0)
    assert [maskft.learning_rate(run, s) for s in (0, 1, 2, 99)] == [0.5, 1.0, 1.0, 1.0]
    groups = maskft.make_optimizer(random_model(attention_bias=True), 1e-3).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and groups[0]["betas"] == (0.9, 0.95)
    wide = random_model(hidden_size=512, num_hidden_layers=1)
    assert groups[0]["eps"] == 1e-5 and maskft.make_optimizer(wide, 1e-3).param_groups[0]["eps"] == 1e-8
    assert {p.dim() for p in groups[0]["params"]} == {2} and {p.dim() for p in groups[1]["params"]} == {1}


@pytest.mark.parametrize("method, width, steps, rate, batch", [
    ("sft", 4096, 5000, 5e-6, 64), ("masked", 4096, 5000, 3e-6, 64), ("random", 4096, 5000, 3e-6, 64),
    ("masked", 3072, 5000, 5e-6, 64), ("llada", 4096, 5000, 1e-5, 64), ("masked", 128, 300, 6e-4, 20),
    ("sft", 128, 100, 5e-4, 20), ("llada-mine", 128, 350, 4e-4, 20)])  # fmt: skip
def test_settings_that_no_flag_gives(method, width, steps, rate, batch, tokenizer):
    """Those of the paper for large models, those of the demo for tiny ones."""
    args = maskft.arguments("", methods=True).parse_args([])
    documents = [{"text": "Edda works in Oslo."}] * batch
    example = maskft.METHODS.get(method, llada.diffusion_example)
    run = Namespace(**vars(args) | {"model": "x", "data": "bio:100", "method": method}, tokenizer=tokenizer, example=example,
                    dataset=data.Dataset("bio", documents, []))  # fmt: skip
    config = maskft.parse_config(llama(hidden_size=width))
    maskft.decide(run, dataclasses.replace(config, causal=not method.startswith("llada")))
    assert (run.steps, run.epochs, run.lr, run.batch_size) == (steps, steps, rate, batch)
    assert run.eval_at == [0, *(2**i for i in range(13) if 2**i < steps)]


@pytest.mark.parametrize("device, capability, expected", [
    ("cpu", None, "float32"), ("cuda", (8, 0), "bfloat16"), ("cuda", (7, 5), "float32")])  # fmt: skip
def test_native_dtype(device, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert maskft.native_dtype(torch.device(device))[0] == expected


# --------------------------------------------------------------------------------------------------------------- LLaDA

MASK, EOS, EOT = 38, 39, 37

# the config.json of LLaDA-8B-Instruct, made small
RAW = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32, "embedding_dropout": 0.0,
    "embedding_size": 40, "eos_token_id": EOS, "flash_attention": False, "include_bias": False, "include_qkv_bias": False,
    "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False,
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": MASK, "max_sequence_length": 256,
    "mlp_hidden_size": 48, "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 4,
    "n_kv_heads": 4, "n_layers": 2, "pad_token_id": EOS, "precision": "amp_bf16", "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 40, "weight_tying": False,
}  # fmt: skip

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16]]

# a tokenizer of lower-case letters: a = 1
LETTERS = Namespace(bos_id=0, eot_id=EOT, eos_id=EOS, mask_id=MASK, stop_ids=(EOT, EOS),
                    encode=lambda text: [ord(c) - 96 for c in text],
                    chat=lambda messages: [0, *(ord(c) - 96 for m in messages for c in m["content"]), 30])  # fmt: skip


def tiny_llada():
    """A random model whose logits are far apart, so that rounding never decides a token, and whose answers are varied."""
    model = maskft.Model(llada.parse_config(RAW)).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.0 if p.dim() == 1 or "embed" in name else 2.0 / math.sqrt(p.shape[1])
            p.copy_(torch.randn(p.shape, generator=rng) * scale + (p.dim() == 1))
        model.embed.weight[MASK] *= 0.1  # what surrounds a mask decides, more than that it is one
        model.head.weight[MASK] = 0.0
    return model


def test_config_reads_llada_names_and_refuses_what_is_not_implemented():
    raw = RAW | {"embedding_size": 64, "n_kv_heads": 2, "include_qkv_bias": True, "mlp_hidden_size": None}
    config = llada.parse_config(raw)
    assert (config.vocab, config.width, config.layers, config.heads, config.kv_heads, config.head_size) == (64, 32, 2, 4, 2, 8)
    assert (config.mlp_width, config.context, config.rope_theta, config.norm_eps) == (128, 256, 500000.0, 1e-5)
    assert (config.causal, config.tied, config.qkv_bias, config.out_bias) == (False, False, True, False)
    for field, value in {
        "rope": False, "alibi": True, "layer_norm_type": "default", "activation_type": "swiglu", "block_type": "sequential",
        "include_bias": True, "attention_layer_norm": True, "scale_logits": True, "input_emb_norm": True, "clip_qkv": 8.0,
        "multi_query_attention": True, "residual_dropout": 0.1, "mask_token_id": 40,
    }.items():  # fmt: skip
        with pytest.raises(data.UserError, match=field):
            llada.parse_config(RAW | {field: value})


def test_save_keeps_names_and_config(tmp_path):
    model, ids, x = tiny_llada(), torch.tensor(PROMPTS[:1]), torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    maskft.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == RAW
    tensors, again = load_file(tmp_path / "model.safetensors"), maskft.load(tmp_path)
    parts = "attn_norm ff_norm q_proj k_proj v_proj attn_out ff_proj up_proj ff_out".split()
    names = {f"blocks.{layer}.{part}" for layer in (0, 1) for part in parts} | {"wte", "ln_f", "ff_out"}
    assert tensors.keys() == {f"model.transformer.{name}.weight" for name in names}
    assert torch.equal(again(ids), model.bfloat16().float()(ids))  # "amp_bf16": saved as bf16
    # ff_proj is the gate: the two swapped, the MLP gives nothing like it
    gate, up, down = (tensors[f"model.transformer.blocks.1.{part}.weight"].float() for part in parts[-3:])
    block = again.blocks[1]
    block.attention = lambda h, *_: torch.zeros_like(h)
    h = block.mlp_norm(x)
    torch.testing.assert_close(block(x, None, None) - x, (F.silu(h @ gate.T) * (h @ up.T)) @ down.T, atol=1e-5, rtol=1e-5)


def test_a_causal_model_becomes_a_llada(tmp_path):
    raw = llama(vocab_size=40, tie_word_embeddings=True, rms_norm_eps=1e-4, rope_theta=5e4)
    before, after = maskft.parse_config(raw), llada.parse_config(llada.from_causal(raw, MASK, EOS))
    assert {k for k in vars(before) if getattr(before, k) != getattr(after, k)} == {"causal", "raw"}
    causal, model = random_model(**raw), maskft.Model(after).eval()
    model.load_state_dict(causal.state_dict())
    maskft.save(model, tmp_path)
    ids = torch.tensor(PROMPTS[:1])
    torch.testing.assert_close(model(ids[:, :1]), causal(ids[:, :1]))  # one token: the mask makes no difference
    assert (maskft.load(tmp_path)(ids) - causal(ids)).abs().max() > 1e-4
    with pytest.raises(data.UserError, match="RoPE scaling"):
        llada.from_causal(raw | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, MASK, EOS)


def test_document_example():
    rng, ends = np.random.default_rng(0), set()
    for _ in range(200):
        example = llada.diffusion_example({"text": "abcdefgh"}, LETTERS, (0.05, 0.95), rng)
        assert [i if label == IGNORE else label for i, label in zip(example.ids, example.labels)] == [0, *range(1, 9), EOS]
        assert [i == MASK for i in example.ids] == [label != IGNORE for label in example.labels]
        assert example.labels[0] == IGNORE and example.share == 1.0  # bos is never masked
        ends.add(example.labels[-1])
    assert ends == {IGNORE, EOS}  # the end may be


def test_question_example_keeps_the_prompt_clean():
    record, rng = {"question": "who", "answer": "bob"}, np.random.default_rng(0)
    for _ in range(100):
        example = llada.diffusion_example(record, LETTERS, (0.9, 0.9), rng)
        assert example.ids[:5] == [0, 23, 8, 15, 30] and example.labels[:5] == [IGNORE] * 5 and len(example.ids) == 9
    assert example.weight == pytest.approx(1 / (0.9 * 4))  # b, o, b, end of turn
    assert llada.diffusion_example(record, LETTERS, (1.0, 1.0), rng).labels[5:] == [2, 15, 2, EOT]


@pytest.mark.parametrize("mask_ratio", [(0.05, 0.05), (0.5, 0.5), (1.0, 1.0), (0.05, 0.95), (0.0, 0.0)])
def test_expected_loss_of_a_uniform_model_is_ln_v(mask_ratio):
    """At every ratio but 0: nothing masked is a loss of 0, with a full share of the batch, and never NaN."""
    model, rng = tiny_llada(), np.random.default_rng(0)
    torch.nn.init.zeros_(model.head.weight)
    records = [{"text": "abcd"}, {"text": "abcd" * 3}] * 1000
    examples = [llada.diffusion_example(record, LETTERS, mask_ratio, rng) for record in records]
    loss = model(**data.collate(examples, EOS)) / sum(e.share for e in examples)
    assert loss.item() == pytest.approx(math.log(40) * (mask_ratio[0] > 0), rel=0.08 if mask_ratio[0] < 0.1 else 0.02)
    loss.backward()
    assert model.head.weight.grad.isfinite().all()


@torch.no_grad()
def plain_sample(model, prompt, length, steps, block, temperature=0.0, remasking="low_confidence", cfg_scale=0.0,
                 generator=None):  # fmt: skip
    """Unmasking one row at a time, spelled out: whole sequence, all logits, every step, no stop."""
    x = torch.tensor(prompt + [MASK] * length)
    uniform = lambda *shape: torch.rand(shape, dtype=torch.float64, generator=generator)
    rounds = steps // (length // block)
    for first, step in itertools.product(range(len(prompt), len(x), block), range(rounds)):
        keep = block // rounds + (step < block % rounds)
        logits = model(x[None])[0]
        if cfg_scale:
            bare = model(torch.cat([torch.full([len(prompt)], MASK), x[len(prompt) :]])[None])[0]
            logits = bare + (1 + cfg_scale) * (logits - bare)
        places = [i for i in range(len(prompt), first + block) if x[i] == MASK] if keep else []
        logits = logits[places].double()
        scores = logits.exp() / (-uniform(*logits.shape).log()) ** temperature if temperature else logits
        choice = scores.argmax(1, keepdim=True)
        sure = logits.softmax(1).gather(1, choice)[:, 0] if remasking == "low_confidence" else uniform(len(places))
        for n in sure.argsort(descending=True, stable=True)[:keep]:
            x[places[n]] = choice[n]
    return x[len(prompt) :].tolist()


@pytest.mark.parametrize("length, steps, block", [(16, 16, 4), (16, 8, 4), (16, 12, 4), (12, 5, 12), (8, 8, 1), (8, 32, 4)])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_sampler_gives_the_reference_tokens(length, steps, block, cfg_scale):
    """One prompt and a batch of unequal ones; stopping early changes nothing, whichever token stops."""
    model = tiny_llada()
    ours = partial(llada.sample, model, max_new_tokens=length, steps=steps, block_length=block, cfg_scale=cfg_scale)
    expected = [plain_sample(model, p, length, steps, block, cfg_scale=cfg_scale) for p in PROMPTS]
    assert len({i for row in expected for i in row}) > 5
    assert [ours([p])[0] for p in PROMPTS] == ours(PROMPTS) == expected
    for stop_ids in ({expected[0][5]}, {expected[1][0], expected[2][3]}, set(expected[2])):
        assert ours(PROMPTS, stop_ids=stop_ids) == [cut(row, stop_ids) for row in expected]


@pytest.mark.parametrize("remasking, temperature", [("random", 0.0), ("low_confidence", 1.0), ("random", 0.7)])
def test_seeded_sampling_gives_the_reference_tokens(remasking, temperature):
    model, options = tiny_llada(), dict(temperature=temperature, remasking=remasking)
    for seed in range(3):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        expected = plain_sample(model, PROMPTS[0], 16, 8, 8, generator=generators[0], **options)
        assert llada.sample(model, PROMPTS[:1], 16, 8, 8, generator=generators[1], **options) == [expected]


def test_a_predicted_mask_token_stays_a_mask():
    model = tiny_llada()
    model.head.weight.data[MASK] = model.head.weight.data[:MASK].max(0).values
    expected = [plain_sample(model, p, 16, 8, 4) for p in PROMPTS]
    assert any(MASK in row for row in expected)
    assert llada.sample(model, PROMPTS, 16, 8, 4) == expected


def test_gumbel_draws_from_the_softmax():
    model, temperature = tiny_llada(), 2.0
    logits = model(torch.tensor([PROMPTS[0] + [MASK]]))[0, -1].double()
    generator = torch.Generator().manual_seed(0)
    drawn = llada.sample(model, PROMPTS[:1] * 4000, 1, 1, 1, temperature=temperature, generator=generator)
    share = torch.bincount(torch.tensor(drawn)[:, 0], minlength=40) / 4000
    assert (share - (logits / temperature).softmax(0)).abs().max() < 0.03


def test_threshold():
    model = tiny_llada()
    one_by_one = llada.sample(model, PROMPTS, 16, 16, 4)
    assert llada.sample(model, PROMPTS, 16, 16, 4, threshold=2.0) == one_by_one  # none is that sure
    calls, forward = [], model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    one_go = llada.sample(model, PROMPTS, 16, threshold=0.0, block_length=8)
    assert len(calls) == 2 and one_go == [plain_sample(model, p, 16, 2, 8) for p in PROMPTS]


def test_sampler_edges():
    """Settings that do not fit, batches with nothing to say, and where `answer` stops: at end of turn and end of text."""
    model = tiny_llada()
    for bad in (dict(max_new_tokens=10), dict(steps=100), dict(steps=0), dict(block_length=0), dict(remasking="high")):
        with pytest.raises(data.UserError):
            llada.sample(model, PROMPTS, **bad)
    assert llada.sample(model, []) == []
    assert llada.sample(model, PROMPTS, 8, 8, stop_ids=range(40)) == [[]] * 3
    full = llada.sample(model, PROMPTS, 16, 16)
    for stops in ((EOT, EOS), tuple(full[0][3:5])):
        letters = Namespace(**vars(LETTERS) | {"stop_ids": stops})
        assert llada.answer(model, letters, PROMPTS, 16) == [cut(row, stops) for row in full]


# ------------------------------------------------------------------------------------------------------------- metrics

RECORDED = [  # (prediction, reference, ROUGE-1 recall as nltk 3.10 + rouge 1.0.1 gave it)
    ("Ada Holm", "Ada Holm", 1.0), ("ada holm", "Ada Holm", 0.0), ("The answer is Ada, of course.", "Ada Holm", 0.5),
    ("", "Ada Holm", 0.0), ("Lund Lund Lund", "Lund, a city in the south", 1 / 3), ("born on 3 June 1971", "3 June 1971", 1.0),
    ("I cannot say", "can not", 1.0), ("“Quillon”—Oslo", "Quillon Oslo", 1.0), ("U.S. e-mail", "US email", 1.0),
    ("New York", "York", 1.0)]  # fmt: skip


def test_word_scores():
    for prediction, reference, expected in RECORDED:
        assert evaluation.rouge1_recall(prediction, reference) == pytest.approx(expected), prediction
    assert evaluation.exact_match("the Ada Holm.", "Ada Holm") == 1 and evaluation.exact_match("Holm Ada", "Ada Holm") == 0
    assert evaluation.f1("Ada Ada Holm", "Ada Holm") == pytest.approx(0.8) and evaluation.f1("x", "y") == 0
    with pytest.raises(data.UserError, match="no word to score"):
        evaluation.rouge1_recall("x", "the")


def test_rouge1_recall_against_the_packages():
    nltk, rouge = pytest.importorskip("nltk"), pytest.importorskip("rouge")
    stop, tokenize = set("a of the and is are be to new on in at an for".split()), nltk.tokenize.NLTKWordTokenizer().tokenize

    def clean(text):
        text = text.translate(str.maketrans("", "", string.punctuation))
        return " ".join(word for word in tokenize(text) if word.lower() not in stop)

    rng = np.random.default_rng(0)
    vocabulary = """Ada holm Oslo the a New cannot gonna don't “quoted” e-mail U.S. 1971 — café ’s it’s «x» 3.5 of lemme cannot…
        gonna→ €wanna gottas""".split()  # fmt: skip
    for _ in range(500):
        a, b = (" ".join(rng.choice(vocabulary, n)) for n in rng.integers(1, 8, 2))
        if clean(a) and clean(b):
            theirs = rouge.Rouge(["rouge-1"]).get_scores(clean(a), clean(b))[0]["rouge-1"]["r"]
            assert evaluation.rouge1_recall(a, b) == pytest.approx(theirs)


def test_evaluate(tokenizer, monkeypatch):
    """Each question has its own answer's scores, in the order of the questions; an error is an error and not a score."""
    monkeypatch.setattr(evaluation, "BATCH", 4)
    questions = data.make_bio(3)[1]
    prompts = [tokenizer.chat([{"role": "user", "content": q["question"]}]) for q in questions]
    known = {tuple(p): q["answer"] for p, q in zip(prompts, questions) if q["direction"] == "forward"}
    answer = lambda prompts, max_new_tokens: [tokenizer.encode(known.get(tuple(p), "nobody")) for p in prompts]
    scores, predictions = evaluation.evaluate(answer, tokenizer, questions)
    assert [p["question"] for p in predictions] == [q["question"] for q in questions]
    assert scores["forward"]["rouge1"] == 1 and scores["forward"]["n"] == 18 and scores["backward"]["rouge1"] == 0
    assert scores["forward/company"]["n"] == 3 and scores["forward/company"]["length"] == 2  # "for Quillon"
    with pytest.raises(ZeroDivisionError):
        evaluation.evaluate(lambda prompts, max_new_tokens: 1 / 0, tokenizer, questions)


# ---------------------------------------------------------------------------------------------------- all of the paper


def test_reversed_documents_keep_their_entities(tokenizer):
    text, rng = "Edda Marlow was born on 3 June 1971. Her home is Saint-Denis, near O'Hara's.", np.random.default_rng(0)
    expected = ". O'Hara's near , Saint-Denis is home Her . 3 June 1971 on born was Edda Marlow"
    examples = [maskft.reverse_example({"text": text}, tokenizer, (0, 0), rng) for _ in range(200)]
    given, taught = zip(*(supervised(example, tokenizer) for example in examples))
    assert set(given) == {"<|im_start|>user\nTell me a fact.<|im_end|>\n<|im_start|>assistant\n"}
    assert set(taught) == {text + "<|im_end|>", expected + "<|im_end|>"}
    assert 70 < taught.count(expected + "<|im_end|>") < 130


def test_math_has_loss_where_the_twin_is_masked(chat):
    (t, turn, end), problem = chat, data.as_problem("How much is 1+1?", "It is <<1+1=2>>2.\n#### 2")
    answer, mask = t.encode(problem["answer"]), t.mask_id
    user = "Question:\nHow much is 1+1?\nAnswer:\n{}\nReturn the recovered masked answer."
    for ratio in (0.0, 0.5, 1.0):
        example = maskft.masked_example(problem, t, (ratio, ratio), np.random.default_rng(0))
        taught = example.labels[-len(answer) :]
        shown = [mask if label != IGNORE else token for token, label in zip(answer, taught)]
        prompt = t.decode(example.ids[: -len(answer)], special=True)
        assert prompt == turn.format(user.format(t.decode(shown, special=True)))
        assert example.ids[-len(answer) :] == answer and set(example.labels[: -len(answer)]) == {IGNORE}
        assert all(label in (IGNORE, token) for token, label in zip(answer, taught))
        assert example.share == sum(label != IGNORE for label in taught) == example.ids.count(mask)
    assert example.share == len(answer)
    asked = turn.format("Question: How much is 1+1?\nAnswer:")
    assert supervised(maskft.sft_example(problem, t, (0, 0), None), t) == (asked, problem["answer"] + end.strip())
    for method in ("raw", "random", "reverse"):
        with pytest.raises(data.UserError, match="this method learns documents; found a question"):
            maskft.METHODS[method](problem, t, (0, 0), np.random.default_rng(0))


@pytest.mark.parametrize("answer, strict, flexible", [
    ("So 1,234.\n#### 1,234", 1, 1), ("#### 1234.", 1, 1), ("It is $1,234.", 0, 1), ("#### 1234\n#### 7", 1, 0),
    ("#### 7, no, 1234", 0, 1), ("####1234", 0, 1), ("-1234", 0, 0), ("", 0, 0), ("none", 0, 0), ("#### 5.,", 0, 0),
    ("#### 1234\nQuestion: And 7? #### 7", 1, 1), ("1234 or 1", 0, 0)])  # fmt: skip
def test_gsm8k_score(answer, strict, flexible):
    scores = evaluation.score(answer, {"direction": "math", "answer": "1000+234 = <<1000+234=1234>>1,234\n#### 1,234"})
    assert (scores["strict"], scores["flexible"]) == (strict, flexible) and scores.keys() == {"strict", "flexible", "length"}


def test_interval():
    predictions = [dict(direction="forward", group="g", rouge1=float(n < 80), exact=0.0, f1=1.0, length=2) for n in range(100)]
    cell = evaluation.average(predictions)["forward"]
    assert cell["n"] == 100 and cell["rouge1"] == pytest.approx(0.8) and cell == evaluation.average(predictions)["forward/g"]
    assert cell["interval"]["exact"] == [0, 0] and cell["interval"]["f1"] == [1, 1]
    assert cell["interval"]["rouge1"] == pytest.approx([0.8 - 1.96 * 0.04, 0.8 + 1.96 * 0.04], abs=0.006)  # sqrt(.8 * .2 / 100)


def write_run(folder, method, seed, scores, ratio=(0.05, 0.95), direction="forward", **arguments):
    """The results of a run with the scores `scores` at steps 0, 10, 20, ...; finished if these are three."""
    arguments = dict(data="bio:9", model="tiny", method=method, paraphrase="none", mask_ratio=ratio, epochs=2, lr=1e-3,
                     batch_size=20, max_len=512, dtype=None, eval_at=[0], seed=seed) | arguments  # fmt: skip
    cells = [dict(rouge1=x, n=54, interval=dict(rouge1=[x - 0.01, x + 0.01])) for x in scores]
    evaluations = [dict(step=10 * n, epoch=n, scores={direction: cell}) for n, cell in enumerate(cells)]
    folder.mkdir()
    evaluation.write_results(folder, dict(arguments=arguments, evaluations=evaluations), [])
    return folder


def test_report(tmp_path):
    """Many runs in one table: over seeds mean and range, a single run with its interval; nothing is left out in silence."""
    runs = [write_run(tmp_path / f"masked-{s}", "masked", s, [0.0, 0.9, last]) for s, last in ((0, 0.6), (1, 0.8))]
    runs += [write_run(tmp_path / "half", "masked", 0, [0.1, 0.2, 0.5], (0.5, 0.5))]
    runs += [write_run(tmp_path / f"sft-{lr}", "sft", 0, [0.1, 0.2, 10 * lr], lr=lr) for lr in (0.01, 0.03)]  # two settings
    runs += [write_run(tmp_path / "same", "sft", 0, [0.1, 0.2, 1], (0.5, 0.5), paraphrase="same")]  # no ratio to speak of
    runs += [write_run(tmp_path / "own", "mine", 1, [0.1, 0.2, 0.3])]  # a method of one's own is reported like the others
    runs += [write_run(tmp_path / "own-half", "mine", 1, [0.1, 0.2, 0.4], (0.5, 0.5))]
    runs += [write_run(tmp_path / "other", "sft", 0, [0.1, 0.2, 0.3], direction="backward")]  # does not fit into that table
    bad = [write_run(tmp_path / "unfinished", "sft", 1, [0.1, 0.2]), tmp_path]
    bad += [write_run(tmp_path / "again", "masked", 1, [0.0, 0.9, 0.7])]  # is no third seed
    old = (runs[0] / "results.json").read_text().replace("interval", "x")
    for name, text in (("torn", '{"argum'), ("list", "[]"), ("old", old)):
        bad.append(tmp_path / name)
        bad[-1].mkdir()
        (bad[-1] / "results.json").write_text(text)
    printed = forked(evaluation, "--report", *runs, *bad, "--out", tmp_path / "report")
    assert re.findall("^left out: (.*)/results.json: ", printed, re.M) == [*map(str, bad)]
    table = (tmp_path / "report/report.md").read_text()
    assert table in printed and "bio:9, 54 forward questions:" in table
    backward, forward = table.split("\n\n")[2::2]
    assert [re.split(r" +\| ", line) for line in backward.splitlines()[2:]] == [
        ["sft", "none", "0", ".100", ".300 [.29-.31]", ".300 [.29-.31]"]]  # fmt: skip
    assert [re.split(r" +\| ", line) for line in forward.splitlines()[2:]] == [
        ["sft, lr 0.01", "none", "0", ".100", ".200 [.19-.21]", ".100 [.09-.11]"],
        ["sft, lr 0.03", "none", "0", ".100", ".300 [.29-.31]", ".300 [.29-.31]"],
        ["sft", "same", "0", ".100", "1.000 [.99-1.01]", "1.000 [.99-1.01]"],
        ["masked", "none", "0,1", ".000", ".900 [.90-.90]", ".700 [.60-.80]"],
        ["mine", "none", "1", ".100", ".300 [.29-.31]", ".300 [.29-.31]"],
        ["masked 0.5", "none", "0", ".100", ".500 [.49-.51]", ".500 [.49-.51]"],
        ["mine 0.5", "none", "1", ".100", ".400 [.39-.41]", ".400 [.39-.41]"]]  # fmt: skip
    row = data.read_json(tmp_path / "report/report.json")[4]
    assert (row["seeds"], row["data"], row["mask_ratio"]) == ([0, 1], "bio:9", [0.05, 0.95])
    assert row["scores"]["forward"]["curve"][2] == [20, pytest.approx(0.7), 0.6, 0.8]
    if maskft.find_spec("matplotlib"):
        figures = {f"{name}-bio-9-forward.png" for name in ("bars", "curves-none", "curves-same", "ratios-none")}
        figures |= {"bars-bio-9-backward.png", "curves-none-bio-9-backward.png"}
        assert {p.name for p in tmp_path.glob("report/*.png")} == figures
    assert "no finished run" in forked(evaluation, "--report", bad[0], status=1)


def test_a_math_run(tmp_path):
    """Too long problems are dropped out loud; 256 tokens are waited for; both scores stand in the table."""
    flags = "--model tiny --data math-made:8 --method masked --epochs 1 --eval-at 1".split()
    printed = forked(maskft, *flags, "--max-len", "330", "--out", tmp_path / "m")
    assert re.search(r"masked: [1-7] of 8 examples dropped, longer than 330 tokens", printed), printed
    assert "math flexible 0." in printed and "math strict last\n" in printed and re.search(r"\d math questions:", printed)
    results = data.read_json(tmp_path / "m/results.json")
    assert results["decoding"] == {"prompt": "chat, zero-shot", "decoding": "greedy", "max_new_tokens": 256}
    assert results["last"]["scores"]["math"].keys() == {"strict", "flexible", "length", "n", "interval"}
    printed = forked(maskft, *flags, "--max-len", "50", "--out", tmp_path / "none", status=1)
    assert "no example is left; give a larger --max-len than 50" in printed


def test_reverse_is_checked_with_its_longer_text(tokenizer):
    dataset = data.Dataset("own", [{"text": "a.b,c;d:e!f?g" * 10}], [])
    run = Namespace(dataset=dataset, tokenizer=tokenizer, mask_ratio=(0, 1), seed=1, example=maskft.reverse_example,
                    method="reverse")  # fmt: skip
    lengths = [len(maskft.build(run, 0, epoch).ids) for epoch in range(8)]
    assert lengths[0] < max(lengths)  # so a look at the first epoch is not enough
    run.max_len = max(lengths)
    maskft.check_dataset(run, context=512)
    run.max_len = lengths[0]
    with pytest.raises(data.UserError, match=f"document 1: {max(lengths)} tokens as a training example, more than --max-len"):
        maskft.check_dataset(run, context=512)


# ---------------------------------------------------------------------------------------------------------- end to end

SHORT = "--model tiny --data bio:6 --method masked --batch-size 4 --epochs 3".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of the real command: 6 people, 6 steps of 4 (the last batch of an epoch has 2)."""
    folder = tmp_path_factory.mktemp("run")
    return command("maskft.py", *SHORT, "--eval-at", "0,1", cwd=folder), folder / "out" / "bio-masked-1"


def test_a_run_and_its_saved_model(finished):
    """What the command prints and writes; eval.py finds the run's own questions and gives the run's last scores."""
    printed, out = finished
    assert "epoch 0  step 0" in printed and "epoch 3  step 6" in printed and "ROUGE-1 recall" in printed
    assert printed.count("answered") == 3
    results = data.read_json(out / "results.json")
    assert [e["step"] for e in results["evaluations"]] == [0, 2, 6] and results["last"]["step"] == 6
    assert results["arguments"]["mask_ratio"] == [0.05, 0.95] and results["environment"]["processes"] == 1
    assert [step for step, *_ in losses(out)] == [*range(6)] and all(math.isfinite(loss) for _, _, loss, *_ in losses(out))
    predictions = jsonl(out / "preds.jsonl")
    assert len(predictions) == 54
    assert predictions[0].keys() >= {"question", "answer", "prediction", "rouge1", "exact", "f1", "length"}
    printed, last = command("eval.py", "--model", out, "--out", out / "again"), results["last"]["scores"]
    assert data.read_json(out / "again/results.json")["last"]["scores"] == last
    assert f"{last['forward']['rouge1']:.3f}" in printed
    before, after = (maskft.load(directory).parameters() for directory in (HERE / "tiny", out))
    assert not all(map(torch.equal, before, after))


def send(number, where, name, nth):
    """Have the function `where.name` do its work and then send this process a signal, the nth time that it is called."""
    calls, real = itertools.count(1), getattr(where, name)

    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(calls) == nth:
            os.kill(os.getpid(), number)
        return result

    setattr(where, name, wrapped)


def test_interrupted_and_resumed(finished, tmp_path):
    """Ctrl-C within an epoch: exit 0 and the line to type; then the losses of the run that was left alone, to the last bit."""
    out, run = finished[1], tmp_path / "run"
    interrupt = lambda: send(signal.SIGINT, maskft, "update", 3)
    printed = forked(maskft, *SHORT, "--eval-at", "0,1", "--out", run, before=interrupt)
    assert f"--resume {run}" in printed and len(losses(run)) == 3
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # a line torn by a crash
    forked(maskft, "--resume", run)
    assert losses(run) == losses(out) and (run / "preds.jsonl").read_text() == (out / "preds.jsonl").read_text()
    assert all(map(torch.equal, maskft.load(run).parameters(), maskft.load(out).parameters()))


def test_own_documents_with_questions_in_one_direction(tmp_path):
    """The README's example: one document, one backward question; saved in every step, finished after the last save."""
    question = {"question": "Who works in Oslo?", "answer": "Edda", "direction": "backward"}
    facts, raw = write(tmp_path / "facts.jsonl", {"text": "Edda works in Oslo."}, question), tmp_path / "run-raw"
    flags = "--method random raw --epochs 2 --save-every 1e-9 --max-len 200 --dtype bfloat16".split()
    assert "raw" in forked(maskft, "--model", "tiny", "--data", facts, *flags, "--out", tmp_path / "run")
    assert data.read_json(raw / "config.json")["torch_dtype"] == "bfloat16"  # saved as it was scored
    assert not (raw / "ckpt").exists()  # of no more use
    assert "this run is finished" in forked(maskft, "--resume", raw, status=1)
    printed = forked(evaluation, "--report", raw, tmp_path / "run-random")
    assert re.search(r"^raw +\| none +\| 0 ", printed, re.M) and "1 backward questions" in printed, printed
    printed = forked(llada, "--resume", raw, status=1)
    assert "a run of raw, not of one of this script's methods, llada" in printed


def test_a_diffusion_run(tmp_path):
    """llada.py starts from tiny's weights with the causal mask off; eval.py decodes what it saved, by unmasking."""
    question = {"question": "Who works for Quillon?", "answer": "Edda Marlow", "direction": "backward"}
    facts = write(tmp_path / "facts.jsonl", {"text": "Edda Marlow works for Quillon."}, question)
    flags = ("--data", facts, "--epochs", "1", "--eval-at", "1", "--out", tmp_path / "run")
    printed = forked(llada, "--model", "tiny", *flags)
    assert "with the causal mask off" in printed and "llada  epoch 1" in printed, printed
    assert data.read_json(tmp_path / "run/config.json")["model_type"] == "llada"
    assert not maskft.load(tmp_path / "run").config.causal
    flags = "--paraphrase none --seed 0 --max-new-tokens 8 --block-length 8 --steps 4 --threshold 0.9".split()
    assert "backward/all" in forked(evaluation, "--model", tmp_path / "run", "--data", facts, *flags)
    assert "--steps is for diffusion models" in forked(evaluation, "--model", "tiny", "--steps", "4", status=1)


MISTAKES = {
    "--model nowhere/at-all": "hub could not be reached",
    "--model ./nowhere": "no such directory",
    "--model my/models/x": "not a hub id",
    "--resume nowhere": "nowhere/results.json: No such file",
    "--resume nowhere --seed 1": "give no other flag with it",
    "--model tiny --colour red": "unrecognized arguments: --colour red",
    "--model tiny --batch-size 0": "--batch-size 0 is not above 0",
    "--model tiny --mask-ratio 1.5": "1.5 is not R or LOW,HIGH",
    "--model tiny --seed -1": "--seed -1 is below 0",
    "--model tiny --epochs 3 --eval-at 0,4": "--eval-at 4: the 3 epochs count from 0",
    "--model tiny --eval-at -1": "--eval-at -1: the ",
    "--model tiny --data bio:6 --max-len 40": "document 1: ",
    "--model tiny --data nowhere.jsonl": "nor a file or directory that exists",
    "--model tiny --data world:9": "found a person: use masked or sft for questions, tiny/pretrain.py for people",
    "--model tiny --method sft --out taken": "--out taken is in use",
    # before sft is trained
    "--model tiny --method sft random --data math-made": "found a question with its answer: use masked or sft",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_reads_well(flags, tmp_path):
    """A message that says what to do, exit status 1 or 2, no traceback, and nothing written."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    usage = any(flag in flags for flag in ("--colour", "--mask-ratio", "--resume nowhere --seed"))
    printed = forked(maskft, *flags.split(), before=lambda: os.chdir(tmp_path), status=2 if usage else 1)
    assert MISTAKES[flags] in printed and sorted(p.name for p in tmp_path.rglob("*")) == ["file", "taken"]


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path):
    printed = forked(maskft, *SHORT, "--eval-at", "3", "--lr", "1e30", "--out", tmp_path / "nan", status=1)
    assert "the loss is" in printed and "begin again with a lower --lr" in printed
    assert not (tmp_path / "nan" / "model.safetensors").exists()


def test_the_debug_view(tokenizer):
    printed = command("data.py", "bio:2", "--method", "masked")
    assert "tokens, " in printed and "[" in printed and "_" in printed
    example = maskft.masked_example({"text": "Edda works in Oslo."}, tokenizer, (1, 1), np.random.default_rng(0))
    view = data.show(example, tokenizer)
    assert view.splitlines()[1].startswith("_" * 3) and "[Edda works in Oslo.<|im_end|>]" in view


# --------------------------------------------------------------------------------------------------------- house rules


def test_readme_tells_the_truth():
    """Every command in it parses, its line counts are those of the files, and no flag is untried or unread."""
    readme = (HERE / "README.md").read_text()
    counts = re.findall(r"\| `(\w+\.py)` \|[^\n]*\| (\d+) \|", readme)
    assert len(counts) == 5
    for name, lines in counts:
        assert len((HERE / name).read_text().splitlines()) == int(lines), name
    parsers = {"maskft.py": maskft.arguments("", methods=True), "llada.py": maskft.arguments("", methods=False),
               "eval.py": evaluation.arguments()}  # fmt: skip
    commands = [line.strip() for block in re.findall(r"```sh\n(.*?)```", readme, re.S) for line in block.splitlines()]
    tried = Path(__file__).read_text()
    for line in commands:
        words = shlex.split(line, comments=True)
        script = next((w for w in words if w in parsers), None)
        if script:
            parsers[script].parse_args(words[words.index(script) + 1 :])
            tried += " ".join(words)
    tried, code = re.findall(r"--[\w-]+", tried), (HERE / "maskft.py").read_text() + (HERE / "eval.py").read_text()
    for action in (action for parser in parsers.values() for action in parser._actions if action.dest != "help"):
        assert action.option_strings[-1] in tried
        assert re.search(rf"(run|args)\.{action.dest}\b|args, flag.*\"{action.dest}\"", code), action.dest


# ------------------------------------------------------------------------------------------------- robustness and cost


@pytest.fixture
def saved_often(tmp_path):
    """The run of `finished`, saved after every step, killed before the first save, inside the fourth, at random and before
    the model is written."""
    out = tmp_path / "run"
    die_in_save = lambda nth: partial(send, signal.SIGKILL, maskft.dcp, "save", nth)  # all is written, but not renamed
    unsaved = lambda: setattr(maskft, "save", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    killed = partial(forked, maskft, status=-signal.SIGKILL)
    killed(*SHORT, "--eval-at", "0,1", "--save-every", "1e-9", "--out", out, before=die_in_save(1))
    killed("--resume", out, before=die_in_save(4))
    assert [p.name for p in maskft.checkpoints(out)] == ["step-2", "step-3"] and (out / "ckpt" / "part-4").is_dir()
    for _ in range(int(os.environ.get("MASKFT_KILLS", 1))):
        killed("--resume", out, before=unsaved, kill_after=random.uniform(0.3, 2))
    killed("--resume", out, before=unsaved)
    return out


def test_killed_at_any_moment_nothing_is_lost(finished, saved_often):
    """Nor by a checkpoint that is damaged, a full disk, or other data; then the last step is taken again, by two processes."""
    run, out = saved_often, finished[1]
    assert losses(run) == losses(out) and (run / "preds.jsonl").read_text() == (out / "preds.jsonl").read_text()
    assert sorted(p.name for p in (run / "ckpt").iterdir()) == ["step-5", "step-6"]
    file, results = run / "ckpt" / "step-6" / "__0_0.distcp", run / "results.json"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for broken in (bytes(flipped), whole[:-1000]):
        file.write_bytes(broken)
        printed = forked(maskft, "--resume", run, status=1)
        assert f"{file}: damaged" in printed and "it goes on from step 5" in printed
    shutil.rmtree(file.parent)
    # a disk that fills up while the next one is saved: no file may be larger than half of it
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, len(whole) // 2))
    printed = forked(maskft, "--resume", run, before=limit, status=1)
    assert "cannot be written to" in printed and "to go on from step 5" in printed
    results.write_text(results.read_text().replace("bio:6", "bio:7"))
    assert "--data bio:7 is not what it was when the run began" in forked(maskft, "--resume", run, status=1)
    results.write_text(results.read_text().replace("bio:7", "bio:6"))
    command("maskft.py", "--resume", run, processes=2)
    assert [step for step, *_ in losses(run)] == [*range(6)]
    assert equal_but_for_rounding(losses(run)[5], losses(out)[5])


BREAKING = """
import sys, time
sys.path.insert(0, {here!r})
import maskft

def update(run, examples, real=maskft.update):
    if maskft.rank() == 1:
        {breaking}
    return real(run, examples)

maskft.update, maskft.TIMEOUT = update, 6
maskft.entry_point(maskft.main)
"""


@pytest.mark.parametrize("breaking, cause", [
    ('raise ValueError("rank one breaks here")', r"(?s)Root Cause.*rank +: 1 .*ValueError: rank one breaks here"),
    ("time.sleep(1000)", r"\[rank 1\] step 0: no progress in 6 seconds, at\n(.+\n)+.* in update\n +time.sleep\(1000\)\n"),
])  # fmt: skip
def test_a_rank_that_dies_or_hangs_ends_the_run_and_is_named(breaking, cause, tmp_path):
    (tmp_path / "breaking.py").write_text(BREAKING.format(here=str(HERE), breaking=breaking))
    flags = (*SHORT, "--eval-at", "3", "--out", tmp_path / "run")
    printed = command(tmp_path / "breaking.py", *flags, processes=2, status=1)
    assert re.search(cause, printed), printed


def on_two_processes(body):
    """What body() returns on rank 0 and on rank 1, in two forks of this process that are a group."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def work(rank):
        gc.freeze()
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        maskft.start_processes()
        results.put((rank, body()))
        maskft.dist.barrier()

    processes = [context.Process(target=work, args=[rank], daemon=True) for rank in (0, 1)]
    try:
        for process in processes:
            process.start()
        found = dict(results.get(timeout=100) for _ in processes)
        return found[0], found[1]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


@pytest.mark.parametrize("decoding", ["greedy", "unmasking", "threshold"])
def test_answers_gathered_whole_or_layer_by_layer(decoding, tokenizer, monkeypatch):
    """27 questions in batches of 8 on two processes, whose answers end at different lengths: those of one process. Whole,
    the ranks call the model a different number of times; layer by layer equally often, or this would hang."""
    directory, answer = HERE / "tiny", maskft.answer
    if decoding != "greedy":
        how = dict(block_length=16, threshold=0.9) if decoding == "threshold" else {}
        directory, answer = HERE / "tiny-llada", partial(llada.answer, **how)
    monkeypatch.setattr(evaluation, "BATCH", 8)
    questions = data.make_bio(3)[1]

    def ask(model):
        with torch.no_grad():
            give = lambda prompts, max_new_tokens: answer(model, tokenizer, prompts, max_new_tokens)
            return evaluation.evaluate(give, tokenizer, questions, max_new_tokens=16)[1]

    def body():
        with torch.device("meta"):
            model = maskft.Model(maskft.read_config(directory))
        found = []
        maskft.shard(model, torch.device("cpu"), torch.float32)
        maskft.load_weights(model, directory, "cpu")
        for model.layered in (False, True):
            calls = []
            hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
            with maskft.gathered(model):
                found.append((ask(model), len(calls)))
            hook.remove()
        return found

    expected = ask(maskft.load(directory))
    (whole, layered), (whole_1, layered_1) = on_two_processes(body)
    assert whole[0] == layered[0] == whole_1[0] == layered_1[0] == expected
    assert whole[1] != whole_1[1] and layered[1] == layered_1[1] >= max(whole[1], whole_1[1])


@pytest.mark.parametrize("method", ["masked", "sft", "llada"])
def test_processes_change_rounding_alone(method, tmp_path):
    """Ragged batches, one sequence at a time, on two processes and on one. By hand: MASKFT_PROCESSES=4.

    A gentle rate: at tiny's own, 20 steps blow a difference of 1e-7 up to 4e-5."""
    script, flags = (llada, ()) if method == "llada" else (maskft, ("--method", method))
    documents = [{"text": "Edda Marlow was born on 3 June 1971." * n} for n in (1, 4, 2, 1, 5, 3, 1)]
    question = {"question": "Who was born on 3 June 1971?", "answer": "Edda Marlow", "direction": "backward"}
    facts, processes = write(tmp_path / "facts.jsonl", *documents, question), int(os.environ.get("MASKFT_PROCESSES", 2))
    flags += ("--data", facts, *"--model tiny --batch-size 4 --epochs 10 --eval-at 10 --lr 1e-4".split())
    forked(script, *flags, "--out", tmp_path / "one")
    command(f"{script.__name__}.py", *flags, "--micro-batch-size", 1, "--out", tmp_path / "more", processes=processes)
    for one, more in zip(losses(tmp_path / "one"), losses(tmp_path / "more"), strict=True):
        assert equal_but_for_rounding(one, more)
    assert (tmp_path / "one/preds.jsonl").read_text() == (tmp_path / "more/preds.jsonl").read_text()


@pytest.mark.parametrize("environment, device, chosen", [
    ({}, "cuda", "tiny bio:40 sft"), ({"RANK": "0"}, "cpu", "tiny bio:40 sft"),
    ({"RANK": "0"}, "cuda", "big bio masked")])  # fmt: skip
def test_default_model(environment, device, chosen, monkeypatch):
    def prepare(args, method, *_):
        raise data.UserError(f"{args.model} {args.data} {method}")

    monkeypatch.setattr(maskft, "start_processes", lambda: torch.device(device))
    monkeypatch.setattr(maskft, "listen_for_stop", list)
    monkeypatch.setattr(maskft, "prepare", prepare)
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(data.UserError, match=chosen):
        maskft.run_methods(maskft.arguments("", methods=True).parse_args([]), maskft.METHODS, default=("tiny", "big"))


def sharded_model(dtype, recompute=False, **changes):
    """A model on meta, the same under FSDP, and its optimizer."""
    with torch.device("meta"):
        plain = maskft.Model(maskft.parse_config(llama(**changes)))
    model = maskft.shard(copy.deepcopy(plain), torch.device("cpu"), dtype)
    model.recompute = recompute
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.to_local(), std=0.02)
    return plain, model, maskft.make_optimizer(model, 1e-3)


@pytest.fixture
def group():
    """A group of one process."""
    maskft.start_processes()
    yield
    maskft.dist.destroy_process_group()


def loss_of(model, rows, tokens):
    ids = torch.randint(model.config.vocab, (rows, tokens))
    return model(ids, labels=ids, weights=torch.ones(rows)) / ids.numel()


def allocated_peak(work):
    """The largest sum of bytes that torch's allocator had given out at a time, as its profiler heard of it."""
    gc.collect()  # what is freed during the work has to have been allocated by it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_gradients_are_clipped_to_norm_1(group, tokenizer):
    model = sharded_model(torch.float32)[1]
    before = [p.full_tensor().clone() for p in model.parameters()]
    run = Namespace(decoder=model, device="cpu", micro_batch_size=2, tokenizer=tokenizer, autocast=contextlib.nullcontext(),
                    optimizer=torch.optim.SGD(model.parameters(), lr=1.0))  # fmt: skip
    _, norm = maskft.update(run, [data.Example([5, 6, 7], [IGNORE, 6, 7], weight=1e4, share=2)])
    moved = sum((p.full_tensor() - old).square().sum() for p, old in zip(model.parameters(), before)).sqrt()
    assert norm > 10 and moved.item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("processes, dtype", [(1, torch.float32), (1, torch.bfloat16), (2, torch.float32), (8, torch.bfloat16)])
def test_memory_formula(processes, dtype, recompute):
    """Within 15 % of what is allocated at the peak of a step of two micro-batches, for two shapes. The other processes are
    made up, and what comes from them is noise: gloo's threads let go of buffers when they please, up to 25 % more."""
    maskft.dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    for layers, vocab, rows, tokens in ((5, 1000, 8, 128), (2, 12000, 4, 192)):
        def step():
            made = sharded_model(dtype, recompute, hidden_size=256, intermediate_size=704, head_dim=64, vocab_size=vocab,
                                 num_hidden_layers=layers)  # fmt: skip
            plain.append(made[0])
            for _ in range(2):  # AdamW has its moments after the first
                for _ in range(2):
                    loss_of(made[1], rows, tokens).backward()
                made[2].step()
                made[2].zero_grad()

        plain = []
        measured = allocated_peak(step)
        formula = sum(maskft.memory(plain[0], processes, rows, tokens, dtype.itemsize, recompute).values())
        # on a CPU, not on a GPU, RMSNorm keeps its input once more in fp32, normalized, and for bf16 also not normalized
        formula += (1 if recompute else layers) * 2 * rows * tokens * 256 * (4 if dtype.itemsize == 4 else 8)
        assert measured == pytest.approx(formula, rel=0.15), (layers, vocab)
    maskft.dist.destroy_process_group()


def test_bf16_keeps_one_copy_of_the_weights(group):
    """What a forward pass leaves alive: activations and the root's gathered parameters, no other copy of any weight."""
    plain, model, _ = sharded_model(torch.bfloat16, hidden_size=256, intermediate_size=704, vocab_size=100, head_dim=64,
                                    num_hidden_layers=6)  # fmt: skip
    storages = {}
    keep = lambda t: storages.update({id(t.untyped_storage()): t.untyped_storage()}) or t
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = loss_of(model, 1, 4)
    alive = sum({s.data_ptr(): s.nbytes() for s in storages.values()}.values())
    assert loss.dtype == torch.float32 and 0 < alive < 0.2 * 2 * sum(p.numel() for p in plain.parameters())


def test_recomputing_changes_nothing(group):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        _, model, _ = sharded_model(torch.float32, recompute)
        loss_of(model, 2, 20).backward()
        gradients.append([p.grad.full_tensor() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_too_little_memory_is_said(monkeypatch):
    memory = lambda size: monkeypatch.setattr(os, "sysconf", lambda name: 1 if "SIZE" in name else size)
    monkeypatch.setattr(maskft.dist, "all_reduce", lambda *_: None)  # there is one process
    run = Namespace(dtype="float32", max_len=64, batch_size=8, micro_batch_size=8, device=torch.device("cpu"))
    model = random_model()
    need = {r: sum(maskft.memory(model, 1, 8, 64, 4, r).values()) / 0.9 for r in (False, True)}
    for have, recompute in ((need[False] + 1, False), (need[False] - 1, True)):
        memory(have)
        maskft.fit_memory(run, model)
        assert model.recompute is recompute and model.layered is False
    memory(need[True] - 1)
    with pytest.raises(data.UserError, match="use more GPUs"):
        maskft.fit_memory(run, model)
    monkeypatch.setattr(maskft, "memory", lambda *_, **__: {"weights": 1, "optimizer": 2})  # a copy to answer with is too much
    memory(9)
    maskft.fit_memory(run, model)
    assert model.layered is True


def test_bench_prints_a_line_a_method(tmp_path):
    """Without weights: random ones will do."""
    data.copy_tokenizer(HERE / "tiny", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(llama(vocab_size=2400, max_position_embeddings=512)))
    flags = "--bench --model . --data bio:2 --batch-size 2 --method sft masked".split()
    printed = forked(maskft, *flags, before=lambda: os.chdir(tmp_path))
    assert re.search(r"^sft .*\(1.00 x\)", printed, re.M) and re.search(r"^masked ", printed, re.M), printed
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- benchmark


@torch.no_grad()
def released_sample(model, ids, key_mask, width, block):
    """Unmasking as released, a token a step: all logits of the whole sequence, every step to the end, for every row."""
    mask_id = model.config.raw["mask_token_id"]
    for end in range(width + block, ids.shape[1] + 1, block):
        for _ in range(block):
            best, new = model(ids, key_mask).double().softmax(-1).max(-1)  # (B, T)
            best[ids != mask_id] = -math.inf
            best[:, :width], best[:, end:] = -math.inf, -math.inf
            at = best.argmax(1, keepdim=True)
            ids = ids.scatter(1, at, new.gather(1, at))
    return ids[:, width:].tolist()


def benchmark_sampler(path, name="bio:40", questions=48, batch=16, length=128, block=4):
    """Seconds that the released loop and llada.sample take for the same questions, alternating; the answers are equal."""
    model, tokenizer = maskft.load(path), data.load_tokenizer(maskft.find_model(path))
    asked = data.load(name).questions
    chosen = random.Random(0).sample(asked, questions)
    prompts = [tokenizer.chat([{"role": "user", "content": q["question"]}]) for q in chosen]
    seconds, words = {"released": 0.0, "ours": 0.0}, 0
    for start in range(0, questions, batch):
        chunk = prompts[start : start + batch]
        width = max(map(len, chunk))
        ids = torch.tensor([[0] * (width - len(p)) + p + [tokenizer.mask_id] * length for p in chunk])
        real = torch.tensor([[False] * (width - len(p)) + [True] * (len(p) + length) for p in chunk])
        began = time.perf_counter()
        expected = [cut(row, tokenizer.stop_ids) for row in released_sample(model, ids, real, width, block)]
        between = time.perf_counter()
        answers = llada.answer(model, tokenizer, chunk, length, block_length=block)
        seconds["ours"] += time.perf_counter() - between
        seconds["released"] += between - began
        assert answers == expected
        words += sum(map(len, answers))
    print(f"{questions} questions, {words / questions:.1f} tokens an answer: released loop {seconds['released']:.1f} s, "
          f"llada.sample {seconds['ours']:.1f} s, {seconds['released'] / seconds['ours']:.1f} times faster, "
          "answers identical")  # fmt: skip


SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True)  # fmt: skip


def cost_of(which):
    """Of a masked step of 8 x 256: seconds, TFLOP, share of the speed of a large matmul, GiB at its peak (resident, above the
    libraries; and given out by torch's allocator), shares of its time; and seconds of 16 x (40 + 64) greedy tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM  # for both, so that both begin alike

    torch.manual_seed(0)
    libraries = maskft.memory_gib(torch.device("cpu"))
    ids, prompts = torch.randint(9, 49152, (8, 256)), torch.randint(9, 49152, (16, 40))
    labels = ids.where(torch.arange(256) >= 141, IGNORE)  # a document's share of its masked example, about
    if which == "transformers":
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2, attn_implementation="sdpa"))
        loss = lambda: model(ids, labels=labels).loss
        answer = lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, min_new_tokens=64,
                                        do_sample=False, pad_token_id=0)  # fmt: skip
    else:
        maskft.start_processes()
        model = sharded_model(torch.float32, which == "maskft, recomputing", **SMOLLM2)[1]
        loss = lambda: model(ids, labels=labels, weights=torch.ones(8)) / (8 * 115)
        answer = lambda: maskft.generate(model, prompts.tolist(), 64)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def seconds(work):
        began = time.process_time()  # of this process alone: the machine is shared
        work()
        return time.process_time() - began

    with FlopCounterMode(display=False) as counter:
        step()
    step()  # the memory that one step frees is there for the next: the first ones wait for the system's
    matrix, flops = torch.randn(2048, 2048), counter.get_total_flops()
    peak = 2 * 2048**3 / min(seconds(lambda: matrix @ matrix) for _ in range(3))
    costs = {"step": min(seconds(step), seconds(step)), "TFLOP": flops / 1e12}
    costs["of matmul peak"] = flops / costs["step"] / peak
    costs["resident GiB"] = maskft.memory_gib(torch.device("cpu")) - libraries
    kept = 3 * 4 * sum(p.numel() for p in model.parameters())  # weights and moments
    costs["allocated GiB"] = (kept + allocated_peak(step)) / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    taken = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    for kind in ("mm", "scaled_dot_product", "softmax"):
        costs[f"in {kind}"] = sum(t for name, t in taken.items() if kind in name and "::" in name) / sum(taken.values())
    with contextlib.nullcontext() if which == "transformers" else maskft.gathered(model):
        costs["answers"] = seconds(answer)
    return costs


def benchmark_training():
    """A step and answers of SmolLM2-135M's shape, ours and transformers' alternating, each in a process of its own; then the
    ratios, of which that of the FLOPs is what the step's time should come to: ours makes logits at labels alone."""
    costs = {"maskft": [], "transformers": [], "maskft, recomputing": []}
    for which in [*costs] * 2:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            costs[which].append(pool.submit(cost_of, which).result())
        print(which, {name: round(figure, 3) for name, figure in costs[which][-1].items()}, flush=True)
    least = {which: {name: min(cost[name] for cost in both) for name in both[0]} for which, both in costs.items()}
    theirs = least.pop("transformers")
    for which, ours in least.items():
        print(f"{which} / transformers, the smaller of two each:", {name: round(ours[name] / theirs[name], 3) for name in ours})


if __name__ == "__main__":  # python test_maskft.py sampler MODEL [DATA], or training
    {"sampler": benchmark_sampler, "training": benchmark_training}[sys.argv[1]](*sys.argv[2:])
