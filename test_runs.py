"""Tests of a run's directory: its lock, its files, going on, and what it prints to whom."""

import gc
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import maskft
from data import UserError

# --- copied fixtures
HERE = Path(__file__).parent
torch.set_num_threads(1)


def write(path, *records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def forked(script, *flags, status=0, before=lambda: None, kill_after=None):
    """The same by the main() of a module in a fork, which saves the seconds of importing."""

    def body():
        gc.freeze()
        os.dup2(log.fileno(), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = log
        sys.argv = [f"{script.__name__}.py", *map(str, flags)]
        data.huggingface_hub.constants.HF_HUB_OFFLINE = True
        before()
        maskft.entry_point(script.main)

    with tempfile.TemporaryFile("w+") as log:
        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
        process.join(kill_after or 100)
        process.kill()
        process.join()
        log.seek(0)
        printed = log.read()
    assert kill_after or process.exitcode == status, printed
    assert "Traceback" not in printed, printed
    return printed


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


SHORT = shlex.split("--model tiny --data bio:6 --method masked --batch-size 4 --epochs 3")
SHORT += ["--eval-at", "0", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of the real command: 6 people, 6 steps of 4, the last of an epoch of 2."""
    folder = tmp_path_factory.mktemp("run")
    return command("maskft.py", *SHORT, cwd=folder), folder / "out" / "bio-masked-1"


# --- end


def losses(out):
    """What has to be the same where a run is repeated."""
    compared = ("step", "epoch", "loss", "lr", "grad_norm")
    steps = [line for line in jsonl(out / "metrics.jsonl") if "loss" in line]
    return [[line[name] for name in compared] for line in steps]


def contents(folder):
    """{path: bytes} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_to(folder):
    return partial(os.chdir, folder)


# ---------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_its_scores_losses_times_and_versions(finished):
    printed, out = finished
    lines = jsonl(out / "metrics.jsonl")
    kinds = [(line["step"], "evaluation" if "evaluation" in line else "loss") for line in lines]
    steps = [(step, "loss") for step in range(6)]
    asked = [(step, "evaluation") for step in (0, 2, 6)]
    assert kinds == [asked[0], *steps[:2], asked[1], *steps[2:], asked[2]]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    results = data.read_json(out / "results.json")
    assert results["seconds"] == pytest.approx(seconds[-1], abs=1)
    for line, result in zip([lines[0], lines[3], lines[8]], results["evaluations"], strict=True):
        assert line["evaluation"] == evaluation.reported_scores(result)
        assert line["epoch"] == result["epoch"]
    environment = results["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["python"] == platform.python_version()
    if (HERE / ".git").exists():
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=HERE, text=True).strip()
        assert environment["maskft"].removesuffix("-dirty") == head
    names = {path.name for path in out.iterdir()}
    assert not any(name.startswith(".lock") or name == "ckpt" for name in names)
    assert re.search(r"masked: about \d+ seconds to go: 3 steps, and evaluations: 1\n", printed)
    last = printed.splitlines()[-3:]
    ask = os.path.relpath(HERE / "eval.py", out.parent.parent)
    assert last[0] == "results: out/bio-masked-1"
    assert last[1] == f'ask it:  python {ask} --model out/bio-masked-1 --ask "..."'
    assert "out/bio-masked-1" in last[2]
    if "matplotlib" in last[2]:
        assert last[2].startswith("curves:  pip install matplotlib, then python ")
    else:
        picture = (out / "curves.png").read_bytes()
        width = int.from_bytes(picture[16:20], "big")
        assert width == round(3 * 4.2 * 110)  # forward, backward, loss


ESTIMATES = {
    (2.0, 3.0, 5): "about 19 seconds to go: 5 steps, and evaluations: 3",
    (60.0, 1.0, 5): "about 5 minutes to go: 5 steps, and evaluations: 3",
    (60.0, 7200.0, 0): "about 2.0 hours to go: 0 steps, and evaluations: 1",
    (60.0, None, 5): "about 5 minutes to go: 5 steps, and evaluations: 3, not counting these",
}


@pytest.mark.parametrize("times", ESTIMATES)
def test_an_estimate_is_of_the_steps_and_evaluations_that_are_left(times):
    """Five epochs of two steps; asked at steps 0, 6, 8 and 10."""
    a_step, an_evaluation, left = times
    run = Namespace(steps=10, steps_per_epoch=2, step_seconds=[99.0, a_step, a_step])
    run.settings = Namespace(epochs=5, eval_at=[0, 3, 4])
    run.evaluation_seconds = [an_evaluation] if an_evaluation else []
    assert maskft.estimate(run, 10 - left) == ESTIMATES[times]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_moves_while_questions_are_asked_but_not_in_a_log_file(terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)

    def slow(prompts, max_new_tokens, on_answer):
        for _ in prompts:
            time.sleep(0.15)
            on_answer(1)
        return [[]] * len(prompts)

    questions = data.load("bio:1").questions[:3]
    evaluation.evaluate(slow, data.load_tokenizer("tiny"), questions)
    assert ("2/3" in stream.getvalue()) == terminal, stream.getvalue()


# ------------------------------------------------------------------------------------- its lock


def test_a_directory_has_one_run_at_a_time_and_the_second_says_whose_it_is(finished, tmp_path):
    _, out = finished
    run = tmp_path / "x-masked"
    shutil.copytree(out, run)
    (run / "model.safetensors").unlink()  # it could go on
    empty = tmp_path / "empty"
    empty.mkdir()
    before = contents(run)
    who = f"is in use by process {os.getpid()} on {platform.node()}: wait for its end, or stop it"
    both = ("--method", "sft", "masked", "--out", tmp_path / "x")
    with maskft.locked(run), maskft.locked(empty):
        for flags, held in ((["--resume", run], run), (both, run), (["--out", empty], empty)):
            more = SHORT if "--out" in flags else []
            assert f"error: {held} {who}" in forked(maskft, *more, *flags, status=1)
        assert {path.name for path in empty.iterdir()} == {".lock", ".lock.holder"}
    assert contents(run) == before
    assert sorted(tmp_path.iterdir()) == [run]  # nothing of x-sft, and what is empty is gone
    assert f"--out {run} is in use" in forked(maskft, *SHORT, *both, status=1)


def test_a_killed_process_holds_no_lock_and_its_directory_can_be_taken(tmp_path):
    printed = forked(
        maskft,
        *SHORT,
        "--out",
        tmp_path / "run",
        before=partial(send, signal.SIGKILL, maskft, "claim", 1),
        status=-signal.SIGKILL,
    )
    assert "into" not in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".lock.holder"}
    with maskft.locked(tmp_path / "run"):
        maskft.refuse_used(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_came_into_a_directory_since_its_run_was_prepared_stays_as_it_is(tmp_path):
    theirs = tmp_path / "x-masked" / "results.json"

    def while_sft_is_trained():
        real = maskft.finish
        maskft.finish = lambda run: (real(run), theirs.write_text("theirs"))

    flags = ("--method", "sft", "masked", "--epochs", 1, "--eval-at", 1, "--out", tmp_path / "x")
    printed = forked(maskft, *SHORT, *flags, before=while_sft_is_trained, status=1)
    assert f"--out {theirs.parent} is in use" in printed
    assert [*contents(theirs.parent).values()] == [b"theirs"]
    assert (tmp_path / "x-sft" / "model.safetensors").exists()


def test_runs_that_begin_at_once_get_numbers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        paths = pool.map(maskft.next_number, ["bio-sft"] * 40)
    assert sorted(paths) == sorted(Path(f"out/bio-sft-{n}") for n in range(1, 41))


# ------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of data of one's own, given by a relative path, stopped after its third step of 6."""
    folder = tmp_path_factory.mktemp("stopped")
    documents = [{"text": f"{name} works in Oslo."} for name in ("Edda", "Zeno", "Mara")]
    question = {"question": "Who is Zeno?", "answer": "Edda", "direction": "backward"}
    write(folder / "facts.jsonl", *documents, question)
    shutil.copytree(HERE / "tiny", folder / "mine", ignore=shutil.ignore_patterns("*.py"))
    flags = shlex.split("--model mine --data facts.jsonl --method masked --epochs 6 --out run")

    def before():
        os.chdir(folder)
        send(signal.SIGINT, maskft, "update", 3)

    printed = forked(maskft, *flags, before=before)
    assert (
        "stopped after step 2; to go on from step 3:\n    python maskft.py --resume run" in printed
    )
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it that may be changed."""
    return shutil.copytree(stopped / "run", tmp_path / "elsewhere" / "run")


def test_a_run_goes_on_from_any_directory_with_its_clock(run, stopped):
    settings = data.read_json(run / "results.json")["arguments"]
    assert settings["data"] == str(stopped / "facts.jsonl")
    assert settings["model"] == str(stopped / "mine")
    before = jsonl(run / "metrics.jsonl")
    # a step that will be taken again, and a line torn by a crash
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 9, "seconds": 900}\n{"step": 4, "lo')
    forked(maskft, "--resume", "run", before=change_to(run.parent))
    lines = jsonl(run / "metrics.jsonl")
    assert lines[: len(before)] == before
    assert [line[0] for line in losses(run)] == [*range(6)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] < 900
    evaluations = data.read_json(run / "results.json")["evaluations"]
    asked = [line["step"] for line in lines if "evaluation" in line]
    assert asked == [result["step"] for result in evaluations] == [0, 1, 2, 4, 6]


def replaced(name, old, new):
    """Change a file of a run."""

    def change(run):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return change


def added(name, text=None):
    """Add a file to a run, or a directory."""

    def change(run):
        if text is None:
            (run / name).mkdir()
        else:
            (run / name).write_text(text)

    return change


# what is done to a stopped run -> what --resume says, {} the run
DAMAGES = {
    "a line of metrics": (
        replaced("metrics.jsonl", '{"step": 1, "epoch": 1, "loss"', '{"st'),
        "{}/metrics.jsonl, line 4: damaged, no step of a run: ",
    ),
    "no step": (
        replaced("metrics.jsonl", '"step": 0', '"stop": 0'),
        "{}/metrics.jsonl, line 1: damaged, no step of a run",
    ),
    "results cut": (
        lambda run: (run / "results.json").write_text('{"arguments": {"mod'),
        "{}/results.json: not JSON",
    ),
    "results no run": (
        added("results.json", "[]"),
        "{}/results.json: not the settings and results of a run (TypeError: ",
    ),
    "a number as text": (
        replaced("results.json", '"epochs": 6', '"epochs": "6"'),
        "{}/results.json: not the settings and results of a run (TypeError: epochs is '6')",
    ),
    "a setting gone": (
        replaced("results.json", '"seed"', '"sead"'),
        "{}/results.json: not the settings and results of a run (KeyError: 'seed')",
    ),
    "an evaluation": (
        replaced("results.json", '"rouge1"', '"rouge"'),
        "{}/results.json: not the settings and results of a run (KeyError: 'rouge1')",
    ),
    "a stray name": (
        added("ckpt/step-foo"),
        "{}/ckpt/step-foo: no checkpoint of a run; move it away and --resume again",
    ),
    "a stray file": (added("ckpt/step-9", "mine"), "{}/ckpt/step-9: no checkpoint of a run"),
    "an empty checkpoint": (
        added("ckpt/step-9"),
        "Delete {}/ckpt/step-9 and give the same --resume again: it goes on from step 3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_nothing_of_it_changed(damage, run):
    change, says = DAMAGES[damage]
    change(run)
    before = contents(run)
    printed = forked(maskft, "--resume", run, status=1)
    assert says.format(run) in printed
    assert len(printed.strip().splitlines()) == 1 + ("computes in" in printed)
    assert contents(run) == before


@pytest.mark.parametrize("what", ["Oslo", "Who is Zeno?", '"Edda"'])
def test_other_documents_questions_or_answers_are_noticed(what, stopped, run):
    facts = run.parent / "facts.jsonl"
    facts.write_text((stopped / "facts.jsonl").read_text().replace(what, what.swapcase()))
    replaced("results.json", str(stopped / "facts.jsonl"), str(facts))(run)
    assert "is not what it was when the run began" in forked(maskft, "--resume", run, status=1)


def test_a_run_killed_with_its_model_saved_is_finished_by_resume(run):
    """Nothing is trained: its checkpoints go, its picture is drawn; then it is finished."""
    kill = partial(send, signal.SIGKILL, maskft, "save", 1)
    forked(maskft, "--resume", run, before=kill, status=-signal.SIGKILL)
    assert (run / "ckpt").exists() and not (run / "curves.png").exists()
    metrics = (run / "metrics.jsonl").read_bytes()
    mine = run / "ckpt" / ".mine"
    mine.write_text("")
    assert f"{run}: this run is finished; what was left" in forked(maskft, "--resume", run)
    assert [*(run / "ckpt").iterdir()] == [mine]
    if maskft.find_spec("matplotlib"):
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "this run is finished. To ask" in forked(maskft, "--resume", run, status=1)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert not any(path.name.startswith(".lock") for path in run.iterdir())


def test_matplotlib_installed_later_draws_the_picture(run):
    """As the last line says where it is not installed."""
    pytest.importorskip("matplotlib")
    absent = partial(setattr, maskft, "find_spec", lambda name: None)
    line = f"curves:  pip install matplotlib, then python maskft.py --resume {run}\n"
    assert line in forked(maskft, "--resume", run, before=absent)
    assert "this run is finished. To ask" in forked(
        maskft, "--resume", run, before=absent, status=1
    )
    assert "this run is finished; what was left" in forked(maskft, "--resume", run)
    assert (run / "curves.png").exists()


# ------------------------------------------------------------------------------- who it prints to


def without_a_reader():
    """stdout and stderr as behind `2>&1 | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")


def closed():
    """stdin, stdout and stderr as Python finds them behind `<&- >&- 2>&-`."""
    for number in (0, 1, 2):
        os.close(number)
    sys.stdout = sys.stderr = None
    real = maskft.start_processes

    def start_processes():
        nowhere = os.stat(os.devnull).st_rdev  # no file of the run may get these numbers
        assert [os.fstat(number).st_rdev for number in (0, 1, 2)] == [nowhere] * 3
        return real()

    maskft.start_processes = start_processes


def ascii_only():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


@pytest.mark.parametrize("before", [without_a_reader, closed, ascii_only])
def test_a_run_ends_as_it_should_whoever_reads_what_it_prints(before, finished, tmp_path):
    _, out = finished
    run = tmp_path / "läuft"
    printed = forked(maskft, *SHORT, "--out", run, before=before)
    assert losses(run) == losses(out)
    assert (run / "preds.jsonl").read_bytes() == (out / "preds.jsonl").read_bytes()
    for path in run.iterdir():
        assert b"ROUGE-1" not in path.read_bytes(), path
    if before is ascii_only:
        assert "/l\\xe4uft" in printed


def test_results_are_written_before_they_are_printed(finished, tmp_path):
    _, out = finished

    def nothing_can_be_printed():
        def fail(*values):
            raise UserError("nobody reads")

        evaluation.print0 = fail
        evaluation.print = fail

    asked = ("--model", out, "--max-new-tokens", 4, "--data", "bio:1", "--out", tmp_path / "asked")
    forked(evaluation, *asked, before=nothing_can_be_printed, status=1)
    assert len(jsonl(tmp_path / "asked" / "preds.jsonl")) == 9
    told = ("--report", out, "--out", tmp_path / "told")
    (tmp_path / "told").mkdir()
    forked(evaluation, *told, before=nothing_can_be_printed, status=1)
    assert (tmp_path / "told" / "report.md").exists()


def test_an_error_of_the_disk_is_no_reader_that_is_gone():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space"), open("/dev/full", "w") as full:
        stream = maskft.Stream(full)
        try:
            stream.write("lost\n")
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import maskft

def update(run, *args, real=maskft.update):
    if maskft.rank() == {rank} and (run.out / "ckpt" / "step-2").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, *args)

maskft.update = update
maskft.entry_point(maskft.main)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_is_killed_another_says_how_to_go_on(rank, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(here=str(HERE), rank=rank))
    out = tmp_path / "run"
    flags = [*SHORT, "--save-every", "1e-9", "--out", out]
    printed = command(script, *flags, processes=2, status=1)
    line = f"torchrun --nproc_per_node 2 {script} --resume {out}\n"
    assert f"should a process die, go on with {line}" in printed
    assert f"[rank {1 - rank}] to go on from step 2:\n    {line}" in printed


def test_a_system_without_hangup_and_resource_usage_runs_too(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(maskft, "resource", None)
    monkeypatch.delattr(signal, "SIGHUP")
    try:
        assert maskft.listen_for_stop() == []
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert maskft.peak_memory_gib(torch.device("cpu")) is None
