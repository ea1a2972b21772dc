"""The rules of `ptb`: what the Stanford tokenizer 3.4.1 takes for one token, as regular expressions.

A rule is a pattern and what becomes of its match. At each place the rule with the longest match wins, the
earlier of two equals. Where a pattern has a group, only the group is the token: the rest must follow, counts
as length, and is read again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from captioner.metrics import ptb_patterns as p


class Rule(NamedTuple):
    """A kind of token.

    Attributes:
        pattern: of the token, in a group if something else must follow it.
        write: from the matched text to the token; an empty token is dropped.
    """

    pattern: re.Pattern[str]
    write: Callable[[str], str]


_Table = list[tuple[str, Callable[[str], str]]]


@cache
def rules() -> tuple[Rule, ...]:
    """Build the rules; done once, when the first caption is tokenised.

    Returns:
        The rules, the first of two equally long matches first.
    """
    table = [
        *_words(),
        *_addresses(),
        *_numbers(),
        *_abbreviations(),
        *_punctuation(),
        *_compounds(),
        *_quotation_marks(),
        ("<<|>>", _same),
        (p.SYMBOL, _same),
    ]
    return tuple(Rule(re.compile(pattern), write) for pattern, write in table)


def _same(text: str) -> str:
    return text


def _nothing(_: str) -> str:
    return ""


def _constant(token: str) -> Callable[[str], str]:
    return lambda _: token


def _without_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _joined(text: str) -> str:
    # One token with a blank in it gets a blank that does not break.
    return text.replace(" ", "\u00a0")


def _brackets(text: str) -> str:
    return _joined(text).replace("(", "-LRB-").replace(")", "-RRB-")


def _ampersand(text: str) -> str:
    return re.sub("(?i:&amp;)", "&", text)


def _quotes(text: str) -> str:
    for pattern, plain in p.QUOTE_FORMS:
        text = re.sub(pattern, plain, text)
    return text


def _currency(text: str) -> str:
    return re.sub("[\u0080\u00a4\u20a0\u20ac]", "$", text.replace("\u00a2", "cents").replace("\u00a3", "#"))


def _fraction(text: str) -> str:
    return text.translate(p.FRACTIONS)


def _letter() -> str:
    return f"(?:[{p.letters()}{p.MARKS}]|&[aeiouAEIOU](?i:acute|grave|uml);)"


def _word() -> str:
    rest = f"(?:{_letter()}|[{p.digits()}])*"
    return f"{_letter()}{rest}(?:[.!?]{_letter()}{rest})*"


_CLITIC = f"{p.APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
_NOT = f"(?i:n){p.ANY_APOSTROPHE}(?i:t)"


def _words() -> _Table:
    word, letter = _word(), f"[{p.letters()}]"
    return [
        (r"(?i:c)\+\+|(?i:c|f)#", _same),
        (r"(?i:(can)not|('t)was)", _same),
        (r"(?i:('t)is|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na)", _same),
        (p.TAG, _joined),
        ("(?i:&(?:MD|mdash|ndash);)|[\u0096\u0097\u2013-\u2015]", _nothing),
        ("(?i:&amp;)", _ampersand),
        ("(?i:&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);)", _same),
        ("(?i:&nbsp;)", _nothing),
        (f"({word}){_CLITIC}", _without_soft_hyphens),
        (f"([A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*){_NOT}", _without_soft_hyphens),
        (word, _without_soft_hyphens),
        # Words with an apostrophe of their own.
        (f"{p.APOSTROPHE}(?i:n){p.APOSTROPHE}?|(?:[lLdDjJ]|(?i:Dunkin|somethin|ol)){p.APOSTROPHE}", _same),
        (f"{p.APOSTROPHE}(?:(?i:em|till?|cause)|[2-9]0(?i:s))|(?i:o){p.ANY_APOSTROPHE}(?i:o)", _same),
        (f"[A-HJ-XZn]{p.ANY_APOSTROPHE}{letter}{{2,}}", _same),
        (f"{letter}+[aeiouyAEIOUY]{p.ANY_APOSTROPHE}[aeiouA-Z]{letter}*", _same),
        (r"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)", _same),
        (f"((?i:y){p.APOSTROPHE}){letter}", _same),
    ]


def _addresses() -> _Table:
    www = r'(?i:www\.)(?:[^ \t\n\f\r"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}'
    return [
        (r'(?i:https?://)[^ \t\n\f\r"<>|(){}]+[^ \t\n\f\r"<>|.!?(){},-]', _same),
        (rf"{www}{p.PATH}", _same),
        (www, _same),
        # The range from , to _ takes capitals, digits, / and : with it.
        (rf'(?:[^ \t\n\f\r"`\'<>|.!?(){{}},-_$]+\.)+(?i:com|net|org|edu)(?:{p.PATH})?', _same),
        (
            r'(?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\n\f\r"<>|(){}\u00a0]*@(?:[^ \t\n\f\r"<>|(){}.\u00a0]+\.)*'
            r'[^ \t\n\f\r"<>|(){}.\u00a0]+(?:>|(?i:&gt;))?',
            _same,
        ),
        (f"@[a-zA-Z_][a-zA-Z_0-9]*|#{_letter()}+", _same),
        # A clitic on its own, after a word that took no clitic.
        (f"({_CLITIC})[^A-Za-z]", _quotes),
        (f"({_NOT})[^A-Za-z]", _quotes),
    ]


def _numbers() -> _Table:
    d = f"[{p.digits()}\u07c0-\u07c9]"
    return [
        (f"{d}{{1,2}}[-/]{d}{{1,2}}[-/]{d}{{2,4}}", _same),
        (f"[-+]?(?:{d}*(?:[.:,\u00ad\u066b\u066c]{d}+)+|{d}+)", _without_soft_hyphens),
        ("[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)", _same),
        (rf"(?:{d}{{1,4}}[- \u00a0])?{d}{{1,4}}(?:\\?/|\u2044){d}{{1,4}}", _joined),
        ("[\u00bc-\u00be\u2153-\u215e]", _fraction),
        (
            r"(?i:-(?:RRB|LRB|RCB|LCB|RSB|LSB)-|C\.D\.s|pro-|anti-|S(?:&|&amp;)P-500|S(?:&|&amp;)Ls)",
            _ampersand,
        ),
        (f"(?i:Cap{p.APOSTROPHE}n|c{p.APOSTROPHE}est)", _same),
        (r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", _same),
        (r"[A-Z]*\$|#", _same),
        ("[\u00a2-\u00a5\u0080\u20a0\u20a4\u20ac\u060b\u0e3f\uffe0\uffe1\uffe5\uffe6]", _currency),
    ]


def _abbreviations() -> _Table:
    d = f"[{p.digits()}\u07c0-\u07c9]"
    name = f"(?:{_letter()}|{d})+"
    return [
        (rf"([A-Za-z])\.{p.SPACE_OR_LINE}+{p.SENTENCE_START}{p.SPACE_OR_LINE}", _same),
        (rf"((?i:ca|figs?|prop|nos?|art|bldg|pp|op)\.){p.SPACE_OR_LINE}?{d}", _same),
        (rf"((?:(?i:pt)[eyEY]|(?i:co))\.){p.SPACE}(?i:ltd|lim)", _same),
        # Two more characters count: a longer reading must be longer than those.
        (rf"({p.ABBREVIATION})[\x00-\U0010ffff]{{2}}", _same),
        (p.ABBREVIATION, _same),
        (rf"{p.TITLE}\.", _same),
        (f"({p.TITLE}){p.SPACE}", _same),
        (f"({p.ACRONYM}){p.SPACE_OR_LINE}", _same),
        (f"({p.APOSTROPHE}[0-9][0-9]){p.SPACE_OR_LINE}", _same),
        (rf"({name}(?:\.{name})*\.{p.EXTENSION})(?:{p.SPACE_OR_LINE}|[.?!,])", _same),
        (rf"({_word()}\.){p.AFTER_DOT}", _without_soft_hyphens),
        (p.PHONE, _brackets),
    ]


def _punctuation() -> _Table:
    return [
        ('"|(?i:&quot;)', _quotes),
        ("<|(?i:&lt;)", _constant("<")),
        (">|(?i:&gt;)", _constant(">")),
        (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _brackets),
        # A smiley with a slip of the pen, kept because the tokens must be equal.
        (r"[\^x=~<>]\.\[\^(?i:x)=[^<]*<>\]", _brackets),
        (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", _brackets),
        (r"\{", _constant("-LCB-")),
        (r"\}", _constant("-RCB-")),
        (r"\[", _constant("-LSB-")),
        (r"\]", _constant("-RSB-")),
        (r"\(", _constant("-LRB-")),
        (r"\)", _constant("-RRB-")),
        ("-{3,4}", _nothing),
        ("-+", _same),
        (r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026]", _nothing),
        ("@+|#+|_+", _same),
        (r"\*+|(?:\\\*){1,3}", _same),
        ("[?!]+", _same),
        ("[.,;:\u3001=/\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002]", _same),
    ]


def _compounds() -> _Table:
    a = f"[{p.letters()}{p.digits()}]"
    part = f"(?:[dDoOlL]{p.ANY_APOSTROPHE}{a})?{a}+"
    thing = f"{part}(?:[-_\u058a\u2010\u2011]{part})*"
    hyphenated = r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\u00ad]+))+"
    # The entity first: its own letters would go on as capitals, and "S&AMP;LS" would end before the ";".
    capitals = "[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"
    return [
        (rf"({hyphenated}\.){p.AFTER_DOT}", _without_soft_hyphens),
        (hyphenated, _without_soft_hyphens),
        (rf"({thing}\.){p.AFTER_DOT}", _same),
        (thing, _same),
        (rf"({capitals}\.){p.AFTER_DOT}", _ampersand),
        (capitals, _ampersand),
    ]


def _quotation_marks() -> _Table:
    return [
        (r"(')[A-Za-z][^ \t\n\r\u00a0]", _constant("`")),
        (_CLITIC, _quotes),
        (_NOT, _quotes),
        (
            f"[`\u2018\u2019\u201a-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{{1,2}}|''|{p.APOSTROPHE}",
            _quotes,
        ),
    ]
