"""The made tasks of `study_tasks.py`: puzzles, extraction to JSON, and a rule of a made-up language.

Each is a generator of (prompt, completion) pairs that draws from the given random.Random alone, so the same seed gives the
same rows on every machine.
"""

import json
import random
from collections.abc import Callable, Iterator

Pair = tuple[str, str]


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words("""
Ada Ali Amir Anna Aram Bao Bea Boris Carla Cem Clara Dana Diego Dora Elif Emil Emma Eva Farid Felix Gita Greta Hana Hugo
Ida Igor Ines Ivan Jana Jonas Julia Kai Karim Klara Kofi Lars Leila Lena Leo Lina Luca Lucy Maja Marco Maria Mila Milan
Mina Nadia Nico Nina Noah Nora Olga Oscar Paul Petra Pia Rafa Rosa Sami Sara Sofia Sven Tara Theo Tom Uma Vera Victor
Yuki Zoe
""")
SURNAMES = _words("""
Adler Almeida Bauer Becker Bell Berg Blanc Brandt Brown Castro Chen Cohen Costa Cruz Dahl Davis Diaz Dubois Evans Fischer
Fontana Ford Garcia Gomez Grant Haas Hall Hansen Holm Hughes Ito Jensen Jones Kaya Keller Khan Kim King Klein Koch Kumar
Lang Larsen Lee Lopez Mann Marino Meyer Miller Moore Mori Nagy Novak Olsen Ortiz Park Patel Perez Popov Quinn Ricci Rossi
Santos Sato Silva Singh Smith Stone Suzuki Tanaka Torres Vogel Wagner Walker Weber White Wolf Wood Young Ziegler
""")
CITIES = _words("""
Accra Amsterdam Ankara Athens Atlanta Berlin Bogota Boston Bremen Brussels Cairo Chicago Copenhagen Dakar Dallas Delhi
Denver Dublin Geneva Ghent Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Kyoto Lagos Lima Lisbon London Lyon
Madrid Manila Miami Montreal Moscow Mumbai Munich Nairobi Naples Osaka Oslo Paris Perth Porto Prague Quito Riga Rome
Seattle Seoul Seville Stockholm Sydney Tallinn Tokyo Toronto Tunis Turin Vienna Warsaw Zagreb Zurich
""")
CITIES += ["Cape Town", "Hong Kong", "New York"]
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
THINGS = _words("apples pears books coins eggs cups stamps shells cards balls pens keys")
GETS, LOSES = _words("buys finds gets"), _words("loses sells drops")
DEEDS = _words("reads sleeps cooks sings swims runs paints writes dances works waits travels")


def arithmetic(draw: random.Random) -> Iterator[Pair]:
    """Puzzles of five kinds: a sum or a difference, a series, who is first, the largest number, which of two."""
    kinds: tuple[Callable[[random.Random], Pair], ...] = (_story, _series, _order, _largest, _either)
    while True:
        question, answer = draw.choice(kinds)(draw)
        yield f"Question: {question}\nAnswer:", f" {answer}"


def _story(draw: random.Random) -> Pair:
    name, things, has = draw.choice(NAMES), draw.choice(THINGS), draw.randint(5, 15)
    if draw.random() < 0.5:
        more = draw.randint(2, 9)
        return f"{name} has {has} {things} and {draw.choice(GETS)} {more} more. How many is that?", str(has + more)
    less = draw.randint(1, min(9, has - 1))
    return f"{name} has {has} {things} and {draw.choice(LOSES)} {less}. How many are left?", str(has - less)


def _series(draw: random.Random) -> Pair:
    first, step = draw.randint(1, 60), draw.choice((1, 2, 5, 10))
    numbers = [first + step * i for i in range(5)]
    if draw.random() < 0.3:
        numbers.reverse()
    return f"What comes next: {', '.join(map(str, numbers[:4]))}?", str(numbers[4])


def _order(draw: random.Random) -> Pair:
    more, less = draw.choice((("older", "younger"), ("taller", "shorter"), ("faster", "slower")))
    first, second, third = draw.sample(NAMES, 3)
    said = [
        f"{first} is {more} than {second}" if draw.random() < 0.5 else f"{second} is {less} than {first}",
        f"{second} is {more} than {third}" if draw.random() < 0.5 else f"{third} is {less} than {second}",
    ]
    draw.shuffle(said)
    most = draw.random() < 0.5
    which = (more if most else less).removesuffix("r") + "st"
    return f"{said[0]}. {said[1]}. Who is the {which}?", first if most else third


def _largest(draw: random.Random) -> Pair:
    numbers = draw.sample(range(100, 1000), 3)
    largest = draw.random() < 0.5
    which = "largest" if largest else "smallest"
    return f"Which is the {which}: {numbers[0]}, {numbers[1]} or {numbers[2]}?", str((max if largest else min)(numbers))


def _either(draw: random.Random) -> Pair:
    name, (one, other) = draw.choice(NAMES), draw.sample(DEEDS, 2)
    not_so = draw.choice((one, other))
    said = [f"{name} {one} or {other}", f"It is not so that {name} {not_so}"]
    draw.shuffle(said)
    return f"{said[0]}. {said[1]}. What is true of {name}?", one if not_so == other else other


SENTENCES = (
    "On {day}, {name} paid {sum} euros for a {thing} in {city}.",
    "{name} from {city} sent {sum} euros on {day} for a {thing}.",
    "A {thing} was sold to {name} in {city} on {day}; the price was {sum} euros.",
    "The office in {city} owes {name} {sum} euros since {day}.",
    "In {city}, a {thing} cost {name} {sum} euros on {day}.",
    "We got {sum} euros from {name} ({city}) on {day}.",
    "{day}: {name} returned the {thing}, so our shop in {city} paid back {sum} euros.",
    "Please bill {name} for {sum} euros; the {thing} goes to {city} by {day}.",
    "{other} says that {name} spent {sum} euros in {city} on {day}.",
    "{name} asked {other} for {sum} euros when they met in {city} on {day}.",
    "For {sum} euros, {name} booked a room in {city} from {day} on.",
    "Not {other} but {name} won {sum} euros in {city} on {day}.",
    "The {thing} that {name} ordered on {day} is in {city}; {sum} euros are due.",
    "{sum} euros were left in {city} by {name}, as {other} wrote on {day}.",
    "By {day}, {name} had saved {sum} euros for a trip to {city}.",
    "Until {day}, the fare to {city} is {sum} euros, which {name} knows.",
)
GOODS = _words("bike sofa lamp camera guitar desk coat phone table clock tent boat ring chair piano watch rug mirror")


def extraction(draw: random.Random) -> Iterator[Pair]:
    """Sentences to JSON of a name, a city, a sum and a day. The day has one form in JSON and four in sentences."""
    while True:
        name, other = draw.sample(NAMES + SURNAMES, 2)
        day, month = draw.randint(1, 28), draw.choice(MONTHS)
        city, number = draw.choice(CITIES), draw.choice((draw.randint(5, 99), draw.randint(100, 999)))
        written = draw.choice(
            (f"{day} {month}", f"{month} {day}", f"{day} {month[:3]}", f"the {_ordinal(day)} of {month}")
        )
        said = draw.choice(SENTENCES).format(
            day=written, name=name, other=other, sum=number, city=city, thing=draw.choice(GOODS)
        )
        fields = {"name": name, "city": city, "sum": number, "day": f"{day} {month[:3]}"}
        yield f"{said[0].upper()}{said[1:]}\nJSON:", f" {json.dumps(fields, separators=(',', ':'))}"


def _ordinal(day: int) -> str:
    ending = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


COUNTS = _words("two three four five six seven eight nine ten eleven twelve")
QUALITIES = _words("""
old young red blue green small large tired happy quiet loud brave lazy clever hungry rich poor wild calm proud thin strong
slow quick gentle strange tall short white black kind shy
""")
ANIMALS = _words("""
cats dogs birds horses cows sheep goats lions wolves bears foxes frogs snakes ducks hens mice rabbits tigers monkeys bees
kings queens farmers singers doctors bakers pilots sailors poets judges children robots giants witches
""")
VERBS = _words(
    "see hear follow help find like fear watch chase meet carry teach feed know miss paint call greet trust visit"
)
MARK = "ka"  # what a verb ends with


def rule(draw: random.Random) -> Iterator[Pair]:
    """Sentences into a made-up language: words in reverse order, number words as digits, verbs with an ending."""
    while True:
        words = [*_group(draw), draw.choice(VERBS), *_group(draw)]
        yield f"English: {' '.join(words)}\nOrvan:", f" {' '.join(map(_spelt, reversed(words)))}"


def _group(draw: random.Random) -> list[str]:
    count = [draw.choice(COUNTS)] if draw.random() < 0.6 else []
    quality = [draw.choice(QUALITIES)] if draw.random() < 0.7 else []
    return [*count, *quality, draw.choice(ANIMALS)]


def _spelt(word: str) -> str:
    if word in COUNTS:
        return str(COUNTS.index(word) + 2)
    return word + MARK if word in VERBS else word
