"""`pjrlhf data show`: what a source of records holds, and three records as the model reads them."""

import argparse
import ast
import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import rich.console
import rich.text
from ml_collections import ConfigDict

from pjrlhf import config as configs
from pjrlhf.config import RunSettings
from pjrlhf.data import synthetic
from pjrlhf.data.overview import QUANTILES, Overview, Shared, overview, quantiles, sample, shared, written
from pjrlhf.data.packing import Ids
from pjrlhf.data.records import BadRecords, RecordError
from pjrlhf.data.schema import Example, in_conversation, validate
from pjrlhf.data.sources import FORMATS, READERS, check_source, open_source
from pjrlhf.data.token_table import ANSWERS, EncodedRow, Lengths, encode_example
from pjrlhf.data.tokenization import Tokenizer, load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.evaluation.formats import print_table, terminal_console
from pjrlhf.feedback.pairs import PairSettings, split
from pjrlhf.models.hub import tokenizer_folder
from pjrlhf.settings import shown
from pjrlhf.terminal import Arguments, line, visible
from pjrlhf.training.progress import watched

_MANY = 10**9  # tokens: nothing is cut
_SHADES = (("grey23", "grey30"), ("dark_green", "green4"))  # backgrounds of tokens in turn: read, trained on
HELP = "what a source of records holds, and three records as the model reads them"


def parser_of() -> argparse.ArgumentParser:
    """The flags."""
    parser = Arguments(prog="pjrlhf data", description="Sources of records.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    show = verbs.add_parser("show", help=HELP, description=HELP)
    show.add_argument(
        "spec",
        metavar="SPEC",
        help=f"a data file, a config, or a kind of source, such as {', '.join(list(READERS)[:6])}",
    )
    show.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="of the source, such as path=FOLDER split=test columns.chosen=better; after a config first its section, "
        "such as preference.data",
    )
    show.add_argument(
        "--against",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="also the same source with other settings, such as split=test: what stands in both",
    )
    show.add_argument("--tokenizer", metavar="FOLDER", help="of a model, or its name on the hub; that of a config")
    show.add_argument("--examples", type=int, default=3, metavar="N", help="records that are shown; default 3")
    show.add_argument("--tokens", type=int, default=40, metavar="N", help="of each part of one; default 40, 0 for all")
    show.add_argument(
        "--sample", type=int, default=2000, metavar="N", help="records that are tokenized for lengths; 0 for all"
    )
    show.add_argument("--seed", type=int, default=0, help="of the records that are drawn")
    return parser


@dataclasses.dataclass(frozen=True)
class Wish:
    """What to show.

    Attributes:
      spec: of the source.
      key: its dotted key, for messages.
      kind: of its records; "" to take what the first one is.
      settings: of the config that names it; None without one.
    """

    spec: Mapping[str, Any]
    key: str = "data"
    kind: str = ""
    settings: RunSettings | None = None


# Section -> kind of its records.
KINDS = {"data.prompts": "prompt", "data.heldout_prompts": "prompt", "sft.data": "completion"}


def names_config(spec: str, settings: Sequence[str], shipped: Collection[str]) -> bool:
    """Whether a spec is a config: one of `shipped`, or a file, and no reader in a file of one's own, whose settings
    would follow.
    """
    is_file = re.search(r"\.py(:\w*)?$", spec) is not None and not (settings and "=" in settings[0])
    return is_file or spec.partition(":")[0] in shipped


def wish_of(given: argparse.Namespace, config: ConfigDict | None) -> Wish:
    """What the flags ask for.

    Args:
      config: the config that `spec` names, if it names one.

    Raises:
      UserError: a setting without a value, or a section that is no source.
    """
    if config is None:
        source, values = _source_of(given.spec), _values(given.settings)
        if "path" in source and "path" in values:
            raise UserError(f"path={values['path']}: {given.spec} is the file already; name one of them")
        return Wish({**source, **values})
    section, *others = given.settings or [""]
    known = dict(_sources(config))
    if section not in known:
        ways = f"choose one of {', '.join(known)}" if known else "this config has none"
        raise UserError(f"{section or 'SECTION'}: is no source of records in {given.spec}; {ways}")
    spec = {**known[section], **_values(others)}
    return Wish(spec, section, KINDS.get(section, "preference"), configs.read({**config}))


def _source_of(spec: str) -> dict[str, str]:
    """A kind of source, or the kind that reads a file.

    Raises:
      UserError: a file or folder whose name does not tell the format.
    """
    suffix = pathlib.PurePath(spec.removesuffix(".gz")).suffix.removeprefix(".")
    if suffix not in FORMATS:
        if spec not in READERS and os.path.exists(spec):
            known = ", ".join(f".{suffix}" for suffix in FORMATS)
            raise UserError(
                f"{spec}: the name tells no format; end a file in one of {known}, or name a kind and path={spec}"
            )
        return {"kind": spec}
    return {"kind": "jsonl" if suffix == "jsonl" else "datasets", "path": spec}


def _sources(config: ConfigDict) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted key, specification) of the sources of records in a config."""
    for name, section in config.to_dict().items():
        for key in ("data", "heldout_data", "prompts", "heldout_prompts") if isinstance(section, dict) else ():
            if isinstance(section.get(key), dict) and "kind" in section[key]:
                yield f"{name}.{key}", section[key]


def _values(pairs: Sequence[str]) -> dict[str, Any]:
    """Settings from KEY=VALUE; a value that is a Python literal is one, all else is text. A.B=C is {A: {B: C}}."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"{pair}: is not KEY=VALUE; write such as split=test")
        *sections, name = name.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{pair}: {section} has the value {shown(place)}; give either it or {section}.NAME")
        if name in place:
            raise UserError(f"{pair}: {name} has the value {shown(place[name])} already; give one value")
        try:
            place[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            place[name] = value
    return found


def show(given: argparse.Namespace, config: ConfigDict | None = None) -> None:
    """Prints what the flags ask for.

    Raises:
      UserError: the source cannot be read, none of its records can be used, or the tokenizer cannot be loaded.
    """
    wish = wish_of(given, config)
    with _own_words(wish):
        _show(given, wish)


@contextlib.contextmanager
def _own_words(wish: Wish) -> Iterator[None]:
    """Settings of the source are KEY=VALUE here, and no flags of a run."""
    try:
        yield
    except UserError as error:
        flag = rf"--config\.{re.escape(wish.key)}\."
        text = re.sub(rf"set {flag}path to one", "name one", str(error))
        raise UserError(re.sub(rf"{flag}(?=\w)", "", text)) from error


def _show(given: argparse.Namespace, wish: Wish) -> None:
    console = terminal_console()
    others = {" ".join(pairs): {**wish.spec, **_values(pairs)} for pairs in given.against}
    with _tokenizer(given.tokenizer, wish.settings) as tokenizer:
        examples, bad, dropped = _read(wish, wish.spec, tokenizer)
        print_overview(console, str(wish.spec["kind"]), overview(examples, bad, dropped))
        drawn = sample(len(examples), given.sample, given.seed)
        print_lengths(console, [examples[i] for i in drawn], len(examples), tokenizer, wish.settings)
        for name, spec in others.items():
            second, _, _ = _read(wish, spec, tokenizer)
            print_shared(console, f"also in {name} ({len(second):,} records)", shared(examples, second))
        try:
            for first, second, both in _own_split(wish, examples):
                print_shared(console, f"of the run: in {first} and in {second}", both)
        except UserError as error:  # the rest can be shown all the same
            console.print(rich.text.Text(line(f"the run cannot split these records: {error}")), soft_wrap=True)
        for i in sample(len(examples), given.examples, given.seed) if given.examples else ():
            print_example(console, examples[i], tokenizer, given.tokens)


def _read(
    wish: Wish, spec: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[list[Example], BadRecords, dict[str, int]]:
    """(records as a run asks them, those that cannot be used, what the reader left out)."""
    check_source(spec, wish.key)
    source = open_source(spec, wish.key)
    data = wish.settings.data if wish.settings else None
    columns = {**(data.columns if data else {}), **(spec.get("columns") or {})}
    kind = wish.kind or _kind_of(source, columns)
    with watched(f"reading {source.name}", source) as records:
        examples, bad = validate(records, kind, columns=columns, max_bad_fraction=1.0)
    chat = data.chat if data and data.chat is not None else tokenizer is not None and tokenizer.has_chat_template
    if chat:
        examples = [in_conversation(example) for example in examples]
    return examples, bad, source.dropped


def _kind_of(source: Sequence[Any], columns: Mapping[str, str]) -> str:
    """The kind of the first record that can be read: a preference, a completion or a prompt."""
    for i in range(len(source)):
        with contextlib.suppress(RecordError):
            names = {ours for ours in ("chosen", "completion", "text") if columns.get(ours, ours) in source[i]}
            return "preference" if "chosen" in names else "completion" if names else "prompt"
    return "preference"


@contextlib.contextmanager
def _tokenizer(path: str | None, settings: RunSettings | None) -> Iterator[Tokenizer | None]:
    """The tokenizer of a flag, of the model of a config, or of its synthetic environment; None without any."""
    model = settings.model if settings else None
    if path or (model and model.path):
        eos_token = (model.eos_token or None) if model and not path else None
        yield load_tokenizer(tokenizer_folder(path or (model.path if model else "")), eos_token=eos_token)
    elif model and isinstance(model.tokenizer, str):
        with tempfile.TemporaryDirectory() as folder:
            synthetic.write_tokenizer(pathlib.Path(folder), synthetic.ENVIRONMENTS[model.tokenizer])
            yield load_tokenizer(folder)
    else:
        yield None


def _own_split(wish: Wish, examples: Sequence[Example]) -> Iterator[tuple[str, str, Shared]]:
    """(part, other part, what stands in both) of the split that a run of user models makes of its source."""
    if wish.settings is None or wish.key != "preference.data" or not isinstance(wish.settings.preference, PairSettings):
        return
    if wish.settings.preference.heldout_data:  # then nothing of this source is held out
        return
    parts = split(examples, wish.settings.preference, wish.settings.seed)
    for (first, ours), (second, theirs) in itertools.combinations(parts.items(), 2):
        yield first, second, shared(ours, theirs)


# ---- tables

_QUANTILES = [f"{100 * q:g} %" for q in QUANTILES]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _of(values: Sequence[float] | None, digits: int = 0) -> list[str]:
    return [f"{value:,.{digits}f}" for value in values or ()]


def print_overview(console: rich.console.Console, name: str, found: Overview) -> None:
    """Prints the counts of a source."""
    rows = [["records", f"{found.records:,}", ""]]
    rows += [["cannot be used", f"{count:,}", reason] for reason, count in found.bad.items()]
    rows += [["left out by the reader", f"{count:,}", reason] for reason, count in found.dropped.items()]
    turns = f"{found.dialogues:,} records have a prompt of several turns" if found.dialogues else ""
    rows += [["prompts", f"{found.prompts:,}", turns]]
    rows += [["repeated records", f"{found.repeated:,}", _percent(found.repeated, found.records)]]
    if found.longer is not None:
        rows += [
            ["contradicted", f"{found.contradicted:,}", "pairs that one person compared both ways for one objective"],
            ["disputed", f"{found.disputed:,}", "pairs compared both ways by several people or for several objectives"],
            ["ties", f"{found.ties:,}", _percent(found.ties, found.records)],
            ["the longer one chosen", f"{100 * found.longer:.1f} %", "of the pairs, by characters"],
        ]
    nobody = f"{found.anonymous:,} records of nobody in particular" if found.anonymous else ""
    rows += [["people", f"{found.users:,}", nobody]]
    if found.described:
        rows += [["with user_text", f"{found.described:,}", "records"]]
    if found.groups:
        rows += [["groups", f"{found.groups:,}", "preference.split=group keeps each on one side"]]
    rows += [["objective", f"{count:,}", name] for name, count in found.objectives.items()]
    rows += [
        ["reward", f"{count:,}", f"{name}: mean {mean:.3g}, standard deviation {spread:.3g}"]
        for name, (count, mean, spread) in found.rewards.items()
    ]
    print_table(console, name, ["what", "count", ""], rows)
    spread = [["records of a person", *_of(found.per_user)]] if found.per_user else []
    spread += [["margin", *_of(found.margins, 2)]] if found.margins else []
    print_table(console, "quantiles", ["", *_QUANTILES], spread)


def print_lengths(
    console: rich.console.Console,
    examples: Sequence[Example],
    total: int,
    tokenizer: Tokenizer | None,
    settings: RunSettings | None,
) -> None:
    """Prints quantiles of lengths of drawn records, in tokens, or in words without a tokenizer; and how many tokens
    the tokenizer does not know, with a warning where they are many.
    """
    lengths: dict[str, list[int]] = {}
    unknown: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    for example in examples:
        try:
            parts = _parts(example, tokenizer)
        except RecordError as error:
            refused[error.reason] += 1
            continue
        for name, part in parts.items():
            lengths.setdefault(name, []).append(len(part))
            unknown[name] += tokenizer.unknown(cast(Sequence[int], part)) if tokenizer else 0
    drawn = "" if len(examples) == total else f" of {len(examples):,} drawn records"
    unit = "tokens" if tokenizer else "words (--tokenizer counts tokens)"
    limits = {}
    if settings and tokenizer:
        answers = dict.fromkeys(ANSWERS["preference"] + ANSWERS["completion"], "max_completion")
        limits = {name: (key, getattr(settings.data, key)) for name, key in {"prompt": "max_prompt", **answers}.items()}
    rows = []
    for name, values in lengths.items():
        key, limit = limits.get(name, ("", _MANY))
        over = sum(length > limit for length in values)
        long = f"{_percent(over, len(values))} above data.{key}={limit}" if over else ""
        strange = f"{unknown[name]:,} ({_percent(unknown[name], sum(values))})" if unknown[name] else ""
        rows.append([name, *_of(quantiles(values)), long, strange])
    print_table(
        console, f"lengths in {unit}{drawn}", ["", *_QUANTILES, "too long", "unknown tokens (of the row)"], rows
    )
    if tokenizer and (text := tokenizer.misfit(unknown.total(), sum(map(sum, lengths.values())))):
        console.print(rich.text.Text(visible(f"warning: {text}")), soft_wrap=True)
    print_table(
        console, "cannot be tokenized", ["reason", "records"], [[name, f"{n:,}"] for name, n in refused.items()]
    )


def _parts(example: Example, tokenizer: Tokenizer | None) -> dict[str, Sequence[int] | Sequence[str]]:
    """The token ids of the parts of a record, or the words without a tokenizer."""
    told = {"user_text": example.user_text} if example.user_text else {}
    if tokenizer is None:
        names = ("prompt", *ANSWERS["preference"], *ANSWERS["completion"])
        parts = {name: value for name in names if (value := getattr(example, name)) is not None}
        return {name: written(value).split() for name, value in {**parts, **told}.items()}
    return {**_encoded(example, tokenizer).ids, **{k: tokenizer.encode_prompt(value) for k, value in told.items()}}


def _encoded(example: Example, tokenizer: Tokenizer) -> EncodedRow:
    kind = "preference" if example.chosen is not None else "completion" if example.completion is not None else "prompt"
    return encode_example(example, kind, tokenizer, Lengths(prompt=_MANY, completion=_MANY))


def print_shared(console: rich.console.Console, title: str, found: Shared) -> None:
    """Prints what stands in two sources."""
    rows = [
        [name, f"{both:,}", f"of {whole:,} ({_percent(both, whole)})"]
        for name, (both, whole) in dataclasses.asdict(found).items()
        if whole
    ]
    print_table(console, title, ["in both", "count", ""], rows)


# ---- records as the model reads them


def print_example(console: rich.console.Console, example: Example, tokenizer: Tokenizer | None, most: int) -> None:
    """Prints a record: its tokens, in turn lighter and darker, green where they are trained on. Every stretch of one
    mask says its mask in words, too, for terminals without colour.

    Args:
      most: tokens of a part that are shown, half at each end; 0 for all.
    """
    facts = {name: getattr(example, name) for name in ("user_id", "objective", "margin", "preference", "rewards")}
    told = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    console.print(rich.text.Text(visible(f"{example.where or 'record'}{': ' if told else ''}{told}"), "bold"))
    if example.user_text:
        console.print(rich.text.Text(visible(f"  user_text: {shown(example.user_text)}")), soft_wrap=True)
    if tokenizer is None:
        for name in ("prompt", *ANSWERS["preference"], *ANSWERS["completion"]):
            if (value := getattr(example, name)) is not None:
                console.print(rich.text.Text(visible(f"  {name}: {written(value)}", keep="\n\t")), soft_wrap=True)
        return
    try:
        row = _encoded(example, tokenizer)
    except RecordError as error:
        console.print(visible(f"  cannot be tokenized: {error}"))
        return
    for part, ids in row.ids.items():
        mask = row.masks.get(part)
        scored = np.full(len(ids), part != "prompt") if mask is None else mask
        edges = [0, *(int(i) + 1 for i in np.flatnonzero(np.diff(scored))), len(ids)]
        for start, stop in itertools.pairwise(edges):
            trained = bool(scored[start])
            head = f"  {part}, {stop - start:,} tokens, mask {int(trained)}: "
            console.print(
                rich.text.Text(head).append_text(_tokens(tokenizer, ids[start:stop], trained, most)), soft_wrap=True
            )


def _tokens(tokenizer: Tokenizer, ids: Ids, trained: bool, most: int) -> rich.text.Text:
    """Tokens one after the other, with a bar between them, each on the shade of its turn."""
    half = most // 2 or 1
    hidden = len(ids) - 2 * half if most and len(ids) > most else 0
    found = rich.text.Text()
    for i, token in enumerate(ids):
        if hidden and i == half:
            found.append(f" ... {hidden:,} more ... ")
        if hidden and half <= i < half + hidden:
            continue
        found.append("|" if i and not (hidden and i == half + hidden) else "", "dim")
        piece = visible(tokenizer.decode([int(token)], False).replace("\n", "\\n"))
        found.append(piece, f"on {_SHADES[trained][i % 2]}")
    return found
