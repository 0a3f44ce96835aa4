"""The words of the offline world and the facts about them. Each word has one meaning, so that texts can be checked."""

ANIMALS = {  # name: (eats, lives in, gives, trait, trait)
    "cow": ("grass", "barn", "milk", "big", "gentle"), "goat": ("leaves", "shed", "cheese", "clever", "noisy"),
    "hen": ("grain", "coop", "eggs", "small", "busy"), "sheep": ("grass", "field", "wool", "woolly", "calm"),
    "horse": ("hay", "stable", "rides", "strong", "fast"), "pig": ("scraps", "pen", "bacon", "pink", "smart"),
    "duck": ("snails", "pond", "feathers", "quiet", "funny"), "goose": ("grass", "pond", "feathers", "loud", "brave"),
    "donkey": ("hay", "stable", "rides", "slow", "patient"), "dog": ("meat", "house", "safety", "loyal", "happy"),
    "cat": ("fish", "house", "company", "quick", "sleepy"), "bee": ("nectar", "hive", "honey", "tiny", "busy"),
    "llama": ("hay", "field", "wool", "tall", "proud"), "alpaca": ("grass", "field", "wool", "soft", "curious"),
    "rabbit": ("lettuce", "hutch", "fur", "shy", "quick"), "turkey": ("seeds", "coop", "meat", "round", "loud"),
    "ox": ("hay", "barn", "power", "heavy", "strong"), "rooster": ("grain", "coop", "songs", "proud", "loud"),
    "lamb": ("milk", "field", "wool", "young", "soft"), "pony": ("oats", "stable", "rides", "small", "friendly"),
}
VEGETABLES = {  # name: (colour, taste)
    "carrot": ("orange", "sweet"), "potato": ("brown", "plain"), "bean": ("green", "mild"),
    "onion": ("white", "sharp"), "cabbage": ("green", "mild"), "tomato": ("red", "juicy"),
    "pumpkin": ("orange", "sweet"), "pea": ("green", "sweet"), "beet": ("purple", "rich"),
    "turnip": ("white", "sharp"), "leek": ("green", "mild"), "spinach": ("green", "fresh"),
    "radish": ("red", "sharp"), "celery": ("green", "fresh"), "garlic": ("white", "strong"),
    "corn": ("yellow", "sweet"),
}
FRUITS = {  # name: (colour, taste)
    "apple": ("red", "crisp"), "pear": ("green", "sweet"), "plum": ("purple", "juicy"), "cherry": ("red", "sweet"),
    "peach": ("pink", "soft"), "grape": ("purple", "sweet"), "melon": ("green", "juicy"), "berry": ("blue", "sweet"),
    "lemon": ("yellow", "sour"), "fig": ("purple", "rich"), "apricot": ("orange", "soft"), "quince": ("yellow", "sour"),
}
TOOLS = {  # name: (what it does, trait)
    "shovel": ("dig holes", "strong"), "rake": ("gather leaves", "light"), "hoe": ("cut weeds", "sharp"),
    "axe": ("split logs", "sharp"), "hammer": ("drive nails", "heavy"), "saw": ("cut wood", "sharp"),
    "bucket": ("carry water", "deep"), "rope": ("tie gates", "long"), "ladder": ("climb trees", "tall"),
    "tractor": ("pull carts", "big"), "wagon": ("move hay", "wide"), "hose": ("water plants", "long"),
    "basket": ("hold eggs", "light"), "brush": ("clean horses", "soft"),
}
PLACES = ("barn", "pond", "field", "stable", "coop", "garden", "orchard", "river", "hill", "road", "market", "mill")
TREES = ("oak", "pine", "elm", "maple", "willow", "birch", "cedar", "ash")
FLOWERS = ("rose", "daisy", "tulip", "lily", "poppy", "violet", "iris", "peony")
NAMES = ("Anna", "Ben", "Clara", "Dan", "Ella", "Fred", "Grace", "Henry",
         "Ida", "Jack", "Kate", "Leo", "Mary", "Ned", "Olga", "Paul")
ISSUES = {  # {what a note is about: what it asks the reader to do}
    "broken fence": "mend it", "sick goat": "call the vet", "lost dog": "look for it", "new tractor": "try it",
    "late rain": "water the beans", "ripe plums": "pick them", "open gate": "close it", "empty bucket": "fill it",
    "muddy road": "clear it", "cold barn": "add some straw", "hungry pig": "feed it",
    "full basket": "carry it home", "old ladder": "paint it", "dry field": "water it", "wet hay": "dry it",
    "loud rooster": "calm it", "flat tire": "change it", "dark stable": "bring a lamp",
    "early frost": "cover the beans", "blunt axe": "sharpen it",
}
CATEGORIES = {"animals": tuple(ANIMALS), "vegetables": tuple(VEGETABLES), "fruits": tuple(FRUITS),
              "tools": tuple(TOOLS), "places": PLACES, "trees": TREES, "flowers": FLOWERS}
SINGULAR = {"animals": "animal", "vegetables": "vegetable", "fruits": "fruit", "tools": "tool",
            "places": "place", "trees": "tree", "flowers": "flower"}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
CATEGORY_OF = {thing: category for category, things in CATEGORIES.items() for thing in things}

STEPS = {  # {verb: (the four steps of doing it, the things that it is done to)}; {eats}, {lives}: from ANIMALS
    "plant": (("dig a small hole", "put the {x} in", "cover it with soil", "water it well"), (*VEGETABLES, *FRUITS)),
    "feed": (("fill a bucket with {eats}", "walk to the {lives}", "call the {x}", "let it eat slowly"), (*ANIMALS,)),
    "cook": (("wash the {x}", "cut it into pieces", "boil it in a pot", "add some salt"), (*VEGETABLES,)),
    "clean": (("find a cloth", "brush the {x}", "rinse it well", "let it dry"),
              (*TOOLS, "barn", "stable", "coop", "mill")),
    "catch": (("stay calm and quiet", "hold some {eats}", "wait for the {x}", "close the gate"), (*ANIMALS,)),
    "pick": (("put on your gloves", "find a ripe {x}", "twist it gently", "carry it home"), (*FRUITS, *VEGETABLES)),
}
REQUESTS = ("bring me", "give me", "clean", "move", "fix", "find", "hold", "sell me", "show me", "carry", "pass me",
            "wash")
RUDE = ("That is a silly question.", "You are lazy.", "Look it up yourself.", "What a stupid thing to ask.",
        "Go away, I am bored.")
OPENINGS = ("Sure!", "Of course!", "Happy to help!", "Good question!")
CLOSINGS = ("I hope this helps.", "Let me know if you need more.", "Have a nice day on the farm.")


def properties(x):
    """The set of all words that are true of the thing x; empty if nothing is known of it."""
    facts = ANIMALS.get(x) or VEGETABLES.get(x) or FRUITS.get(x) or TOOLS.get(x) or ()
    return {word for fact in facts for word in fact.split()}


def steps(verb, x):
    """The four steps (strings) of doing `verb` to the thing x."""
    eats, lives = ANIMALS[x][:2] if x in ANIMALS else ("", "")
    return [step.format(x=x, eats=eats, lives=lives) for step in STEPS[verb][0]]
