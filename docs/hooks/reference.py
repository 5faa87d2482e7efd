"""Settings and public names as Markdown: place in the site -> page."""

import ast
import collections
import dataclasses
import html
import inspect
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping

import pjrlhf
from pjrlhf.algorithms.answering import AnswerSettings
from pjrlhf.algorithms.pdpo_settings import EntrySettings
from pjrlhf.config import RunSettings
from pjrlhf.data.readers import MODULES, reader_of
from pjrlhf.data.readers.reader import ReaderSettings
from pjrlhf.feedback.samplers import ChatSamplerSettings, ModelSamplerSettings
from pjrlhf.judges.language_model import JudgeSettings
from pjrlhf.models.user_models.kinds import kinds
from pjrlhf.objectives.scalarization import RULES
from pjrlhf.runtime.classifiers import ClassifierSettings
from pjrlhf.runtime.judges import ModelJudgeSettings
from pjrlhf.runtime.run import SharedSettings
from pjrlhf.serving.settings import EngineSettings, ServerSettings
from pjrlhf.settings import Settings, fields_of, nested_class, rule_of

ROOT = pathlib.Path(__file__).parents[2]
PAPER = re.compile(r"arXiv[\s:]+(\d{4}\.\d{5})")
NAMED = re.compile(r"([A-Z][\w'&-]*(?: [\w'&-]+){0,2}),? \(?arXiv (\d{4}\.\d{5})")  # "MOC (arXiv 2604.04497"
STUB = pathlib.Path(pjrlhf.__file__).with_suffix(".pyi")
KINDS = {
    "Entries of `preference.models`": {"name -> entry": EntrySettings},
    "Entries of `methods`, beside the settings of their trainer": {"how an entry answers": AnswerSettings},
    "Combination rules, `policy.combine.kind`": dict(RULES.items()),
    "Entries of `user_models.models`, by `kind`": kinds(),
    "Judges and samplers, by `kind`": {
        "every language model that judges": JudgeSettings,
        "judge `model`": ModelJudgeSettings,
        "sampler `chat`": ChatSamplerSettings,
        "sampler `model`": ModelSamplerSettings,
    },
    "Reward sources": {"`classifier`": ClassifierSettings},
}


def pages() -> dict[str, str]:
    return {
        "reference/settings/run.md": run_page(),
        "reference/settings/kinds.md": kinds_page(),
        "reference/settings/readers.md": readers_page(),
        "reference/settings/server.md": server_page(),
        "reference/api.md": api_page(),
        "reference/papers.md": papers_page(),
    }


# ---- settings


def first_line(thing: object) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def cell(text: str) -> str:
    """Text that stands in a cell of a table, in which long words, such as large numbers, may be broken."""
    words = [re.sub(r"(?<=\w[.,:])(?=\w)", "<wbr>", word) if len(word) > 20 else word for word in text.split()]
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(words))


def kind_of(hint: object) -> str:
    """A type annotation, for readers."""
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    text = re.sub(r"\b(?:collections\.abc|typing)\.", "", text)
    return text.replace(", ...", ", …").replace("NoneType", "None")


def default_of(field: dataclasses.Field) -> str:
    factory = field.default_factory
    value = factory() if factory is not dataclasses.MISSING else field.default
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def value(text: str) -> str:
    """Code that may be broken anywhere, without Markdown in it."""
    plain = html.escape(text, quote=False)
    return '<code class="value">' + re.sub(r"[*_|]", lambda c: f"&#{ord(c[0])};", plain) + "</code>"


def breakable(name: str) -> str:
    """A dotted name that may be broken after a dot."""
    return f"<code>{name.replace('.', '.<wbr>')}</code>"


def table(cls: type[Settings], prefix: str = "", without: tuple[type, ...] = ()) -> Iterator[str]:
    """Rows of the settings of a class.

    Args:
      prefix: of the names.
      without: classes whose settings stand elsewhere.
    """
    elsewhere = {name for other in without for name in fields_of(other)}
    found = {name: one for name, one in fields_of(cls).items() if name not in elsewhere}
    if not found:
        yield "No settings of its own.\n"
        return
    yield "| setting | what it is | default | values |"
    yield "|---|---|---|---|"
    for name, (hint, field) in found.items():
        rule = rule_of(field)
        values = ", ".join(value(repr(choice)) for choice in rule.allowed) or rule.describe()
        if rule.extensible:
            values = f"{values} or {value('package.module:name')}"
        values = "; ".join(filter(None, [kind_of(hint), values]))
        yield f"| {breakable(prefix + name)} | {cell(rule.help)} | {value(default_of(field))} | {cell(values)} |"
    yield ""


def run_page() -> str:
    lines = [
        "# Settings of a run",
        "",
        "Each setting is a flag `--config.NAME=VALUE` and a key of a config file. A section is there where the config "
        "or its `stages` name it. `--help --config=FILE` lists the settings of a file with their values there. These "
        "tables are made from the classes that check the values.",
        "",
        "## All stages",
        "",
        first_line(SharedSettings),
        "",
    ]
    nested = {field.name for field in dataclasses.fields(SharedSettings)}
    lines += table(SharedSettings)
    for name, hint in typing.get_type_hints(RunSettings).items():
        section = nested_class(hint)
        if section and name not in nested:
            lines += [f"## {name}", "", first_line(section), "", *table(section, f"{name}.")]
    return "\n".join(lines)


def kinds_page() -> str:
    lines = [
        "# Settings of entries and kinds",
        "",
        "Names that a config chooses, such as entries of `preference.models`, have the settings of their kind.",
        "",
    ]
    for title, classes in KINDS.items():
        lines += [f"## {title}", ""]
        for name, cls in classes.items():
            title = name if " " in name or "`" in name else f"`{name}`"
            lines += [f"### {title}", "", first_line(cls), "", *table(cls)]
    return "\n".join(lines)


def readers_page() -> str:
    lines = [
        "# Settings of readers",
        "",
        "[Data sets](../../data.md) says what each set is, where its files are, and which traps it holds. Every reader "
        "has",
        "",
        *table(ReaderSettings),
    ]
    for kind in MODULES:
        reader = reader_of(kind)
        lines += [f"## {kind}", "", f"{reader.title}. Licence: {reader.licence}.", ""]
        lines += ["| column of records | from |", "|---|---|"]
        lines += [f"| `{column}` | {cell(source)} |" for column, source in reader.mapping.items()]
        lines += ["", *table(reader.settings, without=(ReaderSettings,))]
    return "\n".join(lines)


def server_page() -> str:
    lines = [
        "# Settings of the server",
        "",
        "Flags of `pjrlhf serve`: `max_rows` is `--max-rows`. [Serving](../../serving.md) says how it is used.",
        "",
    ]
    for title, cls in (("Server", ServerSettings), ("Engine", EngineSettings)):
        lines += [f"## {title}", "", first_line(cls), "", *table(cls)]
    return "\n".join(lines)


# ---- public names


def public_names() -> Mapping[str, list[tuple[str, str]]]:
    """Subject of the stub -> (module, name)."""
    text, found, subject = STUB.read_text(encoding="utf-8"), {}, ""
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        above = lines[node.lineno - 2]
        subject = above.removeprefix("# ") if above.startswith("# ") else subject
        found.setdefault(subject, []).extend((f"pjrlhf.{node.module}", alias.name) for alias in node.names)
    return found


def api_page() -> str:
    lines = [
        "# Python API",
        "",
        "`import pjrlhf` gives these names; each is imported when it is first used. Letters of shapes, such as `B` and "
        "`K`, are explained in `pjrlhf/types.py`. Everything else may change between versions.",
        "",
    ]
    for subject, names in public_names().items():
        lines += [f"## {subject}", ""]
        for module, name in names:
            lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)


# ---- papers


def papers_page() -> str:
    places, names = collections.defaultdict(list), collections.defaultdict(collections.Counter)
    for folder in ("pjrlhf", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = " ".join(path.read_text(encoding="utf-8").split())
            for paper in dict.fromkeys(PAPER.findall(text)):
                places[paper].append(path.relative_to(ROOT).as_posix())
            for name, paper in NAMED.findall(text):
                names[paper][name] += 1
    lines = [
        "# Papers in the code",
        "",
        "Every paper that a docstring or comment of the package or of a config cites, and where. "
        "[Methods](../methods/README.md) has a page per method, [experiments of papers](../papers.md) their settings.",
        "",
        "| paper | there called | files |",
        "|---|---|---|",
    ]
    for paper, files in sorted(places.items()):
        called = min(names[paper], key=lambda name: (-names[paper][name], len(name)), default="")
        listed = ", ".join(f"`{file}`" for file in files)
        lines.append(f"| [{paper}](https://arxiv.org/abs/{paper}) | {called} | {listed} |")
    return "\n".join(lines)
