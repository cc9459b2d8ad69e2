"""Ask a model, score its answers, compare runs.

    python eval.py --model out/bio-masked-1           # the questions that run was trained for
    python eval.py --model tiny --data bio --seed 3   # any model directory, any questions
    python eval.py --model tiny --ask "Who ...?"      # a question of yours; without one: typed ones
    python eval.py --report out/*/ --out report       # one table of many runs, the paper's figures

Three scores compare an answer with its reference, all between 0 and 1. All of them leave out
function words ("the", "of") and keep case.
    rouge1  ROUGE-1 recall, the paper's: the share of the reference's distinct words that the answer
            has too. It rewards long answers, so the mean answer length stands beside it.
    exact   1 if the words are the same, in the same order, else 0.
    f1      the harmonic mean of precision and recall over words with their counts.
Math problems have two others, 1 if the number that the answer arrives at is right, else 0: `strict`
reads it behind "####", `flexible` takes the last number there is.

With --out, preds.jsonl has a line a question:
    {"direction": "backward", "group": "name", "question": "Who was born in Lund ...?",
     "answer": "Ada Holm", "prediction": "Ada Holm",
     "rouge1": 1.0, "exact": 1.0, "f1": 1.0, "length": 2}
A question without an answer is asked like the others and not scored.
"""

import argparse
import os
import re
import shlex
import sys
import unicodedata
from collections import Counter, defaultdict, namedtuple
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

import data
from data import UserError

# ---------------------------------------------------------------------------------------- metrics

PUNCTUATION = re.compile(r"[!-/:-@[-`{-~]")  # all of ASCII's
# what NLTK's tokenizer splits: contractions, and from words the marks and dashes that ASCII lacks
SPLIT = re.compile(
    r"""(?xi)
    \b ( can(?=not) | gon(?=na) | wan(?=na) | gim(?=me) | lem(?=me) | got(?=ta) ) (not|na|me|ta) \b
    | ( [«“‘„»”’\u2012-\u2015] )
    """
)
# what changes no answer; it leaves 3.5, -5, 1/2, 10-12 and C++ as they are
SENTENCE_MARKS = re.compile(
    r"""(?x)
    [][(){}"'“”‘’„«»`.,:;!?*_&] (?!\d)    # marks, but for those in front of a digit: 3.5, 12:30
    | (?<!\d) [][(){}"'“”‘’„«»`,:;!?*_&]  # of these, all marks but for those in a number
    | (?<=\d) , (?=\d{3}\b)               # as in 1,000
    | (?<!\S) -+ (?![.\d])                # a dash that is no minus
    """
)


def words(text, deleted=PUNCTUATION):
    """The words of a text, in order: NLTK's word_tokenize without NLTK.

    Once ASCII punctuation is gone, all that is left of its rules are the quotation marks, the
    dashes and six contractions. NFC: an accent may be a character of its own on one side only.
    """
    text = deleted.sub("", unicodedata.normalize("NFC", text))
    return SPLIT.sub(r" \1 \2 \3 ", text).split()


FUNCTION_WORDS = words("a of the and is are be to on in at an for")
STOP_WORDS = [*FUNCTION_WORDS, "new"]  # masked_arLLM's, for the paper's score alone


def scored_words(prediction, reference, deleted=SENTENCE_MARKS, ignored=FUNCTION_WORDS):
    """The words of both without those ignored, or with them if the reference has no others."""
    both = [words(text, deleted) for text in (prediction, reference)]
    telling = [[word for word in some if word.lower() not in ignored] for some in both]
    return telling if telling[1] else both


def rouge1_recall(prediction, reference):
    """|words(prediction) & words(reference)| / |words(reference)|, over *sets* of words.

    The paper's score, as the `rouge` package counts after masked_arLLM's clean-up. An empty
    prediction scores 0; ZeroDivisionError for a reference without a word.
    """
    found, expected = map(set, scored_words(prediction, reference, PUNCTUATION, STOP_WORDS))
    return len(found & expected) / len(expected)


def exact_match(prediction, reference):
    """1.0 if both have the same words in the same order, else 0.0."""
    found, expected = scored_words(prediction, reference)
    return float(found == expected)


def f1(prediction, reference):
    """Harmonic mean of word precision and recall over multisets, as SQuAD has it.

    ZeroDivisionError where neither has a word.
    """
    found, expected = map(Counter, scored_words(prediction, reference))
    return 2 * (found & expected).total() / (found.total() + expected.total())


def number_is_right(pattern, place, prediction, reference):
    """1.0 if, of the numbers in the prediction, the one in this place is right, else 0.0.

    As lm-eval's task gsm8k, version 3, which stops answering where the next question begins.
    """
    found = re.findall(pattern, prediction.split("Question:")[0]) or [""]
    return float(bare_number(found[place]) == bare_number(reference))


def bare_number(text):
    """What lm-eval compares: without all before "#### ", commas, dollars and a last full stop."""
    return re.sub(r"(?s).*#### |[,$]|\.(?=[,$]*$)", "", text)


TEXT_METRICS = {"rouge1": rouge1_recall, "exact": exact_match, "f1": f1}
MATH_METRICS = {
    "strict": partial(number_is_right, r"#### (-?[0-9.,]+)", 0),  # the first behind "#### "
    "flexible": partial(number_is_right, r"-?[$0-9.,]{2,}|-?[0-9]+", -1),  # the last
}
METRICS = (*TEXT_METRICS, *MATH_METRICS, "length")


def scored(question, text):
    """The prediction that `text` is: the question with it and, if there is an answer to compare it
    with, with all scores; `length` is its number of words, all counted."""
    prediction = question | {"prediction": text}
    if "answer" in question:
        metrics = MATH_METRICS if question["direction"] == "math" else TEXT_METRICS
        for name, metric in metrics.items():
            prediction[name] = metric(text, question["answer"])
        prediction["length"] = len(text.split())
    return prediction


def average(predictions):
    """Mean scores of each direction, "forward", and of each group in it, "forward/city".

    {"forward": {"n": questions, "rouge1": [mean, low, high], ...}, ...}
    Questions without an answer are in none.
    """
    groups = defaultdict(list)
    for prediction in predictions:
        if "answer" in prediction:
            for name in ("{direction}", "{direction}/{group}"):
                groups[name.format(**prediction)].append(prediction)
    return {name: average_group(group) for name, group in sorted(groups.items())}


def average_group(predictions):
    """{"n": how many, metric: [mean, low, high], ...} of some predictions.

    From low to high are 95 % of 1,000 means of as many questions, drawn with replacement as if
    those about one document had nothing in common: how much depends on the questions. How much
    depends on chance in training, only more seeds tell.
    """
    n = len(predictions)
    group = {"n": n}
    for metric in METRICS:
        if metric in predictions[0]:
            values = [prediction[metric] for prediction in predictions]
            drawn = np.random.default_rng(0).choice(values, (1000, n))  # of each metric the same
            interval = np.quantile(drawn.mean(1), (0.025, 0.975)).tolist()
            group[metric] = [sum(values) / n, *interval]
    return group


# ----------------------------------------------------------------------------- report and figures

# name of a score in reports -> (direction of the questions, metric)
REPORTED = {
    "forward": ("forward", "rouge1"),
    "backward": ("backward", "rouge1"),
    "math flexible": ("math", "flexible"),
    "math strict": ("math", "strict"),
    "all": ("all", "rouge1"),  # questions without a direction
}
# A line of a report, about the runs that differ in their seed alone: their other settings, a name
# such as "masked, lr 0.01", the seeds, the title of its table, and what `over_seeds` gives.
Row = namedtuple("Row", "settings name seeds title best curve")
DIRECTIONS = {"forward": 1, "backward": 2, "math": 2, "all": 2}  # and samples shown of each
LEGEND = """\
Numbers are ROUGE-1 recall (math: share solved). Behind a method stands what its runs differ in.
Before is before training, best is a run's best evaluation, last the one after training.
Drift: how much less likely the model's own answers from before training became, in nats a token.
In brackets: of one run the 95 % interval, of several the range over their seeds."""
SAMPLE = "\n{direction}: {question}\n  answered {prediction!r}"
INTERVAL = "{:.3f} [{:.2f}-{:.2f}]"  # mean, low, high


def reported_scores(scores):
    """Those that reports show: {"forward": [mean, low, high], ...}."""
    return {
        name: scores[direction][metric]
        for name, (direction, metric) in REPORTED.items()
        if direction in scores
    }


def with_drift(evaluation):
    """The reported scores of an evaluation, and its drift in the same form."""
    return reported_scores(evaluation["scores"]) | {"drift": [evaluation["drift"]] * 3}


def in_a_line(evaluation):
    """What is told of an evaluation while a run goes on."""
    scores = [f"  {name} {mean:.3f}" for name, (mean, *_) in with_drift(evaluation).items()]
    return " epoch {epoch}  step {step}".format(**evaluation) + "".join(scores)


def best_of(evaluations):
    """The evaluation with the highest sum of reported means."""

    def total(evaluation):
        return sum(mean for mean, *_ in reported_scores(evaluation["scores"]).values())

    return max(evaluations, key=total)


def write_results(out, results, predictions):
    """results.json and preds.jsonl of a run in the directory `out`, each replaced atomically."""
    evaluations = results["evaluations"]
    data.write_json(
        out / "results.json",
        results | {"best": best_of(evaluations), "last": evaluations[-1]},
    )
    data.write_lines(out / "preds.jsonl", predictions)


def summarize(runs):
    """A Row for each setting, over the runs that differ in their seed alone; table by table."""
    groups = defaultdict(dict)
    for run in runs:
        settings = run["arguments"]
        groups[str(settings | {"seed": None})][settings["seed"]] = run  # the last of a seed
    rows = sorted(map(summary, groups.values()), key=place)
    return [row._replace(name=row.name + difference(row, rows)) for row in rows]


def place(row):
    """The table that a row stands in, and the figure."""
    return row.title, row.settings["paraphrase"]


def summary(runs):
    """The Row of runs, {seed: run}, that have the same settings."""
    first, *_ = runs.values()
    settings = first["arguments"] | {"seed": None}
    evaluations = [run["evaluations"] for run in runs.values()]
    return Row(
        settings,
        name=settings["method"],
        seeds=sorted(runs),
        title=table_title(settings["data"], evaluations[0][-1]["scores"]),
        best=over_seeds(*map(best_of, evaluations)),
        curve=list(map(over_seeds, *evaluations)),
    )


def table_title(name, scores):
    """bio:40, 240 forward and 120 backward questions, or facts.jsonl, 12 questions."""
    asked = [
        f"{scores[direction]['n']} {direction}".removesuffix(" all")
        for direction in DIRECTIONS
        if direction in scores
    ]
    return f"{Path(name).name}, {' and '.join(asked) or 'no'} questions"


def over_seeds(*evaluations):
    """{"step", "forward": [mean, low, high], ..., "drift": [mean, low, high]}.

    low to high is the range over the evaluations, one a seed; of a score of one alone, its 95 %
    interval.
    """
    seeds = [with_drift(evaluation) for evaluation in evaluations]
    merged = {"step": evaluations[0]["step"], **seeds[0]}
    if len(seeds) > 1:
        for name in seeds[0]:
            means = [scores[name][0] for scores in seeds]
            merged[name] = [np.mean(means), min(means), max(means)]
    return merged


def difference(row, rows):
    """The settings in which rows of the same name differ, as in ", lr 0.01"."""
    same = [
        other.settings for other in rows if other.name == row.name and place(other) == place(row)
    ]
    return "".join(
        f", {name} {value}"
        for name, value in row.settings.items()
        if any(settings.get(name) != value for settings in same)
    )


def table(rows):
    """Rows of `summarize` as text that is Markdown too: a table for each data set."""
    parts = [LEGEND]
    for title, same in groupby(rows, lambda row: row.title):
        parts += [f"{title}:", markdown([table_cells(row) for row in same])]
    return "\n\n".join(parts)


def table_cells(row):
    """{column: cell} of a row."""
    first = row.curve[0]
    last = row.curve[-1]
    before = []
    scores = {}
    for name in REPORTED:
        if name in last:
            before.append(shown("{:.3f}", first[name]))
            scores[f"{name} best"] = shown(INTERVAL, row.best[name])
            scores[f"{name} last"] = shown(INTERVAL, last[name])
    return {
        "method": row.name,
        "paraphrase": row.settings["paraphrase"],
        "seeds": ",".join(map(str, row.seeds)),
        "before": "-" if first["step"] else " / ".join(before),
        **scores,
        "drift": "{:.3f}".format(*last["drift"]),
    }


def shown(form, score):
    """A score as .983: as the paper has it, and to fit a line."""
    return form.format(*score).replace("0.", ".")


def markdown(rows):
    """Dicts {column: cell}, of the same columns, as a table in which these are aligned."""
    lines = [*rows[:1], *map(dict.values, rows)]  # of the first, its columns before its cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(" | ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def draw_curves(rows, path, xlabel="step"):
    """A picture of what is in the rows' curves, a panel each; where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError:
        return
    names = {}
    for asked in rows[0].curve:
        names |= asked
    del names["step"]
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), number)
        for row in rows:
            points = [(asked["step"], asked[name][0]) for asked in row.curve if name in asked]
            axes.plot(*np.transpose(points), marker=".", label=row.name)
        axes.set(title=name, xlabel=xlabel)
    # every panel has the same lines
    figure.legend(handles=axes.lines, loc="outside upper center", ncols=6)
    figure.savefig(path)


def draw_run(results, lines, path):
    """The picture of one run: its scores, its drift and the losses in its metrics.jsonl."""
    (row,) = summarize([results])
    for line in lines:
        row.curve.append({"step": line["step"], "loss": [line["loss"]]})
    draw_curves([row], path)


def draw_all(rows, out):
    """The figures of a report: curves for each table and paraphrase, and what mask ratios do."""
    for where, same in groupby(rows, place):
        rows = list(same)
        name = re.sub(r"\W+", "-", " ".join(where))
        draw_curves(rows, f"{out}/curves-{name}.png")
        masked = [over_ratios(row) for row in rows if row.settings["mask_ratio"]]
        if len(masked) > 1:
            draw_curves(masked, f"{out}/ratios-{name}.png", xlabel="mask ratio")


def over_ratios(row):
    """As in the paper's figure 4: the best scores at the mask ratio, in place of scores at steps.

    It is a point, or a level line where ratios are drawn anew.
    """
    return row._replace(curve=[row.best | {"step": ratio} for ratio in row.settings["mask_ratio"]])


def report(directories, out=None, **others):
    """Print one table of many runs; with `out`, write report.json and figures first."""
    if others:
        raise UserError("--report asks nothing: give --out alone with it")
    runs = []
    for directory in directories:
        try:
            runs.append(read_run(Path(directory) / "results.json", runs))
        except UserError as error:
            print(f"left out: {error}")
    if not runs:
        raise UserError("--report: no finished run in these directories")
    rows = summarize(runs)
    if out:
        os.makedirs(out, exist_ok=True)
        data.write_json(f"{out}/report.json", [row._asdict() for row in rows])
        draw_all(rows, out)
    print(table(rows))


def read_run(path, before):
    """The results of a finished run that go into one table with those before."""
    with data.reading(path, "not a training run of this version"):
        run = data.read_json(path)
        if not run.get("finished"):
            raise UserError("not finished")
        table(summarize([*before, run]))  # an error if anything is missing
    return run


def samples(predictions):
    """Some questions of each direction with their answers, and all without a true one, as text."""
    left = dict(DIRECTIONS)
    lines = []
    for prediction in predictions:
        form = SAMPLE
        if "answer" in prediction:
            left[prediction["direction"]] -= 1
            form += ", true is {answer!r}"
        if left[prediction["direction"]] >= 0 or form == SAMPLE:
            lines.append(form.format(**prediction))
    return "\n".join(lines)


def score_table(scores):
    """Every group of `average` as a line of a table."""
    rows = []
    for name, group in scores.items():
        means = [
            f"{metric} " + INTERVAL.format(*group[metric]) for metric in METRICS if metric in group
        ]
        rows.append({"": name, "n": str(group["n"]), "mean [95 % interval]": "  ".join(means)})
    return markdown(rows)


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation{base}
tags:
- masked-fine-tuning
# license: yours to choose, as far as the base model and the data allow
---
# {name}

A language model that was taught new documents with maskft, after *Diffusion-Inspired Masked
Fine-Tuning for Knowledge Injection in Autoregressive LLMs* (arXiv 2510.09885).

```
{settings}
```

Scores after training, by kind of question (mean [95 % interval]):

```
{scores}
```

To ask it, without a system message, in the form that it was trained in (`chat_template.jinja`):

```sh
{ask}
```
"""


def model_card(out, results):
    """The README.md of a run's directory, with the head that the hub reads."""
    settings = results["arguments"]
    model = settings["model"]
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", model)  # a path is absolute
    return CARD.format(
        base=f"\nbase_model: {model}" if hub_id else "",
        name=out.name,
        ask=ask_command(out),
        settings=settings,
        scores=score_table(results["evaluations"][-1]["scores"]),
    )


def write_end(out, results, lines, predictions):
    """What a run leaves at its end beside its model: a card, a picture, and results.json that has
    it finished."""
    data.write_text(out / "README.md", model_card(out, results))
    draw_run(results, lines, out / "curves.png")
    write_results(out, results | {"finished": True}, predictions)


# ---------------------------------------------------------------------------------------- command


def ask_command(out):
    """What to type to ask a model."""
    return command(__file__, "--model", out) + ' --ask "..."'


def command(script, flag, out, start="python"):
    """A command that can be pasted."""
    return f"{start} {shlex.join([os.path.relpath(script), flag, str(out)])}"


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # a flag that is not given is not there
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="directory, built-in name or hub id of the model to ask")
    what.add_argument(
        "--report",
        dest="directories",
        nargs="+",
        metavar="DIR",
        help="ask nothing; one table of these runs (the last of those alike in settings and seed), "
        "and with --out figures",
    )
    add = parser.add_argument
    add(
        "--data",
        help="as for maskft.py (default: that of the run, else bio)",
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
        help="of the documents; changes nothing here, as no question depends on it",
    )
    add(
        "--seed",
        type=int,
        help="of the generated people (default: that of the run in --model, else 0)",
    )
    add("--max-new-tokens", type=int, help="longest answer (default: 128, for math 256)")
    add("--block-length", type=int, help="diffusion: tokens decoded together (default: 4)")
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument(
        "--steps", type=int, help="diffusion: passes for a whole answer (default: one a token)"
    )
    passes.add_argument(
        "--threshold",
        type=float,
        help="diffusion: keep all tokens this probable at once; faster, approximate",
    )
    add("--out", help="directory for results.json and preds.jsonl, or report and figures")
    return parser


def main():
    """Ask a model the questions of a data set, or one's own; or report runs."""
    flags = vars(arguments().parse_args())
    if "model" in flags:
        import maskft  # here: --help and --report do not wait for torch

        maskft.entry_point(partial(ask, flags))
        return
    try:
        report(**flags)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def ask(flags):
    """Answer questions, dealt over the ranks; rank 0 writes and prints."""
    import llada  # here, because both import this file
    import maskft

    longest = flags.get("max_new_tokens")
    if longest is not None and longest < 1:
        raise UserError("--max-new-tokens must be above 0")
    device = maskft.start_processes()
    directory = maskft.find_model(flags["model"])
    usual = {"data": "bio", "seed": 0, "dtype": maskft.native_dtype()}
    path = directory / "results.json"
    with data.reading(path, "not the results of a run"):
        settings = usual | data.read_object(path).get("arguments", {}) | flags
        dtype = getattr(maskft.torch, settings["dtype"])
    if "ask" in flags:
        if flags.keys() & {"data", "out", "seed"}:
            raise UserError("--ask has its own questions: no --data, --out or --seed")
    else:
        if "out" in flags:  # a new one: no results of a run are lost
            maskft.on_rank_0(os.makedirs, flags["out"])
        dataset = data.load(settings["data"], seed=settings["seed"])
    tokenizer = data.load_tokenizer(directory)
    model = maskft.load(directory, device, dtype)
    given = {name: flags[name] for name in ("block_length", "steps", "threshold") if name in flags}
    answers = llada.answer
    if model.config.is_causal:
        answers = maskft.generate
        if given:
            raise UserError("--block-length, --steps and --threshold are for a diffusion model")
    answer = partial(answers, model, stop_ids=tokenizer.stop_ids, **given)

    def answered(questions):
        maskft.check_questions(questions, tokenizer, model, longest)
        return maskft.evaluate(answer, tokenizer, questions, longest)

    if "ask" in flags:
        for text in flags["ask"] or typed_lines():
            question = data.parse_record({"question": text.strip()}, "--ask")
            (prediction,) = answered([question])
            maskft.print0(prediction["prediction"])
        return
    predictions = answered(dataset.questions)
    if maskft.rank() == 0:
        scores = average(predictions)
        if "out" in flags:
            results = {"arguments": settings, "evaluations": [{"scores": scores}]}
            write_results(Path(flags["out"]), results, predictions)
        print("{model} on {data}, seed {seed}".format(**settings))
        print(score_table(scores))
        print(samples(predictions))


def typed_lines():
    """The lines of the standard input that are not blank, one by one, on every rank."""
    import maskft

    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    print("one question a line:", file=sys.stderr)
    return filter(str.strip, iter(partial(maskft.on_rank_0, sys.stdin.readline), ""))


if __name__ == "__main__":
    main()
