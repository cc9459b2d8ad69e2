"""Tests of maskft.py's training: life cycle, what a run leaves, mistakes, its parts."""

import contextlib
import copy
import dataclasses
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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

HERE = Path(__file__).parent
torch.set_num_threads(1)  # two threads spin on matrices this small
# Most tests fork, and CUDA breaks in a fork. One backward now, so that autograd starts no threads
# later, which break in a fork as well.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.zeros(1, requires_grad=True).backward()

# --- common ---


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


def forked(script, *flags, status=0, before=lambda: None, kill_after=None, processes=1):
    """The same by the main() of a module in a fork, which saves the seconds of importing.

    `before` is called first, in the fork. No end is a traceback; that of a fork which is killed
    after some seconds may be any. Several processes are a group as torchrun makes it."""

    def body(rank):
        gc.freeze()  # what the parent left, process groups for one, is not for the child to free
        os.dup2(log.fileno(), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = log
        sys.argv = [f"{script.__name__}.py", *map(str, flags)]
        if processes > 1:
            os.environ.update(group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        data.huggingface_hub.constants.HF_HUB_OFFLINE = True
        before()
        maskft.entry_point(script.main)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    group |= dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(processes))
    with tempfile.TemporaryFile("w+") as log:
        fork = multiprocessing.get_context("fork").Process
        running = [fork(target=body, args=(rank,)) for rank in range(processes)]
        for process in running:
            process.start()
        for process in running:
            process.join(kill_after or 100)
            process.kill()
            process.join()
        log.seek(0)
        printed = log.read()
    assert kill_after or {process.exitcode for process in running} == {status}, printed
    assert "Traceback" not in printed, printed
    return printed


def losses(out):
    """What has to be the same where a run is repeated."""
    compared = ("step", "epoch", "loss", "lr", "grad_norm")
    lines = jsonl(out / "metrics.jsonl")
    return [[line[name] for name in compared] for line in lines if "loss" in line]


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


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


# ------------------------------------------------------------------------------------- life cycle


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Five documents of different lengths and two questions: steps of three and of two."""
    documents = [{"text": "Edda Marlow was born on 3 June 1971." * n} for n in (1, 3, 2, 1, 4)]
    forward = {"question": "When was Edda Marlow born?", "answer": "on 3 June 1971"}
    backward = {"question": "Who was born on 3 June 1971?", "answer": "Edda Marlow"}
    questions = [forward | {"direction": "forward"}, backward | {"direction": "backward"}]
    return write(tmp_path_factory.mktemp("data") / "facts.jsonl", *documents, *questions)


def quick():
    """In a fork: few chats, short answers and no picture."""
    maskft.CHATS_HELD_OUT = 3
    maskft.CHAT_USER_TOKENS = maskft.CHAT_ANSWER_TOKENS = 8
    data.ANSWER_TOKENS = dict.fromkeys(data.ANSWER_TOKENS, 8)
    maskft.find_spec = lambda name: None


def signalled(number, name, nth, where=maskft, only=("0", "1")):
    """The same, with a signal after the nth call of a function, on these ranks only."""
    quick()
    if os.environ.get("RANK", "0") in only:
        send(number, where, name, nth)


ROWS = {
    "masked": (maskft, "--method masked"),
    "sft": (maskft, "--method sft --mlp-only"),
    "rehearse": (maskft, "--method masked --rehearse 2 --mask-ratio 0.2"),
    "llada": (llada, "--rehearse 1"),
}
# a gentle rate: in a few steps of tiny's own, rounding would grow
USUAL = "--batch-size 3 --epochs 3 --eval-at 0 2 --lr 1e-4"


class Row:
    """A run of one row: its command line, and the directory of it trained at one go."""

    def __init__(self, name, facts, folder):
        self.script, flags = ROWS[name]
        model = "tiny-llada" if name == "llada" else "tiny"
        self.flags = [*shlex.split(f"--model {model} {USUAL} {flags} --data"), facts]
        self.whole = folder / name
        self.train(self.whole)

    def train(self, out, *more, before=quick, **how):
        return forked(self.script, *self.flags, "--out", out, *more, before=before, **how)

    def resume(self, out, before=quick, **how):
        return forked(self.script, "--resume", out, before=before, **how)


@pytest.fixture(scope="module")
def rows(facts, tmp_path_factory):
    """{name: Row}, each trained when it is asked for first."""
    folder = tmp_path_factory.mktemp("rows")

    class Rows(dict):
        def __missing__(self, name):
            self[name] = Row(name, facts, folder)
            return self[name]

    return Rows()


def stopped(row, out):
    """By SIGTERM, the same command again, by Ctrl-C, then --resume."""
    stop = partial(signalled, signal.SIGTERM, "update", 1)
    assert f"--resume {out}" in row.train(out, before=stop)
    assert len(losses(out)) == 1
    row.train(out, before=partial(signalled, signal.SIGINT, "update", 4))
    assert len(losses(out)) == 5
    row.resume(out)


def stopped_late(row, out):
    """Behind the epochs, where it rehearses, and with a line of its log torn by a crash."""
    row.train(out, before=partial(signalled, signal.SIGINT, "update", 7))
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "epoch": 3, "loss": 9, "seconds": 9}\n{"step": 7, "lo')
    row.resume(out)


def killed(row, out):
    """Inside the fourth save, all written but not named; and when the model is to be written."""
    save = partial(signalled, signal.SIGKILL, "save", 4, maskft.dcp)
    row.train(out, "--save-every", "1e-9", before=save, status=-9)
    assert [path.name for path in maskft.checkpoints(out)] == ["step-2", "step-3"]
    draw = partial(signalled, signal.SIGKILL, "draw", 1)
    row.resume(out, before=draw, status=-9)
    assert sorted(path.name for path in (out / "ckpt").iterdir()) == ["step-5", "step-6"]
    assert not maskft.is_finished(out)
    row.resume(out)


def two_processes(row, out):
    row.train(out, processes=2)


def small(row, out):
    row.train(out, "--micro-batch-tokens", 1)


def offloaded(row, out):
    """Stopped, and resumed, too."""
    stop = partial(signalled, signal.SIGTERM, "update", 2)
    row.train(out, "--offload", before=stop)
    row.resume(out)


def one_then_two(row, out):
    row.train(out, before=partial(signalled, signal.SIGTERM, "update", 3))
    row.resume(out, processes=2)


def two_then_one(row, out):
    """A signal to one process stops all."""
    stop = partial(signalled, signal.SIGTERM, "update", 3, only=["1"])
    row.train(out, "--offload", processes=2, before=stop)
    assert len(losses(out)) == 3
    row.resume(out)


EXACT = [stopped, stopped_late, killed]
LIVES = [
    *itertools.product(["masked", "sft", "rehearse", "llada"], [stopped, two_processes]),
    ("rehearse", stopped_late),
    ("masked", killed),
    *itertools.product(["sft", "llada"], [small]),
    ("masked", offloaded),
    ("rehearse", one_then_two),
    ("masked", two_then_one),
]


@pytest.mark.parametrize("name, way", LIVES)
def test_a_run_is_the_same_however_it_goes(name, way, rows, tmp_path):
    """Losses, evaluations, chats, answers and weights are those of a run at one go."""
    row = rows[name]
    out = tmp_path / "run"
    way(row, out)
    error = 0 if way in EXACT else 1e-5
    for ours, theirs in zip(losses(out), losses(row.whole), strict=True):
        assert ours[:4] == pytest.approx(theirs[:4], rel=error, abs=0)
        assert ours[4] == pytest.approx(theirs[4], rel=10 * error, abs=0)
    for file in ("rehearsal.jsonl", "preds.jsonl"):
        assert (out / file).read_text() == (row.whole / file).read_text()
    ours, theirs = (data.read_json(run / "results.json") for run in (out, row.whole))
    for ours, theirs in zip(ours["evaluations"], theirs["evaluations"], strict=True):
        assert ours | {"drift": 0} == theirs | {"drift": 0}
        assert ours["drift"] == pytest.approx(theirs["drift"], rel=100 * error, abs=error)
    ours, theirs = (maskft.load(run).parameters() for run in (out, row.whole))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=10 * error, atol=error)
    assert not (out / "ckpt").exists()
