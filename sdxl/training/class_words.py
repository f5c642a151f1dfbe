"""Words that captions are made of, by what they say about the thing that is shown.

Data for `start_words.py`. A word that is missing costs a start word; one too many may give a wrong one.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


BEINGS = _words(
    """
    person man woman boy girl child kid baby toddler lady gentleman guy teenager couple bride groom
    actor actress singer dancer musician guitarist athlete boxer wrestler chef doctor nurse soldier pilot astronaut
    knight king queen prince princess wizard witch warrior samurai ninja pirate cowboy clown
    character creature monster alien robot android cyborg dragon unicorn fairy mermaid ghost zombie vampire demon angel elf
    dwarf goblin troll orc dinosaur mascot superhero
    animal pet dog puppy cat kitten kitty poodle corgi husky labrador beagle bulldog pug dachshund terrier retriever
    chihuahua dalmatian pitbull rottweiler shepherd collie spaniel greyhound horse pony foal donkey mule cow bull calf ox
    sheep lamb goat pig piglet rabbit bunny hare hamster gerbil mouse rat squirrel chipmunk hedgehog ferret otter beaver
    raccoon badger skunk fox wolf coyote bear panda koala kangaroo sloth monkey ape gorilla chimpanzee lion tiger leopard
    cheetah jaguar lynx panther elephant giraffe zebra hippo rhino camel llama alpaca deer moose elk reindeer antelope
    bison buffalo bat bird parrot parakeet budgie cockatiel canary finch sparrow robin crow raven magpie pigeon dove owl
    eagle hawk falcon vulture chicken hen rooster duck duckling goose swan turkey peacock flamingo pelican stork heron
    seagull penguin ostrich toucan hummingbird fish goldfish shark whale dolphin seal walrus octopus squid jellyfish crab
    lobster shrimp turtle tortoise snake lizard gecko iguana chameleon crocodile alligator frog toad salamander axolotl
    insect butterfly moth bee beetle ladybug dragonfly ant spider scorpion snail
    """
)
"""People, animals and figures. A caption that lists tags names one of these only if it is what is shown."""

THINGS = _words(
    """
    toy doll teddy plush plushie figurine figure statue sculpture bust puppet lego
    car truck van bus taxi jeep suv convertible limousine motorcycle motorbike scooter moped bicycle bike tricycle tractor
    train locomotive tram airplane plane aircraft jet helicopter drone rocket spaceship spacecraft boat ship yacht sailboat
    canoe kayak submarine tank skateboard snowboard surfboard sled wagon stroller wheelchair
    shoe sneaker boot sandal heel slipper shirt blouse sweater hoodie jacket coat vest dress skirt gown kimono suit
    jeans pants shorts hat cap helmet crown mask scarf tie glove sock bag handbag backpack purse wallet suitcase umbrella
    watch ring necklace bracelet earring glasses sunglasses
    chair armchair stool sofa couch bench table desk bed crib wardrobe dresser bookshelf shelf lamp lantern chandelier candle
    clock vase bowl plate cup mug teapot kettle jug bottle glass jar pot pan basket box pillow blanket rug carpet
    curtain mirror painting
    phone smartphone laptop computer keyboard monitor tablet television tv radio camera speaker headphones microphone
    toaster blender microwave oven refrigerator fridge stove washer vacuum fan
    guitar piano violin cello drum flute trumpet saxophone trombone harp accordion ukulele
    knife fork spoon sword shield axe hammer drill wrench screwdriver gun rifle bow
    pen pencil brush book magazine notebook
    ball football basketball racket bat club
    cake cupcake cookie donut bread sandwich burger hamburger pizza sushi taco pie pancake waffle candy
    apple pear banana lemon strawberry pineapple watermelon grape cherry mango tomato carrot pumpkin
    flower tulip sunflower orchid cactus succulent bonsai plant tree mushroom leaf
    house cottage cabin castle church cathedral temple mosque tower bridge lighthouse windmill barn skyscraper fountain
    logo icon emblem
    """
)
"""Things that can be a subject, without those that are colours or verbs too, and without places. They may also stand beside
a subject, so a caption must say that it is one of them."""

CLASS_WORDS = BEINGS | THINGS

MEDIA = _words(
    """
    photo photos photograph photography picture pic image snapshot selfie portrait shot closeup close-up up render rendering
    drawing illustration sketch painting artwork cartoon screenshot view
    """
)
"""What a caption calls the picture itself."""

DETERMINERS = _words("a an the this that my your his her our their its one")

ENDS = _words(
    """
    about above across after against along among amid around as at atop before behind below beneath beside between beyond by
    down during except for from in inside into like near next of off on onto out outside over past through to toward towards
    under underneath up upon via while with within without
    and or but nor plus & that which who whose where when if because so than then not
    is are was were be been being am has have had does do did can could will would may might must should
    sits stands lies lays looks wears holds runs walks jumps plays eats drinks sleeps rests poses smiles stares faces gazes
    rides drives flies swims climbs hangs leans carries shows sat stood lay looked wore held ran made seen shot taken worn
    asleep awake alone outdoors indoors outside inside here there together
    """
)
"""Words with which a noun phrase ends: prepositions, conjunctions, and verbs and adverbs of captions."""

STYLE = _words("style styled stylized aesthetic")
"""A caption with one of these may name a style, and the nouns in it are what is shown in that style."""

FOREIGN = _words(
    """
    ein eine einen einem einer der das dem und mit auf von vom im zum zur
    un une le les de des du et avec dans sur sous
    el los las una unas unos y con del um uma com em
    il gli uno della di che nel
    een het met op aan bij en og med på av ett och
    """
)
"""Function words of other languages. What looks English in such captions may mean something else."""
