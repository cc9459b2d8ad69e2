"""Masked fine-tuning: teach a language model new facts by having it recover masked documents.

    python maskft.py                                          # laptop: ordinary against masked fine-tuning of tiny/
    torchrun --nproc_per_node 8 maskft.py --data bio          # eight GPUs: Llama-3.1-8B-Instruct, the paper's settings
    python maskft.py --resume out/bio-masked-1                # go on where a run stopped

The method is *Diffusion-Inspired Masked Fine-Tuning for Knowledge Injection in Autoregressive LLMs* (arXiv 2510.09885);
"paper" below means that one, and masked_arLLM its released code. The file reads from top to bottom: config, model,
weights, the paper (masking and loss), generation, FSDP2, the training loop, arguments.

Dimension names in shape comments: B batch, T sequence, S keys seen by attention (T, or the cache's length), D width,
H heads, G key/value heads, K head size, F MLP width, V vocabulary, N positions that were picked out of B x T.
"""

import argparse
import dataclasses
import gc
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
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
from huggingface_hub import errors
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
import llada
from data import IGNORE, Example, UserError

# ------------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    """Sizes of one decoder, whatever family it comes from. `raw` is its config.json, written back on saving."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    context: int  # longest sequence in tokens; of a model with a sliding window, which is not implemented, no more than that
    norm_eps: float
    rope_theta: float
    rope_scaling: dict  # {} = plain RoPE
    tied: bool  # the head is the embedding
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    causal: bool = True  # False: every token sees every other (LLaDA)
    raw: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "context"):
            size, most = getattr(self, name), 2**10 if name == "layers" else 2**30
            if not isinstance(size, int) or not 0 < size <= most:  # before anything of that size is made
                raise UserError(f"{name} = {size!r} is not a size from 1 to {most}")
        if self.heads % self.kv_heads or self.head_size % 2:
            raise UserError(f"heads = {self.heads} is not a multiple of kv_heads = {self.kv_heads}, or "
                            f"head_size = {self.head_size} is odd")  # fmt: skip


def read_config(directory):
    """The Config of a model directory; UserError for a family or a setting that is not implemented."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found. A model is a directory with config.json, *.safetensors and a tokenizer")
    raw = data.read_json(path)
    try:
        return parse_config(raw)
    except KeyError as missing:
        raise UserError(f"{path}: the field {missing} is missing") from None
    except (UserError, ArithmeticError, AttributeError, TypeError, ValueError) as error:  # a list for a number, say
        raise UserError(f"{path}: {error}") from None


def parse_config(raw):
    """The Config in the Hugging Face config of any supported family; both spellings of the RoPE fields."""
    family = raw.get("model_type")
    if family == "llada":
        return llada.parse_config(raw)
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UserError(f"model_type {family!r} is not one of llama, mistral, qwen2, qwen3, llada")
    refuse_unless(raw, hidden_act=("silu",), mlp_bias=(False, None), quantization_config=(None,))
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"RoPE scaling {kind!r} is not one of default, linear, llama3")
    heads, bias = raw["num_attention_heads"], raw.get("attention_bias", False)
    # Qwen2 and Qwen3 carry a sliding_window that counts only where use_sliding_window says so
    sliding = raw.get("sliding_window") if raw.get("use_sliding_window", family == "mistral") else None
    return Config(
        vocab=raw["vocab_size"], width=raw["hidden_size"], layers=raw["num_hidden_layers"],
        heads=heads, kv_heads=raw.get("num_key_value_heads") or heads,
        head_size=raw.get("head_dim") or raw["hidden_size"] // heads, mlp_width=raw["intermediate_size"],
        context=min(raw.get("max_position_embeddings", 2048), sliding or math.inf), norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling={} if kind == "default" else {**rope, "rope_type": kind}, tied=raw.get("tie_word_embeddings", False),
        qkv_bias=bias or family == "qwen2", out_bias=bias, qk_norm=family == "qwen3", raw=raw,
    )  # fmt: skip


def refuse_unless(raw, **allowed):
    """UserError for the first field of a config whose value is not implemented; absent fields are fine."""
    for field, values in allowed.items():
        if field in raw and raw[field] not in values:
            raise UserError(f"{field} = {raw[field]!r} is not implemented (only {' or '.join(map(repr, values))})")


# -------------------------------------------------------------------------------------------------------------- model


class RMSNorm(nn.RMSNorm):
    """torch's, kept out of autocast, which would run it in fp32, keep that copy for backward and have every linear cast."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def rope_tables(positions, config):
    """cos and sin for rotary embedding (arXiv 2104.09864), with Llama 3's and linear scaling as in transformers.

    positions (B, T) int64 -> two (B, 1, T, K) fp32, the angles of the K/2 frequencies twice over: head size 4, position
    p gives [cos p, cos p/100, cos p, cos p/100] at theta 1e4. Computed anew in every forward: a buffer would be garbage
    after `to_empty`, and bf16 angles are wrong beyond position 256.
    """
    index = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-index / config.head_size)  # (K/2,)
    scaling = config.rope_scaling
    if scaling.get("rope_type") == "linear":
        frequency = frequency / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        # waves that turn often within the old context stay, those that never finish a turn are stretched
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angles = positions[:, None, :, None].float() * frequency  # (B, 1, T, K/2)
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, T, K)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) of (B, H, T, K) by its angle.

    Split halves, the convention of Hugging Face checkpoints: nothing has to be permuted on loading.
    """
    first, second = x.float().chunk(2, dim=-1)  # (B, H, T, K/2) each
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


class KVCache:
    """Keys and values of the tokens already seen, one pair of (B, G, S, K) a layer, in the dtype they were made in."""

    def __init__(self, layers, size):
        self.layers, self.size, self.used = [None] * layers, size, 0

    def extend(self, layer, k, v):
        """Append (B, G, T, K) to a layer; all keys and values so far. `used` is moved on by the model, once a forward."""
        if self.layers[layer] is None:
            room = (k.shape[0], k.shape[1], self.size, k.shape[3])
            self.layers[layer] = k.new_empty(room), v.new_empty(room)
        end = self.used + k.shape[2]
        for whole, new in zip(self.layers[layer], (k, v)):
            whole[:, :, self.used : end] = new
        return [whole[:, :, :end] for whole in self.layers[layer]]


class Block(nn.Module):
    """One pre-norm Llama layer: grouped-query attention, then SwiGLU."""

    def __init__(self, config):
        super().__init__()
        D, K, F_, norm = config.width, config.head_size, config.mlp_width, partial(RMSNorm, eps=config.norm_eps)
        self.config = config
        self.attn_norm = norm(D)
        self.q = nn.Linear(D, config.heads * K, bias=config.qkv_bias)
        self.k = nn.Linear(D, config.kv_heads * K, bias=config.qkv_bias)
        self.v = nn.Linear(D, config.kv_heads * K, bias=config.qkv_bias)
        self.o = nn.Linear(config.heads * K, D, bias=config.out_bias)
        self.q_norm = norm(K) if config.qk_norm else nn.Identity()
        self.k_norm = norm(K) if config.qk_norm else nn.Identity()
        self.mlp_norm = norm(D)
        self.gate = nn.Linear(D, F_, bias=False)
        self.up = nn.Linear(D, F_, bias=False)
        self.down = nn.Linear(F_, D, bias=False)

    def forward(self, x, rope, mask, cache=None, layer=0):
        x = x + self.attention(self.attn_norm(x), rope, mask, cache, layer)
        h = self.mlp_norm(x)
        gate, up = self.gate(h), self.up(h)  # (B, T, F) each
        if torch.is_grad_enabled():
            # silu(gate) and the product are made again in backward, not kept: half of what is as wide as the MLP, for no
            # matmul (checkpoint stops running again once it has the input of `down`, the last thing that backward needs)
            return x + checkpoint(self.activate, gate, up, use_reentrant=False)
        return x + self.activate(gate, up)  # (B, T, D)

    def activate(self, gate, up):
        return self.down(F.silu(gate) * up)

    def attention(self, x, rope, mask, cache, layer):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.config.head_size) for f in (self.q, self.k, self.v))  # (B, T, H or G, K)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, K)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, G, S, K)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and self.config.causal and T > 1,
            enable_gqa=self.config.heads != self.config.kv_heads,
        )  # (B, H, T, K)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class Model(nn.Module):
    """The one decoder behind Llama, Mistral, SmolLM2, Qwen and LLaDA; they differ in their Config alone."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        # a tied model has no head of its own: two names for one tensor come apart under to_empty and FSDP
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.recompute = False  # True: training keeps the input of each block alone, and runs it again in backward
        self.layered = False  # True: answers gather the parameters layer by layer, and all ranks call the model as often

    def forward(self, ids, key_mask=None, labels=None, weights=None, pick=None, cache=None):
        """Logits, or with `labels` the summed loss.

        ids       (B, T) int64
        key_mask  (B, S) bool, True = real token; None = all are. Padding may be on either side; positions count real
                  tokens only, and padding is never attended to. With a cache it covers the cached tokens too.
        labels    (B, T) int64, each in the place of its own token, IGNORE = no loss. A causal model predicts a label
                  one position earlier, a diffusion model in place.
        weights   (B,) fp32, the weight of each sequence's tokens in the loss
        pick      (B, T) bool: logits only there
        returns   logits (B, T, V), or (N, V) with `pick`; or with `labels` the weighted sum of cross entropies, a scalar
        """
        mask, positions = self.mask_and_positions(ids, key_mask, cache)
        rope = rope_tables(positions, self.config)
        x = self.embed(ids)  # (B, T, D)
        for layer, block in enumerate(self.blocks):
            if self.recompute and labels is not None:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache, layer)
        if cache is not None:
            cache.used += ids.shape[1]
        head = self.embed.weight if self.head is None else self.head.weight  # (V, D)
        if labels is not None:
            if self.config.causal:
                x, labels = x[:, :-1], labels[:, 1:]
            where = labels != IGNORE  # pick first: norm, head and loss are spent on labelled positions only
            return loss_sum(x[where], self.norm, head, labels[where], weights[:, None].expand(where.shape)[where])
        if pick is not None:
            x = x[pick]  # (N, D)
        return F.linear(self.norm(x), head)

    def mask_and_positions(self, ids, key_mask, cache):
        """Attention mask (B, 1, T, S) bool or None where SDPA needs none, and positions (B, T) of the real tokens."""
        (B, T), past = ids.shape, cache.used if cache is not None else 0
        if past + T > self.config.context:
            raise UserError(f"{past + T} tokens are more than the model takes, {self.config.context}")
        if key_mask is None:
            assert past == 0 or T == 1, "several tokens behind a cache need a key_mask"
            return None, torch.arange(past, past + T, device=ids.device).expand(B, T)
        positions = (key_mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        mask = key_mask[:, None, None, :].expand(B, 1, T, past + T)
        own = torch.ones(T, past + T, dtype=torch.bool, device=ids.device).tril(past)
        if self.config.causal:
            mask = mask & own
        # a padding row sees itself: a row that sees nothing is NaN in some kernels, and NaN spreads in backward
        return mask | own.triu(past), positions


# ----------------------------------------------------------------------------------------------------- weights in, out

# our name: the name in the checkpoint; "{}" stands for the layer, ".weight" and ".bias" follow
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.q": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.k": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.v": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.o": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


def checkpoint_names(model, family):
    """{our parameter name: its name in a checkpoint of a family, which is config.json's model_type}."""
    table, names = llada.LLADA_NAMES if family == "llada" else LLAMA_NAMES, {}
    for name, _ in model.named_parameters():
        stem, kind = name.rsplit(".", 1)  # "blocks.7.q", "weight"
        names[name] = f"{table[re.sub(r'[0-9]+', '{}', stem)].format(re.sub('[^0-9]', '', stem))}.{kind}"
    return names


def load(path_or_id, device="cpu", dtype=torch.float32):
    """A Model in eval mode from a model directory, a built-in name or a hub id; UserError says what is wrong with it."""
    directory = find_model(path_or_id)
    with torch.device("meta"):
        model = Model(read_config(directory)).to(dtype)
    load_weights(model, directory, device)
    return model.eval()


def find_model(name):
    """The local directory of a model: the path itself, one beside this file (`tiny`), or a download from the hub."""
    for directory in (Path(name), Path(__file__).parent / name):
        if directory.is_dir():
            return directory
    if str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise UserError(f"--model {name}: no such directory, and not a hub id (owner/name)")
    try:
        # names only what is read: never pickled weights, never code
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "tokenizer.model"]))
    except errors.GatedRepoError:
        why = (f"is gated: accept its licence at https://huggingface.co/{name}, then `hf auth login`, "
               "or give a local directory or the built-in model (--model tiny)")  # fmt: skip
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        why = "is no directory, and no model on the hub (a private one needs `hf auth login`)"
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        why = (f"is not in the local cache and the hub could not be reached ({type(error).__name__}). On a machine with a "
               f"network: `hf download {name} --local-dir DIR`, then --model DIR; or --model tiny")  # fmt: skip
    raise UserError(f"--model {name} {why}")


def open_tensors(directory):
    """{checkpoint name: (shape, file)} of a model directory, single or sharded with an index; no tensor is read yet."""
    single, index, tensors = directory / "model.safetensors", directory / "model.safetensors.index.json", {}
    if not single.is_file() and not index.is_file():
        raise UserError(f"{directory}: neither {single.name} nor {index.name} (pickled weights are never read)")
    try:
        files = {single.name} if single.is_file() else set(data.read_json(index)["weight_map"].values())
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{index}: no weight_map, which says what file a tensor is in: download it again") from None
    for path in [directory / str(file) for file in files]:
        if path.parent != directory or not path.is_file():
            raise UserError(f"{index}: names {path}, which is not a file of this directory")
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                tensors |= {name: (file.get_slice(name).get_shape(), path) for name in file.keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}): download it again") from None
    return tensors


def load_weights(model, directory, device):
    """Make room for a model built on `meta` and fill every parameter by name, each rank reading only the rows it holds;
    UserError names a tensor that is missing, extra or of another shape, before there is any room."""
    tensors, names = open_tensors(directory), checkpoint_names(model, data.read_json(directory / "config.json")["model_type"])
    # what some checkpoints carry and no model reads: RoPE buffers of early Llama 2, a copy of the tied head
    unread = {n for n in tensors if n.endswith("rotary_emb.inv_freq") or (model.config.tied and n == "lm_head.weight")}
    missing, extra = set(names.values()) - set(tensors), set(tensors) - set(names.values()) - unread
    if missing or extra:
        what, which = ("is missing", missing) if missing else ("is not part of this model", extra)
        raise UserError(f"{directory}: the tensor {min(which)} {what} ({len(which)} such); is config.json of the same model?")
    for name, parameter in model.named_parameters():
        shape, path = tensors[names[name]]
        if shape != list(parameter.shape):
            raise UserError(f"{path}: {names[name]} has shape {shape}, config.json says {list(parameter.shape)}")
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        local, start = parameter.detach(), 0
        if isinstance(parameter, DTensor):  # FSDP2 cuts as torch.chunk does: ceil(n / W) rows a rank, the last ones fewer
            local, mesh, n = local.to_local(), parameter.device_mesh, parameter.shape[0]
            start = min(mesh.get_local_rank() * math.ceil(n / mesh.size()), n)
        if local.shape[0]:
            # into the shard in place; the file is opened anew for each, as what was read of it stays mapped until it is closed
            with safetensors.safe_open(tensors[names[name]][1], framework="pt", device="cpu") as file:
                local.copy_(file.get_slice(names[name])[start : start + local.shape[0]])


def save(model, path):
    """Write config.json and safetensors of at most 5 GB, in the dtype the config declares; after training that is the one
    it was scored in. Call it on every rank: tensors are gathered one by one, and rank 0 keeps those of a file at a time."""
    path, raw = Path(path), model.config.raw
    declared = raw.get("dtype") or raw.get("torch_dtype") or raw.get("precision") or "float32"
    dtype = getattr(torch, declared.replace("amp_bf16", "bfloat16"))  # LLaDA's word for it
    names = checkpoint_names(model, raw["model_type"])
    parameters = {names[ours]: parameter.detach() for ours, parameter in model.named_parameters()}
    plan = huggingface_hub.split_torch_state_dict_into_shards(
        {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in parameters.items()})  # fmt: skip
    if rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        data.write_text(path / "config.json", json.dumps(raw, indent=2) + "\n")
    for file, members in plan.filename_to_tensors.items():
        whole = {}
        for name in members:
            tensor = parameters[name]
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # on every rank
            if rank() == 0:
                whole[name] = tensor.to("cpu", dtype).contiguous()
        if rank() == 0:
            save_file(whole, path / f"{file}.part", metadata={"format": "pt"})
            os.replace(path / f"{file}.part", path / file)  # a file that has its name is whole
    if rank() == 0 and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        data.write_text(path / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


# ------------------------------------------------------------------------------------- the paper: masking and the loss

RECOVER = "\nReturn the recovered masked passage."  # after the masked document, in the user's turn [paper A.4]
LEAD_IN = "Here is the recovered text:\n\n"  # before the document, in the assistant's turn; no loss on it
RECOVER_ANSWER = "Question:\n{}\nAnswer:\n"  # before the masked answer of a problem, in the user's turn
RETURN_ANSWER = "\nReturn the recovered masked answer."  # after it
TELL = "Tell me a fact."  # the user's turn of ordinary fine-tuning


def draw_ratio(mask_ratio, rng):
    """t ~ U(low, high) for one document; low == high is a fixed ratio.

    differs from masked_arLLM: one ratio per document and epoch, not one per batch (and the same on every rank).
    """
    low, high = mask_ratio
    return low + (high - low) * rng.random()


def mask_tokens(ids, ratio, mask_id, rng):
    """Replace each id by mask_id with probability `ratio`, independently; the new ids and which were hit (T,) bool."""
    hit = rng.random(len(ids)) < ratio
    return [mask_id if h else i for i, h in zip(ids, hit)], hit


def text_of(record):
    """The text of a document; UserError for a record of another kind, which not every method can learn."""
    if "text" not in record:
        found = "question with its answer" if "question" in record else "person"
        raise UserError(f"this method learns documents; found a {found}: "
                        "use masked or sft for questions, tiny/pretrain.py for people")  # fmt: skip
    return record["text"]


def masked_example(record, tokenizer, mask_ratio, rng):
    """Masked fine-tuning [paper eq. 2]: the masked document in the prompt, all of the original in the answer.

    The loss is on every token of the document, masked or not, and on the end of turn that follows it. Not so with a
    question and its answer [paper, math]: the answer is masked, and the loss is only where it is.
    """
    if "question" in record:
        return masked_answer(record, tokenizer, mask_ratio, rng)
    document = tokenizer.encode(text_of(record))
    ratio = draw_ratio(mask_ratio, rng)  # 1. a ratio, drawn anew every time the document is seen
    masked, _ = mask_tokens(document, ratio, tokenizer.mask_id, rng)  # 2. each token masked with that probability
    return recovery(masked, document, tokenizer)  # 3. a chat that recovers it, 4. with loss on the whole document


def masked_answer(record, tokenizer, mask_ratio, rng):
    """Masked fine-tuning on a question and its answer: loss only on answer tokens whose twin in the prompt is masked."""
    answer = tokenizer.encode(record["answer"])
    masked, hit = mask_tokens(answer, draw_ratio(mask_ratio, rng), tokenizer.mask_id, rng)
    question = tokenizer.encode(RECOVER_ANSWER.format(record.get("problem", record["question"])))
    prompt = tokenizer.chat([{"role": "user", "content": question + masked + tokenizer.encode(RETURN_ANSWER)}])
    labels = [IGNORE] * len(prompt) + [token if h else IGNORE for token, h in zip(answer, hit)]
    # no end of turn: it has no twin in the prompt [paper, math]
    return Example(prompt + answer, labels, weight=1.0, share=int(hit.sum()))


def random_example(record, tokenizer, mask_ratio, rng):
    """The control [paper fig. 14]: random ordinary tokens in place of the masked document, the rest alike."""
    document = tokenizer.encode(text_of(record))
    noise = [tokenizer.ids[i] for i in rng.integers(len(tokenizer.ids), size=len(document))]
    return recovery(noise, document, tokenizer)


def recovery(shown, document, tokenizer):
    """`shown` in the user's turn, `document` in the assistant's, both ids of one length."""
    prompt = tokenizer.chat([{"role": "user", "content": shown + tokenizer.encode(RECOVER)}])
    return supervise(prompt + tokenizer.encode(LEAD_IN), document + [tokenizer.eot_id])


def sft_example(record, tokenizer, mask_ratio, rng):
    """Ordinary fine-tuning in chat form, the paper's autoregressive baseline: a document, or the answer to a question;
    nothing is random in it."""
    prompt = tokenizer.chat([{"role": "user", "content": record.get("question", TELL)}])
    target = record["answer"] if "question" in record else text_of(record)
    return supervise(prompt, tokenizer.encode(target) + [tokenizer.eot_id])


def reverse_example(record, tokenizer, mask_ratio, rng):
    """Entity-level reverse training (Golovneva et al. 2024, arXiv 2403.13799), the paper's weak baseline: a document as
    `sft` has it or, one time in two, with its words in reverse order and its entities whole.

    They find entities with a tagger. Here one is a run of words that begin with a capital or a digit, as in "3 June 1971";
    every other word, and every punctuation mark, stands for itself. So a lower-case entity is taken apart, and a
    capitalised word that opens a sentence joins an entity that follows it.
    """
    text = text_of(record)
    if rng.random() < 0.5:
        text = " ".join(reversed(ENTITIES.findall(text)))
    return sft_example({"text": text}, tokenizer, mask_ratio, rng)


# a capitalised word (with what hyphens and apostrophes join to it) or a number, more of them; else a word, else a mark
ENTITIES = regex.compile(r"(?:[\p{Lu}\d][\w'’-]*)(?: [\p{Lu}\d][\w'’-]*)*|[\w'’-]+|[^\w\s]")


def raw_example(record, tokenizer, mask_ratio, rng):
    """Ordinary fine-tuning in pre-training form, as masked_arLLM has it: bos, document, eos; loss on every token that
    has one before it."""
    document = tokenizer.encode(text_of(record)) + [tokenizer.eos_id]
    return supervise(document[:1], document[1:]) if tokenizer.bos_id is None else supervise([tokenizer.bos_id], document)


def supervise(prompt, target):
    """An Example with loss on `target` and none on `prompt`; its share of the step's loss is its number of targets."""
    return Example(prompt + target, [IGNORE] * len(prompt) + target, weight=1.0, share=len(target))


METHODS = {"masked": masked_example, "sft": sft_example, "raw": raw_example, "random": random_example,
           "reverse": reverse_example}  # fmt: skip

CHUNK = 1024  # rows of logits in memory at a time: (1024, 128k) fp32 is half a GB


def loss_sum(x, norm, head, labels, weights):
    """Weighted sum of the cross entropies at N labelled positions; the caller divides by the step's total share.

    x (N, D) before the final norm, head (V, D), labels (N,), weights (N,) -> scalar fp32. The logits are made chunk
    by chunk, of all chunks but the last again in backward, so (N, V) never exists. N = 0 gives 0 and zero gradients,
    never NaN: a rank without a label takes part in every collective like the others.
    """

    def chunk_loss(x, labels, weights):
        logits = F.linear(norm(x), head)  # (CHUNK, V)
        return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()

    *chunks, last = zip(x.split(CHUNK), labels.split(CHUNK), weights.split(CHUNK))  # N = 0: one chunk, of no rows
    total = sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)
    return total + chunk_loss(*last)  # not made again: backward begins with it


# ---------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(model, prompts, max_new_tokens=128, stop_ids=()):
    """Greedy decoding of a batch: lists of ids in, lists of new ids out, each cut before its first stop id.

    Prompts are padded on the left, so that all rows grow at the same end; the whole stops when every row has.
    """
    if not prompts:
        return []
    device, width = next(model.parameters()).device, max(map(len, prompts))
    stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (B, T)
    key_mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    last = torch.zeros_like(key_mask)
    last[:, -1] = True  # of the prompt, only the last position's logits are wanted
    cache = KVCache(model.config.layers, width + max_new_tokens)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    answers = []
    while len(answers) < max_new_tokens and any_goes_on(model, not stopped.all()):
        logits = model(ids, key_mask, pick=last, cache=cache)  # (B, V)
        new = logits.argmax(-1)  # (B,)
        answers.append(new)
        stopped |= torch.isin(new, stop)
        ids, last = new[:, None], torch.ones_like(new[:, None], dtype=torch.bool)
        key_mask = torch.cat([key_mask, last], dim=1)
    return [list(takewhile(lambda token: token not in stop_ids, row)) for row in torch.stack(answers, dim=1).tolist()]


def answer(model, tokenizer, prompts, max_new_tokens=128):
    """Greedy answers of an autoregressive model."""
    return generate(model, prompts, max_new_tokens, tokenizer.stop_ids)


# --------------------------------------------------------------------------------------------------------------- FSDP2

TIMEOUT = 3600  # seconds that a step, or a batch of answers, may take before its rank is taken to hang


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """Print on rank 0 alone, above the progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))


def start_processes():
    """Join torchrun's processes, or be a group of one: the same code runs on one CPU and on many GPUs. The device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        if device.index >= torch.cuda.device_count():
            raise UserError(f"only {torch.cuda.device_count()} GPUs are visible: torchrun --nproc_per_node that many")
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # gloo beside nccl: small objects and checkpoints travel by it; `watch` has its say before a collective gives up
    backend, patience = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=TIMEOUT + 300)
    dist.init_process_group(backend, timeout=patience, **alone)
    if rank():
        huggingface_hub.utils.disable_progress_bars()  # of downloads; the training bar is rank 0's alone
    return device


def watch(run, where):
    """Called at every step and batch of answers: unless it is again in time, this rank says where it hangs, and ends."""

    def end():
        stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
        os.write(2, f"[rank {rank()}] {where}: no progress in {TIMEOUT} seconds, at\n{''.join(stack)}".encode())
        os._exit(1)  # torchrun ends the others, which were waiting for this one, and most likely say where

    if run.alarm:
        run.alarm.cancel()
    run.alarm = threading.Timer(TIMEOUT, end)
    run.alarm.daemon = True
    run.alarm.start()


def sum_over_ranks(*numbers):
    """Each number summed over the ranks, as floats, in one collective."""
    packed = torch.stack([torch.as_tensor(n, dtype=torch.float64).cpu() for n in numbers])
    dist.all_reduce(packed)
    return packed.tolist()


def shard(model, device, dtype):
    """FSDP2: every block a unit, embedding, norm and head the root's. fp32 master weights and gradient sums; in bf16
    the gathered copies are bf16."""
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    # without cast_forward_inputs=False the RoPE tables would be rounded to bf16
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def memory(model, gpus, sequences, tokens, size=2, recompute=False):
    """{part: bytes} of the peak of one GPU in training. Computed; a test holds it against the measured peak of small models.

    sequences, tokens  of a micro-batch of one GPU
    size               of an element in the computation: 2 = bfloat16, 4 = float32
    """
    c, rows = model.config, sequences * tokens
    layer, n = (sum(p.numel() for p in module.parameters()) for module in (model.blocks[0], model))
    rest = n - c.layers * layer  # embedding, norm and head stay gathered, with their gradients
    # what a layer keeps of a row for backward: four vectors of the width (the inputs of norms and of what follows them),
    # queries and their answers, keys, values; gate and up
    kept = size * rows * (4 * c.width + 2 * (c.heads + c.kv_heads) * c.head_size + 2 * c.mlp_width)
    # fp32 logits and softmax, and in bf16 also what they are made of
    logits = min(CHUNK, rows) * c.vocab * (8 + size % 4)
    return {
        "weights": 4 * n / gpus,
        "gradients": 4 * n / gpus,
        "optimizer": 8 * n / gpus,
        # a layer and its gradients; on several GPUs also the next layer on its way and the last one's sum in fp32
        "gathered": 2 * size * (rest + layer) + (gpus > 1) * (2 * size + 8) * layer,
        "activations": size * rows * c.width * c.layers + kept if recompute else kept * c.layers,
        "logits": max(0, logits - kept) if recompute else logits,  # recompute: the two are never there together
    }


def fit_memory(run, model):
    """Set what makes training fit into memory: blocks run again in backward, answers with one layer gathered at a time;
    said aloud, and UserError where that is not enough."""
    if run.device.type == "cuda":
        have = float(torch.cuda.mem_get_info(run.device)[0])  # what other programs leave
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    have = torch.tensor(have, dtype=torch.float64)
    dist.all_reduce(have, dist.ReduceOp.MIN)  # all ranks decide alike: `layered` changes what collectives they make
    room = 0.9 * have.item()  # libraries and holes take their share
    size, rows = getattr(torch, run.dtype).itemsize, min(run.micro_batch_size, run.batch_size // world_size())
    shape = world_size(), rows, min(run.max_len, model.config.context), size
    plain, parts = memory(model, *shape), memory(model, *shape, recompute=True)
    if sum(parts.values()) > room:
        shown = ", ".join(f"{part} {size / 2**30:.1f}" for part, size in parts.items())
        raise UserError(f"each process needs {sum(parts.values()) / 0.9 / 2**30:.1f} GiB of memory ({shown}) and has "
                        f"{have.item() / 2**30:.1f}: use more GPUs (torchrun --nproc_per_node), a smaller --micro-batch-size, "
                        "--max-len or --model")  # fmt: skip
    model.recompute = sum(plain.values()) > room
    whole = size * sum(p.numel() for p in model.parameters())
    model.layered = parts["weights"] + parts["optimizer"] + whole > room
    if model.recompute:
        say("memory is short: blocks are run again in backward")
    if model.layered:
        say("memory is short: answers gather the parameters layer by layer, in every forward pass anew")


@contextmanager
def gathered(model):
    """All parameters whole on every rank, so that ranks may make different numbers of forward calls inside; not so if
    the model is `layered`: then each call gathers a layer after the other, and every rank has to make as many."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units if not model.layered else ():
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)  # the root stays whole until backward


def any_goes_on(model, going):
    """Whether this rank's batch goes on or, where every rank has to call the model as often, any rank's."""
    return sum_over_ranks(going)[0] > 0 if model.layered else going


# --------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(run, step):
    """Write out/.../ckpt/step-N beside, a checksum with every file, and rename it when whole; keep the last two."""
    part, whole = run.out / "ckpt" / f"part-{step}", run.out / "ckpt" / f"step-{step}"
    if rank() == 0:
        for left in part.parent.glob("part-*"):  # of a save that was cut short
            shutil.rmtree(left)
        part.mkdir(parents=True)
    dist.barrier()
    weights, moments = get_state_dict(run.decoder, run.optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=part)
    for file in [*part.glob(f"__{rank()}_*"), *([part / ".metadata"] if rank() == 0 else [])]:
        Path(f"{file}.sha256").write_text(sha256(file))
    dist.barrier()
    if rank() == 0:
        os.replace(part, whole)
        for old in checkpoints(run.out)[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(run):
    """Fill model and optimizer from the run's newest checkpoint; the step to go on with, 0 where none was saved yet."""
    saved, damaged = checkpoints(run.out), [None] * world_size()
    if not saved:
        return 0
    # DCP notices neither a flipped bit nor half a file before it is deep in it: each rank checks its share of the files
    notes = sorted(saved[-1].glob("*.sha256"))[rank() :: world_size()]
    dist.all_gather_object(damaged, [n.with_suffix("") for n in notes if sha256(n.with_suffix("")) != n.read_text()])
    if damaged := sum(damaged, []):
        older = f"step {saved[-2].name[5:]}" if saved[1:] else "the beginning"
        raise UserError(f"{damaged[0]}: damaged, its checksum is not that of what was saved. Delete {saved[-1]} and give the "
                        f"same --resume again: it goes on from {older}")  # fmt: skip
    weights, moments = get_state_dict(run.decoder, run.optimizer)
    # DCP unpickles .metadata: go on only with runs of your own
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=saved[-1])  # in place
    set_state_dict(run.decoder, run.optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(saved[-1].name[5:])


def checkpoints(out):
    """The whole checkpoints of a run, oldest first."""
    return sorted((out / "ckpt").glob("step-*"), key=lambda path: int(path.name[5:]))


def sha256(path):
    """Of a file's contents; None where there is no file."""
    if path.exists():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def how_to_go_on(run):
    saved, processes = checkpoints(run.out), os.environ.get("LOCAL_WORLD_SIZE")
    start = f"torchrun --nproc_per_node {processes}" if processes else "python"
    where = f"step {saved[-1].name[5:]}" if saved else "the beginning"
    nodes = " (on every node, with torchrun's other flags)" * (world_size() != int(processes or 1))
    return f"to go on from {where}{nodes}:\n    {start} {sys.argv[0]} --resume {run.out}"


# --------------------------------------------------------------------------------------------------- the training loop


def batches(documents, size, seed, epoch):
    """The global batches of an epoch, lists of document numbers; their order depends on (seed, epoch) alone.

    differs from masked_arLLM: another order every epoch, and the same batches on any number of ranks.
    """
    order = np.random.default_rng([seed, epoch]).permutation(documents).tolist()
    return [order[i : i + size] for i in range(0, documents, size)]


def build(run, number, epoch):
    """The Example of one document in one epoch; its randomness depends on (seed, epoch, document) alone."""
    rng = np.random.default_rng([run.seed, epoch, number + 1])  # + 1: numpy takes [a, b, 0] for [a, b], the order's seed
    return run.example(run.dataset.documents[number], run.tokenizer, run.mask_ratio, rng)


def deal(examples, micro_batch_size):
    """This rank's micro-batches of a step: neighbours in length together, and as many for every rank (some empty)."""
    examples = sorted(examples, key=lambda e: -len(e.ids))
    size = micro_batch_size * world_size()
    return [examples[i : i + size][rank() :: world_size()] for i in range(0, len(examples), size)]


def learning_rate(run, step):
    """2 % linear warm-up, then constant [paper A.4]."""
    warm_up = max(1, round(0.02 * run.steps))
    return run.lr * (step + 1) / warm_up if step < warm_up else run.lr


def make_optimizer(model, lr):
    """AdamW as in paper A.4: decay on matrices only, none on norms and biases.

    A tiny model gets a larger eps. Tokens that no document has (the "in" of an answer "in Oslo") get a small, steady
    gradient towards never being said; Adam with eps 1e-8 turns any steady gradient into full steps, and the model
    forgets how to answer. Large models have far more tokens and steps, and keep the usual eps.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    eps = 1e-5 if model.config.width < TINY_WIDTH else 1e-8
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=True)


def train(run):
    """Fine-tune run.decoder; True when the last epoch is done, False when asked to stop (all is saved, then).

    Epochs run 0..N-1; the model is evaluated before the epochs in run.eval_at and once after the last, so what is saved
    was scored. differs from masked_arLLM, which trains one epoch past its last evaluation.
    """
    saved_at, log = time.monotonic(), open_log(run) if rank() == 0 else None
    refresh = 0.1 if sys.stderr.isatty() else 60  # seconds; in a log file each refresh is a line
    bar = tqdm(total=run.steps, initial=run.start, desc=run.method, unit="step", disable=rank() > 0, dynamic_ncols=True,
               mininterval=refresh, maxinterval=max(refresh, 10))  # fmt: skip
    for step in range(run.start, run.steps):
        # 1. the rate of this step
        for group in run.optimizer.param_groups:
            group["lr"] = run.rate(run, step)
        # 2. evaluation, where an epoch begins
        epoch, nth = divmod(step, run.steps_per_epoch)
        if nth == 0 and epoch in run.eval_at:
            evaluate_and_record(run, step, epoch)
        if nth == 0 or step == run.start:
            order = batches(len(run.dataset.documents), run.batch_size, run.seed, epoch)
        # 3. gradients and step; all ranks learn the loss, and whether to stop or save
        watch(run, f"step {step}")
        began = time.monotonic()
        examples = [build(run, number, epoch) for number in order[nth]]
        loss, norm = update(run, examples)
        due = rank() == 0 and time.monotonic() - saved_at > 60 * run.save_every
        loss, stopping, saving = sum_over_ranks(loss, len(run.stop), due)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(f"step {step} (epoch {epoch}): the loss is {loss}, the gradient's norm {norm}: "
                            "begin again with a lower --lr (--resume would do the same again)")  # fmt: skip
        # 4. log
        if rank() == 0:
            speed = round(sum(len(e.ids) for e in examples) / (time.monotonic() - began))
            line = dict(step=step, epoch=epoch, loss=loss, lr=run.rate(run, step), grad_norm=norm,
                        tokens_per_second=speed, memory_gib=memory_gib(run.device))  # fmt: skip
            log.write(json.dumps(line) + "\n")
            log.flush()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update()
        # 5. what is needed to go on
        if stopping or saving:
            save_checkpoint(run, step + 1)
            saved_at = time.monotonic()
        if stopping and step + 1 < run.steps:  # asked for in the last step, there is nothing left to stop
            bar.close()
            say(f"stopped after step {step}; {how_to_go_on(run)}")
            return False
    bar.close()
    evaluate_and_record(run, run.steps, run.epochs)
    save(run.decoder, run.out)
    if rank() == 0 and (run.out / "ckpt").exists():  # three times the size of the model each, and of no more use
        shutil.rmtree(run.out / "ckpt")
    if rank() == 0 and run.predictions and find_spec("matplotlib"):
        evaluation.draw_panels(evaluation.summarize([run.results]), run.out / "curves.png", evaluation.draw_curves)
    return True


def update(run, examples):
    """A step of the optimizer on a global batch; this rank's part of the loss, and the gradient's norm before clipping.

    Every rank builds the whole global batch, so its number of targets is known without asking.
    """
    share = max(1, sum(e.share for e in examples))
    loss = torch.zeros((), device=run.device)
    for micro in deal(examples, run.micro_batch_size):
        batch = {k: v.to(run.device) for k, v in data.collate(micro, run.tokenizer.pad_id).items()}
        if run.decoder.config.causal:
            batch["key_mask"] = None  # padding is on the right, behind everything a real token sees
        with run.autocast:
            part = run.decoder(**batch) / share
        # FSDP2 averages gradients over the ranks: times their number it is the sum, whatever the split
        (part * world_size()).backward()
        loss += part.detach()
    norm = nn.utils.clip_grad_norm_(run.decoder.parameters(), 1.0).full_tensor().item()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss, norm


def evaluate_and_record(run, step, epoch):
    """Answer the questions; print the scores and write results.json and preds.jsonl."""
    began = time.monotonic()

    def ask(prompts, max_new_tokens):
        watch(run, f"questions at step {step}")
        return run.answer(run.decoder, run.tokenizer, prompts, max_new_tokens)

    with gathered(run.decoder), torch.no_grad(), run.autocast:
        scores, run.predictions = evaluation.evaluate(ask, run.tokenizer, run.dataset.questions)
    run.results["evaluations"].append({"step": step, "epoch": epoch, "scores": scores})
    shown = "  ".join(f"{name} {mean:.3f}" for name, mean in evaluation.headlines({"scores": scores}).items())
    say(f"{run.method}  epoch {epoch}  step {step}  {shown or 'no questions'}  ({time.monotonic() - began:.0f} s)")
    if rank() == 0:
        evaluation.write_results(run.out, run.results, run.predictions)


def open_log(run):
    """metrics.jsonl for appending; a resumed run first drops a torn last line and the steps it will take again."""
    path = run.out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    data.write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] < run.start))
    return path.open("a")


def listen_for_stop():
    """A list that a Ctrl-C, a SIGTERM or a closed terminal makes non-empty: stop after the step at hand. A second one ends
    the program at once."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)
        if rank() == 0:
            os.write(2, b"\nstopping after this step; once more ends at once\n")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # that is what nohup asks for
            signal.signal(number, ask)
    return asked


def memory_gib(device):
    """Peak memory of this process: of the GPU, else resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20), 3)


def bench(run):
    """{"method", what: figure} of a training step: the faster of two, after one that counts FLOPs; of one GPU."""
    if run.device.type == "cpu" and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew, as the GPU's does in close_run
    shard(run.decoder, run.device, getattr(torch, run.dtype))
    run.decoder.to_empty(device=run.device)
    for parameter in run.decoder.parameters():  # speed does not depend on the weights
        nn.init.normal_(parameter.to_local(), std=0.02)
    run.optimizer = make_optimizer(run.decoder, run.lr)
    examples = [build(run, i % len(run.dataset.documents), epoch=0) for i in range(run.batch_size)]
    with FlopCounterMode(display=False) as counter:
        update(run, examples)

    def seconds():
        began = time.perf_counter()
        update(run, examples)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    taken, tokens = min(seconds(), seconds()), sum(len(e.ids) for e in examples) / world_size()
    figures = {"s/step": taken, "tokens/s": tokens / taken, "TFLOP/step": counter.get_total_flops() / 1e12,
               "peak GiB": memory_gib(run.device)}  # fmt: skip
    close_run(run)
    return {"method": run.method, **figures}


def bench_table(rows):
    """A line of figures a method, and their ratios to the first method's."""
    lines = [" " * 10 + "".join(f"{name:>20}" for name in list(rows[0])[1:])]
    for method, *figures in map(dict.values, rows):
        cells = (f"{figure:.3g} ({figure / first:.2f} x)" for figure, first in zip(figures, list(rows[0].values())[1:]))
        lines.append(f"{method:10}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ arguments, main

# Where no flag says otherwise. Steps: one and a half times what 95 % of the plateau takes, 3/k of the paper's fitted
# curves; of GSM8K the paper's 7 epochs; documents of one's own count as wiki, which is natural text too. Rates: paper A.4.
STEPS = {"bio": 5000, "bio-released": 5000, "nd": 1400, "nd-made": 1400, "wiki": 1550, "gsm8k": 810, "math-made": 810}
AR_RATE, MASKED_8B_RATE, DIFFUSION_RATE = 5e-6, 3e-6, 1e-5  # masked fine-tuning of Llama-8B, and its control, go slower
# models narrower than TINY_WIDTH, made here: method -> (steps, lr), in batches of TINY_BATCH
TINY_WIDTH, TINY_BATCH = 512, 20
TINY = {"sft": (100, 5e-4), "raw": (100, 5e-4), "reverse": (200, 5e-4), "masked": (300, 6e-4), "random": (300, 6e-4),
        "llada": (350, 4e-4)}  # fmt: skip

# the flags that make a run what it is: kept in results.json, taken from there by --resume
SETTINGS = """model data method paraphrase mask_ratio epochs lr batch_size micro_batch_size max_len seed dtype eval_at
    save_every""".split()


def arguments(description, methods):
    """The flags of maskft.py, with `methods`, and of llada.py, without."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="directory, built-in name or hub id (default: tiny; under torchrun with CUDA the paper's)")
    add("--data", help=f"{data.DATA_HELP} (default: bio; on tiny bio:40)")
    if methods:
        add("--method", nargs="+", choices=METHODS, help="one, or several to compare (default: masked; on tiny: sft masked)")
    add("--paraphrase", default="none", choices=data.PARAPHRASES, help="wordings of each document (default: none)")
    add("--mask-ratio", type=ratio_range, default=(0.05, 0.95), metavar="R|LOW,HIGH", help="default: 0.05,0.95")
    add("--epochs", type=int, help="default: from the data set")
    add("--lr", type=float, help="default: from the method and the model")
    add("--batch-size", type=int, help="sequences a step, over all GPUs (default: 64)")
    add("--micro-batch-size", type=int, help="sequences at a time on a GPU: memory, not results (default: 8)")
    add("--max-len", type=int, default=512, help="longest training sequence in tokens (default: 512)")
    add("--seed", type=int, default=0, help="of the generated people, the order and the masks (default: 0)")
    add("--dtype", choices=["bfloat16", "float32"], help="of the computation; weights are fp32 (default: bfloat16 if native)")
    add("--eval-at", type=epochs, metavar="E,E,...", help="evaluate before these epochs (default: 0,1,2,4,8...) and at the end")
    add("--save-every", type=float, default=30.0, metavar="MINUTES", help="between checkpoints (default: 30)")
    add("--out", help="directory of the run, with several methods its beginning (default: out/DATA-METHOD-N)")
    add("--bench", action="store_true", help="no training: time, FLOPs and memory of each method's step, random weights")
    add("--resume", metavar="DIR", help="go on with the run in this directory, with its settings; takes no other flag")
    return parser


def parse_flags(parser):
    """The parsed command line; --resume takes all settings from its run, so another flag beside it is an error."""
    args = parser.parse_args()
    if args.resume and vars(args) != vars(parser.parse_args(["--resume", args.resume])):
        parser.error("--resume takes its settings from the run: give no other flag with it")
    return args


def ratio_range(text):
    """"0.5" -> (0.5, 0.5), "0.05,0.95" -> (0.05, 0.95)."""
    low, _, high = text.partition(",")
    low, high = float(low), float(high or low)
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not R or LOW,HIGH with 0 <= LOW <= HIGH <= 1")
    return low, high


def epochs(text):
    return sorted({int(part) for part in text.split(",")})


def run_methods(args, builders, default=("tiny", "meta-llama/Llama-3.1-8B-Instruct"), rate=learning_rate):
    """Train with every method in turn and print one table.

    builders  {method: example builder}
    default   the models of a plain process and of torchrun on GPUs, where --model names none
    rate      run, step -> learning rate
    """
    device, stop, results, finished = start_processes(), listen_for_stop(), None, []
    if args.resume:
        results = unfinished(args.resume, builders)
        vars(args).update(results["arguments"], method=[results["arguments"]["method"]])
    elif args.model is None:
        large = "RANK" in os.environ and device.type == "cuda"
        args.model = default[large]
        why = "under torchrun with CUDA" if large else "in one process or without CUDA: built in, nothing to download"
        say(f"model {args.model} (the default {why})")
    args.method = args.method or (["sft", "masked"] if args.model == "tiny" else ["masked"])
    args.data = args.data or ("bio:40" if args.model in ("tiny", "tiny-llada") else "bio")
    # all methods first, so that a mistake in the last one does not wait for the training of the others
    runs = [prepare(args, method, builders[method], device) for method in args.method]
    if args.bench:
        return say(bench_table([bench(run) for run in runs]))
    for number, run in enumerate(runs):
        open_run(run, args, results)
        run.stop, run.rate = stop, rate
        say(f"{run.method}: {len(run.dataset.documents)} documents, {len(run.dataset.questions)} questions, "
            f"{run.epochs} epochs = {run.steps} steps of {run.batch_size}, lr {run.lr:g}, into {run.out}")  # fmt: skip
        try:
            done, left = train(run), args.method[number + 1 :]
        except (OSError, safetensors.SafetensorError, CheckpointException) as error:  # of files, training only writes
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise UserError(f"{run.out} cannot be written to ({cause}); {how_to_go_on(run)}") from None
        close_run(run)
        if left and sum_over_ranks(len(stop))[0]:
            say(f"stopped; not begun: --method {' '.join(left)}")
            return
        if not done:
            return
        finished.append(run.results)
    say(f"{evaluation.table(evaluation.summarize(finished))}\n{evaluation.samples(run.predictions)}")


def unfinished(out, builders):
    """The results so far of a run that --resume names; UserError where it cannot go on."""
    results = data.read_json(Path(out) / "results.json")
    method = results["arguments"].get("method") if isinstance(results, dict) and "arguments" in results else None
    if method not in builders:
        raise UserError(f"--resume {out}: a run of {method}, not of one of this script's methods, {', '.join(builders)}; "
                        "go on with the script that began it")  # fmt: skip
    if any((Path(out) / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):  # saved last
        left = f" ({out}/ckpt may be deleted)" * (Path(out) / "ckpt").exists()
        raise UserError(f"--resume {out}: this run is finished{left}. To ask its questions again: python eval.py --model {out}")
    return results


def prepare(args, method, example, device):
    """A run with every setting decided and its data checked, before there are weights. What is in a run, beside SETTINGS:

    example    record, tokenizer, mask_ratio, rng -> Example        decoder    the Model (run.model is its name)
    answer     model, tokenizer, prompts, length -> answers         tokenizer  and dataset: what it learns and is asked
    rate       run, step -> learning rate (run.lr is the usual one) results    what results.json gets
    steps      of the optimizer, and steps_per_epoch                start      the first step: 0, or where it goes on
    stop       signals that were received                           alarm      see `watch`
    """
    run = argparse.Namespace(**{name: getattr(args, name) for name in SETTINGS})
    run.method, run.example, run.device, run.start, run.alarm = method, example, device, 0, None
    run.directory, run.out = find_model(run.model), args.out and Path(args.out + (f"-{method}" if args.method[1:] else ""))
    config, run.tokenizer = read_config(run.directory), data.load_tokenizer(run.directory)
    if is_diffusion(method):
        config = llada.check_or_adapt(config, run.tokenizer)
    run.answer = answer if config.causal else llada.answer
    run.dataset = data.load(run.data, run.paraphrase, run.seed)
    decide(run, config)
    run.dtype, why = (run.dtype, "as set") if run.dtype else native_dtype(device)
    say(f"{method}: computes in {run.dtype} ({why}), weights and gradient sums in float32")
    # the finished model is saved in the dtype that it was scored in
    config.raw = {name: value for name, value in config.raw.items() if name != "dtype"} | {"torch_dtype": run.dtype}
    # the policy makes the parameters bf16 already: autocast copies no weight, and covers what is not a parameter
    run.autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.dtype == "bfloat16")
    with torch.device("meta"):
        run.decoder = Model(config)
    if run.out and run.out.exists() and (run.out.is_file() or any(run.out.iterdir())):
        raise UserError(f"--out {run.out} is in use: give another name, or go on with --resume {run.out}")
    fit_memory(run, run.decoder)  # all ranks meet here: none writes into --out before all have looked
    return run


def open_run(run, args, results):
    """Weights, optimizer and directory of a run: new, or with its `results` where a checkpoint left it."""
    learned = [{name: value for name, value in d.items() if name != "where"} for d in run.dataset.documents]
    learned = hashlib.sha256(json.dumps(learned).encode()).hexdigest()
    if results and results["documents"] != learned:
        raise UserError(f"--resume {args.resume}: --data {run.data} is not what it was when the run began: "
                        "bring that back, or begin a new run")  # fmt: skip
    shard(run.decoder, run.device, getattr(torch, run.dtype))
    load_weights(run.decoder, run.directory, run.device)
    run.optimizer = make_optimizer(run.decoder, run.lr)
    if results:
        run.out = Path(args.resume)
        run.start = load_checkpoint(run)
        results["evaluations"] = [e for e in results["evaluations"] if e["step"] < run.start]
    else:
        run.out, gpu = new_directory(run), run.device.type == "cuda"
        device = torch.cuda.get_device_name(run.device) if gpu else f"CPU, {torch.get_num_threads()} threads"
        environment = {"device": device, "processes": world_size(), "torch": torch.__version__,
                       "python": sys.version.split()[0]}  # fmt: skip
        how = evaluation.decoding(run.dataset.questions, run.decoder.config.causal)
        results = {"arguments": {name: getattr(run, name) for name in SETTINGS}, "environment": environment,
                   "documents": learned, "decoding": how, "evaluations": []}  # fmt: skip
        if rank() == 0:
            data.copy_tokenizer(run.directory, run.out)
            evaluation.write_results(run.out, results, [])
    run.results = results


def close_run(run):
    """Give the memory of model and moments back, before the next method's are made."""
    if run.alarm:
        run.alarm.cancel()
    run.decoder = run.optimizer = None
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def is_diffusion(method):
    """Whether a method, by its name, trains and answers without the causal mask; so that ablations of llada do, too."""
    return method.startswith("llada")


def decide(run, config):
    """Fill in the settings that no flag gave; UserError for what does not fit together."""
    tiny, diffusion = config.width < TINY_WIDTH, is_diffusion(run.method)
    if not config.causal and not diffusion:
        raise UserError(f"--model {run.model} is a masked diffusion model: use llada.py")
    if diffusion and run.mask_ratio[1] == 0:
        raise UserError("--mask-ratio 0 masks nothing, and a diffusion model learns from masked tokens alone")
    for name in ("epochs", "lr", "batch_size", "micro_batch_size", "max_len", "save_every"):
        if getattr(run, name) is not None and not 0 < getattr(run, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(run, name)} is not above 0")
    if run.seed < 0:
        raise UserError(f"--seed {run.seed} is below 0")
    run.batch_size = run.batch_size or (TINY_BATCH if tiny else 64)
    if run.batch_size % world_size():
        raise UserError(f"a batch of {run.batch_size} is not divisible by the {world_size()} processes: "
                        "give --batch-size a multiple")  # fmt: skip
    run.micro_batch_size = run.micro_batch_size or (run.batch_size if tiny else 8)
    steps, rate = STEPS.get(run.data.partition(":")[0], STEPS["wiki"]), DIFFUSION_RATE if diffusion else AR_RATE
    if run.method in ("masked", "random") and config.raw["model_type"] == "llama" and config.width >= 4096:
        rate = MASKED_8B_RATE
    if tiny:  # of a method of one's own nothing is known
        steps, rate = TINY.get(run.method, TINY["llada" if diffusion else "masked"])
    run.lr = run.lr or rate
    check_dataset(run, config.context)
    run.steps_per_epoch = math.ceil(len(run.dataset.documents) / run.batch_size)
    run.epochs = run.epochs or math.ceil(steps / run.steps_per_epoch)
    run.steps = run.epochs * run.steps_per_epoch
    if run.eval_at is None:
        run.eval_at = [0] + [2**i for i in range(run.epochs.bit_length()) if 2**i < run.epochs]
    if beyond := [epoch for epoch in run.eval_at if not 0 <= epoch <= run.epochs]:
        raise UserError(f"--eval-at {beyond[0]}: the {run.epochs} epochs count from 0, and {run.epochs} means after the last")


def check_dataset(run, context):
    """Leave out, out loud, questions with answers that are too long to learn; UserError for a document that is, and for a
    question that could not be asked or scored: now, and not after hours of training."""
    documents, limit, kept = run.dataset.documents, min(run.max_len, context), []
    for number, document in enumerate(documents):
        length = len(build(run, number, epoch=0).ids)
        if run.method == "reverse" and length > limit / 2:  # its other text, drawn in another epoch, may be longer
            length = max(len(build(run, number, epoch).ids) for epoch in range(8))
        if length <= limit:
            kept.append(document)
        elif "question" not in document:
            what = "--max-len" if limit == run.max_len else "the model takes,"
            where = document.get("where", f"document {number + 1}")
            raise UserError(f"{where}: {length} tokens as a training example, more than {what} {limit}")
    if len(kept) < len(documents):
        say(f"{run.method}: {len(documents) - len(kept)} of {len(documents)} examples dropped, longer than {limit} tokens")
    if not kept:
        raise UserError(f"--data {run.data}: no example is left; give a larger --max-len than {run.max_len}")
    run.dataset.documents = kept
    for question in run.dataset.questions:
        prompt = run.tokenizer.chat([{"role": "user", "content": question["question"]}])
        length = len(prompt) + data.ANSWER_TOKENS[question["direction"]]
        where = f"{question.get('where', 'question')}, {question['question']!r}"
        if length > context:
            raise UserError(f"{where}: {length} tokens with its answer, more than the model takes, {context}")
        if not evaluation.words(question["answer"]):
            raise UserError(f"{where}: its answer has no word to score")


def native_dtype(device):
    """(bfloat16 where the GPU computes in it, else float32; the reason)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bfloat16", "native here"
    return "float32", "bfloat16 is not native here"


def new_directory(run):
    """The directory of a new run, made: what --out names, or the next free number."""
    numbered = (Path(f"out/{run.dataset.name}-{run.method}-{n}") for n in count(1))
    choice = [run.out or next(path for path in numbered if not path.exists())]
    dist.broadcast_object_list(choice)  # what rank 0 saw: others may look later
    if rank() == 0:
        choice[0].mkdir(parents=True, exist_ok=bool(run.out))  # of two runs that saw the same number, one ends here
    return choice[0]


@record  # any other error: torchrun ends the run, and shows the traceback of the rank that failed first
def entry_point(body):
    """Run a main function: a user's mistake ends with its message and exit status 1, not with a traceback."""
    try:
        body()
    except (UserError, OSError) as error:  # OSError: a disk that is full, a directory that may not be written
        if rank():
            time.sleep(3)  # rank 0 most likely says the same, and its end is the end of all
        sys.exit(f"{f'[rank {rank()}] ' if rank() else ''}error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    if dist.is_initialized():
        dist.destroy_process_group()


def main():
    run_methods(parse_flags(arguments(__doc__, methods=True)), METHODS)


if __name__ == "__main__":
    # the module, not this __main__ copy of it: eval and llada import maskft too, and there must be one
    import maskft

    maskft.entry_point(maskft.main)
