"""The trained adapters of a stage on disk: a bank, and each adapter as a folder of its own."""

import pathlib
from collections.abc import Mapping, Sequence

import jax

from pjrlhf.errors import UserError
from pjrlhf.export.card import write_card
from pjrlhf.models.hf_config import GENERATION
from pjrlhf.models.huggingface import fingerprint, save_params
from pjrlhf.models.peft import MANIFEST, WEIGHTS, save_peft
from pjrlhf.models.provenance import check_provenance, check_shapes
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.paths import content_hash
from pjrlhf.runtime.run import Run
from pjrlhf.runtime.workspace import Workspace
from pjrlhf.training.progress import megabytes
from pjrlhf.training.workdir import disk_errors, write_json
from pjrlhf.types import Json, Params

BANK = "bank.safetensors"


def save(run: Run, stage: str, names: Sequence[str], bank: Params) -> str:
    """Writes <workdir>/<stage>/bank.safetensors, and one folder per adapter (PEFT, or a full model); returns the
    fingerprint of the base.

    Raises:
      UserError: the disk is full or unwritable.
    """
    folder, workspace = run.workdir.stage(stage), run.workspace
    bank = to_host(workspace.complete(bank))
    with disk_errors(folder):
        save_tree(folder / BANK, bank, {"adapters": list(names), **workspace.provenance})
        _save_adapters(run, folder, names, bank)
    return workspace.base_hash


@on_process_zero
def _save_adapters(run: Run, folder: pathlib.Path, names: Sequence[str], bank: Params) -> None:
    for k, name in enumerate(names):
        export(run, folder / "ingredients" / name, jax.tree.map(lambda x, k=k: x[k], bank))


def export(run: Run, target: pathlib.Path, one: Params) -> None:
    """Writes one adapter of a bank, without the axis K, as a folder that other libraries load and `pjrlhf merge` takes:
    in PEFT's layout, or a full model.

    Raises:
      UserError: the disk is full or unwritable.
    """
    workspace, adapter = run.workspace, run.workspace.adapter
    manifest: dict[str, Json] = {"trained_with": workspace.provenance}
    if not adapter.rank:
        return export_model(workspace, target, one, workspace.base_folder, manifest, target.name)
    (base_name, commit), head_dim = workspace.base_name, workspace.model_config.head_dim
    save_peft(target, one, adapter.rank, adapter.alpha, base_name, workspace.model_type, head_dim, commit)
    # A merge stops where the adapter does, also where its base does not say so.
    write_json(target / GENERATION, {"eos_token_id": workspace.token_ids["eos_token_id"]})
    # By this the merge refuses an adapter that was trained on another base. One trained on a quantised base is merged
    # into the floats that stand in the folder.
    origin = {"commit": commit} if commit else {}
    manifest["base"] = {"folder": base_name, **origin, "hash": workspace.folder_hash}
    manifest |= {"quantize": run.settings.model.quantize, "checksum": content_hash(target / WEIGHTS)}
    write_json(target / MANIFEST, manifest)
    write_card(target, target.name)


def export_model(
    workspace: Workspace,
    folder: pathlib.Path,
    params: Params,
    tokenizer_folder: pathlib.Path | None,
    manifest: Mapping[str, Json],
    name: str,
) -> None:
    """Writes a full model as a Hugging Face folder with its manifest and card.

    Args:
      tokenizer_folder: whose tokenizer files are copied.
      manifest: gets the fingerprint of the folder.
      name: of the model in its card and in messages.

    Raises:
      UserError: see `save_params`.
    """
    with megabytes(f"{name}: writing the model") as report:
        save_params(
            folder,
            workspace.model_config,
            params,
            model_type=workspace.model_type,
            tokenizer_folder=tokenizer_folder,
            token_ids=workspace.token_ids,
            report=report,
        )
    write_json(folder / MANIFEST, {**manifest, "fingerprint": fingerprint(folder)})
    write_card(folder, name)


def load(run: Run, stage: str = "policy", names: Sequence[str] | None = None) -> Params:
    """The bank of a stage of this run, on the mesh.

    Args:
      names: of its adapters, by default all rewards of the run.

    Raises:
      UserError: its adapters are not `names`, or belong to another base or other settings; or the file is damaged.
    """
    names = list(run.audience.rewards if names is None else names)
    path = run.workdir.path / stage / BANK
    bank, note = load_tree(path)
    if note.get("adapters") != names:
        raise UserError(f"{path}: the bank holds {note.get('adapters')}, this run needs {names}; train it again")
    check_provenance(path, note, run.workspace.provenance)
    check_shapes(path, bank, run.workspace.bank_like(len(names)))
    return run.devices.shard(run.workspace.trained(bank))
