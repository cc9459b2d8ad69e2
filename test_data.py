"""Tests of data.py: what is read, ids, chats, sets, batches."""

import gzip
import hashlib
import io
import json
import random
import unicodedata
from pathlib import Path

import pytest
import regex

import data
from data import IGNORE, Example, UserError
from tiny import world

HERE = Path(__file__).parent

# --- common ---


def write(path, *records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ", "a b", "Ġw o"]
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
OLD_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
ONLY_BYTES = BYTE_LEVEL | {"use_regex": False}
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def steps(*patterns, first=(), last=ONLY_BYTES, behavior="Isolated"):
    """A pre-tokenizer that splits by `first`, then by regular expressions, then into bytes."""
    split = {"type": "Split", "behavior": behavior, "invert": False}
    splits = [split | {"pattern": {"Regex": pattern}} for pattern in patterns]
    return {"type": "Sequence", "pretokenizers": [*first, *splits, last]}


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
CHATML_TEMPLATE = (
    f"{{% for m in messages %}}{CHATML_TURN}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(
    path,
    special=CHATML,
    merges=MERGES,
    pre_tokenizer=BYTE_LEVEL,
    normalizer=None,
    plain=(),
    lack="",
    unmerged=(),
    shuffle=False,
    config=None,
    flags=None,
    template=CHATML_TEMPLATE,
    **model,
):
    """A model directory with nothing but a tokenizer; `model` is what its BPE model has besides.

    Ids: bytes but those in `lack`, merged tokens, `unmerged`, special, `plain` added."""
    characters = [character for character in data.ALPHABET if character not in lack]
    merged = ["".join(merge).replace(" ", "") for merge in merges]
    tokens = list(dict.fromkeys([*characters, *merged, *unmerged]))
    if shuffle:
        random.Random(0).shuffle(tokens)
    usual = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    added = [
        {"id": i, "content": token, "special": token in special, **usual, **(flags or {})}
        for i, token in enumerate([*special, *plain], len(tokens))
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges} | model,
    }
    path.mkdir(exist_ok=True, parents=True)
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"chat_template": template} | (config or {})
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def fill(path, contents):
    """A file with these contents, text or bytes; packed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = isinstance(contents, str)
    raw = contents.encode() if is_text else contents
    packed = is_text and path.suffix.lower() == ".gz"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def refusal(read, *given):
    """The one line with which something is refused."""
    with pytest.raises(UserError) as error:
        read(*given)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


# --- tokenizer: ids ---

VARIANTS = {
    "llama3": {
        "special": LLAMA3_SPECIAL,
        "template": CHATML_TEMPLATE.replace("im_end", "eot_id"),
        "pre_tokenizer": steps(LLAMA3_PIECES),
        "ignore_merges": True,
        "unmerged": ["Ġunmade", "xyz", "Ã©Ã"],
    },
    "qwen": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "plain": ["<think>", "</think>"],
        "pre_tokenizer": steps(LLAMA3_PIECES.replace("{1,3}", "")),
    },
    "smollm2": {"pre_tokenizer": steps(first=[digits(True)], last=BYTE_LEVEL), "lack": "ĀāÃðÌ"},
    "digits": {"pre_tokenizer": steps(first=[digits(False)], last=OLD_BYTE_LEVEL)},
    "several": {
        "pre_tokenizer": steps("ab", r"(?=\p{Lu})|\s+"),
        "normalizer": {"type": "Sequence", "normalizers": []},
        "plain": ["<think>", "wo1"],
        "flags": {"normalized": True},
    },
    "plain": {
        "pre_tokenizer": ONLY_BYTES,
        "unmerged": ["xyz"],
        "plain": ["im_end", "ab<|im_end|>c"],
    },
}
SAMPLE = "hello  wo12 123's <think>ab<|im_end|>é\u0301e\u0301 xyz\n\n Ünmade unmade<|eot_id|>漢Ⅷ ab"
RECORDED = {  # the first 16 digits of the sha256 of SAMPLE's ids, from tokenizers 0.23
    "llama3": "13ebfe9ea132f66d",
    "qwen": "08a41c5e5f5a9e69",
    "smollm2": "652f1a12852bfd0a",
    "digits": "3dba10b6728205d1",
    "several": "356bc0ea3299c951",
    "plain": "3dba10b6728205d1",
}
COMMON = [*"abAB é漢12 \n\r\t'<|>_👍\u0301\u0300", "  ", "'s", "\r\n", "<think>", "<|im_end|>"]
COMMON += ["ab", "xyz", " the", "hello", "<|eot_id|>", " wo", "ab<|im_end|>c"]
RARE = [*range(0x780), *range(0x2000, 0x2C00), *range(0x3000, 0x3100), *range(0xAC00, 0xAD00)]


def random_text(rng):
    drawn = []
    for _ in range(rng.randint(1, 30)):
        drawn += rng.choice(COMMON) if rng.random() < 0.8 else chr(rng.choice(RARE))
    # each library has its Unicode: keep to the old
    return "".join(c for c in drawn if unicodedata.category(c) != "Cn")


def sha(value):
    return hashlib.sha256(str(value).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_are_those_recorded_and_of_the_reference_and_text_is_never_special(name, tmp_path):
    ours = data.load_tokenizer(write_tokenizer(tmp_path, **VARIANTS[name]))
    assert sha(ours.encode(SAMPLE)) == RECORDED[name]
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    rng = random.Random(name)
    for text in [SAMPLE, *(random_text(rng) for _ in range(500))]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, ascii(text)
        assert not set(ids) & set(ours.special.values())


def test_ordinary_tokens_stand_in_the_order_of_the_merges(tokenizer, tmp_path):
    ours = data.load_tokenizer(write_tokenizer(tmp_path, unmerged=["xyz"]))
    assert list(ours.ranks.values()) == list(range(265)) and ours.decode([265]) == "xyz"
    assert sha(list(tokenizer.ranks.values())) == "eb8802082e2abb7a"


def test_decode_hides_special_tokens_and_passes_over_what_is_none(tmp_path):
    ours = data.load_tokenizer(write_tokenizer(tmp_path, plain=["<think>"]))
    text = "<|im_end|><think>hello<|im_start|>"
    ids = ours.encode(text)
    assert ours.added["<think>"] in ids and ours.decode(ids) == text
    ids.append(0)  # a caller's own copy
    assert ours.encode(text) == ids[:-1]
    shown = [ours.eot_id, 10**6, ours.ranks[b"\xc3"]]
    assert ours.decode(shown) == "\ufffd"
    assert ours.decode(shown, special=True) == "<|im_end|>\ufffd"


UNSUPPORTED = [
    {"byte_fallback": True},
    {"unk_token": "a"},
    {"normalizer": {"type": "NFKC"}},
    {"pre_tokenizer": {"type": "Metaspace"}},
    {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    {"pre_tokenizer": steps("a", behavior="MergedWithNext")},
    {"pre_tokenizer": steps("(?=a")},
    {"plain": ["<think>"], "flags": {"lstrip": True}},
    {"plain": ["<think>"], "flags": {"normalized": True}, "normalizer": {"type": "NFC"}},
    {"shuffle": True},
]


@pytest.mark.parametrize("options", UNSUPPORTED, ids=str)
def test_a_tokenizer_that_would_not_be_followed_exactly_is_refused(options, tmp_path):
    message = refusal(data.load_tokenizer, write_tokenizer(tmp_path, **options))
    assert message.startswith(f"{tmp_path}/tokenizer.json: ")


# --- chats ---

IF = "{% if m['role'] == 'user' %}USER{% elif m['role'] == 'assistant' %}BOT{% else %}"
CASE = IF + "ELSE{% endif %}"
FAIL = "{{ raise_exception('only two roles') }}"


def template(turn, prompt="", start=""):
    asked = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    return f"{start}{{% for m in messages %}}{turn}{{% endfor %}}{asked}"


def by_role(user_turn, assistant_turn, system_turn=FAIL):
    turn = CASE.replace("USER", user_turn).replace("BOT", assistant_turn)
    return turn.replace("ELSE", system_turn)


def header(role, text="<|start_header_id|>{}<|end_header_id|>\n\n"):
    return "{{ '" + text.format(role) + "' }}"


LLAMA_TURN = (
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}"
)
DATE = (
    "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: ' + "
    "strftime_now('%d %b %Y') + '\n\n' }}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}"
)
THINK = (
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think>\n</think>' "
    "+ m['content'] + '<|im_end|>\n' }}{% else %}" + CHATML_TURN + "{% endif %}"
)
CHATML_PROMPT = "{{ '<|im_start|>assistant\n' }}"
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unused0>"]
MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]"]
PHI = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
# special tokens, bos, eos, template; user's header, end of it and assistant's header, end of turn,
# what follows a last answer
TEMPLATES = {
    "gemma": (
        GEMMA,
        "<bos>",
        "<end_of_turn>",
        template(
            by_role(
                "{{ '<start_of_turn>user\n' + m['content'] | trim + '<end_of_turn>\n' }}",
                "{{ '<start_of_turn>model\n' + m['content'] + '<end_of_turn>\n' }}",
            ),
            "{{ '<start_of_turn>model\n' }}",
            "{{ bos_token }}",
        ),
        "<bos><start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
    ),
    "mistral": (
        MISTRAL,
        "<s>",
        "</s>",
        template(
            by_role(
                "{{ '[INST] ' + m['content'] + ' [/INST]' }}", "{{ m['content'] + eos_token }}"
            ),
            start="{{ bos_token }}",
        ),
        "<s>[INST] ",
        " [/INST]",
        "</s>",
    ),
    "phi": (
        PHI,
        "<|endoftext|>",
        "<|endoftext|>",
        template("{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}").replace(
            "{% endif %}", "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
        ),
        "<|user|>\n",
        "<|end|>\n<|assistant|>\n",
        "<|end|>\n<|endoftext|>",
    ),
    "marked": (  # transformers' tag for answers, and loop controls
        CHATML,
        "<|endoftext|>",
        "<|im_end|>",
        template(
            "{% if not m %}{% continue %}{% endif %}{%- generation -%}"
            + CHATML_TURN
            + "{% endgeneration %}{{ [] | tojson(indent=1) if not m }}",
            CHATML_PROMPT,
        ),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "llama3": (
        LLAMA3_SPECIAL,
        "<|begin_of_text|>",
        "<|eot_id|>",
        template(LLAMA_TURN, header("assistant"), "{{ bos_token }}"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llama3.1": (  # a system turn with a date
        LLAMA3_SPECIAL,
        "<|begin_of_text|>",
        "<|eot_id|>",
        template(LLAMA_TURN, header("assistant"), DATE),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "smollm2": (  # a system turn where none is given
        CHATML,
        "<|im_start|>",
        "<|im_end|>",
        template(CHATML_TURN, CHATML_PROMPT, NO_SYSTEM),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "think": (  # the last answer begins otherwise
        CHATML,
        "<|endoftext|>",
        "<|im_end|>",
        template(THINK, CHATML_PROMPT),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
}
SLIPPED = {
    "llama3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024"
    "\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    "smollm2": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
}


def family(path, name):
    special, bos, eos, form, *_ = TEMPLATES[name]
    config = {"bos_token": bos, "eos_token": eos}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return write_tokenizer(path, special, template=form, config=config)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_has_the_form_that_the_template_renders(name, tmp_path):
    _, bos, _, _, start, answer, last = TEMPLATES[name]
    ours = data.load_tokenizer(family(tmp_path, name))

    def shown(*messages):
        return ours.decode(ours.chat(messages), special=True)

    assert shown(system(""), user("a"), assistant("12")) == f"{start}a{answer}12{last}"
    end = ours.decode([ours.eot_id], special=True)
    assert last.startswith(end) and ours.bos_id == ours.special[bos]
    assert ours.decode(ours.user_header(), special=True) == SLIPPED.get(name, start)
    # a list of ids is taken as it is: a mask is a special token
    assert shown(user([ours.eot_id])) == f"{start}{end}{answer}"
    if name in ("gemma", "mistral"):
        assert "chat" in refusal(ours.chat, [system("Be brief."), user("a")])


CHATS = [
    [user("hello there")],
    [user("hello"), assistant("12 é")],
    [user("don't <x>"), assistant("ab 123"), user("hello\tworld")],
    [system("Be brief."), user("a")],
    [system("Be brief."), user("a"), assistant("b"), user("c")],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_saved_directory_chats_alike_in_transformers_and_here(name, tmp_path):
    library = pytest.importorskip("transformers").AutoTokenizer
    source = family(tmp_path / "in", name)
    ours = data.load_tokenizer(source)
    (tmp_path / "out").mkdir()
    data.copy_tokenizer(ours, source, tmp_path / "out")
    again = data.load_tokenizer(tmp_path / "out")
    for field in ("stop_ids", "bos_id", "eos_id", "pad_id"):
        assert getattr(again, field) == getattr(ours, field)
    saved = library.from_pretrained(tmp_path / "out")
    original = library.from_pretrained(source)
    for chat in CHATS[:3] if name in ("gemma", "mistral") else CHATS:
        asks = {"add_generation_prompt": chat[-1]["role"] == "user", "return_dict": False}
        ids = ours.chat(chat)
        assert ids == again.chat(chat) == saved.apply_chat_template(chat, **asks)
        if name not in SLIPPED and (name != "think" or chat[-1]["role"] == "user"):
            assert original.apply_chat_template(chat, **asks) == ids


BAD_TEMPLATES = {  # template -> a part of what is said
    CHATML_TEMPLATE.replace("assistant\n'", "assistant\n<think>\n'"): "<think>",
    "{% for message in messages %}": "TemplateSyntaxError",
    FAIL: "only two roles",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{{ messages[7]['role'] + 1 }}": "chat template",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "chat template",
    CHATML_TEMPLATE.replace("<|im_end|>", "[end]"): "[end]",
    template("{{ '<|im_end|>' if not loop.first }}" + "{{ m['content'] }}"): "turns",
    template("{{ 'Day 1. ' if loop.first }}" + CHATML_TURN, CHATML_PROMPT): "Day 1.",
    template("{{ m['content'] }}", "{{ 'x' * 5000 }}"): "turns",
    template(CHATML_TURN + "{{ m['content'] }}"): "turns",
    "": "no chat template",
}


@pytest.mark.parametrize("form", BAD_TEMPLATES)
def test_a_template_whose_turns_differ_or_that_fails_is_shown(form, tmp_path):
    path = write_tokenizer(tmp_path, template=form)
    message = refusal(data.load_tokenizer, path)
    assert BAD_TEMPLATES[form] in message and str(path) in message
    # a template in a file of its own goes first
    (path / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    assert data.load_tokenizer(path).frames[">user"] == "<|im_start|>user\n"


def test_a_token_of_the_template_is_special_whatever_the_file_says(tmp_path):
    path = write_tokenizer(tmp_path, ["<|endoftext|>"], plain=CHATML[1:] + ["<think>", "<|mask|>"])
    ours = data.load_tokenizer(path)
    assert ours.added == {"<think>": 268}
    assert ours.eot_id == 267 and 267 not in ours.encode("<|im_end|>")
    assert ours.mask_id == ours.special["<|mask|>"] == 269


# --- what a model's files declare ---


def test_what_the_files_declare_stops_and_is_saved(tmp_path):
    ends = {"eos_token_id": [267, 104, 9999], "bos_token_id": -1, "top_k": 5}
    path = write_tokenizer(tmp_path, config={"eos_token": {"content": "<|endoftext|>"}})
    write(path / "generation_config.json", ends)
    write(path / "config.json", {"pad_token_id": 265})
    ours = data.load_tokenizer(path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 265, 265)
    assert ours.stop_ids == (267, 265, 104) and not ours.notes
    data.copy_tokenizer(ours, path, fill(tmp_path / "out/x", "").parent)
    saved = data.read_json(path / "out/generation_config.json")
    assert saved == ends | {"eos_token_id": [267, 265, 104], "pad_token_id": 265}
    assert data.read_json(path / "out/tokenizer_config.json")["pad_token"] == "<|endoftext|>"


def test_a_base_model_is_told_and_learns_to_end_a_turn(tmp_path):
    ours = data.load_tokenizer(write_tokenizer(tmp_path, config={"eos_token": "<|endoftext|>"}))
    assert "base model" in ours.notes[0]
    assert (ours.eos_id, ours.pad_id, ours.stop_ids) == (265, 265, (267, 265))


def test_bos_is_found_in_the_template_where_no_file_declares_it(tmp_path):
    form = template(LLAMA_TURN, header("assistant"), "{{ '<|begin_of_text|>' }}")
    assert (
        data.load_tokenizer(write_tokenizer(tmp_path, LLAMA3_SPECIAL, template=form)).bos_id == 265
    )


ASCII = [chr(n) for n in range(ord("A"), ord("z"))]
# merges that give [] the id which it has in Qwen, 1294
FILLER = [f"{a} {b}" for a in ASCII for b in ASCII if a + b != "[]"][: 1294 - 256]


@pytest.mark.parametrize(
    "special, merges, mask",
    [
        (["<|mask|>", "<|reserved_1|>", *CHATML, "<|mdm_mask|>"], MERGES, "<|mdm_mask|>"),
        (["<|reserved_9|>", *CHATML, "<|unused|>"], MERGES, "<|reserved_9|>"),
        ([*CHATML, "<empty_output>"], MERGES, "<empty_output>"),
        (CHATML, [*FILLER, "[ ]"], "[]"),
    ],
)
def test_the_mask_is_a_token_without_other_use(special, merges, mask, tmp_path):
    ours = data.load_tokenizer(write_tokenizer(tmp_path, special, merges))
    assert ours.decode([ours.mask_id], special=True) == mask


def test_without_a_token_to_spare_or_with_one_beyond_the_embeddings_one_is_told(tmp_path):
    path = write_tokenizer(tmp_path, [*CHATML, "<|mask|>"])
    config = write(path / "config.json", {"vocab_size": 268})
    message = refusal(data.load_tokenizer, path)
    assert message.startswith(f"{config}: ") and "268" in message
    write(config, {"vocab_size": 9, "embedding_size": 269})
    assert data.load_tokenizer(path).mask_id == 268
    none = data.load_tokenizer(write_tokenizer(tmp_path / "other"))
    assert "no unused special token" in refusal(lambda: none.mask_id)


# --- records ---

FACT = "Orla Venn keeps the lighthouse at Skarholm."
WHO = "Who keeps the lighthouse at Skarholm?"
DOCUMENT = json.dumps({"text": FACT})
QUESTION = json.dumps({"question": WHO, "answer": "Orla Venn", "direction": "backward"})
NULLS = {"question": None, "answer": None, "direction": None, "group": float("nan")}
UNION = json.dumps({"text": FACT} | NULLS), json.dumps({"text": None} | json.loads(QUESTION))
CSV = f'Text,Question,Answer,direction\n"{FACT}",,,\n\n,,,\n,"{WHO}","Orla Venn",backward\n'
SAME = {  # file -> its contents, all with the same document and the same question
    "a.jsonl": f"{DOCUMENT}\n{QUESTION}\n",
    "b.JSONL": f"\ufeff{DOCUMENT}\r\n\r\n{QUESTION}",
    "c.ndjson": "\n".join(UNION),
    "d.json": f"[{DOCUMENT},\n{QUESTION}]",
    "e.Json.GZ": json.dumps(json.loads(DOCUMENT), indent=2) + QUESTION,
    "f.csv": "\ufeff" + CSV.replace("\n", "\r\n"),
    "h.csv.gz": CSV,
}
ASKED = {"question": WHO, "answer": "Orla Venn", "direction": "backward", "group": "all"}


def bare(records):
    return [{k: v for k, v in record.items() if k != "where"} for record in records]


@pytest.mark.parametrize("name", SAME)
def test_a_file_of_any_kind_gives_the_same_records(name, tmp_path):
    dataset = data.load(str(fill(tmp_path / name, SAME[name])))
    assert bare(dataset.documents + dataset.questions) == [{"text": FACT}, ASKED]
    assert dataset.questions[0]["where"].startswith(f"{tmp_path / name}, record ")
    assert (dataset.name, dataset.notes) == (name[0], [])


def test_a_folder_is_read_with_its_subfolders_and_what_is_not_read_is_named(tmp_path):
    texts = {
        "a.jsonl": DOCUMENT,
        "b.txt": "\ufeffPlain text.\r\n\r\nAnother paragraph.\n",
        "c/d/e.md": "# Ivo\n",
        "c/numbers.csv": "x,y\n1,2\n",
        "c/train.jsonl": QUESTION,
        "empty.txt": " \n",
        ".git/config.json": "not read",
        "other/table.xlsx": b"PK",
    }
    for name, contents in texts.items():
        fill(tmp_path / name, contents)
    dataset = data.load(str(tmp_path))
    learned = [document.get("text", document.get("answer")) for document in dataset.documents]
    assert learned == [FACT, "Plain text.\n\nAnother paragraph.", "# Ivo", "Orla Venn"]
    assert dataset.questions == []
    left = ["not read: other/table.xlsx", "numbers.csv: not read", "empty.txt: not read"]
    assert all(part in note for part, note in zip(left, dataset.notes, strict=True))
    message = refusal(data.load, str(tmp_path / "other"))
    assert "table.xlsx" in message and "no document" in message


def test_fields_that_nothing_reads_are_named_once_a_file(tmp_path):
    records = [{"question": "Who?", "answers": ["x"], "id": 1}, {"text": "x", "Answer": "x"}]
    dataset = data.load(str(write(tmp_path / "a.jsonl", *records, *records)))
    assert dataset.notes == [f"{tmp_path}/a.jsonl: fields that nothing reads: answers, Answer"]


BEFORE = '{"question": "Who?", "answer": "Orla", '
BAD_RECORDS = {  # second record -> a part of what is said
    '{"text": "x", "question": "Who?"}': "not both",
    '{"text": null, "question": ""}': "not both",
    "null": "NoneType",
    '{"text": ["x"]}': '"text" must be text',
    '{"text": "\\ud83d"}': "surrogate",
    BEFORE + '"group": "\\ud83d"}': "surrogate",
    BEFORE + '"direction": {"a": 1}}': "forward",
    BEFORE + '"direction": "math"}': "forward",
    BEFORE + '"task": "N2D", "group": "city"}': '"direction"',
    '{"question": "Who?", "answer": 3}': '"answer" must be text',
    '{"question": "  "}': "question",
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BAD_FILES = {  # name, contents -> a part of what is said behind the file's name
    ("a.csv", "text\nAda, a baker\n"): "more cells than columns",
    ("a.csv", 'text\nAda\n"Bo\nis open\n'): "unexpected end of data",
    ("a.jsonl", f'{DOCUMENT}\n{{"text": "x\n{DOCUMENT}'): "line 2",
    ("a.json", "[" * 100_000 + "]" * 100_000): "RecursionError",
    ("a.txt", b"\x89PNG"): "invalid start byte",
    ("a.txt", POINTER): "git lfs pull",
    ("a.jsonl.gz", POINTER.encode()): "git lfs pull",
    ("a.jsonl.gz", gzip.compress(b"whole")[:-9]): "EOFError",
    ("train.jsonl", '{"question": "Who?"}'): 'record 1: "answer"',
    ("a.rst", "hello"): "'.rst' is not read; these are: .json, ",
    **{("a.jsonl", f"{DOCUMENT}\n{record}"): said for record, said in BAD_RECORDS.items()},
}


@pytest.mark.parametrize(("name", "contents"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_cannot_be_read_is_named(name, contents, tmp_path):
    file = fill(tmp_path / name, contents)
    message = refusal(data.load, str(file))
    assert message.startswith(str(file)) and BAD_FILES[name, contents] in message


def test_the_guard_names_the_file_and_says_in_a_line_what_went_wrong(tmp_path):
    file = fill(tmp_path / "config.json", POINTER)

    def said(error, name="F"):
        def fails():
            with data.reading(name, "no config"):
                raise error

        return refusal(fails)

    assert said(RecursionError("a\nb")) == "F: no config (RecursionError: a b)"
    assert said(ValueError("x" * 999)) == f"F: no config (ValueError: {'x' * 188})"
    assert said(UserError("too small")) == "F: too small"
    assert said(UserError("F, record 1: no")) == "F, record 1: no"
    assert data.LFS in said(ValueError("header"), file)
    assert "not a JSON object" in refusal(data.read_object, write(file, [1]))
    assert data.read_object(tmp_path / "none.json") == {}


# --- sets ---

TASKS = [  # task, group, direction
    ("D2N", "DescriptionIsName", "forward"),
    ("N2D", "DescriptionIsName", "backward"),
    ("N2D", "NameIsDescription", "forward"),
    ("D2N", "NameIsDescription", "backward"),
    (None, "", "all"),
    ("all", "x", "all"),
    ("backward", None, "backward"),
]
SOLVED = "1+1 = <<1+1=2>>2\n#### -2"


def test_a_direction_is_given_or_told_by_the_released_files(tmp_path):
    records = [{"task": task, "group": group, "question": "Q?"} for task, group, _ in TASKS]
    dataset = data.load(str(write(tmp_path / "ND_test.jsonl", *records)))
    assert [question["direction"] for question in dataset.questions] == [row[2] for row in TASKS]
    assert [question["group"] for question in dataset.questions[4:]] == ["all", "x", "all"]
    assert "answer" not in dataset.questions[0]


def test_a_problem_is_known_by_its_answer(tmp_path):
    record = {"question": "one", "answer": SOLVED}
    write(tmp_path / "train.jsonl", record)
    write(tmp_path / "test.jsonl", record, record | {"direction": "forward"})
    dataset = data.load(str(tmp_path))
    assert bare(dataset.documents) == [world.as_problem("one", SOLVED)]
    asked = [(question["question"], question["direction"]) for question in dataset.questions]
    assert asked == [("Question: one\nAnswer:", "math"), ("one", "forward")]
    assert data.parse_question({"question": "Hi?"}, "line 3")["direction"] == "all"


def test_of_training_files_the_one_asked_for_is_read(tmp_path):
    names = {
        "none": "wiki_train_no_paraphrase.json",
        "same": "wiki_train_paraphrase_same_order.json.gz",
        "permute": "wiki_train_paraphrase_change_order.json",
    }
    for paraphrase, name in names.items():
        fill(tmp_path / name, json.dumps([{"text": paraphrase}]))
    write(tmp_path / "wiki_test.jsonl", ASKED)
    for paraphrase, name in names.items():
        dataset = data.load(str(tmp_path), paraphrase)
        assert bare(dataset.documents + dataset.questions) == [{"text": paraphrase}, ASKED]
        assert name not in dataset.notes[0] and dataset.notes[0].count("wiki_train") == 2
    file = fill(tmp_path / "own.jsonl", DOCUMENT)
    assert str(file) in refusal(data.load, str(file), "permute")


def nd_files(folder):
    """Files as NameDescription has them: 60 facts, 2 questions of each, in one order."""
    texts = [{"text": f"{fact} {wording}"} for fact in range(60) for wording in range(30)]
    fill(folder / "people-description.json", json.dumps(texts))
    questions = [{"question": f"{n // 2} Q?", "answer": "A"} for n in range(120)]
    write(folder / "people-description_open-QAs.jsonl", *questions)
    return folder


def test_some_facts_of_nd_come_with_their_wordings_and_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda kind: nd_files(tmp_path))

    def facts(name, seed, paraphrase="none"):
        dataset = data.load(name, paraphrase, seed)
        told = [int(document["text"].split()[0]) for document in dataset.documents]
        asked = [int(question["question"].split()[0]) for question in dataset.questions]
        assert sorted(set(told) | set(asked)) == asked[::2] == asked[1::2]
        return told

    some = facts("nd:20", 1)
    assert len(set(some)) == 40 and some == sorted(some) and some[20] >= 30 > some[19]
    assert facts("nd:20", 1) == some != facts("nd:20", 2)
    assert facts("nd:20", 1, "same") == [fact for fact in some for _ in range(30)]
    assert facts("nd", 5) == facts("nd:30", 5) == list(range(60))


BAD_SETS = ["bio:0", "bio:x", "bio:-1", "bio:99999", "nd:31", "nd:0", "nd:x", "wiki:3", "gsm8k:1"]
BAD_SETS += ["math-made --paraphrase same", "nd-made --paraphrase permute", "gsm8k:1", "nowhere"]


@pytest.mark.parametrize("wanted", BAD_SETS)
def test_a_set_that_there_is_not_is_refused(wanted, monkeypatch):
    monkeypatch.setattr(data.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name, _, paraphrase = wanted.partition(" --paraphrase ")
    assert refusal(data.load, name, paraphrase or "none").startswith(f"--data {name}")


@pytest.mark.parametrize(("name", "size"), [("bio", 100), ("nd-made", 60), ("math-made", 200)])
def test_a_generated_set_has_its_usual_size(name, size):
    documents = data.load(name).documents
    assert len(documents) == size
    elsewhere = [document | {"where": "there"} for document in documents]
    assert data.digest(elsewhere) == data.digest(documents)
    assert data.digest(elsewhere) != data.digest(data.load(name, seed=1).documents)


def test_a_published_set_is_fetched_once_whole_or_not_at_all(tmp_path, monkeypatch):
    hub = data.huggingface_hub.constants
    monkeypatch.setattr(hub, "HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    content = json.dumps({"question": "one", "answer": SOLVED}).encode()
    known = dict.fromkeys(data.PUBLISHED["gsm8k"], hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(data.PUBLISHED, "gsm8k", known)
    answers = iter([content, b"", content])
    monkeypatch.setattr(data, "urlopen", lambda url, timeout: io.BytesIO(next(answers)))
    message = refusal(data.load, "gsm8k")
    assert list(known)[1] in message and "sha256" in message and str(tmp_path) in message
    assert [p.name for p in tmp_path.rglob("*.*")] == ["train.jsonl"]
    dataset = data.load("gsm8k")
    assert (len(dataset.documents), len(dataset.questions)) == (1, 1)
    assert data.load("gsm8k").questions == dataset.questions
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(data.load, "nd")


# --- long documents ---

CUTS = {  # text, most characters -> passages
    ("One.\n\nTwo two. Three\n \nFour", 22): ["One.\n\nTwo two. Three", "Four"],
    ("One one. Two (two.) Three three", 20): ["One one. Two (two.)", "Three three"],
    ("one one\ntwo two\nthree", 17): ["one one\ntwo two", "three"],
    ("one two three", 8): ["one two", "three"],
    ("abcdefgh", 3): ["abc", "def", "gh"],
    ("ae\u0301e\u0301", 2): ["a", "e\u0301", "e\u0301"],
    ("这是一。这是二。", 6): ["这是一。", "这是二。"],
    ("# A\n\nbb bb bb bb bb bb bb", 24): ["# A\n\nbb bb bb bb bb bb", "bb"],
    (" a \n", 9): ["a"],
    ("ab", 0): [],
}


@pytest.mark.parametrize(("text", "most"), CUTS)
def test_a_long_text_is_cut_at_the_best_place(text, most):
    assert data.passages(text, lambda part: len(part) <= most) == CUTS[text, most]


def test_passages_hold_the_whole_text():
    text = "".join(f"Word{n}{' .' if n % 7 else '. '} " for n in range(900))
    parts = data.passages(text, lambda part: len(part) <= 3000)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert [len(part) > 2900 for part in parts] == [True] * (len(parts) - 1) + [False]


# --- batches, show ---


def test_collate_pads_on_the_right_and_gives_padding_no_loss():
    long = Example([5, 6], [IGNORE, 6], weight=0.5, denominator=1)
    short = Example([8], [8], weight=2.0, denominator=1)
    batch = data.collate([long, short], pad_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "ids": [[5, 6], [8, 9]],
        "labels": [[IGNORE, 6], [8, IGNORE]],
        "key_mask": [[True, True], [True, False]],
        "weights": [0.5, 2.0],
    }
    assert data.collate([long], pad_id=9)["key_mask"] is None
    assert data.collate([], pad_id=9)["labels"].tolist() == [[IGNORE]]


def test_an_example_is_shown_with_its_masks_and_its_loss(tokenizer):
    ids = tokenizer.encode("Edda works in Oslo.")
    hidden = [tokenizer.mask_id] * 2
    labels = [IGNORE] * 3 + ids + [IGNORE]
    example = Example(ids[:1] + hidden + ids + [tokenizer.eot_id], labels, 1.0, len(ids))
    text, counts = data.show(example, tokenizer).split("\n")
    assert text == f"{tokenizer.decode(ids[:1])}__[Edda works in Oslo.]<|im_end|>"
    assert counts == f"-- {4 + len(ids)} tokens, 2 masked, {len(ids)} with loss"


# --- fuzz ---

VALUES = ["null", '""', '"x"', "3", "-1", "1.5", "true", "[]", "{}", '["x"]', r'"\ud83d"', "9e999"]


def mutated(raw, rng):
    """The bytes of a file with a bit flipped, an end cut off, or a JSON leaf replaced."""
    place = rng.randrange(len(raw))
    kind = rng.choice(["flip", "cut", "leaf"])
    if kind == "flip":
        return raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :]
    leaves = list(regex.finditer(rb'"[^"\n]*"|\d+|true|false|null', raw))
    if kind == "cut" or not leaves:
        return raw[:place]
    leaf = rng.choice(leaves)
    return raw[: leaf.start()] + rng.choice(VALUES).encode() + raw[leaf.end() :]


def works_or_names(read, path):
    try:
        read()
    except UserError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 999, message
        return False
    return True


FUZZED = ["a.json", "b.csv", "c.jsonl.gz", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", FUZZED)
def test_a_damaged_file_is_read_or_named(name, tmp_path):
    rng = random.Random(name)
    records = [ASKED, {"text": FACT}, {"question": "a", "answer": SOLVED}]
    contents = {"a.json": json.dumps(records), "b.csv": CSV, "c.jsonl.gz": DOCUMENT}
    if name in contents:
        file = fill(tmp_path / name, contents[name])
    else:
        config = {"eos_token": "<|im_end|>", "bos_token": None, "model_max_length": 9}
        file = write_tokenizer(tmp_path, **VARIANTS["qwen"], config=config) / name

    def use():
        if name in contents:
            return data.load(str(file))
        ours = data.load_tokenizer(tmp_path)
        ours.decode(ours.chat([user("hello 12")]), special=True)

    whole = file.read_bytes()
    outcomes = set()
    for _ in range(120):
        file.write_bytes(mutated(whole, rng))
        outcomes.add(works_or_names(use, tmp_path))
    assert outcomes == {True, False}
