"""Tests of eval.py: metrics, report and figures, its command."""

import gc
import json
import multiprocessing
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import maskft
from data import UserError

HERE = Path(__file__).parent
torch.set_num_threads(1)
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


def forked(script, *flags, status=0, before=lambda: None, kill_after=None):
    """The same by the main() of a module in a fork, which saves the seconds of importing.

    `before` is called first, in the fork. No end is a traceback; that of a fork which is killed
    after some seconds may be any."""

    def body():
        gc.freeze()  # what the parent left, process groups for one, is not for the child to free
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


# ---------------------------------------------------------------------------------- eval: metrics

RECALL = [  # (prediction, reference, ROUGE-1 recall as nltk 3.10 + rouge 1.0.1 gave it)
    ("Ada Holm", "Ada Holm", 1.0),
    ("ada holm", "Ada Holm", 0.0),
    ("The answer is Ada, of course.", "Ada Holm", 0.5),
    ("", "Ada Holm", 0.0),
    ("Lund Lund Lund", "Lund, a city in the south", 1 / 3),
    ("born on 3 June 1971", "3 June 1971", 1.0),
    ("I cannot say", "can not", 1.0),
    ("“Quillon”—Oslo", "Quillon Oslo", 1.0),
    ("U.S. e-mail", "US email", 1.0),
    ("New York", "York", 1.0),
    ("35", "3.5", 1.0),
    ("Jose\u0301", "Jos\u00e9", 1.0),  # an accent of its own
    ("Jos\u00e9", "Jose\u0301", 1.0),
    # a reference of function words alone is not the package's: they count
    ("A", "A", 1.0),
    ("The A", "A", 1.0),
    ("a", "A", 0.0),
    ("Ada", "of the", 0.0),
]


@pytest.mark.parametrize("prediction, reference, recall", RECALL)
def test_rouge1_recall_is_as_recorded(prediction, reference, recall):
    assert evaluation.rouge1_recall(prediction, reference) == pytest.approx(recall)


WORDS = """Ada holm Oslo the a New cannot gonna don't “quoted” e-mail U.S. 1971 — café ’s it’s «x»
    3.5 of lemme cannot… gonna→ €wanna gottas -5 C++ AND 1–2 ‚Gimme‘ „on“"""


STOP = "a of the and is are be to new on in at an for"


def test_rouge1_recall_equals_that_of_the_packages():
    nltk = pytest.importorskip("nltk")
    rouge = pytest.importorskip("rouge").Rouge(["rouge-1"])

    def clean(text):
        text = text.translate(str.maketrans("", "", string.punctuation))
        words = nltk.tokenize.NLTKWordTokenizer().tokenize(text)
        return " ".join(word for word in words if word.lower() not in STOP.split())

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS.split(), n)) for n in rng.integers(1, 8, 1000)]
    texts += [*string.punctuation, *"‒–—―«»“”‘’„x"]  # each mark of its own, too
    for a, b in zip(texts, texts[1:], strict=False):
        a, b = f"Oslo{a}Lund {a}", f"Oslo{b}Lund {b}"
        (theirs,) = rouge.get_scores(clean(a), clean(b))
        assert evaluation.rouge1_recall(a, b) == theirs["rouge-1"]["r"]


OTHERS = [  # (prediction, reference, exact, f1)
    ("the Ada Holm.", "Ada Holm", 1, 1),
    ("(“Ada Holm”)!", "Ada: *Holm*", 1, 1),
    ("Holm Ada", "Ada Holm", 0, 1),
    ("Ada Ada Holm", "Ada Holm", 0, 0.8),
    ("x", "y", 0, 0),
    ("", "Ada", 0, 0),
    ("A", "A.", 1, 1),
    ("35", "3.5", 0, 0),
    ("5", "-5", 0, 0),
    ("5", ".5", 0, 0),
    ("12", "1/2", 0, 0),
    ("1012", "10-12", 0, 0),
    ("1230", "12:30", 0, 0),
    ("15", "1,5", 0, 0),
    ("C", "C++", 0, 0),
    ("Jose\u0301", "Jos\u00e9", 1, 1),
    ("A", "A+", 0, 0),
    ("1000", "1,000", 1, 1),
    ("It is -5.", "It is -5", 1, 1),
    ("- Lund", "Lund", 1, 1),
    ("Smith & Sons", "Smith and Sons", 1, 1),
]


@pytest.mark.parametrize("prediction, reference, exact, f1", OTHERS)
def test_exact_match_and_f1_compare_what_is_meant(prediction, reference, exact, f1):
    question = {"direction": "all", "answer": reference}
    scores = evaluation.score(prediction, question)
    assert scores["exact"] == evaluation.exact_match(prediction, reference) == exact
    assert scores["f1"] == evaluation.f1(prediction, reference) == pytest.approx(f1)
    assert scores["rouge1"] == evaluation.rouge1_recall(prediction, reference)
    assert scores["length"] == len(prediction.split())


def test_a_reference_without_a_word_cannot_be_scored():
    assert evaluation.words("...") == [] and evaluation.words("The") == ["The"]
    with pytest.raises(UserError, match="no word"):
        evaluation.rouge1_recall("x", "...")


MATH = [  # (answer, strict, flexible) as lm-eval's gsm8k, version 3
    ("So 1,234.\n#### 1,234", 1, 1),
    ("#### 1234.", 1, 1),
    ("It is $1,234.", 0, 1),
    ("#### 1234\n#### 7", 1, 0),
    ("#### 7, no, 1234", 0, 1),
    ("####1234", 0, 1),
    ("-1234", 0, 0),
    ("", 0, 0),
    ("none", 0, 0),
    ("#### 5.,", 0, 0),
    ("#### 1234\nQuestion: And 7? #### 7", 1, 1),
    ("1234 or 1", 0, 0),
]


@pytest.mark.parametrize("answer, strict, flexible", MATH)
def test_math_answers_are_scored_as_lm_eval_does(answer, strict, flexible):
    reference = "1000+234 = <<1000+234=1234>>1,234\n#### 1,234"
    scores = evaluation.score(answer, {"direction": "math", "answer": reference})
    assert scores == {"strict": strict, "flexible": flexible, "length": len(answer.split())}


def test_scores_are_averaged_by_group_with_an_interval():
    usual = {"direction": "forward", "group": "g", "answer": "A"}
    predictions = [usual | {"rouge1": float(n < 80), "length": 2} for n in range(100)]
    predictions += [{"direction": "forward", "group": "g"}]  # without an answer
    predictions += [usual | {"direction": "math", "strict": 1.0}]
    scores = evaluation.average(predictions)
    assert list(scores) == ["forward", "forward/g", "math", "math/g"]
    assert scores["math"] == {"strict": 1, "n": 1, "interval": {"strict": [1, 1]}}
    interval = {"rouge1": pytest.approx([0.72, 0.88]), "length": [2, 2]}  # as recorded
    expected = {"rouge1": 0.8, "length": 2, "n": 100, "interval": interval}
    assert scores["forward"] == scores["forward/g"] == expected


# ----------------------------------------------------------------------------------- eval: report


def write_run(folder, method, seed, scores, ratio=(0.05, 0.95), metric="rouge1", **arguments):
    """A run with these scores at steps 0, 10, 20, ...; it is finished if there are three.

    A score is a number, that of forward questions, or {direction: number}."""
    usual = {"data": "bio:9", "model": "tiny", "paraphrase": "none", "epochs": 2, "lr": 1e-3}
    usual |= {"method": method, "seed": seed, "mask_ratio": ratio}
    evaluations = []
    for n, score in enumerate(scores):
        groups = {
            direction: {metric: x, "strict": x / 2, "n": 54, "interval": {}}
            for direction, x in (score if isinstance(score, dict) else {"forward": score}).items()
        }
        for group in groups.values():
            group["interval"] |= {metric: [group[metric] - 0.01, group[metric] + 0.01]}
            group["interval"] |= {"strict": [0, 1]}
        drift = n / 4 + seed / 10
        evaluations.append({"step": 10 * n, "scores": groups, "drift": drift})
    folder.mkdir()
    results = {"arguments": usual | arguments, "steps": 20, "evaluations": evaluations}
    evaluation.write_results(folder, results, [])
    return folder


@pytest.fixture
def runs(tmp_path):
    """Finished runs: seeds, settings, ratios, paraphrases, a custom method, directions."""
    low = [0.1, 0.2, 0.3]
    both = [{"forward": x, "backward": y} for x, y in ((0.02, 0.01), (0.9, 0.3), (0.8, 0.45))]
    late = write_run(tmp_path / "late", "masked", 0, low, data="late")
    results = data.read_json(late / "results.json")
    del results["evaluations"][0]  # the first evaluation is after step 0
    data.write_json(late / "results.json", results)
    return [
        write_run(tmp_path / "masked-1", "masked", 1, [0.0, 0.9, 0.8]),
        write_run(tmp_path / "masked-0", "masked", 0, [0.0, 0.9, 0.6]),
        write_run(tmp_path / "half", "masked", 0, [0.1, 0.2, 0.5], (0.5, 0.5)),
        write_run(tmp_path / "range", "masked", 0, [0.1, 0.2, 0.5], (0.2, 0.8)),
        write_run(tmp_path / "same", "sft", 0, [0.1, 0.2, 1], None, paraphrase="same"),
        write_run(tmp_path / "custom", "a method", 1, low),
        write_run(tmp_path / "slow", "sft", 0, [0.1, 0.2, 0.1], None, lr=0.01),
        write_run(tmp_path / "fast", "sft", 0, low, None, lr=0.03),
        write_run(tmp_path / "all", "sft", 0, [{"all": x} for x in low], None, data="facts"),
        late,
        write_run(
            *(tmp_path / "math", "sft", 0, [{"math": x} for x in low], None, "flexible"),
            data="gsm8k",
        ),
        write_run(tmp_path / "two", "masked", 0, both, data="nd"),
    ]


TABLES = """\
bio:9, 54 forward questions:

...|forward best|forward last|drift
sft, lr 0.01|none|0|.100|.200 [.19-.21]|.100 [.09-.11]|0.500
sft, lr 0.03|none|0|.100|.300 [.29-.31]|.300 [.29-.31]|0.500
sft|same|0|.100|1.000 [.99-1.01]|1.000 [.99-1.01]|0.500
masked|none|0,1|.000|.900 [.90-.90]|.700 [.60-.80]|0.550 [0.50-0.60]
masked 0.2-0.8|none|0|.100|.500 [.49-.51]|.500 [.49-.51]|0.500
masked 0.5|none|0|.100|.500 [.49-.51]|.500 [.49-.51]|0.500
a method|none|1|.100|.300 [.29-.31]|.300 [.29-.31]|0.600

facts, 54 questions:

...|all best|all last|drift
sft|none|0|.100|.300 [.29-.31]|.300 [.29-.31]|0.500

gsm8k, 54 math questions:

...|math flexible best|math flexible last|math strict best|math strict last|drift
sft|none|0|.100 / .050|.300 [.29-.31]|.300 [.29-.31]|.150 [.00-1.00]|.150 [.00-1.00]|0.500

late, 54 forward questions:

...|forward best|forward last|drift
masked|none|0|-|.300 [.29-.31]|.300 [.29-.31]|0.500

nd, 54 forward and 54 backward questions:

...|forward best|forward last|backward best|backward last|drift
masked|none|0|.020 / .010|.800 [.79-.81]|.800 [.79-.81]|.450 [.44-.46]|.450 [.44-.46]|0.500"""


def narrow(text):
    """The tables of a report without what aligns their columns."""
    text = re.sub("(?m)^---.*\n| +(?= )", "", text.partition("\n\n")[2].strip())
    return text.replace("method | paraphrase | seeds | before", "...").replace(" | ", "|")


def test_cells_are_aligned():
    table = evaluation.markdown([["a", "bb"], ["ccc", "d"]])
    assert table == "a   | bb\n--- | --\nccc | d"


def test_a_report_has_a_table_for_each_set_with_mean_and_spread(runs, tmp_path, monkeypatch):
    out = tmp_path / "report"
    monkeypatch.setattr(evaluation, "find_spec", lambda _: None)  # as without matplotlib
    monkeypatch.setattr(sys, "argv", ["eval.py", "--report", *map(str, runs), "--out", str(out)])
    evaluation.main()
    assert narrow((out / "report.md").read_text()) == TABLES
    masked = data.read_json(out / "report.json")[3]
    assert (masked["name"], masked["seeds"]) == ("masked", [0, 1])
    assert masked["settings"]["mask_ratio"] == [0.05, 0.95]
    middle = {"step": 10, "forward": [0.9] * 3, "drift": [pytest.approx(0.3), 0.25, 0.35]}
    assert masked["curve"][1] == masked["best"] == middle


def test_a_report_draws_curves_and_ratios(runs, tmp_path, monkeypatch):
    """Which lines are drawn, label and points, in which picture."""
    axes_class = pytest.importorskip("matplotlib.axes").Axes
    drawn = []
    plot = axes_class.plot

    def record(axes, x, y, *more, **how):
        drawn.append((how.get("label"), [*map(float, x)], [*map(float, y)]))
        return plot(axes, x, y, *more, **how)

    monkeypatch.setattr(axes_class, "plot", record)
    evaluation.report(runs, tmp_path)
    found = {path.name for path in tmp_path.glob("*.png")}
    bio = "bio-9-54-forward-questions.png"
    assert len(found) == 7 and not list(tmp_path.glob("*.part"))
    assert {f"curves-none-{bio}", f"curves-same-{bio}", f"ratios-none-{bio}"} <= found
    assert ("sft, lr 0.01", [0, 10, 20], [0.1, 0.2, 0.1]) in drawn
    assert ("masked", [0, 10, 20], pytest.approx([0.05, 0.3, 0.55])) in drawn  # drift
    assert ("masked", [0.05, 0.95], [0.9, 0.9]) in drawn  # the best, where ratios are random
    assert ("masked 0.5", [0.5, 0.5], [0.5, 0.5]) in drawn
    assert sum(label == "a method" for label, *_ in drawn) == 4  # two panels of both pictures
    drawn.clear()
    rows = evaluation.summarize([data.read_json(runs[-1] / "results.json")])
    panels = (tmp_path / "one.png", evaluation.draw_curves, [(1, 5.0), (2, 4.0)])
    evaluation.draw_panels(rows, *panels)
    assert len(drawn) == 4 and drawn[-1] == (None, [1, 2], [5, 4])
    assert panels[0].read_bytes().startswith(b"\x89PNG")


def test_a_run_that_cannot_be_reported_is_left_out_and_named(runs, tmp_path, capsys):
    text = (runs[0] / "results.json").read_text().replace('"epochs": 2', '"epochs": 3')
    bad = [
        write_run(tmp_path / "unfinished", "sft", 1, [0.1, 0.2]),
        write_run(tmp_path / "again", "masked", 1, [0.0, 0.9, 0.7]),  # is no third seed
        write_run(tmp_path / "unasked", "sft", 2, [{}, {}, {}]),
        tmp_path,  # there is no run in it
    ]
    texts = {"torn": '{"argum', "list": "[]", "old": text.replace("interval", "x")}
    texts["word"] = text.replace('"drift": 0.35', '"drift": "a"')
    for name, text in texts.items():
        bad.append(tmp_path / name)
        bad[-1].mkdir()
        (bad[-1] / "results.json").write_text(text)
    evaluation.report([*runs, *bad])
    printed = capsys.readouterr().out
    assert re.findall("^left out: (.*)/results.json: ", printed, re.M) == [*map(str, bad)]
    assert narrow(printed) == TABLES
    assert "no finished run" in forked(evaluation, "--report", bad[0], status=1)


def test_best_is_the_evaluation_with_the_highest_mean_of_the_directions(tmp_path):
    scores = [{"forward": x, "backward": y} for x, y in ((0.9, 0.0), (0.6, 0.5), (0.7, 0.1))]
    results = data.read_json(write_run(tmp_path / "run", "sft", 0, scores) / "results.json")
    assert (results["best"]["step"], results["last"]["step"]) == (10, 20)
    assert evaluation.reported_scores(results["best"]) == {"forward": 0.6, "backward": 0.5}
    assert evaluation.overall(results["best"]) == pytest.approx(0.55)
    assert evaluation.overall({"scores": {}}) == 0


def test_samples_are_some_of_each_direction_and_all_without_an_answer():
    predictions = [
        {"direction": direction, "question": f"Q{n}?", "answer": "A", "prediction": "P"}
        for n, direction in enumerate(["forward", "backward", "math", "all"] * 3)
    ]
    predictions.append({"direction": "all", "question": "Who?", "prediction": "P"})
    shown = evaluation.samples(predictions)
    assert re.findall(r"Q\d+", shown) == ["Q0", "Q1", "Q2", "Q3", "Q5", "Q6", "Q7"]
    assert shown.startswith("\nforward: Q0?\n  answered 'P', true is 'A'\n\nbackward")
    assert shown.endswith("\n\nall: Who?\n  answered 'P'")


# ---------------------------------------------------------------------------------- eval: command


@pytest.fixture
def run(tmp_path):
    """A copy of `tiny` with the results.json of a run."""
    folder = tmp_path / "run"
    shutil.copytree(HERE / "tiny", folder, ignore=shutil.ignore_patterns("*.py"))
    arguments = {"data": "bio:1", "paraphrase": "none", "seed": 3, "dtype": "bfloat16"}
    write(folder / "results.json", {"arguments": arguments})
    return folder


def test_a_run_is_asked_with_its_own_settings(run, tmp_path):
    out = tmp_path / "asked"
    printed = forked(evaluation, "--model", run, "--max-new-tokens", 8, "--out", out)
    assert f"{run} on bio:1, seed 3\n" in printed and "\nforward/birth city" in printed
    assert printed.count("answered") == 3
    predictions = jsonl(out / "preds.jsonl")
    questions = data.load("bio:1", seed=3).questions
    assert [p["question"] for p in predictions] == [q["question"] for q in questions]
    results = data.read_json(out / "results.json")
    expected = {"data": "bio:1", "paraphrase": "none", "seed": 3, "dtype": "bfloat16"}
    assert results["arguments"].items() >= expected.items()
    how = {"prompt": "chat, zero-shot", "decoding": "greedy", "max_new_tokens": 8}
    assert results["decoding"] == how
    assert results["last"]["scores"] == evaluation.average(predictions)
    again = forked(evaluation, "--model", run, "--seed", 4, "--max-new-tokens", 8)
    assert f"{run} on bio:1, seed 4\n" in again


def test_a_foreign_file_beside_a_model_is_named_and_not_used(run):
    flags = ("--model", run, "--max-new-tokens", 8, "--ask", "Who was born in Zurich?")
    answer = forked(evaluation, *flags)
    for content in ([1], {"score": 1}, {"arguments": {"seed": "x"}}):
        write(run / "results.json", content)
        note, *rest = forked(evaluation, *flags).splitlines(keepends=True)
        assert f"{run / 'results.json'}: " in note and "".join(rest) == answer
    (run / "results.json").write_text("{")
    assert f"{run / 'results.json'}: " in forked(evaluation, *flags)


def test_a_diffusion_model_is_asked_as_the_flags_say(tmp_path):
    flags = shlex.split("--model tiny-llada --data bio:1 --max-new-tokens 8 --block-length 8")
    for name, value in (("steps", 4), ("threshold", 0.9)):
        out = tmp_path / name
        forked(evaluation, *flags, f"--{name}", value, "--out", out)
        decoding = data.read_json(out / "results.json")["decoding"]
        assert decoding.items() >= {name: value, "block_length": 8, "max_new_tokens": 8}.items()
        assert len(jsonl(out / "preds.jsonl")) == 9


MISTAKES = {  # flags -> (exit status, what the message names)
    "--model tiny --steps 4": (1, "steps"),
    "--model tiny --max-new-tokens 0": (1, "--max-new-tokens"),
    "--model tiny --out taken": (1, "taken"),
    "--model tiny --data plain.jsonl": (1, "plain"),
    "--model tiny --data unscored.jsonl": (1, "unscored.jsonl, line 1"),
    "--model tiny --data long.jsonl": (1, "long.jsonl, line 1"),
    "--model tiny --ask Who --data bio": (1, "--data"),
    "--model tiny --ask Who --out new": (1, "--out"),
    "--model taken": (1, "taken"),
    "--model odd": (1, "odd/results.json"),
    "--model nowhere": (1, "nowhere"),
    "--model tiny --report taken": (2, "--report"),
    "--report taken --out taken/results.json": (1, "--report"),
    "--model tiny --paraphrase x": (2, "--paraphrase"),
    "": (2, "--model"),
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_in_asking_is_a_message(flags, run, tmp_path):
    write(tmp_path / "plain.jsonl", {"text": "Edda works in Oslo."})
    write(tmp_path / "unscored.jsonl", {"question": "Who?", "answer": "..."})
    write(tmp_path / "long.jsonl", {"question": "Who " + "really " * 600, "answer": "Ada"})
    (tmp_path / "taken").mkdir()
    write(tmp_path / "taken/results.json", {})
    odd = {"data": "bio:1", "paraphrase": "none", "seed": 0, "dtype": "odd"}
    write(run / "results.json", {"arguments": odd})
    run.rename(tmp_path / "odd")
    status, named = MISTAKES[flags]
    printed = forked(evaluation, *flags.split(), before=lambda: os.chdir(tmp_path), status=status)
    assert named in printed.splitlines()[-1]


def typed(text):
    """What to do before a command that reads `text` from its standard input."""

    def before():
        read, written = os.pipe()
        os.write(written, text)
        os.close(written)
        os.dup2(read, 0)

    return before


def test_own_questions_are_answered_one_by_one():
    first, second = "Who was born in Zurich?", "Who is Flora Ransom?"
    flags = ("--model", HERE / "tiny", "--max-new-tokens", 8, "--ask")
    answers = forked(evaluation, *flags, first, second)
    one, two = answers.splitlines()
    assert one and two and one != two
    lines = f"\ufeff{first}\r\n\n  \n{second}".encode()
    assert forked(evaluation, *flags, before=typed(lines)) == answers
    assert forked(evaluation, *flags, before=typed(b"")) == ""
    bad = typed(b"Who?\n\xff\n")
    assert "error: standard input: " in forked(evaluation, *flags, before=bad, status=1)
    assert "error: --ask" in forked(evaluation, *flags, "\udcff", status=1)
    shown, typing = os.openpty()
    os.write(shown, b"Who?\n\x04")
    printed = forked(evaluation, *flags, before=lambda: os.dup2(typing, 0))
    assert printed.count("> ") == 2 and len(printed.replace("> ", "").strip()) > 3


def test_two_processes_answer_what_one_does(tmp_path):
    flags = shlex.split("--model tiny --data bio:1 --max-new-tokens 4")
    for processes in (1, 2):
        command("eval.py", *flags, "--out", tmp_path / str(processes), processes=processes)
    one, two = (jsonl(tmp_path / name / "preds.jsonl") for name in "12")
    assert one == two and len(one) == 9


def test_scores_are_written_before_they_are_printed(run, tmp_path):
    def nothing_can_be_printed():
        def fail(*values):
            raise UserError("nobody reads")

        evaluation.print = fail

    out = tmp_path / "out"
    flags = ("--model", run, "--max-new-tokens", 4, "--out", out)
    forked(evaluation, *flags, before=nothing_can_be_printed, status=1)
    assert len(jsonl(out / "preds.jsonl")) == 9


def test_reports_and_wrong_flags_wait_for_no_torch():
    code = "import sys, eval; sys.argv = ['eval.py', '--report', 'x']; eval.main()"
    block = "import sys; sys.modules['maskft'] = sys.modules['llada'] = None; "
    done = subprocess.run(
        [sys.executable, "-c", block + code], cwd=HERE, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "error: --report" in done.stderr
