"""A grammar of short film reviews: a hidden Markov model over words, given a latent sentiment.

A review has an opening, a few statements, a verdict and perhaps a mark out of ten. Each statement
has its own polarity. How often it agrees with the sentiment of the review depends on the kind of
statement (`STATEMENTS`). A statement is plain ("the plot was gripping") or denies the opposite
("the plot hardly dragged"). So a good review may contain complaints, and no word is decisive before
its clause is complete. Connectives follow the polarities: "and" joins two equal ones, "but" two
different ones.

The tables below are rules `state: (words, next states)`. Both are lists of "item:weight"; a weight
that is not written is 1. A state without words is a choice of next states; it is resolved while the
matrices are built. A trailing + or - in a state's name is the polarity of its statement.
"""

import dataclasses
import functools

import numpy as np

NEGATIVE, POSITIVE = 0, 1
OTHER = {"+": "-", "-": "+"}

# How often each kind of statement is made, and how often it agrees with the review's sentiment.
STATEMENTS = {
    "aspect": (0.44, 0.70),
    "feeling": (0.20, 0.84),
    "actor": (0.12, 0.62),
    "quality": (0.12, 0.66),
    "audience": (0.12, 0.76),
}
VERDICT_AGREES, MARK_AGREES = 0.80, 0.86

# Every distribution is mixed with this share of another one, so that no string of words is
# impossible and a text may end anywhere. The other distribution of words is uniform. That of next
# states is half uniform and half the state "anew", so that a misplaced sentence keeps its meaning.
LEAK = 3e-4

ASPECTS = """acting:3 plot:3 script:2 dialogue:2 music:2 soundtrack photography
cinematography editing direction pacing story:3 ending:2 opening finale cast:2 romance humor action
suspense scenery lighting choreography premise"""
THINGS = "minute:3 scene:4 moment:2 song joke:2 line:2 twist chase duel dance fight character:2"
GENRES = (
    "comedy:4 drama:4 thriller:4 western:2 musical:2 mystery:2 romance documentary cartoon sequel"
)
ORIGINS = "french german british japanese spanish danish korean russian new:3 recent classic silent"
ROLES = "detective:2 doctor teacher sailor painter:2 soldier queen villain:2 hero ghost spy thief"
PEOPLE = "young:3 retired lonely:2 famous shy wealthy stubborn"
ACTORS = "keane laurent marlowe okafor novak reyes tanaka bell moreau castillo petrov walsh"
PLACES = "paris:2 london:2 tokyo berlin rome texas brooklyn moscow prague dublin"
COMPANY = "sister brother wife husband friends:2 kids mother father neighbors class"

# Words by polarity. Mild words are also used for the other polarity, at a third of their weight.
ADJECTIVES = {
    "+": """good:4 great:4 superb:2 wonderful:2 brilliant:2 excellent:2 gripping moving charming
    convincing:2 memorable clever:2 touching delightful beautiful stunning powerful witty perfect
    engaging thrilling""",
    "-": """bad:4 terrible:3 awful:2 dull:3 boring:3 weak:2 poor:2 predictable:2 clumsy lifeless
    forgettable tedious ridiculous bland shallow messy pointless dreadful confusing painful""",
}
MILD_ADJECTIVES = {
    "+": "decent fine pleasant watchable gentle unusual simple",
    "-": "slow noisy loud familiar strange uneven silly",
}
VERBS = {
    "+": "worked:3 sparkled soared delivered:2 impressed:2 shone:2 succeeded dazzled",
    "-": "dragged:3 failed:3 stumbled disappointed:2 collapsed sagged fizzled backfired",
}
MILD_VERBS = {"+": "surprised amused", "-": "wandered rambled"}
FEELINGS = {
    "+": "loved:4 enjoyed:4 liked:3 admired:2 adored treasured",
    "-": "hated:4 disliked:3 despised resented regretted endured:2",
}
MILD_FEELINGS = {"+": "noticed", "-": "questioned"}
BARE_FEELINGS = {
    "+": "love enjoy:4 like:4 admire believe:2",
    "-": "hate:3 dislike:3 mind:4 resent regret:3",
}
QUALITIES = {
    "+": "charm:3 heart:2 warmth wit:2 energy style:2 tension:2 imagination depth:2 passion magic",
    "-": "nonsense:2 filler:2 padding confusion boredom noise:2 clutter gore preaching",
}
MILD_QUALITIES = {"+": "silence nostalgia", "-": "violence sentiment"}
MANNERS = {
    "+": "brilliantly:2 superbly beautifully convincingly:2 perfectly wonderfully",
    "-": "badly:2 poorly:2 clumsily terribly lazily woodenly",
}
REACTIONS = {
    "+": "laughed:3 cheered:2 smiled applauded cried",
    "-": "yawned:2 left:2 slept groaned:2 complained",
}
PRAISED = {"+": "see:3 watch:3 rent:2 buy", "-": "skip:3 avoid:4 forget:2"}
ADVISED = {"+": "recommend:5 watch:2 buy", "-": "skip:2 avoid:3 return"}
FORBIDDEN = {"+": "miss:4 skip:2 forget avoid", "-": "watch:3 rent:2 buy see recommend"}
MARKS = {"+": "5 6:2 7:4 8:5 9:3 10:2", "-": "1:2 2:3 3:5 4:4 5:2 6"}

Weights = dict[str, float]
Rules = dict[str, tuple[str | Weights, str | Weights]]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The hidden Markov model. State 0 is the boundary: a text starts from it and ends in it.

    Attributes:
      words: V words; column V of `emission` is the unknown word, equally likely in every state.
      states: S names, for readers.
      transition: [2, S, S] P(next state | state, sentiment); sentiment 0 is negative, 1 positive.
      emission: [S, V + 1] P(word | state); the boundary's row is zero, as it has no word.
      leak: [2, S], the part that all rows of `transition` share; the rest is sparse.
    """

    words: tuple[str, ...]
    states: tuple[str, ...]
    transition: np.ndarray
    emission: np.ndarray
    leak: np.ndarray


@functools.cache
def grammar() -> Grammar:
    """The built-in grammar of film reviews."""
    return build(review_rules("-"), review_rules("+"))


def build(negative: Rules, positive: Rules, *, leak: float = LEAK) -> Grammar:
    """Build the matrices from two tables of rules, one for each sentiment.

    Both tables need the choices "begin" and "anew". The next state "end" ends the text.

    Raises:
      ValueError: the tables differ in their states or words.
      KeyError: a next state has no rule.
    """
    emissions = {name: _weights(words) for name, (words, _) in negative.items() if words}
    if emissions != {name: _weights(words) for name, (words, _) in positive.items() if words}:
        raise ValueError("the negative and the positive rules must have the same states and words")
    states = ("boundary", *emissions)
    words = tuple(sorted({word for weights in emissions.values() for word in weights}))
    column = {word: i for i, word in enumerate(words)}

    emission = np.zeros((len(states), len(words) + 1))
    for row, weights in enumerate(emissions.values(), start=1):
        for word, weight in weights.items():
            emission[row, column[word]] = weight
    emission[1:] /= emission[1:].sum(axis=1, keepdims=True)
    emission[1:] = (1 - leak) * emission[1:] + leak / emission.shape[1]

    ruled = np.stack([_transition(rules, states) for rules in (negative, positive)])
    shared = leak * (0.5 / len(states) + 0.5 * ruled[:, -1])
    transition = (1 - leak) * ruled[:, :-1] + shared[:, None]
    for array in (transition, emission, shared):
        array.setflags(write=False)
    return Grammar(words, states, transition, emission, shared)


def _transition(rules: Rules, states: tuple[str, ...]) -> np.ndarray:
    """P(next state | state) without the leak, [S + 1, S]; the last row belongs to "anew"."""
    index = {"end": 0} | {name: i for i, name in enumerate(states) if i}

    @functools.cache
    def reach(target: str) -> np.ndarray:
        if target in index:
            return np.eye(len(states))[index[target]]
        return follow(target)

    def follow(name: str) -> np.ndarray:
        weights = _weights(rules[name][1])
        total = sum(weights.values())
        return sum(weight / total * reach(target) for target, weight in weights.items())

    return np.stack([follow(name) for name in ("begin", *states[1:], "anew")])


def _weights(listed: str | Weights) -> Weights:
    """Parse "a:2 b" to {"a": 2.0, "b": 1.0}."""
    if isinstance(listed, dict):
        return listed
    pairs = (item.partition(":") for item in listed.split())
    return {name: float(weight or 1) for name, _, weight in pairs}


def _graded(polarity: str, clear: dict[str, str], mild: dict[str, str]) -> Weights:
    """The clear words of one polarity, and the mild words of both; see `MILD_ADJECTIVES`."""
    words = _weights(clear[polarity])
    words |= {word: 1.5 * weight for word, weight in _weights(mild[polarity]).items()}
    words |= {word: 0.5 * weight for word, weight in _weights(mild[OTHER[polarity]]).items()}
    return words


def review_rules(sentiment: str) -> Rules:
    """The rules of a review whose sentiment is "+" or "-"."""
    rules = opening_rules()
    shares = {"+": 0.0, "-": 0.0}
    for p in "+-":
        kinds = {
            f"{kind}{p}": often * (agrees if p == sentiment else 1 - agrees)
            for kind, (often, agrees) in STATEMENTS.items()
        }
        shares[p] = sum(kinds.values())
        rules[f"statement{p}"] = ("", kinds)
        rules |= aspect_rules(p) | feeling_rules(p) | other_statement_rules(p) | verdict_rules(p)
    for p in "+-":
        joined = {f"comma_and{p}": shares[p], f"comma_but{OTHER[p]}": shares[OTHER[p]]}
        rules[f"join{p}"] = ("", joined)
    against = OTHER[sentiment]
    verdict = {f"verdict{sentiment}": VERDICT_AGREES, f"verdict{against}": 1 - VERDICT_AGREES}
    mark = {f"mark{sentiment}": MARK_AGREES, f"mark{against}": 1 - MARK_AGREES}
    rules["statement"] = ("", {f"statement{p}": shares[p] for p in "+-"})
    rules["verdict"] = ("", verdict)
    rules["mark"] = ("", mark)
    return rules


def opening_rules() -> Rules:
    """Rules without sentiment: how the film was seen, what it is about, punctuation."""
    return {
        "begin": ("", "i_saw:42 this_is:30 actor_stars:22 statement:6"),
        "anew": ("", "begin:2 statement:5 verdict:3"),
        "i_saw": ("i", "saw"),
        "saw": ("saw:3 watched:4 rented caught", "this"),
        "this": ("this:4 the another", "origin genre"),
        "this_is": ("this", "is"),
        "is": ("is", "is_a"),
        "is_a": ("a", "its_origin its_genre"),
        "its_origin": (ORIGINS, "its_genre"),
        "its_genre": (GENRES, "about:3 stop:2"),
        "actor_stars": (ACTORS, "stars"),
        "stars": ("stars:3 appears", "stars_in"),
        "stars_in": ("in", "this"),
        "origin": (ORIGINS, "genre"),
        "genre": (GENRES, "about:2 seen:2 stop"),
        "about": ("about", "about_a"),
        "about_a": ("a:5 one", "person role"),
        "person": (PEOPLE, "role"),
        "role": (ROLES, "role_in:2 seen stop:2"),
        "role_in": ("in", "place"),
        "place": (PLACES, "stop"),
        "seen": ("", "last with:2 on"),
        "last": ("last", "night"),
        "night": ("night:3 week month year", "stop"),
        "with": ("with", "with_my"),
        "with_my": ("my", "company"),
        "company": (COMPANY, "stop:3 last"),
        "on": ("on", "medium"),
        "medium": ("dvd:3 television:2 video cable sunday", "stop"),
        "stop": (".", "statement"),
        "pause": (".", "statement:38 verdict:62"),
        "final_stop": (".", "mark end:3"),
        "mark_of": ("/", "mark_ten"),
        "mark_ten": ("10", "end"),
    }


def aspect_rules(p: str) -> Rules:
    """Statements of polarity p about an aspect, "the plot was not very good"; the connectives."""
    n = OTHER[p]
    adjectives = {q: _graded(q, ADJECTIVES, MILD_ADJECTIVES) for q in "+-"}
    verbs = {q: _graded(q, VERBS, MILD_VERBS) for q in "+-"}
    idioms = {"+": ("came", "alive:3 together:2"), "-": ("fell", "flat:3 apart:2 short")}
    first, last = idioms[p]
    going_on = {"+": ("lingered:2 lived", "days:3 weeks"), "-": ("went:2 dragged", "hours:3 ages")}
    went, hours = going_on[p]
    return {
        f"after{p}": ("", f"pause:71 join{p}:29"),
        f"comma_and{p}": (",", f"and{p}"),
        f"comma_but{p}": (",", f"but{p}"),
        f"and{p}": ("and:6 while", f"statement{p}"),
        f"but{p}": ("but:5 although:2 yet", f"statement{p}"),
        f"aspect{p}": ("", f"the{p}"),
        f"the{p}": ("the:8 its", f"noun{p}"),
        f"noun{p}": (
            ASPECTS,
            f"was{p}:40 was_denied{p}:24 verb{p}:14 never{p}:8 idiom{p}:8 linger{p}:6",
        ),
        f"was{p}": ("was:6 is:3 felt:2 seemed:2", f"very{p}:3 adjective{p}:5"),
        f"very{p}": ("very:3 quite:2 really:2 truly simply so", f"adjective{p}"),
        f"adjective{p}": (adjectives[p], f"after{p}"),
        f"was_denied{p}": ("was:3 is:2", f"not{p}"),
        f"not{p}": ("not:6 hardly:3 never:2", f"not_very{p} denied_adjective{p}:4"),
        f"not_very{p}": ("very:2 that really", f"denied_adjective{p}"),
        f"denied_adjective{p}": (adjectives[n], f"after{p}"),
        f"verb{p}": (verbs[p], f"throughout{p} after{p}:2"),
        f"throughout{p}": ("throughout:3 often constantly", f"after{p}"),
        f"never{p}": ("never:4 hardly rarely", f"denied_verb{p}"),
        f"denied_verb{p}": (verbs[n], f"after{p}"),
        f"idiom{p}": (first, f"idiom_end{p}"),
        f"idiom_end{p}": (last, f"after{p}"),
        f"linger{p}": (went, f"linger_on{p}"),
        f"linger_on{p}": ("on", f"linger_for{p}"),
        f"linger_for{p}": ("for", f"linger_end{p}"),
        f"linger_end{p}": (hours, f"after{p}"),
    }


def feeling_rules(p: str) -> Rules:
    """Statements of polarity p in the first person: "i did not mind the music"."""
    return {
        f"feeling{p}": ("", f"i{p}"),
        f"i{p}": ("i", f"felt{p}:3 did{p}:2"),
        f"felt{p}": (_graded(p, FEELINGS, MILD_FEELINGS), f"every{p}:3 the_one{p}:2"),
        f"did{p}": ("did:4 do", f"did_not{p}"),
        f"did_not{p}": ("not", f"denied_felt{p}"),
        f"denied_felt{p}": (BARE_FEELINGS[OTHER[p]], f"the_one{p}"),
        f"every{p}": ("every:4 each", f"thing{p}"),
        f"thing{p}": (THINGS, f"after{p}"),
        f"the_one{p}": ("the", f"liked_or_not{p}"),
        f"liked_or_not{p}": (ASPECTS, f"after{p}"),
    }


def other_statement_rules(p: str) -> Rules:
    """Statements of polarity p about an actor, a quality of the film, or the audience."""
    n = OTHER[p]
    return {
        f"actor{p}": (ACTORS, f"played{p}:3 was{p}:2 was_denied{p}"),
        f"played{p}": ("played:3 portrayed", f"played_the{p}"),
        f"played_the{p}": ("the", f"part{p}"),
        f"part{p}": (ROLES, f"manner{p}"),
        f"manner{p}": (MANNERS[p], f"after{p}"),
        f"quality{p}": ("", f"it{p}"),
        f"it{p}": ("it:4 this", f"had{p}"),
        f"had{p}": ("had:3 has:3 offers", f"much{p}:3 no{p}:2"),
        f"much{p}": ("real:3 much:2 genuine enough", f"substance{p}"),
        f"substance{p}": (_graded(p, QUALITIES, MILD_QUALITIES), f"after{p}"),
        f"no{p}": ("no:4 little:2", f"denied_substance{p}"),
        f"denied_substance{p}": (QUALITIES[n], f"after{p}"),
        f"audience{p}": ("", f"my{p}:3 nobody{p}:2"),
        f"my{p}": ("my", f"viewer{p}"),
        f"viewer{p}": (COMPANY, f"reacted{p}"),
        f"reacted{p}": (REACTIONS[p], f"after{p}"),
        f"nobody{p}": ("nobody", f"denied_reaction{p}"),
        f"denied_reaction{p}": (REACTIONS[n], f"after{p}"),
    }


def verdict_rules(p: str) -> Rules:
    """Last sentences of polarity p, "overall , not a bad comedy", and the mark out of ten."""
    n = OTHER[p]
    # Only words that go with "a", not "an".
    labels = {
        q: {word: weight for word, weight in _weights(listed).items() if word[0] not in "aeiou"}
        for q, listed in ADJECTIVES.items()
    }
    return {
        f"verdict{p}": ("", f"overall{p}:4 advice{p}:6"),
        f"overall{p}": ("overall:5 ultimately honestly finally", f"overall_comma{p}"),
        f"overall_comma{p}": (",", f"a{p}:3 not_a{p}:2 advice{p}:3"),
        f"a{p}": ("a", f"label{p}"),
        f"label{p}": (labels[p], f"labelled{p}"),
        f"not_a{p}": ("not", f"denied_a{p}"),
        f"denied_a{p}": ("a", f"denied_label{p}"),
        f"denied_label{p}": (labels[n], f"labelled{p}"),
        f"labelled{p}": ("film:3 movie:2 " + GENRES, "final_stop"),
        f"advice{p}": ("", f"praise{p}:3 would_i{p}:4 do{p}:3"),
        f"praise{p}": (PRAISED[p], f"object{p}"),
        f"would_i{p}": ("i", f"would{p}"),
        f"would{p}": ("would:3 will", f"advise{p}:3 would_not{p}:2"),
        f"advise{p}": (ADVISED[p], f"object{p}"),
        f"do{p}": ("do", f"would_not{p}"),
        f"would_not{p}": ("not", f"forbid{p}"),
        f"forbid{p}": (FORBIDDEN[p], f"object{p}"),
        f"object{p}": ("it", "final_stop"),
        f"mark{p}": (MARKS[p], "mark_of"),
    }
