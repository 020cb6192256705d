"""What the voices say in training: everyday sentences from a small grammar, and words strung at random.

The grammar gives the rhythm of real sentences (statements, questions, requests, numbers written out, passages of
several sentences); the random strings, drawn from the 25,000 most frequent words of the speech recognizer's own
language model, teach spelling. A sentence of the held-out list is never given, whatever the seed.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pocketsphinx

from harness.locations import HELD_OUT

LEXICON_SIZE = 25_000

_WORDS = {
    "thing": """apple bag ball banana basket battery bed bell belt bench bicycle bill blanket board boat bone book boot
        bottle bowl box bracelet bread brick bridge broom brush bucket bus button cake calendar camera candle cap car
        card carpet cart chain chair chalk check chicken chest clock cloth coat coin comb computer cookie cord couch
        cradle cup curtain cushion desk diary dish doll door drawer dress drill drum egg engine envelope eraser fan
        feather fence file flag flashlight flower flute fork frame fridge fruit game gate gift glass globe glove guitar
        hammer handle hat heater helmet hook horn hose jacket jar jewel journal jug kettle key keyboard kite knife
        ladder lamp lantern leaf letter lid light list lock log magazine magnet map mask match meal medal menu message
        microphone mirror mitten motor mug nail napkin necklace needle net newspaper notebook novel oven package page
        pan paper parcel pear pen pencil phone photo piano picture pie pillow pin pipe plant plate plug pocket poem pot
        potato printer purse puzzle quilt radio rail razor record ribbon ring rope rug ruler sack saddle sail sandwich
        saw scarf scissor screen screw seat shelf shell shirt shoe shovel sign sink skirt sled soap sock sofa spoon
        stamp statue stick stone stool stove string suit suitcase sweater switch table tape telescope tent ticket tie
        tile toaster tool toothbrush torch towel toy train tray trophy truck trumpet tube umbrella uniform vase vest
        violin wagon wallet watch wheel whistle wire wrench""",
    "food": """bacon barley beef biscuit broth butter cabbage carrot celery cereal cheese cherry chocolate cinnamon
        coconut coffee corn cream cucumber dinner dough flour garlic ginger grape gravy ham honey jam juice ketchup
        lamb lemon lentil lettuce lime lunch mango meat melon milk mint mushroom mustard noodle nut oatmeal oil olive
        onion orange oyster pancake pasta peach peanut pepper pickle pineapple pizza plum popcorn pork porridge pudding
        pumpkin radish raisin raspberry rice salad salmon salt sauce sausage shrimp soup spice spinach squash steak
        stew strawberry sugar supper syrup tea toast tomato tuna turkey turnip vanilla vinegar waffle walnut water
        wheat yogurt""",
    "person": """actor actress artist aunt author baker banker barber boss boy brother builder butcher captain carpenter
        cashier chef chief child clerk client coach colonel cook cousin customer dancer dentist designer director
        doctor driver editor engineer expert farmer father fisherman friend gardener general gentleman girl
        grandfather grandmother guard guest guide hero host hunter husband inspector janitor judge king lady lawyer
        leader librarian maid manager mayor mechanic member merchant minister mother musician neighbor nephew niece
        nurse officer owner painter parent partner passenger patient physician pilot plumber poet policeman president
        priest prince princess producer professor queen reader reporter sailor scientist secretary sergeant servant
        shepherd shopkeeper singer sister soldier son speaker student surgeon tailor teacher tenant tourist trainer
        traveler uncle visitor waiter waitress wife winner witness woman worker writer""",
    "animal": """ant badger bat bear beaver bee beetle bird buffalo bull butterfly calf camel cat caterpillar cow crab
        cricket crow deer dog dolphin donkey dove duck eagle elephant falcon fish fly fox frog giraffe goat goose hawk
        hedgehog hen horse kangaroo kitten lion lizard lobster monkey mosquito mouse mule ostrich otter owl ox panda
        parrot penguin pig pigeon pony puppy rabbit raccoon rat robin rooster seal shark sheep snail snake sparrow
        spider squirrel swan tiger turtle whale wolf worm zebra""",
    "place": """airport alley apartment attic bakery balcony bank barn basement bathroom beach bedroom building cabin
        cafe camp castle cathedral cave cellar church cinema city classroom clinic club coast college corner cottage
        country court courtyard desert district dock downtown factory farm field forest garage garden hall harbor
        highway hill hospital hotel house island jungle junction kitchen laboratory lake lane library lobby market
        meadow mill monastery motel mountain museum neighborhood office orchard palace park path pharmacy playground
        pond pool porch port prison ranch restaurant river road roof room school sea shop shore square stable stadium
        stage station store stream street studio suburb subway temple theater tower town tunnel university valley
        village warehouse waterfall workshop yard zoo""",
    "idea": """accident account action advice agreement amount anger answer argument army attempt attention beauty
        beginning belief benefit birth blame business career cause chance change choice comfort company conclusion
        condition control conversation courage credit crime culture danger death debt decision degree delay demand
        difference difficulty discovery distance doubt dream duty education effect effort election energy event example
        excuse exercise experience experiment fact failure faith fashion fault fear feeling fight figure freedom
        friendship future habit happiness health height history holiday hope idea illness industry influence interest
        job joke journey joy judgment knowledge language law lesson level lie limit loss love luck machine
        meaning measure meeting memory method mind mistake moment money mood movement music nature news noise number
        opinion opportunity order pain party patience peace permission plan pleasure policy position power practice
        price pride problem process profit program progress project promise proof property purpose quality quantity
        question reason relation report request respect rest result reward risk rule safety science season
        secret sense service shame shape silence situation skill sleep society solution song sorrow speech speed spirit
        story strength success surprise system talent task taste theory thought time tradition trouble truth value
        victory view violence visit voice war warning weakness weather weight wish wonder work world youth""",
    "name": """Adam Albert Alice Amanda Andrew Angela Anna Anthony Arthur Barbara Benjamin Betty Brian Carol Caroline
        Catherine Charles Christine Clara Daniel David Deborah Dennis Diana Donald Dorothy Douglas Edward Elizabeth
        Emily Emma Eric Ethan Eva Florence Frances Frank Gabriel George Gloria Grace Gregory Hannah Harold Harry Heather
        Helen Henry Howard Isabel Jack Jacob James Janet Jason Jennifer Jessica Joan John Jonathan Joseph Joshua Judith
        Julia Karen Katherine Keith Kevin Kimberly Larry Laura Lawrence Leonard Linda Lisa Louis Lucy Margaret Maria
        Mark Martha Martin Matthew Melissa Michael Michelle Monica Nancy Nathan Nicholas Nicole Nora Oliver Oscar
        Pamela Patricia Paul Peter Philip Rachel Ralph Raymond Rebecca Richard Robert Roger Ronald Rose Russell Ruth
        Ryan Samuel Sandra Sarah Scott Sharon Simon Sophia Stephanie Stephen Steven Susan Teresa Thomas Timothy Victor
        Victoria Vincent Virginia Walter Wendy William""",
    "town": """Africa America Arizona Asia Athens Australia Austria Berlin Boston Brazil Britain California Canada
        Chicago China Colorado Dallas Denmark Denver Dublin Egypt England Europe Finland Florida France Geneva Georgia
        Germany Greece Hawaii Houston Iceland India Ireland Israel Italy Jamaica Japan Kansas Kentucky Korea London
        Louisiana Madrid Maine Mexico Miami Michigan Montana Moscow Nebraska Nevada Norway Ohio Oregon Oxford Paris
        Peru Poland Portland Portugal Rome Russia Scotland Seattle Spain Sweden Switzerland Sydney Tennessee Texas
        Tokyo Toronto Turkey Utah Vermont Vienna Wales Warsaw Wyoming""",
    "adjective": """able afraid alive ancient angry awful bad bare beautiful better big bitter black blank blind blue
        bold brave brief bright broad broken brown busy calm careful careless cheap cheerful clean clear clever cloudy
        cold comfortable common complete cool correct crazy crooked cruel curious curly cute damp dangerous dark dear
        deep delicate delicious different difficult dirty distant double dry dull dusty eager early easy elegant empty
        enormous entire equal exact excellent exciting expensive extra faint fair false familiar famous fancy fast fat
        favorite fine firm flat foolish foreign formal free fresh friendly full funny gentle giant glad golden good
        gorgeous grand grateful gray great green guilty handsome happy hard harmless healthy heavy helpful high hollow
        honest horrible huge humble hungry icy ill important impossible innocent jealous juicy kind large late lazy
        light little lively local lonely long loose loud lovely low lucky mad magic main merry messy mild modern narrow
        nasty natural neat necessary nervous new nice noisy normal obvious odd old open ordinary original pale patient
        perfect plain playful pleasant polite poor popular possible powerful precious pretty private proper proud
        public pure quick quiet rapid rare raw ready real recent red regular rich ripe rotten rough round royal rude
        rusty sad safe salty scary separate serious shallow sharp shiny short shy sick silent silly silver similar
        simple single slim slippery slow small smart smooth soft solid sour special spicy steady steep stiff straight
        strange strict strong stupid sudden sunny sweet swift tall tame tender terrible thick thin thirsty tidy tight
        tiny tired tough true ugly unusual useful useless usual valuable various vast violent warm weak wealthy weird
        wet white whole wicked wide wild wise wonderful wooden wrong yellow young""",
    "verb": """accept admire answer approach arrange ask attack avoid bake blame boil borrow brush burn bury call carry
        catch change chase check choose clean climb close collect compare complete consider cook copy count cover
        cross deliver describe destroy discover discuss divide drag draw drop dry earn enjoy enter examine explain
        explore fill find finish fix fold follow forget forgive gather grab guard guess hang hate hear help hide hold
        hunt ignore imagine improve invite join judge keep kick kiss knock lead leave lend lift like load love make
        mark measure meet mention mix move need notice observe obtain offer open order own pack paint pass pay pick
        plan play point polish prefer prepare present press prevent print promise protect prove provide pull punish
        push raise reach receive recognize refuse remember remove repair repeat replace report rescue respect return
        ride ring save scratch search see select sell send serve shake share show shut sign smell solve spill spoil
        stop study suggest support surprise take taste teach tear tell thank throw touch trade train trust try turn
        understand use visit wait want warn wash waste watch wear welcome win wipe wonder wrap write""",
    "past": """accepted admired answered arranged asked avoided baked bent bit blamed blew boiled borrowed bought broke
        brought brushed built burned buried called carried caught changed chased checked chose cleaned climbed closed
        collected compared cooked copied counted covered crossed cut delivered described destroyed discovered dragged
        drank drew dropped drove earned enjoyed entered examined explained explored fed felt filled finished fixed
        folded followed forgot forgave fought found froze gathered gave grabbed grew guarded guessed held heard hid hit
        hunted hurt ignored imagined improved invited joined kept kicked kissed knew knocked lifted liked lit loaded
        lost loved made marked measured mentioned met missed mixed moved needed noticed observed offered opened ordered
        packed paid painted passed picked planned planted played polished poured prepared pressed printed protected
        proved pulled punished pushed put raised ran reached read received recognized refused remembered removed
        repaired repeated replaced reported rescued respected returned rode sang saved saw scratched searched
        selected sent served sewed shared shook shot showed shut signed smelled sold solved spent spilled split
        spoiled stole stopped studied suggested supported surprised swept swung taught thanked threw took tore
        touched traded trained tried turned typed understood used visited waited wanted warned washed wasted watched
        welcomed wiped won wore wrapped wrote""",
    "going": """arrive begin breathe complain cough cry dance disappear dream drift drown eat escape exercise faint fall
        float fly freeze gossip grow hesitate hurry jump kneel laugh lie listen live march nap nod pause pray race
        relax rest run sail scream shiver shout sing sit ski sleep slip smile sneeze snore speak stand stare starve stay
        struggle sweat swim talk think travel tremble vanish vote walk wander whisper work worry yawn yell""",
    "went": """agreed appeared arrived began bowed breathed collapsed complained coughed cried danced died disappeared
        dreamed drifted escaped exploded failed fainted fell floated flew frowned giggled hesitated hurried jumped
        knelt laughed lied listened lived marched nodded paused prayed raced recovered relaxed rested sailed screamed
        shivered shouted sighed sat slept slipped smiled sneezed snored spoke stood stared stayed struggled succeeded
        swam talked traveled trembled vanished walked wandered went whispered woke worked worried yawned yelled""",
    "adverb": """again almost alone already always anyway apart badly barely bravely briefly carefully certainly clearly
        closely completely constantly directly early easily eagerly elsewhere equally especially eventually exactly
        finally firmly forever fortunately freely frequently gently gladly gradually happily hardly honestly immediately
        indeed instead just kindly lately later lightly loudly luckily mainly maybe merely mostly naturally nearly
        neatly nervously never nicely nowhere obviously occasionally often once openly originally otherwise partly
        patiently perfectly perhaps personally politely possibly probably properly proudly quickly quietly rarely
        really recently regularly safely secretly seldom seriously sharply shortly silently simply slightly slowly
        smoothly softly sometimes somewhere soon still suddenly surely terribly together truly twice usually warmly
        weakly well widely wildly wisely""",
    "when": """today tonight tomorrow yesterday now then earlier nowadays afterward meanwhile""",
    "day": """Monday Tuesday Wednesday Thursday Friday Saturday Sunday""",
    "month": """January February March April May June July August September October November December""",
    "part": """morning afternoon evening night week weekend month year summer winter spring autumn""",
    "body": """ankle arm back beard bone brain cheek chest chin ear elbow eye face finger foot forehead hair hand head
        heart heel hip jaw knee leg lip lung mouth muscle neck nose palm rib shoulder skin stomach throat thumb toe
        tongue tooth waist wrist""",
    "near": """above across against along around at behind below beneath beside beyond by from in inside into near off
        on outside over past through to toward under""",
    "whose": """a the the the my your his her our their this that some another every each no""",
    "some": """several many few both most all these those some any enough""",
    "pronoun": """I you he she we they it everyone somebody nobody anyone""",
    "him": """me you him her us them it everyone somebody nobody himself herself themselves""",
    "modal": """can could will would shall should may might must""",
    "joining": """and but or so because although while when before after until unless since if""",
    "digit": """one two three four five six seven eight nine""",
    "teen": """ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen""",
    "tens": """twenty thirty forty fifty sixty seventy eighty ninety""",
    "large": """hundred thousand million""",
    "ordinal": """first second third fourth fifth sixth seventh eighth ninth tenth twelfth twentieth last next""",
    "unit": """dollars cents pounds miles feet inches meters kilometers minutes hours seconds days weeks months years
        percent degrees people pages gallons liters ounces tons""",
    "group": """animals apples birds boats books boxes boys brothers cars cards children clothes clouds cows dogs doors
        dreams eggs families flowers friends games girls hands horses houses ideas islands keys ladies lamps leaves
        letters lights machines men mountains neighbors nights orders paintings parents pictures places plants
        plates problems questions roads rooms rules schools shoes sisters soldiers songs stars stories
        streets students teachers things tickets toys trees trucks walls watches windows women words workers""",
}

# Each rule is tried with equal weight; {name} is another rule or a word class.
_RULES = {
    "noun": "{thing}|{thing}|{food}|{animal}|{place}|{idea}|{body}|{part}",
    "np": "{whose} {noun}|{whose} {adjective} {noun}|the {noun} {near} the {place}|{some} {group}|{number} {group}"
    "|{some} {adjective} {group}|the {adjective} {adjective} {noun}|the {ordinal} {noun}|{name}'s {noun}|{idea}"
    "|the {noun} of the {noun}|{adjective} {food}|{np} and {np}",
    "who": "{pronoun}|{name}|{name} and {name}|the {person}|my {person}|{whose} {adjective} {person}"
    "|the {person} from {town}|{name} and {whose} {person}|the {animal}|{whose} {adjective} {animal}",
    "number": "{digit}|{teen}|{tens}|{tens} {digit}|{digit} {large}|{digit} hundred and {tens} {digit}"
    "|{tens} {digit} thousand",
    "time": "{when}|on {day}|in {month}|last {part}|every {part}|this {part}|at {digit} o'clock|next {day}"
    "|on {month} {ordinal}|before {part}|{number} {unit} ago|in the {part}|{day} {part}",
    "where": "{near} the {place}|{near} the {noun}|in {town}|at the {adjective} {place}|{near} {whose} {noun}",
    "said": "{who} {past} {np}|{who} {went} {adverb}|{who} {adverb} {past} {np}|{who} {went} {where}"
    "|{who} was {adjective}|{np} was {adjective} and {adjective}|{who} {modal} {verb} {np}|{who} {past} {him}"
    "|{who} {modal} not {going}|there was {np} {where}|{who} had {number} {group}|{np} cost {number} {unit}"
    "|{who} wanted to {verb} {np}|{who} went to {town}|{who} seemed {adjective} {time}|it is {adjective} to {going}"
    "|the {noun} is {number} {unit} long|{who} told {him} about {np}|{who} {past} {np} {where}"
    "|{who} did not {verb} {np}|{who} has never been to {town}|{who} {past} {np} with {np}",
    "asked": "did {who} {verb} {np}|where is {np}|why did {who} {going}|who {past} {np}"
    "|how many {group} did {who} {verb}"
    "|what {modal} {who} {verb} {time}|is {np} {adjective}|when {modal} {who} {going}|do you {verb} {np}"
    "|how did {who} {verb} {np}|which {noun} is {adjective}|{modal} {who} {verb} {np} {time}"
    "|have you ever been to {town}",
    "told": "please {verb} {np}|do not {verb} {np}|{verb} {np} {where}|let us {verb} {np} {time}"
    "|{adverb} {verb} {np}|never {going} {where}|{going} {adverb} {time}",
    "statement": "{said}|{said}|{said}|{said} {time}|{said} {adverb}|{said}, {joining} {said}|{time}, {said}"
    "|{joining} {said}, {said}|{adverb}, {said}|{said} {joining} {said}",
    "sentence": "{statement}.|{statement}.|{statement}.|{statement}.|{statement}.|{asked}?|{asked}?|{told}.|{said}!",
}
_CLASSES = {name: words.split() for name, words in _WORDS.items()}
_CHOICES = {name: rule.split("|") for name, rule in _RULES.items()}
_SLOT = re.compile(r"\{(\w+)\}")


def vocabulary() -> set[str]:
    """Every word that the grammar can use, lower case."""
    literals = " ".join(_SLOT.sub(" ", rule) for rule in _RULES.values())
    words = [word for group in _CLASSES.values() for word in group] + re.findall(r"[a-z']+", literals)
    return {word.lower() for word in words}


def plain(sentence: str) -> str:
    """Lower-case words with single spaces, so that sentences compare by what is said."""
    return " ".join(re.findall(r"[a-z']+", sentence.lower()))


@lru_cache
def held_out() -> frozenset[str]:
    """The test sentences in `plain` form."""
    return frozenset(plain(line) for line in HELD_OUT.read_text().splitlines() if line.strip())


@lru_cache
def lexicon() -> tuple[list[str], list[float]]:
    """Frequent words of the recognizer's dictionary and their running weights.

    A word's weight is the square root of its probability, so that rare words are heard too.
    """
    folder = Path(pocketsphinx.__file__).parent / "model/en-us"
    log = pocketsphinx.LogMath()
    model = pocketsphinx.NGramModel(pocketsphinx.Config(lm=None), log, str(folder / "en-us.lm.bin"))
    entries = {line.split()[0] for line in (folder / "cmudict-en-us.dict").open()}
    words = [word for word in sorted(entries) if re.fullmatch(r"[a-z]+('[a-z]+)?", word) and len(word) > 1]
    words = sorted(words, key=lambda word: -model.prob([word]))[:LEXICON_SIZE]
    return words, list(accumulate(log.exp(model.prob([word])) ** 0.5 for word in words))


def random_words(rng: random.Random) -> str:
    """2 to 16 words in no order, sometimes with a comma: spelling without grammar."""
    while True:
        text = _string_together(rng)
        if plain(text) not in held_out():
            return text


def _string_together(rng: random.Random) -> str:
    words, weights = lexicon()
    chosen = rng.choices(words, cum_weights=weights, k=rng.randint(2, 16))
    if rng.random() < 0.3:  # the long tail, evenly
        chosen[rng.randrange(len(chosen))] = rng.choice(words)
    if len(chosen) > 5 and rng.random() < 0.4:
        chosen[rng.randrange(1, len(chosen) - 2)] += ","
    return _finish(" ".join(chosen) + rng.choice("....?!"))


def sentence(rng: random.Random) -> str:
    """One sentence of the grammar, never one of the held-out list."""
    while True:
        text = _finish(_expand("sentence", rng))
        if plain(text) not in held_out() and len(text.split()) <= 24:
            return text


def passage(rng: random.Random, longest: int = 360) -> str:
    """Two to seven sentences, up to `longest` characters (about 25 s of speech)."""
    text, sentences = sentence(rng), rng.randint(1, 6)
    for _ in range(sentences):
        more = random_words(rng) if rng.random() < 0.25 else sentence(rng)
        if len(text) + 1 + len(more) <= longest:
            text += " " + more
    return text


def utterance(rng: random.Random) -> str:
    """One training text: 45 % sentences, 40 % random words, 15 % passages."""
    kind = rng.random()
    if kind < 0.45:
        return sentence(rng)
    return random_words(rng) if kind < 0.85 else passage(rng)


def _expand(rule: str, rng: random.Random, depth: int = 0) -> str:
    if rule in _CLASSES:
        return rng.choice(_CLASSES[rule])
    choices = _CHOICES[rule]
    if depth > 6:  # cut recursion such as "{np} and {np}"
        choices = choices[:3]
    return _SLOT.sub(lambda slot: _expand(slot[1], rng, depth + 1), rng.choice(choices))


def _finish(text: str) -> str:
    """Capital letter, "an" before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    text = re.sub(r"\bi\b", "I", text)
    return text[0].upper() + text[1:]
