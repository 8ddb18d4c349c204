"""Small synthetic documents in plain English, in which later words follow from earlier facts.

A document is about one person. It states some facts ("The code of Tom was 47."), continues with a story, and
returns to each fact, often in other words ("Asked for a number, Tom said 47."). The repeated word is a name,
an object, a number or the like, drawn from 20 to 40 candidates. It is repeated after up to 200 tokens. A
window alone cannot recall it, and linear attention is known to be weak at it (Arora et al., "Zoology", arXiv
2312.04927).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

HELDOUT_SEED = 1  # the seed of heldout.jsonl, never used for training
FACTS = 7  # per document, each of another kind


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split("|")]


NAMES = _words("""
    Adam Anna Ben Bella Carl Clara Dora David Emma Eric Fred Fiona Greta Henry Ivan Iris Jack Jane Karl Laura
""")
FRIENDS = _words("""
    Leo Mia Max Nora Nick Olga Oscar Paula Peter Quinn Rosa Ralph Sara Simon Tina Tom Ursula Vera Victor Wanda
    Walter Xenia Yusuf Zoe
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
SPOTS = _words("""
    arch barn bench bridge bush cabin cart cellar church column door fence fountain gate hedge hill oven
    shed shelf stable stairs statue stove table tower tree wagon wall well window
""")


@dataclass(frozen=True)
class Relation:
    """A kind of fact: the possible answers, sentences that state it, and sentences that only repeat it."""

    answers: list[str]
    statements: list[str]
    repeats: list[str]


RELATIONS = [
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
        FRIENDS,
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
    Relation(
        OBJECTS,
        ["{who} had lost a {answer}.", "{who} was looking for a {answer}.", "{who} had hidden a {answer}."],
        [
            "At last {who} found the {answer}.",
            "Somebody gave {who} the {answer}.",
            "{who} took the {answer}.",
        ],
    ),
    Relation(
        SPOTS,
        ["{who} slept behind the {answer}.", "{who} lived near the {answer}."],
        ["They found {who} by the {answer}.", "{who} went back to the {answer}."],
    ),
]

FILLERS = [
    "{time} they {act} {where}.",
    "{time} the {thing} was {state}, and they {act}.",
    "The {thing} was {state} and the {thing} was {state}.",
    "They {act} until the {thing} was {state}.",
    "It was {state} {where}, but they {act} all the same.",
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
    """A repeated word of a document.

    Attributes:
        start, end: its range in the text, in characters.
        previous: the start of its previous occurrence, in characters.
    """

    start: int
    end: int
    previous: int


@dataclass(frozen=True)
class Document:
    """A text and the positions of its repeated words."""

    text: str
    recalls: tuple[Recall, ...]


def generate_documents(seed: int, count: int) -> Iterator[Document]:
    """Yield `count` documents of about 240 tokens. The same seed gives the same documents."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _document(rng)


def _document(rng: random.Random) -> Document:
    who = rng.choice(NAMES)
    facts = [(relation, rng.choice(relation.answers)) for relation in rng.sample(RELATIONS, FACTS)]
    later = rng.sample(facts, FACTS) + rng.sample(facts, FACTS // 2)
    text, previous, recalls = "", {}, []
    for relation, answer in facts + later:
        repeated = answer in previous
        if repeated or rng.random() < 0.3:
            text += _filler(rng) + " "
        sentence = rng.choice(relation.statements + relation.repeats if repeated else relation.statements)
        before, after = sentence.replace("{who}", who).split("{answer}")
        start = len(text) + len(before)
        if repeated:
            recalls.append(Recall(start, start + len(answer), previous[answer]))
        previous[answer] = start
        text += f"{before}{answer}{after} "
    return Document(text.rstrip(), tuple(recalls))


def _filler(rng: random.Random) -> str:
    sentence = rng.choice(FILLERS)
    for slot, words in FILLER_WORDS.items():
        while f"{{{slot}}}" in sentence:
            sentence = sentence.replace(f"{{{slot}}}", rng.choice(words), 1)
    return sentence
