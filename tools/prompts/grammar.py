"""The words of words.py put together the way people type prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import words
from words import Medium, Phrasing, Scene

LONGEST = 62  # words and marks; a text encoder reads 77 tokens, and a rare word takes two or three
T = TypeVar("T")


def compose(count: int, seed: int) -> list[str]:
    """The first ``count`` prompts of ``seed``: no two alike, and the same ones however many are
    asked for."""
    rng = Random(f"rapm prompts {seed}")
    found: dict[str, str] = {}  # two that differ in capitals alone are the same to a text encoder
    while len(found) < count:
        prompt = _abstract(rng) if _chance(rng, 0.05) else _concrete(rng)
        if len(re.findall(r"\w+|[^\w\s]", prompt)) <= LONGEST:
            found.setdefault(prompt.lower(), prompt)
    return list(found.values())


# ---- drawing


def _chance(rng: Random, probability: float) -> bool:
    return rng.random() < probability


def _pick(rng: Random, items: Sequence[T]) -> T:
    """By ``random()`` alone, the one draw that Python promises never to change."""
    return items[int(rng.random() * len(items))]


def _two(rng: Random, items: Sequence[T]) -> list[T]:
    """Two different ones."""
    first = _pick(rng, items)
    return [first, _pick(rng, [item for item in items if item != first])]


def _some(rng: Random, items: Sequence[T], most: int) -> list[T]:
    """From none to ``most`` different ones, in the order of the draw."""
    return list(dict.fromkeys(_pick(rng, items) for _ in range(int(rng.random() * (most + 1)))))


@dataclass(frozen=True)
class _Idea:
    """What a prompt says, drawn before how it says it. What it leaves out is empty.

    Attributes:
        subject: without an article.
        is_doing: whether the action may come after "is".
        finishes: two, of the medium.
    """

    subject: str
    action: str
    is_doing: bool
    place: str
    details: list[str]
    medium: Medium
    name: str
    finishes: list[str]
    light: Phrasing | None
    frame: Phrasing | None


_SCENES = {
    kind: [s for s in (*words.SCENES, *words.SIGNS) if s.kind == kind] for kind in words.KINDS
}
_KINDS = [kind for kind, share in words.KINDS.items() for _ in range(share)]


def _idea(rng: Random) -> _Idea:
    scene = _pick(rng, _SCENES[_pick(rng, _KINDS)])
    medium = _pick(rng, words.MEDIA_OF[scene.kind])
    bare = medium.bare
    return _Idea(
        subject=_subject(rng, scene),
        action=_pick(rng, scene.actions)
        if scene.actions and _chance(rng, 0.2 if bare else 0.85)
        else "",
        is_doing=scene.kind not in words.STILL,
        place=_pick(rng, scene.places) if scene.places and not bare and _chance(rng, 0.8) else "",
        details=[] if bare else _some(rng, scene.details, 2) if scene.details else [],
        medium=medium,
        name=_pick(rng, medium.names),
        finishes=_apart(_two(rng, medium.finishes)),
        light=_pick(rng, words.LIGHTS[scene.light]) if medium.lit and _chance(rng, 0.7) else None,
        frame=_pick(rng, words.FRAMES[scene.kind]) if medium.framed and _chance(rng, 0.3) else None,
    )


def _subject(rng: Random, scene: Scene) -> str:
    """People get an age, an origin, a look or clothes now and then, each drawn for itself."""
    noun = _pick(rng, scene.subjects)
    if scene.kind in ("person", "street", "portrait"):
        if _chance(rng, 0.45):
            noun = f"{_pick(rng, words.ORIGINS)} {noun}"
        elif scene.kind == "person" and _chance(rng, 0.3):
            noun = f"{_pick(rng, ('female', 'male'))} {noun}"
        if _chance(rng, 0.35) and "grand" not in noun:
            noun = f"{_pick(rng, words.AGES)} {noun}"
        if _chance(rng, 0.35):
            noun = f"{noun} {_pick(rng, words.LOOKS if scene.kind == 'person' else words.CLOTHES)}"
    elif scene.kind == "child" and _chance(rng, 0.4):
        first, _, rest = noun.rpartition(" ")
        noun = " ".join(part for part in (first, _pick(rng, words.ORIGINS), rest) if part)
    return noun


# ---- wording


_NUMBERS = ("two ", "three ", "four ")


def _a(phrase: str) -> str:
    """The phrase with its article; none before a number, and none before "concept art"."""
    if phrase.startswith(_NUMBERS) or phrase.endswith(" art"):
        return phrase
    consonant = re.match(r"uni|use|ukr|eu|one\b", phrase, re.IGNORECASE)
    vowel = re.match(r"[aeiou]|8|hour|honest", phrase, re.IGNORECASE)
    return f"an {phrase}" if vowel and not consonant else f"a {phrase}"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _apart(tags: Sequence[str], said: Sequence[str] = ()) -> list[str]:
    """Those that say nothing twice: of two that end alike, as "vivid colors" and "muted colors" do,
    the first."""
    kept: list[str] = []
    for tag in tags:
        end = tag.split()[-1].lstrip("0123456789")
        if not any(
            tag in other or other in tag or other.split()[-1].lstrip("0123456789") == end
            for other in (*said, *kept)
        ):
            kept.append(tag)
    return kept


_OPENING = re.compile(
    r"(?:high )?(?:in front of|on top "
    r"of|in|on|at|by|under|above|over|behind|beside|around|among|along|across|through|off"
    r"|before|outside) (?:(?:a|an|the) )?"
)


def _tag(place: str) -> str:
    """ "in a small bakery" as "small bakery"."""
    return _OPENING.sub("", place, count=1)


def _join(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def _concrete(rng: Random) -> str:
    idea = _idea(rng)
    forms = [_short, _tags, _tags, _tags, _phrase, _phrase, _phrase]
    if not idea.medium.bare:
        forms += [_sentence, _sentence, _description, _description]
    return _pick(rng, forms)(rng, idea)


def _short(rng: Random, idea: _Idea) -> str:
    """A few words: "ginger cat on a piano"."""
    subject = _a(idea.subject) if _chance(rng, 0.3) else idea.subject
    return _pick(
        rng,
        (
            _join(subject, idea.action if idea.is_doing else None),
            _join(subject, idea.place or idea.action),
            _join(subject, idea.action, idea.place),
            f"{subject}, {idea.name}",
            f"{idea.name} of {_a(idea.subject)}",
            f"{subject}, {idea.light.tag}" if idea.light else subject,
        ),
    )


def _tags(rng: Random, idea: _Idea) -> str:
    """A list: "ginger cat sleeping, piano, dim light, oil painting, rich colors, highly
    detailed"."""
    lead = _join(idea.subject, idea.action)
    is_first = _chance(rng, 0.25)
    about = [f"{idea.name} of {_a(lead)}" if is_first else lead, _tag(idea.place)]
    about += [
        idea.light.tag if idea.light else "",
        idea.frame.tag if idea.frame else "",
        "" if is_first else idea.name,
    ]
    if not is_first and not idea.medium.bare and _chance(rng, 0.15):
        about.pop()  # of no medium at all
    else:
        about += _apart(
            [*_some(rng, idea.finishes, 2), *_some(rng, idea.medium.tags, 4)],
            [idea.name, *filter(None, about)],
        )
    return ", ".join(filter(None, about))


def _scene_words(idea: _Idea, light: bool = True) -> str:
    return _join(
        _a(idea.subject),
        idea.action,
        idea.place,
        idea.light.phrase if idea.light and light else None,
    )


def _phrase(rng: Random, idea: _Idea) -> str:
    """What people type without a full stop: "an oil painting of a ginger cat sleeping on a piano,
    seen from above"."""
    name = _a(idea.name) if _chance(rng, 0.55) else idea.name
    text = f"{name} of {_scene_words(idea)}"
    if idea.frame:
        text += f", {idea.frame.phrase}"
    if _chance(rng, 0.4):
        finishes = " and ".join(idea.finishes)
        text += ", " + _pick(rng, (finishes, ", ".join(idea.finishes), f"with {finishes}"))
    return _capital(text) if _chance(rng, 0.35) else text


def _opening(rng: Random, idea: _Idea, light: bool) -> str:
    """The sentence that says what there is to see."""
    scene, name = _scene_words(idea, light), _a(idea.name)
    frame = f", {idea.frame.phrase}" if idea.frame else ""
    ways = [f"{name} of {scene}{frame}", f"{name} showing {scene}{frame}", f"{scene}, {idea.name}"]
    if not light:
        return _pick(rng, ways[:2])
    ways += [f"{_pick(rng, ('create', 'make', 'I want', 'please make'))} {name} of {scene}{frame}"]
    if idea.action and idea.is_doing:
        be = " are " if idea.subject.startswith(_NUMBERS) else " is "
        doing = (
            _a(idea.subject)
            + be
            + _join(idea.action, idea.place, idea.light.phrase if idea.light else None)
        )
        ways += [doing] * 4
    return _pick(rng, ways)


def _sentence(rng: Random, idea: _Idea) -> str:
    """One sentence, or two."""
    return " ".join(_capital(part) + "." for part in (_opening(rng, idea, True), *idea.details[:1]))


def _description(rng: Random, idea: _Idea) -> str:
    """Several sentences on what there is, how it is lit and how it is made."""
    parts = [_opening(rng, idea, False), *idea.details]
    if idea.light:
        parts.append(idea.light.sentence)
    parts.append(f"the {_pick(rng, ('picture', 'image'))} has {' and '.join(idea.finishes)}")
    return " ".join(_capital(part) + "." for part in parts)


def _abstract(rng: Random) -> str:
    """Shapes, patterns and feelings, which have neither place nor light."""
    colors, motifs = " and ".join(_two(rng, words.COLORS)), " and ".join(_two(rng, words.MOTIFS))
    shapes = _join(_pick(rng, words.SHAPES), _pick(rng, words.CHANGES))
    name, finish = _pick(rng, words.ABSTRACT_MEDIA), _pick(rng, words.ABSTRACT_FINISHES)
    image, feeling = _pick(rng, words.IMAGES), _pick(rng, words.FEELINGS)
    return _pick(
        rng,
        (
            f"{shapes}, {colors}, {name}, {finish}",
            f"{name} of {shapes} in {colors}",
            f"{_capital(_a(name))} of {shapes}. The colors are {colors}, with {finish}.",
            f"seamless pattern of {motifs} in {colors}, {finish}",
            f"{_a(name)} about {feeling}, in {colors}",
            f"surreal painting of {image}, {colors}, {finish}",
            f"{_capital(image)}, painted in {colors}.",
        ),
    )
