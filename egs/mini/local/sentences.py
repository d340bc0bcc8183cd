"""English sentences from a small grammar: who does what to which thing, where and when."""

import itertools
import random

# Each scene ties actors, actions and things that go together, so that a word can be guessed
# from its neighbours, which is what a language model knows.
SCENES = [
    (
        ["the baker", "my grandmother", "the young cook", "our neighbour"],
        ["baked", "sliced", "tasted", "sold"],
        ["fresh bread", "an apple pie", "the warm cake", "a dozen biscuits", "the potato soup"],
        ["in the kitchen", "at the market", "near the oven"],
    ),
    (
        ["the nurse", "an old doctor", "the surgeon", "the medical student"],
        ["examined", "treated", "comforted", "visited"],
        ["the sick child", "two patients", "the wounded soldier", "a tired mother"],
        ["in the hospital", "at the clinic", "in the waiting room"],
    ),
    (
        ["the teacher", "a patient professor", "the new student", "my older brother"],
        ["explained", "copied", "studied", "finished"],
        ["the history lesson", "a difficult problem", "the long essay", "every chapter", "the map"],
        ["in the classroom", "at the library", "after school"],
    ),
    (
        ["the farmer", "his daughter", "the shepherd", "a strong worker"],
        ["fed", "counted", "followed", "washed"],
        ["the brown horses", "twenty sheep", "a hungry goat", "the white cows", "the noisy ducks"],
        ["behind the barn", "on the hill", "beside the river"],
    ),
    (
        ["the captain", "a brave sailor", "the fisherman", "the harbour pilot"],
        ["repaired", "painted", "steered", "anchored"],
        ["the wooden boat", "a small ship", "the rescue vessel", "the old ferry"],
        ["near the island", "in the harbour", "during the storm"],
    ),
    (
        ["the musician", "a famous singer", "the piano teacher", "the young composer"],
        ["played", "practised", "recorded", "wrote"],
        ["a quiet song", "the slow dance", "a cheerful melody", "the final concert piece"],
        ["on the stage", "in the studio", "for the audience"],
    ),
    (
        ["the engineer", "a careful mechanic", "the pilot", "the bus driver"],
        ["checked", "started", "replaced", "stopped"],
        ["the heavy engine", "a broken wheel", "the fuel pump", "the front brakes"],
        ["in the garage", "at the airport", "before the journey"],
    ),
    (
        ["the judge", "a clever lawyer", "the police officer", "the young witness"],
        ["questioned", "remembered", "described", "recognised"],
        ["the stolen jewels", "a strange letter", "the guilty man", "the silver car"],
        ["in the court", "at the station", "during the trial"],
    ),
]
TIMES = [
    "yesterday", "this morning", "on monday", "last winter", "every evening", "before noon",
    "after lunch", "on sunday",
]  # fmt: skip
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
    "they planted three trees in front of the new house",
    "my phone has no battery and i need to call a taxi",
    "the film was longer than the book it came from",
    "snow covered the roof and the garden overnight",
]


def all_sentences() -> list[str]:
    """Return every sentence, each once, in a fixed order."""
    made = list(WRITTEN)
    for actors, actions, things, places in SCENES:
        combinations = itertools.product(actors, actions, things, places, TIMES)
        for number, (actor, action, thing, place, time) in enumerate(combinations):
            if number % 3 == 0:
                made.append(f"{time} {actor} {action} {thing} {place}")
            elif number % 3 == 1:
                made.append(f"{actor} {action} {thing} {place} {time}")
            else:
                made.append(f"{actor} {action} {thing} {time}")
    return list(dict.fromkeys(made))


def split_sentences(counts: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Deal different sentences out to the sets.

    Args:
        counts: {set: number of sentences}.
        seed: which sentences they are.

    Returns:
        {set: sentences}; no sentence is in two sets, or twice in one.

    Raises:
        ValueError: more sentences are asked for than the grammar has.
    """
    sentences = all_sentences()
    if sum(counts.values()) > len(sentences):
        raise ValueError(f"the grammar has {len(sentences)} sentences, not {sum(counts.values())}")
    random.Random(seed).shuffle(sentences)
    rest = iter(sentences)
    return {name: list(itertools.islice(rest, count)) for name, count in counts.items()}
