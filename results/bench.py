"""What training and answering cost, measured: a table of results/README.md from each program.

    python results/bench.py loop              # a step's Python time, on a toy of 30 layers
    python results/bench.py loop DIR nd sft   # a step of a real model on real documents
    python results/bench.py training DIR      # a masked step beside transformers
    python results/bench.py answers DIR       # greedy answers beside transformers

Seconds are those that processors computed, in one thread, so that other work on the machine counts
little. What is compared takes turns, each twice, and the faster time counts. To compare two
versions of the code, run both on the same machine, one behind the other.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
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

HERE = Path(__file__).parents[1]

# ---------------------------------------------------------------------------------------- measuring


def seconds(work):
    """Seconds that this process computed."""
    began = time.process_time()
    work()
    return time.process_time() - began


def in_turns(programs):
    """{name: seconds, the fewer of two runs}, of programs {name: function} that take turns."""
    runs = [{name: seconds(work) for name, work in programs.items()} for _ in range(2)]
    return {name: min(run[name] for run in runs) for name in programs}


def command_seconds(*words):
    """CPU seconds of a Python command and of all that it starts."""
    began = sum(os.times()[2:4])  # user's and system's, of processes that have ended
    command = [sys.executable, *map(str, words)]
    if subprocess.run(command, cwd=HERE, stdout=subprocess.DEVNULL).returncode:
        raise UserError("a command failed, as it said above")
    return sum(os.times()[2:4]) - began


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


def random_model(config):
    """A Model with random weights, which are as fast as others."""
    model = maskft.Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


# -------------------------------------------------------------------------------------------- steps


def loop(model=None, name="bio", method="masked"):
    """A step of maskft.py itself on ten documents; without a model, of the toy.

    A run of 12 steps less one of 2 is ten steps.
    """
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        documents = scratch / "documents.jsonl"
        lines = [json.dumps(record) for record in data.load(name).documents[:10]]
        data.write_text(documents, "\n".join(lines))
        flags = ["--model", model or write_toy(scratch / "toy"), "--data", documents]
        flags += ["--method", method, "--batch-size", 10]
        taken = []
        for epochs in (2, 12):
            often = ["--epochs", epochs, "--eval-at", epochs, "--out", scratch / f"{epochs}"]
            taken.append(command_seconds("maskft.py", *flags, *often))
    return {f"{model or 'toy'}, {name}, {method}": {"seconds": (taken[1] - taken[0]) / 10}}


def write_toy(path):
    """A model of 30 layers of width 16, whose steps are Python's time alone."""
    path.mkdir()
    tiny = maskft.find_model("tiny")
    sizes = {"num_hidden_layers": 30, "hidden_size": 16, "intermediate_size": 48}
    raw = data.read_json(tiny / "config.json") | sizes
    maskft.save(random_model(maskft.parse_config(raw)), path)
    data.write_chat_files(data.load_tokenizer(tiny), tiny, path)
    return path


def step_figures(programs):
    """{name: {seconds, TFLOP, peak GiB}} of a step of AdamW.

    programs  {name: (model, function that gives its loss)}
    """
    steps = {}
    figures = {}
    for name, (model, loss) in programs.items():
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        steps[name] = step = partial(update, model, loss, optimizer)
        with flop_counter() as counter:
            step()
        # what one step frees is there for the next: first ones wait for the system's memory
        kept = 3 * sum(parameter.nbytes for parameter in model.parameters())  # with AdamW's state
        peak = kept + allocated_peak(step)
        flops = counter.get_total_flops()
        figures[name] = {"seconds": 0.0, "TFLOP": flops / 1e12, "peak GiB": peak / 2**30}
    for name, taken in in_turns(steps).items():
        figures[name]["seconds"] = taken
    return figures


def update(model, loss, optimizer):
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


ROWS, TOKENS, PROMPT = 8, 256, 141  # of a masked step: the prompt has no loss


def training(model):
    """A masked step of 8 x 256 tokens, ours and that of transformers, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = maskft.find_model(model)
    ours = random_model(maskft.read_config(directory))
    shape = AutoConfig.from_pretrained(directory)
    theirs = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    ids = torch.randint(ours.config.vocab, (ROWS, TOKENS))
    labels = ids.where(torch.arange(TOKENS) >= PROMPT, IGNORE)
    weights = torch.full([ROWS], 1 / (labels != IGNORE).sum())
    programs = {
        "transformers": (theirs, lambda: theirs(ids, labels=labels, use_cache=False).loss),
        "maskft": (ours, lambda: ours(ids, labels=labels, weights=weights)),
    }
    return step_figures(programs)


# ------------------------------------------------------------------------------------------ answers

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
AT_A_TIME = 48  # rows of transformers' batches, the longest prompts first


def answers(model, longest=128):
    """Greedy answers of both programs to the same prompts.

    transformers goes on until the longest answer of a batch has ended; here the row of one that has
    ended goes to the next prompt.
    """
    from transformers import AutoModelForCausalLM

    directory = maskft.find_model(model)
    tokenizer = data.load_tokenizer(directory)
    ours = maskft.load(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompts = uneven_prompts(tokenizer)
    said = {}

    def ask_theirs():
        said["transformers"] = []
        for n in range(0, len(prompts), AT_A_TIME):
            batch = prompts[n : n + AT_A_TIME]
            said["transformers"] += their_batch(theirs, tokenizer, batch, longest)

    def ask_ours():
        said["maskft"] = maskft.generate(ours, prompts, longest, tokenizer.stop_ids)

    taken = in_turns({"transformers": ask_theirs, "maskft": ask_ours})
    same = sum(one == other for one, other in zip(*said.values(), strict=True))
    print(f"{len(prompts)} answers, {same} identical")
    return {name: {"seconds": each} for name, each in taken.items()}


def uneven_prompts(tokenizer):
    """Questions whose answers are a few tokens, and as many whose answers are a paragraph; as ids,
    the longest first."""
    texts = [f"{question} Answer in one word." for question in FACTS.splitlines()]
    texts += [f"Write a paragraph about {topic}." for topic in TOPICS.splitlines()]
    prompts = [tokenizer.prompt(text) for text in texts]
    return sorted(prompts, key=len, reverse=True)


@torch.no_grad()
def their_batch(model, tokenizer, prompts, longest):
    """The greedy answers of transformers' generate; lists of ids, cut as ours."""
    ids = data.pad(prompts, tokenizer.pad_id, "left")
    real = data.pad([[1] * len(prompt) for prompt in prompts], 0, "left")
    whole = model.generate(
        ids,
        attention_mask=real,
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=list(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_id,
    )
    new = whole[:, ids.shape[1] :].tolist()
    return [llada.until_stop(row, tokenizer.stop_ids) for row in new]


# --------------------------------------------------------------------------------------------- main

PROGRAMS = {measure.__name__: measure for measure in (loop, training, answers)}


def table(figures):
    """A line each."""
    rows = []
    for name, row in figures.items():
        rows.append({"": name} | {column: f"{value:.3g}" for column, value in row.items()})
    return evaluation.markdown(rows)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("given", nargs="*", help="a model; of loop data and method, too")
    parser.add_argument("--out", help="report.json to write")
    return parser


def main():
    args = arguments().parse_args()
    torch.set_num_threads(1)
    figures = PROGRAMS[args.program](*args.given)
    print(table(figures))
    if args.out:
        report = {
            "measured": [args.program, *args.given],
            "figures": figures,
            "environment": maskft.environment(torch.device("cpu")),
        }
        data.write_json(args.out, report)


if __name__ == "__main__":
    maskft.entry_point(main)
