"""User models of entries, new or trained, and trained entries on disk."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Int

from pjrlhf.algorithms import banks
from pjrlhf.algorithms.pdpo_settings import Entry, PreferenceSettings
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import Backbone, Policies, bank_size, is_low_rank
from pjrlhf.models.hub import model_file
from pjrlhf.models.provenance import check_provenance, check_shapes
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.storage import load_tree, save_tree
from pjrlhf.models.users import KINDS, UserModel
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.rollout import scoring
from pjrlhf.runtime.run import Run
from pjrlhf.training.workdir import disk_errors
from pjrlhf.types import Array, Json, Params

MODEL = "model.safetensors"


def user_model(entry: Entry, capacity: int, width: int, bank: Params | None = None) -> UserModel:
    """The user model of an entry.

    Args:
      capacity: people it has room for.
      width: of the base.
      bank: adapters that it mixes, of kinds that do.

    Raises:
      UserError: sizes that the kind refuses.
    """
    own = {key: getattr(entry.users, key) for key in ("kind", "tokens", "clusters", "start", "std", "zero_offset")}
    found = KINDS.get(entry.users.kind)
    adapters = capacity + 1 if found.trains_adapters else bank_size(bank) if found.mixes and bank is not None else 0
    try:
        return UserModel(num_users=capacity, width=width, adapters=adapters, **own)
    except ValueError as error:
        raise UserError(f"preference.models.{entry.name}: {error}") from error


def policies_of(users: UserModel, backbone: Backbone, trainable: Params, rows: Int[Array, " B"]) -> Policies:
    """The policies of people, one per row.

    Args:
      trainable: {"bank", "users"}.
      rows: of the user table.
    """
    tokens, mix = users.apply(trainable["users"], rows)
    return backbone.policies(trainable["bank"], jnp.ones((1, 1)) if mix is None else mix, tokens)


def soup_bank(run: Run) -> Params:
    """The trained adapters that kind soup mixes, from `preference.bank`, on the mesh.

    Raises:
      UserError: no such file, a damaged one, or adapters of another base or other settings.
    """
    path = run.section(PreferenceSettings).bank
    if path == "policy":
        path = run.workdir.path / "policy" / "bank.safetensors"
    bank, note = load_tree(model_file(path, "bank.safetensors"))
    if not is_low_rank(bank):
        raise UserError(f"{path}: holds full parameters, of which every pair would need a copy; train adapters instead")
    check_provenance(path, note, run.workspace.provenance)
    check_shapes(path, bank, run.workspace.bank_like(bank_size(bank)))
    return run.devices.shard(run.workspace.trained(bank))


def _file(run: Run, name: str) -> pathlib.Path:
    return run.workdir.path / "preference" / name / MODEL


def save(run: Run, entry: Entry, users: UserModel, registry: UserRegistry, params: Params) -> None:
    """Writes a trained entry with all that `language_model.load_personal` needs to rebuild it. A policy that is the
    same for everybody is also an ingredient of merges, in the folder ingredient.

    Args:
      params: as `load` returns them.

    Raises:
      UserError: the disk is full or unwritable.
    """
    path, workspace = _file(run, entry.name), run.workspace
    note = {
        "users": registry.to_json(),
        "user_model": {field.name: getattr(users, field.name) for field in dataclasses.fields(users)},
        "base_folder": workspace.base_from(path.parent),
        "quantize": workspace.settings.quantize,
        "chat": run.records.chat,
        **_provenance(run, entry),
    }
    run.workdir.stage(f"preference/{entry.name}")
    params = to_host({**params, "bank": workspace.complete(params["bank"])})
    with disk_errors(path):
        save_tree(path, params, note)
        if entry.objective.head == "policy" and not (users.num_tokens or users.mixes or users.policies > 1):
            one = jax.tree.map(lambda x: x[0], params["bank"])
            on_process_zero(banks.export)(run, path.parent / "ingredient", one)


def _provenance(run: Run, entry: Entry) -> dict[str, Json]:
    """What a trained entry belongs to."""
    found = {f"entry.{name}": value for name, value in entry.users.to_dict().items()}
    found |= {f"objective.{name}": value for name, value in entry.objective.to_dict().items()}
    return run.workspace.provenance | found


def load(run: Run, entry: Entry) -> tuple[Params, UserRegistry]:
    """A trained entry: ({"bank", "users"}, and "heads" of a reward model, on the mesh; the people of the rows of its
    user table).

    Raises:
      UserError: the file is missing or damaged, or belongs to another base or other settings.
    """
    path = _file(run, entry.name)
    tree, note = load_tree(path)
    check_provenance(path, note, _provenance(run, entry))
    params, registry = {"users": {}, **tree}, UserRegistry.from_json(note["users"])
    backbone, users = (
        run.workspace.backbone,
        user_model(entry, registry.capacity, run.workspace.model_config.hidden_size, params["bank"]),
    )
    like = {"bank": run.workspace.bank_like(bank_size(params["bank"]))}
    like["users"] = jax.eval_shape(lambda: users.init(jax.random.key(0), backbone.base["embed"]["embedding"]))
    if entry.objective.head == "reward":
        like["heads"] = jax.eval_shape(lambda: scoring.init_heads(1, users.width))
    check_shapes(path, params, like)
    params["bank"] = run.workspace.trained(params["bank"])
    return run.devices.shard(params), registry
