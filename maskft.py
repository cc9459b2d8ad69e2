"""Masked fine-tuning: teach a language model new facts by having it recover masked documents.

    python maskft.py                                   # laptop: ordinary against masked, on tiny/
    torchrun --nproc_per_node 8 maskft.py --data bio   # eight GPUs: Llama-3.1-8B, paper's settings
    python maskft.py --resume out/bio-masked-1         # go on where a run stopped

The method is *Diffusion-Inspired Masked Fine-Tuning for Knowledge Injection in Autoregressive
LLMs* (arXiv 2510.09885); "paper" below means that one, and masked_arLLM its released code. The
file reads from top to bottom: the paper (masking and loss), config, model, weights, generation,
FSDP2 and checkpoints, the training loop, what the model knew before, settings.

Dimension names in shape comments: B batch, T sequence, S keys seen by attention (T, or the cache's
length), D width, H heads, G key/value heads, K head size, F MLP width, V vocabulary, N positions
that were picked out of B x T.
"""

import argparse
import dataclasses
import errno
import gc
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from itertools import count, takewhile
from pathlib import Path

import huggingface_hub
import numpy as np
import regex
import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from filelock import FileLock, Timeout  # comes with torch
from huggingface_hub import errors
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import data
import eval as evaluation
from data import IGNORE, Example, UserError

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None

# ------------------------------------------- stand-ins until config.json is read under the guard

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
KINDS |= {dict: "an object ({...})", list: "a list"}
LIMITS = {int: (1, 10**9), float: (1e-12, 1e12)}  # sizes, ids and factors of any real model
REQUIRED = object()


def read_field(content, name, kind, default=REQUIRED, low=None):
    """A field of a JSON object, as the kind that it has to be; put right where it is evident.

    A number or a truth value may be text, as in "1e-05"; numbers have LIMITS, `low` another lower
    one. null is absent. UserError names the field and what was found."""
    if not isinstance(content, dict):
        raise UserError(
            f'found {shown(content)} where an object with "{name}" must be; download it again'
        )
    value = content.get(name)
    if value is None and default is not REQUIRED:
        return default
    found = as_kind(value, kind)
    wanted = KINDS[kind]
    is_good = found is not None
    if kind in LIMITS:
        least, most = LIMITS[kind]
        least = least if low is None else low
        wanted += f" from {least:g} to {most:g}"
        is_good = is_good and least <= found <= most
    if not is_good:
        what = shown(value) if name in content else "nothing"
        raise UserError(
            f'"{name}" must be {wanted}, found {what}; correct it, or download it again'
        )
    content[name] = found
    return found


def as_kind(value, kind):
    """A JSON value as `kind`, a number or truth value also from text; None if it is none."""
    if isinstance(value, str) and kind in (bool, int, float):
        try:
            value = json.loads(value.lower())
        except ValueError:
            return None
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else None


def shown(value):
    """A JSON value as a message shows it."""
    if isinstance(value, dict | list):  # nested too deeply, maybe, to be written
        return KINDS[type(value)]
    return json.dumps(value)[:80]


def token_ids(content, name):
    """The ids in a field that holds one or several, or -1, which some files have for none."""
    found = content.get(name)
    if not isinstance(found, list):
        return [read_field(content, name, int, None, low=-1)]
    content[name] = [read_field({name: i}, name, int, low=-1) for i in found]
    return content[name]


# ------------------------------------------------------------------ the paper: masking and the loss

RECOVER = "\nReturn the recovered masked passage."  # behind the masked document [paper A.4]
LEAD_IN = "Here is the recovered text:\n\n"  # before the document it recovers; no loss on it
RECOVER_ANSWER = "Question:\n{}\nAnswer:\n"  # before the masked answer of a problem
RETURN_ANSWER = "\nReturn the recovered masked answer."  # behind it
TELL = "Tell me a fact."  # the user's turn of ordinary fine-tuning


def draw_ratio(mask_ratio, rng):
    """t ~ U(low, high) for one document; low == high is a fixed ratio.

    differs from masked_arLLM: one ratio per document and epoch, not one per batch on every rank.
    """
    low, high = mask_ratio
    return low + (high - low) * rng.random()


def mask_tokens(ids, ratio, mask_id, rng):
    """Replace each id by mask_id with probability `ratio`, independently.

    Returns the new ids and which of them are masked, (T,) bool.
    """
    masked = rng.random(len(ids)) < ratio
    return [mask_id if m else i for i, m in zip(ids, masked, strict=True)], masked


def masked_example(record, tokenizer, mask_ratio, rng, mask=mask_tokens):
    """Masked fine-tuning [paper eq. 2]: the masked document in the prompt, the original behind it.

    Of a question with its answer, the answer is masked [paper, math]. `mask` is what masks: pass
    another function with the arguments of `mask_tokens` for another masking.
    """
    problem = "question" in record
    original = tokenizer.encode(record["answer"] if problem else text_of(record))
    # 1. a ratio, drawn anew every time the document is seen
    ratio = draw_ratio(mask_ratio, rng)
    # 2. each token masked with that probability
    shown, masked = mask(original, ratio, tokenizer.mask_id, rng)
    # 3. a chat that recovers it, with loss on the whole document; of an answer, where it is masked
    if problem:
        return recover_answer(record, shown, masked, original, tokenizer)
    return recover_document(shown, original, tokenizer)


def recover_document(shown, document, tokenizer):
    """`shown` in the user's turn, `document` in the assistant's, both ids of one length.

    The loss is on every token of the document, masked or not, and on the end of turn behind it.
    """
    user = shown + tokenizer.encode(RECOVER)
    prompt = tokenizer.chat([{"role": "user", "content": user}])
    return supervise(prompt + tokenizer.encode(LEAD_IN), document + [tokenizer.eot_id])


def recover_answer(record, shown, masked, answer, tokenizer):
    """The same for the answer to a question; loss only on tokens whose counterpart is masked.

    No end of turn: it has no counterpart in the prompt [paper, math].
    """
    question = RECOVER_ANSWER.format(record.get("problem", record["question"]))
    user = tokenizer.encode(question) + shown + tokenizer.encode(RETURN_ANSWER)
    prompt = tokenizer.chat([{"role": "user", "content": user}])
    labels = [token if m else IGNORE for token, m in zip(answer, masked, strict=True)]
    labels = [IGNORE] * len(prompt) + labels
    return Example(prompt + answer, labels, weight=1.0, denominator=int(masked.sum()))


def random_example(record, tokenizer, mask_ratio, rng):
    """The control [paper fig. 14]: random tokens in place of the masked document."""
    document = tokenizer.encode(text_of(record))
    ordinary = list(tokenizer.ranks.values())
    drawn = rng.integers(len(ordinary), size=len(document))
    return recover_document([ordinary[i] for i in drawn], document, tokenizer)


def sft_example(record, tokenizer, mask_ratio, rng):
    """Ordinary fine-tuning in chat form, the paper's baseline: a document, or a question's answer.

    Nothing is random in it.
    """
    if "question" in record:
        user = record["question"]
        target = record["answer"]
    else:
        user = TELL
        target = text_of(record)
    prompt = tokenizer.chat([{"role": "user", "content": user}])
    return supervise(prompt, tokenizer.encode(target) + [tokenizer.eot_id])


def raw_example(record, tokenizer, mask_ratio, rng):
    """Ordinary fine-tuning in the form of pre-training, as masked_arLLM has it: bos, document, eos.

    The loss is on every token that has one before it.
    """
    document = tokenizer.encode(text_of(record)) + [tokenizer.eos_id]
    if tokenizer.bos_id is None:
        return supervise(document[:1], document[1:])
    return supervise([tokenizer.bos_id], document)


# a capitalised word (with what hyphens and apostrophes join to it) or a number, and more of them
# behind it; else a word; else a punctuation mark
ENTITIES = regex.compile(r"(?:[\p{Lu}\d][\w'’-]*)(?: [\p{Lu}\d][\w'’-]*)*|[\w'’-]+|[^\w\s]")


def reverse_example(record, tokenizer, mask_ratio, rng):
    """Entity-level reverse training (arXiv 2403.13799), the paper's weak baseline.

    A document as `sft` has it or, one time in two, with its words in reverse order and its entities
    whole. They find entities with a tagger. Here one is a run of words that begin with a capital or
    a digit, as in "3 June 1971"; every other word, and every mark, stands for itself. So an entity
    in lower case is taken apart, and a capitalised word that opens a sentence joins an entity that
    follows it.
    """
    text = text_of(record)
    if rng.random() < 0.5:
        text = " ".join(reversed(ENTITIES.findall(text)))
    return sft_example({"text": text}, tokenizer, mask_ratio, rng)


def text_of(record):
    """The text of a document; UserError for a record that only some methods can learn."""
    if "text" not in record:
        found = "question with its answer" if "question" in record else "person"
        raise UserError(
            f"this method learns documents; found a {found}: "
            "use masked or sft for questions, tiny/pretrain.py for people"
        )
    return record["text"]


def chat_example(prompt, answer, tokenizer, mask_ratio, rng):
    """A chat that the model wrote before it learned anything new: ordinary fine-tuning on it."""
    return supervise(prompt, answer)


def supervise(prompt, target):
    """An Example with loss on each token of `target` and none on `prompt`."""
    labels = [IGNORE] * len(prompt) + target
    return Example(prompt + target, labels, weight=1.0, denominator=len(target))


def warm_up(lr, step, steps):
    """The learning rate of a step: 2 % linear warm-up, then constant [paper A.4]."""
    return min(lr, lr * (step + 1) / max(1, round(0.02 * steps)))


@dataclass(frozen=True)
class Method:
    """All that tells one way of teaching from another. What is not given suits a custom method."""

    example: Callable  # record, tokenizer, mask_ratio, numpy Generator -> Example
    masks: bool = True  # whether the mask ratio means anything to it
    causal: bool = True  # False: trains and answers without the causal mask, as LLaDA
    # model, tokenizer, prompts, max_new_tokens, on_answer -> answers; None = greedy
    answer: Callable | None = None
    # the same with a generator in place of on_answer, at random; None = by temperature and top-p
    draw: Callable | None = None
    # prompt, answer (ids), tokenizer, mask_ratio, numpy Generator -> Example; None = chat_example
    chat: Callable | None = None
    schedule: Callable = warm_up  # lr, step, steps -> the learning rate of that step
    lr: float = 5e-6  # of models from 1 B parameters on [paper A.4]
    lr_8b: float | None = None  # the same for Llamas of 8 B, where it differs
    small_lr: float = 3e-4  # below 1 B parameters
    small_epochs: int = 80  # and how often they see each document
    tiny_lr: float = 6e-4  # of the built-in models
    tiny_steps: int = 300  # their length of training

    def __post_init__(self):
        if not self.causal and None in (self.answer, self.draw, self.chat):
            raise ValueError(
                "a method without the causal mask needs an `answer`, `draw` and `chat` of its own"
            )


PLAIN = {"masks": False, "small_lr": 1e-4, "small_epochs": 40, "tiny_lr": 5e-4}
# The last is what is trained by default; on the built-in model the last two, to compare.
METHODS = {
    "raw": Method(raw_example, **PLAIN, tiny_steps=100),
    "random": Method(random_example, masks=False, lr_8b=3e-6),
    "reverse": Method(reverse_example, **PLAIN, tiny_steps=200),
    "sft": Method(sft_example, **PLAIN, tiny_steps=100),
    "masked": Method(masked_example, lr_8b=3e-6),
}

# how `checkpoint` is called: no dropout here, so there is no state of random numbers to keep
RECOMPUTE = {"use_reentrant": False, "preserve_rng_state": False}
CHUNK = 1024  # rows of logits in memory at a time: (1024, 128k) fp32 is half a GB


def loss_sum(x, norm, head, labels, weights):
    """Weighted sum of cross entropies at N positions; the caller divides by the loss denominator.

    x (N, D) before the final norm, head (V, D), labels (N,), weights (N,) -> scalar fp32. The
    logits are made chunk by chunk, of all chunks but the last again in backward, so (N, V) never
    exists. N = 0 gives 0 and zero gradients, never NaN: a rank without a label takes part in every
    collective like the others.
    """

    def chunk_loss(x, labels, weights):
        logits = F.linear(norm(x), head)  # (CHUNK, V)
        return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()

    rows = [x.split(CHUNK), labels.split(CHUNK), weights.split(CHUNK)]
    *chunks, last = zip(*rows, strict=True)  # N = 0: one chunk, of no rows
    total = sum(checkpoint(chunk_loss, *chunk, **RECOMPUTE) for chunk in chunks)
    return total + chunk_loss(*last)  # not made again: backward begins with it


# ------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    """Sizes of one decoder, whatever family it comes from."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    context: int  # longest sequence in tokens; with a sliding window (not implemented) at most that
    norm_eps: float
    rope_theta: float
    rope_scaling: dict  # {} = plain RoPE
    tied: bool  # the head is the embedding
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    causal: bool = True  # False: every token sees every other (LLaDA)
    raw: dict = field(default_factory=dict)  # its config.json, written back on saving

    def __post_init__(self):
        sizes = ("vocab", "width", "heads", "kv_heads", "head_size", "mlp_width", "context")
        for name in ("layers", *sizes):  # before anything of that size is made
            size = getattr(self, name)
            most = 2**10 if name == "layers" else 2**30
            if not isinstance(size, int) or not 0 < size <= most:
                raise UserError(f"{name} = {size!r} is not a size from 1 to {most}")
        if self.heads % self.kv_heads or self.head_size % 2:
            raise UserError(
                f"heads = {self.heads} is not a multiple of kv_heads = {self.kv_heads}, or "
                f"head_size = {self.head_size} is odd"
            )


def read_config(directory):
    """The Config of a model directory; UserError for what is not implemented."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path}: not found. A model is a directory with config.json, *.safetensors and a "
            "tokenizer"
        )
    raw = data.read_object(path)
    with data.reading(path):
        config = parse_config(raw)
    return with_own_head(config, Path(directory))


def parse_config(raw):
    """The Config in the Hugging Face config of any supported family."""
    family = read_field(raw, "model_type", str)
    if family not in FAMILIES:
        raise UserError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    for name in DTYPE_FIELDS:
        declared = raw.get(name)
        if declared is not None:
            raw[name] = parse_dtype(declared, name)
    for name in ("bos", "eos", "pad"):
        token_ids(raw, f"{name}_token_id")
    parse, _ = FAMILIES[family]
    return parse(raw)


DTYPE_FIELDS = ("dtype", "torch_dtype", "precision")  # the last is LLaDA's
DTYPES = ("float32", "bfloat16", "float16", "float64", "amp_bf16", "amp_fp16")


def parse_dtype(declared, name):
    """What a config says of the dtype of its weights; "auto" is float32."""
    dtype = str(declared).removeprefix("torch.").replace("auto", "float32")
    if dtype not in DTYPES:
        raise UserError(f'"{name}" must be one of {", ".join(DTYPES)}, found {declared!r}')
    return dtype


def parse_llama(raw):
    """The Config of a Llama, Mistral, Qwen2 or Qwen3; both spellings of the RoPE fields."""
    family = raw["model_type"]
    refuse_unless(raw, hidden_act=("silu",), mlp_bias=(False, None), quantization_config=(None,))
    size = partial(read_field, raw, kind=int)
    flag = partial(read_field, raw, kind=bool)
    width = size("hidden_size")
    heads = size("num_attention_heads")
    bias = flag("attention_bias", default=False)
    context = size("max_position_embeddings", default=2048)
    rope = parse_rope(raw, context)
    # Qwen2 and Qwen3 carry a sliding_window that counts only where use_sliding_window says so
    if flag("use_sliding_window", default=family == "mistral"):
        context = min(context, size("sliding_window", default=context))
    return Config(
        vocab=data.embeddings(raw),
        width=width,
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", default=heads),
        head_size=size("head_dim", default=width // heads),
        mlp_width=size("intermediate_size"),
        context=context,
        norm_eps=read_field(raw, "rms_norm_eps", float, 1e-6),
        rope_theta=rope["rope_theta"],
        rope_scaling={} if rope["rope_type"] == "default" else rope,
        tied=flag("tie_word_embeddings", default=False),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        qk_norm=family == "qwen3",
        raw=raw,
    )


ROPE_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def parse_rope(raw, context):
    """The RoPE fields of a config, in both spellings: rope_type, rope_theta and ROPE_FACTORS.

    As in transformers, rope_scaling goes before rope_parameters, and the original context is the
    context where nothing else is said. UserError where the two disagree."""
    old = read_field(raw, "rope_scaling", dict, {})
    new = read_field(raw, "rope_parameters", dict, {})
    rope = dict(old or new)
    kind = read_field(rope, "rope_type", str, read_field(rope, "type", str, "default"))
    if kind not in ROPE_FACTORS:
        raise UserError(f"RoPE scaling {kind!r} is not one of {', '.join(ROPE_FACTORS)}")
    theta = read_field(raw, "rope_theta", float, 10000.0)
    rope |= {"rope_type": kind, "rope_theta": read_field(rope, "rope_theta", float, theta)}
    for name, value in new.items():
        if value not in ("default", None, rope.get(name)):
            raise UserError(
                f'"rope_scaling" and "rope_parameters" disagree about "{name}": '
                f"{rope.get(name)!r} and {value!r}; delete one of them"
            )
    for name in ROPE_FACTORS[kind]:
        read_field(rope, name, float)
    if kind == "llama3":
        original = "original_max_position_embeddings"
        rope[original] = read_field(raw, original, int, read_field(rope, original, int, context))
        if rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise UserError('"low_freq_factor" must be below "high_freq_factor"; correct it')
    return rope


# What LLaDA-8B-Base, -Instruct and LLaDA-1.5 have in common; another value would be another model.
# Written out for a new model: the published configuration class defaults to a GPT-2 with dropout.
LLADA_FIXED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "include_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}


def parse_llada(raw):
    """The Config in a LLaDA's config.json."""
    allowed = {name: (value,) if value else (value, None) for name, value in LLADA_FIXED.items()}
    absent = dict.fromkeys(["clip_qkv", "rope_scaling", "quantization_config"], (None,))
    refuse_unless(raw, multi_query_attention=(None, False), **allowed, **absent)
    size = partial(read_field, raw, kind=int)
    vocab = data.embeddings(raw)
    mask_id = size("mask_token_id", low=0)
    if mask_id >= vocab:
        raise UserError(f"mask_token_id = {mask_id} is not one of the {vocab} embeddings")
    width = size("d_model")
    heads = size("n_heads")
    mlp_ratio = size("mlp_ratio", default=4)
    return Config(
        vocab=vocab,
        width=width,
        layers=size("n_layers"),
        heads=heads,
        kv_heads=size("n_kv_heads", default=heads),
        head_size=width // heads,
        mlp_width=size("mlp_hidden_size", default=mlp_ratio * width),
        context=size("max_sequence_length", default=1024),
        norm_eps=read_field(raw, "rms_norm_eps", float, 1e-5),
        rope_theta=read_field(raw, "rope_theta", float, 10000.0),
        rope_scaling={},
        tied=read_field(raw, "weight_tying", bool, True),
        qkv_bias=read_field(raw, "include_qkv_bias", bool, False),
        causal=False,
        raw=raw,
    )


def as_diffusion(config, tokenizer):
    """The Config to train a diffusion model with: a LLaDA's as it is, that of an autoregressive
    model as a LLaDA's. Its weights fit, with the causal mask off."""
    if not config.causal:
        if config.raw["mask_token_id"] != tokenizer.mask_id:
            raise UserError(
                f"config.json says mask_token_id {config.raw['mask_token_id']}, "
                f"the tokenizer {tokenizer.mask_id}"
            )
        return config
    raw = config.raw
    split = config.head_size * config.heads != config.width
    if config.out_bias or config.qk_norm or config.rope_scaling or split:
        raise UserError(
            f"this {raw['model_type']} cannot become a LLaDA, whose config has no output bias, "
            "query and key norms, RoPE scaling, or head size other than width / heads"
        )
    print0(
        "an autoregressive model: its weights are where diffusion training starts, "
        "with the causal mask off"
    )
    sizes = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "mlp_hidden_size": config.mlp_width,
        "vocab_size": config.vocab,
        "embedding_size": config.vocab,
        "max_sequence_length": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "weight_tying": config.tied,
        "include_qkv_bias": config.qkv_bias,
        "mask_token_id": tokenizer.mask_id,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": raw.get("bos_token_id"),
        "pad_token_id": tokenizer.eos_id,
        "torch_dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
    }
    return parse_llada(LLADA_FIXED | sizes)


def refuse_unless(raw, **allowed):
    """UserError for the first field of a config whose value is not implemented; absent is fine."""
    for name, values in allowed.items():
        if name in raw and raw[name] not in values:
            only = " or ".join(map(repr, values))
            raise UserError(f"{name} = {raw[name]!r} is not implemented (only {only})")


# -------------------------------------------------------------------------------------------- model


class RMSNorm(nn.RMSNorm):
    """torch's, kept out of autocast, which would run it in fp32 and keep that copy for backward."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def is_finite(tensor, most=math.inf):
    """Whether all numbers are between -most and most, and none is NaN; makes no copy of them."""
    if not tensor.numel():
        return True
    low, high = (end.item() for end in tensor.detach().aminmax())  # NaN if any is
    return -most < low and high < most


def checked(logits):
    """The logits; UserError if they are no numbers, which would pass for a wrong answer."""
    if not is_finite(logits):
        raise UserError(
            "the model's logits are NaN or infinite: its weights or config.json are damaged, or "
            "too large for its dtype, or training ruined them"
        )
    return logits


def rope_tables(positions, config):
    """cos and sin for rotary embedding (arXiv 2104.09864), scaling as in transformers.

    positions (B, T) int64 -> two (B, 1, T, K) fp32, the angles of the K/2 frequencies twice over:
    head size 4, position p gives [cos p, cos p/100, cos p, cos p/100] at theta 1e4. Computed anew
    in every forward: a buffer would be garbage after `to_empty`, and bf16 angles are wrong beyond
    position 256.
    """
    index = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-index / config.head_size)  # (K/2,)
    scaling = config.rope_scaling
    if scaling.get("rope_type") == "linear":
        frequency = frequency / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        # waves that turn often within the old context stay, those that never finish a turn are
        # stretched
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angles = positions[:, None, :, None].float() * frequency  # (B, 1, T, K/2)
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, T, K)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) of (B, H, T, K) by its angle.

    Split halves, the convention of Hugging Face checkpoints: loading permutes nothing.
    """
    first, second = x.float().chunk(2, dim=-1)  # (B, H, T, K/2) each
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


class KVCache:
    """Keys and values of the tokens already seen: one pair of (rows, G, size, K) a layer.

    Every row is filled from its first column on, however long the others are: a row can be given
    to another text at any time.
    """

    def __init__(self, layers, rows, size):
        self.layers = [None] * layers
        self.rows = rows
        self.size = size

    def place(self, first, past, T, device):
        """Say what the next forward is: T tokens more in each of the rows from `first` on.

        past  B numbers, how many tokens each of these rows has
        """
        self.chosen = torch.arange(first, first + len(past), device=device)[:, None]  # (B, 1)
        self.first = first
        self.columns = torch.tensor(past, device=device)[:, None] + torch.arange(T, device=device)
        self.end = max(past) + T  # S
        self.is_new = not any(past)

    def extend(self, layer, k, v):
        """Write (B, G, T, K) into a layer; all keys and values of these rows, (B, G, S, K)."""
        if self.layers[layer] is None:
            B, G, _, K = k.shape
            shape = (self.rows, G, self.size, K)
            # zeros: what is masked counts nothing, but nothing times NaN is NaN
            self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        found = []
        for kept, new in zip(self.layers[layer], (k, v), strict=True):
            kept[self.chosen, :, self.columns] = new.transpose(1, 2)  # (B, T, G, K)
            found.append(kept[self.first : self.first + len(new), :, : self.end])  # a view
        return found

    def move(self, source, target):
        """Give a row the contents of another."""
        for kept in self.layers:
            for tensor in kept:
                tensor[target] = tensor[source]


class Block(nn.Module):
    """One pre-norm Llama layer: grouped-query attention, then SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.width
        K = config.head_size
        norm = partial(RMSNorm, eps=config.norm_eps)
        self.attn_norm = norm(D)
        self.q = nn.Linear(D, config.heads * K, bias=config.qkv_bias)
        self.k = nn.Linear(D, config.kv_heads * K, bias=config.qkv_bias)
        self.v = nn.Linear(D, config.kv_heads * K, bias=config.qkv_bias)
        self.o = nn.Linear(config.heads * K, D, bias=config.out_bias)
        self.q_norm = norm(K) if config.qk_norm else nn.Identity()
        self.k_norm = norm(K) if config.qk_norm else nn.Identity()
        self.mlp_norm = norm(D)
        self.gate = nn.Linear(D, config.mlp_width, bias=False)
        self.up = nn.Linear(D, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, D, bias=False)

    def forward(self, x, rope, mask, cache=None, layer=0):
        x = x + self.attention(self.attn_norm(x), rope, mask, cache, layer)
        h = self.mlp_norm(x)
        gate = self.gate(h)  # (B, T, F)
        up = self.up(h)  # (B, T, F)
        if torch.is_grad_enabled():
            # silu(gate) and the product are made again in backward, not kept: half of what is as
            # wide as the MLP, for no matmul (checkpoint stops running again once it has the input
            # of `down`, the last thing that backward needs)
            return x + checkpoint(self.activate, gate, up, **RECOMPUTE)
        return x + self.activate(gate, up)  # (B, T, D)

    def activate(self, gate, up):
        return self.down(F.silu(gate) * up)

    def attention(self, x, rope, mask, cache, layer):
        B, T, _ = x.shape
        K = self.config.head_size
        q = self.q_norm(self.q(x).view(B, T, -1, K)).transpose(1, 2)  # (B, H, T, K)
        k = self.k_norm(self.k(x).view(B, T, -1, K)).transpose(1, 2)  # (B, G, T, K)
        v = self.v(x).view(B, T, -1, K).transpose(1, 2)  # (B, G, T, K)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, G, S, K)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and self.config.causal and T > 1,
            enable_gqa=self.config.heads != self.config.kv_heads,
        )  # (B, H, T, K)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class Model(nn.Module):
    """The one decoder behind Llama, Mistral, SmolLM2, Qwen and LLaDA; their Configs differ."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        # a tied model has no head of its own: two names for one tensor come apart under to_empty
        # and FSDP
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, ids, key_mask=None, labels=None, weights=None, pick=None, cache=None):
        """Logits, or with `labels` the summed loss.

        ids       (B, T) int64
        key_mask  (B, T) bool, True = real token; None = all are. Padding may be on either side;
                  positions count real tokens only, and padding is never attended to
        labels    (B, T) int64, each in the place of its own token, IGNORE = no loss. A causal model
                  predicts a label one position earlier, a diffusion model in place. Labels and
                  weights may stay on the CPU: to find the labels on a GPU is to wait for it. (FSDP2
                  moves them all the same, so a micro-batch waits once.)
        weights   (B,) fp32, the weight of each sequence's tokens in the loss
        pick      (B, T) bool: logits only there
        cache     a KVCache that was told where the ids stand; their padding is on the right
        returns   logits (B, T, V), or (N, V) with `pick`; or with `labels` the weighted sum of
                  cross entropies, a scalar
        """
        mask, positions = self.mask_and_positions(ids, key_mask, cache)
        rope = rope_tables(positions, self.config)
        x = self.embed(ids)  # (B, T, D)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer)
        head = self.embed.weight if self.head is None else self.head.weight  # (V, D)
        if labels is not None:
            if self.config.causal:
                x = x[:, :-1]
                labels = labels[:, 1:]
            # norm, head and loss are spent on labelled positions only
            at = (labels != IGNORE).nonzero(as_tuple=True)  # rows (N,), columns (N,)
            weights = weights[at[0]]  # (N,)
            row, column, labels, weights = (
                picked.to(x.device, non_blocking=True) for picked in (*at, labels[at], weights)
            )
            return loss_sum(x[row, column], self.norm, head, labels, weights)
        if pick is not None:
            x = x[pick]  # (N, D)
        return checked(F.linear(self.norm(x), head))

    def mask_and_positions(self, ids, key_mask, cache):
        """Attention mask (B, 1, T, S) bool, None where SDPA needs none; positions (B, T)."""
        B, T = ids.shape
        self.check_length(T)
        if cache is not None:
            columns = torch.arange(cache.end, device=ids.device)
            mask = None if cache.is_new else columns <= cache.columns[:, None, :, None]
            return mask, cache.columns
        if key_mask is None:
            return None, torch.arange(T, device=ids.device).expand(B, T)
        positions = (key_mask.cumsum(1) - 1).clamp(min=0)
        mask = key_mask[:, None, None, :].expand(B, 1, T, T)
        earlier = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
        if self.config.causal:
            mask = mask & earlier
        # a padding row sees itself: a row that sees nothing is NaN in some kernels, and NaN spreads
        # in backward
        return mask | earlier.triu(), positions

    def check_length(self, tokens):
        if tokens > self.config.context:
            raise UserError(f"{tokens} tokens are more than the model takes, {self.config.context}")


# ---------------------------------------------------------------------------------- weights in, out

# the last part of our name: the name in the checkpoint; "{}" is the layer, ".weight" or ".bias"
# follows
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "o": "model.layers.{}.self_attn.o_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LLADA_NAMES = {
    "embed": "model.transformer.wte",
    "attn_norm": "model.transformer.blocks.{}.attn_norm",
    "q": "model.transformer.blocks.{}.q_proj",
    "k": "model.transformer.blocks.{}.k_proj",
    "v": "model.transformer.blocks.{}.v_proj",
    "o": "model.transformer.blocks.{}.attn_out",
    "mlp_norm": "model.transformer.blocks.{}.ff_norm",
    "gate": "model.transformer.blocks.{}.ff_proj",  # not up_proj: swapped, it loads and babbles
    "up": "model.transformer.blocks.{}.up_proj",
    "down": "model.transformer.blocks.{}.ff_out",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}
# config.json's model_type: how its config is read, what its tensors are called
FAMILIES = {
    "llama": (parse_llama, LLAMA_NAMES),
    "mistral": (parse_llama, LLAMA_NAMES),
    "qwen2": (parse_llama, LLAMA_NAMES),
    "qwen3": (parse_llama, LLAMA_NAMES),
    "llada": (parse_llada, LLADA_NAMES),
}


def checkpoint_names(model, family):
    """{our parameter name: its name in a checkpoint of that family}."""
    _, table = FAMILIES[family]
    names = {}
    for name, _ in model.named_parameters():
        *block, part, kind = name.split(".")  # ["blocks", "7"], "q", "weight"
        layer = block[-1] if block else ""
        names[name] = f"{table[part].format(layer)}.{kind}"
    return names


def load(path_or_id, device="cpu", dtype=torch.float32):
    """A Model in eval mode from a model directory, a built-in name or a hub id."""
    directory = find_model(path_or_id)
    config = read_config(directory)
    with torch.device("meta"):
        model = Model(config).to(dtype)
    load_weights(model, directory, device)
    return model.eval()


def find_model(name):
    """The directory of a model: the path itself, one beside this file (`tiny`), or a download."""
    for directory in (Path(name), Path(__file__).parent / name):
        if directory.is_dir():
            return directory
    if str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise UserError(f"--model {name}: no such directory, and not a hub id (owner/name)")
    # never pickled weights, never code
    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except errors.GatedRepoError:
        why = (
            f"is gated: accept its licence at https://huggingface.co/{name}, then "
            "`hf auth login`, or give a local directory or the built-in model (--model tiny)"
        )
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        why = "is no directory, and no model on the hub (a private one needs `hf auth login`)"
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        why = (
            "is not in the local cache and the hub could not be reached "
            f"({type(error).__name__}). On a machine with a network: "
            f"`hf download {name} --local-dir DIR`, then --model DIR; or --model tiny"
        )
    raise UserError(f"--model {name} {why}")


def open_tensors(directory):
    """{checkpoint name: (shape, file)} of a model directory; no tensor is read yet."""
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        files = {single.name}
    elif index.is_file():
        try:
            files = set(data.read_json(index)["weight_map"].values())
        except (AttributeError, KeyError, TypeError):
            raise UserError(
                f"{index}: no weight_map, which says what file a tensor is in: download it again"
            ) from None
    else:
        raise UserError(
            f"{directory}: neither {single.name} nor {index.name} (pickled weights are never read)"
        )
    tensors = {}
    for path in [directory / str(file) for file in files]:
        if path.parent != directory or not path.is_file():
            raise UserError(f"{index}: names {path}, which is not a file of this directory")
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                for name in file.offset_keys():
                    view = file.get_slice(name)
                    check_number_format(view.get_dtype(), name, path)
                    tensors[name] = view.get_shape(), path
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({error}): download it again"
            ) from None
    return tensors


def check_number_format(name_of_dtype, name, path):
    """UserError for a tensor of integers, or of 8 or fewer bits: those are quantized."""
    if name_of_dtype not in ("F64", "F32", "F16", "BF16"):
        raise UserError(
            f"{path}: {name} holds numbers of type {name_of_dtype}; give a model that is not "
            "quantized, in float32, bfloat16 or float16"
        )


def read_rows(tensors, name, start, stop):
    """Rows of a tensor from its file.

    The file is opened anew each time, as what was read of it stays mapped until it is closed."""
    _, path = tensors[name]
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return file.get_slice(name)[start:stop]


def with_own_head(config, directory):
    """The Config of a model directory: tied only if it has no head of its own.

    As in transformers, a head beside a tied embedding counts unless the two are equal."""
    _, table = FAMILIES[config.raw["model_type"]]
    tensors = open_tensors(directory) if config.tied else {}
    head = f"{table['head']}.weight"
    embedding = f"{table['embed']}.weight"
    if head not in tensors or is_equal(tensors, head, embedding):
        return config
    print0(f'{directory}: has a {head} of its own, so "tie_word_embeddings" does not hold')
    said = "tie_word_embeddings" if config.causal else "weight_tying"
    return dataclasses.replace(config, tied=False, raw=config.raw | {said: False})


def is_equal(tensors, first, second):
    """Whether two tensors of a checkpoint are the same, read a piece at a time."""
    if second not in tensors or tensors[first][0] != tensors[second][0]:
        return False
    rows = tensors[first][0][0]
    return all(
        torch.equal(
            read_rows(tensors, first, start, start + CHUNK).float(),
            read_rows(tensors, second, start, start + CHUNK).float(),
        )
        for start in range(0, rows, CHUNK)
    )


def load_weights(model, directory, device):
    """Make room for a model built on `meta` and fill every parameter by name.

    Each rank reads only the rows it holds. UserError names a tensor that is missing, extra or of
    another shape, before there is any room.
    """
    tensors = open_tensors(directory)
    family = data.read_json(directory / "config.json")["model_type"]
    names = checkpoint_names(model, family)
    check_tensors(model, tensors, names, family, directory)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        local, start = local_rows(parameter)
        if local.shape[0]:
            # into the shard in place
            local.copy_(read_rows(tensors, names[name], start, start + local.shape[0]))
            if not is_finite(local, most=1e12):  # a flipped bit makes 1e38 of 1
                _, path = tensors[names[name]]
                raise UserError(
                    f"{path}: {names[name]} holds NaN, infinite or absurdly large numbers (as "
                    f"{local.dtype}): download it again, or use another checkpoint"
                )


def local_rows(parameter):
    """(what this rank holds of a parameter, the number of its first row)."""
    local = parameter.detach()
    if not isinstance(parameter, DTensor):
        return local, 0
    # FSDP2 splits as torch.chunk does: ceil(n / W) rows a rank, the last ones fewer
    rows = parameter.shape[0]
    mesh = parameter.device_mesh
    start = min(mesh.get_local_rank() * math.ceil(rows / mesh.size()), rows)
    return local.to_local(), start


def check_tensors(model, tensors, names, family, directory):
    """UserError unless the checkpoint has exactly the model's tensors, in its shapes."""
    unread = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}  # early Llama 2's
    if model.config.tied:
        _, table = FAMILIES[family]
        unread.add(f"{table['head']}.weight")  # a copy of the embedding
    missing = set(names.values()) - set(tensors)
    extra = set(tensors) - set(names.values()) - unread
    if missing or extra:
        what = "is missing" if missing else "is not part of this model"
        which = missing or extra
        raise UserError(
            f"{directory}: the tensor {min(which)} {what} ({len(which)} such); "
            "is config.json of the same model?"
        )
    for name, parameter in model.named_parameters():
        shape, path = tensors[names[name]]
        if shape != list(parameter.shape):
            raise UserError(
                f"{path}: {names[name]} has shape {shape}, config.json says {list(parameter.shape)}"
            )


def save(model, path):
    """Write config.json and safetensors of at most 5 GB, in the dtype that the config declares.

    After training that is the dtype it was scored in. Call it on every rank: tensors are gathered
    one by one, and rank 0 keeps those of one file at a time.
    """
    path = Path(path)
    raw = model.config.raw
    declared = next((raw[name] for name in DTYPE_FIELDS if raw.get(name)), "float32")
    # LLaDA's words
    dtype = getattr(torch, declared.replace("amp_bf16", "bfloat16").replace("amp_fp16", "float16"))
    names = checkpoint_names(model, raw["model_type"])
    parameters = {names[name]: p.detach() for name, p in model.named_parameters()}
    empty = {n: torch.empty(p.shape, dtype=dtype, device="meta") for n, p in parameters.items()}
    plan = huggingface_hub.split_torch_state_dict_into_shards(empty)
    if rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        data.write_text(path / "config.json", json.dumps(raw, indent=2) + "\n")
    for file, members in plan.filename_to_tensors.items():
        whole = {}
        for name in members:
            tensor = parameters[name]
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()  # on every rank
            if rank() == 0:
                whole[name] = tensor.to("cpu", dtype).contiguous()
        if rank() == 0:
            part = path / f"{file}.part"
            save_file(whole, part, metadata={"format": "pt"})
            shutil.copymode(path / "config.json", part)  # not for its owner's eyes alone
            part.replace(path / file)  # a file that has its name is whole
    if rank() == 0 and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        data.write_text(path / "model.safetensors.index.json", text)


# --------------------------------------------------------------------------------------- generation


# Prompts and the room for their answers at a time: as 64 rows of 144, or 1.1 GiB of keys and values
# of a Llama-3.1-8B in bf16.
ANSWER_BATCH_TOKENS = 9216


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens=128,
    stop_ids=(),
    temperature=0.0,
    top_p=1.0,
    generator=None,
    batch_tokens=ANSWER_BATCH_TOKENS,
    on_answer=None,
):
    """Answers to any number of prompts: lists of ids in, lists of new ids out (no stop id).

    A row of the batch whose answer has ended goes to one of the next prompts. Prompts are taken
    longest first, so that those in the batch are of alike length.

    temperature   0 = the likeliest token; else a draw from softmax(logits / temperature)
    top_p         draws are of the fewest tokens that have this probability together
    batch_tokens  rows times (prompt + max_new_tokens) at most; one row may be longer
    on_answer     called with 1 for every answer that is complete
    """
    check_sampling(max_new_tokens, temperature, top_p)
    model.check_length(max(map(len, prompts), default=0) + max_new_tokens)
    room = [len(prompt) + max_new_tokens for prompt in prompts]
    answers = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=room.__getitem__)  # the longest at the end
    going = []  # the prompt that each row of the cache belongs to
    while waiting or going:
        # 1. free rows are taken by the next prompts, which are computed beside the other rows
        if not going:
            most = room[waiting[-1]]
            cache = KVCache(model.config.layers, max(1, batch_tokens // most), most)
        first = len(going)
        take_rows(cache, going, waiting, room)
        if first == len(going):
            first = 0  # no prompt is new: all rows go on
        # 2. the next token of these rows
        numbers = going[first:]
        ids = [answers[i][-1:] or prompts[i] for i in numbers]  # what the cache does not have
        seen = [len(prompts[i]) + len(answers[i]) for i in numbers]
        past = [n - len(new) for n, new in zip(seen, ids, strict=True)]
        logits = last_logits(model, cache, first, past, ids)  # (B, V)
        chosen = choose(logits, temperature, top_p, generator).tolist()
        for i, token in zip(numbers, chosen, strict=True):
            answers[i].append(token)
        # 3. the last row takes the place of one that has ended
        for row in reversed(range(len(going))):
            answer = answers[going[row]]
            if answer[-1] in stop_ids or len(answer) == max_new_tokens:
                cache.move(len(going) - 1, row)
                going[row] = going[-1]
                going.pop()
                if on_answer:
                    on_answer(1)
    return [until_stop(answer, stop_ids) for answer in answers]


def check_sampling(max_new_tokens, temperature, top_p):
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(
            "max_new_tokens is at least 1, temperature at least 0, top_p above 0 and at most 1; "
            f"found {max_new_tokens}, {temperature}, {top_p}"
        )


def take_rows(cache, going, waiting, room):
    """Give free rows to waiting prompts; several at a time, as together they cost less."""
    free = cache.rows - len(going)
    if free < min(len(waiting), cache.rows // 8):
        return
    # much shorter ones wait, until there can be more and shorter rows
    while waiting and len(going) < cache.rows and 2 * room[waiting[-1]] > cache.size:
        going.append(waiting.pop())


def last_logits(model, cache, first, past, ids):
    """Logits (B, V) behind `ids`, B lists of tokens that the cache's rows from `first` on lack."""
    device = next(model.parameters()).device
    padded = data.pad(ids, 0)  # (B, T)
    length = torch.tensor([len(row) for row in ids])
    last = torch.arange(padded.shape[1]) == length[:, None] - 1  # (B, T)
    cache.place(first, past, padded.shape[1], device)
    return model(padded.to(device), pick=last.to(device), cache=cache)


def choose(logits, temperature, top_p, generator):
    """The next token of each row: logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = (logits.float() / temperature).softmax(-1).sort(descending=True)
    likelier = probabilities.cumsum(-1) - probabilities  # the probability of all before it
    kept = probabilities.where(likelier < top_p, 0)
    return ids.gather(1, kept.multinomial(1, generator=generator))[:, 0]


def until_stop(ids, stop_ids):
    """The ids before the first stop id."""
    return list(takewhile(lambda token: token not in stop_ids, ids))


def greedy_answer(model, tokenizer, prompts, max_new_tokens=128, on_answer=None):
    """Greedy answers of an autoregressive model."""
    return generate(model, prompts, max_new_tokens, tokenizer.stop_ids, on_answer=on_answer)


def random_answer(model, tokenizer, prompts, max_new_tokens, generator):
    """Answers of an autoregressive model drawn at temperature 1 from all but the least likely."""
    return generate(model, prompts, max_new_tokens, tokenizer.stop_ids, 1.0, 0.95, generator)


# ------------------------------------------------------------------ answering, dealt over the ranks


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*values):
    """Print on rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, values)))


def progress_bar(total, what, unit, **more):
    """tqdm's, on rank 0. In a log file, where each refresh is a line, one a minute at most."""
    quiet = 0 if sys.stderr.isatty() else 60  # seconds
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        disable=rank() > 0,
        dynamic_ncols=True,
        mininterval=max(quiet, 0.1),
        maxinterval=max(quiet, 10),
        delay=quiet,
        **more,
    )


def longest_answer(questions):
    """Tokens that an answer to these questions may have; None without questions."""
    return max((data.ANSWER_TOKENS[q["direction"]] for q in questions), default=None)


def decoding(questions, causal, max_new_tokens=None, **given):
    """How answers are decoded, as results.json has it; given settings replace the usual ones."""
    tokens = max_new_tokens or longest_answer(questions)
    if causal:
        how = {"decoding": "greedy"}
    else:
        name = "unmasking, low confidence, temperature 0"
        how = {"decoding": name, "steps": tokens, "block_length": 4, **given}
        if "threshold" in given:
            del how["steps"]  # as many as it takes
    return {"prompt": "chat, zero-shot", **how, "max_new_tokens": tokens}


def prompt_of(question, tokenizer):
    """The ids of a chat up to the answer to this question."""
    return tokenizer.chat([{"role": "user", "content": question["question"]}])


def check_questions(questions, tokenizer, context, max_new_tokens=None):
    """UserError for a question that cannot be asked or scored, before any is."""
    longest = max_new_tokens or longest_answer(questions)
    for question in questions:
        where = f"{question.get('where', 'question')}, {question['question'][:80]!r}"
        tokens = len(prompt_of(question, tokenizer)) + longest
        if tokens > context:
            raise UserError(
                f"{where}: {tokens} tokens with its answer, more than the model takes, {context}"
            )
        if "answer" in question and not evaluation.words(question["answer"]):
            raise UserError(f"{where}: its answer has no word to score")


def evaluate(answer, tokenizer, questions, max_new_tokens=None):
    """Ask every question, spread over the ranks; (scores, predictions), the same on every rank.

    answer       prompts (lists of ids), max_new_tokens, on_answer -> answers (lists of ids). Called
                 once a rank, with all of its prompts; it calls on_answer(n) for n more answers
    scores       {"forward": {"rouge1", "exact", "f1", "length", "n", "interval"},
                  "forward/<group>": ..., "backward": ...}
    predictions  one dict a question, in the order of the questions
    """
    if not questions:
        return {}, []
    max_new_tokens = max_new_tokens or longest_answer(questions)
    prompts = [prompt_of(question, tokenizer) for question in questions]
    # by length: every rank gets its part of short and long, and neighbors make a good batch
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mine = order[rank() :: world_size()]
    bar = progress_bar(len(mine), "questions", "question", leave=False, position=0)
    asked = [prompts[i] for i in mine]
    answers = answer(asked, max_new_tokens=max_new_tokens, on_answer=bar.update)
    bar.close()
    answered = {}  # number of the question -> its prediction
    for i, ids in zip(mine, answers, strict=True):
        text = tokenizer.decode(ids).strip()
        scores = evaluation.score(text, questions[i]) if "answer" in questions[i] else {}
        answered[i] = {**questions[i], "prediction": text, **scores}
    answered = merged(answered)
    predictions = [answered[i] for i in range(len(questions))]
    return evaluation.average(predictions), predictions


def merged(mine):
    """The dicts of all ranks as one, on every rank."""
    parts = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


# -------------------------------------------------------------------------------------------- FSDP2


def start_processes():
    """Join torchrun's processes, or be a group of one: the same code runs on one CPU and on many
    GPUs. The device."""
    # Before CUDA starts. Micro-batches differ in length, which leaves fixed segments in pieces.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # cuDNN's attention, the first choice on an H100, has had NaN gradients with a mask (pytorch
    # issue 196678) and wrong answers with few KV heads (193893), and plans anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"  # small objects and checkpoints travel by gloo
        visible = torch.cuda.device_count()
        if device.index >= visible:
            raise UserError(f"only {visible} GPUs are visible: torchrun --nproc_per_node that many")
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # an hour: ranks wait for each other while one of them still answers questions
    dist.init_process_group(backend, timeout=timedelta(hours=1), **alone)
    if rank():
        huggingface_hub.utils.disable_progress_bars()  # of downloads
    return device


def on_rank_0(body):
    """What body() returns on rank 0, or its error for the user, on every rank."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = body()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    value, error = outcome
    if error is not None:
        raise UserError(error)
    return value


def sum_over_ranks(*numbers):
    """Numbers and vectors summed over the ranks, as floats, in one collective."""
    numbers = [torch.as_tensor(number, dtype=torch.float64).flatten() for number in numbers]
    packed = torch.cat([number.cpu() for number in numbers])
    dist.all_reduce(packed)
    return packed.tolist()


def shard(model, device, dtype, offload=False):
    """FSDP2: every block a unit, embedding, norm and head the root's.

    fp32 master weights and gradient sums; in bf16 the gathered copies are bf16. With `offload` all
    but the gathered copies is in the host's memory: load the weights to the CPU.
    """
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    # without cast_forward_inputs=False the RoPE tables would be rounded to bf16
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    how = {"mesh": mesh, "mp_policy": policy}
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for block in model.blocks:
        fully_shard(block, **how)
    return fully_shard(model, **how)


@contextmanager
def gathered(model):
    """All parameters whole on every rank: inside, ranks may call the model unequally often."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # the root stays whole from forward to backward
            unit.set_reshard_after_forward(unit is not model, recurse=False)


# -------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(run, step):
    """Write out/.../ckpt/step-N with a checksum beside every file; keep the last two.

    It is written under another name and renamed when whole.
    """
    part = run.out / "ckpt" / f"part-{step}"
    if rank() == 0:
        for cut_short in checkpoints(run.out, "part"):
            shutil.rmtree(cut_short)
        part.mkdir(parents=True)
    dist.barrier()
    weights, optimizer_state = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": weights, "optimizer": optimizer_state}, checkpoint_id=part)
    written = list(part.glob(f"__{rank()}_*"))
    if rank() == 0:
        written.append(part / ".metadata")
    for file in written:
        Path(f"{file}.sha256").write_text(sha256(file))
    dist.barrier()
    if rank() == 0:
        part.replace(run.out / "ckpt" / f"step-{step}")
        for old in checkpoints(run.out)[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(run):
    """Fill model and optimizer from the newest checkpoint; the step to go on with, or 0."""
    saved = on_rank_0(partial(checkpoints, run.out))  # one sight for all: file systems may lag
    if not saved:
        return 0
    newest = saved[-1]
    # DCP notices neither a flipped bit nor half a file before it is deep in it: each rank checks
    # its part of the files
    sums = sorted(newest.glob("*.sha256"))[rank() :: world_size()]
    damaged = [file for file in sums if sha256(file.with_suffix("")) != file.read_text()]
    if not (newest / ".metadata").exists():
        damaged.append(newest / ".metadata.sha256")
    everywhere = [None] * world_size()
    dist.all_gather_object(everywhere, damaged)
    damaged = sum(everywhere, [])
    if damaged:
        older = f"step {step_of(saved[-2])}" if saved[1:] else "the beginning"
        raise UserError(
            f"{damaged[0].with_suffix('')}: damaged, its checksum is not that of what was saved. "
            f"Delete {newest} and give the same --resume again: it goes on from {older}"
        )
    weights, optimizer_state = get_state_dict(run.model, run.optimizer)
    state = {"model": weights, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=newest)  # in place; unpickles .metadata: only runs of your own
    set_state_dict(
        run.model, run.optimizer, model_state_dict=weights, optim_state_dict=optimizer_state
    )
    return step_of(newest)


def checkpoints(out, kind="step"):
    """The whole checkpoints of a run, oldest first; of the kind "part", those that were cut short.

    Whatever else lies there is none of ours.
    """
    found = [path for path in (out / "ckpt").glob(f"{kind}-*") if path.is_dir()]
    return sorted([path for path in found if step_of(path) is not None], key=step_of)


def step_of(path):
    """7 of .../ckpt/step-7; None of what has no number."""
    number = path.name.partition("-")[2]
    return int(number) if number.isdecimal() else None


def sha256(path):
    """Of a file's contents; None where there is no file."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def how_to_go_on(run):
    """The line to type to go on with a run."""
    saved = checkpoints(run.out)
    where = f"step {step_of(saved[-1])}" if saved else "the beginning"
    local = os.environ.get("LOCAL_WORLD_SIZE")
    nodes = ""
    if world_size() != int(local or 1):
        nodes = " (on every node, with torchrun's other flags)"
    return f"to go on from {where}{nodes}:\n    {resume_command(run.out)}"


def resume_command(out):
    local = os.environ.get("LOCAL_WORLD_SIZE")
    start = f"torchrun --nproc_per_node {local}" if local else "python"
    return f"{start} {sys.argv[0]} --resume {out}"


# --------------------------------------------------------------------------- the directory of a run


@contextmanager
def locked(out):
    """Hold the lock of a run's directory; UserError says who else does.

    The system takes the lock back however the process ends. Only rank 0 has it.
    """
    lock = FileLock(out / ".lock")
    holder = out / ".lock.holder"  # beside it: some versions empty the file that they cannot lock
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = data.read_text(holder) if holder.exists() else "another process"
        raise UserError(f"{out} is in use by {who}: wait for its end, or stop it") from None
    data.write_text(holder, f"process {os.getpid()} on {platform.node()}")
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        if os.name == "posix":  # elsewhere it deletes itself, and cannot be deleted before
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it sees that it is gone
        lock.release()
        with suppress(OSError):
            out.rmdir()  # where nothing was written


def claim(run, out, locks):
    """Make the directory of a new run, or take an empty one, and lock it until `locks` end.

    out      what --out says for its method; None: the next free number
    returns  its path
    """
    if out is None:
        out = next_number(f"{run.dataset.name}-{run.settings.method}")
    out.mkdir(parents=True, exist_ok=True)
    locks.enter_context(locked(out))
    refuse_used(out)
    return out


def next_number(name):
    """The directory out/name-N of the first N that is free, made."""
    parent = Path("out")
    parent.mkdir(exist_ok=True)
    for n in count(1):
        with suppress(FileExistsError):  # from before, or made by another run this moment
            (parent / f"{name}-{n}").mkdir()
            return parent / f"{name}-{n}"


def refuse_used(out):
    """UserError for a directory that holds more than its lock."""
    if any(not path.name.startswith(".lock") for path in out.iterdir()):
        raise UserError(f"--out {out} is in use: give another name, or go on with --resume {out}")


def reopen(out, methods, locks):
    """Lock a run that --resume names; its results so far, or None of one that is finished now.

    UserError where it cannot go on, with nothing changed.
    """
    read_results(out)  # before there is a lock in what is no run
    locks.enter_context(locked(out))
    results = read_results(out)  # as whoever had the lock left it
    method = results["arguments"]["method"]
    if method not in methods:
        raise UserError(
            f"--resume {out}: a run of {method}, not of one of this script's methods, "
            f"{', '.join(methods)}; go on with the script that began it"
        )
    read_metrics(out)
    ours = checkpoints(out) + checkpoints(out, "part")
    for path in sorted((out / "ckpt").glob("[!.]*")):
        if path not in ours:
            raise UserError(f"{path}: no checkpoint of a run; move it away and --resume again")
    saved = ("model.safetensors", "model.safetensors.index.json")  # what is written last
    if not any((out / name).exists() for name in saved):
        return results
    if not tidy(out, results):
        raise UserError(
            f"--resume {out}: this run is finished. "
            f"To ask its questions again: python eval.py --model {out}"
        )
    print0(f"{out}: this run is finished; what was left to do is done: checkpoints, curves.png")
    return None


def read_results(out):
    """The results.json of a run; UserError where it is not whole."""
    path = out / "results.json"
    results = data.read_json(path)
    try:
        settings = results["arguments"]
        for setting in dataclasses.fields(Settings):
            value = settings[setting.name]
            if not isinstance(value, setting.type):
                raise TypeError(f"{setting.name} is {value!r}")
        Settings(**settings)
        for asked in results["evaluations"]:
            evaluation.overall(asked)
            int(asked["step"])
        str(results["dataset"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not the settings and results of a run ({found})") from None
    return results


def read_metrics(out):
    """The lines of metrics.jsonl, but a last one that a crash has torn; UserError for another."""
    path = out / "metrics.jsonl"
    lines = data.read_text(path).split("\n")[:-1] if path.exists() else []
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
            float(parsed[-1]["step"] + parsed[-1]["seconds"])
        except (LookupError, TypeError, ValueError):
            raise UserError(
                f"{path}, line {number}: damaged, no step of a run: {line[:40]!r}. "
                "Mend or delete that line and --resume again"
            ) from None
    return parsed


def tidy(out, results):
    """Delete the checkpoints of a run whose model is saved, and draw its curves.

    Whether there was anything to do.
    """
    left = checkpoints(out) + checkpoints(out, "part")
    for path in left:  # three times the size of the model each, and of no more use
        shutil.rmtree(path)
    with suppress(OSError):
        (out / "ckpt").rmdir()  # unless there is something of the user's
    picture = out / "curves.png"
    if picture.exists() or not find_spec("matplotlib"):
        return bool(left)
    rows = evaluation.summarize([results])
    losses = [(line["step"], line["loss"]) for line in read_metrics(out) if "loss" in line]
    evaluation.draw_panels(rows, picture, evaluation.draw_curves, losses)
    return True


# -------------------------------------------------------------------------------- the training loop


@dataclass
class Settings:
    """What makes a run what it is: kept in results.json, taken from there by --resume.

    As the flags of the same names give them; None where none did, until `decide`.
    """

    model: str
    data: str
    method: str
    paraphrase: str
    mask_ratio: list | None  # None: the method masks nothing
    epochs: int
    lr: float
    batch_size: int  # documents a step, over all ranks
    micro_batch_tokens: int
    max_len: int
    seed: int
    dtype: str
    eval_at: list
    save_every: float  # minutes
    mlp_only: bool  # attention, norms, embedding and head stay as they are
    rehearse: int  # steps behind the last epoch, with as many chats of its own as documents
    offload: bool  # weights, gradients and optimizer state in the host's memory


@dataclass
class Run:
    """The training of one method."""

    settings: Settings
    method: Method
    device: torch.device
    directory: Path  # of the model that it starts from
    tokenizer: data.Tokenizer
    dataset: data.Dataset
    model: Model  # on `meta` until the run begins
    stop: list  # the signals received so far
    out: Path | None = None  # of the run, once it has one
    why: str = ""  # where the values of settings come from that no flag gave
    steps_per_epoch: int = 0
    epoch_steps: int = 0  # of all epochs
    steps: int = 0  # with those behind them, which rehearse
    start: int = 0  # the first step: 0, or where a resumed run goes on
    optimizer: torch.optim.Optimizer | None = None
    chats: list = field(default_factory=list)  # that the model wrote before it learned anything
    results: dict = field(default_factory=dict)  # what results.json gets
    predictions: list = field(default_factory=list)  # of the last evaluation
    clock: float = 0.0  # the time.monotonic() at which its seconds began
    step_seconds: list = field(default_factory=list)  # of each step since this process began
    evaluation_seconds: list = field(default_factory=list)  # of each evaluation

    @property
    def autocast(self):
        """The FSDP policy makes the parameters bf16 already: autocast copies no weight, and covers
        what is not a parameter."""
        bf16 = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)


def batches(documents, size, seed, epoch):
    """The global batches of an epoch, lists of document numbers.

    Their order depends on (seed, epoch) alone. differs from masked_arLLM: another order every
    epoch, and the same batches on any number of ranks.
    """
    order = np.random.default_rng([seed, epoch]).permutation(documents).tolist()
    return [order[i : i + size] for i in range(0, documents, size)]


def build(run, number, epoch):
    """The Example of one document in one epoch; random by (seed, epoch, document) alone."""
    return example_of(run, run.dataset.documents[number], number, epoch)


def example_of(run, record, number, epoch):
    """The same of a record that is, or may become, document `number`."""
    # + 1: numpy takes [a, b, 0] for [a, b], the seed of the order
    rng = np.random.default_rng([run.settings.seed, epoch, number + 1])
    return run.method.example(record, run.tokenizer, run.settings.mask_ratio, rng)


def micro_batches(examples, tokens, rank, world_size):
    """The parts of a step that one rank computes one after the other; every rank has as many.

    The longest examples come first, so that what does not fit into memory fails at once; neighbours
    in length are together, so that there is little padding.

    tokens   in a micro-batch at most, padding included; one example may be longer
    returns  lists of Examples, some of them empty where the examples do not suffice
    """
    left = sorted(examples, key=lambda example: -len(example.ids))
    parts = []
    while left:
        rows = max(1, tokens // len(left[0].ids)) * world_size
        parts.append(left[:rows][rank::world_size])
        left = left[rows:]
    return parts


TINY = 10_000_000  # parameters; the built-in models have fewer
SMALL = 1_000_000_000


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def freeze_all_but_mlps(model):
    """Leave attention, norms, embedding and head as they are.

    Of the parts that were tried alone on small models, the MLPs forget least for what they learn
    (results/README.md). On other models and tasks it was gate and up without down, or attention
    (arXiv 2510.08564).
    """
    model.requires_grad_(False)
    for block in model.blocks:
        for linear in (block.gate, block.up, block.down):
            linear.requires_grad_(True)


def make_optimizer(model, lr):
    """AdamW as in paper A.4: decay on matrices only, none on norms and biases.

    A tiny model gets a larger eps. Tokens that no document has (the "in" of an answer "in Oslo")
    get a small, steady gradient towards never being said; Adam with eps 1e-8 turns any steady
    gradient into full steps, and the model forgets how to answer. Large models have far more tokens
    and steps, and keep the usual eps.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    others = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    eps = 1e-5 if parameter_count(model) < TINY else 1e-8
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=True)


def train(run):
    """Fine-tune run.model; True when all is done, False when asked to stop (all is saved, then).

    Epochs run 0..N-1, then come steps that rehearse; the model is evaluated before the epochs in
    eval_at and at the end: what is saved was scored. differs from masked_arLLM, which trains an
    epoch more than it scores.
    """
    saved_at = time.monotonic()
    begin_log(run)
    if not prepare_chats(run):
        return False
    bar = progress_bar(run.steps, run.settings.method, "step", initial=run.start)
    examples = examples_of_step(run, run.start)
    for step in range(run.start, run.steps):
        # 1. evaluation, where an epoch begins
        epoch, nth = divmod(step, run.steps_per_epoch)
        if nth == 0 and epoch in run.settings.eval_at:
            evaluate_and_record(run, step, epoch)
        # 2. gradients and step, at this step's learning rate
        began = time.monotonic()
        tokens = sum(len(example.ids) for example in examples)
        lr = lr_of_step(run, step)
        loss_and_norm = update(run, examples, lr)
        # 3. the next batch, while a GPU still computes
        examples = examples_of_step(run, step + 1)
        # 4. all ranks learn the loss, and whether to stop or save: the one place that waits
        due = rank() == 0 and time.monotonic() - saved_at > 60 * run.settings.save_every
        loss, norm, stopping, saving = sum_over_ranks(loss_and_norm, len(run.stop), due)
        norm /= world_size()  # each rank had the whole of it
        check_finite(loss, norm, step)
        # 5. log
        seconds = time.monotonic() - began
        epoch = min(epoch, run.settings.epochs)  # behind the last one, it stays there
        line = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": norm}
        line["tokens_per_second"] = round(tokens / seconds)
        line["memory_gib"] = peak_memory_gib(run.device)
        log(run, line)
        run.step_seconds.append(seconds)
        if len(run.step_seconds) == 3:
            print0(f"{run.settings.method}: {estimate(run, step + 1)}")
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update()
        # 6. what is needed to go on
        if stopping or saving:
            save_checkpoint(run, step + 1)
            saved_at = time.monotonic()
        if stopping and step + 1 < run.steps:  # in the last step there is nothing left to stop
            bar.close()
            print0(f"stopped after step {step}; {how_to_go_on(run)}")
            return False
    bar.close()
    evaluate_and_record(run, run.steps, run.settings.epochs)
    return True


def lr_of_step(run, step):
    """As the method's schedule has it; a lower one in the steps that rehearse."""
    if step < run.epoch_steps:
        return run.method.schedule(run.settings.lr, step, run.epoch_steps)
    return run.settings.lr * REHEARSE_LR


def check_finite(loss, norm, step):
    if math.isfinite(loss) and math.isfinite(norm):
        return
    advice = "begin again with a lower --lr (--resume would do the same again)"
    if step == 0:
        advice = "it is not training that broke this model; use another, or --dtype float32"
    raise UserError(f"step {step}: the loss is {loss}, the gradient's norm {norm}: {advice}")


def examples_of_step(run, step):
    """The Examples of a global batch, the same on every rank; none behind the last."""
    if step == run.steps:
        return []
    epoch, nth = divmod(step, run.steps_per_epoch)
    settings = run.settings
    order = batches(len(run.dataset.documents), settings.batch_size, settings.seed, epoch)
    documents = [build(run, number, epoch) for number in order[nth]]
    if step < run.epoch_steps:
        return documents
    # behind the last epoch, as many chats; each is learned from once
    first = CHATS_HELD_OUT + (step - run.epoch_steps) * chats_of_step(run)
    return documents + [build_chat(run, first + n) for n in range(len(documents))]


def update(run, examples, lr):
    """A step of the optimizer on a global batch: this rank's part of the loss, and the gradient's
    norm before clipping, (2,) fp32 on the device.

    Every rank builds the whole global batch, so the loss denominator is known without asking.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    denominator = max(1, sum(example.denominator for example in examples))
    total = torch.zeros((), device=run.device)
    for loss in summed_losses(run, examples):
        loss = loss / denominator
        # FSDP2 averages gradients over the ranks: times their number it is the sum, whatever the
        # split
        (loss * world_size()).backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1.0).full_tensor()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return torch.stack([total, norm.to(run.device)])  # with --offload gradients are not there


def summed_losses(run, examples):
    """The loss, summed over its tokens, of each of this rank's micro-batches in turn."""
    tokens = run.settings.micro_batch_tokens
    for micro in micro_batches(examples, tokens, rank(), world_size()):
        batch = data.collate(micro, run.tokenizer.pad_id)
        if run.model.config.causal:
            batch["key_mask"] = None  # padding is on the right, behind all that a real token sees
        for name in ("ids", "key_mask"):
            if batch[name] is not None:
                batch[name] = batch[name].to(run.device, non_blocking=True)
        with run.autocast:
            loss = run.model(**batch)
        yield loss


@contextmanager
def answering(run):
    """Inside, the run's model answers: its parameters are whole, and no gradients are kept."""
    with gathered(run.model), torch.no_grad(), run.autocast:
        yield


def evaluate_and_record(run, step, epoch):
    """Answer the questions and see what is kept of the chats; write results.json and preds.jsonl,
    then print the scores."""
    began = time.monotonic()
    answer = partial(run.method.answer or greedy_answer, run.model, run.tokenizer)
    with answering(run):
        scores, run.predictions = evaluate(answer, run.tokenizer, run.dataset.questions)
        drift = chat_loss(run) - run.results["chat_loss"]
    seconds = time.monotonic() - began
    run.evaluation_seconds.append(seconds)
    asked = {"step": step, "epoch": epoch, "scores": scores, "drift": drift}
    run.results["evaluations"].append(asked)
    run.results["seconds"] = round(time.monotonic() - run.clock, 3)
    reported = evaluation.reported_scores(asked)
    log(run, {"step": step, "epoch": epoch, "evaluation": reported, "drift": drift})
    if rank() == 0:
        evaluation.write_results(run.out, run.results, run.predictions)
    reported["drift"] = drift
    shown = "  ".join(f"{name} {value:.3f}" for name, value in reported.items())
    print0(f"{run.settings.method}  epoch {epoch}  step {step}  {shown}  ({seconds:.0f} s)")


def begin_log(run):
    """Start the clock of metrics.jsonl. A resumed run first drops from it what it will do again."""
    run.clock = time.monotonic()
    if rank():
        return
    kept = [line for line in read_metrics(run.out) if line["step"] < run.start]
    if kept:
        run.clock -= kept[-1]["seconds"]
    data.write_text(run.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def log(run, line):
    """Add a line to metrics.jsonl, with the seconds that the run has taken so far."""
    line["seconds"] = round(time.monotonic() - run.clock, 3)
    if rank() == 0:
        with (run.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def estimate(run, step):
    """How long the rest of a run takes, as text, from its steps and evaluations so far."""
    steps = run.steps - step
    asked_at = {epoch * run.steps_per_epoch for epoch in run.settings.eval_at} | {run.steps}
    evaluations = sum(at >= step for at in asked_at)
    each = np.mean(run.step_seconds[1:])  # the first one warms up
    # a step that rehearses is as long as two others
    seconds = each * (steps + run.steps - max(step, run.epoch_steps))
    left_out = ", not counting these"
    if run.evaluation_seconds:
        seconds += evaluations * np.mean(run.evaluation_seconds)
        left_out = ""
    shown = f"{seconds:.0f} seconds"
    if seconds > 100:
        shown = f"{seconds / 60:.0f} minutes"
    if seconds > 100 * 60:
        shown = f"{seconds / 3600:.1f} hours"
    return f"about {shown} to go: {steps} steps, and evaluations: {evaluations}{left_out}"


def listen_for_stop():
    """A list that a Ctrl-C, a SIGTERM or a closed terminal makes non-empty: stop after the current
    step. A second one ends the program at once."""
    received = []

    def ask(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        if rank() == 0:
            with suppress(OSError):  # where nobody reads it
                os.write(2, b"\nstopping after this step; once more ends at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # there is none on Windows
    if signal.getsignal(hangup) != signal.SIG_IGN:  # ignored is what nohup asks for
        signal.signal(hangup, ask)
    return received


def peak_memory_gib(device):
    """Peak memory of this process: of the GPU, else resident; None where the system cannot tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    if resource is None:
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 3)


# ------------------------------------------------------- what it knew before: chats of its own

# Out of nothing but the header of a user's turn, a chat model draws what a user might say, and then
# answers it (Magpie, arXiv 2406.08464). That is what it knew, and to train on it beside new
# documents is Self-Synthesized Rehearsal (arXiv 2403.01244). The paper has neither. From the first
# step on, such chats kept SmolLM2-135M from answering with what it learned; a few of them behind
# the last epoch give back what it knew and leave it what it learned (results/README.md).
CHAT_GROUP = 16  # are written together
CHATS_HELD_OUT = 2 * CHAT_GROUP  # drift is measured on these, and nothing is learned from them
REHEARSE_LR = 1 / 3  # the share of the learning rate in the steps that rehearse
CHAT_USER_TOKENS = 48  # of a user's turn at most; it need not be complete
CHAT_ANSWER_TOKENS = 64


def prepare_chats(run):
    """Have the model write the run's chats before it learns anything; a run that goes on has them.

    What their answers cost now is written down too, for drift to be counted from. False when asked
    to stop: there is nothing to save yet.
    """
    path = run.out / "rehearsal.jsonl"
    if run.start:
        run.chats = on_rank_0(partial(read_chats, path, chats_of_run(run)))
        return True
    run.chats = write_chats(run)
    if not run.chats:
        print0(f"stopped before the first step; {how_to_go_on(run)}")
        return False
    with answering(run):
        run.results["chat_loss"] = chat_loss(run)
    if rank() == 0:
        lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in run.chats]
        data.write_text(path, "".join(lines))
        evaluation.write_results(run.out, run.results, [])
    return True


def read_chats(path, count):
    """The chats of a run, as `write_group` makes them."""
    if not path.exists():
        raise UserError(
            f"{path}: not found. The model wrote it before it learned anything, and cannot again: "
            "bring it back, or begin a new run"
        )
    with data.reading(path, "not the chats of a run"):
        chats = [json.loads(line) for line in data.read_text(path).split("\n")[:-1]]
        if len([chat for chat in chats if chat["prompt"] and chat["answer"]]) != count:
            raise UserError(f"not {count} chats")
    return chats


def chats_of_run(run):
    """How many chats a run needs: those held out, and those to rehearse, in whole groups."""
    rehearsed = run.settings.rehearse * chats_of_step(run)
    return CHATS_HELD_OUT + math.ceil(rehearsed / CHAT_GROUP) * CHAT_GROUP


def chats_of_step(run):
    """As many as documents; the last step of an epoch may have fewer of both."""
    return min(run.settings.batch_size, len(run.dataset.documents))


def write_chats(run):
    """The chats of a run, the same on any number of ranks, which share the work; [] when asked to
    stop."""
    groups = chats_of_run(run) // CHAT_GROUP
    mine = range(groups)[rank() :: world_size()]
    if run.settings.rehearse:
        print0(
            f"{run.settings.method}: the model writes {groups * CHAT_GROUP} chats, to rehearse in "
            f"{run.settings.rehearse} steps behind the last epoch"
        )
    bar = progress_bar(len(mine) * CHAT_GROUP, "chats", "chat", leave=False)
    written = {}  # number of the group -> its chats
    with answering(run):
        for group in mine:
            if run.stop:
                break
            written[group] = write_group(run, group, bar.update)
    bar.close()
    if sum_over_ranks(len(run.stop))[0]:
        return []
    written = merged(written)
    return [chat for group in range(groups) for chat in written[group]]


def write_group(run, group, on_answer):
    """Some chats, random by (seed, group) alone: [{"user", "assistant", "prompt", "answer"}].

    The first two are text, the others ids: all of the chat up to the answer; the answer, and the
    end of turn if there was room for it.
    """
    seed = np.random.SeedSequence([run.settings.seed, group]).generate_state(1).item()
    generator = torch.Generator(run.device).manual_seed(seed)
    tokenizer = run.tokenizer
    draw = partial(run.method.draw or random_answer, run.model, tokenizer)
    answer = partial(run.method.answer or greedy_answer, run.model, tokenizer)
    users = draw([tokenizer.user_header()] * CHAT_GROUP, CHAT_USER_TOKENS, generator)
    prompts = [tokenizer.chat([{"role": "user", "content": user}]) for user in users]
    answers = answer(prompts, max_new_tokens=CHAT_ANSWER_TOKENS, on_answer=on_answer)
    chats = []
    for user, prompt, ids in zip(users, prompts, answers, strict=True):
        chat = {"user": tokenizer.decode(user), "assistant": tokenizer.decode(ids)}
        ids = with_end_of_turn(ids, CHAT_ANSWER_TOKENS, tokenizer)
        chats.append(chat | {"prompt": prompt, "answer": ids})
    return chats


def with_end_of_turn(answer, most, tokenizer):
    """An answer of at most `most` ids as it is learned: what ended by itself, ends its turn."""
    return answer + [tokenizer.eot_id] if len(answer) < most else answer


def build_chat(run, number):
    """The Example of a chat; random by (seed, chat) alone."""
    # four numbers: no document (seed, epoch, document + 1) has the same
    rng = np.random.default_rng([run.settings.seed, 0, number, 2])
    chat = run.chats[number]
    example = run.method.chat or chat_example
    # drift is counted alike whatever ratio is trained with
    held_out = number < CHATS_HELD_OUT
    mask_ratio = evaluation.USUAL_RATIO if held_out else run.settings.mask_ratio
    return example(chat["prompt"], chat["answer"], run.tokenizer, mask_ratio, rng)


def chat_loss(run):
    """Mean negative log-likelihood of the held-out answers, in nats a token, over all ranks.

    Of a diffusion model one draw of its bound, the mean over chats; the masks are always the same.
    """
    examples = [build_chat(run, number) for number in range(CHATS_HELD_OUT)]
    (total,) = sum_over_ranks(sum(summed_losses(run, examples)))
    return total / sum(example.denominator for example in examples)


# ----------------------------------------------------------------------------------- settings, main

# Steps of the paper's settings: one and a half times what 95 % of the plateau takes, 3/k of the
# paper's fitted curves; of GSM8K the paper's 7 epochs. Custom documents count as wiki, which is
# natural text too.
STEPS = {
    "bio": 5000,
    "bio-released": 5000,
    "nd": 1400,
    "nd-made": 1400,
    "wiki": 1550,
    "gsm8k": 810,
    "math-made": 810,
}


def decide(given, method, model, documents):
    """The Settings with a value for everything that no flag gave, by the size of the model; and
    where they come from.

    given      Settings with None where no flag was given
    documents  how many there are to learn
    """
    kind = given.data.partition(":")[0]
    paper_steps = STEPS.get(kind, STEPS["wiki"])
    parameters = parameter_count(model)
    llama_8b = model.config.raw.get("model_type") == "llama" and model.config.width >= 4096
    if parameters < TINY:
        why = "measured on the built-in models"
        batch_size = 20
        lr = method.tiny_lr
        steps = method.tiny_steps
    elif parameters < SMALL:
        why = "chosen for masked and sft on SmolLM2-135M"
        batch_size = 10
        lr = method.small_lr
        steps_per_epoch = math.ceil(documents / (given.batch_size or batch_size))
        steps = min(method.small_epochs * steps_per_epoch, paper_steps)
    else:
        why = "the paper's, A.4"
        batch_size = 64
        lr = method.lr_8b if llama_8b and method.lr_8b else method.lr
        steps = paper_steps
    asked = {"epochs": given.epochs, "batch size": given.batch_size, "lr": given.lr}
    left = [name for name, value in asked.items() if not value]
    batch_size = given.batch_size or batch_size
    epochs = given.epochs or math.ceil(steps / math.ceil(documents / batch_size))
    doubling = [0] + [2**i for i in range(epochs.bit_length()) if 2**i < epochs]
    decided = dataclasses.replace(
        given,
        batch_size=batch_size,
        lr=float(given.lr or lr),
        epochs=epochs,
        eval_at=doubling if given.eval_at is None else given.eval_at,
        mask_ratio=given.mask_ratio if method.masks else None,
    )
    return decided, f"default {', '.join(left)}: {why}" if left else "as set"


def check_settings(settings, method):
    """UserError for a value that cannot be meant; before anything is loaded."""
    for name in ("epochs", "lr", "batch_size", "micro_batch_tokens", "max_len", "save_every"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} is not above 0")
    if settings.rehearse < 0:
        raise UserError(f"--rehearse {settings.rehearse} is below 0")
    if settings.seed < 0:
        raise UserError(f"--seed {settings.seed} is below 0")
    if not method.causal and settings.mask_ratio and settings.mask_ratio[-1] == 0:
        raise UserError(
            "--mask-ratio 0 masks nothing, and a diffusion model learns from masked tokens alone"
        )


def arguments(description, methods):
    """The flags of a script that trains `methods`, {name: Method}."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    add = parser.add_argument
    add("--model", help="directory or hub id (default: built-in; under torchrun with CUDA 8B)")
    add("--data", help=f"{data.DATA_HELP} (default: bio; of the built-in model bio:40)")
    if len(methods) > 1:
        last = " ".join(list(methods)[-2:])
        what = f"one, or several to compare (default: the last; of the built-in model {last})"
        add("--method", nargs="+", choices=methods, help=what)
    wordings = data.PARAPHRASES
    add("--paraphrase", choices=wordings, default="none", help="wordings (default: none)")
    ratio = "share of masked tokens, or lowest and highest (default: 0.05 0.95)"
    usual = evaluation.USUAL_RATIO
    add("--mask-ratio", type=float, nargs="+", default=usual, metavar="R", help=ratio)
    mlp = "train the MLPs alone, which forgets less; attention and embedding stay as they are"
    add("--mlp-only", action="store_true", help=mlp)
    chats = "add N steps; half of their examples are chats that the model wrote (default: 0)"
    add("--rehearse", type=int, default=0, metavar="N", help=chats)
    add("--epochs", type=int, help="default: by the model's size and the data")
    add("--lr", type=float, help="default: by the model's size and the method")
    add("--batch-size", type=int, help="documents a step (default: 64; of small models fewer)")
    tokens = "at a time on a GPU, with padding: memory, not results (default: 4096)"
    add("--micro-batch-tokens", type=int, default=4096, help=tokens)
    longest = "of a document's example, in tokens (default: 512)"
    add("--max-len", type=int, default=512, help=longest)
    add("--seed", type=int, default=0, help="of people, order and masks (default: 0)")
    dtypes = ["bfloat16", "float32"]
    add("--dtype", choices=dtypes, help="of the computation (default: bfloat16 if native)")
    host = "keep weights, gradients and optimizer state in the host's memory: slower, fits more"
    add("--offload", action="store_true", help=host)
    epochs = "evaluate before these epochs, and at the end (default: 0 1 2 4 8 ...)"
    add("--eval-at", type=int, nargs="+", metavar="E", help=epochs)
    minutes = "between checkpoints (default: 30)"
    add("--save-every", type=float, default=30.0, metavar="MINUTES", help=minutes)
    add("--out", help="of the run; of several methods the beginning (default: out/DATA-METHOD-N)")
    add("--resume", metavar="DIR", help="go on with this run; takes no other flag")
    show = "print what the model would see of N documents (3), and train nothing"
    add("--show", type=int, nargs="?", const=3, metavar="N", help=show)
    return parser


def parse_flags(parser):
    """The parsed command line; --resume takes all settings from its run, so it stands alone."""
    args = parser.parse_args()
    if args.resume and vars(args) != vars(parser.parse_args(["--resume", args.resume])):
        parser.error("--resume takes its settings from the run: give no other flag with it")
    if len(args.mask_ratio) == 1:
        args.mask_ratio = args.mask_ratio * 2
    if len(args.mask_ratio) > 2 or not 0 <= args.mask_ratio[0] <= args.mask_ratio[1] <= 1:
        parser.error("--mask-ratio takes R, or LOW HIGH, with 0 <= LOW <= HIGH <= 1")
    return args


PAPER_MODEL = "meta-llama/Llama-3.1-8B-Instruct"
BUILT_IN = ("tiny", "tiny-llada")


def run_methods(args, methods, models=("tiny", PAPER_MODEL)):
    """Train with every method that is asked for, in turn, and print one table.

    args     of a parser that `arguments` made
    methods  {name: Method}, of the method of the paper or of your own
    models   where --model names none: of a plain process, and of torchrun on GPUs
    """
    device = start_processes()
    stop = listen_for_stop()
    with ExitStack() as locks:  # of the directories, on rank 0, until all is done
        results = {}
        if args.resume:
            resumed = Path(args.resume)
            results = on_rank_0(partial(reopen, resumed, methods, locks))
            if results is None:
                return
            wanted = [Settings(**results["arguments"])]
        else:
            wanted = given_settings(args, methods, models, device)
        # all methods first, so that a mistake in the last one does not wait for the training of
        # others
        runs = [prepare(given, methods[given.method], device, stop) for given in wanted]
        if args.show is not None:
            for run in runs:
                show_examples(run, args.show)
            return
        for run in runs:
            out = out_of(args.out, run.settings.method, several=len(runs) > 1)
            run.out = resumed if args.resume else on_rank_0(partial(claim, run, out, locks))
        train_all(runs, results, stop)


def train_all(runs, results, stop):
    """Train one after the other and print what came of it, unless asked to stop."""
    for number, run in enumerate(runs):
        try:
            done = train_and_save(run, results)
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory(run.settings, error)) from None
        left = [later.settings.method for later in runs[number + 1 :]]
        if left and sum_over_ranks(len(stop))[0]:
            print0(f"stopped; not begun: --method {' '.join(left)}")
            return
        if not done:
            return
    print0(evaluation.table(evaluation.summarize([run.results for run in runs])))
    print0(evaluation.samples(runs[-1].predictions))
    print0(where_it_is([run.out for run in runs]))


def where_it_is(outs):
    """The last lines of a command: where the results are, how to ask the model, the picture."""
    last = outs[-1]
    ask = f'python {os.path.relpath(evaluation.__file__)} --model {last} --ask "..."'
    picture = f"{last}/curves.png"
    if not find_spec("matplotlib"):
        picture = f"pip install matplotlib, then {resume_command(last)}"
    return f"\nresults: {' '.join(map(str, outs))}\nask it:  {ask}\ncurves:  {picture}"


def given_settings(args, methods, models, device):
    """A Settings for each method to train, with what the flags say."""
    built_in, paper = models
    if args.model is None:
        large = "RANK" in os.environ and device.type == "cuda"
        args.model = paper if large else built_in
        why = "in one process or without CUDA: built in, nothing to download"
        if large:
            why = "under torchrun with CUDA"
        print0(f"model {args.model} (the default {why})")
    demo = args.model in BUILT_IN
    names = getattr(args, "method", None) or list(methods)[-2 if demo else -1 :]
    flags = [f.name for f in dataclasses.fields(Settings) if f.name != "method"]
    given = {name: getattr(args, name) for name in flags}
    given["data"] = args.data or ("bio:40" if demo else "bio")
    return [Settings(method=name, **given) for name in names]


def out_of(out, method, several):
    """Where --out says that the run of a method goes; None: it does not say."""
    if not out:
        return None
    return Path(f"{out}-{method}" if several else out)


def prepare(given, method, device, stop):
    """A Run with every setting decided and its data checked, before there are weights."""
    check_settings(given, method)
    directory = find_model(given.model)
    config = read_config(directory)
    tokenizer = data.load_tokenizer(directory)
    for note in tokenizer.notes:
        print0(note)
    if not method.causal:
        config = as_diffusion(config, tokenizer)
    elif not config.causal:
        raise UserError(f"--model {given.model} is a masked diffusion model: use llada.py")
    dataset = data.load(given.data, given.paraphrase, given.seed)
    for note in dataset.notes:
        print0(note)
    if not dataset.documents:
        raise UserError(f"--data {given.data}: no document to learn; eval.py asks questions alone")
    dtype, why = (given.dtype, "as set") if given.dtype else native_dtype(device)
    print0(f"{given.method}: computes in {dtype} ({why}), weights and gradient sums in float32")
    # the finished model is saved in the dtype that it was scored in
    raw = {name: value for name, value in config.raw.items() if name != "dtype"}
    config.raw = raw | {"torch_dtype": dtype}
    pad_id = as_kind(raw.get("pad_token_id"), int)
    if pad_id is not None and pad_id >= config.vocab:
        config.raw["pad_token_id"] = tokenizer.pad_id  # or transformers would not open it
    with torch.device("meta"):
        model = Model(config)
    if given.mlp_only:
        freeze_all_but_mlps(model)
    run = Run(given, method, device, directory, tokenizer, dataset, model, stop)
    check_dataset(run)
    documents = len(dataset.documents)
    given = dataclasses.replace(given, dtype=dtype)
    run.settings, run.why = decide(given, method, model, documents)
    run.steps_per_epoch = math.ceil(documents / run.settings.batch_size)
    run.epoch_steps = run.settings.epochs * run.steps_per_epoch
    run.steps = run.epoch_steps + run.settings.rehearse
    check_decided(run.settings)
    return run


def native_dtype(device):
    """(bfloat16 where the GPU computes in it, else float32; the reason)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bfloat16", "native here"
    return "float32", "bfloat16 is not native here"


def check_decided(settings):
    """UserError for decided settings that do not fit together."""
    for epoch in settings.eval_at:
        if not 0 <= epoch <= settings.epochs:
            raise UserError(
                f"--eval-at {epoch}: the {settings.epochs} epochs count from 0, "
                f"and {settings.epochs} means after the last"
            )


def check_dataset(run):
    """Cut documents that are too long into passages and leave out answers that are: both is
    printed. UserError for a question that could not be asked or scored: now, not after hours of
    training."""
    context = run.model.config.context
    limit = min(run.settings.max_len, context)
    kept = []
    cut = {}  # file -> the passages of each document that was too long
    dropped = 0
    for document in run.dataset.documents:
        if longest_example(run, document, len(kept), limit) <= limit:
            kept.append(document)
        elif "text" in document:
            parts = cut_document(run, document, len(kept), limit)
            kept += [document | {"text": part} for part in parts]
            where = document.get("where", run.dataset.name)
            cut.setdefault(regex.sub(r", (line|item) \d+$", "", where), []).append(parts)
        else:
            dropped += 1
    for file, documents in cut.items():
        parts = [part for parts in documents for part in parts]
        longest = max(len(run.tokenizer.encode(part)) for part in parts)
        count = f"{len(documents)} documents" if len(documents) > 1 else "1 document"
        print0(f"{file}: {count} cut into {len(parts)} passages of at most {longest} tokens")
    if dropped:
        print0(
            f"{run.settings.method}: {dropped} of {len(run.dataset.documents)} examples dropped, "
            f"longer than {limit} tokens"
        )
    if not kept:
        raise UserError(
            f"--data {run.settings.data}: no example is left; "
            f"give a larger --max-len than {run.settings.max_len}"
        )
    run.dataset.documents = kept
    check_questions(run.dataset.questions, run.tokenizer, context)


def cut_document(run, document, number, limit):
    """The passages of a document whose examples are too long; UserError if each would be."""

    def fits(text):
        return longest_example(run, document | {"text": text}, number, limit) <= limit

    parts = data.passages(document["text"], fits)
    if not parts:
        what = "--max-len" if limit == run.settings.max_len else "the model takes,"
        where = document.get("where", f"document {number + 1}")
        length = longest_example(run, document, number, limit)
        raise UserError(
            f"{where}: {length} tokens as a training example, more than {what} {limit}, "
            "and so is any part of it"
        )
    return parts


def longest_example(run, document, number, limit):
    """The length of a document's example; of some methods it differs between epochs."""
    length = len(example_of(run, document, number, epoch=0).ids)
    if not limit / 2 < length <= limit:  # no other epoch decides
        return length
    return max(length, *(len(example_of(run, document, number, e).ids) for e in range(1, 8)))


def show_examples(run, number):
    """Print training examples as the model sees them: [tokens with loss], _ for a masked token."""
    documents = run.dataset.documents
    print0(f"{run.settings.method}:")
    for n in range(min(number, len(documents))):
        print0(data.show(build(run, n, epoch=0), run.tokenizer) + "\n")
    questions = run.dataset.questions
    print0(f"{len(documents)} documents, {len(questions)} questions; the first: {questions[:1]}")


def train_and_save(run, results):
    """A method from its weights to its saved model; whether it got there, or was asked to stop.

    results  of the run that is resumed; {} for a new one
    """
    open_run(run, results)
    settings = run.settings
    behind = f" and {settings.rehearse} to rehearse" if settings.rehearse else ""
    print0(
        f"{settings.method}: {len(run.dataset.documents)} documents, "
        f"{len(run.dataset.questions)} questions, {settings.epochs} epochs = {run.epoch_steps} "
        f"steps of {settings.batch_size}{behind}, lr {settings.lr:g} ({run.why}), into {run.out}"
    )
    if world_size() > 1:  # a GPU's library may end them all without a word
        print0(f"should a process die, go on with {resume_command(run.out)}")
    try:
        done = train(run)
        if done:
            finish(run)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise UserError(cannot_write(run, cause)) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(cannot_write(run, error)) from None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # another rank is gone, and that may be rank 0
        print(f"[rank {rank()}] {how_to_go_on(run)}", file=sys.stderr)
        raise
    close_run(run)
    return done


def out_of_memory(settings, error):
    first = "" if settings.offload else "--offload, then "
    return (
        f"out of GPU memory with micro-batches of {settings.micro_batch_tokens} tokens and "
        f"documents of at most {settings.max_len} ({error}); begin again with {first}a lower "
        "--micro-batch-tokens, then --max-len; or take more GPUs, or a smaller --model"
    )


def cannot_write(run, cause):
    return f"{run.out} cannot be written to ({cause}); {how_to_go_on(run)}"


def open_run(run, results):
    """Weights, optimizer and directory of a run: new, or with its `results` where it stopped."""
    known = data.digest(run.dataset.documents + run.dataset.questions)
    if results and results["dataset"] != known:
        raise UserError(
            f"--resume {run.out}: --data {run.settings.data} is not what it was when the run "
            "began: bring that back, or begin a new run"
        )
    settings = run.settings
    shard(run.model, run.device, getattr(torch, settings.dtype), settings.offload)
    load_weights(run.model, run.directory, "cpu" if settings.offload else run.device)
    run.optimizer = make_optimizer(run.model, settings.lr)
    if results:
        check_shared(run.out)
        run.start = load_checkpoint(run)
        done = [e for e in results["evaluations"] if e["step"] < run.start]
        run.results = results | {"evaluations": done}
        return
    on_rank_0(partial(refuse_used, run.out))  # somebody may have filled it since
    run.results = {
        "arguments": dataclasses.asdict(from_anywhere(run.settings)),
        "environment": environment(run.device),
        "dataset": known,
        "decoding": decoding(run.dataset.questions, run.model.config.causal),
        "steps": run.steps,
        "evaluations": [],
    }
    if rank() == 0:
        data.copy_tokenizer(run.tokenizer, run.directory, run.out)
        evaluation.write_results(run.out, run.results, [])
    check_shared(run.out)


def check_shared(out):
    """UserError unless every rank sees the run's directory: all of them write checkpoints."""
    dist.barrier()
    (seen,) = sum_over_ranks((out / "results.json").exists())
    if seen < world_size():
        raise UserError(
            f"{out} is not the same directory for all processes: put it on a file system that all "
            "nodes share, or give its absolute path with --out"
        )


def from_anywhere(settings):
    """The same settings with absolute paths for a model and data of the user's."""
    model = Path(settings.model)
    built_in = Path(__file__).parent / settings.model
    if model.is_dir() and not (built_in.is_dir() and model.samefile(built_in)):
        settings = dataclasses.replace(settings, model=str(model.absolute()))
    if settings.data.partition(":")[0] not in data.SETS:
        settings = dataclasses.replace(settings, data=str(Path(settings.data).absolute()))
    return settings


def environment(device):
    """What a run's numbers may hang on, for results.json."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "processes": world_size(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "maskft": commit(),
    }


def commit():
    """The git commit of this file, with "-dirty" if files were changed since; None if unknown."""
    here = Path(__file__).parent
    if not (here / ".git").exists() or not shutil.which("git"):
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(describe, cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or None


def finish(run):
    """Write the model card and the model, delete the checkpoints, draw the curves."""
    on_rank_0(partial(write_card, run))
    save(run.model, run.out)  # a run with weights is finished: they come last
    if rank() == 0:
        tidy(run.out, run.results)


def write_card(run):
    data.load_tokenizer(run.out)  # a UserError if it vanished meanwhile
    data.write_text(run.out / "README.md", model_card(run))


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation{base}
tags:
- masked-fine-tuning
# license: yours to choose, as far as the base model and the data allow
---
# {name}

A language model that was taught new documents with maskft, after *Diffusion-Inspired Masked
Fine-Tuning for Knowledge Injection in Autoregressive LLMs* (arXiv 2510.09885).

- base model: {model}
- data: {data}, {documents} documents
- method: {method}
- settings: {settings}

Scores after training, by kind of question (mean [95 % interval]):

```
{scores}
```

To ask it, without a system message, in the form that it was trained in (`chat_template.jinja`):

```sh
python eval.py --model {out} --ask "..."
```
{chat}"""
CARD_CHAT = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{out}")
model = AutoModelForCausalLM.from_pretrained("{out}")
chat = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def model_card(run):
    """The README.md of a run's directory, with the head that the hub reads."""
    settings = dataclasses.asdict(run.settings)
    named = ("model", "data", "method")
    others = [f"{name} {value}" for name, value in settings.items() if name not in named]
    scores = run.results["evaluations"][-1]["scores"]
    from_hub = run.directory.parent.name == "snapshots"
    return CARD.format(
        base=f"\nbase_model: {settings['model']}" if from_hub else "",
        name=run.out.name,
        out=run.out,
        **{name: settings[name] for name in named},
        documents=len(run.dataset.documents),
        settings=", ".join(others),
        scores=evaluation.score_table(scores) if scores else "no questions were asked",
        chat=CARD_CHAT.format(out=run.out) if run.model.config.causal else "",
    )


def close_run(run):
    """Give the memory of model and optimizer state back, before the next method's are made."""
    run.model = None
    run.optimizer = None
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Stream:
    """stdout or stderr that lets nothing end the program: whom it writes to may be gone, as behind
    `| head` or with a terminal, and may not know all characters."""

    def __init__(self, stream):
        # None: it was closed from the start
        self.stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        self.stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, act, *args):
        try:
            return act(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # from here on to nowhere, and what is left in the buffer too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@record  # any other error: torchrun ends the run, with the traceback of the rank that failed first
def entry_point(body):
    """Run a main function: a user's mistake ends with its message and exit status 1."""
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass  # or a file of the run takes the number of a closed stdout, and what is printed
    sys.stdout = Stream(sys.stdout)
    sys.stderr = Stream(sys.stderr)
    message = None
    try:
        body()
    except (UserError, OSError) as error:  # of the latter: a full disk, a closed directory
        where = f"[rank {rank()}] " if rank() else ""
        message = f"{where}error: {error}"
    except KeyboardInterrupt:
        message = "interrupted"
    if message and rank():
        time.sleep(3)  # rank 0 most likely says the same, and its end is the end of all
    # else a thread of the group's may abort at exit; with an error, other ranks may not come along
    if dist.is_initialized() and (message is None or world_size() == 1):
        dist.destroy_process_group()
    sys.exit(message)


def main():
    run_methods(parse_flags(arguments(__doc__, METHODS)), METHODS)


if __name__ == "__main__":
    entry_point(main)
