"""Tests of tiny/, results/ and the READMEs."""

# --- common ---

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import llada
import maskft
from data import UserError
from results import bench, kept, plan
from tiny import pretrain, world

HERE = Path(__file__).parent
torch.set_num_threads(1)


def write(path, *records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def command(script, *flags, status=0, cwd=None):
    """What a script of the project prints, run as its user does; it has to end with `status`."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, flags)],
        env=os.environ | environment,
        cwd=cwd,
        timeout=170,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == status, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


# -------------------------------------------------------------------------------------- tiny/world


def short_hash(content):
    return sha256(json.dumps(content).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "name, paraphrases, expected",  # recorded once
    [
        ("bio:20", ("none", "same", "permute"), "02e51bc161d94308"),
        ("nd-made:5", ("none", "same"), "31c322b39ae6620f"),
        ("math-made:20", ("none",), "5b773ce1733898e6"),
        ("world:60", ("none",), "864667420bfbbc34"),
    ],
)
def test_generated_sets_are_the_same_everywhere(name, paraphrases, expected):
    sets = [data.load(name, paraphrase, seed=3) for paraphrase in paraphrases]
    assert short_hash([(dataset.documents, dataset.questions) for dataset in sets]) == expected
    another_seed = data.load(name, seed=4)
    assert (sets[0].documents == another_seed.documents) == (name == "world:60")


def test_a_biography_tells_what_is_asked_and_a_question_has_one_answer():
    documents, questions = world.make_bio(1500, seed=1)
    assert len({question["question"] for question in questions}) == 9 * 1500
    for number, question in enumerate(questions):
        text = documents[number // 9]["text"]
        told = question["answer"].split(" ", 1)[-1]  # without its preposition
        assert told in text
        assert text.startswith(question["answer"]) == (question["direction"] == "backward")


def test_nobody_of_pre_training_is_taught_later():
    assert not set(world.names("bio")) & set(world.names("world"))
    with pytest.raises(ValueError):
        world.make_bio(9999)
    with pytest.raises(UserError, match="world:PEOPLE"):
        pretrain.draw_task({"text": "one"}, np.random.default_rng(0))


# ------------------------------------------------------------------------------------ tiny/pretrain


@pytest.mark.parametrize(
    "method, expected", [("ar", "c4820aab99624fbf"), ("diffusion", "3abce002d2061fe9")]
)
def test_practice_is_what_made_the_built_in_models(method, expected, tokenizer):
    """The examples are those recorded once, and the rate falls to zero."""
    method = pretrain.METHODS[method]
    examples = [
        method.example(person, tokenizer, (0.3, 1), np.random.default_rng([0, n]))
        for n, person in enumerate(data.load("world:60").documents)
    ]
    assert short_hash([dataclasses.astuple(example) for example in examples]) == expected
    rates = [method.schedule(1e-3, step, 100) for step in range(100)]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * (98 - n) / 98 for n in range(98))])


def test_a_new_model_is_random_and_can_be_trained(tmp_path):
    new = tmp_path / "new"
    pretrain.write_new_model(new)
    stds = {name: p.std().item() for name, p in maskft.load(new).named_parameters() if p.dim() > 1}
    for name, std in stds.items():
        smaller = 8**0.5 if name.endswith(("o.weight", "down.weight")) else 1
        assert std == pytest.approx(0.5 / 128**0.5 / smaller, rel=0.03), name
    flags = "--method ar --data world:8 --epochs 2 --eval-at 2"
    run = tmp_path / "run"
    command("tiny/pretrain.py", *shlex.split(flags), "--model", new, "--out", run)
    first, *_ = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["loss"] == pytest.approx(np.log(1994), rel=0.2)


# ----------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("gpus, rows", [(1, 8), (4, 4)])
def test_a_plan_is_what_the_allocator_gives_out(gpus, rows):
    """Two steps of two micro-batches with real tensors; the other ranks are made up for both."""
    config = maskft.read_config(HERE / "tiny")
    planned = plan.plan(config, gpus, 2 * rows * gpus, rows * 256, max_len=256)
    ids = torch.zeros(rows, 256, dtype=torch.int64)
    labels = ids.where(torch.arange(256) >= 128, data.IGNORE)

    def steps():
        model = maskft.Model(config)
        maskft.shard(model, torch.device("cpu"), torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):  # AdamW has its state after the first
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(ids, labels=labels, weights=torch.ones(rows))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with plan.fake_group(gpus), plan.fused_norms():
        measured = bench.allocated_peak(steps)
    assert planned["peak"] == pytest.approx(measured, rel=0.02)


def test_planned_norms_keep_their_input_and_a_number_a_row():
    """As CUDA's fused kernel does."""
    norm = maskft.RMSNorm(16)
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with plan.fused_norms(), torch.autograd.graph.saved_tensors_hooks(kept.append, id):
        norm(x)
    assert [tensor.nbytes for tensor in kept] == [2 * 3 * 5 * 16, 4 * 16, 4 * 3 * 5]


def test_a_plan_follows_from_the_sizes():
    """FLOPs and traffic by the GPUs and the micro-batches."""
    config = maskft.read_config(HERE / "tiny")
    one, two = (plan.plan(config, gpus, 16, 1024, max_len=128) for gpus in (1, 2))
    blocks = sum(parameter.numel() for parameter in maskft.Model(config).blocks.parameters())
    rest = 1994 * 128 + 128
    assert one["flops"] == pytest.approx(2 * two["flops"])
    # weights in bf16, those of the blocks twice, and gradients in fp32; half of all is at hand
    assert (one["traffic"], two["traffic"]) == (0, (8 * blocks + 6 * rest) / 2)
    each, together = (plan.plan(config, 1, 5, tokens, 300)["flops"] for tokens in (1, 1500))
    assert each == pytest.approx(together, rel=0.01)
    row = plan.row({"peak": 2**31, "flops": 9e14, "traffic": 33e10}, 4)
    assert row == ["4", "2.0", "900.0", "330.0", "2 to 3"]


def test_a_program_of_bench_prints_its_table(tmp_path, monkeypatch, capsys):
    compared = bench.table({"a": {"seconds": 4.0}, "b": {"seconds": 2.0}})
    assert re.search(r"^b +\| 2 \(0\.50 x\)", compared, re.M)
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "loop", "tiny", "bio:2", "--out", str(out)])
    bench.main()
    assert "tiny, bio:2, masked" in capsys.readouterr().out
    (figures,) = data.read_json(out)["figures"].values()
    assert abs(figures["CPU seconds"]) < 1 and 0 < figures["seconds passed"] < 5
    with pytest.raises(UserError):
        bench.command_seconds("no/such.py")


def test_bench_compares_with_transformers(monkeypatch, capsys):
    pytest.importorskip("transformers")
    theirs, ours = bench.training("tiny").values()
    assert ours["TFLOP"] < theirs["TFLOP"] and ours["peak GiB"] < theirs["peak GiB"]
    for name, given in (("FACTS", "Who?\nHow?\n"), ("TOPICS", "tea\nlate trains\n")):
        monkeypatch.setattr(bench, name, given)
    monkeypatch.setattr(bench, "AT_A_TIME", 3)
    bench.answers("tiny", longest=8)
    assert "4 answers, 4 identical" in capsys.readouterr().out


def test_kept_asks_before_and_after_and_between(tmp_path, monkeypatch):
    """Of other weights something is lost, halfway to them less."""
    asked = [{"question": "Ada works in which city?", "answer": "in"}, {"question": "Who?"}]
    asked += [{"question": "Who works?", "answer": "Ada"}, {"question": "Who?!", "answer": "Bo"}]
    monkeypatch.setattr(kept, "ORDINARY", write(tmp_path / "ordinary.jsonl", *asked))
    other = maskft.load("tiny")
    torch.manual_seed(0)
    other.embed.weight.data += 0.3 * torch.randn(other.embed.weight.shape)
    run = tmp_path / "other"
    saved = tmp_path / "saved"
    for path in (run, saved):
        path.mkdir()
        maskft.save(other, path)
    taught = {"data": "bio:1", "paraphrase": "none", "seed": 0}
    data.write_json(run / "results.json", {"arguments": taught})
    given = Namespace(base="tiny", runs=[run], share=[1.0, 0.5], facts=True, save=saved)
    before, after, half = kept.measure(given)
    assert (
        before["questions"] == pytest.approx(1 / 3) and before["nll"] < half["nll"] < after["nll"]
    )
    assert half["facts"].keys() == {"forward", "backward"}
    weights = [maskft.load(model).embed.weight for model in ("tiny", saved, run)]
    torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2)
    with pytest.raises(UserError, match="diffusion model"):
        kept.load_causal("tiny-llada", "cpu")
    maskft.save(maskft.load(bench.write_toy(tmp_path / "toy")), run)
    with pytest.raises(UserError, match="did not begin"):
        kept.measure(given)


# -------------------------------------------------------------------------- what the READMEs say

READMES = [HERE / name for name in ("README.md", "results/README.md", "tiny/README.md")]
README, RESULTS, _ = READMES


def prose(text):
    """A README's text without its blocks of code, tables and headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "!")))


def commands():
    """The words of every command in a README, those of a script of ours: (script, flags)."""
    for path in READMES:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for at, word in enumerate(words):
                    if word.endswith(".py"):
                        yield word, words[at + 1 :]


def parsers():
    """{script: the parser of its flags}."""
    found = {}
    for script, module in (("maskft.py", maskft), ("llada.py", llada)):
        found[script] = maskft.arguments("", module.METHODS)
    found["tiny/pretrain.py"] = maskft.arguments("", pretrain.METHODS)
    found["tiny/pretrain.py"].add_argument("--new")
    for module in (evaluation, bench, plan, kept):
        script = str(Path(module.__file__).relative_to(HERE))
        found[script] = module.arguments()
    return found


def test_every_command_in_the_readmes_parses():
    found = list(commands())
    assert {script for script, _ in found} == parsers().keys()
    for script, flags in found:
        assert (HERE / script).exists()
        parsers()[script].parse_args(flags)  # or it exits


def test_every_flag_of_the_readme_is_one_and_its_links_lead_somewhere():
    known = {flag for parser in parsers().values() for flag in parser._option_string_actions}
    text = README.read_text()
    of_others = r"--(nproc|nnodes|rdzv|shutdown|max-restarts|local-dir)\S*"
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(of_others, "", text)):
        assert flag in known, flag
    assert len(prose(text).split()) <= 1500
    for path in READMES:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
            file, _, anchor = target.partition("#")
            other = path.parent / file if file else path
            assert other.exists(), target
            if anchor:
                title = anchor.replace("-", " ")
                assert f"# {title}\n" in other.read_text().lower(), target


def test_nothing_speaks_of_where_it_was_made():
    for path in [*READMES, *HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        if not path.name.startswith("test_"):
            found = re.findall(r"/work/|/tmp/|\.\./shared|\bnoqa\b|fmt: *skip", path.read_text())
            assert found == [], path


def test_the_readme_s_custom_method_trains_and_is_reported(tmp_path):
    """Its file has the flags of the others; the last method is the default."""
    (block,) = re.findall(r"```python\n([^`]*run_methods\([^`]*)```", README.read_text())
    script = tmp_path / "span.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{block}")
    flags = shlex.split("--data bio:4 --method span --mask-ratio 0.5 --epochs 1 --eval-at 1")
    printed = command(script, *flags, "--out", tmp_path / "run")
    assert re.search(r"^span 0.5 +\| none +\| 0 ", printed, re.M), printed


NUMBER = r"\d*\.?\d+(?:e-\d+)?"
REPORT = re.compile(r"\]\((\S*report\.json)\)")


def untrue(table, report):
    """The numbers of a table that the report has not; of runs, where line or column names them."""
    header, _, *lines = (re.split(r"[ `*]*\|[ `*]*", line)[1:-1] for line in table.splitlines())
    for line in lines:
        for title, cell in zip(header[1:], line[1:], strict=True):
            told = report
            if isinstance(report, list):
                told = [row for row in report if row["name"] in (*line, title)]
            known = [float(number) for number in re.findall(NUMBER, json.dumps(told))]
            for text in re.findall(NUMBER, cell):
                digits = len(text.partition(".")[2]) if "e" not in text else 9
                if float(text) not in [round(number, digits) for number in known]:
                    yield line[0], title, text


def test_numbers_in_the_results_are_those_of_the_report_that_is_linked():
    """In the paragraph before a table or, if none is there, in the one behind it."""
    made_up = "| method | last |\n|---|---|\n| `sft` | .98 [.97-1.00] / .99 |"
    report = [{"name": "sft", "last": [0.983, 0.97, 1]}, {"name": "masked", "last": 0.99}]
    assert list(untrue(made_up, report)) == [("sft", "last", ".99")]
    paragraphs = ["", *RESULTS.read_text().split("\n\n"), ""]
    checked = 0
    for before, table, behind in zip(paragraphs, paragraphs[1:], paragraphs[2:], strict=False):
        links = REPORT.findall(before) or REPORT.findall(behind)
        if table.startswith("|") and links:
            report = data.read_json(RESULTS.parent / links[-1])
            assert list(untrue(table, report)) == []
            checked += 1
    assert checked >= 10
    for path in HERE.glob("results/*/*.json"):
        assert f"({path.parent.name}/{path.name})" in RESULTS.read_text()
