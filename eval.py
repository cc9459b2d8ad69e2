"""Closed-book question answering: ask, score, report.

    python eval.py --model out/bio-masked-1                    # the questions that run was trained for
    python eval.py --model tiny --data bio --seed 3            # any model directory, any questions
    python eval.py --report out/*/ --out report                # one table of many runs, and the paper's figures

Three scores of one answer against its reference, all between 0 and 1. ROUGE-1 recall, the paper's: the share of the
reference's distinct words that the answer has too; it rewards long answers, so the mean answer length stands beside it.
Exact match: the same words in the same order. F1: the harmonic mean of precision and recall over words with their counts.
All three first delete punctuation and function words, and keep case. Math problems have two others, 1 or 0 as the number that
the answer arrives at is right: strict reads it behind "####", flexible takes the last number there is.

preds.jsonl has a line a question:
    {"direction": "backward", "group": "name", "question": "Who was born in Lund ...?", "answer": "Ada Holm",
     "prediction": "Ada Holm", "rouge1": 1.0, "exact": 1.0, "f1": 1.0, "length": 2}
"""

import argparse
import json
import math
import re
import string
from collections import Counter
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import llada
import maskft

# ------------------------------------------------------------------------------------------------------------- metrics

STOP_WORDS = set("a of the and is are be to new on in at an for".split())
CONTRACTION = re.compile(r"(?i)\b(can(?=not)|gon(?=na)|wan(?=na)|gim(?=me)|lem(?=me)|got(?=ta))(not|na|me|ta)\b")
# what string.punctuation lacks and NLTK's tokenizer sets apart: quotation marks and dashes
APART = {ord(c): f" {c} " for c in "«“‘„»”’\u2012\u2013\u2014\u2015"}
DELETE = dict.fromkeys(map(ord, string.punctuation))


def words(text):
    """The scored words of a text, in order. NLTK's word_tokenize without NLTK: once ASCII punctuation is gone, all that is
    left of its rules are the quotation marks, the dashes and six contractions."""
    text = CONTRACTION.sub(r" \1 \2 ", text.translate(DELETE).translate(APART))
    return [word for word in text.split() if word.lower() not in STOP_WORDS]


def rouge1_recall(prediction, reference):
    """|words(prediction) & words(reference)| / |words(reference)|, over *sets* of case-sensitive words: the paper's score,
    as the `rouge` package counts after masked_arLLM's clean-up. An empty prediction scores 0."""
    gold, found = set(words(reference)), set(words(prediction))
    if not gold:
        raise data.UserError(f"the reference answer {reference!r} has no word to score")
    return len(gold & found) / len(gold)


def exact_match(prediction, reference):
    return float(words(prediction) == words(reference))


def f1(prediction, reference):
    """Harmonic mean of word precision and recall over multisets, as SQuAD has it."""
    found, gold = Counter(words(prediction)), Counter(words(reference))
    common = (found & gold).total()
    return 2 * common / (found.total() + gold.total()) if common else 0.0


def math_scores(prediction, reference):
    """{"strict": whether the number behind the first "#### " is the reference's, "flexible": whether the last number is},
    as lm-eval's task gsm8k, version 3, which stops answering where the next question begins."""
    def bare(text):
        for deleted in (",", r"\$", r"(?s).*#### ", r"\.$"):  # in this order
            text = re.sub(deleted, "", text)
        return text

    prediction = prediction.split("Question:")[0]
    found = {"strict": re.findall(r"#### (-?[0-9.,]+)", prediction)[:1],
             "flexible": re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", prediction)[-1:]}  # fmt: skip
    return {k: float([bare(number) for number in numbers] == [bare(reference)]) for k, numbers in found.items()}


METRICS = ("rouge1", "exact", "f1", "strict", "flexible", "length")


def score(prediction, question):
    """All scores of the answer to a question; `length` is its number of words, function words included."""
    reference, length = question["answer"], {"length": len(prediction.split())}
    if question["direction"] == "math":
        return math_scores(prediction, reference) | length
    return {"rouge1": rouge1_recall(prediction, reference), "exact": exact_match(prediction, reference),
            "f1": f1(prediction, reference)} | length  # fmt: skip


def average(predictions):
    """Scores by direction and by direction and group: {cell: {metric: mean, ..., "n", "interval": {metric: [low,
    high]}}}. Intervals hold 95 % of 1,000 means of as many questions, drawn with replacement as if those about one document
    had nothing in common: how much hangs on the questions. How much hangs on chance in training, only more seeds tell."""
    cells = {}
    for p in predictions:
        for cell in (p["direction"], f"{p['direction']}/{p['group']}"):
            cells.setdefault(cell, []).append(p)
    for cell, some in cells.items():
        metrics = [k for k in METRICS if k in some[0]]
        values = np.array([[p[k] for k in metrics] for p in some])  # (n, metrics)
        draws = np.random.default_rng(0).integers(len(some), size=(1000, len(some)))
        ends = np.quantile([values[draw].mean(0) for draw in draws], (0.025, 0.975), axis=0).T.tolist()
        cells[cell] = {**dict(zip(metrics, values.mean(0).tolist())), "n": len(some), "interval": dict(zip(metrics, ends))}
    return dict(sorted(cells.items()))


# ----------------------------------------------------------------------------------------------------------- answering

BATCH = 64  # questions answered together


def decoding(questions, causal, max_new_tokens=None, **given):
    """How answers are decoded, as results.json has it; the settings that are given overrule the usual ones."""
    tokens = max_new_tokens or max((data.ANSWER_TOKENS[q["direction"]] for q in questions), default=None)
    unmasking = {"decoding": "unmasking, low confidence, temperature 0", "steps": tokens, "block_length": 4, **given}
    if "threshold" in given:
        del unmasking["steps"]  # as many as it takes
    return {"prompt": "chat, zero-shot", **({"decoding": "greedy"} if causal else unmasking), "max_new_tokens": tokens}


def evaluate(answer, tokenizer, questions, max_new_tokens=None):
    """Ask every question, dealt out over the ranks; (scores, predictions), the same on every rank.

    answer       prompts (lists of ids), max_new_tokens -> answers (lists of ids)
    scores       {"forward": {"rouge1", "exact", "f1", "length", "n", "interval"}, "backward": ..., "forward/<group>": ...}
    predictions  one dict a question, in the order of the questions
    """
    longest = max_new_tokens or decoding(questions, causal=True)["max_new_tokens"]
    rank, world = maskft.rank(), maskft.world_size()
    prompts = [tokenizer.chat([{"role": "user", "content": q["question"]}]) for q in questions]
    # longest together: little padding, and the ranks get equal shares of short and long. All ranks get as many, should each
    # call be one for all of them: where that does not come out even, some are asked twice
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mine = [order[i % len(order)] for i in range(rank, math.ceil(len(order) / world) * world, world)]
    answered = {}
    for start in range(0, len(mine), BATCH):
        chunk = mine[start : start + BATCH]
        texts = [tokenizer.decode(ids).strip() for ids in answer([prompts[i] for i in chunk], max_new_tokens=longest)]
        answered |= {i: {**questions[i], "prediction": t, **score(t, questions[i])} for i, t in zip(chunk, texts)}
    shares = [answered] * world
    if world > 1:
        dist.all_gather_object(shares, answered)
    answered = {i: prediction for share in shares for i, prediction in share.items()}
    predictions = [answered[i] for i in range(len(questions))]
    return average(predictions), predictions


# -------------------------------------------------------------------------------------------------------------- report

# what reports call a score -> (direction of the questions, which of their metrics)
REPORTED = {"forward": ("forward", "rouge1"), "backward": ("backward", "rouge1"), "math flexible": ("math", "flexible"),
            "math strict": ("math", "strict")}  # fmt: skip
# method -> its colour in figures, in the order of reports
METHODS = {"sft": "C0", "raw": "C5", "reverse": "C2", "random": "C7", "masked": "C1", "llada": "C4", "pretrain": "C6"}
UNMASKED = ("sft", "raw", "reverse", "random")  # the methods that the mask ratio does not matter to
OTHERS = ("model", "epochs", "lr", "batch_size", "max_len", "dtype", "eval_at")  # named where they tell rows apart
LEGEND = """\
ROUGE-1 recall (math: share solved) before training, at a run's best evaluation and at its last. In brackets: of one
run the 95 % interval, of several the range over their seeds. A number behind a method is its mask ratio."""


def headlines(evaluation):
    """The scores of an evaluation that reports show: {"forward": 0.98, ...}."""
    scores = evaluation["scores"]
    return {name: scores[direction][metric] for name, (direction, metric) in REPORTED.items() if direction in scores}


def overall(evaluation):
    """The mean of the headlines: what `best` means."""
    return float(np.mean(list(headlines(evaluation).values()) or [0]))


def write_results(out, results, predictions):
    """results.json and preds.jsonl of a run, each replaced in one step."""
    done = results["evaluations"]
    summary = {"best": max(done, key=overall), "last": done[-1]} if done and done[-1]["scores"] else {}
    data.write_text(Path(out) / "results.json", json.dumps({**results, **summary}, indent=1) + "\n")
    data.write_text(Path(out) / "preds.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))


def summarize(runs):
    """A row for each setting, over the runs that differ in their seed alone: {"data", "paraphrase", "method", "mask_ratio",
    "model", ..., "name": "masked 0.5", "seeds": [0, 1, 2], "scores": {"forward": `over_seeds`, ...}}."""
    groups, rows = {}, []
    for run in runs:
        setting = {k: run["arguments"][k] for k in ("data", "paraphrase", "method", "mask_ratio", *OTHERS)}
        low, high = setting["mask_ratio"] = [0.05, 0.95] if setting["method"] in UNMASKED else list(setting["mask_ratio"])
        ratio = f" {low:g}" if low == high else f" {low:g}-{high:g}" if [low, high] != [0.05, 0.95] else ""
        groups.setdefault(json.dumps(setting | {"name": setting["method"] + ratio}), []).append(run)
    for setting, group in groups.items():
        done = [run["evaluations"] for run in group]
        scores = {name: over_seeds(done, name) for name in headlines(done[0][-1])}
        rows.append(json.loads(setting) | {"seeds": sorted(run["arguments"]["seed"] for run in group), "scores": scores})

    def place(row):
        method = [*METHODS, row["method"]].index(row["method"]), row["method"]  # those of one's own come last
        paraphrase = list(data.PARAPHRASES).index(row["paraphrase"])
        return *tables(row), is_fixed(row), *method, paraphrase, row["name"]

    rows.sort(key=place)
    for alike in [list(some) for _, some in groupby(rows, key=place)]:
        apart = [k for k in OTHERS if any(row[k] != alike[0][k] for row in alike)]
        for row in alike:
            row["name"] += "".join(f", {k} {row[k]}" for k in apart)
    return rows


def tables(row):
    """What is alike in the rows of one table."""
    return row["data"], list(row["scores"])


def is_fixed(row):
    return row["mask_ratio"][0] == row["mask_ratio"][1]


def over_seeds(runs, name):
    """A headline over the evaluations of several runs: {"n", "before", "best", "last": [mean, low, high], "curve":
    [[step, mean, low, high], ...]}, from low to high the range over the runs or, of one alone, its 95 % interval."""
    direction, metric = REPORTED[name]

    def spread(evaluations):
        cells = [evaluation["scores"][direction] for evaluation in evaluations]
        values = [cell[metric] for cell in cells]
        return [sum(values) / len(values), *(cells[0]["interval"][metric] if len(cells) == 1 else (min(values), max(values)))]

    curve = [[same_time[0]["step"], *spread(same_time)] for same_time in zip(*runs)]
    return {"n": runs[0][-1]["scores"][direction]["n"], "before": None if curve[0][0] else curve[0][1:],
            "best": spread([max(run, key=overall) for run in runs]), "last": curve[-1][1:], "curve": curve}  # fmt: skip


def table(rows):
    """What `summarize` gave as text that is Markdown too: a table for each data set, a line for each setting."""
    parts = []
    for (name, _), some in groupby([row for row in rows if row["scores"]], key=tables):
        some = list(some)
        asked = {REPORTED[headline][0]: cell["n"] for headline, cell in some[0]["scores"].items()}
        columns = [f"{headline} {which}" for headline in some[0]["scores"] for which in ("best", "last")]
        lines = [["method", "paraphrase", "seeds", "before", *columns]]
        for row in some:
            cells = row["scores"].values()
            before = " / ".join(f"{cell['before'][0]:.3f}" if cell["before"] else "-" for cell in cells)
            scores = ["{:.3f} [{:.2f}-{:.2f}]".format(*cell[which]) for cell in cells for which in ("best", "last")]
            scores = [score.replace("0.", ".") for score in (before, *scores)]  # as the paper has it, and to fit a line
            lines.append([row["name"], row["paraphrase"], ",".join(map(str, row["seeds"])), *scores])
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        parts += [f"{name}, {' and '.join(f'{n} {direction}' for direction, n in asked.items())} questions:",
                  "\n".join(" | ".join(map(str.ljust, line, widths)).rstrip() for line in lines)]  # fmt: skip
    return "\n\n".join([LEGEND, *parts]) if parts else "no questions, no scores"


def draw_panels(rows, path, draw):
    """A picture with a panel for each headline of these rows, in which `draw(axes, rows, headline)` draws; needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    asked = list(rows[0]["scores"])
    figure = Figure(figsize=(4.2 * len(asked), 3.2), layout="constrained")
    for axes, headline in zip(figure.subplots(1, len(asked), sharey=True, squeeze=False)[0], asked):
        draw(axes, rows, headline)
        axes.set(title=headline, ylim=(-0.03, 1.03))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel("share solved" if asked[0].startswith("math") else "ROUGE-1 recall")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False)
    figure.savefig(path, dpi=110)


def draw_curves(axes, rows, headline):
    for row in rows:
        steps, mean, low, high = zip(*row["scores"][headline]["curve"])
        (line,) = axes.plot(steps, mean, marker=".", color=METHODS.get(row["name"]), label=row["name"])
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("step")


def draw_bars(axes, rows, headline):
    """The last score of every setting as a bar with its spread, and a dot for the best one; groups by paraphrase."""
    names, groups = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "paraphrase"))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        some = [row for row in rows if row["name"] == name]
        x = [groups.index(row["paraphrase"]) + width * (number - (len(names) - 1) / 2) for row in some]
        mean, low, high = zip(*[row["scores"][headline]["last"] for row in some])
        axes.bar(x, mean, width, color=METHODS.get(name), label=name)
        axes.vlines(x, low, high, color="black", linewidth=1)
        axes.plot(x, [row["scores"][headline]["best"][0] for row in some], "k.")
    axes.set(xlim=(-0.5, len(groups) - 0.5), xticks=range(len(groups)), xticklabels=groups,
             xlabel="paraphrase (bar: last, dot: best)")  # fmt: skip


def draw_ratios(axes, rows, headline):
    """The best score against the mask ratio where it was fixed; dashed, that of a random ratio. The paper's figure 4."""
    for row in rows:
        if not is_fixed(row):
            mean, color = row["scores"][headline]["best"][0], METHODS.get(row["method"], "black")
            axes.axhline(mean, color=color, linestyle="--", label=f"{row['name']}, random ratio")
    for method, fixed in groupby(filter(is_fixed, rows), key=lambda row: row["method"]):
        ratios, mean, low, high = zip(*[(row["mask_ratio"][0], *row["scores"][headline]["best"]) for row in fixed])
        axes.plot(ratios, mean, "o-", color=METHODS.get(method, "black"), label=method)
        axes.vlines(ratios, low, high, color=METHODS.get(method, "black"))
    axes.set_xlabel("mask ratio")


def report(directories, out):
    """One table of many runs and, with `out`, report.md, report.json and figures; what cannot be reported is named."""
    runs = {}  # setting and seed -> results
    for path in (Path(directory) / "results.json" for directory in directories):
        try:
            run = data.read_json(path)
            if run["evaluations"][-1]["epoch"] != run["arguments"]["epochs"]:
                raise data.UserError(f"{path}: not finished")
            row = summarize([run])[0]
            if not row.pop("scores"):
                raise data.UserError(f"{path}: no questions were asked")
            if json.dumps(row) in runs:  # twice, it would pass for two seeds
                raise data.UserError(f"{path}: same settings and seed as a run before it")
            runs[json.dumps(row)] = run
        except data.UserError as error:
            print(f"left out: {error}")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            print(f"left out: {path}: not a training run of this version ({type(error).__name__}: {error})")
    if not runs:
        raise data.UserError("--report: no finished run with questions in these directories")
    rows = summarize(runs.values())
    text = table(rows)
    print(text)
    if out:
        data.write_text(Path(out) / "report.md", text + "\n")
        data.write_text(Path(out) / "report.json", json.dumps(rows, indent=1) + "\n")
    if out and find_spec("matplotlib"):
        for (name, asked), some in groupby(rows, key=tables):
            draw_all(list(some), Path(out), re.sub(r"[^\w.]+", "-", "-".join([name, *asked])) + ".png")


def draw_all(rows, out, end):
    """The figures of a data set. Fixed mask ratios have their own; they are in the others where there is nothing else."""
    usual = [row for row in rows if not is_fixed(row)] or rows
    draw_panels(usual, out / f"bars-{end}", draw_bars)
    for paraphrase in dict.fromkeys(row["paraphrase"] for row in rows):
        if curves := [row for row in usual if row["paraphrase"] == paraphrase]:
            draw_panels(curves, out / f"curves-{paraphrase}-{end}", draw_curves)
        ratios = [row for row in rows if row["paraphrase"] == paraphrase and row["method"] not in UNMASKED]
        if any(map(is_fixed, ratios)):
            draw_panels(ratios, out / f"ratios-{paraphrase}-{end}", draw_ratios)


def samples(predictions):
    """Three questions with their answers, as text: one forward, two backward where there are."""
    chosen = []
    for direction, n in {"forward": 1, "backward": 2, "math": 2}.items():
        chosen += [p for p in predictions if p["direction"] == direction][:n]
    shown = "\n{direction}: {question}\n  answered {prediction!r}, true is {answer!r}"
    return "\n".join(shown.format(**p) for p in chosen)


def score_table(scores):
    """Every cell of `average` as a line of text."""
    lines = [f"{'':32}{'n':>6}  mean [95 % interval]"]
    for cell, means in scores.items():
        values = [f"{k} {means[k]:.3f} [{low:.2f}-{high:.2f}]" for k, (low, high) in means["interval"].items()]
        lines.append(f"{cell:32}{means['n']:>6}  {'  '.join(values)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- main


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, what = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="directory, built-in name or hub id of the model to ask")
    what.add_argument("--report", nargs="+", metavar="DIR", help="ask nothing; one table of these runs, and with --out figures")
    add("--data", help="as for maskft.py, or world:PEOPLE, whom the built-in models know (default: that of the run, else bio)")
    add("--paraphrase", choices=data.PARAPHRASES, help="for a directory in the released layout (default: the run's, else none)")
    add("--seed", type=int, help="of the generated people (default: that of the run in --model, else 0)")
    add("--max-new-tokens", type=int, help="longest answer (default: 128, for math 256)")
    add("--block-length", type=int, help="diffusion models: tokens decoded together (default: 4)")
    add("--steps", type=int, help="diffusion models: forward passes for a whole answer (default: one a token)")
    add("--threshold", type=float, help="diffusion models: keep all tokens this probable at once; faster, approximate")
    add("--out", help="directory for results.json and preds.jsonl, or report.md, report.json and figures")
    return parser


def main():
    """Ask a model directory the questions of a data set and print the scores; or report finished runs."""
    args = arguments().parse_args()
    if args.out and (Path(args.out) / "results.json").exists():
        raise data.UserError(f"--out {args.out} has a results.json already: give another name")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise data.UserError(f"--max-new-tokens {args.max_new_tokens} is not above 0")
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    report(args.report, args.out) if args.report else ask(args)


def ask(args):
    """Ask the model, with the settings of its run where no flag gives others."""
    device, directory = maskft.start_processes(), maskft.find_model(args.model)
    path, trained = directory / "results.json", {"data": "bio", "paraphrase": "none", "seed": 0, "dtype": None}
    if path.is_file():
        trained |= data.read_json(path).get("arguments", {})
        if not (directory / "config.json").is_file():
            raise data.UserError(f"--model {directory}: a run that is not finished; go on with --resume {directory}")
    args.data, args.paraphrase = args.data or trained["data"], args.paraphrase or trained["paraphrase"]
    args.seed = trained["seed"] if args.seed is None else args.seed
    dataset = data.load(args.data, args.paraphrase, args.seed)
    if not dataset.questions:
        raise data.UserError(f"--data {dataset.name}: no questions to ask")
    model = maskft.load(directory, device, getattr(torch, trained["dtype"] or maskft.native_dtype(device)[0]))
    tokenizer, causal = data.load_tokenizer(directory), model.config.causal
    given = {flag: getattr(args, flag) for flag in ("steps", "block_length", "threshold") if getattr(args, flag) is not None}
    if causal and given:
        raise data.UserError(f"--{min(given).replace('_', '-')} is for diffusion models; {args.model} is an autoregressive one")
    answer = partial(maskft.answer if causal else llada.answer, model, tokenizer, **given)
    scores, predictions = evaluate(answer, tokenizer, dataset.questions, args.max_new_tokens)
    maskft.say(f"{args.model} on {dataset.name}, seed {args.seed}\n{score_table(scores)}\n{samples(predictions)}")
    if args.out and maskft.rank() == 0:
        how = decoding(dataset.questions, causal, args.max_new_tokens, **given)
        evaluations = [{"step": None, "scores": scores}]
        write_results(args.out, {"arguments": vars(args), "decoding": how, "evaluations": evaluations}, predictions)


if __name__ == "__main__":
    import eval as evaluation  # the module, not this __main__ copy of it

    maskft.entry_point(evaluation.main)
