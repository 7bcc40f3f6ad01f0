"""The words of tinyworld."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _split("Anna Lily Mia Rose Ella Ruby Nora Ivy Lucy Zoe Emma Clara Alice Maya Sara Molly")
BOYS = _split("Tom Ben Max Sam Leo Jack Finn Noah Paul Hugo Adam Oscar Luke Theo Dan Felix")
NAMES = GIRLS + BOYS
PLACES = _split(
    "garden kitchen park forest barn school library market attic cellar river hill lake tower mill bakery castle farm "
    "meadow cave"
)
THINGS = _split(
    "ball kite book hat drum doll boat lamp key cup box bell coin map ring rope shell stone spoon basket blanket "
    "whistle mirror feather pencil scarf lantern puzzle trumpet crown"
)
LOOKS = _split("red blue green yellow pink white black brown purple golden silver wooden new round heavy shiny")
TRAITS = _split("kind brave clever quiet funny gentle shy loyal cheerful curious careful lazy polite friendly")
FEELINGS = _split(
    "happy sad tired proud hungry glad excited sleepy calm cross worried surprised lonely merry bored thirsty"
)
WEATHER = _split("sunny rainy windy cloudy snowy warm cold foggy bright stormy misty frosty")
TIMES = _split("morning afternoon evening day")
TASTES = _split("sweet fresh tasty juicy crisp delicious")
FOODS = _split("apple pear plum bun pie cookie carrot cherry sandwich peach melon pancake biscuit tomato waffle muffin")
SIZES = _split("little big small tiny large young")
ANIMALS = _split("dog cat bird duck fox frog owl hen cow horse sheep mouse rabbit squirrel bee goat pig lamb hare deer")
PASSED = _split("ran flew hopped walked crept wandered rushed came")
DID = _split("sang danced played read rested swam climbed dug painted cooked laughed slept jumped skipped whistled")
DO = _split("sing dance play read rest swim climb dig paint cook laugh sleep jump skip whistle")
WENT = _split("went ran walked hurried")
HOW = _split(
    "happily quickly slowly quietly gladly proudly bravely eagerly carefully calmly cheerfully silently noisily"
)
SOON = _split("Then Soon Later")
NICE = _split("nice lovely pretty fine wonderful great beautiful splendid charming")
ROLES = {"sister": GIRLS, "brother": BOYS, "friend": NAMES, "cousin": NAMES, "neighbour": NAMES}
