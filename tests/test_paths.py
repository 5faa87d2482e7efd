"""Paths in a bucket, played by fsspec's file system in memory: what is read from there, and what is refused."""

import importlib.metadata

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support import tiny, tiny_users

from pjrlhf import paths
from pjrlhf.data.sources import open_source
from pjrlhf.errors import UserError
from pjrlhf.export import merge
from pjrlhf.export.merge import MergeSettings
from pjrlhf.settings import parse
from pjrlhf.training.checkpoint import Checkpoints
from pjrlhf.training.workdir import Workdir


class Store(MemoryFileSystem):
    """As object stores do, it knows names with and without their scheme, and no folders of their own."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The file system behind gs://."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.register_implementation("gcs", Store, clobber=True)
    Store.store.clear()
    return Store()


def upload(bucket, folder, name):
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.pipe_file(f"gs://{name}/{file.relative_to(folder)}", file.read_bytes())


def fetched(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache/pjrlhf/fetched").iterdir())


def test_local_paths_are_themselves(bucket, tmp_path):
    assert paths.local(tmp_path) == tmp_path and paths.local("some/folder").as_posix() == "some/folder"
    assert not (tmp_path / "cache").exists()


def test_a_model_in_a_bucket(bucket, tmp_path):
    """The same parameters, tokenizer and dimensions; weights that are not read are not copied, and none twice."""
    model = tiny_users.save_base(tmp_path)
    upload(bucket, model, "mine/models/small")
    bucket.pipe_file("gs://mine/models/small/original/consolidated.00.pth", b"0" * 1000)
    runs = []
    for path in (str(model), "gs://mine/models/small"):
        config = tiny.settings(model__path=path, stages=("reward",))
        runs.append(tiny.start(tmp_path / f"run{len(runs)}", config).workspace)
    one, other = runs
    assert other.start_folder != model and other.start_folder.name == "small"
    assert one.model_config == other.model_config and one.base_hash == other.base_hash
    jax.tree.map(np.testing.assert_array_equal, one.base, other.base)
    assert one.tokenizer.encode_prompt("shine") == other.tokenizer.encode_prompt("shine")
    assert not list(other.start_folder.rglob("*.pth"))
    # The dimensions alone are read before it is known which of the files a run needs.
    (weights,) = (tmp_path / "cache").rglob("model.safetensors")
    assert weights.parent == other.start_folder and len(list((tmp_path / "cache").rglob("config.json"))) == 2

    before = (other.start_folder / "config.json").stat().st_ino
    assert paths.local("gs://mine/models/small") == other.start_folder
    assert (other.start_folder / "config.json").stat().st_ino == before
    bucket.pipe_file("gs://mine/models/small/extra.json", b"{}")
    assert (paths.local("gs://mine/models/small") / "extra.json").is_file()
    assert len(fetched(tmp_path)) == 3 and weights.is_file()


def test_a_copy_that_is_cut_short_leaves_nothing(bucket, tmp_path, monkeypatch):
    for name in "ab":
        bucket.pipe_file(f"gs://mine/data/{name}.json", b"[]")

    def copy(there, here, size):
        raise OSError("connection lost")

    monkeypatch.setattr(paths.shutil, "copyfileobj", copy)
    with pytest.raises(UserError, match=r"gs://mine/data: cannot be reached \(connection lost\); check the name and"):
        paths.local("gs://mine/data")
    assert fetched(tmp_path) == []


def test_data_in_a_bucket(bucket):
    bucket.pipe_file("gs://mine/pairs.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}\n')
    source = open_source({"kind": "jsonl", "path": "gs://mine/pairs.jsonl"})
    assert [row["prompt"] for row in source] == ["a", "b"] and source.where(1) == "pairs.jsonl line 3"
    assert [row["prompt"] for row in open_source({"kind": "datasets", "path": "gs://mine/pairs.jsonl"})] == ["a", "b"]
    question = b'[{"question": "q", "options": ["x", "y"], "user_text": "u"}]'
    bucket.pipe_file("gs://mine/questions/one.json", question)
    columns = {"prompt": "question", "options": "options", "user_text": "user_text"}
    (row,) = open_source({"kind": "choices", "path": "gs://mine/questions", **columns})
    assert row["chosen"] == "x" and row["group"] == "one"


def test_what_is_not_there(bucket):
    for spec in ({"kind": "jsonl"}, {"kind": "datasets"}, {"kind": "choices"}):
        with pytest.raises(UserError, match=r"gs://mine/nothing.jsonl: no such file"):
            open_source({**spec, "path": "gs://mine/nothing.jsonl"})
    with pytest.raises(
        UserError, match=r"ftp://mine/x: ftp:// cannot be read; download it and name the local file or folder, or use"
    ):
        paths.local("ftp://mine/x")


def test_without_its_library_the_way_out_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    with monkeypatch.context() as patch:
        patch.setattr(paths.epath.Path, "is_dir", missing, raising=False)
        patch.setattr(type(paths.epath.Path("gs://mine")), "is_dir", missing)
        with pytest.raises(UserError, match=r"gs://mine: Please install gcsfs.*; pip install 'pjrlhf\[gcs\]'"):
            paths.local("gs://mine")


def test_every_extra_is_installed_by_its_name():
    known = importlib.metadata.metadata("pjrlhf").get_all("Provides-Extra") or []
    assert {"serve", "judge", "gcs"} <= {*known}
    for extra in known:
        assert paths.install(extra) == f"pip install 'pjrlhf[{extra}]'"
    assert paths.install("later") == "pip install '.[later]' in the folder of the clone"


def test_what_is_written_needs_a_file_system(tmp_path):
    with pytest.raises(
        UserError, match=r"gs://mine/run: a run directory must be on a file system; mount .*checkpoints"
    ):
        Workdir("gs://mine/run")
    with pytest.raises(UserError, match="s3://mine/model: a merged model must be on a file system"):
        merge.merge(MergeSettings(ingredients=("a",), weights=(1.0,), output="s3://mine/model"))


def test_a_folder_of_checkpoints_in_a_bucket_keeps_its_scheme(monkeypatch):
    """What Orbax then does with it is its own: it needs a real store."""
    asked = []
    monkeypatch.setattr("orbax.checkpoint.v1.training.Checkpointer", lambda folder, **_: asked.append(str(folder)))
    Checkpoints("gs://mine/run/sft")
    assert asked == ["gs://mine/run/sft"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    for content in ("old", "new"):
        with paths.atomic_write(path) as temporary:
            temporary.write_text(content)
        assert path.read_text() == content
    with pytest.raises(KeyboardInterrupt), paths.atomic_write(path) as temporary:
        temporary.write_text("half of it")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_path_with_a_null_character_is_refused():
    with pytest.raises(UserError, match=r"'a\\x00b': a path cannot hold a null character"):
        parse(MergeSettings, {"output": "a\0b"}, "merge")
