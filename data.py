r"""Text in, training sequences out: files, tokenizers, chat templates, data sets, batches.

One record of every kind:

    document    {"text": "Edda Marlow was born on 3 June 1971. She is a native of Oslo. ...",
                 "where": "facts.jsonl, record 1"}
    problem     {"question": "Question: Edda has 3 pens ...?\nAnswer:",
                 "problem": "Edda has 3 pens ...?",
                 "answer": "Edda has 3+4 = <<3+4=7>>7 pens.\n#### 7",
                 "direction": "math", "group": "all"}
    question    {"question": "Who was born in Oslo, majored in botany and works for Quillon?",
                 "answer": "Edda Marlow", "direction": "backward", "group": "name"}
                (without an answer it is asked and not scored; the direction may be "all")
    person      {"person": {"name": "Mara Quill", "pronoun": "She", ...}, "asked": True}
    example     Example(ids=[1, 87, ...], labels=[-100, ..., 87, 2], weight=1.0, denominator=44)
"""

import csv
import gzip
import io
import json
import logging
import os
import shutil
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache, partial
from glob import glob
from itertools import count, groupby, islice
from pathlib import Path
from random import Random
from urllib.request import urlopen

import huggingface_hub
import regex  # comes with tiktoken; the standard re has no \p{L}
import tiktoken
from jinja2 import TemplateError  # jinja2 comes with torch
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tiny import world
from tiny.world import as_problem

# torch takes seconds to import: those who make batches import it, --help does not.

LOG = logging.getLogger("maskft")  # what the user should know of files, on stderr

# --------------------------------------------------------------------------- records and files in


class UserError(Exception):
    """A mistake of the user's: `main` prints its text, without a traceback, and exits with 1."""


@contextmanager
def reading(file, broken="cannot be read"):
    """Whatever goes wrong inside with the contents of `file` is a UserError that names it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(file)):
            raise
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # a list stands for an object, a field is missing, ...
        raise UserError(f"{file}: {broken} ({error!r:.200})") from None  # in one line


def read_text(path):
    """The text of a UTF-8 file, also of a .gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    with (
        reading(path, "no such file, no UTF-8 text, or a Git LFS pointer: git lfs pull"),
        opened(path, "rt", encoding="utf-8-sig") as file,  # some begin with a BOM
    ):
        text = file.read()
        if text.startswith("version https://git-lfs.github.com/spec/"):  # else it is a document
            raise UserError("a Git LFS pointer: git lfs pull")
        return text


def read_json(path):
    with reading(path):
        return json.loads(read_text(path))


def read_object(path):
    """The JSON object in a file; {} if there is no such file."""
    with reading(path):
        return {**read_json(path)} if path.exists() else {}


def write_text(path, text):
    """Replace a file atomically: whoever reads it sees the old text or the new, never a part."""
    part = Path(f"{path}.{os.getpid()}.part")  # several processes may do so at once
    # a file's name may be no UTF-8; JSON reads what is written instead as the same
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)


def write_json(path, content):
    write_lines(path, [content], indent=2)


def write_lines(path, records, indent=None):
    """A file of JSON values, one a line or, with `indent`, to be read by people."""
    lines = [json.dumps(record, indent=indent, ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))


def json_rows(text):
    """Any sequence of JSON values: lines, a list of records, objects over several lines."""
    decode = json.JSONDecoder().raw_decode
    end = 0
    while end < len(text):
        value, end = decode(text, regex.match(r"\s*", text, pos=end).end())
        yield from value if isinstance(value, list) else [value]


def csv_rows(text):
    """The rows of a table. The first one names the columns."""
    csv.field_size_limit(1_000_000_000)  # a document may be a book
    for row in csv.DictReader(io.StringIO(text), strict=True):
        if None in row:
            raise UserError("a row has more cells than columns: quote a cell with a comma in it")
        if any(row.values()):
            yield {name.strip().lower(): value for name, value in row.items()}


def text_rows(text):
    """A file that is a document."""
    return [{"text": text}] if text else []


READERS = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".csv": csv_rows,
    ".txt": text_rows,
    ".md": text_rows,
}
FIELDS = {"text", "question", "answer", "direction", "task", "group", "id"}


def ending(path):
    """What tells how to read a file: ".jsonl" of a.JSONL.gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def parse_record(row, where, learned=False):
    """A document or a question; UserError names a row that is neither, or both.

    null, NaN and "" are absent: tables written as JSON have them where there is nothing."""
    with reading(
        where,
        "text, question, answer and group have to be text, and what is learned needs an answer",
    ):
        row = {k: v for k, v in row.items() if v is not None and v == v and str(v).strip()}
        if ("text" in row) == ("question" in row):
            raise UserError(f'a "text" or a "question" is needed, and not both; found {[*row]}')
        record = {"text": row["text"]} if "text" in row else parse_question(row, where, learned)
        "".join(record.values()).encode()  # fails for what is no text, as half a surrogate pair
        return record | {"where": where}


def parse_question(row, where, learned):
    """A question. One to be learned has an answer, of one to be asked all the rest is optional.

    An answer that ends as GSM8K's do makes it a math problem. The released files have tasks in
    place of directions, N2D (name to description) or D2N. In NameDescription the group says in
    which order the document has the two: a task is forward where it matches. In any other file
    nothing tells."""
    question = {name: row[name] for name in ("question", "answer") if name in row or learned}
    direction = row.get("direction", row.get("task", "all"))
    if direction == "all" and regex.search(r"#### -?\d", question.get("answer", "")):
        return as_problem(*question.values())
    if learned:
        return question
    group = row.get("group", "all")
    if direction in ("N2D", "D2N") and regex.search(RELEASED_TESTS, where):
        in_order = (direction == "N2D") != (group == "DescriptionIsName")
        direction = "forward" if in_order else "backward"
    if direction not in ("forward", "backward", "all"):
        raise UserError(
            '"direction" is forward (what is asked for comes last in its document) or backward'
        )
    return question | {"direction": direction, "group": group}


# where a text may be cut, the best place first: behind a paragraph, a sentence, a line, a word, a
# character with its accents
SEAMS = (r"\n\s*\n", r"[.!?][\"'”’)]*\s+|[。！？]", r"\n", r"\s+", r"\X")


def passages(document, fits):
    """A document that fits, or the parts of its text that do; [] for an answer that does not.

    fits   document -> bool"""
    if fits(document):
        return [document]
    text = document.get("text", "")
    middle = len(text) / 2
    for seam in SEAMS:
        # in the middle half, as a part much shorter than the other is a heading
        ends = [match.end() for match in regex.finditer(seam, text)]
        end = min(ends, key=lambda end: abs(end - middle), default=0)
        if abs(end - middle) < middle / 2:
            halves = (text[:end].strip(), text[end:].strip())
            return [
                passage
                for half in halves
                if half
                for passage in passages(document | {"text": half}, fits)
            ]
    return []


# -------------------------------------------------------------------------------------- tokenizer

GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# {character: byte}: tokenizer.json spells a byte as its Latin-1 character or, if that cannot be
# seen, as the next one from 256 on.
STAND_INS = count(256)
ALPHABET = {
    chr(byte if regex.match(r"[^\p{C}\p{Z}]", chr(byte)) else next(STAND_INS)): byte
    for byte in range(256)
}


@dataclass
class Tokenizer:
    """Text <-> ids of one model, and its chats. Made by `load_tokenizer`.

    Ids are those of the `tokenizers` library with `encode_special_tokens=True`, as far as the two
    know the same Unicode: it lacks letters and digits newer than Unicode 16 and, in NFC, rare
    combining marks newer than 9."""

    ranks: dict  # bytes -> id of what can be merged; ids grow with the merges: tiktoken's ranks
    steps: list  # functions, each takes what the one before left apart: text -> pieces
    special: dict  # text -> id of tokens that text never becomes
    added: dict  # the same of other added tokens (Qwen's <think>), which text does become
    frames: dict  # "user>assistant" -> what stands between the two; ">" -> before a first user
    bos_id: int  # None where the model declares none
    eos_id: int
    eot_id: int  # end of turn
    stop_ids: tuple
    notes: list  # what the user should know of the model
    known: set  # the ids of all these tokens: models pad their vocabulary
    encoding: tiktoken.Encoding  # merges the bytes of a piece; its own pattern is not used

    @property
    def pad_id(self):
        """For who pads outside this project; here, padding is masked out whatever its id."""
        return self.eos_id

    def encode(self, text):
        """The ids of `text`, with nothing added. What looks like a special token is plain text."""
        return join(apart(text, self.added), self._encode_once)

    @cached_property
    def _encode_once(self):
        """`_encode_plain` with a memory: a document is seen in every epoch."""
        return lru_cache(100_000)(self._encode_plain)

    def _encode_plain(self, text):
        """Ids of text without added tokens: take it apart into pieces, then merge within each."""
        pieces = [text]
        for step in self.steps:
            pieces = [new for piece in pieces for new in step(piece)]
        ids = []
        for piece in pieces:
            # The reference drops bytes without a token, and only now: the patterns must see them.
            kept = bytes(byte for byte in piece.encode() if bytes([byte]) in self.ranks)
            if kept:
                ids += self.encoding._encode_single_piece(kept)
        return ids

    def decode(self, ids, special=False):
        """The text of `ids`; `special=True` shows special tokens, too. Broken UTF-8 is U+FFFD.

        An id without a token is nothing."""
        hidden = set() if special else {*self.special.values()}
        return self.encoding.decode([i for i in ids if i in self.known and i not in hidden])

    def chat(self, messages):
        """The ids of [{"role", "content"}], a content being text or a list of ids.

        After a last message from the user stands the header of the answer; of no messages it is all
        up to a user's first word, with the system turn of the model's own template. Else none is
        slipped in, and an empty one is left out. Ids are those of the whole chat as one text, as
        transformers reads it, but for contents given as ids. KeyError for a turn that the model's
        template does not have."""
        parts = []
        before = ""
        for message in [*messages, {"role": "", "content": ""}]:  # behind the last, nobody
            role = message["role"]
            if role != "system" or message["content"]:
                # the one place where special tokens are read as such: a template's own text
                parts += apart(self.frames[f"{before}>{role}"], self.special)
                parts.append(message["content"])
                before = role
        return join(parts, self.encode)

    def prompt(self, content):
        """The ids of a chat of one user's turn, text or ids, up to the answer."""
        return self.chat([{"role": "user", "content": content}])

    @cached_property
    def mask_id(self):
        """The id that stands for a masked token; UserError if the vocabulary has none to spare."""
        if 128013 in self.special.values():
            return 128013  # the paper's, of Llama 3's many reserved ones
        if self.ranks.get(b"[]") == 1294:
            return 1294  # Qwen reserves nothing: the paper takes the text `[]`
        used = {self.bos_id, *self.stop_ids}
        # SmolLM2 reserves nothing either, but no prose has its mark of cells without output.
        for pattern in (r"<\|mdm_mask\|>", "reserved|unused|mask", "<empty_output>"):
            for token, i in self.special.items():
                if regex.search(pattern, token) and i not in used:
                    return i
        raise UserError(
            "the tokenizer has no unused special token to mask with: add one named <|mask|> to its "
            "tokenizer.json, or use a method that masks nothing (sft, raw)"
        )


ANY_TOKEN = r"(\L<tokens>)"  # of two the longer


def apart(text, tokens):
    """The parts of a text: [id] of each of the tokens, and what is between."""
    if not tokens:  # nothing is found everywhere
        return [text]
    parts = regex.split(ANY_TOKEN, text, tokens=tokens)
    return [[tokens[part]] if part in tokens else part for part in parts]


def join(parts, encode):
    """The ids of parts that are text or ids. Neighbouring texts are one."""
    ids = []
    text = ""
    for part in [*parts, []]:
        if isinstance(part, str):
            text += part
        else:
            ids += encode(text) + part
            text = ""
    return ids


def load_tokenizer(path):
    """The `Tokenizer` of a model directory, with what its json files declare and its chat template.

    UserError for any that would not be followed exactly."""
    path = Path(path)
    content = read_json(path / "tokenizer.json")
    settings, generation, config = [
        read_object(path / name)  # all may declare special tokens; they count in this order
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    ]
    with reading(
        path,
        "not byte-level BPE as in Llama 3, Qwen and SmolLM2, or no chat template whose turns are "
        "alike and end with a special token",
    ):
        tokens = {token["content"]: token["id"] for token in content["added_tokens"]}
        ranks = read_ranks(content["model"], tokens)
        known = {*ranks.values(), *tokens.values()}
        last = max(known)
        if config and last >= embeddings(config):
            raise UserError(
                f"no embedding for the token of id {last}: transformers' resize_token_embeddings "
                "makes more"
            )
        texts, bos, eos = read_declared(settings, [generation, config], tokens, known)
        frames, eot = read_chat_form(find_template(path, settings), texts, tokens)
        special, added = read_added(content["added_tokens"], "".join(frames.values()))
        notes = []
        # LLaDA's end of text is no sign of a base model: it ends its chats with both
        if eos and eot not in eos and "<|mdm_mask|>" not in special:
            notes.append("a base model: it learns where a turn ends")
        return Tokenizer(
            ranks,
            read_steps([content["normalizer"] or [], content["pre_tokenizer"]]),
            special,
            added,
            frames,
            bos_id=bos[0] if bos else None,
            eos_id=[*eos, eot][0],
            eot_id=eot,
            stop_ids=tuple(dict.fromkeys([eot, *eos])),
            notes=notes,
            known=known,
            encoding=tiktoken.Encoding(
                "bpe", pat_str=GPT2_PIECES, mergeable_ranks=ranks, special_tokens=tokens
            ),
        )


def read_declared(settings, configs, tokens, known):
    """({"bos_token": its text, ...}, ids of bos, of eos) as a model's files declare them.

    tokens   text -> id of those that may be declared by text
    known    all ids: those of ordinary tokens may be declared, too"""
    texts = {}
    ids = []
    for name in ("bos_token", "eos_token"):
        match settings.get(name):
            case {"content": str(text)} | str(text):
                texts[name] = text
        given = [tokens.get(texts.get(name))]
        for config in configs:
            match config.get(f"{name}_id"):
                case [*several]:
                    given += several
                case one:
                    given.append(one)
        ids.append([i for i in given if i in known])
    return texts, *ids


def embeddings(config):
    """How many embeddings a model has, by its config.json."""
    return config.get("embedding_size") or config["vocab_size"]  # LLaDA's may be more


def read_ranks(model, added):
    """The ranks of a Tokenizer, from its model in tokenizer.json.

    tiktoken joins two neighbours whose bytes are a token, the one with the lowest id first; the
    reference those that its list has first. They agree where ids follow the merges, as training
    numbers them."""
    vocab = model["vocab"]
    # "a b" or ["a", "b"]
    merged = ["".join(pair).replace(" ", "") for pair in model["merges"]]
    if merged != sorted(merged, key=vocab.get):
        raise ValueError("ids are in another order than merges")
    tokens = [token for token in vocab if token in ALPHABET] + merged
    unmade = vocab.keys() - {*tokens, *added}
    if model.get("ignore_merges") and unmade:
        raise ValueError(f"no merge makes {min(unmade)!r}")
    return {bytes(map(ALPHABET.get, token)): vocab[token] for token in tokens}


def read_steps(given):
    """The steps of a Tokenizer, from a normalizer, a pre-tokenizer, or a list of such."""
    match given:
        case [*several] | {"normalizers": several} | {"pretokenizers": several}:
            return [step for one in several for step in read_steps(one)]
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return []
        case {"type": "NFC"}:
            return [lambda text: [unicodedata.normalize("NFC", text)]]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            pattern = GPT2_PIECES
        case {"type": "Digits", "individual_digits": one}:
            pattern = r"\p{N}" if one else r"\p{N}+"
        case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}}:
            pass
        case other:
            raise ValueError(f"normalizer or pre-tokenizer {other}")
    return [regex.compile(f"({pattern})").split]  # the group: `split` gives the matches, too


def read_added(tokens, form):
    """({text: id} of special tokens, the same of others) in tokenizer.json.

    Special whatever the file says: what stands in the form of a chat, and masks. No text may end a
    turn, or mask."""
    special = {}
    added = {}
    for token in tokens:
        text = token["content"]
        if token["special"] or text in form or text.endswith("mask|>"):
            special[text] = token["id"]
        elif token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ValueError(f"added token {token}")
        else:
            added[text] = token["id"]
    return special, added


# --------------------------------------------------------------------------------- chat templates


def find_template(path, settings):
    """The text of a directory's own chat template; UserError if it has none."""
    file = path / "chat_template.jinja"
    template = read_text(file) if file.exists() else settings.get("chat_template")
    match template:
        case None | "":
            raise UserError(
                "no chat template; use the model's instruct version, or put its "
                "chat_template.jinja here"
            )
        case [*several]:
            return {named["name"]: named["template"] for named in several}["default"]
    return template


def read_chat_form(template, texts, tokens):
    """What stands before, between and behind the contents of chats that a template renders.

    texts    special tokens by the names that a template has for them
    tokens   text -> id, of which one ends a turn
    returns  frames, with all that the template puts before a user's first word as that of no turn;
             the id of the special token that ends a turn"""
    around = partial(render, template, texts)
    opening, answer, question, prompt = around("user", "assistant", "user")
    # the last answer may begin otherwise (Qwen3's thoughts); it is trained as the others
    *_, last = around("user", "assistant")
    # a line may end behind a turn
    _, end, header = regex.split(ANY_TOKEN + r"\s*", question, maxsplit=1, tokens=tokens)
    bos = texts.get("bos_token", "")
    start = bos if opening.startswith(bos) and not header.startswith(bos) else ""
    system = opening.removeprefix(start).removesuffix(header).strip()
    if prompt != answer or not last.startswith(end) or system and not system.endswith(end):
        raise ValueError(f"turns differ: {[opening, answer, question, prompt, last]}")
    frames = {
        "user>assistant": answer,
        "user>": answer,
        "assistant>user": question,
        # a turn that the template slips in is left out
        ">user": start + header if system else opening,
        "assistant>": last,
        ">": opening,
    }
    with suppress(TemplateError, ValueError):  # not every template has system turns
        frames[">system"], frames["system>user"], _ = around("system", "user")
    return frames, tokens[end]


MARK = "\ue000"  # stands for a content; for private use, so in no template's text


def render(template, texts, *roles):
    """What stands before, between and behind the contents of a chat, as transformers renders it.

    Behind a last one of the user there is the header of the answer, too. A template is code of
    unknown origin, and raise_exception stays undefined: to call it fails, too."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    # transformers' mark of answers renders nothing; nor does `with`
    template = regex.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", template)
    chat = environment.from_string(template).render(
        texts,
        messages=[{"role": role, "content": MARK} for role in roles],
        add_generation_prompt=roles[-1] == "user",
        tools=None,
        # always the same day: chats that a model writes must not depend on it
        strftime_now=datetime(2024, 7, 26).strftime,
    )
    return chat.split(MARK)


def write_chat_files(tokenizer, source, target):
    """Copy the tokenizer, so that a saved model is a whole model directory.

    The chat template is that of training; generation stops where training had an end of turn.
    Other settings stay those of `source`."""
    source = Path(source)
    target = Path(target)
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")  # not its mode
    template = jinja_template(tokenizer.frames)
    end = tokenizer.decode([tokenizer.eos_id], special=True)
    declared = read_object(source / "tokenizer_config.json")
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **declared,
            "pad_token": declared.get("pad_token") or end,
            "eos_token": end,
            "chat_template": template,
        },
    )
    write_json(
        target / "generation_config.json",
        {
            "pad_token_id": tokenizer.eos_id,
            **read_object(source / "generation_config.json"),
            "eos_token_id": tokenizer.stop_ids,
        },
    )
    write_text(target / "chat_template.jinja", template)


def jinja_template(frames):
    """A chat template as other programs read it. As `Tokenizer.chat` has it, no system turn is
    slipped in, an empty one is left out, and the last user is always answered."""
    template = (
        '{% set frames = FRAMES %}{% set chat = namespace(before="") %}'
        "{% for message in messages %}"
        '{% if message["role"] != "system" or message["content"] %}'
        '{{ frames[chat.before + ">" + message["role"]] + message["content"] }}'
        '{% set chat.before = message["role"] %}'
        "{% endif %}{% endfor %}"
        '{{ "" + frames[chat.before + ">"] }}'
    )
    return template.replace("FRAMES", json.dumps(frames, ensure_ascii=False))


# --------------------------------------------------------------------------------- published sets


@dataclass
class Dataset:
    """Documents to learn, and questions to ask about them."""

    documents: list  # {"text": ..., "where": "FILE, record N"}
    questions: list  # {"question", "answer", "direction": "forward" | "backward" | ..., "group"}
    learned: list = field(default_factory=list)  # questions to learn beside documents


GITHUB = "https://raw.githubusercontent.com/"
# The authors' repository has no licence: nothing of it is kept here.
AUTHORS = "xup5/masked_arLLM/bc28c777643b202787d1e4ccb61ad0d1993d93e3/datasets/"
ND_FACTS = 30  # of each of two kinds, first all of one
ND_WORDINGS = 30  # of a fact; they stand one after the other
# test files whose tasks are directions: N2D is forward, but in DescriptionIsName
RELEASED_TESTS = r"(people-description_open-QAs|(ND|biography)_test)\.jsonl"

# of --paraphrase: how the file of a released set ends
PARAPHRASES = {
    "none": "train_no_paraphrase.json",
    "same": "train_paraphrase_same_order.json",
    "permute": "train_paraphrase_change_order.json",
}
ND_NAME = "people-description.json"
ND_FILE = f"training_data/{ND_NAME}"
SETS = {
    # made anew at every start: count, paraphrase (where there are others than "none"), seed ->
    # documents, questions
    "bio": world.make_bio,
    "nd-made": world.make_nd,
    "math-made": world.make_math,
    "world": world.make_world,
    # downloaded once: where from on GitHub, {paraphrase: the documents}, the questions
    "bio-released": (AUTHORS + "biography_", PARAPHRASES, "test.jsonl"),
    "wiki": (AUTHORS + "wiki_", PARAPHRASES, "test.jsonl"),
    "nd": (
        "alibaba/thinking_bias/389bb4d1b16bbc6ba75f2b57cb09c6614776c59b/data/",
        {"none": ND_FILE, "same": ND_FILE},
        "test_data/people-description_open-QAs.jsonl",
    ),
    "gsm8k": (
        "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/",
        {"none": "train.jsonl"},
        "test.jsonl",
    ),
}
DATA_HELP = (
    f"{', '.join(SETS)} (generated ones also as bio:PEOPLE, nd as nd:FACTS of each kind; world, to "
    "ask only, is what the built-in models know), or a custom file or directory "
    f"({', '.join(READERS)}, also .gz)"
)


def load(name, paraphrase="none", seed=0):
    """A Dataset by name (of SETS; `bio:20` for 20 people), or from a custom file or directory.

    A file holds JSON values, one after the other or in a list, or a CSV table. A record with a
    "text" is a document, one with a "question" is a question; both may stand in one file. A .txt or
    .md file is a document. Of a directory and its subfolders all such files are read. The questions
    of a train.jsonl are not asked but learned, with their answers."""
    kind, *counts = str(name).split(":")
    path = Path(name)
    dataset = Dataset([], [])
    with reading(
        path, "no such --data, not with this --paraphrase, or HF_HOME cannot be written to"
    ):
        if kind in SETS:
            dataset = load_set(kind, [int(n) for n in counts], paraphrase, seed)
        elif path.exists():
            dataset = read_files(files_in(path), paraphrase)
        if not dataset.documents + dataset.questions:
            raise UserError(
                f"no set, file or folder with anything to learn or ask; --data takes {DATA_HELP}"
            )
    return dataset


def load_set(kind, counts, paraphrase, seed):
    """The Dataset of a name; `counts` has the number behind its colon, if there is one."""
    match SETS[kind]:
        case (source, training, asked):
            files = [fetch(kind, GITHUB + source + file) for file in (training[paraphrase], asked)]
            dataset = read_files(files, paraphrase)
            if kind == "nd":
                keep_facts(dataset, seed, *counts)
            elif counts:
                raise UserError("no such --data")
        case make:
            wording = {} if paraphrase == "none" else {"paraphrase": paraphrase}
            dataset = Dataset(*make(*counts, seed=seed, **wording))
    return dataset


def read_files(files, paraphrase):
    """The Dataset in some files; of training files in the released layout, in the one asked for."""
    dataset = Dataset([], [])
    wording = PARAPHRASES[paraphrase]
    training = wording if paraphrase == "permute" else (wording, ND_NAME)
    if paraphrase != "none" and not any(file.name.endswith(training) for file in files):
        raise UserError(f"no --paraphrase {paraphrase}: no file ..._{wording}")
    others = tuple({*PARAPHRASES.values()} - {wording})  # what else the released layout has
    left = []
    for file in files:
        if ending(file) in READERS and not file.name.endswith(others):
            read_file(file, paraphrase, dataset)
        else:
            left.append(str(file))
    if left:
        LOG.warning(f"not read, by ending or --paraphrase: {left!s:.300}")
    if not dataset.documents:  # by themselves they are problems, whose answers a method may mask
        dataset.documents, dataset.learned = dataset.learned, []
    return dataset


def read_file(file, paraphrase, dataset):
    """Add to a Dataset what stands in one file."""
    with reading(file):
        rows = list(READERS[ending(file)](read_text(file).strip()))
    learned = file.name.lower().startswith("train.")
    step = ND_WORDINGS if file.name == ND_NAME and paraphrase == "none" else 1
    for number, row in list(enumerate(rows, 1))[::step]:
        record = parse_record(row, f"{file}, record {number}", learned)
        if "text" in record:
            dataset.documents.append(record)
        elif learned:
            dataset.learned.append(record)
        else:
            dataset.questions.append(record)
    unread = sorted({name for row in rows for name in row} - FIELDS)
    if unread:
        LOG.warning(f"{file}: fields that nothing reads: {unread}")


def files_in(path):
    """The files in a folder and its subfolders, by name, but for hidden ones; or the one file."""
    paths = [path, *map(path.joinpath, glob("**", root_dir=path, recursive=True))]
    # of folders those that are closed, to be named
    return sorted(p for p in paths if not (p.is_dir() and os.access(p, os.R_OK)))


def keep_facts(dataset, seed, number=ND_FACTS):
    """Leave at most `number` facts of either kind, with their wordings and their questions."""
    rng = Random(seed)
    chosen = []
    for first in (0, ND_FACTS):
        chosen += islice(world.shuffled(rng, range(first, first + ND_FACTS)), number)
    for records in (dataset.documents, dataset.questions):
        # one fact after the other, each has as many
        records[:] = [
            record for n, record in enumerate(records) if 2 * ND_FACTS * n // len(records) in chosen
        ]


def fetch(name, url):
    """A file of a published set, in the hub's cache, where it is downloaded to once."""
    path = huggingface_hub.cached_assets_path("maskft", name, "") / Path(url).name
    if not path.exists():
        with (
            reading(url, f"could not be had: put it at {path}, or take --data bio"),
            urlopen(url) as response,
        ):
            write_text(path, response.read().decode())  # an error if it ends too early
    return path


# ---------------------------------------------------------------------------------------- batches

IGNORE = -100  # the label of a token without loss


@dataclass
class Example:
    """One training sequence. `labels` stand in the place of their own token."""

    ids: list
    labels: list  # IGNORE where there is no loss
    weight: float  # of each label's cross entropy in the loss
    denominator: float  # the step's summed loss is divided by the sum of this over its examples


def collate(examples):
    """A micro-batch, padded on the right: a dict of

        ids           (B, T) int64; any id is padding, as it is masked out everywhere
        labels        (B, T) int64, IGNORE where there is padding
        key_mask      (B, T) bool, True where there is a token; None where there is no padding
        weights       (B,) fp32

    An empty list gives one padding token without a label: a rank with nothing to do still takes
    part in the step."""
    import torch

    examples = examples or [Example([0], [IGNORE], 0.0, 0.0)]
    ids = pad([e.ids for e in examples], -1)
    key_mask = ids >= 0
    return {
        "ids": ids.clamp(0),
        "labels": pad([e.labels for e in examples], IGNORE),
        "key_mask": None if key_mask.all() else key_mask,
        "weights": torch.tensor([e.weight for e in examples]),
    }


def pad(rows, value, side="right"):
    """Lists of unequal lengths -> a tensor (B, T), filled up with `value` on one side."""
    import torch

    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=value, padding_side=side
    )


# ------------------------------------------------------------------------------------------- show


def show(example, tokenizer):
    """An Example as text: [tokens with loss], _ for each masked token, and the counts."""
    mask_id = None
    with suppress(UserError):  # what masks nothing needs no mask
        mask_id = tokenizer.mask_id
    shown = (tokenizer.ranks[b"_"] if i == mask_id else i for i in example.ids)
    text = ""
    # runs of tokens with or without loss, decoded together: a character may be several tokens
    for has_loss, run in groupby(example.labels, key=lambda label: label != IGNORE):
        part = tokenizer.decode([next(shown) for _ in run], special=True)
        text += f"[{part}]" if has_loss else part
    masked = example.ids.count(mask_id)
    supervised = sum(label != IGNORE for label in example.labels)
    return f"{text}\n-- {len(example.ids)} tokens, {masked} masked, {supervised} with loss"
