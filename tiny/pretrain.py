"""How the built-in models were made: pre-training on people of a generated world.

    python tiny/pretrain.py --new out/new     # random weights
    python tiny/pretrain.py --method ar --model out/new --data world:150 --out out/stage1
    python tiny/pretrain.py --method diffusion --model tiny --data world:150 --out out/d1

None of it is the paper's. It is all that a custom method takes, too: a function from a record to an
Example, a `maskft.Method` made of it, and `maskft.run_methods`. The other flags are those of
maskft.py; README.md has the whole commands.
"""

import dataclasses
import sys
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import llada
import maskft
from data import IGNORE, UserError
from tiny import world
from tiny.world import ATTRIBUTES, biography, pick, shuffled

# ----------------------------------------------------------------- where it starts: a new model


def write_new_model(directory):
    """A model directory like that of `tiny`, with its tokenizer and random weights."""
    built_in = maskft.find_model("tiny")
    model = maskft.Model(maskft.read_config(built_in))
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.5 * model.config.hidden_size**-0.5
            if name.endswith(("o.weight", "down.weight")):
                # what adds to the residual stream starts smaller, by the number of additions
                std *= (2 * model.config.num_hidden_layers) ** -0.5
            torch.nn.init.normal_(parameter, std=std, generator=rng)
    Path(directory).mkdir(parents=True)
    maskft.save(model, directory)
    data.write_chat_files(data.load_tokenizer(built_in), built_in, Path(directory))


# ------------------------------------------------------------------------- what it practises


@cache  # asked for at every stranger
def strangers():
    return world.names("world")


def draw_task(record, rng, recover=0.55, tell=0.15, forward=0.35):
    """One thing to practise on a person, drawn with a numpy Generator: (task, record).

    "recover"  {"text": some sentences of a biography}; one in five of somebody new every time, from
               whom only copying can be learned
    "tell"     {"text": a biography}
    "ask"      {"question", "answer"}, all the rest of the time; more of them backward, which is the
               harder direction
    """
    if "person" not in record:
        raise UserError(
            "pre-training practises on people of the generated world: use --data world:PEOPLE"
        )
    person = record["person"]
    chance = rng.random()
    if not record["asked"]:  # read twice as often masked as plain, where others are asked
        ask = 1 - recover - tell
        recover += ask * 2 / 3
        tell += ask / 3
    if chance < recover:
        if rng.random() < 0.2:
            person = world.draw_person(rng, pick(rng, strangers()))
        length = pick(rng, (2, 3, 4, 6, 6))
        return "recover", {"text": biography(rng, person, shuffled(rng, ATTRIBUTES)[:length])}
    if chance < recover + tell or not record["asked"]:
        order = pick(rng, (ATTRIBUTES, shuffled(rng, ATTRIBUTES)))
        return "tell", {"text": biography(rng, person, order)}
    if rng.random() < forward:
        return "ask", world.forward_question(person, pick(rng, ATTRIBUTES))
    return "ask", world.backward_question(person, shuffled(rng, ATTRIBUTES)[:3])


def ar_example(record, tokenizer, mask_ratio, rng):
    """An autoregressive model recovers a masked biography, tells one or answers a question.

    Each example weighs alike, or the long documents would drown the short answers.
    """
    task, view = draw_task(record, rng)
    if task == "recover":
        example = maskft.masked_example(view, tokenizer, mask_ratio, rng, mask=mask_and_hide_name)
    else:
        example = maskft.sft_example(view, tokenizer, mask_ratio, rng)
    return dataclasses.replace(example, weight=1 / example.denominator, denominator=1)


def mask_and_hide_name(ids, ratio, mask_id, rng):
    """One time in two all of the name is masked, so that the other sentences have to tell it."""
    shown, masked = maskft.mask_tokens(ids, ratio, mask_id, rng)
    if rng.random() < 0.5:
        shown[:2] = [mask_id] * 2
    return shown, masked


# of a diffusion model's practice, the share of biographies, and of its questions that of forward
# ones; the last two stages of tiny-llada had 0.6, 0.35 and 0.5, 0.5
TELL_SHARE = 0.35
FORWARD_SHARE = 0.35


def diffusion_example(record, tokenizer, mask_ratio, rng):
    """A diffusion model unmasks a biography or an answer, with masks behind the answer as the
    sampler has them.

    No loss on those: what follows the end of turn does not matter, but a model that never saw that
    many masks is lost among them.
    """
    task, view = draw_task(record, rng, recover=0.0, tell=TELL_SHARE, forward=FORWARD_SHARE)
    example = llada.diffusion_example(view, tokenizer, mask_ratio, rng)
    if task == "ask":
        room = pick(rng, (0, 0, 8, 24, 120))
        example.ids += [tokenizer.mask_id] * room
        example.labels += [IGNORE] * room
    return example


# ------------------------------------------------------------------------------------------ main


def falling(lr, step, steps):
    """The usual warm-up, then a straight line to zero."""
    warm = max(1, round(0.02 * steps))
    if step < warm:
        return maskft.warm_up(lr, step, steps)
    return lr * (1 - (step - warm) / (steps - warm))


maskft.SCHEDULES["falling"] = falling
PRACTICE = maskft.TINY(lr=6e-4, usual_steps=300, schedule="falling")
METHODS = {
    "diffusion": llada.METHODS["llada"]._replace(example=diffusion_example, tiny=PRACTICE),
    "ar": maskft.Method(ar_example, tiny=PRACTICE),
}


def arguments():
    parser = maskft.arguments(__doc__, METHODS)
    parser.add_argument("--new", metavar="DIR", help="write a new model there, and train nothing")
    return parser


def main():
    flags = maskft.parse_flags(arguments())
    if "new" in flags:
        write_new_model(flags["new"])
    else:
        maskft.run_methods(flags, METHODS)


if __name__ == "__main__":
    maskft.entry_point(main)
