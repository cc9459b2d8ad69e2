r"""Text in, training sequences out: files, tokenizers, chat templates, data sets, batches.

One record of every kind:

    document    {"text": "Edda Marlow was born on 3 June 1971. She is a native of Oslo. ...",
                 "where": "facts.jsonl, line 1"}
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

import base64
import csv
import gzip
import io
import json
import math
import os
import shutil
import sys
import unicodedata
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from http.client import HTTPException
from itertools import count as counting
from itertools import groupby
from pathlib import Path
from random import Random
from urllib.request import urlopen

import huggingface_hub.constants
import regex  # comes with tiktoken; the standard re has no \p{L}
import tiktoken
import torch
from jinja2 import TemplateError  # jinja2 comes with torch
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tiny import world
from tiny.world import as_problem

# --------------------------------------------------------------------------- records and files in


class UserError(Exception):
    """A mistake of the user's: `main` prints its text, without a traceback, and exits with 1."""


def read_text(path):
    """The text of a UTF-8 file, also of a .gz; UserError if it cannot be read."""
    opened = gzip.open if Path(path).suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:  # some programs begin with a BOM
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: of a damaged .gz
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}") from None


def parse_json(text, where):
    """The JSON value of a text; UserError names where it is from."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{where}{line}: not JSON ({error.msg}, column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
        raise UserError(f"{where}: cannot be read as JSON ({error})") from None


def read_json(path):
    return parse_json(read_text(path), path)


@contextmanager
def reading(file, broken=None):
    """Whatever goes wrong inside with the contents of `file` is a UserError that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # a list stands for an object, a pattern is no pattern, ...
        broken = broken or f"not a whole {file.stem} file; download it again"
        raise UserError(f"{file}: {broken} ({error!r})") from None


def read_object(path):
    """The JSON object in a file; {} if there is no such file."""
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object ({{...}}); download the file again")
    return content


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
KINDS |= {dict: "an object ({...})", list: "a list"}
LIMITS = {int: (1, 10**9), float: (1e-12, 1e12)}  # sizes, ids and factors of any real model
REQUIRED = object()


def read_field(content, name, kind, default=REQUIRED, low=None):
    """A field of a JSON object, as the kind that it has to be; put right where it is evident.

    A number or a truth value may be text, as in "1e-05"; numbers have LIMITS, `low` another lower
    one. null is absent. UserError names the field and what was found."""
    if not isinstance(content, dict):
        raise UserError(
            f'found {shown(content)} where an object with "{name}" must be; download it again'
        )
    value = content.get(name)
    if value is None and default is not REQUIRED:
        return default
    found = as_kind(value, kind)
    wanted = KINDS[kind]
    is_good = found is not None
    if kind in LIMITS:
        least, most = LIMITS[kind]
        least = least if low is None else low
        wanted += f" from {least:g} to {most:g}"
        is_good = is_good and least <= found <= most
    if not is_good:
        what = shown(value) if name in content else "nothing"
        raise UserError(
            f'"{name}" must be {wanted}, found {what}; correct it, or download it again'
        )
    content[name] = found
    return found


def as_kind(value, kind):
    """A JSON value as `kind`, a number or truth value also from text; None if it is none."""
    if isinstance(value, str) and kind in (bool, int, float):
        try:
            value = json.loads(value.lower())
        except ValueError:
            return None
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else None


def shown(value):
    """A JSON value as a message shows it."""
    if isinstance(value, dict | list):  # nested too deeply, maybe, to be written
        return KINDS[type(value)]
    return json.dumps(value)[:80]


def write_text(path, text):
    """Replace a file atomically: whoever reads it sees the old text or the new, never a part."""
    part = Path(f"{path}.{os.getpid()}.part")  # several processes may do so at once
    # a file's name may be no UTF-8; JSON reads what is written instead as the same
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_records(path):
    """("FILE, line N", record) for every record of a file; null and "" are absent from it.

    UserError names a record that is neither a document nor a question, or both."""
    read = READERS.get(ending(path), json_records)
    records = []
    for where, record in read(read_text(path), path):
        fields = record.items() if isinstance(record, dict) else ()
        # tables written as JSON have null or NaN where there is nothing
        record = {k: v for k, v in fields if v not in (None, "") and v == v}
        if "text" in record and "question" in record:
            raise UserError(
                f'{where}: a document ("text") and a question in one: give each a line of its own'
            )
        if "text" not in record and "question" not in record:
            raise UserError(
                f'{where}: not a document ({{"text": ...}}) '
                'nor a question ({"question": ..., "answer": ...})'
            )
        records.append((where, record))
    return records


def json_records(text, path):
    """The records of a JSON list, or of JSON lines."""
    if text.lstrip().startswith("["):
        for number, record in enumerate(parse_json(text, path), 1):
            yield f"{path}, item {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}, line {number}"
        if line.strip():
            yield where, parse_json(line, where)


def text_records(text, path):
    """A file that is a document."""
    if text.strip():
        yield str(path), {"text": text.strip()}


def csv_records(text, path):
    """A record a row. The first row names the columns; without one of ours there is no record."""
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    first_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=first_line.count)
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    line = 1  # where a row begins: its cells may have several
    try:
        columns = [name.strip().lower() for name in next(rows, [])]
        if "text" not in columns and "question" not in columns:
            return
        line = rows.line_num + 1
        for cells in rows:
            where = f"{path}, line {line}"
            line = rows.line_num + 1
            if len(cells) > len(columns):
                raise UserError(
                    f"{where}: {len(cells)} cells in {len(columns)} columns: put quotes around "
                    f"a cell with a {delimiter!r} in it"
                )
            if any(cells):
                yield where, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV ({error})") from None


READERS = {
    ".json": json_records,
    ".jsonl": json_records,
    ".ndjson": json_records,
    ".txt": text_records,
    ".md": text_records,
    ".csv": csv_records,
}


def unpacked(path):
    """The path without the .gz at its end."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def ending(path):
    """What tells how to read a file: ".jsonl" of A.JSONL.gz."""
    return unpacked(path).suffix.lower()


def text_field(record, field, where):
    """A string that is not empty, or a UserError that says where."""
    value = record.get(field)
    if isinstance(value, str) and value.strip() and not regex.search(r"[\ud800-\udfff]", value):
        return value
    raise UserError(f'{where}: "{field}" must be text, whole and not empty; found {shown(value)}')


def parse_question(record, where, learned=False, released=False):
    """A question. One to be learned has an answer, of one to be asked all the rest is optional.

    An answer that ends as GSM8K's do makes it a math problem. `released`: see parse_direction."""
    parsed = {"question": text_field(record, "question", where), "where": where}
    if learned or "answer" in record:
        parsed["answer"] = text_field(record, "answer", where)
    task = record.get("direction", record.get("task"))
    if task is None and regex.search(r"#### -?\d", parsed.get("answer", "")):
        return as_problem(parsed["question"], parsed["answer"]) | {"where": where}
    if learned:
        return parsed
    group = record.get("group", "all")
    if isinstance(group, int | float):
        group = str(group)
    group = text_field({"group": group}, "group", where)
    direction = parse_direction(task, group, where, released)
    return parsed | {"direction": direction, "group": group}


def parse_direction(task, group, where, released):
    """The direction of a question, also as the released files write it; "all" if none is given.

    Their tasks are N2D (name to description) and D2N. In NameDescription the group says in which
    order the document has the two: a task is forward where it matches. In other files than the
    released ones, only the documents can tell: see add_directions."""
    if task is None:
        return "all"
    if task in ("forward", "backward", "all"):
        return task
    if task not in ("N2D", "D2N"):
        raise UserError(
            f'{where}: "direction" (or "task") must be forward or backward, found {shown(task)}'
        )
    if not released and group not in ND_GROUPS:
        return task
    order = "D2N" if group == "DescriptionIsName" else "N2D"
    return "forward" if task == order else "backward"


def add_directions(questions, documents):
    """Set the direction of questions whose file tells only their tasks (N2D, D2N).

    Of the documents with the answer: a question is forward if what it shares with them stands
    before the answer. A word counts the less, the more documents have it. UserError if no document
    tells."""
    texts = [plain(document.get("text", "")) for document in documents]
    frequency = Counter(word for text in texts for word in set(text.split()))

    def shared(asked, part):
        return sum(1 / frequency[word] for word in asked & set(part.split()))

    for question in questions:
        asked = set(plain(question["question"]).split())
        answer = plain(question.get("answer", ""))
        told = [text.partition(answer) for text in texts if answer in text]
        forward = sum(shared(asked, before) for before, _, _ in told)
        backward = sum(shared(asked, after) for _, _, after in told)
        if math.isclose(forward, backward):
            raise UserError(
                f"{question['where']}: no document tells which way {question['direction']} asks: "
                'add "direction": "forward" (what is asked for comes last, as in the document) or '
                '"backward"'
            )
        question["direction"] = "forward" if forward > backward else "backward"


def plain(text):
    """Its words in lower case, without punctuation, a space around each."""
    words = regex.findall(r"\w+", unicodedata.normalize("NFC", text).casefold())
    return f" {' '.join(words)} "


# where a text may be cut, the best place first: behind a paragraph, a sentence, a line, a word, a
# character with its accents
SEAMS = (r"\n\s*\n", r"[.!?][\"'”’)]*\s+|[。！？]", r"\n", r"\s+", r"\X")


def passages(text, fits):
    """A text cut into parts that each fit; [] if not even a character does.

    fits   text -> bool; what begins a text that fits has to fit, too"""
    parts = []
    text = text.strip()
    while text:
        end = passage_end(text, fits)
        if not end:
            return []
        parts.append(text[:end].strip())
        text = text[end:].lstrip()
    return parts


def passage_end(text, fits):
    """Where the first passage of a text ends; 0 if nothing fits."""
    # not the whole text at once, which may be a book
    window = 1000
    while window < len(text) and fits(text[:window]):
        window *= 2
    text = text[: window + 100]
    if len(text) <= window and fits(text):
        return len(text)
    room = bisect_left(range(1, window + 1), True, key=lambda end: not fits(text[:end]))
    for seam in SEAMS:
        ends = [match.end() for match in regex.finditer(seam, text)]
        for end in reversed(ends):
            passage = text[:end].rstrip()
            # what is much shorter is a heading or an initial, and no passage
            if room // 8 < len(passage) <= room and fits(passage):
                return end
    return 0


# -------------------------------------------------------------------------------------- tokenizer


@dataclass
class Tokenizer:
    """Text <-> ids of one model, and its chats. Made by `load_tokenizer`.

    Ids are those of the `tokenizers` library with `encode_special_tokens=True` on any text, as far
    as the two know the same Unicode: it lacks letters and digits newer than Unicode 16 and, in NFC,
    rare combining marks newer than 9."""

    ids: list  # rank -> id: what can be merged, in the order of the merges
    bytes_of: dict  # id -> the bytes it stands for, special and added tokens too
    patterns: list  # each splits what the one before left, into its matches and what is between
    special: dict  # text -> id of tokens that text never becomes
    added: dict  # the same of other added tokens (Qwen's <think>), which text does become
    whole: dict  # bytes -> id of pieces looked up before any merging ("ignore_merges")
    missing: bytes = b""  # the bytes that the vocabulary lacks
    nfc: bool = False
    late: tuple = ()  # tokens looked for in what the others leave ("normalized")
    # The rest depends on more than the tokenizer's file: see load_tokenizer.
    template: str = ""
    system_turn: str = ""  # that the model's own template puts before a chat; training has none
    notes: list = field(default_factory=list)  # what the user should know of it
    bos_id: int | None = None  # None where the model declares none
    eos_id: int | None = None
    eot_id: int | None = None  # end of turn
    pad_id: int | None = None
    stop_ids: tuple = ()

    def __post_init__(self):
        mergeable = {self.bytes_of[i]: rank for rank, i in enumerate(self.ids)}
        self.ranks = {self.bytes_of[i]: i for i in self.ids}
        # tiktoken's own pattern is not used.
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=LLAMA3_PIECES, mergeable_ranks=mergeable, special_tokens={}
        )
        # the group: `split` gives the matches, too
        self.compiled = [regex.compile(f"({pattern})") for pattern in self.patterns]
        tokens = self.special | self.added
        self.bytes_of |= {i: token.encode() for token, i in tokens.items()}
        early = [token for token in tokens if token not in self.late]
        self.added_patterns = [self._pattern(some) for some in (early, self.late) if some]
        # a document is seen in every epoch, and the text of a template in every chat
        self._encode_once = lru_cache(2**17)(self._encode)

    def _pattern(self, tokens):
        choices = []
        for token in sorted(tokens, key=len, reverse=True):  # the longest wins, as in the reference
            # A special token is stepped over, for none may be found inside of it.
            skip = "(*SKIP)(*FAIL)" if token in self.special else ""
            choices.append(regex.escape(token) + skip)
        return regex.compile(f"({'|'.join(choices)})")

    def encode(self, text):
        """The ids of `text`, with nothing added. What looks like a special token is plain text."""
        return list(self._encode_once(text))  # a copy: callers may change it

    def _encode(self, text, stage=0):
        if stage == len(self.added_patterns):
            return self._encode_plain(text)
        ids = []
        for number, part in enumerate(self.added_patterns[stage].split(text)):
            is_token = number % 2 == 1  # text, token, text, ... text
            ids += [self.added[part]] if is_token else self._encode(part, stage + 1)
        return ids

    def _encode_plain(self, text):
        """Ids of text without added tokens: split it into pieces, then merge within each."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        pieces = [text]
        for pattern in self.compiled:
            pieces = [part for piece in pieces for part in pattern.split(piece) if part]
        ids = []
        for piece in pieces:
            ids += self._encode_piece(piece.encode())
        return ids

    def _encode_piece(self, piece):
        if piece in self.whole:
            return [self.whole[piece]]
        # The reference drops bytes without a token, and only now: the patterns must see them.
        piece = piece.translate(None, self.missing)
        if not piece:
            return []
        return [self.ids[rank] for rank in self.encoding._encode_single_piece(piece)]

    def decode(self, ids, special=False):
        """The text of `ids`; `special=True` shows special tokens, too. Broken UTF-8 is U+FFFD."""
        hidden = () if special else set(self.special.values())
        # An id without a token (models pad their vocabulary) is nothing.
        shown = [self.bytes_of.get(i, b"") for i in ids if i not in hidden]
        return b"".join(shown).decode(errors="replace")

    def chat(self, messages):
        """The ids of [{"role", "content"}], a content being text or a list of ids.

        After a last message from the user stands the header of the answer. No system turn is
        slipped in, and an empty one is left out. Contents are encoded on their own and not
        stripped: a document has the same ids wherever it stands."""
        start, header, end = TEMPLATES[self.template]
        ids = self._encode_frame(start)
        for message in messages:
            content = message["content"]
            if message["role"] == "system" and not content:
                continue
            ids += self._encode_frame(header.format(role=message["role"]))
            ids += self.encode(content) if isinstance(content, str) else content
            ids += self._encode_frame(end)
        if messages[-1]["role"] == "user":
            ids += self._encode_frame(header.format(role="assistant"))
        return ids

    def user_header(self):
        """The ids of a chat up to the first word of a user, as the model was made to see it: with
        the system turn of its own template. Without, few models draw what a user would say."""
        start, header, _ = TEMPLATES[self.template]
        return self._encode_frame(start + self.system_turn + header.format(role="user"))

    def _encode_frame(self, text):
        """Ids of a template's own text: the one place where special tokens are read as such."""
        ids = []
        for part in MARK.split(text):
            ids += [self.special[part]] if part in self.special else self.encode(part)
        return ids

    @cached_property
    def mask_id(self):
        """The id that stands for a masked token; UserError if the vocabulary has none to spare."""
        if self.template == "chatml" and self.bytes_of.get(1294) == b"[]":
            return 1294  # Qwen reserves nothing: the paper takes the text `[]`
        if self.template == "llama3" and 128013 in self.special.values():
            return 128013  # the paper's, of Llama 3's many reserved ones
        used = {self.bos_id, self.pad_id, *self.stop_ids}
        # SmolLM2 reserves nothing either, but no prose has its mark of cells without output.
        for pattern in (r"<\|mdm_mask\|>", "reserved|unused|mask", "<empty_output>"):
            tokens = [token for token in self.special if regex.search(pattern, token)]
            spare = {self.special[token] for token in tokens} - used
            if spare:
                return min(spare)
        raise UserError(
            "the tokenizer has no unused special token to mask with: add one named <|mask|> to its "
            "tokenizer.json and, if its id is beyond the embeddings, resize them (transformers' "
            "resize_token_embeddings); or use a method that masks nothing (sft, raw)"
        )


def load_tokenizer(path):
    """The `Tokenizer` of a model directory, with the special tokens its json files declare.

    Made from its tokenizer.json (byte-level BPE) or Llama 3's tokenizer.model. UserError, naming
    the file, for any that would not be followed exactly."""
    path = Path(path)
    file = tokenizer_file(path)
    content = read_object(file) if file.suffix == ".json" else None
    with reading(file):
        tokenizer = read_tiktoken(file) if content is None else read_tokenizer_json(content)
    special = tokenizer.special
    declared = read_declared(path)
    tokenizer.template, tokenizer.system_turn = find_template(tokenizer, declared, path)
    start, _, end = TEMPLATES[tokenizer.template]
    bos, eos, pad = [special_ids(special, declared[name]) for name in ("bos", "eos", "pad")]
    tokenizer.eot_id = special[end.strip()]
    tokenizer.bos_id = bos[0] if bos else special.get(start)
    tokenizer.eos_id = eos[0] if eos else tokenizer.eot_id
    tokenizer.stop_ids = tuple(dict.fromkeys([tokenizer.eot_id, *eos]))
    config = read_object(path / "config.json")
    with reading(path / "config.json"):
        rows = embeddings(config)
    used = {tokenizer.bos_id, *tokenizer.stop_ids}
    check_ids(tokenizer, rows, set(pad) - used, path)
    # any: padding is masked out everywhere
    tokenizer.pad_id = next((i for i in pad if i < rows), tokenizer.eos_id)
    # LLaDA's end of text is no sign of a base model: it ends its chats with both
    if eos and tokenizer.eot_id not in eos and tokenizer.template != "llada":
        tokenizer.notes.append(
            f"{path}: a base model, which ends texts with {shown_token(tokenizer, eos[0])}: "
            f"it learns to end a turn with {end.strip()}"
        )
    return tokenizer


def tokenizer_file(path):
    """The file that a model directory's tokenizer is made from; UserError if there is none."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).exists():
            return path / name
    raise UserError(
        f"{path}: no tokenizer.json or tokenizer.model here; give a complete model directory"
    )


# the files that declare special tokens, in the order in which they count
DECLARING = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)


def read_declared(path):
    """{"bos": [text or id, ...], ...}: the special tokens that a directory's files declare."""
    declared = {name: [] for name in ("bos", "eos", "pad", "unk")}
    for file in DECLARING:
        content = read_object(path / file)
        with reading(path / file):
            for name, tokens in declared.items():
                tokens.append(token_text(content, f"{name}_token"))
                tokens += token_ids(content, f"{name}_token_id")
    return declared


def special_ids(special, tokens):
    """The ids, each once, of those of `tokens`, texts and ids, that are special ones."""
    ids = [special.get(token, token) for token in tokens]
    return list(dict.fromkeys(i for i in ids if i in special.values()))


def token_ids(content, name):
    """The ids in a field that holds one or several, or -1, which some files have for none."""
    found = content.get(name)
    if not isinstance(found, list):
        return [read_field(content, name, int, None, low=-1)]
    content[name] = [read_field({name: i}, name, int, low=-1) for i in found]
    return content[name]


def token_text(content, name):
    """The text of a special token in one file, which may wrap it; None if there is none."""
    token = content.get(name)
    if isinstance(token, dict):
        token = token.get("content", token)
    return read_field({name: token}, name, str, None)


def embeddings(config):
    """How many embeddings a model has, by its config.json; without one as many as it takes."""
    rows = read_field(config, "vocab_size", int, LIMITS[int][1])
    return read_field(config, "embedding_size", int, rows)  # LLaDA's may be more


def check_ids(tokenizer, rows, padding, path):
    """UserError for a token whose id is beyond the embeddings; one for padding is done without."""
    beyond = [i for i in tokenizer.bytes_of if i >= rows and i not in padding]
    if beyond:
        i = min(beyond)
        raise UserError(
            f"{path}: the token {shown_token(tokenizer, i)} has the id {i}, but config.json says "
            f"that the model has {rows} embeddings; resize them with transformers: "
            f"m = AutoModelForCausalLM.from_pretrained({str(path)!r}); "
            f"m.resize_token_embeddings({max(beyond) + 1}); m.save_pretrained({str(path)!r})"
        )
    tokenizer.special = {token: i for token, i in tokenizer.special.items() if i < rows}


def shown_token(tokenizer, i):
    return repr(tokenizer.decode([i], special=True))


def copy_tokenizer(tokenizer, source, target):
    """Copy the tokenizer, so that a saved model is a whole model directory."""
    shutil.copy(tokenizer_file(Path(source)), target)
    write_chat_files(tokenizer, source, target)


def write_chat_files(tokenizer, source, target):
    """Write what makes other programs chat with a model as it was trained.

    The chat template is that of training; generation stops where training had an end of turn.
    Other settings stay those of `source`."""
    target = Path(target)
    template = jinja_template(tokenizer.template)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    generation = read_object(Path(source) / "generation_config.json")
    for name in ("bos", "eos", "pad"):
        i = getattr(tokenizer, f"{name}_id")
        if i is not None:
            settings[f"{name}_token"] = tokenizer.bytes_of[i].decode()
            generation[f"{name}_token_id"] = i
    pad_token = settings["pad_token"]
    settings |= read_object(Path(source) / "tokenizer_config.json")
    settings |= {"pad_token": pad_token, "chat_template": template}
    generation["eos_token_id"] = list(tokenizer.stop_ids)
    write_json(target / "tokenizer_config.json", settings)
    write_json(target / "generation_config.json", generation)
    write_text(target / "chat_template.jinja", template)


GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3: ordinary tokens, then 256 special ones, all reserved but these (3.1's names for them).
LLAMA3_SIZE = 128000
LLAMA3_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}

# {character: byte}: tokenizer.json spells a byte as its Latin-1 character or, if that cannot be
# seen, as one from 256 on.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNSEEN = [byte for byte in range(256) if byte not in SEEN]
ALPHABET = {chr(byte): byte for byte in SEEN} | {chr(256 + n): b for n, b in enumerate(UNSEEN)}
BYTES = str.maketrans(ALPHABET)


def refuse(what):
    raise UserError(
        f"{what} is not supported, only byte-level BPE as in Llama 3, Qwen and SmolLM2; "
        "use a model with such a tokenizer"
    )


def read_tiktoken(file):
    """A `Tokenizer` from Llama 3's original file: lines of base64 token and rank, also its id."""
    try:
        pairs = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except ValueError:
        refuse("what is no tiktoken file (SentencePiece?)")
    # Such files do not tell their pattern, so know the model.
    if sorted(ranks.values()) != list(range(LLAMA3_SIZE)):
        refuse(f"a tiktoken file without Llama 3's {LLAMA3_SIZE} tokens")
    special = {}
    for n in range(256):
        name = LLAMA3_SPECIAL.get(n, f"<|reserved_special_token_{n}|>")
        special[name] = LLAMA3_SIZE + n
    return Tokenizer(
        ids=range(LLAMA3_SIZE),
        bytes_of={i: token for token, i in ranks.items()},
        patterns=[LLAMA3_PIECES],
        special=special,
        added={},
        whole={},
    )


def read_tokenizer_json(content):
    """A `Tokenizer` from tokenizer.json. Its post-processor (which adds a bos) is left aside."""
    model = read_field(content, "model", dict)
    vocab = read_vocab(model)
    missing = bytes(byte for char, byte in ALPHABET.items() if char not in vocab)
    check_model(model, missing)
    nfc = is_nfc(content.get("normalizer"))
    added_tokens = read_field(content, "added_tokens", list, [])
    special, added, late = read_added_tokens(added_tokens, nfc)
    unknown = set("".join(vocab)) - ALPHABET.keys()
    ordinary = {
        token: i for token, i in vocab.items() if token not in special and unknown.isdisjoint(token)
    }
    ids = read_merges(ordinary, read_field(model, "merges", list))
    check_added_ids(added_tokens, vocab)
    bytes_of = {i: token.translate(BYTES).encode("latin-1") for token, i in ordinary.items()}
    ignore_merges = read_field(model, "ignore_merges", bool, False)
    return Tokenizer(
        ids=ids,
        bytes_of=bytes_of,
        patterns=read_patterns(read_field(content, "pre_tokenizer", dict, {"type": None})),
        special=special,
        added=added,
        whole={token: i for i, token in bytes_of.items()} if ignore_merges else {},
        missing=missing,
        nfc=nfc,
        late=late,
    )


def read_vocab(model):
    """{token: id} of a BPE model, without what no model can have."""
    vocab = read_field(model, "vocab", dict)
    tokens = {}
    for token in vocab:
        i = read_field(vocab, token, int, low=0)
        if i in tokens:
            raise UserError(f'"vocab" has the id {i} twice, for {tokens[i]!r} and {token!r}')
        tokens[i] = token
    return vocab


REFUSED_OPTIONS = (
    "byte_fallback",
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
)


def check_model(model, missing):
    """Refuse what would not be followed exactly."""
    kind = model.get("type", "BPE")
    if kind != "BPE":
        refuse(f"the model type {kind}")
    if model.get("unk_token") and missing:  # with all the bytes, nothing is unknown
        refuse("a model with unk_token")
    for option in REFUSED_OPTIONS:
        if model.get(option):
            refuse(f"a model with {option}")


def is_nfc(normalizer):
    """Whether text is normalized to NFC; any other normalizer is refused."""
    match normalizer:
        case None:
            return False
        case {"type": "NFC"}:
            return True
        case {"type": "Sequence", "normalizers": [*steps]}:
            return True in [is_nfc(step) for step in steps]  # each of them is looked at
    refuse(f"the normalizer {json.dumps(normalizer)}")


def check_added_ids(tokens, vocab):
    """Refuse an added id that is not the one the reference gives: it numbers what is new to it."""
    last = len(vocab) - 1
    for token in tokens:
        expected = vocab.get(token["content"], last + 1)
        if token["id"] != expected:
            raise UserError(
                f'"added_tokens" gives {token["content"]!r} the id {token["id"]}, the tokenizers '
                f"library would give it {expected}; number added tokens from the end of the "
                "vocabulary on"
            )
        last = max(last, expected)


def read_added_tokens(tokens, nfc):
    """{text: id} of the special tokens, {text: id} of the others; which of both are found late."""
    special = {}
    added = {}
    late = []
    for token in tokens:
        text = read_field(token, "content", str)
        i = read_field(token, "id", int, low=0)
        if not text:
            refuse("an added token without a text")
        flags = {flag: read_field(token, flag, bool) for flag in ADDED_FLAGS}
        if flags["normalized"]:
            late.append(text)
        if read_field(token, "special", bool) or text in ALWAYS_SPECIAL:
            special[text] = i
            continue
        for flag, is_set in flags.items():
            if is_set and (flag != "normalized" or nfc):
                refuse(f"the added token {text!r} with {flag}")
        added[text] = i
    return special, added, tuple(late)


ADDED_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def read_patterns(pre_tokenizer):
    """The regular expressions by which the steps of a pre-tokenizer split a text."""
    steps = read_field(pre_tokenizer, "pretokenizers", list, [pre_tokenizer])
    if not steps:
        refuse("a pre-tokenizer without steps")
    patterns = []
    for step in steps[:-1]:
        match step:
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "Digits", "individual_digits": False}:
                patterns.append(r"\p{N}+")
            case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}}:
                patterns.append(check_pattern(pattern))
            case _:
                refuse_step(step)
    match steps[-1]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            pass  # bytes alone
        case {"type": "ByteLevel", "add_prefix_space": False}:
            patterns.append(GPT2_PIECES)
        case step:
            refuse_step(step)
    return patterns


def refuse_step(step):
    refuse(f"the pre-tokenizer {json.dumps(step)[:200]}")


def check_pattern(pattern):
    """The regular expression of a Split; refused if Oniguruma, the reference's engine, may read it
    otherwise."""
    bare = regex.sub(r"\\([pP]\{\w+\}|[sSdrnt\W])", "x", pattern)
    bare = regex.sub(r"\[[^][&\\]+\]", "x", bare)  # plain character classes
    odd = regex.search(r"[][\\^$.]|\}\+|\((?!\?(i?:|<?[=!]))", bare)
    if odd:
        refuse(f"{odd.group()!r} in the pattern {pattern!r}")
    return pattern


def read_merges(vocab, merges):
    """The ids of all that can be merged, by rank, so that tiktoken merges as the reference does.

    tiktoken joins two neighbours if their *bytes* are a token, the reference only if that *pair*
    is in its list. The two agree if every token has the rank of the merge that completes it when
    its own bytes are merged, and tokens never completed are left out. For as long as two neighbours
    spell a token T, no merge has crossed T's ends, so they were merged as T by itself would be:
    they are the last pair on T's way, or T has no way and they no merge."""
    ranks = {}
    for rank, pair in enumerate(merges):
        match pair.split(" ") if isinstance(pair, str) else pair:
            case [str(left), str(right)]:
                ranks[left, right] = rank
            case _:
                raise UserError(f'"merges" number {rank} must be two tokens, found {pair!r}')
        if not {left, right, left + right} <= vocab.keys():
            refuse(f"merge {rank}, {left!r} + {right!r}, without an ordinary token for it,")
    singles = [token for token in vocab if len(token) == 1]
    last = last_merges(singles, ranks)
    return [vocab[token] for token in sorted(last, key=last.get)]


def last_merges(singles, ranks):
    """{token: rank of the merge that completes it when its own bytes are merged}, if one does.

    That merge joins two completed tokens, and no merge crosses from one to the other before. To see
    that, we undo the merges of both, the last one first, down to the bytes. The merge with the
    lowest rank goes first: so the token with the higher rank on its way is completed later (if
    equal, the right one: equal merges go from left to right). Undoing its last merge leaves the
    half of it that touches the other token. Those two stood side by side until that merge, and were
    joined before it if their rank is lower than the highest one that was merged in that time."""
    last = dict.fromkeys(singles, -1)
    # token: the highest rank on its way, its halves, and the highest rank after each is complete
    ways = dict.fromkeys(singles, (-1, "", "", -1, -1))

    def is_crossed(left, right):
        left_top, _, left_end, _, left_limit = ways[left]
        right_top, right_start, _, right_limit, _ = ways[right]
        while len(left) + len(right) > 2:
            if left_top > right_top:
                left = left_end
                limit = left_limit
                left_top, _, left_end, _, left_limit = ways[left]
            else:
                right = right_start
                limit = right_limit + 1  # of equal merges the one that crosses goes first
                right_top, right_start, _, right_limit, _ = ways[right]
            if ranks.get((left, right), limit) < limit:
                return True
        return False

    for pair in sorted(ranks, key=lambda pair: len("".join(pair))):
        left, right = pair
        if left in last and right in last and not is_crossed(left, right):
            token = left + right
            rank = ranks[pair]
            last[token] = rank
            left_top = ways[left][0]
            right_top = ways[right][0]
            top = max(left_top, right_top, rank)
            if left_top > right_top:  # the left half is completed later
                ways[token] = (top, left, right, rank, top)
            else:
                ways[token] = (top, left, right, top, rank)
    return last


# --------------------------------------------------------------------------------- chat templates

# Chat template -> how a chat starts, a turn starts, a turn ends. LLaDA's first token differs from
# Llama 3's.
TEMPLATES = {
    "llama3": (
        "<|begin_of_text|>",
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llada": (
        "<|startoftext|>",
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "chatml": (
        "",
        "<|im_start|>{role}\n",
        "<|im_end|>\n",
    ),
}
MARK = regex.compile(r"(<\|\w+\|>)")  # a special token in a template
MARKS = {name: set(MARK.findall("".join(parts))) for name, parts in TEMPLATES.items()}
# special whatever a tokenizer's file says: no text may end a turn, or mask anything
ALWAYS_SPECIAL = set().union(*MARKS.values(), ["<|mdm_mask|>"])


def find_template(tokenizer, declared, path):
    """The name of the chat template that a model directory has, and the system turn it slips in.

    Its own chat_template decides. Where there is none it is guessed from the special tokens."""
    names = [name for name, marks in MARKS.items() if marks <= tokenizer.special.keys()]
    if not names:
        raise UserError(
            f"{path}: its special tokens fit none of the chat templates {', '.join(TEMPLATES)}; "
            "use the instruct version of a Llama 3, Qwen, SmolLM2 or LLaDA"
        )
    source, template = declared_template(path)
    if template is None:
        tokenizer.notes.append(
            f"{path}: no chat template; its special tokens are those of {names[0]}"
        )
        return names[0], ""
    texts = {name: [t for t in tokens if isinstance(t, str)] for name, tokens in declared.items()}
    tokens = {f"{name}_token": found[0] for name, found in texts.items() if found}
    with reading(source, "its chat template fails"):
        theirs = render(template, tokens)
    ours = {name: render(jinja_template(name), {}) for name in names}
    for name in names:
        system_turn, rest = split_system_turn(theirs, name)
        if rest == ours[name]:
            return name, system_turn
    # nearest: most of its special tokens are in what theirs renders
    name = max(names, key=lambda name: sum(mark in theirs for mark in MARKS[name]))
    raise UserError(
        f"{source}: its chat template is none that this program can train in. It renders\n"
        f"    {theirs!r}\nwhere {name}, the nearest, renders\n    {ours[name]!r}\n"
        f"To train in that form all the same, delete the template from a copy of the model"
    )


def declared_template(path):
    """(the file, the text) of a directory's own chat template; the text is None if it has none."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file, read_text(file)
    file = path / "tokenizer_config.json"
    config = read_object(file)
    template = config.get("chat_template")
    with reading(file):
        if isinstance(template, list):  # named ones
            named = {read_field(t, "name", str): read_field(t, "template", str) for t in template}
            return file, read_field(named, "default", str)
        return file, read_field(config, "chat_template", str, None)


# what two templates must render alike to pass for one
CHAT = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine, thanks."},
    {"role": "user", "content": "And where?"},
]


def split_system_turn(text, name):
    """The first turn of a rendered chat, if that is one of the system, else ""; and the rest."""
    start, header, end = TEMPLATES[name]
    if not text.startswith(start + header.format(role="system")):
        return "", text
    turn, found, rest = text.removeprefix(start).partition(end)
    return turn + found, start + rest


def jinja_template(name):
    """A chat template as other programs read it. As `Tokenizer.chat` has it, no system turn is
    slipped in, and an empty one is left out."""
    start, header, end = TEMPLATES[name]
    before, after = header.split("{role}")
    template = (
        "{{ START }}{% for message in messages %}"
        '{% if message["role"] != "system" or message["content"] %}'
        '{{ BEFORE + message["role"] + AFTER + message["content"] + END }}'
        "{% endif %}{% endfor %}"
        '{% if add_generation_prompt %}{{ BEFORE + "assistant" + AFTER }}{% endif %}'
    )
    parts = {"START": start, "BEFORE": before, "AFTER": after, "END": end}
    for part, text in parts.items():
        template = template.replace(part, json.dumps(text))
    return template


TEMPLATE_STEPS = 100_000  # lines of code; a real template takes some hundred


def render(template, tokens):
    """CHAT and the header of an answer by a Jinja template of unknown origin, as in transformers.

    UserError if that does not come to an end."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    # always the same day: chats that a model writes must not depend on it
    environment.globals["strftime_now"] = datetime(2024, 7, 26).strftime
    # transformers' mark of answers renders nothing; nor does `with`
    template = regex.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", template)
    compiled = environment.from_string(template)
    taken = counting()

    def watch(frame, event, argument):
        if next(taken) > TEMPLATE_STEPS:
            raise UserError("its chat template does not come to an end")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        return compiled.render(messages=CHAT, add_generation_prompt=True, **tokens)
    finally:
        sys.settrace(before)


def raise_exception(message):
    raise TemplateError(message)


# --------------------------------------------------------------------------------- published sets


@dataclass
class Dataset:
    """Documents to learn, questions to ask about them, and the name that run directories get."""

    name: str
    documents: list  # {"text": ..., "where": "FILE, line N"}
    questions: list  # {"question", "answer", "direction": "forward" | "backward" | ..., "group"}
    notes: list = field(default_factory=list)  # what the user should know about the files


@dataclass
class Generated:
    """A set that is made anew at every start."""

    make: Callable  # count, paraphrase, seed -> documents, questions
    count: int  # how many unless told
    of: str
    paraphrases: tuple


@dataclass
class Published:
    """A set that is downloaded once."""

    address: str  # of the folder, at one commit
    files: dict  # name -> its sha256, None where only the first download can tell
    counterpart: str  # the generated set that takes its place without a network
    facts: int = 0  # of each kind, where fewer of them can be taken


GITHUB = "https://raw.githubusercontent.com/"
# The authors' repository has no licence: nothing of it is kept here.
AUTHORS = GITHUB + "xup5/masked_arLLM/bc28c777643b202787d1e4ccb61ad0d1993d93e3/datasets/"
THINKING_BIAS = GITHUB + "alibaba/thinking_bias/389bb4d1b16bbc6ba75f2b57cb09c6614776c59b/data/"
GSM8K = GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
ND_FILE = "people-description.json"
ND_WORDINGS = 30  # of a fact; they stand one after the other
ND_GROUPS = ("NameIsDescription", "DescriptionIsName")
# test files whose tasks are directions: N2D is forward, but in DescriptionIsName
RELEASED_TESTS = "people-description_open-QAs|(ND|biography)_test"


def released(topic):
    """A set of the paper's, one training file for each --paraphrase."""
    files = (
        f"{topic}_train_no_paraphrase.json",
        f"{topic}_train_paraphrase_same_order.json",
        f"{topic}_train_paraphrase_change_order.json",
        f"{topic}_test.jsonl",
    )
    return Published(AUTHORS, dict.fromkeys(files), counterpart="bio")


SETS = {
    "bio": Generated(world.make_bio, 100, "people", ("none", "same", "permute")),
    "nd-made": Generated(world.make_nd, 30, "facts of each kind", ("none", "same")),
    "math-made": Generated(world.make_math, 200, "problems", ("none",)),
    "world": Generated(world.make_world, 160, "people", ("none",)),
    "bio-released": released("biography"),
    "wiki": released("wiki"),
    "nd": Published(
        THINKING_BIAS,
        {
            "training_data/people-description.json": (
                "e844b89bbd541dbd7010fe9baafbf06c6933f02fe7ec2ae8dfa6e2d606777dc3"
            ),
            "test_data/people-description_open-QAs.jsonl": (
                "5169f6af324af2efca161f2ae52c95f16d85d5400e3455a1eb007343a8809d53"
            ),
        },
        counterpart="nd-made",
        facts=30,
    ),
    "gsm8k": Published(
        GSM8K + "grade_school_math/data/",
        {
            "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        },
        counterpart="math-made",
    ),
}
# --paraphrase: what its training file is called in the released layout
PARAPHRASES = {
    "none": "people-description|.*_train_no_paraphrase",
    "same": "people-description|.*_train_paraphrase(_same_order)?",
    "permute": ".*_train_paraphrase_change_order",
}
# what training is offered: `world` is there to make and to examine the built-in models, in
# tiny/pretrain.py and eval.py
OFFERED = ", ".join(name for name in SETS if name != "world")
DATA_HELP = (
    f"{OFFERED} (generated ones also as bio:PEOPLE, nd as nd:FACTS of each kind), or a custom file "
    f"or directory ({', '.join(READERS)}, also .gz)"
)
# the longest answer that is waited for [paper A.4]
ANSWER_TOKENS = {"forward": 128, "backward": 128, "all": 128, "math": 256}


def load(name, paraphrase="none", seed=0):
    """A Dataset by name (of SETS; `bio:20` for 20 people), or from a custom file or directory.

    A file holds a JSON list, JSON lines or a CSV table. A record with a "text" is a document, one
    with a "question" is a question; both may stand in one file. A .txt or .md file is a document.
    Of a directory and its subfolders all such files are read, but of files called *_train_* only
    the one that `paraphrase` asks for, so the paper's released sets are read as they are. The
    questions of a train.jsonl are not asked but learned, with their answers."""
    kind, _, count = name.partition(":")
    if kind not in SETS:
        return load_files(name, paraphrase)
    if isinstance(SETS[kind], Generated):
        dataset = generate(kind, count, paraphrase, seed)
    else:
        dataset = load_published(kind, count, paraphrase, seed)
    dataset.notes = []  # what else lies with a published one is ours
    if os.path.exists(name):
        note = f"--data {name} is the set of that name; what lies here is --data ./{name}"
        dataset.notes.append(note)
    return dataset


def load_files(name, paraphrase):
    """The Dataset in a custom file or directory."""
    if not os.path.exists(name):
        raise UserError(f"--data {name}: none of {OFFERED}, nor a file or directory that exists")
    path = Path(name)
    dataset = read_files(unpacked(path.resolve()).stem, path, paraphrase)
    if not dataset.documents and not dataset.questions:
        nothing = f'--data {name}: no document (a "text") and no question (a "question") in it'
        raise UserError("; ".join([nothing, *dataset.notes]))
    return dataset


def load_published(kind, count, paraphrase, seed):
    """The Dataset of a published set, with `count` of its facts of each kind, "" for all."""
    most = SETS[kind].facts
    if count and not most:
        raise UserError(f"--data {kind}:{count}: {kind} is read whole: give --data {kind}")
    if count and not (is_count(count) and int(count) <= most):
        raise UserError(
            f"--data {kind}:{count}: {kind} takes a number of facts of each kind, at most {most}, "
            f"as in {kind}:20"
        )
    dataset = read_files(kind, fetch(kind), paraphrase)
    if count:
        take_facts(dataset, int(count), most, seed)
    return dataset


def is_count(text):
    return text.isdecimal() and int(text) > 0


def read_files(name, path, paraphrase):
    """The Dataset in a file or a directory."""
    files, left = dataset_files(path, paraphrase)
    dataset = Dataset(name, [], [])
    if left:
        names = [str(file.relative_to(path)) for file in left[:9]]
        more = f" and {len(left) - 9} more" if len(left) > 9 else ""
        dataset.notes.append(f"{path}: not read: {', '.join(names)}{more}")
    seen = {}  # content, or name without .gz -> its file
    for file in files:
        documents, questions = read_file(file, paraphrase)
        if not documents and not questions:
            dataset.notes.append(f"{file}: no document and no question in it")
            continue
        content = digest(documents), digest(questions)
        name = unpacked(file)
        if content in seen:
            dataset.notes.append(f"{file}: the same as {seen[content]}; read once")
            continue
        if name in seen:
            dataset.notes.append(f"{file}: not the same as {seen[name]}; read both")
        seen |= {content: file, name: file}
        dataset.documents += documents
        dataset.questions += questions
    undirected = [q for q in dataset.questions if q["direction"] in ("N2D", "D2N")]
    if undirected:
        add_directions(undirected, dataset.documents)
    return dataset


def read_file(file, paraphrase):
    """(what is learned, questions to ask) of a file."""
    records = read_records(file)
    plain_name = unpacked(file)
    if plain_name.name == ND_FILE and paraphrase == "none":
        records = records[::ND_WORDINGS]
    learned = plain_name.stem == "train"
    released = bool(regex.fullmatch(RELEASED_TESTS, plain_name.stem))
    documents = []
    questions = []
    for where, record in records:
        if "text" in record:
            documents.append({"text": text_field(record, "text", where), "where": where})
        else:
            question = parse_question(record, where, learned, released)
            (documents if learned else questions).append(question)
    return documents, questions


def digest(records):
    """The sha256 of records, wherever their file lies."""
    bare = [{k: v for k, v in record.items() if k != "where"} for record in records]
    return sha256(json.dumps(bare).encode()).hexdigest()


def take_facts(dataset, count, most, seed):
    """Leave `count` facts of each of two kinds, with their wordings and exactly their questions.

    The files have the facts in one order, `most` of one kind and then as many of the other, the
    wordings of a fact together, and so its questions."""
    rng = Random(seed)
    chosen = []
    for start in (0, most):
        chosen += sorted(world.shuffled(rng, range(start, start + most))[:count])

    def of_chosen(records):
        size = len(records) // (2 * most)  # records of a fact
        return [record for fact in chosen for record in records[fact * size : (fact + 1) * size]]

    dataset.documents = of_chosen(dataset.documents)
    dataset.questions = of_chosen(dataset.questions)


def generate(kind, count, paraphrase, seed):
    """The Dataset of a generated set, of `count` people or the like, "" for the usual number."""
    made = SETS[kind]
    count = count or str(made.count)
    asked = f"--data {kind}:{count}"
    if not is_count(count) or paraphrase not in made.paraphrases:
        raise UserError(
            f"{asked} --paraphrase {paraphrase}: {kind} takes a number of {made.of}, "
            f"as in {kind}:20, and --paraphrase {' or '.join(made.paraphrases)}"
        )
    try:
        documents, questions = made.make(int(count), paraphrase, seed)
    except ValueError as error:
        raise UserError(f"{asked}: {error}") from None
    return Dataset(kind, documents, questions)


def fetch(name):
    """The directory of a published set, in the hub's cache.

    A file that is not there yet is downloaded, whole or not at all; every time, its sha256 is
    compared with the one known, or with that of the first download, noted beside it."""
    published = SETS[name]
    commit = published.address.removeprefix(GITHUB).split("/")[2]
    cache = Path(huggingface_hub.constants.HF_ASSETS_CACHE)
    directory = cache / "maskft" / f"{name}-{commit[:8]}"
    directory.mkdir(parents=True, exist_ok=True)
    for file, digest in published.files.items():
        url = published.address + file
        path = directory / Path(file).name
        try:
            if not path.exists():
                download(url, path)
            found = sha256(path.read_bytes()).hexdigest()
        except (OSError, HTTPException, UnicodeDecodeError) as error:
            raise UserError(
                f"--data {name}: {url} could not be had ({error}) and is not at {path}. Put it "
                "there, or give a directory with such files (--data DIR), or take the generated "
                f"counterpart, which needs no network: --data {published.counterpart}"
            ) from None
        note = Path(f"{path}.sha256")
        if not digest and not note.exists():
            write_text(note, found)
        digest = digest or note.read_text()
        if found != digest:
            raise UserError(
                f"{path}: its sha256 is {found}, not {digest}: delete it to fetch it again"
            )
    return directory


def download(url, path):
    """Fetch the text file at `url` into `path`, all of it or nothing."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    with urlopen(url, timeout=30) as response:
        # `read` fails if fewer bytes come than were promised
        write_text(path, response.read().decode())


def dataset_files(path, paraphrase):
    """(the files to read, those left): in the released layout, of training files the one asked for.

    Files whose names begin with a dot are neither."""
    if not path.is_dir() and paraphrase == "none":
        return [path], []
    found = list(files_in(path)) if path.is_dir() else [path]
    files = [p for p in found if ending(p) in READERS and p.is_file()]
    training = [p for p in files if "_train_" in p.name or unpacked(p).name == ND_FILE]
    pattern = PARAPHRASES[paraphrase]
    wanted = [p for p in training if regex.fullmatch(pattern, unpacked(p).stem)]
    if (training or paraphrase != "none") and len(wanted) != 1:
        names = ", ".join(p.name for p in training) or "none"
        raise UserError(
            f"--data {path}: needs one training file for --paraphrase {paraphrase}, "
            f"{pattern}.json; training files found: {names}"
        )
    if training:  # a README beside them is no document
        files = [p for p in files if READERS.get(ending(p)) is json_records]
    files = [p for p in files if p not in training or p in wanted]
    return files, [p for p in found if p not in files]


def files_in(folder):
    """Every file in a folder and its subfolders, by name."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():  # a link may lead round in circles
            yield from files_in(path)
        else:
            yield path


# ---------------------------------------------------------------------------------------- batches

IGNORE = -100  # the label of a token without loss


@dataclass
class Example:
    """One training sequence. `labels` stand in the place of their own token."""

    ids: list
    labels: list  # IGNORE where there is no loss
    weight: float  # of each label's cross entropy in the loss
    denominator: float  # the step's summed loss is divided by the sum of this over its examples


def collate(examples, pad_id):
    """A micro-batch, padded on the right: a dict of

        ids, labels   (B, T) int64
        key_mask      (B, T) bool, True where there is a token; None where there is no padding
        weights       (B,) fp32

    An empty list gives one padding token without a label: a rank with nothing to do still takes
    part in the step."""
    examples = examples or [Example([pad_id], [IGNORE], 0.0, 0.0)]
    is_padded = len({len(e.ids) for e in examples}) > 1
    return {
        "ids": pad([e.ids for e in examples], pad_id),
        "labels": pad([e.labels for e in examples], IGNORE),
        "key_mask": pad([[True] * len(e.ids) for e in examples], False) if is_padded else None,
        "weights": torch.tensor([e.weight for e in examples], dtype=torch.float32),
    }


def pad(rows, value):
    """Lists of unequal lengths -> a tensor (B, T)."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


# ------------------------------------------------------------------------------------------- show


def show(example, tokenizer):
    """An Example as text: [tokens with loss], _ for each masked token, and the counts."""
    mask_id = tokenizer.mask_id

    def kind(pair):
        token, label = pair
        return label != IGNORE, token == mask_id

    text = ""
    # runs of tokens of one kind, decoded together: a character may be several tokens
    for (has_loss, is_mask), run in groupby(zip(example.ids, example.labels, strict=True), kind):
        ids = [token for token, _ in run]
        part = "_" * len(ids) if is_mask else tokenizer.decode(ids, special=True)
        text += f"[{part}]" if has_loss else part
    masked = example.ids.count(mask_id)
    supervised = len(example.labels) - example.labels.count(IGNORE)
    return f"{text}\n-- {len(example.ids)} tokens, {masked} masked, {supervised} with loss"
