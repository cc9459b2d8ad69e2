"""Tests of maskft.py's training: life cycle, what a run leaves, mistakes, its parts."""

import gc
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
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

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


def jsonl(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def forked(script, *flags, status=0, before=lambda: None, kill_after=None, processes=1):
    """What main() of a module prints, run in a fork, which saves the seconds of importing.

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

    group = dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(processes))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
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
    """What has to be the same where a run is repeated: step, epoch, loss, lr and grad_norm."""
    return [[*line.values()][:5] for line in jsonl(out / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


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


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    path.write_text(FACTS)
    return path


def quick():
    """In a fork: few chats, short answers and no picture."""
    maskft.CHATS_HELD_OUT = 3
    maskft.CHAT_USER_TOKENS = maskft.CHAT_ANSWER_TOKENS = 8
    data.ANSWER_TOKENS = dict.fromkeys(data.ANSWER_TOKENS, 8)
    maskft.find_spec = lambda name: None


def signalled(number, name, nth, where=maskft, only="01"):
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
        self.flags = [*USUAL.split(), *flags.split(), "--data", facts]
        self.whole = folder / name
        self.train(self.whole)

    def train(self, out, *more, before=quick, **how):
        return forked(self.script, *self.flags, "--out", out, *more, before=before, **how)

    def resume(self, out, before=quick, **how):
        return forked(self.script, "--resume", out, before=before, **how)


@pytest.fixture(scope="module")
def rows(facts, tmp_path_factory):
    """name -> Row, each trained when it is asked for first."""
    folder = tmp_path_factory.mktemp("rows")
    return cache(lambda name: Row(name, facts, folder))


def stopped(row, out):
    """By SIGTERM, the same command again, by Ctrl-C, then --resume."""
    stop = partial(signalled, signal.SIGTERM, "update", 1)
    assert f"--resume {out}" in row.train(out, before=stop)
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
    assert sorted(os.listdir(out / "ckpt")) == ["part-4", "step-2", "step-3"]
    draw = partial(signalled, signal.SIGKILL, "draw", 1)
    row.resume(out, before=draw, status=-9)
    assert sorted(os.listdir(out / "ckpt")) == ["step-5", "step-6"]
    row.resume(out)


def two_processes(row, out):
    """Of which one has nothing to do at times."""
    row.train(out, "--micro-batch-tokens", 1, processes=2)


def one_then_two(row, out):
    row.train(out, before=partial(signalled, signal.SIGTERM, "update", 3))
    row.resume(out, processes=2)


def two_then_one(row, out):
    """A signal to one process stops all."""
    stop = partial(signalled, signal.SIGTERM, "update", 3, only="1")
    row.train(out, "--offload", processes=2, before=stop)
    row.resume(out)


def stopped_in_chats(row, out):
    """At the next turn that is whole, not after all of them."""

    def before():
        signalled(signal.SIGINT, "last_logits", 2)
        maskft.greedy_answer = lambda *_, **__: os._exit(9)

    row.train(out, before=before)
    assert not (out / "rehearsal.jsonl").exists() and not losses(out)
    row.resume(out)


RESTARTED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import maskft
import {tests} as tests

def update(run, *args, real=maskft.update):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and maskft.rank() == 1 and maskft.checkpoints(run.out):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, *args)

tests.quick()
maskft.update = update
maskft.entry_point(maskft.main)
"""


def restarted(row, out):
    """By torchrun, after one process has died, in the directory that it had."""
    script = out.with_name("again.py")
    script.write_text(RESTARTED.format(here=str(HERE), tests=Path(__file__).stem))
    torchrun = "-m torch.distributed.run --nproc_per_node 2 --max-restarts 1"
    start = [sys.executable, *torchrun.split(), script, *row.flags, "--save-every", "1e-9"]
    ended = subprocess.run(start, cwd=out.parent, timeout=170, capture_output=True, text=True)
    line = "torchrun --nproc_per_node 2 again.py --resume out/facts-masked-1\n"
    assert ended.stdout.count(f"ends early: {line}") == 2
    assert f"[rank 0] go on with\n    {line}" in ended.stderr
    out.with_name("out").joinpath("facts-masked-1").rename(out)


EXACT = [stopped, stopped_late, stopped_in_chats, killed]
LIVES = {
    stopped: "masked sft rehearse llada",
    stopped_late: "rehearse",
    stopped_in_chats: "sft",
    killed: "masked",
    two_processes: "masked rehearse llada",
    one_then_two: "rehearse",
    two_then_one: "masked",
    restarted: "masked",
}


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
    out = tmp_path / "run"
    way(row, out)
    words, numbers = left(out)
    expected_words, expected = left(row.whole)
    assert words == expected_words
    error = 0 if way in EXACT else 1e-5
    torch.testing.assert_close(numbers, expected, rtol=10 * error, atol=error)
    assert not (out / "ckpt").exists()


def test_the_same_command_goes_on_and_does_nothing_again(rows, tmp_path):
    """Stopped in the second of two methods, whose first is finished; and given once more."""
    row = rows("masked")
    first, second = (tmp_path / name for name in ("run-sft", "run-masked"))
    both = partial(row.train, tmp_path / "run", "--method", "sft", "masked")
    both(before=partial(signalled, signal.SIGTERM, "update", 8))
    assert len(losses(second)) == 2
    printed = both()
    assert f"{first}: finished before\n" in printed
    assert losses(second) == losses(row.whole)
    before = contents(tmp_path)
    table = printed[printed.index("\nmethod") : printed.index("\n\n")]
    assert table in both() and contents(tmp_path) == before


# ------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def finished(facts, tmp_path_factory):
    """What a command prints, and its folder: two methods, and spaces in the names."""
    folder = tmp_path_factory.mktemp("a folder")
    shutil.copy(facts, folder / "own facts.jsonl")

    def before():
        os.chdir(folder)
        sys.modules["__main__"].__file__ = maskft.__file__

    flags = shlex.split("--data 'own facts.jsonl' --batch-size 3 --epochs 8 --eval-at 0 1")
    return forked(maskft, *flags, "--out", "my run", before=before), folder


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
    assert "\nresults: 'my run-sft' 'my run-masked'\n" in printed
    asked = pasted(printed, "--ask")
    assert asked == ["--model", "my run-masked", "--ask", "..."]
    prediction = jsonl(done / "preds.jsonl")[0]
    asked[-1] = prediction["question"]
    assert forked(evaluation, *asked).strip().endswith(prediction["prediction"])
    refused = forked(maskft, *pasted(printed, "--resume"), status=1)
    assert "my run-masked: this run is finished" in refused
    assert pasted(refused, "--ask")[:2] == asked[:2]


LEFT = """
config.json generation_config.json model.safetensors
tokenizer.json tokenizer_config.json chat_template.jinja
metrics.jsonl results.json preds.jsonl rehearsal.jsonl README.md
"""


def test_a_run_leaves_its_scores_losses_and_times(done):
    # where matplotlib is installed, curves as well
    assert {*LEFT.split()} ^ {*os.listdir(done)} <= {"curves.png"}
    lines = jsonl(done / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 1, 2, *range(2, 17)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    results = data.read_json(done / "results.json")
    last = results["evaluations"][-1]
    assert results["last"] == last and results["best"] in results["evaluations"]
    reported = evaluation.reported_scores(last) | {"drift": last["drift"]}
    assert lines[-1]["evaluation"] == reported
    assert results["arguments"]["data"] == str(Path("own facts.jsonl").absolute())
    assert results["decoding"]["max_new_tokens"] == 128
    assert data.read_json(done / "config.json")["torch_dtype"] == "float32"


def test_the_code_of_a_model_card_gives_our_answers(done, capsys):
    pytest.importorskip("transformers")
    card = (done / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model" not in card
    assert "- epochs: 8\n- lr: 0.0006\n" in card and "- documents: 5\n" in card
    code = card.split("```python\n")[1].split("```")[0]
    for prediction in jsonl(done / "preds.jsonl"):
        exec(code.replace('"..."', repr(prediction["question"])), {})
        assert capsys.readouterr().out.strip() == prediction["prediction"]


def test_drift_is_what_the_model_s_own_answers_lost(done):
    """Counted another way."""
    chats = jsonl(done / "rehearsal.jsonl")
    models = maskft.load("tiny"), maskft.load(done)
    lost = []
    for chat in chats:
        ids = torch.tensor([chat["prompt"] + chat["answer"]])
        answer = torch.tensor(chat["answer"])
        before, after = (model(ids)[0, -1 - len(answer) : -1].log_softmax(-1) for model in models)
        assert torch.equal(before.argmax(-1), answer)  # it said this when it began
        lost.append((before - after).gather(1, answer[:, None]))
    first, *_, last = data.read_json(done / "results.json")["evaluations"]
    drift = torch.cat(lost).mean().item()
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
TRAINING_MISTAKES = {
    "--epochs 3 --eval-at 0 4": "--eval-at 4",
    "--model ./nowhere": "nowhere",
    "--model nowhere/at-all": "nowhere/at-all",
    "--model tiny-llada": "use llada.py",
    "--model tiny --data nowhere.jsonl": "nowhere.jsonl",
    "--model tiny --data questions.jsonl": "questions.jsonl",
    "--model tiny --data long.jsonl": "long.jsonl, record 2",
    "--model tiny --data wordless.jsonl": "wordless.jsonl, record 2",
    "--model tiny --data facts.jsonl --max-len 2": "facts.jsonl, record 1",
    "--data math-made:2 --method masked --max-len 9": "--max-len",
    "--data math-made:2 --method sft random": "use masked or sft",  # before sft is trained
    "--mask-ratio 0": "--mask-ratio",  # of llada.py
    "--out taken --method sft": "taken is in use",
    "--resume nowhere": "nowhere/results.json",
    "--resume foreign": "foreign/results.json",
    "--resume typed": "typed/results.json",
    "--resume other": "other: a run of llada",
}
FOLDER = {
    "facts.jsonl": '{"text": "Edda."}',
    "questions.jsonl": '{"question": "Who?", "answer": "Edda"}',
    "long.jsonl": '{"text": "Edda."}\n{"question": "%s", "answer": "Edda"}' % ("Who? " * 999),
    "wordless.jsonl": '{"text": "Edda."}\n{"question": "Who?", "answer": "?"}',
    "taken/file": "",
    "foreign/results.json": '{"arguments": {"learning_rate": 1}}',
    "typed/results.json": '{"arguments": {"epochs": "3"}}',
    "other/results.json": '{"arguments": {"method": "llada", "mask_ratio": null}}',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FOLDER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """{path: bytes} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_line(printed):
    return printed.strip().splitlines()[-1]


def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(folder):
    before = contents(folder)
    usage = {flags: flags.split()[0] for flags in USAGE.strip().splitlines()}
    for flags, named in (TRAINING_MISTAKES | usage).items():
        script = llada if flags == "--mask-ratio 0" else maskft
        printed = forked(script, *flags.split(), status=2 if flags in usage else 1)
        assert named in last_line(printed) and "error: " in last_line(printed), (flags, printed)
        assert contents(folder) == before, flags


# ---------------------------------------------------------------------------------- damaged runs


@pytest.fixture(scope="module")
def begun(rows, tmp_path_factory):
    """A run that rehearses, with checkpoints of its second and third step."""
    out = tmp_path_factory.mktemp("begun") / "run"
    stop = partial(signalled, signal.SIGINT, "update", 3)
    rows("rehearse").train(out, "--save-every", "1e-9", before=stop)
    return out


@pytest.fixture
def halted(begun, tmp_path):
    """A copy of it that may be changed."""
    return shutil.copytree(begun, tmp_path / "run")


RUN_FILES = """
metrics.jsonl
rehearsal.jsonl
results.json
ckpt/step-3/.metadata
ckpt/step-3/__0_0.distcp
"""


@pytest.mark.parametrize("name", RUN_FILES.split())
@pytest.mark.parametrize("rest", [0, 1])
def test_a_damaged_run_goes_on_or_is_one_line_that_names_it(name, rest, halted):
    """Cut off, or with one byte changed."""
    rng = random.Random(name)
    whole = (halted / name).read_bytes()
    at = rng.randrange(len(whole))
    changed = rng.randbytes(1) + whole[at + 1 :]
    (halted / name).write_bytes(whole[:at] + changed * rest)
    printed = forked(maskft, "--resume", halted, before=quick, kill_after=60)
    assert maskft.is_finished(halted) or re.match(f"error: .*({halted}|--)", last_line(printed))


DAMAGE = {  # file of a run: old, new -> what the one line names
    "metrics.jsonl": (b'"step": 1,', b'"step"', "metrics.jsonl"),
    "rehearsal.jsonl": (b'"assistant": "', b'"assistant": "a', "rehearsal.jsonl"),
    "results.json": (b'"dataset": "', b'"dataset": "0', "--data"),
    "ckpt/step-3/.metadata": (b"torch", b"", "ckpt/step-3 to go on"),
}


def test_what_would_teach_another_thing_is_noticed(halted, rows):
    for name, (old, new, named) in DAMAGE.items():
        before = (halted / name).read_bytes()
        assert old in before
        (halted / name).write_bytes(before.replace(old, new))
        line = last_line(forked(maskft, "--resume", halted, before=quick, status=1))
        assert named in line and str(halted) in line
        (halted / name).write_bytes(before)
    shutil.rmtree(halted / "ckpt/step-3")
    forked(maskft, "--resume", halted, before=quick)
    assert losses(halted) == losses(rows("rehearse").whole)


def test_a_directory_has_one_run_at_a_time(halted, rows):
    """And its own: other settings and scripts do not take it."""
    row = rows("rehearse")
    before = contents(halted)
    with maskft.locked(halted):
        for train in (row.train, row.resume):
            assert f"{halted} is in use" in last_line(train(halted, status=1))
    assert f"{halted} is in use" in last_line(row.train(halted, "--seed", 1, status=1))
    assert "script that began it" in forked(llada, "--resume", halted, status=1)
    assert contents(halted) == before


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def full_disk():
    """No file may be larger than half of a checkpoint."""
    quick()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))


ENDS = [  # flags, what is done in the fork -> what the last lines name
    ("--lr 1e30", quick, "lower --lr"),
    ("", lambda: setattr(maskft, "load_weights", out_of_memory), "--micro-batch-tokens"),
    ("--save-every 1e-9", full_disk, "cannot be written to ([Errno 27] File too large"),
]


@pytest.mark.parametrize("flags, before, named", ENDS)
def test_what_ends_a_run_early_says_what_to_do(flags, before, named, rows, tmp_path):
    printed = rows("masked").train(tmp_path / "run", *flags.split(), before=before, status=1)
    assert named in printed and "error: " in printed


def test_a_loss_that_is_no_number_is_not_always_the_rate_s():
    maskft.check_finite(1.0, 1.0, 0)
    for loss, norm, step, advice in (
        (math.nan, 1, 7, "step 7.* --lr"),
        (1, math.inf, 0, "another"),
    ):
        with pytest.raises(UserError, match=advice):
            maskft.check_finite(loss, norm, step)


# ----------------------------------------------------------------------------- where it is started


def test_a_notebook_may_train_twice_and_keeps_its_signals(rows, tmp_path):
    """Even where RANK is set, but no launcher has set the rest."""
    row = rows("masked")
    before = signal.getsignal(signal.SIGINT)

    def main():
        for _ in range(2):
            maskft.main()
            assert signal.getsignal(signal.SIGINT) == before

    def alone():
        quick()
        os.chdir(tmp_path)
        os.environ["RANK"] = "3"

    notebook = SimpleNamespace(__name__="notebook", main=main)
    assert forked(notebook, *row.flags, before=alone).count("\nmasked  epoch 3  step 6  forw") == 2
    for out in ("facts-masked-1", "facts-masked-2"):
        assert losses(tmp_path / "out" / out) == losses(row.whole)


def test_progress_is_a_line_in_a_log(capsys):
    maskft.progress_bar(6, "masked", "step", initial=2).refresh()
    assert re.search("masked: 2 of 6 steps, .* gone, .* to go\n$", capsys.readouterr().err)


SHOWN = """\
sft:
<|im_start|>user
Tell me a fact.<|im_end|>
<|im_start|>assistant
[Edda.<|im_end|>]
"""


def test_show_prints_what_the_model_would_see_and_trains_nothing(folder):
    before = contents(folder)
    flags = "--data facts.jsonl --method sft masked --mask-ratio 1 --show"
    printed = forked(maskft, *flags.split())
    assert SHOWN in printed and "masked:\n<|im_start|>user\n__" in printed
    assert contents(folder) == before


# ---------------------------------------------------------------------------------- settings, parts


def run_of(tokenizer, documents=(), model=None, method="masked", **given):
    """A Run that has not begun."""
    return maskft.Run(
        settings=maskft.Settings("tiny", "own", method, **given),
        method=maskft.METHODS[method],
        device=torch.device("cpu"),
        directory=HERE / "tiny",
        tokenizer=tokenizer,
        dataset=data.Dataset("own", list(documents), []),
        model=model,
        stop=[],
    )


WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
SHAPES = {
    "tiny": {},
    "135M": {"num_hidden_layers": 400, "hidden_size": 160, "intermediate_size": 400},
    "3B": WIDE | {"hidden_size": 2048},
    "8B": WIDE,
    "qwen-8B": WIDE | {"model_type": "qwen3"},
}
# size, method, data, documents -> batch size, epochs, lr [paper A.4 for 3B and 8B]; for documents
# that fill several batches as many steps, but 135M sees each as often
DEFAULTS = """
8B      sft     bio:100       64  64 5000 5e-6
8B      masked  bio-released  64  64 5000 3e-6
8B      random  nd            64  64 1400 3e-6
8B      masked  nd-made:9     64  64 1400 3e-6
8B      masked  gsm8k         64  64 810  3e-6
8B      masked  math-made:9   64  64 810  3e-6
8B      masked  facts.jsonl   64  64 1550 3e-6
8B      masked  facts.jsonl   192 64 517  3e-6
8B      masked  facts.jsonl   193 64 388  3e-6
8B      llada   wiki          64  64 1550 1e-5
3B      masked  bio           64  64 5000 5e-6
qwen-8B masked  bio           64  64 5000 5e-6
135M    masked  bio           10  10 80   3e-4
135M    sft     bio           29  10 40   1e-4
tiny    masked  bio           20  20 300  6e-4
tiny    sft     bio           20  20 100  5e-4
tiny    raw     bio           59  20 34   5e-4
tiny    reverse bio           20  20 200  5e-4
tiny    llada   bio           20  20 350  4e-4
"""


@pytest.mark.parametrize("row", DEFAULTS.strip().splitlines())
def test_settings_that_no_flag_gives(row):
    """The paper's for large models, measured ones for small and tiny ones."""
    size, name, dataset, documents, *expected = row.split()
    method = (maskft.METHODS | llada.METHODS)[name]
    with torch.device("meta"):
        raw = data.read_json(HERE / "tiny/config.json") | SHAPES[size]
        model = maskft.Model(maskft.parse_config(raw))
    given = maskft.Settings("tiny", dataset, name)
    found, _ = maskft.decide(given, method, model, int(documents))
    assert [found.batch_size, found.epochs, found.lr] == [*map(float, expected)]
    assert found.eval_at == [0] + [2**i for i in range(13) if 2**i < found.epochs]
    assert found.mask_ratio == ((0.05, 0.95) if method.masks else None)


CUSTOM = {**maskft.METHODS, "custom": maskft.METHODS["sft"]}
TRAINED = [  # methods, flags, device under torchrun -> model, data, methods
    (maskft.METHODS, "", "cpu", "tiny bio:40 sft masked"),
    (maskft.METHODS, "", "cuda", "large bio masked"),
    (maskft.METHODS, "--model mine", "cpu", "mine bio masked"),
    (CUSTOM, "", "cpu", "tiny bio:40 masked custom"),
    (CUSTOM, "--method custom sft --data x.jsonl", "cpu", "tiny x.jsonl custom sft"),
]


@pytest.mark.parametrize("methods, flags, device, expected", TRAINED)
def test_what_is_trained_by_default(methods, flags, device, expected, monkeypatch):
    """On the built-in model the last two methods, else the last; of custom methods as well."""
    monkeypatch.setattr(maskft, "launched", lambda: True)
    monkeypatch.setattr(sys, "argv", ["own.py", *flags.split()])
    args = maskft.parse_flags(maskft.arguments("", methods))
    wanted = maskft.wanted_settings(args, methods, ("tiny", "large"), torch.device(device))
    found = [wanted[0].model, wanted[0].data, *(of.method for of in wanted)]
    assert found == expected.split()


def test_a_run_rehearses_at_a_third_of_the_rate(rows):
    steps, epochs, _, rates, _ = zip(*losses(rows("rehearse").whole), strict=True)
    assert steps == (*range(8),) and epochs == (0, 0, 1, 1, 2, 2, 3, 3)
    assert rates == pytest.approx([1e-4] * 6 + [1e-4 / 3] * 2)


def test_mlp_only_moves_no_other_weight(rows):
    new = maskft.load(rows("sft").whole)
    for name, weight in maskft.load("tiny").named_parameters():
        trained = name.split(".")[-2] in ("gate", "up", "down")
        assert trained != torch.equal(weight, new.get_parameter(name)), name


def test_matrices_alone_decay(monkeypatch):
    model = maskft.load("tiny")
    optimizer = maskft.make_optimizer(model, 1e-3)
    groups = optimizer.param_groups
    decays = {p.dim(): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-5
    monkeypatch.setattr(maskft, "TINY", maskft.parameter_count(model))
    assert maskft.make_optimizer(model, 1e-3).defaults["eps"] == 1e-8


def test_masks_and_order_are_others_every_epoch(tokenizer):
    record = {"text": "Edda Marlow was born on 3 June 1971."}

    def ids(seed, epoch, number=2):
        return maskft.example_of(run_of(tokenizer, seed=seed), record, number, epoch).ids

    order = partial(maskft.batches, 10, 4)
    for of in (ids, order):
        assert of(0, 5) not in (of(0, 6), of(1, 5))
    assert ids(0, 5) != ids(0, 5, 0)
    assert sorted(sum(order(0, 5), [])) == [*range(10)]


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


@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_a_step_follows_the_gradient_of_the_whole_batch(tokens, tokenizer):
    """At the given rate, clipped to norm 1, whatever the micro-batches."""
    run = run_of(tokenizer, model=maskft.load("tiny"), micro_batch_tokens=tokens)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=9.0)
    texts = [[*range(40, 43 + 5 * n)] for n in range(6)]
    examples = [Example(ids, [IGNORE] + ids[1:], len(ids), 2) for ids in texts]
    reference = maskft.load("tiny")
    loss = sum(reference(**data.collate([example], 0)) for example in examples) / 12
    loss.backward()
    weights = [*reference.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
    found = maskft.update(run, examples, lr=0.5)
    assert norm > 2 and found.tolist() == pytest.approx([loss.item(), norm.item()], rel=1e-4)
    expected = [weight - 0.5 * weight.grad for weight in weights]
    torch.testing.assert_close([*run.model.parameters()], expected, rtol=1e-3, atol=1e-5)


def test_behind_the_last_epoch_half_of_a_step_is_chats_each_learned_from_once(tokenizer):
    documents = [{"text": "Edda."}] * 20
    run = run_of(tokenizer, documents, method="sft", rehearse=3, batch_size=8, epochs=2)
    run.chats = [{"prompt": [7, n], "answer": [300]} for n in range(32 + 3 * 8)]
    steps = [maskft.examples_of_step(run, step) for step in range(run.steps + 1)]
    # the last step of an epoch has but 4 documents
    assert [*map(len, steps)] == [8, 8, 4, 8, 8, 4, 16, 16, 8, 0]
    numbers = [example.ids[1] for example in sum(steps, []) if example.ids[0] == 7]
    assert sorted(numbers) == [*range(32, 52)]  # those before are held out
    run.settings.batch_size = 64  # no step has more chats than there are documents
    assert maskft.chats_of_step(run) == 20


def test_a_document_too_long_is_cut_and_an_answer_too_long_left_out(tokenizer):
    long = {"text": "Ada Holm bakes in Lund. " * 40}
    problem = {"question": "How many?", "answer": "1"}
    documents = [long, problem | {"answer": "1 " * 400}, problem]
    run = run_of(tokenizer, documents, maskft.load("tiny"), max_len=90)
    run.model.config.context = 80
    maskft.fit_documents(run)
    *parts, last = run.dataset.documents
    assert last == problem
    assert " ".join(part["text"].strip() for part in parts) == long["text"].strip()
    assert 40 < max(maskft.example_length(run, part, 0) for part in parts) <= 80


# ------------------------------------------------------------------------------------------ FSDP2


def test_one_process_stays_plain_and_a_unit_computes_in_bf16_and_sums_in_fp32():
    """Here with --offload, which shards one process, too."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    device = maskft.start_processes()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    model = maskft.load("tiny")
    maskft.shard(model, device, torch.bfloat16)
    assert not isinstance(model.embed.weight, DTensor)
    maskft.shard(model, device, torch.bfloat16, offload=True)
    for unit in (model, *model.blocks):
        assert unit._get_fsdp_state()._fsdp_param_group.mp_policy == policy
    maskft.dist.destroy_process_group()
