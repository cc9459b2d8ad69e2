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
import torch.nn.functional as F
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
    """What has to be the same where a run is repeated: step, epoch, loss, lr and grad_norm."""
    return [[*line.values()][:5] for line in jsonl(out / "metrics.jsonl") if "loss" in line]


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


# documents of different lengths: steps of three and of two
FACTS = """\
{"text": "Edda Marlow was born on 3 June 1971."}
{"text": "Edda Marlow was born on 3 June 1971. Edda Marlow was born on 3 June 1971."}
{"text": "Edda."}
{"text": "Edda Marlow was born on 3 June 1971. Edda."}
{"text": "Edda Marlow was born."}
{"question": "When was Edda Marlow born?", "answer": "on 3 June 1971", "direction": "forward"}
{"question": "Who was born on 3 June 1971?", "answer": "Edda Marlow", "direction": "backward"}
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
    """name -> Row, each trained when it is asked for first."""
    folder = tmp_path_factory.mktemp("rows")
    return cache(lambda name: Row(name, facts, folder))


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
    """Of which one has nothing to do at times."""
    row.train(out, "--micro-batch-tokens", 1, processes=2)


def one_then_two(row, out):
    row.train(out, before=partial(signalled, signal.SIGTERM, "update", 3))
    row.resume(out, processes=2)


def two_then_one(row, out):
    """A signal to one process stops all."""
    stop = partial(signalled, signal.SIGTERM, "update", 3, only="1")
    row.train(out, "--offload", processes=2, before=stop)
    assert len(losses(out)) == 3
    row.resume(out)


def stopped_in_chats(row, out):
    """At the next turn that is whole, not after all of them."""

    def before():
        signalled(signal.SIGINT, "last_logits", 2)
        maskft.greedy_answer = lambda *_, **__: os._exit(9)

    assert f"--resume {out}" in row.train(out, before=before)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PET_MAX_RESTARTS", "1")
        flags = [*row.flags, "--save-every", "1e-9"]
        printed = command(script, *flags, processes=2, cwd=out.parent)
    line = "torchrun --nproc_per_node 2 again.py --resume out/facts-masked-1\n"
    assert printed.count(f"ends early: {line}") == 2
    assert f"[rank 0] go on with\n    {line}" in printed
    (made,) = (out.parent / "out").iterdir()
    made.rename(out)


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
    numbers = torch.tensor([*itertools.chain(*losses(out)), drift], dtype=torch.float64)
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
    out = tmp_path / "run"
    both = partial(rows("masked").train, out, "--method", "sft", "masked")
    both(before=partial(signalled, signal.SIGTERM, "update", 8))
    first, second = (tmp_path / f"run-{method}" for method in ("sft", "masked"))
    assert maskft.is_finished(first) and not maskft.is_finished(second)
    before = contents(first)
    printed = both()
    assert f"\n{first}: finished before\n" in printed and contents(first) == before
    assert losses(second) == losses(rows("masked").whole)
    before = contents(tmp_path)
    again = both()
    assert again.count("finished before") == 2 and contents(tmp_path) == before
    table = printed[printed.index("\nmethod") : printed.index("\nresults:")]
    print(table)
    assert table in again


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
    resumed = pasted(printed, "--resume")
    assert resumed == ["--resume", "my run-masked"]
    refused = forked(maskft, *resumed, status=1)
    assert "finished" in refused and pasted(refused, "--ask")[:2] == asked[:2]


def test_a_run_leaves_its_scores_losses_and_times(done):
    names = "config.json generation_config.json model.safetensors tokenizer.json preds.jsonl "
    names += "tokenizer_config.json chat_template.jinja metrics.jsonl results.json README.md "
    names += "rehearsal.jsonl" + " curves.png" * bool(maskft.find_spec("matplotlib"))
    assert {path.name for path in done.iterdir()} == {*names.split()}
    lines = jsonl(done / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 1, 2, *range(2, 17)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    results = data.read_json(done / "results.json")
    last = results["evaluations"][-1]
    assert results["last"] == last and results["best"] in results["evaluations"]
    reported = evaluation.reported_scores(last) | {"drift": last["drift"]}
    assert lines[-1]["evaluation"] == reported
    assert results["arguments"]["data"] == str(Path("own facts.jsonl").absolute())
    assert results["decoding"]["max_new_tokens"] == 128 and results["steps"] == 16
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
    assert len(chats) == 32
    tokens = lost = 0
    before, after = maskft.load("tiny"), maskft.load(done)
    for chat in chats:
        start = len(chat["prompt"]) - 1
        ids = torch.tensor([chat["prompt"] + chat["answer"]])
        taught = ids[0, start + 1 :]
        with torch.no_grad():
            old, new = (model(ids)[0, start:-1] for model in (before, after))
        assert torch.equal(old.argmax(-1), taught)  # the model that it began with said this
        lost += F.nll_loss(new.log_softmax(-1) - old.log_softmax(-1), taught, reduction="sum")
        tokens += len(taught)
    first, *_, last = data.read_json(done / "results.json")["evaluations"]
    assert first["drift"] == 0 and last["drift"] == pytest.approx(lost.item() / tokens, rel=1e-3)


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
    "other/results.json": '{"arguments": {"method": "llada"}}',
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
    mistakes = [(maskft, flags, flags.split()[0], 2) for flags in USAGE.strip().splitlines()]
    mistakes += [(maskft, flags, named, 1) for flags, named in TRAINING_MISTAKES.items()]
    mistakes += [(llada, "--mask-ratio 0", "--mask-ratio", 1)]
    for script, flags, named, status in mistakes:
        line = last_line(forked(script, *flags.split(), status=status))
        assert named in line and "error: " in line, (flags, line)
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


def test_a_damaged_run_goes_on_or_is_one_line_that_names_it(begun, tmp_path):
    """Cut off, or with one byte changed."""
    rng = random.Random(int(os.environ.get("MASKFT_FUZZ_SEED", 0)))
    for n in range(int(os.environ.get("MASKFT_FUZZ", 10))):
        run = shutil.copytree(begun, tmp_path / f"run-{n}")
        files = sorted(
            path for path in run.rglob("*") if path.is_file() and "step-2" not in str(path)
        )
        file = files[n % len(files)]
        whole = file.read_bytes()
        at = rng.randrange(len(whole))
        rest = rng.choice([b"", bytes([rng.randrange(256)]) + whole[at + 1 :]])
        file.write_bytes(whole[:at] + rest)
        printed = forked(maskft, "--resume", run, before=quick, kill_after=60)
        named = re.match(f"error: .*({run}|--)", last_line(printed))
        assert maskft.is_finished(run) or named, (file.name, at, rest[:1], printed)


DAMAGE = {  # file of a run: old, new -> what the one line names
    "metrics.jsonl": ('"step": 1,', '"step"', "metrics.jsonl"),
    "rehearsal.jsonl": ('"assistant": "', '"assistant": "a', "rehearsal.jsonl"),
    "results.json": ('"dataset": "', '"dataset": "0', "--data"),
    "ckpt/step-3/.metadata": ("torch", "", "Delete {run}/ckpt/step-3 "),
}


def test_what_would_teach_another_thing_is_noticed(halted, rows):
    for name, (old, new, named) in DAMAGE.items():
        before = (halted / name).read_bytes()
        assert old.encode() in before
        (halted / name).write_bytes(before.replace(old.encode(), new.encode()))
        line = last_line(forked(maskft, "--resume", halted, before=quick, status=1))
        assert named.format(run=halted) in line and str(halted) in line
        (halted / name).write_bytes(before)
    chats = halted / "rehearsal.jsonl"
    chats.rename(halted / "away")
    assert str(chats) in last_line(forked(maskft, "--resume", halted, before=quick, status=1))
    (halted / "away").rename(chats)
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
    assert not maskft.is_finished(tmp_path / "run")


def test_a_loss_that_is_no_number_is_not_always_the_rate_s():
    maskft.check_finite(1.0, 1.0, 0)
    for step, advice in ((7, "step 7.* --lr"), (0, "use another")):
        for loss, norm in ((math.nan, 1.0), (1.0, math.inf)):
            with pytest.raises(UserError, match=advice):
                maskft.check_finite(loss, norm, step)


# ----------------------------------------------------------------------------- where it is started


def test_a_notebook_may_train_twice_and_keeps_its_signals(rows, tmp_path):
    """Even where RANK is set, but no launcher has set the rest."""
    row = rows("masked")
    before = signal.getsignal(signal.SIGINT)

    def main():
        for name in ("a", "b"):
            sys.argv[-1] = str(tmp_path / name)
            args = maskft.parse_flags(maskft.arguments("", maskft.METHODS))
            maskft.run_methods(args, maskft.METHODS)
            assert signal.getsignal(signal.SIGINT) == before

    def alone():
        quick()
        os.environ["RANK"] = "3"

    notebook = SimpleNamespace(__name__="notebook", main=main)
    printed = forked(notebook, *row.flags, "--out", "", before=alone)
    for name in ("a", "b"):
        assert losses(tmp_path / name) == losses(row.whole)
    assert printed.count("\nmasked  epoch 3  step 6  forward") == 2


def test_progress_is_a_line_in_a_log(capsys):
    bar = maskft.progress_bar(6, "masked", "step", initial=2)
    bar.refresh()
    assert re.search("^masked: 2 of 6 steps, .* gone, .* to go$", capsys.readouterr().err, re.M)


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


WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
SHAPES = {
    "tiny": {},
    "135M": {"num_hidden_layers": 400, "hidden_size": 160, "intermediate_size": 400},
    "3B": WIDE | {"hidden_size": 2048},
    "8B": WIDE,
    "qwen-8B": WIDE | {"model_type": "qwen3"},
}
# size -> method, data, batch size, steps, lr, of as many documents as fill one batch [paper A.4]
DEFAULTS = """
8B      sft     bio:100       64 5000 5e-6
8B      masked  bio-released  64 5000 3e-6
8B      random  nd            64 1400 3e-6
8B      masked  nd-made:9     64 1400 3e-6
8B      masked  gsm8k         64 810  3e-6
8B      masked  math-made:9   64 810  3e-6
8B      masked  facts.jsonl   64 1550 3e-6
8B      llada   wiki          64 1550 1e-5
3B      masked  bio           64 5000 5e-6
qwen-8B masked  bio           64 5000 5e-6
135M    masked  bio           10 80   3e-4
135M    sft     bio           10 40   1e-4
tiny    masked  bio           20 300  6e-4
tiny    sft     bio           20 100  5e-4
tiny    raw     bio           20 100  5e-4
tiny    reverse bio           20 200  5e-4
tiny    llada   bio           20 350  4e-4
"""


@pytest.mark.parametrize("row", DEFAULTS.strip().splitlines())
def test_settings_that_no_flag_gives(row):
    """The paper's for large models, measured ones for small and tiny ones; a flag goes first."""
    size, name, dataset, *expected = row.split()
    batch_size, steps, lr = map(float, expected)
    method = {**maskft.METHODS, **llada.METHODS}[name]
    with torch.device("meta"):
        model = maskft.Model(maskft.parse_config(llama(**SHAPES[size])))
    given = settings(data=dataset)
    found, _ = maskft.decide(given, method, model, documents=int(batch_size))
    assert (found.batch_size, found.epochs, found.lr) == (batch_size, steps, lr)
    assert found.eval_at == [0] + [2**i for i in range(13) if 2**i < steps]
    assert found.mask_ratio == ((0.05, 0.95) if method.masks else None)
    # of three times as many documents: as many steps, but small models see each as often
    more, _ = maskft.decide(given, method, model, int(3 * batch_size - 1))
    assert more.epochs == (steps if size == "135M" else math.ceil(steps / 3))


CUSTOM = {**maskft.METHODS, "custom": maskft.Method(maskft.sft_example)}
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
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(sys, "argv", ["own.py", *flags.split()])
    args = maskft.parse_flags(maskft.arguments("", methods))
    wanted = maskft.wanted_settings(args, methods, ("tiny", "large"), torch.device(device))
    found = [wanted[0].model, wanted[0].data, *(of.method for of in wanted)]
    assert found == expected.split()


def test_a_run_rehearses_at_a_third_of_the_rate(rows):
    whole = rows("rehearse").whole
    steps, epochs, _, rates, _ = zip(*losses(whole), strict=True)
    assert steps == (*range(8),) and epochs == (0, 0, 1, 1, 2, 2, 3, 3)
    assert rates == pytest.approx([1e-4] * 6 + [1e-4 / 3] * 2)
    evaluations = data.read_json(whole / "results.json")["evaluations"]
    assert [asked["step"] for asked in evaluations] == [0, 4, 8]


def test_mlp_only_moves_no_other_weight(rows):
    old = maskft.load("tiny")
    new = maskft.load(rows("sft").whole).named_parameters()
    moved = [name for name, weight in new if not torch.equal(weight, old.get_parameter(name))]
    assert {name.split(".")[-2] for name in moved} == {"gate", "up", "down"}
    assert len(moved) == 3 * old.config.layers


def test_matrices_alone_decay(monkeypatch):
    model = random_model(attention_bias=True)
    groups = maskft.make_optimizer(model, 1e-3).param_groups
    assert (groups[0]["betas"], groups[0]["eps"]) == ((0.9, 0.95), 1e-5)
    decays = {p.dim(): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}
    monkeypatch.setattr(maskft, "TINY", maskft.parameter_count(model))
    assert maskft.make_optimizer(model, 1e-3).param_groups[0]["eps"] == 1e-8


def test_same_seed_same_masks_and_order(tokenizer):
    record = {"text": "Edda Marlow was born on 3 June 1971."}

    def ids(seed, epoch, number=2):
        return maskft.example_of(run_of(tokenizer, seed=seed), record, number, epoch).ids

    order = partial(maskft.batches, 10, 4)
    for of in (ids, order):
        assert of(0, 5) == of(0, 5)
        assert of(0, 5) not in (of(0, 6), of(1, 5))  # another one every epoch
    assert ids(0, 5) != ids(0, 5, 0)
    assert sorted(sum(order(0, 5), [])) == [*range(10)]
    assert [*map(len, order(0, 5))] == [4, 4, 2]


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
    examples = []
    reference = random_model()
    loss = 0
    for n in range(6):
        ids = torch.randint(300, (3 + 5 * n,))
        examples.append(Example(ids.tolist(), [IGNORE] + ids[1:].tolist(), 1.0 + n, 2))
        logits = reference(ids[None])[0, :-1]
        loss += (1 + n) * F.cross_entropy(logits, ids[1:], reduction="sum") / 12
    loss.backward()
    weights = [*reference.parameters()]
    norm = sum(p.grad.square().sum() for p in weights).sqrt()
    run = run_of(tokenizer, model=random_model(), micro_batch_tokens=tokens)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=9.0)
    found = maskft.update(run, examples, lr=0.5)
    assert norm > 2 and found.tolist() == pytest.approx([loss.item(), norm.item()], rel=1e-4)
    expected = [p - 0.5 * p.grad / norm for p in weights]
    torch.testing.assert_close([*run.model.parameters()], expected, rtol=1e-3, atol=1e-5)


def test_behind_the_last_epoch_half_of_a_step_is_chats_each_learned_from_once(tokenizer):
    documents = [{"text": letter} for letter in "abcdefghijklmnopqrst"]
    run = run_of(tokenizer, documents, method="sft", rehearse=3, batch_size=8, epochs=2)
    run.chats = [{"prompt": [7, n], "answer": [300 + n]} for n in range(32 + 3 * 8)]
    steps = [maskft.examples_of_step(run, step) for step in range(run.steps + 1)]
    # the last step of an epoch has but 4 documents
    assert [*map(len, steps)] == [8, 8, 4, 8, 8, 4, 16, 16, 8, 0]
    numbers = [example.ids[1] for example in sum(steps, []) if example.ids[0] == 7]
    assert len(numbers) == len({*numbers}) == 20 and min(numbers) == 32
    run.settings.batch_size = 64  # no step has more chats than there are documents
    assert maskft.chats_of_step(run) == 20


def test_a_document_too_long_is_cut_and_an_answer_too_long_left_out(tokenizer):
    long = {"text": "Ada Holm bakes in Lund. " * 40}
    problems = [{"question": "How many?", "answer": "1 " * n} for n in (400, 1)]
    run = run_of(tokenizer, [long, *problems], random_model(vocab_size=5000), max_len=90)
    run.model.config.context = 80
    maskft.fit_documents(run)
    *parts, problem = run.dataset.documents
    assert problem == problems[1]
    assert " ".join(part["text"].strip() for part in parts) == long["text"].strip()
    lengths = [maskft.example_length(run, part, 0) for part in parts]
    assert 40 < max(lengths) <= 80
    run.settings.max_len = 5
    with pytest.raises(UserError, match="--max-len"):
        maskft.fit_documents(run)


# ------------------------------------------------------------------------------------- evaluation


def test_predictions_are_in_order_though_the_longest_are_asked_first(tokenizer):
    texts = ["Who? " * n for n in (3, 1, 5, 2, 4)]
    questions = [{"question": text, "direction": "forward"} for text in texts]

    def answer(prompts, max_new_tokens, on_answer):
        lengths = [len(prompt) for prompt in prompts]
        assert lengths == sorted(lengths, reverse=True)
        return prompts

    _, predictions = maskft.evaluate(answer, tokenizer, questions)
    for prediction, text in zip(predictions, texts, strict=True):
        assert prediction["question"] == text
        assert prediction["prediction"].count("Who?") == text.count("Who?")


# ------------------------------------------------------------------------------------------ FSDP2


def test_one_process_stays_plain_and_a_unit_computes_in_bf16_and_sums_in_fp32():
    """Here with --offload, which shards one process, too."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    device = maskft.start_processes()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    plain = maskft.shard(random_model(), device, torch.bfloat16)
    assert not isinstance(plain.head.weight, DTensor)
    model = maskft.shard(random_model(), device, torch.bfloat16, offload=True)
    for unit in (model, *model.blocks):
        policy = unit._get_fsdp_state()._fsdp_param_group.mp_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert not policy.cast_forward_inputs
    maskft.dist.destroy_process_group()
