"""How many runs train side by side: by cores, GPUs, memory and runs."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from flashmhf.comparison import Comparison, jobs
from flashmhf.comparison.jobs import PROCESS_MIB, cores, count_jobs
from flashmhf.comparison.plan import Plan
from flashmhf.data.config import DataConfig
from flashmhf.estimates.memory import estimate_memory
from flashmhf.training.config import TrainConfig

GIB = 2**30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what this machine has; by default 16 cores and 64 GiB."""

    def have(number: int = 16, memory: int = 64 * GIB, gpus: int = 0, **cgroup: str) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)), raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: number)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(jobs, "CGROUP", tmp_path / "cgroup")
        (tmp_path / "cgroup").mkdir(exist_ok=True)
        for name, text in cgroup.items():
            (tmp_path / "cgroup" / name.replace("_", ".")).write_text(text)

    have()
    return have


def plan(folder: Path, model: str = "flashmhf-tiny", seeds: int = 3, flags: tuple[str, ...] = ()) -> Plan:
    settings = Comparison(
        variants=("swiglu", "flashmhf"),
        models=(model,),
        seeds=tuple(range(seeds)),
        train=TrainConfig(model="", data=DataConfig(context_length=256)),
        training_flags=flags,
    )
    return Plan(settings, folder)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 6), (64, 6)],  # with 4 or 5 cores, six runs are two rounds of three
)
def test_one_run_per_core_and_no_more_than_rounds_require(machine, tmp_path, number, expected):
    machine(number)
    assert count_jobs(plan(tmp_path), {}) == expected


def test_learning_rates_that_are_tried_are_runs_too(machine, tmp_path):
    one_seed = plan(tmp_path, seeds=1)
    assert count_jobs(one_seed, {}) == 2
    rates = dict.fromkeys(("swiglu", "flashmhf"), (1e-3, 2e-3, 4e-3))
    assert count_jobs(Plan(replace(one_seed.settings, learning_rates=rates), tmp_path), {}) == 6


def test_threads_that_are_given_are_those_of_each_run(machine):
    assert cores({}) == 16
    assert cores({"OMP_NUM_THREADS": "1"}) == 16
    assert cores({"OMP_NUM_THREADS": "4"}) == 4
    assert cores({"OMP_NUM_THREADS": "32"}) == 0  # `count_jobs` makes it one
    assert cores({"OMP_NUM_THREADS": "4,2"}) == 16


def test_hyperthreads_are_no_cores(machine, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert cores({}) == 8


def test_the_limits_of_a_container(machine, tmp_path):
    machine(cpu_max="200000 100000\n")
    assert cores({}) == 2
    machine(cpu_max="max 100000\n")
    assert cores({}) == 16
    machine(memory_max=str(3 * GIB), memory_current=str(2 * GIB), memory_stat=f"anon 1\ninactive_file {2 * GIB}\n")
    assert jobs._available_mib() == 3 * 1024
    machine(memory_max="max\n")
    assert jobs._available_mib() == 64 * 1024


def test_a_large_model_is_not_started_once_per_core(machine, tmp_path):
    """Whatever the memory is, all runs together take less."""
    large = plan(tmp_path, "flashmhf-370m", seeds=8)
    most = max(estimate_memory(variant.config, "ddp", 1, 8, 256, False).peak for variant in large.variants)
    found = []
    for gib in (1, 16, 32, 64):
        machine(memory=gib * GIB)
        found.append(count_jobs(large, {}))
        assert found[-1] == 1 or found[-1] * (PROCESS_MIB + most) <= gib * 1024
    assert found[0] == 1 < found[2] < found[3] < 16
    one_sequence = plan(tmp_path, "flashmhf-370m", seeds=8, flags=("--per-device-train-batch-size", "1"))
    assert count_jobs(one_sequence, {}) > found[3]


@pytest.mark.parametrize(("gpus", "expected"), [(1, 1), (2, 2), (4, 3), (8, 6)])
def test_one_run_per_gpu(machine, tmp_path, gpus, expected):
    machine(gpus=gpus)
    assert count_jobs(plan(tmp_path), {}) == expected


def test_an_accelerator_that_cannot_be_shared_trains_one_run(machine, tmp_path, monkeypatch):
    arguments: Any = SimpleNamespace(use_cpu=False)
    monkeypatch.setattr(jobs, "parse_arguments", lambda flags, folder: arguments)
    assert count_jobs(plan(tmp_path), {}) == 1
