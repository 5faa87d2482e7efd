"""Model cards of exported folders: what a model is, what it was made from, how it did, and how to load it.

A card is made from the folder and from the run that it belongs to alone, so the same folder has the same card.
"""

import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import huggingface_hub
import rich.console

from pjrlhf import __version__
from pjrlhf.data.tokenizer_files import loading_class
from pjrlhf.errors import UserError
from pjrlhf.evaluation.report import print_tables
from pjrlhf.models.folders import read_json
from pjrlhf.models.hub import CARD, hub_name, model_folder, public_name
from pjrlhf.models.peft import CONFIG as ADAPTER_CONFIG
from pjrlhf.models.peft import MANIFEST
from pjrlhf.paths import content_hash
from pjrlhf.terminal import masked
from pjrlhf.types import Json

LICENCE = ("license", "license_name", "license_link")
# What stages count, of what they report in manifest.json.
_COUNTS = ("records", "pairs", "users", "samples", "rollouts_per_policy")
_ABOVE = 4  # folders between an export and its run


def write_card(folder: pathlib.Path, name: str) -> None:
    """Writes README.md of an exported folder; `name` is what the folder will be called."""
    (folder / CARD).write_text(card_of(folder, name), encoding="utf-8")


def card_of(folder: pathlib.Path, name: str) -> str:
    """The card of an exported folder: YAML for the hub, and Markdown.

    Args:
      name: of the model, on the hub or of its folder.
    """
    manifest = _object(folder / MANIFEST)
    parts = [one for one in manifest.get("ingredients") or () if isinstance(one, dict)]
    run = next(filter(None, map(_run_of, [*(pathlib.Path(str(one.get("folder"))) for one in parts), folder])), None)
    base = manifest.get("base") or _base_in(run, folder)
    adapter, kind = _object(folder / ADAPTER_CONFIG), manifest.get("format")
    if adapter and not base.get("folder"):
        base = {**base, "folder": adapter.get("base_model_name_or_path"), "commit": adapter.get("revision")}
    base_card = _card_of_base(base)
    licence = {key: value for key in LICENCE if (value := base_card.get(key))}
    named = [one["folder"] for one in (base, *parts) if one.get("commit")]
    ancestors = base_card.get("base_model") or []
    data = huggingface_hub.ModelCardData(
        base_model=_one_or_several(named or ([ancestors] if isinstance(ancestors, str) else list(ancestors))),
        datasets=sorted({one for _, one in _data(run) if one}) or None,
        library_name="gguf" if kind == "gguf" else "peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            "pjrlhf",
            "personalized-rlhf",
            *(["lora"] if adapter or kind == "gguf" else []),
            *(["merge"] if parts else []),
        ],
        **licence,
    )
    sections = [
        f"---\n{data.to_yaml(line_break=chr(10))}\n---",
        f"# {name}",
        _made(folder, manifest, parts, adapter, run),
        "## Base",
        "\n".join(_base_lines(base, licence)),
        *_training(run),
        *_figures(run),
        "## How to load it",
        _loading(folder, name, bool(adapter), manifest),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _one_or_several(names: Sequence[str]) -> Any:
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else names or None


# ---- what stands in files


def _object(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, or no readable one: a card says less then."""
    try:
        return read_json(file)
    except UserError:
        return {}


def _run_of(folder: pathlib.Path) -> pathlib.Path | None:
    """The run directory that a folder lies in."""
    above = list(folder.absolute().parents)[:_ABOVE]
    return next((one for one in above if "stages" in _object(one / "config.json")), None)


def _base_in(run: pathlib.Path | None, folder: pathlib.Path) -> dict[str, Json]:
    """The base of a full model that a run trained: {"folder", "commit" on the hub}."""
    if run is None:
        return {}
    fine_tuned = run / "sft" / "model"
    if fine_tuned.is_dir() and fine_tuned != folder.absolute():
        return {"folder": str(fine_tuned)}
    path = _object(run / "config.json").get("model", {}).get("path")
    entry = _object(run / "inputs.json").get("model.path") or {}
    if not path:
        return {}
    name = hub_name(path)
    return {"folder": name.repo if name else path, **{k: entry[k] for k in ("commit", "hash") if k in entry}}


def _card_of_base(base: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML of the card of a base, and the licence in its config.json; {} where there is neither."""
    path, commit = base.get("folder"), base.get("commit")
    if not path:
        return {}
    try:
        folder = model_folder(f"{path}@{commit}" if commit else path)
        file = folder / CARD
        found = huggingface_hub.ModelCard.load(file).data.to_dict() if file.is_file() else {}
    except (UserError, ValueError, OSError):
        return {}
    stated = _object(folder / "config.json").get("license")
    return found if found.get("license") or not isinstance(stated, str) else {**found, "license": stated}


def _data(run: pathlib.Path | None) -> Iterator[tuple[str, str | None]]:
    """(what a source of records is, its name on the hub) of all sources of a run."""
    config = _object(run / "config.json") if run else {}
    inputs = _object(run / "inputs.json") if run else {}
    for section in ("data", "sft", "reward", "preference"):
        values = config.get(section) or {}
        for key in ("prompts", "data"):
            spec = values.get(key) if isinstance(values, dict) else None
            setting = f"{section}.{key}"
            if isinstance(spec, dict) and isinstance(spec.get("kind"), str):
                path = str(spec.get("path") or spec.get("name") or spec["kind"])
                name = hub_name(path) if spec["kind"] == "datasets" else None
                where = path if name else pathlib.PurePath(path).name
                split = f", split {spec['split']}" if spec.get("split") else ""
                entry = inputs.get(f"{setting}.path") or {}
                print_ = f", fingerprint {entry['hash']}" if entry.get("hash") else ""
                yield f"`{setting}`: {spec['kind']} `{masked(where)}`{split}{print_}", name.repo if name else None
            elif isinstance(spec, str) and spec:
                yield f"`{setting}`: {spec}", None


# ---- sections


def _made(
    folder: pathlib.Path,
    manifest: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    adapter: Mapping[str, Any],
    run: pathlib.Path | None,
) -> str:
    """What the model is."""
    by = f"pjrlhf {__version__} (personalized RLHF in JAX)"
    if parts:
        options = {key: manifest[key] for key in ("density", "scale", "seed") if key in manifest}
        detail = "".join(f", {key} {value}" for key, value in options.items())
        rows = [f"| `{_short(x)}` | {x.get('kind')} | {x.get('weight'):g} | `{x.get('hash')}` |" for x in parts]
        what = "LoRA adapter" if adapter else "Model"
        return "\n".join(
            [
                f"{what} merged by {by}: method `{manifest.get('method')}`{detail}, space `{manifest.get('space')}`.",
                "",
                "| ingredient | kind | weight | fingerprint |",
                "|---|---|---|---|",
                *rows,
            ]
        )
    inside = folder.absolute().relative_to(run).parts if run else ()
    stage = f", in the stage `{inside[0]}`" if inside else ""
    if adapter:
        size = f"rank {adapter.get('r')} and alpha {adapter.get('lora_alpha'):g}"
        return f"LoRA adapter of {size}, trained by {by}{stage}."
    return f"Model trained by {by}{stage}."


def _short(place: Mapping[str, Any]) -> str:
    """A model in a public text: its name on the hub with its commit, or the name of its folder without the path."""
    if place.get("commit"):
        return f"{place['folder']}@{place['commit'][:12]}"
    return public_name(str(place.get("folder")))


def _base_lines(base: Mapping[str, Any], licence: Mapping[str, Any]) -> Iterator[str]:
    if not base.get("folder"):
        yield "Trained from random parameters." if not base else "None: a sum of full models."
    else:
        print_ = f", fingerprint `{base['hash']}`" if base.get("hash") else ""
        yield f"* Base: `{_short(base)}`{print_}"
    stated = licence.get("license_name") or licence.get("license")
    yield f"* Licence of the base: {f'{stated}, as it states' if stated else 'not stated'}"


def _training(run: pathlib.Path | None) -> list[str]:
    if run is None:
        return []
    config, stages = _object(run / "config.json"), _object(run / "manifest.json").get("stages", {})
    lines = [f"* Config: digest `{content_hash(run / 'config.json')}`, seed {config.get('seed')}"] if config else []
    lines.append(f"* Stages: {', '.join(map(str, config.get('stages') or stages))}")
    lines += [f"* Data: {text}" for text, _ in _data(run)]
    for stage, info in stages.items():
        if counts := _counts(info):
            lines.append(f"* Counts of `{stage}`: {', '.join(counts)}")
    return ["## Training", "\n".join(lines)]


def _counts(info: Any) -> list[str]:
    found = []
    for key in _COUNTS:
        value = info.get(key) if isinstance(info, dict) else None
        if isinstance(value, dict):
            found += [f"{key} {name} {n}" for name, n in value.items() if isinstance(n, int)]
        elif isinstance(value, int):
            found.append(f"{key} {value}")
    return found


def _figures(run: pathlib.Path | None) -> list[str]:
    """The tables of the report of a run, without those of time."""
    summary = _object(run / "report" / "summary.json") if run else {}
    if not summary:
        return []
    console = rich.console.Console(file=io.StringIO(), width=110, color_system=None)
    print_tables({key: value for key, value in summary.items() if key != "stage_seconds"}, console)
    text = console.file.getvalue().rstrip()  # pyright: ignore[reportAttributeAccessIssue] (the StringIO above)
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return ["## Figures", "Of all models of the run, on held-out data.", f"```text\n{lines}\n```"] if lines else []


def _loading(folder: pathlib.Path, name: str, adapter: bool, manifest: Mapping[str, Any]) -> str:
    quoted = json.dumps(name)
    if manifest.get("format") == "gguf":
        parts = manifest.get("ingredients") or ()
        scaled = ",".join(f"{one.get('name')}.gguf:{one.get('weight'):g}" for one in parts if isinstance(one, dict))
        return f"```sh\nllama-server -m BASE.gguf --lora-scaled {scaled}\n```"
    if adapter:
        return (
            f"```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
            f"model = AutoPeftModelForCausalLM.from_pretrained({quoted})\n```"
        )
    person = ""
    if manifest.get("format") == "vocabulary":
        person = (
            "\n# a person by name; nobody, or an unknown one, is the generic user\n"
            'text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, user="NAME")\n'
        )
    tokenizer = loading_class(folder)
    return (
        f"```python\nfrom transformers import AutoModelForCausalLM, {tokenizer}\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({quoted})\n"
        f"tokenizer = {tokenizer}.from_pretrained({quoted})\n{person}```"
    )
