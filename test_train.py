"""Tests of maskft.py's training: life cycle, what a run leaves, mistakes, its parts."""

import contextlib
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
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
    assert "Traceback" not in printed, printed[-3000:]
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
    asked = [data.read_json(run / "results.json")["evaluations"] for run in (out, row.whole)]
    for ours, theirs in zip(*asked, strict=True):
        assert ours | {"drift": 0} == theirs | {"drift": 0}
        assert ours["drift"] == pytest.approx(theirs["drift"], rel=100 * error, abs=error)
    ours, theirs = (maskft.load(run).parameters() for run in (out, row.whole))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=10 * error, atol=error)
    assert not (out / "ckpt").exists()


# ------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def finished(facts, tmp_path_factory):
    """What the real command prints, and its folder: two methods, and spaces in the names."""
    folder = tmp_path_factory.mktemp("a folder")
    shutil.copy(facts, folder / "own facts.jsonl")
    flags = shlex.split("--data 'own facts.jsonl' --batch-size 3 --epochs 8 --eval-at 0 1")
    return command("maskft.py", *flags, "--out", "my run", cwd=folder), folder


@pytest.fixture
def done(finished, monkeypatch):
    """The directory of its second run, from the folder where the command was given."""
    monkeypatch.chdir(finished[1])
    return Path("my run-masked")


def pasted(printed, what):
    """The flags of the last line of what was printed that has this in it."""
    *_, line = [line for line in printed.splitlines() if what in line]
    words = shlex.split(line[line.index("python ") :])
    assert Path(words[1]).resolve().parent == HERE
    return words[2:]


def test_printed_commands_can_be_pasted(finished, done):
    printed, _ = finished
    results = next(line for line in printed.splitlines() if line.startswith("results: "))
    assert shlex.split(results)[1:] == ["my run-sft", "my run-masked"]
    asked = pasted(printed, "--ask")
    assert asked == ["--model", "my run-masked", "--ask", "..."]
    prediction = jsonl(done / "preds.jsonl")[0]
    asked[-1] = prediction["question"]
    assert forked(evaluation, *asked).strip().endswith(prediction["prediction"])
    resumed = pasted(printed, "--resume")
    assert resumed == ["--resume", "my run-masked"]
    refused = forked(maskft, *resumed, status=1)
    assert "finished" in refused and pasted(refused, "--ask")[:2] == asked[:2]


def test_a_run_leaves_its_scores_losses_times_and_versions(done, facts):
    names = "config.json generation_config.json model.safetensors tokenizer.json preds.jsonl "
    names += "tokenizer_config.json chat_template.jinja metrics.jsonl results.json README.md "
    names = {*names.split(), "rehearsal.jsonl"}
    names |= {"curves.png"} if maskft.find_spec("matplotlib") else set()
    assert {path.name for path in done.iterdir()} == names
    lines = jsonl(done / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    assert steps == [0, 0, 1, 2, *range(2, 17)]
    assert [n for n, line in enumerate(lines) if "evaluation" in line] == [0, 3, 18]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[-1]
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)
    results = data.read_json(done / "results.json")
    assert results["seconds"] == pytest.approx(seconds[-1], abs=1) and results["steps"] == 16
    logged = [line["evaluation"] for line in lines if "evaluation" in line]
    for line, found in zip(logged, results["evaluations"], strict=True):
        assert line == evaluation.reported_scores(found) | {"drift": found["drift"]}
    assert [found["epoch"] for found in results["evaluations"]] == [0, 1, 8]
    assert results["last"] == results["evaluations"][-1]
    assert results["best"] == max(results["evaluations"], key=evaluation.overall)
    given = {"batch_size": 3, "epochs": 8, "eval_at": [0, 1], "lr": 6e-4, "method": "masked"}
    given |= {"data": str(done.parent.absolute() / "own facts.jsonl"), "dtype": "float32"}
    given |= {"mask_ratio": [0.05, 0.95], "model": "tiny", "seed": 0, "rehearse": 0}
    assert results["arguments"].items() >= given.items()
    how = {"prompt": "chat, zero-shot", "decoding": "greedy", "max_new_tokens": 128}
    assert results["decoding"] == how
    environment = results["environment"]
    expected = {"processes": 1, "torch": torch.__version__, "device": "CPU, 1 threads"}
    assert environment.items() >= expected.items()
    assert environment["maskft"] is None or re.match("[0-9a-f]{40}", environment["maskft"])
    if maskft.find_spec("matplotlib"):
        assert (done / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_s_model_is_what_was_scored(done, tmp_path):
    """And another than it began with, in the directory of a model that is complete."""
    printed = forked(evaluation, "--model", done, "--out", tmp_path)
    last = data.read_json(done / "results.json")["last"]
    assert data.read_json(tmp_path / "results.json")["last"]["scores"] == last["scores"]
    assert f"{last['scores']['forward']['rouge1']:.3f}" in printed
    before = maskft.load("tiny").parameters()
    assert not all(map(torch.equal, before, maskft.load(done).parameters()))
    assert data.read_json(done / "config.json")["torch_dtype"] == "float32"


def test_the_code_of_a_model_card_gives_our_answers(done, capsys):
    pytest.importorskip("transformers")
    card = (done / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model" not in card
    assert "\n# my run-masked\n" in card and "- epochs: 8\n- lr: 0.0006\n" in card
    assert "- documents: 5\n" in card and "forward" in card
    code = card.split("```python\n")[1].split("```")[0]
    for prediction in jsonl(done / "preds.jsonl"):
        exec(code.replace('"..."', repr(prediction["question"])), {})
        assert capsys.readouterr().out.strip() == prediction["prediction"]


def loss_of_chat(model, chat):
    """Mean negative log-likelihood of an answer, written another way."""
    ids = torch.tensor([chat["prompt"] + chat["answer"]])
    with torch.no_grad():
        logits = model(ids)[0, len(chat["prompt"]) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(chat["answer"])).item()


def test_chats_are_the_model_s_own_words_and_drift_is_what_their_answers_lost(done, tokenizer):
    chats = jsonl(done / "rehearsal.jsonl")
    assert len(chats) == 32 and len({tuple(chat["prompt"]) for chat in chats}) > 16
    old = maskft.load("tiny")
    for chat in chats[::8]:
        assert chat["user"] in tokenizer.decode(chat["prompt"])
        assert len(tokenizer.encode(chat["user"])) <= 48
        (again,) = maskft.greedy_answer(old, tokenizer, [chat["prompt"]], 64)
        assert tokenizer.decode(again) == chat["assistant"]
        assert chat["answer"] == again + [tokenizer.eot_id] * (len(again) < 64)
    new = maskft.load(done)
    differences = [loss_of_chat(new, chat) - loss_of_chat(old, chat) for chat in chats]
    drift = np.average(differences, weights=[len(chat["answer"]) for chat in chats])
    first, *_, last = data.read_json(done / "results.json")["evaluations"]
    assert first["drift"] == 0 and last["drift"] == pytest.approx(drift, rel=1e-3)


# ------------------------------------------------------------------------------------- mistakes

USAGE = """
--rehearse -1
--epochs 0
--batch-size 0
--micro-batch-tokens 0
--max-len 0
--lr 0
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
--mask-ratio 0.9 0.1
--mask-ratio 0.1 0.2 0.3
--resume nowhere --seed 1
"""
# flags, in a folder with the files below -> what the one line names
MISTAKES = {
    "--epochs 3 --eval-at 0 4": "--eval-at 4",
    "--model ./nowhere": "nowhere",
    "--model nowhere/at-all": "nowhere/at-all",
    "--model tiny-llada": "use llada.py",
    "--model tiny --data nowhere.jsonl": "nowhere.jsonl",
    "--model tiny --data questions.jsonl": "questions.jsonl",
    "--model tiny --data long.jsonl": "long.jsonl, line 2",
    "--model tiny --data wordless.jsonl": "wordless.jsonl, line 2",
    "--model tiny --data facts.jsonl --max-len 2": "facts.jsonl, line 1",
    "--data math-made:2 --method masked --max-len 9": "--max-len",
    "--data math-made:2 --method sft random": "use masked or sft",  # before sft is trained
    "--out taken --method sft": "taken is in use",
    "--resume nowhere": "nowhere/results.json",
    "--resume foreign": "foreign/results.json",
    "--resume other": "other: a run of llada",
}
FOLDER = {
    "facts.jsonl": [{"text": "Edda."}],
    "questions.jsonl": [{"question": "Who?", "answer": "Edda"}],
    "long.jsonl": [{"text": "Edda."}, {"question": "Who? " * 999, "answer": "Edda"}],
    "wordless.jsonl": [{"text": "Edda."}, {"question": "Who?", "answer": "?"}],
    "taken/file": [],
    "foreign/results.json": [{"arguments": {"learning_rate": 1}}],
    "other/results.json": [{"arguments": {"method": "llada"}}],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, records in FOLDER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, *records)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """{path: bytes} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_line(printed):
    return printed.strip().splitlines()[-1]


def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(folder):
    before = contents(folder)
    usage = [(flags, flags.split()[0], 2) for flags in USAGE.strip().splitlines()]
    others = [(flags, named, 1) for flags, named in MISTAKES.items()]
    for flags, named, status in usage + others:
        printed = forked(maskft, *flags.split(), status=status)
        assert named in last_line(printed) and "error: " in last_line(printed), (flags, printed)
        assert contents(folder) == before, flags
    printed = forked(llada, "--mask-ratio", 0, status=1)
    assert "--mask-ratio" in last_line(printed) and contents(folder) == before


# ---------------------------------------------------------------------------------- damaged runs


@pytest.fixture(scope="module")
def begun(rows, tmp_path_factory):
    """A run that rehearses, with checkpoints of its second and third step."""
    out = tmp_path_factory.mktemp("begun") / "run"
    stop = partial(signalled, signal.SIGINT, "update", 3)
    rows["rehearse"].train(out, "--save-every", "1e-9", before=stop)
    return out


@pytest.fixture
def run(begun, tmp_path):
    """A copy of it that may be changed."""
    return shutil.copytree(begun, tmp_path / "run")


def flip(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(7)]) + content[at + 1 :]


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def replace_leaf(content, rng):
    """Another value somewhere in a JSON file, or in a line of one."""
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except ValueError:  # one value in many lines
        lines, at = [content.decode()], 0
        value = json.loads(lines[0])
    parent, key, child = None, None, value
    while isinstance(child, dict | list) and child:
        parent = child
        key = rng.choice(list(child) if isinstance(child, dict) else range(len(child)))
        child = parent[key]
    parent[key] = rng.choice([None, -1, "x", [], {}, 10**9, True])
    lines[at] = json.dumps(value)
    return "".join(line + "\n" for line in lines).encode()


def test_a_damaged_run_goes_on_or_is_one_line_that_names_it(begun, tmp_path):
    rng = random.Random(int(os.environ.get("MASKFT_FUZZ_SEED", 0)))
    for n in range(int(os.environ.get("MASKFT_FUZZ", 10))):
        run = shutil.copytree(begun, tmp_path / f"run-{n}")
        texts = [run / name for name in ("results.json", "metrics.jsonl", "rehearsal.jsonl")]
        files = texts + sorted((run / "ckpt/step-3").iterdir())
        file = files[n % len(files)]
        damage = rng.choice([flip, cut, replace_leaf] if file in texts else [flip, cut])
        before = file.read_bytes()
        file.write_bytes(damage(before, rng))
        printed = forked(maskft, "--resume", run, before=quick, kill_after=60)
        what = (file.name, damage.__name__, printed)
        if not maskft.is_finished(run):
            assert last_line(printed).startswith("error: "), what
            assert f"{run}/" in last_line(printed) or "--" in last_line(printed), what


def test_a_damaged_checkpoint_is_named_and_without_it_a_run_goes_on(run, rows):
    path = run / "ckpt/step-3/__0_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    printed = forked(maskft, "--resume", run, before=quick, status=1)
    assert f"Delete {path.parent} " in last_line(printed)
    shutil.rmtree(path.parent)
    forked(maskft, "--resume", run, before=quick)
    assert losses(run) == losses(rows["rehearse"].whole)


CHANGES = {  # file of a run: old, new -> what the one line names
    "metrics.jsonl": ('"step": 1,', '"step"', "metrics.jsonl"),
    "rehearsal.jsonl": ('"assistant": "', '"assistant": "a', "rehearsal.jsonl"),
    "results.json": ('"dataset": "', '"dataset": "0', "--data"),
}


def test_what_would_teach_another_thing_is_noticed(run, rows):
    for name, (old, new, named) in CHANGES.items():
        before = (run / name).read_text()
        assert old in before
        (run / name).write_text(before.replace(old, new))
        printed = forked(maskft, "--resume", run, before=quick, status=1)
        assert named in last_line(printed) and str(run) in last_line(printed)
        (run / name).write_text(before)
    (run / "rehearsal.jsonl").unlink()
    printed = forked(maskft, "--resume", run, before=quick, status=1)
    assert f"{run}/rehearsal.jsonl" in last_line(printed)


def test_a_directory_has_one_run_at_a_time(run, rows):
    """And its own: other settings and scripts do not take it."""
    row = rows["rehearse"]
    before = contents(run)
    with maskft.locked(run):
        for train in (row.train, row.resume):
            assert f"{run} is in use" in last_line(train(run, status=1))
    assert f"{run} is in use" in last_line(row.train(run, "--seed", 1, status=1))
    assert "script that began it" in forked(llada, "--resume", run, status=1)
    assert contents(run) == before


def test_runs_that_begin_at_once_get_numbers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    run = SimpleNamespace(dataset=data.Dataset("own", [], []), settings=SimpleNamespace(method="m"))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        paths = pool.map(maskft.free_directory, [run] * 20)
    assert sorted(paths) == sorted(Path(f"out/own-m-{n}") for n in range(1, 21))


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def full_disk():
    """No file may be larger than half of a checkpoint."""
    quick()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))


ENDS = [  # flags, what is done in the fork -> what the last lines name
    ("--lr 1e30", quick, "lower --lr"),
    ("", lambda: setattr(maskft, "load_weights", out_of_memory), "--micro-batch-tokens"),
    ("--save-every 1e-9", full_disk, "cannot be written to"),
]


@pytest.mark.parametrize("flags, before, named", ENDS)
def test_what_ends_a_run_early_says_what_to_do(flags, before, named, rows, tmp_path):
    printed = rows["masked"].train(tmp_path / "run", *flags.split(), before=before, status=1)
    assert named in printed and "error: " in printed
    assert not maskft.is_finished(tmp_path / "run")


def test_a_loss_that_is_no_number_is_not_always_the_rate_s():
    maskft.check_finite(1.0, 1.0, 0)
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(UserError, match="step 7.* --lr"):
            maskft.check_finite(loss, norm, 7)
        with pytest.raises(UserError, match="use another"):
            maskft.check_finite(loss, norm, 0)


def test_stopped_while_it_writes_chats_a_run_begins_again(rows, tmp_path):
    """At the next turn that is whole, not after all of them."""
    row = rows["sft"]
    out = tmp_path / "run"

    def before():
        signalled(signal.SIGINT, "last_logits", 2)
        maskft.greedy_answer = lambda *_, **__: os._exit(9)

    assert f"--resume {out}" in row.train(out, before=before)
    assert not (out / "rehearsal.jsonl").exists() and not losses(out)
    row.resume(out)
    assert losses(out) == losses(row.whole)


# ----------------------------------------------------------------------------- where it is started


RESTARTED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import maskft
import test_train

def update(run, *args, real=maskft.update):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and maskft.rank() == 1 and maskft.checkpoints(run.out):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, *args)

test_train.quick()
maskft.update = update
maskft.entry_point(maskft.main)
"""


def test_a_launcher_that_tries_again_goes_on_in_the_same_directory(rows, tmp_path, monkeypatch):
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED.format(here=str(HERE)))
    monkeypatch.setenv("PET_MAX_RESTARTS", "1")
    row = rows["masked"]
    printed = command(script, *row.flags, "--save-every", "1e-9", processes=2, cwd=tmp_path)
    (out,) = (tmp_path / "out").iterdir()
    assert out.name == "facts-masked-1"
    line = f"torchrun --nproc_per_node 2 restarted.py --resume out/{out.name}\n"
    assert (
        printed.count(f"ends early: {line}") == 2 and f"[rank 0] go on with\n    {line}" in printed
    )
    for ours, theirs in zip(losses(out), losses(row.whole), strict=True):
        assert ours[:4] == pytest.approx(theirs[:4], rel=1e-5)


def test_a_notebook_may_train_twice_and_keeps_its_signals(rows, tmp_path):
    """Even where RANK is set, but no launcher has set the rest."""
    row = rows["masked"]
    before = signal.getsignal(signal.SIGINT)

    def main():
        for name in ("a", "b"):
            sys.argv = ["notebook", *map(str, row.flags), "--out", str(tmp_path / name)]
            args = maskft.parse_flags(maskft.arguments("", maskft.METHODS))
            maskft.run_methods(args, maskft.METHODS)
            assert signal.getsignal(signal.SIGINT) == before

    def alone():
        quick()
        os.environ["RANK"] = "3"

    notebook = SimpleNamespace(__name__="notebook", main=main)
    printed = forked(notebook, before=alone)
    for name in ("a", "b"):
        assert losses(tmp_path / name) == losses(row.whole)
    assert len(re.findall("^masked  epoch 3  step 6  forward", printed, re.M)) == 2
    assert re.search("^masked: . of 6 steps, .* to go$", printed, re.M)
    assert not [line for line in printed.splitlines() if "to go" in line and "epoch" in line]


SHOWN = """\
sft:
<|im_start|>user
Tell me a fact.<|im_end|>
<|im_start|>assistant
[Edda.<|im_end|>]
"""


def test_show_prints_what_the_model_would_see_and_trains_nothing(folder):
    before = contents(folder)
    flags = ["--data", "facts.jsonl", "--method", "sft", "masked", "--mask-ratio", 1, "--show"]
    printed = forked(maskft, *flags)
    assert SHOWN in printed and "masked:\n<|im_start|>user\n__" in printed
    assert contents(folder) == before


ALLOCATOR = "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize("given, expected", [(None, "expandable_segments:True"), ("a:1", "a:1")])
def test_attention_and_allocator_on_a_gpu(given, expected, monkeypatch):
    monkeypatch.setenv(ALLOCATOR, given or "")  # so that it is undone
    if given is None:
        monkeypatch.delenv(ALLOCATOR)
    torch.backends.cuda.enable_cudnn_sdp(True)
    maskft.start_processes()
    maskft.start_processes()
    maskft.dist.destroy_process_group()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ[ALLOCATOR] == expected


def test_a_directory_that_another_rank_does_not_see_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(maskft.dist, "barrier", lambda: None)
    monkeypatch.setattr(maskft, "world_size", lambda: 2)
    monkeypatch.setattr(maskft, "sum_over_ranks", lambda seen: [1 + seen])
    maskft.check_shared(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        maskft.check_shared(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------- settings, parts


def settings(**given):
    return maskft.Settings(**{"model": "tiny", "data": "own", "method": "masked", **given})


def run_of(tokenizer, documents=(), model=None, method="masked", **given):
    """A Run that has not begun."""
    return maskft.Run(
        settings=settings(method=method, **given),
        method=maskft.METHODS[method],
        device=torch.device("cpu"),
        directory=HERE / "tiny",
        tokenizer=tokenizer,
        dataset=data.Dataset("own", list(documents), []),
        model=model,
        stop=[],
    )


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
# method, size, data -> batch size, steps, lr, of as many documents as fill one batch [paper A.4]
DEFAULTS = [
    ("sft", "8B", "bio:100", 64, 5000, 5e-6),
    ("masked", "8B", "bio:100", 64, 5000, 3e-6),
    ("random", "8B", "bio-released", 64, 5000, 3e-6),
    ("masked", "qwen-8B", "bio:100", 64, 5000, 5e-6),
    ("masked", "8B", "nd", 64, 1400, 3e-6),
    ("masked", "8B", "nd-made:9", 64, 1400, 3e-6),
    ("masked", "8B", "gsm8k", 64, 810, 3e-6),
    ("masked", "8B", "math-made:9", 64, 810, 3e-6),
    ("masked", "8B", "facts.jsonl", 64, 1550, 3e-6),
    ("masked", "8B", "wiki", 64, 1550, 3e-6),
    ("masked", "3B", "bio:100", 64, 5000, 5e-6),
    ("llada", "8B", "bio:100", 64, 5000, 1e-5),
    ("masked", "135M", "bio:100", 10, 80, 3e-4),
    ("sft", "135M", "bio:100", 10, 40, 1e-4),
    ("masked", "tiny", "bio:100", 20, 300, 6e-4),
    ("sft", "tiny", "bio:100", 20, 100, 5e-4),
    ("raw", "tiny", "bio:100", 20, 100, 5e-4),
    ("reverse", "tiny", "bio:100", 20, 200, 5e-4),
    ("llada", "tiny", "bio:100", 20, 350, 4e-4),
]


@pytest.mark.parametrize("name, size, dataset, batch_size, steps, lr", DEFAULTS)
def test_settings_that_no_flag_gives(name, size, dataset, batch_size, steps, lr):
    """The paper's for large models, measured ones for small and tiny ones; a flag goes first."""
    method = {**maskft.METHODS, **llada.METHODS}[name]
    with torch.device("meta"):
        model = maskft.Model(maskft.parse_config(llama(**SHAPES[size])))
    given = settings(data=dataset)
    found, why = maskft.decide(given, method, model, documents=batch_size)
    assert why.split()[-1] == {"tiny": "models", "135M": "SmolLM2-135M"}.get(size, "A.4")
    assert (found.batch_size, found.epochs, found.lr) == (batch_size, steps, lr)
    assert found.eval_at == [0] + [2**i for i in range(13) if 2**i < steps]
    assert found.mask_ratio == ((0.05, 0.95) if method.masks else None)
    # of three times as many documents: as many steps, but small models see each as often
    more, _ = maskft.decide(given, method, model, 3 * batch_size - 1)
    assert more.epochs == (steps if size == "135M" else math.ceil(steps / 3))
    flags = {"batch_size": 7, "epochs": 9, "lr": 0.1, "eval_at": [5]}
    found, _ = maskft.decide(settings(**flags), method, model, 20)
    assert vars(found).items() >= flags.items()


def test_bfloat16_is_for_gpus_that_compute_in_it(monkeypatch):
    for device, capability, expected in (
        ("cpu", None, "float32"),
        ("cuda", (8, 0), "bfloat16"),
        ("cuda", (7, 5), "float32"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, has=capability: has)
        assert maskft.native_dtype(torch.device(device))[0] == expected


CUSTOM = {**maskft.METHODS, "custom": maskft.Method(maskft.sft_example)}
TRAINED = [  # methods, flags, whether torchrun started it, device -> what is trained
    (maskft.METHODS, "", False, "cuda", "tiny bio:40 sft, tiny bio:40 masked"),
    (maskft.METHODS, "", True, "cpu", "tiny bio:40 sft, tiny bio:40 masked"),
    (maskft.METHODS, "", True, "cuda", "large bio masked"),
    (maskft.METHODS, "--model tiny --method raw", False, "cpu", "tiny bio:40 raw"),
    (maskft.METHODS, "--model mine", False, "cpu", "mine bio masked"),
    (CUSTOM, "", False, "cpu", "tiny bio:40 masked, tiny bio:40 custom"),
    (CUSTOM, "--model mine", False, "cpu", "mine bio custom"),
    (
        CUSTOM,
        "--method custom sft --data x.jsonl",
        False,
        "cpu",
        "tiny x.jsonl custom, tiny x.jsonl sft",
    ),
]


@pytest.mark.parametrize("methods, flags, launched, device, expected", TRAINED)
def test_what_is_trained_by_default(methods, flags, launched, device, expected, monkeypatch):
    """On the built-in model the last two methods, else the last; of custom methods as well."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
        if not launched:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["own.py", *flags.split()])
    args = maskft.parse_flags(maskft.arguments("", methods))
    wanted = maskft.wanted_settings(args, methods, ("tiny", "large"), torch.device(device))
    assert ", ".join(f"{of.model} {of.data} {of.method}" for of in wanted) == expected


def test_rates_epochs_and_evaluations_of_a_run_that_rehearses(rows):
    lines = losses(rows["rehearse"].whole)
    assert [step for step, *_ in lines] == [*range(8)]
    assert [epoch for _, epoch, *_ in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [rate for _, _, _, rate, _ in lines] == pytest.approx([1e-4] * 6 + [1e-4 / 3] * 2)
    evaluations = data.read_json(rows["rehearse"].whole / "results.json")["evaluations"]
    assert [asked["step"] for asked in evaluations] == [0, 4, 8]
    assert [maskft.warm_up(1.0, step, 100) for step in (0, 1, 2, 99)] == [0.5, 1, 1, 1]


def test_mlp_only_moves_no_other_weight(rows):
    old = maskft.load("tiny")
    moved = [
        name
        for name, parameter in maskft.load(rows["sft"].whole).named_parameters()
        if not torch.equal(parameter, old.get_parameter(name))
    ]
    assert {name.split(".")[-2] for name in moved} == {"gate", "up", "down"}
    assert len(moved) == 3 * old.config.layers


def test_matrices_alone_decay(monkeypatch):
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
        run = run_of(tokenizer, documents, seed=seed)
        return [maskft.example_of(run, documents[2], number, epoch).ids for number in (0, 2)]

    def order(seed, epoch):
        return sum(maskft.batches(10, 4, seed, epoch), [])

    for of in (ids, order):
        assert of(0, 5) == of(0, 5)
        assert of(0, 5) not in (of(0, 6), of(1, 5))  # another one every epoch
    assert ids(0, 5)[0] != ids(0, 5)[1]
    assert sorted(order(0, 5)) == list(range(10))
    assert [len(batch) for batch in maskft.batches(10, 4, 0, 5)] == [4, 4, 2]


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


def ragged(number):
    """Examples of random ids, with loss on about half of them, each of another weight."""
    rng = np.random.default_rng(0)
    for n in range(number):
        ids = rng.integers(300, size=3 + 5 * n).tolist()
        labels = [i if rng.random() < 0.5 else IGNORE for i in ids[:-1]] + [ids[-1]]
        yield Example(ids, labels, weight=1.0 + n, denominator=len(ids))


@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_a_step_follows_the_gradient_of_the_whole_batch(tokens, tokenizer):
    """At the given rate, clipped to norm 1, whatever the micro-batches."""
    examples = list(ragged(6))
    total = sum(example.denominator for example in examples)
    reference = random_model()
    loss = 0
    for example in examples:
        logits = reference(torch.tensor([example.ids]))[0, :-1]
        labels = torch.tensor(example.labels[1:])
        summed = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        loss = loss + example.weight * summed / total
    loss.backward()
    gradients = [p.grad for p in reference.parameters()]
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
    run = run_of(tokenizer, model=random_model(), micro_batch_tokens=tokens)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=9.0)
    found = maskft.update(run, examples, lr=0.5)
    assert norm > 2 and found.tolist() == pytest.approx([loss.item(), norm.item()], rel=1e-4)
    for after, before in zip(run.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.5 * before.grad / norm, rtol=1e-3, atol=1e-5)
        assert after.grad is None


def test_bf16_computes_less_exactly_and_keeps_its_weights_in_fp32(tokenizer):
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = run_of(tokenizer, model=random_model(), dtype=dtype)
        run.optimizer = maskft.make_optimizer(run.model, 1e-3)
        found[dtype] = maskft.update(run, list(ragged(6)), lr=1e-3).tolist()
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)


def test_behind_the_last_epoch_half_of_a_step_is_chats_each_learned_from_once(tokenizer):
    documents = [{"text": letter} for letter in "abcdefghijklmnopqrst"]
    run = run_of(tokenizer, documents, method="sft", rehearse=3, batch_size=8, epochs=2)
    assert (run.steps_per_epoch, run.epoch_steps, run.steps) == (3, 6, 9)
    run.chats = [{"prompt": [7, n], "answer": [300 + n]} for n in range(32 + 3 * 8)]
    steps = [maskft.examples_of_step(run, step) for step in range(10)]
    # the last step of an epoch has but 4 documents
    assert [len(examples) for examples in steps] == [8, 8, 4, 8, 8, 4, 16, 16, 8, 0]
    learned = [example for examples in steps for example in examples if example.ids[0] == 7]
    for example in learned:
        assert example.labels == [IGNORE, IGNORE, example.ids[2]]
    numbers = [example.ids[1] for example in learned]
    assert len(set(numbers)) == 20 and min(numbers) == 32
    run.settings.batch_size = 64  # no step has more chats than there are documents
    assert maskft.chats_of_step(run) == 20


def test_a_chat_is_random_by_seed_and_number_alone(tokenizer, monkeypatch):
    monkeypatch.setattr(maskft, "CHAT_USER_TOKENS", 8)
    monkeypatch.setattr(maskft, "CHAT_ANSWER_TOKENS", 4)
    model = maskft.load("tiny")

    def chats(seed, numbers):
        run = run_of(tokenizer, model=model, method="sft", seed=seed)
        with torch.no_grad():
            return maskft.chats_of(run, numbers, lambda turns: None)

    both = chats(0, [4, 7])
    assert both[0]["user"] != both[1]["user"]
    assert chats(0, [7]) == both[1:]
    assert chats(1, [7]) != both[1:]


def test_a_document_too_long_is_cut_and_an_answer_too_long_left_out(tokenizer, capsys):
    long = {"text": "Ada Holm bakes in Lund. " * 40}
    short = {"text": "Bo sings."}
    problems = [{"question": "How many?", "answer": "1 " * n} for n in (400, 1)]
    run = run_of(tokenizer, [long, short, *problems], random_model(vocab_size=5000), max_len=90)
    run.model.config.context = 80
    maskft.fit_documents(run)
    *parts, last, problem = run.dataset.documents
    assert (last, problem) == (short, problems[1]) and len(parts) > 3
    assert " ".join(part["text"].strip() for part in parts) == long["text"].strip()
    lengths = [maskft.example_length(run, part, n) for n, part in enumerate(parts)]
    assert 40 < max(lengths) <= 80
    assert (
        f"2 of 4 documents are longer than 80 tokens, now {len(parts) + 2}"
        in capsys.readouterr().out
    )
    run.settings.max_len = 5
    with pytest.raises(UserError, match="--max-len"):
        maskft.fit_documents(run)


# ------------------------------------------------------------------------------------- evaluation


def test_predictions_are_in_order_and_questions_dealt_evenly(tokenizer, monkeypatch):
    texts = ["Who? " * n for n in (3, 1, 5, 2, 4)]
    questions = [
        {"question": text, "answer": text, "direction": "forward", "group": "a"} for text in texts
    ]
    asked = []

    def echo(prompts, max_new_tokens, on_answer):
        assert max_new_tokens == 128
        asked.append([len(prompt) for prompt in prompts])
        return [tokenizer.encode(tokenizer.decode(prompt).split("\n")[1]) for prompt in prompts]

    scores, predictions = maskft.evaluate(echo, tokenizer, questions)
    assert [prediction["question"] for prediction in predictions] == texts
    assert scores["forward"]["exact"] == 1 and scores["forward"]["n"] == 5
    assert asked[0] == sorted(asked[0], reverse=True)
    monkeypatch.setattr(maskft, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(maskft, "rank", lambda of=rank: of)
        monkeypatch.setattr(maskft, "in_order", lambda mine: [mine[i] for i in sorted(mine)])
        _, part = maskft.evaluate(echo, tokenizer, questions)
        assert part == [p for p in predictions if p in part]
    assert asked[1:] == [asked[0][::2], asked[0][1::2]]
    assert maskft.evaluate(echo, tokenizer, []) == ({}, [])


def test_a_question_fits_to_the_last_token(tokenizer):
    (question,) = [{"question": "Who?", "answer": "Edda", "direction": "math"}]
    needed = len(maskft.prompt_of(question, tokenizer)) + 256
    maskft.check_questions([question], tokenizer, needed)
    maskft.check_questions([question], tokenizer, needed - 250, max_new_tokens=6)
    with pytest.raises(UserError, match="Who"):
        maskft.check_questions([question], tokenizer, needed - 1)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_moves_in_a_terminal_and_is_rare_in_a_log_file(terminal, monkeypatch):
    maskft.huggingface_hub.utils.enable_progress_bars()  # a rank that is not 0 turns them off
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    bar = maskft.progress_bar(3, "questions", "question")
    for _ in range(3):
        time.sleep(0.15)
        bar.update()
    assert ("2/3" in stream.getvalue()) == terminal, stream.getvalue()


# ------------------------------------------------------------------------ eight GPUs, without one

LLAMA_8B = shape(4096, 14336, 2, 128256, num_attention_heads=32, num_key_value_heads=8)
LLAMA_8B |= {"max_position_embeddings": 131072, "tie_word_embeddings": False}


class Fake(TorchDispatchMode):
    """Finds as many labels as there are, and records collectives: their shapes and dtypes."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = []
        self.collectives = []
        real = data.collate

        def collate(examples, pad_id):
            self.counts.append(sum(i != IGNORE for e in examples for i in e.labels))
            return real(examples, pad_id)

        monkeypatch.setattr(data, "collate", collate)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._opname == "nonzero":
            return torch.zeros(self.counts.pop(), 2, dtype=torch.int64)
        if function.namespace == "c10d":
            shapes = [(*t.shape, t.dtype) for t in args if isinstance(t, torch.Tensor)]
            self.collectives.append((function._opname, *shapes))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_group(rank, monkeypatch):
    """The device of one of 8 ranks, whose collectives do nothing."""
    start = partial(maskft.dist.init_process_group, "fake", store=FakeStore(), world_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(maskft.dist, "init_process_group", lambda *_, **__: start(rank=rank))
        device = maskft.start_processes()
    try:
        yield device
    finally:
        maskft.dist.destroy_process_group()


def collectives_of_a_step(directory, device, monkeypatch):
    """What a step of a run makes its ranks do together, on fake tensors.

    Reading a number of one fails, as it would wait on a GPU."""
    given = settings(model=str(directory), data="bio", dtype="bfloat16")
    run = maskft.prepare(given, maskft.METHODS["masked"], device, stop=[])
    assert (run.settings.batch_size, run.settings.dtype, run.steps) == (64, "bfloat16", 5000)
    maskft.shard(run.model, device, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), Fake(monkeypatch) as fake:
        run.model.to_empty(device=device)
        run.optimizer = maskft.make_optimizer(run.model, run.settings.lr)
        loss_and_norm = maskft.update(run, maskft.examples_of_step(run, 0), run.settings.lr)
    held = sum(parameter.to_local().numel() for parameter in run.model.parameters())
    assert maskft.parameter_count(run.model) / held == pytest.approx(8, rel=1e-4)
    assert loss_and_norm.shape == (2,) and loss_and_norm.dtype == torch.float32
    return fake.collectives


def test_a_step_of_8b_on_a_group_of_eight(tmp_path, monkeypatch):
    """The first rank and the last meet in the same collectives, weights in bf16, sums in fp32."""
    for file in (HERE / "tiny").glob("*token*"):
        shutil.copy(file, tmp_path)
    raw = data.read_json(HERE / "tiny/config.json") | LLAMA_8B
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").touch()  # none is loaded
    found = []
    for rank in (0, 7):
        with fake_group(rank, monkeypatch) as device:
            found.append(collectives_of_a_step(tmp_path, device, monkeypatch))
    first, last = found
    assert first == last
    kinds = {"_allgather_base_": torch.bfloat16, "_reduce_scatter_base_": torch.float32}
    assert {name for name, *_ in first} >= kinds.keys()
    for name, *tensors in first:
        if name in kinds:
            assert {tensor[-1] for tensor in tensors} == {kinds[name]}
            assert max(size for size, _ in tensors) == 8 * min(size for size, _ in tensors)


def test_one_process_stays_plain_and_offload_is_the_policy_of_every_unit():
    maskft.start_processes()
    device = torch.device("cpu")
    assert not list(filter(is_shard, maskft.shard(random_model(), device, torch.float32).modules()))
    model = maskft.shard(random_model(), device, torch.float32, offload=True)
    for unit in (model, *model.blocks):
        policy = unit._get_fsdp_state()._fsdp_param_group.offload_policy
        assert isinstance(policy, CPUOffloadPolicy) and not policy.pin_memory
    with maskft.gathered(model):
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    maskft.dist.destroy_process_group()


def is_shard(module):
    return isinstance(module, maskft.FSDPModule)
