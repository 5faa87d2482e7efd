"""Trees stored in one file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pjrlhf.errors import UserError
from pjrlhf.models import folders, storage
from pjrlhf.models.storage import load_tree, save_tree


def tree():
    return {
        "bank": {"layers": {"query": {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones((2, 2), jnp.bfloat16) / 3}}},
        "view": np.arange(12, dtype=np.int32).reshape(3, 4).T[::2],
        "flags": np.array([True, False]),
        "mean": jnp.float32(0.5),
    }


def test_round_trip(tmp_path):
    note = {"rewards": ["P1A", "müde"], "models": {"P1A": {"accuracy": 0.75}}}
    save_tree(tmp_path / "x.safetensors", tree(), note)
    got, found = load_tree(str(tmp_path / "x.safetensors"))
    assert found == note
    assert jax.tree.structure(got) == jax.tree.structure(tree())
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(tree()), strict=True):
        assert isinstance(x, jax.Array) and x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_same_tree_gives_the_same_bytes(tmp_path):
    """The library's writer orders the metadata at random."""
    for i in range(12):
        save_tree(tmp_path / f"{i}.safetensors", tree(), {"rewards": ["P1A"]})
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "bfloat16"]
)
def test_dtypes_are_kept_and_every_tensor_is_aligned(tmp_path, dtype):
    given = {"first": np.ones(3, np.int8), "scalar": np.ones((), dtype), "empty": np.ones((0, 2), dtype)}
    given["last"] = np.arange(5).astype(dtype)
    save_tree(tmp_path / "x.safetensors", given)
    content = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, x in load_file(tmp_path / "x.safetensors").items():
        assert x.dtype == given[name].dtype and x.shape == given[name].shape
        np.testing.assert_array_equal(x, given[name])
        assert header[name]["data_offsets"][0] % x.dtype.itemsize == 0


def test_names_are_paths_and_a_file_of_others_has_no_note(tmp_path):
    save_tree(tmp_path / "x.safetensors", tree())
    assert "bank/layers/query/a" in load_file(tmp_path / "x.safetensors")
    assert load_tree(tmp_path / "x.safetensors")[1] == {}


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tree(path, {"x": np.zeros(2)}, {"old": True})

    def fail(file, tensors, metadata):
        file.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(storage, "write_tensors", fail)
    with pytest.raises(OSError, match="no space"):
        save_tree(path, {"x": np.ones(2)})
    assert load_tree(path)[1] == {"old": True}


def test_one_flipped_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tree(path, tree(), {"rank": 2})
    whole, silent = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            found, note = load_tree(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:  # what no one reads
            assert note == {"rank": 2} and jax.tree.structure(found) == jax.tree.structure(tree())
            assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(tree())))
            silent += 1
    assert silent < 5


def test_an_array_of_another_name_or_note_is_noticed(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    save_tree(path, {"a": np.zeros(2), "b": np.ones(2)}, {"rank": 2})
    with safe_open(path, framework="np") as file:
        metadata, arrays = file.metadata(), load_file(path)
    for tensors, changes in (({"a": arrays["b"], "b": arrays["a"]}, {}), (arrays, {"note": '{"rank": 4}'})):
        save_file(tensors, path, {**metadata, **changes})
        with pytest.raises(UserError, match="its contents are not what was saved"):
            load_tree(path)
    save_file(arrays, path)  # by other code
    assert load_tree(path)[1] == {}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, monkeypatch, dtype, value):
    path = tmp_path / "x.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(folders, "all_finite", lambda x: True)  # no writer of ours writes it
        save_tree(path, {"bank": {"a": np.zeros(2, dtype), "b": np.array([0, value], dtype)}})
    with pytest.raises(UserError, match=r"x\.safetensors: bank/b holds numbers that are not finite"):
        load_tree(path)


def test_missing_and_broken_files(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"x\.safetensors: there is no such file"):
        load_tree(path)
    path.write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match=r"x\.safetensors: cannot be read"):
        load_tree(path)
