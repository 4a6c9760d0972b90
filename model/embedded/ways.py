"""How free prompts say motions, tempos and places beyond single words: verbs with the ways that they go, and other phrases.

Not for training, whose prompts have words strewn in that would make such phrases by chance.
"""

from itertools import product

from . import language, world

_MOVE = (
    "move, moves, moving, go, goes, going, travel, travels, travelling, traveling, run, runs, running, float, floats, floating, "
    "shift, shifts, shifting, pace, paces, pacing, zip, zips, zipping, dart, darts, darting, "
    "cruise, cruises, cruising, sail, sails, sailing, sweep, sweeps, sweeping"
)
_SLIDE = "slide, slides, sliding, glide, glides, gliding, roll, rolls, rolling, drift, drifts, drifting"
_RICOCHET = "bounce, bounces, bouncing, ricochets, ricocheting, ping pongs, ping ponging"
_SWING = (
    "swing, swings, swinging, sway, sways, swaying, rock, rocks, rocking, wobbles, wobbling, hangs, hanging"
)
_TURN = (
    "orbits, orbiting, revolves, revolving, rotates, rotating, spin, spins, spinning, loops, looping, whirls, whirling, "
    "wheels, wheeling, twirls, twirling, swirls, swirling"
)
_HIT = (
    "hit, hits, hitting, strike, strikes, striking, knock, knocks, knocking, bump, bumps, bumping, bang, bangs, banging, "
    "pounds, pounding, slams, slamming, smacks, smacking"
)
_RISE = "bob, bobs, bobbing, tossed, thrown, juggled, oscillates, oscillating, spring, springs, springing, hop, hops, hopping, bounce, bounces, bouncing"
_BECOME = "get, gets, getting, grow, grows, growing, become, becomes, becoming"
_GROW = (
    "grow, swell, expand, inflate",
    "grows, swells, expands, inflates",
    "growing, swelling, expanding, inflating",
)
_SHRINK = ("shrink, contract, deflate", "shrinks, contracts, deflates", "shrinking, contracting, deflating")

_SIDES = (
    "from left to right, left to right, from right to left, right to left, from the left to the right, from the right to the left, "
    "from left side to right side, from the left side to the right side, from one side to the other, from side to side, from the left edge to the right edge, "
    "side to side, from edge to edge, from wall to wall, wall to wall, from one wall to the other, between the walls, "
    "between two walls, between the two walls, from one edge to the other, from one end to the other, from edge to edge of the frame, "
    "between left and right, between the edges, between the left and right edges, between the sides, between the left and right walls"
)
_BETWEEN = "between walls, between both walls, between the left wall and the right wall"
_TO_AND_FRO = f"{_SIDES}, left and right, right and left, back and forth, to and fro, backwards and forwards, backward and forward"
_ONE_WAY = (
    "left, right, to the left, to the right, leftward, rightward, leftwards, rightwards, sideways, horizontally, across, "
    "left right, left then right, right then left, left and then right, leftwards then rightwards, "
    "across the screen, across the frame, across the picture, across the floor, along the floor, along the ground"
)
_CENTERS = ("the center", "the centre", "the middle", "a center point", "a centre point", "a central point")
_AROUND = ", ".join(f"{way} {center}" for way, center in product(("around", "round", "about"), _CENTERS))
_CIRCLES = (
    "in circles, in a circle, around in circles, around in a circle, in a circular path, in a circular motion, in circular motion, "
    f"along a circular path, in uniform circular motion, in a loop, in loops, round and round, around and around, {_AROUND}"
)
_FLOOR = "the floor, the ground, on the floor, on the ground, against the floor, against the ground"
_WALLS = (
    "the walls, the wall, the side walls, against the walls, against the wall, into the walls, at the walls, on the walls, "
    "into walls, against walls, both walls, both side walls, the left and right walls, the left wall and the right wall, "
    "one wall then the other, one wall and then the other, each wall, against both walls, into both walls, into the left and right walls, into the left wall and the right wall"
)
_ORBITS = (
    "in a circular orbit, in circular orbits, in orbit, in an orbit, on a circular path, on a circular orbit, "
    "along a circle, around a circle, on a circle, along a circular orbit"
)
# not as one asks for a picture: "draw a circle that bounces"
_DRAW = "traces, tracing, draws, drawing, makes, making"
_CIRCLE = "a circle, circles, a circle in the air, circles in the air"
_PATH = "a circular path, a circular orbit, a round path"
_VARY = "oscillates, varies, fluctuates, oscillating, varying, fluctuating"
_HUNG = (
    "from a string, on a string, from a rope, on a rope, from a chain, on a chain, from a thread, on a thread"
)
_BIGGER = "bigger and smaller, larger and smaller, bigger then smaller, larger then smaller, smaller and bigger, smaller and larger"

_READ_AS = {
    "bounces": "bobs, bob, rebounds, ricochets, ricochet, springs, springs back, bounds, rises and falls, rise and fall",
    "bouncing": "bobbing, ricocheting, springing, springing back, bounding, trampolining, rising and falling, in a bouncing motion",
    "bouncing up and down": "up and down, down and up, up then down",
    "falls and rebounds": "falls, fall, drops, drop, plummets, plunges",
    "falling and rebounding": "falling, falling and bouncing, dropping, dropped, dropping and bouncing, plummeting, plunging",
    "slides": "ping pongs, ping pong",
    "sliding": "ping ponging",
    "slides from side to side": "crosses the screen from left to right",
    "sliding from side to side": f"{_TO_AND_FRO}, {_BETWEEN}, left right sliding, left right motion, left right movement, in a sliding motion",
    "swings like a pendulum": "pendulums",
    "swinging like a pendulum": "pendulum, like a pendulum, like a pendulum bob, like a pendulum s bob, like a clock pendulum, like a clock s pendulum, pendulum like, pendulum motion, in a swinging motion",
    "pulses": "beeps, beats like a heart, beats like a heartbeat, swells, swell, shrinks, shrink, grows, grow, expands, contracts",
    "pulsing": "beeping, beating like a heart, like a heart, like a heartbeat, heartbeat, swelling, shrinking, growing, expanding, contracting, scaling",
    "grows and shrinks": "scales up and down, zooms in and out, changes its size, changes in size",
    "growing and shrinking": "scaling up and down, zooming in and out, changing its size, changing in size",
    "orbits": "circles, twirls, twirl, swirls, swirl",
    "orbiting": "twirling, swirling",
    "going round and round": f"{_CIRCLES}, {_ORBITS}, rotation, in rotation, in constant rotation, in steady rotation",
    "stays still": "hovers, hover, stays where it is, holds still, hold still, stays, remains",
    "staying still": "hovering, staying, remaining still, holding still, keeping still, lying still, hanging still",
    "stands still": "stands, stands in place, stands there, hangs still",
    "standing still": "standing, standing in place, standing there",
    "sits still": "sits there",
    "sitting still": "sitting, sitting in place, sitting there",
    "does not move": "does not budge, doesn t budge, not budging, never budges",
    "motionless": "still, nothing moves, nothing is moving, without any movement, without any movements, with no movement, with no motion, paused",
    "fast": (
        "super fast, superfast, ultra fast, lightning fast, fast moving, fast paced, at full speed, at top speed, "
        "at great speed, at lightning speed, at breakneck speed, at maximum speed, at a fast speed, frenetically, frantic"
    ),
    "quickly": "quick moving, at a quick pace, at a rapid pace, at a rapid speed, in fast motion, hasty, hurried, rushed",
    "slowly": (
        "slow moving, slow paced, slow motion, slowmo, slow mo, slo mo, in slowmo, in slow mo, in slo mo, at low speed, "
        "at half speed, at a slow speed, at a leisurely pace, at a snail s pace, at a crawl"
    ),
    "on the left": "left side, left hand side, from the left",
    "on the right": "right side, right hand side, from the right, right of center, right of centre",
    "on the left side": "left of center, left of centre",
    "while it rains": "it rains, it is raining, rain falls, rain is falling, falling rain, rain falling, rain pouring down, it pours, it is pouring, rain patters, while rain patters, rain is pattering, pattering rain",
    "in the rain": "heavy rain, light rain, pouring rain, pouring, thunderstorm, in a thunderstorm, during a thunderstorm, during a storm",
    "on a rainy day": "rainy",
    "while the wind blows": "the wind blows, wind blows, wind blowing, wind is blowing, the wind is blowing, the wind howls, wind howls, wind howling, the wind is howling, howling wind, while the wind howls, as the wind howls",
    "on a windy day": "windy, winds, strong winds, stormy winds, strong wind, gusting wind, with a gusting wind, with a strong wind, wind blown, wind swept, windswept, hurricane, in a hurricane, during a hurricane",
    "black": "dark, pitch dark, midnight black, black space, black night",
    "on black": "in the dark, in darkness, in a dark room, in complete darkness, in total darkness",
    "gray": "granite, graphite, gunmetal, ash, ash gray, ash grey",
    "red": "brick red",
    "brown": "brick wall, brick background, brick backdrop, wall of bricks, soil brown, earthy brown, earth brown",
    "navy": "midnight sky, night sky, night blue, dark navy, dark navy blue",
    "ball": (
        "marble, balloon, bubble, soccer ball, tennis ball, marbles, balloons, bubbles, soccer balls, tennis balls, orbs, globes, "
        "beads, footballs, basketballs, rubber balls, beach balls, ping pong ball, ping pong balls, golf ball, golf balls, "
        "baseball, volleyball, snooker ball, billiard ball, bowling ball, cannonball, planet, planets, coin, coins"
    ),
    "square": "four sided shape, box shaped, cube shaped, crates, brick, bricks",
    "triangle": "three sided shape, arrowheads, cone, cones, traffic cone, traffic cones",
    "star": (
        "five pointed shape, five pointed figure, five pointed thing, five pointed object, five point star, 5 point star, 5 pointed star, five pointed stars, pentagrams, starlets, pentacles, asterisks, "
        "star shapes"
    ),
    "background": "bg, canvas",
}


# verbs, ways that they go, and the motion that this is: after "it", after "is"
_WAYS = (
    (f"{_MOVE}, {_SLIDE}", f"{_TO_AND_FRO}, {_ONE_WAY}", "slides", "sliding"),
    (
        _RICOCHET,
        f"{_TO_AND_FRO}, {_BETWEEN}, off the walls, off walls, off the side walls, off the left and right walls, "
        "off both walls, off both side walls, off the edges, off the sides, against the walls, against both walls, into the walls, "
        "horizontally, sideways, across the screen, across the frame",
        "slides",
        "sliding",
    ),
    (
        "rebounds, rebounding, reflects, reflecting",
        f"{_SIDES}, left and right, off the walls, off walls, off both walls, off the side walls",
        "slides",
        "sliding",
    ),
    (_SWING, f"{_TO_AND_FRO}, like a pendulum", "swings", "swinging"),
    (f"{_SWING}, dangles, dangling", _HUNG, "swings", "swinging"),
    (_HIT, _FLOOR, "bounces", "bouncing"),
    (_RISE, "off the floor, off the ground, off a floor, off the bottom", "bounces", "bouncing"),
    (_HIT, _WALLS, "slides", "sliding"),
    (_MOVE, _CIRCLES, "orbits", "orbiting"),
    (_TURN, "around, round", "orbits", "orbiting"),
    (f"{_MOVE}, {_RISE}", "up and down, down and up, vertically", "bounces", "bouncing"),
    (_MOVE, "like the hand of a clock, like the hands of a clock, like a clock hand", "orbits", "orbiting"),
    (_DRAW, f"{_CIRCLE}, {_PATH}", "orbits", "orbiting"),
    ("follows, following", _PATH, "orbits", "orbiting"),
    (_BECOME, _BIGGER, "pulses", "pulsing"),
    (_VARY, "in size", "pulses", "pulsing"),
)


def ways() -> dict[str, str]:
    """By each phrase that training never said: the words of training that it is read as."""
    read_as = {phrase: words for words, phrases in _READ_AS.items() for phrase in phrases.split(", ")}
    for verbs, ends, finite, gerund in _WAYS:
        for verb, end in product(verbs.split(", "), ends.split(", ")):
            read_as[f"{verb} {end}"] = gerund if verb.endswith("ing") else finite
    for said, grow, shrink in zip(("pulses", "pulses", "pulsing"), _GROW, _SHRINK, strict=True):
        for one, other in product(grow.split(", "), shrink.split(", ")):
            pairs = product((f"{one} {{}} {other}", f"{other} {{}} {one}"), ("and", "then"))
            read_as |= {pair.format(link): said for pair, link in pairs}
    # "a dark red ball" is red, and what is still bouncing bounces
    for color in (word for name in (*world.COLORS, *world.BACKGROUNDS) for word in language.WORDS[name]):
        read_as[f"dark {color}"] = color
    moving = (word for motion, words in language.GERUND.items() if motion != "still" for word in words)
    return read_as | {f"still {word}": word for word in moving}
