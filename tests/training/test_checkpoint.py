"""Checkpoints: bit-exact over device counts, and robust to partial or damaged files."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjrlhf.errors import UserError
from pjrlhf.training.checkpoint import Checkpoints, abstract, checksums
from pjrlhf.training.state import State

POSITION = {"next_index": 5, "inner": [b"\x00\xff", None]}


def make_state(seed=0):
    key = jax.random.key(seed)
    trainable = {
        "w": jax.random.normal(key, (8, 64)),
        "half": jax.random.normal(key, (8, 3), jnp.bfloat16).at[0, 0].set(jnp.nan),
        "flags": jnp.array([True, False]),
    }
    return State.create(
        key, trainable, optax.adam(1e-3), control={"kl": jnp.float32(0.2)}, keys=jax.random.split(key, 3)
    )


def place(state, devices):
    """`w` and its moments split over `devices`, the rest replicated."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))

    def spec(x):
        return PartitionSpec("data") if x.shape == (8, 64) else PartitionSpec()

    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(folder, **states):
    with Checkpoints(folder, max_to_keep=3) as checkpoints:
        for step, state in states.items():
            checkpoints.save(int(step[1:]), state, POSITION)


def largest_data_file(folder):
    return max((path for path in folder.glob("state/**/d/*")), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_])
@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x[:, ::-1],
        lambda x: x[::-1],
        lambda x: np.roll(x, 1),
        lambda x: x.T.reshape(x.shape),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, x[2, 1], x),
    ],
    ids=["columns", "rows", "rolled", "transposed", "copied"],
)
def test_checksums_depend_on_the_place_of_every_word(damage, dtype):
    x = np.arange(12).reshape(3, 4) - 6.5
    x = np.asarray(x > 0 if dtype == jnp.bool_ else x, dtype)
    if dtype == jnp.bool_:
        x[0, 0] = True  # else its columns would be equal
    damaged = damage(x)
    assert (damaged != x).any()
    assert checksums([x])[0] != checksums([damaged])[0]


def test_checksums_see_two_swapped_words():
    """Any two, including two that differ in sign only."""
    x = np.concatenate([np.arange(1, 9), -np.arange(1, 9)]).astype(np.float32)
    swapped = np.tile(x, (x.size * (x.size - 1) // 2, 1))
    for row, (i, j) in zip(swapped, itertools.combinations(range(x.size), 2), strict=True):
        row[[i, j]] = row[[j, i]]
    assert len({int(sum_) for sum_ in checksums([x, *swapped])}) == 1 + len(swapped)


def test_bit_for_bit_over_8_4_and_1_devices(tmp_path):
    state = place(make_state(), 8)
    save(tmp_path, s1=state)
    for step, devices in ((1, 4), (2, 1)):
        with Checkpoints(tmp_path) as checkpoints:
            template = abstract(place(make_state(seed=9), devices))
            restored, position = checkpoints.restore(template)
            assert position == POSITION
            assert_same(restored, state)
            assert len(restored.trainable["w"].sharding.device_set) == devices
            assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, template)
            checkpoints.save(step + 1, restored, position)
            state = restored


def test_uncommitted_arrays_stay_uncommitted_beside_sharded_ones(tmp_path):
    # Otherwise a jitted step would reject the restored state, which would mix one device and eight.
    state = make_state().replace(trainable=place(make_state().trainable, 8))
    save(tmp_path, s1=state)
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(state)
    assert_same(restored, state)
    assert jax.tree.map(lambda x: x.committed, restored) == jax.tree.map(lambda x: x.committed, state)
    assert not restored.step.committed


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (2000, 1000))}
    before = np.array(state["w"])
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, None)
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(state)
    assert (np.asarray(restored["w"]) == before).all()


def test_only_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (3, 6, 9):
            checkpoints.save(step, make_state(), POSITION, wait=True)
        assert checkpoints.steps() == [6, 9]
        assert checkpoints.latest() == 9


@pytest.mark.parametrize(("best", "step"), [("loss", 2), ("max accuracy", 1)])
def test_the_best_stays_beside_the_newest(tmp_path, best, step):
    with Checkpoints(tmp_path, max_to_keep=1, best=best) as checkpoints:
        assert checkpoints.best() is None
        for number, loss, accuracy in ((1, 0.9, 0.8), (2, 0.3, 0.6), (3, 0.5, 0.7), (4, 0.7, 0.2)):
            metrics = {"loss": loss, "accuracy": accuracy}
            checkpoints.save(number, make_state(number), POSITION, wait=True, metrics=metrics)
        assert checkpoints.steps() == [step, 4] and checkpoints.best() == step
        assert_same(checkpoints.restore(make_state(), step)[0], make_state(step))
        with pytest.raises(UserError, match=r"keep_best: step 5 has no metric .*; it has lr"):
            checkpoints.save(5, make_state(), POSITION, metrics={"lr": 1.0})
    with Checkpoints(tmp_path, max_to_keep=1, best=best) as checkpoints:
        assert checkpoints.best() == step


def test_a_half_written_checkpoint_is_ignored_and_can_be_written_again(tmp_path):
    save(tmp_path, s1=make_state(1), s2=make_state(2))
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    largest_data_file(tmp_path / "2.orbax-checkpoint-tmp").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert_same(checkpoints.restore(make_state())[0], make_state(1))
        checkpoints.save(2, make_state(3), POSITION, wait=True)
        assert_same(checkpoints.restore(make_state())[0], make_state(3))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


# Orbax leaves the futures of a failed read behind.
leaves_futures = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")


@leaves_futures
@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    save(tmp_path, s1=make_state(1), s2=make_state(2))
    damage(largest_data_file(tmp_path / "2"))
    with Checkpoints(tmp_path) as checkpoints:
        restored, position = checkpoints.restore(make_state())
        assert_same(restored, make_state(1))
        assert position == POSITION
        assert checkpoints.steps() == [1]
    assert f"{tmp_path / '2'} cannot be read" in caplog.text
    assert (tmp_path / "2.damaged").is_dir()


@leaves_futures
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("_CHECKPOINT_METADATA", "[]"),
        ("_CHECKPOINT_METADATA", "{"),
        ("host/data.json", "{}"),
        ("host/data.json", "[]"),
        ("host/data.json", '{"iterator": 3, "checksums": []}'),
    ],
)
def test_a_damaged_description_is_passed_over(tmp_path, name, content):
    save(tmp_path, s1=make_state(1), s2=make_state(2))
    (tmp_path / "2" / name).write_text(content)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(make_state())[0]
    whole = name == "_CHECKPOINT_METADATA" and content == "{"  # Orbax needs no word of it
    assert_same(found, make_state(2 if whole else 1))


@leaves_futures
def test_the_same_checkpoint_can_be_damaged_twice(tmp_path):
    for seed in (2, 3):
        save(tmp_path, s1=make_state(1), s2=make_state(seed))
        truncate(largest_data_file(tmp_path / "2"))
        with Checkpoints(tmp_path) as checkpoints:
            assert_same(checkpoints.restore(make_state())[0], make_state(1))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["1", "2.damaged"]


@leaves_futures
def test_when_none_is_readable_the_error_names_the_path_and_nothing_is_moved(tmp_path):
    save(tmp_path, s1=make_state(1), s2=make_state(2))
    for step in ("1", "2"):
        truncate(largest_data_file(tmp_path / step))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=f"{tmp_path}/2: this checkpoint cannot be read .*delete {tmp_path} to"):
            checkpoints.restore(make_state())
        assert checkpoints.steps() == [1, 2]
        with pytest.raises(UserError, match=f"{tmp_path}/1: .*delete {tmp_path}/1 to"):
            checkpoints.restore(make_state(), step=1)
        with pytest.raises(UserError, match="holds no checkpoint of step 7"):
            checkpoints.restore(make_state(), step=7)


@leaves_futures
def test_a_template_of_another_shape_is_refused(tmp_path):
    save(tmp_path, s1={"w": jnp.ones((4, 2))})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="cannot be read"):
        checkpoints.restore({"w": jnp.ones((4, 3))})
