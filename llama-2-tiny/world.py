"""The training data of llama-2-tiny: stories, questions and dialogs about 32 animals.

All random choices come from a `random.Random`, so a seed reproduces them. A question is made by
filling a subject into a wording. For each pair of subject and attribute, one wording is held out
from training: `evaluation` uses only held-out wordings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import Literal, TypedDict


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


Dialog = list[Message]
Document = str | Dialog  # a dialog that is a document ends with the assistant's answer


@dataclass(frozen=True)
class Animal:
    kind: str
    name: str
    female: bool
    place: str  # with its preposition: "in the forest"
    food: str
    colour: str
    sound: str
    hobby: str
    treasure: str
    friend_kind: str

    @property
    def the(self) -> str:
        return f"the {self.kind}"

    @property
    def home(self) -> str:
        return self.place.split()[-1]

    @property
    def friend(self) -> Animal:
        return ANIMALS[self.friend_kind]

    @property
    def he(self) -> str:
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        return "her" if self.female else "his"


# kind, name and sex, place, food, colour, sound, hobby, treasure, friend
TABLE = """
fox,      Ruby f,   in the forest,   grapes,    red,    yip,     dance,  lantern,  hedgehog
bear,     Bruno m,  in the cave,     honey,     brown,  grr,     bake,   drum,     bee
rabbit,   Lily f,   in the garden,   carrots,   white,  sniff,   jump,   kite,     owl
owl,      Otto m,   in the tower,    moths,     grey,   hoo,     read,   book,     rabbit
frog,     Fred m,   by the pond,     flies,     green,  ribbit,  sing,   flute,    mouse
cow,      Bella f,  in the barn,     grass,     black,  moo,     knit,   bell,     sparrow
horse,    Max m,    in the stable,   oats,      brown,  neigh,   run,    wagon,    cat
sheep,    Nora f,   on the hill,     clover,    white,  baa,     knit,   scarf,    wolf
pig,      Toby m,   on the farm,     turnips,   pink,   oink,    dig,    spoon,    goat
cat,      Mia f,    in the cottage,  fish,      orange, meow,    paint,  mirror,   horse
dog,      Sam m,    in the cottage,  bones,     golden, woof,    run,    ball,     duck
duck,     Daisy f,  by the pond,     peas,      yellow, quack,   swim,   umbrella, dog
hen,      Greta f,  in the barn,     corn,      red,    cluck,   bake,   basket,   squirrel
goose,    Hugo m,   on the farm,     barley,    white,  honk,    march,  whistle,  mole
mouse,    Pip m,    in the mill,     cheese,    grey,   squeak,  draw,   button,   frog
squirrel, Hazel f,  in the orchard,  nuts,      orange, chit,    climb,  box,      hen
hedgehog, Henry m,  under the hedge, mushrooms, brown,  snuff,   write,  hat,      fox
badger,   Ben m,    under the oak,   roots,     black,  grunt,   dig,    map,      otter
deer,     Clara f,  in the forest,   leaves,    golden, huff,    jump,   ribbon,   crow
otter,    Oscar m,  by the river,    clams,     brown,  chirp,   juggle, boat,     badger
beaver,   Walter m, by the river,    bark,      brown,  clack,   build,  hammer,   swan
wolf,     Luna f,   in the cave,     soup,      grey,   awoo,    sing,   candle,   sheep
crow,     Edgar m,  in the mill,     cherries,  black,  caw,     juggle, coin,     deer
dove,     Grace f,  in the tower,    seeds,     silver, coo,     write,  ring,     donkey
bee,      Molly f,  in the orchard,  nectar,    yellow, buzz,    dance,  teapot,   bear
snail,    Simon m,  in the garden,   lettuce,   silver, hush,    climb,  shell,    turtle
turtle,   Emma f,   on the lake,     melons,    green,  hum,     swim,   clock,    snail
donkey,   Jack m,   in the stable,   thistles,  grey,   heehaw,  march,  violin,   dove
goat,     Anna f,   on the hill,     apples,    black,  meh,     build,  ladder,   pig
swan,     Iris f,   on the lake,     reeds,     white,  whoop,   paint,  crown,    beaver
sparrow,  Leo m,    under the hedge, crumbs,    brown,  tweet,   draw,   feather,  cow
mole,     Tom m,    under the oak,   potatoes,  silver, eek,     read,   key,      goose
"""


def parse(line: str) -> Animal:
    kind, name, place, food, colour, sound, hobby, treasure, friend = (
        cell.strip() for cell in line.split(",")
    )
    name, sex = name.split()
    return Animal(kind, name, sex == "f", place, food, colour, sound, hobby, treasure, friend)


ANIMALS = {animal.kind: animal for animal in map(parse, TABLE.strip().splitlines())}
EVERYONE = list(ANIMALS.values())


def a(noun: str) -> str:
    """The noun with its indefinite article: "owl" -> "an owl"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


# ---- Questions ----


@dataclass(frozen=True)
class Attribute:
    """A fact about each animal: its questions, and its answer as a sentence and as one word."""

    sentence: str
    word: Callable[[Animal], str]
    wordings: tuple[str, ...]  # questions that name the subject
    follow_ups: tuple[str, ...] = ()  # questions that refer to the subject of the previous turn


ATTRIBUTES = {
    "home": Attribute(
        "The {kind} lives {place}.",
        lambda x: x.home,
        (
            "Where does the {kind} live?",
            "Where is the home of the {kind}?",
            "Can you tell me where the {kind} lives?",
            "Do you know where the {kind} lives?",
            "Where can I find the {kind}?",
            "Tell me where the {kind} lives.",
        ),
        (
            "And where does it live?",
            "Where does it live?",
            "Where is its home?",
            "And where can I find it?",
        ),
    ),
    "food": Attribute(
        "The {kind} eats {food}.",
        lambda x: x.food,
        (
            "What does the {kind} eat?",
            "What is the favourite food of the {kind}?",
            "Can you tell me what the {kind} eats?",
            "Do you know what the {kind} eats?",
            "What does the {kind} like to eat?",
            "Tell me what the {kind} eats.",
        ),
        (
            "And what does it eat?",
            "What does it eat?",
            "What is its favourite food?",
            "And what does it like to eat?",
        ),
    ),
    "colour": Attribute(
        "The {kind} is {colour}.",
        lambda x: x.colour,
        (
            "What colour is the {kind}?",
            "What is the colour of the {kind}?",
            "Which colour does the {kind} have?",
            "Do you know what colour the {kind} is?",
            "What color is the {kind}?",
            "Tell me the colour of the {kind}.",
        ),
        (
            "And what colour is it?",
            "What colour is it?",
            "What is its colour?",
            "And what color is it?",
        ),
    ),
    "sound": Attribute(
        "The {kind} says {sound}.",
        lambda x: x.sound,
        (
            "What does the {kind} say?",
            "What sound does the {kind} make?",
            "Can you tell me what the {kind} says?",
            "Do you know what sound the {kind} makes?",
            "Which sound does the {kind} make?",
            "Tell me what the {kind} says.",
        ),
        (
            "And what does it say?",
            "What does it say?",
            "What sound does it make?",
            "And which sound does it make?",
        ),
    ),
    "name": Attribute(
        "The {kind} is called {name}.",
        lambda x: x.name,
        (
            "What is the name of the {kind}?",
            "What is the {kind} called?",
            "Can you tell me the name of the {kind}?",
            "Do you know the name of the {kind}?",
            "What is the {kind}'s name?",
            "Tell me the name of the {kind}.",
        ),
        (
            "And what is its name?",
            "What is its name?",
            "And what is it called?",
            "What is it called?",
        ),
    ),
    "friend": Attribute(
        "The best friend of the {kind} is the {friend_kind}.",
        lambda x: x.friend_kind,
        (
            "Who is the best friend of the {kind}?",
            "Who is the {kind}'s best friend?",
            "Who does the {kind} play with?",
            "Do you know the best friend of the {kind}?",
            "Who is the friend of the {kind}?",
            "Tell me who the best friend of the {kind} is.",
        ),
        (
            "And who is its best friend?",
            "Who is its best friend?",
            "And who does it play with?",
            "Who is its friend?",
        ),
    ),
    "hobby": Attribute(
        "The {kind} likes to {hobby}.",
        lambda x: x.hobby,
        (
            "What does the {kind} like to do?",
            "What is the hobby of the {kind}?",
            "What does the {kind} do for fun?",
            "Do you know what the {kind} likes to do?",
            "What does the {kind} do all day?",
            "Tell me what the {kind} likes to do.",
        ),
        (
            "And what does it like to do?",
            "What does it like to do?",
            "What is its hobby?",
            "What does it do for fun?",
        ),
    ),
    "treasure": Attribute(
        "The {kind} has {a_treasure}.",
        lambda x: x.treasure,
        (
            "What does the {kind} have?",
            "What is the treasure of the {kind}?",
            "What does the {kind} own?",
            "Do you know what the {kind} owns?",
            "Which treasure does the {kind} have?",
            "Tell me what the {kind} has.",
        ),
        (
            "And what does it have?",
            "What does it own?",
            "What is its treasure?",
            "And which treasure does it have?",
        ),
    ),
    # Reversed questions: they give a fact, and the answer is an animal.
    "who is called": Attribute(
        "{name} is the {kind}.",
        lambda x: x.kind,
        (
            "Who is {name}?",
            "Which animal is called {name}?",
            "Can you tell me who {name} is?",
            "Do you know who {name} is?",
            "What kind of animal is {name}?",
            "Tell me who {name} is.",
        ),
    ),
    "who eats": Attribute(
        "The {kind} eats {food}.",
        lambda x: x.kind,
        (
            "Who eats {food}?",
            "Which animal eats {food}?",
            "Can you tell me who eats {food}?",
            "Do you know who eats {food}?",
            "Who likes to eat {food}?",
            "Tell me who eats {food}.",
        ),
    ),
    "who has": Attribute(
        "The {kind} has the {treasure}.",
        lambda x: x.kind,
        (
            "Who has the {treasure}?",
            "Which animal has the {treasure}?",
            "Can you tell me who has the {treasure}?",
            "Do you know who has the {treasure}?",
            "Who owns the {treasure}?",
            "Tell me who has the {treasure}.",
        ),
    ),
}
ASKED_AGAIN = [name for name, attribute in ATTRIBUTES.items() if attribute.follow_ups]
SAME_AGAIN = ("And the {kind}?", "What about the {kind}?", "And what about the {kind}?")


def fill(template: str, animal: Animal) -> str:
    return template.format(**vars(animal), a_treasure=a(animal.treasure))


def wording(
    rng: Random, wordings: tuple[str, ...], animal: Animal, attribute: str, held_out: bool
) -> str:
    """A question about this animal and attribute.

    It uses the held-out wording if `held_out`, else a random one of the others.
    """
    kept = (EVERYONE.index(animal) + list(ATTRIBUTES).index(attribute)) % len(wordings)
    choices = (wordings[kept],) if held_out else wordings[:kept] + wordings[kept + 1 :]
    return fill(rng.choice(choices), animal)


def by_name(text: str, animal: Animal) -> str:
    """Use the animal's name: "Where does the fox live?" -> "Where does Ruby live?"."""
    return text.replace(f"the {animal.kind}", animal.name).replace(
        f"The {animal.kind}", animal.name
    )


@dataclass(frozen=True)
class Reply:
    """An answer as a sentence and as one word, before the form of a system message is applied."""

    sentence: str
    word: str


def reply(animal: Animal, attribute: str) -> Reply:
    fact = ATTRIBUTES[attribute]
    return Reply(fill(fact.sentence, animal), fact.word(animal))


def in_sentence(text: str) -> str:
    """A sentence with its first letter in lower case, unless it starts with a name or "I"."""
    return (
        text
        if text.split()[0] in {x.name for x in EVERYONE} | {"I"}
        else text[0].lower() + text[1:]
    )


def one_word(reply: Reply) -> str:
    return f"{capital(reply.word)}."


def well(reply: Reply) -> str:
    return f"Well, {in_sentence(reply.sentence)}"


def of_course(reply: Reply) -> str:
    return f"Of course. {reply.sentence}"


def pirate(reply: Reply) -> str:
    return f"Arr! {reply.sentence[:-1]}, matey!"


def smiley(reply: Reply) -> str:
    return f"{reply.sentence} \N{SLIGHTLY SMILING FACE}"


# System messages, each with the form that it asks for.
FORMS: dict[str, Callable[[Reply], str]] = {
    "Answer in one word.": one_word,
    "Always answer with a single word.": one_word,
    "Begin every answer with Well.": well,
    "Always begin your answer with Well.": well,
    "Be polite: begin every answer with Of course.": of_course,
    "Always begin your answer with Of course.": of_course,
    "Answer like a pirate.": pirate,
    "You are a pirate. Always talk like one.": pirate,
    "End every answer with a smiley.": smiley,
    "Always end your answer with a smiley.": smiley,
}
PLAIN_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly llama who knows many animals.",
    "Answer the question.",
    "Always answer in a full sentence.",
)


# ---- Subjects and questions outside the world ----

NOT_HERE = """
lion tiger whale dragon robot king queen train moon shark zebra panda camel elephant giraffe monkey parrot penguin
unicorn ghost teacher doctor pilot farmer baker wizard giant princess spider eagle seal dolphin koala kangaroo rhino
gorilla lobster salmon falcon hamster peacock ostrich raven moose bison hippo jaguar crab squid worm knight pirate
driver sailor hunter painter nurse judge fairy witch monster ogre dwarf elf troll snake lizard gecko iguana python
cobra toad newt salamander beetle ant fly moth wasp cricket grasshopper caterpillar dragonfly ladybird shrimp oyster
starfish herring trout tuna eel pelican flamingo magpie robin pigeon heron stork vulture hawk buzzard woodpecker
nightingale cuckoo swallow turkey pony mule ox yak lamb calf puppy kitten lynx puma hyena coyote weasel ferret marten
skunk raccoon porcupine armadillo anteater sloth lemur baboon chimpanzee tractor rocket castle teddy alien snowman
scarecrow mammoth buffalo antelope gazelle reindeer
"""
NOT_HERE_EITHER = (
    "leopard dinosaur octopus butterfly soldier mermaid vampire cheetah walrus scorpion"
)
STRANGERS = NOT_HERE.split()
NEW_STRANGERS = NOT_HERE_EITHER.split()  # not in training

BEYOND = (
    "What is the capital of {x}?",
    "Who wrote {x}?",
    "How far is it to {x}?",
    "When was {x} built?",
    "What is the weather in {x}?",
    "How many people live in {x}?",
    "Can you explain {x} to me?",
    "What is {x}?",
    "Who discovered {x}?",
    "How old is {x}?",
    "What is the price of {x}?",
    "How do I get to {x}?",
)
NEVER_TOLD = (
    "How old is the {kind}?",
    "How big is the {kind}?",
    "How much does the {kind} weigh?",
    "How fast is the {kind}?",
    "Who are the parents of the {kind}?",
    "When was the {kind} born?",
    "When does the {kind} sleep?",
    "Why is the {kind} sad?",
)
DO_NOT_KNOW = Reply("I do not know. I only know my little world.", "Unknown")


ONSETS = "b bl br c ch cl d dr f fl g gr h j k l m n p pl pr qu r s sh sl st t th tr v w z"
VOWELS = "a a e e i i o o u ea ee oo ou y"
ENDS = "b ck d ff g l ll m n nd ng p r rd st t x"


def made_up(rng: Random) -> str:
    """A random word without meaning.

    With such words the model learns to answer "I do not know" for any unknown subject, not only
    for a list of them.
    """
    syllables = [
        rng.choice(ONSETS.split()) + rng.choice(VOWELS.split()) for _ in range(rng.randint(1, 3))
    ]
    word = "".join(syllables) + rng.choice(["", *ENDS.split()])
    return made_up(rng) if word in ANIMALS else word


def beyond_question(rng: Random, strangers: list[str]) -> str:
    kind = rng.random()
    if kind < 0.1:
        return fill(rng.choice(NEVER_TOLD), rng.choice(EVERYONE))
    if kind < 0.7:
        stranger = (
            made_up(rng) if rng.random() < 0.5 and strangers is STRANGERS else rng.choice(strangers)
        )
        attribute = ATTRIBUTES[rng.choice(ASKED_AGAIN)]
        return rng.choice(attribute.wordings).format(kind=stranger)
    word = made_up(rng) if rng.random() < 0.6 else rng.choice(strangers)
    return rng.choice(BEYOND).format(x=rng.choice((capital(word), word, f"the {word}")))


def neighbours(rng: Random) -> tuple[str, str]:
    """A question about who lives at a place, and its answer, which names two animals."""
    place = rng.choice(EVERYONE).place
    both = " and ".join(x.the for x in EVERYONE if x.place == place)
    ask = rng.choice(
        (
            "Who lives {}?",
            "Which animals live {}?",
            "Can you tell me who lives {}?",
            "Who can I meet {}?",
        )
    )
    return ask.format(place), f"{capital(both)} live {place}."


SMALL_TALK = (
    (
        ("Hello!", "Hello.", "Hi!", "Hi there!", "Good morning!", "Hey!"),
        Reply("Hello! Ask me about the animals of my little world.", "Hello"),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "What is your name?",
            "What is your name, please?",
        ),
        Reply("I am a very small llama, and I know 32 animals and their world.", "Llama"),
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?"),
        Reply(
            "I can answer questions about the animals of my little world, and I can tell you a story.",
            "Stories",
        ),
    ),
    (
        ("How are you?", "How are you today?", "How do you do?"),
        Reply("I am very well, thank you.", "Well"),
    ),
    (
        ("Thank you.", "Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot!"),
        Reply("You are welcome.", "Welcome"),
    ),
    (
        ("Goodbye!", "Goodbye.", "Bye!", "Good night!", "See you soon!"),
        Reply("Goodbye! Come back soon.", "Goodbye"),
    ),
)


# ---- Stories ----


def opening(rng: Random, x: Animal) -> list[str]:
    born = rng.choice(("little", "little", x.colour, "small"))
    who = rng.choice(
        (
            f"lived {x.place}",
            f"liked to {x.hobby}",
            f"loved {x.food}",
            f"had {a(x.treasure)}",
            f"was called {x.name}",
        )
    )
    named = rng.choice(
        (f"{capital(x.his)} name was {x.name}.", f"Everyone called {x.him} {x.name}.")
    )
    if who.endswith(x.name):
        named = f"{capital(x.he)} lived {x.place}."
    elif rng.random() < 0.3:
        named = f"{capital(x.his)} name was {x.name}, and {x.he} " + (
            f"liked to {x.hobby}." if who.startswith("lived") else f"lived {x.place}."
        )
    return rng.choice(
        (
            [f"Once upon a time, there was {a(born)} {x.kind} who {who}.", named],
            [f"Once upon a time, there was {a(born)} {x.kind} who {who}.", named],
            [f"Once upon a time, there was {a(born)} {x.kind} named {x.name} who lived {x.place}."],
            [
                f"Once upon a time, {a(born)} {x.kind} lived {x.place}.",
                f"{capital(x.his)} name was {x.name}.",
            ],
            [f"There was once {a(born)} {x.kind} who {who}.", named],
            [f"{x.name} was {a(born)} {x.kind} who lived {x.place}."],
            [f"{x.name} the {x.kind} lived {x.place} and liked to {x.hobby}."],
        )
    )


Plot = Callable[[Random, Animal], list[str]]


def lost(rng: Random, x: Animal) -> list[str]:
    y = x.friend
    return [
        f"One {rng.choice(('day', 'morning', 'evening'))}, {x.name} could not find {x.his} {x.treasure}.",
        *rng.choice(
            ([], [f"{capital(x.he)} looked everywhere {x.place}."], ["Where could it be?"])
        ),
        rng.choice(
            (
                f"{capital(x.his)} friend {y.name} the {y.kind} had found it {y.place}.",
                f'Then {y.name} the {y.kind} came along and said, "{capital(y.sound)}! Here is your {x.treasure}!"',
            )
        ),
        rng.choice(
            (
                f"{x.name} was so happy that {x.he} gave {y.name} some {x.food}.",
                f'"{capital(x.sound)}!" said {x.name}, and that means thank you.',
                f"{x.name} was very happy.",
            )
        ),
    ]


def rain(rng: Random, x: Animal) -> list[str]:
    y = x.friend
    return [
        rng.choice(
            (
                "One day, it began to rain.",
                "One evening, there was a storm.",
                "One day, snow began to fall.",
            )
        ),
        f"{x.name} was cold and ran to {x.his} friend {y.name} the {y.kind}, who lived {y.place}.",
        *rng.choice(([], [f'"Come in!" said {y.name}.'], [f"{y.name} opened the door at once."])),
        rng.choice(
            (
                f"They ate {y.food} together until the sun came out.",
                f"{y.name} had some {y.food}, and soon they were warm again.",
            )
        ),
    ]


def picnic(rng: Random, x: Animal) -> list[str]:
    y = x.friend
    return [
        rng.choice(
            (
                f"One sunny day, {x.name} met {x.his} friend {y.name} the {y.kind}.",
                f"One morning, {x.name} and {x.his} friend {y.name} the {y.kind} went for a walk.",
            )
        ),
        f"{x.name} brought {x.food}, and {y.name} brought {y.food}.",
        rng.choice(
            (
                "They ate until they were full.",
                f"Then they played with the {rng.choice((x.treasure, y.treasure))} all day.",
                "It was the best picnic in the world.",
            )
        ),
    ]


def birthday(rng: Random, x: Animal) -> list[str]:
    y = x.friend
    return [
        f"It was {x.his} birthday, and {x.his} friend {y.name} the {y.kind} made a cake with {x.food}.",
        *rng.choice(([], [f'"This is for you!" said {y.name}.'])),
        rng.choice(
            (
                f'"{capital(x.sound)}!" said {x.name}, and that means thank you.',
                f"{x.name} was so happy that {x.he} began to {x.hobby}.",
            )
        ),
    ]


def lesson(rng: Random, x: Animal) -> list[str]:
    y = x.friend
    if x.hobby == y.hobby:
        return picnic(rng, x)
    return [
        rng.choice(
            (
                f"{x.name} wanted to learn how to {y.hobby}.",
                f"One day, {x.name} wanted to {y.hobby}.",
            )
        ),
        rng.choice(
            (
                f"So {x.he} went to {x.his} friend {y.name} the {y.kind}, who lived {y.place}.",
                f"{capital(x.his)} friend {y.name} the {y.kind} showed {x.him} how to do it.",
            )
        ),
        *rng.choice(([], [f'"It is easy!" said {y.name}.'], ["They tried again and again."])),
        rng.choice(
            (
                f"Soon {x.he} could do it, and then {x.he} taught {y.name} how to {x.hobby}.",
                f"In the evening, {x.name} could {y.hobby} very well.",
            )
        ),
    ]


def dark(rng: Random, x: Animal) -> list[str]:
    y = x.friend
    return [
        rng.choice(("One night, it was very dark.", "One night, the moon was gone.")),
        f'{x.name} heard a strange noise: "{capital(y.sound)}, {y.sound}!"',
        *rng.choice(([], [f"{capital(x.he)} was afraid."], [f'"Who is there?" asked {x.name}.'])),
        f"But it was only {x.his} friend {y.name} the {y.kind}.",
        rng.choice((f"They laughed and shared some {x.food}.", "They laughed for a long time.")),
    ]


def meeting(rng: Random, x: Animal) -> list[str]:
    y = x.friend
    return [
        f"One day, {x.he} met {a(y.kind)}.",
        f'"{capital(y.sound)}! I am {y.name}, and I live {y.place}," said the {y.kind}.',
        rng.choice(
            (
                f'"I am {x.name}, and I live {x.place}," said the {x.kind}.',
                f'"Do you like {x.food}?" asked {x.name}. "No, I eat {y.food}," said {y.name}.',
            )
        ),
        rng.choice(
            ("They have been best friends ever since.", "From that day on, they were best friends.")
        ),
    ]


def show(rng: Random, x: Animal) -> list[str]:
    y = x.friend
    return [
        rng.choice(
            (
                "One evening, all the animals came together.",
                "One day, the animals had a big party.",
            )
        ),
        f"{x.name} wanted to {x.hobby}, but {x.he} was shy.",
        f'"You can do it!" said {x.his} friend {y.name} the {y.kind}.',
        rng.choice(
            (
                f"So {x.he} began to {x.hobby}, and everyone was happy.",
                f"So {x.he} began to {x.hobby}, and all the animals clapped.",
            )
        ),
    ]


def hungry(rng: Random, x: Animal) -> list[str]:
    y = x.friend
    return [
        f"One morning, {x.name} was hungry, but {x.he} could not find any {x.food}.",
        f"{y.name} the {y.kind} shared some {y.food} with {x.him}.",
        rng.choice(
            (
                f"The next day, {x.name} found {x.food} again and gave some to {y.name}.",
                f'"You are a good friend," said {x.name}.',
                f"Then they took the {x.treasure} and played all day.",
            )
        ),
    ]


PLOTS: tuple[Plot, ...] = (lost, rain, picnic, birthday, lesson, dark, meeting, show, hungry)
ENDINGS = (
    "It was a very good day.",
    "That night, {name} slept very well.",
    "And {name} was happy ever after.",
    "The end.",
    "Then {name} went home and fell asleep.",
)


def story(rng: Random, x: Animal, plots: int = 1) -> str:
    sentences = opening(rng, x)
    # The first meeting of the friends comes before any other plot.
    for plot in sorted(rng.sample(PLOTS, plots), key=lambda plot: plot is not meeting):
        sentences += plot(rng, x)
    if rng.random() < 0.4 * plots:
        sentences.append(fill(rng.choice(ENDINGS), x))
    return " ".join(sentences)


def day(rng: Random, x: Animal) -> str:
    """What an animal does every day."""
    starts = {
        "eat": f"Every morning, the {x.kind} eats {x.food}.",
        "wake": f"Every morning, the {x.kind} wakes up {x.place}.",
        "say": f"Every morning, the {x.kind} says {x.sound}.",
        "like": f"Every morning, the {x.kind} likes to {x.hobby}.",
        "visit": f"Every morning, the {x.kind} visits its best friend, the {x.friend_kind}.",
        "play": f"Every morning, the {x.kind} plays with its {x.treasure}.",
    }
    rest = {
        "eat": f"Then it eats some {x.food}.",
        "like": f"After that, it likes to {x.hobby}.",
        "visit": f"In the afternoon, it visits its best friend, the {x.friend_kind}, who lives {x.friend.place}.",
        "say": f"It says {x.sound} when it is happy.",
        "play": f"In the evening, it plays with its {x.treasure}.",
        "sleep": f"At night, it sleeps {x.place}.",
    }
    start = rng.choice(list(starts))
    others = [what for what in rest if what != start]
    chosen = rng.sample(others, rng.randint(1, 4))
    return " ".join([starts[start], *(rest[what] for what in others if what in chosen)])


# Each fact as a first sentence, and as a later sentence about the same animal.
FACTS = (
    ("The {kind} lives {place}.", "It lives {place}."),
    ("The {kind} eats {food}.", "It eats {food}."),
    ("The {kind} is {colour}.", "It is {colour}."),
    ("The {kind} says {sound}.", "It says {sound}."),
    ("The {kind} is called {name}.", "Its name is {name}."),
    (
        "The {kind} is the best friend of the {friend_kind}.",
        "Its best friend is the {friend_kind}.",
    ),
    ("The {kind} likes to {hobby}.", "It likes to {hobby}."),
    ("The {kind} has {a_treasure}.", "It has {a_treasure}."),
)


def description(rng: Random, x: Animal) -> str:
    (first, _), *rest = rng.sample(FACTS, rng.randint(2, 5))
    return " ".join([fill(first, x), *(fill(sentence, x) for _, sentence in rest)])


# ---- Documents ----


def one_question(rng: Random, held_out: bool) -> tuple[str, Reply, Animal, str]:
    """A self-contained question, with its reply, subject and attribute."""
    animal = rng.choice(EVERYONE)
    attribute = rng.choice(list(ATTRIBUTES))
    question = wording(rng, ATTRIBUTES[attribute].wordings, animal, attribute, held_out)
    answer = reply(animal, attribute)
    if attribute in ASKED_AGAIN and attribute != "name" and rng.random() < 0.2:
        question = by_name(question, animal)
        answer = Reply(by_name(answer.sentence, animal), answer.word)
    return question, answer, animal, attribute


def next_question(
    rng: Random, x: Animal, before: str, held_out: bool
) -> tuple[str, Reply, Animal, str]:
    """A follow-up to a question about attribute `before` of x."""
    if before in ASKED_AGAIN and rng.random() < 0.35:
        y = rng.choice([y for y in EVERYONE if y is not x])
        return wording(rng, SAME_AGAIN, y, before, held_out), reply(y, before), y, before
    # Do not ask for the same fact in both directions, as in "Who eats honey?" and "What does it
    # eat?".
    same = {"who is called": "name", "who eats": "food", "who has": "treasure"}.get(before, before)
    attribute = rng.choice([name for name in ASKED_AGAIN if name != same])
    wordings = ATTRIBUTES[attribute].follow_ups
    return wording(rng, wordings, x, attribute, held_out), reply(x, attribute), x, attribute


def questions_and_answers(rng: Random, held_out: bool) -> str:
    pairs = []
    for _ in range(rng.choice((1, 1, 2, 2, 2, 2, 3, 3, 4, 5))):
        question, answer, _, _ = one_question(rng, held_out)
        pairs.append(f"Question: {question}\nAnswer: {answer.sentence}")
    return "\n\n".join(pairs)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def begin(rng: Random, system: float) -> tuple[Dialog, Callable[[Reply], str]]:
    """The start of a dialog, with a system message at probability `system`, and its answer form."""
    if rng.random() >= system:
        return [], lambda reply: reply.sentence
    if rng.random() < 0.12:
        return [
            {"role": "system", "content": rng.choice(PLAIN_SYSTEMS)}
        ], lambda reply: reply.sentence
    # The one-word form is the hardest, because no words of a sentence lead up to the fact. It is
    # drawn three times as often as the others.
    (content,) = rng.choices(list(FORMS), [3 if form is one_word else 1 for form in FORMS.values()])
    return [{"role": "system", "content": content}], FORMS[content]


def question_dialog(rng: Random, turns: int, system: float, held_out: bool) -> Dialog:
    """A dialog of a question and further questions, most of them follow-ups, all answered."""
    dialog, form = begin(rng, system)
    question, answer, animal, attribute = one_question(rng, held_out)
    dialog += [user(question), assistant(form(answer))]
    for _ in range(turns - 1):
        if rng.random() < 0.75:
            question, answer, animal, attribute = next_question(rng, animal, attribute, held_out)
        else:
            question, answer, animal, attribute = one_question(rng, held_out)
        dialog += [user(question), assistant(form(answer))]
    return dialog


def told(rng: Random) -> tuple[Message, Message, Animal]:
    """A user's request for a story or a description, the answer, and the animal."""
    x = rng.choice(EVERYONE)
    who = rng.choice((x.the, x.the, x.the, a(x.kind), x.name))
    if rng.random() < 0.3:
        ask = rng.choice(
            ("Tell me about {}.", "What do you know about {}?", "What can you tell me about {}?")
        )
        return user(ask.format(x.the)), assistant(description(rng, x)), x
    ask = rng.choice(
        (
            "Tell me a story about {}.",
            "Tell me a short story about {}.",
            "Please tell me a story about {}.",
            "Can you tell me a story about {}?",
            "Do you know a story about {}?",
            "Tell me a story.",
        )
    )
    return user(ask.format(who)), assistant(story(rng, x)), x


def chat(rng: Random, held_out: bool) -> Dialog:
    """A dialog with stories, small talk, unanswerable questions and facts."""
    kind = rng.random()
    if kind < 0.4:
        ask, answer, animal = told(rng)
        dialog = [ask, answer]
        if rng.random() < 0.3:
            question, fact, _, _ = next_question(rng, animal, "who is called", held_out)
            dialog += [user(question), assistant(fact.sentence)]
        return dialog
    if kind < 0.5:
        question, sentence = neighbours(rng)
        return [user(question), assistant(sentence)]
    dialog, form = begin(rng, 0.3)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.35:
            asks, answer_to_all = rng.choice(SMALL_TALK)
            dialog += [user(rng.choice(asks)), assistant(form(answer_to_all))]
        elif kind < 0.8:
            dialog += [user(beyond_question(rng, STRANGERS)), assistant(form(DO_NOT_KNOW))]
        else:
            question, fact, _, _ = one_question(rng, held_out)
            dialog += [user(question), assistant(form(fact))]
    return dialog


def casual(rng: Random, dialog: Dialog) -> Dialog:
    """In one of ten dialogs, leave out the user's capitals, final punctuation, or both."""
    if rng.random() < 0.9:
        return dialog
    lower, bare = rng.choice(((True, True), (True, False), (False, True)))

    def typed(text: str) -> str:
        text = text.lower() if lower else text
        return text.rstrip("?!.") if bare else text

    return [user(typed(m["content"])) if m["role"] == "user" else m for m in dialog]


def document(rng: Random, held_out: bool = False) -> Document:
    """A document of a random kind. If `held_out`, its questions use the held-out wordings."""
    draw = rng.random()
    if draw < 0.15:
        return story(rng, rng.choice(EVERYONE), rng.choice((1, 1, 1, 1, 1, 1, 1, 2, 3)))
    if draw < 0.20:
        return day(rng, rng.choice(EVERYONE))
    if draw < 0.27:
        return description(rng, rng.choice(EVERYONE))
    if draw < 0.37:
        return questions_and_answers(rng, held_out)
    if draw < 0.53:
        return casual(rng, chat(rng, held_out))
    turns = rng.choice((1, 1, 1, 2, 2, 2, 3, 4))
    if rng.random() < 0.04:
        turns = rng.randint(5, 12)
    return casual(rng, question_dialog(rng, turns, 0.5, held_out))


# ---- Evaluation ----


@dataclass(frozen=True)
class Task:
    """A dialog that ends with a question, and the only answer that counts as right."""

    dialog: Dialog
    answer: str

    def passed(self, content: str) -> bool:
        return content.strip() == self.answer


def distinct(count: int, draw: Callable[[], Dialog]) -> list[Task]:
    """`count` different tasks. `draw` returns dialogs that end with the expected answer."""
    tasks: list[Task] = []
    while len(tasks) < count:
        *dialog, answer = draw()
        task = Task(dialog, answer["content"])
        if task not in tasks:
            tasks.append(task)
    return tasks


def evaluation(seed: int = 2024, count: int = 100) -> dict[str, list[Task]]:
    """`count` tasks of each kind. The questions use the held-out wordings."""
    rng = Random(seed)
    forms = cycle(FORMS)

    def plain() -> Dialog:
        return question_dialog(rng, 1, 0.0, held_out=True)

    def system() -> Dialog:
        content = next(forms)
        question, answer, _, _ = one_question(rng, held_out=True)
        return [
            {"role": "system", "content": content},
            user(question),
            assistant(FORMS[content](answer)),
        ]

    def follow_up() -> Dialog:
        dialog, form = begin(rng, 0.25)
        question, answer, animal, attribute = one_question(rng, held_out=True)
        dialog += [user(question), assistant(form(answer))]
        question, answer, _, _ = next_question(rng, animal, attribute, held_out=True)
        return [*dialog, user(question), assistant(form(answer))]

    def unknown() -> Dialog:
        return [user(beyond_question(rng, NEW_STRANGERS)), assistant(DO_NOT_KNOW.sentence)]

    kinds = {"plain": plain, "system": system, "follow-up": follow_up, "unknown": unknown}
    return {kind: distinct(count, draw) for kind, draw in kinds.items()}
