"""Closed-book question answering: ask, score, report.

    python eval.py --model out/bio-masked-1           # the questions that run was trained for
    python eval.py --model tiny --data bio --seed 3   # any model directory, any questions
    python eval.py --model tiny --ask "Who ...?"      # a question of yours; without one: typed ones
    python eval.py --report out/*/ --out report       # one table of many runs, the paper's figures

Three scores compare an answer with its reference, all between 0 and 1. All three first delete
punctuation and function words, and keep case.
    rouge1  ROUGE-1 recall, the paper's: the share of the reference's distinct words that the answer
            has too. It rewards long answers, so the mean answer length stands beside it.
    exact   1 if the words are the same, in the same order, else 0.
    f1      the harmonic mean of precision and recall over words with their counts.
Math problems have two others, 1 if the number that the answer arrives at is right, else 0: `strict`
reads it behind "####", `flexible` takes the last number there is.

preds.jsonl has a line a question:
    {"direction": "backward", "group": "name", "question": "Who was born in Lund ...?",
     "answer": "Ada Holm", "prediction": "Ada Holm",
     "rouge1": 1.0, "exact": 1.0, "f1": 1.0, "length": 2}
A question without an answer is asked like the others and not scored.
"""

import argparse
import json
import re
import string
import sys
import unicodedata
from collections import Counter, namedtuple
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import numpy as np

import data
from data import UserError

# ---------------------------------------------------------------------------------------- metrics

STOP_WORDS = {
    "a",
    "of",
    "the",
    "and",
    "is",
    "are",
    "be",
    "to",
    "new",
    "on",
    "in",
    "at",
    "an",
    "for",
}
CONTRACTION = re.compile(
    r"(?i)\b(can(?=not)|gon(?=na)|wan(?=na)|gim(?=me)|lem(?=me)|got(?=ta))(not|na|me|ta)\b"
)
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
# what string.punctuation lacks and NLTK's tokenizer splits off: quotation marks and dashes
SPLIT_OFF = str.maketrans({c: f" {c} " for c in "«“‘„»”’\u2012\u2013\u2014\u2015"})


def words(text):
    """The scored words of a text, in order: NLTK's word_tokenize without NLTK.

    Once ASCII punctuation is gone, all that is left of its rules are the quotation marks, the
    dashes and six contractions. NFC: an accent may be a character of its own on one side only.
    """
    text = unicodedata.normalize("NFC", text)
    text = text.translate(WITHOUT_PUNCTUATION).translate(SPLIT_OFF)
    text = CONTRACTION.sub(r" \1 \2 ", text)
    return [word for word in text.split() if word.lower() not in STOP_WORDS]


def rouge1_recall(prediction, reference):
    """|words(prediction) & words(reference)| / |words(reference)|, over *sets* of words.

    The paper's score, as the `rouge` package counts after masked_arLLM's clean-up. An empty
    prediction scores 0; UserError for a reference without a word.
    """
    expected = set(words(reference))
    if not expected:
        raise UserError(f"the reference answer {reference!r} has no word to score")
    return len(expected & set(words(prediction))) / len(expected)


def exact_match(prediction, reference):
    """1.0 if both have the same words in the same order, else 0.0."""
    return float(words(prediction) == words(reference))


def f1(prediction, reference):
    """Harmonic mean of word precision and recall over multisets, as SQuAD has it."""
    found = Counter(words(prediction))
    expected = Counter(words(reference))
    common = (found & expected).total()
    return 2 * common / (found.total() + expected.total()) if common else 0.0


def math_scores(prediction, reference):
    """{"strict": is the number behind the first "#### " right, "flexible": is the last number}.

    As lm-eval's task gsm8k, version 3, which stops answering where the next question begins.
    """
    prediction = prediction.split("Question:")[0]
    strict = re.findall(r"#### (-?[0-9.,]+)", prediction)
    flexible = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", prediction)
    right = bare_number(reference)
    return {
        "strict": float(bool(strict) and bare_number(strict[0]) == right),
        "flexible": float(bool(flexible) and bare_number(flexible[-1]) == right),
    }


def bare_number(text):
    """What lm-eval compares: without commas, dollars, all before "#### " and a last full stop."""
    for deleted in (",", r"\$", r"(?s).*#### ", r"\.$"):  # in this order
        text = re.sub(deleted, "", text)
    return text


METRICS = ("rouge1", "exact", "f1", "strict", "flexible", "length")


def score(prediction, question):
    """All scores of the answer to a question; `length` is its number of words, all counted."""
    reference = question["answer"]
    if question["direction"] == "math":
        scores = math_scores(prediction, reference)
    else:
        scores = {
            "rouge1": rouge1_recall(prediction, reference),
            "exact": exact_match(prediction, reference),
            "f1": f1(prediction, reference),
        }
    return scores | {"length": len(prediction.split())}


def average(predictions):
    """Mean scores of each direction, "forward", and of each group in it, "forward/city".

    {"forward": {"rouge1": mean, ..., "n": questions, "interval": {"rouge1": [low, high], ...}}}
    Questions without an answer are in none.
    """
    groups = {}
    for prediction in predictions:
        if "answer" not in prediction:
            continue
        direction = prediction["direction"]
        for name in (direction, f"{direction}/{prediction['group']}"):
            groups.setdefault(name, []).append(prediction)
    return {name: average_group(group) for name, group in sorted(groups.items())}


def average_group(predictions):
    """{metric: mean, ..., "n", "interval": {metric: [low, high]}} of some predictions.

    Intervals hold 95 % of 1,000 means of as many questions, drawn with replacement as if those
    about one document had nothing in common: how much depends on the questions. How much depends
    on chance in training, only more seeds tell.
    """
    n = len(predictions)
    metrics = [metric for metric in METRICS if metric in predictions[0]]
    values = np.array([[p[metric] for metric in metrics] for p in predictions])  # (n, metrics)
    draws = np.random.default_rng(0).integers(n, size=(1000, n))
    means = [values[draw].mean(0) for draw in draws]
    ends = np.quantile(means, (0.025, 0.975), axis=0)  # (2, metrics)
    scores = dict(zip(metrics, values.mean(0).tolist(), strict=True))
    interval = dict(zip(metrics, ends.T.tolist(), strict=True))
    return {**scores, "n": n, "interval": interval}


# ----------------------------------------------------------------------------------------- report

# name of a score in reports -> (direction of the questions, metric)
REPORTED = {
    "forward": ("forward", "rouge1"),
    "backward": ("backward", "rouge1"),
    "math flexible": ("math", "flexible"),
    "math strict": ("math", "strict"),
    "all": ("all", "rouge1"),  # questions without a direction
}
# method -> its color in figures, in the order of reports; custom methods come last
COLORS = {
    "sft": "C0",
    "raw": "C5",
    "reverse": "C2",
    "random": "C7",
    "masked": "C1",
    "llada": "C4",
}
# settings that a row's name tells only where rows differ in them
OTHERS = (
    "model",
    "mlp_only",
    "rehearse",
    "epochs",
    "lr",
    "batch_size",
    "max_len",
    "dtype",
    "eval_at",
)
SETTINGS = ("data", "paraphrase", "method", "mask_ratio", *OTHERS)
# a line of a report, about the runs that differ in their seed alone: their settings, a name such as
# "masked 0.5", the seeds, of each reported score what `over_seeds` gives, and the curve of drift
Row = namedtuple("Row", [*SETTINGS, "name", "seeds", "scores", "drift"])
USUAL_RATIO = [0.05, 0.95]
LEGEND = """\
Numbers are ROUGE-1 recall (math: share solved). A number behind a method is its mask ratio.
Before is before training, best is a run's best evaluation, last the one after training.
Drift: by how many nats a token the model's own answers of before have become less likely.
In brackets: of one run the 95 % interval, of several the range over their seeds."""
INTERVAL = "{:.3f} [{:.2f}-{:.2f}]"  # mean, low, high


def reported_scores(evaluation):
    """The scores of an evaluation that reports show: {"forward": 0.98, ...}."""
    scores = evaluation["scores"]
    return {
        name: scores[direction][metric]
        for name, (direction, metric) in REPORTED.items()
        if direction in scores
    }


def overall(evaluation):
    """The mean of the reported scores: what `best` means."""
    return float(np.mean(list(reported_scores(evaluation).values()) or [0]))


def write_results(out, results, predictions):
    """results.json and preds.jsonl of a run in the directory `out`, each replaced atomically."""
    evaluations = results["evaluations"]
    if evaluations and evaluations[-1]["scores"]:
        best = max(evaluations, key=overall)
        results = {**results, "best": best, "last": evaluations[-1]}
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
    data.write_json(out / "results.json", results)
    data.write_text(out / "preds.jsonl", "".join(lines))


def summarize(runs):
    """A Row for each setting, over the runs that differ in their seed alone, in report order."""
    settings = distinct([setting_of(run) for run in runs])
    rows = [summary(s, [run for run in runs if setting_of(run) == s]) for s in settings]
    rows.sort(key=report_order)
    return [row for same_name in grouped(rows, report_order) for row in tell_apart(same_name)]


def setting_of(run, *more):
    return {name: run["arguments"][name] for name in (*SETTINGS, *more)}


def distinct(values):
    """The values without repetitions, in order; they need no hash."""
    return [value for i, value in enumerate(values) if value not in values[:i]]


def grouped(rows, key):
    """Lists of neighbors with the same key."""
    return [list(some) for _, some in groupby(rows, key=key)]


def summary(setting, runs):
    """The Row of the runs that have this setting."""
    evaluations = [run["evaluations"] for run in runs]
    return Row(
        **setting,
        name=setting["method"] + shown_ratio(setting["mask_ratio"]),
        seeds=sorted(run["arguments"]["seed"] for run in runs),
        scores={
            name: over_seeds(evaluations, name) for name in reported_scores(evaluations[0][-1])
        },
        drift=[
            [same_time[0]["step"], *mean_and_range([asked["drift"] for asked in same_time])]
            for same_time in zip(*evaluations, strict=False)
        ],
    )


def shown_ratio(mask_ratio):
    """What a mask ratio adds to a row's name: " 0.5", " 0.2-0.8", of the usual one or none ""."""
    if mask_ratio is None or list(mask_ratio) == USUAL_RATIO:
        return ""
    return " " + "-".join(f"{ratio:g}" for ratio in distinct(mask_ratio))


def report_order(row):
    """Table by table; fixed mask ratios last; then by method, paraphrase and name."""
    method = [*COLORS, row.method].index(row.method)  # custom methods come last
    paraphrase = list(data.PARAPHRASES).index(row.paraphrase)
    return *table_of(row), is_fixed(row), method, row.method, paraphrase, row.name


def table_of(row):
    """The table that a row stands in: data set, names of the scores."""
    return row.data, list(row.scores)


def is_fixed(row):
    """Whether every document had the same mask ratio; not so if nothing was masked."""
    return row.mask_ratio is not None and len(set(row.mask_ratio)) == 1


def tell_apart(rows):
    """Rows of one name, with the settings added to it that they differ in."""
    told = [name for name in OTHERS if len(distinct([getattr(row, name) for row in rows])) > 1]
    for row in rows:
        added = [f", {name} {getattr(row, name)}" for name in told]
        yield row._replace(name=row.name + "".join(added))


def over_seeds(runs, name):
    """A reported score over the evaluations of several runs that differ in their seed.

    {"n": questions, "before", "best", "last": [mean, low, high],
     "curve": [[step, mean, low, high], ...]}
    low to high is the range over the runs or, of one alone, its 95 % interval. "before" is None
    if the first evaluation was after step 0.
    """
    direction, metric = REPORTED[name]

    def spread(evaluations):
        groups = [evaluation["scores"][direction] for evaluation in evaluations]
        values = [group[metric] for group in groups]
        if len(groups) == 1:
            return [*values, *groups[0]["interval"][metric]]
        return mean_and_range(values)

    curve = [[same_time[0]["step"], *spread(same_time)] for same_time in zip(*runs, strict=False)]
    first_step, *first = curve[0]
    return {
        "n": runs[0][-1]["scores"][direction]["n"],
        "before": None if first_step else first,
        "best": spread([max(run, key=overall) for run in runs]),
        "last": curve[-1][1:],
        "curve": curve,
    }


def mean_and_range(values):
    return [sum(values) / len(values), min(values), max(values)]


def table(rows):
    """Rows of `summarize` as text that is Markdown too: a table for each data set."""
    scored = [row for row in rows if row.scores]
    if not scored:
        return "no questions, no scores"
    parts = [LEGEND]
    for some in grouped(scored, table_of):
        lines = [table_header(some[0]), *map(table_line, some)]
        parts += [table_title(some[0]), markdown(lines)]
    return "\n\n".join(parts)


def table_title(row):
    """bio:40, 240 forward and 120 backward questions:, or facts.jsonl, 12 questions:"""
    asked = {REPORTED[name][0]: result["n"] for name, result in row.scores.items()}
    counts = " and ".join(f"{n} {name}".removesuffix(" all") for name, n in asked.items())
    return f"{row.data}, {counts} questions:"


def table_header(row):
    columns = [f"{name} {which}" for name in row.scores for which in ("best", "last")]
    return ["method", "paraphrase", "seeds", "before", *columns, "drift"]


def table_line(row):
    """The cells of a row. Scores are written .983: as the paper has it, and to fit a line."""
    results = row.scores.values()
    before = [f"{result['before'][0]:.3f}" if result["before"] else "-" for result in results]
    after = [INTERVAL.format(*result[which]) for result in results for which in ("best", "last")]
    numbers = [number.replace("0.", ".") for number in (" / ".join(before), *after)]
    _, drift, *ends = row.drift[-1]
    kept = INTERVAL.format(drift, *ends) if len(row.seeds) > 1 else f"{drift:.3f}"
    return [row.name, row.paraphrase, ",".join(map(str, row.seeds)), *numbers, kept]


def markdown(lines):
    """Lines of cells as a table with aligned columns, the first one as its header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(" | ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def draw_panels(rows, path, draw, losses=None):
    """A picture with a panel for each score of these rows, drawn by `draw(axes, rows, name)`.

    And one for loss and drift where `losses` is given, (step, loss) pairs. Needs matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    names = list(rows[0].scores)
    count = len(names) + bool(losses)
    figure = Figure(figsize=(4.2 * count, 3.2), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=False):
        draw(axes, rows, name)
        axes.set(title=name, ylim=(-0.03, 1.03))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    if names:
        panels[0].set_ylabel("share solved" if names[0].startswith("math") else "ROUGE-1 recall")
    if losses:
        color = COLORS.get(rows[0].name)
        steps, drift, *_ = np.transpose(rows[0].drift)
        panels[-1].plot(*np.transpose(losses), label=rows[0].name, color=color)
        panels[-1].plot(steps, drift, "k.--")
        panels[-1].set(title="loss (dashed: drift)", xlabel="step")
    handles, labels = panels[0].get_legend_handles_labels()  # every panel has the same
    columns = min(len(labels), 6)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    part = Path(f"{path}.part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)  # a picture that has its name is whole


def draw_curves(axes, rows, name):
    """The score at every evaluation, a line a row."""
    for row in rows:
        steps, mean, low, high = np.transpose(row.scores[name]["curve"])
        (line,) = axes.plot(steps, mean, marker=".", color=COLORS.get(row.name), label=row.name)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("step")


def draw_bars(axes, rows, name):
    """The last score of a row as a bar with its spread, the best as a dot; by paraphrase."""
    labels = distinct([row.name for row in rows])
    paraphrases = distinct([row.paraphrase for row in rows])
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        some = [row for row in rows if row.name == label]
        x = np.array([paraphrases.index(row.paraphrase) for row in some]) + width * number
        mean, low, high = np.transpose([row.scores[name]["last"] for row in some])
        axes.bar(x, mean, width, color=COLORS.get(label), label=label)
        axes.vlines(x, low, high, color="black", linewidth=1)
        axes.plot(x, [row.scores[name]["best"][0] for row in some], "k.")
    middle = (0.8 - width) / 2  # of the bars of one paraphrase
    axes.set_xticks(np.arange(len(paraphrases)) + middle, paraphrases)
    axes.set_xlabel("paraphrase (bar: last, dot: best)")


def draw_ratios(axes, rows, name):
    """The best score against the mask ratio where it was fixed; dashed, that of a random ratio.

    The paper's figure 4.
    """
    for row in rows:
        if not is_fixed(row):
            mean = row.scores[name]["best"][0]
            label = f"{row.name}, random ratio"
            axes.axhline(mean, color=color_of(row), linestyle="--", label=label)
    for some in grouped([row for row in rows if is_fixed(row)], lambda row: row.method):
        points = [[row.mask_ratio[0], *row.scores[name]["best"]] for row in some]
        ratios, mean, low, high = np.transpose(points)
        axes.plot(ratios, mean, "o-", color=color_of(some[0]), label=some[0].method)
        axes.vlines(ratios, low, high, color=color_of(some[0]))
    axes.set_xlabel("mask ratio")


def color_of(row):
    return COLORS.get(row.method, "black")


def draw_all(rows, out):
    """The figures of one table.

    Fixed mask ratios have their own, and are in the others where there is nothing else.
    """
    end = re.sub(r"[^\w.]+", "-", "-".join([rows[0].data, *rows[0].scores])) + ".png"
    usual = [row for row in rows if not is_fixed(row)] or rows
    draw_panels(usual, out / f"bars-{end}", draw_bars)
    for paraphrase in distinct([row.paraphrase for row in rows]):
        some = [row for row in rows if row.paraphrase == paraphrase]
        curves = [row for row in some if row in usual]
        if curves:
            draw_panels(curves, out / f"curves-{paraphrase}-{end}", draw_curves)
        if any(map(is_fixed, some)):
            ratios = [row for row in some if row.mask_ratio]
            draw_panels(ratios, out / f"ratios-{paraphrase}-{end}", draw_ratios)


def read_runs(directories):
    """The finished runs in these directories; of any other it is printed why it is left out."""
    runs = []
    for directory in directories:
        if (Path(directory) / "report.json").exists():
            continue  # out/report, for one, is an earlier report
        try:
            runs.append(read_run(Path(directory) / "results.json", runs))
        except UserError as error:
            print(f"left out: {error}")
    return runs


def read_run(path, before):
    """The results of a finished run with questions that is none of those before."""
    run = data.read_json(path)
    with data.reading(path, "not a training run of this version"):
        if run["evaluations"][-1]["step"] != run["steps"]:
            raise UserError("not finished")
        if not summarize([run])[0].scores:  # and an error if anything is missing
            raise UserError("no questions were asked")
        if setting_of(run, "seed") in [setting_of(other, "seed") for other in before]:
            # twice, it would pass for two seeds
            raise UserError("same settings and seed as a run before it")
    return run


def report(directories, out):
    """Print one table of many runs; with `out`, write report.md, report.json and figures first."""
    runs = read_runs(directories)
    if not runs:
        raise UserError("--report: no finished run with questions in these directories")
    rows = summarize(runs)
    text = table(rows)
    if out:
        write_report(rows, text, Path(out))
    print(text)


def write_report(rows, text, out):
    data.write_text(out / "report.md", text + "\n")
    data.write_json(out / "report.json", [row._asdict() for row in rows])
    if find_spec("matplotlib"):
        for some in grouped(rows, table_of):
            draw_all(some, out)


def samples(predictions):
    """Some questions of each direction with their answers, and all without a true one, as text."""
    chosen = []
    for direction, n in {"forward": 1, "backward": 2, "math": 2, "all": 2}.items():
        scored = [p for p in predictions if "answer" in p and p["direction"] == direction]
        chosen += scored[:n]
    chosen += [p for p in predictions if "answer" not in p]
    lines = []
    for p in chosen:
        true = f", true is {p['answer']!r}" if "answer" in p else ""
        lines.append(f"\n{p['direction']}: {p['question']}\n  answered {p['prediction']!r}{true}")
    return "\n".join(lines)


def score_table(scores):
    """Every group of `average` as a line of text."""
    if not scores:
        return "no scores"
    lines = ["n".rjust(38) + "  mean [95 % interval]"]
    for name, group in scores.items():
        values = [
            f"{metric} " + INTERVAL.format(group[metric], *ends)
            for metric, ends in group["interval"].items()
        ]
        lines.append(f"{name:32}{group['n']:>6}  " + "  ".join(values))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- main


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="directory, built-in name or hub id of the model to ask")
    what.add_argument(
        "--report",
        nargs="+",
        metavar="DIR",
        help="ask nothing; one table of these runs, and with --out figures",
    )
    add = parser.add_argument
    add(
        "--data",
        help="as for maskft.py, or world:PEOPLE, whom the built-in models know "
        "(default: that of the run, else bio)",
    )
    add(
        "--ask",
        nargs="*",
        metavar="QUESTION",
        help="print the answers to these; to none, to the lines that are typed or piped in",
    )
    add(
        "--paraphrase",
        choices=data.PARAPHRASES,
        help="for a directory in the released layout (default: the run's, else none)",
    )
    add(
        "--seed",
        type=int,
        help="of the generated people (default: that of the run in --model, else 0)",
    )
    add("--max-new-tokens", type=int, help="longest answer (default: 128, for math 256)")
    add("--block-length", type=int, help="diffusion: tokens decoded together (default: 4)")
    add("--steps", type=int, help="diffusion: passes for a whole answer (default: one a token)")
    add(
        "--threshold",
        type=float,
        help="diffusion: keep all tokens this probable at once; faster, approximate",
    )
    add("--out", help="directory for results.json and preds.jsonl, or report and figures")
    return parser


def main():
    """Ask a model directory the questions of a data set and print the scores; or report runs."""
    import llada  # here, because both import this file
    import maskft

    def body():
        args = arguments().parse_args()
        prepare_out(args)
        if args.report:
            report(args.report, args.out)
            return
        device = maskft.start_processes()
        directory = maskft.find_model(args.model)
        dtype = settings_of_run(args, directory) or maskft.native_dtype(device)[0]
        tokenizer = data.load_tokenizer(directory)
        for note in tokenizer.notes:
            maskft.print0(note)
        context = maskft.read_config(directory).context
        if args.ask is None:
            dataset = questions_to_ask(args)
            maskft.check_questions(dataset.questions, tokenizer, context, args.max_new_tokens)
        model = maskft.load(directory, device, getattr(maskft.torch, dtype))
        causal = model.config.causal
        given = unmasking(args, causal)
        method = maskft.greedy_answer if causal else llada.answer
        answer = partial(method, model, tokenizer, **given)
        ask = partial(maskft.evaluate, answer, tokenizer, max_new_tokens=args.max_new_tokens)
        if args.ask is None:
            how = maskft.decoding(dataset.questions, causal, args.max_new_tokens, **given)
            score_dataset(args, dataset, ask, how)
            return
        for question in own_questions(args.ask):
            maskft.check_questions([question], tokenizer, context, args.max_new_tokens)
            _, (prediction,) = ask([question])
            maskft.print0(prediction["prediction"])

    maskft.entry_point(body)


def prepare_out(args):
    """Make the directory --out before any work; UserError for one that is in use."""
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens} is not above 0")
    if args.ask is not None and (args.data or args.out):
        raise UserError(
            "--ask prints answers to its own questions: give no --data, no --out with it"
        )
    if args.out:
        out = Path(args.out)
        if (out / "results.json").exists():
            raise UserError(f"--out {args.out} has a results.json already: give another name")
        out.mkdir(parents=True, exist_ok=True)


def settings_of_run(args, directory):
    """Set the flags nobody gave as in the run that made the model; returns its dtype or None."""
    trained = {"data": "bio", "paraphrase": "none", "seed": 0, "dtype": None}
    path = directory / "results.json"
    if path.is_file():
        trained |= data.read_json(path).get("arguments", {})
        if not (directory / "config.json").is_file():
            raise UserError(
                f"--model {directory}: a run that is not finished; go on with --resume {directory}"
            )
    for name in ("data", "paraphrase", "seed"):
        if getattr(args, name) is None:
            setattr(args, name, trained[name])
    return trained["dtype"]


def questions_to_ask(args):
    """The Dataset of --data; UserError if it has no questions."""
    import maskft

    dataset = data.load(args.data, args.paraphrase, args.seed)
    for note in dataset.notes:
        maskft.print0(note)
    if not dataset.questions:
        raise UserError(f"--data {dataset.name}: no questions to ask")
    return dataset


def unmasking(args, causal):
    """The flags for diffusion models that were given; UserError if the model is none."""
    flags = ("block_length", "steps", "threshold")
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    if causal and given:
        flag = min(given).replace("_", "-")
        raise UserError(f"--{flag} is for diffusion models; {args.model} is an autoregressive one")
    return given


def score_dataset(args, dataset, ask, how):
    """Ask all questions, print the scores and some answers; --out gets all, decoded so: `how`."""
    import maskft

    scores, predictions = ask(dataset.questions)
    if args.out and maskft.rank() == 0:
        results = {
            "arguments": vars(args),
            "decoding": how,
            "evaluations": [{"step": None, "scores": scores}],
        }
        write_results(Path(args.out), results, predictions)
    maskft.print0(f"{args.model} on {dataset.name}, seed {args.seed}")
    maskft.print0(f"{score_table(scores)}\n{samples(predictions)}")


def own_questions(texts):
    """The questions of --ask, or those typed or piped in where it has none."""
    where = "--ask" if texts else "standard input, line {}"
    for number, text in enumerate(texts or lines_of_input(), 1):
        if texts or text.strip():
            yield data.parse_question({"question": text.strip()}, where.format(number))


def lines_of_input():
    """The lines of the standard input, on every rank; with a prompt if it is a terminal."""
    import maskft

    line = [None]
    with open(0, encoding="utf-8-sig", closefd=False) as lines:
        while line[0] != "":
            if maskft.rank() == 0:
                line = [read_line(lines)]
            maskft.dist.broadcast_object_list(line)
            yield line[0]


def read_line(lines):
    if lines.isatty():
        print("> ", end="", file=sys.stderr)
    try:
        return lines.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 ({error.reason})") from None


if __name__ == "__main__":
    main()
