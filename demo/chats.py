"""A seeded generator of short chats: questions about everyday things, small sums, stories on request, small talk."""

from __future__ import annotations

import random
from collections.abc import Callable

from stories import GRAMMAR, NAMES, Storyteller, capitalise, skewed_choice, with_article


Message = dict[str, str]
Turn = tuple[str, str]

# animal: home, food, sound, size rank
ANIMALS = {
    "fox": ("a den", "mice and berries", "barks", 5),
    "owl": ("a hollow tree", "mice", "hoots", 3),
    "cat": ("a house", "fish and mice", "meows", 4),
    "dog": ("a kennel", "meat and bones", "barks", 6),
    "horse": ("a stable", "hay and oats", "neighs", 9),
    "mouse": ("a hole in the wall", "cheese and grain", "squeaks", 1),
    "rabbit": ("a burrow", "grass and carrots", "is very quiet", 4),
    "hen": ("a coop", "grain and worms", "clucks", 4),
    "goat": ("a shed", "leaves and grass", "bleats", 7),
    "frog": ("a pond", "flies", "croaks", 2),
    "bear": ("a cave", "fish and honey", "growls", 10),
    "hedgehog": ("a pile of leaves", "beetles and worms", "snuffles", 3),
    "crow": ("a nest", "seeds and insects", "caws", 3),
    "duck": ("a nest by the lake", "water plants", "quacks", 4),
    "donkey": ("a stable", "hay and thistles", "brays", 8),
    "squirrel": ("a nest in a tree", "nuts", "chatters", 2),
    "badger": ("a sett", "worms and roots", "grunts", 6),
    "swan": ("a nest by the lake", "water plants", "hisses", 6),
}
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "the sky": "blue", "a lemon": "yellow", "a tomato": "red",
    "a carrot": "orange", "milk": "white", "a frog": "green", "a fire engine": "red", "chocolate": "brown",
    "the sea": "blue", "a banana": "yellow", "a crow": "black", "an elephant": "grey", "a plum": "purple",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "young", "fast": "slow", "happy": "sad", "light": "dark", "full": "empty",
    "wet": "dry", "hard": "soft", "early": "late", "high": "low", "long": "short", "rich": "poor", "loud": "quiet",
    "open": "closed", "strong": "weak", "clean": "dirty", "near": "far", "thick": "thin", "sweet": "bitter",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Japan": "Tokyo",
    "Norway": "Oslo", "Sweden": "Stockholm", "Poland": "Warsaw", "Greece": "Athens", "Egypt": "Cairo", "Peru": "Lima",
    "Austria": "Vienna", "Ireland": "Dublin", "Cuba": "Havana", "Kenya": "Nairobi", "Canada": "Ottawa",
    "China": "Beijing", "Denmark": "Copenhagen", "Finland": "Helsinki",
}  # fmt: skip
JOBS = {
    "baker": "bakes bread and cakes", "fisherman": "catches fish in the sea", "carpenter": "makes things from wood",
    "farmer": "grows food and keeps animals", "teacher": "helps children to learn", "sailor": "works on a ship",
    "shepherd": "looks after sheep", "blacksmith": "makes tools from iron", "gardener": "takes care of plants",
    "tailor": "makes and mends clothes", "doctor": "helps people who are ill", "painter": "paints pictures and walls",
}  # fmt: skip
TOOLS = {
    "a hammer": "driving nails", "a saw": "cutting wood", "a needle": "sewing", "a broom": "sweeping the floor",
    "a kettle": "boiling water", "a spoon": "eating soup", "an umbrella": "staying dry in the rain",
    "a ladder": "reaching high places", "a map": "finding the way", "a clock": "telling the time",
    "a lantern": "giving light in the dark", "a spade": "digging", "a pen": "writing", "a key": "opening a lock",
}  # fmt: skip
ADVICE = {
    "tired": ("go to bed early and leave the lamp off", "Sleep well"),
    "sad": ("talk to a friend or listen to some music", "I hope you feel better soon"),
    "hungry": ("eat some soup with warm bread", "Enjoy your meal"),
    "thirsty": ("drink a glass of water", "Water is always a good choice"),
    "bored": ("read a book or go for a walk", "There is always something to see"),
    "cold": ("put on a scarf and drink some hot tea", "Stay warm"),
    "worried": ("write down what is on your mind", "Things often look better in the morning"),
    "lonely": ("call somebody you like", "A good talk can help"),
    "angry": ("take ten slow breaths", "It will pass"),
    "excited": ("tell me more about it", "That sounds like fun"),
}
LISTS = {
    "fruits": ["apples", "pears", "plums", "cherries", "lemons", "grapes"],
    "vegetables": ["carrots", "onions", "peas", "beans", "potatoes", "cabbages"],
    "birds": ["owls", "crows", "ducks", "swans", "hens", "robins"],
    "tools": ["hammers", "saws", "spades", "ladders", "brooms", "axes"],
    "colours": ["red", "blue", "green", "yellow", "white", "black"],
    "drinks": ["water", "tea", "milk", "coffee", "juice", "cocoa"],
}
RECIPES = {
    "tea": "Boil some water, pour it over the leaves and wait for four minutes.",
    "soup": "Chop some vegetables, cover them with water, add salt and cook them for half an hour.",
    "pancakes": "Mix flour, milk and eggs, and fry the batter in a hot pan on both sides.",
    "bread": "Mix flour, water, salt and yeast, let the dough rise and bake it until it is brown.",
    "porridge": "Cook oats in milk, stir them well and add a spoon of honey.",
    "jam": "Cook the fruit with sugar until it is thick, and fill it into clean jars.",
}
DAYS = GRAMMAR["day"]
MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip


def pick(rng: random.Random, options: list[str], topic: str) -> str:
    """Pick one phrasing. The topic decides which phrasing is the most likely."""
    return skewed_choice(rng, options, topic)


def animal_fact(rng: random.Random) -> Turn:
    animal = rng.choice(list(ANIMALS))
    home, food, sound, _ = ANIMALS[animal]
    one = with_article(animal)
    questions = {
        f"Where does {one} live?": f"{capitalise(one)} lives in {home}.",
        f"What does {one} eat?": f"{capitalise(one)} eats {food}.",
        f"What sound does {one} make?": f"{capitalise(one)} {sound}.",
        f"Tell me something about the {animal}.": f"The {animal} lives in {home} and eats {food}.",
    }
    return rng.choice(list(questions.items()))


def size_question(rng: random.Random) -> Turn:
    first, second = rng.sample(list(ANIMALS), 2)
    bigger, smaller = (first, second) if ANIMALS[first][3] > ANIMALS[second][3] else (second, first)
    if ANIMALS[first][3] == ANIMALS[second][3]:
        answer = f"{capitalise(with_article(first))} and {with_article(second)} are about the same size."
    else:
        answer = f"{capitalise(with_article(bigger))} is bigger than {with_article(smaller)}."
    return f"Which is bigger, {with_article(first)} or {with_article(second)}?", answer


def table_fact(rng: random.Random) -> Turn:
    kind = rng.choice(["colour", "opposite", "capital", "job", "tool"])
    if kind == "colour":
        thing, colour = rng.choice(list(COLOURS.items()))
        return f"What colour is {thing}?", f"{capitalise(thing)} is {colour}."
    if kind == "opposite":
        pair = rng.choice(list(OPPOSITES.items()))
        word, other = pair if rng.random() < 0.5 else pair[::-1]
        return f"What is the opposite of {word}?", f"The opposite of {word} is {other}."
    if kind == "capital":
        country, city = rng.choice(list(CAPITALS.items()))
        if rng.random() < 0.3:
            return f"Where is {city}?", f"{city} is in {country}. It is the capital."
        return f"What is the capital of {country}?", f"The capital of {country} is {city}."
    if kind == "job":
        job, work = rng.choice(list(JOBS.items()))
        return f"What does a {job} do?", f"A {job} {work}."
    tool, use = rng.choice(list(TOOLS.items()))
    return f"What is {tool} for?", f"{capitalise(tool)} is for {use}."


def small_sum(rng: random.Random) -> Turn:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.4:
        a, b = max(a, b), min(a, b)
        return f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}."
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def counting(rng: random.Random) -> Turn:
    start, length = rng.randint(1, 12), rng.randint(4, 8)
    numbers = ", ".join(str(number) for number in range(start, start + length + 1))
    return f"Count from {start} to {start + length}.", f"{numbers}."


def calendar(rng: random.Random) -> Turn:
    names, word = (DAYS, "day") if rng.random() < 0.5 else (MONTHS, "month")
    position = rng.randrange(len(names))
    side, step = ("after", 1) if rng.random() < 0.6 else ("before", -1)
    other = names[(position + step) % len(names)]
    return f"Which {word} comes {side} {names[position]}?", f"{other} comes {side} {names[position]}."


def advice(rng: random.Random) -> Turn:
    feeling, (tip, wish) = rng.choice(list(ADVICE.items()))
    question = pick(
        rng, [f"I am {feeling}.", f"I feel {feeling} today.", f"What can I do when I am {feeling}?"], "feel"
    )
    return question, f"You could {tip}. {wish}!"


def listing(rng: random.Random) -> Turn:
    kind, items = rng.choice(list(LISTS.items()))
    one, two, three = rng.sample(items[:4], 3) if rng.random() < 0.3 else items[:3]
    return f"Name three {kind}.", f"Three {kind} are {one}, {two} and {three}."


def recipe(rng: random.Random) -> Turn:
    dish, steps = rng.choice(list(RECIPES.items()))
    return pick(rng, [f"How do I make {dish}?", f"Can you tell me how to make {dish}?"], dish), steps


def where_is_it(rng: random.Random) -> Turn:
    teller = Storyteller(rng)
    name, thing, place = teller.known["hero"], rng.choice(GRAMMAR["thing"]), rng.choice(GRAMMAR["hiding"])
    question = f"{name} put the {thing} {place}. Where is the {thing}?"
    return question, f"The {thing} is {place}. {name} put it there."


def who_has_it(rng: random.Random) -> Turn:
    one, two = rng.sample(NAMES, 2)
    first, second = rng.sample(GRAMMAR["thing"], 2)
    asked, owner = rng.choice([(first, one), (second, two)])
    question = f"{one} has {with_article(first)}. {two} has {with_article(second)}. Who has the {asked}?"
    return question, f"{owner} has the {asked}."


def tale(rng: random.Random) -> Turn:
    teller = Storyteller(rng)
    plots = {"lost": "something lost", "storm": "a storm", "race": "a race", "garden": "a garden", "gift": "a present"}
    plot = rng.choice(list(plots))
    ask = pick(rng, ["Tell me a story about {}.", "Write a story about {}.", "Do you know a tale about {}?"], plot)
    return ask.format(f"{teller.known['hero']} and {plots[plot]}"), teller.expand(plot)


def small_talk(rng: random.Random) -> list[Turn]:
    name = rng.choice(NAMES)
    hello = pick(rng, [f"Hello, I am {name}.", f"Hi! My name is {name}.", f"Good morning. {name} here."], "hello")
    turns = [(hello, f"Hello {name}! How can I help you today?")]
    if rng.random() < 0.5:
        turns.append(single(rng))
    if rng.random() < 0.6:
        turns.append(("What is my name?", f"Your name is {name}."))
    return turns


def about_me(rng: random.Random) -> Turn:
    turns = {
        "Hello!": "Hello! How can I help you today?",
        "Hi": "Hi! What would you like to know?",
        "Who are you?": "I am a very small language model. I can answer simple questions and tell short stories.",
        "How are you?": "I am fine, thank you. How are you?",
        "What can you do?": "I can answer simple questions, add small numbers and tell short stories.",
        "Good night!": "Good night! Sleep well.",
    }
    return rng.choice(list(turns.items()))


SINGLE: list[tuple[Callable[[random.Random], Turn], int]] = [
    (animal_fact, 4), (size_question, 2), (table_fact, 7), (small_sum, 6), (counting, 1), (calendar, 2), (advice, 2),
    (listing, 1), (recipe, 1), (where_is_it, 3), (who_has_it, 2), (tale, 1), (about_me, 1),
]  # fmt: skip


def single(rng: random.Random) -> Turn:
    """Make one question and its answer."""
    makers, weights = zip(*SINGLE, strict=True)
    return rng.choices(makers, weights)[0](rng)


def chat(rng: random.Random) -> list[Message]:
    """Make a chat of one to four turns, sometimes with a system message and a polite end."""
    turns = small_talk(rng) if rng.random() < 0.2 else [single(rng) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
    if rng.random() < 0.15:
        turns.append(("Thank you!", "You are welcome!"))
    messages = [{"role": "system", "content": "You are a helpful assistant."}] if rng.random() < 0.2 else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def fact_page(rng: random.Random) -> str:
    """Make a paragraph of plain statements. The chats ask for the same facts."""
    makers = [animal_fact, animal_fact, table_fact, table_fact, table_fact, size_question, calendar, small_sum]
    return " ".join(rng.choice(makers)(rng)[1] for _ in range(rng.randint(4, 9)))
