"""Messages of a fixed length: their bytes, what they lose, what is left for the next one, and values of all kinds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.codecs.bits import pack_bits, pack_signs, packed, unpack_bits, unpacked
from hpctrain.codecs.demo import LargestFrequencies
from hpctrain.codecs.half import BFloat16, Float16
from hpctrain.codecs.quantise import Int4, Int8, Quantised
from hpctrain.codecs.sign import MajoritySign, Sign
from hpctrain.codecs.sparse import TwoBitValues, largest
from hpctrain.codecs.topk import TopK
from hpctrain.codecs.wire import Plain, WireCodec
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.replica.tensors import as_array, as_tensor
from hpctrain.strategies.sums import StretchSums
from tests.marks import mostly_slow, slow

MAKERS: dict[str, Callable[[], WireCodec]] = {
    "plain": Plain,
    "bfloat16": BFloat16,
    "float16": Float16,
    "int8": Int8,
    "int8, short blocks": lambda: Int8(block=6),
    "int4": Int4,
    "int4, odd blocks": lambda: Int4(block=7),
    "sign": Sign,
    "sign, short blocks": lambda: Sign(block=16),
    "topk 1 %": lambda: TopK(0.01),
    "topk 30 %, odd chunks": lambda: TopK(0.3, chunk=333),
    "topk, all": lambda: TopK(1.0, chunk=64),
    "topk 2 %, two bits": lambda: TopK(0.02, form=TwoBitValues()),
    "demo": LargestFrequencies,
    "demo, 8 x 8": lambda: LargestFrequencies(side=8, top=5),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BYTES = {  # of a message of 10,001 float32
    "plain": 40_004,
    "bfloat16": 20_002,
    "float16": 20_010,
    "int8": 10_001 + 5 * 4,
    "int8, short blocks": 10_001 + 1667 * 4,
    "int4": 4 * 1024 + 905 + 5 * 4,
    "int4, odd blocks": 1428 * 4 + 3 + 1429 * 4,
    "sign": 1251 + 3 * 4,
    "sign, short blocks": 1251 + 626 * 4,
    "topk 1 %": (2 * 41 + 18) * 6,
    "topk 30 %, odd chunks": (30 * 100 + 3) * 6,
    "topk, all": 10_001 * 6,
    "demo": 3 * 32 * 6,
    "demo, 8 x 8": 156 * 5 * 6 + 5 * 6,
    "topk 2 %, two bits": 2 * (8 + 21 + 2 * 82) + 8 + 9 + 2 * 36,
}


def _values(length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Of different sizes in different places, as gradients of layers are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.linspace(-4, 3, max(1, length)))[:length]
    return (torch.randn(length, generator=generator) * sizes).to(dtype)


def _message(codec: WireCodec, values: torch.Tensor, rest: torch.Tensor | None = None) -> torch.Tensor:
    length, dtype = codec.shape(values)
    message = torch.full((length,), 77).to(dtype)  # memory is used again, and not cleared
    codec.encode(values, message, rest)
    return message


def _decoded(codec: WireCodec, message: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    found = torch.full_like(like, 7.0)
    codec.decode(message, found)
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_bytes_are_as_stated(name: str):
    codec, values = MAKERS[name](), _values(10_001)
    assert codec.nbytes(values) == _message(codec, values).nbytes == BYTES[name]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, [torch.float32]))
@pytest.mark.parametrize("length", mostly_slow([0, 1, 2, 3, 41, 2047, 2048, 2049, 300_001], [0, 41, 2049]))
def test_rest_is_what_the_message_leaves_out(name: str, dtype: torch.dtype, length: int):
    """To the bit; 16-bit values to the nearest."""
    codec, values = MAKERS[name](), _values(length, dtype)
    rest = torch.full_like(values, 7.0)
    message = _message(codec, values, rest)
    wide = torch.promote_types(dtype, torch.float32)
    found = _decoded(codec, message, values.to(wide))
    assert found.isfinite().all()
    assert torch.equal(rest, (values.to(wide) - found).to(dtype))
    added = torch.ones_like(values)
    codec.decode(message, added, add=True)
    torch.testing.assert_close(added, (found + 1).to(dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(_decoded(codec, message, values), found.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_rest_may_be_the_values_themselves(name: str):
    values = _values(5001)
    rest, given = torch.empty_like(values), values.clone()
    message = _message(MAKERS[name](), values, rest)
    assert torch.equal(_message(MAKERS[name](), given, given), message)
    assert torch.equal(given, rest)
    assert torch.equal(_message(MAKERS[name](), values), message)  # without one


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("value", [float("nan"), slow(float("inf")), slow(-float("inf"))])
@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, [torch.float32, torch.float16]))
def test_values_that_are_not_finite_do_not_vanish(name: str, value: float, dtype: torch.dtype):
    for length, place in ((1, 0), (5000, 0), (5000, 4999), (5000, 2500)):
        values = _values(length, dtype)
        values[place] = value
        codec, rest = MAKERS[name](), torch.zeros_like(values)
        assert not _decoded(codec, _message(codec, values, rest), values).isfinite().all()
        if codec.remembers:
            assert (~rest.isfinite()).nonzero().tolist() == [[place]], "where the error's message looks"


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("size", [0.0, 1e-45, slow(1e-38), slow(1e-30), slow(1e30), 1e36])
def test_values_of_all_sizes_arrive(name: str, size: float):
    """Errors are at most as large as the values."""
    values = torch.sign(_values(5000)) * size
    found = _decoded(MAKERS[name](), _message(MAKERS[name](), values), values)
    assert found.isfinite().all()
    assert (found - values).double().norm() <= 5000**0.5 * max(size * (1 + 1e-6), 2.0**-126)
    assert size > 0 or not found.any()


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_left_out_comes_later(name: str):
    """Error feedback: all that was decoded, plus the rest, is the sum of all that was given."""
    codec = MAKERS[name]()
    rest, given, decoded = (torch.zeros(5001, dtype=torch.float64) for _ in range(3))
    largest = 0.0
    for round in range(300):
        values = _values(5001, torch.float64, seed=round) + 1
        given += values
        codec_input = values + rest
        decoded += _decoded(codec, _message(codec, codec_input, rest), values)
        largest = max(largest, float(rest.norm() / values.norm()))
    torch.testing.assert_close(decoded + rest, given, rtol=0, atol=1e-9)
    assert largest < 40  # it does not grow without limit
    assert (decoded - given).norm() < 0.2 * given.norm()


@pytest.mark.parametrize("size", [slow(1), 2, 3, slow(5)])
@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, [torch.bfloat16]))
@pytest.mark.parametrize("name", [*MAKERS, "majority"])
def test_all_ranks_get_the_same_bits(name: str, dtype: torch.dtype, size: int):
    """Of stretches shorter than the number of ranks, and than a block, too; the sum is off by less than all of it."""
    bounds = [(0, 1000), (1000, 1002), (1002, 5000)]

    def body(comm: Communicator) -> tuple[torch.Tensor, list[torch.Tensor]]:
        given_, totals = _values(5000, dtype, seed=comm.rank), []
        values = as_tensor(comm.arena(5000, as_array(given_).dtype).mine)
        sums = StretchSums(comm, MajoritySign(64) if name == "majority" else MAKERS[name](), values, 10_000)
        for _ in range(2):
            values.copy_(given_)
            for low, high in bounds:
                sums.start(low, high)
                sums.poll()
            sums.finish()
            totals.append(values.double().clone())
        return given_.double(), totals

    found = World(size, nodes=range(size)).run(body)
    exact = torch.stack([given_ for given_, _ in found]).sum(0)
    first, again = found[0][1]
    for _, totals in found:
        assert torch.equal(totals[0], first)
        assert torch.equal(totals[1], again)
    lost = (first - exact).norm() / exact.norm()  # the other one makes up for what the first one left out
    assert lost == 0 if size == 1 else lost < (2 if name == "majority" else 1)


# Random rounding

ROUNDED = [Int8, Int4]


@pytest.mark.parametrize("kind", ROUNDED)
def test_the_mean_of_many_messages_is_what_was_given(kind: type[Quantised]):
    """With one fraction of a step everywhere, and with all: the bounds are five standard deviations."""
    codec, rounds, length = kind(), 500, 2048
    for fraction in (0.0, 0.05, 0.25, 0.5, 0.9, None):
        steps = (torch.arange(length) % (2 * codec.levels - 1) - codec.levels + 1).double()
        steps += torch.rand(length, generator=torch.Generator().manual_seed(1)) if fraction is None else fraction
        steps[0] = codec.levels / (1 + 2.0**-20)  # so that one step is 1
        values = steps.float()
        errors = torch.stack([_decoded(codec, _message(codec, values), values) - values for _ in range(rounds)])
        assert errors.abs().max() <= 1
        deviation = errors.std(0).max()
        assert errors.mean().abs() <= 5 * 0.5 / (rounds * length) ** 0.5
        assert (errors.mean(0)[1:].abs() <= 5 * deviation / rounds**0.5 + 2.0**-16).all()  # [0]: rarely one step less
        assert fraction != 0.5 or 0.45 < deviation < 0.55


def test_ranks_stretches_and_messages_round_independently():
    """The error of a mean of n falls as the root of n, and no two elements of a block go together."""
    values = torch.linspace(-1, 1, 4096)

    def spread(codecs: list[Int8]) -> float:
        errors = [_decoded(codec, _message(codec, values), values) - values for codec in codecs]
        return float(torch.stack(errors).mean(0).square().mean() / errors[0].square().mean())

    again = Int8()
    for codecs in (
        [Int8().seeded(rank, 0) for rank in range(64)],
        [Int8().seeded(0, stretch) for stretch in range(64)],
        [Int8(seed=seed) for seed in range(64)],
        [again] * 64,
    ):
        assert 0.8 / 64 < spread(codecs) < 1.25 / 64
    errors = torch.stack([_decoded(again, _message(again, values), values) - values for _ in range(400)])
    for distance in (1, 2, 4, 1024, 2048):
        together = (errors[:, distance:] * errors[:, :-distance]).mean() / errors.square().mean()
        assert abs(together) < 5 / (400 * (4096 - distance)) ** 0.5


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(values=st.lists(FLOATS, max_size=40), block=st.integers(1, 9), four=st.booleans())
@settings(max_examples=300, deadline=None)
def test_each_element_is_rounded_to_a_neighbour(values: list[float], block: int, four: bool):
    codec, given_ = (Int4 if four else Int8)(block), torch.tensor(values, dtype=torch.float32)
    found = _decoded(codec, _message(codec, given_), given_)
    for low in range(0, len(values), block):
        here = slice(low, low + block)
        step = max(float(given_[here].abs().max()) / codec.levels * (1 + 2.0**-19), 2.0**-126)
        assert ((found - given_)[here].abs() <= step * (1 + 2.0**-20)).all()


@pytest.mark.parametrize("kind", ROUNDED)
def test_messages_follow_from_seed_place_and_position(kind: type[Quantised]):
    """So a run that goes on from a checkpoint sends the same ones. The global generator is not used."""
    values, before = _values(3000), torch.random.get_rng_state()

    def messages(seed: int, place: tuple[int, int], position: int, earlier: int = 0) -> list[bytes]:
        codec = kind(seed=seed)
        own = codec.seeded(*place)
        for number in range(earlier):
            codec.position = 1000 + number
            _message(own, values)
        codec.position = position
        assert own.position == position
        return [_message(own, values).numpy().tobytes() for _ in range(3)]

    expected = messages(3, (1, 5000), 64)
    assert len(set(expected)) == 3
    assert messages(3, (1, 5000), 64, earlier=5) == expected
    others = [(4, (1, 5000), 64), (3, (0, 5000), 64), (3, (1, 0), 64), (3, (1, 5000), 65)]
    found = {message for other in others for message in messages(*other)}
    assert len(found | set(expected)) == 15
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", ROUNDED)
def test_values_that_are_not_finite_are_found_where_they_are(kind: type[Quantised]):
    values = _values(5000)
    values[[3, 100, 3000, 4999]] = torch.tensor([float("inf"), float("nan"), -float("inf"), float("nan")])
    for add in (False, True):
        found = torch.zeros_like(values)
        kind(block=64).decode(_message(kind(block=64), values), found, add=add)
        assert torch.equal(found.isfinite(), values.isfinite())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ROUNDED)
def test_the_mean_sum_over_ranks_is_right(kind: type[Quantised], size: int):
    """Each rank and each stretch rounds with its own numbers; all ranks end with the same bits."""
    length, rounds = 600, 100

    def body(comm: Communicator) -> np.ndarray:
        values = as_tensor(comm.arena(length, np.dtype(np.float32)).mine)
        sums, found = StretchSums(comm, kind(block=50), values, 200), []
        for _ in range(rounds):
            values.copy_(torch.linspace(-1, 1, length))
            for low in range(0, length, 200):
                sums.start(low, low + 200)
            sums.finish()
            found.append(values.numpy().copy())
        return np.stack(found)

    found = World(size, nodes=range(size)).run(body)
    for ranks in found:
        np.testing.assert_array_equal(ranks, found[0])
    given_ = torch.linspace(-1, 1, length)
    errors = found[0] / size - given_.numpy()
    step = 1.1 / kind(50).levels
    assert np.abs(errors.mean()) < 5 * step / (rounds * length) ** 0.5
    assert np.abs(errors.mean(0)).max() < 5 * step / rounds**0.5
    if size == 2:  # the ranks' errors are independent
        codec = kind(block=50)
        single = np.stack([_decoded(codec, _message(codec, given_), given_) - given_ for _ in range(rounds)])
        assert errors.var() < 0.55 * single.var()


# Signs


@pytest.mark.parametrize("block", [8, 64, 4096])
@pytest.mark.parametrize("length", [7, 64, 5000])
def test_signs_have_the_mean_magnitude_of_their_block(block: int, length: int):
    values = _values(length)
    values[3] = 0.0
    values[4] = -0.0
    found = _decoded(Sign(block), _message(Sign(block), values), values)
    for low in range(0, length, block):
        here = slice(low, low + block)
        expected = torch.copysign(values[here].double().abs().mean(), values[here].double())
        torch.testing.assert_close(found[here].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (13,), (3, 21), (0, 5)])
def test_bits_are_the_same_on_every_device(shape: tuple[int, ...]):
    """NumPy's, on the CPU, and torch's."""
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    written = pack_bits(flags)
    assert written.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(packed(flags), written)
    assert torch.equal(pack_signs(torch.where(flags, -0.0, 0.0)), written)
    found = unpack_bits(written)
    assert torch.equal(unpacked(written), found)
    assert torch.equal(found[..., : shape[-1]], flags)
    assert not found[..., shape[-1] :].any()


def _vote(size: int, rounds: int = 1, length: int = 1000, block: int = 200) -> tuple[torch.Tensor, list[np.ndarray]]:
    """(what the ranks gave, (rank, element); what each got)."""
    given_ = torch.stack([_values(length, seed=rank) for rank in range(size)])

    def body(comm: Communicator) -> np.ndarray:
        values = as_tensor(comm.arena(length, np.dtype(np.float32)).mine)
        sums = StretchSums(comm, MajoritySign(block), values, length)
        for _ in range(rounds):
            values.copy_(given_[comm.rank])
            sums.start(0, length)
            sums.finish()
        return values.numpy().copy()

    return given_, World(size, nodes=range(size)).run(body)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_the_majority_decides_on_signs(size: int):
    given_, found = _vote(size, length=size * 400)
    for rank in found:
        np.testing.assert_array_equal(rank, found[0])
    got, votes = torch.from_numpy(found[0]), given_.sign().sum(0)
    assert torch.equal(got.sign(), votes.sign())
    magnitude = given_.abs().view(size, -1, 200).mean(2).sum(0).repeat_interleave(200)
    torch.testing.assert_close(got.abs()[votes != 0], magnitude[votes != 0], rtol=1e-5, atol=0)


# Contraction: |values - decoded|^2 <= (1 - delta) |values|^2


def _share_lost(codec: WireCodec, values: torch.Tensor) -> float:
    rest = torch.empty_like(values)
    _message(codec, values, rest)
    return float(rest.double().square().sum() / values.double().square().sum().clamp(min=1e-300))


@given(values=st.lists(FLOATS, min_size=1, max_size=60))
@settings(max_examples=300, deadline=None)
def test_signs_are_a_contraction(values: list[float]):
    """Of a block: what is lost is 1 - |x|_1^2 / (d |x|_2^2), exactly (Karimireddy et al. 2019, lemma 8)."""
    given_ = torch.tensor(values, dtype=torch.float64)
    dense = given_.abs().sum().square() / (len(values) * given_.square().sum().clamp(min=1e-300))
    assert _share_lost(Sign(64), given_) == pytest.approx(1 - float(dense) if given_.any() else 0.0, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in MAKERS if name.startswith("topk") and "bits" not in name])
@pytest.mark.parametrize("length", [1, 100, 5000])
def test_topk_is_a_contraction(name: str, length: int):
    """What is lost is at most the share that is not kept; of a chunk, nothing larger than what is kept."""
    codec, values = MAKERS[name](), _values(length)
    found = _decoded(codec, _message(codec, values), values)
    for low in range(0, length, codec.unit):
        here, got = values[low : low + codec.unit], found[low : low + codec.unit]
        chosen = got != 0
        count = int(chosen.sum())
        assert torch.equal(got[chosen], here[chosen])
        assert chosen.all() or here[~chosen].abs().max() <= here[chosen].abs().min()
        assert _share_lost(codec, here.clone()) <= 1 - count / len(here) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_bits_keep_signs_and_two_magnitudes(dtype: torch.dtype):
    values = _values(5 * 41, dtype).view(5, 41)
    values[4] = 3.0  # one magnitude alone
    form = TwoBitValues()
    written = form.write(values)
    found = form.read(written, 41, dtype)
    assert written.shape == (5, form.nbytes(41, dtype))
    assert torch.equal(found.sign(), values.sign())
    for row, got in zip(values.abs(), found.abs(), strict=True):
        high = row > row.mean()
        for half in (high, ~high):
            assert not half.any() or got[half].unique() == pytest.approx(float(row[half].mean()), rel=1e-5)


@pytest.mark.parametrize(("keep", "chunk"), [(0.0, 64), (1.01, 64), (0.5, 0), (0.5, 2**15 + 1)])
def test_topk_refuses_shares_and_chunks_that_it_cannot_write(keep: float, chunk: int):
    with pytest.raises(ValueError, match=f"given: {keep:g}, {chunk}"):
        TopK(keep, chunk)


def test_places_in_the_longest_chunk_are_written():
    values = torch.zeros(2**15)
    values[-1] = 1.0
    assert torch.equal(_decoded(TopK(1e-9, 2**15), _message(TopK(1e-9, 2**15), values), values), values)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_largest_are_found(data: st.DataObject):
    """In groups and without, with ties."""
    width, rows = data.draw(st.sampled_from([1, 7, 16, 64, 72, 4096])), data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, min(width, 80)))
    seed, ties = data.draw(st.integers(0, 1000)), data.draw(st.booleans())
    magnitudes = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    magnitudes = (magnitudes * 10).floor_() if ties else magnitudes
    places = largest(magnitudes, count)
    assert all(len(row.unique()) == count for row in places)
    found = magnitudes.gather(1, places).sort(1, descending=True).values
    assert torch.equal(found, magnitudes.sort(1, descending=True).values[:, :count])


# Frequencies


def test_frequencies_are_those_of_the_cosine_transform():
    """One cosine is one coefficient, and is sent as it is; two of equal size and a smaller one leave the latter."""
    place = torch.arange(64, dtype=torch.float64) + 0.5

    def wave(down: int, across: int) -> torch.Tensor:
        return torch.outer(torch.cos(torch.pi / 64 * down * place), torch.cos(torch.pi / 64 * across * place)).view(-1)

    codec = LargestFrequencies(top=2)
    values, small = wave(3, 10) + wave(10, 3), 0.9 * wave(0, 5)
    rest = torch.empty_like(values)
    found = _decoded(codec, _message(codec, values + small * 0.5, rest), values)
    torch.testing.assert_close(found, values, rtol=0, atol=1e-12)
    torch.testing.assert_close(rest, small * 0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 100, 4096, 10_001])
def test_frequencies_are_a_contraction(length: int):
    """Noise loses at most the share of the frequencies that are not sent; smooth values lose far less."""
    codec = LargestFrequencies()
    assert _share_lost(codec, _values(length)) <= 1 - min(length, 32) / 4096 + 1e-6
    smooth = torch.sin(torch.linspace(0, 20, length)) + 1
    assert length < 4096 or _share_lost(codec, smooth) < 0.1
