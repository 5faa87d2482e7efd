"""The trained adapters of a stage on disk: a bank, and each adapter as a folder of its own."""

import pathlib
from collections.abc import Sequence

import jax

from pjrlhf.errors import UserError
from pjrlhf.models.huggingface import save_params
from pjrlhf.models.peft import MANIFEST, WEIGHTS, save_peft
from pjrlhf.models.provenance import check_provenance, check_shapes
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.paths import content_hash
from pjrlhf.runtime.run import Run
from pjrlhf.training.workdir import disk_errors, write_json
from pjrlhf.types import Params

BANK = "bank.safetensors"


def save(run: Run, stage: str, names: Sequence[str], bank: Params) -> str:
    """Writes <workdir>/<stage>/bank.safetensors, and one folder per adapter (PEFT, or a full model); returns the
    fingerprint of the base.

    Raises:
      UserError: the disk is full or unwritable.
    """
    folder, workspace = run.workdir.stage(stage), run.workspace
    bank = to_host(bank)
    with disk_errors(folder):
        save_tree(folder / BANK, bank, {"adapters": list(names), **workspace.provenance})
        _save_adapters(run, folder, names, bank)
    return workspace.base_hash


@on_process_zero
def _save_adapters(run: Run, folder: pathlib.Path, names: Sequence[str], bank: Params) -> None:
    workspace = run.workspace
    for k, name in enumerate(names):
        one = jax.tree.map(lambda x, k=k: x[k], bank)
        target = folder / "ingredients" / name
        if workspace.adapter.rank:
            adapter, head_dim = workspace.adapter, workspace.model_config.head_dim
            base_folder = str(workspace.base_folder)
            save_peft(target, one, adapter.rank, adapter.alpha, base_folder, workspace.model_type, head_dim)
            # By this the merge refuses an adapter that was trained on another base. One trained on a quantised base
            # is merged into the floats that stand in the folder.
            base = {"folder": base_folder, "hash": workspace.folder_hash}
            manifest = {
                "base": base,
                "quantize": run.settings.model.quantize,
                "trained_with": workspace.provenance,
                "checksum": content_hash(target / WEIGHTS),
            }
            write_json(target / MANIFEST, manifest)
        else:
            save_params(
                target,
                workspace.model_config,
                one,
                model_type=workspace.model_type,
                tokenizer_folder=workspace.base_folder,
                token_ids=workspace.token_ids,
            )


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
    return run.devices.shard(bank)
