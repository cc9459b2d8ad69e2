"""Models as people have them, and the directories that training writes."""

# --- copied fixtures
import contextlib
import copy
import dataclasses
import gc
import json
import multiprocessing
import os
import random
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import llada
import maskft
from data import UserError

HERE = Path(__file__).parent
torch.set_num_threads(1)


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def forked(script, *flags, status=0, before=lambda: None):
    """What the main() of a module prints in a fork, which saves the seconds of importing."""

    def body():
        gc.freeze()
        os.dup2(log.fileno(), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = log
        sys.argv = [f"{script.__name__}.py", *map(str, flags)]
        data.huggingface_hub.constants.HF_HUB_OFFLINE = True
        before()
        maskft.entry_point(script.main)

    with tempfile.TemporaryFile("w+") as log:
        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
        process.join(100)
        process.kill()
        process.join()
        log.seek(0)
        printed = log.read()
    assert process.exitcode == status, printed
    assert "Traceback" not in printed, printed
    return printed


# --- end
SPECIAL = {
    "llama3": "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "llada": "<|startoftext|> <|endoftext|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "chatml": "<|endoftext|> <|im_start|> <|im_end|>",
    "both": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> "
    "<|im_end|>",
}
SPARE = "<|reserved_special_token_0|>"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ"]
TOKENS = [*data.ALPHABET, *("".join(pair.split()) for pair in MERGES)]  # 263 ordinary ones
SPLIT = {"type": "Split", "pattern": {"Regex": data.LLAMA3_PIECES}, "behavior": "Isolated"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SIZES = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def added(text, i, special=True, **flags):
    usual = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": i, "content": text, **usual, "special": special} | flags


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def model_directory(path, special="chatml", more=(), normalizer=None, sides=None, **config):
    """A model directory of 5,000 random weights.

    more    further added tokens, {"content", ...}
    sides   {file name: its content} of other files
    config  fields of config.json other than SIZES; None = absent
    """
    path.mkdir(exist_ok=True)
    names = [*SPECIAL[special].split(), SPARE]
    tokens = [added(name, len(TOKENS) + n) for n, name in enumerate(names)]
    tokens += [added(**token) for token in more]
    content = {
        "version": "1.0",
        "added_tokens": tokens,
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [SPLIT | {"invert": False}, BYTES],
        },
        "post_processor": None,
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "vocab": {token: i for i, token in enumerate(TOKENS)},
            "merges": MERGES,
        },
    }
    raw = SIZES | {"vocab_size": len(TOKENS) + len(tokens)} | config
    raw = {name: value for name, value in raw.items() if value is not None}
    torch.manual_seed(0)
    rows = len(TOKENS) + len(tokens)
    model = maskft.Model(maskft.parse_config(SIZES | {"vocab_size": rows}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    maskft.save(model, path)
    files = {"tokenizer.json": content, "config.json": raw} | (sides or {})
    for name, text in files.items():
        write(path / name, text)
    return path


def change_weights(path, change):
    """Rewrite model.safetensors with what `change` makes of its tensors, in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def refused(path, load=data.load_tokenizer):
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value)
    return str(error.value)


def logits(path, ids=tuple(range(40, 60))):
    return maskft.load(path)(torch.tensor([ids]))


def transformers_logits(path, ids=tuple(range(40, 60))):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model(torch.tensor([ids])).logits


# ------------------------------------------------------------------------------------ chat format

TURN = (
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
)
HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
CHATML_TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
EVERY = "{% for message in messages %}"
ASKED = "{% endfor %}{% if add_generation_prompt %}"
CHATML = f"{EVERY}{CHATML_TURN}{ASKED}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
# the structure of the published templates; what tools take in them is left out
REAL = {
    "Llama 3": (
        "llama3",
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}"
        f"{ASKED}{HEADER}{{% endif %}}",
    ),
    "Llama 3.1": (
        "llama3",
        "{{- bos_token }}\n{%- if custom_tools is defined %}\n{%- endif %}\n"
        "{%- if not date_string is defined %}\n"
        "    {%- if strftime_now is defined %}\n        "
        '{%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
        '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n'
        "{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n"
        '    {%- set system_message = "" %}\n{%- endif %}\n'
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
        '{{- system_message }}\n{{- "<|eot_id|>" }}\n'
        "{%- for message in messages %}\n    {%- if not ('tool_calls' in message) %}\n"
        "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        "+ message['content'] | trim + '<|eot_id|>' }}\n    {%- else %}\n"
        '        {{- raise_exception("no tools") }}\n    {%- endif %}\n{%- endfor %}\n'
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
    ),
    "Qwen2.5": (
        "chatml",
        "{%- if tools %}\n    {{- tools | tojson }}\n{%- else %}\n"
        "    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "    {%- else %}\n        {{- '<|im_start|>system\\nYou are Qwen, created by "
        "Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n    {%- endif %}\n"
        "{%- endif %}\n"
        '{%- for message in messages %}\n    {%- if (message.role == "user") or (message.role == '
        '"system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) '
        "%}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + "
        "'\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    ),
    "Qwen3": (
        "chatml",
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        '    {%- if ns.multi_step_tool and message.role == "user" and message.content is string '
        "and not(message.content.startswith('<tool_response>')) %}\n"
        "        {%- set ns.multi_step_tool = false %}\n"
        "        {%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- for message in messages %}\n    {%- set content = message.content %}\n"
        '    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
        "    {%- elif message.role == \"assistant\" %}\n        {%- set reasoning_content = '' %}\n"
        "        {%- if loop.index0 > ns.last_query_index %}\n"
        "            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + "
        "reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
        "        {%- else %}\n            {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
        "        {%- endif %}\n        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
    ),
    "SmolLM2": (
        "chatml",
        f"{EVERY}{{% if loop.first and messages[0]['role'] != 'system' %}}{{{{ '"
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n' }}"
        f"{{% endif %}}{CHATML_TURN}{ASKED}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}",
    ),
    "LLaDA": (
        "llada",
        f"{{{{ bos_token }}}}{EVERY}{TURN}{ASKED}{HEADER}{{% endif %}}",
    ),
    "several named": (
        "chatml",
        [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}],
    ),
    "answers marked": (
        "chatml",
        CHATML.replace(CHATML_TURN, "{%- generation -%}" + CHATML_TURN + "{% endgeneration %}"),
    ),
    "loop controls": (
        "chatml",
        CHATML.replace(EVERY, EVERY + "{% if not message %}{% continue %}{% endif %}"),
    ),
}
CHAT = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "12"},
    {"role": "system", "content": "Say it."},
    {"role": "user", "content": "hello\nworld "},
]


@pytest.mark.parametrize("name", REAL)
def test_the_directory_s_own_template_decides_and_the_saved_one_is_that_of_training(name, tmp_path):
    expected, template = REAL[name]
    bos = SPECIAL[expected].split()[0]
    config = {"bos_token": bos, "chat_template": template}
    path = model_directory(tmp_path / "in", expected, sides={"tokenizer_config.json": config})
    tokenizer = data.load_tokenizer(path)
    assert tokenizer.template == expected and not tokenizer.notes
    out = tmp_path / "out"
    out.mkdir()
    data.copy_tokenizer(tokenizer, path, out)
    written = data.read_json(out / "tokenizer_config.json")
    assert written["chat_template"] == (out / "chat_template.jinja").read_text()
    assert data.load_tokenizer(out).template == expected
    shown = tokenizer.decode(tokenizer.chat(CHAT), special=True)
    assert "hello\nworld " in shown and shown.count("system") == 1  # an empty one is none
    library = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
    theirs = library.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert theirs == tokenizer.chat(CHAT)


THINKS = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
REFUSED_TEMPLATES = [
    ("chatml", {"chat_template": THINKS}, r"assistant\n<think>\n'"),
    ("chatml", {"chat_template": CHATML.replace("\n' }}", "' }}")}, "the nearest"),
    (
        "both",
        {"chat_template": "{{ bos_token }}" + CHATML, "bos_token": "<|begin_of_text|>"},
        "where chatml",
    ),
    ("both", {"chat_template": ""}, "where llama3"),
    ("chatml", {"chat_template": "{% for message in messages %}"}, "TemplateSyntaxError"),
    ("chatml", {"chat_template": "{{ raise_exception('only tools') }}"}, "only tools"),
    ("chatml", {"chat_template": "{{ eos_token + '' }}"}, "'eos_token' is undefined"),
    ("chatml", {"chat_template": "{{ messages.__class__.__mro__ }}"}, "unsafe"),
    ("chatml", {"chat_template": "{{ messages[7]['role'] }}"}, "its chat template fails"),
    (
        "chatml",
        {"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"},
        "its chat template",
    ),
    (
        "chatml",
        {"chat_template": "{% for a in range(9999) %}" * 9 + "{% endfor %}" * 9},
        "not come to an end",
    ),
    (
        "chatml",
        {"chat_template": [{"name": "tools", "template": CHATML}]},
        '"default" must be text',
    ),
    ("chatml", {"chat_template": [7]}, "found 7 where"),
    ("chatml", {"chat_template": 7}, '"chat_template" must be text, found 7'),
    ("chatml", {"eos_token": ["<|im_end|>"]}, r'"eos_token" must be text, found a list'),
]


@pytest.mark.parametrize("special, config, message", REFUSED_TEMPLATES)
def test_a_template_that_is_not_ours_or_broken_is_refused(special, config, message, tmp_path):
    path = model_directory(tmp_path, special, sides={"tokenizer_config.json": config})
    printed = refused(path)
    assert message in printed and printed.startswith(f"{path}/tokenizer_config.json: ")
    # a template in a file of its own goes first
    write(path / "chat_template.jinja", REAL["SmolLM2"][1])
    if "eos_token" not in config:
        assert data.load_tokenizer(path).template == "chatml"


def test_what_is_guessed_and_a_base_model_are_told(tmp_path):
    config = {"eos_token": "<|endoftext|>", "chat_template": CHATML}
    path = model_directory(tmp_path / "in", sides={"tokenizer_config.json": config})
    tokenizer = data.load_tokenizer(path)
    (note,) = tokenizer.notes
    assert note.startswith(f"{path}: a base model") and "<|im_end|>" in note
    eot = tokenizer.special["<|im_end|>"]
    eos = tokenizer.special["<|endoftext|>"]
    (tmp_path / "out").mkdir()
    data.copy_tokenizer(tokenizer, path, tmp_path / "out")
    generation = data.read_json(tmp_path / "out" / "generation_config.json")
    assert generation["eos_token_id"] == [eot, eos]
    (path / "tokenizer_config.json").unlink()
    assert data.load_tokenizer(path).notes == [
        f"{path}: no chat template; its special tokens are those of chatml"
    ]


# -------------------------------------------------------------------------- tokens and their ids


def test_a_token_beyond_the_embeddings_is_named_and_padding_there_replaced(tmp_path):
    rows = len(TOKENS) + 4
    mask = {"text": "<|mask|>", "i": rows}
    path = model_directory(tmp_path, more=[mask], vocab_size=rows)
    message = refused(path)
    for part in ("'<|mask|>'", str(rows), f"resize_token_embeddings({rows + 1})"):
        assert part in message
    write(path / "tokenizer_config.json", {"pad_token": "<|mask|>", "eos_token": "<|im_end|>"})
    write(path / "config.json", SIZES | {"vocab_size": rows, "pad_token_id": rows})
    tokenizer = data.load_tokenizer(path)
    assert tokenizer.pad_id == tokenizer.eot_id
    assert tokenizer.mask_id == tokenizer.special[SPARE]  # not the padding that is no more
    target = tmp_path / "out"
    target.mkdir()
    data.write_chat_files(tokenizer, path, target)
    assert data.read_json(target / "tokenizer_config.json")["pad_token"] == "<|im_end|>"
    write(path / "tokenizer_config.json", {"pad_token": "<|mask|>", "eos_token": "<|mask|>"})
    assert "'<|mask|>'" in refused(path)  # an end of text there is no idle one
    ordinary = {token: i for token, i in tokenizer.special.items() if token != SPARE}
    with pytest.raises(UserError, match="resize_token_embeddings"):
        assert dataclasses.replace(tokenizer, special=ordinary).mask_id


NFC = {"type": "NFC"}
LATE = [
    {"text": "Skarholm", "i": len(TOKENS) + 4, "special": False, "normalized": True},
    {"text": "holm12", "i": len(TOKENS) + 5, "special": False},
    {"text": "<|late|>", "i": len(TOKENS) + 6, "normalized": True},
]
SAMPLES = [
    "Skarholm Skarholm12 hello e\u0301é <|im_end|>",
    "aSkarholm<|late|>holm12holm12<|laSkarholm",
    "\u1100\u1161 <|late|> \u0958\u0344\u212b Skar\u0301holm",
]


@pytest.mark.parametrize(
    "normalizer, more",
    [
        (None, LATE),
        ({"type": "Sequence", "normalizers": []}, LATE),
        ({"type": "Sequence", "normalizers": [NFC]}, LATE[1:2]),
        ({"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [NFC]}]}, ()),
    ],
)
def test_normalized_words_and_sequences_give_the_reference_s_ids(normalizer, more, tmp_path):
    more = [token | {"i": len(TOKENS) + 4 + n} for n, token in enumerate(more)]
    path = model_directory(tmp_path, more=more, normalizer=normalizer)
    ours = data.load_tokenizer(path)
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path / "tokenizer.json"))
    library.encode_special_tokens = True
    for text in SAMPLES:
        assert ours.encode(text) == library.encode(text).ids
    write(path / "tokenizer.json", (path / "tokenizer.json").read_text().replace("NFC", "NFKC"))
    if "NFC" in json.dumps(normalizer):
        assert "NFKC" in refused(path)


def test_of_a_sequence_every_normalizer_is_looked_at_and_every_id_compared(tmp_path):
    lower = {"type": "Sequence", "normalizers": [NFC, {"type": "Lowercase"}]}
    assert "Lowercase" in refused(model_directory(tmp_path, normalizer=lower))
    assert "'Skarholm' with normalized" in refused(
        model_directory(tmp_path, more=LATE[:1], normalizer=NFC)
    )
    gap = [LATE[0] | {"i": len(TOKENS) + 9}]
    message = refused(model_directory(tmp_path, more=gap, vocab_size=999))
    assert "'Skarholm' the id 272" in message and "would give it 267" in message


# ------------------------------------------------------------------------------ config and weights

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
READ = [
    {"rope_parameters": DEFAULT, "rope_scaling": LINEAR},
    {"rope_parameters": LINEAR | {"rope_theta": 777.0}, "rope_theta": 9.0},
    {"rope_parameters": DEFAULT | {"rope_theta": 5e5}, "rope_scaling": {}},
    {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": LLAMA3_ROPE},
    {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("fields", READ)
def test_rope_fields_old_and_new_are_read_as_transformers_reads_them(fields, tmp_path):
    path = model_directory(tmp_path, **copy.deepcopy(fields))
    ours = logits(path)
    torch.testing.assert_close(ours, transformers_logits(path), atol=1e-4, rtol=1e-4)
    plain = logits(model_directory(tmp_path, rope_theta=DEFAULT["rope_theta"]))
    assert (ours - plain).abs().max() > 1e-3


EVIDENT = [
    ({"rms_norm_eps": "1e-05"}, {"rms_norm_eps": 1e-5}),
    ({"vocab_size": "267", "hidden_size": 16.0}, {}),
    ({"tie_word_embeddings": "true", "attention_bias": None}, {}),
    ({"dtype": "auto"}, {}),
    ({"torch_dtype": "torch.float32"}, {}),
    ({"rope_theta": "10000", "rope_scaling": None, "pad_token_id": "263", "eos_token_id": -1}, {}),
]


@pytest.mark.parametrize("odd, plain", EVIDENT)
def test_an_evident_value_is_taken_and_saved_as_what_it_is(odd, plain, tmp_path):
    expected = logits(model_directory(tmp_path / "plain", **plain))
    path = model_directory(tmp_path / "odd", **odd)
    data.load_tokenizer(path)
    assert torch.equal(logits(path), expected)
    maskft.save(maskft.load(path), tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    torch.testing.assert_close(
        transformers_logits(tmp_path / "saved"), expected, atol=1e-4, rtol=1e-4
    )


WRONG = [
    ({"rms_norm_eps": 0}, '"rms_norm_eps" must be a number from 1e-12'),
    ({"rms_norm_eps": -1e-5}, "found -1e-05"),
    ({"rms_norm_eps": "small"}, 'found "small"'),
    ({"rope_theta": 0}, '"rope_theta" must be'),
    ({"rope_theta": 1e400}, '"rope_theta" must be'),
    ({"rope_scaling": LINEAR | {"factor": 0}}, '"factor" must be a number from 1e-12'),
    ({"rope_scaling": LINEAR | {"factor": [4]}}, "found a list"),
    (
        {"rope_scaling": {"type": "linear"}},
        '"factor" must be a number from 1e-12 to 1e+12, found nothing',
    ),
    ({"rope_scaling": [4]}, '"rope_scaling" must be an object'),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1}}, '"low_freq_factor" must be below'),
    ({"rope_scaling": LLAMA3_ROPE | {"rope_type": "yarn"}}, "'yarn' is not one of"),
    ({"rope_scaling": LINEAR, "rope_parameters": LLAMA3_ROPE}, 'disagree about "rope_type"'),
    ({"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 8.0}}, "4.0 and 8.0"),
    (
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}},
        'disagree about "rope_theta"',
    ),
    ({"hidden_size": -16}, '"hidden_size" must be a whole number from 1'),
    ({"hidden_size": True}, "found true"),
    ({"num_hidden_layers": None}, "found nothing"),
    ({"model_type": ["llama"]}, '"model_type" must be text'),
    ({"dtype": "int8"}, '"dtype" must be one of float32'),
    ({"tie_word_embeddings": "yes"}, '"tie_word_embeddings" must be true or false'),
]


@pytest.mark.parametrize("fields, message", WRONG)
def test_a_wrong_field_is_named_with_what_was_found(fields, message, tmp_path):
    path = model_directory(tmp_path, **copy.deepcopy(fields))
    printed = refused(path, maskft.load)
    assert printed.startswith(f"{path}/config.json: ") and message in printed


def test_a_tied_model_with_a_head_of_its_own_is_loaded_untied(tmp_path):
    path = model_directory(tmp_path / "in")
    expected = logits(path)

    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors):
        tensors["lm_head.weight"][-1] += 1

    change_weights(path, same)
    model = maskft.load(path)
    assert model.config.tied and torch.equal(logits(path), expected)
    change_weights(path, other)
    model = maskft.load(path)
    assert not model.config.tied and model.config.raw["tie_word_embeddings"] is False
    ours = logits(path)
    assert (ours - expected).abs().max() > 1e-2
    torch.testing.assert_close(ours, transformers_logits(path), atol=1e-4, rtol=1e-4)
    maskft.save(model, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), ours)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_are_no_numbers_are_named_and_logits_never_scored(value, tmp_path):
    path = model_directory(tmp_path)
    model = maskft.load(path)
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 5] = value

    change_weights(path, spoil)
    message = refused(path, maskft.load)
    assert message.startswith(f"{path}/model.safetensors: {name} holds NaN")
    with torch.no_grad():
        model.norm.weight.fill_(value)
        model.embed.weight *= 1e6
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        maskft.generate(model, [[1, 2]], 4)


def test_quantized_weights_are_refused(tmp_path):
    path = model_directory(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(path, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    assert f"{name} holds numbers of type I32" in refused(path, maskft.load)


# -------------------------------------------------------------------------------------- mutations

ODD = [
    None,
    "",
    "x",
    "1e-05",
    "2",
    -1,
    0,
    1,
    2,
    7.5,
    float("inf"),
    float("nan"),
    1e30,
    True,
    "true",
]
ODD += [[], {}, [1], ["x"], {"a": 1}, 10**30, "\ud800", "<|im_end|>", [[[]]], 12, 300, "Sequence"]
WHOLE = [b"", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"[1]", b"\xff{}", b'"x"']


def places(value, place=()):
    """The keys on the way to everything in a JSON value, but for the ordinary tokens."""
    yield place
    if isinstance(value, dict) and place != ("model", "vocab"):
        for key in value:
            yield from places(value[key], (*place, key))
    if isinstance(value, list):
        for n, one in enumerate(value):
            yield from places(one, (*place, n))


def mutate_json(rng, text):
    """JSON with one thing in it deleted, replaced, doubled, exchanged or cut short."""
    content = json.loads(text)
    *way, key = rng.choice([place for place in places(content) if place])
    parent = content
    for step in way:
        parent = parent[step]
    match rng.choice(["delete", "replace", "replace", "replace", "exchange", "cut"]):
        case "delete":
            del parent[key]
        case "replace":
            parent[key] = rng.choice(ODD)
        case "exchange":
            other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        case "cut" if isinstance(parent[key], str):
            parent[key] = parent[key][: rng.randint(0, len(parent[key]))]
    return json.dumps(content)


def mutate_tensors(rng, content):
    """A safetensors file with other bytes, a part missing, or something else in its header."""
    size = int.from_bytes(content[:8], "little")
    header, numbers = content[8 : 8 + size], content[8 + size :]
    kind = rng.choice(["byte", "number", "cut", "header"])
    if kind == "header":
        header = mutate_json(rng, header).encode(errors="replace")
        return len(header).to_bytes(8, "little") + header + numbers
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    spot = rng.randrange(len(content)) if kind == "byte" else rng.randrange(8 + size, len(content))
    return content[:spot] + bytes([rng.randrange(256)]) + content[spot + 1 :]


def mutate(rng, path):
    """Change one of the files of a model directory; its name."""
    file = path / rng.choice(sorted(file.name for file in path.iterdir()))
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        file.write_bytes(mutate_tensors(rng, content))
    elif file.suffix == ".jinja":
        spot = rng.randrange(len(content))
        file.write_bytes(content[:spot] + content[spot + rng.randint(1, 9) :])
    elif rng.random() < 0.1:
        file.write_bytes(rng.choice([*WHOLE, content[: rng.randrange(len(content))]]))
    else:
        write(file, mutate_json(rng, content))
    return file.name


@pytest.fixture(scope="module")
def many_files(tmp_path_factory):
    """A model directory with one of every file there may be."""
    eot = len(TOKENS) + 2
    sides = {
        "tokenizer_config.json": {
            "bos_token": None,
            "eos_token": {"content": "<|im_end|>", "lstrip": False},
            "pad_token": "<|endoftext|>",
            "chat_template": [{"name": "default", "template": REAL["SmolLM2"][1]}],
        },
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": {"content": SPARE}},
        "generation_config.json": {"eos_token_id": [eot, eot - 2], "do_sample": True},
    }
    ids = {"eos_token_id": [eot], "pad_token_id": eot - 2, "torch_dtype": "float32"}
    rope = {"original_max_position_embeddings": 64, **LLAMA3_ROPE}
    path = tmp_path_factory.mktemp("many") / "model"
    model_directory(path, sides=sides, normalizer=NFC, rope_scaling=rope, rope_theta=9e3, **ids)
    tensors = sorted(load_file(path / "model.safetensors").items())
    (path / "model.safetensors").unlink()
    weight_map = {}
    for n, some in enumerate((tensors[:9], tensors[9:])):
        save_file(dict(some), path / f"part{n}.safetensors", metadata={"format": "pt"})
        weight_map |= {name: f"part{n}.safetensors" for name, _ in some}
    write(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return path


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_model_directory_works_or_is_one_line_that_names_the_file(
    seed, many_files, tmp_path
):
    rng = random.Random(seed)
    worked = 0
    for n in range(100):
        path = tmp_path / str(n)
        shutil.copytree(many_files, path)
        if seed == 3:  # the template has a file of its own
            write(path / "chat_template.jinja", REAL["Qwen2.5"][1])
        name = mutate(rng, path)
        with contextlib.suppress(UserError):
            try:
                tokenizer = data.load_tokenizer(path)
                ids = tokenizer.chat([{"role": "user", "content": "hello"}])
                assert maskft.load(path)(torch.tensor([ids])).isfinite().all()
                worked += 1
            except UserError as error:
                first, *more = str(error).split("\n")
                named = name in first or f"{path}: " in first or "logits" in first
                assert named and (not more or "It renders" in first), (name, str(error))
                raise
        shutil.rmtree(path)
    assert 10 < worked < 60


# ------------------------------------------------------------------------------------- models out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps on the built-in model, from a directory of its own."""
    tmp_path = tmp_path_factory.mktemp("run")
    source = tmp_path / "base"
    shutil.copytree(HERE / "tiny", source)
    (source / "tokenizer_config.json").unlink()
    umask = os.umask(0o022)
    flags = ("--model", source, "--data", "bio:4", "--epochs", 4, "--eval-at", 4)
    forked(maskft, *flags, "--method", "masked", "--out", tmp_path / "out")
    os.umask(umask)
    return tmp_path / "out"


def test_a_run_s_directory_is_complete_and_readable_by_all(run):
    modes = {stat.S_IMODE(file.stat().st_mode) for file in run.iterdir()}
    assert modes == {0o644}
    names = {file.name for file in run.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    }
    card = (run / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert "pipeline_tag: text-generation" in head and "# license:" in head
    shown = [f"base model: {run.parent / 'base'}", "data: bio:4, 4 documents", "method: masked"]
    shown += ["epochs 4", "lr 0.0006", "seed 0", "forward", f'--model {run} --ask "..."']
    scores = data.read_json(run / "results.json")["last"]["scores"]
    low, high = scores["backward"]["interval"]["rouge1"]
    shown += [f"rouge1 {scores['backward']['rouge1']:.3f} [{low:.2f}-{high:.2f}]"]
    assert [part for part in shown if part not in text] == []


def test_transformers_chats_with_a_run_s_directory_in_our_ids_and_answers(run):
    transformers = pytest.importorskip("transformers")
    library = transformers.AutoTokenizer.from_pretrained(run)
    model = transformers.AutoModelForCausalLM.from_pretrained(run)
    tokenizer = data.load_tokenizer(run)
    assert not tokenizer.notes
    predictions = jsonl(run / "preds.jsonl")[:12]
    for prediction in predictions:
        chat = [{"role": "user", "content": prediction["question"]}]
        batch = library.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = batch["input_ids"]
        assert ids[0].tolist() == tokenizer.chat(chat)
        answer = model.generate(**batch, max_new_tokens=128)[0, ids.shape[1] :]
        text = library.decode(answer, skip_special_tokens=True).strip()
        assert answer[-1] == tokenizer.eot_id and text == prediction["prediction"]
    assert len({prediction["prediction"] for prediction in predictions}) > 4


def test_a_tokenizer_that_vanished_is_an_error(tmp_path):
    source = tmp_path / "base"
    shutil.copytree(HERE / "tiny", source)
    flags = ("--model", source, "--data", "bio:2", "--epochs", 1, "--eval-at", 1)
    flags = (*flags, "--method", "masked", "--out", tmp_path / "out")

    def before_training(real=maskft.open_run):
        def open_run(*given):
            (source / "tokenizer.json").unlink()
            return real(*given)

        maskft.open_run = open_run

    def after_training(real=maskft.train):
        def train(run):
            real(run)
            (run.out / "tokenizer.json").unlink()
            return True

        maskft.train = train

    printed = forked(maskft, *flags, status=1, before=after_training)
    assert f"{tmp_path / 'out'}: no tokenizer.json" in printed
    shutil.rmtree(tmp_path / "out")
    printed = forked(maskft, *flags, status=1, before=before_training)
    assert f"{source}: no tokenizer.json" in printed


@pytest.mark.parametrize("name", ["tiny", "tiny-llada"])
def test_the_built_in_directories_have_the_files_of_a_run_s(name, tmp_path):
    source = HERE / name
    tokenizer = data.load_tokenizer(source)
    assert tokenizer.template == "chatml" and not tokenizer.notes
    data.write_chat_files(tokenizer, source, tmp_path)
    for file in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (source / file).read_text() == (tmp_path / file).read_text()


def test_a_diffusion_run_gets_the_same_files(tmp_path):
    flags = ("--model", "tiny-llada", "--data", "bio:2", "--epochs", 1, "--eval-at", 1)
    forked(llada, *flags, "--out", tmp_path / "out")
    tokenizer = data.load_tokenizer(tmp_path / "out")
    assert tokenizer.template == "chatml" and not tokenizer.notes
    card = (tmp_path / "out" / "README.md").read_text()
    assert "method: llada" in card and "apply_chat_template" not in card
