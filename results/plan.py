"""What a run would need, before anyone rents GPUs: memory, FLOPs and seconds of a training step.

    python results/plan.py llama-3.1-8b --gpus 8 4
    python results/plan.py path/to/model --gpus 1 --max-len 256

Nothing is downloaded and no GPU is used: forward and backward passes of maskft.py's own model,
sharded as it shards, run on fake tensors, which have a shape and no values. torch's
FSDPMemTracker adds up what is alive, torch's FlopCounterMode counts the matrix products. So every
number here is computed, and none is measured; NCCL's buffers, the CUDA context and holes in the
allocator's memory come on top, 2 to 4 GiB.

Half of the tokens have a loss, as in masked fine-tuning and, on average, LLaDA's. On fake CPU
tensors two things have to be as on a GPU: RMSNorm keeps what CUDA's fused kernel keeps, and there
are as many labels as the batch has, although no value says so.
"""

import argparse
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval as evaluation
import maskft
from results.bench import flop_counter

GIB = 2**30
TFLOPS = 450  # of matrix products on an H100
GBS = 330  # gathering and summing among GPUs by NVLink

# Fields of config.json that sizes come from, as published.
LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
SHAPES = {
    "llama-3.1-8b": LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.2-3b": LLAMA_3
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "llada-8b": {
        "model_type": "llada",
        "vocab_size": 126464,
        "d_model": 4096,
        "mlp_hidden_size": 12288,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "max_sequence_length": 4096,
        "weight_tying": False,
        "mask_token_id": 126336,
        "rms_norm_eps": 1e-5,
        "include_qkv_bias": False,
        "rope_theta": 500000.0,
    },
}

# ------------------------------------------------------------------------- fake tensors as on a GPU


class FusedNorm(torch.autograd.Function):
    """RMSNorm in memory only: keeps its input, and one fp32 number a row. Computes nothing."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_norms():
    """Inside, maskft's norms keep what CUDA's fused kernel keeps."""

    def forward(self, x):
        return FusedNorm.apply(x, self.weight)

    return patch.object(maskft.RMSNorm, "forward", forward)


class FirstPlaces(TorchFunctionMode):
    """nonzero finds the first `count` columns of row 0: only values tell how many there are."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.nonzero:
            rows = torch.zeros(self.count, dtype=torch.int64)
            return rows, torch.arange(self.count)
        return function(*args, **(kwargs or {}))


@contextmanager
def fake_group(gpus):
    """A process group of so many ranks, of which this process is the first and the only one."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------- one step


def plan(config, gpus, batch_size=64, micro_batch_tokens=4096, max_len=512):
    """What one GPU needs for a step in bfloat16: {"parameters", "peak", "flops", "traffic"}.

    All examples have max_len tokens. `peak` is in bytes, `traffic` the bytes of a step that come
    from other GPUs.
    """
    each = math.ceil(batch_size / gpus)
    rows = min(each, max(1, micro_batch_tokens // max_len))
    micro_batches = math.ceil(each / rows)
    with fake_group(gpus), fused_norms(), torch.device("meta"):
        model = maskft.Model(config)
        parameters = maskft.parameter_count(model)
        # bf16 for forward, again for backward (blocks alone; the rest stays), fp32 gradients
        gathered_and_summed = (2 + 4) * parameters + 2 * maskft.parameter_count(model.blocks)
        maskft.shard(model, torch.device("cpu"), torch.bfloat16)
        with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            if micro_batches > 1:
                loss_of(model, rows, max_len).backward()  # leaves gradients, as in a step
            peak, flops = track(model, rows, max_len)
    return {
        "parameters": parameters,
        "peak": peak + 8 * parameters / gpus,  # with the optimizer's state
        "flops": flops * micro_batches,
        "traffic": gathered_and_summed * micro_batches * (gpus - 1) / gpus,
    }


def loss_of(model, rows, tokens):
    """The loss of a micro-batch."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    key_mask = None if model.config.is_causal else torch.ones(rows, tokens, dtype=torch.bool)
    with FirstPlaces(rows * tokens // 2), torch.autocast("cpu", torch.bfloat16):
        return model(ids, key_mask, labels=ids, weights=torch.ones(rows))


def track(model, rows, tokens):
    """The peak of memory over a micro-batch, in bytes, and its FLOPs."""
    if isinstance(model, FSDPModule):
        tracker = FSDPMemTracker(model)
    else:
        tracker = MemTracker()
        tracker.track_external(model)
    with flop_counter() as counter, tracker:
        loss_of(model, rows, tokens).backward()
    (parts,) = tracker.get_tracker_snapshot("peak").values()
    return parts["Total"], counter.get_total_flops()


# ----------------------------------------------------------------------------------------- report


def row(planned, gpus):
    """{column: cell} of a line of the table."""
    compute = planned["flops"] / (TFLOPS * 1e12)
    traffic = planned["traffic"] / (GBS * 1e9)
    return {
        "GPUs": f"{gpus}",
        "GiB a GPU": f"{planned['peak'] / GIB:.1f}",
        "TFLOP a GPU": f"{planned['flops'] / 1e12:.1f}",
        "GB from others": f"{planned['traffic'] / 1e9:.1f}",
        "seconds a step": f"{max(compute, traffic):.2g} to {compute + traffic:.2g}",
    }


def read_shape(name):
    """The Config of a built-in shape or a model directory."""
    if name in SHAPES:
        return maskft.parse_config(SHAPES[name])
    return maskft.read_config(maskft.find_model(name))


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help=f"directory, or one of {', '.join(SHAPES)}")
    from_1 = maskft.at_least(1)
    add("--gpus", type=from_1, nargs="+", required=True, help="numbers of them: a line each")
    add("--batch-size", type=from_1, default=64, help="sequences a step, all GPUs (default: 64)")
    tokens = "at a time on a GPU (default: 4096)"
    add("--micro-batch-tokens", type=from_1, default=4096, help=tokens)
    add("--max-len", type=from_1, default=512, help="tokens of an example (default: 512)")
    return parser


def main():
    args = arguments().parse_args()
    config = read_shape(args.model)
    rows = []
    for gpus in args.gpus:
        planned = plan(config, gpus, args.batch_size, args.micro_batch_tokens, args.max_len)
        rows.append(row(planned, gpus))
    print(f"{args.model}, {planned['parameters'] / 1e9:.3g} B parameters, computed, not measured\n")
    print(evaluation.markdown(rows))
    print("\nSeconds: all traffic hidden to none. Leave 2 to 4 GiB a GPU for NCCL and CUDA.")


if __name__ == "__main__":
    maskft.entry_point(main)
