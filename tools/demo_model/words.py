"""The vocabulary of the micro-stories."""

from __future__ import annotations

GIRLS = ("Ada", "Bella", "Clara", "Dora", "Emma", "Fay", "Gina", "Hana", "Ivy", "Julia", "Kate", "Lily", "Mia", "Nora")
BOYS = ("Adam", "Ben", "Carl", "Dan", "Eli", "Finn", "Gus", "Hugo", "Ian", "Jack", "Karl", "Leo", "Max", "Noah")
OBJECTS = (
    "lamp", "key", "book", "map", "bell", "drum", "hat", "coin", "kite", "ring", "cup", "rope", "flute", "basket",
    "mirror", "shell", "button", "letter", "spoon", "candle", "compass", "ladder", "brush", "clock",
)  # fmt: skip
COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "silver")
SIZES = ("small", "big", "old", "new", "shiny", "heavy", "tiny", "pretty")
PLACES = (
    "kitchen", "garden", "barn", "library", "school", "market", "forest", "harbor", "attic", "cellar", "meadow",
    "station", "bakery", "park", "mill", "tower", "workshop", "stable",
)  # fmt: skip
ANIMALS = ("cat", "dog", "goat", "duck", "fox", "hen", "pony", "rabbit", "sheep", "owl", "mouse", "pig")
FOODS = ("apples", "pears", "plums", "eggs", "cookies", "carrots", "cherries", "nuts", "rolls", "berries")
FEELINGS = ("happy", "glad", "proud", "pleased")
TIMES = (
    "One morning",
    "One day",
    "After lunch",
    "On Sunday",
    "Before dinner",
    "Early in the day",
    "Last week",
    "Today",
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WORK = ("paint the door", "clean the floor", "feed the hens", "mend the fence", "carry the wood", "wash the cups")
# What the weather does to someone without the right thing, and what helps afterwards.
WEATHER = {
    "rain": ("It began to rain.", "umbrella", "wet", "sat by the fire until {they} was dry"),
    "snow": ("Snow fell all day.", "scarf", "cold", "drank hot soup until {they} was warm"),
    "sun": ("The sun was very hot.", "straw hat", "thirsty", "drank cool water under a tree"),
    "wind": ("A strong wind came up.", "thick coat", "cold", "hid behind a wall until it was calm"),
}
# What befell an animal, what is needed, and what the child does with it.
RESCUES = (
    ("was stuck in a deep hole", "rope", "pulled it out"),
    ("was stuck on a high roof", "ladder", "carried it down"),
    ("was shut in a dark box", "key", "opened the lock"),
    ("was lost in the night", "lamp", "showed it the way"),
    ("was caught in a net", "knife", "cut the net"),
)
