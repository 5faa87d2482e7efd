"""What the stages of one run share: config, folder, mesh, tokenizer, base model, prompts and judge.

A stage reads the results of earlier stages from the run directory and writes its own there, so that any prefix of a
run can be continued in a new process.
"""

import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from pjrlhf.data import bpe, preferences, synthetic
from pjrlhf.data.batching import buckets, pad_left, split_by
from pjrlhf.data.packing import Ids, choose_mode, pack, row_length
from pjrlhf.data.preferences import Preference, Registry
from pjrlhf.data.schema import Example, request_of, validate
from pjrlhf.data.sources import open_source
from pjrlhf.data.tokenization import Lengths, Tokenizer, TokenTable, cut_left, load_tokenizer, tokenize
from pjrlhf.errors import UserError
from pjrlhf.models.adapters import AdapterConfig, is_low_rank
from pjrlhf.models.attention import choose
from pjrlhf.models.config import ModelConfig, RopeScaling
from pjrlhf.models.decoder import Decoder, choose_decode, init_params
from pjrlhf.models.folders import read_json
from pjrlhf.models.huggingface import fingerprint, load_params, read_config
from pjrlhf.models.quantization import check_quantize
from pjrlhf.parallel.mesh import (
    batch_sharding,
    bytes_per_device,
    constrain_state,
    leaf_sharding,
    make_mesh,
    round_up_rows,
    shard_batch,
    sharded,
)
from pjrlhf.parallel.processes import on_process_zero, to_host
from pjrlhf.paths import local, user_cache
from pjrlhf.rewards.scorers import scorer
from pjrlhf.rollout.reference import reference_logps
from pjrlhf.rollout.sampler import Sampling
from pjrlhf.training import loop
from pjrlhf.training.performance import Program
from pjrlhf.training.state import State
from pjrlhf.training.workdir import Workdir


class Run:
    """One run of a pipeline of stages."""

    def __init__(self, config: Any, workdir: Workdir):
        self.config = config
        self.workdir = workdir

    @functools.cached_property
    def key(self) -> jax.Array:
        """The PRNG key that every stage folds its own numbers into."""
        with jax.ensure_compile_time_eval():  # the first to ask may be a program that is being traced
            return jax.random.key(self.config.seed)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return make_mesh(self.config.mesh)

    # ---- the devices: what every step goes through

    def create(self, make: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
        """`make(*arguments)` on the mesh, see `parallel.mesh.sharded`."""
        return sharded(self.mesh, make, *arguments, donate=donate)

    def place(self, batch: Any) -> Any:
        """A batch on the mesh, see `parallel.mesh.shard_batch`."""
        return shard_batch(self.mesh, batch)

    def training_step(self, step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`step`: (state, ...) -> (state, metrics), to be compiled; it takes the memory of the state it is given."""

        @functools.wraps(step)
        def in_place(state: State, *arguments: Any, **keywords: Any) -> tuple[State, Any]:
            state, metrics = step(state, *arguments, **keywords)
            return constrain_state(self.mesh, state), metrics

        return self.program(in_place, donate_argnums=0, **options)

    def program(self, step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`step`, to be compiled."""
        return Program(step, trip_count=self.config.data.max_completion, **options)

    def train(self, method: loop.Method, stage: str, steps: int, **options: Any) -> State:
        """The state after `steps` steps, see `training.loop.run`."""
        names = ("checkpoints", "checkpoint_every", "max_to_keep", "keep_best", "log_every", "loggers", "profile")
        settings = {name: self.config[name] for name in names}
        programs = [part for part in vars(method).values() if isinstance(part, Program)]
        return loop.run(
            method,
            self.workdir,
            stage,
            steps=steps,
            programs=programs,
            on_start=functools.partial(self._say_bytes, stage),
            **settings,
            **options,
        )

    def _say_bytes(self, stage: str, state: State) -> None:
        """Logs what a stage keeps on each device; what it sampled or is computing comes on top."""
        trained = state.trainable
        if "layers" in trained:  # nothing but a bank, or a whole model
            trained = {"bank" if is_low_rank(trained) else "model": trained}
        found = {"base": vars(self)["base"]} if "base" in vars(self) else {}
        found |= {**trained, "optimizer": state.opt_state}
        sizes = ", ".join(f"{name} {bytes_per_device(tree):,}" for name, tree in found.items())
        logging.info("stage %s: bytes per device of %d: %s", stage, self.mesh.size, sizes)

    # ---- people and their preferences

    @functools.cached_property
    def registry(self) -> Registry:
        """Preference id -> dimension and sentence."""
        named = {"synthetic": synthetic.PREFERENCES, "paper": preferences.PAPER, "synthetic16": synthetic.PREFERENCES16}
        wanted = self.config.preferences
        if isinstance(wanted, str):
            if wanted not in named:
                raise UserError(
                    f"preferences {wanted!r}: unknown; choose {' or '.join(named)}, or define them in the config"
                )
            registry = named[wanted]
        else:
            registry = {name: Preference(**fields) for name, fields in wanted.items()}
        missing = [name for name in self.config.objectives if name not in registry]
        if missing:
            raise UserError(f"objective {missing[0]!r}: not among the preferences {', '.join(registry)}; define it")
        return registry

    @property
    def synthetic_preferences(self) -> Registry:
        """The preferences that the corpus and the judge of the synthetic environment know; the plain one's for a
        registry from elsewhere.
        """
        return synthetic.PREFERENCES16 if self.config.preferences == "synthetic16" else synthetic.PREFERENCES

    @property
    def objectives(self) -> tuple[str, ...]:
        """The preferences that get an ingredient each."""
        return tuple(self.config.objectives)

    @property
    def rewards(self) -> tuple[str, ...]:
        """What there is a reward model and a policy for: the preferences, and the general reward of RLHF if any."""
        return self.objectives + ((self.config.general,) if self.config.general else ())

    @functools.cached_property
    def score(self) -> Callable[[str, str, str], float]:
        """The judge's score of (prompt, answer, criterion), on plain requests."""
        if self.config.judge == "synthetic":
            return functools.partial(synthetic.score, registry=self.synthetic_preferences)
        criteria = dict(self.config.judge)
        missing = [name for name in self.rewards if name not in criteria]
        if missing:
            raise UserError(f"judge: no scorer for {missing[0]!r}; add it to --config.judge")
        scorers = {name: scorer(spec) for name, spec in criteria.items()}
        return lambda prompt, text, criterion: scorers[criterion](prompt, text)

    def ask(self, request: str, words: str = "") -> Any:
        """The prompt that puts `request`, and after it `words` about the user's preferences, to the model."""
        text = " ".join(filter(None, [request, words]))
        return [{"role": "user", "content": text}] if self.config.data.chat else text

    # ---- models

    @property
    def cache_folder(self) -> pathlib.Path:
        """For what depends on content and not on a run: the user's cache folder."""
        return user_cache()

    @property
    def base_folder(self) -> pathlib.Path:
        """Where the frozen base lives: the result of supervised fine-tuning where the run has such a stage."""
        return self.workdir.path / "sft" / "model" if "sft" in self.config.stages else self.start_folder

    @functools.cached_property
    def start_folder(self) -> pathlib.Path:
        """The model the run starts from; without `model.path`, the folder of a new tokenizer."""
        if self.config.model.path:
            return local(self.config.model.path)
        if "sft" not in self.config.stages:
            raise UserError(
                "model.path: not set, and there is no stage sft to train a base; name a Hugging Face folder"
            )
        folder = self.workdir.stage("tokenizer")
        on_process_zero(self._write_tokenizer)(folder)
        return folder

    def _write_tokenizer(self, folder: pathlib.Path) -> None:
        """A new tokenizer, where there is none yet."""
        if (folder / "tokenizer.json").is_file():
            return
        spec = self.config.model.tokenizer
        if isinstance(spec, str) and spec in synthetic.ENVIRONMENTS:
            synthetic.write_tokenizer(folder, synthetic.ENVIRONMENTS[spec])
            return
        kind = spec if isinstance(spec, str) else spec.get("kind")
        if kind != "bpe":
            raise UserError(
                f'model.tokenizer {kind!r}: unknown; choose "synthetic", "synthetic16" or '
                '{"kind": "bpe", "vocab_size": ...}'
            )
        examples = self.completions
        texts = [f"{request_of(e.prompt)}\n{e.completion}" for e in examples]
        # Evenly spaced, for files are often ordered by origin.
        bpe.write_tokenizer(folder, texts[:: max(1, len(texts) // spec.texts)], spec.vocab_size)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.start_folder, eos_token=self.config.model.eos_token or None)

    @property
    def token_ids(self) -> dict[str, int | None]:
        """The special tokens as an exported model names them."""
        t = self.tokenizer
        return {"bos_token_id": t.bos_id, "eos_token_id": t.eos_id, "pad_token_id": t.pad_id}

    @functools.cached_property
    def model_type(self) -> str:
        """Of the base and of what is made of it, as a Hugging Face folder names it."""
        return read_json(self.start_folder / "config.json").get("model_type") if self.config.model.path else "llama"

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        """Dimensions of the base, from its folder or (trained from scratch) from the config."""
        return read_config(self.start_folder) if self.config.model.path else self.sized()

    def sized(self) -> ModelConfig:
        """The dimensions that the section `model` gives."""
        m = self.config.model
        return ModelConfig(
            vocab_size=m.vocab_size or self.tokenizer.vocab_size,
            hidden_size=m.hidden_size,
            intermediate_size=m.intermediate_size,
            num_layers=m.num_layers,
            num_heads=m.num_heads,
            num_kv_heads=m.num_kv_heads,
            head_dim=m.hidden_size // m.num_heads,
            max_length=m.max_length,
            rope_theta=float(m.rope_theta),
            rope_scaling=RopeScaling(**m.rope_scaling) if m.rope_scaling else None,
            tie_embeddings=m.tie_embeddings,
        )

    @functools.cached_property
    def model(self) -> Decoder:
        m = self.config.model
        check_quantize(m.quantize, self.adapter.rank)
        platform = self.mesh.devices.flat[0].platform
        attention = choose(m.attention, platform, m.dtype, self.mesh.size)
        return Decoder(
            self.model_config,
            dtype=jnp.dtype(m.dtype),
            remat=m.remat,
            attention=attention,
            user_offset=int(self.tokenizer.add_bos),
            batch_sharding=batch_sharding(self.mesh) if self.mesh.size > 1 else None,
            decode=choose_decode(platform),
        )

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig.of(self.config.adapter)

    def start_params(self) -> Any:
        """Parameters to start from: read from `model.path`, or random."""
        if self.config.model.path:
            return self._read(self.start_folder)
        return self.create(functools.partial(init_params, self.model), jax.random.fold_in(self.key, 0))

    @functools.cached_property
    def base(self) -> Any:
        """Parameters of the frozen base, on the mesh; kernels in 8 bits where `model.quantize` says so."""
        return self._read(self.base_folder, quantized=bool(self.config.model.quantize))

    @functools.cached_property
    def folder_hash(self) -> str:
        """What tells the base's folder from others, see `models.huggingface.fingerprint`."""
        return fingerprint(self.base_folder)

    @property
    def base_hash(self) -> str:
        """What tells the base, as this run computes with it, from others."""
        return "-".join(filter(None, [self.folder_hash, self.config.model.quantize]))

    def _read(self, folder: pathlib.Path, quantized: bool = False) -> Any:
        place = functools.partial(leaf_sharding, self.mesh)
        dtype = jnp.dtype(self.config.model.param_dtype)
        return load_params(folder, dtype=dtype, place=place, quantized=quantized)

    @property
    def lengths(self) -> Lengths:
        d = self.config.data
        return Lengths(
            prompt=d.max_prompt,
            completion=d.max_completion,
            context=self.model_config.max_length,
            long_prompt=d.long_prompt,
            long_completion=d.long_completion,
        )

    @property
    def sampled_lengths(self) -> Lengths:
        """The same for answers this run sampled itself: those cut off by the limit have no end, and get none."""
        return dataclasses.replace(self.lengths, long_completion="truncate")

    def sampling(self, **changes: Any) -> Sampling:
        """How this run samples; `changes` override."""
        t = self.tokenizer
        settings = {"max_new_tokens": self.config.data.max_completion, "temperature": float(self.config.temperature)}
        return Sampling(**{"eos_id": t.eos_id, "pad_id": t.pad_id, **settings, **changes})

    # ---- data

    @functools.cached_property
    def requests(self) -> tuple[list[str], list[str]]:
        """(train, held out) plain requests, split by prompt and never by row."""
        d = self.config.data
        if d.prompts == "synthetic":
            texts = synthetic.prompts()
        else:
            source = open_source(d.prompts)
            examples, _ = validate(source, "prompt", columns=d.get("columns"), max_bad_fraction=d.max_bad_fraction)
            texts = []
            for example in examples:
                if not isinstance(example.prompt, str):
                    raise UserError(f"{example.where}: the prompt is a conversation; requests must be text here")
                texts.append(example.prompt)
            texts = list(dict.fromkeys(texts))
        train, held = split_by(texts, d.heldout_fraction, self.config.seed)
        # A fixed order that no longer follows the file: chunks of the list are then fair samples of it.
        held = random.Random(self.config.seed).sample(list(held), len(held))
        return [texts[i] for i in train], [texts[i] for i in held]

    @functools.cached_property
    def completions(self) -> list[Example]:
        """What the base is fine-tuned on: answers to requests that are not held out, asked as this run asks."""
        config, d = self.config.sft, self.config.data
        if config.data == "synthetic":
            corpus = synthetic.corpus(
                self.requests[0], config.records, self.config.seed, registry=self.synthetic_preferences
            )
            records = [
                {"messages": [*self.ask(record["prompt"]), {"role": "assistant", "content": record["completion"]}]}
                for record in corpus
            ]
            source = open_source({"kind": "records", "records": records, "name": "synthetic environment"})
        else:
            source = open_source(config.data)
        examples, _ = validate(source, "completion", columns=d.get("columns"), max_bad_fraction=d.max_bad_fraction)
        held, found = set(self.requests[1]), []
        for example in examples:
            if isinstance(example.prompt, str) and example.prompt:
                if example.prompt in held:
                    continue
                example = dataclasses.replace(example, prompt=self.ask(example.prompt))
            found.append(example)
        return found

    def preferences(self, spec: Mapping[str, Any]) -> tuple[list[Example], str]:
        """The preference records of a source, checked, and its name."""
        source, d = open_source(spec), self.config.data
        columns = spec.get("columns") or d.get("columns")
        return validate(source, "preference", columns=columns, max_bad_fraction=d.max_bad_fraction)[0], source.name

    def tokenized(self, examples: Sequence[Example], lengths: Lengths, name: str) -> TokenTable:
        """Preference records as token ids; `name` is what messages call them."""
        share = self.config.data.max_bad_fraction
        return tokenize(examples, "preference", self.tokenizer, lengths, source_name=name, max_bad_fraction=share)

    def pairs(self, spec: Mapping[str, Any], lengths: Lengths) -> TokenTable:
        """The preference records of a source, checked and tokenised."""
        examples, name = self.preferences(spec)
        return self.tokenized(examples, lengths, name)

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """The lengths prompts are padded to; every one is compiled once."""
        return (*self.config.data.prompt_buckets, self.lengths.prompt)

    @property
    def completion_lengths(self) -> tuple[int, ...]:
        """The same for completions."""
        return (*self.config.data.completion_buckets, self.lengths.completion)

    def reference(self, table: TokenTable, rows: int) -> np.ndarray:
        """float32 [N, 2]: log-probs of both answers of every pair under the base, `rows` answers at a time, which are
        kept on disk; see `rollout.reference`.
        """
        return reference_logps(
            table,
            self.model,
            self.adapter,
            self.base,
            self.base_hash,
            prompt_lengths=self.prompt_lengths,
            completion_lengths=self.completion_lengths,
            pad_id=self.tokenizer.pad_id,
            rows=rows,
            folder=self.cache_folder / "reference",
            place=self.place,
        )

    def pack(
        self, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]], *, groups: int = 1, user_slots: int = 0
    ) -> dict[str, np.ndarray]:
        """Rows of prompts and their answers as `data.packing` says, see `data.packing.pack`."""
        d = self.config.data
        mode = choose_mode(d.packing, self.model.attention)
        return pack(
            prompts,
            answers,
            mode=mode,
            length=row_length(mode, d.max_prompt + user_slots, d.max_completion, len(answers[0])),
            pad_id=self.tokenizer.pad_id,
            multiple=round_up_rows(self.mesh, 1),
            groups=groups,
            user_slots=user_slots,
            user_offset=self.model.user_offset,
        )

    def pad_prompts(self, ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32, valid bool) [B, P], left-padded to the smallest length that holds them all."""
        length = int(buckets([max(map(len, ids))], self.prompt_lengths)[0])
        return pad_left(ids, length, self.tokenizer.pad_id)

    @functools.cached_property
    def sample_rows(self) -> int:
        """Rows sampled or scored at once outside training: as configured, rounded up to what the mesh can share."""
        return round_up_rows(self.mesh, self.config.sample_rows)

    def encode(self, prompts: Sequence[Any]) -> dict[str, np.ndarray]:
        """{"prompt" int32, "valid" bool [B, P]} of prompts made by `ask`, left-padded to a bucket."""
        limit = self.lengths.prompt
        ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        if self.lengths.long_prompt == "truncate_left":
            ids = [cut_left(prompt, limit, self.tokenizer.bos_id) for prompt in ids]
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        if len(ids[longest]) > limit:
            raise UserError(
                f"prompt {str(prompts[longest])[:60]!r}: {len(ids[longest])} tokens, more than data.max_prompt={limit}"
                "; raise it"
            )
        tokens, valid = self.pad_prompts(ids)
        return {"prompt": tokens, "valid": valid}

    def decode(self, prompt: Mapping[str, Any], response: Mapping[str, Any]) -> list[str]:
        """Texts of sampled rows {"tokens", "valid" [B, N]} after `prompt` {"prompt", "valid" [B, P]}.

        Where prompts are plain text, what follows them keeps its leading space: prompt + answer is the whole text.
        """
        arrays = to_host((prompt["prompt"], prompt["valid"], response["tokens"], response["valid"]))
        texts = []
        for before, before_valid, after, after_valid in zip(*arrays, strict=True):
            ids = after[after_valid].tolist()
            if self.config.data.chat:
                texts.append(self.tokenizer.decode(ids).strip())
            else:
                start = before[before_valid].tolist()
                texts.append(self.tokenizer.decode(start + ids)[len(self.tokenizer.decode(start)) :])
        return texts
