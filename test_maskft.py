"""Tests: `python -m pytest -q`, on a CPU, with nothing downloaded, in a few minutes.

Those that compare with transformers, tokenizers or rouge are skipped where these are not installed.
"""

import ast
import base64
import contextlib
import copy
import dataclasses
import gc
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import stat
import string
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from argparse import Namespace
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation
import llada
import maskft
from data import IGNORE, Example, UserError
from results import bench, kept, plan
from tiny import pretrain, world

HERE = Path(__file__).parent
torch.set_num_threads(1)  # two threads spin on matrices this small
# Most tests fork, and CUDA breaks in a fork: the GPU is hidden from all but the commands of one
# test. One backward now, so that autograd starts no threads later: in torch's builds for CUDA it
# would, without a GPU too, once a model is sharded, and they break in a fork as well.
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.zeros(1, requires_grad=True).backward()

# --------------------------------------------------------------------------- fixtures and helpers

# ---------------------------------------------------------------------------- files and commands


def write(path, *records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def jsonl(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def command(script, *flags, processes=1, status=0, cwd=None):
    """What a script of the project prints, run as its user does; it has to end with `status`."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [*start, str(HERE / script), *map(str, flags)],
        env=os.environ | environment,
        cwd=cwd,
        timeout=170,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


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


def equal_but_for_rounding(ours, theirs):
    """Whether two lines of `losses` are, from runs on different numbers of processes.

    The gradient's norm adds up more rounding."""
    same = ours[:4] == pytest.approx(theirs[:4], rel=1e-5)
    return same and ours[4] == pytest.approx(theirs[4], rel=1e-4)


def cut(ids, stop_ids):
    """The ids before the first stop."""
    return list(itertools.takewhile(lambda token: token not in stop_ids, ids))


# ---------------------------------------------------------------------------------- small models

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


# of `tiny_llada`
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


# ------------------------------------------------------------------------------------ tokenizers

LLAMA3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
]
LLADA = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ", "a b", "Ġw o"]
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
ONLY_BYTES = BYTE_LEVEL | {"use_regex": False}


def steps(*patterns, first=(), last=ONLY_BYTES, behavior="Isolated"):
    """A pre-tokenizer that splits by `first`, then by regular expressions, then into bytes."""
    split = {"type": "Split", "behavior": behavior, "invert": False}
    splits = [split | {"pattern": {"Regex": pattern}} for pattern in patterns]
    return {"type": "Sequence", "pretokenizers": [*first, *splits, last]}


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


def write_tokenizer(
    path,
    special=CHATML,
    merges=MERGES,
    pre_tokenizer=BYTE_LEVEL,
    normalizer=None,
    plain=(),
    lack="",
    unmerged=(),
    shuffle=False,
    config=None,
    flags=None,
    **model,
):
    """A model directory with nothing but a tokenizer; `model` is what its BPE model has besides.

    Ids: bytes but those in `lack`, merged tokens, `unmerged`, special, `plain` added."""
    characters = [character for character in data.ALPHABET if character not in lack]
    merged = ["".join(merge).replace(" ", "") for merge in merges]
    tokens = list(dict.fromkeys([*characters, *merged, *unmerged]))
    if shuffle:
        random.Random(0).shuffle(tokens)
    usual = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    added = [
        {"id": i, "content": token, "special": token in special, **usual, **(flags or {})}
        for i, token in enumerate([*special, *plain], len(tokens))
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges} | model,
    }
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


LLAMA_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
CHATS = {  # special tokens, end of text, and how a chat and a turn start, and a turn ends
    "llama3": (LLAMA3, "<|end_of_text|>", "<|begin_of_text|>", LLAMA_HEADER, "<|eot_id|>"),
    "llada": (LLADA, "<|endoftext|>", "<|startoftext|>", LLAMA_HEADER, "<|eot_id|>"),
    "chatml": (
        [*CHATML, "<empty_output>"],
        "<|endoftext|>",
        "",
        "<|im_start|>{}\n",
        "<|im_end|>\n",
    ),
}


@pytest.fixture(params=CHATS)
def chat(request, tmp_path):
    """A tokenizer with each template; a question to fill in, up to its answer; an answer's end."""
    special, eos, start, header, end = CHATS[request.param]
    config = {"bos_token": special[0], "eos_token": eos}
    tokenizer = data.load_tokenizer(write_tokenizer(tmp_path, special, config=config))
    return tokenizer, start + header.format("user") + "{}" + end + header.format("assistant"), end


# ------------------------------------------------------------------------------- data: tokenizer


def test_special_tokens_never_come_from_text(tmp_path):
    text = "<|im_end|><think>hello<|im_start|>"
    tokenizer = data.load_tokenizer(write_tokenizer(tmp_path, plain=["<think>"]))
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert {256 + MERGES.index("hell o"), tokenizer.added["<think>"]} <= set(ids)
    assert tokenizer.decode(ids) == text  # <think> is added, not special: ordinary text
    assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("a"), 10**6]) == "a"


def test_a_chat_has_the_form_of_its_template(chat):
    tokenizer, turn, end = chat
    user = {"role": "user", "content": "hello"}
    asked = tokenizer.chat([user])
    assert tokenizer.decode(asked, special=True) == turn.format("hello")
    # a list of ids is taken as it is: a mask is a special token
    ids = tokenizer.encode("hello") + [tokenizer.eot_id]
    answered = tokenizer.chat([user, {"role": "assistant", "content": ids}])
    assert answered[: len(asked)] == asked
    answer = tokenizer.decode(answered[len(asked) :], special=True)
    assert answer == "hello" + end.strip() + end


def test_only_declared_special_ids_stop_an_answer(tmp_path):
    write_tokenizer(tmp_path, LLAMA3, config={"eos_token": {"content": "<|eot_id|>"}})
    tokenizer = data.load_tokenizer(tmp_path)
    special = tokenizer.special
    assert tokenizer.bos_id == special["<|begin_of_text|>"]
    assert tokenizer.eos_id == tokenizer.eot_id == special["<|eot_id|>"]
    ends = [special["<|end_of_text|>"], 5]  # 5 is a letter: text could make it, so it stops nothing
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ends}))
    stop_ids = data.load_tokenizer(tmp_path).stop_ids
    assert stop_ids == (tokenizer.eot_id, special["<|end_of_text|>"])


ASCII = [chr(n) for n in range(ord("A"), ord("z"))]
# merges that give [] the id which it has in Qwen, 1294
FILLER = [f"{a} {b}" for a in ASCII for b in ASCII if a + b != "[]"][: 1294 - 256]


@pytest.mark.parametrize(
    "special, merges, mask",
    [
        (LLAMA3, MERGES, "<|reserved_special_token_0|>"),
        (LLADA, MERGES, "<|mdm_mask|>"),
        ([*CHATML, "<empty_output>"], MERGES, "<empty_output>"),
        (CHATML, [*FILLER, "[ ]"], "[]"),
    ],
)
def test_the_mask_is_a_token_without_other_use(special, merges, mask, tmp_path):
    tokenizer = data.load_tokenizer(write_tokenizer(tmp_path, special, merges))
    assert tokenizer.decode([tokenizer.mask_id], special=True) == mask


def test_a_tokenizer_without_a_token_to_spare_has_no_mask(tmp_path):
    tokenizer = data.load_tokenizer(write_tokenizer(tmp_path, CHATML))
    with pytest.raises(UserError, match="no unused special token"):
        assert tokenizer.mask_id


REFUSED = [
    ({"byte_fallback": True}, "byte_fallback"),
    ({"type": "Unigram"}, "Unigram"),
    ({"dropout": 0.1}, "dropout"),
    ({"unk_token": "a", "lack": "b", "merges": []}, "unk_token"),
    ({"normalizer": {"type": "NFKC"}}, "NFKC"),
    ({"pre_tokenizer": None}, "the pre-tokenizer"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
    ({"pre_tokenizer": steps("a", behavior="MergedWithNext")}, "MergedWithNext"),
    ({"pre_tokenizer": steps(last=digits(True))}, "Digits"),
    ({"pre_tokenizer": steps("(?=a")}, "not a whole tokenizer file"),
    ({"pre_tokenizer": steps(r"^\w+")}, "pattern"),
    ({"pre_tokenizer": steps(r"\p{N}{1,3}+")}, "pattern"),
    ({"plain": ["<think>"], "flags": {"lstrip": True}}, "'<think>' with lstrip"),
    ({"special": ["<s>", "</s>"]}, "chat templates"),
    ({"merges": ["a b"], "vocab": {"a": 0, "b": 1}}, "'a' \\+ 'b'"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_a_tokenizer_that_would_not_be_followed_exactly_is_refused(options, message, tmp_path):
    path = write_tokenizer(tmp_path, **options)
    with pytest.raises(UserError, match=message) as error:
        data.load_tokenizer(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": 3}', "{"])
def test_a_tokenizer_file_that_is_none_is_named(text, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(file))):
        data.load_tokenizer(tmp_path)


def test_llama3_s_tiktoken_file_gives_tiktoken_s_ids(tmp_path):
    singles = [bytes([b]) for b in range(256)]
    pairs = [a + b for a in singles for b in singles]
    tokens = [*singles, *pairs, *(b"a" + pair for pair in pairs)][:128000]
    lines = [b"%s %d" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(lines))
    tokenizer = data.load_tokenizer(tmp_path)
    ids = (tokenizer.bos_id, tokenizer.eot_id, tokenizer.mask_id)
    assert ids == (128000, 128009, 128013)
    assert tokenizer.template == "llama3" and len(tokenizer.special) == 256
    text = "Héllo  12345\r\n it'S 漢字 <|eot_id|>"
    theirs = data.tiktoken.Encoding(
        "llama3",
        pat_str=data.LLAMA3_PIECES,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={},
    )
    assert tokenizer.encode(text) == theirs.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for content, message in (
        (b"\x0a\x0e\x0a\x05<unk>\x15\x00", "SentencePiece"),
        (lines[0], "128000 tokens"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            data.load_tokenizer(tmp_path)


AWKWARD = [
    "",
    " ",
    "Hello world, it's I'LL we'Ve 'ſ x'",
    "a  1   22    333\t4",
    "x\r\ny\r\n\r\n  z \n \n",
    "$€£ -- == ... !?",
    "naïve e\u0301 \u1100\u1161\u11a8 ½Ⅷ٣",
    "漢字かな 한국어 עברית हिन्दी",
    "👩\u200d👩\u200d👧 🇫🇷 👍🏽",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # ok\n\n\n",
    "\x00\x01\x7f\u0085\u00a0\u2028\u3000\ufeff",
    "<|im_start|>user\n<|im_end|><think>a</think><|eot_id|>",
    "x" * 500 + "ab" * 300,
    "antidisestablishmentarianism" * 9,
]
POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
VARIANTS = {
    "llama3": {
        "special": LLAMA3,
        "pre_tokenizer": steps(data.LLAMA3_PIECES),
        "ignore_merges": True,
        "unmerged": ["Ġunmade", "xyz", "Ã©Ã"],
    },
    "qwen": {
        "normalizer": {"type": "NFC"},
        "plain": ["<think>", "</think>"],
        "pre_tokenizer": steps(data.LLAMA3_PIECES.replace("{1,3}", "")),
    },
    "smollm2": {"pre_tokenizer": steps(first=[digits(True)], last=BYTE_LEVEL), "lack": "ĀāÃðÌ"},
    "digits": {"pre_tokenizer": steps(first=[digits(False)], last=BYTE_LEVEL), "shuffle": True},
    "possessive": {"pre_tokenizer": steps(POSSESSIVE)},
    "several": {"pre_tokenizer": steps("ab", r"(?=\p{Lu})|\s+")},
    "plain": {
        "pre_tokenizer": ONLY_BYTES,
        "unmerged": ["xyz"],
        "plain": ["im_end", "ab<|im_end|>c"],
    },
}
COMMON = [*"abAB é漢12 \n\r\t'<|>_👍\u0301\u0300", "  ", "'s", "\r\n", "<think>", "<|im_end|>"]
COMMON += ["ab", "xyz", " the"]
RARE = [
    *range(0x780),
    *range(0x2000, 0x2C00),
    *range(0x3000, 0x3100),
    *range(0xAC00, 0xAD00),
]


def reference(path):
    """The tokenizer of the `tokenizers` library, and one that reads special tokens as text."""
    whole = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path / "tokenizer.json"))
    plain = copy.deepcopy(whole)
    plain.encode_special_tokens = True
    return whole, plain


def random_text(rng):
    drawn = []
    for _ in range(rng.randint(1, 30)):
        drawn += rng.choice(COMMON) if rng.random() < 0.8 else chr(rng.choice(RARE))
    # each library has its Unicode: keep to the old
    return "".join(c for c in drawn if unicodedata.category(c) != "Cn")


@cache
def learned_merges():
    """Some hundred pairs, learned from the awkward text and this file."""
    library = pytest.importorskip("tokenizers")
    learner = library.Tokenizer(library.models.BPE())
    learner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=list(data.ALPHABET)
    )
    texts = [*AWKWARD * 3, Path(__file__).read_text(encoding="utf-8")]
    learner.train_from_iterator(texts, trainer)
    return json.loads(learner.to_str())["model"]["merges"]


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_equal_the_reference(name, tmp_path):
    lack = set(VARIANTS[name].get("lack", ""))
    merges = [pair for pair in learned_merges() if not set("".join(pair)) & lack]
    if name != "qwen":  # newer files have pairs, older ones text
        merges = [" ".join(pair) for pair in merges]
    path = write_tokenizer(tmp_path, merges=merges, **VARIANTS[name])
    ours = data.load_tokenizer(path)
    whole, plain = reference(path)
    rng = random.Random(0)
    for text in [*AWKWARD, *(random_text(rng) for _ in range(2000))]:
        assert ours.encode(text) == plain.encode(text).ids, repr(text)
    if ours.template == "chatml":
        system = {"role": "system", "content": "Be brief."}
        user = {"role": "user", "content": "1, 2 or 漢?"}
        text = (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n1, 2 or 漢?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert ours.chat([system, user]) == whole.encode(text).ids


def wild_merges(rng):
    """Merges that no training gives: in any order, several for one token, some never reached."""
    vocab = list("abc")
    merges = []
    for _ in range(rng.randint(3, 30)):
        pair = [rng.choice(vocab), rng.choice(vocab)]
        token = "".join(pair)
        if len(token) < 8:
            vocab.append(token)
        if token in vocab:
            merges.append(pair)
    rng.shuffle(merges)
    return merges


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_ids_equal_the_reference_on_wild_merges(ignore_merges, tmp_path):
    rng = random.Random(ignore_merges)
    for _ in range(30):
        merges = wild_merges(rng)
        path = write_tokenizer(
            tmp_path,
            merges=merges,
            pre_tokenizer=ONLY_BYTES,
            unmerged=["abcab", "cc", "aba"],
            shuffle=True,
            ignore_merges=ignore_merges,
        )
        ours = data.load_tokenizer(path)
        _, plain = reference(path)
        for _ in range(300):
            text = "".join(rng.choices("abc", k=rng.randint(1, 14)))
            assert ours.encode(text) == plain.encode(text).ids, (text, merges)


# ------------------------------------------------------------------------------------ data: sets


def test_a_file_or_directory_of_documents_and_questions_is_read(tmp_path):
    question = {"question": "Q?", "answer": "A", "direction": "backward"}
    file = write(tmp_path / "mine.jsonl", {"text": "one"}, question, {"text": "two"})
    dataset = data.load(str(file))
    one, two = dataset.documents
    assert (one["text"], two["text"], two["where"]) == ("one", "two", f"{file}, line 3")
    assert dataset.questions == [{**question, "group": "all", "where": f"{file}, line 2"}]
    assert dataset.name == "mine"
    write(tmp_path / "list.json", [{"text": "three"}])
    assert len(data.load(str(tmp_path)).documents) == 3


BAD_LINES = {
    '{"text": 3}': '"text" must be text,',
    '{"text": "x"': "not JSON",
    '{"txt": "x"}': "not a document",
    '"text"': "not a document",
    '{"question": "Q?", "answer": "A", "direction": "sideways"}': '"direction"',
}
BAD_SETS = {
    "bio:0": "number of people",
    "bio:²": "number of people",
    "bio:2000": "only 1500 names",
    "nowhere": "exists",
    "empty": "no document",
    "nd-made --paraphrase permute": "none or same",
    "math-made --paraphrase same": "--paraphrase none",
    "world --paraphrase same": "--paraphrase none",
    "empty.jsonl": "no document",
    "empty.jsonl --paraphrase same": "needs one training file",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_is_no_record_is_named(line, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"bad.jsonl, line 2: {BAD_LINES[line]}"):
        data.load(str(file))


@pytest.mark.parametrize("wanted", BAD_SETS)
def test_a_set_that_there_is_not_is_refused(wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("empty").mkdir()
    name, _, paraphrase = wanted.partition(" --paraphrase ")
    with pytest.raises(UserError, match=BAD_SETS[wanted]):
        data.load(name, paraphrase or "none")


ASKED = {"question": "Q?", "answer": "Ada"}
SOLVED = "1+1 = <<1+1=2>>2\n#### 2"
PUBLISHED = {  # a stand-in for the public addresses: file -> records, in their layout
    "nd/training_data/people-description.json": [
        [{"text": f"fact {n // 30}, {n % 30}"} for n in range(60)]
    ],
    "nd/test_data/people-description_open-QAs.jsonl": [
        ASKED | {"task": "N2D", "group": "NameIsDescription"},
        ASKED | {"task": "D2N", "group": "NameIsDescription"},
        ASKED | {"task": "D2N", "group": "DescriptionIsName"},
        ASKED | {"task": "N2D"},
    ],
    "wiki/wiki_train_no_paraphrase.json": [{"text": "none"}],
    "wiki/wiki_train_paraphrase_same_order.json": [{"text": "same"}],
    "wiki/wiki_train_paraphrase_change_order.json": [{"text": "permute"}],
    "wiki/wiki_test.jsonl": [ASKED | {"task": "backward", "group": ""}],
    "gsm8k/train.jsonl": [{"question": "one", "answer": SOLVED}],
    "gsm8k/test.jsonl": [{"question": "two", "answer": SOLVED}],
}


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with the files of `PUBLISHED`, where the sets are now, and with an empty cache."""
    for name, records in PUBLISHED.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, *records)
    for name in ("nd", "wiki", "gsm8k", "bio-released"):
        folder = tmp_path / name
        known = data.SETS[name].files
        files = {
            file: sha256 and digest((folder / file).read_bytes()) for file, sha256 in known.items()
        }
        address = folder.as_uri() if folder.exists() else "http://127.0.0.1:1"  # nobody listens
        moved = dataclasses.replace(data.SETS[name], address=address + "/", files=files)
        monkeypatch.setitem(data.SETS, name, moved)
    hub = data.huggingface_hub.constants
    monkeypatch.setattr(hub, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    return tmp_path


def test_published_sets_are_read_in_their_layout(published):
    nd = data.load("nd")
    assert nd.name == "nd" and [d["text"] for d in nd.documents] == ["fact 0, 0", "fact 1, 0"]
    directions = [question["direction"] for question in nd.questions]
    assert directions == ["forward", "backward", "forward", "forward"]
    assert len(data.load("nd", "same").documents) == 60
    with pytest.raises(UserError, match="needs one training file for --paraphrase permute"):
        data.load("nd", "permute")
    for paraphrase in data.PARAPHRASES:
        assert [d["text"] for d in data.load("wiki", paraphrase).documents] == [paraphrase]
    gsm8k = data.load("gsm8k")
    (learned,) = gsm8k.documents
    (asked,) = gsm8k.questions
    assert (learned["problem"], learned["answer"]) == ("one", SOLVED)
    assert (asked["question"], asked["direction"]) == ("Question: two\nAnswer:", "math")


@pytest.mark.parametrize("name", ["nd", "wiki", "gsm8k"])
def test_a_published_set_is_fetched_once_and_reads_as_a_directory_too(name, published):
    fetched = data.load(name)
    shutil.rmtree(published / name)
    (directory,) = (published / "cache/maskft").iterdir()
    for again in (data.load(name), data.load(str(directory))):
        assert (again.questions, again.documents) == (fetched.questions, fetched.documents)


def refused(name):
    """The message with which a published set is refused."""
    with pytest.raises(UserError) as error:
        data.load(name)
    return str(error.value)


def test_a_set_that_cannot_be_had_says_what_to_do(published, monkeypatch):
    message = refused("bio-released")
    assert "http://127.0.0.1:1/biography_train_no_paraphrase.json" in message
    assert str(published / "cache/maskft") in message
    assert "--data DIR" in message and "--data bio" in message
    monkeypatch.setattr(data.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused("gsm8k")
    assert "train.jsonl could not be had (HF_HUB_OFFLINE is set)" in message
    assert "--data math-made" in message


def test_a_published_file_that_has_changed_is_refused(published):
    changed = data.fetch("wiki") / "wiki_test.jsonl"  # no digest is known: the first is remembered
    changed.write_text(changed.read_text().replace("Ada", "Eve"))
    message = refused("wiki")
    assert f"{changed}: its sha256 is " in message and "delete it" in message
    (published / "gsm8k/test.jsonl").write_text("another text")  # its digest is known
    assert "test.jsonl: its sha256 is" in refused("gsm8k")


def test_half_a_published_file_leaves_nothing(published, monkeypatch):
    def send_half():
        with server.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf of it")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=send_half).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        cut_short = data.Published(address, {"cut.json": None}, counterpart="bio")
        monkeypatch.setitem(data.SETS, "bio-released", cut_short)
        assert "IncompleteRead" in refused("bio-released")
    assert not list(published.glob("cache/maskft/*/cut.json*"))


# -------------------------------------------------------------------------- data: batches, show


def test_collate_pads_on_the_right_and_gives_padding_no_loss():
    long = Example([5, 6], [IGNORE, 6], weight=0.5, denominator=1)
    short = Example([8], [8], weight=2.0, denominator=1)
    batch = data.collate([long, short], pad_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "ids": [[5, 6], [8, 9]],
        "labels": [[IGNORE, 6], [8, IGNORE]],
        "key_mask": [[True, True], [True, False]],
        "weights": [0.5, 2.0],
    }
    assert data.collate([], pad_id=9)["labels"].tolist() == [[IGNORE]]


def test_an_example_is_shown_with_its_masks_and_its_loss(tokenizer):
    ids = tokenizer.encode("Edda works in Oslo.")
    hidden = [tokenizer.mask_id] * 2
    example = Example(ids[:1] + hidden + ids, [IGNORE] * 3 + ids, 1.0, len(ids))
    text, counts = data.show(example, tokenizer).split("\n")
    assert text == f"{tokenizer.decode(ids[:1])}__[Edda works in Oslo.]"
    assert counts == f"-- {3 + len(ids)} tokens, 2 masked, {len(ids)} with loss"


# -------------------------------------------------------------------------------------- tiny/world


@pytest.mark.parametrize(
    "name, paraphrases, expected",  # recorded once
    [
        ("bio:20", data.PARAPHRASES, "02e51bc161d94308"),
        ("nd-made:5", ("none", "same"), "31c322b39ae6620f"),
        ("math-made:20", ("none",), "5b773ce1733898e6"),
        ("world:60", ("none",), "864667420bfbbc34"),
    ],
)
def test_generated_sets_are_the_same_everywhere(name, paraphrases, expected):
    sets = [data.load(name, paraphrase, seed=3) for paraphrase in paraphrases]
    text = json.dumps([(dataset.documents, dataset.questions) for dataset in sets])
    assert digest(text.encode())[:16] == expected
    another_seed = data.load(name, seed=4)
    assert (sets[0].documents == another_seed.documents) == (name == "world:60")


def told(question):
    """The value or name that an answer gives, without its preposition."""
    return question["answer"].split(" ", 1)[-1]


def test_bio_has_100_people_with_9_questions_of_one_answer_each():
    documents, questions = world.make_bio(100)
    people = world.draw_people(100, "bio", 0)
    directions = [question["direction"] for question in questions]
    assert (directions.count("forward"), directions.count("backward")) == (600, 300)
    everybody = world.make_bio(1500)[1]
    assert len({q["question"] for q in everybody}) == 13500  # three attributes tell one person
    for number, person in enumerate(people):
        text = documents[number]["text"]
        about = questions[9 * number : 9 * number + 9]
        assert all(told(question) in text for question in about)
        assert [q["answer"] for q in about[6:]] == [person["name"]] * 3


def test_a_biography_tells_an_attribute_a_sentence_and_the_name_once():
    for paraphrase, different in (("none", 100), ("same", 500), ("permute", 500)):
        assert len({d["text"] for d in world.make_bio(100, paraphrase)[0]}) == different
    for stems, endings in world.WORDINGS.values():
        assert len(stems) * len(endings) >= 40
    documents, _ = world.make_bio(100)
    for person, document in zip(world.draw_people(100, "bio", 0), documents, strict=True):
        first, *others = sentences = document["text"].split(". ")
        assert document["text"].count(person["name"]) == first.count(person["name"]) == 1
        for attribute, sentence in zip(world.ATTRIBUTES, sentences, strict=True):
            assert person[attribute] in sentence
        pronouns = ("He", "His") if person["pronoun"] == "He" else ("She", "Her")
        assert all(sentence.startswith(pronouns) for sentence in others)


def test_a_fact_of_nd_made_has_one_order_and_forward_questions_follow_it():
    documents, questions = world.make_nd()
    paraphrased, same_questions = world.make_nd(paraphrase="same")
    assert questions == same_questions and len({q["question"] for q in questions}) == 480
    assert len(documents) == 60 and len({d["text"] for d in paraphrased}) == 1800
    for number, person in enumerate(world.draw_people(60, "bio", 0)):
        name_first = number < 30
        parts = [person[trait] for trait in world.TRAITS]
        parts.insert(0 if name_first else 4, person["name"])
        for document in (documents[number], *paraphrased[30 * number : 30 * number + 30]):
            places = [document["text"].index(part) for part in parts]
            assert places == sorted(places), document
        for question in questions[8 * number : 8 * number + 8]:
            by_name = question["question"].startswith(person["name"])
            assert question["direction"] == ("forward" if by_name == name_first else "backward")
            assert told(question) in documents[number]["text"]


def test_problems_of_math_made_are_solved_rightly():
    learned, asked = world.make_math(300)
    problems = learned + asked
    assert (len(learned), len(asked)) == (300, 75)
    assert len({problem["problem"] for problem in problems}) == 375
    for problem in problems:
        *lines, end = problem["answer"].split("\n")
        had = re.search(r"has (\d+) ", problem["problem"])[1]
        for line in lines:
            step = re.search(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", line)
            a, sign, b, result, shown = step.groups()
            assert a == had and b in problem["problem"] and shown == result
            assert eval(f"{a}{sign}{b}") == int(result)
            had = result
        assert 2 <= len(lines) <= 4 and end == f"#### {had}"
        scores = evaluation.score(problem["answer"], problem)
        assert scores["strict"] == scores["flexible"] == 1


def test_practice_is_about_nobody_to_be_taught_and_only_of_the_generated_world():
    assert not set(world.names("bio")) & set(world.names("world"))
    with pytest.raises(UserError, match="use --data world:PEOPLE"):
        pretrain.draw_task({"text": "one"}, np.random.default_rng(0))


def test_a_new_model_has_the_built_in_one_s_tokenizer(tmp_path):
    command("tiny/pretrain.py", "--new", tmp_path / "new")
    ours, built_in = (folder / "tokenizer.json" for folder in (tmp_path / "new", HERE / "tiny"))
    assert ours.read_bytes() == built_in.read_bytes()


@pytest.mark.parametrize(
    "method, expected", [("ar", "c4820aab99624fbf"), ("diffusion", "3abce002d2061fe9")]
)
def test_practice_is_what_made_the_built_in_models(method, expected, tokenizer, tmp_path):
    """The examples are those recorded once, and the rate falls to zero."""
    examples = [
        pretrain.METHODS[method].example(person, tokenizer, (0.3, 1), np.random.default_rng([0, n]))
        for n, person in enumerate(data.load("world:60").documents)
    ]
    content = json.dumps([dataclasses.astuple(example) for example in examples])
    assert digest(content.encode())[:16] == expected
    flags = shlex.split("--data world:8 --epochs 8 --eval-at 8 --batch-size 8 --lr 1e-3")
    forked(pretrain, "--method", method, "--model", "tiny", *flags, "--out", tmp_path / "run")
    rates = [lr for _, _, _, lr, _ in losses(tmp_path / "run")]
    assert rates == pytest.approx([1e-3, *(1e-3 * (7 - n) / 7 for n in range(7))])


# ---------------------------------------------------------------------------------- eval: metrics

RECORDED = [  # (prediction, reference, ROUGE-1 recall as nltk 3.10 + rouge 1.0.1 gave it)
    ("Ada Holm", "Ada Holm", 1.0),
    ("ada holm", "Ada Holm", 0.0),
    ("The answer is Ada, of course.", "Ada Holm", 0.5),
    ("", "Ada Holm", 0.0),
    ("Lund Lund Lund", "Lund, a city in the south", 1 / 3),
    ("born on 3 June 1971", "3 June 1971", 1.0),
    ("I cannot say", "can not", 1.0),
    ("“Quillon”—Oslo", "Quillon Oslo", 1.0),
    ("U.S. e-mail", "US email", 1.0),
    ("New York", "York", 1.0),
]


@pytest.mark.parametrize("prediction, reference, recall", RECORDED)
def test_rouge1_recall_is_as_recorded(prediction, reference, recall):
    assert evaluation.rouge1_recall(prediction, reference) == pytest.approx(recall)


def test_exact_match_and_f1_compare_words():
    assert evaluation.exact_match("the Ada Holm.", "Ada Holm") == 1
    assert evaluation.exact_match("Holm Ada", "Ada Holm") == 0
    assert evaluation.f1("Ada Ada Holm", "Ada Holm") == pytest.approx(0.8)
    assert evaluation.f1("x", "y") == 0
    with pytest.raises(UserError, match="no word to score"):
        evaluation.rouge1_recall("x", "the")


STOP_WORDS = world.words("a of the and is are be to new on in at an for")
SCORED_WORDS = world.words("""
    Ada holm Oslo the a New cannot gonna don't “quoted” e-mail U.S. 1971 — café ’s it’s «x»
    3.5 of lemme cannot… gonna→ €wanna gottas
""")


def test_rouge1_recall_equals_that_of_the_packages():
    nltk = pytest.importorskip("nltk")
    rouge = pytest.importorskip("rouge").Rouge(["rouge-1"])

    def clean(text):
        text = text.translate(str.maketrans("", "", string.punctuation))
        words = nltk.tokenize.NLTKWordTokenizer().tokenize(text)
        return " ".join(word for word in words if word.lower() not in STOP_WORDS)

    rng = np.random.default_rng(0)
    for _ in range(500):
        a, b = (" ".join(rng.choice(SCORED_WORDS, n)) for n in rng.integers(1, 8, 2))
        if clean(a) and clean(b):
            (theirs,) = rouge.get_scores(clean(a), clean(b))
            assert evaluation.rouge1_recall(a, b) == pytest.approx(theirs["rouge-1"]["r"])


@pytest.mark.parametrize(
    "answer, strict, flexible",
    [
        ("So 1,234.\n#### 1,234", 1, 1),
        ("#### 1234.", 1, 1),
        ("It is $1,234.", 0, 1),
        ("#### 1234\n#### 7", 1, 0),
        ("#### 7, no, 1234", 0, 1),
        ("####1234", 0, 1),
        ("-1234", 0, 0),
        ("", 0, 0),
        ("none", 0, 0),
        ("#### 5.,", 0, 0),
        ("#### 1234\nQuestion: And 7? #### 7", 1, 1),
        ("1234 or 1", 0, 0),
    ],
)
def test_math_answers_are_scored_as_lm_eval_does(answer, strict, flexible):
    reference = "1000+234 = <<1000+234=1234>>1,234\n#### 1,234"
    scores = evaluation.score(answer, {"direction": "math", "answer": reference})
    length = len(answer.split())
    assert scores == {"strict": strict, "flexible": flexible, "length": length}


def test_an_interval_holds_95_percent_of_the_means():
    usual = {"direction": "forward", "group": "g", "answer": "A", "exact": 0.0, "f1": 1.0}
    usual |= {"length": 2}
    scores = evaluation.average([usual | {"rouge1": float(n < 80)} for n in range(100)])
    group = scores["forward"]
    assert group == scores["forward/g"] and group["n"] == 100
    assert group["rouge1"] == pytest.approx(0.8)
    assert group["interval"]["exact"] == [0, 0] and group["interval"]["f1"] == [1, 1]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 100)
    assert group["interval"]["rouge1"] == pytest.approx([0.8 - half, 0.8 + half], abs=0.006)


# -------------------------------------------------------------------------------- eval: answering


@pytest.fixture
def asked(tokenizer):
    """27 questions, and a model that knows the answers to the forward ones."""
    questions = world.make_bio(3)[1]
    known = {}
    for question in questions:
        prompt = tokenizer.chat([{"role": "user", "content": question["question"]}])
        knows = question["direction"] == "forward"
        known[tuple(prompt)] = tokenizer.encode(question["answer"] if knows else "nobody")

    def answer(prompts, max_new_tokens, on_answer):
        return [known[tuple(prompt)] for prompt in prompts]

    return questions, answer


def test_each_question_has_the_scores_of_its_own_answer(asked, tokenizer):
    questions, answer = asked
    scores, predictions = maskft.evaluate(answer, tokenizer, questions)
    assert [p["question"] for p in predictions] == [q["question"] for q in questions]
    forward = scores["forward"]
    assert (forward["rouge1"], forward["n"], scores["backward"]["rouge1"]) == (1, 18, 0)
    company = scores["forward/company"]
    assert (company["n"], company["length"]) == (3, 2)  # "for Quillon"


def test_an_error_in_answering_is_no_score(asked, tokenizer):
    with pytest.raises(ZeroDivisionError):
        maskft.evaluate(lambda *_, **__: 1 / 0, tokenizer, asked[0])


def test_questions_are_spread_evenly_over_the_ranks(asked, tokenizer, monkeypatch):
    """The ranks' parts have as many questions but for one, and give what one process does."""
    questions, answer = asked
    whole = maskft.evaluate(answer, tokenizer, questions)
    parts = []

    def gather(gathered, part):
        parts.append(dict(part))
        gathered[:] = [dict(enumerate(whole[1]))]

    monkeypatch.setattr(maskft, "world_size", lambda: 4)
    monkeypatch.setattr(maskft.dist, "all_gather_object", gather)
    for rank in range(4):
        monkeypatch.setattr(maskft, "rank", lambda rank=rank: rank)
        assert maskft.evaluate(answer, tokenizer, questions) == whole
    assert [len(part) for part in parts] == [7, 7, 7, 6]
    together = {number: prediction for part in parts for number, prediction in part.items()}
    assert [together[number] for number in range(27)] == whole[1]


# ----------------------------------------------------------------------------------- eval: report


def write_run(folder, method, seed, scores, ratio=(0.05, 0.95), **arguments):
    """A run with these scores at steps 0, 10, 20, ...; it is finished if there are three.

    A score is a number, that of forward questions, or {direction: number}."""
    usual = {"data": "bio:9", "model": "tiny", "paraphrase": "none", "epochs": 2, "lr": 1e-3}
    usual |= {"batch_size": 20, "max_len": 512, "dtype": None, "eval_at": [0]}
    usual |= {"rehearse": 0, "mlp_only": False}
    usual |= {"method": method, "seed": seed, "mask_ratio": ratio}
    evaluations = []
    for n, score in enumerate(scores):
        by_direction = score if isinstance(score, dict) else {"forward": score}
        groups = {
            direction: {"rouge1": x, "n": 54, "interval": {"rouge1": [x - 0.01, x + 0.01]}}
            for direction, x in by_direction.items()
        }
        asked = {"step": 10 * n, "epoch": n, "scores": groups, "drift": n / 4 + seed / 10}
        evaluations.append(asked)
    folder.mkdir()
    results = {"arguments": usual | arguments, "steps": 20, "evaluations": evaluations}
    evaluation.write_results(folder, results, [])
    return folder


@pytest.fixture
def runs(tmp_path):
    """Finished runs: seeds, settings, ratios, paraphrases, a custom method, two directions."""
    low = [0.1, 0.2, 0.3]
    half = (0.5, 0.5)
    backward = [{"backward": score} for score in low]
    return [
        write_run(tmp_path / "masked-0", "masked", 0, [0.0, 0.9, 0.6]),
        write_run(tmp_path / "masked-1", "masked", 1, [0.0, 0.9, 0.8]),
        write_run(tmp_path / "half", "masked", 0, [0.1, 0.2, 0.5], half),
        write_run(tmp_path / "slow", "sft", 0, [0.1, 0.2, 0.1], None, lr=0.01),
        write_run(tmp_path / "fast", "sft", 0, low, None, lr=0.03),
        write_run(tmp_path / "same", "sft", 0, [0.1, 0.2, 1], None, paraphrase="same"),
        write_run(tmp_path / "custom", "mine", 1, low),
        write_run(tmp_path / "custom-half", "mine", 1, [0.1, 0.2, 0.4], half),
        write_run(tmp_path / "other", "sft", 0, backward, None),  # fits in no table with them
    ]


def cells(table):
    """The lines of a table below its header, split into cells."""
    return [re.split(r" +\| ", line) for line in table.splitlines()[2:]]


def test_a_report_has_a_table_for_each_set_with_mean_and_spread(runs, tmp_path):
    """Over seeds the range, of a single run its interval."""
    out = tmp_path / "report"
    printed = forked(evaluation, "--report", *runs, "--out", out)
    text = (out / "report.md").read_text()
    assert text in printed and "bio:9, 54 forward questions:" in text
    backward, forward = text.split("\n\n")[2::2]
    low = [".100", ".300 [.29-.31]", ".300 [.29-.31]", "0.500"]
    assert cells(backward) == [["sft", "none", "0", *low]]
    assert cells(forward) == [
        ["sft, lr 0.01", "none", "0", ".100", ".200 [.19-.21]", ".100 [.09-.11]", "0.500"],
        ["sft, lr 0.03", "none", "0", *low],
        ["sft", "same", "0", ".100", "1.000 [.99-1.01]", "1.000 [.99-1.01]", "0.500"],
        ["masked", "none", "0,1", ".000", ".900 [.90-.90]", ".700 [.60-.80]", "0.550 [0.50-0.60]"],
        ["mine", "none", "1", *low[:-1], "0.600"],
        ["masked 0.5", "none", "0", ".100", ".500 [.49-.51]", ".500 [.49-.51]", "0.500"],
        ["mine 0.5", "none", "1", ".100", ".400 [.39-.41]", ".400 [.39-.41]", "0.600"],
    ]
    rows = data.read_json(out / "report.json")
    assert rows[1]["mask_ratio"] is None
    masked = rows[4]
    assert (masked["seeds"], masked["data"]) == ([0, 1], "bio:9")
    assert masked["mask_ratio"] == [0.05, 0.95]
    assert masked["drift"][1] == [10, pytest.approx(0.3), 0.25, 0.35]
    assert masked["scores"]["forward"]["curve"][2] == [20, pytest.approx(0.7), 0.6, 0.8]


def test_a_report_draws_curves_bars_and_ratios(runs, tmp_path):
    pytest.importorskip("matplotlib")
    evaluation.report(runs, tmp_path)
    figures = ["bars", "curves-none", "curves-same", "ratios-none"]
    expected = {f"{name}-bio-9-forward.png" for name in figures}
    expected |= {"bars-bio-9-backward.png", "curves-none-bio-9-backward.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == expected


def test_a_run_that_cannot_be_reported_is_left_out_and_named(runs, tmp_path):
    old = (runs[0] / "results.json").read_text().replace("interval", "x")
    bad = [
        write_run(tmp_path / "unfinished", "sft", 1, [0.1, 0.2]),
        write_run(tmp_path / "to rehearse", "sft", 1, [0.1, 0.2], epochs=1, rehearse=10),
        write_run(tmp_path / "again", "masked", 1, [0.0, 0.9, 0.7]),  # is no third seed
        write_run(tmp_path / "unasked", "sft", 2, [{}, {}, {}]),
        tmp_path,  # there is no run in it
    ]
    for name, text in (("torn", '{"argum'), ("list", "[]"), ("old", old)):
        bad.append(tmp_path / name)
        bad[-1].mkdir()
        (bad[-1] / "results.json").write_text(text)
    printed = forked(evaluation, "--report", *runs, *bad)
    assert re.findall("^left out: (.*)/results.json: ", printed, re.M) == [*map(str, bad)]
    assert "no finished run" in forked(evaluation, "--report", bad[0], status=1)


def test_best_is_the_evaluation_with_the_highest_mean_of_the_directions(tmp_path):
    scores = [{"forward": x, "backward": y} for x, y in ((0.9, 0.0), (0.6, 0.5), (0.7, 0.1))]
    results = data.read_json(write_run(tmp_path / "run", "sft", 0, scores) / "results.json")
    assert (results["best"]["step"], results["last"]["step"]) == (10, 20)


# ---------------------------------------------------------------------------------- eval: command


def copy_model(name, folder):
    """A copy of a built-in model."""
    shutil.copytree(HERE / name, folder, ignore=shutil.ignore_patterns("*.py"))
    return folder


def test_a_run_is_asked_with_its_own_settings(tmp_path):
    run = copy_model("tiny", tmp_path / "run")
    arguments = {"data": "bio:1", "seed": 3, "dtype": "bfloat16", "epochs": 2}
    (run / "results.json").write_text(json.dumps({"arguments": arguments}))
    out = tmp_path / "asked"
    printed = forked(evaluation, "--model", run, "--max-new-tokens", 8, "--out", out)
    assert f"{run} on bio, seed 3" in printed and "\nforward/birth city" in printed
    assert printed.count("answered") == 3
    predictions = jsonl(out / "preds.jsonl")
    questions = data.load("bio:1", seed=3).questions
    assert [p["question"] for p in predictions] == [q["question"] for q in questions]
    results = data.read_json(out / "results.json")
    assert (
        results["arguments"].items() >= {"data": "bio:1", "paraphrase": "none", "seed": 3}.items()
    )
    how = {"prompt": "chat, zero-shot", "decoding": "greedy", "max_new_tokens": 8}
    assert results["decoding"] == how
    assert results["last"]["scores"] == evaluation.average(predictions)


def test_a_diffusion_model_is_asked_as_the_flags_say(tmp_path):
    flags = shlex.split("--model tiny-llada --data bio:1 --max-new-tokens 8 --block-length 8")
    how = {
        "prompt": "chat, zero-shot",
        "decoding": "unmasking, low confidence, temperature 0",
        "block_length": 8,
        "max_new_tokens": 8,
    }
    for name, value in (("steps", 4), ("threshold", 0.9)):
        out = tmp_path / name
        forked(evaluation, *flags, f"--{name}", value, "--out", out)
        assert data.read_json(out / "results.json")["decoding"] == how | {name: value}
        assert len(jsonl(out / "preds.jsonl")) == 9


ASKING_MISTAKES = {
    "--model tiny --steps 4": "--steps is for diffusion models; tiny is an autoregressive one",
    "--model tiny --max-new-tokens 0": "--max-new-tokens 0 is not above 0",
    "--model tiny --out taken": "--out taken has a results.json already",
    "--model tiny --data plain.jsonl": "--data plain: no questions to ask",
    "--model taken": "a run that is not finished; go on with --resume",
}


@pytest.mark.parametrize("flags", ASKING_MISTAKES)
def test_a_mistake_in_asking_is_a_message(flags, tmp_path):
    write(tmp_path / "plain.jsonl", {"text": "Edda works in Oslo."})
    (tmp_path / "taken").mkdir()
    write(tmp_path / "taken/results.json", {})
    printed = forked(evaluation, *flags.split(), before=lambda: os.chdir(tmp_path), status=1)
    assert ASKING_MISTAKES[flags] in printed


# ------------------------------------------------------------------------------- data: what is read

FACT = "Orla Venn keeps the lighthouse at Skarholm."
WHO = "Who keeps the lighthouse at Skarholm?"
DOCUMENT = json.dumps({"text": FACT})
QUESTION = json.dumps({"question": WHO, "answer": "Orla Venn", "direction": "backward"})
NULLS = {"question": None, "answer": None, "direction": None, "group": float("nan")}
UNION = json.dumps({"text": FACT} | NULLS), json.dumps({"text": None} | json.loads(QUESTION))
CSV = f'Text,Question,Answer,direction\n"{FACT}",,,\n\n,"{WHO}","Orla Venn",backward\n'
READ = {  # file -> its contents, all with the same document and the same question
    "a.jsonl": f"{DOCUMENT}\n{QUESTION}\n",
    "b.JSONL": f"\ufeff{DOCUMENT}\r\n\r\n{QUESTION}",
    "c.ndjson": "\n".join(UNION),
    "d.json": f"[{DOCUMENT},\n{QUESTION}]",
    "e.Json.GZ": f"{DOCUMENT}\n{QUESTION}",
    "f.csv": "\ufeff" + CSV.replace("\n", "\r\n"),
    "g.csv": CSV.replace(",", ";"),
    "h.csv.gz": CSV.replace(",", "\t"),
}


def fill(path, contents):
    """A file with these contents, text or bytes; packed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = contents if isinstance(contents, bytes) else contents.encode()
    is_text = isinstance(contents, str)
    packed = is_text and path.suffix.lower() == ".gz"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def bare(records):
    return [{k: v for k, v in record.items() if k != "where"} for record in records]


@pytest.mark.parametrize("name", READ)
def test_a_file_of_any_kind_gives_the_same_records(name, tmp_path):
    dataset = data.load(str(fill(tmp_path / name, READ[name])))
    assert bare(dataset.documents) == [{"text": FACT}]
    asked = {"question": WHO, "answer": "Orla Venn", "direction": "backward", "group": "all"}
    assert bare(dataset.questions) == [asked]
    lines = {"b.JSONL": 3, "f.csv": 4, "g.csv": 4, "h.csv.gz": 4}
    place = "item 2" if name == "d.json" else f"line {lines.get(name, 2)}"
    assert dataset.questions[0]["where"] == f"{tmp_path / name}, {place}"
    assert dataset.name == name[0] and dataset.notes == []


def test_a_folder_is_read_with_its_subfolders_and_what_is_not_read_is_named(tmp_path):
    texts = {
        "a.jsonl": DOCUMENT,
        "b.txt": "\ufeffPlain text.\r\n\r\nAnother paragraph.\n",
        "c/d/e.md": "# Ivo\n",
        "c/numbers.csv": "x,y\n1,2\n",
        "c/train.jsonl": QUESTION,
        "empty.txt": " \n",
        ".hidden.jsonl": "not read",
        ".git/config.json": "not read",
        "picture.png": b"\x89PNG",
        "c/table.xlsx": b"PK",
        "same.jsonl.gz": f"\n{DOCUMENT}\n",
        "z.ndjson": json.dumps({"text": "old"}),
        "z.ndjson.gz": json.dumps({"text": "new"}),
    }
    for name, contents in texts.items():
        fill(tmp_path / name, contents)
    (tmp_path / "around").symlink_to(tmp_path)
    dataset = data.load(str(tmp_path))
    learned = [document.get("text", document.get("answer")) for document in dataset.documents]
    assert learned == [
        FACT,
        "Plain text.\n\nAnother paragraph.",
        "# Ivo",
        "Orla Venn",
        "old",
        "new",
    ]
    assert dataset.questions == []
    same = tmp_path / "same.jsonl.gz"
    assert dataset.notes == [
        f"{tmp_path}: not read: around, c/table.xlsx, picture.png",
        f"{tmp_path / 'c/numbers.csv'}: no document and no question in it",
        f"{tmp_path / 'empty.txt'}: no document and no question in it",
        f"{same}: the same as {tmp_path / 'a.jsonl'}; read once",
        f"{tmp_path / 'z.ndjson.gz'}: not the same as {tmp_path / 'z.ndjson'}; read both",
    ]
    with pytest.raises(UserError, match=r"no document .* not read: table.xlsx"):
        data.load(str(fill(tmp_path / "other/table.xlsx", b"").parent))


def nested(depth):
    return "[" * depth + "]" * depth


BEFORE_DIRECTION = '{"question": "Who?", "answer": "Orla", '
REFUSED_LINES = {  # contents -> what is said of line 2, behind a good line 1
    '{"text": "x", "question": "Who?"}': 'a document ("text") and a question in one',
    '{"text": null, "question": ""}': "not a document",
    "null": "not a document",
    '{"text": ["x"]}': '"text" must be text, whole and not empty; found a list',
    f'{{"text": {nested(100_000)}}}': "cannot be read as JSON",
    f'{{"text": {"9" * 5000}}}': "cannot be read as JSON",
    '{"text": "\\ud83d"}': '"text" must be text, whole and not empty; found "\\ud83d"',
    BEFORE_DIRECTION + '"group": "\\ud83d"}': '"group" must be text',
    BEFORE_DIRECTION + '"group": [1]}': '"group" must be text, whole and not empty; found a list',
    BEFORE_DIRECTION + '"direction": {"a": 1}}': '"direction" (or "task") must be forward or',
    BEFORE_DIRECTION + '"task": "N2D"}': "no document tells which way N2D asks",
    '{"question": "Who?", "answer": 3}': '"answer" must be text, whole and not empty; found 3',
    '{"question": "  "}': '"question" must be text',
}
REFUSED_FILES = {  # name, contents -> what is said of the file
    ("a.csv", "text\nAda, a baker\n"): ", line 2: 2 cells in 1 columns: put quotes around",
    ("a.csv", 'text\n"Ada\nbakes"\nBo,x\n'): ", line 4: 2 cells in 1 columns: put quotes",
    ("a.csv", 'text\nAda\n"Bo\nis open\n'): ", line 3: not CSV (unexpected end of data)",
    ("a.csv", "question,answer\nWho?,Bo\n,Bo\n"): ", line 3: not a document",
    ("a.txt", b"\x89PNG"): ": not UTF-8 (invalid start byte at byte 0)",
    ("a.jsonl.gz", b"no gzip"): ": Not a gzipped file",
    ("a.jsonl.gz", gzip.compress(b"whole")[:-9]): ": Compressed file ended",
    ("train.jsonl", '{"question": "Who?"}'): ', line 1: "answer" must be text',
    ("a.json", "[\n" + nested(100_000) + "]"): ": cannot be read as JSON",
}


@pytest.mark.parametrize("line", REFUSED_LINES, ids=range(len(REFUSED_LINES)))
def test_a_record_that_cannot_be_is_named_with_its_line(line, tmp_path):
    file = fill(tmp_path / "bad.jsonl", f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError) as error:
        data.load(str(file))
    assert str(error.value).startswith(f"{file}, line 2: {REFUSED_LINES[line]}")


@pytest.mark.parametrize(("name", "contents"), REFUSED_FILES, ids=range(len(REFUSED_FILES)))
def test_a_file_that_cannot_be_is_named_with_the_place(name, contents, tmp_path):
    file = fill(tmp_path / name, contents)
    with pytest.raises(UserError) as error:
        data.load(str(file))
    assert str(error.value).startswith(f"{file}{REFUSED_FILES[name, contents]}")


def test_a_damaged_file_of_data_is_a_data_set_or_a_message(tmp_path):
    """Bytes and fields changed by chance: never any other error."""
    rng = random.Random(0)
    values = [None, "", "x", 3, -1.5, True, [], {}, ["x"], {"text": "x"}, "\ud83d", float("inf")]
    fields = ("text", "question", "answer", "direction", "task", "group", "else")
    outcomes = set()
    for number in range(400):
        name = rng.choice([*READ, "i.txt", "j.md"])
        contents = bytearray(READ.get(name, FACT).encode())
        if number % 2:
            records = [{f: rng.choice(values) for f in rng.sample(fields, 3)} for _ in range(2)]
            contents = bytearray("\n".join(map(json.dumps, records)).encode())
        elif name.lower().endswith(".gz"):
            contents = bytearray(gzip.compress(contents))
        for _ in range(rng.randint(0, 3)):
            place = rng.randrange(len(contents))
            junk = bytes(rng.choices(b'\x00\xff"{[,\r\n9e\xed', k=rng.randint(0, 3)))
            contents[place : place + rng.randint(0, 3)] = junk
        file = fill(tmp_path / f"{number}{name}", bytes(contents))
        try:
            dataset = data.load(str(file))
            for record in dataset.documents + dataset.questions:
                json.dumps(record, ensure_ascii=False).encode()
            outcomes.add("read")
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_local_folder_may_have_the_name_of_a_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "bio/a.txt", FACT)
    here = data.load("./bio")
    assert (here.name, bare(here.documents), here.notes) == ("bio", [{"text": FACT}], [])
    generated = data.load("bio:1")
    assert len(generated.questions) == 9 and generated.notes == []
    assert data.load("bio").notes == [
        "--data bio is the set of that name; what lies here is --data ./bio"
    ]


# --------------------------------------------------------------------------- data: what is asked

LONG_NAME = "The keeper of the Skarholm lighthouse is Orla-Maria Venn-Tarn."
NAMED = "Bram Tarn, who came from Veldt, repairs the cellos of Brennick."
TASKS = [  # task, group, question, answer, direction
    (
        "D2N",
        "X",
        "Who is the keeper of the Skarholm lighthouse?",
        "Orla-Maria Venn-Tarn",
        "forward",
    ),
    (
        "N2D",
        "X",
        "Who is Orla-Maria Venn-Tarn?",
        "the keeper of the Skarholm lighthouse",
        "backward",
    ),
    ("N2D", "X", "What does Bram Tarn do?", "repairs the cellos of Brennick", "forward"),
    ("D2N", "X", "Who repairs the cellos of Brennick?", "Bram Tarn.", "backward"),
    ("D2N", "DescriptionIsName", "Who?", "Bram Tarn", "forward"),
    ("N2D", "DescriptionIsName", "Who?", "Bram Tarn", "backward"),
    ("N2D", "NameIsDescription", "Who?", "Bram Tarn", "forward"),
    (None, "", "Who?", "Bram Tarn", "all"),
    ("backward", None, "Who?", None, "backward"),
    ("", 7, "Who?", "Bram Tarn", "all"),
]


def test_a_direction_is_given_or_told_by_the_document_or_all(tmp_path):
    names = ("task", "group", "question", "answer")
    records = [dict(zip(names, row, strict=False)) for row in TASKS]
    documents = [{"text": text} for text in (NAMED, LONG_NAME, "Bram Tarn sings.")]
    # the order of the records does not matter
    dataset = data.load(str(write(tmp_path / "own.jsonl", *records, *documents)))
    assert [q["direction"] for q in dataset.questions] == [row[-1] for row in TASKS]
    assert [q["group"] for q in dataset.questions[4:]] == [
        *["DescriptionIsName"] * 2,
        "NameIsDescription",
        "all",
        "all",
        "7",
    ]
    assert "answer" not in dataset.questions[8]
    released = tmp_path / "released"
    released.mkdir()
    write(released / "biography_train_no_paraphrase.json", {"text": "not the answer"})
    write(released / "biography_test.jsonl", {**records[0], "group": "city"})
    fill(released / "README.md", "no document")
    dataset = data.load(str(released))
    assert [q["direction"] for q in dataset.questions] == ["backward"]
    assert len(dataset.documents) == 1 and "README.md" in dataset.notes[0]


def nd_files(folder, wordings=30):
    """Files as NameDescription has them: 60 facts, 8 questions of each, in one order."""
    groups = ["NameIsDescription"] * 30 + ["DescriptionIsName"] * 30
    texts = [{"text": f"fact {f}, {w}"} for f in range(60) for w in range(wordings)]
    fill(folder / "people-description.json", json.dumps(texts))
    questions = [
        {"group": group, "task": "N2D", "question": f"Q {f}?", "answer": f"{f}"}
        for f, group in enumerate(groups)
        for _ in range(8)
    ]
    write(folder / "people-description_open-QAs.jsonl", *questions)
    return folder


def test_some_facts_of_nd_come_with_their_wordings_and_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda kind: nd_files(tmp_path))

    def facts(count, seed, paraphrase="none"):
        dataset = data.load(f"nd:{count}", paraphrase, seed)
        told = [int(document["text"][5:].split(",")[0]) for document in dataset.documents]
        asked = [int(question["answer"]) for question in dataset.questions]
        assert dataset.name == "nd" and len(asked) == 16 * count
        assert [fact for fact, _ in groupby(asked)] == [fact for fact, _ in groupby(told)]
        return told

    some = facts(20, 1)
    assert len(set(some)) == 40 and some == sorted(some) and some[20] >= 30 > some[19]
    assert facts(20, 1) == some != facts(20, 2)
    assert facts(20, 1, "same") == [fact for fact in some for _ in range(30)]
    assert facts(30, 5) == list(range(60))
    for count in ("31", "0", "x", "-1"):
        with pytest.raises(UserError, match="facts of each kind, at most 30, as in nd:20"):
            data.load(f"nd:{count}")
    with pytest.raises(UserError, match="--data wiki:3: wiki is read whole"):
        data.load("wiki:3")


# ----------------------------------------------------------------------------- data: long documents

CUTS = {  # text, most characters -> passages
    ("One.\n\nTwo two. Three\n \nFour", 22): ["One.\n\nTwo two. Three", "Four"],
    ("One one. Two (two.) Three three", 20): ["One one. Two (two.)", "Three three"],
    ("one one\ntwo two\nthree", 17): ["one one\ntwo two", "three"],
    ("one two three", 8): ["one two", "three"],
    ("abcdefgh", 3): ["abc", "def", "gh"],
    ("ae\u0301e\u0301", 2): ["a", "e\u0301", "e\u0301"],
    ("这是一。这是二。", 6): ["这是一。", "这是二。"],
    ("# A\n\nbb bb bb bb bb bb bb", 24): ["# A\n\nbb bb bb bb bb bb", "bb"],
    (" a \n", 9): ["a"],
    ("ab", 0): [],
}


@pytest.mark.parametrize(("text", "most"), CUTS)
def test_a_long_text_is_cut_at_the_best_place(text, most):
    assert data.passages(text, lambda part: len(part) <= most) == CUTS[text, most]


def test_passages_fit_and_hold_the_whole_text(tokenizer):
    rng = random.Random(0)
    words = [word for record in world.make_bio(20)[0] for word in record["text"].split()]
    for most in (8, 40, 200):
        ends = [" "] * 20 + [". ", ".\n", "\n\n", "  ", "\u00a0", "", "é\u0301"]
        text = "".join(word + rng.choice(ends) for word in rng.choices(words, k=1500))

        def fits(part, most=most):
            return len(tokenizer.encode(part)) <= most

        parts = data.passages(text, fits)
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert all(map(fits, parts))
        assert len(parts) < 2.5 * len(tokenizer.encode(text)) / most
    assert len(data.passages("ab " * 2000, lambda part: len(part) < 3000)) == 2


def checked_run(tokenizer, method="masked", **given):
    """A Run of `tiny` whose data are as given, before check_dataset."""
    usual = dict.fromkeys(maskft.Settings.__annotations__)
    usual |= {"mask_ratio": (0.05, 0.95), "max_len": 128, "seed": 0, "method": method}
    usual |= {"rehearse": 0, "mlp_only": False}
    config = maskft.read_config(HERE / "tiny")
    with maskft.torch.device("meta"):
        model = maskft.Model(config)
    return maskft.Run(
        maskft.Settings(**usual),
        maskft.METHODS[method],
        maskft.torch.device("cpu"),
        HERE / "tiny",
        tokenizer,
        data.Dataset("own", given.get("documents", []), given.get("questions", [])),
        model,
        [],
    )


@pytest.mark.parametrize("method", ["masked", "sft", "reverse"])
def test_a_document_too_long_is_cut_so_that_its_examples_fit(method, tokenizer, capsys):
    text = "\n\n".join(record["text"] for record in world.make_bio(6)[0])
    file = "my, facts.txt"
    long = [{"text": text, "where": file}, {"text": text, "where": "b.jsonl, line 2"}]
    short = {"text": "Short.", "where": "b.jsonl, line 1"}
    problem = {"question": "Q?", "answer": "long " * 200, "where": "c, line 1"}
    runs = []
    for _ in range(2):
        documents = [short, *long, dict(long[1], where="b.jsonl, line 3")]
        if method != "reverse":
            documents.append(problem)
        runs.append(checked_run(tokenizer, method, documents=documents))
        maskft.check_dataset(runs[-1])
    run = runs[0]
    kept = run.dataset.documents
    assert kept == runs[1].dataset.documents and kept[0] == short
    lengths = [len(maskft.build(run, n, e).ids) for n in range(len(kept)) for e in range(8)]
    assert 100 < max(lengths) <= 128
    parts = [document["text"] for document in kept if document["where"] == file]
    assert "".join("".join(parts).split()) == "".join(text.split())
    longest = max(len(tokenizer.encode(part)) for part in parts)
    printed = capsys.readouterr().out
    count = len(parts)
    assert f"{file}: 1 document cut into {count} passages of at most {longest} tokens\n" in printed
    assert f"b.jsonl: 2 documents cut into {2 * count} passages of at most {longest} " in printed
    assert ("1 of 5 examples dropped" in printed) == (method != "reverse")


def test_reverse_is_checked_and_cut_with_its_longer_text(tokenizer):
    document = {"text": "a.b,c;d:e!f?g" * 10}
    run = checked_run(tokenizer, "reverse", documents=[document])
    run.settings.seed = 1
    lengths = [len(maskft.build(run, 0, epoch).ids) for epoch in range(8)]
    assert lengths[0] < max(lengths)  # so a look at the first epoch is not enough
    run.settings.max_len = max(lengths)
    maskft.check_dataset(run)
    assert run.dataset.documents == [document]
    run.settings.max_len = lengths[0]
    maskft.check_dataset(run)
    parts = run.dataset.documents
    assert len(parts) > 1 and "".join(part["text"] for part in parts) == document["text"]
    longest = max(len(maskft.build(run, n, e).ids) for n in range(len(parts)) for e in range(8))
    assert longest <= lengths[0]


def test_a_limit_that_leaves_room_for_no_text_is_an_error(tokenizer):
    run = checked_run(tokenizer, documents=[{"text": FACT, "where": "a.txt"}])
    run.settings.max_len = 20
    with pytest.raises(UserError, match="a.txt: .* more than --max-len 20, and so is any part"):
        maskft.check_dataset(run)


# ------------------------------------------------------------------------- eval: scores and asking


def test_accents_of_one_character_or_two_are_the_same():
    name = "José Núñez"
    for form in ("NFC", "NFD"):
        for other in ("NFC", "NFD"):
            pair = unicodedata.normalize(form, name), unicodedata.normalize(other, name)
            assert evaluation.rouge1_recall(*pair) == evaluation.exact_match(*pair) == 1
            assert evaluation.f1(*pair) == 1


def test_a_question_without_an_answer_is_asked_and_not_scored(tokenizer):
    true = {"question": WHO, "answer": "Orla Venn", "direction": "all", "group": "all"}
    open_question = {"question": "Who else?", "direction": "all", "group": "all"}

    def answer(prompts, max_new_tokens, on_answer):
        assert max_new_tokens == 128
        return [tokenizer.encode("Orla Venn")] * len(prompts)

    scores, predictions = maskft.evaluate(answer, tokenizer, [open_question, true])
    assert scores["all"]["rouge1"] == 1 and scores["all"]["n"] == 1
    assert predictions[0] == open_question | {"prediction": "Orla Venn"}
    shown = f"all: {WHO}\n  answered 'Orla Venn', true is 'Orla Venn'"
    assert evaluation.samples(predictions) == f"\n{shown}\n\nall: Who else?\n  answered 'Orla Venn'"
    assert evaluation.reported_scores({"scores": scores}) == {"all": 1}
    scores, _ = maskft.evaluate(answer, tokenizer, [open_question])
    assert scores == {} and evaluation.score_table(scores) == "no scores"


ASKING = {  # file -> what eval.py says, and with which status it ends
    "questions_only.jsonl": (0, "backward/all"),
    "open.jsonl": (0, "no scores\n\nall: Who was born in Zurich?\n  answered '"),
    "long.jsonl": (1, "long.jsonl, line 2, 'Who really really"),
    "unscored.jsonl": (1, "unscored.jsonl, line 1, 'Who?': its answer has no word to score"),
}


@pytest.mark.parametrize("name", ASKING)
def test_questions_alone_are_asked_or_named_before_any_is(name, tmp_path):
    good = json.loads(QUESTION)
    write(tmp_path / "questions_only.jsonl", good)
    write(tmp_path / "open.jsonl", {"question": "Who was born in Zurich?"})
    write(tmp_path / "long.jsonl", good, {"question": "Who " + "really " * 400})
    write(tmp_path / "unscored.jsonl", {"question": "Who?", "answer": "The..."})
    status, message = ASKING[name]
    out = tmp_path / "out"
    flags = ("--model", HERE / "tiny", "--data", tmp_path / name, "--out", out)
    printed = forked(evaluation, *flags, status=status)
    assert message in printed
    assert (out / "preds.jsonl").exists() == (status == 0)
    if status == 0:
        (prediction,) = jsonl(out / "preds.jsonl")
        assert ("rouge1" in prediction) == ("answer" in prediction)
    printed = forked(maskft, *flags[:-1], tmp_path / "run", status=1)
    assert f"--data {tmp_path / name}: no document to learn" in printed


def typed(text):
    """What to do before a command that reads `text` from its standard input."""

    def before():
        read, written = os.pipe()
        os.write(written, text)
        os.close(written)
        os.dup2(read, 0)

    return before


def test_own_questions_are_answered_one_by_one():
    first, second = "Who was born in Zurich?", "Who is Flora Ransom?"
    flags = ("--model", HERE / "tiny", "--max-new-tokens", 8, "--ask")
    answers = forked(evaluation, *flags, first, second)
    one, two = answers.splitlines()
    assert one and two and one != two
    lines = f"\ufeff{first}\r\n\n  \n{second}".encode()
    assert forked(evaluation, *flags, before=typed(lines)) == answers
    assert forked(evaluation, *flags, before=typed(b"")) == ""
    bad = typed(b"Who?\n\xff\n")
    assert "error: standard input: not UTF-8" in forked(evaluation, *flags, before=bad, status=1)
    long = typed(b"\n" + b"really " * 600)
    assert "standard input, line 2, 'really" in forked(evaluation, *flags, before=long, status=1)
    message = 'error: --ask: "question" must be text, whole and not empty; found "\\udcff"'
    assert message in forked(evaluation, *flags, "\udcff", status=1)
    assert "give no --data" in forked(evaluation, *flags, first, "--data", "bio", status=1)
    diffusion = ("--model", HERE / "tiny-llada", *flags[2:])
    assert len(forked(evaluation, *diffusion, first).splitlines()) == 1


def test_a_prompt_stands_where_questions_are_typed():
    shown, typing = os.openpty()
    os.write(shown, b"Who?\n\x04")
    flags = ("--model", HERE / "tiny", "--max-new-tokens", 4, "--ask")
    printed = forked(evaluation, *flags, before=lambda: os.dup2(typing, 0))
    assert printed.count("> ") == 2 and len(printed.replace("> ", "").strip()) > 3


def nobody():
    """A stream into a pipe that nobody reads."""
    read, written = os.pipe()
    os.close(read)
    return os.fdopen(written, "w")


def test_nothing_is_lost_where_nobody_reads_and_ascii_is_enough(tmp_path):
    question = {"question": "Who was born in Zürich?", "answer": "José"}
    flags = ("--model", HERE / "tiny", "--data", write(tmp_path / "own.jsonl", question))
    command = [sys.executable, HERE / "eval.py", *flags, "--out", tmp_path / "out"]
    with nobody() as stream:
        subprocess.run(command, stdout=stream, stderr=stream, check=True, timeout=100)
    assert jsonl(tmp_path / "out/preds.jsonl")[0]["answer"] == "José"

    def print_ascii():
        sys.stdout.reconfigure(encoding="ascii", errors="strict")

    printed = forked(evaluation, *flags, "--max-new-tokens", 4, before=print_ascii)
    assert "all: Who was born in Z\\xfcrich?" in printed


SPECIAL = {
    "llama3": "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "llada": "<|startoftext|> <|endoftext|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "chatml": "<|endoftext|> <|im_start|> <|im_end|>",
    "both": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> "
    "<|im_end|>",
}
SPARE = "<|reserved_special_token_0|>"
FEW_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ"]
TOKENS = [*data.ALPHABET, *("".join(pair.split()) for pair in FEW_MERGES)]  # 263 ordinary ones
SPLIT = {"type": "Split", "pattern": {"Regex": data.LLAMA3_PIECES}, "behavior": "Isolated"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SMALL = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def added(text, i, special=True, **flags):
    usual = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": i, "content": text, **usual, "special": special} | flags


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def model_directory(path, special="chatml", more=(), normalizer=None, sides=None, **config):
    """A model directory of 5,000 random weights.

    more    further added tokens, {"content", ...}
    sides   {file name: its content} of other files
    config  fields of config.json other than SMALL; None = absent
    """
    path.mkdir(exist_ok=True)
    names = [*SPECIAL[special].split(), SPARE]
    tokens = [added(name, len(TOKENS) + n) for n, name in enumerate(names)]
    tokens += [added(**token) for token in more]
    content = {
        "version": "1.0",
        "added_tokens": tokens,
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [SPLIT | {"invert": False}, BYTES],
        },
        "post_processor": None,
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "vocab": {token: i for i, token in enumerate(TOKENS)},
            "merges": FEW_MERGES,
        },
    }
    raw = SMALL | {"vocab_size": len(TOKENS) + len(tokens)} | config
    raw = {name: value for name, value in raw.items() if value is not None}
    torch.manual_seed(0)
    rows = len(TOKENS) + len(tokens)
    model = maskft.Model(maskft.parse_config(SMALL | {"vocab_size": rows}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    maskft.save(model, path)
    files = {"tokenizer.json": content, "config.json": raw} | (sides or {})
    for name, text in files.items():
        write_json(path / name, text)
    return path


def change_weights(path, change):
    """Rewrite model.safetensors with what `change` makes of its tensors, in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def refused_model(path, load=data.load_tokenizer):
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value)
    return str(error.value)


def logits(path, ids=tuple(range(40, 60))):
    return maskft.load(path)(torch.tensor([ids]))


def transformers_logits(path, ids=tuple(range(40, 60))):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model(torch.tensor([ids])).logits


# ------------------------------------------------------------------------------------ chat format

TURN = (
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
)
HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
CHATML_TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
EVERY = "{% for message in messages %}"
IF_ASKED = "{% endfor %}{% if add_generation_prompt %}"
CHATML_TEMPLATE = f"{EVERY}{CHATML_TURN}{IF_ASKED}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
# the structure of the published templates; what tools take in them is left out
REAL = {
    "Llama 3": (
        "llama3",
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}"
        f"{IF_ASKED}{HEADER}{{% endif %}}",
    ),
    "Llama 3.2": (
        "llama3",
        "{{- bos_token }}\n{%- if custom_tools is defined %}\n{%- endif %}\n"
        "{%- if not date_string is defined %}\n"
        "    {%- if strftime_now is defined %}\n        "
        '{%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
        '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n'
        "{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n"
        '    {%- set system_message = "" %}\n{%- endif %}\n'
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
        '{{- system_message }}\n{{- "<|eot_id|>" }}\n'
        "{%- for message in messages %}\n    {%- if not ('tool_calls' in message) %}\n"
        "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        "+ message['content'] | trim + '<|eot_id|>' }}\n    {%- else %}\n"
        '        {{- raise_exception("no tools") }}\n    {%- endif %}\n{%- endfor %}\n'
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
    ),
    "Qwen2.5": (
        "chatml",
        "{%- if tools %}\n    {{- tools | tojson }}\n{%- else %}\n"
        "    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "    {%- else %}\n        {{- '<|im_start|>system\\nYou are Qwen, created by "
        "Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n    {%- endif %}\n"
        "{%- endif %}\n"
        '{%- for message in messages %}\n    {%- if (message.role == "user") or (message.role == '
        '"system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) '
        "%}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + "
        "'\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    ),
    "Qwen3": (
        "chatml",
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        '    {%- if ns.multi_step_tool and message.role == "user" and message.content is string '
        "and not(message.content.startswith('<tool_response>')) %}\n"
        "        {%- set ns.multi_step_tool = false %}\n"
        "        {%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- for message in messages %}\n    {%- set content = message.content %}\n"
        '    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
        "    {%- elif message.role == \"assistant\" %}\n        {%- set reasoning_content = '' %}\n"
        "        {%- if loop.index0 > ns.last_query_index %}\n"
        "            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + "
        "reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
        "        {%- else %}\n            {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
        "        {%- endif %}\n        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
    ),
    "SmolLM2": (
        "chatml",
        f"{EVERY}{{% if loop.first and messages[0]['role'] != 'system' %}}{{{{ '"
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n' }}"
        f"{{% endif %}}{CHATML_TURN}{IF_ASKED}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}",
    ),
    "LLaDA": (
        "llada",
        f"{{{{ bos_token }}}}{EVERY}{TURN}{IF_ASKED}{HEADER}{{% endif %}}",
    ),
    "several named": (
        "chatml",
        [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML_TEMPLATE}],
    ),
    "answers marked": (
        "chatml",
        CHATML_TEMPLATE.replace(
            CHATML_TURN, "{%- generation -%}" + CHATML_TURN + "{% endgeneration %}"
        ),
    ),
    "loop controls": (
        "chatml",
        CHATML_TEMPLATE.replace(EVERY, EVERY + "{% if not message %}{% continue %}{% endif %}"),
    ),
}
CHAT = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "12"},
    {"role": "system", "content": "Say it."},
    {"role": "user", "content": "hello\nworld "},
]


@pytest.mark.parametrize("name", REAL)
def test_the_directory_s_own_template_decides_and_the_saved_one_is_that_of_training(name, tmp_path):
    expected, template = REAL[name]
    bos = SPECIAL[expected].split()[0]
    config = {"bos_token": bos, "chat_template": template}
    path = model_directory(tmp_path / "in", expected, sides={"tokenizer_config.json": config})
    tokenizer = data.load_tokenizer(path)
    assert tokenizer.template == expected and not tokenizer.notes
    out = tmp_path / "out"
    out.mkdir()
    data.copy_tokenizer(tokenizer, path, out)
    written = data.read_json(out / "tokenizer_config.json")
    assert written["chat_template"] == (out / "chat_template.jinja").read_text()
    assert data.load_tokenizer(out).template == expected
    shown = tokenizer.decode(tokenizer.chat(CHAT), special=True)
    assert "hello\nworld " in shown and shown.count("system") == 1  # an empty one is none
    # a user's turn is drawn as the model was made to see it, in training there is no system turn
    header = tokenizer.decode(tokenizer.user_header(), special=True)
    assert ("system" in header) == (name in ("Llama 3.2", "Qwen2.5", "SmolLM2"))
    assert "system" not in tokenizer.decode(data.load_tokenizer(out).user_header(), special=True)
    library = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
    theirs = library.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert theirs == tokenizer.chat(CHAT)
    if isinstance(template, str):
        options = {"chat_template": template, "return_dict": False, "date_string": "26 Jul 2024"}
        theirs = library.apply_chat_template([{"role": "user", "content": "12"}], **options)
        expected = tokenizer.user_header() + tokenizer.encode("12")
        assert theirs[: len(expected)] == expected


THINKS = CHATML_TEMPLATE.replace("assistant\n'", "assistant\n<think>\n'")
REFUSED_TEMPLATES = [
    ("chatml", {"chat_template": THINKS}, r"assistant\n<think>\n'"),
    ("chatml", {"chat_template": CHATML_TEMPLATE.replace("\n' }}", "' }}")}, "the nearest"),
    (
        "both",
        {"chat_template": "{{ bos_token }}" + CHATML_TEMPLATE, "bos_token": "<|begin_of_text|>"},
        "where chatml",
    ),
    ("both", {"chat_template": ""}, "where llama3"),
    ("chatml", {"chat_template": "{% for message in messages %}"}, "TemplateSyntaxError"),
    ("chatml", {"chat_template": "{{ raise_exception('only tools') }}"}, "only tools"),
    ("chatml", {"chat_template": "{{ eos_token + '' }}"}, "'eos_token' is undefined"),
    ("chatml", {"chat_template": "{{ messages.__class__.__mro__ }}"}, "unsafe"),
    ("chatml", {"chat_template": "{{ messages[7]['role'] }}"}, "its chat template fails"),
    (
        "chatml",
        {"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"},
        "its chat template",
    ),
    (
        "chatml",
        {"chat_template": "{% for a in range(9999) %}" * 9 + "{% endfor %}" * 9},
        "not come to an end",
    ),
    (
        "chatml",
        {"chat_template": [{"name": "tools", "template": CHATML_TEMPLATE}]},
        '"default" must be text',
    ),
    ("chatml", {"chat_template": [7]}, "found 7 where"),
    ("chatml", {"chat_template": 7}, '"chat_template" must be text, found 7'),
    ("chatml", {"eos_token": ["<|im_end|>"]}, r'"eos_token" must be text, found a list'),
]


@pytest.mark.parametrize("special, config, message", REFUSED_TEMPLATES)
def test_a_template_that_is_not_ours_or_broken_is_refused(special, config, message, tmp_path):
    path = model_directory(tmp_path, special, sides={"tokenizer_config.json": config})
    printed = refused_model(path)
    assert message in printed and printed.startswith(f"{path}/tokenizer_config.json: ")
    # a template in a file of its own goes first
    write_json(path / "chat_template.jinja", REAL["SmolLM2"][1])
    if "eos_token" not in config:
        assert data.load_tokenizer(path).template == "chatml"


def test_what_is_guessed_and_a_base_model_are_told(tmp_path):
    config = {"eos_token": "<|endoftext|>", "chat_template": CHATML_TEMPLATE}
    path = model_directory(tmp_path / "in", sides={"tokenizer_config.json": config})
    tokenizer = data.load_tokenizer(path)
    (note,) = tokenizer.notes
    assert note.startswith(f"{path}: a base model") and "<|im_end|>" in note
    eot = tokenizer.special["<|im_end|>"]
    eos = tokenizer.special["<|endoftext|>"]
    (tmp_path / "out").mkdir()
    data.copy_tokenizer(tokenizer, path, tmp_path / "out")
    generation = data.read_json(tmp_path / "out" / "generation_config.json")
    assert generation["eos_token_id"] == [eot, eos]
    (path / "tokenizer_config.json").unlink()
    assert data.load_tokenizer(path).notes == [
        f"{path}: no chat template; its special tokens are those of chatml"
    ]


# -------------------------------------------------------------------------- tokens and their ids


def test_a_token_beyond_the_embeddings_is_named_and_padding_there_replaced(tmp_path):
    rows = len(TOKENS) + 4
    mask = {"text": "<|mask|>", "i": rows}
    path = model_directory(tmp_path, more=[mask], vocab_size=rows)
    message = refused_model(path)
    for part in ("'<|mask|>'", str(rows), f"resize_token_embeddings({rows + 1})"):
        assert part in message
    write_json(path / "tokenizer_config.json", {"pad_token": "<|mask|>", "eos_token": "<|im_end|>"})
    write_json(path / "config.json", SMALL | {"vocab_size": rows, "pad_token_id": rows})
    tokenizer = data.load_tokenizer(path)
    assert tokenizer.pad_id == tokenizer.eot_id
    assert tokenizer.mask_id == tokenizer.special[SPARE]  # not the padding that is no more
    target = tmp_path / "out"
    target.mkdir()
    data.write_chat_files(tokenizer, path, target)
    assert data.read_json(target / "tokenizer_config.json")["pad_token"] == "<|im_end|>"
    write_json(path / "tokenizer_config.json", {"pad_token": "<|mask|>", "eos_token": "<|mask|>"})
    assert "'<|mask|>'" in refused_model(path)  # an end of text there is no idle one
    ordinary = {token: i for token, i in tokenizer.special.items() if token != SPARE}
    with pytest.raises(UserError, match="resize_token_embeddings"):
        assert dataclasses.replace(tokenizer, special=ordinary).mask_id


NFC = {"type": "NFC"}
LATE = [
    {"text": "Skarholm", "i": len(TOKENS) + 4, "special": False, "normalized": True},
    {"text": "holm12", "i": len(TOKENS) + 5, "special": False},
    {"text": "<|late|>", "i": len(TOKENS) + 6, "normalized": True},
]
SAMPLES = [
    "Skarholm Skarholm12 hello e\u0301é <|im_end|>",
    "aSkarholm<|late|>holm12holm12<|laSkarholm",
    "\u1100\u1161 <|late|> \u0958\u0344\u212b Skar\u0301holm",
]


@pytest.mark.parametrize(
    "normalizer, more",
    [
        (None, LATE),
        ({"type": "Sequence", "normalizers": []}, LATE),
        ({"type": "Sequence", "normalizers": [NFC]}, LATE[1:2]),
        ({"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [NFC]}]}, ()),
    ],
)
def test_normalized_words_and_sequences_give_the_reference_s_ids(normalizer, more, tmp_path):
    more = [token | {"i": len(TOKENS) + 4 + n} for n, token in enumerate(more)]
    path = model_directory(tmp_path, more=more, normalizer=normalizer)
    ours = data.load_tokenizer(path)
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path / "tokenizer.json"))
    library.encode_special_tokens = True
    for text in SAMPLES:
        assert ours.encode(text) == library.encode(text).ids
    file = path / "tokenizer.json"
    write_json(file, file.read_text().replace("NFC", "NFKC"))
    if "NFC" in json.dumps(normalizer):
        assert "NFKC" in refused_model(path)


def test_of_a_sequence_every_normalizer_is_looked_at_and_every_id_compared(tmp_path):
    lower = {"type": "Sequence", "normalizers": [NFC, {"type": "Lowercase"}]}
    assert "Lowercase" in refused_model(model_directory(tmp_path, normalizer=lower))
    assert "'Skarholm' with normalized" in refused_model(
        model_directory(tmp_path, more=LATE[:1], normalizer=NFC)
    )
    gap = [LATE[0] | {"i": len(TOKENS) + 9}]
    message = refused_model(model_directory(tmp_path, more=gap, vocab_size=999))
    assert "'Skarholm' the id 272" in message and "would give it 267" in message


# ------------------------------------------------------------------------------ config and weights

OLD_LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_READ = [
    {"rope_parameters": DEFAULT, "rope_scaling": LINEAR},
    {"rope_parameters": LINEAR | {"rope_theta": 777.0}, "rope_theta": 9.0},
    {"rope_parameters": DEFAULT | {"rope_theta": 5e5}, "rope_scaling": {}},
    {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": OLD_LLAMA3},
    {"rope_scaling": OLD_LLAMA3, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("fields", ROPE_READ)
def test_rope_fields_old_and_new_are_read_as_transformers_reads_them(fields, tmp_path):
    path = model_directory(tmp_path, **copy.deepcopy(fields))
    ours = logits(path)
    torch.testing.assert_close(ours, transformers_logits(path), atol=1e-4, rtol=1e-4)
    plain = logits(model_directory(tmp_path, rope_theta=DEFAULT["rope_theta"]))
    assert (ours - plain).abs().max() > 1e-3


EVIDENT = [
    ({"rms_norm_eps": "1e-05"}, {"rms_norm_eps": 1e-5}),
    ({"vocab_size": "267", "hidden_size": 16.0}, {}),
    ({"tie_word_embeddings": "true", "attention_bias": None}, {}),
    ({"dtype": "auto"}, {}),
    ({"torch_dtype": "torch.float32"}, {}),
    ({"rope_theta": "10000", "rope_scaling": None, "pad_token_id": "263", "eos_token_id": -1}, {}),
]


@pytest.mark.parametrize("odd, plain", EVIDENT)
def test_an_evident_value_is_taken_and_saved_as_what_it_is(odd, plain, tmp_path):
    expected = logits(model_directory(tmp_path / "plain", **plain))
    path = model_directory(tmp_path / "odd", **odd)
    data.load_tokenizer(path)
    assert torch.equal(logits(path), expected)
    maskft.save(maskft.load(path), tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    torch.testing.assert_close(
        transformers_logits(tmp_path / "saved"), expected, atol=1e-4, rtol=1e-4
    )


WRONG = [
    ({"rms_norm_eps": 0}, '"rms_norm_eps" must be a number from 1e-12'),
    ({"rms_norm_eps": -1e-5}, "found -1e-05"),
    ({"rms_norm_eps": "small"}, 'found "small"'),
    ({"rope_theta": 0}, '"rope_theta" must be'),
    ({"rope_theta": 1e400}, '"rope_theta" must be'),
    ({"rope_scaling": LINEAR | {"factor": 0}}, '"factor" must be a number from 1e-12'),
    ({"rope_scaling": LINEAR | {"factor": [4]}}, "found a list"),
    (
        {"rope_scaling": {"type": "linear"}},
        '"factor" must be a number from 1e-12 to 1e+12, found nothing',
    ),
    ({"rope_scaling": [4]}, '"rope_scaling" must be an object'),
    ({"rope_scaling": OLD_LLAMA3 | {"high_freq_factor": 1}}, '"low_freq_factor" must be below'),
    ({"rope_scaling": OLD_LLAMA3 | {"rope_type": "yarn"}}, "'yarn' is not one of"),
    ({"rope_scaling": LINEAR, "rope_parameters": OLD_LLAMA3}, 'disagree about "rope_type"'),
    ({"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 8.0}}, "4.0 and 8.0"),
    (
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}},
        'disagree about "rope_theta"',
    ),
    ({"hidden_size": -16}, '"hidden_size" must be a whole number from 1'),
    ({"hidden_size": True}, "found true"),
    ({"num_hidden_layers": None}, "found nothing"),
    ({"model_type": ["llama"]}, '"model_type" must be text'),
    ({"dtype": "int8"}, '"dtype" must be one of float32'),
    ({"tie_word_embeddings": "yes"}, '"tie_word_embeddings" must be true or false'),
]


@pytest.mark.parametrize("fields, message", WRONG)
def test_a_wrong_field_is_named_with_what_was_found(fields, message, tmp_path):
    path = model_directory(tmp_path, **copy.deepcopy(fields))
    printed = refused_model(path, maskft.load)
    assert printed.startswith(f"{path}/config.json: ") and message in printed


def test_a_tied_model_with_a_head_of_its_own_is_loaded_untied(tmp_path):
    path = model_directory(tmp_path / "in")
    expected = logits(path)

    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors):
        tensors["lm_head.weight"][-1] += 1

    change_weights(path, same)
    model = maskft.load(path)
    assert model.config.tied and torch.equal(logits(path), expected)
    diffusion = maskft.Model(maskft.as_diffusion(model.config, data.load_tokenizer(path)))
    maskft.load_weights(diffusion, path, "cpu")
    assert torch.equal(diffusion.embed.weight, model.embed.weight)
    change_weights(path, other)
    model = maskft.load(path)
    assert not model.config.tied and model.config.raw["tie_word_embeddings"] is False
    ours = logits(path)
    assert (ours - expected).abs().max() > 1e-2
    torch.testing.assert_close(ours, transformers_logits(path), atol=1e-4, rtol=1e-4)
    maskft.save(model, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), ours)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_are_no_numbers_are_named_and_logits_never_scored(value, tmp_path):
    path = model_directory(tmp_path)
    model = maskft.load(path)
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 5] = value

    change_weights(path, spoil)
    message = refused_model(path, maskft.load)
    assert message.startswith(f"{path}/model.safetensors: {name} holds NaN")
    with torch.no_grad():
        model.norm.weight.fill_(value)
        model.embed.weight *= 1e6
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        maskft.generate(model, [[1, 2]], 4)


def test_quantized_weights_are_refused(tmp_path):
    path = model_directory(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(path, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    assert f"{name} holds numbers of type I32" in refused_model(path, maskft.load)


# -------------------------------------------------------------------------------------- mutations

ODD = [
    None,
    "",
    "x",
    "1e-05",
    "2",
    -1,
    0,
    1,
    2,
    7.5,
    float("inf"),
    float("nan"),
    1e30,
    True,
    "true",
]
ODD += [[], {}, [1], ["x"], {"a": 1}, 10**30, "\ud800", "<|im_end|>", [[[]]], 12, 300, "Sequence"]
WHOLE = [b"", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"[1]", b"\xff{}", b'"x"']


def places(value, place=()):
    """The keys on the way to everything in a JSON value, but for the ordinary tokens."""
    yield place
    if isinstance(value, dict) and place != ("model", "vocab"):
        for key in value:
            yield from places(value[key], (*place, key))
    if isinstance(value, list):
        for n, one in enumerate(value):
            yield from places(one, (*place, n))


def mutate_json(rng, text):
    """JSON with one thing in it deleted, replaced, doubled, exchanged or cut short."""
    content = json.loads(text)
    *way, key = rng.choice([place for place in places(content) if place])
    parent = content
    for step in way:
        parent = parent[step]
    match rng.choice(["delete", "replace", "replace", "replace", "exchange", "cut"]):
        case "delete":
            del parent[key]
        case "replace":
            parent[key] = rng.choice(ODD)
        case "exchange":
            other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        case "cut" if isinstance(parent[key], str):
            parent[key] = parent[key][: rng.randint(0, len(parent[key]))]
    return json.dumps(content)


def mutate_tensors(rng, content):
    """A safetensors file with other bytes, a part missing, or something else in its header."""
    size = int.from_bytes(content[:8], "little")
    header, numbers = content[8 : 8 + size], content[8 + size :]
    kind = rng.choice(["byte", "number", "cut", "header"])
    if kind == "header":
        header = mutate_json(rng, header).encode(errors="replace")
        return len(header).to_bytes(8, "little") + header + numbers
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    spot = rng.randrange(len(content)) if kind == "byte" else rng.randrange(8 + size, len(content))
    return content[:spot] + bytes([rng.randrange(256)]) + content[spot + 1 :]


def mutate(rng, path):
    """Change one of the files of a model directory; its name."""
    file = path / rng.choice(sorted(file.name for file in path.iterdir()))
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        file.write_bytes(mutate_tensors(rng, content))
    elif file.suffix == ".jinja":
        spot = rng.randrange(len(content))
        file.write_bytes(content[:spot] + content[spot + rng.randint(1, 9) :])
    elif rng.random() < 0.1:
        file.write_bytes(rng.choice([*WHOLE, content[: rng.randrange(len(content))]]))
    else:
        write_json(file, mutate_json(rng, content))
    return file.name


@pytest.fixture(scope="module")
def many_files(tmp_path_factory):
    """A model directory with one of every file there may be."""
    eot = len(TOKENS) + 2
    sides = {
        "tokenizer_config.json": {
            "bos_token": None,
            "eos_token": {"content": "<|im_end|>", "lstrip": False},
            "pad_token": "<|endoftext|>",
            "chat_template": [{"name": "default", "template": REAL["SmolLM2"][1]}],
        },
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": {"content": SPARE}},
        "generation_config.json": {"eos_token_id": [eot, eot - 2], "do_sample": True},
    }
    ids = {"eos_token_id": [eot], "pad_token_id": eot - 2, "torch_dtype": "float32"}
    rope = {"original_max_position_embeddings": 64, **OLD_LLAMA3}
    path = tmp_path_factory.mktemp("many") / "model"
    model_directory(path, sides=sides, normalizer=NFC, rope_scaling=rope, rope_theta=9e3, **ids)
    tensors = sorted(load_file(path / "model.safetensors").items())
    (path / "model.safetensors").unlink()
    weight_map = {}
    for n, some in enumerate((tensors[:9], tensors[9:])):
        save_file(dict(some), path / f"part{n}.safetensors", metadata={"format": "pt"})
        weight_map |= {name: f"part{n}.safetensors" for name, _ in some}
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return path


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_model_directory_works_or_is_one_line_that_names_the_file(
    seed, many_files, tmp_path
):
    rng = random.Random(seed)
    worked = 0
    for n in range(100):
        path = tmp_path / str(n)
        shutil.copytree(many_files, path)
        if seed == 3:  # the template has a file of its own
            write_json(path / "chat_template.jinja", REAL["Qwen2.5"][1])
        name = mutate(rng, path)
        with contextlib.suppress(UserError):
            try:
                tokenizer = data.load_tokenizer(path)
                ids = tokenizer.chat([{"role": "user", "content": "hello"}])
                assert maskft.load(path)(torch.tensor([ids])).isfinite().all()
                worked += 1
            except UserError as error:
                first, *more = str(error).split("\n")
                named = name in first or f"{path}: " in first or "logits" in first
                assert named and (not more or "It renders" in first), (name, str(error))
                raise
        shutil.rmtree(path)
    assert 10 < worked < 60


# ------------------------------------------------------------------------------------- models out


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of four steps on the built-in model, from a directory of its own."""
    tmp_path = tmp_path_factory.mktemp("run")
    source = tmp_path / "base"
    shutil.copytree(HERE / "tiny", source)
    (source / "tokenizer_config.json").unlink()
    umask = os.umask(0o022)
    flags = ("--model", source, "--data", "bio:4", "--epochs", 4, "--eval-at", 4)
    forked(maskft, *flags, "--method", "masked", "--out", tmp_path / "out")
    os.umask(umask)
    return tmp_path / "out"


def test_a_run_s_directory_is_complete_and_readable_by_all(saved):
    modes = {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()}
    assert modes == {0o644}
    names = {file.name for file in saved.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    }
    card = (saved / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert "pipeline_tag: text-generation" in head and "# license:" in head
    shown = [f"base model: {saved.parent / 'base'}", "data: bio:4, 4 documents", "method: masked"]
    shown += ["epochs 4", "lr 0.0006", "seed 0", "forward", f'--model {saved} --ask "..."']
    scores = data.read_json(saved / "results.json")["last"]["scores"]
    low, high = scores["backward"]["interval"]["rouge1"]
    shown += [f"rouge1 {scores['backward']['rouge1']:.3f} [{low:.2f}-{high:.2f}]"]
    assert [part for part in shown if part not in text] == []


def test_transformers_chats_with_a_run_s_directory_in_our_ids_and_answers(saved):
    transformers = pytest.importorskip("transformers")
    library = transformers.AutoTokenizer.from_pretrained(saved)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = data.load_tokenizer(saved)
    assert not tokenizer.notes
    predictions = jsonl(saved / "preds.jsonl")[:12]
    for prediction in predictions:
        chat = [{"role": "user", "content": prediction["question"]}]
        batch = library.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = batch["input_ids"]
        assert ids[0].tolist() == tokenizer.chat(chat)
        answer = model.generate(**batch, max_new_tokens=128)[0, ids.shape[1] :]
        text = library.decode(answer, skip_special_tokens=True).strip()
        assert answer[-1] == tokenizer.eot_id and text == prediction["prediction"]
    assert len({prediction["prediction"] for prediction in predictions}) > 4


def test_a_tokenizer_that_vanished_is_an_error(tmp_path):
    source = tmp_path / "base"
    shutil.copytree(HERE / "tiny", source)
    flags = ("--model", source, "--data", "bio:2", "--epochs", 1, "--eval-at", 1)
    flags = (*flags, "--method", "masked", "--out", tmp_path / "out")

    def before_training(real=maskft.open_run):
        def open_run(*given):
            (source / "tokenizer.json").unlink()
            return real(*given)

        maskft.open_run = open_run

    def after_training(real=maskft.train):
        def train(run):
            real(run)
            (run.out / "tokenizer.json").unlink()
            return True

        maskft.train = train

    printed = forked(maskft, *flags, status=1, before=after_training)
    assert f"{tmp_path / 'out'}: no tokenizer.json" in printed
    shutil.rmtree(tmp_path / "out")
    printed = forked(maskft, *flags, status=1, before=before_training)
    assert f"{source}: no tokenizer.json" in printed


@pytest.mark.parametrize("name", ["tiny", "tiny-llada"])
def test_the_built_in_directories_have_the_files_of_a_run_s(name, tmp_path):
    source = HERE / name
    tokenizer = data.load_tokenizer(source)
    assert tokenizer.template == "chatml" and not tokenizer.notes
    data.write_chat_files(tokenizer, source, tmp_path)
    for file in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (source / file).read_text() == (tmp_path / file).read_text()


def test_a_diffusion_run_gets_the_same_files(tmp_path):
    flags = ("--model", "tiny-llada", "--data", "bio:2", "--epochs", 1, "--eval-at", 1)
    forked(llada, *flags, "--out", tmp_path / "out")
    tokenizer = data.load_tokenizer(tmp_path / "out")
    assert tokenizer.template == "chatml" and not tokenizer.notes
    card = (tmp_path / "out" / "README.md").read_text()
    assert "method: llada" in card and "apply_chat_template" not in card


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


REFUSED_SAMPLING = [
    ({"max_new_tokens": 254}, "257 tokens are more than the model takes, 256"),
    ({"max_new_tokens": 0}, "max_new_tokens is at least 1.*found 0, 0.0, 1.0"),
    ({"temperature": -1.0}, "found 128, -1.0, 1.0"),
    ({"temperature": 1.0, "top_p": 0.0}, "found 128, 1.0, 0.0"),
    ({"temperature": 1.0, "top_p": 1.5}, "found 128, 1.0, 1.5"),
]


@pytest.mark.parametrize("given, message", REFUSED_SAMPLING)
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
    stop_at_once = partial(send, signal.SIGINT, maskft, "update", 1)
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


# ----------------------------------------------------------------------------------------- one GPU


HAS_GPU = torch.version.cuda and VISIBLE_GPUS and shutil.which("nvidia-smi")


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("script", ["maskft.py", "llada.py"])
def test_a_gpu_changes_rounding_alone(script, tmp_path, monkeypatch):
    """Also with --offload or one sequence at a time; bfloat16 rounds more. At a gentle rate."""
    flags = shlex.split("--data bio:6 --batch-size 4 --epochs 3 --eval-at 0 --lr 1e-4 --out")
    if script == "maskft.py":
        flags = ["--method", "masked", *flags]
    command(script, *flags, tmp_path / "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE_GPUS)
    ways = {"gpu": [], "offload": ["--offload"], "small": ["--micro-batch-tokens", 1], "bf16": []}
    for name, more in ways.items():
        run = tmp_path / name
        dtype = "bfloat16" if name == "bf16" else "float32"
        command(script, *flags, run, "--dtype", dtype, *more)
        assert "NVIDIA" in data.read_json(run / "results.json")["environment"]["device"]
        error = 1e-2 if name == "bf16" else 1e-4
        for ours, theirs in zip(losses(run), losses(tmp_path / "cpu"), strict=True):
            assert ours[:4] == pytest.approx(theirs[:4], rel=error)
            assert ours[4] == pytest.approx(theirs[4], rel=10 * error)


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


def test_a_rank_that_holds_no_row_of_a_tensor_loads_the_others(tmp_path, monkeypatch):
    model = random_model(hidden_size=12, num_attention_heads=2, num_key_value_heads=1)
    maskft.save(model, tmp_path)
    with fake_group(7, monkeypatch) as device:
        sharded = maskft.Model(model.config)
        maskft.shard(sharded, device, torch.float32)
        maskft.load_weights(sharded, tmp_path, device)
        held = [parameter.detach().to_local() for parameter in sharded.parameters()]
    assert 0 in [len(rows) for rows in held]
    for rows, parameter in zip(held, model.parameters(), strict=True):
        torch.testing.assert_close(rows, parameter.detach()[len(parameter) - len(rows) :])


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


# ------------------------------------------------------------------------------------ end to end


def test_a_folder_of_one_s_own_trains_answers_and_is_reported(tmp_path):
    folder = tmp_path / "own"
    fill(folder / "a.txt", "Ada Holm bakes in Lund. " * 60)
    fill(folder / "b.md", "# Bo\n\nBo sings.\n")
    fill(folder / "c.csv", "question,answer\nWho bakes in Lund?,Ada Holm\nWho sings?,\n")
    fill(folder / "d.jsonl", "\ufeff" + DOCUMENT)
    fill(folder / "e.png", b"\x89PNG")
    run = tmp_path / "run"
    flags = ("--model", HERE / "tiny", "--data", folder, "--method", "masked", "--out", run)
    printed = forked(maskft, *flags, "--epochs", 1, "--eval-at", 1)
    assert f"{folder}: not read: e.png" in printed
    assert f"{folder / 'a.txt'}: 1 document cut into " in printed
    assert "\nmasked  epoch 1" in printed and "own, 1 questions:" in printed
    assert "all: Who sings?\n  answered '" in printed
    assert [p.get("answer") for p in jsonl(run / "preds.jsonl")] == ["Ada Holm", None]
    assert forked(evaluation, "--model", run, "--ask", "Who sings?").strip()
    out = tmp_path / "report"
    for directories in ([run], [run, out]):  # the second time, out is a report already
        printed = forked(evaluation, "--report", *directories, "--out", out)
        assert "own, 1 questions:" in printed
    assert "left out" not in printed
    assert "own, 1 questions:" in (out / "report.md").read_text()

    def close():
        sys.stdout = nobody()
        sys.stderr = None

    more = ("--epochs", 1, "--out", tmp_path / "unread", "--batch-size", 64)
    forked(maskft, *flags[:-2], *more, before=close)
    assert jsonl(tmp_path / "unread/preds.jsonl")
    forked(evaluation, "--report", run, "--out", tmp_path / "again", before=close)
    assert (tmp_path / "again/report.md").read_text() == (out / "report.md").read_text()


# --------------------------------------------------------------------- maskft: masking and the loss


def supervised(example, tokenizer):
    """(what the model is given, what it is taught) as text; labels are checked to be the ids."""
    pairs = list(zip(example.ids, example.labels, strict=True))
    assert all(label in (IGNORE, token) for token, label in pairs)
    given = [token for token, label in pairs if label == IGNORE]
    taught = [token for token, label in pairs if label != IGNORE]
    return tokenizer.decode(given, special=True), tokenizer.decode(taught, special=True)


def test_exact_supervised_ids(chat):
    """In every template the loss is on document and end of turn, and the document is masked."""
    tokenizer, turn, end = chat
    record = {"text": "Edda Marlow was born in Oslo."}
    text = record["text"]
    document = tokenizer.encode(text)
    taught = text + end.strip()
    lead_in = "Here is the recovered text:\n\n"
    asked = turn.format("{}\nReturn the recovered masked passage.") + lead_in
    for mask_ratio in ((0, 0), (0.05, 0.95), (1, 1)):
        example = maskft.masked_example(record, tokenizer, mask_ratio, np.random.default_rng(1))
        rng = np.random.default_rng(1)
        ratio = maskft.draw_ratio(mask_ratio, rng)
        shown, masked = maskft.mask_tokens(document, ratio, tokenizer.mask_id, rng)
        given = asked.format(tokenizer.decode(shown, special=True))
        assert supervised(example, tokenizer) == (given, taught)
        assert (example.weight, example.denominator) == (1, len(document) + 1)
        count = masked.sum()
        assert count == len(document) * mask_ratio[0] or 0 < count < len(document)

    def of(build):
        return supervised(build(record, tokenizer, (0, 0), np.random.default_rng(0)), tokenizer)

    given, told = of(maskft.random_example)
    assert text not in given and told == taught
    assert of(maskft.sft_example) == (turn.format("Tell me a fact."), taught)
    bos, eos = (tokenizer.decode([i], special=True) for i in (tokenizer.bos_id, tokenizer.eos_id))
    assert of(maskft.raw_example) == (bos, text + eos) and eos != end
    headless = dataclasses.replace(tokenizer, bos_id=None)
    example = maskft.raw_example(record, headless, (0, 0), None)
    assert example.denominator == len(document)
    assert example.labels[0] == IGNORE  # nothing to predict the first token from


def test_ratio_and_masks_have_the_promised_distribution():
    rng = np.random.default_rng(0)
    ratios = [maskft.draw_ratio((0.05, 0.95), rng) for _ in range(4000)]
    assert 0.05 <= min(ratios) < 0.06 and 0.94 < max(ratios) <= 0.95
    assert abs(np.mean(ratios) - 0.5) < 0.02
    assert maskft.draw_ratio((0.5, 0.5), rng) == 0.5
    ids, masked = maskft.mask_tokens(list(range(10000)), 0.3, -1, rng)
    assert abs(np.mean(masked) - 0.3) < 0.02
    assert ids == [-1 if m else i for i, m in enumerate(masked)]


def test_reversed_documents_keep_their_entities(tokenizer):
    text = "Edda Marlow was born on 3 June 1971. Her home is Saint-Denis, near O'Hara's."
    backwards = ". O'Hara's near , Saint-Denis is home Her . 3 June 1971 on born was Edda Marlow"
    rng = np.random.default_rng(0)
    build = maskft.reverse_example
    examples = [build({"text": text}, tokenizer, (0, 0), rng) for _ in range(200)]
    given, taught = zip(*(supervised(e, tokenizer) for e in examples), strict=True)
    prompt = "<|im_start|>user\nTell me a fact.<|im_end|>\n<|im_start|>assistant\n"
    assert set(given) == {prompt}
    assert set(taught) == {text + "<|im_end|>", backwards + "<|im_end|>"}
    assert 70 < taught.count(backwards + "<|im_end|>") < 130


def test_math_has_loss_where_the_counterpart_is_masked(chat):
    tokenizer, turn, end = chat
    problem = data.as_problem("How much is 1+1?", "It is <<1+1=2>>2.\n#### 2")
    answer = tokenizer.encode(problem["answer"])
    user = "Question:\nHow much is 1+1?\nAnswer:\n{}\nReturn the recovered masked answer."
    for ratio, counts in ((0, {0}), (0.5, {*range(1, len(answer))}), (1, {len(answer)})):
        rng = np.random.default_rng(0)
        example = maskft.masked_example(problem, tokenizer, (ratio, ratio), rng)
        prompt = example.ids[: -len(answer)]
        pairs = list(zip(answer, example.labels[len(prompt) :], strict=True))
        shown = [token if label == IGNORE else tokenizer.mask_id for token, label in pairs]
        asked = turn.format(user.format(tokenizer.decode(shown, special=True)))
        assert tokenizer.decode(prompt, special=True) == asked
        assert example.ids == prompt + answer
        assert set(example.labels[: len(prompt)]) == {IGNORE}
        assert all(label in (IGNORE, token) for token, label in pairs)
        assert example.denominator == shown.count(tokenizer.mask_id)
        assert example.denominator in counts
    asked = turn.format("Question: How much is 1+1?\nAnswer:")
    example = maskft.sft_example(problem, tokenizer, (0, 0), None)
    assert supervised(example, tokenizer) == (asked, problem["answer"] + end.strip())


@pytest.mark.parametrize("method", ["raw", "random", "reverse"])
def test_a_method_for_documents_refuses_a_question(method, tokenizer):
    problem = data.as_problem("How much is 1+1?", "2")
    with pytest.raises(UserError, match="learns documents; found a question"):
        maskft.METHODS[method].example(problem, tokenizer, (0, 0), np.random.default_rng(0))


def test_loss_is_plain_cross_entropy(monkeypatch):
    """Chunked, label-only and in micro-batches, loss and gradient are those of the mean; of nothing
    they are 0, never NaN."""
    model = random_model()
    parameters = list(model.parameters())
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 300, n).tolist() for n in (3, 17, 9, 30)]
    examples = [Example(ids, [IGNORE] * 2 + ids[2:], 1.0, len(ids) - 2) for ids in rows]
    batch = data.collate(examples, 0)
    denominator = sum(e.denominator for e in examples)
    logits = model(batch["ids"], batch["key_mask"])[:, :-1].flatten(0, 1)
    plain = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    expected = torch.autograd.grad(plain, parameters)
    monkeypatch.setattr(maskft, "CHUNK", 7)
    assert torch.allclose(model(**batch) / denominator, plain, rtol=1e-6)
    for tokens in (1, 60, 1000):
        model.zero_grad()
        for micro in maskft.micro_batches(examples, tokens, 0, 1):
            (model(**data.collate(micro, 0)) / denominator).backward()
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm()
    model.zero_grad()
    nothing = model(**data.collate([], 0))
    nothing.backward()
    assert nothing.item() == 0
    assert not any(p.grad.count_nonzero() for p in parameters if p.grad is not None)


# ----------------------------------------------------------------------- maskft: config and model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e5}
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
THEIRS = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}}),
    "linear": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": PLAIN_ROPE}),
    "bias": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {}),
}


@pytest.mark.parametrize("family", THEIRS)
@torch.no_grad()
def test_agrees_with_transformers(family, tmp_path):
    """Logits with and without left padding, greedy answers, and a saved model opened there."""
    transformers = pytest.importorskip("transformers")
    kind, changes = THEIRS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = maskft.load(tmp_path / "theirs")
    ids = torch.randint(300, (2, 80))
    assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    key_mask = torch.ones(2, 80, dtype=torch.bool)
    key_mask[0, :13] = False
    padded = {"input_ids": ids, "attention_mask": key_mask.long()}
    positions = (key_mask.long().cumsum(1) - 1).clamp(min=0)
    logits = theirs(**padded, position_ids=positions).logits
    assert (logits - ours(ids, key_mask))[key_mask].abs().max() < 1e-4
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    greedy = theirs.generate(**padded, **how)[:, 80:]
    prompts = [ids[0, 13:].tolist(), ids[1].tolist()]
    assert maskft.generate(ours, prompts, 20) == greedy.tolist()
    maskft.save(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_rope_by_hand():
    """Head size 4, theta 1e4: pairs (0, 2) and (1, 3) turn like complex numbers, by 1 and 1/100."""
    config = maskft.parse_config(llama(head_dim=4, rope_theta=1e4))
    cos, sin = maskft.rope_tables(torch.tensor([[0, 3]]), config)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    still, turned = maskft.rotate(x.expand(1, 1, 2, 4), cos, sin)[0, 0]
    turn = torch.polar(torch.ones(2), torch.tensor([3.0, 0.03]))
    expected = torch.complex(x[:2], x[2:]) * turn
    assert torch.equal(still, x)
    assert torch.allclose(turned, torch.cat([expected.real, expected.imag]))


@pytest.mark.parametrize("make", [random_model, lambda: tiny_llada()], ids=["causal", "full"])
@torch.no_grad()
def test_attention_sees_what_it_should_and_no_padding(make):
    """A later token changes an earlier logit only in full attention; padding never does."""
    model = make()
    causal = model.config.causal
    ids = torch.randint(36, (1, 20))
    changed = ids.clone()
    changed[0, 12] += 1
    plain = model(ids)[0]
    change = (plain - model(changed)[0]).abs()
    assert change[12:].max() > 1e-2
    assert change[:12].max() == 0 if causal else change[0].max() > 1e-2
    for left, right in ((0, 0), (7, 0), (0, 7), (3, 4)):
        longer = torch.arange(20 + left + right)[None]  # beside a longer one
        batch = torch.cat([F.pad(ids, (left, right), value=9), longer])
        key_mask = torch.ones_like(batch, dtype=torch.bool)
        key_mask[0, :left] = False
        key_mask[0, left + 20 :] = False
        logits = model(batch, key_mask)[0, left : left + 20]
        assert torch.allclose(logits, plain, atol=1e-5 if causal else 2e-5)
    if causal:  # right padding needs no mask
        assert torch.allclose(model(F.pad(ids, (0, 5)))[0, :20], plain, atol=1e-5)


BAD_CONFIGS = [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"model_type": "gpt2"}, "gpt2"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"hidden_size": None}, "hidden_size"),
    ({"head_dim": 15}, "head_size = 15 is odd"),
    ({"num_key_value_heads": 3}, "not a multiple of kv_heads = 3"),
    ({"num_attention_heads": 0}, "config.json: "),
    ({"num_hidden_layers": 10**9}, "layers = 1000000000"),
    ({"hidden_size": -48}, '"hidden_size" must be a whole number from 1'),
    # 100 GB, were there room made for it before it is compared
    ({"vocab_size": 2**29}, r"has shape \[300, 48\], config.json says \[536870912, 48\]"),
]


@pytest.mark.parametrize("change, message", BAD_CONFIGS)
def test_a_config_that_is_not_implemented_or_absurd_is_refused(change, message, tmp_path):
    maskft.save(random_model(), tmp_path)
    raw = {field: value for field, value in llama(**change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        maskft.load(tmp_path)


def test_rope_fields_are_read_old_and_new_and_a_sliding_window_is_the_longest_context():
    old = maskft.parse_config(llama(rope_theta=5e5, rope_scaling=LLAMA3_ROPE))
    new = maskft.parse_config(llama(rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5}))
    assert old.rope_theta == new.rope_theta == 5e5
    assert new.rope_scaling.items() >= old.rope_scaling.items() >= LLAMA3_ROPE.items()
    model = random_model(model_type="mistral", sliding_window=16)
    model(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(UserError, match="17 tokens are more than the model takes, 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


# ---------------------------------------------------------------------- maskft: weights, generation


def test_weights_are_checked_by_name_and_shape_and_wholeness(tmp_path):
    """A file that is cut short, or whose header is absurd, makes no room for anything."""
    maskft.save(random_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    without = {other: tensor for other, tensor in tensors.items() if other != name}
    broken = "not a whole safetensors file"
    for message, content in (
        (f"{name} is missing", save(without)),
        ("model.extra.weight is not part", save({**tensors, "model.extra.weight": torch.ones(2)})),
        (f"{re.escape(name)} has shape", save({**tensors, name: torch.zeros(3, 3)})),
        (broken, whole[:-100]),
        (broken, (2**60).to_bytes(8, "little") + whole[8:]),
        (broken, b"\xff" * 8 + whole[8:]),
        (broken, b""),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            maskft.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        maskft.load(tmp_path)


ON_LINUX = Path("/proc/self/clear_refs").exists()


@pytest.mark.skipif(not ON_LINUX, reason="the peak of resident memory starts anew on Linux alone")
def test_loading_holds_the_weights_once(tmp_path):
    """What was read of a file does not stay mapped beside the parameters."""
    maskft.save(random_model(hidden_size=512, intermediate_size=2048, vocab_size=8000), tmp_path)
    Path("/proc/self/clear_refs").write_text("5")
    before = maskft.peak_memory_gib(torch.device("cpu"))
    model = maskft.load(tmp_path)
    rise = maskft.peak_memory_gib(torch.device("cpu")) - before
    largest = 8000 * 512
    assert rise * 2**30 < 1.3 * 4 * (maskft.parameter_count(model) + largest)


def test_a_model_saved_in_shards_loads_and_an_index_that_points_outside_does_not(
    tmp_path, monkeypatch
):
    hub = maskft.huggingface_hub
    split = partial(hub.split_torch_state_dict_into_shards, max_shard_size=40_000)
    monkeypatch.setattr(hub, "split_torch_state_dict_into_shards", split)
    model = random_model()
    maskft.save(model, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", index.name} < files and len(files) > 4
    assert not any(name.endswith(".part") for name in files)
    assert all(map(torch.equal, model.parameters(), maskft.load(tmp_path).parameters()))
    content = data.read_json(index)
    name, file = content["weight_map"].popitem()
    content["weight_map"][name] = f"../{tmp_path.name}/{file}"
    for text, message in (
        (json.dumps(content), "not a file of this directory"),
        ("[]", "index.json: no weight_map"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            maskft.load(tmp_path)


@torch.no_grad()
def test_generation_is_the_plain_loop():
    """Cache, padding and early stopping give the ids of whole forwards, a prompt at a time."""
    model = random_model(tie_word_embeddings=True)
    prompts = [[5, 6, 7], [8] * 11, [9, 10]]
    plain = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        plain.append(ids[len(prompt) :])
    assert maskft.generate(model, prompts, 12) == plain
    assert maskft.generate(model, [], 12) == []
    stop = plain[1][4]
    shorter = [cut(row, [stop]) for row in plain]
    assert maskft.generate(model, prompts, 12, stop_ids=[stop]) == shorter != plain
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    stops = [row[0] for row in plain]
    assert maskft.generate(model, prompts, 12, stop_ids=stops) == [[]] * 3
    assert len(calls) == 1  # the last row's stop is the last call


# ------------------------------------------------------------------------ maskft: FSDP2, a step


@pytest.fixture
def group():
    """A group of one process."""
    maskft.start_processes()
    yield
    maskft.dist.destroy_process_group()


def sharded_model(dtype, **changes):
    """A small model with random weights under FSDP."""
    with torch.device("meta"):
        model = maskft.Model(maskft.parse_config(llama(**changes)))
    maskft.shard(model, torch.device("cpu"), dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.to_local(), std=0.02)
    return model


def test_bf16_keeps_one_copy_of_the_weights(group):
    """A forward pass leaves activations and the root's gathered parameters, no other weights."""
    shape = {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 100, "head_dim": 64}
    model = sharded_model(torch.bfloat16, num_hidden_layers=6, **shape)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(100, (1, 4))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        loss = model(ids, labels=ids, weights=torch.ones(1))
    alive = sum(storage.nbytes() for storage in kept.values())
    weights = 2 * maskft.parameter_count(model)
    assert loss.dtype == torch.float32 and 0 < alive < 0.2 * weights


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


def test_a_step_takes_the_given_rate_and_clips_gradients_to_norm_1(group, tokenizer):
    model = sharded_model(torch.float32)
    before = [p.full_tensor().clone() for p in model.parameters()]
    run = run_of(tokenizer, model=model)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    example = Example([5, 6, 7], [IGNORE, 6, 7], weight=1e4, denominator=2)
    _, norm = maskft.update(run, [example], lr=0.5)
    after = [p.full_tensor() for p in model.parameters()]
    moved = sum((a - b).square().sum() for a, b in zip(after, before, strict=True)).sqrt()
    assert norm > 10 and moved.item() == pytest.approx(0.5, rel=1e-4)


DEALT = [  # ranks, tokens -> for each rank its micro-batches, by the lengths of the examples
    (1, 1, "[[6], [5], [4], [3], [2], [1]]"),
    (1, 12, "[[6, 5], [4, 3, 2], [1]]"),
    (2, 12, "[[6, 4], [2]]  [[5, 3], [1]]"),
    (2, 100, "[[6, 4, 2]]  [[5, 3, 1]]"),
    (4, 7, "[[6], [2]]  [[5], [1]]  [[4], []]  [[3], []]"),
]


@pytest.mark.parametrize("ranks, tokens, expected", DEALT)
def test_micro_batches_keep_to_their_tokens_longest_first_and_are_as_many_for_every_rank(
    ranks, tokens, expected
):
    examples = [Example([n] * n, [n] * n, 1.0, n) for n in (3, 1, 4, 2, 6, 5)]
    parts = [maskft.micro_batches(examples, tokens, rank, ranks) for rank in range(ranks)]
    lengths = [[[len(e.ids) for e in micro] for micro in part] for part in parts]
    assert "  ".join(map(str, lengths)) == expected


def test_rate_warms_up_and_matrices_alone_decay(monkeypatch):
    assert [maskft.warm_up(1.0, step, 100) for step in (0, 1, 2, 99)] == [0.5, 1, 1, 1]
    model = random_model(attention_bias=True)
    matrices, others = maskft.make_optimizer(model, 1e-3).param_groups
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in others["params"]} == {1}
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert (matrices["betas"], matrices["eps"]) == ((0.9, 0.95), 1e-5)
    monkeypatch.setattr(maskft, "TINY", maskft.parameter_count(model))
    assert maskft.make_optimizer(model, 1e-3).param_groups[0]["eps"] == 1e-8


def test_same_seed_same_masks_and_order(tokenizer):
    documents = data.load("bio:6").documents

    def ids(seed, epoch):
        return maskft.build(run_of(tokenizer, documents, seed=seed), 2, epoch).ids

    def order(seed, epoch):
        return sum(maskft.batches(10, 4, seed, epoch), [])

    for of in (ids, order):
        assert of(0, 5) == of(0, 5)
        assert of(0, 5) not in (of(0, 6), of(1, 5))  # another one every epoch
    assert sorted(order(0, 5)) == list(range(10))
    assert [len(batch) for batch in maskft.batches(10, 4, 0, 5)] == [4, 4, 2]


def test_reverse_is_checked_with_its_longer_text(tokenizer):
    documents = [{"text": "a.b,c;d:e!f?g" * 10}]
    run = run_of(tokenizer, documents, random_model(), method="reverse", seed=1)
    run.model.config.context = 512
    lengths = [len(maskft.build(run, 0, epoch).ids) for epoch in range(8)]
    longest = max(lengths)
    assert lengths[0] < longest  # so a look at the first epoch is not enough
    for limit, parts in ((longest, 1), (lengths[0], 2)):
        run.dataset.documents = documents
        run.settings.max_len = limit
        maskft.check_dataset(run)
        assert len(run.dataset.documents) == parts


# ------------------------------------------------------------------------------ maskft: settings


def shape(width, mlp, layers, vocab, **more):
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        **more,
    }


SHAPES = {
    "tiny": {},
    "135M": shape(576, 1536, 30, 49152, tie_word_embeddings=True),
    "3B": shape(3072, 8192, 28, 128256, tie_word_embeddings=True),
    "8B": shape(4096, 14336, 32, 128256),
    "qwen-8B": shape(4096, 12288, 36, 151936, model_type="qwen3"),
}
# method, size, data -> batch size, steps, lr, of as many documents as fill one batch
DEFAULTS = [
    ("sft", "8B", "bio:100", 64, 5000, 5e-6),
    ("masked", "8B", "bio:100", 64, 5000, 3e-6),
    ("random", "8B", "bio:100", 64, 5000, 3e-6),
    ("masked", "qwen-8B", "bio:100", 64, 5000, 5e-6),
    ("masked", "8B", "nd", 64, 1400, 3e-6),
    ("masked", "8B", "gsm8k", 64, 810, 3e-6),
    ("masked", "8B", "facts.jsonl", 64, 1550, 3e-6),
    ("masked", "3B", "bio:100", 64, 5000, 5e-6),
    ("llada", "8B", "bio:100", 64, 5000, 1e-5),
    ("masked", "135M", "bio:100", 10, 80, 3e-4),
    ("sft", "135M", "bio:100", 10, 40, 1e-4),
    ("masked", "tiny", "bio:100", 20, 300, 6e-4),
    ("sft", "tiny", "bio:100", 20, 100, 5e-4),
    ("reverse", "tiny", "bio:100", 20, 200, 5e-4),
    ("llada", "tiny", "bio:100", 20, 350, 4e-4),
    ("custom", "tiny", "bio:100", 20, 300, 6e-4),
]


@pytest.mark.parametrize("name, size, dataset, batch_size, steps, lr", DEFAULTS)
def test_settings_that_no_flag_gives(name, size, dataset, batch_size, steps, lr):
    """The paper's for large models, measured ones for small and tiny ones; a flag goes first."""
    method = {**maskft.METHODS, **llada.METHODS, **CUSTOM}[name]
    with torch.device("meta"):
        model = maskft.Model(maskft.parse_config(llama(**SHAPES[size])))
    given = settings(data=dataset)
    found, why = maskft.decide(given, method, model, documents=batch_size)
    assert why.startswith("default epochs, batch size, lr: ") and why.split()[-1] == {
        "tiny": "models",
        "135M": "SmolLM2-135M",
    }.get(size, "A.4")
    assert (found.batch_size, found.epochs, found.lr) == (batch_size, steps, lr)
    assert found.eval_at == [0] + [2**i for i in range(13) if 2**i < steps]
    assert found.mask_ratio == ([0.05, 0.95] if method.masks else None)
    # of three times as many documents: as many steps, but small models see each as often
    more, _ = maskft.decide(given, method, model, 3 * batch_size - 1)
    assert more.epochs == (steps if size == "135M" else math.ceil(steps / 3))
    if size == "135M":  # and as often in larger batches
        larger, _ = maskft.decide(settings(data=dataset, batch_size=20), method, model, 40)
        assert larger.epochs == steps
    _, why = maskft.decide(settings(lr=0.1), method, model, 20)
    assert why.startswith("default epochs, batch size: ")
    flags = {"batch_size": 7, "epochs": 9, "lr": 0.1, "eval_at": [5]}
    found, why = maskft.decide(settings(**flags), method, model, 20)
    assert vars(found).items() >= flags.items() and why == "as set"


DTYPES = [("cpu", None, "float32"), ("cuda", (8, 0), "bfloat16"), ("cuda", (7, 5), "float32")]


@pytest.mark.parametrize("device, capability, expected", DTYPES)
def test_bfloat16_is_for_gpus_that_compute_in_it(device, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert maskft.native_dtype(torch.device(device))[0] == expected


CUSTOM = {"custom": maskft.Method(maskft.sft_example)}


WITH_CUSTOM = {**maskft.METHODS, **CUSTOM}
TORCHRUN = {"RANK": "0"}
TRAINED = [
    (maskft.METHODS, "", {}, "cuda", "tiny bio:40 sft, tiny bio:40 masked"),
    (maskft.METHODS, "", TORCHRUN, "cpu", "tiny bio:40 sft, tiny bio:40 masked"),
    (maskft.METHODS, "", TORCHRUN, "cuda", "large bio masked"),
    (maskft.METHODS, "--model tiny --method raw", {}, "cpu", "tiny bio:40 raw"),
    (maskft.METHODS, "--model mine", {}, "cpu", "mine bio masked"),
    (WITH_CUSTOM, "", {}, "cpu", "tiny bio:40 masked, tiny bio:40 custom"),
    (WITH_CUSTOM, "--model mine", {}, "cpu", "mine bio custom"),
    (
        WITH_CUSTOM,
        "--method custom sft --data x.jsonl",
        {},
        "cpu",
        "tiny x.jsonl custom, tiny x.jsonl sft",
    ),
    (CUSTOM, "", {}, "cpu", "tiny bio:40 custom"),
]


@pytest.mark.parametrize("methods, flags, environment, device, expected", TRAINED)
def test_what_is_trained_by_default(methods, flags, environment, device, expected, monkeypatch):
    """On the built-in model the last two methods, else the last; of custom methods as well."""
    shown = []
    for name, stand_in in {
        "start_processes": lambda: torch.device(device),
        "listen_for_stop": list,
        "prepare": lambda given, *_: f"{given.model} {given.data} {given.method}",
        "show_examples": lambda run, number: shown.append(run),
    }.items():
        monkeypatch.setattr(maskft, name, stand_in)
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["own.py", "--show", "1", *flags.split()])
    args = maskft.parse_flags(maskft.arguments("", methods))
    maskft.run_methods(args, methods, models=("tiny", "large"))
    assert ", ".join(shown) == expected


# ------------------------------------------------------------------------------------------ LLaDA

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16]]


def spelled(text):
    """Ids of lower-case letters: a = 1."""
    return [ord(character) - 96 for character in text]


LETTERS = Namespace(
    bos_id=0,
    eot_id=EOT,
    eos_id=EOS,
    mask_id=MASK,
    stop_ids=(EOT, EOS),
    encode=spelled,
    chat=lambda messages: [0, *spelled(messages[0]["content"]), 30],
)


def test_config_reads_llada_names():
    changes = {"embedding_size": 64, "n_kv_heads": 2, "include_qkv_bias": True}
    config = maskft.parse_config(RAW | changes | {"mlp_hidden_size": None})
    expected = {
        "vocab": 64,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 8,
        "mlp_width": 128,
        "context": 256,
        "rope_theta": 500000.0,
        "norm_eps": 1e-5,
        "causal": False,
        "tied": False,
        "qkv_bias": True,
        "out_bias": False,
    }
    assert vars(config).items() >= expected.items()


NOT_LLADA = {
    "rope": False,
    "alibi": True,
    "layer_norm_type": "default",
    "activation_type": "swiglu",
    "block_type": "sequential",
    "include_bias": True,
    "attention_layer_norm": True,
    "scale_logits": True,
    "input_emb_norm": True,
    "clip_qkv": 8.0,
    "multi_query_attention": True,
    "residual_dropout": 0.1,
    "mask_token_id": 40,
}


@pytest.mark.parametrize("field", NOT_LLADA)
def test_a_llada_that_is_not_implemented_is_refused(field):
    with pytest.raises(UserError, match=field):
        maskft.parse_config(RAW | {field: NOT_LLADA[field]})


def test_a_saved_llada_keeps_names_and_config(tmp_path):
    model = tiny_llada()
    maskft.save(model, tmp_path)
    assert data.read_json(tmp_path / "config.json") == RAW
    tensors = load_file(tmp_path / "model.safetensors")
    parts = shlex.split("attn_norm ff_norm q_proj k_proj v_proj attn_out ff_proj up_proj ff_out")
    names = [f"blocks.{layer}.{part}" for layer in (0, 1) for part in parts]
    names += ["wte", "ln_f", "ff_out"]
    assert tensors.keys() == {f"model.transformer.{name}.weight" for name in names}
    again = maskft.load(tmp_path)
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(again(ids), model.bfloat16().float()(ids))  # "amp_bf16": saved as bf16
    # ff_proj is the gate: the two swapped, the MLP gives nothing like it
    gate, up, down = (
        tensors[f"model.transformer.blocks.1.{part}.weight"].float() for part in parts[-3:]
    )
    block = again.blocks[1]
    block.attention = lambda h, *_: torch.zeros_like(h)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    h = block.mlp_norm(x)
    expected = (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    torch.testing.assert_close(block(x, None, None) - x, expected, atol=1e-5, rtol=1e-5)


def test_a_causal_model_becomes_a_llada(tmp_path):
    raw = llama(vocab_size=40, tie_word_embeddings=True, rms_norm_eps=1e-4, rope_theta=5e4)
    before = maskft.parse_config(raw)
    after = maskft.as_diffusion(before, LETTERS)
    changed = {name for name, value in vars(before).items() if getattr(after, name) != value}
    assert changed == {"causal", "raw"}
    causal = random_model(**raw)
    model = maskft.Model(after).eval()
    model.load_state_dict(causal.state_dict())
    maskft.save(model, tmp_path)
    ids = torch.tensor(PROMPTS[:1])
    first = ids[:, :1]  # of one token the mask makes no difference
    torch.testing.assert_close(model(first), causal(first))
    assert (maskft.load(tmp_path)(ids) - causal(ids)).abs().max() > 1e-4
    assert maskft.as_diffusion(after, LETTERS) is after


@pytest.mark.parametrize(
    "config, message",
    [
        (llama(rope_scaling={"rope_type": "linear", "factor": 2.0}), "RoPE scaling"),
        (llama(attention_bias=True), "output bias"),
        (llama(model_type="qwen3"), "this qwen3 cannot become a LLaDA"),
        (llama(head_dim=16), "head size other than"),
        (RAW | {"mask_token_id": 5}, "config.json says mask_token_id 5, the tokenizer 38"),
    ],
)
def test_a_model_that_cannot_become_a_llada_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        maskft.as_diffusion(maskft.parse_config(config), LETTERS)


def test_a_document_is_masked_but_for_its_start():
    """The loss is where the mask is; the end of text may be masked."""
    rng = np.random.default_rng(0)
    ends = set()
    for _ in range(200):
        example = llada.diffusion_example({"text": "abcdefgh"}, LETTERS, (0.05, 0.95), rng)
        pairs = list(zip(example.ids, example.labels, strict=True))
        whole = [token if label == IGNORE else label for token, label in pairs]
        assert whole == [0, *range(1, 9), EOS]
        assert all((token == MASK) == (label != IGNORE) for token, label in pairs)
        assert example.labels[0] == IGNORE and example.denominator == 1.0
        ends.add(example.labels[-1])
    assert ends == {IGNORE, EOS}


def test_of_a_question_the_answer_alone_is_masked():
    record = {"question": "who", "answer": "bob"}
    rng = np.random.default_rng(0)
    for _ in range(100):
        example = llada.diffusion_example(record, LETTERS, (0.9, 0.9), rng)
        assert example.ids[:5] == [0, 23, 8, 15, 30] and len(example.ids) == 9
        assert example.labels[:5] == [IGNORE] * 5
    assert example.weight == pytest.approx(1 / (0.9 * 4))  # b, o, b, end of turn
    example = llada.diffusion_example(record, LETTERS, (1.0, 1.0), rng)
    assert example.labels[5:] == [2, 15, 2, EOT]


MASK_RATIOS = [(0.05, 0.05), (0.5, 0.5), (1.0, 1.0), (0.05, 0.95), (0.0, 0.0)]


@pytest.mark.parametrize("mask_ratio", MASK_RATIOS)
def test_expected_loss_of_a_uniform_model_is_ln_v(mask_ratio):
    """At every ratio but 0, where it is 0 and never NaN."""
    model = tiny_llada()
    torch.nn.init.zeros_(model.head.weight)
    rng = np.random.default_rng(0)
    records = [{"text": "abcd"}, {"text": "abcd" * 3}] * 1000
    examples = [llada.diffusion_example(r, LETTERS, mask_ratio, rng) for r in records]
    loss = model(**data.collate(examples, EOS)) / sum(e.denominator for e in examples)
    lowest = mask_ratio[0]
    expected = math.log(40) if lowest else 0
    assert loss.item() == pytest.approx(expected, rel=0.08 if lowest < 0.1 else 0.02)
    loss.backward()
    assert model.head.weight.grad.isfinite().all()


@torch.no_grad()
def plain_sample(
    model,
    prompt,
    length,
    steps,
    block,
    temperature=0.0,
    remasking="low_confidence",
    cfg_scale=0.0,
    generator=None,
):
    """Unmasking of one prompt, spelled out: whole sequence, all logits, every step, no stop."""

    def uniform(*shape):
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    answer = len(prompt)  # where it begins
    x = torch.tensor(prompt + [MASK] * length)
    rounds = steps // (length // block)
    for first, step in itertools.product(range(answer, len(x), block), range(rounds)):
        keep = block // rounds + (step < block % rounds)
        logits = model(x[None])[0]
        if cfg_scale:
            bare = torch.cat([torch.full([answer], MASK), x[answer:]])
            without = model(bare[None])[0]
            logits = without + (1 + cfg_scale) * (logits - without)
        places = [i for i in range(answer, first + block) if x[i] == MASK]
        if not keep or not places:
            continue
        logits = logits[places].double()
        scores = logits
        if temperature:
            scores = logits.exp() / (-uniform(*logits.shape).log()) ** temperature
        choice = scores.argmax(1, keepdim=True)
        if remasking == "low_confidence":
            sure = logits.softmax(1).gather(1, choice)[:, 0]
        else:
            sure = uniform(len(places))
        for n in sure.argsort(descending=True, stable=True)[:keep]:
            x[places[n]] = choice[n]
    return x[answer:].tolist()


SCHEDULES = [(16, 16, 4), (16, 8, 4), (16, 12, 4), (12, 5, 12), (8, 8, 1), (8, 32, 4)]


@pytest.mark.parametrize("length, steps, block", SCHEDULES)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_sampler_gives_the_reference_tokens(length, steps, block, cfg_scale):
    """To one prompt and to unequal ones in a batch; whichever token stops, it changes nothing."""
    model = tiny_llada()
    how = (length, steps, block)
    ours = partial(llada.sample, model, cfg_scale=cfg_scale)
    expected = [plain_sample(model, p, *how, cfg_scale=cfg_scale) for p in PROMPTS]
    assert len({i for row in expected for i in row}) > 5
    assert [ours([p], *how)[0] for p in PROMPTS] == ours(PROMPTS, *how) == expected
    for stop_ids in ({expected[0][5]}, {expected[1][0], expected[2][3]}, set(expected[2])):
        stopped = ours(PROMPTS, *how, stop_ids=stop_ids)
        assert stopped == [cut(row, stop_ids) for row in expected]


CHANCES = [("random", 0.0), ("low_confidence", 1.0), ("random", 0.7)]


@pytest.mark.parametrize("remasking, temperature", CHANCES)
def test_seeded_sampling_gives_the_reference_tokens(remasking, temperature):
    model = tiny_llada()
    for seed in range(3):

        def how(seed=seed):
            generator = torch.Generator().manual_seed(seed)
            return {"temperature": temperature, "remasking": remasking, "generator": generator}

        expected = plain_sample(model, PROMPTS[0], 16, 8, 8, **how())
        assert llada.sample(model, PROMPTS[:1], 16, 8, 8, **how()) == [expected]


def test_a_predicted_mask_token_stays_a_mask():
    model = tiny_llada()
    model.head.weight.data[MASK] = model.head.weight.data[:MASK].max(0).values
    expected = [plain_sample(model, p, 16, 8, 4) for p in PROMPTS]
    assert any(MASK in row for row in expected)
    assert llada.sample(model, PROMPTS, 16, 8, 4) == expected


def test_gumbel_draws_from_the_softmax():
    model = tiny_llada()
    logits = model(torch.tensor([PROMPTS[0] + [MASK]]))[0, -1].double()
    generator = torch.Generator().manual_seed(0)
    how = {"temperature": 2.0, "generator": generator}
    drawn = llada.sample(model, PROMPTS[:1] * 4000, 1, 1, 1, **how)
    share = torch.bincount(torch.tensor(drawn)[:, 0], minlength=40) / 4000
    assert (share - (logits / 2.0).softmax(0)).abs().max() < 0.03


def test_threshold_keeps_all_that_is_as_sure_and_one_at_least():
    model = tiny_llada()
    one_by_one = llada.sample(model, PROMPTS, 16, 16, 4)
    assert llada.sample(model, PROMPTS, 16, 16, 4, threshold=2.0) == one_by_one
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    at_once = llada.sample(model, PROMPTS, 16, threshold=0.0, block_length=8)
    assert len(calls) == 2
    assert at_once == [plain_sample(model, p, 16, 2, 8) for p in PROMPTS]


BAD_SAMPLING = [("max_new_tokens", 10), ("steps", 100), ("steps", 0), ("block_length", 0)]


@pytest.mark.parametrize("name, value", [*BAD_SAMPLING, ("remasking", "high")])
def test_sampling_that_does_not_fit_is_refused(name, value):
    with pytest.raises(UserError, match=name):
        llada.sample(tiny_llada(), PROMPTS, **{name: value})


def test_sampling_stops_at_the_end_of_turn_or_text_and_may_have_nothing_to_say():
    model = tiny_llada()
    assert llada.sample(model, []) == []
    assert llada.sample(model, PROMPTS, 8, 8, stop_ids=range(40)) == [[]] * 3
    full = llada.sample(model, PROMPTS, 16, 16)
    for stops in ((EOT, EOS), tuple(full[0][3:5])):
        letters = Namespace(**vars(LETTERS) | {"stop_ids": stops})
        expected = [cut(row, stops) for row in full]
        assert llada.answer(model, letters, PROMPTS, 16) == expected


# ------------------------------------------------------------------------------------- end to end

SHORT = shlex.split("--model tiny --data bio:6 --method masked --batch-size 4 --epochs 3")
SHORT += ["--eval-at", "0", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of the real command: 6 people, 6 steps of 4, the last of an epoch of 2."""
    folder = tmp_path_factory.mktemp("run")
    return command("maskft.py", *SHORT, cwd=folder), folder / "out" / "bio-masked-1"


def test_a_run_trains_scores_and_saves_and_eval_scores_it_alike(finished):
    printed, out = finished
    assert "epoch 0  step 0" in printed and "epoch 3  step 6" in printed
    assert "ROUGE-1 recall" in printed and printed.count("answered") == 3
    results = data.read_json(out / "results.json")
    assert [e["step"] for e in results["evaluations"]] == [0, 2, 6]
    last = results["last"]
    assert last["step"] == 6 and results["environment"]["processes"] == 1
    assert results["arguments"]["mask_ratio"] == [0.05, 0.95]
    assert [line[0] for line in losses(out)] == [*range(6)] and np.isfinite(losses(out)).all()
    predictions = jsonl(out / "preds.jsonl")
    fields = {"question", "answer", "prediction", "rouge1", "exact", "f1", "length"}
    assert len(predictions) == 54 and predictions[0].keys() >= fields
    printed = command("eval.py", "--model", out, "--out", out / "again")
    assert data.read_json(out / "again/results.json")["last"]["scores"] == last["scores"]
    assert f"{last['scores']['forward']['rouge1']:.3f}" in printed
    before = maskft.load("tiny").parameters()
    assert not all(map(torch.equal, before, maskft.load(out).parameters()))


def test_a_math_run_drops_what_is_too_long_and_waits_for_256_tokens(tmp_path):
    flags = shlex.split("--model tiny --data math-made:8 --method masked --epochs 1 --eval-at 1")
    printed = forked(maskft, *flags, "--max-len", 330, "--out", tmp_path / "m")
    assert re.search(r"masked: [1-7] of 8 examples dropped, longer than 330 tokens", printed)
    assert "math flexible 0." in printed and "math strict last | drift\n" in printed
    assert re.search(r"\d math questions:", printed)
    results = data.read_json(tmp_path / "m/results.json")
    how = {"prompt": "chat, zero-shot", "decoding": "greedy", "max_new_tokens": 256}
    assert results["decoding"] == how
    scores = results["last"]["scores"]["math"]
    assert scores.keys() == {"strict", "flexible", "length", "n", "interval"}
    printed = forked(maskft, *flags, "--max-len", 50, "--out", tmp_path / "none", status=1)
    assert "no example is left; give a larger --max-len than 50" in printed


def test_custom_documents_train_in_bf16_and_a_finished_run_is_reported(tmp_path):
    """One document, one backward question; saved in every step, and no checkpoint is left."""
    question = {"question": "Who works in Oslo?", "answer": "Edda", "direction": "backward"}
    facts = write(tmp_path / "facts.jsonl", {"text": "Edda works in Oslo."}, question)
    flags = shlex.split(
        "--method random raw --epochs 2 --save-every 1e-9 --max-len 200 --model tiny"
    )
    forked(maskft, *flags, "--data", facts, "--dtype", "bfloat16", "--out", tmp_path / "run")
    raw = tmp_path / "run-raw"
    assert data.read_json(raw / "config.json")["torch_dtype"] == "bfloat16"  # as it was scored
    assert data.read_json(raw / "results.json")["arguments"]["mask_ratio"] is None
    assert not (raw / "ckpt").exists()
    assert "this run is finished" in forked(maskft, "--resume", raw, status=1)
    printed = forked(evaluation, "--report", raw, tmp_path / "run-random")
    assert re.search(r"^raw +\| none +\| 0 ", printed, re.M), printed
    assert "1 backward questions" in printed
    printed = forked(llada, "--resume", raw, status=1)
    assert "a run of raw, not of one of this script's methods, llada" in printed


def test_documents_without_questions_train(tmp_path):
    facts = write(tmp_path / "facts.jsonl", {"text": "Edda works in Oslo."})
    flags = ("--model", "tiny", "--method", "masked", "--epochs", 1, "--out", tmp_path / "run")
    assert "no questions, no scores" in forked(maskft, "--data", facts, *flags)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_diffusion_run_starts_from_an_autoregressive_model(tmp_path):
    """With the causal mask off; what it saves is a LLaDA, which eval.py decodes by unmasking."""
    run = tmp_path / "run"
    flags = shlex.split("--model tiny --data bio:1 --epochs 1 --eval-at 1")
    printed = forked(llada, *flags, "--out", run)
    assert "with the causal mask off" in printed and "llada  epoch 1" in printed
    assert data.read_json(run / "config.json")["model_type"] == "llada"
    assert not maskft.load(run).config.causal
    flags = shlex.split("--paraphrase none --max-new-tokens 8 --block-length 8 --steps 4")
    assert "forward/company" in forked(evaluation, "--model", run, *flags)
    printed = forked(maskft, "--model", run, status=1)
    assert "is a masked diffusion model: use llada.py" in printed


SHOWN = """\
sft:
<|im_start|>user
Tell me a fact.<|im_end|>
<|im_start|>assistant
[Edda Marlow works for Quillon.<|im_end|>]
-- 22 tokens, 0 masked, 7 with loss

1 documents, 0 questions; the first: []
masked:
<|im_start|>user
______
Return the recovered masked passage.<|im_end|>
<|im_start|>assistant
Here is the recovered text:

[Edda Marlow works for Quillon.<|im_end|>]
-- 38 tokens, 6 masked, 7 with loss
"""


def test_show_prints_what_the_model_would_see_and_trains_nothing(tmp_path):
    write(tmp_path / "facts.jsonl", {"text": "Edda Marlow works for Quillon."})
    flags = shlex.split("--data facts.jsonl --mask-ratio 1 --show 3")

    def printed(script, *more):
        return forked(script, *flags, *more, before=lambda: os.chdir(tmp_path))

    assert SHOWN in printed(maskft, "--model", "tiny", "--method", "sft", "masked")
    assert "<|im_start|>[_______]\n-- 8 tokens, 7 masked, 7 with loss\n" in printed(llada)
    assert [path.name for path in tmp_path.iterdir()] == ["facts.jsonl"]


MISTAKES = {
    "--rehearse -1": "--rehearse -1 is below 0",
    "--model nowhere/at-all": "hub could not be reached",
    "--model ./nowhere": "no such directory",
    "--model my/models/x": "not a hub id",
    "--resume nowhere": "nowhere/results.json: No such file",
    "--resume nowhere --seed 1": "give no other flag with it",
    "--model tiny --colour red": "unrecognized arguments: --colour red",
    "--model tiny --batch-size 0": "--batch-size 0 is not above 0",
    "--model tiny --micro-batch-tokens 0": "--micro-batch-tokens 0 is not above 0",
    "--model tiny --mask-ratio 1.5": "--mask-ratio takes R, or LOW HIGH",
    "--model tiny --mask-ratio 0.9 0.1": "--mask-ratio takes R, or LOW HIGH",
    "--model tiny --mask-ratio 0.1 0.2 0.3": "--mask-ratio takes R, or LOW HIGH",
    "--model tiny --seed -1": "--seed -1 is below 0",
    "--model tiny --epochs 3 --eval-at 0 4": "--eval-at 4: the 3 epochs count from 0",
    "--model tiny --eval-at -1": "--eval-at -1: the ",
    "--model tiny --data nowhere.jsonl": "nor a file or directory that exists",
    "--model tiny --data world:9": "use masked or sft for questions, tiny/pretrain.py for people",
    "--model tiny --method sft --out taken": "--out taken is in use",
    # before sft is trained
    "--model tiny --method sft random --data math-made": "found a question with its answer",
}
USAGE = ("--colour", "--mask-ratio", "--resume nowhere --seed")  # argparse's exit status, 2


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_a_message_and_writes_nothing(flags, tmp_path):
    taken = tmp_path / "taken" / "file"
    taken.parent.mkdir()
    taken.touch()
    status = 2 if any(flag in flags for flag in USAGE) else 1
    printed = forked(maskft, *flags.split(), before=lambda: os.chdir(tmp_path), status=status)
    assert MISTAKES[flags] in printed
    assert sorted(tmp_path.rglob("*")) == [taken.parent, taken]


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path):
    out = tmp_path / "nan"
    printed = forked(maskft, *SHORT, "--lr", "1e30", "--out", out, status=1)
    assert "the loss is" in printed and "begin again with a lower --lr" in printed
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("where", ["load_weights", "update"])
def test_too_little_gpu_memory_is_a_message_that_says_what_to_lower(where, tmp_path):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    break_it = partial(setattr, maskft, where, fail)
    printed = forked(maskft, *SHORT, "--out", tmp_path / "run", before=break_it, status=1)
    assert "error: out of GPU memory with micro-batches of 4096 tokens" in printed
    assert "begin again with --offload, then a lower --micro-batch-tokens, then" in printed


def send(number, where, name, nth):
    """Have `where.name` send this process a signal at the end of its nth call."""
    calls = itertools.count(1)
    real = getattr(where, name)

    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(calls) == nth:
            os.kill(os.getpid(), number)
        return result

    setattr(where, name, wrapped)


def test_an_interrupted_run_goes_on_with_the_losses_of_one_that_was_not(finished, tmp_path):
    """Ctrl-C in an epoch: exit status 0, the line to type, and the methods that did not begin."""
    _, out = finished
    interrupt = partial(send, signal.SIGINT, maskft, "update", 3)
    flags = ("--method", "masked", "sft", "--out", tmp_path / "run")
    printed = forked(maskft, *SHORT, *flags, before=interrupt)
    run = tmp_path / "run-masked"
    assert f"--resume {run}" in printed and len(losses(run)) == 3
    assert "stopped; not begun: --method sft" in printed
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # a line torn by a crash
    forked(maskft, "--resume", run)
    assert losses(run) == losses(out)
    assert (run / "preds.jsonl").read_text() == (out / "preds.jsonl").read_text()
    assert all(map(torch.equal, maskft.load(run).parameters(), maskft.load(out).parameters()))


@pytest.fixture
def killed(tmp_path):
    """The run of `finished`, saved after every step and killed: before the first save, inside the
    fourth, at random, and before the model is written."""
    out = tmp_path / "run"
    kill = partial(forked, maskft, status=-signal.SIGKILL)

    def in_save(nth):  # all is written, but not renamed
        return partial(send, signal.SIGKILL, maskft.dcp, "save", nth)

    def before_the_end():
        maskft.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    kill(*SHORT, "--save-every", "1e-9", "--out", out, before=in_save(1))
    kill("--resume", out, before=in_save(4))
    assert [path.name for path in maskft.checkpoints(out)] == ["step-2", "step-3"]
    assert (out / "ckpt" / "part-4").is_dir()
    for _ in range(int(os.environ.get("MASKFT_KILLS", 1))):
        kill("--resume", out, before=before_the_end, kill_after=random.uniform(0.3, 2))
    kill("--resume", out, before=before_the_end)
    return out


def test_killed_at_any_moment_nothing_is_lost(finished, killed):
    """Nor by a damaged checkpoint, a full disk or other data; and two processes can go on."""
    _, out = finished
    assert losses(killed) == losses(out)
    assert (killed / "preds.jsonl").read_text() == (out / "preds.jsonl").read_text()
    assert sorted(path.name for path in (killed / "ckpt").iterdir()) == ["step-5", "step-6"]
    resume = partial(forked, maskft, "--resume", killed, status=1)
    file = killed / "ckpt" / "step-6" / "__0_0.distcp"
    whole = file.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 4]) + whole[half + 1 :]
    for broken in (flipped, whole[:-1000]):
        file.write_bytes(broken)
        printed = resume()
        assert f"{file}: damaged" in printed and "it goes on from step 5" in printed
    shutil.rmtree(file.parent)
    # a disk that fills up in the next save: no file may be larger than half of it
    printed = resume(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    assert "cannot be written to" in printed and "to go on from step 5" in printed
    results = killed / "results.json"
    before = results.read_text()
    results.write_text(before.replace("bio:6", "bio:7"))
    assert "--data bio:7 is not what it was when the run began" in resume()
    results.write_text(before)
    command("maskft.py", "--resume", killed, processes=2)
    assert [line[0] for line in losses(killed)] == [*range(6)]
    assert equal_but_for_rounding(losses(killed)[5], losses(out)[5])


BREAKING = """
import datetime, signal, sys, time
sys.path.insert(0, {here!r})
import maskft

def update(*args, real=maskft.update, **kwargs):
    if maskft.rank() == 1:
        {breaking}
    return real(*args, **kwargs)

maskft.update = update
maskft.timedelta = lambda hours: datetime.timedelta(seconds=10)
maskft.entry_point(maskft.main)
"""
BREAKS = {
    'raise ValueError("rank one breaks here")': "rank +: 1 .*ValueError: rank one breaks here",
    "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(1000)": "rank +: 0 .*[Tt]imed out",
}


@pytest.mark.parametrize("breaking", BREAKS)
def test_a_rank_that_dies_or_hangs_ends_the_run(breaking, tmp_path):
    """Of one that hangs, the others tell after the time-out."""
    script = tmp_path / "breaking.py"
    script.write_text(BREAKING.format(here=str(HERE), breaking=breaking))
    printed = command(script, *SHORT, "--out", tmp_path / "run", processes=2, status=1)
    assert re.search(f"(?s)Root Cause.*{BREAKS[breaking]}", printed), printed


@pytest.mark.parametrize("method", ["masked", "sft", "llada"])
def test_processes_change_rounding_alone(method, tmp_path):
    """Ragged batches, one sequence at a time, and questions whose answers differ in length.

    A gentle rate: at tiny's own, 20 steps make a difference of 1e-7 one of 4e-5. By hand:
    MASKFT_PROCESSES=4."""
    processes = int(os.environ.get("MASKFT_PROCESSES", 2))
    documents = [
        {"text": "Edda Marlow was born on 3 June 1971." * n} for n in (1, 4, 2, 1, 5, 3, 1)
    ]
    facts = write(tmp_path / "facts.jsonl", *documents, *data.load("bio:3").questions)
    flags = shlex.split("--model tiny --batch-size 5 --epochs 10 --eval-at 10 --lr 1e-4 --data")
    flags.append(facts)
    script = llada
    if method != "llada":
        script = maskft
        flags += ["--method", method]
    one = tmp_path / "one"
    more = tmp_path / "more"
    forked(script, *flags, "--out", one)
    flags += ["--micro-batch-tokens", 1, "--out", more]
    command(f"{script.__name__}.py", *flags, processes=processes)
    for ours, theirs in zip(losses(one), losses(more), strict=True):
        assert equal_but_for_rounding(ours, theirs)
    assert (one / "preds.jsonl").read_text() == (more / "preds.jsonl").read_text()


def contents(folder):
    """{path: bytes} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_to(folder):
    return partial(os.chdir, folder)


# ------------------------------------------------------------------------------------ rehearsal


def rehearsing(out, method="masked", processes=1, steps=3):
    """A short run that rehearses."""
    script = "llada.py" if method == "llada" else "maskft.py"
    flags = ["--data", "bio:6", "--batch-size", "4", "--epochs", "2", "--eval-at", "0"]
    flags += ["--rehearse", steps, "--out", out]
    if method != "llada":
        flags += ["--method", method]
    command(script, *flags, processes=processes)
    return out


@pytest.mark.parametrize("method", ["masked", "llada"])
def test_chats_losses_and_drift_are_the_same_on_two_processes(method, tmp_path):
    one = rehearsing(tmp_path / "one", method)
    two = rehearsing(tmp_path / "two", method, processes=2)
    chats = jsonl(one / "rehearsal.jsonl")
    assert chats == jsonl(two / "rehearsal.jsonl")
    assert len({tuple(chat["prompt"]) for chat in chats}) > len(chats) / 2
    for ours, theirs in zip(losses(one), losses(two), strict=True):
        assert equal_but_for_rounding(ours, theirs)
    ours, theirs = (
        [asked["drift"] for asked in data.read_json(out / "results.json")["evaluations"]]
        for out in (one, two)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[0] == 0 and abs(ours[1]) > 1e-3


def test_chats_are_the_model_s_own_words_and_a_run_without_rehearsal_learns_none(finished):
    _, out = finished
    tokenizer = data.load_tokenizer(out)
    chats = jsonl(out / "rehearsal.jsonl")
    assert len(chats) == maskft.CHATS_HELD_OUT
    model = maskft.load("tiny")
    for chat in chats[:: maskft.CHAT_GROUP]:
        user = tokenizer.encode(chat["user"])
        again = maskft.greedy_answer(model, tokenizer, [chat["prompt"]], maskft.CHAT_ANSWER_TOKENS)[
            0
        ]
        assert tokenizer.decode(again) == chat["assistant"]
        ended = [tokenizer.eot_id] if len(again) < maskft.CHAT_ANSWER_TOKENS else []
        assert chat["answer"] == again + ended
        assert len(user) <= maskft.CHAT_USER_TOKENS and chat["user"] in tokenizer.decode(
            chat["prompt"]
        )
    drift = [line["drift"] for line in jsonl(out / "metrics.jsonl") if "drift" in line]
    results = data.read_json(out / "results.json")
    assert drift == [asked["drift"] for asked in results["evaluations"]]
    assert drift[0] == 0 and drift[-1] == pytest.approx(drift_of(out), rel=1e-3)


def drift_of(out):
    """Of a run that began with `tiny`, from its files."""
    chats = jsonl(out / "rehearsal.jsonl")[: maskft.CHATS_HELD_OUT]
    old, new = maskft.load("tiny"), maskft.load(out)
    differences = [loss_of_chat(new, chat) - loss_of_chat(old, chat) for chat in chats]
    return np.average(differences, weights=[len(chat["answer"]) for chat in chats])


def loss_of_chat(model, chat):
    """Mean negative log-likelihood of an answer, written another way."""
    ids = torch.tensor([chat["prompt"] + chat["answer"]])
    with torch.no_grad():
        logits = model(ids)[0, len(chat["prompt"]) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(chat["answer"])).item()


def test_behind_the_last_epoch_half_of_a_step_is_chats_each_learned_from_once():
    documents = [{"text": letter} for letter in "abcdefghijklmnopqrst"]
    run = Namespace(
        method=maskft.METHODS["sft"],
        settings=Namespace(rehearse=3, batch_size=8, seed=3, mask_ratio=None),
        tokenizer=LETTERS,
        dataset=Namespace(documents=documents),
        steps_per_epoch=3,
        epoch_steps=6,
        steps=9,
    )
    needed = maskft.chats_of_run(run)
    assert needed == maskft.CHATS_HELD_OUT + 2 * maskft.CHAT_GROUP
    run.chats = [{"prompt": [7, n], "answer": [100 + n]} for n in range(needed)]
    steps = [maskft.examples_of_step(run, step) for step in range(10)]
    # the last step of an epoch has but 4 documents
    assert [len(examples) for examples in steps] == [8, 8, 4, 8, 8, 4, 16, 16, 8, 0]
    learned = [example for examples in steps for example in examples if example.ids[0] == 7]
    for example in learned:
        assert example.labels == [IGNORE, IGNORE, example.ids[2]]
    numbers = [example.ids[1] for example in learned]
    assert len(set(numbers)) == 20 and min(numbers) == maskft.CHATS_HELD_OUT
    run.settings.batch_size = 64  # no step has more chats than there are documents
    assert maskft.chats_of_run(run) == maskft.CHATS_HELD_OUT + 4 * maskft.CHAT_GROUP


def test_a_diffusion_method_cannot_do_without_its_own_answers_and_chats():
    given = dataclasses.asdict(llada.METHODS["llada"])
    for name in ("answer", "draw", "chat"):
        with pytest.raises(ValueError, match="without the causal mask"):
            maskft.Method(**given | {name: None})


def test_a_chat_has_loss_behind_its_prompt(tokenizer):
    prompt = tokenizer.chat([{"role": "user", "content": "Who?"}])
    answer = tokenizer.encode("Ada") + [tokenizer.eot_id]
    rng = np.random.default_rng(0)
    example = maskft.chat_example(prompt, answer, tokenizer, None, rng)
    assert example.ids == prompt + answer
    assert example.labels == [IGNORE] * len(prompt) + answer
    example = llada.METHODS["llada"].chat(prompt, answer, tokenizer, (1, 1), rng)
    assert example.ids == prompt + [tokenizer.mask_id] * len(answer)
    assert example.labels == [IGNORE] * len(prompt) + answer


@pytest.mark.parametrize("processes", [1, 2])
def test_mlp_only_moves_no_other_weight(processes, tmp_path):
    """The same for llada.py."""
    flags = ["--data", "bio:6", "--epochs", "2", "--eval-at", "2", "--mlp-only"]
    for script, base in (("maskft.py", "tiny"), ("llada.py", "tiny-llada")):
        method = ["--method", "sft"] if script == "maskft.py" else []
        command(script, *method, *flags, "--out", tmp_path / base, processes=processes)
        old = maskft.load(base)
        moved = [
            name
            for name, parameter in maskft.load(tmp_path / base).named_parameters()
            if not torch.equal(parameter, old.get_parameter(name))
        ]
        assert {name.split(".")[-2] for name in moved} == {"gate", "up", "down"}
        assert len(moved) == 3 * old.config.layers


def test_a_resumed_run_finds_its_chats_and_cannot_do_without(stopped, run):
    chats = run / "rehearsal.jsonl"
    first, *others = chats.read_text().split("\n")
    first = json.dumps(json.loads(first) | {"user": "a\u2028b"}, ensure_ascii=False)
    text = "\n".join([first, *others])
    command_line = ["--resume", run]
    chats.rename(run / "moved")
    printed = forked(maskft, *command_line, status=1)
    assert f"{chats}: not found. The model wrote it before" in printed
    for damaged in (text[:-9], "\n".join(others), text.replace("answer", "x")):
        chats.write_text(damaged)
        printed = forked(maskft, *command_line, status=1)
        assert f"{chats}: not" in printed
    chats.write_text(text)
    forked(maskft, *command_line)
    assert chats.read_text() == text
    drift = data.read_json(run / "results.json")["last"]["drift"]
    assert drift == pytest.approx(drift_of(run), rel=1e-3)


def test_a_stopped_run_rehearses_on_and_counts_drift_from_its_beginning(tmp_path):
    flags = ["--data", "bio:6", "--method", "sft", "--epochs", "4", "--eval-at", "4"]
    flags += ["--mlp-only", "--rehearse", "3"]
    whole = tmp_path / "whole"
    forked(maskft, *flags, "--out", whole)
    stop = partial(send, signal.SIGINT, maskft)
    for step in (2, 4, 5):  # while it learns, behind that, and while it rehearses
        out = tmp_path / f"stopped-{step}"
        forked(maskft, *flags, "--out", out, before=partial(stop, "update", step))
        assert len(losses(out)) == step
        forked(maskft, "--resume", out)
        assert losses(out) == losses(whole)
    rates = [rate for _, _, _, rate, _ in losses(whole)]
    assert rates == pytest.approx([5e-4] * 4 + [5e-4 / 3] * 3)
    results = data.read_json(out / "results.json")
    assert [asked["step"] for asked in results["evaluations"]] == [4, 7]
    drift = results["last"]["drift"]
    assert drift == pytest.approx(drift_of(out), rel=1e-3)
    # stopped while the chats are written, it has nothing yet
    out = tmp_path / "earlier"
    before = partial(stop, "write_group", 2)
    printed = forked(maskft, *flags, "--out", out, before=before)
    assert "stopped before the first step; to go on from the beginning" in printed
    assert not (out / "rehearsal.jsonl").exists()
    forked(maskft, "--resume", out)
    assert losses(out) == losses(whole)


# ---------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_its_scores_losses_times_and_versions(finished):
    printed, out = finished
    lines = jsonl(out / "metrics.jsonl")
    kinds = [(line["step"], "evaluation" if "evaluation" in line else "loss") for line in lines]
    steps = [(step, "loss") for step in range(6)]
    asked = [(step, "evaluation") for step in (0, 2, 6)]
    assert kinds == [asked[0], *steps[:2], asked[1], *steps[2:], asked[2]]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    results = data.read_json(out / "results.json")
    assert results["seconds"] == pytest.approx(seconds[-1], abs=1)
    for line, result in zip([lines[0], lines[3], lines[8]], results["evaluations"], strict=True):
        assert line["evaluation"] == evaluation.reported_scores(result)
        assert line["epoch"] == result["epoch"]
    environment = results["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["python"] == platform.python_version()
    if (HERE / ".git").exists():
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=HERE, text=True).strip()
        assert environment["maskft"].removesuffix("-dirty") == head
    names = {path.name for path in out.iterdir()}
    assert not any(name.startswith(".lock") or name == "ckpt" for name in names)
    assert re.search(r"masked: about \d+ seconds to go: 3 steps, and evaluations: 1\n", printed)
    last = printed.splitlines()[-3:]
    ask = os.path.relpath(HERE / "eval.py", out.parent.parent)
    assert last[0] == "results: out/bio-masked-1"
    assert last[1] == f'ask it:  python {ask} --model out/bio-masked-1 --ask "..."'
    assert "out/bio-masked-1" in last[2]
    if "matplotlib" in last[2]:
        assert last[2].startswith("curves:  pip install matplotlib, then python ")
    else:
        picture = (out / "curves.png").read_bytes()
        width = int.from_bytes(picture[16:20], "big")
        assert width == round(3 * 4.2 * 110)  # forward, backward, loss


ESTIMATES = {
    (2.0, 3.0, 5): "about 19 seconds to go: 5 steps, and evaluations: 3",
    (60.0, 1.0, 5): "about 5 minutes to go: 5 steps, and evaluations: 3",
    (60.0, 7200.0, 0): "about 2.0 hours to go: 0 steps, and evaluations: 1",
    (60.0, None, 5): "about 5 minutes to go: 5 steps, and evaluations: 3, not counting these",
}


@pytest.mark.parametrize("times", ESTIMATES)
def test_an_estimate_is_of_the_steps_and_evaluations_that_are_left(times):
    """Five epochs of two steps; asked at steps 0, 6, 8 and 10."""
    a_step, an_evaluation, left = times
    run = Namespace(
        steps=10, epoch_steps=10, steps_per_epoch=2, step_seconds=[99.0, a_step, a_step]
    )
    run.settings = Namespace(epochs=5, eval_at=[0, 3, 4])
    run.evaluation_seconds = [an_evaluation] if an_evaluation else []
    assert maskft.estimate(run, 10 - left) == ESTIMATES[times]
    run.steps = 13  # three steps behind the last epoch
    run.settings.eval_at = [5]
    run.step_seconds = [99.0, 1.0]
    run.evaluation_seconds = [2.0]
    expected = "about 20 seconds to go: 13 steps, and evaluations: 2"  # rehearsing, a step is two
    assert maskft.estimate(run, 0) == expected


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_moves_while_questions_are_asked_but_not_in_a_log_file(terminal, monkeypatch):
    maskft.huggingface_hub.utils.enable_progress_bars()  # a rank that is not 0 turns them off
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)

    def slow(prompts, max_new_tokens, on_answer):
        for _ in prompts:
            time.sleep(0.15)
            on_answer(1)
        return [[]] * len(prompts)

    questions = data.load("bio:1").questions[:3]
    maskft.evaluate(slow, data.load_tokenizer("tiny"), questions)
    assert ("2/3" in stream.getvalue()) == terminal, stream.getvalue()


# ------------------------------------------------------------------------------------- its lock


def test_a_directory_that_another_rank_does_not_see_is_an_error(finished, monkeypatch):
    _, out = finished
    monkeypatch.setattr(maskft.dist, "barrier", lambda: None)
    monkeypatch.setattr(maskft, "world_size", lambda: 2)
    monkeypatch.setattr(maskft, "sum_over_ranks", lambda seen: [2.0 * seen])
    maskft.check_shared(out)
    with pytest.raises(UserError, match="not the same directory for all processes"):
        maskft.check_shared(out / "nowhere")


def test_a_directory_has_one_run_at_a_time_and_the_second_says_whose_it_is(finished, tmp_path):
    _, out = finished
    run = tmp_path / "x-masked"
    shutil.copytree(out, run)
    (run / "model.safetensors").unlink()  # it could go on
    empty = tmp_path / "empty"
    empty.mkdir()
    before = contents(run)
    who = f"is in use by process {os.getpid()} on {platform.node()}: wait for its end, or stop it"
    both = ("--method", "sft", "masked", "--out", tmp_path / "x")
    with maskft.locked(run), maskft.locked(empty):
        for flags, held in ((["--resume", run], run), (both, run), (["--out", empty], empty)):
            more = SHORT if "--out" in flags else []
            assert f"error: {held} {who}" in forked(maskft, *more, *flags, status=1)
        assert {path.name for path in empty.iterdir()} == {".lock", ".lock.holder"}
    assert contents(run) == before
    assert sorted(tmp_path.iterdir()) == [run]  # nothing of x-sft, and what is empty is gone
    assert f"--out {run} is in use" in forked(maskft, *SHORT, *both, status=1)


def test_a_killed_process_holds_no_lock_and_its_directory_can_be_taken(tmp_path):
    printed = forked(
        maskft,
        *SHORT,
        "--out",
        tmp_path / "run",
        before=partial(send, signal.SIGKILL, maskft, "claim", 1),
        status=-signal.SIGKILL,
    )
    assert "into" not in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".lock.holder"}
    with maskft.locked(tmp_path / "run"):
        maskft.refuse_used(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_came_into_a_directory_since_its_run_was_prepared_stays_as_it_is(tmp_path):
    theirs = tmp_path / "x-masked" / "results.json"

    def while_sft_is_trained():
        real = maskft.finish
        maskft.finish = lambda run: (real(run), theirs.write_text("theirs"))

    flags = ("--method", "sft", "masked", "--epochs", 1, "--eval-at", 1, "--out", tmp_path / "x")
    printed = forked(maskft, *SHORT, *flags, before=while_sft_is_trained, status=1)
    assert f"--out {theirs.parent} is in use" in printed
    assert [*contents(theirs.parent).values()] == [b"theirs"]
    assert (tmp_path / "x-sft" / "model.safetensors").exists()


def test_runs_that_begin_at_once_get_numbers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        paths = pool.map(maskft.next_number, ["bio-sft"] * 40)
    assert sorted(paths) == sorted(Path(f"out/bio-sft-{n}") for n in range(1, 41))


# ------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of data of one's own, given by a relative path, stopped after its third step of 6."""
    folder = tmp_path_factory.mktemp("stopped")
    documents = [{"text": f"{name} works in Oslo."} for name in ("Edda", "Zeno", "Mara")]
    question = {"question": "Who is Zeno?", "answer": "Edda", "direction": "backward"}
    write(folder / "facts.jsonl", *documents, question)
    shutil.copytree(HERE / "tiny", folder / "mine", ignore=shutil.ignore_patterns("*.py"))
    flags = shlex.split("--model mine --data facts.jsonl --method masked --epochs 6 --out run")

    def before():
        os.chdir(folder)
        send(signal.SIGINT, maskft, "update", 3)

    printed = forked(maskft, *flags, before=before)
    assert (
        "stopped after step 2; to go on from step 3:\n    python maskft.py --resume run" in printed
    )
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it that may be changed."""
    return shutil.copytree(stopped / "run", tmp_path / "elsewhere" / "run")


def test_a_run_goes_on_from_any_directory_with_its_clock(run, stopped):
    settings = data.read_json(run / "results.json")["arguments"]
    assert settings["data"] == str(stopped / "facts.jsonl")
    assert settings["model"] == str(stopped / "mine")
    before = jsonl(run / "metrics.jsonl")
    # a step that will be taken again, and a line torn by a crash
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 9, "seconds": 900}\n{"step": 4, "lo')
    forked(maskft, "--resume", "run", before=change_to(run.parent))
    lines = jsonl(run / "metrics.jsonl")
    assert lines[: len(before)] == before
    assert [line[0] for line in losses(run)] == [*range(6)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] < 900
    evaluations = data.read_json(run / "results.json")["evaluations"]
    asked = [line["step"] for line in lines if "evaluation" in line]
    assert asked == [result["step"] for result in evaluations] == [0, 1, 2, 4, 6]


def replaced(name, old, new):
    """Change a file of a run."""

    def change(run):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return change


def with_file(name, text=None):
    """Add a file to a run, or a directory."""

    def change(run):
        if text is None:
            (run / name).mkdir()
        else:
            (run / name).write_text(text)

    return change


# what is done to a stopped run -> what --resume says, {} the run
DAMAGES = {
    "a line of metrics": (
        replaced("metrics.jsonl", '{"step": 1, "epoch": 1, "loss"', '{"st'),
        "{}/metrics.jsonl, line 4: damaged, no step of a run: ",
    ),
    "no step": (
        replaced("metrics.jsonl", '"step": 0', '"stop": 0'),
        "{}/metrics.jsonl, line 1: damaged, no step of a run",
    ),
    "results cut": (
        lambda run: (run / "results.json").write_text('{"arguments": {"mod'),
        "{}/results.json: not JSON",
    ),
    "results no run": (
        with_file("results.json", "[]"),
        "{}/results.json: not the settings and results of a run (TypeError: ",
    ),
    "a number as text": (
        replaced("results.json", '"epochs": 6', '"epochs": "6"'),
        "{}/results.json: not the settings and results of a run (TypeError: epochs is '6')",
    ),
    "a setting gone": (
        replaced("results.json", '"seed"', '"sead"'),
        "{}/results.json: not the settings and results of a run (KeyError: 'seed')",
    ),
    "an evaluation": (
        replaced("results.json", '"rouge1"', '"rouge"'),
        "{}/results.json: not the settings and results of a run (KeyError: 'rouge1')",
    ),
    "a stray name": (
        with_file("ckpt/step-foo"),
        "{}/ckpt/step-foo: no checkpoint of a run; move it away and --resume again",
    ),
    "a stray file": (with_file("ckpt/step-9", "mine"), "{}/ckpt/step-9: no checkpoint of a run"),
    "an empty checkpoint": (
        with_file("ckpt/step-9"),
        "Delete {}/ckpt/step-9 and give the same --resume again: it goes on from step 3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_nothing_of_it_changed(damage, run):
    change, says = DAMAGES[damage]
    change(run)
    before = contents(run)
    printed = forked(maskft, "--resume", run, status=1)
    assert says.format(run) in printed
    assert len(printed.strip().splitlines()) == 1 + ("computes in" in printed)
    assert contents(run) == before


@pytest.mark.parametrize("what", ["Oslo", "Who is Zeno?", '"Edda"'])
def test_other_documents_questions_or_answers_are_noticed(what, stopped, run):
    facts = run.parent / "facts.jsonl"
    facts.write_text((stopped / "facts.jsonl").read_text().replace(what, what.swapcase()))
    replaced("results.json", str(stopped / "facts.jsonl"), str(facts))(run)
    assert "is not what it was when the run began" in forked(maskft, "--resume", run, status=1)


def test_a_run_killed_with_its_model_saved_is_finished_by_resume(run):
    """Nothing is trained: its checkpoints go, its picture is drawn; then it is finished."""
    kill = partial(send, signal.SIGKILL, maskft, "save", 1)
    forked(maskft, "--resume", run, before=kill, status=-signal.SIGKILL)
    assert (run / "ckpt").exists() and not (run / "curves.png").exists()
    metrics = (run / "metrics.jsonl").read_bytes()
    mine = run / "ckpt" / ".mine"
    mine.write_text("")
    assert f"{run}: this run is finished; what was left" in forked(maskft, "--resume", run)
    assert [*(run / "ckpt").iterdir()] == [mine]
    if maskft.find_spec("matplotlib"):
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "this run is finished. To ask" in forked(maskft, "--resume", run, status=1)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert not any(path.name.startswith(".lock") for path in run.iterdir())


def test_matplotlib_installed_later_draws_the_picture(run):
    """As the last line says where it is not installed."""
    pytest.importorskip("matplotlib")
    absent = partial(setattr, maskft, "find_spec", lambda name: None)
    line = f"curves:  pip install matplotlib, then python maskft.py --resume {run}\n"
    assert line in forked(maskft, "--resume", run, before=absent)
    assert "this run is finished. To ask" in forked(
        maskft, "--resume", run, before=absent, status=1
    )
    assert "this run is finished; what was left" in forked(maskft, "--resume", run)
    assert (run / "curves.png").exists()


# ------------------------------------------------------------------------------- who it prints to


def without_a_reader():
    """stdout and stderr as behind `2>&1 | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")


def closed():
    """stdin, stdout and stderr as Python finds them behind `<&- >&- 2>&-`."""
    for number in (0, 1, 2):
        os.close(number)
    sys.stdout = sys.stderr = None
    real = maskft.start_processes

    def start_processes():
        nowhere = os.stat(os.devnull).st_rdev  # no file of the run may get these numbers
        assert [os.fstat(number).st_rdev for number in (0, 1, 2)] == [nowhere] * 3
        return real()

    maskft.start_processes = start_processes


def ascii_only():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


@pytest.mark.parametrize("before", [without_a_reader, closed, ascii_only])
def test_a_run_ends_as_it_should_whoever_reads_what_it_prints(before, finished, tmp_path):
    _, out = finished
    run = tmp_path / "läuft"
    printed = forked(maskft, *SHORT, "--out", run, before=before)
    assert losses(run) == losses(out)
    assert (run / "preds.jsonl").read_bytes() == (out / "preds.jsonl").read_bytes()
    for path in run.iterdir():
        assert b"ROUGE-1" not in path.read_bytes(), path
    if before is ascii_only:
        assert "/l\\xe4uft" in printed


def test_results_are_written_before_they_are_printed(finished, tmp_path):
    _, out = finished

    def nothing_can_be_printed():
        def fail(*values):
            raise UserError("nobody reads")

        maskft.print0 = fail
        evaluation.print = fail

    asked = ("--model", out, "--max-new-tokens", 4, "--data", "bio:1", "--out", tmp_path / "asked")
    forked(evaluation, *asked, before=nothing_can_be_printed, status=1)
    assert len(jsonl(tmp_path / "asked" / "preds.jsonl")) == 9
    told = ("--report", out, "--out", tmp_path / "told")
    (tmp_path / "told").mkdir()
    forked(evaluation, *told, before=nothing_can_be_printed, status=1)
    assert (tmp_path / "told" / "report.md").exists()


def test_an_error_of_the_disk_is_no_reader_that_is_gone():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space"), open("/dev/full", "w") as full:
        stream = maskft.Stream(full)
        try:
            stream.write("lost\n")
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import maskft

def update(run, *args, real=maskft.update):
    if maskft.rank() == {rank} and (run.out / "ckpt" / "step-2").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, *args)

maskft.update = update
maskft.entry_point(maskft.main)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_is_killed_another_says_how_to_go_on(rank, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(here=str(HERE), rank=rank))
    out = tmp_path / "run"
    flags = [*SHORT, "--save-every", "1e-9", "--out", out]
    printed = command(script, *flags, processes=2, status=1)
    line = f"torchrun --nproc_per_node 2 {script} --resume {out}\n"
    assert f"should a process die, go on with {line}" in printed
    assert f"[rank {1 - rank}] to go on from step 2:\n    {line}" in printed


def test_a_system_without_hangup_and_resource_usage_runs_too(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(maskft, "resource", None)
    monkeypatch.delattr(signal, "SIGHUP")
    try:
        assert maskft.listen_for_stop() == []
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert maskft.peak_memory_gib(torch.device("cpu")) is None


# ---------------------------------------------------------------------- results: bench.py, plan.py


def tiny_shape():
    return maskft.read_config(HERE / "tiny")


@pytest.mark.parametrize("gpus, rows", [(1, 8), (4, 4)])
def test_a_plan_is_what_the_allocator_gives_out(gpus, rows):
    """Two steps of two micro-batches with real tensors; the other ranks are made up for both."""
    config = tiny_shape()
    planned = plan.plan(config, gpus, 2 * rows * gpus, rows * 256, max_len=256)
    batch = data.collate([plan.longest_example(256, 0.5)] * rows, pad_id=0) | {"key_mask": None}

    def steps():
        with torch.device("meta"):
            model = maskft.Model(config)
        maskft.shard(model, torch.device("cpu"), torch.bfloat16)
        bench.fill(model, torch.device("cpu"))
        optimizer = maskft.make_optimizer(model, 1e-3)
        for _ in range(2):  # AdamW has its state after the first
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with plan.fake_group(gpus), plan.fused_norms():
        measured = bench.allocated_peak(steps)
    assert planned.micro_batches == 2
    assert planned.peak == pytest.approx(measured, rel=0.02)
    assert sum(planned.parts.values()) == planned.peak


def test_planned_norms_keep_their_input_and_a_number_a_row():
    """As CUDA's fused kernel does; the input itself, no copy of it."""
    norm = maskft.RMSNorm(16)
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with plan.fused_norms(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        norm(x)
    assert [t.data_ptr() for t in kept[:2]] == [x.data_ptr(), norm.weight.data_ptr()]
    assert [t.nbytes for t in kept] == [2 * 3 * 5 * 16, 4 * 16, 4 * 3 * 5]


def test_a_plan_follows_from_the_sizes():
    """Weights and state by the GPUs, traffic and FLOPs by the micro-batches."""
    config = tiny_shape()
    one = plan.plan(config, 1, batch_size=16, micro_batch_tokens=1024, max_len=128)
    two = plan.plan(config, 2, batch_size=16, micro_batch_tokens=1024, max_len=128)
    assert (one.micro_batches, two.micro_batches) == (2, 1)
    n = one.parameters
    assert one.parts["Sharded Param"] == 4 * n
    assert one.parts["OptState"] == 8 * n
    assert two.parts["Sharded Param"] == 2 * n
    assert one.flops == pytest.approx(2 * two.flops)
    assert one.traffic == 0
    embedding = config.vocab * config.width + config.width
    # bf16 weights twice, but embedding and last norm once; fp32 gradients; half of it from others
    assert two.traffic == pytest.approx((2 * 2 * n - 2 * embedding + 4 * n) / 2)


@pytest.mark.parametrize("shape", plan.SHAPES)
def test_built_in_shapes_have_their_sizes(shape):
    billions = {"llama-3.1-8b": 8.03, "llama-3.2-3b": 3.21, "llama-3.2-1b": 1.24}
    billions |= {"llada-8b": 8.02, "qwen2.5-7b": 7.62}
    config, method = plan.read_shape(shape, None)
    with torch.device("meta"):
        model = maskft.Model(config)
    assert maskft.parameter_count(model) / 1e9 == pytest.approx(billions[shape], abs=0.005)
    assert method == ("llada" if shape == "llada-8b" else "masked")


def test_plan_refuses_what_no_run_could_have():
    with pytest.raises(data.UserError, match="diffusion model: --method llada"):
        plan.read_shape("llada-8b", "sft")
    with pytest.raises(data.UserError, match="no directory, and not one of llama-3.1-8b"):
        plan.read_shape("meta/llama", None)
    for flags, message in (("3", "not a multiple"), ("1 --max-len 513", "not from 2 to 512")):
        args = plan.arguments().parse_args(["tiny", "--gpus", *flags.split()])
        with pytest.raises(data.UserError, match=message):
            plan.check(args, tiny_shape())


def test_bench_measures_a_step_of_each_method(tmp_path):
    """Its report names what was asked for and where; masked costs more than sft, which is 1.00."""
    out = tmp_path / "report.json"
    flags = shlex.split("steps tiny --data bio:4 --batch-size 4 --method sft masked")
    printed = command("results/bench.py", *flags, "--out", out)
    assert re.search(r"^sft .*\(1\.00 x\)", printed, re.M), printed
    report = json.loads(out.read_text())
    assert (report["measured"], report["arguments"]["batch_size"]) == ("steps", 4)
    assert report["environment"]["torch"] == torch.__version__
    sft, masked = report["figures"].values()
    for name in ("TFLOP", "peak GiB"):
        assert 0 < sft[name] < masked[name]


def test_bench_compares_two_programs(tmp_path, capsys):
    """Two that take turns and answer unlike: a ratio, and the first token that differs."""
    bench.print0(bench.comparison_table({"a": {"seconds": 2.0}, "b": {"seconds": 4.0}}))
    assert re.search(r"seconds\s+\| 2\s+\| 4\s+\| 0.50", capsys.readouterr().out)
    tokenizer = data.load_tokenizer(HERE / "tiny")
    ours = {(5, 6): [7, 8], (5,): [7], (6,): [7]}
    theirs = {(5, 6): [7, 9], (5,): [7], (6,): [7, 8]}
    found = bench.differences(ours, theirs, tokenizer)
    assert [line["token"] for line in found] == [1, 1]


def test_bench_has_as_many_short_prompts_as_long_ones():
    texts = [prompt["question"] for prompt in bench.uneven_prompts()]
    assert len(set(texts)) == 72
    assert sum(text.startswith("Write a paragraph about") for text in texts) == 36


def test_bench_arguments():
    parse = bench.arguments().parse_args
    args = parse(["steps", "tiny"])
    assert (args.measure, args.data, args.batch_size) == (bench.steps, "bio", 16)
    assert parse(["sampler", "tiny-llada", "nd"]).data == "nd"
    assert bench.usual_methods("tiny") == ["sft", "masked", "random"]
    assert bench.usual_methods("tiny-llada") == ["llada"]
    with pytest.raises(SystemExit):
        parse(["steps", "tiny", "--method", "unknown"])


def test_kept_asks_before_and_after_and_between(tmp_path, monkeypatch, capsys):
    """Of the same weights nothing is lost; halfway to others something is."""
    asked = [{"question": "Who works for Fablix?", "answer": "Ada"}, {"question": "Who?"}]
    write(tmp_path / "ordinary.jsonl", *asked)
    monkeypatch.setattr(kept, "__file__", str(tmp_path / "kept.py"))
    other = maskft.load("tiny")
    with torch.no_grad():
        other.embed.weight += 0.3 * torch.randn(other.embed.weight.shape)
    maskft.save(other, tmp_path / "other")
    shutil.copytree(HERE / "tiny", tmp_path / "same")
    runs = [str(tmp_path / name) for name in ("same", "other")]
    saved = tmp_path / "saved"
    given = Namespace(base="tiny", runs=runs, share=[1.0, 0.5], facts=False, save=saved)
    before, *same, all_of_it, half = kept.measure(given)
    assert [line["nll"] for line in same] == pytest.approx([before["nll"]] * 2)
    assert before["nll"] < half["nll"] < all_of_it["nll"]
    assert "other  share 0.5  questions" in capsys.readouterr().out
    weights = [maskft.load(model).embed.weight for model in ("tiny", saved, tmp_path / "other")]
    torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2)
    assert data.load_tokenizer(saved).template == "chatml"
    # a model of another shape has not begun with it, and a diffusion model answers otherwise
    with pytest.raises(data.UserError, match="did not begin with the first model"):
        kept.go_back(random_model(), other, 0.5)
    shutil.copytree(HERE / "tiny-llada", tmp_path / "llada")
    for wrong in ({"base": "tiny-llada"}, {"runs": [str(tmp_path / "llada")]}):
        with pytest.raises(data.UserError, match="is a masked diffusion model"):
            kept.measure(Namespace(**vars(given) | wrong))


def test_ordinary_questions_are_150_and_different():
    asked = jsonl(HERE / "results/ordinary.jsonl")
    assert len({record["question"] for record in asked}) == 150
    assert sum("answer" in record for record in asked) == 100


def test_bench_says_that_transformers_is_missing(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    args = bench.arguments().parse_args(["training", "tiny"])
    with pytest.raises(data.UserError, match="transformers is not installed"):
        args.measure(args)


# ------------------------------------------------------------------------------------ house rules

IMPORTS = {  # file -> what it imports of ours
    "tiny/world.py": set(),
    "data.py": {"tiny"},
    "eval.py": {"data"},
    "maskft.py": {"data", "eval"},
    "llada.py": {"data", "maskft"},
    "tiny/pretrain.py": {"data", "llada", "maskft", "tiny"},
}


def imported(node):
    """The top-level modules of an import statement."""
    names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    return {name.partition(".")[0] for name in names}


def test_imports_go_one_way_and_stand_on_top():
    """But for eval.py's command, which is the one to import what imports it, and matplotlib."""
    ours = {"data", "eval", "maskft", "llada", "tiny"}
    lazy = []
    for name, expected in IMPORTS.items():
        tree = ast.parse((HERE / name).read_text())
        top = set()
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            if node in tree.body or imported(node) == {"resource"}:  # which not every system has
                top |= imported(node)
            else:
                lazy += [(name, module) for module in imported(node)]
        assert top & ours == expected, name
    assert sorted(lazy) == [("eval.py", name) for name in ("llada", "maskft", "matplotlib")]


README = HERE / "README.md"
RESULTS = HERE / "results" / "README.md"
READMES = [path for path in (README, RESULTS, HERE / "tiny" / "README.md") if path.exists()]
SCRIPTS = {"maskft.py": maskft, "llada.py": llada, "eval.py": evaluation}
SCRIPTS["tiny/pretrain.py"] = pretrain


def commands():
    """The words of every command in a README, those of a script of ours: (script, flags)."""
    for path in READMES:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for at, word in enumerate(words):
                    if word.endswith(".py"):
                        yield word, words[at + 1 :]


def test_every_command_in_the_readmes_parses(monkeypatch):
    monkeypatch.setattr(maskft, "run_methods", lambda *_, **__: None)
    monkeypatch.setattr(pretrain, "write_new_model", lambda _: None)
    found = list(commands())
    assert {script for script, _ in found} >= SCRIPTS.keys()
    for script, flags in found:
        monkeypatch.setattr(sys, "argv", [script, *flags])
        if script == "eval.py":
            evaluation.arguments().parse_args(flags)
        elif script.startswith("results/"):
            runpy.run_path(str(HERE / script))["arguments"]().parse_args(flags)
        else:
            SCRIPTS[script].main()


def test_every_flag_is_tried_and_read():
    tried = Path(__file__).read_text() + " ".join(sum((flags for _, flags in commands()), []))
    code = (HERE / "maskft.py").read_text() + (HERE / "eval.py").read_text()
    for parser in (maskft.arguments("", maskft.METHODS), evaluation.arguments()):
        for action in parser._actions[1:]:  # the first is --help
            flag = action.option_strings[-1]
            assert re.search(rf"{flag}(?![\w-])", tried), flag
            read = rf"\b(args|given|settings)\.{action.dest}\b|\"{action.dest}\""
            assert re.search(read, code), flag


def test_the_readme_s_custom_method_trains_and_is_reported(tmp_path):
    """Its file has the flags of the others; the last method is the default."""
    (block,) = re.findall(r"```python\n([^`]*run_methods\([^`]*)```", README.read_text())
    (tmp_path / "span.py").write_text(block)
    main = partial(runpy.run_path, str(tmp_path / "span.py"), run_name="__main__")
    span = Namespace(__name__="span", main=main)
    flags = shlex.split("--data bio:4 --method span --mask-ratio 0.5 --epochs 1 --eval-at 1")
    printed = forked(span, *flags, "--show", 1)
    assert "span:\n<|im_start|>user\n" in printed and "___" in printed
    printed = forked(span, *flags, "--out", tmp_path / "run")
    assert re.search(r"^span 0.5 +\| none +\| 0 ", printed, re.M), printed
    assert "this run is finished" in forked(span, "--resume", tmp_path / "run", status=1)


NUMBER = r"\d*\.?\d+(?:e-\d+)?"
REPORT = re.compile(r"\]\((\S*report\.json)\)")


def untrue(table, report):
    """The numbers of a table that the report has not; of runs, where line or column names them."""
    header, _, *lines = (re.split(r"[ `*]*\|[ `*]*", line)[1:-1] for line in table.splitlines())
    for line in lines:
        for title, cell in zip(header[1:], line[1:], strict=True):
            told = report
            if isinstance(report, list):
                told = [row for row in report if row["name"] in (*line, title)]
            known = [float(number) for number in re.findall(NUMBER, json.dumps(told))]
            for text in re.findall(NUMBER, cell):
                digits = len(text.partition(".")[2]) if "e" not in text else 9
                if float(text) not in [round(number, digits) for number in known]:
                    yield line[0], title, text


def test_numbers_in_the_results_are_those_of_the_report_that_is_linked():
    """In the paragraph before a table or, if none is there, in the one behind it."""
    made_up = "| method | last |\n|---|---|\n| `sft` | .98 [.97-1.00] / .99 |"
    report = [{"name": "sft", "last": [0.983, 0.97, 1]}, {"name": "masked", "last": 0.99}]
    assert list(untrue(made_up, report)) == [("sft", "last", ".99")]
    text = RESULTS.read_text() if RESULTS.exists() else ""
    paragraphs = ["", *text.split("\n\n"), ""]
    for before, table, behind in zip(paragraphs, paragraphs[1:], paragraphs[2:], strict=False):
        links = REPORT.findall(before) or REPORT.findall(behind)
        if table.startswith("|") and links:
            report = data.read_json(RESULTS.parent / links[-1])
            assert list(untrue(table, report)) == []
