"""What a model kept of what it knew before it was taught new facts: a table of results/README.md.

    python results/kept.py HuggingFaceTB/SmolLM2-135M-Instruct out/nd-sft-1 out/nd-masked-1

The first is the model as it was, the others are runs that began with it. Two things are asked, both
in ordinary.jsonl: 100 questions that everybody can answer, of which SmolLM2-135M-Instruct gets all
right, and 50 requests without an answer. To these the first model answers, and of every model it is
measured how likely it finds those answers; all in float32. --share moves the weights of the runs
back to a share of the way that training took them: what was taught mostly stays, and what that
spoiled comes back (WiSE-FT, arXiv 2109.01903). --facts asks what they were taught, too.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import eval as evaluation
import maskft
from data import UserError

ORDINARY = Path(__file__).parent / "ordinary.jsonl"
QUESTION_TOKENS = 48  # of an answer to one of the 100; they are short
REQUEST_TOKENS = 64


def load_causal(name, device):
    model = maskft.load(name, device)
    if not model.config.is_causal:
        raise UserError(f"{name} is a masked diffusion model: here, answers are greedy")
    return model


def loss_of_answers(model, prompts, answers, device):
    """Mean negative log-likelihood of these answers, in nats a token."""
    total = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        batch = data.collate([maskft.supervise(prompt, answer)])
        batch["ids"] = batch["ids"].to(device)
        with torch.no_grad():
            total += model(**batch).item()
    return total / sum(map(len, answers))


@torch.no_grad()
def go_back(model, base, share):
    """Bring a model's weights back to a share of the way that they went from those of `base`."""
    for parameter, old in zip(model.parameters(), base.parameters(), strict=True):
        parameter.lerp_(old, 1 - share)


def facts_of(run):
    """The questions that a run was trained for."""
    path = run / "results.json"
    with data.reading(path):
        given = data.read_json(path)["arguments"]
        return data.load(given["data"], given["paraphrase"], given["seed"]).questions


def measure(args, device="cpu"):
    """A line of figures for the model as it was, and for each run at each share; all printed."""
    base = maskft.find_model(args.base)
    old = load_causal(base, device)
    tokenizer = data.load_tokenizer(base)
    asked = data.load(str(ORDINARY)).questions
    questions = [question for question in asked if "answer" in question]
    prompts = [tokenizer.prompt(q["question"]) for q in asked if "answer" not in q]
    said = maskft.generate(old, prompts, REQUEST_TOKENS, tokenizer.stop_ids)
    said = [ids + [tokenizer.eot_id] if len(ids) < REQUEST_TOKENS else ids for ids in said]

    def figures(model, name, share, facts):
        answer = partial(maskft.generate, model, stop_ids=tokenizer.stop_ids)
        answered = maskft.evaluate(answer, tokenizer, questions, QUESTION_TOKENS)
        right = sum(question["rouge1"] == 1 for question in answered)  # every word of the answer
        scores = evaluation.average(maskft.evaluate(answer, tokenizer, facts))
        line = {
            "model": str(name),
            "share": share,
            "questions": right / len(questions),
            "nll": loss_of_answers(model, prompts, said, device),
            "facts": evaluation.reported_scores(scores),
        }
        maskft.print0(*line.values())
        return line

    maskft.print0("model, share of the way, ordinary questions, NLL, facts:")
    lines = [figures(old, args.base, 0.0, [])]
    for run in args.runs:
        facts = facts_of(run) if args.facts else []
        for share in args.share:
            model = load_causal(run, device)
            with data.reading(run, "did not begin with the first model"):
                go_back(model, old, share)
            lines.append(figures(model, run, share, facts))
    return lines


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("base", help="the model as it was: directory, built-in name or hub id")
    add("runs", type=Path, nargs="+", help="directories of runs that began with it")
    add("--share", type=float, nargs="+", default=[1.0], help="of the way (default: 1)")
    add("--facts", action="store_true", help="ask what the runs were taught, too")
    add("--out", help="report.json to write")
    return parser


def main():
    args = arguments().parse_args()
    device = maskft.start_processes()
    lines = measure(args, device)
    if args.out:
        data.write_json(args.out, {"environment": maskft.environment(device), "figures": lines})


if __name__ == "__main__":
    maskft.entry_point(main)
