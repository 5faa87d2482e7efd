"""Models by their names on the Hugging Face hub, from a hub on this machine."""

import json

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from support import hub_server

from pjrlhf.errors import UserError
from pjrlhf.models import hub
from pjrlhf.models.hub import commit_of, config_folder, hub_name, model_file, model_folder, newest
from pjrlhf.models.huggingface import TOKENIZER_FILES, fingerprint, load_params

NEVER = ("pytorch_model.bin", "modeling_small.py", "consolidated.00.pth", "onnx/model.onnx", "notes.txt", "x.gguf")


@pytest.fixture
def server(hub_model, tmp_path):
    """A hub with the model ann/small, and files that must stay there."""
    files = {path.name: path.read_bytes() for path in hub_model.iterdir()}
    files |= {"README.md": b"---\nlicense: mit\n---\n", **dict.fromkeys(NEVER, b"x")}
    with hub_server.serving(files, tmp_path / "cache") as server:
        server.files_of_small = files
        yield server


def test_a_name_is_the_folder_of_its_files(server, hub_model):
    folder = model_folder("ann/small")
    assert fingerprint(folder) == fingerprint(hub_model)
    jax.tree.map(np.testing.assert_array_equal, load_params(folder), load_params(hub_model))
    assert commit_of("ann/small", folder) == server.repos["models", "ann/small"]["branches"]["main"]
    assert newest("ann/small") == folder.name
    found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert found == sorted({*server.files_of_small} - {*NEVER}), "neither code nor pickles, nor what is not read"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*found}


def test_a_second_time_nothing_is_sent(server):
    first, before = model_folder("ann/small"), len(server.downloads())
    assert before and model_folder("ann/small") == first and len(server.downloads()) == before


def test_the_cache_serves_without_the_hub(server, monkeypatch, tmp_path):
    commit = server.add("ann/small", server.files_of_small, branch="old")
    folders = model_folder("ann/small"), model_folder("ann/small@old"), model_folder(f"ann/small@{commit}")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        seen = len(server.seen)
        again = model_folder("ann/small"), model_folder("ann/small@old"), model_folder(f"ann/small@{commit}")
        assert again == folders
        assert len(server.seen) == seen
    hub_server.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # nobody listens there
    assert model_folder("ann/small") == folders[0]


def test_revisions(server):
    config = json.loads(server.files_of_small["config.json"])
    changed = {**server.files_of_small, "config.json": json.dumps({**config, "rms_norm_eps": 1e-3}).encode()}
    first = server.repos["models", "ann/small"]["branches"]["main"]
    second = server.add("ann/small", changed, branch="refs/pr/1")
    assert model_folder("ann/small").name == first
    assert model_folder("ann/small@refs/pr/1").name == second
    assert model_folder(f"ann/small@{second}").name == second
    server.add("ann/small", changed)
    assert model_folder("ann/small").name == newest("ann/small") != first
    hub.pin({"ann/small": first})
    assert model_folder("ann/small").name == first, "a run stays where it started"


def test_a_local_folder_comes_first(server, tmp_path, monkeypatch, hub_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann" / "small@old").mkdir(parents=True)
    assert model_folder("ann/small@old").as_posix() == "ann/small@old" and hub_name("ann/small@old") is None
    (tmp_path / "ann" / "small").mkdir()
    assert model_folder("ann/small").as_posix() == "ann/small" and not server.seen


@pytest.mark.parametrize(
    "path",
    ["model", "./ann/small", "~/ann/small", "/ann/small", "a/b/c", "ann/", "gs://ann/small", "ann/model.safetensors"],
)
def test_paths_are_no_names(path):
    assert hub_name(path) is None


def test_dry_runs_need_the_config_alone(server):
    folder = config_folder("ann/small")
    assert [file.name for file in folder.iterdir()] == ["config.json"] and server.downloads() == ["config.json"]
    assert model_folder("ann/small") == folder and (folder / "model.safetensors").is_file()


def test_files_of_this_package_by_name(server):
    server.add("ann/bank", {"bank.safetensors": b"weights"})
    assert model_file("ann/bank", "bank.safetensors").read_bytes() == b"weights"


def test_the_licence_may_be_missing_in_the_cache(server, monkeypatch):
    folder = model_folder("ann/small")
    (folder / "README.md").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder("ann/small") == folder


def test_a_download_is_reported(server):
    seen = []
    model_folder("ann/small", lambda done, total: seen.append((done, total)))
    sizes = sum(len(server.files_of_small[name]) for name in server.files_of_small if name not in NEVER)
    assert seen and max(done for done, _ in seen) <= max(total for _, total in seen) <= sizes


# ---- what cannot be read

ERRORS = {
    "nobody": (
        "bob/small",
        r"bob/small: no such folder, and no model that you may read on the hub; check the name, or log in with `hf "
        r"auth login`, or set HF_TOKEN",
    ),
    "gated": (
        "eve/gated",
        r"eve/gated: its owner grants access on request; ask for it on http://127.0.0.1:\d+/eve/gated, and log in with",
    ),
    "revision": (
        "ann/small@v9",
        r"ann/small@v9: the repository has no revision 'v9'; name one of its branches, tags or commits",
    ),
    "pickle": ("ann/pickle", r"ann/pickle: the repository holds no safetensors weights, and no other format is read; "),
    "name": ("ann/small--x..y", r"ann/small--x..y: no such folder, and no name on the hub \(.*\); write owner/name or"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_read_is_one_line(server, case):
    server.add("eve/gated", server.files_of_small, gated=True)
    server.add("ann/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    path, message = ERRORS[case]
    with pytest.raises(UserError, match=message) as caught:
        model_folder(path)
    assert "\n" not in str(caught.value)


def test_offline_without_the_model(server, monkeypatch, tmp_path):
    config_folder("ann/small")  # a part of it is no model
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for name in ("ann/small", "ann/other", f"ann/small@{40 * 'a'}"):
            message = f"{name}: no such folder, and not whole in the cache .*HF_HUB_OFFLINE is set; unset it, or"
            with pytest.raises(UserError, match=message) as caught:
                model_folder(name)
            assert "\n" not in str(caught.value)
    hub_server.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(UserError, match=r"ann/other: no such folder, and the hub cannot be reached \(.*\); check"):
        model_folder("ann/other")
    assert newest("ann/other") is None


def test_tokenizers_of_all_kinds_are_fetched(server):
    assert {*TOKENIZER_FILES} <= {*hub.FILES}
