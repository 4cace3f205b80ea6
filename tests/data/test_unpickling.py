import contextlib
import io
import os
import pickle

import numpy as np
import pytest

from vrnn_lightning.data.unpickling import UnsafePickleError, unpickle


def read(content: bytes):
    return unpickle(io.BytesIO(content))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_and_arrays_come_back(protocol):
    strokes = np.array([[1, -2, 0], [3, 4, 1]], dtype=np.int16)
    objects = np.empty(3, dtype=object)
    objects[:] = [strokes, strokes[:0], np.asfortranarray(strokes)]
    data = {"train": [[(60, 64), ()], [(57,)]], "o": objects, "f": np.float32(0.5), "big": np.arange(3, dtype=">f8")}
    found = read(pickle.dumps(data, protocol))
    assert found["train"] == data["train"]
    assert found["f"] == np.float32(0.5)
    np.testing.assert_array_equal(found["big"], [0.0, 1.0, 2.0])
    for one, other in zip(found["o"], objects, strict=True):
        assert one.dtype == np.int16
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_by_columns(protocol):
    for kind in (np.int16, object):
        array = np.asfortranarray(np.arange(24).reshape(2, 4, 3).astype(kind))
        np.testing.assert_array_equal(read(pickle.dumps(array, protocol)), array)


def test_a_pickle_of_python_2():
    content = (
        b"cnumpy.core.multiarray\n_reconstruct\np0\n(cnumpy\nndarray\np1\n(I0\ntp2\nS'b'\np3\ntp4\nRp5\n"
        b"(I1\n(I2\ntp6\ncnumpy\ndtype\np7\n(S'i2'\np8\nI0\nI1\ntp9\nRp10\n(I3\nS'<'\np11\nNNNI-1\nI-1\nI0\ntp12\nb"
        b"I00\nS'\\x01\\x00\\xff\\xff'\np13\ntp14\nb."
    )
    np.testing.assert_array_equal(read(content), np.array([1, -1], dtype=np.int16))


class Harm:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("call", [os.system, eval, np.fromfile, np.load, getattr, __import__])
def test_what_it_names_is_refused_and_not_run(protocol, call, tmp_path):
    target = tmp_path / "harm"
    content = pickle.dumps([Harm(call, f"touch {target}")], protocol)
    with pytest.raises(UnsafePickleError, match=call.__name__):
        read(content)
    assert not target.exists()


def test_old_instances_and_references_outside_are_refused():
    with pytest.raises(UnsafePickleError, match=r"os\.system"):
        read(b"(ios\nsystem\np0\n.")
    with pytest.raises(UnsafePickleError, match="outside the file"):
        read(b"Pother\n.")


@pytest.mark.parametrize(
    "state",
    [
        (1, (4,), np.dtype("i2"), False, b"\0\0"),
        (1, (-1,), np.dtype("i2"), False, b""),
        (1, (2,), np.dtype("O"), False, b"\0" * 16),
        (1, (2**62,), np.dtype("O"), False, [1]),
        (1, (1,), np.dtype("V8"), False, b"\0" * 8),
        (1, (1,), np.dtype([("a", "i4")]), False, b"\0" * 4),
    ],
)
def test_arrays_that_do_not_add_up(state):
    class Forged:
        def __reduce__(self):
            return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    with pytest.raises(pickle.UnpicklingError):
        read(pickle.dumps(Forged()))


def test_damaged_pickles_raise_nothing_else():
    objects = np.empty(2, dtype=object)
    objects[:] = [np.arange(6, dtype=np.int16).reshape(2, 3), [1.5, "a"]]
    whole = pickle.dumps({"a": objects, "b": [(1, 2), ()]}, 2)
    generator = np.random.default_rng(0)
    for cut in range(len(whole)):
        with pytest.raises(pickle.UnpicklingError):
            read(whole[:cut])
    for _ in range(3000):
        content = bytearray(whole)
        for place in generator.integers(len(whole), size=3):
            content[place] = generator.integers(256)
        with contextlib.suppress(pickle.UnpicklingError):
            read(bytes(content))


def test_a_list_that_holds_one_list_many_times_is_read_once():
    nested: list = [0]
    for _ in range(30):
        nested = [nested] * 10
    found = read(pickle.dumps(nested))  # 10^30 numbers in a kilobyte
    assert found[0] is found[9]


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy._core.numeric\n_frombuffer\n(I1000000000000\ncnumpy\ndtype\n(S'i2'\nI0\nI1\ntR(I5\ntS'C'\ntR.",
        b"cnumpy\nndarray\n}S'a'\nI1\nsb.",
        b"c_codecs\nencode\n(N}S'a'\nI1\nstb.",
    ],
    ids=["size", "state of a type", "state of a function"],
)
def test_what_plain_data_do_not_need(content):
    """Arrays of any size, and states of what stands for numpy's functions."""
    with pytest.raises(pickle.UnpicklingError):
        read(content)


def test_a_type_of_another_byte_order_is_not_numpy_s():
    read(pickle.dumps(np.arange(3, dtype=">i2"), 2))
    assert np.dtype("i2").isnative
    np.testing.assert_array_equal(read(pickle.dumps([np.arange(3, dtype=">i2")] * 2, 2)), [[0, 1, 2]] * 2)
