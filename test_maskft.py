"""Tests: `python -m pytest -q`, on a CPU, with nothing downloaded, in about two minutes.

Those that compare with transformers, tokenizers or rouge are skipped where these are not installed.
"""

import ast
import base64
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
import runpy
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import unicodedata
from argparse import Namespace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save

import data
import eval as evaluation
import llada
import maskft
from data import IGNORE, Example, UserError
from tiny import pretrain, world

HERE = Path(__file__).parent
torch.set_num_threads(1)  # two threads spin on matrices this small

# --------------------------------------------------------------------------- fixtures and helpers

# ---------------------------------------------------------------------------- files and commands


def write(path, *records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    scores, predictions = evaluation.evaluate(answer, tokenizer, questions)
    assert [p["question"] for p in predictions] == [q["question"] for q in questions]
    forward = scores["forward"]
    assert (forward["rouge1"], forward["n"], scores["backward"]["rouge1"]) == (1, 18, 0)
    company = scores["forward/company"]
    assert (company["n"], company["length"]) == (3, 2)  # "for Quillon"


def test_an_error_in_answering_is_no_score(asked, tokenizer):
    with pytest.raises(ZeroDivisionError):
        evaluation.evaluate(lambda *_, **__: 1 / 0, tokenizer, asked[0])


def test_questions_are_spread_evenly_over_the_ranks(asked, tokenizer, monkeypatch):
    """The ranks' parts have as many questions but for one, and give what one process does."""
    questions, answer = asked
    whole = evaluation.evaluate(answer, tokenizer, questions)
    parts = []

    def gather(gathered, part):
        parts.append(dict(part))
        gathered[:] = [dict(enumerate(whole[1]))]

    monkeypatch.setattr(evaluation, "world_size", lambda: 4)
    monkeypatch.setattr(evaluation.dist, "all_gather_object", gather)
    for rank in range(4):
        monkeypatch.setattr(evaluation, "rank", lambda rank=rank: rank)
        assert evaluation.evaluate(answer, tokenizer, questions) == whole
    assert [len(part) for part in parts] == [7, 7, 7, 6]
    together = {number: prediction for part in parts for number, prediction in part.items()}
    assert [together[number] for number in range(27)] == whole[1]


# ----------------------------------------------------------------------------------- eval: report


def write_run(folder, method, seed, scores, ratio=(0.05, 0.95), **arguments):
    """A run with these scores at steps 0, 10, 20, ...; it is finished if there are three.

    A score is a number, that of forward questions, or {direction: number}."""
    usual = {"data": "bio:9", "model": "tiny", "paraphrase": "none", "epochs": 2, "lr": 1e-3}
    usual |= {"batch_size": 20, "max_len": 512, "dtype": None, "eval_at": [0]}
    usual |= {"method": method, "seed": seed, "mask_ratio": ratio}
    evaluations = []
    for n, score in enumerate(scores):
        by_direction = score if isinstance(score, dict) else {"forward": score}
        groups = {
            direction: {"rouge1": x, "n": 54, "interval": {"rouge1": [x - 0.01, x + 0.01]}}
            for direction, x in by_direction.items()
        }
        evaluations.append({"step": 10 * n, "epoch": n, "scores": groups})
    folder.mkdir()
    results = {"arguments": usual | arguments, "evaluations": evaluations}
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
    low = [".100", ".300 [.29-.31]", ".300 [.29-.31]"]
    assert cells(backward) == [["sft", "none", "0", *low]]
    assert cells(forward) == [
        ["sft, lr 0.01", "none", "0", ".100", ".200 [.19-.21]", ".100 [.09-.11]"],
        ["sft, lr 0.03", "none", "0", *low],
        ["sft", "same", "0", ".100", "1.000 [.99-1.01]", "1.000 [.99-1.01]"],
        ["masked", "none", "0,1", ".000", ".900 [.90-.90]", ".700 [.60-.80]"],
        ["mine", "none", "1", *low],
        ["masked 0.5", "none", "0", ".100", ".500 [.49-.51]", ".500 [.49-.51]"],
        ["mine 0.5", "none", "1", ".100", ".400 [.39-.41]", ".400 [.39-.41]"],
    ]
    rows = data.read_json(out / "report.json")
    assert rows[1]["mask_ratio"] is None
    masked = rows[4]
    assert (masked["seeds"], masked["data"]) == ([0, 1], "bio:9")
    assert masked["mask_ratio"] == [0.05, 0.95]
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
        assert torch.equal(model(F.pad(ids, (0, 5)))[0, :20], plain)


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
    ("masked", "135M", "bio:100", 10, 80, 6e-4),
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
    found = maskft.decide(given, method, model, documents=batch_size)
    assert (found.batch_size, found.epochs, found.lr) == (batch_size, steps, lr)
    assert found.eval_at == [0] + [2**i for i in range(13) if 2**i < steps]
    assert found.mask_ratio == ([0.05, 0.95] if method.masks else None)
    # of three times as many documents: as many steps, but small models see each as often
    epochs = maskft.decide(given, method, model, 3 * batch_size - 1).epochs
    assert epochs == (steps if size == "135M" else math.ceil(steps / 3))
    flags = {"batch_size": 7, "epochs": 9, "lr": 0.1, "eval_at": [5]}
    assert vars(maskft.decide(settings(**flags), method, model, 20)).items() >= flags.items()


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
    assert "math flexible 0." in printed and "math strict last\n" in printed
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
    flags = shlex.split("--model tiny --batch-size 4 --epochs 10 --eval-at 10 --lr 1e-4 --data")
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
