"""`pjrlhf export`: one soup, one person or every ingredient in the format of another program."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping

from pjrlhf.errors import UserError
from pjrlhf.export import adapter, gguf_lora, merged, mergekit, vocabulary
from pjrlhf.export.card import write_card
from pjrlhf.export.push import check_push, push
from pjrlhf.export.soup import Source
from pjrlhf.models.folders import new_folder
from pjrlhf.models.huggingface import fingerprint
from pjrlhf.models.peft import MANIFEST, WEIGHTS
from pjrlhf.models.quantization import get_quantization
from pjrlhf.paths import content_hash, disk_errors, expand, refuse_remote
from pjrlhf.types import Json

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be
VLLM_DEFAULT = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What is exported, and how.

    Attributes:
      kind: a name of `FORMATS`.
      output: a new or empty folder.
      mix: name of an adapter -> weight, or None.
      user: a person, or None.
      rank: of the adapter of `peft` at most; exact where None.
      dtype: of the weights of full models; that of the base where None.
      keep_adapter: of `vocabulary`: the adapter goes to a folder of its own.
    """

    kind: str
    output: pathlib.Path
    mix: Mapping[str, float] | None = None
    user: str | None = None
    rank: int | None = None
    dtype: str | None = None
    keep_adapter: bool = False


def export(source: Source, wish: Wish, repo: str = "", private: bool = False) -> list[str]:
    """Writes `wish.output`; returns lines that say what was written and how to use it.

    A refused export leaves no folder behind.

    Args:
      repo: USER/NAME on the hub that the folder is uploaded to; "" uploads nothing.
      private: whether a new repository is private.

    Raises:
      UserError: the catalogue does not have what is asked for, or the format cannot hold it; the output is taken or
        cannot be written; or it cannot be uploaded.
    """
    if repo and (wish.kind == "mergekit" or (wish.kind == "peft" and not _names_a_soup(source, wish))):
        raise UserError(
            "--push: uploads one folder, and this writes several; export, then pjrlhf push FOLDER USER/NAME"
        )
    if repo:
        check_push(repo)
    output_folder(wish.output)
    check(source, wish)
    make = FORMATS[wish.kind]
    with new_folder(wish.output, marker=MANIFEST) as work:
        lines = make(work, source, wish)
    if quantization := get_quantization(source.quantize):
        bits = quantization.bits
        lines.append(f"the base was held in {bits} bits; this export is made from its floats, which differ a little")
    if repo:
        lines.append(f"pushed to {push(wish.output, repo, private)}")
    return lines


def output_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder to write, before anything is read.

    Raises:
      UserError: it is in a bucket, or taken.
    """
    refuse_remote(path, "an export", "write it to a folder and copy that")
    output = pathlib.Path(expand(path))
    with disk_errors(output):
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise UserError(f"{output}: exists and is not empty; choose another --output")
    return output


def check(source: Source, wish: Wish) -> None:
    """Refuses settings that a format does not read."""
    if wish.rank is not None:
        if wish.kind != "peft":
            raise UserError(f"--rank: --for {wish.kind} does not read it; leave it out")
        if wish.rank < 1:
            raise UserError(f"--rank {wish.rank}: is below 1; choose a larger one")
    if wish.dtype is not None and wish.kind not in ("merged", "vocabulary", "mergekit"):
        raise UserError(f"--save-dtype: --for {wish.kind} writes float32; leave it out")
    if wish.keep_adapter and wish.kind != "vocabulary":
        raise UserError(f"--keep-adapter: --for {wish.kind} does not read it; leave it out")
    if wish.kind != "vocabulary":
        source.refuse_user_tokens(wish.kind)
    elif not source.catalogue.user_tokens:
        raise UserError(
            "--for vocabulary: there are no user tokens; name a user model with --entry, or use --for merged"
        )
    if wish.kind in ("peft", "vocabulary", "gguf"):
        source.refuse_full(wish.kind)
    if wish.kind == "gguf":
        gguf_lora.check(source)


def _names_a_soup(source: Source, wish: Wish) -> bool:
    """Whether one soup is asked for, instead of every ingredient."""
    return wish.mix is not None or wish.user is not None or source.personal


def _peft(work: pathlib.Path, source: Source, wish: Wish) -> list[str]:
    if _names_a_soup(source, wish):
        return _adapter(work, wish.output, source, source.weights(wish.mix, wish.user), wish.rank)
    lines = []
    for name in source.names:
        lines += _adapter(work / name, wish.output / name, source, {name: 1.0}, wish.rank)
    finish(work, source.manifest("peft", dict.fromkeys(source.names, 1.0)))
    return lines


def _adapter(
    work: pathlib.Path, shown: pathlib.Path, source: Source, weights: Mapping[str, float], rank: int | None
) -> list[str]:
    note = adapter.write(work, source, weights, rank)
    manifest = source.manifest("peft", weights)
    finish(work, manifest | note | {"dtype": "float32", "checksum": content_hash(work / WEIGHTS)}, shown.name)
    lines = [f"adapter of rank {note['rank']}: {shown}"]
    room = next((size for size in VLLM_RANKS if size >= note["rank"]), 0)
    if room > VLLM_DEFAULT:
        lines.append(f"vLLM serves it with --enable-lora --max-lora-rank {room}")
    elif not room:
        lines.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}: give --rank, or use --for merged")
    if "error" in note:
        errors = note["error"]
        lines.append(f"error of the truncation: {errors['total']:.2%} of the update in all (Frobenius norm)")
        lines += [f"  {name.format(layer='*')}: {error:.2%}" for name, error in errors.items() if name != "total"]
    return lines


def _merged(work: pathlib.Path, source: Source, wish: Wish) -> list[str]:
    weights = source.weights(wish.mix, wish.user)
    merged.write(work, source, weights, wish.dtype)
    finish(work, source.manifest("merged", weights) | {"fingerprint": fingerprint(work)}, wish.output.name)
    return [f"merged model: {wish.output}"]


def _vocabulary(work: pathlib.Path, source: Source, wish: Wish) -> list[str]:
    weights = source.weights(wish.mix, None)
    made = vocabulary.write(work, wish.output, source, weights, wish.user, wish.dtype, wish.keep_adapter)
    note = {"people": len(made.names), "user_tokens": made.count, "fingerprint": fingerprint(work)}
    finish(work, source.manifest("vocabulary", weights) | note, wish.output.name)
    lines = [f"model with the tokens of {len(made.names)} people: {wish.output}"]
    if wish.keep_adapter:
        own = {"base": {"folder": str(wish.output.absolute()), "hash": note["fingerprint"]}}
        own |= {"checksum": content_hash(work / vocabulary.ADAPTER / WEIGHTS)}
        finish(work / vocabulary.ADAPTER, source.manifest("peft", weights) | own, vocabulary.ADAPTER)
        lines.append(f"its adapter, without which it is the base: {wish.output / vocabulary.ADAPTER}")
    if source.catalogue.model.tokenizer.has_chat_template:
        lines.append('a conversation names its person by chat_template_kwargs: {"user": "NAME"}')
    lines.append(f"a plain prompt starts with the text of its person in {wish.output / vocabulary.PEOPLE}")
    return lines


def _gguf(work: pathlib.Path, source: Source, wish: Wish) -> list[str]:
    weights = source.weights(wish.mix, wish.user) if _names_a_soup(source, wish) else dict.fromkeys(source.names, 1.0)
    ranks = [gguf_lora.write(work, source, name) for name in weights]
    finish(work, source.manifest("gguf", weights) | {"rank": max(ranks)}, wish.output.name)
    scales = json.dumps([{"id": i, "scale": weight} for i, weight in enumerate(weights.values())])
    return [
        *(f"adapter: {wish.output / gguf_lora.file_name(name)}" for name in weights),
        f"base: python convert_hf_to_gguf.py {source.origin[0]} --outfile {wish.output / 'BASE.gguf'}",
        f"soup: cd {wish.output} && {gguf_lora.command(weights)}",
        f'or per request, with --lora {",".join(map(gguf_lora.file_name, weights))}: "lora": {scales}',
    ]


def _mergekit(work: pathlib.Path, source: Source, wish: Wish) -> list[str]:
    weights = source.weights(wish.mix, wish.user)
    mergekit.write(work, wish.output, source, weights, wish.dtype)
    finish(work, source.manifest("mergekit", weights))
    recipe = wish.output / mergekit.RECIPES["task_arithmetic"]
    return [
        *(f"full model: {wish.output / name}" for name in weights),
        f"soup: mergekit-yaml {recipe} FOLDER",
    ]


def finish(work: pathlib.Path, manifest: Mapping[str, Json], card: str = "") -> None:
    """Writes manifest.json, and the model card of a folder that will be called `card`."""
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2))
    if card:
        write_card(work, card)


FORMATS: dict[str, Callable[[pathlib.Path, Source, Wish], list[str]]] = {
    "peft": _peft,
    "merged": _merged,
    "vocabulary": _vocabulary,
    "gguf": _gguf,
    "mergekit": _mergekit,
}
