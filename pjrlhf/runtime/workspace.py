"""The folders of a run and its base: tokenizer, dimensions, parameters."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from pjrlhf.data import bpe, synthetic
from pjrlhf.data.messages import text_of
from pjrlhf.data.tokenization import Tokenizer, load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, Backbone, frozen_factors, init_bank
from pjrlhf.models.attention import IMPLEMENTATIONS, choose
from pjrlhf.models.config import ModelConfig, RopeScaling
from pjrlhf.models.decoder import REMAT_POLICIES, Decoder, choose_decode, init_params
from pjrlhf.models.families import leaf_shapes
from pjrlhf.models.folders import new_folder, read_json
from pjrlhf.models.hub import config_folder, model_folder, portable
from pjrlhf.models.huggingface import fingerprint, load_params, read_config
from pjrlhf.models.provenance import adapted, text_provenance
from pjrlhf.models.quantization import QUANTIZATIONS, check_quantize, get_quantization
from pjrlhf.models.shared_a import complete, second_factors, with_a
from pjrlhf.parallel.mesh import batch_sharding, leaf_sharding
from pjrlhf.parallel.processes import on_process_zero
from pjrlhf.paths import user_cache
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.records import Records
from pjrlhf.settings import Settings, setting
from pjrlhf.training.progress import megabytes
from pjrlhf.training.workdir import Workdir, disk_errors
from pjrlhf.types import Json, Params, PRNGKey

FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The base model: a folder, or the dimensions of a new model."""

    path: str = setting(
        "",
        "Hugging Face folder of the base, or a name on the hub, owner/name or owner/name@revision; where empty, a new "
        "model with the dimensions below",
        path=True,
    )
    tokenizer: str | Mapping[str, Any] = setting(
        "synthetic",
        'tokenizer of a new model, or {"kind": "bpe", "vocab_size": ..., "texts": sft records to train it on}',
        choices=tuple(synthetic.ENVIRONMENTS),
    )
    hidden_size: int = setting(64, "width of a new model", low=1, high=2**17)
    intermediate_size: int = setting(192, "width of the feed-forward layers of a new model", low=1, high=2**19)
    num_layers: int = setting(2, "layers", low=1, high=1000)
    num_heads: int = setting(4, "attention heads", low=1, high=1024)
    num_kv_heads: int = setting(2, "key/value heads", low=1, high=1024)
    max_length: int = setting(128, "context length, in tokens", low=2, high=2**24)
    vocab_size: int = setting(0, "vocabulary size; 0 for that of the tokenizer", low=0, high=2**24)
    tie_embeddings: bool = setting(True, "use the transposed embedding as the output head")
    rope_theta: float = setting(10000.0, "base of the rotary embedding frequencies", above=0.0)
    rope_scaling: Mapping[str, Any] = setting(
        {}, "Llama 3 scaling: factor, low_freq_factor, high_freq_factor, original_max_position"
    )
    dtype: str = setting("float32", "dtype of activations", choices=FLOATS)
    param_dtype: str = setting("float32", "dtype of the frozen base", choices=FLOATS)
    quantize: str = setting(
        "",
        "int8 or nf4 stores the linear layers of the frozen base in 8 or 4 bits; needs adapters",
        choices=("", *QUANTIZATIONS),
    )
    remat: str = setting("none", "rematerialization: what the backward pass recomputes", choices=tuple(REMAT_POLICIES))
    attention: str = setting("auto", "attention implementation", choices=IMPLEMENTATIONS)
    eos_token: str = setting("", "token that ends an answer; the EOS of the tokenizer where not set")

    def check(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size: {self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.hidden_size // self.num_heads % 2:
            raise UserError(
                f"hidden_size: {self.hidden_size} gives num_heads={self.num_heads} an odd width each, and rotary "
                "embeddings need an even one"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads: {self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.rope_scaling:
            try:
                RopeScaling(**self.rope_scaling)
            except (TypeError, ValueError) as error:
                raise UserError(
                    "rope_scaling: give factor, low_freq_factor, high_freq_factor and original_max_position, not "
                    f"{dict(self.rope_scaling)}"
                ) from error


def context_of(settings: ModelSettings) -> tuple[int, bool] | None:
    """(context of the base in tokens, whether its positions are learned); None for a new model, and where its folder
    cannot be read, of which whoever loads the model tells.
    """
    path = settings.path
    if not path or (settings.vocab_size and not os.path.isdir(path)):  # a dry run without the model
        return None
    try:
        config = read_config(config_folder(path))
    except UserError:
        return None
    return config.max_length, config.positions == "learned"


class Workspace:
    """The folders and models of a run. Models are read at first use.

    Args:
      settings: the section `model`.
      adapter: rank and alpha of the adapters.
      records: text to train a new tokenizer on.
      fine_tuned: the base is the result of supervised fine-tuning, in <workdir>/sft/model.
    """

    def __init__(
        self,
        settings: ModelSettings,
        adapter: AdapterConfig,
        workdir: Workdir,
        devices: Devices,
        records: Records,
        fine_tuned: bool,
    ):
        self.settings, self.adapter = settings, adapter
        self.workdir, self.devices, self.records = workdir, devices, records
        self.fine_tuned = fine_tuned

    # ---- folders

    @property
    def cache_folder(self) -> pathlib.Path:
        """The user's cache folder, for files that depend on content and not on the run."""
        return user_cache()

    @property
    def base_folder(self) -> pathlib.Path:
        """The folder of the frozen base: that of supervised fine-tuning if the run has this stage."""
        return self.workdir.path / "sft" / "model" if self.fine_tuned else self.start_folder

    @property
    def base_name(self) -> tuple[str, str | None]:
        """(name of the base on the hub, its commit), or (absolute path of its folder, None)."""
        return portable("" if self.fine_tuned else self.settings.path, self.base_folder)

    @functools.cached_property
    def start_folder(self) -> pathlib.Path:
        """The folder that the run starts from; without `model.path`, that of a new tokenizer.

        Raises:
          UserError: the run has neither `model.path` nor the stage sft.
        """
        if self.settings.path:
            return model_folder(self.settings.path)
        if not self.fine_tuned:
            raise UserError(
                "model.path: is not set, and no stage sft trains a base; name a Hugging Face folder, or add the stage"
            )
        folder = self.workdir.path / "tokenizer"
        on_process_zero(self._make_tokenizer)(folder)
        return folder

    def _make_tokenizer(self, folder: pathlib.Path) -> None:
        """Writes a new tokenizer if there is none. The folder appears when it is complete."""
        if (folder / "tokenizer_config.json").is_file():
            return
        with disk_errors(folder), new_folder(folder, marker="tokenizer.json") as work:
            self._write_tokenizer(work)

    def _write_tokenizer(self, folder: pathlib.Path) -> None:
        spec = self.settings.tokenizer
        if isinstance(spec, str):
            synthetic.write_tokenizer(folder, synthetic.ENVIRONMENTS[spec])
            return
        if spec.get("kind") != "bpe":
            raise UserError(
                f"model.tokenizer {spec.get('kind')!r}: unknown; choose "
                f'{", ".join(synthetic.ENVIRONMENTS)} or {{"kind": "bpe", "vocab_size": ...}}'
            )
        examples = self.records.completions
        texts = [f"{text_of(e.prompt)}\n{text_of(e.completion or '')}" for e in examples]
        # Evenly spaced, because files are often ordered by origin.
        bpe.write_tokenizer(folder, texts[:: max(1, len(texts) // spec["texts"])], spec["vocab_size"])

    # ---- models

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the base."""
        rows = self.model_config.vocab_size if self.settings.path else None
        return load_tokenizer(self.start_folder, eos_token=self.settings.eos_token or None, rows=rows)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer of the base has a chat template; those that this package writes all have one."""
        return not self.settings.path or self.tokenizer.has_chat_template

    @property
    def token_ids(self) -> dict[str, int | list[int] | None]:
        """The ids of the special tokens, by their names in an exported model; a list for several tokens that end an
        answer.
        """
        t = self.tokenizer
        ends = list(t.eos_ids) if len(t.eos_ids) > 1 else t.eos_id
        return {"bos_token_id": t.bos_id, "eos_token_id": ends, "pad_token_id": t.pad_id}

    @functools.cached_property
    def model_type(self) -> str:
        """The Hugging Face `model_type` of the base and of exports."""
        return str(read_json(self.start_folder / "config.json").get("model_type")) if self.settings.path else "llama"

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        """The dimensions of the base, from its folder or, for a new model, from the settings."""
        return read_config(self.start_folder) if self.settings.path else self.new_config()

    def new_config(self) -> ModelConfig:
        """The dimensions of a new model; UserError where `vocab_size` is less than that of the tokenizer."""
        m = self.settings
        size = self.tokenizer.vocab_size
        if m.vocab_size and m.vocab_size < size:
            raise UserError(f"model.vocab_size: {m.vocab_size} is less than the {size} tokens of the tokenizer")
        return ModelConfig(
            vocab_size=m.vocab_size or size,
            hidden_size=m.hidden_size,
            intermediate_size=m.intermediate_size,
            num_layers=m.num_layers,
            num_heads=m.num_heads,
            num_kv_heads=m.num_kv_heads,
            head_dim=m.hidden_size // m.num_heads,
            max_length=m.max_length,
            rope_theta=m.rope_theta,
            rope_scaling=RopeScaling(**m.rope_scaling) if m.rope_scaling else None,
            tie_embeddings=m.tie_embeddings,
        )

    @functools.cached_property
    def model(self) -> Decoder:
        """The decoder of the base, without parameters."""
        m, mesh = self.settings, self.devices.mesh
        check_quantize(m.quantize, self.adapter.rank)
        platform = mesh.devices.flat[0].platform
        return Decoder(
            self.model_config,
            dtype=jnp.dtype(m.dtype),
            remat=m.remat,
            attention=choose(m.attention, platform, m.dtype, mesh.size),
            user_offset=int(bool(self.tokenizer.add_bos)),
            batch_sharding=batch_sharding(mesh) if mesh.size > 1 else None,
            decode=choose_decode(platform),
        )

    def start_params(self, key: PRNGKey) -> Any:
        """The initial parameters: read from `model.path`, or random."""
        if self.settings.path:
            return self._read(self.start_folder)
        return self.devices.create(functools.partial(init_params, self.model), key)

    @functools.cached_property
    def base(self) -> Any:
        """The parameters of the frozen base, on the mesh; kernels are stored as `model.quantize` says. With
        `adapter.freeze_a`, the first factors of all policies lie beside them.
        """
        base = self._read(self.base_folder, self.settings.quantize)
        if not self.adapter.freeze_a:
            return base
        return with_a(base, self.devices.shard({"layers": frozen_factors(base, self.adapter)})["layers"])

    @property
    def backbone(self) -> Backbone:
        """The frozen base with its decoder and the shape of its adapters."""
        return Backbone(self.model, self.adapter, self.base)

    @functools.cached_property
    def folder_hash(self) -> str:
        """The fingerprint of the folder of the base; see `models.huggingface.fingerprint`."""
        with megabytes(f"hashing {self.base_folder}") as report:
            return fingerprint(self.base_folder, report)

    @property
    def base_hash(self) -> str:
        """The fingerprint of the base as this run uses it, with its quantization."""
        return "-".join(filter(None, [self.folder_hash, self.settings.quantize]))

    def complete(self, bank: Params) -> Params:
        """A bank as files have it, with both factors of each adapter."""
        return complete(bank, self.base) if self.adapter.freeze_a else bank

    def trained(self, bank: Params) -> Params:
        """A bank of a file as this run trains it: without first factors that the base has."""
        return second_factors(bank, self.base) if self.adapter.freeze_a else bank

    def bank_like(self, count: int) -> Params:
        """Shapes and dtypes of a bank of `count` policies of this run, as files have it."""
        dtype = jnp.dtype(self.settings.param_dtype)
        shapes = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in leaf_shapes(self.model_config).items()}
        base = flax.traverse_util.unflatten_dict(shapes, sep="/")
        adapter = self.adapter.replace(freeze_a=False)
        return jax.eval_shape(lambda base: init_bank(base, adapter, count, jax.random.key(0)), base)

    @functools.cached_property
    def provenance(self) -> dict[str, Json]:
        """What parameters that this run trains belong to, see `models.provenance`: the base, the shape of the adapters,
        the dtypes, and how text becomes tokens.
        """
        s, adapter, tokenizer = self.settings, self.adapter, self.tokenizer
        return {
            "base": self.base_hash,
            "rank": adapter.rank,
            "alpha": adapter.alpha if adapter.rank else 1.0,
            "targets": adapted(self.bank_like(1)),
            "adapter_dtype": adapter.dtype,
            "dtype": s.dtype,
            "param_dtype": s.param_dtype,
            "user_offset": self.model.user_offset,
            **text_provenance(tokenizer, self.records.chat),
        }

    def base_from(self, folder: pathlib.Path) -> str:
        """The base for a file in `folder`: its name on the hub with its commit, or its path, relative where both are in
        the run directory, which may move.
        """
        name, commit = self.base_name
        if commit:
            return f"{name}@{commit}"
        inside = pathlib.Path(name).is_relative_to(self.workdir.path) and folder.is_relative_to(self.workdir.path)
        return os.path.relpath(name, folder) if inside else name

    def _read(self, folder: pathlib.Path, quantize: str = "") -> Any:
        place = functools.partial(leaf_sharding, self.devices.mesh)
        dtype, quantization = jnp.dtype(self.settings.param_dtype), get_quantization(quantize)
        with megabytes(f"reading {folder}") as report:
            return load_params(folder, dtype=dtype, place=place, quantization=quantization, report=report)
