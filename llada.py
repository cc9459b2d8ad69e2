"""LLaDA: the same facts taught to a masked diffusion model, the paper's other half.

    python llada.py                                       # laptop: fine-tune the built-in diffusion model, tiny-llada
    torchrun --nproc_per_node 8 llada.py --data bio       # eight GPUs: LLaDA-8B-Instruct, the paper's settings
    python eval.py --model out/bio-llada-1                # answer and score: eval.py knows a diffusion model by its config

A diffusion model fills in masked tokens. It is the decoder of maskft.py, trained by the loop of maskft.py, but for three
differences to the autoregressive (AR) one, each a section below:
  1. no causal mask: every token sees every other, so a gap is filled from both sides (`causal=False` in the config);
  2. the loss is on the masked tokens of the text itself, weighted by 1/ratio: a bound on the text's log-likelihood;
  3. an answer is decoded by unmasking: all of it starts masked, and each step keeps the tokens the model is surest of.

LLaDA is arXiv 2502.09992; "reference" below means its released `generate.py` and `GUIDELINES.md`.
"""

from itertools import product, takewhile

import torch

import maskft
from data import IGNORE, Example, UserError

# --------------------------------------------------------------------------------------------- config and weight names

# our name: the name in the checkpoint, as maskft.LLAMA_NAMES; the MLP is ff_out(silu(ff_proj h) * up_proj h)
LLADA_NAMES = {
    "embed": "model.transformer.wte",
    "blocks.{}.attn_norm": "model.transformer.blocks.{}.attn_norm",
    "blocks.{}.q": "model.transformer.blocks.{}.q_proj",
    "blocks.{}.k": "model.transformer.blocks.{}.k_proj",
    "blocks.{}.v": "model.transformer.blocks.{}.v_proj",
    "blocks.{}.o": "model.transformer.blocks.{}.attn_out",
    "blocks.{}.mlp_norm": "model.transformer.blocks.{}.ff_norm",
    "blocks.{}.gate": "model.transformer.blocks.{}.ff_proj",  # not up_proj: swapped, the model loads and babbles
    "blocks.{}.up": "model.transformer.blocks.{}.up_proj",
    "blocks.{}.down": "model.transformer.blocks.{}.ff_out",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}

# What LLaDA-8B-Base, -Instruct and LLaDA-1.5 have in common; another value would be another model. They are written out
# for a new model, because the published configuration class defaults to a GPT-2 with dropout.
PUBLISHED = {
    "activation_type": "silu", "alibi": False, "attention_dropout": 0.0, "attention_layer_norm": False,
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "embedding_dropout": 0.0,
    "include_bias": False, "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "residual_dropout": 0.0, "rope": True, "rope_full_precision": True, "scale_logits": False,
}  # fmt: skip


def parse_config(raw):
    """The Config in a LLaDA config.json; UserError names a field whose value is not implemented."""
    allowed = {field: (value,) if value else (value, None) for field, value in PUBLISHED.items()}
    absent = dict.fromkeys(["clip_qkv", "rope_scaling", "quantization_config"], (None,))
    maskft.refuse_unless(raw, multi_query_attention=(None, False), **allowed, **absent)
    width, heads = raw["d_model"], raw["n_heads"]
    vocab = raw.get("embedding_size") or raw["vocab_size"]  # the rows there are; vocab_size may count fewer
    if not 0 <= raw["mask_token_id"] < vocab:
        raise UserError(f"mask_token_id = {raw['mask_token_id']} is not one of the {vocab} embeddings")
    return maskft.Config(
        vocab=vocab,
        width=width,
        layers=raw["n_layers"],
        heads=heads,
        kv_heads=raw.get("n_kv_heads") or heads,
        head_size=width // heads,
        mlp_width=raw.get("mlp_hidden_size") or raw.get("mlp_ratio", 4) * width,
        context=raw.get("max_sequence_length", 1024),
        norm_eps=raw.get("rms_norm_eps", 1e-5),
        rope_theta=float(raw.get("rope_theta", 10000.0)),
        rope_scaling={},
        tied=raw.get("weight_tying", True),
        qkv_bias=bool(raw.get("include_qkv_bias")),
        causal=False,
        raw=raw,
    )


def from_causal(raw, mask_id, eos_id):
    """The LLaDA config.json of a Llama's: its weights fit, with the causal mask off, to start diffusion training from."""
    c = maskft.parse_config(raw)
    if c.out_bias or c.qk_norm or c.rope_scaling or c.head_size * c.heads != c.width:
        raise UserError(
            f"this {raw['model_type']} cannot become a LLaDA, whose config has no output bias, query and key norms, "
            "RoPE scaling, or head size other than width / heads"
        )
    return PUBLISHED | {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": c.width, "n_layers": c.layers,
        "n_heads": c.heads, "n_kv_heads": c.kv_heads, "mlp_hidden_size": c.mlp_width, "vocab_size": c.vocab,
        "embedding_size": c.vocab, "max_sequence_length": c.context, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
        "weight_tying": c.tied, "include_qkv_bias": c.qkv_bias, "mask_token_id": mask_id, "eos_token_id": eos_id,
        "bos_token_id": raw.get("bos_token_id"),
        "pad_token_id": eos_id, "torch_dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
    }  # fmt: skip


def check_or_adapt(config, tokenizer):
    """The Config to train: a LLaDA's as it is, an autoregressive model's with the causal mask off, said aloud."""
    if config.causal:
        maskft.say("an autoregressive model: its weights are where diffusion training starts, with the causal mask off")
        return parse_config(from_causal(config.raw, tokenizer.mask_id, tokenizer.eos_id))
    if config.raw["mask_token_id"] != tokenizer.mask_id:
        raise UserError(f"config.json says mask_token_id {config.raw['mask_token_id']}, the tokenizer {tokenizer.mask_id}")
    return config


# ----------------------------------------------------------------------------------------------- difference 2: the loss

def diffusion_example(record, tokenizer, mask_ratio, rng):
    """A document as `bos document end-of-text`, of which bos is never masked and the end may be [paper eq. 1]; a question
    with its answer as a chat, of which the prompt is never masked and the end of turn may be."""
    if "question" not in record:
        bos, text = [] if tokenizer.bos_id is None else [tokenizer.bos_id], maskft.text_of(record)
        return diffuse(bos, tokenizer.encode(text) + [tokenizer.eos_id], tokenizer.mask_id, mask_ratio, rng)
    prompt = tokenizer.chat([{"role": "user", "content": record["question"]}])
    return diffuse(prompt, tokenizer.encode(record["answer"]) + [tokenizer.eot_id], tokenizer.mask_id, mask_ratio, rng)


def diffuse(prompt, target, mask_id, mask_ratio, rng):
    """The Example whose weighted cross entropy is one draw of the bound on -log p(target | prompt) / len(target)."""
    # 1. One ratio per sequence: the bound is an expectation over ratios, and a batch then covers many of them.
    ratio = maskft.draw_ratio(mask_ratio, rng)
    # 2. Mask the target, never the prompt: what is asked for is p(target | prompt), and bos is always known.
    masked, hit = maskft.mask_tokens(target, ratio, mask_id, rng)
    # 3. Predict in place. Loss on masked tokens only: the others stand in the input, to copy them teaches nothing.
    labels = [token if h else IGNORE for token, h in zip(target, hit)]
    # 4. Divide by ratio and length: a token is masked with probability `ratio`, so 1/ratio makes every ratio's expected
    #    loss the same size (ln V at a uniform model), and 1/length makes it a mean over tokens.
    # 5. If nothing was masked the sequence adds 0 to the loss and still 1 to what it is divided by: drawing again until
    #    something is masked would make the expectation too large, most of all for short texts. Never 0/0 either.
    weight = 1.0 / (ratio * len(target)) if hit.any() else 0.0
    # 6. Average over the global batch: each sequence has a share of 1, whatever its length.
    return Example(prompt + masked, [IGNORE] * len(prompt) + labels, weight=weight, share=1.0)


# -------------------------------------------------------------------------------------------- difference 3: the sampler


@torch.no_grad()
def sample(model, prompts, max_new_tokens=128, steps=128, block_length=4, temperature=0.0, remasking="low_confidence",
           cfg_scale=0.0, stop_ids=(), generator=None, threshold=None):
    """Iterative unmasking of a batch: lists of ids in, lists of new ids out, each cut before its first stop id.

    The answer is max_new_tokens masks behind the prompt, filled block by block from left to right. Each of a block's
    steps predicts all its masks, and keeps the predictions of highest probability (remasking="low_confidence") or any
    ("random"); the others stay masked. Later blocks stay in the sequence, masked: the model sees how much room is left.

    temperature  0 = the likeliest token; else a draw from softmax(logits / temperature)
    cfg_scale    > 0: classifier-free guidance, away from what the model says without the prompt
    threshold    approximate and faster: keep every prediction at least this probable, one a step at least; `steps`
                 is not used

    Tokens are the reference's, sooner: logits are computed at the block's masks only, and a row leaves the batch once
    its text has ended. That changes nothing: a token that stands is never changed again.
    """
    if remasking not in ("low_confidence", "random"):
        raise UserError(f"remasking {remasking!r} is not one of low_confidence, random")
    counts = tokens_per_step(max_new_tokens, steps, block_length, threshold)
    if not prompts:
        return []
    device, mask_id, width = next(model.parameters()).device, model.config.raw["mask_token_id"], max(map(len, prompts))
    # prompts are padded on the left, so that the blocks of all rows are the same columns
    padding = [width - len(p) for p in prompts]
    ids = [[mask_id] * n + p + [mask_id] * max_new_tokens for n, p in zip(padding, prompts)]
    ids = torch.tensor(ids, device=device)  # (B, T)
    key_mask = torch.arange(ids.shape[1], device=device) >= torch.tensor(padding, device=device)[:, None]  # (B, T)
    stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    rows = torch.arange(len(prompts), device=device)  # the prompt that each row of the shrinking batch answers
    answers = ids[:, width:].clone()
    ends = range(width + block_length, ids.shape[1] + 1, block_length)  # where each block ends
    for end, count in product(ends, counts):
        masks = ids == mask_id  # anew in every step: a model may predict the mask token itself, which leaves a mask
        masks[:, :width] = False  # a slip of the reference: it fills in masks of the prompt too
        masks[:, end:] = False
        if threshold is not None and not maskft.any_goes_on(model, masks.any()):
            continue  # this block was done in fewer steps
        logits = predict(model, ids, key_mask, masks, width, cfg_scale)  # (N, V)
        new = gumbel(logits, temperature, generator).argmax(-1)  # (N,)
        if remasking == "random":
            score = torch.rand(new.shape, dtype=torch.float64, device=device, generator=generator)
        else:
            # in float64: near 1 the probabilities of several tokens are one number in fp32, and by the dozen in bf16
            score = logits.double().softmax(-1).gather(-1, new[:, None])[:, 0]
        ids = keep_best(ids, masks, new, score, count, threshold)
        answers[rows] = ids[:, width:]
        text = (ids[:, width:] != mask_id).cumprod(1).bool()  # what stands before the first mask
        going = ~(text & torch.isin(ids[:, width:], stop)).any(1)  # a stop id behind a mask ends nothing yet
        if not maskft.any_goes_on(model, going.any()):
            break
        if going.any():  # else other ranks go on: a row that has ended may, too
            ids, key_mask, rows = ids[going], key_mask[going], rows[going]
    return [list(takewhile(lambda token: token not in stop_ids, row)) for row in answers.tolist()]


def tokens_per_step(max_new_tokens, steps, block_length, threshold=None):
    """How many tokens each step of a block keeps, the larger numbers first: 4 tokens in 3 steps are [2, 1, 1]."""
    if block_length < 1 or max_new_tokens < 1 or max_new_tokens % block_length:
        raise UserError(f"max_new_tokens {max_new_tokens} is not a positive multiple of block_length {block_length}")
    if threshold is not None:
        return [1] * block_length  # one at least
    blocks = max_new_tokens // block_length
    if steps < 1 or steps % blocks:
        raise UserError(f"steps {steps} is not a positive multiple of the {blocks} blocks of {block_length} tokens")
    each, more = divmod(block_length, steps // blocks)
    return [c for c in (each + (i < more) for i in range(steps // blocks)) if c]  # a step that keeps nothing is no step


def predict(model, ids, key_mask, where, width, cfg_scale):
    """Logits (N, V) at `where`; with guidance, pushed away from those for a prompt that is all masks.

    A slip of the reference: guidance without an attention mask reads a variable that was never set.
    """
    if not cfg_scale:
        return model(ids, key_mask, pick=where)
    blind = ids.clone()
    blind[:, :width] = model.config.raw["mask_token_id"]
    both = model(torch.cat([ids, blind]), key_mask.repeat(2, 1), pick=where.repeat(2, 1))  # (2N, V)
    seen, unseen = both.chunk(2)
    return unseen + (cfg_scale + 1) * (seen - unseen)


def gumbel(logits, temperature, generator):
    """Logits whose argmax is a draw from softmax(logits / temperature); temperature 0 leaves them alone.

    float64, as in the reference: in fp32 the noise is cut off above, and draws are less random than they should be
    (arXiv 2409.02908).
    """
    if temperature == 0:
        return logits
    uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    return logits.double() - temperature * torch.log(-torch.log(uniform))


def keep_best(ids, masks, new, score, count, threshold):
    """ids (B, T) with some of its masks filled: per row the `count` of highest score, and all from `threshold` on.

    masks (B, T) bool has N places, new (N,) the predictions for them and score (N,) how good each is.
    """
    scores = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=ids.device).masked_scatter(masks, score)  # (B, T)
    kept = torch.zeros_like(masks).scatter(1, scores.topk(count, dim=1).indices, True)
    if threshold is not None:
        kept |= scores >= threshold
    # a row with fewer masks than `count` keeps places that are none, with the tokens they have
    return torch.where(kept, ids.masked_scatter(masks, new), ids)


def answer(model, tokenizer, prompts, max_new_tokens=128, steps=None, block_length=4, threshold=None):
    """Answers of a diffusion model with the paper's settings [A.4]: a step a token, blocks of 4, temperature 0.

    differs from masked_arLLM: an answer is cut at the end of its turn too, not only at the end of text.
    """
    steps = max_new_tokens if steps is None else steps
    return sample(model, prompts, max_new_tokens, steps, block_length, stop_ids=tokenizer.stop_ids, threshold=threshold)


# ----------------------------------------------------------------------------------------------------------------- main


def main():
    args = maskft.parse_flags(maskft.arguments(__doc__, methods=False))
    builders = {"llada": diffusion_example}
    if args.bench and args.model and maskft.read_config(maskft.find_model(args.model)).causal:
        builders = {"sft": maskft.sft_example, **builders}  # to compare with; a diffusion model has no ordinary fine-tuning
    args.method = list(builders)
    maskft.run_methods(args, builders, default=("tiny-llada", "GSAI-ML/LLaDA-8B-Instruct"))


if __name__ == "__main__":
    import llada  # the module, not this __main__ copy of it

    maskft.entry_point(llada.main)
