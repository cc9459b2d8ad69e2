"""LLaDA: the same facts taught to a masked diffusion model, the paper's other half.

    python llada.py                                   # laptop: fine-tune the built-in tiny-llada
    torchrun --nproc_per_node 8 llada.py --data bio   # eight GPUs: LLaDA-8B, the paper's settings
    python eval.py --model out/bio-llada-1            # answer and score

A diffusion model fills in masked tokens. It is the decoder of maskft.py, trained by the loop of
maskft.py, but for three differences to the autoregressive (AR) one:
  1. no causal mask: every token sees every other, so a gap is filled from both sides
     (every LLaDA, and what has "is_causal": false in its config.json);
  2. the loss is on the masked tokens of the text itself, weighted by 1/ratio: a bound on the text's
     log-likelihood;
  3. an answer is decoded by unmasking: all of it starts masked, and each step keeps the tokens the
     model is surest of.

LLaDA is arXiv 2502.09992; "reference" below means its released `generate.py` and `GUIDELINES.md`.
"""

from itertools import takewhile

import torch

import maskft
from data import Example, UserError, pad, reading

# ------------------------------------------------------------------- difference 1: no causal mask


def without_causal_mask(config, tokenizer):
    """The Config to train a diffusion model with: of any family, every token sees every other.

    transformers reads is_causal, too.
    """
    if config.is_causal:
        maskft.print0("an autoregressive model: diffusion training starts from its weights")
    maskft.refuse_unless(config.raw, mask_token_id=[tokenizer.mask_id, None])
    diffusion = {"is_causal": False, "mask_token_id": tokenizer.mask_id}
    return maskft.parse_config(config.raw | diffusion)


# --------------------------------------------------------------------------- difference 2: the loss


def diffusion_example(record, tokenizer, mask_ratio, rng):
    """A document as `bos document end-of-text`; bos is never masked, the end may be [paper eq. 1].

    A question with its answer is a chat: its prompt is never masked, its end of turn may be.
    """
    form = maskft.as_chat if "question" in record else maskft.as_text
    return diffuse(*form(record, tokenizer), tokenizer, mask_ratio, rng)


def diffuse(prompt, target, tokenizer, mask_ratio, rng):
    """The Example whose loss is one draw of the bound on -log p(target | prompt) / len(target).

    Also of a chat that the model wrote before it learned anything new: its answer is masked.
    """
    # 1. One ratio per sequence: the bound is an expectation over ratios, and a batch then covers
    #    many of them.
    ratio = rng.uniform(*mask_ratio)
    # 2. Mask the target, never the prompt: what is asked for is p(target | prompt), and bos is
    #    always known.
    shown, masked = maskft.mask_tokens(target, ratio, tokenizer.mask_id, rng)
    # 3. Predict in place. Loss on masked tokens only: the others stand in the input, to copy them
    #    teaches nothing.
    labels = maskft.labels_of(prompt, target, masked)
    # 4. Divide by ratio and length: a token is masked with probability `ratio`, so 1/ratio makes
    #    every ratio's expected loss the same size (ln V at a uniform model), and 1/length makes it
    #    a mean over tokens.
    # 5. If nothing was masked the sequence adds 0 to the loss and still 1 to the denominator:
    #    drawing again until something is masked would make the expectation too large, most of all
    #    for short texts. Never 0/0 either.
    weight = 1.0 / (ratio * len(target)) if masked.any() else 0.0
    # 6. Average over the global batch: each sequence counts once, whatever its length.
    return Example(prompt + shown, labels, weight=weight, denominator=1.0)


# ----------------------------------------------------------------------- difference 3: the sampler

# Prompts and their answers at a time: every step computes all of them anew, so that more tokens are
# no faster.
BATCH_TOKENS = 9216


@torch.no_grad()
def sample(
    model,
    prompts,
    max_new_tokens=128,
    steps=128,
    block_length=4,
    temperature=0.0,
    remasking="low_confidence",
    cfg_scale=0.0,
    stop_ids=(),
    generator=None,
    threshold=None,
):
    """Iterative unmasking of a batch: lists of ids in, lists of new ids out (stop id not included).

    The answer is max_new_tokens masks behind the prompt, filled block by block from left to right.
    Each of a block's steps predicts all its masks, and keeps the predictions of highest probability
    (remasking="low_confidence") or any ("random"); the others stay masked. Later blocks stay in the
    sequence, masked: the model sees how much room is left.

    temperature  0 = the likeliest token; else a draw from softmax(logits / temperature)
    cfg_scale    > 0: classifier-free guidance, away from what the model says without the prompt
    threshold    approximate and faster: keep every prediction at least this probable, one a step at
                 least; `steps` is not used

    At temperature 0 and remasking by confidence, tokens are the reference's, sooner: logits are
    computed at the block's masks only, and a row leaves the batch once its text has ended.
    """
    counts = tokens_per_step(max_new_tokens, steps, block_length, threshold)
    if not prompts:
        return []
    with reading("config.json", "no mask_token_id: not a model that llada.py trained"):
        mask_id = model.config.mask_token_id
    rows = [prompt + [mask_id] * max_new_tokens for prompt in prompts]
    # padded on the left, so that the blocks of all rows are the same columns
    ids = pad(rows, -1, "left").to(model.norm.weight.device)  # (B, T)
    key_mask = ids >= 0  # (B, T)
    ids.clamp_(0)  # any id is padding
    width = ids.shape[1] - max_new_tokens  # of the prompts
    going = range(len(prompts))  # rows whose text has not ended
    for end in range(width + block_length, ids.shape[1] + 1, block_length):
        for count in counts:
            batch = ids[going]
            masks = batch == mask_id  # (B, T), N of them; a model may predict the mask token, too
            masks[:, :width] = masks[:, end:] = False  # the reference fills the prompt's: a bug
            if not masks.any():
                break  # this block was done in fewer steps, or no row is left
            logits = predict(model, mask_id, batch, key_mask[going], masks, width, cfg_scale)
            new = gumbel(logits, temperature, generator).argmax(-1)  # (N,)
            score = confidence(logits, new, remasking, generator)  # (N,)
            ids[going] = keep_best(batch, masks, new, score, count, threshold)
            texts = [until_stop(row, stop_ids) for row in ids[:, width:].tolist()]
            # a stop id ends a row once there is no mask before it
            going = [n for n in going if mask_id in texts[n]]
    return texts


def until_stop(ids, stop_ids):
    """The ids before the first stop id."""
    return list(takewhile(lambda token: token not in stop_ids, ids))


def tokens_per_step(max_new_tokens, steps, block_length, threshold):
    """How many tokens each step of a block keeps, the larger numbers first.

    4 tokens in 3 steps are [2, 1, 1]; a step that would keep nothing is left out. Where `steps` is
    None or there is a threshold, each keeps one.
    """
    if steps is None or threshold is not None:
        steps = max_new_tokens
    if (
        min(max_new_tokens, block_length, steps) < 1
        or max_new_tokens % block_length
        or steps * block_length % max_new_tokens
    ):
        raise UserError(
            f"max_new_tokens {max_new_tokens} has to be a positive multiple of block_length "
            f"{block_length}, and steps {steps} of the number of blocks"
        )
    passes = min(steps * block_length // max_new_tokens, block_length)
    return [len(range(i, block_length, passes)) for i in range(passes)]  # dealt like cards


def predict(model, mask_id, ids, key_mask, where, width, cfg_scale):
    """Logits (N, V) at `where`; with guidance, pushed away from those for a prompt of masks.

    A bug of the reference: guidance without an attention mask reads a variable that was never set.
    """
    seen = model(ids, key_mask, pick=where)
    if not cfg_scale:
        return seen
    blind = ids.clone()
    blind[:, :width] = mask_id
    unseen = model(blind, key_mask, pick=where)
    return unseen + (cfg_scale + 1) * (seen - unseen)


def gumbel(logits, temperature, generator):
    """Logits whose argmax is a draw from softmax(logits / temperature); at 0 they stay as they are.

    float64, as in the reference: in fp32 the noise is bounded above, and draws are less random than
    they should be (arXiv 2409.02908).
    """
    if temperature == 0:
        return logits
    uniform = torch.rand_like(logits, dtype=torch.float64, generator=generator)
    return logits.double() - temperature * torch.log(-torch.log(uniform))


def confidence(logits, new, remasking, generator):
    """How good each prediction is (N,): its probability, or chance."""
    if remasking == "random":
        return torch.rand_like(new, dtype=torch.float64, generator=generator)
    if remasking == "low_confidence":
        # in float64: near 1 the probabilities of several tokens are one number in fp32, and by the
        # dozen in bf16
        return logits.double().softmax(-1).gather(-1, new[:, None])[:, 0]
    raise UserError(f"remasking {remasking!r} is not one of low_confidence, random")


def keep_best(ids, masks, new, score, count, threshold):
    """ids (B, T) with some masks filled: of a row the `count` best, and all from `threshold` on.

    masks (B, T) bool has N places, new (N,) the predictions for them and score (N,) how good each
    is.
    """
    scores = torch.full_like(ids, -torch.inf, dtype=torch.float64)  # (B, T)
    scores[masks] = score
    kept = torch.zeros_like(masks).scatter(1, scores.topk(count, dim=1).indices, True)
    if threshold is not None:
        kept |= scores >= threshold
    # a row with fewer masks than `count` keeps places that are none, with the tokens they have
    return torch.where(kept, ids.masked_scatter(masks, new), ids)


def answer(model, prompts, max_new_tokens=128, steps=None, generators=None, on_answer=None, **how):
    """Answers with the paper's settings [A.4]: a step a token, blocks of 4, temperature 0; `how` is
    for `sample`.

    Prompts are answered batch by batch, in each those of alike length; with a generator for each
    one by one, so that no draw depends on others.
    differs from masked_arLLM: an answer is cut at the end of its turn too, not only at the end of
    text.
    """
    answers = {}
    left = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while left:
        longest = len(prompts[left[0]]) + max_new_tokens
        batch = left[: 1 if generators else max(1, BATCH_TOKENS // longest)]
        said = sample(
            model,
            [prompts[i] for i in batch],
            max_new_tokens,
            steps,
            generator=generators[batch[0]] if generators else None,
            **how,
        )
        answers |= zip(batch, said, strict=True)
        left = left[len(batch) :]
        if on_answer:
            on_answer(len(batch))
    return [answers[i] for i in range(len(prompts))]


# --------------------------------------------------------------------------------------------- main

METHODS = {
    "llada": maskft.Method(
        diffusion_example,
        config=without_causal_mask,
        answer=answer,
        chat=diffuse,
        tiny=maskft.TINY(lr=4e-4, usual_steps=350),
        small=maskft.SMALL(lr=3e-4, most_epochs=80),
        large=maskft.PAPER(lr=1e-5),
    )
}


def main():
    flags = maskft.parse_flags(maskft.arguments(__doc__, METHODS))
    maskft.run_methods(flags, METHODS, models=("tiny-llada", "GSAI-ML/LLaDA-8B-Instruct"))


if __name__ == "__main__":
    maskft.entry_point(main)
