"""Every registered strategy trains with every codec that it accepts; it refuses the others, and says why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from hpctrain.codecs.library import LibrarySum
from hpctrain.conformance import (
    TRAINS_WITH_ITS_CODEC,
    Pair,
    Verdict,
    over_virtual_ranks,
    pairs_of,
    registered_pairs,
)
from hpctrain.job import registry
from tests.marks import mostly_slow

NODES = (0, 0, 1, 1)
PAIRS = registered_pairs()
NAMES = [pair.name for pair in PAIRS]
CODECS = [str(pair.options["codec"]) for pair in PAIRS]


def _is_quick(pair: Pair) -> bool:
    """All codecs of one strategy; of the others every third one, so that each codec is with some of them."""
    strategies = list(dict.fromkeys(NAMES))
    place = strategies.index(pair.name)
    return place == 0 or (place + pairs_of(pair.name).index(pair)) % 3 == 0


REFUSED = {  # (strategy, key of the codec, or its name): why
    ("parameter_server", "powersgd"): "sums over workers only, not at a server",
    ("parameter_server", "acp"): "sums over workers only, not at a server",
    ("parameter_server", "momentum"): "a server has a velocity for each worker",
    ("parameter_server", "feedback"): "an estimate that all workers keep of each other",
    ("parameter_server", "majority"): "a vote on sums between workers",
    ("diloco", "momentum"): "beside phases.1.strategy.outer_momentum = 0.9",
    ("diloco", "feedback"): "beside phases.1.strategy.outer_momentum = 0.9",
    ("diloco", "decay"): "beside phases.1.strategy.outer_momentum = 0.9",
    ("streaming_diloco", "momentum"): "beside phases.1.strategy.outer_momentum = 0.9",
    ("streaming_diloco", "feedback"): "beside phases.1.strategy.outer_momentum = 0.9",
    ("streaming_diloco", "decay"): "beside phases.1.strategy.outer_momentum = 0.9",
}


def _why_refused(pair: Pair) -> str | None:
    codec = pair.options["codec"]
    keys = codec.keys() if isinstance(codec, dict) else {codec}
    return next((REFUSED[pair.name, key] for key in keys if (pair.name, key) in REFUSED), None)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _verdict(pair: Pair, folder: Path) -> Verdict:
    return over_virtual_ranks(pair, TRAINS_WITH_ITS_CODEC, NODES, folder)


@pytest.mark.parametrize(
    "pair", mostly_slow(PAIRS, [pair for pair in PAIRS if _is_quick(pair)]), ids=lambda pair: pair.label
)
def test_pair_trains_or_is_refused(tmp_path: Path, pair: Pair) -> None:
    found, why = _verdict(pair, tmp_path), _why_refused(pair)
    assert found.broken is None
    if why is None:
        assert found.left_out is None
    else:
        assert found.left_out is not None
        assert found.left_out.startswith("it refuses the codec: ")
        assert why in found.left_out
        assert len(found.left_out.splitlines()) == 1


def test_there_are_enough_pairs() -> None:
    """Each strategy that has the option is with each codec; twenty pairs run at least, also among the quick ones."""
    counts = Counter(NAMES)
    assert len(set(counts.values())) == 1
    assert set(counts) >= {"all_reduce", "diloco", "local_sgd", "parameter_server"}
    assert set(counts) <= set(registry.STRATEGIES)
    quick = [pair for pair in PAIRS if _is_quick(pair) and _why_refused(pair) is None]
    assert len(quick) >= 20
    assert {str(pair.options["codec"]) for pair in quick} == set(CODECS)


def test_a_codec_that_is_not_used_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose memory is not kept in checkpoints."""
    [pair] = [pair for pair in pairs_of("local_sgd") if pair.options["codec"] == "topk"]
    monkeypatch.setattr("hpctrain.strategies.sums.StretchSums.load_own", lambda self, own: None)
    assert "a run resumed in the strategy's phase ends with different" in str(_verdict(pair, tmp_path).broken)
    monkeypatch.setattr("hpctrain.strategies.round.codec_by", lambda *given: LibrarySum())
    assert "nothing was encoded" in str(_verdict(pair, tmp_path).broken)
