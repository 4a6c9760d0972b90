"""Free prompts whose words mean something else beside others: each is read as what it says, and what cannot be shown is told."""

import json

import pytest

from lockstep.model.checkpoint.header import read_header
from lockstep.model.embedded import WEIGHTS, config
from lockstep.model.embedded.pack import tokenizer_entry
from lockstep.model.embedded.prompts import tokenizer
from lockstep.model.embedded.readings import all_readings, with_newest_readings
from lockstep.model.engine import Engine
from lockstep.model.text.tokenizer import Tokens, WordTokenizer

_LEFT_OUT = "the model knows no negation, this is left out: say what is to be seen instead"
_CAMERA = "the model's camera does not move, this is left out"
_ONE = "the model shows one object"


def encode(prompt: str) -> Tokens:
    """A prompt as the shipped file's own words read it."""
    return WordTokenizer.from_json(tokenizer_entry(), config.TEXT_LENGTH).encode(prompt)


def shown_by(prompt: str) -> list[str]:
    """The words of a prompt that mean something to the model."""
    words = tokenizer()
    said = [words.vocabulary[number - 2] for number in encode(prompt).ids.tolist() if number > 1]
    return [word for word in said if word in words.content]


def assert_shows(prompt: str, shown: str, *doubts: str, unknown: tuple[str, ...] = ()) -> None:
    """Of a prompt is read what means something in `shown`, in that order; filler counts in neither."""
    tokens = encode(prompt)
    assert shown_by(prompt) == shown.split()
    assert tokens.doubts == doubts
    assert tokens.unknown == unknown


def test_the_shipped_file_has_the_code_s_words_and_an_engine_its_newest_readings():
    metadata, newest = read_header(WEIGHTS).metadata, json.loads(tokenizer_entry())
    shipped = json.loads(metadata["tokenizer"])
    assert (shipped["words"], shipped["content"]) == (newest["words"], newest["content"])
    assert metadata["model_version"] == config.VERSION
    read = Engine("embedded", "cpu").tokenizer
    assert isinstance(read, WordTokenizer)
    assert (read.readings, read.kinds) == (all_readings(), newest["kinds"])


def test_of_another_vocabulary_the_file_s_own_readings_count():
    other = WordTokenizer(("ball", "red"), frozenset(["red"]), 8, {"crimson": "red"})
    assert with_newest_readings(other) is other


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a blue right triangle bounces on black", "blue triangle bounces black"),
        ("right-angled triangle, blue", "triangle blue"),
        ("a right-angle triangle swings on navy", "triangle swings navy"),
        ("a red ball right in the middle bounces", "red ball bounces"),
        ("the ball is right at the center", "ball"),
        ("a red ball is right there, bouncing", "red ball bouncing"),
        ("what is left is a red ball", "red ball"),
        ("a red ball has left the frame", "red ball"),
        ("all right, show me a blue star that orbits", "blue star orbits"),
        ("a star is right side up", "star"),
        # places
        ("a red ball on the right", "red ball right"),
        ("a red ball to the left", "red ball left"),
        ("left: a red ball", "left red ball"),
        ("red ball right on gray background", "red ball right gray"),
        ("a star bounces, right", "star bounces right"),
        ("the right ball bounces", "right ball bounces"),
    ],
)
def test_left_and_right_are_places_only_where_they_name_one(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "shown", "unknown"),
    [
        ("a ball bounces right now", "ball bounces", ("now",)),
        ("a triangle pointing right bounces", "triangle bounces", ("pointing",)),
        ("a left-handed star", "star", ("handed",)),
        ("a ball bounces at the right moment", "ball bounces", ("moment",)),
        ("a star that was left behind pulses on black", "star pulses black", ("behind",)),
    ],
)
def test_words_beside_left_and_right_may_stay_unknown(prompt, shown, unknown):
    assert_shows(prompt, shown, unknown=unknown)


@pytest.mark.parametrize(
    ("prompt", "shown", "denied"),
    [
        ("a red ball that is not entirely still, on gray", "red ball gray", "not entirely still"),
        ("a green ball, not perfectly still", "green ball", "not perfectly still"),
        ("not a single blue square, a star", "star", "not a single blue square"),
        ("not even one red star, a blue ball", "blue ball", "not even one red star"),
        ("a ball that's not constantly bouncing", "ball", "not constantly bouncing"),
        ("a star, not at all blue", "star", "not at all blue"),
        ("a star, not fully white", "star", "not fully white"),
        ("a star that doesn't constantly pulse", "star", "doesn't constantly pulse"),
        ("a red ball does not move fast on gray", "red ball gray", "does not move fast"),
        ("a red ball isn't moving quickly", "red ball", "isn't moving quickly"),
        ("a red ball is not moving to the left", "red ball", "not moving to the left"),
        ("a ball does not quickly move", "ball", "does not move quickly"),
        ("a star does not move up and down", "star", "does not move up and down"),
        ("a ball that is not wildly moving", "ball", "not wildly moving"),
        ("a ball doesn't go fast, it bounces slowly", "ball bounces slowly", "doesn't go fast"),
        ("a ball does not move fast and bounces", "ball bounces", "does not move fast"),
        ("a non-blue ball bounces", "ball bounces", "non blue"),
        ("a star pulses, except on the left", "star pulses", "except on the left"),
    ],
)
def test_a_negation_reaches_what_it_denies(prompt, shown, denied):
    assert_shows(prompt, shown, f"says '{denied}': {_LEFT_OUT}")


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a red ball not moving", "red ball moving"),
        ("a ball doesn't really move", "ball move"),
        ("a ball does not move at all", "ball move"),
        ("a ball does not move on the left", "ball move left"),
        ("a ball does not move in the rain", "ball move rain"),
        ("a ball that is completely not moving", "ball moving"),
        ("not in the center but on the left, a ball", "left ball"),
    ],
)
def test_what_does_not_move_is_still(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "shown", "said"),
    [
        ("an orbiting camera shot of a red star on black", "red star black", "orbiting camera"),
        ("orbiting camera around a white square", "white square", "orbiting camera"),
        ("spinning camera, blue star", "blue star", "spinning camera"),
        ("a bouncing ball, slowly rotating camera", "bouncing ball", "slowly rotating camera"),
        ("camera that orbits a white ball", "white ball", "camera that orbits"),
        ("orbit shot of a blue triangle", "blue triangle", "orbit shot"),
        ("a tracking shot of a sliding ball", "sliding ball", "tracking shot"),
        ("a bouncing ball camera pans left", "bouncing ball", "camera pans left"),
        ("a ball bouncing camera zooms in", "ball bouncing", "camera zooms"),
        ("a ball bounces, camera tilts up slowly", "ball bounces", "camera tilts up slowly"),
        ("a ball bounces, the camera pushes in quickly", "ball bounces", "camera pushes in quickly"),
        ("a ball bounces, filmed from the left", "ball bounces", "filmed from the left"),
    ],
)
def test_what_the_camera_does_is_not_done_by_the_object(prompt, shown, said):
    assert_shows(prompt, shown, f"says '{said}': {_CAMERA}")


@pytest.mark.parametrize(
    ("prompt", "shown", "doubts"),
    [
        (
            "red circles and a blue square on black",
            "red circle blue square black",
            (
                "names two colours, red and blue: the model shows one object of one colour",
                f"names two shapes, circles and square: {_ONE}",
            ),
        ),
        (
            "black circles on gray",
            "black circle gray",
            (
                "names two backgrounds, black and gray: the model shows one, and no object of such a colour",
                f"names several things, circles: {_ONE}",
            ),
        ),
        ("circles on black", "circle black", (f"names several things, circles: {_ONE}",)),
        (
            "small circles, green, on brown",
            "circle green brown",
            (f"names several things, small circles: {_ONE}",),
        ),
        ("a red ball and circles", "red ball circle", (f"names several things, circles: {_ONE}",)),
        ("red circles on black", "red circle black", (f"names several things, red circles: {_ONE}",)),
        (
            "many red circles around the center",
            "red circle",
            (f"names several things, many red circles around the center: {_ONE}",),
        ),
        ("the ball slowly circles on black", "ball slowly orbits black", ()),
        ("a star that circles on gray", "star orbits gray", ()),
        ("a star on a black background circles", "star black orbits", ()),
        ("a ball that is red and circles", "ball red orbits", ()),
        ("it circles on black", "orbits black", ()),
        ("a red ball, circles", "red ball orbits", ()),
        ("a disc circles around the center", "disc circles center", ()),
    ],
)
def test_circles_are_things_unless_one_does_it(prompt, shown, doubts):
    assert_shows(prompt, shown, *doubts)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("looping animation of a red ball on black", "red ball black"),
        ("seamless loop of a red ball bouncing", "red ball bouncing"),
        ("perfect loop, a red ball", "red ball"),
        ("a looping video of a star", "star"),
        ("a seamlessly looping clip of a green star pulsing", "green star pulsing"),
        ("a red ball bouncing on gray, looping", "red ball bouncing gray"),
        ("a ball bounces, loops seamlessly", "ball bounces"),
        ("a red ball bounces in a loop", "red ball bounces"),
        ("a red ball loops", "red ball orbits"),
        ("a looping red ball", "orbiting red ball"),
    ],
)
def test_a_clip_that_loops_is_no_orbit(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a red ball swings in a gentle breeze", "red ball swings windy"),
        ("a blue star orbits in gentle rain", "blue star orbits rain"),
        ("a star in a slow gentle rain", "star rain"),
        ("a fast wind blows over a red ball that swings", "wind blows red ball swings"),
        ("a star pulses as the wind gently blows", "star pulses wind blows"),
        ("a ball bounces and rain falls slowly", "ball bounces rains"),
        ("a ball bounces, the wind is fast", "ball bounces wind"),
        ("the gently falling rain, a red ball bounces fast", "rains red ball bounces fast"),
        ("a ball gently swings in the rain", "ball gently swings rain"),
        ("a ball swings gently in the wind", "ball swings gently wind"),
        ("a ball swings fast in the rain", "ball swings fast rain"),
        ("a slow red ball in the rain", "slowly red ball rain"),
    ],
)
def test_the_pace_of_weather_is_not_that_of_the_object(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a round red thing bounces on black", "red ball bounces black"),
        ("a round blue object swings", "blue ball swings"),
        ("a big round green shape on gray", "green ball gray"),
        ("an object that is round and blue bounces", "ball blue bounces"),
        ("a round red ball", "red ball"),
        ("a round blue square", "blue square"),
        ("something red and round goes up and down", "red ball bounces"),
        ("orange, round, bounces", "orange ball bounces"),
        ("a red square, round, bounces", "red square bounces"),
    ],
)
def test_round_things_are_balls(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "shown", "said", "thing"),
    [
        ("a red ball bouncing, no sound", "red ball bouncing", "no sound", "sound"),
        ("silent clip of a bouncing ball", "bouncing ball", "silent", "sound"),
        ("a clip without sound of a ball bouncing", "ball bouncing", "without sound", "sound"),
        ("the red ball bounces silently", "red ball bounces", "silently", "sound"),
        ("without any audio, a star pulses", "star pulses", "without any audio", "sound"),
        ("a ball bounces, it doesn't make a sound", "ball bounces", "doesn't make a sound", "sound"),
        ("a red ball, no background", "red ball", "no background", "background"),
        ("without a background, a red ball", "red ball", "without a background", "background"),
    ],
)
def test_sound_and_background_are_there_all_the_same(prompt, shown, said, thing):
    assert_shows(prompt, shown, f"says '{said}': every clip of the model has a {thing}, this is left out")


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a red ball stays still, no sound", "red ball stays still"),
        ("no sound of the rain, a ball bounces", "ball bounces"),
        ("not the background but the ball is red", "ball red"),
        ("a red ball bounces with sound", "red ball bounces"),
    ],
)
def test_nothing_is_told_of_a_silence_that_there_is(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("wind and rain, a green star swings", "wind and rain"),
        ("a ball bounces on a rainy and windy day", "rainy and windy"),
        ("a ball in the wind and the rain", "in the wind and rain"),
        ("a ball in the rain while the wind blows", "in the rain and while the wind blows"),
    ],
)
def test_two_kinds_of_weather_are_told(prompt, said):
    assert encode(prompt).doubts == (f"names two ambiences, {said}: the model sounds one",)


@pytest.mark.parametrize("prompt", ["wind in windy weather, a star", "rain but no wind, a star"])
def test_one_kind_of_weather_is_not(prompt):
    assert encode(prompt).doubts == ()


@pytest.mark.parametrize(
    ("prompt", "shown", "said"),
    [
        ("red balls bounce on gray", "red ball bounces gray", "red balls"),
        ("two red balls bounce", "red ball bounces", "two red balls"),
        ("a pair of stars", "star", "pair of stars"),
        ("many small cubes slide on black", "square slides black", "many small cubes"),
        ("a dozen marbles bounce", "ball bounces", "dozen marbles"),
        ("pentagrams on black", "star black", "pentagrams"),
        ("balls loop", "ball orbits", "balls"),
    ],
)
def test_plurals_are_told(prompt, shown, said):
    assert_shows(prompt, shown, f"names several things, {said}: {_ONE}")


@pytest.mark.parametrize(
    "prompt", ["a star's colour is red", "the ball circles", "a ball bounces, swings past"]
)
def test_words_that_only_look_plural_are_not(prompt):
    assert not any("several things" in doubt for doubt in encode(prompt).doubts)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a green star on black, no motion blur", "green star black"),
        ("a red ball bounces without motion blur", "red ball bounces"),
        ("a red ball on gray, no blur", "red ball gray"),
        ("a red ball bounces with a thump", "red ball bounces"),
        ("a ball bounces on rocks", "ball bounces"),
        ("a square slides over the rocks", "square slides"),
        ("static wide shot of a bouncing ball", "bouncing ball"),
        ("static close-up of a bouncing ball", "bouncing ball"),
        ("static high-angle view, a ball swings", "ball swings"),
        ("a red ball stays on the left and pulses", "red ball left pulses"),
        ("a ball remains red while bouncing", "ball red bouncing"),
        ("a ball stays in the middle of the frame, spinning", "ball orbiting"),
        ("a star sits on the right and pulses", "star right pulses"),
        # what is motion or stillness as it stands
        ("the ball rocks", "ball swings"),
        ("a red ball in the rain falls", "red ball rain falls rebounds"),
        ("a star beats", "star pulses"),
        ("a ball, static", "ball static"),
        ("a ball still up there", "ball motionless"),
        ("a red ball stays on the left", "red ball stays still left"),
        ("a green star, no motion", "green star motionless"),
    ],
)
def test_nouns_and_framings_and_what_stays_are_told_from_motions(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a red ball as bright as a star bounces on gray", "red ball bounces gray"),
        ("a square bouncing like a basketball", "square bouncing"),
        ("a star, as round as a big red ball, pulses", "star pulses"),
        ("like a star, a ball orbits", "ball orbits"),
        # the one thing that is named
        ("it is red and bounces like a ball", "red bounces ball"),
        ("a thing shaped like a star orbits", "star orbits"),
        ("as a ball bounces on gray, it rains", "ball bounces gray rains"),
    ],
)
def test_what_a_thing_is_likened_to_is_no_second_one(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "shown", "denied"),
    [
        ("not a square but like a ball, it pulses", "ball pulses", "not a square"),
        ("no big red square, it is like a ball, pulses", "ball pulses", "no big red square"),
        ("a star that does not swing, moving side to side", "star sliding", "not swing"),
    ],
)
def test_what_is_denied_takes_nothing_from_what_is_said(prompt, shown, denied):
    assert_shows(prompt, shown, f"says '{denied}': {_LEFT_OUT}")


def test_what_looks_like_another_thing_is_told():
    doubt = f"names two shapes, ball and star: {_ONE}"
    assert_shows("a ball looking like a star bounces", "ball star bounces", doubt, unknown=("looking",))


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a star swinging slowly from left to right", "star swinging slowly"),
        ("a star, from side to side, swings", "star swings"),
        ("a star moving side to side like a pendulum", "star swinging pendulum"),
        ("a star from side to side", "star sliding"),
        ("a star that swings on the left", "star swings left"),
        ("a star, gently, to and fro, swinging", "star gently swinging"),
    ],
)
def test_from_side_to_side_goes_what_swings_too(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a green cube up and down", "green cube bouncing"),
        ("a green cube back and forth", "green cube sliding"),
        ("a green cube, to and fro", "green cube sliding"),
        ("a green cube pulses back and forth, up and down", "green cube pulses"),
        ("a green cube hops back and forth", "green cube hops"),
        ("a white ball does not bounce, it goes back and forth", "white ball slides"),
    ],
)
def test_ways_that_many_motions_go_say_one_only_by_themselves(prompt, shown):
    assert shown_by(prompt) == shown.split()
    assert not any("two motions" in doubt for doubt in encode(prompt).doubts)


def test_a_way_that_the_motion_does_not_go_is_told():
    said = "names two motions, slides and up and down"
    assert any(doubt.startswith(said) for doubt in encode("a green cube slides up and down").doubts)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a red ball rolls around in circles", "red ball going"),
        ("a red ball rolling slowly around the centre", "red ball slowly going"),
        ("a white square moves along a circle", "white square going"),
        ("a white square in a circular orbit", "white square going"),
        ("a star moves between both walls", "star sliding"),
        ("a star goes up, then down", "star bouncing"),
        ("a star slides in the rain", "star slides rain"),
        ("a star slides in a loop", "star slides"),
    ],
)
def test_a_way_needs_no_verb_and_says_what_its_verb_does(prompt, shown):
    assert_shows(prompt, shown)


def test_what_moves_in_the_dark_does_so_in_no_known_way():
    assert_shows("a square moves in the dark", "square black", unknown=("moves",))


def test_a_drum_is_unknown_and_its_beats_are_no_pulse():
    assert_shows("a red ball slides to the beats of a drum", "red ball slides", unknown=("drum",))


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a ball of red colour orbits around the centre of the screen", "ball red orbits centre"),
        ("a ball, color red", "ball red"),
        ("a red ball in motion", "red ball"),
        ("I'd like a red ball", "red ball"),
        ("I'm to see a ball bounce at the center of the frame", "ball bounces"),
    ],
)
def test_filler_is_not_called_unknown(prompt, shown):
    assert_shows(prompt, shown)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a green triangle drops", "green triangle falls rebounds"),
        ("a yellow ball hovers on a black canvas", "yellow ball stays still black"),
        ("red cube bounces off walls", "red cube slides"),
        ("a blue ball bouncing off the floor, heavy rain", "blue ball bouncing rain"),
        ("white star oscillates like a clock pendulum", "white star swings swinging pendulum"),
        ("an emerald cube going from one edge to the other", "emerald cube sliding"),
        ("a red square bouncing between left and right", "red square sliding"),
        ("a ball that ricochets off both side walls", "ball slides"),
        ("a red ball bumps into the left wall and the right wall", "red ball slides"),
        ("a cyan square goes left, then right, on black", "cyan square slides black"),
        ("a blue ball traces a circle", "blue ball orbits"),
        ("a blue ball following a circular path", "blue ball orbiting"),
        ("a star rotating about the center", "star orbiting going"),
        ("a green star moves like the hands of a clock", "green star orbits"),
        ("make a circle pulse", "circle pulses"),
        ("a lilac triangle oscillating in size", "lilac triangle pulsing"),
        ("nothing moves, a red ball", "motionless red ball"),
        ("a white star pulses while the wind howls", "white star pulses wind blows"),
        ("a ball keeps bouncing again and again", "ball bouncing"),
        ("a ball keeps still", "ball stays still"),
        ("an orb springs repeatedly from the ground", "ball bounces"),
        ("a square on springs slides", "square slides"),
        ("a yellow sphere rising and falling on granite", "yellow sphere bouncing gray"),
        ("a teal triangle ping-pongs horizontally", "teal triangle slides"),
        ("a cyan box hits one wall then the other", "cyan box slides"),
        ("the ruby disc wheels around", "ruby disc orbits"),
        ("a tangerine triangle pendulums", "tangerine triangle swings pendulum"),
        ("a golden cube swings while rain patters", "golden cube swings rains"),
        ("a ball pulses during a hurricane", "ball pulses windy"),
        ("a red marble drops to the ground and rebounds", "red ball falls rebounds bounces"),
        ("a cyan star rebounds off the walls", "cyan star slides"),
        ("a cyan star bounces between both walls", "cyan star slides"),
        ("an azure tile ping-pongs between the left wall and the right wall", "azure tile slides"),
        ("a white ping-pong ball bounces off the floor", "white ball bounces"),
        ("a five-pointed figure in aqua", "star aqua"),
        ("a cobalt brick, ash background", "cobalt square gray"),
        ("a ruby ball against a brick wall", "ruby ball brown"),
        ("an orange traffic cone", "orange triangle"),
        ("a square tossed up and down", "square bounces"),
        ("a square oscillating vertically", "square bouncing"),
        ("a yellow triangle scaling", "yellow triangle pulsing"),
        ("quick left-right sliding, white block", "quickly sliding white block"),
        ("can you animate a brick-red ball on a wall of bricks", "red ball brown"),
    ],
)
def test_more_is_read_than_the_shipped_file_s_own_entry_holds(prompt, shown):
    assert_shows(prompt, shown)


def test_other_than_denies_what_follows():
    left_out = f"says 'other than red': {_LEFT_OUT}"
    assert_shows("a ball of a colour other than red bounces", "ball bounces", left_out)
