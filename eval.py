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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import llada
import maskft

# ------------------------------------------------------------------------------------------------------------- metrics

STOP_WORDS = set("a of the and is are be to new on in at an for".split())
CONTRACTION = re.compile(r"(?i)(?<!\S)(can(?=not)|gon(?=na)|wan(?=na)|gim(?=me)|lem(?=me)|got(?=ta))(not|na|me|ta)(?!\S)")
# what string.punctuation lacks and NLTK's tokenizer sets apart: quotation marks and dashes
APART = {ord(c): f" {c} " for c in "«“‘„»”’\u2012\u2013\u2014\u2015"}
DELETE = dict.fromkeys(map(ord, string.punctuation))


def words(text):
    """The scored words of a text, in order: punctuation deleted, NLTK-like tokens, function words dropped in any case.

    NLTK's word_tokenize without NLTK: once ASCII punctuation is gone, all that is left of its rules are the quotation
    marks, the dashes and six contractions.
    """
    text = CONTRACTION.sub(r"\1 \2", text.translate(DELETE).translate(APART))
    return [word for word in text.split() if word.lower() not in STOP_WORDS]


def rouge1_recall(prediction, reference):
    """|words(prediction) & words(reference)| / |words(reference)|, over *sets* of case-sensitive words: the paper's score.

    As the `rouge` package counts after masked_arLLM's clean-up. An empty prediction scores 0; a reference without a
    scored word is a mistake in the data and raises ValueError.
    """
    gold, found = set(words(reference)), set(words(prediction))
    if not gold:
        raise ValueError(f"the reference answer {reference!r} has no word to score")
    return len(gold & found) / len(gold)


def exact_match(prediction, reference):
    return float(words(prediction) == words(reference))


def f1(prediction, reference):
    """Harmonic mean of word precision and recall over multisets, as SQuAD has it."""
    found, gold = Counter(words(prediction)), Counter(words(reference))
    common = (found & gold).total()
    return 2 * common / (found.total() + gold.total()) if common else 0.0


def math_scores(prediction, reference):
    """{"strict": whether the number behind the first "#### " is the reference's, "flexible": whether the last number is}.

    As lm-eval's task gsm8k, version 3, which stops answering where the next question begins.
    """
    def bare(text):
        for deleted in (",", r"\$", r"(?s).*#### ", r"\.$"):  # in this order
            text = re.sub(deleted, "", text)
        return text

    prediction = prediction.split("Question:")[0]
    found = {"strict": re.findall(r"#### (-?[0-9.,]+)", prediction)[:1],
             "flexible": re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", prediction)[-1:]}  # fmt: skip
    return {k: float([bare(number) for number in numbers] == [bare(reference)]) for k, numbers in found.items()}


METRICS = ("rouge1", "exact", "f1", "strict", "flexible")
# what reports call a score -> (direction of the questions, which of their metrics)
REPORTED = {"forward": ("forward", "rouge1"), "backward": ("backward", "rouge1"), "math flexible": ("math", "flexible"),
            "math strict": ("math", "strict")}  # fmt: skip


def score(prediction, question):
    """All scores of the answer to a question; `length` is its number of words, function words included."""
    reference, length = question["answer"], {"length": len(prediction.split())}
    if question["direction"] == "math":
        return math_scores(prediction, reference) | length
    return {"rouge1": rouge1_recall(prediction, reference), "exact": exact_match(prediction, reference),
            "f1": f1(prediction, reference)} | length  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- answering

BATCH = 64  # questions answered together


def decoding(questions, causal, **given):
    """How answers are decoded, as results.json has it; the flags that are given overrule what is usual."""
    tokens = given.get("max_new_tokens") or max((data.ANSWER_TOKENS[q["direction"]] for q in questions), default=None)
    unmasking = {"decoding": "unmasking, low confidence, temperature 0", "steps": tokens, "block_length": 4}
    return {"prompt": "chat, zero-shot", **({"decoding": "greedy"} if causal else unmasking), "max_new_tokens": tokens, **given}


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
    shares = [answered]
    if world > 1:
        shares *= world
        dist.all_gather_object(shares, answered)
    answered = {i: prediction for share in shares for i, prediction in share.items()}
    predictions = [answered[i] for i in range(len(questions))]
    return average(predictions), predictions


def average(predictions):
    """Mean scores with their intervals, by direction and by direction and group, of predictions as `evaluate` returns them."""
    cells = {}
    for p in predictions:
        for cell in (p["direction"], f"{p['direction']}/{p['group']}"):
            cells.setdefault(cell, []).append(p)
    return {cell: mean_scores(ps) for cell, ps in sorted(cells.items())}


def mean_scores(predictions):
    """{metric: mean, ..., "length", "n", "interval": {metric: [low, high]}}: 95 % of 1,000 means of as many questions, drawn
    with replacement. They tell how much hangs on the questions; how much on chance in training, only more seeds do."""
    metrics = [k for k in METRICS if k in predictions[0]]
    values = np.array([[p[k] for k in metrics] for p in predictions])  # (n, metrics)
    draws = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    low, high = np.quantile([values[draw].mean(0) for draw in draws], (0.025, 0.975), axis=0).tolist()
    length = sum(p["length"] for p in predictions) / len(predictions)
    return dict(zip(metrics, values.mean(0).tolist()), length=length, n=len(predictions),
                interval={k: [a, b] for k, a, b in zip(metrics, low, high)})  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- report


def write_results(out, results, predictions):
    """results.json and preds.jsonl of a run, each replaced in one step."""
    done = results["evaluations"]
    summary = {"best": max(done, key=overall), "last": done[-1]} if done and done[-1]["scores"] else {}
    data.write_text(Path(out) / "results.json", json.dumps({**results, **summary}, indent=1) + "\n")
    data.write_text(Path(out) / "preds.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))


def headlines(evaluation):
    """The scores of an evaluation that reports show: {"forward": 0.98, ...}."""
    cells = {name: evaluation["scores"].get(direction) for name, (direction, _) in REPORTED.items()}
    return {name: cell[REPORTED[name][1]] for name, cell in cells.items() if cell}


def overall(evaluation):
    """The mean of the headlines: what `best` means."""
    return float(np.mean(list(headlines(evaluation).values()) or [0]))


SETTING = ("data", "model", "method", "paraphrase", "mask_ratio")  # reports show those of these that differ,
FINER = ("epochs", "lr", "batch_size", "max_len", "dtype", "eval_at")  # and of these, where runs are alike in the former


def summarize(runs):
    """A row for each setting and headline, over the runs that differ in their seed alone.

    {"method", ..., "asked": "backward", "runs": 3, "n": 240, "before", "best", "last": [mean, low, high],
     "curve": [[step, mean, low, high], ...]}, low and high the range over the runs or, of a single run, its 95 % interval;
    "before" is None where that was not evaluated.
    """
    groups, rows = {}, []
    for run in runs:
        setting = {k: run["arguments"][k] for k in (*SETTING, *FINER)}
        if setting["method"] not in MASKING:
            setting["mask_ratio"] = None
        groups.setdefault(json.dumps(setting), []).append(run["evaluations"])
    for setting, group in groups.items():
        for asked in headlines(group[0][-1]):
            cells = [[e["scores"][REPORTED[asked][0]] for e in done] for done in zip(*group)]
            curve = [[done[0]["step"], *spread(cell, asked)] for done, cell in zip(zip(*group), cells)]
            best = [max(done, key=overall)["scores"][REPORTED[asked][0]] for done in group]
            rows.append({**json.loads(setting), "asked": asked, "runs": len(group), "n": best[0]["n"],
                         "before": None if curve[0][0] else curve[0][1:], "best": spread(best, asked), "last": curve[-1][1:],
                         "curve": curve})  # fmt: skip
    return rows


MASKING = ("masked", "llada", "pretrain")  # the methods to which the mask ratio matters


def spread(cells, asked):
    metric = REPORTED[asked][1]
    values = [cell[metric] for cell in cells]
    return [sum(values) / len(values), *(cells[0]["interval"][metric] if len(cells) == 1 else (min(values), max(values)))]


def names_of(rows):
    """A dict of text for each row: the method, and of the rest of its setting what tells it from other rows."""
    def text(value):
        return "-" if value is None else "-".join(map(str, dict.fromkeys(value))) if isinstance(value, list) else str(value)

    texts = [{k: text(row[k]) for k in (*SETTING, *FINER)} for row in rows]
    coarse = [tuple(text[k] for k in SETTING) for text in texts]
    shown = [k for k in SETTING if k == "method" or len({text[k] for text in texts} - {"-"}) > 1]  # "-": does not matter
    shown += [k for k in FINER if len({(c, text[k]) for c, text in zip(coarse, texts)}) > len(set(coarse))]
    return [{k: text[k] for k in shown} for text in texts]


def table(runs, markdown=False):
    """`summarize` as text, for the terminal or in Markdown."""
    rows = summarize(runs)
    scores = [{k: "{:.3f} [{:.2f}-{:.2f}]".format(*row[k]) if row[k] else "-" for k in ("before", "best", "last")} for row in rows]
    rows = [name | {k: str(row[k]) for k in ("asked", "runs", "n")} | cells for name, row, cells in zip(names_of(rows), rows, scores)]
    lines = [list(row.values()) for row in [dict(zip(rows[0], rows[0])), *rows]] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() if not markdown else f"| {' | '.join(line)} |" for line in lines]
    legend = "ROUGE-1 recall (math: share solved), in brackets the 95 % interval, of several runs their range"
    return "\n".join([lines[0], "|---" * len(widths) + "|", *lines[1:]] if markdown else ["", legend, *lines])


def panels(rows, path, draw):
    """Save a picture with axes side by side, one for each headline, in which `draw(axes, its rows)` draws."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    asked = list(dict.fromkeys(row["asked"] for row in rows))
    figure = Figure(figsize=(4.5 * len(asked), 3.5), layout="constrained")
    named = [row | {"name": ", ".join(name.values())} for row, name in zip(rows, names_of(rows))]
    for axes, headline in zip(figure.subplots(1, len(asked), sharey=True, squeeze=False)[0], asked):
        draw(axes, [row for row in named if row["asked"] == headline])
        axes.set(title=headline, ylabel="accuracy" if headline.startswith("math") else "ROUGE-1 recall", ylim=(-0.03, 1.03))
    figure.savefig(path, dpi=130)


def plot(runs, path):
    """Scores against optimizer steps, a line a setting, into a picture; needs matplotlib."""
    panels(summarize(runs), path, draw_curves)


def draw_curves(axes, rows):
    for row in rows:
        steps, mean, low, high = zip(*row["curve"])
        axes.plot(steps, mean, marker=".", label=row["name"])
        axes.fill_between(steps, low, high, alpha=0.2)
    axes.set_xlabel("step")
    axes.legend()


def draw_bars(axes, rows):
    """The last score of every setting as a bar with its spread, and a dot for the best one."""
    for x, row in enumerate(rows):
        mean, low, high = row["last"]
        axes.bar(x, mean, color=f"C{x}")
        axes.vlines(x, low, high, color="k")
        axes.plot(x, row["best"][0], "k.")
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=30, ha="right")


def draw_ratios(axes, rows):
    """The best score against the mask ratio where it was fixed; dashed, that of a random ratio. The paper's figure 4."""
    for color, line in enumerate(dict.fromkeys((row["method"], row["paraphrase"]) for row in rows)):
        best = [(*row["mask_ratio"], row["best"][0]) for row in rows if (row["method"], row["paraphrase"]) == line]
        fixed = sorted((low, score) for low, high, score in best if low == high)
        axes.plot([ratio for ratio, _ in fixed], [score for _, score in fixed], f"C{color}o-", label=", ".join(line))
        for low, high, score in best:
            if low < high:
                axes.axhline(score, color=f"C{color}", linestyle="--", label=f"{', '.join(line)}, {low}-{high}")
    axes.set_xlabel("mask ratio")
    axes.legend()


def report(directories, out):
    """One table of many runs and, with `out`, report.md, report.json and figures; what is no finished run is named."""
    runs = []
    for directory in map(Path, directories):
        results = data.read_json(directory / "results.json") if (directory / "results.json").is_file() else {}
        if results.get("last") and "method" in results["arguments"] and (directory / "config.json").is_file():
            runs.append(results)
        else:
            print(f"{directory}: left out, no finished run with questions")
    if not runs:
        raise data.UserError(f"--report {' '.join(directories)}: no finished run with questions among them")
    print(table(runs))
    if out:
        data.write_text(Path(out) / "report.md", table(runs, markdown=True) + "\n")
        data.write_text(Path(out) / "report.json", json.dumps(summarize(runs), indent=1) + "\n")
        for name in {run["arguments"]["data"] for run in runs} if find_spec("matplotlib") else ():
            chosen, end = [run for run in runs if run["arguments"]["data"] == name], f"{Path(name).name.replace(':', '-')}.png"
            plot(chosen, Path(out) / f"curves-{end}")
            panels(summarize(chosen), Path(out) / f"bars-{end}", draw_bars)
            masking = [row for row in summarize(chosen) if row["method"] in MASKING]
            if len({tuple(row["mask_ratio"]) for row in masking}) > 1:
                panels(masking, Path(out) / f"ratios-{end}", draw_ratios)


def samples(predictions):
    """Three questions with their answers, as text: one forward, two backward where there are."""
    chosen = [p for d, n in (("forward", 1), ("backward", 2), ("math", 2)) for p in [q for q in predictions if q["direction"] == d][:n]]
    shown = "\n{direction}: {question}\n  answered {prediction!r}, true is {answer!r}"
    return "\n".join(shown.format(**p) for p in chosen)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="directory, built-in name or hub id of the model to ask")
    add("--data", help="as for maskft.py (default: what the run in --model learned, else bio)")
    add("--paraphrase", choices=data.PARAPHRASES, help="for a directory in the released layout (default: the run's, else none)")
    add("--seed", type=int, help="of the generated people (default: that of the run in --model, else 0)")
    add("--max-new-tokens", type=int, help="longest answer (default: 128, for math 256)")
    add("--block-length", type=int, help="diffusion models: tokens decoded together (default: 4)")
    add("--steps", type=int, help="diffusion models: forward passes for a whole answer (default: one a token)")
    add("--threshold", type=float, help="diffusion models: keep all tokens this probable at once; faster, approximate")
    add("--report", nargs="+", metavar="DIR", help="ask nothing; one table of these runs, and with --out figures")
    add("--out", help="directory for results.json and preds.jsonl, or report.md, report.json and figures")
    return parser


def main():
    """Ask a model directory the questions of a data set and print the scores; or report finished runs."""
    args = arguments().parse_args()
    if args.out and (Path(args.out) / "results.json").exists():
        raise data.UserError(f"--out {args.out} has a results.json already: give another name")
    if bool(args.model) == bool(args.report):
        raise data.UserError("give either --model to ask a model, or --report to compare runs")
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.report:
        return report(args.report, args.out)
    device, directory = maskft.start_processes(), maskft.find_model(args.model)
    run = directory / "results.json"
    trained = data.read_json(run)["arguments"] if run.is_file() else {"data": "bio", "seed": 0, "paraphrase": "none"}
    seed = trained["seed"] if args.seed is None else args.seed
    dataset = data.load(args.data or trained["data"], args.paraphrase or trained["paraphrase"], seed)
    if not dataset.questions:
        raise data.UserError(f"--data {dataset.name}: no questions to ask")
    dtype = getattr(torch, trained.get("dtype") or maskft.native_dtype(device)[0])
    model, tokenizer = maskft.load(directory, device, dtype), data.load_tokenizer(directory)
    scores, predictions = evaluate(answerer(args, model, tokenizer), tokenizer, dataset.questions, args.max_new_tokens)
    maskft.say(f"{args.model} on {dataset.name}, seed {seed}\n{score_table(scores)}\n{samples(predictions)}")
    if args.out and maskft.rank() == 0:
        given = {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}
        results = {"arguments": vars(args), "decoding": decoding(dataset.questions, model.config.causal, **given, **unmasking(args)),
                   "evaluations": [{"step": None, "scores": scores}]}  # fmt: skip
        write_results(args.out, results, predictions)


def unmasking(args):
    """The flags for diffusion models that were given."""
    flags = {"steps": args.steps, "block_length": args.block_length, "threshold": args.threshold}
    return {name: value for name, value in flags.items() if value is not None}


def answerer(args, model, tokenizer):
    """prompts -> answers with the settings of the flags, greedily or by unmasking; UserError for a flag of the other kind."""
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise data.UserError(f"--max-new-tokens {args.max_new_tokens} is not above 0")
    given = unmasking(args)
    if model.config.causal and given:
        raise data.UserError(f"--{min(given).replace('_', '-')} is for diffusion models; {args.model} is an autoregressive one")
    kind = maskft if model.config.causal else llada
    return partial(kind.answer, model, tokenizer, **given)


def score_table(scores):
    """Every cell of `average` as a line of text."""
    lines = []
    for cell, means in scores.items():
        values = [f"{k} {means[k]:.3f} [{low:.2f}-{high:.2f}]" for k, (low, high) in means["interval"].items()]
        lines.append(f"{cell:32}{means['n']:>6}  {'  '.join(values)}  words {means['length']:.1f}")
    return "\n".join([f"{'':32}{'n':>6}  mean [95 % interval]", *lines])


if __name__ == "__main__":
    import eval as evaluation  # the module, not this __main__ copy of it

    maskft.entry_point(evaluation.main)
