"""The searches written as plainly as can be: Python lists, one picture, no early stopping."""

import itertools

from toy_decoders import END, ToyDecoder, Tree, contains, obeys, sentences


def completable(decoder: ToyDecoder, options, must_include=(), ban=()) -> set:
    """Return every prefix of a sentence that meets the demands."""
    whole = [w for w in sentences(decoder, options.max_words) if obeys(w, options, must_include, ban)]
    return {words[:end] for words in whole for end in range(len(words) + 1)}


def greedy(tree: Tree, decoder: ToyDecoder, options, ban=()):
    """Return (words, end log-probability) of the best permitted token at every step."""
    alive = completable(decoder, options, (), ban)
    words: tuple = ()
    while True:
        log_probs = tree.after(words).log_probs
        choices = [(log_probs[w], w) for w in decoder.words if (*words, w) in alive]
        if obeys(words, options, (), ban):
            choices.append((log_probs[END], END))
        best, token = max(choices)
        if token == END:
            return words, best
        words = (*words, token)


def in_place(words, must_include) -> int:
    """Count the words of required phrases in place: those that occur, and the longest in progress."""
    phrases = {phrase.token_ids for phrase in must_include}
    phrases = [p for p in phrases if not any(p != other and contains(other, p) for other in phrases)]
    done = [p for p in phrases if contains(words, p)]
    parts = [n for p in phrases if p not in done for n in range(1, len(p)) if words[-n:] == p[:n]]
    return sum(map(len, done)) + max(parts, default=0)


def beam(tree: Tree, decoder: ToyDecoder, options, must_include=(), ban=()):
    """Return every caption that ended as (score, words), best first."""
    alive = completable(decoder, options, must_include, ban)
    size = options.beam_size // options.groups
    ended: dict = {}
    live = [(0.0, (), group) for group in range(options.groups)]
    for _ in range(options.max_words + 1):
        candidates = []
        for total, words, lane in live:
            log_probs = tree.after(words).log_probs
            for token in (*decoder.words, END):
                after = words if token == END else (*words, token)
                if obeys(words, options, must_include, ban) if token == END else after in alive:
                    where = in_place(after, must_include) if must_include else lane
                    candidates.append((total + log_probs[token], words, token, where))
        live, earlier = [], []
        for lane in sorted({candidate[3] for candidate in candidates}):
            ranked = sorted(
                (c for c in candidates if c[3] == lane),
                key=lambda c: c[0] - options.diversity * (earlier.count(c[2]) if options.groups > 1 else 0),
                reverse=True,
            )
            chosen = ranked[: size - len(ended.get(lane, []))]
            for total, words, token, _ in chosen:
                if token == END:
                    ended.setdefault(lane, []).append((total / (len(words) + 1) ** options.length_penalty, words))
                else:
                    live.append((total, (*words, token), lane))
            earlier += [token for _, _, token, _ in chosen]
        if must_include and any(len(captions) == size for captions in ended.values()):
            break  # only the last lane ends captions, and it has no place left
    return sorted(set(itertools.chain(*ended.values())), reverse=True)
