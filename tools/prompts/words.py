"""The words of the prompts: scenes whose parts all go together, and the ways to show them.
Spelled the American way, as most captions are.

In a scene every subject can do every action in every place, under every light of its kind, so none
of them may speak of hours or weather. An action reads after "a baker" and after "a baker is"; the
actions of scenery read only after the noun.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scene:
    """Things that can be combined at will.

    Attributes:
        kind: decides what it may be drawn in, how it may be framed and how people are told apart; a
            key of ``MEDIA_OF``.
        light: a key of ``LIGHTS``.
        details: sentences without capital and stop.
    """

    kind: str
    light: str
    subjects: tuple[str, ...]
    actions: tuple[str, ...]
    places: tuple[str, ...]
    details: tuple[str, ...]


@dataclass(frozen=True)
class Medium:
    """A way of making pictures.

    Attributes:
        finishes: what can be said of it after "with".
        tags: what people put at the end of a list.
        lit: whether light and hour mean anything in it.
        framed: whether points of view do.
        bare: a thing by itself: no place, no light, no story.
    """

    names: tuple[str, ...]
    finishes: tuple[str, ...]
    tags: tuple[str, ...]
    lit: bool = True
    framed: bool = True
    bare: bool = False


@dataclass(frozen=True)
class Phrasing:
    """One thing in the ways it is put: in a list of tags, after a noun, and as a sentence of its
    own."""

    tag: str
    phrase: str
    sentence: str = ""


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("/") if part.strip())


def _scene(
    kind: str, light: str, subjects: str, actions: str, places: str = "", details: str = ""
) -> Scene:
    return Scene(kind, light, _split(subjects), _split(actions), _split(places), _split(details))


def _medium(
    names: str,
    finishes: str,
    tags: str,
    *,
    lit: bool = True,
    framed: bool = True,
    bare: bool = False,
) -> Medium:
    return Medium(_split(names), _split(finishes), _split(tags), lit, framed, bare)


def _phrasings(text: str) -> tuple[Phrasing, ...]:
    return tuple(Phrasing(*_split(line)) for line in text.strip().splitlines())


# ---- scenes

SCENES = (
    # people at work
    _scene(
        "person",
        "in",
        "baker / pastry chef",
        "kneading dough on a floured table / pulling loaves from a brick oven / dusting pastries "
        "with sugar"
        "/ carrying a basket of warm bread / brushing a braided loaf with egg",
        "in a small village bakery / in a busy bakery / in a narrow basement bakery / in a family "
        "bakery",
        "flour hangs in the air / loaves cool on wooden racks / an apron hangs from a hook",
    ),
    _scene(
        "person",
        "in",
        "violinist / cellist / guitarist / clarinet player / saxophonist",
        "playing with closed eyes / practicing a difficult passage / rehearsing alone / playing a "
        "slow solo / taking a bow",
        "on an empty stage / in a small jazz club / in a practice room / in an old concert hall",
        "an open instrument case lies on the floor / sheet music is spread out on a stand / dust "
        "floats in the air",
    ),
    _scene(
        "person",
        "out",
        "street musician / accordion player / trumpet player / drummer",
        "playing for passersby / singing with full voice / resting between songs / tapping along "
        "to the beat",
        "on a cobbled square / in front of a fountain / on an old stone bridge / at a street "
        "corner",
        "a hat with a few coins lies on the ground / pigeons strut around / a small crowd has "
        "gathered",
    ),
    _scene(
        "person",
        "day",
        "farmer / orchard worker",
        "picking apples from a ladder / carrying a crate of apples / pruning a branch / resting "
        "against a tree trunk",
        "in an old orchard / in an orchard on a hillside / in a small family orchard",
        "ripe fruit lies in the grass / wooden crates are stacked by the path",
    ),
    _scene(
        "person",
        "day",
        "gardener",
        "watering tomato plants / planting seedlings / pushing a wheelbarrow / trimming a hedge / "
        "smelling a rose",
        "in a walled garden / in a community garden / in a kitchen garden / in a garden behind a "
        "cottage",
        "bees visit the lavender / terracotta pots stand in a row / a straw hat hangs on a fork "
        "handle",
    ),
    _scene(
        "person",
        "in",
        "scientist / chemist / biologist / lab technician",
        "looking through a microscope / labeling glass vials / writing notes on a clipboard / "
        "holding up a test tube",
        "in a modern laboratory / in a university lab / in a cluttered research lab",
        "glass flasks line the shelves / a screen shows rows of numbers / a whiteboard is covered "
        "in formulas",
    ),
    _scene(
        "person",
        "in",
        "doctor / nurse / surgeon",
        "reading a chart / talking on the phone / washing hands / drinking coffee from a paper cup",
        "in a hospital corridor / at a reception desk / in a small clinic / in a hospital break "
        "room",
        "a stethoscope hangs around the neck / a clock on the wall shows ten past four",
    ),
    _scene(
        "person",
        "in",
        "carpenter / woodworker / boat builder",
        "planing a plank / sanding the back of a chair / measuring a board / carving a wooden "
        "spoon / oiling a tabletop",
        "in a crowded workshop / at a long workbench / in a barn full of tools",
        "wood shavings cover the floor / hand tools hang on the wall / a radio stands on the "
        "windowsill",
    ),
    _scene(
        "person",
        "in",
        "potter / ceramic artist",
        "shaping a bowl on the wheel / glazing a row of cups / trimming a vase / painting a plate",
        "in a pottery studio / in a whitewashed studio / in a converted garage",
        "clay dust covers every surface / the shelves are full of unfinished pots",
    ),
    _scene(
        "person",
        "in",
        "painter / art student / sculptor",
        "sketching with charcoal / stepping back to look at the work / cleaning brushes / pinning "
        "sketches to the wall",
        "in a loft studio / in a cluttered studio / in an attic studio",
        "paint spots cover the floorboards / canvases lean against the wall / jars of brushes "
        "stand on the sill",
    ),
    _scene(
        "person",
        "out",
        "firefighter",
        "rolling up a hose / checking an oxygen tank / climbing down from a fire engine / carrying "
        "a rescued kitten",
        "in front of a fire station / on a city street / in front of a burned barn",
        "the helmet is scratched and sooty / puddles cover the ground",
    ),
    _scene(
        "person",
        "out",
        "fisher / sailor / harbor worker",
        "mending a net / coiling a rope / sorting the catch / looking out to sea / scrubbing the "
        "deck",
        "on a small fishing boat / on an old trawler / on a boat in the harbor",
        "gulls circle overhead / wet rope lies in heaps / rust stains run down the metal",
    ),
    _scene(
        "person",
        "in",
        "chef / cook / sous-chef",
        "tasting a soup / slicing vegetables / plating a dessert / tossing noodles in a wok / "
        "sharpening a knife",
        "in a restaurant kitchen / in an open kitchen / in a food truck",
        "steam rises from the pots / copper pans hang overhead / order slips are clipped to a rail",
    ),
    _scene(
        "person",
        "in",
        "librarian / bookseller / historian / student",
        "sorting a stack of old books / reading in an armchair / carrying a pile of books / taking "
        "a book from a high shelf",
        "in an old library / in a secondhand bookshop / among tall bookshelves",
        "a ladder leans against the shelves / dust floats in the air / a cat sleeps on the counter",
    ),
    _scene(
        "person",
        "out",
        "cyclist / bike courier",
        "riding up a steep street / waiting for the light to change / locking up a bicycle / "
        "fixing a flat tire",
        "in a busy city / in an old town / on a tree-lined avenue",
        "a bag is slung across one shoulder / traffic blurs in the background / tram tracks shine "
        "in the asphalt",
    ),
    _scene(
        "person",
        "out",
        "hiker / mountaineer / park ranger",
        "climbing a steep path / resting on a boulder / studying a map / drinking from a tin cup / "
        "pitching a tent",
        "on a mountain trail / on a rocky ridge / high in the mountains / above a wide valley",
        "a heavy backpack leans against a rock / far below, a river winds through the valley",
    ),
    _scene(
        "person",
        "day",
        "surfer / lifeguard",
        "carrying a board down to the water / waxing a surfboard / watching the waves / walking "
        "barefoot",
        "on a sandy beach / on a rocky shore / at a windy beach",
        "long waves roll in / footprints run down to the water / wet sand mirrors the sky",
    ),
    _scene(
        "person",
        "in",
        "dancer / ballet dancer / flamenco dancer / breakdancer",
        "leaping across the floor / spinning on one foot / rehearsing a slow movement / catching a "
        "breath",
        "in a mirrored dance studio / in a rehearsal room / on a bare stage",
        "the wooden floor is worn smooth / a water bottle stands by the wall",
    ),
    _scene(
        "person",
        "in",
        "mechanic",
        "working under the hood of a car / wiping oily hands on a rag / changing a tire / "
        "tightening a bolt",
        "in a small garage / in a repair shop / in a converted barn",
        "tools are laid out on a red cart / oil stains cover the concrete / an old calendar hangs "
        "on the wall",
    ),
    _scene(
        "person",
        "in",
        "tailor / fashion designer / costume maker",
        "pinning a jacket on a dress form / cutting blue cloth / threading a sewing machine / "
        "ironing a sleeve",
        "in a tailor's shop / in a sewing workshop / at a long cutting table",
        "spools of thread fill a wall / scraps of fabric cover the floor",
    ),
    _scene(
        "person",
        "in",
        "teacher / math professor / physicist",
        "writing on a blackboard / pointing at a diagram / grading papers / explaining an equation",
        "in an old classroom / in a lecture hall / in a seminar room",
        "chalk dust covers the desk / the blackboard is full of formulas",
    ),
    _scene(
        "person",
        "in",
        "barista",
        "pouring milk into a cup / wiping the counter / grinding coffee / handing over a cup / "
        "polishing a glass",
        "in a small coffee shop / behind a marble counter / in a corner cafe",
        "steam curls from the espresso machine / cups are stacked on top of the machine",
    ),
    _scene(
        "person",
        "day",
        "market vendor / fruit seller / flower seller",
        "arranging the stall / counting coins / wrapping a bunch of flowers / calling out to "
        "customers",
        "at a street market / on a crowded square / at a market by the harbor",
        "striped awnings sway in the wind / crates of lemons are piled high / handwritten price "
        "tags are everywhere",
    ),
    _scene(
        "person",
        "in",
        "watchmaker / jeweler / clock restorer",
        "bending over tiny gears / adjusting a loupe / winding a pocket watch / picking up a screw "
        "with tweezers",
        "at a cluttered workbench / in a tiny shop / in a shop full of ticking clocks",
        "brass parts are laid out in rows / dozens of clocks hang on the wall, each showing "
        "another time",
    ),
    _scene(
        "person",
        "in",
        "programmer / radio host / game developer / sound engineer",
        "working late at a desk / adjusting a pair of headphones / leaning back in a chair / "
        "typing on a keyboard",
        "in a small studio / in a cluttered home office / in a room full of screens",
        "cables run across the desk / a cold cup of coffee stands next to the keyboard / sticky "
        "notes cover the wall",
    ),
    _scene(
        "person",
        "day",
        "skateboarder",
        "jumping down a flight of steps / rolling through a concrete bowl / sitting on the edge of "
        "a ramp / landing a kickflip",
        "in a skate park / on an empty plaza / under a highway bridge",
        "graffiti covers the concrete / the board is scratched from years of use",
    ),
    _scene(
        "person",
        "day",
        "runner / sprinter / long jumper",
        "tying a running shoe / stretching / catching a breath / celebrating with raised arms",
        "on a running track / in a stadium / on a track by the sea",
        "the stands are full / white lines run across the red track",
    ),
    _scene(
        "person",
        "in",
        "boxer / wrestler / weightlifter / gymnast",
        "chalking both hands / warming up / resting on a bench / taping the wrists",
        "in an old gym / in an empty arena / in a basement gym",
        "the mirror is fogged up / ropes and rings hang from the ceiling",
    ),
    _scene(
        "person",
        "in",
        "basketball player / wheelchair basketball player",
        "spinning a ball on one finger / aiming for the basket / catching a pass / drinking from a "
        "water bottle",
        "in a school gym / in a sports hall / in a small arena",
        "colored lines cross the wooden floor / the scoreboard is dark",
    ),
    _scene(
        "person",
        "day",
        "beekeeper",
        "lifting a frame of honeycomb / inspecting a hive / pouring honey into a jar / calming a "
        "hive with smoke",
        "in a meadow full of clover / behind an old farmhouse / at the edge of an orchard",
        "bees fill the air / white wooden hives stand in a row",
    ),
    _scene(
        "person",
        "out",
        "photographer / birdwatcher / landscape painter",
        "waiting patiently / setting up a tripod / pointing at something in the distance / writing "
        "in a notebook",
        "at the edge of a marsh / on top of a hill / on a quiet lakeshore / on a cliff above the "
        "sea",
        "tall reeds sway in the wind / a folding stool stands in the grass",
    ),
    _scene(
        "person",
        "sea",
        "scuba diver / marine biologist / underwater photographer",
        "swimming beside a sea turtle / exploring a shipwreck / following a school of fish / "
        "floating upside down",
        "in a tropical lagoon / in the open sea / in a deep blue bay",
        "bubbles rise in a silver column / tiny fish flicker in and out of view",
    ),
    # people with time on their hands
    _scene(
        "street",
        "out",
        "woman / man / woman / man / person",
        "sitting on a bench / leaning on a railing / feeding pigeons / walking a small dog / "
        "looking at a phone"
        "/ laughing out loud / looking over one shoulder / eating an ice cream / reading a "
        "newspaper / waiting for a friend",
        "in a big city / in a small town / by a river / in a park / on a cobbled street / on a "
        "seaside promenade"
        "/ outside a train station / on a rooftop terrace",
        "people hurry by in the background / fallen leaves lie on the ground / a bicycle leans "
        "against a wall",
    ),
    _scene(
        "street",
        "in",
        "woman / man / woman / man / person",
        "reading in an armchair / drinking a cup of tea / watering houseplants / knitting a scarf "
        "/ writing a letter"
        "/ playing chess alone / looking out of the window / folding laundry / playing an upright "
        "piano / repotting a fern",
        "in a small apartment / in a country house / in a wooden cabin / in a converted loft / in "
        "a houseboat",
        "books are stacked on the floor / a kettle stands on the stove / a patterned rug covers "
        "the floorboards",
    ),
    _scene(
        "street",
        "in",
        "woman / man / person / commuter",
        "standing by the door / reading a paperback / listening to music / dozing in a seat / "
        "staring into space",
        "in a subway car / on a night bus / in a train compartment / on a ferry",
        "a forgotten umbrella hangs from a handrail / the seats are covered in worn green fabric"
        "/ reflections slide across the glass",
    ),
    _scene(
        "portrait",
        "studio",
        "woman / man / person / poet / pianist / athlete / fisher / engineer / architect / "
        "grandmother / grandfather / nurse",
        "with a calm expression / with a broad smile / with a thoughtful look / with a proud look "
        "/ with closed eyes"
        "/ with a serious face / laughing / looking into the distance / with a slight smile / "
        "resting chin on hand",
        "in front of a plain gray background / in front of a brick wall / in front of a dark "
        "backdrop"
        "/ in front of a faded blue wall / in front of a wall of ivy / in front of a mustard "
        "yellow background",
        "every line of the face is clear / the eyes are in perfect focus / the background is kept "
        "simple",
    ),
    _scene(
        "group",
        "out",
        "two old friends / three sisters / two brothers / group of teenagers / family of four / "
        "young couple / elderly couple",
        "having a picnic / laughing together / sharing a pizza / playing cards / taking a group "
        "photo / dancing barefoot",
        "in a park / on a rooftop / by a lake / in a backyard / on the steps of an old house",
        "paper lanterns hang between the trees / a blanket is spread out nearby / a dog watches "
        "from a distance",
    ),
    _scene(
        "group",
        "in",
        "four musicians / two chess players / three generations of a family / group of friends / "
        "old married couple",
        "talking over coffee / singing together / listening to the radio / sharing a meal / "
        "looking at old photographs",
        "around a kitchen table / in a crowded living room / in a village pub / in a small "
        "restaurant",
        "plates and glasses cover the table / coats are piled on a chair / framed photographs "
        "cover the wall",
    ),
    _scene(
        "child",
        "day",
        "little girl / little boy / toddler / child",
        "flying a kite / blowing soap bubbles / jumping over a puddle / riding a small bicycle / "
        "picking dandelions",
        "in a park / on a meadow / on a village street / in a playground",
        "a red balloon is caught in a tree / muddy boots tell of a long walk",
    ),
    _scene(
        "child",
        "day",
        "little girl / little boy / child",
        "building a sandcastle / digging a deep hole / collecting shells / running away from a "
        "wave",
        "on a wide beach / on a sandy bay / on a pebbly shore",
        "a blue bucket stands in the sand / small waves roll in",
    ),
    _scene(
        "child",
        "in",
        "little girl / little boy / child",
        "drawing with crayons / building a tower of wooden blocks / reading a picture book / "
        "playing with a toy train",
        "in a child's bedroom / in a playroom / on a living room floor",
        "stuffed animals sit in a row / a cardboard rocket stands in the corner",
    ),
    # animals
    _scene(
        "animal",
        "in",
        "tabby cat / ginger cat / black cat / Siamese kitten / old gray cat / calico cat / "
        "long-haired white cat / two kittens",
        "sleeping / stretching / sitting upright / yawning / playing with a ball of yarn / staring "
        "at a fly / curled up",
        "on a windowsill / on a worn sofa / on a kitchen chair / on a stack of books / on a "
        "patchwork quilt / on a piano",
        "whiskers catch the light / the fur looks soft enough to touch / a potted fern stands "
        "nearby",
    ),
    _scene(
        "animal",
        "day",
        "golden retriever / border collie / scruffy terrier / dachshund / greyhound / spotted "
        "puppy / mixed-breed dog / corgi",
        "running with a stick / shaking off water / catching a ball / waiting patiently / digging "
        "a hole / lying down",
        "on a beach / in a meadow / in a park / by a river / on a country road",
        "both ears are flying / muddy paw prints lead into the distance / a tennis ball lies "
        "nearby",
    ),
    _scene(
        "animal",
        "out",
        "red fox / badger / roe deer / hedgehog / gray wolf / wild boar / hare / brown bear",
        "standing still / sniffing the ground / drinking from a stream / moving through ferns / "
        "listening / resting",
        "in an old forest / at the edge of a forest / in a birch forest / in a forest clearing / "
        "among mossy rocks",
        "mushrooms grow on a fallen log / fallen leaves cover the ground / tall trees fade into "
        "the distance",
    ),
    _scene(
        "animal",
        "dry",
        "arctic fox / snow leopard / reindeer / snowshoe hare / white wolf / husky",
        "walking through fresh snow / resting / shaking snow from its fur / looking back / leaping "
        "over a snowdrift",
        "on a frozen plain / on a snowy slope / beside a frozen lake / among snow-covered pines",
        "a line of tracks leads into the distance / frost clings to the fur",
    ),
    _scene(
        "animal",
        "dry",
        "emperor penguin / penguin chick / colony of penguins / walrus / leopard seal",
        "resting / huddled against the wind / sliding into the water / calling",
        "on the sea ice / on a rocky shore / at the edge of an ice floe",
        "icebergs drift in the distance / the ice is blue where it has cracked",
    ),
    _scene(
        "animal",
        "dry",
        "elephant / giraffe / lioness / zebra / cheetah / rhinoceros / herd of elephants / baby "
        "elephant",
        "walking through tall grass / drinking at a waterhole / standing in the dust / resting in "
        "the shade",
        "on the savanna / on a wide plain / in the dry grasslands",
        "a lone acacia stands on the horizon / red dust hangs in the air / small birds circle "
        "overhead",
    ),
    _scene(
        "animal",
        "sea",
        "sea turtle / octopus / clownfish / cuttlefish / seahorse / lionfish / school of yellow "
        "fish",
        "drifting past bright corals / hovering above the sand / hiding in the shadow of a rock",
        "on a coral reef / in a shallow lagoon / in a bed of seagrass",
        "sea anemones sway in the current / tiny fish dart between the corals",
    ),
    _scene(
        "animal",
        "sea",
        "humpback whale / manta ray / whale shark / orca / dolphin / giant squid",
        "gliding through the water / rising toward the surface / turning slowly / disappearing "
        "into the blue",
        "in the open ocean / in a deep blue bay / above a sandy sea floor",
        "small fish swim alongside / everything beyond fades to blue",
    ),
    _scene(
        "animal",
        "day",
        "robin / goldfinch / wren / kingfisher / bluebird / sparrow / cardinal",
        "singing / fluffing its feathers / holding a twig in its beak / taking off / looking to "
        "one side",
        "on a mossy branch / on a fence post / on a garden gate / on a rusty watering can",
        "the background is a wash of soft green / red berries hang from the twigs",
    ),
    _scene(
        "animal",
        "day",
        "golden eagle / peregrine falcon / osprey / condor / flock of geese",
        "soaring / gliding / circling / flying low",
        "over a wide valley / above the cliffs / over open fields / over a mountain lake",
        "every feather is clear / far below, a road winds through the land",
    ),
    _scene(
        "animal",
        "night",
        "barn owl / tawny owl / great horned owl / raven / fruit bat / raccoon / lynx",
        "watching / resting / stretching / listening",
        "on a bare branch / on a ruined wall / on the roof of an old barn / in the fork of a great "
        "oak",
        "its eyes shine in the dark / ivy creeps up the wood",
    ),
    _scene(
        "animal",
        "out",
        "gray heron / flamingo / crane / stork / egret / pair of flamingos",
        "standing on one leg / wading in the shallows / preening / flapping both wings / looking "
        "for fish",
        "in a marsh / at the edge of a lake / in a river delta / in a rice paddy",
        "rings spread across the water / reeds stand in the background",
    ),
    _scene(
        "animal",
        "day",
        "brown cow / sheep / donkey / goat / pony / alpaca / two lambs / flock of sheep",
        "grazing / chewing on hay / standing by a gate / resting in the grass / wandering about",
        "on a hillside pasture / in a farmyard / beside a stone wall / in a field of buttercups",
        "a red barn stands in the background / the hills roll away to the horizon",
    ),
    _scene(
        "animal",
        "out",
        "white horse / chestnut mare / wild mustang / herd of wild horses / black stallion",
        "galloping / trotting / cantering",
        "along a beach / across a wide plain / through shallow water / along a dusty track",
        "mane and tail stream in the wind / hooves throw up spray and dust",
    ),
    _scene(
        "animal",
        "day",
        "bumblebee / ladybug / dragonfly / monarch butterfly / praying mantis / green beetle / "
        "snail",
        "resting / climbing / covered in dew / sitting still",
        "on a purple thistle / on a blade of grass / on a sunflower / on a wet leaf / on a white "
        "daisy",
        "every tiny hair is visible / the background dissolves into green",
    ),
    _scene(
        "animal",
        "day",
        "tree frog / chameleon / gecko / green iguana / toucan / scarlet macaw / sloth",
        "clinging to a branch / sitting perfectly still / climbing slowly / half hidden by leaves",
        "in a rainforest / in a mangrove swamp / in a jungle garden",
        "water drops hang from the leaves / vines twist around the trunks",
    ),
    _scene(
        "tale",
        "in",
        "raccoon / hedgehog / corgi / otter / fox / penguin / owl / hamster / frog / badger / "
        "mouse",
        "wearing a tiny chef's hat / dressed as a detective / playing the accordion / reading a "
        "newspaper"
        "/ drinking tea from a porcelain cup / painting a self-portrait / knitting a long scarf / "
        "wearing round glasses"
        "/ typing on an old typewriter / wearing a velvet jacket / baking cookies / playing chess "
        "against itself",
        "in a Victorian parlor / in a tiny apartment / in a hollow tree / in a cozy attic / in a "
        "doll's house",
        "a teapot steams on a side table / tiny paintings hang on the walls / a clock ticks on the "
        "mantelpiece",
    ),
    # scenery
    _scene(
        "land",
        "out",
        "mountain lake / alpine valley / glacier valley / mountain pass",
        "surrounded by dark pines / below jagged peaks / with a small wooden cabin / with "
        "wildflowers in the foreground"
        "/ with a winding path / with a herd of goats",
        "",
        "snow still lies on the highest peaks / loose stones cover the slopes / the water is "
        "perfectly still",
    ),
    _scene(
        "land",
        "out",
        "old oak forest / birch forest / pine forest / redwood forest / bamboo forest / ancient "
        "rainforest",
        "with a narrow path / with moss-covered rocks / with a fallen trunk across a stream / with "
        "ferns on the ground"
        "/ with an abandoned cabin / with a small waterfall",
        "",
        "everything is green and still / roots twist across the ground",
    ),
    _scene(
        "land",
        "out",
        "rocky coast / stretch of sea cliffs / sandy cove / rugged shoreline / tropical island / "
        "windswept headland",
        "with a white lighthouse / with waves crashing on the rocks / with a single fishing boat / "
        "with a stone cottage"
        "/ with a wooden staircase down to the water / with seabirds overhead",
        "",
        "spray hangs in the air / grass bends in the wind",
    ),
    _scene(
        "land",
        "dry",
        "desert / sea of sand dunes / red rock canyon / salt flat / dry riverbed",
        "with a line of camels / with a lone tree / with a long empty road / with strange rock "
        "towers / with a single tent"
        "/ with an abandoned gas station",
        "",
        "the sand is drawn in fine ripples / the emptiness goes on for miles",
    ),
    _scene(
        "land",
        "out",
        "river / wide river bend / mountain stream / canal / waterfall",
        "with a stone bridge / between steep green banks / with a wooden rowboat / lined with "
        "willows / with a water mill",
        "",
        "leaves drift on the water / smooth stones shine below the surface",
    ),
    _scene(
        "land",
        "day",
        "lavender field / field of sunflowers / wheat field / poppy meadow / tulip field / "
        "terraced rice field/ tea plantation",
        "with a single tree / with a farmhouse in the distance / with a dirt road / with a "
        "windmill / with rolling hills behind"
        "/ with a wooden fence",
        "",
        "the field runs all the way to the horizon / insects hum in the warm air",
    ),
    _scene(
        "land",
        "dry",
        "snowy village / frozen lake / snow-covered forest / snowy mountain hut / winter orchard",
        "with smoke rising from a chimney / with ski tracks in the snow / with a wooden sled / "
        "with a line of footprints"
        "/ with a small church",
        "",
        "the snow swallows every sound / icicles hang from every edge",
    ),
    _scene(
        "land",
        "day",
        "formal garden / Japanese garden / overgrown cottage garden / walled rose garden / "
        "botanical garden",
        "with a round pond / with a gravel path / with stepping stones / with an old sundial / "
        "with a red footbridge"
        "/ with a stone bench",
        "",
        "petals lie scattered on the path / a robin sits on a spade handle",
    ),
    _scene(
        "land",
        "out",
        "ruined temple / ruined abbey / overgrown castle / forgotten stone circle / old Roman "
        "aqueduct",
        "covered in ivy / half swallowed by the jungle / on a lonely hill / with a carved stone "
        "gate / with a flock of crows",
        "",
        "grass grows between the stones / one tall arch still stands",
    ),
    _scene(
        "town",
        "out",
        "narrow cobbled street / quiet side street / steep stairway / small town square / winding "
        "alley",
        "in an old Italian town / in Lisbon / in Marrakech / in Prague / in a Greek island village "
        "/ in Kyoto / in Havana"
        "/ in a medieval town / in Cusco / in Istanbul",
        "",
        "laundry hangs between the houses / flower pots line the steps / a cat sits in a doorway"
        "/ paint peels from the shutters",
    ),
    _scene(
        "town",
        "out",
        "city skyline / busy street crossing / city street / row of skyscrapers / elevated train "
        "line / rooftop view",
        "in Tokyo / in New York / in Lagos / in Mumbai / in Chicago / in Hong Kong / in Sao Paulo "
        "/ in Seoul / in Mexico City",
        "",
        "a thousand windows face the street / the crowd is a blur of umbrellas and coats / steam "
        "rises from a vent",
    ),
    _scene(
        "town",
        "out",
        "flower shop / small bakery / corner cafe / secondhand bookshop / noodle bar / bicycle "
        "repair shop / tiny tea house",
        "with a striped awning / with a green wooden door / with crates by the entrance / with "
        "steamed-up windows"
        "/ with a hand-painted sign / with two chairs outside",
        "",
        "a bicycle leans against the wall / a small dog waits by the door",
    ),
    _scene(
        "town",
        "out",
        "fishing village / floating market / harbor / canal town / row of houseboats",
        "with brightly painted boats / with old wooden boats / with narrow bridges / with a stone "
        "tower / with a busy quay",
        "",
        "nets dry in the open air / gulls sit on every post / ropes creak in the wind",
    ),
    _scene(
        "town",
        "day",
        "modern concrete house / glass pavilion / brutalist library / wooden treehouse / "
        "observation tower / art museum",
        "with a long reflecting pool / in a pine forest / on a cliff / with large round windows / "
        "with a roof garden"
        "/ among tall grasses",
        "",
        "the lines are clean and exact / the facade has weathered to a soft gray",
    ),
    _scene(
        "town",
        "out",
        "abandoned factory / empty amusement park / rusty water tower / deserted train depot / "
        "closed movie theater"
        "/ closed gas station",
        "overgrown with weeds / falling apart / behind a chain-link fence / covered in graffiti / "
        "at the edge of town",
        "",
        "rust runs down the metal / a torn poster flaps in the wind",
    ),
    _scene(
        "room",
        "in",
        "living room / reading nook / bedroom / home office / studio apartment",
        "with a green velvet sofa / with shelves full of books / with large houseplants / in "
        "mid-century modern style"
        "/ in Scandinavian style / with a cat asleep on the rug / with exposed brick walls / in "
        "shades of blue",
        "",
        "a record player stands on a low cabinet / a half-read book lies open / linen curtains "
        "hang to the floor",
    ),
    _scene(
        "room",
        "in",
        "farmhouse kitchen / tiny kitchen / cafe / old pub / tea room / diner",
        "with copper pots / with a checkered floor / with mismatched chairs / with a long wooden "
        "table"
        "/ with a chalkboard menu / with red leather stools / with blue tiles",
        "",
        "bunches of dried herbs hang from the beams / a bowl of lemons stands on the table",
    ),
    _scene(
        "room",
        "in",
        "grand library / cathedral / opera house / palace ballroom / train station hall / museum "
        "hall / public bathhouse",
        "with a painted ceiling / with tall columns / with a mosaic floor / with a sweeping "
        "staircase / with high arches"
        "/ completely empty",
        "",
        "every footstep would echo / gold leaf gleams along the moldings",
    ),
    _scene(
        "room",
        "in",
        "greenhouse / glass conservatory / potting shed / orangery",
        "full of orchids / overgrown with vines / with rows of seedlings / with an iron spiral "
        "staircase / with a small table"
        "/ with giant ferns",
        "",
        "drops of water run down the panes / terracotta pots are stacked in a corner",
    ),
    _scene(
        "room",
        "in",
        "alchemist's study / wizard's library / witch's kitchen / inventor's workshop / "
        "observatory / map room",
        "full of strange instruments / with a brass telescope / with shelves of glowing bottles / "
        "with star charts on the walls"
        "/ with a raven on a perch / with a huge globe",
        "",
        "scrolls are piled up to the ceiling / something bubbles in a round flask",
    ),
    # things
    _scene(
        "thing",
        "studio",
        "pocket watch / brass compass / fountain pen / magnifying glass / rusty key / pair of old "
        "glasses / silver locket"
        "/ film camera",
        "lying on an old map / resting on a stack of letters / lying on a wooden desk / half "
        "buried in sand / lying on velvet",
        "",
        "fine scratches cover the metal / a dried flower lies beside it",
    ),
    _scene(
        "thing",
        "studio",
        "ceramic teapot / blue and white vase / glass pitcher / cast iron kettle / copper pot / "
        "handmade mug / stack of bowls",
        "standing on a wooden table / standing on a linen cloth / standing on a stone ledge / "
        "standing on a kitchen shelf"
        "/ casting a long shadow",
        "",
        "the glaze is cracked in fine lines / a sprig of rosemary lies beside it / a lemon lies "
        "beside it",
    ),
    _scene(
        "thing",
        "studio",
        "perfume bottle / wristwatch / white sneaker / pair of headphones / table lamp / wooden "
        "chair / leather handbag"
        "/ glass bottle / mechanical keyboard",
        "standing on a stone pedestal / floating above a pastel background / resting on black "
        "stone / surrounded by flowers"
        "/ on a plain white background / reflected in still water",
        "",
        "there is nothing else in the picture / soft reflections run along the edges",
    ),
    _scene(
        "thing",
        "studio",
        "bouquet of peonies / single red poppy / bunch of wildflowers / sunflower / white orchid / "
        "branch of cherry blossom"
        "/ three tulips / dried thistle",
        "in a glass vase / in a chipped enamel jug / in a green bottle / in a clay pot / lying on "
        "a wooden table",
        "",
        "a few petals have fallen / fine veins show in the petals",
    ),
    _scene(
        "thing",
        "studio",
        "teddy bear / tin robot / wooden train / porcelain doll / music box / paper boat / model "
        "airplane / rocking horse"
        "/ kite / snow globe",
        "standing on a shelf / forgotten in an attic / lying on a wooden floor / surrounded by "
        "toys / standing on a windowsill",
        "",
        "years of play have worn the paint / a thin layer of dust covers everything",
    ),
    _scene(
        "thing",
        "studio",
        "old violin / acoustic guitar / grand piano / brass trumpet / accordion / drum kit / cello",
        "standing in an empty room / standing on a dark stage / covered with dust / surrounded by "
        "candles",
        "",
        "years of playing show in every scratch / loose sheet music lies on the floor",
    ),
    _scene(
        "thing",
        "studio",
        "quartz crystal / amethyst geode / ammonite fossil / piece of amber / spiral seashell / "
        "opal / cluster of pyrite",
        "on a black background / on a bed of moss / on white sand / lying in an open hand / on a "
        "museum stand",
        "",
        "light breaks inside it into small rainbows / the surface is rough on one side and "
        "polished on the other",
    ),
    _scene(
        "thing",
        "studio",
        "stack of old books / open notebook / leather-bound diary / vintage typewriter / candle in "
        "a brass holder / globe"
        "/ chess board / hourglass / telephone",
        "on a wooden desk / in front of a window / on a cluttered table / in an abandoned room / "
        "next to a vase of tulips",
        "",
        "dust has settled on everything / a pair of glasses lies nearby",
    ),
    _scene(
        "thing",
        "day",
        "vintage bicycle / blue wooden door / red mailbox / wooden rowboat / rusty tractor / stone "
        "fountain / park bench"
        "/ weather vane / old street lamp / scarecrow",
        "overgrown with roses / half hidden by tall grass / in front of a white wall / surrounded "
        "by fallen leaves"
        "/ in front of a stone cottage",
        "",
        "it has stood here for many years / a small bird has built its nest there",
    ),
    _scene(
        "food",
        "studio",
        "bowl of ramen / bowl of pumpkin soup / plate of dumplings / pot of curry / plate of "
        "spaghetti / bowl of pho"
        "/ pan of paella / plate of tacos",
        "garnished with fresh herbs / steaming / piping hot / served with a slice of lemon",
        "on a rustic wooden table / on a marble counter / on a dark slate / on a checkered "
        "tablecloth / on a metal tray",
        "steam rises into the air / chopsticks and a spoon lie beside it / crumbs and herbs are "
        "scattered around",
    ),
    _scene(
        "food",
        "studio",
        "stack of pancakes / chocolate cake / slice of cheesecake / lemon tart / apple pie / tower "
        "of macarons / cinnamon roll"
        "/ bowl of ice cream",
        "topped with berries / dusted with sugar / served with whipped cream / decorated with "
        "edible flowers",
        "on a ceramic plate / on a cake stand / on a wooden board / on a pastel tablecloth / in a "
        "bakery window",
        "one bite is missing / crumbs are scattered on the table / a silver fork lies beside it",
    ),
    _scene(
        "food",
        "studio",
        "basket of strawberries / halved pomegranate / bowl of lemons / bunch of grapes / pile of "
        "figs / three pears"
        "/ sliced watermelon / basket of mushrooms / crate of tomatoes",
        "covered in water drops / arranged with care / glistening",
        "on a wooden table / on a linen cloth / on a stone windowsill / on a kitchen counter / on "
        "a striped tablecloth",
        "the skins shine / a wasp has come to visit / green leaves are still attached",
    ),
    _scene(
        "food",
        "studio",
        "cup of coffee / glass of iced tea / mug of hot chocolate / glass of orange juice / pot of "
        "green tea"
        "/ glass of lemonade",
        "standing next to an open book / casting a long shadow / served with a small cookie / next "
        "to a folded newspaper",
        "on a cafe table / on a wooden tray / on a windowsill / on a breakfast table",
        "drops run down the side / a small spoon lies beside it",
    ),
    # on the move
    _scene(
        "vehicle",
        "out",
        "vintage car / old pickup truck / red convertible / camper van / motorcycle / yellow taxi "
        "/ school bus",
        "parked / speeding / rolling slowly / covered in mud",
        "on a desert highway / on a coastal road / on a wet city street / on a mountain pass / on "
        "a dirt road",
        "the chrome gleams / dust trails behind / a suitcase is strapped to the roof",
    ),
    _scene(
        "vehicle",
        "out",
        "steam train / freight train / old tram / red locomotive / express train",
        "crossing a stone viaduct / waiting at a small station / coming around a bend / leaving a "
        "tunnel",
        "in the mountains / in a pine forest / in a wide valley / in the countryside",
        "telegraph poles line the track / a few passengers look out of the windows",
    ),
    _scene(
        "vehicle",
        "out",
        "sailboat / wooden fishing boat / tall ship / paddle steamer / old tugboat / two kayaks",
        "drifting / at anchor / heading for the open water / rocking gently",
        "in a quiet bay / off a rocky coast / on a wide river / on a mirror-calm sea",
        "ropes creak in the wind / a lighthouse stands in the distance",
    ),
    _scene(
        "vehicle",
        "day",
        "hot air balloon / biplane / seaplane / glider / airship / three hot air balloons",
        "floating / flying low / banking to the left / casting a shadow on the land",
        "over green hills / over a river valley / over a patchwork of fields / over a mountain "
        "range",
        "tiny villages lie below / a few birds keep pace",
    ),
    # tales
    _scene(
        "tale",
        "out",
        "dragon / young dragon / ancient dragon / griffin / phoenix / giant eagle",
        "perched / spreading its wings / sleeping / guarding its nest / looking down",
        "on a ruined tower / on a mountain peak / on a cliff above the sea / on top of a castle",
        "scattered gold glints between the stones / the air shimmers with heat",
    ),
    _scene(
        "tale",
        "out",
        "wizard / witch / druid / old sorceress / young mage",
        "casting a spell / holding a glowing staff / gathering herbs / reading from a heavy book / "
        "talking to a raven",
        "in a dark forest / in a circle of standing stones / in a quiet swamp / on a hilltop",
        "blue sparks float in the air / strange runes glow on the stones",
    ),
    _scene(
        "tale",
        "out",
        "knight / knight in silver armor / wandering samurai / Viking warrior / archer / elven "
        "ranger / desert nomad",
        "riding a white horse / kneeling / resting by a fire / standing guard / looking into the "
        "distance",
        "in an ancient forest / on a windswept hill / in a mountain pass / before the gates of a "
        "city",
        "a torn banner moves in the wind / the armor is dented and scratched",
    ),
    _scene(
        "tale",
        "night",
        "forest spirit / fairy with glowing wings / stone golem / tree giant / unicorn / white "
        "stag / will-o'-the-wisp"
        "/ ghostly fox",
        "glowing faintly / crossing a stream / surrounded by fireflies / watching over the forest",
        "in an enchanted forest / in a moss-covered valley / beside a silent lake / among giant "
        "mushrooms",
        "tiny lights drift through the air / the mushrooms glow softly",
    ),
    _scene(
        "vista",
        "out",
        "floating island / castle / elven city / wizard's tower / dwarven fortress / hidden "
        "monastery / city on stilts",
        "above the clouds / on the back of a giant turtle / carved into a cliff / with waterfalls "
        "on every side"
        "/ at the end of a long bridge / built around a giant tree",
        "",
        "banners fly from the highest towers / tiny figures cross the bridge / birds wheel around "
        "the spires",
    ),
    _scene(
        "vista",
        "city night",
        "cyberpunk city / futuristic megacity / neon-lit street / rooftop market / flooded future "
        "city",
        "with flying cars / with glowing signs / with huge holograms / with endless towers / with "
        "robots in the crowd"
        "/ with steaming food stalls",
        "",
        "puddles mirror the colored signs / cables hang between the buildings",
    ),
    _scene(
        "vista",
        "space",
        "ringed planet / spiral galaxy / space station / colony ship / asteroid belt / dying star "
        "/ alien moon",
        "with a small spaceship in front / surrounded by glowing dust / with two small moons / "
        "with a swarm of probes"
        "/ in the middle of a nebula",
        "",
        "the scale is overwhelming / everything is silent and still",
    ),
    _scene(
        "vista",
        "alien",
        "alien landscape / alien jungle / crashed spaceship / domed colony on Mars / abandoned "
        "robot factory"
        "/ terraformed valley",
        "with strange plants / with towering crystals / with a lone explorer / with strange rock "
        "formations/ with purple grass",
        "",
        "nothing here looks like home / thin vapor drifts over the ground",
    ),
    _scene(
        "scifi",
        "in",
        "rusty robot / small round robot / humanoid robot / android / robot gardener / robot "
        "bartender",
        "watering a flower / playing the piano / reading a book / repairing itself / holding a "
        "butterfly / making tea",
        "in an abandoned greenhouse / in a cluttered workshop / in an old library / in a small "
        "apartment",
        "scratches show the bare metal / a single red light blinks on its chest",
    ),
    _scene(
        "scifi",
        "space",
        "astronaut / cosmonaut / space engineer",
        "floating outside a space station / repairing a solar panel / reaching for a drifting tool "
        "/ taking a photograph",
        "in low orbit / high above the Earth / in deep space",
        "the Earth is mirrored in the visor / a long cable leads back to the airlock",
    ),
    _scene(
        "scifi",
        "space",
        "astronaut / explorer in a white spacesuit / six-wheeled rover / walking machine",
        "crossing a crater / collecting rock samples / climbing a dusty slope / leaving tracks in "
        "the dust",
        "on the moon / on Mars / on an icy moon / on a dead planet",
        "a small landing craft stands in the distance / the horizon is sharply curved",
    ),
    _scene(
        "scifi",
        "city night",
        "detective in a long coat / street vendor with a mechanical arm / hacker / android in a "
        "raincoat / robot dog",
        "waiting / walking through a crowd / leaning against a wall / looking up at the signs",
        "in a neon-lit alley / in a futuristic market / on a crowded street of the future / under "
        "a monorail",
        "neon colors swim in the puddles / steam rises from a grate",
    ),
    # put together
    _scene(
        "thing",
        "studio",
        "red cube / blue glass sphere / wooden pyramid / green cone / yellow cylinder / silver "
        "cube / three white spheres",
        "on top of a black block / next to an orange sphere / between two purple cylinders / "
        "floating above a round mirror"
        "/ on a checkered floor",
        "",
        "the shapes are simple and exact / their shadows meet on the floor",
    ),
    _scene(
        "thing",
        "studio",
        "house / whale / tree / bicycle / castle / elephant / sailing ship / human heart / owl / "
        "lighthouse",
        "made of glass / made of folded paper / made of moss and flowers / made of driftwood / "
        "made of clouds"
        "/ made of clockwork / knitted from wool / carved from jade / made of bread / made of "
        "books",
        "",
        "the longer one looks, the more there is to find / the background is plain and out of "
        "focus",
    ),
)

# Carriers of writing with the words they may carry, and where they are; kind and light as in a
# scene.
_SHOPS = (
    "BOOKS / OPEN LATE / FRESH BREAD / COFFEE / FLOWERS / HOTEL / NOODLES / RECORDS / JAZZ "
    "TONIGHT / CLOSED / PIZZA / CINEMA"
)
_GREETINGS = (
    "WELCOME HOME / GOOD LUCK / THANK YOU / HAPPY BIRTHDAY / HELLO / SEE YOU SOON / JUST "
    "MARRIED / WELL DONE"
)
_TITLES = (
    "The Last Lighthouse / A Map of Quiet Rivers / The Clockmaker's Daughter / Night Garden / How "
    "to Build a Moon"
    "/ The Salt Road / Letters to Nobody / Winter Birds"
)
_MOTTOS = (
    "STAY CURIOUS / BE KIND / DREAM BIG / KEEP GOING / SLOW DOWN / WHY NOT / ALMOST THERE / "
    "NO PLACE LIKE HOME"
)
_WARNINGS = (
    "BEWARE OF THE CAT / DO NOT FEED THE TROLLS / NO ENTRY / DRAGONS AHEAD / WET PAINT / "
    "THIS WAY / DEAD END / LOST GOOSE"
)

SIGNS = tuple(
    _scene(
        kind,
        light,
        "/".join(
            f'{carrier} {saying} "{text}"' for carrier in _split(carriers) for text in _split(texts)
        ),
        places,
    )
    for kind, light, carriers, saying, texts, places in (
        (
            "sign",
            "city night",
            "neon sign / glowing red sign / old theater sign",
            "that says",
            _SHOPS,
            "above a narrow street / on a brick wall / in a dark window / above a doorway",
        ),
        (
            "sign",
            "day",
            "hand-painted sign / chalkboard sign / wooden sign",
            "that reads",
            _SHOPS,
            "outside a small shop / beside a green door / on a cobbled street / in a shop window",
        ),
        (
            "sign",
            "day",
            "wooden signpost / rusty metal sign / yellow warning sign",
            "that says",
            _WARNINGS,
            "at a crossroads / in a forest / at the edge of a swamp / on a garden gate / in the "
            "desert",
        ),
        (
            "sign",
            "studio",
            "birthday cake / row of cookies / greeting card / paper banner / balloon",
            "with the words",
            _GREETINGS,
            "at a birthday party / in front of a pink background / at a family party / in a "
            "decorated room",
        ),
        (
            "sign",
            "studio",
            "old book / paperback / leather-bound book / movie poster / vinyl record cover",
            "titled",
            _TITLES,
            "on a wooden desk / in a shop window / in front of a plain background / on a cluttered "
            "shelf",
        ),
        (
            "sign",
            "studio",
            "coffee mug / white t-shirt / tote bag / embroidered pillow / handwritten note / "
            "knitted sweater",
            "with the text",
            _MOTTOS,
            "on a wooden table / in front of a plain wall / on an unmade bed",
        ),
    )
)

# ---- abstracts

SHAPES = _split(
    "overlapping circles / concentric rings / floating spheres / broken triangles / tangled lines "
    "/ folded ribbons"
    "/ stacked cubes / spirals / interlocking hexagons / drifting squares / thin parallel lines / "
    "liquid waves"
    "/ swirling smoke / dripping paint / shattered glass / soft blobs / grains of sand / crystal "
    "shapes / paper layers"
    "/ bursts of color / knotted threads / soap bubbles / branching roots / flowing ink"
)
CHANGES = _split(
    "dissolving into dust / growing toward the edges / arranged in a grid / falling into place / "
    "melting into each other"
    "/ pulled toward the center / on a dark background / on an empty white background / caught in "
    "motion / in perfect balance"
    "/ repeating endlessly / scattered at random / rising like a flock of birds / slowly coming "
    "apart"
)
COLORS = _split(
    "teal / ochre / crimson / cobalt blue / black / gold / pale pink / emerald green / burnt "
    "orange / silver / lavender"
    "/ turquoise / ivory / rust / deep purple / lemon yellow / coral / charcoal gray / mint green "
    "/ navy blue"
)
MOTIFS = _split(
    "ferns / moths / lemons / foxes / mushrooms / waves / clouds / swallows / seashells / cacti / "
    "autumn leaves / koi / stars"
    "/ paper boats / feathers / tulips / beetles / cats / bicycles / teacups / strawberries / "
    "planets / keys / umbrellas"
)
FEELINGS = _split(
    "loneliness / joy / curiosity / homesickness / patience / courage / jealousy / hope / silence "
    "/ nostalgia / freedom / time"
    "/ memory / grief / the first day of spring / a Monday morning / falling asleep / waiting"
)
IMAGES = _split(
    "an empty chair in a wide field / a door standing in the sea / a room slowly filling with water"
    "/ a burning candle underwater"
    "/ a bird made of light / a staircase that leads nowhere / a house with no windows / a single "
    "lit window in a dark tower"
    "/ a clock with too many hands / a tree growing through a piano / an open cage on a hill / a "
    "paper boat on a stormy sea"
    "/ a maze seen from above / a bridge that ends in mid-air / a mirror that shows another sky"
)
ABSTRACT_MEDIA = _split(
    "abstract painting / geometric print / abstract composition / generative art piece / acrylic "
    "pour / minimalist poster"
    "/ abstract collage / abstract watercolor / 3D abstract render / abstract linocut / textile "
    "design / screen print"
)

ABSTRACT_FINISHES = _split(
    "clean edges / rough texture / soft gradients / visible brushwork / fine lines / strong "
    "contrast / plenty of empty space"
    "/ paper texture / a faint grain / sharp shadows / a matte surface / high detail"
)

# ---- who it is

AGES = ("young", "middle-aged", "elderly")
ORIGINS = _split(
    "Nigerian / Ghanaian / Kenyan / Ethiopian / Moroccan / Egyptian / South African / Senegalese / "
    "Turkish / Iranian / Lebanese"
    "/ Indian / Bangladeshi / Nepali / Sri Lankan / Thai / Vietnamese / Filipino / Indonesian / "
    "Chinese / Korean / Japanese"
    "/ Mongolian / Kazakh / Georgian / Ukrainian / Polish / Greek / Italian / Spanish / Portuguese "
    "/ French / German / Dutch"
    "/ Irish / Scottish / Swedish / Finnish / Icelandic / Canadian / American / Mexican / "
    "Guatemalan / Cuban / Jamaican"
    "/ Colombian / Peruvian / Brazilian / Chilean / Argentinian / Samoan / Maori / Australian"
)
LOOKS = _split(
    "with curly hair / with short hair / with freckles / with round glasses / with a friendly face "
    "/ with dark eyes"
    "/ with wavy hair / with a focused look"
)
CLOTHES = _split(
    "in a yellow raincoat / in a denim jacket / in a red scarf / in a linen shirt / in a long gray "
    "coat / in a striped sweater"
    "/ in green overalls / in a wool hat / in an oversized sweater / in a tweed jacket / in a "
    "floral shirt / in a white suit"
    "/ in a leather jacket / in a blue turtleneck / in a checked shirt / in a plain black t-shirt"
)

# ---- light

_DAY = """
golden hour / at golden hour / low golden light throws long shadows
early morning light / in early morning light / the early light is cool and soft
overcast / under an overcast sky / the sky is overcast and the light is even
sunset / at sunset / the sky is turning orange and pink
bright sunlight / in bright sunlight / the sun is high and the shadows are short and hard
backlit / in strong backlight / the sun stands low behind the scene, and every edge glows
thick fog / in thick fog / fog swallows everything farther away
light mist / in light mist / a light mist softens the distance
after the rain / just after the rain / everything is still wet from the rain
hazy afternoon / on a hazy afternoon / the afternoon is hazy and warm
clear sky / under a clear sky / the sky is wide and cloudless
stormy sky / under a stormy sky / dark clouds pile up overhead
sunrise / at sunrise / the first sunlight is just coming over the horizon
"""
_NIGHT = """
dusk / at dusk / the last light is fading from the sky
blue hour / at blue hour / everything lies in the deep blue of late dusk
moonlight / in the moonlight / a full moon lights the scene
night / at night / it is night, and much of the scene lies in shadow
starry sky / under a starry sky / countless stars fill the sky
"""
LIGHTS = {
    "day": _phrasings(_DAY),
    "night": _phrasings(_NIGHT),
    "out": _phrasings(_DAY.rstrip() + _NIGHT),
    "dry": tuple(light for light in _phrasings(_DAY.rstrip() + _NIGHT) if "rain" not in light.tag),
    "alien": _phrasings("""
harsh sunlight / in harsh sunlight / the sunlight is harsh and the shadows are black
orange haze / in an orange haze / an orange haze hangs in the air
sunset / at sunset / a small pale sun is setting
backlit / in strong backlight / the sun stands low behind the scene, and every edge glows
thick fog / in thick fog / fog swallows everything farther away
night / at night / it is night, and much of the scene lies in shadow
"""),
    "city night": _phrasings("""
dusk / at dusk / the last light is fading from the sky
blue hour / at blue hour / everything lies in the deep blue of late dusk
night / at night / it is night, and much of the scene lies in shadow
rainy night / on a rainy night / rain is falling in the dark
"""),
    "in": _phrasings("""
soft window light / in soft window light / soft light falls in through a window
warm lamplight / in warm lamplight / a single lamp gives a warm light
dim light / in dim light / most of the room lies in shadow
side light / in low side light / the light comes in from one side
late afternoon sun / in the late afternoon sun / late sun slants in from outside
morning sun / in the morning sun / the morning sun reaches across the floor
cool white light / in cool white light / the light is cool and even
dramatic shadows / with dramatic shadows / the shadows are deep and dramatic
"""),
    "sea": _phrasings("""
sunbeams / in beams of sunlight / beams of sunlight reach down from the surface
rippling light / in rippling light / bright ripples of light run over everything
dim blue light / in dim blue light / the light is dim and blue
soft green light / in soft green light / the light is soft and green
"""),
    "space": _phrasings("""
harsh sunlight / in harsh sunlight / the sunlight is harsh and the shadows are black
starfield / against a field of stars / a field of stars fills the background
cold blue light / in cold blue light / the light is cold and blue
rim light / with a bright rim of light / a bright rim of light marks every edge
"""),
    "studio": _phrasings("""
soft studio light / in soft studio light / the light is soft and even
window light / in soft window light / soft light comes from a window on the left
hard side light / in hard side light / hard light from one side leaves deep shadows
warm evening light / in warm evening light / the light is warm and low
cool morning light / in cool morning light / the light is cool and clear
dramatic lighting / in dramatic lighting / a single light leaves the rest in darkness
backlit / in soft backlight / soft light from behind draws a bright outline
"""),
}

# ---- frame

_BEINGS = """
close-up / seen up close
full body / in full view
low angle / seen from a low angle
from above / seen from above
side view / seen from the side
wide shot / seen from a distance
centered composition / in the center of the frame
"""
_PERSONS = """
from behind / seen from behind
medium shot / shown from the waist up
three-quarter view / in three-quarter view
"""
_SCENERY = """
wide shot / in a wide view
panoramic view / in a sweeping panorama
aerial view / seen from the air
symmetrical composition / in a symmetrical composition
low angle / seen from a low angle
"""
_STREETS = """
wide shot / in a wide view
symmetrical composition / in a symmetrical composition
low angle / seen from a low angle
eye-level view / seen at eye level
"""
_INTERIORS = """
wide shot / in a wide view
symmetrical composition / in a symmetrical composition
low angle / seen from a low angle
seen through a doorway / seen through a doorway
"""
_THINGS = """
close-up / seen up close
top-down view / seen from above
three-quarter view / in three-quarter view
centered composition / in the center of the frame
low angle / seen from a low angle
macro shot / in extreme close-up
negative space / with plenty of empty space around it
"""
_PORTRAITS = """
headshot / from the shoulders up
close-up portrait / seen up close
profile view / in profile
three-quarter view / in three-quarter view
half-length portrait / shown from the waist up
"""
_SIGNS = """
close-up / seen up close
low angle / seen from a low angle
centered composition / in the center of the frame
"""
FRAMES = {
    "person": _phrasings(_BEINGS.rstrip() + _PERSONS),
    "street": _phrasings(_BEINGS.rstrip() + _PERSONS),
    "portrait": _phrasings(_PORTRAITS),
    "group": _phrasings(_BEINGS.rstrip() + _PERSONS),
    "child": _phrasings(_BEINGS.rstrip() + _PERSONS),
    "animal": _phrasings(_BEINGS),
    "land": _phrasings(_SCENERY),
    "town": _phrasings(_STREETS),
    "room": _phrasings(_INTERIORS),
    "thing": _phrasings(_THINGS),
    "food": _phrasings(_THINGS),
    "vehicle": _phrasings(_BEINGS),
    "tale": _phrasings(_BEINGS),
    "vista": _phrasings(_SCENERY),
    "scifi": _phrasings(_BEINGS),
    "sign": _phrasings(_SIGNS),
}

# ---- media

_PHOTO_FINISHES = (
    "shallow depth of field / soft bokeh / natural colors / muted colors / film "
    "grain / high contrast / warm tones"
)
_PHOTO_TAGS = (
    "sharp focus / highly detailed / 8k / photorealistic / professional photography / 85mm lens / "
    "35mm lens / ultra realistic"
    "/ award-winning photography / DSLR / raw photo / high resolution / HDR / 50mm lens / "
    "realistic / 4k / best quality"
)
_ART_TAGS = (
    "highly detailed / intricate details / masterpiece / best quality / beautiful / vivid colors / "
    "detailed background"
    "/ atmospheric / 4k / elegant / fine art / stunning / dreamy / high quality / artistic"
)

MEDIA = {
    "photo": _medium(
        "photo / photograph / film photo / 35mm photograph / analog photo / digital photo / color "
        "photograph",
        _PHOTO_FINISHES,
        _PHOTO_TAGS,
    ),
    "candid": _medium(
        "candid photo / documentary photo / editorial photo / environmental portrait / snapshot / "
        "polaroid",
        _PHOTO_FINISHES,
        _PHOTO_TAGS,
    ),
    "portrait_photo": _medium(
        "portrait / portrait photo / studio portrait / fine art portrait / analog portrait / "
        "editorial portrait",
        "shallow depth of field / natural skin texture / muted colors / film grain / warm tones",
        _PHOTO_TAGS,
    ),
    "nature_photo": _medium(
        "wildlife photo / nature photograph / telephoto photograph / nature documentary still",
        _PHOTO_FINISHES,
        _PHOTO_TAGS,
    ),
    "landscape_photo": _medium(
        "landscape photo / travel photo / wide-angle photograph / large format photograph",
        "deep focus / natural colors / muted colors / vivid colors / high contrast / fine detail",
        _PHOTO_TAGS,
    ),
    "architecture_photo": _medium(
        "architectural photo / wide-angle photograph / magazine photo",
        "deep focus / clean lines / natural colors / muted colors / soft shadows",
        _PHOTO_TAGS,
    ),
    "product_photo": _medium(
        "product photo / still life photo / studio photograph / advertising photo",
        "shallow depth of field / soft shadows / natural colors / a clean background / crisp "
        "detail",
        _PHOTO_TAGS,
    ),
    "food_photo": _medium(
        "food photo / cookbook photo / overhead photograph / rustic food photograph / magazine "
        "photo",
        "shallow depth of field / natural colors / warm tones / soft shadows",
        _PHOTO_TAGS,
        framed=False,
    ),
    "monochrome": _medium(
        "black and white photo / black and white photograph / monochrome photo / black and white "
        "film photo",
        "high contrast / deep blacks / film grain / soft gray tones",
        "sharp focus / dramatic / timeless / fine art photography / highly detailed / grainy",
        lit=False,
    ),
    "film": _medium(
        "cinematic still / film still / movie scene / cinematic shot",
        "film grain / muted colors / teal and orange colors / shallow depth of field / anamorphic "
        "lens flare",
        "cinematic / highly detailed / dramatic / epic / atmospheric / 8k / widescreen / moody",
    ),
    "oil": _medium(
        "oil painting / impressionist painting / acrylic painting / classical oil painting / "
        "expressionist painting"
        "/ realist painting / gouache painting / palette knife painting / tempera painting / "
        "pastel painting",
        "thick brushstrokes / visible brushwork / rich colors / soft edges / muted earth tones / "
        "bold colors / warm tones",
        _ART_TAGS,
    ),
    "watercolor": _medium(
        "watercolor / watercolor painting / loose watercolor / ink and watercolor sketch / "
        "watercolor illustration",
        "loose washes / delicate lines / soft pastel colors / visible paper grain / colors "
        "bleeding into each other",
        _ART_TAGS,
    ),
    "illustration": _medium(
        "digital illustration / children's book illustration / flat vector illustration / anime "
        "illustration / comic panel"
        "/ graphic novel panel / storybook illustration / anime screenshot / editorial "
        "illustration / digital painting",
        "clean lines / flat colors / bold outlines / a limited color palette / soft pastel colors "
        "/ cel shading / vivid colors",
        _ART_TAGS,
    ),
    "print": _medium(
        "woodblock print / linocut / risograph print / screen print / art deco poster / art "
        "nouveau poster / pop art print"
        "/ vintage travel poster / ukiyo-e print / Bauhaus poster",
        "flat colors / bold outlines / a limited color palette / visible paper grain / muted "
        "colors / two colors only",
        "graphic / bold / minimalist / vintage / highly detailed / decorative / retro",
        lit=False,
    ),
    "drawing": _medium(
        "pencil drawing / charcoal drawing / ink drawing / pen and ink sketch / etching / "
        "engraving / ballpoint pen drawing"
        "/ chalk drawing / graphite sketch",
        "fine cross-hatching / loose lines / strong contrast / delicate shading / visible paper "
        "grain",
        "monochrome / black and white / highly detailed / sketchbook page / hand-drawn / "
        "minimalist / fine art",
        lit=False,
    ),
    "render": _medium(
        "3D render / isometric 3D render / low poly render / claymation still / miniature diorama "
        "/ voxel art scene"
        "/ stop-motion scene / plasticine scene",
        "soft shadows / pastel colors / smooth shapes / rounded shapes / vivid colors",
        "cute / highly detailed / 4k / colorful / global illumination / ray tracing / soft "
        "lighting / toy-like",
        lit=False,
        framed=False,
    ),
    "pixels": _medium(
        "pixel art image / 16-bit pixel art scene / 8-bit pixel art scene / isometric pixel art "
        "scene",
        "a limited color palette / vivid colors / dithered shading / clean outlines",
        "retro game style / colorful / detailed / nostalgic / game background",
        lit=False,
        framed=False,
    ),
    "craft": _medium(
        "stained glass window / mosaic / tapestry / embroidery / paper cut-out / felt collage / "
        "quilted picture / fresco"
        "/ wood carving"
        "/ medieval manuscript illumination / ceramic tile painting",
        "rich colors / fine detail / bold shapes / visible texture / gold accents",
        "handmade / ornate / decorative / colorful / folk art / intricate details / textured",
        lit=False,
        framed=False,
    ),
    "fantasy_art": _medium(
        "fantasy illustration / concept art / matte painting / digital painting / book cover "
        "illustration / tarot card"
        "/ fantasy oil painting / dark fantasy painting / storybook illustration",
        "rich colors / soft glowing light / fine detail / muted earth tones / visible brushwork / "
        "deep shadows",
        _ART_TAGS + "/ epic / magical / concept art style / fantasy / mystical",
    ),
    "sci-fi_art": _medium(
        "science fiction illustration / concept art / matte painting / retro sci-fi book cover / "
        "anime illustration"
        "/ digital painting / 1970s sci-fi illustration / graphic novel panel",
        "rich colors / glowing accents / fine detail / muted colors / film grain / deep shadows",
        _ART_TAGS + "/ epic / futuristic / sci-fi / cyberpunk style",
    ),
    "emblem": _medium(
        "sticker / logo / icon / enamel pin / tattoo design / coloring page / emblem / t-shirt "
        "design / stamp / badge"
        "/ app icon / line art tattoo",
        "bold outlines / flat colors / a white border / simple shapes / clean lines / minimal "
        "detail",
        "white background / vector / simple / minimalist / flat design / centered / cute / clean",
        lit=False,
        framed=False,
        bare=True,
    ),
}

# What each kind of scene is shown in; a medium that is named twice comes twice as often.
_ART = "oil oil watercolor watercolor illustration illustration print drawing drawing craft"
MEDIA_OF = {
    kind: tuple(MEDIA[name] for name in names.split())
    for kind, names in {
        "person": f"photo photo candid candid candid monochrome film film oil watercolor "
        f"illustration print drawing {_ART}",
        "street": f"photo photo candid candid candid monochrome film film oil watercolor "
        f"illustration drawing {_ART}",
        "portrait": "portrait_photo portrait_photo portrait_photo monochrome oil oil watercolor "
        "illustration drawing",
        "group": f"photo photo photo monochrome film {_ART}",
        "child": f"photo photo monochrome film {_ART}",
        "animal": f"photo photo nature_photo nature_photo nature_photo monochrome render pixels "
        f"emblem {_ART}",
        "land": f"landscape_photo landscape_photo landscape_photo photo monochrome film film "
        f"render pixels {_ART}",
        "town": f"landscape_photo architecture_photo photo photo monochrome film render render "
        f"pixels {_ART}",
        "room": f"architecture_photo architecture_photo photo photo film render pixels {_ART}",
        "thing": f"product_photo product_photo product_photo photo monochrome render render {_ART}",
        "food": "food_photo food_photo food_photo product_photo photo oil watercolor illustration "
        "render drawing pixels",
        "vehicle": f"photo photo photo film film monochrome render pixels {_ART}",
        "tale": f"fantasy_art fantasy_art fantasy_art fantasy_art film film render pixels emblem "
        f"{_ART}",
        "vista": f"fantasy_art sci-fi_art sci-fi_art fantasy_art film film film render pixels "
        f"{_ART}",
        "scifi": f"sci-fi_art sci-fi_art sci-fi_art sci-fi_art film film film photo render pixels "
        f"emblem {_ART}",
        "sign": "photo photo photo photo film illustration illustration watercolor render oil",
    }.items()
}

# Kinds whose actions do not come after "is".
STILL = ("portrait", "land", "town", "room", "vista", "sign")

# How often each kind is chosen; within a kind every scene has the same chance.
KINDS = {
    "person": 14,
    "street": 6,
    "portrait": 5,
    "group": 3,
    "child": 3,
    "animal": 16,
    "land": 9,
    "town": 7,
    "room": 5,
    "thing": 9,
    "food": 5,
    "vehicle": 4,
    "tale": 6,
    "vista": 4,
    "scifi": 4,
    "sign": 5,
}
