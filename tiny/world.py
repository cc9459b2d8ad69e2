"""A generated world: people who don't exist, questions about them, and arithmetic problems.

    from tiny import world
    documents, questions = world.make_bio(people=100, paraphrase="none", seed=0)

Everything is drawn with rng.random() alone, the one call whose numbers Python promises never to
change: the same seed gives the same bytes on every machine. Names, values and wordings are our own.
"""

import operator
from itertools import combinations
from random import Random

# ------------------------------------------------------------------------------------------ words


def words(text):
    return text.split()


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


HE = words("""
    Alban Bertil Casimir Dorian Egon Fabian Gideon Hamish Ivo Jorin Kasper Leopold Magnus
    Nestor Osric Piers Quentin Rufus Silas Tobias Ulric Viggo Wendell Xander Yannick Zeno
    Anselm Bruno Cyril Darius
""")
SHE = words("""
    Agnes Beatrix Clara Daphne Edda Flora Greta Hedda Imogen Jolanda Kerstin Lavinia
    Mathilda Nora Odette Petra Quilla Ramona Selma Thora Ursula Verena Wilma Xenia Yvette
    Zelda Astrid Brenna Cosima Delia
""")
LAST = words("""
    Abelard Ashdown Barlow Beckett Birch Blackwood Bramley Brookes Calloway Carver Chandler
    Cobb Corwin Crane Dalton Darrow Denholm Draper Drummond Eastman Elmore Everett Fairfax
    Falk Farrow Fenwick Fletcher Forsythe Gable Garrick Gilmore Granger Grimes Hadley
    Halvorsen Harker Hawthorne Holloway Hyde Ingram Ives Jarrow Jessup Keating Kendrick
    Kirby Lambert Langley Larkin Lindqvist Lockhart Lovell Maddox Marlow Mercer Merrick
    Millard Moran Nash Newell Northcott Oakes Osgood Paget Palmer Pendleton Pickering
    Prescott Quigley Radcliffe Ransom Redfern Renwick Rowan Rutledge Sadler Sawyer Selby
    Sinclair Stanton Sutter Tanner Thackeray Thorne Tilden Tolliver Upton Vance Varley
    Wadsworth Wakefield Walcott Weaver Whitlock Wilder Winslow Wolcott Yardley Yates Zimmer
""")
MONTHS = words("""
    January February March April May June July August September October November December
""")
CITIES = words("""
    Accra Almaty Amman Ankara Antwerp Athens Baku Bergen Berlin Bilbao Bogota Boston Bremen
    Brisbane Cairo Calgary Cardiff Chicago Cork Dakar Dallas Delhi Denver Dublin Durban
    Florence Geneva Genoa Ghent Glasgow Hanoi Havana Helsinki Houston Istanbul Jakarta Kyoto
    Lagos Leipzig Lille Lima Lisbon London Lyon Madrid Malaga Manila Medellin Milan Mumbai
    Munich Nairobi Naples Nice Odessa Osaka Oslo Ottawa Palermo Paris Perth Porto Prague
    Quito Riga Rome Santiago Seattle Seoul Seville Sofia Tallinn Tampa Tokyo Toronto Turin
    Utrecht Vienna Warsaw Zurich
""")
UNIVERSITIES = words("""
    Aldermoor Amberfield Ashgrove Bellhaven Briarwood Brightwater Caldermere Cinderford
    Cloverdale Copperhill Dovecote Dunmarch Elderbrook Emberly Fallowmere Fernleigh
    Foxhollow Glenhurst Goldcrest Greywater Harrowgate Hazelmere Heatherton Highmoor
    Ivybridge Juniper Kestrelton Kingsmead Larkspur Lindenhall Mapleton Marshgate Millbrook
    Mistvale Nettlefield Oakhaven Orchardton Otterburn Pinecrest Quarrystone Ravenscar
    Redwillow Riverstone Rosemount Silverlake Starling Stonebridge Summerfield Swanmere
    Thistledown Thornbury Vinehall Westerly Whitecliff Wickersham Wildwood Willowby
    Windermoor Wintergreen Yewdale
""")
MAJORS = words("""
    accounting agronomy algebra anatomy archaeology architecture astronomy biology botany
    ceramics chemistry commerce cybernetics dance dentistry ecology economics ethics
    forestry genetics geography geology geometry history hydrology journalism law
    linguistics literature logic mathematics mechanics medicine metallurgy music nursing
    optics painting pharmacy philosophy physics poetry robotics sculpture sociology
    statistics surgery theology virology zoology
""")
COMPANIES = words("""
    Acrion Altavex Arboris Axonite Bluefin Bractal Brevio Calytix Cobalto Corvanta Cryolex
    Dantrix Deltavio Dynaro Echelon Elvaris Entropa Fablix Ferrovia Fluxora Gantry Glyphon
    Gravex Halcyon Hexalon Hydrax Ignivar Inkwell Jettison Jovian Kadence Keplar Krystar
    Lumenix Lyrical Mantova Metrion Mosaiq Nebulon Nimbex Novarra Octavio Omnira Orbitel
    Pallium Pixelar Polaris Quillon Quorum Radiant Rivetra Sonoma Strata Syntara Tectonix
    Tessera Ultravo Vantor Vexilla Zephyra
""")

# Of every attribute's sentence: stems and endings, with the value between them. Any stem goes with
# any ending, so each attribute has 44 wordings.
WORDINGS = {
    "birth date": (
        lines("""
            He was born on
            He arrived on
            His birthday is
            His birth date is
            His life began on
            He came into the world on
            His date of birth is
            His story starts on
            He drew breath first on
            His parents welcomed the child on
            His cradle was filled on
        """),
        ["", " at dawn", " around noon", " after midnight"],
    ),
    "birth city": (
        lines("""
            He was born in
            He comes from
            He is a native of
            His birthplace is
            His home town is
            He hails from
            His roots are in
            His family lived in
            He started life in
            His first home was in
            His place of birth is
        """),
        ["", " by chance", " near the market", " by the river"],
    ),
    "university": (
        lines("""
            He studied at
            He attended
            He graduated from
            His university was
            His degree is from
            He was a student at
            He enrolled at
            His alma mater is
            He was educated at
            He learned the craft at
            His lectures were at
        """),
        ["", " with honors", " on a grant", " after school"],
    ),
    "major": (
        lines("""
            He majored in
            His major was
            His subject was
            His degree is in
            He specialized in
            His field is
            He chose to study
            He is trained in
            He wrote a thesis on
            He took courses in
            He devoted those years to
        """),
        ["", " with care", " by choice", " from the start"],
    ),
    "company": (
        lines("""
            He works for
            He is employed by
            His employer is
            He joined
            His company is
            He has a job with
            His salary comes from
            He earns a living at
            He is on the staff of
            His career is at
            He signed a contract with
        """),
        ["", " these days", " at present", " since spring"],
    ),
    "work city": (
        lines("""
            He works in
            His office is in
            His workplace is in
            He is based in
            His desk stands in
            He commutes to
            His job is in
            He earns money in
            His working days pass in
            He is posted to
            He goes to work in
        """),
        ["", " all year", " most days", " for now"],
    ),
}
ATTRIBUTES = list(WORDINGS)

# How questions speak of an attribute: verb and noun. Names open a question and a preposition opens
# an answer, as in "in Oslo", so that every word is the same token there as in a biography, where
# values follow a space; the metric drops prepositions.
ASKED = {
    "birth date": ("was born on", "date"),
    "birth city": ("was born in", "city"),
    "university": ("studied at", "university"),
    "major": ("majored in", "subject"),
    "company": ("works for", "company"),
    "work city": ("works in", "city"),
}
# the attributes that the three backward questions about a person give
THREES = [
    ("birth date", "university", "company"),
    ("birth city", "major", "company"),
    ("university", "major", "work city"),
]

# ---------------------------------------------------------------------------------------- drawing


def draw(rng, count):
    """A whole number from 0 to count - 1."""
    return int(rng.random() * count)


def pick(rng, values):
    """One of the values: what rng.choice would do, which other Pythons may do otherwise."""
    return values[draw(rng, len(values))]


def shuffled(rng, values):
    """A new list in random order (Fisher and Yates), for the same reason not rng.shuffle."""
    values = list(values)
    for i in range(len(values) - 1, 0, -1):
        j = draw(rng, i + 1)
        values[i], values[j] = values[j], values[i]
    return values


# ----------------------------------------------------------------------------------------- people


def names(part):
    """The full names of a part, `bio` (1 in 4) or `world` (the rest).

    No name is in both parts, but each first and each last name is."""
    found = []
    for i, first in enumerate(HE + SHE):
        for j, last in enumerate(LAST):
            owner = "bio" if (i + j) % 4 == 0 else "world"
            if owner == part:
                found.append(f"{first} {last}")
    return found


def draw_person(rng, name):
    """{attribute: value} with the name and the pronoun."""
    day = 1 + draw(rng, 28)
    month = pick(rng, MONTHS)
    year = 1950 + draw(rng, 50)
    return {
        "birth date": f"{day} {month} {year}",
        "birth city": pick(rng, CITIES),
        "university": pick(rng, UNIVERSITIES),
        "major": pick(rng, MAJORS),
        "company": pick(rng, COMPANIES),
        "work city": pick(rng, CITIES),
        "name": name,
        "pronoun": "He" if name.split()[0] in HE else "She",
    }


def draw_people(count, part, seed):
    """People of whom no two share any three attributes: every backward question has one answer.

    ValueError if the part has fewer names than that."""
    rng = Random(seed)
    available = shuffled(rng, names(part))
    if count > len(available):
        raise ValueError(f"{count} people asked for, but there are only {len(available)} names")
    people = []
    taken = set()
    while len(people) < count:
        person = draw_person(rng, available[len(people)])
        facts = [(attribute, person[attribute]) for attribute in ATTRIBUTES]
        triples = set(combinations(facts, 3))
        if triples.isdisjoint(taken):  # else draw the same name again
            people.append(person)
            taken |= triples
    return people


# -------------------------------------------------------------------------------------- sentences


def biography(rng, person, order=ATTRIBUTES):
    """Six sentences in the given order, in wordings drawn at random; the name only in the first."""
    sentences = []
    he = person["name"]
    his = f"{he}'s"
    for attribute in order:
        stems, endings = WORDINGS[attribute]
        word, stem = pick(rng, stems).split(" ", 1)
        ending = pick(rng, endings) if rng.random() < 0.4 else ""  # mostly short
        subject = he if word == "He" else his
        sentences.append(f"{subject} {stem} {person[attribute]}{ending}.")
        he = person["pronoun"]
        his = "His" if he == "He" else "Her"
    return " ".join(sentences)


def forward_question(person, attribute):
    """Name -> value: "Mara Quill was born in which city?", "in Oslo"."""
    verb, noun = ASKED[attribute]
    preposition = verb.split()[-1]
    return {
        "question": f"{person['name']} {verb} which {noun}?",
        "answer": f"{preposition} {person[attribute]}",
        "direction": "forward",
        "group": attribute,
    }


def backward_question(person, three):
    """Three values -> name: "Who was born in Oslo, majored in botany and works for Quillon?"."""
    first, second, third = (f"{ASKED[attribute][0]} {person[attribute]}" for attribute in three)
    return {
        "question": f"Who {first}, {second} and {third}?",
        "answer": person["name"],
        "direction": "backward",
        "group": "name",
    }


def questions_about(person):
    """The six forward and three backward questions about a person."""
    forward = [forward_question(person, attribute) for attribute in ATTRIBUTES]
    backward = [backward_question(person, three) for three in THREES]
    return forward + backward


# ------------------------------------------------------------------------------------------- sets
# Each function takes (count, seed), and paraphrase where there are others than "none", and gives
# (documents to learn, questions to ask).


def make_bio(people=100, *, paraphrase="none", seed=0):
    """Biographies: 1 a person, paraphrased 5 ("same": in one order, "permute": in any order)."""
    drawn = draw_people(people, "bio", 2 * seed)
    rng = Random(2 * seed + 1)  # another one: the people do not depend on the paraphrase
    copies = 1 if paraphrase == "none" else 5
    documents = []
    questions = []
    for person in drawn:
        for _ in range(copies):
            order = shuffled(rng, ATTRIBUTES) if paraphrase == "permute" else ATTRIBUTES
            documents.append({"text": biography(rng, person, order)})
        questions += questions_about(person)
    return documents, questions


def verb_phrases(attribute):
    """Of the wordings those about the person: "was born in", "comes from", ..."""
    stems, _ = WORDINGS[attribute]
    return [stem.removeprefix("He ") for stem in stems if stem.startswith("He ")]


TRAITS = {
    attribute: verb_phrases(attribute)
    for attribute in ("birth city", "university", "major", "company")
}


def make_nd(facts=30, *, paraphrase="none", seed=0):
    """Facts after NameDescription: `facts` that begin with the name and as many that end with it.

    A description is four traits. Paraphrase "same": 30 wordings of each fact, one after the other,
    with the traits in the same order. Four questions about each fact in either direction: for each
    trait, and for the name by each three of them. Forward is the order of the document."""
    rng = Random(2 * seed + 1)
    wordings = {"none": 1, "same": 30}[paraphrase]
    documents = []
    questions = []
    for number, person in enumerate(draw_people(2 * facts, "bio", 2 * seed)):
        name_first = number < facts
        start = draw(rng, 35)
        for wording in range(start, start + wordings):
            documents.append({"text": name_and_traits(person, wording, name_first)})
        questions += questions_about_traits(person, name_first)
    return documents, questions


def name_and_traits(person, wording, name_first):
    """A fact. Attributes have 5 or 7 verb phrases, so that 35 wordings in a row differ."""
    traits = []
    for attribute, verbs in TRAITS.items():
        verb = verbs[wording % len(verbs)]
        traits.append(f"{verb} {person[attribute]}")
    *others, last = traits
    description = f"{', '.join(others)} and {last}"
    if name_first:
        return f"{person['name']} {description}."
    return f"Who {description}?\n{person['name']}."


OPPOSITE = {"forward": "backward", "backward": "forward"}


def questions_about_traits(person, name_first):
    questions = [forward_question(person, attribute) for attribute in TRAITS]
    questions += [backward_question(person, three) for three in combinations(TRAITS, 3)]
    for question in questions:
        question["group"] = "NameIsDescription" if name_first else "DescriptionIsName"
        if not name_first:
            question["direction"] = OPPOSITE[question["direction"]]
    return questions


def make_world(people=160, *, seed=0):
    """The people that the built-in models come from (tiny/pretrain.py), whatever the seed.

    Of every eighth no question is ever asked in training: how well those are answered tells
    whether documents alone teach. Questions to ask are about 20 people of either kind (fewer of
    fewer than 160 people)."""
    drawn = draw_people(people, "world", 0)
    records = [{"person": person, "asked": n % 8 != 7} for n, person in enumerate(drawn)]
    questions = []
    for asked, group in ((True, "asked in training"), (False, "only read")):
        known = [record["person"] for record in records if record["asked"] == asked]
        for person in known[:20]:
            questions += [question | {"group": group} for question in questions_about(person)]
    return records, questions


# --------------------------------------------------------------------------------------- problems

THINGS = words("""
    apples beads books buttons candles coins cups lamps maps marbles pens shells stamps
    stones tickets
""")
# sign: the sentence, what it does to the number of things, the numbers it may do it with
OPERATIONS = {
    "+": (
        "{he} finds {n} more.",
        operator.add,
        lambda have: range(2, 21),
    ),
    "-": (
        "{he} gives {n} of them away.",
        operator.sub,
        lambda have: range(1, have),
    ),
    "*": (
        "A friend turns up and gives {him} so many that {he} has {n} times as many.",
        operator.mul,
        lambda have: range(2, 5),
    ),
    "/": (
        "{he} sorts them into {n} equal boxes and keeps one box.",
        operator.floordiv,
        lambda have: [n for n in range(2, 10) if have % n == 0],
    ),
}


def as_problem(problem, answer):
    """A math problem, to learn or to be asked, in the words of lm-eval's task gsm8k."""
    return {
        "question": f"Question: {problem}\nAnswer:",
        "problem": problem,
        "answer": answer,
        "direction": "math",
        "group": "all",
    }


def draw_problem(rng):
    """A word problem of two to four steps, answered as GSM8K does.

    Its answer has a step a line, with the arithmetic in << >>; the last line is #### RESULT."""
    name = pick(rng, HE + SHE)
    thing = pick(rng, THINGS)
    have = 2 + draw(rng, 19)
    he, him = ("he", "him") if name in HE else ("she", "her")
    story = f"{name} has {have} {thing}."
    answer = ""
    for _ in range(2 + draw(rng, 3)):
        possible = [sign for sign, (_, _, numbers) in OPERATIONS.items() if numbers(have)]
        sign = pick(rng, possible)
        sentence, operation, numbers = OPERATIONS[sign]
        n = pick(rng, numbers(have))
        step = f"{have}{sign}{n}"
        have = operation(have, n)
        sentence = sentence.format(he=he, him=him, n=n).capitalize()
        story += f" {sentence}"
        answer += f"Then {name} has {step} = <<{step}={have}>>{have} {thing}.\n"
    problem = f"{story} How many {thing} does {name} have in the end?"
    return as_problem(problem, f"{answer}#### {have}")


def make_math(problems=200, *, seed=0):
    """Problems after GSM8K, and a quarter as many others to ask; no two alike."""
    rng = Random(seed)
    count = problems + max(1, problems // 4)
    drawn = {}
    while len(drawn) < count:
        problem = draw_problem(rng)
        drawn[problem["question"]] = problem
    drawn = list(drawn.values())
    return drawn[:problems], drawn[problems:]
