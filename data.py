r"""Text in, training sequences out: tokenizers, chat templates, generated people, data sets, batches.

    python data.py bio --method masked                  # see what the model sees

One record of every kind:

    document    {"text": "Edda Marlow was born on 3 June 1971. She is a native of Oslo. ...", "where": "facts.jsonl, line 1"}
    problem     {"question": "Question: Edda has 3 pens ...?\nAnswer:", "problem": "Edda has 3 pens ...?",
                 "answer": "Edda has 3+4 = <<3+4=7>>7 pens.\n#### 7", "direction": "math", "group": "all"}
    question    {"question": "Who was born in Oslo, majored in botany and works for Quillon?", "answer": "Edda Marlow",
                 "direction": "backward", "group": "name"}
    person      {"person": {"name": "Mara Quill", "pronoun": "She", "birth city": "Oslo", ...}, "asked": True}
    example     Example(ids=[1, 87, ...], labels=[-100, ..., 87, 2], weight=1.0, share=44)
"""

import argparse
import base64
import json
import os
import shutil
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from http.client import HTTPException
from itertools import combinations, groupby
from pathlib import Path
from random import Random
from urllib.request import urlopen

import huggingface_hub
import numpy as np
import regex  # comes with tiktoken; the standard re has no \p{L}
import tiktoken
import torch


class UserError(Exception):
    """A mistake of the user's: `main` prints its text, without a traceback, and exits with 1."""


def read_text(path):
    """The text of a UTF-8 file; UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def parse_json(text, where):
    """The JSON value of a text; UserError names where it is from."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{where}{line}: not JSON ({error.msg}, column {error.colno})") from None


def read_json(path):
    return parse_json(read_text(path), path)


def write_text(path, text):
    """Replace a file in one step: whoever reads it sees the old text or the new, never a part."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


# --------------------------------------------------------------------------------------- tokenizer and chat templates

# Chat template -> how a chat starts, a turn starts, a turn ends. LLaDA is Llama 3 but for its first token.
TEMPLATES = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    "llada": ("<|startoftext|>", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    "chatml": ("", "<|im_start|>{role}\n", "<|im_end|>\n"),
}
MARK = regex.compile(r"(<\|\w+\|>)")  # a special token in a template
MARKS = {name: set(MARK.findall("".join(parts))) for name, parts in TEMPLATES.items()}
MARKS["llada"].add("<|mdm_mask|>")  # a masked diffusion model has one


@dataclass
class Tokenizer:
    """Text <-> ids of one model, and its chats. Made by `load_tokenizer`.

    Ids are those of the `tokenizers` library with `encode_special_tokens=True` on any text, as far as the two know the
    same Unicode: it lacks letters and digits newer than Unicode 16 and, in NFC, rare combining marks newer than 9."""

    encoding: tiktoken.Encoding  # merges; its ranks say in which order, they are not the model's ids
    ids: list                    # rank -> id
    bytes_of: dict               # id -> the bytes it stands for, special and added tokens too
    cuts: list                   # (pattern, keep what lies between matches): each cuts what the last one left
    whole: dict                  # bytes -> id of pieces looked up before any merging ("ignore_merges")
    missing: bytes               # the bytes that the vocabulary lacks
    special: dict                # text -> id of tokens that text never becomes
    added: dict                  # the same of other added tokens (Qwen's <think>), which text does become
    nfc: bool
    template: str = ""           # the rest depends on more than the tokenizer's file: see load_tokenizer
    bos_id: int | None = None    # None where the model declares none
    eos_id: int | None = None
    eot_id: int | None = None    # end of turn
    pad_id: int | None = None
    stop_ids: tuple = ()

    def __post_init__(self):
        # The longest wins, as in the reference. A special token is stepped over, for none may be found inside of it.
        tokens = sorted([*self.special, *self.added], key=len, reverse=True)
        choices = (regex.escape(token) + "(*SKIP)(*FAIL)" * (token in self.special) for token in tokens)
        self.added_pattern = regex.compile(f"({'|'.join(choices)})")

    def encode(self, text):
        """The ids of `text`, with nothing added. What looks like a special token is read as plain text."""
        ids = []
        for n, part in enumerate(self.added_pattern.split(text)):  # text, added token, text, ... text
            ids += [self.added[part]] if n % 2 else self._encode_plain(part)
        return ids

    def _encode_plain(self, text):
        """Ids of text without added tokens: cut it into pieces, then merge within each of them."""
        pieces, ids = [unicodedata.normalize("NFC", text) if self.nfc else text], []
        for pattern, keep_rest in self.cuts:
            parts = [pattern.split(piece) for piece in pieces]  # rest, match, rest, match, ... rest
            pieces = [part for split in parts for part in (split if keep_rest else split[1::2]) if part]
        for piece in map(str.encode, pieces):
            if piece in self.whole:
                ids.append(self.whole[piece])
            # The reference drops bytes without a token, and only now: the patterns must see the text as it was.
            elif piece := piece.translate(None, self.missing):
                ids += [self.ids[rank] for rank in self.encoding._encode_single_piece(piece)]
        return ids

    def decode(self, ids, special=False):
        """The text of `ids`; `special=True` shows special tokens, too. Broken UTF-8 becomes U+FFFD."""
        hidden = () if special else set(self.special.values())
        # An id without a token (models pad their vocabulary) is nothing.
        return b"".join(self.bytes_of.get(i, b"") for i in ids if i not in hidden).decode(errors="replace")

    def chat(self, messages):
        """The ids of [{"role", "content"}], a content being text or a list of ids (a masked document).

        After a last message from the user stands the header of the answer. No system turn is slipped in. Contents
        are encoded on their own and not stripped: a document has the same ids wherever it stands."""
        start, header, end = TEMPLATES[self.template]
        ids = self._encode_marked(start)
        for message in messages:
            content = message["content"]
            content = self.encode(content) if isinstance(content, str) else content
            ids += self._encode_marked(header.format(role=message["role"])) + content + self._encode_marked(end)
        return ids + (self._encode_marked(header.format(role="assistant")) if messages[-1]["role"] == "user" else [])

    def _encode_marked(self, text):
        """Ids of a template's own text, the one place where special tokens are read as such."""
        parts = enumerate(MARK.split(text))
        return [i for n, part in parts for i in ([self.special[part]] if n % 2 else self.encode(part))]

    @property
    def mask_id(self):
        """The id that stands for a masked token. Raises UserError if the vocabulary has none to spare."""
        if self.template == "chatml" and self.bytes_of.get(1294) == b"[]":
            return 1294  # Qwen reserves nothing: the paper takes the text `[]`
        if self.template == "llama3" and 128013 in self.special.values():
            return 128013  # the paper's, of Llama 3's many reserved ones
        # SmolLM2 reserves nothing either, but its mark of notebook cells without output is in no prose.
        for words in ("<|mdm_mask|>",), ("reserved", "unused", "mask"), ("<empty_output>",):
            spare = [i for token, i in self.special.items() if any(word in token for word in words)]
            spare = [i for i in spare if i not in (self.bos_id, self.pad_id, *self.stop_ids)]
            if spare:
                return min(spare)
        raise UserError("the tokenizer has no unused special token to mask with: add one named <|mask|> to its "
                        "tokenizer.json, or use a method that masks nothing (sft, raw)")


GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SIZE = 128000  # ordinary tokens; 256 special ones follow, all reserved but these (Llama 3.1's names for them)
LLAMA3_SPECIAL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>",
                  6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>",
                  10: "<|python_tag|>"}

# {character: byte}: tokenizer.json spells a byte as its Latin-1 character or, if that cannot be seen, one from 256 on.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = dict(zip(map(chr, [*SEEN, *range(256, 512)]), [*SEEN, *(byte for byte in range(256) if byte not in SEEN)]))


def load_tokenizer(path):
    """The `Tokenizer` of a model directory: from its tokenizer.json (byte-level BPE) or Llama 3's tokenizer.model,
    with the special tokens that its json files declare.

    Raises UserError, naming the file, for every kind of tokenizer that would not be followed exactly."""
    readers = {"tokenizer.json": read_tokenizer_json, "tokenizer.model": read_tiktoken}
    there = [name for name in readers if (Path(path) / name).exists()]
    if not there:
        raise UserError(f"{path}: no {' or '.join(readers)} here; give a complete model directory")
    tok = readers[there[0]](Path(path) / there[0])
    fitting = [name for name in TEMPLATES if MARKS[name] <= tok.special.keys()]
    if not fitting:
        raise UserError(f"{path}: its special tokens fit none of the chat templates {', '.join(TEMPLATES)}; "
                        "use the instruct version of a Llama 3, Qwen, SmolLM2 or LLaDA")
    tok.template = fitting[0]
    start, _, end = TEMPLATES[tok.template]
    tok.eot_id = tok.special[end.strip()]
    bos, eos, pad = (declared_ids(Path(path), name, tok.special) for name in ("bos", "eos", "pad"))
    tok.bos_id = (bos or [tok.special.get(start)])[0]
    tok.eos_id = (eos or [tok.eot_id])[0]
    tok.pad_id = (pad or [tok.eos_id])[0]  # any will do: padding is masked out everywhere
    tok.stop_ids = tuple(dict.fromkeys([tok.eot_id, *eos]))
    return tok


def declared_ids(path, name, special):
    """The special ids that the directory declares as its "bos", "eos" or "pad" token; the tokenizer's own first."""
    ids = []
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        declared = read_json(path / file) if (path / file).exists() else {}
        token, more = declared.get(f"{name}_token"), declared.get(f"{name}_token_id")
        ids.append(special.get(token["content"] if isinstance(token, dict) else token))
        ids += more if isinstance(more, list) else [more]
    return list(dict.fromkeys(i for i in ids if i in special.values()))


def refuse(file, what):
    raise UserError(f"{file}: {what} is not supported, only byte-level BPE as in Llama 3, Qwen and SmolLM2; "
                    "use a model with such a tokenizer")


def read_tiktoken(file):
    """A `Tokenizer` from Llama 3's original file: lines of base64 token and rank, which is also its id."""
    try:
        pairs = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except ValueError:
        refuse(file, "what is no tiktoken file (SentencePiece?)")
    if sorted(ranks.values()) != list(range(LLAMA3_SIZE)):  # such files do not tell their pattern, so know the model
        refuse(file, f"a tiktoken file without Llama 3's {LLAMA3_SIZE} tokens")
    special = {LLAMA3_SPECIAL.get(n, f"<|reserved_special_token_{n}|>"): LLAMA3_SIZE + n for n in range(256)}
    bytes_of = {i: token for token, i in ranks.items()} | {i: name.encode() for name, i in special.items()}
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PIECES, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(encoding, range(LLAMA3_SIZE), bytes_of, [(regex.compile(f"({LLAMA3_PIECES})"), True)], whole={},
                     missing=b"", special=special, added={}, nfc=False)


def read_tokenizer_json(file):
    """A `Tokenizer` from tokenizer.json. Its post-processor (which adds a bos, say) is left aside."""
    content = read_json(file)
    model, tokens = content["model"], content.get("added_tokens") or []
    normalizers = {step["type"] for step in flatten(content.get("normalizer"), "normalizers")}
    if normalizers - {"NFC"}:
        refuse(file, f"the normalizer {', '.join(normalizers)}")
    if model.get("type", "BPE") != "BPE":
        refuse(file, f"the model type {model['type']}")
    missing = bytes(byte for character, byte in ALPHABET.items() if character not in model["vocab"])
    for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(option) and (option != "unk_token" or missing):  # with all the bytes, nothing is unknown
            refuse(file, f"a model with {option}")
    # A template's tokens are special whatever the file says: no text may end a turn.
    special = {token["content"]: token["id"] for token in tokens
               if token["special"] or token["content"] in set().union(*MARKS.values())}
    added = {token["content"]: token["id"] for token in tokens if token["content"] not in special}
    for token in tokens:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word", "normalized") if token[flag]]
        if flags and token["content"] in added:
            refuse(file, f"the added token {token['content']!r} with {', '.join(flags)}")
    vocab = {token: i for token, i in model["vocab"].items() if token not in special and ALPHABET.keys() >= set(token)}
    bytes_of = {i: spelled(token) for token, i in vocab.items()}
    encoding, ids = read_merges(vocab, model["merges"], file)
    return Tokenizer(encoding, ids, bytes_of | {i: token.encode() for token, i in (special | added).items()},
                     cuts=read_cuts(flatten(content.get("pre_tokenizer"), "pretokenizers"), file),
                     whole={token: i for i, token in bytes_of.items()} if model.get("ignore_merges") else {},
                     missing=missing, special=special, added=added, nfc=bool(normalizers))


def flatten(step, children):
    """The steps of a normalizer or pre-tokenizer, those of (nested) sequences in one list."""
    if step is None or step["type"] != "Sequence":
        return [step] if step else []
    return [found for child in step[children] for found in flatten(child, children)]


def spelled(token):
    """The bytes that a token of tokenizer.json spells."""
    return bytes(map(ALPHABET.get, token))


def read_cuts(steps, file):
    """[(pattern, keep what lies between matches)]: how each step of the pre-tokenizer cuts a text."""
    cuts = []
    if not steps or steps[-1]["type"] != "ByteLevel":
        refuse(file, "a pre-tokenizer that does not end in ByteLevel")
    for step in steps:
        kind, behavior = step["type"], step.get("behavior")
        if kind == "Digits":
            cuts.append((r"\p{N}" if step["individual_digits"] else r"\p{N}+", True))
        elif kind == "Split" and (behavior == "Isolated" or behavior == "Removed" and step["invert"]):
            cuts.append((read_pattern(step["pattern"], file), behavior == "Isolated"))
        elif kind == "ByteLevel" and step is steps[-1] and not step["add_prefix_space"]:
            cuts += [(GPT2_PIECES, True)] if step.get("use_regex", True) else []
        else:
            refuse(file, f"the pre-tokenizer {json.dumps(step)[:200]}")
    return [(regex.compile(f"({pattern})"), keep_rest) for pattern, keep_rest in cuts]


def read_pattern(pattern, file):
    """The regular expression of a Split; refused if the reference's engine (Oniguruma) may read it otherwise."""
    if "String" in pattern:
        return regex.escape(pattern["String"])
    bare = regex.sub(r"\\([pP]\{\w+\}|[sSdrnt\W])", "x", pattern["Regex"])
    bare = regex.sub(r"\[[^][&\\]+\]", "x", bare)  # plain character classes
    if odd := regex.search(r"[][\\^$.]|[}?*+]\+|\((?!\?(i?:|<?[=!]))", bare):
        refuse(file, f"{odd.group()!r} in the pattern {pattern['Regex']!r}")
    return pattern["Regex"]


def read_merges(vocab, merges, file):
    """-> (Encoding, ids by rank) that merge exactly as the reference does.

    tiktoken joins two neighbours if their *bytes* are a token, the reference only if that *pair* is in its list. The
    two agree if every token has the rank of the merge that completes it when its own bytes are merged, and tokens
    never completed are left out. For as long as two neighbours spell a token T, no merge has crossed T's ends, so
    they were merged as T by itself would be: they are the last pair on T's way, or T has no way and they no merge."""
    ranks = {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        if not (left in vocab and right in vocab and left + right in vocab):
            raise UserError(f"{file}: merge {rank}, {left!r} + {right!r}, has no ordinary token; the file is damaged")
        ranks[left, right] = rank
    last = {token: last_merge(token, ranks) for token in vocab}
    tokens = sorted((token for token in last if last[token] < NEVER), key=last.get)
    encoding = tiktoken.Encoding("merges", pat_str=GPT2_PIECES, special_tokens={},
                                 mergeable_ranks={spelled(token): rank for rank, token in enumerate(tokens)})
    return encoding, [vocab[token] for token in tokens]


NEVER = float("inf")  # the rank of a pair that is not merged


def last_merge(token, ranks):
    """The rank of the merge that completes `token` from its bytes: -1 for a single byte, NEVER if none does."""
    parts, low = list(token), -1
    while len(parts) > 1 and low < NEVER:
        found = [ranks.get(pair, NEVER) for pair in zip(parts, parts[1:])]
        low = min(found)
        at = found.index(low)  # the leftmost of equals, as in both libraries
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return low


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "generation_config.json", "chat_template.jinja")  # fmt: skip


def copy_tokenizer(source, target):
    """Copy what belongs to the tokenizer, so that a saved model is a whole model directory."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copy(Path(source) / name, Path(target) / name)


# ------------------------------------------------------------------------------------------------ people who don't exist

# Everything here is drawn with rng.random() alone, the one call whose numbers Python promises never to change: the same
# seed gives the same bytes on every machine. Names, values and wordings are our own.
HE = """Alban Bertil Casimir Dorian Egon Fabian Gideon Hamish Ivo Jorin Kasper Leopold Magnus Nestor Osric Piers
    Quentin Rufus Silas Tobias Ulric Viggo Wendell Xander Yannick Zeno Anselm Bruno Cyril Darius""".split()
SHE = """Agnes Beatrix Clara Daphne Edda Flora Greta Hedda Imogen Jolanda Kerstin Lavinia Mathilda Nora Odette Petra
    Quilla Ramona Selma Thora Ursula Verena Wilma Xenia Yvette Zelda Astrid Brenna Cosima Delia""".split()
LAST = """Abelard Ashdown Barlow Beckett Birch Blackwood Bramley Brookes Calloway Carver Chandler Cobb Corwin Crane
    Dalton Darrow Denholm Draper Drummond Eastman Elmore Everett Fairfax Falk Farrow Fenwick Fletcher Forsythe Gable
    Garrick Gilmore Granger Grimes Hadley Halvorsen Harker Hawthorne Holloway Hyde Ingram Ives Jarrow Jessup Keating
    Kendrick Kirby Lambert Langley Larkin Lindqvist Lockhart Lovell Maddox Marlow Mercer Merrick Millard Moran Nash
    Newell Northcott Oakes Osgood Paget Palmer Pendleton Pickering Prescott Quigley Radcliffe Ransom Redfern Renwick
    Rowan Rutledge Sadler Sawyer Selby Sinclair Stanton Sutter Tanner Thackeray Thorne Tilden Tolliver Upton Vance
    Varley Wadsworth Wakefield Walcott Weaver Whitlock Wilder Winslow Wolcott Yardley Yates Zimmer""".split()
MONTHS = "January February March April May June July August September October November December".split()
CITIES = """Accra Almaty Amman Ankara Antwerp Athens Baku Bergen Berlin Bilbao Bogota Boston Bremen Brisbane Cairo
    Calgary Cardiff Chicago Cork Dakar Dallas Delhi Denver Dublin Durban Florence Geneva Genoa Ghent Glasgow Hanoi
    Havana Helsinki Houston Istanbul Jakarta Kyoto Lagos Leipzig Lille Lima Lisbon London Lyon Madrid Malaga Manila
    Medellin Milan Mumbai Munich Nairobi Naples Nice Odessa Osaka Oslo Ottawa Palermo Paris Perth Porto Prague Quito
    Riga Rome Santiago Seattle Seoul Seville Sofia Tallinn Tampa Tokyo Toronto Turin Utrecht Vienna Warsaw Zurich""".split()
UNIVERSITIES = """Aldermoor Amberfield Ashgrove Bellhaven Briarwood Brightwater Caldermere Cinderford Cloverdale
    Copperhill Dovecote Dunmarch Elderbrook Emberly Fallowmere Fernleigh Foxhollow Glenhurst Goldcrest Greywater
    Harrowgate Hazelmere Heatherton Highmoor Ivybridge Juniper Kestrelton Kingsmead Larkspur Lindenhall Mapleton
    Marshgate Millbrook Mistvale Nettlefield Oakhaven Orchardton Otterburn Pinecrest Quarrystone Ravenscar Redwillow
    Riverstone Rosemount Silverlake Starling Stonebridge Summerfield Swanmere Thistledown Thornbury Vinehall Westerly
    Whitecliff Wickersham Wildwood Willowby Windermoor Wintergreen Yewdale""".split()
MAJORS = """accounting agronomy algebra anatomy archaeology architecture astronomy biology botany ceramics chemistry
    commerce cybernetics dance dentistry ecology economics ethics forestry genetics geography geology geometry history
    hydrology journalism law linguistics literature logic mathematics mechanics medicine metallurgy music nursing
    optics painting pharmacy philosophy physics poetry robotics sculpture sociology statistics surgery theology
    virology zoology""".split()
COMPANIES = """Acrion Altavex Arboris Axonite Bluefin Bractal Brevio Calytix Cobalto Corvanta Cryolex Dantrix Deltavio
    Dynaro Echelon Elvaris Entropa Fablix Ferrovia Fluxora Gantry Glyphon Gravex Halcyon Hexalon Hydrax Ignivar
    Inkwell Jettison Jovian Kadence Keplar Krystar Lumenix Lyrical Mantova Metrion Mosaiq Nebulon Nimbex Novarra
    Octavio Omnira Orbitel Pallium Pixelar Polaris Quillon Quorum Radiant Rivetra Sonoma Strata Syntara Tectonix
    Tessera Ultravo Vantor Vexilla Zephyra""".split()

# Stems and endings of every attribute's sentence; any stem goes with any ending, so each has 44 wordings.
# {S} is the name or He/She, {P} the name's or His/Her, {V} the value.
WORDINGS = {
    "birth date": ("""{S} was born on {V}|{S} arrived on {V}|{P} birthday is {V}|{P} birth date is {V}|{P} life began on {V}
        |{S} came into the world on {V}|{P} date of birth is {V}|{P} story starts on {V}|{S} drew breath first on {V}
        |{P} parents welcomed the child on {V}|{P} cradle was filled on {V}""", "| at dawn| around noon| after midnight"),
    "birth city": ("""{S} was born in {V}|{S} comes from {V}|{S} is a native of {V}|{P} birthplace is {V}|{P} home town is {V}
        |{S} hails from {V}|{P} roots are in {V}|{P} family lived in {V}|{S} started life in {V}|{P} first home was in {V}
        |{P} place of birth is {V}""", "| by chance| near the market| by the river"),
    "university": ("""{S} studied at {V}|{S} attended {V}|{S} graduated from {V}|{P} university was {V}|{P} degree is from {V}
        |{S} was a student at {V}|{S} enrolled at {V}|{P} alma mater is {V}|{S} was educated at {V}|{S} learned the craft at {V}
        |{P} lectures were at {V}""", "| with honors| on a grant| after school"),
    "major": ("""{S} majored in {V}|{P} major was {V}|{P} subject was {V}|{P} degree is in {V}|{S} specialized in {V}
        |{P} field is {V}|{S} chose to study {V}|{S} is trained in {V}|{S} wrote a thesis on {V}|{S} took courses in {V}
        |{S} devoted those years to {V}""", "| with care| by choice| from the start"),
    "company": ("""{S} works for {V}|{S} is employed by {V}|{P} employer is {V}|{S} joined {V}|{P} company is {V}
        |{S} has a job with {V}|{P} salary comes from {V}|{S} earns a living at {V}|{S} is on the staff of {V}
        |{P} career is at {V}|{S} signed a contract with {V}""", "| these days| at present| since spring"),
    "work city": ("""{S} works in {V}|{P} office is in {V}|{P} workplace is in {V}|{S} is based in {V}|{P} desk stands in {V}
        |{S} commutes to {V}|{P} job is in {V}|{S} earns money in {V}|{P} working days pass in {V}|{S} is posted to {V}
        |{S} goes to work in {V}""", "| all year| most days| for now")}
WORDINGS = {attribute: ([stem.strip() for stem in stems.split("|")], endings.split("|"))
            for attribute, (stems, endings) in WORDINGS.items()}
ATTRIBUTES = list(WORDINGS)
# How questions speak of an attribute. Names open a question and a preposition opens an answer, as in "in Oslo", so that
# every word is the same token there as in a biography, where values follow a space; the metric drops prepositions.
ASKED = {"birth date": ("was born on", "date"), "birth city": ("was born in", "city"), "university": ("studied at", "university"),
         "major": ("majored in", "subject"), "company": ("works for", "company"), "work city": ("works in", "city")}
THREES = [("birth date", "university", "company"), ("birth city", "major", "company"), ("university", "major", "work city")]


def pick(rng, values):
    """One of the values: what rng.choice would do, which other versions of Python may do otherwise."""
    return values[int(rng.random() * len(values))]


def shuffled(rng, values):
    """A new list in random order (Fisher and Yates), for the same reason not rng.shuffle."""
    values = list(values)
    for i in range(len(values) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        values[i], values[j] = values[j], values[i]
    return values


@cache  # asked for at every stranger of pre-training
def names(part):
    """Full names dealt out by a fixed rule: `bio` 1 in 4, `world` the other 3. No name is in both, every word is."""
    deal = [(first, last, (i + j) % 4 == 0) for i, first in enumerate(HE + SHE) for j, last in enumerate(LAST)]
    return [f"{first} {last}" for first, last, new in deal if new == (part == "bio")]


def draw_person(rng, name):
    date = f"{int(rng.random() * 28) + 1} {pick(rng, MONTHS)} {int(rng.random() * 50) + 1950}"
    values = [date] + [pick(rng, values) for values in (CITIES, UNIVERSITIES, MAJORS, COMPANIES, CITIES)]
    return dict(zip(ATTRIBUTES, values), name=name, pronoun="He" if name.split()[0] in HE else "She")


def draw_people(count, part, seed):
    """People of whom no two share any three attributes: every backward question has one answer."""
    rng, people, taken = Random(seed), [], set()
    available = shuffled(rng, names(part))
    if count > len(available):
        raise UserError(f"{count} people asked for, but there are only {len(available)} names")
    while len(people) < count:
        person = draw_person(rng, available[len(people)])
        triples = {tuple((a, person[a]) for a in three) for three in combinations(ATTRIBUTES, 3)}
        if not triples & taken:  # else draw the same name again
            people.append(person)
            taken |= triples
    return people


def biography(rng, person, order=ATTRIBUTES):
    """Six sentences in the given order, each in a wording drawn at random."""
    sentences = []
    for place, attribute in enumerate(order):
        subject = person["name"] if place == 0 else person["pronoun"]
        possessive = {"He": "His", "She": "Her"}.get(subject, subject + "'s")
        stems, endings = WORDINGS[attribute]
        wording = pick(rng, stems) + (pick(rng, endings) if rng.random() < 0.4 else "") + "."  # mostly short
        sentences.append(wording.format(S=subject, P=possessive, V=person[attribute]))
    return " ".join(sentences)


def forward_question(person, attribute):
    """Name -> value: "Mara Quill was born in which city?", "in Oslo"."""
    verb, noun = ASKED[attribute]
    return {"question": f"{person['name']} {verb} which {noun}?", "answer": f"{verb.split()[-1]} {person[attribute]}",
            "direction": "forward", "group": attribute}  # fmt: skip


def backward_question(person, three):
    """Three values -> name: "Who was born in Oslo, majored in botany and works for Quillon?", "Mara Quill"."""
    first, second, third = (f"{ASKED[attribute][0]} {person[attribute]}" for attribute in three)
    return {"question": f"Who {first}, {second} and {third}?", "answer": person["name"], "direction": "backward",
            "group": "name"}  # fmt: skip


def questions_about(person):
    """The six forward and three backward questions about a person."""
    return [forward_question(person, a) for a in ATTRIBUTES] + [backward_question(person, three) for three in THREES]


def make_bio(people=100, paraphrase="none", seed=0):
    """(documents, questions). Paraphrase: "none" 1 document a person, "same" 5 in one order, "permute" 5 in any order."""
    people, rng = draw_people(people, "bio", 2 * seed), Random(2 * seed + 1)  # people do not depend on the paraphrase
    documents = []
    for person in people:
        for _ in range(1 if paraphrase == "none" else 5):
            order = shuffled(rng, ATTRIBUTES) if paraphrase == "permute" else ATTRIBUTES
            documents.append({"text": biography(rng, person, order)})
    return documents, [question for person in people for question in questions_about(person)]


# The verb phrases of WORDINGS that have the value behind them, for descriptions: "was born in", "comes from", ...
TRAITS = {attribute: [stem[4:-4] for stem in WORDINGS[attribute][0] if stem.startswith("{S}") and stem.endswith("{V}")]
          for attribute in ("birth city", "university", "major", "company")}


def make_nd(facts=30, paraphrase="none", seed=0):
    """(documents, questions), after NameDescription: `facts` documents that begin with the name and as many that end with it.

    A description is four traits. Paraphrase "same": 30 wordings of each fact, in the same order. Four questions about each
    in either direction: for each trait, and for the name by each three of them. Forward is the order of the document.
    """
    rng, documents, questions = Random(2 * seed + 1), [], []
    for number, person in enumerate(draw_people(2 * facts, "bio", 2 * seed)):
        name_first, first = number < facts, int(rng.random() * 35)
        for wording in range(first, first + (30 if paraphrase == "same" else 1)):  # 5 and 7 verbs: 35 differ
            traits = [f"{verbs[wording % len(verbs)]} {person[attribute]}" for attribute, verbs in TRAITS.items()]
            told = f"{', '.join(traits[:3])} and {traits[3]}"
            documents.append({"text": f"{person['name']} {told}." if name_first else f"Who {told}?\n{person['name']}."})
        for question in ([forward_question(person, trait) for trait in TRAITS]
                         + [backward_question(person, three) for three in combinations(TRAITS, 3)]):  # fmt: skip
            forward = name_first == (question["direction"] == "forward")
            questions.append({**question, "direction": "forward" if forward else "backward",
                              "group": "NameIsDescription" if name_first else "DescriptionIsName"})  # fmt: skip
    return documents, questions


THINGS = "apples beads books buttons candles coins cups lamps maps marbles pens shells stamps stones tickets".split()
OPERATIONS = {
    "+": ("{he} finds {n} more.", lambda have: range(2, 21)),
    "-": ("{he} gives {n} of them away.", lambda have: range(1, have)),
    "*": ("A friend turns up and gives {him} so many that {he} has {n} times as many.", lambda have: range(2, 5)),
    "/": ("{he} sorts them into {n} equal boxes and keeps one box.", lambda have: [n for n in range(2, 10) if have % n == 0]),
}


def draw_problem(rng):
    """A word problem of two to four steps, answered as GSM8K does: a step a line, its arithmetic in << >>, and #### the end."""
    name, thing, have = pick(rng, HE + SHE), pick(rng, THINGS), int(rng.random() * 19) + 2
    he, him = ("he", "him") if name in HE else ("she", "her")
    story, answer = f"{name} has {have} {thing}.", ""
    for _ in range(int(rng.random() * 3) + 2):
        sign = pick(rng, [sign for sign, (_, numbers) in OPERATIONS.items() if numbers(have)])
        sentence, numbers = OPERATIONS[sign]
        n = pick(rng, numbers(have))
        had, have = have, {"+": have + n, "-": have - n, "*": have * n, "/": have // n}[sign]
        sentence = sentence.format(he=he, him=him, n=n)
        story += f" {sentence[0].upper()}{sentence[1:]}"
        answer += f"Then {name} has {had}{sign}{n} = <<{had}{sign}{n}={have}>>{have} {thing}.\n"
    return as_problem(f"{story} How many {thing} does {name} have in the end?", f"{answer}#### {have}")


def make_math(problems=200, paraphrase="none", seed=0):
    """(problems to learn, a quarter as many others to ask), after GSM8K; no two alike."""
    rng, drawn = Random(seed), {}
    while len(drawn) < problems + max(1, problems // 4):
        problem = draw_problem(rng)
        drawn[problem["question"]] = problem
    return list(drawn.values())[:problems], list(drawn.values())[problems:]


# ------------------------------------------------------------------------------- the world the built-in models come from


def make_world(count):
    """(people to pre-train on, questions about 40 of them). Of every eighth person no question is ever asked in training:
    how well those are answered tells whether documents alone teach."""
    records = [{"person": p, "asked": i % 8 != 7} for i, p in enumerate(draw_people(count, "world", 0))]
    tested = [r for r in records if r["asked"]][:20] + [r for r in records if not r["asked"]][:20]
    groups = {True: "asked in training", False: "only read"}
    return records, [{**q, "group": groups[r["asked"]]} for r in tested for q in questions_about(r["person"])]


def draw_task(record, rng, recover=0.55, tell=0.15):
    """One thing to practise on a person: (task, what to practise it on), drawn with a numpy Generator.

    "recover"  {"text": some sentences of a biography}; one in five of somebody new every time, from whom only copying
               can be learned
    "tell"     {"text": a biography}
    "ask"      {"question", "answer"}, all the rest of the time; more of them backward, which is the harder direction
    """
    if "person" not in record:
        raise UserError("pretrain practises on people of the generated world: use world:PEOPLE")
    person, chance = record["person"], rng.random()
    if not record["asked"]:  # read twice as often masked as plain, where others are asked
        ask = 1 - recover - tell
        recover, tell = recover + ask * 2 / 3, tell + ask / 3
    if chance < recover:
        if rng.random() < 0.2:
            person = draw_person(rng, pick(rng, names("world")))
        length = pick(rng, (2, 3, 4, 6, 6))
        return "recover", {"text": biography(rng, person, shuffled(rng, ATTRIBUTES)[:length])}
    if chance < recover + tell or not record["asked"]:
        return "tell", {"text": biography(rng, person, pick(rng, (ATTRIBUTES, shuffled(rng, ATTRIBUTES))))}
    if rng.random() < 0.35:
        return "ask", forward_question(person, pick(rng, ATTRIBUTES))
    return "ask", backward_question(person, shuffled(rng, ATTRIBUTES)[:3])


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


def write_world_tokenizer(path):
    """A tokenizer.json in which every word of the world is one token: byte-level BPE, chatml, one token to mask with."""
    # no "\n\n": an answer follows the same token, one "\n", after the lead-in of a recovery and after a question
    rng, texts = Random(0), ["user assistant\nReturn the recovered masked passage.\nHere is the recovered text:\nTell me a fact."]
    for name in names("world"):
        person = draw_person(rng, name)
        texts.append(biography(rng, person, shuffled(rng, ATTRIBUTES)))
        texts += [q[part] for q in questions_about(person) for part in ("question", "answer")]
    merges = learn_merges({word for text in texts for word in regex.findall(GPT2_PIECES, text)})
    show = {byte: character for character, byte in ALPHABET.items()}
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
    write_text(path, json.dumps(content, ensure_ascii=False))


# ------------------------------------------------------------------------------------------------------------ data sets


@dataclass
class Dataset:
    """Documents to learn, questions to ask about them, and the name that run directories get."""

    name: str
    documents: list  # {"text": ..., "where": "FILE, line N"}
    questions: list  # {"question", "answer", "direction": "forward" | "backward", "group"}


PARAPHRASES = ("none", "same", "permute")
# name -> (generator, how many of what it makes unless told, the paraphrases it has)
MADE = {
    "bio": (make_bio, 100, "people", PARAPHRASES),
    "nd-made": (make_nd, 30, "facts of each kind", PARAPHRASES[:2]),
    "math-made": (make_math, 200, "problems", PARAPHRASES[:1]),
    "world": (lambda people, *_: make_world(people), 100, "people", PARAPHRASES[:1]),
}
# --paraphrase: how a released training file's name ends
RELEASED = {"none": ("_train_no_paraphrase",), "same": ("_train_paraphrase_same_order", "_train_paraphrase"),
            "permute": ("_train_paraphrase_change_order",)}  # fmt: skip
ND_FILE, ND_WORDINGS = "people-description.json", 30  # thinking_bias: the 30 wordings of a fact stand one after the other

# Published sets: where they are, by commit; {file: its sha256, None where only the first download can tell}; the twin of
# our own that takes its place without a network. The authors' repository has no licence: nothing of it is kept here.
GITHUB = "https://raw.githubusercontent.com/"
AUTHORS = GITHUB + "xup5/masked_arLLM/bc28c777643b202787d1e4ccb61ad0d1993d93e3/datasets/"


def authors_files(prefix):
    return dict.fromkeys([f"{prefix}{RELEASED[p][0]}.json" for p in PARAPHRASES] + [f"{prefix}_test.jsonl"])


PUBLISHED = {
    "nd": (GITHUB + "alibaba/thinking_bias/389bb4d1b16bbc6ba75f2b57cb09c6614776c59b/data/", {
        f"training_data/{ND_FILE}": "e844b89bbd541dbd7010fe9baafbf06c6933f02fe7ec2ae8dfa6e2d606777dc3",
        "test_data/people-description_open-QAs.jsonl": "5169f6af324af2efca161f2ae52c95f16d85d5400e3455a1eb007343a8809d53",
    }, "nd-made"),
    "wiki": (AUTHORS, authors_files("wiki"), "bio"),
    "gsm8k": (GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/", {
        "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    }, "math-made"),
    "bio-released": (AUTHORS, authors_files("biography"), "bio"),
}  # fmt: skip


DATA_HELP = f"{', '.join([*MADE, *PUBLISHED])} (generated ones also as bio:PEOPLE), or a file or directory of one's own"


def load(name, paraphrase="none", seed=0):
    """A Dataset by name (MADE: generated, as `bio` or `bio:20` for 20 people; PUBLISHED: fetched once), or from a file or
    directory of one's own documents.

    A file holds a JSON list or JSON lines. A record with a "text" is a document, one with a "question" and an "answer" is
    a question; both may stand in one file. Of a directory every *.json and *.jsonl is read, but of files called
    *_train_* only the one that `paraphrase` asks for, so the paper's released sets are read as they are. The questions
    of a train.jsonl are not asked but learned, with their answers.
    """
    made, _, count = name.partition(":")
    if made in MADE:
        make, default, what, paraphrases = MADE[made]
        if paraphrase not in paraphrases:
            raise UserError(f"--data {made} has no --paraphrase {paraphrase}, only {' and '.join(paraphrases)}")
        count = count or str(default)
        if not count.isdigit() or int(count) == 0:
            raise UserError(f"--data {name}: {made}:N takes a number of {what}, as in {made}:20")
        return Dataset(made, *make(int(count), paraphrase, seed))
    path = fetch(name) if name in PUBLISHED else Path(name)
    if not path.exists():
        raise UserError(f"--data {name}: none of {', '.join([*MADE, *PUBLISHED])}, nor a file or directory that exists")
    files = [path] if path.is_file() else dataset_files(path, paraphrase)
    if path.is_file() and paraphrase != "none":
        raise UserError(f"--data {name}: --paraphrase chooses among the files of a directory; this is one file")
    documents, questions = [], []
    for file in files:
        records = read_records(file)
        if file.name == ND_FILE and paraphrase == "none":
            records = records[::ND_WORDINGS]
        for where, record in records:
            if "text" in record:
                documents.append({"text": text_field(record, "text", where), "where": where})
            else:
                (documents if file.stem == "train" else questions).append(parse_question(record, where, file.stem == "train"))
    if not documents:
        raise UserError(f"--data {name}: no document (a record with a \"text\") in {', '.join(f.name for f in files)}")
    return Dataset(name if name in PUBLISHED else path.stem, documents, questions)


def fetch(name):
    """The directory of a published set, in the hub's cache. A file that is not there yet is downloaded, beside its place and
    then renamed, so one that has its name is whole; every time, its sha256 is compared with the one known."""
    address, files, twin = PUBLISHED[name]
    commit = address.removeprefix(GITHUB).split("/")[2]
    directory = Path(huggingface_hub.constants.HF_ASSETS_CACHE) / "maskft" / f"{name}-{commit[:8]}"
    for file, digest in files.items():
        path = directory / Path(file).name
        try:
            content = path.read_bytes() if path.exists() else download(address + file, path)
            digest = digest or remembered(path, content)
        except (OSError, HTTPException) as error:
            raise UserError(
                f"--data {name}: {address}{file} could not be had ({error}) and is not at {path}. Put it there, or give a "
                f"directory with such files (--data DIR), or take the generated twin, which needs no network: --data {twin}"
            ) from None
        if sha256(content).hexdigest() != digest:
            raise UserError(f"{path}: its sha256 is {sha256(content).hexdigest()}, not {digest}: delete it to fetch it again")
    return directory


def download(url, path):
    """Fetch `url` into the file `path`, all of it or nothing; its content."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    with urlopen(url, timeout=30) as response:
        content = response.read()  # fails if fewer bytes come than were promised
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # several processes may fetch at once
    part.write_bytes(content)
    part.replace(path)
    return content


def remembered(path, content):
    """The sha256 that `path` had when it was first seen, written down beside it."""
    note = path.with_name(path.name + ".sha256")
    if not note.exists():
        write_text(note, sha256(content).hexdigest())
    return note.read_text()


def dataset_files(directory, paraphrase):
    """The files of a directory that are read: all, but of training files in the released layout only the one asked for."""
    files = sorted(p for p in directory.iterdir() if p.suffix in (".json", ".jsonl"))
    training = [p for p in files if "_train_" in p.name]
    wanted = [p for ending in RELEASED[paraphrase] for p in training if p.stem.endswith(ending)]
    wanted += [p for p in files if p.name == ND_FILE and paraphrase != "permute"]
    if not files:
        raise UserError(f"--data {directory}: no .json or .jsonl file there")
    if (training or paraphrase != "none") and len(wanted) != 1:
        found = ", ".join(p.name for p in training) or "none"
        raise UserError(f"--data {directory}: needs one training file for --paraphrase {paraphrase} "
                        f"(*{RELEASED[paraphrase][0]}.json); training files found: {found}")  # fmt: skip
    return [p for p in files if p not in training or p in wanted]


def read_records(path):
    """("FILE, line N", record) for every record of a JSON list or of JSON lines; a bad one is a UserError naming it."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        pairs = [(f"{path}, item {n}", record) for n, record in enumerate(read_json(path), 1)]
    else:
        pairs = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                pairs.append((f"{path}, line {number}", parse_json(line, f"{path}, line {number}")))
    for where, record in pairs:
        if not isinstance(record, dict) or ("text" in record) == ("question" in record):
            raise UserError(f'{where}: not a document ({{"text": ...}}) nor a question ({{"question": ..., "answer": ...}})')
    return pairs


def text_field(record, field, where):
    """A string that is not empty, or a UserError that says where."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip() or any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f'{where}: "{field}" must be text, whole and not empty; found {json.dumps(value)[:40]}')
    return value


def parse_question(record, where, learned=False):
    """A question with its answer. One to be asked has a direction, also as the released files write it: "task" N2D (name to
    description) or D2N; in NameDescription the group says in which order the document has the two, so a task is forward
    where it matches. An answer that ends as GSM8K's do makes it a math problem."""
    question, answer = text_field(record, "question", where), text_field(record, "answer", where)
    task, group = record.get("direction", record.get("task")), record.get("group", "all")
    if task is None and regex.search(r"#### -?\d", answer):
        return as_problem(question, answer) | {"where": where}
    if learned:
        return {"question": question, "answer": answer, "where": where}
    if task in ("N2D", "D2N"):
        order = {"NameIsDescription": "N2D", "DescriptionIsName": "D2N"}.get(group, "N2D")
        task = "forward" if task == order else "backward"
    if task not in ("forward", "backward"):
        raise UserError(f'{where}: "direction" (or "task") must be forward or backward, found {json.dumps(task)}')
    return {"question": question, "answer": answer, "direction": task, "group": str(group), "where": where}


def as_problem(problem, answer):
    """A math problem, to learn or to be asked, in the words of lm-eval's task gsm8k."""
    return {"question": f"Question: {problem}\nAnswer:", "problem": problem, "answer": answer, "direction": "math", "group": "all"}


ANSWER_TOKENS = {"forward": 128, "backward": 128, "math": 256}  # the longest answer that is waited for [paper A.4]


# ------------------------------------------------------------------------------------------------------------- batches

IGNORE = -100  # the label of a token without loss


@dataclass
class Example:
    """One training sequence. `labels` stand in the place of their own token, IGNORE where there is no loss."""

    ids: list
    labels: list
    weight: float  # of each label's cross entropy in the loss
    share: float  # what the step's summed loss is divided by is the sum of this over its examples


def collate(examples, pad_id):
    """A micro-batch, padded on the right: ids, labels (B, T) int64, key_mask (B, T) bool, weights (B,) fp32.

    An empty list gives one padding token without a label: a rank with nothing to do still takes part in the step.
    """
    examples = examples or [Example([pad_id], [IGNORE], 0.0, 0.0)]
    width = max(len(e.ids) for e in examples)

    def pad(row, value):
        return row + [value] * (width - len(row))

    return {
        "ids": torch.tensor([pad(e.ids, pad_id) for e in examples]),
        "labels": torch.tensor([pad(e.labels, IGNORE) for e in examples]),
        "key_mask": torch.tensor([pad([True] * len(e.ids), False) for e in examples]),
        "weights": torch.tensor([e.weight for e in examples], dtype=torch.float32),
    }


# ------------------------------------------------------------------------------------------------- what the model sees


def show(example, tokenizer):
    """An Example as text: [tokens with loss], _ for each masked token, and what the counts are."""
    text, mask_id = "", tokenizer.mask_id  # a property that searches
    # runs of tokens of one kind, decoded together: a character may be several tokens
    kinds = [(label != IGNORE, token == mask_id) for token, label in zip(example.ids, example.labels)]
    for (loss, masked), run in groupby(zip(kinds, example.ids), key=lambda pair: pair[0]):
        ids = [token for _, token in run]
        part = "_" * len(ids) if masked else tokenizer.decode(ids, special=True)
        text += f"[{part}]" if loss else part
    masked, supervised = example.ids.count(mask_id), sum(label != IGNORE for label in example.labels)
    return f"{text}\n-- {len(example.ids)} tokens, {masked} masked, {supervised} with loss"


def main():
    """Print examples of a data set as the model sees them."""
    import llada  # it imports this file, so not before this file is read
    import maskft

    builders = {**maskft.METHODS, "llada": llada.diffusion_example}
    parser = argparse.ArgumentParser(description="Print training examples: [tokens with loss], _ for a masked token.")
    parser.add_argument("data", help=DATA_HELP)
    parser.add_argument("--method", default="masked", choices=builders)
    parser.add_argument("--model", default="tiny", help="whose tokenizer and chat template (default: tiny)")
    parser.add_argument("--paraphrase", default="none", choices=PARAPHRASES)
    args = parser.parse_args()
    dataset, tokenizer = load(args.data, args.paraphrase), load_tokenizer(maskft.find_model(args.model))
    for number, record in enumerate(dataset.documents[:3]):
        rng = np.random.default_rng([0, 0, number + 1])
        print(show(builders[args.method](record, tokenizer, (0.05, 0.95), rng), tokenizer), end="\n\n")
    print(f"{len(dataset.documents)} documents, {len(dataset.questions)} questions; the first: {dataset.questions[:1]}")


if __name__ == "__main__":
    import data
    import maskft

    maskft.entry_point(data.main)
