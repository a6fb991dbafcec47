"""Which design and cut a scan on a GPU gets: from measurements stored here, from shipped ones, or estimated."""

from __future__ import annotations

import json

import pytest
import torch

from ssmc.runtime.scan import ScanInputs
from tests.scan.test_scan import difference, naive, random_inputs
from tests.support.gpu import HAS_CUDA

pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA on Linux")
gpu = pytest.importorskip("ssmc.runtime.scan.gpu")
plans = pytest.importorskip("ssmc.runtime.scan.gpu.plans")

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """An empty cache folder, and the file in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plans.choices.cache_clear()
    yield tmp_path / "ssmc" / "scan-plans.json"
    plans.choices.cache_clear()


def test_chunks_are_as_many_as_fill_the_gpu():
    def chunks(batch: int, length: int, states: int = 16) -> int:
        plan = plans.estimated(batch * 5120, states, length, multiprocessors=132)
        assert isinstance(plan, gpu.Chunks)
        assert plan.chunk % plan.tokens == 0
        return -(-length // plan.chunk)

    assert chunks(1, 2048) == 27  # 80 blocks of channels, four warps for each of 528 schedulers
    assert chunks(1, 2048, 2) == 40  # six
    assert chunks(16, 2048) == 1
    assert chunks(1, 16) == 1


def test_what_was_stored_for_this_gpu_is_used_and_the_nearest_of_it(stored):
    few, many = gpu.Lanes(2, 2, 8, True), gpu.Chunks(64, 1, 2, 512)
    found = [plans.Choice(1536, 16, few, 30.0), plans.Choice(1536, 4, many, 10.0), plans.Choice(40960, 16, many, 99.0)]
    plans.write(stored, "another GPU", [plans.Choice(64, 16, gpu.Lanes(8, 8, 8))])
    name, _ = plans.gpu_of(torch.empty(0, device=DEVICE))
    plans.write(stored, name, found)
    assert plans.read(stored).keys() == {"another GPU", name}
    assert plans.choices(name) == tuple(found)
    assert plans.nearest(found, 1536, 12).plan == few
    assert plans.nearest(found, 1536, 3).plan == many
    assert plans.nearest(found, 30000, 16).plan == many
    inputs = random_inputs(1, 70, 3, 2)
    given = ScanInputs(**{n: t if t is None else t.to(DEVICE) for n, t in vars(inputs).items()})
    assert plans.plan_for(given) == gpu.Chunks(64, 1, 2, 18)  # 4 chunks, as it was measured
    assert difference(gpu.selective_scan(given)[0].cpu(), naive(inputs)[0]) < 1e-5
    assert isinstance(plans.plan_for(random_inputs(1, 6, 3, 16)), gpu.Chunks)  # too short for a tile


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"version": 99, "gpus": {}}),
        json.dumps({"version": 1, "gpus": {"interpreter": [{"channels": 1, "states": 0, "plan": {}}]}}),
        json.dumps(
            {
                "version": 1,
                "gpus": {"interpreter": [{"channels": 1, "states": 1, "plan": {"design": "lanes", "warps": "4"}}]},
            }
        ),
    ],
)
def test_a_broken_file_is_named_and_left_aside(stored, content):
    stored.parent.mkdir()
    stored.write_text(content)
    with pytest.warns(UserWarning, match="scan-plans.json holds no plans of the scan"):
        assert plans.choices("interpreter") == ()
    plans.write(stored, "interpreter", [plans.Choice(64, 16, gpu.Lanes())])
    assert plans.choices("interpreter")[0].plan == gpu.Lanes()


def test_a_plan_from_the_table_of_the_package_serves_gpus_it_names():
    if not plans.SHIPPED.is_file():
        pytest.skip("no table is shipped: no GPU was measured")
    for name, found in plans.read(plans.SHIPPED).items():
        assert name
        assert found
        assert torch.tensor([choice.microseconds for choice in found]).min() > 0
