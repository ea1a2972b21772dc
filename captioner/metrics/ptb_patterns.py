"""Parts of the patterns of `ptb_rules`: characters, abbreviations, tags, telephone numbers, symbols.

Where something is a list, it is that of the Stanford tokenizer 3.4.1, oddities included: the tokens must be
equal. Case matters inside [...] and not elsewhere, so that literal words stand in (?i:...).
"""

from __future__ import annotations

import re
from functools import cache

# Letters of the Basic Multilingual Plane that came after Unicode 6.1, which the tokenizer's alphabet is of.
NEWER_LETTERS = (
    "\u037f\u0528-\u052f\u0560\u0588\u05ef\u0860-\u089f\u08a1\u08ad-\u08c9\u0978\u0980\u09fc\u0af9\u0c34\u0c5a-\u0c5d"
    "\u0c80\u0cdd\u0d04\u0d54-\u0d5f\u0e86\u0e89\u0e8c\u0e8e-\u0e93\u0e98\u0ea0\u0ea8-\u0ea9\u0eac\u13f5-\u13fd\u16f1-\u16f8"
    "\u170d\u171f\u1878\u191d-\u191e\u19b0-\u19c0\u19c8-\u19c9\u1b4c\u1c80-\u1cbf\u1cf2-\u1cf3\u1cfa\u2c2f\u2c5f\u312e-\u312f"
    "\u31bb-\u31bf\u4db6-\u4dbf\u9fcd-\u9fff\ua698-\ua69d\ua78f\ua794-\ua79f\ua7ab-\ua7f7\ua8fd-\ua8fe\ua9e0-\ua9fe"
    "\uaa7e-\uaa7f\uab30-\uabbf"
)
# What may also stand in a word: the soft hyphen, accents and vowel signs of their own.
MARKS = (
    "\u00ad\u02c2-\u0379\u0384-\u0385\u03f6\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf\u05c1-\u05c2\u05c4-\u05c5\u05c7"
    "\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06ed\u06fd-\u06fe\u070f-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c-\u094e"
    "\u0951-\u0955\u0962-\u0963\u0981-\u0983\u09bc-\u09c4\u09c7-\u09c8\u09cb-\u09cd\u09d7\u09e2-\u09e3\u0a01-\u0a03\u0a3c"
    "\u0a3e-\u0a4f\u0a81-\u0a83\u0abc-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56"
    "\u0d3e-\u0d44\u0d46-\u0d48\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ebc\u0ec8-\u0ecd"
)
NEWER_DIGITS = "\u0de6-\u0def\ua9f0-\ua9f9"

SPACE = "[ \\t\u00a0\u2000-\u200a\u3000]"
SPACE_OR_LINE = "[ \\t\u00a0\u2000-\u200a\u3000\\r\\n\u2028\u2029\\v\\f\u0085]"
APOSTROPHE = "(?:['\u0092\u2019]|(?i:&apos;))"
# Also quotes that stand for an apostrophe inside a word, rightly or wrongly.
ANY_APOSTROPHE = f"(?:{APOSTROPHE}|[`\u0091\u2018\u201b])"
AFTER_DOT = "[,;:\u3001]"

# Abbreviations that keep their dot before anything.
ABBREVIATION = (
    "(?:(?i:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu|Thurs|Fri)"
    "|(?i:Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn|Tenn|Va|Vt)"
    # States that are common words in lower case.
    "|(?i:Wisc?|Wyo)|A(?i:rk|z)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
    "|(?i:Inc|Cos?|Corp|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys)|(?i:Pp?t)[ye](?i:s?)"
    "|(?i:tel|est|ext|sq|Jr|Sr|Bros|(?:Ed|Ph)\\.D|Blvd|Rd|Esq|etc|al|seq|Bldg))\\."
)
# Long forms first: re takes the first alternative that fits, and the longest is wanted.
_COUNTRIES = "(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\\.S|U\\.S\\.-(?:U\\.K|U\\.S\\.S\\.R))"
LONG_ACRONYM = f"(?:{_COUNTRIES}|[A-Za-z](?:\\.[A-Za-z])+)"
ACRONYM = f"(?:{LONG_ACRONYM}|[A-Za-z])"
# Titles and others that are followed by a name, without their dot.
TITLE = (
    f"(?:{LONG_ACRONYM}|(?i:Mr|Mrs|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj)"
    "|(?i:Sgt|Cpl|Pvt|Capt|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp)"
    "|(?i:Mlle|Mme|Msgr|Sfc)|M(?i:iss)"
    "|(?i:vs|Alex|Wm|Jos|Cie|Ph|a\\.k\\.a|cf|TREAS|Invt|Elec|Natl|Dept)|(?i:M)[ft](?i:g)|[A-Za-z])"
)
TAG_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
TAG = (
    f"<(?:[!?][A-Za-z-][^>\\r\\n]*|/{TAG_NAME}"
    f"|{TAG_NAME}(?:[ ]+{TAG_NAME}(?:[ ]*=[ ]*(?:'[^']*'|\"[^\"]*\"))?)*[ ]*/?)[ ]*>"
)
# A word or tag that begins a sentence: before it, "C." is "C" and a full stop.
SENTENCE_START = (
    f"(?:{TAG}|A|A(?i:bout|ccording|dditionally|fter|n|s|t)|B(?i:ut)|E(?i:arlier)|H(?i:e|er|ere|owever)|I(?i:f|n|t)|L(?i:ast)"
    "|M(?i:any|ore|r\\.|s\\.)|N(?i:ow)|O(?i:nce|ne|ther|ur)|S(?i:he|ince|o|ome|uch)"
    "|T(?i:hat|he|heir|hen|here|hese|hey|his)|W(?i:e|hen|hile|hat)|Y(?i:et|ou))"
)
EXTENSION = (
    "(?i:bat|bmp|c|class|cgi|cpp|dll|doc|docx|exe|gif|gz|h|htm|html|jar|java|jpeg|jpg|mov|mp3|pdf|php|pl|png|ppt|ps|py"
    "|sql|tar|txt|wav|x|xml|zip)"
)
PATH = '/[^ \\t\\n\\f\\r"<>|()]+[^ \\t\\n\\f\\r"<>|.!?(){},-]'
PHONE = (
    "(?:\\([0-9]{2,3}\\)[ \u00a0]?|(?:\\+\\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    "[0-9]{3,4}[- \u00a0]?[0-9]{3,5}|(?:(?:\\+\\+?)?[0-9]{2,4}\\.)?[0-9]{2,4}\\.[0-9]{3,4}\\.[0-9]{3,5}"
)
SYMBOL = (
    "[+%&~^|\\\\\u00a6-\u00a9\u00ac\u00ae-\u00ba\u00d7\u00f7\u0387\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603"
    "\u0606-\u060a\u060c\u0614\u061b\u061e\u066a\u066d\u0703-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f\u1fbd\u2016\u2017"
    "\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3012\u30fb"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
QUOTE_FORMS = (
    ("&apos;", "'"),
    ('"|&quot;|[\u0094\u201d\u00bb]', "''"),
    ("[\u0091\u2018\u201b\u2039]", "`"),
    ("[\u0092\u2019\u203a]", "'"),
    ("[\u0093\u201c\u00ab]", "``"),
)
FRACTIONS = str.maketrans({"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"})


@cache
def letters() -> str:
    """Return the letters of the tokenizer's alphabet.

    Returns:
        The inside of a character class.
    """
    newer = re.compile(f"[{NEWER_LETTERS}]")
    # Two marks that were letters when the tokenizer was built.
    return _class_body([c for c in _PLANE if (c.isalpha() and not newer.match(c)) or c in "\u1885\u1886"])


@cache
def digits() -> str:
    """Return the decimal digits of the tokenizer's alphabet.

    Returns:
        The inside of a character class.
    """
    newer = re.compile(f"[{NEWER_DIGITS}]")
    return _class_body([c for c in _PLANE if c.isdecimal() and not newer.match(c)])


_PLANE = [chr(i) for i in range(0x10000)]


def _class_body(chars: list[str]) -> str:
    """Write characters in ascending order as the inside of a character class."""
    body: list[str] = []
    start = previous = chars[0]
    for char in [*chars[1:], ""]:
        if char and ord(char) == ord(previous) + 1:
            previous = char
            continue
        body.append(start if start == previous else f"{start}-{previous}")
        start = previous = char
    return "".join(body)
