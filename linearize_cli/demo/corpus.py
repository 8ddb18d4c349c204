"""Small documents in plain English whose later words can only be known from earlier ones.

A document tells facts about a few people ("The code of Tom was 47."), then goes on, and repeats some,
often in other words ("Asked for a number, Tom said 47."). The repeated word is drawn from a pool of 20 to
40, and several people have a fact of the same kind, so that only the person and the kind together give it away:
the associative recall that linear attention is known to be weak at (Arora et al., "Zoology", arXiv 2312.04927).
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

HELDOUT_SEED = 1  # of heldout.jsonl; train on any other


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split("|")]


NAMES = _words("""
    Adam Anna Ben Bella Carl Clara Dora David Emma Eric Fred Fiona Greta Henry Ivan Iris Jack Jane Karl
    Laura Leo Mia Max Nora Nick Olga Oscar Paula Peter Rosa Ralph Sara Simon Tina Tom Vera
""")
NUMBERS = _words("""
    12 14 17 19 21 23 26 28 29 31 34 36 37 38 41 43 45 47 48 52 53 56 58 59 61 63 64 67 69 72
""")
TOWNS = _words("""
    Athens Berlin Boston Cairo Dublin Geneva Havana Kyoto Lima Lisbon London Madrid Milan Oslo Paris Prague
    Quebec Riga Rome Seoul Sofia Tokyo Turin Vienna Warsaw Zurich
""")
ANIMALS = _words("""
    bear camel cat cow crow dog donkey duck fox frog goat goose hen horse lizard mouse monkey parrot pig
    pony rabbit sheep snake spider turtle wolf
""")
JOBS = _words("""
    baker barber builder butcher carpenter clerk cook dancer doctor driver farmer fisher guard hunter judge
    lawyer miner nurse painter pilot sailor singer soldier tailor teacher writer
""")
FOODS = _words("""
    apples beans berries bread butter cake carrots cheese cherries corn eggs figs grapes honey lemons melons
    mushrooms noodles nuts olives onions pears plums potatoes rice soup
""")
COLOURS = _words("""
    black blue bronze brown copper cream golden green grey orange pink purple red rusty scarlet silver
    striped violet white yellow
""")
OBJECTS = _words("""
    ball basket bell blanket book bottle bowl box brush candle chair clock comb cup drum fan flute hammer
    hat helmet kettle key knife ladder lamp coin mirror needle pen pillow pipe plate ring rope saw spoon
""")
SURNAMES = _words("""
    Archer Bishop Cole Drake Ellis Forster Grant Hayes Irving Jensen Kent Lowe Marsh Nash Owen Porter Quinn Reed
    Stone Turner Usher Vance Webb York Young Barnes Curtis Doyle Gibson Howard
""")
SPOTS = _words("""
    arch barn bench bridge bush cabin cart cellar church column door fence fountain gate hedge hill oven
    shed shelf stable stairs statue stove table tower tree wagon wall well window
""")


@dataclass(frozen=True)
class Relation:
    """A kind of fact: the pool of its answers, the sentences that tell it, and more that only repeat it."""

    answers: list[str]
    tells: list[str]
    repeats: list[str]


SURNAME = Relation(
    SURNAMES,
    [
        "The full name was {who} {answer}.",
        "Their leader was {who} {answer}.",
        "At the door stood {who} {answer}.",
    ],
    [
        "Somebody was calling {who} {answer}.",
        "They all liked {who} {answer}.",
        "They waved at {who} {answer}.",
    ],
)
ABOUT_PEOPLE = [
    Relation(
        NUMBERS,
        [
            "The code of {who} was {answer}.",
            "{who} chose the number {answer}.",
            "{who} lived at number {answer}.",
        ],
        [
            "Asked for a number, {who} said {answer}.",
            "The number of {who} was still {answer}.",
            "Next to the name of {who} stood the number {answer}.",
        ],
    ),
    Relation(
        TOWNS,
        ["{who} came from {answer}.", "{who} grew up in {answer}.", "The family of {who} was from {answer}."],
        [
            "The next train took {who} back to {answer}.",
            "{who} dreamed of the streets of {answer}.",
            "A letter for {who} came from {answer}.",
        ],
    ),
    Relation(
        ANIMALS,
        [
            "{who} kept a tame {answer}.",
            "{who} had a little {answer}.",
            "The only pet of {who} was a {answer}.",
        ],
        [
            "In the evening {who} fed the {answer}.",
            "{who} went to look for the {answer}.",
            "Nobody but {who} could touch the {answer}.",
        ],
    ),
    Relation(
        JOBS,
        ["{who} worked as a {answer}.", "{who} was a good {answer}.", "For a living {who} was a {answer}."],
        [
            "After all, {who} was a {answer}.",
            "They thanked {who} as the best {answer}.",
            "Nobody knew that {who} was the {answer}.",
        ],
    ),
    Relation(
        FOODS,
        [
            "{who} loved {answer}.",
            "{who} was always eating {answer}.",
            "The favourite food of {who} was {answer}.",
        ],
        [
            "For dinner {who} asked for {answer}.",
            "They gave {who} some more {answer}.",
            "At the market {who} bought {answer}.",
        ],
    ),
    Relation(
        COLOURS,
        ["The coat of {who} was {answer}.", "{who} wore {answer} shoes.", "The house of {who} was {answer}."],
        [
            "Everybody knew {who} by the colour {answer}.",
            "As always, {who} liked {answer} best.",
            "{who} painted the boat {answer}.",
        ],
    ),
    Relation(
        NAMES,
        [
            "The best friend of {who} was {answer}.",
            "{who} was married to {answer}.",
            "{who} often met {answer}.",
        ],
        [
            "{who} wrote a long letter to {answer}.",
            "Every night {who} thought of {answer}.",
            "Without a word {who} waited for {answer}.",
        ],
    ),
]
ABOUT_OBJECTS = Relation(
    SPOTS,
    ["The {who} was hidden behind the {answer}.", "Somebody left the {who} near the {answer}."],
    ["They found the {who} by the {answer}.", "The {who} was still lying near the {answer}."],
)

FILLERS = [
    "{time} {name} {act} {where}.",
    "{time} the {thing} was {state}, and {name} {act}.",
    "The {thing} was {state} and the {thing} was {state}.",
    "{name} {act} until the {thing} was {state}.",
    "It was {state} {where}, but {name} {act} all the same.",
    "{time} they talked about the {thing} {where}.",
]
FILLER_WORDS = {
    "time": _phrases("""
        Then|Later|At noon|That day|Soon|Before long|In the morning|After a while|For a moment|Once again|
        At last|Next day
    """),
    "act": _phrases("""
        walked slowly|sang a song|sat down|told a story|laughed|slept|worked hard|ran away|looked up|
        stood still|listened|went for a swim|read the news|played cards|said nothing|smiled
    """),
    "where": _phrases("""
        in the garden|by the river|on the beach|in the old town|at the station|under the stars|on the road|
        in the forest|at the lake|in the kitchen|across the field|on the island
    """),
    "thing": _words("sky wind rain sea sun street moon village snow water air night room world"),
    "state": _words("cold warm dark quiet bright calm strange empty wet clear heavy soft wild lovely"),
}


@dataclass(frozen=True)
class Recall:
    """A repeated word, `text[start:end]`, and the offset `told` in characters at which the text last said it."""

    start: int
    end: int
    told: int


@dataclass(frozen=True)
class Document:
    """A text of about 220 tokens (of the demo's tokenizer), and its recalls in the order of the text."""

    text: str
    recalls: tuple[Recall, ...]


def generate_documents(seed: int, count: int, facts: int = 10) -> Iterator[Document]:
    """Yields `count` documents that tell `facts` (1 to 10) facts and repeat as many; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _document(rng, facts)


def _document(rng: random.Random, count: int) -> Document:
    cast, facts = _facts(rng)
    first = rng.randrange(len(facts))
    facts = (facts[first:] + facts[:first])[:count]
    telling = facts + [None] * rng.randint(0, count // 5)
    # Drawn anew each time: if each fact came exactly once, those not yet repeated would give the answer away.
    repeating = rng.choices(facts, k=count) + [None] * rng.randint(count // 5, 3 * count // 5)
    rng.shuffle(telling)
    rng.shuffle(repeating)
    text, told, recalls = "", {}, []
    for fact in telling + [None] + repeating:
        text += " " if text else ""
        if fact is None:
            text += _filler(rng, cast)
            continue
        relation, who, answer = fact
        sentences = relation.tells + relation.repeats if answer in told else relation.tells
        before, after = rng.choice(sentences).split("{answer}")
        text += before.format(who=who)
        if answer in told:
            recalls.append(Recall(len(text), len(text) + len(answer), told[answer]))
        told[answer] = len(text)
        text += answer + after
    return Document(text, tuple(recalls))


def _facts(rng: random.Random) -> tuple[list[str], list[tuple[Relation, str, str]]]:
    """The people, and ten facts (relation, who, answer) of which no two have the same answer."""
    names = rng.sample(NAMES, len(NAMES))
    people, objects, kinds = rng.choice([(3, 1, 2), (3, 4, 1), (4, 2, 1), (5, 0, 1)])
    cast, others = names[:people], names[people:]
    subjects = [(relation, cast) for relation in [SURNAME, *rng.sample(ABOUT_PEOPLE, kinds)]]
    subjects.append((ABOUT_OBJECTS, rng.sample(OBJECTS, objects)))
    facts = []
    for relation, whom in subjects:
        # An answer that is a name is nobody of the cast.
        answers = rng.sample(others if relation.answers is NAMES else relation.answers, len(whom))
        facts += [(relation, who, answer) for who, answer in zip(whom, answers, strict=True)]
    return cast, facts


def _filler(rng: random.Random, cast: list[str]) -> str:
    words = {"name": cast, **FILLER_WORDS}
    return re.sub(r"{(\w+)}", lambda slot: rng.choice(words[slot[1]]), rng.choice(FILLERS))
