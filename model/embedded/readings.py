"""How prompts are read that use other words or forms than training did: each as words that it used.

The model learns the words of `language`; a reader of English knows more of them, and other forms of the same. What
stands in neither is reported as unknown. Nothing here says what the world cannot show: pink stays unknown. Nor are
nouns read that a sentence about something else has: a rock, the beat, the rest.
"""

from dataclasses import replace

from ..text.tokenizer import WordTokenizer
from . import language, world
from .ways import ways

# words to read, then what is read as them, by commas; the longest that fits counts
_READ_AS = {
    # colours
    "red": "reddish, cherry, vermilion, cardinal, bloodred, cherry red, ruby red, fire engine red",
    "green": "greenish, lime, lime green, forest green, grass green, emerald green, verdant",
    "blue": "bluish, cerulean, ultramarine, royal blue, electric blue, sapphire blue, cobalt blue",
    "yellow": "yellowish, canary, canary yellow, lemon yellow, sunny yellow, gold, golden yellow",
    "white": "whitish, snow white, chalk, chalky, alabaster, pearl, pearly, ivory white, milky",
    "purple": "purplish, lavender, mauve, plum, amethyst, violet purple",
    "orange": "orangish, orangey, pumpkin, apricot, tangerine orange, amber orange",
    "cyan": "aquamarine, cyan blue, turquoise blue, aqua blue",
    # shapes
    "ball": "balls, orb, globe, bead, football, basketball, rubber ball, beach ball, roundel",
    "circle": "circles shape, circular shape, circular, round shape, round thing, round object, discs, disks, spheres, dots",
    "square": "squares, squarish, square shaped, crate, cubes, boxes, tiles, blocks, dice, quadrate",
    "triangle": "triangles, triangular, triangle shaped, triangular shape, pyramids, arrowhead, wedges, trigon",
    "star": "stars, star shaped, star shape, five pointed star, starfish, pentacle, asterisk",
    # backgrounds
    "gray": "greyish, grayish, charcoal, stone gray, stone grey",
    "black": "blackish, ebony, onyx, coal black, ink black, inky",
    "brown": "brownish, chestnut, cocoa, mahogany, umber, chocolate brown, coffee brown",
    "navy": "navyblue, deep blue",
    # motions: as verbs, then after "is" or before the noun
    "bounces": "bounce, bounced, rebound, dribble, dribbles, dribbled, leap, leaps, leaped, leapt, bounces off the ground",
    "hops": "hop, hopped, skip, skips, skipped",
    "bounces up and down": "bounce up and down, bounced up and down, leap up and down, leaps up and down, springs up and down",
    "jumps up and down": "jump up and down, jumped up and down, jumps, jump, jumped",
    "falls and rebounds": "fall and rebound, drops and rebounds, drop and rebound, falls and bounces, falls and bounces back",
    "bouncing": "bouncy, rebounding, dribbling, leaping, springing up and down",
    "hopping": "skipping",
    "jumping up and down": "jumping, leaping up and down",
    "slides": "slide, slid, rolls, roll, rolled, drift, drifts, drifted, shuttle, shuttles, skate, skates, skids",
    "glides": "glide, glided, glid",
    "slides from side to side": (
        "slide from side to side, slides left and right, slide left and right, slides back and forth, slide back and forth, "
        "slides from left to right, slide from left to right, slides left to right, slides to and fro, moves from side to side, "
        "move from side to side, moves left and right, move left and right, moves back and forth, moves left to right, "
        "moves from left to right, moves to and fro, rolls back and forth, rolls from side to side, rolls from left to right, "
        "slides across the screen, slides across the frame, moves across the screen, moves across the frame, moves sideways, "
        "moves horizontally, slides sideways, slides horizontally, slides across, moves across, drifts from side to side, "
        "drifts left and right, goes from side to side, goes left and right, goes from left to right"
    ),
    "moves from wall to wall": "move from wall to wall, moves between the walls, slides between the walls, bounces between the walls",
    "travels left and right": "travel left and right, travels from left to right, travels from side to side, travels back and forth",
    "sliding": "rolling, drifting, shuttling, skating, skidding",
    "sliding from side to side": (
        "sliding left and right, sliding back and forth, sliding from left to right, sliding left to right, "
        "sliding to and fro, moving from side to side, moving left and right, moving back and forth, moving left to right, "
        "moving from left to right, moving to and fro, rolling back and forth, rolling from side to side, "
        "rolling from left to right, sliding across the screen, sliding across the frame, moving across the screen, "
        "moving across the frame, moving sideways, moving horizontally, sliding sideways, sliding horizontally, "
        "sliding across, moving across, drifting from side to side, going from side to side, going left and right"
    ),
    "moving from wall to wall": "moving between the walls, sliding between the walls, bouncing between the walls",
    "travelling left and right": (
        "traveling left and right, travelling from left to right, traveling from left to right, travelling from side to side, "
        "traveling from side to side, traveling back and forth, travelling back and forth"
    ),
    "swings": "swing, swung, dangle, dangles, dangled, oscillate, oscillates, oscillated, rocks, rocked",
    "sways": "sway, swayed",
    "swings like a pendulum": "swing like a pendulum, moves like a pendulum, move like a pendulum, pendulates",
    "swings back and forth": (
        "swing back and forth, swings from side to side, swing from side to side, swings left and right, rocks back and forth, "
        "rocks from side to side, sways from side to side, sways back and forth, oscillates back and forth"
    ),
    "swinging": "dangling, oscillating, rocking",
    "swinging like a pendulum": "moving like a pendulum, hanging like a pendulum",
    "swinging back and forth": (
        "swinging from side to side, swinging left and right, rocking back and forth, rocking from side to side, "
        "swaying from side to side, swaying back and forth, oscillating back and forth"
    ),
    "pulses": "pulse, pulsed, beats, breathe, breathes, breathed, thump, thumps",
    "pulsates": "pulsate, pulsated",
    "throbs": "throb, throbbed",
    "grows and shrinks": (
        "grow and shrink, grew and shrank, shrinks and grows, shrink and grow, swells and shrinks, swell and shrink, "
        "grows bigger and smaller, gets bigger and smaller, get bigger and smaller, gets larger and smaller, "
        "grows larger and smaller, becomes bigger and smaller, inflates and deflates, inflate and deflate, changes size"
    ),
    "expands and contracts": "expand and contract, contracts and expands, expands and shrinks",
    "pulsing": "beating, breathing, thumping",
    "growing and shrinking": (
        "shrinking and growing, swelling and shrinking, getting bigger and smaller, growing bigger and smaller, "
        "getting larger and smaller, growing larger and smaller, inflating and deflating, changing size"
    ),
    "expanding and contracting": "contracting and expanding, expanding and shrinking",
    "orbits": "orbit, orbited, rotate, rotates, rotated, spin, spins, spun, whirl, whirls, whirled, loops, loop",
    "revolves": "revolve, revolved",
    "orbits the centre": "orbit the centre, orbit the center, orbits around the center, orbits around the centre, orbits in circles",
    "circles around the center": (
        "circle around the center, circle around the centre, circles the center, circles the centre, circle around, circles around, "
        "circled around, spins around the center, revolves around the center, rotates around the center, "
        "revolves around the centre, rotates around the centre, goes around the center, moves around the center, travels around the center"
    ),
    "goes round and round": (
        "go round and round, goes in circles, go in circles, goes in a circle, moves in circles, moves in a circle, move in a circle, "
        "travels in a circle, moves around in a circle, moves around in circles, runs in circles, goes around in circles, "
        "goes around, goes around and around, spins around, spins round, turns in circles"
    ),
    "orbiting": "rotating, spinning, whirling, looping, circling",
    "circling around the centre": (
        "circling the center, circling the centre, circling around, spinning around the center, revolving around the center, "
        "rotating around the center, revolving around the centre, rotating around the centre, moving around the center, orbiting around the center"
    ),
    "going round and round": (
        "going in circles, going in a circle, moving in circles, moving in a circle, travelling in a circle, traveling in a circle, "
        "running in circles, going around in circles, going around, going around and around, spinning around, spinning round"
    ),
    "stays still": "stay still, stayed still, keeps still, keep still, stays put, stay put, stays in place, remains still, remain still",
    "sits still": "sit still, sits there, sits in place, sat still, sits",
    "stands still": "stand still, stood still, freezes",
    "rests": "rested, is at rest, at rest, lies still",
    "does not move": "doesn t move, do not move, don t move, never moves, did not move, isn t moving, won t move, can t move, cannot move, doesnt move, isnt moving, does nothing",
    "remains motionless": "remain motionless, stays motionless, remains static, stays static, remains in place",
    "motionless": "stationary, immobile, unmoving, frozen, idle, inert, without moving, without any motion, without motion, fixed in place, no motion, no movement, without movement, not in motion, no longer moving",
    # tempo
    "slowly": "slow, slower, very slow, leisurely, unhurriedly, sluggishly, calmly, in slow motion, at a low speed, unhurried, sluggish",
    "gently": "gentle, softly",
    "lazily": "lazy",
    "quickly": "quick, quicker, speedily, speedy, briskly, brisk, hurriedly, hastily, energetically, at high speed, at a high speed, at speed",
    "fast": "faster, very fast, frantically, furiously",
    "rapidly": "rapid",
    "swiftly": "swift",
    # places
    "on the left": "to the left side, on the left hand side, at the left side, in the left half, leftmost, on the far left",
    "on the right": "to the right side, on the right hand side, at the right side, at the right, in the right half, rightmost, on the far right",
    # ambience
    "in the rain": "in rain, in a rainstorm, in the pouring rain, in heavy rain, in light rain, during rain, under the rain, with rain",
    "while it rains": "while it is raining, as it rains, while rain falls, while rain is falling, with rain falling",
    "in rainy weather": "in wet weather, raining, rainfall, drizzle, downpour, rainstorm",
    "in the wind": "in wind, in a strong wind, in the strong wind, in a breeze, in the breeze, during wind, with wind, in a gale",
    "while the wind blows": "while wind blows, while the wind is blowing, as the wind blows, with the wind blowing, with wind blowing",
    "in windy weather": "breezy, blustery, breeze, gale, gusts, gusty",
    # nothing that the model shows
    "": "five pointed, shaped, animated, in the middle, in the centre of the frame, in the center of the frame, in the middle of the frame",
}


def with_newest_readings(tokenizer: WordTokenizer) -> WordTokenizer:
    """A tokenizer of these words that reads others as this version does, which may know more of them than its file did.

    One of another vocabulary is left as it is.
    """
    own = tuple(language.vocabulary()), frozenset(language.content_words())
    if (tokenizer.vocabulary, tokenizer.content) != own:
        return tokenizer
    return replace(tokenizer, readings=all_readings(), kinds=kinds())


def all_readings() -> dict[str, str]:
    """By each word or phrase of a free prompt: the words of training that it is read as, none of what says nothing of the object."""
    return ways() | readings() | asides()


def readings() -> dict[str, str]:
    """By each word or phrase that training never said: those that it is read as; what training said stays as it is."""
    read_as = {phrase: words for words, phrases in _READ_AS.items() for phrase in phrases.split(", ")}
    said = (
        language.WORDS,
        language.FINITE,
        language.GERUND,
        language.TEMPO,
        language.PLACE,
        language.AMBIENCE,
    )
    kept = {phrase for group in said for forms in group.values() for phrase in forms if " " in phrase}
    return read_as | {phrase: phrase for phrase in sorted(kept)}


_AUXILIARIES = "is are was were do does did has have had wo would ca could should"
_STILL = "static, still, fixed, steady, stationary, motionless, unmoving, immobile, locked, locked off"
_RESTS = "does not move, not moving, is not moving, rests, is at rest, stays in place, stays put"
# what negations are made of, and what says of the world only what is always so
_NOTHING = (
    "but, at all, instead of, rather than, in the center, in the centre, at the center, at the centre, in the very middle, "
    "centered, centred, in place, on the spot, in mid air, clockwise, at normal speed, at a normal pace, at a steady pace, "
    "other than, anything but, apart from, aside from, "
    "nothing else moves, golden hour, solid, pure, uniform, flat, lone, single, completely, perfectly, absolutely, totally, "
    "entirely, repeatedly, continuously, constantly, endlessly, steadily, rhythmically, over and over, again and again, "
    "at constant speed, at a constant speed, with constant speed, in a straight line, can you, could you, would you, animate, produce, whose, something, "
    "each, every, when, whenever, keep, keeps, keeps on, once more, again, seamless, seamlessly, looped, right side up, colour, color, motion, center, centre, middle"
)


def asides() -> dict[str, str]:
    """What says nothing of the object, to be read as nothing: of the camera, the rest of the picture, contractions and the like.

    Not for training, whose prompts have words such as "camera" strewn in, anywhere.
    """
    still = _STILL.split(", ")
    views = ["camera", "shot", "view", "frame", "angle", "background"]
    phrases = [
        f"{word} {view}" for word in still for view in (*views, "camera shot", "camera view", "camera angle")
    ]
    verbs = ("is", "stays", "remains", "keeps", "stands", "sits", "holds")
    stays = [*still, *(f"{verb} {word}" for verb in verbs for word in still)]
    moves = _READ_AS["does not move"].split(", ") + _READ_AS["motionless"].split(", ")
    moves += _RESTS.split(", ")
    for view in views[:4] + views[-1:]:
        phrases += [f"{view} {that}{rest}" for that in ("", "that ", "which ") for rest in (*stays, *moves)]
    pictures = ["frame", "picture", "image", "scene", "screen", "video", "clip", "shot"]
    phrases += [f"{rest} of the {whole}" for rest in ("rest", "the rest") for whole in pictures]
    moving = ("movement", "motion", "movements")
    for no in ("no", "without", "without any"):
        phrases += [f"{no} camera {move}" for move in moving]
        phrases += [f"{no} {move} {of}" for move in moving for of in ("of the camera", "in the background")]
        phrases += [f"{no} blur"]
    phrases += [
        *(
            f"{no} {move} the camera"
            for no in ("don t", "do not")
            for move in ("move", "pan", "tilt", "zoom")
        ),
        *_NOTHING.split(", "),
        "s",
        "d",
        "m",
        "re",
        "ll",
        "ve",
        *(f"{verb}n t" for verb in _AUXILIARIES.split()),
        "can t",
    ]
    return dict.fromkeys(phrases, "")


def kinds() -> dict[str, dict[str, str]]:
    """What trained phrases stand for: by "colour" and so on, the name of each phrase's meaning."""
    named = {
        kind: {phrase: name for name in names for phrase in language.WORDS[name]}
        for kind, names in (
            ("colour", world.COLORS),
            ("shape", world.SHAPES),
            ("background", world.BACKGROUNDS),
        )
    }
    forms = (language.FINITE, language.GERUND)
    named["motion"] = {phrase: motion for said in forms for motion in said for phrase in said[motion]}
    for kind, phrases, usual in (
        ("ambience", language.AMBIENCE, "none"),
        ("tempo", language.TEMPO, "normal"),
        ("place", language.PLACE, "center"),
    ):
        named[kind] = {phrase: name for name in phrases if name != usual for phrase in (*phrases[name], name)}
    return named
