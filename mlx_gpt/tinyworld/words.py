"""The words of tinyworld, and who has which role."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _words("Anna Lily Mia Rose Ella Ruby Nora Ivy Lucy Zoe Emma Clara Alice Maya Sara Molly")
BOYS = _words("Tom Ben Max Sam Leo Jack Finn Noah Paul Hugo Adam Oscar Luke Theo Dan Felix")
NAMES = GIRLS + BOYS
PLACES = _words(
    "garden kitchen park forest barn school library market attic cellar river hill lake tower mill bakery castle farm "
    "meadow cave"
)
THINGS = _words(
    "ball kite book hat drum doll boat lamp key cup box bell coin map ring rope shell stone spoon basket blanket "
    "whistle mirror feather pencil scarf lantern puzzle trumpet crown"
)
LOOKS = _words("red blue green yellow pink white black brown purple golden silver wooden new round heavy shiny")
TRAITS = _words("kind brave clever quiet funny gentle shy loyal cheerful curious careful lazy polite friendly")
FEELINGS = _words(
    "happy sad tired proud hungry glad excited sleepy calm cross worried surprised lonely merry bored thirsty"
)
WEATHER = _words("sunny rainy windy cloudy snowy warm cold foggy bright stormy misty frosty")
TIMES = _words("morning afternoon evening day")
TASTES = _words("sweet fresh tasty juicy crisp delicious")
FOODS = _words("apple pear plum bun pie cookie carrot cherry sandwich peach melon pancake biscuit tomato waffle muffin")
SIZES = _words("little big small tiny large young")
ANIMALS = _words("dog cat bird duck fox frog owl hen cow horse sheep mouse rabbit squirrel bee goat pig lamb hare deer")
PASSED = _words("ran flew hopped walked crept wandered rushed came")
DID = _words("sang danced played read rested swam climbed dug painted cooked laughed slept jumped skipped whistled")
DO = _words("sing dance play read rest swim climb dig paint cook laugh sleep jump skip whistle")
WENT = _words("went ran walked hurried")
HOW = _words(
    "happily quickly slowly quietly gladly proudly bravely eagerly carefully calmly cheerfully silently noisily"
)
SOON = _words("Then Soon Later")
NICE = _words("nice lovely pretty fine wonderful great beautiful splendid charming")
ROLES = {"sister": GIRLS, "brother": BOYS, "friend": NAMES, "cousin": NAMES, "neighbour": NAMES}
