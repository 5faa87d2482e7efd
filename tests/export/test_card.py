"""Model cards of exported folders, and uploads to a hub on this machine."""

import json
import re
import shutil

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from support.hub_server import Hub

from pjrlhf import cli
from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.card import card_of, write_card
from pjrlhf.export.merge import MergeSettings
from pjrlhf.export.push import check_push, push
from pjrlhf.models import hub
from pjrlhf.models.folders import read_json
from pjrlhf.models.huggingface import fingerprint

ADAPTER = "policy/ingredients/P1A"
LICENSED = b"---\nlicense: apache-2.0\ntags: [x]\n---\n# small\n"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_pinned", {})
    server = Hub(token="secret")
    with server.running(tmp_path / "cache"):
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server


def parts_of(card):
    """(what the YAML of a card holds, its Markdown); both as the hub reads them."""
    found = re.fullmatch(r"---\n(.+?)\n---\n\n(.+)", card, re.DOTALL)
    data = yaml.safe_load(found[1])
    assert huggingface_hub.ModelCard(card).data.to_dict() == data
    return data, found[2]


def soup(finished, output, base=None, **changes):
    base = base or str(finished / "sft" / "model")
    ingredients = tuple(str(finished / "policy" / "ingredients" / name) for name in ("P1A", "P2B"))
    settings = {"base": base, "ingredients": ingredients, "weights": (0.7, 0.3), "output": str(output)}
    return merge.merge(MergeSettings(**{**settings, **changes}))


def test_all_exports_have_a_card(finished, tmp_path):
    """A trained base, an adapter, a merged model, a merged adapter."""
    soup(finished, tmp_path / "soup")
    soup(finished, tmp_path / "concat", space="concat")
    folders = [finished / "sft" / "model", finished / ADAPTER, tmp_path / "soup", tmp_path / "concat"]
    for folder, library in zip(folders, ("transformers", "peft", "transformers", "peft"), strict=True):
        data, text = parts_of((folder / "README.md").read_text())
        assert data["library_name"] == library and "pjrlhf" in data["tags"]
        assert "Licence of the base: not stated" in text and "## How to load it" in text
        assert str(tmp_path) not in text and str(finished) not in text, "no path of this machine is published"
    data, text = parts_of((tmp_path / "soup" / "README.md").read_text())
    assert data["tags"][-1] == "merge" and "base_model" not in data
    assert "| `ingredients/P1A` | lora | 0.7 |" in text and "method `linear`" in text
    assert f"fingerprint `{fingerprint(finished / 'sft' / 'model')}`" in text
    assert "AutoPeftModel" in (tmp_path / "concat" / "README.md").read_text()


def test_a_card_has_the_data_and_figures_of_the_run(finished, tmp_path):
    soup(finished, tmp_path / "soup")
    _, text = parts_of((tmp_path / "soup" / "README.md").read_text())
    assert re.search(r"Config: digest `[0-9a-f]{16}`, seed 0", text)
    assert "`data.prompts`: synthetic" in text and "Counts of `comparisons`: pairs 32" in text
    assert "Counts of `sft`: records" in text
    summary = read_json(finished / "report" / "summary.json")
    assert "Win rate" in text and all(name in text for name in summary["ingredients"])
    before = (finished / ADAPTER / "README.md").read_text()
    assert "## Figures" not in before, "the report comes later; a push makes the card again"
    assert "## Figures" in card_of(finished / ADAPTER, "P1A")


def test_the_same_folder_has_the_same_card(finished, tmp_path):
    for name in ("one", "two"):
        soup(finished, tmp_path / name / "soup")
    assert len({(tmp_path / name / "soup" / "README.md").read_bytes() for name in ("one", "two")}) == 1


def test_the_licence_and_name_of_a_base_on_the_hub(server, finished, tmp_path):
    files = {path.name: path.read_bytes() for path in (finished / "sft" / "model").iterdir()}
    commit = server.add("ann/small", {**files, "README.md": LICENSED})
    soup(finished, tmp_path / "soup", base="ann/small")
    data, text = parts_of((tmp_path / "soup" / "README.md").read_text())
    assert data["license"] == "apache-2.0" and data["base_model"] == "ann/small"
    assert f"Base: `ann/small@{commit[:12]}`" in text and "Licence of the base: apache-2.0, as it states" in text
    # What is made from an export of ours inherits both.
    again = soup(finished, tmp_path / "again", base=str(tmp_path / "soup"), space="delta", **no_adapters(tmp_path))
    assert again["ingredients"][0]["kind"] == "full"
    data, _ = parts_of((tmp_path / "again" / "README.md").read_text())
    assert data["license"] == "apache-2.0" and data["base_model"] == "ann/small"


def no_adapters(folder):
    return {"ingredients": (str(folder / "soup"),), "weights": (1.0,)}


def test_data_sets_of_the_hub_are_named(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    config = read_json(run / "config.json")
    config["reward"]["data"] = {"kind": "datasets", "path": "ann/pairs@v1", "split": "train"}
    config["data"]["prompts"] = {"kind": "jsonl", "path": "/home/ann/secret/prompts.jsonl"}
    (run / "config.json").write_text(json.dumps(config))
    data, text = parts_of(card_of(run / ADAPTER, "P1A"))
    assert data["datasets"] == ["ann/pairs"] and "`reward.data`: datasets `ann/pairs@v1`, split train" in text
    assert "`data.prompts`: jsonl `prompts.jsonl`" in text and "secret" not in text


def test_a_card_of_a_folder_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_card(tmp_path / "model", "me/model")
    data, text = parts_of((tmp_path / "model" / "README.md").read_text())
    assert "# me/model" in text and data["library_name"] == "transformers"


# ---- uploads


def test_what_is_pushed_can_be_read_by_name(server, finished, tmp_path, capsys):
    found = soup(finished, tmp_path / "soup", push="me/soup", private=True)
    assert found["pushed"].endswith("/me/soup") and server.repos["models", "me/soup"]["private"]
    files = server.files("me/soup")
    assert {path.name for path in (tmp_path / "soup").iterdir()} <= {*files}
    assert b"# me/soup" in files["README.md"] and str(tmp_path).encode() not in files["manifest.json"]
    assert json.loads(files["manifest.json"])["ingredients"][0]["folder"] == "P1A"
    assert fingerprint(hub.model_folder("me/soup")) == fingerprint(tmp_path / "soup")

    cli.main(["push", str(finished / ADAPTER), "me/concise"])
    assert "pushed to http://127.0.0.1" in capsys.readouterr().out
    assert not server.repos["models", "me/concise"]["private"]
    folder = hub.model_folder("me/concise")
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        finished / ADAPTER / "adapter_model.safetensors"
    ).read_bytes()
    files = server.files("me/concise")
    assert b"## Figures" in files["README.md"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "model", "no path of this machine"
    assert not any(str(finished).encode() in content for content in files.values())
    merged = soup(finished, tmp_path / "again", ingredients=("me/concise",), weights=(1.0,))
    assert merged["ingredients"][0]["folder"] == "me/concise", "which checks the fingerprint of its base"


@pytest.mark.parametrize("case", ["name", "token", "wrong token", "owner", "offline", "network"])
def test_what_cannot_be_pushed_is_one_line_before_anything_is_merged(server, finished, tmp_path, monkeypatch, case):
    repo, message = {
        "name": ("soup", "soup: cannot be pushed to, it is no name on the hub; write USER/NAME"),
        "token": (
            "me/soup",
            "me/soup: cannot be pushed to without a token; log in with `hf auth login`, or",
        ),
        "wrong token": ("me/soup", "me/soup: the hub does not accept the token; log in again with `hf auth login`, or"),
        "owner": ("others/soup", "others/soup: the token may not write to others; choose one of me"),
        "offline": ("me/soup", "me/soup: cannot be pushed to while HF_HUB_OFFLINE is set; unset it, or do not push"),
        "network": ("me/soup", r"me/soup: cannot be uploaded \(.*\); check the network"),
    }[case]
    if case == "token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "other")
    elif case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif case == "network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=message) as caught:
        soup(finished, tmp_path / "soup", push=repo)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not (tmp_path / "soup").exists() and not server.repos


def test_a_damaged_manifest_is_named(server, finished, tmp_path):
    folder = shutil.copytree(finished / ADAPTER, tmp_path / "adapter")
    (folder / "manifest.json").write_text('{"base": ')
    with pytest.raises(UserError, match=r"adapter/manifest\.json"):
        push(folder, "me/x")
    assert not server.repos


def test_a_push_that_fails_names_the_command_that_repeats_it(server, finished, monkeypatch):
    folder = finished / ADAPTER
    with pytest.raises(UserError, match=rf"others/x: the token has no right .*; then `pjrlhf push {folder} others/x`"):
        push(folder, "others/x")
    with pytest.raises(UserError, match=r"policy: holds neither config\.json nor adapter_config\.json; name"):
        push(finished / "policy", "me/x")
    check_push("me/x")
