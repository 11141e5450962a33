"""Seeded micro-stories in simple English: the running text of the embedded model.

Every story tells of a small world (who is where, who holds what, how many are left), and its sentences follow from that
world: the last one can be predicted from the earlier ones. So a language model has facts to track, not only phrases to
repeat.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rrcli.data.splits import Side, side_of
from tools.demo_model.words import (
    ANIMALS,
    BOYS,
    COLORS,
    FEELINGS,
    FOODS,
    GIRLS,
    NUMBERS,
    OBJECTS,
    PLACES,
    RESCUES,
    SIZES,
    TIMES,
    WEATHER,
    WORK,
)

MIN_WORDS, MAX_WORDS = 40, 120


@dataclass(frozen=True)
class Person:
    """A character and the pronouns that stand for it."""

    name: str
    they: str
    them: str
    their: str


class Teller:
    """Draws the characters and words of one story from a seeded generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.time = self.pick(TIMES)

    def pick(self, options: tuple[str, ...]) -> str:
        """Return one of `options`."""
        return self.rng.choice(options)

    def several(self, options: tuple[str, ...], count: int) -> list[str]:
        """Return `count` different ones of `options`."""
        return self.rng.sample(options, count)

    def people(self, count: int) -> list[Person]:
        """Return `count` different characters."""
        names = self.rng.sample(GIRLS + BOYS, count)
        return [
            Person(name, "she", "her", "her") if name in GIRLS else Person(name, "he", "him", "his") for name in names
        ]

    def thing(self) -> tuple[str, str]:
        """Return an object with an adjective (`red lamp`) and by its noun alone (`lamp`)."""
        noun = self.pick(OBJECTS)
        return f"{self.pick(COLORS + SIZES)} {noun}", noun

    def maybe(self, *sentences: str) -> list[str]:
        """Return one of the sentences, or none."""
        return [self.pick(sentences)] if self.rng.random() < 0.5 else []


def article(noun: str) -> str:
    """Return `noun` with `a` or `an` before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def passing_on(teller: Teller) -> list[str]:
    """An object goes from hand to hand; the end names its holder and its place."""
    cast = teller.people(teller.rng.randint(3, 4))
    places = teller.several(PLACES, len(cast))
    full, noun = teller.thing()
    holder, place = cast[0], places[0]
    story = [
        teller.pick(
            (
                f"{teller.time}, {holder.name} found {article(full)} in the {place}.",
                f"{teller.time}, {holder.name} was in the {place} and saw {article(full)}.",
            )
        ),
        teller.pick((f"{holder.name} picked up the {noun}.", f"{holder.they.capitalize()} took the {noun}.")),
    ]
    for other, target in zip(cast[1:], places[1:], strict=True):
        story.append(
            teller.pick(
                (
                    f"{holder.name} went to the {target} and met {other.name}.",
                    f"Then {holder.name} walked from the {place} to the {target}, where {other.name} was.",
                )
            )
        )
        story += teller.maybe(
            f'"What a nice {noun}," said {other.name}.',
            f'"May I have the {noun}?" asked {other.name}.',
            f"{other.name} was {teller.pick(FEELINGS)} to see {holder.them}.",
        )
        story.append(
            teller.pick(
                (
                    f"{holder.name} gave the {noun} to {other.name}.",
                    f"{holder.name} let {other.name} keep the {noun}.",
                    f"So {other.name} got the {noun} from {holder.name}.",
                )
            )
        )
        holder, place = other, target
    story.append(
        teller.pick(
            (
                f"At the end, {holder.name} had the {full} in the {place}.",
                f"Now the {full} is in the {place} with {holder.name}.",
            )
        )
    )
    return story


def lost_and_found(teller: Teller) -> list[str]:
    """Someone searches for an object in several places; it turns up where the other one saw it."""
    owner, friend = teller.people(2)
    places = teller.several(PLACES, teller.rng.randint(3, 4))
    full, noun = teller.thing()
    story = [
        teller.pick(
            (
                f"{owner.name} had {article(full)}, but then it was gone.",
                f"{teller.time}, {owner.name} lost {owner.their} {full}.",
            )
        ),
        f"{owner.name} asked {friend.name} for help.",
    ]
    for place in places[:-1]:
        story.append(
            teller.pick(
                (
                    f"They looked in the {place}, but the {noun} was not there.",
                    f"{teller.pick((owner.name, friend.name))} searched the {place} and found nothing.",
                    f"There was no {noun} in the {place}.",
                )
            )
        )
    story += teller.maybe(f"{owner.name} was sad.", f'"Do not cry, {owner.name}," said {friend.name}.')
    finder, other = teller.rng.sample((owner, friend), 2)
    animal = teller.pick(ANIMALS)
    story += [
        f"At last they went to the {places[-1]}.",
        teller.pick(
            (
                f"{finder.name} saw {article(animal)} with the {noun}, and the {animal} ran away from {finder.them}.",
                f"{finder.name} looked behind {article(animal)} and there was the {noun}.",
            )
        ),
        f"{finder.name} showed {other.name} the {noun}.",
        teller.pick(
            (
                f"The {full} had been in the {places[-1]} with the {animal} all the time.",
                f"{owner.name} took the {full} home from the {places[-1]} and thanked {friend.name}.",
            )
        ),
    ]
    return story


def counting(teller: Teller) -> list[str]:
    """Someone gathers food, gives some away and eats some; every count is right."""
    cast = teller.people(3)
    food = teller.pick(FOODS)
    count = teller.rng.randint(6, 10)
    owner = cast[0]
    story = [
        teller.pick(
            (
                f"{teller.time}, {owner.name} put {NUMBERS[count]} {food} in a basket.",
                f"{owner.name} went to the {teller.pick(PLACES)} and came back with {NUMBERS[count]} {food}.",
            )
        )
    ]
    for other in cast[1:]:
        given = teller.rng.randint(1, 3)
        count -= given
        story.append(
            teller.pick(
                (
                    f"{other.name} asked for {NUMBERS[given]}, and {owner.name} gave {NUMBERS[given]} to {other.them}.",
                    f"{owner.name} gave {NUMBERS[given]} of the {food} to {other.name}.",
                    f"{other.name} was hungry, so {owner.name} let {other.them} eat {NUMBERS[given]}.",
                )
            )
        )
        if count:
            story.append(f"Now {owner.name} had {NUMBERS[count]} left.")
            story += teller.maybe(f'"Thank you, {owner.name}," said {other.name}.', f"{other.name} smiled.")
    if count == 0:
        story.append(f"The basket was empty, but {owner.name} was {teller.pick(FEELINGS)}.")
    elif teller.rng.random() < 0.5:
        found = teller.rng.randint(1, 4)
        story.append(f"Then {owner.name} found {NUMBERS[found]} more on the way home.")
        story.append(f"In the end there were {NUMBERS[count + found]} {food} in the basket.")
    else:
        story.append(f"{owner.name} ate the last {NUMBERS[count]} on the way home and the basket was empty.")
    story.append(f"{cast[1].name} and {cast[2].name} talked about the good {food} all day.")
    return story


def weather_trip(teller: Teller) -> list[str]:
    """Two people walk through bad weather; only the one with the right thing is fine."""
    ready, unready = teller.people(2)
    start, middle, goal = teller.several(PLACES, 3)
    sign, gear, trouble, cure = WEATHER[teller.pick(tuple(WEATHER))]
    full, noun = teller.thing()
    first, second = teller.rng.sample(
        (f"{ready.name} took {article(gear)}", f"{unready.name} took only {article(full)}"), 2
    )
    return [
        f"{teller.time}, {ready.name} and {unready.name} wanted to go from the {start} to the {goal}.",
        f"{first}, and {second}.",
        *teller.maybe(
            f"They walked slowly past the {middle}.", f"On the way they saw {article(teller.pick(ANIMALS))}."
        ),
        sign,
        teller.pick(
            (
                f"{ready.name} used the {gear} and was fine, but {unready.name} was soon {trouble}.",
                f"{unready.name} was soon {trouble}, because {unready.they} had no {gear}.",
            )
        ),
        *teller.maybe(f'"I should have taken {article(gear)} too," said {unready.name}.'),
        f"When they came to the {goal}, {unready.name} {cure.format(they=unready.they)}.",
        teller.pick(
            (
                f"{ready.name} was not {trouble} at all and put the {gear} next to the {noun}.",
                f"Next time {unready.name} will take {article(gear)} and leave the {noun} in the {start}.",
            )
        ),
    ]


def animal_help(teller: Teller) -> list[str]:
    """A child frees an animal with a tool; the animal repays the child."""
    child, friend = teller.people(2)
    animal = teller.pick(ANIMALS)
    place, home = teller.several(PLACES, 2)
    adjective = teller.pick(COLORS)
    problem, tool, action = teller.rng.choice(RESCUES)
    full, noun = teller.thing()
    return [
        f"{article(f'{adjective} {animal}').capitalize()} {problem} near the {place}.",
        teller.pick((f"{child.name} heard the {animal} cry.", f"{teller.time}, {child.name} saw the {animal}.")),
        f'"We need {article(tool)}," {child.they} said to {friend.name}.',
        f"{friend.name} ran to the {home} and brought {article(tool)}.",
        f"With the {tool}, {child.name} {action}.",
        *teller.maybe(f"The {adjective} {animal} was free.", f"{friend.name} clapped for {child.name}."),
        teller.pick(
            (
                f"Later the {animal} came to the {home} and brought {child.name} {article(full)}.",
                f"The next day the {animal} found {article(full)} and left it for {child.name} in the {home}.",
            )
        ),
        teller.pick(
            (
                f"{child.name} still has the {noun} from the {adjective} {animal}.",
                f"{child.name} gave the {tool} back to {friend.name} and kept the {noun}.",
            )
        ),
    ]


def trading(teller: Teller) -> list[str]:
    """Two people swap objects once or twice; the end says who has which."""
    one, two, helper = teller.people(3)
    nouns = teller.several(OBJECTS, 2)
    holds = {one.name: nouns[0], two.name: nouns[1]}
    place = teller.pick(PLACES)
    work = teller.pick(WORK)
    story = [
        f"{one.name} had {article(nouns[0])} and {two.name} had {article(nouns[1])}.",
        f"{teller.time}, they met in the {place}.",
        teller.pick(
            (
                f"{one.name} liked the {nouns[1]}, and {two.name} liked the {nouns[0]}.",
                f'"Will you give me the {nouns[1]} for the {nouns[0]}?" asked {one.name}.',
            )
        ),
        f"So they traded, and {one.name} took the {nouns[1]}.",
    ]
    holds[one.name], holds[two.name] = holds[two.name], holds[one.name]
    turn = teller.rng.random()
    if turn < 0.4:
        story.append(f"In the evening {two.name} wanted the {holds[one.name]} back, and they traded again.")
        holds[one.name], holds[two.name] = holds[two.name], holds[one.name]
    elif turn < 0.7:
        giver = teller.rng.choice((one, two))
        story.append(f"Then {helper.name} came to {work}, and {giver.name} gave {helper.them} the {holds[giver.name]}.")
        holds[helper.name] = holds.pop(giver.name)
    else:
        story.append(f"Then they helped {helper.name} {work}.")
    story += teller.maybe(f"Everyone was {teller.pick(FEELINGS)}.", f"The {place} was quiet again.")
    order = list(holds.items())
    teller.rng.shuffle(order)
    story.append(f"When they left, {' and '.join(f'{name} had the {noun}' for name, noun in order)}.")
    return story


SHAPES: tuple[Callable[[Teller], list[str]], ...] = (
    passing_on,
    lost_and_found,
    counting,
    weather_trip,
    animal_help,
    trading,
)


def write_stories(count: int, seed: int) -> list[str]:
    """Return `count` distinct stories of 40 to 120 words, the same for the same seed."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        story = " ".join(rng.choice(SHAPES)(Teller(rng)))
        if MIN_WORDS <= len(story.split()) <= MAX_WORDS:
            found.setdefault(story)
    return list(found)


def save_stories(stories: list[str], path: Path) -> None:
    """Write one `{"text": story}` a line."""
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="ascii")


def load_stories(path: Path, *, side: Side) -> list[str]:
    """Return the stories of `path` on one side of the split."""
    lines = path.read_text(encoding="ascii").splitlines()
    stories = [json.loads(line)["text"] for line in lines]
    return [story for story in stories if side_of(story) == side]
