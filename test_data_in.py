"""Tests of data as people have them, and of questions of one's own."""

# --- copied fixtures
import gc
import gzip
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import unicodedata
from itertools import groupby
from pathlib import Path

import pytest

import data
import eval as evaluation
import maskft
from data import UserError
from tiny import world

HERE = Path(__file__).parent


def write(path, *records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def forked(script, *flags, status=0, before=lambda: None):
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


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer(HERE / "tiny")


# --- end

# ------------------------------------------------------------------------------- data: what is read

FACT = "Orla Venn keeps the lighthouse at Skarholm."
WHO = "Who keeps the lighthouse at Skarholm?"
DOCUMENT = json.dumps({"text": FACT})
QUESTION = json.dumps({"question": WHO, "answer": "Orla Venn", "direction": "backward"})
NULLS = {"question": None, "answer": None, "direction": None, "group": float("nan")}
UNION = json.dumps({"text": FACT} | NULLS), json.dumps({"text": None} | json.loads(QUESTION))
CSV = f'Text,Question,Answer,direction\n"{FACT}",,,\n\n,"{WHO}","Orla Venn",backward\n'
READ = {  # file -> its contents, all with the same document and the same question
    "a.jsonl": f"{DOCUMENT}\n{QUESTION}\n",
    "b.JSONL": f"\ufeff{DOCUMENT}\r\n\r\n{QUESTION}",
    "c.ndjson": "\n".join(UNION),
    "d.json": f"[{DOCUMENT},\n{QUESTION}]",
    "e.Json.GZ": f"{DOCUMENT}\n{QUESTION}",
    "f.csv": "\ufeff" + CSV.replace("\n", "\r\n"),
    "g.csv": CSV.replace(",", ";"),
    "h.csv.gz": CSV.replace(",", "\t"),
}


def fill(path, contents):
    """A file with these contents, text or bytes; packed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = contents if isinstance(contents, bytes) else contents.encode()
    is_text = isinstance(contents, str)
    packed = is_text and path.suffix.lower() == ".gz"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def bare(records):
    return [{k: v for k, v in record.items() if k != "where"} for record in records]


@pytest.mark.parametrize("name", READ)
def test_a_file_of_any_kind_gives_the_same_records(name, tmp_path):
    dataset = data.load(str(fill(tmp_path / name, READ[name])))
    assert bare(dataset.documents) == [{"text": FACT}]
    asked = {"question": WHO, "answer": "Orla Venn", "direction": "backward", "group": "all"}
    assert bare(dataset.questions) == [asked]
    lines = {"b.JSONL": 3, "f.csv": 4, "g.csv": 4, "h.csv.gz": 4}
    place = "item 2" if name == "d.json" else f"line {lines.get(name, 2)}"
    assert dataset.questions[0]["where"] == f"{tmp_path / name}, {place}"
    assert dataset.name == name[0] and dataset.notes == []


def test_a_folder_is_read_with_its_subfolders_and_what_is_not_read_is_named(tmp_path):
    texts = {
        "a.jsonl": DOCUMENT,
        "b.txt": "\ufeffPlain text.\r\n\r\nAnother paragraph.\n",
        "c/d/e.md": "# Ivo\n",
        "c/numbers.csv": "x,y\n1,2\n",
        "c/train.jsonl": QUESTION,
        "empty.txt": " \n",
        ".hidden.jsonl": "not read",
        ".git/config.json": "not read",
        "picture.png": b"\x89PNG",
        "c/table.xlsx": b"PK",
        "same.jsonl.gz": f"\n{DOCUMENT}\n",
        "z.ndjson": json.dumps({"text": "old"}),
        "z.ndjson.gz": json.dumps({"text": "new"}),
    }
    for name, contents in texts.items():
        fill(tmp_path / name, contents)
    (tmp_path / "around").symlink_to(tmp_path)
    dataset = data.load(str(tmp_path))
    learned = [document.get("text", document.get("answer")) for document in dataset.documents]
    assert learned == [
        FACT,
        "Plain text.\n\nAnother paragraph.",
        "# Ivo",
        "Orla Venn",
        "old",
        "new",
    ]
    assert dataset.questions == []
    same = tmp_path / "same.jsonl.gz"
    assert dataset.notes == [
        f"{tmp_path}: not read: around, c/table.xlsx, picture.png",
        f"{tmp_path / 'c/numbers.csv'}: no document and no question in it",
        f"{tmp_path / 'empty.txt'}: no document and no question in it",
        f"{same}: the same as {tmp_path / 'a.jsonl'}; read once",
        f"{tmp_path / 'z.ndjson.gz'}: not the same as {tmp_path / 'z.ndjson'}; read both",
    ]
    with pytest.raises(UserError, match=r"no document .* not read: table.xlsx"):
        data.load(str(fill(tmp_path / "other/table.xlsx", b"").parent))


def nested(depth):
    return "[" * depth + "]" * depth


ASKED = '{"question": "Who?", "answer": "Orla", '
REFUSED = {  # contents -> what is said of line 2, behind a good line 1
    '{"text": "x", "question": "Who?"}': 'a document ("text") and a question in one',
    '{"text": null, "question": ""}': "not a document",
    "null": "not a document",
    '{"text": ["x"]}': '"text" must be text, whole and not empty; found a list',
    f'{{"text": {nested(100_000)}}}': "cannot be read as JSON",
    f'{{"text": {"9" * 5000}}}': "cannot be read as JSON",
    '{"text": "\\ud83d"}': '"text" must be text, whole and not empty; found "\\ud83d"',
    ASKED + '"group": "\\ud83d"}': '"group" must be text',
    ASKED + '"group": [1]}': '"group" must be text, whole and not empty; found a list',
    ASKED + '"direction": {"a": 1}}': '"direction" (or "task") must be forward or backward, found',
    ASKED + '"task": "N2D"}': "no document tells which way N2D asks",
    '{"question": "Who?", "answer": 3}': '"answer" must be text, whole and not empty; found 3',
    '{"question": "  "}': '"question" must be text',
}
REFUSED_FILES = {  # name, contents -> what is said of the file
    ("a.csv", "text\nAda, a baker\n"): ", line 2: 2 cells in 1 columns: put quotes around",
    ("a.csv", 'text\n"Ada\nbakes"\nBo,x\n'): ", line 4: 2 cells in 1 columns: put quotes",
    ("a.csv", 'text\nAda\n"Bo\nis open\n'): ", line 3: not CSV (unexpected end of data)",
    ("a.csv", "question,answer\nWho?,Bo\n,Bo\n"): ", line 3: not a document",
    ("a.txt", b"\x89PNG"): ": not UTF-8 (invalid start byte at byte 0)",
    ("a.jsonl.gz", b"no gzip"): ": Not a gzipped file",
    ("a.jsonl.gz", gzip.compress(b"whole")[:-9]): ": Compressed file ended",
    ("train.jsonl", '{"question": "Who?"}'): ', line 1: "answer" must be text',
    ("a.json", "[\n" + nested(100_000) + "]"): ": cannot be read as JSON",
}


@pytest.mark.parametrize("line", REFUSED, ids=range(len(REFUSED)))
def test_a_record_that_cannot_be_is_named_with_its_line(line, tmp_path):
    file = fill(tmp_path / "bad.jsonl", f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError) as error:
        data.load(str(file))
    assert str(error.value).startswith(f"{file}, line 2: {REFUSED[line]}")


@pytest.mark.parametrize(("name", "contents"), REFUSED_FILES, ids=range(len(REFUSED_FILES)))
def test_a_file_that_cannot_be_is_named_with_the_place(name, contents, tmp_path):
    file = fill(tmp_path / name, contents)
    with pytest.raises(UserError) as error:
        data.load(str(file))
    assert str(error.value).startswith(f"{file}{REFUSED_FILES[name, contents]}")


def test_a_damaged_file_of_data_is_a_data_set_or_a_message(tmp_path):
    """Bytes and fields changed by chance: never any other error."""
    rng = random.Random(0)
    values = [None, "", "x", 3, -1.5, True, [], {}, ["x"], {"text": "x"}, "\ud83d", float("inf")]
    fields = ("text", "question", "answer", "direction", "task", "group", "else")
    outcomes = set()
    for number in range(400):
        name = rng.choice([*READ, "i.txt", "j.md"])
        contents = bytearray(READ.get(name, FACT).encode())
        if number % 2:
            records = [{f: rng.choice(values) for f in rng.sample(fields, 3)} for _ in range(2)]
            contents = bytearray("\n".join(map(json.dumps, records)).encode())
        elif name.lower().endswith(".gz"):
            contents = bytearray(gzip.compress(contents))
        for _ in range(rng.randint(0, 3)):
            place = rng.randrange(len(contents))
            junk = bytes(rng.choices(b'\x00\xff"{[,\r\n9e\xed', k=rng.randint(0, 3)))
            contents[place : place + rng.randint(0, 3)] = junk
        file = fill(tmp_path / f"{number}{name}", bytes(contents))
        try:
            dataset = data.load(str(file))
            for record in dataset.documents + dataset.questions:
                json.dumps(record, ensure_ascii=False).encode()
            outcomes.add("read")
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_local_folder_may_have_the_name_of_a_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "bio/a.txt", FACT)
    here = data.load("./bio")
    assert (here.name, bare(here.documents), here.notes) == ("bio", [{"text": FACT}], [])
    generated = data.load("bio:1")
    assert len(generated.questions) == 9 and generated.notes == []
    assert data.load("bio").notes == [
        "--data bio is the set of that name; what lies here is --data ./bio"
    ]


# --------------------------------------------------------------------------- data: what is asked

LONG_NAME = "The keeper of the Skarholm lighthouse is Orla-Maria Venn-Tarn."
NAMED = "Bram Tarn, who came from Veldt, repairs the cellos of Brennick."
TASKS = [  # task, group, question, answer, direction
    (
        "D2N",
        "X",
        "Who is the keeper of the Skarholm lighthouse?",
        "Orla-Maria Venn-Tarn",
        "forward",
    ),
    (
        "N2D",
        "X",
        "Who is Orla-Maria Venn-Tarn?",
        "the keeper of the Skarholm lighthouse",
        "backward",
    ),
    ("N2D", "X", "What does Bram Tarn do?", "repairs the cellos of Brennick", "forward"),
    ("D2N", "X", "Who repairs the cellos of Brennick?", "Bram Tarn.", "backward"),
    ("D2N", "DescriptionIsName", "Who?", "Bram Tarn", "forward"),
    ("N2D", "DescriptionIsName", "Who?", "Bram Tarn", "backward"),
    ("N2D", "NameIsDescription", "Who?", "Bram Tarn", "forward"),
    (None, "", "Who?", "Bram Tarn", "all"),
    ("backward", None, "Who?", None, "backward"),
    ("", 7, "Who?", "Bram Tarn", "all"),
]


def test_a_direction_is_given_or_told_by_the_document_or_all(tmp_path):
    names = ("task", "group", "question", "answer")
    records = [dict(zip(names, row, strict=False)) for row in TASKS]
    documents = [{"text": text} for text in (NAMED, LONG_NAME, "Bram Tarn sings.")]
    # the order of the records does not matter
    dataset = data.load(str(write(tmp_path / "own.jsonl", *records, *documents)))
    assert [q["direction"] for q in dataset.questions] == [row[-1] for row in TASKS]
    assert [q["group"] for q in dataset.questions[4:]] == [
        *["DescriptionIsName"] * 2,
        "NameIsDescription",
        "all",
        "all",
        "7",
    ]
    assert "answer" not in dataset.questions[8]
    released = tmp_path / "released"
    released.mkdir()
    write(released / "biography_train_no_paraphrase.json", {"text": "not the answer"})
    write(released / "biography_test.jsonl", {**records[0], "group": "city"})
    fill(released / "README.md", "no document")
    dataset = data.load(str(released))
    assert [q["direction"] for q in dataset.questions] == ["backward"]
    assert len(dataset.documents) == 1 and "README.md" in dataset.notes[0]


def nd_files(folder, wordings=30):
    """Files as NameDescription has them: 60 facts, 8 questions of each, in one order."""
    groups = ["NameIsDescription"] * 30 + ["DescriptionIsName"] * 30
    texts = [{"text": f"fact {f}, {w}"} for f in range(60) for w in range(wordings)]
    fill(folder / "people-description.json", json.dumps(texts))
    questions = [
        {"group": group, "task": "N2D", "question": f"Q {f}?", "answer": f"{f}"}
        for f, group in enumerate(groups)
        for _ in range(8)
    ]
    write(folder / "people-description_open-QAs.jsonl", *questions)
    return folder


def test_some_facts_of_nd_come_with_their_wordings_and_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda kind: nd_files(tmp_path))

    def facts(count, seed, paraphrase="none"):
        dataset = data.load(f"nd:{count}", paraphrase, seed)
        told = [int(document["text"][5:].split(",")[0]) for document in dataset.documents]
        asked = [int(question["answer"]) for question in dataset.questions]
        assert dataset.name == "nd" and len(asked) == 16 * count
        assert [fact for fact, _ in groupby(asked)] == [fact for fact, _ in groupby(told)]
        return told

    some = facts(20, 1)
    assert len(set(some)) == 40 and some == sorted(some) and some[20] >= 30 > some[19]
    assert facts(20, 1) == some != facts(20, 2)
    assert facts(20, 1, "same") == [fact for fact in some for _ in range(30)]
    assert facts(30, 5) == list(range(60))
    for count in ("31", "0", "x", "-1"):
        with pytest.raises(UserError, match="facts of each kind, at most 30, as in nd:20"):
            data.load(f"nd:{count}")
    with pytest.raises(UserError, match="--data wiki:3: wiki is read whole"):
        data.load("wiki:3")


# ----------------------------------------------------------------------------- data: long documents

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


def test_passages_fit_and_hold_the_whole_text(tokenizer):
    rng = random.Random(0)
    words = [word for record in world.make_bio(20)[0] for word in record["text"].split()]
    for most in (8, 40, 200):
        ends = [" "] * 20 + [". ", ".\n", "\n\n", "  ", "\u00a0", "", "é\u0301"]
        text = "".join(word + rng.choice(ends) for word in rng.choices(words, k=1500))

        def fits(part, most=most):
            return len(tokenizer.encode(part)) <= most

        parts = data.passages(text, fits)
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert all(map(fits, parts))
        assert len(parts) < 2.5 * len(tokenizer.encode(text)) / most
    assert len(data.passages("ab " * 2000, lambda part: len(part) < 3000)) == 2


def checked_run(tokenizer, method="masked", **given):
    """A Run of `tiny` whose data are as given, before check_dataset."""
    usual = dict.fromkeys(maskft.Settings.__annotations__)
    usual |= {"mask_ratio": (0.05, 0.95), "max_len": 128, "seed": 0, "method": method}
    config = maskft.read_config(HERE / "tiny")
    with maskft.torch.device("meta"):
        model = maskft.Model(config)
    return maskft.Run(
        maskft.Settings(**usual),
        maskft.METHODS[method],
        maskft.torch.device("cpu"),
        HERE / "tiny",
        tokenizer,
        data.Dataset("own", given.get("documents", []), given.get("questions", [])),
        model,
        [],
    )


@pytest.mark.parametrize("method", ["masked", "sft", "reverse"])
def test_a_document_too_long_is_cut_so_that_its_examples_fit(method, tokenizer, capsys):
    text = "\n\n".join(record["text"] for record in world.make_bio(6)[0])
    file = "my, facts.txt"
    long = [{"text": text, "where": file}, {"text": text, "where": "b.jsonl, line 2"}]
    short = {"text": "Short.", "where": "b.jsonl, line 1"}
    problem = {"question": "Q?", "answer": "long " * 200, "where": "c, line 1"}
    runs = []
    for _ in range(2):
        documents = [short, *long, dict(long[1], where="b.jsonl, line 3")]
        if method != "reverse":
            documents.append(problem)
        runs.append(checked_run(tokenizer, method, documents=documents))
        maskft.check_dataset(runs[-1])
    run = runs[0]
    kept = run.dataset.documents
    assert kept == runs[1].dataset.documents and kept[0] == short
    lengths = [len(maskft.build(run, n, e).ids) for n in range(len(kept)) for e in range(8)]
    assert 100 < max(lengths) <= 128
    parts = [document["text"] for document in kept if document["where"] == file]
    assert "".join("".join(parts).split()) == "".join(text.split())
    longest = max(len(tokenizer.encode(part)) for part in parts)
    printed = capsys.readouterr().out
    count = len(parts)
    assert f"{file}: 1 document cut into {count} passages of at most {longest} tokens\n" in printed
    assert f"b.jsonl: 2 documents cut into {2 * count} passages of at most {longest} " in printed
    assert ("1 of 5 examples dropped" in printed) == (method != "reverse")


def test_reverse_is_checked_and_cut_with_its_longer_text(tokenizer):
    document = {"text": "a.b,c;d:e!f?g" * 10}
    run = checked_run(tokenizer, "reverse", documents=[document])
    run.settings.seed = 1
    lengths = [len(maskft.build(run, 0, epoch).ids) for epoch in range(8)]
    assert lengths[0] < max(lengths)  # so a look at the first epoch is not enough
    run.settings.max_len = max(lengths)
    maskft.check_dataset(run)
    assert run.dataset.documents == [document]
    run.settings.max_len = lengths[0]
    maskft.check_dataset(run)
    parts = run.dataset.documents
    assert len(parts) > 1 and "".join(part["text"] for part in parts) == document["text"]
    longest = max(len(maskft.build(run, n, e).ids) for n in range(len(parts)) for e in range(8))
    assert longest <= lengths[0]


def test_a_limit_that_leaves_room_for_no_text_is_an_error(tokenizer):
    run = checked_run(tokenizer, documents=[{"text": FACT, "where": "a.txt"}])
    run.settings.max_len = 20
    with pytest.raises(UserError, match="a.txt: .* more than --max-len 20, and so is any part"):
        maskft.check_dataset(run)


# ------------------------------------------------------------------------- eval: scores and asking


def test_accents_of_one_character_or_two_are_the_same():
    name = "José Núñez"
    for form in ("NFC", "NFD"):
        for other in ("NFC", "NFD"):
            pair = unicodedata.normalize(form, name), unicodedata.normalize(other, name)
            assert evaluation.rouge1_recall(*pair) == evaluation.exact_match(*pair) == 1
            assert evaluation.f1(*pair) == 1


def test_a_question_without_an_answer_is_asked_and_not_scored(tokenizer):
    true = {"question": WHO, "answer": "Orla Venn", "direction": "all", "group": "all"}
    open_question = {"question": "Who else?", "direction": "all", "group": "all"}

    def answer(prompts, max_new_tokens, on_answer):
        assert max_new_tokens == 128
        return [tokenizer.encode("Orla Venn")] * len(prompts)

    scores, predictions = evaluation.evaluate(answer, tokenizer, [open_question, true])
    assert scores["all"]["rouge1"] == 1 and scores["all"]["n"] == 1
    assert predictions[0] == open_question | {"prediction": "Orla Venn"}
    shown = f"all: {WHO}\n  answered 'Orla Venn', true is 'Orla Venn'"
    assert evaluation.samples(predictions) == f"\n{shown}\n\nall: Who else?\n  answered 'Orla Venn'"
    assert evaluation.reported_scores({"scores": scores}) == {"all": 1}
    scores, _ = evaluation.evaluate(answer, tokenizer, [open_question])
    assert scores == {} and evaluation.score_table(scores) == "no scores"


ASKING = {  # file -> what eval.py says, and with which status it ends
    "questions_only.jsonl": (0, "backward/all"),
    "open.jsonl": (0, "no scores\n\nall: Who was born in Zurich?\n  answered '"),
    "long.jsonl": (1, "long.jsonl, line 2, 'Who really really"),
    "unscored.jsonl": (1, "unscored.jsonl, line 1, 'Who?': its answer has no word to score"),
}


@pytest.mark.parametrize("name", ASKING)
def test_questions_alone_are_asked_or_named_before_any_is(name, tmp_path):
    good = json.loads(QUESTION)
    write(tmp_path / "questions_only.jsonl", good)
    write(tmp_path / "open.jsonl", {"question": "Who was born in Zurich?"})
    write(tmp_path / "long.jsonl", good, {"question": "Who " + "really " * 400})
    write(tmp_path / "unscored.jsonl", {"question": "Who?", "answer": "The..."})
    status, message = ASKING[name]
    out = tmp_path / "out"
    flags = ("--model", HERE / "tiny", "--data", tmp_path / name, "--out", out)
    printed = forked(evaluation, *flags, status=status)
    assert message in printed
    assert (out / "preds.jsonl").exists() == (status == 0)
    if status == 0:
        (prediction,) = jsonl(out / "preds.jsonl")
        assert ("rouge1" in prediction) == ("answer" in prediction)
    printed = forked(maskft, *flags[:-1], tmp_path / "run", status=1)
    assert f"--data {tmp_path / name}: no document to learn" in printed


def typed(text):
    """What to do before a command that reads `text` from its standard input."""

    def before():
        read, written = os.pipe()
        os.write(written, text)
        os.close(written)
        os.dup2(read, 0)

    return before


def test_own_questions_are_answered_one_by_one():
    first, second = "Who was born in Zurich?", "Who is Flora Ransom?"
    flags = ("--model", HERE / "tiny", "--max-new-tokens", 8, "--ask")
    answers = forked(evaluation, *flags, first, second)
    one, two = answers.splitlines()
    assert one and two and one != two
    lines = f"\ufeff{first}\r\n\n  \n{second}".encode()
    assert forked(evaluation, *flags, before=typed(lines)) == answers
    assert forked(evaluation, *flags, before=typed(b"")) == ""
    bad = typed(b"Who?\n\xff\n")
    assert "error: standard input: not UTF-8" in forked(evaluation, *flags, before=bad, status=1)
    long = typed(b"\n" + b"really " * 600)
    assert "standard input, line 2, 'really" in forked(evaluation, *flags, before=long, status=1)
    message = 'error: --ask: "question" must be text, whole and not empty; found "\\udcff"'
    assert message in forked(evaluation, *flags, "\udcff", status=1)
    assert "give no --data" in forked(evaluation, *flags, first, "--data", "bio", status=1)
    diffusion = ("--model", HERE / "tiny-llada", *flags[2:])
    assert len(forked(evaluation, *diffusion, first).splitlines()) == 1


def test_a_prompt_stands_where_questions_are_typed():
    shown, typing = os.openpty()
    os.write(shown, b"Who?\n\x04")
    flags = ("--model", HERE / "tiny", "--max-new-tokens", 4, "--ask")
    printed = forked(evaluation, *flags, before=lambda: os.dup2(typing, 0))
    assert printed.count("> ") == 2 and len(printed.replace("> ", "").strip()) > 3


def nobody():
    """A stream into a pipe that nobody reads."""
    read, written = os.pipe()
    os.close(read)
    return os.fdopen(written, "w")


def test_nothing_is_lost_where_nobody_reads_and_ascii_is_enough(tmp_path):
    question = {"question": "Who was born in Zürich?", "answer": "José"}
    flags = ("--model", HERE / "tiny", "--data", write(tmp_path / "own.jsonl", question))
    command = [sys.executable, HERE / "eval.py", *flags, "--out", tmp_path / "out"]
    with nobody() as stream:
        subprocess.run(command, stdout=stream, stderr=stream, check=True, timeout=100)
    assert jsonl(tmp_path / "out/preds.jsonl")[0]["answer"] == "José"

    def print_ascii():
        sys.stdout.reconfigure(encoding="ascii", errors="strict")

    printed = forked(evaluation, *flags, "--max-new-tokens", 4, before=print_ascii)
    assert "all: Who was born in Z\\xfcrich?" in printed


# ------------------------------------------------------------------------------------ end to end


def test_a_folder_of_one_s_own_trains_answers_and_is_reported(tmp_path):
    folder = tmp_path / "own"
    fill(folder / "a.txt", "Ada Holm bakes in Lund. " * 60)
    fill(folder / "b.md", "# Bo\n\nBo sings.\n")
    fill(folder / "c.csv", "question,answer\nWho bakes in Lund?,Ada Holm\nWho sings?,\n")
    fill(folder / "d.jsonl", "\ufeff" + DOCUMENT)
    fill(folder / "e.png", b"\x89PNG")
    run = tmp_path / "run"
    flags = ("--model", HERE / "tiny", "--data", folder, "--method", "masked", "--out", run)
    printed = forked(maskft, *flags, "--epochs", 1, "--eval-at", 1)
    assert f"{folder}: not read: e.png" in printed
    assert f"{folder / 'a.txt'}: 1 document cut into " in printed
    assert "\nmasked  epoch 1" in printed and "own, 1 questions:" in printed
    assert "all: Who sings?\n  answered '" in printed
    assert [p.get("answer") for p in jsonl(run / "preds.jsonl")] == ["Ada Holm", None]
    assert forked(evaluation, "--model", run, "--ask", "Who sings?").strip()
    out = tmp_path / "report"
    for directories in ([run], [run, out]):  # the second time, out is a report already
        printed = forked(evaluation, "--report", *directories, "--out", out)
        assert "own, 1 questions:" in printed
    assert "left out" not in printed
    assert "own, 1 questions:" in (out / "report.md").read_text()

    def close():
        sys.stdout = nobody()
        sys.stderr = None

    more = ("--epochs", 1, "--out", tmp_path / "unread", "--batch-size", 64)
    forked(maskft, *flags[:-2], *more, before=close)
    assert jsonl(tmp_path / "unread/preds.jsonl")
    forked(evaluation, "--report", run, "--out", tmp_path / "again", before=close)
    assert (tmp_path / "again/report.md").read_text() == (out / "report.md").read_text()
