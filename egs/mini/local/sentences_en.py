"""English sentences from a grammar: who does what to which thing, where and when.

Each scene ties people, actions, things and places that go together, so that a word can be
guessed from its neighbours, which is what a language model knows.
"""

import random
from itertools import product

# People (singular, then plural), actions (base, third person, past), things, places.
SCENES = [
    (
        ["the baker", "my grandmother", "the young cook", "our neighbour"],
        ["the new waiters", "both chefs"],
        ["bake bakes baked", "slice slices sliced", "taste tastes tasted", "sell sells sold"],
        ["fresh bread", "an apple pie", "the warm cake", "two cheese tarts", "the garlic rolls"],
        ["in the kitchen", "at the market", "near the oven"],
    ),
    (
        ["the nurse", "an old doctor", "the surgeon", "the medical student"],
        ["two doctors", "the night nurses"],
        ["examine examines examined", "treat treats treated", "visit visits visited",
         "comfort comforts comforted"],
        ["the sick child", "two patients", "the wounded soldier", "a tired mother", "the old man"],
        ["in the hospital", "at the clinic", "in the waiting room"],
    ),
    (
        ["the teacher", "a patient professor", "the new student", "my older brother"],
        ["the school children", "our cousins"],
        ["explain explains explained", "copy copies copied", "study studies studied",
         "finish finishes finished"],
        ["the history lesson", "a difficult problem", "the long essay", "every chapter",
         "the first exercise"],
        ["in the classroom", "at the library", "at the big table"],
    ),
    (
        ["the farmer", "his daughter", "the shepherd", "a strong worker"],
        ["the village boys", "the two sisters"],
        ["feed feeds fed", "count counts counted", "follow follows followed",
         "wash washes washed"],
        ["the brown horses", "twenty sheep", "a hungry goat", "the white cows", "the noisy ducks"],
        ["behind the barn", "on the hill", "beside the river"],
    ),
    (
        ["the captain", "a brave sailor", "the fisherman", "the harbour pilot"],
        ["the divers", "three sailors"],
        ["repair repairs repaired", "paint paints painted", "steer steers steered",
         "anchor anchors anchored"],
        ["the wooden boat", "a small ship", "the rescue vessel", "the old ferry", "our yacht"],
        ["near the island", "in the harbour", "beside the lighthouse"],
    ),
    (
        ["the musician", "a famous singer", "the piano teacher", "the young composer"],
        ["the choir members", "two violin players"],
        ["play plays played", "practise practises practised", "record records recorded",
         "learn learns learned"],
        ["a quiet song", "the slow dance", "a cheerful melody", "the final concert piece",
         "an old waltz"],
        ["on the stage", "in the studio", "in the music room"],
    ),
    (
        ["the engineer", "a careful mechanic", "the bus driver", "my uncle"],
        ["the railway workers", "his apprentices"],
        ["check checks checked", "replace replaces replaced", "clean cleans cleaned",
         "fix fixes fixed"],
        ["the heavy engine", "a broken wheel", "the fuel pump", "the front brakes",
         "the oil filter"],
        ["in the garage", "at the airport", "behind the workshop"],
    ),
    (
        ["the judge", "a clever lawyer", "the police officer", "the young witness"],
        ["the detectives", "both reporters"],
        ["question questions questioned", "remember remembers remembered",
         "describe describes described", "recognise recognises recognised"],
        ["the guilty man", "a masked thief", "the nervous driver", "the missing banker",
         "two strangers"],
        ["in the court", "at the station", "outside the prison"],
    ),
    (
        ["the gardener", "my aunt", "the old landlord", "a quiet monk"],
        ["our neighbours", "the volunteers"],
        ["water waters watered", "plant plants planted", "trim trims trimmed",
         "admire admires admired"],
        ["the red roses", "a row of tulips", "the lemon tree", "some wild herbs", "the hedge"],
        ["in the garden", "along the fence", "near the fountain"],
    ),
    (
        ["the painter", "a shy artist", "the museum guide", "the wealthy collector"],
        ["the art students", "two dealers"],
        ["sketch sketches sketched", "buy buys bought", "show shows showed",
         "study studies studied"],
        ["a landscape", "the marble statue", "an ancient vase", "the large portrait",
         "a bronze figure"],
        ["in the gallery", "at the exhibition", "near the window"],
    ),
    (
        ["the scientist", "a young chemist", "the lab assistant", "our physics teacher"],
        ["the researchers", "her colleagues"],
        ["test tests tested", "measure measures measured", "heat heats heated",
         "weigh weighs weighed"],
        ["the blue liquid", "a metal sample", "the salt crystals", "a drop of acid",
         "the grey powder"],
        ["in the laboratory", "at the university", "under the lamp"],
    ),
    (
        ["the coach", "a tall striker", "the goalkeeper", "the team captain"],
        ["the players", "the young runners"],
        ["win wins won", "lose loses lost", "watch watches watched",
         "discuss discusses discussed"],
        ["the final match", "a friendly game", "the long race", "the first round",
         "the tournament"],
        ["in the stadium", "at the sports club", "in the pouring rain"],
    ),
]  # fmt: skip
# The time decides the tense.
PAST = ["yesterday", "this morning", "last winter", "on monday", "two days ago", "last night"]
HABIT = ["every evening", "on sundays", "twice a week", "in summer", "most days"]
FUTURE = ["tomorrow", "next week", "after lunch", "before noon"]
WRITTEN = [
    "please close the window before the rain comes in",
    "we walked along the beach and watched the sun go down",
    "nobody knew why the lights went out so early",
    "if you are hungry there is some cheese in the fridge",
    "the train to the city leaves in twenty minutes",
    "she forgot her umbrella and came home completely wet",
    "can you tell me where the nearest post office is",
    "the children laughed when the clown dropped his hat",
    "it takes about an hour to drive to the mountains",
    "he opened the door slowly and listened for a sound",
    "there were more questions than answers at the meeting",
    "the coffee is too hot to drink right now",
    "they built a small cabin in front of the lake",
    "my phone has no battery and i need to call a taxi",
    "the film was longer than the book it came from",
    "snow covered the roof and the road overnight",
    "we should leave now if we want to catch the bus",
    "the dog barked at the postman until he went away",
    "i put the keys on the shelf next to the front door",
    "her suitcase was too heavy to carry up the stairs",
    "the shop on the corner closes early on saturdays",
    "do not forget to turn off the lights before you go",
    "a cold wind blew leaves across the empty street",
    "the cat slept on the sofa for the whole afternoon",
    "everyone was surprised when the quiet boy began to sing",
    "we had dinner outside because the night was so warm",
    "the bridge was closed so we took another road home",
    "he reads the newspaper while he drinks his tea",
    "the baby fell asleep as soon as the car started",
    "you can borrow my bicycle if you bring it back tonight",
]


def _frame(generator: random.Random, core: tuple, places: list[str]) -> str:
    """Say who does what with a time, mostly a place, and a verb that agrees with them."""
    (person, plural), action, thing = core
    base, third, past = action.split()
    times, verb = generator.choice(
        [(PAST, past), (HABIT, base if plural else third), (FUTURE, f"will {base}")]
    )
    time, place = generator.choice(times), generator.choice(places)
    clause = f"{person} {verb} {thing}"
    return generator.choice(
        [f"{clause} {time}", f"{time} {clause} {place}", f"{clause} {place} {time}"]
    )


def from_grammar(generator: random.Random) -> list[str]:
    """Return a sentence for each person, action and thing that go together."""
    made = []
    for single, plural, actions, things, places in SCENES:
        people = [(p, False) for p in single] + [(p, True) for p in plural]
        made += [_frame(generator, core, places) for core in product(people, actions, things)]
    return made
