"""Devices of the memory plan: those of the table, those given by numbers, and this machine, probed."""

import time

import pytest
import torch

from cascade_fast.input_checks import InputError
from cascade_fast.plan import main
from cascade_fast.planning import devices
from cascade_fast.planning.devices import DEVICES, find_device
from cascade_fast.planning.memory import GIB


def test_this_machine_is_probed_unless_its_rates_are_given():
    device = find_device("cpu", "float32", tflops=1.0, gbs=10.0, memory_gib=4.0)
    assert (device.memory_bytes, device.bytes_per_second, device.dtype) == (4 * GIB, 10e9, torch.float32)
    probed = find_device("cpu", "float32")
    assert probed.on_cpu
    assert probed.rate > 1e8
    assert probed.bytes_per_second > 1e8
    with pytest.raises(InputError, match=r"device: 'abacus'.*or one of t4, l4, a100"):
        find_device("abacus", "auto")


@pytest.mark.parametrize(("rate", "largest"), [(1e15, 2048), (5e10, 1024), (1e9, 256)])
def test_a_slow_device_is_probed_by_a_small_product(monkeypatch, rate, largest):
    """A second passes with the first product, which loads libraries."""
    clock, sizes = [0.0], []

    def mm(a, b):
        clock[0] += 2 * len(a) ** 3 / rate + (not sizes)
        sizes.append(len(a))

    monkeypatch.setattr(devices.torch, "mm", mm)
    monkeypatch.setattr(devices.torch, "ones", lambda *shape, device, dtype: torch.empty(shape, device="meta"))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(devices, "wait_for", lambda device: None)
    monkeypatch.setattr(devices, "PROBE_SECONDS", 1e-5)
    assert devices._probe_flops(torch.device("cuda"), torch.float16) == pytest.approx(rate)
    assert sizes == sorted(sizes)
    assert sizes[-1] == largest


def test_a_gpu_is_probed_with_many_calls_for_each_wait(monkeypatch):
    calls, waited = 0, []

    def run():
        nonlocal calls
        calls += 1

    monkeypatch.setattr(devices, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(devices, "wait_for", lambda device: (time.sleep(0.002), waited.append(calls)))
    seconds = devices._seconds(run, torch.device("cuda"))
    assert waited == [devices.PROBE_QUEUE * i for i in range(1, len(waited) + 1)]
    assert devices.PROBE_QUEUE >= 10
    assert 0.002 / devices.PROBE_QUEUE <= seconds < 0.002  # of one call


@pytest.mark.parametrize(
    ("name", "dtype", "memory", "flops", "bandwidth"),
    [
        ("t4", torch.float16, 14.56, 65e12, 320e9),
        ("l4", torch.bfloat16, 22.16, 121e12, 300e9),
        ("v100", torch.float16, 15.77, 125e12, 900e9),
        ("a100", torch.bfloat16, 39.56, 312e12, 1555e9),
        ("h100", torch.bfloat16, 79.1, 989.4e12, 3350e9),
        ("rtx3090", torch.bfloat16, 23.57, 71e12, 936e9),  # half of what it does with float16 accumulators
        ("rtx4090", torch.bfloat16, 23.52, 165.2e12, 1008e9),
    ],
)
def test_gpus_by_name(name, dtype, memory, flops, bandwidth):
    """Dense peaks of the vendor's tables; without bfloat16 units it is as slow as float32."""
    device = find_device(name, "auto")
    assert device.dtype == dtype
    assert (device.memory_bytes, device.flops["float16"], device.bytes_per_second) == (memory * GIB, flops, bandwidth)
    assert device.flops["bfloat16"] == (flops if dtype == torch.bfloat16 else device.flops["float32"])
    assert device.flops["float32"] < flops
    assert device.fused_attention == (dtype == torch.bfloat16)
    assert not device.here
    assert find_device(name, "float32").dtype == torch.float32


def test_every_gpu_of_the_table_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert {name for name in DEVICES if name not in said} == set()


def test_a_gpu_by_its_numbers(capsys):
    """Memory, rate and bandwidth as given, whatever this machine has; nothing is probed."""
    numbers = dict(memory_gib=24.0, tflops=80.0, gbs=900.0)
    device = find_device("auto", "auto", **numbers)
    assert (device.on_cpu, device.here, device.dtype) == (False, False, torch.bfloat16)
    assert (device.memory_bytes, device.bytes_per_second) == (24 * GIB, 900e9)
    assert device.flops == dict.fromkeys(("float16", "bfloat16", "float32"), 80e12)
    assert find_device("auto", "float16", **numbers).dtype == torch.float16
    assert device.ram_bytes == 32 * GIB
    assert find_device("auto", "auto", **numbers, ram_gib=8.0).ram_bytes == 8 * GIB
    flags = ["--memory-gib", "24", "--tflops", "80", "--gbs", "900"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    for word in ("a GPU with 24 GiB, 80 TFLOP/s, 900 GB/s, bfloat16", "GiB of 24.00", "32.00 TFLOP/s (40% of peak)"):
        assert word in said
    assert "GiB of host RAM" in said.splitlines()[-1]  # assumed
    assert main([*flags, "--ram-gib", "1"]) == 1
    said = capsys.readouterr().out
    assert "does NOT fit" in said
    assert "GiB of 1.00" in said
    assert "GiB of host RAM" not in said.splitlines()[-1]


def test_a_number_of_a_named_gpu_is_changed():
    """A V100 with 32 GB."""
    device = find_device("v100", "auto", memory_gib=31.74)
    assert device.memory_bytes == 31.74 * GIB
    assert device.flops == DEVICES["v100"].flops
