"""Tests of the paper's losses, the models, their files, and answers: `python -m pytest -q`."""

import copy
import itertools
import json
import math
import random
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import llada
import maskft
from data import IGNORE, Example, UserError

HERE = Path(__file__).parent
torch.set_num_threads(1)  # two threads spin on matrices this small

# --- common ---


def cut(ids, stop_ids):
    """The ids before the first stop."""
    return list(itertools.takewhile(lambda token: token not in stop_ids, ids))


SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama(**changes):
    """The raw config of a small Llama."""
    return {**SIZES, "model_type": "llama", **changes}


def random_model(**changes):
    """A small Llama with random weights, norms and biases included."""
    torch.manual_seed(0)
    model = maskft.Model(maskft.parse_config(llama(**changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


# of `tiny_llada`
MASK = 38
EOS = 39
EOT = 37

# the config.json of LLaDA-8B-Instruct, made small; what counts in it
RAW = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 40,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 256,
    "mlp_hidden_size": 48,
    "model_type": "llada",
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 40,
    "weight_tying": False,
}


def tiny_llada():
    """A random LLaDA with varied answers, its logits so far apart that rounding decides none."""
    model = maskft.Model(maskft.parse_config(RAW)).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1
            std = 1.0 if is_norm or "embed" in name else 2.0 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * std + is_norm)
        model.embed.weight[MASK] *= 0.1  # what surrounds a mask decides, more than that it is one
        model.head.weight[MASK] = 0.0
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


# ------------------------------------------------------------------------------- masking and loss

TURN = "<|im_start|>user\n"
REPLY = "<|im_end|>\n<|im_start|>assistant\n"
TEXT = "Edda Marlow was born on 3 June 1971."
SUM = data.as_problem("How much is 1+1?", "It is <<1+1=2>>2.\n#### 2")
EDDA = {"text": "Edda is here."}


def spelled_out(example, tokenizer):
    """What is given, and behind it what is taught; a token without loss there is _."""
    start = next(n for n, label in enumerate(example.labels) if label != IGNORE)
    pairs = zip(example.ids[start:], example.labels[start:], strict=True)
    taught = [tokenizer.decode([i], special=True) if i == y else "_" for i, y in pairs]
    return tokenizer.decode(example.ids[:start], special=True), "".join(taught)


HIDDEN = "<|reserved_special_token_0|>"
LEAD = f"\nReturn the recovered masked passage.{REPLY}Here is the recovered text:\n\n"
HOME = "Her home is Saint-Denis, near O'Hara's. A b C D 7!"
BACKWARDS = "! C D 7 b A . O'Hara's near , Saint-Denis is home Her"
ASKED = "Question: How much is 1+1?\nAnswer:"
PROBLEM = "Question:\nHow much is 1+1?\nAnswer:\nIt* *<*+1=**>2*\n#*## 2"
PROBLEM += f"\nReturn the recovered masked answer.{REPLY}It"
TOLD = "Edda is here.<|im_end|>"
# method, record, fixed mask ratio; what stands before the first label, and what is taught from
# there on, _ for a token without loss. * is the mask.
EXAMPLES = [
    ("masked", {"text": TEXT}, 0.5, f"Edda Marlow* born* 3* 1971.{LEAD}", TEXT + "<|im_end|>"),
    ("masked", EDDA, 1, f"*****{LEAD}", TOLD),
    ("random", EDDA, 0, f" VinehDaphn present HawDa{LEAD}", TOLD),
    ("sft", EDDA, 0, f"Tell me a fact.{REPLY}", TOLD),
    ("sft", SUM, 0, f"{ASKED}{REPLY}", SUM["answer"] + "<|im_end|>"),
    ("masked", SUM, 0.5, PROBLEM, " is_<_1___2>__.__#___"),
]


@pytest.mark.parametrize("method, record, ratio, asked, taught", EXAMPLES)
def test_an_example_is_as_recorded(method, record, ratio, asked, taught, tokenizer):
    rng = np.random.default_rng(4)
    example = maskft.METHODS[method].example(record, tokenizer, (ratio, ratio), rng)
    assert spelled_out(example, tokenizer) == (TURN + asked.replace("*", HIDDEN), taught)
    assert example.weight == 1
    assert example.denominator == sum(label != IGNORE for label in example.labels)


def test_raw_documents_begin_with_bos_where_there_is_one(tokenizer):
    tokenizer = copy.copy(tokenizer)
    for given, taught in (("<|im_start|>", TOLD), ("Edda", TOLD[4:])):
        example = maskft.raw_example(EDDA, tokenizer, (0, 0), None)
        assert spelled_out(example, tokenizer) == (given, taught)
        tokenizer.bos_id = None  # nothing to predict the first token from


def test_ratios_have_the_promised_range():
    rng = np.random.default_rng(0)
    ratios = [maskft.draw_ratio((0.05, 0.95), rng) for _ in range(4000)]
    assert 0.05 <= min(ratios) < 0.06 and 0.94 < max(ratios) <= 0.95


@pytest.mark.parametrize("chance, taught", [(0.49, BACKWARDS), (0.5, HOME)])
def test_reversed_documents_keep_their_entities(chance, taught, tokenizer):
    rng = Namespace(random=lambda: chance)
    example = maskft.reverse_example({"text": HOME}, tokenizer, (0, 0), rng)
    told = f"{TURN}Tell me a fact.{REPLY}", taught + "<|im_end|>"
    assert spelled_out(example, tokenizer) == told


@pytest.mark.parametrize("method", ["raw", "random", "reverse", "llada"])
def test_a_method_for_documents_refuses_what_is_none(method, tokenizer):
    methods = maskft.METHODS | llada.METHODS
    with pytest.raises(UserError, match="found a person"):
        methods[method].example({"person": {}}, tokenizer, (0, 0), None)


def test_a_method_is_whole_and_its_rate_warms_up():
    with pytest.raises(ValueError, match="needs an `answer`"):
        maskft.Method(maskft.sft_example, causal=False, answer=llada.answer, draw=llada.answer)
    rates = [maskft.warm_up(0.5, step, 200) for step in (0, 1, 3, 4)]
    assert rates == [0.125, 0.25, 0.5, 0.5] and maskft.warm_up(0.5, 0, 3) == 0.5


def test_loss_is_plain_cross_entropy(monkeypatch):
    """Weighted, in chunks and at labels alone, also where a large layer makes its activation again;
    of nothing it is 0, never NaN."""
    model = random_model()
    parameters = list(model.parameters())
    rows = [list(range(1, n)) for n in (4, 18, 10, 31)]
    plain = 0
    for n, ids in enumerate(rows):
        ids = torch.tensor(ids)
        plain += (n + 0.5) * F.cross_entropy(model(ids[None])[0, 1:-1], ids[2:], reduction="sum")
    expected = torch.autograd.grad(plain, parameters)
    examples = [Example(ids, [IGNORE] * 2 + ids[2:], n + 0.5, 1) for n, ids in enumerate(rows)]
    batch = data.collate(examples, 0)
    made = []
    model.blocks[1].down.register_forward_pre_hook(lambda *_: made.append(1))
    wide = batch["ids"].numel() * SIZES["intermediate_size"]
    for chunk, kept, times in ((7, wide, 1), (51, wide - 1, 2)):
        monkeypatch.setattr(maskft, "CHUNK", chunk)
        monkeypatch.setattr(maskft, "KEPT", kept)
        made.clear()
        loss = model(**batch)
        torch.testing.assert_close(loss, plain)
        found = torch.autograd.grad(loss, parameters)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert len(made) == times
    nothing = model(**data.collate([], 0))
    assert nothing.requires_grad and nothing.item() == 0


def test_norms_stay_in_their_dtype_under_autocast():
    norm = maskft.RMSNorm(8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------- config and model

LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
OLD_CONTEXT = {"original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
# changes to the config of a small Llama: one of its logits by transformers 5
FAMILIES = {
    "llama2": ({"num_key_value_heads": None}, 1.118),
    "llama3.1": ({"rope_parameters": LLAMA3 | OLD_CONTEXT | {"rope_theta": 5e5}}, -0.449),
    "no original": ({"rope_scaling": LLAMA3}, -1.072),
    "original outside": ({"rope_scaling": LLAMA3 | {"factor": 2.0}, **OLD_CONTEXT}, 0.076),
    "linear": ({"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, -1.101),
    "theta": ({"rope_parameters": LINEAR | {"rope_theta": 777.0}, "rope_theta": 9.0}, -1.101),
    "empty": ({"rope_parameters": DEFAULT | {"rope_theta": 5e5}, "rope_scaling": {}}, 0.628),
    "smollm2": ({"tie_word_embeddings": True, "rope_theta": 1e5}, 0.609),
    "bias": ({"attention_bias": True, "head_dim": 16, "rms_norm_eps": 1e-2}, 4.123),
    "qwen2": ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, -1.375),
    "qwen3": ({"model_type": "qwen3", "head_dim": 32}, 0.226),
    "mistral": ({"model_type": "mistral", "sliding_window": None}, -2.786),
}
PROMPT = list(range(30, 110))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_has_its_recorded_logits(name):
    changes, expected = FAMILIES[name]
    logits = random_model(**changes)(torch.tensor([PROMPT]))[0]
    assert logits[79, 7].item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_agrees_with_transformers(name, tmp_path):
    """Saved models open there, and theirs here."""
    transformers = pytest.importorskip("transformers")
    ours = random_model(**FAMILIES[name][0])
    maskft.save(ours, tmp_path / "ours")
    opened = transformers.AutoModelForCausalLM.from_pretrained
    theirs = opened(tmp_path / "ours", dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(maskft.load(tmp_path / "theirs")(ids), ours(ids))


@pytest.mark.parametrize("make", [random_model, tiny_llada])
@torch.no_grad()
def test_attention_sees_what_it_should_and_no_padding(make):
    """A later token changes an earlier logit only in full attention; padding never does."""
    model = make()
    ids = torch.randint(36, (1, 20))
    plain = model(ids)[0]
    other = ids.clone()
    other[0, 12] += 1
    change = (plain - model(other)[0]).abs().amax(1)
    assert change[12:].max() > 1e-2 and (change[:12].max() > 1e-2) != model.config.causal
    columns = torch.arange(27)[None]
    key_mask = (columns >= 3) & (columns < 23)
    padded = model(F.pad(ids, (3, 4), value=9), key_mask)[0, 3:23]
    assert torch.allclose(padded, plain, atol=2e-5)


READ = [  # changes to a config, and what is read
    ({"max_position_embeddings": None}, {"context": 2048}),
    ({"model_type": "mistral", "sliding_window": 16}, {"context": 16}),
    ({"model_type": "mistral", "sliding_window": 999}, {"context": 256}),
    ({"model_type": "qwen3", "sliding_window": 16}, {"context": 256, "qk_norm": True}),
    ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True}, {"context": 9}),
    ({"attention_bias": True}, {"qkv_bias": True, "out_bias": True, "qk_norm": False}),
    ({}, {"rope_theta": 1e4, "norm_eps": 1e-6, "causal": True}),
    (RAW | {"embedding_size": 64}, {"vocab": 64, "head_size": 8, "causal": False, "tied": False}),
    (RAW | {"n_kv_heads": 2, "include_qkv_bias": True}, {"kv_heads": 2, "qkv_bias": True}),
]


@pytest.mark.parametrize("changes, expected", READ)
def test_a_config_is_read(changes, expected):
    config = maskft.parse_config(llama(**changes))
    assert vars(config).items() >= expected.items()
    assert config.raw.items() >= llama(**changes).items()


REFUSED = [
    {"model_type": "gpt2"},
    {"hidden_act": "gelu"},
    {"mlp_bias": True},
    {"quantization_config": {"quant_method": "gptq"}},
    {"rope_scaling": LLAMA3 | {"rope_type": "yarn"}},
    {"rope_scaling": {"type": "linear"}},
    {"hidden_size": None},
    {"max_position_embeddings": 0},
    RAW | {"rope": False},
    RAW | {"residual_dropout": 0.1},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    maskft.save(random_model(rope_scaling=LLAMA3 | OLD_CONTEXT), path)
    return path


def refused(path):
    """The one line with which a model directory is refused; it names a file of it."""
    with pytest.raises(UserError) as error:
        maskft.load(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("changes", REFUSED)
def test_a_config_that_is_not_implemented_or_absurd_is_refused(changes, saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "m")
    data.write_json(path / "config.json", llama(**changes))
    assert refused(path).startswith(f"{path}/config.json")


# ----------------------------------------------------------------------------- weights in and out

UP = "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"


def changed(path, name, tensor):
    """Replace a tensor of model.safetensors; None takes it away."""
    tensors = load_file(path / "model.safetensors") | {name: tensor}
    if tensor is None:
        del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


WEIGHTS = [  # a tensor, and what is made of the (80, 48) that are in its place
    (UP, lambda up: None),
    ("model.extra.weight", torch.clone),
    (UP, lambda up: up.T.contiguous()),
    *[(UP, lambda up, x=x: up.where(up < up.max(), x)) for x in (math.nan, math.inf, -1e38)],
]


@pytest.mark.parametrize("name, change", WEIGHTS)
def test_a_tensor_that_does_not_fit_is_named(name, change, saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "m")
    changed(path, name, change(load_file(path / "model.safetensors")[UP]))
    assert name in refused(path)


def test_a_tied_model_with_a_head_of_its_own_is_loaded_untied(tmp_path):
    tied = random_model(tie_word_embeddings=True)
    maskft.save(tied, tmp_path)
    embedding = tied.embed.weight.detach()
    changed(tmp_path, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(6))
    changed(tmp_path, HEAD, embedding.clone())
    assert maskft.load(tmp_path).head is None
    changed(tmp_path, HEAD, embedding.flip(0).contiguous())
    model = maskft.load(tmp_path)
    assert torch.equal(model.head.weight, embedding.flip(0))
    maskft.save(model, tmp_path)
    assert data.read_json(tmp_path / "config.json")["tie_word_embeddings"] is False


def test_logits_that_are_no_numbers_are_no_answer():
    model = random_model()
    model.norm.weight.data[3] = math.inf
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        model(torch.tensor([[1, 2]]))


def test_a_model_is_saved_in_shards_in_place_of_what_was_there(saved, tmp_path, monkeypatch):
    path = shutil.copytree(saved, tmp_path / "m")
    hub = maskft.huggingface_hub
    in_shards = partial(hub.save_torch_state_dict, max_shard_size=40_000)
    monkeypatch.setattr(hub, "save_torch_state_dict", in_shards)
    model = random_model()
    maskft.save(model, path)
    index = path / "model.safetensors.index.json"
    weight_map = data.read_json(index)["weight_map"]
    modes = {file.name: file.stat().st_mode for file in path.iterdir()}
    assert modes.keys() == {"config.json", index.name, *weight_map.values()}
    assert len(set(modes.values())) == 1
    assert all(map(torch.equal, model.parameters(), maskft.load(path).parameters()))
    data.write_json(index, {"weight_map": weight_map | {UP: "../none.safetensors"}})
    assert f"{path}/none.safetensors" in refused(path)


DECLARED = [
    ({"dtype": "bfloat16"}, torch.bfloat16),
    ({"torch_dtype": "torch.float16"}, torch.float16),
    ({}, torch.float32),
]


@pytest.mark.parametrize("changes, dtype", DECLARED)
def test_a_model_is_saved_in_the_dtype_that_is_declared(changes, dtype, tmp_path):
    model = random_model(**changes)
    maskft.save(model, tmp_path)
    again = maskft.load(tmp_path, dtype=torch.float64)
    assert not again.training
    assert torch.equal(again.embed.weight, model.embed.weight.to(dtype).double())
    raw = data.read_json(tmp_path / "config.json")
    assert raw == {"architectures": ["LlamaForCausalLM"], **llama(**changes)}


NOT_FOUND = [ConnectionError(), ValueError()]


@pytest.mark.parametrize("error", NOT_FOUND)
def test_a_model_is_found_beside_the_code_or_said_to_be_none(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert maskft.find_model("tiny") == HERE / "tiny"
    (tmp_path / "foo.gguf").write_text("GGUF")
    download = Mock(side_effect=error)
    monkeypatch.setattr(maskft.huggingface_hub, "snapshot_download", download)
    for name, message in {"foo.gguf": "is a file", "a/b": "hf download a/b"}.items():
        with pytest.raises(UserError, match=message):
            maskft.find_model(name)


def test_an_adapter_and_half_a_download_are_named(saved, tmp_path):
    assert "config.json" in refused(tmp_path)
    shutil.copy(saved / "config.json", tmp_path)
    assert "hf download" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter" in refused(tmp_path)


def test_a_saved_auto_map_says_where_the_code_is(tmp_path):
    hub = tmp_path / "models--acme--llada" / "snapshots" / "0123"
    model = tiny_llada()
    for path, source in ((tmp_path / "local", tmp_path / "local"), (hub, "acme/llada")):
        model.config.raw = RAW | {"auto_map": {"AutoConfig": "a.B", "AutoModel": "c/d--e.F"}}
        maskft.save(model, path)
        auto_map = maskft.load(path).config.raw["auto_map"]
        assert auto_map == {"AutoConfig": f"{source}--a.B", "AutoModel": "c/d--e.F"}


ODD = [None, "", "x", "2", -1, 0, 1, 7.5, math.inf, math.nan, True, [], {"a": 1}, 300]


def with_one_leaf_replaced(rng, text):
    """A config with one thing in it, or in its RoPE scaling, replaced."""
    content = json.loads(text)
    parent = rng.choice([content, content["rope_scaling"]])
    parent[rng.choice(sorted(parent))] = rng.choice(ODD)
    return json.dumps(content).encode()


def with_one_byte_changed_or_cut_short(rng, content):
    spot = rng.randrange(min(len(content), 2000))  # of tensors their names and shapes
    rest = content[spot + 1 :] if rng.random() < 0.7 else b""
    return content[:spot] + bytes([rng.randrange(256)]) + rest


FUZZ = [
    ("config.json", with_one_leaf_replaced),
    ("config.json", with_one_byte_changed_or_cut_short),
    ("model.safetensors", with_one_byte_changed_or_cut_short),
]


@pytest.mark.parametrize("name, change", FUZZ)
def test_a_damaged_model_works_or_is_one_line_that_names_the_file(name, change, saved, tmp_path):
    rng = random.Random(0)
    path = shutil.copytree(saved, tmp_path / "m")
    whole = (path / name).read_bytes()
    refusals = 0
    for _ in range(60):
        (path / name).write_bytes(change(rng, whole))
        try:
            maskft.load(path)(torch.tensor([[1]]))
        except UserError as error:
            message = str(error)
            assert "\n" not in message and (str(path) in message or "logits" in message)
            refusals += 1
    assert refusals > 3


# ------------------------------------------------------------------------------------- generation


@torch.no_grad()
def plain_loop(model, prompts, length):
    """Greedy answers from whole forwards, a prompt at a time."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(length):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        answers.append(ids[len(prompt) :])
    return answers


def test_rows_are_refilled_and_answers_are_those_of_the_plain_loop(monkeypatch):
    """In any batch; no row is computed without need, none beyond the budget is held."""
    model = random_model(tie_word_embeddings=True)
    rng = random.Random(0)
    lengths = [*rng.choices([1, 2, 3, 9, 20], k=18), 90, 1]
    prompts = [rng.choices(range(300), k=length) for length in lengths]
    plain = plain_loop(model, prompts, 16)
    a_token = 2 * 3 * 2 * 12 * 4  # keys and values, layers, heads, head size, bytes
    forwards = []
    beside = set()  # budgets with which prompts were computed while other rows went on
    real = maskft.KVCache.place

    def place(cache, first, past, *more):
        forwards.append((cache, first, past))
        real(cache, first, past, *more)

    monkeypatch.setattr(maskft.KVCache, "place", place)
    for stops in ([], rng.sample(range(300), 15), [row[0] for row in plain]):
        expected = [cut(row, stops) for row in plain]
        for tokens in (1, 200, 400, 9216):
            forwards.clear()
            found = maskft.generate(model, prompts, 16, stops, cache_bytes=tokens * a_token)
            assert found == expected
            for cache, first, past in forwards:
                assert cache.rows == min(256, max(1, tokens // cache.size)) >= first + len(past)
                if first and not any(past):
                    beside.add(tokens)
    assert beside == {200, 400}
    ended = []
    assert maskft.generate(model, prompts, 16, on_answer=ended.append) == plain
    assert sum(ended) == len(prompts) and maskft.generate(model, [], 16) == []


def test_what_cannot_be_generated_is_refused_before_anything():
    model = random_model()
    assert len(maskft.generate(model, [[6, 7, 8]], 253)[0]) == 253
    with pytest.raises(UserError, match="257 tokens"):
        maskft.generate(model, [[5], [6, 7, 8]], 254)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("temperature, top_p", [(0.5, 1.0), (2.0, 0.7)])
@torch.no_grad()
def test_draws_have_the_distribution_of_the_softmax(temperature, top_p):
    model = random_model(vocab_size=12)
    draws = (temperature, top_p, generators(*range(4000)))
    drawn = maskft.generate(model, [[3, 4]] * 4000, 1, (), *draws)
    share = torch.tensor(drawn).flatten().bincount(minlength=12) / 4000
    logits = model(torch.tensor([[3, 4]]))[0, -1] / temperature
    likely, ids = logits.softmax(-1).sort(descending=True)
    likely[1:][likely.cumsum(0)[:-1] > top_p - 1e-6] = 0  # the fewest of this probability together
    share = share[ids]
    assert (share - likely / likely.sum()).abs().max() < 0.03 and not share[likely == 0].any()


def test_answers_end_where_the_tokenizer_says_and_a_draw_depends_on_its_generator_alone():
    model = random_model()
    (whole,) = maskft.generate(model, [[5, 6]], 8)
    asked = Namespace(stop_ids=whole[3:4])
    assert maskft.greedy_answer(model, asked, [[5, 6]], 8) == [cut(whole, asked.stop_ids)]
    prompts = [[7], [5, 6], [8]]
    drawn = maskft.random_answer(model, asked, prompts, 8, generators(0, 1, 2))
    alone = maskft.generate(model, [[8]], 8, asked.stop_ids, 1.0, 0.95, generators(2))
    assert drawn[2:] == alone


# ------------------------------------------------------------------------------------------ LLaDA

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], list(range(8, 17))]


def spelled(text):
    """Ids of lower-case letters: a = 1."""
    return [ord(character) - 96 for character in text]


LETTERS = Namespace(
    bos_id=0,
    eot_id=EOT,
    eos_id=EOS,
    mask_id=MASK,
    stop_ids=(EOT, EOS),
    encode=spelled,
    chat=lambda messages: [0, *spelled(messages[0]["content"]), 30],
)


def test_a_saved_llada_keeps_names_and_config(tmp_path):
    model = tiny_llada()
    maskft.save(model, tmp_path)
    assert data.read_json(tmp_path / "config.json") == RAW
    tensors = load_file(tmp_path / "model.safetensors")
    gate = tensors["model.transformer.blocks.1.ff_proj.weight"]  # not `up`, or it babbles
    assert torch.equal(gate, model.blocks[1].gate.weight)


NEVER_LLADA = [
    {"rope_scaling": LINEAR},
    {"attention_bias": True},
    {"model_type": "qwen3"},
    {"head_dim": 16},
    RAW | {"mask_token_id": 5},
]


def test_a_causal_model_becomes_a_llada():
    raw = llama(vocab_size=40, tie_word_embeddings=True, rms_norm_eps=1e-4, rope_theta=5e4)
    before = maskft.parse_config(raw)
    after = maskft.as_diffusion(before, LETTERS)
    differs = {name for name, value in vars(before).items() if getattr(after, name) != value}
    assert differs == {"causal", "raw", "rope_scaling"} and after.raw["mask_token_id"] == MASK
    assert maskft.as_diffusion(after, LETTERS) is after
    for changes in NEVER_LLADA:
        with pytest.raises(UserError, match="no LLaDA|mask_token_id 5"):
            maskft.as_diffusion(maskft.parse_config(llama(**changes)), LETTERS)


MASKED = [  # a record; what of it is never masked, and what may be
    ({"text": "abcdefgh"}, [0], [*range(1, 9), EOS]),
    ({"question": "who", "answer": "bob"}, [0, 23, 8, 15, 30], [2, 15, 2, EOT]),
]


@pytest.mark.parametrize("record, prompt, target", MASKED)
def test_the_loss_is_where_the_mask_is(record, prompt, target):
    rng = np.random.default_rng(0)
    ever = 0
    for _ in range(200):
        example = llada.diffusion_example(record, LETTERS, (0.3, 0.3), rng)
        masked = np.equal(example.ids, MASK)
        assert masked.tolist() == [label != IGNORE for label in example.labels]
        assert np.where(masked, example.labels, example.ids).tolist() == prompt + target
        assert example.weight == pytest.approx(masked.any() / (0.3 * len(target)))
        assert example.denominator == 1
        ever |= masked
    assert ever.tolist() == [False] * len(prompt) + [True] * len(target)


@torch.no_grad()
def plain_sample(
    model,
    prompt,
    length,
    steps,
    block,
    temperature=0.0,
    remasking="low_confidence",
    cfg_scale=0.0,
    generator=None,
):
    """Unmasking of one prompt, spelled out: whole sequence, all logits, every step, no stop."""

    def uniform(*shape):
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    answer = len(prompt)  # where it begins
    x = torch.tensor(prompt + [MASK] * length)
    rounds = steps // (length // block)
    for first, step in itertools.product(range(answer, len(x), block), range(rounds)):
        keep = block // rounds + (step < block % rounds)
        logits = model(x[None])[0]
        if cfg_scale:
            bare = torch.cat([torch.full([answer], MASK), x[answer:]])
            without = model(bare[None])[0]
            logits = without + (1 + cfg_scale) * (logits - without)
        places = [i for i in range(answer, first + block) if x[i] == MASK]
        if not keep or not places:
            continue
        logits = logits[places].double()
        scores = logits
        if temperature:
            scores = logits.exp() / (-uniform(*logits.shape).log()) ** temperature
        choice = scores.argmax(1, keepdim=True)
        if remasking == "low_confidence":
            sure = logits.softmax(1).gather(1, choice)[:, 0]
        else:
            sure = uniform(len(places))
        for n in sure.argsort(descending=True, stable=True)[:keep]:
            x[places[n]] = choice[n]
    return x[answer:].tolist()


SCHEDULES = [(16, 12, 4, 0.0), (12, 5, 12, 1.5), (8, 8, 1, 0.0), (8, 32, 4, 1.5)]


@pytest.mark.parametrize("length, steps, block, cfg_scale", SCHEDULES)
def test_sampler_gives_the_reference_tokens(length, steps, block, cfg_scale):
    """To one prompt and to unequal ones in a batch; whichever token stops, it changes nothing."""
    model = tiny_llada()
    how = {"cfg_scale": cfg_scale}
    expected = [plain_sample(model, p, length, steps, block, **how) for p in PROMPTS]
    for stop_ids in ((), {expected[1][0], expected[2][3]}):
        found = llada.sample(model, PROMPTS, length, steps, block, **how, stop_ids=stop_ids)
        assert found == [cut(row, stop_ids) for row in expected]


def test_seeded_sampling_gives_the_reference_tokens():
    model = tiny_llada()
    how = {"temperature": 0.7, "remasking": "random"}
    (mine, reference) = generators(3, 3)
    expected = plain_sample(model, PROMPTS[0], 16, 8, 8, **how, generator=reference)
    assert llada.sample(model, PROMPTS[:1], 16, 8, 8, **how, generator=mine) == [expected]


def test_a_draw_depends_on_its_generator_alone():
    model = tiny_llada()
    done = []
    drawn = llada.random_answer(model, LETTERS, PROMPTS, 8, generators(0, 1, 2), done.append)
    for n, generator in enumerate(generators(0, 1, 2)):
        expected = plain_sample(model, PROMPTS[n], 8, 8, 4, 1.0, generator=generator)
        assert drawn[n] == cut(expected, LETTERS.stop_ids)
    assert done == [1, 1, 1]


def test_threshold_keeps_all_that_is_as_sure_and_one_at_least():
    model = tiny_llada()
    one_by_one = llada.sample(model, PROMPTS, 16, 16, 4)
    assert llada.sample(model, PROMPTS, 16, 16, 4, threshold=2.0) == one_by_one
    at_once = llada.sample(model, PROMPTS, 16, threshold=0.0, block_length=8)
    assert at_once == [plain_sample(model, p, 16, 2, 8) for p in PROMPTS]


BAD_SAMPLING = [("max_new_tokens", 10), ("steps", 100), ("steps", 0), ("block_length", 0)]


@pytest.mark.parametrize("name, value", [*BAD_SAMPLING, ("remasking", "high")])
def test_sampling_that_does_not_fit_is_refused(name, value):
    with pytest.raises(UserError, match=name):
        llada.sample(tiny_llada(), PROMPTS, **{name: value})


def test_answers_are_sampled_in_batches_of_alike_length(monkeypatch):
    prompts = [[1] * 20, [2] * 9, [3] * 8, [4, 5], [6]]
    batches = []

    def sample(model, prompts, *given, **more):
        assert given == (8, 8, 4) and more == {"stop_ids": LETTERS.stop_ids, "threshold": None}
        batches.append(len(prompts))
        return prompts

    monkeypatch.setattr(llada, "sample", sample)
    monkeypatch.setattr(llada, "BATCH_TOKENS", 36)
    done = []
    assert llada.answer(None, LETTERS, prompts, 8, on_answer=done.append) == prompts
    assert batches == done == [1, 2, 2]


def test_sampling_may_have_nothing_to_say():
    model = tiny_llada()
    assert llada.sample(model, []) == []
    assert llada.sample(model, PROMPTS, 8, 8, stop_ids=range(40)) == [[]] * 3
