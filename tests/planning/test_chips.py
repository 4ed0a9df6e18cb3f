"""Chips that are not there are named by a kind and a shape."""

import types

import pytest

from dpojax.chips import CHIPS, chip_of
from dpojax.planning.chips import Topology, TopologyError, topology
from dpojax.planning.gpu_target import text


@pytest.mark.parametrize("name", ["v5e", "h200", "v5e:", "v5e:4x", "v9:4x4", "h200:two", ""])
def test_a_topology_that_does_not_exist_is_refused_with_the_chips_that_do(name):
    with pytest.raises(TopologyError, match=r"such as v5e:4x8 or h200:8, .* v6e"):
        topology(name)


def test_devices_of_the_host_stand_for_themselves():
    devices = topology("cpu:4").devices
    assert len(devices) == 4
    assert chip_of(devices[0]) is None
    with pytest.raises(TopologyError, match="host_platform_device_count=64"):
        topology("cpu:64")


def test_every_peak_names_its_source():
    for chip in CHIPS.values():
        assert chip.source.startswith("https://")
        assert chip.link < chip.bandwidth < chip.memory * 1000


def test_a_gpu_s_target_states_its_memory_as_the_table_does():
    for name in ("a100", "h100", "h200"):
        size = int(text(name).split("device_memory_size: ")[1].split()[0])
        assert size == pytest.approx(CHIPS[name].memory, rel=0.08)


def test_gpus_are_counted_not_laid_out():
    with pytest.raises(TopologyError, match="h200:8"):
        topology("h200:2x4")


def test_two_devices_of_ironwood_are_one_chip():
    """Google's page: 2,307 TFLOP/s, 192 GiB and 7,380 GB/s for a chip, and two devices of JAX."""
    chip = CHIPS["v7x"]
    assert (2 * chip.flops, 2 * chip.memory) == (2307e12, 192 * 2**30)
    assert 2 * chip.bandwidth == 7380e9
    assert Topology("v7x:2x2x1", chip, range(8)).chip_count == 4
    assert Topology("v5p:2x2x1", CHIPS["v5p"], range(4)).chip_count == 4


def device(platform: str, kind: str):
    return types.SimpleNamespace(platform=platform, device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p")]
    + [("TPU v6 lite", "v6e"), ("TPU v6e", "v6e"), ("TPU v4", "v4"), ("TPU7x", "v7x")]
    + [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100")]
    + [("NVIDIA H100", "h100"), ("NVIDIA H100 80GB HBM3", "h100")],
)
def test_a_chip_is_known_by_each_name_that_jax_or_the_driver_gives_it(kind, name):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    assert chip_of(device(platform, kind)) is CHIPS[name]


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB"])
def test_a_slower_module_of_a_known_name_gets_no_peak(kind):
    """Nvidia states 756 TFLOP/s for the H100 on a PCIe card, and 989 for the one of the table."""
    assert chip_of(device("gpu", kind)) is None
