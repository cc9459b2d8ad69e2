"""Masked fine-tuning: teach a language model new facts by having it recover masked documents.

    python maskft.py                                   # laptop: ordinary against masked, on tiny/
    torchrun --nproc_per_node 8 maskft.py --data bio   # eight GPUs: Llama-3.1-8B, paper's settings
    python maskft.py --resume out/bio-masked-1         # go on where a run stopped

The method is *Diffusion-Inspired Masked Fine-Tuning for Knowledge Injection in Autoregressive
LLMs* (arXiv 2510.09885); "paper" below means that one, and masked_arLLM its released code. The
file reads from top to bottom: the paper (masking and loss), methods, config, model, weights,
generation, answering, FSDP2, checkpoints, a run's directory, the training loop, what comes behind
the last epoch, settings, main.
"""

import argparse
import gc
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import huggingface_hub
import numpy as np
import regex
import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout  # comes with torch
from huggingface_hub.utils import tqdm
from torch import nn
from torch.distributed.elastic.multiprocessing import errors as elastic
from torch.utils.checkpoint import checkpoint

import data
import eval as evaluation
from data import DATA_HELP, IGNORE, PARAPHRASES, SETS, Example, UserError

# Dimension names in shape comments: B batch, T sequence, S keys seen by attention (T, or the
# cache's length), D width, H heads, G key/value heads, K head size, F MLP width, V vocabulary, N
# positions that were picked out of B x T.

# ------------------------------------------------------------------ the paper: masking and the loss

RECOVER = "\nReturn the recovered masked passage."  # behind the masked document [paper A.4]
LEAD_IN = "Here is the recovered text:\n\n"  # before the document it recovers; no loss on it
RECOVER_ANSWER = "Question:\n{}\nAnswer:\n"  # before the masked answer of a problem
RETURN_ANSWER = "\nReturn the recovered masked answer."  # behind it
TELL = "Tell me a fact."  # the user's turn of ordinary fine-tuning


def mask_tokens(ids, ratio, mask_id, rng):
    """Replace each id by mask_id with probability `ratio`, independently.

    Returns the new ids and which of them are masked, (T,) bool.
    """
    masked = rng.random(len(ids)) < ratio
    return np.where(masked, mask_id, ids).tolist(), masked


def labels_of(prompt, target, masked):
    """The labels of prompt and target: loss where the target is masked."""
    return [IGNORE] * len(prompt) + np.where(masked, target, IGNORE).tolist()


def masked_example(record, tokenizer, mask_ratio, rng, mask=mask_tokens):
    """Masked fine-tuning [paper eq. 2]: the masked document in the prompt, the original behind it.

    Of a question with its answer, the answer is masked [paper, math]. `mask` is what masks: pass
    another function with the arguments of `mask_tokens` for another masking.
    """
    original = tokenizer.encode(target_of(record))
    # 1. a ratio, t ~ U(lowest, highest), drawn anew every time the document is seen
    # differs from masked_arLLM: not one per batch on every rank
    ratio = rng.uniform(*mask_ratio)
    # 2. each token masked with that probability
    shown, masked = mask(original, ratio, tokenizer.mask_id, rng)
    # 3. a chat that recovers it
    if "question" not in record:
        return recover_document(shown, original, tokenizer)
    question = RECOVER_ANSWER.format(record.get("problem", record["question"]))
    user = tokenizer.encode(question) + shown + tokenizer.encode(RETURN_ANSWER)
    # loss on the tokens whose counterpart in the prompt is masked; the end of turn has none
    return supervise(tokenizer.prompt(user), original, masked)


def recover_document(shown, document, tokenizer):
    """`shown` in the user's turn, `document` in the assistant's, both ids of one length.

    The loss is on every token of the document, masked or not, and on the end of turn behind it.
    """
    user = shown + tokenizer.encode(RECOVER)
    prompt = tokenizer.prompt(user)
    return supervise(prompt + tokenizer.encode(LEAD_IN), document + [tokenizer.eot_id])


def supervise(prompt, target, masked=True):
    """An Example with loss on the tokens of `target`, on all or where it is masked, and none on
    `prompt`."""
    labels = labels_of(prompt, target, masked)
    labels[0] = IGNORE  # nothing before it predicts it
    supervised = len(labels) - labels.count(IGNORE)
    return Example(prompt + target, labels, weight=1.0, denominator=supervised)


# no dropout here, so there is no state of random numbers to keep
recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
CHUNK = 1024  # rows of logits in memory at a time: (1024, 128k) fp32 is half a GB


def loss_sum(x, norm, head, labels, weights):
    """Weighted sum of cross entropies at N positions; the caller divides by the loss denominator.

    x (N, D) before the final norm, head (V, D), labels (N,), weights (N,) -> scalar fp32. The
    logits are made chunk by chunk, and again in backward but for the last, so (N, V) never exists.
    N = 0 gives 0 and zero gradients, never NaN: a rank without a label takes part in every
    collective like the others. `Model.forward` shifts the labels, `losses` divides.
    """

    def chunk_loss(x, labels, weights):
        logits = F.linear(norm(x), head)  # (CHUNK, V)
        return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()

    rows = [values.split(CHUNK) for values in (x, labels, weights)]
    *chunks, last = zip(*rows, strict=True)  # N = 0: one chunk, of no rows
    total = sum(recompute(chunk_loss, *chunk) for chunk in chunks)
    return total + chunk_loss(*last)  # not made again: backward begins with it


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
    return supervise(*as_chat(record, tokenizer))


def chat_example(prompt, answer, tokenizer, mask_ratio, rng):
    """As `sft`, of ids: of a chat that the model wrote before it learned anything new."""
    return supervise(prompt, answer)


def as_chat(record, tokenizer):
    """The ids of a prompt and of what is said to it, with the end of turn."""
    user = record.get("question", TELL)
    return tokenizer.prompt(user), tokenizer.encode(target_of(record)) + [tokenizer.eot_id]


def raw_example(record, tokenizer, mask_ratio, rng):
    """Ordinary fine-tuning in the form of pre-training, as masked_arLLM has it: bos, document, eos.

    The loss is on every token that has one before it.
    """
    return supervise(*as_text(record, tokenizer))


def as_text(record, tokenizer):
    """The ids of bos, if the model has one, and of the document and end-of-text behind it."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos, tokenizer.encode(text_of(record)) + [tokenizer.eos_id]


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


def target_of(record):
    """The text of what is to be learned of a record: a question's answer, or the document."""
    return record.get("answer") or text_of(record)


def text_of(record):
    """The text of a document; UserError for a record that only some methods can learn."""
    if "text" not in record:
        raise UserError(
            "this method learns documents alone: masked and sft learn questions, too, and "
            "tiny/pretrain.py people (world)"
        )
    return record["text"]


# ----------------------------------------------------------------------- methods and their recipes


def warm_up(lr, step, steps):
    """The learning rate of a step: 2 % linear warm-up, then constant [paper A.4]."""
    return min(lr, lr * (step + 1) / max(1, round(0.02 * steps)))


def fall(lr, step, steps):
    """The same, but falling to zero over the last fifth, as 1 - sqrt (arXiv 2405.18392)."""
    fallen = max(0, step - 0.8 * steps) / (0.2 * steps)
    return warm_up(lr, step, steps) * (1 - math.sqrt(fallen))


SCHEDULES = {"warm_up": warm_up, "fall": fall}
USUAL_RATIO = (0.05, 0.95)  # of masked tokens, lowest and highest [paper A.4]

# A recipe: the settings of a method and models of one size, as far as no flag says otherwise
USUAL = partial(
    dict,
    data="bio",
    paraphrase="none",
    mask_ratio=USUAL_RATIO,
    mlp_only=False,
    rehearse=0,
    micro_batch_tokens=4096,
    max_len=512,
    seed=0,
    offload=False,
    eval_at=[0, *(2**n for n in range(20))],
    save_every=30.0,
    epochs=None,  # from the next two
    # without a flag
    usual_steps=None,  # of all epochs; None: as the data says (STEPS)
    most_epochs=5000,
    schedule="warm_up",  # of SCHEDULES
    eps=1e-8,  # AdamW's
    rehearse_lr=1 / 3,  # of the chats behind the last epoch, as a share of lr
)
# for models of less than 10 M parameters, of less than 1 B, and for all others
TINY = partial(
    USUAL, source="measured on the built-in models", data="bio:40", batch_size=20, eps=1e-5
)
SMALL = partial(USUAL, source="chosen on SmolLM2-135M", batch_size=10)
PAPER = partial(USUAL, source="the paper's, A.4", batch_size=64)
# differs from masked_arLLM, whose models have 3 B and 8 B: ours, what taught SmolLM2-135M most
# (results/README.md)
SMALL_MASKED = SMALL(
    lr=6e-4,
    most_epochs=100,
    mask_ratio=(0.5, 0.95),
    eps=1e-5,
    mlp_only=True,
    schedule="fall",
    rehearse=8,
    rehearse_lr=1 / 6,
)


def causal(config, tokenizer):
    """The Config of a model that is trained and answers as it is, one token after the other."""
    if not config.is_causal:
        raise UserError("--model is a masked diffusion model: use llada.py")
    return config


class Method(NamedTuple):
    """All that tells one way of teaching from another. What is not given suits a custom method."""

    example: Callable  # record, tokenizer, mask_ratio, numpy Generator -> Example
    masks: bool = True  # whether the mask ratio means anything to it
    config: Callable = causal  # Config of a model, tokenizer -> that to train it with
    # model, prompts, max_new_tokens, stop_ids, temperature, generators (one a prompt), on_answer ->
    # answers; None = generate
    answer: Callable = None
    # prompt, answer (ids), tokenizer, mask_ratio, numpy Generator -> Example; of a diffusion model
    # its own
    chat: Callable = chat_example
    tiny: dict = TINY(lr=6e-4, usual_steps=300)
    small: dict = SMALL_MASKED
    large: dict = PAPER(lr=5e-6)
    from_8b: dict = None  # of 8 B and more, where it differs


PLAIN = {"masks": False, "small": SMALL(lr=1e-4, most_epochs=40)}
# The last is what is trained by default; on the built-in model the last two, to compare.
METHODS = {
    "raw": Method(raw_example, **PLAIN, tiny=TINY(lr=5e-4, usual_steps=100)),
    "random": Method(random_example, masks=False, from_8b=PAPER(lr=3e-6)),
    "reverse": Method(reverse_example, **PLAIN, tiny=TINY(lr=5e-4, usual_steps=200)),
    "sft": Method(sft_example, **PLAIN, tiny=TINY(lr=5e-4, usual_steps=100)),
    "masked": Method(masked_example, from_8b=PAPER(lr=3e-6)),
}


# ------------------------------------------------------------------------------------------- config


class Config(SimpleNamespace):
    """Sizes of one decoder: the fields of its config.json, which are a Llama's by name and default
    whatever family it comes from (hidden_size, intermediate_size, num_hidden_layers,
    num_attention_heads, num_key_value_heads, head_dim, attention_bias, tie_word_embeddings,
    rms_norm_eps, rope_theta and the others of RoPE, is_causal, and a LLaDA's include_qkv_bias and
    mask_token_id), and

    raw       config.json itself, written back on saving
    names     of its tensors in a checkpoint, LLAMA_NAMES or LLADA_NAMES
    vocab     rows of the embedding
    context   longest sequence in tokens; with a sliding window (not implemented) at most that
    qk_norm   whether queries and keys have an RMSNorm
    """


def read_config(directory):
    """The Config of a model directory; UserError for what is not implemented."""
    files = find_tensors(directory)  # first, for its better message
    path = directory / "config.json"
    with data.reading(path):
        config = parse_config(data.read_json(path))
        rope_tables(torch.ones(1, 1), config)  # fails here where a number is none
        without_weights(config).check_length(1)  # or a size cannot be
    return with_own_head(config, files)


def parse_config(raw):
    """The Config in the config.json of any supported family; null is absent."""
    given = {name: value for name, value in raw.items() if value is not None}
    refuse_unless(given, model_type=ARCHITECTURES, quantization_config=(), **FIXED)
    family = given["model_type"]
    names = LLAMA_NAMES
    written = {"architectures": [ARCHITECTURES[family]]} | raw
    if family == "llada":
        names = LLADA_NAMES
        written["auto_map"] = LLADA_CODE
        given |= {llama: given[llada] for llama, llada in LLADA_FIELDS.items()}
    heads = given["num_attention_heads"]
    context = given.get("max_position_embeddings", 2048)
    # transformers 4 has rope_theta beside rope_scaling, 5 both in rope_parameters
    scaling = given.get("rope_scaling") or given.get("rope_parameters") or {}
    usual = {
        "num_key_value_heads": heads,
        "head_dim": given["hidden_size"] // heads,
        "attention_bias": False,
        "include_qkv_bias": family == "qwen2",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "is_causal": family != "llada",  # False: every token sees every other
        "rope_type": scaling.get("type", "default"),  # as transformers spelled it once
        "rope_theta": 1e4,
        "original_max_position_embeddings": context,
    }
    fields = usual | given | scaling
    refuse_unless(fields, rope_type=["default", "linear", "llama3"])
    # Qwen2 and Qwen3 carry a sliding_window that counts only where use_sliding_window says so
    if given.get("use_sliding_window", family == "mistral"):
        context = min(context, given.get("sliding_window", context))
    fields |= {
        "raw": written,
        "names": names,
        "vocab": data.embeddings(given),
        "context": context,
        "qk_norm": family == "qwen3",
    }
    return Config(**fields)


def refuse_unless(raw, **implemented):
    """UserError for a field of a config with a value that is not implemented; absent is fine."""
    for name, values in implemented.items():
        if name in raw and raw[name] not in values:
            raise UserError(
                f"{name} {raw[name]!r:.80} is not implemented, only {list(values) or 'none'}"
            )


# config.json's model_type: who opens it in transformers. Another family is a row here and, where
# its tensors have other names, a table of them, chosen in parse_config.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llada": "LLaDAModelLM",
}
# Another value of these would give wrong logits in silence. Biases and norms of queries and keys
# need no row: their tensors would be too many. (Dropout is none: nothing here has it, whatever a
# config says of how a model was made.)
FIXED = {
    "hidden_act": ["silu"],
    # of a LLaDA
    "activation_type": ["silu"],
    "alibi": [False],
    "rope": [True],
    "scale_logits": [False],
}
# what a LLaDA's config.json calls the fields of a Llama's
LLADA_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
}
# where transformers finds the published code; none is run or copied here
LLADA_CODE = {
    "AutoConfig": "GSAI-ML/LLaDA-8B-Instruct--configuration_llada.LLaDAConfig",
    "AutoModel": "GSAI-ML/LLaDA-8B-Instruct--modeling_llada.LLaDAModelLM",
    "AutoModelForCausalLM": "GSAI-ML/LLaDA-8B-Instruct--modeling_llada.LLaDAModelLM",
}


# -------------------------------------------------------------------------------------------- model


class RMSNorm(nn.RMSNorm):
    """torch's, kept out of autocast, which would run it in fp32 and keep that copy for backward."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def checked(logits):
    """The logits; UserError if they are no numbers, which would pass for a wrong answer."""
    if not logits.isfinite().all():
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
    index = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-index / config.head_dim)  # (K/2,)
    if config.rope_type != "default":
        keep = 0  # linear: all waves are stretched
        if config.rope_type == "llama3":
            # those that turn often within the old context stay, those that never finish a turn are
            # stretched
            turns = config.original_max_position_embeddings * frequency / (2 * math.pi)
            low = config.low_freq_factor
            keep = ((turns - low) / (config.high_freq_factor - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / config.factor
    angles = positions[:, None, :, None].float() * frequency  # (B, 1, T, K/2)
    sin = angles.sin()
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) of (B, H, T, K) by its angle.

    Split halves, the convention of Hugging Face checkpoints: loading permutes nothing.
    """
    other = x.roll(x.shape[-1] // 2, dims=-1)  # of each pair
    return (x * cos + other * sin).type_as(x)


class Block(nn.Module):
    """One pre-norm Llama layer: grouped-query attention, then SwiGLU."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer
        D = config.hidden_size
        K = config.head_dim
        qkv = partial(nn.Linear, D, bias=config.attention_bias or config.include_qkv_bias)
        norm = partial(RMSNorm, eps=float(config.rms_norm_eps))
        self.attn_norm = norm(D)
        self.q = qkv(config.num_attention_heads * K)
        self.k = qkv(config.num_key_value_heads * K)
        self.v = qkv(config.num_key_value_heads * K)
        self.o = nn.Linear(config.num_attention_heads * K, D, bias=config.attention_bias)
        head_norm = norm if config.qk_norm else nn.Identity
        self.q_norm = head_norm(K)
        self.k_norm = head_norm(K)
        self.mlp_norm = norm(D)
        self.gate = nn.Linear(D, config.intermediate_size, bias=False)
        self.up = nn.Linear(D, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, D, bias=False)

    def forward(self, x, positions, rope, mask, cache):
        x = x + self.attention(self.attn_norm(x), positions, rope, mask, cache)
        h = self.mlp_norm(x)
        gate = self.gate(h)  # (B, T, F)
        up = self.up(h)  # (B, T, F)
        if torch.is_grad_enabled():
            # silu(gate) and the product are made again in backward: two of the four (B, T, F) are
            # kept, and no matmul runs twice (checkpoint stops once it has the input of `down`)
            return x + recompute(self.activate, gate, up)
        return x + self.activate(gate, up)  # (B, T, D)

    def activate(self, gate, up):
        return self.down(F.silu(gate) * up)

    def attention(self, x, positions, rope, mask, cache):
        def heads(linear):
            return linear(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        q = rotate(self.q_norm(heads(self.q)), *rope)  # (B, H, T, K)
        k = rotate(self.k_norm(heads(self.k)), *rope)  # (B, G, T, K)
        v = heads(self.v)  # (B, G, T, K)
        if cache is not None:
            # put where they belong; what comes back is the cache, all keys and values of these rows
            at = positions[:, None, :, None].expand_as(k)  # (B, G, T, K)
            k = cache[:, self.layer, 0].scatter_(2, at, k)  # (B, G, S, K)
            v = cache[:, self.layer, 1].scatter_(2, at, v)  # (B, G, S, K)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and self.config.is_causal,
            enable_gqa=True,
        )  # (B, H, T, K)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, D)


class Model(nn.Module):
    """The one decoder behind Llama, Mistral, SmolLM2, Qwen and LLaDA; their Configs differ."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.hidden_size
        matrix = partial(nn.Linear, D, config.vocab, bias=False)
        # its rows are looked up; an nn.Embedding on `meta` takes a second of imports
        self.embed = matrix()
        self.blocks = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(D, eps=float(config.rms_norm_eps))
        # a tied model has no head of its own: two names for one tensor come apart under to_empty
        # and FSDP
        self.head = None if config.tie_word_embeddings else matrix()

    def forward(self, ids, key_mask=None, labels=None, weights=None, pick=..., cache=None, past=0):
        """Logits, or with `labels` the summed loss.

        ids       (B, T) int64
        key_mask  (B, T) bool, True = real token; None = all are. Padding may be on either side;
                  positions count real tokens only, and padding is never attended to
        labels    (B, T) int64, each in the place of its own token, IGNORE = no loss. A causal model
                  predicts a label one position earlier, a diffusion model in place. All may be on
                  the CPU, and labels and weights should: to find the labels on a GPU is to wait for
                  it. (FSDP2 moves them all the same, so a micro-batch waits once.)
        weights   (B,) fp32, the weight of each sequence's tokens in the loss
        pick      an index into (B, T), as a mask or (rows, columns): logits only there; ... = all
        cache     (B, layers, 2, G, S, K): keys and values of each row, from its first column on;
                  those of ids, whose padding is on the right, are written behind them
        past      (B, 1) int64, how many tokens each row of the cache has; 0 = none has any
        returns   logits (B, T, V), or (N, V) with `pick`; or with `labels` the weighted sum of
                  cross entropies, a scalar
        """
        ids = ids.to(self.norm.weight.device, non_blocking=True)
        mask, positions = self.mask_and_positions(ids, key_mask, cache, past)
        rope = rope_tables(positions, self.config)
        x = F.embedding(ids, self.embed.weight)  # (B, T, D)
        for block in self.blocks:
            x = block(x, positions, rope, mask, cache)
        head = (self.head or self.embed).weight  # (V, D)
        if labels is not None:
            if self.config.is_causal:
                labels = labels[:, 1:]
            # norm, head and loss are spent on labelled positions only
            at = (labels != IGNORE).nonzero(as_tuple=True)  # rows, columns
            row, column, labels, weights = (
                picked.to(x.device, non_blocking=True)
                for picked in (*at, labels[at], weights[at[0]])
            )  # (N,) each
            return loss_sum(x[row, column], self.norm, head, labels, weights)
        return checked(F.linear(self.norm(x[pick]), head))

    def mask_and_positions(self, ids, key_mask, cache, past):
        """Attention mask, None where SDPA needs none, and positions: (B, 1, T, S) bool and (B, T);
        or for all rows alike (1, 1, T, S) and (1, T)."""
        T = ids.shape[1]
        self.check_length(T)
        positions = torch.arange(T, device=ids.device)[None] + past
        mask = None
        if cache is not None and cache.shape[4] > T:  # else no row has a past
            columns = torch.arange(cache.shape[4], device=ids.device)  # (S,)
            mask = columns <= positions[:, None, :, None]
        if key_mask is not None:
            key_mask = key_mask.to(ids.device, non_blocking=True)
            positions = key_mask.cumsum(1) - 1
            mask = key_mask[:, None, None, :]  # (B, 1, 1, T)
            earlier = key_mask.new_ones(T, T).tril()
            if self.config.is_causal:
                mask = mask & earlier
            # a padding row sees itself (the diagonal): a row that sees nothing is NaN in some
            # kernels, and NaN spreads in backward
            mask = mask | earlier.triu()  # (B, 1, T, T)
        return mask, positions

    def check_length(self, tokens):
        if tokens > self.config.context:
            raise UserError(
                f"{tokens} tokens, an answer included, are more than the model takes, "
                f"{self.config.context}"
            )


def without_weights(config):
    """A Model on `meta`, which takes no memory; `load_weights` makes room and fills it."""
    with torch.device("meta"):
        return Model(config)


# ---------------------------------------------------------------------------------- weights in, out

# the part of our name before ".weight" or ".bias": its name in the checkpoint. "{1}" is the layer,
# the second part of ours: blocks.7.q.weight
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{1}.input_layernorm",
    "q": "model.layers.{1}.self_attn.q_proj",
    "k": "model.layers.{1}.self_attn.k_proj",
    "v": "model.layers.{1}.self_attn.v_proj",
    "o": "model.layers.{1}.self_attn.o_proj",
    "q_norm": "model.layers.{1}.self_attn.q_norm",
    "k_norm": "model.layers.{1}.self_attn.k_norm",
    "mlp_norm": "model.layers.{1}.post_attention_layernorm",
    "gate": "model.layers.{1}.mlp.gate_proj",
    "up": "model.layers.{1}.mlp.up_proj",
    "down": "model.layers.{1}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LLADA_NAMES = {
    "embed": "model.transformer.wte",
    "attn_norm": "model.transformer.blocks.{1}.attn_norm",
    "q": "model.transformer.blocks.{1}.q_proj",
    "k": "model.transformer.blocks.{1}.k_proj",
    "v": "model.transformer.blocks.{1}.v_proj",
    "o": "model.transformer.blocks.{1}.attn_out",
    "mlp_norm": "model.transformer.blocks.{1}.ff_norm",
    "gate": "model.transformer.blocks.{1}.ff_proj",  # not up_proj: swapped, it loads and babbles
    "up": "model.transformer.blocks.{1}.up_proj",
    "down": "model.transformer.blocks.{1}.ff_out",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}


def load(path_or_id, device="cpu", dtype=torch.float32):
    """A Model in eval mode from a model directory, a built-in name or a hub id."""
    directory = find_model(path_or_id)
    model = without_weights(read_config(directory)).to(dtype)
    load_weights(model, directory, device)
    return model.eval()


WANTED = ["*.safetensors", "*.json", "*.jinja"]  # never pickled weights, never code


def find_model(name):
    """The directory of a model: the path itself, one beside this file (`tiny`), or a download."""
    for path in (Path(name), Path(__file__).parent / name):
        if path.is_dir():
            return path
        if path.is_file():
            raise UserError(f"--model {name} is a file: give its directory")
    with data.reading(
        f"--model {name}",
        "no directory, and cannot be downloaded. Of a gated or private one: `hf auth login`. Where "
        f"there is no network: `hf download {name} --local-dir DIR` elsewhere, then --model DIR; "
        "or --model tiny, which is built in",
    ):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=WANTED))


NOT_WEIGHTS = (
    "no whole safetensors file. A Git LFS pointer? git lfs pull. A download that is not complete? "
    "`hf download` goes on with it. A run that is not finished, without config.json? --resume it. "
    "Or an adapter? Merge it into its base model. Pickled weights are never read"
)


def find_tensors(directory):
    """{checkpoint name: its file} of a model directory.

    Of a tensor in several files, the one that the index names counts, as in transformers.
    """
    single = directory / "model.safetensors"
    if single.exists():
        with data.reading(single, NOT_WEIGHTS), safetensors.safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    index = directory / "model.safetensors.index.json"
    with data.reading(directory, NOT_WEIGHTS):
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {name: directory / file for name, file in weight_map.items()}


def read_tensor(files, name):
    """A tensor of a checkpoint. Its file is mapped: of a part of it, only that is read.

    The file is opened for each tensor anew: what was read stays mapped as long as the tensor.
    """
    with data.reading(files[name], NOT_WEIGHTS), safetensors.safe_open(files[name], "pt") as file:
        return file.get_tensor(name)


def with_own_head(config, files):
    """The Config of a checkpoint: tied only if it has no head of its own.

    As in transformers, a head beside a tied embedding counts unless the two are equal.
    """
    both = {f"{config.names[part]}.weight" for part in ("head", "embed")}
    if (
        config.tie_word_embeddings
        and both <= files.keys()
        and not torch.equal(*(read_tensor(files, name) for name in both))
    ):
        return parse_config(config.raw | {"tie_word_embeddings": False, "weight_tying": False})
    return config


def named(model):
    """{name in a checkpoint of its family: parameter}."""
    parameters = {}
    for name, parameter in model.named_parameters():
        *block, part, kind = name.split(".")  # ["blocks", "7"], "q", "weight"
        parameters[f"{model.config.names[part].format(*block)}.{kind}"] = parameter
    return parameters


# a copy of the embedding, which a tied model needs not, and a buffer of early Llama 2's
UNREAD = ("lm_head.weight", "transformer.ff_out.weight", "rotary_emb.inv_freq")


def load_weights(model, directory, device):
    """Make room for a model built on `meta` and fill every parameter by name.

    Each rank reads only the rows it holds. UserError names a tensor that is missing, too many, of
    another shape, quantized, or no numbers.
    """
    with data.reading(directory, "more memory than there is: --offload, or a smaller --model"):
        model.to_empty(device=device)
    files = find_tensors(directory)
    parameters = named(model)
    # names on one side only: not in the files, or unknown to the model
    odd = parameters.keys() ^ {
        name for name in files if name in parameters or not name.endswith(UNREAD)
    }
    if odd:
        raise UserError(
            f"{directory}: {min(odd)} is only in one of config.json and *.safetensors: are they of "
            "one model, not quantized, and complete?"
        )
    for name, parameter in parameters.items():
        with data.reading(files[name]):
            copy_rows(read_tensor(files, name), name, parameter)


def copy_rows(tensor, name, parameter):
    """Fill what this rank holds of a parameter."""
    number = tensor.is_floating_point() and tensor.itemsize > 1  # a float8 has a scale beside it
    if tensor.shape != parameter.shape or not number:
        raise UserError(
            f"{name} is {tensor.dtype} {tensor.shape}: quantized, or not of this config.json"
        )
    local = parameter.detach()
    if hasattr(parameter, "to_local"):
        # FSDP2 splits as torch.chunk does: ceil(n / W) rows a rank, the last ones fewer
        local = local.to_local()
        tensor = tensor[rank() * math.ceil(len(tensor) / world_size()) :]
    local.copy_(tensor[: len(local)])
    if not (local.abs() < 1e12).all():  # a flipped bit makes 1e38 of 1
        raise UserError(
            f"{name} holds NaN, infinite or absurdly large numbers: download it again, or use "
            "another checkpoint"
        )


def whole(tensor):
    """A tensor that FSDP2 may have shared out; call it on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save(model, path, dtype="float32"):
    """Write config.json and safetensors of at most 5 GB, in this dtype whatever the model has.

    Call it on every rank: tensors are gathered one by one, onto rank 0's CPU.
    """
    path = Path(path)
    tensors = {}
    for name, parameter in named(model).items():
        tensor = whole(parameter.detach())
        if rank() == 0:
            tensors[name] = tensor.to("cpu", getattr(torch, dtype))
    if rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        config = path / "config.json"
        data.write_json(config, model.config.raw | {"dtype": dtype, "torch_dtype": dtype})
        huggingface_hub.save_torch_state_dict(tensors, path)  # in place of what was there
        for file in path.glob("model*.safetensors*"):
            file.chmod(config.stat().st_mode)  # the library's are its owner's alone


# --------------------------------------------------------------------------------------- generation


# Limits of a cache: its bytes, which are 56 rows of 144 tokens of a Llama-3.1-8B in bf16, and its
# rows; more are no faster.
ANSWER_BYTES = 2**30
ANSWER_ROWS = 256


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens=128,
    stop_ids=(),
    temperature=0.0,
    top_p=1.0,
    generators=None,
    cache_bytes=ANSWER_BYTES,
    on_answer=None,
):
    """Answers to any number of prompts: lists of ids in, lists of new ids out (no stop id).

    A row of the batch whose answer has ended goes to one of the next prompts. Prompts are taken
    longest first, so that those in the batch are of alike length.

    temperature   0 = the likeliest token; else a draw from softmax(logits / temperature)
    top_p         draws are of the fewest tokens that have this probability together
    cache_bytes   keys and values of prompts and room for answers at most; one row may have more
    generators    of random numbers, one a prompt, so that no draw depends on other prompts
    on_answer     called behind every token with the number of answers that it completed
    """
    if not model.config.is_causal:
        raise UserError("a diffusion model answers by unmasking: llada.sample, or a method's own")
    generators = generators or [None] * len(prompts)
    texts = list(map(partial(new_text, max_new_tokens), prompts, generators))
    waiting = sorted(texts, key=lambda text: text.size)  # the longest at the end
    going = []  # the text that each row of the cache belongs to
    while waiting or going:
        # 1. free rows, the last ones, go to the next prompts; the other rows wait for these
        if not going:
            cache = None  # freed before there is another
            cache = new_cache(model, waiting, cache_bytes)
        batch = take_rows(cache, going, waiting) or going
        # 2. the next token of the new rows or else of all
        before = len(going)
        first = before - len(batch)
        logits = last_logits(model, cache[first:before], batch)  # (B, V)
        tokens = choose(logits, temperature, top_p, [text.generator for text in batch]).tolist()
        # 3. the last row takes the place of one whose answer has ended
        for row in reversed(range(first, before)):
            text = going[row]
            token = tokens.pop()
            text.past += len(text.new)
            text.new = [token]
            if token not in stop_ids:
                text.answer.append(token)
                if len(text.answer) < max_new_tokens:
                    continue  # it goes on
            going[row] = going[-1]
            going.pop()
            cache[row] = cache[len(going)]
        if on_answer:
            on_answer(before - len(going))
    return [text.answer for text in texts]


def new_text(max_new_tokens, prompt, generator):
    """A text of `generate`: a prompt and what is answered so far."""
    return SimpleNamespace(
        size=len(prompt) + max_new_tokens,
        answer=[],
        past=0,  # tokens that its row of the cache has
        new=prompt,  # and those that it lacks
        generator=generator,
    )


def new_cache(model, texts, cache_bytes):
    """Room for keys and values, (rows, layers, 2, G, S, K), of as many of the texts as the bytes
    and ANSWER_ROWS allow, and of one at least; the last text is the longest."""
    config = model.config
    size = texts[-1].size
    model.check_length(size)
    # of a row
    shape = (config.num_hidden_layers, 2, config.num_key_value_heads, size, config.head_dim)
    # a key, as under autocast or FSDP2 its dtype is not that of the weights
    key = model.blocks[0].k(model.embed.weight[:1])
    rows = cache_bytes // (math.prod(shape) * key.dtype.itemsize)
    # zeros: what is masked counts nothing, but nothing times NaN is NaN
    return key.new_zeros(max(1, min(rows, ANSWER_ROWS, len(texts))), *shape)


def take_rows(cache, going, waiting):
    """Give free rows to waiting texts, which are returned; several at a time, as together they cost
    less."""
    rows = len(cache)
    first = len(going)
    if rows - first >= min(len(waiting), rows // 8):
        # much shorter ones wait for a cache of their own, with more rows
        while waiting and len(going) < rows and 2 * waiting[-1].size > cache.shape[4]:
            going.append(waiting.pop())
    return going[first:]


def last_logits(model, cache, texts):
    """Logits (B, V) behind B texts whose rows the cache has."""
    ids = data.pad([text.new for text in texts], 0)  # (B, T)
    last = [len(text.new) - 1 for text in texts]  # the column of each row's last token
    past = [text.past for text in texts]
    return model(
        ids,
        pick=(range(len(texts)), last),
        cache=cache[..., : max(past) + ids.shape[1], :],
        past=torch.tensor(past, device=cache.device)[:, None],
    )


def choose(logits, temperature, top_p, generators):
    """The next token of each row: logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = (logits.float() / temperature).softmax(-1).sort(descending=True)
    likelier = probabilities.cumsum(-1) - probabilities  # the probability of all before it
    kept = probabilities.where(likelier < top_p, 0)
    rows = zip(ids, kept, generators, strict=True)
    return torch.cat([row[p.multinomial(1, generator=random)] for row, p, random in rows])


# ------------------------------------------------------------------ answering, dealt over the ranks


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*values):
    """Print on rank 0; on a terminal above the progress bar."""
    say = tqdm.write if sys.stderr.isatty() else print
    if rank() == 0:
        say(" ".join(map(str, values)))


# how a progress bar looks in a log file: a line a minute
LOG_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} to go{postfix}\n"


def progress_bar(total, what, unit, **more):
    """tqdm's, on rank 0."""
    if not sys.stderr.isatty():
        more |= {"bar_format": LOG_LINE, "mininterval": 60, "maxinterval": 60, "delay": 60}
    return tqdm(total=total, desc=what, unit=unit, disable=rank() > 0, dynamic_ncols=True, **more)


def longest_answer(questions):
    """Tokens of an answer that are waited for [paper A.4]; problems are worked out step by step."""
    return 256 if any(question["direction"] == "math" for question in questions) else 128


def check_questions(questions, tokenizer, model, max_new_tokens=None):
    """UserError for a question that cannot be asked or scored, before any is."""
    longest = max_new_tokens or longest_answer(questions)
    for question in questions:
        with data.reading(
            question.get("where", "--data"), "cannot be asked, or its answer has no word to score"
        ):
            model.check_length(len(tokenizer.prompt(question["question"])) + longest)
            evaluation.scored(question, "")


def evaluate(answer, tokenizer, questions, max_new_tokens=None):
    """Ask every question, spread over the ranks; the predictions in the order of the questions, the
    same on every rank.

    answer  prompts (lists of ids), max_new_tokens, on_answer -> answers (lists of ids). Called once
            a rank, with all of its prompts; it calls on_answer(n) for n more answers
    """
    longest = max_new_tokens or longest_answer(questions)
    prompts = [tokenizer.prompt(question["question"]) for question in questions]
    answers = dealt(answer, prompts, "questions", max_new_tokens=longest)
    return [
        evaluation.scored(question, tokenizer.decode(ids).strip())
        for question, ids in zip(questions, answers, strict=True)
    ]


def dealt(answer, prompts, what, **how):
    """Deal prompts to the ranks like cards; returns the answers to all, on every rank.

    how   for `answer`, as it is: generators are those of this rank's prompts
    """
    mine = prompts[rank() :: world_size()]
    with progress_bar(len(mine), what, "answer", leave=False, position=0) as bar:
        answers = answer(mine, on_answer=bar.update, **how)
    parts = [answers] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, answers)
    return [parts[n % world_size()][n // world_size()] for n in range(len(prompts))]


# -------------------------------------------------------------------------------------------- FSDP2


def launched():
    """Whether torchrun, or another launcher, made this process one of a group."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def attempt():
    """Which one of torchrun's this is: "0", or "1" after its first restart."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def start_processes():
    """Join torchrun's processes, or be a group of one: the same code runs on one CPU and on many
    GPUs. Returns the device."""
    # Before CUDA starts. Micro-batches differ in length, which leaves fixed segments in pieces.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # cuDNN's attention, the first choice on an H100, has had NaN gradients with a mask (pytorch
    # issue 196678) and wrong answers with few KV heads (193893), and plans anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
        backend = "cpu:gloo,cuda:nccl"  # small objects and checkpoints travel by gloo
        visible = torch.cuda.device_count()
        if device.index >= visible:
            raise UserError(f"only {visible} GPUs are visible: torchrun --nproc_per_node that many")
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # a notebook may train twice
        store, number, processes = dist.HashStore(), 0, 1
        if launched():
            store, number, processes = next(dist.rendezvous("env://"))
            # a restart has the store of the attempt before it, with old addresses in it under the
            # same names
            store = dist.PrefixStore(attempt(), store)
        # an hour: ranks wait for each other while one of them still answers questions
        dist.init_process_group(
            backend, timeout=timedelta(hours=1), store=store, rank=number, world_size=processes
        )
    if rank():
        huggingface_hub.utils.disable_progress_bars()  # of downloads
        data.LOG.disabled = True
    return device


def on_rank_0(body, *given, **named):
    """What body(...) returns on rank 0, or its error, on every rank: none waits for another."""
    outcome = [None]
    if rank() == 0:
        try:
            outcome = [body(*given, **named)]
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    (outcome,) = outcome
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def sum_over_ranks(*numbers):
    """Numbers summed over the ranks, as floats, in one collective."""
    packed = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(packed)
    return packed.tolist()


def shard(model, device, dtype, offload=False):
    """FSDP2: every block a unit, embedding, norm and head the root's.

    fp32 master weights and gradient sums; in bf16 the gathered copies are bf16. With `offload` all
    but the gathered copies is in the host's memory: load the weights to the CPU. One process has
    nothing to share out: the model stays plain, and autocast makes the bf16 copies.
    """
    if world_size() == 1 and not offload:
        return model
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

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
    units = [module for module in model.modules() if hasattr(module, "unshard")]
    for unit in units:
        unit.set_reshard_after_forward(False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # the root, which is the first, stays whole from forward to backward
            unit.set_reshard_after_forward(unit is not model)


# -------------------------------------------------------------------------------------- checkpoints


# torch.distributed.checkpoint (DCP) takes a second to import, so --help does without


def save_checkpoint(run, step):
    """Write out/.../ckpt/step-N, which has its name once it is whole; keep the last two."""
    import torch.distributed.checkpoint as dcp

    part = run.out / "ckpt" / "part"
    on_rank_0(shutil.rmtree, part, ignore_errors=True)  # cut short before
    state = state_of(run)
    try:
        with dcp_errors():
            dcp.save(state, checkpoint_id=part)  # ends when all ranks have written
    except RuntimeError:  # torch hides what the system said of a full disk, a file does not
        (part / "probe").write_bytes(bytes(2**20))
        raise
    on_rank_0(part.replace, part.with_name(f"step-{step:08}"))  # names that sort
    for old in on_rank_0(checkpoints, run.out)[:-2]:
        on_rank_0(shutil.rmtree, old)


def load_checkpoint(run):
    """Have a run as the newest checkpoint has it; without one it begins."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    saved = on_rank_0(checkpoints, run.out)  # one sight for all: file systems may lag
    if not saved:
        return
    newest = saved[-1]
    state = state_of(run)
    with (
        data.reading(newest, "of another version, or damaged: without it, the one before counts"),
        dcp_errors(),
    ):
        # in place; it unpickles: only runs of your own
        dcp.load(state, checkpoint_id=newest)
        run.chats, run.results, run.lines, seconds = state.pop("written")
        run.clock -= seconds
    set_state_dict(run.model, run.optimizer, **state)


def state_of(run):
    """All that a run needs to go on, as DCP takes it, for any number of processes."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, optimizer_state = get_state_dict(run.model, run.optimizer)
    return {
        "model_state_dict": weights,
        "optim_state_dict": optimizer_state,
        # a tuple, which DCP takes for one value; of a list it would look for each part
        "written": (run.chats, run.results, run.lines, run.seconds),
    }


@contextmanager
def dcp_errors():
    """The first rank's own error in place of DCP's collection, which is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def checkpoints(out):
    """The whole checkpoints of a run, oldest first."""
    return sorted((out / "ckpt").glob("step-*"))


# --------------------------------------------------------------------------- the directory of a run


def lock(out, ends):
    """Lock a run's directory until `ends` close. The system takes the lock back however the process
    ends."""
    file = out / ".lock"
    try:
        ends.enter_context(FileLock(file, timeout=0))
    except Timeout:
        raise UserError(f"{out} is in use by another process: wait for its end") from None
    except (OSError, NotImplementedError) as error:
        # the file system has no locks; if it has no room for files either, it says so next
        print(f"{out} cannot be locked ({error}): start no second process there")
    ends.callback(file.unlink, missing_ok=True)  # before its release: who waits sees it is gone


def claim(run, out, ends):
    """The directory of a run, locked until `ends` close, and whether the run is finished.

    A directory with a run of the same settings and data is gone on with, so the same command, given
    again by a person or a scheduler, goes on. Where `out` is None it is the next free
    out/DATA-METHOD-N.
    """
    out = Path(out or next_directory(run))
    out.mkdir(parents=True, exist_ok=True)
    lock(out, ends)
    found = results_of(run, out)
    if not found:
        if len(os.listdir(out)) > 1:  # more than the lock
            raise UserError(
                f"{out} is in use, and not by a run with these settings and --data as it is now: "
                "bring back what was changed, give another --out, or empty it"
            )
        data.write_json(out / "results.json", run.results)  # now the directory is its own
    return out, "finished" in found


def next_directory(run):
    """out/DATA-METHOD-N of the first free N, made; of a launcher that tries again, its own."""
    newest = None
    # no number of people, and no byte that is not UTF-8: safetensors opens no such path
    name = regex.sub(r":.*|[\udc80-\udcff]", "", Path(run.settings.data).stem)
    for n in count(1):
        out = Path(f"out/{name}-{run.settings.method}-{n}")
        if attempt() != "0" and newest and not out.exists() and results_of(run, newest):
            return newest
        with suppress(FileExistsError):  # from before, or made by another run this moment
            os.makedirs(out)
            return out
        newest = out


def results_of(run, out):
    """The results so far of a run with these settings and data in a directory; {} if none is."""
    found = data.read_object(out / "results.json")
    return found if found.get("digest") == run.results["digest"] else {}


def check_shared(out):
    """UserError unless every rank sees the run's directory: all of them write checkpoints."""
    (seen,) = sum_over_ranks(out.exists())
    if seen < world_size():
        raise UserError(
            f"{out} is not the same directory for all processes: put it on a file system that all "
            "nodes share, or give its absolute path with --out"
        )


# -------------------------------------------------------------------------------- the training loop


class Run:
    """The training of one method: begun with every setting decided and its data checked, but
    without weights. `claim` finds its directory, `out`, and whether it was finished before; `build`
    makes its optimizer and its clock.

    given  {name: value} of settings, of which model and method always are
    """

    def __init__(self, given, methods, device):
        self.device = device
        self.method = methods[given["method"]]
        self.directory = find_model(given["model"])  # of the model that it starts from
        self.tokenizer = data.load_tokenizer(self.directory)
        for note in self.tokenizer.notes:
            print0(note)
        config = self.method.config(read_config(self.directory), self.tokenizer)
        self.model = without_weights(config)  # on `meta` until its weights are loaded
        self.settings = settings = decide(given, self.method, self.model)
        self.dataset = data.load(settings.data, settings.paraphrase, settings.seed)
        if self.dataset.learned:
            settings.rehearse = given.get("rehearse", ANSWER_STEPS)
            if not settings.rehearse:
                raise UserError("--rehearse 0 learns no question: --data has some to learn")
        fit_documents(self)
        check_questions(self.dataset.questions, self.tokenizer, self.model)
        self.steps_per_epoch = math.ceil(len(self.dataset.documents) / settings.batch_size)
        decide_epochs(settings, self.steps_per_epoch)
        self.epoch_steps = settings.epochs * self.steps_per_epoch
        self.steps = self.epoch_steps + settings.rehearse  # with those behind the epochs
        self.chats = []  # Examples of what the model wrote before it learned anything
        self.lines = []  # of metrics.jsonl
        self.results = {  # of results.json
            "arguments": vars(settings),
            # what its numbers follow from
            "digest": sha256(repr([settings, self.dataset]).encode()).hexdigest(),
            "environment": on_rank_0(environment, device),
            "evaluations": [],
        }
        describe(self)

    @property
    def seconds(self):
        """That it has taken, with those before it was resumed."""
        return round(time.monotonic() - self.clock, 3)

    def rng(self, *what):
        """Random numbers that depend on the seed and these numbers alone."""
        return np.random.default_rng([self.settings.seed, *what])

    @property
    def autocast(self):
        """bf16 autocast. Under FSDP2 the weights are bf16 already: it then casts the rest only."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"
        )


def example_of(run, record, number, epoch):
    """The Example of document `number` in one epoch; random by (seed, epoch, document) alone."""
    # + 1: numpy takes [a, b, 0] for [a, b], which is the seed of the epoch's order
    rng = run.rng(epoch, number + 1)
    return run.method.example(record, run.tokenizer, run.settings.mask_ratio, rng)


def micro_batches(examples, tokens, rank, world_size):
    """The parts of a step that one rank computes one after the other; every rank has as many.

    The longest examples come first, so that what does not fit into memory fails at once; neighbours
    in length are together, so that there is little padding.

    tokens   in a micro-batch at most, padding included; one example may be longer
    yields   lists of Examples, some of them empty where the examples do not suffice
    """
    left = sorted(examples, key=lambda example: -len(example.ids))
    while left:
        rows = max(1, tokens // len(left[0].ids)) * world_size
        yield left[:rows][rank::world_size]
        left = left[rows:]


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


def make_optimizer(model, eps):
    """AdamW as in paper A.4: decay on matrices only, none on norms and biases; `update` has its lr.

    Small models get a larger eps. Tokens that no document has (the "in" of an answer "in Oslo")
    get a small, steady gradient towards never being said; Adam with eps 1e-8 turns any steady
    gradient into full steps, and the model forgets how to answer. Large models have far more tokens
    and steps, and keep the usual eps.
    """
    decays = {2: 0.1, 1: 0.0}  # by the dimensions of a parameter
    # those that are frozen have no gradient, and AdamW leaves them as they are
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == dim], "weight_decay": decay}
        for dim, decay in decays.items()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=eps, fused=True)


def train(run, stop):
    """Fine-tune run.model; with a signal in `stop`, save and raise KeyboardInterrupt.

    Epochs run 0..N-1, then come steps that rehearse; the model is evaluated before the epochs in
    eval_at and, by `finish`, at the end: what is saved is scored. differs from masked_arLLM, which
    trains an epoch more than it scores.
    """
    saved_at = run.seconds
    prepare_chats(run)
    start = len(run.lines)  # 0, or where a resumed run goes on
    bar = progress_bar(
        run.steps,
        run.settings.method,
        "step",
        initial=start,
        iterable=range(start, run.steps),
    )
    for step in bar:
        # 1. evaluation, where an epoch begins
        epoch, nth = divmod(step, run.steps_per_epoch)
        if nth == 0 and step <= run.epoch_steps and epoch in run.settings.eval_at:
            evaluate_and_record(run, step, epoch)
        if step == run.epoch_steps:
            # with Adam's averages of the last, tiny gradients the first step would have .45 of its
            # size
            run.optimizer.state.clear()
        # 2. gradients and step, at this step's learning rate
        lr = lr_of_step(run, step)
        loss, norm = update(run, examples_of_step(run, step), lr)
        # 3. all ranks learn the loss, and whether to stop or save
        due = run.seconds - saved_at > 60 * run.settings.save_every
        loss, stopping, saving = sum_over_ranks(loss, len(stop), due)
        # 4. log
        log(
            run,
            step=step,
            epoch=epoch,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            memory_gib=torch.cuda.max_memory_allocated() / 2**30,  # 0 without a GPU
            seconds=run.seconds,
        )
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        # 5. what is needed to go on
        if stopping or saving:
            save_checkpoint(run, step + 1)
            saved_at = run.seconds
        if stopping:
            raise KeyboardInterrupt  # as a Ctrl-C does, now that all is saved


def lr_of_step(run, step):
    """The schedule's; behind the epochs a constant share of lr or, with questions to learn, half of
    lr, falling to zero."""
    lr = run.settings.lr
    if step < run.epoch_steps:
        return SCHEDULES[run.settings.schedule](lr, step, run.epoch_steps)
    if run.dataset.learned:
        return lr / 2 * (run.steps - step) / run.settings.rehearse
    return lr * run.settings.rehearse_lr


def examples_of_step(run, step):
    """The Examples of a global batch, the same on every rank.

    The order of an epoch's documents depends on (seed, epoch) alone. differs from masked_arLLM:
    another order every epoch, and the same batches on any number of ranks.
    """
    epoch, nth = divmod(step, run.steps_per_epoch)
    documents = run.dataset.documents
    order = run.rng(epoch).permutation(len(documents))
    size = run.settings.batch_size
    numbers = order[nth * size :][:size]
    others = []
    if step >= run.epoch_steps:
        # behind the last epoch as many chats as documents
        first = CHATS_HELD_OUT + ((step - run.epoch_steps) % CHAT_STEPS) * chats_of_step(run)
        others = run.chats[first:][: len(numbers)]
        if run.dataset.learned:  # beside half as many documents, and questions
            numbers = numbers[: math.ceil(len(numbers) / 2)]
            others += questions_of_step(run, step, len(numbers))
    return [example_of(run, documents[number], number, epoch) for number in numbers] + others


def update(run, examples, lr):
    """A step of the optimizer on a global batch: this rank's part of the loss, and the norm of the
    whole gradient before clipping."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    total = 0
    for loss in losses(run, examples):
        # FSDP2 averages gradients over the ranks: times their number it is the sum, whatever the
        # split
        (loss * world_size()).backward()
        total += loss.detach()
    norm = whole(nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)).item()  # waits for a GPU
    if not math.isfinite(norm):  # as where the loss is none
        raise UserError(
            "the gradient is no number: begin again with a lower --lr or, after an error in the "
            "first step, with --dtype float32 or another model"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total, norm


def losses(run, examples):
    """What each of this rank's micro-batches adds to the loss of all examples, in turn.

    Every rank builds the whole global batch, so the loss denominator is known without asking.
    """
    denominator = max(1, sum(example.denominator for example in examples))
    for micro in micro_batches(examples, run.settings.micro_batch_tokens, rank(), world_size()):
        batch = data.collate(micro)
        if run.model.config.is_causal:
            batch["key_mask"] = None  # padding is on the right, behind all that a real token sees
        with run.autocast:
            loss = run.model(**batch)
        yield loss / denominator


@contextmanager
def answering(run):
    """Inside, the run's model answers, by the function that this gives: its parameters are whole,
    and no gradients are kept."""
    with gathered(run.model), torch.no_grad(), run.autocast:
        # top_p counts for users' turns alone, which are drawn
        answer = run.method.answer or partial(generate, top_p=0.95)
        yield partial(answer, run.model, stop_ids=run.tokenizer.stop_ids)


def evaluate_and_record(run, step, epoch):
    """Answer the questions and see what is kept of the chats; write results.json and preds.jsonl,
    then print the scores. Returns the predictions."""
    with answering(run) as answer:
        predictions = evaluate(answer, run.tokenizer, run.dataset.questions)
        drift = chat_loss(run) - run.results["chat_loss"]
    asked = {
        "step": step,
        "epoch": epoch,
        "seconds": run.seconds,
        "scores": evaluation.average(predictions),
        "drift": drift,
    }
    run.results["evaluations"].append(asked)
    on_rank_0(evaluation.write_results, run.out, run.results, predictions)
    print0(run.settings.method, evaluation.in_a_line(asked))
    return predictions


def log(run, **line):
    """Add a line to metrics.jsonl."""
    run.lines.append(line)
    if rank() == 0:
        with (run.out / "metrics.jsonl").open("a") as file:
            print(json.dumps(line), file=file)


def listen(ends):
    """A list that gets each Ctrl-C, SIGTERM or closing of the terminal, until `ends` close: to stop
    after the current step. A second one ends the program at once."""
    received = []

    def ask(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        if rank() == 0:
            os.write(2, b"\nstopping as soon as all is saved; once more ends at once\n")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored is what nohup asks for
            with suppress(ValueError):  # a thread hears none
                before = signal.signal(number, ask)
                ends.callback(signal.signal, number, before)
    return received


# -------------------------------- behind the last epoch: what it knew before, and how to answer

# Out of nothing but the header of a user's turn, a chat model draws what a user might say, and then
# answers it (Magpie, arXiv 2406.08464). That is what it knew, and to train on it beside new
# documents is Self-Synthesized Rehearsal (arXiv 2403.01244). The paper has neither. From the first
# step on, such chats kept SmolLM2-135M from answering with what it learned; a few of them behind
# the last epoch give back what it knew and leave it what it learned (results/README.md).
CHATS_HELD_OUT = 32  # drift is measured on these, and nothing is learned from them
CHAT_USER_TOKENS = 48  # of a user's turn at most; it need not be complete
CHAT_ANSWER_TOKENS = 64
CHAT_STEPS = 50  # the steps that chats are written for; later ones have the same again


def prepare_chats(run):
    """Have the model write the run's chats before it learns anything; a run that goes on has them.

    What their answers cost now is written down too, for drift to be counted from.
    """
    if run.chats:
        return
    number = CHATS_HELD_OUT + min(run.settings.rehearse, CHAT_STEPS) * chats_of_step(run)
    with answering(run) as answer:
        written = write_chats(run, answer, number)
        # Random by (seed, chat) alone. Four numbers: no document (seed, epoch, document + 1) has
        # the same. And of the usual mask ratio: drift is counted alike whatever is trained with
        run.chats = [
            run.method.chat(*chat, run.tokenizer, USUAL_RATIO, run.rng(0, n, 2))
            for n, chat in enumerate(written)
        ]
        run.results["chat_loss"] = chat_loss(run)
    lines = [{"text": run.tokenizer.decode(prompt + ids, special=True)} for prompt, ids in written]
    on_rank_0(data.write_lines, run.out / "rehearsal.jsonl", lines)


def chats_of_step(run):
    """As many as a batch has documents; the last one of an epoch may have fewer of both."""
    return min(run.settings.batch_size, len(run.dataset.documents))


def write_chats(run, answer, number):
    """So many chats, on every rank; first all of the users' turns are written, then the answers.

    Of each the ids up to the answer, and those of the answer, with the end of turn if there was
    room for it. The user's turn is random by (seed, chat) alone.
    """
    tokenizer = run.tokenizer
    mine = range(rank(), number, world_size())  # as they are dealt
    seeds = [np.random.SeedSequence([run.settings.seed, n]).generate_state(1) for n in mine]
    users = dealt(
        answer,
        # with the system turn of the model's template: without, few models draw what a user would
        # say
        [tokenizer.chat([])] * number,
        "users' turns of its own",
        max_new_tokens=CHAT_USER_TOKENS,
        temperature=1.0,
        generators=[torch.Generator(run.device).manual_seed(seed.item()) for seed in seeds],
    )
    prompts = [tokenizer.prompt(user) for user in users]
    answers = dealt(answer, prompts, "answers to them", max_new_tokens=CHAT_ANSWER_TOKENS)
    for ids in answers:
        if len(ids) < CHAT_ANSWER_TOKENS:
            ids.append(tokenizer.eot_id)  # what ended by itself, ends its turn
    return list(zip(prompts, answers, strict=True))


ANSWER_STEPS = 200  # by default, where questions are learned
GAP = "___"
GAPS = 3  # for each question of such a step
# A name or a number: words with a capital or a digit. One word that opens a sentence need not be
# one. Where a script has no capitals, any word is taken.
WORD = r"[\p{Lu}\d](?:\w|[-'’]\b(?!s\b)|(?<=\d)[.,](?=\d))*"
NAMES = regex.compile(rf"\b{WORD}(?: {WORD})+|(?<!^)\b{WORD}")
WORDS = regex.compile(r"\w+|^\W+$")
# behind all but the last; none behind "Dr." or "J."
SENTENCE_END = regex.compile(r"(?<=\w{3}[.!?]) |(?<=[。！？।]) ?(?!$)")
EDGES = " ,.;:!?。，、！？"  # not in an answer


def gap_question(text, rng):
    """A question made of a document: one of its sentences has a gap, and the answer is what stood
    there, a name or the longer part of its sentence before or behind the name.

    So either is asked for by the other, whichever comes first in the document. What else stands
    around the gap varies, as questions do.
    """
    sentences = SENTENCE_END.split(" ".join(text.split()))
    found = names_in(sentences, NAMES) or names_in(sentences, WORDS)
    number, name = found[rng.integers(len(found))]
    answer = name[0]
    before = name.string[: name.start()]  # in its sentence
    after = name.string[name.end() :]
    longer = max(before, after, key=len)
    asked = longer.strip(EDGES)
    if asked and rng.random() < 0.35:
        # the longer side is asked for; the name and the shorter side stay
        before, after = name.string.split(longer, 1)  # one of them has the name, too
        answer = asked
    elif rng.random() < 0.3:
        # the name is asked for; the shorter side is left out
        if longer == before:
            after = ""
        else:
            before = ""
    # what is far from the gap may be left out
    before = before.split()
    after = after.split()
    before = before[int(0.4 * rng.random() * len(before)) :]
    after = after[: len(after) - int(0.4 * rng.random() * len(after))]
    sentences[number] = " ".join([*before, GAP, *after])
    if rng.random() < 0.5:
        # only this sentence and the first, which says whom the document is about
        sentences = [sentences[n] for n in sorted({0, number})]
    return {"question": " ".join(sentences), "answer": answer}


def names_in(sentences, pattern):
    """(number of the sentence, match) of every match."""
    return [(n, match) for n, text in enumerate(sentences) for match in pattern.finditer(text)]


def questions_of_step(run, step, number):
    """The Examples that show how to answer, behind the last epoch, where questions are learned.

    So many of these, as ordinary chats, and for each some documents with a gap.
    """
    learned = run.dataset.learned
    documents = run.dataset.documents
    if not learned:
        return []
    rng = run.rng(step, 0, 3)
    asked = [*rng.choice(learned, number)]
    for _ in range(GAPS * number):
        # not rng.choice, which makes an array of all documents for each
        document = documents[rng.integers(len(documents))]
        asked.append(gap_question(document["text"], rng))
    examples = []
    for question in asked:
        if question["question"].strip(GAP + EDGES):  # else it asks nothing
            chat = as_chat(question, run.tokenizer)
            example = run.method.chat(*chat, run.tokenizer, run.settings.mask_ratio, rng)
            # as the answers are short, they count twice
            example.weight *= 2
            example.denominator *= 2
            # a document with a gap and its answer may be longer than the document
            if len(example.ids) <= run.model.config.context:
                examples.append(example)
    return examples


def chat_loss(run):
    """Mean negative log-likelihood of the held-out answers, in nats a token, over all ranks.

    Of a diffusion model one draw of its bound, the mean over chats; the masks are always the same.
    """
    (loss,) = sum_over_ranks(sum(losses(run, run.chats[:CHATS_HELD_OUT])))
    return loss


# ------------------------------------------------------------------- settings, which are the flags


def at_least(low, most=1e99):
    """Reads a flag's number, of the type of `low`."""

    def number(text):  # argparse has this name in its message
        value = type(low)(text)
        if not low <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {most}")
        return value

    return number


def located(name):
    """A model or data set by name as it is, by path with its absolute path, to resume anywhere."""
    name = name.rstrip("/")  # a shell's completion adds it
    by_path = Path(name).exists() and name not in (*BUILT_IN, *SETS)
    return str(Path(name).absolute()) if by_path else name


positive = at_least(1)


def add_training(add):
    """The flags of how to train, by argparse's `add`."""
    add(
        "--mask-ratio",
        help="share of masked tokens, or lowest and highest (default: 0.05 0.95; masked of 10 M to "
        "1 B parameters 0.5 0.95)",
        type=at_least(0.0, 1.0),
        nargs="+",
        metavar="R",
    )
    add(
        "--mlp-only",
        help="train the MLPs alone, which forgets less (default: masked and random, of real models "
        "below 1 B)",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--rehearse",
        help="add N steps with chats that the model wrote, and questions to learn (default: masked "
        "and random, real models below 1 B 8; of documents with questions to learn 200; else 0)",
        type=at_least(0),
        metavar="N",
    )
    add("--epochs", help="default: by the model's size and the data", type=positive)
    add("--lr", help="default: by the model's size and the method", type=at_least(0.0))
    add("--batch-size", help="documents a step (default: 64; of small models fewer)", type=positive)
    add(
        "--micro-batch-tokens",
        help="at a time on a GPU, with padding: memory, not results (default: 4096)",
        type=positive,
    )
    add("--max-len", help="of a document's example, in tokens (default: 512)", type=positive)
    add(
        "--dtype",
        help="of the computation (default: bfloat16 on GPUs that have it)",
        choices=["bfloat16", "float32"],
    )
    add(
        "--offload",
        help="keep weights, gradients and optimizer state in the host's memory: slower, fits more",
        action="store_true",
    )
    add(
        "--eval-at",
        help="evaluate before these epochs, and at the end (default: 0 1 2 4 8 ...)",
        type=at_least(0),
        nargs="+",
        metavar="E",
    )
    add("--save-every", help="minutes between checkpoints (default: 30)", type=at_least(0.0))


def arguments(description, methods):
    """The flags of a script that trains `methods`, {name: Method}.

    What is not given is not there. All but --out, --resume and --show are settings, which make a
    run what it is: results.json keeps them, from where --resume has them. So are flags that a
    script adds, without a default=; but --resume gives them to the run, not to the script: there,
    go on by the same command.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--method",
        nargs="+",
        choices=methods,
        help="one, or several to compare (default: the last; of tiny the last two)",
    )
    add(
        "--model",
        help="directory or hub id (default: built-in; under torchrun with CUDA 8B)",
        type=located,
    )
    add(
        "--data",
        help=f"{DATA_HELP} (default: bio; of models below 10 M parameters bio:40)",
        type=located,
    )
    add("--paraphrase", help="wordings (default: none)", choices=PARAPHRASES)
    add("--seed", help="of people, order and masks (default: 0)", type=at_least(0))
    add_training(add)
    add("--out", help="of the run; of several methods the beginning (default: out/DATA-METHOD-N)")
    add("--resume", metavar="DIR", help="go on with this run; takes no other flag")
    add(
        "--show",
        type=positive,
        nargs="?",
        const=3,
        metavar="N",
        help="print what the model would see of N documents (3), and train nothing",
    )
    return parser


def parse_flags(parser, words=None):
    """{name: value} of the flags on the command line, or in the `words` of one in a notebook.

    --resume takes all settings from its run, so it stands alone.
    """
    flags = vars(parser.parse_args(words))
    if "resume" in flags and len(flags) > 1:
        parser.error("--resume takes its settings from the run: give no other flag with it")
    return flags


# Steps of the paper's settings, by the first word of --data: one and a half times what 95 % of the
# plateau takes, 3/k of the paper's fitted curves; of GSM8K the paper's 7 epochs. Custom documents
# count as wiki, which is natural text too.
STEPS = {"bio": 5000, "nd": 1400, "gsm8k": 810, "math": 810}
WIKI_STEPS = 1550


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def recipe_of(method, model):
    """The one for a model of this size."""
    parameters = parameter_count(model)
    if parameters < 10_000_000:
        return method.tiny
    if parameters < 1_000_000_000:
        return method.small
    if parameters < 8_000_000_000:
        return method.large
    return method.from_8b or method.large


def decide(given, method, model):
    """The settings of a run: as given, else as the recipe has them, but for the epochs."""
    chosen = {"dtype": native_dtype()} | recipe_of(method, model) | given
    # in one order, as the same flags in another are the same run
    settings = SimpleNamespace(**dict(sorted(chosen.items())))
    settings.mask_ratio = (
        [min(settings.mask_ratio), max(settings.mask_ratio)] if method.masks else None
    )
    return settings


def decide_epochs(settings, steps_per_epoch):
    """Set how often the documents are seen, where no flag says so."""
    kind = regex.match(r"\w*", settings.data)[0]
    steps = settings.usual_steps or STEPS.get(kind, WIKI_STEPS)
    enough = math.ceil(steps / steps_per_epoch)
    settings.epochs = settings.epochs or min(settings.most_epochs, enough)


# --------------------------------------------------------------------------------------------- main

BUILT_IN = ("tiny", "tiny-llada")


def run_methods(flags, methods, models=("tiny", "meta-llama/Llama-3.1-8B-Instruct")):
    """Train with every method that is asked for, in turn, and print one table.

    flags    those of `arguments`, as `parse_flags` has them
    methods  {name: Method}, of the method of the paper or of your own
    models   where --model names none: of a plain process, and of torchrun on GPUs
    """
    device = start_processes()
    with ExitStack() as ends:
        stop = listen(ends)
        # all methods first, so that a mistake in the last one does not wait for the training of
        # others
        runs = prepare_all(flags, methods, models, device)
        if "show" in flags:
            for run in runs:
                show_examples(run, flags["show"])
            return
        for run in runs:
            out = flags.get("out", flags.get("resume"))
            if out and len(runs) > 1:
                out = f"{out}-{run.settings.method}"
            run.out, run.finished = on_rank_0(claim, run, out, ends)
        for run in runs:
            if run.finished:
                print0(f"{run.out}: finished before, with these settings and data")
                continue
            with explained(run):
                build(run)
                train(run, stop)
                finish(run)
    directories = [str(run.out) for run in runs]
    on_rank_0(evaluation.report, directories)
    print0("\nresults:", shlex.join(directories))
    print0("ask it: ", evaluation.ask_command(directories[-1]))


def prepare_all(flags, methods, models, device):
    """A Run for each method to train, or the one to resume, all of whose settings are given."""
    if "resume" in flags:
        path = Path(flags["resume"], "results.json")
        with data.reading(
            path,
            "not of this version, or go on with the script that began it, or its method has a bug",
        ):
            return [Run(data.read_json(path)["arguments"], methods, device)]
    given = {name: flags[name] for name in flags if name != "out"}
    model = flags.get("model", models[launched() and device.type == "cuda"])
    usual = list(methods)[-2 if model in BUILT_IN else -1 :]
    return [
        Run(given | {"model": model, "method": name}, methods, device)
        for name in flags.get("method", usual)
    ]


PLAN = """\
{0.method}: {documents} records and {learned} questions to learn, {questions} to ask
  {0.epochs} epochs of batches of {0.batch_size} and {0.rehearse} steps of --rehearse, lr {0.lr:g}
  defaults: {0.source}
  computes in {0.dtype} (--dtype, else what is native here), weights and gradient sums in float32"""


def describe(run):
    """Say what will be trained."""
    settings = run.settings
    if settings.model in BUILT_IN and Path(settings.data).exists():
        print0(f"{settings.model} has words for its own people alone: give a real --model")
    print0(
        PLAN.format(
            settings,
            documents=len(run.dataset.documents),
            learned=len(run.dataset.learned),
            questions=len(run.dataset.questions),
        )
    )


def native_dtype():
    """What to compute in where nobody says: bfloat16 on GPUs that have it."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def fit_documents(run):
    """Cut texts that are too long into passages, leave out answers that are, and say so."""
    limit = min(run.settings.max_len, run.model.config.context)
    dataset = run.dataset

    def fits(document):
        return len(example_of(run, document, 0, epoch=0).ids) <= limit

    fitting = [part for document in dataset.documents for part in data.passages(document, fits)]
    if fitting != dataset.documents:
        print0(f"texts longer than {limit} tokens (--max-len) are cut, answers left out:")
    dataset.documents = fitting
    if not fitting:
        raise UserError(
            f"--data {run.settings.data}: no document of at most {limit} tokens (--max-len) to "
            "learn; eval.py asks questions alone"
        )
    for question in dataset.learned:
        with data.reading(question["where"]):
            run.model.check_length(sum(map(len, as_chat(question, run.tokenizer))))


def show_examples(run, number):
    """Print training examples as the model sees them: [tokens with loss], _ for a masked token."""
    examples = [
        example_of(run, document, n, epoch=0)
        for n, document in enumerate(run.dataset.documents[:number])
    ]
    for example in examples + questions_of_step(run, 0, 1):
        print0(f"{run.settings.method}:\n{data.show(example, run.tokenizer)}\n")


def build(run):
    """Weights and optimizer of a run: new, or where it stopped."""
    settings = run.settings
    print0(f"{settings.method}: into {run.out}; if it ends early: {resume_command(run.out)}")
    check_shared(run.out)
    if settings.mlp_only:
        freeze_all_but_mlps(run.model)
    shard(run.model, run.device, getattr(torch, settings.dtype), settings.offload)
    load_weights(run.model, run.directory, "cpu" if settings.offload else run.device)
    run.optimizer = make_optimizer(run.model, settings.eps)
    run.clock = time.monotonic()
    load_checkpoint(run)
    on_rank_0(data.write_chat_files, run.tokenizer, run.directory, run.out)
    # as it was before the first step: a resumed run does again what came behind it
    on_rank_0(data.write_lines, run.out / "metrics.jsonl", run.lines)


def environment(device):
    """What a run's numbers may hang on, for results.json."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "processes": world_size(),
        "torch": torch.__version__,
        "maskft": commit(),
    }


def commit():
    """The git commit of this file, with "-dirty" if files were changed since; None if unknown."""
    with suppress(OSError, subprocess.SubprocessError):  # no git, or none of its directories
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            stderr=subprocess.DEVNULL,
            text=True,
        ).strip()


@contextmanager
def explained(run):
    """What ends a run early, with what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({error}); begin again with --offload, with a lower "
            "--micro-batch-tokens or --max-len, on more GPUs, or with a smaller --model"
        ) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{run.out} cannot be written to ({error}); once it can: {resume_command(run.out)}"
        ) from None
    except (KeyboardInterrupt, RuntimeError):
        print0("stopped early; go on with\n   ", resume_command(run.out))
        raise


def finish(run):
    """Write the model, its scores, its card and the curves, print some of its answers and what it
    forgot; delete the checkpoints, free the memory."""
    save(run.model, run.out, run.settings.dtype)  # the dtype that it is scored in
    predictions = evaluate_and_record(run, run.steps, run.settings.epochs)
    print0(evaluation.samples(predictions))
    drift = run.results["evaluations"][-1]["drift"]
    if drift > 1 and not run.settings.rehearse:
        print0(
            f"drift {drift:.1f}: it now answers other questions with what it was taught; "
            "--mlp-only and --rehearse 8 keep more of what it knew"
        )
    on_rank_0(evaluation.write_end, run.out, run.results, run.lines, predictions)
    on_rank_0(shutil.rmtree, run.out / "ckpt", ignore_errors=True)
    run.model = run.optimizer = None
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def resume_command(out):
    """What to type to go on with a run."""
    script = getattr(sys.modules["__main__"], "__file__", __file__)  # a notebook has no file
    local = os.environ.get("LOCAL_WORLD_SIZE")
    start = f"torchrun --nproc_per_node {local}" if local else "python"
    return evaluation.command(script, "--resume", out, start=start)


# any other error: torchrun ends the run, with the traceback of the rank that failed first
@elastic.record
def entry_point(body):
    """Run a main function: a user's mistake ends with its message and exit status 1, a stop with
    130, so that no script takes the run for done."""
    with suppress(AttributeError):  # a notebook's output has no such method, a closed one is None
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    status = 0
    try:
        body()
    except KeyboardInterrupt:
        status = 130
    except (UserError, OSError) as error:  # of the latter: a full disk, a closed directory
        status = f"error: {error}"
        if rank():
            time.sleep(3)  # rank 0 most likely says the same, and its end is the end of all
            status = f"[rank {rank()}] {status}"
        if world_size() > 1:
            sys.exit(status)  # the others may never arrive at the end of the group
    if dist.is_initialized():
        dist.destroy_process_group()  # otherwise a thread of it may abort at exit
    sys.exit(status)


def main():
    run_methods(parse_flags(arguments(__doc__, METHODS)), METHODS)


if __name__ == "__main__":
    entry_point(main)
