"""Opens what is served: a run directory, or a base with adapters from folders."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from pjrlhf.data.token_table import Lengths
from pjrlhf.errors import UserError
from pjrlhf.export.ingredients import check_adapter, check_bases, open_ingredient
from pjrlhf.language_model import LanguageModel, load_bank, load_model, load_personal
from pjrlhf.models.adapters import AdapterConfig, is_low_rank
from pjrlhf.models.folders import read_json
from pjrlhf.models.hf_config import read_config
from pjrlhf.models.hub import hub_name, model_folder
from pjrlhf.models.huggingface import fingerprint
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.storage import load_tree
from pjrlhf.models.users import UserModel
from pjrlhf.parallel.mesh import make_mesh, shard_params
from pjrlhf.rollout.preference import PreferenceConfig
from pjrlhf.serving.catalogue import Catalogue, People, Reads
from pjrlhf.serving.people.fit import Learning
from pjrlhf.serving.people.rewards import LONG, Rewarded, lengths_of, open_scorer
from pjrlhf.serving.people.trained import entry_of
from pjrlhf.serving.run_notes import read_notes
from pjrlhf.settings import parse
from pjrlhf.types import Params


def parse_mesh(text: str) -> Mesh | None:
    """The mesh of "data=2,tensor=4", see `parallel.mesh.make_mesh`; None, for one device, where the text is empty.

    Raises:
      UserError: another form, or sizes that do not fit the devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else []:
        name, _, size = (x.strip() for x in part.partition("="))
        if not re.fullmatch(r"-?[0-9]{1,9}", size) or name in sizes:
            raise UserError(f"mesh: {part!r} is no size of an axis; write AXIS=N,AXIS=N, each axis once")
        sizes[name] = int(size)
    return make_mesh(sizes) if sizes else None


def open_run(run: str, entry: str | None = None, mesh: Mesh | None = None) -> Catalogue:
    """What a run has trained.

    Args:
      run: the run directory.
      entry: the policies of the stage policy ("policy"), of an entry of `methods`, or a user model, an entry of
        `preference.models` or of `user_models.models`. Where None, the policies; without any, the only user model.
      mesh: of the devices that hold the model; one device where None.

    Raises:
      UserError: no run, nothing of that name or nothing that can answer in it, or damaged files.
    """
    found = entry_of(run, entry)
    folder, config = found.run, found.config
    opened = _policies if found.is_bank else _rewarded if found.is_reward else _person
    return dataclasses.replace(opened(folder, found.file, config, mesh), notes=read_notes(config))


def _policies(folder: pathlib.Path, path: pathlib.Path, config: Mapping[str, Any], mesh: Mesh | None) -> Catalogue:
    settings = config["model"]
    base = folder / "sft" / "model" if "sft" in config["stages"] else _recorded(folder, settings["path"])
    bank, names, adapter = load_bank(path, base)
    model = load_model(
        base,
        adapter=adapter,
        dtype=settings["dtype"],
        param_dtype=settings["param_dtype"],
        quantize=settings["quantize"],
        eos_token=settings["eos_token"] or None,
        mesh=mesh,
    )
    learning = _learning(config, model, PreferenceConfig())
    people = soup_people(bank, names, learning, fingerprint(base))
    return Catalogue(model, names, _placed(bank, mesh), people, _chats(model, config["data"]["chat"]), folder)


def soup_people(bank: Params, names: Sequence[str], learning: Learning | None, base: str) -> People | None:
    """People who are soups of a bank that no user model was trained for: softmax of weights, which start at 0."""
    if len(names) < 2 or not is_low_rank(bank):
        return None
    model = UserModel(kind="soup", num_users=1, adapters=len(names))
    params = {"table": {"weights": jnp.zeros((2, len(names)))}}
    return People(model, UserRegistry((None, None)), params, trained=False, learning=learning, base=base)


def _learning(
    config: Mapping[str, Any], model: LanguageModel, objective: PreferenceConfig, user_tokens: int = 0
) -> Learning:
    """How a run fits new people, see `protocols.users.UsersSettings`."""
    data, evaluated = config["data"], config.get("evaluate_users") or {}
    lengths = lengths_of(data, model.backbone.model.config, user_tokens)
    names = {"steps": "cold_start_steps", "learning_rate": "cold_start_learning_rate"}
    given = {ours: evaluated[name] for ours, name in names.items() if name in evaluated}
    return Learning(objective=objective, lengths=lengths, **given)


def _recorded(run: pathlib.Path, path: str) -> pathlib.Path:
    """The base that a run has read, at its commit where it is on the hub."""
    inputs = run / "inputs.json"
    commit = read_json(inputs).get("model.path", {}).get("commit") if inputs.is_file() else None
    name = hub_name(path)
    return model_folder(f"{name.repo}@{commit}" if name and commit else path)


def _person(folder: pathlib.Path, path: pathlib.Path, config: Mapping[str, Any], mesh: Mesh | None) -> Catalogue:
    personal = load_personal(path, mesh=mesh)
    if personal.users.policies > 1:
        raise UserError(
            f"{path}: has an adapter for each person, a baseline that is not served; name another entry with --entry"
        )
    if "heads" in personal.params:
        raise UserError(f"{path}: is a reward model, which gives no answers; name a policy with --entry")
    bank, names = _placed(personal.params["bank"], mesh), (path.parent.name,)
    _, note = load_tree(path)
    objective = {name.removeprefix("objective."): x for name, x in note.items() if name.startswith("objective.")}
    parsed = parse(PreferenceConfig, objective, str(path))
    learning = _learning(config, personal.model, parsed, personal.users.num_tokens)
    reads = None
    if note.get("entry.history") or note.get("entry.writer"):
        similar = bool(note.get("entry.similar"))
        reads = Reads(history=note["entry.history"], writer=note["entry.writer"], similar=similar)
    if note.get("entry.user_text"):
        logging.warning(
            "%s: was trained on what people say about themselves, before the prompt; a request must bring it there",
            path.parent.name,
        )
    parts = personal.users, personal.registry, personal.params["users"]
    people = People(*parts, learning=learning, base=str(note["base"]), reads=reads)
    if personal.users.mixes:
        source = config["preference"]["bank"]
        _, names, _ = load_bank(folder / "policy" if source == "policy" else source)
    return Catalogue(personal.model, names, bank, people, _chats(personal.model, personal.chat), folder)


def _rewarded(folder: pathlib.Path, path: pathlib.Path, config: Mapping[str, Any], mesh: Mesh | None) -> Catalogue:
    """The base, with people as a reward model knows them. Nobody is known before they tell something."""
    scorer, model = open_scorer(path, config["data"], mesh)
    kind = cast(UserModel, Rewarded(path.parent.name, scorer.model.slots.source != "nobody"))  # has what is read of it
    shared = {"params": scorer.params, "reduction": vars(scorer.reduction)}
    params = {"table": jax.tree.map(lambda x: x[None], scorer.generic), "shared": shared}
    people = People(
        kind, UserRegistry((None,)), params, trained=False, scorer=scorer, base=fingerprint(model.folder or "")
    )
    return Catalogue(model, people=people, chat=_chats(model, scorer.reader.chat), run=folder)


def _chats(model: LanguageModel, chat: bool | None) -> bool:
    """Whether questions are asked as in training; `chat` is the setting, None for what the tokenizer suggests."""
    return model.tokenizer.has_chat_template and chat is not False


def _placed(bank: Params, mesh: Mesh | None) -> Params:
    """A bank on the devices of its base."""
    return bank if mesh is None else shard_params(mesh, bank)


def open_folders(
    model: str,
    ingredients: Mapping[str, str],
    dtype: str = "float32",
    quantize: str = "",
    mesh: Mesh | None = None,
) -> Catalogue:
    """A base and adapters from folders.

    Args:
      model: in Hugging Face layout, or its name on the hub.
      ingredients: name -> folder, or name on the hub, of a LoRA adapter in PEFT layout. Ranks, scales and adapted
        layers may differ.
      dtype: of activations and parameters.
      quantize: see `load_model`.
      mesh: of the devices that hold the model; one device where None.

    Raises:
      UserError: a folder that cannot be read, or an adapter that does not fit the base.
    """
    folder = model_folder(model)
    config = read_config(folder)
    kind = str(read_json(folder / "config.json").get("model_type"))
    opened = [open_ingredient(model_folder(path), 1.0, kind, config.head_dim) for path in ingredients.values()]
    for one in opened:
        if one.adapter is None:
            raise UserError(f"{one.folder}: is a full model; give LoRA adapters, or serve it with --model")
        check_adapter(one, config, folder)
    check_bases(folder, opened)
    rank = max((one.rank for one in opened), default=1)
    adapter = AdapterConfig(rank=rank, alpha=float(rank))  # scale 1: `b` has the scale of every adapter
    found = load_model(folder, adapter=adapter, dtype=dtype, param_dtype=dtype, quantize=quantize, mesh=mesh)
    bank = _placed(_stacked([(one.factors, one.scale) for one in opened], rank), mesh) if opened else None
    room = min(config.max_length, 4096)
    lengths = Lengths(prompt=room // 2, completion=room // 2, context=config.max_length, **LONG)
    learning = Learning(objective=PreferenceConfig(), lengths=lengths)
    people = None if bank is None else soup_people(bank, tuple(ingredients), learning, fingerprint(folder))
    return Catalogue(found, tuple(ingredients), bank, people, found.tokenizer.has_chat_template)


def _stacked(adapters: Sequence[tuple[Mapping[str, np.ndarray], float]], rank: int) -> Params:
    """One bank of adapters of any rank: factors are padded with zeros, as are layers that an adapter leaves out."""
    shapes = {path: factor.shape for factors, _ in adapters for path, factor in factors.items()}
    bank = {}
    for path, shape in shapes.items():
        axis = -1 if path.endswith("/a") else -2
        whole = list(shape)
        whole[axis] = rank
        bank[path] = np.zeros((len(adapters), *whole), np.float32)
        for k, (factors, scale) in enumerate(adapters):
            if path in factors:
                place = [k, ...] + [slice(None)] * -axis
                place[axis] = slice(factors[path].shape[axis])
                bank[path][tuple(place)] = factors[path] * (scale if axis == -2 else 1.0)
    return flax.traverse_util.unflatten_dict({path: jnp.asarray(x) for path, x in bank.items()}, sep="/")
