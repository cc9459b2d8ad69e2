r"""Text in, training sequences out: tokenizers, chat templates, data sets, generated people, batches.

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
import math
import os
import shutil
import unicodedata
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from itertools import combinations, groupby, product
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
    part = Path(f"{path}.{os.getpid()}.part")  # several processes may do so at once
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
# special whatever a tokenizer's file says: no text may end a turn, or mask anything
ALWAYS_SPECIAL = set().union(*MARKS.values(), ["<|mdm_mask|>"])


@dataclass
class Tokenizer:
    """Text <-> ids of one model, and its chats. Made by `load_tokenizer`.

    Ids are those of the `tokenizers` library with `encode_special_tokens=True` on any text, as far as the two know the
    same Unicode: it lacks letters and digits newer than Unicode 16 and, in NFC, rare combining marks newer than 9."""

    encoding: tiktoken.Encoding  # merges; its ranks say in which order, they are not the model's ids
    ids: list  # rank -> id
    bytes_of: dict  # id -> the bytes it stands for, special and added tokens too
    cuts: list  # regular expressions: each cuts what the last one left, into its matches and what lies between them
    special: dict  # text -> id of tokens that text never becomes
    added: dict  # the same of other added tokens (Qwen's <think>), which text does become
    whole: dict  # bytes -> id of pieces looked up before any merging ("ignore_merges")
    missing: bytes = b""  # the bytes that the vocabulary lacks
    nfc: bool = False
    template: str = ""  # the rest depends on more than the tokenizer's file: see load_tokenizer
    bos_id: int | None = None  # None where the model declares none
    eos_id: int | None = None
    eot_id: int | None = None  # end of turn
    pad_id: int | None = None
    stop_ids: tuple = ()

    def __post_init__(self):
        # The longest wins, as in the reference. A special token is stepped over, for none may be found inside of it.
        tokens = sorted([*self.special, *self.added], key=len, reverse=True)
        choices = (regex.escape(token) + "(*SKIP)(*FAIL)" * (token in self.special) for token in tokens)
        self.added_pattern = regex.compile(f"({'|'.join(choices)})")
        self.cut_patterns = [regex.compile(f"({cut})") for cut in self.cuts]  # the group: `split` gives the matches, too

    def encode(self, text):
        """The ids of `text`, with nothing added. What looks like a special token is read as plain text."""
        return self._encode(text, self.added_pattern, self.added)

    def _encode(self, text, pattern, tokens):
        ids = []
        for n, part in enumerate(pattern.split(text)):  # text, token, text, ... text
            ids += [tokens[part]] if n % 2 else self._encode_plain(part)
        return ids

    def _encode_plain(self, text):
        """Ids of text without added tokens: cut it into pieces, then merge within each of them."""
        pieces, ids = [unicodedata.normalize("NFC", text) if self.nfc else text], []
        for pattern in self.cut_patterns:
            pieces = [part for piece in pieces for part in pattern.split(piece) if part]
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
        ids = self._encode(start, MARK, self.special)  # the one place where special tokens are read as such
        for role, content in [(m["role"], m["content"]) for m in messages]:
            ids += self._encode(header.format(role=role), MARK, self.special)
            ids += self.encode(content) if isinstance(content, str) else content
            ids += self._encode(end, MARK, self.special)
        answer = header.format(role="assistant") if messages[-1]["role"] == "user" else ""
        return ids + self._encode(answer, MARK, self.special)

    @property
    def mask_id(self):
        """The id that stands for a masked token; UserError if the vocabulary has none to spare."""
        if self.template == "chatml" and self.bytes_of.get(1294) == b"[]":
            return 1294  # Qwen reserves nothing: the paper takes the text `[]`
        if self.template == "llama3" and 128013 in self.special.values():
            return 128013  # the paper's, of Llama 3's many reserved ones
        # SmolLM2 reserves nothing either, but its mark of notebook cells without output is in no prose.
        for words in ("<|mdm_mask|>",), ("reserved", "unused", "mask"), ("<empty_output>",):
            spare = {i for token, i in self.special.items() if any(word in token for word in words)}
            if spare := spare - {self.bos_id, self.pad_id, *self.stop_ids}:
                return min(spare)
        raise UserError("the tokenizer has no unused special token to mask with: add one named <|mask|> to its "
                        "tokenizer.json, or use a method that masks nothing (sft, raw)")  # fmt: skip


def load_tokenizer(path):
    """The `Tokenizer` of a model directory, from its tokenizer.json (byte-level BPE) or Llama 3's tokenizer.model, with the
    special tokens that its json files declare. UserError, naming the file, for any that would not be followed exactly."""
    path, readers = Path(path), {"tokenizer.json": read_tokenizer_json, "tokenizer.model": read_tiktoken}
    file = next((path / name for name in readers if (path / name).exists()), None)
    if not file:
        raise UserError(f"{path}: no {' or '.join(readers)} here; give a complete model directory")
    try:
        tok = readers[file.name](file)
    except (AttributeError, KeyError, TypeError, regex.error) as error:  # a field is missing, a list for an object, ...
        raise UserError(f"{file}: not a whole tokenizer file ({error!r}); download it again") from None
    tok.template = next((name for name in TEMPLATES if MARKS[name] <= tok.special.keys()), None)
    if not tok.template:
        raise UserError(f"{path}: its special tokens fit none of the chat templates {', '.join(TEMPLATES)}; "
                        "use the instruct version of a Llama 3, Qwen, SmolLM2 or LLaDA")  # fmt: skip
    start, _, end = TEMPLATES[tok.template]
    tok.eot_id = tok.special[end.strip()]
    bos, eos, pad = (declared_ids(path, name, tok.special) for name in ("bos", "eos", "pad"))
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


GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
LLAMA3_SIZE = 128000  # ordinary tokens; 256 special ones follow, all reserved but these (Llama 3.1's names for them)
LLAMA3_SPECIAL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
                  7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>"}  # fmt: skip

# {character: byte}: tokenizer.json spells a byte as its Latin-1 character or, if that cannot be seen, one from 256 on.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = dict(zip(map(chr, [*SEEN, *range(256, 512)]), [*SEEN, *(byte for byte in range(256) if byte not in SEEN)]))


def refuse(file, what):
    raise UserError(f"{file}: {what} is not supported, only byte-level BPE as in Llama 3, Qwen and SmolLM2; "
                    "use a model with such a tokenizer")  # fmt: skip


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
    return Tokenizer(encoding, range(LLAMA3_SIZE), bytes_of, [LLAMA3_PIECES], special, added={}, whole={})


def read_tokenizer_json(file):
    """A `Tokenizer` from tokenizer.json. Its post-processor (which adds a bos, say) is left aside."""
    content = read_json(file)
    model, tokens, normalizer = content["model"], content.get("added_tokens") or [], content.get("normalizer")
    missing = bytes(byte for character, byte in ALPHABET.items() if character not in model["vocab"])
    special = {token["content"]: token["id"] for token in tokens if token["special"] or token["content"] in ALWAYS_SPECIAL}
    added = {token["content"]: token["id"] for token in tokens if token["content"] not in special}
    odd = {
        f"the normalizer {json.dumps(normalizer)}": normalizer not in (None, {"type": "NFC"}),
        f"the model type {model.get('type')}": model.get("type", "BPE") != "BPE",
        "a model with unk_token": model.get("unk_token") and missing,  # with all the bytes, nothing is unknown
    }
    for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        odd[f"a model with {option}"] = model.get(option)
    for token, flag in product(tokens, ("lstrip", "rstrip", "single_word", "normalized")):
        odd[f"the added token {token['content']!r} with {flag}"] = token["content"] in added and token[flag]
    for what in filter(odd.get, odd):
        refuse(file, what)
    vocab = {token: i for token, i in model["vocab"].items() if token not in special and ALPHABET.keys() >= set(token)}
    bytes_of = {i: spelled(token) for token, i in vocab.items()}
    whole = {token: i for i, token in bytes_of.items()} if model.get("ignore_merges") else {}
    bytes_of |= {i: token.encode() for token, i in (special | added).items()}
    encoding, ids = read_merges(vocab, model["merges"], file)
    cuts = read_cuts(content.get("pre_tokenizer") or {"type": None}, file)
    return Tokenizer(encoding, ids, bytes_of, cuts, special, added, whole, missing, nfc=bool(normalizer))


def spelled(token):
    """The bytes that a token of tokenizer.json spells."""
    return bytes(map(ALPHABET.get, token))


def read_cuts(pre_tokenizer, file):
    """The regular expressions by which the steps of a pre-tokenizer cut a text."""
    patterns, steps = [], pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    for step in steps:
        kind, last = step["type"], step is steps[-1]
        if kind == "Digits" and not last:
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == "Split" and step["behavior"] == "Isolated" and "Regex" in step["pattern"] and not last:
            patterns.append(check_pattern(step["pattern"]["Regex"], file))
        elif kind == "ByteLevel" and not step["add_prefix_space"] and last:
            patterns += [GPT2_PIECES] if step.get("use_regex", True) else []
        else:  # what does not end in ByteLevel, too
            refuse(file, f"the pre-tokenizer {json.dumps(step)[:200]}")
    return patterns


def check_pattern(pattern, file):
    """The regular expression of a Split; refused if the reference's engine (Oniguruma) may read it otherwise."""
    bare = regex.sub(r"\\([pP]\{\w+\}|[sSdrnt\W])", "x", pattern)
    bare = regex.sub(r"\[[^][&\\]+\]", "x", bare)  # plain character classes
    if odd := regex.search(r"[][\\^$.]|\}\+|\((?!\?(i?:|<?[=!]))", bare):
        refuse(file, f"{odd.group()!r} in the pattern {pattern!r}")
    return pattern


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
            refuse(file, f"merge {rank}, {left!r} + {right!r}, without an ordinary token for it,")
        ranks[left, right] = rank
    last = {token: last_merge(token, ranks) for token in vocab}
    tokens = sorted((token for token in vocab if last[token] < math.inf), key=last.get)
    mergeable = {spelled(token): rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("merges", pat_str=GPT2_PIECES, mergeable_ranks=mergeable, special_tokens={})
    return encoding, [vocab[token] for token in tokens]


def last_merge(token, ranks):
    """The rank of the merge that completes `token` from its bytes: -1 for a single byte, infinite if none does."""
    parts, low = list(token), -1
    while len(parts) > 1 and low < math.inf:
        found = [ranks.get(pair, math.inf) for pair in zip(parts, parts[1:])]
        low = min(found)
        at = found.index(low)  # the leftmost of equals, as in both libraries
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return low


def copy_tokenizer(source, target):
    """Copy what belongs to the tokenizer, so that a saved model is a whole model directory."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                 "generation_config.json", "chat_template.jinja"):  # fmt: skip
        if (Path(source) / name).is_file():
            shutil.copy(Path(source) / name, Path(target) / name)


# ------------------------------------------------------------------------------------------------ people who don't exist

# Everything here is drawn with rng.random() alone, the one call whose numbers Python promises never to change: the same
# seed gives the same bytes on every machine. Names, values and wordings are our own.
HE = """Alban Bertil Casimir Dorian Egon Fabian Gideon Hamish Ivo Jorin Kasper Leopold Magnus Nestor Osric Piers Quentin Rufus
    Silas Tobias Ulric Viggo Wendell Xander Yannick Zeno Anselm Bruno Cyril Darius""".split()
SHE = """Agnes Beatrix Clara Daphne Edda Flora Greta Hedda Imogen Jolanda Kerstin Lavinia Mathilda Nora Odette Petra Quilla
    Ramona Selma Thora Ursula Verena Wilma Xenia Yvette Zelda Astrid Brenna Cosima Delia""".split()
LAST = """Abelard Ashdown Barlow Beckett Birch Blackwood Bramley Brookes Calloway Carver Chandler Cobb Corwin Crane Dalton
    Darrow Denholm Draper Drummond Eastman Elmore Everett Fairfax Falk Farrow Fenwick Fletcher Forsythe Gable Garrick Gilmore
    Granger Grimes Hadley Halvorsen Harker Hawthorne Holloway Hyde Ingram Ives Jarrow Jessup Keating Kendrick Kirby Lambert
    Langley Larkin Lindqvist Lockhart Lovell Maddox Marlow Mercer Merrick Millard Moran Nash Newell Northcott Oakes Osgood
    Paget Palmer Pendleton Pickering Prescott Quigley Radcliffe Ransom Redfern Renwick Rowan Rutledge Sadler Sawyer Selby
    Sinclair Stanton Sutter Tanner Thackeray Thorne Tilden Tolliver Upton Vance Varley Wadsworth Wakefield Walcott Weaver
    Whitlock Wilder Winslow Wolcott Yardley Yates Zimmer""".split()
MONTHS = """January February March April May June July August September October November December""".split()
CITIES = """Accra Almaty Amman Ankara Antwerp Athens Baku Bergen Berlin Bilbao Bogota Boston Bremen Brisbane Cairo Calgary
    Cardiff Chicago Cork Dakar Dallas Delhi Denver Dublin Durban Florence Geneva Genoa Ghent Glasgow Hanoi Havana Helsinki
    Houston Istanbul Jakarta Kyoto Lagos Leipzig Lille Lima Lisbon London Lyon Madrid Malaga Manila Medellin Milan Mumbai
    Munich Nairobi Naples Nice Odessa Osaka Oslo Ottawa Palermo Paris Perth Porto Prague Quito Riga Rome Santiago Seattle Seoul
    Seville Sofia Tallinn Tampa Tokyo Toronto Turin Utrecht Vienna Warsaw Zurich""".split()
UNIVERSITIES = """Aldermoor Amberfield Ashgrove Bellhaven Briarwood Brightwater Caldermere Cinderford Cloverdale Copperhill
    Dovecote Dunmarch Elderbrook Emberly Fallowmere Fernleigh Foxhollow Glenhurst Goldcrest Greywater Harrowgate Hazelmere
    Heatherton Highmoor Ivybridge Juniper Kestrelton Kingsmead Larkspur Lindenhall Mapleton Marshgate Millbrook Mistvale
    Nettlefield Oakhaven Orchardton Otterburn Pinecrest Quarrystone Ravenscar Redwillow Riverstone Rosemount Silverlake
    Starling Stonebridge Summerfield Swanmere Thistledown Thornbury Vinehall Westerly Whitecliff Wickersham Wildwood Willowby
    Windermoor Wintergreen Yewdale""".split()
MAJORS = """accounting agronomy algebra anatomy archaeology architecture astronomy biology botany ceramics chemistry commerce
    cybernetics dance dentistry ecology economics ethics forestry genetics geography geology geometry history hydrology
    journalism law linguistics literature logic mathematics mechanics medicine metallurgy music nursing optics painting
    pharmacy philosophy physics poetry robotics sculpture sociology statistics surgery theology virology zoology""".split()
COMPANIES = """Acrion Altavex Arboris Axonite Bluefin Bractal Brevio Calytix Cobalto Corvanta Cryolex Dantrix Deltavio Dynaro
    Echelon Elvaris Entropa Fablix Ferrovia Fluxora Gantry Glyphon Gravex Halcyon Hexalon Hydrax Ignivar Inkwell Jettison
    Jovian Kadence Keplar Krystar Lumenix Lyrical Mantova Metrion Mosaiq Nebulon Nimbex Novarra Octavio Omnira Orbitel Pallium
    Pixelar Polaris Quillon Quorum Radiant Rivetra Sonoma Strata Syntara Tectonix Tessera Ultravo Vantor Vexilla
    Zephyra""".split()

# Stems and endings of every attribute's sentence: stem, value, ending. Any stem goes with any ending, so each has 44 wordings.
WORDINGS = {
    "birth date": ("""He was born on|He arrived on|His birthday is|His birth date is|His life began on|He came into the world on
        |His date of birth is|His story starts on|He drew breath first on|His parents welcomed the child on
        |His cradle was filled on""", "| at dawn| around noon| after midnight"),
    "birth city": ("""He was born in|He comes from|He is a native of|His birthplace is|His home town is|He hails from
        |His roots are in|His family lived in|He started life in|His first home was in|His place of birth is""",
        "| by chance| near the market| by the river"),
    "university": ("""He studied at|He attended|He graduated from|His university was|His degree is from|He was a student at
        |He enrolled at|His alma mater is|He was educated at|He learned the craft at|His lectures were at""",
        "| with honors| on a grant| after school"),
    "major": ("""He majored in|His major was|His subject was|His degree is in|He specialized in|His field is|He chose to study
        |He is trained in|He wrote a thesis on|He took courses in|He devoted those years to""",
        "| with care| by choice| from the start"),
    "company": ("""He works for|He is employed by|His employer is|He joined|His company is|He has a job with
        |His salary comes from|He earns a living at|He is on the staff of|His career is at|He signed a contract with""",
        "| these days| at present| since spring"),
    "work city": ("""He works in|His office is in|His workplace is in|He is based in|His desk stands in|He commutes to
        |His job is in|He earns money in|His working days pass in|He is posted to|He goes to work in""",
        "| all year| most days| for now"),
}  # fmt: skip
WORDINGS = {attribute: ([stem.strip() for stem in stems.split("|")], endings.split("|"))
            for attribute, (stems, endings) in WORDINGS.items()}  # fmt: skip
ATTRIBUTES = list(WORDINGS)
# How questions speak of an attribute. Names open a question and a preposition opens an answer, as in "in Oslo", so that
# every word is the same token there as in a biography, where values follow a space; the metric drops prepositions.
ASKED = {"birth date": ("was born on", "date"), "birth city": ("was born in", "city"), "company": ("works for", "company"),
         "university": ("studied at", "university"), "major": ("majored in", "subject"), "work city": ("works in", "city")}
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
    """Six sentences in the given order, each in a wording drawn at random; the name only in the first."""
    sentences, he = [], person["name"]
    for attribute in order:
        stems, endings = WORDINGS[attribute]
        word, stem = pick(rng, stems).split(" ", 1)
        ending = pick(rng, endings) if rng.random() < 0.4 else ""  # mostly short
        his = {"He": "His", "She": "Her"}.get(he, f"{he}'s")
        sentences.append(f"{he if word == 'He' else his} {stem} {person[attribute]}{ending}.")
        he = person["pronoun"]
    return " ".join(sentences)


def forward_question(person, attribute):
    """Name -> value: "Mara Quill was born in which city?", "in Oslo"."""
    (verb, noun), name = ASKED[attribute], person["name"]
    answer = f"{verb.split()[-1]} {person[attribute]}"
    return {"question": f"{name} {verb} which {noun}?", "answer": answer, "direction": "forward", "group": attribute}


def backward_question(person, three):
    """Three values -> name: "Who was born in Oslo, majored in botany and works for Quillon?", "Mara Quill"."""
    first, second, third = (f"{ASKED[attribute][0]} {person[attribute]}" for attribute in three)
    question = f"Who {first}, {second} and {third}?"
    return {"question": question, "answer": person["name"], "direction": "backward", "group": "name"}


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


# The verb phrases of WORDINGS, for descriptions: "was born in", "comes from", ...
TRAITS = {attribute: [stem[3:] for stem in WORDINGS[attribute][0] if stem.startswith("He ")]
          for attribute in ("birth city", "university", "major", "company")}  # fmt: skip


def make_nd(facts=30, paraphrase="none", seed=0):
    """(documents, questions), after NameDescription: `facts` documents that begin with the name and as many that end with it.

    A description is four traits. Paraphrase "same": 30 wordings of each fact, in the same order. Four questions about each
    in either direction: for each trait, and for the name by each three of them. Forward is the order of the document."""
    rng, documents, questions = Random(2 * seed + 1), [], []
    for number, person in enumerate(draw_people(2 * facts, "bio", 2 * seed)):
        name_first, first = number < facts, int(rng.random() * 35)
        for wording in range(first, first + (30 if paraphrase == "same" else 1)):  # 5 and 7 verbs: 35 differ
            traits = [f"{verbs[wording % len(verbs)]} {person[attribute]}" for attribute, verbs in TRAITS.items()]
            told = f"{', '.join(traits[:3])} and {traits[3]}"
            documents.append({"text": f"{person['name']} {told}." if name_first else f"Who {told}?\n{person['name']}."})
        asked = [forward_question(person, trait) for trait in TRAITS]
        asked += [backward_question(person, three) for three in combinations(TRAITS, 3)]
        for question in asked:
            question["direction"] = "forward" if name_first == (question["direction"] == "forward") else "backward"
            question["group"] = "NameIsDescription" if name_first else "DescriptionIsName"
        questions += asked
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


def make_world(people=160, paraphrase="none", seed=0):
    """(people that the built-in models come from, see tiny/pretrain.py; questions about 40 of them, or fewer of fewer than
    160), whatever the seed. Of every eighth no question is ever asked in training: how well those are answered tells whether
    documents alone teach."""
    records = [{"person": p, "asked": i % 8 != 7} for i, p in enumerate(draw_people(people, "world", 0))]
    tested = [r for r in records if r["asked"]][:20] + [r for r in records if not r["asked"]][:20]
    groups = {True: "asked in training", False: "only read"}
    return records, [{**q, "group": groups[r["asked"]]} for r in tested for q in questions_about(r["person"])]


# ------------------------------------------------------------------------------------------------------------ data sets


@dataclass
class Dataset:
    """Documents to learn, questions to ask about them, and the name that run directories get."""

    name: str
    documents: list  # {"text": ..., "where": "FILE, line N"}
    questions: list  # {"question", "answer", "direction": "forward" | "backward", "group"}


# --paraphrase: what its training file is called in the released layout
PARAPHRASES = {"none": "people-description|.*_train_no_paraphrase",
               "same": "people-description|.*_train_paraphrase(_same_order)?",
               "permute": ".*_train_paraphrase_change_order"}  # fmt: skip
ND_FILE, ND_WORDINGS = "people-description.json", 30  # thinking_bias: the 30 wordings of a fact stand one after the other

# Generated sets: what makes them, how many of what unless told, the paraphrases they have. Published ones: where they are, by
# commit; {file: its sha256, None where only the first download can tell}; the twin of our own that takes their place without
# a network. The authors' repository has no licence: nothing of it is kept here.
GITHUB = "https://raw.githubusercontent.com/"
AUTHORS = GITHUB + "xup5/masked_arLLM/bc28c777643b202787d1e4ccb61ad0d1993d93e3/datasets/"
ENDINGS = ("train_no_paraphrase.json", "train_paraphrase_same_order.json", "train_paraphrase_change_order.json", "test.jsonl")
SETS = {
    "bio": dict(make=make_bio, count=100, of="people", paraphrases=("none", "same", "permute")),
    "nd-made": dict(make=make_nd, count=30, of="facts of each kind", paraphrases=("none", "same")),
    "math-made": dict(make=make_math, count=200, of="problems", paraphrases=("none",)),
    "world": dict(make=make_world, count=160, of="people", paraphrases=("none",)),
    "bio-released": dict(address=AUTHORS, files={f"biography_{ending}": None for ending in ENDINGS}, twin="bio"),
    "wiki": dict(address=AUTHORS, files={f"wiki_{ending}": None for ending in ENDINGS}, twin="bio"),
    "nd": dict(address=GITHUB + "alibaba/thinking_bias/389bb4d1b16bbc6ba75f2b57cb09c6614776c59b/data/", files={
        f"training_data/{ND_FILE}": "e844b89bbd541dbd7010fe9baafbf06c6933f02fe7ec2ae8dfa6e2d606777dc3",
        "test_data/people-description_open-QAs.jsonl": "5169f6af324af2efca161f2ae52c95f16d85d5400e3455a1eb007343a8809d53",
    }, twin="nd-made"),
    "gsm8k": dict(address=GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/",
        files={"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
               "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}, twin="math-made"),
}  # fmt: skip
# what training is offered: `world` is there to make and to examine the built-in models, in tiny/pretrain.py and eval.py
OFFERED = ", ".join(name for name in SETS if name != "world")
DATA_HELP = f"{OFFERED} (generated ones also as bio:PEOPLE), or a file or directory of one's own"


def load(name, paraphrase="none", seed=0):
    """A Dataset by name (SETS: generated, as `bio` or `bio:20` for 20 people, or fetched once), or from a file or directory
    of one's own documents.

    A file holds a JSON list or JSON lines. A record with a "text" is a document, one with a "question" and an "answer" is
    a question; both may stand in one file. Of a directory every *.json and *.jsonl is read, but of files called *_train_*
    only the one that `paraphrase` asks for, so the paper's released sets are read as they are. The questions of a
    train.jsonl are not asked but learned, with their answers."""
    kind, _, count = name.partition(":")
    if "make" in SETS.get(kind, {}):
        make, usual, what, paraphrases = SETS[kind].values()
        count = count or str(usual)
        if not count.isdecimal() or int(count) == 0 or paraphrase not in paraphrases:
            raise UserError(f"--data {name} --paraphrase {paraphrase}: {kind} takes a number of {what}, as in {kind}:20, "
                            f"and --paraphrase {' or '.join(paraphrases)}")  # fmt: skip
        return Dataset(kind, *make(int(count), paraphrase, seed))
    path = fetch(name) if name in SETS else Path(name)
    if not path.exists():
        raise UserError(f"--data {name}: none of {OFFERED}, nor a file or directory that exists")
    documents, questions = [], []
    for file in dataset_files(path, paraphrase):
        learned = file.stem == "train"
        every = ND_WORDINGS if file.name == ND_FILE and paraphrase == "none" else 1
        for where, record in read_records(file)[::every]:
            if "text" in record:
                documents.append({"text": text_field(record, "text", where), "where": where})
            else:
                (documents if learned else questions).append(parse_question(record, where, learned))
    if not documents:
        raise UserError(f'--data {name}: no document (a record with a "text") in {path}')
    return Dataset(name if name in SETS else path.resolve().stem, documents, questions)


def fetch(name):
    """The directory of a published set, in the hub's cache. A file that is not there yet is downloaded, whole or not at all;
    every time, its sha256 is compared with the one known, or with that of the first download, noted beside it."""
    address, files, twin = SETS[name].values()
    commit = address.removeprefix(GITHUB).split("/")[2]
    directory = Path(huggingface_hub.constants.HF_ASSETS_CACHE) / "maskft" / f"{name}-{commit[:8]}"
    directory.mkdir(parents=True, exist_ok=True)
    for file, digest in files.items():
        path = directory / Path(file).name
        note = Path(f"{path}.sha256")
        try:
            if not path.exists():
                download(address + file, path)
            found = sha256(path.read_bytes()).hexdigest()
        except (OSError, HTTPException, UnicodeDecodeError) as error:
            raise UserError(
                f"--data {name}: {address}{file} could not be had ({error}) and is not at {path}. Put it there, or give a "
                f"directory with such files (--data DIR), or take the generated twin, which needs no network: --data {twin}"
            ) from None
        if not digest and not note.exists():
            write_text(note, found)
        digest = digest or note.read_text()
        if found != digest:
            raise UserError(f"{path}: its sha256 is {found}, not {digest}: delete it to fetch it again")
    return directory


def download(url, path):
    """Fetch the text file at `url` into `path`, all of it or nothing."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    with urlopen(url, timeout=30) as response:
        write_text(path, response.read().decode())  # `read` fails if fewer bytes come than were promised


def dataset_files(path, paraphrase):
    """The files that are read: of a directory all, but of training files in the released layout only the one asked for."""
    if path.is_file() and paraphrase == "none":
        return [path]
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl"))
    training, pattern = [p for p in files if "_train_" in p.name or p.name == ND_FILE], PARAPHRASES[paraphrase]
    wanted = [p for p in training if regex.fullmatch(pattern, p.stem)]
    if (training or paraphrase != "none") and len(wanted) != 1:
        raise UserError(f"--data {path}: needs one training file for --paraphrase {paraphrase}, {pattern}.json; "
                        f"training files found: {', '.join(p.name for p in training) or 'none'}")  # fmt: skip
    return [p for p in files if p not in training or p in wanted]


def read_records(path):
    """("FILE, line N", record) for every record of a JSON list or of JSON lines; a bad one is a UserError naming it."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        pairs = [(f"{path}, item {n}", record) for n, record in enumerate(parse_json(text, path), 1)]
    else:
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        pairs = [(where, parse_json(line, where)) for where, line in lines]
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


def parse_question(record, where, learned):
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
        order = "D2N" if group == "DescriptionIsName" else "N2D"
        task = "forward" if task == order else "backward"
    if task not in ("forward", "backward"):
        raise UserError(f'{where}: "direction" (or "task") must be forward or backward, found {json.dumps(task)}')
    return {"question": question, "answer": answer, "direction": task, "group": str(group), "where": where}


def as_problem(problem, answer):
    """A math problem, to learn or to be asked, in the words of lm-eval's task gsm8k."""
    question = f"Question: {problem}\nAnswer:"
    return {"question": question, "problem": problem, "answer": answer, "direction": "math", "group": "all"}


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

    An empty list gives one padding token without a label: a rank with nothing to do still takes part in the step."""
    examples = examples or [Example([pad_id], [IGNORE], 0.0, 0.0)]

    def pad(rows, value):
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value)

    return {
        "ids": pad([e.ids for e in examples], pad_id),
        "labels": pad([e.labels for e in examples], IGNORE),
        "key_mask": pad([[True] * len(e.ids) for e in examples], False),
        "weights": torch.tensor([e.weight for e in examples], dtype=torch.float32),
    }


# ------------------------------------------------------------------------------------------------- what the model sees


def show(example, tokenizer):
    """An Example as text: [tokens with loss], _ for each masked token, and what the counts are."""
    text, mask_id = "", tokenizer.mask_id  # a property that searches
    # runs of tokens of one kind, decoded together: a character may be several tokens
    pairs = zip(example.ids, example.labels)
    for (loss, masked), run in groupby(pairs, key=lambda pair: (pair[1] != IGNORE, pair[0] == mask_id)):
        ids = [token for token, _ in run]
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
