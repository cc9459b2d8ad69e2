"""Closed-book question answering: ask, score, report.

    python eval.py --model out/bio-masked-1                    # the questions that run was trained for
    python eval.py --model tiny --data bio --seed 3            # any model directory, any questions

Three scores of one answer against its reference, all between 0 and 1. ROUGE-1 recall, the paper's: the share of the
reference's distinct words that the answer has too; it rewards long answers, so the mean answer length stands beside it.
Exact match: the same words in the same order. F1: the harmonic mean of precision and recall over words with their counts.
All three first delete punctuation and function words, and keep case.

preds.jsonl has a line a question:
    {"direction": "backward", "group": "name", "question": "Who was born in Lund ...?", "answer": "Ada Holm",
     "prediction": "Ada Holm", "rouge1": 1.0, "exact": 1.0, "f1": 1.0, "length": 2}
"""

import argparse
import json
import string
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import data
import llada
import maskft

# ------------------------------------------------------------------------------------------------------------- metrics

STOP_WORDS = set("a of the and is are be to new on in at an for".split())
CONTRACTIONS = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gimme": "gim me", "lemme": "lem me", "gotta": "got ta"}
# what string.punctuation lacks and NLTK's tokenizer sets apart: quotation marks and dashes
APART = {ord(c): f" {c} " for c in "«“‘„»”’\u2012\u2013\u2014\u2015"}
DELETE = dict.fromkeys(map(ord, string.punctuation))


def words(text):
    """The scored words of a text, in order: punctuation deleted, NLTK-like tokens, function words dropped in any case.

    NLTK's word_tokenize without NLTK: once ASCII punctuation is gone, all that is left of its rules are the quotation
    marks, the dashes and six contractions.
    """
    tokens = text.translate(DELETE).translate(APART).split()
    split = [half for token in tokens for half in split_contraction(token)]
    return [word for word in split if word.lower() not in STOP_WORDS]


def split_contraction(token):
    """"Cannot" -> "Can", "not": at the place where the table cuts it, its case kept."""
    halves = CONTRACTIONS.get(token.lower())
    if halves is None:
        return [token]
    at = halves.index(" ")
    return [token[:at], token[at:]]


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


def score(prediction, reference):
    """All scores of one answer; `length` is its number of words, function words included."""
    return {
        "rouge1": rouge1_recall(prediction, reference),
        "exact": exact_match(prediction, reference),
        "f1": f1(prediction, reference),
        "length": len(prediction.split()),
    }


# ----------------------------------------------------------------------------------------------------------- answering

BATCH = 64  # questions answered together


def evaluate(answer, tokenizer, questions):
    """Ask every question, dealt out over the ranks; (scores, predictions), the same on every rank.

    answer       prompts (lists of ids) -> answers (lists of ids)
    scores       {"forward": {"rouge1", "exact", "f1", "length", "n"}, "backward": ..., "forward/<group>": ...}
    predictions  one dict a question, in the order of the questions
    """
    rank, world = maskft.rank(), maskft.world_size()
    prompts = [tokenizer.chat([{"role": "user", "content": q["question"]}]) for q in questions]
    # longest together: little padding, and the ranks get equal shares of short and long
    mine = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[rank::world]
    answered = []
    for start in range(0, len(mine), BATCH):
        chunk = mine[start : start + BATCH]
        texts = [tokenizer.decode(ids).strip() for ids in answer([prompts[i] for i in chunk])]
        answered += [(i, {**questions[i], "prediction": t, **score(t, questions[i]["answer"])}) for i, t in zip(chunk, texts)]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, answered)  # the only collective: ranks may have made different numbers of calls
        answered = sum(shares, [])
    predictions = [prediction for _, prediction in sorted(answered, key=lambda pair: pair[0])]
    return average(predictions), predictions


def average(predictions):
    """Mean scores by direction, and by direction and group, of predictions as `evaluate` returns them."""
    cells = {}
    for p in predictions:
        for cell in (p["direction"], f"{p['direction']}/{p['group']}"):
            cells.setdefault(cell, []).append(p)
    return {
        cell: {**{k: sum(p[k] for p in ps) / len(ps) for k in ("rouge1", "exact", "f1", "length")}, "n": len(ps)}
        for cell, ps in sorted(cells.items())
    }


# -------------------------------------------------------------------------------------------------------------- report


def write_results(out, results, predictions):
    """results.json and preds.jsonl of a run, each replaced in one step."""
    done = results["evaluations"]
    summary = {"best": max(done, key=overall), "last": done[-1]} if done and done[-1]["scores"] else {}
    data.write_text(Path(out) / "results.json", json.dumps({**results, **summary}, indent=1) + "\n")
    data.write_text(Path(out) / "preds.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))


def overall(evaluation):
    """Mean ROUGE-1 recall of the two directions: what `best` means."""
    directions = [evaluation["scores"][d]["rouge1"] for d in ("forward", "backward") if d in evaluation["scores"]]
    return sum(directions) / len(directions) if directions else 0.0


def table(runs):
    """ROUGE-1 recall by method and direction: before training, at the best evaluation and at the last; as text."""
    stages = f"{'before':>8}{'best':>8}{'last':>8}"
    lines = ["", f"{'ROUGE-1 recall':16}{'forward':^24}{'backward':^24}", f"{'method':16}{stages}{stages}"]
    for run in runs:
        done = run["evaluations"]
        stages = [done[0] if done[0]["step"] == 0 else None, max(done, key=overall), done[-1]]
        cells = [e["scores"].get(d, {}).get("rouge1") if e else None for d in ("forward", "backward") for e in stages]
        lines.append(f"{run['arguments']['method']:16}" + "".join(f"{'-' if c is None else f'{c:.3f}':>8}" for c in cells))
    return "\n".join(lines)


def plot(runs, path):
    """Forward and backward recall against optimizer steps, a line a run, into a picture; needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward")):
        methods = [run["arguments"]["method"] for run in runs]
        for number, (run, method) in enumerate(zip(runs, methods)):
            points = [(e["step"], e["scores"][direction]["rouge1"]) for e in run["evaluations"] if direction in e["scores"]]
            label = "_" if method in methods[:number] else method  # matplotlib leaves "_" out: one entry for all seeds
            color = f"C{list(dict.fromkeys(methods)).index(method)}"
            axes.plot([x for x, _ in points], [y for _, y in points], color=color, marker=".", label=label)
        axes.set(title=direction, xlabel="step", ylabel="ROUGE-1 recall", ylim=(-0.03, 1.03))
    axes.legend()
    figure.savefig(path, dpi=130)


def samples(predictions):
    """Three questions with their answers, as text: one forward, two backward where there are."""
    chosen = [p for d, n in (("forward", 1), ("backward", 2)) for p in [q for q in predictions if q["direction"] == d][:n]]
    shown = "\n{direction}: {question}\n  answered {prediction!r}, true is {answer!r}"
    return "\n".join(shown.format(**p) for p in chosen)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="directory, built-in name or hub id of the model to ask")
    add("--data", help="as for maskft.py (default: what the run in --model learned, else bio)")
    add("--paraphrase", choices=data.PARAPHRASES, help="for a directory in the released layout (default: the run's, else none)")
    add("--seed", type=int, help="of the generated people (default: that of the run in --model, else 0)")
    add("--max-new-tokens", type=int, default=128, help="longest answer (default: 128)")
    add("--block-length", type=int, help="diffusion models: tokens decoded together (default: 4)")
    add("--steps", type=int, help="diffusion models: forward passes for a whole answer (default: one a token)")
    add("--threshold", type=float, help="diffusion models: keep all tokens this probable at once; faster, approximate")
    add("--report", nargs="+", metavar="DIR", help="ask nothing; one table of these runs, and with --out their curves")
    add("--out", help="directory for results.json and preds.jsonl, or for report.png (default: print only)")
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
        runs = [data.read_json(Path(run) / "results.json") for run in args.report]
        if not all(run.get("evaluations") for run in runs):
            raise data.UserError(f"--report {' '.join(args.report)}: one of them has no evaluation yet")
        print(table(runs))
        if args.out:
            plot(runs, Path(args.out) / "report.png")
        return
    device, directory = maskft.start_processes(), maskft.find_model(args.model)
    run = directory / "results.json"
    trained = data.read_json(run)["arguments"] if run.is_file() else {"data": "bio", "seed": 0, "paraphrase": "none"}
    seed = trained["seed"] if args.seed is None else args.seed
    dataset = data.load(args.data or trained["data"], args.paraphrase or trained["paraphrase"], seed)
    if not dataset.questions:
        raise data.UserError(f"--data {dataset.name}: no questions to ask")
    dtype = getattr(torch, trained.get("dtype") or maskft.native_dtype(device)[0])
    model, tokenizer = maskft.load(directory, device, dtype), data.load_tokenizer(directory)
    scores, predictions = evaluate(answerer(args, model, tokenizer), tokenizer, dataset.questions)
    maskft.say(f"{args.model} on {dataset.name}, seed {seed}\n{score_table(scores)}\n{samples(predictions)}")
    if args.out and maskft.rank() == 0:
        results = {"arguments": vars(args), "evaluations": [{"step": None, "scores": scores}]}
        write_results(args.out, results, predictions)


def answerer(args, model, tokenizer):
    """prompts -> answers with the settings of the flags, greedily or by unmasking; UserError for a flag of the other kind."""
    if args.max_new_tokens < 1:
        raise data.UserError(f"--max-new-tokens {args.max_new_tokens} is not above 0")
    flags = {"steps": args.steps, "block_length": args.block_length, "threshold": args.threshold}
    given = {name: value for name, value in flags.items() if value is not None}
    if model.config.causal and given:
        raise data.UserError(f"--{min(given).replace('_', '-')} is for diffusion models; {args.model} is an autoregressive one")
    kind = maskft if model.config.causal else llada
    return partial(kind.answer, model, tokenizer, max_new_tokens=args.max_new_tokens, **given)


def score_table(scores):
    """Every cell of `average` as a line of text."""
    head = f"{'':32}{'n':>6}{'ROUGE-1':>9}{'exact':>8}{'F1':>8}{'words':>8}"
    line = "{:32}{n:>6}{rouge1:>9.3f}{exact:>8.3f}{f1:>8.3f}{length:>8.1f}"
    return "\n".join([head] + [line.format(cell, **cells) for cell, cells in scores.items()])


if __name__ == "__main__":
    import eval as evaluation  # the module, not this __main__ copy of it

    maskft.entry_point(evaluation.main)
