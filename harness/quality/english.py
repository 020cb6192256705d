"""English as it is compared: Whisper's own text normalizer, and what it leaves apart although it sounds alike.

Whisper's writes numbers, money, ordinals, titles and contractions in one way. It was made for transcripts, and a text
that is to be spoken differs in places: what stands in parentheses is spoken too, initialisms have dots or none, times
have a colon, a number may begin with zero. Such things are put right before. After, digits that stand side by side are
one number, and single letters one word: where a recognizer parts them is a matter of taste (3:30, three thirty; USA,
u s a).

Whisper's list of British and American spellings comes with its checkpoints, not with its code. The families of words
below take its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
TWO_DIGITS = f"(?:(?:{'|'.join(TENS.split())})(?:[ -](?:{'|'.join(DIGITS[1:])}))?|{'|'.join(TEENS.split())})"
ROMAN = {
    "i": 1,
    "ii": 2,
    "iii": 3,
    "iv": 4,
    "v": 5,
    "vi": 6,
    "vii": 7,
    "viii": 8,
    "ix": 9,
    "x": 10,
    "xi": 11,
    "xii": 12,
}
COUNTED = "act book chapter part phase scene type volume war"
"""What a Roman number stands behind; alone, a letter is a letter."""
PARTS = {2: "half", 3: "third", 4: "quarter", 5: "fifth", 6: "sixth", 8: "eighth", 10: "tenth"}


def _table(lines: str) -> dict[str, str]:
    """A dictionary from `short: long` pairs between commas."""
    pairs = (pair.partition(":") for pair in " ".join(lines.split()).split(","))
    return {short.strip(): long.strip() for short, _, long in pairs}


MONTHS = _table("""
    jan: january, feb: february, mar: march, apr: april, aug: august, sep: september, sept: september, oct: october,
    nov: november, dec: december
""")
MONTH = "|".join([*dict.fromkeys(MONTHS.values()), "may", "june", "july"])
UNITS = _table("""
    kg: kilograms, mg: milligrams, km: kilometers, cm: centimeters, mm: millimeters, ml: milliliters, lb: pounds,
    lbs: pounds, oz: ounces, ft: feet, mph: miles per hour, km/h: kilometers per hour, kph: kilometers per hour,
    hz: hertz, khz: kilohertz, mhz: megahertz, ghz: gigahertz, kb: kilobytes, mb: megabytes, gb: gigabytes,
    tb: terabytes, kw: kilowatts, sec: seconds, secs: seconds, min: minutes, mins: minutes, hr: hours, hrs: hours
""")
LETTERS = _table("m: meters, g: grams, l: liters, v: volts")
"""Units behind a space only: 5G and 3M are other things."""
WORDS = _table("""
    okay: ok, alright: all right, cannot: can not, o'clock: oclock, misses: missus, vs: versus, etc: et cetera,
    ave: avenue, dept: department, approx: approximately, sgt: sergeant
""")


@cache
def english() -> Callable[[str], str]:
    """The normalizer; the first call imports transformers."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    whisper = EnglishTextNormalizer(american_spellings())
    return lambda text: joined(whisper(spelled_out(text)))


def spelled_out(text: str) -> str:
    """A text in lower case, closer to how it is said where Whisper's normalizer would lose or misread something.

    >>> spelled_out("Bond (007) left the U.S.A. at 7:05 p.m. with 5 kg & ½ of it.")
    'bond  zero zero seven  left the usa at 705 pm with 5 kilograms  and    a half of it.'
    """
    text = text.lower()
    for pattern, replacement in BEFORE:
        text = pattern.sub(replacement, text)
    return text


def joined(text: str) -> str:
    """What Whisper's normalizer gave, with numbers and initialisms in one piece each and no zeros to spare.

    >>> joined("at 3 30 p m on may 5th with .5 of it")
    'at 330 pm on may 5 with 0.5 of it'
    """
    for pattern, replacement in AFTER:
        text = pattern.sub(replacement, text)
    return text


Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _rules(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> list[Rule]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


def _any(words: Iterable[str]) -> str:
    """A pattern for one of the words, the longest that fits."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


def _fraction(match: re.Match[str]) -> str:
    """1/2 is a half, 2/3 two thirds and 2 3/4 two and three quarters; 24/7 stays what it is."""
    whole, above, below = match[1] or "", int(match[2]), int(match[3])
    if below not in PARTS or not 0 < above < below:
        return match[0]
    if whole and below == 2:
        return f"{whole}.5"
    part = f"a {PARTS[below]}" if above == 1 else f"{DIGITS[above]} {PARTS[below]}s"
    return f"{whole} and {part}" if whole else f" {part}"


def _unit(match: re.Match[str]) -> str:
    """5 kg is 5 kilograms, 1 kg is 1 kilogram."""
    number = match[1]
    name = UNITS[match[2]] if match[2] else LETTERS[match[3]]
    if number == "1":
        first, *rest = name.split()
        name = " ".join([{"feet": "foot"}.get(first, first.removesuffix("s")), *rest])
    return f"{number} {name}"


def _amount(match: re.Match[str]) -> str:
    """$3M is $3 million."""
    scale = {"k": "thousand", "m": "million"}.get(match[2], "billion")
    return f"{match[1]} {scale}"


def _initialism(match: re.Match[str]) -> str:
    """Single letters in a row are one word, unless they are words themselves, stammered or not: i a, a a."""
    letters = match[0]
    return letters if set(letters) <= set("ai ") and letters != "a i" else letters.replace(" ", "")


def _digits(match: re.Match[str]) -> str:
    """Digit by digit, as a number that begins with zero is said, or nearly so."""
    return " ".join(DIGITS[int(digit)] for digit in match[0])


BEFORE = _rules(
    (r"[()…]", " "),
    (r"(?<=\d),(?=\d{3})", ""),
    # signs that are read out
    ("½", " 1/2"),
    ("¼", " 1/4"),
    ("¾", " 3/4"),
    ("⅓", " 1/3"),
    ("⅔", " 2/3"),
    (r"(?:\b(\d+) )?(?<![\d/])(\d)/(\d\d?)(?![\d/])", _fraction),
    (rf"\bone ({_any(PARTS.values())})\b", r"a \1"),
    ("&", " and "),
    ("@", " at "),
    ("=", " equals "),
    (r"(?<=\d)\s*–\s*(?=\d)", " to "),
    (r"(?<=\d) ?\+ ?(?=\d)|(?<!\S)\+(?=\d)", " plus "),
    (r"(?<!\S)[-−](?=\d)", "minus "),
    (r"(?:#|\bno\.) ?(?=\d)", " number "),
    (r"°\s*c\b", " degrees celsius"),
    (r"°\s*f\b", " degrees fahrenheit"),
    ("°", " degrees "),
    (r"(?<=\d) ?¢", " cents "),
    (rf"\b(pounds?) (?:and )?({TWO_DIGITS}|\d\d?) pence\b", r"\1 and \2 cents"),
    (rf"\b(dollars|euros|pounds) ({TWO_DIGITS})(?=\s*(?:$|[.,;:!?]))", r"\1 and \2 cents"),
    (r"\b(\d)' ?(\d\d?)(?:\"|''|\b)", r"\1 foot \2"),
    (rf"\b({_any(COUNTED.split())}) ({_any(ROMAN)})\b(?!')", lambda match: f"{match[1]} {ROMAN[match[2]]}"),
    (r"\b(1\d\d\d|20\d\d)-(1\d\d\d|20\d\d)\b", r"\1 to \2"),
    (r"\b(pages|chapters|ages|lines|rows) (\d+)-(\d+)\b", r"\1 \2 to \3"),
    # words that are written in two ways
    (r"\be[- ]mail(s|ed)?\b", r"email\1"),
    (r"(?<=[a-z] )st\b\.?(?=\s*$|[,;:!?]| (?:and|at|from|in|is|near|to|was)\b)", "street"),
    (r"(?<=\d) %", "%"),
    (r"([$£€]\d+(?:\.\d+)?) ?(k|m|b|bn)\b", _amount),
    (r"\bwww\.", "www dot "),
    (r"\.(com|org|net|edu|gov|io)\b", r" dot \1"),
    # times and dates
    (r"\b0?(\d\d?):00(?= ?[ap]\.? ?m\b)", r"\1"),
    (r"\b0?(\d\d?):00\b", r"\1 oclock"),
    (r"\b0?(\d\d?):(\d\d)\b", r"\1\2"),
    (rf"\b({_any(MONTHS)})\b\.?(?= \d)", lambda match: MONTHS[match[1]]),
    # words cut short
    (r"\b(?:[a-z]\.){2,}(?!\w)", lambda match: match[0].replace(".", "")),
    (r"\bph\.? ?d\b\.?", "phd"),
    (r"\bo k\b", "ok"),
    (rf"(?<![\w.,])(\d+(?:\.\d+)?)(?: ?({_any(UNITS)})| ({_any(LETTERS)}))\b(?!')", _unit),
    (rf"\b({_any(WORDS)})\b", lambda match: WORDS[match[1]]),
    # numbers
    (r"(?<![\d.,])0\d+\b(?!\.\d)", _digits),
    (r"\ba (?=(?:hundred|thousand|million|billion|trillion|dollar|euro|pound|cent)\b)", "one "),
)

AFTER = _rules(
    (r"\bone\b", "1"),  # Whisper's writes it out, also where it is part of a number: one.5
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"(?<=\d)\.0+\b(?!\.)", ""),
    (rf"\b({MONTH}) (\d\d?)(?:st|nd|rd|th)\b", r"\1 \2"),
    (r"(?<=\d) (?=\d)", ""),
    (r"\b(\d) (?:foot|feet) (\d\d?)\b(?: inch(?:es)?\b)?", r"\1 foot \2"),
    (r"\b[a-z](?: [a-z])+\b", _initialism),
    (r"(?<!\S)1(?!\S)", "one"),
    (r"\s+", " "),
    (r"^ | $", ""),
)


# -- spellings -------------------------------------------------------------------------------------------------------

OUR = "arm behavi cand clam col endeav fav flav glam harb hon hum lab neighb od parl rig rum sav splend tum val vap vig"
OUR_ENDINGS = "s ed ing able ably er ers ful fully ite ites hood hoods ly less"
RE = "calib cent centimet fib kilomet lit lust meag met millilit millimet och sab scept somb spect theat"
ISE = """
    agon apolog author capital categor character civil colon critic custom emphas energ equal familiar fantas final
    general harmon hospital hypnot ideal jeopard legal local maxim memor mesmer minim mobil modern monopol national
    neutral normal optim organ polar popular priorit real recogn revolution scrutin social special stabil standard
    steril subsid summar symbol sympath terror util vandal visual
"""
ISE_ENDINGS = "e ed es er ers ing ation ations"
LL = "cance counse dia equa fue jewe labe leve marve mode quarre signa tota trave tunne"
LL_ENDINGS = "ed ing er ers or ors"
ALONE = _table("""
    analyse: analyze, analysed: analyzed, analysing: analyzing, paralysed: paralyzed, catalogue: catalog,
    catalogues: catalogs, dialogue: dialog, dialogues: dialogs, defence: defense, offence: offense, licence: license,
    pretence: pretense, practise: practice, practised: practiced, practising: practicing, grey: gray, greyer: grayer,
    greys: grays, cheque: check, cheques: checks, tyre: tire, tyres: tires, kerb: curb, kerbs: curbs, plough: plow,
    ploughs: plows, ploughed: plowed, programme: program, programmes: programs, storey: story, storeys: stories,
    cosy: cozy, cosier: cozier, pyjamas: pajamas, moustache: mustache, mould: mold, moulds: molds, mouldy: moldy,
    smoulder: smolder, sceptical: skeptical, sceptic: skeptic, skilful: skillful, wilful: willful, fulfil: fulfill,
    enrol: enroll, judgement: judgment, ageing: aging, jewellery: jewelry, draught: draft, manoeuvre: maneuver,
    encyclopaedia: encyclopedia, anaesthetic: anesthetic, whisky: whiskey
""")


@cache
def american_spellings() -> dict[str, str]:
    """British spellings, each with its American one; of words that sound alike only."""
    return {
        **_family(OUR, "our", "or", ["", *OUR_ENDINGS.split()]),
        **_family(RE, "re", "er", ["", "s"]),
        **_family(RE, "red", "ered", [""]),
        **_family(ISE, "is", "iz", ISE_ENDINGS.split()),
        **_family(LL, "ll", "l", LL_ENDINGS.split()),
        **ALONE,
    }


def _family(stems: str, british: str, american: str, endings: list[str]) -> dict[str, str]:
    return {f"{stem}{british}{end}": f"{stem}{american}{end}" for stem in stems.split() for end in endings}
