"""What training and answering cost, measured: the tables of results/README.md.

    python results/bench.py steps tiny            # a training step of each method
    python results/bench.py steps tiny-llada
    python results/bench.py sampler tiny-llada    # llada.sample beside the released loop
    python results/bench.py training DIR          # a training step beside transformers
    python results/bench.py answers DIR           # greedy answers beside transformers

Each prints a table that is Markdown too; --out FILE keeps the figures as JSON. `steps` and
`sampler` use a GPU where there is one. On a CPU everything runs in one thread, and seconds are
those that this process computed, so that other work on the machine counts little. Programs that
are compared take turns, each twice, and the faster run of each stands in the table.
"""

import argparse
import concurrent.futures
import gc
import json
import math
import multiprocessing
import random
import sys
import time
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import eval as evaluation
import llada
import maskft
from data import IGNORE, UserError
from maskft import print0, world_size

METHODS = maskft.METHODS | llada.METHODS

# ---------------------------------------------------------------------------------------- measuring


def seconds(work, device):
    """(what `work` returns, the seconds it took).

    On a CPU those that this process computed: the machine may be shared.
    """
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    began = clock()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    return result, clock() - began


def flop_counter():
    """torch's counter of matrix products; it knows a GPU's attention, and here also the CPU's."""

    def forward(q, k, v, *others, **given):
        return sdpa_flop_count(q, k, v)

    def backward(gradient, q, k, v, *others, **given):
        return sdpa_backward_flop_count(gradient, q, k, v)

    aten = torch.ops.aten
    cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=cpu)


def allocated_peak(work):
    """The most bytes that torch's CPU allocator had given out at a time during `work`, above what
    it had given out before."""
    gc.collect()  # what is freed during the work has to have been allocated by it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(change.nbytes() for change in changes))


def peak_gib(step, model, device):
    """Peak memory of a training step as torch's allocator has it, of one process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**30
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    kept = 3 * sum(tensor.nbytes for tensor in local)  # weights and optimizer state
    return (kept + allocated_peak(step)) / 2**30


def take_turns(programs):
    """{program: its figures}, of two runs the faster; programs is {name: function -> figures}."""
    runs = {name: [] for name in programs}
    for name in [*programs, *programs]:
        runs[name].append(programs[name]())
        print0(f"{name}: {runs[name][-1]['seconds']:.1f} s")
    return {name: min(both, key=lambda run: run["seconds"]) for name, both in runs.items()}


def random_model(config, device, dtype):
    """A sharded Model with random weights, which are as fast as others."""
    with torch.device("meta"):
        model = maskft.Model(config)
    maskft.shard(model, device, dtype)
    fill(model, device)
    return model


def fill(model, device):
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter.to_local(), std=0.02)


# -------------------------------------------------------------------------------------------- steps


def steps(args):
    """A training step of each method: one that counts FLOPs, two for time, one for memory."""
    device = start()
    names = args.method or usual_methods(args.model)
    runs = [run_of(args, name, device) for name in names]
    figures = {run.settings.method: step_figures(run) for run in runs}
    print0(ratio_table(figures))
    return figures, device


def usual_methods(model):
    causal = maskft.read_config(maskft.find_model(model)).causal
    return ["sft", "masked", "random"] if causal else ["llada"]


def run_of(args, method, device):
    """The Run that maskft.py would train with these flags."""
    flags = ["--model", args.model, "--data", args.data, "--method", method]
    flags += ["--batch-size", str(args.batch_size)]
    given = maskft.arguments("", METHODS).parse_args(flags)
    (settings,) = maskft.given_settings(given, METHODS, (None, None), device)
    return maskft.prepare(settings, METHODS[method], device, stop=[])


def step_figures(run):
    """Seconds, tokens a second, TFLOP and peak memory of a step, of one process."""
    settings = run.settings
    maskft.shard(run.model, run.device, getattr(torch, settings.dtype))
    fill(run.model, run.device)
    run.optimizer = maskft.make_optimizer(run.model, settings.lr)
    documents = len(run.dataset.documents)
    examples = [maskft.build(run, n % documents, epoch=0) for n in range(settings.batch_size)]
    step = partial(maskft.update, run, examples, settings.lr)
    with flop_counter() as counter:
        step()
    taken = min(seconds(step, run.device)[1] for _ in range(2))
    tokens = sum(len(example.ids) for example in examples) / world_size()
    figures = {
        "seconds": taken,
        "tokens/s": tokens / taken,
        "TFLOP": counter.get_total_flops() / 1e12,
        "peak GiB": peak_gib(step, run.model, run.device),
    }
    maskft.close_run(run)
    return figures


def ratio_table(figures):
    """A line a method, each figure with its ratio to the first method's."""
    first, *_ = figures.values()
    lines = [["method", *first]]
    for method, row in figures.items():
        cells = [f"{value:.3g} ({value / first[name]:.2f} x)" for name, value in row.items()]
        lines.append([method, *cells])
    return evaluation.markdown(lines)


# ------------------------------------------------------------------------------------------ sampler


@torch.no_grad()
def released_sample(model, ids, key_mask, width, block):
    """Unmasking as released, a token a step: all logits of the whole sequence, for every row, and
    every step to the end. ids (B, T) are prompts of `width` tokens, then masks."""
    mask_id = model.config.raw["mask_token_id"]
    for end in range(width + block, ids.shape[1] + 1, block):
        for _ in range(block):
            best, new = model(ids, key_mask).double().softmax(-1).max(-1)  # (B, T) each
            best[ids != mask_id] = -math.inf
            best[:, :width] = -math.inf
            best[:, end:] = -math.inf
            at = best.argmax(1, keepdim=True)  # (B, 1)
            ids = ids.scatter(1, at, new.gather(1, at))
    return ids[:, width:].tolist()


def released_answer(model, tokenizer, prompts, max_new_tokens, block=4):
    """The answers of the released loop, cut where llada.answer cuts them."""
    room = [tokenizer.mask_id] * max_new_tokens
    rows = [prompt + room for prompt in prompts]
    ids, key_mask = llada.pad_left(rows, 0, next(model.parameters()).device)
    width = ids.shape[1] - max_new_tokens
    answers = released_sample(model, ids, key_mask, width, block)
    return [maskft.until_stop(answer, tokenizer.stop_ids) for answer in answers]


def sampler(args):
    """llada.answer beside the released loop, for the same questions in the same batches."""
    device = start()
    directory = maskft.find_model(args.model)
    model = maskft.load(directory, device)
    if model.config.causal:
        raise UserError(f"{args.model} is autoregressive: the sampler is a diffusion model's")
    tokenizer = data.load_tokenizer(directory)
    asked = data.load(args.data).questions
    chosen = random.Random(0).sample(asked, min(args.questions, len(asked)))
    released = partial(released_answer, model, tokenizer)
    ways = {
        "llada.sample": partial(llada.answer, model, tokenizer),
        "released loop": partial(in_batches, released),
    }
    programs = {}
    answers = {}
    for name, answer in ways.items():
        answers[name] = {}
        programs[name] = partial(ask, answer, tokenizer, chosen, device, answers[name])
    return compare(take_turns(programs), answers, tokenizer), device


def in_batches(answer, prompts, max_new_tokens, on_answer):
    """The answers of a program that takes a batch at a time: batches as large as maskft's."""
    answers = []
    while len(answers) < len(prompts):
        left = prompts[len(answers) :]
        longest = len(max(left, key=len)) + max_new_tokens
        batch = left[: max(1, llada.BATCH_TOKENS // longest)]
        answers += answer(batch, max_new_tokens)
        on_answer(len(batch))
    return answers


def ask(answer, tokenizer, questions, device, answers, max_new_tokens=128):
    """Ask the questions as eval.py does; the figures, and in `answers` {prompt: answer}, ids."""

    def recorded(prompts, max_new_tokens, on_answer):
        new = answer(prompts, max_new_tokens=max_new_tokens, on_answer=on_answer)
        answers.update(zip(map(tuple, prompts), new, strict=True))
        return new

    evaluate = partial(maskft.evaluate, recorded, tokenizer, questions, max_new_tokens)
    _, taken = seconds(evaluate, device)
    return {"seconds": taken}


def compare(figures, answers, tokenizer):
    """Print the table of two programs and where their answers differ; all of it as a dict."""
    print0(comparison_table(figures))
    ours, theirs = answers.values()
    lengths = sorted(map(len, ours.values()))
    mean = sum(lengths) / len(lengths)
    shown = f"from {lengths[0]} to {lengths[-1]} tokens, {mean:.1f} on average"
    differing = differences(ours, theirs, tokenizer)
    print0(f"\n{len(ours)} answers, {shown}; {len(ours) - len(differing)} identical")
    for line in differing:
        print0(f"{line['prompt']!r}: differ from token {line['token']} on")
    return {"figures": figures, "lengths": lengths, "differing": differing}


def differences(ours, theirs, tokenizer):
    """[{"prompt", "token"}]: the prompts whose answers differ, and the first token that does."""
    found = []
    for prompt, answer in ours.items():
        other = theirs[prompt]
        if answer != other:
            same = [a == b for a, b in zip(answer, other, strict=False)] + [False]
            text = tokenizer.decode(list(prompt), special=True)
            found.append({"prompt": text, "token": same.index(False)})
    return found


def comparison_table(figures):
    """A line a figure: of both programs, and the first one's ratio to the second's."""
    ours, theirs = figures.values()
    lines = [["", *figures, "ratio"]]
    for name, value in ours.items():
        other = theirs[name]
        lines.append([name, f"{value:.3g}", f"{other:.3g}", f"{value / other:.2f}"])
    return evaluation.markdown(lines)


# --------------------------------------------------------------------- training beside transformers

ROWS, TOKENS, PROMPT = 8, 256, 141  # of a masked step: the prompt has no loss


def training(args):
    """A masked step of 8 x 256 tokens, ours and that of transformers, in a process each."""
    need_transformers()
    device = torch.device("cpu")
    directory = causal_model(args.model)
    programs = {}
    for name in ("maskft", "transformers"):
        programs[name] = partial(in_own_process, training_figures, directory, name)
    figures = take_turns(programs)
    print0(comparison_table(figures))
    return figures, device


def in_own_process(function, *given):
    """function(*given), in a process that starts anew."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *given).result()


def training_figures(directory, program):
    """Seconds, TFLOP, share of a large matmul's speed and peak memory of a step, random weights."""
    device = start()
    vocab = maskft.read_config(directory).vocab
    ids = torch.randint(vocab, (ROWS, TOKENS))
    labels = ids.where(torch.arange(TOKENS) >= PROMPT, IGNORE)
    loss_of = {"maskft": our_loss, "transformers": their_loss}[program]
    model, loss = loss_of(directory, ids, labels)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with flop_counter() as counter:
        step()
    step()  # what one step frees is there for the next: the first ones wait for the system's memory
    matrix = torch.randn(2048, 2048)
    products = [seconds(lambda: matrix @ matrix, device)[1] for _ in range(3)]
    fastest = 2 * 2048**3 / min(products)
    taken = min(seconds(step, device)[1] for _ in range(2))
    flops = counter.get_total_flops()
    return {
        "seconds": taken,
        "TFLOP": flops / 1e12,
        "share of a large matmul's speed": flops / taken / fastest,
        "peak GiB": peak_gib(step, model, device),
    }


def our_loss(directory, ids, labels):
    """(model, function -> loss) of maskft."""
    model = random_model(maskft.read_config(directory), ids.device, torch.float32)
    weights = torch.ones(ROWS)
    count = ROWS * (TOKENS - PROMPT)
    return model, lambda: model(ids, labels=labels, weights=weights) / count


def their_loss(directory, ids, labels):
    """(model, function -> loss) of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    how = {"attn_implementation": "sdpa", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_config(config, **how)
    return model, lambda: model(ids, labels=labels, use_cache=False).loss


def need_transformers():
    if not find_spec("transformers"):
        raise UserError("transformers is not installed, and is what is measured: pip install it")


def causal_model(name):
    """The directory of an autoregressive model; UserError for another."""
    directory = maskft.find_model(name)
    if not maskft.read_config(directory).causal:
        raise UserError(f"{name} is a masked diffusion model: transformers does not know it")
    return directory


# ---------------------------------------------------------------------- answers beside transformers

FACTS = """\
What is the capital of France?
What is the capital of Japan?
What is the capital of Canada?
What is the capital of Egypt?
What is the capital of Norway?
What is the capital of Peru?
Which planet is closest to the sun?
Which planet is the largest of the solar system?
How many legs does a spider have?
How many days are in a leap year?
How many minutes are in an hour?
How many strings does a violin have?
How many continents are there?
What is 7 times 8?
What is the square root of 81?
What is half of 250?
What color do blue and yellow make?
What is the chemical symbol of gold?
What is the chemical symbol of iron?
At what temperature in Celsius does water boil?
Who wrote Romeo and Juliet?
Who painted the Mona Lisa?
Who wrote The Origin of Species?
Who was the first person on the moon?
In which year did the Second World War end?
In which country are the pyramids of Giza?
In which country is Mount Fuji?
On which continent is Kenya?
What is the longest river of Africa?
What is the largest ocean?
What is the opposite of cold?
What is the plural of mouse?
Which language is spoken in Brazil?
Which animal is called the king of the jungle?
What do bees make?
What is frozen water called?
"""
TOPICS = """\
the sea in winter
how bread is made
the history of the bicycle
why leaves turn red in autumn
the life of a honey bee
how rainbows come about
the invention of the printing press
what makes a good teacher
the Roman roads
how glass is made
the phases of the moon
growing tomatoes at home
the first railways
how vaccines work
the rules of chess
living in a small town
the Sahara desert
how whales communicate
learning to play the piano
the water cycle
the city of Venice
why we sleep
how a lighthouse works
the friendship of two old sailors
the use of copper
public libraries
how mountains form
a walk through a market
the northern lights
training for a long race
the history of tea
how computers store numbers
keeping a diary
the migration of birds
wind power
the discovery of penicillin
"""


def uneven_prompts():
    """Questions whose answers are a few tokens, and as many whose answers are a paragraph."""
    texts = [f"{question} Answer in one word." for question in FACTS.splitlines()]
    texts += [f"Write a paragraph about {topic}." for topic in TOPICS.splitlines()]
    return [{"question": t, "answer": t, "direction": "forward", "group": "all"} for t in texts]


def answers(args):
    """Greedy answers of both programs to the same prompts, in one process.

    Both have batches of the same size, the longest prompts first; only ours gives the row of an
    answer that has ended to the next prompt.
    """
    need_transformers()
    device = start()
    if device.type == "cuda":
        raise UserError("this comparison is of CPUs: set CUDA_VISIBLE_DEVICES to nothing")
    directory = causal_model(args.model)
    tokenizer = data.load_tokenizer(directory)
    ours = partial(maskft.greedy_answer, maskft.load(directory), tokenizer)
    theirs = partial(in_batches, partial(their_answer, their_model(directory), tokenizer))
    given = {"maskft": {}, "transformers": {}}
    prompts = uneven_prompts()[:: args.every]
    programs = {}
    for name, answer in (("maskft", ours), ("transformers", theirs)):
        length = args.max_new_tokens
        programs[name] = partial(ask, answer, tokenizer, prompts, device, given[name], length)
    return compare(take_turns(programs), given, tokenizer), device


def their_model(directory):
    from transformers import AutoModelForCausalLM

    how = {"attn_implementation": "sdpa", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(directory, **how).eval()


@torch.no_grad()
def their_answer(model, tokenizer, prompts, max_new_tokens):
    """The greedy answers of transformers' generate; lists of ids, cut as ours."""
    ids, key_mask = llada.pad_left(prompts, tokenizer.pad_id, "cpu")
    whole = model.generate(
        ids,
        attention_mask=key_mask.long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_id,
    )
    new = whole[:, ids.shape[1] :].tolist()
    return [maskft.until_stop(row, tokenizer.stop_ids) for row in new]


# --------------------------------------------------------------------------------------------- main


def start():
    """The device to measure on; one thread, and the same random numbers every time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return maskft.start_processes()


def arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(metavar="WHAT", required=True)

    def command(measure):
        added = commands.add_parser(measure.__name__, help=measure.__doc__.split("\n")[0])
        added.set_defaults(measure=measure)
        added.add_argument("model", help="directory, built-in name or hub id")
        added.add_argument("--out", metavar="FILE", help="report.json to write")
        return added.add_argument

    add = command(steps)
    add("--data", default="bio", help=f"{data.DATA_HELP} (default: bio)")
    add("--method", nargs="+", choices=METHODS, help="default: sft masked random, or llada")
    add("--batch-size", type=int, default=16, help="sequences a step (default: 16)")
    add = command(sampler)
    add("data", nargs="?", default="bio:40", help="whose questions (default: bio:40)")
    add("--questions", type=int, default=48, help="how many (default: 48)")
    command(training)
    add = command(answers)
    add("--max-new-tokens", type=int, default=128, help="longest answer (default: 128)")
    add("--every", type=int, default=1, help="ask every nth prompt only (default: 1)")
    return parser


def main():
    args = arguments().parse_args()
    figures, device = args.measure(args)
    if args.out and maskft.rank() == 0:
        given = {name: value for name, value in vars(args).items() if name != "measure"}
        report = {
            "measured": args.measure.__name__,
            "arguments": given,
            "environment": maskft.environment(device),
            "figures": figures,
        }
        data.write_text(args.out, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    maskft.entry_point(main)
