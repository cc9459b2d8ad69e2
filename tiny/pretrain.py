"""How the built-in models were made: pre-training on people of a generated world, autoregressive or by diffusion.

    python tiny/pretrain.py new out/new                                   # where it starts: random weights, the world's words
    python tiny/pretrain.py ar --model out/new --data world:150 --mask-ratio 0.05,0.3 --epochs 600 --lr 3e-3 --out out/stage1
    python tiny/pretrain.py diffusion --model tiny --data world:150 --mask-ratio 0.3,1 --epochs 500 --lr 1.5e-3 --out out/stage5

None of it is the paper's. It is all that a method of one's own takes, too: a function from a record to an Example, a rate if
the usual one does not do, and `maskft.run_methods`. The other flags are those of maskft.py.
"""

import dataclasses
import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import regex
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import llada
import maskft
from data import ATTRIBUTES, IGNORE, UserError, backward_question, biography, forward_question, pick, shuffled

# ----------------------------------------------------------------------------------------- where it starts: a new model


def learn_merges(words):
    """Byte-pair encoding: join the most frequent pair (of equals the first in byte order) until every word is one token."""
    words, merges = [[bytes([b]) for b in word.encode()] for word in sorted(words)], []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:])):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while (i := i + 1) < len(word):
                if (word[i - 1], word[i]) == best:
                    word[i - 1 : i + 1] = [b"".join(best)]
    return merges


def write_tokenizer(path):
    """A tokenizer.json in which every word of the world is one token: byte-level BPE, chatml, one token to mask with."""
    # no "\n\n": an answer follows the same token, one "\n", after the lead-in of a recovery and after a question
    rng, texts = Random(0), [f"user assistant{maskft.RECOVER}\n{maskft.LEAD_IN.strip()}\n{maskft.TELL}"]
    for name in data.names("world"):
        person = data.draw_person(rng, name)
        texts.append(biography(rng, person, shuffled(rng, ATTRIBUTES)))
        texts += [q[part] for q in data.questions_about(person) for part in ("question", "answer")]
    merges = learn_merges({word for text in texts for word in regex.findall(data.GPT2_PIECES, text)})
    show = {byte: character for character, byte in data.ALPHABET.items()}
    spelling = [["".join(show[b] for b in half) for half in pair] for pair in merges]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved_special_token_0|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = dict.fromkeys([*special, *map(show.get, range(256)), *map("".join, spelling)])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(special)],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocab)}, "merges": spelling},
    }  # fmt: skip
    data.write_text(path, json.dumps(content, ensure_ascii=False))


def write_new_model(directory):
    """A model directory of the built-in model's size, with random weights and a tokenizer of its world's words."""
    Path(directory).mkdir(parents=True)
    write_tokenizer(Path(directory) / "tokenizer.json")
    raw = data.read_json(maskft.find_model("tiny") / "config.json")
    raw["vocab_size"] = len(data.load_tokenizer(directory).bytes_of)
    model, rng = maskft.Model(maskft.parse_config(raw)), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:  # what adds to the residual stream starts smaller, by the number of additions
            deep = (2 * model.config.layers) ** -0.5 if name.endswith(("o.weight", "down.weight")) else 1
            torch.nn.init.normal_(parameter, std=0.5 * model.config.width**-0.5 * deep, generator=rng)
    maskft.save(model, directory)


# ------------------------------------------------------------------------------------------------- what it practises


@cache  # asked for at every stranger
def strangers():
    return data.names("world")


# of a diffusion model's practice, the share of biographies, and of the questions the share of forward ones; the last two
# stages of tiny-llada had 0.6, 0.35 and 0.5, 0.5
TELL_SHARE, FORWARD_SHARE = 0.35, 0.35


def draw_task(record, rng, recover=0.55, tell=0.15, forward=0.35):
    """One thing to practise on a person: (task, what to practise it on), drawn with a numpy Generator.

    "recover"  {"text": some sentences of a biography}; one in five of somebody new every time, from whom only copying
               can be learned
    "tell"     {"text": a biography}
    "ask"      {"question", "answer"}, all the rest of the time; more of them backward, which is the harder direction
    """
    if "person" not in record:
        raise UserError("pre-training practises on people of the generated world: use --data world:PEOPLE")
    person, chance = record["person"], rng.random()
    if not record["asked"]:  # read twice as often masked as plain, where others are asked
        ask = 1 - recover - tell
        recover, tell = recover + ask * 2 / 3, tell + ask / 3
    if chance < recover:
        if rng.random() < 0.2:
            person = data.draw_person(rng, pick(rng, strangers()))
        length = pick(rng, (2, 3, 4, 6, 6))
        return "recover", {"text": biography(rng, person, shuffled(rng, ATTRIBUTES)[:length])}
    if chance < recover + tell or not record["asked"]:
        return "tell", {"text": biography(rng, person, pick(rng, (ATTRIBUTES, shuffled(rng, ATTRIBUTES))))}
    if rng.random() < forward:
        return "ask", forward_question(person, pick(rng, ATTRIBUTES))
    return "ask", backward_question(person, shuffled(rng, ATTRIBUTES)[:3])


def ar_example(record, tokenizer, mask_ratio, rng):
    """An autoregressive model recovers a masked biography, tells one or answers a question. Each example weighs alike, or the
    long documents would drown the short answers."""
    task, view = draw_task(record, rng)
    if task in ("ask", "tell"):
        example = maskft.sft_example(view, tokenizer, mask_ratio, rng)
    else:
        document = tokenizer.encode(view["text"])
        masked, _ = maskft.mask_tokens(document, maskft.draw_ratio(mask_ratio, rng), tokenizer.mask_id, rng)
        if rng.random() < 0.5:  # hide all of the name, so that the other sentences have to tell it
            masked[:2] = [tokenizer.mask_id] * 2
        example = maskft.recovery(masked, document, tokenizer)
    return dataclasses.replace(example, weight=1 / example.share, share=1)


def diffusion_example(record, tokenizer, mask_ratio, rng):
    """A diffusion model unmasks a biography or an answer, with masks behind the answer as the sampler has them. No loss on
    those: what follows the end of turn does not matter, but a model that never saw that many masks is lost among them."""
    task, view = draw_task(record, rng, recover=0.0, tell=TELL_SHARE, forward=FORWARD_SHARE)
    example = llada.diffusion_example(view, tokenizer, mask_ratio, rng)
    room = pick(rng, (0, 0, 8, 24, 120)) if task == "ask" else 0
    return dataclasses.replace(example, ids=example.ids + [tokenizer.mask_id] * room, labels=example.labels + [IGNORE] * room)


# ----------------------------------------------------------------------------------------------------------------- main


def falling_rate(run, step):
    """The usual warm-up, then a straight line to zero."""
    warm_up, usual = max(1, round(0.02 * run.steps)), maskft.learning_rate(run, step)
    return usual if step < warm_up else usual * (1 - (step - warm_up) / (run.steps - warm_up))


def main():
    parser = maskft.arguments(__doc__, methods=False)
    parser.add_argument("what", nargs="?", choices=["new", "ar", "diffusion"], help="a new model, or how to train one")
    parser.add_argument("directory", nargs="?", default="out/new", help="of the new model (default: out/new)")
    args = maskft.parse_flags(parser)
    if args.what == "new":
        return write_new_model(args.directory)
    if not args.what and not args.resume:
        parser.error("say what to do: new, ar or diffusion")
    args.method = ["llada" if args.what == "diffusion" else "pretrain"]
    maskft.run_methods(args, {"pretrain": ar_example, "llada": diffusion_example}, rate=falling_rate)


if __name__ == "__main__":
    maskft.entry_point(main)
