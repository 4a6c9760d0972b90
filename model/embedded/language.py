"""Free English about the world: every way of saying a scene that the embedded model is taught.

A prompt is built from an order of slots and a phrase for each slot. Some orders and phrasings are never trained on
(HELD_OUT_ORDERS, HELD_OUT_OPENINGS), so that understanding can be measured on them. Slots of which a scene says nothing
stay empty, and commas are not read: a held-out order says a scene only where no trained one comes to the same.
"""

import random
import re
from functools import cache

from .world import Scene

WORDS = {
    "red": ["red", "crimson", "scarlet", "ruby"],
    "green": ["green", "emerald", "jade"],
    "blue": ["blue", "azure", "cobalt", "sapphire"],
    "yellow": ["yellow", "golden", "lemon"],
    "white": ["white", "snowy", "ivory"],
    "purple": ["purple", "violet", "lilac"],
    "orange": ["orange", "tangerine", "amber"],
    "cyan": ["cyan", "turquoise", "aqua", "teal"],
    "ball": ["ball", "circle", "disc", "disk", "sphere", "dot"],
    "square": ["square", "box", "block", "cube", "tile"],
    "triangle": ["triangle", "pyramid", "wedge"],
    "star": ["star", "pentagram", "starlet"],
    "black": ["black", "pitch black", "jet black"],
    "gray": ["gray", "grey", "ashen", "slate"],
    "navy": ["navy", "navy blue", "dark blue", "midnight blue"],
    "brown": ["brown", "chocolate", "coffee"],
}
# motion: finite forms, then forms after "is" or before the noun
FINITE = {
    "bounces": [
        "bounces",
        "hops",
        "bounces up and down",
        "jumps up and down",
        "falls and rebounds",
        "bounces on the floor",
    ],
    "slides": [
        "slides",
        "glides",
        "slides from side to side",
        "moves from wall to wall",
        "travels left and right",
    ],
    "swings": ["swings", "sways", "swings like a pendulum", "swings back and forth", "sways to and fro"],
    "pulses": ["pulses", "pulsates", "throbs", "grows and shrinks", "expands and contracts"],
    "orbits": [
        "orbits",
        "revolves",
        "orbits the centre",
        "circles around the center",
        "goes round and round",
    ],
    "still": ["stays still", "sits still", "does not move", "rests", "stands still", "remains motionless"],
}
GERUND = {
    "bounces": [
        "bouncing",
        "hopping",
        "bouncing up and down",
        "jumping up and down",
        "falling and rebounding",
    ],
    "slides": [
        "sliding",
        "gliding",
        "sliding from side to side",
        "moving from wall to wall",
        "travelling left and right",
    ],
    "swings": [
        "swinging",
        "swaying",
        "swinging like a pendulum",
        "swinging back and forth",
        "swaying to and fro",
    ],
    "pulses": ["pulsing", "pulsating", "throbbing", "growing and shrinking", "expanding and contracting"],
    "orbits": [
        "orbiting",
        "revolving",
        "orbiting the center",
        "circling around the centre",
        "going round and round",
    ],
    "still": [
        "staying still",
        "sitting still",
        "not moving",
        "resting",
        "standing still",
        "motionless",
        "static",
    ],
}
TEMPO = {
    "slow": ["slowly", "at a slow pace", "gently", "lazily"],
    "normal": [""],
    "fast": ["quickly", "fast", "rapidly", "at a fast pace", "swiftly"],
}
PLACE = {
    "center": [""],
    "left": ["on the left", "on the left side", "at the left"],
    "right": ["on the right", "on the right side"],
}
AMBIENCE = {
    "none": [""],
    "rain": ["in the rain", "while it rains", "on a rainy day", "in rainy weather"],
    "wind": ["in the wind", "while the wind blows", "on a windy day", "in windy weather"],
}
BACKGROUND = [
    "on a {} background",
    "on {}",
    "against a {} backdrop",
    "in front of a {} wall",
    "over a {} background",
]
OPENINGS = ["", "", "", "a video of ", "show me ", "there is ", "a clip of ", "we see ", "here is "]
HELD_OUT_OPENINGS = ["please make a movie of ", "i want to see "]
# s subject, m motion with tempo, is and ing the same as participle, p place, b background, a ambience,
# g motion before the noun
ORDERS = [
    "s m p b a",
    "s m b p a",
    "s m p a b",
    "b , s m p a",
    "g p b a",
    "a , s m p b",
    "s p m b a",
    "s is p b a",
    "b , g p a",
]
HELD_OUT_ORDERS = ["b a , s m p", "p b , s m a", "ing b a , s p", "s b , it m p a"]
# what a slot says, in turn
_SAYS = {"is": "m", "ing": "m", "g": "m s", "it": "", ",": ""}
# words that carry no meaning here, but are no reason to complain
_FILLER = (
    "a an the of and with it its is are was be being please make me show want to see i we you here there this that some one "
    "video clip movie film scene picture animation image footage shot very so just really then while in on at over under "
    "against front background backdrop wall floor ground side object thing shape colored coloured pace sound sounds audio "
    "hear hearing camera view frame screen which who what has have does do not no from for by into as like up down back "
    "forth round around day weather create generate render simple small big large nice beautiful bright plain"
)
FILLER = _FILLER.split()


def describe(scene: Scene, rng: random.Random, held_out: bool = False, nameless: bool = False) -> str:
    """A random way of saying `scene`.

    held_out: in phrasings that training never uses. nameless: without colour and shape, which a picture shows.
    """
    order = rng.choice(held_out_orders(scene) if held_out else ORDERS)
    color, shape = rng.choice(WORDS[scene.color]), rng.choice(WORDS[scene.shape])
    subject = rng.choice(
        [f"a {color} {shape}"] * 4 + [f"the {color} {shape}", f"a {shape} that is {color} and"]
    )
    if nameless:
        color, shape = "", rng.choice(["thing", "object"])
        subject = rng.choice([f"this {shape}", f"the {shape}", "it", "this"])
    tempo = rng.choice(TEMPO[scene.tempo])
    finite, gerund = rng.choice(FINITE[scene.motion]), rng.choice(GERUND[scene.motion])
    slots = {
        "s": subject,
        "m": f"{finite} {tempo}",
        "is": f"is {gerund} {tempo}",
        "ing": f"{gerund} {tempo}",
        "g": f"a {rng.choice(GERUND[scene.motion][:2])} {color} {shape} {'' if scene.tempo == 'normal' else tempo}",
        "p": rng.choice(PLACE[scene.place]),
        "b": rng.choice(BACKGROUND).format(rng.choice(WORDS[scene.background])),
        "a": rng.choice(AMBIENCE[scene.ambience]),
        "it": "it",
        ",": ",",
    }
    openings = HELD_OUT_OPENINGS if held_out else OPENINGS
    text = rng.choice(openings) + " ".join(slots[slot] for slot in order.split())
    # "a ball that is red and" leads on to a motion, which may have come before
    return re.sub(r"\s+", " ", text).replace(" ,", ",").strip(" ,").removesuffix(" and")


def held_out_orders(scene: Scene) -> list[str]:
    """The held-out orders that say this scene as no trained one can."""
    phrases = {"p": PLACE[scene.place], "a": AMBIENCE[scene.ambience]}
    return _unlike_trained(frozenset(slot for slot, forms in phrases.items() if forms == [""]))


@cache
def _unlike_trained(empty: frozenset[str]) -> list[str]:
    trained = {_said(order, empty) for order in ORDERS}
    return [order for order in HELD_OUT_ORDERS if _said(order, empty) not in trained]


def _said(order: str, empty: frozenset[str]) -> str:
    """What an order says in turn if these slots are empty: "s m b"."""
    said = " ".join(_SAYS.get(slot, slot) for slot in order.split() if slot not in empty)
    return " ".join(said.split())


def interrupt(prompt: str, rng: random.Random) -> str:
    """The prompt with up to three words strewn in that say nothing: filler, or one that no vocabulary knows."""
    words = prompt.split()
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        words.insert(rng.randint(0, len(words)), rng.choice([*FILLER, "qqq", "qqq"]))
    return " ".join(words)


def content_words() -> list[str]:
    """Every word that means something to the model, sorted."""
    phrases = [
        p
        for group in (WORDS, FINITE, GERUND, TEMPO, PLACE, AMBIENCE)
        for forms in group.values()
        for p in forms
    ]
    return sorted({word for phrase in phrases for word in phrase.split()} - set(FILLER))


def vocabulary() -> list[str]:
    """All words that the tokenizer knows, in a fixed order."""
    return sorted({*content_words(), *FILLER})
