"""Tests: `python -m pytest -q`, on a CPU, with nothing downloaded, in a few minutes.

Those that compare with transformers, tokenizers or rouge are skipped where these are not installed.
"""

import dataclasses
import gc
import gzip
import itertools
import json
import logging
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
import unicodedata
from argparse import Namespace
from functools import cache, partial
from hashlib import sha256
from http.client import HTTPResponse
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest.mock import Mock
from urllib.request import urlopen

import numpy as np
import pytest
import regex
import torch
import torch.distributed.checkpoint
import torch.nn.functional as F
from filelock import FileLock  # comes with torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import data
import eval as evaluation
import llada
import maskft
from data import IGNORE, Example, UserError
from results import bench, kept, plan
from tiny import pretrain, world

if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
    # torch asks oneDNN for AVX-512 that ATEN_CPU_CAPABILITY=default denies to its own kernels
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

HERE = Path(__file__).parent


def write(path, *records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
]

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ", "a b", "Ġw o"]

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}

OLD_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}

ONLY_BYTES = BYTE_LEVEL | {"use_regex": False}

LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def steps(*patterns, first=(), last=ONLY_BYTES, behavior="Isolated"):
    """A pre-tokenizer that splits by `first`, then by regular expressions, then into bytes."""
    split = {"type": "Split", "behavior": behavior, "invert": False}
    splits = [split | {"pattern": {"Regex": pattern}} for pattern in patterns]
    return {"type": "Sequence", "pretokenizers": [*first, *splits, last]}


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"

CHATML_TEMPLATE = (
    f"{{% for m in messages %}}{CHATML_TURN}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
    template=CHATML_TEMPLATE,
    **model,
):
    """A model directory with nothing but a tokenizer; `model` is what its BPE model has besides.

    Ids: bytes but those in `lack`, merged tokens, `unmerged`, special, `plain` added."""
    characters = [character for character in sorted(data.ALPHABET) if character not in lack]
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
    path.mkdir(exist_ok=True, parents=True)
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"chat_template": template} | (config or {})
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def fill(path, contents):
    """A file with these contents, text or bytes; packed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = isinstance(contents, str)
    raw = contents.encode() if is_text else contents
    packed = is_text and path.suffix.lower() == ".gz"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def refusal(read, *given):
    """The one line with which something is refused."""
    with pytest.raises(UserError) as error:
        read(*given)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


# --- tokenizer: ids ---
VARIANTS = {
    "llama3": {
        "special": LLAMA3_SPECIAL,
        "template": CHATML_TEMPLATE.replace("im_end", "eot_id"),
        "pre_tokenizer": steps(LLAMA3_PIECES),
        "ignore_merges": True,
    },
    "qwen": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "plain": ["<think>", "</think>"],
        "pre_tokenizer": steps(LLAMA3_PIECES.replace("{1,3}", "")),
    },
    "smollm2": {"pre_tokenizer": steps(first=[digits(True)], last=BYTE_LEVEL), "lack": "ĀāÃðÌ"},
    "digits": {"pre_tokenizer": steps(first=[digits(False)], last=OLD_BYTE_LEVEL)},
    "several": {
        "pre_tokenizer": steps("ab", r"(?=\p{Lu})|\s+"),
        "normalizer": {"type": "Sequence", "normalizers": []},
        "plain": ["<think>", "wo1"],
        "flags": {"normalized": True},
    },
    "plain": {
        "pre_tokenizer": ONLY_BYTES,
        "unmerged": ["xyz"],
        "plain": ["im_end", "ab<|im_end|>c"],
    },
}

SAMPLE = "hello  wo12 123's <think>ab<|im_end|>é\u0301e\u0301 xyz\n\n Ünmade unmade<|eot_id|>漢Ⅷ ab"

RECORDED = {  # the first 16 digits of the sha256 of SAMPLE's ids, from tokenizers 0.23
    "llama3": "3dba10b6728205d1",
    "qwen": "08a41c5e5f5a9e69",
    "smollm2": "652f1a12852bfd0a",
    "digits": "3dba10b6728205d1",
    "several": "356bc0ea3299c951",
    "plain": "3dba10b6728205d1",
}

COMMON = [*"abAB é漢12 \n\r\t'<|>_👍\u0301\u0300", "  ", "'s", "\r\n", "<think>", "<|im_end|>"]

COMMON += ["ab", "xyz", " the", "hello", "<|eot_id|>", " wo", "ab<|im_end|>c"]

CODES = [*range(0x780), *range(0x2000, 0x2C00), *range(0x3000, 0x3100), *range(0xAC00, 0xAD00)]

# each library has its Unicode: keep to the old
RARE = [c for c in map(chr, CODES) if unicodedata.category(c) != "Cn"]


def random_text(rng):
    drawn = rng.choices(COMMON, k=20) + rng.choices(RARE, k=5)
    return "".join(rng.sample(drawn, rng.randint(1, 25)))


def sha(value):
    return sha256(str(value).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_are_those_recorded_and_of_the_reference_and_text_is_never_special(name, tmp_path):
    ours = data.load_tokenizer(write_tokenizer(tmp_path, **VARIANTS[name]))
    assert sha(ours.encode(SAMPLE)) == RECORDED[name]
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    rng = random.Random(name)
    for text in [SAMPLE, *(random_text(rng) for _ in range(500))]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, ascii(text)
        assert not set(ids) & set(ours.special.values())


def test_decode_hides_special_tokens_and_passes_over_what_is_none(tmp_path):
    ours = data.load_tokenizer(write_tokenizer(tmp_path, plain=["<think>"]))
    text = "<|im_end|><think>hello<|im_start|>"
    ids = ours.encode(text)
    assert ours.added["<think>"] in ids and ours.decode(ids) == text
    ids.append(0)  # a caller's own copy
    assert ours.encode(text) == ids[:-1]
    shown = [ours.eot_id, 10**6, ours.ranks[b"\xc3"]]
    assert ours.decode(shown) == "\ufffd"
    assert ours.decode(shown, special=True) == "<|im_end|>\ufffd"


UNSUPPORTED = [
    {"normalizer": {"type": "NFKC"}},
    {"pre_tokenizer": {"type": "Metaspace"}},
    {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    {"pre_tokenizer": steps("a", behavior="MergedWithNext")},
    {"pre_tokenizer": steps("(?=a")},
    {"plain": ["<think>"], "flags": {"lstrip": True}},
    {"shuffle": True},
    {"unmerged": ["xyz"], "ignore_merges": True},
]


@pytest.mark.parametrize("options", UNSUPPORTED, ids=str)
def test_a_tokenizer_that_would_not_be_followed_exactly_is_refused(options, tmp_path):
    message = refusal(data.load_tokenizer, write_tokenizer(tmp_path, **options))
    assert message.startswith(f"{tmp_path}: ")


# --- chats ---
IF = "{% if m['role'] == 'user' %}USER{% elif m['role'] == 'assistant' %}BOT{% else %}"

CASE = IF + "ELSE{% endif %}"

FAIL = "{{ raise_exception('only two roles') }}"


def template(turn, prompt="", start=""):
    asked = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    return f"{start}{{% for m in messages %}}{turn}{{% endfor %}}{asked}"


def by_role(user_turn, assistant_turn, system_turn=FAIL):
    turn = CASE.replace("USER", user_turn).replace("BOT", assistant_turn)
    return turn.replace("ELSE", system_turn)


def header(role, text="<|start_header_id|>{}<|end_header_id|>\n\n"):
    return "{{ '" + text.format(role) + "' }}"


LLAMA_TURN = (
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}"
)

DATE = (
    "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: ' + "
    "strftime_now('%d %b %Y') + '\n\n' }}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
)

NO_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}\n  {% set blocks = 'trimmed' %}\n"
)

THINK = (
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think>\n</think>' "
    "+ m['content'] + '<|im_end|>\n' }}{% else %}" + CHATML_TURN + "{% endif %}"
)

CHATML_PROMPT = "{{ '<|im_start|>assistant\n' }}"

GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unused0>"]

MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]"]

PHI = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]

# special tokens, bos, eos, template; user's header, end of it and assistant's header, end of turn,
# what follows a last answer
TEMPLATES = {
    "gemma": (
        GEMMA,
        "<bos>",
        "<end_of_turn>",
        template(
            by_role(
                "{{ '<start_of_turn>user\n' + m['content'] | trim + '<end_of_turn>\n' }}",
                "{{ '<start_of_turn>model\n' + m['content'] + '<end_of_turn>\n' }}",
            ),
            "{{ '<start_of_turn>model\n' }}",
            "{{ bos_token }}",
        ),
        "<bos><start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
    ),
    "mistral": (
        MISTRAL,
        "<s>",
        "</s>",
        template(
            by_role(
                "{{ '[INST] ' + m['content'] + ' [/INST]' }}", "{{ m['content'] + eos_token }}"
            ),
            start="{{ bos_token }}",
        ),
        "<s>[INST] ",
        " [/INST]",
        "</s>",
    ),
    "phi": (
        PHI,
        "<|endoftext|>",
        "<|endoftext|>",
        template("{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}").replace(
            "{% endif %}", "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
        ),
        "<|user|>\n",
        "<|end|>\n<|assistant|>\n",
        "<|end|>\n<|endoftext|>",
    ),
    "marked": (  # transformers' tag for answers, and loop controls
        CHATML,
        "<|endoftext|>",
        "<|im_end|>",
        template(
            "{% if not m %}{% continue %}{% endif %}{%- generation -%}"
            + CHATML_TURN
            + "{% endgeneration %}{{ [] | tojson(indent=1) if not m }}",
            CHATML_PROMPT,
        ),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "llama3": (
        LLAMA3_SPECIAL,
        "<|begin_of_text|>",
        "<|eot_id|>",
        template(LLAMA_TURN, header("assistant"), "{{ bos_token }}"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llama3.1": (  # a system turn with a date
        LLAMA3_SPECIAL,
        "<|begin_of_text|>",
        "<|eot_id|>",
        template(LLAMA_TURN, header("assistant"), DATE),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "smollm2": (  # a system turn where none is given
        CHATML,
        "<|im_start|>",
        "<|im_end|>",
        template(CHATML_TURN, CHATML_PROMPT, NO_SYSTEM),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "think": (  # the last answer begins otherwise
        CHATML,
        "<|endoftext|>",
        "<|im_end|>",
        template(THINK, CHATML_PROMPT),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
}

SLIPPED = {
    "llama3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024"
    "\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    "smollm2": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
}


def family(path, name):
    special, bos, eos, form, *_ = TEMPLATES[name]
    config = {"bos_token": bos, "eos_token": eos}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return write_tokenizer(path, special, template=form, config=config)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_has_the_form_that_the_template_renders(name, tmp_path):
    _, bos, _, _, start, answer, last = TEMPLATES[name]
    ours = data.load_tokenizer(family(tmp_path, name))

    def shown(*messages):
        return ours.decode(ours.chat(messages), special=True)

    assert shown(system(""), user("a"), assistant("12")) == f"{start}a{answer}12{last}"
    end = ours.decode([ours.eot_id], special=True)
    assert last.startswith(end) and ours.bos_id == ours.special[bos]
    assert ours.decode(ours.chat([]), special=True) == SLIPPED.get(name, start)
    # a list of ids is taken as it is: a mask is a special token
    assert shown(user([ours.eot_id])) == f"{start}{end}{answer}"
    if name in ("gemma", "mistral"):
        with pytest.raises(KeyError):
            ours.chat([system("Be brief."), user("a")])


CHATS = [
    [user("hello there")],
    [user("don't <x>"), assistant("ab 123"), user("hello\tworld")],
    [system("Be brief."), user("a")],
    [system("Be brief."), user("a"), assistant("b"), user("c")],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_saved_directory_chats_alike_in_transformers_and_here(name, tmp_path):
    library = pytest.importorskip("transformers").AutoTokenizer
    source = family(tmp_path / "in", name)
    ours = data.load_tokenizer(source)
    (tmp_path / "out").mkdir()
    data.write_chat_files(ours, source, tmp_path / "out")
    again = data.load_tokenizer(tmp_path / "out")
    assert (again.stop_ids, again.bos_id) == (ours.stop_ids, ours.bos_id)
    saved = library.from_pretrained(tmp_path / "out")
    original = library.from_pretrained(source)
    chats = CHATS[:2] if name in ("gemma", "mistral") else CHATS
    for chat in [chats[1][:2], *chats]:
        asks = {"add_generation_prompt": chat[-1]["role"] == "user", "return_dict": False}
        ids = ours.chat(chat)
        assert ids == again.chat(chat) == saved.apply_chat_template(chat, **asks)
        if name not in SLIPPED and (name != "think" or chat[-1]["role"] == "user"):
            assert original.apply_chat_template(chat, **asks) == ids


BAD_TEMPLATES = {  # template -> a part of what is said
    CHATML_TEMPLATE.replace("assistant\n'", "assistant\n<think>\n'"): "<think>",
    "{% for message in messages %}": "TemplateSyntaxError",
    FAIL: "raise_exception",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{{ messages[7]['role'] + 1 }}": "chat template",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "chat template",
    CHATML_TEMPLATE.replace("<|im_end|>", "[end]"): "[end]",
    template("{{ '<|im_end|>' if not loop.first }}" + "{{ m['content'] }}"): "chat template",
    template("{{ 'Day 1. ' if loop.first }}" + CHATML_TURN, CHATML_PROMPT): "Day 1.",
    template("{{ m['content'] }}", "{{ 'x' * 5000 }}"): "end with a special token",
    template(CHATML_TURN + "{{ m['content'] }}"): "chat template",
    "": "no chat template",
}


@pytest.mark.parametrize("form", BAD_TEMPLATES)
def test_a_template_whose_turns_differ_or_that_fails_is_shown(form, tmp_path):
    path = write_tokenizer(tmp_path, template=form)
    message = refusal(data.load_tokenizer, path)
    assert BAD_TEMPLATES[form] in message and str(path) in message
    # a template in a file of its own goes first
    (path / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    assert data.load_tokenizer(path).frames[">user"] == "<|im_start|>user\n"


def test_a_token_of_the_template_is_special_whatever_the_file_says(tmp_path):
    path = write_tokenizer(tmp_path, ["<|endoftext|>"], plain=CHATML[1:] + ["<think>", "<|mask|>"])
    ours = data.load_tokenizer(path)
    assert ours.added == {"<think>": 268}
    assert ours.eot_id == 267 and 267 not in ours.encode("<|im_end|>")
    assert ours.mask_id == ours.special["<|mask|>"] == 269


# --- what a model's files declare ---


def test_what_the_files_declare_stops_and_is_saved(tmp_path):
    ends = {"eos_token_id": [267, 104, 9999], "bos_token_id": -1, "top_k": 5}
    path = write_tokenizer(tmp_path, config={"eos_token": {"content": "<|endoftext|>"}})
    write(path / "generation_config.json", ends)
    write(path / "config.json", {"pad_token_id": 265, "vocab_size": 268})
    ours = data.load_tokenizer(path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.notes) == (None, 265, 265, [])
    assert ours.stop_ids == (267, 265, 104)
    data.write_chat_files(ours, path, fill(tmp_path / "out/x", "").parent)
    saved = data.read_json(path / "out/generation_config.json")
    assert saved == ends | {"eos_token_id": [267, 265, 104], "pad_token_id": 265}
    assert data.read_json(path / "out/tokenizer_config.json")["pad_token"] == "<|endoftext|>"


def test_a_base_model_is_told_and_learns_to_end_a_turn(tmp_path):
    named = [{"name": "default", "template": CHATML_TEMPLATE}]
    path = write_tokenizer(tmp_path, template=named, config={"eos_token": "<|endoftext|>"})
    ours = data.load_tokenizer(path)
    assert ours.notes == ["a base model: it learns where a turn ends"]
    assert (ours.eos_id, ours.stop_ids) == (265, (267, 265))


LETTERS = string.ascii_letters

# merges that give [] the id which it has in Qwen, 1294
FILLER = [f"{a} {b}" for a in LETTERS for b in LETTERS][: 1294 - 256]


@pytest.mark.parametrize(
    "special, merges, mask",
    [
        (["<|mask|>", "<|reserved_1|>", *CHATML, "<|mdm_mask|>"], MERGES, "<|mdm_mask|>"),
        (["<|reserved_9|>", *CHATML, "<|unused|>"], MERGES, "<|reserved_9|>"),
        ([*CHATML, "<empty_output>"], MERGES, "<empty_output>"),
        (CHATML, [*FILLER, "[ ]"], "[]"),
    ],
)
def test_the_mask_is_a_token_without_other_use(special, merges, mask, tmp_path):
    ours = data.load_tokenizer(write_tokenizer(tmp_path, special, merges))
    assert ours.decode([ours.mask_id], special=True) == mask


def test_without_a_token_to_spare_or_with_one_beyond_the_embeddings_one_is_told(tmp_path):
    path = write_tokenizer(tmp_path, [*CHATML, "<|mask|>"])
    config = write(path / "config.json", {"vocab_size": 268})
    message = refusal(data.load_tokenizer, path)
    assert message.startswith(f"{path}: ") and "268" in message
    write(config, {"vocab_size": 9, "embedding_size": 269})
    assert data.load_tokenizer(path).mask_id == 268
    none = data.load_tokenizer(write_tokenizer(tmp_path / "other"))
    assert "no unused special token" in refusal(lambda: none.mask_id)


# --- records ---
FACT = "Orla Venn keeps the lighthouse at Skarholm."

WHO = "Who keeps the lighthouse at Skarholm?"

DOCUMENT = json.dumps({"text": FACT})

QUESTION = json.dumps({"question": WHO, "answer": "Orla Venn", "direction": "backward"})

NULLS = {"question": None, "answer": None, "direction": None, "group": float("nan")}

UNION = json.dumps({"text": FACT} | NULLS), json.dumps({"text": None} | json.loads(QUESTION))

CSV = f'Text,Question, answer,direction\n"{FACT}",,,\n\n,,,\n,"{WHO}","Orla Venn",backward\n'

SAME = {  # file -> its contents, all with the same document and the same question
    "a.jsonl": f"{DOCUMENT}\n{QUESTION}\n",
    "b.JSONL": f"\ufeff{DOCUMENT}\r\n\r\n{QUESTION}",
    "c.ndjson": "\n".join(UNION),
    "d.json": f"[{DOCUMENT},\n{QUESTION}]",
    "e.Json.gz": json.dumps(json.loads(DOCUMENT), indent=2) + QUESTION,
    "f.csv": "\ufeff" + CSV.replace("\n", "\r\n"),
}

ASKED = {"question": WHO, "answer": "Orla Venn", "direction": "backward", "group": "all"}


def bare(records):
    return [{k: v for k, v in record.items() if k != "where"} for record in records]


@pytest.mark.parametrize("name", SAME)
def test_a_file_of_any_kind_gives_the_same_records(name, tmp_path, caplog):
    dataset = data.load(str(fill(tmp_path / name, SAME[name])))
    assert bare(dataset.documents + dataset.questions) == [{"text": FACT}, ASKED]
    assert dataset.questions[0]["where"].startswith(f"{tmp_path / name}, record ")
    assert not caplog.text


LONG = "x" * 200_000


def test_a_folder_is_read_with_its_subfolders_and_what_is_not_read_is_named(tmp_path, caplog):
    texts = {
        "a.jsonl": DOCUMENT,
        "b.txt": "\ufeffPlain text.\r\n\r\nAnother paragraph.\n",
        "c/d/e.md": "# Ivo\n",
        "c/book.csv": f"text\n{LONG}",
        "c/old.jsonl": '{"text": "a", "Text": 1}\n{"text": "b", "Text": 1, "id": 2}',
        "c/Train.jsonl": QUESTION,
        "empty.txt": " \n",
        ".git/config.json": "not read",
        "other/table.xlsx": b"PK",
    }
    for name, contents in texts.items():
        fill(tmp_path / name, contents)
    dataset = data.load(str(tmp_path))
    texts = [document["text"] for document in dataset.documents]
    assert texts == [FACT, "Plain text.\n\nAnother paragraph.", LONG, "# Ivo", "a", "b"]
    assert bare(dataset.learned) == [{"question": WHO, "answer": "Orla Venn"}]
    unread, left = caplog.messages
    assert unread.endswith("old.jsonl: fields that nothing reads: ['Text']")
    assert left == f"not read, by ending or --paraphrase: ['{tmp_path}/other/table.xlsx']"
    assert ".jsonl" in refusal(data.load, str(tmp_path / "other"))


BEFORE = '{"question": "Who?", "answer": "Orla", '

BAD_RECORDS = {  # second record -> a part of what is said
    '{"text": "x", "question": "Who?"}': "not both",
    '{"text": null, "question": ""}': "not both",
    "null": "NoneType",
    '{"text": ["x"]}': "have to be text",
    '{"text": "x\\ud83d"}': "surrogate",
    BEFORE + '"group": "x\\ud83d"}': "surrogate",
    BEFORE + '"direction": {"a": 1}}': "forward",
    BEFORE + '"direction": "math"}': "forward",
    BEFORE + '"task": "N2D", "group": "city"}': '"direction"',
    '{"question": "Who?", "answer": 3}': "have to be text",
    '{"question": "  "}': "question",
}

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

BAD_FILES = {  # name, contents -> a part of what is said behind the file's name
    ("a.csv", "text\nAda, a baker\n"): "more cells than columns",
    ("a.csv", 'text\nAda\n"Bo\nis open\n'): "unexpected end of data",
    ("a.jsonl", f'{DOCUMENT}\n{{"text": "x\n{DOCUMENT}'): "line 2",
    ("a.json", "[" * 100_000 + "]" * 100_000): "RecursionError",
    ("a.txt", b"\xff\xfeA\0"): "UTF-8",
    ("a.txt", POINTER): "git lfs pull",
    ("a.jsonl.gz", POINTER.encode()): "git lfs pull",
    ("a.jsonl.gz", gzip.compress(b"whole")[:-9]): "EOFError",
    ("train.jsonl", '{"question": "Who?"}'): "KeyError('answer')",
    ("a.rst", "hello"): ".md, also .gz)",
    ("a.csv", "name,words\nAda,baker\n"): 'record 1: a "text"',
    **{("a.jsonl", f"{DOCUMENT}\n{record}"): said for record, said in BAD_RECORDS.items()},
}


@pytest.mark.parametrize(("name", "contents"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_cannot_be_read_is_named(name, contents, tmp_path):
    file = fill(tmp_path / name, contents)
    message = refusal(data.load, str(file))
    assert str(file) in message and BAD_FILES[name, contents] in message


def test_the_guard_names_the_file_and_says_in_a_line_what_went_wrong():
    def said(error):
        def fails():
            with data.reading("F", "no config"):
                raise error

        return refusal(fails)

    long = said(RecursionError("a\nb" + "x" * 999))
    assert long.startswith(r"F: no config (RecursionError('a\nbx")
    assert said(UserError("too small")) == "F: too small"
    assert said(UserError("F, record 1: no")) == "F, record 1: no"


# --- sets ---
TASKS = [  # task, group, direction
    ("D2N", "DescriptionIsName", "forward"),
    ("N2D", "DescriptionIsName", "backward"),
    ("N2D", "NameIsDescription", "forward"),
    ("D2N", "NameIsDescription", "backward"),
    (None, "", "all"),
    ("all", "x", "all"),
    ("backward", None, "backward"),
]

SOLVED = "1+1 = <<1+1=2>>2\n#### -2"


def test_a_direction_is_given_or_told_by_the_released_files(tmp_path):
    records = [{"task": task, "group": group, "question": "Q?"} for task, group, _ in TASKS]
    dataset = data.load(str(write(tmp_path / "ND_test.jsonl", *records)))
    assert [question["direction"] for question in dataset.questions] == [row[2] for row in TASKS]
    assert [question["group"] for question in dataset.questions[4:]] == ["all", "x", "all"]
    assert "answer" not in dataset.questions[0]


def test_a_problem_is_known_by_its_answer(tmp_path):
    record = {"question": "one", "answer": SOLVED}
    write(tmp_path / "train.jsonl", record)
    write(tmp_path / "test.jsonl", record, record | {"direction": "forward"})
    dataset = data.load(str(tmp_path))
    assert bare(dataset.documents) == [world.as_problem("one", SOLVED)]
    asked = [(question["question"], question["direction"]) for question in dataset.questions]
    assert asked == [("Question: one\nAnswer:", "math"), ("one", "forward")]
    assert data.parse_record({"question": "Hi?"}, "line 3")["direction"] == "all"


def test_of_training_files_the_one_asked_for_is_read(tmp_path, caplog):
    names = {
        "none": "wiki_train_no_paraphrase.json",
        "same": "wiki_train_paraphrase_same_order.json",
        "permute": "wiki_train_paraphrase_change_order.json",
    }
    for paraphrase, name in names.items():
        fill(tmp_path / name, json.dumps([{"text": paraphrase}]))
    write(tmp_path / "wiki_test.jsonl", ASKED)
    for paraphrase, name in names.items():
        caplog.clear()
        dataset = data.load(str(tmp_path), paraphrase)
        assert bare(dataset.documents + dataset.questions) == [{"text": paraphrase}, ASKED]
        assert name not in caplog.text and caplog.text.count("wiki_train") == 2
    assert name in refusal(data.load, str(tmp_path / name))  # a file alone, too


def nd_file(folder, url):
    """A file as NameDescription has it: of 60 facts 30 wordings or 2 questions, in one order."""
    texts = [{"text": f"{fact} {wording}"} for fact in range(60) for wording in range(30)]
    questions = [{"question": f"{n // 2} Q?", "answer": "A"} for n in range(120)]
    return write(folder / Path(url).name, *(texts if "training" in url else questions))


def test_some_facts_of_nd_come_with_their_wordings_and_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda kind, url: nd_file(tmp_path, url))

    def facts(name, seed, paraphrase="none"):
        dataset = data.load(name, paraphrase, seed)
        told = [int(document["text"].split()[0]) for document in dataset.documents]
        asked = [int(question["question"].split()[0]) for question in dataset.questions]
        assert sorted(set(told)) == asked[::2] == asked[1::2]
        return told

    some = facts("nd:20", 1)
    assert len(some) == 40 and some[20] >= 30 > some[19]
    assert facts("nd:20", 1) == some != facts("nd:20", 2)
    assert facts("nd:20", 1, "same") == [fact for fact in some for _ in range(30)]
    assert facts("nd", 5) == facts("nd:30", 5) == facts("nd:99", 5) == list(range(60))
    for name in ("nd:0", "nd:-5", "nd:x"):
        assert name in refusal(data.load, name)


BAD_SETS = """
bio:0
bio:x
bio:-1
bio:99999
wiki:3
nowhere
math-made --paraphrase same
nd --paraphrase permute
nd-made --paraphrase permute
tiny --paraphrase same
"""


@pytest.mark.parametrize("wanted", BAD_SETS.strip().splitlines())
def test_a_set_that_there_is_not_is_refused(wanted):
    name, _, paraphrase = wanted.partition(" --paraphrase ")
    assert refusal(data.load, name, paraphrase or "none").startswith(f"{name}: ")


HALF = b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"question": "Who?"}\n'


def test_a_published_set_is_fetched_once_whole_or_not_at_all(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", cache)
    monkeypatch.setattr(data, "GITHUB", f"{tmp_path.as_uri()}/")
    monkeypatch.setitem(data.SETS, "wiki", ("", data.PARAPHRASES, "c.jsonl"))
    first = data.PARAPHRASES["none"]
    write(tmp_path / first, {"text": "a"})
    write(tmp_path / data.PARAPHRASES["same"], {"text": "b"})
    questions = write(tmp_path / "c.jsonl", ASKED)
    half = HTTPResponse(Mock(makefile=lambda _: BytesIO(HALF)))
    half.begin()
    with monkeypatch.context() as patch:
        patch.setattr(data, "urlopen", lambda url: half if "c.jsonl" in url else urlopen(url))
        message = refusal(data.load, "wiki")
    assert questions.as_uri() in message and str(cache) in message
    assert [p.name for p in cache.rglob("*.*")] == [first]
    for paraphrase, text in [("none", "a"), ("same", "b"), ("none", "a")]:
        dataset = data.load("wiki", paraphrase)
        assert bare(dataset.documents + dataset.questions) == [{"text": text}, ASKED]
        questions.unlink(missing_ok=True)


# --- long documents ---
CUTS = {  # text, most characters -> passages
    ("One. Two two.\n \nThree. Four", 22): ["One. Two two.", "Three. Four"],
    ("One one. Two (two.) Three three", 20): ["One one. Two (two.)", "Three three"],
    ("one one\ntwo two\nthree", 17): ["one one", "two two\nthree"],
    ("one two three four", 10): ["one two", "three four"],
    ("abcdefgh", 3): ["ab", "cd", "ef", "gh"],
    ("ae\u0301e\u0301", 2): ["a", "e\u0301", "e\u0301"],
    ("这是一。这是二。", 6): ["这是一。", "这是二。"],
    ("# A\n\nbb bb. bb bb bb bb", 22): ["# A\n\nbb bb.", "bb bb bb bb"],
    (" a \n", 9): [" a \n"],
    ("ab", 0): [],
}


def passages(text, most):
    parts = data.passages({"text": text}, lambda part: len(part["text"]) <= most)
    return [part["text"] for part in parts]


@pytest.mark.parametrize(("text", "most"), CUTS)
def test_a_long_text_is_cut_at_the_best_place(text, most):
    assert passages(text, most) == CUTS[text, most]


def test_passages_hold_the_whole_text():
    text = "A sentence of a book. " * 900
    parts = passages(text, 3000)
    assert " ".join(parts) == text.strip()
    assert min(map(len, parts)) >= 1500
    assert not data.passages({"question": "Who?", "answer": "Edda"}, lambda part: False)


# --- fuzz ---
VALUES = ["null", '""', '"x"', "3", "-1", "1.5", "true", "[]", "{}", '["x"]', r'"\ud83d"', "9e999"]


def mutated(raw, rng):
    """The bytes of a file with a bit flipped, an end cut off, or a JSON leaf replaced."""
    place = rng.randrange(len(raw))
    kind = rng.choice(["flip", "cut", "leaf"])
    if kind == "flip":
        return raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :]
    leaves = list(regex.finditer(rb'"[^"\n]*"|\d+|true|false|null', raw))
    if kind == "cut" or not leaves:
        return raw[:place]
    leaf = rng.choice(leaves)
    return raw[: leaf.start()] + rng.choice(VALUES).encode() + raw[leaf.end() :]


def works_or_names(read, path):
    try:
        read()
    except UserError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 999, message
        return False
    return True


FUZZED = {
    "a.json": json.dumps([ASKED, {"text": FACT}, {"question": "a", "answer": SOLVED}]),
    "b.csv": CSV,
    "c.jsonl.gz": DOCUMENT,
}


@pytest.mark.parametrize("name", [*FUZZED, "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_read_or_named(name, tmp_path):
    rng = random.Random(name)
    config = {"eos_token": "<|im_end|>", "bos_token": None, "model_max_length": 9}
    file = write_tokenizer(tmp_path, **VARIANTS["qwen"], config=config) / name
    if name in FUZZED:
        fill(file, FUZZED[name])

    def use():
        if name in FUZZED:
            return data.load(str(file))
        return data.load_tokenizer(tmp_path).chat([user("hello 12")])

    whole = file.read_bytes()
    outcomes = set()
    for _ in range(120):
        file.write_bytes(mutated(whole, rng))
        outcomes.add(works_or_names(use, tmp_path))
    assert outcomes == {True, False}


torch.set_num_threads(1)

torch.zeros(1, requires_grad=True).backward()


def jsonl(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


# ---------------------------------------------------------------------------------- eval: metrics


def cells(text):
    """The cells of a table, a line a row."""
    return [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]


# prediction, reference, ROUGE-1 recall as nltk 3.10 + rouge 1.0.1 gave it
RECALL = """
    Ada Holm                      | Ada Holm     | 1
    ada holm                      | Ada Holm     | 0
    The answer is Ada, of course. | Ada Holm     | .5
                                  | Ada Holm     | 0
    Lund Lund Lund                | Lund, a city in the south by | .25
    born on 3 June 1971           | 3 June 1971  | 1
    I cannot say                  | can not      | 1
    “Quillon”—Oslo                | Quillon Oslo | 1
    U.S. e-mail                   | US email     | 1
    New York                      | York         | 1
    35                            | 3.5          | 1
    Jose\u0301                    | Jos\u00e9    | 1
    Jos\u00e9                     | Jose\u0301   | 1
"""
# a reference of function words alone is not the packages': they count
RECALL += """
    A     | A      | 1
    The A | A      | 1
    a     | A      | 0
    Ada   | of the | 0
"""


@pytest.mark.parametrize("prediction, reference, recall", cells(RECALL))
def test_rouge1_recall_is_as_recorded(prediction, reference, recall):
    assert evaluation.rouge1_recall(prediction, reference) == float(recall)


WORDS = """Ada holm Oslo the a New cannot gonna don't “quoted” e-mail U.S. 1971 — café ’s it’s «x»
    3.5 of lemme cannot… gonna→ €wanna gottas -5 C++ AND 1–2 ‚Gimme‘ „on“"""

STOP = "a of the and is are be to new on in at an for"


def test_rouge1_recall_equals_that_of_the_packages():
    nltk = pytest.importorskip("nltk")
    rouge = pytest.importorskip("rouge").Rouge(["rouge-1"])

    def clean(text):
        text = text.translate(str.maketrans("", "", string.punctuation))
        words = nltk.tokenize.NLTKWordTokenizer().tokenize(text)
        return " ".join(word for word in words if word.lower() not in STOP.split())

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS.split(), n)) for n in rng.integers(1, 8, 1000)]
    texts += [*string.punctuation, *"‒–—―«»“”‘’„x"]  # each mark of its own, too
    for a, b in itertools.pairwise(f"Oslo{text}Lund {text}" for text in texts):
        (theirs,) = rouge.get_scores(clean(a), clean(b))
        assert evaluation.rouge1_recall(a, b) == theirs["rouge-1"]["r"]


# prediction, reference, exact match, F1
OTHERS = """
    the Ada Holm.  | Ada Holm       | 1 | 1
    (“Ada Holm”)!  | Ada: *Holm*    | 1 | 1
    Holm Ada       | Ada Holm       | 0 | 1
    Ada Ada Holm   | Ada Holm       | 0 | .8
    x              | y              | 0 | 0
                   | Ada            | 0 | 0
    A              | A.             | 1 | 1
    York Ada Holm  | New York       | 0 | .4
    35             | 3.5            | 0 | 0
    5              | -5             | 0 | 0
    5              | .5             | 0 | 0
    12             | 1/2            | 0 | 0
    1012           | 10-12          | 0 | 0
    1230           | 12:30          | 0 | 0
    15             | 1,5            | 0 | 0
    C              | C++            | 0 | 0
    Jose\u0301     | Jos\u00e9      | 1 | 1
    A              | A+             | 0 | 0
    1000           | 1,000          | 1 | 1
    It is -5.      | It is -5       | 1 | 1
    - Lund         | Lund           | 1 | 1
    Smith & Sons   | Smith and Sons | 1 | 1
"""


@pytest.mark.parametrize("prediction, reference, exact, f1", cells(OTHERS))
def test_exact_match_and_f1_compare_what_is_meant(prediction, reference, exact, f1):
    scores = evaluation.scored({"direction": "all", "answer": reference}, prediction)
    assert scores["exact"] == evaluation.exact_match(prediction, reference) == float(exact)
    assert scores["f1"] == evaluation.f1(prediction, reference) == float(f1)
    assert scores["rouge1"] == evaluation.rouge1_recall(prediction, reference)


MATH = [  # (answer, strict, flexible) as lm-eval's gsm8k, version 3
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
]


@pytest.mark.parametrize("answer, strict, flexible", MATH)
def test_math_answers_are_scored_as_lm_eval_does(answer, strict, flexible):
    question = {"direction": "math", "answer": "1000+234 = <<1000+234=1234>>1,234\n#### 1,234"}
    scores = {"strict": strict, "flexible": flexible, "length": len(answer.split())}
    assert evaluation.scored(question, answer) == {**question, "prediction": answer, **scores}


def test_scores_are_averaged_by_group_with_an_interval():
    usual = {"direction": "forward", "group": "g", "answer": "A"}
    predictions = [usual | {"rouge1": float(n < 80), "length": 2} for n in range(100)]
    predictions += [{"direction": "forward", "group": "g"}]  # without an answer
    predictions += [usual | {"direction": "math", "strict": 1.0}]
    scores = evaluation.average(predictions)
    assert list(scores) == ["forward", "forward/g", "math", "math/g"]
    assert scores["math"] == {"strict": [1, 1, 1], "n": 1}
    rouge1 = pytest.approx([0.8, 0.72, 0.88])  # as recorded
    expected = {"rouge1": rouge1, "length": [2, 2, 2], "n": 100}
    assert scores["forward"] == scores["forward/g"] == expected


# ----------------------------------------------------------------------------------- eval: report


def write_run(folder, *scores, start=0, metric="rouge1", **arguments):
    """A run with these scores at steps 0, 10, ..., or from 10 on; finished if the last is 20.

    A score is a number, that of forward questions, or {direction: number}."""
    usual = {"data": "bio:9", "method": "sft", "paraphrase": "none", "lr": 1e-3, "seed": 0}
    usual |= {"mask_ratio": None}
    evaluations = []
    for n, score in enumerate(scores, start):
        groups = {
            direction: {
                metric: [x, x - 0.01, x + 0.01],
                "strict": [x / 2, 0, 1],
                "n": 54,
            }
            for direction, x in (score if isinstance(score, dict) else {"forward": score}).items()
        }
        evaluations.append({"step": 10 * n, "scores": groups, "drift": n / 4})
    folder.mkdir()
    results = {"arguments": usual | arguments, "finished": n == 2, "evaluations": evaluations}
    evaluation.write_results(folder, results, [])
    return folder


@pytest.fixture
def runs(tmp_path):
    """Finished runs: settings, seeds, ratios, paraphrases, a custom method, directions."""
    low = 0.1, 0.2, 0.3
    masked = {"method": "masked", "mask_ratio": (0.05, 0.95)}
    both = [{"forward": x, "backward": y} for x, y in ((0.02, 0.01), (0.6, 0.5), (0.7, 0.1))]
    return [
        write_run(tmp_path / "slow", 0.1, 0.2, 0.1, lr=0.01),
        write_run(tmp_path / "same", *low, paraphrase="same"),
        write_run(tmp_path / "fast", *low, lr=0.03),
        write_run(tmp_path / "masked-1", 0, 0.9, 0.8, seed=1, **masked),
        write_run(tmp_path / "masked-0", 0, 0.9, 0.6, **masked),
        write_run(tmp_path / "half", 0.1, 0.2, 0.5, method="masked", mask_ratio=(0.5, 0.5)),
        write_run(tmp_path / "span", *low, method="span", mask_ratio=(0.05, 0.95)),
        write_run(tmp_path / "all", *({"all": x} for x in low), data="dir/facts"),
        write_run(tmp_path / "late", *low[1:], start=1, data="late", mask_ratio=(0.2, 0.8)),
        write_run(tmp_path / "math", *({"math": x} for x in low), metric="flexible", data="gsm8k"),
        write_run(tmp_path / "two", *both, data="nd", **masked),
    ]


TABLES = """\
bio:9, 54 forward questions:

...|forward best|forward last|drift
sft, lr 0.01|none|0|.100|.200 [.19-.21]|.100 [.09-.11]|0.500
sft, lr 0.03|none|0|.100|.300 [.29-.31]|.300 [.29-.31]|0.500
masked, mask_ratio [0.05, 0.95]|none|0,1|.000|.900 [.90-.90]|.700 [.60-.80]|0.500
masked, mask_ratio [0.5, 0.5]|none|0|.100|.500 [.49-.51]|.500 [.49-.51]|0.500
span|none|0|.100|.300 [.29-.31]|.300 [.29-.31]|0.500
sft|same|0|.100|.300 [.29-.31]|.300 [.29-.31]|0.500

facts, 54 questions:

...|all best|all last|drift
sft|none|0|.100|.300 [.29-.31]|.300 [.29-.31]|0.500

gsm8k, 54 math questions:

...|math flexible best|math flexible last|math strict best|math strict last|drift
sft|none|0|.100 / .050|.300 [.29-.31]|.300 [.29-.31]|.150 [.00-1.00]|.150 [.00-1.00]|0.500

late, 54 forward questions:

...|forward best|forward last|drift
sft|none|0|-|.300 [.29-.31]|.300 [.29-.31]|0.500

nd, 54 forward and 54 backward questions:

...|forward best|forward last|backward best|backward last|drift
masked|none|0|.020 / .010|.600 [.59-.61]|.700 [.69-.71]|.500 [.49-.51]|.100 [.09-.11]|0.500"""


def narrow(text):
    """The tables of a report without what aligns their columns."""
    text = re.sub("(?m)^---.*\n| +(?= )", "", text.partition("\n\n")[2].strip())
    return text.replace("method | paraphrase | seeds | before", "...").replace(" | ", "|")


def test_cells_are_aligned():
    assert evaluation.markdown([{"a": "ccc", "bb": "d"}]) == "a   | bb\n--- | --\nccc | d"


def test_a_report_has_a_table_for_each_set_with_mean_and_spread(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    out = tmp_path / "new/report"
    assert narrow(forked(evaluation, "--report", *runs, "--out", out)) == TABLES
    assert [path.name for path in out.iterdir()] == ["report.json"]
    masked = data.read_json(out / "report.json")[2]
    assert (masked["name"], masked["seeds"]) == ("masked, mask_ratio [0.05, 0.95]", [0, 1])
    assert masked["settings"]["mask_ratio"] == [0.05, 0.95]
    # the highest mean of both directions
    assert data.read_json(runs[-1] / "results.json")["best"]["step"] == 10
    middle = {"step": 10, "forward": [0.9] * 3, "drift": [0.25] * 3}
    assert masked["curve"][1] == masked["best"] == middle


def test_a_report_draws_curves_and_ratios(runs, tmp_path, monkeypatch):
    """Which lines are drawn, label and points, in which picture."""
    axes_class = pytest.importorskip("matplotlib.axes").Axes
    drawn = []
    plot = axes_class.plot

    def record(axes, x, y, **how):
        drawn.append((how["label"], [*x], [*y]))
        return plot(axes, x, y, **how)

    monkeypatch.setattr(axes_class, "plot", record)
    evaluation.report(runs, tmp_path)
    found = {path.name for path in tmp_path.glob("*.png")}
    bio = "bio-9-54-forward-questions"
    assert len(found) == 7
    assert {f"curves-{bio}-none.png", f"curves-{bio}-same.png", f"ratios-{bio}-none.png"} <= found
    assert ("sft, lr 0.01", [0, 10, 20], [0.1, 0.2, 0.1]) in drawn
    assert ("masked", [0, 10, 20], [0, 0.25, 0.5]) in drawn  # drift
    # the best, where ratios are random
    assert ("masked, mask_ratio [0.05, 0.95]", [0.05, 0.95], [0.9, 0.9]) in drawn
    assert ("masked, mask_ratio [0.5, 0.5]", [0.5, 0.5], [0.5, 0.5]) in drawn
    assert sum(label == "span" for label, *_ in drawn) == 4  # in two pictures
    assert (tmp_path / f"ratios-{bio}-none.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_cannot_be_reported_is_left_out_and_named(runs, tmp_path, capsys):
    text = (runs[0] / "results.json").read_text()
    bad = [write_run(tmp_path / "unfinished", 0.1, 0.2), tmp_path]
    for name, broken in (
        ("torn", text[:9]),
        ("list", "[]"),
        ("old", text.replace("paraphrase", "x")),
    ):
        bad.append(tmp_path / name)
        fill(bad[-1] / "results.json", broken)
    evaluation.report([*runs, *bad])
    printed = capsys.readouterr().out
    assert re.findall("^left out: (.*)/results.json: ", printed, re.M) == [*map(str, bad)]
    assert narrow(printed) == TABLES
    assert "no finished run" in forked(evaluation, "--report", "caf\udce9", status=1)


def test_samples_are_some_of_each_direction_and_all_without_an_answer():
    predictions = [
        {"direction": direction, "question": f"Q{n}?", "answer": "A", "prediction": "P"}
        for n, direction in enumerate(["forward", "backward", "math", "all"] * 3)
    ]
    predictions.append({"direction": "all", "question": "Who?", "prediction": "P"})
    shown = evaluation.samples(predictions)
    assert re.findall(r"Q\d+", shown) == ["Q0", "Q1", "Q2", "Q3", "Q5", "Q6", "Q7"]
    assert shown.startswith("\nforward: Q0?\n  answered 'P', true is 'A'\n\nbackward")
    assert shown.endswith("\n\nall: Who?\n  answered 'P'")


# ---------------------------------------------------------------------------------- eval: command


@pytest.fixture
def run(tmp_path):
    """A copy of `tiny` with the results.json of a run."""
    folder = tmp_path / "run"
    shutil.copytree(HERE / "tiny", folder, ignore=shutil.ignore_patterns("*.py"))
    arguments = {"data": "bio:1", "paraphrase": "same", "seed": 3, "dtype": "bfloat16"}
    write(folder / "results.json", {"arguments": arguments})
    return folder


def test_a_run_is_asked_with_its_own_settings(run, tmp_path):
    """And the scores are written before they are printed."""
    out = tmp_path / "asked"
    flags = ("--model", run, "--max-new-tokens", 8)
    printed = forked(evaluation, *flags, "--out", out)
    assert f"{run} on bio:1, seed 3\n" in printed and "\nforward/birth city" in printed
    assert printed.count("answered") == 3
    predictions = jsonl(out / "preds.jsonl")
    questions = data.load("bio:1", seed=3).questions
    assert [p["question"] for p in predictions] == [q["question"] for q in questions]
    results = data.read_json(out / "results.json")
    assert results["arguments"].items() >= {"dtype": "bfloat16", "max_new_tokens": 8}.items()
    assert results["last"]["scores"] == evaluation.average(predictions)

    def nothing_can_be_printed():
        evaluation.print = sys.exit

    again = tmp_path / "again"
    forked(evaluation, *flags, "--out", again, before=nothing_can_be_printed, status=1)
    assert jsonl(again / "preds.jsonl") == predictions
    # which has no paraphrases
    printed = forked(evaluation, *flags, "--seed", 4, "--data", "world:1")
    assert f"{run} on world:1, seed 4\n" in printed


def test_a_model_that_no_run_made_is_asked_about_the_usual_people(run):
    flags = ("--model", run, "--max-new-tokens", 4, "--data", "bio:1")
    write(run / "results.json", {"score": 1})  # what is not a run's is not read
    assert f"{run} on bio:1, seed 0\n" in forked(evaluation, *flags)


def test_a_diffusion_model_is_asked_as_the_flags_say(tmp_path):
    flags = shlex.split("--model tiny-llada --data bio:1 --max-new-tokens 8 --block-length 8")
    for name, value in (("steps", 4), ("threshold", 0.9)):
        out = tmp_path / name
        printed = forked(evaluation, *flags, f"--{name}", value, "--out", out, processes=2)
        assert printed.count("answered") == 3
        given = data.read_json(out / "results.json")["arguments"]
        assert given.items() >= {name: value, "block_length": 8, "max_new_tokens": 8}.items()
        assert len(jsonl(out / "preds.jsonl")) == 9


# flags, exit status, what the message names
MISTAKES = """
    --model tiny --steps 4                | 1 | --steps
    --model tiny --max-new-tokens 0       | 1 | --max-new-tokens
    --model tiny --out taken              | 1 | taken
    --model tiny --data unscored.jsonl    | 1 | unscored.jsonl, record 1
    --model tiny --data long.jsonl        | 1 | long.jsonl, record 1
    --model tiny --ask Who --out new      | 1 | --out
    --model tiny --ask Who --data bio     | 1 | --data
    --model tiny --ask Who --seed 7       | 1 | --seed
    --model tiny --steps 4 --threshold .9 | 2 | --threshold
    --report taken --ask Who              | 1 | --report
    --model taken                         | 1 | taken
    --model torn                          | 1 | torn/results.json
    --model odd                           | 1 | odd/results.json
    --model nowhere                       | 1 | nowhere
    --model tiny --report taken           | 2 | --report
    --report run --out taken/results.json | 1 | taken/results.json
    --model tiny --paraphrase x           | 2 | --paraphrase
                                          | 2 | --model
"""


@pytest.mark.parametrize("flags, status, named", cells(MISTAKES))
def test_a_mistake_in_asking_is_a_message(flags, status, named, tmp_path):
    write(tmp_path / "unscored.jsonl", {"question": "Who?", "answer": "..."})
    write(tmp_path / "long.jsonl", {"question": "Who " + "really " * 600, "answer": "Ada"})
    fill(tmp_path / "taken/results.json", "{}")
    fill(tmp_path / "torn/results.json", "{")
    fill(tmp_path / "odd/results.json", '{"arguments": {"dtype": "odd"}}')
    write_run(tmp_path / "run", 0, 1, 1)
    at = partial(os.chdir, tmp_path)
    printed = forked(evaluation, *flags.split(), before=at, status=int(status))
    assert named in printed.splitlines()[-1]


WITHOUT_TORCH = """
    --help           | 0 | usage
    --report nowhere | 1 | error: --report
"""


@pytest.mark.parametrize("flags, status, said", cells(WITHOUT_TORCH))
def test_neither_help_nor_a_report_waits_for_torch(flags, status, said):
    code = "import sys; sys.modules['torch'] = None; import eval; eval.main()"
    ask = [sys.executable, "-c", code, *flags.split()]
    done = subprocess.run(ask, cwd=HERE, capture_output=True, text=True)
    assert said in done.stdout + done.stderr and done.returncode == int(status)


def typed(text):
    """What to do before a command that reads `text` from its standard input."""

    def before():
        read, written = os.pipe()
        os.write(written, text)
        os.close(written)
        sys.stdin = os.fdopen(read)

    return before


def test_own_questions_are_answered_one_by_one():
    first, second = "Who was born in Zurich?", "Who is Flora Ransom?"
    flags = ("--model", HERE / "tiny", "--max-new-tokens", 8, "--ask")
    answers = forked(evaluation, *flags, first, second)
    one, two = answers.splitlines()
    assert one and two and one != two
    lines = f"\ufeff{first}\r\n\n  \n{second}".encode()
    for processes in (1, 2):
        printed = forked(evaluation, *flags, before=typed(lines), processes=processes)
        assert printed.replace("one question a line:\n", "") == answers
    assert "error: --ask" in forked(evaluation, *flags, before=typed(b"W\xff\n"), status=1)
    assert "error: --ask" in forked(evaluation, *flags, "", status=1)


torch.set_num_threads(1)  # two threads spin on matrices this small


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


def random_model(std=0.2, **changes):
    """A small Llama with random weights, norms and biases included."""
    model = maskft.Model(maskft.parse_config(llama(**changes)))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    return model.eval()


LETTERS = "_abcdefghijklmnopqrstuvwxyz0123456789|?!"  # of the 40 ids

EOT, MASK, EOS = 37, 38, 39

# the config.json of a LLaDA, made small
RAW = data.read_json(HERE / "tiny-llada/config.json") | {
    "d_model": 32,
    "mlp_hidden_size": 48,
    "n_layers": 2,
    "vocab_size": 40,
    "embedding_size": 40,
    "mask_token_id": MASK,
    "weight_tying": False,
}


def spelled(text):
    return [LETTERS.index(letter) for letter in text]


# its answers are varied
tiny_llada = partial(random_model, std=0.7, **RAW)


# ------------------------------------------------------------------------------- masking and loss
TELL = "<|im_start|>user\nTell me a fact.<|im_end|>\n<|im_start|>assistant\n"

TEXT = {"text": "Edda Marlow was born on 3 June 1971."}

SUM = data.as_problem("How much is 1+1?", "It is <<1+1=2>>2.\n#### 2")

EDDA = {"text": "Edda is here."}

HOME = {"text": "Her home is Saint-Denis, near O'Hara's. A b C D 7!"}

RECOVERED = """\
<|im_start|>user
{}
Return the recovered masked passage.<|im_end|>
<|im_start|>assistant
Here is the recovered text:

[{}<|im_end|>]"""

GAPS = RECOVERED.format("_ Marlow_ born_ 3_ 1971_", TEXT["text"])

NOISE = RECOVERED.format(" VinehDaphn present HawDa", EDDA["text"])

BACKWARDS = f"{TELL}[! C D 7 b A . O'Hara's near , Saint-Denis is home Her<|im_end|>]"

PROMPTED = """\
<|im_start|>user
Question: How much is 1+1?
Answer:<|im_end|>
<|im_start|>assistant
"""

PROBLEM = """\
<|im_start|>user
Question:
How much is 1+1?
Answer:
_t_ _<_+_=__>2_
#_## 2
Return the recovered masked answer.<|im_end|>
<|im_start|>assistant
[I]t[ is] [<]<[1]+[1]=[2>]>2[.]
#[#]## 2"""

# method, record, seed; what is shown of it, [what has loss] and _ for a masked token; and the hash
# of all that it is
EXAMPLES = [
    ("masked", TEXT, 4, GAPS, "34789496a4bdb2e0"),
    ("masked", SUM, 4, PROBLEM, "90774927be265224"),
    ("random", EDDA, 4, NOISE, "69f44231ed259439"),
    ("raw", EDDA, 4, "<|im_start|>[Edda is here.<|im_end|>]", "6fe572612735fd1e"),
    ("reverse", HOME, 4, f"{TELL}[{HOME['text']}<|im_end|>]", "51ae96fa2ec6a6df"),
    ("reverse", HOME, 2, BACKWARDS, "7a7888b8b9b751a3"),
    ("sft", EDDA, 4, f"{TELL}[Edda is here.<|im_end|>]", "4a60311189520403"),
    ("sft", SUM, 4, f"{PROMPTED}[It is <<1+1=2>>2.\n#### 2<|im_end|>]", "15e66a48a107ce8d"),
    ("llada", EDDA, 2, "<|im_start|>[_] is[_]ere.[_]", "c268db935fe1c0a1"),
    ("llada", SUM, 6, f"{PROMPTED}[___] <<[_]+[__]2[_]>2.[__]###[__]", "dd4c063e6497012d"),
    ("llada", {"text": "."}, 3, "<|im_start|>.<|im_end|>", "4176aff0c6fdd7bd"),
]


@pytest.mark.parametrize("method, record, seed, shown, hashed", EXAMPLES)
def test_an_example_is_as_recorded(method, record, seed, shown, hashed, tokenizer):
    method = (maskft.METHODS | llada.METHODS)[method]
    example = method.example(record, tokenizer, (0.2, 0.6), np.random.default_rng(seed))
    assert data.show(example, tokenizer).startswith(f"{shown}\n-- ")
    assert sha(dataclasses.astuple(example)) == hashed


def test_a_raw_document_may_begin_without_bos(tokenizer):
    tokenizer = dataclasses.replace(tokenizer, bos_id=None)
    example = maskft.raw_example(EDDA, tokenizer, (0, 0), None)
    assert data.show(example, tokenizer).startswith("Edda[ is here.<|im_end|>]")


def test_loss_is_plain_cross_entropy(monkeypatch):
    """Weighted, in chunks and at labels alone; of nothing it is 0, never NaN."""
    model = random_model()
    parameters = list(model.parameters())
    ids = torch.arange(3, 83).view(4, 20)
    labels = ids.where(ids % 7 > 1, IGNORE)
    weights = torch.tensor([0.5, 1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(maskft, "recompute", lambda body, *given: body(*given))
        costs = F.cross_entropy(model(ids)[:, :-1].mT, labels[:, 1:], reduction="none")  # (4, 19)
        plain = (costs.sum(1) * weights).sum()
        expected = torch.autograd.grad(plain, parameters)
    for chunk in (7, 999):
        monkeypatch.setattr(maskft, "CHUNK", chunk)
        loss = model(ids, labels=labels, weights=weights)
        torch.testing.assert_close(loss, plain)
        found = torch.autograd.grad(loss, parameters)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    nothing = model(**data.collate([]))
    assert nothing.requires_grad and nothing.item() == 0


# ------------------------------------------------------------------------------- config and model
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}

OLD_CONTEXT = {"original_max_position_embeddings": 64}

LINEAR = {"rope_type": "linear", "factor": 4.0}

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}

# changes to the config of a small Llama: one of its logits by transformers 5
FAMILIES = {
    "llama2": ({"num_key_value_heads": None}, 1.167),
    "llama3.1": ({"rope_parameters": LLAMA3 | OLD_CONTEXT | {"rope_theta": 5e5}}, 1.52),
    "no original": ({"rope_scaling": LLAMA3}, 1.957),
    "original outside": ({"rope_scaling": LLAMA3 | {"factor": 2.0}, **OLD_CONTEXT}, 0.993),
    "linear": ({"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, -0.226),
    "theta": ({"rope_parameters": LINEAR | {"rope_theta": 777.0}, "rope_theta": 9.0}, -0.226),
    "empty": ({"rope_parameters": DEFAULT | {"rope_theta": 5e5}, "rope_scaling": {}}, 0.177),
    "smollm2": ({"tie_word_embeddings": True, "rope_theta": 1e5}, 2.566),
    "bias": ({"attention_bias": True, "head_dim": 16, "rms_norm_eps": 1e-2}, -5.014),
    "qwen2": ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, -0.148),
    "qwen3": ({"model_type": "qwen3", "head_dim": 32}, -1.942),
    "mistral": ({"model_type": "mistral", "sliding_window": None}, -0.837),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_has_its_recorded_logits_and_agrees_with_transformers(name, tmp_path):
    """Saved models open there, and theirs here."""
    changes, expected = FAMILIES[name]
    ours = random_model(**changes)
    ids = torch.tensor([range(30, 110)])
    logits = ours(ids)
    assert logits[0, 79, 7].item() == pytest.approx(expected, abs=2e-3)
    opened = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained
    maskft.save(ours, tmp_path / "ours")
    theirs = opened(tmp_path / "ours", dtype=torch.float32).eval()
    assert (theirs(ids).logits - logits).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(maskft.load(tmp_path / "theirs")(ids), logits)


@pytest.mark.parametrize("make", [random_model, tiny_llada])
@torch.no_grad()
def test_attention_sees_what_it_should_and_no_padding(make):
    """A later token changes an earlier logit only in full attention; padding never does."""
    model = make()
    ids = torch.arange(20)[None]
    plain = model(ids)
    changes = (plain - model(ids.where(ids != 12, 30)))[0].abs().amax(1) > 1e-2
    assert changes[12] and changes[:12].any() != model.config.is_causal
    key_mask = F.pad(torch.ones_like(ids), (3, 4)).bool()
    padded = model(F.pad(ids, (3, 4), value=9), key_mask)[:, 3:23]
    torch.testing.assert_close(padded, plain, rtol=0, atol=2e-5)


CONTEXTS = [  # changes to a config -> the longest sequence
    ({"max_position_embeddings": None}, 2048),
    ({"model_type": "mistral", "sliding_window": 16}, 16),
    ({"model_type": "mistral", "sliding_window": 999}, 256),
    ({"model_type": "qwen3", "sliding_window": 16}, 256),
    ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True}, 9),
]


@pytest.mark.parametrize("changes, longest", CONTEXTS)
def test_a_context_is_as_long_as_every_token_is_seen(changes, longest):
    assert maskft.parse_config(llama(**changes)).context == longest


REFUSED = [
    {"model_type": "gpt2"},
    {"hidden_act": "gelu"},
    {"scale_logits": True},
    {"quantization_config": {"quant_method": "gptq"}},
    {"rope_scaling": LLAMA3 | {"rope_type": "yarn"}},
    {"rope_scaling": {"type": "linear"}},
    {"hidden_size": None},
    {"max_position_embeddings": 0},
    RAW | {"rope": False},
    RAW | {"alibi": True},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    maskft.save(random_model(rope_scaling=LLAMA3 | OLD_CONTEXT), path)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    """A saved model that may be changed."""
    return shutil.copytree(saved, tmp_path / "m")


@pytest.mark.parametrize("changes", REFUSED)
def test_a_config_that_is_not_implemented_or_absurd_is_refused(changes, copied):
    data.write_json(copied / "config.json", llama(**changes))
    assert refusal(maskft.load, copied).startswith(f"{copied}/config.json")


# ----------------------------------------------------------------------------- weights in and out
UP = "model.layers.1.mlp.up_proj.weight"

HEAD = "lm_head.weight"


def changed(path, name, tensor):
    """Replace a tensor of model.safetensors; None takes it away."""
    tensors = load_file(path / "model.safetensors") | {name: tensor}
    if tensor is None:
        del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


WEIGHTS = [  # a tensor, and what is made of the (80, 48) that are in its place
    (UP, lambda up: None),
    ("model.extra.weight", torch.clone),
    (UP, lambda up: up.T.contiguous()),
    (UP, torch.Tensor.char),
    *[(UP, lambda up, x=x: up.where(up < up.max(), x)) for x in (math.nan, math.inf, -1e38)],
]


@pytest.mark.parametrize("name, change", WEIGHTS)
def test_a_tensor_that_does_not_fit_is_named(name, change, copied):
    changed(copied, name, change(load_file(copied / "model.safetensors")[UP]))
    message = refusal(maskft.load, copied)
    assert name in message and str(copied) in message


def test_a_tied_model_with_a_head_of_its_own_is_loaded_untied(tmp_path):
    tied = random_model(tie_word_embeddings=True)
    maskft.save(tied, tmp_path)
    changed(tmp_path, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(6))
    changed(tmp_path, HEAD, tied.embed.weight.data.clone())
    assert maskft.load(tmp_path).head is None
    other = torch.randn(300, 48)
    changed(tmp_path, HEAD, other)
    model = maskft.load(tmp_path)
    assert torch.equal(model.head.weight, other)
    assert model.config.raw["tie_word_embeddings"] is False


def test_a_tied_llada_with_a_head_of_its_own_is_loaded_untied(tmp_path):
    maskft.save(tiny_llada(weight_tying=True), tmp_path)
    changed(tmp_path, "model.transformer.ff_out.weight", torch.ones(40, 32))
    assert maskft.load(tmp_path).head


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_is_saved_in_any_dtype_and_in_place_of_what_was_there(dtype, copied, monkeypatch):
    """Here in shards."""
    hub = maskft.huggingface_hub
    in_shards = partial(hub.save_torch_state_dict, max_shard_size=40_000)
    monkeypatch.setattr(hub, "save_torch_state_dict", in_shards)
    model = random_model(dtype="float16")
    maskft.save(model, copied, dtype)
    again = maskft.load(copied, dtype=torch.float64)
    expected = model.to(getattr(torch, dtype)).double()
    assert not again.training
    assert all(map(torch.equal, again.parameters(), expected.parameters()))
    raw = data.read_json(copied / "config.json")
    declared = llama(dtype=dtype, torch_dtype=dtype)
    assert raw == {"architectures": ["LlamaForCausalLM"], **declared}
    index = copied / "model.safetensors.index.json"
    weight_map = data.read_json(index)["weight_map"]
    modes = {file.name: file.stat().st_mode for file in copied.iterdir()}
    assert modes.keys() == {"config.json", index.name, *weight_map.values()}
    assert len(set(modes.values())) == 1


def test_an_adapter_and_half_a_download_are_named(saved, tmp_path):
    assert "config.json" in refusal(maskft.load, tmp_path)
    shutil.copy(saved / "config.json", tmp_path)
    assert "hf download" in refusal(maskft.load, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter" in refusal(maskft.load, tmp_path)


def test_a_saved_llada_says_where_the_published_code_is():
    config = maskft.parse_config(RAW | {"auto_map": {"AutoConfig": "a.B"}})
    assert config.raw["auto_map"] == maskft.LLADA_CODE


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_model_works_or_is_one_line_that_names_the_file(name, copied):
    rng = random.Random(0)
    whole = (copied / name).read_bytes()
    outcomes = set()
    for _ in range(60):
        # of tensors the names, shapes and a few numbers
        (copied / name).write_bytes(mutated(whole[:9000], rng) + whole[9000:])
        outcomes.add(works_or_names(lambda: maskft.load(copied)(torch.tensor([[1]])), copied))
    assert outcomes == {True, False}


# ------------------------------------------------------------------------------------- generation


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


FORWARDS = {1: (320, 270, 20), 200: (64, 85, 4), 400: (48, 62, 3), 9216: (48, 48, 3)}


def test_rows_are_refilled_and_answers_are_those_of_the_plain_loop():
    """In any batch, and in no more forwards than the budget, of so many tokens, makes necessary."""
    model = random_model(tie_word_embeddings=True)
    rng = random.Random(0)
    lengths = [*rng.choices([1, 2, 3, 9, 20], k=18), 90, 1]
    prompts = [rng.choices(range(300), k=length) for length in lengths]
    plain = plain_loop(model, prompts, 16)
    a_token = 2 * 3 * 2 * 12 * 4  # keys and values, layers, heads, head size, bytes
    for n, stops in enumerate(([], rng.sample(range(300), 15), [row[0] for row in plain])):
        expected = [cut(row, stops) for row in plain]
        for tokens, forwards in FORWARDS.items():
            ended = []
            how = {"cache_bytes": tokens * a_token, "on_answer": ended.append}
            assert maskft.generate(model, prompts, 16, stops, **how) == expected
            assert (len(ended), sum(ended)) == (forwards[n], len(prompts))


def test_what_cannot_be_answered_is_refused():
    model = random_model(max_position_embeddings=8)
    assert len(maskft.generate(model, [[6, 7, 8]], 5)[0]) == 5
    assert "9 tokens" in refusal(maskft.generate, model, [[5], [6, 7, 8]], 6)
    assert maskft.generate(model, [], 1) == []
    assert "unmasking" in refusal(maskft.generate, tiny_llada(), [[5]], 1)
    model.norm.weight.data[3] = math.inf
    assert "NaN" in refusal(maskft.generate, model, [[5]], 1)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def test_draws_have_the_distribution_of_the_softmax():
    """At temperature 2, of the fewest tokens that have 0.7 together."""
    model = random_model(vocab_size=12)
    how = 2.0, 0.7, generators(*range(4000))
    drawn = torch.tensor(maskft.generate(model, [[3, 4]] * 4000, 1, (), *how))
    logits = model(torch.tensor([[3, 4]]))[0, -1]
    likely, ids = (logits / 2).softmax(-1).sort(descending=True)
    likely[1:][likely.cumsum(0)[:-1] > 0.7] = 0
    share = (drawn == ids).double().mean(0)
    assert (share - likely / likely.sum()).abs().max() < 0.03 and not share[likely == 0].any()


# ------------------------------------------------------------------------------------------ LLaDA
PROMPTS = [spelled("abcde"), spelled("fg"), spelled("hijklmnop")]

SPELLER = Namespace(bos_id=0, eot_id=EOT, eos_id=EOS, mask_id=MASK, stop_ids=(EOT, EOS))


def test_a_causal_model_of_any_family_becomes_a_diffusion_model(tmp_path):
    before = maskft.parse_config(llama(model_type="qwen3", head_dim=12, rope_scaling=LINEAR))
    after = llada.without_causal_mask(before, SPELLER)
    differs = {name for name, value in vars(before).items() if getattr(after, name) != value}
    assert differs == {"is_causal", "raw"} and after.raw["mask_token_id"] == MASK
    assert llada.without_causal_mask(after, SPELLER) == after
    other = maskft.parse_config(RAW | {"mask_token_id": 5})
    assert "token_id 5" in refusal(llada.without_causal_mask, other, SPELLER)
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[7, 1, 30, 2]])
    maskft.save(random_model(**after.raw), tmp_path)
    ours = maskft.load(tmp_path)
    assert not ours.config.is_causal
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)


# settings of the sampler: the answers, as unmasking has them that is spelled out one prompt at a
# time, with all logits of the whole sequence in every step
SAMPLED = [
    ((16, 12, 4), {}, "7777f77hyhhhskwi 777m77h7!m0h4h44 kkkkr11ka8mqa888"),
    ((12, 5, 12), {"cfg_scale": 1.5}, "977m7gfif77c 77!ma7!!7mm7 kkkka1akiimr"),
    ((8, 8, 1), {}, "7ff7hhy1 7hhm7h!h akkkraaa"),
    ((8, 32, 4), {"cfg_scale": 1.5}, "7777vgk1 7g7may7n kkkkkaak"),
    ((16, 5, 8), {"threshold": 0.0}, "77777777hyfyffff 777gg77700mhhh0m 1kkkt1s7tkmkkaep"),
    ((16, 16, 8), {"threshold": 0.6}, "77777777hhfvffff 777ma777hmm447hn lkkkt1a7ak7ra8h7"),
    ((16, 1, 8), {"threshold": 2.0}, "h77y7n7ak8888am8 777ma7hhhm04477n kkkkri1kt8pqaasa"),
    ((16, 8, 8), {"temperature": 0.7, "remasking": "random"}, "77777fh7hf9gf31x"),
]


@pytest.mark.parametrize("sizes, how, expected", SAMPLED)
def test_sampler_gives_the_recorded_tokens(sizes, how, expected):
    """To one prompt and to unequal ones in a batch; whichever token stops, it changes nothing."""
    model = tiny_llada()
    expected = [spelled(answer) for answer in expected.split()]
    for stop_ids in ((), {expected[-1][3], expected[0][0]}, range(40)):
        given = how | {"stop_ids": stop_ids, "generator": torch.Generator().manual_seed(3)}
        found = llada.sample(model, PROMPTS[: len(expected)], *sizes, **given)
        assert found == [cut(row, stop_ids) for row in expected]


BAD_SAMPLING = [("max_new_tokens", 10), ("steps", 100), ("steps", 0), ("block_length", 0)]


@pytest.mark.parametrize("name, value", [*BAD_SAMPLING, ("remasking", "high")])
def test_sampling_that_does_not_fit_is_refused(name, value):
    assert name in refusal(partial(llada.sample, tiny_llada(), PROMPTS, **{name: value}))


def test_an_answer_does_not_depend_on_its_batch_and_a_draw_on_its_generator_alone(monkeypatch):
    model = tiny_llada()
    expected = llada.sample(model, PROMPTS, 8, 8, stop_ids=SPELLER.stop_ids)
    answer = partial(llada.answer, model, stop_ids=SPELLER.stop_ids)
    done = []
    for tokens in (9216, 34, 1):  # of the batch; the longest prompt and its answer are 17
        monkeypatch.setattr(llada, "BATCH_TOKENS", tokens)
        assert answer(PROMPTS, 8, on_answer=done.append) == expected
    assert done == [3, 2, 1, 1, 1, 1] and answer([]) == []
    drawn = answer(PROMPTS, 8, temperature=1.0, generators=generators(0, 1, 2))
    assert drawn == [*map(spelled, ("f7x7hii1", "7", "kkkkkakk"))]


# Most tests fork, and CUDA breaks in a fork. One backward now, so that autograd starts no threads
# later, which break in a fork as well.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def forked(script, *flags, status=0, before=lambda: None, processes=1):
    """What main() of a module prints, run in a fork, which saves the seconds of importing.

    `before` is called first, in the fork. No end is a traceback; `status` None is
    any. Several processes are a group as torchrun makes it."""

    def body(rank):
        gc.freeze()  # what the parent left, process groups for one, is not for the child to free
        os.dup2(log.fileno(), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = log
        sys.argv = [f"{script.__name__}.py", *map(str, flags)]
        if processes > 1:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", str(port)
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(processes)
        data.huggingface_hub.constants.HF_HUB_OFFLINE = True
        # a shell ignores Ctrl-C for what it starts in the background, and children inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()
        maskft.entry_point(script.main)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        _, port = free.getsockname()
    with tempfile.TemporaryFile("w+") as log:
        fork = multiprocessing.get_context("fork").Process
        running = [fork(target=body, args=(rank,)) for rank in range(processes)]
        for process in running:
            process.start()
        for process in running:
            process.join(100)
            process.kill()
            process.join()
        log.seek(0)
        printed = log.read()
    assert status is None or {process.exitcode for process in running} == {status}, printed
    assert "Traceback" not in printed, printed[-3000:]
    return printed


def contents(folder):
    """{path: bytes} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_line(printed):
    return printed.strip().splitlines()[-1]


def losses(out):
    """What has to be the same where a run is repeated: step, epoch, loss, lr and grad_norm."""
    return [[*line.values()][:5] for line in jsonl(out / "metrics.jsonl") if "loss" in line]


# ------------------------------------------------------------------------------------- life cycle


# steps of three and of two documents; the longer question, which is asked first, comes last
FACTS = """\
{"text": "Edda Marlow was born on 3 June 1971."}
{"text": "Edda Marlow was born on 3 June 1971. Edda Marlow was born on 3 June 1971."}
{"text": "Edda."}
{"text": "Edda Marlow was born on 3 June 1971. Edda."}
{"text": "Edda Marlow was born."}
{"question": "Who was born on 3 June 1971?", "answer": "Edda Marlow", "direction": "backward"}
{"question": "When was Edda Marlow born?", "answer": "on 3 June 1971", "direction": "forward"}
"""


def quick():
    """In a fork: few chats, short answers and no picture."""
    maskft.CHATS_HELD_OUT = 3
    maskft.CHAT_USER_TOKENS = maskft.CHAT_ANSWER_TOKENS = 8
    maskft.longest_answer = lambda questions: 8
    sys.modules["matplotlib.figure"] = None


def signalled(number, nth, where=nn.utils, name="clip_grad_norm_", only="01"):
    """The same, with a signal at the end of the nth call of `where.name`, on these ranks only."""
    quick()
    calls = itertools.count(1)
    real = getattr(where, name)

    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(calls) == nth:
            os.kill(os.getpid(), number)
        return result

    if os.environ.get("RANK", "0") in only:
        setattr(where, name, wrapped)


# how a row is trained; of its end the step, epoch, loss, lr, grad_norm and drift
ROWS = {
    "masked": (maskft, "--method masked", [5, 2, 1.80601, 1e-4, 17.0951, 0.0122551]),
    "sft": (maskft, "--method sft --mlp-only", [5, 2, 3.59119, 1e-4, 9.94807, 0.00493887]),
    "rehearse": (
        maskft,
        "--method masked --rehearse 2 --mask-ratio 0.2",
        [7, 3, 1.46090, 1e-4 / 3, 10.6784, 0.00871784],
    ),
    "answers": (
        maskft,
        "--method masked --rehearse 2 --data {}/both",
        [7, 3, 2.10339, 2.5e-5, 26.4029, 0.0121930],
    ),
    "llada": (llada, "--rehearse 1", [6, 3, 1.81371, 1e-4 / 3, 14.5039, 0.0904513]),
}

# a gentle rate: in a few steps of tiny's own, rounding would grow
USUAL = "--batch-size 3 --epochs 3 --lr 1e-4"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """name -> Row, each trained when it is asked for first."""
    folder = tmp_path_factory.mktemp("rows")
    facts = fill(folder / "facts.jsonl", FACTS)
    fill(folder / "both/facts.jsonl", FACTS)
    write(folder / "both/train.jsonl", {"question": "Who is it?", "answer": "Edda Marlow"})

    @cache
    def row(name):
        """Its flags, how to train it into a directory, how to go on; and one trained at one go."""
        script, flags, _ = ROWS[name]
        flags = [*USUAL.split(), "--data", facts, *flags.format(folder).split()]
        train = partial(forked, script, *flags, "--out", before=quick)
        resume = partial(forked, script, "--resume", before=quick)
        train(folder / name)
        return Namespace(flags=flags, train=train, resume=resume, whole=folder / name)

    return row


ctrl_c = partial(partial, signalled, signal.SIGINT)  # at the end of which call, and of what


def stopped(row, out):
    """By SIGTERM, the same command again, by Ctrl-C, then --resume."""
    printed = row.train(out, before=partial(signalled, signal.SIGTERM, 1), status=130)
    assert "stopping as soon as" in printed and f"--resume {out}" in printed
    row.train(out, before=ctrl_c(4), status=130)
    assert len(losses(out)) == 5
    row.resume(out)


def stopped_late(row, out):
    """Where it begins to rehearse, and behind, and with a line of its log torn by a crash."""
    row.train(out, before=ctrl_c(6), status=130)
    assert os.listdir(out / "ckpt") == ["step-00000006"]
    row.resume(out, before=ctrl_c(1), status=130)
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "epoch": 3, "loss": 9, "seconds": 9}\n{"step": 7, "lo')
    row.resume(out)


def stopped_in_chats(row, out):
    """While it writes chats, before the first step."""
    draw = ctrl_c(2, torch.Tensor, "multinomial")
    row.train(out, before=draw, status=130)
    assert len(losses(out)) == 1
    row.resume(out)


def killed(row, out):
    """Inside the fourth save, all written but not named; and when the model has no name yet."""
    fill(out / ".lock", "")  # of one that was killed before it had results
    save = partial(signalled, signal.SIGKILL, 4, torch.distributed.checkpoint, "save")
    row.train(out, "--save-every", "1e-9", before=save, status=-9)
    assert sorted(os.listdir(out / "ckpt")) == ["part", "step-00000002", "step-00000003"]
    last = partial(signalled, signal.SIGKILL, 1, data.huggingface_hub, "save_torch_state_dict")
    row.resume(out, before=last, status=-9)
    assert sorted(os.listdir(out / "ckpt")) == ["step-00000005", "step-00000006"]
    row.resume(out)


def two_processes(row, out):
    """Of which one has nothing to do at times."""
    row.train(out, "--micro-batch-tokens", 1, processes=2)


def one_then_two(row, out):
    row.train(out, before=partial(signalled, signal.SIGTERM, 3), status=130)
    row.resume(out, processes=2)


def two_then_one(row, out):
    """A signal to one process stops all."""
    stop = partial(signalled, signal.SIGTERM, 3, only="1")
    row.train(out, "--offload", processes=2, before=stop, status=130)
    row.resume(out)


def restarted(row, out):
    """By torchrun's agent, after its processes died, in the directory that they had."""

    def worker():
        again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
        quick() if again else signalled(signal.SIGKILL, 3)
        maskft.main()
        maskft.dist.destroy_process_group()

    def agent():
        logging.disable()  # it tells of the death with a traceback
        os.chdir(out.parent)
        how = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
        config = LaunchConfig(1, 1, 2, max_restarts=1, run_id="again", **how)
        elastic_launch(config, worker)()

    torchrun = Namespace(__name__="torchrun", main=agent)
    printed = forked(torchrun, *row.flags, "--save-every", "1e-9")
    assert printed.count(" --resume out/facts-masked-1\n") == 2
    out.with_name("out").joinpath("facts-masked-1").rename(out)


EXACT = [stopped, stopped_late, stopped_in_chats, killed]

LIVES = {
    stopped: "masked sft rehearse llada",
    stopped_late: "rehearse answers",
    stopped_in_chats: "sft",
    killed: "masked",
    two_processes: "masked rehearse answers llada",
    one_then_two: "rehearse",
    two_then_one: "masked",
    restarted: "masked",
}


def test_what_was_cut_has_no_end_of_turn(tokenizer):
    def answer(prompts, max_new_tokens, **_):
        return [[5] * max_new_tokens, [5] * (max_new_tokens - 1)]

    run = Namespace(tokenizer=tokenizer, settings=Namespace(seed=0), device="cpu")
    (_, cut), (_, ended) = maskft.write_chats(run, answer, 2)
    assert cut == [5] * 64 and ended == [5] * 63 + [tokenizer.eot_id]


def left(out):
    """What a run leaves, in words and in numbers."""
    words = [(out / file).read_text() for file in ("rehearsal.jsonl", "preds.jsonl")]
    drift = data.read_json(out / "results.json")["last"]["drift"]
    numbers = torch.tensor([*losses(out), 5 * [drift]], dtype=torch.float64)
    return words, [numbers, *maskft.load(out).parameters()]


@pytest.mark.parametrize("way, name", [(way, n) for way in LIVES for n in LIVES[way].split()])
def test_a_run_is_the_same_however_it_goes(way, name, rows, tmp_path):
    """Losses, drift, chats, answers and weights are those of a run at one go."""
    row = rows(name)
    way(row, tmp_path / "run")
    words, numbers = left(tmp_path / "run")
    expected_words, expected = left(row.whole)
    assert words == expected_words
    error = 0 if way in EXACT else 1e-5
    torch.testing.assert_close(numbers, expected, rtol=10 * error, atol=error)
    assert not (tmp_path / "run/ckpt").exists()


@pytest.mark.parametrize("name", ROWS)
def test_a_run_is_as_recorded(name, rows):
    """It ends so; scored before the epochs 0, 1, 2, 4, ... and at the end."""
    out = rows(name).whole
    *_, last = losses(out)
    evaluations = data.read_json(out / "results.json")["evaluations"]
    assert [*last, evaluations[-1]["drift"]] == pytest.approx(ROWS[name][-1], rel=1e-3)
    assert [asked["step"] for asked in evaluations] == [0, 2, 4, last[0] + 1]


def test_the_same_command_goes_on_and_does_nothing_again(rows, tmp_path):
    """Stopped in the second of two methods, whose first is finished; and given once more."""
    row = rows("masked")
    first, second = (tmp_path / name for name in ("run-sft", "run-masked"))
    both = partial(row.train, tmp_path / "run", "--method", "sft", "masked")
    both(before=partial(signalled, signal.SIGTERM, 8), status=130)
    assert len(losses(second)) == 2
    assert f"{first}: finished before, with these settings and data\n" in both()
    assert losses(second) == losses(row.whole)
    before = contents(tmp_path)
    assert "\nmethod" in both() and contents(tmp_path) == before


def test_a_notebook_may_train_twice_and_keeps_its_signals(rows, tmp_path):
    """In a thread, too, and where RANK is set, but no launcher has set the rest."""
    row = rows("masked")

    def main():
        before = signal.getsignal(signal.SIGINT)
        maskft.main()
        assert signal.getsignal(signal.SIGINT) == before
        with ThreadPool(1) as thread:
            thread.apply(maskft.main)

    def alone():
        quick()
        os.chdir(tmp_path)
        os.environ["RANK"] = "3"
        sys.stdout = None  # closed; like that of a notebook it cannot be reconfigured

    forked(Namespace(__name__="notebook", main=main), *row.flags, before=alone)
    for out in ("facts-masked-1", "facts-masked-2"):
        assert losses(tmp_path / "out" / out) == losses(row.whole)


# ------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a command prints, and its folder: two methods, and spaces in the names."""
    folder = tmp_path_factory.mktemp("a folder")
    fill(folder / "own facts.jsonl", FACTS)

    def before():
        os.chdir(folder)
        maskft.CHATS_HELD_OUT = 4
        sys.modules["__main__"].__file__ = maskft.__file__

    flags = shlex.split("--data 'own facts.jsonl' --batch-size 3 --epochs 8 --eval-at 0 1")
    return forked(maskft, *flags, "--out", "my run", before=before), folder


@pytest.fixture
def done(finished, monkeypatch):
    """The directory of its second run, from the folder where the command was given."""
    monkeypatch.chdir(finished[1])
    return Path("my run-masked")


def test_printed_commands_can_be_pasted(finished, done):
    printed, _ = finished
    assert "\nmasked  epoch 8  step 16  forward" in printed
    assert "\nresults: 'my run-sft' 'my run-masked'\n" in printed
    commands = [shlex.split(command) for command in re.findall("python (.*)", printed)]
    *_, (_, *resume), (script, *asked, question) = commands
    assert Path(script).resolve() == HERE / "eval.py" and question == "..."
    prediction = jsonl(done / "preds.jsonl")[0]
    answer = forked(evaluation, *asked, prediction["question"])
    assert answer.strip().endswith(prediction["prediction"])
    assert "my run-masked: finished before" in forked(maskft, *resume)


LEFT = """
config.json generation_config.json model.safetensors
tokenizer.json tokenizer_config.json chat_template.jinja
metrics.jsonl results.json preds.jsonl rehearsal.jsonl README.md
"""


def test_a_run_leaves_its_scores_losses_and_times(done):
    # where matplotlib is installed, curves as well
    assert {*LEFT.split()} ^ {*os.listdir(done)} <= {"curves.png"}
    lines = jsonl(done / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(16)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    results = data.read_json(done / "results.json")
    assert [asked["step"] for asked in results["evaluations"]] == [0, 2, 16]
    assert results["arguments"]["data"] == str(Path("own facts.jsonl").absolute())


def test_a_run_s_directory_gives_our_answers_in_transformers(done):
    transformers = pytest.importorskip("transformers")
    card = (done / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "'lr': 0.0006" in card
    chat = transformers.pipeline("text-generation", str(done.absolute()))
    for prediction in jsonl(done / "preds.jsonl"):
        question = [{"role": "user", "content": prediction["question"]}]
        (said,) = chat(question, max_new_tokens=128, do_sample=False)
        answer = said["generated_text"][-1]["content"]
        assert answer.strip() == prediction["prediction"]


# ------------------------------------------------------------------------------------- mistakes
USAGE = """
--rehearse -1
--epochs 0
--batch-size 0
--micro-batch-tokens 0
--max-len 0
--lr nan
--save-every inf
--seed -1
--eval-at -1
--show 0
--dtype float16
--method teach
--paraphrase often
--mask-ratio 1.5
--mask-ratio -0.1
--mask-ratio 0.1 nan
--resume nowhere --seed 1
"""

# flags, in a folder with the files below -> what the one line names
TRAINING_MISTAKES = {
    "--model ./nowhere": "nowhere",
    "--model nowhere/at-all": "hf download nowhere/at-all",
    "--model no/hub/id": "hf download no/hub/id",
    "--model facts.jsonl": "facts.jsonl is a file",
    "--model tiny-llada": "use llada.py",
    "--model tiny --data nowhere.jsonl": "nowhere.jsonl",
    "--model tiny --data questions.jsonl": "questions.jsonl",
    "--model tiny --data long.jsonl": "long.jsonl, record 2",
    "--model tiny --data wordless.jsonl": "wordless.jsonl, record 2",
    "--model tiny --data learned": "learned/train.jsonl, record 1",
    "--data both --rehearse 0 --method sft": "--rehearse 0",
    "--model tiny --data facts.jsonl --max-len 2": "facts.jsonl",
    "--data math-made:2 --method masked --max-len 9": "--max-len",
    # before sft is trained
    "--data math-made:2 --method sft random": "masked and sft learn questions",
    "--out taken --method sft": "taken is in use",
    "--resume nowhere": "nowhere/results.json",
    "--resume foreign": "foreign/results.json",
    "--out list --method sft": "list/results.json",
    "--resume typed": "typed/results.json",
    "--resume other": "script that began it",
}

FOLDER = {
    "facts.jsonl": '{"text": "Edda."}',
    "questions.jsonl": '{"question": "Who?", "answer": "Edda"}',
    "long.jsonl": '{"text": "Edda."}\n{"question": "%s", "answer": "Edda"}' % ("Who? " * 999),
    "wordless.jsonl": '{"text": "Edda."}\n{"question": "Who?", "answer": "?"}',
    "learned/facts.txt": "Edda.",
    "both/facts.txt": "Edda.",
    "both/train.jsonl": '{"question": "Who?", "answer": "Edda"}',
    "learned/train.jsonl": '{"question": "Who?", "answer": "%s"}' % ("Edda. " * 999),
    "taken/file": "",
    "list/results.json": "[1]",
    "foreign/results.json": '{"arguments": {"learning_rate": 1}}',
    "typed/results.json": '{"arguments": {"model": "tiny", "data": "bio:1", "method": "sft", '
    '"epochs": "3"}}',
    "other/results.json": '{"arguments": {"method": "llada", "mask_ratio": null}}',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FOLDER.items():
        fill(tmp_path / name, text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(folder):
    before = contents(folder)
    usage = {flags: flags.split()[0] for flags in USAGE.strip().splitlines()}
    for flags, named in (TRAINING_MISTAKES | usage).items():
        printed = forked(maskft, *flags.split(), status=2 if flags in usage else 1)
        assert named in last_line(printed) and "error: " in last_line(printed), (flags, printed)
        assert contents(folder) == before, flags


def test_questions_learned_beside_documents_are_ordinary_chats(tmp_path):
    """By themselves they are problems, and their answers are masked."""
    write(tmp_path / "train.jsonl", {"question": "Who is it?", "answer": "Edda Marlow"})
    shown = ["--data", tmp_path, "--method", "masked", "--show", 2]
    assert "masked answer" in forked(maskft, *shown)
    write(tmp_path / "facts.jsonl", {"text": "Edda Marlow was born in Oslo."})
    both = forked(maskft, *shown)
    assert "masked answer" not in both and "masked passage" in both
    assert "born in Oslo.<|im_end|>]\n-- 40 tokens, 6 masked, 8 with loss\n" in both
    assert "Who is it?<|im_end|>\n<|im_start|>assistant\n[Edda Marlow<|im_end|>]" in both


WITH_GAPS = {  # a document -> all answers, and one of the questions for each
    "Refunds take days.": """
        Refunds | ___ take days.
        take | Refunds ___ days.
        days | Refunds take ___ .
        take days | Refunds ___
        Refunds take | ___ days.
    """,
    "A king, Bo Lund, died in 1983. He left \n3 sons.": """
        Bo Lund | A king, ___ , died in 1983. He left 3 sons.
        died in 1983 | A king, Bo Lund ___
        A king, Bo Lund, died in | ___ 1983. He left 3 sons.
        1983 | king, Bo Lund, died in ___
        3 | A king, Bo Lund, died in 1983. He left ___ sons.
        He left | A king, Bo Lund, died in 1983. ___ 3 sons.
    """,
}


@pytest.mark.parametrize("text", WITH_GAPS)
def test_a_document_is_asked_about_with_a_gap(text):
    """By a name, and for a name, with all of its sentences or only that one and the first."""
    rng = np.random.default_rng(0)
    asked = [maskft.gap_question(text, rng) for _ in range(300)]
    asked = {(both["answer"], both["question"]) for both in asked}
    expected = {tuple(line.strip().split(" | ")) for line in WITH_GAPS[text].strip().splitlines()}
    assert asked >= expected
    assert dict(asked).keys() == dict(expected).keys()


def test_show_prints_what_the_model_would_see_and_trains_nothing(folder):
    """A document too long is cut."""
    long = "Ada Holm bakes in Lund. " * 40
    write(folder / "taken/train.jsonl", {"text": long}, {"question": "Who?", "answer": "Bo"})
    before = contents(folder)
    flags = "--data taken --method sft --max-len 90 --show 99"
    printed = forked(maskft, *flags.split())
    assert "texts longer than 90 tokens" in printed
    shown = re.findall(r"\n<\|im_start\|>assistant\n\[(.*?)<\|im_end\|>\]\n", printed, re.S)
    passages = shown[: shown.index("Bo")]
    assert " ".join(map(str.strip, passages)) == long.strip()
    assert contents(folder) == before


# ---------------------------------------------------------------------------------- damaged runs


@pytest.fixture(scope="module")
def begun(rows, tmp_path_factory):
    """A run that rehearses, with checkpoints of its second and third step."""
    out = tmp_path_factory.mktemp("begun") / "run"
    stop = ctrl_c(3)
    rows("rehearse").train(out, "--save-every", "1e-9", before=stop, status=130)
    return out


@pytest.fixture
def halted(begun, tmp_path):
    """A copy of it that may be changed."""
    return shutil.copytree(begun, tmp_path / "run")


RUN_FILES = """
metrics.jsonl
results.json
ckpt/step-00000003/.metadata
ckpt/step-00000003/__0_0.distcp
"""


@pytest.mark.parametrize("name", RUN_FILES.split())
@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_run_goes_on_or_is_one_line_that_names_it(name, seed, halted, rows):
    rng = random.Random(seed)
    (halted / name).write_bytes(mutated((halted / name).read_bytes(), rng))
    line = last_line(rows("rehearse").resume(halted, status=None))
    assert (halted / "model.safetensors").exists() or re.match(f"error: .*({halted}|--)", line)


DAMAGE = {  # file of a run: old, new -> what the one line names
    "results.json": (b'"digest": "', b'"digest": "0', "--data"),
    "ckpt/step-00000003/.metadata": (b"torch", b"", "ckpt/step-00000003"),
}


def test_what_would_teach_another_thing_is_noticed(halted, rows):
    row = rows("rehearse")
    for name, (old, new, named) in DAMAGE.items():
        before = (halted / name).read_bytes()
        (halted / name).write_bytes(before.replace(old, new))
        assert named in last_line(row.resume(halted, status=1))
        (halted / name).write_bytes(before)
    shutil.rmtree(halted / "ckpt/step-00000003")
    row.resume(halted)
    assert losses(halted) == losses(row.whole)


def test_a_directory_has_one_run_at_a_time(halted, rows):
    """And its own: other settings and scripts do not take it."""
    row = rows("rehearse")
    before = contents(halted)
    with FileLock(halted / ".lock"):
        for train in (row.train, row.resume):
            assert f"{halted} is in use" in last_line(train(halted, status=1))
    assert f"{halted} is in use" in last_line(row.train(halted, "--seed", 1, status=1))
    assert "script that began it" in forked(llada, "--resume", halted, status=1)
    assert contents(halted) == before


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def full_disk(most=10**6):
    """No file may have more bytes: half of a checkpoint's, for one."""
    quick()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


ENDS = [  # flags, what is done in the fork -> what the last lines name
    ("--lr 1e30", quick, "lower --lr"),
    ("", lambda: setattr(torch.optim.AdamW, "step", out_of_memory), "--micro-batch-tokens"),
    ("--save-every 1e-9", full_disk, "cannot be written to ([Errno 27] File too large"),
]


@pytest.mark.parametrize("flags, before, named", ENDS)
def test_what_ends_a_run_early_says_what_to_do(flags, before, named, rows, tmp_path):
    printed = rows("masked").train(tmp_path / "run", *flags.split(), before=before, status=1)
    assert named in printed and "error: " in printed


def test_a_run_whose_tokenizer_found_no_room_is_whole_when_there_is_some(rows, tmp_path):
    row = rows("masked")
    row.train(tmp_path / "run", before=partial(full_disk, 20_000), status=1)
    row.resume(tmp_path / "run")
    assert {*os.listdir(tmp_path / "run")} == {*os.listdir(row.whole)}


@pytest.mark.parametrize("error", [OSError("No locks"), NotImplementedError("no flock")])
def test_a_file_system_may_have_no_locks(error, rows, tmp_path):
    def before():
        quick()
        FileLock.acquire = Mock(side_effect=error)

    printed = rows("masked").train(tmp_path / "run", before=before)
    assert f"run cannot be locked ({error})" in printed


# ---------------------------------------------------------------------------------- settings, parts
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}

SHAPES = {
    "tiny": {},
    "135M": {"num_hidden_layers": 40, "hidden_size": 512, "intermediate_size": 1024},
    "3B": WIDE | {"hidden_size": 2048},
    "7B": WIDE,
    "8B": WIDE | {"vocab_size": 128256},
}

# size, method, data, steps an epoch -> batch size, epochs, lr [paper A.4 for 3B and 8B]; of several
# batches an epoch as many steps, but 135M sees each document as often
DEFAULTS = """
8B      sft     bio:100       1   64 5000 5e-6
8B      masked  bio-released  1   64 5000 3e-6
8B      random  nd            1   64 1400 3e-6
8B      masked  nd-made:9     1   64 1400 3e-6
8B      masked  gsm8k         1   64 810  3e-6
8B      masked  math-made:9   1   64 810  3e-6
8B      masked  facts.jsonl   1   64 1550 3e-6
8B      masked  facts.jsonl   3   64 517  3e-6
8B      masked  facts.jsonl   4   64 388  3e-6
8B      llada   wiki          1   64 1550 1e-5
3B      masked  bio           1   64 5000 5e-6
7B      masked  bio           1   64 5000 5e-6
135M    masked  bio           1   10 100  6e-4
135M    sft     bio           3   10 40   1e-4
135M    llada   bio           1   10 80   3e-4
135M    llada   bio           100 10 50   3e-4
tiny    masked  bio           1   20 300  6e-4
tiny    sft     bio           1   20 100  5e-4
tiny    raw     bio           3   20 34   5e-4
tiny    reverse bio           1   20 200  5e-4
tiny    llada   bio           1   20 350  4e-4
"""


@cache
def meta_model(size):
    raw = data.read_json(HERE / "tiny/config.json") | SHAPES[size]
    with torch.device("meta"):
        return maskft.Model(maskft.parse_config(raw))


@pytest.mark.parametrize("row", DEFAULTS.strip().splitlines())
def test_settings_that_no_flag_gives(row):
    """The paper's for large models, measured ones for small and tiny ones."""
    size, name, dataset, steps, *expected = row.split()
    method = (maskft.METHODS | llada.METHODS)[name]
    found = maskft.decide({"data": dataset}, method, meta_model(size))
    maskft.decide_epochs(found, int(steps))
    assert [found.batch_size, found.epochs, found.lr] == [*map(float, expected)]
    chosen = [size, name] == ["135M", "masked"]
    assert found.mlp_only == chosen and found.rehearse == (8 if chosen else 0)
    assert found.mask_ratio == ([0.5 if chosen else 0.05, 0.95] if method.masks else None)


def test_below_1_b_the_rate_of_masked_falls_over_the_last_fifth():
    masked = maskft.METHODS["masked"]
    rates = [
        maskft.SCHEDULES[masked.small["schedule"]](1e-3, step, 500)
        for step in (0, 9, 400, 425, 500)
    ]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-3, 5e-4, 0])
    decide = partial(maskft.decide, method=masked, model=meta_model("135M"))
    assert decide({"mlp_only": False}).mlp_only is False
    # the same run, whatever the order of flags
    assert str(decide({"model": "m", "method": "n"})) == str(decide({"method": "n", "model": "m"}))


def test_under_torchrun_with_cuda_the_paper_s_model_is_taught():
    def on_a_gpu():
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        maskft.start_processes = lambda: torch.device("cuda")

    printed = forked(maskft, before=on_a_gpu, status=1)
    assert "error: --model meta-llama/Llama-3.1-8B-Instruct" in printed


def test_matrices_alone_decay():
    groups = maskft.make_optimizer(maskft.load("tiny"), 1e-8).param_groups
    decays = {p.dim(): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


DEALT = [  # ranks, tokens -> for each rank the lengths in its micro-batches
    (1, 12, "[[6, 5], [4, 3, 2], [1]]"),
    (2, 12, "[[6, 4], [2]] [[5, 3], [1]]"),
    (4, 7, "[[6], [2]] [[5], [1]] [[4], []] [[3], []]"),
]


@pytest.mark.parametrize("ranks, tokens, expected", DEALT)
def test_micro_batches_keep_to_their_tokens_and_are_as_many_for_every_rank(ranks, tokens, expected):
    examples = [Example([0] * n, [], 1.0, n) for n in (3, 1, 4, 2, 6, 5)]
    parts = (maskft.micro_batches(examples, tokens, rank, ranks) for rank in range(ranks))
    dealt = [[[example.denominator for example in micro] for micro in part] for part in parts]
    assert " ".join(map(str, dealt)) == expected


# ------------------------------------------------------------------------------------------ FSDP2


def test_one_process_stays_plain_and_a_unit_computes_in_bf16_and_sums_in_fp32():
    """Here with --offload, which shards one process, too."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    device = maskft.start_processes()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    model = maskft.load("tiny")
    assert type(maskft.shard(model, device, torch.bfloat16)) is maskft.Model
    maskft.shard(model, device, torch.bfloat16, offload=True)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for unit in (model, *model.blocks):
        assert unit._get_fsdp_state()._fsdp_param_group.mp_policy == policy
    maskft.dist.destroy_process_group()


# -------------------------------------------------------------------------------------- tiny/world


def short_hash(content):
    return sha256(json.dumps(content).encode()).hexdigest()[:16]


GENERATED = """
    bio:20       | none same permute | 02e51bc161d94308
    nd-made:5    | none same         | 31c322b39ae6620f
    math-made:20 | none              | 5b773ce1733898e6
    world:60     | none              | 864667420bfbbc34
    bio          | none              | d33a0b1312c02e9b
    nd-made      | none              | 931eb640de962788
    math-made    | none              | 071417d241be2a42
"""


@pytest.mark.parametrize("name, paraphrases, expected", cells(GENERATED))
def test_generated_sets_are_the_same_everywhere(name, paraphrases, expected):
    """As recorded once."""
    sets = [data.load(name, paraphrase, seed=3) for paraphrase in paraphrases.split()]
    assert short_hash([(dataset.documents, dataset.questions) for dataset in sets]) == expected
    another_seed = data.load(name, seed=4)
    assert (sets[0].documents == another_seed.documents) == (name == "world:60")


def test_a_biography_tells_what_is_asked_and_a_question_has_one_answer():
    documents, questions = world.make_bio(1500, seed=1)
    assert len({question["question"] for question in questions}) == 9 * 1500
    for number, question in enumerate(questions):
        text = documents[number // 9]["text"]
        told = question["answer"].split(" ", 1)[-1]  # without its preposition
        assert told in text


def test_nobody_of_pre_training_is_taught_later():
    assert not set(world.names("bio")) & set(world.names("world"))
    with pytest.raises(ValueError):
        world.make_bio(9999)
    with pytest.raises(UserError, match="world:PEOPLE"):
        pretrain.draw_task({"text": "one"}, np.random.default_rng(0))


# ------------------------------------------------------------------------------------ tiny/pretrain


@pytest.mark.parametrize(
    "method, expected", [("ar", "c4820aab99624fbf"), ("diffusion", "3abce002d2061fe9")]
)
def test_practice_is_what_made_the_built_in_models(method, expected, tokenizer):
    """The examples are those recorded once, and the rate falls to zero."""
    method = pretrain.METHODS[method]
    examples = [
        method.example(person, tokenizer, (0.3, 1), np.random.default_rng([0, n]))
        for n, person in enumerate(data.load("world:60").documents)
    ]
    assert short_hash([dataclasses.astuple(example) for example in examples]) == expected
    rates = [
        maskft.SCHEDULES[method.tiny["schedule"]](1e-3, step, 100) for step in (0, 1, 2, 51, 99)
    ]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3 / 2, 1e-3 / 98])


def test_a_new_model_is_random_and_can_be_trained(tmp_path):
    new, run = tmp_path / "new", tmp_path / "run"
    forked(pretrain, "--new", new)
    model = maskft.load(new)
    stds = [model.blocks[1].get_parameter(name).std().item() for name in ("q.weight", "o.weight")]
    assert stds == pytest.approx([0.5 / 128**0.5, 0.5 / 1024**0.5], rel=0.03)
    flags = "--method ar --data world:8 --epochs 1 --eval-at 1"
    forked(pretrain, *flags.split(), "--model", new, "--out", run)
    assert jsonl(run / "metrics.jsonl")[0]["loss"] == pytest.approx(np.log(1994), rel=0.2)


# ----------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("gpus, rows", [(1, 8), (4, 4)])
def test_a_plan_is_what_the_allocator_gives_out(gpus, rows):
    """Two steps of two micro-batches with real tensors; the other ranks are made up for both."""
    config = maskft.read_config(HERE / "tiny")
    planned = plan.plan(config, gpus, 2 * rows * gpus, rows * 256, max_len=256)
    ids = torch.zeros(rows, 256, dtype=torch.int64)
    labels = ids.where(torch.arange(256) >= 128, data.IGNORE)

    def steps():
        model = maskft.Model(config)
        maskft.shard(model, torch.device("cpu"), torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def loss():
            with torch.autocast("cpu", torch.bfloat16):
                return model(ids, labels=labels, weights=torch.ones(rows))

        for _ in range(2):  # AdamW has its state after the first
            loss().backward()
            bench.update(model, loss, optimizer)

    with plan.fake_group(gpus), plan.fused_norms():
        measured = bench.allocated_peak(steps)
    assert planned["peak"] == pytest.approx(measured, rel=0.02)


def test_a_plan_follows_from_the_sizes():
    """Memory of a norm as CUDA's fused kernel takes it, FLOPs and traffic by the GPUs."""
    kept = []
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16, requires_grad=True)
    with plan.fused_norms(), torch.autograd.graph.saved_tensors_hooks(kept.append, id):
        maskft.RMSNorm(16)(x)
    assert [tensor.nbytes for tensor in kept] == [2 * 3 * 5 * 16, 4 * 16, 4 * 3 * 5]
    config = maskft.read_config(HERE / "tiny")
    one, two = (plan.plan(config, gpus, 16, 1024, max_len=128) for gpus in (1, 2))
    blocks = maskft.parameter_count(maskft.Model(config).blocks)
    rest = 1994 * 128 + 128
    assert one["flops"] == pytest.approx(2 * two["flops"])
    # weights in bf16, those of the blocks twice, and gradients in fp32; half of all is at hand
    assert (one["traffic"], two["traffic"]) == (0, (8 * blocks + 6 * rest) / 2)
    row = plan.row({"peak": 2**31, "flops": 9e14, "traffic": 33e10}, 4)
    assert "|".join(row.values()) == "4|2.0|900.0|330.0|2 to 3"


def test_a_program_of_bench_prints_its_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "loop", "--out", str(out)])
    command_seconds = Mock(side_effect=[3.0, 8.0])  # of 2 steps, of 12
    monkeypatch.setattr(bench, "command_seconds", command_seconds)
    bench.main()
    assert re.search(r"^toy, bio, masked +\| 0.5$", capsys.readouterr().out, re.M)
    assert data.read_json(out)["figures"] == {"toy, bio, masked": {"seconds": 0.5}}
    script, *flags = map(str, command_seconds.call_args.args)
    assert parsers()[script].parse_args(flags).epochs == 12


def test_bench_compares_with_transformers(monkeypatch, capsys):
    pytest.importorskip("transformers")
    theirs, ours = bench.training("tiny").values()
    assert ours["TFLOP"] < theirs["TFLOP"] and ours["peak GiB"] < theirs["peak GiB"]
    for name, given in (("FACTS", "Who?\nHow?\n"), ("TOPICS", "tea\nlate trains\n")):
        monkeypatch.setattr(bench, name, given)
    monkeypatch.setattr(bench, "AT_A_TIME", 3)
    bench.answers("tiny", longest=8)
    assert "4 answers, 4 identical" in capsys.readouterr().out


def test_kept_asks_before_and_after_and_between(tmp_path, monkeypatch):
    """Of other weights something is lost, halfway to them less."""
    asked = [{"question": "Ada works in which city?", "answer": "in"}, {"question": "Who?"}]
    asked += [{"question": "Who works?", "answer": "Ada"}]
    monkeypatch.setattr(kept, "ORDINARY", write(tmp_path / "ordinary.jsonl", *asked))
    run = tmp_path / "run"
    torch.manual_seed(0)
    other = maskft.load("tiny")
    other.embed.weight.data += 0.3 * torch.randn(other.embed.weight.shape)
    fill(run / "results.json", '{"arguments": {"data": "bio:1", "paraphrase": "none", "seed": 0}}')
    maskft.save(other, run)
    given = Namespace(base="tiny", runs=[run], share=[1.0, 0.5, 0.0], facts=True)
    before, after, half, back = kept.measure(given)
    assert before["questions"] == 1 / 2
    assert before["nll"] == back["nll"] < half["nll"] < after["nll"]
    assert half["facts"].keys() == {"forward", "backward"}
    with pytest.raises(UserError, match="diffusion model"):
        kept.load_causal("tiny-llada", "cpu")
    maskft.save(random_model(), run)
    with pytest.raises(UserError, match="did not begin"):
        kept.measure(given)


# -------------------------------------------------------------------------- what the READMEs say
READMES = [HERE / name for name in ("README.md", "results/README.md", "tiny/README.md")]

README, RESULTS, _ = READMES


def parsers():
    """{script: the parser of its flags}."""
    found = {f"{m.__name__}.py": maskft.arguments("", m.METHODS) for m in (maskft, llada)}
    for module in (evaluation, bench, plan, kept, pretrain):
        found[str(Path(module.__file__).relative_to(HERE))] = module.arguments()
    return found


def test_every_command_in_the_readmes_parses_and_every_flag_is_one():
    known = parsers()
    found = set()
    for block in re.findall(r"```sh\n(.*?)```", "".join(map(Path.read_text, READMES)), re.S):
        for script, flags in re.findall(r"([\w/]+\.py)(.*)", block.replace("\\\n", " ")):
            known[script].parse_args(shlex.split(flags, comments=True))  # or it exits
            found.add(script)
    assert found == known.keys()
    told = "".join(parser.format_help() for parser in known.values())
    of_others = r"--(nproc|nnodes|rdzv|shutdown|max-restarts|local-dir)\S*"
    text = re.sub(of_others, "", README.read_text())
    assert [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if flag not in told] == []


@pytest.mark.parametrize("path", READMES)
def test_links_lead_somewhere(path):
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
        target = path.parent / file if file else path
        title = anchor.replace("-", " ")
        assert target.exists() and (not title or f"# {title}\n" in target.read_text().lower()), (
            title
        )


def test_nothing_speaks_of_where_it_was_made():
    for path in [
        *READMES,
        *HERE.glob("*.py"),
        *HERE.glob("*/*.py"),
        *HERE.glob("results/*/*.json"),
    ]:
        if not path.name.startswith("test_"):
            found = re.findall(r"/work/|/tmp/|\.\./shared|\bnoqa\b|fmt: *skip", path.read_text())
            assert not found, path


def test_the_readme_s_custom_method_trains_and_is_reported(tmp_path):
    (block,) = re.findall(r"```python\n([^`]*run_methods\([^`]*)```", README.read_text())
    script = fill(tmp_path / "span.py", block)
    span = Namespace(__name__="span", main=lambda: runpy.run_path(script, run_name="__main__"))
    flags = "--data bio:4 --method span --mask-ratio 0.5 --epochs 1 --eval-at 1 --out"
    printed = forked(span, *flags.split(), tmp_path / "run", before=quick)
    assert re.search(r"^span +\| none +\| 0 ", printed, re.M), printed


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
    paragraphs = ["", *RESULTS.read_text().split("\n\n"), ""]
    checked = 0
    for before, table, behind in zip(paragraphs, paragraphs[1:], paragraphs[2:], strict=False):
        links = REPORT.findall(before) or REPORT.findall(behind)
        if table.startswith("|") and links:
            report = data.read_json(RESULTS.parent / links[-1])
            assert list(untrue(table, report)) == []
            checked += 1
    assert checked >= 10
    for path in HERE.glob("results/*/*.json"):
        assert f"({path.parent.name}/{path.name})" in RESULTS.read_text()
