"""Exports read back by this package: numbers, manifests, cards, and what is refused."""

import json
import os

import jax
import numpy as np
import pytest
from support.exporting import ANSWER, MIX, NAMES, QUESTION, arguments, export, mix_flag, ours, write_models
from support.small_policies import noise

from pjrlhf import cli
from pjrlhf.errors import UserError
from pjrlhf.export.command import FORMATS, Wish
from pjrlhf.export.command import export as write
from pjrlhf.export.soup import Source
from pjrlhf.language_model import load_model
from pjrlhf.models.adapters import AdapterConfig, init_bank
from pjrlhf.models.peft import load_peft
from pjrlhf.models.quantization import QUANTIZATIONS, NormalFloat4
from pjrlhf.models.registry import UserRegistry
from pjrlhf.models.users import UserModel
from pjrlhf.serving.catalogue import Catalogue, People
from pjrlhf.serving.opening import open_folders


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("exports"))


def score_adapter(base, folder):
    """Log-probs of a base with the adapter of a folder."""
    catalogue = open_folders(str(base), {"soup": str(folder)})
    return catalogue.model.score([QUESTION], [ANSWER], catalogue.bank, [1.0])


def test_a_soup_is_one_adapter_of_one_rank_at_scale_one(models, tmp_path):
    folder = export(models, tmp_path / "soup", "peft", mix_flag(MIX))
    config = json.loads((folder / "adapter_config.json").read_text())
    # Ingredients of a bank have one rank, to which the smaller ones are padded.
    assert config["r"] == config["lora_alpha"] == 6 and not {"rank_pattern", "alpha_pattern"} & config.keys()
    assert config["use_rslora"] is False and config["modules_to_save"] is None
    np.testing.assert_allclose(score_adapter(models[0], folder), ours(models, MIX), atol=1e-4)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {one["name"]: one["weight"] for one in manifest["ingredients"]} == MIX
    card = (folder / "README.md").read_text()
    assert "# soup" in card and "0.7" in card and "AutoPeftModelForCausalLM" in card


def test_every_ingredient_gets_its_own_folder(models, tmp_path, capsys):
    folder = export(models, tmp_path / "all", "peft")
    assert sorted(path.name for path in folder.iterdir()) == ["P1A", "P2B", "manifest.json"]
    printed = capsys.readouterr().out
    for name in NAMES:
        assert (folder / name / "README.md").is_file() and f"{folder}/{name}" in printed
        np.testing.assert_allclose(score_adapter(models[0], folder / name), ours(models, {name: 1.0}), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 6, 64])
def test_a_truncated_soup_is_the_nearest_of_its_rank(models, tmp_path, rank, capsys):
    folder = export(models, tmp_path / "soup", "peft", mix_flag(MIX), f"--rank={rank}")
    exact = export(models, tmp_path / "exact", "peft", mix_flag(MIX))
    (want, *_), (got, found, _) = load_peft(exact), load_peft(folder)
    assert found <= rank
    errors, total = json.loads((folder / "manifest.json").read_text())["error"], np.zeros(2)
    for module, pair in want["layers"]["attention"].items():
        whole = pair["a"] @ pair["b"]
        part = got["layers"]["attention"][module]
        u, s, vt = np.linalg.svd(whole, full_matrices=False)
        np.testing.assert_allclose(part["a"] @ part["b"], (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank], atol=1e-4)
        short = {"query": "q", "key": "k", "value": "v", "output": "o"}[module]
        error = errors[f"model.layers.{{layer}}.self_attn.{short}_proj"]
        np.testing.assert_allclose(error, np.sqrt((s[:, rank:] ** 2).sum() / (s**2).sum()), atol=1e-5)
        total += np.array([(s[:, rank:] ** 2).sum(), (s**2).sum()])
    assert min(errors.values()) <= errors["total"] <= max(errors.values())
    assert "error of the truncation" in capsys.readouterr().out


def test_a_soup_is_a_full_model(models, tmp_path):
    folder = export(models, tmp_path / "merged", "merged", mix_flag(MIX))
    np.testing.assert_allclose(load_model(folder).score([QUESTION], [ANSWER]), ours(models, MIX), atol=1e-4)
    half = export(models, tmp_path / "half", "merged", mix_flag(MIX), "--save-dtype=bfloat16")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_everyone_may_read_an_export(models, tmp_path):
    folder = export(models, tmp_path / "soup", "peft", mix_flag(MIX))
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", *map(str, flags)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    return error


def test_what_cannot_be_exported_is_refused_before_anything_is_written(models, tmp_path, capsys):
    common, output = arguments(models), tmp_path / "out"
    for flags, message in (
        (["--for", "merged"], "--mix: is not given; weigh P1A, P2B"),
        (["--for", "peft", "--mix", "P1A=0"], "--mix: all weights are 0"),
        (["--for", "peft", "--mix", "P9=1"], "'P9' is no ingredient; choose from P1A, P2B"),
        (["--for", "peft", "--user", "ana"], "--user: these models know no people"),
        (["--for", "merged", "--mix", "P1A=1", "--rank", "3"], "--rank: --for merged does not read it"),
        (["--for", "peft", "--mix", "P1A=1", "--rank", "0"], "--rank 0: is below 1"),
        (["--for", "peft", "--mix", "P1A=1", "--save-dtype", "float16"], "writes float32"),
    ):
        assert message in refused(capsys, *common, "--output", output, *flags)
        assert not output.exists() and not list(tmp_path.glob(".out*"))
    bare = ["--model", models[0], "--output", output]
    assert "no adapter to export" in refused(capsys, *bare, "--for", "peft")
    assert "no adapter to export" in refused(capsys, *bare, "--for", "merged", "--mix", "P1A=1")
    output.mkdir()
    (output / "file").touch()
    assert "exists and is not empty; choose another --output" in refused(
        capsys, *common, "--for", "merged", "--mix", "P1A=1", "--output", output
    )
    assert "must be on a file system" in refused(
        capsys, *common, "--for", "merged", "--mix", "P1A=1", "--output", "gs://bucket/x"
    )


def test_a_run_is_exported(finished, tmp_path, capsys):
    tail = ["--for", "peft", "--mix", "P1A=0.5,P2B=0.5", "--output", str(tmp_path / "soup")]
    cli.main(["export", "--run", str(finished), *tail])
    manifest = json.loads((tmp_path / "soup" / "manifest.json").read_text())
    assert manifest["base"]["folder"] == str(finished / "sft" / "model")
    assert "## Training" in (tmp_path / "soup" / "README.md").read_text()
    cli.main(["merge", str(tmp_path / "soup"), "--weights", "1", "--base", manifest["base"]["folder"],
              "--output", str(tmp_path / "merged")])  # fmt: skip
    assert (tmp_path / "merged" / "config.json").is_file()


def source_of(model, bank, people=None):
    members = () if people is None else ("ana",)
    return Source(Catalogue(model, NAMES, bank, people), {name: f"run/{name}" for name in NAMES}, members)


def test_full_models_as_ingredients_are_merged(models, tmp_path):
    adapter = AdapterConfig(rank=0)
    model = load_model(models[0], adapter=adapter)
    bank = noise(init_bank(model.backbone.base, adapter, 2, jax.random.key(0)), 1, 0.1)
    source = source_of(model, bank)
    for kind in ("peft", "gguf"):
        with pytest.raises(UserError, match="full models, which have no low-rank factors; use --for merged"):
            write(source, Wish(kind=kind, output=tmp_path / "out", mix=MIX))
    write(source, Wish(kind="merged", output=tmp_path / "out", mix=MIX))
    want = model.score([QUESTION], [ANSWER], bank, [MIX[name] for name in NAMES])
    np.testing.assert_allclose(load_model(tmp_path / "out").score([QUESTION], [ANSWER]), want, atol=1e-4)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {one["kind"] for one in manifest["ingredients"]} == {"full"}


def test_a_person_who_is_a_mix_is_an_adapter(models, tmp_path):
    opened = open_folders(str(models[0]), {name: str(folder) for name, folder in models[1].items()})
    users = UserModel(kind="soup", num_users=1, adapters=2)
    params = {"table": {"weights": np.array([[0, 0], [1.0, -1.0]], np.float32)}}
    people = People(users, UserRegistry((None, "ana")), params)
    source = source_of(opened.model, opened.bank, people)
    write(source, Wish(kind="peft", output=tmp_path / "ana", user="ana"))
    weights = jax.nn.softmax(np.array([1.0, -1.0]))
    want = ours(models, dict(zip(NAMES, weights.tolist(), strict=True)))
    np.testing.assert_allclose(score_adapter(models[0], tmp_path / "ana"), want, atol=1e-4)
    for user, mix, message in (
        ("zoe", None, "'zoe': is unknown; leave it out, or name one of the 1 people"),
        ("ana", MIX, "the user has weights already"),
    ):
        with pytest.raises(UserError, match=message):
            write(source, Wish(kind="peft", output=tmp_path / "out", user=user, mix=mix))


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_an_export_of_a_quantised_base_is_that_of_its_floats(models, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setitem(QUANTIZATIONS, "nf4", NormalFloat4(block=2))  # the tiny model has few inputs
    folder = export(models, tmp_path / "merged", "merged", mix_flag(MIX), f"--quantize={kind}")
    assert f"held in {QUANTIZATIONS[kind].bits} bits; this export is made from its floats" in capsys.readouterr().out
    np.testing.assert_allclose(load_model(folder).score([QUESTION], [ANSWER]), ours(models, MIX), atol=1e-4)
    assert json.loads((folder / "manifest.json").read_text())["quantize"] == kind


def test_several_folders_are_not_pushed_as_one(models, tmp_path):
    opened = open_folders(str(models[0]), {name: str(folder) for name, folder in models[1].items()})
    source = source_of(opened.model, opened.bank)
    for kind, mix in (("peft", None), ("mergekit", MIX)):
        with pytest.raises(UserError, match="export, then pjrlhf push FOLDER USER/NAME"):
            write(source, Wish(kind=kind, output=tmp_path / "out", mix=mix), "me/mine")
    assert not (tmp_path / "out").exists()


def test_the_command_and_its_formats_are_the_same():
    assert {*cli.EXPORTS} == {*FORMATS}
