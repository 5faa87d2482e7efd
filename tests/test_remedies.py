"""What messages tell a user to do: every flag, setting, command and extra that they name exists."""

import ast
import configparser
import functools
import pathlib
import re

import pytest

from pjrlhf.cli import VERBS
from pjrlhf.config import RunSettings
from pjrlhf.settings import fields_of, is_open

ROOT = pathlib.Path(__file__).parents[1]
ERRORS = re.compile(r"(\w*Error|Refused|Unanswered|NoReply|Unknown\w+)$")
HOLE = "\N{OBJECT REPLACEMENT CHARACTER}"  # a value in a message
# Flags of other programs: llama.cpp reads GGUF files.
OTHERS = {"--help", "--lora", "--lora-scaled", "--outfile"}


def text_of(node):
    """The text of a string, with a hole for every value; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or HOLE for part in node.values)
    return None


def texts_in(node):
    """The texts of an expression, each whole."""
    if (text := text_of(node)) is not None:
        yield text
        node = ast.Tuple([part.value for part in getattr(node, "values", ()) if isinstance(part, ast.FormattedValue)])
    for child in ast.iter_child_nodes(node):
        yield from texts_in(child)


def found_messages():
    """(file, text) of everything that the package raises or logs for users."""
    for path in sorted((ROOT / "pjrlhf").rglob("*.py")):
        file = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if ERRORS.search(name) or name in ("warning", "install", "print_error", "error"):
                    yield from ((file, text) for part in (*node.args, *node.keywords) for text in texts_in(part))
            elif isinstance(node, ast.Assign | ast.Return) and node.value is not None:  # parts of messages
                found = (
                    text for text in texts_in(node.value) if re.search(r"--\w|pip install|\b(set|raise|lower) ", text)
                )
                yield from ((file, text) for text in found)


@functools.cache
def messages():
    """`found_messages`, once each; not while tests are collected, which every process of a test session does."""
    return sorted(set(found_messages()))


def named(pattern):
    """(file, what the pattern finds) in all messages, once each."""
    return sorted({(file, found) for file, text in messages() for found in re.findall(pattern, text)})


def is_setting(key):
    known = fields_of(RunSettings)
    sections = {".".join(name.split(".")[:i]) for name in known for i in range(1, name.count(".") + 1)}
    return key in known or key in sections or is_open(RunSettings, key)


@functools.cache
def flags():
    """Every flag of the program and of the command."""
    from pjrlhf.serving.settings import EngineSettings, ServerSettings

    found = {f"--{name}" for cls in (EngineSettings, ServerSettings) for name in fields_of(cls)}
    found = {name.replace("_", "-") for name in found}
    for path in (ROOT / "pjrlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                found |= {one.value for one in node.args if isinstance(one, ast.Constant)}
    from absl import flags as absl_flags

    from pjrlhf.export.merge import MergeSettings
    from pjrlhf.main import define

    values = absl_flags.FlagValues()
    define(values)
    merged = {f"--{name}" for name in fields_of(MergeSettings)}
    return found | merged | {f"--{name}" for name in values} | OTHERS


def test_every_setting_of_a_flag_exists():
    found = named(rf"--config\.((?:\w+\.)*\w+)(?![\w.]*{HOLE})")
    assert found and not [(file, key) for file, key in found if not is_setting(key)]


def test_every_flag_exists():
    found = named(rf"(?<![\w{HOLE}-])--(?!config\b)\w[\w-]*(?![\w-]*{HOLE})")
    assert found and not [(file, flag) for file, flag in found if flag not in flags()]


KEY = rf"(?<![\w./{HOLE}-])((?:{'|'.join(RunSettings.__dataclass_fields__)})(?:\.[a-z_]+)+)(?![\w.]*{HOLE})"


def test_every_dotted_key_is_a_setting():
    found = named(KEY)
    assert found and not [(file, key) for file, key in found if not is_setting(key)]


def test_every_verb_exists():
    found = named(r"pjrlhf ([a-z]+) --?\w") + named(r"`pjrlhf ([a-z]+)")
    assert found and not [(file, verb) for file, verb in found if verb not in VERBS]


def test_every_extra_exists():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = set(parser["options.extras_require"])
    found = named(r"\.\[(\w+)\]")
    for path in (ROOT / "pjrlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("install", "_needs", "needs"):
                found += [(str(path), one.value) for one in node.args if isinstance(one, ast.Constant)]
    assert found and {extra for _, extra in found} <= extras, set(found)


# ---- the advice of the most common mistakes, followed

SOUPS, PDPO, FAMILY, RECORDS, MERGE = (
    f"--config=configs/{name}" for name in ("soups.py", "pdpo.py", "family.py", "pdpo.py:records", "merge.py")
)
MISTAKES = [
    (SOUPS, "policy.stpes=3"),
    (SOUPS, "polcy.steps=3"),
    (SOUPS, "sft.batchsize=8"),
    (SOUPS, "sft.optimizer.lr=0.1"),
    (SOUPS, "data.max_bad_share=0.5"),
    (SOUPS, "keep=3"),
    (SOUPS, "policy.ppo.value_weight=0.5"),
    (SOUPS, "data.maxprompt=16"),
    (SOUPS, "model.hiden_size=32"),
    (SOUPS, "evaluate.told=True"),
    (SOUPS, "policy.steps=0"),
    (SOUPS, "policy.steps=-1"),
    (SOUPS, "sft.batch_size=0"),
    (SOUPS, "temperature=0.0"),
    (SOUPS, "temperature=101.0"),
    (SOUPS, "data.heldout_fraction=1.5"),
    (SOUPS, "data.max_prompt=0"),
    (SOUPS, "data.max_bad_fraction=2.0"),
    (SOUPS, "policy.ppo.clip=-1.0"),
    (SOUPS, "policy.kl.coef=-1.0"),
    (SOUPS, "sft.optimizer.learning_rate=-1.0"),
    (SOUPS, "sft.optimizer.b1=1.0"),
    (SOUPS, "sft.optimizer.warmup_steps=100000"),
    (SOUPS, "reward.optimizer.warmup_steps=100000"),
    (SOUPS, "policy.optimizer.warmup_steps=100000"),
    (SOUPS, "sft.optimizer.schedule=cosin"),
    (SOUPS, "sft.optimizer.name=adam"),
    (SOUPS, "policy.experience.estimator=gae2"),
    (SOUPS, "policy.combine.kind=summ"),
    (SOUPS, "model.attention=flash"),
    (SOUPS, "model.remat=some"),
    (SOUPS, "model.dtype=float16x"),
    (SOUPS, "model.param_dtype=int8"),
    (SOUPS, "model.tokenizer=world"),
    (SOUPS, "preferences=world"),
    (SOUPS, "judge=world"),
    (SOUPS, "data.long_prompt=cut"),
    (SOUPS, "data.packing=all"),
    (SOUPS, "prompt_preference=yes"),
    (SOUPS, "loggers=('tensorbord',)"),
    (SOUPS, "evaluate.resamples=0"),
    (SOUPS, "adapter.rank=-1"),
    (SOUPS, "log_every=-1"),
    (PDPO, "preference.alpha=1.5"),
    (PDPO, "preference.beta=0.0"),
    (PDPO, "preference.loss=sigmoyd"),
    (PDPO, "preference.head=rewards"),
    (PDPO, "preference.models.pooled.kind=unifrm"),
    (PDPO, "preference.models.pooled.tokns=3"),
    (PDPO, "preference.steps=8"),
    (PDPO, "preference.new_user_share=0.2"),
    (PDPO, "evaluate_users.resamples=0"),
    (PDPO, "preference.optimizer.warmup_steps=1000"),
    (FAMILY, "evaluate_front.target=best"),
    (FAMILY, "evaluate_front.samples_per_prompt=0"),
    (FAMILY, "methods.morl.train=polcy"),
    (FAMILY, "methods.morl.optimizer.lerning_rate=0.1"),
    (MERGE, "merge.space=deltas"),
    (MERGE, "merge.method=tie"),
]


def advised(line, flag):
    """The flags in place of one that a message refuses: what its last part says, and where that names several ways the
    first.
    """
    key, _, value = flag.partition("=")
    *_, way = line.rpartition("; ")
    if found := re.findall(r"--config\.([\w.]+=[^\s,;]+)", way):
        return found
    if found := re.search(r"is called --config\.([\w.]+) now; rename it", line):
        return [f"{found[1]}={value}"]
    if found := re.search(r"is called '(\w+)' now; write that", line):
        return [f"{key}={found[1]}"]
    if "no such setting" in line:
        wrong = re.search(r"([\w.]+): no such setting", line)[1].removeprefix("config.")
        right = re.search(r"did you mean (?:--config\.)?([\w.]+)\?|known keys: (?:.*\b)?(\w+)", line)
        right = right[1] or right[2]
        place = right if "." in right else ".".join([*wrong.split(".")[:-1], right])
        return [f"{place}{key.removeprefix(wrong)}={value}"]
    if found := re.search(r"did you mean '?([\w./-]+)'?\?", line):
        return [f"{key}={_like(value, found[1])}"]
    if found := re.search(r"choose (?:one of|from) ([\w./-]+)|the choices are ([\w./-]+)", line, re.IGNORECASE):
        return [f"{key}={_like(value, found[1] or found[2])}"]
    if found := re.search(r"(?:at least|at most) ([\d.,]*\d)", way):
        named = re.match(r"error: ([\w.]+): ", line)[1]
        return [f"{named}={found[1].replace(',', '')}", *([flag] if named != key else [])]
    if found := re.search(r"above ([\d.,]*\d)(?: and (?:at most|below) ([\d.,]*\d))?", way):
        low, high = float(found[1]), float((found[2] or "3").replace(",", ""))
        return [f"{key}={(low + min(high, low + 2)) / 2}"]
    return []


def _like(value, name):
    """A name in the form that the refused value has."""
    return f"('{name}',)" if value.startswith("(") else name


@pytest.mark.parametrize(("config", "flag"), MISTAKES, ids=[flag for _, flag in MISTAKES])
def test_following_the_advice_of_a_message_mends_the_mistake(ended, config, flag):
    """Another mistake may show then, whose advice is followed, too; the same message never comes twice."""
    flags, seen = [flag], []
    for _ in range(4):
        code, lines = ended(config, *(f"--config.{one}" for one in flags))
        if code == 0 or (seen and "; pip install" in lines[0]):  # of which another test tells
            assert seen, "no mistake"
            return
        assert code == 2 and len(lines) == 1 and lines[0] not in seen, (lines, seen)
        seen.append(lines[0])
        flags = [new for one in flags for new in (advised(lines[0], one) or [one])]
    raise AssertionError(seen)
