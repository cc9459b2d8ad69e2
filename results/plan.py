"""What a run would need, before anyone rents GPUs: memory, FLOPs and seconds of a training step.

    python results/plan.py llama-3.1-8b --gpus 8
    python results/plan.py llada-8b --gpus 4 --batch-size 32
    python results/plan.py path/to/model --gpus 1 --method sft --max-len 256

Nothing is downloaded and no GPU is used: one forward and backward pass of maskft.py's own model,
sharded as it shards, runs on fake tensors, which have a shape and no values. torch's
FSDPMemTracker adds up what is alive, torch's FlopCounterMode counts the matrix products. So every
number here is computed, and none is measured; NCCL's buffers, the CUDA context and holes in the
allocator's memory come on top, 2 to 4 GiB.

On fake CPU tensors three things have to be as on a GPU: RMSNorm keeps what CUDA's fused kernel
keeps; there are as many labels as the batch has, although no value says so; the optimizer's state
is there from the start (its step needs nothing more).
"""

import argparse
import dataclasses
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import eval as evaluation
import maskft
from data import IGNORE, Example, UserError
from results.bench import flop_counter

GIB = 2**30

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
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    },
}

# The share of an example's tokens that have a loss: a masked document stands before the original;
# a document alone has a loss everywhere; of LLaDA's, half is masked on average.
LABELLED = {"masked": 0.5, "sft": 1.0, "llada": 0.5}

# What torch's tracker calls a part of the memory: what it is here.
PARTS = {
    "Sharded Param": "weights, float32",
    "OptState": "optimizer state, float32",
    "Sharded Grad": "gradients, float32",
    "Unsharded Param": "gathered weights, bfloat16",
    "All Gather": "weights on their way, bfloat16",
    "Unsharded Grad": "gradients before they are summed",
    "Reduce Scatter": "gradients on their way",
    "Activation": "activations kept for backward",
    "Temp": "temporary in backward, logits among them",
}


@dataclass
class Plan:
    """What one GPU needs for a step. Bytes and FLOPs are of this GPU alone."""

    parameters: int
    micro_batches: int  # of a step, one after the other
    peak: int  # bytes
    parts: dict  # at the peak: torch's name -> bytes
    activations: int  # bytes that forward leaves, the last chunk's softmax among them
    logits: int  # bytes of that chunk's logits in backward: bfloat16, and their gradient in float32
    flops: float  # of a step
    traffic: float  # bytes of a step that come from other GPUs


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


class Traffic(TorchDispatchMode):
    """Counts the bytes that come from other GPUs: weights to gather, gradients to sum."""

    def __init__(self, gpus):
        super().__init__()
        self.others = (gpus - 1) / gpus
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d._allgather_base_.default:
            gathered, *_ = args
            self.bytes += self.others * gathered.nbytes
        if function is torch.ops.c10d._reduce_scatter_base_.default:
            _, summed, *_ = args
            self.bytes += self.others * summed.nbytes
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


def plan(config, gpus, batch_size=64, micro_batch_tokens=4096, max_len=512, labelled=0.5):
    """The Plan of a training step in bfloat16 whose examples all have max_len tokens."""
    examples = [longest_example(max_len, labelled)] * batch_size
    micros = maskft.micro_batches(examples, micro_batch_tokens, 0, gpus)
    batch = data.collate(micros[0], pad_id=0)
    if config.causal:
        batch["key_mask"] = None
    count = int((batch["labels"] != IGNORE).sum())
    with fake_group(gpus), fused_norms(), torch.device("meta"):
        model = maskft.Model(config)
        parameters = maskft.parameter_count(model)
        maskft.shard(model, torch.device("cpu"), torch.bfloat16)
        with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
            optimizer = with_room(model)
            if len(micros) > 1:
                forward(model, batch, count).backward()  # leaves gradients, as in a step
            return Plan(
                parameters=parameters,
                micro_batches=len(micros),
                logits=min(maskft.CHUNK, count) * config.vocab * (2 + 4),
                **track(model, optimizer, batch, count, gpus, len(micros)),
            )


def longest_example(max_len, labelled):
    """An Example of max_len tokens; the first one never has a label that counts."""
    labels = min(max_len - 1, round(labelled * max_len))
    ids = [0] * max_len
    return Example(ids, [IGNORE] * (max_len - labels) + [0] * labels, 1.0, labels)


def with_room(model):
    """Make room for a sharded model's weights and optimizer state; the optimizer."""
    model.to_empty(device="cpu")
    optimizer = maskft.make_optimizer(model, lr=1e-5)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def forward(model, batch, count):
    """The loss of a micro-batch with `count` labels, as `maskft.update` computes it."""
    with FirstPlaces(count), torch.autocast("cpu", torch.bfloat16):
        return model(**batch)


def track(model, optimizer, batch, count, gpus, micro_batches):
    """Run a micro-batch under torch's trackers; the fields of a Plan that they fill."""
    tracker = FSDPMemTracker(model, optimizer)
    traffic = Traffic(gpus)
    with flop_counter() as counter, traffic, tracker:
        loss = forward(model, batch, count)
        kept = snapshot(tracker, "current")["Activation"]
        loss.backward()
    parts = snapshot(tracker, "peak")
    return {
        "peak": parts.pop("Total"),
        "parts": parts,
        "activations": kept,
        "flops": counter.get_total_flops() * micro_batches,
        "traffic": traffic.bytes * micro_batches,
    }


def snapshot(tracker, which):
    """{torch's name of a part: bytes}, of the one device there is."""
    (parts,) = tracker.get_tracker_snapshot(which).values()
    return {getattr(part, "value", part): size for part, size in parts.items()}


# ----------------------------------------------------------------------------------------- report


def memory_table(planned):
    """Lines of GiB: every part of the peak, and the peak."""
    lines = [["at the peak, on each GPU", "GiB, computed"]]
    for name, what in PARTS.items():
        if planned.parts[name]:
            lines.append([what, gib(planned.parts[name])])
    lines.append(["**together**", f"**{gib(planned.peak)}**"])
    return evaluation.markdown(lines)


def plain_sum(planned, gpus):
    """The sum that fits on an envelope, to hold the peak against."""
    states = 16 * planned.parameters / gpus
    total = states + planned.activations + planned.logits
    return (
        f"To compare: 16 bytes a parameter, shared by the GPUs, {gib(states)} + what forward "
        f"leaves {gib(planned.activations)} + a chunk of logits in backward, 6 bytes each, "
        f"{gib(planned.logits)} = {gib(total)} GiB"
    )


def gib(size):
    return f"{size / GIB:.2f}"


def time_table(planned, tflops, gbs):
    """Lines of a step's FLOPs and bytes, and the seconds they take at the given speeds."""
    compute = planned.flops / (tflops * 1e12)
    traffic = planned.traffic / (gbs * 1e9)
    best = max(compute, traffic)
    worst = compute + traffic
    lines = [
        ["a step, on each GPU", "computed", f"seconds at {tflops:g} TFLOP/s and {gbs:g} GB/s"],
        ["matrix products", f"{planned.flops / 1e12:.4g} TFLOP", f"{compute:.3g}"],
        ["from other GPUs", f"{planned.traffic / 1e9:.4g} GB", f"{traffic:.3g}"],
        ["together", "", f"{best:.3g} (all traffic hidden) to {worst:.3g} (none)"],
    ]
    return evaluation.markdown(lines)


def read_shape(name, method):
    """(Config, method) of a built-in shape or a model directory."""
    if name in SHAPES:
        config = maskft.parse_config(SHAPES[name])
    elif Path(name).is_dir() or "/" not in name:
        config = maskft.read_config(maskft.find_model(name))
    else:
        raise UserError(f"{name} is no directory, and not one of {', '.join(SHAPES)}")
    method = method or ("masked" if config.causal else "llada")
    if method != "llada" and not config.causal:
        raise UserError(f"{name} is a masked diffusion model: --method llada")
    return dataclasses.replace(config, causal=method != "llada"), method


def check(args, config):
    """UserError for numbers that no run could have."""
    for name in ("gpus", "batch_size", "micro_batch_tokens", "matmul_tflops", "allgather_gbs"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is not above 0")
    if not 2 <= args.max_len <= config.context:
        raise UserError(f"--max-len {args.max_len} is not from 2 to {config.context}")
    if args.batch_size % args.gpus:
        raise UserError(f"--batch-size {args.batch_size} is not a multiple of {args.gpus} GPUs")


def arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("model", help=f"directory, or one of {', '.join(SHAPES)}")
    add("--gpus", type=int, required=True)
    add("--method", choices=LABELLED, help="default: masked; of a LLaDA llada")
    add("--batch-size", type=int, default=64, help="sequences a step, all GPUs (default: 64)")
    tokens = "at a time on a GPU (default: 4096)"
    add("--micro-batch-tokens", type=int, default=4096, help=tokens)
    add("--max-len", type=int, default=512, help="of every example, in tokens (default: 512)")
    tflops = "speed of matrix products on a GPU (default: 450, of an H100)"
    add("--matmul-tflops", type=float, default=450, help=tflops)
    gbs = "speed of gathering and summing among GPUs (default: 330, NVLink)"
    add("--allgather-gbs", type=float, default=330, help=gbs)
    return parser


def main():
    args = arguments().parse_args()
    config, method = read_shape(args.model, args.method)
    check(args, config)
    sizes = args.batch_size, args.micro_batch_tokens, args.max_len
    planned = plan(config, args.gpus, *sizes, labelled=LABELLED[method])
    print(
        f"{args.model}, {method}: {planned.parameters / 1e9:.3g} B parameters, GPUs: {args.gpus}, "
        f"bfloat16; a step: {args.batch_size} sequences of {args.max_len} tokens, "
        f"{LABELLED[method]:.0%} with loss, micro-batches: {planned.micro_batches}\n"
    )
    print(memory_table(planned) + "\n")
    print(plain_sum(planned, args.gpus) + "\n")
    print(time_table(planned, args.matmul_tflops, args.allgather_gbs) + "\n")
    print("Computed on fake tensors, not measured. Leave 2 to 4 GiB a GPU for NCCL and CUDA.")


if __name__ == "__main__":
    maskft.entry_point(main)
